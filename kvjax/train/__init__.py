"""Data, loss and training step: what the demo model is trained with."""

"""Dense attention for training and prefill."""

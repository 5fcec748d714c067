"""Checkpoints in and out of the Hugging Face layout, and between ways of storing them."""

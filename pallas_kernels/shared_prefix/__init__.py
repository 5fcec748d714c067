"""Attention of sequences that share the pages of a prefix."""

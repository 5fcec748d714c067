"""kvjax against transformers: the same random weights, the same tokens, the same numbers."""

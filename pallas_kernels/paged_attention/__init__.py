"""Attention over the page pool through a block table."""

"""Prefill, the decode loop, sampling, beam search and scoring."""

"""The immutable paged KV cache: pure functions over one pytree. Imports nothing of ours but errors and types."""

"""The read side: what a model's attention layers are given as `attend`."""

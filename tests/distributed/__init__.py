"""Meshes and sharded parameters."""

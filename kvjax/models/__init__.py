"""Linen models. The only package that imports flax; it knows nothing of caches: attention calls an injected `attend`."""

from kvjax.models.transformer import Decoder, Layer, stack_layers, unstack_layers

__all__ = ["Decoder", "Layer", "stack_layers", "unstack_layers"]

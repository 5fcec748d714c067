"""Linen models: the only package that imports flax. It knows nothing of caches: attention calls a given `attend`."""

from kvjax.models.encoder import Encoder
from kvjax.models.transformer import HIDDEN_STATES, Decoder, Layer, stack_layers, unstack_layers

__all__ = ["HIDDEN_STATES", "Decoder", "Encoder", "Layer", "stack_layers", "unstack_layers"]

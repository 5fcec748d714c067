"""Where training from scratch begins."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from kvjax.config import ModelConfig
from kvjax.model import init
from kvjax.typing import Params


def initial_params(config: ModelConfig, seed: int) -> Params:
    """Per-layer float32 weights whose residual stream starts as the embeddings alone.

    Embeddings have unit variance (0.02 where the head is tied to them, or the first logits would be far too large), and
    what each block adds starts at zero: with blocks at full size beside small embeddings, a token would be drowned from
    the first layer on.
    """

    def adjust(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        names = [entry.key for entry in path]
        if names[:2] == ["encoder", "embed"]:
            return leaf / 0.02
        if names[0] == "embed":
            return leaf if config.tie_word_embeddings else leaf / 0.02
        if names[0] == "head":
            return 0.3 * leaf
        return jnp.zeros_like(leaf) if names[-2] in ("o", "down") else leaf

    return jax.tree_util.tree_map_with_path(adjust, init(config, seed, dtype=jnp.float32).params)

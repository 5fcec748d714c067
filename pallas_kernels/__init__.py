"""Attention operations, one folder each: `api` (dispatch, validation), `reference` (plain jnp), one file per backend.

Imports nothing of kvjax, and no flax.
"""

from pallas_kernels.append.api import Pools, append
from pallas_kernels.attention.api import attention, attention_weights
from pallas_kernels.merge import merge
from pallas_kernels.paged_attention.api import paged_attention, paged_weights
from pallas_kernels.shared_prefix.api import shared_prefix

__all__ = [
    "Pools",
    "append",
    "attention",
    "attention_weights",
    "merge",
    "paged_attention",
    "paged_weights",
    "shared_prefix",
]

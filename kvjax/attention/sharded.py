"""The attention operations of `pallas_kernels` as kvjax calls them: on a mesh, each device on its own share.

Keys, values and pools are never gathered: sequences are split over the mesh's rows, query heads with their KV head over
"tensor". Pools belong to all sequences; their heads are split where a page holds all of them, and block tables where
each head has a row of its own.
"""

from __future__ import annotations

import pallas_kernels
from kvjax.partition import partitioned

_DENSE = {
    "q": "BTH",
    "k": "BSK",
    "v": "BSK",
    "lse": "BTH",
    "row_weights": "BT",
    "lengths": "B",
    "segment_ids": "BT",
    "positions": "BS",
    "q_positions": "BT",
}
PAGED = {
    "q": "BTH",
    "k_pool": "PLK",
    "v_pool": "PLK",
    "block_table": "BK",
    "lengths": "BK",
    "lse": "BTH",
    "row_weights": "BT",
    "positions": "BK",
    "q_positions": "BT",
    "k_scale": "PLK",
    "k_min": "PLK",
    "v_scale": "PLK",
    "v_min": "PLK",
}

attention = partitioned(pallas_kernels.attention, _DENSE, ("BTH", "BTH"))
attention_weights = partitioned(pallas_kernels.attention_weights, _DENSE, "BK")
paged_attention = partitioned(pallas_kernels.paged_attention, PAGED, ("BTH", "BTH"))
paged_weights = partitioned(pallas_kernels.paged_weights, PAGED, "BK")

"""Run twice by test_sharding.py, as two processes of one run: `two_processes.py PORT NUMBER FOLDER`.

Each prints the losses it saw as JSON: of a run that is stopped after three of five steps and gone on with, and of one
of adapters.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.config import MeshConfig, ModelConfig
from kvjax.model import init
from kvjax.train import Every, LoRA, finetune

CONFIG = ModelConfig(
    vocab_size=32, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8
)
TOKENS = np.tile(np.random.default_rng(0).integers(0, 32, (16, 2)), (1, 8)).astype(np.int32)


def trained(folder: Path, **options: Any) -> list[float]:
    """The losses of this process."""
    losses: list[float] = []
    finetune(
        init(CONFIG, dtype=jnp.float32),
        TOKENS,
        **{"steps": 5, "batch_size": 8, "learning_rate": 1e-3, **options},
        mesh=MeshConfig(("fsdp",), (2,)),
        run=folder,
        every=Every(save=2),
        report=lambda told: losses.append(told.numbers["loss"]),
    )
    return losses


def main(port: str, number: int, folder: Path) -> dict[str, list[float]]:
    """What this process sees."""
    jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=number)
    assert jax.device_count() == 2
    left = iter([False, False])
    first = trained(folder / "run", stopped=lambda: next(left, True))
    rest = trained(folder / "run")
    return {"first": first, "rest": rest, "adapters": trained(folder / "adapters", steps=2, trainable=LoRA(rank=2))}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))))

"""The run that tests of checkpoints start, here or in a process of its own: `tiny_run.py FOLDER STEPS [LIMIT]`.

Each step is printed as "step loss", the loss in hexadecimal; at last "weights" and a hash of them. LIMIT: the most
bytes that a file may have, as on a full disk.
"""

from __future__ import annotations

import hashlib
import resource
import signal
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.config import ModelConfig
from kvjax.model import Model, init
from kvjax.train import Every, Told, finetune

CONFIG = ModelConfig(
    vocab_size=32, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8
)
TOKENS = np.tile(np.random.default_rng(0).integers(0, 32, (20, 2)), (1, 8)).astype(np.int32)


def begin() -> Model:
    """The model that every run begins with."""
    return init(CONFIG, dtype=jnp.float32)


def trained(folder: Any = None, model: Model | None = None, **options: Any) -> tuple[Model, dict[int, str]]:
    """The model after the run, and each step's loss to the last bit."""
    losses: dict[int, str] = {}

    def note(told: Told) -> None:
        losses[told.step] = told.numbers["loss"].hex()

    settings: dict[str, Any] = dict(tokens=TOKENS, steps=6, batch_size=4, learning_rate=1e-2, every=Every(save=2))
    return finetune(model or begin(), **{"report": note, "run": folder, **settings, **options}), losses


def digest(model: Model) -> str:
    """Equal for equal weights alone."""
    leaves = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(model.params)]
    return hashlib.sha256(b"".join(leaves)).hexdigest()


if __name__ == "__main__":
    if len(sys.argv) > 3:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), int(sys.argv[3])))

    def show(told: Told) -> None:
        """Tells the process that watches."""
        print(told.step, told.numbers["loss"].hex(), flush=True)

    model, _ = trained(Path(sys.argv[1]), steps=int(sys.argv[2]), report=show)
    print("weights", digest(model), flush=True)

"""Compiling ahead: before the first request, and across processes."""

from __future__ import annotations

from pathlib import Path

import jax

from kvjax.cache.config import CacheConfig
from kvjax.cache.size import context_bucket, power_of_two
from kvjax.config import Sampling
from kvjax.errors import RequestError
from kvjax.generate.api import generate
from kvjax.model import Model


def warmup(
    model: Model,
    cache: CacheConfig = CacheConfig(),
    *,
    batch: int = 1,
    context: int = 2048,
    sampling: Sampling = Sampling(),
    prefill_chunk: int | None = None,
    backend: str | None = None,
) -> int:
    """Compiles what `generate` needs for up to `batch` prompts of up to `context` tokens, prompt and new together.

    Tables and batches have power-of-two sizes, so this is one compilation per size of either; afterwards no mix of
    prompt lengths within these bounds compiles anything.

    Returns:
      Programs compiled.
    """
    if batch < 1 or context < 2:
        raise RequestError(f"warmup needs batch of at least 1 and context of at least 2, got {batch} and {context}")
    compiled = 0
    size = 1
    while size <= power_of_two(batch):
        bucket = context_bucket(1)
        while bucket <= context_bucket(context):
            # A fixed pool may hold few tokens: two are enough to compile every program of this size.
            out = generate(
                model,
                [[0]] * size,
                max_new_tokens=3,
                cache=cache,
                sampling=sampling,
                prefill_chunk=prefill_chunk,
                backend=backend,
                context=bucket,
            )
            compiled += out.stats.compiles
            bucket *= 2
        size *= 2
    return compiled


def enable_compilation_cache(folder: str | Path | None = None) -> Path:
    """Keeps compiled programs on disk, so that a second start is quick.

    Args:
      folder: where; None: ~/.cache/kvjax/xla. Made if missing. Nothing is ever deleted from it.

    Returns:
      The folder.
    """
    path = Path(folder) if folder is not None else Path.home() / ".cache" / "kvjax" / "xla"
    path.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
    return path

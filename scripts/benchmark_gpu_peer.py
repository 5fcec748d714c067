"""The peer of `benchmark_gpu`: decoding in transformers with a static cache and torch.compile, random weights.

    python scripts/benchmark_gpu_peer.py '[[1, 1024], [8, 1024]]' '{"hidden_size": 4096, ...}'

Prints a line of JSON for each (batch, context). A step's time is the median over the later half of the generated
tokens, after compilation, as the host sees them.
"""

from __future__ import annotations

import itertools
import json
import statistics
import sys
import time
from typing import Any

import torch
import transformers


def model_of(shape: dict[str, int], device: str, context: int) -> Any:
    """A Llama of this shape with random weights, made on the device."""
    config = transformers.LlamaConfig(
        vocab_size=shape["vocab_size"],
        hidden_size=shape["hidden_size"],
        intermediate_size=shape["intermediate_size"],
        num_hidden_layers=shape["num_layers"],
        num_attention_heads=shape["num_heads"],
        num_key_value_heads=shape["num_kv_heads"],
        max_position_embeddings=context,
        bos_token_id=0,
        eos_token_id=None,
    )
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model.eval()


def step_seconds(model: Any, batch: int, context: int, steps: int) -> float:
    """Seconds of a decoding step with `context` tokens before it."""
    tokens = torch.ones((batch, context), dtype=torch.long, device=model.device)
    seen: list[float] = []

    def note(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        # Generation waits for the device at every step to know whether all have ended; this is such a place.
        ids[0, -1].item()
        seen.append(time.perf_counter())
        return torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device)

    with torch.inference_mode():
        model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=steps,
            do_sample=False,
            pad_token_id=0,
            cache_implementation="static",
            stopping_criteria=transformers.StoppingCriteriaList([note]),
        )
    taken = [after - before for before, after in itertools.pairwise(seen)]
    return statistics.median(taken[len(taken) // 2 :])


def main() -> None:
    """Reads what to measure from the command line."""
    wanted, shape = json.loads(sys.argv[1]), json.loads(sys.argv[2])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    transformers.logging.set_verbosity_error()
    steps = max(shape["steps"], 4)
    model = model_of(shape, device, max((context for _, context in wanted), default=0) + steps)
    for batch, context in wanted:
        row: dict[str, Any] = {"batch": batch, "context": context}
        try:
            row["step_ms"] = 1e3 * step_seconds(model, batch, context, steps)
        except Exception as error:
            row["reason"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        print(json.dumps(row), flush=True)
        if device == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()

"""The training step: optimisers, schedules, and one jitted function that donates its state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from kvjax.attention.dense import DenseAttend
from kvjax.config import ModelConfig
from kvjax.generate.contexts import context_of
from kvjax.models import Decoder
from kvjax.train.attend import BlockCausalAttend
from kvjax.train.loss import token_losses
from kvjax.typing import Params

MATRICES = {
    "weight": optax.contrib.MuonDimensionNumbers(reduction_axis=-1, output_axis=-2),
    "kernel": optax.contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1),
}
"""Parameters that are matrices, [out, in] and [in, out]; norms' scales, biases and embeddings are not."""


class TrainState(NamedTuple):
    """What training carries: parameters in either layout of `kvjax.models`, optimiser state, int32[] steps taken."""

    params: Params
    optimizer: Any
    step: jax.Array


def schedule(learning_rate: float, steps: int, warmup: int, decay: int, final: float = 0.0) -> optax.Schedule:
    """Linear warmup, a plateau, and a cosine fall over the last `decay` steps to `final` times the peak.

    With a plateau the run's length may still be changed until the fall begins; decay = steps - warmup is plain cosine.
    """
    plateau = max(steps - decay, warmup)
    return optax.join_schedules(
        [
            optax.linear_schedule(0.0, learning_rate, warmup),
            optax.constant_schedule(learning_rate),
            optax.cosine_decay_schedule(learning_rate, max(steps - plateau, 1), alpha=final),
        ],
        [warmup, plateau],
    )


def adamw(
    learning_rate: optax.Schedule | float, weight_decay: float = 0.1, clip: float = 1.0
) -> optax.GradientTransformation:
    """AdamW with gradient clipping by global norm; norms' scales, biases and embeddings are not decayed."""

    def decayed(params: Params) -> Any:
        return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in MATRICES, params)

    return optax.chain(
        optax.clip_by_global_norm(clip),
        optax.adamw(learning_rate, b1=0.9, b2=0.95, weight_decay=weight_decay, mask=decayed),
    )


def muon(
    learning_rate: optax.Schedule, scale: float = 10.0, weight_decay: float = 0.01, clip: float = 1.0, steps: int = 4
) -> optax.GradientTransformation:
    """Muon (Jordan 2024) for the matrices of layers, at `scale` times the learning rate; AdamW for everything else.

    A matrix's update is its momentum with all singular values brought near 1 by `steps` Newton-Schulz iterations.
    """

    def matrices(params: Params) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, _: MATRICES.get(path[-1].key) if path[0].key != "head" else None, params
        )

    return optax.chain(
        optax.clip_by_global_norm(clip),
        optax.contrib.muon(
            lambda count: scale * learning_rate(count),
            ns_steps=steps,
            weight_decay=weight_decay,
            adam_b2=0.95,
            adam_learning_rate=learning_rate,
            muon_weight_dimension_numbers=matrices,
        ),
    )


def context_only(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """The optimizer for the encoder and the cross-attention; the decoder stays as it is (CEPE 2024, 2402.16617)."""

    def labels(params: Params) -> Any:
        learning = {"encoder", "cross_attention", "cross_norm"}
        return jax.tree_util.tree_map_with_path(
            lambda path, _: "learning" if learning.intersection(part.key for part in path) else "frozen", params
        )

    return optax.multi_transform({"learning": optimizer, "frozen": optax.set_to_zero()}, labels)


def forward(config: ModelConfig, attend: Any = None, scan: bool = True) -> Callable[..., jax.Array]:
    """`logits(params, tokens int32[B, T]) -> float32[B, T, V]` without a cache.

    For a model with an encoder also `logits(params, tokens, contexts int32[B, C, n])`, C chunks of context for each
    row, padded with -1.

    Args:
      attend: None: the quickest that computes what the model asks for.
      scan: scan over layers, if they are all of one kind (`ModelConfig.uniform`).
    """
    if attend is None:
        plain = not any(config.windows) and config.attention_soft_cap is None and not config.attention_sinks
        attend = BlockCausalAttend() if plain else DenseAttend(config.cache_windows)
    module = Decoder(config, attend, scan=scan and config.uniform)

    def logits(params: Params, tokens: jax.Array, contexts: jax.Array | None = None) -> jax.Array:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        context = None if contexts is None else context_of(params, contexts, config)
        hidden, _ = module.apply({"params": params}, tokens, positions, context)
        result: Any = module.apply({"params": params}, hidden, method="logits")
        return result

    return logits


def start(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """A fresh state around parameters."""
    return TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32))


def make_train_step(
    logits: Callable[..., jax.Array], optimizer: optax.GradientTransformation, parts: int = 1
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """A jitted `(state, tokens[B, T], mask[B, T]) -> (state, {"loss", "gradient_norm"})` that donates the state.

    Arrays [B, ...] after the mask are handed to `logits` after the tokens: say, contexts.

    Args:
      parts: B is split into so many parts, whose gradients are added up one after another: the same step, in less
        memory, and quicker where a part's activations fit a processor's cache.
    """

    def train_step(
        state: TrainState, tokens: jax.Array, mask: jax.Array, *given: jax.Array
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        total = jnp.maximum(jnp.sum(mask[:, 1:]), 1e-6)

        def part_loss(params: Params, tokens: jax.Array, mask: jax.Array, *given: jax.Array) -> jax.Array:
            return jnp.sum(token_losses(logits(params, tokens, *given), tokens) * mask[:, 1:]) / total

        def add(carry: tuple[jax.Array, Params], part: tuple[jax.Array, ...]) -> tuple[tuple, None]:
            return jax.tree.map(jnp.add, carry, jax.value_and_grad(part_loss)(state.params, *part)), None

        split = jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), (tokens, mask, *given))
        zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, state.params))
        (loss, gradients), _ = jax.lax.scan(add, zero, split)
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.params)
        state = TrainState(optax.apply_updates(state.params, updates), optimizer_state, state.step + 1)
        return state, {"loss": loss, "gradient_norm": optax.tree.norm(gradients)}

    return jax.jit(train_step, donate_argnums=0)

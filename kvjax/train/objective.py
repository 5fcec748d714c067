"""What fine-tuning lowers: the next-token loss, or the distance from a teacher."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kvjax.config import ModelConfig
from kvjax.errors import ConfigError
from kvjax.models import HIDDEN_STATES, Decoder
from kvjax.train.attend import Asked, Reading, reading, training_attend
from kvjax.train.batch import Batch, counted
from kvjax.train.loss import token_losses
from kvjax.train.settings import Distillation
from kvjax.typing import Params

Objective = Callable[..., dict[str, jax.Array]]
"""`(params, teacher's params, batch, key, step) -> sums over counted tokens`, float32[] each; "loss" is lowered.

The key is for objectives that draw, the step's number (0 if left out) for those that change as training goes on.
"""


class ReadOut(NamedTuple):
    """What a model makes of a batch.

    Attributes:
      logits: float32[B, T, V]. hidden: [B, T, hidden], final and normalised.
      layers: [L, B, T, hidden], what each layer gives; None where nobody asked.
      asked: what the attention asks for beside the text; None: nothing.
    """

    logits: jax.Array
    hidden: jax.Array
    layers: jax.Array | None = None
    asked: Asked | None = None


Reader = Callable[..., ReadOut]
"""`(params, batch, key, step)`, the last two as an `Objective` has them; most read alike without."""


def reader(
    config: ModelConfig, *, attend: Any = None, scan: bool = False, remat: bool = False, layers: bool = False
) -> Reader:
    """`read(params, batch)`, without a cache.

    Args:
      attend: an attention that takes `Segments`, or a `Reading`; None: the quickest. layers: what each layer gives is
        wanted too.
    """
    attend = training_attend(config) if attend is None else attend
    way = attend if isinstance(attend, Reading) else reading(attend)
    module = Decoder(config, way.attend, scan=scan and config.uniform, remat=remat)

    def read(params: Params, batch: Batch, key: jax.Array | None = None, step: jax.Array | int = 0) -> ReadOut:
        positions = batch.positions
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(batch.tokens.shape[1], dtype=jnp.int32), batch.tokens.shape)
        carried = way.carry(batch.segments, key, step)
        given, states = ({"params": params}, batch.tokens, positions, carried), None
        if layers:
            (hidden, carried), noted = module.apply(*given, mutable=[HIDDEN_STATES])
            states = _by_layer(noted[HIDDEN_STATES])
        else:
            hidden, carried = module.apply(*given)
        logits: Any = module.apply({"params": params}, hidden, method="logits")
        return ReadOut(logits, hidden, states, None if way.asks is None else way.asks(carried, step))

    return read


def _by_layer(noted: Any) -> jax.Array:
    """What layers noted, scanned over or one by one, as [L, B, T, hidden]."""
    if "layers" in noted:
        (states,) = noted["layers"]["given"]
        return states
    return jnp.stack([noted[f"layers_{index}"]["given"][0] for index in range(len(noted))])


def next_token(read: Reader) -> Objective:
    """Cross-entropy of the next token, nats."""

    def objective(
        params: Params, teacher: Params | None, batch: Batch, key: jax.Array, step: jax.Array | int = 0
    ) -> dict[str, jax.Array]:
        given, counts = read(params, batch, key, step), counted(batch)
        loss = jnp.sum(token_losses(given.logits, batch.tokens) * counts)
        if given.asked is None:
            return {"loss": loss}
        return _with_asked({"loss": loss, "next_token": loss}, given.asked, counts)

    return objective


def _with_asked(sums: dict[str, jax.Array], asked: Asked | None, counts: jax.Array) -> dict[str, jax.Array]:
    """What is asked for beside the text is asked once for every token that counts."""
    if asked is None:
        return sums
    total = jnp.sum(counts)
    told = {name: number * total for name, number in asked.told.items()}
    return {**sums, "loss": sums["loss"] + asked.loss * total, **told}


def distilled(read: Reader, read_teacher: Reader, weights: Distillation) -> Objective:
    """The weighted sum of `Distillation`, and its parts."""

    def objective(
        params: Params, teacher: Params | None, batch: Batch, key: jax.Array, step: jax.Array | int = 0
    ) -> dict[str, jax.Array]:
        assert teacher is not None
        given = read(params, batch, key, step)
        wanted = jax.lax.stop_gradient(read_teacher(teacher, batch))
        counts = counted(batch)
        parts = {"next_token": jnp.sum(token_losses(given.logits, batch.tokens) * counts)}
        parts["kl"] = jnp.sum(divergence(wanted.logits, given.logits, weights.temperature)[:, :-1] * counts)
        loss = weights.logits * parts["kl"] + weights.next_token * parts["next_token"]
        if weights.hidden:
            apart = _mean_square(given.hidden, wanted.hidden)
            parts["hidden"] = jnp.sum(apart[:, :-1] * counts)
            loss += weights.hidden * parts["hidden"]
        if weights.layers:
            assert given.layers is not None
            assert wanted.layers is not None
            apart = _mean_square(given.layers, wanted.layers) / _mean_square(wanted.layers, 0)
            apart = jnp.mean(apart, axis=0)
            parts["layers"] = jnp.sum(apart[:, :-1] * counts)
            loss += weights.layers * parts["layers"]
        return _with_asked({"loss": loss, **parts}, given.asked, counts)

    return objective


def _mean_square(one: jax.Array, other: Any) -> jax.Array:
    """[..., hidden] -> float32[...], of the difference."""
    return jnp.mean((one.astype(jnp.float32) - jnp.asarray(other, jnp.float32)) ** 2, axis=-1)


def divergence(teacher: jax.Array, student: jax.Array, temperature: float = 1.0) -> jax.Array:
    """temperature^2 * KL(teacher || student) of logits [B, T, V] over the temperature -> float32[B, T], nats."""
    wanted = jax.nn.log_softmax(teacher.astype(jnp.float32) / temperature)
    given = jax.nn.log_softmax(student.astype(jnp.float32) / temperature)
    return temperature**2 * jnp.sum(jnp.exp(wanted) * (wanted - given), axis=-1)


def check_teacher(student: ModelConfig, teacher: ModelConfig, weights: Distillation) -> None:
    """Whether one can learn from the other.

    Raises:
      ConfigError: they have other vocabularies, or hidden states that should be compared and are of other sizes or
        numbers.
    """
    if student.vocab_size != teacher.vocab_size:
        raise ConfigError(
            f"a teacher must have the student's vocabulary: it has {teacher.vocab_size} tokens, the student "
            f"{student.vocab_size}"
        )
    if weights.layers and (student.num_layers != teacher.num_layers or student.goldfinch or teacher.goldfinch):
        raise ConfigError(
            f"Distillation.layers compares what layers of the same number give; the teacher has {teacher.num_layers}, "
            f"the student {student.num_layers}{', and GoldFinch tells of none' if student.goldfinch else ''}; set "
            "layers=0"
        )
    if (weights.hidden or weights.layers) and student.hidden_size != teacher.hidden_size:
        raise ConfigError(
            "Distillation.hidden and layers compare hidden states of one size; the teacher's are "
            f"{teacher.hidden_size} wide, the student's {student.hidden_size}; set both to 0"
        )

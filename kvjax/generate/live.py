"""What every call that takes a live state makes sure of first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax

from kvjax.cache.layout import GroupLayout
from kvjax.errors import ConfigError, RequestError
from kvjax.generate.shortage import span
from kvjax.generate.state import State, layouts_of
from kvjax.model import Model


def check_live(state: Any) -> None:
    """Raises RequestError for what is no state, or one that another call has consumed."""
    if not isinstance(state, State):
        raise RequestError(f"a kvjax.State is needed, as kvjax.prefill and kvjax.extend return it, got {state!r:.80}")
    if any(leaf.is_deleted() for leaf in jax.tree.leaves((state.cache, state.last))):
        raise RequestError("this state was consumed by an earlier call; go on with the state which that call returned")


def check_fits(model: Model, state: State) -> None:
    """Raises RequestError for a state that a model of other shapes has made; equal shapes cannot be told apart."""
    try:
        layouts = layouts_of(model, state.config)
    except ConfigError as error:
        raise RequestError(f"the state is of another model: {error}; give the model it was made with") from error
    config, cache = model.config, state.cache
    held = tuple(group.layout for group in cache.groups)
    recurrent = tuple(tuple(leaf.shape[1:] for leaf in layer) for layer in cache.recurrent)
    contexts = [group.layout.spec for group in cache.context]
    width = config.hidden_size if state.last is None else state.last.shape[-1]
    largest = max(map(max, state.tokens))
    for theirs, ours, what in (
        (held, layouts, f"it holds {_summary(held)}, and the model asks for {_summary(layouts)}"),
        (recurrent, config.recurrent_shapes, f"it holds recurrent states {recurrent}, not {config.recurrent_shapes}"),
        (contexts, [config.context_spec] * len(contexts), "its encoded context is none that the model reads"),
        (width, config.hidden_size, f"it holds hidden states of {width} channels, not {config.hidden_size}"),
        (largest < config.vocab_size, True, f"it holds token {largest}, of {config.vocab_size} in the vocabulary"),
    ):
        if theirs != ours:
            raise RequestError(
                f"the state is of another model: {what}; give the model it was made with, loaded in the same dtype"
            )


def _summary(layouts: Sequence[GroupLayout]) -> str:
    """Cache groups in words."""
    return "; ".join(
        f"layers {span(layout.layers)}: {layout.spec.kv_heads} heads of {layout.spec.key_dim} and "
        f"{layout.spec.value_dim}, {layout.dtype}, {layout.policy!r}, {layout.codec!r}, pages of {layout.page_size}"
        for layout in layouts
    )

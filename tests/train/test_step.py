"""The loss, the training step, and runs that are cut short."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kvjax.attention.dense import DenseAttend
from kvjax.config import ModelConfig
from kvjax.errors import CheckpointError
from kvjax.model import init
from kvjax.models import stack_layers
from kvjax.train.attend import BlockCausalAttend
from kvjax.train.checkpoint import load_state, save_state
from kvjax.train.loss import next_token_loss
from kvjax.train.step import adamw, forward, make_train_step, muon, schedule, start

CONFIG = ModelConfig(
    vocab_size=32, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8
)


def batch(step: int) -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(step)
    # Two tokens in turn: something three steps can learn.
    tokens = np.tile(rng.integers(0, 4, (4, 2)), (1, 8)).astype(np.int32)
    return jnp.asarray(tokens), jnp.asarray(rng.integers(0, 2, (4, 16)).astype(np.float32))


@pytest.fixture(scope="module")
def optimizer() -> optax.GradientTransformation:
    return muon(schedule(1e-2, 6, 1, 2))


@pytest.fixture(scope="module")
def train_step(optimizer):
    return make_train_step(forward(CONFIG), optimizer)


def fresh(optimizer):
    return start(stack_layers(init(CONFIG).params), optimizer)


def test_loss_is_the_mean_over_counted_tokens_only():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2, 5, 7)).astype(np.float32)
    tokens = rng.integers(0, 7, (2, 5)).astype(np.int32)
    mask = np.array([[9, 0, 1, 0, 2], [9, 1, 0, 0, 0]], np.float32)
    total = weight = 0.0
    for row in range(2):
        for t in range(1, 5):
            wide = logits[row, t - 1].astype(np.float64)
            loss = np.log(np.exp(wide).sum()) - wide[tokens[row, t]]
            total, weight = total + mask[row, t] * loss, weight + mask[row, t]
    # float32 sums of a dozen numbers of order 1: errors of a few 1e-7.
    np.testing.assert_allclose(next_token_loss(logits, tokens, mask), total / weight, rtol=2e-6)


def test_what_does_not_count_has_no_gradient():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(1, 4, 7)), jnp.float32)
    tokens, mask = jnp.array([[1, 2, 3, 4]]), jnp.array([[1.0, 0.0, 1.0, 0.0]])
    gradient = jax.grad(next_token_loss)(logits, tokens, mask)
    assert (np.abs(np.asarray(gradient)).sum(-1) > 0).tolist() == [[False, True, False, False]]
    assert float(next_token_loss(logits, tokens, jnp.zeros((1, 4)))) == 0.0


def test_block_attention_is_dense_attention():
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 32, (2, 21)), jnp.int32)
    params = init(CONFIG).params
    blocks = forward(CONFIG, BlockCausalAttend(block=8), scan=False)(params, tokens)
    dense = forward(CONFIG, DenseAttend(), scan=False)(params, tokens)
    # Same float32 sums in another order, through two layers.
    np.testing.assert_allclose(blocks, dense, rtol=1e-4, atol=1e-5)


def test_a_few_steps_lower_the_loss(train_step, optimizer):
    state, (tokens, _) = fresh(optimizer), batch(0)
    losses = []
    for _ in range(4):
        state, metrics = train_step(state, tokens, jnp.ones(tokens.shape))
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] - 0.1
    assert int(state.step) == 4


def test_a_batch_in_parts_takes_the_same_step():
    optimizer = optax.sgd(0.1)
    tokens, mask = batch(0)
    whole, one = make_train_step(forward(CONFIG), optimizer)(fresh(optimizer), tokens, mask)
    parts, two = make_train_step(forward(CONFIG), optimizer, parts=2)(fresh(optimizer), tokens, mask)
    # Sums of the same float32 gradients in another order.
    np.testing.assert_allclose(one["loss"], two["loss"], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), whole.params, parts.params)


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(train_step, optimizer, tmp_path):
    state = fresh(optimizer)
    for step in range(4):
        if step == 2:
            save_state(tmp_path / "state.npz", state)
        state, _ = train_step(state, *batch(step))
    resumed = load_state(tmp_path / "state.npz", fresh(optimizer))
    assert int(resumed.step) == 2
    for step in range(int(resumed.step), 4):
        resumed, _ = train_step(resumed, *batch(step))
    jax.tree.map(np.testing.assert_array_equal, state, resumed)


def test_a_state_of_another_model_or_a_damaged_one_is_refused(optimizer, tmp_path):
    state = fresh(optimizer)
    file = tmp_path / "state.npz"
    with pytest.raises(CheckpointError, match=r"state\.npz"):
        load_state(file, state)
    save_state(file, state._replace(params={**state.params, "norm": {"scale": jnp.ones(7)}}))
    with pytest.raises(CheckpointError, match=r"norm.*float32\[32\].*float32\[7\]"):
        load_state(file, state)
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="cannot read"):
        load_state(file, state)


def test_the_schedule_warms_up_stays_and_falls():
    rate = schedule(2.0, steps=100, warmup=10, decay=30)
    assert float(rate(0)) == 0.0
    assert float(rate(5)) == pytest.approx(1.0)
    assert float(rate(10)) == float(rate(69)) == 2.0
    # Cosine: half way down in the middle of the fall.
    assert float(rate(85)) == pytest.approx(1.0)
    assert float(rate(100)) == pytest.approx(0.0, abs=1e-6)


def test_weight_decay_spares_norms_and_embeddings():
    params = init(CONFIG).params
    optimizer = adamw(0.1, weight_decay=0.5)
    still = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(still, optimizer.init(params), params)
    for path, update in jax.tree_util.tree_leaves_with_path(updates):
        assert bool(jnp.any(update != 0)) == (path[-1].key == "weight"), path

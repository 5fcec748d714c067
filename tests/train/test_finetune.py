"""Fine-tuning in memory: what is lowered, what is trained, what is refused."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.config import ModelConfig
from kvjax.errors import ConfigError, RequestError, TrainingError
from kvjax.model import Model, init
from kvjax.models import stack_layers
from kvjax.train import Batch, Distillation, LoRA, Settings, Told, finetune
from kvjax.train.attend import PackedAttend
from kvjax.train.batch import counted
from kvjax.train.loss import token_losses
from kvjax.train.objective import distilled, divergence, next_token, reader
from kvjax.train.run_step import as_dtype

CONFIG = ModelConfig(
    vocab_size=32, hidden_size=32, intermediate_size=48, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=8
)
TWO_LAYERS = dataclasses.replace(CONFIG, num_layers=2)
# Two tokens in turn: something a few steps can learn.
TOKENS = np.tile(np.random.default_rng(0).integers(0, 32, (8, 2)), (1, 8)).astype(np.int32)


@pytest.fixture(scope="module")
def model() -> Model:
    return init(CONFIG, dtype=jnp.float32)


def tuned(model: Model, **options) -> tuple[Model, list[Told]]:
    told: list[Told] = []
    settings = dict(tokens=TOKENS, steps=6, batch_size=4, learning_rate=1e-2, warmup=0)
    return finetune(model, **{**settings, **options}, report=told.append), told


def changed(before: Model, after: Model) -> set[str]:
    pairs = zip(jax.tree_util.tree_leaves_with_path(before.params), jax.tree.leaves(after.params), strict=True)
    return {"/".join(part.key for part in path) for (path, a), b in pairs if not np.array_equal(a, b)}


def test_training_lowers_the_loss_and_leaves_the_given_model_alone(model):
    before = jax.tree.map(np.asarray, model.params)
    after, told = tuned(model)
    assert told[-1].numbers["loss"] < told[0].numbers["loss"] - 0.3
    assert [one.step for one in told] == [1, 2, 3, 4, 5, 6]
    jax.tree.map(np.testing.assert_array_equal, before, model.params)
    assert len(changed(model, after)) == len(jax.tree.leaves(model.params))


def test_attention_alone_changes_when_it_alone_is_trained(model):
    after, told = tuned(model, trainable="attention")
    assert told[-1].numbers["loss"] < told[0].numbers["loss"]
    assert changed(model, after) == {f"layers_0/attention/{name}/weight" for name in "qkvo"}


def test_adapters_change_their_targets_by_their_rank_and_no_more(model):
    model = init(TWO_LAYERS, dtype=jnp.float32)
    after, told = tuned(model, trainable=LoRA(rank=2, alpha=4, targets=("q", "v")))
    assert told[-1].numbers["loss"] < told[0].numbers["loss"]
    assert changed(model, after) == {f"layers_{i}/attention/{name}/weight" for i in range(2) for name in "qv"}
    for layer in range(2):
        one, other = (m.params[f"layers_{layer}"]["attention"]["q"]["weight"] for m in (model, after))
        singular = np.linalg.svd(np.asarray(other - one, np.float64), compute_uv=False)
        # Rounding W + BA to float32 leaves 1e-7 of W.
        assert singular[1] > 1e-4
        assert singular[2] < 1e-5


@pytest.mark.parametrize("trainable", ["all", pytest.param(LoRA(rank=2), marks=pytest.mark.slow)])
def test_scanned_layers_parts_and_remat_take_the_same_steps(trainable):
    model = init(TWO_LAYERS, dtype=jnp.float32)
    _, plain = tuned(model, trainable=trainable)
    _, other = tuned(model, trainable=trainable, scan=True, accumulate=2, remat=True)
    # The same float32 sums in another order, a few Adam steps of 1e-2; adapters are drawn differently when stacked.
    count = 1 if isinstance(trainable, LoRA) else 6
    for one, two in list(zip(plain, other, strict=True))[:count]:
        assert one.numbers["loss"] == pytest.approx(two.numbers["loss"], rel=2e-4)


def test_parts_of_a_batch_add_up_to_it_whatever_counts_in_each(model):
    weights = np.random.default_rng(2).integers(0, 2, (4, 16)).astype(np.float32)
    weights[1] = 0
    batches = [Batch(TOKENS[:4], weights=weights), Batch(TOKENS[4:], weights=weights[::-1])]
    _, whole = tuned(model, tokens=batches, steps=2)
    _, parts = tuned(model, tokens=batches, steps=2, accumulate=4)
    for one, other in zip(whole, parts, strict=True):
        # Sums of 32 float32 numbers in another order; the second step follows one of Adam, which divides by their size.
        assert one.numbers["loss"] == pytest.approx(other.numbers["loss"], rel=2e-5)
        assert one.numbers["gradient_norm"] == pytest.approx(other.numbers["gradient_norm"], rel=2e-4)


def test_products_are_bfloat16_and_what_is_trained_is_float32(model):
    after, told = tuned(model, steps=3, learning_rate=1e-6, compute_dtype="bfloat16")
    halves = as_dtype(model.params, jnp.bfloat16)
    order = np.random.default_rng([0, 0]).permutation(8)[:4]
    sums = jax.jit(next_token(reader(CONFIG)))(halves, None, Batch(jnp.asarray(TOKENS[order])), jax.random.key(0))
    assert jax.eval_shape(reader(CONFIG), halves, Batch(jnp.asarray(TOKENS))).hidden.dtype == jnp.bfloat16
    # The very same bfloat16 products, fused otherwise: one rounding of 2^-9 here and there.
    assert told[0].numbers["loss"] == pytest.approx(float(sums["loss"]) / 60, rel=1e-3)
    before, now = (m.params["layers_0"]["mlp"]["up"]["weight"] for m in (model, after))
    # Three steps of 1e-6, of which bfloat16 weights of a tenth would have kept nothing.
    assert now.dtype == jnp.float32
    assert 0 < np.abs(now - before).max() < 4e-6
    assert np.mean(before != now) > 0.9


@pytest.mark.slow
def test_unrolled_layers_are_recomputed_too():
    model = init(TWO_LAYERS, dtype=jnp.float32)
    _, plain = tuned(model, steps=3)
    _, other = tuned(model, steps=3, remat=True, scan=False)
    # The very same sums, computed twice.
    assert [one.numbers["loss"] for one in plain] == pytest.approx([one.numbers["loss"] for one in other], rel=1e-5)


def test_a_student_that_is_its_teacher_has_nothing_to_learn(model):
    read, key = reader(CONFIG, layers=True), jax.random.key(0)
    objective = jax.jit(distilled(read, read, Distillation(hidden=1.0, layers=1.0)))
    sums = objective(model.params, model.params, Batch(jnp.asarray(TOKENS)), key)
    # Of 120 tokens; each logarithm of a probability is off by 1e-7.
    assert [float(sums[name]) for name in ("kl", "hidden", "layers")] == pytest.approx([0, 0, 0], abs=1e-4)
    other = objective(init(CONFIG, seed=1, dtype=jnp.float32).params, model.params, Batch(jnp.asarray(TOKENS)), key)
    parts = {name: float(other[name]) for name in ("kl", "hidden", "layers")}
    assert min(parts.values()) > 1
    assert float(other["loss"]) == pytest.approx(sum(parts.values()), rel=1e-6)


def test_a_student_comes_nearer_to_its_teacher(model):
    teacher = init(CONFIG, seed=1, dtype=jnp.float32)
    weights = Distillation(hidden=0.5, layers=0.5)
    _, told = tuned(model, teacher=teacher, distillation=weights, steps=8, scan=True, remat=True)
    for name in ("kl", "hidden", "layers"):
        assert told[-1].numbers[name] < told[0].numbers[name]


def test_what_layers_give_is_read_in_either_layout():
    model, batch = init(TWO_LAYERS, dtype=jnp.float32), Batch(jnp.asarray(TOKENS[:2]))
    apart, stacked = (jax.jit(reader(TWO_LAYERS, scan=scan, layers=True)) for scan in (False, True))
    one, other = apart(model.params, batch), stacked(stack_layers(model.params), batch)
    assert one.layers.shape == (2, 2, 16, 32)
    # The same float32 products, fused otherwise.
    np.testing.assert_allclose(one.layers, other.layers, atol=1e-5)
    last = np.asarray(one.layers[-1])
    normalised = last / np.sqrt((last**2).mean(-1, keepdims=True) + CONFIG.norm_eps)
    np.testing.assert_allclose(one.hidden, normalised * model.params["norm"]["scale"], atol=1e-5)


def test_the_divergence_is_that_of_its_definition():
    rng = np.random.default_rng(0)
    teacher, student = rng.normal(size=(2, 1, 1, 5))
    p, q = (np.exp(x / 2) / np.exp(x / 2).sum() for x in (teacher[0, 0], student[0, 0]))
    # float32 against float64 on numbers of order 1.
    np.testing.assert_allclose(divergence(teacher, student, 2.0)[0, 0], 4 * (p * np.log(p / q)).sum(), rtol=1e-5)


@pytest.mark.parametrize("attend", [None, PackedAttend()], ids=["blocks", "flash"])
def test_packed_documents_do_not_see_each_other(model, attend):
    rng = np.random.default_rng(1)
    one, two = rng.integers(0, 32, 7), rng.integers(0, 32, 8)
    packed = Batch(
        np.concatenate([one, two, [0]])[None],
        np.array([[1] * 7 + [2] * 8 + [0]]),
        np.array([[*range(7), *range(8), 0]]),
    )
    packed = jax.tree.map(lambda x: jnp.asarray(x, jnp.int32), packed)
    read = jax.jit(reader(CONFIG, attend=attend))
    together = read(model.params, packed).logits
    for document, start in ((one, 0), (two, 7)):
        # Filled up behind the document, where it does not see: one program for both.
        filled = jnp.asarray(np.resize(document, 16)[None], jnp.int32)
        alone = read(model.params, packed._replace(tokens=filled, segments=filled * 0, positions=jnp.arange(16)[None]))
        alone = alone.logits[:, : len(document)]
        # The same float32 products, summed over more masked keys.
        np.testing.assert_allclose(together[:, start : start + len(document)], alone, rtol=1e-4, atol=1e-5)
    # Neither the first token of a document nor padding is predicted.
    assert counted(packed)[0].tolist() == [1] * 6 + [0] + [1] * 7 + [0]
    losses = token_losses(together, packed.tokens)[0]
    sums = jax.jit(next_token(read))(model.params, None, packed, jax.random.key(0))
    assert sums["loss"] == pytest.approx(float(losses[:6].sum() + losses[7:14].sum()), rel=1e-5)


def test_weights_say_what_counts(model):
    weights = np.zeros(TOKENS[:4].shape, np.float32)
    with_none, _ = tuned(model, tokens=[Batch(TOKENS[:4], weights=weights)] * 2, steps=2)
    assert not changed(model, with_none)


def test_the_result_has_the_dtype_of_the_model_or_the_one_asked_for(model):
    half = init(CONFIG, dtype=jnp.bfloat16)
    assert tuned(half, steps=1)[0].dtype == jnp.bfloat16
    assert tuned(model, steps=1, dtype="bfloat16")[0].dtype == jnp.bfloat16


def test_a_loss_that_is_not_finite_ends_the_run_and_says_where(model):
    broken = dataclasses.replace(
        model, params={**model.params, "norm": {"scale": model.params["norm"]["scale"] * np.nan}}
    )
    with pytest.raises(TrainingError, match="loss became nan at step 1"):
        tuned(broken)


@pytest.mark.parametrize(
    "options, error, match",
    [
        ({"tokens": TOKENS[:3]}, ConfigError, "3 examples do not fill a batch of 4"),
        ({"tokens": TOKENS + 30}, RequestError, "tokens must be 0 to 31"),
        ({"tokens": TOKENS[0]}, RequestError, r"int32\[examples, T\]"),
        ({"tokens": 7}, RequestError, "iterable of batches"),
        ({"tokens": [TOKENS[:4]]}, TrainingError, "ended after 1"),
        ({"tokens": [TOKENS[:3]]}, RequestError, r"\[4, T >= 2\]"),
        ({"trainable": LoRA(targets=("w",))}, ConfigError, r"names no module.*'q'"),
        ({"trainable": LoRA(rank=17)}, ConfigError, "take 16 or less"),
        ({"rank": 4}, ConfigError, "finetune: unknown key 'rank'; allowed: steps, "),
        ({"teacher": init(dataclasses.replace(CONFIG, vocab_size=64))}, ConfigError, "64 tokens, the student 32"),
        (
            {"teacher": init(TWO_LAYERS), "distillation": Distillation(layers=1.0)},
            ConfigError,
            "the teacher has 2, the student 1; set layers=0",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused(model, options, error, match):
    with pytest.raises(error, match=match):
        tuned(model, **options)


@pytest.mark.parametrize(
    "values, match",
    [
        ({"steps": 0}, "steps must be an integer of at least 1"),
        ({"accumulate": 3}, "must divide batch_size"),
        ({"warmup": 9}, r"from 0 to steps \(4\)"),
        ({"learning_rate": 0.0}, "learning_rate must be positive"),
        ({"compute_dtype": "int8"}, "compute_dtype"),
        ({"trainable": "mlp"}, "'all', 'attention' or a LoRA"),
        ({"final": 2.0}, "final within 0 and 1"),
        ({"distillation": 0.5}, "must be a Distillation"),
    ],
)
def test_impossible_settings_are_refused_by_name(values, match):
    with pytest.raises(ConfigError, match=match):
        Settings(**{"steps": 4, "batch_size": 4, "learning_rate": 1e-3, **values})

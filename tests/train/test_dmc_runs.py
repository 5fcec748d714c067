"""Fine-tuning to a ratio: its steps are those of `kvjax.train.dmc`, and what it gives holds as much as it says."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax import CacheConfig
from kvjax.cache import codecs, selects
from kvjax.cache.policies import DMC, Full
from kvjax.config import ModelConfig
from kvjax.errors import ConfigError
from kvjax.model import Model
from kvjax.train import Batch, Distillation, DMCSchedule, LoRA, Settings, Told, finetune
from kvjax.train.dmc import dmc_loss, dmc_stages, fade_at, fading, ratio_at, relaxed
from kvjax.train.loss import next_token_loss
from kvjax.train.objective import next_token, reader
from kvjax.train.run_toml import RunFile
from tests.generate.test_dmc import GATED, gated
from tests.models.cases import model_of
from tests.train.test_dmc import TOY, toy_text
from tests.train.test_script import TOML
from tests.train.test_script import folder as folder  # a fixture

CACHE = CacheConfig(page_size=4, policy=DMC())
SCHEDULE = DMCSchedule(ratio=4, fade_steps=2, ramp_steps=3, temperature=0.5)
TOKENS = np.random.default_rng(0).integers(0, 61, (4, 20)).astype(np.int32)
SLOW = pytest.mark.slow


@pytest.fixture(scope="module")
def model() -> Model:
    """About half of its tokens join."""
    return model_of(GATED, gated(GATED))


def tuned(model: Model, **options: Any) -> tuple[Model, list[Told]]:
    told: list[Told] = []
    settings = dict(tokens=TOKENS, steps=6, batch_size=2, learning_rate=1e-3, through=CACHE, dmc=SCHEDULE)
    return finetune(model, **{"report": told.append, **settings, **options}), told


def packed(rng: np.random.Generator) -> Batch:
    """Two documents of 8 tokens and one of 4 to a row, and two of padding."""
    tokens = rng.integers(0, 61, (2, 22)).astype(np.int32)
    row = np.repeat(np.array([1, 2, 3, 0], np.int32), [8, 8, 4, 2])
    positions = np.concatenate([np.arange(n, dtype=np.int32) for n in (8, 8, 4, 2)])
    return Batch(jnp.asarray(tokens), *(jnp.asarray(np.tile(x, (2, 1))) for x in (row, positions)))


# What a step lowers


def test_each_stage_lowers_what_its_pure_functions_say(model):
    # One step into each stage, where neither factor nor ratio is at its end.
    schedule = dataclasses.replace(SCHEDULE, ratio=8.5)
    (_, fades), (second, merges) = dmc_stages(GATED, schedule)
    key, tokens = jax.random.key(3), jnp.asarray(TOKENS[:2])
    count = tokens.shape[0] * (tokens.shape[1] - 1)

    def means(way: Any, step: int) -> dict[str, float]:
        sums = jax.jit(next_token(reader(GATED, attend=way)))(model.params, None, Batch(tokens), key, step)
        return {name: float(value) / count for name, value in sums.items()}

    factor = fade_at(1, schedule.fade_steps)
    assert 0 < float(factor) < 1
    faded = jax.jit(fading(GATED, scan=False))(model.params, tokens, factor)
    # The same float32 operations, compiled in other programs.
    assert means(fades, 1) == pytest.approx({"loss": float(next_token_loss(faded, tokens))}, rel=1e-6)

    ratio = ratio_at(1, schedule.ramp_steps, schedule.ratio)
    assert 1 < float(ratio) < 8.5
    by_hand = jax.jit(dmc_loss(relaxed(GATED, temperature=schedule.temperature, scan=False)))
    loss, told = by_hand(model.params, tokens, None, key, ratio)
    missing = float(loss - told.language)
    assert missing > 0.05
    wanted = {"loss": loss, "next_token": told.language, "share": told.share, "merging": missing}
    found = means(merges, second + 1)
    assert found == pytest.approx({name: float(value) for name, value in wanted.items()}, abs=1e-6)


def test_documents_in_a_row_merge_and_see_as_if_each_had_its_own(model):
    batch = packed(np.random.default_rng(4))
    tokens, borders = np.asarray(batch.tokens), (0, 8, 16, 20)
    for at, way in dmc_stages(GATED, SCHEDULE):
        # Noise is drawn by place: none, so that places may differ.
        read = jax.jit(lambda params, batch, way=way: reader(GATED, attend=way)(params, batch, None, 3))
        whole = read(model.params, batch)
        joined = 0.0
        for start, end in itertools.pairwise(borders):
            # Rows of one length: what is behind a document is not seen by it.
            row = np.zeros_like(tokens)
            row[:, : end - start] = tokens[:, start:end]
            places = np.where(np.arange(22) < end - start, np.arange(22), -1).astype(np.int32)
            alone = read(model.params, Batch(jnp.asarray(row), None, jnp.asarray(np.tile(places, (2, 1)))))
            # Sums of fewer zeros, in another order.
            mine, theirs = (np.asarray(x.logits) for x in (whole, alone))
            np.testing.assert_allclose(mine[:, start:end], theirs[:, : end - start], rtol=0, atol=1e-4)
            if alone.asked is not None:
                joined += float(alone.asked.told["share"]) * (end - start)
        if at:
            assert whole.asked is not None
            assert 0.2 < float(whole.asked.told["share"]) == pytest.approx(joined / 20, abs=1e-5)


@SLOW
def test_a_run_tells_when_it_begins_to_merge_and_asks_for_more(model):
    _, told = tuned(model, accumulate=2, scan=True, remat=True, teacher=model, distillation=Distillation(layers=1.0))
    assert ["share" in one.numbers for one in told] == [False, False, True, True, True, True]
    # Nothing is asked for at first; then 1 - 1 / ratio, less what joins.
    assert told[2].numbers["merging"] == 0
    for one in told[2:]:
        share = 1 - 1 / (1 + 3 * min((one.step - 3) / 3, 1))
        # A mean over two parts of what each is short of.
        assert one.numbers["merging"] >= max(share - one.numbers["share"], 0) - 1e-6
    parts = ("kl", "layers", "merging")
    assert told[5].numbers["loss"] == pytest.approx(sum(told[5].numbers[name] for name in parts), rel=1e-5)


@SLOW
@pytest.mark.parametrize("options", [dict(scan=True), dict(remat=True), dict(scan=True, remat=True)], ids=str)
def test_scan_and_remat_take_the_same_steps(model, options):
    (_, plain), (_, other) = tuned(model, learning_rate=1e-4), tuned(model, learning_rate=1e-4, **options)
    for one, two in zip(plain, other, strict=True):
        # The same float32 sums in another order, a few small steps of Adam's.
        assert two.numbers["loss"] == pytest.approx(one.numbers["loss"], rel=1e-4)


# Runs that are cut short


@SLOW
@pytest.mark.parametrize("trainable", ["all", LoRA(rank=2)], ids=str)
@pytest.mark.parametrize("cut", [1, 2, 4])
def test_a_run_that_goes_on_draws_the_same_noise_and_ends_with_the_same_weights(model, tmp_path, cut, trainable):
    whole, told = tuned(model, trainable=trainable)
    left = iter([False] * (cut - 1))
    tuned(model, run=tmp_path, stopped=lambda: next(left, True), trainable=trainable)
    again, rest = tuned(model, run=tmp_path, trainable=trainable)
    assert [one.step for one in rest] == list(range(cut + 1, 7))
    assert [one.numbers for one in rest] == [one.numbers for one in told[cut:]]
    jax.tree.map(np.testing.assert_array_equal, whole.params, again.params)
    with pytest.raises(ConfigError, match="with another dmc"):
        tuned(model, run=tmp_path, trainable=trainable, dmc=dataclasses.replace(SCHEDULE, ratio=3))


# What comes of it


@SLOW
def test_a_model_tuned_to_a_ratio_holds_that_share_of_slots_and_pages():
    ratio, length, rng = 3.0, 64, np.random.default_rng(0)
    model = kvjax.init(TOY, dtype="float32")
    schedule = DMCSchedule(ratio, fade_steps=40, ramp_steps=140)
    told: list[Told] = []
    after = finetune(
        model, toy_text(rng, 8 * 320, length), 320, 8, 1e-2, through=CACHE, dmc=schedule, warmup=0, report=told.append
    )
    assert told[-1].numbers["share"] == pytest.approx(1 - 1 / ratio, abs=0.05)

    tokens = toy_text(rng, 2, 2 * length)
    _, live = kvjax.extend(after, kvjax.prefill(after, tokens.tolist(), CACHE, room=32), max_new_tokens=32)
    (group,) = live.cache.groups
    seen = 2 * length + 31
    entries = float(np.asarray(group.length)[:, :2].sum() / (group.layout.rows * 2 * seen))
    # What is decided without noise is not quite what it is with noise.
    assert 0.85 / ratio < entries < 1.15 / ratio, entries
    full = group.layout.rows * 2 * -(-seen // 4)
    print("pages", int(group.used), "of", full, "entries", entries)
    # Half a page more in every row, and what is reserved for the steps of a block.
    assert int(group.used) < (1.15 / ratio + 0.2) * full
    decoded = kvjax.score(after, tokens, CACHE, "decode", length)
    assert float(next_token_loss(decoded, tokens)) < 1.0, "the word is still known: chance is 3.1"


# What is refused


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: DMCSchedule(0.5, 1, 1), "ratio must be at least 1 .*, got 0.5"),
        (lambda: DMCSchedule(2, -1, 1), "fade_steps must be an integer of at least 0, got -1"),
        (lambda: DMCSchedule(2, 0, 0), "ramp_steps must be an integer of at least 1, got 0"),
        (lambda: DMCSchedule(2, 0, 1, span=0), "span must be an integer of at least 1, got 0"),
        (lambda: DMCSchedule(2, 0, 1, temperature=0.0), "temperature must be above 0"),
        (lambda: Settings(9, 1, 1e-3, through=CACHE), r"give dmc=DMCSchedule"),
        (lambda: Settings(9, 1, 1e-3, dmc=SCHEDULE), r"needs through=CacheConfig\(policy=DMC\(\)\), got None"),
        (lambda: Settings(9, 1, 1e-3, dmc=SCHEDULE, through=CacheConfig(policy=Full())), "needs through="),
        (lambda: Settings(4, 1, 1e-3, dmc=SCHEDULE, through=CACHE), r"must fit into steps \(4\), got 2 and 3"),
        (lambda: Settings(9, 1, 1e-3, dmc=4, through=CACHE), "dmc must be None or a DMCSchedule, got 4"),
        *(
            (
                lambda how=how: Settings(9, 1, 1e-3, dmc=SCHEDULE, through=CacheConfig(policy=DMC(), **how)),
                "takes no codec, select or overrides",
            )
            for how in (
                dict(codec=codecs.Int8()),
                dict(select=selects.Quest(2, dense_layers=0)),
                dict(overrides=(((0,), CacheConfig()),)),
            )
        ),
    ],
)
def test_what_means_nothing_is_refused(make, match):
    with pytest.raises(ConfigError, match=match):
        make()


def test_a_model_that_dmc_cannot_serve_is_refused():
    shares = ModelConfig(**{**vars(GATED), "owners": (0, 0)})
    with pytest.raises(ConfigError, match="layer 1 of this model only reads"):
        dmc_stages(shares, SCHEDULE)


def test_a_file_may_say_it(folder):
    text = TOML + '[through]\npolicy = "DMC"\n[dmc]\nratio = 4\nfade_steps = 1\nramp_steps = 2\n'
    (folder / "run.toml").write_text(text)
    assert RunFile.from_toml(folder / "run.toml").finetune.dmc == DMCSchedule(4, 1, 2)
    (folder / "run.toml").write_text(text + "steps = 2\n")
    with pytest.raises(ConfigError, match=r"\[dmc\].*steps"):
        RunFile.from_toml(folder / "run.toml")

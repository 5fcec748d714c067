"""`save_state` and `load_state`: the same state again, in any process, or an error that says what is wrong."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax import CacheConfig, Sampling
from kvjax.cache.bits import INTEGERS, numbers
from kvjax.cache.codecs import FP8, KIVI, Calibration, Dense, Int4, KVQuant
from kvjax.cache.policies import FastGen, Full, PyramidKV, Scissorhands, SnapKV, StreamingLLM
from kvjax.cache.selects import Quest, SparQ
from kvjax.cache.state import empty_cache
from kvjax.errors import CheckpointError, RequestError
from kvjax.generate import snapshot
from kvjax.generate.state import layouts_of
from tests.cache.tiny import CHUNK, CONFIG, MIXED, MODEL, PLAIN, cache_of, model_of, random_tokens

ROOT = Path(__file__).resolve().parent.parent.parent
TOKENS = [random_tokens(41, length).tolist() for length in (10, 1, 15)]


def state_of(cache: CacheConfig, model: kvjax.Model = MODEL, recurrent: Any = (), context: bool = False) -> kvjax.State:
    """A state full of random bits, shaped like a live one, of whose pages some are shared and some are free."""
    random = np.random.default_rng(5)

    def drawn(leaf: jax.Array) -> jax.Array:
        """Any bits at all, for what is saved is not looked at. Only which NaN it is XLA does not keep in 16 bits."""
        if leaf.dtype == bool:
            return jnp.asarray(random.integers(0, 2, leaf.shape).astype(bool))
        bits = random.integers(0, 256, (*leaf.shape, leaf.dtype.itemsize), np.uint8).view(leaf.dtype)[..., 0]
        with np.errstate(invalid="ignore"):
            return jnp.asarray(np.where(bits == bits, bits, np.zeros((), bits.dtype)))

    layouts = layouts_of(model, cache)
    blank = empty_cache(layouts, 4, [(layout.pages_per_row(20), 9 * layout.rows) for layout in layouts], recurrent)
    groups = []
    for group in (*blank.groups, *(blank.groups if context else ())):
        made = jax.tree.map(drawn, group)
        refs = jnp.asarray(random.integers(0, 3, group.num_pages), jnp.int32).at[0].set(2).at[1].set(0)
        groups.append(dataclasses.replace(made, refs=refs))
    cached = dataclasses.replace(
        jax.tree.map(drawn, blank), groups=tuple(groups[: len(layouts)]), context=tuple(groups[len(layouts) :])
    )
    last = jnp.asarray(random.standard_normal((4, 32)), model.dtype)
    return kvjax.State(cached, cache, tuple(map(tuple, TOKENS)), last, 0, (10, 1, 15))


def bits(array: jax.Array) -> tuple[str, tuple[int, ...], bytes]:
    """Everything there is to know of an array."""
    return array.dtype.name, array.shape, np.asarray(array).tobytes()


def assert_same_state(ours: kvjax.State, theirs: kvjax.State) -> None:
    """Bit for bit, but for pages that nobody holds, which come back empty."""
    for name in ("config", "tokens", "pending", "prompt_lengths"):
        assert getattr(ours, name) == getattr(theirs, name)
    assert jax.tree.structure(ours.cache) == jax.tree.structure(theirs.cache), "all that is static"
    assert (ours.last is None) == (theirs.last is None)
    assert ours.last is None or bits(ours.last) == bits(theirs.last)
    for mine, other in zip(
        (*ours.cache.groups, *ours.cache.context), (*theirs.cache.groups, *theirs.cache.context), strict=True
    ):
        held = np.asarray(other.refs) > 0
        pools = [jax.tree.leaves((group.k, group.v, group.page_state)) for group in (mine, other)]
        for a, b in zip(*pools, strict=True):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
            assert np.asarray(a)[held].tobytes() == np.asarray(b)[held].tobytes()
            assert not np.asarray(a)[~held].astype(np.float32).any()
    bare = [
        jax.tree.map(
            bits,
            dataclasses.replace(
                state.cache,
                groups=tuple(dataclasses.replace(g, k=None, v=None, page_state={}) for g in state.cache.groups),  # type: ignore[arg-type]
                context=tuple(dataclasses.replace(g, k=None, v=None, page_state={}) for g in state.cache.context),  # type: ignore[arg-type]
            ),
        )
        for state in (ours, theirs)
    ]
    assert jax.tree.leaves(bare[0]) == jax.tree.leaves(bare[1])


@dataclasses.dataclass(frozen=True, init=False)
class Mine(StreamingLLM):
    """A policy of a user's own, whose constructor is its own too."""

    def __init__(self, both: int, names: tuple[str, ...] = ()):
        super().__init__(both, both)
        object.__setattr__(self, "both", both)
        object.__setattr__(self, "names", names)


@dataclasses.dataclass(frozen=True, init=False)
class Silent(Full):
    """A policy that does not say what it was made with."""

    depth: int

    def __init__(self, given: int):
        object.__setattr__(self, "depth", given)


@dataclasses.dataclass(frozen=True, init=False)
class Changing(Full):
    """A policy that says it was made with something else."""

    depth: int

    def __init__(self, depth: int):
        object.__setattr__(self, "depth", 2 * depth)


HALF = model_of(dataclasses.replace(CONFIG, windows=(6, None)))
NARROW = dataclasses.replace(MODEL, params=jax.tree.map(lambda param: param.astype("bfloat16"), MODEL.params))
LEVELS = {bits: np.linspace((-1, -0.5), (1, 0.5), 2**bits, dtype=np.float32).T for bits in (2, 3, 4)}
CALIBRATION = Calibration(-np.ones((2, 2, 8), np.float32), np.ones((2, 2, 8), np.float32), LEVELS, LEVELS)
KEPT: dict[str, tuple[CacheConfig, kvjax.Model]] = {
    "plain": (PLAIN, MODEL),
    "h2o-int8+window-int8": (cache_of(MIXED[1]), MODEL),
    "pyramidkv-fp8": (CacheConfig(policy=PyramidKV(10, window=3, beta=2), codec=FP8()), MODEL),
    "kivi": (CacheConfig(codec=KIVI(2, 8, 16)), MODEL),
    "kvquant": (
        CacheConfig(
            codec=KVQuant(3, 0.1, 1, CALIBRATION),
            overrides=(((1,), CacheConfig(codec=KVQuant(2, 0.0, 0, CALIBRATION))),),
        ),
        MODEL,
    ),
    "quest+sparq": (
        CacheConfig(
            page_size=4,
            select=Quest(2, dense_layers=0),
            codec=Dense("bfloat16"),
            overrides=(((1,), CacheConfig(select=SparQ(4, 6, 2), codec=Int4(8))),),
        ),
        MODEL,
    ),
    "fastgen+scissorhands": (
        CacheConfig(
            policy=FastGen(1.5, special=(0, 3), punctuation=(5,)),
            num_pages=40,
            overrides=(((1,), CacheConfig(policy=Scissorhands(6, 3))),),
        ),
        MODEL,
    ),
    "a model's windows": (CacheConfig(memory_bytes=10**6), HALF),
    "in bfloat16": (PLAIN, NARROW),
}


@pytest.mark.parametrize("case", KEPT)
def test_a_saved_state_is_the_same_state_again(tmp_path: Path, case: str) -> None:
    cache, model = KEPT[case]
    state = state_of(cache, model)
    kvjax.save_state(state, tmp_path / "saved" / "here")
    assert [entry.name for entry in (tmp_path / "saved").iterdir()] == ["here"], "nothing is left beside it"
    assert_same_state(kvjax.load_state(tmp_path / "saved" / "here"), state)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(state.cache)), "the state stays usable"


@pytest.mark.parametrize("case", ["pyramidkv-fp8", "quest+sparq", "in bfloat16"])
def test_a_device_that_holds_short_floats_as_they_are_reads_what_one_saved_that_holds_their_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    cache, model = KEPT[case]
    state = state_of(cache, model)
    kvjax.save_state(state, tmp_path / "state")
    monkeypatch.setattr("kvjax.cache.state.pool_dtype", lambda owner, dtype: dtype)
    loaded = kvjax.load_state(tmp_path / "state")
    short = [leaf.dtype for leaf in jax.tree.leaves(loaded.cache) if leaf.dtype in INTEGERS]
    assert short
    for group, other in zip(loaded.cache.groups, state.cache.groups, strict=True):
        held = np.asarray(group.refs) > 0
        for name, mine, its in (("k", group.k, other.k), ("page_state", group.page_state, other.page_state)):
            for one, two in zip(jax.tree.leaves(mine), jax.tree.leaves(its), strict=True):
                assert one.dtype == (numbers(two).dtype if one.dtype in INTEGERS else two.dtype), name
                mine_held, its_held = np.asarray(one)[held], np.asarray(two)[held]
                if one.dtype in INTEGERS:  # a NaN may come back as another
                    mine_held, its_held = mine_held.astype(np.float32), numbers(its_held).astype(np.float32)
                np.testing.assert_array_equal(mine_held, its_held)
    monkeypatch.undo()
    kvjax.save_state(loaded, tmp_path / "again")
    again = kvjax.load_state(tmp_path / "again")
    for one, two in zip(jax.tree.leaves(again.cache.groups), jax.tree.leaves(state.cache.groups), strict=True):
        assert one.dtype == two.dtype


def test_recurrent_states_an_encoded_context_and_a_pending_token_are_kept(tmp_path: Path) -> None:
    state = state_of(PLAIN, recurrent=((), ((4, 8, 8), (32,))), context=True)
    state = dataclasses.replace(state, last=None, pending=1)
    kvjax.save_state(state, tmp_path / "state")
    assert_same_state(kvjax.load_state(str(tmp_path / "state")), state)


def test_only_pages_in_use_are_written_and_shared_ones_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot, "PAGES_PER_TRIP", 4)  # several trips, the last one not full
    state = state_of(PLAIN)
    kvjax.save_state(state, tmp_path / "state")
    arrays = json.loads((tmp_path / "state" / snapshot.STATE_FILE).read_text())["state"]["arrays"]
    in_use = int(np.sum(np.asarray(state.cache.groups[0].refs) > 0))
    assert 4 < in_use < 9
    assert in_use % 4
    assert arrays["groups.0.k.values"]["shape"] == [in_use, *state.cache.groups[0].k.values.shape[1:]]
    assert_same_state(kvjax.load_state(tmp_path / "state"), state)


def test_a_cache_without_a_page_in_use_is_kept(tmp_path: Path) -> None:
    state = state_of(PLAIN)
    (group,) = state.cache.groups
    empty = dataclasses.replace(group, refs=jnp.zeros_like(group.refs))
    state = dataclasses.replace(state, cache=dataclasses.replace(state.cache, groups=(empty,)))
    kvjax.save_state(state, tmp_path / "state")
    assert_same_state(kvjax.load_state(tmp_path / "state"), state)


def test_methods_of_ones_own_are_named(tmp_path: Path) -> None:
    state = state_of(CacheConfig(policy=Mine(3, names=("a", "b")), page_size=4))
    kvjax.save_state(state, tmp_path / "state")
    assert_same_state(kvjax.load_state(tmp_path / "state", methods=(Mine, Silent)), state)
    with pytest.raises(CheckpointError, match=r"made with Mine, .*methods=\(Mine,\)"):
        kvjax.load_state(tmp_path / "state")
    for wrong in (Mine, (Mine(3),), 3):
        with pytest.raises(RequestError, match="the classes themselves"):
            kvjax.load_state(tmp_path / "state", methods=wrong)  # type: ignore[arg-type]


def test_a_class_of_ones_own_does_not_stand_in_for_one_of_kvjax(tmp_path: Path) -> None:
    kvjax.save_state(state := state_of(PLAIN), tmp_path / "state")
    impostor = type("Full", (Mine,), {})
    assert_same_state(kvjax.load_state(tmp_path / "state", methods=(impostor,)), state)


def test_a_method_that_cannot_be_named_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cannot save this state: Silent: its argument 'given' is no attribute"):
        kvjax.save_state(state_of(CacheConfig(policy=Silent(3))), tmp_path / "state")
    with pytest.raises(CheckpointError, match=r"Changing\(.*depth=6.*\).* would not be read back as itself"):
        kvjax.save_state(state_of(CacheConfig(policy=Changing(3))), tmp_path / "state")
    with pytest.raises(CheckpointError, match=r"cannot save this state: Mine.names cannot be written"):
        kvjax.save_state(state_of(CacheConfig(policy=Mine(3, names=(object,)))), tmp_path / "state")  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


# Another process

CHILD = """
import json, sys
import kvjax
from tests.cache.tiny import MODEL
state = kvjax.load_state(sys.argv[1])
out, state = kvjax.extend(MODEL, state, max_new_tokens=6, sampling=kvjax.Sampling(temperature=1.0), seed=5)
print(json.dumps([out.tokens, out.logprobs]))
kvjax.save_state(state, sys.argv[2])
"""


def test_another_process_goes_on_bit_for_bit(tmp_path: Path) -> None:
    # Forks in the middle of a turn, under policies that overwrite: pages shared, some to be copied by the next step.
    sampling = Sampling(temperature=1.0)
    state = kvjax.prefill(MODEL, [*TOKENS, [1]], cache_of(MIXED[1]), prefill_chunk=CHUNK)
    _, state = kvjax.extend(MODEL, state, max_new_tokens=5, sampling=sampling)
    # Forks of two of the four sequences go on by the programs of all four.
    two = dataclasses.replace(state, tokens=state.tokens[:2], prompt_lengths=state.prompt_lengths[:2])
    state = kvjax.fork(two, 2)
    kvjax.save_state(state, tmp_path / "state")
    out, state = kvjax.extend(MODEL, state, max_new_tokens=6, sampling=sampling, seed=5)
    assert out.stats.copied_pages > 0
    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path / "state"), str(tmp_path / "after")],
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax")},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stderr
    # JSON writes a float with as many digits as tell it from all others.
    assert json.loads(child.stdout) == [out.tokens, out.logprobs]
    after = kvjax.load_state(tmp_path / "after")
    assert after.tokens == state.tokens
    for mine, other in zip(after.cache.groups, state.cache.groups, strict=True):
        held = np.asarray(other.refs) > 0
        for a, b in zip(*(jax.tree.leaves((group.k, group.v)) for group in (mine, other)), strict=True):
            assert np.asarray(a)[held].tobytes() == np.asarray(b)[held].tobytes()
        for name in ("table", "length", "position", "victim", "free", "refs", "top", "copied", "row_state"):
            assert jax.tree.map(bits, getattr(mine, name)) == jax.tree.map(bits, getattr(other, name)), name


# Directories


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A saved state."""
    kvjax.save_state(state_of(PLAIN), tmp_path / "state")
    return tmp_path / "state"


def test_a_saved_state_may_be_replaced_and_nothing_else(saved: Path) -> None:
    state = state_of(cache_of(MIXED[1]))
    kvjax.save_state(state, saved)
    assert_same_state(kvjax.load_state(saved), state)
    (saved / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"'notes.txt', which is no part of a saved state"):
        kvjax.save_state(state, saved)
    (other := saved.parent / "other").mkdir()
    (other / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="not empty and holds no saved state"):
        kvjax.save_state(state, other)
    with pytest.raises(CheckpointError, match="is a file"):
        kvjax.save_state(state, other / "config.json")
    with pytest.raises(CheckpointError, match="cannot write"):
        kvjax.save_state(state, other / "config.json" / "below")
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        kvjax.save(MODEL, saved)


def test_saving_that_fails_half_way_leaves_what_was_there(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = kvjax.load_state(saved)

    def fails(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(snapshot, "save_arrays", fails)
    with pytest.raises(CheckpointError, match="No space left"):
        kvjax.save_state(state_of(cache_of(MIXED[1])), saved)
    assert [entry.name for entry in saved.parent.iterdir()] == ["state"]
    assert_same_state(kvjax.load_state(saved), before)


def edit(path: Path, change: Callable[[dict[str, Any]], Any], *, sign: bool = False) -> None:
    """Changes the JSON of a saved state; `sign`: and its checksum, as whoever knows how could."""
    table = json.loads((path / snapshot.STATE_FILE).read_text())
    change(table)
    if sign:
        table["checksum"] = snapshot._checksum(table["state"])
    (path / snapshot.STATE_FILE).write_text(json.dumps(table))


DAMAGED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no directory": (shutil.rmtree, "holds no saved state.*kvjax.load reads models"),
    "no json": (lambda path: (path / snapshot.STATE_FILE).unlink(), "holds no saved state"),
    "half a json": (
        lambda path: (path / snapshot.STATE_FILE).write_text((path / snapshot.STATE_FILE).read_text()[:400]),
        "cannot be read",
    ),
    "bytes": (lambda path: (path / snapshot.STATE_FILE).write_bytes(b"\xff\x00"), "cannot be read"),
    "another json": (lambda path: (path / snapshot.STATE_FILE).write_text("[]"), "no file of kvjax.save_state"),
    "another format": (
        lambda path: edit(path, lambda t: t.update(format=2)),
        "has format 2, this kvjax reads format 1",
    ),
    "an edited token": (lambda path: edit(path, lambda t: t["state"]["tokens"][0].append(4)), "damaged or was edited"),
    "an unknown policy": (
        lambda path: edit(path, lambda t: t["state"]["config"]["policy"].update(name="Fuller"), sign=True),
        r"does not describe .*'Fuller' is unknown",
    ),
    "a missing key": (lambda path: edit(path, lambda t: t["state"].pop("tokens"), sign=True), "does not describe"),
    "another pool": (
        lambda path: edit(path, lambda t: t["state"]["groups"][0].update(page_size=8), sign=True),
        r"should be",
    ),
    "no arrays": (lambda path: shutil.rmtree(path / snapshot.ARRAYS_FOLDER), "there is no folder"),
    "an array too many": (
        lambda path: edit(path, lambda t: t["state"]["arrays"]["seen"].update(shape=[5]), sign=True),
        r"holds no seen of shape \[5\]",
    ),
    "an array too few": (
        lambda path: edit(path, lambda t: t["state"]["arrays"].pop("groups.0.refs"), sign=True),
        "not a whole orbax checkpoint",
    ),
    "another checksum": (
        lambda path: edit(path, lambda t: t["state"]["arrays"]["seen"].update(crc32=1), sign=True),
        "seen is damaged",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_directory_is_refused_and_named(saved: Path, case: str) -> None:
    damage, message = DAMAGED[case]
    damage(saved)
    with pytest.raises(CheckpointError, match=message):
        kvjax.load_state(saved)


def test_a_state_that_lacks_what_a_cache_has_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = snapshot._arrays
    monkeypatch.setattr(snapshot, "_arrays", lambda state: {k: v for k, v in whole(state).items() if "peak" not in k})
    kvjax.save_state(state_of(PLAIN), tmp_path / "state")
    with pytest.raises(CheckpointError, match=r"lists no array groups.0.peak"):
        kvjax.load_state(tmp_path / "state")


def test_no_file_of_the_arrays_can_be_cut_lost_or_altered_unseen(saved: Path) -> None:
    files = [file for file in (saved / snapshot.ARRAYS_FOLDER).rglob("*") if file.is_file()]
    heavy = max(files, key=lambda file: file.stat().st_size)
    content = heavy.read_bytes()
    middle = len(content) // 2
    altered = content[:middle] + bytes(255 - byte for byte in content[middle : middle + 8]) + content[middle + 8 :]
    for damaged in (content[:middle], altered, b""):
        heavy.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"damaged|not a whole orbax checkpoint"):
            kvjax.load_state(saved)
    heavy.unlink()
    with pytest.raises(CheckpointError, match=r"not a whole orbax checkpoint"):
        kvjax.load_state(saved)


# Models

OTHERS: dict[str, tuple[Callable[[], kvjax.Model], str]] = {
    "other heads": (lambda: model_of(dataclasses.replace(CONFIG, num_kv_heads=4)), "2 heads of 8 .* 4 heads of 8"),
    "fewer layers": (lambda: model_of(dataclasses.replace(CONFIG, num_layers=1)), "layers 0..1: .* layers 0: "),
    "windows": (lambda: HALF, r"Full\(\).*asks for .*SlidingWindow\(window=6\)"),
    "fewer tokens": (lambda: model_of(dataclasses.replace(CONFIG, vocab_size=8)), "it holds token .*, of 8 in the"),
    "another dtype": (lambda: NARROW, "float32, .* bfloat16, .* loaded in the same dtype"),
    "another width": (
        lambda: model_of(dataclasses.replace(CONFIG, hidden_size=48, head_dim=8)),
        "hidden states of 32 channels, not 48",
    ),
}


@pytest.mark.parametrize("case", OTHERS)
def test_a_model_of_other_shapes_is_refused_and_the_state_is_as_it_was(case: str) -> None:
    model, message = OTHERS[case]
    state = state_of(PLAIN)
    with pytest.raises(RequestError, match=f"the state is of another model: .*{message}"):
        kvjax.extend(model(), state, max_new_tokens=1)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(state.cache))


def test_a_model_without_a_layer_that_the_config_names_is_refused():
    config = dataclasses.replace(PLAIN, overrides=(((1,), CacheConfig(policy=SnapKV(40))),))
    with pytest.raises(RequestError, match="the state is of another model: .*layer 1"):
        kvjax.extend(model_of(dataclasses.replace(CONFIG, num_layers=1)), state_of(config), max_new_tokens=1)


def test_what_is_no_live_state_is_not_saved(tmp_path: Path) -> None:
    state = state_of(PLAIN)
    state.cache.seen.delete()
    with pytest.raises(RequestError, match="consumed by an earlier call"):
        kvjax.save_state(state, tmp_path / "state")
    with pytest.raises(RequestError, match=r"a kvjax.State is needed"):
        kvjax.save_state(MODEL, tmp_path / "state")  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())

"""`load` and `save` as users call them: both formats, the files beside the weights, and directories left whole."""

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
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

import kvjax.checkpoint
import kvjax.model
from kvjax.checkpoint import load, save
from kvjax.config import ModelConfig, RopeScaling
from kvjax.errors import CheckpointError, ConfigError
from kvjax.model import Model
from kvjax.models import stack_layers
from tests.convert.directories import stored_bytes, write_directory

ROOT = Path(__file__).resolve().parent.parent


def tokenizer(*words: str) -> Tokenizer:
    return Tokenizer(WordLevel({word: index for index, word in enumerate(("?", *words))}, unk_token="?"))


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    """A Hugging Face directory with all that usually lies beside the weights."""
    path = write_directory(tmp_path / "hf", dtype="bfloat16", torch_dtype="bfloat16", note="kept")
    (path / "tokenizer.json").write_text(tokenizer("a", "b").to_str(pretty=True) + "\n\n")
    (path / "tokenizer_config.json").write_text('{"chat_template": "{{x}}"}')
    (path / "generation_config.json").write_text('{"eos_token_id": [5, 6],  "temperature": 0.6}')
    (path / "README.md").write_text("not ours")
    return path


def assert_same_model(ours: Model, theirs: Model) -> None:
    assert ours.config == theirs.config
    jax.tree.map(np.testing.assert_array_equal, ours.params, theirs.params)
    assert ours.dtype == theirs.dtype
    assert (ours.tokenizer is None) == (theirs.tokenizer is None)
    if ours.tokenizer is not None:
        assert ours.tokenizer.to_str() == theirs.tokenizer.to_str()
    assert ours.files == theirs.files


@pytest.mark.parametrize("format", ["orbax", "safetensors"])
def test_a_saved_model_loads_as_the_same_model(hf: Path, tmp_path: Path, format: str) -> None:
    model = load(hf, dtype="auto")
    save(model, tmp_path / "saved" / "here", format=format)
    assert_same_model(load(tmp_path / "saved" / "here", dtype="auto"), model)
    assert [entry.name for entry in (tmp_path / "saved").iterdir()] == ["here"]


def test_safetensors_after_orbax_still_equals_the_first_checkpoint_bit_for_bit(hf: Path, tmp_path: Path) -> None:
    save(load(hf, dtype="auto"), tmp_path / "orbax")
    save(load(tmp_path / "orbax", dtype="auto"), tmp_path / "again", format="safetensors")
    assert stored_bytes(tmp_path / "again") == stored_bytes(hf)
    written, first = (json.loads((path / "config.json").read_text()) for path in (tmp_path / "again", hf))
    assert written["eos_token_id"] == [5, 6]
    assert {**written, "eos_token_id": 2}.items() >= first.items()


@pytest.mark.parametrize("format", ["orbax", "safetensors"])
def test_files_beside_the_weights_are_copied_byte_for_byte(hf: Path, tmp_path: Path, format: str) -> None:
    save(load(hf), tmp_path / "out", format=format)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (hf / name).read_bytes()
    assert not (tmp_path / "out" / "README.md").exists()


def test_generation_config_decides_what_ends_a_text(hf: Path) -> None:
    assert load(hf).config.eos_token_ids == (5, 6)
    (hf / "generation_config.json").write_text('{"temperature": 0.6}')
    assert load(hf).config.eos_token_ids == (2,)
    (hf / "generation_config.json").write_text('{"eos_token_id": 9}')
    assert load(hf).config.eos_token_ids == (9,)


def test_changed_end_tokens_and_tokenizers_are_what_is_saved(hf: Path, tmp_path: Path) -> None:
    model = load(hf)
    config = dataclasses.replace(model.config, eos_token_ids=(7,))
    save(dataclasses.replace(model, config=config, tokenizer=tokenizer("c")), tmp_path / "out", "safetensors")
    again = load(tmp_path / "out")
    assert again.config.eos_token_ids == (7,)
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == {
        "eos_token_id": [7],
        "temperature": 0.6,
    }
    assert again.tokenizer.get_vocab() == {"?": 0, "c": 1}


def test_prompts_are_neither_cut_nor_padded_whatever_a_tokenizer_was_trained_with(hf: Path, tmp_path: Path) -> None:
    strict = tokenizer("a", "b")
    strict.pre_tokenizer = WhitespaceSplit()
    strict.enable_truncation(1)
    strict.enable_padding(length=4, pad_token="?")
    content = strict.to_str(pretty=True)
    (hf / "tokenizer.json").write_text(content)
    model = load(hf)
    assert model.tokenizer.encode("a b a").ids == [1, 2, 1]
    save(model, tmp_path / "out", "safetensors")
    assert (tmp_path / "out" / "tokenizer.json").read_text() == content  # the user's file stays as it was


def test_a_model_without_a_tokenizer_is_saved_without_one(hf: Path, tmp_path: Path) -> None:
    save(dataclasses.replace(load(hf), tokenizer=None), tmp_path / "out")
    assert load(tmp_path / "out").tokenizer is None


@pytest.mark.parametrize("format", ["orbax", "safetensors"])
def test_random_models_are_saved_too(tmp_path: Path, format: str) -> None:
    config = ModelConfig(
        vocab_size=48,
        hidden_size=24,
        intermediate_size=40,
        num_layers=1,
        num_heads=4,
        num_kv_heads=1,
        rope_scaling=RopeScaling("yarn", 4.0, 16),
        tie_word_embeddings=True,
        max_position_embeddings=64,
        eos_token_ids=(3, 4),
    )
    model = kvjax.model.init(config, seed=3, dtype="bfloat16")
    save(model, tmp_path / "out", format)
    again = load(tmp_path / "out", dtype="auto")
    jax.tree.map(np.testing.assert_array_equal, again.params, model.params)
    assert dataclasses.replace(again.config, extra="{}") == dataclasses.replace(config, dtype="bfloat16")


@pytest.mark.parametrize(("platform", "dtype"), [("cpu", "float32"), ("gpu", "bfloat16"), ("tpu", "bfloat16")])
def test_no_dtype_means_float32_on_cpu_and_bfloat16_elsewhere(
    hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, platform: str, dtype: str
) -> None:
    save(load(hf), tmp_path / "orbax")
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    assert load(hf).dtype.name == dtype
    assert load(tmp_path / "orbax").dtype.name == dtype


@pytest.mark.parametrize("dtype", ["float32", jnp.float16, np.dtype("float32"), jnp.bfloat16])
def test_the_dtype_asked_for_is_the_dtype_loaded(hf: Path, tmp_path: Path, dtype: Any) -> None:
    model = load(hf, dtype=dtype)
    assert {leaf.dtype for leaf in jax.tree.leaves(model.params)} == {jnp.dtype(dtype)}
    assert model.config.dtype == "bfloat16"
    save(load(hf, dtype="auto"), tmp_path / "orbax")
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path / "orbax", dtype=dtype).params, model.params)


@pytest.mark.parametrize("dtype", ["int8", "float64", "fast", 3])
def test_other_dtypes_are_refused(hf: Path, dtype: Any) -> None:
    with pytest.raises(ConfigError, match="dtype must be None, .auto. or one of float32, bfloat16, float16"):
        load(hf, dtype=dtype)


def test_what_is_no_checkpoint_is_refused(hf: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such local directory"):
        load(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="it is a file: give its directory"):
        load(hf / "model.safetensors")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"neither config.json nor kvjax_config.json"):
        load(tmp_path / "empty")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", "{"),
        ("config.json", "[]"),
        ("config.json", "\udcff"),
        ("generation_config.json", "{"),
        ("generation_config.json", '{"eos_token_id": "x"}'),
        ("tokenizer.json", "{}"),
    ],
)
def test_damaged_json_is_refused_by_its_name(hf: Path, name: str, content: str) -> None:
    (hf / name).write_text(content, errors="surrogateescape")
    with pytest.raises(CheckpointError, match=str(hf / name)):
        load(hf)


def _largest(path: Path) -> Path:
    return max((file for file in path.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)


def _halve(path: Path) -> None:
    file = _largest(path / "params")
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def _changed_config(**fields: Any) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        file = path / "kvjax_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: (p / "kvjax_config.json").write_text("{"), "kvjax_config.json does not hold a kvjax config"),
        (_changed_config(num_heads="4"), "num_heads must be a positive integer"),
        (_changed_config(intermediate_size=41), r"mlp/.* has shape .* promises"),
        (_changed_config(num_layers=1, windows=[None]), "unexpected parameters: layers_1/"),
        (_changed_config(qk_norm=True), "missing parameters: layers_0/attention/k_norm/scale"),
        (lambda p: shutil.rmtree(p / "params"), "no folder params"),
        (lambda p: _largest(p / "params").unlink(), "not a whole orbax checkpoint"),
        (_halve, "not a whole orbax checkpoint"),
        (lambda p: (p / "params" / "_METADATA").unlink(), "not a whole orbax checkpoint"),
        (lambda p: (p / "params" / "_METADATA").write_text("{"), "not a whole orbax checkpoint"),
    ],
)
def test_a_damaged_orbax_directory_is_refused(
    hf: Path, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    save(load(hf), tmp_path / "orbax")
    damage(tmp_path / "orbax")
    with pytest.raises(CheckpointError, match=message) as raised:
        load(tmp_path / "orbax")
    assert str(tmp_path / "orbax") in str(raised.value)


def test_orbax_weights_that_are_no_numbers_are_refused_by_name(hf: Path, tmp_path: Path) -> None:
    model = load(hf)
    model.params["layers_1"]["mlp"]["up"]["weight"] *= jnp.nan
    save(model, tmp_path / "orbax")
    with pytest.raises(CheckpointError, match="layers_1/mlp/up/weight holds NaN or infinite values"):
        load(tmp_path / "orbax")


def everything(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


@pytest.mark.parametrize("format", ["orbax", "safetensors"])
@pytest.mark.parametrize("existing", ["orbax", "safetensors", "empty"])
def test_saving_replaces_a_checkpoint_whole(hf: Path, tmp_path: Path, existing: str, format: str) -> None:
    out = tmp_path / "out" / "model"
    model = load(hf)
    if existing == "empty":
        out.mkdir(parents=True)
    else:
        save(kvjax.model.init(model.config, seed=1), out, existing)
    save(model, out, format)
    assert_same_model(load(out), dataclasses.replace(model, config=load(out).config))
    assert (out / "config.json").exists() == (format == "safetensors")
    assert (out / "params").exists() == (format == "orbax")
    assert [entry.name for entry in out.parent.iterdir()] == ["model"]


def test_saving_over_the_directory_a_model_came_from_works(hf: Path) -> None:
    (hf / "README.md").unlink()
    before = stored_bytes(hf)
    save(load(hf, dtype="auto"), hf, "safetensors")
    assert stored_bytes(hf) == before


@pytest.mark.parametrize("format", ["orbax", "safetensors"])
def test_directories_that_are_no_checkpoint_or_hold_more_are_left_alone(hf: Path, tmp_path: Path, format: str) -> None:
    model = load(hf)
    before = everything(hf)
    with pytest.raises(CheckpointError, match=r"holds 'README.md', which is no part of a checkpoint"):
        save(model, hf, format)
    assert everything(hf) == before
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "tokenizer.json").write_text("mine")
    with pytest.raises(CheckpointError, match="not empty and holds no checkpoint"):
        save(model, tmp_path / "notes", format)
    assert everything(tmp_path / "notes") == {"tokenizer.json": b"mine"}
    with pytest.raises(CheckpointError, match="is a file"):
        save(model, hf / "config.json", format)


@pytest.mark.parametrize(("format", "step"), [("orbax", "save_orbax"), ("safetensors", "save_hf")])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_save_that_fails_leaves_what_was_there_and_nothing_else(
    hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str, step: str, error: BaseException
) -> None:
    out = tmp_path / "out" / "model"
    model = load(hf)
    save(model, out, format)
    before = everything(out)
    write = getattr(kvjax.checkpoint, step)

    def fail(*args: Any) -> None:
        write(*args)
        raise error

    monkeypatch.setattr(kvjax.checkpoint, step, fail)
    expected = CheckpointError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected, match="No space left" if isinstance(error, OSError) else None):
        save(kvjax.model.init(model.config, seed=1), out, format)
    assert everything(out) == before
    assert [entry.name for entry in out.parent.iterdir()] == ["model"]


@pytest.mark.parametrize("format", ["orbax", "safetensors"])
def test_weights_that_are_not_the_configs_are_not_saved(hf: Path, tmp_path: Path, format: str) -> None:
    model = load(hf)
    stacked = dataclasses.replace(model, params=stack_layers(model.params))
    wider = dataclasses.replace(model, config=dataclasses.replace(model.config, intermediate_size=44))
    for wrong, message in ((stacked, "unstack_layers"), (wider, r"has shape \(24,\s*40\)|promises \(24, 44\)")):
        with pytest.raises(CheckpointError, match=message):
            save(wrong, tmp_path / "out", format)
    assert not (tmp_path / "out").exists()


def test_unknown_formats_are_refused(hf: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="format must be one of orbax, safetensors, got 'pickle'"):
        save(load(hf), tmp_path / "out", format="pickle")
    assert not (tmp_path / "out").exists()


MEASURE = """
import sys
from kvjax.checkpoint import load

def kilobytes(field):
    # Not getrusage: its maximum survives exec, and the parent of this process may have been larger.
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field))

load(sys.argv[2])
before = kilobytes("VmRSS:")
model = load(sys.argv[1])
print(1024 * before, 1024 * kilobytes("VmHWM:"))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads resident memory from /proc")
@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_loading_takes_no_more_host_memory_than_the_model_and_its_largest_tensor(tmp_path: Path, stored: str) -> None:
    """The promise is model + largest tensor + 1 GB for everything; beyond what the process held before the load, the
    allowance here is 64 MB (two blocks, the allocator's slack), so that one more copy of the weights fails."""
    small = write_directory(tmp_path / "small")
    config = ModelConfig(
        vocab_size=16384,
        hidden_size=1024,
        intermediate_size=4096,
        num_layers=3,
        num_heads=16,
        num_kv_heads=16,
        tie_word_embeddings=True,
    )
    model = kvjax.model.init(config, dtype=stored)
    save(model, tmp_path / "large", "safetensors")
    sizes = [4 * leaf.size for leaf in jax.tree.leaves(model.params)]  # loaded as float32 on CPU
    assert sum(sizes) > 2.5e8
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path / "large"), str(small)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        check=True,
    )
    before, peak = map(int, done.stdout.split())
    assert 0.9 * sum(sizes) < peak - before < sum(sizes) + max(sizes) + 64e6


def test_a_relative_path_is_as_good_as_another(hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(hf)
    monkeypatch.chdir(tmp_path)
    for form in ("orbax", "safetensors"):
        save(model, form, format=form)
        assert_same_model(load(form), load(tmp_path / form))

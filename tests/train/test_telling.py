"""What a run tells: TensorBoard's event files, the share of peak, losses along the decode path; and its TOML file."""

from __future__ import annotations

import struct
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.cache import policies
from kvjax.cache.codecs import Int8
from kvjax.cache.config import CacheConfig
from kvjax.config import ModelConfig
from kvjax.errors import ConfigError
from kvjax.model import init
from kvjax.train import Distillation, LoRA
from kvjax.train.decode_loss import decode_loss
from kvjax.train.loss import token_losses
from kvjax.train.run_toml import RunFile
from kvjax.train.speed import flops_per_token, share_of_peak
from kvjax.train.step import forward
from kvjax.train.tensorboard import EventFile, crc32c

CONFIG = ModelConfig(
    vocab_size=32, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8
)


def fields(message: bytes) -> list[tuple[int, object]]:
    """A protocol buffer's fields, by the specification of its encoding."""
    found: list[tuple[int, object]] = []
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(message):
        key = varint()
        if key & 7 == 0:
            value: object = varint()
        else:
            size = {1: 8, 5: 4}.get(key & 7) or varint()
            value, at = message[at : at + size], at + size
        found.append((key >> 3, value))
    return found


def test_the_checksum_is_castagnolis():
    # The check value of CRC-32C, and an example of RFC 3720, B.4.
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(bytes(32)) == 0x8A9136AA


def test_an_event_file_holds_what_was_written(tmp_path):
    with EventFile(tmp_path) as file:
        file.scalars(300, {"loss": 1.5, "gradient_norm": 0.25})
    (path,) = tmp_path.iterdir()
    content, events = path.read_bytes(), []
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        events.append(dict(fields(content[12 : 12 + length])))
        content = content[16 + length :]
    assert events[0][3] == b"brain.Event:2"
    assert events[1][2] == 300
    values = [dict(fields(value)) for _, value in fields(events[1][5])]  # type: ignore[arg-type]
    assert [(value[1], struct.unpack("<f", value[2])[0]) for value in values] == [
        (b"loss", 1.5), (b"gradient_norm", 0.25),
    ]  # fmt: skip


def test_the_share_of_peak_is_of_known_devices_alone():
    assert share_of_peak(989e12, 2.0, devices=2, kind="NVIDIA H100 80GB HBM3") == pytest.approx(0.25)
    assert share_of_peak(1.0, 1.0, kind="cpu") is None


def test_flops_are_six_per_weight_and_token_and_those_of_attention():
    weights = 2 * (32 * 32 + 2 * 16 * 32 + 32 * 32 + 3 * 32 * 48 + 2 * 32) + 32 + 32 * 32
    assert flops_per_token(CONFIG, 10) == 6 * weights + 6 * 2 * 4 * 8 * 10


def test_the_loss_along_the_decode_path_is_that_of_the_forward_path():
    model = init(CONFIG, dtype=jnp.float32)
    rows = np.random.default_rng(0).integers(0, 32, (3, 12)).astype(np.int32)
    losses = token_losses(forward(CONFIG, scan=False)(model.params, jnp.asarray(rows)), jnp.asarray(rows))
    # The same float32 sums in another order.
    assert decode_loss(model, rows, prompt_length=4, batch=2) == pytest.approx(float(losses[:, 3:].mean()), rel=1e-4)
    with pytest.raises(ConfigError, match="prompt_length must be 1 to 11"):
        decode_loss(model, rows, prompt_length=12)


TOML = """
model = "a"
teacher = "b"
out = "c"
run = "d"
[finetune]
steps = 3
batch_size = 2
learning_rate = 1e-3
trainable = { rank = 4, targets = ["q"] }
[distillation]
hidden = 1.0
[data]
files = "x.txt"
length = 8
[evaluation]
files = ["y.txt"]
policy = { name = "SlidingWindow", window = 4 }
codec = "Int8"
[through]
policy = "SlidingWindow:4"
[mesh]
axes = ["data"]
shape = [-1]
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "run.toml"
    path.write_text(text)
    return path


def test_a_file_says_all_of_a_run(tmp_path):
    file = RunFile.from_toml(written(tmp_path, TOML))
    assert file.model == tmp_path / "a"
    assert file.finetune.trainable == LoRA(rank=4, targets=("q",))
    assert file.finetune.distillation == Distillation(hidden=1.0)
    assert file.evaluation is not None
    assert file.evaluation.cache.policy == policies.SlidingWindow(4)
    assert file.evaluation.cache.codec == Int8()
    assert file.finetune.through == CacheConfig(policy=policies.SlidingWindow(4))
    assert file.mesh is not None
    assert file.mesh.axes == ("data",)


def test_the_example_is_a_run():
    file = RunFile.from_toml(Path(__file__).parents[2] / "configs" / "finetune.toml")
    assert file.finetune.trainable == "all"
    assert file.evaluation is not None
    assert file.evaluation.cache.policy == policies.SlidingWindow(128)


@pytest.mark.parametrize(
    "old, new, match",
    [
        ("steps = 3", "stepz = 3", r"\[finetune\]: unknown key 'stepz'"),
        ("steps = 3", "", r"missing key 'steps'"),
        ("length = 8", "length = 1", "data.length"),
        ('teacher = "b"', "", "needs a teacher"),
        ("[mesh]", "[mash]", "unknown key 'mash'"),
        ("SlidingWindow:4", "SlidingWindo:4", r"\[through\]"),
        ('out = "c"', "out = 3", "'out' must be a path, got 3"),
        ('model = "a"', "", "missing 'model'"),
    ],
)
def test_mistakes_in_a_file_are_named(tmp_path, old, new, match):
    with pytest.raises(ConfigError, match=match):
        RunFile.from_toml(written(tmp_path, TOML.replace(old, new)))

"""The TOML file of a fine-tuning run."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from kvjax.cache.config import CacheConfig
from kvjax.cache.named import method_named
from kvjax.config import MeshConfig, build, read_toml
from kvjax.errors import ConfigError
from kvjax.train.processes import Processes
from kvjax.train.settings import Distillation, DMCSchedule, LoRA, Settings


@dataclasses.dataclass(frozen=True)
class Data:
    """What is read: the `[data]` table.

    Attributes:
      files: paths and glob patterns of text and `.jsonl` files, relative to the TOML file.
      length: tokens per row. field: of a JSONL object: its text. end: whether the model's end token follows each text.
    """

    files: tuple[str, ...]
    length: int
    field: str = "text"
    end: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "files", _several(self.files))
        if not isinstance(self.length, int) or self.length < 2:
            raise ConfigError(f"data.length must be an integer of at least 2, got {self.length!r}")


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What is measured while training: the `[evaluation]` table.

    Attributes:
      files: held-out text, as in `Data`. every: steps between measurements. rows: how many rows of `Data.length`.
      policy, codec, select: the cache that the model will be served with, as in configs/evaluate.toml.
    """

    files: tuple[str, ...]
    every: int = 100
    rows: int = 8
    policy: Any = "Full"
    codec: Any = "Dense"
    select: Any = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "files", _several(self.files))
        if self.every < 1 or self.rows < 1:
            raise ConfigError(f"evaluation.every and rows must be at least 1, got {self.every} and {self.rows}")

    @property
    def cache(self) -> CacheConfig:
        """As `kvjax.score` takes it."""
        chosen = {name: getattr(self, name) for name in ("policy", "codec", "select")}
        made = {name: method_named(name, given, f"evaluation.{name}") for name, given in chosen.items() if given}
        return CacheConfig(**made)


@dataclasses.dataclass(frozen=True)
class Checkpoints:
    """When checkpoints are written and which are kept: the `[checkpoints]` table.

    Attributes:
      every: steps between them. last: how many of the latest are kept; best: how many of those with the lowest loss,
        held-out loss where there is an evaluation (then only checkpoints of steps that are measured can be the best).
    """

    every: int = 100
    last: int = 2
    best: int = 1

    def __post_init__(self) -> None:
        if self.every < 1 or self.last < 1 or self.best < 0:
            raise ConfigError(
                f"checkpoints: every and last must be at least 1 and best at least 0, got {dataclasses.astuple(self)}"
            )


@dataclasses.dataclass(frozen=True)
class RunFile:
    """A whole file.

    Attributes:
      model: the directory of the model to start from. teacher: of the one to learn from, or None. out: where the result
        goes. run: checkpoints and logs. All relative to the TOML file.
      finetune: the `[finetune]` table, whose `trainable` may be a table of `LoRA`'s fields; `[distillation]` is its
        `distillation`, `[through]`, as `CacheConfig.from_dict` takes it, its `through`, and `[dmc]` its `dmc`.
      mesh: the `[mesh]` table, or None: one device. distributed: the processes that share the run, or None: this alone.
    """

    folder: Path
    model: Path
    out: Path
    run: Path
    finetune: Settings
    data: Data
    teacher: Path | None = None
    evaluation: Evaluation | None = None
    checkpoints: Checkpoints = Checkpoints()
    mesh: MeshConfig | None = None
    distributed: Processes | None = None

    @classmethod
    def from_toml(cls, path: str | Path) -> RunFile:
        """Reads a file; unknown keys are refused by name.

        Raises:
          ConfigError: the file or a value of it means nothing.
        """
        table, source = read_toml(path), str(path)
        tables: dict[str, Any] = {
            "data": Data,
            "evaluation": Evaluation,
            "checkpoints": Checkpoints,
            "distributed": Processes,
        }
        allowed = ("model", "teacher", "out", "run", "finetune", "distillation", "through", "dmc", "mesh", *tables)
        unknown = sorted(set(table) - set(allowed))
        if unknown:
            raise ConfigError(f"{source}: unknown key {unknown[0]!r}; allowed: {', '.join(allowed)}")
        missing = [name for name in ("model", "out", "run", "finetune", "data") if name not in table]
        if missing:
            raise ConfigError(f"{source}: missing {missing[0]!r}; see configs/finetune.toml")
        for name, value in table.items():
            paths = name in ("model", "teacher", "out", "run")
            if not isinstance(value, str if paths else dict):
                raise ConfigError(f"{source}: {name!r} must be {'a path' if paths else 'a table'}, got {value!r}")
        folder = Path(path).resolve().parent
        made: dict[str, Any] = {
            name: folder / Path(table[name]).expanduser()
            for name in ("model", "teacher", "out", "run")
            if name in table
        }
        for name, kind in tables.items():
            if name in table:
                made[name] = build(kind, table[name], f"{source}, [{name}]")
        if "mesh" in table:
            mesh = {key: tuple(value) if isinstance(value, list) else value for key, value in table["mesh"].items()}
            made["mesh"] = build(MeshConfig, mesh, f"{source}, [mesh]")
        return cls(folder=folder, finetune=_settings(table, source), **made)


def _several(given: Any) -> tuple[str, ...]:
    """One text, or a list of texts, as a tuple."""
    return (given,) if isinstance(given, str) else tuple(given)


def _settings(table: dict[str, Any], source: str) -> Settings:
    given = dict(table["finetune"])
    if isinstance(given.get("trainable"), dict):
        given["trainable"] = build(LoRA, given["trainable"], f"{source}, [finetune.trainable]")
    if "distillation" in table:
        if "teacher" not in table:
            raise ConfigError(f"{source}: [distillation] needs a teacher; name its directory")
        given["distillation"] = build(Distillation, table["distillation"], f"{source}, [distillation]")
    if "through" in table:
        given["through"] = CacheConfig.from_dict(table["through"], f"{source}, [through]")
    if "dmc" in table:
        given["dmc"] = build(DMCSchedule, table["dmc"], f"{source}, [dmc]")
    settings: Settings = build(Settings, given, f"{source}, [finetune]")
    return settings

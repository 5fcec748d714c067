"""Checkpoint directories as wholes: what may lie in one, and replacing one without ever showing half of it."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from kvjax.errors import CheckpointError

KVJAX_FILE = "kvjax_config.json"
PARAMS_FOLDER = "params"

GENERATION_FILE = "generation_config.json"
TOKENIZER_FILE = "tokenizer.json"
CHAT_TEMPLATE_FILE = "chat_template.jinja"
TEMPLATE_FOLDER = "additional_chat_templates"
"""Holds one `NAME.jinja` for each further chat template; its files are side files too."""
SIDECARS = (
    TOKENIZER_FILE,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    CHAT_TEMPLATE_FILE,
    GENERATION_FILE,
)
"""Small files beside the weights, kept by loading and written back by saving."""

_OURS = re.compile(r"config\.json|model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json")


def read_sidecars(path: Path) -> tuple[tuple[str, bytes], ...]:
    """Name and content of the side files that `path` holds."""
    try:
        templates = sorted(f"{TEMPLATE_FOLDER}/{file.name}" for file in (path / TEMPLATE_FOLDER).glob("*.jinja"))
        names = [name for name in (*SIDECARS, *templates) if (path / name).is_file()]
        return tuple((name, (path / name).read_bytes()) for name in names)
    except OSError as error:
        raise CheckpointError(f"cannot read {error.filename}: {error.strerror}") from error


@contextlib.contextmanager
def replaced(path: Path, check: Callable[[Path], None] | None = None) -> Iterator[Path]:
    """Yields an empty directory beside `path` that takes its place when the block ends well, and vanishes otherwise.

    Args:
      check: raises CheckpointError for a path whose content may not be replaced; None: only a model's checkpoint may.

    Raises:
      CheckpointError: `path` exists and is neither empty nor a checkpoint, or cannot be written.
    """
    path = path.expanduser().resolve()
    (check or _check_replaceable)(path)
    token = uuid.uuid4().hex[:8]
    partial, old = (path.with_name(f".{path.name}.{token}.{kind}") for kind in ("partial", "old"))
    try:
        partial.mkdir(parents=True)
        yield partial
        if path.exists():
            os.rename(path, old)
        try:
            os.rename(partial, path)
        except BaseException:
            if old.exists():
                os.rename(old, path)
            raise
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def names_in(path: Path) -> list[str]:
    """What lies in a directory that is to be saved into; nothing if there is none yet.

    Raises:
      CheckpointError: it is a file.
    """
    if not path.exists():
        return []
    if not path.is_dir():
        raise CheckpointError(f"{path} is a file; give the path of a directory to save into")
    return sorted(entry.name for entry in path.iterdir())


def _check_replaceable(path: Path) -> None:
    """Only nothing, an empty directory, or a directory of checkpoint files alone may be replaced."""
    names = names_in(path)
    if not names:
        return
    ours = KVJAX_FILE in names
    weights = any(_OURS.fullmatch(name) and name != "config.json" for name in names)
    if not ours and not weights:
        raise CheckpointError(f"{path} is not empty and holds no checkpoint; choose another directory")
    allowed = {*SIDECARS, TEMPLATE_FOLDER, *([KVJAX_FILE, PARAMS_FOLDER] if ours else [])}
    foreign = [name for name in names if name not in allowed and not _OURS.fullmatch(name)]
    foreign += [file.name for file in (path / TEMPLATE_FOLDER).glob("*") if file.suffix != ".jinja"]
    if foreign:
        raise CheckpointError(
            f"{path} holds {foreign[0]!r}, which is no part of a checkpoint and would be lost; "
            "move it away, or choose another directory"
        )

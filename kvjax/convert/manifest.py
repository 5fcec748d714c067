"""What the files of a finished checkpoint were, so that damage is noticed before anything is read from it."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path


def write_manifest(folder: Path, manifest: Path) -> None:
    """Writes size and SHA-256 of every file under `folder` to `manifest`, in one move."""
    files = {str(file.relative_to(folder)): [file.stat().st_size, _digest(file)] for file in _files(folder)}
    manifest.parent.mkdir(parents=True, exist_ok=True)
    part = manifest.with_name(manifest.name + ".part")
    part.write_text(json.dumps({"files": files}, indent=1) + "\n")
    os.replace(part, manifest)


def damage(folder: Path, manifest: Path) -> str | None:
    """What is wrong with `folder`, or None where all is as `write_manifest` found it; reads every byte."""
    try:
        files = json.loads(manifest.read_text())["files"]
        for name, (size, digest) in files.items():
            file = folder / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != size:
                return f"{name} has {file.stat().st_size} bytes instead of {size}"
            if _digest(file) != digest:
                return f"{name} has other content than was written"
    except FileNotFoundError:
        return "it was never finished"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"its list of files cannot be read ({error})"
    return None


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()

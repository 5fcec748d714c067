"""`generation_config.json`: the end-of-text tokens that generation uses."""

from __future__ import annotations

import dataclasses
import json

from kvjax.config import ModelConfig
from kvjax.convert.directory import GENERATION_FILE
from kvjax.convert.hf_fields import Fields, parse_json

Files = tuple[tuple[str, bytes], ...]


def with_generation_config(config: ModelConfig, files: Files, source: str) -> ModelConfig:
    """`config` with the end-of-text tokens of `generation_config.json`, which replace those of `config.json`."""
    content = dict(files).get(GENERATION_FILE)
    if content is None:
        return config
    table = parse_json(content, f"{source}/{GENERATION_FILE}")
    if table.get("eos_token_id") is None:
        return config
    ids = Fields(table, f"{source}/{GENERATION_FILE}").token_ids("eos_token_id", ())
    return dataclasses.replace(config, eos_token_ids=ids)


def agreeing(files: Files, config: ModelConfig) -> Files:
    """`files`, its `generation_config.json` changed only if it contradicts the config's end-of-text tokens."""
    content = dict(files).get(GENERATION_FILE)
    if content is None or with_generation_config(config, files, "Model.files") == config:
        return files
    table = {**parse_json(content, GENERATION_FILE), "eos_token_id": list(config.eos_token_ids)}
    changed = json.dumps(table, indent=2).encode("utf-8")
    return tuple((name, changed if name == GENERATION_FILE else old) for name, old in files)

"""`generation_config.json`: the tokens that begin and end a text, and how its authors draw one."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from kvjax.config import ModelConfig, Sampling
from kvjax.convert.directory import GENERATION_FILE
from kvjax.convert.hf_fields import Fields, parse_json
from kvjax.errors import CheckpointError, ConfigError
from kvjax.model import Model

Files = tuple[tuple[str, bytes], ...]

TOP_K = 50
"""What `transformers` takes for a top_k that is not there."""


def with_generation_config(config: ModelConfig, files: Files, source: str) -> ModelConfig:
    """`config` with the begin and end tokens of `generation_config.json`, which go before those of `config.json`.

    Chat models name the token that ends a turn there, beside the one that ends a text.
    """
    fields = _fields(files, f"{source}/{GENERATION_FILE}")
    ends = fields.table.get("eos_token_id") is not None
    begin = fields.token_ids("bos_token_id", ())
    if len(begin) > 1:
        raise fields.wrong("bos_token_id", "one token id or null")
    return dataclasses.replace(
        config,
        eos_token_ids=fields.token_ids("eos_token_id", ()) if ends else config.eos_token_ids,
        bos_token_id=begin[0] if begin else config.bos_token_id,
    )


def agreeing(files: Files, config: ModelConfig) -> Files:
    """`files`, its `generation_config.json` changed only where it contradicts the config's begin and end tokens."""
    if GENERATION_FILE not in dict(files):
        return files
    read = with_generation_config(config, files, "Model.files")
    changes: dict[str, Any] = {}
    if read.eos_token_ids != config.eos_token_ids:
        changes["eos_token_id"] = list(config.eos_token_ids)
    if read.bos_token_id != config.bos_token_id:
        changes["bos_token_id"] = config.bos_token_id
    if not changes:
        return files
    table = {**_fields(files, GENERATION_FILE).table, **changes}
    changed = json.dumps(table, indent=2).encode("utf-8")
    return tuple((name, changed if name == GENERATION_FILE else old) for name, old in files)


def sampling_defaults(model: Model) -> Sampling:
    """How a model's authors draw its tokens, by its `generation_config.json`; greedy where there is none.

    Read as `transformers` reads it: `temperature`, `top_k` (50 if absent), `top_p` and `min_p` count only with
    `"do_sample": true`, else the likeliest token is taken, or a beam search made where `num_beams` asks for one;
    `repetition_penalty` and `stop_strings` count always. End tokens are in `model.config.eos_token_ids` and end every
    generation; the file's other fields are not used. `dataclasses.replace` changes what you want otherwise.

    Raises:
      CheckpointError: a field's value is not allowed, or the file asks for sampled beams, which kvjax does not do.
    """
    fields = _fields(model.files, GENERATION_FILE)
    draws, beams = fields.flag("do_sample"), fields.integer("num_beams", 1)
    if draws and beams > 1:
        raise fields.wrong("num_beams", "1 where do_sample is true: kvjax does not sample beams")
    values: dict[str, Any] = {"repetition_penalty": _number(fields, "repetition_penalty", 1.0), "stop": _stop(fields)}
    if draws:
        values["top_k"] = fields.integer("top_k", TOP_K, least=0)
        values.update((name, _number(fields, name, 1.0)) for name in ("temperature", "top_p"))
        values["min_p"] = _number(fields, "min_p", 0.0)
    elif beams > 1:
        values |= {"beams": beams, "length_penalty": _number(fields, "length_penalty", 1.0)}
    try:
        return Sampling(**values)
    except ConfigError as error:
        raise CheckpointError(f"{GENERATION_FILE}: {error}; mend the file or make a kvjax.Sampling yourself") from error


def _fields(files: Files, source: str) -> Fields:
    """The file's fields; none if there is no file."""
    content = dict(files).get(GENERATION_FILE)
    return Fields({} if content is None else parse_json(content, source), source)


def _number(fields: Fields, name: str, default: float) -> float:
    """A number that may also be 0 or negative; `Sampling` knows which it takes."""
    value = fields.table.get(name)
    if value is not None and type(value) not in (int, float):
        raise fields.wrong(name, "a number or null")
    return default if value is None else float(value)


def _stop(fields: Fields) -> tuple[str, ...]:
    """The strings that end a text."""
    value = fields.table.get("stop_strings")
    strings = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(strings, list) or not all(isinstance(string, str) for string in strings):
        raise fields.wrong("stop_strings", "a text, a list of texts or null")
    return tuple(strings)

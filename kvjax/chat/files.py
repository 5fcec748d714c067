"""What the small files beside the weights say about chatting: the templates, and the special tokens they may write."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from tokenizers import AddedToken

from kvjax.convert.directory import CHAT_TEMPLATE_FILE, TEMPLATE_FOLDER
from kvjax.convert.hf_fields import parse_json
from kvjax.errors import CheckpointError

Files = tuple[tuple[str, bytes], ...]

TOKENIZER_CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS = "special_tokens_map.json"

DEFAULT, TOOL_USE = "default", "tool_use"


class Template(NamedTuple):
    """A template's text, and where it was found."""

    text: str
    source: str


def chat_templates(files: Files) -> dict[str, Template]:
    """The templates of a model by name; a model that has but one calls it "default". Empty: it has none.

    `chat_template.jinja` and `additional_chat_templates/NAME.jinja`, where there are such files, replace all that
    `tokenizer_config.json` has.

    Raises:
      CheckpointError: a file is no text, or `chat_template` is neither a text nor a list of named ones.
    """
    found = {}
    for name, content in files:
        folder, _, file = name.rpartition("/")
        if name == CHAT_TEMPLATE_FILE or (folder == TEMPLATE_FOLDER and file.endswith(".jinja")):
            key = DEFAULT if name == CHAT_TEMPLATE_FILE else file.removesuffix(".jinja")
            found[key] = Template(_text(content, name), name)
    return found or _configured(_table(files, TOKENIZER_CONFIG).get("chat_template"))


def _configured(value: Any) -> dict[str, Template]:
    """The templates of `tokenizer_config.json`: one text, a list of {"name", "template"}, or a table by name."""
    source = f"{TOKENIZER_CONFIG}: chat_template"
    if value is None:
        return {}
    named: dict[Any, Any] = {}
    if isinstance(value, str):
        return {DEFAULT: Template(value, source)}
    if isinstance(value, dict):
        named = value
    elif isinstance(value, list) and all(isinstance(entry, dict) for entry in value):
        named = {entry.get("name"): entry.get("template") for entry in value}
    if not named or not all(isinstance(part, str) for entry in named.items() for part in entry):
        raise CheckpointError(
            f'{source} must be a text or a list of {{"name": ..., "template": ...}}, got {value!r:.80}; '
            "copy the file again"
        )
    return {name: Template(text, f"{source} {name!r}") for name, text in named.items()}


def special_tokens(files: Files) -> dict[str, str]:
    """The named special tokens, as templates see them: {"bos_token": "<s>", ...}, and names a model adds of its own."""
    table = _token_table(files)
    named = {name: value for name, value in table.items() if name.endswith("_token")}
    extra = table.get("extra_special_tokens")
    if isinstance(extra, dict):
        named |= extra
    contents = {name: _content(value) for name, value in named.items()}
    return {name: content for name, content in contents.items() if content is not None}


def expected_tokens(files: Files) -> Iterator[AddedToken]:
    """The tokens that the files name and that must not be split, in the order of their ids where these are given.

    `tokenizer.json` may leave them to other files.
    """
    table = _token_table(files)
    added = table.get("added_tokens_decoder")
    by_id = sorted(added.items(), key=lambda item: item[0].zfill(20)) if isinstance(added, dict) else []
    for _, value in by_id:
        if isinstance(value, dict) and isinstance(value.get("content"), str):
            flags = {name: value.get(name) for name in ("single_word", "lstrip", "rstrip", "normalized", "special")}
            yield AddedToken(value["content"], **{name: flag for name, flag in flags.items() if isinstance(flag, bool)})
    lists = (table.get(name) for name in ("extra_special_tokens", "additional_special_tokens"))
    listed = [value for values in lists if isinstance(values, list) for value in values]
    for value in [*special_tokens(files).values(), *listed]:
        content = _content(value)
        if content is not None:
            yield AddedToken(content, special=True)


def _token_table(files: Files) -> dict[str, Any]:
    """`tokenizer_config.json`, under `special_tokens_map.json` where it is of the time when that file still counted."""
    table = _table(files, TOKENIZER_CONFIG)
    return table if "added_tokens_decoder" in table else {**table, **_table(files, SPECIAL_TOKENS)}


def _content(token: Any) -> str | None:
    """The text of a token that a file gives as text or as a table; None if it is neither."""
    content = token.get("content") if isinstance(token, Mapping) else token
    return content if isinstance(content, str) else None


def _table(files: Files, name: str) -> dict[str, Any]:
    content = dict(files).get(name)
    return {} if content is None else parse_json(content, name)


def _text(content: bytes, name: str) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{name} is not UTF-8 text: {error}; copy the file again") from error

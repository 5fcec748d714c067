"""Messages, tools and documents as callers give them: checked, and made of plain values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from kvjax.errors import RequestError

EXAMPLE = '[{"role": "user", "content": "Hello"}]'
FORMS = {
    "tools": '{"type": "function", "function": {"name": ..., "description": ..., "parameters": ...}}',
    "documents": '{"title": ..., "text": ...}',
}
REASONING = ("reasoning_content", "thinking", "reasoning")
"""Fields under which callers pass what a model thought; the first is what most templates read, the second gpt-oss'."""


def conversation(messages: Any) -> list[dict[str, Any]]:
    """The messages, checked, as plain dicts."""
    if not isinstance(messages, list | tuple):
        raise RequestError(f"messages must be a list of dicts such as {EXAMPLE}, got {messages!r:.80}")
    if not messages:
        raise RequestError(f"messages is empty; give at least one, such as {EXAMPLE}")
    return [_message(message, f"messages[{index}]") for index, message in enumerate(messages)]


def _message(message: Any, where: str) -> dict[str, Any]:
    """One message: a role, and something said."""
    if not isinstance(message, Mapping):
        more = "; give one conversation at a time" if isinstance(message, list | tuple) else ""
        raise RequestError(f"{where} must be a dict as in {EXAMPLE}, got {message!r:.80}{more}")
    # Other interfaces write None for what is not there; most templates would print it.
    fields = plain({name: value for name, value in message.items() if value is not None}, where)
    role, content = fields.get("role"), fields.get("content")
    if not isinstance(role, str) or not role:
        raise RequestError(
            f'{where} needs a "role", a text such as "system", "user" or "assistant"; got {message!r:.80}'
        )
    if not isinstance(content, str | list | tuple | dict | None):
        raise RequestError(f'{where}["content"] must be a text or a list of parts, got {content!r:.80}; make it a text')
    if content is None and not fields.keys() - {"role", "name"}:
        raise RequestError(f'{where} needs "content", a text or a list of parts; got {message!r:.80}')
    reasoning = next((fields[name] for name in REASONING if name in fields), None)
    if reasoning is None:
        return fields
    return {"thinking": reasoning, **fields, "reasoning_content": reasoning}


def tables(values: Any, name: str) -> list[dict[str, Any]] | None:
    """Tools or documents, checked."""
    if values is None:
        return None
    if not isinstance(values, list | tuple):
        raise RequestError(f"{name} must be a list of dicts or None, got {values!r:.80}")
    for index, value in enumerate(values):
        if not isinstance(value, Mapping):
            raise RequestError(f"{name}[{index}] must be a dict such as {FORMS[name]}, got {value!r:.80}")
    return [plain(value, f"{name}[{index}]") for index, value in enumerate(values)]


def plain(value: Any, where: str, depth: int = 0) -> Any:
    """A copy made of Python's own types alone: objects with other methods would open the sandbox to templates."""
    if depth > 100:
        raise RequestError(f"{where:.40} is nested more than 100 deep; it perhaps contains itself")
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, str):  # of another class, such as an enum's
        return str.__str__(value)
    if isinstance(value, int | float):
        return int(value) if isinstance(value, int) else float(value)
    if isinstance(value, np.generic):
        return plain(value.item(), where, depth + 1)
    if isinstance(value, Mapping):
        return {
            plain(key, f"{where}: a key", depth + 1): plain(item, f"{where}[{key!r:.40}]", depth + 1)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        items = [plain(item, f"{where}[{index}]", depth + 1) for index, item in enumerate(value)]
        return tuple(items) if isinstance(value, tuple) else items
    raise RequestError(
        f"{where} is a {type(value).__name__}; chat templates are given texts, numbers, True, False, None, and lists "
        "and dicts of these"
    )

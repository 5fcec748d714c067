"""Chat templates as programs: Jinja text, compiled and run in a sandbox.

The environment is the one chat templates are written for (that of `transformers`' `apply_chat_template`): blocks take
the line break after them and the blanks before them along, `tojson` escapes nothing, `{% break %}`, `{% continue %}`
and `{% generation %}` exist, and so do the functions `raise_exception` and `strftime_now`.
"""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from kvjax.errors import RequestError


def render(text: str, variables: Mapping[str, Any], source: str, bad_template: type[Exception]) -> str:
    """The text that a template makes of its variables.

    Args:
      text: the template. Compiled ones are kept, so that a conversation's next turn compiles nothing.
      variables: plain values; anything with methods of its own would open the sandbox.
      source: where the template comes from, for errors.
      bad_template: raised where the template itself is wrong.

    Raises:
      RequestError: the template refuses the variables, or fails on them.
    """
    try:
        template = _compiled(text)
    except Exception as error:  # beside its own errors, Jinja lets through those of Python's compiler
        line = getattr(error, "lineno", None)
        place = source if line is None else f"{source}, line {line}"
        raise bad_template(
            f"{place}: not a valid chat template: {_said(error)}; mend it, or give another as chat_template="
        ) from error
    try:
        return template.render(variables)
    except Refusal as error:
        raise RequestError(
            f"the chat template ({source}) refuses these messages: {error}; change them as it says"
        ) from error
    except SecurityError as error:
        raise bad_template(
            f"{source}: the chat template does what templates may not: {_said(error)}; "
            "mend it, or give another as chat_template="
        ) from error
    except Exception as error:  # a template can fail in any way that Python can
        raise RequestError(
            f"the chat template ({source}) fails on these messages: {_said(error)}; "
            "give the fields and variables it reads, in the form its authors describe"
        ) from error


class Refusal(jinja2.TemplateError):
    """What a template's own `raise_exception` raises."""


def _said(error: Exception) -> str:
    """An error's kind and first line."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


@functools.lru_cache(maxsize=32)
def _compiled(text: str) -> jinja2.Template:
    return _environment().from_string(text)


@functools.cache
def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals.update(raise_exception=_refuse, strftime_now=_strftime_now, dict=_Dict(), namespace=_Namespace)
    return environment


class _Generation(Extension):
    """`{% generation %}` marks what the assistant wrote, for those who train on it alone; here it renders as it is."""

    tags = {"generation"}  # noqa: RUF012  # Jinja reads it from the class

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        # A call block, so that what is set within stays within.
        return nodes.CallBlock(self.call_method("_whole"), [], [], body).set_lineno(line)

    def _whole(self, caller: Callable[[], str]) -> str:
        return caller()


class _Dict:
    """`dict(...)` for templates, without the type and what can be reached from it."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, keys: Any, value: Any = None) -> dict[Any, Any]:
        return dict.fromkeys(keys, value)


class _Namespace(Namespace):
    """`namespace(...)` for templates, without attributes that Python itself might look up."""

    def __init__(self, /, *args: Any, **kwargs: Any) -> None:
        attributes = dict(*args, **kwargs)
        for name in attributes:
            _check_public(name)
        super().__init__(attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_public(name)
        super().__setitem__(name, value)


def _check_public(name: Any) -> None:
    if str(name).startswith("_"):
        raise SecurityError(f"a namespace may not have the attribute {name!r}: it begins with an underscore")


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes <, >, & and ', which models have never seen escaped.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: Any) -> NoReturn:
    raise Refusal(str(message))


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)

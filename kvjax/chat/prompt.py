"""`chat_prompt` and `render_chat`: from messages to a prompt, in the form the model was trained on."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import AddedToken, Tokenizer

from kvjax.chat.files import DEFAULT, TOOL_USE, Template, chat_templates, expected_tokens, special_tokens
from kvjax.chat.messages import conversation, plain, tables
from kvjax.chat.template import render
from kvjax.errors import CheckpointError, RequestError
from kvjax.model import Model

GIVEN = "chat_template="
"""Where a template comes from that is none of the model's."""


def chat_prompt(
    model: Model,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = True,
    tools: Sequence[Mapping[str, Any]] | None = None,
    documents: Sequence[Mapping[str, Any]] | None = None,
    chat_template: str | None = None,
    **variables: Any,
) -> list[int]:
    """Token ids of a conversation, ready for `kvjax.generate(model, [ids])`.

    Special tokens that the template writes are encoded as such, and the tokenizer adds none of its own: a template that
    begins with a beginning-of-text token gives exactly one. Special tokens spelt out in a message are special too;
    remove them from texts you do not trust.

    Args:
      messages: see `render_chat`, as for all other arguments.

    Raises:
      RequestError: the model has no tokenizer, the prompt is empty, or `render_chat` raises it.
      CheckpointError: the tokenizer gives ids outside the model's vocabulary, or `render_chat` raises it.
    """
    if model.tokenizer is None:
        raise RequestError(
            "chat_prompt needs a tokenizer, and the model has none (no tokenizer.json beside its weights); add one to "
            "the directory, or tokenise the text of kvjax.render_chat yourself and give kvjax.generate token ids"
        )
    text = render_chat(
        model,
        messages,
        add_generation_prompt=add_generation_prompt,
        tools=tools,
        documents=documents,
        chat_template=chat_template,
        **variables,
    )
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RequestError(f"the messages hold half of a character (a lone surrogate): {error}; remove it") from error
    tokenizer = _faithful(model.tokenizer, _missing(model))
    ids = [int(token) for token in tokenizer.encode(text, add_special_tokens=False).ids]
    if not ids:
        raise RequestError("the chat template makes an empty prompt of these messages; give one that has content")
    if max(ids) >= model.config.vocab_size:
        token = tokenizer.id_to_token(max(ids))
        raise CheckpointError(
            f"the tokenizer has {token!r} as id {max(ids)}, the model's vocabulary only ids 0 to "
            f"{model.config.vocab_size - 1}; use the tokenizer files that belong to these weights"
        )
    return ids


def render_chat(
    model: Model,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = True,
    tools: Sequence[Mapping[str, Any]] | None = None,
    documents: Sequence[Mapping[str, Any]] | None = None,
    chat_template: str | None = None,
    **variables: Any,
) -> str:
    """The text of a conversation, by the template among the files that the model was loaded with.

    Equal to what `transformers`' `apply_chat_template(..., tokenize=False)` gives. Do not pass it to `kvjax.generate`
    as a text: the tokenizer might add special tokens to those the template wrote. `chat_prompt` does it right.

    Args:
      messages: one conversation: dicts with "role" and "content", and what else the template reads ("tool_calls",
        "name", "reasoning_content", ...). Content is a text or a list of parts; it may be missing where a message has
        something else, such as tool calls. Fields that are None count as missing.
      add_generation_prompt: end with the beginning of an answer.
      tools: JSON schemas of functions that the model may call.
      documents: dicts, for templates that know them.
      chat_template: the name of one of the model's templates, or a template's own text. None: "tool_use" where tools
        are given and there is one, else "default".
      variables: what else the template reads, such as `enable_thinking=False`; they go before special tokens of the
        same name (`bos_token`, `eos_token`, ...).

    Raises:
      RequestError: no such template, messages of another form, or messages that the template refuses or fails on.
      CheckpointError: the model's template or one of its files is not valid.
    """
    if not isinstance(add_generation_prompt, bool):
        raise RequestError(f"add_generation_prompt must be True or False, got {add_generation_prompt!r:.80}")
    template = _choose(chat_templates(model.files), chat_template, tools is not None)
    given = {
        **special_tokens(model.files),
        **{name: plain(value, name) for name, value in variables.items()},
        "messages": conversation(messages),
        "tools": tables(tools, "tools"),
        "documents": tables(documents, "documents"),
        "add_generation_prompt": add_generation_prompt,
    }
    return render(template.text, given, template.source, RequestError if template.source == GIVEN else CheckpointError)


def _choose(templates: dict[str, Template], wanted: str | None, tools: bool) -> Template:
    """The template to use."""
    names = ", ".join(map(repr, sorted(templates))) or "none"
    if wanted is None:
        if not templates:
            raise RequestError(
                "the model has no chat template: neither chat_template.jinja nor a chat_template in "
                "tokenizer_config.json; it was perhaps not trained to chat. Give a template's text as chat_template=, "
                "or a prompt as text to kvjax.generate"
            )
        name = TOOL_USE if tools and TOOL_USE in templates else DEFAULT
        if name not in templates:
            raise RequestError(f"the model has several chat templates and none is the default; name one: {names}")
        return templates[name]
    if not isinstance(wanted, str):
        raise RequestError(f"chat_template must be a template's name or text, got {wanted!r:.80}")
    if wanted in templates:
        return templates[wanted]
    if "{{" in wanted or "{%" in wanted:
        return Template(wanted, GIVEN)
    raise RequestError(
        f"there is no chat template {wanted!r:.80}; the model's are: {names}. Name one of these, or give a template's "
        "own text, which has {{ or {% in it"
    )


def _missing(model: Model) -> tuple[AddedToken, ...]:
    """Tokens that the files name and that the tokenizer would split."""
    known = {token.content for token in model.tokenizer.get_added_tokens_decoder().values()}
    missing: dict[str, AddedToken] = {}
    for token in expected_tokens(model.files):
        if token.content not in known:
            missing.setdefault(token.content, token)
    return tuple(missing.values())


def _faithful(tokenizer: Tokenizer, missing: tuple[AddedToken, ...]) -> Tokenizer:
    """The tokenizer, or a copy of it, that neither cuts nor pads nor splits special tokens."""
    if missing or tokenizer.truncation or tokenizer.padding or tokenizer.encode_special_tokens:
        return _mended(tokenizer, missing)
    return tokenizer


@functools.lru_cache(maxsize=4)
def _mended(tokenizer: Tokenizer, missing: tuple[AddedToken, ...]) -> Tokenizer:
    whole = copy.deepcopy(tokenizer)
    whole.no_truncation()
    whole.no_padding()
    whole.encode_special_tokens = False
    for token in missing:  # one by one: a token that is new takes the next free id
        (whole.add_special_tokens if token.special else whole.add_tokens)([token])
    return whole

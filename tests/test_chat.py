"""Chat templates and generation settings: what a published directory's small files say is what kvjax does."""

from __future__ import annotations

import dataclasses
import enum
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax.convert.generation import with_generation_config
from kvjax.errors import CheckpointError, RequestError
from tests.chat_templates import (
    BOS_ID,
    CHATML,
    FEATURES,
    GEMMA,
    LLAMA3,
    MISTRAL,
    VOCABULARY_SIZE,
    byte_tokenizer,
)
from tests.convert.directories import write_directory

TOKENIZER_CONFIG = {"bos_token": "<|bos|>", "eos_token": "<|eos|>", "image_token": "<|image|>", "unk_token": None}
CONFIG = kvjax.ModelConfig(
    vocab_size=VOCABULARY_SIZE, hidden_size=16, intermediate_size=16, num_layers=2, num_heads=2, num_kv_heads=1
)

Messages = list[dict[str, Any]]
HELLO: Messages = [{"role": "user", "content": "Hi"}]
TALK: Messages = [
    {"role": "system", "content": " Be brief. "},
    {"role": "user", "content": "2 + 2?\n"},
    {"role": "assistant", "content": "4, é ☃"},
    {"role": "user", "content": "<b>&'\"{{ 1 }}</b>"},
]
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Says how it is <outside>",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
CALLS: Messages = [
    {"role": "user", "content": "How is Rome?"},
    {
        "role": "assistant",
        "content": None,
        "reasoning": "\nLook outside.\n",
        "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Róma"}}}],
    },
    {"role": "tool", "name": "weather", "content": {"degrees": 31.5, "rain": False}},
]


def files_of(**files: Any) -> tuple[tuple[str, bytes], ...]:
    """Side files by name, "__" standing for the dot; dicts and lists become JSON."""
    raw = {
        name.replace("__", "."): value if isinstance(value, str | bytes) else json.dumps(value)
        for name, value in files.items()
    }
    return tuple((name, value if isinstance(value, bytes) else value.encode()) for name, value in raw.items())


def model_of(template: str | None = None, **files: Any) -> kvjax.Model:
    """A model that can tokenise and do nothing else: chatting needs no weights."""
    files = {"tokenizer_config__json": TOKENIZER_CONFIG, **files}
    if template is not None:
        files["chat_template__jinja"] = template
    return kvjax.Model(CONFIG, {}, byte_tokenizer(), files_of(**files))


# What is written, by hand.
EXPECTED = {
    "llama3": (
        LLAMA3,
        TALK,
        "<|bos|><|start_header_id|>system<|end_header_id|>\n\nToday Date: 26 Jul 2024\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n2 + 2?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n4, é ☃<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n<b>&'\"{{ 1 }}</b><|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    "chatml": (
        CHATML,
        TALK,
        "<|im_start|>system\nBe brief. <|im_end|>\n<|im_start|>user\n2 + 2?\n<|im_end|>\n"
        "<|im_start|>assistant\n4, é ☃<|im_end|>\n<|im_start|>user\n<b>&'\"{{ 1 }}</b><|im_end|>\n"
        "<|im_start|>assistant\n",
    ),
    "mistral": (
        MISTRAL,
        TALK,
        "<|bos|>[INST] 2 + 2?\n[/INST] 4, é ☃<|eos|>[INST]  Be brief. \n\n<b>&'\"{{ 1 }}</b>[/INST]",
    ),
    "gemma": (
        GEMMA,
        TALK[1:],
        "<|bos|><start_of_turn>user\n2 + 2?<end_of_turn>\n<start_of_turn>model\n4, é ☃<end_of_turn>\n"
        "<start_of_turn>user\n<b>&'\"{{ 1 }}</b><end_of_turn>\n<start_of_turn>model\n",
    ),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_published_styles_are_rendered_as_their_authors_mean_them(name: str) -> None:
    template, messages, expected = EXPECTED[name]
    assert kvjax.render_chat(model_of(template), messages) == expected


def test_tools_and_tool_calls_reach_the_template_as_unescaped_json() -> None:
    text = kvjax.render_chat(model_of(LLAMA3), CALLS, tools=[TOOL])
    assert json.dumps(TOOL, indent=4) in text
    assert '{"name": "weather", "parameters": {"city": "Róma"}}<|eot_id|>' in text
    assert text.endswith(
        '<|start_header_id|>ipython<|end_header_id|>\n\n{"degrees": 31.5, "rain": false}<|eot_id|>'
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )


def test_generation_prompt_variables_and_documents_reach_the_template() -> None:
    model = model_of(CHATML)
    assert kvjax.render_chat(model, HELLO, add_generation_prompt=False) == "<|im_start|>user\nHi<|im_end|>\n"
    assert kvjax.render_chat(model, HELLO, enable_thinking=False).endswith("assistant\n<think>\n\n</think>\n\n")
    assert "Today Date: May 1\n" in kvjax.render_chat(model_of(LLAMA3), HELLO, date_string="May 1")
    given = kvjax.render_chat(model_of("{{ documents[0].text ~ bos_token }}"), HELLO, documents=[{"text": "x"}])
    assert given == "x<|bos|>"
    assert kvjax.render_chat(model_of("{{ bos_token }}"), HELLO, bos_token="<other>") == "<other>"


# A template, messages, and what else is given: where transformers is installed it is the judge.
CASES: dict[str, tuple[str, Messages, dict[str, Any]]] = {
    **{name: (template, messages, {}) for name, (template, messages, _) in EXPECTED.items()},
    "llama3, tools": (LLAMA3, CALLS, {"tools": [TOOL, TOOL], "date_string": "1 Jan 2026"}),
    "llama3, empty tools": (LLAMA3, HELLO, {"tools": []}),
    "chatml, tools": (CHATML, CALLS[:2], {"tools": [TOOL]}),
    "chatml, thinking off": (CHATML, HELLO, {"enable_thinking": False}),
    "features": (
        FEATURES,
        [{"role": "comment", "content": "no"}, *TALK, {"role": "end", "content": ""}, *HELLO],
        {"documents": [{"title": "é", "text": "t"}, {"title": "2", "a": None}]},
    ),
    "parts": (
        "{% for m in messages %}{% for part in m.content %}{{ part.text }}|{% endfor %}{% endfor %}",
        [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}],
        {},
    ),
    "reasoning by its other names": (
        "{% for m in messages %}{{ m.reasoning_content }},{{ m.thinking }},{{ m.reasoning }};{% endfor %}",
        [{"role": "assistant", "content": "", name: name} for name in ("reasoning_content", "thinking", "reasoning")],
        {},
    ),
    "fields that are None": ("{{ messages[0] | tojson }}", [{"role": "user", "content": "", "name": None}], {}),
    "special tokens in a message": (CHATML, [{"role": "user", "content": "<|im_end|><|eos|>"}], {}),
    "special tokens of the caller": (GEMMA, HELLO, {"bos_token": "<|eos|>"}),
}


@pytest.mark.parametrize("name", CASES)
def test_text_and_tokens_equal_transformers(name: str, tmp_path: Path) -> None:
    theirs = transformers_tokenizer(tmp_path, model := model_of(CASES[name][0]))
    _, messages, given = CASES[name]
    for prompt in (True, False):
        wanted = {**given, "add_generation_prompt": prompt}
        text = theirs.apply_chat_template(messages, tokenize=False, **wanted)
        assert kvjax.render_chat(model, messages, **wanted) == text
        ids = theirs.apply_chat_template(messages, tokenize=True, return_dict=False, **wanted)
        assert kvjax.chat_prompt(model, messages, **wanted) == ids


def transformers_tokenizer(path: Path, model: kvjax.Model) -> Any:
    """transformers' tokenizer of the model's files, less weights."""
    transformers = pytest.importorskip("transformers")
    for name, content in model.files:
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_bytes(content)
    model.tokenizer.save(str(path / "tokenizer.json"))
    return transformers.PreTrainedTokenizerFast.from_pretrained(path)


# Files that give one conversation different texts, by where the template and the special tokens come from.
WHERE: dict[str, dict[str, Any]] = {
    "jinja file": {"chat_template__jinja": "J {{ bos_token }}"},
    "config": {"tokenizer_config__json": {**TOKENIZER_CONFIG, "chat_template": "C {{ bos_token }}"}},
    "jinja file before config": {
        "chat_template__jinja": "J",
        "tokenizer_config__json": {**TOKENIZER_CONFIG, "chat_template": "C"},
    },
    "named, tools": {
        "tokenizer_config__json": {
            "chat_template": [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]
        }
    },
    "further files": {
        "chat_template__jinja": "J",
        "additional_chat_templates/tool_use__jinja": "T",
        "tokenizer_config__json": {"chat_template": "C"},
    },
    "special_tokens_map": {
        "chat_template__jinja": "{{ bos_token }}{{ eos_token }}{{ extra_token }}",
        "tokenizer_config__json": {"eos_token": "<|eos|>", "bos_token": "old"},
        "special_tokens_map__json": {"bos_token": {"content": "<|bos|>", "lstrip": False}},
    },
    "special_tokens_map is of old": {
        "chat_template__jinja": "{{ bos_token }}",
        "tokenizer_config__json": {"bos_token": "<|eos|>", "added_tokens_decoder": {}},
        "special_tokens_map__json": {"bos_token": "<|bos|>"},
    },
    "tokens as tables": {
        "chat_template__jinja": "{{ bos_token }}{{ image_token }}{{ audio }}",
        "tokenizer_config__json": {
            "bos_token": {"__type": "AddedToken", "content": "<|bos|>", "special": True},
            "extra_special_tokens": {"audio": "<|image|>"},
            "image_token": "<|image|>",
            "add_bos_token": True,
        },
    },
    "tokens that tokenizer.json does not have": {
        "chat_template__jinja": "{{ bos_token }}Hi<wave><|new|><|listed|>",
        "tokenizer_config__json": {
            "bos_token": "<|begin|>",
            "extra_special_tokens": ["<|listed|>"],
            "added_tokens_decoder": {
                str(VOCABULARY_SIZE): {"content": "<|new|>", "special": True, "normalized": False},
                str(VOCABULARY_SIZE + 1): {"content": "<wave>", "special": False, "rstrip": True, "lstrip": False},
            },
        },
    },
}  # fmt: skip


@pytest.mark.parametrize("name", WHERE)
@pytest.mark.parametrize("tools", [None, [TOOL]], ids=["", "tools"])
def test_files_are_searched_in_the_order_of_transformers(name: str, tools: Any, tmp_path: Path) -> None:
    model = model_of(**WHERE[name])
    # Tokens that only other files have get the next free ids: the vocabulary must have room.
    model = dataclasses.replace(model, config=dataclasses.replace(CONFIG, vocab_size=VOCABULARY_SIZE + 8))
    theirs = transformers_tokenizer(tmp_path, model)
    text = theirs.apply_chat_template(HELLO, tokenize=False, tools=tools)
    assert kvjax.render_chat(model, HELLO, tools=tools) == text
    ids = theirs(text, add_special_tokens=False).input_ids
    assert kvjax.chat_prompt(model, HELLO, tools=tools) == ids


def test_templates_are_chosen_by_tools_and_by_name() -> None:
    model = model_of(**WHERE["named, tools"])
    assert kvjax.render_chat(model, HELLO) == "D"
    assert kvjax.render_chat(model, HELLO, tools=[TOOL]) == "T"
    assert kvjax.render_chat(model, HELLO, tools=[TOOL], chat_template="default") == "D"
    assert kvjax.render_chat(model, HELLO, chat_template="mine: {{ messages[0].content }}") == "mine: Hi"


def test_special_tokens_are_one_token_each_and_never_doubled() -> None:
    model = model_of(GEMMA)
    ids = kvjax.chat_prompt(model, HELLO)
    assert [ids.count(BOS_ID), ids[0]] == [1, BOS_ID]
    # The tokenizer itself would add one, which is why the rendered text must not go through it.
    assert list(model.tokenizer.encode(kvjax.render_chat(model, HELLO)).ids[:2]) == [BOS_ID, BOS_ID]
    names = [model.tokenizer.id_to_token(token) for token in ids]
    assert names == ["<|bos|>", "<start_of_turn>", *"userĊHi", "<end_of_turn>", "Ċ", "<start_of_turn>", *"modelĊ"]
    assert BOS_ID not in kvjax.chat_prompt(model_of(CHATML), HELLO)


def test_a_tokenizer_that_cuts_and_pads_does_neither_to_a_chat() -> None:
    model = model_of(GEMMA)
    whole = kvjax.chat_prompt(model, HELLO)
    model.tokenizer.enable_truncation(4)
    assert kvjax.chat_prompt(model, HELLO) == whole
    model.tokenizer.no_truncation()
    model.tokenizer.enable_padding(length=99)
    assert kvjax.chat_prompt(model, HELLO) == whole
    assert model.tokenizer.padding["length"] == 99, "the user's own tokenizer stays as it is"


def test_messages_are_left_as_they_are_and_may_hold_numbers_of_other_kinds() -> None:
    class Role(enum.StrEnum):
        USER = "user"

    messages = [{"role": Role.USER, "content": "x", "n": np.int64(3), "flag": np.bool_(False), "pair": (1, 2)}]
    before = dict(messages[0])
    text = kvjax.render_chat(model_of("{{ messages | tojson }}"), messages)
    assert json.loads(text) == [{"role": "user", "content": "x", "n": 3, "flag": False, "pair": [1, 2]}]
    assert messages == [before]


def test_templates_survive_loading_and_saving(tmp_path: Path) -> None:
    hf = write_directory(tmp_path / "hf")
    (hf / "chat_template.jinja").write_text("J")
    (hf / "additional_chat_templates").mkdir()
    (hf / "additional_chat_templates" / "rag.jinja").write_text("R")
    model = kvjax.load(hf)
    for format in ("orbax", "safetensors"):
        kvjax.save(model, tmp_path / "again", format)
        model = kvjax.load(tmp_path / "again")
        assert kvjax.render_chat(model, HELLO) == "J"
        assert kvjax.render_chat(model, HELLO, chat_template="rag") == "R"
    (tmp_path / "again" / "additional_chat_templates" / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="notes.txt"):
        kvjax.save(model, tmp_path / "again")


@pytest.mark.parametrize(
    "messages, said",
    [
        ("Hi", "messages must be a list of dicts"),
        ([], "messages is empty"),
        (["Hi"], r"messages\[0\] must be a dict"),
        ([HELLO, HELLO], "one conversation at a time"),
        ([{"content": "Hi"}], r'messages\[0\] needs a "role"'),
        ([{"role": 3, "content": "Hi"}], 'needs a "role"'),
        ([*HELLO, {"role": "assistant"}], r'messages\[1\] needs "content"'),
        ([{"role": "user", "content": 5}], '"content"\\] must be a text'),
        ([{"role": "user", "content": "Hi", "image": object()}], r"messages\[0\]\['image'\] is a object"),
    ],
)
def test_messages_of_another_form_are_refused_by_what_is_wrong(messages: Any, said: str) -> None:
    with pytest.raises(RequestError, match=said):
        kvjax.chat_prompt(model_of(CHATML), messages)


@pytest.mark.parametrize(
    "given, said",
    [
        ({"tools": TOOL}, "tools must be a list of dicts"),
        ({"tools": [print]}, r"tools\[0\] must be a dict such as"),
        ({"documents": ["text"]}, r"documents\[0\] must be a dict such as"),
        ({"chat_template": "nope"}, "no chat template 'nope'; the model's are: 'default'"),
        ({"chat_template": 3}, "template's name or text"),
        ({"chat_template": "{% if %}"}, "chat_template=, line 1: not a valid chat template"),
        ({"chat_template": "{{ ''.__class__.mro() }}"}, "does what templates may not"),
        ({"add_generation_prompt": "yes"}, "add_generation_prompt must be True or False"),
        ({"variable": object()}, "variable is a object"),
    ],
)
def test_other_arguments_of_another_form_are_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        kvjax.chat_prompt(model_of(CHATML), HELLO, **given)


def test_what_contains_itself_is_refused() -> None:
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(RequestError, match="contains itself"):
        kvjax.render_chat(model_of(CHATML), HELLO, loop=loop)


def test_a_template_that_refuses_says_why() -> None:
    with pytest.raises(RequestError, match="refuses these messages: System role not supported"):
        kvjax.chat_prompt(model_of(GEMMA), TALK)
    with pytest.raises(RequestError, match="roles must alternate"):
        kvjax.chat_prompt(model_of(MISTRAL), HELLO * 2)
    with pytest.raises(RequestError, match="fails on these messages: UndefinedError.*'a'"):
        kvjax.chat_prompt(model_of("{{ messages[0].a.b }}"), HELLO)


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.append(1) }}",
        "{{ messages.__class__ }}{{ ''.__class__.mro() }}",
        "{% set n = namespace() %}{% set n.__call__ = 1 %}",
        "{{ namespace(_x=1) }}",
    ],
)
def test_templates_run_in_a_sandbox(template: str) -> None:
    with pytest.raises(CheckpointError, match="chat_template.jinja: the chat template does what templates may not"):
        kvjax.render_chat(model_of(template), HELLO)


@pytest.mark.parametrize(
    "files, said",
    [
        ({"chat_template__jinja": "a\n{% for %}"}, "chat_template.jinja, line 2: not a valid chat template"),
        ({"chat_template__jinja": "{{ x | nothing }}"}, "No filter named 'nothing'"),
        ({"chat_template__jinja": b"\xff"}, "chat_template.jinja is not UTF-8"),
        ({"tokenizer_config__json": "{"}, "tokenizer_config.json is not valid JSON"),
        ({"tokenizer_config__json": {"chat_template": 5}}, "must be a text or a list"),
        ({"tokenizer_config__json": {"chat_template": [{"name": "x"}]}}, "must be a text or a list"),
    ],
)
def test_damaged_files_are_named(files: dict[str, Any], said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        kvjax.chat_prompt(model_of(**files), HELLO)


def test_models_that_cannot_chat_say_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="the model has no chat template.*chat_template="):
        kvjax.chat_prompt(model_of(), HELLO)
    named = {"chat_template": [{"name": "rag", "template": "R"}, {"name": "tool_use", "template": "T"}]}
    with pytest.raises(RequestError, match="none is the default; name one: 'rag', 'tool_use'"):
        kvjax.render_chat(model_of(tokenizer_config__json=named), HELLO)
    silent = dataclasses.replace(model_of(CHATML), tokenizer=None)
    assert kvjax.render_chat(silent, HELLO)
    with pytest.raises(RequestError, match="needs a tokenizer"):
        kvjax.chat_prompt(silent, HELLO)
    small = dataclasses.replace(model_of(GEMMA), config=dataclasses.replace(CONFIG, vocab_size=257))
    with pytest.raises(CheckpointError, match="'<start_of_turn>' as id|'<end_of_turn>' as id"):
        kvjax.chat_prompt(small, HELLO)
    with pytest.raises(RequestError, match="empty prompt"):
        kvjax.chat_prompt(model_of("{% set x = 1 %}"), HELLO)
    with pytest.raises(RequestError, match="surrogate"):
        kvjax.chat_prompt(model_of(CHATML), [{"role": "user", "content": "\ud800"}])


# Generation settings.


@dataclasses.dataclass(frozen=True)
class Says:
    """Makes a model say these tokens and then the last of them for ever."""

    tokens: tuple[int, ...]

    def __call__(self, logits: jax.Array, context: kvjax.ProcessorContext) -> jax.Array:
        wanted = jnp.asarray(self.tokens)[jnp.minimum(context.step, len(self.tokens) - 1)]
        return jnp.where(jnp.arange(logits.shape[-1]) == wanted[:, None], 0.0, -jnp.inf)


def test_the_turn_ends_where_generation_config_says(tmp_path: Path) -> None:
    source = kvjax.init(dataclasses.replace(CONFIG, eos_token_ids=(257,)))
    files = files_of(tokenizer_config__json=TOKENIZER_CONFIG, chat_template__jinja=LLAMA3)
    kvjax.save(dataclasses.replace(source, tokenizer=byte_tokenizer(), files=files), tmp_path / "m", "safetensors")
    end_of_turn = byte_tokenizer().token_to_id("<|eot_id|>")
    says = Says((*byte_tokenizer().encode("Yes", add_special_tokens=False).ids, end_of_turn, 5))

    def reply(model: kvjax.Model) -> tuple[str, str]:
        prompt = kvjax.chat_prompt(model, HELLO)
        out = kvjax.generate(model, [prompt], 8, logit_processors=(says,))
        assert out.text is not None
        return out.text[0], out.finish_reason[0]

    without = kvjax.load(tmp_path / "m")
    assert reply(without) == ("Yes" + without.tokenizer.decode([5]) * 4, "length")
    # As Llama 3 publishes it: the end of a text, and the end of a turn.
    (tmp_path / "m" / "generation_config.json").write_text(json.dumps({"eos_token_id": [257, end_of_turn]}))
    model = kvjax.load(tmp_path / "m")
    assert model.config.eos_token_ids == (257, end_of_turn)
    assert reply(model) == ("Yes", "stop")


def test_generation_config_says_what_a_text_begins_with(tmp_path: Path) -> None:
    def read(table: dict[str, Any]) -> int | None:
        files = files_of(generation_config__json=table)
        return with_generation_config(dataclasses.replace(CONFIG, bos_token_id=1), files, "here").bos_token_id

    assert [read(table) for table in ({}, {"bos_token_id": None}, {"bos_token_id": 7})] == [1, 1, 7]
    with pytest.raises(CheckpointError, match="here/generation_config.json: bos_token_id must be one token id"):
        read({"bos_token_id": [1, 2]})
    hf = write_directory(tmp_path / "hf")
    (hf / "generation_config.json").write_text('{"bos_token_id": 7, "eos_token_id": 9}')
    model = kvjax.load(hf)
    config = dataclasses.replace(model.config, bos_token_id=8)
    kvjax.save(dataclasses.replace(model, config=config), tmp_path / "out", "safetensors")
    assert kvjax.load(tmp_path / "out").config.bos_token_id == 8
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert written == {"bos_token_id": 8, "eos_token_id": 9}


@pytest.mark.parametrize(
    "table, expected",
    [
        ({}, {}),
        ({"temperature": 0.6, "top_p": 0.9}, {}),
        ({"do_sample": False, "repetition_penalty": 1.1}, {"repetition_penalty": 1.1}),
        (
            {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.05},
            {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.05},
        ),
        ({"do_sample": True}, {"temperature": 1.0, "top_k": 50}),
        ({"do_sample": True, "top_k": 0, "min_p": 0.1, "top_p": None}, {"temperature": 1.0, "min_p": 0.1}),
        ({"num_beams": 3, "length_penalty": -1}, {"beams": 3, "length_penalty": -1.0}),
        ({"stop_strings": "END"}, {"stop": ("END",)}),
        ({"stop_strings": ["a", "b"], "max_length": 99}, {"stop": ("a", "b")}),
    ],
)
def test_sampling_defaults_are_those_of_generation_config(table: dict[str, Any], expected: dict[str, Any]) -> None:
    assert kvjax.sampling_defaults(model_of(generation_config__json=table)) == kvjax.Sampling(**expected)


def test_without_a_generation_config_the_default_is_greedy() -> None:
    assert kvjax.sampling_defaults(model_of()) == kvjax.Sampling()


@pytest.mark.parametrize(
    "table, said",
    [
        ({"do_sample": "yes"}, "do_sample must be true or false"),
        ({"do_sample": True, "temperature": "hot"}, "temperature must be a number"),
        ({"do_sample": True, "top_p": 0}, r"Sampling.top_p must be in \(0, 1\]"),
        ({"do_sample": True, "num_beams": 4}, "num_beams must be 1"),
        ({"stop_strings": [1]}, "stop_strings must be"),
    ],
)
def test_wrong_generation_settings_are_named(table: dict[str, Any], said: str) -> None:
    with pytest.raises(CheckpointError, match=f"generation_config.json: {said}"):
        kvjax.sampling_defaults(model_of(generation_config__json=table))

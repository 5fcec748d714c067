"""Chat templates in the styles that published models use, and the tokens they write; written for the tests."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing

# Headers around every role, the beginning-of-text token written by the template, indented JSON for tools.
LLAMA3 = r"""
{{- bos_token }}
{%- macro header(role) %}{{ "<|start_header_id|>" ~ role ~ "<|end_header_id|>\n\n" }}{% endmacro %}
{%- set today = date_string | default("26 Jul 2024") %}
{%- if messages[0].role == "system" %}
    {%- set system, messages = messages[0].content | trim, messages[1:] %}
{%- else %}
    {%- set system = "" %}
{%- endif %}
{{- header("system") ~ "Today Date: " ~ today ~ "\n\n" ~ system }}
{%- for tool in tools or [] %}
    {{- "\n" ~ tool | tojson(indent=4) }}
{%- endfor %}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if message.role == "tool" %}
        {{- header("ipython") ~ message.content | tojson }}
    {%- elif message.tool_calls is defined %}
        {%- if message.tool_calls | length > 1 %}
            {{- raise_exception("one tool call at a time, please") }}
        {%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- header("assistant") ~ '{"name": "' ~ call.name ~ '", "parameters": ' ~ call.arguments | tojson ~ "}" }}
    {%- else %}
        {{- header(message.role) ~ message.content | trim }}
    {%- endif %}
    {{- "<|eot_id|>" }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- header("assistant") }}
{%- endif %}
"""

# Blocks without dashes, so that trim_blocks and lstrip_blocks decide; tools as JSON lines; thinking and switches.
CHATML = r"""{% set ns = namespace(last=-1) %}
{% for message in messages %}
    {% if message.role == "user" %}
        {% set ns.last = loop.index0 %}
    {% endif %}
{% endfor %}
{% if tools %}
<|im_start|>system
# Tools
        {% for tool in tools %}
{{ tool | tojson }}
        {% endfor %}
<|im_end|>
{% endif %}
{% for message in messages %}
<|im_start|>{{ message["role"] }}
    {% if message.reasoning_content and loop.index0 > ns.last %}
<think>
{{ message.reasoning_content.strip("\n") }}
</think>
    {% endif %}
    {% if message.content %}
{{ message.content.split("</think>")[-1].lstrip() }}
    {%- endif %}
    {% for call in message.tool_calls %}

<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>
    {%- endfor %}
<|im_end|>
{% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
    {% if enable_thinking is defined and not enable_thinking %}
<think>

</think>

    {% endif %}
{% endif %}
"""

# Instructions between brackets, the system's text in the last of them, alternation enforced, an end token per answer.
MISTRAL = r"""
{%- set system = "" %}
{%- if messages[0]["role"] == "system" %}
    {%- set system = messages[0]["content"] + "\n\n" %}
    {%- set messages = messages[1:] %}
{%- endif %}
{{- bos_token }}
{%- for message in messages %}
    {%- if (message["role"] == "user") != (loop.index0 % 2 == 0) %}
        {{- raise_exception("After the optional system message, roles must alternate user/assistant/user/assistant") }}
    {%- endif %}
    {%- if message["role"] == "user" %}
        {{- "[INST] " + (system if loop.last else "") + message["content"] + "[/INST]" }}
    {%- else %}
        {{- " " + message["content"] | trim + eos_token }}
    {%- endif %}
{%- endfor %}
"""

# No system role, the assistant is called model, one line that does everything.
GEMMA = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)

# Everything else that the environment has: loop controls, generation blocks, dict, dates, documents, JSON's options.
FEATURES = r"""
{%- set seen = dict(a=1, b=[2]) %}
{%- for message in messages %}
    {%- if message.role == "comment" %}{% continue %}{% endif %}
    {%- if message.role == "end" %}{% break %}{% endif %}
    {%- if message.role == "assistant" %}
        {%- generation %}
            {%- set inner = "in" %}
            {{- message.content }}{{ eos_token }}
        {%- endgeneration %}
        {{- inner | default("out") }}
    {%- else %}
        {{- message.role ~ ": " ~ message.content }}
    {%- endif %}
{%- endfor %}
{{- seen | tojson(separators=(",", ":")) ~ dict.fromkeys(["k"]) | tojson ~ strftime_now("on a day") }}
{%- for document in documents or [] %}
    {{- "\n" ~ document.title ~ " " ~ document | tojson(sort_keys=true, ensure_ascii=true, indent=1) }}
{%- endfor %}
{{- "<&'é>" | tojson ~ (unk_token | default("no unk")) ~ image_token }}
"""

SPECIAL = (
    "<|bos|>", "<|eos|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|im_start|>", "<|im_end|>",
    "<start_of_turn>", "<end_of_turn>", "<|image|>",
)  # fmt: skip
PLAIN = ("<think>", "</think>", "<tool_call>", "</tool_call>")
"""Added tokens that are not special: never split, but part of the decoded text."""

BOS_ID = 256
VOCABULARY_SIZE = 256 + len(SPECIAL) + len(PLAIN)


def byte_tokenizer() -> Tokenizer:
    """256 bytes, then `SPECIAL`, then `PLAIN`; its post-processor puts `<|bos|>` before a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={byte: index for index, byte in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in PLAIN])
    tokenizer.post_processor = TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", BOS_ID)])
    return tokenizer

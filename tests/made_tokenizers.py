"""Tokenizers in Hugging Face's form, made in a moment: a byte-level BPE of 300 tokens, for chat or not."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from swarmtrain.data.tokenizer_file import TokenizerBundle, TokenizerFile

END, USER, ASSISTANT = "<|end|>", "<|user|>", "<|assistant|>"
SPECIAL = {"bos_token": END, "eos_token": END}
PLAIN = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""Template that writes a turn alike wherever it is."""
MARKED = (
    "{% for message in messages %}<|{{ message.role }}|>{% if message.role == 'assistant' %}{% generation %}"
    "{{ message.content }}{{ eos_token }}{% endgeneration %}{% else %}{{ message.content }}{{ eos_token }}{% endif %}\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""The same, which says itself what the assistant writes."""
THINKING = (
    "{% for message in messages %}<|{{ message.role }}|>{% if message.role == 'assistant' and loop.last %}"
    "<think></think>{% endif %}{{ message.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""Template that writes the last turn otherwise than the ones before."""
QWEN = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\\n\\n' }}
    {%- endif %}
    {{- "# Tools\\n\\nYou may call one or more functions.\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(found=false, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- if message.role == "user" and not ns.found %}
        {%- set ns.found = true %}
        {%- set ns.last_query_index = (messages|length - 1) - loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}
        {%- set content = message.content %}
    {%- elif message.content %}
        {%- set content = message.content | map(attribute='text') | join('') %}
    {%- else %}
        {%- set content = '' %}
    {%- endif %}
    {%- if message.role == "user" or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if message.reasoning_content is defined and loop.index0 > ns.last_query_index %}
            {{- '<think>\\n' + message.reasoning_content + '\\n</think>\\n\\n' }}
        {%- endif %}
        {{- content }}
        {%- for tool_call in message.tool_calls or [] %}
            {%- if tool_call.function %}
                {%- set tool_call = tool_call.function %}
            {%- endif %}
            {{- '\\n<tool_call>\\n{"name": "' + tool_call.name + '", "arguments": ' }}
            {{- tool_call.arguments if tool_call.arguments is string else tool_call.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + content + '\\n</tool_response><|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
"""Template with tools, in the style of Qwen and Hermes."""


@functools.cache
def tokenizer_json() -> str:
    """Return a `tokenizer.json` of a byte-level BPE with three special tokens."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[END, USER, ASSISTANT],
        show_progress=False,
    )
    made.train_from_iterator(
        ["how are you today, my friend? the answer is that all is well and the sun shines"], trainer
    )
    text: str = made.to_str()
    return text


def changed(**parts: Any) -> str:
    """Return the same file with other parts."""
    return json.dumps({**json.loads(tokenizer_json()), **parts})


def bundle(template: str = PLAIN) -> TokenizerBundle:
    """Return the tokenizer with a chat template."""
    return TokenizerBundle(tokenizer_json(), SPECIAL, template)


def made_tokenizer(template: str = PLAIN) -> TokenizerFile:
    """Build the tokenizer with a chat template."""
    return TokenizerFile(bundle(template))


def write_tokenizer(folder: Path, template: str = PLAIN) -> Path:
    """Write its files, as `save_pretrained` does, and return the path of its tokenizer.json."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in bundle(template).files(64).items():
        (folder / name).write_bytes(data)
    return folder / "tokenizer.json"

"""Conversations with tools: the text that is trained on is what transformers writes for the row, byte for byte."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from codes import raises_code
from made_tokenizers import QWEN, SPECIAL, made_tokenizer, tokenizer_json
from tokenizers import Tokenizer

from swarmtrain.data.document_encoder import DocumentEncoder
from swarmtrain.data.documents import read_documents
from swarmtrain.data.held_out import learnt_text
from swarmtrain.data.overlap import HeldOutIndex
from swarmtrain.data.tokenizer_file import TokenizerFile
from swarmtrain.errors import RunFileError
from swarmtrain.run_data import DataSection

LLAMA = """\
{{- bos_token }}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}
{%- if messages and messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}
    {{- "Environment: ipython\\n" }}
{%- endif %}
{{- "Today Date: " + "26 Jul 2024" + "\\n\\n" + system_message + "<|eot_id|>" }}
{%- if tools is not none and messages %}
    {{- '<|start_header_id|>user<|end_header_id|>\\n\\nGiven these functions:\\n\\n' }}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
{%- endif %}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
        {%- if message['content'] is string %}{{- message['content'] | trim + '<|eot_id|>' }}
        {%- else %}{%- for part in message['content'] or [] %}{{- part['text'] | trim }}{%- endfor %}{{- '<|eot_id|>' }}
        {%- endif %}
    {%- elif 'tool_calls' in message %}
        {%- if message.tool_calls | length != 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
        {{- '{"name": "' + call.name + '", "parameters": ' }}
        {{- call.arguments | tojson }}
        {{- "}<|eot_id|>" }}
    {%- else %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
"""In the style of Llama 3."""

MISTRAL = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if message.role == "user" %}
        {%- if tools is not none and loop.index0 == 0 %}
            {{- "[AVAILABLE_TOOLS] [" }}
            {%- for tool in tools %}
                {{- '{"type": "function", "function": {' }}
                {%- for key, val in tool.function.items() if key != "return" %}
                    {{- '"' + key + '": ' + (('"' + val + '"') if val is string else (val | tojson)) }}
                    {{- ", " if not loop.last }}
                {%- endfor %}
                {{- "}}" + (", " if not loop.last else "") }}
            {%- endfor %}
            {{- "][/AVAILABLE_TOOLS]" }}
        {%- endif %}
        {{- "[INST] " + message.content | string + "[/INST]" }}
    {%- elif message.tool_calls is defined and message.tool_calls is not none %}
        {{- "[TOOL_CALLS] [" }}
        {%- for tool_call in message.tool_calls %}
            {%- set out = tool_call.function | tojson %}
            {{- out[:-1] + ', "id": "' + (tool_call.id | default("")) + '"}' }}
            {{- ", " if not loop.last else "]" + eos_token }}
        {%- endfor %}
    {%- elif message.role == "assistant" %}
        {{- " " + message.content | string + eos_token }}
    {%- else %}
        {{- "[TOOL_RESULTS] " + {"content": message.content, "call_id": message.tool_call_id} | tojson }}
        {{- "[/TOOL_RESULTS]" }}
    {%- endif %}
{%- endfor %}
"""
"""In the style of Mistral: keys in their order, each of them."""

EVERYTHING = (
    "{{ tools | tojson }}\n{% for message in messages %}{{ message | tojson }}\n"
    "{% for key, value in message | items %}{{ key }}={{ value }};{% endfor %}{{ eos_token }}\n{% endfor %}"
)
TEMPLATES = {"qwen": QWEN, "llama": LLAMA, "mistral": MISTRAL, "everything": EVERYTHING}

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Wetter für einen Ort — 天气 <b>&amp;</b>",
        "parameters": {
            "type": "object",
            "properties": {
                "place": {"type": "string", "description": "Ort"},
                "days": {"type": "integer", "default": None, "minimum": 1},
                "exact": {"anyOf": [{"type": "number"}, {"type": "null"}], "enum": [1.0, 2.5e-7, None, True]},
            },
            "required": ["place"],
        },
    },
}
SEARCH = {"function": {"parameters": {}, "name": "search", "description": None}, "type": "function", "strict": False}
BARE = {"name": "now", "description": "", "parameters": {"properties": {}, "type": "object"}}


def call(name: str, arguments: Any, **more: Any) -> dict[str, Any]:
    return {**more, "type": "function", "function": {"name": name, "arguments": arguments}}


def said(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def asked(*calls: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"role": "assistant", **more, "tool_calls": list(calls)}


USER, ANSWER = said("user", "Wie wird es in Zürich? ☃"), said("assistant", "Schnee, -3°")
RESULT = said("tool", '{"sky": "snow"}', name="weather", tool_call_id="a1b2c3d4e")
ROWS: list[dict[str, Any]] = [
    {"messages": [USER, ANSWER]},
    {"messages": [USER, ANSWER], "tools": None},
    {"messages": [USER, ANSWER], "tools": []},
    {"messages": [USER, ANSWER], "tools": [WEATHER]},
    {"messages": [said("system", "Be brief."), USER, ANSWER], "tools": [WEATHER, SEARCH]},
    {"messages": [USER, ANSWER], "tools": [BARE]},
    {"messages": [USER, asked(call("weather", {"place": "Zürich"})), RESULT, ANSWER], "tools": [WEATHER]},
    {"messages": [USER, asked(call("weather", {"z": 1, "place": "x", "a": None})), RESULT, ANSWER], "tools": [WEATHER]},
    {"messages": [USER, asked(call("weather", {"place": None, "days": None}), content=None)], "tools": [WEATHER]},
    {"messages": [USER, asked(call("weather", '{"place": "Zürich", "days": null}'), content="")], "tools": [SEARCH]},
    {"messages": [USER, asked(call("search", {}), call("weather", {"days": [1, None, 2.0]}), content="Moment.")]},
    {"messages": [said("user", [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]), ANSWER]},
    {"messages": [said("user", [{"text": "one", "type": "text", "cache": None}]), ANSWER], "tools": [SEARCH]},
    {"messages": [USER, said("assistant", [{"type": "text", "text": "Schnee"}])], "tools": [WEATHER]},
    {"messages": [USER, said("assistant", "so", reasoning="hm"), USER, said("assistant", "so", thinking="ah")]},
    {"messages": [USER, said("assistant", "so", reasoning_content="hm", thinking=None)], "tools": [BARE]},
    {"messages": [{"content": "x", "name": None, "role": "user"}, {"content": "y", "weight": 1, "role": "assistant"}]},
    {"messages": [USER, asked(call("weather", {"deep": {"b": {"d": None, "c": [{}]}, "a": ""}}, id="9", index=0))]},
    {"messages": [USER, ANSWER, said("user", "\u2028<|im_end|>\\n \"'&<>{{ 1 }}"), said("assistant", "\t 1e400 \x00")]},
    {"messages": [USER, asked(call("weather", {"big": 2**70, "small": -0.0, "e": 1e22})), RESULT, ANSWER, USER]},
]


def row_file(folder: Path, rows: list[dict[str, Any]]) -> DataSection:
    (folder / "a.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return section("jsonl")


def section(source: str) -> DataSection:
    where = {"dataset": "set"} if source == "datasets" else {"paths": (f"*.{source}",)}
    return DataSection.model_validate({"source": source, "format": "chat", **where})


def by_transformers(template: str) -> Callable[[dict[str, Any]], str]:
    transformers = pytest.importorskip("transformers")
    library = transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(tokenizer_json()), **SPECIAL)

    def write(row: dict[str, Any]) -> str:
        last = max(number for number, message in enumerate(row["messages"]) if message["role"] == "assistant")
        tools = row.get("tools")
        tools = json.loads(tools) if isinstance(tools, str) else tools
        text = library.apply_chat_template(
            row["messages"][: last + 1], tools=tools, chat_template=template, tokenize=False
        )
        assert isinstance(text, str)
        return text

    return write


def text_trained_on(encoder: DocumentEncoder, sample: bytes, tokenizer: TokenizerFile) -> str:
    """Return the text of a sample with all its turns."""
    (documents,) = encoder.encode([sample])
    return tokenizer.decode(documents[-1].tokens).decode()


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_text_of_a_row_is_what_transformers_writes_for_it(tmp_path: Path, name: str) -> None:
    template, num_refused = TEMPLATES[name], 0
    assert len(ROWS) == 20
    write = by_transformers(template)
    samples = [each.text for each in read_documents(row_file(tmp_path, ROWS), tmp_path)]
    with DocumentEncoder("chat", tokenizer := made_tokenizer(template)) as encoder:
        for row, sample in zip(ROWS, samples, strict=True):
            try:
                expected = write(row)
            except Exception:
                num_refused += 1
                with raises_code("chat-refused", RunFileError):
                    text_trained_on(encoder, sample, tokenizer)
            else:
                assert text_trained_on(encoder, sample, tokenizer) == expected, row
    assert num_refused <= 3, "each conversation is one for most templates"


def test_tools_may_be_json_in_a_string(tmp_path: Path) -> None:
    rows = [{**row, "tools": json.dumps(row.get("tools"))} for row in ROWS] + [{**ROWS[0], "tools": ""}]
    samples = [json.loads(each.text) for each in read_documents(row_file(tmp_path, rows), tmp_path)]
    assert [sample.get("tools") for sample in samples] == [row.get("tools") for row in [*ROWS, {}]]


@pytest.mark.parametrize("tools", [["weather"], {"type": "function"}, "weather", "[1]", 3, '{"a": []}'])
def test_what_is_no_list_of_tools_is_refused_and_named(tmp_path: Path, tools: Any) -> None:
    bad = {"messages": [USER, ANSWER], "tools": tools}
    with raises_code("not-a-sample", RunFileError, f"line 2 of {tmp_path / 'a.jsonl'}", '"tools"', "list of tools"):
        list(read_documents(row_file(tmp_path, [ROWS[3], bad]), tmp_path))


def test_a_table_has_null_for_absent_fields_which_are_left_out_but_for_what_is_json(tmp_path: Path) -> None:
    rows = [
        {"messages": [USER, asked(call("f", part)), *more], "tools": [{"name": "f", "parameters": part}]}
        for part, more in (({"x": 1}, [RESULT, ANSWER]), ({"y": "z"}, [ANSWER]))
    ]
    arrow = pytest.importorskip("pyarrow")
    write = pytest.importorskip("pyarrow.parquet").write_table
    write(arrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    found = [json.loads(each.text) for each in read_documents(section("parquet"), tmp_path)]
    assert found == rows
    write(arrow.Table.from_pylist([{**row, "tools": json.dumps([WEATHER])} for row in rows]), tmp_path / "a.parquet")
    found = [json.loads(each.text) for each in read_documents(section("parquet"), tmp_path)]
    assert json.dumps([sample["tools"] for sample in found]) == json.dumps([[WEATHER], [WEATHER]])


def test_a_data_set_of_json_has_the_nulls_that_are_in_it(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    if not hasattr(datasets, "Json"):
        pytest.skip("this version of datasets knows no JSON")
    features = datasets.Features({"messages": datasets.List(datasets.Json()), "tools": datasets.Json()})
    rows = [{"messages": [USER, asked(call("f", {"x": None, "a": 1}), content="")], "tools": [WEATHER]}]
    datasets.Dataset.from_list(rows, features=features).save_to_disk(str(tmp_path / "set"))
    (found,) = read_documents(section("datasets"), tmp_path)
    assert found.text.decode() == json.dumps(rows[0], ensure_ascii=False, separators=(",", ":"))


def test_conversations_that_only_share_tools_are_trained_on_and_equal_ones_never(tmp_path: Path) -> None:
    def row(number: int, **more: Any) -> dict[str, Any]:
        return {"messages": [said("user", f"Q {number}?"), said("assistant", f"A {number}.")], **more}

    turned = [dict(reversed(message.items())) for message in row(1)["messages"]]
    rows = [row(number, tools=[WEATHER, SEARCH]) for number in range(5)] + [{"messages": turned}]
    held_out, *others = [each.text for each in read_documents(row_file(tmp_path, [rows[1], *rows]), tmp_path)]
    cut = HeldOutIndex(held_out + b"\nA line of text.\n[" + b"[" * 100_000).cut(others, are_samples=True)
    assert cut.text.tobytes().splitlines() == [others[number] for number in (0, 2, 3, 4)]
    assert cut.ends.tolist()[-1] == len(cut.text) and (cut.num_documents, cut.dropped_documents) == (4, 2)


def test_calls_of_tools_and_parts_count_among_what_the_assistant_says() -> None:
    calls = [call("f", {"x": "é"})]
    parts = [{"type": "text", "text": "so"}, {"type": "x"}]
    sample = {"messages": [USER, asked(*calls), said("assistant", parts), USER]}
    assert learnt_text(json.dumps(sample).encode()).decode() == json.dumps(calls, ensure_ascii=False) + "so"

"""Turn a row of a data file into the text of a document: its text field, or a sample as one line of JSON.

A conversation (`data.format = "chat"`) or a prompt with its completion stays JSON until it is encoded, so that it is
cut, compared with the held-out text and cached as any text is; it is never taken apart. Of a conversation it has what
transformers gives to the chat template for that row: the keys in their order, and `tools`.

JSON lines say which fields a row has. Parquet files, and data sets made of structs, hold each field of a struct in
every row, in one order, and null where the row had none: there a null field is left out, as if it were absent.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from swarmtrain.errors import RunFileError
from swarmtrain.run_data import SourceKeys

_PROMPT, _COMPLETION = "prompt", "completion"


def columns_of(section: SourceKeys, has: Iterable[str] = ()) -> list[str]:
    """Return the fields that a row must have, and those of `has` that are read besides: a conversation's tools."""
    if section.format == "prompt-completion":
        return [_PROMPT, _COMPLETION]
    return [section.field, *(name for name in has if name == "tools" and section.format == "chat")]


def no_such_field(name: str, section: SourceKeys, where: str, has: Iterable[str], kind: str = "field") -> RunFileError:
    """Return the error of a row or table, named `where`, that has other fields."""
    found = ", ".join(sorted(has)) or "none"
    if section.format == "prompt-completion":
        return RunFileError(
            f'data.format: {where} has no {kind} "{name}" (it has: {found}); write prompt and completion in each row',
            code="no-such-field",
        )
    what = "text" if section.format == "text" else "conversation"
    return RunFileError(
        f'data.field: {where} has no {kind} "{name}" (it has: {found}); set data.field to the one that holds the '
        f"{what}",
        code="no-such-field",
    )


def text_of_row(row: Mapping[str, Any], section: SourceKeys, where: str) -> bytes:
    """Return the document of a row, UTF-8; b"" if it has no text.

    `where` names the row in messages, such as `line 3 of talk.jsonl`. Raises RunFileError if a field is missing or
    holds something else.
    """
    for name in columns_of(section):
        if name not in row:
            raise no_such_field(name, section, where, row)
    if section.format == "text":
        text = row[section.field]
        if text is None:
            return b""  # public data sets have such rows
        if not isinstance(text, str):
            raise RunFileError(
                f'data.field: "{section.field}" in {where} is not a string; set data.field to the one that holds the '
                "text",
                code="field-not-text",
            )
        return text.encode(errors="replace")  # JSON can spell lone surrogates, UTF-8 cannot
    sample = _conversation(row[section.field]) if section.format == "chat" else _pair(row)
    if sample is None and section.format == "chat":
        raise RunFileError(
            f'data.format: "{section.field}" in {where} is not a conversation; write [{{"role": "user", "content": '
            '"..."}, {"role": "assistant", "content": "..."}]',
            code="not-a-sample",
        )
    if sample is None:
        raise RunFileError(
            f"data.format: prompt and completion in {where} are not two strings; write a string in each",
            code="not-a-sample",
        )
    if section.format == "chat" and (tools := _tools(row.get("tools"), where)) is not None:
        sample = {**sample, "tools": tools}
    return json.dumps(sample, ensure_ascii=False, separators=(",", ":")).encode(errors="replace")


def _pair(row: Mapping[str, Any]) -> dict[str, str] | None:
    pair = {name: row[name] for name in (_COMPLETION, _PROMPT)}
    return pair if all(isinstance(text, str) for text in pair.values()) else None


def _conversation(messages: Any) -> dict[str, Any] | None:
    """Return the sample of a conversation, its messages without fields that are null, as transformers leaves them out;
    None if it is none."""
    if not isinstance(messages, list) or not messages:
        return None
    kept = []
    for message in messages:
        if not isinstance(message, Mapping):
            return None
        found = {name: each for name, each in message.items() if each is not None}
        content = found.get("content", "")
        if not isinstance(found.get("role"), str) or (not isinstance(content, str) and not _are_tables(content)):
            return None
        if "content" not in found and len(found) == 1:
            return None
        kept.append(found)
    return {"messages": kept} if _is_json(kept, 0) else None


def _tools(tools: Any, where: str) -> Any:
    """Return the tools of a row, which may be JSON in a string; None without any. Raises RunFileError."""
    with contextlib.suppress(ValueError, RecursionError):
        tools = json.loads(tools or "null") if isinstance(tools, str) else tools
    if tools is None or (_are_tables(tools) and _is_json(tools, 0)):
        return tools
    raise RunFileError(
        f'data.format: "tools" in {where} is not a list of tools; write [{{"type": "function", "function": '
        "{...}}], or the same as a JSON string",
        code="not-a-sample",
    )


def _are_tables(part: Any) -> bool:
    return isinstance(part, list) and all(isinstance(each, Mapping) for each in part)


def without_absent(row: Mapping[str, Any], as_json: Collection[str] = ()) -> dict[str, Any]:
    """Return a row of a table without the null fields of its structs; columns `as_json` have none."""
    return {name: value if name in as_json else _without_null(value) for name, value in row.items()}


def _without_null(part: Any) -> Any:
    """Return the same without null fields."""
    if isinstance(part, Mapping):
        return {str(name): _without_null(each) for name, each in part.items() if each is not None}
    return [_without_null(each) for each in part] if isinstance(part, list) else part


def _is_json(part: Any, depth: int) -> bool:
    if isinstance(part, dict):
        return depth < 64 and all(_is_json(each, depth + 1) for each in part.values())
    if isinstance(part, list):
        return depth < 64 and all(_is_json(each, depth + 1) for each in part)
    return part is None or isinstance(part, str | int | float | bool)


def has_turns(sample: Mapping[str, Any]) -> bool:
    """Return whether a conversation has a turn of the assistant, which is what is learnt."""
    return any(message["role"] == "assistant" for message in sample["messages"])

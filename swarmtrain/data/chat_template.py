"""Write a conversation as text by the chat template of its tokenizer, and find the assistant's turns in it.

A template is a program in Jinja from a stranger. It runs in Jinja's sandbox, which gives it the conversation and
nothing else, and in a process of its own (`template_process.py`), which has little memory and is ended when it takes
long: the sandbox bounds neither. Filters, functions and fields are those that `transformers` gives to templates, so
that the text is the same; only the date is a fixed one, so that it is the same for every peer.

Where the assistant's turns are, the template says itself (`{% generation %}`), or it is found from outside: the turn is
what the conversation up to it has more than the prompt for it. That is exactly what the model will be asked to write.
Some templates write a turn otherwise once others follow, without its thoughts for example. Then each turn is a text of
its own, in which it is the last one.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

_TODAY = datetime.datetime(2024, 7, 26)
"""Date for templates: the one that Llama's take where they are told none."""


class RenderedText(NamedTuple):
    """Text of a conversation, and what of it the assistant wrote."""

    text: str
    spans: list[tuple[int, int]]
    """Beginnings and ends of the assistant's turns, in characters."""


class _Generation(jinja2.ext.Extension):
    """Tag `generation`, around what the assistant writes. Its parts are marked by characters that no text has."""

    tags = {"generation"}  # noqa: RUF012 - as in Jinja

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_spanned"), [], [], body).set_lineno(line)

    def _spanned(self, caller: Any) -> str:
        return f"{_BEGIN}{caller()}{_END}"


_BEGIN, _END = "\ud800", "\udbff"
"""Lone surrogates: a text that came as UTF-8 cannot have them."""


class _Namespace(jinja2.utils.Namespace):
    """Namespace whose attributes do not begin with an underscore."""

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace has no attribute {name!r}")
        super().__setitem__(name, value)


def _refuse(message: object) -> None:
    raise jinja2.exceptions.TemplateError(str(message))


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


_Messages = Sequence[Mapping[str, Any]]
_Tools = Sequence[Mapping[str, Any]] | None


def _with_reasoning(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a message with what it thought under each name that templates read."""
    names = ("reasoning_content", "thinking", "reasoning")
    found = next((message[name] for name in names if message.get(name) is not None), None)
    return message if found is None else {"thinking": found, **message, "reasoning_content": found}


class ChatTemplate:
    """Template, compiled. `special_tokens` are its variables besides the conversation, such as `eos_token`."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """Compile it. Raises Jinja's TemplateError."""
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals.update(raise_exception=_refuse, strftime_now=_TODAY.strftime, namespace=_Namespace)
        self._template, self._special_tokens = environment.from_string(source), dict(special_tokens)

    def _rendered(self, messages: _Messages, tools: _Tools = None, *, asks: bool = False) -> str:
        """Return the text of messages, marks included; with `asks`, and the beginning of the assistant's next turn."""
        known = [_with_reasoning(message) for message in messages]
        return self._template.render(
            messages=known, tools=tools, documents=None, add_generation_prompt=asks, **self._special_tokens
        )

    def write(self, messages: _Messages, tools: _Tools = None) -> list[RenderedText]:
        """Return the texts of a conversation, which together have each turn of the assistant once; none without one.

        Raises TemplateError, or whatever else the template's expressions raise.
        """
        turns = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        if not turns:
            return []
        messages = messages[: turns[-1] + 1]  # a question without an answer teaches nothing
        whole = self._rendered(messages, tools)
        if _BEGIN in whole:
            return [_with_spans(whole)]
        alone = [self._turn(messages, tools, turn) for turn in turns]
        if all(whole.startswith(each.text) for each in alone):
            return [RenderedText(whole, [span for each in alone for span in each.spans])]
        return alone

    def _turn(self, messages: _Messages, tools: _Tools, turn: int) -> RenderedText:
        """Return the conversation up to a turn of the assistant, which alone is marked."""
        try:
            before = self._rendered(messages[:turn], tools, asks=True)
        except jinja2.exceptions.TemplateError:
            if turn:
                raise
            before = ""  # it does not write a conversation of nothing
        text = self._rendered(messages[: turn + 1], tools)
        if not text.startswith(before):
            raise jinja2.exceptions.TemplateError(
                "it does not write an assistant's turn as it asks for one, and has no generation tag"
            )
        return RenderedText(text, [(len(before), len(text))])


def _with_spans(text: str) -> RenderedText:
    parts, spans, place = list[str](), list[tuple[int, int]](), 0
    for number, part in enumerate(text.replace(_END, _BEGIN).split(_BEGIN)):
        parts.append(part)
        if number % 2:
            spans.append((place, place + len(part)))
        place += len(part)
    return RenderedText("".join(parts), spans)

"""Process that runs a chat template, which is a stranger's program."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from swarmtrain.data.limited_process import LimitedProcess, ProcessLimitError, serve
from swarmtrain.errors import RunFileError
from swarmtrain.extras import install_in_words

_LIMIT_S = 10.0
"""Time that a conversation may take: a thousand times what one takes."""
_MEMORY_BYTES = 1 << 30
_MOST_LETTERS = 1 << 24
"""Most characters of a conversation's texts."""
_OLDEST_JINJA = (3, 1, 6)
"""Older sandboxes can be left."""


class TemplateError(Exception):
    """Raised when a template refuses a conversation, or takes too long or too much memory; one line says which."""


@dataclass
class TemplateProcess:
    """Process for one template, from the first conversation to the end of the `with` block, or to its first failure."""

    template: str
    special_tokens: Mapping[str, str]
    limit_s: float = _LIMIT_S
    memory_bytes: int = _MEMORY_BYTES
    _process: LimitedProcess | None = field(default=None, init=False)

    def __enter__(self) -> TemplateProcess:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def write(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None
    ) -> list[tuple[str, list[tuple[int, int]]]]:
        """Return the texts of a conversation and the spans of the assistant's turns; see `ChatTemplate.write`.

        Raises TemplateError if the template refuses it, RunFileError if the template itself is unusable.
        """
        if self._process is None:
            self._process = self._started()
        try:
            answer = self._process.ask({"messages": messages, "tools": tools})
        except ProcessLimitError as error:
            self.close()
            raise TemplateError(str(error)) from None
        if "error" in answer:
            raise TemplateError(answer["error"])
        return [(text, [(begin, end) for begin, end in spans]) for text, spans in answer["texts"]]

    def _started(self) -> LimitedProcess:
        task = {"template": self.template, "special_tokens": dict(self.special_tokens)}
        try:
            started = LimitedProcess("swarmtrain.data.template_process", task, self.limit_s, self.memory_bytes)
            answer = started.first
            if "error" not in answer:
                return started
            started.close()
        except ProcessLimitError as error:
            answer = {"error": str(error)}
        raise RunFileError(
            f"model.tokenizer: its chat template cannot be used: {answer['error']}; use another tokenizer",
            code=answer.get("code", "bad-chat-template"),
        )

    def close(self) -> None:
        """End the process, if it runs."""
        if self._process is not None:
            self._process.close()
            self._process = None


# ---------------------------------------------------------------- in the process


def _prepared(task: dict[str, Any]) -> tuple[dict[str, Any], Callable[[dict[str, Any]], dict[str, Any]] | None]:
    try:
        import jinja2

        from swarmtrain.data.chat_template import ChatTemplate

        found = tuple(int(part) for part in jinja2.__version__.split(".")[:3] if part.isdigit())
        if found < _OLDEST_JINJA:
            raise ImportError(f"jinja2 {jinja2.__version__} is too old")
    except ImportError as error:
        return {"error": f"{error}: {install_in_words('chat')}", "code": "package-missing"}, None
    template = ChatTemplate(task["template"], task["special_tokens"])

    def write(question: dict[str, Any]) -> dict[str, Any]:
        texts = template.write(**question)
        if sum(len(each.text) for each in texts) > _MOST_LETTERS:
            raise ValueError(f"it writes more than {_MOST_LETTERS} characters")
        return {"texts": texts}

    return {}, write


def main() -> None:
    """Read a template, then conversations, and write what the template makes of each, until the input ends."""
    serve(_prepared)


if __name__ == "__main__":
    main()

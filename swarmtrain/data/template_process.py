"""Process that runs a chat template, which is a stranger's program: it has little memory and little time.

The peer writes a line of JSON for each conversation to the process's standard input and reads a line back. The process
imports neither torch nor anything of the network, so it starts in a fraction of a second.
"""

from __future__ import annotations

import json
import logging
import selectors
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from swarmtrain.errors import RunFileError
from swarmtrain.extras import install_in_words
from swarmtrain.words import one_line

__all__ = ["TemplateError", "TemplateProcess", "main"]

_log = logging.getLogger(__name__)
_LIMIT_S = 10.0
"""Time that a conversation may take: a thousand times what one takes."""
_START_S = 60.0
"""Time that Python has to start, on a busy machine."""
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
    _process: subprocess.Popen[bytes] | None = field(default=None, init=False)
    _answers: selectors.DefaultSelector = field(default_factory=selectors.DefaultSelector, init=False)
    """Waits for the process to answer."""

    def __enter__(self) -> TemplateProcess:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def write(self, messages: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[tuple[int, int]]]]:
        """Return the texts of a conversation and the spans of the assistant's turns; see `ChatTemplate.write`.

        Raises TemplateError if the template refuses it, RunFileError if the template itself is unusable.
        """
        if self._process is None:
            self._start()
        answer = self._ask({"messages": messages}, self.limit_s)
        if "error" in answer:
            raise TemplateError(answer["error"])
        return [(text, [(begin, end) for begin, end in spans]) for text, spans in answer["texts"]]

    def _start(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "swarmtrain.data.template_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            process_group=0,  # Ctrl-C is for the peer, which ends it
        )
        assert self._process.stdout is not None
        self._answers.register(self._process.stdout, selectors.EVENT_READ)
        try:
            task = {"template": self.template, "special_tokens": dict(self.special_tokens)}
            limits = {"memory_bytes": self.memory_bytes, "limit_s": 2 * self.limit_s}
            answer = self._ask({**task, **limits}, _START_S)
        except TemplateError as error:
            answer = {"error": str(error)}
        if "error" in answer:
            self.close()
            raise RunFileError(
                f"model.tokenizer: its chat template cannot be used: {answer['error']}; use another tokenizer",
                code=answer.get("code", "bad-chat-template"),
            )

    def _ask(self, question: Mapping[str, Any], limit_s: float) -> dict[str, Any]:
        """Return the process's answer. Raises TemplateError if it ends instead, or is ended for its time."""
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        line = b""
        try:
            process.stdin.write(json.dumps(question).encode() + b"\n")
            process.stdin.flush()
            if self._answers.select(limit_s):
                line = process.stdout.readline()
        except OSError as error:
            _log.debug("the template's process has ended: %r", error)
        if not line.endswith(b"\n"):
            self.close()
            most = f"{self.memory_bytes >> 20} MiB of memory"
            raise TemplateError(f"it takes more than {limit_s:g} s, or more than {most}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """End the process, if it runs."""
        if self._process is not None:
            process, self._process = self._process, None
            assert process.stdout is not None
            self._answers.unregister(process.stdout)
            process.kill()
            process.communicate()
        self._answers.close()


# ---------------------------------------------------------------- in the process


def _limit_memory(most_bytes: int) -> None:
    try:
        import resource
    except ImportError:  # not a system that has limits
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    least = most_bytes if hard == resource.RLIM_INFINITY else min(most_bytes, hard)
    try:
        resource.setrlimit(resource.RLIMIT_AS, (least, hard))
    except (OSError, ValueError):  # macOS knows the limit and does not set it
        _log.debug("memory is not limited: it was %s", soft)


def _end_after(limit_s: float) -> None:
    """End this process in `limit_s` seconds, for a peer that is no longer there to do it; 0 takes that back."""
    if hasattr(signal, "setitimer"):  # not on Windows
        signal.setitimer(signal.ITIMER_REAL, limit_s)


def main() -> None:
    """Read a template, then conversations, and write what the template makes of each, until the input ends."""
    lines, out = sys.stdin.buffer, sys.stdout
    task = json.loads(lines.readline())
    try:
        import jinja2

        from swarmtrain.data.chat_template import ChatTemplate

        found = tuple(int(part) for part in jinja2.__version__.split(".")[:3] if part.isdigit())
        if found < _OLDEST_JINJA:
            raise ImportError(f"jinja2 {jinja2.__version__} is too old")
    except ImportError as error:
        out.write(json.dumps({"error": f"{error}: {install_in_words('chat')}", "code": "package-missing"}) + "\n")
        return
    _limit_memory(task["memory_bytes"])
    template: ChatTemplate | None = None
    question = task
    while True:
        answer: dict[str, Any]
        _end_after(task["limit_s"])
        try:
            if template is None:
                template, answer = ChatTemplate(task["template"], task["special_tokens"]), {}
            else:
                texts = template.write(question["messages"])
                if sum(len(each.text) for each in texts) > _MOST_LETTERS:
                    raise ValueError(f"it writes more than {_MOST_LETTERS} characters")
                answer = {"texts": texts}
        except MemoryError:
            return
        except Exception as error:
            _log.debug("the template fails", exc_info=error)
            answer = {"error": one_line(str(error))[:200] or type(error).__name__}
        _end_after(0)
        out.write(json.dumps(answer) + "\n")
        out.flush()
        line = lines.readline()
        if not line:
            return
        question = json.loads(line)


if __name__ == "__main__":
    main()

"""Where drivers' questions meet the one who computes: the trainer's thread.

The network's side asks and waits; what it asked is computed once and answered as often as it is asked, also if the one
who asked first has hung up. The trainer's side takes the next piece of work: what its ledger says is due, then
backwards, which free what is kept for them, then tails, then forwards.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from swarmtrain.errors import BadBytesError, BusyError, GoneError, PeerError
from swarmtrain.protocol.microbatches import Due, Forget, Key, Kind, Settlement, StageLedger, Work

__all__ = ["StageDesk", "Task"]

_ORDER: tuple[Kind, ...] = ("backward", "tail", "forward")


@dataclass(frozen=True, eq=False)
class Task:
    """A driver's question that is to be computed now; `payload` is what came with it."""

    key: Key
    kind: Kind
    tokens: int
    payload: Any
    work: Work


@dataclass(frozen=True, eq=False)
class _Question:
    key: Key
    kind: Kind
    tokens: int
    payload: Any
    answer: Future[Any] = field(default_factory=Future)


@dataclass
class StageDesk:
    """The questions to one peer of a stage."""

    ledger: StageLedger
    now: Callable[[], float]
    _waiting: dict[Kind, deque[_Question]] = field(default_factory=lambda: {kind: deque() for kind in _ORDER})
    _asked: dict[Key, dict[Kind, _Question]] = field(default_factory=dict)
    _lock: threading.RLock = field(default_factory=threading.RLock)
    _news: threading.Event = field(default_factory=threading.Event)
    _closed: bool = False

    # ------------------------------------------------------------- the network's side

    async def ask(self, key: Key, kind: Kind, tokens: int, payload: Any) -> Any:
        """The answer, when it is computed. BusyError, GoneError; whoever waits may give up, the work goes on."""
        with self._lock:
            if self._closed:
                raise GoneError("this peer does not train now")
            if kind != "backward" and sum(map(len, self._waiting.values())) >= 2 * self.ledger.limits.max_open:
                raise BusyError("too many questions wait here")
            self._check_shape_untrusted(key, kind, payload)
            verdict = self.ledger.ask(key, kind, tokens, self.now())
            if verdict.answer == "busy":
                raise BusyError(verdict.reason)
            if verdict.answer == "gone":
                self._news.set()
                raise GoneError(verdict.reason)
            if verdict.answer == "work":
                question = _Question(key, kind, tokens, payload)
                self._asked.setdefault(key, {})[kind] = question
                self._waiting[kind].append(question)
                self._news.set()
            question = self._asked[key][kind]
        answer = asyncio.wrap_future(question.answer)
        answer.add_done_callback(lambda it: it.cancelled() or it.exception())  # nobody may be waiting any more
        return await asyncio.shield(answer)

    def check(self, key: Key, kind: Kind) -> None:
        """BusyError or GoneError if `ask` would raise it now: what came with the question need not be read then."""
        with self._lock:
            if kind == "backward" and not self.ledger.has_forward(key):
                raise GoneError("its forward is not known here")
            if kind != "backward" and (reason := self.ledger.full(key)) is not None:
                raise BusyError(reason)

    def _check_shape_untrusted(self, key: Key, kind: Kind, payload: Any) -> None:
        """BadBytesError if a backward's gradient is not shaped as the forward's answer."""
        forward = self._asked.get(key, {}).get("forward")
        if kind == "backward" and forward is not None and forward.answer.done() and not forward.answer.exception():
            needed, got = (getattr(each, "shape", None) for each in (forward.answer.result(), payload))
            if needed != got:
                raise BadBytesError(f"a gradient of shape {tuple(got or ())} for an answer of {tuple(needed or ())}")

    def settle(self, driver: str, settlement: Settlement) -> set[Key]:
        """What a driver says of its microbatches; those acknowledged for which it is too late."""
        with self._lock:
            self._news.set()
            return self.ledger.settle(driver, settlement, self.now())

    # ------------------------------------------------------------- the trainer's side

    def next(self) -> Task | Due | None:
        """What is to be done now; None: nothing."""
        with self._lock:
            self._news.clear()
            while True:
                if (due := self.ledger.due(self.now())) is not None:
                    if isinstance(due, Forget):
                        self._forget(due.key)
                    return due
                question = self._pop()
                if question is None:
                    return None
                work = self.ledger.begin(question.key, question.kind)
                if work is not None:
                    return Task(question.key, question.kind, question.tokens, question.payload, work)

    def _pop(self) -> _Question | None:
        return next((self._waiting[kind].popleft() for kind in _ORDER if self._waiting[kind]), None)

    def done(self, task: Task, answer: Any) -> None:
        """It is computed."""
        with self._lock:
            self.ledger.computed(task.key, task.kind, self.now())
            self._asked[task.key][task.kind].answer.set_result(answer)

    def failed(self, task: Task, error: PeerError) -> None:
        """It cannot be computed: who asked is told so."""
        with self._lock:
            self.ledger.failed(task.key)
            self._asked[task.key][task.kind].answer.set_exception(error)

    def open(self) -> None:
        """Questions are computed from now on, as at first."""
        with self._lock:
            self._closed = False

    def close(self) -> None:
        """Nothing is computed for now: everyone who waits is told so, and whoever asks."""
        with self._lock:
            self._closed = True
            for key in list(self._asked):
                self._forget(key)

    @property
    def is_open(self) -> bool:
        """Whether questions are computed now."""
        return not self._closed

    def close_batch(self) -> bool:
        """Drivers have no more: what there is of a batch is one. Whether there is something to be done now."""
        with self._lock:
            return self.ledger.close_batch()

    @property
    def has_settled(self) -> bool:
        """Whether there is no gradient here that may enter a step."""
        with self._lock:
            return self.ledger.has_settled

    @property
    def num_waiting(self) -> int:
        """Questions that wait to be computed."""
        with self._lock:
            return sum(map(len, self._waiting.values()))

    def wait(self, most_s: float) -> None:
        """Until there may be something to be done, `most_s` at most."""
        next_s = self.ledger.next_s()
        self._news.wait(most_s if next_s is None else max(0.0, min(most_s, next_s - self.now())))

    def _forget(self, key: Key) -> None:
        for question in self._asked.pop(key, {}).values():
            if not question.answer.done():
                question.answer.set_exception(GoneError("this microbatch is finished, or was given up"))

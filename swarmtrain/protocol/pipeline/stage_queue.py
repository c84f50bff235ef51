"""In which order one peer of a stage does what drivers ask, and who is answered when.

What is asked is computed once and answered as often as it is asked, also if the one who asked first has hung up. Who
computes does what the ledger says is due, then backwards, which free what is kept for them, then tails, then forwards.

Pure: events go in, commands come out. Whoever drives it keeps what came with a question, and what was computed of a
microbatch until `Forget`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from swarmtrain.protocol.pipeline.ledger import Due, Forget, Key, Kind, Settlement, StageLedger, Work

__all__ = [
    "AnswerStageCalls",
    "Closed",
    "Compute",
    "Computed",
    "Free",
    "Late",
    "Opened",
    "QueueCommand",
    "QueueEvent",
    "Refuse",
    "Settles",
    "Spoilt",
    "StageCallReceived",
    "StageQueue",
]

_ORDER: tuple[Kind, ...] = ("backward", "tail", "forward")


# ---------------------------------------------------------------- events


@dataclass(frozen=True, slots=True)
class StageCallReceived:
    """A driver asks for a part of a microbatch; whoever asks is known by a number."""

    asker: int
    key: Key
    kind: Kind
    tokens: int


@dataclass(frozen=True, slots=True)
class Settles:
    """What a driver says of its microbatches."""

    driver: str
    settlement: Settlement


@dataclass(frozen=True, slots=True)
class Free:
    """Who computes has nothing to do."""


@dataclass(frozen=True, slots=True)
class Computed:
    """A part is computed."""

    key: Key
    kind: Kind


@dataclass(frozen=True, slots=True)
class Spoilt:
    """It cannot be, by its driver's fault."""

    key: Key
    kind: Kind
    reason: str


@dataclass(frozen=True, slots=True)
class Opened:
    """Questions are computed from now on, as at first."""


@dataclass(frozen=True, slots=True)
class Closed:
    """Nothing is computed for now."""


QueueEvent: TypeAlias = StageCallReceived | Settles | Free | Computed | Spoilt | Opened | Closed


# ---------------------------------------------------------------- commands


@dataclass(frozen=True, slots=True)
class AnswerStageCalls:
    """Give these what was computed."""

    askers: tuple[int, ...]
    key: Key
    kind: Kind


@dataclass(frozen=True, slots=True)
class Refuse:
    """Tell these that there is no answer: they ask again later, start again from this stage's input, or asked what they
    must not."""

    askers: tuple[int, ...]
    why: Literal["busy", "gone", "wrong"]
    reason: str


@dataclass(frozen=True, slots=True)
class Late:
    """Those that a driver acknowledges and that cannot count any more: for it to know."""

    keys: Collection[Key]


@dataclass(frozen=True, slots=True)
class Compute:
    """Compute a part now, of what came with the first asker's question."""

    asker: int
    key: Key
    kind: Kind
    tokens: int
    work: Work


QueueCommand: TypeAlias = AnswerStageCalls | Refuse | Late | Compute | Due


@dataclass(slots=True, eq=False)
class _Question:
    asker: int
    """The first of them."""
    key: Key
    kind: Kind
    tokens: int
    waiting: list[int] = field(default_factory=list)
    is_computed: bool = False


class StageQueue:
    """The questions to one peer of a stage. Not for several threads at once."""

    def __init__(self, ledger: StageLedger) -> None:
        self.ledger = ledger
        self.is_open = True
        """Whether questions are computed now."""
        self.num_waiting = 0
        """Questions that wait to be computed."""
        self._waiting: dict[Kind, deque[_Question]] = {kind: deque() for kind in _ORDER}
        self._asked: dict[Key, dict[Kind, _Question]] = {}

    def wake_at(self) -> float | None:
        """When there may be something to do though nobody said anything; None: not before somebody does."""
        return self.ledger.next_s()

    def receive(self, event: QueueEvent, now: float) -> list[QueueCommand]:
        """What is to be done since this has happened; after `Free` in this order, nothing if there is nothing to do."""
        if isinstance(event, StageCallReceived):
            return self._wanted(event, now)
        if isinstance(event, Free):
            return self._free(now)
        if isinstance(event, Computed):
            self.ledger.computed(event.key, event.kind, now)
            return self._answered(event)
        if isinstance(event, Settles):
            return [Late(self.ledger.settle(event.driver, event.settlement, now))]
        if isinstance(event, Spoilt):
            self.ledger.failed(event.key)
            question = self._asked[event.key][event.kind]
            askers, question.waiting = tuple(question.waiting), []
            return [Refuse(askers, "wrong", event.reason)]
        self.is_open = isinstance(event, Opened)
        return [] if self.is_open else list(self._close())

    def _close(self) -> list[Refuse]:
        """Nothing that waits is computed later: what came with the questions is not kept."""
        self.ledger.stopped()
        for waiting in self._waiting.values():
            waiting.clear()
        self.num_waiting = 0
        return [refused for key in list(self._asked) for refused in self._forget(key)]

    def first_asker(self, key: Key, kind: Kind) -> int | None:
        """With whose question comes what it is computed from; None of one that is not known."""
        known = self._asked.get(key, {}).get(kind)
        return None if known is None else known.asker

    def refusal(self, key: Key, kind: Kind) -> Refuse | None:
        """The refusal that `StageCallReceived` would meet now, or None; if refused, its tensors need not be read."""
        if kind == "backward":
            return None if self.ledger.has_forward(key) else Refuse((), "gone", "its forward is not known here")
        reason = self.ledger.full(key)
        return None if reason is None else Refuse((), "busy", reason)

    # ------------------------------------------------------------- questions

    def _wanted(self, event: StageCallReceived, now: float) -> list[QueueCommand]:
        if not self.is_open:
            return [Refuse((event.asker,), "gone", "this peer does not train now")]
        key, kind, most = event.key, event.kind, 2 * self.ledger.limits.max_open
        if kind != "backward" and self.num_waiting >= most:
            return [Refuse((event.asker,), "busy", "too many questions wait here")]
        verdict = self.ledger.ask(key, kind, event.tokens, now)
        if verdict.answer == "busy" or verdict.answer == "gone":
            return [Refuse((event.asker,), verdict.answer, verdict.reason)]
        if verdict.answer == "work":
            question = _Question(event.asker, key, kind, event.tokens)
            self._asked.setdefault(key, {})[kind] = question
            self._waiting[kind].append(question)
            self.num_waiting += 1
        known = self._asked.get(key, {}).get(kind)
        if known is None:
            return [Refuse((event.asker,), "gone", "it was given up when this peer stopped training")]
        if known.is_computed:
            return [AnswerStageCalls((event.asker,), key, kind)]
        known.waiting.append(event.asker)
        return []

    def _answered(self, event: Computed) -> list[QueueCommand]:
        question = self._asked[event.key][event.kind]
        askers, question.waiting, question.is_computed = tuple(question.waiting), [], True
        return [AnswerStageCalls(askers, event.key, event.kind)]

    # ------------------------------------------------------------- what is done

    def _free(self, now: float) -> list[QueueCommand]:
        done: list[QueueCommand] = []
        while True:
            if (due := self.ledger.due(now)) is not None:
                if isinstance(due, Forget):
                    done += self._forget(due.key)
                done.append(due)
                if isinstance(due, Forget):
                    continue
                return done
            if done:  # a part is begun when it is computed at once
                return done
            question = next((self._waiting[kind].popleft() for kind in _ORDER if self._waiting[kind]), None)
            if question is None:
                return done
            self.num_waiting -= 1
            work = self.ledger.begin(question.key, question.kind)
            if work is not None:
                done.append(Compute(question.asker, question.key, question.kind, question.tokens, work))
                return done

    def _forget(self, key: Key) -> list[Refuse]:
        """Who still waits for something of it waits in vain."""
        askers = tuple(asker for question in self._asked.pop(key, {}).values() for asker in question.waiting)
        return [Refuse(askers, "gone", "this microbatch is finished, or was given up")] if askers else []

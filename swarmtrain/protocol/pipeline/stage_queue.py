"""Order in which a peer of a stage computes what drivers ask for, and when each caller is answered.

Each part of a microbatch is computed once and answered as often as it is asked for, even if the first caller has hung
up. First comes what the ledger says is due, then backwards, which free the activations kept for them, then tails, then
forwards.

Everything here is pure: events go in, commands come out. The caller keeps the tensors that came with a question, and
what was computed of a microbatch until `Forget`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from swarmtrain.protocol.pipeline.ledger import Due, Forget, Key, Kind, Settlement, StageLedger, Work

_ORDER: tuple[Kind, ...] = ("backward", "tail", "forward")
"""Order in which waiting parts are computed."""


# ---------------------------------------------------------------- events


@dataclass(frozen=True, slots=True)
class StageCallReceived:
    """A driver asks for one part of a microbatch; `asker` identifies the call to answer."""

    asker: int
    key: Key
    kind: Kind
    tokens: int


@dataclass(frozen=True, slots=True)
class Settles:
    """A driver says which of its microbatches count."""

    driver: str
    settlement: Settlement


@dataclass(frozen=True, slots=True)
class Free:
    """The stage's worker has nothing to do."""


@dataclass(frozen=True, slots=True)
class Computed:
    """A part has been computed."""

    key: Key
    kind: Kind


@dataclass(frozen=True, slots=True)
class Spoilt:
    """A part cannot be computed, by its driver's fault."""

    key: Key
    kind: Kind
    reason: str


@dataclass(frozen=True, slots=True)
class Opened:
    """Questions are accepted from now on; this is the initial state."""


@dataclass(frozen=True, slots=True)
class Closed:
    """Nothing is computed for now."""


QueueEvent: TypeAlias = StageCallReceived | Settles | Free | Computed | Spoilt | Opened | Closed


# ---------------------------------------------------------------- commands


@dataclass(frozen=True, slots=True)
class AnswerStageCalls:
    """Send the computed part to these callers."""

    askers: tuple[int, ...]
    key: Key
    kind: Kind


@dataclass(frozen=True, slots=True)
class Refuse:
    """Tell these callers that there is no answer.

    - "busy": ask again later, or another peer;
    - "gone": start again from this stage's input;
    - "wrong": the question was invalid.
    """

    askers: tuple[int, ...]
    why: Literal["busy", "gone", "wrong"]
    reason: str


@dataclass(frozen=True, slots=True)
class Late:
    """Tell the driver which of the microbatches that it acknowledged cannot count any more."""

    keys: Collection[Key]


@dataclass(frozen=True, slots=True)
class Compute:
    """Compute a part now, from what came with the first caller's question."""

    asker: int
    key: Key
    kind: Kind
    tokens: int
    work: Work


QueueCommand: TypeAlias = AnswerStageCalls | Refuse | Late | Compute | Due


@dataclass(slots=True, eq=False)
class _Question:
    """Part of a microbatch that was asked for, and the callers that wait for it."""

    asker: int
    """First caller, with whose question the input came."""
    key: Key
    kind: Kind
    tokens: int
    waiting: list[int] = field(default_factory=list)
    is_computed: bool = False


class StageQueue:
    """Questions to one peer of a stage. Not thread-safe."""

    def __init__(self, ledger: StageLedger) -> None:
        self.ledger = ledger
        self.is_open = True
        """True if questions are accepted now."""
        self.num_waiting = 0
        """Parts that wait to be computed."""
        self._waiting: dict[Kind, deque[_Question]] = {kind: deque() for kind in _ORDER}
        self._asked: dict[Key, dict[Kind, _Question]] = {}

    def wake_at(self) -> float | None:
        """Return the time at which there may be work although no event came; None: not before another event."""
        return self.ledger.next_s()

    def receive(self, event: QueueEvent, now: float) -> list[QueueCommand]:
        """Return the commands that follow from an event. After `Free` they must be executed in order; none if there is
        no work."""
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
        """Give up everything that waits, because the inputs that came with the questions are not kept."""
        self.ledger.stopped()
        for waiting in self._waiting.values():
            waiting.clear()
        self.num_waiting = 0
        return [refused for key in list(self._asked) for refused in self._forget(key)]

    def first_asker(self, key: Key, kind: Kind) -> int | None:
        """Return the number of the call that delivered the input of this part; None if the part is unknown."""
        known = self._asked.get(key, {}).get(kind)
        return None if known is None else known.asker

    def refusal(self, key: Key, kind: Kind) -> Refuse | None:
        """Return the refusal that `StageCallReceived` would meet now, or None; a refused question's tensors need not be
        read."""
        if kind == "backward":
            return None if self.ledger.has_forward(key) else Refuse((), "gone", "its forward is not known here")
        reason = self.ledger.full(key)
        return None if reason is None else Refuse((), "busy", reason)

    # ------------------------------------------------------------- questions

    def _wanted(self, event: StageCallReceived, now: float) -> list[QueueCommand]:
        """Answer with the earlier result, wait for it, queue the part, or refuse it."""
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
        """Return the commands for the work that the ledger has due, or else for the next part to compute."""
        done: list[QueueCommand] = []
        while True:
            if (due := self.ledger.due(now)) is not None:
                if isinstance(due, Forget):
                    done += self._forget(due.key)
                done.append(due)
                if isinstance(due, Forget):
                    continue
                return done
            if done:  # `begin` fixes the version of the weights, so a part begins only if it is computed at once
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
        """Drop all questions about a microbatch; callers that still wait are refused."""
        askers = tuple(asker for question in self._asked.pop(key, {}).values() for asker in question.waiting)
        return [Refuse(askers, "gone", "this microbatch is finished, or was given up")] if askers else []

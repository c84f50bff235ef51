"""Queue between drivers' questions to a stage and the thread that computes the answers.

The network thread asks and waits for answers; the stage's trainer thread takes the next piece of work and reports
results. One lock protects both sides. `protocol.pipeline.stage_queue` decides what is answered when, and what is
computed next.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from swarmtrain.errors import BadBytesError, BusyError, GoneError, PeerError
from swarmtrain.protocol.pipeline.ledger import Due, Forget, Key, Kind, Settlement, StageLedger, Work
from swarmtrain.protocol.pipeline.stage_queue import (
    AnswerStageCalls,
    Closed,
    Compute,
    Computed,
    Free,
    Late,
    Opened,
    QueueCommand,
    QueueEvent,
    Refuse,
    Settles,
    Spoilt,
    StageCallReceived,
    StageQueue,
)

if TYPE_CHECKING:
    from swarmtrain.peer.pipeline.stage_loop import StageTransfer

_ERRORS: dict[str, type[PeerError]] = {"busy": BusyError, "gone": GoneError, "wrong": BadBytesError}


@dataclass(frozen=True, eq=False)
class Task:
    """Call of a driver that is to be computed now; `payload` has the tensors that came with it."""

    key: Key
    kind: Kind
    tokens: int
    payload: Any
    work: Work


@dataclass
class StageRequestQueue:
    """Questions to one peer of a stage. Thread-safe."""

    ledger: StageLedger
    now: Callable[[], float]
    transfer: StageTransfer | None = None
    """Copies between main memory and the stage's device; None if the stage is in main memory."""
    queue: StageQueue = field(init=False)
    has_worker: bool = field(default=False, init=False)
    """True from the moment at which a trainer first takes work: its round has begun, and with it the data of the round
    are chosen."""
    _payloads: dict[int, Any] = field(default_factory=dict)
    """Payload of each question, by asker, until it is computed or refused."""
    _askers: dict[int, Future[Any]] = field(default_factory=dict)
    _answers: dict[Key, dict[Kind, Any]] = field(default_factory=dict)
    _next: deque[Task | Due] = field(default_factory=deque)
    """Work to be handed out before the queue is asked again."""
    _numbers: Iterator[int] = field(default_factory=itertools.count)
    _lock: threading.RLock = field(default_factory=threading.RLock)
    _news: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.queue = StageQueue(self.ledger)

    # ------------------------------------------------------------- the network's side

    async def ask(self, key: Key, kind: Kind, tokens: int, payload: Any) -> Any:
        """Return the answer once it is computed, in main memory. Raises BusyError or GoneError.

        The caller may give up waiting; the work is done all the same, and its answer kept for a repeated question.
        """
        if self.transfer is not None:
            payload = await self.transfer.pinned(payload)
        with self._lock:
            self._check_shape_untrusted(key, kind, payload)
            asker = next(self._numbers)
            answer = self._askers[asker] = Future[Any]()
            self._payloads[asker] = payload
            self._receive(StageCallReceived(asker, key, kind, tokens))
            if self.queue.first_asker(key, kind) != asker:
                self._payloads.pop(asker, None)  # asked again: the first payload is computed
            self._news.set()
        waiting = asyncio.wrap_future(answer)
        waiting.add_done_callback(lambda it: it.cancelled() or it.exception())  # nobody may be waiting any more
        found = await asyncio.shield(waiting)
        return found if self.transfer is None else await self.transfer.arrived(found)

    def check(self, key: Key, kind: Kind) -> None:
        """Raise BusyError or GoneError if `ask` would raise it now.

        Asked before the question's tensors are read, so that a refusal costs a round trip and no transfer.
        """
        with self._lock:
            if (refused := self.queue.refusal(key, kind)) is not None:
                raise _ERRORS[refused.why](refused.reason)

    def _check_shape_untrusted(self, key: Key, kind: Kind, payload: Any) -> None:
        """Raise BadBytesError if a backward's gradient does not have the shape of the forward's answer."""
        forward = self._answers.get(key, {}).get("forward")
        if kind == "backward" and forward is not None:
            needed, got = (getattr(each, "shape", None) for each in (forward, payload))
            if needed != got:
                raise BadBytesError(
                    f"a gradient of shape {tuple(got or ())} for activations of shape {tuple(needed or ())}",
                    code="bad-shape",
                )

    def settle(self, driver: str, settlement: Settlement) -> set[Key]:
        """Apply a driver's settlement; return the acknowledged microbatches for which it comes too late."""
        with self._lock:
            self._news.set()
            (late,) = self._receive(Settles(driver, settlement))
            assert isinstance(late, Late)
            return set(late.keys)

    # ------------------------------------------------------------- the trainer's side

    def next(self) -> Task | Due | None:
        """Return the next work, or None if there is nothing to do. Called by the trainer thread, as are the methods
        below."""
        with self._lock:
            self.has_worker = True
            if not self._next:
                self._news.clear()
                self._receive(Free())
            return self._next.popleft() if self._next else None

    def done(self, task: Task, answer: Any) -> None:
        """Record the answer to a task and send it to whoever asked."""
        with self._lock:
            self._answers.setdefault(task.key, {})[task.kind] = answer
            self._receive(Computed(task.key, task.kind))

    def failed(self, task: Task, error: PeerError) -> None:
        """Report that a task cannot be computed; whoever asked gets the error."""
        with self._lock:
            self._receive(Spoilt(task.key, task.kind, str(error)))

    def open(self) -> None:
        """Compute questions from now on."""
        with self._lock:
            self._receive(Opened())

    def close(self) -> None:
        """Compute nothing for now: everyone who waits or asks is refused."""
        with self._lock:
            self._receive(Closed())
            self._answers.clear()

    @property
    def is_open(self) -> bool:
        """True if questions are computed now."""
        return self.queue.is_open

    def close_batch(self) -> bool:
        """Close the batch as it is, because drivers have no more microbatches; return whether that leaves something to
        do."""
        with self._lock:
            return self.ledger.close_batch()

    @property
    def has_nothing_open(self) -> bool:
        """True if no gradient here may still enter a step."""
        with self._lock:
            return self.ledger.has_nothing_open

    @property
    def num_waiting(self) -> int:
        """Number of questions waiting to be computed."""
        return self.queue.num_waiting

    def wait(self, most_s: float) -> None:
        """Wait until there may be something to do, `most_s` seconds at most."""
        next_s = self.queue.wake_at()
        self._news.wait(most_s if next_s is None else max(0.0, min(most_s, next_s - self.now())))

    # ------------------------------------------------------------- events in, commands out

    def _receive(self, event: QueueEvent) -> list[QueueCommand]:
        commands = self.queue.receive(event, self.now())
        for command in commands:
            match command:
                case AnswerStageCalls():
                    answer = self._answers[command.key][command.kind]
                    for asker in command.askers:
                        self._payloads.pop(asker, None)
                        self._askers.pop(asker).set_result(answer)
                case Refuse():
                    for asker in command.askers:
                        self._payloads.pop(asker, None)
                        self._askers.pop(asker).set_exception(_ERRORS[command.why](command.reason))
                case Compute():
                    payload = self._payloads.pop(command.asker, None)
                    self._next.append(Task(command.key, command.kind, command.tokens, payload, command.work))
                case Late():
                    pass
                case _:
                    if isinstance(command, Forget):
                        self._answers.pop(command.key, None)
                    self._next.append(command)
        return commands

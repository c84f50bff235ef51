"""Driver of microbatches among real peers: executes what `protocol.pipeline.driver` decides.

Runs in the network thread. Tensors are opaque here. The driver keeps each microbatch's input of every stage, so that
any peer of a stage can take over from it, and the last gradient (decision 26).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from swarmtrain.errors import BadBytesError, BusyError, GoneError, PeerError
from swarmtrain.network.tasks import end_tasks, logged
from swarmtrain.protocol.pipeline.balance import StagePeer
from swarmtrain.protocol.pipeline.driver import (
    AskStage,
    Back,
    CancelStageCall,
    DrawMicrobatch,
    DriverEngine,
    DriverPace,
    DrivingCommand,
    DrivingEvent,
    Fault,
    GiveUp,
    Lost,
    MicrobatchDrawn,
    NoMicrobatch,
    NotTold,
    PeersSeen,
    Retried,
    Shut,
    StageCallDone,
    StageCallFailed,
    Tell,
    TimeCame,
    ToldOf,
    Wrong,
)
from swarmtrain.protocol.pipeline.ledger import Key, Settlement
from swarmtrain.protocol.pipeline.router import Router

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tail:
    """Answer of the last stage: the loss, mean nats per token, and the gradient of its input."""

    loss: float
    gradient: Any


@dataclass(frozen=True)
class StageAttempt:
    """One attempt to compute a microbatch at a stage."""

    stage: int
    key: Key
    tokens: int


@dataclass(frozen=True)
class StageResult:
    """Value that the peer of a stage computed, and that peer's incarnation in the stage: a number that changes whenever
    the peer takes the stage anew."""

    value: Any
    incarnation: int


class StageCalls(Protocol):
    """Calls to stages. Each may raise a PeerError: BusyError, GoneError, UnreachableError or BadBytesError."""

    async def forward(self, peer: str, attempt: StageAttempt, x: Any) -> StageResult:
        """Return the input of the next stage."""

    async def backward(self, peer: str, attempt: StageAttempt, gradient: Any) -> StageResult:
        """Return the gradient of the stage's input, given that of its output; None from the first stage."""

    async def tail(self, peer: str, attempt: StageAttempt, x: Any, targets: Any) -> StageResult:
        """Run forward, loss and backward of the last stage; return a `Tail`."""

    async def settle(self, peer: str, stage: int, settlement: Settlement) -> set[Key]:
        """Tell a peer which microbatches count; return the acknowledged ones for which it comes too late."""


class MicrobatchReport(Protocol):
    """Receiver of what a driver reports."""

    def retried(self, sequence: int, stage: int, peer: str, reason: str) -> None:
        """Report that part of a microbatch is asked for again, of the same or another peer."""

    def refused(self, peer: str, error: PeerError) -> None:
        """Report that a peer gave a wrong answer."""

    def lost(self, stage: int, peer: str, key: Key, reason: str) -> None:
        """Report that a computed gradient does not count at this stage."""


@dataclass(frozen=True)
class FinishedMicrobatch:
    """Microbatch that is back: its number and its loss, mean nats per token."""

    sequence: int
    loss: float


@dataclass(eq=False)
class _Held:
    """Tensors kept of a microbatch under way."""

    inputs: list[Any]
    """Input of each stage, None where not known yet."""
    targets: Any
    back: asyncio.Future[FinishedMicrobatch]
    gradient: Any = None
    """Gradient that came back last."""


def _fault(error: PeerError) -> Fault:
    if isinstance(error, BusyError):
        return "busy"
    if isinstance(error, GoneError):
        return "gone"
    return "wrong" if isinstance(error, BadBytesError) else "unreachable"


@dataclass
class Driver:
    """Drives one peer's microbatches. Called from the network thread only."""

    me: str
    routers: Sequence[Router]
    """Router of each stage but the first, which is this peer's own."""
    calls: StageCalls
    told: MicrobatchReport
    now: Callable[[], float]
    next_sequence: int
    """Next number, above all that this peer used in earlier incarnations, which other peers may remember."""
    pace: DriverPace | None = None
    on_draw: Callable[[], None] = lambda: None
    """Called when another microbatch is wanted: answer with `drive`, or with `not_drawn`."""
    engine: DriverEngine = field(init=False)
    _held: dict[int, _Held] = field(default_factory=dict)
    _tasks: dict[int, asyncio.Task[None]] = field(default_factory=dict)
    """Running calls, by number."""
    _settled: asyncio.Event = field(default_factory=asyncio.Event)
    _timer: asyncio.TimerHandle | None = None
    _wakes_s: float = 0.0

    def __post_init__(self) -> None:
        self.engine = DriverEngine(self.me, self.routers, self.next_sequence, self.pace)
        self._settled.set()

    def see(self, peers: Mapping[int, Collection[str]], places: Sequence[StagePeer] = ()) -> None:
        """Update the peers that hold each stage, and the peers' records."""
        self._receive(PeersSeen(peers, places))

    def not_drawn(self) -> None:
        """Report that there is no microbatch to drive at present."""
        self._receive(NoMicrobatch())

    def shut(self) -> None:
        """Ask for no more microbatches."""
        self._receive(Shut())

    async def drive(self, tokens: int, x: Any, targets: Any) -> FinishedMicrobatch:
        """Send some sequences through all stages and back. If cancelled, nothing of them counts.

        Raises the GoneError of this peer's own stage, which then no longer trains.
        """
        sequence = self.engine.next_sequence
        inputs = [x, *[None] * (self.engine.num_stages - 1)]
        held = self._held[sequence] = _Held(inputs, targets, asyncio.get_running_loop().create_future())
        try:
            self._receive(MicrobatchDrawn(tokens))
            return await held.back
        except BaseException:
            self._receive(GiveUp(sequence))
            raise
        finally:
            del self._held[sequence]

    async def settled(self) -> None:
        """Wait until every peer knows what counts, or is given up."""
        while not self.engine.has_told_all:
            await self._settled.wait()

    async def stop(self) -> None:
        """Stop all calls and settlements."""
        if self._timer is not None:
            self._timer.cancel()
        await end_tasks(self._tasks.values())

    # ------------------------------------------------------------- events in, commands out

    def _receive(self, event: DrivingEvent, now: float | None = None) -> None:
        for command in self.engine.receive(event, self.now() if now is None else now):
            self._do(command)
        if self.engine.has_told_all:
            self._settled.set()
        else:
            self._settled.clear()
        wakes_s = self.engine.wake_at()
        if wakes_s is not None and (self._timer is None or wakes_s < self._wakes_s):
            if self._timer is not None:
                self._timer.cancel()
            self._wakes_s = wakes_s
            self._timer = asyncio.get_running_loop().call_later(max(0.0, wakes_s - self.now()), self._time_came)

    def _time_came(self) -> None:
        self._timer = None
        # The timer may fire a little early; without the maximum the engine would find nothing due and set it again.
        self._receive(TimeCame(), max(self.now(), self._wakes_s))

    def _do(self, command: DrivingCommand) -> None:
        match command:
            case AskStage():
                self._start(command.call, self._ask(command, self._held[command.key.sequence]), "asking a stage")
            case CancelStageCall():
                if (task := self._tasks.pop(command.call, None)) is not None:
                    task.cancel()
            case Tell():
                self._start(command.call, self._tell(command), "telling what counts")
            case DrawMicrobatch():
                self.on_draw()
            case Back():
                if (held := self._held.get(command.sequence)) is None or held.back.done():
                    return
                if command.given_up:
                    held.back.set_exception(GoneError(command.given_up))
                else:
                    held.back.set_result(FinishedMicrobatch(command.sequence, command.loss))
            case Retried():
                self.told.retried(command.sequence, command.stage, command.peer, command.reason)
            case Wrong():
                self.told.refused(command.peer, BadBytesError(command.reason, code=command.code))
            case Lost():
                self.told.lost(command.stage, command.peer, command.key, command.reason)

    def _start(self, call: int, work: Coroutine[Any, Any, DrivingEvent | None], what: str) -> None:
        async def run() -> None:
            event = await work
            # A call that was cancelled or replaced is no longer in `_tasks`: its event would be that of an older
            # attempt.
            if self._tasks.pop(call, None) is not None and event is not None:
                self._receive(event)

        self._tasks[call] = logged(asyncio.create_task(run()), what)

    async def _ask(self, ask: AskStage, held: _Held) -> DrivingEvent | None:
        stage, attempt = ask.stage, StageAttempt(ask.stage, ask.key, ask.tokens)
        try:
            if ask.kind == "forward":
                answered = await self.calls.forward(ask.peer, attempt, held.inputs[stage])
            elif ask.kind == "tail":
                answered = await self.calls.tail(ask.peer, attempt, held.inputs[stage], held.targets)
            else:
                answered = await self.calls.backward(ask.peer, attempt, held.gradient)
        except PeerError as error:
            return StageCallFailed(ask.call, _fault(error), str(error), error.code)
        except Exception as error:  # an error of this peer: `drive` raises it
            _log.debug("a microbatch ends with %r", error)
            if not held.back.done():
                held.back.set_exception(error)
            return None
        if ask.call not in self._tasks:
            return None
        loss = 0.0
        if ask.kind == "forward":
            held.inputs[stage + 1] = answered.value
        elif ask.kind == "backward":
            held.gradient = answered.value
        else:
            assert isinstance(answered.value, Tail)
            loss, held.gradient = answered.value.loss, answered.value.gradient
        return StageCallDone(ask.call, answered.incarnation, loss)

    async def _tell(self, tell: Tell) -> DrivingEvent:
        try:
            return ToldOf(tell.call, await self.calls.settle(tell.peer, tell.stage, tell.settlement))
        except PeerError as error:
            return NotTold(tell.call, str(error))

"""Moves among real peers: executes the commands of `protocol.pipeline.moves` one after the other.

The main thread moves and waits for what it asks; other peers' questions are answered in the network thread. A lock
protects the engine.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

from swarmtrain.errors import PeerError, RunTimeError
from swarmtrain.events import MovedEvent, WarningEvent
from swarmtrain.network.daemon import swarm_time
from swarmtrain.peer.pipeline.context import PipelineContext
from swarmtrain.peer.pipeline.stage_assignment import StageAssignment
from swarmtrain.peer.pipeline.stage_record import StageRecord
from swarmtrain.peer.pipeline.stage_service import WireCalls
from swarmtrain.protocol.pipeline import moves
from swarmtrain.protocol.pipeline.moves import (
    AskToStay,
    MoveCommand,
    MoveEngine,
    MoveEvent,
    MovePolicy,
    StayAnswer,
    StayAnswered,
    StayAsked,
)
from swarmtrain.words import short_peer, stages_in_words


class StageMover:
    """Decides which stages a volunteer holds."""

    def __init__(self, me: str, policy: MovePolicy, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock, self._lock = clock, threading.Lock()
        self.engine = MoveEngine(me, policy, random.Random(), clock())

    def asked(self, mover: str, stage: int, holds: Sequence[int], is_known: bool) -> tuple[float, str]:
        """Answer peer `mover`, which wants to leave `stage`: return (seconds for which this peer, which holds `holds`,
        promises to stay in the stage; reason)."""
        (answer,) = self._receive(StayAsked(mover, stage, holds, is_known))
        assert isinstance(answer, StayAnswer)
        return answer.lasts_s, answer.reason

    @property
    def bound(self) -> tuple[int, ...]:
        """Stages that this peer has promised not to leave, for its record."""
        with self._lock:
            return self.engine.bound(self.clock())

    @property
    def is_due(self) -> bool:
        """True if it is time to look for a move."""
        when_s = self.engine.wake_at()
        return when_s is not None and self.clock() >= when_s

    def look(self, event: MoveEvent, do: Callable[[MoveCommand], MoveEvent | None]) -> None:
        """Pass an event to the engine and execute its commands by `do`, until none follow.

        `do` returns the event in which a command results, or None. A PeerError of the peer to be asked counts as its
        refusal.
        """
        events = deque([event])
        while events:
            for command in self._receive(events.popleft()):
                try:
                    came = do(command)
                except PeerError as error:
                    if not isinstance(command, AskToStay):
                        raise
                    reason = f"{short_peer(command.peer)} could not be asked to stay: {error}"
                    came = StayAnswered(command.number, 0.0, reason)
                if came is not None:
                    events.append(came)

    def _receive(self, event: MoveEvent) -> list[MoveCommand]:
        with self._lock:
            return self.engine.receive(event, self.clock())


_log = logging.getLogger(__name__)


class StageMoves:
    """Executes moves on the main thread. Other peers' questions are answered in the network thread."""

    def __init__(
        self,
        pipeline: PipelineContext,
        assignment: StageAssignment,
        record: StageRecord,
        calls: WireCalls,
    ) -> None:
        self._context, self._swarm = pipeline.volunteer, pipeline.swarm
        self._stages, self._mover = pipeline.stages, pipeline.mover
        self._assignment, self._record, self._calls = assignment, record, calls

    def look(self) -> None:
        """Look for the best move if it is time, and make the move if it is this peer's turn."""
        if self._mover.is_due:
            self._mover.look(moves.PlacesSeen(self._record.places(), swarm_time()), self._do)

    def _do(self, command: moves.MoveCommand) -> moves.MoveEvent | None:
        """Execute one command of a move; return what came of it."""
        context, record = self._context, self._record
        match command:
            case moves.AskToStay():
                answer = context.wait(self._calls.ask_to_stay(command.peer, command.stage))
                return moves.StayAnswered(command.number, *answer)
            case moves.Moves():
                record.goes_to(command.change.after)
            case moves.FetchStages():
                try:
                    for stage in command.stages:
                        self._assignment.enter(stage)
                except RunTimeError as error:
                    if context.stop.failure is not None:
                        raise
                    message = f"cannot take {stages_in_words(command.stages)}: {error}"
                    context.emit(WarningEvent(message=message, code="stage-not-taken"))
                    return moves.FetchFailed(str(error))
                return moves.StagesFetched(record.places(), swarm_time())
            case moves.LeaveStages():
                for stage in command.stages:
                    self._assignment.leave(stage)
                record.tell(now=True)
                return moves.StagesLeft()
            case moves.Moved():
                before, after, seconds = command.change.before, command.change.after, record.has_taken()
                context.control.training_stages(after)
                context.emit(MovedEvent(before=before, after=after, reason=command.change.reason, seconds=seconds))
            case moves.StaysHere():
                _log.info("keeping its stage: %s", command.reason)
                if command.had_begun:
                    record.stays()
                    if stages := self._stages.numbers:  # the status said that it was taking another
                        context.control.training_stages(stages)
        return None

    def asked_to_stay(self, asker: str, stage: int) -> tuple[float, str]:
        """Answer `asker`, who wants to leave `stage`: the seconds that this peer promises to stay (0 if it does not),
        and the reason.

        Runs in the network thread.
        """
        info = self._swarm.membership.info(asker)
        is_known = info is not None and info.place is not None and stage in info.place.stages
        return self._mover.asked(asker, stage, self._stages.numbers, is_known)

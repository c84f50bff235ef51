"""Moving among real peers: what `protocol.pipeline.moves` decides, is done here one command after the other.

The main thread moves, and waits for what it asks; what others ask is answered in the network's.
"""

from __future__ import annotations

import random
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

from swarmtrain.errors import PeerError
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
from swarmtrain.words import short_peer

__all__ = ["StageMover"]


class StageMover:
    """The part of a volunteer that decides what it holds."""

    def __init__(self, me: str, policy: MovePolicy, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock, self._lock = clock, threading.Lock()
        self.engine = MoveEngine(me, policy, random.Random(), clock())

    def asked(self, mover: str, stage: int, holds: Sequence[int], is_known: bool) -> tuple[float, str]:
        """`mover` wants to leave `stage`: for how long this peer, which holds these, stays; with the reason."""
        (answer,) = self._receive(StayAsked(mover, stage, holds, is_known))
        assert isinstance(answer, StayAnswer)
        return answer.lasts_s, answer.reason

    @property
    def bound(self) -> tuple[int, ...]:
        """The stages that it has promised not to leave, for its record."""
        with self._lock:
            return self.engine.bound(self.clock())

    @property
    def is_due(self) -> bool:
        """Whether it is time to look."""
        when_s = self.engine.wake_at()
        return when_s is not None and self.clock() >= when_s

    def look(self, event: MoveEvent, do: Callable[[MoveCommand], MoveEvent | None]) -> None:
        """See, decide and move: `do` does what is to be done, and says what came of it; a PeerError of
        whoever was to be asked is its answer."""
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

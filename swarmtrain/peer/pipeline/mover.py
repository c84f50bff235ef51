"""Moves among real peers: executes the commands of `protocol.pipeline.moves` one after the other.

The main thread moves and waits for what it asks; other peers' questions are answered in the network thread. A lock
protects the engine.
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

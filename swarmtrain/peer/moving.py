"""Whether this peer should hold other stages: `protocol.balance` decides, promises make sure of it.

Who leaves a stage has first asked another that holds it to stay for a while (`protocol/promises.py`), and fetches the
new stage before it leaves the old one if its memory holds both.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from swarmtrain.errors import PeerError
from swarmtrain.protocol.balance import Change, Rule, StagePeer, anchor, change_by_queues, may_move_again, my_change
from swarmtrain.protocol.promises import Promise, Request, Stays
from swarmtrain.words import short_peer

__all__ = ["Mover"]

_log = logging.getLogger(__name__)

AskToStay = Callable[[str, int], tuple[float, str]]
"""(peer, stage) -> for how long it promises to stay there, in seconds, 0 if it does not; with the reason. May raise a
PeerError."""


@dataclass
class Mover:
    """The part of a volunteer that decides what it holds. `look` and `may_leave` are the main thread's; what others ask
    is answered in the network's."""

    me: str
    rule: Rule
    balance: str
    """As in the run file."""
    every_s: float
    ask_to_stay: AskToStay
    clock: Callable[[], float] = time.monotonic
    stays: Stays = field(init=False)
    _next_s: float = field(init=False)
    _moved_s: float = float("-inf")
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.stays = Stays(self.me)
        self.wait()

    # ------------------------------------------------------------- asked by others

    def asked(self, mover: str, stage: int, stages: Collection[int]) -> tuple[float, str]:
        """`mover` wants to leave `stage`: for how long this peer, which holds `stages`, stays; with the reason."""
        now = self.clock()
        with self._lock:
            request = Request(stage=stage, mover=mover, anchor=self.me, asked_s=now)
            promise, reason = self.stays.asked(request, stages, now)
        return (0.0 if promise is None else promise.lasts_s), reason

    @property
    def bound(self) -> tuple[int, ...]:
        """The stages that it has promised not to leave, for its record."""
        with self._lock:
            return self.stays.bound(self.clock())

    # ------------------------------------------------------------- deciding

    def wait(self) -> None:
        """Look again after the usual time, a little more or less: not everybody at one moment."""
        self._next_s = self.clock() + self.every_s * random.uniform(0.8, 1.2)

    def look(self, peers: Sequence[StagePeer], now: float) -> Change | None:
        """What this peer should do now, if it is time to look, and if others have promised what that needs. `now` is
        the records' time."""
        if self.balance == "none" or self.clock() < self._next_s:
            return None
        self.wait()
        decide = change_by_queues if self.balance == "queues" else my_change
        change, reason = decide(self.me, peers, now, self.rule)
        may = False
        if change is not None:
            may, reason = may_move_again(change, peers, self.clock() - self._moved_s)
        if change is None or not may:
            _log.debug("stays: %s", reason)
            return None
        return change if self.promised(change, peers, now) else None

    def promised(self, change: Change, peers: Sequence[StagePeer], now: float) -> bool:
        """Whether somebody stays in every stage that it leaves, or was asked to and does."""
        for stage in change.leaves:
            with self._lock:
                if self.stays.may_leave(stage, self.clock())[0]:
                    continue
                may, reason = self.stays.wants_to_leave(stage, self.clock())
            if may:
                reason = self._ask(stage, anchor(self.me, peers, stage, now, self.rule))
                if not reason:
                    continue
            _log.info("does not leave stage %d: %s", stage, reason)
            self.over(change)
            return False
        return True

    def _ask(self, stage: int, peer: str | None) -> str:
        """Have `peer` promise; why it does not, empty if it does."""
        if peer is None:
            return "nobody else holds it"
        request = Request(stage=stage, mover=self.me, anchor=peer, asked_s=self.clock())
        try:
            lasts_s, reason = self.ask_to_stay(peer, stage)
        except PeerError as error:
            return f"{short_peer(peer)} could not be asked to stay: {error}"
        if not lasts_s:
            return reason
        with self._lock:
            self.stays.promised(Promise(request=request, lasts_s=lasts_s))
        return ""

    # ------------------------------------------------------------- leaving

    def may_leave(self, change: Change) -> bool:
        """Whether what it was promised still holds: asked at the moment in which it leaves."""
        with self._lock:
            return all(self.stays.may_leave(stage, self.clock())[0] for stage in change.leaves)

    def moved(self, change: Change) -> None:
        """It has come to what it was to hold."""
        self._moved_s = self.clock()
        self.over(change)

    def over(self, change: Change) -> None:
        """It has left, or does not want to any more."""
        with self._lock:
            for stage in change.leaves:
                self.stays.over(stage)

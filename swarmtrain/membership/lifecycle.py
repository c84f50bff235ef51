"""Who is here: each peer's view of the others, as a table of states.

    unknown -> live -> lost -> live (only a presence newer than the loss brings a peer back)
                    -> left -> live (the same)

Pure: `now` is an argument, every change carries its reason, nothing is sent from here.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from enum import Enum

__all__ = ["Change", "Membership", "PeerInfo", "PeerState"]


class PeerState(Enum):
    """What this peer believes of another."""

    LIVE = "live"
    LOST = "lost"
    LEFT = "left"


@dataclass(frozen=True, kw_only=True)
class PeerInfo:
    """What a peer says of itself in its presence record.

    `stamp` grows with each renewal (the sender's clock, seconds); `steps_per_s` is its inner-step rate.
    """

    peer: str
    name: str = ""
    stamp: float = 0.0
    is_bootstrap: bool = False
    training: bool = False
    round: int = 0
    inner_steps_done: int = 0
    steps_per_s: float = 0.0
    run_tokens: int = 0
    addresses: tuple[str, ...] = ()
    corpus_sha256: str = ""


@dataclass(frozen=True, kw_only=True)
class Change:
    """A peer's state changed: for events and logs."""

    peer: str
    state: PeerState
    reason: str


@dataclass
class _Entry:
    info: PeerInfo
    state: PeerState
    expires_s: float
    heard_s: float
    failures: int = 0
    failing_since_s: float = 0.0


@dataclass
class Membership:
    """The table. Times are seconds of one clock that the caller passes in as `now`.

    A peer is lost when its presence has expired, or when calls to it have failed `max_failures` times in a row
    over at least `grace_s`, with nothing heard from it in between.
    """

    me: str
    max_failures: int = 2
    grace_s: float = 1.0
    _entries: dict[str, _Entry] = field(default_factory=dict)

    def saw_presence(self, info: PeerInfo, expires_s: float, now: float) -> Change | None:
        """A presence record of `info.peer`, valid until `expires_s`. Returns the change, if any."""
        if info.peer == self.me:
            return None
        entry = self._entries.get(info.peer)
        if entry is None:
            self._entries[info.peer] = _Entry(info, PeerState.LIVE, expires_s, now)
            return Change(peer=info.peer, state=PeerState.LIVE, reason="its presence was seen for the first time")
        if info.stamp <= entry.info.stamp:
            return None
        was = entry.state
        entry.info, entry.expires_s, entry.heard_s = info, expires_s, now
        entry.failures, entry.state = 0, PeerState.LIVE
        if was is PeerState.LIVE:
            return None
        return Change(peer=info.peer, state=PeerState.LIVE, reason=f"it renewed its presence after it had {was.value}")

    def heard(self, peer: str, now: float, *, round: int | None = None, inner_steps_done: int | None = None) -> None:
        """An answer from `peer` to a call: it lives, and may have told how far it is."""
        entry = self._entries.get(peer)
        if entry is None:
            return
        entry.heard_s, entry.failures = now, 0
        if round is not None and round >= entry.info.round:
            done = inner_steps_done if inner_steps_done is not None else entry.info.inner_steps_done
            entry.info = dataclasses.replace(entry.info, round=round, inner_steps_done=done)

    def call_failed(self, peer: str, now: float, reason: str) -> Change | None:
        """A call to `peer` failed. Returns the change to LOST once it has failed often and long enough."""
        entry = self._entries.get(peer)
        if entry is None or entry.state is not PeerState.LIVE:
            return None
        if entry.failures == 0:
            entry.failing_since_s = now
        entry.failures += 1
        if entry.failures >= self.max_failures and now - entry.failing_since_s >= self.grace_s:
            entry.state = PeerState.LOST
            return Change(peer=peer, state=PeerState.LOST, reason=reason)
        return None

    def left(self, peer: str, now: float) -> Change | None:
        """`peer` said goodbye."""
        entry = self._entries.get(peer)
        if entry is None or entry.state is PeerState.LEFT:
            return None
        entry.state, entry.heard_s = PeerState.LEFT, now
        return Change(peer=peer, state=PeerState.LEFT, reason="it said goodbye")

    def expire(self, now: float) -> list[Change]:
        """Turn peers whose presence has run out, and from whom nothing was heard since, to LOST."""
        changes = []
        for peer, entry in self._entries.items():
            if entry.state is PeerState.LIVE and max(entry.expires_s, entry.heard_s + 5.0) < now:
                entry.state = PeerState.LOST
                changes.append(Change(peer=peer, state=PeerState.LOST, reason="its presence expired"))
        return changes

    def state(self, peer: str) -> PeerState | None:
        """What is believed of `peer`; None if it was never seen."""
        entry = self._entries.get(peer)
        return None if entry is None else entry.state

    def info(self, peer: str) -> PeerInfo | None:
        """The newest presence of `peer`; None if it was never seen."""
        entry = self._entries.get(peer)
        return None if entry is None else entry.info

    def heard_s(self, peer: str) -> float:
        """When `peer` was last heard of; minus infinity if never."""
        entry = self._entries.get(peer)
        return float("-inf") if entry is None else entry.heard_s

    def live(self) -> list[PeerInfo]:
        """Everyone believed alive, the bootstrap included, by PeerID."""
        return [self._entries[p].info for p in sorted(self._entries) if self._entries[p].state is PeerState.LIVE]

    def volunteers(self) -> list[PeerInfo]:
        """The live peers that train, by PeerID."""
        return [info for info in self.live() if info.training and not info.is_bootstrap]

"""Who is here: each peer's view of the others, as a table of states.

    unknown -> live -> lost -> live (only a presence newer than the loss brings a peer back)
                    -> left -> live (the same)

Pure: `now` is an argument, every change carries its reason, nothing is sent from here.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from enum import Enum
from operator import itemgetter

from swarmtrain.protocol.pipeline.balance import StagePeer

__all__ = ["MAX_PEERS", "Membership", "MembershipChange", "PeerInfo", "PeerState"]

MAX_PEERS = 4096
"""A table of this many peers takes no more strangers by hearsay or records."""


class PeerState(Enum):
    """What this peer believes of another."""

    LIVE = "live"
    LOST = "lost"
    LEFT = "left"


@dataclass(frozen=True, kw_only=True, slots=True)
class PeerInfo:
    """What a peer says of itself in its presence record.

    `stamp` grows with each renewal: seconds of the sender's clock, which agrees with the reader's `now` within a
    second or so. `steps_per_s` is its inner-step rate; its round takes `inner_steps` (0: not known) and has done
    `inner_steps_done`; `part` is the newest publication of its round (0: none yet) and `part_tokens` what that counts.
    `loss` is its mean training loss over its last round, nats per token (0: not known). `settled`: the run is over, and
    it needs nothing more from others. `hidden`: nobody can dial it; only over a
    connection that it has opened itself can it be called, and its publications are had through its `hosts`. `place`: in
    a pipeline, what it holds and how fast it is.
    """

    peer: str
    name: str = ""
    stamp: float = 0.0
    is_bootstrap: bool = False
    training: bool = False
    round: int = 0
    part: int = 0
    part_tokens: int = 0
    inner_steps: int = 0
    inner_steps_done: int = 0
    steps_per_s: float = 0.0
    loss: float = 0.0
    run_tokens: int = 0
    settled: bool = False
    addresses: tuple[str, ...] = ()
    hidden: bool = False
    hosts: tuple[str, ...] = ()
    corpus_sha256: str = ""
    place: StagePeer | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class MembershipChange:
    """A peer's state changed: for events and logs."""

    peer: str
    state: PeerState
    reason: str


@dataclass(slots=True)
class _Entry:
    info: PeerInfo
    state: PeerState
    expires_s: float
    heard_s: float
    so_far_since_s: float
    told_s: float = float("-inf")
    away_since_s: float = float("-inf")
    losses: int = 0
    failures: int = 0
    failing_since_s: float = 0.0
    has_answered: bool = False


@dataclass
class Membership:
    """The table. Times are seconds of one clock that the caller passes in as `now`.

    A peer is lost when its presence has expired, or when calls to it have failed `max_failures` times in a row
    over at least `grace_s`, with nothing heard from it in between. If it is lost so again and again, though its
    presence is renewed (others can reach it, this peer cannot), it is believed back after 10, 20, 40, ... seconds
    only: each return would cost a silence. Of a hidden peer its presence alone decides: calls to it may well fail.
    """

    me: str
    max_failures: int = 2
    grace_s: float = 1.0
    version: int = field(default=0, init=False)
    """Grows when somebody comes or goes, or tells something new: whoever has seen this version has seen it all."""
    told_for_s: float = 10.0
    """What a peer told of its round in a call is believed this long against a presence that says less, in seconds."""
    _entries: dict[str, _Entry] = field(default_factory=dict)
    _live: dict[str, _Entry] = field(default_factory=dict)
    """Those of them that are believed alive."""
    _displaced: list[str] = field(default_factory=list)
    """Who made room for others and is still to be told of by `forget`."""

    def saw_presence(
        self, info: PeerInfo, expires_s: float, now: float, *, answered: bool = False
    ) -> MembershipChange | None:
        """A presence record of `info.peer`, valid until `expires_s`; `answered`: to a call of ours. Returns the change,
        if any."""
        if info.peer == self.me:
            return None
        entry, told_at_s = self._entries.get(info.peer), min(now, info.stamp)
        if entry is None:
            if expires_s < now or not self._make_room(answered):
                return None
            entry = _Entry(info, PeerState.LIVE, expires_s, heard_s=told_at_s, so_far_since_s=told_at_s)
            entry.has_answered = answered
            self._entries[info.peer] = self._live[info.peer] = entry
            self.version += 1
            return MembershipChange(
                peer=info.peer, state=PeerState.LIVE, reason="its presence was seen for the first time"
            )
        if info.stamp <= entry.info.stamp:
            return None
        was = entry.state
        if expires_s < now or (was is not PeerState.LIVE and info.stamp <= entry.away_since_s):
            return None
        banned = was is PeerState.LOST and entry.losses > 1 and not info.hidden
        if banned and now < entry.away_since_s + self._ban_s(entry.losses):
            return None
        if was is not PeerState.LIVE:  # a renewal says that it lives, not that calls reach it
            entry.failures = 0
        if now < entry.told_s + self.told_for_s and info.round <= entry.info.round:
            told = entry.info
            info = dataclasses.replace(info, round=told.round, inner_steps_done=told.inner_steps_done)
        if (info.round, info.inner_steps_done) != (entry.info.round, entry.info.inner_steps_done):
            entry.so_far_since_s = told_at_s
        entry.info, entry.expires_s, entry.state = info, expires_s, PeerState.LIVE
        entry.heard_s = max(entry.heard_s, told_at_s)
        self._live[info.peer] = entry
        self.version += 1  # last: the trainer's thread may look in between
        if was is PeerState.LIVE:
            return None
        return MembershipChange(
            peer=info.peer, state=PeerState.LIVE, reason=f"it renewed its presence after it had {was.value}"
        )

    def heard(self, peer: str, now: float, *, round: int | None = None, inner_steps_done: int | None = None) -> None:
        """An answer from `peer` to a call: it lives, and may have told how far it is."""
        entry = self._entries.get(peer)
        if entry is None:
            return
        entry.heard_s, entry.failures, entry.losses, entry.has_answered = now, 0, 0, True
        if round is not None:
            entry.told_s = now
            done = inner_steps_done if inner_steps_done is not None else entry.info.inner_steps_done
            if (round, done) != (entry.info.round, entry.info.inner_steps_done):
                entry.info = dataclasses.replace(entry.info, round=round, inner_steps_done=done)
                entry.so_far_since_s = now
                self.version += 1

    def call_failed(self, peer: str, now: float, reason: str) -> MembershipChange | None:
        """A call to `peer` failed. Returns the change to LOST once it has failed often and long enough."""
        entry = self._entries.get(peer)
        if entry is None or entry.state is not PeerState.LIVE or entry.info.hidden:
            return None
        if entry.failures == 0:
            entry.failing_since_s = now
        entry.failures += 1
        if entry.failures >= self.max_failures and now - entry.failing_since_s >= self.grace_s:
            self._lose(entry, entry.failing_since_s)
            entry.losses += 1
            return MembershipChange(peer=peer, state=PeerState.LOST, reason=reason)
        return None

    @staticmethod
    def _ban_s(losses: int) -> float:
        return 10.0 * 2.0 ** min(losses - 2, 6)

    def _lose(self, entry: _Entry, since_s: float) -> None:
        entry.state, entry.away_since_s = PeerState.LOST, since_s
        del self._live[entry.info.peer]
        self.version += 1

    def forgive(self) -> None:
        """Calls that have failed so far say nothing: they were not the others' fault."""
        for entry in self._entries.values():
            entry.failures = 0

    def resume(self, now: float, *, forgives: bool = True) -> None:
        """This process itself stood still until `now`: what it missed in that time is nobody else's silence, nor what
        failed unless it `forgives` nothing."""
        if forgives:
            self.forgive()
        for entry in self._live.values():
            entry.heard_s = now

    def left(self, peer: str, now: float) -> MembershipChange | None:
        """`peer` said goodbye."""
        entry = self._entries.get(peer)
        if entry is None or entry.state is PeerState.LEFT:
            return None
        entry.state, entry.heard_s, entry.away_since_s = PeerState.LEFT, now, now
        self._live.pop(peer, None)
        self.version += 1
        return MembershipChange(peer=peer, state=PeerState.LEFT, reason="it said goodbye")

    def expire(self, now: float) -> list[MembershipChange]:
        """Turn peers whose presence has run out, and from whom nothing was heard since, to LOST."""
        changes = []
        for peer, entry in list(self._live.items()):
            if entry.expires_s < now and entry.heard_s + 5.0 < now:
                self._lose(entry, entry.info.stamp)
                changes.append(MembershipChange(peer=peer, state=PeerState.LOST, reason="its presence expired"))
        return changes

    def has_room_for(self, peer: str) -> bool:
        """Whether it is known, or strangers may still be added: identities cost nothing, so the table is bounded."""
        return peer in self._entries or len(self._entries) < MAX_PEERS

    def _make_room(self, answered: bool) -> bool:
        """Whether one more fits in. In a full table those give way that are gone and were heard of longest ago, and to
        one that has answered one that never has: who answers is no invention."""
        if len(self._entries) < MAX_PEERS:
            return True
        if len(self._entries) > len(self._live):
            gone = [(entry.heard_s, peer) for peer, entry in self._entries.items() if entry.state is not PeerState.LIVE]
            displaced = [peer for _, peer in sorted(gone)[: max(1, MAX_PEERS // 64)]]  # a look at all is not for one
        else:
            displaced = [peer for peer, entry in self._live.items() if answered and not entry.has_answered][:1]
        for peer in displaced:
            del self._entries[peer]
            self._live.pop(peer, None)
        self._displaced += displaced
        self.version += 1
        return bool(displaced)

    def forget(self, before_s: float) -> list[str]:
        """Drop peers that are gone and of whom nothing was heard since `before_s`; returns them, and whom others have
        displaced since."""
        gone = [
            peer
            for peer, entry in self._entries.items()
            if entry.state is not PeerState.LIVE and max(entry.heard_s, entry.away_since_s) < before_s
        ]
        for peer in gone:
            del self._entries[peer]
        gone += [peer for peer in self._displaced if peer not in self._entries]
        self._displaced.clear()
        return gone

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

    def heard_at_s(self) -> dict[str, float]:
        """When each of `volunteers` was last heard of, by PeerID."""
        return {peer: entry.heard_s for peer, entry in self._training()}

    def known(self) -> list[PeerInfo]:
        """Everyone in the table, whatever is believed of them, by PeerID."""
        return [entry.info for _, entry in _sorted(self._entries)]

    def live(self) -> list[PeerInfo]:
        """Everyone believed alive, the bootstrap included, by PeerID."""
        return [entry.info for _, entry in _sorted(self._live)]

    def volunteers(self) -> list[PeerInfo]:
        """The live peers that train, by PeerID."""
        return [entry.info for _, entry in self._training()]

    def answering(self) -> list[PeerInfo]:
        """Those of `volunteers` to whom the last call did not fail, by PeerID. One that was killed is believed
        alive until its presence has run out."""
        return [entry.info for _, entry in self._training() if not entry.failures]

    def so_far_since_s(self, peer: str) -> float:
        """Since when `peer` is known to be as far in its round as it is: it may have stood still for long, and tell
        that anew. Minus infinity of who is not known."""
        entry = self._entries.get(peer)
        return float("-inf") if entry is None else entry.so_far_since_s

    def _training(self) -> list[tuple[str, _Entry]]:
        return [one for one in _sorted(self._live) if one[1].info.training and not one[1].info.is_bootstrap]


def _sorted(entries: dict[str, _Entry]) -> list[tuple[str, _Entry]]:
    """A copy: the trainer's thread may ask while the network's changes the table."""
    return sorted(entries.items(), key=itemgetter(0))

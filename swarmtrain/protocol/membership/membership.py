"""Membership: each peer's view of the others, as a table of states; the end of the run; the median of their clocks.

    unknown -> live -> lost -> live    (a presence newer than the loss brings a peer back, or a call of its own)
                    -> left -> live    (only a presence newer than the goodbye)

Everything here is pure: `now` is an argument, every change carries its reason, and nothing is sent from here.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from operator import itemgetter

from swarmtrain.protocol.pipeline.balance import StagePeer
from swarmtrain.protocol.rounds.roles import LinkRates
from swarmtrain.protocol.tokens.progress import Progress

MAX_PEERS = 4096
"""Limit of the table. Strangers that are only known from records or from other peers do not enter a full one."""


class PeerState(Enum):
    """State of another peer, as far as this one knows."""

    LIVE = "live"
    LOST = "lost"
    LEFT = "left"


@dataclass(frozen=True, kw_only=True, slots=True)
class PeerInfo:
    """Contents of a peer's presence record.

    - `stamp` grows with each renewal: seconds of the sender's clock, which agrees with the reader's `now` within about
      a second.
    - `round`: the peer's own round, of which it has done `inner_steps_done` of `inner_steps` (0: unknown).
    - `part`: the newest publication of its round (0: none yet); `part_tokens`: the tokens in it.
    - `steps_per_s`: its inner steps a second.
    - `loss`: mean training loss over its last round, nats per token (0: unknown).
    - `device`: what it trains on, for people ("": unknown).
    - `adapter_groups`: groups of an adapter that it trains in each round (0: all).
    - `is_finished`: the run is over, and the peer needs nothing more from others.
    - `hidden`: nobody can dial it. It can be called only over connections that it has opened itself; its publications
      are served by its `hosts`.
    - `place`: in a pipeline, the stages that it holds and its speed there.
    - `link`: its link as it has measured it (None: it is of a version that tells none).
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
    device: str = ""
    adapter_groups: int = 0
    run_tokens: int = 0
    is_finished: bool = False
    addresses: tuple[str, ...] = ()
    hidden: bool = False
    hosts: tuple[str, ...] = ()
    corpus_sha256: str = ""
    place: StagePeer | None = None
    link: LinkRates | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class MembershipChange:
    """Change of a peer's state, for events and logs."""

    peer: str
    state: PeerState
    reason: str


@dataclass(slots=True)
class _Entry:
    """Row of the table."""

    info: PeerInfo
    state: PeerState
    expires_s: float
    """Time at which its newest presence expires."""
    heard_s: float
    """Time when it last said anything, by a call or a record."""
    so_far_since_s: float
    """Time since which the peer is known to be at its present inner step."""
    told_s: float = float("-inf")
    """Time of the last call in which the peer reported its progress."""
    away_since_s: float = float("-inf")
    """Time of the peer's last loss or goodbye; an older presence does not bring it back."""
    losses: int = 0
    """Number of times that the peer was lost by failed calls since it last answered one."""
    failures: int = 0
    """Failed calls in a row."""
    failing_since_s: float = 0.0
    failed_s: float = 0.0
    """Time of the last failed call to it."""
    called_s: float = float("-inf")
    """Time of its own last call."""
    has_answered: bool = False


@dataclass
class Membership:
    """Table of the other peers. Times are seconds of one clock that the caller passes as `now`.

    A peer is lost when its presence has expired, or when calls to it have failed `max_failures` times in a row over at
    least `grace_s` with nothing heard from it in between. A peer that is lost in the second way again and again
    although its presence is renewed (others can reach it, this peer cannot) comes back only after 10, 20, 40, ...
    seconds, because in synchronous rounds each return would cost a silence. For a hidden peer only its presence counts,
    since calls to it may well fail.
    """

    me: str
    max_failures: int = 2
    grace_s: float = 1.0
    version: int = field(default=0, init=False)
    """Grows whenever a peer comes, goes or advertises something new, so that readers can skip an unchanged table."""
    told_for_s: float = 10.0
    """Seconds for which a round learned from a call counts, even if a presence record says less."""
    _entries: dict[str, _Entry] = field(default_factory=dict)
    _live: dict[str, _Entry] = field(default_factory=dict)
    """Entries of peers believed alive."""
    _displaced: list[str] = field(default_factory=list)
    """Peers that made room for others, to be returned by the next `forget`."""

    def saw_presence(
        self, info: PeerInfo, expires_s: float, now: float, *, answered: bool = False
    ) -> MembershipChange | None:
        """Record a presence record of `info.peer`, valid until `expires_s`. Return the change of state, if any.

        `answered`: the record came as an answer to a call of this peer.
        """
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
        if self._is_banned(entry, now, hidden=info.hidden):
            return None
        if was is not PeerState.LIVE:  # a renewal shows that it is alive, not that calls reach it
            entry.failures = 0
        # A record may have been written before the call in which the peer said that it is further.
        if now < entry.told_s + self.told_for_s and info.round <= entry.info.round:
            told = entry.info
            info = dataclasses.replace(info, round=told.round, inner_steps_done=told.inner_steps_done)
        if (info.round, info.inner_steps_done) != (entry.info.round, entry.info.inner_steps_done):
            entry.so_far_since_s = told_at_s
        entry.info, entry.expires_s, entry.state = info, expires_s, PeerState.LIVE
        entry.heard_s = max(entry.heard_s, told_at_s)
        self._live[info.peer] = entry
        self.version += 1  # last, because the trainer's thread may read in between
        if was is PeerState.LIVE:
            return None
        return MembershipChange(
            peer=info.peer, state=PeerState.LIVE, reason=f"it renewed its presence after it had {was.value}"
        )

    def heard(self, peer: str, now: float, *, round: int | None = None, inner_steps_done: int | None = None) -> None:
        """Record that `peer` answered a call: it is alive, and may have said how far it is."""
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
        """Record that a call to `peer` failed. Return the change to LOST once calls have failed often and long
        enough."""
        entry = self._entries.get(peer)
        if entry is None or entry.state is not PeerState.LIVE or entry.info.hidden:
            return None
        if entry.failures == 0:
            entry.failing_since_s = now
        entry.failures, entry.failed_s = entry.failures + 1, now
        if entry.failures >= self.max_failures and now - entry.failing_since_s >= self.grace_s:
            self._lose(entry, entry.failing_since_s)
            entry.losses += 1
            return MembershipChange(peer=peer, state=PeerState.LOST, reason=reason)
        return None

    def was_called_by(self, peer: str, now: float) -> MembershipChange | None:
        """Record that `peer` has called this one. Return the change if that brings back a peer that was lost.

        It hung, or its link was cut, and that is over before anybody reads its next presence.
        """
        entry = self._entries.get(peer)
        if entry is None:
            return None
        entry.called_s = now
        if entry.state is not PeerState.LOST:
            return None
        if self._is_banned(entry, now, hidden=entry.info.hidden):
            return None
        entry.failures, entry.heard_s, entry.state = 0, now, PeerState.LIVE
        self._live[peer] = entry
        self.version += 1
        return MembershipChange(peer=peer, state=PeerState.LIVE, reason="it called after it had been lost")

    def _is_banned(self, entry: _Entry, now: float, *, hidden: bool) -> bool:
        """Return whether a lost peer must wait: others reach it, this peer does not, and calls would fail again."""
        is_lost_again = entry.state is PeerState.LOST and entry.losses > 1 and not hidden
        return is_lost_again and now < entry.away_since_s + self._ban_s(entry.losses)

    @staticmethod
    def _ban_s(losses: int) -> float:
        return 10.0 * 2.0 ** min(losses - 2, 6)

    def _lose(self, entry: _Entry, since_s: float) -> None:
        entry.state, entry.away_since_s = PeerState.LOST, since_s
        del self._live[entry.info.peer]
        self.version += 1

    def forgive(self) -> None:
        """Forget all failed calls so far, because they were not the other peers' fault."""
        for entry in self._entries.values():
            entry.failures = 0

    def resume(self, now: float, *, forgives: bool = True) -> None:
        """Record that this process was suspended until `now`.

        What it missed in that time does not count as other peers' silence. With `forgives`, failed calls do not count
        either.
        """
        if forgives:
            self.forgive()
        for entry in self._live.values():
            entry.heard_s = now

    def left(self, peer: str, now: float) -> MembershipChange | None:
        """Record that `peer` said goodbye."""
        entry = self._entries.get(peer)
        if entry is None or entry.state is PeerState.LEFT:
            return None
        entry.state, entry.heard_s, entry.away_since_s = PeerState.LEFT, now, now
        self._live.pop(peer, None)
        self.version += 1
        return MembershipChange(peer=peer, state=PeerState.LEFT, reason="it said goodbye")

    def expire(self, now: float) -> list[MembershipChange]:
        """Mark as LOST all peers whose presence has expired and from which nothing was received since."""
        changes = []
        for peer, entry in list(self._live.items()):
            # A peer that has just answered is alive, although its next record is late in the DHT.
            if entry.expires_s < now and entry.heard_s + 5.0 < now:
                self._lose(entry, entry.info.stamp)
                changes.append(MembershipChange(peer=peer, state=PeerState.LOST, reason="its presence expired"))
        return changes

    def has_room_for(self, peer: str) -> bool:
        """Return whether `peer` is in the table or would fit. The table is limited, because identities cost nothing."""
        return peer in self._entries or len(self._entries) < MAX_PEERS

    def _make_room(self, answered: bool) -> bool:
        """Return whether one more peer fits.

        In a full table the peers that are gone give way, those not heard from for longest first. If none is gone, a
        live peer that has never answered a call gives way to one that has: a peer that answers exists.
        """
        if len(self._entries) < MAX_PEERS:
            return True
        if len(self._entries) > len(self._live):
            gone = [(entry.heard_s, peer) for peer, entry in self._entries.items() if entry.state is not PeerState.LIVE]
            # several at once, because the search looks at the whole table
            displaced = [peer for _, peer in sorted(gone)[: max(1, MAX_PEERS // 64)]]
        else:
            displaced = [peer for peer, entry in self._live.items() if answered and not entry.has_answered][:1]
        for peer in displaced:
            del self._entries[peer]
            self._live.pop(peer, None)
        self._displaced += displaced
        self.version += 1
        return bool(displaced)

    def forget(self, before_s: float) -> list[str]:
        """Drop peers that are gone and were not heard from since `before_s`; return them, and those displaced since the
        last call."""
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
        """Return the state that this peer believes `peer` to be in; None if `peer` is unknown."""
        entry = self._entries.get(peer)
        return None if entry is None else entry.state

    def info(self, peer: str) -> PeerInfo | None:
        """Return the newest presence of `peer`; None if it is unknown."""
        entry = self._entries.get(peer)
        return None if entry is None else entry.info

    def heard_s(self, peer: str) -> float:
        """Return the time at which anything was last received from `peer`; -inf if never."""
        entry = self._entries.get(peer)
        return float("-inf") if entry is None else entry.heard_s

    def heard_at_s(self) -> dict[str, float]:
        """Map each of `volunteers` to the time at which anything was last received from it."""
        return {peer: entry.heard_s for peer, entry in self._training()}

    def known(self) -> list[PeerInfo]:
        """Return all peers in the table, in whatever state, by PeerID."""
        return [entry.info for _, entry in _sorted(self._entries)]

    def live(self) -> list[PeerInfo]:
        """Return all peers believed alive, bootstraps included, by PeerID."""
        return [entry.info for _, entry in _sorted(self._live)]

    def volunteers(self) -> list[PeerInfo]:
        """Return the live peers that train, by PeerID."""
        return [entry.info for _, entry in self._training()]

    def answering(self) -> list[PeerInfo]:
        """Return those of `volunteers` to which the last call did not fail, by PeerID.

        A killed peer is believed alive until its presence expires, but calls to it fail at once.
        """
        return [entry.info for _, entry in self._training() if not entry.failures]

    def measurer(self) -> str:
        """Return who measures the held-out loss: a bootstrap, and while none is here the volunteer whose PeerID comes
        first, perhaps this peer. Views may differ for a moment, and two peers measure."""
        live = self.live()
        bootstraps = [info.peer for info in live if info.is_bootstrap]
        return min(bootstraps or [self.me, *(info.peer for info in live if info.training)])

    def in_touch(self) -> list[PeerInfo]:
        """Return those of `volunteers` to which the last call did not fail, or that have called since, by PeerID.

        Who was cut off, and calls nobody while it computes, would else take all for gone.
        """
        return [one.info for _, one in self._training() if not one.failures or one.called_s > one.failed_s]

    def so_far_since_s(self, peer: str) -> float:
        """Return since when `peer` is known to be at its present step; -inf if it is unknown.

        A record may repeat an old position, so its time alone does not say when the peer got there.
        """
        entry = self._entries.get(peer)
        return float("-inf") if entry is None else entry.so_far_since_s

    def _training(self) -> list[tuple[str, _Entry]]:
        return [one for one in _sorted(self._live) if one[1].info.training and not one[1].info.is_bootstrap]


def _sorted(entries: dict[str, _Entry]) -> list[tuple[str, _Entry]]:
    """Return a sorted copy, because the trainer's thread may read while the network's thread changes the table."""
    return sorted(entries.items(), key=itemgetter(0))


LATELY_S = 30.0
"""Seconds for which an arrival counts as recent."""
_OLD = (("round", "rounds behind"), ("shards", ""))
"""Rules that an honest newcomer may break, each with words of the refusal's message; a peer that breaks any other rule
is named at once."""
_MAX_PEERS = 1024


@dataclass
class Arrivals:
    """Times at which other peers, and this one, arrived."""

    _came_s: dict[str, float] = field(default_factory=dict)
    _own_s: float = float("inf")

    def came(self, peer: str, now: float) -> None:
        """Record that `peer` has arrived, for the first time or again."""
        self._came_s.pop(peer, None)
        self._came_s[peer] = now
        while len(self._came_s) > _MAX_PEERS:
            del self._came_s[next(iter(self._came_s))]

    def came_myself(self, now: float) -> None:
        """Record that this peer has arrived."""
        self._own_s = now

    def spares(self, peer: str, rule: str, detail: str, now: float) -> bool:
        """Return whether breaking `rule` is not reported yet.

        That is so if this peer, `peer`, or a peer that `detail` mentions has arrived recently.
        """
        if not any(rule == old and words in detail for old, words in _OLD):
            return False
        lately = [other for other, came_s in self._came_s.items() if now < came_s + LATELY_S]
        return now < self._own_s + LATELY_S or any(other == peer or other in detail for other in lately)


_RETURNS_S = 120.0
"""Seconds within which a peer that went away may come back."""


def still_needed(membership: Membership, last: Progress) -> str:
    """Return the reason why a peer with the run's `last` state should stay; "" if nobody needs it.

    The archive must have that state; a bootstrap that is gone may be on its way back. Live volunteers that have not
    merged the last round may need its bytes.
    """
    for info in membership.known():
        live = membership.state(info.peer) is PeerState.LIVE
        if info.is_bootstrap:
            if info.run_tokens < last.run_tokens:
                return f"the archive of {info.name or info.peer} does not have the last state yet"
        elif live and info.training and info.round < last.round:
            return f"{info.name or info.peer} has not merged the last round yet"
    return ""


def still_needed_apart(membership: Membership, total_tokens: int) -> str:
    """Return the same as `still_needed` for runs in which each peer has its own weights.

    The archive must have been made after `total_tokens`, and every volunteer must have its consensus of the last
    weights.
    """
    for info in membership.known():
        live = membership.state(info.peer) is PeerState.LIVE
        if info.is_bootstrap:
            if info.run_tokens < total_tokens:
                return f"the archive of {info.name or info.peer} does not have the last weights yet"
        elif live and info.training and not info.is_finished:
            return f"{info.name or info.peer} does not have the last weights yet"
    return ""


def may_come_back(
    membership: Membership, last: Progress, since_s: float, now: float, total_tokens: int | None = None
) -> str:
    """Return the reason why the archive with the run's `last` state should stay; "" if nobody needs it.

    Volunteers must have said goodbye. One that went away recently without that state may be on its way back; it would
    find nobody, and train the rest of the run once more, alone. An archive that has been here only since `since_s` may
    not have seen who went away. If each peer counts its own rounds, `total_tokens` decides who has reached the end.
    """
    if since_s > now - _RETURNS_S:
        strangers = sorted(peer for peer in last.peer_tokens if membership.state(peer) is None)
        if strangers:
            return f"{strangers[0]} has trained and was not seen since; it may come back"
    for info in membership.known():
        if info.is_bootstrap or not info.training:
            continue
        name = info.name or info.peer
        if membership.state(info.peer) is PeerState.LIVE:
            return f"{name} has not left yet"
        behind = info.round < last.round if total_tokens is None else info.run_tokens < total_tokens
        if behind and membership.heard_s(info.peer) > now - _RETURNS_S:
            return f"{name} went away before the end, and may come back"
    return ""


_TOLERANCE_S = 1.0
"""Offsets below this are not corrected."""
_OUTLIER_S = 60.0
"""Difference from the result above which a clock is an outlier."""
MOST_CORRECTED_S = 600.0
"""Largest offset that is corrected without asking the user."""


@dataclass(frozen=True, kw_only=True)
class ClockVerdict:
    """Correction of this clock (0 if it is within a second), and the peers whose clocks are outliers, with their
    offsets."""

    offset_s: float = 0.0
    outliers: tuple[tuple[str, float], ...] = ()

    @property
    def is_doubtful(self) -> bool:
        """True if the user must decide."""
        return abs(self.offset_s) > MOST_CORRECTED_S


def judge_clock(offsets_s: Mapping[str, float]) -> ClockVerdict:
    """Return the median of the offsets by PeerID, ignoring those that are not finite.

    Of two in the middle the one closer to zero is taken: of an honest peer and a liar neither value nor their mean is
    known to be right, and so this machine's own clock counts too.
    """
    told = {peer: offset_s for peer, offset_s in offsets_s.items() if math.isfinite(offset_s)}
    if not told:
        return ClockVerdict()
    ordered = sorted(told.values())
    middle = ordered[(len(ordered) - 1) // 2 : len(ordered) // 2 + 1]
    offset_s = min(middle, key=abs)
    far = tuple((peer, other_s) for peer, other_s in sorted(told.items()) if abs(other_s - offset_s) > _OUTLIER_S)
    return ClockVerdict(offset_s=0.0 if abs(offset_s) < _TOLERANCE_S else offset_s, outliers=far)

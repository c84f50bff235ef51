"""Pulls of one fragment that have begun and not ended, and peers that are not asked again for now.

Everything here is pure: `now` is an argument. `partners` chooses peers, `pulls` the times.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import TypeAlias

from swarmtrain.protocol.gossip.partners import BackOff
from swarmtrain.protocol.gossip.pulls import GroupName, idle_s

Which: TypeAlias = tuple[GroupName, str]
"""Tensor group, and the PeerID of its author."""


@dataclass(eq=False, slots=True)
class OpenPull:
    """Pull of one tensor group of one peer."""

    group: GroupName
    peer: str
    began_s: float
    failed: set[str]
    """Peers that have failed in the round in which this pull began."""


@dataclass
class OpenPulls:
    """Open pulls of one fragment, at most `most` at once.

    The argument `here` is always what has arrived and waits for the merge.
    """

    back_off: BackOff
    most: int
    begun: dict[Which, OpenPull] = field(default_factory=dict)
    _idle_until_s: dict[Which, float] = field(default_factory=dict)
    _failed: set[str] = field(default_factory=set)

    def round_begins(self, now: float) -> None:
        """Allow peers that failed in the last round to be asked again. Open pulls continue."""
        self._failed = set()
        self._idle_until_s = {which: until_s for which, until_s in self._idle_until_s.items() if now < until_s}

    # ------------------------------------------------------------- whom to ask

    def is_wanted(
        self, group: GroupName, num_due: int, here: Collection[Which], slow_after_s: float, now: float
    ) -> bool:
        """Return whether another peer should be asked: until as many as are due have arrived or are on their way.

        A slow pull does not count, so that another peer is tried as well.
        """
        num_begun = len(self.begun)
        if num_begun >= self.most:
            return False
        if len(here) + num_begun < num_due:
            return True
        return len(self.coming(group, here, now - slow_after_s)) < num_due

    def has_begun(self, group: GroupName) -> bool:
        """Return whether a pull of that tensor group is open."""
        return group in [what for what, _ in self.begun]

    def coming(self, group: GroupName, here: Collection[Which], since_s: float = -math.inf) -> set[str]:
        """Return the peers whose tensor group has arrived, or is on its way since later than `since_s`."""
        found = {peer for what, peer in here if what == group}
        for (what, peer), pull in self.begun.items():
            if what == group and pull.began_s > since_s:
                found.add(peer)
        return found

    def not_now(self, group: GroupName, here: Collection[Which], now: float) -> set[str]:
        """Return the peers not to ask for that tensor group now: those whose publication has arrived or is on its way,
        those that had nothing new recently, and those that have failed in this round."""
        found = self.coming(group, here)
        if self._failed:
            found |= self._failed
        for (what, peer), until_s in self._idle_until_s.items():
            if what == group and now < until_s:
                found.add(peer)
        return found

    def next_free_s(self, group: GroupName, peers: Collection[str], now: float) -> float | None:
        """Return the time at which the first of `peers` that may not be asked now may be asked; None if waiting changes
        nothing."""
        idle = [s for (what, peer), s in self._idle_until_s.items() if what == group and s > now and peer in peers]
        banned_s = self.back_off.next_free_s(peers, now)
        return min(idle if banned_s is None else [*idle, banned_s], default=None)

    def next_slow_s(self, group: GroupName, slow_after_s: float, now: float) -> float | None:
        """Return the time at which the next open pull of that tensor group becomes slow; None without any."""
        found = None
        for (what, _), pull in self.begun.items():
            slow_s = pull.began_s + slow_after_s
            if what == group and slow_s > now and (found is None or slow_s < found):
                found = slow_s
        return found

    # ------------------------------------------------------------- what came of it

    def begin(self, group: GroupName, peer: str, now: float) -> OpenPull:
        """Record that a pull from `peer` begins."""
        # It refers to this round's set, which `round_begins` replaces: the failure of a pull that outlasts its round
        # does not count in the next one.
        pull = self.begun[group, peer] = OpenPull(group, peer, now, self._failed)
        return pull

    def end(self, pull: OpenPull) -> None:
        """Remove a pull that succeeded, or that failed without anybody's fault."""
        if self.begun.get((pull.group, pull.peer)) is pull:
            del self.begun[pull.group, pull.peer]

    def answered(self, peer: str) -> None:
        """Clear what is held against `peer`, unless it has failed in this round with its other tensor group."""
        if peer not in self._failed:
            self.back_off.answered(peer)

    def nothing_new(self, pull: OpenPull, now: float, round_s: float) -> float:
        """End a pull whose peer has nothing to merge. Return for how many seconds it is not asked for that tensor group
        again."""
        self.end(pull)
        self.answered(pull.peer)
        again_s = idle_s(round_s)
        self.leave_out(pull.group, pull.peer, now + again_s)
        return again_s

    def leave_out(self, group: GroupName, peer: str, until_s: float) -> None:
        """Do not ask `peer` for that tensor group until `until_s`."""
        self._idle_until_s[group, peer] = until_s

    def fail(self, pull: OpenPull, now: float, reason: str, mute: bool = False) -> str:
        """End a pull that has failed; `mute`: without any answer. Return the consequence in words, for the log.

        The peer is left alone for a while, for all its tensor groups. A second failure in the same round changes
        nothing ("").
        """
        self.end(pull)
        if pull.peer in pull.failed:
            return ""
        pull.failed.add(pull.peer)
        return self.back_off.failed(pull.peer, now, reason, mute)

    def give_up(self, pull: OpenPull) -> None:
        """End a pull that this peer broke off. Its partner is not asked again in the round in which the pull began."""
        self.end(pull)
        pull.failed.add(pull.peer)

"""What a peer that gossips has asked for and not got yet, and whom it does not ask again for now.

Pure: `now` is an argument. Partners are chosen by `protocol.gossip.partners`, moments by `protocol.gossip.pulls`.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import TypeAlias

from swarmtrain.protocol.gossip.partners import BackOff
from swarmtrain.protocol.gossip.pulls import Section, idle_s

__all__ = ["OpenPull", "OpenPulls", "Which"]

Which: TypeAlias = tuple[Section, str]
"""A section, and whose."""


@dataclass(eq=False, slots=True)
class OpenPull:
    """A section of somebody's publication that was asked for."""

    section: Section
    peer: str
    began_s: float
    failed: set[str]
    """Who has failed in the round in which it began."""


@dataclass
class OpenPulls:
    """All of them; `most` may go on at once. `here`, as an argument, is what came and waits for the merge."""

    back_off: BackOff
    most: int
    begun: dict[Which, OpenPull] = field(default_factory=dict)
    _idle_until_s: dict[Which, float] = field(default_factory=dict)
    _failed: set[str] = field(default_factory=set)

    def round_begins(self, now: float) -> None:
        """What goes on goes on, and everybody may be asked again who failed in the last round."""
        self._failed = set()
        self._idle_until_s = {which: until_s for which, until_s in self._idle_until_s.items() if now < until_s}

    # ------------------------------------------------------------- whom to ask

    def is_wanted(
        self, section: Section, num_due: int, here: Collection[Which], slow_after_s: float, now: float
    ) -> bool:
        """Whether one more is to be asked: until as many are here or on their way as are due. A slow one does not keep
        another from being tried."""
        num_begun = len(self.begun)
        if num_begun >= self.most:
            return False
        if len(here) + num_begun < num_due:
            return True
        return len(self.coming(section, here, now - slow_after_s)) < num_due

    def has_begun(self, section: Section) -> bool:
        """Some are on their way."""
        return section in [what for what, _ in self.begun]

    def coming(self, section: Section, here: Collection[Which], since_s: float = -math.inf) -> set[str]:
        """Whose is here, or on its way since then."""
        found = {peer for what, peer in here if what == section}
        for (what, peer), pull in self.begun.items():
            if what == section and pull.began_s > since_s:
                found.add(peer)
        return found

    def not_now(self, section: Section, here: Collection[Which], now: float) -> set[str]:
        """Who is not asked for it: whose is here or comes, who had nothing new lately, who has failed in this round."""
        found = self.coming(section, here)
        if self._failed:
            found |= self._failed
        for (what, peer), until_s in self._idle_until_s.items():
            if what == section and now < until_s:
                found.add(peer)
        return found

    def next_free_s(self, section: Section, peers: Collection[str], now: float) -> float | None:
        """When the next of `peers` may be asked who may not be now; None if that is not a matter of time."""
        idle = [s for (what, peer), s in self._idle_until_s.items() if what == section and s > now and peer in peers]
        banned_s = self.back_off.next_free_s(peers, now)
        return min(idle if banned_s is None else [*idle, banned_s], default=None)

    def next_slow_s(self, section: Section, slow_after_s: float, now: float) -> float | None:
        """When the next of those on their way has taken so long."""
        found = None
        for (what, _), pull in self.begun.items():
            slow_s = pull.began_s + slow_after_s
            if what == section and slow_s > now and (found is None or slow_s < found):
                found = slow_s
        return found

    # ------------------------------------------------------------- what came of it

    def begin(self, section: Section, peer: str, now: float) -> OpenPull:
        """`peer` is asked."""
        pull = self.begun[section, peer] = OpenPull(section, peer, now, self._failed)
        return pull

    def end(self, pull: OpenPull) -> None:
        """It is on its way no longer: it came, or it did not and that is nobody's fault."""
        if self.begun.get((pull.section, pull.peer)) is pull:
            del self.begun[pull.section, pull.peer]

    def answered(self, peer: str) -> None:
        """Something good came from it: all is forgiven, but for what it did in this round with its other section."""
        if peer not in self._failed:
            self.back_off.answered(peer)

    def nothing_new(self, pull: OpenPull, now: float, round_s: float) -> float:
        """It has nothing that could be merged. Returns for how long it is not asked for that again."""
        self.end(pull)
        self.answered(pull.peer)
        again_s = idle_s(round_s)
        self.leave_out(pull.section, pull.peer, now + again_s)
        return again_s

    def leave_out(self, section: Section, peer: str, until_s: float) -> None:
        """What came of it is of no use: it is not asked for that again until then."""
        self._idle_until_s[section, peer] = until_s

    def fail(self, pull: OpenPull, now: float, reason: str, mute: bool = False) -> str:
        """It was in vain, `mute`: without any answer. Its partner is left alone for a while, once for both sections.
        Returns what follows, in words; nothing new follows a second failure in a round."""
        self.end(pull)
        if pull.peer in pull.failed:
            return ""
        pull.failed.add(pull.peer)
        return self.back_off.failed(pull.peer, now, reason, mute)

    def give_up(self, pull: OpenPull) -> None:
        """It was broken off here: its partner is not asked again in the round in which it began."""
        self.end(pull)
        pull.failed.add(pull.peer)

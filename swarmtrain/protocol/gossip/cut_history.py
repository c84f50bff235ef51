"""Choice of the peers to name because their publications were cut: those cut round after round, not those just back.

After a pause, a kill or a restart an honest peer deviates from the usual for a round or two, and is cut. A peer that
always sends too much is cut in each of its rounds. So each peer has a count: a round with a cut adds one, a round
without takes one away, and at three the peer is named. Weights and gradients are counted apart, so that a peer that
spoils only one of them cannot clear itself with the other.
"""

from __future__ import annotations

from dataclasses import dataclass, field

NAMED_AT = 3
"""Count at which a peer is named. In virtual time honest peers that came and went were cut in at most two rounds in a
row."""
_MAX_HISTORIES = 1024
"""Limit of (peer, kind) that are remembered."""


@dataclass(slots=True)
class _Rounds:
    """Newest round of one peer, and its count of cuts."""

    round: int
    is_cut: bool = False
    count: int = 0


@dataclass
class CutHistory:
    """Rounds of each peer in which something was cut, for the last 1,024 (peer, kind) that were looked at."""

    _histories: dict[tuple[str, str], _Rounds] = field(default_factory=dict)

    def look(self, peer: str, kind: str, round: int, *, is_cut: bool) -> bool:
        """Count a publication of `kind` from the author's `round`. Return True if it was cut and its author is to be
        named."""
        rounds = self._histories.pop((peer, kind), None) or _Rounds(round)
        self._histories[peer, kind] = rounds  # the last one looked at stands last
        if len(self._histories) > _MAX_HISTORIES:
            del self._histories[next(iter(self._histories))]
        if round > rounds.round:  # fragments of the round before may come after it
            rounds.count = rounds.count if rounds.is_cut else max(0, rounds.count - 1)
            rounds.round, rounds.is_cut = round, False
        if is_cut and not rounds.is_cut:
            rounds.is_cut, rounds.count = True, min(NAMED_AT, rounds.count + 1)
        return is_cut and rounds.count >= NAMED_AT

    def forget(self) -> None:
        """Start anew: this peer itself has just come back, and what it takes for usual may be out of date."""
        self._histories.clear()

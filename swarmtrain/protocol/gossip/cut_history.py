"""Whom to name for publications that were cut: who is cut round after round, and not who has just come back.

After a pause, a kill or a restart an honest peer is far from what is usual for a round or two, and is cut; one that
always sends too much is cut in each of its rounds. So a peer is named by how its rounds went: each with a cut counts
one up, each without takes one away, and three are named. Weights and gradients are counted apart: who spoils only one
of them must not clear itself with the other.
"""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["NAMED_AT", "CutHistory"]

NAMED_AT = 3
"""In virtual time honest peers that came and went were cut in two rounds in a row at most."""
_MAX_HISTORIES = 1024


@dataclass(slots=True)
class _Rounds:
    round: int
    is_cut: bool = False
    count: int = 0


@dataclass
class CutHistory:
    """Counts the rounds of each peer in which something was cut; of the last 1,024 (peer, kind) looked at."""

    _histories: dict[tuple[str, str], _Rounds] = field(default_factory=dict)

    def look(self, peer: str, kind: str, round: int, *, is_cut: bool) -> bool:
        """Count a publication of `kind` from the author's `round`; True if it was cut and its author is to be named."""
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
        """Begin anew: this peer has come back itself, and what it takes for usual may be old."""
        self._histories.clear()

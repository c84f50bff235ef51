"""Progress of a run in synchronous rounds: what everyone counts after each round.

Everything here is pure. Counts follow from rosters alone, so all who applied the same rosters count the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Progress:
    """State of the run after `round` outer steps: its tokens, each peer's, and the hash (hex) of the roster applied
    last."""

    round: int = 0
    run_tokens: int = 0
    peer_tokens: Mapping[str, int] = field(default_factory=dict)
    roster_sha256: str = ""

    def after(self, peers: Sequence[str], tokens: Sequence[int], roster_sha256: str) -> Progress:
        """Return the progress after one more round, in which `peers` contributed `tokens`."""
        counts = dict(self.peer_tokens)
        for peer, count in zip(peers, tokens, strict=True):
            counts[peer] = counts.get(peer, 0) + count
        return Progress(
            round=self.round + 1,
            run_tokens=self.run_tokens + sum(tokens),
            peer_tokens=counts,
            roster_sha256=roster_sha256,
        )

"""Peers that do not sign when it is their turn: those that saw it pass them over as signers for a while.

A peer with the lowest PeerID that publishes, answers and never signs would cost every round its time limit and a
silence. It stays a member: the others wait for it, count its work, and accept its roster if it signs one after all.
That is why peers need not agree on whom they pass over: rosters are totally ordered, so a disagreement costs only a
wait or a second roster of the same hashes.

Everything here is pure.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

_IDLE_POINTS = 4
"""Points for a missed turn; a turn taken removes one."""
_MAX_IDLE = 2
"""Missed turns after which a peer is passed over. A turn taken makes up for a quarter of a missed one."""
_MAX_ROUNDS = 256
"""Longest time for which a peer is passed over, in rounds."""
_MAX_PEERS = 256


@dataclass
class _Record:
    """Points of one peer, the round from which it may sign again, and how often it was passed over."""

    points: int = 0
    until_round: int = 0
    times: int = 0


@dataclass
class Signers:
    """Turns to sign that this peer has seen others take or miss, over the rounds."""

    _records: dict[str, _Record] = field(default_factory=dict)

    def idle(self, round: int) -> frozenset[str]:
        """Return the peers that must be passed over as signers in `round`."""
        return frozenset(peer for peer, record in self._records.items() if round < record.until_round)

    def round_over(self, round: int, idled: Iterable[str], signed: Iterable[str]) -> None:
        """Record that in `round` the peers of `idled` missed their turn, and that rosters of those in `signed` were
        seen."""
        for peer in idled:
            record = self._records.setdefault(peer, _Record())
            record.points += _IDLE_POINTS
            # passed over for 2, 4, 8, ... rounds, then it has another turn
            if record.points >= _MAX_IDLE * _IDLE_POINTS:
                record.times += 1
                record.until_round = round + 1 + min(2**record.times, _MAX_ROUNDS)
        for peer in signed:
            known = self._records.get(peer)
            if known is None or round < known.until_round:  # out of turn: a roster signed then proves nothing
                continue
            known.points -= 1
            if known.points <= 0:
                del self._records[peer]
        while len(self._records) > _MAX_PEERS:  # identities cost nothing
            del self._records[next(iter(self._records))]

"""Who does not sign when it is its turn: passed over as a signer for a while, by those who saw it.

A peer with the lowest PeerID that publishes, answers and never signs would cost every round its time limit and a
silence. It stays a member: it is waited for, counted, and its roster holds if it signs one after all. That is why the
others need not agree on whom they pass over: rosters are totally ordered, and a disagreement costs a wait, or a second
roster of the same hashes.

Pure, like all of `protocol`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

__all__ = ["Signers"]

_IDLE_POINTS = 4
_MAX_IDLE = 2
"""So many turns let pass, and it is passed over; a turn taken makes up for a quarter of one let pass."""
_MAX_ROUNDS = 256
_MAX_PEERS = 256


@dataclass
class _Record:
    points: int = 0
    until_round: int = 0
    times: int = 0


@dataclass
class Signers:
    """What this peer has seen of others' turns, over the rounds."""

    _records: dict[str, _Record] = field(default_factory=dict)

    def idle(self, round: int) -> frozenset[str]:
        """Whom to pass over as signers in `round`."""
        return frozenset(peer for peer, record in self._records.items() if round < record.until_round)

    def round_over(self, round: int, idled: Iterable[str], signed: Iterable[str]) -> None:
        """`round` is over: these let their turn pass, and of those a roster was seen."""
        for peer in idled:
            record = self._records.setdefault(peer, _Record())
            record.points += _IDLE_POINTS
            if record.points >= _MAX_IDLE * _IDLE_POINTS:  # 2, 4, 8, ... rounds, then one more turn
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

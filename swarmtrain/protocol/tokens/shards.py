"""Data coverage: which shard of the run's data a peer trains on next, without a server that assigns shards.

The data of one corpus (identified by its digest) are cut into shards. Each peer counts the tokens that it has trained
on in each shard. These rows, one for each peer, travel in snapshot manifests: always the author's own, and some of
others' in rotation. Rows merge by the greater count, so that the increments of two peers both survive and nothing
counts twice. A peer that starts a round takes the least seen shard; a hash of (peer, round, seed) breaks ties, so that
peers spread.

A row is a claim. Its sum is never believed beyond the tokens that `tally.py` believes of its author. A row that carries
its author's signature (`signed`, checked by the caller) cannot be put in another peer's mouth. The remaining harm: a
peer can pretend that its own share of the run's tokens was spent on one shard.

Everything here is pure. See decision 21.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field

MAX_SHARDS = 1024
"""Limit of a run's shards."""
MAX_ROWS = 16
"""Limit of rows in a manifest: with 64 shards about 5 KB."""

_MAX_PEERS = 4096
"""Peers whose rows are kept, those with the greatest sums. Identities cost nothing."""

_MOST_TOKENS = 2**63
"""Counts from this value on are refused."""


@dataclass(frozen=True)
class CoverageRow:
    """Tokens that `peer` has trained on, by shard; `shard` is the one it was on then, -1 if none.

    `signed` is what its author signed, to be passed on unchanged; empty where rows are not signed.
    """

    peer: str
    counts: tuple[int, ...]
    shard: int = -1
    signed: bytes = b""

    @property
    def total(self) -> int:
        """Sum over all shards."""
        return sum(self.counts)


@dataclass(frozen=True)
class RowIncident:
    """Row that was refused, and the peer to name for it."""

    peer: str
    detail: str
    rule: str = "shards"


@dataclass
class Coverage:
    """Tokens that each peer has trained on in each shard, as far as this peer, `me`, knows."""

    me: str
    num_shards: int
    max_peers: int = _MAX_PEERS
    forgotten_tokens: int = 0
    """Tokens by which a row may honestly shrink: a peer was killed and continued from its checkpoint."""
    _rows: dict[str, CoverageRow] = field(default_factory=dict)
    _seen: list[int] = field(default_factory=list)
    """Tokens of all rows together, by shard."""
    _cursor: str = ""
    """PeerID after which the rotation of others' rows continues."""

    def __post_init__(self) -> None:
        if not 1 <= self.num_shards <= MAX_SHARDS:
            raise ValueError(f"{self.num_shards} shards; allowed: 1 to {MAX_SHARDS}")
        self._seen = [0] * self.num_shards

    # ------------------------------------------------------------- choosing

    @property
    def seen(self) -> list[int]:
        """Tokens that all peers are known to have trained on, by shard."""
        return list(self._seen)

    def busy(self, live: Iterable[str]) -> frozenset[int]:
        """Return the shards on which these peers were training when they last said so."""
        rows = (self._rows.get(peer) for peer in live if peer != self.me)
        return frozenset(row.shard for row in rows if row is not None and row.shard >= 0)

    def choose(self, round: int, seed: int, *, busy: Collection[int] = (), round_tokens: int = 0) -> tuple[int, str]:
        """Return (the shard for this peer's `round`, the reason).

        Shards within half of `round_tokens` (what a round adds) of the least seen one are tied. What partners do not
        know yet of each other exceeds that, and without ties everybody would be drawn to one shard.
        """
        least = min(self._seen)
        tied = [shard for shard, tokens in enumerate(self._seen) if tokens <= least + round_tokens // 2]
        if least == 0:
            tied = [shard for shard in tied if self._seen[shard] == 0]
        free = [shard for shard in tied if shard not in busy]
        shard = min(free or tied, key=lambda shard: _draw(self.me, round, seed, shard))
        which = f"least seen ({self._seen[shard]} tokens)" if len(tied) == 1 else f"one of {len(tied)} least seen"
        return shard, which if free else f"{which}; others are on all of them"

    def begin(self, round: int, seed: int, others: Iterable[str], round_tokens: int) -> tuple[int, str]:
        """Choose and record the shard for this peer's `round`, which begins now. Return (shard, reason). `others` are
        the other peers that are present."""
        shard, reason = self.choose(round, seed, busy=self.busy(others), round_tokens=round_tokens)
        self.trained(shard, 0)  # so that others see which shard it is on
        return shard, reason

    def row(self, peer: str) -> CoverageRow | None:
        """Return the row of `peer`; None if it is unknown."""
        return self._rows.get(peer)

    @property
    def num_unseen(self) -> int:
        """Number of shards that nobody is known to have trained on."""
        return self._seen.count(0)

    def trained(self, shard: int, tokens: int) -> None:
        """Record that this peer is on `shard` and has trained on `tokens` more of it."""
        own = self._own()
        counts = list(own.counts)
        counts[shard] += tokens
        self._put(CoverageRow(self.me, tuple(counts), shard))

    def _own(self) -> CoverageRow:
        return self._rows.get(self.me) or CoverageRow(self.me, (0,) * self.num_shards)

    def _put(self, row: CoverageRow) -> None:
        before = self._rows.get(row.peer)
        if before is None or before.counts != row.counts:
            for shard, tokens in enumerate(row.counts):
                self._seen[shard] += tokens - (0 if before is None else before.counts[shard])
        self._rows[row.peer] = row

    # ------------------------------------------------------------- the wire

    def rows_to_send(self, limit: int = MAX_ROWS) -> list[CoverageRow]:
        """Return the own row, and others' in rotation: each is sent once before any again."""
        others = sorted(peer for peer in self._rows if peer != self.me)
        start = next((i for i, peer in enumerate(others) if peer > self._cursor), 0)
        chosen = (others[start:] + others[:start])[: limit - 1]
        if chosen:
            self._cursor = chosen[-1]
        return [self._own(), *(self._rows[peer] for peer in chosen)]

    def merge(
        self, rows: Sequence[CoverageRow], teller: str, explained: Callable[[str, int], int]
    ) -> list[RowIncident]:
        """Merge the rows of a manifest of `teller`. Return what was refused, and why.

        `explained(peer, tokens)` returns how many of these tokens are believed (`Tally.believes`). A row with more is
        refused for now; when it comes again, time may have explained it. An author whose own row shrinks has lost the
        end of its checkpoint, or lies; what it forgot comes back to it in others' manifests.
        """
        incidents = []
        if len(rows) > MAX_ROWS:
            incidents.append(RowIncident(teller, f"{len(rows)} rows; a manifest has at most {MAX_ROWS}"))
        for row in rows[:MAX_ROWS]:
            if (wrong := self._take(row, teller, explained)) is not None:
                incidents.append(RowIncident(row.peer if row.signed else teller, wrong))
        self._prune()
        return incidents

    def _take(self, row: CoverageRow, teller: str, explained: Callable[[str, int], int]) -> str | None:
        """Merge one row; return what is wrong with the row, in words, if it is an incident; else None."""
        if (wrong := self._out_of_range(row)) is not None:
            return wrong
        if row.peer == self.me and not row.signed:
            return None  # an unsigned row of this peer is hearsay; a signed one restores what its checkpoint lost
        before = self._rows.get(row.peer)
        if before is not None and before.counts == row.counts:
            if row.peer == teller:
                self._put(row)
            return None
        old = (0,) * self.num_shards if before is None else before.counts
        shrunk = [shard for shard in range(self.num_shards) if row.counts[shard] < old[shard]]
        lost = sum(old[shard] - row.counts[shard] for shard in shrunk)
        # Only the author's own manifest shows that its count shrank: from another peer an older row is just late.
        if lost > self.forgotten_tokens and row.peer == teller:
            shard = shrunk[0]
            return f"shard {shard} shrank from {old[shard]} to {row.counts[shard]} tokens"
        counts = tuple(map(max, old, row.counts))
        if counts == old and (before is not None or row.peer != teller):
            return None  # nothing new, passed on by another peer
        told = sum(counts)
        if row.peer != self.me and (believed := explained(row.peer, told)) < told:
            return f"says that {row.peer} has trained on {told} tokens; {believed} are explained by now"
        self._put(CoverageRow(row.peer, counts, row.shard, row.signed))
        return None

    def _out_of_range(self, row: CoverageRow) -> str | None:
        if len(row.counts) != self.num_shards:
            return f"{len(row.counts)} counts in a row; the run has {self.num_shards} shards"
        if not -1 <= row.shard < self.num_shards:
            return f"shard {row.shard}; allowed: below {self.num_shards}"
        if min(row.counts) < 0 or max(row.counts) >= _MOST_TOKENS:
            return "a count out of range"
        return None

    def _prune(self) -> None:
        if len(self._rows) <= self.max_peers + self.max_peers // 8:
            return
        others = [row for row in self._rows.values() if row.peer != self.me]
        kept = {row.peer for row in heapq.nlargest(self.max_peers, others, key=lambda row: (row.total, row.peer))}
        for row in others:
            if row.peer not in kept:
                for shard, tokens in enumerate(row.counts):
                    self._seen[shard] -= tokens
                del self._rows[row.peer]

    # ------------------------------------------------------------- keeping

    def rows(self) -> list[list[str | int | list[int]]]:
        """Return rows for a checkpoint: [PeerID, shard, counts, signed in hex] of each peer."""
        return [[row.peer, row.shard, list(row.counts), row.signed.hex()] for _, row in sorted(self._rows.items())]

    def load(self, rows: Iterable[Sequence[object]]) -> None:
        """Restore the coverage from `rows`. Raise ValueError, changing nothing, if they are malformed."""
        other = Coverage(self.me, self.num_shards, self.max_peers)
        for row in rows:
            match row:
                case [str(peer), int(shard), [*counts], str(signed)]:
                    numbers = tuple(n for n in counts if isinstance(n, int) and not isinstance(n, bool))
                    if len(numbers) < len(counts):
                        raise ValueError(f"not a row of the data's coverage: {row}")
                    read = CoverageRow(peer, numbers, shard, bytes.fromhex(signed))
                    if (wrong := self._out_of_range(read)) is not None:
                        raise ValueError(f"not a row of the data's coverage: {wrong}")
                    other._put(read)
                case _:
                    raise ValueError(f"not a row of the data's coverage: {row}")
        self._rows, self._seen = other._rows, other._seen


def _draw(peer: str, round: int, seed: int, shard: int) -> bytes:
    """Return a shard's rank in the order by which this peer breaks the round's ties."""
    return hashlib.sha256(f"shard {peer} {round} {seed} {shard}".encode()).digest()

"""Keep and exchange which data has been seen: the rows of `protocol.tokens.shards`, carried in manifests.

Each author signs its own row and others pass it on unchanged, so nobody can alter another peer's row. The trainer's
thread chooses shards and counts; the network's thread reads and writes manifests.
"""

from __future__ import annotations

import base64
import heapq
import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from google.protobuf.message import DecodeError

from swarmtrain.errors import BadBytesError
from swarmtrain.network.identity import Identity, open_signed_untrusted, peer_id_from_bytes_untrusted, sign
from swarmtrain.protocol.membership.budgets import NamedOnce
from swarmtrain.protocol.tokens.shards import MAX_ROWS, Coverage, CoverageRow
from swarmtrain.run import RunFile
from swarmtrain.v1 import snapshot_pb2 as pb

_log = logging.getLogger(__name__)
_PURPOSE = "coverage"
_RULE = "shards"
_MAX_ROW_BYTES = 12 * 1024
"""Largest row: 1024 shards, and no count takes more than ten bytes."""

_MAX_PEERS = 1024
"""Rows kept; all of them are written with every checkpoint."""

_FORGOTTEN_ROUNDS = 4  # a row may shrink by so many after a kill: its author's checkpoint is older (decision 21)
_REFUSED_AGAIN_S = 60.0


@dataclass(frozen=True, kw_only=True)
class ShardsOf:
    """Shards of one corpus in one run."""

    run_sha256: str
    corpus_sha256: str
    num_shards: int
    seed: int
    round_tokens: int
    """Tokens that a whole round reads."""


def shards_of(run: RunFile, run_sha256: str, corpus_sha256: str, num_shards: int) -> ShardsOf:
    """Return the shards into which a run's corpus is cut."""
    return ShardsOf(
        run_sha256=run_sha256,
        corpus_sha256=corpus_sha256,
        num_shards=num_shards,
        seed=run.run.seed,
        round_tokens=run.round_tokens,
    )


@dataclass
class DataCoverage:
    """Knowledge of which peers have seen which shards. Methods may be called from any thread."""

    identity: Identity
    shards: ShardsOf
    explained: Callable[[str, int], int | None]
    """Returns how many of a peer's claimed tokens are believed; None while that cannot be said."""
    refused: Callable[[str, str, str], None]
    """Called with (peer, rule, detail) of a refused row, at most once a minute per peer."""
    clock: Callable[[], float] = time.monotonic
    spares: Callable[[str, str, str], bool] = lambda peer, rule, detail: False
    """Returns whether a refusal must not be reported yet."""
    shard: int | None = None
    """Shard that this peer trains on now; None if none was chosen yet."""
    _counted: int = 0
    _named: NamedOnce = field(default_factory=lambda: NamedOnce(again_s=_REFUSED_AGAIN_S))
    _coverage: Coverage = field(init=False)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self._coverage = Coverage(
            self.identity.peer_id,
            self.shards.num_shards,
            max_peers=_MAX_PEERS,
            forgotten_tokens=_FORGOTTEN_ROUNDS * self.shards.round_tokens,
        )

    # ------------------------------------------------------------- the trainer's side

    def begin(self, round: int, others: Iterable[str]) -> int:
        """Choose the shard for this peer's `round`, beside `others` that are present."""
        with self._lock:
            shard, reason = self._coverage.begin(round, self.shards.seed, others, self.shards.round_tokens)
            self.shard, self._counted = shard, 0
        _log.debug("round %d: shard %d: %s", round, shard, reason)
        return shard

    def reached(self, tokens: int) -> None:
        """Count `tokens` of the round as done, from its start."""
        with self._lock:
            if self.shard is not None:
                self._coverage.trained(self.shard, tokens - self._counted)
                self._counted = tokens

    @property
    def num_unseen(self) -> int:
        """Number of shards that nobody has trained on, as far as this peer knows."""
        with self._lock:
            return self._coverage.num_unseen

    # ------------------------------------------------------------- the wire

    def rows_to_send(self) -> list[pb.Signed]:
        """Return rows for a manifest: this peer's own, signed now, and some rows of other peers as those signed
        them."""
        with self._lock:
            own, *others = self._coverage.rows_to_send()
        return [self._sign(own), *(pb.Signed.FromString(row.signed) for row in others)]

    def _sign(self, row: CoverageRow) -> pb.Signed:
        message = pb.ShardRow(
            corpus_sha256=bytes.fromhex(self.shards.corpus_sha256), tokens=row.counts, on=row.shard + 1
        )
        return sign(self.identity, _PURPOSE, self.shards.run_sha256, message)

    def receive_untrusted(self, teller: str, rows: Sequence[pb.Signed]) -> None:
        """Take in the rows of `teller`'s manifest. An invalid row is dropped and reported; the others count."""
        if len(rows) > MAX_ROWS:
            self._refuse(teller, f"{len(rows)} rows of the data's coverage; a manifest has at most {MAX_ROWS}")
        if self.explained(teller, 0) is None:
            return  # nothing can be believed yet, and the rows will come again
        news = []
        for signed in list(rows[:MAX_ROWS]):
            try:
                row = self._row_untrusted(signed)
            except BadBytesError as error:
                self._refuse(teller, f"a row of the data's coverage: {error}")
                continue
            if row is not None:
                news.append(row)
        with self._lock:
            incidents = self._coverage.merge(news, teller, lambda peer, tokens: self.explained(peer, tokens) or 0)
        for incident in incidents:
            self._refuse(incident.peer, incident.detail)

    def _refuse(self, peer: str, detail: str) -> None:
        if self.spares(peer, _RULE, detail):
            _log.debug("rejected from %s: %s", peer, detail)
            return
        with self._lock:
            due = self._named.is_due(peer, self.clock())
        if due:
            self.refused(peer, _RULE, detail)

    def _row_untrusted(self, signed: pb.Signed) -> CoverageRow | None:
        """Return the row if its signature is valid; None if the row is known already or of another corpus. Raises
        BadBytesError for any other row."""
        # Without unknown fields, which nobody has signed and which would be stored and passed on.
        envelope = pb.Signed(payload=signed.payload, author=signed.author, signature=signed.signature)
        as_signed = envelope.SerializeToString(deterministic=True)
        with self._lock:
            known = self._coverage.row(peer_id_from_bytes_untrusted(signed.author))
        if known is not None and known.signed == as_signed:
            return None
        author, message = open_signed_untrusted(
            signed, _PURPOSE, self.shards.run_sha256, pb.ShardRow, max_bytes=_MAX_ROW_BYTES
        )
        if message.corpus_sha256.hex() != self.shards.corpus_sha256:
            return None  # another version of the text has other shards
        return CoverageRow(author, tuple(message.tokens), message.on - 1, as_signed)

    # ------------------------------------------------------------- keeping

    def kept(self) -> dict[str, Any]:
        """Return the part of the coverage that a checkpoint keeps."""
        with self._lock:
            return {"corpus_sha256": self.shards.corpus_sha256, "rows": self._coverage.rows()}

    def restore(self, kept: Any) -> None:
        """Load what a checkpoint kept, unless that is of another corpus. Raises ValueError, changing nothing, if it is
        invalid."""
        if kept is None:
            return
        if not isinstance(kept, Mapping) or not isinstance(rows := kept.get("rows"), list):
            raise ValueError("not the data's coverage")
        if kept.get("corpus_sha256") != self.shards.corpus_sha256:
            _log.info("the checkpoint is of another corpus: counting the seen data from zero")
            return
        with self._lock:
            self._coverage.load(rows)


@dataclass
class CarriedRows:
    """Other peers' signed rows, kept by a peer that has no data itself.

    An archive passes them on to peers that join after all authors have left; the joiners check them like any other
    rows. Its methods may be called from any thread.
    """

    run_sha256: str
    counted: Callable[[], Mapping[str, int]]
    """Returns the counted tokens by PeerID. A row is worth keeping only up to its author's count, whatever it
    claims."""
    _rows: dict[str, tuple[int, bytes]] = field(default_factory=dict)
    """(tokens, signed row) by author."""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def receive_untrusted(self, rows: Sequence[pb.Signed]) -> None:
        """Take in the rows of a manifest. An invalid row is dropped."""
        for signed in list(rows[:MAX_ROWS]):
            try:
                author, message = open_signed_untrusted(
                    signed, _PURPOSE, self.run_sha256, pb.ShardRow, max_bytes=_MAX_ROW_BYTES
                )
            except BadBytesError as error:
                _log.info("ignored what a peer says of the data that it has seen: %s", error)
                continue
            envelope = pb.Signed(payload=signed.payload, author=signed.author, signature=signed.signature)
            tokens = sum(message.tokens)
            with self._lock:
                if tokens >= self._rows.get(author, (0, b""))[0]:
                    self._rows[author] = tokens, envelope.SerializeToString(deterministic=True)
        with self._lock:
            if (over := len(self._rows) - _MAX_PEERS) > 0:
                worths = self._worths()
                for author in heapq.nsmallest(over, self._rows, key=worths.__getitem__):
                    del self._rows[author]

    def _worths(self) -> dict[str, int]:
        counted = self.counted()  # of all peers at once: it goes through all counts
        return {author: min(tokens, counted.get(author, 0)) for author, (tokens, _) in self._rows.items()}

    def rows_to_send(self) -> list[pb.Signed]:
        """Return rows for a manifest: those of the peers that have trained most."""
        with self._lock:
            authors = heapq.nlargest(MAX_ROWS, sorted(self._rows), key=self._worths().__getitem__)
            return [pb.Signed.FromString(self._rows[author][1]) for author in authors]

    def kept(self) -> list[str]:
        """Return the rows, as text, that a checkpoint keeps."""
        with self._lock:
            return [base64.b64encode(signed).decode() for _, (_, signed) in sorted(self._rows.items())]

    def restore(self, kept: Any) -> None:
        """Load what a checkpoint kept. Raises ValueError or TypeError if it is invalid."""
        for row in kept:
            try:
                self.receive_untrusted([pb.Signed.FromString(base64.b64decode(row))])
            except DecodeError:
                raise ValueError("not a row of the data's coverage") from None


def rows_of(coverage: DataCoverage | None) -> list[pb.Signed]:
    """Return the rows for a manifest; empty if the data has no shards."""
    return [] if coverage is None else coverage.rows_to_send()

"""Count the run's tokens: read progress records in rotation and enter them into this peer's tally.

Each pass reads a few buckets, the root first, then those below full ones, and starts again: a small swarm is read
completely every few seconds, a big one within minutes. Each record is signed by the stranger that it speaks of, and is
believed as far as `protocol.tokens.tally` allows.

The network thread reads; the trainer's and the control server's threads ask for counts.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from swarmtrain.errors import BadBytesError
from swarmtrain.network.discovery.records import PROGRESS, progress_from_proto_untrusted
from swarmtrain.protocol.membership.budgets import NamedOnce
from swarmtrain.protocol.membership.records import COUNTED_AT_ONCE, bucket_of, buckets_to_read
from swarmtrain.protocol.tokens.tally import CountingRules, Tally, agreed_counts
from swarmtrain.run import RunFile
from swarmtrain.v1 import snapshot_pb2 as pb

_MAX_BUCKETS_A_PASS = 1024
_MAX_NAMES = 4096
_BURST_ROUNDS = 2  # a peer may claim so many rounds at once beyond what its speed explains
_ENOUGH = 3  # sources that together may bring a run to its end; a named server counts as so many (decision 49)

_ReadBucket = Callable[[str, str], Awaitable[Mapping[str, tuple[pb.Record, float]]]]
"""Maps (kind, prefix) to the (record, expiry) of each PeerID in that bucket."""


@dataclass
class TokenAccounting:
    """Tally of this peer. Coroutines run in the event loop; all other methods may be called from any thread."""

    me: str
    rules: CountingRules
    read_bucket: _ReadBucket
    speeds: Callable[[], Mapping[str, float]]
    """Returns the tokens per second that each live peer claims, by PeerID, this peer included."""
    clock: Callable[[], float]
    refused: Callable[[str, str, str], None]
    """Called with (peer, rule, detail) of a refused count, once per peer and rule in a few hours."""
    names: dict[str, str] = field(default_factory=dict)
    """Names in progress records, also of peers that have left; the latest ones, since identities cost nothing."""
    _tally: Tally = field(init=False)
    _named: NamedOnce = field(default_factory=NamedOnce)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _sizes: dict[str, int] = field(default_factory=dict)
    _own_durable: int = 0

    def __post_init__(self) -> None:
        self._tally = Tally(self.rules)

    # ------------------------------------------------------------- feeding

    async def read_some(self) -> None:
        """Read the next few buckets of progress records."""
        wanted = list(buckets_to_read(self._sizes))
        if not wanted or len(self._sizes) >= _MAX_BUCKETS_A_PASS:
            self._sizes.clear()
            wanted = list(buckets_to_read(self._sizes))
        for prefix in wanted[:COUNTED_AT_ONCE]:
            self._sizes[prefix] = await self._read_bucket(prefix)

    async def read_all(self) -> None:
        """Read every bucket once, from the root, so that all advertised progress is counted."""
        sizes: dict[str, int] = {}
        while (wanted := list(buckets_to_read(sizes))) and len(sizes) < _MAX_BUCKETS_A_PASS:
            for prefix in wanted:
                sizes[prefix] = await self._read_bucket(prefix)

    async def _read_bucket(self, prefix: str) -> int:
        """Count the records of a bucket, and return their number."""
        records = await self.read_bucket(PROGRESS, prefix)
        speeds = self._know_speeds()
        for peer, (record, _) in records.items():
            try:
                self._read_untrusted(peer, record, prefix, speeds.get(peer, 0.0))
            except BadBytesError as error:
                self._name(peer, "progress", str(error))
        return len(records)

    def _know_speeds(self) -> Mapping[str, float]:
        speeds, now = self.speeds(), self.clock()
        with self._lock:
            self._tally.meet(speeds, now)
            self._tally.know_speeds(speeds)
        return speeds

    def _read_untrusted(self, peer: str, record: pb.Record, prefix: str, claimed_per_s: float) -> None:
        if record.WhichOneof("body") != "progress" or bucket_of(peer, len(prefix)) != prefix:
            raise BadBytesError("an invalid progress record, or one in another peer's place", code="bad-sender")
        stage, tokens = progress_from_proto_untrusted(record.progress)
        now = self.clock()
        with self._lock:
            # Of an earlier incarnation whose folder was lost or restored: nobody else can have signed it.
            if peer == self.me:
                self._tally.learn({peer: tokens}, now, stage)
                self._own_durable = max(self._own_durable, tokens)
                return
            _, incident = self._tally.observe(peer, stage, tokens, now, claimed_per_s)
        self.names[peer] = record.progress.name
        if len(self.names) > _MAX_NAMES:
            del self.names[next(iter(self.names))]
        if incident is not None:
            self._name(peer, incident.rule, incident.detail)

    def _name(self, peer: str, rule: str, detail: str) -> None:
        with self._lock:
            is_due = self._named.is_due(peer, self.clock(), rule)
        if is_due:
            self.refused(peer, rule, detail)

    def learn(self, peer_tokens: Mapping[str, int]) -> None:
        """Count the tokens of a state: what its rosters list, or what belongs to it. From the first count on, this peer
        watches the run."""
        now = self.clock()
        with self._lock:
            self._tally.learn(peer_tokens, now)
            if peer_tokens and self._tally.watched_s is None:
                self._tally.watched_s = now

    def meet(self, peer: str) -> None:
        """Record that `peer` is present: from now on this peer sees for itself how much `peer` trains."""
        with self._lock:
            self._tally.meet([peer], self.clock())

    def watch(self) -> None:
        """Record that this peer has been present since the run was published, which bounds how much one or two states
        can add."""
        with self._lock:
            if self._tally.watched_s is None:
                self._tally.watched_s = self.rules.began_s

    def adopt(self, told: Sequence[Mapping[str, int]], *, is_server: bool = False) -> None:
        """Count the tokens that fetched states report: `told` has one mapping from PeerID to tokens for each state. See
        `Tally.adopt`.

        The server that a run names is believed alone. Tokens of this peer itself are believed as far as its speed
        explains them.
        """
        agreed, speeds = agreed_counts(told), self._know_speeds()
        with self._lock:
            counts = dict(self._tally.with_rest(agreed))
            own = counts.pop(self.me, 0)
            self._tally.adopt(counts, _ENOUGH if is_server else len(told), self.clock())
            if own:
                self._tally.observe(self.me, 0, own, self.clock(), speeds.get(self.me, 0.0))

    def receive(self, peer: str, tokens: int) -> None:
        """Count the tokens that a publication or a state reports of `peer`, as far as the peer's speed explains
        them."""
        self.receive_all({peer: tokens})

    def receive_all(self, counts: Mapping[str, int]) -> None:
        """Count the tokens of many peers, as `receive` does, with a single look-up of usual speeds, which may go
        through every peer ever counted."""
        speeds, now = self._know_speeds(), self.clock()
        with self._lock:
            found = [
                self._tally.observe(peer, 0, tokens, now, speeds.get(peer, 0.0))[1] for peer, tokens in counts.items()
            ]
        for incident in found:
            if incident is not None:
                self._name(incident.peer, incident.rule, incident.detail)

    def explained(self, peer: str, tokens: int) -> int | None:
        """Return how many of the `tokens` that somebody advertises of `peer` are believed, without counting them.
        Returns None while neither speeds nor counts are known."""
        speeds = self._know_speeds()
        with self._lock:
            if self._tally.typical_per_s <= 0 and not self._tally.total:
                return None
            return self._tally.believes(peer, tokens, self.clock(), speeds.get(peer, 0.0))

    def own_to_tell(self, durable_tokens: int) -> int:
        """Return the tokens for this peer's next record: the most that were ever safe on its disk, where
        `durable_tokens` are now.

        Others may count what a record says, so a kill must not take it back.
        """
        with self._lock:
            self._own_durable = max(self._own_durable, durable_tokens)
            return self._own_durable

    # ------------------------------------------------------------- asking

    def contributions(self) -> dict[str, int]:
        """Return the tokens of every peer, by PeerID."""
        with self._lock:
            return self._tally.contributions()

    def acknowledged(self) -> dict[str, int]:
        """Return the tokens that this peer has read in every peer's own progress record, by PeerID."""
        with self._lock:
            return self._tally.told()

    @property
    def total(self) -> int:
        """Tokens of the run as counted here."""
        with self._lock:
            return self._tally.total

    # ------------------------------------------------------------- keeping

    def kept(self) -> list[list[str | int | float]]:
        """Return the tally as rows for a checkpoint."""
        with self._lock:
            return self._tally.rows()

    def restore(self, rows: Iterable[Sequence[object]], until_s: float | None = None) -> None:
        """Load the rows of a checkpoint that was taken at time `until_s`, if known. Raises ValueError, counting
        nothing, if they are invalid."""
        with self._lock:
            self._tally.merge_rows(rows)
            if until_s is not None and math.isfinite(until_s):
                before_s = self._tally.watched_s
                self._tally.watched_s = until_s if before_s is None else max(before_s, until_s)
            self._own_durable = max(self._own_durable, self._tally.tokens(self.me))


def counting_rules(run: RunFile, now: float) -> CountingRules:
    """Return the run's counting rules. `now` stands in for the run's beginning if the run was never published."""
    began_s = now if run.published is None else datetime.fromisoformat(run.published.created).timestamp()
    return CountingRules(
        began_s=min(began_s, now),
        burst_tokens=_BURST_ROUNDS * run.round_tokens,
        most_tokens=run.run.total_tokens + run.max_round_tokens,
        total_tokens=run.run.total_tokens,
    )

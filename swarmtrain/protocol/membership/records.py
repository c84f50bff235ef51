"""Storage of a peer's DHT records: in the shallowest bucket with room.

A bucket is a DHT key named by a bit prefix of SHA-256(PeerID); the root bucket has the empty prefix. Each bucket is
kept below `BUCKET_LIMIT` records, because a DHT value that is a dictionary of thousands is slow to read and to carry
(decision 33). A swarm of fifty reads one bucket; a peer of ten thousand reads a sample of small ones.

Everything here is pure.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping

BUCKET_LIMIT = 64
"""Records at which a bucket is full: newcomers go one bit deeper. One by one, 64 subkeys take the DHT 0.7 s, 500 take
4.7 s, and 2,000 take 43 s (decision 3)."""

MAX_DEPTH = 24
"""Longest prefix in bits; 2^24 buckets are enough for a billion peers."""

REPLICAS = 5
"""Nodes that store a record."""
ASKED = REPLICAS + 3
"""Nearest nodes whose answers end a search; more than `REPLICAS`, because some have just come and have nothing yet.
With fewer nodes than this, every node is one of the nearest."""
FEW, ALL_EVERY = 2, 4
"""Nodes of a bucket that are read each time (`FEW`) if the nodes that store it are known. Every `ALL_EVERY` times all
of them are read, because one may have missed a record, or keep it back (decision 33)."""
READ_EVERY_S = 3.0
"""Seconds between two readings of presence in a small swarm."""
COUNT_EVERY_S, MOST_COUNT_EVERY_S = 5.0, 15.0
"""Seconds between two readings of progress, in a small swarm and in a large one."""
MAX_READ_BUCKETS = 64
"""Limit of presence buckets that are read: a depth is read completely or not at all."""
COUNTED_AT_ONCE = 4
"""Buckets of progress records that are read each time."""
_A_RECORD_S = 0.6
"""Seconds between two readings for each record, so that the cost of reading per second stays the same."""


def read_every_s(num_records: int, least_s: float, most_s: float) -> float:
    """Return how long to wait between two readings of that many records: the more records, the longer."""
    return max(least_s, min(num_records * _A_RECORD_S, most_s))


def peer_bits(peer: str) -> str:
    """Return the first `MAX_DEPTH` bits of SHA-256(PeerID) as a string of 0 and 1."""
    digest = hashlib.sha256(peer.encode()).digest()
    return "".join(f"{byte:08b}" for byte in digest[: MAX_DEPTH // 8])


def bucket_of(peer: str, depth: int) -> str:
    """Return the prefix of the peer's bucket at `depth` bits."""
    return peer_bits(peer)[:depth]


def choose_bucket(peer: str, depth: int, occupants: Collection[str]) -> tuple[bool, str]:
    """Return (True if `peer` may store in its bucket at `depth`, given the peers in it; reason).

    Try depths from 0 on, and take the first that is allowed. A peer's own record does not count against it, so that it
    stays where it is.
    """
    others = sum(1 for occupant in occupants if occupant != peer)
    if depth >= MAX_DEPTH:
        return True, f"the deepest bucket ({MAX_DEPTH} bits) takes everyone"
    if peer in occupants and others <= BUCKET_LIMIT:
        return True, "its record is here already"
    if others < BUCKET_LIMIT:
        return True, f"{others} other records, room for {BUCKET_LIMIT - others} more"
    return False, f"full with {others} other records"


def buckets_to_read(sizes: Mapping[str, int]) -> Iterator[str]:
    """Yield the buckets to read next in order to know everyone, given the sizes of those read so far.

    A full bucket has children one bit deeper. Call again with the grown mapping until nothing is yielded.
    """
    if "" not in sizes:
        yield ""
        return
    for prefix, size in sizes.items():
        if size >= BUCKET_LIMIT and len(prefix) < MAX_DEPTH:
            for child in (prefix + "0", prefix + "1"):
                if child not in sizes:
                    yield child

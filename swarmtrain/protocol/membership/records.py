"""Where a peer's records live: the shallowest bucket with room.

A bucket is a DHT key named by a bit prefix of SHA-256(PeerID); the root bucket has the empty prefix. Buckets
are kept to fewer than `BUCKET_LIMIT` records, because a DHT value that is a dictionary of thousands is slow to
read and to carry. A swarm of fifty reads one bucket; one of ten thousand reads a sample of small ones.

Pure: no I/O, no clock.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping

__all__ = [
    "ALL_EVERY",
    "ASKED",
    "BUCKET_LIMIT",
    "COUNTED_AT_ONCE",
    "COUNT_EVERY_S",
    "FEW",
    "MAX_DEPTH",
    "MAX_READ_BUCKETS",
    "MOST_COUNT_EVERY_S",
    "READ_EVERY_S",
    "REPLICAS",
    "bucket_of",
    "buckets_to_read",
    "choose_bucket",
    "peer_bits",
    "read_every_s",
]

BUCKET_LIMIT = 64
"""A bucket with this many records is full: newcomers go one bit deeper."""

MAX_DEPTH = 24
"""Prefixes are never longer than this many bits; 2^24 buckets are enough for a billion peers."""

REPLICAS = 5
"""Nodes that keep a record."""
ASKED = REPLICAS + 3
"""A search ends when so many nearest nodes have answered: some have just come, and have nothing yet. With fewer nodes
everybody is one of the nearest."""
FEW, ALL_EVERY = 2, 4
"""So many of those that keep a bucket are read, and all of them every so many times, where it is known who they are."""
READ_EVERY_S = 3.0
"""Presence, in a small swarm."""
COUNT_EVERY_S, MOST_COUNT_EVERY_S = 5.0, 15.0
"""Progress, in a small swarm and in a large one."""
MAX_READ_BUCKETS = 64
"""Of presence: a whole depth of buckets or none of it."""
COUNTED_AT_ONCE = 4
"""Buckets of progress that are read each time."""
_A_RECORD_S = 0.6


def read_every_s(num_records: int, least_s: float, most_s: float) -> float:
    """How long to wait between two readings of so many records: of more of them longer, so that it costs as much."""
    return max(least_s, min(num_records * _A_RECORD_S, most_s))


def peer_bits(peer: str) -> str:
    """The first `MAX_DEPTH` bits of SHA-256(PeerID) as a string of 0 and 1."""
    digest = hashlib.sha256(peer.encode()).digest()
    return "".join(f"{byte:08b}" for byte in digest[: MAX_DEPTH // 8])


def bucket_of(peer: str, depth: int) -> str:
    """The prefix of the bucket that `peer` belongs to at `depth` bits."""
    return peer_bits(peer)[:depth]


def choose_bucket(peer: str, depth: int, occupants: Collection[str]) -> tuple[bool, str]:
    """Whether `peer` may store in its bucket at `depth`, given who is in it; with the reason.

    Walk from depth 0 down and take the first that answers True. One's own record does not count against oneself,
    so a peer that already lives in a bucket stays there.
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
    """The buckets that must be read next to know everyone, given the sizes of those read so far.

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

"""Ten thousand peers: every bucket is small, and everyone is found by following the full ones."""

from __future__ import annotations

from collections import defaultdict

import pytest

from swarmtrain.protocol.membership.records import (
    BUCKET_LIMIT,
    MAX_DEPTH,
    bucket_of,
    buckets_to_read,
    choose_bucket,
    peer_bits,
    read_every_s,
)


def place(peer: str, buckets: dict[str, set[str]]) -> str:
    for depth in range(MAX_DEPTH + 1):
        prefix = bucket_of(peer, depth)
        if choose_bucket(peer, depth, buckets[prefix])[0]:
            buckets[prefix].add(peer)
            return prefix
    raise AssertionError("the deepest bucket takes everyone")


def read_all(buckets: dict[str, set[str]]) -> tuple[set[str], int]:
    sizes: dict[str, int] = {}
    found: set[str] = set()
    while prefixes := list(buckets_to_read(sizes)):
        for prefix in prefixes:
            sizes[prefix] = len(buckets.get(prefix, ()))
            found |= buckets.get(prefix, set())
    return found, len(sizes)


@pytest.mark.parametrize("num_peers", [0, 1, 50, 64, 65, 1000, 10_000])
def test_buckets_stay_small_and_everyone_is_found(num_peers: int) -> None:
    buckets: dict[str, set[str]] = defaultdict(set)
    peers = {f"peer-{i}" for i in range(num_peers)}
    for peer in sorted(peers):
        place(peer, buckets)
    assert max((len(bucket) for bucket in buckets.values()), default=0) < 65
    found, num_read = read_all(buckets)
    assert found == peers
    assert num_read == 1 if num_peers < BUCKET_LIMIT else num_read < num_peers


def test_a_peer_stays_where_its_record_is() -> None:
    buckets: dict[str, set[str]] = defaultdict(set)
    homes = {peer: place(peer, buckets) for peer in (f"peer-{i}" for i in range(1000))}
    for peer, home in homes.items():
        assert place(peer, buckets) == home


@pytest.mark.parametrize(
    ("num_others", "is_in", "depth", "stores"),
    [
        (0, False, 0, True),
        (BUCKET_LIMIT - 1, False, 0, True),
        (BUCKET_LIMIT, False, 0, False),
        (BUCKET_LIMIT, True, 0, True),
        (BUCKET_LIMIT + 1, True, 0, False),
        (1000, False, MAX_DEPTH, True),
    ],
)
def test_choose_bucket(num_others: int, is_in: bool, depth: int, stores: bool) -> None:
    occupants = {f"other-{i}" for i in range(num_others)} | ({"me"} if is_in else set())
    chosen, reason = choose_bucket("me", depth, occupants)
    assert chosen is stores
    assert reason


def test_prefixes_are_bits_of_the_hash() -> None:
    assert len(peer_bits("me")) == MAX_DEPTH
    assert set(peer_bits("me")) <= {"0", "1"}
    assert bucket_of("me", 0) == ""
    assert peer_bits("me").startswith(bucket_of("me", 7))


def test_a_larger_swarm_is_read_less_often_so_that_it_costs_as_much() -> None:
    assert [read_every_s(number, 3.0, 10.0) for number in (0, 5, 10, 16, 17, 1000)] == [3.0, 3.0, 6.0, 9.6, 10.0, 10.0]
    assert read_every_s(9, 3.0, 1.0) == 3.0

"""Cost of storing and reading records: whom a peer asks, and how often."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import msgpack
import pytest

from swarmtrain.network.discovery import buckets
from swarmtrain.network.discovery.buckets import Buckets
from swarmtrain.network.discovery.records import RecordRules
from swarmtrain.network.identity import new_identity

ME = new_identity(b"m" * 32)


class FakeKey:
    """Nodes are as near to it as their number is small."""

    def to_bytes(self) -> bytes:
        return bytes(20)

    def xor_distance(self, node: int) -> int:
        return node


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    made = SimpleNamespace(DHTID=SimpleNamespace(generate=lambda source: FakeKey()))
    monkeypatch.setattr(buckets, "hivemind_module", lambda name: made)


@dataclass
class FakeDht:
    """Nodes 0 to n - 1, of which the first are the nearest; node 1 is this one. Searches and stores are counted."""

    num_nodes: int
    node_id: int = 1
    peer_id: str = "peer 1"
    twice: bool = False
    """Fake DHT, in which a restarted peer has two nodes."""
    silent: set[str] = field(default_factory=set)
    searches: int = 0
    stored_at: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        storage = SimpleNamespace(store=self.store_here, get=lambda key: self.kept.get(self.node_id))
        self.near: list[tuple[int, str]] = []
        routing_table = SimpleNamespace(get_nearest_neighbors=lambda key, k, exclude: self.near)
        self.protocol = SimpleNamespace(
            call_store=self.call_store, call_find=self.call_find, storage=storage, routing_table=routing_table
        )
        self.kept: dict[int, Any] = {}
        self.asked: list[str] = []

    def keep(self, node: int, name: str, expiry_s: float) -> None:
        """Let a node keep a record of `name`, among others."""
        value = bytes(msgpack.packb(name.encode(), use_bin_type=True)) + bytes(64)
        bucket = self.kept.setdefault(node, SimpleNamespace(value={})).value
        bucket[name] = SimpleNamespace(value=value, expiration_time=expiry_s)

    async def call_find(self, peer: str, keys: Sequence[Any]) -> Any:
        self.asked.append(peer)
        if peer in self.silent:
            return None
        return {keys[0]: (self.kept.get(int(peer.removeprefix("peer "))), {})}

    async def find_nearest_nodes(
        self, queries: Sequence[Any], k_nearest: int, beam_size: int, num_workers: int
    ) -> Mapping[Any, Mapping[int, str]]:
        self.searches += 1
        found = {node: f"peer {node}" for node in range(min(k_nearest, self.num_nodes))}
        return {queries[0]: {-1: "peer 3", **found} if self.twice else found}

    async def call_store(self, peer: str, keys: Any, values: Any, expiries: Any, subkeys: Any) -> list[bool] | None:
        if peer in self.silent:
            return None
        self.stored_at.append(peer)
        return [True]

    def store_here(self, key: Any, value: bytes, expiry_s: float, subkey: str) -> bool:
        self.stored_at.append("here")
        return True

    async def get(self, key: str, latest: bool, beam_size: int) -> Any:
        assert latest and beam_size < 20, "not everybody"
        items = {"p": SimpleNamespace(value=b"a record", expiration_time=7), "q": SimpleNamespace(value=3)}
        return SimpleNamespace(value=items)


@dataclass
class Here:
    """Peer with such a DHT, and a clock."""

    dht: FakeDht
    now_s: float = 0.0

    def __post_init__(self) -> None:
        self.buckets = Buckets(self.dht, RecordRules(ME), clock=lambda: self.now_s)

    def store(self) -> list[str]:
        """Store a record; returns where."""
        self.dht.stored_at.clear()
        assert asyncio.run(self.buckets.store("a key", ME.peer_id, b"a record", 1000.0))
        return self.dht.stored_at


def test_the_nearest_nodes_are_looked_for_once_in_a_while() -> None:
    here = Here(FakeDht(25))
    for now_s, searches in ((0.0, 1), (60.0, 1), (119.0, 1), (121.0, 2), (130.0, 2)):
        here.now_s = now_s
        assert sorted(here.store()) == ["here", "peer 0", "peer 2", "peer 3", "peer 4"]
        assert here.dht.searches == searches


def test_in_place_of_one_that_does_not_answer_the_next_gets_it_and_they_are_looked_for_sooner() -> None:
    here = Here(FakeDht(25, silent={"peer 0", "peer 3"}))
    assert sorted(here.store()) == ["here", "peer 2", "peer 4", "peer 5", "peer 6"]
    here.now_s = 31.0
    here.store()
    assert here.dht.searches == 2


def test_few_nodes_are_looked_for_each_time_since_newcomers_belong_to_them() -> None:
    here = Here(FakeDht(3))
    for _ in range(2):
        assert sorted(here.store()) == ["here", "peer 0", "peer 2"]
    assert here.dht.searches == 2


def test_a_peer_that_was_started_again_counts_once() -> None:
    here = Here(FakeDht(25, twice=True))
    assert sorted(here.store()) == ["here", "peer 0", "peer 2", "peer 3", "peer 4"]


def test_whoever_comes_nearer_is_looked_for_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeKey, "xor_distance", lambda self, node: abs(node))
    here = Here(FakeDht(25))
    here.store()
    for node, searches in ((4, 1), (40, 1), (0.5, 2)):  # one that is known, one that is farther than all that keep it
        here.dht.near = [(node, "peer 77")]  # type: ignore[list-item]
        here.store()
        assert here.dht.searches == searches


@pytest.mark.parametrize("answer", [{}, {"a key": (SimpleNamespace(value=3), {})}, []])
def test_an_answer_that_cannot_be_understood_is_none(answer: Any) -> None:
    here = Here(FakeDht(25))
    here.store()
    here.dht.keep(0, "p", 7.0)

    async def odd(peer: str, keys: Any) -> Any:
        return answer if peer == "peer 2" else {keys[0]: (here.dht.kept.get(int(peer.removeprefix("peer "))), {})}

    async def none(*given: Any, **more: Any) -> list[bool]:
        return []

    here.dht.protocol.call_find = odd
    assert asyncio.run(here.buckets.read("a key")) == {"p": (b"p", 7.0)}
    here.dht.protocol.call_store = none
    assert here.store() == ["here"]


def test_nobody_took_it() -> None:
    here = Here(FakeDht(25, node_id=99, peer_id="me", silent={f"peer {node}" for node in range(25)}))
    assert not asyncio.run(here.buckets.store("a key", ME.peer_id, b"a record", 1000.0))


def test_where_few_are_they_are_searched_and_what_is_no_bytes_is_left_out() -> None:
    assert asyncio.run(Here(FakeDht(3)).buckets.read("a key")) == {"p": (b"a record", 7.0)}


def test_all_that_keep_a_bucket_are_read_at_first_then_two_and_after_a_while_all_again() -> None:
    here = Here(FakeDht(25))
    here.store()
    for node, name, expiry_s in ((0, "p", 7.0), (1, "p", 9.0), (1, "q", 8.0), (4, "r", 6.0)):
        here.dht.keep(node, name, expiry_s)
    numbers = []
    for number in range(6):
        here.dht.asked.clear()
        found = asyncio.run(here.buckets.read("a key"))
        numbers.append(len(here.dht.asked))
        if number in (0, 4):
            assert found == {"p": (b"p", 9.0), "q": (b"q", 8.0), "r": (b"r", 6.0)}, "the newest of each"
    assert numbers[0] == numbers[4] == 4, "and the own node costs nothing"
    assert all(1 <= number <= 2 for number in (*numbers[1:4], numbers[5]))
    assert here.dht.searches == 1


def test_those_who_keep_nothing_are_doubted_and_hivemind_searches() -> None:
    here = Here(FakeDht(25, silent={"peer 2"}))
    assert asyncio.run(here.buckets.read("a key")) == {"p": (b"a record", 7.0)}, "it stores nothing there"
    assert not here.dht.searches and not here.dht.asked
    here.store()
    assert asyncio.run(here.buckets.read("a key")) == {"p": (b"a record", 7.0)} and here.dht.asked
    here.now_s = 31.0
    here.store()
    assert here.dht.searches == 2


@pytest.mark.parametrize("num_nodes", [0, 1])
def test_one_that_is_alone(num_nodes: int) -> None:
    here = Here(FakeDht(num_nodes, node_id=0, peer_id="peer 0"))
    assert asyncio.run(here.buckets.store("a key", ME.peer_id, b"a record", 1000.0)) == bool(num_nodes)


def test_of_how_many_keys_the_nearest_are_known_is_bounded() -> None:
    """Strangers who fill buckets have a peer read others, any of sixteen million."""
    here = Here(FakeDht(25))
    for number in range(600):
        asyncio.run(here.buckets.store(f"bucket {number}", ME.peer_id, b"a record", 1000.0))
    assert 0 < len(here.buckets._nearest) <= 256

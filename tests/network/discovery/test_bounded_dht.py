"""Limits to what another DHT node can make this one do: by requests, transfers, answers and claimed identity."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Coroutine
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgpack
import pytest
from codes import raises_code

from swarmtrain.errors import BadBytesError
from swarmtrain.network.daemon import hivemind_module, swarm_time
from swarmtrain.network.discovery.bounded_dht import use_bounded_protocol
from swarmtrain.network.discovery.records import (
    MAX_BUCKET_RECORDS,
    PRESENCE,
    RecordRules,
    bucket_key,
    make_validator,
    num_records,
)
from swarmtrain.network.identity import Identity, new_identity, peer_bytes
from swarmtrain.network.node import Node, NodeSettings
from swarmtrain.v1 import snapshot_pb2 as pb

RUN = hashlib.sha256(b"a run").digest()
ME, BEN = (new_identity(name * 32) for name in (b"m", b"b"))
dht_id = hivemind_module("dht.routing").DHTID
peer_id = hivemind_module("p2p.p2p_daemon_bindings.datastructures").PeerID
dht_pb = hivemind_module("proto.dht_pb2")
KEY = dht_id.generate(bucket_key(RUN, PRESENCE, ""))


class Wire:
    """Stands in for hivemind's P2P, among the nodes of a test: each has a side of it, with the handlers it serves."""

    def __init__(self, everyone: dict[str, Wire], peer: str) -> None:
        self.everyone, self.peer, self.peer_id = everyone, peer, peer_id(peer_bytes(peer))
        self.handlers: dict[str, Callable[[Any, Any], Coroutine[Any, Any, Any]]] = {}
        everyone[peer] = self

    async def add_protobuf_handler(self, name: str, handler: Any, *given: Any, **more: Any) -> None:
        self.handlers[name] = handler

    async def call_protobuf_handler(self, peer: Any, name: str, message: Any, output: Any) -> Any:
        if str(peer) not in self.everyone:
            raise ConnectionError("nobody")
        context = SimpleNamespace(remote_id=self.peer_id)
        return await self.everyone[str(peer)].handlers[name](message, context)


async def a_node(everyone: dict[str, Wire], identity: Identity, node: int = 7, bucket_size: int = 20) -> Any:
    use_bounded_protocol()
    protocol = hivemind_module("dht.node").DHTProtocol
    validator = make_validator(RecordRules(identity))
    wire = Wire(everyone, identity.peer_id)
    return await protocol.create(wire, dht_id(node), bucket_size, 5, 5, 3.0, record_validator=validator)


def a_record(identity: Identity, lifetime_s: float = 30.0) -> tuple[bytes, bytes, float]:
    """(subkey, signed value, expiry)"""
    record = pb.Record(run_sha256=RUN, presence=pb.Presence(name="someone")).SerializeToString()
    subkey, value = (msgpack.packb(item, use_bin_type=True) for item in (identity.peer_id, record))
    expiry_s = swarm_time() + lifetime_s
    return subkey, RecordRules(identity).sign(KEY.to_bytes(), subkey, value, expiry_s), expiry_s


def ask(wire: Wire, peer: Identity, method: str, request: Any) -> Any:
    return wire.call_protobuf_handler(peer_id(peer_bytes(peer.peer_id)), f"DHTProtocol.{method}", request, None)


def nested(levels: int) -> bytes:
    """Tuples of hivemind's in each other."""
    data = b"\x90"
    for _ in range(levels):
        data = msgpack.packb(msgpack.ExtType(0x40, b"\x91" + data))
    return data


def bucket_of(number: int) -> Any:
    dictionary = hivemind_module("dht.storage").DictionaryDHTValue()
    for identity in (new_identity(number_of.to_bytes(32, "big")) for number_of in range(number)):
        _, value, expiry_s = a_record(identity)
        dictionary.store(identity.peer_id, value, expiry_s)
    return dictionary


def packed(value: Any) -> bytes:
    return bytes(hivemind_module("utils.serializer").MSGPackSerializer.dumps(value))


@pytest.mark.parametrize(
    "data",
    [
        nested(60),
        packed(bucket_of(1))[:-1],
        packed((1, 2)),
        packed({1: 2}),
        packed(msgpack.ExtType(0x50, packed(None))),
        packed(msgpack.ExtType(0x50, packed([None, 1.0, [[b"no text", b"value", 1.0]]]))),
    ],
    ids=["nested", "cut off", "a tuple", "a map", "no bucket", "no records"],
)
def test_what_nests_or_is_no_bucket_is_not_read(data: bytes) -> None:
    """Some 200 levels more end a process by a segmentation fault."""

    async def store() -> None:
        everyone: dict[str, Wire] = {}
        node = await a_node(everyone, ME)
        request = dht_pb.StoreRequest(keys=[KEY.to_bytes()], subkeys=[b""], values=[data], expiration_time=[0.0],
                                      in_cache=[False])  # fmt: skip
        with pytest.raises(BadBytesError):
            await ask(Wire(everyone, BEN.peer_id), ME, "rpc_store", request)
        assert not num_records(node.storage)

    asyncio.run(store())


def test_a_bucket_is_handed_over_to_a_newcomer_and_read_from_it() -> None:
    """hivemind does so: what was stored by those who have left lives on."""

    async def meet() -> None:
        everyone: dict[str, Wire] = {}
        node, newcomer = await a_node(everyone, ME, 7), await a_node(everyone, BEN, 8)
        _, value, expiry_s = a_record(ME)
        node.storage.store(KEY, value, expiry_s, subkey=ME.peer_id)
        assert await newcomer.call_ping(peer_id(peer_bytes(ME.peer_id))) == dht_id(7)
        for _ in range(20):
            await asyncio.sleep(0)
        assert newcomer.storage.get(KEY).value.get(ME.peer_id).value == value
        found = await node.call_find(peer_id(peer_bytes(BEN.peer_id)), [KEY])
        assert found[KEY][0].value.get(ME.peer_id).value == value

    asyncio.run(meet())


def test_of_many_buckets_handed_over_some_are_taken_and_as_many_are_asked_for() -> None:
    async def hand_over() -> None:
        everyone: dict[str, Wire] = {}
        node = await a_node(everyone, ME)
        subkey, value, expiry_s = a_record(BEN)
        keys = [KEY.to_bytes()] * 100
        columns = {"subkeys": [subkey] * 100, "values": [value] * 100, "expiration_time": [expiry_s] * 100}
        request = dht_pb.StoreRequest(keys=keys, in_cache=[False] * 100, **columns)
        ben = Wire(everyone, BEN.peer_id)
        answer = await ask(ben, ME, "rpc_store", request)
        assert list(answer.store_ok) == [True, *[False] * 99] and num_records(node.storage) == 1
        assert len((await ask(ben, ME, "rpc_find", dht_pb.FindRequest(keys=keys[:8]))).results) == 8
        with raises_code("bad-size", BadBytesError, "8"):
            await ask(ben, ME, "rpc_find", dht_pb.FindRequest(keys=keys[:9]))

    asyncio.run(hand_over())


def an_answer(**fields: Any) -> Any:
    return dht_pb.FindResponse(results=[dht_pb.FindResult(**fields)])


@pytest.mark.parametrize(
    ("answer", "good"),
    [
        (an_answer(type=dht_pb.NOT_FOUND, nearest_node_ids=[bytes(20)] * 20, nearest_peer_ids=[bytes(38)] * 20), True),
        (an_answer(type=dht_pb.NOT_FOUND, nearest_node_ids=[bytes(20)] * 21, nearest_peer_ids=[bytes(38)] * 21), False),
        (an_answer(type=dht_pb.NOT_FOUND, nearest_node_ids=[bytes(20)], nearest_peer_ids=[bytes(65)]), False),
        (dht_pb.FindResponse(results=[dht_pb.FindResult()] * 2), False),
        (an_answer(type=dht_pb.FOUND_DICTIONARY, value=packed(bucket_of(MAX_BUCKET_RECORDS))), True),
        (an_answer(type=dht_pb.FOUND_DICTIONARY, value=packed(bucket_of(MAX_BUCKET_RECORDS + 1))), False),
        (an_answer(type=dht_pb.FOUND_DICTIONARY, value=nested(60)), False),
    ],
    ids=["full", "too many nodes", "a long PeerID", "two for one", "a full bucket", "too full a bucket", "nested"],
)
def test_an_answer_is_bounded(answer: Any, good: bool) -> None:
    """A PeerID of 4 MB would take hours to be written in base 58."""

    async def find() -> Any:
        everyone: dict[str, Wire] = {}
        node = await a_node(everyone, ME)

        async def rpc_find(request: Any, context: Any) -> Any:
            return answer

        Wire(everyone, BEN.peer_id).handlers["DHTProtocol.rpc_find"] = rpc_find
        return await node.call_find(peer_id(peer_bytes(BEN.peer_id)), [KEY])

    assert (asyncio.run(find()) is not None) == good


def test_a_peer_has_one_node_and_those_without_a_place_are_bounded() -> None:
    async def many() -> None:
        everyone: dict[str, Wire] = {}
        node = await a_node(everyone, ME, node=7, bucket_size=2)
        table, ben = node.routing_table, Wire(everyone, BEN.peer_id)

        async def ping(wire: Wire, node: int) -> None:
            info = dht_pb.NodeInfo(node_id=dht_id(node).to_bytes())
            await ask(wire, ME, "rpc_ping", dht_pb.PingRequest(peer=info))
            await asyncio.sleep(0)

        for number in range(100):
            await ping(ben, 2**159 + number)
        assert list(table.uid_to_peer_id) == [dht_id(2**159 + 99)], "the one that it was started with last"
        carl = Wire(everyone, new_identity().peer_id)
        await ping(carl, 2**159 + 99)
        assert str(table.get(node_id=dht_id(2**159 + 99))) == BEN.peer_id, "a node is one peer's"
        for number in range(100):
            await ping(Wire(everyone, new_identity().peer_id), 2**159 + 1000 + number)
        assert len(table.uid_to_peer_id) < 10
        await ping(carl, 8)
        assert str(table.get(node_id=dht_id(8))) == carl.peer, "near by there is room"

    asyncio.run(many())


def test_what_a_search_brings_goes_into_a_bucket_only_as_far_as_there_is_room() -> None:
    async def search() -> None:
        node = await a_node({}, ME)
        _, value, expiry_s = a_record(ME)
        node.storage.store(KEY, value, expiry_s, subkey=ME.peer_id)
        state = hivemind_module("dht.node")._SearchState(KEY, float("inf"))
        state.add_candidate(node.storage.get(KEY), node.node_id)
        answer = hivemind_module("utils.timed_storage").ValueWithExpiration(bucket_of(MAX_BUCKET_RECORDS), expiry_s)
        for _ in range(5):
            state.add_candidate(answer, dht_id(9))
        assert num_records(node.storage) == MAX_BUCKET_RECORDS
        heap = node.storage.get(KEY).value.expiration_heap
        assert len(heap) == MAX_BUCKET_RECORDS, "each left an entry behind, again at each search, for a day"

    asyncio.run(search())


def test_a_malformed_address_keeps_nobody_from_joining() -> None:
    """Of somebody in an old invite, or whom the folder knows: only the PeerIDs are needed."""

    async def join() -> None:
        everyone: dict[str, Wire] = {}
        await a_node(everyone, BEN)
        node = Node(ME, NodeSettings(directory=Path("/nowhere")), RecordRules(ME), _p2p=Wire(everyone, ME.peer_id))
        carl = new_identity().peer_id
        await node.join_dht([(BEN.peer_id, ("/x",)), (carl, ("/ip4/1.2.3.4/tcp/70000",)), (carl, ())])
        assert dht_id(7) in node._dht.protocol.routing_table

    asyncio.run(join())

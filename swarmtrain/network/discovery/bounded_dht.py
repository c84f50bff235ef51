"""Bound what another DHT node may ask, store, answer and claim to be.

hivemind itself accepts whatever a 4 MiB message holds, and parses it with a serializer whose extensions nest: 300
levels, in 1.3 kB, end the process with a segmentation fault. Calls and messages keep hivemind's names.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import logging
from types import SimpleNamespace
from typing import Any

import msgpack

from swarmtrain.errors import BadBytesError
from swarmtrain.network.daemon import hivemind_module
from swarmtrain.network.discovery.records import MAX_BUCKET_BYTES, MAX_BUCKET_RECORDS, bound_storage

_log = logging.getLogger(__name__)
_MAX_FOUND = 8
"""Buckets that one call may ask for. A peer asks for one."""
_MAX_STORED = 64
"""Buckets accepted in one call. A newcomer receives all that it should keep in one call; anything beyond this number is
refused."""
_COLUMNS = ("keys", "subkeys", "values", "expiration_time", "in_cache")
_MAX_PEER_ID_BYTES = 64  # a PeerID of ours has 38
_DICTIONARY = 0x50
"""hivemind's msgpack extension for a bucket's records: [most, latest expiry, [[subkey, value, expiry], ...]]."""


def _loads_untrusted(data: bytes) -> Any:
    """Return a value that contains no others, or a bucket's records as hivemind's dictionary.

    Raises BadBytesError for anything else.
    """
    try:
        found = msgpack.unpackb(data, raw=False, max_array_len=0, max_map_len=0, max_ext_len=MAX_BUCKET_BYTES)
        return _records_untrusted(found) if isinstance(found, msgpack.ExtType) else found
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise BadBytesError("not a value, subkey or bucket of the DHT", code="bad-size") from error


def _records_untrusted(found: msgpack.ExtType) -> Any:
    if found.code != _DICTIONARY:
        raise ValueError("another extension")
    _, _, records = msgpack.unpackb(
        found.data, raw=False, max_array_len=MAX_BUCKET_RECORDS, max_map_len=0, max_ext_len=0
    )
    dictionary = hivemind_module("dht.storage").DictionaryDHTValue()
    with dictionary.freeze():
        for subkey, value, expiry_s in records:
            if not (isinstance(subkey, str) and isinstance(value, bytes) and isinstance(expiry_s, float)):
                raise ValueError("something else than records")
            dictionary.store(subkey, value, expiry_s)
    return dictionary


def _check_answer_untrusted(response: Any, num_keys: int, max_nearest: int) -> None:
    if len(response.results) != num_keys:
        raise BadBytesError("an answer with another number of results than keys asked for", code="not-asked-for")
    for result in response.results:
        if max(len(result.nearest_node_ids), len(result.nearest_peer_ids)) > max_nearest:
            raise BadBytesError("an answer with too many nodes", code="bad-size")
        # Conversion to base 58 takes quadratic time.
        if any(len(peer) > _MAX_PEER_ID_BYTES for peer in result.nearest_peer_ids):
            raise BadBytesError("an answer with an invalid PeerID", code="bad-format")


@functools.cache
def _bounded_protocol() -> Any:
    """Return a subclass of hivemind's DHTProtocol that bounds what other nodes send."""
    base, plain = hivemind_module("dht.protocol").DHTProtocol, hivemind_module("utils.serializer").MSGPackSerializer
    pb = hivemind_module("proto.dht_pb2")
    base._collect_rpc_handlers()

    class Serializer(plain):  # type: ignore[misc, valid-type]
        loads = staticmethod(_loads_untrusted)

    class DHTProtocol(base):  # type: ignore[misc, valid-type]  # its name is part of the calls' names
        serializer = Serializer
        own_buckets: set[bytes]

        async def add_p2p_handlers(self, *given: Any, **more: Any) -> None:
            self.own_buckets = set()
            bound_storage(self.storage, self.own_buckets)
            bound_storage(self.cache, self.own_buckets)
            await super().add_p2p_handlers(*given, **more)

        def get_stub(self, peer: Any) -> Any:
            stub = super().get_stub(peer)

            async def rpc_find(request: Any, **more: Any) -> Any:
                response = await stub.rpc_find(request, **more)
                _check_answer_untrusted(response, len(request.keys), self.bucket_size)
                return response

            return SimpleNamespace(rpc_ping=stub.rpc_ping, rpc_store=stub.rpc_store, rpc_find=rpc_find)

        async def rpc_find(self, request: Any, context: Any) -> Any:
            if len(request.keys) > _MAX_FOUND:
                raise BadBytesError(f"it asks for more than {_MAX_FOUND} keys", code="bad-size")
            return await super().rpc_find(request, context)

        async def rpc_store(self, request: Any, context: Any) -> Any:
            await self.rpc_ping(pb.PingRequest(peer=request.peer), context)
            columns = (getattr(request, name) for name in _COLUMNS)
            response = pb.StoreResponse(peer=self.node_info)
            for row in itertools.islice(zip(*columns, strict=True), _MAX_STORED):
                await asyncio.sleep(0)  # verifying a full bucket takes about 20 ms
                one = pb.StoreRequest(**{name: [item] for name, item in zip(_COLUMNS, row, strict=True)})
                response.store_ok.extend((await super().rpc_store(one, context)).store_ok)
            response.store_ok.extend([False] * (len(request.keys) - len(response.store_ok)))
            return response

        async def update_routing_table(self, node_id: Any, peer_id: Any, responded: bool = True) -> None:
            try:
                if not responded or node_id is None or self._has_room(node_id, peer_id):
                    await super().update_routing_table(node_id, peer_id, responded)
            except Exception as error:  # a hivemind task that nobody awaits
                _log.debug("the node of %s: %r", peer_id, error)

        def _has_room(self, node_id: Any, peer_id: Any) -> bool:
            """Keep one node per peer, the latest (it was restarted), and one peer per node, the first.

            Returns False when the bucket's queue of nodes without a place is full.
            """
            table = self.routing_table
            before = table.get(peer_id=peer_id, default=node_id)
            if before != node_id:
                del table[before]
            if node_id in table:
                return bool(table.get(node_id=node_id) == peer_id)
            bucket = table.buckets[table.get_bucket_index(node_id)]
            return bool(len(bucket.replacement_nodes) < table.bucket_size)

    return DHTProtocol


def use_bounded_protocol() -> Any:
    """Return hivemind's DHTNode class, whose nodes have these bounds from now on."""
    module = hivemind_module("dht.node")
    module.DHTProtocol = _bounded_protocol()
    return module.DHTNode

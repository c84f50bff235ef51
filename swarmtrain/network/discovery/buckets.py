"""Store and read the DHT's buckets with as few bytes as possible.

hivemind's own `store` and `get` ask the twenty nodes nearest to a key, each time, and every node that has the bucket
sends all of it: with 25 peers that was twice the traffic of their training. Here the `REPLICAS` nearest nodes keep a
record, and a search ends a few nodes behind those. They are remembered for two minutes, and records are stored and read
there directly (decision 33).
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import msgpack

from swarmtrain.network.daemon import hivemind_module
from swarmtrain.network.discovery.records import RecordRules, unsigned_untrusted
from swarmtrain.protocol.membership.records import ALL_EVERY, ASKED, FEW, REPLICAS

_log = logging.getLogger(__name__)
_WORKERS = 4  # concurrent calls of a search
_MAX_KEYS = 256
"""Keys whose nodes are remembered. Peers that fill buckets determine which are read: four times as many as are read at
once."""
_KNOWN_FOR_S, _DOUBTED_FOR_S = 120.0, 30.0
"""Seconds for which the nodes nearest to a key are remembered; the second value applies if one of them did not
answer."""


@dataclass
class _Nearest:
    """Nodes nearest to a key with their PeerIDs, one per peer, the nearest first, and the time until which they are
    used.

    `seen` are all nodes that the search met: a peer that was restarted may have two.
    """

    nodes: list[tuple[Any, Any]]
    seen: frozenset[Any]
    until_s: float
    num_reads: int = 0


@dataclass
class Buckets:
    """Stores and reads the swarm's buckets through `dht`, hivemind's DHTNode."""

    dht: Any
    rules: RecordRules
    clock: Callable[[], float] = time.monotonic
    rng: random.Random = field(default_factory=random.Random)
    _nearest: dict[str, _Nearest] = field(default_factory=dict)

    async def store(self, key: str, subkey: str, value: bytes, expiry_s: float) -> bool:
        """Store this peer's record at the nodes nearest to the key, its own node included if it is one.

        A silent node is replaced by the next nearest. Returns False if no node took the record.
        """
        key_id = hivemind_module("dht.routing").DHTID.generate(key)
        packed, packed_key = msgpack.packb(value, use_bin_type=True), msgpack.packb(subkey, use_bin_type=True)
        signed = self.rules.sign(key_id.to_bytes(), packed_key, packed, expiry_s)
        nearest = await self._nearest_to(key, key_id)
        answers: list[bool] = []
        asked, left = nearest.nodes[:REPLICAS], nearest.nodes[REPLICAS:]
        while asked:
            stores = (self._store_at(node, peer, key_id, subkey, signed, expiry_s) for node, peer in asked)
            came = [answer for answer in await asyncio.gather(*stores) if answer is not None]
            answers += came
            num_silent = len(asked) - len(came)
            if num_silent:
                nearest.until_s = min(nearest.until_s, self.clock() + _DOUBTED_FOR_S)
            asked, left = left[:num_silent], left[num_silent:]
        return any(answers)

    async def _store_at(
        self, node: Any, peer: Any, key_id: Any, subkey: str, signed: bytes, expiry_s: float
    ) -> bool | None:
        """Store at one node. Return True if the node took the record, False if it refused, None if it gave no valid
        answer."""
        if node == self.dht.node_id:
            return bool(self.dht.protocol.storage.store(key_id, signed, expiry_s, subkey=subkey))
        try:
            answer = await self.dht.protocol.call_store(peer, [key_id], [signed], [expiry_s], subkeys=[subkey])
            return None if answer is None else bool(answer[0])
        except Exception as error:  # another peer's answer, which hivemind parses
            _log.debug("storing a record at %s failed: %r", peer, error)
            return None

    async def _nearest_to(self, key: str, key_id: Any) -> _Nearest:
        """Return the nodes nearest to a key, remembered or found by a search."""
        if (known := self._known(key, key_id)) is not None:
            return known
        found = await self.dht.find_nearest_nodes([key_id], k_nearest=ASKED, beam_size=ASKED, num_workers=_WORKERS)
        peers: dict[Any, Any] = {}
        for node, peer in found[key_id].items():
            peers.setdefault(peer, self.dht.node_id if peer == self.dht.peer_id else node)
        nodes = [(node, peer) for peer, node in peers.items()]
        nearest = _Nearest(nodes, frozenset(found[key_id]), self.clock() + _KNOWN_FOR_S)
        if len(nodes) == ASKED:  # with fewer, newcomers are among the nearest too: remember nothing
            self._nearest[key] = nearest
            while len(self._nearest) > _MAX_KEYS:
                del self._nearest[next(iter(self._nearest))]
        else:
            self._nearest.pop(key, None)
        return nearest

    def _known(self, key: str, key_id: Any) -> _Nearest | None:
        """Return the remembered nodes of a key, if they are fresh and no nearer node has come."""
        known = self._nearest.get(key)
        fresh = known is not None and self.clock() < known.until_s and not self._has_nearer(known, key_id)
        return known if fresh else None

    def _has_nearer(self, known: _Nearest, key_id: Any) -> bool:
        """Return whether the routing table has a node nearer to the key than the nodes that keep it; makes no call."""
        farthest = key_id.xor_distance(known.nodes[REPLICAS - 1][0])
        near = self.dht.protocol.routing_table.get_nearest_neighbors(key_id, REPLICAS, exclude=self.dht.node_id)
        return any(node not in known.seen and key_id.xor_distance(node) < farthest for node, _ in near)

    async def read(self, key: str) -> dict[str, tuple[bytes, float]]:
        """Return the value and expiry of each subkey of a key.

        Asks a few of the nodes that keep the key, and all of them every fourth time: a node may have missed a record,
        or withhold it.
        """
        key_id = hivemind_module("dht.routing").DHTID.generate(key)
        nearest = self._known(key, key_id)  # the nodes at which this peer stores its own
        if nearest is None:
            return await self._search(key)
        managers, nearest.num_reads = nearest.nodes[:REPLICAS], nearest.num_reads + 1
        few = nearest.num_reads % ALL_EVERY != 1
        found = await asyncio.gather(
            *(self._kept_at(*one, key_id) for one in (self.rng.sample(managers, FEW) if few else managers))
        )
        if None in found:
            nearest.until_s = min(nearest.until_s, self.clock() + _DOUBTED_FOR_S)
        if not any(found):
            return await self._search(key)
        newest: dict[str, tuple[bytes, float]] = {}
        for subkey, (value, expiry_s) in (item for one in found if one is not None for item in one.items()):
            if subkey not in newest or newest[subkey][1] < expiry_s:
                newest[subkey] = value, expiry_s
        return newest

    async def _search(self, key: str) -> dict[str, tuple[bytes, float]]:
        """Search as hivemind does."""
        found = await self.dht.get(key, latest=True, beam_size=ASKED)
        if found is None or not isinstance(found.value, dict):
            return {}
        return {
            str(subkey): (item.value, float(item.expiration_time))
            for subkey, item in found.value.items()
            if isinstance(item.value, bytes)
        }

    async def _kept_at(self, node: Any, peer: Any, key_id: Any) -> dict[str, tuple[bytes, float]] | None:
        """Return what a node stores under a key, validated by hivemind; None if it gives no valid answer."""
        try:
            if node == self.dht.node_id:
                kept = self.dht.protocol.storage.get(key_id)
            else:
                answer = await self.dht.protocol.call_find(peer, [key_id])
                kept = answer[key_id][0]
            if kept is None:
                return {}
            items = ((str(subkey), item) for subkey, item in kept.value.items())
            return {subkey: (unsigned_untrusted(item.value), float(item.expiration_time)) for subkey, item in items}
        except Exception as error:  # another peer's answer, which hivemind parses
            _log.debug("reading a bucket at %s failed: %r", peer, error)
            return None

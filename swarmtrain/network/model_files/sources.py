"""Peers that may have a run's model files, for a peer that has not entered the swarm: it has no model to enter with.

It asks peers that it can call for those that they know, as a greeting does. A peer that is hidden cannot be called.
If it serves the files that it has already (`early_service.py`), it says so, and is told of others that do.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from swarmtrain.errors import PeerError
from swarmtrain.network.daemon import swarm_time
from swarmtrain.network.discovery.invite import InvitedPeer
from swarmtrain.network.discovery.records import (
    PRESENCE,
    open_presence_untrusted,
    presence_from_proto_untrusted,
    presence_to_proto,
)
from swarmtrain.network.identity import sign
from swarmtrain.network.model_files.source_table import MOST_SOURCES
from swarmtrain.network.node import Node
from swarmtrain.network.service import PeerCalls
from swarmtrain.protocol.membership.membership import PeerInfo
from swarmtrain.v1 import snapshot_pb2 as pb

_log = logging.getLogger(__name__)
_MAX_PEERS = 256
_MAX_OF_ONE = 32
"""Peers that one peer may name: a liar must not take all places with PeerIDs that it made."""
_MAX_OWN_ADDRESSES = 8
_ASKED = 16  # peers asked each time for those that they know


@dataclass
class FileSources:
    """Peers of a run that can be called. `through` are those of the invite, and others that answered."""

    node: Node
    calls: PeerCalls
    through: Iterable[InvitedPeer]
    is_source: bool = False
    """True if this peer serves files too."""
    _known: dict[str, None] = field(default_factory=dict, init=False)
    _num_named: Counter[str] = field(default_factory=Counter, init=False)
    """How many of them each peer was the first to name."""

    def __post_init__(self) -> None:
        for peer in self.through:
            if peer.peer != self.node.identity.peer_id:
                self.node.remember_addresses(peer.peer, peer.addresses, peer.addresses)
                self._known[peer.peer] = None

    async def find(self) -> list[str]:
        """Ask some of the known peers for others; return all that are known now."""
        asked = random.sample(list(self._known), min(_ASKED, len(self._known)))
        request = pb.HelloRequest(run_sha256=bytes.fromhex(self.calls.run_sha256), file_source=await self._presence())
        await asyncio.gather(*(self._ask(peer, request) for peer in asked))
        return list(self._known)

    async def _presence(self) -> pb.Signed | None:
        """Return where this peer can be called, signed; None if it serves nothing, or cannot be called."""
        identity = self.node.identity
        addresses = await self.node.addresses() if self.is_source else ()
        if not addresses:
            return None
        info = PeerInfo(peer=identity.peer_id, addresses=addresses[:_MAX_OWN_ADDRESSES], stamp=swarm_time())
        return sign(identity, PRESENCE, self.calls.run_sha256, presence_to_proto(info))

    async def _ask(self, peer: str, request: pb.HelloRequest) -> None:
        try:
            reply = await self.calls.hello(peer, request)
            for signed in (*reply.others[:64], *reply.file_sources[:MOST_SOURCES]):
                await asyncio.sleep(0)  # verifying all of them takes about 30 ms
                self._learn_untrusted(signed, peer)
        except PeerError as error:
            _log.debug("%s names no other peers: %s", peer, error)

    def _learn_untrusted(self, signed: pb.Signed, teller: str) -> None:
        """Add the author of a presence that `teller` has. Raises BadBytesError if it is invalid."""
        author, presence = open_presence_untrusted(signed, self.calls.run_sha256)
        info = presence_from_proto_untrusted(author, presence, ())
        is_new = author not in self._known and author != self.node.identity.peer_id
        has_room = len(self._known) < _MAX_PEERS and self._num_named[teller] < _MAX_OF_ONE
        if is_new and info.addresses and not info.hidden and has_room:
            self._num_named[teller] += 1
            self.node.remember_addresses(author, info.addresses)
            self._known[author] = None

"""Peers that may have a run's model files, for a peer that has not entered the swarm: it has no model to enter with.

It asks peers that it can call for those that they know, as a greeting does. A peer that is hidden cannot be called.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from swarmtrain.errors import PeerError
from swarmtrain.network.discovery.invite import InvitedPeer
from swarmtrain.network.discovery.records import open_presence_untrusted, presence_from_proto_untrusted
from swarmtrain.network.node import Node
from swarmtrain.network.service import PeerCalls
from swarmtrain.v1 import snapshot_pb2 as pb

__all__ = ["FileSources"]

_log = logging.getLogger(__name__)
_MAX_PEERS = 256
_MAX_OF_ONE = 32
"""Peers that one peer may name: a liar must not take all places with PeerIDs that it made."""
_ASKED = 16  # peers asked each time for those that they know


@dataclass
class FileSources:
    """Peers of a run that can be called. `through` are those of the invite, and others that answered."""

    node: Node
    calls: PeerCalls
    through: Iterable[InvitedPeer]
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
        await asyncio.gather(*(self._ask(peer) for peer in asked))
        return list(self._known)

    async def _ask(self, peer: str) -> None:
        run_sha256 = self.calls.run_sha256
        try:
            reply = await self.calls.hello(peer, pb.HelloRequest(run_sha256=bytes.fromhex(run_sha256)))
            for signed in reply.others[:64]:
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

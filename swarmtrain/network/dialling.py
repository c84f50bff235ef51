"""Looking at a swarm from outside, and being looked at: for `swarmtrain doctor`.

Nobody here joins anything: a peer is dialled, greeted, and left.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from swarmtrain.errors import BadBytesError
from swarmtrain.membership.lifecycle import PeerInfo
from swarmtrain.network.invite import InvitedPeer
from swarmtrain.network.node import Node
from swarmtrain.network.records import presence_from_proto_untrusted
from swarmtrain.network.service import PeerCalls
from swarmtrain.network.signing import open_signed_untrusted
from swarmtrain.v1 import snapshot_pb2 as pb

__all__ = ["Answer", "knock"]

_MAX_OTHERS = 64


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a peer said when it was greeted."""

    peer: str
    name: str
    address: str  # where it was reached
    round_trip_s: float
    offset_s: float  # its clock less this machine's
    version: str  # of its swarmtrain
    known: tuple[PeerInfo, ...]  # itself and whom it knows, as they describe themselves


async def knock(node: Node, run_sha256: str, peer: InvitedPeer, limit_s: float) -> Answer:
    """Dial and greet a peer; UnreachableError if it does not answer, or not for this run."""
    calls = PeerCalls(node, run_sha256)
    request = pb.HelloRequest(run_sha256=bytes.fromhex(run_sha256))
    await node.connect(peer.peer, peer.addresses, limit_s)
    await calls.hello(peer.peer, request, limit_s)  # the first call opens what the second one uses
    asked_s, began_s = time.time(), time.perf_counter()
    reply = await calls.hello(peer.peer, request, limit_s)
    round_trip_s = time.perf_counter() - began_s
    known = _presences_untrusted([reply.presence, *reply.others[:_MAX_OTHERS]], run_sha256)
    name = next((info.name for info in known if info.peer == peer.peer), "")
    version = reply.swarmtrain_version[:32]
    return Answer(
        peer=peer.peer,
        name=name,
        address=next(iter(await node.seen_at(peer.peer)), ""),
        round_trip_s=round_trip_s,
        offset_s=reply.time - (asked_s + round_trip_s / 2),
        version=version if version.isprintable() else "",
        known=known,
    )


def _presences_untrusted(signed: list[pb.Signed], run_sha256: str) -> tuple[PeerInfo, ...]:
    found = []
    for item in signed:
        try:
            author, message = open_signed_untrusted(item, "presence", run_sha256, pb.Presence, 2048)
            found.append(presence_from_proto_untrusted(author, message))
        except BadBytesError:
            continue  # a liar's word; the others' still counts
    return tuple(found)

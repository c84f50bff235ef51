"""Examine a swarm from outside, and be examined by it: for `swarmtrain doctor`.

Nothing here joins the swarm: it dials a peer, greets it, and leaves.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum

from swarmtrain.errors import BadBytesError, UnreachableError
from swarmtrain.network.discovery.invite import InvitedPeer
from swarmtrain.network.discovery.records import open_presence_untrusted, presence_from_proto_untrusted
from swarmtrain.network.discovery.run_lookup import refusal_untrusted
from swarmtrain.network.identity import Identity, peer_bytes, sign
from swarmtrain.network.node import NOT_SERVED, Node
from swarmtrain.network.reachability.dial_back import DIAL_S, PURPOSE
from swarmtrain.network.service import PeerCalls
from swarmtrain.protocol.membership.membership import PeerInfo
from swarmtrain.v1 import snapshot_pb2 as pb
from swarmtrain.words import short_peer

_MAX_OTHERS = 64
_CALL_S = 4.0  # for the call itself, besides the dialling
_STRANGER_S = 16.0
"""Seconds for a daemon to start on a busy machine."""


class DialOutcome(Enum):
    """Outcome of asking a peer to dial this machine."""

    REACHED = "reached"
    NOT_REACHED = "not reached"
    BUSY = "busy"
    REFUSED = "refused"
    CANNOT = "its version does not know the question"
    SILENT = "no answer"


@dataclass(frozen=True, kw_only=True)
class GreetingAnswer:
    """Reply of a peer to a greeting, and what the connection to it was like."""

    peer: str
    name: str
    address: str  # at which it was reached
    round_trip_s: float
    offset_s: float  # its clock less this machine's
    version: str  # its version of swarmtrain
    known: tuple[PeerInfo, ...]  # the peer and those that it knows, as they describe themselves
    misfit: str = ""  # why its swarmtrain and this one cannot train together, if they cannot


async def knock(node: Node, run_sha256: str, peer: InvitedPeer, limit_s: float) -> GreetingAnswer:
    """Dial and greet a peer. Raises UnreachableError if it does not answer, or not for this run."""
    calls = PeerCalls(node, run_sha256)
    request = pb.HelloRequest(run_sha256=bytes.fromhex(run_sha256))
    await node.connect(peer.peer, peer.addresses, limit_s)
    await calls.hello(peer.peer, request, limit_s)  # the first call opens the stream that the second one measures
    asked_s, began_s = time.time(), time.perf_counter()
    reply = await calls.hello(peer.peer, request, limit_s)
    round_trip_s = time.perf_counter() - began_s
    known = _presences_untrusted([reply.presence, *reply.others[:_MAX_OTHERS]], run_sha256)
    name = next((info.name for info in known if info.peer == peer.peer), "")
    version = reply.swarmtrain_version[:32]
    return GreetingAnswer(
        peer=peer.peer,
        name=name,
        address=next(iter(await node.seen_at(peer.peer)), ""),
        round_trip_s=round_trip_s,
        offset_s=reply.time - (asked_s + round_trip_s / 2),
        version=version if version.isprintable() else "",
        known=known,
        misfit=refusal_untrusted(name or short_peer(peer.peer), reply) or "",
    )


def _presences_untrusted(signed: list[pb.Signed], run_sha256: str) -> tuple[PeerInfo, ...]:
    found = []
    for item in signed:
        try:
            author, message = open_presence_untrusted(item, run_sha256)
            found.append(presence_from_proto_untrusted(author, message))
        except BadBytesError:
            continue  # skip a liar's presence; the others still count
    return tuple(found)


async def ask_to_dial(
    node: Node, run_sha256: str, peer: str, listener: Identity, ports: Sequence[int]
) -> tuple[DialOutcome, str]:
    """Ask `peer`, to which `node` is connected, to dial `listener` at `ports` of this machine.

    Returns the outcome and the address that was reached. `listener` is the identity of a node that nobody knows and
    that dials nobody (`dht_mode` "off"): a node whose addresses are known would be dialled there too, and one that is
    connected would not be dialled at all. With libp2p's DHT it would connect to everyone by itself, from the very port
    it listens at, as soon as the first peer has reached it.
    """
    target = pb.DialTarget(caller=peer_bytes(node.identity.peer_id), ports=list(ports))
    request = pb.DialRequest(target=sign(listener, PURPOSE, "", target))
    return await _ask(PeerCalls(node, run_sha256), peer, request, DIAL_S + _CALL_S)


async def ask_to_be_dialled(calls: PeerCalls, peer: str, ports: Sequence[int]) -> DialOutcome:
    """Ask `peer` to dial this machine at `ports`, as a peer that does not know it would."""
    return (await _ask(calls, peer, pb.DialRequest(own_ports=list(ports)), DIAL_S + _STRANGER_S))[0]


def tcp_ports(addresses: Iterable[str]) -> list[int]:
    """Return the ports in multiaddresses, each once."""
    found = [re.search(r"/tcp/([0-9]{1,5})\b", address) for address in addresses]
    return list(dict.fromkeys(int(match[1]) for match in found if match))


async def _ask(calls: PeerCalls, peer: str, request: pb.DialRequest, limit_s: float) -> tuple[DialOutcome, str]:
    try:
        reply = await calls.dial(peer, request, limit_s)
    except UnreachableError as error:
        return (DialOutcome.CANNOT if NOT_SERVED in str(error) else DialOutcome.SILENT), ""
    outcomes = {
        pb.DialReply.OUTCOME_REACHED: DialOutcome.REACHED,
        pb.DialReply.OUTCOME_NOT_REACHED: DialOutcome.NOT_REACHED,
        pb.DialReply.OUTCOME_BUSY: DialOutcome.BUSY,
        pb.DialReply.OUTCOME_REFUSED: DialOutcome.REFUSED,
    }
    address = reply.address if len(reply.address) < 100 and reply.address.isprintable() else ""
    return outcomes.get(reply.outcome, DialOutcome.SILENT), address

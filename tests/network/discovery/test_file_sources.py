"""Peers that may have a run's model files: some are liars."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

from swarmtrain.network.discovery.invite import InvitedPeer
from swarmtrain.network.discovery.records import PRESENCE, presence_to_proto
from swarmtrain.network.identity import new_identity
from swarmtrain.network.model_files.sources import FileSources
from swarmtrain.network.signatures import sign
from swarmtrain.protocol.membership.membership import PeerInfo
from swarmtrain.v1 import snapshot_pb2 as pb

RUN = "ab" * 32


def presence() -> tuple[str, pb.Signed]:
    identity = new_identity()
    info = PeerInfo(peer=identity.peer_id, addresses=("/ip4/198.51.100.7/tcp/4001",))
    return identity.peer_id, sign(identity, PRESENCE, RUN, presence_to_proto(info))


def test_one_that_names_many_leaves_places_for_those_whom_others_name() -> None:
    honest, shown = presence()
    named = {"liar": [presence()[1] for _ in range(64)], "anna": [shown]}

    async def hello(peer: str, request: pb.HelloRequest) -> pb.HelloReply:
        return pb.HelloReply(others=named.get(peer, ()))

    calls: Any = SimpleNamespace(run_sha256=RUN, hello=hello)
    node: Any = SimpleNamespace(
        identity=SimpleNamespace(peer_id="me"), remember_addresses=lambda peer, *addresses: None
    )
    sources = FileSources(node, calls, [InvitedPeer(peer, ()) for peer in named])
    found = asyncio.run(sources.find())
    assert honest in found and len(found) == 2 + 32 + 1

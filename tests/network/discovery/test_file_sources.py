"""Peers that may have a run's model files: some are liars."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from codes import raises_code

from swarmtrain.errors import BadBytesError, BusyError
from swarmtrain.network.discovery.invite import InvitedPeer
from swarmtrain.network.discovery.records import PRESENCE, open_presence_untrusted, presence_to_proto
from swarmtrain.network.identity import new_identity, sign
from swarmtrain.network.model_files.early_service import _EarlyAnswers
from swarmtrain.network.model_files.source_table import MOST_SOURCES, FileSourceTable
from swarmtrain.network.model_files.sources import FileSources
from swarmtrain.protocol.membership.membership import PeerInfo
from swarmtrain.v1 import snapshot_pb2 as pb

RUN = "ab" * 32


ADDRESS = "/ip4/198.51.100.7/tcp/4001"


def presence(run: str = RUN, addresses: tuple[str, ...] = (ADDRESS,)) -> tuple[str, pb.Signed]:
    identity = new_identity()
    info = PeerInfo(peer=identity.peer_id, addresses=addresses)
    return identity.peer_id, sign(identity, PRESENCE, run, presence_to_proto(info))


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


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_those_that_serve_before_they_enter_are_known_for_a_minute() -> None:
    clock = Clock()
    table = FileSourceTable(RUN, clock)
    (anna, hers), (ben, his), (carl, without) = presence(), presence(), presence(addresses=())
    table.take_untrusted(hers, anna)
    clock.now_s = 30.0
    table.take_untrusted(his, ben)
    table.take_untrusted(without, carl)
    assert table.others_than(carl) == [his, hers] and table.others_than(ben) == [hers]
    clock.now_s = 61.0
    assert table.others_than(carl) == [his], "the other one has not said it again"
    for _ in range(2 * MOST_SOURCES):
        other, signed = presence()
        table.take_untrusted(signed, other)
    assert len(table.others_than(other)) == MOST_SOURCES - 1


def test_a_presence_of_another_peer_or_run_is_no_source() -> None:
    table = FileSourceTable(RUN, Clock())
    (anna, hers), (ben, elsewhere) = presence(), presence("cd" * 32)
    for signed, caller in ((hers, ben), (elsewhere, ben), (pb.Signed(payload=b"x"), anna)):
        with pytest.raises(BadBytesError):
            table.take_untrusted(signed, caller)
    assert not table.others_than("")


def test_one_that_serves_says_so_and_learns_of_others_that_do() -> None:
    identity, (ben, his) = new_identity(), presence()
    asked: list[pb.HelloRequest] = []

    async def hello(peer: str, request: pb.HelloRequest) -> pb.HelloReply:
        asked.append(request)
        return pb.HelloReply(file_sources=[his])

    async def addresses() -> tuple[str, ...]:
        return (ADDRESS,)

    calls: Any = SimpleNamespace(run_sha256=RUN, hello=hello)
    node: Any = SimpleNamespace(identity=identity, remember_addresses=lambda *told: None, addresses=addresses)
    for is_source in (True, False):
        sources = FileSources(node, calls, [InvitedPeer("boot", ())], is_source)
        assert set(asyncio.run(sources.find())) == {"boot", ben}
    assert [request.HasField("file_source") for request in asked] == [True, False]
    author, told = open_presence_untrusted(asked[0].file_source, RUN)
    assert author == identity.peer_id and tuple(told.addresses) == (ADDRESS,) and not told.training


def test_before_it_enters_it_answers_those_alone_that_fetch_files_too() -> None:
    run: Any = SimpleNamespace()
    answers = _EarlyAnswers(SimpleNamespace(sha256=RUN, run=run))  # type: ignore[arg-type]
    (anna, hers), (ben, his) = presence(), presence()
    for caller, signed in ((anna, hers), (ben, his)):
        reply = answers.hello(pb.HelloRequest(file_source=signed), caller)
    assert reply.away and list(reply.file_sources) == [hers] and not reply.HasField("presence")
    with raises_code("busy", BusyError):
        answers.hello(pb.HelloRequest(presence=hers), anna)
    for ask in (
        answers.state(pb.StateRequest()),
        answers.round(pb.RoundRequest(), anna),
        answers.publication(pb.PublicationRequest(), anna),
    ):
        with raises_code("busy", BusyError):
            asyncio.run(ask)
    with raises_code("busy", BusyError):
        answers.history()

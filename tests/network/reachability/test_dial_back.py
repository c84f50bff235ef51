"""Asking a peer to dial back, with real daemons on loopback: the answer is the truth, and nobody else is dialled."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pytest
from codes import raises_code

from swarmtrain.errors import UnreachableError
from swarmtrain.network.discovery.invite import InvitedPeer
from swarmtrain.network.identity import Identity, load_or_create_identity, new_identity, peer_bytes, sign
from swarmtrain.network.node import NOT_SERVED, NetworkThread, Node, NodeSettings
from swarmtrain.network.reachability.dial_back import PURPOSE, DialBack
from swarmtrain.network.reachability.probe import DialOutcome, ask_to_be_dialled, ask_to_dial, knock, tcp_ports
from swarmtrain.network.service import PeerCalls, namespace_of, service_type
from swarmtrain.network.snapshots.store import SnapshotStore
from swarmtrain.protocol.membership.budgets import DialBudget
from swarmtrain.v1 import snapshot_pb2 as pb

pytestmark = pytest.mark.processes

RUN = hashlib.sha256(b"a run").hexdigest()
_T = TypeVar("_T")


class Answering:
    """Answers for the helper's service; only greetings come."""

    def hello(self, request: pb.HelloRequest, caller: str) -> pb.HelloReply:
        return pb.HelloReply(swarmtrain_version="0.1.0", time=time.time() + 5.0)

    async def state(self, request: pb.StateRequest) -> pb.StateReply:
        return pb.StateReply()

    async def round(self, request: pb.RoundRequest, caller: str) -> pb.RoundReply:
        return pb.RoundReply()


@dataclass
class Here:
    """Helper that serves a run, a peer that asks it, and an unknown peer that listens."""

    network: NetworkThread
    folder: Path
    helper: Node
    asker: Node
    service: Any

    def run(self, coroutine: Coroutine[Any, Any, _T]) -> _T:
        return self.network.run(coroutine, 30)

    def listener(self, name: str, listen: str = "/ip4/127.0.0.1/tcp/0") -> tuple[Node, int]:
        node = self.run(start(self.folder / name, listen, "off"))
        return node, int(self.run(node.addresses())[0].rsplit("/", 1)[1])

    def ask(self, identity: Identity, *ports: int) -> tuple[DialOutcome, str]:
        return self.run(ask_to_dial(self.asker, RUN, self.helper.identity.peer_id, identity, ports))

    @property
    def back(self) -> DialBack:
        back = self.service._dial_back
        assert isinstance(back, DialBack)
        return back


async def start(folder: Path, listen: str = "/ip4/127.0.0.1/tcp/0", dht_mode: str = "server") -> Node:
    folder.mkdir()
    key_path = folder / "identity.key"
    settings = NodeSettings(directory=folder, listen=(listen,), call_limit_s=3.0, dht_mode=dht_mode)
    return await Node.start(settings, load_or_create_identity(key_path), key_path)


@pytest.fixture(scope="module")
def everyone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Here]:
    folder = tmp_path_factory.mktemp("dialback")
    network = NetworkThread()
    helper, asker = (network.run(start(folder / name), 30) for name in ("helper", "asker"))
    service = service_type()(Answering(), SnapshotStore(), {}, helper)
    here = Here(network, folder, helper, asker, service)
    here.run(helper.serve(service, namespace_of(RUN)))
    here.run(asker.connect(helper.identity.peer_id, here.run(helper.addresses())))
    yield here
    for node in (helper, asker):
        here.run(node.stop())
    network.stop()


@pytest.fixture
def here(everyone: Here) -> Here:
    everyone.back.limit_s, everyone.back.budget = 1.0, DialBudget()
    return everyone


def test_one_who_listens_is_reached_and_let_go(here: Here) -> None:
    node, port = here.listener("listens")
    known = here.helper.known_peers()
    assert here.ask(node.identity, 9, port) == (DialOutcome.REACHED, f"/ip4/127.0.0.1/tcp/{port}")
    assert here.run(here.helper.seen_at(node.identity.peer_id)) == (), "the connection is closed again"
    assert here.helper.known_peers() == known
    here.run(node.stop())


def test_a_listener_that_was_reached_does_not_then_dial_others(here: Here) -> None:
    """Else the next one who is asked would see it come from its port and think that it had reached it."""
    node, port = here.listener("quiet")
    second = here.run(start(here.folder / "second"))
    here.run(second.connect(here.helper.identity.peer_id, here.run(here.helper.addresses())))
    assert here.ask(node.identity, port)[0] is DialOutcome.REACHED

    async def seen_for_a_while() -> set[str]:
        seen: set[str] = set()
        for _ in range(20):
            for other in (here.helper, second):
                seen.update(await other.seen_at(node.identity.peer_id))
            await asyncio.sleep(0.02)
        return seen

    assert here.run(seen_for_a_while()) == set()
    for each in (node, second):
        here.run(each.stop())


def test_one_who_cannot_be_reached_is_told_so_whatever_is_there_instead(here: Here) -> None:
    """Nobody at the port; another peer at the port; a listener at an address that the question did not come from."""
    hidden, port = here.listener("hidden", "/ip4/127.0.0.2/tcp/0")
    other, port_of_other = here.listener("other")
    for wrong in (port, port_of_other):
        began_s = time.monotonic()
        assert here.ask(hidden.identity, wrong) == (DialOutcome.NOT_REACHED, "")
        assert time.monotonic() - began_s >= 1.0, "never sooner, whatever was found"
    for node in (hidden, other):
        here.run(node.stop())


def test_a_known_identity_proves_nothing_and_is_refused(here: Here) -> None:
    """Measured of the daemon: a connection that is there is used, and an address once learnt is dialled too."""
    closed = "/ip4/127.0.0.1/tcp/9"
    node, port = here.listener("known")
    here.run(here.helper.dial_once(here.asker.identity.peer_id, (closed,), 3.0))  # no error: it was not dialled
    assert here.ask(here.asker.identity, 9) == (DialOutcome.REFUSED, "")
    here.run(node.connect(here.helper.identity.peer_id, here.run(here.helper.addresses())))
    assert here.ask(node.identity, port) == (DialOutcome.REFUSED, "")
    here.run(here.helper.hang_up(node.identity.peer_id))
    assert here.ask(node.identity, 9) == (DialOutcome.NOT_REACHED, ""), (
        "it was dialled where it is, which does not count"
    )
    with pytest.raises(UnreachableError):
        here.run(here.helper.dial_once(new_identity().peer_id, (closed,), 3.0))
    here.run(node.stop())


def test_what_is_not_ones_own_is_refused(here: Here) -> None:
    node, port = here.listener("asked-for")
    anna, listener = here.asker.identity, node.identity
    target = pb.DialTarget(caller=peer_bytes(anna.peer_id), ports=[port])
    of_another = pb.DialTarget(caller=peer_bytes(new_identity().peer_id), ports=[port])
    forged = sign(listener, PURPOSE, "", target)
    forged.author = peer_bytes(new_identity().peer_id)
    long = pb.DialTarget(caller=peer_bytes(anna.peer_id), ports=[port] * 1000)
    bad = [
        pb.Signed(),
        forged,
        sign(listener, PURPOSE, "", of_another),
        sign(listener, "presence", "", target),
        sign(listener, PURPOSE, "", pb.DialTarget(caller=peer_bytes(anna.peer_id), ports=[0, 70000])),
        sign(listener, PURPOSE, "", long),
        sign(here.helper.identity, PURPOSE, "", target),
    ]
    for signed in bad:
        reply = here.run(here.back.answer(pb.DialRequest(target=signed), anna.peer_id))
        assert reply.outcome == pb.DialReply.OUTCOME_REFUSED
    unseen = pb.DialTarget(caller=peer_bytes(listener.peer_id), ports=[port])
    request = pb.DialRequest(target=sign(new_identity(), PURPOSE, "", unseen))
    assert here.run(here.back.answer(request, listener.peer_id)).outcome == pb.DialReply.OUTCOME_REFUSED
    assert here.run(here.helper.seen_at(listener.peer_id)) == ()
    here.run(node.stop())


def test_only_so_many(here: Here) -> None:
    here.back.budget = DialBudget(per_host=3)
    anna = here.asker.identity.peer_id

    async def ask_at_once(number: int) -> list[int]:
        target = pb.DialTarget(caller=peer_bytes(anna), ports=[9])
        requests = [pb.DialRequest(target=sign(new_identity(), PURPOSE, "", target)) for _ in range(number)]
        return [reply.outcome for reply in await asyncio.gather(*(here.back.answer(r, anna) for r in requests))]

    busy, not_reached = pb.DialReply.OUTCOME_BUSY, pb.DialReply.OUTCOME_NOT_REACHED
    assert here.run(ask_at_once(5)) == [not_reached, not_reached, busy, busy, busy], "two at once"
    assert here.run(ask_at_once(1)) == [not_reached]
    assert here.run(ask_at_once(1)) == [busy], "three a minute"
    assert here.back._at_once == 0


def test_an_older_peer_does_not_know_the_question(here: Here) -> None:
    async def older() -> DialOutcome:
        serving = await start(here.folder / "older")
        await serving.serve(service_type()(Answering(), SnapshotStore(), {}, serving), namespace_of(RUN))
        await serving._p2p.remove_protobuf_handler(f"{namespace_of(RUN)}::PeerService.rpc_dial")
        await here.asker.connect(serving.identity.peer_id, await serving.addresses())
        outcome, _ = await ask_to_dial(here.asker, RUN, serving.identity.peer_id, new_identity(), [9])
        await serving.stop()
        return outcome

    assert here.run(older()) is DialOutcome.CANNOT


def test_a_knock_says_who_where_and_how_far(here: Here) -> None:
    addresses = here.run(here.helper.addresses())
    answer = here.run(knock(here.asker, RUN, InvitedPeer(here.helper.identity.peer_id, addresses), 3.0))
    assert (answer.peer, answer.address, answer.version) == (here.helper.identity.peer_id, addresses[0], "0.1.0")
    assert 0 < answer.round_trip_s < 3 and answer.offset_s == pytest.approx(5.0, abs=1.0) and answer.known == ()
    with pytest.raises(UnreachableError):
        here.run(knock(here.asker, RUN, InvitedPeer(new_identity().peer_id, addresses), 3.0))
    with raises_code("unreachable", UnreachableError, NOT_SERVED):
        here.run(knock(here.asker, "00" * 32, InvitedPeer(here.helper.identity.peer_id, addresses), 3.0))


def test_a_peer_that_is_known_is_dialled_by_a_stranger(here: Here) -> None:
    """At its port it is reached, though it is connected; where nobody listens it is not, though it is connected."""
    asker, helper = here.asker, here.helper.identity.peer_id
    port = tcp_ports(here.run(asker.addresses()))[0]
    calls = PeerCalls(asker, RUN)
    assert here.run(ask_to_be_dialled(calls, helper, [9, port])) is DialOutcome.REACHED
    assert here.run(ask_to_be_dialled(calls, helper, [9])) is DialOutcome.NOT_REACHED
    other, port_of_other = here.listener("another")
    assert here.run(ask_to_be_dialled(calls, helper, [port_of_other])) is DialOutcome.NOT_REACHED
    assert here.run(ask_to_be_dialled(calls, helper, [0, 70000])) is DialOutcome.REFUSED
    here.back.budget = DialBudget(per_host=0)
    assert here.run(ask_to_be_dialled(calls, helper, [port])) is DialOutcome.BUSY
    here.run(other.stop())


def test_a_hidden_peer_is_called_only_over_its_own_connection(here: Here) -> None:
    stranger = new_identity().peer_id
    calls = PeerCalls(here.helper, RUN, is_hidden=lambda peer: True)
    failed: list[str] = []
    calls.on_failure = lambda peer, error: failed.append(str(error))
    with raises_code("unreachable", UnreachableError, "dial it"):
        here.run(calls.hello(stranger, pb.HelloRequest()))
    assert failed
    with raises_code("unreachable", UnreachableError, NOT_SERVED):  # it was called
        here.run(calls.hello(here.asker.identity.peer_id, pb.HelloRequest()))

"""Server and its workers in memory, with the real exchange, publisher, uploads and arithmetic."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from patience import PATIENCE_S
from replies import Replies
from torch import Tensor

from swarmtrain.algorithm.outer import DelayedNesterov, OuterConstants, OuterState
from swarmtrain.errors import UnreachableError
from swarmtrain.events import ClippedEvent, Event, RefusedEvent, WarningEvent
from swarmtrain.network.answers import Serving
from swarmtrain.network.codec import average_bytes_untrusted
from swarmtrain.network.daemon import swarm_time
from swarmtrain.network.discovery.run_lookup import PublishedRun
from swarmtrain.network.identity import Identity, new_identity
from swarmtrain.network.node import NetworkThread, NodeSettings, TrafficCount
from swarmtrain.network.snapshots.store import Body, TensorSpec
from swarmtrain.network.swarm import Swarm
from swarmtrain.peer.checkpoints.checkpoint import Checkpoint
from swarmtrain.peer.lifecycle.stop import StopFlag
from swarmtrain.peer.merging.server import MergeServer
from swarmtrain.peer.merging.server_exchange import ServerExchange, lead
from swarmtrain.peer.merging.updates import LocalUpdate, Served
from swarmtrain.protocol.gossip.fragments import FragmentRound
from swarmtrain.protocol.membership.membership import PeerInfo
from swarmtrain.protocol.server import GradientUpload
from swarmtrain.protocol.tokens.progress import Progress
from swarmtrain.run import PublishedSection, RunFile
from swarmtrain.v1 import snapshot_pb2 as pb

SERVER, ANNA, BEN = (new_identity(bytes([i]) * 32) for i in range(3))
SPECS = (TensorSpec("w", (40, 50)), TensorSpec("norm", (7,)))
SIZE = 2007
STEP_TOKENS = 16 * 128


class Calls:
    """Stands in for `PeerCalls`: the others' real answers, unless they are gone."""

    def __init__(self, world: World, me: str) -> None:
        self.world, self.me = world, me
        self.pull_slots, self.node = asyncio.Semaphore(8), SimpleNamespace(traffic=TrafficCount())

    def _other(self, peer: str) -> Swarm:
        if peer in self.world.gone:
            raise UnreachableError("nobody")
        return self.world.swarms[peer]

    async def publication(self, peer: str, request: pb.PublicationRequest) -> pb.PublicationReply:
        return await self._other(peer).answers.publication(request, self.me)

    async def hello(self, peer: str, request: pb.HelloRequest, limit_s: float | None = None) -> pb.HelloReply:
        return self._other(peer).answers.hello(request, self.me)

    async def state(self, peer: str, min_round: int) -> pb.StateReply:
        return await self._other(peer).answers.state(pb.StateRequest(min_round=min_round))

    async def open_pull(self, peer: str, request: pb.PullRequest) -> Any:
        return Replies(self._other(peer).store.serve(request))


class World:
    """Server and its workers in one network thread."""

    def __init__(self, network: NetworkThread, **merge: Any) -> None:
        self.network, self.gone = network, set[str]()
        self.swarms: dict[str, Swarm] = {}
        self.events: dict[str, list[Event]] = {}
        group = PublishedSection(
            created="2030-01-02T03:04:05+00:00",
            swarmtrain="0.1.0",
            held_out_sha256="ab" * 32,
            held_out_bytes=65_536,
            server=SERVER.peer_id,
        )
        table = {"run": {"total_tokens": 10**9}, "merge": {"method": "server", **merge}}
        self.run = RunFile.model_validate(table).model_copy(update={"published": group})
        self.kept: list[Checkpoint] = []
        self.theta = torch.randn(SIZE, generator=torch.Generator().manual_seed(1))
        self.server = self.new_server()
        self.workers: dict[str, ServerExchange] = {}

    def swarm(self, identity: Identity) -> Swarm:
        node: Any = SimpleNamespace(
            identity=identity,
            settings=NodeSettings(directory=Path("/nowhere")),
            traffic=TrafficCount(),
            remember_addresses=lambda *_: None,
        )
        published = PublishedRun(b"", "ab" * 32, self.run, b"", b"")
        is_server = identity is SERVER
        me = PeerInfo(
            peer=identity.peer_id, is_bootstrap=is_server, training=not is_server, addresses=("/ip4/1.2.3.4",)
        )
        events = self.events[identity.peer_id] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("swarmtrain.network.swarm.PeerCalls", lambda *given, **more: Calls(self, identity.peer_id))
            swarm = Swarm(node, published, SPECS, average_bytes_untrusted, events.append, me)
        swarm.rounds.come_back()
        swarm.presence.listens_at = me.addresses
        self.swarms[identity.peer_id] = swarm
        return swarm

    def new_server(self, kept: Checkpoint | None = None) -> MergeServer:
        """Make a server that begins, or that continues from a checkpoint."""

        async def make() -> MergeServer:
            server = MergeServer(
                self.swarm(SERVER), OuterState(self.theta, torch.zeros(SIZE)), lambda kept: self.kept.append(kept)
            )
            if kept is not None:
                server.restore(kept)
            server._serve()
            server.swarm.serving = Serving(publishers={("gradient", 0): server.publisher}, pulling=server)
            return server

        server = self.server = self.network.run(make(), 10)
        return server

    def join(self, identity: Identity) -> ServerExchange:
        """Add a worker; it and the server know each other."""
        worker = ServerExchange(self.network, self.swarm(identity), self.run, StopFlag())
        worker.swarm.serving = worker.serving()
        self.workers[identity.peer_id] = worker

        async def meet() -> None:
            await worker.swarm.greeter.greet(SERVER.peer_id)

        self.network.run(meet(), 10)
        return worker

    def do(self, work: Any) -> Any:
        """Run a coroutine in the network thread."""
        return self.network.run(work, PATIENCE_S)

    def take_in(self, worker: ServerExchange) -> None:
        """Let the server ask this worker for all it has."""
        self.do(self.server.intake.empty(worker.swarm.identity.peer_id))

    def bring_weights(self, worker: ServerExchange) -> bool:
        """Let the worker pull the server's weights, as it does late in a round."""
        return bool(self.do(worker.link._pull()))


@pytest.fixture
def world() -> Iterator[Callable[..., World]]:
    network = NetworkThread()
    yield lambda **merge: World(network, **merge)
    network.stop()


EXACT: dict[str, Any] = {"theta_format": "fp32", "gradient_format": "fp32", "robust": "none"}


def train(worker: ServerExchange, round: int, theta: Tensor, gradient: Tensor, steps: int = 2) -> Served:
    """Train a round of `worker` from `theta` that results in `gradient`; it uploads it and continues."""
    tokens = steps * STEP_TOKENS
    contribution = LocalUpdate(
        round=round,
        part=1,
        thetas=(theta,),
        fragment_rounds=(FragmentRound(round, 1, tokens, steps),),
        reached=theta - gradient,
        tokens=tokens,
        inner_steps=steps,
        own_tokens=(round + 1) * tokens,
        base="",
    )
    worker.publish(contribution)
    return worker.collect()


def random_gradient(seed: int, size: float = 0.01) -> Tensor:
    return size * torch.randn(SIZE, generator=torch.Generator().manual_seed(seed))


def test_the_arithmetic_is_delayed_nesterov_on_the_same_arrivals(world: Callable[..., World]) -> None:
    """To the bit, and again from a checkpoint in the middle of a buffer."""
    it = world(**EXACT, buffer_arrivals=3, outer_momentum=0.9, momentum_share=0.1, momentum_ramp_rounds=0)
    anna, ben = it.join(ANNA), it.join(BEN)
    constants = OuterConstants(learning_rate=0.7, momentum=0.9)
    plain = DelayedNesterov(OuterState(it.theta, torch.zeros(SIZE)), constants, 3, 0.1)
    rounds = {ANNA.peer_id: 0, BEN.peer_id: 0}
    for number, worker in enumerate([anna, ben, anna, anna, ben, ben, anna, ben]):
        peer = worker.swarm.identity.peer_id
        served = train(worker, rounds[peer], it.theta, random_gradient(number))
        assert served.theta is worker._contribution.reached, "no new weights came: it goes on from its own"
        rounds[peer] += 1
        it.take_in(worker)
        plain.arrive(worker._contribution.gradient)
        assert torch.equal(it.server.state.theta, plain.state.theta)
        assert torch.equal(it.server.state.momentum, plain.state.momentum)
        if number == 3:
            it.new_server(it.do(it.server.checkpoint_when_idle({"other": 1})))
            for each in (anna, ben):
                it.do(each.swarm.greeter.greet(SERVER.peer_id))
    assert (it.server.arrivals, it.server.refreshes, it.server.progress.round) == (8, 2, 3)
    assert it.server.versions.rows() == [[ANNA.peer_id, 3], [BEN.peer_id, 3]]
    assert [kept.progress.round for kept in it.kept] == [1, 2]


def test_every_step_enters_once_whatever_is_lost(world: Callable[..., World]) -> None:
    """With eps = N = 1 and no momentum the server's weights are the initial ones less all gradients: whole numbers."""
    it = world(**EXACT, buffer_arrivals=1, outer_momentum=0.0, outer_learning_rate=1.0)
    it.theta = torch.zeros(SIZE)
    it.new_server()
    anna, chance = it.join(ANNA), torch.Generator().manual_seed(3)
    theta, total = it.theta, torch.zeros(SIZE)
    for round in range(40):
        gradient = torch.randint(-3, 4, (SIZE,), generator=chance).float()
        total += gradient
        luck = float(torch.rand(1, generator=chance))
        it.gone = {SERVER.peer_id} if 0.3 < luck < 0.5 else set()
        if luck < 0.6:
            it.bring_weights(anna)
        served = train(anna, round, theta, gradient)
        if served.merged:
            assert torch.equal(served.theta, -total), (
                "the server's weights and what is not in them yet: no step is lost"
            )
        theta = served.theta
        if luck > 0.4:
            it.take_in(anna)
    it.take_in(anna)
    assert torch.equal(it.server.state.theta, -total)


def test_a_worker_goes_on_from_the_servers_weights(world: Callable[..., World]) -> None:
    it = world(buffer_arrivals=2)
    anna = it.join(ANNA)
    first, second = random_gradient(1), random_gradient(2)
    theta = train(anna, 0, it.theta, first).theta
    it.take_in(anna)
    assert it.bring_weights(anna)
    served = train(anna, 1, theta, second)
    (merged,) = served.merged
    assert (merged.peer, merged.round, merged.staleness_rounds) == (SERVER.peer_id, 1, 1)
    expected = lead(it.server.state.theta, [second])
    assert torch.allclose(served.theta, expected, atol=0.02), "int8"
    assert [piece.arrivals for piece in anna.publisher.uploads.pieces] == [0], "it began before those weights"
    train(anna, 2, served.theta, random_gradient(3))
    assert not it.bring_weights(anna), "it has those"
    it.take_in(anna)
    assert it.bring_weights(anna)
    assert anna.link.take() is not None and it.server.versions.round(ANNA.peer_id) == 2


def test_only_the_server_may_take_what_is_handed_in(world: Callable[..., World]) -> None:
    it = world()
    anna = it.join(ANNA)
    train(anna, 0, it.theta, random_gradient(1))
    request = pb.PublicationRequest(has_any=True, round=2**40)
    assert not it.do(anna.swarm.answers.publication(request, BEN.peer_id)).HasField("manifest")
    it.take_in(anna)
    assert it.server.arrivals == 1


def hostile(worker: ServerExchange, fault: str) -> None:
    """Make what it hands in wrong."""
    publisher = worker.publisher
    publication = publisher._publication
    other = new_identity(b"x" * 32)

    def encode_wrongly(piece: GradientUpload[Tensor]) -> Body:
        good = piece.gradient.clone()
        data = bytearray(bytes(SIZE * 4))
        memoryview(data)[:4] = b"\x00\x00\xc0\x7f"
        return Body([data if fault == "not finite" else memoryview(good.numpy()).cast("B")])  # type: ignore[arg-type]

    changes: dict[str, dict[str, Any]] = {
        "too many tokens": {"tokens": 10**9, "author_tokens": 10**9},
        "no steps": {"inner_steps": 0},
        "more than it ever had": {"author_tokens": 1},
        "a part": {"part": 2},
    }

    def wrong(piece: GradientUpload[Tensor]) -> Any:
        return dataclasses.replace(publication(piece), **changes.get(fault, {}))

    publisher._publication = wrong  # type: ignore[method-assign]
    publisher.encode = encode_wrongly
    if fault == "forged":
        publisher.identity = other
    if fault == "another shape":
        publisher.specs = (TensorSpec("gradient/w", (SIZE,)),)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("forged", "another peer"),
        ("not finite", "not finite"),
        ("too many tokens", "claims 1000000000 tokens"),
        ("no steps", "in 0 steps"),
        ("more than it ever had", "more tokens in its round"),
        ("a part", "part 2"),
        ("another shape", "another shape"),
    ],
)
def test_what_is_wrong_costs_nothing_and_is_named(world: Callable[..., World], fault: str, said: str) -> None:
    it = world(**EXACT)
    anna, ben = it.join(ANNA), it.join(BEN)
    train(anna, 0, it.theta, random_gradient(1))
    hostile(anna, fault)
    it.take_in(anna)
    assert it.server.arrivals == 0 and it.server.state.theta is it.theta
    (refused,) = [event for event in it.events[SERVER.peer_id] if isinstance(event, RefusedEvent)]
    assert refused.from_peer == ANNA.peer_id and said in refused.detail
    train(ben, 0, it.theta, random_gradient(2))
    it.take_in(ben)
    assert it.server.arrivals == 1


def test_a_huge_gradient_is_cut_the_first_of_all_too(world: Callable[..., World]) -> None:
    it = world(buffer_arrivals=1, outer_momentum=0.0)
    anna, ben = it.join(ANNA), it.join(BEN)
    train(anna, 0, it.theta, torch.full((SIZE,), 1e25))
    it.take_in(anna)
    assert float((it.server.state.theta - it.theta).norm()) <= 0.71 * float(it.theta.norm())
    for round in range(6):
        train(ben, round, it.theta, random_gradient(round))
        it.take_in(ben)
    before = it.server.state.theta
    train(anna, 1, it.theta, torch.full((SIZE,), 1e25))
    it.take_in(anna)
    assert float((it.server.state.theta - before).norm()) < 4 * float(random_gradient(0).norm())
    assert not any(isinstance(event, ClippedEvent) for event in it.events[SERVER.peer_id]), "it may have come back"
    train(anna, 2, it.theta, torch.full((SIZE,), 1e25))
    it.take_in(anna)
    named = {event.from_peer for event in it.events[SERVER.peer_id] if isinstance(event, ClippedEvent)}
    assert named == {ANNA.peer_id}


def test_what_is_too_old_is_not_taken_and_its_worker_goes_on_from_the_newest(world: Callable[..., World]) -> None:
    it = world(**EXACT, buffer_arrivals=1, max_staleness_rounds=3)
    anna, ben = it.join(ANNA), it.join(BEN)
    late = train(anna, 0, it.theta, random_gradient(99)).theta
    theta = it.theta
    for round in range(4):
        it.bring_weights(ben)
        theta = train(ben, round, theta, random_gradient(round)).theta
        it.take_in(ben)
    before = it.server.state.theta
    it.take_in(anna)
    assert it.server.state.theta is before
    (warning,) = [event for event in it.events[SERVER.peer_id] if isinstance(event, WarningEvent)]
    assert warning.code == "update-too-old" and "4 rounds old" in warning.message
    train(ben, 4, theta, random_gradient(4))
    it.take_in(ben)
    assert it.bring_weights(anna)
    served = train(anna, 1, late, random_gradient(100))
    assert torch.equal(served.theta, lead(it.server.state.theta, [anna._contribution.gradient]))
    it.take_in(anna)
    assert it.server.arrivals == 5, "this too began from the old weights"
    train(anna, 2, served.theta, random_gradient(101))
    it.take_in(anna)
    assert it.server.arrivals == 6


def test_a_silent_server_is_told_once_and_what_was_learnt_comes_later(world: Callable[..., World]) -> None:
    it = world(**EXACT, buffer_arrivals=1, outer_momentum=0.0, outer_learning_rate=1.0)
    anna = it.join(ANNA)
    it.gone = {SERVER.peer_id}
    theta, total = it.theta, torch.zeros(SIZE)
    for round in range(12):
        anna.link.heard_s = swarm_time() - 60
        anna._look_whether_silent(swarm_time())
        gradient = random_gradient(round)
        theta = train(anna, round, theta, gradient).theta
        total += gradient
    assert torch.allclose(theta, it.theta - total, atol=1e-4), "it goes on from where it is"
    (warning,) = [event for event in it.events[ANNA.peer_id] if isinstance(event, WarningEvent)]
    assert warning.code == "server-silent"
    it.gone = set()
    it.take_in(anna)
    assert it.server.arrivals == 1
    assert torch.allclose(it.server.state.theta, it.theta - total, atol=1e-4)
    assert it.bring_weights(anna)
    anna._look_whether_silent(swarm_time())
    assert not anna._told_silent


def test_a_joiner_takes_the_servers_state_and_a_later_round_than_it_ever_had(world: Callable[..., World]) -> None:
    it = world(**EXACT, buffer_arrivals=1)
    anna = it.join(ANNA)
    assert anna.present_state(Progress()) is None, "nobody has trained yet"
    for round in range(5):
        train(anna, round, it.theta, random_gradient(round))
        it.take_in(anna)
    late = it.join(BEN)
    new = late.present_state(Progress())
    assert new is not None and new.from_peer == SERVER.peer_id and new.progress.round == 5
    assert torch.equal(new.state.theta, it.server.state.theta)
    assert late._base_arrivals == 5
    again = it.join(ANNA)  # its folder was put back, or its last checkpoint is old
    new = again.present_state(Progress(round=2, run_tokens=1))
    assert new is not None and new.progress.round == 5
    train(again, 5, new.state.theta, random_gradient(5))
    it.take_in(again)
    assert it.server.arrivals == 6


def test_what_is_not_finite_is_not_handed_in(world: Callable[..., World]) -> None:
    it = world(**EXACT)
    anna = it.join(ANNA)
    served = train(anna, 0, it.theta, torch.full((SIZE,), float("nan")))
    assert served.theta is it.theta
    it.take_in(anna)
    assert it.server.arrivals == 0
    assert not [event for event in it.events[SERVER.peer_id] if isinstance(event, RefusedEvent)]


def test_a_checkpoint_that_is_none_of_a_server_is_refused(world: Callable[..., World]) -> None:
    it = world(**EXACT)
    anna = it.join(ANNA)
    train(anna, 0, it.theta, random_gradient(1))
    it.take_in(anna)
    kept = it.server.checkpoint({})
    row = kept.extra["server"]
    for extra in ({}, {"server": {**row, "arrivals": -1}}, {"server": {**row, "marks": [["a"]]}}, {"server": 3}):
        with pytest.raises(ValueError):
            it.server.restore(dataclasses.replace(kept, extra=extra))
    assert it.server.arrivals == 1


def test_unequal_workers_converge(world: Callable[..., World]) -> None:
    """Each pulls the weights towards its own target, one four times as often; the server ends near their middle."""
    it = world(buffer_arrivals=2, outer_momentum=0.5)
    anna, ben = it.join(ANNA), it.join(BEN)
    middle = torch.zeros(SIZE)
    targets = {ANNA.peer_id: random_gradient(1, 0.1), BEN.peer_id: -random_gradient(1, 0.1)}
    thetas = dict.fromkeys(targets, it.theta)
    rounds = dict.fromkeys(targets, 0)
    for tick in range(80):
        for worker, every in ((anna, 1), (ben, 4)):
            if tick % every == 0:
                peer = worker.swarm.identity.peer_id
                gradient = 0.1 * every * (thetas[peer] - targets[peer])
                it.bring_weights(worker)
                thetas[peer] = train(worker, rounds[peer], thetas[peer], gradient).theta
                rounds[peer] += 1
                it.take_in(worker)
    assert float((it.server.state.theta - middle).norm()) < 0.1 * float(it.theta.norm())

"""Peers that merge at their own pace, whole but for the network: real trainers and exchanges, calls within memory."""

from __future__ import annotations

import dataclasses
import math
import statistics
import threading
import time
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from grouped import grouped_model
from patience import PATIENCE_S
from replies import Replies
from sessions import train_round
from torch import Tensor

from swarmtrain.algorithm.gossip import PartnerUpdate, PreparedMerge
from swarmtrain.algorithm.outer import flatten
from swarmtrain.data.batches import Batches
from swarmtrain.data.tokens import ByteTokenizer
from swarmtrain.events import CaughtUpEvent, ClippedEvent, Event, RefusedEvent, WarningEvent
from swarmtrain.methods.method import GradientFormat
from swarmtrain.model.gpt import build_model
from swarmtrain.network.codec import average_bytes_untrusted, tensor_specs
from swarmtrain.network.daemon import swarm_time
from swarmtrain.network.discovery.run_lookup import PublishedRun
from swarmtrain.network.identity import new_identity
from swarmtrain.network.node import NetworkThread, NodeSettings, TrafficCount
from swarmtrain.network.swarm import Swarm
from swarmtrain.peer.devices.compute import ComputeDevice
from swarmtrain.peer.lifecycle.node import held_out_loss
from swarmtrain.peer.lifecycle.preparation import initial_seed
from swarmtrain.peer.lifecycle.stop import StopFlag
from swarmtrain.peer.merging import gossip_exchange
from swarmtrain.peer.merging.consensus_state import fetch_consensus_state
from swarmtrain.peer.merging.gossip_exchange import GossipExchange, hosting_of
from swarmtrain.peer.merging.gossip_runner import Engine
from swarmtrain.peer.merging.robustness import Robustness
from swarmtrain.peer.merging.updates import Gathered
from swarmtrain.peer.training.loop import ModelLoop
from swarmtrain.peer.training.session import RoundReport, Session, Worker
from swarmtrain.protocol.archive.schedule import adds_to_archive
from swarmtrain.protocol.gossip.fragments import FragmentRound
from swarmtrain.protocol.gossip.merge_plans import MergePlan
from swarmtrain.protocol.gossip.messages import PrepareMerge
from swarmtrain.protocol.gossip.partners import Delta, Full, PublicationVersion
from swarmtrain.protocol.gossip.pull_schedule import DuePulls
from swarmtrain.protocol.gossip.pulls import GroupName, PullPlan
from swarmtrain.protocol.membership.membership import PeerInfo
from swarmtrain.protocol.tokens.progress import Progress
from swarmtrain.run import RunFile
from swarmtrain.v1 import snapshot_pb2 as pb

pytestmark = pytest.mark.slow

TEXT = np.frombuffer(b"a swarm of bees swarms over a swarm of swarms. " * 200, dtype=np.uint8)
IDENTITIES = [new_identity(bytes([number]) * 32) for number in range(6)]
STEPS, STEP_TOKENS = 8, 4 * 16


def run_file(**merge: Any) -> RunFile:
    """Small. Pseudo-gradients have one format: which it is by default depends on how fast this machine is."""
    return RunFile.model_validate(
        {
            "run": {"total_tokens": 10**6},
            "model": {"context_tokens": 16, "num_layers": 1, "width": 16, "num_heads": 2},
            "data": {"source": "text", "paths": ("x",)},
            "inner": {"batch_sequences": 4, "warmup_fraction": 0.0},
            "merge": {"method": "gossip", "inner_steps": STEPS, "pacing": False, "gradient_format": "int2", **merge},
        }
    )


async def _no_records(*_: object) -> dict[str, Any]:
    return {}


class Peer:
    """Volunteer whose calls go straight to the others."""

    def __init__(self, world: World, number: int) -> None:
        self.world, self.identity = world, IDENTITIES[number]
        self.events: list[Event] = []
        run = world.run
        self.node: Any = SimpleNamespace(
            identity=self.identity,
            settings=NodeSettings(directory=Path("/nowhere")),
            traffic=TrafficCount(),
            remember_addresses=lambda *_: None,
            known_peers=list,
            read_bucket=_no_records,
        )
        model = build_model(run.model, initial_seed(run, self.id))
        me = PeerInfo(peer=self.id, training=True, addresses=("/ip4/192.0.2.1/tcp/1",))
        published = PublishedRun(b"", "ab" * 32, run, b"", b"")
        specs = tensor_specs(model.trained_parameters())
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("swarmtrain.network.swarm.PeerCalls", lambda *given, **more: _Calls(world, self))
            self.swarm = Swarm(self.node, published, specs, average_bytes_untrusted, self.events.append, me)
        self.exchange = GossipExchange(world.network, self.swarm, run, StopFlag())
        self.swarm.serving = self.exchange.serving()
        self.reports: list[RoundReport] = []
        batches = Batches(TEXT, context_tokens=16, batch_sequences=4, run_sha256="ab" * 32, peer_id=self.id)
        self.loop = ModelLoop(run, model, batches)
        self.trains_on(ComputeDevice())
        self.exchange.offer(self.trainer.state, self.trainer.progress)

    def trains_on(self, compute: ComputeDevice, worker: Worker | None = None) -> None:
        """Begin a session on a device."""
        run, loop = self.world.run, self.loop
        self.loop = ModelLoop(run, loop.model, loop.batches, compute=compute)
        self.session = Session(
            run=run,
            parameters=self.loop.parameters,
            loop=self.loop,
            exchange=self.exchange,
            report=self.reports.append,
            on_new_state=lambda session: self.exchange.offer(session.replica.state, session.progress),
            worker=worker,
        )
        self.trainer = self.session.replica

    @property
    def id(self) -> str:
        return self.identity.peer_id

    @property
    def theta(self) -> Tensor:
        return self.trainer.state.theta

    def meet(self, other: Peer) -> None:
        now = swarm_time()
        self.swarm.membership.saw_presence(dataclasses.replace(other.swarm.presence.me, stamp=now), now + 9999, now)

    def round(self, partners: int = 0) -> RoundReport | None:
        """Play a round that merges publications of `partners`; None if it took others' weights instead."""
        had = len(self.reports)
        self.world.wants[self.id] = partners
        train_round(self.loop, self.session)
        return self.reports[-1] if len(self.reports) > had else None


class _Calls:
    """Stands in for `PeerCalls`."""

    def __init__(self, world: World, me: Peer) -> None:
        self.world, self.me = world, me
        self.pull_slots = NoSlots()
        self.node = me.node

    def _other(self, peer: str) -> Swarm:
        return self.world.peers[peer].swarm

    async def hello(self, peer: str, request: pb.HelloRequest, limit_s: float | None = None) -> pb.HelloReply:
        return self._other(peer).answers.hello(request, self.me.id)

    async def publication(self, peer: str, request: pb.PublicationRequest) -> pb.PublicationReply:
        return await self._other(peer).answers.publication(request, self.me.id)

    async def state(self, peer: str, min_round: int) -> pb.StateReply:
        return await self._other(peer).answers.state(pb.StateRequest(min_round=min_round))

    async def open_pull(self, peer: str, request: pb.PullRequest) -> Replies:
        return Replies(self._other(peer).store.serve(request))


def _num_ready(engine: Engine, fragment: int, group: GroupName) -> int:
    ready = engine._states[fragment].received.ready
    return sum(one.group == group for one in ready.pulled) if ready else 0


class NoSlots:
    """Pulls without a limit: the network thread's loop is not there yet when these are made."""

    async def __aenter__(self) -> None:
        """Enter at once."""

    async def __aexit__(self, *_: object) -> None:
        """Nothing to give back."""


class World:
    """Peers that share one network thread. A round ends when as many publications are ready as its test wants."""

    def __init__(self, run: RunFile, num_peers: int) -> None:
        self.run, self.network = run, NetworkThread()
        self.wants: dict[str, int] = {}
        self.peers: dict[str, Peer] = {}
        for number in range(num_peers):
            self.add(number)

    def add(self, number: int) -> Peer:
        peer = Peer(self, number)
        gossip, engine = peer.exchange.gossip, peer.exchange.gossip.engine
        merge_due = gossip.merge_due

        def merge_when_there(round: int, fragment: int, **how: Any) -> Any:
            give_up_s = time.monotonic() + PATIENCE_S
            while any(
                _num_ready(engine, fragment, group) < self.wants.get(peer.id, 0) for group in engine._settings.groups
            ):
                came = [(one.peer, one.group) for one in engine._states[fragment].received.pulled]
                assert time.monotonic() < give_up_s, f"only this came: {came}"
                time.sleep(0.002)
            return merge_due(round, fragment, **how)

        def at_once(plan: MergePlan, num_others: int) -> DuePulls:
            due_s = (0.0,) * self.wants.get(peer.id, 0)
            return DuePulls((), PullPlan(due_s, due_s, "as many as the test wants"), math.inf)

        gossip.merge_due = merge_when_there  # type: ignore[method-assign]
        engine._schedule._pull_plan = at_once  # type: ignore[method-assign]
        for other in self.peers.values():
            other.meet(peer)
            peer.meet(other)
        self.peers[peer.id] = peer
        return peer

    def everyone(self) -> list[Peer]:
        return list(self.peers.values())


@pytest.fixture
def worlds() -> Iterator[list[World]]:
    made: list[World] = []
    yield made
    for world in made:
        for peer in world.everyone():
            assert peer.swarm.serving.pulling is peer.exchange.gossip
            world.network.run(peer.exchange.gossip.stop(), 10)
        world.network.stop()


def world_of(worlds: list[World], num_peers: int, **merge: Any) -> World:
    worlds.append(World(run_file(**merge), num_peers))
    return worlds[-1]


def refused(peer: Peer) -> list[Event]:
    return [event for event in peer.events if isinstance(event, RefusedEvent | ClippedEvent)]


@pytest.mark.parametrize(
    ("told", "taken"),
    [
        ({"inner_steps": 80, "inner_steps_done": 20}, 60),  # its round ends when three quarters of ours are done
        ({"inner_steps": 80, "inner_steps_done": 80}, 80),
        ({"inner_steps": 80, "inner_steps_done": 50}, 110),
        ({"inner_steps_done": 20}, 80),  # how long its round is, it has not told
    ],
)
def test_a_round_ends_when_those_of_others_do(worlds: list[World], told: dict[str, int], taken: int) -> None:
    world = world_of(worlds, 1, inner_steps=80, pacing=True)
    (peer,) = world.peers.values()
    now = swarm_time()
    info = PeerInfo(peer=IDENTITIES[1].peer_id, training=True, stamp=now, steps_per_s=0.5, **told)
    peer.swarm.membership.saw_presence(info, now + 9999, now)
    assert peer.exchange._paced(0.5) == taken


def test_a_host_has_as_many_wait_for_one_as_a_round_pulls(worlds: list[World]) -> None:
    world = world_of(worlds, 1, num_partners=11, num_weights=2)
    (peer,) = world.peers.values()
    assert hosting_of(peer.swarm).waits_a_caller == 13 * len(peer.trainer.fragments)


def test_peers_learn_from_each_other_and_stay_close(worlds: list[World]) -> None:
    world = world_of(worlds, 3)
    for number in range(8):
        for peer in world.everyone():
            report = peer.round(partners=2 if number else 0)
            assert report is not None and isinstance(report.arrived, tuple)
    for peer in world.everyone():
        assert statistics.mean(report.loss for report in peer.reports[-2:]) < peer.reports[0].loss - 0.5
        gathered = peer.reports[-1].arrived
        assert isinstance(gathered, tuple) and len(gathered) == len(peer.trainer.fragments) > 3
        for merged in gathered:
            assert {one.peer for one in merged.merged} == {other.id for other in world.everyone()} - {peer.id}
            assert merged.prepared.consensus_spread < 0.2 and all(one.staleness_rounds <= 1 for one in merged.merged)
        assert not [event for event in peer.events if isinstance(event, RefusedEvent)]
    first, *others = world.everyone()
    apart = max(float((other.theta - first.theta).norm() / first.theta.norm()) for other in others)
    assert 0 < apart < 0.2


def test_groups_of_an_adapter_that_are_not_trained_are_not_published_and_stay(
    worlds: list[World], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(globals(), "build_model", grouped_model)
    (peer,) = world_of(worlds, 1).everyone()
    peer.session.groups_of_round = lambda round: frozenset([min(round, 1)])
    before, published = [state.theta for state in peer.trainer.states], list[list[int | None]]()
    for _ in range(3):
        peer.round()
        newest = [peer.exchange.publishers["gradient", group].newest for group in range(4)]
        published.append([None if one is None else one.round for one in newest])
    assert published == [[1, None, None, None], [1, 2, None, None], [None, 3, None, None]]
    assert all(peer.exchange.publishers["weights", group].newest is not None for group in range(4))
    stays = [torch.equal(theta, state.theta) for theta, state in zip(before, peer.trainer.states, strict=True)]
    assert stays == [False, False, True, True]


def test_who_trains_one_group_takes_the_others_from_those_who_train_them(
    worlds: list[World], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(globals(), "build_model", grouped_model)
    full, weak = world_of(worlds, 2).everyone()
    weak.session.groups_of_round = lambda round: frozenset([0])
    full.round()
    report = weak.round(partners=1)
    assert report is not None and not refused(weak)
    assert [merged.prepared.tokens > 0 for merged in report.arrived if isinstance(merged, Gathered)] == [True] * 4
    assert [of.tokens > 0 for of in report.contribution.fragment_rounds] == [True, False, False, False]
    theirs, start = full.theta, build_model(weak.world.run.model, initial_seed(weak.world.run, weak.id))
    fragments = weak.trainer.fragments
    for fragment in fragments[1:]:
        way, its = (fragment.of(theta - flatten(start.trained_tensors())) for theta in (weak.theta, theirs))
        assert torch.nn.functional.cosine_similarity(way, its, dim=0) > 0.8, "but for int2, the same step"


def test_a_large_model_is_merged_from_bytes_a_fragment_at_a_time(
    worlds: list[World], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gossip_exchange, "LARGE_MODEL", 0)
    accept, prepare = Robustness.accept, GossipExchange.prepare
    accepted, seen, others_ready, differ = list[Tensor](), 0, 0, 0

    def accepts(self: Robustness, *args: Any) -> PartnerUpdate:
        found = accept(self, *args)
        accepted.append(found.gradient.clone() if found.theta is None else found.theta.clone())
        return found

    def prepared(self: GossipExchange, command: PrepareMerge[Any, Any]) -> PreparedMerge:
        nonlocal seen, others_ready, differ
        lanes = self.gossip.engine._states
        others_ready += any(lane.received.ready is not None for lane in lanes if lane.number != command.fragment)
        for each in command.pulled:
            made = each.payload.decoded()
            vector = made.gradient if made.theta is None else made.theta
            differ += not any(len(one) == len(vector) and torch.equal(one, vector) for one in accepted)
            seen += each.payload.is_made_anew
        found, again = prepare(self, command), prepare(self, command)
        differ += not torch.equal(found.theta_mean, again.theta_mean)
        differ += not torch.equal(found.gradient_sum, again.gradient_sum)
        return found

    monkeypatch.setattr(Robustness, "accept", accepts)
    monkeypatch.setattr(GossipExchange, "prepare", prepared)
    world = world_of(worlds, 2)
    for number in range(3):
        for peer in world.everyone():
            peer.round(partners=1 if number else 0)
    assert seen > 16 and not others_ready and not differ


def test_everyones_tokens_are_counted_once(worlds: list[World]) -> None:
    world = world_of(worlds, 3)
    for _ in range(4):
        for peer in world.everyone():
            peer.round(partners=2 if peer.trainer.progress.round else 0)
    whole = {peer.id: 4 * STEPS * STEP_TOKENS for peer in world.everyone()}
    *_, last = world.everyone()
    assert last.trainer.progress.peer_tokens == whole, "it merged the others' last publications"
    assert last.trainer.progress.run_tokens == sum(whole.values())
    for peer in world.everyone():
        assert peer.trainer.progress.peer_tokens[peer.id] == whole[peer.id]
        assert all(peer.trainer.progress.peer_tokens.get(other, 0) <= tokens for other, tokens in whole.items())


def test_alone_it_is_an_ordinary_outer_step(worlds: list[World]) -> None:
    world = world_of(worlds, 1)
    (peer,) = world.everyone()
    for _ in range(3):
        report = peer.round()
        assert report is not None and isinstance(report.arrived, tuple)
        assert all(each.merged == () and each.prepared.num_arrivals == 0 for each in report.arrived)
    assert peer.trainer.progress.run_tokens == 3 * STEPS * STEP_TOKENS


def test_a_round_is_published_in_parts(worlds: list[World]) -> None:
    world = world_of(worlds, 1, publications_per_round=3, fragments=1)
    (peer,) = world.everyone()
    seen: list[tuple[int, int, int]] = []
    publish = peer.exchange.publish

    def note(contribution: Any) -> None:
        publish(contribution)
        newest = peer.exchange.publishers["gradient", 0].newest
        assert newest is not None
        seen.append((newest.part, newest.tokens, newest.author_tokens))

    peer.exchange.publish = note  # type: ignore[method-assign]
    peer.round()
    peer.round()
    whole = STEPS * STEP_TOKENS
    first = [(1, 3 * STEP_TOKENS, 3 * STEP_TOKENS), (2, 6 * STEP_TOKENS, 6 * STEP_TOKENS), (3, whole, whole)]
    assert seen == [*first, *((part, tokens, tokens + whole) for part, tokens, _ in first)]
    give_up_s = time.monotonic() + PATIENCE_S
    while (peer.swarm.presence.me.part, peer.swarm.presence.me.part_tokens) != (3, whole):
        assert time.monotonic() < give_up_s, "what it publishes is told soon"
        time.sleep(0.01)


def test_each_publishes_in_the_format_that_suits_its_round_and_reads_any(worlds: list[World]) -> None:
    world = world_of(worlds, 2, fragments=2, gradient_format="auto")
    coarse, fine = world.everyone()
    formats: dict[str, GradientFormat] = {coarse.id: "int2", fine.id: "int4"}
    for peer in (coarse, fine):
        peer.exchange.gossip.gradient_format = lambda *_, of=peer.id: formats[of]  # type: ignore[misc]
        peer.round()
    for _ in range(2):
        reports = [peer.round(1) for peer in (coarse, fine)]
    assert all(each.merged[0].tokens for report in reports if report for each in report.arrived)
    assert not refused(coarse) and not refused(fine)
    for peer in (coarse, fine):
        for fragment in range(2):
            _, held = peer.exchange.publishers["gradient", fragment]._built[-1]
            assert {tensor.dtype for tensor in held.snapshot.manifest.tensors} == {formats[peer.id]}


def test_finer_gradients_are_for_long_rounds_over_a_link_that_is_known(worlds: list[World]) -> None:
    peer, _ = world_of(worlds, 2, gradient_format="auto").everyone()
    peer.exchange.hold([peer.trainer.state_of(fragment) for fragment in range(4)])
    assert peer.exchange.start_round(Progress(), 1.0).gradient_format == "int2"
    peer.exchange.gossip.engine._schedule.times.assume(1e5)  # what a round brings takes a twentieth of a second
    formats = [peer.exchange.start_round(Progress(), speed).gradient_format for speed in (0.0, 1.0, 1000.0)]
    assert formats == ["int2", "int4", "int2"]
    peer.swarm.node.traffic.up.bytes_per_s = 1e3
    assert peer.exchange.start_round(Progress(), 1.0).gradient_format == "int2", "others' pulls take its link up"


def test_a_round_that_begins_does_not_say_that_it_is_where_the_one_before_ended(worlds: list[World]) -> None:
    """What a round's last publication is to tell goes without haste, and may come after the next has begun."""
    (peer,) = world_of(worlds, 1, publications_per_round=3, fragments=1).everyone()
    peer.round()
    peer.exchange.start_round(peer.trainer.progress, 1.0)
    done = threading.Event()

    async def last() -> None:
        done.set()

    peer.exchange.network.submit_unhurried(last())
    assert done.wait(PATIENCE_S)
    assert (peer.swarm.presence.me.round, peer.swarm.presence.me.part, peer.swarm.presence.me.part_tokens) == (
        1,
        0,
        STEPS * STEP_TOKENS,
    )


def test_how_often_it_publishes_follows_from_how_long_its_round_should_last(worlds: list[World]) -> None:
    world = world_of(worlds, 2, inner_steps=64, publications_per_round=32, fragments=2, pacing=True)
    peer, _ = world.everyone()
    peer.exchange.hold([peer.trainer.state_of(fragment) for fragment in range(2)])
    for speed, every in ((0.0, 4), (0.1, 1), (2.5, 2), (100.0, 4)):
        start = peer.exchange.start_round(Progress(), speed)
        assert (start.every, start.num_parts) == (every, 32), speed
    assert start.publish_after == [16, 24, 32, 48, 56, 64] and start.part_after(24) == 12


def test_merges_are_planned_anew_where_steps_take_less_time_than_they_did(
    worlds: list[World], monkeypatch: pytest.MonkeyPatch
) -> None:
    world, clock_s = world_of(worlds, 2, inner_steps=64, publications_per_round=32, fragments=2), [1000.0]
    peer, _ = world.everyone()
    monkeypatch.setattr(gossip_exchange, "swarm_time", lambda: clock_s[0])
    peer.exchange.hold([peer.trainer.state_of(fragment) for fragment in range(2)])
    start = peer.exchange.start_round(Progress(), 0.5)
    peer.trainer.begin(start.num_parts)
    for passed_s, inner_steps, ends_s in (
        (32.0, 16, 1064.0),
        (36.2, 18, 1064.0),  # not by much
        (30.0, 20, 1030.0 + 12 * 1.5),
        (500.0, 22, 1500.0 + 10 * 2.0),  # it hung, and goes on as in its last round
    ):
        clock_s[0], planned = 1000.0 + passed_s, peer.exchange._planner._newest
        contribution = peer.trainer.contribution(start.part_after(inner_steps), inner_steps, inner_steps * STEP_TOKENS)
        peer.exchange.publish(contribution)
        assert peer.exchange._planner._newest[0].ends_s == ends_s
        assert (peer.exchange._planner._newest is not planned) == (ends_s != planned[0].ends_s)


def test_steps_taken_while_a_merge_is_computed_belong_to_what_begins_with_it(
    worlds: list[World], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a device: others are told of no step beyond the round's, and merges come so much earlier."""
    world, clock_s = world_of(worlds, 2, inner_steps=64, publications_per_round=32, fragments=2), [1000.0]
    peer, _ = world.everyone()
    exchange, planner, rounds = peer.exchange, peer.exchange._planner, peer.swarm.rounds
    monkeypatch.setattr(gossip_exchange, "swarm_time", lambda: clock_s[0])
    exchange.hold([peer.trainer.state_of(fragment) for fragment in range(2)])

    def publish(inner_steps: int) -> None:
        exchange.step_done(inner_steps)
        part = start.part_after(inner_steps)
        exchange.publish(peer.trainer.contribution(part, inner_steps, inner_steps * STEP_TOKENS))

    start = exchange.start_round(Progress(), 0.5)
    peer.trainer.begin(start.num_parts)
    clock_s[0] = 1064.0
    publish(32)
    exchange.step_done(35)
    clock_s[0] = 1070.0
    exchange.merged(0, peer.trainer.state_of(0))
    assert planner.began_s == [1064.0, 1000.0]
    assert {plan.fragments: plan.ends_s for plan in planner._newest} == {(0,): 1070.0 + 122.0, (1,): 1070.0 + 58.0}
    clock_s[0] = 1128.0
    publish(64)
    for told in (65, 66):
        exchange.step_done(told)
        assert exchange.steps_done == 64 and rounds.inner_steps_done == 64
    clock_s[0] = 1132.0
    exchange.merged(1, peer.trainer.state_of(1))
    start = exchange.start_round(Progress(round=1), 0.5)
    assert planner.began_s == [1064.0, 1128.0] and planner._round_began_s == 1128.0
    assert {plan.fragments: plan.ends_s for plan in planner._newest} == {(0,): 1132.0 + 60.0, (1,): 1132.0 + 124.0}
    assert exchange.num_steps == 5.0 and exchange.steps_done == 0
    exchange.step_done(70)
    exchange.hold([peer.trainer.state_of(fragment) for fragment in range(2)])  # their weights are gone
    exchange.start_round(Progress(round=2), 0.5)
    assert planner.began_s == [1132.0, 1132.0]


class _AsDevice(ComputeDevice):
    """Processor of which the loop believes that it is a device."""

    @property
    def is_host(self) -> bool:
        return False


def test_peers_on_devices_merge_on_a_thread_beside_their_steps(worlds: list[World]) -> None:
    world = world_of(worlds, 2)
    with ThreadPoolExecutor(2) as threads:
        for peer in world.everyone():
            peer.trains_on(_AsDevice(), threads.submit)
        for number in range(8):
            for peer in world.everyone():
                peer.round(partners=1 if number else 0)
        for peer in world.everyone():
            peer.session.interrupt()  # the last merges enter
    for peer in world.everyone():
        assert len(peer.reports) >= 8 and peer.trainer.progress.round == len(peer.reports)
        assert statistics.mean(report.loss for report in peer.reports[-2:]) < peer.reports[0].loss - 0.5
        tokens = sum(report.contribution.tokens for report in peer.reports)
        assert peer.trainer.own_tokens == peer.trainer.progress.peer_tokens[peer.id] == tokens
        assert peer.reports[-1].progress.peer_tokens.keys() == {each.id for each in world.everyone()}
        assert not [event for event in peer.events if isinstance(event, RefusedEvent)]
    first, second = world.everyone()
    assert 0 < float((second.theta - first.theta).norm() / first.theta.norm()) < 0.2


def test_who_comes_late_takes_the_consensus(worlds: list[World]) -> None:
    world = world_of(worlds, 3)
    for _ in range(3):
        for peer in world.everyone():
            peer.round(partners=2 if peer.trainer.progress.round else 0)
    others = world.everyone()
    late = world.add(3)
    replaced = late.exchange.present_state(late.trainer.progress)
    assert replaced is not None and replaced.progress.round == 3
    mean = torch.stack([other.theta for other in others]).mean(0)
    nearest = min(float((other.theta - mean).norm()) for other in others)
    assert float((replaced.state.theta - mean).norm()) < 0.5 * nearest
    assert replaced.progress.run_tokens > 0
    late.session.adopt(replaced)
    assert late.round() is not None
    assert late.exchange.present_state(late.trainer.progress) is None, "it is as far as the others now"
    for other in others:
        late.meet(other)
        other.round(partners=2)
    assert late.round(partners=3) is not None


def test_who_is_behind_takes_no_weights_that_are_older_than_its_own(worlds: list[World]) -> None:
    """Of two, the other may be gone by then, and an archive answers that is many rounds older."""
    world = world_of(worlds, 3)
    for number in range(3):
        for peer in world.everyone():
            peer.round(partners=2 if number else 0)
    me = world.everyone()[0]
    assert me.exchange._catch_up(7, 9) is None, "the others are in round 3"
    assert me.exchange._catch_up(1, 9) is not None
    assert [event.round for event in me.events if isinstance(event, CaughtUpEvent)] == [3]


def test_who_comes_late_merges_nothing_of_what_is_in_the_weights_that_it_took(worlds: list[World]) -> None:
    """The others have merged each other's last round, and publish it still: its first round would have it twice."""
    world = world_of(worlds, 3, publications_per_round=4)
    for number in range(3):
        for peer in world.everyone():
            peer.round(partners=2 if number else 0)
    others = world.everyone()
    others[0].round(partners=2)  # it is a round ahead of the others
    late, later = world.add(3), world.add(4)

    def found_by(peer: Peer) -> set[str]:
        """Return whose gradients it could merge now, for the fragment that is merged at a round's end."""
        last = len(peer.trainer.fragments) - 1
        told = {other.id: other.exchange.publishers["gradient", last].newest for other in others}
        ledger = peer.exchange.gossip.engine._states[last].merged.ledger
        versions = {
            who: PublicationVersion(one.round, one.part, one.tokens) for who, one in told.items() if one is not None
        }
        return {who for who, version in versions.items() if isinstance(ledger.news(who, version, 3), Full | Delta)}

    assert found_by(late) == {other.id for other in others}
    replaced = late.exchange.present_state(late.trainer.progress)
    assert replaced is not None and replaced.progress.round == 3
    late.session.adopt(replaced)
    assert not found_by(late), "all of it is in the consensus: of its authors, and of who has merged it"
    for other in world.everyone()[:3]:
        other.swarm.presence.me = dataclasses.replace(other.swarm.presence.me, training=False, is_bootstrap=True)
        later.meet(other)  # only the late one is left to take a state from
    late.exchange.offer(late.trainer.state, late.trainer.progress)
    late.swarm.presence.me = dataclasses.replace(late.swarm.presence.me, round=3)
    later.meet(late)
    replaced = later.exchange.present_state(later.trainer.progress)
    assert replaced is not None and replaced.from_peer == late.id
    assert not found_by(later), "and it tells whoever takes its state"
    others[1].round()
    assert found_by(later) == {others[1].id}, "what is trained after it enters"


def test_where_nobody_else_trains_what_it_has_gives_way_to_a_newer_archive(worlds: list[World]) -> None:
    """Who comes back to a stage that a crash has emptied does not go on from what it had when it left it, though who
    was killed is believed alive for some seconds yet."""
    exchange = world_of(worlds, 1).everyone()[0].exchange
    members = exchange.swarm.membership
    members.saw_presence(PeerInfo(peer="b", name="bootstrap", is_bootstrap=True, round=5), 99.0, 0.0)
    assert exchange._is_old(4) and not exchange._is_old(5)
    members.saw_presence(PeerInfo(peer="v", name="v", training=True, round=5), 99.0, 0.0)
    assert not exchange._is_old(4), "its first merges bring what it lacks"
    members.call_failed("v", 1.0, "refused")
    assert members.volunteers() and exchange._is_old(4)


def test_who_falls_far_behind_takes_the_others_weights(worlds: list[World]) -> None:
    world = world_of(worlds, 3, max_staleness_rounds=2)
    slow, *quick = world.everyone()
    for peer in (slow, *quick):
        peer.round()
    for _ in range(5):
        for peer in quick:
            peer.round(partners=1)
    for peer in quick:
        slow.meet(peer)
    assert slow.round() is None
    (caught,) = [event for event in slow.events if isinstance(event, CaughtUpEvent)]
    assert caught.round == slow.trainer.progress.round == 6
    assert "rounds behind the others" in caught.reason
    assert slow.trainer.own_tokens == 2 * STEPS * STEP_TOKENS, "what it did counts, and was published"


def test_who_trains_beside_one_that_is_far_ahead_goes_on_with_its_own_weights(worlds: list[World]) -> None:
    """Of three the fastest takes shorter rounds than the two that are paced by each other."""
    world = world_of(worlds, 3, max_staleness_rounds=2)
    me, other, fastest = world.everyone()
    for _ in range(9):
        fastest.round()
    for peer in (me, other, me, other):
        peer.round()
    for peer in (other, fastest):
        me.meet(peer)
    near, far = sorted(info.round for info in me.swarm.membership.volunteers())
    assert 1 <= near <= 2 and far >= 8
    assert me.round(partners=1) is not None
    assert not [event for event in me.events if isinstance(event, CaughtUpEvent)]


def archive_of(world: World, number: int, round: int, **counts: int) -> Peer:
    """Return a bootstrap with an archive of so many tokens of peers that are gone."""
    peer = world.add(number)
    told = {new_identity(name.encode() * 8).peer_id: tokens for name, tokens in counts.items()}
    peer.trainer.progress = Progress(round=round, run_tokens=sum(told.values()), peer_tokens=told)
    peer.exchange.offer(peer.trainer.state, peer.trainer.progress)
    peer.swarm.presence.me = dataclasses.replace(
        peer.swarm.presence.me, is_bootstrap=True, training=False, round=round, stamp=1.0
    )
    for other in world.everyone():
        other.meet(peer)
    return peer


def test_a_newcomer_goes_on_where_the_run_was_when_all_who_trained_are_gone(worlds: list[World]) -> None:
    """Seen: it had the weights of 465,664 tokens and counted 0, and its learning rate warmed up anew."""
    world = world_of(worlds, 1)
    (newcomer,) = world.everyone()
    bootstrap = archive_of(world, 1, round=9, anna=1000, bens=900)
    new = newcomer.exchange.present_state(newcomer.trainer.progress)
    assert new is not None and torch.equal(new.state.theta, bootstrap.theta)
    assert new.progress.run_tokens == 1900 and new.progress.peer_tokens == bootstrap.trainer.progress.peer_tokens
    newcomer.session.adopt(new)
    newcomer.exchange.offer(newcomer.trainer.state, newcomer.trainer.progress)
    report = newcomer.round()
    assert report is not None and report.progress.run_tokens == 1900 + STEPS * STEP_TOKENS


def test_a_newcomer_takes_the_counts_of_three_where_there_are_three(worlds: list[World]) -> None:
    """Of one volunteer the weights are taken, and two archives outvote what it counts."""
    world = world_of(worlds, 2)
    newcomer, liar = world.everyone()
    for number in (2, 3):
        archive_of(world, number, round=9, anna=1000, bens=900)
    invented = {new_identity(b"x" * 32).peer_id: 5 * 10**4}
    liar.exchange.offer(liar.trainer.state, Progress(round=9, run_tokens=5 * 10**4, peer_tokens=invented))
    liar.swarm.presence.me = dataclasses.replace(liar.swarm.presence.me, round=9)
    newcomer.meet(liar)
    new = newcomer.exchange.present_state(newcomer.trainer.progress)
    assert new is not None and new.from_peer == liar.id
    assert new.progress.run_tokens == 1900


def test_what_an_archive_holds_is_told_apart_from_what_is_counted(worlds: list[World]) -> None:
    """A bootstrap counts much that no state holds; a newcomer's state is asked about what is its own."""
    world = world_of(worlds, 1)
    (newcomer,) = world.everyone()
    bootstrap = archive_of(world, 1, round=9, anna=1000, bens=900)
    bootstrap.swarm.accounting.learn({new_identity(b"lost" * 8).peer_id: 50_000})
    bootstrap.swarm.accounting.learn(bootstrap.trainer.progress.peer_tokens)
    new = newcomer.exchange.present_state(newcomer.trainer.progress)
    assert new is not None
    newcomer.session.adopt(new)
    newcomer.round()
    bootstrap.meet(newcomer)
    asked: list[tuple[Mapping[str, int], set[str]]] = []

    def is_wanted(holds: Mapping[str, int], authors: Collection[str]) -> bool:
        asked.append((holds, set(authors)))
        return adds_to_archive(holds, authors, bootstrap.trainer.progress.peer_tokens)

    fetching = fetch_consensus_state(bootstrap.swarm, [newcomer.id], "archive", 0, is_wanted)
    present = world.network.run(fetching, PATIENCE_S)
    assert present is not None and present.holds == {
        **bootstrap.trainer.progress.peer_tokens,
        newcomer.id: STEPS * STEP_TOKENS,
    }
    assert asked[0][1] == {newcomer.id}
    assert present.progress.run_tokens == 50_000 + 1900 + STEPS * STEP_TOKENS, "newcomers are told all that is counted"
    fetching = fetch_consensus_state(bootstrap.swarm, [newcomer.id], "archive", 0, lambda holds, authors: False)
    assert world.network.run(fetching, PATIENCE_S) is None


def test_the_model_at_the_end_is_the_same_for_all(worlds: list[World]) -> None:
    world = world_of(worlds, 3)
    for _ in range(3):
        for peer in world.everyone():
            peer.round(partners=2 if peer.trainer.progress.round else 0)
    for peer in world.everyone():
        world.network.run(peer.exchange.gossip.stop(), 10)  # what it has to say of its last round is said by then
        peer.swarm.presence.me = dataclasses.replace(peer.swarm.presence.me, run_tokens=10**6)
    for peer in world.everyone():
        for other in world.everyone():
            peer.meet(other)
    finals = [peer.exchange.final_theta(peer.theta) for peer in world.everyone()]
    for final, peer in zip(finals, world.everyone(), strict=True):
        assert torch.allclose(final, finals[0], atol=1e-6) and not torch.equal(final, peer.theta)
        assert peer.swarm.presence.me.is_finished
    archived = world.network.run(
        fetch_consensus_state(peer.swarm, [p.id for p in world.everyone() if p is not peer], "x"), 30
    )
    assert archived is not None and archived.progress.round == 3


def test_what_was_merged_a_moment_ago_is_not_published_where_the_round_ends_early(worlds: list[World]) -> None:
    """Nothing was trained since, and readers would take it for a lie."""
    (peer,) = world_of(worlds, 1).everyone()
    report = peer.round()
    assert report is not None
    before = {which: publisher.newest for which, publisher in peer.exchange.publishers.items()}
    nothing = tuple(FragmentRound(9, 1, 0, 0) for _ in report.contribution.fragment_rounds)
    peer.exchange.publish(dataclasses.replace(report.contribution, fragment_rounds=nothing))
    assert {which: publisher.newest for which, publisher in peer.exchange.publishers.items()} == before
    peer.exchange._learn()


def test_measuring_the_loss_leaves_what_was_trained_since_the_merges_in_the_model(worlds: list[World]) -> None:
    (peer,) = world_of(worlds, 1).everyone()
    peer.round()
    model, published = peer.loop.model, PublishedRun(b"", "ab" * 32, peer.world.run, bytes(range(256)), b"")
    reached = flatten(model.parameters())
    assert not torch.equal(reached, peer.theta), "all but the last fragment go on from where they are"
    loss = held_out_loss(model, peer.theta, published, ByteTokenizer()).nats_per_byte
    assert torch.equal(flatten(model.parameters()), reached)
    assert loss != held_out_loss(model, reached, published, ByteTokenizer()).nats_per_byte


@pytest.mark.parametrize("robust", ["clip", "direction"])
def test_own_initial_weights_come_together(worlds: list[World], robust: str) -> None:
    world = world_of(worlds, 3, init="own", robust=robust)
    peers = world.everyone()
    apart = float((peers[0].theta - peers[1].theta).norm() / peers[0].theta.norm())
    assert apart > 1
    for number in range(6):
        for peer in peers:
            peer.round(partners=2 if number else 0)
    closer = float((peers[0].theta - peers[1].theta).norm() / peers[0].theta.norm())
    assert closer < 0.2
    arrived = [one for peer in peers for report in peer.reports if isinstance(one := report.arrived, tuple)]
    assert max(each.prepared.variance_factor for gathered in arrived for each in gathered) > 1.3
    assert not [event for peer in peers for event in peer.events if isinstance(event, RefusedEvent)]


def test_what_was_merged_is_kept_over_a_restart(worlds: list[World]) -> None:
    world = world_of(worlds, 2)
    anna, ben = world.everyone()
    for _ in range(3):
        anna.round()
        ben.round(partners=1)
    kept = {name: give() for name, give in ben.exchange.kept().items()}
    again = world_of(worlds, 2).everyone()[1]
    again.exchange.restore(kept)
    assert again.exchange.gossip.engine.merged_version(0, anna.id) == ben.exchange.gossip.engine.merged_version(
        0, anna.id
    )
    again.exchange.restore({"ledger": [["nonsense"]]})
    warning = again.events[-1]
    assert isinstance(warning, WarningEvent) and warning.code == "checkpoint-partly-used"

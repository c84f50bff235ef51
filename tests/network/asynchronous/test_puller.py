"""Driver of asynchronous pulls, with partners that answer from memory: what is merged, and what costs nothing."""

from __future__ import annotations

import asyncio
import gc
import random
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import pytest
import torch
from replies import Replies
from virtual_loop import virtual_swarm

from swarmtrain.algorithm.gossip import PartnerUpdate
from swarmtrain.errors import PeerError, UnreachableError
from swarmtrain.network.asynchronous.publications import OwnPublication, PublicationRules, Publisher, group_untrusted
from swarmtrain.network.asynchronous.puller import Puller
from swarmtrain.network.codec import PublicationCodec
from swarmtrain.network.daemon import swarm_time
from swarmtrain.network.identity import Identity, new_identity
from swarmtrain.network.refusals import rule_of
from swarmtrain.network.snapshots.store import Body, HeldSnapshot, PullLimits, SnapshotStore, TensorSpec
from swarmtrain.network.tensor_groups import groups_of, rules_of
from swarmtrain.peer.merging.gossip_runner import GossipRunner
from swarmtrain.protocol.gossip.engine import GossipEngine, GossipSettings
from swarmtrain.protocol.gossip.merge_plans import MergePlan
from swarmtrain.protocol.gossip.messages import DecodePublication, FetchConsensus, MergeFragment, PrepareMerge
from swarmtrain.protocol.gossip.messages import ReceivedPublication as AnyPulled
from swarmtrain.protocol.gossip.partners import PublicationVersion
from swarmtrain.protocol.gossip.pulls import GroupName, WantedPartners
from swarmtrain.protocol.membership.membership import Membership, PeerInfo
from swarmtrain.v1 import snapshot_pb2 as pb

RUN = "ab" * 32
ME, BEN, CARL, DORA = (new_identity(bytes([i]) * 32) for i in range(4))
CODEC = PublicationCodec(groups_of((TensorSpec("w", (40, 50)), TensorSpec("norm", (7,))), "int8", ("int8",)))
SIZE, ROUND_TOKENS = 2007, 1000
GRADIENTS = PublicationRules(
    run_sha256=RUN,
    tables=(CODEC.gradient.of["int8"].tensors,),
    max_tokens=ROUND_TOKENS,
    num_parts=4,
    pull=PullLimits(stall_limit_s=5.0, busy_limit_s=0.0),
)
RULES: dict[GroupName, PublicationRules] = {
    "gradient": GRADIENTS,
    "weights": replace(GRADIENTS, tables=(CODEC.weights.tensors,), num_parts=0),
}
Pulled: TypeAlias = AnyPulled[Any, Any]


class BenFirst(random.Random):
    """Chooses Ben wherever he can be chosen."""

    def choice(self, seq: Any) -> Any:
        """Return a choice of (candidate, tokens) pairs."""
        return next((one for one in seq if one[0].peer == BEN.peer_id), None) or super().choice(seq)


class Partner:
    """Publishes like a peer, and is as far as it is told to be."""

    def __init__(self, identity: Identity, value: float) -> None:
        self.identity, self.value = identity, value
        self.store = SnapshotStore()
        self.publishers = {
            group: Publisher(identity, RUN, rules.tables[0], self.store) for group, rules in RULES.items()
        }
        self.is_gone = self.is_busy = self.is_silent = False
        self.asked: list[pb.PublicationRequest] = []

    def publish(self, round: int, part: int, tokens: int) -> None:
        theta, gradient = torch.full((SIZE,), self.value), torch.full((SIZE,), self.value * tokens)
        self.publish_bytes(round, part, tokens, CODEC.weights.encode(theta), CODEC.gradient.of["int8"].encode(gradient))

    def publish_bytes(
        self, round: int, part: int, tokens: int, weights: memoryview, gradient: memoryview, author_tokens: int = 0
    ) -> None:
        """Publish such bytes, and the weights at the start of the round."""
        author_tokens = author_tokens or tokens + 5
        self.publishers["weights"].newest = OwnPublication(
            round=round, part=0, tokens=0, inner_steps=0, author_tokens=author_tokens, encode=lambda: Body([weights])
        )
        self.publishers["gradient"].newest = OwnPublication(
            round=round,
            part=part,
            tokens=tokens,
            inner_steps=tokens // 10,
            author_tokens=author_tokens,
            encode=lambda: Body([gradient]),
        )

    async def held_after(self, request: pb.PublicationRequest) -> HeldSnapshot | None:
        """Return its answer to a request."""
        return await self.publishers[group_untrusted(request, self.publishers)].held_after(request)


class Calls:
    """Stands in for `PeerCalls`."""

    def __init__(self, *partners: Partner) -> None:
        self.partners = {partner.identity.peer_id: partner for partner in partners}
        self.pull_slots = asyncio.Semaphore(8)

    async def publication(self, peer: str, request: pb.PublicationRequest) -> pb.PublicationReply:
        partner = self.partners[peer]
        partner.asked.append(request)
        await asyncio.sleep(0)
        if partner.is_silent:
            await asyncio.Event().wait()
        if partner.is_gone:
            raise UnreachableError("nobody")
        if partner.is_busy:
            return pb.PublicationReply(busy=True)
        held = await partner.held_after(request)
        return pb.PublicationReply(manifest=None if held is None else held.snapshot.signed)

    async def open_pull(self, peer: str, request: pb.PullRequest) -> Any:
        return Replies(self.partners[peer].store.serve(request))


class Peer:
    """Side of this peer, and the incidents reported to it."""

    def __init__(self, *partners: Partner, num_partners: int = 3) -> None:
        self.refused: list[tuple[str, str]] = []
        self.rules: list[tuple[str, str]] = []
        self.counted: dict[str, int] = {}
        membership = Membership(ME.peer_id)
        self.membership, now = membership, swarm_time()
        self.calls: Any = Calls()
        for partner in partners:
            self.saw(partner, now)
        settings = GossipSettings(
            groups=rules_of(CODEC.groups),
            sizes=[CODEC.sizes()],
            wanted=WantedPartners(num_partners, num_partners),
            num_parts=4,
            max_staleness_rounds=8,
        )
        self.engine: GossipEngine[Any, Any, Any] = GossipEngine(ME.peer_id, settings, BenFirst(1))
        self.puller = Puller(self.calls, membership, [RULES], pb.Signed, lambda peer, reply: None)
        merging: Any = self
        self.gossip = GossipRunner(self.engine, self.puller, membership, merging, self._refuse, lambda size: None)
        self._prepares: Callable[[Sequence[Pulled]], Any] = list

    def decode_untrusted(self, command: DecodePublication[HeldSnapshot]) -> PartnerUpdate:
        """See `Merging`."""
        return CODEC.arrival_untrusted(command.group, command.held, command.news, command.earlier)

    def took_untrusted(self, command: DecodePublication[HeldSnapshot]) -> None:
        """See `Merging`."""
        self.counted[command.author] = command.held.snapshot.manifest.author_tokens

    def prepare(self, command: PrepareMerge[HeldSnapshot, Any]) -> Any:
        """See `Merging`."""
        return self._prepares(command.pulled)

    def saw(self, partner: Partner, now: float) -> None:
        self.calls.partners[partner.identity.peer_id] = partner
        info = PeerInfo(peer=partner.identity.peer_id, training=True, stamp=now)
        self.membership.saw_presence(info, now + 999, now)

    def saw_at_round(self, round: int, *identities: Identity) -> None:
        """They announce that they are in this round."""
        now = swarm_time()
        for identity in identities:
            info = PeerInfo(peer=identity.peer_id, training=True, stamp=now + 1, round=round)
            self.membership.saw_presence(info, now + 9999, now)

    def _refuse(self, peer: str, error: PeerError) -> None:
        self.refused.append((peer, str(error)))
        self.rules.append((peer, rule_of(error.code)))

    def begin(self, round: int, prepare: Callable[[Sequence[Pulled]], Any] = list, lasts_s: float = 0.0) -> None:
        """Begin a round, a minute ago, or now if it is to last."""
        now, self._prepares = swarm_time(), prepare
        began_s = now if lasts_s else now - 60
        plan = MergePlan(round=round, began_s=(began_s,), ends_s=now + lasts_s, gradient_format="int8")
        asyncio.get_running_loop().create_task(self.gossip.plan(round, [plan]))

    def num_open(self) -> int:
        """Count the open pulls."""
        return len(self.engine._states[0].open.begun)

    def ready(self) -> Sequence[Pulled]:
        """Return what is in the prepared merge."""
        ready = self.engine._states[0].received.ready
        return () if ready is None else ready.pulled

    def merge(self, round: int) -> MergeFragment[Any, Any, Any]:
        """Merge at the end of a round; returns what is merged."""
        found = self.gossip.merge_due(round, 0, may_catch_up=False)
        assert not isinstance(found, FetchConsensus)
        return found

    async def take(self, number: int, *, weights: bool = True) -> dict[str, PartnerUpdate]:
        """Return what is merged at the round's end, by author, once `number` gradients and the weights are ready."""

        def ready_of(group: str) -> dict[str, PartnerUpdate]:
            return {one.peer: one.payload for one in self.ready() if one.group == group}

        await until(lambda: len(ready_of("gradient")) >= number)
        await until(lambda: not weights or ready_of("weights").keys() == ready_of("gradient").keys())
        gradients, thetas = ready_of("gradient"), ready_of("weights")
        found = self.merge(self.engine._others.round)
        assert found.merge is not None and list(found.pulled) == found.merge
        return {peer: replace(one, theta=thetas[peer].theta if weights else None) for peer, one in gradients.items()}


async def until(condition: Callable[[], Any]) -> None:
    """Wait until it holds."""
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - of any kind
            await asyncio.sleep(0.005)


Script = Callable[[], Any]


def run(script: Script) -> None:
    async def whole() -> None:
        await asyncio.wait_for(script(), 60)

    virtual_swarm(whole)


def test_each_inner_step_of_a_partner_is_merged_once() -> None:
    async def script() -> None:
        ben = Partner(BEN, 0.5)
        me = Peer(ben)
        ben.publish(3, 2, 400)
        me.begin(3)
        first = (await me.take(1))[BEN.peer_id]
        assert first.tokens == 400
        assert torch.equal(first.gradient, torch.full((SIZE,), 200.0))
        assert torch.equal(first.theta, torch.full((SIZE,), 0.5))
        assert me.engine.merged_version(0, BEN.peer_id) == PublicationVersion(3, 2, 400)
        ben.publish(3, 3, 600)
        me.begin(4)
        second = (await me.take(1, weights=False))[BEN.peer_id]
        assert second.tokens == 200
        assert torch.equal(second.gradient, torch.full((SIZE,), 100.0))
        assert me.counted == {BEN.peer_id: 605}
        await me.gossip.stop()

    run(script)


@pytest.mark.parametrize(
    ("told", "ago_s"),
    [
        (PeerInfo(peer=BEN.peer_id, round=3, inner_steps_done=30, steps_per_s=2.0), 15.0),
        (PeerInfo(peer=BEN.peer_id, round=3, inner_steps_done=30), None),  # it does not know its speed
        (PeerInfo(peer=BEN.peer_id, round=2, inner_steps_done=30, steps_per_s=2.0), None),  # of another round
    ],
)
def test_when_the_round_began_that_weights_are_of_is_what_their_author_told(
    told: PeerInfo, ago_s: float | None
) -> None:
    async def script() -> None:
        ben = Partner(BEN, 0.5)
        me, now = Peer(ben), swarm_time()
        me.membership.saw_presence(replace(told, training=True, stamp=now + 1e-6), now + 999, now)
        ben.publish(3, 2, 400)
        me.begin(3)
        await until(lambda: len(me.ready()) == 2)
        began_s = [one.began_s for one in me.merge(3).pulled]
        assert began_s == [None if ago_s is None else pytest.approx(now - ago_s, abs=0.01)] * 2
        await me.gossip.stop()

    run(script)


async def _that_has_merged_ben() -> tuple[Peer, Partner]:
    """Return a peer after its first round, in which it has merged all that its partner has published."""
    ben = Partner(BEN, 0.5)
    me = Peer(ben)
    ben.publish(0, 4, 1000)
    me.begin(0)
    await me.take(1)
    return me, ben


def test_nothing_is_merged_twice() -> None:
    async def script() -> None:
        me, ben = await _that_has_merged_ben()
        asked = len(ben.asked)
        me.begin(1)
        await until(lambda: len(ben.asked) > asked and not me.num_open())
        assert me.merge(1).merge is None
        assert (True, 0, 4) in [(one.has_any, one.round, one.part) for one in ben.asked[asked:]]
        assert me.engine.merged_version(0, BEN.peer_id) == PublicationVersion(0, 4, 1000) and me.refused == []
        await me.gossip.stop()

    run(script)


def test_the_trainer_never_waits_for_one_that_does_not_answer_nor_do_the_others() -> None:
    """Ben is asked first and never answers: what came of Carl is merged, and the next rounds begin and end as ever."""

    async def script() -> None:
        ben, carl = Partner(BEN, 0.5), Partner(CARL, 0.25)
        ben.is_silent = True
        me = Peer(ben, carl, num_partners=2)
        for round in range(3):
            carl.publish(round, 4, 1000)
            me.begin(round)
            assert set(await me.take(1)) == {CARL.peer_id}
        still = {("weights", BEN.peer_id), ("gradient", BEN.peer_id)}
        await until(lambda: set(me.engine._states[0].open.begun) == still)  # what Carl was asked for has come
        assert len(ben.asked) == 2, "he is still being asked"
        me.begin(3)
        assert me.merge(3).merge is None, "at once, with nothing"
        await me.gossip.stop()

    run(script)


@pytest.mark.parametrize("fault", ["gone", "busy", "forged", "too many tokens", "no such part", "not finite"])
def test_a_partner_that_fails_costs_its_place_and_another_is_tried(fault: str) -> None:
    async def script() -> None:
        me, (ben, _, _) = _with_one_that_fails(fault)
        assert set(await me.take(2, weights=False)) == {CARL.peer_id, DORA.peer_id}
        await me.gossip.stop()
        assert len(ben.asked) == 2, "he is the first to be asked, for both, and left alone then"
        assert {peer for peer, _ in me.refused} == (set() if fault in ("gone", "busy") else {BEN.peer_id})

    run(script)


@pytest.mark.parametrize("fault", ["gone", "forged"])
def test_one_that_gave_no_answer_is_asked_again_as_soon_as_it_calls(fault: str) -> None:
    async def script() -> None:
        me, partners = _with_one_that_fails(fault)
        ben = partners[0]
        await me.take(2, weights=False)
        asked = len(ben.asked)
        for round in (1, 2):
            ben.is_gone = False
            for partner in partners:
                partner.publish(round, 1, 100)
            if round == 2:
                me.gossip.called(BEN.peer_id)
            me.begin(round)
            await me.take(2, weights=False)
            was_asked = len(ben.asked) > asked
            assert was_asked == (round == 2 and fault == "gone"), (
                "he is left alone till then, and for what was wrong still"
            )
        await me.gossip.stop()

    run(script)


def test_what_cannot_be_merged_costs_its_author_and_another_is_tried() -> None:
    async def script() -> None:
        ben, carl, dora = Partner(BEN, 0.5), Partner(CARL, 0.25), Partner(DORA, 0.125)
        me = Peer(ben, carl, num_partners=2)
        for partner in (ben, carl, dora):
            partner.publish(0, 1, 100)

        def prepare(pulled: Sequence[Pulled]) -> list[Pulled]:
            if any(one.peer == BEN.peer_id for one in pulled):
                raise OverflowError("out of range")
            return list(pulled)

        me.begin(0, prepare)
        await until(lambda: ben.asked and not me.num_open())
        now = swarm_time()
        me.saw(dora, now)
        assert me.engine._others.back_off.ready([BEN.peer_id, CARL.peer_id], now)[0] == {CARL.peer_id}
        assert set(await me.take(2)) == {CARL.peer_id, DORA.peer_id}, "what came of the others is merged"
        await me.gossip.stop()

    run(script)


def test_of_two_that_cannot_be_merged_together_the_first_is() -> None:
    async def script() -> None:
        ben, carl = Partner(BEN, 0.5), Partner(CARL, 0.25)
        me = Peer(ben, carl, num_partners=2)
        for partner in (ben, carl):
            partner.publish(0, 1, 100)

        def prepare(pulled: Sequence[Pulled]) -> list[Pulled]:
            if len({one.peer for one in pulled}) > 1:
                raise MemoryError
            return list(pulled)

        me.begin(0, prepare)
        await until(lambda: ben.asked and carl.asked and not me.num_open())
        assert len(await me.take(1)) == 1
        await me.gossip.stop()

    run(script)


def test_what_is_wrong_is_named() -> None:
    async def script() -> None:
        ben = Partner(BEN, 0.5)
        me = Peer(ben)
        ben.publish(0, 9, 100)
        me.begin(0)
        await until(lambda: me.refused)
        assert me.refused == [(BEN.peer_id, "a publication of part 9, where a round has 4 parts")]
        assert me.engine.merged_version(0, BEN.peer_id) is None
        await me.gossip.stop()

    run(script)


def test_a_peer_that_began_its_round_anew_after_a_kill_is_not_blamed() -> None:
    async def script() -> None:
        ben = Partner(BEN, 0.5)
        me = Peer(ben)
        ben.publish(5, 3, 600)
        me.begin(5)
        await me.take(1)
        ben.publish(4, 1, 100)
        me.begin(6)
        asked = len(ben.asked)
        await until(lambda: len(ben.asked) > asked)
        ben.publish(6, 1, 100)
        assert (await me.take(1))[BEN.peer_id].tokens == 100
        assert me.refused == []
        await me.gossip.stop()

    run(script)


def test_what_comes_too_late_for_a_round_is_there_for_the_next() -> None:
    async def script() -> None:
        ben = Partner(BEN, 0.5)
        prepared: list[Sequence[Pulled]] = []
        me = Peer(ben)
        ben.publish(0, 4, 1000)
        me.begin(0)
        both = {(BEN.peer_id, "weights"), (BEN.peer_id, "gradient")}
        await until(lambda: len(me.engine._states[0].received.pulled) == 2)

        def prepare(pulled: Sequence[Pulled]) -> Sequence[Pulled]:
            prepared.append(pulled)
            return pulled

        me.begin(1, prepare, lasts_s=60)
        await until(lambda: prepared and me.ready())
        assert {(pulled.peer, pulled.group) for pulled in me.merge(1).pulled} <= both
        assert me.engine._schedule.times.early_share > 0.2, "it was to last a minute: the next pulls begin earlier"
        await me.gossip.stop()

    run(script)


def test_a_plan_that_comes_after_its_merge_pulls_nothing() -> None:
    async def script() -> None:
        me, ben = await _that_has_merged_ben()
        asked = len(ben.asked)
        ben.publish(1, 1, 100)
        me.begin(0)
        await asyncio.sleep(5)
        assert len(ben.asked) == asked
        me.begin(1)
        assert (await me.take(1, weights=False))[BEN.peer_id].tokens == 100
        await me.gossip.stop()

    run(script)


def test_what_is_ended_before_it_has_begun_leaves_no_warning_on_the_terminal() -> None:
    async def script() -> None:
        ben = Partner(BEN, 0.5)
        me = Peer(ben)
        preparation = me.engine._preparation
        ben.publish(0, 4, 1000)
        me.begin(0)
        await until(lambda: len(me.engine._states[0].received.pulled) == 2 and preparation._preparing is None)
        now = swarm_time()
        plan = MergePlan(round=1, began_s=(now,), ends_s=now + 60, gradient_format="int8")
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            await me.gossip.plan(1, [plan])
            assert preparation._preparing is not None
            await me.gossip.stop()
            gc.collect()
        assert [str(one.message) for one in told] == []

    run(script)


def _with_one_that_fails(fault: str) -> tuple[Peer, tuple[Partner, Partner, Partner]]:
    """Return a peer that begins a round with two of three partners, of which the first asked fails."""
    ben, carl, dora = Partner(BEN, 0.5), Partner(CARL, 0.25), Partner(DORA, 0.125)
    me = Peer(ben, carl, dora, num_partners=2)
    for partner in (ben, carl, dora):
        partner.publish(0, 1, 100)
    _break(ben, fault)
    me.begin(0)
    return me, (ben, carl, dora)


def _break(partner: Partner, fault: str) -> None:
    if fault == "gone":
        partner.is_gone = True
    elif fault == "busy":
        partner.is_busy = True
    elif fault == "forged":
        for publisher in partner.publishers.values():
            publisher.identity = new_identity(b"x" * 32)
    elif fault == "too many tokens":
        partner.publish(0, 1, ROUND_TOKENS + 10)
    elif fault == "no such part":
        partner.publish(0, 0, 100)
    else:
        bad = memoryview(
            b"\xff" * 4 + bytes(CODEC.weights.encode(torch.zeros(SIZE)))[4:]
        )  # its first scale is no number
        partner.publish_bytes(0, 1, 100, bad, bad)

"""Partners that lie, stall or never end, in virtual time: each costs its own place in one round, and is named.

Three partners have something to merge and two are wanted; the hostile one is always the first to be asked.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from test_puller import BEN, CARL, CODEC, DORA, RUN, SIZE, Partner, Peer
from virtual_loop import virtually

from swarmtrain.network import daemon
from swarmtrain.network.asynchronous.publications import Publisher
from swarmtrain.network.codec import PublicationCodec
from swarmtrain.network.daemon import swarm_time
from swarmtrain.network.identity import new_identity
from swarmtrain.network.snapshots.store import Body, PullLimits, TensorSpec
from swarmtrain.network.tensor_groups import groups_of
from swarmtrain.protocol.gossip.partners import PublicationVersion
from swarmtrain.v1 import snapshot_pb2 as pb

ROUND_S = 60.0
STALL_S = 10.0


@dataclass
class Swarm:
    """Swarm of this peer and its partners, in rounds of a minute."""

    me: Peer
    ben: Partner
    carl: Partner
    dora: Partner
    round: int = 0

    async def a_round(self) -> set[str]:
        """Everyone publishes, this peer's round passes; whose gradient is merged when it ends."""
        for partner in (self.carl, self.dora):
            partner.publish(self.round, 4, 1000)
        began_s = swarm_time()
        self.me.begin(self.round, lasts_s=ROUND_S)
        await asyncio.sleep(ROUND_S)
        assert swarm_time() == began_s + ROUND_S
        found = self.me.merge(self.round)
        self.round += 1
        return {pulled.peer for pulled in found.pulled if pulled.group == "gradient"}

    @property
    def refused(self) -> list[tuple[str, str]]:
        """Return which peers were reported, and by which rule."""
        return self.me.rules


Body_ = Callable[[Swarm], Coroutine[Any, Any, None]]


@pytest.fixture
def in_virtual_time(monkeypatch: pytest.MonkeyPatch) -> Callable[[Body_], None]:
    """Runs a test's body with a swarm; threads are gone, so that nothing takes time but what is meant to."""

    async def at_once(work: Callable[..., Any], *args: Any) -> Any:
        return work(*args)

    async def whole(clock: Callable[[], float], body: Body_) -> None:
        monkeypatch.setattr(daemon, "own_time", clock)
        ben, carl, dora = Partner(BEN, 0.5), Partner(CARL, 0.25), Partner(DORA, 0.125)
        me = Peer(ben, carl, dora, num_partners=2)
        pull = PullLimits(stall_limit_s=STALL_S, busy_limit_s=0.0, clock=clock)
        rules = {group: replace(rules, pull=pull) for group, rules in me.puller.rules[0].items()}
        me.gossip._puller = replace(me.puller, rules=[rules])
        await body(Swarm(me, ben, carl, dora))
        await me.gossip.stop()

    def run(body: Body_) -> None:
        monkeypatch.setattr(asyncio, "to_thread", at_once)
        virtually(lambda clock: whole(clock, body))

    return run


# ---------------------------------------------------------------- what is wrong with a publication or its stream


def honest(ben: Partner) -> None:
    ben.publish(0, 4, 1000)


def not_finite(ben: Partner) -> None:
    bad = memoryview(b"\xff" * 4 + bytes(CODEC.weights.encode(torch.zeros(SIZE)))[4:])  # its first scale is no number
    ben.publish_bytes(0, 4, 100, bad, bad)


def wrong_shape(ben: Partner) -> None:
    codec = PublicationCodec(groups_of((TensorSpec("w", (50, 40)), TensorSpec("norm", (7,))), "int8", ("int8",)))
    ben.publishers["weights"] = Publisher(ben.identity, RUN, codec.weights.tensors, ben.store)
    ben.publishers["gradient"] = Publisher(ben.identity, RUN, codec.gradient.of["int8"].tensors, ben.store)
    ben.publish(0, 4, 1000)


def signed_by_another(ben: Partner) -> None:
    for publisher in ben.publishers.values():
        publisher.identity = new_identity(b"x" * 32)
    ben.publish(0, 4, 1000)


def too_many_tokens(ben: Partner) -> None:
    ben.publish(0, 4, 1010)


def more_tokens_than_in_all(ben: Partner) -> None:
    zeros = CODEC.weights.encode(torch.zeros(SIZE))
    ben.publish_bytes(0, 4, 1000, zeros, zeros, author_tokens=999)


def no_such_part(ben: Partner) -> None:
    ben.publish(0, 5, 1000)


def change_weights(ben: Partner, **changes: Any) -> None:
    ben.publish(0, 4, 1000)
    weights = ben.publishers["weights"].newest
    assert weights is not None
    ben.publishers["weights"].newest = replace(weights, **changes)


def weights_with_tokens(ben: Partner) -> None:
    change_weights(ben, tokens=10, inner_steps=1)


def weights_of_a_part(ben: Partner) -> None:
    change_weights(ben, part=1)


def weights_not_finite(ben: Partner) -> None:
    bad = memoryview(b"\xff" * 4 + bytes(CODEC.weights.encode(torch.zeros(SIZE)))[4:])
    change_weights(ben, encode=lambda: Body([bad]))


def serving(change: Callable[[AsyncIterator[pb.PullReply]], AsyncIterator[pb.PullReply]]) -> Callable[[Partner], None]:
    """Honest, but for its streams."""

    def spoil(ben: Partner) -> None:
        honest(ben)
        serve: Any = ben.store.serve
        ben.store.serve = lambda request: change(serve(request))  # type: ignore[method-assign, assignment]

    spoil.__name__ = change.__name__
    return spoil


@serving
async def other_bytes(replies: AsyncIterator[pb.PullReply]) -> AsyncIterator[pb.PullReply]:
    async for reply in replies:
        if reply.data:
            reply = pb.PullReply(chunk=reply.chunk, data=bytes(len(reply.data)))
        yield reply


@serving
async def endless(replies: AsyncIterator[pb.PullReply]) -> AsyncIterator[pb.PullReply]:
    async for reply in replies:
        while reply.end:
            yield pb.PullReply(chunk=0, data=bytes(1000))
        yield reply


@serving
async def stalling(replies: AsyncIterator[pb.PullReply]) -> AsyncIterator[pb.PullReply]:
    yield await anext(replies)
    await asyncio.Event().wait()


@serving
async def mute(replies: AsyncIterator[pb.PullReply]) -> AsyncIterator[pb.PullReply]:
    await asyncio.Event().wait()
    yield await anext(replies)


FAULTS = {
    not_finite: "finite",
    wrong_shape: "shape",
    signed_by_another: "publication",
    too_many_tokens: "tokens",
    more_tokens_than_in_all: "tokens",
    no_such_part: "round",
    other_bytes: "hash",
    stalling: "stall",
    mute: "stall",
}


@pytest.mark.parametrize(
    ("fault", "rule"),
    [(weights_with_tokens, "tokens"), (weights_of_a_part, "round"), (weights_not_finite, "finite")],
    ids=lambda one: getattr(one, "__name__", ""),
)
def test_what_is_wrong_with_weights_costs_these_and_is_named(
    fault: Callable[[Partner], None], rule: str, in_virtual_time: Callable[[Body_], None]
) -> None:
    async def body(swarm: Swarm) -> None:
        fault(swarm.ben)
        await swarm.a_round()
        assert swarm.refused == [(BEN.peer_id, rule)]
        assert swarm.me.engine._states[0].merged.ledger.values_at("weights", BEN.peer_id) is None
        assert swarm.me.engine._states[0].merged.ledger.values_at("weights", CARL.peer_id) == (0, 0)

    in_virtual_time(body)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_what_is_wrong_costs_one_place_in_one_round_and_is_named(
    fault: Callable[[Partner], None], in_virtual_time: Callable[[Body_], None]
) -> None:
    async def body(swarm: Swarm) -> None:
        fault(swarm.ben)
        assert await swarm.a_round() == {CARL.peer_id, DORA.peer_id}
        assert set(swarm.refused) == {(BEN.peer_id, FAULTS[fault])}
        assert len(swarm.ben.asked) <= 2, "it is left alone for the rest of the round, weights and gradient"

        before = swarm.ben.asked
        swarm.ben = Partner(BEN, 0.5)
        swarm.ben.asked, swarm.me.calls.partners[BEN.peer_id] = before, swarm.ben
        swarm.ben.publish(1, 4, 1000)
        assert BEN.peer_id in await swarm.a_round(), "it does as it should now, and is merged"
        assert len(swarm.refused) <= 2, "once for its weights, once for its gradient"

    in_virtual_time(body)


def test_without_a_fault_it_is_merged_and_nobody_is_named(in_virtual_time: Callable[[Body_], None]) -> None:
    async def body(swarm: Swarm) -> None:
        honest(swarm.ben)
        assert BEN.peer_id in await swarm.a_round()
        assert swarm.refused == []

    in_virtual_time(body)


def test_an_endless_stream_is_cut_where_it_should_end_and_named(in_virtual_time: Callable[[Body_], None]) -> None:
    async def body(swarm: Swarm) -> None:
        endless(swarm.ben)
        assert BEN.peer_id in await swarm.a_round(), "all that was announced came first, and is right"
        assert set(swarm.refused) == {(BEN.peer_id, "stream")}

    in_virtual_time(body)


def test_one_that_is_always_hostile_is_left_alone_for_ever_longer(in_virtual_time: Callable[[Body_], None]) -> None:
    async def body(swarm: Swarm) -> None:
        for _ in range(40):
            stalling(swarm.ben)
            assert await swarm.a_round() == {CARL.peer_id, DORA.peer_id}
        assert len(swarm.ben.asked) <= 18, "for weights and gradient, after 15 s, 30 s, ... 10 minutes"
        assert set(swarm.refused) == {(BEN.peer_id, "stall")}

    in_virtual_time(body)


# ---------------------------------------------------------------- counters


def test_a_stale_round_is_refused_and_named(in_virtual_time: Callable[[Body_], None]) -> None:
    async def body(swarm: Swarm) -> None:
        swarm.round = 20
        swarm.me.saw_at_round(20, BEN, CARL, DORA)
        swarm.ben.publish(11, 4, 1000)
        assert await swarm.a_round() == {CARL.peer_id, DORA.peer_id}
        assert set(swarm.me.refused) == {
            (BEN.peer_id, "a publication of an old round: 9 rounds behind the median; at most 8 are merged")
        }
        assert set(swarm.refused) == {(BEN.peer_id, "round")}
        swarm.ben.publish(21, 4, 1000)
        assert BEN.peer_id in await swarm.a_round(), "it has caught up"

    in_virtual_time(body)


def test_a_slow_one_that_is_not_too_far_behind_is_merged(in_virtual_time: Callable[[Body_], None]) -> None:
    async def body(swarm: Swarm) -> None:
        swarm.round = 20
        swarm.me.saw_at_round(20, BEN, CARL, DORA)
        swarm.ben.publish(12, 4, 1000)
        assert BEN.peer_id in await swarm.a_round()
        assert swarm.refused == []

    in_virtual_time(body)


@pytest.mark.parametrize(("back_to", "named_in_round"), [(21, 31), (28, 40)])
def test_a_counter_turned_back_is_merged_by_nobody(
    back_to: int, named_in_round: int, in_virtual_time: Callable[[Body_], None]
) -> None:
    """Nine rounds are more than a kill explains. Two are not, unless they are there still, nine rounds on."""

    async def body(swarm: Swarm) -> None:
        swarm.round = 30
        swarm.me.saw_at_round(30, BEN, CARL, DORA)
        swarm.ben.publish(30, 4, 1000)
        assert BEN.peer_id in await swarm.a_round()
        named: list[int] = []
        for _ in range(12):
            swarm.ben.publish(back_to, 4, 1000)
            assert await swarm.a_round() == {CARL.peer_id, DORA.peer_id}
            named.extend([swarm.round - 1] * (bool(swarm.refused) and not named))
        assert named == [named_in_round]
        assert set(swarm.refused) == {(BEN.peer_id, "round")}
        assert swarm.me.engine.merged_version(0, BEN.peer_id) == PublicationVersion(30, 4, 1000)

    in_virtual_time(body)

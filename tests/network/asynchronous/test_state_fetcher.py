"""Taking present weights from several peers, some of which hang: who answers is not waited past."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from replies import Replies
from virtual_loop import virtual_swarm

from swarmtrain.errors import PeerError, UnreachableError
from swarmtrain.network.asynchronous.state_fetcher import FetchedState, StateFetcher
from swarmtrain.network.codec import body_of
from swarmtrain.network.daemon import swarm_time
from swarmtrain.network.identity import Identity, new_identity
from swarmtrain.network.node import TrafficCount
from swarmtrain.network.snapshots.state_provider import StateProvider, state_specs
from swarmtrain.network.snapshots.store import PullLimits, SnapshotStore, TensorSpec
from swarmtrain.protocol.tokens.progress import Progress
from swarmtrain.v1 import snapshot_pb2 as pb

RUN = "ab" * 32
SPECS = (TensorSpec("w", (4, 5)),)
BEN, CARL, DORA, EVE = (new_identity(bytes([number]) * 32) for number in range(4))
CALL_S, MAKE_S = 5.0, 60.0
"""Time limits of a call to a hanging peer, and of one whose answer may have to be made first."""


class Calls:
    """Stands in for `PeerCalls`: the states of those that are well."""

    def __init__(self, *hanging: Identity) -> None:
        self.hanging = {identity.peer_id for identity in hanging}
        self.offers: dict[str, StateProvider] = {}
        for number, identity in enumerate((BEN, CARL, DORA, EVE), 1):
            offer = self.offers[identity.peer_id] = StateProvider(identity, RUN, state_specs(SPECS), SnapshotStore())
            theta = torch.full((20,), float(number))
            offer.put(Progress(round=number), body_of(theta, torch.zeros(20)))
        self.pull_slots, self.node = asyncio.Semaphore(8), SimpleNamespace(traffic=TrafficCount())

    async def _hangs(self, peer: str, limit_s: float) -> None:
        if peer in self.hanging:
            await asyncio.sleep(limit_s)
            raise UnreachableError("no answer in time")

    async def hello(self, peer: str, request: pb.HelloRequest, limit_s: float | None = None) -> pb.HelloReply:
        await self._hangs(peer, CALL_S)
        return pb.HelloReply()

    async def state(self, peer: str, min_round: int) -> pb.StateReply:
        await self._hangs(peer, MAKE_S)
        found = await self.offers[peer].held(min_round)
        return pb.StateReply(manifest=None if found is None else found[1].snapshot.signed)

    async def open_pull(self, peer: str, request: pb.PullRequest) -> Any:
        return Replies(self.offers[peer].store.serve(request))


def fetched(*hanging: Identity, of: Sequence[Identity] = (BEN, CARL, DORA, EVE)) -> tuple[list[FetchedState], float]:
    """Fetch states while some peers hang; returns the states and the time taken."""

    async def body() -> tuple[list[FetchedState], float]:
        calls: Any = Calls(*hanging)
        refused: list[tuple[str, PeerError]] = []
        settings: Any = SimpleNamespace(
            run_sha256=RUN, specs=SPECS, state_specs=state_specs(SPECS), pull=PullLimits(busy_limit_s=0.0)
        )
        fetcher = StateFetcher(calls, SnapshotStore(), settings, lambda peer, error: refused.append((peer, error)))
        began_s = swarm_time()
        states = await fetcher.fetch([peer.peer_id for peer in of], 1)
        assert not refused
        return states, swarm_time() - began_s

    return virtual_swarm(body)


def test_of_three_the_whole_state_comes_and_of_the_others_the_weights() -> None:
    states, _ = fetched()
    assert [(state.peer, state.whole, state.round) for state in states] == [
        (BEN.peer_id, True, 1),
        (CARL.peer_id, True, 2),
        (DORA.peer_id, True, 3),
        (EVE.peer_id, False, 4),
    ]


def test_those_that_hang_hold_a_joiner_no_longer_than_a_call() -> None:
    states, took_s = fetched(BEN, DORA, EVE)
    assert [(state.peer, state.whole) for state in states] == [(CARL.peer_id, True)]
    assert took_s < 2 * CALL_S


def test_when_all_hang_that_is_known_after_a_call() -> None:
    states, took_s = fetched(BEN, CARL, DORA, EVE)
    assert states == [] and took_s < 2 * CALL_S


def test_one_alone_that_hangs_is_given_up_after_a_call() -> None:
    states, took_s = fetched(BEN, of=(BEN,))
    assert states == [] and took_s < 2 * CALL_S
    assert [state.peer for state in fetched(of=(BEN,))[0]] == [BEN.peer_id]

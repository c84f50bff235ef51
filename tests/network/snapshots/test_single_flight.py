"""Publications and states made on request: once for all callers, also if the first caller has gone."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable

import pytest
from test_puller import run, until

from swarmtrain.network.asynchronous.publications import OwnPublication, Publisher
from swarmtrain.network.identity import new_identity
from swarmtrain.network.snapshots.state_provider import StateProvider
from swarmtrain.network.snapshots.store import Body, HeldSnapshot, SnapshotStore, TensorSpec
from swarmtrain.protocol.tokens.progress import Progress
from swarmtrain.v1 import snapshot_pb2 as pb

ME, RUN, SPECS = new_identity(b"m" * 32), "ab" * 32, (TensorSpec("w", (2,)),)


class Maker:
    """Peer whose work takes until `gate` opens, and what it made of which round."""

    def __init__(self, kind: str) -> None:
        self.store = SnapshotStore()
        self.gate = threading.Event()
        self.began: list[int] = []
        self.num_running = self.most_running = 0
        self.fails = False
        self._publisher = Publisher(ME, RUN, SPECS, self.store)
        self._offer = StateProvider(ME, RUN, SPECS, self.store)
        self.has, self.ask = {
            "publication": (self._publishes, self._ask_for_publication),
            "state": (self._offers, self._ask_for_state),
        }[kind]

    def _make(self, round: int) -> None:
        self.began.append(round)
        self.num_running += 1
        self.most_running = max(self.most_running, self.num_running)
        assert self.gate.wait(20)
        self.num_running -= 1
        if self.fails:
            raise MemoryError

    def _publishes(self, round: int) -> None:
        def encode() -> Body:
            self._make(round)
            return Body([bytes(8)])

        self._publisher.newest = OwnPublication(
            round=round, part=1, tokens=9, inner_steps=1, author_tokens=9, encode=encode
        )

    async def _ask_for_publication(self) -> HeldSnapshot | None:
        return await self._publisher.held_after(pb.PublicationRequest())

    def _offers(self, round: int) -> None:
        progress = Progress(round=round)
        self._offer.put(progress, Body([bytes(8)]), lambda manifest: self._make(round))

    async def _ask_for_state(self) -> HeldSnapshot | None:
        found = await self._offer.held(0)
        return None if found is None else found[1]


each_kind = pytest.mark.parametrize("kind", ["publication", "state"])


async def asked_and_gone(ask: Callable[[], Awaitable[object]], began: Callable[[], bool]) -> None:
    """Somebody asks, and gives up once the work has begun."""
    task = asyncio.ensure_future(ask())
    await asyncio.sleep(0)
    await until(began)
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()


@each_kind
def test_who_asks_and_goes_a_hundred_times_has_it_made_once(kind: str) -> None:
    async def script() -> None:
        maker = Maker(kind)
        maker.has(3)
        for _ in range(100):
            await asked_and_gone(maker.ask, lambda: bool(maker.began))
        waiting = [asyncio.ensure_future(maker.ask()) for _ in range(3)]
        await asyncio.sleep(0)
        maker.gate.set()
        first, *others = await asyncio.gather(*waiting)
        assert first is not None and all(other is first for other in others)
        assert maker.began == [3] and maker.store.get(first.snapshot.sha256) is first

    run(script)


@each_kind
def test_what_was_made_for_one_that_went_is_there_for_the_next(kind: str) -> None:
    async def script() -> None:
        maker = Maker(kind)
        maker.has(3)
        await asked_and_gone(maker.ask, lambda: bool(maker.began))
        maker.gate.set()
        await until(lambda: not maker.num_running)
        assert await maker.ask() is not None and maker.began == [3]

    run(script)


@each_kind
def test_a_newer_one_is_made_after_the_one_that_nobody_waits_for(kind: str) -> None:
    async def script() -> None:
        maker = Maker(kind)
        maker.has(3)
        await asked_and_gone(maker.ask, lambda: bool(maker.began))
        maker.has(4)
        asking = asyncio.ensure_future(maker.ask())
        await asyncio.sleep(0.01)
        assert maker.began == [3]
        maker.gate.set()
        held = await asking
        assert held is not None and held.snapshot.manifest.round == 4
        assert maker.began == [3, 4] and maker.most_running == 1

    run(script)


@each_kind
def test_what_failed_is_tried_again(kind: str) -> None:
    async def script() -> None:
        maker = Maker(kind)
        maker.has(3)
        maker.gate.set()
        maker.fails = True
        with pytest.raises(MemoryError):
            await maker.ask()
        maker.fails = False
        assert await maker.ask() is not None and maker.began == [3, 3]

    run(script)


def test_a_state_made_when_asked_for_is_of_that_moment_and_let_go_when_nobody_reads_it() -> None:
    clock = 100.0
    store = SnapshotStore(clock=lambda: clock)
    offer, values = StateProvider(ME, RUN, SPECS, store), [bytes(8)]

    async def held() -> HeldSnapshot:
        found = await offer.held(0)
        assert found is not None
        return found[1]

    async def story() -> None:
        nonlocal clock
        offer.put(Progress(round=1), lambda: Body([values[0]]))
        values[0] = bytes([1]) * 8
        first = await held()
        assert first.body.read(0, 8) == values[0]
        assert await held() is first
        values[0] = bytes([2]) * 8
        offer._look(first)
        assert store.get(first.snapshot.sha256) is first, "whoever was told of it a moment ago comes to read it"
        clock += 60
        offer._look(first)
        assert store.get(first.snapshot.sha256) is None
        second = await held()
        assert second.body.read(0, 8) == values[0]
        offer.put(Progress(round=2), lambda: Body([values[0]]))
        assert store.get(second.snapshot.sha256) is second, "the same of one that another follows"
        clock += 60
        third = await held()
        store.drop(second.snapshot.sha256)
        assert store.get(second.snapshot.sha256) is None
        assert store.get(third.snapshot.sha256) is third

    run(story)


def test_a_state_that_another_followed_while_it_was_made_is_let_go_too() -> None:
    clock = 100.0
    store, gate = SnapshotStore(clock=lambda: clock), threading.Event()
    offer = StateProvider(ME, RUN, SPECS, store)

    def slow() -> Body:
        assert gate.wait(20)
        return Body([bytes(8)])

    async def story() -> None:
        nonlocal clock
        offer.put(Progress(round=1), slow)
        asking = asyncio.ensure_future(offer.held(0))
        await until(lambda: offer._making._task is not None)
        offer.put(Progress(round=2), lambda: Body([bytes([1]) * 8]))
        gate.set()
        first, second = await asking, await offer.held(0)
        assert first is not None and second is not None
        clock += 60
        offer._look(first[1])
        assert store.get(first[1].snapshot.sha256) is None
        assert store.get(second[1].snapshot.sha256) is second[1]

    run(story)

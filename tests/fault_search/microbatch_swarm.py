"""A pipeline under faults, in virtual time: gradients are counted, and none may count twice.

Driver, request queue and ledger are the real ones. The network loses, delays and repeats messages; peers hang, die and
come back empty; drivers die. Gradients are counts.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import random
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from virtual_loop import virtually

from swarmtrain.errors import PeerError, UnreachableError
from swarmtrain.peer.pipeline.driver import Driver, StageAttempt, StageResult, Tail
from swarmtrain.peer.pipeline.request_queue import StageRequestQueue, Task
from swarmtrain.protocol.pipeline.ledger import (
    Add,
    Discard,
    Forget,
    Key,
    Kind,
    LedgerLimits,
    Settlement,
    StageLedger,
    TakeStep,
)
from swarmtrain.protocol.pipeline.router import Router

LIMITS = LedgerLimits(batch_tokens=4, ack_wait_s=5.0, hold_s=60.0, max_open=32, max_open_of_driver=16)


@dataclass
class Faults:
    """Faults, as shares of the calls or of the time."""

    lost: float = 0.0
    reply_lost: float = 0.0
    twice: float = 0.0
    slow: float = 0.0
    hangs: float = 0.0
    dies: float = 0.0


@dataclass
class CountingStage:
    """Peer that holds a stage, with counts by microbatch in place of gradients."""

    name: str
    stage: int
    now: Callable[[], float]
    rng: random.Random
    faults: Faults
    stepped: Counter[tuple[str, int]] = field(default_factory=Counter)
    """Number of times that the gradient of each (driver, sequence) is in the weights."""
    buried: Counter[tuple[str, int]] = field(default_factory=Counter)
    """Gradients by microbatch as in `stepped`, summed over the peer's earlier incarnations."""
    hangs_until_s: float = 0.0
    incarnation: int = 0

    def __post_init__(self) -> None:
        self.born()

    def born(self) -> None:
        """Begin with empty state, as a new process does."""
        self.buried += self.stepped
        self.stepped = Counter()
        self.incarnation += 1
        self.queue = StageRequestQueue(StageLedger(LIMITS, self.incarnation), self.now)
        self.awake = asyncio.Event()
        self.sums: dict[int, Counter[Key]] = {}
        self.kept: set[Key] = set()

    def hang(self, lasts_s: float) -> None:
        """Do nothing for `lasts_s` seconds from now on."""
        self.hangs_until_s = max(self.hangs_until_s, self.now() + lasts_s)

    async def work(self) -> None:
        """Work as the trainer's thread of a stage does, until cancelled."""
        while True:
            if self.now() < self.hangs_until_s:
                await asyncio.sleep(self.hangs_until_s - self.now())
            self.mischief()
            queue = self.queue
            what = queue.next()
            if what is None:
                await self.idle()
            elif isinstance(what, Task):
                await asyncio.sleep(self.rng.uniform(0.01, 0.1))
                if queue is self.queue:
                    self.compute(what)
            else:
                self.settle(what)

    async def idle(self) -> None:
        """Wait until a driver asks for something, or the ledger has something due."""
        self.awake.clear()
        next_s = self.queue.ledger.next_s()
        try:
            async with asyncio.timeout(20.0 if next_s is None else max(0.001, next_s - self.now())):
                await self.awake.wait()
        except TimeoutError:
            pass

    def mischief(self) -> None:
        if self.rng.random() < self.faults.hangs:
            self.hangs_until_s = self.now() + self.rng.choice([2.0, 8.0, 40.0])
        if self.rng.random() < self.faults.dies:
            self.born()

    def compute(self, task: Task) -> None:
        if task.kind == "backward":
            assert task.key in self.kept
        self.kept.add(task.key)
        if task.kind != "forward":
            self.sums.setdefault(task.work.batch, Counter())[task.key] += 1
        answer: Any = ("from", self.stage)
        if task.kind == "tail":
            answer = Tail(1.0, ("gradient of", self.stage))
        elif task.kind == "backward":
            answer = ("gradient of", self.stage) if self.stage else None
        self.queue.done(task, answer)

    def settle(self, due: Any) -> None:
        if isinstance(due, TakeStep):
            batch = self.sums.pop(due.batch)
            assert +batch == Counter(due.microbatches), "a step has exactly what is acknowledged"
            assert -batch == Counter()
            assert due.tokens == len(due.microbatches) and due.loss == 1.0
            self.stepped.update((key.driver, key.sequence) for key in due.microbatches)
        elif isinstance(due, Discard):
            assert not +self.sums.pop(due.batch, Counter[Key]()), "nothing of it was to count"
        elif isinstance(due, Forget):
            self.kept.discard(due.key)
        else:
            assert due.key in self.kept, "what is computed again is still here"
            self.sums.setdefault(due.batch, Counter())[due.key] += 1 if isinstance(due, Add) else -1


@dataclass
class StageNetwork:
    """Network between a driver and the stages."""

    driver: str
    peers: dict[str, CountingStage]
    rng: random.Random
    faults: Faults

    async def call(self, body: Callable[[], Any]) -> Any:
        await asyncio.sleep(self.rng.uniform(0.001, 0.05) if self.rng.random() >= self.faults.slow else 30.0)
        if self.rng.random() < self.faults.lost:
            await asyncio.sleep(1.0)
            raise UnreachableError("lost")
        again = self.rng.random() < self.faults.twice
        answer = await body()
        if again:
            asyncio.get_running_loop().call_later(self.rng.uniform(0.0, 20.0), self.repeat, body)
        if self.rng.random() < self.faults.reply_lost:
            raise UnreachableError("the answer was lost")
        return answer

    def repeat(self, body: Callable[[], Any]) -> None:
        async def quietly() -> None:
            try:
                await asyncio.wait_for(body(), 60.0)
            except (PeerError, TimeoutError):
                pass

        self.repeats.append(asyncio.ensure_future(quietly()))

    def __post_init__(self) -> None:
        self.repeats: list[asyncio.Future[None]] = []

    async def _ask(self, peer: str, attempt: StageAttempt, kind: Kind, payload: Any) -> StageResult:
        async def body() -> StageResult:
            self.peers[peer].awake.set()
            queue = self.peers[peer].queue
            return StageResult(await queue.ask(attempt.key, kind, attempt.tokens, payload), queue.ledger.incarnation)

        answered = await self.call(body)
        assert isinstance(answered, StageResult)
        return answered

    async def forward(self, peer: str, attempt: StageAttempt, x: Any) -> StageResult:
        return await self._ask(peer, attempt, "forward", x)

    async def backward(self, peer: str, attempt: StageAttempt, gradient: Any) -> StageResult:
        return await self._ask(peer, attempt, "backward", gradient)

    async def tail(self, peer: str, attempt: StageAttempt, x: Any, targets: Any) -> StageResult:
        return await self._ask(peer, attempt, "tail", (x, targets))

    async def settle(self, peer: str, stage: int, settlement: Settlement) -> set[Key]:
        async def body() -> set[Key]:
            self.peers[peer].awake.set()
            return self.peers[peer].queue.settle(self.driver, settlement)

        late = await self.call(body)
        assert isinstance(late, set)
        return late


@dataclass
class ReportedMicrobatches:
    """Reports of the drivers, kept for the checks."""

    lost_: set[tuple[int, str, int]] = field(default_factory=set)
    num_retried: int = 0

    def retried(self, sequence: int, stage: int, peer: str, reason: str) -> None:
        self.num_retried += 1

    def refused(self, peer: str, error: PeerError) -> None:
        raise AssertionError(f"{peer}: {error}")

    def lost(self, stage: int, peer: str, key: Key, reason: str) -> None:
        self.lost_.add((stage, key.driver, key.sequence))


@dataclass
class MicrobatchSwarm:
    """Drivers with their own first stage, and two peers of each other stage."""

    now: Callable[[], float]
    seed: int
    faults: Faults
    num_stages: int = 3
    num_drivers: int = 2
    num_microbatches: int = 12

    def __post_init__(self) -> None:
        rng = self.rng = random.Random(self.seed)
        names = {f"s{stage}p{n}": stage for stage in range(1, self.num_stages) for n in range(2)}
        names |= {f"d{n}": 0 for n in range(self.num_drivers)}
        self.peers = {
            name: CountingStage(name, stage, self.now, rng, self.faults if stage else Faults())
            for name, stage in names.items()
        }
        self.networks, self.told = list[StageNetwork](), ReportedMicrobatches()
        self.drivers = [self.driver(f"d{n}") for n in range(self.num_drivers)]
        self.finished: set[tuple[str, int]] = set()

    def driver(self, name: str) -> Driver:
        routers = []
        for stage in range(1, self.num_stages):
            router = Router(self.rng, first_ban_s=1.0, most_ban_s=8.0, most_limit_s=10.0)
            router.set_peers([peer.name for peer in self.peers.values() if peer.stage == stage])
            routers.append(router)
        network = StageNetwork(name, self.peers, self.rng, self.faults)
        self.networks.append(network)
        return Driver(me=name, routers=routers, calls=network, told=self.told, now=self.now, next_sequence=0)

    async def run(self, killed: Mapping[int, float], limit_s: float = math.inf) -> None:
        """Drive all microbatches of all drivers; those of `killed` die at these times.

        Raises TimeoutError after `limit_s`.
        """
        workers = [asyncio.ensure_future(peer.work()) for peer in self.peers.values()]
        driving = [asyncio.ensure_future(self.drive(driver)) for driver in self.drivers]
        for number, when_s in sorted(killed.items(), key=lambda item: item[1]):
            await asyncio.sleep(when_s - self.now())
            driving[number].cancel()
            await asyncio.wait([driving[number]])
            await self.drivers[number].stop()
        others = [number for number in range(self.num_drivers) if number not in killed]
        async with asyncio.timeout(None if limit_s == math.inf else limit_s):
            await asyncio.gather(*(driving[number] for number in others))
            for number in others:
                await self.drivers[number].settled()
        for network in self.networks:
            network.faults = Faults()
        for peer in self.peers.values():
            peer.faults = Faults()
        await asyncio.sleep(200.0)  # whoever hung is back, what nobody acknowledges is taken out
        await asyncio.gather(*(repeat for network in self.networks for repeat in network.repeats))
        for worker in workers:
            assert not worker.done(), worker.exception()
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)

    async def drive(self, driver: Driver) -> None:
        places = asyncio.Semaphore(4)

        async def one() -> None:
            async with places:
                driven = await driver.drive(1, "x", "y")
                assert driven.loss == 1.0
                self.finished.add((driver.me, driven.sequence))

        ways = [asyncio.ensure_future(one()) for _ in range(self.num_microbatches)]
        try:
            await asyncio.gather(*ways)
        except asyncio.CancelledError:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
            raise

    # ------------------------------------------------------------- what must hold

    def counts(self, stage: int) -> Counter[tuple[str, int]]:
        """Return how often each microbatch is in the stage's weights, those of dead peers included.

        What is acknowledged and waits for the rest of its batch counts as if it were in.
        """
        counts: Counter[tuple[str, int]] = Counter()
        for peer in self.peers.values():
            if peer.stage == stage:
                counts += peer.stepped + peer.buried
                for sums in peer.sums.values():
                    assert all(count in (0, 1) for count in sums.values()), sums
                    here = [key for key, count in sums.items() if count]
                    known = peer.queue.ledger._open
                    counts.update((key.driver, key.sequence) for key in here if known[key].acknowledged)
        return counts

    def miscounted(self, *, nobody_died: bool) -> list[str]:
        """Return a sentence for each microbatch that is counted wrongly."""
        found = []
        for stage in range(self.num_stages):
            counts = self.counts(stage)
            if twice := {microbatch: n for microbatch, n in counts.items() if n > 1}:
                found.append(f"stage {stage}: counted more than once: {twice}")
            if strangers := counts.keys() - self.finished:
                found.append(f"stage {stage}: counted, and never finished: {strangers}")
            missing = {m for m in self.finished - counts.keys() if (stage, *m) not in self.told.lost_}
            if missing and nobody_died:
                found.append(f"stage {stage}: finished, and not counted: {missing}")
        return found


FAULTS = {
    "nothing": Faults(),
    "lost": Faults(lost=0.1),
    "answers lost": Faults(reply_lost=0.1),
    "repeated": Faults(twice=0.5),
    "slow": Faults(slow=0.05),
    "hanging": Faults(hangs=0.003),
    "everything but death": Faults(lost=0.05, reply_lost=0.05, twice=0.2, slow=0.02, hangs=0.002),
    "everything": Faults(lost=0.05, reply_lost=0.05, twice=0.2, slow=0.02, hangs=0.002, dies=0.002),
}


def run_schedule(faults: Faults, seed: int, killed: int = 0) -> MicrobatchSwarm:
    """Play a swarm under these faults, and check what must hold in the end."""

    async def body(now: Callable[[], float]) -> MicrobatchSwarm:
        swarm = MicrobatchSwarm(now, seed, faults)
        deaths_s = itertools.accumulate(swarm.rng.uniform(0.2, 1.2) for _ in range(killed))
        await swarm.run(dict(enumerate(deaths_s)))
        return swarm

    swarm = virtually(body)
    whole = swarm.num_microbatches * (swarm.num_drivers - killed)
    assert len(swarm.finished) >= whole
    assert not (found := swarm.miscounted(nobody_died=not faults.dies and not killed)), found
    return swarm

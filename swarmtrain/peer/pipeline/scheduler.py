"""Keep a driver busy: begin as many microbatches as the stages can take, and report what becomes of them.

Runs in the network thread, beside the trainer thread of the first stage. The first stage's share of each microbatch is
asked for like any other's.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from swarmtrain.data.batches import BatchSource
from swarmtrain.errors import GoneError, PeerError, Problem, SwarmtrainError
from swarmtrain.events import Event, MicrobatchRetryEvent
from swarmtrain.network.tasks import end_tasks, logged
from swarmtrain.peer.pipeline.driver import Driver, StageCalls
from swarmtrain.peer.pipeline.request_queue import StageRequestQueue
from swarmtrain.protocol.pipeline.balance import StagePeer
from swarmtrain.protocol.pipeline.driver import DriverPace
from swarmtrain.protocol.pipeline.ledger import Key
from swarmtrain.protocol.pipeline.router import Router
from swarmtrain.run import RunFile

_log = logging.getLogger(__name__)
_POLL_INTERVAL_S = 0.5
_DRAIN_S = 4.0
_TELL_EVERY_S = 1.0
_NUM_LOSSES = 256


@dataclass
class TellRetries:
    """Emits events about failed and repeated parts of microbatches, at most one a second for each peer and stage. See
    `MicrobatchReport`."""

    emit: Callable[[Event], None]
    on_refused: Callable[[str, PeerError], None]
    num_lost: int = 0
    _told_s: dict[tuple[int, str], float] = field(default_factory=dict)
    _untold: dict[tuple[int, str], int] = field(default_factory=dict)

    def retried(self, sequence: int, stage: int, peer: str, reason: str) -> None:
        """Report that part of a microbatch is asked for again, of the same or another peer. See `MicrobatchReport`."""
        whom, now = (stage, peer), time.monotonic()
        self._untold[whom] = self._untold.get(whom, 0) + 1
        if now >= self._told_s.get(whom, float("-inf")) + _TELL_EVERY_S:
            self._told_s[whom] = now
            self.emit(MicrobatchRetryEvent(stage=stage, asked=peer, reason=reason, count=self._untold.pop(whom)))

    def refused(self, peer: str, error: PeerError) -> None:
        """Report that a peer gave a wrong answer. See `MicrobatchReport`."""
        self.on_refused(peer, error)

    def lost(self, stage: int, peer: str, key: Key, reason: str) -> None:
        """Report that a computed gradient does not count at this stage. See `MicrobatchReport`."""
        self.num_lost += 1
        _log.info(
            "the gradient of microbatch %d does not count at stage %d of %s: %s", key.sequence, stage, peer, reason
        )


@dataclass
class MicrobatchScheduler:
    """One period in which this peer drives: from taking the first stage to leaving it."""

    me: str
    run: RunFile
    source: MicrobatchSource
    queue: StageRequestQueue
    """Request queue of the first stage on this peer."""
    calls: StageCalls
    told: TellRetries
    peers_of: Callable[[], Mapping[int, list[str]]]
    """Return the peers that hold each stage now, this one included."""
    failed: Callable[[Problem], None]
    """Called with a sentence when this peer cannot go on."""
    places: Callable[[], Sequence[StagePeer]]
    """Return the records of all stage peers, this one included."""
    driver: Driver = field(init=False)
    losses: deque[float] = field(default_factory=lambda: deque(maxlen=_NUM_LOSSES))
    """Losses of the last microbatches that came back, mean nats per token; the reader removes them."""
    _open: set[asyncio.Task[None]] = field(default_factory=set)
    _wanted: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(0))
    """Number of microbatches that the driver wants drawn, one after the other."""
    _work: tuple[asyncio.Task[None], ...] = ()

    def __post_init__(self) -> None:
        run, rng = self.run, random.Random(self.me)
        routers = [Router(rng, run.pipeline.wiring) for _ in range(1, run.pipeline.stages)]
        sequence = int(time.time() * 1e6)  # greater than in all earlier incarnations of this peer
        tokens = run.microbatch_sequences * run.model.context_tokens
        pace = DriverPace(run.pipeline.in_flight, tokens, run.batch_microbatches)
        self.driver = Driver(
            self.me, routers, self.calls, self.told, time.monotonic, sequence, pace, self._wanted.release
        )

    @property
    def num_in_flight(self) -> int:
        """Number of microbatches under way."""
        return self.driver.engine.num_under_way

    async def start(self) -> None:
        """Drive from now on."""
        self._work = asyncio.create_task(self._keep_looking()), asyncio.create_task(self._keep_drawing())
        for work in self._work:
            logged(work, "driving").add_done_callback(self._work_ended)

    async def stop(self, drain_s: float = _DRAIN_S) -> None:
        """Begin no more microbatches, and wait at most `drain_s` seconds until those under way are back and settled
        with all peers.
        """
        self.driver.shut()
        await end_tasks(self._work)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(drain_s):
                if self._open:
                    await asyncio.wait(self._open)
                await self.driver.settled()
        await end_tasks(self._open)
        with contextlib.suppress(TimeoutError):  # for settlements of what was just given up
            async with asyncio.timeout(_POLL_INTERVAL_S):
                await self.driver.settled()
        await self.driver.stop()

    async def _keep_looking(self) -> None:
        """Tell the driver twice a second who holds which stage; not for each microbatch, since there may be a thousand
        peers.
        """
        while True:
            self.driver.see(self.peers_of(), self.places())
            await asyncio.sleep(_POLL_INTERVAL_S)

    async def _keep_drawing(self) -> None:
        while await self._wanted.acquire():
            # Without a round of the first stage its shard is not chosen: text would be drawn that is not counted there.
            if not self.queue.is_open or not self.queue.has_worker:
                self.driver.not_drawn()
                continue
            try:
                x, targets = await asyncio.to_thread(self.source.next_microbatch)
            except SwarmtrainError as error:
                self.failed(Problem(str(error), error.code))
                return
            task = asyncio.create_task(self._drive(x.numel(), x, targets))
            self._open.add(task)
            task.add_done_callback(self._ended)

    async def _drive(self, tokens: int, x: object, targets: object) -> None:
        try:
            self.losses.append((await self.driver.drive(tokens, x, targets)).loss)
        except GoneError as error:
            # The first stage is being merged or left: microbatches under way do not count then.
            _log.debug("a microbatch is given up: %s", error)
        except SwarmtrainError as error:
            self.failed(Problem(str(error), error.code))

    def _work_ended(self, work: asyncio.Task[None]) -> None:
        """Fail this peer if its drawing or looking task died: an idle driver would keep every peer's run from
        ending.
        """
        if not work.cancelled() and (error := work.exception()) is not None:
            self.failed(
                Problem(f"an error of this peer stopped its microbatches: {error!r}; start the peer again", "bug")
            )

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._open.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("a microbatch failed", exc_info=error)
            self.failed(Problem(f"an error of this peer lost a microbatch: {error!r}; start the peer again", "bug"))


class MicrobatchSource:
    """Batches of a peer, handed out by microbatch. Thread-safe. Shapes: B sequences, T context tokens."""

    def __init__(self, batches: BatchSource, num_sequences: int) -> None:
        self._batches, self._num_sequences = batches, num_sequences
        self._left: deque[Tensor] = deque()
        self._lock = threading.Lock()

    @property
    def position(self) -> int:
        """Number of batches drawn since the peer's first one in this run. See `BatchSource`."""
        return self._batches.position

    @property
    def num_shards(self) -> int:
        """Number of shards that `use_shard` can choose from; 0 if there are none. See `BatchSource`."""
        return self._batches.num_shards

    def use_shard(self, shard: int) -> None:
        """Draw from this shard from now on. See `BatchSource`."""
        with self._lock:
            self._batches.use_shard(shard)

    def next_batch(self) -> Tensor:
        """Return the next batch, int64 (B, T + 1). See `BatchSource`."""
        with self._lock:
            return self._batches.next_batch()

    def next_microbatch(self) -> tuple[Tensor, Tensor]:
        """Return the input of the first stage and the targets of the last, int64 (B, T) each."""
        with self._lock:
            if not self._left:
                self._left.extend(torch.split(self._batches.next_batch(), self._num_sequences))
            sequences = self._left.popleft()
        return sequences[:, :-1].contiguous(), sequences[:, 1:].contiguous()


class NoBatches:
    """Batches of stages after the first, which draw none: drivers send them their work."""

    position = num_shards = 0

    def use_shard(self, shard: int) -> None:
        """Do nothing, since this source has no batches. See `BatchSource`."""

    def next_batch(self) -> Tensor:
        """Raise AssertionError, since this source has no batches. See `BatchSource`."""
        raise AssertionError("only the first stage draws batches")

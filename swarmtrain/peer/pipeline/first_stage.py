"""Driving on a volunteer that may hold the first stage: from taking that stage to leaving it."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping

from swarmtrain.data.mixture import PeerPlace
from swarmtrain.data.prepare import TrainingData, training_batches
from swarmtrain.errors import RunTimeError
from swarmtrain.network.swarm import Swarm
from swarmtrain.peer.lifecycle.context import VolunteerContext
from swarmtrain.peer.pipeline.request_queue import StageRequestQueue
from swarmtrain.peer.pipeline.scheduler import MicrobatchScheduler, MicrobatchSource, TellRetries
from swarmtrain.peer.pipeline.stage_replica import StageReplicas
from swarmtrain.peer.pipeline.stage_service import WireCalls
from swarmtrain.protocol.pipeline.balance import StagePeer
from swarmtrain.protocol.pipeline.moves import places_of

_LAST_DRAIN_S = 0.5
_STOP_DRIVING_S = 5.0


class FirstStage:
    """Drives microbatches while the first stage is held. The main thread starts and stops it; it runs in the network
    thread.
    """

    def __init__(
        self,
        context: VolunteerContext,
        data: TrainingData,
        swarm: Swarm,
        stages: StageReplicas,
        calls: WireCalls,
    ) -> None:
        """`data` is this peer's text; `swarm` is the run's."""
        self._context, self._data = context, data
        self._swarm, self._stages, self._calls = swarm, stages, calls
        self._source: MicrobatchSource | None = None
        self._driving: MicrobatchScheduler | None = None

    @property
    def corpus_sha256(self) -> str:
        """SHA-256 of this peer's text."""
        return self._data.digest

    def batches_at(self, position: int) -> MicrobatchSource:
        """Return this peer's data from a checkpoint's position, or from further on if it was drawn from here before."""
        # Kept for the life of the process: another source would draw the same batches again.
        if self._source is None:
            context = self._context
            place = PeerPlace(run_sha256=context.published.sha256, peer_id=context.me, position=position)
            batches = training_batches(context.run, self._data, place)
            self._source = MicrobatchSource(batches, context.run.microbatch_sequences)
        return self._source

    # ------------------------------------------------------------- driving

    def drive(self, queue: StageRequestQueue) -> None:
        """Start driving: the first stage is held, and its questions arrive at `queue`."""
        self._context.wait(self._drive(queue))

    async def _drive(self, queue: StageRequestQueue) -> None:
        context, swarm = self._context, self._swarm
        assert self._source is not None
        self._driving = MicrobatchScheduler(
            context.me,
            context.run,
            self._source,
            queue,
            self._calls,
            TellRetries(context.emit, swarm.peers.refused),
            self.peers_of_stages,
            context.stop.fail,
            self._places_told,
        )
        await self._driving.start()

    def stop(self) -> None:
        """Begin no more microbatches, and wait for those under way."""
        driving, self._driving = self._driving, None
        if driving is not None:
            self._context.wait(driving.stop())

    def stop_soon(self) -> None:
        """Stop as this peer leaves: waits for half a second only."""
        driving, self._driving = self._driving, None
        if driving is not None:
            with contextlib.suppress(TimeoutError, RunTimeError):
                self._context.network.run(driving.stop(_LAST_DRAIN_S), _STOP_DRIVING_S)

    @property
    def num_in_flight(self) -> int:
        """Number of microbatches under way."""
        return 0 if self._driving is None else self._driving.num_in_flight

    def take_loss(self) -> float | None:
        """Return the mean loss, in nats per token, of microbatches that came back since the last call; None if none
        did.
        """
        if self._driving is None:
            return None
        losses = self._driving.losses
        taken = [losses.popleft() for _ in range(len(losses))]
        return sum(taken) / len(taken) if taken else None

    # ------------------------------------------------------------- what driving asks, in the network thread

    def peers_of_stages(self) -> Mapping[int, list[str]]:
        """Return the peers that hold each stage now."""
        peers: dict[int, list[str]] = {stage: [] for stage in range(self._context.run.pipeline.stages)}
        for held in self._stages.all:
            if held.queue.is_open:
                peers[held.number].append(self._context.me)
        for info in self._swarm.membership.volunteers():
            for stage in () if info.place is None else info.place.stages:
                peers.get(stage, []).append(info.peer)
        return peers

    def _places_told(self) -> list[StagePeer]:
        """Return the records of all stage peers, this peer's as last announced."""
        others, mine = places_of(self._swarm.membership.volunteers()), self._swarm.presence.me.place
        return others if mine is None else [*others, mine]

"""Stages that a volunteer holds, and what it trained in those that it has left."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from swarmtrain.errors import RunTimeError
from swarmtrain.network.swarm import Swarm
from swarmtrain.peer.control.board import Pulse
from swarmtrain.peer.pipeline.request_queue import StageRequestQueue
from swarmtrain.peer.pipeline.stage_replica import StageReplica
from swarmtrain.protocol.tokens.progress import Progress
from swarmtrain.v1 import control_pb2 as pb

_PATIENCE_S = 600.0
"""Seconds without progress before a stage counts as stuck: it may well wait for others, through no fault of this
peer.
"""


class StageReplicas:
    """Stages of a volunteer. The main thread changes them; any thread may read."""

    def __init__(self, me: str, costs: Sequence[float]) -> None:
        """`costs` are the stages' shares of the model's computing."""
        self._me, self._costs = me, costs
        self._held: dict[int, StageReplica] = {}
        self.queues: dict[int, StageRequestQueue] = {}
        """Request queue of each stage, by stage."""
        self._own_tokens: dict[int, int] = {}
        self._left_at_tokens = 0
        self._left_at_round = 0

    def add(self, held: StageReplica) -> None:
        """Add a stage that is held from now on."""
        self._held[held.number], self.queues[held.number] = held, held.queue

    def drop(self, number: int) -> StageReplica:
        """Remove a stage; what was trained of it still counts. Returns it."""
        self._left_at_round = max(self._left_at_round, self.round)
        del self.queues[number]
        held = self._held.pop(number)
        self._own_tokens[number] = held.session.replica.own_tokens
        self._left_at_tokens = max(self._left_at_tokens, held.session.progress.run_tokens)
        return held

    @property
    def all(self) -> list[StageReplica]:
        """All held stages, the longest held first."""
        return list(self._held.values())

    @property
    def numbers(self) -> tuple[int, ...]:
        """Numbers of the held stages, ascending."""
        return tuple(sorted(self._held))

    # ------------------------------------------------------------- how far they are

    @property
    def are_done(self) -> bool:
        """True if the run has had its tokens in all held stages.

        Asks each stage, also those behind one that still trains, so that an error that ended a stage's training is
        raised.
        """
        return min((held.is_done for held in self.all), default=True)

    @property
    def have_had_tokens(self) -> bool:
        """True if this peer reports its part as done.

        A driver is done when its first stage has had the tokens: its other stages wait for all drivers to say so.
        """
        first = self._held.get(0)
        return first.is_done if first is not None else bool(self._held) and self.are_done

    @property
    def any_has_ended(self) -> bool:
        """True if the training of any stage has ended."""
        return any(held.training.done() for held in self.all)

    @property
    def round(self) -> int:
        """Round of the stage furthest on; of the stages left if none is held."""
        return max((held.session.progress.round for held in self.all), default=self._left_at_round)

    @property
    def run_tokens(self) -> int:
        """Run's tokens as the held stages count them."""
        return max((held.session.progress.run_tokens for held in self.all), default=0)

    @property
    def most_run_tokens(self) -> int:
        """Run's tokens as the held stages and those left counted them."""
        return max(self.run_tokens, self._left_at_tokens)

    @property
    def contribution(self) -> int:
        """Tokens that this peer has trained, those of a stage weighted by its share of the model."""
        held = {each.number: each.session.replica.own_tokens for each in self.all}
        return int(sum(self._costs[stage] * number for stage, number in (self._own_tokens | held).items()))

    @property
    def steps_per_s(self) -> float:
        """Inner steps per second, those of a stage weighted by its share of the model."""
        return sum(self._costs[held.number] * held.session.steps_per_s for held in self.all)

    def durable(self) -> Progress:
        """Return the progress that this peer's progress record advertises."""
        return Progress(round=self.round, run_tokens=0, peer_tokens={self._me: self.contribution})

    # ------------------------------------------------------------- checkpoints, for who asks

    def show(self, status: pb.PeerStatus) -> None:
        """See `CheckpointManager.show`, for the stage held longest."""
        for held in self.all[:1]:
            held.manager.show(status)

    def flushed(self) -> pb.CheckpointReply:
        """See `CheckpointManager.flushed`, for the stage held longest."""
        for held in self.all[:1]:
            return held.manager.flushed()
        raise RunTimeError(
            "this peer has nothing to write yet, since it is still starting; try again in a minute",
            code="no-checkpoint",
        )


def stages_pulse(swarm: Swarm, stages: StageReplicas) -> Callable[[], Pulse]:
    """Return a function that describes what a pipeline volunteer is doing, stage by stage."""
    traffic = swarm.node.traffic

    def pulse() -> Pulse:
        held = stages.all
        about = [
            f"stage {each.number}, round {each.session.progress.round}: {each.swarm.rounds.inner_steps_done} of "
            f"{each.exchange.round_steps} steps"
            for each in held
        ]
        first = held[0] if held else None
        return Pulse(
            state=pb.PEER_STATE_TRAINING if held else pb.PEER_STATE_STARTING,
            doing=f"training {'; '.join(about)}" if about else "looking for a stage to hold",
            round=0 if first is None else first.session.progress.round,
            inner_steps_done=0 if first is None else first.swarm.rounds.inner_steps_done,
            inner_steps=0 if first is None else first.exchange.round_steps,
            num_steps=sum(each.exchange.num_steps for each in held),
            sent_bytes=traffic.sent_bytes,
            received_bytes=traffic.received_bytes,
            patience_s=_PATIENCE_S,
        )

    return pulse

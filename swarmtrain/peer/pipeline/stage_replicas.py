"""The stages of a pipeline that a volunteer holds, and what it has trained of those that it has left."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from swarmtrain.errors import RunTimeError
from swarmtrain.network.swarm import Swarm
from swarmtrain.peer.control.board import Pulse
from swarmtrain.peer.pipeline.request_queue import StageRequestQueue
from swarmtrain.peer.pipeline.stage_replica import StageReplica
from swarmtrain.protocol.tokens.progress import Progress
from swarmtrain.v1 import control_pb2 as pb

__all__ = ["StageReplicas", "stages_pulse"]

_PATIENCE_S = 600.0
"""A stage may well wait for others: that is no fault of this peer."""


class StageReplicas:
    """What a volunteer holds. The main thread changes it; any may read."""

    def __init__(self, me: str, costs: Sequence[float]) -> None:
        """`costs` are each stage's part of the model's computing."""
        self._me, self._costs = me, costs
        self._held: dict[int, StageReplica] = {}
        self.desks: dict[int, StageRequestQueue] = {}
        """Where drivers' questions to each stage arrive."""
        self._own_tokens: dict[int, int] = {}
        self._left_at_tokens = 0
        self._left_at_round = 0

    def add(self, held: StageReplica) -> None:
        """It is held from now on."""
        self._held[held.number], self.desks[held.number] = held, held.desk

    def drop(self, number: int) -> StageReplica:
        """It is held no more; what was trained of it counts on."""
        self._left_at_round = max(self._left_at_round, self.round)
        del self.desks[number]
        held = self._held.pop(number)
        self._own_tokens[number] = held.session.replica.own_tokens
        self._left_at_tokens = max(self._left_at_tokens, held.session.progress.run_tokens)
        return held

    @property
    def all(self) -> list[StageReplica]:
        """Each, as long held as it is in front."""
        return list(self._held.values())

    @property
    def numbers(self) -> tuple[int, ...]:
        """Which they are."""
        return tuple(sorted(self._held))

    # ------------------------------------------------------------- how far they are

    @property
    def are_done(self) -> bool:
        """Whether the run has had its tokens in all of them. Asks each, also behind one that trains: what ended a
        stage's training is raised."""
        return min((held.is_done for held in self.all), default=True)

    @property
    def have_had_tokens(self) -> bool:
        """What this peer tells of its part: one that drives, that the first stage has; its others wait for all to say
        so."""
        first = self._held.get(0)
        return first.is_done if first is not None else bool(self._held) and self.are_done

    @property
    def any_has_ended(self) -> bool:
        """Whether the training of one has."""
        return any(held.training.done() for held in self.all)

    @property
    def round(self) -> int:
        """That of the one furthest on; that of what was left where nothing is held."""
        return max((held.session.progress.round for held in self.all), default=self._left_at_round)

    @property
    def run_tokens(self) -> int:
        """The run's, as the stages that are held count them."""
        return max((held.session.progress.run_tokens for held in self.all), default=0)

    @property
    def most_run_tokens(self) -> int:
        """The same, those that were left included."""
        return max(self.run_tokens, self._left_at_tokens)

    @property
    def contribution(self) -> int:
        """Tokens that this peer has trained on, those of a stage by its part of the model."""
        held = {each.number: each.session.replica.own_tokens for each in self.all}
        return int(sum(self._costs[stage] * number for stage, number in (self._own_tokens | held).items()))

    @property
    def steps_per_s(self) -> float:
        """Inner steps, those of a stage by its part of the model."""
        return sum(self._costs[held.number] * held.session.steps_per_s for held in self.all)

    def durable(self) -> Progress:
        """What this peer's progress record tells."""
        return Progress(round=self.round, run_tokens=0, peer_tokens={self._me: self.contribution})

    # ------------------------------------------------------------- checkpoints, for who asks

    def show(self, status: pb.PeerStatus) -> None:
        """See `CheckpointManager.show`, of the first one."""
        for held in self.all[:1]:
            held.keeper.show(status)

    def flushed(self) -> pb.CheckpointReply:
        """See `CheckpointManager.flushed`, of the first one."""
        for held in self.all[:1]:
            return held.keeper.flushed()
        raise RunTimeError(
            "there is nothing to write yet: this peer is still starting, try again in a minute", code="no-checkpoint"
        )


def stages_pulse(swarm: Swarm, stages: StageReplicas) -> Callable[[], Pulse]:
    """What a volunteer of a pipeline is doing, stage by stage."""
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

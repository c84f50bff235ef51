"""What a volunteer of a pipeline has besides any volunteer: the parts of its training are made with this."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from swarmtrain.model.stages import StageShape
from swarmtrain.network.swarm import Swarm
from swarmtrain.peer.lifecycle.context import VolunteerContext
from swarmtrain.peer.pipeline.mover import StageMover
from swarmtrain.peer.pipeline.stage_replicas import StageReplicas
from swarmtrain.protocol.pipeline.balance import Rule

__all__ = ["PipelineContext"]


@dataclass(frozen=True, kw_only=True)
class PipelineContext:
    """A volunteer's stages, who else is here, and who decides whether it moves."""

    volunteer: VolunteerContext
    shapes: Sequence[StageShape]
    rule: Rule
    swarm: Swarm
    """The run's."""
    stages: StageReplicas
    mover: StageMover

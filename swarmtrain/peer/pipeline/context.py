"""Parts shared by the objects that make up a pipeline volunteer's training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from swarmtrain.model.run_stages import RunStageShape
from swarmtrain.network.swarm import Swarm
from swarmtrain.peer.lifecycle.context import VolunteerContext
from swarmtrain.peer.pipeline.stage_replica import StageReplicas
from swarmtrain.protocol.pipeline.balance import Rule

if TYPE_CHECKING:
    from swarmtrain.peer.pipeline.mover import StageMover


@dataclass(frozen=True, kw_only=True)
class PipelineContext:
    """Stages of a volunteer, the swarm it sees, and the mover that decides whether it changes them."""

    volunteer: VolunteerContext
    shapes: Sequence[RunStageShape]
    rule: Rule
    swarm: Swarm
    """Swarm of the run."""
    stages: StageReplicas
    mover: StageMover

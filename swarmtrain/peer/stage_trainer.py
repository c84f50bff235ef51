"""The trainer of one stage: the same rounds, publications and merges, with drivers' microbatches for inner steps."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from swarmtrain.model.stage_work import StageWork
from swarmtrain.peer.stage_desk import StageDesk
from swarmtrain.peer.stage_loop import StageLoop
from swarmtrain.peer.trainer import InnerStep, Trainer

__all__ = ["StageTrainer"]


@dataclass(kw_only=True)
class StageTrainer(Trainer):
    """`model` is the stage's; an inner step takes as long as it takes until a batch of microbatches is acknowledged."""

    desk: StageDesk
    graph_bytes: float = float("inf")
    """What may be kept of forwards for their backwards."""
    loop: StageLoop = field(init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        work = StageWork(self.model, self.graph_bytes)
        self.loop = StageLoop(self.desk, work, self.inner, self.run.tokens_per_step, slowed=self.slowed)

    def train(self) -> str:
        """See `Trainer`. Outside of it nobody waits for an answer in vain."""
        self.desk.open()
        try:
            return super().train()
        finally:
            self.desk.close()

    def enter(self, theta: Tensor) -> None:
        """See `Trainer`: what is under way keeps the weights that it began with."""
        self.loop.work.let_go()
        super().enter(theta)
        self.loop.work.replaced()

    def step(self, progress: float, scale: float) -> InnerStep:
        """See `Trainer`."""
        return self.loop.step(progress, scale, self.should_stop)

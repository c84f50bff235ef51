"""The trainer of one stage: the same rounds, publications and merges, with drivers' microbatches for inner steps."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

from torch import Tensor

from swarmtrain.model.stage_work import StageWork
from swarmtrain.peer.stage_desk import StageDesk
from swarmtrain.peer.stage_loop import StageLoop
from swarmtrain.peer.trainer import InnerStep, Trainer
from swarmtrain.protocol.microbatches import Kind

__all__ = ["StageTrainer"]


@dataclass(kw_only=True)
class StageTrainer(Trainer):
    """`model` is the stage's; an inner step takes as long as it takes until a batch of microbatches is acknowledged."""

    desk: StageDesk
    graph_bytes: float = float("inf")
    """What may be kept of forwards for their backwards."""
    slowed_work: Callable[[Kind | None], AbstractContextManager[None]] = lambda kind: nullcontext()
    """Around each piece of work, in place of `slowed`."""
    over: Callable[[], bool] = lambda: False
    """Whether the first stage has had the run's tokens, so that no more come here: one that waits for what is missing
    of its last batch would wait for ever."""
    ends_by_count: bool = True
    """Whether its own count ends it too. A stage after the first would end by it while the first one still needs it."""
    loop: StageLoop = field(init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.loop = StageLoop(
            self.desk,
            StageWork(self.model, self.graph_bytes),
            self.inner,
            self.run.tokens_per_step,
            slowed=self.slowed_work,
            over=self.over,
        )

    @property
    def finished(self) -> bool:
        """See `Trainer`."""
        return (self.ends_by_count and super().finished) or (self.over() and self.desk.has_settled)

    def train(self) -> str:
        """See `Trainer`. Outside of it nobody waits for an answer in vain."""
        self.desk.open()
        try:
            reason = super().train()
            return "total_tokens" if self.finished else reason
        finally:
            self.desk.close()

    def enter(self, theta: Tensor, fragment: int | None = None) -> None:
        """See `Trainer`: what is under way keeps the weights that it began with."""
        self.loop.work.let_go()
        super().enter(theta, fragment)
        self.loop.work.replaced()

    def step(self, progress: float, scale: float) -> InnerStep:
        """See `Trainer`."""
        return self.loop.step(progress, scale, self.should_stop)

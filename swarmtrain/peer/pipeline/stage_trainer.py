"""The trainer of one stage: a loop whose inner steps are made of drivers' microbatches."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from torch import Tensor

from swarmtrain.algorithm.fragments import Fragment
from swarmtrain.data.batches import BatchSource
from swarmtrain.model.stage_work import StageWork
from swarmtrain.peer.pipeline.request_queue import StageRequestQueue
from swarmtrain.peer.pipeline.stage_loop import StageLoop
from swarmtrain.peer.training.loop import InnerLoop, InnerStep, inner_constants
from swarmtrain.peer.training.parameters import HostParameters
from swarmtrain.peer.training.session import Session
from swarmtrain.protocol.pipeline.ledger import Kind
from swarmtrain.protocol.tokens.progress import Progress
from swarmtrain.run import RunFile

__all__ = ["StageParameters", "StageTrainer"]


class StageParameters(HostParameters):
    """A stage's: what is under way keeps the weights that it began with."""

    def __init__(self, work: StageWork) -> None:
        super().__init__(work.stage.named_parameters())
        self._work = work

    def write(self, theta: Tensor, fragment: Fragment | None = None) -> None:
        """See `ParameterSource`."""
        self._work.let_go()
        super().write(theta, fragment)
        self._work.replaced()


class StageTrainer(InnerLoop):
    """An inner step takes as long as it takes until a batch of microbatches is acknowledged."""

    def __init__(
        self,
        run: RunFile,
        work: StageWork,
        batches: BatchSource,
        desk: StageRequestQueue,
        slowed: Callable[[Kind | None], AbstractContextManager[None]] = lambda kind: nullcontext(),
        over: Callable[[], bool] = lambda: False,
    ) -> None:
        """`batches` are a driver's; `slowed` is entered around each piece of work. `over` says that the first stage has
        had the run's tokens, so that no more come here: one that waits for what is missing of its last batch would
        wait for ever."""
        super().__init__(StageParameters(work), batches, inner_constants(run))
        self.desk, self._over = desk, over
        self.loop = StageLoop(desk, work, self.inner, run.tokens_per_step, slowed=slowed, over=over)

    def ends_after(self, total_tokens: float) -> Callable[[Progress], bool]:
        """`Session.ends`: with so many tokens by the stage's own count, or when drivers have no more. A stage after the
        first would end by its count while the first one still needs it."""
        return lambda progress: progress.run_tokens >= total_tokens or (self._over() and self.desk.has_settled)

    def train(self, session: Session) -> str:
        """See `InnerLoop`. Outside of it nobody waits for an answer in vain."""
        self.desk.open()
        try:
            reason = super().train(session)
            return "total_tokens" if session.finished else reason
        finally:
            self.desk.close()

    def step(self, progress: float, scale: float, should_stop: Callable[[], bool]) -> InnerStep:
        """See `InnerLoop`."""
        return self.loop.step(progress, scale, should_stop)

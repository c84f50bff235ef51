"""Trainer of one stage: a loop whose inner steps are made of drivers' microbatches."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from swarmtrain.data.batches import BatchSource
from swarmtrain.model.stage_work import StageWork
from swarmtrain.peer.devices.device_parameters import DeviceParameters
from swarmtrain.peer.pipeline.request_queue import StageRequestQueue
from swarmtrain.peer.pipeline.stage_loop import StageLoop
from swarmtrain.peer.training.loop import InnerLoop, InnerStep, inner_constants
from swarmtrain.peer.training.parameters import HostParameters, ParameterSource
from swarmtrain.peer.training.session import Session
from swarmtrain.protocol.pipeline.ledger import Kind
from swarmtrain.protocol.tokens.progress import Progress
from swarmtrain.run import RunFile


def stage_parameters(work: StageWork, *, is_host: bool = True) -> ParameterSource:
    """Return the parameters of a stage in main memory (`is_host`) or on a device.

    Graphs of microbatches under way refer to the present weights, so a merge is written into copies (decision 26).
    """
    source = HostParameters if is_host else DeviceParameters
    return source(work.stage.named_parameters(), work.rewriting)


class StageTrainer(InnerLoop):
    """Loop of a stage. An inner step lasts until a batch of microbatches is acknowledged."""

    def __init__(
        self,
        run: RunFile,
        work: StageWork,
        batches: BatchSource,
        queue: StageRequestQueue,
        slowed: Callable[[Kind | None], AbstractContextManager[None]] = lambda kind: nullcontext(),
        over: Callable[[], bool] = lambda: False,
    ) -> None:
        """`batches` are the driver's data; `slowed` is entered around each piece of work. The stage is on the device to
        which `queue` transfers, or in main memory.

        `over` returns whether the first stage has had the run's tokens, so that no more microbatches come. Without it a
        stage would wait for ever for the rest of its last batch.
        """
        parameters = stage_parameters(work, is_host=queue.transfer is None)
        super().__init__(parameters, batches, inner_constants(run))
        self.queue, self._over = queue, over
        self.loop = StageLoop(queue, work, self.inner, run.tokens_per_step, slowed=slowed, over=over)

    def ends_after(self, total_tokens: float) -> Callable[[Progress], bool]:
        """Return the `Session.ends` of a stage: after `total_tokens` by its own count, or when drivers have no more.

        A stage after the first gets an infinite total: by its own count it could end while the first one still needs
        it.
        """
        return lambda progress: progress.run_tokens >= total_tokens or (self._over() and self.queue.has_nothing_open)

    def train(self, session: Session) -> str:
        """See `InnerLoop`. The request queue is open only while training, so that nobody waits for an answer in
        vain.
        """
        self.queue.open()
        try:
            reason = super().train(session)
            return "total_tokens" if session.finished else reason
        finally:
            self.queue.close()

    def step(self, progress: float, scale: float, should_stop: Callable[[], bool]) -> InnerStep:
        """Take one inner step. See `InnerLoop`."""
        return self.loop.step(progress, scale, should_stop)

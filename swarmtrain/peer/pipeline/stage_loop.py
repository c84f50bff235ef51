"""Inner loop of a stage: computes drivers' microbatches until a batch is full, then takes an inner step.

A whole model's loop draws batches of its own data; a stage's loop computes what drivers ask for. `step` returns once
enough tokens are acknowledged. Runs on the stage's own thread.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from swarmtrain.algorithm.inner import InnerOptimizer
from swarmtrain.data.batches import BatchSource
from swarmtrain.errors import BadBytesError
from swarmtrain.model.stage_work import BadGradientError, StageWork
from swarmtrain.peer.devices.compute import finish
from swarmtrain.peer.devices.device_parameters import DeviceParameters
from swarmtrain.peer.devices.host_copies import HostCopier, HostCopy
from swarmtrain.peer.lifecycle.stop import StopTraining
from swarmtrain.peer.pipeline.driver import Tail
from swarmtrain.peer.pipeline.request_queue import StageRequestQueue, Task
from swarmtrain.peer.training.loop import InnerLoop, InnerStep, RoundOver, inner_constants
from swarmtrain.peer.training.parameters import HostParameters, ParameterSource
from swarmtrain.peer.training.session import Session
from swarmtrain.protocol.pipeline.ledger import Add, Discard, Due, Forget, Kind, Subtract, TakeStep
from swarmtrain.protocol.pipeline.router import WORK_SHARES
from swarmtrain.protocol.tokens.progress import Progress
from swarmtrain.run import RunFile

_log = logging.getLogger(__name__)
_POLL_INTERVAL_S = 0.2
_RECENT = 96


@dataclass
class WorkMeter:
    """Measures how fast this peer computes its stage when always fed: time spent waiting for work does not count."""

    passed_tokens: int = 0
    """Tokens of microbatches that were computed completely here."""
    _recent: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=_RECENT))
    """(work in tokens, seconds) of the last pieces of work."""

    def add(self, kind: Kind | None, tokens: int, took_s: float) -> None:
        """Add a piece of work that took `took_s` seconds; kind None is overhead, such as a step."""
        share = 0.0 if kind is None else WORK_SHARES[kind]
        self._recent.append((share * tokens, took_s))
        if kind in ("backward", "tail"):
            self.passed_tokens += tokens

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens per second of the last pieces of work; None until there are enough."""
        recent = list(self._recent)  # other threads read it
        tokens, seconds = sum(each for each, _ in recent), sum(each for _, each in recent)
        return tokens / seconds if len(recent) >= _RECENT // 4 and seconds > 0 and tokens > 0 else None


@dataclass
class StageLoop:
    """Computes the work that the request queue hands out."""

    queue: StageRequestQueue
    work: StageWork
    inner: InnerOptimizer
    batch_tokens: int
    slowed: Callable[[Kind | None], AbstractContextManager[None]] = lambda kind: nullcontext()
    """Context entered around each piece of work of a kind, None for a step; it may wait for the device on entry, and
    sleep on exit (a rehearsal's slower machine, a considerate guest).
    """
    over: Callable[[], bool] = lambda: False
    """Return whether drivers have no more microbatches: then the open batch is the last one."""
    meter: WorkMeter = field(default_factory=WorkMeter)
    record: Callable[[Task | Due, Any], None] = lambda what, answer: None
    """Called with each piece of work in the order in which it is done, and with its answer."""

    def step(self, progress: float, scale: float, should_stop: Callable[[], bool]) -> InnerStep:
        """Work until a step is taken.

        Raises StopTraining when asked to end; nothing is lost by it. Raises RoundOver when no further step will come.
        """
        while True:
            if should_stop():
                raise StopTraining
            what = self.queue.next()
            if what is None:
                if self.over():
                    if self.queue.has_nothing_open:
                        raise RoundOver
                    if self.queue.close_batch():
                        continue
                self.queue.wait(_POLL_INTERVAL_S)
                continue
            if isinstance(what, TakeStep):
                self.record(what, None)
                return self._step(what, progress, scale)
            answer = None
            if isinstance(what, Task):
                with self.slowed(what.kind):
                    began_s = time.monotonic()  # without the wait for a turn on the device
                    answer = self._answer(what)
                self.meter.add(what.kind, what.tokens, time.monotonic() - began_s)
            else:
                self._correct(what)
            self.record(what, answer)

    def _answer(self, task: Task) -> Any:
        """Compute a task and report the answer or the error."""
        try:
            answer = self._compute(task)
        except BadGradientError as error:
            self.queue.failed(task, BadBytesError(str(error), code="bad-shape"))
            return None
        if (transfer := self.queue.transfer) is not None:
            self._finish()
            answer = transfer.to_host(answer)
        self.queue.done(task, answer)
        return answer

    def _finish(self) -> None:
        """Wait until the stage's device has done what it was asked: time counts when the work is finished."""
        if (transfer := self.queue.transfer) is not None:
            finish(transfer.device)

    def _step(self, step: TakeStep, progress: float, scale: float) -> InnerStep:
        with self.slowed(None):
            began_s = time.monotonic()
            # Gradients are summed for a full batch; a smaller or larger one is scaled to the mean over its own tokens.
            self.work.gradients(step.batch, self.batch_tokens / step.tokens)
            grad_norm = self.inner.step(progress, scale)
            self.work.replaced()
            self._finish()
        self.meter.add(None, step.tokens, time.monotonic() - began_s)
        return InnerStep(step.tokens, step.loss, grad_norm)

    def _compute(self, task: Task) -> Any:
        transfer = self.queue.transfer
        payload = task.payload if transfer is None else transfer.to_device(task.payload)
        if task.kind == "forward":
            return self.work.forward(task.key, payload)
        if task.kind == "backward":
            return self.work.backward(task.key, payload, task.work.batch)
        x, targets = payload
        result = self.work.tail(task.key, x, targets, task.tokens / self.batch_tokens, task.work.batch)
        return Tail(result.loss, result.gradient)

    def _correct(self, due: Subtract | Add | Discard | Forget) -> None:
        if isinstance(due, Subtract):
            self.work.subtract(due.key, due.batch)
        elif isinstance(due, Add):
            try:
                self.work.add(due.key, due.batch)
            except BadGradientError as error:
                # Recomputed by the present weights: its tokens count, but its gradient must not spoil the others.
                _log.warning("the gradient of a late microbatch is left out: %s", error)
        elif isinstance(due, Discard):
            self.work.discard(due.batch)
        else:
            self.work.forget(due.key)


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


class StageTransfer:
    """Copies of one stage's inputs and answers, to its device and back.

    A payload is a tensor, or a tuple of them; an answer is a tensor, a `Tail`, or None.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._copier = HostCopier(device)

    # ------------------------------------------------------------- the network's side

    async def pinned(self, payload: Any) -> Any:
        """Return a payload in memory from which the device copies without a thread that waits."""
        return await asyncio.to_thread(_pinned, payload) if self.device.type == "cuda" else payload

    async def arrived(self, answer: Any) -> Any:
        """Return an answer that `to_host` gave, once all of it is in main memory."""
        copy = answer.gradient if isinstance(answer, Tail) else answer
        if copy is None:
            return answer
        await asyncio.to_thread(copy.wait_ready)
        return Tail(answer.loss, copy.values) if isinstance(answer, Tail) else copy.values

    # ------------------------------------------------------------- the stage's side

    def to_device(self, payload: Any) -> Any:
        """Return a payload on the device, which copies it in order with what it computes."""
        if isinstance(payload, Tensor):
            return payload.to(self.device, non_blocking=True)
        return tuple(self.to_device(each) for each in payload)

    def to_host(self, answer: Any) -> Any:
        """Ask for a copy of an answer; its tensor is replaced by that."""
        if isinstance(answer, Tail):
            return Tail(answer.loss, self.to_host(answer.gradient))
        if answer is None:
            return None
        copy = self._copier.copy([answer])
        return HostCopy(copy.values.view(answer.shape), copy.wait_ready)


def _pinned(payload: Any) -> Any:
    if isinstance(payload, Tensor):
        return payload if payload.is_pinned() else payload.pin_memory()
    return tuple(_pinned(each) for each in payload)

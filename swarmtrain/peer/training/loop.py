"""Training loops: draw batches, run forward and backward, step the optimizer, for as long as the session wants steps.

A loop knows nothing of the swarm. Before each inner step it asks its session how far the run is, and after the step it
reports the tokens that were trained. Everything runs on the trainer's thread. A checkpoint keeps what a loop has
besides its parameters (`session.LoopState`).
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import Tensor

from swarmtrain.algorithm.batch import inputs_of, num_targets
from swarmtrain.algorithm.gradient_sum import GradientSum
from swarmtrain.algorithm.inner import (
    InnerConstants,
    InnerOptimizer,
    LossScale,
    Moments,
    learning_rate_at,
    moments_scale,
)
from swarmtrain.data.batches import BatchSource
from swarmtrain.model.language_model import LanguageModel
from swarmtrain.peer.devices.compute import (
    ComputeDevice,
    StepQueue,
    does_not_fit,
    enough_memory,
    finish,
    release_cached,
)
from swarmtrain.peer.devices.device_parameters import DeviceParameters
from swarmtrain.peer.lifecycle.stop import StopTraining
from swarmtrain.peer.training.gradients import add_gradient
from swarmtrain.peer.training.parameters import HostParameters, ParameterSource
from swarmtrain.peer.training.session import LoopCheckpoint, NextStep, Session
from swarmtrain.run import RunFile

if TYPE_CHECKING:
    from swarmtrain.peer.devices.data_parallel import DataParallelRanks

_KEPT_TIMES = 64


def inner_constants(run: RunFile) -> InnerConstants:
    """Return the constants of AdamW and its schedule from the run file's [inner] section."""
    section = run.inner
    return InnerConstants(
        learning_rate=section.learning_rate,
        weight_decay=section.weight_decay,
        beta1=section.beta1,
        beta2=section.beta2,
        gradient_clip=section.gradient_clip,
        warmup_fraction=section.warmup_fraction,
        floor_fraction=section.floor_fraction,
    )


@dataclass(frozen=True)
class InnerStep:
    """Result of one inner step: its targets, their mean loss (nats per target), and the gradient norm before the clip.

    `read_tokens` are all tokens that were read; None: as many as the targets. Loss and norm may be scalars on a device
    that has not computed them yet: reading one waits for the device.
    """

    tokens: int
    loss: float | Tensor
    grad_norm: float | Tensor
    read_tokens: int | None = None


class RoundOver(Exception):  # noqa: N818 - a signal, not an error
    """Raised by `InnerLoop.step` when no further step will come: the round ends with the steps taken so far."""


class InnerLoop(ABC):
    """Inner steps, one after the other, with AdamW (DiLoCo's inner loop)."""

    def __init__(
        self,
        parameters: ParameterSource,
        batches: BatchSource,
        constants: InnerConstants,
        loss_scale: LossScale | None = None,
        optimizer: type[InnerOptimizer] = InnerOptimizer,
    ) -> None:
        """`batches` may be drawn elsewhere: the loop only chooses their shard, and a checkpoint keeps the position.

        `optimizer` is `GradientSum` if all peers take the optimizer's step together.
        """
        self.parameters, self.batches = parameters, batches
        self.inner = optimizer(parameters.named.items(), constants, parameters.take_back, loss_scale)
        self.batch_sequences = 0
        """Sequences that a step takes of each batch; 0: all of it."""
        self.young_steps: int | None = None
        """Steps taken since this peer joined late with empty moments; None if it began with the others."""
        self._has_moments = False

    @abstractmethod
    def step(self, progress: float, scale: float, should_stop: Callable[[], bool]) -> InnerStep:
        """Take one inner step. `progress` is the share of the run's tokens trained so far; `scale` multiplies the
        learning rate.

        Raises RoundOver when no further step will come. Raises StopTraining, leaving the weights unchanged, when
        `should_stop` returns True.
        """

    def train(self, session: Session) -> str:
        """Take steps until the session wants no more; return the reason: "total_tokens" or "interrupted"."""
        while (ahead := session.next_step()) is not None:
            self.train_step(session, ahead)
        return session.reason

    def train_step(self, session: Session, ahead: NextStep) -> None:
        """Take the step that the session asked for, and report its outcome to the session."""
        if ahead.shard is not None:
            self.batches.use_shard(ahead.shard)
        self.batch_sequences = ahead.batch_sequences
        try:
            done = self.take_step(ahead.progress, session.should_stop)
        except RoundOver:
            session.end_round()
        except StopTraining:
            session.interrupt()
        else:
            learning_rate = learning_rate_at(self.inner.constants, ahead.progress)
            session.step(
                done.tokens,
                done.loss,
                grad_norm=done.grad_norm,
                learning_rate=learning_rate,
                read_tokens=done.read_tokens,
            )

    def take_step(self, progress: float, should_stop: Callable[[], bool] = lambda: False) -> InnerStep:
        """Call `step` with the learning rate scaled down while a late joiner's moments hold few steps (see
        `moments_scale`).
        """
        young = self.young_steps
        done = self.step(
            progress, 1.0 if young is None else moments_scale(young, self.inner.constants.beta2), should_stop
        )
        self._has_moments = True
        if young is not None:
            self.young_steps = young + 1
        return done

    # ------------------------------------------------------------- what its session asks, see `LoopState`

    @property
    def waited_s(self) -> float:
        """Total seconds that steps have waited for other threads to read what they change. See `LoopState`."""
        return self.inner.waited_s

    @property
    def position(self) -> int:
        """Number of batches drawn so far. See `LoopState`."""
        return self.batches.position

    def kept(self, room: Tensor | None) -> LoopCheckpoint:
        """Return the part of the loop's state that a checkpoint keeps. See `LoopState`.

        Moments on a device are lent whatever `room` there is: the device copies them beside the next step.
        """
        copy = self.parameters.copier.copy if isinstance(self.parameters, DeviceParameters) else None
        moments = self.inner.kept_moments(room, copy)
        return LoopCheckpoint(batches=self.batches.position, young_steps=self.young_steps, moments=moments)

    def resume(self, part: LoopCheckpoint) -> None:
        """See `LoopState`. `batches` must already stand at the checkpoint's position.

        Raises ValueError if it does not, or if the checkpoint's moments are only lent.
        """
        if self.batches.position != part.batches:
            raise ValueError(f"the checkpoint stands at batch {part.batches}, the data at {self.batches.position}")
        if not isinstance(part.moments, Moments):
            raise ValueError("moments of a checkpoint that was loaded are needed, not lent ones")
        self.inner.load_moments(part.moments)
        self._has_moments, self.young_steps = True, part.young_steps

    def skip(self, tokens: int) -> None:
        """Skip the batches of `tokens` tokens that were trained on before. See `LoopState`."""
        while tokens > 0:
            tokens -= max(1, num_targets(self.batches.next_batch()))

    def weights_replaced(self) -> None:
        """See `LoopState`. A loop that has moments of its own keeps them; otherwise it counts as a late joiner."""
        if not self._has_moments:
            self.young_steps = 0

    def begin_round(self) -> None:
        """Drop gradients that were added up in a round that was given up. See `LoopState`."""
        self.inner.forget()

    def mean_gradient(self) -> tuple[Tensor, int]:
        """Return the mean gradient (P,) of the steps since the last call, and its targets. See `LoopState`."""
        assert isinstance(self.inner, GradientSum), "only a method with a common step asks for it"
        return self.inner.take_mean()

    def end(self) -> None:
        """Release the optimizer's memory: no step follows. See `LoopState`."""
        self.inner.end()


class ModelLoop(InnerLoop):
    """Loop that trains a whole model on batches of this peer's own data, in microbatches that fit its memory."""

    def __init__(
        self,
        run: RunFile,
        model: LanguageModel,
        batches: BatchSource,
        slowed: Callable[[], AbstractContextManager[None]] = nullcontext,
        compute: ComputeDevice | None = None,
        told_smaller: Callable[[ComputeDevice, ComputeDevice], None] = lambda before, now: None,
    ) -> None:
        """`model` is on the device of `compute` (default: the processor, fp32).

        `slowed` is entered around each inner step, and may sleep on exit (a rehearsal's slower machine,
        `peer/local/faults.py`). `told_smaller` is called when memory ran out, with how a batch is computed before and
        from now on.
        """
        compute = ComputeDevice() if compute is None else compute
        named = model.trained_parameters()
        parameters = HostParameters(named) if compute.is_host else DeviceParameters(named)
        loss_scale = LossScale(compute.device) if compute.precision == "fp16" else None
        optimizer = GradientSum if run.merge.kind.common_step else InnerOptimizer
        super().__init__(parameters, batches, inner_constants(run), loss_scale, optimizer)
        compute = replace(compute, microbatch_sequences=compute.microbatch_sequences or run.microbatch_sequences)
        self.run, self.model, self.compute, self._slowed = run, model, compute, slowed
        self.ranks: DataParallelRanks | None = self._make_ranks()
        """Other ranks, if this loop trains on several devices."""
        model.recomputes_blocks = compute.recomputes
        self._told_smaller = told_smaller
        self._ahead = StepQueue(compute.device)
        self.rests: Callable[[], AbstractContextManager[None]] = nullcontext
        """Makes the context of each inner step, which may rest on exit once the device has finished."""
        self.compiled_loss: Callable[[Tensor], Tensor] | None = None
        """Function that computes the loss of a microbatch in place of the model's own; may change between two steps."""
        self._step_times_s: deque[float] = deque(maxlen=_KEPT_TIMES)

    def _make_ranks(self) -> DataParallelRanks | None:
        if not self.compute.others:
            return None
        from swarmtrain.peer.devices.data_parallel import DataParallelRanks  # few peers have several devices

        return DataParallelRanks(self.model, self.inner, self.compute)

    def whole_model(self) -> LanguageModel:
        """Return the model with its present weights, to be measured."""
        return self.model

    @property
    def microbatch_sequences(self) -> int:
        """Sequences computed at once, on each device."""
        return self.compute.microbatch_sequences

    def end(self) -> None:
        """See `InnerLoop.end`; the other ranks end too."""
        self.close()
        super().end()

    def release_cached(self) -> None:
        """Let other programs have the memory of all devices that only steps need."""
        release_cached(self.compute.device)
        if self.ranks is not None:
            self.ranks.release_cached()

    def close(self) -> None:
        """End the other ranks, if there are any; no step follows."""
        if self.ranks is not None:
            self.ranks.close()

    def step(self, progress: float, scale: float, should_stop: Callable[[], bool]) -> InnerStep:
        """See `InnerLoop.step`: one step is one batch.

        Nothing here waits for the device, except that at most two steps are under way there. Raises RunTimeError if
        memory runs out even for microbatches of one sequence whose blocks are computed again in the backward pass.
        """
        began_s = time.perf_counter()
        with self._slowed(), self.rests():
            batch = self.batches.next_batch()
            if self.batch_sequences:
                batch = batch[: self.batch_sequences]
            while (loss := self._differentiate(batch, should_stop)) is None:
                self._use_smaller()
            targets = self.inner.targets = num_targets(batch)
            norm = self._optimize(progress, scale)
            done = InnerStep(targets, loss, norm, read_tokens=inputs_of(batch).numel())
            self._ahead.step_asked()
            if self._slowed is not nullcontext:
                finish(self.compute.device)  # what is made slower is the step, and not the asking for it
        self._step_times_s.append(time.perf_counter() - began_s)
        return done

    def take_step_times(self) -> list[float]:
        """Return the seconds of the last steps since the last call, the newest last.

        On a device, steps are asked for as fast as it takes them, except the first ones after a wait.
        """
        times_s = list(self._step_times_s)
        self._step_times_s.clear()
        return times_s

    def _differentiate(self, batch: Tensor, should_stop: Callable[[], bool]) -> Tensor | None:
        """Set `.grad` to the batch's gradient and return its mean loss (); None, without gradients, if memory ran
        out."""
        loss_of = self.model.loss if self.compiled_loss is None else self.compiled_loss
        if self.ranks is not None:
            return self.ranks.differentiate(batch, loss_of, self.compute, should_stop)
        try:
            loss = add_gradient(loss_of, batch, num_targets(batch), self.compute, self.inner.loss_scale, should_stop)
        except StopTraining:
            self.inner.drop_gradients()
            raise
        if loss is None:
            self.inner.drop_gradients()
        elif not num_targets(batch):
            self.inner.gradients()  # zeros: the step is taken all the same
        return loss

    def _optimize(self, progress: float, scale: float) -> Tensor:
        """Take the optimizer's step and return the gradient's norm (). Raises RunTimeError if its moments, which the
        first step makes, do not fit: no smaller microbatch makes room for them."""
        with enough_memory("making the optimizer's moments", self.compute.device):
            if self.ranks is None or not self.inner.steps_on_each_rank:
                return self.inner.step(progress, scale)
            return self.ranks.optimize(progress, scale)

    def _use_smaller(self) -> None:
        """Halve the microbatches; if they are of one sequence already, compute blocks again in the backward pass.

        Raises RunTimeError if that is done already.
        """
        before = self.compute
        if before.microbatch_sequences > 1:
            now = replace(before, microbatch_sequences=-(-before.microbatch_sequences // 2))
        elif not before.recomputes:
            now = replace(before, recomputes=True)
        else:
            doing = f"training one sequence of {self.run.model.context_tokens} tokens"
            raise does_not_fit(doing, before.device)
        self.compute = now
        self.model.recomputes_blocks = now.recomputes
        release_cached(now.device)
        self._told_smaller(before, now)


def loop_class(compute: ComputeDevice) -> type[ModelLoop]:
    """Return the loop that trains a whole model on the devices of `compute`."""
    if not compute.shards:
        return ModelLoop
    from swarmtrain.peer.devices.sharded_loop import ShardedLoop

    return ShardedLoop

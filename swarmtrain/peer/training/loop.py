"""Training loops: draw batches, run forward and backward, step the optimizer, for as long as the session wants steps.

A loop knows nothing of the swarm. Before each inner step it asks its session how far the run is, and after the step it
reports the tokens that were trained. Everything runs on the trainer's thread. A checkpoint keeps what a loop has
besides its parameters (`session.LoopState`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from swarmtrain.algorithm.inner import InnerConstants, InnerOptimizer, Moments, learning_rate_at, moments_scale
from swarmtrain.data.batches import BatchSource
from swarmtrain.model.gpt import GPT
from swarmtrain.peer.lifecycle.stop import StopTraining
from swarmtrain.peer.training.parameters import HostParameters, ParameterSource
from swarmtrain.peer.training.session import LoopCheckpoint, NextStep, Session
from swarmtrain.run import RunFile

__all__ = ["InnerLoop", "InnerStep", "ModelLoop", "RoundOver", "inner_constants"]


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
    """Result of one inner step: its tokens, their mean loss (nats per token), and the gradient norm before the clip."""

    tokens: int
    loss: float
    grad_norm: float


class RoundOver(Exception):  # noqa: N818 - a signal, not an error
    """Raised by `InnerLoop.step` when no further step will come: the round ends with the steps taken so far."""


class InnerLoop(ABC):
    """Inner steps, one after the other, with AdamW (DiLoCo's inner loop)."""

    def __init__(self, parameters: ParameterSource, batches: BatchSource, constants: InnerConstants) -> None:
        """`batches` may be drawn elsewhere: the loop only chooses their shard, and a checkpoint keeps the position."""
        self.parameters, self.batches = parameters, batches
        self.inner = InnerOptimizer(parameters.named.items(), constants, parameters.take_back)
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
        try:
            done = self.take_step(ahead.progress, session.should_stop)
        except RoundOver:
            session.end_round()
        except StopTraining:
            session.interrupt()
        else:
            learning_rate = learning_rate_at(self.inner.constants, ahead.progress)
            session.step(done.tokens, done.loss, grad_norm=done.grad_norm, learning_rate=learning_rate)

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

    def kept(self, room: Tensor | None) -> LoopCheckpoint:
        """Return the part of the loop's state that a checkpoint keeps. See `LoopState`."""
        moments = self.inner.lend_moments() if room is None else self.inner.copy_moments(room)
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

    def skip(self, num_batches: int) -> None:
        """Skip `num_batches` batches that were trained on before. See `LoopState`."""
        for _ in range(num_batches):
            self.batches.next_batch()

    def weights_replaced(self) -> None:
        """See `LoopState`. A loop that has moments of its own keeps them; otherwise it counts as a late joiner."""
        if not self._has_moments:
            self.young_steps = 0

    def end(self) -> None:
        """Release the optimizer's memory: no step follows. See `LoopState`."""
        self.inner.end()


class ModelLoop(InnerLoop):
    """Loop that trains a whole model on batches of this peer's own data, in microbatches."""

    def __init__(
        self,
        run: RunFile,
        model: GPT,
        batches: BatchSource,
        slowed: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """`slowed` is entered around each inner step, and may sleep on exit (a rehearsal's slower machine,
        `peer/local/slowdown.py`).
        """
        super().__init__(HostParameters(model.named_parameters()), batches, inner_constants(run))
        self.run, self.model, self._slowed = run, model, slowed

    def step(self, progress: float, scale: float, should_stop: Callable[[], bool]) -> InnerStep:
        """See `InnerLoop.step`: one step is one batch."""
        with self._slowed():
            batch = self.batches.next_batch()
            loss_sum = 0.0
            for part in torch.split(batch, self.run.microbatch_sequences):
                # Asked between microbatches: a batch of a large model takes minutes, and Ctrl-C must not wait for it.
                if should_stop():
                    self.inner.drop_gradients()
                    raise StopTraining
                loss = self.model.loss(part) * (len(part) / len(batch))
                loss.backward()  # type: ignore[no-untyped-call]
                loss_sum += float(loss.detach())
            return InnerStep(self.run.tokens_per_step, loss_sum, self.inner.step(progress, scale))

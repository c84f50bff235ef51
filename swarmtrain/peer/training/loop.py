"""The loop that trains: batches, forward, backward and the optimizer, as long as its session wants steps.

It knows nothing of a swarm: before a step it asks the session how far the run is, after it it says how many tokens that
took. What it has besides its parameters, a checkpoint keeps (`session.LoopState`).
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
from swarmtrain.peer.training.session import LoopPart, NextStep, Session
from swarmtrain.run import RunFile

__all__ = ["InnerLoop", "InnerStep", "ModelLoop", "RoundOver", "inner_constants"]


def inner_constants(run: RunFile) -> InnerConstants:
    """What AdamW and its schedule are told in this run."""
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
    """What an inner step was made of: tokens, their mean loss, and the norm of their gradient before the clip."""

    tokens: int
    loss: float
    grad_norm: float


class RoundOver(Exception):  # noqa: N818 - a signal, not an error
    """Raised by `InnerLoop.step` where no further step will come: the round ends with those that it has."""


class InnerLoop(ABC):
    """Inner steps, one after the other, with an AdamW of its own (DiLoCo's inner loop)."""

    def __init__(self, parameters: ParameterSource, batches: BatchSource, constants: InnerConstants) -> None:
        """`batches` may be drawn elsewhere: the loop chooses their shard, and a checkpoint keeps their position."""
        self.parameters, self.batches = parameters, batches
        self.inner = InnerOptimizer(parameters.named.items(), constants, parameters.take_back)
        self.young_steps: int | None = None
        """Steps taken since this peer came late, with empty moments; None when it began with the others."""
        self._has_moments = False

    @abstractmethod
    def step(self, progress: float, scale: float, should_stop: Callable[[], bool]) -> InnerStep:
        """One inner step, when the run has that share of its tokens; `scale` multiplies the learning rate.

        Raises RoundOver where no further step will come, StopTraining, changing no weights, when `should_stop` says so.
        """

    def train(self, session: Session) -> str:
        """Steps until the session wants no more; returns why: "total_tokens" or "interrupted"."""
        while (ahead := session.next_step()) is not None:
            self.train_step(session, ahead)
        return session.reason

    def train_step(self, session: Session, ahead: NextStep) -> None:
        """The step that the session wants next."""
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
        """See `step`. A late joiner's moments are young, and its learning rate is scaled for that."""
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
        """See `LoopState`."""
        return self.inner.waited_s

    def kept(self, room: Tensor | None) -> LoopPart:
        """See `LoopState`."""
        moments = self.inner.lend_moments() if room is None else self.inner.copy_moments(room)
        return LoopPart(batches=self.batches.position, young_steps=self.young_steps, moments=moments)

    def resume(self, part: LoopPart) -> None:
        """See `LoopState`; `batches` must stand where the checkpoint does."""
        if self.batches.position != part.batches:
            raise ValueError(f"the checkpoint stands at batch {part.batches}, the data at {self.batches.position}")
        if not isinstance(part.moments, Moments):
            raise ValueError("moments of a checkpoint that was loaded are needed, not lent ones")
        self.inner.load_moments(part.moments)
        self._has_moments, self.young_steps = True, part.young_steps

    def skip(self, num_batches: int) -> None:
        """See `LoopState`."""
        for _ in range(num_batches):
            self.batches.next_batch()

    def weights_replaced(self) -> None:
        """See `LoopState`: with moments of its own it goes on with those."""
        if not self._has_moments:
            self.young_steps = 0

    def end(self) -> None:
        """See `LoopState`."""
        self.inner.end()


class ModelLoop(InnerLoop):
    """A whole model, on batches of its own data, in microbatches."""

    def __init__(
        self,
        run: RunFile,
        model: GPT,
        batches: BatchSource,
        slowed: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """`slowed` is entered around each inner step; on leaving it, it may wait (`peer/local/slowdown.py`)."""
        super().__init__(HostParameters(model.named_parameters()), batches, inner_constants(run))
        self.run, self.model, self._slowed = run, model, slowed

    def step(self, progress: float, scale: float, should_stop: Callable[[], bool]) -> InnerStep:
        """See `InnerLoop`: one batch."""
        with self._slowed():
            batch = self.batches.next_batch()
            loss_sum = 0.0
            for part in torch.split(batch, self.run.microbatch_sequences):
                if should_stop():
                    self.inner.drop_gradients()
                    raise StopTraining
                loss = self.model.loss(part) * (len(part) / len(batch))
                loss.backward()  # type: ignore[no-untyped-call]
                loss_sum += float(loss.detach())
            return InnerStep(self.run.tokens_per_step, loss_sum, self.inner.step(progress, scale))

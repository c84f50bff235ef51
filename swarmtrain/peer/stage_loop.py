"""A stage's part of the trainer: drivers' microbatches until there is a batch, then an inner step.

What a whole model does with a batch of its own data, a stage does with what drivers ask: `step` takes as long as it
takes until so many tokens are acknowledged.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from swarmtrain.algorithm.inner import InnerOptimizer
from swarmtrain.errors import BadBytesError
from swarmtrain.membership.microbatches import Add, Discard, Due, Forget, Step, Subtract
from swarmtrain.model.stage_work import BadGradientError, StageWork
from swarmtrain.peer.driver import Tail
from swarmtrain.peer.stage_desk import StageDesk, Task
from swarmtrain.peer.stopping import StopTraining
from swarmtrain.peer.trainer import InnerStep

__all__ = ["StageLoop"]

_LOOK_S = 0.2


@dataclass
class StageLoop:
    """Computes what the desk has."""

    desk: StageDesk
    work: StageWork
    inner: InnerOptimizer
    batch_tokens: int
    slowed: Callable[[], AbstractContextManager[None]] = nullcontext
    """Around each piece of work; on leaving it, it may wait."""
    record: Callable[[Task | Due, Any], None] = lambda what, answer: None
    """Told of everything in the order in which it is done, and of what was answered."""

    def step(self, progress: float, scale: float, should_stop: Callable[[], bool]) -> InnerStep:
        """Work until a step is taken. Raises StopTraining when asked to end; nothing is lost by it."""
        while True:
            if should_stop():
                raise StopTraining
            what = self.desk.next()
            if what is None:
                self.desk.wait(_LOOK_S)
                continue
            if isinstance(what, Step):
                self.record(what, None)
                return self._step(what, progress, scale)
            answer = None
            if isinstance(what, Task):
                with self.slowed():
                    answer = self._answer(what)
            else:
                self._correct(what)
            self.record(what, answer)

    def _answer(self, task: Task) -> Any:
        """Compute it, and say so."""
        try:
            answer = self._compute(task)
        except BadGradientError as error:
            self.desk.failed(task, BadBytesError(str(error)))
            return None
        self.desk.done(task, answer)
        return answer

    def _step(self, step: Step, progress: float, scale: float) -> InnerStep:
        self.work.gradients(step.batch, self.batch_tokens / step.tokens)
        grad_norm = self.inner.step(progress, scale)
        self.work.replaced()
        return InnerStep(step.tokens, step.loss, grad_norm)

    def _compute(self, task: Task) -> Any:
        if task.kind == "forward":
            return self.work.forward(task.key, task.payload)
        if task.kind == "backward":
            return self.work.backward(task.key, task.payload, task.work.batch)
        x, targets = task.payload
        result = self.work.tail(task.key, x, targets, task.tokens / self.batch_tokens, task.work.batch)
        return Tail(result.loss, result.gradient)

    def _correct(self, due: Subtract | Add | Discard | Forget) -> None:
        if isinstance(due, Subtract):
            self.work.subtract(due.key, due.batch)
        elif isinstance(due, Add):
            self.work.add(due.key, due.batch)
        elif isinstance(due, Discard):
            self.work.discard(due.batch)
        else:
            self.work.forget(due.key)

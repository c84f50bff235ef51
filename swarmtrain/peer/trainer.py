"""The trainer: inner steps in the caller's thread, an outer step at each round's end.

It touches the network only through the two calls of `Exchange`: "here is my round" and "give me what arrived".
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from swarmtrain.algorithm.inner import InnerConstants, InnerOptimizer, Moments, learning_rate_at, moments_scale
from swarmtrain.algorithm.outer import OuterConstants, OuterState, flatten, momentum_at, outer_step, unflatten_into
from swarmtrain.data.batches import BatchSource
from swarmtrain.errors import RunTimeError
from swarmtrain.membership.progress import Progress
from swarmtrain.model.gpt import GPT
from swarmtrain.peer.stopping import StopTraining
from swarmtrain.run import RunFile

__all__ = [
    "Averaged",
    "Contribution",
    "Exchange",
    "OwnPart",
    "Replaced",
    "RoundReport",
    "Start",
    "StopTraining",
    "Trainer",
    "inner_constants",
]

_MAX_SKIPPED_ROUNDS = 4


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


@dataclass(frozen=True, kw_only=True)
class Contribution:
    """What a round brought: the pseudo-gradient (P,) fp32, and what it took to get it."""

    round: int
    gradient: Tensor
    tokens: int
    inner_steps: int
    base: str  # digest of the roster that led to the weights it starts from, "" before the first


@dataclass(frozen=True, kw_only=True)
class Averaged:
    """The mean pseudo-gradient (P,) of everyone on the roster, with their tokens in the same order."""

    gradient: Tensor
    partners: tuple[str, ...]
    weights: tuple[int, ...]
    signer: str
    roster_sha256: str


@dataclass(frozen=True, kw_only=True)
class Replaced:
    """The swarm's state, taken from another peer in place of a merge: this peer had missed one."""

    state: OuterState
    progress: Progress
    from_peer: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Start:
    """How a round begins: inner steps to take, and the volunteers present, this one included."""

    inner_steps: int
    num_peers: int


@dataclass(frozen=True, kw_only=True)
class OwnPart:
    """What is this peer's alone between two rounds: with the swarm's state, all that going on takes."""

    batches: int  # drawn so far
    own_tokens: int
    young_steps: int | None
    steps_per_s: float
    moments: Moments


@dataclass(frozen=True, kw_only=True)
class RoundReport:
    """What is told of a finished round; seconds, tokens, nats per token."""

    contribution: Contribution
    averaged: Averaged
    progress: Progress
    num_peers: int
    loss: float
    first_loss: float
    learning_rate: float
    seconds: float
    merge_s: float
    stall_s: float
    state: OuterState


class Exchange(Protocol):
    """The network as the trainer sees it. Each method may raise RunTimeError when the peer cannot go on."""

    def start_round(self, progress: Progress, steps_per_s: float) -> Start:
        """How the next round begins."""

    def step_done(self, inner_steps_done: int) -> None:
        """An inner step is done (told to others when they ask); must cost nothing."""

    def publish(self, contribution: Contribution) -> None:
        """Here is my round. Returns at once."""

    def collect(self) -> Averaged | Replaced:
        """Give me what arrived; waits as long as the merge method says. Raises StopTraining when asked to end."""


@dataclass
class Trainer:
    """Trains until the run's tokens are reached or `should_stop` says so."""

    run: RunFile
    model: GPT
    batches: BatchSource
    exchange: Exchange
    report: Callable[[RoundReport], None]
    should_stop: Callable[[], bool] = lambda: False
    slowed: Callable[[], AbstractContextManager[None]] = nullcontext
    """Around each inner step; on leaving it, it may wait (`peer/slowdown.py`)."""
    settled: Callable[[], None] = lambda: None
    """Called when a round has led to a new state, merged or taken from another peer, before it is reported."""
    state: OuterState = field(init=False)
    progress: Progress = field(default_factory=Progress)
    own_tokens: int = 0
    steps_per_s: float = 0.0
    young_steps: int | None = None
    """Steps taken since this peer came late, with empty moments; None when it began with the others."""
    _has_moments: bool = False
    inner: InnerOptimizer = field(init=False)

    def __post_init__(self) -> None:
        theta = flatten(self.model.parameters())
        self.state = OuterState(theta, torch.zeros_like(theta))
        self.constants = inner_constants(self.run)
        self.inner = InnerOptimizer(self.model.named_parameters(), self.constants)

    @property
    def finished(self) -> bool:
        """Whether the run has had all its tokens."""
        return self.progress.run_tokens >= self.run.run.total_tokens

    def train(self) -> str:
        """Rounds until the end; returns why it ended: "total_tokens" or "interrupted"."""
        try:
            while not self.finished:
                self._round()
        except StopTraining:
            return "interrupted"
        return "total_tokens"

    def _round(self) -> None:
        start = self.exchange.start_round(self.progress, self.steps_per_s)
        began_s = time.monotonic()
        unflatten_into(self.state.theta, self.model.parameters())
        losses, learning_rate = self._inner_steps(start)
        steps_end_s = time.monotonic()
        finite = [loss for loss in losses if math.isfinite(loss)]
        if not finite:
            raise RunTimeError("training diverged: no loss of the last round was finite; lower inner.learning_rate")
        self.steps_per_s = len(losses) / max(steps_end_s - began_s, 1e-9)
        contribution = Contribution(
            round=self.progress.round,
            gradient=self.state.theta - flatten(self.model.parameters()),
            tokens=len(losses) * self.run.tokens_per_step,
            inner_steps=len(losses),
            base=self.progress.roster_sha256,
        )
        self.exchange.publish(contribution)
        waiting_s = time.monotonic()
        arrived = self.exchange.collect()
        waited_s = time.monotonic() - waiting_s
        self.own_tokens += contribution.tokens
        if isinstance(arrived, Replaced):
            self.adopt(arrived)
            self.settled()
            return
        self.merge(arrived)
        self.settled()
        self.report(
            RoundReport(
                contribution=contribution,
                averaged=arrived,
                progress=self.progress,
                num_peers=start.num_peers,
                loss=sum(finite) / len(finite),
                first_loss=finite[0],
                learning_rate=learning_rate,
                seconds=time.monotonic() - began_s,
                merge_s=time.monotonic() - steps_end_s,
                stall_s=waited_s,
                state=self.state,
            )
        )

    def _inner_steps(self, start: Start) -> tuple[list[float], float]:
        """`start.inner_steps` AdamW steps; returns each step's loss and the last learning rate."""
        losses: list[float] = []
        total = self.run.run.total_tokens
        progress = 0.0
        for step in range(start.inner_steps):
            if self.should_stop():
                raise StopTraining
            progress = (self.progress.run_tokens + step * start.num_peers * self.run.tokens_per_step) / total
            with self.slowed():
                losses.append(self._step(progress))
            self.exchange.step_done(step + 1)
        return losses, learning_rate_at(self.constants, progress)

    def _step(self, progress: float) -> float:
        """One inner step over one batch, in microbatches; returns its mean loss."""
        batch = self.batches.next_batch()
        size = self.run.inner.microbatch_sequences or len(batch)
        loss_sum = 0.0
        for part in torch.split(batch, size):
            if self.should_stop():
                self.inner.drop_gradients()
                raise StopTraining
            loss = self.model.loss(part) * (len(part) / len(batch))
            loss.backward()  # type: ignore[no-untyped-call]
            loss_sum += float(loss.detach())
        scale = 1.0
        if self.young_steps is not None:
            scale = moments_scale(self.young_steps, self.constants.beta2)
            self.young_steps += 1
        self.inner.step(progress, scale)
        self._has_moments = True
        return loss_sum

    def merge(self, averaged: Averaged) -> None:
        """The outer Nesterov step, and the counters that follow from the roster."""
        section = self.run.merge
        constants = OuterConstants(
            learning_rate=section.outer_learning_rate,
            momentum=momentum_at(self.progress.round, section.outer_momentum, section.momentum_ramp_rounds),
        )
        self.state = outer_step(self.state, averaged.gradient, constants)
        self.progress = self.progress.after(averaged.partners, averaged.weights, averaged.roster_sha256)

    def adopt(self, replaced: Replaced) -> None:
        """Go on from another peer's state; the moments stay, the data position too."""
        self.state, self.progress = replaced.state, replaced.progress
        if not self._has_moments:
            self.young_steps = 0

    def own_part(self, room: Tensor) -> OwnPart:
        """What a checkpoint keeps beside the state; the moments are copied into `room` (2, P) fp32."""
        return OwnPart(
            batches=self.batches.position,
            own_tokens=self.own_tokens,
            young_steps=self.young_steps,
            steps_per_s=self.steps_per_s,
            moments=self.inner.copy_moments(room),
        )

    def resume(self, state: OuterState, progress: Progress, own: OwnPart) -> None:
        """Go on where a checkpoint was taken; `batches` must stand there. Raises ValueError when it does not fit."""
        if self.batches.position != own.batches:
            raise ValueError(f"the checkpoint stands at batch {own.batches}, the data at {self.batches.position}")
        self.inner.load_moments(own.moments)
        self._has_moments = True
        self.state, self.progress = state, progress
        self.own_tokens, self.young_steps, self.steps_per_s = own.own_tokens, own.young_steps, own.steps_per_s

    def skip_merged(self, tokens: int) -> bool:
        """Others have merged `tokens` of this peer's that its checkpoint does not know: their batches are done.

        A kill costs a round at most, so more than a few rounds is an old folder that was put back, or a lie: those
        are not skipped, and the answer is False.
        """
        if not 0 < tokens <= _MAX_SKIPPED_ROUNDS * self.run.merge.inner_steps * self.run.tokens_per_step:
            return False
        for _ in range(tokens // self.run.tokens_per_step):
            self.batches.next_batch()
        self.own_tokens += tokens
        return True

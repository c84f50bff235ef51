"""Session of a peer in a run: counts the steps of a training loop, publishes, merges, and ends rounds.

A loop calls `next_step` before an inner step and `step` after it; it needs to know nothing else of a swarm. The session
sees no model, no data and no optimizer: it reads and writes named parameters, and reaches the network only through
`Exchange`, with `publish` ("here is my round") and `collect` ("give me what arrived").

All calls come from the loop's thread, between two steps. `next_step` may wait for company before the first round, and
in synchronous rounds the last `step` of a round waits for the other peers. Otherwise a publication costs at most a copy
of the parameters, and a merge one outer step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from swarmtrain.algorithm.inner import LentMoments, Moments
from swarmtrain.algorithm.outer import OuterState
from swarmtrain.errors import RunTimeError
from swarmtrain.peer.lifecycle.stop import StopTraining
from swarmtrain.peer.merging.updates import LocalUpdate, OuterUpdate, Replaced
from swarmtrain.peer.training.parameters import ParameterSource
from swarmtrain.peer.training.replica import Replica
from swarmtrain.protocol.gossip.fragments import merged_step, published
from swarmtrain.protocol.tokens.progress import Progress
from swarmtrain.run import GradientFormat, RunFile

__all__ = [
    "Exchange",
    "LocalCheckpoint",
    "LoopCheckpoint",
    "LoopState",
    "NextStep",
    "RoundReport",
    "Session",
    "Start",
    "skippable_tokens",
]

_MAX_SKIPPED_ROUNDS = 4


@dataclass(frozen=True, kw_only=True)
class Start:
    """Plan of a round: the inner steps to take, the volunteers present (this one included), and when to publish and
    merge.
    """

    inner_steps: int
    num_peers: int
    num_parts: int = 1
    """Number of equal parts into which the round is divided; publications are numbered by the part they end."""
    every: int = 1
    """Publish after every n-th part (`protocol.gossip.fragments.published`)."""
    shard: int | None = None
    """Data shard that the round is drawn from; None for all data."""
    run_steps_a_step: float = 0.0
    """Inner steps that all peers together take during one of this peer's; 0 means `num_peers`."""
    num_fragments: int = 1
    """Fragments of the model, merged at equal distances, the last one at the round's end."""
    gradient_format: GradientFormat = "fp32"
    """Format in which the round's pseudo-gradients are published."""
    batch_sequences: int = 0
    """Sequences of each inner step where this peer is too slow for the run's batch; 0: as the run file says."""

    @cached_property
    def publish_after(self) -> Sequence[int]:
        """Inner steps after which the peer publishes, ascending."""
        return list(self._parts)

    @cached_property
    def merge_after(self) -> Sequence[int]:
        """Inner steps after which each fragment is merged; each is also a step with a publication."""
        number = self.num_fragments
        return [merged_step(fragment, number, self.inner_steps, self.num_parts) for fragment in range(number)]

    @cached_property
    def _parts(self) -> Mapping[int, int]:
        return published(self.inner_steps, self.num_parts, self.num_fragments, self.every)

    def part_after(self, inner_steps: int) -> int:
        """Return the part published after `inner_steps` steps; at the round's end it is always `num_parts`."""
        return self._parts[inner_steps]

    def run_tokens(self, before: int, own_steps: float, step_tokens: int) -> float:
        """Estimate the run's tokens after `own_steps` of this round; `before` is the count known at its start."""
        return before + own_steps * ((self.run_steps_a_step or self.num_peers) * step_tokens)


@dataclass(frozen=True, kw_only=True)
class LoopCheckpoint:
    """State of a loop that a checkpoint keeps: the data position and AdamW's moments."""

    batches: int  # drawn so far
    young_steps: int | None
    moments: Moments | LentMoments
    """Lent, not copied, where a copy would be large."""


@dataclass(frozen=True, kw_only=True)
class LocalCheckpoint(LoopCheckpoint):
    """State that belongs to this peer alone between two rounds. With the swarm's state it is enough to continue."""

    own_tokens: int
    steps_per_s: float


@dataclass(frozen=True, kw_only=True)
class RoundReport:
    """Numbers of a finished round, in seconds, tokens and nats per token."""

    contribution: LocalUpdate
    arrived: tuple[OuterUpdate, ...]  # one per fragment, in the order of their merges
    progress: Progress
    num_peers: int
    loss: float
    first_loss: float
    learning_rate: float
    grad_norm: float | None  # mean over the inner steps, before the clip; None if none was finite
    seconds: float
    merge_s: float
    stall_s: float
    state: OuterState


class Exchange(Protocol):
    """Network as a session sees it. Any method may raise RunTimeError when the peer cannot go on."""

    def hold(self, states: Sequence[OuterState]) -> None:
        """Receive each fragment's state before the first round, and again after the weights were taken from others.

        Returns at once.
        """

    def merged(self, fragment: int, state: OuterState) -> None:
        """Receive a fragment's state after its merge. Returns at once."""

    def start_round(self, progress: Progress, steps_per_s: float) -> Start:
        """Return the plan of the next round."""

    def step_done(self, inner_steps_done: int) -> None:
        """Note that an inner step is done, so that others can ask for it. Runs after every step, so it must cost
        nothing.
        """

    def publish(self, contribution: LocalUpdate) -> None:
        """Hand over the round's update so far, for others to pull. Returns at once."""

    def collect(self, fragment: int = 0) -> OuterUpdate | Replaced:
        """Return what arrived for that fragment; wait as long as the merge method says.

        Returns `Replaced` only with the last fragment, at the round's end. Raises StopTraining when asked to end.
        """


class LoopState(Protocol):
    """Loop as its session sees it: what it holds besides the parameters. Called between two steps."""

    @property
    def waited_s(self) -> float:
        """Total seconds that steps have waited for other threads to read what they change."""
        ...

    def kept(self, room: Tensor | None) -> LoopCheckpoint:
        """Return the part of the loop's state that a checkpoint keeps. AdamW's moments are copied into `room` (2, P)
        fp32; without it they are lent until the next step."""
        ...

    def resume(self, part: LoopCheckpoint) -> None:
        """Continue from a `LoopCheckpoint` that `kept` gave. Raises ValueError, changing nothing, if it does not
        fit."""

    def skip(self, num_batches: int) -> None:
        """Skip `num_batches` batches that were trained on before."""

    def weights_replaced(self) -> None:
        """Note that the parameters' values will be those of other peers."""

    def end(self) -> None:
        """Release the optimizer's memory: no step follows."""


@dataclass(frozen=True)
class NextStep:
    """Input of an inner step."""

    progress: float
    """Share of the run's total tokens trained so far, as far as this peer can know; the learning-rate schedule follows
    it.
    """
    shard: int | None = None
    """Data shard to draw from from now on; None to keep the present one. Set at the beginning of a round."""
    batch_sequences: int = 0
    """Sequences of the step; 0: as the run file says."""


@dataclass(kw_only=True)
class _Round:
    """State of the round under way."""

    start: Start
    began_s: float
    waited_s: float
    """`LoopState.waited_s` at the round's start."""
    moments: list[int] = field(default_factory=list)
    """Inner steps after which a publication is still due, ascending."""
    losses: list[float | Tensor] = field(default_factory=list)
    grad_norms: list[float | Tensor] = field(default_factory=list)
    tokens: int = 0
    learning_rate: float = 0.0
    """Learning rate of the last step."""
    updates: list[OuterUpdate] = field(default_factory=list)
    """Updates merged during the round, one per fragment."""
    apart_s: float = 0.0
    """Seconds spent publishing and merging within the round."""

    @property
    def inner_steps(self) -> int:
        """Inner steps taken so far."""
        return len(self.losses)


@dataclass(kw_only=True)
class Session:
    """Part of one peer in a run: rounds of a loop's steps until the run has its tokens or a stop is asked for.

    Between two rounds the session is idle: `next_step` begins a round, and the step that fills the round ends it. A
    stop ends it anywhere; what was trained since the last merges is lost, as in a kill.
    """

    run: RunFile
    parameters: ParameterSource
    loop: LoopState
    exchange: Exchange
    report: Callable[[RoundReport], None]
    should_stop: Callable[[], bool] = lambda: False
    """Return whether training must end, for good or for a pause. A loop may also ask within a step; asking is cheap."""
    on_new_state: Callable[[Session], None] = lambda session: None
    """Called when a round has led to a new state, merged or taken from another peer, before the round is reported."""
    ends: Callable[[Progress], bool] | None = None
    """Return whether nothing is left to train; asked between two rounds. None: when the run has had all its tokens."""
    clock: Callable[[], float] = time.monotonic
    replica: Replica = field(init=False)
    steps_per_s: float = field(default=0.0, init=False)
    """Inner steps of the run's batch per second in the last round, without the time spent publishing and merging."""
    reason: str = field(default="", init=False)
    """Why training ended: "total_tokens" or "interrupted"; empty while it runs."""
    _round: _Round | None = field(default=None, init=False)
    _is_stopped: bool = field(default=False, init=False)
    """True if the session was interrupted and `next_step` has not reported it yet."""

    def __post_init__(self) -> None:
        self.replica = Replica(self.run.merge, self.parameters)

    @property
    def progress(self) -> Progress:
        """Round and token counts of the run as this peer knows them."""
        return self.replica.progress

    @property
    def finished(self) -> bool:
        """True if nothing is left to train."""
        by_count = self.progress.run_tokens >= self.run.run.total_tokens
        return by_count if self.ends is None else self.ends(self.progress)

    @property
    def is_in_round(self) -> bool:
        """True while a round is under way."""
        return self._round is not None

    # ------------------------------------------------------------- the loop's calls

    def next_step(self) -> NextStep | None:
        """Return the input of the next inner step, beginning a round if none is under way; None if training has ended.

        `reason` then says why. A call after that begins anew.
        """
        # The round begins here and not at the end of `step`: a stage whose drivers send nothing more would otherwise
        # announce a round that it never trains (decision 68).
        began, self._is_stopped, was_stopped = self._round is None, False, self._is_stopped
        if was_stopped:
            return None
        try:
            if self._round is None:
                if self.finished:
                    self.reason = "total_tokens"
                    return None
                self._round = self._begin()
            if self.should_stop():
                raise StopTraining
        except StopTraining:
            self.interrupt()
            self._is_stopped = False
            return None
        start, step_tokens = self._round.start, self.run.tokens_per_step
        before, steps = self.replica.progress.run_tokens, self._round.tokens / step_tokens
        progress = start.run_tokens(before, steps, step_tokens) / self.run.run.total_tokens
        return NextStep(progress, start.shard if began else None, start.batch_sequences)

    def step(
        self,
        tokens: int,
        loss: float | Tensor,
        *,
        grad_norm: float | Tensor = math.nan,
        learning_rate: float = 0.0,
    ) -> None:
        """Count an inner step over `tokens` tokens of mean `loss`; publish, merge or end the round if that is due.

        `loss` and `grad_norm` may be scalars () on a device, which are read once a round. `grad_norm` and
        `learning_rate`, if known, are reported with the round. Raises RuntimeError if `next_step` was
        not called, and RunTimeError when the peer cannot go on.
        """
        round = self._under_way()
        round.losses.append(loss)
        round.grad_norms.append(grad_norm)
        round.learning_rate = learning_rate
        round.tokens += tokens
        start, step_tokens = round.start, self._step_tokens(round.start)
        num_steps, part, full = min(round.tokens // step_tokens, start.inner_steps), 0, start.inner_steps * step_tokens
        while len(round.moments) > 1 and round.moments[0] <= num_steps:
            part = start.part_after(round.moments.pop(0))
        try:
            self.exchange.step_done(num_steps)
            if round.tokens >= full:
                self._end(round)
            elif part:
                began_s = self.clock()
                self._merge_due(round, num_steps, self._publish(round, part))
                round.apart_s += self.clock() - began_s
        except StopTraining:
            self.interrupt()

    def end_round(self) -> None:
        """End the round with the steps taken so far; without any, end training. No further step will come."""
        round = self._under_way()
        try:
            if not round.losses:
                raise StopTraining
            self._end(round)
        except StopTraining:
            self.interrupt()

    def interrupt(self) -> None:
        """Give up the step under way and end training, because a stop was asked for."""
        self.replica.restart()
        self._round, self._is_stopped, self.reason = None, True, "interrupted"

    def _step_tokens(self, start: Start) -> int:
        """Return the tokens of each inner step of a round."""
        sequences = start.batch_sequences or self.run.inner.batch_sequences
        return sequences * self.run.model.context_tokens

    def _under_way(self) -> _Round:
        if self._round is None:
            raise RuntimeError("no step is under way: ask `next_step` before each")
        return self._round

    # ------------------------------------------------------------- a round

    def _begin(self) -> _Round:
        replica, self.reason = self.replica, ""
        if not replica.is_entered:
            self.exchange.hold(replica.states)
        start = self.exchange.start_round(replica.progress, self.steps_per_s)
        round = _Round(
            start=start, began_s=self.clock(), waited_s=self.loop.waited_s, moments=list(start.publish_after)
        )
        replica.begin(start.num_parts)
        return round

    def _publish(self, round: _Round, part: int) -> LocalUpdate:
        """Publish the round's update so far."""
        contribution = self.replica.contribution(part, round.inner_steps, round.tokens)
        self.exchange.publish(contribution)
        return contribution

    def _merge_due(self, round: _Round, num_steps: int, own: LocalUpdate) -> None:
        """Merge the fragments due after `num_steps` steps and not merged yet, except the last one."""
        for fragment in range(len(round.updates), len(self.replica.fragments) - 1):
            if round.start.merge_after[fragment] > num_steps:
                break
            arrived = self.exchange.collect(fragment)
            assert not isinstance(arrived, Replaced)
            self._merge(arrived, own, fragment)
            round.updates.append(arrived.kept())

    def _merge(self, arrived: OuterUpdate, own: LocalUpdate, fragment: int) -> None:
        self.replica.merge(arrived, own, fragment)
        if not arrived.is_whole:
            self.exchange.merged(fragment, self.replica.state_of(fragment))

    def _end(self, round: _Round) -> None:
        """Publish the whole round, merge what remains, and report."""
        finite = [loss for loss in _read(round.losses) if math.isfinite(loss)]
        norms = [norm for norm in _read(round.grad_norms) if math.isfinite(norm)]
        # After the losses were read, which a device has once it has taken the steps.
        replica, steps_end_s, last = self.replica, self.clock(), len(self.replica.fragments) - 1
        self._round = None
        if not finite:
            raise RunTimeError(
                "training diverged: no loss of the last round was finite; lower inner.learning_rate",
                code="training-diverged",
            )
        num_steps = round.tokens / self.run.tokens_per_step  # a stage's steps vary in size
        self.steps_per_s = num_steps / max(steps_end_s - round.began_s - round.apart_s, 1e-9)
        own = self._publish(round, round.start.num_parts)
        self._merge_due(round, round.start.inner_steps, own)
        arrived = self.exchange.collect(last)
        replica.own_tokens += own.tokens
        if isinstance(arrived, Replaced):
            self.adopt(arrived)
            self.on_new_state(self)
            return
        self._merge(arrived, own, last)
        merged_s = self.clock()
        self.on_new_state(self)
        self.report(
            RoundReport(
                contribution=own,
                arrived=(*round.updates, arrived),
                progress=replica.progress,
                num_peers=round.start.num_peers,
                loss=sum(finite) / len(finite),
                first_loss=finite[0],
                learning_rate=round.learning_rate,
                grad_norm=sum(norms) / len(norms) if norms else None,
                seconds=self.clock() - round.began_s,
                merge_s=merged_s - steps_end_s,
                stall_s=merged_s - steps_end_s + round.apart_s + self.loop.waited_s - round.waited_s,
                state=replica.state,
            )
        )

    # ------------------------------------------------------------- before, between and after

    def adopt(self, replaced: Replaced) -> None:
        """Continue from another peer's state; AdamW's moments and the data position stay."""
        self.replica.adopt(replaced)
        self.loop.weights_replaced()

    def local_checkpoint(self, room: Tensor | None) -> LocalCheckpoint:
        """Return this peer's own part of a checkpoint, beside the swarm's state; see `LoopState.kept` for `room`."""
        part = self.loop.kept(room)
        return LocalCheckpoint(
            batches=part.batches,
            young_steps=part.young_steps,
            moments=part.moments,
            own_tokens=self.replica.own_tokens,
            steps_per_s=self.steps_per_s,
        )

    def resume(self, state: OuterState, progress: Progress, own: LocalCheckpoint) -> None:
        """Continue from a checkpoint. Raises ValueError if it does not fit the loop."""
        self.loop.resume(own)
        self.replica.resume(state, progress, own.own_tokens)
        self.steps_per_s = own.steps_per_s

    def skip_merged(self, tokens: int) -> bool:
        """Skip the batches of `tokens` tokens that others have merged of this peer's and that its checkpoint does not
        know.

        Returns False, skipping nothing, if there are too many of them (see `skippable_tokens`).
        """
        skipped = skippable_tokens(tokens, self.run.round_tokens)
        if skipped:
            self.loop.skip(skipped // self.run.tokens_per_step)
            self.replica.own_tokens += skipped
        return skipped > 0

    def end(self) -> None:
        """Release what training holds; no step follows. The parameters' values may be replaced afterwards."""
        self.parameters.take_back()
        self.loop.end()


def _read(numbers: Sequence[float | Tensor]) -> list[float]:
    """Return the numbers, reading those that are on a device all at once."""
    scalars = [each for each in numbers if isinstance(each, Tensor)]
    values = iter(torch.stack(scalars).tolist() if scalars else ())
    return [next(values) if isinstance(each, Tensor) else each for each in numbers]


def skippable_tokens(merged: int, round_tokens: int) -> int:
    """Return how many of a peer's `merged` tokens, missing in its checkpoint, it may skip: all of them or 0.

    A kill costs one round at most. More than a few rounds means an old folder that was put back, or a lie; those are
    not skipped.
    """
    return merged if 0 < merged <= _MAX_SKIPPED_ROUNDS * round_tokens else 0

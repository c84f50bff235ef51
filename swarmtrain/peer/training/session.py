"""A peer's session in a run: it counts the steps of a loop that trains, publishes, merges and ends rounds.

A loop asks `next_step` before an inner step and tells `step` after it; that is all it needs to know of a swarm. The
session sees no model, no data and no optimizer: it reads and writes named parameters, and touches the network only
through `Exchange`: "here is my round" and "give me what arrived".

All calls come from the loop's thread, between two steps. `next_step` may wait for company before the first round, and
where rounds are synchronous a round's last `step` waits for the others; else a publication costs a copy of the
parameters at most, a merge one outer step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

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
    "LoopPart",
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
    """How a round begins: inner steps to take, and the volunteers present, this one included."""

    inner_steps: int
    num_peers: int
    num_parts: int = 1
    """Into so many parts a round is divided, by whose numbers publications are known;"""
    every: int = 1
    """it publishes with each so-many-th (`protocol.gossip.fragments.published`)."""
    shard: int | None = None
    """Of the data, from which the round is drawn; None for everywhere."""
    run_steps_a_step: float = 0.0
    """Inner steps of everybody together in the time of one of this peer's; 0: `num_peers`."""
    num_fragments: int = 1
    """Of the model, which are merged at equal distances, the last one at the round's end."""
    gradient_format: GradientFormat = "fp32"
    """Of the pseudo-gradients that it publishes."""

    @cached_property
    def publish_after(self) -> Sequence[int]:
        """The inner steps after which it publishes."""
        return list(self._parts)

    @cached_property
    def merge_after(self) -> Sequence[int]:
        """The inner steps after which each fragment is merged: each a moment of a publication."""
        number = self.num_fragments
        return [merged_step(fragment, number, self.inner_steps, self.num_parts) for fragment in range(number)]

    @cached_property
    def _parts(self) -> Mapping[int, int]:
        return published(self.inner_steps, self.num_parts, self.num_fragments, self.every)

    def part_after(self, inner_steps: int) -> int:
        """The part with which it publishes after so many inner steps; the last one's is always `num_parts`."""
        return self._parts[inner_steps]

    def run_tokens(self, before: int, own_steps: float, step_tokens: int) -> float:
        """How many tokens the run has when this peer has taken so many steps of the round, as far as it can know:
        `before` is what it knew at the round's start."""
        return before + own_steps * ((self.run_steps_a_step or self.num_peers) * step_tokens)


@dataclass(frozen=True, kw_only=True)
class LoopPart:
    """What a checkpoint keeps of a loop."""

    batches: int  # drawn so far
    young_steps: int | None
    moments: Moments | LentMoments
    """Lent ones where a copy would be large."""


@dataclass(frozen=True, kw_only=True)
class LocalCheckpoint(LoopPart):
    """What is this peer's alone between two rounds: with the swarm's state, all that going on takes."""

    own_tokens: int
    steps_per_s: float


@dataclass(frozen=True, kw_only=True)
class RoundReport:
    """What is told of a finished round; seconds, tokens, nats per token."""

    contribution: LocalUpdate
    arrived: tuple[OuterUpdate, ...]  # of each fragment, in the order of their merges
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
    """The network as a session sees it. Each method may raise RunTimeError when the peer cannot go on."""

    def hold(self, states: Sequence[OuterState]) -> None:
        """Each fragment's state, with which the first round begins, and one after the weights were taken from others.
        Returns at once."""

    def merged(self, fragment: int, state: OuterState) -> None:
        """A fragment's state after its merge with what was gathered. Returns at once."""

    def start_round(self, progress: Progress, steps_per_s: float) -> Start:
        """How the next round begins."""

    def step_done(self, inner_steps_done: int) -> None:
        """An inner step is done (told to others when they ask); must cost nothing."""

    def publish(self, contribution: LocalUpdate) -> None:
        """Here is my round, or what there is of it. Returns at once."""

    def collect(self, fragment: int = 0) -> OuterUpdate | Replaced:
        """Give me what arrived for that fragment; waits as long as the merge method says. `Replaced` only with the last
        fragment, at the round's end. Raises StopTraining when asked to end."""


class LoopState(Protocol):
    """The loop as its session sees it: what it has besides the parameters. Called between two steps."""

    @property
    def waited_s(self) -> float:
        """How long its steps have waited, in all, for others to read what they change."""
        ...

    def kept(self, room: Tensor | None) -> LoopPart:
        """What a checkpoint keeps of it. AdamW's moments are copied into `room` (2, P) fp32, or lent until the next
        step where there is none."""
        ...

    def resume(self, part: LoopPart) -> None:
        """Go on from what `kept` gave. Raises ValueError, changing nothing, when it does not fit."""

    def skip(self, num_batches: int) -> None:
        """Pass over so many batches: they were trained on before."""

    def weights_replaced(self) -> None:
        """The parameters' values will be those of other peers."""

    def end(self) -> None:
        """No step follows: what the optimizer holds may go."""


@dataclass(frozen=True)
class NextStep:
    """What an inner step goes by."""

    progress: float
    """The run's tokens over all that it is to have, as far as this peer can know: for the schedule."""
    shard: int | None = None
    """Of the data, from which it is drawn from now on; None: as before. It is told as a round begins."""


@dataclass(kw_only=True)
class _Round:
    """The round under way."""

    start: Start
    began_s: float
    waited_s: float
    """What the loop had waited by then."""
    moments: list[int] = field(default_factory=list)
    """The steps after which something is still to be published."""
    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    tokens: int = 0
    learning_rate: float = 0.0
    """Of the last step."""
    updates: list[OuterUpdate] = field(default_factory=list)
    """What was merged meanwhile."""
    apart_s: float = 0.0
    """What publishing and merging within it took."""

    @property
    def inner_steps(self) -> int:
        """Taken so far."""
        return len(self.losses)


@dataclass(kw_only=True)
class Session:
    """One peer's part in a run: rounds of a loop's steps until the run has its tokens, or it is asked to stop.

    Between two rounds it is idle; `next_step` begins a round, and the step that fills the round ends it. Being asked to
    stop ends it anywhere: what was trained since the last merges is given up, as by a kill.
    """

    run: RunFile
    parameters: ParameterSource
    loop: LoopState
    exchange: Exchange
    report: Callable[[RoundReport], None]
    should_stop: Callable[[], bool] = lambda: False
    """Whether training is to end, for good or for a pause. A loop may ask it within a step too, which costs nothing."""
    settled: Callable[[Session], None] = lambda session: None
    """Called when a round has led to a new state, merged or taken from another peer, before it is reported."""
    ends: Callable[[Progress], bool] | None = None
    """Whether nothing is left to train on; asked between two rounds. None: when the run has had all its tokens."""
    clock: Callable[[], float] = time.monotonic
    replica: Replica = field(init=False)
    steps_per_s: float = field(default=0.0, init=False)
    """In the last round, without the time in which it published and merged."""
    reason: str = field(default="", init=False)
    """Why training ended: "total_tokens" or "interrupted"; empty while it goes on."""
    _round: _Round | None = field(default=None, init=False)
    _is_stopped: bool = field(default=False, init=False)
    """It was interrupted, and `next_step` has not said so yet."""

    def __post_init__(self) -> None:
        self.replica = Replica(self.run.merge, self.parameters)

    @property
    def progress(self) -> Progress:
        """How far the run is, as this peer counts."""
        return self.replica.progress

    @property
    def finished(self) -> bool:
        """Whether nothing is left to train on."""
        by_count = self.progress.run_tokens >= self.run.run.total_tokens
        return by_count if self.ends is None else self.ends(self.progress)

    @property
    def is_in_round(self) -> bool:
        """Whether a round is under way."""
        return self._round is not None

    # ------------------------------------------------------------- the loop's calls

    def next_step(self) -> NextStep | None:
        """What the next inner step goes by; begins a round if none is under way. None when training has ended: `reason`
        says why. Asked again after an interruption, it begins anew."""
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
        return NextStep(progress, start.shard if began else None)

    def step(self, tokens: int, loss: float, *, grad_norm: float = math.nan, learning_rate: float = 0.0) -> None:
        """An inner step over so many tokens was taken, of mean `loss`: publish, merge or end the round if that is due.
        `grad_norm` and `learning_rate` are reported with the round, if they are known.

        Raises RuntimeError where `next_step` asked for none, and RunTimeError when the peer cannot go on.
        """
        round = self._under_way()
        round.losses.append(loss)
        round.grad_norms.append(grad_norm)
        round.learning_rate = learning_rate
        round.tokens += tokens
        start, full = round.start, round.start.inner_steps * self.run.tokens_per_step
        num_steps, part = min(round.tokens // self.run.tokens_per_step, start.inner_steps), 0
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
        """No further step will come: the round ends with those that it has, and training without any."""
        round = self._under_way()
        try:
            if not round.losses:
                raise StopTraining
            self._end(round)
        except StopTraining:
            self.interrupt()

    def interrupt(self) -> None:
        """The step was given up, since this peer is asked to stop: training ends."""
        self.replica.restart()
        self._round, self._is_stopped, self.reason = None, True, "interrupted"

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
        """Hand over what the round has brought so far."""
        contribution = self.replica.contribution(part, round.inner_steps, round.tokens)
        self.exchange.publish(contribution)
        return contribution

    def _merge_due(self, round: _Round, num_steps: int, own: LocalUpdate) -> None:
        """Merge the fragments that are due after so many steps, but for those merged before and the last one."""
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
        """Publish the whole round, merge what is left to be merged, and report."""
        replica, steps_end_s, last = self.replica, self.clock(), len(self.replica.fragments) - 1
        self._round = None
        finite = [loss for loss in round.losses if math.isfinite(loss)]
        norms = [norm for norm in round.grad_norms if math.isfinite(norm)]
        if not finite:
            raise RunTimeError(
                "training diverged: no loss of the last round was finite; lower inner.learning_rate",
                code="training-diverged",
            )
        num_steps = round.tokens / self.run.tokens_per_step  # a stage's steps are not all of one size
        self.steps_per_s = num_steps / max(steps_end_s - round.began_s - round.apart_s, 1e-9)
        own = self._publish(round, round.start.num_parts)
        self._merge_due(round, round.start.inner_steps, own)
        arrived = self.exchange.collect(last)
        replica.own_tokens += own.tokens
        if isinstance(arrived, Replaced):
            self.adopt(arrived)
            self.settled(self)
            return
        self._merge(arrived, own, last)
        merged_s = self.clock()
        self.settled(self)
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
        """Go on from another peer's state; the moments stay, the data position too."""
        self.replica.adopt(replaced)
        self.loop.weights_replaced()

    def own_part(self, room: Tensor | None) -> LocalCheckpoint:
        """What a checkpoint keeps beside the state; see `LoopState.kept`."""
        part = self.loop.kept(room)
        return LocalCheckpoint(
            batches=part.batches,
            young_steps=part.young_steps,
            moments=part.moments,
            own_tokens=self.replica.own_tokens,
            steps_per_s=self.steps_per_s,
        )

    def resume(self, state: OuterState, progress: Progress, own: LocalCheckpoint) -> None:
        """Go on where a checkpoint was taken. Raises ValueError when it does not fit the loop."""
        self.loop.resume(own)
        self.replica.resume(state, progress, own.own_tokens)
        self.steps_per_s = own.steps_per_s

    def skip_merged(self, tokens: int) -> bool:
        """Others have merged `tokens` of this peer's that its checkpoint does not know: their batches are done. Whether
        these are so few that they are skipped, see `skippable_tokens`."""
        skipped = skippable_tokens(tokens, self.run.round_tokens)
        if skipped:
            self.loop.skip(skipped // self.run.tokens_per_step)
            self.replica.own_tokens += skipped
        return skipped > 0

    def end(self) -> None:
        """No step follows: the parameters' values may be replaced, and what the optimizer holds goes."""
        self.parameters.take_back()
        self.loop.end()


def skippable_tokens(merged: int, round_tokens: int) -> int:
    """Of tokens that others have merged of a peer's, and its checkpoint does not know.

    A kill costs a round at most, so more than a few rounds is an old folder that was put back, or a lie: those are not
    skipped.
    """
    return merged if 0 < merged <= _MAX_SKIPPED_ROUNDS * round_tokens else 0

"""Session of a peer in a run: counts the steps of a training loop, publishes, merges, and ends rounds.

A loop calls `next_step` before an inner step and `step` after it; it needs to know nothing else of a swarm. The session
sees no model, no data and no optimizer: it reads and writes named parameters, and reaches the network only through
`Exchange`, with `publish` ("here is my round") and `collect` ("give me what arrived").

All calls come from the loop's thread, between two steps. `next_step` may wait for company before the first round, and
in synchronous rounds the last `step` of a round waits for the other peers. Otherwise a publication costs at most a copy
of the parameters, and a merge one outer step.

With a `worker`, for parameters on a device, the trainer does not wait for merges either. The worker collects and
computes the outer step while the trainer takes the next steps; what it has computed enters between two of them. Steps
taken meanwhile stay in the parameters and belong to what begins with that merge: to the next round, and to no other.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from swarmtrain.algorithm.inner import LentMoments, Moments
from swarmtrain.algorithm.outer import OuterState
from swarmtrain.errors import RunTimeError
from swarmtrain.methods.method import GradientFormat
from swarmtrain.peer.lifecycle.stop import StopTraining
from swarmtrain.peer.merging.updates import LocalUpdate, OuterUpdate, Replaced
from swarmtrain.peer.training.parameters import ParameterSource
from swarmtrain.peer.training.replica import MergedFragment, Replica
from swarmtrain.protocol.gossip.fragments import merged_step, published
from swarmtrain.protocol.tokens.progress import Progress
from swarmtrain.run import RunFile

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
    is_over: Callable[[int], bool] = lambda tokens: False
    """Return whether the round ends with the steps taken so far, which have read so many `tokens`; asked after each."""

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

        While the end of a round is merged beside the next steps, the number goes on beyond that round's steps.
        """

    def publish(self, contribution: LocalUpdate) -> None:
        """Hand over the round's update so far, for others to pull. Returns at once."""

    def collect(self, fragment: int = 0) -> OuterUpdate | Replaced:
        """Return what arrived for that fragment; wait as long as the merge method says.

        Returns `Replaced` only with the last fragment, at the round's end. Raises StopTraining when asked to end. It
        runs in the session's `worker`, if there is one.
        """


MergeOutcome: TypeAlias = tuple[LocalUpdate, MergedFragment | Replaced]
"""Own publication, and what its merge led to."""


class PendingMerge(Protocol):
    """Merge under way, such as a `Future`."""

    def done(self) -> bool:
        """Return whether `result` returns at once."""
        ...

    def result(self) -> MergeOutcome:
        """Wait for the merge, and return what it led to or raise its error."""
        ...


Worker: TypeAlias = Callable[[Callable[[], MergeOutcome]], PendingMerge]
"""Runs functions one after the other, such as `ThreadPoolExecutor(1).submit`."""


class LoopState(Protocol):
    """Loop as its session sees it: what it holds besides the parameters. Called between two steps."""

    @property
    def waited_s(self) -> float:
        """Total seconds that steps have waited for other threads to read what they change."""
        ...

    @property
    def position(self) -> int:
        """Number of batches drawn so far."""
        ...

    def kept(self, room: Tensor | None) -> LoopCheckpoint:
        """Return the part of the loop's state that a checkpoint keeps. AdamW's moments are copied into `room` (2, P)
        fp32; without it, and on a device, they are lent until the next step."""
        ...

    def resume(self, part: LoopCheckpoint) -> None:
        """Continue from a `LoopCheckpoint` that `kept` gave. Raises ValueError, changing nothing, if it does not
        fit."""

    def skip(self, tokens: int) -> None:
        """Skip the batches of `tokens` tokens that were trained on before."""

    def weights_replaced(self) -> None:
        """Note that the parameters' values will be those of other peers."""

    def begin_round(self) -> None:
        """Note that a round begins without a step: what was added up in one that was given up is dropped."""

    def mean_gradient(self) -> tuple[Tensor, int]:
        """Return the mean gradient (P,) fp32 of the steps since the last call, in main memory, and its targets, at
        least 1: those of steps whose gradients were not finite do not count. Only of a loop whose steps leave the
        weights as they are (`MergeMethod.common_step`)."""
        ...

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
class _Steps:
    """Inner steps that were taken."""

    number: int = 0
    """Inner steps taken so far."""
    losses: list[float | Tensor] = field(default_factory=list)
    """Mean loss of each step that had a target."""
    weights: list[int] = field(default_factory=list)
    """How much each of these losses counts: its targets, or 1 as long as all tokens are targets."""
    grad_norms: list[float | Tensor] = field(default_factory=list)
    tokens: int = 0
    """Targets: what the steps count for, in a merge and in the run's tokens."""
    read_tokens: int = 0
    """All tokens that were read: what the steps cost, by which a round is planned."""
    learning_rate: float = 0.0
    """Learning rate of the last step."""

    def add(
        self, tokens: int, read_tokens: int, loss: float | Tensor, grad_norm: float | Tensor, learning_rate: float
    ) -> None:
        """Add a step."""
        self.number += 1
        if tokens:
            self.losses.append(loss)
            self.weights.append(1 if tokens == read_tokens else tokens)
        self.grad_norms.append(grad_norm)
        self.tokens += tokens
        self.read_tokens += read_tokens
        self.learning_rate = learning_rate

    def finite_losses(self) -> tuple[list[float], list[int]]:
        """Return the finite ones of the losses, reading them from a device, and how much each counts."""
        pairs = zip(_read(self.losses), self.weights, strict=True)
        finite = [(loss, weight) for loss, weight in pairs if math.isfinite(loss)]
        return [loss for loss, _ in finite], [weight for _, weight in finite]


@dataclass(frozen=True, kw_only=True)
class _RoundEnd:
    """State of a round when its last step is done."""

    losses: Sequence[float]
    """Finite ones only; so with the norms."""
    weights: Sequence[int]
    """How much each loss counts."""
    grad_norms: Sequence[float]
    ended_s: float
    position: int | None
    """`LoopState.position` then; None without a worker, since no step is taken before the end is merged."""

    @property
    def loss(self) -> float:
        """Mean loss of the round's steps."""
        return sum(loss * weight for loss, weight in zip(self.losses, self.weights, strict=True)) / sum(self.weights)


@dataclass(kw_only=True)
class _Round:
    """State of the round under way, or of the last one while its end is merged."""

    start: Start
    began_s: float
    waited_s: float
    """`LoopState.waited_s` at the round's start."""
    steps: _Steps
    moments: list[int] = field(default_factory=list)
    """Inner steps after which a publication is still due, ascending."""
    updates: list[OuterUpdate] = field(default_factory=list)
    """Updates merged during the round, one per fragment."""
    apart_s: float = 0.0
    """Seconds spent publishing and merging within the round."""
    end: _RoundEnd | None = None


@dataclass(kw_only=True)
class _Merging:
    """Merges of one publication, one fragment after the other."""

    round: _Round
    own: Callable[[], LocalUpdate]
    """Returns the publication. It is called by the worker."""
    fragments: list[int]
    """Fragments that are not merged yet."""
    began_s: float
    pending: PendingMerge | None = None
    """Merge of the first of `fragments`, once it was handed to the worker."""
    left_s: float | None = None
    """Time at which the trainer left for the next steps; None while it is here."""
    away_s: float = 0.0
    """Seconds that the trainer was away for steps."""


@dataclass(frozen=True)
class _OwnMerge:
    """Merge that the trainer computes itself."""

    result: Callable[[], MergeOutcome]

    def done(self) -> bool:
        return True


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
    groups_of_round: Callable[[int], frozenset[int]] | None = None
    """Map a round to the groups of an adapter that this peer trains in it; None: everything in every round."""
    worker: Worker | None = None
    """Computes merges while the trainer takes steps; None: the trainer waits for them. It takes parameters on a device
    (`loans_outlast_steps`), and an exchange that does not wait for company (`merges_beside_training`)."""
    clock: Callable[[], float] = time.monotonic
    replica: Replica = field(init=False)
    steps_per_s: float = field(default=0.0, init=False)
    """Inner steps of the run's batch per second in the last round, without the time spent publishing and merging."""
    reason: str = field(default="", init=False)
    """Why training ended: "total_tokens" or "interrupted"; empty while it runs."""
    _num_tokens: int = field(default=0, init=False)
    """Targets of all steps since the process began, and all tokens that they read."""
    _num_read_tokens: int = field(default=0, init=False)
    _round: _Round | None = field(default=None, init=False)
    _merging: _Merging | None = field(default=None, init=False)
    """Merges under way: within `_round`, or at the end of the round before if there is none."""
    _ahead: _Steps = field(default_factory=_Steps, init=False)
    """Steps taken while the end of a round is merged. They belong to the next one."""
    _ahead_s: float = field(default=0.0, init=False)
    """Seconds that those steps took."""
    _shard: int | None = field(default=None, init=False)
    """Shard that the loop was not told yet."""
    _position: int | None = field(default=None, init=False)
    """Batches drawn before the steps taken ahead, while a new state is told."""
    _is_stopped: bool = field(default=False, init=False)
    """True if the session was interrupted and `next_step` has not reported it yet."""
    _trained: frozenset[int] | None = field(default=None, init=False)
    """Groups of an adapter that the parameters are set to train."""

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
    def learnt_share(self) -> float:
        """Share of the tokens read since the process began that were targets; of data that have other tokens too, 0
        before the first step, when it is not known."""
        if not self._num_read_tokens:
            return float(self.run.batch_rows == 1)
        return self._num_tokens / self._num_read_tokens

    @property
    def is_in_round(self) -> bool:
        """True while a round is under way."""
        return self._round is not None

    # ------------------------------------------------------------- the loop's calls

    def next_step(self) -> NextStep | None:
        """Return the input of the next inner step, beginning a round if none is under way; None if training has ended.

        `reason` then says why. A call after that begins anew. Raises the error that has ended the worker's merge.
        """
        # The round begins here and not at the end of `step`: a stage whose drivers send nothing more would otherwise
        # announce a round that it never trains (decision 68).
        self._is_stopped, was_stopped = False, self._is_stopped
        if was_stopped:
            return None
        try:
            self._enter_merged()
            while (round := self._round or self._round_to_go_beyond()) is None:
                if self.finished:
                    self._ahead, self.reason = _Steps(), "total_tokens"
                    return None
                self._begin()
            if self.should_stop():
                raise StopTraining
        except StopTraining:
            self.interrupt()
            self._is_stopped = False
            return None
        self._set_trained(self.progress.round + (round.end is not None))
        shard, self._shard = self._shard, None
        return NextStep(self._run_share(round), shard, round.start.batch_sequences)

    def step(
        self,
        tokens: int,
        loss: float | Tensor,
        *,
        grad_norm: float | Tensor = math.nan,
        learning_rate: float = 0.0,
        read_tokens: int | None = None,
    ) -> None:
        """Count an inner step over `tokens` targets of mean `loss`; publish, merge or end the round if that is due.

        `read_tokens` are all tokens that it read, if those are more. A round is planned in them, since they are what a
        step costs; what it counts for are its targets. `loss` and `grad_norm` may be scalars () on a device, which are
        read once a round. `grad_norm` and `learning_rate`, if known, are reported with the round. Raises RuntimeError
        if `next_step` was not called, and RunTimeError when the peer cannot go on.
        """
        read = tokens if read_tokens is None else read_tokens
        self._num_tokens, self._num_read_tokens = self._num_tokens + tokens, self._num_read_tokens + read
        if (ended := self._ended_round) is not None:
            self._ahead.add(tokens, read, loss, grad_norm, learning_rate)
            num_ahead = self._ahead.read_tokens // self._step_tokens(ended.start)
            self.exchange.step_done(ended.start.inner_steps + num_ahead)
            return
        round = self._under_way()
        round.steps.add(tokens, read, loss, grad_norm, learning_rate)
        try:
            self.exchange.step_done(self._full_steps(round))
            self._do_what_is_due(round)
        except StopTraining:
            self.interrupt()

    def end_round(self) -> None:
        """End the round with the steps taken so far; without any, end training. No further step will come."""
        try:
            if self._ended_round is not None:
                self._wait_for_merges()
                if not self._ahead.number:
                    raise StopTraining
                self._begin()
                if self._round is None:
                    return  # the steps have filled it
            round = self._under_way()
            if not round.steps.number:
                raise StopTraining
            self._end(round)
        except StopTraining:
            self.interrupt()

    def interrupt(self) -> None:
        """Give up the step under way and end training, because a stop was asked for.

        Merges under way are finished first, since what they merge counts as merged. Raises what goes wrong with them.
        """
        try:
            self._wait_for_merges()
        except StopTraining:
            pass  # the exchange was waiting for others
        finally:
            self.replica.restart()
            self._round = self._merging = self._shard = None
            self._ahead, self._ahead_s = _Steps(), 0.0
            self._is_stopped, self.reason = True, "interrupted"

    def _groups_of(self, round: int) -> frozenset[int] | None:
        return None if self.groups_of_round is None else self.groups_of_round(round)

    def _set_trained(self, round: int) -> None:
        """Have the next step train the groups of this round. Steps ahead of a round train its groups already."""
        groups = self._groups_of(round)
        if groups is not None and groups != self._trained:
            self.parameters.train_only(groups)
            self._trained = groups

    def _step_tokens(self, start: Start) -> int:
        """Return the tokens that each inner step of a round reads."""
        sequences = start.batch_sequences or self.run.inner.batch_sequences
        return sequences * self.run.model.context_tokens

    def _full_steps(self, round: _Round) -> int:
        """Return how many of its inner steps a round's tokens make."""
        return min(round.steps.read_tokens // self._step_tokens(round.start), round.start.inner_steps)

    def _under_way(self) -> _Round:
        if self._round is None:
            raise RuntimeError("no step is under way: ask `next_step` before each")
        return self._round

    # ------------------------------------------------------------- a round

    def _begin(self) -> None:
        """Begin a round with the steps taken ahead of it, and do what they have made due."""
        replica, self.reason = self.replica, ""
        if not replica.is_entered:
            is_kept = self.run.merge.kind.common_step  # such steps leave the weights as they are
            assert not self._ahead.number or is_kept, "their weights would be overwritten"
            self.exchange.hold(replica.states)
        if not self._ahead.number:
            self.loop.begin_round()
        start = self.exchange.start_round(replica.progress, self.steps_per_s)
        round = self._round = _Round(
            start=start,
            began_s=self.clock() - self._ahead_s,
            waited_s=self.loop.waited_s,
            steps=self._ahead,
            moments=list(start.publish_after),
        )
        self._ahead, self._ahead_s, self._shard = _Steps(), 0.0, start.shard
        replica.begin(start.num_parts, self._groups_of(replica.progress.round))
        if round.steps.number:
            self._do_what_is_due(round)

    def _run_share(self, round: _Round) -> float:
        """Estimate the share of the run's tokens trained so far, in `round` or beyond its end."""
        before, step_tokens = self.replica.progress.run_tokens, self.run.tokens_per_step
        if self.run.merge.kind.common_step:
            return before / self.run.run.total_tokens  # the step that all take is of these weights
        own_steps = (round.steps.tokens + self._ahead.tokens) / step_tokens
        return round.start.run_tokens(before, own_steps, step_tokens) / self.run.run.total_tokens

    def _do_what_is_due(self, round: _Round) -> None:
        """Publish, merge or end the round if its last step has made that due."""
        start, num_steps, part = round.start, self._full_steps(round), 0
        is_full = round.steps.read_tokens >= start.inner_steps * self._step_tokens(start)
        is_full = is_full or (round.steps.tokens > 0 and start.is_over(round.steps.read_tokens))
        if self._merging is not None:
            # Nothing is published meanwhile: of a fragment that is being merged it would be counted in two rounds.
            next_fragment = len(round.updates) + len(self._merging.fragments)
            if not is_full and num_steps < start.merge_after[next_fragment]:
                return
            self._wait_for_merges()
        while len(round.moments) > 1 and round.moments[0] <= num_steps:
            part = start.part_after(round.moments.pop(0))
        if is_full:
            self._end(round)
        elif part:
            began_s = self.clock()
            own, fragments = self._publish(round, part), self._due(round, num_steps)
            if fragments:
                self._merge(_Merging(round=round, own=own, fragments=fragments, began_s=began_s))
            else:
                round.apart_s += self.clock() - began_s

    def _publish(self, round: _Round, part: int) -> Callable[[], LocalUpdate]:
        """Publish the round's update so far; return a function that returns the update.

        If the weights of the update are not lent, a worker waits for them: then that function publishes.
        """
        steps, replica, kind = round.steps, self.replica, self.run.merge.kind
        gradient, tokens = self.loop.mean_gradient() if kind.common_step else (None, steps.tokens)
        if self.worker is None or kind.lends_weights:
            own = replica.contribution(part, steps.number, tokens, gradient)
            self.exchange.publish(own)
            return lambda: own
        wait = replica.contribution_soon(part, steps.number, tokens, gradient)

        @cache
        def publish() -> LocalUpdate:
            own = wait()
            self.exchange.publish(own)
            return own

        return publish

    def _due(self, round: _Round, num_steps: int) -> list[int]:
        """Return the fragments due after `num_steps` steps and not merged yet, except the last one."""
        left = range(len(round.updates), len(self.replica.fragments) - 1)
        return [fragment for fragment in left if round.start.merge_after[fragment] <= num_steps]

    def _end(self, round: _Round) -> None:
        """Publish the whole round and begin to merge what remains."""
        self._wait_for_merges()
        finite, weights = round.steps.finite_losses()
        norms = [norm for norm in _read(round.steps.grad_norms) if math.isfinite(norm)]
        # After the losses were read, which a device has once it has taken the steps.
        ended_s, last = self.clock(), len(self.replica.fragments) - 1
        self._round = None
        if round.steps.losses and not finite:
            raise RunTimeError(
                "training diverged: no loss of the last round was finite; lower inner.learning_rate",
                code="training-diverged",
            )
        position = None if self.worker is None else self.loop.position
        if not finite:
            finite, weights = [0.0], [1]  # a whole round without a target
        round.end = _RoundEnd(losses=finite, weights=weights, grad_norms=norms, ended_s=ended_s, position=position)
        num_steps = round.steps.read_tokens / self.run.tokens_per_step  # a stage's steps vary in size
        self.steps_per_s = num_steps / max(ended_s - round.began_s - round.apart_s, 1e-9)
        own = self._publish(round, round.start.num_parts)
        fragments = [*self._due(round, round.start.inner_steps), last]
        self._merge(_Merging(round=round, own=own, fragments=fragments, began_s=ended_s))

    # ------------------------------------------------------------- merges

    @property
    def _ended_round(self) -> _Round | None:
        """Round whose end is being merged, if there is one."""
        merging = self._merging
        return None if merging is None or merging.round.end is None else merging.round

    def _round_to_go_beyond(self) -> _Round | None:
        """Return the round whose end is being merged if another step may be taken meanwhile; else None, once it has
        entered.

        At most as many are taken as lead to a round's first merge, so that no round becomes longer than others allow,
        and none that the run does not need.
        """
        if (round := self._ended_round) is None:
            return None
        most_tokens = round.start.merge_after[0] * self._step_tokens(round.start)
        if self._ahead.read_tokens < most_tokens and self._run_share(round) < 1:
            return round
        self._wait_for_merges()
        return None

    def _merge(self, merging: _Merging) -> None:
        """Begin these merges, and enter those that are computed at once."""
        self._merging = merging
        self._enter_merged()

    def _enter_merged(self) -> None:
        """Enter the merges that have been computed."""
        while (merging := self._merging) is not None:
            if not self._handed_over(merging).done():
                if merging.left_s is None:
                    merging.left_s = self.clock()
                return
            self._enter(merging)

    def _wait_for_merges(self) -> None:
        """Wait for all merges under way, and enter them."""
        while (merging := self._merging) is not None:
            self._enter(merging)

    def _handed_over(self, merging: _Merging) -> PendingMerge:
        """Return the first merge, which the worker computes; without a worker the trainer will."""
        if merging.pending is None:
            work = partial(self._computed, merging.own, merging.fragments[0])
            merging.pending = _OwnMerge(work) if self.worker is None else self.worker(work)
        return merging.pending

    def _computed(self, own: Callable[[], LocalUpdate], fragment: int) -> MergeOutcome:
        """Collect for a fragment and compute its next state. Runs in the worker, if there is one."""
        update = own()
        arrived = self.exchange.collect(fragment)
        return update, arrived if isinstance(arrived, Replaced) else self.replica.merged(arrived, update, fragment)

    def _enter(self, merging: _Merging) -> None:
        """Enter the first merge, and wait for it if it is not computed yet."""
        if merging.left_s is not None:
            merging.away_s, merging.left_s = merging.away_s + self.clock() - merging.left_s, None
        pending, self._merging = self._handed_over(merging), None
        own, merged = pending.result()
        round, is_last = merging.round, merging.fragments.pop(0) == len(self.replica.fragments) - 1
        if is_last:
            self.replica.own_tokens += own.tokens
        if isinstance(merged, Replaced):
            self._ahead = _Steps()  # their weights are replaced
            self.adopt(merged)
            self._tell_new_state(round)
            return
        is_kept = self.worker is None or merged.change is not None or self.run.merge.kind.common_step
        assert is_kept, "steps taken meanwhile would be lost"
        self.replica.enter(merged)
        if not merged.arrived.is_whole:
            self.exchange.merged(merged.fragment, self.replica.state_of(merged.fragment))
        if is_last:
            self._finish(merging, merged)
            return
        round.updates.append(merged.arrived.kept())
        if merging.fragments:
            merging.pending, self._merging = None, merging
        elif round.end is None:
            round.apart_s += self.clock() - merging.began_s - merging.away_s

    def _finish(self, merging: _Merging, merged: MergedFragment) -> None:
        """Tell the state after a round's last merge, and report the round."""
        round, own, merged_s = merging.round, merged.own, self.clock()
        end, steps = round.end, round.steps
        assert end is not None
        self._ahead_s = merging.away_s
        self._tell_new_state(round)
        self.report(
            RoundReport(
                contribution=own,
                arrived=(*round.updates, merged.arrived),
                progress=self.replica.progress,
                num_peers=round.start.num_peers,
                loss=end.loss,
                first_loss=end.losses[0],
                learning_rate=steps.learning_rate,
                grad_norm=sum(end.grad_norms) / len(end.grad_norms) if end.grad_norms else None,
                seconds=self.clock() - round.began_s - merging.away_s,
                merge_s=merged_s - end.ended_s,
                stall_s=merged_s - end.ended_s - merging.away_s + round.apart_s + self.loop.waited_s - round.waited_s,
                state=self.replica.state,
            )
        )

    def _tell_new_state(self, round: _Round) -> None:
        """Call `on_new_state` with a checkpoint that draws again what the steps taken ahead have drawn."""
        assert round.end is not None
        self._position = round.end.position
        try:
            self.on_new_state(self)
        finally:
            self._position = None

    # ------------------------------------------------------------- before, between and after

    def adopt(self, replaced: Replaced) -> None:
        """Continue from another peer's state; AdamW's moments and the data position stay."""
        self.replica.adopt(replaced)
        self.loop.weights_replaced()

    def local_checkpoint(self, room: Tensor | None) -> LocalCheckpoint:
        """Return this peer's own part of a checkpoint, beside the swarm's state; see `LoopState.kept` for `room`."""
        part = self.loop.kept(room)
        return LocalCheckpoint(
            batches=part.batches if self._position is None else self._position,
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
            self.loop.skip(skipped)
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

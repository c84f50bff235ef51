"""The trainer: inner steps in the caller's thread, an outer step at each round's end.

It touches the network only through the two calls of `Exchange`: "here is my round" and "give me what arrived".
"""

from __future__ import annotations

import math
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import Tensor

from swarmtrain.algorithm import memory
from swarmtrain.algorithm.fragments import Fragment, FragmentedState, fragments_of
from swarmtrain.algorithm.gossip import Arrival, Prepared, gossip_merge, layout_of
from swarmtrain.algorithm.inner import (
    InnerConstants,
    InnerOptimizer,
    LentMoments,
    Moments,
    learning_rate_at,
    moments_scale,
)
from swarmtrain.algorithm.outer import OuterConstants, OuterState, flatten, momentum_at, outer_step, unflatten_into
from swarmtrain.data.batches import BatchSource
from swarmtrain.errors import RunTimeError
from swarmtrain.model.gpt import GPT
from swarmtrain.peer.robustness import robust_mean
from swarmtrain.peer.stopping import StopTraining
from swarmtrain.protocol.fragments import FragmentRound, FragmentRounds, merged_step, published
from swarmtrain.protocol.progress import Progress
from swarmtrain.run import GradientFormat, RunFile

__all__ = [
    "Averaged",
    "Contribution",
    "Exchange",
    "Gathered",
    "InnerStep",
    "LentWeights",
    "Merged",
    "OuterUpdate",
    "OwnPart",
    "Replaced",
    "RoundOver",
    "RoundReport",
    "Served",
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


_FEW = 1 << 18
"""Of so few numbers the difference is taken in two calls: each gives Python's lock away and waits to have it back."""


class LentWeights:
    """The model's weights of one fragment as they are now, of which another thread makes the pseudo-gradient until a
    step changes them.

    So publishing costs the trainer nothing, where nobody has begun by then the time of a copy, and no second copy of
    the weights is made.
    """

    def __init__(self, theta: Tensor, parameters: Sequence[Tensor]) -> None:
        """The weights (Q,) at the fragment's last merge, and the model's tensors."""
        self._lent: tuple[Tensor, Sequence[Tensor]] | None = (theta, parameters)
        self._gradient: Tensor | None = None
        self._lock = threading.Lock()

    @torch.no_grad()
    def gradient(self) -> Tensor:
        """The pseudo-gradient (Q,); whoever asks first makes it."""
        with self._lock:
            if self._lent is not None:
                self._gradient, self._lent = _difference(*self._lent), None
            assert self._gradient is not None
            return self._gradient


def _difference(theta: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """theta (Q,) less the parameters, one after the other."""
    if len(theta) < _FEW:
        reached = flatten(parameters)
        return torch.sub(theta, reached, out=reached)
    out, start = memory.empty(len(theta)), 0
    for parameter in parameters:
        end = start + parameter.numel()
        torch.sub(theta[start:end], parameter.reshape(-1), out=out[start:end])
        start = end
    return out


@dataclass(frozen=True, kw_only=True)
class Contribution:
    """What a round has brought so far, and what it took to get there."""

    round: int
    part: int  # of the round's, from 1, that has ended: some of them; with all steps since the round's start
    thetas: tuple[Tensor, ...] = field(repr=False)  # of each fragment the weights at its last merge, (Q,) fp32
    fragment_rounds: tuple[FragmentRound, ...]  # and how far its round is
    reached: Tensor | None = field(repr=False)  # the weights it has got to, (P,) fp32; None with gossip, as `thetas`
    tokens: int
    inner_steps: int
    own_tokens: int  # all that this peer has trained on, these included
    base: str  # digest of the roster that led to the weights it starts from, "" before the first
    lent: tuple[LentWeights, ...] = ()
    """With gossip: what each fragment's gradient is made of."""

    def gradient_of(self, fragment: int) -> Tensor:
        """The pseudo-gradient of a fragment, (Q,) fp32: computed by who asks first."""
        return self.lent[fragment].gradient() if self.lent else self.gradient

    def take_back(self) -> None:
        """The model's weights change from now on."""
        for one in self.lent:
            one.gradient()

    @cached_property
    def gradient(self) -> Tensor:
        """The pseudo-gradient of a model in one piece, (P,) fp32."""
        if self.lent:
            (only,) = self.lent
            return only.gradient()
        assert self.reached is not None
        return self.thetas[0] - self.reached


class OuterUpdate(ABC):
    """What a merge brings: how the next state is made, of a fragment or the whole model, and what the run counts by
    then."""

    is_whole: ClassVar[bool] = True
    """Of the whole model, with which its next round begins; else of one fragment, which the model goes on with."""
    is_shared: ClassVar[bool] = False
    """The weights that it leads to should be everybody's."""

    @abstractmethod
    def next_state(
        self, state: OuterState, own: Contribution, fragment: int, constants: OuterConstants, rule: str
    ) -> OuterState:
        """After `state`, given what this peer has brought itself; `rule` is `merge.robust`."""

    @abstractmethod
    def next_progress(self, progress: Progress) -> Progress:
        """After the round of whose last fragment this is."""

    @abstractmethod
    def told(self, before: Sequence[Self]) -> dict[str, Any]:
        """The fields of a round's event that tell of it, and of what fragments merged before in the round."""

    def kept(self) -> OuterUpdate:
        """What is kept of it until the round is reported."""
        return self


@dataclass(frozen=True, kw_only=True)
class Averaged(OuterUpdate):
    """The mean pseudo-gradient (P,) of everyone on the roster, with their tokens in the same order."""

    is_shared: ClassVar[bool] = True
    gradient: Tensor
    partners: tuple[str, ...]
    weights: tuple[int, ...]
    signer: str
    roster_sha256: str

    def next_state(
        self, state: OuterState, own: Contribution, fragment: int, constants: OuterConstants, rule: str
    ) -> OuterState:
        """See `OuterUpdate`."""
        return outer_step(state, self.gradient, constants)

    def next_progress(self, progress: Progress) -> Progress:
        """See `OuterUpdate`."""
        return progress.after(self.partners, self.weights, self.roster_sha256)

    def told(self, before: Sequence[Self]) -> dict[str, Any]:
        """See `OuterUpdate`."""
        return {"partners": self.partners, "weights": self.weights, "signer": self.signer}


@dataclass(frozen=True, kw_only=True)
class Merged:
    """One of the publications that a merge is made of."""

    peer: str
    round: int
    part: int
    tokens: float  # that had not been merged before
    staleness_rounds: int  # how many rounds behind this peer's own
    pull_s: float


def _pulled(merged: Sequence[Merged]) -> dict[str, Any]:
    return {
        "partners": tuple(each.peer for each in merged),
        "weights": tuple(each.tokens for each in merged),
        "staleness_rounds": tuple(each.staleness_rounds for each in merged),
        "pull_s": max((each.pull_s for each in merged), default=None),
    }


@dataclass(frozen=True, kw_only=True)
class Gathered(OuterUpdate):
    """What was pulled from partners, ready to be merged, and the run's counts of tokens by now."""

    is_whole: ClassVar[bool] = False
    prepared: Prepared
    merged: tuple[Merged, ...]
    run_tokens: int
    peer_tokens: Mapping[str, int]
    apart: tuple[Arrival, ...] = ()
    """The partners' publications that have tokens, for a robust mean in place of the token-weighted one."""

    def next_state(
        self, state: OuterState, own: Contribution, fragment: int, constants: OuterConstants, rule: str
    ) -> OuterState:
        """See `OuterUpdate`."""
        gradient, tokens = own.gradient_of(fragment), own.fragment_rounds[fragment].tokens
        gradients = [gradient, *(arrival.gradient for arrival in self.apart)]
        mean = robust_mean(rule, gradients, [tokens, *(arrival.tokens for arrival in self.apart)])
        if mean is not None:
            return outer_step(OuterState(self.prepared.theta_mean, state.momentum), mean, constants)
        return gossip_merge(state, self.prepared, gradient, tokens, constants)

    def next_progress(self, progress: Progress) -> Progress:
        """See `OuterUpdate`."""
        return Progress(round=progress.round + 1, run_tokens=self.run_tokens, peer_tokens=self.peer_tokens)

    def told(self, before: Sequence[Self]) -> dict[str, Any]:
        """See `OuterUpdate`."""
        gathered = [*before, self]
        prepared = [each.prepared for each in gathered]
        return {
            **_pulled(_of_the_model(gathered)),
            "variance_factor": max(each.variance_factor for each in prepared),
            "consensus_spread": _most(each.consensus_spread for each in prepared),
            "displacement": _most(each.displacement for each in prepared if each.displacement != math.inf),
        }

    def kept(self) -> Gathered:
        """See `OuterUpdate`: not the partners' publications, which are whole gradients."""
        return replace(self, apart=())


def _most(values: Iterable[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)


def _of_the_model(gathered: Sequence[Gathered]) -> list[Merged]:
    """What was merged of each partner, of any fragment; of the tokens so many as the merged part of the model is."""
    size = sum(each.prepared.theta_mean.numel() for each in gathered)
    found: dict[str, Merged] = {}
    tokens = dict[str, float]()
    for each in gathered:
        for merged in each.merged:
            share = each.prepared.theta_mean.numel() / size
            tokens[merged.peer] = tokens.get(merged.peer, 0.0) + share * merged.tokens
            before = found.setdefault(merged.peer, merged)
            found[merged.peer] = replace(
                merged,
                tokens=round(tokens[merged.peer]),
                staleness_rounds=max(before.staleness_rounds, merged.staleness_rounds),
                pull_s=max(before.pull_s, merged.pull_s),
            )
    return list(found.values())


@dataclass(frozen=True, kw_only=True)
class Served(OuterUpdate):
    """Where to go on with a server: its weights, moved on by what they lack; `merged` is empty where none came."""

    theta: Tensor
    merged: tuple[Merged, ...]
    run_tokens: int
    peer_tokens: Mapping[str, int]

    def next_state(
        self, state: OuterState, own: Contribution, fragment: int, constants: OuterConstants, rule: str
    ) -> OuterState:
        """See `OuterUpdate`: the outer step was the server's."""
        return OuterState(self.theta, state.momentum)

    def next_progress(self, progress: Progress) -> Progress:
        """See `OuterUpdate`."""
        return Progress(round=progress.round + 1, run_tokens=self.run_tokens, peer_tokens=self.peer_tokens)

    def told(self, before: Sequence[Self]) -> dict[str, Any]:
        """See `OuterUpdate`."""
        return _pulled(self.merged)


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
    num_parts: int = 1
    """Into so many parts a round is divided, by whose numbers publications are known;"""
    every: int = 1
    """it publishes with each so-many-th (`protocol.fragments.published`)."""
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
class OwnPart:
    """What is this peer's alone between two rounds: with the swarm's state, all that going on takes."""

    batches: int  # drawn so far
    own_tokens: int
    young_steps: int | None
    steps_per_s: float
    moments: Moments | LentMoments
    """Lent ones where a copy would be large."""


@dataclass(frozen=True, kw_only=True)
class RoundReport:
    """What is told of a finished round; seconds, tokens, nats per token."""

    contribution: Contribution
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


@dataclass(frozen=True)
class InnerStep:
    """What an inner step was made of: tokens, their mean loss, and the norm of their gradient before the clip."""

    tokens: int
    loss: float
    grad_norm: float


@dataclass(frozen=True)
class _Steps:
    done: list[InnerStep]
    updates: list[OuterUpdate]  # what was merged meanwhile
    learning_rate: float  # of the last one
    apart_s: float  # what publishing and merging within the round took of them

    @property
    def tokens(self) -> int:
        return sum(step.tokens for step in self.done)


class RoundOver(Exception):  # noqa: N818 - a signal, not an error
    """Raised by `Trainer.step` where no further step will come: the round ends with those that it has."""


class Exchange(Protocol):
    """The network as the trainer sees it. Each method may raise RunTimeError when the peer cannot go on."""

    def hold(self, states: Sequence[OuterState]) -> None:
        """Each fragment's state, with which the first round begins, and one after the weights were taken from others.
        Returns at once."""

    def merged(self, fragment: int, state: OuterState) -> None:
        """A fragment's state after its merge with what was gathered. Returns at once."""

    def start_round(self, progress: Progress, steps_per_s: float) -> Start:
        """How the next round begins."""

    def step_done(self, inner_steps_done: int) -> None:
        """An inner step is done (told to others when they ask); must cost nothing."""

    def publish(self, contribution: Contribution) -> None:
        """Here is my round, or what there is of it. Returns at once."""

    def collect(self, fragment: int = 0) -> OuterUpdate | Replaced:
        """Give me what arrived for that fragment; waits as long as the merge method says. `Replaced` only with the last
        fragment, at the round's end. Raises StopTraining when asked to end."""


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
    progress: Progress = field(default_factory=Progress)
    own_tokens: int = 0
    steps_per_s: float = 0.0
    young_steps: int | None = None
    """Steps taken since this peer came late, with empty moments; None when it began with the others."""
    inner: InnerOptimizer = field(init=False)
    fragments: tuple[Fragment, ...] = field(init=False)
    """Of the model; one but with gossip."""
    rounds: FragmentRounds = field(init=False)
    """How far each fragment's is."""
    _has_moments: bool = False
    _is_entered: bool = False
    """Whether the model has the weights that a round begins with."""
    _states: list[OuterState] = field(init=False, repr=False)
    _lent: tuple[LentWeights, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        shapes = [tuple(parameter.shape) for parameter in self.model.parameters()]
        self.fragments = fragments_of(layout_of(shapes), self.run.merge.num_fragments)
        self.rounds = FragmentRounds(len(self.fragments))
        theta = flatten(self.model.parameters())
        self.state = OuterState(theta, torch.zeros_like(theta))
        self.constants = inner_constants(self.run)
        self.inner = InnerOptimizer(self.model.named_parameters(), self.constants, self._take_back)

    @property
    def state(self) -> OuterState:
        """Of the whole model, each fragment's as of its last merge; where there are several it follows the next."""
        return self._states[0] if len(self._states) == 1 else FragmentedState(self.fragments, self._states)

    @state.setter
    def state(self, state: OuterState) -> None:
        theta, momentum = state.theta, state.momentum
        self._is_entered = False
        self._states = [OuterState(one.of(theta), one.of(momentum)) for one in self.fragments]
        self.rounds.restart()

    def end(self) -> None:
        """No step follows: the model's weights may be replaced, and AdamW's moments go."""
        self._take_back()
        self.inner.end()

    def restart(self) -> None:
        """Give up what was trained since each fragment's merge, as a kill does."""
        self._is_entered = False
        self.rounds.restart()

    def state_of(self, fragment: int) -> OuterState:
        """Of one fragment, (Q,), as of its last merge."""
        return self._states[fragment]

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
            self.restart()
            return "interrupted"
        return "total_tokens"

    def _round(self) -> None:
        if not self._is_entered:
            self.exchange.hold(self._states)
        start = self.exchange.start_round(self.progress, self.steps_per_s)
        began_s, waited_s = time.monotonic(), self.inner.waited_s
        if start.shard is not None:
            self.batches.use_shard(start.shard)
        self.begin(start)
        steps = self._inner_steps(start)
        steps_end_s = time.monotonic()
        finite = [step.loss for step in steps.done if math.isfinite(step.loss)]
        norms = [step.grad_norm for step in steps.done if math.isfinite(step.grad_norm)]
        if not finite:
            raise RunTimeError("training diverged: no loss of the last round was finite; lower inner.learning_rate")
        num_steps = steps.tokens / self.run.tokens_per_step  # a stage's steps are not all of one size
        self.steps_per_s = num_steps / max(steps_end_s - began_s - steps.apart_s, 1e-9)
        contribution = self._publish(start.num_parts, len(steps.done), steps.tokens)
        updates = [*steps.updates, *self._merge_due(start, len(steps.updates), start.inner_steps, contribution)]
        arrived = self.exchange.collect(len(self.fragments) - 1)
        self.own_tokens += contribution.tokens
        if isinstance(arrived, Replaced):
            self.adopt(arrived)
            self.settled()
            return
        self.merge(arrived, contribution)
        merged_s = time.monotonic()
        self.settled()
        self.report(
            RoundReport(
                contribution=contribution,
                arrived=(*updates, arrived),
                progress=self.progress,
                num_peers=start.num_peers,
                loss=sum(finite) / len(finite),
                first_loss=finite[0],
                learning_rate=steps.learning_rate,
                grad_norm=sum(norms) / len(norms) if norms else None,
                seconds=time.monotonic() - began_s,
                merge_s=merged_s - steps_end_s,
                stall_s=merged_s - steps_end_s + steps.apart_s + self.inner.waited_s - waited_s,
                state=self.state,
            )
        )

    def begin(self, start: Start) -> None:
        """A round begins, in the model too."""
        self.rounds.begin(self.progress.round, start.num_parts)
        if not self._is_entered:
            self.enter(self.state.theta)

    def _inner_steps(self, start: Start) -> _Steps:
        """AdamW steps over the tokens of `start.inner_steps` of them, or fewer if the round is over before; publishes
        at all moments of the round but its end, and merges all fragments but the last."""
        done: list[InnerStep] = []
        updates: list[OuterUpdate] = []
        step_tokens, tokens, before = self.run.tokens_per_step, 0, self.progress.run_tokens
        progress = apart_s = 0.0
        moments = list(start.publish_after)
        while tokens < start.inner_steps * step_tokens:
            if self.should_stop():
                raise StopTraining
            progress = start.run_tokens(before, tokens / step_tokens, step_tokens) / self.run.run.total_tokens
            try:
                done.append(self.step(progress, self._scale))
            except RoundOver:
                break
            self._took_step()
            tokens += done[-1].tokens
            num_steps = min(tokens // step_tokens, start.inner_steps)
            self.exchange.step_done(num_steps)
            part = 0
            while len(moments) > 1 and moments[0] <= num_steps:
                part = start.part_after(moments.pop(0))
            if part and tokens < start.inner_steps * step_tokens:
                began_s = time.monotonic()
                contribution = self._publish(part, len(done), tokens)
                updates += self._merge_due(start, len(updates), num_steps, contribution)
                apart_s += time.monotonic() - began_s
        if not done:
            raise StopTraining
        return _Steps(done, updates, learning_rate_at(self.constants, progress), apart_s)

    def _merge_due(self, start: Start, num_merged: int, num_steps: int, own: Contribution) -> list[OuterUpdate]:
        """Merge the fragments that are due after so many steps, but for those merged before and the last one."""
        updates = []
        for fragment in range(num_merged, len(self.fragments) - 1):
            if start.merge_after[fragment] > num_steps:
                break
            arrived = self.exchange.collect(fragment)
            assert not isinstance(arrived, Replaced)
            self.merge(arrived, own, fragment)
            updates.append(arrived.kept())
        return updates

    @property
    def _scale(self) -> float:
        """What the next step multiplies its learning rate with: a late joiner's moments are young."""
        return 1.0 if self.young_steps is None else moments_scale(self.young_steps, self.constants.beta2)

    def _took_step(self) -> None:
        self._has_moments = True
        if self.young_steps is not None:
            self.young_steps += 1

    def _publish(self, part: int, inner_steps: int, tokens: int) -> Contribution:
        """Hand over what `inner_steps` of this round have brought."""
        contribution = self.contribution(part, inner_steps, tokens)
        self.exchange.publish(contribution)
        return contribution

    def contribution(self, part: int, inner_steps: int, tokens: int) -> Contribution:
        """What `inner_steps` of this round have brought, with publication `part`."""
        thetas, parameters = [state.theta for state in self._states], list(self.model.parameters())
        self._take_back()
        if self.run.merge.kind.lends_weights:
            pairs = zip(thetas, self.fragments, strict=True)
            self._lent = tuple(LentWeights(theta, fragment.pick(parameters)) for theta, fragment in pairs)
        return Contribution(
            round=self.progress.round,
            part=part,
            thetas=() if self._lent else tuple(thetas),
            fragment_rounds=self.rounds.at(part, tokens, inner_steps),
            reached=None if self._lent else flatten(parameters),
            tokens=tokens,
            inner_steps=inner_steps,
            own_tokens=self.own_tokens + tokens,
            base=self.progress.roster_sha256,
            lent=self._lent,
        )

    def _take_back(self) -> None:
        """The model's weights change: what was lent of them is made into gradients first."""
        for one in self._lent:
            one.gradient()
        self._lent = ()

    def enter(self, theta: Tensor, fragment: int | None = None) -> None:
        """Put weights, (P,) or the fragment's (Q,), into the model."""
        parameters = list(self.model.parameters())
        if fragment is None:
            self._take_back()
        elif self._lent:
            self._lent[fragment].gradient()
        unflatten_into(theta, parameters if fragment is None else self.fragments[fragment].pick(parameters))
        self._is_entered = True

    def step(self, progress: float, scale: float) -> InnerStep:
        """One inner step over one batch, in microbatches. `scale` multiplies the learning rate."""
        with self.slowed():
            batch = self.batches.next_batch()
            size = self.run.microbatch_sequences
            loss_sum = 0.0
            for part in torch.split(batch, size):
                if self.should_stop():
                    self.inner.drop_gradients()
                    raise StopTraining
                loss = self.model.loss(part) * (len(part) / len(batch))
                loss.backward()  # type: ignore[no-untyped-call]
                loss_sum += float(loss.detach())
            return InnerStep(self.run.tokens_per_step, loss_sum, self.inner.step(progress, scale))

    def merge(self, arrived: OuterUpdate, own: Contribution, fragment: int = -1) -> None:
        """The outer step of a fragment, and with the last one the counters that follow from what arrived."""
        section, fragment = self.run.merge, fragment % len(self.fragments)
        constants = OuterConstants(
            learning_rate=section.outer_learning_rate,
            momentum=momentum_at(self.progress.round, section.outer_momentum, section.momentum_ramp_rounds),
        )
        state = self.state if arrived.is_whole else self._states[fragment]
        state = arrived.next_state(state, own, fragment, constants, section.robust)
        if arrived.is_whole:
            self.state = state
        else:
            self._states[fragment] = state
            self.rounds.merged(fragment, own.part, own.tokens, own.inner_steps)
            self.enter(state.theta, fragment)
            self.exchange.merged(fragment, state)
        if fragment == len(self.fragments) - 1:
            self.progress = arrived.next_progress(self.progress)

    def adopt(self, replaced: Replaced) -> None:
        """Go on from another peer's state; the moments stay, the data position too."""
        self.state, self.progress = replaced.state, replaced.progress
        if not self._has_moments:
            self.young_steps = 0

    def own_part(self, room: Tensor | None) -> OwnPart:
        """What a checkpoint keeps beside the state; the moments are copied into `room` (2, P) fp32, or lent until the
        next step where there is none."""
        return OwnPart(
            batches=self.batches.position,
            own_tokens=self.own_tokens,
            young_steps=self.young_steps,
            steps_per_s=self.steps_per_s,
            moments=self.inner.lend_moments() if room is None else self.inner.copy_moments(room),
        )

    def resume(self, state: OuterState, progress: Progress, own: OwnPart) -> None:
        """Go on where a checkpoint was taken; `batches` must stand there. Raises ValueError when it does not fit."""
        if self.batches.position != own.batches:
            raise ValueError(f"the checkpoint stands at batch {own.batches}, the data at {self.batches.position}")
        if not isinstance(own.moments, Moments):
            raise ValueError("moments of a checkpoint that was loaded are needed, not lent ones")
        self.inner.load_moments(own.moments)
        self._has_moments = True
        self.state, self.progress = state, progress
        self.own_tokens, self.young_steps, self.steps_per_s = own.own_tokens, own.young_steps, own.steps_per_s

    def count_on(self, own_tokens: int) -> None:
        """Others count so many of this peer: it counts on from there, or what it trains with an old folder that was put
        back would count for nothing until it has caught up with itself."""
        self.own_tokens = max(self.own_tokens, own_tokens)

    def skip_merged(self, tokens: int) -> bool:
        """Others have merged `tokens` of this peer's that its checkpoint does not know: their batches are done.

        A kill costs a round at most, so more than a few rounds is an old folder that was put back, or a lie: those
        are not skipped, and the answer is False.
        """
        if not 0 < tokens <= _MAX_SKIPPED_ROUNDS * self.run.round_tokens:
            return False
        for _ in range(tokens // self.run.tokens_per_step):
            self.batches.next_batch()
        self.own_tokens += tokens
        return True

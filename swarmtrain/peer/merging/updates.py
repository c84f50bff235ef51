"""Inputs and results of a merge: this peer's local update, and the outer update of each merge method.

A local update lends the model's weights; whichever thread first asks for the pseudo-gradient computes it.
"""

from __future__ import annotations

import math
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import MappingProxyType
from typing import ClassVar, Self, TypedDict

import torch
from torch import Tensor

from swarmtrain.algorithm import memory
from swarmtrain.algorithm.common_step import CommonOptimizer, CommonStep
from swarmtrain.algorithm.gossip import PartnerUpdate, PreparedMerge, gossip_merge
from swarmtrain.algorithm.outer import OuterConstants, OuterState, flatten, kept_where, outer_step
from swarmtrain.peer.merging.robustness import robust_mean
from swarmtrain.protocol.gossip.fragments import FragmentRound
from swarmtrain.protocol.gossip.pulls import GroupName
from swarmtrain.protocol.tokens.progress import Progress

_FEW = 1 << 18
"""Up to this size the difference takes two calls, since each call releases Python's lock and waits to get it back."""


class LentWeights:
    """Present weights of one fragment, from which another thread computes the pseudo-gradient before the next step
    changes them.

    Publishing costs the trainer nothing if another thread has begun by the next step, and one copy otherwise; a second
    copy of the weights is never made. Thread-safe.
    """

    def __init__(
        self, theta: Tensor, parameters: Sequence[Tensor], wait_ready: Callable[[], None] = lambda: None
    ) -> None:
        """`theta` are the weights (Q,) at the fragment's last merge, `parameters` the model's tensors in main memory.

        `wait_ready` returns once they are there: a device may still be copying them.
        """
        self._lent: tuple[Tensor, Sequence[Tensor]] | None = (theta, parameters)
        self._wait_ready = wait_ready
        self._gradient: Tensor | None = None
        self._lock = threading.Lock()

    @torch.no_grad()
    def gradient(self) -> Tensor:
        """Return the pseudo-gradient (Q,). The first call computes it."""
        with self._lock:
            if self._lent is not None:
                self._wait_ready()
                self._gradient, self._lent = _difference(*self._lent), None
            assert self._gradient is not None
            return self._gradient


def _difference(theta: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """Return theta (Q,) minus the parameters, which are flattened in order."""
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
class LocalUpdate:
    """Result of a round so far: what was trained, and the publications' data."""

    round: int
    part: int  # the part, from 1, that has just ended; the update covers all steps since the round's start
    thetas: tuple[Tensor, ...] = field(repr=False)  # weights at each fragment's last merge, (Q,) fp32
    fragment_rounds: tuple[FragmentRound, ...]  # position of each fragment in its own round
    reached: Tensor | None = field(repr=False)  # present weights, (P,) fp32; None with `lent` or `mean_gradient`
    tokens: int
    inner_steps: int
    own_tokens: int  # all tokens that this peer has trained, these included
    base: str  # digest of the roster that led to the initial weights of this round, "" before the first
    lent: tuple[LentWeights, ...] = ()
    """Loans from which each fragment's gradient is computed (gossip only)."""
    mean_gradient: Tensor | None = field(default=None, repr=False)
    """Mean gradient (P,) fp32 of the steps, where they left the weights as they are."""
    values: Mapping[tuple[GroupName, int], Tensor] = field(default_factory=dict, repr=False)
    """Values averaged beside the weights, by tensor group and fragment, flat fp32; not written into afterwards."""
    trained: frozenset[int] | None = None
    """Groups of an adapter that were trained in this round; None: all."""

    def has_trained(self, group: int) -> bool:
        """Return whether a group of an adapter was trained in this round; of other models everything is."""
        return self.trained is None or group in self.trained

    def gradient_of(self, fragment: int) -> Tensor:
        """Return the pseudo-gradient (Q,) fp32 of a fragment. The first call computes it."""
        return self.lent[fragment].gradient() if self.lent else self.gradient

    def take_back(self) -> None:
        """Compute all gradients now: the model's weights change afterwards."""
        for one in self.lent:
            one.gradient()

    @cached_property
    def gradient(self) -> Tensor:
        """Pseudo-gradient, or mean gradient, (P,) fp32 of a model that is one fragment."""
        if self.mean_gradient is not None:
            return self.mean_gradient
        if self.lent:
            (only,) = self.lent
            return only.gradient()
        assert self.reached is not None
        return self.thetas[0] - self.reached


class MergeFields(TypedDict, total=False):
    """Fields of a round's event that describe its merge; see `events.RoundEvent`."""

    partners: tuple[str, ...]
    weights: tuple[int, ...]
    signer: str
    staleness_rounds: tuple[int, ...]
    pull_s: float | None
    variance_factor: float | None
    consensus_spread: float | None
    displacement: float | None
    state_sha256: str


class OuterUpdate(ABC):
    """Result of collecting for a merge: it makes the next state of a fragment or of the whole model, and the next
    counters.
    """

    is_whole: ClassVar[bool] = True
    """True if it is of the whole model, with which the next round begins; False for one fragment, merged while training
    continues.
    """
    is_shared: ClassVar[bool] = False
    """True if all peers should hold the weights that it leads to."""
    values: Mapping[tuple[GroupName, int], Tensor] = MappingProxyType({})
    """Averages of what is published beside the weights (see `LocalUpdate.values`), where partners brought some."""

    @abstractmethod
    def next_state(
        self, state: OuterState, own: LocalUpdate, fragment: int, constants: OuterConstants, rule: str
    ) -> OuterState:
        """Return the state after `state`, given this peer's own update; `rule` is `merge.robust`."""

    @abstractmethod
    def next_progress(self, progress: Progress) -> Progress:
        """Return the counters after the round that ends with this update."""

    @abstractmethod
    def told(self, before: Sequence[Self]) -> MergeFields:
        """Return the fields of a round's event for this update and for the fragments merged before it in the round."""

    def kept(self) -> OuterUpdate:
        """Return the update, reduced to what the round's report needs."""
        return self


@dataclass(frozen=True, kw_only=True)
class Averaged(OuterUpdate):
    """Mean pseudo-gradient (P,) of all peers on the roster, and their tokens in the same order."""

    is_shared: ClassVar[bool] = True
    gradient: Tensor
    untrained: tuple[slice, ...] = ()
    """Numbers that nobody trained, of groups of an adapter: they stay as they are."""
    partners: tuple[str, ...]
    weights: tuple[int, ...]
    signer: str
    roster_sha256: str

    def next_state(
        self, state: OuterState, own: LocalUpdate, fragment: int, constants: OuterConstants, rule: str
    ) -> OuterState:
        """Return the state after `state`, given this peer's own update; `rule` is `merge.robust`. See `OuterUpdate`."""
        return kept_where(outer_step(state, self.gradient, constants), state, self.untrained)

    def next_progress(self, progress: Progress) -> Progress:
        """Return the counters after the round that ends with this update. See `OuterUpdate`."""
        return progress.after(self.partners, self.weights, self.roster_sha256)

    def told(self, before: Sequence[Self]) -> MergeFields:
        """Return the fields of a round's event for this update and for the fragments merged before it in the round. See
        `OuterUpdate`."""
        return {"partners": self.partners, "weights": self.weights, "signer": self.signer}


@dataclass(frozen=True, kw_only=True)
class BatchMean(Averaged):
    """Mean gradient (P,) of a batch, with which all peers take the same step of AdamW or LAMB."""

    optimizer: CommonOptimizer
    at: CommonStep

    def next_state(
        self, state: OuterState, own: LocalUpdate, fragment: int, constants: OuterConstants, rule: str
    ) -> OuterState:
        """Return the state after `state`. `constants` and `rule` have no meaning here. See `OuterUpdate`."""
        after = self.optimizer.step(state, self.gradient, self.at)
        return after if after is state else kept_where(after, state, self.untrained)


@dataclass(frozen=True, kw_only=True)
class MergeInput:
    """Publication that entered a merge."""

    peer: str
    round: int
    part: int
    tokens: float  # tokens not merged before
    staleness_rounds: int  # rounds behind this peer's own
    pull_s: float


def _pulled(merged: Sequence[MergeInput]) -> MergeFields:
    return {
        "partners": tuple(each.peer for each in merged),
        "weights": tuple(round(each.tokens) for each in merged),
        "staleness_rounds": tuple(each.staleness_rounds for each in merged),
        "pull_s": max((each.pull_s for each in merged), default=None),
    }


@dataclass(frozen=True, kw_only=True)
class _Pulled(OuterUpdate):
    """Update made of pulled publications, with the run's token counts."""

    merged: tuple[MergeInput, ...]
    run_tokens: int
    peer_tokens: Mapping[str, int]

    def next_progress(self, progress: Progress) -> Progress:
        """Return the counters after the round that ends with this update. See `OuterUpdate`."""
        return Progress(round=progress.round + 1, run_tokens=self.run_tokens, peer_tokens=self.peer_tokens)


@dataclass(frozen=True, kw_only=True)
class Gathered(_Pulled):
    """Publications pulled from partners, ready to be merged into one fragment."""

    is_whole: ClassVar[bool] = False
    prepared: PreparedMerge
    apart: tuple[PartnerUpdate, ...] = ()
    """Partners' publications that have tokens, for a robust mean in place of the token-weighted one."""
    values: Mapping[tuple[GroupName, int], Tensor] = field(default_factory=dict)
    """See `OuterUpdate`."""

    def next_state(
        self, state: OuterState, own: LocalUpdate, fragment: int, constants: OuterConstants, rule: str
    ) -> OuterState:
        """Return the state after `state`, given this peer's own update; `rule` is `merge.robust`. See `OuterUpdate`."""
        gradient, tokens = own.gradient_of(fragment), own.fragment_rounds[fragment].tokens
        gradients = [gradient, *(arrival.gradient for arrival in self.apart)]
        mean = robust_mean(rule, gradients, [tokens, *(arrival.tokens for arrival in self.apart)])
        if mean is not None:
            return outer_step(OuterState(self.prepared.theta_mean, state.momentum), mean, constants)
        return gossip_merge(state, self.prepared, gradient, tokens, constants)

    def told(self, before: Sequence[Self]) -> MergeFields:
        """Return the fields of a round's event for this update and for the fragments merged before it in the round. See
        `OuterUpdate`."""
        gathered = [*before, self]
        prepared = [each.prepared for each in gathered]
        return {
            **_pulled(_of_the_model(gathered)),
            "variance_factor": max(each.variance_factor for each in prepared),
            "consensus_spread": _most(each.consensus_spread for each in prepared),
            "displacement": _most(each.displacement for each in prepared if each.displacement != math.inf),
        }

    def kept(self) -> Gathered:
        """See `OuterUpdate`: drops the partners' publications, which are whole gradients."""
        return replace(self, apart=(), values={})


def _most(values: Iterable[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)


def _of_the_model(gathered: Sequence[Gathered]) -> list[MergeInput]:
    """Return the merged publications of each partner over all fragments; tokens are weighted by the fragments' shares
    of the model."""
    size = sum(each.prepared.theta_mean.numel() for each in gathered)
    found: dict[str, MergeInput] = {}
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
class Served(_Pulled):
    """Weights to continue from with a server: the server's, moved on by what they lack. `merged` is empty if none
    came.
    """

    theta: Tensor

    def next_state(
        self, state: OuterState, own: LocalUpdate, fragment: int, constants: OuterConstants, rule: str
    ) -> OuterState:
        """See `OuterUpdate`: the outer step was the server's."""
        return OuterState(self.theta, state.momentum)

    def told(self, before: Sequence[Self]) -> MergeFields:
        """Return the fields of a round's event for this update and for the fragments merged before it in the round. See
        `OuterUpdate`."""
        return _pulled(self.merged)


@dataclass(frozen=True, kw_only=True)
class Replaced:
    """State of the swarm, taken from another peer in place of a merge that this peer had missed."""

    state: OuterState
    progress: Progress
    from_peer: str
    reason: str
    partners: tuple[str, ...] = ()
    """Peers on the roster that led to the state, if there are rosters."""

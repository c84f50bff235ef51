"""What goes into a merge and what it brings: this peer's contribution, and for each way to merge the outer update.

A contribution lends the model's weights, of which whoever asks first makes the pseudo-gradient.
"""

from __future__ import annotations

import math
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import MappingProxyType
from typing import ClassVar, Self, TypedDict

import torch
from torch import Tensor

from swarmtrain.algorithm import memory
from swarmtrain.algorithm.gossip import PartnerUpdate, PreparedMerge, gossip_merge
from swarmtrain.algorithm.outer import OuterConstants, OuterState, flatten, outer_step
from swarmtrain.peer.merging.robustness import robust_mean
from swarmtrain.protocol.gossip.fragments import FragmentRound
from swarmtrain.protocol.gossip.pulls import Section
from swarmtrain.protocol.tokens.progress import Progress

__all__ = [
    "Averaged",
    "Gathered",
    "LentWeights",
    "LocalUpdate",
    "MergeFields",
    "MergeInput",
    "OuterUpdate",
    "Replaced",
    "Served",
]


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
class LocalUpdate:
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
    values: Mapping[tuple[Section, int], Tensor] = field(default_factory=dict, repr=False)
    """What is averaged beside the weights, by section and fragment, flat fp32; not written into afterwards."""

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


class MergeFields(TypedDict, total=False):
    """The fields of a round's event that tell of its merge; see `events.RoundEvent`."""

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
    """What a merge brings: how the next state is made, of a fragment or the whole model, and what the run counts by
    then."""

    is_whole: ClassVar[bool] = True
    """Of the whole model, with which its next round begins; else of one fragment, which the model goes on with."""
    is_shared: ClassVar[bool] = False
    """The weights that it leads to should be everybody's."""
    values: Mapping[tuple[Section, int], Tensor] = MappingProxyType({})
    """To what it leads beside them, as `LocalUpdate.values`, where partners have brought some."""

    @abstractmethod
    def next_state(
        self, state: OuterState, own: LocalUpdate, fragment: int, constants: OuterConstants, rule: str
    ) -> OuterState:
        """After `state`, given what this peer has brought itself; `rule` is `merge.robust`."""

    @abstractmethod
    def next_progress(self, progress: Progress) -> Progress:
        """After the round of whose last fragment this is."""

    @abstractmethod
    def told(self, before: Sequence[Self]) -> MergeFields:
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
        self, state: OuterState, own: LocalUpdate, fragment: int, constants: OuterConstants, rule: str
    ) -> OuterState:
        """See `OuterUpdate`."""
        return outer_step(state, self.gradient, constants)

    def next_progress(self, progress: Progress) -> Progress:
        """See `OuterUpdate`."""
        return progress.after(self.partners, self.weights, self.roster_sha256)

    def told(self, before: Sequence[Self]) -> MergeFields:
        """See `OuterUpdate`."""
        return {"partners": self.partners, "weights": self.weights, "signer": self.signer}


@dataclass(frozen=True, kw_only=True)
class MergeInput:
    """One of the publications that a merge is made of."""

    peer: str
    round: int
    part: int
    tokens: float  # that had not been merged before
    staleness_rounds: int  # how many rounds behind this peer's own
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
    """Made of publications that were pulled, with the run's counts of tokens by now."""

    merged: tuple[MergeInput, ...]
    run_tokens: int
    peer_tokens: Mapping[str, int]

    def next_progress(self, progress: Progress) -> Progress:
        """See `OuterUpdate`."""
        return Progress(round=progress.round + 1, run_tokens=self.run_tokens, peer_tokens=self.peer_tokens)


@dataclass(frozen=True, kw_only=True)
class Gathered(_Pulled):
    """What was pulled from partners, ready to be merged."""

    is_whole: ClassVar[bool] = False
    prepared: PreparedMerge
    apart: tuple[PartnerUpdate, ...] = ()
    """The partners' publications that have tokens, for a robust mean in place of the token-weighted one."""
    values: Mapping[tuple[Section, int], Tensor] = field(default_factory=dict)
    """See `OuterUpdate`."""

    def next_state(
        self, state: OuterState, own: LocalUpdate, fragment: int, constants: OuterConstants, rule: str
    ) -> OuterState:
        """See `OuterUpdate`."""
        gradient, tokens = own.gradient_of(fragment), own.fragment_rounds[fragment].tokens
        gradients = [gradient, *(arrival.gradient for arrival in self.apart)]
        mean = robust_mean(rule, gradients, [tokens, *(arrival.tokens for arrival in self.apart)])
        if mean is not None:
            return outer_step(OuterState(self.prepared.theta_mean, state.momentum), mean, constants)
        return gossip_merge(state, self.prepared, gradient, tokens, constants)

    def told(self, before: Sequence[Self]) -> MergeFields:
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
        return replace(self, apart=(), values={})


def _most(values: Iterable[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)


def _of_the_model(gathered: Sequence[Gathered]) -> list[MergeInput]:
    """What was merged of each partner, of any fragment; of the tokens so many as the merged part of the model is."""
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
    """Where to go on with a server: its weights, moved on by what they lack; `merged` is empty where none came."""

    theta: Tensor

    def next_state(
        self, state: OuterState, own: LocalUpdate, fragment: int, constants: OuterConstants, rule: str
    ) -> OuterState:
        """See `OuterUpdate`: the outer step was the server's."""
        return OuterState(self.theta, state.momentum)

    def told(self, before: Sequence[Self]) -> MergeFields:
        """See `OuterUpdate`."""
        return _pulled(self.merged)


@dataclass(frozen=True, kw_only=True)
class Replaced:
    """The swarm's state, taken from another peer in place of a merge: this peer had missed one."""

    state: OuterState
    progress: Progress
    from_peer: str
    reason: str

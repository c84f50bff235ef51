"""What a simulated volunteer keeps of one fragment of the model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from torch import Tensor

from swarmtrain.algorithm.fragments import Fragment
from swarmtrain.algorithm.gossip import Arrival
from swarmtrain.network.codec import PublicationCodec
from swarmtrain.peer.robustness import Naming, Robustness
from swarmtrain.protocol.open_pulls import OpenPull, OpenPulls, Which
from swarmtrain.protocol.partners import BackOff, Ledger, Mark, Partners
from swarmtrain.protocol.pulls import PullPlan, Wanted, most_pulls
from swarmtrain.protocol.shards import Row
from swarmtrain.run import GradientFormat
from swarmtrain.simulate.learning.setting import Setting

__all__ = ["Arrived", "Home", "Lane", "Owner", "Published", "Pull"]


class Home(Protocol):
    """What everybody's lanes have in common."""

    setting: Setting
    fragments: tuple[Fragment, ...]
    wanted: Wanted

    def codec(self, fragment: int) -> PublicationCodec:
        """A peer's own of a fragment."""


class Owner(Protocol):
    """The peer that keeps a lane."""

    name: str
    naming: Naming

    @property
    def world(self) -> Home:
        """The run and the others."""

    @property
    def round(self) -> int:
        """The one it is in, or begins."""


@dataclass
class Published:
    """A fragment's weights at its round's start or its pseudo-gradient since, which travel as the run file says."""

    mark: Mark
    vector: Tensor
    format: GradientFormat | None = None
    """Of a pseudo-gradient."""
    sent: Tensor | None = None
    """What everybody gets of it, once it was asked for."""
    began_s: float | None = None
    """When its author's round of the fragment began, of weights."""
    rows: Sequence[Row] = ()
    """Who has seen which data, as it tells with it."""


@dataclass(frozen=True, eq=False)
class Pull:
    """A section of somebody's publication, on its way."""

    lane: Lane
    asked: OpenPull
    published: Published
    life: int
    """Of its author."""


Arrived: TypeAlias = dict[Which, tuple[Published, Arrival]]
"""What is here to be merged, of whom, in the order in which it came."""


class Lane:
    """What a peer keeps of one fragment of the model: what it publishes, pulls and has merged of it."""

    def __init__(self, peer: Owner, number: int) -> None:
        world, section = peer.world, peer.world.setting.run.merge
        self.peer, self.number, self.fragment = peer, number, world.fragments[number]
        self.sizes = world.codec(number).sizes(1 / len(world.fragments))
        self.ledger = Ledger(section.max_staleness_rounds, section.publications_per_round, section.num_partners)
        met = not world.setting.own_weights
        self.robustness = Robustness(section.robust, self.fragment.layout, peer.naming, met=met)
        self.began_s = math.inf
        """When its round did,"""
        self.merges_s = math.inf
        """and when it is merged next, as was expected last,"""
        self.pulled_for_s: float | None = None
        """and as was when the first pull for that began."""

    def forget(self, back_off: BackOff) -> None:
        """All that a process holds and no checkpoint keeps."""
        world = self.peer.world
        self.partners = Partners(self.ledger, back_off, world.setting.run.merge.partners)
        self.newest: Published | None = None
        """Its gradient's."""
        self.weights: Published | None = None
        self.merged: dict[str, Tensor] = {}
        self.codec = world.codec(self.number)
        self.arrived: Arrived = {}
        self.robustness.comes_back()
        self.pulls = OpenPulls(back_off, most_pulls(world.wanted))
        self.plan: PullPlan | None = None
        self.sizes_due = next(iter(self.sizes.values()))
        """Of all that is pulled of one partner at once."""

    @property
    def round(self) -> int:
        """The one that it is in, or begins."""
        return self.peer.round if self.weights is None else self.weights.mark.round

    def size_bytes(self, published: Published) -> int:
        """What a publication of this fragment weighs: its weights do in any format of gradients."""
        if published.format is None:
            return next(iter(self.sizes.values())).weights
        return self.sizes[published.format].gradient

    def begins(self, round: int, theta: Tensor, now: float) -> None:
        """A round of it, with the weights `theta`, (Q,)."""
        self.began_s, self.pulled_for_s = now, None
        self.pulls.round_begins(now)
        self.weights = Published(Mark(round, 0, 0), theta, began_s=now)

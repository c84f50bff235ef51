"""What the engine of gossip keeps: its pulls, each fragment's state, and what is seen of the others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Generic, NamedTuple

from swarmtrain.protocol.gossip_messages import (
    Held,
    Payload,
    Pulled,
    Ready,
)
from swarmtrain.protocol.merge_plans import MergePlan
from swarmtrain.protocol.open_pulls import OpenPull, OpenPulls, Which
from swarmtrain.protocol.partners import (
    Candidate,
    Ledger,
    Mark,
    News,
    Partners,
)
from swarmtrain.protocol.pulls import (
    BytesBegun,
    PullPlan,
    Section,
    SectionBytes,
)
from swarmtrain.run import GradientFormat

__all__ = [
    "DueOfLane",
    "DuePulls",
    "GossipLane",
    "GossipPull",
    "LaneView",
    "Preparing",
    "ReadyMerge",
]


@dataclass(slots=True)
class GossipPull(Generic[Held]):
    """One pull, from the question to the merge that is prepared with it."""

    number: int
    fragment: int
    open: OpenPull
    round_s: float
    sources: list[str]
    """Whom to ask, the next one first."""
    source: str = ""
    asked_s: float = 0.0
    mark: Mark | None = None
    held: Held | None = None
    began_s: float | None = None
    begun: BytesBegun | None = None
    bytes_s: float = 0.0


@dataclass(slots=True)
class Preparing(Generic[Held, Payload]):
    """A merge that is being prepared; where it cannot be, what is tried one by one to find out why."""

    plan: MergePlan
    fragment: int
    began_s: float
    pulled: tuple[Pulled[Held, Payload], ...]
    number: int = -1
    is_sifted: bool = False
    stays: tuple[Pulled[Held, Payload], ...] = ()
    bad: tuple[Pulled[Held, Payload], ...] = ()

    @property
    def tried(self) -> tuple[Pulled[Held, Payload], ...]:
        """What is being merged: the last of them may be the one that cannot be."""
        return (*self.stays, self.pulled[self.num_tried]) if self.is_sifted else self.pulled

    @property
    def num_tried(self) -> int:
        """How many are known to be good or bad."""
        return len(self.stays) + len(self.bad)


@dataclass(frozen=True, slots=True)
class ReadyMerge(Generic[Held, Payload, Ready]):
    """A merge that is prepared, of that round of its fragment."""

    round: int
    pulled: tuple[Pulled[Held, Payload], ...]
    merge: Ready


@dataclass(slots=True)
class LaneView:
    """What is seen of the others from one fragment, until they tell more or something is merged."""

    candidates: list[Candidate]
    rounds: dict[str, int]
    from_round: int = -1
    """Of this peer, in which what follows was found."""
    reference: int = 0
    new_tokens: dict[str, int | None] = field(default_factory=dict)
    new_weights: set[str] | None = None


class DuePulls(NamedTuple):
    """The pulls of a plan."""

    basis: object
    """What they follow from."""
    pulls: PullPlan
    slow_after_s: float


@dataclass(slots=True)
class GossipLane(Generic[Held, Payload, Ready]):
    """One fragment of the model."""

    number: int
    ledger: Ledger
    partners: Partners
    open: OpenPulls
    sizes: Mapping[GradientFormat, SectionBytes]
    pulled: list[Pulled[Held, Payload]] = field(default_factory=list)
    here: list[Which] = field(default_factory=list)
    """What of it is of whom."""
    num_weights: int = 0
    plan: MergePlan | None = None
    """Of its next merge; None once it was merged, until that after it is planned."""
    began_s: float = -1.0
    """When its present round did."""
    pulled_for_s: float | None = None
    """When the merge of its present round was expected when the first pull for it began."""
    merged_round: int = -1
    begins_anew: bool = True
    """It has rested since that merge: a round that was given up has all its merges again."""
    ready: ReadyMerge[Held, Payload, Ready] | None = None
    merged: dict[str, Held] = field(default_factory=dict)
    """Pseudo-gradients that a later part of their round is the difference to."""
    turned_back: dict[Which, int] = field(default_factory=dict)
    """Whose counter turned back, and in which round of this peer that was seen."""
    view: LaneView | None = None

    def of_use(self, reference: int) -> list[Pulled[Held, Payload]]:
        """Of what was pulled: what may be merged still."""
        stays = self.ledger.stays_of_use
        return [each for each in self.pulled if stays(each.section, each.peer, each.mark, reference)]

    def has_more(self) -> bool:
        """Something was pulled that is in no merge that is prepared."""
        return bool(self.pulled) and (self.ready is None or self.ready.pulled != tuple(self.pulled))

    def may_want(self, section: Section, num_due: int) -> bool:
        """Less is here than is due, or some are on their way, that may be slow."""
        here = self.num_weights if section == "weights" else len(self.pulled) - self.num_weights
        return here < num_due or self.open.has_begun(section)

    def hold(self, pulled: list[Pulled[Held, Payload]]) -> None:
        """These are what was pulled."""
        self.pulled, self.here = pulled, [(each.section, each.peer) for each in pulled]
        self.num_weights = sum([each.section == "weights" for each in pulled])

    def news(self, peer: str, mark: Mark, reference: int) -> News:
        """What of a publication is new."""
        if mark.part:
            return self.ledger.news(peer, mark, reference)
        return self.ledger.news_of_weights(peer, mark.round, reference)


class DueOfLane(NamedTuple, Generic[Held, Payload, Ready]):
    """So many pulls of a section should have begun for a fragment's next merge."""

    lane: GossipLane[Held, Payload, Ready]
    section: Section
    number: int
    plan: MergePlan
    slow_after_s: float

"""What gossip keeps of one fragment of the model: what was pulled, whom of, and the merge that is prepared."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from swarmtrain.network.publications import PublicationRules
from swarmtrain.network.snapshots import Held
from swarmtrain.protocol.open_pulls import OpenPulls, Which
from swarmtrain.protocol.partners import Ledger, Mark, Partners
from swarmtrain.protocol.pulls import Section, SectionBytes
from swarmtrain.run import GradientFormat

__all__ = ["Lane", "Plan", "Pulled", "Ready"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Pulled:
    """The weights or the gradient of a partner: `arrival` is what the merge takes, or makes it."""

    section: Section
    peer: str
    mark: Mark
    arrival: Any
    held: Held
    pull_s: float
    began_s: float | None
    """When the author's round began whose weights these are, in swarm time, if it told."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The next merge of one fragment, or of several at once: in which round of theirs, since when that goes on and when
    it should end, in swarm time, and whether that is more than a guess; `prepare` readies the merge of a fragment with
    its theta."""

    round: int
    began_s: tuple[float, ...]
    """Each fragment's."""
    ends_s: float
    prepare: Callable[[int, Sequence[Pulled]], Any]
    gradient_format: GradientFormat
    """Of its own pseudo-gradients: it takes others' to have the same."""
    is_sure: bool = True
    fragments: tuple[int, ...] = (0,)

    @property
    def started_s(self) -> float:
        """When the first of these rounds began."""
        return min(self.began_s)


@dataclass(frozen=True, kw_only=True)
class Ready:
    """A merge that is prepared."""

    round: int
    pulled: tuple[Pulled, ...]
    prepared: Any


@dataclass
class Lane:
    """What is here of one fragment of the model."""

    number: int
    ledger: Ledger
    partners: Partners
    open: OpenPulls
    rules: Mapping[Section, PublicationRules]
    sizes: Mapping[GradientFormat, SectionBytes]
    """By the format of pseudo-gradients, the coarsest first."""
    pulled: list[Pulled] = field(default_factory=list)
    plan: Plan | None = None
    """Of its next merge; None once it was merged, until that after it is planned."""
    began_s: float = -1.0
    """When its present round did."""
    pulled_for_s: float | None = None
    """When the merge of its present round was expected when the first pull for it began; None before."""
    merged_round: int = -1
    """The last that is over: it was merged."""
    ready: Ready | None = None
    merged: dict[str, Held] = field(default_factory=dict)
    turned_back: dict[tuple[str, Section], int] = field(default_factory=dict)
    """Whose counter turned back, and in which round of this peer that was seen."""

    def of_use(self, reference: int) -> list[Pulled]:
        """Of what was pulled: what may be merged still."""
        stays = self.ledger.stays_of_use
        return [each for each in self.pulled if stays(each.section, each.peer, each.mark, reference)]

    def has_more(self) -> bool:
        """Whether something was pulled that is in no merge that is prepared."""
        return bool(self.pulled) and (self.ready is None or self.ready.pulled != tuple(self.pulled))

    def here(self) -> list[Which]:
        """What was pulled, and of whom."""
        return [(pulled.section, pulled.peer) for pulled in self.pulled]

"""What gossip is told (events), and what it has its driver do (commands): data, so that a test compares lists.

`GossipEngine.receive` takes an event and answers with commands. Most commands end with an event of the same number.
Nobody changes them. They are not frozen: that makes each three times as dear, and a simulated round has a hundred.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, TypeAlias, TypeVar

from swarmtrain.protocol.gossip.merge_plans import MergePlan
from swarmtrain.protocol.gossip.partners import News, Place, PublicationVersion
from swarmtrain.protocol.gossip.pulls import Section
from swarmtrain.protocol.membership.membership import PeerInfo

__all__ = [
    "AdvertisedProgress",
    "AskPartner",
    "CancelPull",
    "ConsensusTaken",
    "DecodePublication",
    "DownloadPublication",
    "FetchConsensus",
    "FindRoute",
    "GossipCommand",
    "GossipEvent",
    "Held",
    "LinkRateAssumed",
    "MergeDue",
    "MergeFragment",
    "MergePrepared",
    "MergesPlanned",
    "PartnerBackedOff",
    "PartnerReplied",
    "PartnersChanged",
    "Payload",
    "PeerCalled",
    "PrepareMerge",
    "PublicationDecoded",
    "PublicationDownloaded",
    "PullFailed",
    "PullFailure",
    "PullTimerFired",
    "PullsPaused",
    "Ready",
    "ReceivedPublication",
    "ReportFailure",
    "RouteFound",
]

Held = TypeVar("Held")
"""A publication as the driver has it."""
Payload = TypeVar("Payload")
"""What of it can enter a merge."""
Ready = TypeVar("Ready")
"""A merge that is ready."""


@dataclass(kw_only=True, eq=False, slots=True)
class ReceivedPublication(Generic[Held, Payload]):
    """The weights or the pseudo-gradient of a partner, ready to enter a merge."""

    section: Section
    peer: str
    mark: PublicationVersion
    payload: Payload
    held: Held
    pull_s: float
    began_s: float | None
    """When the author's round of the fragment began, if it told."""


# ---------------------------------------------------------------- what happened


@dataclass(slots=True)
class PartnersChanged:
    """Others came, went, or told how far they are: these are the live ones that train, by PeerID."""

    volunteers: Sequence[PeerInfo]


@dataclass(slots=True)
class LinkRateAssumed:
    """Other transfers have shown that the link carries so much. It counts until the first pull is measured."""

    bytes_per_s: float


@dataclass(slots=True)
class MergesPlanned:
    """The trainer is in `round`, and these are its next merges; they replace all that were planned before."""

    round: int
    plans: Sequence[MergePlan]


@dataclass(slots=True)
class PullTimerFired:
    """It is time to look whether a pull is due; see `GossipEngine.wake_at`."""


@dataclass(slots=True)
class RouteFound:
    """Ends `FindRoute`: the author can be dialled, or only its hosts can."""

    pull: int
    is_direct: bool


@dataclass(slots=True)
class AdvertisedProgress:
    """How far a peer is in its round by its newest presence."""

    round: int
    inner_steps: int
    inner_steps_done: int
    steps_per_s: float
    since_s: float
    """Since when it is known to be so far."""


@dataclass(slots=True)
class PartnerReplied(Generic[Held]):
    """Ends `AskPartner`: the source has a publication at `mark`, or nothing newer than asked for (None)."""

    pull: int
    mark: PublicationVersion | None = None
    held: Held | None = None
    told: AdvertisedProgress | None = None
    """By its author, if that is known."""


@dataclass(slots=True)
class PullFailure:
    """Why nothing came. "busy": it serves as many as it may; "away": a host that is none; "silent": it gave no answer;
    "failed": anything else."""

    reason: str
    kind: Literal["busy", "away", "silent", "failed"] = "failed"
    is_incident: bool = False
    """A person is told who did it."""
    is_authors: bool = False
    """Its author did it, whoever was asked."""


@dataclass(slots=True)
class PullFailed:
    """Ends `AskPartner`, `DownloadPublication` or `DecodePublication` in vain."""

    pull: int
    failure: PullFailure


@dataclass(slots=True)
class PublicationDownloaded:
    """Ends `DownloadPublication`: all is here; `wrong`: what else its source did."""

    pull: int
    num_bytes: int
    wrong: PullFailure | None = None


@dataclass(slots=True)
class PublicationDecoded(Generic[Payload]):
    """Ends `DecodePublication`: this may enter a merge."""

    pull: int
    payload: Payload


@dataclass(slots=True)
class MergePrepared(Generic[Ready]):
    """Ends `PrepareMerge`; `merge` is None if these cannot be merged."""

    number: int
    merge: Ready | None


@dataclass(slots=True)
class MergeDue:
    """A fragment's round ends: answered by `MergeFragment` at once, or by `FetchConsensus` if `may_catch_up`."""

    round: int
    fragment: int = 0
    may_catch_up: bool = True


@dataclass(slots=True)
class ConsensusTaken:
    """This peer goes on in `round` from the mean of some states. `told`: up to where each peer is in each of them, by
    fragments; `rounds`: in which round each of their authors is."""

    round: int
    told: Sequence[Sequence[Mapping[str, Place]]]
    rounds: Mapping[str, int]


@dataclass(slots=True)
class PullsPaused:
    """Pull nothing more until more is planned."""


@dataclass(slots=True)
class PeerCalled:
    """`peer` has called this peer: after an outage it is asked again soon."""

    peer: str


GossipEvent: TypeAlias = (
    PartnersChanged
    | LinkRateAssumed
    | MergesPlanned
    | PullTimerFired
    | RouteFound
    | PartnerReplied[Held]
    | PullFailed
    | PublicationDownloaded
    | PublicationDecoded[Payload]
    | MergePrepared[Ready]
    | MergeDue
    | ConsensusTaken
    | PullsPaused
    | PeerCalled
)


# ---------------------------------------------------------------- what to do


@dataclass(slots=True)
class FindRoute:
    """Find out whether `peer`, which says that nobody can dial it, can be asked itself."""

    pull: int
    peer: str


@dataclass(slots=True)
class AskPartner:
    """Ask `source`, the author or a host of its, for what it has of a section newer than `known`."""

    pull: int
    source: str
    author: str
    section: Section
    fragment: int
    known: PublicationVersion | None


@dataclass(slots=True)
class DownloadPublication(Generic[Held]):
    """Get the bytes of what `source` has told of."""

    pull: int
    source: str
    held: Held


@dataclass(slots=True)
class DecodePublication(Generic[Held]):
    """Make of it what can enter a merge: check it, and take what is new of it."""

    pull: int
    author: str
    section: Section
    fragment: int
    held: Held
    news: News
    earlier: Held | None
    """What was merged of the same round; it is subtracted."""


@dataclass(slots=True)
class CancelPull:
    """Do nothing more for this pull."""

    pull: int


@dataclass(slots=True)
class PrepareMerge(Generic[Held, Payload]):
    """Prepare a merge of one fragment."""

    number: int
    plan: MergePlan
    fragment: int
    pulled: tuple[ReceivedPublication[Held, Payload], ...]


@dataclass(slots=True)
class MergeFragment(Generic[Held, Payload, Ready]):
    """Merge a fragment now; None: this peer's own round alone."""

    fragment: int
    merge: Ready | None = None
    pulled: tuple[ReceivedPublication[Held, Payload], ...] = ()


@dataclass(slots=True)
class FetchConsensus:
    """Take the others' weights, since this peer has fallen so many rounds behind them that nobody merges its own; where
    they cannot be had, ask again with `may_catch_up=False`."""

    rounds_behind: int


@dataclass(slots=True)
class ReportFailure:
    """Tell a person what `peer` did."""

    peer: str
    failure: PullFailure


@dataclass(slots=True)
class PartnerBackedOff:
    """For the log: why `peer` is not asked for a while."""

    peer: str
    follows: str


GossipCommand: TypeAlias = (
    FindRoute
    | AskPartner
    | DownloadPublication[Held]
    | DecodePublication[Held]
    | CancelPull
    | PrepareMerge[Held, Payload]
    | MergeFragment[Held, Payload, Ready]
    | FetchConsensus
    | ReportFailure
    | PartnerBackedOff
)

"""Events that the gossip engine takes, and commands that it answers with: plain data, so that tests compare lists.

`GossipEngine.receive` takes one event and returns the commands that follow from it. The caller executes them. Most
commands end with an event that carries the same number (`pull` or `number`).

Treat all messages as immutable. They are not frozen dataclasses: freezing makes creation three times as expensive, and
a simulated round creates about a hundred.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, TypeAlias, TypeVar

from swarmtrain.protocol.gossip.merge_plans import MergePlan
from swarmtrain.protocol.gossip.partners import News, Place, PublicationVersion
from swarmtrain.protocol.gossip.pulls import GroupName
from swarmtrain.protocol.membership.membership import PeerInfo

Held = TypeVar("Held")
"""Handle of a publication in the caller's storage; the engine only passes it on."""
Payload = TypeVar("Payload")
"""Decoded values of a publication that can enter a merge; opaque to the engine."""
Ready = TypeVar("Ready")
"""Prepared merge; opaque to the engine."""


@dataclass(kw_only=True, eq=False, slots=True)
class ReceivedPublication(Generic[Held, Payload]):
    """Weights or pseudo-gradient of a partner, decoded and ready to enter a merge."""

    group: GroupName
    peer: str
    version: PublicationVersion
    payload: Payload
    held: Held
    pull_s: float
    """Seconds from the request to the decoded values."""
    began_s: float | None
    """Time at which the author's round of the fragment began; None if the author did not say."""


# ---------------------------------------------------------------- what happened


@dataclass(slots=True)
class PartnersChanged:
    """The set of live peers that train has changed, or they advertised more progress: all of them, sorted by PeerID."""

    volunteers: Sequence[PeerInfo]


@dataclass(slots=True)
class LinkRateAssumed:
    """Other transfers have measured the link's rate. It is used until the first pull is measured."""

    bytes_per_s: float


@dataclass(slots=True)
class MergesPlanned:
    """Next merges of the trainer, which is in `round`. They replace all earlier plans."""

    round: int
    plans: Sequence[MergePlan]


@dataclass(slots=True)
class PullTimerFired:
    """The time that `GossipEngine.wake_at` asked for has come: check whether a pull is due."""


@dataclass(slots=True)
class RouteFound:
    """Ends `FindRoute`. `is_direct` is False if only the author's hosts can be dialled."""

    pull: int
    is_direct: bool


@dataclass(slots=True)
class AdvertisedProgress:
    """Progress of a peer within its round, from its newest presence record."""

    round: int
    inner_steps: int
    inner_steps_done: int
    steps_per_s: float
    since_s: float
    """Time since which the peer is known to be that far."""


@dataclass(slots=True)
class PartnerReplied(Generic[Held]):
    """Ends `AskPartner`. `version` is None if the source has nothing newer than was asked for."""

    pull: int
    version: PublicationVersion | None = None
    held: Held | None = None
    advertised: AdvertisedProgress | None = None
    """Progress that the author advertised; None if unknown."""


@dataclass(slots=True)
class PullFailure:
    """Reason why a pull failed.

    Values of `kind`:

    - "busy": the source serves as many readers as it may;
    - "away": the source does not serve as a host of that author;
    - "silent": the source gave no answer;
    - "failed": anything else.
    """

    reason: str
    kind: Literal["busy", "away", "silent", "failed"] = "failed"
    is_incident: bool = False
    """True if the user is told which peer is at fault."""
    is_authors: bool = False
    """True if the author is at fault, whichever peer served the publication."""
    code: str = ""
    """Code of the error."""


@dataclass(slots=True)
class PullFailed:
    """Ends `AskPartner`, `DownloadPublication` or `DecodePublication` without a result."""

    pull: int
    failure: PullFailure


@dataclass(slots=True)
class PublicationDownloaded:
    """Ends `DownloadPublication`: all bytes are here. `wrong` reports a fault of the source that did not stop the
    download."""

    pull: int
    num_bytes: int
    wrong: PullFailure | None = None


@dataclass(slots=True)
class PublicationDecoded(Generic[Payload]):
    """Ends `DecodePublication`: `payload` may enter a merge."""

    pull: int
    payload: Payload


@dataclass(slots=True)
class MergePrepared(Generic[Ready]):
    """Ends `PrepareMerge`. `merge` is None if the publications cannot be merged."""

    number: int
    merge: Ready | None


@dataclass(slots=True)
class MergeDue:
    """A fragment's round ends. The engine answers at once with `MergeFragment`, or with `FetchConsensus` if
    `may_catch_up`."""

    round: int
    fragment: int = 0
    may_catch_up: bool = True


@dataclass(slots=True)
class ConsensusTaken:
    """This peer continues in `round` from the mean of several peers' states.

    `advertised` lists, for each of those states and for each fragment, the place up to which it contains each peer's
    publications. `rounds` maps the authors of the states to the rounds that they are in.
    """

    round: int
    advertised: Sequence[Sequence[Mapping[str, Place]]]
    rounds: Mapping[str, int]


@dataclass(slots=True)
class PullsPaused:
    """Start no more pulls until merges are planned again."""


@dataclass(slots=True)
class PeerCalled:
    """`peer` has called this peer. After an outage this allows asking it again soon."""

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
    """Find out whether `peer`, which advertises that nobody can dial it, can be asked directly."""

    pull: int
    peer: str


@dataclass(slots=True)
class AskPartner:
    """Ask `source`, which is the author or one of its hosts, for anything newer than `known` of a tensor group."""

    pull: int
    source: str
    author: str
    group: GroupName
    fragment: int
    known: PublicationVersion | None


@dataclass(slots=True)
class DownloadPublication(Generic[Held]):
    """Download the publication that `source` offered."""

    pull: int
    source: str
    held: Held


@dataclass(slots=True)
class DecodePublication(Generic[Held]):
    """Check a downloaded publication, and decode the part of it that is new."""

    pull: int
    author: str
    group: GroupName
    fragment: int
    held: Held
    news: News
    earlier: Held | None
    """Publication of the same round that was merged before, to be subtracted; None if there is none."""


@dataclass(slots=True)
class CancelPull:
    """Stop all work for this pull."""

    pull: int


@dataclass(slots=True)
class PrepareMerge(Generic[Held, Payload]):
    """Prepare a merge of one fragment in the background."""

    number: int
    plan: MergePlan
    fragment: int
    pulled: tuple[ReceivedPublication[Held, Payload], ...]


@dataclass(slots=True)
class MergeFragment(Generic[Held, Payload, Ready]):
    """Merge a fragment now. If `merge` is None, merge this peer's own round alone."""

    fragment: int
    merge: Ready | None = None
    pulled: tuple[ReceivedPublication[Held, Payload], ...] = ()


@dataclass(slots=True)
class FetchConsensus:
    """Replace this peer's weights by the others', because it is so many rounds behind that nobody merges its
    publications.

    If the others' weights cannot be fetched, send `MergeDue` again with `may_catch_up=False`.
    """

    rounds_behind: int


@dataclass(slots=True)
class ReportFailure:
    """Tell the user what `peer` did wrong."""

    peer: str
    failure: PullFailure


@dataclass(slots=True)
class PartnerBackedOff:
    """Log why `peer` is not asked for a while."""

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

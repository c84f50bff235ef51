"""What happens to a peer in synchronous rounds, and what it is to do: the events and commands of `rounds.py`.

Data alone. Questions are numbered by the engine; whoever asks this peer, and whoever wants a state found, is numbered
by the driver. A publication's bytes are named by the hash in it, and a state by whom it comes from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Generic, TypeAlias, TypeVar

from swarmtrain.protocol.membership.membership import MembershipChange
from swarmtrain.protocol.rounds.chains import Link, ShownChain
from swarmtrain.protocol.rounds.rosters import AdvertisedRound, Roster, RoundPublication

Envelope = TypeVar("Envelope")
"""What a peer has signed, as it travels."""


@dataclass(frozen=True, slots=True)
class SignedRoster(Generic[Envelope]):
    """A roster whose signature was checked; `name` is what peers call what was signed."""

    roster: Roster
    signed: Envelope
    name: str


@dataclass(frozen=True, slots=True)
class RoundQuestion:
    """What do you know of `round`? It is held for `hold_s` if there is nothing that the asker lacks."""

    round: int
    hold_s: float = 0.0
    has_publication: bool = True
    """Yours of that round."""
    has_roster: str = ""
    """The name of the one that you told of last."""
    has_share: bool = True
    wants_chain: bool = False


@dataclass(frozen=True, slots=True)
class PeerReply(Generic[Envelope, Link]):
    """What another peer answers, its signatures checked."""

    told: AdvertisedRound
    inner_steps_done: int = 0
    away: bool = False
    last: SignedRoster[Envelope] | None = None
    """The one that it applied last, if it said so anew."""
    publication: RoundPublication | None = None
    roster: SignedRoster[Envelope] | None = None
    shown: ShownChain[Link] | None = None


# ---------------------------------------------------------------- events


@dataclass(frozen=True, slots=True)
class RoundTimerFired:
    """The time that was asked for has come."""


@dataclass(frozen=True, slots=True)
class MembersChanged:
    """Somebody came, left or was lost."""


@dataclass(frozen=True, slots=True)
class ProcessSuspended:
    """This process did not run until now: what it missed is nobody else's silence, and may be a round's end; nor are
    calls that failed anybody's fault, if it `forgives`."""

    forgives: bool = True


@dataclass(frozen=True, slots=True)
class RoundBegun:
    """The next round begins; a `guest` is waited for by nobody."""

    guest: bool


@dataclass(frozen=True, slots=True)
class Left:
    """This peer has said goodbye."""


@dataclass(frozen=True, slots=True)
class CameBack:
    """It is here again."""


@dataclass(frozen=True, slots=True)
class InnerStepsDone:
    """The inner steps of `round` are done, begun at `started_s`: this is what came of them."""

    round: int
    publication: RoundPublication
    started_s: float


@dataclass(frozen=True, slots=True)
class RoundAbandoned:
    """This peer does not want to end its round any more; or to know what this search finds."""

    search: int | None = None


@dataclass(frozen=True, slots=True)
class RoundAdvanced(Generic[Envelope]):
    """The outer step is done, or another's state was taken: this peer is in `round` now, after roster `last`."""

    round: int
    last: SignedRoster[Envelope] | None


@dataclass(frozen=True, slots=True)
class QuestionReceived:
    """Somebody asks."""

    call: int
    question: RoundQuestion


@dataclass(frozen=True, slots=True)
class QuestionDropped:
    """Who asked does not want to know any more."""

    call: int


@dataclass(frozen=True, slots=True)
class QuestionAnswered(Generic[Envelope, Link]):
    """A question is answered."""

    number: int
    reply: PeerReply[Envelope, Link]


@dataclass(frozen=True, slots=True)
class ReplyRefused:
    """The answer was malformed, and is not taken."""

    number: int


@dataclass(frozen=True, slots=True)
class QuestionFailed:
    """There is no answer."""

    number: int


@dataclass(frozen=True, slots=True)
class RosterSigned(Generic[Envelope]):
    """This peer has signed a roster."""

    roster: SignedRoster[Envelope]


@dataclass(frozen=True, slots=True)
class PublicationFound:
    """A publication on a roster that the merge had to look for."""

    publication: RoundPublication


@dataclass(frozen=True, slots=True)
class PublicationFetched:
    """A publication's bytes are here."""

    snapshot: str


@dataclass(frozen=True, slots=True)
class PublicationNotFetched:
    """Nobody delivers them."""

    snapshot: str


@dataclass(frozen=True, slots=True)
class ShareAveraged:
    """The share of a roster that this peer averages is made."""

    roster: str


@dataclass(frozen=True, slots=True)
class RosterMerged:
    """The mean over the roster of this digest is here."""

    roster: str


@dataclass(frozen=True, slots=True)
class RosterNotMerged:
    """It cannot be had: nobody could deliver the publications of `lacking`."""

    roster: str
    lacking: frozenset[str]


@dataclass(frozen=True, slots=True)
class SurveyPeers:
    """Ask these peers how far they are."""

    search: int
    peers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class SearchState:
    """Find the state that holds against ours and all others of those who `told` this; one that counts more than
    `above_tokens` tokens. Not `fetches`: only have them show how they came there."""

    search: int
    told: Mapping[str, AdvertisedRound]
    above_tokens: int = 0
    fetches: bool = True


@dataclass(frozen=True, slots=True)
class Join:
    """This peer comes, or comes back: find out from these peers, those that it knows, what it begins its next round
    with."""

    search: int
    peers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class StateAdopted:
    """The weights are now those of `source`: its round is under way, and this peer comes into it late."""

    search: int
    source: str


@dataclass(frozen=True, slots=True)
class StateOffered(Generic[Envelope]):
    """A state that was asked for is offered, after this roster."""

    number: int
    roster: SignedRoster[Envelope]


@dataclass(frozen=True, slots=True)
class StateNotFetched:
    """Its source has none, or does not deliver it."""

    number: int


@dataclass(frozen=True, slots=True)
class StateDownloaded:
    """The state that was offered is here, whole."""

    number: int


Event: TypeAlias = (
    RoundTimerFired
    | MembersChanged
    | ProcessSuspended
    | RoundBegun
    | Left
    | CameBack
    | InnerStepsDone
    | RoundAbandoned
    | RoundAdvanced[Envelope]
    | QuestionReceived
    | QuestionDropped
    | QuestionAnswered[Envelope, Link]
    | ReplyRefused
    | QuestionFailed
    | RosterSigned[Envelope]
    | PublicationFound
    | PublicationFetched
    | PublicationNotFetched
    | ShareAveraged
    | RosterMerged
    | RosterNotMerged
    | SurveyPeers
    | SearchState
    | Join
    | StateAdopted
    | StateOffered[Envelope]
    | StateNotFetched
    | StateDownloaded
)


# ---------------------------------------------------------------- commands


@dataclass(frozen=True, slots=True)
class AskRoundQuestion:
    """Ask `peer`; the answer is told with `number`."""

    number: int
    peer: str
    question: RoundQuestion


@dataclass(frozen=True, slots=True)
class DropRoundQuestion:
    """What was asked with this number, an answer or a state, is not waited for any more; `failed` if that counts as a
    call that failed."""

    number: int
    peer: str
    failed: bool = False


@dataclass(frozen=True, slots=True)
class AnswerRoundQuestion(Generic[Envelope]):
    """Answer a call: which of these things it lacks it has said with its question."""

    call: int
    question: RoundQuestion
    round: int
    participating: bool
    away: bool
    last: SignedRoster[Envelope] | None
    publication: RoundPublication | None
    roster: SignedRoster[Envelope] | None
    share: str
    """The digest of the roster of which this peer has averaged its share; "" if there is none."""


@dataclass(frozen=True, slots=True)
class FetchPublication:
    """Bring a publication's bytes here, from the first of `sources` that delivers them."""

    publication: RoundPublication
    sources: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class SignRoster:
    """Sign this roster; `RosterSigned` tells of it."""

    roster: Roster
    reason: str


@dataclass(frozen=True, slots=True)
class MergeRoster(Generic[Envelope]):
    """Average what this roster names."""

    roster: SignedRoster[Envelope]


@dataclass(frozen=True, slots=True)
class CancelMerge:
    """The mean is not wanted any more."""


@dataclass(frozen=True, slots=True)
class FinishRound(Generic[Envelope]):
    """The round is over: the mean over this roster is what holds."""

    roster: SignedRoster[Envelope]


@dataclass(frozen=True, slots=True)
class RequestState:
    """Have `source` offer its state of `min_round` or later."""

    number: int
    source: str
    min_round: int


@dataclass(frozen=True, slots=True)
class DownloadState:
    """Bring the state here that is offered."""

    number: int


@dataclass(frozen=True, slots=True)
class AdoptState:
    """The round is over: the state that was taken with this number holds."""

    number: int
    reason: str


@dataclass(frozen=True, slots=True)
class PeersSurveyed:
    """What they tell; those that do not answer are missing."""

    search: int
    told: Mapping[str, AdvertisedRound]


@dataclass(frozen=True, slots=True)
class StateSearched:
    """The state that was found was taken with `number`; None if the one that holds `is_ours`, or nobody delivers."""

    search: int
    is_ours: bool
    number: int | None


class JoinsWith(Enum):
    """What a peer that comes begins with."""

    OTHERS = "the state that was found"
    OWN = "what it has: that holds, or nobody else has merged a round, or it will catch up at its round's end"
    NOTHING_YET = "it tries again"
    NOTHING = "others have trained, it has nothing, and nobody delivers"


@dataclass(frozen=True, slots=True)
class JoinDecided:
    """How a join ended. The state that was found was taken with `number`; `told` is what those say that answered."""

    search: int
    begins: JoinsWith
    number: int | None
    told: Mapping[str, AdvertisedRound]


@dataclass(frozen=True, slots=True)
class NamePeer:
    """Tell the person that `peer` says what cannot be."""

    peer: str
    detail: str


@dataclass(frozen=True, slots=True)
class ReportChange:
    """Who is here has changed."""

    change: MembershipChange


Command: TypeAlias = (
    AskRoundQuestion
    | DropRoundQuestion
    | AnswerRoundQuestion[Envelope]
    | FetchPublication
    | SignRoster
    | MergeRoster[Envelope]
    | CancelMerge
    | FinishRound[Envelope]
    | RequestState
    | DownloadState
    | AdoptState
    | PeersSurveyed
    | StateSearched
    | JoinDecided
    | NamePeer
    | ReportChange
)

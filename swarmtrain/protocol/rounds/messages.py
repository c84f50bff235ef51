"""Events that the engine of synchronous rounds takes, and commands that it answers with; plain data.

Two numberings are in use. The engine numbers its questions and its requests for states; the caller numbers the calls
that this peer receives (`call`) and the searches that it orders (`search`). A publication's bytes are named by the hash
in the publication.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Generic, TypeAlias, TypeVar

from swarmtrain.protocol.membership.membership import MembershipChange
from swarmtrain.protocol.rounds.chains import Link, ShownChain
from swarmtrain.protocol.rounds.roles import LinkRates
from swarmtrain.protocol.rounds.rosters import AdvertisedRound, Roster, RoundPublication

Envelope = TypeVar("Envelope")
"""Signed message as it travels; opaque to the engine."""


@dataclass(frozen=True, slots=True)
class SignedRoster(Generic[Envelope]):
    """Roster whose signature was checked. `name` identifies the signed message: two signers of one roster give two
    names."""

    roster: Roster
    signed: Envelope
    name: str


@dataclass(frozen=True, slots=True)
class RoundQuestion:
    """Question to another peer: what do you know of `round`? If there is no news the answer is held back for
    `hold_s`."""

    round: int
    hold_s: float = 0.0
    has_publication: bool = True
    """True if the asker has the other peer's publication of that round."""
    has_roster: str = ""
    """Name of the roster that the other peer sent last; "" without any."""
    has_share: bool = True
    """True if the asker does not need to know whether the other peer has averaged its share."""
    share_piece: int = 0
    """Number of the piece of that share that the asker lacks."""
    wants_chain: bool = False
    """True if the other peer is asked to send the chain of rosters that led to the one it applied last."""


@dataclass(frozen=True, slots=True)
class PeerReply(Generic[Envelope, Link]):
    """Answer of another peer, with its signatures checked."""

    advertised: AdvertisedRound
    inner_steps_done: int = 0
    away: bool = False
    """True if the peer has said goodbye."""
    last: SignedRoster[Envelope] | None = None
    """Roster that the replying peer applied last; None if the asking peer has it already."""
    publication: RoundPublication | None = None
    roster: SignedRoster[Envelope] | None = None
    shown: ShownChain[Link] | None = None
    """Chain of rosters, if it was asked for and the replying peer can send it."""


# ---------------------------------------------------------------- events


@dataclass(frozen=True, slots=True)
class RoundTimerFired:
    """The time that `RoundEngine.wake_at` asked for has come."""


@dataclass(frozen=True, slots=True)
class MembersChanged:
    """A peer came, left or was lost."""


@dataclass(frozen=True, slots=True)
class ProcessSuspended:
    """This process was suspended until now, for example by a sleeping laptop.

    What it missed does not count as other peers' silence, and it may have missed a round's end. With `forgives`, calls
    that failed meanwhile are not held against anybody either.
    """

    forgives: bool = True


@dataclass(frozen=True, slots=True)
class RoundBegun:
    """The next round begins. Nobody waits for this peer in it if it is a late joiner."""

    is_late_joiner: bool


@dataclass(frozen=True, slots=True)
class Left:
    """This peer has said goodbye."""


@dataclass(frozen=True, slots=True)
class CameBack:
    """This peer has returned after a goodbye."""


@dataclass(frozen=True, slots=True)
class InnerStepsDone:
    """The inner steps of `round`, begun at `started_s`, are done; `publication` is their pseudo-gradient."""

    round: int
    publication: RoundPublication
    started_s: float


@dataclass(frozen=True, slots=True)
class RoundAbandoned:
    """The caller gives up the round's end or, if `search` is given, that search."""

    search: int | None = None


@dataclass(frozen=True, slots=True)
class RoundAdvanced(Generic[Envelope]):
    """The outer step is done or another peer's state was adopted: this peer is in `round` now, after roster `last`."""

    round: int
    last: SignedRoster[Envelope] | None


@dataclass(frozen=True, slots=True)
class QuestionReceived:
    """Another peer asks; `call` identifies the answer."""

    call: int
    question: RoundQuestion
    asker: str = ""
    """PeerID of the caller; "" if it is not known."""


@dataclass(frozen=True, slots=True)
class QuestionDropped:
    """The asker has hung up."""

    call: int


@dataclass(frozen=True, slots=True)
class QuestionAnswered(Generic[Envelope, Link]):
    """A question of this peer has an answer."""

    number: int
    reply: PeerReply[Envelope, Link]


@dataclass(frozen=True, slots=True)
class ReplyRefused:
    """The answer was malformed and is ignored."""

    number: int


@dataclass(frozen=True, slots=True)
class QuestionFailed:
    """A question of this peer has no answer."""

    number: int


@dataclass(frozen=True, slots=True)
class RosterSigned(Generic[Envelope]):
    """Ends `SignRoster`."""

    roster: SignedRoster[Envelope]


@dataclass(frozen=True, slots=True)
class PublicationFound:
    """The merge had to look for a publication on its roster, and found it."""

    publication: RoundPublication


@dataclass(frozen=True, slots=True)
class PublicationFetched:
    """The bytes of a publication, named by its hash, are here."""

    snapshot: str


@dataclass(frozen=True, slots=True)
class PublicationNotFetched:
    """No source delivers the bytes."""

    snapshot: str


@dataclass(frozen=True, slots=True)
class ShareAveraged:
    """This peer has averaged its share of the roster with that digest, or the first `pieces` pieces of it."""

    roster: str
    pieces: int = 1


@dataclass(frozen=True, slots=True)
class ShareJudged:
    """A share of `owner` has come, `in_time` or so late that this peer averaged it itself."""

    owner: str
    in_time: bool


@dataclass(frozen=True, slots=True)
class LinkMeasured:
    """This peer's own link, as measured by now."""

    rates: LinkRates


@dataclass(frozen=True, slots=True)
class RosterMerged:
    """The mean over the roster with that digest is here."""

    roster: str


@dataclass(frozen=True, slots=True)
class RosterNotMerged:
    """The mean cannot be computed: nobody delivers the publications of the `lacking` peers."""

    roster: str
    lacking: frozenset[str]


@dataclass(frozen=True, slots=True)
class SurveyPeers:
    """Ask these peers how far they are."""

    search: int
    peers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class SearchState:
    """Find the state that holds against this peer's and all others', among those of the peers in `advertised`.

    Only a state with more than `above_tokens` tokens counts. If `fetches` is False, only ask the peers for their
    chains.
    """

    search: int
    advertised: Mapping[str, AdvertisedRound]
    above_tokens: int = 0
    fetches: bool = True


@dataclass(frozen=True, slots=True)
class Join:
    """This peer joins or comes back: ask the peers that it knows, and decide what it begins its next round with."""

    search: int
    peers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class StateAdopted:
    """The weights are now those of peer `source`, whose round is under way: this peer joins that round late."""

    search: int
    source: str


@dataclass(frozen=True, slots=True)
class StateOffered(Generic[Envelope]):
    """A source offers the state that was requested; it follows this roster."""

    number: int
    roster: SignedRoster[Envelope]


@dataclass(frozen=True, slots=True)
class StateNotFetched:
    """The source has no such state, or does not deliver it."""

    number: int


@dataclass(frozen=True, slots=True)
class StateDownloaded:
    """The offered state has been downloaded completely."""

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
    | ShareJudged
    | LinkMeasured
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
    """Ask `peer`, and report the answer with `number`."""

    number: int
    peer: str
    question: RoundQuestion


@dataclass(frozen=True, slots=True)
class DropRoundQuestion:
    """Stop waiting for an answer or a state. If `failed`, count the question as a failed call."""

    number: int
    peer: str
    failed: bool = False


@dataclass(frozen=True, slots=True)
class AnswerRoundQuestion(Generic[Envelope]):
    """Answer a call of another peer, leaving out what the asker has already according to its question."""

    call: int
    question: RoundQuestion
    round: int
    participating: bool
    away: bool
    last: SignedRoster[Envelope] | None
    publication: RoundPublication | None
    roster: SignedRoster[Envelope] | None
    share: str
    """Digest of the roster of whose share this peer has averaged the piece that the asker lacks; "" without any."""


@dataclass(frozen=True, slots=True)
class FetchPublication:
    """Download a publication's bytes from the first of `sources` that delivers them."""

    publication: RoundPublication
    sources: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class SignRoster:
    """Sign this roster; ended by `RosterSigned`."""

    roster: Roster
    reason: str


@dataclass(frozen=True, slots=True)
class MergeRoster(Generic[Envelope]):
    """Average the publications on this roster."""

    roster: SignedRoster[Envelope]


@dataclass(frozen=True, slots=True)
class CancelMerge:
    """Stop averaging."""


@dataclass(frozen=True, slots=True)
class FinishRound(Generic[Envelope]):
    """The round is over: apply the mean over this roster."""

    roster: SignedRoster[Envelope]


@dataclass(frozen=True, slots=True)
class RequestState:
    """Ask `source` to offer its state of `min_round` or later."""

    number: int
    source: str
    min_round: int


@dataclass(frozen=True, slots=True)
class DownloadState:
    """Download the offered state."""

    number: int


@dataclass(frozen=True, slots=True)
class AdoptState:
    """The round is over: adopt the state that was downloaded with this number."""

    number: int
    reason: str


@dataclass(frozen=True, slots=True)
class PeersSurveyed:
    """Ends `SurveyPeers`: what the peers advertise; those that did not answer are missing."""

    search: int
    advertised: Mapping[str, AdvertisedRound]


@dataclass(frozen=True, slots=True)
class StateSearched:
    """Ends `SearchState`. `number` is that of the downloaded state. It is None if this peer's own state holds
    (`is_ours`), or if nobody delivers the one that does."""

    search: int
    is_ours: bool
    number: int | None


class JoinsWith(Enum):
    """State with which a joining peer begins."""

    OTHERS = "the state that was found"
    OWN = "what it has: that holds, or nobody else has merged a round, or it will catch up at its round's end"
    NOTHING_YET = "it tries again"
    NOTHING = "others have trained, it has nothing, and nobody delivers"


@dataclass(frozen=True, slots=True)
class JoinDecided:
    """Ends `Join`. `number` is that of the downloaded state, if any; `advertised` is what the peers advertise that
    answered."""

    search: int
    begins: JoinsWith
    number: int | None
    advertised: Mapping[str, AdvertisedRound]


@dataclass(frozen=True, slots=True)
class NamePeer:
    """Tell the user that `peer` claims something impossible."""

    peer: str
    detail: str
    code: str
    """The error's code, such as `bad-tokens`."""


@dataclass(frozen=True, slots=True)
class ReportChange:
    """Report a change of the membership."""

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

"""What happens to a peer in synchronous rounds, and what it is to do: the events and commands of `rounds.py`.

Data alone. Questions are numbered by the engine; whoever asks this peer, and whoever wants a state found, is numbered
by the driver. A publication's bytes are named by the hash in it, and a state by whom it comes from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Generic, TypeAlias, TypeVar

from swarmtrain.protocol.chains import Link, ShownChain
from swarmtrain.protocol.lifecycle import Change
from swarmtrain.protocol.rosters import Publication, Roster, Told

Envelope = TypeVar("Envelope")
"""What a peer has signed, as it travels."""


@dataclass(frozen=True, slots=True)
class SignedRoster(Generic[Envelope]):
    """A roster whose signature was checked; `name` is what peers call what was signed."""

    roster: Roster
    signed: Envelope
    name: str


@dataclass(frozen=True, slots=True)
class Question:
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
class Reply(Generic[Envelope, Link]):
    """What another peer answers, its signatures checked."""

    told: Told
    inner_steps_done: int = 0
    away: bool = False
    last: SignedRoster[Envelope] | None = None
    """The one that it applied last, if it said so anew."""
    publication: Publication | None = None
    roster: SignedRoster[Envelope] | None = None
    shown: ShownChain[Link] | None = None


# ---------------------------------------------------------------- events


@dataclass(frozen=True, slots=True)
class Woke:
    """The time that was asked for has come."""


@dataclass(frozen=True, slots=True)
class PeersChanged:
    """Somebody came, left or was lost."""


@dataclass(frozen=True, slots=True)
class StoodStill:
    """This process did not run until now: what it missed is nobody else's silence, and may be a round's end; nor are
    calls that failed anybody's fault, if it `forgives`."""

    forgives: bool = True


@dataclass(frozen=True, slots=True)
class Begun:
    """The next round begins; a `guest` is waited for by nobody."""

    guest: bool


@dataclass(frozen=True, slots=True)
class Left:
    """This peer has said goodbye."""


@dataclass(frozen=True, slots=True)
class CameBack:
    """It is here again."""


@dataclass(frozen=True, slots=True)
class Ended:
    """The inner steps of `round` are done, begun at `started_s`: this is what came of them."""

    round: int
    publication: Publication
    started_s: float


@dataclass(frozen=True, slots=True)
class GivenUp:
    """This peer does not want to end its round any more; or to know what this search finds."""

    search: int | None = None


@dataclass(frozen=True, slots=True)
class Advanced(Generic[Envelope]):
    """The outer step is done, or another's state was taken: this peer is in `round` now, after roster `last`."""

    round: int
    last: SignedRoster[Envelope] | None


@dataclass(frozen=True, slots=True)
class Asked:
    """Somebody asks."""

    call: int
    question: Question


@dataclass(frozen=True, slots=True)
class HungUp:
    """Who asked does not want to know any more."""

    call: int


@dataclass(frozen=True, slots=True)
class Answered(Generic[Envelope, Link]):
    """A question is answered."""

    number: int
    reply: Reply[Envelope, Link]


@dataclass(frozen=True, slots=True)
class Refused:
    """The answer was malformed, and is not taken."""

    number: int


@dataclass(frozen=True, slots=True)
class Failed:
    """There is no answer."""

    number: int


@dataclass(frozen=True, slots=True)
class Signed(Generic[Envelope]):
    """This peer has signed a roster."""

    roster: SignedRoster[Envelope]


@dataclass(frozen=True, slots=True)
class Found:
    """A publication on a roster that the merge had to look for."""

    publication: Publication


@dataclass(frozen=True, slots=True)
class Brought:
    """A publication's bytes are here."""

    snapshot: str


@dataclass(frozen=True, slots=True)
class NotBrought:
    """Nobody delivers them."""

    snapshot: str


@dataclass(frozen=True, slots=True)
class Shared:
    """The share of a roster that this peer averages is made."""

    roster: str


@dataclass(frozen=True, slots=True)
class Merged:
    """The mean over the roster of this digest is here."""

    roster: str


@dataclass(frozen=True, slots=True)
class NotMerged:
    """It cannot be had: nobody could deliver the publications of `lacking`."""

    roster: str
    lacking: frozenset[str]


@dataclass(frozen=True, slots=True)
class Survey:
    """Ask these peers how far they are."""

    search: int
    peers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Seek:
    """Find the state that holds against ours and all others of those who `told` this; one that counts more than
    `above_tokens` tokens. Not `fetches`: only have them show how they came there."""

    search: int
    told: Mapping[str, Told]
    above_tokens: int = 0
    fetches: bool = True


@dataclass(frozen=True, slots=True)
class Join:
    """This peer comes, or comes back: find out from these peers, those that it knows, what it begins its next round
    with."""

    search: int
    peers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class TookState:
    """The weights are now those of `source`: its round is under way, and this peer comes into it late."""

    search: int
    source: str


@dataclass(frozen=True, slots=True)
class Offered(Generic[Envelope]):
    """A state that was asked for is offered, after this roster."""

    number: int
    roster: SignedRoster[Envelope]


@dataclass(frozen=True, slots=True)
class NotFetched:
    """Its source has none, or does not deliver it."""

    number: int


@dataclass(frozen=True, slots=True)
class Taken:
    """The state that was offered is here, whole."""

    number: int


Event: TypeAlias = (
    Woke
    | PeersChanged
    | StoodStill
    | Begun
    | Left
    | CameBack
    | Ended
    | GivenUp
    | Advanced[Envelope]
    | Asked
    | HungUp
    | Answered[Envelope, Link]
    | Refused
    | Failed
    | Signed[Envelope]
    | Found
    | Brought
    | NotBrought
    | Shared
    | Merged
    | NotMerged
    | Survey
    | Seek
    | Join
    | TookState
    | Offered[Envelope]
    | NotFetched
    | Taken
)


# ---------------------------------------------------------------- commands


@dataclass(frozen=True, slots=True)
class Ask:
    """Ask `peer`; the answer is told with `number`."""

    number: int
    peer: str
    question: Question


@dataclass(frozen=True, slots=True)
class HangUp:
    """What was asked with this number, an answer or a state, is not waited for any more; `failed` if that counts as a
    call that failed."""

    number: int
    peer: str
    failed: bool = False


@dataclass(frozen=True, slots=True)
class Answer(Generic[Envelope]):
    """Answer a call: which of these things it lacks it has said with its question."""

    call: int
    question: Question
    round: int
    participating: bool
    away: bool
    last: SignedRoster[Envelope] | None
    publication: Publication | None
    roster: SignedRoster[Envelope] | None
    share: str
    """The digest of the roster of which this peer has averaged its share; "" if there is none."""


@dataclass(frozen=True, slots=True)
class Bring:
    """Bring a publication's bytes here, from the first of `sources` that delivers them."""

    publication: Publication
    sources: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Sign:
    """Sign this roster; `Signed` tells of it."""

    roster: Roster
    reason: str


@dataclass(frozen=True, slots=True)
class Merge(Generic[Envelope]):
    """Average what this roster names."""

    roster: SignedRoster[Envelope]


@dataclass(frozen=True, slots=True)
class GiveUpMerge:
    """The mean is not wanted any more."""


@dataclass(frozen=True, slots=True)
class Finish(Generic[Envelope]):
    """The round is over: the mean over this roster is what holds."""

    roster: SignedRoster[Envelope]


@dataclass(frozen=True, slots=True)
class Fetch:
    """Have `source` offer its state of `min_round` or later."""

    number: int
    source: str
    min_round: int


@dataclass(frozen=True, slots=True)
class Take:
    """Bring the state here that is offered."""

    number: int


@dataclass(frozen=True, slots=True)
class Adopt:
    """The round is over: the state that was taken with this number holds."""

    number: int
    reason: str


@dataclass(frozen=True, slots=True)
class Surveyed:
    """What they tell; those that do not answer are missing."""

    search: int
    told: Mapping[str, Told]


@dataclass(frozen=True, slots=True)
class Sought:
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
class Joined:
    """How a join ended. The state that was found was taken with `number`; `told` is what those say that answered."""

    search: int
    begins: JoinsWith
    number: int | None
    told: Mapping[str, Told]


@dataclass(frozen=True, slots=True)
class Name:
    """Tell the person that `peer` says what cannot be."""

    peer: str
    detail: str


@dataclass(frozen=True, slots=True)
class Report:
    """Who is here has changed."""

    change: Change


Command: TypeAlias = (
    Ask
    | HangUp
    | Answer[Envelope]
    | Bring
    | Sign
    | Merge[Envelope]
    | GiveUpMerge
    | Finish[Envelope]
    | Fetch
    | Take
    | Adopt
    | Surveyed
    | Sought
    | Joined
    | Name
    | Report
)

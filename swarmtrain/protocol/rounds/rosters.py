"""Synchronous rounds without an all-reduce: who signs the roster, who is waited for, what is applied.

Everyone publishes its pseudo-gradient of round r. The live peer with the lowest PeerID signs the roster, a list
of (peer, snapshot hash, tokens); after `silence_s` without a word from it the next lowest does. Everyone averages
the same hashes in the same order, so that the results are bit-identical and anyone can recompute them.

A roster names its `base`, the digest of the roster before it. The digest of the last roster therefore names the
weights, and a roster fits only those who hold its base: applying it to other weights would part the swarm for good.
Rosters of one base are totally ordered (`better_roster`): the one signed by the lower PeerID holds, of two by one
signer the later attempt. Which of two chains of rosters holds is decided in `chains.py`, by what their peers signed, so
that a peer that was cut off and went on alone never takes a whole swarm's work back. Everyone moves up in that order
only, hence all end at the same weights.

Pure: the state of the world is a `RoundView`, the answer a decision that carries its reason. The peer and the
simulator drive the same `decide`.
"""

from __future__ import annotations

import hashlib
import heapq
import itertools
import math
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property

__all__ = [
    "AdvertisedRound",
    "ApplyDecision",
    "CatchUpDecision",
    "Decision",
    "Roster",
    "RoundPublication",
    "RoundView",
    "SignDecision",
    "Standing",
    "Standings",
    "WaitDecision",
    "better_roster",
    "decide",
    "idled",
    "is_silent",
    "joining_steps",
    "peers_to_ask",
    "pulls_whole",
    "round_steps",
    "share_due_s",
    "share_ranges",
    "sources_of",
    "standing",
    "standings",
    "steps_of_round",
    "worst_roster",
]


@dataclass(frozen=True, kw_only=True)
class RoundPublication:
    """A pseudo-gradient offered for a round: `snapshot` is the hash of its manifest, hex; `base` the digest of the
    roster that led to the weights it starts from ("" before the first)."""

    peer: str
    snapshot: str
    tokens: int
    inner_steps: int
    base: str = ""


@dataclass(frozen=True, kw_only=True)
class Roster:
    """Whose pseudo-gradients make round `round`, in PeerID order; signed by `signer`.

    `base` is the digest of the roster before it and `base_tokens` what all rosters up to that one counted, as the
    signer says: who knows the base knows better.
    """

    round: int
    signer: str
    entries: tuple[RoundPublication, ...]
    attempt: int = 0
    base: str = ""
    base_tokens: int = 0

    @cached_property
    def peers(self) -> tuple[str, ...]:
        """The PeerIDs on it, in order."""
        return tuple(entry.peer for entry in self.entries)

    @cached_property
    def tokens(self) -> int:
        """All tokens on it."""
        return sum(entry.tokens for entry in self.entries)

    @property
    def total_tokens(self) -> int:
        """What the run has counted once this roster is applied."""
        return self.base_tokens + self.tokens

    @cached_property
    def digest(self) -> str:
        """Names the weights that come of it, hex. Signer and attempt are left out: they change nothing."""
        lines = [f"{self.round} {self.base}", *(f"{e.peer} {e.snapshot} {e.tokens}" for e in self.entries)]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class AdvertisedRound:
    """What another peer last told of itself: the round it is in and the roster it applied last."""

    round: int
    last: Roster | None
    participating: bool = True
    """False in the first round of a joiner, and of one that caught up: nobody waits for that round's gradient."""


class Standing(Enum):
    """How another volunteer stands to this one."""

    WITH_US = "with us"
    """Same weights and round: it is waited for as long as it answers, and may sign."""
    BEHIND = "behind"
    """One roster behind: it may be about to come, and is waited for as if it were silent."""
    GUEST = "guest"
    """Asked, counted if it publishes in time, waited for only while its published bytes come."""
    AHEAD = "ahead"
    """It has applied the roster that this peer needs now."""
    FAR_AHEAD = "far ahead"
    """Its weights hold and this peer cannot reach them by one roster: they must be fetched."""


@dataclass(frozen=True, kw_only=True)
class RoundView:
    """What a peer knows about a round that it has ended itself. Times in seconds of the caller's clock."""

    me: str
    round: int
    ended_at_s: float
    """When its own inner steps ended."""
    deadline_s: float
    """When the round is closed whoever is missing."""
    silence_s: float
    share_above: int
    live: frozenset[str]
    """Volunteers believed alive that stand `WITH_US` or `BEHIND`, or of whom nothing is known yet; without `me`."""
    behind: frozenset[str] = frozenset()
    """Those of `live` that stand `BEHIND`."""
    base: str = ""
    """Digest of the roster applied last: rosters and publications with another base are not ours."""
    guest: bool = False
    """Whether this peer itself is a guest in this round: it signs only when nobody else is left."""
    guests: frozenset[str] = frozenset()
    """Volunteers that stand as `GUEST`."""
    ahead: frozenset[str] = frozenset()
    """Volunteers that stand `AHEAD`: they hold the roster, or its result."""
    applied: frozenset[str] = frozenset()
    """The digests of the rosters that those have applied: without this peer, if its own is not among them."""
    far_ahead: frozenset[str] = frozenset()
    """Volunteers that stand `FAR_AHEAD`, less those whose state could not be had."""
    announced: Mapping[str, RoundPublication] = field(default_factory=dict)
    """Publications known by their manifest, own included."""
    held: frozenset[str] = frozenset()
    """Peers whose publication's bytes this peer holds, own included."""
    rosters: Sequence[Roster] = ()
    """Rosters of this round whose signatures were checked."""
    heard_at_s: Mapping[str, float] = field(default_factory=dict)
    asked_at_s: Mapping[str, float] | None = None
    """When each peer was first asked about this round: nobody is silent who was not asked. None: all at its end."""
    answered_at_s: Mapping[str, float] = field(default_factory=dict)
    """When each peer was asked what it has answered since."""
    listening_since_s: float = -math.inf
    """Since when this process has run without a gap: after a pause nobody else was silent, it was deaf."""
    unobtainable: frozenset[str] = frozenset()
    """Peers whose bytes nobody could deliver."""
    idle: frozenset[str] = frozenset()
    """Peers that had their turn to sign lately and let it pass (`protocol.rounds.signers`): waited for, no signers."""

    @cached_property
    def candidates(self) -> list[str]:
        """Who may sign, in the order of their turns; sorted once, though two decisions look at it."""
        others = self.live - self.idle
        return sorted(others if self.guest else others | {self.me})


@dataclass(frozen=True, kw_only=True)
class WaitDecision:
    """Nothing to do before `until_s` unless there is news."""

    until_s: float
    reason: str


@dataclass(frozen=True, kw_only=True)
class SignDecision:
    """Sign this roster and apply it."""

    entries: tuple[RoundPublication, ...]
    attempt: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class ApplyDecision:
    """Average these hashes."""

    roster: Roster
    reason: str


@dataclass(frozen=True, kw_only=True)
class CatchUpDecision:
    """The others are done with this round: take their roster, or the state that came of it."""

    sources: tuple[str, ...]
    reason: str


Decision = WaitDecision | SignDecision | ApplyDecision | CatchUpDecision


def _rank(roster: Roster) -> tuple[str, int, str]:
    """Sorts the roster that holds first. The digest makes the order total (a signer that lost its memory)."""
    return (roster.signer, -roster.attempt, roster.digest)


def better_roster(rosters: Sequence[Roster]) -> Roster | None:
    """Of those with one base the one that holds: the lowest signer's, then the latest attempt."""
    return min(rosters, key=_rank, default=None)


def worst_roster(rosters: Sequence[Roster]) -> Roster | None:
    """The one that all the others hold against: the last in the order of `better_roster`."""
    return max(rosters, key=_rank, default=None)


def standing(
    applied: Roster | None, round: int, told: AdvertisedRound, holds: Callable[[Roster | None], bool]
) -> Standing:
    """How a volunteer that told `told` stands to a peer in `round` that applied `applied` last. `holds` says which
    rosters' weights hold against its own (`ChainView.holds`)."""
    base = "" if applied is None else applied.digest
    if holds(told.last):
        assert told.last is not None
        fits = told.last.round == round and told.last.base == base
        return Standing.AHEAD if fits else Standing.FAR_AHEAD
    their_base = "" if told.last is None else told.last.digest
    if their_base == base:
        return Standing.WITH_US if told.participating or told.round != round else Standing.GUEST
    one_behind = applied is not None and their_base == applied.base and told.round == round - 1
    return Standing.BEHIND if one_behind else Standing.GUEST


@dataclass(frozen=True, kw_only=True)
class Standings:
    """How the other volunteers stand to one, and which rosters those ahead of it have applied (their digests)."""

    of: Mapping[Standing, frozenset[str]]
    applied: frozenset[str]


def standings(
    applied: Roster | None,
    round: int,
    told: Mapping[str, tuple[float, AdvertisedRound] | None],
    *,
    since_s: float,
    undeliverable: Container[str],
    holds: Callable[[Roster | None], bool],
) -> Standings:
    """How the others stand to a peer in `round` that applied `applied` last, by what they told and when.

    What was told before `since_s`, the start of the round, says nothing any more, unless its roster holds against
    ours. Of whom nothing is known is with us. The weights of the `undeliverable` could not be had: they are guests.
    """
    with_us, their_last = set(told), set[str]()
    rest: dict[Standing, set[str]] = {kind: set() for kind in Standing}
    for peer, one in told.items():
        if one is None or (one[0] < since_s and not holds(one[1].last)):
            continue
        last_told = one[1]
        kind = standing(applied, round, last_told, holds)
        if kind is Standing.WITH_US:
            continue
        if peer in undeliverable and kind in (Standing.AHEAD, Standing.FAR_AHEAD):
            kind = Standing.GUEST
        with_us.discard(peer)
        rest[kind].add(peer)
        if kind is Standing.AHEAD and last_told.last is not None:
            their_last.add(last_told.last.digest)
    rest[Standing.WITH_US] = with_us
    return Standings(of={kind: frozenset(some) for kind, some in rest.items()}, applied=frozenset(their_last))


def _silence_ends_s(view: RoundView, peer: str, now: float) -> float:
    """When `peer` will have been silent for long enough, should nothing be heard from it."""
    deaf = peer in view.behind or peer in view.guests  # what they say keeps nobody waiting
    heard_at_s = -math.inf if deaf else view.heard_at_s.get(peer, -math.inf)
    return _silence_after_s(view, peer, heard_at_s, unasked_s=now)


def is_silent(view: RoundView, peer: str, now: float) -> bool:
    """Whether `peer` was asked about this round and has not said a word since for `silence_s`.

    The question to it is given up at the round's end, and must then count as one that failed: a process that stands
    still behind a daemon that answers the dial would else cost every round a silence.
    """
    return now >= _silence_after_s(view, peer, view.heard_at_s.get(peer, -math.inf), unasked_s=math.inf)


def _silence_after_s(view: RoundView, peer: str, heard_s: float, unasked_s: float) -> float:
    """When `peer`, last heard at `heard_s`, will have been silent for long enough; `unasked_s` stands in for when it
    was asked if it was not."""
    asked_s = view.ended_at_s if view.asked_at_s is None else view.asked_at_s.get(peer, unasked_s)
    return max(view.ended_at_s, view.listening_since_s, asked_s, heard_s) + view.silence_s


@dataclass(frozen=True)
class _Turn:
    """Whose turn it is to sign, and when that ends; before it these were silent, and those let theirs pass."""

    signer: str
    ends_s: float
    passed_over: frozenset[str]
    idled: frozenset[str]


def _turn(view: RoundView, now: float) -> _Turn:
    """A turn ends with the candidate's silence; at this peer's time limit if the candidate has not published; and
    `silence_s` after it, one candidate after the other, if it has published, answers and yet does not sign.
    """
    passed_over: set[str] = set()
    idled: set[str] = set()
    for candidate in view.candidates:
        if candidate == view.me:
            break
        closes_s = view.deadline_s
        if candidate in view.announced:
            closes_s += view.silence_s * (1 + len(passed_over))
        silent_s = _silence_ends_s(view, candidate, now)
        if now < min(silent_s, closes_s):
            return _Turn(candidate, min(silent_s, closes_s), frozenset(passed_over), frozenset(idled))
        passed_over.add(candidate)
        if candidate in view.announced and now < silent_s:
            idled.add(candidate)
    return _Turn(view.me, math.inf, frozenset(passed_over), frozenset(idled))


def _asks_since_s(view: RoundView) -> float:
    """Since when this peer asks before it decides: since it stood still after its round, or has ended that only when
    its time limit was over, as who stood still within it."""
    if view.listening_since_s > view.ended_at_s:
        return view.listening_since_s
    return view.ended_at_s if view.ended_at_s >= view.deadline_s else -math.inf


def _unheard(view: RoundView, now: float) -> frozenset[str]:
    """Who is asked and has not yet said how things stand since this process stood still, or came too late: the others
    may have signed without it and gone on, and what it signs or merges now would count for nobody."""
    since_s = _asks_since_s(view)
    if not since_s <= now < since_s + view.silence_s:
        return frozenset()
    heard = {peer for peer, asked_s in view.answered_at_s.items() if asked_s >= since_s}
    return (view.live | view.guests).intersection(peers_to_ask(view, now)) - heard


def idled(view: RoundView, now: float) -> frozenset[str]:
    """Who had its turn to sign to the end: it has published, it answers, and it does not sign."""
    return _turn(view, now).idled


def decide(view: RoundView, now: float) -> Decision:
    """What to do now about a round that this peer has ended."""
    if view.far_ahead:
        return CatchUpDecision(sources=tuple(sorted(view.far_ahead)), reason="weights that hold are beyond this round")
    if unheard := _unheard(view, now):
        why = "has stood still" if view.listening_since_s > view.ended_at_s else "is later than the time limit"
        reason = f"this process {why}: it asks {', '.join(sorted(unheard))} what happened meanwhile"
        return WaitDecision(until_s=_asks_since_s(view) + view.silence_s, reason=reason)
    fitting = [roster for roster in view.rosters if roster.round == view.round and roster.base == view.base]
    roster = better_roster([roster for roster in fitting if view.unobtainable.isdisjoint(roster.peers)])
    own_only = roster is not None and roster.signer == view.me and roster.digest not in view.applied
    if roster is not None and not (view.ahead and (own_only or roster != better_roster(fitting))):
        return ApplyDecision(roster=roster, reason=f"signed by {roster.signer}")
    if view.ahead:
        return CatchUpDecision(sources=tuple(sorted(view.ahead)), reason="others have finished this round")
    turn = _turn(view, now)
    if turn.signer != view.me:
        return WaitDecision(until_s=turn.ends_s, reason=f"{turn.signer} signs the roster")
    return _sign_or_wait(view, turn.passed_over, now)


def _sign_or_wait(view: RoundView, passed_over: frozenset[str], now: float) -> Decision:
    ready = _ready(view)
    entries = tuple(view.announced[peer] for peer in sorted(ready))
    assert view.me in ready, "a peer that has ended its round has published, and holds what it published"
    attempts = [r.attempt for r in view.rosters if r.signer == view.me and r.base == view.base]
    if attempts:
        lacking = ", ".join(sorted(view.unobtainable))
        return SignDecision(entries=entries, attempt=1 + max(attempts), reason=f"nobody could deliver {lacking}")
    coming = frozenset(p for p in view.guests if p in view.announced and view.announced[p].base == view.base)
    wanted = (view.live | coming) - ready - passed_over - view.unobtainable
    ends_s = {peer: _silence_ends_s(view, peer, now) for peer in wanted}
    missing = sorted(peer for peer, end_s in ends_s.items() if now < end_s)
    if not missing:
        return SignDecision(entries=entries, attempt=0, reason="everyone alive has published")
    if now >= view.deadline_s:
        return SignDecision(entries=entries, attempt=0, reason=f"time limit; without {', '.join(missing)}")
    until_s = min([view.deadline_s, *(ends_s[peer] for peer in missing)])
    return WaitDecision(until_s=until_s, reason=f"waiting for {', '.join(missing)}")


def _ready(view: RoundView) -> frozenset[str]:
    """Who may go on a roster. In a small group, those whose bytes the signer holds, so that they stay obtainable
    whoever dies; with shares nobody holds everything, and the manifest of somebody believed alive must do."""
    announced = _announced(view)
    if pulls_whole(view):
        announced &= view.held
    else:
        announced &= view.held | view.live | view.guests
    return announced - view.unobtainable


def _announced(view: RoundView) -> frozenset[str]:
    return frozenset(peer for peer, offer in view.announced.items() if offer.base == view.base)


def pulls_whole(view: RoundView) -> bool:
    """Whether the group is small: everyone pulls every publication, and a roster lists what its signer holds. Guests
    count once they have published."""
    return max(len(view.live) + 1, len(_announced(view))) <= view.share_above


def peers_to_ask(view: RoundView, now: float) -> list[str]:
    """Whom to ask about the round. Small groups: everyone, so that bytes can be fetched before the roster comes.
    Larger ones: the signer asks everyone, the others only whoever may sign."""
    ahead = view.ahead | view.far_ahead
    everyone = view.live | view.guests | ahead
    turn = _turn(view, now)
    if len(everyone) + 1 <= view.share_above or turn.signer == view.me:
        return sorted(everyone)
    candidates = view.live - turn.passed_over - view.idle
    return sorted({*heapq.nsmallest(2, candidates), *heapq.nsmallest(2, ahead)})


def share_ranges(num_chunks: int, num_peers: int) -> list[range]:
    """Cut chunks into one contiguous range a peer, in roster order, sizes differing by one at most."""
    bounds = [num_chunks * i // num_peers for i in range(num_peers + 1)]
    return [range(a, b) for a, b in itertools.pairwise(bounds)]


def share_due_s(roster_at_s: float, own_share_at_s: float, silence_s: float) -> float:
    """Until when to wait for the shares of owners that answer: then their shares are averaged from the hashes.

    `roster_at_s` is when the roster came, `own_share_at_s` when the own share of it was averaged. An owner may lack
    bytes that nobody can give it; it then never has a share, though it lives.
    """
    return own_share_at_s + max(silence_s, 2 * (own_share_at_s - roster_at_s))


def joining_steps(inner_steps: int, others_done: Sequence[int]) -> tuple[int, str]:
    """Inner steps of a first round (joined, or caught up), so that nobody waits for it; with the reason.

    It ends a sixteenth of a round before the fastest other's does, for its bytes must reach the signer in time.
    """
    if not others_done or max(others_done) == 0:
        return inner_steps, "nobody else has begun this round"
    least = math.ceil(inner_steps / 16)
    steps = max(least, inner_steps - least - max(others_done))
    return steps, f"the others have done up to {max(others_done)} of {inner_steps} steps"


def round_steps(inner_steps: int, others_done: Sequence[int]) -> tuple[int, str]:
    """Inner steps of the round after a roster was applied; with the reason.

    All of them, unless this peer applied it so late that others are past half of the round: then it comes along as a
    guest, or it would be a round behind for ever. `others_done` is of those who are in that round already.
    """
    if max(others_done, default=0) <= inner_steps / 2:
        return inner_steps, "a whole round"
    return joining_steps(inner_steps, others_done)


def steps_of_round(inner_steps: int, round: int, others: Iterable[tuple[int, int]], *, fresh: bool) -> tuple[int, str]:
    """Inner steps of `round`, with the reason; fewer than `inner_steps` for one that comes late. `others` says which
    round each of them is in, and how many steps it has done there; `fresh` is the first round with weights that were
    taken from others, or read from the disk."""
    others = list(others)
    others_done = [done for its_round, done in others if its_round == round]
    if not fresh:
        return round_steps(inner_steps, others_done)
    if any(its_round > round for its_round, _ in others):
        others_done.append(inner_steps)  # the round is over already
    return joining_steps(inner_steps, others_done)


def sources_of(roster: Roster, author: str) -> list[str]:
    """Where to pull a publication on a roster from: its author, the signer, then everyone on it."""
    return list(dict.fromkeys([author, roster.signer, *roster.peers]))

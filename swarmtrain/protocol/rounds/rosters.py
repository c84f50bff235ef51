"""Rules of synchronous rounds: who signs the roster, who is waited for, and which roster is applied.

There is no all-reduce. Everyone publishes its pseudo-gradient of round r. The live peer with the lowest PeerID signs
the roster, a list of (peer, snapshot hash, tokens); if it is silent for `silence_s`, the next lowest does. Everyone
averages the same hashes in the same order, so that the results are bit-identical and anyone can recompute them.

A roster names its `base`, the digest of the roster before it. So the digest of the last roster names the weights, and a
roster fits only peers that hold its base: applying it to other weights would split the swarm for good. Rosters with one
base are totally ordered (`better_roster`): the one signed by the lower PeerID holds, and of one signer's the later
attempt. Which of two chains of rosters holds is decided in `chains.py` by what their peers have signed, so that a peer
that was cut off and continued alone never undoes a whole swarm's work. Everyone changes weights only in that order,
hence all end at the same weights.

Everything here is pure: a `RoundView` describes the situation, and the answer is a decision with its reason. The real
peer and the simulator use the same `decide`.
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

from swarmtrain.protocol.rounds.roles import equal_shares

_ASKING_SILENCES = 3
"""Multiple of `silence_s` after the time limit for which candidates are asked for the first time one after the other.
Without it, peers that say that they are there and answer nothing could hold up a round: identities cost nothing."""


@dataclass(frozen=True, kw_only=True)
class RoundPublication:
    """Pseudo-gradient that a peer offers for a round.

    `snapshot` is the SHA-256 of its manifest in hex; `base` is the digest of the roster whose weights it starts from,
    "" before the first.
    """

    peer: str
    snapshot: str
    tokens: int
    inner_steps: int
    base: str = ""


@dataclass(frozen=True, kw_only=True)
class Roster:
    """List of the pseudo-gradients that make round `round`, in PeerID order, signed by `signer`.

    `base` is the digest of the roster before it. `base_tokens` is what all rosters up to that one counted, as the
    signer claims; whoever knows the base checks it.
    """

    round: int
    signer: str
    entries: tuple[RoundPublication, ...]
    attempt: int = 0
    base: str = ""
    base_tokens: int = 0
    shares: tuple[int, ...] = ()
    """Chunks of the mean that each of the entries' peers averages (`roles.divide`); empty for equal shares."""

    @cached_property
    def peers(self) -> tuple[str, ...]:
        """PeerIDs of the entries, in order."""
        return tuple(entry.peer for entry in self.entries)

    @cached_property
    def tokens(self) -> int:
        """Sum of the entries' tokens."""
        return sum(entry.tokens for entry in self.entries)

    @property
    def total_tokens(self) -> int:
        """Tokens of the run once this roster is applied."""
        return self.base_tokens + self.tokens

    @cached_property
    def digest(self) -> str:
        """SHA-256, in hex, that names the resulting weights. Signer, attempt and shares are left out, since they change
        nothing."""
        lines = [f"{self.round} {self.base}", *(f"{e.peer} {e.snapshot} {e.tokens}" for e in self.entries)]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class AdvertisedRound:
    """Position of another peer according to its last answer: its round, and the roster that it applied last."""

    round: int
    last: Roster | None
    participating: bool = True
    """False in the first round of a joiner, or after catching up: nobody waits for that round's gradient."""


class Standing(Enum):
    """Relation of another volunteer to this one."""

    WITH_US = "with us"
    """Same weights and round: it is waited for while it answers, and it may sign."""
    BEHIND = "behind"
    """One roster behind: it may be about to advance, and is waited for as if it were silent."""
    LATE_JOINER = "late joiner"
    """Late joiner: it is asked, it counts if it publishes in time, and is waited for only while its published bytes
    arrive."""
    AHEAD = "ahead"
    """It has applied the roster that this peer needs now."""
    FAR_AHEAD = "far ahead"
    """Its weights hold, and one roster does not lead there from this peer's: they must be fetched."""


@dataclass(frozen=True, kw_only=True)
class RoundView:
    """Situation in a round whose inner steps this peer has done, for `decide`. Times are seconds of the
    caller's clock."""

    me: str
    round: int
    ended_at_s: float
    """Time when this peer's own inner steps ended."""
    deadline_s: float
    """Time when the round is closed, whoever is missing."""
    silence_s: float
    share_above: int
    live: frozenset[str]
    """Volunteers believed alive that stand `WITH_US` or `BEHIND`, or of which nothing is known yet; without `me`."""
    behind: frozenset[str] = frozenset()
    """Members of `live` that stand `BEHIND`."""
    base: str = ""
    """Digest of the roster applied last. Rosters and publications with another base do not fit."""
    is_late_joiner: bool = False
    """True if this peer is a late joiner in this round: it signs only if nobody else is left."""
    late_joiners: frozenset[str] = frozenset()
    """Volunteers that stand as `LATE_JOINER`."""
    ahead: frozenset[str] = frozenset()
    """Volunteers that stand `AHEAD`: they hold the roster, or its result."""
    applied: frozenset[str] = frozenset()
    """Digests of the rosters that the peers `ahead` have applied."""
    far_ahead: frozenset[str] = frozenset()
    """Volunteers that stand `FAR_AHEAD`, without those whose state could not be fetched."""
    announced: Mapping[str, RoundPublication] = field(default_factory=dict)
    """Publications whose manifests are known, by author, this peer's included."""
    held: frozenset[str] = frozenset()
    """Peers whose publications' bytes are here, this peer included."""
    rosters: Sequence[Roster] = ()
    """Rosters of this round whose signatures were checked."""
    heard_at_s: Mapping[str, float] = field(default_factory=dict)
    """Time when each peer last said anything."""
    asked_at_s: Mapping[str, float] | None = None
    """Time when each peer was first asked about this round; a peer that was not asked is not silent. None: all at the
    end of this peer's inner steps."""
    answered_at_s: Mapping[str, float] = field(default_factory=dict)
    """Time at which each peer's last answered question was asked."""
    listening_since_s: float = -math.inf
    """Time since which this process has run without a gap. After a suspension the others were not silent; this process
    was."""
    unobtainable: frozenset[str] = frozenset()
    """Peers whose bytes nobody delivers."""
    idle: frozenset[str] = frozenset()
    """Peers that recently missed their turn to sign (`signers.py`): they are waited for, but not as signers."""

    @cached_property
    def candidates(self) -> list[str]:
        """Peers that may sign, in the order of their turns; cached, because two decisions need it."""
        others = self.live - self.idle
        return sorted(others if self.is_late_joiner else others | {self.me})


@dataclass(frozen=True, kw_only=True)
class WaitDecision:
    """Decision to do nothing before `until_s` unless there is news."""

    until_s: float
    reason: str


@dataclass(frozen=True, kw_only=True)
class SignDecision:
    """Decision to sign a roster with these entries, and apply it."""

    entries: tuple[RoundPublication, ...]
    attempt: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class ApplyDecision:
    """Decision to average the publications on this roster."""

    roster: Roster
    reason: str


@dataclass(frozen=True, kw_only=True)
class CatchUpDecision:
    """Decision to take the others' roster, or the state after it, from one of `sources`, because they have finished
    this round."""

    sources: tuple[str, ...]
    reason: str


Decision = WaitDecision | SignDecision | ApplyDecision | CatchUpDecision
"""Next action of a peer that has done its inner steps of a round."""


def _rank(roster: Roster) -> tuple[str, int, str, tuple[int, ...]]:
    """Return a sort key that puts the roster that holds first.

    The digest and the shares make the order total even for a signer that has lost its memory and signed the same
    attempt twice.
    """
    return (roster.signer, -roster.attempt, roster.digest, roster.shares)


def better_roster(rosters: Sequence[Roster]) -> Roster | None:
    """Return the roster that holds among those with one base: the lowest signer's, then the latest attempt."""
    return min(rosters, key=_rank, default=None)


def worst_roster(rosters: Sequence[Roster]) -> Roster | None:
    """Return the roster that all others hold against: the last in the order of `better_roster`."""
    return max(rosters, key=_rank, default=None)


def standing(
    applied: Roster | None, round: int, advertised: AdvertisedRound, holds: Callable[[Roster | None], bool]
) -> Standing:
    """Return how a volunteer that advertises `advertised` stands to a peer in `round` that applied `applied` last.

    `holds` says whether a roster's weights hold against this peer's (`ChainView.holds`).
    """
    base = "" if applied is None else applied.digest
    if holds(advertised.last):
        assert advertised.last is not None
        fits = advertised.last.round == round and advertised.last.base == base
        return Standing.AHEAD if fits else Standing.FAR_AHEAD
    their_base = "" if advertised.last is None else advertised.last.digest
    if their_base == base:
        return Standing.WITH_US if advertised.participating or advertised.round != round else Standing.LATE_JOINER
    one_behind = applied is not None and their_base == applied.base and advertised.round == round - 1
    return Standing.BEHIND if one_behind else Standing.LATE_JOINER


@dataclass(frozen=True, kw_only=True)
class Standings:
    """Other volunteers by their standing, and the digests of the rosters that those `AHEAD` have applied."""

    of: Mapping[Standing, frozenset[str]]
    applied: frozenset[str]


def standings(
    applied: Roster | None,
    round: int,
    advertised: Mapping[str, tuple[float, AdvertisedRound] | None],
    *,
    since_s: float,
    undeliverable: Container[str],
    holds: Callable[[Roster | None], bool],
) -> Standings:
    """Sort the other volunteers by their standing to a peer in `round` that applied `applied` last.

    What a peer said before `since_s`, the start of the round, is out of date unless its roster holds against ours. A
    peer of which nothing is known stands `WITH_US`. Peers whose weights could not be fetched (`undeliverable`) count as
    `LATE_JOINER`.
    """
    with_us, their_last = set(advertised), set[str]()
    rest: dict[Standing, set[str]] = {kind: set() for kind in Standing}
    for peer, one in advertised.items():
        if one is None or (one[0] < since_s and not holds(one[1].last)):
            continue
        last_told = one[1]
        kind = standing(applied, round, last_told, holds)
        if kind is Standing.WITH_US:
            continue
        if peer in undeliverable and kind in (Standing.AHEAD, Standing.FAR_AHEAD):
            kind = Standing.LATE_JOINER
        with_us.discard(peer)
        rest[kind].add(peer)
        if kind is Standing.AHEAD and last_told.last is not None:
            their_last.add(last_told.last.digest)
    rest[Standing.WITH_US] = with_us
    return Standings(of={kind: frozenset(some) for kind, some in rest.items()}, applied=frozenset(their_last))


def _silence_ends_s(view: RoundView, peer: str, now: float) -> float:
    """Return the time at which `peer` will have been silent for long enough, if it says nothing more."""
    deaf = peer in view.behind or peer in view.late_joiners  # their answers do not extend the wait
    heard_at_s = -math.inf if deaf else view.heard_at_s.get(peer, -math.inf)
    return _silence_after_s(view, peer, heard_at_s, unasked_s=now)


def is_silent(view: RoundView, peer: str, now: float) -> bool:
    """Return whether `peer` was asked about this round and has not said anything for `silence_s` since.

    At the round's end the question to a silent peer is given up, and must then count as a failed call. Otherwise a
    suspended process behind a daemon that still accepts the dial would cost every round a silence.
    """
    return now >= _silence_after_s(view, peer, view.heard_at_s.get(peer, -math.inf), unasked_s=math.inf)


def _silence_after_s(view: RoundView, peer: str, heard_s: float, unasked_s: float) -> float:
    """Return the time at which `peer`, which last said anything at `heard_s`, has been silent for `silence_s`.

    `unasked_s` replaces the time of the question if the peer was not asked.
    """
    asked_s = view.ended_at_s if view.asked_at_s is None else view.asked_at_s.get(peer, unasked_s)
    return max(view.ended_at_s, view.listening_since_s, asked_s, heard_s) + view.silence_s


@dataclass(frozen=True)
class _Turn:
    """Turn to sign: whose it is, and when it ends.

    `passed_over`: earlier candidates that were silent or too late; `idled`: those of them that let their turn pass.
    """

    signer: str
    ends_s: float
    passed_over: frozenset[str]
    idled: frozenset[str]


def _turn(view: RoundView, now: float) -> _Turn:
    """Return whose turn it is to sign.

    A candidate's turn ends when it has been silent for `silence_s`. If it has not published, the turn ends at this
    peer's time limit, or once it has had time to answer for the first time, but not long after the limit
    (`_ASKING_SILENCES`). If it has published and answers but does not sign, the turn ends `silence_s` after the limit,
    plus `silence_s` for each candidate that was passed over before.
    """
    passed_over: set[str] = set()
    idled: set[str] = set()
    for candidate in view.candidates:
        if candidate == view.me:
            break
        most_s = view.deadline_s + _ASKING_SILENCES * view.silence_s
        closes_s = max(view.deadline_s, min(_first_answer_due_s(view, candidate, now), most_s))
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
    """Return since when this peer must ask before it decides; -inf if it need not.

    It must after a suspension, and if it ended its steps after the time limit, which has the same effect.
    """
    if view.listening_since_s > view.ended_at_s:
        return view.listening_since_s
    return view.ended_at_s if view.ended_at_s >= view.deadline_s else -math.inf


def _unheard(view: RoundView, now: float) -> frozenset[str]:
    """Return the peers that this peer must ask after a suspension or a late end of its inner steps, and that have not
    answered since.

    They may have signed a roster without this peer and continued; a roster that it signs now would then count for
    nobody (decision 35).
    """
    since_s = _asks_since_s(view)
    if not since_s <= now < since_s + view.silence_s:
        return frozenset()
    heard = {peer for peer, asked_s in view.answered_at_s.items() if asked_s >= since_s}
    return (view.live | view.late_joiners).intersection(peers_to_ask(view, now)) - heard


def idled(view: RoundView, now: float) -> frozenset[str]:
    """Return the peers that missed their turn to sign: they have published and they answer, but do not sign."""
    return _turn(view, now).idled


def decide(view: RoundView, now: float) -> Decision:
    """Decide what to do now about a round whose inner steps this peer has done."""
    if view.far_ahead:
        return CatchUpDecision(sources=tuple(sorted(view.far_ahead)), reason="the agreed weights are beyond this round")
    if unheard := _unheard(view, now):
        why = "was suspended" if view.listening_since_s > view.ended_at_s else "is past the time limit"
        reason = f"this process {why}: asking {', '.join(sorted(unheard))} what happened meanwhile"
        return WaitDecision(until_s=_asks_since_s(view) + view.silence_s, reason=reason)
    fitting = [roster for roster in view.rosters if roster.round == view.round and roster.base == view.base]
    roster = better_roster([roster for roster in fitting if view.unobtainable.isdisjoint(roster.peers)])
    # If the others have applied another roster of this round, this peer's own gives way although it ranks first:
    # otherwise many would have to give up a round for one (decision 35).
    if roster is not None and (
        not view.ahead
        or roster.digest in view.applied
        or (roster.signer != view.me and roster == better_roster(fitting))
    ):
        return ApplyDecision(roster=roster, reason=f"signed by {roster.signer}")
    if view.ahead:
        return CatchUpDecision(sources=tuple(sorted(view.ahead)), reason="others have finished this round")
    turn = _turn(view, now)
    if turn.signer != view.me:
        return WaitDecision(until_s=turn.ends_s, reason=f"{turn.signer} signs the roster")
    return _sign_or_wait(view, turn.passed_over, now)


def _sign_or_wait(view: RoundView, passed_over: frozenset[str], now: float) -> Decision:
    """Sign for all peers that are ready, or wait for those that may still come. Called when it is this peer's turn."""
    ready = _ready(view)
    entries = tuple(view.announced[peer] for peer in sorted(ready))
    assert view.me in ready, "a peer that has ended its round has published, and holds what it published"
    # This peer signs a second time only if bytes on its first roster cannot be had.
    attempts = [r.attempt for r in view.rosters if r.signer == view.me and r.base == view.base]
    if attempts:
        lacking = ", ".join(sorted(view.unobtainable))
        return SignDecision(entries=entries, attempt=1 + max(attempts), reason=f"nobody could deliver {lacking}")
    coming = frozenset(p for p in view.late_joiners if p in view.announced and view.announced[p].base == view.base)
    passed_over = frozenset(peer for peer in passed_over if now >= _first_answer_due_s(view, peer, now))
    wanted = (view.live | coming) - ready - passed_over - view.unobtainable
    ends_s = {peer: _silence_ends_s(view, peer, now) for peer in wanted}
    missing = sorted(peer for peer, end_s in ends_s.items() if now < end_s)
    if not missing:
        return SignDecision(entries=entries, attempt=0, reason="everyone alive has published")
    if now >= view.deadline_s:
        asked_s = {peer: end_s for peer in missing if now < (end_s := _first_answer_due_s(view, peer, now))}
        if not asked_s:
            return SignDecision(entries=entries, attempt=0, reason=f"time limit; without {', '.join(missing)}")
        reason = f"the time limit is over: asking {', '.join(asked_s)} for the first time"
        return WaitDecision(until_s=min(asked_s.values()), reason=reason)
    until_s = min([view.deadline_s, *(ends_s[peer] for peer in missing)])
    return WaitDecision(until_s=until_s, reason=f"waiting for {', '.join(missing)}")


def _first_answer_due_s(view: RoundView, peer: str, now: float) -> float:
    """Return the time until which `peer` may answer for the first time about this round; -inf if it has answered.

    In a large group only the lowest are asked, so that a peer whose turn to sign comes at the time limit has heard of
    nobody else's publication by then. Each has as long to answer as one that was asked at the end of this peer's steps,
    and `silence_s` at most.
    """
    if view.asked_at_s is None or peer in view.answered_at_s:
        return -math.inf
    limit_s = min(view.silence_s, view.deadline_s - view.ended_at_s)
    return view.asked_at_s.get(peer, now) + max(limit_s, 0.0)


def _ready(view: RoundView) -> frozenset[str]:
    """Return the peers that may go on a roster.

    In a small group these are the peers whose bytes the signer holds, so that the bytes remain available whoever dies
    (decision 4). In a group with shares nobody holds everything, and the manifest of a peer believed alive is enough.
    """
    announced = _announced(view)
    if pulls_whole(view):
        announced &= view.held
    else:
        announced &= view.held | view.live | view.late_joiners
    return announced - view.unobtainable


def _announced(view: RoundView) -> frozenset[str]:
    return frozenset(peer for peer, offer in view.announced.items() if offer.base == view.base)


def pulls_whole(view: RoundView) -> bool:
    """Return whether the group is small: everyone pulls every publication, and a roster lists what its signer holds.

    Late joiners count too, since they publish soon, and so do those that hold the roster already: where everyone begins
    to pull everything because some of the group are late, the slowest link carries all that once more for each peer.
    """
    group = view.live | view.late_joiners | view.ahead
    return max(len(group) + 1, len(_announced(view))) <= view.share_above


def peers_to_ask(view: RoundView, now: float) -> list[str]:
    """Return the peers to ask about the round.

    In a small group everyone asks everyone, so that bytes arrive before the roster does. In a larger one the signer
    asks everyone, and the others ask only the two lowest that may sign, two of those ahead, and the authors of what
    they could not get: an author that hung may deliver it now.
    """
    ahead = view.ahead | view.far_ahead
    everyone = view.live | view.late_joiners | ahead
    turn = _turn(view, now)
    if len(everyone) + 1 <= view.share_above or turn.signer == view.me:
        return sorted(everyone)
    candidates = view.live - turn.passed_over - view.idle
    lacking = everyone & view.unobtainable
    return sorted({*heapq.nsmallest(2, candidates), *heapq.nsmallest(2, ahead), *lacking})


def share_ranges(num_chunks: int, num_peers: int, shares: Sequence[int] = ()) -> list[range]:
    """Cut chunks into one contiguous range for each peer, in roster order: of the sizes `shares`, or without them of
    sizes that differ by at most one."""
    sizes = shares or equal_shares(num_chunks, [True] * num_peers)
    return [range(a, b) for a, b in itertools.pairwise([0, *itertools.accumulate(sizes)])]


def joining_steps(inner_steps: int, others_done: Sequence[int]) -> tuple[int, str]:
    """Return (the inner steps of a first round after joining or catching up, the reason). Nobody waits for that round.

    It ends a sixteenth of a round before the fastest other peer's, because its bytes must reach the signer in time.
    """
    if not others_done or max(others_done) == 0:
        return inner_steps, "nobody else has begun this round"
    least = math.ceil(inner_steps / 16)
    steps = max(least, inner_steps - least - max(others_done))
    return steps, f"the others have done up to {max(others_done)} of {inner_steps} steps"


def round_steps(inner_steps: int, others_done: Sequence[int]) -> tuple[int, str]:
    """Return (the inner steps of the round after a roster was applied, the reason).

    All of them, unless this peer applied the roster so late that others are past half of the round. Then it takes part
    as a late joiner; otherwise it would stay a round behind. `others_done` is of the peers that are in that round
    already.
    """
    if max(others_done, default=0) <= inner_steps / 2:
        return inner_steps, "a whole round"
    return joining_steps(inner_steps, others_done)


def steps_of_round(inner_steps: int, round: int, others: Iterable[tuple[int, int]], *, fresh: bool) -> tuple[int, str]:
    """Return (the inner steps of `round`, the reason): fewer than `inner_steps` for a peer that comes late.

    `others` has the round of each other peer and the steps that it claims to have done there. `fresh`: this is the
    first round with weights that came from another peer or from the disk.

    The furthest fifth of the others (rounded down, at least one) is left out, as in `reference_speed`, unless there are
    fewer than three: claims cost nothing, and if the highest were believed, one liar could shorten everybody's round.
    Peers in earlier rounds count, with no steps, so that a liar does not stand alone when a round begins.
    """
    ahead = inner_steps if fresh else 0  # those ahead have ended this round already
    claims = sorted(done if its == round else ahead * (its > round) for its, done in others)
    num_left_out = max(1, len(claims) // 5) if len(claims) >= 3 else 0
    believed = claims[: len(claims) - num_left_out]
    return joining_steps(inner_steps, believed) if fresh else round_steps(inner_steps, believed)


def sources_of(roster: Roster, author: str) -> list[str]:
    """Return where to pull a publication on a roster from: its author, the signer, then everyone on the roster."""
    return list(dict.fromkeys([author, roster.signer, *roster.peers]))

"""Synchronous rounds without an all-reduce: who signs the roster, who is waited for, what is applied.

Everyone publishes its pseudo-gradient of round r. The live peer with the lowest PeerID signs the roster, a list
of (peer, snapshot hash, tokens); after `silence_s` without a word from it the next lowest does. Everyone averages
the same hashes in the same order, so that the results are bit-identical and anyone can recompute them. Of two
rosters of one round the one signed by the lower PeerID holds; of two by one signer, the later attempt.

Pure: the state of the world is a `RoundView`, the answer a decision that carries its reason. The peer and the
simulator drive the same `decide`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

__all__ = [
    "Apply",
    "CatchUp",
    "Decision",
    "Publication",
    "Roster",
    "RoundView",
    "Sign",
    "Wait",
    "better_roster",
    "decide",
    "joining_steps",
    "must_refetch",
    "peers_to_ask",
    "share_ranges",
]


@dataclass(frozen=True, kw_only=True)
class Publication:
    """A pseudo-gradient offered for a round: `snapshot` is the hash of its manifest, hex."""

    peer: str
    snapshot: str
    tokens: int
    inner_steps: int


@dataclass(frozen=True, kw_only=True)
class Roster:
    """Whose pseudo-gradients make round `round`, in PeerID order; signed by `signer`."""

    round: int
    signer: str
    entries: tuple[Publication, ...]
    attempt: int = 0

    @property
    def peers(self) -> tuple[str, ...]:
        """The PeerIDs on it, in order."""
        return tuple(entry.peer for entry in self.entries)

    @property
    def tokens(self) -> int:
        """All tokens on it."""
        return sum(entry.tokens for entry in self.entries)


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
    """Volunteers believed alive that take part in this round or an earlier one; without `me`."""
    ahead: frozenset[str] = frozenset()
    """Volunteers known to be in a later round: they hold the roster, or its result."""
    announced: Mapping[str, Publication] = field(default_factory=dict)
    """Publications known by their manifest, own included."""
    held: frozenset[str] = frozenset()
    """Peers whose publication's bytes this peer holds, own included."""
    rosters: Sequence[Roster] = ()
    """Rosters of this round whose signatures were checked."""
    heard_at_s: Mapping[str, float] = field(default_factory=dict)
    unobtainable: frozenset[str] = frozenset()
    """Peers on the roster whose bytes nobody could deliver."""


@dataclass(frozen=True, kw_only=True)
class Wait:
    """Nothing to do before `until_s` unless there is news."""

    until_s: float
    reason: str


@dataclass(frozen=True, kw_only=True)
class Sign:
    """Sign this roster and apply it."""

    entries: tuple[Publication, ...]
    attempt: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class Apply:
    """Average these hashes."""

    roster: Roster
    reason: str


@dataclass(frozen=True, kw_only=True)
class CatchUp:
    """The others are done with this round: take their roster, or the state that came of it."""

    sources: tuple[str, ...]
    reason: str


Decision = Wait | Sign | Apply | CatchUp


def better_roster(rosters: Sequence[Roster]) -> Roster | None:
    """The one that holds: the lowest signer's, and of that signer the latest attempt."""
    if not rosters:
        return None
    lowest = min(roster.signer for roster in rosters)
    return max((roster for roster in rosters if roster.signer == lowest), key=lambda roster: roster.attempt)


def must_refetch(applied: Roster, heard: Roster) -> bool:
    """Whether a peer that applied `applied` has to fetch the state of those who applied `heard`."""
    return heard.round == applied.round and heard != applied and better_roster([applied, heard]) == heard


def _signer(view: RoundView, now: float) -> tuple[str, float, list[str]]:
    """The peer whose turn it is to sign, when its silence ends that turn, and who was passed over."""
    passed_over: list[str] = []
    for candidate in sorted(view.live | {view.me}):
        if candidate == view.me:
            return candidate, math.inf, passed_over
        turn_ends_s = _silence_ends_s(view, candidate)
        if now < turn_ends_s:
            return candidate, turn_ends_s, passed_over
        passed_over.append(candidate)
    raise AssertionError("the own PeerID is always a candidate")


def _silence_ends_s(view: RoundView, peer: str) -> float:
    return max(view.ended_at_s, view.heard_at_s.get(peer, -math.inf)) + view.silence_s


def decide(view: RoundView, now: float) -> Decision:
    """What to do now about a round that this peer has ended."""
    mine = [r for r in view.rosters if r.signer == view.me]
    roster = better_roster(view.rosters)
    if roster is not None:
        lacking = view.unobtainable & frozenset(roster.peers)
        if not lacking:
            return Apply(roster=roster, reason=f"signed by {roster.signer}")
        if roster.signer == view.me:
            entries = tuple(entry for entry in roster.entries if entry.peer not in lacking)
            attempt = 1 + max(r.attempt for r in mine)
            return Sign(entries=entries, attempt=attempt, reason=f"nobody could deliver {', '.join(sorted(lacking))}")
    if view.ahead:
        return CatchUp(sources=tuple(sorted(view.ahead)), reason="others have finished this round")
    signer, turn_ends_s, passed_over = _signer(view, now)
    if signer != view.me:
        return Wait(until_s=turn_ends_s, reason=f"{signer} signs the roster")
    ready = _ready(view)
    missing = sorted(view.live - ready - frozenset(passed_over))
    missing = [peer for peer in missing if now < _silence_ends_s(view, peer)]
    entries = tuple(view.announced[peer] for peer in sorted(ready) if peer not in view.unobtainable)
    if not missing:
        return Sign(entries=entries, attempt=len(mine), reason="everyone alive has published")
    if now >= view.deadline_s:
        return Sign(entries=entries, attempt=len(mine), reason=f"time limit; without {', '.join(missing)}")
    until_s = min([view.deadline_s, *(_silence_ends_s(view, peer) for peer in missing)])
    return Wait(until_s=until_s, reason=f"waiting for {', '.join(missing)}")


def _ready(view: RoundView) -> frozenset[str]:
    """Who may go on a roster. In a small group, those whose bytes the signer holds, so that they stay obtainable
    whoever dies; with shares nobody holds everything, and a manifest must do."""
    announced = frozenset(view.announced)
    if max(len(view.live) + 1, len(announced)) > view.share_above:
        return announced
    return announced & view.held


def peers_to_ask(view: RoundView, now: float) -> list[str]:
    """Whom to ask about the round. Small groups: everyone, so that bytes can be fetched before the roster comes.
    Larger ones: the signer asks everyone, the others only whoever may sign."""
    everyone = sorted(view.live | view.ahead)
    signer, _, passed_over = _signer(view, now)
    if len(everyone) + 1 <= view.share_above or signer == view.me:
        return everyone
    candidates = [peer for peer in everyone if peer not in passed_over]
    return sorted({*candidates[:2], *sorted(view.ahead)[:2]})


def share_ranges(num_chunks: int, num_peers: int) -> list[range]:
    """Cut chunks into one contiguous range a peer, in roster order, sizes differing by one at most."""
    bounds = [num_chunks * i // num_peers for i in range(num_peers + 1)]
    return [range(a, b) for a, b in itertools.pairwise(bounds)]


def joining_steps(inner_steps: int, others_done: Sequence[int]) -> tuple[int, str]:
    """Inner steps of a joiner's first round, so that nobody waits for it; with the reason."""
    if not others_done:
        return inner_steps, "nobody else is in this round"
    least = max(1, math.ceil(inner_steps / 16))
    steps = max(least, inner_steps - max(others_done))
    return steps, f"the others have done up to {max(others_done)} of {inner_steps} steps"

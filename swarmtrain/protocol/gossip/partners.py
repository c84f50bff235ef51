"""Whom to pull from, and what of it is new: gossip by publish and pull (`pulls` says when, and how much).

A peer publishes its round in parts: part 1, 2, ... carry the pseudo-gradient and the tokens since the round began. Who
merged an earlier part takes the differences of both, so that each inner step of a peer enters another's merge at most
once; the weights enter as they are. The `Ledger` remembers what was merged, and goes with the weights that it speaks
of: into the checkpoint, and with a state to whoever takes that.

Partners are drawn among the live peers. What a peer announces of itself is a hint that may be a third of a presence's
lifetime old: who has nothing new is asked only when nobody else is left. Nothing here waits for anybody.

Pure: `now` is an argument, chance is a generator that its owner gives, every answer carries its reason.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import TypeAlias

from swarmtrain.protocol.gossip.pulls import Section

__all__ = [
    "VARIANTS",
    "BackOff",
    "Candidate",
    "Delta",
    "Full",
    "Ledger",
    "News",
    "Partners",
    "Place",
    "PublicationVersion",
    "Stale",
    "WeightsOnly",
    "agreed_places",
    "is_too_old",
    "left_behind",
    "median_round",
    "rounds_behind",
]

_MAX_PEERS = 4096
"""So many peers are remembered: identities cost nothing."""


# ---------------------------------------------------------------- what is new


@dataclass(frozen=True, slots=True)
class PublicationVersion:
    """A publication's place: the peer's own round, the part (from 1) and the tokens since that round's start."""

    round: int
    part: int
    tokens: int


Place: TypeAlias = tuple[int, int]
"""A round of a peer and a part of it: all of the peer up to there is in some weights."""


@dataclass(slots=True)
class Full:
    """Nothing of it was merged: a round's pseudo-gradient with its `tokens`, or its weights, enter as they are.

    Nobody changes news. It is not frozen: that makes it six times as dear, and there are two for each pull."""

    tokens: int
    reason: str


@dataclass(slots=True)
class Delta:
    """An earlier part was merged at `since`: the pseudo-gradient less that part's enters, with `tokens`."""

    since: PublicationVersion
    tokens: int
    reason: str


@dataclass(slots=True)
class WeightsOnly:
    """None of a gradient may enter: some of its steps were merged, and what is to be subtracted is not here."""

    reason: str
    tokens: int = 0


@dataclass(slots=True)
class Stale:
    """Not to be merged. `turned_back`: its author's counters contradict what was merged of it; `too_old`: it is too far
    behind the others. Those are incidents, unless the bytes came from another peer that may hold an old publication."""

    reason: str
    turned_back: bool = False
    tokens: int = 0
    too_old: bool = False


News: TypeAlias = Full | Delta | WeightsOnly | Stale


@dataclass(slots=True)
class Ledger:
    """What was merged last of each peer.

    The driver keeps the decoded pseudo-gradients of `held` and of nobody else: those merged last, of rounds that may
    still go on. Without it a later part of that round does not enter; nor does, after a restart, any later part of a
    round of which a part was merged. The steps in between never enter then: once at most, not once. Which values
    were averaged is not in the checkpoint: after a restart those of a round may enter once more.

    The same holds for what came with others' weights (`bring`): what those had merged is not merged again, nor is a
    later part of a round of which they had a part.
    """

    max_staleness_rounds: int = 8
    num_parts: int = 4
    max_held: int = 3
    max_peers: int = _MAX_PEERS
    forgotten_round: int = -1
    """No forgotten mark is of a later round: until it is past that, a stranger may have been merged before."""
    _marks: dict[str, PublicationVersion] = field(default_factory=dict)
    _held: dict[str, None] = field(default_factory=dict)
    _averaged: dict[Section, dict[str, Place]] = field(default_factory=dict)
    """Of each section that is averaged."""
    _brought: dict[str, Place] = field(default_factory=dict)
    """Up to where each peer was in the weights that were taken, if that is further than what was merged here."""

    def news_of_values(self, section: Section, peer: str, place: Place, reference_round: int) -> Full | Stale:
        """Whether what `peer` published at `place` of a section that is averaged, such as weights, may be merged: once,
        so that one that publishes no more holds nobody back."""
        round, _ = place
        if self.has_new_values(section, peer, place, reference_round):
            return Full(0, f"nothing of the {section} of its round {round} was merged")
        known = self._marks.get(peer)
        if known is not None and round < known.round:
            return Stale(f"its counter turned back to the {section} of round {round} from round {known.round}", True)
        if round < reference_round - self.max_staleness_rounds:
            return self._too_old(round, reference_round)
        return Stale(f"its {section} of round {self._averaged[section][peer][0]} were merged")

    def has_new_values(self, section: Section, peer: str, place: Place, reference_round: int) -> bool:
        """The same as yes or no."""
        round, averaged = place[0], self._averaged.get(section)
        if round < reference_round - self.max_staleness_rounds:
            return False
        if averaged is not None and (before := averaged.get(peer)) is not None and place <= before:
            return False
        known = self._marks.get(peer)
        return known is None or round >= known.round

    def with_new_values(self, section: Section, rounds: Mapping[str, int], reference_round: int) -> set[str]:
        """Who of many has such values of the round that it is in: it is asked of everybody."""
        oldest, marks = reference_round - self.max_staleness_rounds, self._marks
        averaged = self._averaged.get(section, {})
        return {
            peer
            for peer, round in rounds.items()
            if round >= oldest
            and ((before := averaged.get(peer)) is None or (round, 0) > before)
            and ((known := marks.get(peer)) is None or round >= known.round)
        }

    def _too_old(self, round: int, reference_round: int) -> Stale:
        behind = f"{reference_round - round} rounds behind the median"
        return Stale(f"{behind}; at most {self.max_staleness_rounds} are merged", too_old=True)

    def values_merged(self, section: Section, peer: str, place: Place) -> None:
        """They entered a merge."""
        averaged = self._averaged.setdefault(section, {})
        averaged.pop(peer, None)  # the last one merged stands last
        averaged[peer] = place
        while len(averaged) > self.max_peers:
            del averaged[next(iter(averaged))]

    def values_at(self, section: Section, peer: str) -> Place | None:
        """Where the values of `peer` that were merged last were published."""
        return self._averaged.get(section, {}).get(peer)

    def news(self, peer: str, mark: PublicationVersion | Candidate, reference_round: int) -> News:
        """What of `peer`'s publication at `mark` may be merged; `reference_round` is the live peers' median."""
        if mark.round < 0 or mark.part < 1 or mark.tokens < 1:
            return Stale("it has published nothing yet")
        known = self._marks.get(peer)
        if known is not None and (mark.round, mark.part) < (known.round, known.part):
            here = f"round {mark.round} part {mark.part}"
            return Stale(f"its counter turned back to {here} from {known.round} part {known.part}", True)
        if mark.round < reference_round - self.max_staleness_rounds:
            return self._too_old(mark.round, reference_round)
        if (brought := self._brought.get(peer)) is not None and mark.round <= brought[0]:
            here = f"round {brought[0]} up to part {brought[1]}"
            return Stale(f"it came with the weights that were taken, which have {here}")
        if known is None and mark.round <= self.forgotten_round:
            return WeightsOnly(f"parts of rounds up to {self.forgotten_round} may have been merged and forgotten")
        if known is None or mark.round > known.round:
            return Full(mark.tokens, f"nothing of its round {mark.round} was merged")
        return self._later_part(peer, mark, known)

    def new_tokens(self, peer: str, mark: PublicationVersion | Candidate, reference_round: int) -> int | None:
        """The tokens of `news`, None for `Stale`: it is asked of everybody, most of whom have a new round or have
        published nothing yet."""
        if mark.part < 1 or mark.tokens < 1:
            return None
        known = self._marks.get(peer)
        if peer not in self._brought and mark.round > (self.forgotten_round if known is None else known.round):
            return mark.tokens if mark.round >= reference_round - self.max_staleness_rounds else None
        news = self.news(peer, mark, reference_round)
        return None if isinstance(news, Stale) else news.tokens

    def _later_part(self, peer: str, mark: PublicationVersion | Candidate, known: PublicationVersion) -> News:
        """News of a round of which a part was merged."""
        if mark.part == known.part and mark.tokens == known.tokens:
            return Stale(f"round {mark.round} part {mark.part} was merged")
        if mark.part == known.part or mark.tokens < known.tokens:
            here = f"{mark.tokens} tokens at part {mark.part} of round {mark.round}"
            return Stale(f"its counter turned back: {here}, and {known.tokens} at part {known.part}", True)
        if mark.tokens == known.tokens:
            return Stale(f"no token more than at part {known.part}, which was merged")
        if peer not in self._held:
            return WeightsOnly(
                f"part {known.part} of its round was merged, and its pseudo-gradient is not here any more"
            )
        return Delta(known, mark.tokens - known.tokens, f"part {known.part} of its round was merged")

    def merged(self, peer: str, mark: PublicationVersion, reference_round: int) -> None:
        """`mark` of `peer` entered a merge, in whichever way `news` said. Look at `held` afterwards."""
        assert self.new_tokens(peer, mark, reference_round) is not None, f"merged what is not new of {peer}: {mark}"
        self._marks.pop(peer, None)  # the last one merged stands last
        self._marks[peer] = mark
        self._held.pop(peer, None)
        self._brought.pop(peer, None)
        if mark.part < self.num_parts and mark.round > self.forgotten_round:  # else later parts may have been merged
            self._held[peer] = None
        while len(self._held) > self.max_held:
            del self._held[next(iter(self._held))]
        if len(self._marks) > self.max_peers:
            self._forget()

    def _forget(self) -> None:
        """Those of the lowest rounds, which are too old soon: so that nothing is merged twice, and nobody who claims
        a huge round makes strangers of everyone."""
        num = max(1, self.max_peers // 8)
        for peer, mark in heapq.nsmallest(num, self._marks.items(), key=lambda item: item[1].round):
            del self._marks[peer]
            self._held.pop(peer, None)
            self.forgotten_round = max(self.forgotten_round, mark.round)

    def bring(self, places: Mapping[str, Place]) -> None:
        """Others' weights take the place of this peer's, with all peers up to `places` in them (`agreed_places`)."""
        for peer, place in places.items():
            known = self._marks.get(peer)
            if place > self._brought.get(peer, (-1, 0)) and (known is None or place > (known.round, known.part)):
                self._brought[peer] = place
        if len(self._brought) > self.max_peers:
            furthest = heapq.nlargest(self.max_peers, self._brought.items(), key=lambda item: item[1])
            self._brought = dict(furthest)

    def places(self, most_peers: int = _MAX_PEERS) -> dict[str, Place]:
        """Up to where each peer is in the weights: what was merged here, and what came with others' weights. Of very
        many, those of the latest rounds."""
        merged = {peer: (mark.round, mark.part) for peer, mark in self._marks.items()}
        places = merged | self._brought
        if len(places) <= most_peers:
            return places
        return dict(heapq.nlargest(most_peers, places.items(), key=lambda item: (item[1], item[0])))

    @property
    def held(self) -> frozenset[str]:
        """The peers whose pseudo-gradient, as it was at their mark, is kept for a difference."""
        return frozenset(self._held)

    def mark(self, peer: str) -> PublicationVersion | None:
        """What was merged last of `peer`; None if nothing was, or it is forgotten."""
        return self._marks.get(peer)

    def by_age(self) -> list[str]:
        """The peers, the one that was merged longest ago first."""
        return list(self._marks)

    def rows(self) -> list[list[str | int]]:
        """For a checkpoint: the round up to which marks are forgotten, then [PeerID, round, part, tokens] of each;
        without tokens what came with others' weights."""
        rows: list[list[str | int]] = [["", self.forgotten_round, 0, 0]]
        rows.extend([peer, mark.round, mark.part, mark.tokens] for peer, mark in self._marks.items())
        rows.extend([peer, round, part, 0] for peer, (round, part) in self._brought.items())
        return rows

    def load(self, rows: Iterable[Sequence[object]]) -> None:
        """Become what `rows` gave; no pseudo-gradient is held. ValueError, and nothing changes, if they are else."""
        marks, brought, forgotten_round = dict[str, PublicationVersion](), dict[str, Place](), -1
        for row in rows:
            match row:
                case ["", int(round), 0, 0]:
                    forgotten_round = round
                case [str(peer), int(round), int(part), int(tokens)] if round >= 0 and min(part, tokens) >= 1:
                    marks[peer] = PublicationVersion(round, part, tokens)
                case [str(peer), int(round), int(part), 0] if peer and round >= 0 and part >= 1:
                    brought[peer] = round, part
                case _:
                    raise ValueError(f"not a row of a ledger of merges: {row}")
        self._marks, self._held, self.forgotten_round, self._brought = marks, {}, forgotten_round, brought


def agreed_places(
    told: Iterable[Mapping[str, Place]], rounds: Mapping[str, int], round: int, max_staleness_rounds: int
) -> dict[str, Place]:
    """Up to where each peer is in the mean of some states, which is of `round`. `told`: up to where it is in each of
    them, by who gave that; `rounds`: which round each peer says it is in itself.

    What is in one of them is in the mean, though with less weight, so that the furthest counts. But nobody is believed
    to be in others' weights with more than the round after the one that it tells of, or the mean's, since one that had
    fallen behind may have come there by now; of who tells nothing, with more than may be merged still. So one that lies
    makes a newcomer do without what another publishes in two rounds.
    """
    agreed = dict[str, Place]()
    for places in told:
        for peer, place in places.items():
            most = max(round, rounds[peer] + 1) if peer in rounds else round + max_staleness_rounds
            place = place if place[0] <= most else (most, 1)
            agreed[peer] = max(place, agreed.get(peer, place))
    return agreed


# ---------------------------------------------------------------- how far the others are


def median_round(rounds: Iterable[int]) -> int:
    """The (upper) median of peers' rounds, at least one: what staleness is measured from. Of two the one that is
    further, so that the one behind is seen to be."""
    ordered = sorted(rounds)
    return ordered[len(ordered) // 2]


def rounds_behind(round: int, others: Iterable[int]) -> int:
    """How far `round` is behind the others' (lower) median; 0 without any. Of two that is the one that is less far: the
    fastest of three may take shorter rounds than the others (more than half as fast again, it is in step with nobody:
    `pacing.round_inner_steps`), who have nothing to catch up with."""
    ordered = sorted(others)
    return ordered[(len(ordered) - 1) // 2] - round if ordered else 0


def left_behind(round: int, others: Collection[int], max_staleness_rounds: int) -> int:
    """How many rounds a peer that has ended `round` is behind, if what it publishes of that round is too old for the
    others when they merge, so that it has to take their weights; else 0.

    The others merge at the end of their round, which may be the next one by then (see `Ledger.news`). A peer that was
    let stay just behind what is merged could train on at the others' pace, and be merged by nobody for ever.
    """
    behind = rounds_behind(round, others)
    return behind if behind > max(1, max_staleness_rounds - 1) else 0


def is_too_old(round: int, others: Iterable[int], max_staleness_rounds: int) -> bool:
    """Whether weights of `round`, with which a peer comes back, are given up for the others', who are in those rounds;
    one in round 0 has not begun."""
    return rounds_behind(round, [each for each in others if each]) > max_staleness_rounds


# ---------------------------------------------------------------- whom


@dataclass(kw_only=True, slots=True)
class Candidate:
    """A live peer, and its newest publication as it announced it last. Nobody changes it."""

    peer: str
    round: int = 0
    part: int = 0
    tokens: int = 0


@dataclass
class _Ban:
    tried_s: float
    until_s: float
    failures: int = 0
    mute: bool = True
    """It gave no answer each time: nothing else is held against it."""


_MUTE_FACTOR = 1.5
"""After an outage of the network they are left alone for half as long as that lasted, and for `mute_first_s` more, at
most (decision 39)."""


@dataclass(slots=True)
class BackOff:
    """Who is left alone for a while: `busy_s` after BUSY; `first_s`, twice that, ... up to `most_s` after failures.
    Of one that only gave no answer it is `mute_first_s`, half as much again, ...: it may be the network between.

    Bans do not count when everyone is banned: then the network is the likelier cause. Even so nobody is asked twice
    within `busy_s`.
    """

    busy_s: float = 1.0
    first_s: float = 15.0
    mute_first_s: float = 10.0
    most_s: float = 600.0
    max_peers: int = _MAX_PEERS
    _bans: dict[str, _Ban] = field(default_factory=dict)

    def busy(self, peer: str, now: float) -> str:
        """It has as many readers as it serves. Returns what follows, in words."""
        ban = self._ban(peer, now)
        ban.until_s = max(ban.until_s, now + self.busy_s)
        return f"busy: asked again after {self.busy_s:g} s"

    def failed(self, peer: str, now: float, reason: str, mute: bool = False) -> str:
        """It could not be reached, stalled, or what came was wrong; `mute`: it gave no answer at all. Returns what
        follows, in words.

        What fails during a ban does not lengthen it: several pulls are under way at once, and where bans do not count
        each peer is tried again and again. An outage of 20 s would be told as four, and cost two minutes.
        """
        ban = self._ban(peer, now)
        ban.mute &= mute
        if ban.failures and now < ban.until_s:
            return f"{reason}: it was left alone for that already"
        ban.failures += 1
        first_s, factor = (self.mute_first_s, _MUTE_FACTOR) if ban.mute else (self.first_s, 2.0)
        wait_s = min(first_s * factor ** min(ban.failures - 1, 32), self.most_s)
        ban.until_s = max(ban.until_s, now + wait_s)
        return f"{reason}: left alone for {wait_s:g} s"

    def _ban(self, peer: str, now: float) -> _Ban:
        ban = self._bans.pop(peer, None) or _Ban(now, now)
        ban.tried_s = now
        self._bans[peer] = ban  # the last one tried stands last
        while len(self._bans) > self.max_peers:
            del self._bans[next(iter(self._bans))]
        return ban

    def answered(self, peer: str) -> None:
        """Something good came from it: all is forgiven."""
        self._bans.pop(peer, None)

    def has_banned(self, peer: str) -> bool:
        """Whether anything is held against it."""
        return peer in self._bans

    def called(self, peer: str, now: float) -> None:
        """It has called us: if all that is held against it is that it gave no answer, it may be asked again at once. If
        it gives none then, it is left alone for longer than before all the same."""
        if (ban := self._bans.get(peer)) is not None and ban.failures and ban.mute:
            ban.until_s = min(ban.until_s, now)

    def ready(self, peers: Collection[str], now: float) -> tuple[frozenset[str], str]:
        """Which of `peers` may be asked now; with the reason if that is not all of them, or bans do not count."""
        if self._bans.keys().isdisjoint(peers):
            return frozenset(peers), ""
        bans = {peer: ban for peer in peers if (ban := self._bans.get(peer)) is not None and now < ban.until_s}
        if not bans:
            return frozenset(peers), ""
        if len(bans) < len(peers):
            return frozenset(peers).difference(bans), f"{len(bans)} are left alone for now"
        rested = frozenset(peer for peer, ban in bans.items() if now >= ban.tried_s + self.busy_s)
        if rested:
            return rested, "everyone is banned, so that bans do not count"
        return rested, f"everyone was tried within the last {self.busy_s:g} s"

    def next_free_s(self, peers: Collection[str], now: float) -> float | None:
        """When `ready` gives one of `peers` next who is left alone now; None if nobody is."""
        bans = [ban for peer in peers if (ban := self._bans.get(peer)) is not None and now < ban.until_s]
        free_s = [ban.until_s for ban in bans] + [ban.tried_s + self.busy_s for ban in bans]
        return min((s for s in free_s if s > now), default=None)


@dataclass(slots=True)
class Partners:
    """Chooses whom to pull from. `variant` is one of `VARIANTS`.

    "uniform": every peer alike. "freshest": the most tokens that were not merged, as announced. "longest-unmerged":
    the one merged longest ago, strangers first. "random-permutation": each once, in random order, before any again.
    """

    ledger: Ledger
    back_off: BackOff = field(default_factory=BackOff)
    variant: str = "uniform"
    rng: random.Random = field(default_factory=random.Random)
    _asked: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise ValueError(f"no such choice of partners: {self.variant}; allowed: {', '.join(VARIANTS)}")

    def choose(
        self,
        candidates: Collection[Candidate],
        *,
        exclude: Collection[str],
        reference_round: int,
        now: float,
        first: Collection[str] = (),
        new_tokens: Mapping[str, int | None] | None = None,
    ) -> tuple[str | None, str]:
        """The next one to ask, or None; with the reason. `candidates`: the live others, oneself not among them;
        `exclude`: who was asked in this round; `first`: whom to ask before the others. Bans count while anybody of all
        `candidates` is free of one. `new_tokens`: of each what the ledger says, if it has been asked already."""
        if not candidates:
            return None, "nobody else is there"
        if all(one.peer in exclude for one in candidates):
            return None, "everybody was asked in this round"
        ready, about_bans = self.back_off.ready([one.peer for one in candidates], now)
        free = [one for one in candidates if one.peer in ready and one.peer not in exclude]
        if not free:
            return None, about_bans
        free = sorted([one for one in free if one.peer in first] or free, key=_PEER)
        if new_tokens is None:
            new_tokens = {one.peer: self.ledger.new_tokens(one.peer, one, reference_round) for one in free}
        hopeful = [(one, tokens) for one in free if (tokens := new_tokens[one.peer]) is not None]
        if hopeful:
            reason = f"{self.variant} among {len(hopeful)} with something new"
        else:
            hopeful = [(one, 0) for one in free]
            reason = f"{self.variant} among {len(hopeful)} that announced nothing new: announcements may be old"
        peer = VARIANTS[self.variant](self, hopeful, self.rng)
        return peer, f"{reason}; {about_bans}" if about_bans else reason


_PEER = attrgetter("peer")
_Pick: TypeAlias = "Callable[[Partners, Sequence[tuple[Candidate, int]], random.Random], str]"


def _uniform(_: Partners, among: Sequence[tuple[Candidate, int]], rng: random.Random) -> str:
    return rng.choice(among)[0].peer


def _freshest(_: Partners, among: Sequence[tuple[Candidate, int]], rng: random.Random) -> str:
    most = max(tokens for _, tokens in among)
    return rng.choice([one.peer for one, tokens in among if tokens == most])


def _longest_unmerged(partners: Partners, among: Sequence[tuple[Candidate, int]], rng: random.Random) -> str:
    ranks = {peer: rank for rank, peer in enumerate(partners.ledger.by_age())}
    least = min(ranks.get(one.peer, -1) for one, _ in among)
    return rng.choice([one.peer for one, _ in among if ranks.get(one.peer, -1) == least])


def _random_permutation(partners: Partners, among: Sequence[tuple[Candidate, int]], rng: random.Random) -> str:
    peers = [one.peer for one, _ in among]
    left = [peer for peer in peers if peer not in partners._asked]
    if not left:
        partners._asked.difference_update(peers)
        left = peers
    if len(partners._asked) >= _MAX_PEERS:
        partners._asked.clear()
    peer = rng.choice(left)
    partners._asked.add(peer)
    return peer


VARIANTS: dict[str, _Pick] = {
    "uniform": _uniform,
    "freshest": _freshest,
    "longest-unmerged": _longest_unmerged,
    "random-permutation": _random_permutation,
}
"""The ways to choose, by name; the first is the default."""

"""Choice of partners, and the record of what was merged of each, so that nothing is merged twice.

A peer publishes its round in parts: part n carries the pseudo-gradient and the tokens from the round's start to the end
of part n. Whoever has merged an earlier part merges only the difference, so that each inner step of a peer enters
another's merge at most once. Weights are averaged as they are. The `Ledger` remembers what was merged. It belongs to
the weights: a checkpoint contains it, and so does a state that another peer takes.

Partners are drawn from the live peers. What a peer advertises is only a hint, because a presence record may be a third
of its lifetime old; so peers that advertise nothing new are asked last, but they are asked. Nothing here waits for
anybody.

Everything here is pure: `now` is an argument, the caller provides the random generator, and every answer carries its
reason. When and how much to pull is decided in `pulls`.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import TypeAlias

from swarmtrain.protocol.gossip.pulls import GroupName

_MAX_PEERS = 4096
"""Limit of each table of peers. Identities cost nothing, so a flood of them must not fill the memory."""


# ---------------------------------------------------------------- what is new


@dataclass(frozen=True, slots=True)
class PublicationVersion:
    """Position of a publication: the author's round, the part (from 1) and the tokens since that round's start."""

    round: int
    part: int
    tokens: int


Place: TypeAlias = tuple[int, int]
"""Round of a peer, and a part of it. Weights "have" a peer up to a place if they contain all its publications up to
there."""


@dataclass(slots=True)
class Full:
    """Nothing of the round was merged before: the pseudo-gradient with its `tokens`, or the weights, enter as they are.

    Treat all kinds of news as immutable. They are not frozen: freezing makes creation six times as expensive, and each
    pull creates two.
    """

    tokens: int
    reason: str


@dataclass(slots=True)
class Delta:
    """An earlier part was merged at `since`: only the difference of the pseudo-gradients enters, with `tokens`."""

    since: PublicationVersion
    tokens: int
    reason: str


@dataclass(slots=True)
class WeightsOnly:
    """No gradient may enter: some of its steps were merged before, and the earlier publication to subtract is
    not here."""

    reason: str
    tokens: int = 0


@dataclass(slots=True)
class Stale:
    """Nothing may be merged.

    `turned_back`: the author's counters contradict what was merged of it. `too_old`: the publication is too many rounds
    behind the others. Both are incidents, unless the bytes came from another peer, which may hold an old publication.
    """

    reason: str
    turned_back: bool = False
    tokens: int = 0
    too_old: bool = False


News: TypeAlias = Full | Delta | WeightsOnly | Stale
"""Kinds of an answer to the question which part of a publication may be merged."""


@dataclass(slots=True)
class Ledger:
    """Record of the last publication of each peer that was merged.

    For the peers in `held`, and for no others, the caller keeps the decoded pseudo-gradients: those merged last, of
    rounds that may have later parts. Without the earlier pseudo-gradient a later part of the round cannot enter. After
    a restart none is kept, so the rest of a round that was merged in part is skipped: each step enters at most once,
    not exactly once. Checkpoints do not contain which values were averaged, so that after a restart the weights of one
    round may enter once more.

    States that were taken from others (`adopt`) follow the same rule: what they contain is not merged again, nor is a
    later part of a round that they contain in part.
    """

    max_staleness_rounds: int = 8
    num_parts: int = 4
    """Number of parts into which a round's pseudo-gradient is divided."""
    max_held: int = 3
    """Number of pseudo-gradients that the caller keeps."""
    max_peers: int = _MAX_PEERS
    forgotten_round: int = -1
    """Highest round of a forgotten entry. Up to this round a peer without an entry may have been merged before."""
    _versions: dict[str, PublicationVersion] = field(default_factory=dict)
    _held: dict[str, None] = field(default_factory=dict)
    _averaged: dict[GroupName, dict[str, Place]] = field(default_factory=dict)
    """Place of each peer's values that were merged last, for each tensor group that is averaged."""
    _adopted: dict[str, Place] = field(default_factory=dict)
    """Place up to which the taken weights contain each peer, if that is further than what was merged here."""

    def news_of_values(self, group: GroupName, peer: str, place: Place, reference_round: int) -> Full | Stale:
        """Decide whether values that are averaged, such as weights, may be merged: those of each round once.

        Without that rule a peer that publishes no more would hold the others back with its old weights.
        """
        round, _ = place
        if self.has_new_values(group, peer, place, reference_round):
            return Full(0, f"nothing of the {group} of its round {round} was merged")
        known = self._versions.get(peer)
        if known is not None and round < known.round:
            return Stale(f"its counter turned back to the {group} of round {round} from round {known.round}", True)
        if round < reference_round - self.max_staleness_rounds:
            return self._too_old(round, reference_round)
        return Stale(f"its {group} of round {self._averaged[group][peer][0]} were merged")

    def has_new_values(self, group: GroupName, peer: str, place: Place, reference_round: int) -> bool:
        """Return whether `news_of_values` is `Full`, without building the answer."""
        round, averaged = place[0], self._averaged.get(group)
        if round < reference_round - self.max_staleness_rounds:
            return False
        if averaged is not None and (before := averaged.get(peer)) is not None and place <= before:
            return False
        known = self._versions.get(peer)
        return known is None or round >= known.round

    def with_new_values(self, group: GroupName, rounds: Mapping[str, int], reference_round: int) -> set[str]:
        """Return the peers for which `has_new_values` is true of their present round.

        Written out, because a call for each of some hundred peers takes twice as long.
        """
        oldest, versions = reference_round - self.max_staleness_rounds, self._versions
        averaged = self._averaged.get(group, {})
        return {
            peer
            for peer, round in rounds.items()
            if round >= oldest
            and ((before := averaged.get(peer)) is None or (round, 0) > before)
            and ((known := versions.get(peer)) is None or round >= known.round)
        }

    def _too_old(self, round: int, reference_round: int) -> Stale:
        behind = f"{reference_round - round} rounds behind the median"
        return Stale(f"{behind}; at most {self.max_staleness_rounds} are merged", too_old=True)

    def values_merged(self, group: GroupName, peer: str, place: Place) -> None:
        """Record that values of `peer` entered a merge."""
        averaged = self._averaged.setdefault(group, {})
        averaged.pop(peer, None)  # the last one merged stands last
        averaged[peer] = place
        while len(averaged) > self.max_peers:
            del averaged[next(iter(averaged))]

    def values_at(self, group: GroupName, peer: str) -> Place | None:
        """Return the place of the values of `peer` that were merged last; None without any."""
        return self._averaged.get(group, {}).get(peer)

    def news(self, peer: str, version: PublicationVersion | Candidate, reference_round: int) -> News:
        """Decide which part of a publication may be merged. `reference_round` is the median of the live peers'
        rounds."""
        if version.round < 0 or version.part < 1 or version.tokens < 1:
            return Stale("it has published nothing yet")
        known = self._versions.get(peer)
        if known is not None and (version.round, version.part) < (known.round, known.part):
            here = f"round {version.round} part {version.part}"
            return Stale(f"its counter turned back to {here} from {known.round} part {known.part}", True)
        if version.round < reference_round - self.max_staleness_rounds:
            return self._too_old(version.round, reference_round)
        if (adopted := self._adopted.get(peer)) is not None and version.round <= adopted[0]:
            here = f"round {adopted[0]} up to part {adopted[1]}"
            return Stale(f"it came with the weights that were taken, which have {here}")
        if known is None and version.round <= self.forgotten_round:
            return WeightsOnly(f"parts of rounds up to {self.forgotten_round} may have been merged and forgotten")
        if known is None or version.round > known.round:
            return Full(version.tokens, f"nothing of its round {version.round} was merged")
        return self._later_part(peer, version, known)

    def new_tokens(self, peer: str, version: PublicationVersion | Candidate, reference_round: int) -> int | None:
        """Return the tokens that `news` would let into a merge, None for `Stale`.

        This is asked of every peer before each choice. Most have a new round or no publication yet, which needs no
        answer with a reason.
        """
        if version.part < 1 or version.tokens < 1:
            return None
        known = self._versions.get(peer)
        if peer not in self._adopted and version.round > (self.forgotten_round if known is None else known.round):
            return version.tokens if version.round >= reference_round - self.max_staleness_rounds else None
        news = self.news(peer, version, reference_round)
        return None if isinstance(news, Stale) else news.tokens

    def _later_part(self, peer: str, version: PublicationVersion | Candidate, known: PublicationVersion) -> News:
        """Decide about a part of a round of which another part was merged."""
        if version.part == known.part and version.tokens == known.tokens:
            return Stale(f"round {version.round} part {version.part} was merged")
        if version.part == known.part or version.tokens < known.tokens:
            here = f"{version.tokens} tokens at part {version.part} of round {version.round}"
            return Stale(f"its counter turned back: {here}, and {known.tokens} at part {known.part}", True)
        if version.tokens == known.tokens:
            return Stale(f"no token more than at part {known.part}, which was merged")
        if peer not in self._held:
            return WeightsOnly(
                f"part {known.part} of its round was merged, and its pseudo-gradient is not here any more"
            )
        return Delta(known, version.tokens - known.tokens, f"part {known.part} of its round was merged")

    def merged(self, peer: str, version: PublicationVersion, reference_round: int) -> None:
        """Record that `version` of `peer` entered a merge in the way that `news` allowed. `held` may have changed
        afterwards."""
        assert self.new_tokens(peer, version, reference_round) is not None, (
            f"merged what is not new of {peer}: {version}"
        )
        self._versions.pop(peer, None)  # the last one merged stands last
        self._versions[peer] = version
        self._held.pop(peer, None)
        self._adopted.pop(peer, None)
        # otherwise later parts may have been merged before
        if version.part < self.num_parts and version.round > self.forgotten_round:
            self._held[peer] = None
        while len(self._held) > self.max_held:
            del self._held[next(iter(self._held))]
        if len(self._versions) > self.max_peers:
            self._forget()

    def _forget(self) -> None:
        """Drop an eighth of the entries, those of the lowest rounds.

        Those are too old soon anyway, and `forgotten_round` keeps them from being merged twice. In another order a peer
        that claims a huge round could be forgotten too; `forgotten_round` would make strangers of all others.
        """
        num = max(1, self.max_peers // 8)
        for peer, version in heapq.nsmallest(num, self._versions.items(), key=lambda item: item[1].round):
            del self._versions[peer]
            self._held.pop(peer, None)
            self.forgotten_round = max(self.forgotten_round, version.round)

    def adopt(self, places: Mapping[str, Place]) -> None:
        """Record that this peer continues from others' weights, which contain the publications of all peers up to
        `places` (see `agreed_places`)."""
        for peer, place in places.items():
            known = self._versions.get(peer)
            if place > self._adopted.get(peer, (-1, 0)) and (known is None or place > (known.round, known.part)):
                self._adopted[peer] = place
        if len(self._adopted) > self.max_peers:
            furthest = heapq.nlargest(self.max_peers, self._adopted.items(), key=lambda item: item[1])
            self._adopted = dict(furthest)

    def places(self, most_peers: int = _MAX_PEERS) -> dict[str, Place]:
        """Map each peer to the place up to which the weights contain its publications, by merges here or because the
        weights came from others.

        If there are more than `most_peers`, those of the latest rounds are returned.
        """
        merged = {peer: (version.round, version.part) for peer, version in self._versions.items()}
        places = merged | self._adopted
        if len(places) <= most_peers:
            return places
        return dict(heapq.nlargest(most_peers, places.items(), key=lambda item: (item[1], item[0])))

    @property
    def held(self) -> frozenset[str]:
        """Peers whose pseudo-gradient, as of the last merge, the caller keeps to subtract it from a later part."""
        return frozenset(self._held)

    def version(self, peer: str) -> PublicationVersion | None:
        """Return the version of `peer` that was last merged; None if none was, or if it is forgotten."""
        return self._versions.get(peer)

    def by_age(self) -> list[str]:
        """Return the peers by the time of their last merge, the oldest first."""
        return list(self._versions)

    def rows(self) -> list[list[str | int]]:
        """Return rows for a checkpoint: the forgotten round first, then [PeerID, round, part, tokens] of each peer.

        Rows of weights that were taken from others have 0 tokens.
        """
        rows: list[list[str | int]] = [["", self.forgotten_round, 0, 0]]
        rows.extend([peer, version.round, version.part, version.tokens] for peer, version in self._versions.items())
        rows.extend([peer, round, part, 0] for peer, (round, part) in self._adopted.items())
        return rows

    def load(self, rows: Iterable[Sequence[object]]) -> None:
        """Restore the ledger from rows that `rows` returned. No pseudo-gradients are held afterwards, since a
        checkpoint does not keep them. Raise ValueError, changing nothing, if a row is malformed."""
        versions, adopted, forgotten_round = dict[str, PublicationVersion](), dict[str, Place](), -1
        for row in rows:
            match row:
                case ["", int(round), 0, 0]:
                    forgotten_round = round
                case [str(peer), int(round), int(part), int(tokens)] if round >= 0 and min(part, tokens) >= 1:
                    versions[peer] = PublicationVersion(round, part, tokens)
                case [str(peer), int(round), int(part), 0] if peer and round >= 0 and part >= 1:
                    adopted[peer] = round, part
                case _:
                    raise ValueError(f"not a row of a ledger of merges: {row}")
        self._versions, self._held, self.forgotten_round, self._adopted = versions, {}, forgotten_round, adopted


def agreed_places(
    told: Iterable[Mapping[str, Place]], rounds: Mapping[str, int], round: int, max_staleness_rounds: int
) -> dict[str, Place]:
    """Map each peer to the place up to which the mean of several states contains its publications; the mean is of
    `round`.

    `told` has the places of each state, as its giver claims; `rounds` the round that each peer advertises itself. A
    publication that is in one of the states is in the mean, though with less weight, so the furthest place counts.

    A claim about a peer is limited to the round after the one that this peer advertises, or the mean's round: a peer
    that had fallen behind may have come there by now. For a peer that advertises nothing the limit is
    `max_staleness_rounds` after the mean's round. So a liar can make a newcomer skip at most two rounds of another
    peer.
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
    """Return the upper median of rounds, at least one: the round from which staleness is measured.

    Of two it is the higher one, so that the peer behind is seen to be behind.
    """
    ordered = sorted(rounds)
    return ordered[len(ordered) // 2]


def rounds_behind(round: int, others: Iterable[int]) -> int:
    """Return how far `round` is behind the lower median of the others' rounds; 0 without others.

    Of two others the lower one counts. The fastest of three peers may take shorter rounds than the two others (one that
    is more than half as fast again is in step with nobody, see `pacing.round_inner_steps`), and they have nothing to
    catch up with.
    """
    ordered = sorted(others)
    return ordered[(len(ordered) - 1) // 2] - round if ordered else 0


def left_behind(round: int, others: Collection[int], max_staleness_rounds: int) -> int:
    """Return by how many rounds a peer that has ended `round` must catch up; 0 if it need not.

    It must take the others' weights if its publication of that round is too old when the others merge. They merge at
    the end of their round, which may be the next one by then (see `Ledger.news`). A peer that stays just behind that
    limit could train on at the others' pace and never be merged by anybody.
    """
    behind = rounds_behind(round, others)
    return behind if behind > max(1, max_staleness_rounds - 1) else 0


def is_too_old(round: int, others: Iterable[int], max_staleness_rounds: int) -> bool:
    """Return whether a peer that comes back with weights of `round` must take the others' instead.

    Peers in round 0 have not begun and do not count.
    """
    return rounds_behind(round, [each for each in others if each]) > max_staleness_rounds


# ---------------------------------------------------------------- whom


@dataclass(kw_only=True, slots=True)
class Candidate:
    """Live peer with the newest publication that it has advertised. Treat it as immutable."""

    peer: str
    round: int = 0
    part: int = 0
    tokens: int = 0


@dataclass
class _Ban:
    """Record of a peer that was busy or has failed."""

    tried_s: float
    until_s: float
    failures: int = 0
    mute: bool = True
    """True while the peer's only fault is that it gave no answer."""


_MUTE_FACTOR = 1.5
"""Factor by which the wait grows after each failure to answer. After a network outage a peer is left alone for at most
half the outage's duration plus `mute_first_s` (decision 39)."""


@dataclass(slots=True)
class BackOff:
    """Peers that are left alone for a while, after they were busy or have failed.

    A busy peer waits `busy_s`. One that failed waits `first_s`, then twice that and so on, up to `most_s`. One that
    only gave no answer waits `mute_first_s`, then half as long again and so on, because the network between may be at
    fault.

    If everyone is banned, bans do not count, since the network is then the likelier cause. Even so nobody is asked
    twice within `busy_s`.
    """

    busy_s: float = 1.0
    first_s: float = 15.0
    mute_first_s: float = 10.0
    most_s: float = 600.0
    max_peers: int = _MAX_PEERS
    _bans: dict[str, _Ban] = field(default_factory=dict)

    def busy(self, peer: str, now: float) -> str:
        """Record that `peer` serves as many readers as it may. Return the consequence in words, for the log."""
        ban = self._ban(peer, now)
        ban.until_s = max(ban.until_s, now + self.busy_s)
        return f"busy: asked again after {self.busy_s:g} s"

    def failed(self, peer: str, now: float, reason: str, mute: bool = False) -> str:
        """Record that `peer` was unreachable, stalled or sent something wrong. Return the consequence in words, for the
        log.

        `mute`: it gave no answer at all. A failure during a ban does not lengthen the ban: several pulls run at once,
        and while bans do not count each peer is tried again and again. Otherwise an outage of 20 s would count as four
        failures and cost two minutes.
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
        """Clear all that is held against `peer`, because something good came from it."""
        self._bans.pop(peer, None)

    def has_banned(self, peer: str) -> bool:
        """Return whether `peer` is being left alone, or has failures on record."""
        return peer in self._bans

    def called(self, peer: str, now: float) -> None:
        """Let `peer`, which has called this peer, be asked again at once if its only fault is that it gave no answer.

        Its count of failures stays: if it does not answer then, it waits longer than before.
        """
        if (ban := self._bans.get(peer)) is not None and ban.failures and ban.mute:
            ban.until_s = min(ban.until_s, now)

    def ready(self, peers: Collection[str], now: float) -> tuple[frozenset[str], str]:
        """Return those of `peers` that may be asked now, and a reason if some are left out or if bans do not count."""
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
        """Return the time at which `ready` will next return one of `peers` that is left alone now; None if nobody
        is."""
        bans = [ban for peer in peers if (ban := self._bans.get(peer)) is not None and now < ban.until_s]
        free_s = [ban.until_s for ban in bans] + [ban.tried_s + self.busy_s for ban in bans]
        return min((s for s in free_s if s > now), default=None)


@dataclass(slots=True)
class Partners:
    """Chooses the next partner to pull from, by one of `VARIANTS`.

    - "uniform": each peer with the same probability;
    - "freshest": the peer that advertises the most tokens not merged yet;
    - "longest-unmerged": the peer whose last merge was longest ago, strangers first;
    - "random-permutation": each peer once in random order before any again.
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
        """Choose the next peer to ask, or None, and return it with the reason.

        `candidates`: all live others, without this peer; `exclude`: those not to ask now (see `OpenPulls.not_now`:
        what they have is here or on its way, they had nothing new lately, or they failed in this round); `first`: those
        to prefer; `new_tokens`: the ledger's answer for each candidate, if it has been asked already. Bans count while
        at least one of all `candidates` is free of them.
        """
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
"""Ways to choose a partner, by name; the first is the default."""

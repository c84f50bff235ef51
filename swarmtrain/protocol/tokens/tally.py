"""Who has trained on how many tokens: a map (PeerID, stage) -> tokens, merged by the greater count.

Counts come from two sources, kept apart. What rosters count is *learned*: everybody who applied a roster counts the
same. So is what states bring: whoever gives a state gives the counts that belong to it. What a peer says of itself in
its progress record is *told*: it is believed as far as the peer's speed, or else the swarm's, can explain it. A peer's
count is the greater of the two; the run's total is the sum over stage 0. Counts never fall, so that a restart, a fork
or an old record takes nothing away and counts nothing twice.

How much is believed: each count has an *account*, the moment up to which its tokens are explained. It begins when this
peer first met that one. Growth costs time at the greatest speed allowed, and the account may not run ahead of the
present by more than a few rounds. Time that passes pays for what was not believed yet, so an honest peer loses nothing
for good. What was trained before this peer came is in the counts that states bring: by the median of three of them,
where there are three.

Pure: `now` is an argument, in seconds of one clock that may jump.
"""

from __future__ import annotations

import heapq
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

__all__ = ["ALL_OTHERS", "CountingRules", "Tally", "TokenIncident", "agreed_counts", "quick_speed", "typical_speed"]

ALL_OTHERS = "12D3KooWGp4AYpum6toAV1JQ2pEY2cHKc9W9uUgwHbdDP16N4RS7"
"""Nobody's PeerID, under which a state of a run of very many tells the least counts as one (`network.token_rows`)."""

_MAX_COUNTS = 16_384
"""So many counts are kept of each source, the greatest ones: identities cost nothing."""

_OWN_FACTOR = 4.0
"""Growth is believed up to so many times the speed that the peer claims."""

_QUICK_FACTOR = 4.0
"""... and at first up to so many times the swarm's 75th percentile, whatever it claims: a claim is no proof."""

_DOUBLES_S = 600.0
"""Who delivers half of what its speed explains for so long is believed at twice that speed from then on ..."""

_SWARM_FACTOR = 64.0
"""... up to so many times the swarm's median speed."""

_NAMED_BEHIND_S = 3600.0
_MAX_DOUBLINGS = 30
_MAX_MET = 16_384
_FEW_PRESENT = 3
_MAJORITY = 3
"""Of so many sources one that lies is outvoted."""

_LEAST_PER_S = 1e-3
_CLOCK_STEP_S = 60.0
_MAX_AWAY_S = 7 * 86_400.0
"""Time unaccounted for counts up to a week, so that a clock that jumps does not explain everything."""

_Key = tuple[str, int]


@dataclass(frozen=True, kw_only=True)
class CountingRules:
    """What the run file says about counting."""

    began_s: float
    """When the run was published: nobody can have trained before."""
    burst_tokens: int
    """Tokens that may be told at once, since they are told a round at a time."""
    most_tokens: int
    """Nobody can have trained on more."""
    total_tokens: int = 2**60
    """The run's length: one or two sources of a state never say that it is over."""


@dataclass(frozen=True, kw_only=True)
class TokenIncident:
    """A peer told of more than it can have done: only `believed` of the `told` tokens count for now."""

    peer: str
    stage: int
    told: int
    believed: int
    rule: str = "tokens"

    @property
    def detail(self) -> str:
        """For a person."""
        return f"says that it has trained on {self.told} tokens; its speed explains {self.believed} by now"


@dataclass(frozen=True)
class _Account:
    """Tokens are explained up to `explained_s`; the greatest speed the peer ever claimed, in tokens per second."""

    explained_s: float
    fastest_per_s: float = 0.0
    doublings: int = 0
    """How often the speed that it is believed at was doubled since it was met."""
    term_s: float = -math.inf
    """Since when it is believed at that speed, or was looked at last whether it delivers ..."""
    delivered: int = 0
    """... and the tokens that it has delivered since."""
    behind_s: float | None = None
    """Since when not all that it told is believed."""


@dataclass
class Tally:
    """The map. `typical_per_s` is the swarm's median speed in tokens per second, `quick_per_s` its 75th percentile (0:
    the median); while the first is 0, nothing told is believed."""

    rules: CountingRules
    max_counts: int = _MAX_COUNTS
    typical_per_s: float = 0.0
    quick_per_s: float = 0.0
    num_present: int = 0
    """How many train now, as far as is known."""
    watched_s: float | None = None
    """Up to when this peer knows what the swarm can have done: from then on, time bounds what states bring. None: it
    has just come, and knows nothing."""
    _met_s: dict[str, float] = field(default_factory=dict)
    """When each peer was met first, of those without an account."""
    _learned: dict[_Key, int] = field(default_factory=dict)
    _told: dict[_Key, int] = field(default_factory=dict)
    _accounts: dict[_Key, _Account] = field(default_factory=dict)

    # ------------------------------------------------------------- reading

    def tokens(self, peer: str, stage: int = 0) -> int:
        """What `peer` has trained on in `stage`; 0 of a stranger."""
        key = (peer, stage)
        return max(self._learned.get(key, 0), self._told.get(key, 0))

    @property
    def total(self) -> int:
        """The run's tokens: those of stage 0, so that a pipeline counts each token once."""
        return sum(tokens for (_, stage), tokens in self._counts().items() if stage == 0)

    def contributions(self) -> dict[str, int]:
        """Each peer's tokens, of all its stages, by PeerID."""
        return _by_peer(self._counts())

    def told(self) -> dict[str, int]:
        """Each peer's tokens as far as its own progress records were read and believed: the acknowledged ones."""
        return _by_peer(self._told)

    def _counts(self) -> dict[_Key, int]:
        """What is counted, of both sources."""
        return {key: self.tokens(*key) for key in self._learned.keys() | self._told.keys()}

    # ------------------------------------------------------------- counting

    def know_speeds(self, speeds_per_s: Mapping[str, float]) -> None:
        """What the peers present claim to do, by PeerID. Where they are few, what others have claimed that were counted
        here is taken in: one that is alone does not say by itself what is usual. Once all have left, what they did last
        still explains what they told."""
        known = {peer: speed for peer, speed in speeds_per_s.items() if 0 < speed < math.inf}
        self.num_present = len(speeds_per_s)
        if len(known) < _FEW_PRESENT:
            if not known and self.typical_per_s > 0:
                return
            for (peer, _), account in self._accounts.items():
                if peer not in speeds_per_s and account.fastest_per_s > 0:
                    known[peer] = max(known.get(peer, 0.0), account.fastest_per_s)
        if known:
            self.typical_per_s, self.quick_per_s = typical_speed(known.values()), quick_speed(known.values())

    def meet(self, peers: Iterable[str], now: float) -> None:
        """These are here, or are heard of: those met for the first time can have trained from now on, for all that this
        peer has seen itself."""
        for peer in peers:
            if peer not in self._met_s:
                self._met_s[peer] = now
                if len(self._met_s) > _MAX_MET:
                    del self._met_s[next(iter(self._met_s))]

    def _since_s(self, key: _Key, now: float) -> float:
        """Up to when what is counted under `key` is explained."""
        account = self._accounts.get(key)
        if account is not None:
            return account.explained_s
        self.meet([key[0]], now)
        return min(now, self._met_s.get(key[0], now))

    def with_rest(self, counts: Mapping[str, int]) -> Mapping[str, int]:
        """What states count, of `ALL_OTHERS` only what is not counted here of any of them by itself: else those would
        be counted twice, and at each exchange once more."""
        if ALL_OTHERS not in counts:
            return counts
        here = {peer for peer, stage in self._counts() if stage == 0}
        known = sum(max(counts.get(peer, 0), self.tokens(peer)) for peer in (here | counts.keys()) - {ALL_OTHERS})
        return {**counts, ALL_OTHERS: max(0, sum(counts.values()) - known)}

    def bring(self, counts: Mapping[str, int], num_sources: int, now: float) -> None:
        """What states of so many sources count, as `agreed_counts` says: it belongs to the weights that come with it.

        To one that has just come three sources are believed; one or two never say that the run is over. To one that
        has watched the run they bring no more than all who are known can have done since: what is over is cut in
        proportion, and believed as time passes, when it is brought again.
        """
        most = self.rules.most_tokens
        news = {peer: min(tokens, most) - self.tokens(peer) for peer, tokens in counts.items()}
        news = {peer: tokens for peer, tokens in news.items() if tokens > 0}
        told, room = sum(news.values()), self._room_for_brought(num_sources, now)
        if room < told:
            news = {peer: tokens * room // told for peer, tokens in news.items()}
        self.learn({peer: self.tokens(peer) + tokens for peer, tokens in news.items()}, now)
        if room >= told or self.typical_per_s > 0 or self.watched_s is None:  # else it waits for a speed to be known
            self.watched_s = now

    def _room_for_brought(self, num_sources: int, now: float) -> int:
        """How many tokens may be added to the total."""
        left = self.rules.most_tokens * self.max_counts
        if num_sources < _MAJORITY:
            left = max(0, self.rules.total_tokens - self.rules.burst_tokens - self.total)
        if self.watched_s is None:
            return left
        num = max(1, self.num_present, sum(stage == 0 for _, stage in self._counts()))
        seconds = min(max(0.0, now - self.watched_s), _MAX_AWAY_S)
        per_s = _QUICK_FACTOR * (self.quick_per_s or self.typical_per_s)
        return min(left, num * (self.rules.burst_tokens + math.floor(per_s * seconds)))

    def learn(self, counts: Mapping[str, int], now: float, stage: int = 0) -> None:
        """What rosters count of these peers: certain. It is paid for as what a peer tells is, but never refused: by
        when it was trained is not known, and a state from a checkpoint is old."""
        for peer, tokens in counts.items():
            key, news = (peer, stage), tokens - self.tokens(peer, stage)
            ceiling_per_s, fastest_per_s = self._speeds(key, 0.0)
            if news > 0 and ceiling_per_s > 0:
                since_s = self._since_s(key, now)
                account = self._accounts.get(key, _Account(since_s, term_s=now))
                explained_s = min(now, since_s + news / ceiling_per_s)
                self._accounts[key] = replace(account, explained_s=explained_s, fastest_per_s=fastest_per_s)
            if tokens > self._learned.get(key, 0):
                self._learned[key] = tokens
        self._prune(self._learned, slack=0)

    def observe(
        self, peer: str, stage: int, tokens: int, now: float, claimed_per_s: float = 0.0
    ) -> tuple[int, TokenIncident | None]:
        """`peer` says that it has trained on `tokens`, and claims a speed (0: nothing is known of it).

        Returns what is counted for it now, and the incident if that is less than it says.
        """
        key, held = (peer, stage), self.tokens(peer, stage)
        believed, account = self._explained(key, tokens, now, claimed_per_s)
        if account is None:
            if min(tokens, held) > 0:
                self._count_told(key, min(tokens, held))
            return held, None
        if believed > 0:
            self._accounts[key] = account
            self._count_told(key, believed)
        else:
            return believed, None
        if believed >= tokens or not self._is_incident(account, tokens, now):
            return believed, None
        return believed, TokenIncident(peer=peer, stage=stage, told=tokens, believed=believed)

    def believes(self, peer: str, tokens: int, now: float, claimed_per_s: float = 0.0) -> int:
        """Of `tokens` that somebody tells of `peer` in stage 0, how many `observe` would count; nothing is counted."""
        return min(tokens, self._explained((peer, 0), tokens, now, claimed_per_s)[0])

    def _explained(self, key: _Key, tokens: int, now: float, claimed_per_s: float) -> tuple[int, _Account | None]:
        """What is believed, and the account this leads to; None if `tokens` are no news, or nothing can be said."""
        held = self.tokens(*key)
        ceiling_per_s, fastest_per_s = self._speeds(key, claimed_per_s)
        if tokens <= held or ceiling_per_s <= 0:
            return held, None
        burst_s = self.rules.burst_tokens / ceiling_per_s
        since_s = max(self._since_s(key, now), now - _MAX_AWAY_S)
        account = self._accounts.get(key, _Account(since_s, term_s=since_s))
        if since_s > now + burst_s + _CLOCK_STEP_S:  # the clock was ahead: that must not silence the peer
            since_s = now
        since_s = min(since_s, now + burst_s)
        affordable = math.floor((now + burst_s - since_s) * ceiling_per_s)
        believed = max(held, min(tokens, held + affordable, self.rules.most_tokens))
        explained_s = since_s + (believed - held) / ceiling_per_s
        behind_s = None if believed >= tokens else now if account.behind_s is None else min(account.behind_s, now)
        account = replace(account, explained_s=explained_s, fastest_per_s=fastest_per_s, behind_s=behind_s)
        return believed, _delivered(account, believed - held, ceiling_per_s, now)

    def _is_incident(self, account: _Account, tokens: int, now: float) -> bool:
        """Whether to name one that is not believed in full. Whoever trained before this peer came, or is much faster
        than usual, is believed in a while: it is named if the age of the run does not explain it, or that while is
        over."""
        most_per_s = _SWARM_FACTOR * self.typical_per_s
        own_per_s = _OWN_FACTOR * account.fastest_per_s if account.fastest_per_s > 0 else most_per_s
        age_tokens = max(0.0, now - self.rules.began_s) * min(own_per_s, most_per_s) + self.rules.burst_tokens
        is_over = account.behind_s is not None and now > account.behind_s + _NAMED_BEHIND_S
        return is_over or tokens > min(age_tokens, self.rules.most_tokens)

    def _count_told(self, key: _Key, believed: int) -> None:
        """Its account must be known by now: `_prune` drops those of nobody."""
        self._told[key] = max(self._told.get(key, 0), believed)
        self._prune(self._told, slack=self.max_counts // 8)

    def _speeds(self, key: _Key, claimed_per_s: float) -> tuple[float, float]:
        """(the greatest speed that is believed, the greatest that was claimed), in tokens per second."""
        most_per_s = _SWARM_FACTOR * self.typical_per_s
        account = self._accounts.get(key)
        fastest_per_s = max(min(claimed_per_s, most_per_s), 0.0 if account is None else account.fastest_per_s)
        doublings = 0 if account is None else account.doublings
        at_first_per_s = _QUICK_FACTOR * (self.quick_per_s or self.typical_per_s)
        earned_per_s = min(at_first_per_s * 2**doublings, most_per_s)
        ceiling_per_s = min(_OWN_FACTOR * fastest_per_s if fastest_per_s > 0 else earned_per_s, earned_per_s)
        return max(ceiling_per_s, _LEAST_PER_S) if most_per_s > 0 else 0.0, fastest_per_s

    def _prune(self, counts: dict[_Key, int], slack: int) -> None:
        """Keep the greatest counts; only when there are `slack` too many, since it takes a look at all."""
        if len(counts) <= self.max_counts + slack:
            return
        kept = heapq.nlargest(self.max_counts, ((tokens, key) for key, tokens in counts.items()))
        counts.clear()
        counts.update((key, tokens) for tokens, key in kept)
        for key in [key for key in self._accounts if key not in self._learned and key not in self._told]:
            del self._accounts[key]

    # ------------------------------------------------------------- merging and keeping

    def merge(self, other: Tally) -> None:
        """Take the greater of each count: in any order, and as often as one likes, the result is the same."""
        for mine, theirs in ((self._learned, other._learned), (self._told, other._told)):
            for key, tokens in theirs.items():
                mine[key] = max(mine.get(key, 0), tokens)
        for key, account in other._accounts.items():
            own = self._accounts.get(key, account)
            self._accounts[key] = replace(
                own,
                explained_s=max(own.explained_s, account.explained_s),
                fastest_per_s=max(own.fastest_per_s, account.fastest_per_s),
                doublings=max(own.doublings, account.doublings),
            )
        self._prune(self._learned, slack=0)
        self._prune(self._told, slack=0)

    def rows(self) -> list[list[str | int | float]]:
        """For a checkpoint: [PeerID, stage, learned, told, explained up to, fastest] of each count, sorted; and how
        often the speed was doubled, where it was."""
        rows: list[list[str | int | float]] = []
        for key in sorted(self._counts()):
            met_s = self._met_s.get(key[0], self.rules.began_s if self.watched_s is None else self.watched_s)
            account = self._accounts.get(key, _Account(met_s))
            counts = [self._learned.get(key, 0), self._told.get(key, 0)]
            rows.append([*key, *counts, float(account.explained_s), float(account.fastest_per_s)])
            if account.doublings:
                rows[-1].append(account.doublings)
        return rows

    def merge_rows(self, rows: Iterable[Sequence[object]]) -> None:
        """Merge what `rows` gave. ValueError, and nothing is merged, if that is something else."""
        other = Tally(self.rules, self.max_counts)
        for row in rows:
            match row:
                case [
                    str(peer),
                    int(stage),
                    int(learned),
                    int(told),
                    int() | float() as until_s,
                    int() | float() as speed,
                    *rest,
                ] if not rest or (len(rest) == 1 and isinstance(rest[0], int) and 0 <= rest[0] <= _MAX_DOUBLINGS):
                    if min(stage, learned, told) < 0 or not math.isfinite(until_s) or not 0 <= speed < math.inf:
                        raise ValueError(f"a count out of range: {row}")
                    key = (peer, stage)
                    if learned:
                        other._learned[key] = learned
                    if told:
                        other._told[key] = told
                    doublings = next((number for number in rest if isinstance(number, int)), 0)
                    other._accounts[key] = _Account(until_s, speed, doublings, term_s=until_s)
                case _:
                    raise ValueError(f"not a count: {row}")
        self.merge(other)
        if other._accounts:
            until_s = max(account.explained_s for account in other._accounts.values())
            self.watched_s = until_s if self.watched_s is None else max(until_s, self.watched_s)


def _delivered(account: _Account, tokens: int, ceiling_per_s: float, now: float) -> _Account:
    """The account of one that was seen to have done so much more: when a term is over, whether it is trusted more."""
    delivered, term_s = account.delivered + tokens, now - account.term_s
    if 0 <= term_s < _DOUBLES_S:
        return replace(account, delivered=delivered)
    earned = term_s > 0 and delivered >= ceiling_per_s * min(term_s, _MAX_AWAY_S) / 2
    doublings = min(account.doublings + earned, _MAX_DOUBLINGS)
    return replace(account, doublings=doublings, term_s=now, delivered=0)


def agreed_counts(told: Sequence[Mapping[str, int]]) -> dict[str, int]:
    """Each peer's tokens, as so many sources tell with their states: the lower median, where who does not know a peer
    counts nothing of it. So of two the lesser stands, and one alone is repeated."""
    peers = {peer for counts in told for peer in counts}
    return {peer: statistics.median_low([counts.get(peer, 0) for counts in told]) for peer in sorted(peers)}


def _by_peer(counts: Mapping[_Key, int]) -> dict[str, int]:
    """The sum over each peer's stages, by PeerID."""
    found: dict[str, int] = {}
    for (peer, _), tokens in sorted(counts.items()):
        found[peer] = found.get(peer, 0) + tokens
    return found


def typical_speed(speeds_per_s: Iterable[float]) -> float:
    """The (lower) median of the speeds that are known, in tokens per second; 0 without any.

    One's own is among them: of two, a liar's greater one is not taken.
    """
    known = sorted(speed for speed in speeds_per_s if 0 < speed < math.inf)
    return known[(len(known) - 1) // 2] if known else 0.0


def quick_speed(speeds_per_s: Iterable[float]) -> float:
    """Their (lower) 75th percentile, likewise: of two or more, one liar's is not taken."""
    known = sorted(speed for speed in speeds_per_s if 0 < speed < math.inf)
    return known[(len(known) - 1) * 3 // 4] if known else 0.0

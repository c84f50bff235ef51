"""Token counts: a map (PeerID, stage) -> tokens trained on, merged by the greater count.

Counts come from two sources, kept apart. What rosters count is *learned*: everybody who applied a roster counts the
same. Counts that come with a state are learned too: the peer that gives the state gives the counts that belong to it.
What a peer says of itself in its progress record is *told*; it is believed as far as the peer's speed, or else the
swarm's, explains it. A peer's count is the greater of the two, and the run's total is the sum over stage 0. Counts
never fall, so that a restart, a fork or an old record loses nothing and counts nothing twice.

How much is believed: each count has an *account*, the time up to which its tokens are explained. It begins when this
peer first met the other. Growth costs time at the greatest allowed speed, and the account may run ahead of the present
by a few rounds at most. Time that passes pays for what was not believed yet, so an honest peer loses nothing for good.
Tokens from before this peer joined are in the counts that come with states: the median of three of them if there are
three (decision 49).

Everything here is pure: `now` is an argument, in seconds of one clock that may jump.
"""

from __future__ import annotations

import heapq
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

ALL_OTHERS = "12D3KooWGp4AYpum6toAV1JQ2pEY2cHKc9W9uUgwHbdDP16N4RS7"
"""PeerID of nobody, under which a state of a run with very many peers sums up the smallest counts
(`network.token_rows`)."""

_MAX_COUNTS = 16_384
"""Counts that are kept of each source, the greatest ones. Identities cost nothing."""

_OWN_FACTOR = 4.0
"""Growth is believed up to this many times the speed that the peer claims."""

_QUICK_FACTOR = 4.0
"""Limit of the speed believed at first, as a multiple of the swarm's 75th percentile, whatever the peer claims: a claim
proves nothing."""

_DOUBLES_S = 600.0
"""Seconds for which a peer must deliver half of what its speed explains to be believed at twice the speed."""

_SWARM_FACTOR = 64.0
"""Limit of the believed speed after all doublings, as a multiple of the swarm's median."""

_NAMED_BEHIND_S = 3600.0
"""Seconds after which a peer that is still not believed in full is named."""
_MAX_DOUBLINGS = 30
"""Limit of doublings of a peer's believed speed."""
_MAX_MET = 16_384
"""Limit of peers whose first meeting is remembered."""
_FEW_PRESENT = 3
"""Number of present peers below which speeds claimed earlier count too."""
_MAJORITY = 3
"""Number of sources among which one liar is outvoted."""

_LEAST_PER_S = 1e-3
"""Lowest speed that is assumed, to avoid a division by zero."""
_CLOCK_STEP_S = 60.0
"""Lead of an account over the present that shows that the clock was set back."""
_MAX_AWAY_S = 7 * 86_400.0
"""Unaccounted time counts for a week at most, so that a clock that jumps does not explain everything."""

_Key = tuple[str, int]
"""(PeerID, stage)."""


@dataclass(frozen=True, kw_only=True)
class CountingRules:
    """Settings of the run file that concern counting."""

    began_s: float
    """Time when the run was published; nobody can have trained before."""
    burst_tokens: int
    """Tokens that may come at once, because they are reported a round at a time."""
    most_tokens: int
    """Limit of one peer's tokens."""
    total_tokens: int = 2**60
    """Length of the run. One or two sources of a state can never say that it is over."""


@dataclass(frozen=True, kw_only=True)
class TokenIncident:
    """Claim of more tokens than a peer can have trained on: only `believed` of the claimed (`told`) tokens count for
    now."""

    peer: str
    stage: int
    told: int
    believed: int
    rule: str = "tokens"

    @property
    def detail(self) -> str:
        """Description for the user."""
        return f"says that it has trained on {self.told} tokens; its speed explains {self.believed} by now"


@dataclass(frozen=True)
class _Account:
    """Time up to which a peer's tokens are explained, and the greatest speed that it ever claimed, in tokens per
    second."""

    explained_s: float
    fastest_per_s: float = 0.0
    doublings: int = 0
    """Number of times that the peer's believed speed was doubled."""
    term_s: float = -math.inf
    """Start of the present term, at whose end the peer's deliveries are judged."""
    delivered: int = 0
    """Tokens delivered since the term's start."""
    behind_s: float | None = None
    """Time since which the peer's claims are not believed in full; None if they are."""


@dataclass
class Tally:
    """Token counts of all peers. While `typical_per_s` is 0, no claim of a peer about itself is believed."""

    rules: CountingRules
    max_counts: int = _MAX_COUNTS
    typical_per_s: float = 0.0
    """Median speed of the swarm, in tokens per second."""
    quick_per_s: float = 0.0
    """75th percentile of the speeds; 0: use the median."""
    num_present: int = 0
    """Number of peers known to train now."""
    watched_s: float | None = None
    """Time up to which this peer has watched the run. After that time, the tokens that states add are limited by the
    time that has passed. None: this peer has just joined."""
    _met_s: dict[str, float] = field(default_factory=dict)
    """Time when each peer without an account was first met."""
    _learned: dict[_Key, int] = field(default_factory=dict)
    _told: dict[_Key, int] = field(default_factory=dict)
    _accounts: dict[_Key, _Account] = field(default_factory=dict)

    # ------------------------------------------------------------- reading

    def tokens(self, peer: str, stage: int = 0) -> int:
        """Return the tokens that `peer` has trained in `stage`; 0 for an unknown peer."""
        key = (peer, stage)
        return max(self._learned.get(key, 0), self._told.get(key, 0))

    @property
    def total(self) -> int:
        """Tokens of the run: those of stage 0, so that a pipeline counts each token once."""
        return sum(tokens for (_, stage), tokens in self._counts().items() if stage == 0)

    def contributions(self) -> dict[str, int]:
        """Return each peer's tokens, summed over its stages, by PeerID."""
        return _by_peer(self._counts())

    def told(self) -> dict[str, int]:
        """Return each peer's acknowledged tokens: those of its own progress records, as far as they were read and
        believed."""
        return _by_peer(self._told)

    def _counts(self) -> dict[_Key, int]:
        """Return the counts of both sources."""
        return {key: self.tokens(*key) for key in self._learned.keys() | self._told.keys()}

    # ------------------------------------------------------------- counting

    def know_speeds(self, speeds_per_s: Mapping[str, float]) -> None:
        """Record the speeds that the present peers claim, by PeerID.

        If they are few, the speeds that counted peers have claimed before are included, since a lone peer does not
        define what is usual. Once all have left, their last speeds remain, to explain what they told.
        """
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
        """Record that these peers are present or have become known. As far as this peer can tell, a new one may train
        from now on."""
        for peer in peers:
            if peer not in self._met_s:
                self._met_s[peer] = now
                if len(self._met_s) > _MAX_MET:
                    del self._met_s[next(iter(self._met_s))]

    def _since_s(self, key: _Key, now: float) -> float:
        """Return the time up to which what is counted under `key` is explained."""
        account = self._accounts.get(key)
        if account is not None:
            return account.explained_s
        self.meet([key[0]], now)
        return min(now, self._met_s.get(key[0], now))

    def with_rest(self, counts: Mapping[str, int]) -> Mapping[str, int]:
        """Return a state's counts with `ALL_OTHERS` reduced by the peers that are counted here one by one.

        Otherwise those would be counted twice, and once more with each exchange.
        """
        if ALL_OTHERS not in counts:
            return counts
        here = {peer for peer, stage in self._counts() if stage == 0}
        known = sum(max(counts.get(peer, 0), self.tokens(peer)) for peer in (here | counts.keys()) - {ALL_OTHERS})
        return {**counts, ALL_OTHERS: max(0, sum(counts.values()) - known)}

    def adopt(self, counts: Mapping[str, int], num_sources: int, now: float) -> None:
        """Add the counts of `num_sources` states, as `agreed_counts` gives them; they belong to weights that this peer
        has adopted.

        A peer that has just joined believes three sources; one or two never say that the run is over. For a peer that
        has watched the run, states add no more than all known peers can have trained since. An excess is cut in
        proportion, and believed as time passes, when a state contains it again.
        """
        most = self.rules.most_tokens
        news = {peer: min(tokens, most) - self.tokens(peer) for peer, tokens in counts.items()}
        news = {peer: tokens for peer, tokens in news.items() if tokens > 0}
        told, room = sum(news.values()), self._room_for_adopted(num_sources, now)
        if room < told:
            news = {peer: tokens * room // told for peer, tokens in news.items()}
        self.learn({peer: self.tokens(peer) + tokens for peer, tokens in news.items()}, now)
        if room >= told or self.typical_per_s > 0 or self.watched_s is None:  # otherwise wait until a speed is known
            self.watched_s = now

    def _room_for_adopted(self, num_sources: int, now: float) -> int:
        """Return how many tokens states may add to the total."""
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
        """Record what rosters count, which is certain.

        It is charged to the peers' accounts like their claims, but never refused: it is unknown when it was trained,
        and a state from a checkpoint is old.
        """
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
        """Record that `peer` claims to have trained on `tokens`, at a claimed speed (0: unknown).

        Return (the tokens counted for it now, the incident if they are fewer than it claims).
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
        """Return how many of the `tokens` claimed for `peer` in stage 0 `observe` would count, without recording
        anything."""
        return min(tokens, self._explained((peer, 0), tokens, now, claimed_per_s)[0])

    def _explained(self, key: _Key, tokens: int, now: float, claimed_per_s: float) -> tuple[int, _Account | None]:
        """Return (the tokens that are believed, the account after that). The account is None if `tokens` are not new,
        or if no speed is known."""
        held = self.tokens(*key)
        ceiling_per_s, fastest_per_s = self._speeds(key, claimed_per_s)
        if tokens <= held or ceiling_per_s <= 0:
            return held, None
        burst_s = self.rules.burst_tokens / ceiling_per_s
        since_s = max(self._since_s(key, now), now - _MAX_AWAY_S)
        account = self._accounts.get(key, _Account(since_s, term_s=since_s))
        if since_s > now + burst_s + _CLOCK_STEP_S:  # the clock was ahead, which must not silence the peer
            since_s = now
        since_s = min(since_s, now + burst_s)
        affordable = math.floor((now + burst_s - since_s) * ceiling_per_s)
        believed = max(held, min(tokens, held + affordable, self.rules.most_tokens))
        explained_s = since_s + (believed - held) / ceiling_per_s
        behind_s = None if believed >= tokens else now if account.behind_s is None else min(account.behind_s, now)
        account = replace(account, explained_s=explained_s, fastest_per_s=fastest_per_s, behind_s=behind_s)
        return believed, _delivered(account, believed - held, ceiling_per_s, now)

    def _is_incident(self, account: _Account, tokens: int, now: float) -> bool:
        """Return whether to name a peer that is not believed in full.

        A peer that trained before this one came, or is much faster than usual, is believed after a while. It is named
        if the run's age does not explain its claim, or if that while is over.
        """
        most_per_s = _SWARM_FACTOR * self.typical_per_s
        own_per_s = _OWN_FACTOR * account.fastest_per_s if account.fastest_per_s > 0 else most_per_s
        age_tokens = max(0.0, now - self.rules.began_s) * min(own_per_s, most_per_s) + self.rules.burst_tokens
        is_over = account.behind_s is not None and now > account.behind_s + _NAMED_BEHIND_S
        return is_over or tokens > min(age_tokens, self.rules.most_tokens)

    def _count_told(self, key: _Key, believed: int) -> None:
        """Record the believed tokens of a claim. The account must exist by now, because `_prune` drops accounts without
        counts."""
        self._told[key] = max(self._told.get(key, 0), believed)
        self._prune(self._told, slack=self.max_counts // 8)

    def _speeds(self, key: _Key, claimed_per_s: float) -> tuple[float, float]:
        """Return (the greatest speed that is believed, the greatest that was claimed), in tokens per second."""
        most_per_s = _SWARM_FACTOR * self.typical_per_s
        account = self._accounts.get(key)
        # The median bounds every claim: a liar cannot move it alone, while its own claim costs it nothing.
        fastest_per_s = max(min(claimed_per_s, most_per_s), 0.0 if account is None else account.fastest_per_s)
        doublings = 0 if account is None else account.doublings
        at_first_per_s = _QUICK_FACTOR * (self.quick_per_s or self.typical_per_s)
        earned_per_s = min(at_first_per_s * 2**doublings, most_per_s)
        ceiling_per_s = min(_OWN_FACTOR * fastest_per_s if fastest_per_s > 0 else earned_per_s, earned_per_s)
        return max(ceiling_per_s, _LEAST_PER_S) if most_per_s > 0 else 0.0, fastest_per_s

    def _prune(self, counts: dict[_Key, int], slack: int) -> None:
        """Keep the greatest counts; only if there are `slack` too many, because it looks at all of them."""
        if len(counts) <= self.max_counts + slack:
            return
        kept = heapq.nlargest(self.max_counts, ((tokens, key) for key, tokens in counts.items()))
        counts.clear()
        counts.update((key, tokens) for tokens, key in kept)
        for key in [key for key in self._accounts if key not in self._learned and key not in self._told]:
            del self._accounts[key]

    # ------------------------------------------------------------- merging and keeping

    def merge(self, other: Tally) -> None:
        """Take the greater of each count. The result does not depend on the order or the number of merges."""
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
        """Return sorted rows for a checkpoint: [PeerID, stage, learned, told, time up to which it is explained, fastest
        speed] of each count.

        The number of doublings follows if it is not 0.
        """
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
        """Merge `rows`. Raise ValueError, merging nothing, if they are malformed."""
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
    """Return the account after a peer has delivered that many more tokens; at a term's end, decide whether to trust it
    more."""
    delivered, term_s = account.delivered + tokens, now - account.term_s
    if 0 <= term_s < _DOUBLES_S:
        return replace(account, delivered=delivered)
    earned = term_s > 0 and delivered >= ceiling_per_s * min(term_s, _MAX_AWAY_S) / 2
    doublings = min(account.doublings + earned, _MAX_DOUBLINGS)
    return replace(account, doublings=doublings, term_s=now, delivered=0)


def agreed_counts(told: Sequence[Mapping[str, int]]) -> dict[str, int]:
    """Return each peer's tokens as several sources report them: the lower median; a source that does not know a peer
    counts as 0.

    So of two sources the lower count stands, and of one its own.
    """
    peers = {peer for counts in told for peer in counts}
    return {peer: statistics.median_low([counts.get(peer, 0) for counts in told]) for peer in sorted(peers)}


def _by_peer(counts: Mapping[_Key, int]) -> dict[str, int]:
    """Return the sum over each peer's stages, by PeerID."""
    found: dict[str, int] = {}
    for (peer, _), tokens in sorted(counts.items()):
        found[peer] = found.get(peer, 0) + tokens
    return found


def typical_speed(speeds_per_s: Iterable[float]) -> float:
    """Return the lower median of the known speeds, in tokens per second; 0 without any.

    This peer's own speed is among them, so that of two a liar's greater one is not taken.
    """
    known = sorted(speed for speed in speeds_per_s if 0 < speed < math.inf)
    return known[(len(known) - 1) // 2] if known else 0.0


def quick_speed(speeds_per_s: Iterable[float]) -> float:
    """Return the lower 75th percentile of the known speeds; of two or more, a single liar's greatest one is not
    taken."""
    known = sorted(speed for speed in speeds_per_s if 0 < speed < math.inf)
    return known[(len(known) - 1) * 3 // 4] if known else 0.0

"""Who has trained on how many tokens: a map (PeerID, stage) -> tokens, merged by the greater count.

Counts come from two sources, kept apart. What rosters count is *learned*: everybody who applied a roster counts the
same. What a peer says of itself in its progress record is *told*: it is believed as far as the peer's speed, or else
the swarm's, can explain it. A peer's count is the greater of the two; the run's total is the sum over stage 0. Counts
never fall, so that a restart, a fork or an old record takes nothing away and counts nothing twice.

How much is believed: each count has an *account*, the moment up to which its tokens are explained. Growth costs time
at the greatest speed allowed, and the account may not run ahead of the present by more than a few rounds. Time that
passes pays for what was not believed yet, so an honest peer loses nothing for good.

Pure: `now` is an argument, in seconds of one clock that may jump.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

__all__ = ["CountingRules", "Incident", "Tally", "typical_speed"]

_MAX_COUNTS = 16_384
"""So many counts are kept of each source, the greatest ones: identities cost nothing."""

_OWN_FACTOR = 4.0
"""Growth is believed up to so many times the speed that the peer claims."""

_SWARM_FACTOR = 64.0
"""... and up to so many times the swarm's median speed, whatever it claims: a claim is no proof."""

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


@dataclass(frozen=True, kw_only=True)
class Incident:
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


@dataclass
class Tally:
    """The map. `typical_per_s` is the swarm's median speed in tokens per second; while it is 0, nothing told is
    believed."""

    rules: CountingRules
    max_counts: int = _MAX_COUNTS
    typical_per_s: float = 0.0
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

    def know_speeds(self, speeds_per_s: Iterable[float]) -> None:
        """What the peers present claim to do. Once they have left, what they did last still explains what they told:
        the median known before counts, after a restart that of the fastest claims that were kept."""
        present_per_s = typical_speed(speeds_per_s)
        if present_per_s > 0:
            self.typical_per_s = present_per_s
        elif self.typical_per_s <= 0:
            self.typical_per_s = typical_speed(account.fastest_per_s for account in self._accounts.values())

    def learn(self, counts: Mapping[str, int], now: float, stage: int = 0) -> None:
        """What rosters count of these peers: certain. It is paid for as what a peer tells is, but never refused: by
        when it was trained is not known, and a state from a checkpoint is old."""
        for peer, tokens in counts.items():
            key, news = (peer, stage), tokens - self.tokens(peer, stage)
            ceiling_per_s, fastest_per_s = self._speeds(key, 0.0)
            if news > 0 and ceiling_per_s > 0:
                account = self._accounts.get(key)
                since_s = self.rules.began_s if account is None else account.explained_s
                self._accounts[key] = _Account(min(now, since_s + news / ceiling_per_s), fastest_per_s)
            if tokens > self._learned.get(key, 0):
                self._learned[key] = tokens
        self._prune(self._learned, slack=0)

    def observe(
        self, peer: str, stage: int, tokens: int, now: float, claimed_per_s: float = 0.0
    ) -> tuple[int, Incident | None]:
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
        incident = Incident(peer=peer, stage=stage, told=tokens, believed=believed) if believed < tokens else None
        return believed, incident

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
        account = self._accounts.get(key)
        since_s = self.rules.began_s if account is None else max(account.explained_s, now - _MAX_AWAY_S)
        if since_s > now + burst_s + _CLOCK_STEP_S:  # the clock was ahead: that must not silence the peer
            since_s = now
        since_s = min(since_s, now + burst_s)
        affordable = math.floor((now + burst_s - since_s) * ceiling_per_s)
        believed = max(held, min(tokens, held + affordable, self.rules.most_tokens))
        return believed, _Account(since_s + (believed - held) / ceiling_per_s, fastest_per_s)

    def _count_told(self, key: _Key, believed: int) -> None:
        """Its account must be known by now: `_prune` drops those of nobody."""
        self._told[key] = max(self._told.get(key, 0), believed)
        self._prune(self._told, slack=self.max_counts // 8)

    def _speeds(self, key: _Key, claimed_per_s: float) -> tuple[float, float]:
        """(the greatest speed that is believed, the greatest that was claimed), in tokens per second."""
        most_per_s = _SWARM_FACTOR * self.typical_per_s
        account = self._accounts.get(key)
        fastest_per_s = max(min(claimed_per_s, most_per_s), 0.0 if account is None else account.fastest_per_s)
        ceiling_per_s = min(_OWN_FACTOR * fastest_per_s if fastest_per_s > 0 else most_per_s, most_per_s)
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
            self._accounts[key] = _Account(
                max(own.explained_s, account.explained_s), max(own.fastest_per_s, account.fastest_per_s)
            )
        self._prune(self._learned, slack=0)
        self._prune(self._told, slack=0)

    def rows(self) -> list[list[str | int | float]]:
        """For a checkpoint: [PeerID, stage, learned, told, explained up to, fastest] of each count, sorted."""
        rows: list[list[str | int | float]] = []
        for key in sorted(self._counts()):
            account = self._accounts.get(key, _Account(self.rules.began_s))
            counts = [self._learned.get(key, 0), self._told.get(key, 0)]
            rows.append([*key, *counts, float(account.explained_s), float(account.fastest_per_s)])
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
                ]:
                    if min(stage, learned, told) < 0 or not math.isfinite(until_s) or not 0 <= speed < math.inf:
                        raise ValueError(f"a count out of range: {row}")
                    key = (peer, stage)
                    if learned:
                        other._learned[key] = learned
                    if told:
                        other._told[key] = told
                    other._accounts[key] = _Account(until_s, speed)
                case _:
                    raise ValueError(f"not a count: {row}")
        self.merge(other)


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

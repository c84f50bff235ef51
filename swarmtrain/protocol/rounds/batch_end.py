"""When a large batch is complete: how many tokens all volunteers have together, as one of them believes.

All add up gradients at the same weights. Each tells how many inner steps it has done, as it does with every method, in
its presence and in answers. That is seconds old when it is read, so a peer adds what the others have done since, at the
rates at which the last rosters counted them. One that ends the batch asks the others for their gradients, and they end
it after the step that they are in.

A rate is what rosters have counted and not what a peer says of itself, and at most eight times the median of its
roster, since what a roster counts is what its peers claim. A peer that no roster has counted yet is believed up to the
rate of the fastest one that has been counted; before any roster with others, up to eight times this peer's own. One
that two rosters in a row have left out is not counted until one has it. So who boasts counts as a fast volunteer, and
no more.

Who tells a later round than this peer's is asked: if the weights that it has hold, this batch is in vain, and ends.

All tokens here are tokens read, learnt or not: those are what steps cost, and what peers tell.

Pure: times are arguments, in seconds of one clock.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median_low

from swarmtrain.protocol.membership.membership import Membership, PeerInfo
from swarmtrain.protocol.rounds.rosters import RoundPublication
from swarmtrain.run_batch import BatchTarget

STALE_SHARE = 0.75
"""Share of `network.presence_ttl_s` after which a peer that has said nothing is not counted: presence is renewed after
a third of it."""
_PLAUSIBLE = 2.0
"""Tokens that a peer tells count up to this multiple of what it can have by its rate."""
_MOST_TIMES_MEDIAN = 8.0
"""A peer's rate counts up to this multiple of the median of its roster; before any roster, of this peer's own rate. A
larger one lets a liar end batches sooner, a smaller one fails volunteers that are much faster than the others."""
_MISSED_ROSTERS = 2
"""Rosters in a row without a peer after which it is not counted; without this peer, after which it follows those on
them."""
_MOST_RATES = 256
"""Peers whose rates are kept: identities cost nothing."""
_FOLLOWS_COUNTED = 0.5, 0.125
"""Shares of the batch from which on another peer's end is followed: at once, and after half of `max_wait_s`. This is
for peers that rosters have counted."""
_FOLLOWS_OTHERS = 0.75, 0.5
"""The same for peers that no roster has counted yet."""
_MOST_EXCESS = 1.25
"""Tokens of a roster, as a multiple of the batch, up to which nobody on it is doubted."""
_MOST_TIMES_OTHERS = 8.0
"""Above that, entries of more than this multiple of the median are left out."""
_ASK_SHARE = 0.75
"""Share of the batch from which on the others are asked how far they are, while this peer goes on."""
_ASK_AGAIN_S = 1.0
"""Seconds at least between two questions, while others tell that they are in a later round."""
_LEAST_STEPS = 4
"""Steps that a volunteer takes for a batch, if smaller ones make that possible: what it computes after the others' end
is waited for."""


@dataclass(frozen=True, kw_only=True)
class BatchRules:
    """Settings of the run file, and the time after which a peer that says nothing is not counted; seconds, tokens."""

    target: BatchTarget
    step_tokens: int
    """Tokens of an inner step of the run's batch, by which peers tell their progress."""
    max_wait_s: float
    round_limit_s: float
    stale_s: float


@dataclass(frozen=True, kw_only=True)
class BatchShare:
    """Part of the batch that is there, as one peer believes: its own tokens and the others', its own rate and that of
    all.
    """

    own_tokens: float
    others_tokens: float
    own_per_s: float
    tokens_per_s: float
    target_tokens: int

    @property
    def tokens(self) -> float:
        """Tokens that all volunteers have together."""
        return self.own_tokens + self.others_tokens

    @property
    def share(self) -> float:
        """Share of the batch that is there, at most 1."""
        return min(1.0, self.tokens / self.target_tokens)

    @property
    def left_s(self) -> float | None:
        """Seconds until the batch is there; None if nothing is known of the peers' rates."""
        if self.tokens >= self.target_tokens:
            return 0.0
        return (self.target_tokens - self.tokens) / self.tokens_per_s if self.tokens_per_s > 0 else None


@dataclass
class BatchEnd:
    """Decides when the batch of one round is complete."""

    rules: BatchRules
    round: int = 0
    target_tokens: int = field(default=0, init=False)
    """Tokens of this batch; before it begins, those of the run's first."""
    started_s: float = 0.0
    """Time at which this peer began to add up gradients for the batch."""
    _rates: dict[str, float] = field(default_factory=dict)
    """Tokens per second of each peer that rosters with others have counted, this one included, the latest last."""
    _missed: dict[str, int] = field(default_factory=dict)
    """Number of rosters in a row that each peer was not on, although it was there."""
    _left_out: int = 0
    """Rosters in a row that this peer applied and was not on."""
    _listed: frozenset[str] = frozenset()
    """Peers on the last of them."""
    _seen: set[str] = field(default_factory=set)
    """Peers that were there in this batch."""
    _is_late: bool = False
    """True if the others began this batch before this peer did."""
    _own_rate: float = 0.0
    """Tokens per second of this peer in its own last round."""
    _own_counted: float = 0.0
    """The same, measured as the others' are."""
    _asked_s: float = -math.inf
    """Time at which the others were last asked how far they are."""
    _ends_asking_s: float | None = None
    """Time until which the end waits for their answers; None before it is near."""
    _are_ahead: bool = False
    """True if others tell that they are in a later round."""

    def __post_init__(self) -> None:
        self.target_tokens = self.rules.target.at(0)  # somebody may ask for the share before the first batch begins

    def begin(self, round: int, run_tokens: int, own_rate: float, now: float, *, is_late: bool = False) -> None:
        """Begin a batch, before which the run has had `run_tokens`.

        `own_rate` are the tokens per second of this peer's last round, 0 before it; `is_late` says that the others have
        begun it before.
        """
        self.round, self.started_s, self._own_rate = round, now, own_rate
        self.target_tokens = self.rules.target.at(run_tokens)
        self._seen, self._is_late = set(), is_late
        self._asked_s, self._ends_asking_s, self._are_ahead = -math.inf, None, False

    def counted(
        self, tokens: Mapping[str, int], own_tokens: int, ended_s: float, *, lists_this_peer: bool = True
    ) -> None:
        """Learn rates from a roster: the `tokens` that it counted of each peer, for a batch that ended at `ended_s`,
        and those that this peer computed for it.

        Without `lists_this_peer` only who is there is learnt: a liar may have signed for itself alone, and whoever else
        was left out delivers as this peer does.
        """
        seconds = max(ended_s - self.started_s, 1e-3)
        self._own_counted = own_tokens / seconds
        self._left_out = 0 if lists_this_peer else self._left_out + 1
        self._listed = frozenset(tokens)
        # A copy, because another thread may ask for the share meanwhile.
        if not lists_this_peer:
            self._missed = {peer: times for peer, times in self._missed.items() if peer not in tokens}
            return
        missed = {peer: self._missed.get(peer, 0) + 1 for peer in set(self._seen) if peer not in tokens}
        self._missed = missed
        if self._is_late or not tokens:
            return  # the others' tokens are of more seconds than this peer saw
        found = {peer: number / seconds for peer, number in tokens.items()}
        most = _MOST_TIMES_MEDIAN * median_low(found.values())
        rates = {peer: min(rate, most) for peer, rate in found.items()}
        rates = {peer: (rate + (self._rates.get(peer) or rate)) / 2 for peer, rate in rates.items()}
        if len(rates) < 2:  # of this peer alone, which says nothing of the others
            return
        before = {peer: rate for peer, rate in self._rates.items() if peer not in rates}
        self._rates = dict([*before.items(), *rates.items()][-_MOST_RATES:])

    def _rate(self, peer: str) -> float | None:
        """Return the tokens per second of a peer: 0 if two rosters have left it out, None if it is not known."""
        return 0.0 if self._missed.get(peer, 0) >= _MISSED_ROSTERS else self._rates.get(peer)

    @property
    def _can_be_overtaken_s(self) -> float:
        return self.started_s + self.rules.max_wait_s / 2

    def share(self, own_tokens: int, others: Iterable[tuple[PeerInfo, float, float]], now: float) -> BatchShare:
        """Return how much of the batch is there.

        `others` is what `others_in` returns: of each volunteer that answers its presence, since when it is known to be
        at its present step, and when it last said anything.
        """
        elapsed_s, total, rates = now - self.started_s, 0.0, 0.0
        own = self._own_counted or self._own_rate or (own_tokens / elapsed_s if elapsed_s > 0 else 0.0)
        most = max(self._rates.values(), default=0.0) or _MOST_TIMES_MEDIAN * own or math.inf
        for info, since_s, heard_s in others:
            if now - heard_s > self.rules.stale_s:
                continue
            if not self.round - 1 <= info.round <= self.round:
                self._are_ahead = self._are_ahead or info.round > self.round
                continue
            self._seen.add(info.peer)
            counted = self._rate(info.peer)
            if counted == 0.0:
                continue
            said = info.steps_per_s * self.rules.step_tokens
            rate, limit = (min(said, most), most) if counted is None else (counted, counted)
            told, told_s = 0.0, self.started_s
            if info.round == self.round:
                told_s = min(max(since_s, self.started_s), now)
                told = float(info.inner_steps_done * self.rules.step_tokens)
            has = told + rate * (now - told_s)
            if limit < math.inf and not self._is_late:  # they began before: what is plausible is not known
                has = min(has, _PLAUSIBLE * limit * elapsed_s + self.rules.step_tokens)
            total += has
            rates += rate
        return BatchShare(
            own_tokens=own_tokens,
            others_tokens=total,
            own_per_s=own,
            tokens_per_s=rates + own,
            target_tokens=self.target_tokens,
        )

    def asks_others(self, there: BatchShare, now: float) -> bool:
        """Return whether the others should be asked how far they are.

        They are once the batch is nearly there: their answers replace what they told seconds ago, and who does not
        answer is not counted any more, so what a peer had that has vanished is not in the batch. And they are from time
        to time while some tell that they are in a later round, since then this batch may be in vain.
        """
        if self._ends_asking_s is None and there.share >= _ASK_SHARE and there.others_tokens:
            self._asked_s, self._ends_asking_s = now, now + self.rules.max_wait_s / 2
            return True
        again_s = self._asked_s + max(_ASK_AGAIN_S, self.rules.max_wait_s / 2)
        if not self._are_ahead or now < max(again_s, self._can_be_overtaken_s):
            return False
        self._asked_s = now
        return True

    def is_complete(
        self,
        there: BatchShare,
        *,
        wanted_by: Mapping[str, float],
        is_asking: bool,
        now: float,
        is_overtaken: bool = False,
        step_s: float = 0.0,
    ) -> bool:
        """Return whether to end the batch now, with the tokens `there` are.

        `wanted_by`: other volunteers that have ended it, and when they first asked for this peer's gradient. One that
        rosters have counted is believed at once if half of the batch is there, and if an eighth is, after half of
        `max_wait_s`, so that it still waits: before the step that would end later, since one takes `step_s`. Of
        others, three quarters and a half must be there. A peer that came late follows anybody, since it counts only if
        it delivers before the roster is signed. So does one that two rosters left out follow those that they listed:
        it learns no rates from them, so what it believes to be there stays too little.

        `is_asking`: the others' answers are not here yet; they are waited for until half of `max_wait_s`.
        `is_overtaken`: the others have gone on, with weights that hold, so that this batch is in vain. It counts from
        half of `max_wait_s` on: until then some may still be a roster behind, and speak for nobody.
        """
        if is_overtaken and not is_asking and self._asked_s >= self._can_be_overtaken_s:
            return True
        if now - self.started_s >= self.rules.round_limit_s:
            return True
        waits = is_asking and self._ends_asking_s is not None and now < self._ends_asking_s
        if there.tokens >= self.target_tokens and not waits:
            return True
        if not wanted_by:
            return False
        if self._is_late:  # nobody waits for it: to count it has to deliver at once
            return True
        if self._left_out >= _MISSED_ROSTERS and not self._listed.isdisjoint(wanted_by):
            return True
        # Only they: one that asks long before the others end would have their wait shortened.
        counted = {peer: at_s for peer, at_s in wanted_by.items() if not self._rates or (self._rate(peer) or 0.0) > 0}
        at_once, later = _FOLLOWS_COUNTED if counted else _FOLLOWS_OTHERS
        has_waited = now + step_s - min((counted or wanted_by).values()) >= self.rules.max_wait_s / 2
        return there.share >= (later if has_waited else at_once)


def others_in(membership: Membership) -> list[tuple[PeerInfo, float, float]]:
    """Return what a peer knows of the volunteers that answer, as `BatchEnd.share` needs it."""
    return [
        (info, membership.so_far_since_s(info.peer), membership.heard_s(info.peer)) for info in membership.in_touch()
    ]


def plausible_entries(
    entries: Sequence[RoundPublication], target_tokens: int, me: str
) -> tuple[tuple[RoundPublication, ...], tuple[RoundPublication, ...]]:
    """Return the entries of a roster that peer `me` signs for a batch of `target_tokens`, and those to leave out.

    If all together claim more than the batch by a quarter, those that claim over eight times the median are left out,
    the largest first, until the rest fits. Volunteers that are honest together have about the batch, however unlike
    they are.
    """
    kept, left_out = list(entries), list[RoundPublication]()
    while sum(entry.tokens for entry in kept) > _MOST_EXCESS * target_tokens:
        largest = max((entry for entry in kept if entry.peer != me), key=lambda entry: entry.tokens, default=None)
        if largest is None or largest.tokens <= _MOST_TIMES_OTHERS * median_low(entry.tokens for entry in kept):
            break
        kept.remove(largest)
        left_out.append(largest)
    return tuple(kept), tuple(left_out)


def planned_sequences(
    own_per_s: float,
    others_per_s: float,
    batch_sequences: int,
    target_sequences: float,
    *,
    max_wait_s: float = math.inf,
) -> int:
    """Return the sequences of each inner step of a volunteer: `batch_sequences`, or fewer if it would take fewer than
    four such steps until the batch is there, or longer for one than half of `max_wait_s`.

    The rates are in sequences per second, this peer's own and that of all others together.
    """
    if own_per_s <= 0:
        return batch_sequences
    share = target_sequences * own_per_s / (own_per_s + others_per_s)
    return max(1, int(min(batch_sequences, share / _LEAST_STEPS, own_per_s * max_wait_s / 2)))

"""When a large batch is complete: how many tokens all volunteers have together, as one of them believes.

All add up gradients at the same weights. Each tells how many inner steps it has done, as it does with every method, in
its presence and in answers. That is seconds old when it is read, so a peer adds what the others have done since, at the
rates at which the last rosters counted them. One that ends the batch asks the others for their gradients, and they end
it after the step that they are in.

A rate is what rosters have counted and not what a peer says of itself. A peer that no roster has counted yet is
believed up to the rate of the fastest one that has been counted, this peer included. So who boasts ends the first batch
early, and no second.

Pure: times are arguments, in seconds of one clock.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from swarmtrain.protocol.membership.membership import PeerInfo

__all__ = ["BatchEnd", "BatchRules", "BatchShare", "planned_sequences"]

_PLAUSIBLE = 2.0
"""Tokens that a peer tells count up to this multiple of what it can have by its rate."""
_ASK_SHARE = 0.75
"""Share of the batch from which on the others are asked how far they are, while this peer goes on."""
_LEAST_STEPS = 4
"""Steps that a volunteer takes for a batch, if smaller ones make that possible: what it computes after the others' end
is waited for."""


@dataclass(frozen=True, kw_only=True)
class BatchRules:
    """Settings of the run file, and the time after which a peer that says nothing is not counted; seconds, tokens."""

    target_tokens: int
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
    started_s: float = 0.0
    """Time at which this peer began to add up gradients for the batch."""
    _rates: dict[str, float] = field(default_factory=dict)
    """Tokens per second of each peer that the last roster counted, this one included."""
    _own_rate: float = 0.0
    """Tokens per second of this peer in its own last round."""
    _own_counted: float = 0.0
    """The same, measured as the others' are."""
    _asked: bool = False
    """True if the others were asked how far they are."""
    _wanted_s: float | None = None
    """Time since which another peer is known to have ended this batch."""

    def begin(self, round: int, own_rate: float, now: float) -> None:
        """Begin a batch. `own_rate` are the tokens per second of this peer's last round, 0 before it."""
        self.round, self.started_s, self._own_rate = round, now, own_rate
        self._wanted_s, self._asked = None, False

    def counted(self, tokens: Mapping[str, int], own_tokens: int, ended_s: float) -> None:
        """Learn rates from a roster: the `tokens` that it counted of each peer, for a batch that ended at `ended_s`,
        and those that this peer computed for it."""
        seconds = max(ended_s - self.started_s, 1e-3)
        self._own_counted = own_tokens / seconds
        found = {peer: number / seconds for peer, number in tokens.items()}
        self._rates = {peer: (rate + self._rates.get(peer, rate)) / 2 for peer, rate in found.items()}

    def share(self, own_tokens: int, others: Iterable[tuple[PeerInfo, float, float]], now: float) -> BatchShare:
        """Return how much of the batch is there.

        `others` has of each volunteer that answers its presence, since when it is known to be at its present step, and
        when it last said anything.
        """
        most = max(self._rates.values(), default=0.0)
        elapsed_s, total, rates = now - self.started_s, 0.0, 0.0
        for info, since_s, heard_s in others:
            if now - heard_s > self.rules.stale_s or not self.round - 1 <= info.round <= self.round:
                continue
            said = info.steps_per_s * self.rules.step_tokens
            rate = self._rates.get(info.peer, min(said, most) if most else said)
            told, told_s = 0.0, self.started_s
            if info.round == self.round:
                told_s = min(max(since_s, self.started_s), now)
                told = float(info.inner_steps_done * self.rules.step_tokens)
            has = told + rate * (now - told_s)
            total += min(has, _PLAUSIBLE * rate * elapsed_s + self.rules.step_tokens) if most else has
            rates += rate
        own = self._own_counted or self._own_rate or (own_tokens / elapsed_s if elapsed_s > 0 else 0.0)
        return BatchShare(
            own_tokens=own_tokens,
            others_tokens=total,
            own_per_s=own,
            tokens_per_s=rates + own,
            target_tokens=self.rules.target_tokens,
        )

    def asks_others(self, there: BatchShare) -> bool:
        """Return whether the batch is so nearly there that the others should be asked how far they are, once.

        Their answers replace what they told seconds ago, and who does not answer is not counted any more: what a peer
        had that has vanished is not in the batch.
        """
        if self._asked or there.share < _ASK_SHARE or not there.others_tokens:
            return False
        self._asked = True
        return True

    def is_complete(self, there: BatchShare, *, is_wanted: bool, is_asking: bool, now: float) -> bool:
        """Return whether to end the batch now, with the tokens `there` are.

        `is_wanted`: another peer has ended it, and asks for this peer's gradient. That is believed at once if half of
        the batch is there, and else after half of `max_wait_s`, so that the other one still waits. `is_asking`: the
        others' answers are not here yet.
        """
        if is_wanted and self._wanted_s is None:
            self._wanted_s = now
        if now - self.started_s >= self.rules.round_limit_s:
            return True
        if there.tokens >= self.rules.target_tokens and not is_asking:
            return True
        if self._wanted_s is None:
            return False
        return there.share >= 0.5 or now - self._wanted_s >= self.rules.max_wait_s / 2


def planned_sequences(own_per_s: float, others_per_s: float, batch_sequences: int, target_sequences: float) -> int:
    """Return the sequences of each inner step of a volunteer: `batch_sequences`, or fewer if it would take fewer than
    four such steps until the batch is there.

    The rates are in sequences per second, this peer's own and that of all others together.
    """
    if own_per_s <= 0:
        return batch_sequences
    share = target_sequences * own_per_s / (own_per_s + others_per_s)
    return max(1, min(batch_sequences, int(share / _LEAST_STEPS)))

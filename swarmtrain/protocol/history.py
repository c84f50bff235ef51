"""History of a run's losses, from its start: what a page or a report shows of the time before its own peer came.

A run's tokens are divided into cells of equal size, and a history keeps one point of each curve in a cell. So it never
grows beyond what a screen can show. What other peers tell fills the gaps: peers count the run's tokens at different
moments, so their points among one's own would only zigzag.

Nobody can check what a peer tells of a time that this one has not seen, so each point is the median of those that know
of it (`agreed_points`), and nothing beyond what this peer itself counts is believed (`bounded`).
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

__all__ = [
    "CELLS",
    "GAP",
    "Credibility",
    "HistoryPoint",
    "LossHistory",
    "TextSample",
    "ToldHistory",
    "agreed_points",
    "agreed_sample",
    "bounded",
]

CELLS = 2048
"""Cells of a run, so points of a curve at most."""
GAP = 32
"""Cells around a loss of one's own in which others' are left out."""
_CLOCK_SLACK_S = 600.0
"""How far another peer's clock may be off. A peer whose clock is off by more joins only if its user insists."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HistoryPoint:
    """Losses after `run_tokens` of the whole run.

    `loss` is the volunteers' training loss, nats per token, `held_out_loss` in nats per byte; each 0 if it is not
    known. `time` is in Unix seconds.
    """

    run_tokens: int
    time: float
    round: int = 0
    loss: float = 0.0
    held_out_loss: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TextSample:
    """Text that the run's model wrote after `run_tokens`: `text` continues `prompt`."""

    prompt: str
    text: str
    round: int
    run_tokens: int
    time: float


class Credibility(IntEnum):
    """Whom to believe where two contradict each other: the lower one."""

    INVITER = 0
    """The invite names it, and so the run itself came by it."""
    EARLIER = 1
    """This peer's own record of an earlier incarnation."""
    STRANGER = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class ToldHistory:
    """What one peer tells of the run."""

    teller: str
    """PeerID; empty: this peer's own record of an earlier incarnation."""
    credibility: Credibility = Credibility.STRANGER
    points: Sequence[HistoryPoint] = ()
    sample: TextSample | None = None


class LossHistory:
    """Points of both curves of a run of `total_tokens`."""

    def __init__(self, total_tokens: int) -> None:
        self.total_tokens = max(1, total_tokens)
        self._training: dict[int, HistoryPoint] = {}
        self._held_out: dict[int, HistoryPoint] = {}
        self._told: Sequence[HistoryPoint] = ()

    def add(self, point: HistoryPoint) -> bool:
        """Add what was measured here; it replaces what its cell has. A training loss is told again and again: the first
        one of the same tokens counts, with its time. Return whether anything was new.
        """
        cell, is_new = _cell(point, self.total_tokens), False
        for curve, loss in ((self._training, point.loss), (self._held_out, point.held_out_loss)):
            is_known = cell in curve and curve[cell].run_tokens == point.run_tokens and curve is self._training
            if point.run_tokens > 0 and _is_loss(loss) and not is_known:
                curve[cell], is_new = point, True
        return is_new

    def fill(self, told: Sequence[HistoryPoint]) -> None:
        """Show these points of others, as `agreed_points` returns them, where nothing was measured here; they replace
        those of the last time."""
        self._told = told

    def points(self) -> list[HistoryPoint]:
        """Return all points by rising tokens. A point has both losses only if both were measured at once."""
        found = []
        for curve, name, other in (
            (self._training, "loss", "held_out_loss"),
            (self._held_out, "held_out_loss", "loss"),
        ):
            own = sorted(curve)
            told = [
                point
                for point in self._told
                if getattr(point, name) and not _is_near(_cell(point, self.total_tokens), own)
            ]
            found += [dataclasses.replace(point, **{other: 0.0}) for point in (*curve.values(), *told)]  # type: ignore[arg-type]
        return sorted(found, key=lambda point: (point.run_tokens, point.time))


def bounded(told: ToldHistory, run_tokens: int, began_s: float, now: float) -> ToldHistory:
    """Return `told` without what cannot be: points and a sample beyond the `run_tokens` that this peer counts now, from
    before the run began, or from the future. Times are Unix seconds.
    """

    def can_be(item: HistoryPoint | TextSample) -> bool:
        is_in_time = began_s - _CLOCK_SLACK_S <= item.time <= now + _CLOCK_SLACK_S
        return 0 < item.run_tokens <= run_tokens and is_in_time

    sample = told.sample if told.sample is not None and can_be(told.sample) else None
    return dataclasses.replace(told, points=tuple(filter(can_be, told.points)), sample=sample)


def agreed_points(told: Sequence[ToldHistory], total_tokens: int) -> list[HistoryPoint]:
    """Return the points of both curves, one of a cell, as those who know of them agree: the median of the loss and of
    the time, with straight lines between a teller's points; its first and its last one hold for `GAP` cells more. Each
    point has one loss.

    If an even number know of a point, the least believed of them does not count. What neither an inviter nor this
    peer's earlier record knows must be known to half of the strangers, and to two of them if it lies before what those
    know: they were there from the start, or asked somebody who was.
    """
    points: list[HistoryPoint] = []
    for name in ("loss", "held_out_loss"):
        points += _agreed_curve(told, name, max(1, total_tokens))
    return points


def _agreed_curve(told: Sequence[ToldHistory], name: str, total_tokens: int) -> list[HistoryPoint]:
    curves: list[_Curve] = []
    edge_tokens = GAP * total_tokens // CELLS
    for one in sorted(told, key=lambda one: one.credibility):
        measured = {point.run_tokens: point for point in one.points if _is_loss(getattr(point, name))}
        if measured:
            is_trusted = one.credibility is not Credibility.STRANGER
            curves.append(_Curve(is_trusted, [measured[tokens] for tokens in sorted(measured)], name, edge_tokens))
    seen: dict[int, HistoryPoint] = {}
    for curve in curves:
        for point in curve.points:
            seen.setdefault(_cell(point, total_tokens), point)
    num_strangers = sum(not curve.is_trusted for curve in curves)
    begin_tokens = min((curve.points[0].run_tokens for curve in curves if curve.is_trusted), default=0)
    agreed = []
    for point in seen.values():
        knows = [curve for curve in curves if curve.knows(point.run_tokens)]
        is_early = point.run_tokens < begin_tokens
        if not knows[0].is_trusted and (2 * len(knows) < num_strangers or (is_early and len(knows) < 2)):
            continue
        counting = knows if len(knows) % 2 else knows[:-1]
        values = [curve.at(point.run_tokens) for curve in counting]
        loss, time = (statistics.median(numbers) for numbers in zip(*values, strict=True))
        losses = {"loss": 0.0, "held_out_loss": 0.0, name: loss}
        agreed.append(HistoryPoint(run_tokens=point.run_tokens, time=time, round=point.round, **losses))
    return agreed


class _Curve:
    """Points of one teller, of one curve, by rising tokens."""

    def __init__(self, is_trusted: bool, points: Sequence[HistoryPoint], name: str, edge_tokens: int) -> None:
        self.is_trusted, self.points, self._edge_tokens = is_trusted, points, edge_tokens
        self._tokens = [point.run_tokens for point in points]
        self._losses = [getattr(point, name) for point in points]

    def knows(self, tokens: int) -> bool:
        """Return whether `tokens` lie between its first and its last point, or near those."""
        return self._tokens[0] - self._edge_tokens <= tokens <= self._tokens[-1] + self._edge_tokens

    def at(self, tokens: int) -> tuple[float, float]:
        """Return (loss, time) after `tokens`, which it knows."""
        after = min(bisect_left(self._tokens, tokens), len(self._tokens) - 1)
        if after == 0 or self._tokens[after] <= tokens:
            return self._losses[after], self.points[after].time
        before = after - 1
        share = (tokens - self._tokens[before]) / (self._tokens[after] - self._tokens[before])
        losses, times = self._losses, (self.points[before].time, self.points[after].time)
        return losses[before] + share * (losses[after] - losses[before]), times[0] + share * (times[1] - times[0])


def agreed_sample(told: Sequence[ToldHistory]) -> TextSample | None:
    """Return the sample of whom this peer believes first; among as good ones that which most tell, then the newest.

    A stranger's counts only if another one tells the same: one alone may have written anything.
    """
    times = Counter(one.sample for one in told)
    samples = [
        (-one.credibility, times[one.sample], one.sample.run_tokens, one.sample)
        for one in told
        if one.sample and (one.credibility is not Credibility.STRANGER or times[one.sample] > 1)
    ]
    return max(samples, key=lambda found: found[:3])[3] if samples else None


def _cell(point: HistoryPoint, total_tokens: int) -> int:
    return min(point.run_tokens, total_tokens) * CELLS // total_tokens


def _is_loss(loss: float) -> bool:
    return loss > 0 and math.isfinite(loss)


def _is_near(cell: int, own: Sequence[int]) -> bool:
    """Return whether one of the cells `own`, rising, is within `GAP` of `cell`."""
    place = bisect_left(own, cell - GAP)
    return place < len(own) and own[place] <= cell + GAP

"""History of a run's losses, from its start: what a page or a report shows of the time before its own peer came.

A run's tokens are divided into cells of equal size, and a history keeps one point of each curve in a cell. So it never
grows beyond what a screen can show. What another peer tells fills the gaps: peers count the run's tokens at different
moments, so its points among one's own would only zigzag.

Nobody can check what a peer tells of a time that this one has not seen. So only those are asked that the invite names,
by which the run itself came, and who measures; and nothing beyond what this peer itself counts is believed (`bounded`).
"""

from __future__ import annotations

import dataclasses
import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

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


@dataclass(frozen=True, slots=True, kw_only=True)
class ToldHistory:
    """What one peer tells of the run."""

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
        """Show these points of another peer where nothing was measured here, in place of those of the last time unless
        those were more."""
        if len(told) >= len(self._told):
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


def _cell(point: HistoryPoint, total_tokens: int) -> int:
    return min(point.run_tokens, total_tokens) * CELLS // total_tokens


def _is_loss(loss: float) -> bool:
    return loss > 0 and math.isfinite(loss)


def _is_near(cell: int, own: Sequence[int]) -> bool:
    """Return whether one of the cells `own`, rising, is within `GAP` of `cell`."""
    place = bisect_left(own, cell - GAP)
    return place < len(own) and own[place] <= cell + GAP

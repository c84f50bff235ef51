"""History of a run's losses, from its start: what a page or a report shows of the time before its own peer came.

A run's tokens are divided into cells of equal size, and a history keeps one point of each curve in a cell. So it never
grows beyond what a screen can show. What another peer tells fills the gaps: peers count the run's tokens at different
moments, so their points among one's own would only zigzag.
"""

from __future__ import annotations

import dataclasses
import math
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

__all__ = ["CELLS", "GAP", "HistoryPoint", "LossHistory", "TextSample"]

CELLS = 2048
"""Cells of a run, so points of a curve at most."""
GAP = 32
"""Cells around a training loss of one's own in which others' are left out."""


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


class LossHistory:
    """Points of both curves of a run of `total_tokens`."""

    def __init__(self, total_tokens: int) -> None:
        self.total_tokens = max(1, total_tokens)
        self._training: dict[int, HistoryPoint] = {}
        self._held_out: dict[int, HistoryPoint] = {}
        self._told: dict[int, HistoryPoint] = {}
        """Training losses of others."""

    def add(self, point: HistoryPoint) -> None:
        """Add what was measured here; it replaces what its cell has. A training loss is told again and again: the first
        one of the same tokens counts, with its time.
        """
        cell = self._cell(point)
        for curve, loss in ((self._training, point.loss), (self._held_out, point.held_out_loss)):
            is_known = cell in curve and curve[cell].run_tokens == point.run_tokens and curve is self._training
            if point.run_tokens > 0 and loss > 0 and math.isfinite(loss) and not is_known:
                curve[cell] = point

    def fill(self, points: Iterable[HistoryPoint]) -> None:
        """Add what another peer told, where nothing is known yet."""
        for point in points:
            for curve, loss in ((self._told, point.loss), (self._held_out, point.held_out_loss)):
                if point.run_tokens > 0 and loss > 0 and math.isfinite(loss):
                    curve.setdefault(self._cell(point), point)

    def points(self) -> list[HistoryPoint]:
        """Return all points by rising tokens. A point has both losses only if both were measured at once."""
        own = sorted(self._training)
        told = [point for cell, point in self._told.items() if not _is_near(cell, own)]
        training = [dataclasses.replace(point, held_out_loss=0.0) for point in (*self._training.values(), *told)]
        held_out = [dataclasses.replace(point, loss=0.0) for point in self._held_out.values()]
        return sorted([*training, *held_out], key=lambda point: (point.run_tokens, point.time))

    def _cell(self, point: HistoryPoint) -> int:
        return min(point.run_tokens, self.total_tokens) * CELLS // self.total_tokens


def _is_near(cell: int, own: Sequence[int]) -> bool:
    """Return whether one of the cells `own`, rising, is within `GAP` of `cell`."""
    place = bisect_left(own, cell - GAP)
    return place < len(own) and own[place] <= cell + GAP

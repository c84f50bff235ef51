"""History of a run: bounded, joined with those of others, never overwritten by what they tell."""

from __future__ import annotations

import math

import pytest

from swarmtrain.protocol.history import (
    CELLS,
    GAP,
    HistoryPoint,
    LossHistory,
    TextSample,
    ToldHistory,
    bounded,
)

TOTAL = 10_000_000


def point(tokens: int, loss: float = 0.0, held_out: float = 0.0, time: float = 0.0) -> HistoryPoint:
    return HistoryPoint(run_tokens=tokens, time=time or float(tokens), loss=loss, held_out_loss=held_out)


def test_it_does_not_grow_beyond_its_cells() -> None:
    history = LossHistory(TOTAL)
    for tokens in range(1, TOTAL + 1, 997):
        history.add(point(tokens, loss=5.0, held_out=2.0))
    points = history.points()
    assert len(points) <= 2 * (CELLS + 1)
    assert [each.run_tokens for each in points] == sorted(each.run_tokens for each in points)
    assert points[0].run_tokens < TOTAL / CELLS and points[-1].run_tokens > TOTAL - 997


def test_others_fill_gaps_and_do_not_zigzag_among_ones_own() -> None:
    history = LossHistory(CELLS * 10)
    for cell in (1000, 1300):
        history.add(point(cell * 10, loss=2.0))
    history.fill([point(cell * 10, loss=3.0) for cell in range(900, 1400)])
    told = [each.run_tokens // 10 for each in history.points() if each.loss == 3.0]
    assert told == [*range(900, 1000 - GAP), *range(1000 + GAP + 1, 1300 - GAP), *range(1300 + GAP + 1, 1400)]


def test_a_late_joiner_has_the_time_before_it_and_its_own_afterwards() -> None:
    bootstrap, late = LossHistory(TOTAL), LossHistory(TOTAL)
    for tokens in range(100_000, 1_000_000, 100_000):
        bootstrap.add(point(tokens, loss=9.0, held_out=3.0 if tokens == 300_000 else 0.0))
    late.add(point(800_000, loss=1.0))
    late.fill(bootstrap.points())
    losses = {each.run_tokens: each.loss for each in late.points() if each.loss}
    told = dict.fromkeys((*range(100_000, 800_000, 100_000), 900_000), 9.0)  # a gap is 156,250 tokens
    assert losses == {tokens: loss for tokens, loss in told.items() if abs(tokens - 800_000) > 156_250} | {800_000: 1.0}
    assert [each.held_out_loss for each in late.points() if each.held_out_loss] == [3.0]


def test_what_is_measured_here_stands_whatever_is_told() -> None:
    history = LossHistory(TOTAL)
    history.fill([point(500, loss=9.0, held_out=9.0)])
    history.add(point(501, loss=2.0))
    history.add(point(501, held_out=1.0))
    history.fill([point(tokens, loss=7.0, held_out=7.0) for tokens in (1, 502, GAP * TOTAL // CELLS)])
    assert [(each.run_tokens, each.loss or each.held_out_loss) for each in history.points()] == [(501, 2.0), (501, 1.0)]


def test_a_loss_that_is_told_again_keeps_its_time() -> None:
    history = LossHistory(TOTAL)
    for time in (100.0, 200.0):
        history.add(point(500, loss=2.0, time=time))
    assert [each.time for each in history.points()] == [100.0]


@pytest.mark.parametrize("loss", [0.0, -1.0, math.nan, math.inf])
def test_no_loss_no_point(loss: float) -> None:
    history = LossHistory(TOTAL)
    history.add(point(5, loss=loss, held_out=loss))
    assert history.points() == []


def test_nothing_beyond_what_this_peer_counts_or_out_of_the_runs_time_is_believed() -> None:
    began_s, now = 1.7e9, 1.7e9 + 86_400
    good = point(400, loss=2.0, time=began_s + 5)
    sample = TextSample(prompt="a", text="b", round=1, run_tokens=400, time=now)
    wrong = [
        point(401, loss=2.0, time=began_s + 5),
        point(2**59, loss=2.0, time=now),
        point(5, loss=2.0, time=began_s - 3600),
        point(5, loss=2.0, time=now + 3600),
        point(5, loss=2.0, time=1.0),
    ]
    told = bounded(ToldHistory(points=[good, *wrong], sample=sample), 400, began_s, now)
    assert list(told.points) == [good] and told.sample == sample
    assert not bounded(told, 0, began_s, now).points, "the run has not begun"
    assert bounded(told, 399, began_s, now).sample is None
    assert bounded(told, 400, began_s, now - 3600).sample is None

"""Virtual clock: order, ties, cancelling."""

from __future__ import annotations

from swarmtrain.simulate.clock import Clock


def test_events_run_in_order_and_ties_in_the_order_asked_for() -> None:
    clock, seen = Clock(), []
    for when_s, name in ((2.0, "c"), (1.0, "a"), (2.0, "d"), (1.0, "b")):
        clock.call_at(when_s, lambda name=name: seen.append((clock.now, name)))
    clock.run_until(5.0)
    assert seen == [(1.0, "a"), (1.0, "b"), (2.0, "c"), (2.0, "d")]
    assert clock.now == 5.0
    assert clock.num_events == 4


def test_events_after_the_end_wait_and_the_past_runs_at_once() -> None:
    clock, seen = Clock(), []
    clock.call_at(3.0, seen.append, "late")
    clock.run_until(2.0)
    assert (seen, clock.next_s()) == ([], 3.0)
    clock.call_at(1.0, seen.append, "past")
    clock.run_until(2.0)
    assert (seen, clock.now) == (["past"], 2.0)
    clock.run_until(3.0)
    assert seen == ["past", "late"]
    assert clock.next_s() is None
    assert not clock.step()


def test_a_cancelled_timer_never_runs() -> None:
    clock, seen = Clock(), []
    timer = clock.call_later(1.0, seen.append, "x")
    assert timer.pending
    timer.cancel()
    timer.cancel()
    clock.run_until(2.0)
    assert seen == []
    assert clock.num_events == 0


def test_an_event_may_plan_events() -> None:
    clock, seen = Clock(), []

    def tick(left: int) -> None:
        seen.append(clock.now)
        if left:
            clock.call_later(0.5, tick, left - 1)

    clock.call_later(0.0, tick, 3)
    clock.run_until(10.0)
    assert seen == [0.0, 0.5, 1.0, 1.5]


def test_a_call_that_comes_before_is_left_and_one_that_comes_after_is_called_off() -> None:
    clock, ran = Clock(), list[float]()

    def run() -> None:
        ran.append(clock.now)

    first = clock.call_by(None, 5.0, run)
    assert clock.call_by(first, 7.0, run) is first
    sooner = clock.call_by(first, 3.0, run)
    assert sooner is not first and not first.pending
    clock.run_until(10.0)
    assert clock.call_by(sooner, 11.0, run) is not sooner, "it has run"
    clock.run_until(20.0)
    assert ran == [3.0, 11.0]

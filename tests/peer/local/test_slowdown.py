"""Slowdown of a peer: its schedule by a fake clock, exactly."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lone_exchange import lone_exchange

from swarmtrain.model.gpt import build_model
from swarmtrain.peer.lifecycle.context import VolunteerContext
from swarmtrain.peer.lifecycle.stop import Interrupted, StopFlag, StopTraining
from swarmtrain.peer.local.faults import MOST_STEPS_BEHIND, TOO_BUSY_STEPS, Slowdown, SlowedSteps
from swarmtrain.peer.training.loop import ModelLoop
from swarmtrain.peer.training.pause import LONGEST_SLEEP_S
from swarmtrain.peer.training.session import RoundReport, Session
from swarmtrain.protocol.limits import Limits, parse_slowdown
from swarmtrain.run import parse_run


def begun(factor: float, alone_s: float = 2.0) -> Slowdown:
    """Return a slowdown after two steps, of which the second lasted as long as it should."""
    slowdown = Slowdown(factor)
    assert slowdown.hold_s(100.0, 100.0) == 0.0, "the first step allocates: it says nothing of those to come"
    slowdown.held(slowdown.hold_s(alone_s, alone_s))
    return slowdown


def test_a_step_lasts_factor_times_its_time_alone() -> None:
    slowdown = begun(4.0)
    for _ in range(100):
        assert slowdown.hold_s(2.0, 2.0) == 6.0
        slowdown.held(6.0)


def test_a_busy_machine_is_not_slowed_further() -> None:
    slowdown = begun(4.0)
    assert slowdown.hold_s(8.0, 2.0) == 0.0, "the others have slowed it already"
    assert slowdown.hold_s(7.0, 2.0) == 1.0


def test_what_took_too_long_is_taken_off_the_next_holds() -> None:
    slowdown = begun(4.0)
    assert slowdown.hold_s(12.0, 2.0) == 0.0  # 4 s late
    assert slowdown.hold_s(2.0, 2.0) == 2.0
    slowdown.held(2.5)  # it woke late
    assert slowdown.hold_s(2.0, 2.0) == 5.5


def test_the_schedule_does_not_drift_while_steps_are_uneven() -> None:
    slowdown, now_s = begun(4.0), 0.0
    for step in range(1, 1001):
        took_s = (2.0, 13.0, 2.0)[step % 3]
        hold_s = slowdown.hold_s(took_s, 2.0)
        slowdown.held(hold_s)
        now_s += took_s + hold_s
        assert 8.0 * step <= now_s <= 8.0 * step + 5.0, "never ahead, and behind by one long step at most"


def test_an_old_debt_does_not_become_a_burst() -> None:
    slowdown = begun(4.0)
    slowdown.hold_s(10_000.0, 2.0)
    assert slowdown.late_s == MOST_STEPS_BEHIND * 8.0
    holds = [slowdown.hold_s(2.0, 2.0) for _ in range(14)]
    assert holds == 13 * [0.0] + [4.0], "80 s late, 6 s made good a step"


def test_what_a_pause_cut_short_is_forgiven() -> None:
    slowdown = begun(4.0)
    assert slowdown.hold_s(2.0, 2.0) == 6.0
    slowdown.held(0.5)
    assert slowdown.hold_s(2.0, 2.0) == 6.0


def test_one_odd_measurement_changes_nothing_and_lasting_change_does() -> None:
    slowdown = begun(4.0)
    for _ in range(30):
        slowdown.held(slowdown.hold_s(2.0, 2.0))
    for alone_s in (50.0, 0.0):
        assert slowdown.hold_s(2.0, alone_s) == 6.0
        slowdown.held(6.0)
    for _ in range(20):
        slowdown.held(slowdown.hold_s(1.0, 1.0))
    assert slowdown.hold_s(1.0, 1.0) == 3.0


# ---------------------------------------------------------------- the hold itself


class Machine:
    """Clock that only steps and sleeps move; a step takes `share` times its processor time."""

    def __init__(self, factor: float, share: float = 1.0) -> None:
        self.now_s = self.processor_s = 0.0
        self.share, self.slept, self.paused, self.said = share, list[float](), False, list[str]()
        self.slowed = SlowedSteps(
            factor,
            self.sleep,
            lambda: self.paused,
            lambda: self.said.append("too busy"),
            clock=lambda: self.now_s,
            processor_clock=lambda: self.processor_s,
        )

    def sleep(self, seconds: float) -> None:
        assert 0 < seconds <= LONGEST_SLEEP_S
        self.slept.append(seconds)
        self.now_s += seconds

    def step(self) -> float:
        began_s = self.now_s
        with self.slowed():
            self.now_s += self.share * 0.25
            self.processor_s += 0.25
        return self.now_s - began_s


def test_other_programs_do_not_make_it_slower_than_it_should_be() -> None:
    for share in (1.0, 2.0, 3.0):
        machine = Machine(4.0, share)
        machine.step()
        assert [machine.step() for _ in range(99)] == pytest.approx(99 * [1.0])
        assert not machine.said


def test_a_machine_that_is_too_busy_is_said_once() -> None:
    machine = Machine(4.0, share=6.0)  # half a step too late each time: 20 until there is something to give up
    for _ in range(1 + 20 + TOO_BUSY_STEPS // 2):
        machine.step()
    assert not machine.said
    for _ in range(3 * TOO_BUSY_STEPS):
        assert machine.step() == 1.5
    assert machine.said == ["too busy"] and not machine.slept


def test_one_long_stall_is_not_a_busy_machine() -> None:
    machine = Machine(4.0)
    machine.step()
    with machine.slowed():
        machine.now_s += 10_000.0
        machine.processor_s += 0.25
    for _ in range(100):
        machine.step()
    assert not machine.said


def test_a_pause_ends_the_hold() -> None:
    machine = Machine(1000.0)
    machine.step()
    machine.paused = True
    assert machine.step() == 0.25


def test_an_end_that_is_asked_for_ends_the_hold_at_once() -> None:
    stop = StopFlag()
    slowed = SlowedSteps(1000.0, stop.sleep, lambda: False, processor_clock=iter(range(0, 10**6, 1000)).__next__)
    with slowed():
        pass
    stop.stop()
    with pytest.raises(Interrupted), slowed():
        pass


def test_a_step_that_was_given_up_is_not_held() -> None:
    machine = Machine(4.0)
    machine.step()
    with pytest.raises(StopTraining), machine.slowed():
        raise StopTraining
    assert not machine.slept


def test_every_inner_step_of_a_trainer_is_slowed_and_no_merge() -> None:
    run = parse_run(
        "[run]\ntotal_tokens = 320\n[model]\ncontext_tokens = 16\nnum_layers = 1\nwidth = 16\nnum_heads = 2\n"
        "[data]\nsource = 'text'\npaths = ['x']\n[inner]\nbatch_sequences = 4\n"
        "[merge]\nmethod = 'diloco'\ninner_steps = 2\n",
        origin="x.toml",
    )
    inside, seen = [False], list[str]()

    @contextmanager
    def slowed() -> Any:
        inside[0] = True
        yield
        inside[0] = False
        seen.append("step")

    def report(finished: RoundReport) -> None:
        assert not inside[0]
        seen.append(f"round {finished.contribution.inner_steps}")

    text = torch.from_numpy(np.arange(1000) % 200)
    batches: Any = SimpleNamespace(next_batch=lambda: text[: 4 * 17].reshape(4, 17).long())
    model, exchange = build_model(run.model, 0), lone_exchange(run, 2, 5)
    loop = ModelLoop(run, model, batches, slowed)
    loop.train(Session(run=run, parameters=loop.parameters, loop=loop, exchange=exchange, report=report))
    assert seen == ["step", "step", "round 2", "step", "step", "round 2", "step", "round 1"]


def test_a_volunteer_without_a_factor_is_not_touched() -> None:
    def slowed(factor: float) -> Callable[[], AbstractContextManager[None]]:
        context: Any = SimpleNamespace(settings=SimpleNamespace(limits=Limits(slowdown=factor)), stop=StopFlag())
        return VolunteerContext.slowed(context)

    assert slowed(1.0) is nullcontext
    made = slowed(2.5)
    assert isinstance(made, SlowedSteps) and made.factor == 2.5


# ---------------------------------------------------------------- what people write


@pytest.mark.parametrize(("text", "factor"), [("1", 1.0), ("2.6", 2.6), (" 11.4", 11.4), ("1000", 1000.0)])
def test_factors(text: str, factor: float) -> None:
    assert parse_slowdown(text) == factor


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "'' is not a factor; write how many times slower, such as 2.6"),
        ("fast", "'fast' is not a factor"),
        ("0.5", "0.5 is refused; allowed: 1 (as fast as it can) to 1000 times slower"),
        ("-2", "-2 is refused"),
        ("nan", "nan is refused"),
        ("inf", "inf is refused"),
        ("1001", "1001 is refused"),
    ],
)
def test_no_factors(text: str, problem: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_slowdown(text)
    assert problem in str(caught.value)

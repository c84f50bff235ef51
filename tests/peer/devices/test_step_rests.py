"""Rests of a trainer after its steps on a device that takes virtual time: the share, pauses, an end, and the speed that
others are told."""

from __future__ import annotations

import threading
import time
from contextlib import nullcontext, suppress
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from patience import PATIENCE_S

from swarmtrain.peer.devices.compute import ComputeDevice
from swarmtrain.peer.devices.step_rests import StepRests
from swarmtrain.peer.lifecycle.context import VolunteerContext
from swarmtrain.peer.lifecycle.stop import Interrupted, StopFlag, StopTraining
from swarmtrain.peer.training.loop import ModelLoop
from swarmtrain.peer.training.model_training import ModelTraining
from swarmtrain.peer.training.pause import LONGEST_SLEEP_S, PauseSwitch
from swarmtrain.protocol.limits import Limits


class Card:
    """Device with a queue: asking takes no time, and steps are computed while somebody waits for them or sleeps."""

    def __init__(self, share: float, step_s: float = 0.1) -> None:
        self.now_s = self.busy_s = self.queued_s = 0.0
        self.share, self.step_s, self.paused, self.num_waits = share, step_s, False, 0
        self.rests = StepRests(lambda: self.share, self.finish, self.sleep, lambda: self.paused, lambda: self.now_s)

    def ask(self) -> None:
        self.queued_s += self.step_s

    def finish(self) -> None:
        self.num_waits += 1
        self._compute(self.queued_s)
        self.now_s += self.queued_s
        self.queued_s = 0.0

    def sleep(self, seconds: float) -> None:
        assert 0 < seconds <= LONGEST_SLEEP_S
        self._compute(min(seconds, self.queued_s))
        self.queued_s = max(0.0, self.queued_s - seconds)
        self.now_s += seconds

    def _compute(self, seconds: float) -> None:
        self.busy_s += seconds

    def step(self) -> float:
        began_s = self.now_s
        with self.rests():
            self.ask()
        return self.now_s - began_s


@pytest.mark.parametrize("share", [0.25, 0.5, 0.9])
def test_the_device_is_busy_for_the_share_and_not_while_it_rests(share: float) -> None:
    card = Card(share)
    for number in range(400):
        card.step_s = 0.05 + 0.2 * (number % 3)
        card.step()
    assert card.busy_s / card.now_s == pytest.approx(share, rel=0.01)


def test_all_of_the_time_nothing_waits_for_the_device() -> None:
    card = Card(1.0)
    for _ in range(10):
        assert card.step() == 0.0
    assert card.num_waits == 0


def test_another_share_counts_from_the_next_step_on() -> None:
    card = Card(1.0)
    card.step()
    card.finish()
    card.share = 0.5
    assert card.step() == pytest.approx(0.2)
    card.share = 0.2
    assert card.step() == pytest.approx(0.5)
    card.share = 1.0
    assert card.step() == 0.0


def test_a_pause_ends_the_rest_and_nothing_of_it_is_owed_afterwards() -> None:
    card = Card(0.01)
    card.paused = True
    assert card.step() == pytest.approx(0.1)
    card.paused, card.share = False, 0.5
    assert card.step() == pytest.approx(0.2)


def test_an_end_that_is_asked_for_ends_a_rest_at_once() -> None:
    stop = StopFlag()
    rests = StepRests(lambda: 0.001, lambda: None, stop.sleep, lambda: False, iter(range(0, 10**6, 1000)).__next__)
    stop.stop()
    began_s = time.monotonic()
    with pytest.raises(Interrupted), rests():
        pass
    assert time.monotonic() - began_s < 5.0


def test_after_a_step_that_was_given_up_there_is_no_rest() -> None:
    card = Card(0.5)
    with pytest.raises(StopTraining), card.rests():
        raise StopTraining
    assert card.num_waits == 0 and card.now_s == 0.0


def test_only_a_device_that_is_not_the_processor_rests_and_its_share_may_change(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    finished = list[torch.device]()
    monkeypatch.setattr("swarmtrain.peer.lifecycle.context.finish", finished.append)
    limits = SimpleNamespace(card_share=0.5)
    context: Any = SimpleNamespace(limits=limits, stop=StopFlag(), pause=PauseSwitch(), card_turn=threading.Lock())
    assert VolunteerContext.rests(context, ComputeDevice()) is nullcontext
    for name in ("cuda:1", "mps", "xpu:0"):
        made = VolunteerContext.rests(context, ComputeDevice(torch.device(name)))
        assert isinstance(made, StepRests) and made.share() == 0.5
        made.finish()
        assert finished[-1] == torch.device(name)
        limits.card_share = 0.25
        assert made.share() == 0.25, "changed while it runs"
        limits.card_share = 0.5
        context.pause.hold("asked", "you asked for it")
        assert made.ends_early()
        context.pause.release("asked")
        assert not made.ends_early()


def test_a_pause_gives_the_memory_of_steps_back_to_the_card(monkeypatch: pytest.MonkeyPatch) -> None:
    released, waited = list[torch.device](), list[str]()
    monkeypatch.setattr("swarmtrain.peer.training.loop.release_cached", released.append)
    loop: Any = SimpleNamespace(compute=ComputeDevice(torch.device("cuda:1")))
    loop.ranks = SimpleNamespace(release_cached=lambda: released.append(torch.device("cuda:2")))
    training: Any = SimpleNamespace(
        loop=SimpleNamespace(release_cached=lambda: ModelLoop.release_cached(loop)),
        swarm=SimpleNamespace(withdraw=lambda: "goodbye"),
        context=SimpleNamespace(wait=waited.append),
    )
    ModelTraining.withdraw(training)
    assert released == [torch.device("cuda:1"), torch.device("cuda:2")] and waited == ["goodbye"]


class Volunteer:
    """Volunteer of a pipeline on a card, of whose time it may use `share`."""

    def __init__(self, share: float, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("swarmtrain.peer.lifecycle.context.finish", lambda device: None)
        self.num_computed = 0
        self.context: Any = SimpleNamespace(
            limits=SimpleNamespace(card_share=share),
            settings=SimpleNamespace(limits=Limits()),
            stop=StopFlag(),
            pause=PauseSwitch(),
            card_turn=threading.Lock(),
        )
        self.context.slowed = partial(VolunteerContext.slowed, self.context)
        self.context.rests = partial(VolunteerContext.rests, self.context)

    def stage(self) -> tuple[threading.Thread, threading.Event]:
        """Return the running thread of a stage, which computes a piece of work, and what lets it be left."""
        left = threading.Event()
        work = VolunteerContext.slowed_work(self.context, ComputeDevice(torch.device("cuda:0")), left.is_set)

        def train() -> None:
            with suppress(StopTraining), work("forward"):
                time.sleep(0.02)
                self.num_computed += 1

        thread = threading.Thread(target=train, daemon=True)
        thread.start()
        return thread, left


@pytest.mark.parametrize("because", ["each leaves", "an end", "a pause"])
def test_while_one_stage_rests_no_other_uses_the_card_but_neither_waits_to_end(
    because: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = Volunteer(0.0001, monkeypatch)
    (resting, left), (waiting, left_too) = one.stage(), one.stage()
    while not one.num_computed:
        time.sleep(0.001)
    time.sleep(0.06)
    assert one.num_computed == 1, "two stages would use twice the share"
    if because == "an end":
        one.context.stop.stop()
    elif because == "a pause":
        one.context.pause.hold("asked", "you asked for it")
    for stage, leaves in ((waiting, left_too), (resting, left)):
        if because == "each leaves":
            leaves.set()
        stage.join(PATIENCE_S)
        assert not stage.is_alive(), "a rest takes minutes"
    assert one.num_computed == 2

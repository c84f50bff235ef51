"""How far a trainer is ahead of its device, and calls that wait for a device or give its memory back."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from swarmtrain.peer.devices.compute import ComputeDevice, StepQueue, finish, release_cached

KINDS = ("cuda", "xpu", "mps")


def test_by_default_it_is_the_processor_in_fp32() -> None:
    compute = ComputeDevice()
    assert compute.is_host and compute.precision == "fp32" and compute.microbatch_sequences == 0
    assert not ComputeDevice(torch.device("cuda:1")).is_host and not ComputeDevice(torch.device("mps")).is_host


class Steps:
    """Stand-in for torch.cuda's events: a device that finishes a step only when somebody waits for it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked, self.finished = 0, list[int]()
        steps = self

        class Event:
            def __init__(self, *, blocking: bool) -> None:
                assert blocking, "the thread sleeps: the processor is for others"

            def record(self, stream: str) -> None:
                assert stream == "stream of cuda:1"
                steps.asked += 1
                self.number = steps.asked

            def synchronize(self) -> None:
                steps.finished.append(self.number)

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")


def test_a_trainer_is_at_most_two_steps_ahead_of_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    steps, queue = Steps(monkeypatch), StepQueue(torch.device("cuda:1"))
    for number in range(1, 8):
        queue.step_asked()
        assert steps.asked == number and steps.finished == list(range(1, number - 1))


@pytest.mark.parametrize("kind", ["cpu", "mps", "xpu"])
def test_elsewhere_a_step_is_finished_when_its_call_returns(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    steps, queue = Steps(monkeypatch), StepQueue(torch.device(kind))
    for _ in range(5):
        queue.step_asked()
    assert steps.asked == 0


def test_who_waits_for_a_card_sleeps_and_waits_for_what_it_asked_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = Steps(monkeypatch)
    monkeypatch.delattr(torch.cuda, "synchronize")
    for number in range(1, 3):
        finish(torch.device("cuda:1"))
        assert steps.finished[-1] == steps.asked == number


@pytest.mark.parametrize(("call", "name"), [(finish, "synchronize"), (release_cached, "empty_cache")])
def test_a_device_is_asked_in_torchs_words_for_its_kind(
    call: Callable[[torch.device], None], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, kinds = list[str](), KINDS if call is release_cached else KINDS[1:]
    for kind in kinds:
        monkeypatch.setattr(getattr(torch, kind), name, lambda *device, kind=kind: asked.append(kind))
    call(torch.device("cpu"))
    assert not asked
    for kind in kinds:
        call(torch.device(kind))
    assert asked == list(kinds)

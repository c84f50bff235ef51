"""Devices of a machine, by a torch that says it has them; and the probe, on the processor and on broken devices."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from codes import raises_code
from torch import Tensor

from swarmtrain.errors import UserError
from swarmtrain.model.gpt import GPT
from swarmtrain.model.parameter_count import num_parameters
from swarmtrain.peer.devices import machine
from swarmtrain.peer.devices.machine import find_devices, least_bytes, missing_card, probe_device
from swarmtrain.protocol.devices import FoundDevice, Precision, ProbeResult, choose_device, parse_device
from swarmtrain.run import RunFile

GB = 10**9
RUN = RunFile.model_validate(
    {"run": {"total_tokens": 10**6}, "model": {"context_tokens": 16, "num_layers": 3, "width": 16, "num_heads": 2}}
)
CPU = FoundDevice(name="cpu", title="")
SMALL, LARGE = 1_000_000, 100_000_000
"""Numbers of parameters."""


@dataclass
class Card:
    title: str
    capability: tuple[int, int]
    free_bytes: int
    fails: str = ""
    """Function of torch.cuda that raises for it."""


@pytest.fixture
def torch_with(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let torch say that it is on a machine with these devices."""

    def set_up(cards: list[Card], *, hip: bool = False, mps: bool = False, xpus: int = 0, bf16: bool = False) -> None:
        def function(name: str, told: Callable[[Card], Any]) -> Callable[[int], Any]:
            def call(index: int) -> Any:
                if cards[index].fails == name:
                    raise RuntimeError("CUDA error: unknown error")
                return told(cards[index])

            return call

        for name, told in {
            "get_device_capability": lambda card: card.capability,
            "get_device_name": lambda card: card.title,
            "mem_get_info": lambda card: (card.free_bytes, 99 * GB),
        }.items():
            monkeypatch.setattr(torch.cuda, name, function(name, told))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(cards))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(cards))
        monkeypatch.setattr(torch.version, "hip", "6.0" if hip else None)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
        monkeypatch.setattr(torch.xpu, "is_available", lambda: xpus > 0)
        monkeypatch.setattr(torch.xpu, "device_count", lambda: xpus)
        monkeypatch.setattr(machine, "_processor_has_bf16", lambda: bf16)

    return set_up


NEW, OLD = Card("Card 9", (8, 9), 20 * GB), Card("Card 7", (7, 5), 10 * GB)

# ---------------------------------------------------------------- what there is


def test_a_machine_without_cards_has_a_processor(torch_with: Callable[..., None]) -> None:
    torch_with([])
    assert find_devices(LARGE) == [CPU]


def test_cards_are_found_with_their_precisions_and_free_memory(torch_with: Callable[..., None]) -> None:
    torch_with([NEW, OLD])
    new, old, processor = find_devices(SMALL)
    assert (new.name, new.title, new.precisions, new.free_bytes) == ("cuda:0", "Card 9", ("fp32", "bf16"), 20 * GB)
    assert (old.name, old.precisions) == ("cuda:1", ("fp32", "fp16")), "it has no instructions for bf16"
    assert processor == CPU


def test_a_card_of_amd_has_bf16_whatever_its_number_says(torch_with: Callable[..., None]) -> None:
    torch_with([Card("AMD", (7, 5), GB)], hip=True)
    assert find_devices(SMALL)[0].precisions == ("fp32", "bf16")


@pytest.mark.parametrize("fails", ["get_device_capability", "get_device_name", "mem_get_info"])
def test_a_card_that_torch_cannot_describe_is_left_to_its_probe(torch_with: Callable[..., None], fails: str) -> None:
    torch_with([Card("broken", (9, 0), 80 * GB, fails), OLD])
    broken, old, _ = found = find_devices(SMALL)
    assert (broken.name, broken.free_bytes, old.name) == ("cuda:0", None, "cuda:1")
    probed = list[str]()

    def probe(device: FoundDevice, precisions: tuple[Precision, ...]) -> ProbeResult:
        probed.append(device.name)
        return ProbeResult(tokens_per_s={}, problem="unknown error" if device is broken else "")

    assert choose_device(parse_device("auto"), "auto", found, GB, probe).device == "cuda:1" and probed == ["cuda:1"]
    with raises_code("device-unusable", UserError, "cuda:0", "unknown error"):
        choose_device(parse_device("cuda:0"), "auto", found, GB, probe)


def test_other_devices_are_found_too(torch_with: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    def free_of(index: int) -> tuple[int, int]:
        if index == 1:
            raise RuntimeError("The device does not support querying the available free memory")
        return 12 * GB, 16 * GB

    torch_with([], mps=True, xpus=2)
    monkeypatch.setattr(torch.xpu, "get_device_name", lambda index: f"Arc {index}")
    monkeypatch.setattr(torch.xpu, "mem_get_info", free_of)
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 11 * GB)
    monkeypatch.setattr(torch.mps, "current_allocated_memory", lambda: GB)
    found = [(each.name, each.title, each.free_bytes) for each in find_devices(SMALL)]
    assert found == [("xpu:0", "Arc 0", 12 * GB), ("xpu:1", "Arc 1", None), ("mps", "", 10 * GB), ("cpu", "", None)]


def test_an_older_torch_tells_less_of_other_devices(
    torch_with: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch_with([], mps=True, xpus=1)
    monkeypatch.setattr(torch.xpu, "get_device_name", lambda index: "Arc")
    monkeypatch.delattr(torch.xpu, "mem_get_info")
    monkeypatch.delattr(torch.mps, "recommended_max_memory")
    assert [(each.name, each.free_bytes) for each in find_devices(SMALL)] == [
        ("xpu:0", None),
        ("mps", None),
        ("cpu", None),
    ]


@pytest.mark.parametrize(
    ("parameters", "bf16", "precisions"),
    [
        (LARGE, True, ("fp32", "bf16")),
        (LARGE, False, ("fp32",)),
        (SMALL, True, ("fp32",)),  # converting takes what multiplying saves
    ],
)
def test_a_processors_bf16_is_worth_a_trial_for_a_large_model(
    torch_with: Callable[..., None], parameters: int, bf16: bool, precisions: tuple[Precision, ...]
) -> None:
    torch_with([], bf16=bf16)
    assert find_devices(parameters)[-1].precisions == precisions


def test_why_torch_shows_no_card(
    torch_with: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    driver, none = tmp_path / "nvidiactl", tmp_path / "none"
    driver.touch()
    torch_with([NEW])
    assert missing_card((none, driver)) == ""
    torch_with([])
    assert missing_card((none,)) == ""
    monkeypatch.setattr(torch.version, "cuda", None)
    for_processors = missing_card((none, driver))
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    too_old = missing_card((none, driver))
    assert "pytorch.org" in for_processors and too_old and too_old != for_processors


# ---------------------------------------------------------------- the probe


def test_a_probe_of_the_processor_measures_each_precision() -> None:
    ticks = itertools.count()
    result = probe_device(RUN, CPU, ("fp32", "bf16"), clock=lambda: next(ticks) * 0.5)
    assert not result.problem and result.tokens_per_s == {"fp32": 16 / 0.5, "bf16": 16 / 0.5}


def test_a_probe_takes_the_fastest_step_after_the_first() -> None:
    durations = [4.0, 2.0, 3.0]  # the first step, which is not timed, also loads the device's code
    times = [0.0, 0.0, *itertools.chain.from_iterable((0.0, each, each) for each in durations)]
    assert _speed(times) == 16 / 2.0


def test_a_slow_probe_ends_with_the_steps_that_it_has() -> None:
    times = [0.0, 0.0, 8.0, 16.0, 16.0, 99.0]  # began, first step, second step from 8 to 16, over the limit
    assert _speed(times) == 16 / 8.0


def _speed(times: list[float]) -> float:
    left = iter(times)
    result = probe_device(RUN, CPU, ("fp32",), clock=lambda: next(left, times[-1]))
    assert not result.problem
    return result.tokens_per_s["fp32"]


def test_a_probe_computes_no_deeper_than_two_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    layers, build = list[int](), machine.build_model
    monkeypatch.setattr(
        machine, "build_model", lambda section, seed: (layers.append(section.num_layers), build(section, seed))[1]
    )
    assert not probe_device(RUN, CPU, ("fp32",)).problem and layers == [2]


CARD = FoundDevice(name="cpu:0", title="a processor that is taken for a card", precisions=("fp32", "bf16"))
"""The processor by another name, so that its losses are compared with the processor's."""


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_what_the_processor_computes_passes_for_right_in_each_precision(precision: Precision) -> None:
    assert not probe_device(RUN, CARD, (precision,)).problem


@pytest.mark.parametrize("device", [CPU, CARD])
@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_a_device_whose_loss_is_not_finite_is_broken(
    monkeypatch: pytest.MonkeyPatch, device: FoundDevice, wrong: float
) -> None:
    _break(monkeypatch, lambda loss: loss * wrong)
    result = probe_device(RUN, device, ("fp32", "bf16"))
    assert "fp32" in result.problem and str(wrong) in result.problem and not result.tokens_per_s


@pytest.mark.parametrize(
    ("precision", "factor", "is_broken"),
    [
        ("fp32", 1.001, False),
        ("fp32", 1.003, True),
        ("fp32", 0.997, True),
        ("fp32", 0.0, True),
        ("bf16", 1.02, False),
        ("bf16", 1.05, True),
        ("fp16", 1.02, True),
    ],
)
def test_a_device_whose_loss_is_not_the_processors_is_broken(
    monkeypatch: pytest.MonkeyPatch, precision: Precision, factor: float, is_broken: bool
) -> None:
    _break(monkeypatch, lambda loss: loss * factor)
    result = probe_device(RUN, CARD, (precision,))
    assert bool(result.problem) == is_broken and bool(result.tokens_per_s) != is_broken


def _break(monkeypatch: pytest.MonkeyPatch, change: Callable[[Tensor], Tensor]) -> None:
    """Let losses be changed where they are differentiated, which is on the device."""
    right = GPT.loss
    monkeypatch.setattr(
        GPT, "loss", lambda self, batch: change(right(self, batch)) if torch.is_grad_enabled() else right(self, batch)
    )


@pytest.mark.parametrize("device", [CPU, CARD])
@pytest.mark.parametrize(
    ("error", "says"),
    [
        (RuntimeError("CUDA error: no kernel image is available\nCompile with more"), "no kernel image"),
        (torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "out of memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), "out of memory"),
        (MemoryError(), "out of memory"),
        (AssertionError("Torch not compiled with CUDA enabled"), "not compiled"),
        (NotImplementedError("no such operator on it"), "no such operator"),
        (RuntimeError(""), "fp32"),
        (RuntimeError("x" * 5000), "xxx"),
    ],
)
def test_an_error_in_a_probe_is_a_problem_of_one_line(
    monkeypatch: pytest.MonkeyPatch, device: FoundDevice, error: Exception, says: str
) -> None:
    def fail(loss: Tensor) -> Tensor:
        raise error

    _break(monkeypatch, fail)
    result = probe_device(RUN, device, ("fp32",))
    assert says in result.problem and "\n" not in result.problem and len(result.problem) < 300
    assert not result.tokens_per_s


def test_a_card_is_broken_if_the_processor_cannot_say_what_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: GPT, batch: Tensor) -> Tensor:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(GPT, "loss", fail)
    assert "out of memory" in probe_device(RUN, CARD, ("fp32",)).problem


def test_a_device_that_this_torch_does_not_know_is_a_problem() -> None:
    """A real error of torch: this one has no such device, or the machine has none."""
    if torch.xpu.is_available():
        pytest.skip("it has one")
    result = probe_device(RUN, FoundDevice(name="xpu:0", title=""), ("fp32",))
    assert result.problem and not result.tokens_per_s


def test_training_takes_at_least_four_numbers_a_parameter_and_a_sequences_activations() -> None:
    deeper = RUN.model_copy(update={"model": RUN.model.model_copy(update={"num_layers": 6})})
    larger_batch = RUN.model_copy(update={"inner": RUN.inner.model_copy(update={"batch_sequences": 64})})
    assert least_bytes(RUN) > 16 * num_parameters(RUN.model)
    assert least_bytes(larger_batch) == least_bytes(RUN) < least_bytes(deeper)

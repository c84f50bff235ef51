"""Use of a graphics card by other programs, and its temperature, by a stand-in for NVML."""

from __future__ import annotations

import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from fake_nvml import FakeCard, FakeNvml

from swarmtrain.peer.devices import card_usage as module
from swarmtrain.peer.devices.card_usage import CardUsage, card_problem

ME = os.getpid()
GAME, DESKTOP, PEER, WORKER, GONE = 70_001, 70_002, 70_003, 70_004, 70_005
COMMANDS = {
    GAME: ("blender", ["/usr/bin/blender", "swarmtrain"]),
    DESKTOP: ("Xorg", ["/usr/lib/Xorg", ":0"]),
    PEER: ("swarmtrain", ["/home/ben/.venv/bin/python3.11", "/home/ben/.venv/bin/swarmtrain", "join"]),
    WORKER: ("python3", ["python3", "-c", "from multiprocessing.spawn import spawn_main"]),
}


class Process:
    """Stand-in for psutil.Process: this process has no children, and the worker is the other peer's."""

    def __init__(self, pid: int | None = None) -> None:
        self.pid = ME if pid is None else pid
        if self.pid not in (ME, *COMMANDS):
            raise psutil.NoSuchProcess(self.pid)

    def children(self, recursive: bool) -> list[Process]:
        return []

    def parents(self) -> list[Process]:
        return [Process(PEER)] if self.pid == WORKER else []

    def cmdline(self) -> list[str]:
        return COMMANDS[self.pid][1]

    def name(self) -> str:
        return COMMANDS[self.pid][0]


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Machine whose two cards torch numbers the other way round, as by CUDA_VISIBLE_DEVICES=1,0."""
    monkeypatch.setattr(module.psutil, "Process", Process)
    properties = [
        SimpleNamespace(uuid="b", pci_domain_id=0, pci_bus_id=0xA1, pci_device_id=0),
        SimpleNamespace(uuid="a", pci_domain_id=0, pci_bus_id=0x21, pci_device_id=0),
    ]
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties[index])
    monkeypatch.setattr(torch.cuda, "_get_nvml_device_index", lambda index: 1 - index)
    monkeypatch.setattr(torch.version, "hip", None)
    yield


@pytest.fixture
def nvml() -> FakeNvml:
    return FakeNvml([FakeCard("a", "00000000:21:00.0"), FakeCard("b", "00000000:A1:00.0")])


def measured(usage: CardUsage) -> tuple[float | None, str, float | None, float | None]:
    (card,) = usage.measure()
    assert card.name == "cuda:0"
    return card.others_share, card.program, card.celsius, card.slowdown_celsius


def begun(nvml: FakeNvml) -> CardUsage:
    """Return a measurement that has seen its first samples, which are of an unknown time."""
    usage = CardUsage(["cuda:0"], nvml.load)
    nvml.cards[1].busy[ME] = 50
    assert measured(usage)[:2] == (0.0, "")
    return usage


def test_what_others_compute_is_counted_and_the_busiest_is_named(nvml: FakeNvml) -> None:
    usage = begun(nvml)
    nvml.cards[1].busy = {ME: 60, DESKTOP: 2, GAME: 33}
    assert measured(usage) == (0.35, "blender", 60.0, 93.0)
    assert not usage.problem
    nvml.cards[1].busy = {GAME: 80, DESKTOP: 70}
    assert measured(usage)[:2] == (1.0, "blender")
    nvml.cards[1].busy = {GONE: 40}
    assert measured(usage)[:2] == (0.4, f"process {GONE}")


def test_each_time_it_asks_for_what_came_since(nvml: FakeNvml) -> None:
    usage = begun(nvml)
    measured(usage)
    measured(usage)
    assert nvml.asked_since == [0, 2_000_000, 3_000_000]


def test_the_first_samples_are_of_an_unknown_time(nvml: FakeNvml) -> None:
    nvml.cards[1].busy = {GAME: 90}
    usage = CardUsage(["cuda:0"], nvml.load)
    assert [measured(usage)[:2] for _ in range(2)] == [(0.0, ""), (0.9, "blender")]


def test_nobody_there_is_no_use(nvml: FakeNvml) -> None:
    usage = begun(nvml)
    nvml.cards[1].busy = {}
    assert measured(usage)[:2] == (0.0, "") and not usage.problem


def test_memory_alone_is_no_use(nvml: FakeNvml) -> None:
    usage = begun(nvml)
    nvml.cards[1].running = [ME, DESKTOP, GAME]
    assert measured(usage)[:2] == (0.0, "")


def test_other_peers_share_the_card_and_their_processes_too(nvml: FakeNvml) -> None:
    usage = begun(nvml)
    nvml.cards[1].busy = {ME: 30, PEER: 40, WORKER: 25}
    assert measured(usage)[:2] == (0.0, "")


def test_processes_that_this_one_has_started_are_its_own(nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = begun(nvml)
    monkeypatch.setattr(Process, "children", lambda self, recursive: [Process(GAME)] if recursive else [])
    nvml.cards[1].busy, nvml.cards[1].running = {GAME: 90}, [GAME]
    assert measured(usage)[:2] == (0.0, "") and not usage.problem


def test_only_the_command_and_the_modules_of_this_package_are_peers() -> None:
    runs = module._runs_swarmtrain
    assert runs(["python", "-m", "swarmtrain.cli", "join"]) and runs(["/x/bin/python3", "/y/swarmtrain", "join"])
    assert runs(["python", "-I", "-m", "swarmtrain.peer.devices.compiled_loss"])
    for other in ([], ["blender", "swarmtrain"], ["python", "train.py", "swarmtrain"], ["code", "/src/swarmtrain"]):
        assert not runs(other), other


@pytest.mark.parametrize("has", ["uuid", "place", "neither"])
def test_torchs_number_of_a_card_is_not_nvmls(has: str, nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch) -> None:
    nvml.has_uuids = has == "uuid"
    if has != "neither":
        monkeypatch.delattr(torch.cuda, "_get_nvml_device_index")  # it is torch's own, and may go
    if has == "neither":
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace())
    nvml.cards[1].celsius = 71
    assert [card.celsius for card in CardUsage(["cuda:0", "cuda:1"], nvml.load).measure()] == [71.0, 60.0]


def test_in_a_container_others_stay_unknown_and_the_temperature_is_told(nvml: FakeNvml) -> None:
    usage = CardUsage(["cuda:0"], nvml.load)
    nvml.cards[1].running = [12345]  # this process, as the system outside numbers it
    nvml.cards[1].busy = {12345: 99}
    assert measured(usage) == (None, "", 60.0, 93.0)
    assert usage.problem == "its driver does not name this peer among the processes there, as in a container or in WSL"


def test_a_driver_that_does_not_sample_processes_tells_the_temperature(nvml: FakeNvml) -> None:
    usage = CardUsage(["cuda:0"], nvml.load)
    nvml.cards[1].samples = 3
    assert measured(usage) == (None, "", 60.0, 93.0)
    assert usage.problem == "its driver says: Not Supported"
    measured(usage)
    assert nvml.num_inits == 1, "that is no reason to look for the card again"


def test_a_driver_older_than_the_library_ends_nothing_and_tells_the_temperature(nvml: FakeNvml) -> None:
    nvml.is_old = True
    usage = CardUsage(["cuda:0"], nvml.load)
    assert [measured(usage) for _ in range(2)] == [(None, "", 60.0, 93.0)] * 2
    assert "do not fit together (NVMLLibraryMismatchError)" in usage.problem
    assert nvml.num_inits == 1, "that is no reason to look for the card again"


def test_a_driver_that_does_not_tell_where_it_slows_down_is_well(nvml: FakeNvml) -> None:
    nvml.cards[1].slowdown = None
    usage = begun(nvml)
    assert measured(usage)[2:] == (60.0, None) and not usage.problem


def test_without_the_library_nothing_is_known_and_it_says_what_to_install() -> None:
    def missing(name: str) -> Any:
        raise ModuleNotFoundError("No module named 'pynvml'")

    usage = CardUsage(["cuda:0"], missing)
    assert measured(usage) == (None, "", None, None)
    assert usage.problem == "nvidia-ml-py is not installed here (pip install nvidia-ml-py)"
    assert card_problem("cuda:0", missing) == usage.problem


def test_a_driver_that_is_gone_is_no_error_and_is_asked_again(nvml: FakeNvml) -> None:
    usage = begun(nvml)
    nvml.broken = 15
    assert measured(usage) == (None, "", None, 93.0), "where it slows down stays known"
    assert usage.problem == "its driver says: GPU is lost"
    nvml.broken = 9
    assert measured(usage) == (None, "", None, 93.0)
    assert usage.problem == "its driver says: GPU is lost", "the first one"
    nvml.broken = None
    nvml.cards[1].busy = {GAME: 50}
    measured(usage)
    assert measured(usage) == (0.5, "blender", 60.0, 93.0)
    assert nvml.num_inits == 2, "the old handle is that of a driver which is gone"


def test_a_driver_that_never_answers_is_said(nvml: FakeNvml) -> None:
    nvml.broken = 9
    assert card_problem("cuda:0", nvml.load) == "its driver does not answer: Driver Not Loaded"
    nvml.broken = None
    assert card_problem("cuda:0", nvml.load) == ""


@pytest.mark.parametrize("name", ["mps", "xpu:0"])
def test_cards_of_other_makers_are_not_watched(name: str, nvml: FakeNvml) -> None:
    usage = CardUsage([name], nvml.load)
    (card,) = usage.measure()
    assert card.others_share is None and card.celsius is None
    assert usage.problem == "only cards of NVIDIA can be watched"


def test_a_card_of_amd_is_called_cuda_too(nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert card_problem("cuda:0", nvml.load) == "only cards of NVIDIA can be watched"

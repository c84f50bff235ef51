"""What a peer tells of its device: at its start, and when memory ran out."""

from __future__ import annotations

from dataclasses import replace

import torch

from swarmtrain.events import DeviceEvent, Event, WarningEvent
from swarmtrain.peer.devices.choice import ChosenCompute
from swarmtrain.peer.devices.compute import ComputeDevice
from swarmtrain.peer.devices.report import ComputeReport
from swarmtrain.protocol.devices import DeviceChoice
from swarmtrain.run import RunFile

RUN = RunFile.model_validate({"run": {"total_tokens": 10**6}, "inner": {"batch_sequences": 8}})
CHOICE = DeviceChoice(device="cuda:0", title="Card 9", precision="bf16", why="it works")


def told(microbatch_why: str = "") -> tuple[ComputeReport, ComputeDevice, list[Event]]:
    compute, events = ComputeDevice(torch.device("cuda:0"), "bf16", 4), list[Event]()
    return ComputeReport(RUN, ChosenCompute(compute, CHOICE, microbatch_why), events.append), compute, events


def test_the_reasons_of_the_start_are_joined() -> None:
    report, _, events = told("blocks are computed again in the backward pass, since otherwise not one sequence fits")
    report.start()
    [event] = events
    assert isinstance(event, DeviceEvent) and (event.device, event.microbatch_sequences) == ("cuda:0", 4)
    assert event.why.startswith("it works; blocks are computed again")


def test_fewer_sequences_and_blocks_computed_again_are_told_each_in_a_line() -> None:
    report, four, events = told()
    two, one = replace(four, microbatch_sequences=2), replace(four, microbatch_sequences=1)
    report.smaller(four, two)
    report.smaller(one, replace(one, recomputes=True))
    first, second, third, fourth = events
    for warning, words in ((first, "repeats the step with 2"), (third, "computes blocks again in the backward pass")):
        assert isinstance(warning, WarningEvent) and warning.code == "smaller-microbatch"
        assert words in warning.message and "cuda:0" in warning.message and "\n" not in warning.message
    assert isinstance(second, DeviceEvent) and second.microbatch_sequences == 2 and "4 sequences at once" in second.why
    assert isinstance(fourth, DeviceEvent) and fourth.microbatch_sequences == 1
    assert "computed again in the backward pass" in fourth.why and "one sequence" in fourth.why

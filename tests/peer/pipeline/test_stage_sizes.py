"""Costs of stages: how many fit into a machine's memory, and each one's share of the whole."""

from __future__ import annotations

from contextlib import AbstractContextManager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from codes import raises_code

from swarmtrain.errors import UserError
from swarmtrain.model.stages import Costs, StageShape, measured_costs, stage_shapes
from swarmtrain.peer.devices.compute import ComputeDevice
from swarmtrain.peer.devices.machine import card_bytes_of_graph, card_bytes_of_stage
from swarmtrain.peer.estimate import DAEMON_BYTES, IMPORTS_BYTES
from swarmtrain.peer.pipeline import stage_assignment
from swarmtrain.peer.pipeline.stage_assignment import (
    cut_and_measure,
    graph_bytes,
    room_for_stages,
    stage_bytes,
    whole_tokens_per_s,
)
from swarmtrain.run import PublishedSection, RunFile
from swarmtrain.words import size_in_words

PROGRAM_BYTES = IMPORTS_BYTES + DAEMON_BYTES
GB = 10**9


def run_file(stages: int = 4, boundaries: tuple[int, ...] = (), num_layers: int = 12, **inner: Any) -> RunFile:
    return RunFile.model_validate(
        {
            "run": {"total_tokens": 10**9},
            "model": {"context_tokens": 128, "num_layers": num_layers, "width": 512, "num_heads": 8},
            "inner": {"batch_sequences": 16, **inner},
            "pipeline": {"stages": stages, "boundaries": boundaries},
        }
    )


RUN = run_file()
SHAPES = stage_shapes(RUN.model, (3, 6, 9))
LARGEST = max(stage_bytes(RUN, shape) for shape in SHAPES)
GRAPH = max(graph_bytes(RUN, shape) for shape in SHAPES)


# ---------------------------------------------------------------- memory


@pytest.mark.parametrize("most", range(1, 5))
def test_so_many_stages_fit_each_with_a_graph(most: int) -> None:
    exactly = PROGRAM_BYTES + most * (LARGEST + GRAPH)
    room = room_for_stages(RUN, SHAPES, exactly)
    assert room.most_stages == most and room.graph_bytes >= GRAPH
    if most > 1:
        assert room_for_stages(RUN, SHAPES, exactly - 1).most_stages == most - 1


def test_no_more_stages_than_there_are_and_half_of_the_rest_for_graphs() -> None:
    room = room_for_stages(RUN, SHAPES, 100 * GB)
    assert room.most_stages == len(SHAPES)
    assert room.graph_bytes == pytest.approx((100 * GB - PROGRAM_BYTES - 4 * LARGEST) / 2 / 4)


@pytest.mark.parametrize("limit_bytes", [1, PROGRAM_BYTES, PROGRAM_BYTES + LARGEST + GRAPH - 1])
def test_a_limit_that_not_one_stage_fits_into_is_told_with_its_numbers(limit_bytes: int) -> None:
    numbers = (f" {size_in_words(number)}" for number in (PROGRAM_BYTES + LARGEST + GRAPH, limit_bytes))
    with raises_code("too-little-memory", UserError, *numbers, "--memory") as caught:
        room_for_stages(RUN, SHAPES, limit_bytes)
    assert "\n" not in str(caught.value)


def test_without_a_limit_it_takes_half_of_the_machine_and_one_stage_at_least(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = SimpleNamespace(total_bytes=64 * GB)
    monkeypatch.setattr(stage_assignment, "machine_memory", lambda: memory)
    assert room_for_stages(RUN, SHAPES, 0) == room_for_stages(RUN, SHAPES, 32 * GB)
    memory.total_bytes = GB // 4
    room = room_for_stages(RUN, SHAPES, 0)
    assert room.most_stages == 1 and room.graph_bytes == GRAPH


@pytest.mark.parametrize("most", range(1, 5))
def test_on_a_card_so_many_stages_fit_each_with_a_graph(most: int) -> None:
    """Which stages they will be is not known, and peers move."""
    largest = max(card_bytes_of_stage(shape) for shape in SHAPES)
    graph = max(card_bytes_of_graph(RUN, shape) for shape in SHAPES)
    exactly = most * (largest + graph)
    room = room_for_stages(RUN, SHAPES, 100 * GB, exactly)
    assert room.most_stages == most and graph <= room.graph_bytes
    assert most * (largest + room.graph_bytes) <= exactly
    assert room_for_stages(RUN, SHAPES, 100 * GB, exactly - 1).most_stages == max(1, most - 1)
    little = room_for_stages(RUN, SHAPES, PROGRAM_BYTES + LARGEST + GRAPH, 100 * GB)
    assert little.most_stages == 1, "they must fit into main memory too"
    assert little.graph_bytes == pytest.approx((100 * GB - largest) / 2), "graphs are on the card"


def test_a_graph_grows_with_blocks_microbatch_and_head() -> None:
    def of(blocks: int, *, has_head: bool = False, microbatch: int = 2) -> int:
        shape = StageShape(model=RUN.model, first_block=0, last_block=blocks, has_embedding=False, has_head=has_head)
        return graph_bytes(run_file(microbatch_sequences=microbatch), shape)

    assert of(0) == 0 < of(1) and of(4) == pytest.approx(4 * of(1), abs=4)
    assert of(3, microbatch=4) == 2 * of(3)
    assert of(0, has_head=True) == 3 * 4 * 2 * 128 * 256, "three copies of the logits, fp32"


# ---------------------------------------------------------------- where to cut, and what it costs


@pytest.fixture
def costs(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Return costs measured on this machine."""
    told = {"embedding": 1.0, "block": 2.0, "head": 3.0}
    monkeypatch.setattr(stage_assignment, "measured_costs", lambda model, sequences, *on: Costs(**told))
    return told


@pytest.mark.parametrize(
    ("boundaries", "seconds"),
    [
        ((3, 6, 9), [7.0, 6.0, 6.0, 9.0]),
        ((1, 2, 3), [3.0, 2.0, 2.0, 21.0]),
        ((0, 6, 12), [1.0, 12.0, 12.0, 3.0]),
    ],
)
def test_the_run_files_boundaries_are_kept(
    costs: dict[str, float], boundaries: tuple[int, ...], seconds: list[float]
) -> None:
    cut, shares = cut_and_measure(run_file(boundaries=boundaries))
    assert cut == boundaries
    assert shares == pytest.approx([each / 28 for each in seconds], abs=1e-6)


def test_without_boundaries_it_is_cut_where_the_stages_cost_alike(costs: dict[str, float]) -> None:
    cut, shares = cut_and_measure(RUN)
    assert cut == (3, 6, 10) and shares == pytest.approx([7 / 28, 6 / 28, 8 / 28, 7 / 28], abs=1e-6)
    costs["head"] = 11.0
    cut, shares = cut_and_measure(RUN)
    assert cut[-1] == 12 and max(shares) == pytest.approx(11 / 36, abs=1e-6)


@pytest.mark.parametrize("stages", [2, 3, 5, 7, 14])
def test_costs_add_up_to_one_and_can_be_published(costs: dict[str, float], stages: int) -> None:
    run = run_file(stages)
    cut, shares = cut_and_measure(run)
    assert len(cut) == stages - 1 and len(shares) == stages
    assert sum(shares) == pytest.approx(1.0, abs=1e-6 * stages)
    section = {"created": "2030-01-02T03:04:05Z", "swarmtrain": "1", "held_out_sha256": "ab" * 32, "held_out_bytes": 1}
    published = PublishedSection.model_validate(section | {"boundaries": cut, "stage_costs": shares})
    assert RunFile.model_validate(run.model_dump() | {"published": published.model_dump()}).published == published


def test_this_machines_speed_is_a_microbatch_through_the_whole_model(costs: dict[str, float]) -> None:
    tokens = RUN.microbatch_sequences * 128
    assert whole_tokens_per_s(RUN) == pytest.approx(tokens / (1.0 + 12 * 2.0 + 3.0))


def test_a_devices_speed_is_that_of_finished_work_in_its_precision() -> None:
    parts, finished = list[bool](), list[int]()

    def autocast() -> AbstractContextManager[None]:
        parts.append(True)
        return ComputeDevice(precision="bf16").autocast()

    section = RUN.model.model_copy(update={"width": 16, "num_heads": 2, "context_tokens": 8})
    costs = measured_costs(section, 1, torch.device("cpu"), autocast, lambda: finished.append(len(parts)))
    assert min(costs.embedding, costs.block, costs.head) > 0 and len(parts) == 15
    assert finished == [number // 2 for number in range(1, 31)], "before each piece and after it"


def test_what_is_measured_here_gives_costs_of_every_stage() -> None:
    run = RunFile.model_validate(
        {
            "run": {"total_tokens": 10**6},
            "model": {"context_tokens": 16, "num_layers": 2, "width": 16, "num_heads": 2},
            "pipeline": {"stages": 4, "boundaries": (0, 1, 2)},
        }
    )
    cut, shares = cut_and_measure(run)
    assert cut == (0, 1, 2) and all(share > 0 for share in shares)
    assert sum(shares) == pytest.approx(1.0, abs=1e-5) and whole_tokens_per_s(run) > 0


def test_a_cheap_stage_costs_something(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage_assignment, "measured_costs", lambda model, n: Costs(embedding=1e-4, block=1.0, head=1.0))
    run = RunFile.model_validate(
        {"run": {"total_tokens": 10**9}, "model": {"num_layers": 256}, "pipeline": {"stages": 2, "boundaries": (0,)}}
    )
    _, shares = cut_and_measure(run)
    PublishedSection.model_validate(
        {
            "created": "2030-01-02T03:04:05Z",
            "swarmtrain": "1",
            "held_out_sha256": "ab" * 32,
            "held_out_bytes": 1,
            "boundaries": (0,),
            "stage_costs": shares,
        }
    )

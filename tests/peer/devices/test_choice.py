"""What a volunteer computes on: the precision that its run demands, and as many sequences at once as fit."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from codes import raises_code

from swarmtrain.errors import UserError
from swarmtrain.model.parameter_count import num_parameters
from swarmtrain.model.stages import expected_boundaries, stage_shapes
from swarmtrain.peer.devices import choice as choice_module
from swarmtrain.peer.devices.choice import (
    FittingMicrobatch,
    check_device,
    choose_compute,
    fitting_microbatch,
)
from swarmtrain.peer.devices.machine import (
    card_bytes_of_graph,
    card_bytes_of_stage,
    least_bytes,
    least_part_bytes,
    num_trained,
    part_bytes,
)
from swarmtrain.peer.estimate import RECOMPUTING_BYTES, activation_bytes, estimate, positions_bytes
from swarmtrain.protocol.devices import (
    DeviceRequest,
    FoundDevice,
    Precision,
    PrecisionRequest,
    ProbeResult,
    parse_device,
)
from swarmtrain.run import RunFile

CPU = FoundDevice(name="cpu", title="")
AUTO = DeviceRequest()
Probed = list[tuple[str, tuple[Precision, ...]]]


def run_file(precision: str = "any", microbatch: int = 4) -> RunFile:
    return RunFile.model_validate(
        {
            "run": {"total_tokens": 10**6},
            "model": {"context_tokens": 64, "num_layers": 2, "width": 32, "num_heads": 2},
            "inner": {"batch_sequences": 16, "microbatch_sequences": microbatch, "precision": precision},
            "evaluation": {"batch_sequences": 4},
        }
    )


def card(sequences: float, name: str = "cuda:0", recomputes: bool = False) -> FoundDevice:
    """Return a card with memory for a model and this many sequences, by the estimate, and a tenth to spare."""
    run = run_file()
    one = activation_bytes(run, 1, run.model.num_layers, has_head=True, recomputes=recomputes, on_card=True)
    free = round((16 * num_parameters(run.model) + sequences * one) / 0.9)
    return FoundDevice(name=name, title="Card 9", precisions=("fp32", "bf16"), free_bytes=free)


@pytest.fixture
def machine_with(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Probed]:
    """Let the machine have these devices, on each of which bf16 is twice as fast; returns what is probed."""

    def set_up(*devices: FoundDevice) -> Probed:
        probed: Probed = []

        def probe(run: RunFile, device: FoundDevice, precisions: tuple[Precision, ...]) -> ProbeResult:
            probed.append((device.name, precisions))
            return ProbeResult(tokens_per_s={each: 1.0 if each == "fp32" else 2.0 for each in precisions})

        monkeypatch.setattr(choice_module, "find_devices", lambda parameters: [*devices, CPU])
        monkeypatch.setattr(choice_module, "probe_device", probe)
        monkeypatch.setattr(choice_module, "missing_card", lambda: "")
        return probed

    return set_up


# ---------------------------------------------------------------- precision


@pytest.mark.parametrize(
    ("demanded", "wanted", "precision"),
    [
        ("any", "auto", "bf16"),
        ("any", "fp16", "fp16"),
        ("any", "fp32", "fp32"),
        ("fp32", "auto", "fp32"),
        ("bf16", "auto", "bf16"),
        ("fp16", "auto", "fp16"),
        ("bf16", "bf16", "bf16"),
    ],
)
def test_the_runs_precision_goes_before_the_fastest(
    machine_with: Callable[..., Probed], demanded: str, wanted: PrecisionRequest, precision: str
) -> None:
    probed = machine_with(card(8))
    chosen = choose_compute(run_file(demanded), AUTO, wanted)
    assert chosen.compute.precision == chosen.choice.precision == precision
    assert chosen.compute.device == torch.device("cuda:0") and not chosen.compute.is_host
    is_free = (demanded, wanted) == ("any", "auto")
    assert probed == [("cuda:0", ("fp32", "bf16") if is_free else (precision,))]


@pytest.mark.parametrize(("demanded", "wanted"), [("fp32", "bf16"), ("bf16", "fp32"), ("fp16", "bf16")])
def test_a_precision_other_than_the_runs_is_refused_before_anything_is_probed(
    machine_with: Callable[..., Probed], demanded: str, wanted: PrecisionRequest
) -> None:
    probed = machine_with(card(8))
    with raises_code("precision-demanded", UserError, f"--precision {wanted}", demanded, "inner.precision"):
        choose_compute(run_file(demanded), AUTO, wanted)
    assert not probed


def test_a_runs_precision_holds_on_a_processor_too(machine_with: Callable[..., Probed]) -> None:
    probed = machine_with()
    chosen = choose_compute(run_file("bf16"), AUTO, "auto")
    assert (chosen.compute.device.type, chosen.compute.precision) == ("cpu", "bf16") and chosen.compute.is_host
    assert probed == [("cpu", ("bf16",))]


# ---------------------------------------------------------------- sequences at once


@pytest.mark.parametrize(
    ("sequences", "fitting"),
    [(1.01, 1), (3.99, 3), (5.01, 5), (15.99, 15), (16.01, 16), (500, 16)],
)
def test_a_card_computes_as_many_sequences_at_once_as_fit(sequences: float, fitting: int) -> None:
    found = fitting_microbatch(run_file(), card(sequences), 0)
    assert found.sequences == fitting and not found.recomputes and "the card" in found.why
    assert fitting_microbatch(run_file(), card(sequences), 1) == found, "main memory's limit is no card's"


@pytest.mark.parametrize(("sequences", "fitting"), [(0.1, 1), (1.01, 1), (1.1, 1)])
def test_where_not_one_sequence_fits_a_card_blocks_are_computed_again(sequences: float, fitting: int) -> None:
    assert fitting_microbatch(run_file(), card(sequences, recomputes=True), 0) == FittingMicrobatch(
        fitting,
        True,
        "blocks are computed again in the backward pass, since otherwise not one sequence fits the card",
    )


def test_blocks_computed_again_leave_room_for_more_sequences() -> None:
    """A deep model: one sequence as usual takes what several take otherwise."""
    run = run_file()
    run = run.model_copy(update={"model": run.model.model_copy(update={"num_layers": 24})})
    one, less = (activation_bytes(run, 1, 24, has_head=True, recomputes=each, on_card=True) for each in (False, True))
    free = round((16 * num_parameters(run.model) + 0.99 * one) / 0.9)
    found = fitting_microbatch(run, FoundDevice(name="cuda:0", title="", free_bytes=free), 0)
    assert found.recomputes and found.sequences == int(0.99 * one / less) > 4


def test_a_single_block_is_not_computed_again() -> None:
    """That would take as much memory, and more time."""
    run = run_file()
    run = run.model_copy(update={"model": run.model.model_copy(update={"num_layers": 1})})
    assert activation_bytes(run, 1, 1, has_head=True, recomputes=True) == activation_bytes(run, 1, 1, has_head=True)
    found = fitting_microbatch(run, CPU, 1)
    assert found.sequences == 1 and not found.recomputes and "--memory" in found.why


def test_a_reason_is_told_only_if_the_run_file_says_something_else() -> None:
    assert fitting_microbatch(run_file(microbatch=4), card(4.01), 0) == FittingMicrobatch(4)
    assert fitting_microbatch(run_file(microbatch=0), card(100), 0) == FittingMicrobatch(16)
    assert fitting_microbatch(run_file(microbatch=4), CPU, 0) == FittingMicrobatch(4)


def test_main_memory_takes_what_the_run_file_says_or_what_its_limit_lets_fit() -> None:
    run = run_file(microbatch=8)
    cost, one = estimate(run, num_parameters(run.model), 2), activation_bytes(run, 1, 2, has_head=True)
    whole = cost.memory_bytes
    for enough in (0, whole, 10 * whole):
        assert fitting_microbatch(run, CPU, enough) == FittingMicrobatch(8), "never more than the run file says"
    for fewer in range(1, 8):
        found = fitting_microbatch(run, CPU, whole - fewer * one + 8)
        assert found.sequences == 8 - fewer and not found.recomputes and "--memory" in found.why
    for little in (whole - 7.5 * one, 1):
        found = fitting_microbatch(run, CPU, int(little))
        assert found.sequences == 1 and "--memory" in found.why
        assert not found.recomputes, "importing what computes blocks again takes more than it saves in so small a model"


def test_main_memory_counts_what_computing_blocks_again_imports() -> None:
    """A deep and wide model: one sequence's activations take more than the import."""
    run = run_file(microbatch=1)
    model = run.model.model_copy(update={"num_layers": 24, "width": 512, "context_tokens": 512})
    run = run.model_copy(update={"model": model})
    few, usual = (estimate(run, num_parameters(model), 2, recomputes=each) for each in (True, False))
    saved = usual.memory_activations_bytes - few.memory_activations_bytes
    assert usual.memory_bytes - few.memory_bytes == saved - RECOMPUTING_BYTES > 0
    found = fitting_microbatch(run, CPU, few.memory_bytes)
    assert found.sequences == 1 and found.recomputes and "backward pass" in found.why and "--memory" in found.why
    assert not fitting_microbatch(run, CPU, usual.memory_bytes).recomputes


def test_a_limit_of_a_cards_memory_counts_as_its_free_memory(
    machine_with: Callable[..., Probed], monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = list[tuple[float, Any]]()
    total = 4 * (card(16.5).free_bytes or 0)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: type("Properties", (), {"total_memory": total})
    )
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda share, device: limits.append((share, device))
    )
    machine_with(card(16.5))
    few = card(3.5).free_bytes or 0
    assert choose_compute(run_file(), AUTO, "auto", vram_bytes=few).compute.microbatch_sequences == 3
    assert limits == [(few / total, "cuda:0")], "torch keeps it too"
    assert choose_compute(run_file(), AUTO, "auto", vram_bytes=9 * total).compute.microbatch_sequences == 16
    assert limits[1:] == [(1.0, "cuda:0")]
    chosen = choose_compute(run_file(), AUTO, "auto", vram_bytes=1000)
    assert chosen.compute.device.type == "cpu" and chosen.choice.why, "no model fits that"
    assert len(limits) == 2
    with raises_code("device-unusable", UserError, "cuda:0"):
        choose_compute(run_file(), parse_device("cuda"), "auto", vram_bytes=1000)


def test_several_cards_compute_as_much_as_the_smallest_holds_up_to_a_part(
    machine_with: Callable[..., Probed], monkeypatch: pytest.MonkeyPatch
) -> None:
    both = parse_device("cuda:0,1")
    machine_with(card(5.5), card(3.5, "cuda:1"))
    compute = choose_compute(run_file(), both, "auto").compute
    assert (compute.device, compute.others) == (torch.device("cuda:0"), (torch.device("cuda:1"),))
    assert compute.microbatch_sequences == 3 and compute.num_host_ranks == 1
    machine_with(card(50), card(50, "cuda:1"))
    assert choose_compute(run_file(), both, "auto").compute.microbatch_sequences == 8, "half of 16"
    machine_with(card(50), card(1.1, "cuda:1", recomputes=True))
    compute = choose_compute(run_file(), both, "auto").compute
    assert compute.recomputes and compute.microbatch_sequences == 1
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda device: type("Properties", (), {"total_memory": 4 * (card(50).free_bytes or 0)}),
    )
    limits = list[tuple[float, Any]]()
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda share, device: limits.append((share, device))
    )
    machine_with(card(50), card(50, "cuda:1"))
    half = choose_compute(run_file(), both, "auto", vram_bytes=2 * (card(50).free_bytes or 0)).compute
    assert half.memory_share == 0.5 and limits == [(0.5, "cuda:0")], "the other rank limits its own card"


def test_a_model_that_fits_no_single_card_is_cut_between_several(
    machine_with: Callable[..., Probed], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, both = run_file(), parse_device("cuda:0,1")
    assert least_part_bytes(run, 2) >= least_bytes(run), "two blocks are put together, and this model has no more"
    run = run.model_copy(update={"model": run.model.model_copy(update={"num_layers": 12})})
    whole, part = least_bytes(run), least_part_bytes(run, 2)
    assert part_bytes(run, 2) < part < whole
    small, least = (replace(card(1, "cuda:1"), free_bytes=number) for number in (whole - 1, part))
    machine_with(card(50), replace(card(50), name="cuda:1", free_bytes=whole))
    assert not choose_compute(run, both, "auto").compute.shards, "each holds all of it"
    probed = machine_with(card(50), small)
    chosen = choose_compute(run, both, "auto")
    assert chosen.compute.shards and "cuda:1 (Card 9) does not hold all of it" in chosen.choice.why and len(probed) == 2
    assert chosen.compute.model_device == torch.device("cpu") and chosen.compute.device == torch.device("cuda:0")
    machine_with(card(50), least)
    compute = choose_compute(run, both, "auto").compute
    assert compute.shards and compute.recomputes and compute.microbatch_sequences == 1
    machine_with(card(50), small)
    compute, free = choose_compute(run, both, "auto").compute, 0.9 * (whole - 1) - part_bytes(run, 2)
    fitting, next_one = (
        activation_bytes(
            run, compute.microbatch_sequences + more, 12, has_head=True, recomputes=compute.recomputes, on_card=True
        )
        for more in (0, 1)
    )
    assert fitting <= free < next_one, "beside its part"
    machine_with(card(50), replace(least, free_bytes=part - 1))
    with raises_code("device-unusable", UserError, "cuda:1 (Card 9)"):
        choose_compute(run, both, "auto")
    machine_with(small)
    assert choose_compute(run, AUTO, "auto").compute.device.type == "cpu", "only where several are asked for"
    monkeypatch.setitem(sys.modules, "torch.distributed.fsdp", SimpleNamespace())
    machine_with(card(50), small)
    with raises_code("device-unusable", UserError, "cuda:1 (Card 9)", "torch 2.6"):
        choose_compute(run, both, "auto")


def test_ranks_on_the_processor_share_its_memory(machine_with: Callable[..., Probed]) -> None:
    run, request = run_file(microbatch=8), parse_device("cpu,cpu")
    machine_with()
    compute = choose_compute(run, request, "auto").compute
    assert compute.microbatch_sequences == 8 and compute.num_host_ranks == 2 and not compute.recomputes
    assert choose_compute(run_file(microbatch=16), request, "auto").compute.microbatch_sequences == 8, "its part"
    one = activation_bytes(run, 1, 2, has_head=True)
    alone, cost = (estimate(run, num_parameters(run.model), 2, num_ranks=number) for number in (1, 2))
    own = 16 * num_parameters(run.model) + positions_bytes(run)
    assert cost.memory_parameters_bytes - alone.memory_parameters_bytes == own
    assert cost.memory_activations_bytes == 2 * alone.memory_activations_bytes == pytest.approx(16 * one)
    assert cost.memory_program_bytes > alone.memory_program_bytes
    for fewer in range(1, 8):
        found = fitting_microbatch(run, CPU, cost.memory_bytes - 2 * fewer * one + 16, num_ranks=2)
        assert found.sequences == 8 - fewer and not found.recomputes
    with raises_code("too-many-devices", UserError, "16 sequences"):
        choose_compute(run, parse_device(",".join(["cpu"] * 17)), "auto")


def test_a_card_below_the_least_memory_is_passed_over(machine_with: Callable[..., Probed]) -> None:
    least = least_bytes(run_file())
    probed = machine_with(replace(card(1), free_bytes=least - 1))
    assert choose_compute(run_file(), AUTO, "auto").compute.device.type == "cpu" and not probed
    machine_with(replace(card(1), free_bytes=least))
    compute = choose_compute(run_file(), AUTO, "auto").compute
    assert compute.microbatch_sequences == 1 and compute.recomputes


# ---------------------------------------------------------------- at once


def test_a_device_that_is_not_there_is_told_before_anything_is_fetched(machine_with: Callable[..., Probed]) -> None:
    probed = machine_with(card(1))
    for text in ("auto", "cpu", "cuda", "cuda:0"):
        check_device(parse_device(text))
    for text in ("cuda:1", "mps", "xpu"):
        with raises_code("device-not-there", UserError, f"--device {text}", "cuda:0"):
            check_device(parse_device(text))
    assert not probed


# ---------------------------------------------------------------- stages


def cut_run(precision: str = "any", boundaries: tuple[int, ...] = (1,)) -> RunFile:
    pipeline = {"stages": 2, "boundaries": boundaries}
    return RunFile.model_validate(run_file(precision, 2).model_dump() | {"pipeline": pipeline})


@pytest.mark.parametrize(
    ("demanded", "wanted", "precision"),
    [("any", "auto", "bf16"), ("any", "bf16", "bf16"), ("fp32", "auto", "fp32"), ("bf16", "auto", "bf16")],
)
def test_a_stage_is_trained_on_a_card_that_any_stage_fits(
    machine_with: Callable[..., Probed], demanded: str, wanted: PrecisionRequest, precision: str
) -> None:
    run, fits = cut_run(demanded), least_bytes(cut_run())
    assert fits < least_bytes(run_file()) * 3 and num_trained(run) < num_parameters(run.model)
    shapes = stage_shapes(run.model, (1,))
    assert fits == max(card_bytes_of_stage(shape) + card_bytes_of_graph(run, shape) for shape in shapes)
    machine_with(replace(card(1), free_bytes=fits))
    chosen = choose_compute(run, AUTO, wanted)
    assert (chosen.compute.device, chosen.compute.precision) == (torch.device("cuda:0"), precision)
    assert (chosen.compute.microbatch_sequences, chosen.compute.recomputes) == (2, False), "what drivers send"
    assert chosen.card_bytes == int(0.9 * fits) and not chosen.microbatch_why
    probed = machine_with(replace(card(1), free_bytes=fits - 1))
    chosen = choose_compute(cut_run(), AUTO, "fp32")
    assert chosen.compute.is_host and chosen.card_bytes is None and not probed


def test_stages_are_not_trained_in_fp16(machine_with: Callable[..., Probed]) -> None:
    old = replace(card(500), precisions=("fp32", "fp16"))
    probed = machine_with(old)
    with raises_code("stages-in-fp16", UserError, "--precision fp16", "cut into stages"):
        choose_compute(cut_run(), AUTO, "fp16")
    assert not probed and choose_compute(cut_run(), AUTO, "auto").compute.precision == "fp32"
    assert probed == [("cuda:0", ("fp32",))]
    machine_with(old)
    assert choose_compute(run_file(), AUTO, "auto").compute.precision == "fp16", "whole models are"


def test_a_processors_stages_are_in_fp32_unless_another_precision_is_asked_for(
    machine_with: Callable[..., Probed],
) -> None:
    probed = machine_with()
    chosen = choose_compute(cut_run(), AUTO, "auto")
    assert chosen.compute.is_host and chosen.compute.precision == "fp32" and not probed
    assert choose_compute(cut_run(), parse_device("cpu"), "bf16").compute.precision == "bf16"


def test_without_boundaries_the_largest_stage_is_that_of_the_expected_cut(machine_with: Callable[..., Probed]) -> None:
    run = RunFile.model_validate(cut_run(boundaries=()).model_dump())
    shapes = stage_shapes(run.model, expected_boundaries(run.model, 2))
    assert num_trained(run) == max(shape.num_parameters for shape in shapes)


def test_gradients_of_a_large_batch_are_not_added_up_in_parts() -> None:
    run = RunFile.model_validate({"run": {"total_tokens": 10**6}, "merge": {"method": "batch"}})
    with raises_code("device-unusable", UserError, "cuda:1 does not hold the whole model", "not cut between cards"):
        choice_module._check_sharding(run, parse_device("cuda:0,cuda:1"), "cuda:1")

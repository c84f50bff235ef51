"""Choice of device and precision: each reason for and against a device, by tables of what there is and is measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import pytest
from codes import raises_code

from swarmtrain.errors import UserError
from swarmtrain.protocol.devices import (
    DeviceChoice,
    DeviceRequest,
    FoundDevice,
    Precision,
    PrecisionRequest,
    ProbeResult,
    cards_in_words,
    check_num_ranks,
    choose_device,
    fastest_precision,
    largest_part,
    matching_devices,
    parse_device,
)
from swarmtrain.run import RunFile

GB = 10**9
CPU = FoundDevice(name="cpu", title="")
CARD = FoundDevice(name="cuda:0", title="Card 9", precisions=("fp32", "bf16"), free_bytes=8 * GB)
LARGER = FoundDevice(name="cuda:1", title="Card 12", precisions=("fp32", "fp16"), free_bytes=12 * GB)
APPLE = FoundDevice(name="mps", title="")
INTEL = FoundDevice(name="xpu:1", title="")
MISSING = "there is a card, of no use"
NEEDED = 4 * GB


@dataclass
class Machine:
    """What each device's probe brings; it keeps what was probed."""

    speeds: Mapping[str, Mapping[Precision, float]] = field(default_factory=dict)
    problems: Mapping[str, str] = field(default_factory=dict)
    probed: list[tuple[str, tuple[Precision, ...]]] = field(default_factory=list)

    def probe(self, device: FoundDevice, precisions: tuple[Precision, ...]) -> ProbeResult:
        self.probed.append((device.name, precisions))
        if problem := self.problems.get(device.name):
            return ProbeResult(tokens_per_s={}, problem=problem)
        return ProbeResult(tokens_per_s=self.speeds.get(device.name, dict.fromkeys(precisions, 1000.0)))

    def choose(
        self, request: str, found: Sequence[FoundDevice], wanted: PrecisionRequest = "auto", missing: str = ""
    ) -> DeviceChoice:
        return choose_device(parse_device(request), wanted, found, NEEDED, self.probe, missing=missing)


# ---------------------------------------------------------------- what is asked for


@pytest.mark.parametrize(
    ("text", "kind", "index"),
    [
        ("auto", "auto", None),
        ("cpu", "cpu", None),
        ("cuda", "cuda", None),
        ("cuda:0", "cuda", 0),
        (" CUDA:12 ", "cuda", 12),
        ("mps", "mps", None),
        ("xpu", "xpu", None),
        ("xpu:3", "xpu", 3),
    ],
)
def test_devices_that_can_be_asked_for(text: str, kind: str, index: int | None) -> None:
    request = parse_device(text)
    assert (request.kind, request.index) == (kind, index) and str(request) == text.strip().lower()


@pytest.mark.parametrize(
    "text",
    [
        *("", "gpu", "cuda:", "cuda:-1", "cuda:x", "cuda:1000", "cpu:0", "auto:1", "mps:0", "cuda 0", "0"),
        *("cuda:0,", ",cuda:0", "cuda:0,cpu", "cpu,cuda:0", "cpu,1", "cpu,cpu:1", "auto,auto", "mps,mps", "xpu:0,1"),
    ],
)
def test_what_is_no_device_is_refused_with_what_is_allowed(text: str) -> None:
    with pytest.raises(ValueError, match=r"auto, cpu, cuda or cuda:N, or several: cuda:0,1 or cpu,cpu") as raised:
        parse_device(text)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "each", "written"),
    [
        ("cuda:0,1", ("cuda:0", "cuda:1"), "cuda:0,1"),
        ("cuda:2,0,1", ("cuda:2", "cuda:0", "cuda:1"), "cuda:2,0,1"),
        (" CUDA:0, cuda:1", ("cuda:0", "cuda:1"), "cuda:0,1"),
        ("cpu,cpu", ("cpu", "cpu"), "cpu,cpu"),
        ("cpu,cpu,cpu", ("cpu", "cpu", "cpu"), "cpu,cpu,cpu"),
        ("cuda:1", ("cuda:1",), "cuda:1"),
    ],
)
def test_several_devices_of_one_kind_can_be_asked_for(text: str, each: tuple[str, ...], written: str) -> None:
    request = parse_device(text)
    assert str(request) == written and parse_device(written) == request and request.num_ranks == len(each)
    assert tuple(str(single) for single in request.each) == each and not any(single.others for single in request.each)


@pytest.mark.parametrize(
    ("text", "words"), [("cuda:0,0", "twice"), ("cuda:1,0,1", "twice"), ("cuda,cuda", "which"), ("cuda,1", "cuda:N")]
)
def test_several_cards_are_each_named_once(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words) as raised:
        parse_device(text)
    assert "cuda:0,1" in str(raised.value)


def run_of(batch_sequences: int, stages: int = 1, adapter: str = "none") -> RunFile:
    model = {} if adapter == "none" else {"source": "huggingface", "base": "x"}
    sections = {"inner": {"batch_sequences": batch_sequences}, "pipeline": {"stages": stages}, "model": model}
    return RunFile.model_validate({"run": {"total_tokens": 10**6}, "adapter": {"method": adapter}, **sections})


@pytest.mark.parametrize(("text", "fewer"), [("cuda:0,1,2", "cuda:0,1"), ("cpu,cpu,cpu", "cpu,cpu")])
def test_more_devices_than_a_batch_has_sequences_are_refused(text: str, fewer: str) -> None:
    request = parse_device(text)
    check_num_ranks(request, run_of(3))
    with raises_code("too-many-devices", UserError, f"--device {text}", "2 sequences", fewer):
        check_num_ranks(request, run_of(2))


def test_stages_are_trained_on_one_device() -> None:
    check_num_ranks(parse_device("cuda:1"), run_of(8, stages=2))
    with raises_code("stages-on-one-device", UserError, "--device cuda:1,0", "such as cuda:1,"):
        check_num_ranks(parse_device("cuda:1,0"), run_of(8, stages=2))


def test_an_adapter_is_trained_on_one_device() -> None:
    check_num_ranks(parse_device("cuda:1"), run_of(8, adapter="lora"))
    with raises_code("adapter-on-one-device", UserError, "--device cpu,cpu", "such as cpu,"):
        check_num_ranks(parse_device("cpu,cpu"), run_of(8, adapter="lora"))


def test_the_largest_part_of_a_batch_is_rounded_up() -> None:
    assert [largest_part(number, 2) for number in (1, 2, 5, 8)] == [1, 1, 3, 4]


@pytest.mark.parametrize(
    ("request_text", "names"),
    [
        ("cuda", ["cuda:0", "cuda:1", "cuda:12"]),
        ("cuda:1", ["cuda:1"]),
        ("cpu", ["cpu"]),
        ("mps", ["mps"]),
        ("xpu", ["xpu:0"]),
        ("xpu:0", ["xpu:0"]),
        ("xpu:1", []),
    ],
)
def test_a_request_allows_its_kind_and_number(request_text: str, names: list[str]) -> None:
    request = parse_device(request_text)
    every = ["cuda:0", "cuda:1", "cuda:12", "cpu", "mps", "xpu:0"]
    assert [name for name in every if request.allows(name)] == names


# ---------------------------------------------------------------- which device


def test_without_a_card_the_processor_trains_and_is_not_probed() -> None:
    machine = Machine()
    choice = machine.choose("auto", [CPU])
    assert (choice.device, choice.title, choice.precision) == ("cpu", "", "fp32")
    assert not machine.probed and choice.why and str(choice) == f"training on cpu in fp32: {choice.why}"


def test_a_card_that_torch_does_not_show_is_told_of() -> None:
    machine = Machine()
    assert machine.choose("auto", [CPU], missing=MISSING).why == MISSING
    assert MISSING not in machine.choose("cpu", [CPU], missing=MISSING).why, "the processor was asked for"
    with raises_code("device-not-there", UserError, "--device cuda", "cpu", MISSING):
        machine.choose("cuda", [CPU], missing=MISSING)
    with pytest.raises(UserError) as raised:
        machine.choose("mps", [CPU], missing=MISSING)
    assert MISSING not in str(raised.value), "it is of another kind"


def test_a_card_that_works_is_taken_before_the_processor() -> None:
    machine = Machine()
    choice = machine.choose("auto", [CARD, CPU])
    assert (choice.device, choice.title) == ("cuda:0", "Card 9") and str(CARD) in str(choice)
    assert machine.probed == [("cuda:0", ("fp32", "bf16"))]


def test_a_card_that_is_too_small_is_passed_over_with_both_figures() -> None:
    machine = Machine()
    small = FoundDevice(name="cuda:0", title="Card 2", free_bytes=NEEDED - 1)
    choice = machine.choose("auto", [small, CPU])
    assert choice.device == "cpu" and not machine.probed, "it is not even tried"
    assert all(each in choice.why for each in ("cuda:0 (Card 2)", "4"))
    just = FoundDevice(name="cuda:0", title="Card 2", free_bytes=NEEDED)
    assert machine.choose("auto", [just, CPU]).device == "cuda:0"
    with raises_code("device-unusable", UserError, "--device cuda:0", "Card 2"):
        machine.choose("cuda:0", [small, CPU])


def test_a_broken_card_is_passed_over_with_its_problem() -> None:
    machine = Machine(problems={"cuda:0": "no kernel for it"})
    choice = machine.choose("auto", [CARD, CPU])
    assert choice.device == "cpu" and "cuda:0 (Card 9)" in choice.why and "no kernel for it" in choice.why
    with raises_code("device-unusable", UserError, "--device cuda", "no kernel for it"):
        machine.choose("cuda", [CARD, CPU])


def test_of_two_cards_the_one_with_more_free_memory_is_tried_first() -> None:
    machine = Machine()
    assert machine.choose("auto", [CARD, LARGER, CPU]).device == "cuda:1"
    assert [name for name, _ in machine.probed] == ["cuda:1"]
    broken = Machine(problems={"cuda:1": "it burns"})
    choice = broken.choose("auto", [CARD, LARGER, CPU])
    assert choice.device == "cuda:0" and "cuda:1" in choice.why and "it burns" in choice.why
    assert [name for name, _ in broken.probed] == ["cuda:1", "cuda:0"]
    both = Machine(problems={"cuda:0": "too old", "cuda:1": "it burns"})
    choice = both.choose("auto", [CARD, LARGER, CPU])
    assert choice.device == "cpu" and choice.why.index("it burns") < choice.why.index("too old")


def test_a_kind_without_a_number_takes_the_best_of_its_kind_that_works() -> None:
    assert Machine().choose("cuda", [CARD, LARGER, CPU]).device == "cuda:1"
    choice = Machine(problems={"cuda:1": "it burns"}).choose("cuda", [CARD, LARGER, CPU])
    assert choice.device == "cuda:0" and "it burns" in choice.why
    both = Machine(problems={"cuda:0": "too old", "cuda:1": "it burns"})
    with raises_code("device-unusable", UserError, "it burns", "too old"):
        both.choose("cuda", [CARD, LARGER, CPU])
    assert [name for name, _ in both.probed] == ["cuda:1", "cuda:0"], "never the processor"


def test_a_number_takes_that_card_and_no_other() -> None:
    machine = Machine()
    assert machine.choose("cuda:0", [CARD, LARGER, CPU]).device == "cuda:0"
    assert [name for name, _ in machine.probed] == ["cuda:0"]


@pytest.mark.parametrize("text", ["cuda:2", "mps", "xpu", "xpu:0"])
def test_a_device_that_is_not_there_is_told_with_those_that_are(text: str) -> None:
    with raises_code("device-not-there", UserError, f"--device {text}", "cuda:0 (Card 9)", "cpu", "auto") as raised:
        Machine().choose(text, [CARD, CPU])
    assert len(raised.value.problems) == 1 and "\n" not in str(raised.value)


def test_the_processor_asked_for_is_taken_although_a_card_is_there() -> None:
    machine = Machine()
    assert machine.choose("cpu", [CARD, CPU]).device == "cpu" and not machine.probed


def test_devices_that_nobody_tested_are_taken_only_when_asked_for() -> None:
    found = [INTEL, APPLE, CPU]
    machine = Machine()
    assert machine.choose("auto", found).device == "cpu" and not machine.probed
    tested = machine.choose("cpu", found).why
    for text, device in (("mps", "mps"), ("xpu", "xpu:1"), ("xpu:1", "xpu:1")):
        choice = machine.choose(text, found)
        assert choice.device == device and "tested" in choice.why and "tested" not in tested
    assert [name for name, _ in machine.probed] == ["mps", "xpu:1", "xpu:1"], "they are probed as cards are"


def test_devices_are_tried_in_one_order_whatever_the_order_found() -> None:
    for found in ([CPU, LARGER, CARD, APPLE], [APPLE, CARD, LARGER, CPU]):
        names = [each.name for each in matching_devices(DeviceRequest(), found, "")]
        assert names == ["cuda:1", "cuda:0", "cpu"]


# ---------------------------------------------------------------- several devices


def test_several_devices_are_all_of_them_in_the_order_asked_for() -> None:
    machine = Machine()
    choice = machine.choose("cuda:1,0", [CARD, LARGER, CPU])
    assert (choice.device, choice.others, choice.names) == ("cuda:1", ("cuda:0",), "cuda:1,0")
    assert choice.title == "Card 12 and Card 9" and [name for name, _ in machine.probed] == ["cuda:1", "cuda:0"]
    two = Machine().choose("cpu,cpu", [CARD, CPU])
    assert (two.names, two.title, two.precision) == ("cpu,cpu", "", "fp32")
    twins = [replace(CARD, name=f"cuda:{number}") for number in range(2)]
    assert Machine().choose("cuda:0,1", twins).title == "Card 9", "once"
    assert not Machine().choose("auto", [CARD, LARGER, CPU]).others, "never unless asked for"


def test_their_precision_is_the_fastest_on_the_slowest_that_all_have() -> None:
    twin = replace(CARD, name="cuda:1")
    speeds: dict[str, dict[Precision, float]] = {
        "cuda:0": {"fp32": 100.0, "bf16": 900.0},
        "cuda:1": {"fp32": 100.0, "bf16": 105.0},
    }
    choice = Machine(speeds=speeds).choose("cuda:0,1", [CARD, twin, CPU])
    assert choice.precision == "fp32" and "1.05" in choice.why
    machine = Machine()
    assert machine.choose("cuda:0,1", [CARD, LARGER, CPU]).precision == "fp32", "one has no bf16, the other no fp16"
    assert [precisions for _, precisions in machine.probed] == [("fp32",), ("fp32",)]
    assert Machine().choose("cuda:0,1", [CARD, twin], "bf16").precision == "bf16"
    able = FoundDevice(name="cpu", title="", precisions=("fp32", "bf16"))
    machine = Machine(speeds={"cpu": {"fp32": 10.0, "bf16": 18.0}})
    assert machine.choose("cpu,cpu", [able]).precision == "bf16" and len(machine.probed) == 1, "tried once"


def test_one_of_several_that_is_not_there_or_does_not_work_ends_the_choice() -> None:
    with raises_code("device-not-there", UserError, "--device cuda:2", "cuda:0 (Card 9)"):
        Machine().choose("cuda:0,2", [CARD, LARGER, CPU])
    with raises_code("device-unusable", UserError, "--device cuda:0,1", "it burns") as raised:
        Machine(problems={"cuda:1": "it burns"}).choose("cuda:0,1", [CARD, LARGER, CPU])
    assert "\n" not in str(raised.value)
    machine = Machine()
    with raises_code("device-unusable", UserError, "cuda:1 (Card 12)", "4"):
        machine.choose("cuda:0,1", [CARD, replace(LARGER, free_bytes=NEEDED - 1), CPU])
    assert not machine.probed


def test_cards_that_could_train_together_are_named() -> None:
    assert cards_in_words([LARGER, CARD, CPU], NEEDED).endswith("--device cuda:0,1")
    assert not cards_in_words([LARGER, CARD, CPU], 9 * GB), "one of them is too small"
    assert not cards_in_words([CARD, CPU], 0) and not cards_in_words([CPU], 0)


# ---------------------------------------------------------------- which precision


@pytest.mark.parametrize(
    ("speeds", "precision", "figure"),
    [
        ({"fp32": 100.0, "bf16": 250.0}, "bf16", "2.5"),
        ({"fp32": 100.0, "bf16": 110.0}, "bf16", "1.1"),
        ({"fp32": 100.0, "bf16": 109.0}, "fp32", "1.09"),  # rounding more for less than a tenth is no gain
        ({"fp32": 100.0, "bf16": 30.0}, "fp32", "0.30"),
        ({"fp32": 100.0, "bf16": 150.0, "fp16": 180.0}, "fp16", "1.8"),
        ({"fp32": 100.0}, "fp32", ""),
        ({"bf16": 100.0}, "bf16", ""),
        ({}, "fp32", ""),
    ],
)
def test_the_fastest_precision_is_fp32_unless_another_is_faster_by_a_tenth(
    speeds: dict[Precision, float], precision: Precision, figure: str
) -> None:
    chosen, measured = fastest_precision(speeds)
    assert chosen == precision and figure in measured and bool(measured) == bool(figure)


def test_a_cards_precision_is_what_its_probe_finds_faster() -> None:
    faster = Machine(speeds={"cuda:0": {"fp32": 1e3, "bf16": 3e3}}).choose("auto", [CARD, CPU])
    assert faster.precision == "bf16" and "3.0" in faster.why
    slower = Machine(speeds={"cuda:0": {"fp32": 1e3, "bf16": 1e3}}).choose("auto", [CARD, CPU])
    assert slower.precision == "fp32" and "1.00" in slower.why


def test_a_processor_with_instructions_for_a_lower_precision_is_probed() -> None:
    able = FoundDevice(name="cpu", title="", precisions=("fp32", "bf16"))
    machine = Machine(speeds={"cpu": {"fp32": 10.0, "bf16": 18.0}})
    choice = machine.choose("auto", [able])
    assert choice.precision == "bf16" and "1.8" in choice.why and machine.probed == [("cpu", ("fp32", "bf16"))]


@pytest.mark.parametrize("wanted", ["fp32", "bf16", "fp16"])
def test_a_precision_that_is_asked_for_is_the_only_one_that_is_tried(wanted: PrecisionRequest) -> None:
    machine = Machine()
    choice = machine.choose("auto", [CARD, CPU], wanted)
    assert choice.precision == wanted and choice.why.endswith(f"; {wanted} as asked for")
    assert machine.probed == [("cuda:0", (wanted,))]
    machine = Machine()
    assert machine.choose("cpu", [CARD, CPU], wanted).precision == wanted
    assert machine.probed == ([] if wanted == "fp32" else [("cpu", (wanted,))]), "fp32 works on every processor"


def test_a_processor_that_cannot_compute_so_ends_the_choice() -> None:
    machine = Machine(problems={"cpu": "bf16: no such product"})
    with raises_code("device-unusable", UserError, "cpu", "no such product"):
        machine.choose("auto", [CPU], "bf16")

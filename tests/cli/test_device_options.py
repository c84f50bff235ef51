"""`--device`, `--precision` and `--vram`: what is typed, remembered, passed on and refused; and a card that fails."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from codes import codes_in, raises_code

from swarmtrain.cli import local
from swarmtrain.cli.device_options import DeviceOptions
from swarmtrain.cli.main import run
from swarmtrain.errors import UserError
from swarmtrain.events import DoneEvent
from swarmtrain.model.evaluation import evaluate
from swarmtrain.model.export import export_model
from swarmtrain.model.gpt import GPT, build_model
from swarmtrain.network.discovery.invite import Invite, InvitedPeer, format_invite
from swarmtrain.network.identity import new_identity
from swarmtrain.peer.devices import choice, model_device
from swarmtrain.peer.devices.model_device import move_model
from swarmtrain.peer.lifecycle.node import PeerSettings
from swarmtrain.peer.lifecycle.start_options import StartedFile
from swarmtrain.protocol.devices import DeviceRequest, FoundDevice
from swarmtrain.run_model import ModelSection

SECTION = ModelSection(context_tokens=16, num_layers=1, width=16, num_heads=2)
CPU, CARD = FoundDevice(name="cpu", title=""), FoundDevice(name="cuda:0", title="A Card", free_bytes=10**9)
INVITE = format_invite(Invite("ab" * 32, (InvitedPeer(new_identity(bytes(32)).peer_id, ("/ip4/127.0.0.1/tcp/1",)),)))


# ---------------------------------------------------------------- what is typed


@pytest.fixture
def lives(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[PeerSettings]:
    """Collect the settings of each volunteer that is started, without running it."""
    found: list[PeerSettings] = []

    def live(invite: Invite, settings: PeerSettings, *rest: Any) -> DoneEvent:
        settings.directory.mkdir(exist_ok=True)
        StartedFile(settings.directory).keep_command(settings.started)
        found.append(settings)
        return DoneEvent(held_out_loss=None, tokens=0, run_tokens=0, wall_s=0.0, reason="asked")

    monkeypatch.setattr("swarmtrain.peer.volunteer.run_volunteer", live)
    monkeypatch.setattr("swarmtrain.cli.join._of_folder", lambda directory: None)
    monkeypatch.chdir(tmp_path)
    return found


def on(settings: PeerSettings) -> tuple[str, str, int]:
    return str(settings.device), settings.precision, settings.vram_bytes


def test_a_folder_remembers_the_device(lives: list[PeerSettings]) -> None:
    assert run(["join", "--dir", "peer"]) == 0
    assert run(["join", "--dir", "peer", "--device", "cuda:1", "--precision", "bf16", "--vram", "8GB"]) == 0
    assert run(["join", "--dir", "peer", "--threads", "2"]) == 0
    assert run(["join", "--dir", "peer", "--device", "auto", "--vram", "none"]) == 0
    chosen = ("cuda:1", "bf16", 8_000_000_000)
    assert [on(each) for each in lives] == [("auto", "auto", 0), chosen, chosen, ("auto", "bf16", 0)]


@pytest.mark.parametrize("words", [["join", INVITE], ["local", "stdlib-gpt"], ["eval", "model"], ["generate", "model"]])
@pytest.mark.parametrize("device", ["gpu", "cuda:x", "cpu:1", "cuda:0,cpu", ""])
def test_a_word_that_is_no_device_is_refused(words: list[str], device: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*words, "--device", device]) == 2
    said = capsys.readouterr().err
    assert codes_in(said) == ["bad-device"] and "auto, cpu, cuda or cuda:N" in said


def test_several_devices_train_one_peer_and_neither_measure_nor_sample(
    lives: list[PeerSettings], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["join", "--dir", "peer", "--device", "cuda:0,cuda:1"]) == run(["join", "--dir", "peer"]) == 0
    assert [str(each.device) for each in lives] == ["cuda:0,1"] * 2
    for words in (["join", INVITE], ["local", "stdlib-gpt"]):
        assert run([*words, "--device", "cuda:0,0"]) == 2
    for words in (["eval", "model"], ["generate", "model"]):
        assert run([*words, "--device", "cuda:1,0"]) == 2
    said = capsys.readouterr().err
    assert codes_in(said) == ["bad-device"] * 4 and said.count("twice") == 2 and said.count("such as cuda:1 ") == 2


def test_more_devices_than_sequences_end_local_before_anything_is_started(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    many, folder = ",".join(["cpu"] * 100), tmp_path / "out"
    assert run(["local", "stdlib-gpt", "--device", many, "--dir", str(folder)]) == 2
    assert codes_in(capsys.readouterr().err) == ["too-many-devices"] and not folder.exists()


def test_a_size_and_a_precision_are_checked(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["join", INVITE, "--vram", "much"]) == 2
    assert codes_in(capsys.readouterr().err) == ["bad-limit"]
    assert run(["join", INVITE, "--precision", "fp8"]) == 2


def test_help_and_a_mistake_need_no_torch() -> None:
    script = (
        "import sys; from swarmtrain.cli.main import run\n"
        f"assert run(['join', {INVITE!r}, '--device', 'gpu']) == 2\n"
        "assert run(['join', '--help']) == 0\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)


def test_options_are_passed_on_as_they_are_typed() -> None:
    unchosen = DeviceOptions(device=DeviceRequest(), precision="auto", compile="auto", vram_bytes=0)
    assert unchosen.words() == []
    chosen = DeviceOptions(
        device=DeviceRequest("cuda", 1), precision="fp16", compile="off", vram_bytes=1_500_000_001, base_bits="4"
    )
    assert chosen.words() == [
        "--device",
        "cuda:1",
        "--precision",
        "fp16",
        "--compile",
        "off",
        "--base-bits",
        "4",
        "--vram",
        "1500000.001kB",
    ]


def test_local_passes_them_to_its_volunteers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plans: list[Any] = []

    def train(plan: Any, stop: object, page: object) -> None:
        plans.append(plan)
        raise UserError("enough; end this", code="peer-failed")

    monkeypatch.setattr(local, "_train", train)
    given = ["local", "stdlib-gpt", "--peers", "2", "--dir", str(tmp_path / "out")]
    assert run(given) == run([*given, "--device", "cpu", "--vram", "2GB"]) == 2
    first, second = (plan.extra for plan in plans)
    assert "--device" not in first[0]
    assert all(each[2:6] == ["--device", "cpu", "--vram", "2GB"] for each in second) and len(second) == 2
    undisturbed = {"--on-battery", "--gpu-any-time"}
    assert all(undisturbed <= set(each) for each in (*first, *second)), "somebody waits for it"


# ---------------------------------------------------------------- a model that is measured or sampled


@pytest.fixture
def model(tmp_path: Path) -> str:
    folder, made = tmp_path / "model", build_model(SECTION, seed=1)
    export_model(folder, dict(made.named_parameters()), made.spec, 1, {"held-out.txt": b"some text " * 8})
    return str(folder)


@pytest.mark.parametrize("command", ["join", "local", "eval", "generate"])
def test_a_device_that_is_not_there_ends_a_command_before_anything_is_fetched(
    command: str, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in (choice, model_device):
        monkeypatch.setattr(module, "find_devices", lambda parameters: [CPU])
        monkeypatch.setattr(module, "missing_card", lambda: "")
    folder = tmp_path / "peer"  # made by whatever starts a peer
    given = {"join": [INVITE, "--dir", str(folder)], "local": ["stdlib-gpt", "--dir", str(folder)]}
    assert run([command, *given.get(command, [model]), "--device", "cuda:7"]) == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and codes_in(said.err) == ["device-not-there"] and not said.out
    assert said.err.startswith("error: --device cuda:7: this machine has only cpu; ")
    assert not folder.exists()


@pytest.fixture
def a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """Show a card beside the processor; it takes tensors and keeps them in main memory."""
    monkeypatch.setattr(model_device, "find_devices", lambda parameters: [CARD, CPU])


def fails(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """Let the card fail when a model is moved there."""

    def to(self: GPT, place: torch.device) -> GPT:
        if place.type != "cpu":
            raise error
        return self

    monkeypatch.setattr(GPT, "to", to)


def test_a_card_that_fails_is_passed_over_and_the_reason_is_told(
    a_card: None, model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fails(monkeypatch, AssertionError("Torch not compiled with CUDA enabled\nand more"))
    assert run(["eval", model, "--device", "cpu", "--json"]) == 0
    on_processor = capsys.readouterr()
    assert not on_processor.err
    assert run(["eval", model, "--json"]) == 0
    fallen_back = capsys.readouterr()
    assert codes_in(fallen_back.err) == ["device-unusable"] and "cuda:0 (A Card)" in fallen_back.err
    assert "Torch not compiled with CUDA enabled; computing on the processor" in fallen_back.err
    assert json.loads(fallen_back.out) == json.loads(on_processor.out) and '"device": "cpu"' in fallen_back.out
    assert run(["generate", model, "--tokens", "2"]) == 0
    assert codes_in(capsys.readouterr().err) == ["device-unusable"]
    assert run(["generate", model, "--tokens", "2", "--device", "cuda"]) == 2
    assert codes_in(capsys.readouterr().err) == ["device-unusable"]


def test_a_card_that_is_too_small_is_said_to_be(a_card: None, monkeypatch: pytest.MonkeyPatch) -> None:
    fails(monkeypatch, torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
    told: list[str] = []
    assert move_model(build_model(SECTION, 1), DeviceRequest(), 16, told.append) == "cpu"
    assert "its memory is too little for this model and 16 x 16 tokens" in told[0]
    with raises_code("device-unusable", UserError, "--device cuda:0"):
        move_model(build_model(SECTION, 1), DeviceRequest("cuda", 0), 16, told.append)
    with raises_code("device-not-there", UserError, "--device cuda:1"):
        move_model(build_model(SECTION, 1), DeviceRequest("cuda", 1), 16, told.append)


def test_a_card_that_works_is_taken_and_nothing_is_said(a_card: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GPT, "to", lambda self, place: self)
    told: list[str] = []
    tried: list[tuple[int, ...]] = []
    monkeypatch.setattr(model_device, "evaluate", lambda model, batches: tried.extend(each.shape for each in batches))
    assert move_model(build_model(SECTION, 1), DeviceRequest(), 3, told.append) == "cuda:0"
    assert tried == [(3, 17)] and not told


def test_batches_go_where_the_model_is() -> None:
    model = build_model(SECTION, 1).to("meta")
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):  # a number is read at the end, and is none
        evaluate(model, [torch.zeros((2, 5), dtype=torch.int64)])

"""`eval` and `generate`: with how many threads, and what is said while they work for long."""

from __future__ import annotations

import io
import itertools
import threading
from pathlib import Path

import pytest

from swarmtrain.cli.main import run
from swarmtrain.cli.progress import long_work, said_meanwhile
from swarmtrain.model.export import export_model
from swarmtrain.model.gpt import build_model
from swarmtrain.peer.lifecycle import node
from swarmtrain.run import ModelSection

SECTION = ModelSection(context_tokens=16, num_layers=1, width=16, num_heads=2)


@pytest.fixture
def model(tmp_path: Path) -> str:
    folder, made = tmp_path / "model", build_model(SECTION, seed=1)
    export_model(folder, dict(made.named_parameters()), SECTION, 1, {"held-out.txt": b"some text " * 8})
    return str(folder)


@pytest.mark.parametrize("command", [["eval"], ["generate", "--tokens", "3"]])
def test_threads_are_as_asked_and_one_for_a_small_model(
    command: list[str], model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    taken: list[int] = []
    monkeypatch.setattr("torch.set_num_threads", taken.append)
    assert run([*command, model]) == run([*command, model, "--threads", "2"]) == 0
    assert taken == [1, 2]
    monkeypatch.setattr(node, "_SMALL_PARAMETERS", 10)
    assert run([*command, model]) == 0
    assert taken == [1, 2], "torch's own choice for a larger one"
    assert not capsys.readouterr().err, "quick work says nothing"
    assert run([*command, model, "--threads", "0"]) == 2


def test_long_work_tells_how_far_it_is_every_ten_seconds() -> None:
    stream, clock = io.StringIO(), itertools.count(0.0, 4.0).__next__
    with long_work("measuring", 100, "tokens", stream, clock) as advance:
        for _ in range(10):
            advance(10)
    told = stream.getvalue().splitlines()
    assert told[0] == "measuring: 30 of 100 tokens" and 2 <= len(told) <= 4


def test_work_in_large_pieces_says_that_it_goes_on_unless_it_is_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    twice = threading.Event()

    class Lines(io.StringIO):
        def flush(self) -> None:
            if self.getvalue().count("\n") == 2:
                twice.set()

    quick, stream = io.StringIO(), Lines()
    monkeypatch.setattr("sys.stderr", quick)
    with said_meanwhile(lambda: "equal"):
        pass
    assert not quick.getvalue()
    monkeypatch.setattr("sys.stderr", stream)
    for pause in ("_EVERY_S", "_AGAIN_S"):
        monkeypatch.setattr(f"swarmtrain.cli.progress.{pause}", 0.001)
    with said_meanwhile(lambda: "equal: 0 of 9 runs are done"):
        assert twice.wait(30)
    told = stream.getvalue().splitlines()
    assert told[0] == "equal: 0 of 9 runs are done, after 0.0 s"


def test_on_a_terminal_it_is_a_bar_that_leaves_nothing() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    with long_work("measuring", 2, "tokens", stream) as advance:
        advance(1)
    assert "measuring" in stream.getvalue()

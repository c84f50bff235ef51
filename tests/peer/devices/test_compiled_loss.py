"""Compiling beside training: when it is tried, when it stays, and that training goes on whatever happens to it."""

from __future__ import annotations

import io
import json
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from swarmtrain.data.batches import Batches
from swarmtrain.model.gpt import build_model
from swarmtrain.peer.devices import compiled_loss
from swarmtrain.peer.devices.compiled_loss import CompiledLoss, missing_compiler
from swarmtrain.peer.training.loop import ModelLoop
from swarmtrain.run import RunFile

TEXT = np.frombuffer(b"all that is gold does not glitter, not all those who wander are lost. " * 20, dtype=np.uint8)
RUN = RunFile.model_validate(
    {
        "run": {"total_tokens": 64_000},
        "model": {"context_tokens": 16, "num_layers": 1, "width": 16, "num_heads": 2},
        "data": {"source": "text", "paths": ("x",)},
        "inner": {"batch_sequences": 4, "microbatch_sequences": 2},
    }
)
LARGE = 20_000_000


class Written(io.BytesIO):
    """Pipe that keeps what was written to it."""

    text = b""

    def close(self) -> None:
        self.text = self.getvalue()
        super().close()


@dataclass
class Compiler:
    """Process that compiles: it runs until `returncode` is set."""

    said: bytes = b""
    returncode: int | None = None
    environment: dict[str, str] = field(default_factory=dict)
    stdin: Written = field(default_factory=Written)
    is_killed: bool = False

    def start(self, command: list[str], *, env: dict[str, str], **pipes: int) -> Compiler:
        self.environment, self.stderr = env, io.BytesIO(self.said)
        return self

    @property
    def task(self) -> dict[str, Any]:
        return json.loads(self.stdin.text or b"{}")  # type: ignore[no-any-return]

    def poll(self) -> int | None:
        return self.returncode

    def kill(self) -> None:
        self.is_killed, self.returncode = True, -9

    def wait(self) -> int | None:
        return self.returncode


def as_it_is(loss_of: Callable[[Tensor], Tensor], *, dynamic: bool) -> Callable[[Tensor], Tensor]:
    """Compile nothing."""
    return lambda batch: loss_of(batch)


def broken(loss_of: Callable[[Tensor], Tensor], *, dynamic: bool) -> Callable[[Tensor], Tensor]:
    def call(batch: Tensor) -> Tensor:
        raise TypeError("an operator that is not known")

    return call


class Bench:
    """Loop whose steps take as long as a test says, with a compiler that is no process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, said: bytes = b"", compile: Any = as_it_is) -> None:
        data = Batches(TEXT, context_tokens=16, batch_sequences=4, run_sha256="ab" * 32, peer_id="me")
        self.compiler, self.told = Compiler(said), list[tuple[bool, str]]()
        self.loop = ModelLoop(RUN, build_model(RUN.model, 0), data)
        self.compiled = CompiledLoss(self.loop, Path("/cache"), lambda *said: self.told.append(said))
        monkeypatch.setattr(subprocess, "Popen", self.compiler.start)
        monkeypatch.setattr(torch, "compile", compile)
        monkeypatch.setattr(compiled_loss, "missing_compiler", lambda device: "")
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/before")

    @property
    def is_eager(self) -> bool:
        return self.loop.compiled_loss is None

    def round(self, step_s: float, steps: int = 20) -> float:
        """Take a round of steps that last `step_s`; return the last loss."""
        loss = 0.0
        for step in range(steps):
            loss = float(self.loop.take_step(step / steps).loss)
        self.loop.take_step_times()
        self.loop._step_times_s.extend([10 * step_s, *(steps - 1) * [step_s]])  # the first one traces the model
        self.compiled.round_ended()
        return loss


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(monkeypatch)


@pytest.mark.parametrize(
    ("asked", "parameters", "starts"), [("off", LARGE, False), ("auto", LARGE, False), ("on", 1000, True)]
)
def test_on_a_processor_it_is_compiled_if_that_is_asked_for(
    bench: Bench, asked: Any, parameters: int, starts: bool
) -> None:
    bench.compiled.start(asked, parameters)
    assert bool(bench.compiler.task) == starts and bench.compiled.is_over != starts and not bench.told


def test_what_is_faster_stays_and_both_figures_are_told(bench: Bench) -> None:
    bench.compiled.start("on", LARGE)
    assert bench.compiler.task["sequences"] == 2 and bench.compiler.task["precision"] == "fp32"
    assert bench.compiler.environment["TORCHINDUCTOR_CACHE_DIR"] == "/cache/torch-compile"
    bench.round(0.1)
    assert bench.is_eager, "the process still compiles"
    bench.compiler.returncode = 0
    bench.round(0.1)
    assert not bench.is_eager and not bench.told
    bench.round(0.05)
    assert bench.told == [(True, "1,280 tokens a second compiled and 640 before")] and not bench.is_eager


def test_what_is_not_faster_goes(bench: Bench) -> None:
    bench.compiled.start("on", LARGE)
    bench.compiler.returncode = 0
    bench.round(0.1)
    bench.round(0.099)
    ((is_compiled, why),) = bench.told
    assert not is_compiled and why.startswith("not compiled, since that is not faster: 646 tokens a second")
    assert bench.is_eager
    bench.round(0.1)
    assert len(bench.told) == 1, "told once"


def test_short_rounds_are_not_enough_to_compare(bench: Bench) -> None:
    bench.compiled.start("on", LARGE)
    bench.compiler.returncode = 0
    bench.round(0.1, steps=4)
    assert bench.is_eager
    bench.round(0.1)
    bench.round(0.2, steps=4)
    assert not bench.told and not bench.compiled.is_over


def test_a_process_that_fails_is_told_once_and_training_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch, b"Traceback\nRuntimeError: no such instruction\n")
    bench.compiled.start("on", LARGE)
    bench.compiler.returncode = 1
    bench.round(0.1)
    bench.round(0.1)
    assert bench.told == [(False, "not compiled, since that failed: RuntimeError: no such instruction")]


def test_a_compiled_loss_that_cannot_be_called_costs_no_step(monkeypatch: pytest.MonkeyPatch) -> None:
    losses = []
    for compile in (broken, as_it_is):
        bench = Bench(monkeypatch, compile=compile)
        bench.compiled.start("on", LARGE)
        bench.compiler.returncode = 0
        losses.append([bench.round(0.1), bench.round(0.1)])
        assert bench.loop.batches.position == 40 and bench.is_eager
        assert len(bench.told) == 1 and not bench.told[0][0]
    assert losses[0] == losses[1], "the same steps"


def test_at_the_end_the_process_ends_too(bench: Bench) -> None:
    bench.compiled.start("on", LARGE)
    bench.compiled.close()
    assert bench.compiler.is_killed
    bench.compiled.close()


def test_without_a_compiler_that_is_told_once(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled_loss, "missing_compiler", missing_compiler)
    monkeypatch.setattr(compiled_loss.shutil, "which", lambda name: None)
    bench.compiled.start("on", LARGE)
    bench.round(0.1)
    assert bench.told == [(False, "not compiled, since no C++ compiler was found")] and not bench.compiler.task
    monkeypatch.setattr(compiled_loss.importlib.util, "find_spec", lambda name: None)
    assert missing_compiler(torch.device("cuda")) == "triton is not installed"
    assert missing_compiler(torch.device("mps")) == "torch does not compile for mps here"

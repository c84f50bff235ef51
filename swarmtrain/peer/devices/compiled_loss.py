"""Compile a model's loss by torch.compile without holding up training, and use it only where it is faster.

A process of its own compiles first, into the cache that torch keeps on disk, while the trainer goes on as before. At
the end of a round the trainer switches: it reads the cache, which takes seconds instead of minutes, times some steps,
and keeps the compiled loss if they are faster.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from swarmtrain.algorithm.batch import inputs_of, positions_of, with_rows
from swarmtrain.environment import COMPUTES, minimal_environment
from swarmtrain.model.language_model import LanguageModel
from swarmtrain.model.run_model import build_from_spec, spec_from_json, spec_to_json
from swarmtrain.peer.devices.compute import CACHE_VARIABLE, ComputeDevice, finish
from swarmtrain.peer.training.loop import ModelLoop
from swarmtrain.protocol.devices import CompileRequest, Precision

_log = logging.getLogger(__name__)

_LEAST_PARAMETERS = 10_000_000
"""Below this size "auto" does not compile. Nor does it on a processor: there a model of 10 million parameters gained
8 % on one thread, and compiling it took a core for more than a minute.
"""
_TIMED_STEPS = 8
"""Steps of each kind whose median is compared, at least. The first ones after the switch still trace the model."""
_LEAST_GAIN = 1.02
_CACHE = "torch-compile"


def missing_compiler(device: torch.device) -> str:
    """Return what is missing for torch.compile on this device; empty if it can be tried."""
    if device.type == "cuda":
        return "" if importlib.util.find_spec("triton") else "triton is not installed"
    if device.type != "cpu":
        return f"torch does not compile for {device.type} here"
    named = os.environ.get("CXX", "")
    found = any(shutil.which(name) for name in (named, "g++", "clang++", "c++") if name)
    return "" if found else "no C++ compiler was found"


@dataclass
class CompiledLoss:
    """Compiled loss of one loop, from the process that compiles it to the decision whether it stays.

    `round_ended` is called by the trainer after each round, `close` at the end.
    """

    loop: ModelLoop
    cache_folder: Path | None
    """Folder of the compiler's cache; None: torch's own."""
    tell: Callable[[bool, str], None]
    """Called when it is decided: whether the loss is compiled from now on, and why."""
    _process: subprocess.Popen[bytes] | None = field(default=None, init=False)
    _eager_s: float = field(default=0.0, init=False)
    """Median seconds of a step before the switch."""
    _is_trying: bool = field(default=False, init=False)
    is_over: bool = field(default=False, init=False)
    """True once it is decided."""

    def start(self, asked: CompileRequest, parameters: int) -> None:
        """Begin to compile if that was asked for, or is worth trying, and possible here."""
        is_worth_it = not self.loop.compute.is_host and parameters >= _LEAST_PARAMETERS
        if asked == "off" or (asked == "auto" and not is_worth_it):
            self.is_over = True
            return
        if missing := missing_compiler(self.loop.compute.device):
            self._decide(False, f"not compiled, since {missing}")
            return
        compute = self.loop.compute
        task = {
            "model": spec_to_json(self.loop.model.spec),
            "device": str(compute.device),
            "precision": compute.precision,
            "sequences": self._sequences,
            "rows": self.loop.run.batch_rows,
        }
        command = [sys.executable, "-m", "swarmtrain.peer.devices.compiled_loss"]
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=self._environment
            )
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(task).encode())
            self._process.stdin.close()
        except OSError as error:
            self._decide(False, f"not compiled, since the compiling process did not start: {error}")

    def leave(self, asked: CompileRequest, why: str) -> None:
        """Compile nothing in this run; tell why if it was asked for."""
        self.is_over = True
        if asked == "on":
            self._decide(False, f"not compiled, since {why}")

    @property
    def _sequences(self) -> int:
        return min(self.loop.microbatch_sequences, self.loop.run.inner.batch_sequences)

    @property
    def _environment(self) -> dict[str, str]:
        """Environment in which torch finds the cache, here and in the process."""
        cache = {} if self.cache_folder is None else {CACHE_VARIABLE: str(self.cache_folder / _CACHE)}
        return {**minimal_environment(COMPUTES), "TORCHINDUCTOR_COMPILE_THREADS": "1", **cache}

    def round_ended(self) -> None:
        """Switch to the compiled loss if it is ready, or decide whether it stays; called after a round."""
        if self.is_over:
            return
        times_s = self.loop.take_step_times()
        if self._is_trying:
            if len(times_s) < 2 * _TIMED_STEPS:
                return  # a short round: the next one is measured whole
            self._compare(statistics.median(times_s[-_TIMED_STEPS:]))
        elif self._process is not None and self._process.poll() is not None and len(times_s) >= _TIMED_STEPS:
            assert self._process.stderr is not None
            said = self._process.stderr.read().decode(errors="replace").strip()
            if self._process.returncode:
                _log.info("compiling failed: %s", said)
                self._decide(False, _failed_in_words((said.splitlines() or [""])[-1]))
                return
            self._eager_s = statistics.median(times_s)
            os.environ.update({name: value for name, value in self._environment.items() if name == CACHE_VARIABLE})
            self.loop.compiled_loss = compiled(self.loop.model, self._failed, self.loop.run.batch_rows)
            self._is_trying = True

    def _compare(self, compiled_s: float) -> None:
        compiled, eager = (f"{self.loop.run.tokens_per_step / each:,.0f}" for each in (compiled_s, self._eager_s))
        both = f"{compiled} tokens a second compiled and {eager} before"
        if compiled_s * _LEAST_GAIN < self._eager_s:
            self._decide(True, both)
        else:
            self.loop.compiled_loss = None
            self._decide(False, f"not compiled, since that is not faster: {both}")

    def _failed(self, error: Exception) -> None:
        """Go on as before, because the compiled loss cannot be called."""
        self.loop.compiled_loss = None
        self._decide(False, _failed_in_words((str(error).splitlines() or [""])[0]))

    def _decide(self, is_compiled: bool, why: str) -> None:
        self.is_over = True
        self.close()
        self.tell(is_compiled, why)

    def close(self) -> None:
        """End the compiling process, if it runs."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()


def _failed_in_words(line: str) -> str:
    return f"not compiled, since that failed: {line[:200] or 'no reason was given'}"


def compiled(model: LanguageModel, failed: Callable[[Exception], None], rows: int = 1) -> Callable[[Tensor], Tensor]:
    """Return the model's loss compiled. If its first call fails, `failed` is called and the loss computed as before.

    `rows` are those that the run's batches may have: a batch without some of them is given them, so that one program
    computes all of them.
    """
    function, is_tried = _function(model, rows), False

    def call(batch: Tensor) -> Tensor:
        nonlocal function, is_tried
        if is_tried:
            return function(batch)
        is_tried = True
        try:
            return function(batch)
        except Exception as error:
            # Whatever a compiler raises: training goes on without it.
            _log.info("the compiled loss failed", exc_info=error)
            failed(error)
            function = model.loss
            return function(batch)

    return call


def _function(model: LanguageModel, rows: int) -> Callable[[Tensor], Tensor]:
    """Return the model's loss of batches with `rows` rows, compiled at its first call.

    The head is not compiled where only some tokens are targets: how many they are differs from batch to batch.
    """
    if rows == 1:
        return torch.compile(model.loss, dynamic=False)
    features = torch.compile(model.features, dynamic=False)

    def loss(batch: Tensor) -> Tensor:
        batch = with_rows(batch, rows)
        return model.loss_of_features(features(inputs_of(batch), positions_of(batch)), batch)

    return loss


def _compile(task: dict[str, Any]) -> None:
    """Compile what a task describes, so that the cache has it: one forward and backward pass on zeros."""
    compute = ComputeDevice(torch.device(task["device"]), _precision(task["precision"]))
    model = build_from_spec(spec_from_json(task["model"]), 0).to(compute.device)
    batch = torch.zeros((task["sequences"], model.context_tokens + 1), dtype=torch.int64, device=compute.device)
    with compute.autocast():
        loss = _function(model, task["rows"])(batch)
    loss.backward()  # type: ignore[no-untyped-call]
    finish(compute.device)


def _precision(name: str) -> Precision:
    assert name in ("fp32", "bf16", "fp16")
    return name  # type: ignore[return-value]


if __name__ == "__main__":
    os.nice(5)  # the trainer has the processor first
    torch.set_num_threads(1)
    _compile(json.loads(sys.stdin.read()))

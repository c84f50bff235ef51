"""Pipelines of real processes: what they learn is what one process learns."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import torch
from stage_peer import CONSTANTS, MICROBATCHES, MODEL, microbatch

from swarmtrain.algorithm.inner import InnerOptimizer
from swarmtrain.model.gpt import build_model
from swarmtrain.model.stages import Stage, stage_shapes

pytestmark = pytest.mark.processes

FLUSHED_BATCHES = 20
LEARNT = 0.7
"""Largest ratio of the last batch's loss to the first's; one process reaches 0.41 in as many batches."""
APART = 1e-5
"""Difference allowed between processes and one process, of fp32 losses and weights: sums have another order."""
ENDS_WITHIN_S = 20.0
"""Time limit for the end of a process whose work is done; generous, for a busy machine."""


def _whole(num_batches: int, boundaries: tuple[int, ...]) -> list[list[float]]:
    """Train the whole model in one process, with the gradient clipped per stage; returns the losses."""
    model = build_model(MODEL, 5)
    parameters = dict(model.named_parameters())
    inner = [
        InnerOptimizer(((name, parameters[name]) for name in Stage(shape).state_dict()), CONSTANTS)
        for shape in stage_shapes(MODEL, boundaries)
    ]
    losses: list[list[float]] = []
    for batch in range(num_batches):
        losses.append([])
        for number in range(MICROBATCHES * batch, MICROBATCHES * (batch + 1)):
            loss = model.loss(microbatch(number))
            (loss / MICROBATCHES).backward()
            losses[-1].append(float(loss.detach()))
        for each in inner:
            each.step(batch / num_batches)
    return losses


@contextmanager
def _peer(folder: Path, stage: int, settings: dict[str, object]) -> Iterator[subprocess.Popen[str]]:
    folder.mkdir(parents=True)
    command = [sys.executable, str(Path(__file__).with_name("stage_peer.py")), str(folder)]
    process = subprocess.Popen(
        [*command, json.dumps({**settings, "stage": stage})], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout):
            assert stream is not None
            stream.close()


def _pipeline(tmp_path: Path, settings: dict[str, object]) -> list[list[float]]:
    """Run a pipeline of three stages; returns the losses that the driver prints."""
    with ExitStack() as stack:
        peers = [stack.enter_context(_peer(tmp_path / str(stage), stage, settings)) for stage in range(3)]
        known = [json.loads(peer.stdout.readline()) for peer in peers]
        for peer in peers:
            peer.stdin.write(json.dumps(known[1:]) + "\n")
            peer.stdin.flush()
        driver, *others = peers
        losses = [json.loads(line) for line in driver.stdout]
        assert driver.wait(ENDS_WITHIN_S) == 0
        for peer in others:
            peer.stdin.close()
            assert peer.wait(ENDS_WITHIN_S) == 0
        return losses


def test_three_stages_with_a_flush_learn_what_one_process_learns(tmp_path: Path) -> None:
    settings = {"boundaries": [1, 2], "batches": FLUSHED_BATCHES, "activations": "fp32"}
    losses = _pipeline(tmp_path, settings)
    expected = _whole(FLUSHED_BATCHES, (1, 2))
    assert torch.tensor(expected[-1]).mean() < LEARNT * torch.tensor(expected[0]).mean(), "it learns nothing"
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=0, atol=APART)

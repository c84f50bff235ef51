"""Pipelines of real processes: what they learn is what one process learns."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import torch
from stage_peer import CONSTANTS, MICROBATCHES, MODEL, microbatch
from stage_replay import replay

from swarmtrain.algorithm.inner import InnerOptimizer
from swarmtrain.model.gpt import build_model
from swarmtrain.model.stages import Stage, stage_shapes

pytestmark = pytest.mark.processes

FLUSHED_BATCHES = 20
LEARNT = 0.7
"""Largest ratio of the last batch's loss to the first's; one process reaches 0.41 in as many batches."""
BATCHES = 15
MAY_BE_OPEN = 5
"""Batches whose step the last of the run may not close: with three microbatches under way for each driver."""
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


def _pipeline(tmp_path: Path, stages: list[int], settings: dict[str, object]) -> list[list[list[float]]]:
    """Run a pipeline; returns the losses that each driver prints."""
    with ExitStack() as stack:
        peers = [
            stack.enter_context(_peer(tmp_path / str(number), stage, {**settings, "driver": number}))
            for number, stage in enumerate(stages)
        ]
        known = [json.loads(peer.stdout.readline()) for peer in peers]
        for peer in peers:
            peer.stdin.write(json.dumps([each for each in known if each[1] > 0]) + "\n")
            peer.stdin.flush()
        drivers = peers[: stages.count(0)]
        losses = [[json.loads(line) for line in driver.stdout] for driver in drivers]
        assert [driver.wait(ENDS_WITHIN_S) for driver in drivers] == [0] * len(drivers)
        for peer in peers[len(drivers) :]:
            peer.stdin.close()
            assert peer.wait(ENDS_WITHIN_S) == 0
        return losses


def test_three_stages_with_a_flush_learn_what_one_process_learns(tmp_path: Path) -> None:
    settings = {"boundaries": [1, 2], "batches": FLUSHED_BATCHES, "activations": "fp32", "in_flight": 1}
    settings["flush"] = True
    losses = _pipeline(tmp_path, [0, 1, 2], settings)[0]
    expected = _whole(FLUSHED_BATCHES, (1, 2))
    assert torch.tensor(expected[-1]).mean() < LEARNT * torch.tensor(expected[0]).mean(), "it learns nothing"
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=0, atol=APART)


@pytest.mark.long
def test_six_processes_without_a_flush_learn_what_their_schedule_says(tmp_path: Path) -> None:
    settings = {"boundaries": [1, 2], "batches": BATCHES, "activations": "fp32", "in_flight": 3}
    settings["flush"] = False
    losses = _pipeline(tmp_path, [0, 0, 1, 1, 2, 2], settings)
    assert [len(each[0]) for each in losses] == [BATCHES * MICROBATCHES] * 2
    peers = replay([tmp_path / str(number) for number in range(6)], (1, 2), BATCHES)
    assert sum(peer.num_steps for peer in peers) >= 6 * (BATCHES - MAY_BE_OPEN)
    assert max(peer.most_lag for peer in peers) == 1, "no backward came after a step: it is as with a flush"
    for stage in range(3):
        logs = [peer.log for peer in peers if peer.stage == stage]
        counted = Counter(tuple(key[:2]) for log in logs for entry in log for key in entry.get("keys", ()))
        assert max(counted.values()) == 1 and len(counted) > 2 * (BATCHES - 1) * MICROBATCHES
    for peer in peers:
        assert peer.loss_difference <= APART
        assert peer.weights_difference() <= APART

"""Model of Hugging Face, with a tied matrix, on several devices of one peer: it trains as on one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from small_models import run_of, saved

from swarmtrain.data.batches import Batches
from swarmtrain.model.base import resolved_run
from swarmtrain.model.run_model import build_run_model
from swarmtrain.peer.devices.compute import ComputeDevice
from swarmtrain.peer.training.loop import ModelLoop, loop_class

pytestmark = (
    pytest.mark.evidence
)  # a rank imports the library, for seconds; what is shown is shown with the built-in model

TEXT = np.frombuffer(b"many hands make light work, and many cooks a broth. " * 20, dtype=np.uint8)


@pytest.mark.parametrize("shards", [False, True], ids=["copies", "parts"])
def test_two_ranks_of_one_peer_train_it_as_one_does(tmp_path: Path, shards: bool) -> None:
    saved("qwen3", tmp_path / "small")
    run = resolved_run(run_of("small", inner="batch_sequences = 5"), tmp_path)
    two = ComputeDevice(others=(torch.device("cpu"),), shards=shards, microbatch_sequences=2)
    loops = []
    for compute in (ComputeDevice(microbatch_sequences=2), two):
        model = build_run_model(run, tmp_path / "small")
        batches = Batches(TEXT, context_tokens=24, batch_sequences=5, run_sha256="ab" * 32, peer_id="me")
        loops.append(loop_class(compute)(run, model, batches, compute=compute))
    one, other = loops
    try:
        for step in range(3):
            right, found = (loop.take_step(step / 100) for loop in loops)
            assert float(found.loss) == pytest.approx(float(right.loss), rel=1e-5)
        reached = other.parameters.read()
        assert float((reached - one.parameters.read()).norm() / one.parameters.read().norm()) < 1e-4
        assert isinstance(one, ModelLoop) and len(reached) == run.model.num_parameters
    finally:
        other.close()

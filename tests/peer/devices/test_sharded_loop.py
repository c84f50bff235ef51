"""Model that is cut between two ranks on processors: it trains as a whole one does, and is published as one."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from codes import raises_code

from swarmtrain.algorithm.batch import join_rows
from swarmtrain.data.batches import Batches
from swarmtrain.errors import RunTimeError
from swarmtrain.model.gpt import GPT, build_model
from swarmtrain.peer.devices.compute import ComputeDevice
from swarmtrain.peer.devices.sharded_loop import ShardedLoop
from swarmtrain.peer.lifecycle.stop import StopTraining
from swarmtrain.peer.training.loop import ModelLoop
from swarmtrain.run import RunFile

TEXT = np.frombuffer(
    b"a load for two is carried in the middle, and neither hand feels all of it. " * 20, dtype=np.uint8
)
BATCH = 5
ROUNDING = 1e-6
"""Relative difference allowed between numbers that are summed in another order, fp32."""
COMPUTE = ComputeDevice(others=(torch.device("cpu"),), shards=True, microbatch_sequences=2)
FRAGMENT: Any = SimpleNamespace(tensors=(0, 2), pick=lambda tensors: [tensors[0], tensors[2]])

RUN = RunFile.model_validate(
    {
        "run": {"total_tokens": 16 * BATCH * 100},
        "model": {"context_tokens": 16, "num_layers": 2, "width": 16, "num_heads": 2},
        "inner": {"batch_sequences": BATCH, "learning_rate": 1e-2, "gradient_clip": 0.5},
    }
)

pytestmark = pytest.mark.slow


class SomeMasked(Batches):
    """Batches of which the fourth has few targets, none of them in its first microbatch, and two documents each."""

    def next_batch(self) -> torch.Tensor:
        tokens = super().next_batch()
        if self.position != 4:
            return tokens
        places, wanted = torch.arange(17).expand_as(tokens), torch.tensor([0, 0, 3, 9, 1])
        return join_rows(tokens, places > 16 - wanted[:, None], places % 9)


def batches_at(position: int) -> Batches:
    return SomeMasked(
        TEXT, context_tokens=16, batch_sequences=BATCH, run_sha256="ab" * 32, peer_id="me", position=position
    )


@pytest.fixture
def loops() -> Iterator[tuple[ModelLoop, ShardedLoop]]:
    """Provide a loop of one process, and one of two ranks that hold a part of the same model each."""
    two = ShardedLoop(RUN, build_model(RUN.model, 0), batches_at(0), compute=COMPUTE)
    yield ModelLoop(RUN, build_model(RUN.model, 0), batches_at(0)), two
    two.close()


def apart(found: torch.Tensor, right: torch.Tensor) -> float:
    return float((found - right).norm() / right.norm())


def weights(model: GPT) -> torch.Tensor:
    return torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()])


def test_a_model_in_parts_trains_merges_and_resumes_as_a_whole_one_does(loops: tuple[ModelLoop, ShardedLoop]) -> None:
    one, two = loops
    assert torch.equal(one.parameters.read(), two.parameters.read()), "before any rank is there"
    for step in range(6):
        for loop in loops:
            loop.batch_sequences = 1 if step == 2 else 0  # fewer sequences than ranks
            if step == 4:  # a merge, of everything and of a fragment
                loop.parameters.write(loop.parameters.read() * 0.9)
                size = sum(list(loop.parameters.named.values())[index].numel() for index in FRAGMENT.tensors)
                loop.parameters.write(torch.full((size,), 0.25), FRAGMENT)
        right, found = (loop.take_step(step / 100) for loop in loops)
        assert found.tokens == right.tokens and float(found.loss) == pytest.approx(float(right.loss), rel=ROUNDING)
        assert float(found.grad_norm) == pytest.approx(float(right.grad_norm), rel=ROUNDING)
    parts = sum(part.numel() for part in two._sharded_ranks._sharded._parts)
    reached = two.parameters.read()
    assert parts == len(reached) // 2, "and of each tensor half is here"
    assert apart(reached, one.parameters.read()) < ROUNDING

    # What is published, measured and kept is the whole model's.
    two.take_step(0.1)
    one.take_step(0.1)
    theta = torch.zeros(sum(list(two.parameters.named.values())[index].numel() for index in FRAGMENT.tensors))
    lent = two.parameters.lend(FRAGMENT, theta)
    assert apart(lent.gradient(), one.parameters.lend(FRAGMENT, theta).gradient()) < ROUNDING
    assert apart(weights(two.whole_model()), weights(one.whole_model())) < ROUNDING
    room = torch.empty(2, len(reached))
    right_kept, kept = one.kept(room.clone()), two.kept(room)
    assert apart(kept.moments.vectors, right_kept.moments.vectors) < ROUNDING  # type: ignore[union-attr]
    assert torch.equal(kept.moments.steps, right_kept.moments.steps) and kept.batches == 7

    looks = iter([False, True])
    with pytest.raises(StopTraining):
        two.take_step(0.1, lambda: next(looks))
    theta = two.parameters.read()
    assert apart(theta, one.parameters.read()) < ROUNDING, "a step that was given up changes nothing"
    straight, again = [two.take_step(0.1).loss for _ in range(2)], two.parameters.read()
    holder = ModelLoop(RUN, build_model(RUN.model, 0), batches_at(kept.batches))
    holder.resume(kept)
    two._sharded_ranks.send_moments(holder.inner)  # as before the first step after a start
    two.parameters.write(theta)
    two.batches = batches_at(two.batches.position - 2)
    assert [two.take_step(0.1).loss for _ in range(2)] == straight and torch.equal(two.parameters.read(), again)

    two.take_step(0.1)
    two._sharded_ranks._processes[0].kill()
    with raises_code("rank-lost", RunTimeError, "SIGKILL"):
        two.parameters.read()

"""Steps that all volunteers of a run take together, as its run file has them: the optimizer, and each step's place."""

from __future__ import annotations

from collections.abc import Sequence

from swarmtrain.algorithm.common_step import CommonOptimizer, CommonStep
from swarmtrain.peer.training.loop import inner_constants
from swarmtrain.run import RunFile


def common_optimizer(run: RunFile, shapes: Sequence[tuple[int, ...]]) -> CommonOptimizer:
    """Return the optimizer of a run's common steps for trained tensors of these shapes."""
    return CommonOptimizer(shapes, inner_constants(run), run.merge.optimizer)


def common_step(run: RunFile, round: int, run_tokens: int) -> CommonStep:
    """Return the position of the step that ends `round` (from 0), before which the run had `run_tokens`."""
    return CommonStep(round + 1, run_tokens / run.run.total_tokens)

"""What the trainer reports of a round."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from swarmtrain.model.gpt import build_model
from swarmtrain.peer.alone import _Nobody
from swarmtrain.peer.loop import ModelLoop
from swarmtrain.peer.session import RoundReport, Session
from swarmtrain.run import RunFile


def reports_of(norms: list[float]) -> list[RoundReport]:
    """Rounds of two inner steps whose gradients have these norms."""
    run = RunFile.model_validate(
        {
            "run": {"total_tokens": 64 * len(norms)},
            "model": {"context_tokens": 16, "num_layers": 1, "width": 16, "num_heads": 2},
            "data": {"source": "text", "paths": ("x",)},
            "inner": {"batch_sequences": 4},
            "merge": {"method": "diloco", "inner_steps": 2},
        }
    )
    batches: Any = SimpleNamespace(next_batch=lambda: torch.arange(4 * 17).reshape(4, 17))
    reports: list[RoundReport] = []
    exchange = _Nobody(2, len(norms))
    loop = ModelLoop(run, build_model(run.model, 0), batches)
    told = iter(norms)
    step = loop.inner.step

    def step_of_a_told_norm(progress: float, scale: float = 1.0) -> float:
        step(progress, scale)
        return next(told)

    loop.inner.step = step_of_a_told_norm  # type: ignore[method-assign]
    loop.train(Session(run=run, parameters=loop.parameters, loop=loop, exchange=exchange, report=reports.append))
    return reports


def test_a_rounds_gradient_norm_is_the_mean_of_those_that_are_finite() -> None:
    inf = float("inf")
    norms = [report.grad_norm for report in reports_of([1.0, 2.0, 3.0, inf, inf, float("nan")])]
    assert norms == [pytest.approx(1.5), pytest.approx(3.0), None]

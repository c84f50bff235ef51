"""Measure how fast this machine would train a run, by a few inner steps, or by a guess if those take too long."""

from __future__ import annotations

import time

import torch

from swarmtrain.algorithm.inner import InnerOptimizer
from swarmtrain.model.gpt import build_model, num_parameters
from swarmtrain.peer.training.loop import inner_constants
from swarmtrain.run import RunFile

__all__ = ["measure_speed"]

LIMIT_S = 8.0
_MATRIX = 512
_GUESS_S = 0.2
_MAX_STEPS = 5


def measure_speed(run: RunFile, limit_s: float = LIMIT_S) -> float:
    """Return tokens per second, measured within about `limit_s` seconds on random text.

    A model that cannot be built and stepped in that time is not tried. Then the speed follows from that of a matrix
    product, at 6 operations per parameter and token, which is an upper bound.
    """
    per_s = operations_per_s()
    size, T = run.microbatch_sequences, run.model.context_tokens
    sequence_operations = 6 * num_parameters(run.model) * T
    build_s = num_parameters(run.model) / 50e6
    sequences = min(size, int(limit_s / 4 * per_s / sequence_operations))
    if sequences < 1 or build_s > limit_s / 2:
        return per_s / (6 * num_parameters(run.model))
    model = build_model(run.model, run.run.seed)
    optimizer = InnerOptimizer(model.named_parameters(), inner_constants(run))
    give_up_s = time.monotonic() + limit_s / 2
    best_s = float("inf")
    for _ in range(_MAX_STEPS):
        batch = torch.randint(run.model.vocabulary_size, (sequences, T + 1))
        began_s = time.perf_counter()
        model.loss(batch).backward()  # type: ignore[no-untyped-call]
        backward_s = time.perf_counter()
        optimizer.step(0.0)
        step_s = (time.perf_counter() - backward_s) * sequences / run.inner.batch_sequences  # one per batch
        best_s = min(best_s, backward_s - began_s + step_s)
        if time.monotonic() > give_up_s:
            break
    return sequences * T / best_s


def operations_per_s() -> float:
    """Return the floating-point operations per second of a matrix product on this machine."""
    a = torch.rand(_MATRIX, _MATRIX)
    a @ a
    began_s, products = time.perf_counter(), 0
    while (took_s := time.perf_counter() - began_s) < _GUESS_S or not products:
        a @ a
        products += 1
    return products * 2 * _MATRIX**3 / took_s

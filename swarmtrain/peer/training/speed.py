"""Measure how fast this machine would train a run, by a few inner steps, or by a guess if those take too long."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from swarmtrain.algorithm.inner import InnerOptimizer
from swarmtrain.algorithm.pacing import rounds_of_others
from swarmtrain.model.gpt import build_model
from swarmtrain.model.parameter_count import num_parameters, operations_per_token, similar_built_in
from swarmtrain.peer.devices.compute import ComputeDevice, finish
from swarmtrain.peer.pipeline.stage_assignment import whole_tokens_per_s
from swarmtrain.peer.training.loop import inner_constants
from swarmtrain.run import RunFile

LIMIT_S = 8.0
_MATRIX = 512
_CARD_MATRIX = 4096  # a smaller one is over before the next is asked for
_GUESS_S = 0.2
_MAX_STEPS = 5
_LEAST_GUESSED = 10_000_000


def measure_speed(run: RunFile, limit_s: float = LIMIT_S, compute: ComputeDevice | None = None) -> float:
    """Return tokens per second, measured within about `limit_s` seconds on random text.

    It is the speed of the processor, or of the device of `compute`; for a model of Hugging Face, with a built-in one
    like it. A model that cannot be built and stepped in that time is not tried. Then the speed follows from that of a
    matrix product, at 6 operations per token and parameter (4 if it is frozen), which is an upper bound. Of a model
    that is cut into stages a card need not hold all: its parts are measured.
    """
    compute = ComputeDevice() if compute is None else compute
    if run.pipeline.stages > 1 and not compute.is_host:
        return whole_tokens_per_s(run, compute)
    per_s = operations_per_s(compute)
    size, T = compute.microbatch_sequences or run.microbatch_sequences, run.model.context_tokens
    sequence_operations = operations_per_token(run) * T
    build_s = num_parameters(run.model) / 50e6
    sequences = min(size, int(limit_s / 4 * per_s / sequence_operations))
    if sequences < 1 or build_s > limit_s / 2:
        return per_s / operations_per_token(run)
    model = build_model(similar_built_in(run.model), run.run.seed).to(compute.device)
    model.recomputes_blocks = compute.recomputes
    if run.adapter.is_used:  # the gradient passes through all that is frozen, to the first weights
        model.requires_grad_(False).embed.requires_grad_()
    optimizer = InnerOptimizer(model.named_parameters(), inner_constants(run))
    give_up_s = time.monotonic() + limit_s / 2
    best_s = float("inf")
    for _ in range(_MAX_STEPS):
        batch = torch.randint(run.model.vocabulary_size, (sequences, T + 1), device=compute.device)
        finish(compute.device)
        began_s = time.perf_counter()
        with compute.autocast():
            loss = model.loss(batch)
        loss.backward()  # type: ignore[no-untyped-call]
        finish(compute.device)
        backward_s = time.perf_counter()
        optimizer.step(0.0)
        finish(compute.device)
        step_s = (time.perf_counter() - backward_s) * sequences / run.inner.batch_sequences  # one per batch
        best_s = min(best_s, backward_s - began_s + step_s)
        if time.monotonic() > give_up_s:
            break
    return sequences * T / best_s


def most_steps_per_s(run: RunFile, compute: ComputeDevice) -> float:
    """Return the most inner steps that a processor could take in a second, by a matrix product; 0: not worth a guess.

    Only for models whose few first steps would take long, and not for a card, which is never that slow.
    """
    parameters = num_parameters(run.model)
    if not compute.is_host or parameters < _LEAST_GUESSED:
        return 0.0
    return operations_per_s(compute) / (operations_per_token(run) * run.tokens_per_step)


def too_slow_in_words(run: RunFile, steps_per_s: float, others: Sequence[float]) -> str:
    """Say that even rounds with the smallest steps end too late to be merged, and what to do; empty if they do not.

    `steps_per_s` is the own speed, or the most that it can be; `others` are the other volunteers' speeds, 0 if unknown.
    """
    if not run.merge.pacing or not run.merge.kind.asynchronous:
        return ""
    rounds = rounds_of_others(steps_per_s, others, run.merge.inner_steps, run.inner.batch_sequences)
    if rounds <= run.merge.max_staleness_rounds:
        return ""
    return (
        f"this machine is too slow to train this model: even with one sequence a step, a round takes as long as "
        f"{rounds:.0f} rounds of the others, and nothing that is {run.merge.max_staleness_rounds} rounds behind is "
        "merged; ask for a run that is cut into stages (pipeline.stages), of which this machine can hold one, or join "
        "with a graphics card"
    )


def operations_per_s(compute: ComputeDevice) -> float:
    """Return the floating-point operations per second of a matrix product."""
    width = _MATRIX if compute.is_host else _CARD_MATRIX
    a = torch.rand(width, width, device=compute.device)
    with compute.autocast():
        a @ a
        finish(compute.device)
        began_s, products = time.perf_counter(), 0
        while (took_s := time.perf_counter() - began_s) < _GUESS_S or not products:
            a @ a
            finish(compute.device)
            products += 1
    return products * 2 * width**3 / took_s

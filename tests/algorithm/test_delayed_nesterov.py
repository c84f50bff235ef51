"""Delayed Nesterov against its paper's formula in fp64, Nesterov on the buffer's mean, an example worked by hand."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from swarmtrain.algorithm.outer import (
    Buffer,
    DelayedNesterov,
    OuterConstants,
    OuterState,
    outer_step,
    weighted_mean,
)

_CONSTANTS = OuterConstants(learning_rate=0.7, momentum=0.9)


def _random(size: int, seed: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def _zero(size: int) -> OuterState:
    return OuterState(torch.zeros(size), torch.zeros(size))


def _close(a: OuterState, b: OuterState, atol: float = 1e-6) -> bool:
    return torch.allclose(a.theta, b.theta, rtol=0, atol=atol) and torch.allclose(
        a.momentum, b.momentum, rtol=0, atol=atol
    )


class _Paper(NamedTuple):
    """arXiv 2401.09135, algorithm 3 as printed, in fp64."""

    theta: Tensor
    momentum: Tensor
    delta: Tensor

    def arrive(self, gradient: Tensor, count: int, N: int, c: float) -> _Paper:
        theta, momentum, delta = self
        g, delta = gradient.double(), delta + gradient.double()
        if count % N == 0:
            momentum = 0.9 * momentum + delta / N
            return _Paper(theta - 0.7 * ((1 - c * N + c) * 0.9 * momentum + g / N), momentum, torch.zeros_like(delta))
        return _Paper(theta - 0.7 * (c * 0.9 * momentum + g / N), momentum, delta)


@pytest.mark.parametrize(("N", "c"), [(1, 0.0), (1, 1.0), (4, 0.0), (4, 0.1), (4, 0.25), (7, 1 / 7)])
def test_it_is_the_papers_formula(N: int, c: float) -> None:
    theta = _random(101, 0)
    outer = DelayedNesterov(OuterState(theta, torch.zeros(101)), _CONSTANTS, N, c)
    paper = _Paper(theta.double(), torch.zeros(101).double(), torch.zeros(101).double())
    for count in range(1, 4 * N + 3):
        gradient = 0.1 * _random(101, count)
        reached, paper = outer.arrive(gradient), paper.arrive(gradient, count, N, c)
        assert reached is outer.state
        assert torch.allclose(reached.theta.double(), paper.theta, rtol=0, atol=1e-6)
        assert torch.allclose(reached.momentum.double(), paper.momentum, rtol=0, atol=1e-6)


@pytest.mark.parametrize("weights", [None, [1 / 8, 1 / 2, 3 / 8, 0.0]])
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
def test_without_share_it_is_nesterov_on_the_buffers_mean(
    weights: list[float] | None, dtype: torch.dtype, atol: float
) -> None:
    start = OuterState(_random(101, 0).to(dtype), torch.zeros(101, dtype=dtype))
    outer = DelayedNesterov(start, _CONSTANTS, 4)
    for buffer in range(10):
        before, gradients = outer.state, [0.03 * _random(101, 10 + 4 * buffer + k).to(dtype) for k in range(4)]
        for k, gradient in enumerate(gradients):
            outer.arrive(gradient, weights[k] if weights else None)
        nesterov = outer_step(before, weighted_mean(gradients, weights or [1] * 4), _CONSTANTS)
        assert _close(outer.state, nesterov, atol=atol)


def test_one_arrival_is_an_outer_step_to_the_bit() -> None:
    outer, nesterov = DelayedNesterov(_zero(1003), _CONSTANTS, 1), _zero(1003)
    for seed in range(20):
        outer.arrive(_random(1003, seed))
        nesterov = outer_step(nesterov, _random(1003, seed), _CONSTANTS)
        assert torch.equal(outer.state.theta, nesterov.theta)
        assert torch.equal(outer.state.momentum, nesterov.momentum)


def test_new_tensors_at_every_arrival() -> None:
    outer = DelayedNesterov(_zero(5), _CONSTANTS, 2)
    seen = [(outer.state, outer.buffer)]
    copies = [(outer.state.theta.clone(), outer.state.momentum.clone(), outer.buffer.delta.clone())]
    for seed in range(5):
        outer.arrive(_random(5, seed))
        seen.append((outer.state, outer.buffer))
        copies.append((outer.state.theta.clone(), outer.state.momentum.clone(), outer.buffer.delta.clone()))
    for (state, buffer), (theta, momentum, delta) in zip(seen, copies, strict=True):
        assert torch.equal(state.theta, theta)
        assert torch.equal(state.momentum, momentum)
        assert torch.equal(buffer.delta, delta)


def test_it_is_deterministic_and_goes_on_from_its_parts() -> None:
    """A checkpoint in mid-buffer (state, delta, arrivals) and everything after it is the same to the bit."""
    through = DelayedNesterov(_zero(101), _CONSTANTS, 4, 0.1)
    stopped = DelayedNesterov(_zero(101), _CONSTANTS, 4, 0.1)
    for seed in range(30):
        through.arrive(_random(101, seed))
        kept = Buffer(stopped.buffer.delta.clone(), stopped.buffer.arrivals)
        stopped = DelayedNesterov(stopped.state, _CONSTANTS, 4, 0.1, kept)
        stopped.arrive(_random(101, seed))
        assert torch.equal(through.state.theta, stopped.state.theta)
        assert torch.equal(through.state.momentum, stopped.state.momentum)


def test_constants_and_number_change_between_buffers() -> None:
    """A ramped momentum, and one worker fewer: each buffer is one Nesterov step with its own constants."""
    outer, nesterov = DelayedNesterov(_zero(50), _CONSTANTS, 4), _zero(50)
    seed = 0
    for N, momentum in [(4, 0.0), (3, 0.4), (1, 0.8), (5, 0.9)]:
        outer.num_arrivals, outer.constants = N, OuterConstants(learning_rate=0.7, momentum=momentum)
        gradients = [_random(50, seed + k) for k in range(N)]
        seed += N
        for gradient in gradients:
            assert outer.num_arrivals == N
            outer.arrive(gradient)
        assert outer.buffer.arrivals == 0
        nesterov = outer_step(nesterov, weighted_mean(gradients, [1] * N), outer.constants)
        assert _close(outer.state, nesterov)


@pytest.mark.parametrize(
    ("before", "N", "after", "weights"),
    [
        (2, 3, 1, [1 / 4, 1 / 4, 1 / 3]),  # a worker left
        (3, 2, 1, [1 / 4, 1 / 4, 1 / 4, 1 / 2]),  # the buffer was full already: the next arrival ends it
        (2, 5, 3, [1 / 4, 1 / 4, 1 / 5, 1 / 5, 1 / 5]),  # a worker came
    ],
)
@pytest.mark.parametrize("share", [0.0, 0.2])
def test_number_changes_within_a_buffer(before: int, N: int, after: int, weights: list[float], share: float) -> None:
    """What came keeps its weight; the momentum is applied once and refreshed with all of them."""
    start = OuterState(torch.zeros(50), torch.zeros(50))
    outer = DelayedNesterov(start, _CONSTANTS, 4, share)
    gradients = [_random(50, seed) for seed in range(before + after)]
    for gradient in gradients[:before]:
        outer.arrive(gradient)
    outer.num_arrivals = N
    for gradient in gradients[before:]:
        assert outer.buffer.arrivals > 0
        outer.arrive(gradient)
    assert outer.buffer.arrivals == 0
    total = sum((g * w for g, w in zip(gradients, weights, strict=True)), torch.zeros(50))
    assert torch.allclose(outer.state.momentum, total, rtol=0, atol=1e-6)
    applied = (1 - share * (before + after - 1)) * 0.9  # the old momentum was zero, so the shares before moved nothing
    assert torch.allclose(outer.state.theta, -0.7 * (total + applied * total), rtol=0, atol=2e-6)


def test_what_makes_no_sense_is_refused_and_changes_nothing() -> None:
    outer = DelayedNesterov(_zero(3), _CONSTANTS, 4, 0.25)
    outer.arrive(torch.ones(3))
    state, buffer = outer.state, outer.buffer
    with pytest.raises(ValueError, match="3 numbers"):
        outer.arrive(torch.ones(4))
    for weight in (-0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match="weight"):
            outer.arrive(torch.ones(3), weight)
    for N in (0, 5):  # the share 0.25 is above 1/5
        with pytest.raises(ValueError, match="share"):
            outer.num_arrivals = N
    assert outer.num_arrivals == 4
    assert outer.state is state
    assert outer.buffer is buffer


@pytest.mark.parametrize(("N", "share"), [(0, 0.0), (4, 0.3), (4, -0.1), (2, math.nan)])
def test_number_and_share_are_checked(N: int, share: float) -> None:
    with pytest.raises(ValueError, match="share"):
        DelayedNesterov(_zero(3), _CONSTANTS, N, share)


@pytest.mark.parametrize("buffer", [Buffer(torch.zeros(4), 1), Buffer(torch.zeros(3), -1)])
def test_a_buffer_that_does_not_fit(buffer: Buffer) -> None:
    with pytest.raises(ValueError, match="does not fit"):
        DelayedNesterov(_zero(3), _CONSTANTS, 4, 0.0, buffer)

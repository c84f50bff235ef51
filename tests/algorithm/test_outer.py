"""Outer loop against plain references: torch.optim.SGD to the bit, fp64 means, large-batch SGD."""

from __future__ import annotations

import hashlib
import itertools
import math
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from swarmtrain.algorithm.outer import (
    OuterConstants,
    OuterState,
    flatten,
    momentum_at,
    outer_step,
    unflatten_into,
    weighted_mean,
)

_ODD_SHAPES = [(7, 5), (3,), (1,), (17, 31), (), (129,), (2, 3, 5)]


def _random(size: int, seed: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def _tensors(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in _ODD_SHAPES]


def test_flatten_and_back() -> None:
    tensors, copies = _tensors(0), [torch.zeros(shape) for shape in _ODD_SHAPES]
    flat = flatten(tensors)
    assert flat.shape == (sum(t.numel() for t in tensors),)
    assert flat.dtype == torch.float32
    unflatten_into(flat, copies)
    assert all(torch.equal(a, b) for a, b in zip(tensors, copies, strict=True))
    flat.zero_()  # a copy, not a view
    assert torch.equal(copies[0], tensors[0])


def test_flatten_one_tensor_is_a_copy_too() -> None:
    weights = torch.ones(5)
    flatten([weights]).zero_()
    assert torch.equal(weights, torch.ones(5))


def test_parameters_are_written_in_place_and_keep_their_gradients() -> None:
    parameter = nn.Parameter(torch.zeros(2, 3))
    parameter.grad = torch.ones(2, 3)
    address = parameter.data_ptr()
    unflatten_into(torch.arange(6.0), [parameter])
    assert parameter.data_ptr() == address
    assert parameter.grad is not None
    assert parameter.requires_grad
    assert parameter.flatten().tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("shape", [(9,), (11,), (10, 1)])
def test_unflatten_of_another_size_changes_nothing(shape: tuple[int, ...]) -> None:
    target = torch.zeros(10)
    with pytest.raises(ValueError, match="10 numbers"):
        unflatten_into(torch.ones(shape), [target])
    assert not target.any()


def test_mean_rounds_every_operation_separately() -> None:
    gradients, weights = [_random(1003, seed) for seed in range(3)], [3, 5, 9]
    expected = torch.zeros(1003, dtype=torch.float64)
    for gradient, weight in zip(gradients, weights, strict=True):
        share = torch.tensor(weight / 17, dtype=torch.float32).double()
        product = (gradient.double() * share).float()  # exact in fp64, then rounded once
        expected = (expected + product.double()).float().double()
    assert torch.equal(weighted_mean(gradients, weights), expected.float())


@given(
    size=st.integers(1, 200),
    cuts=st.lists(st.integers(0, 200), max_size=6),
    weights=st.lists(st.integers(1, 10**9), min_size=1, max_size=7),
)
def test_mean_of_slices_is_slice_of_mean(size: int, cuts: list[int], weights: list[int]) -> None:
    gradients = [_random(size, seed) for seed in range(len(weights))]
    borders = sorted({0, size, *(cut % size for cut in cuts)})
    slices = [weighted_mean([g[start:end] for g in gradients], weights) for start, end in itertools.pairwise(borders)]
    assert torch.equal(torch.cat(slices), weighted_mean(gradients, weights))


_DIGEST = """
import hashlib, torch
from swarmtrain.algorithm.outer import weighted_mean
gradients = [torch.rand(1003, generator=torch.Generator().manual_seed(s)) - 0.5 for s in range(4)]
print(hashlib.sha256(weighted_mean(gradients, [3, 5, 9, 11]).numpy().tobytes()).hexdigest())
"""


@pytest.mark.slow
def test_mean_is_the_same_on_a_processor_without_vector_instructions() -> None:
    gradients = [torch.rand(1003, generator=torch.Generator().manual_seed(s)) - 0.5 for s in range(4)]  # rand is exact
    here = hashlib.sha256(weighted_mean(gradients, [3, 5, 9, 11]).numpy().tobytes()).hexdigest()
    plain = {**os.environ, "ATEN_CPU_CAPABILITY": "default"}
    there = subprocess.run([sys.executable, "-c", _DIGEST], env=plain, capture_output=True, text=True, check=True)
    assert there.stdout.strip() == here


def test_mean_of_one_is_itself_and_new() -> None:
    gradient = _random(33, 0)
    mean = weighted_mean([gradient], [7])
    assert torch.equal(mean, gradient)
    assert mean.data_ptr() != gradient.data_ptr()


def test_mean_leaves_its_inputs_alone() -> None:
    gradients = [_random(33, 0), _random(33, 1)]
    copies = [g.clone() for g in gradients]
    weighted_mean(gradients, [1, 2])
    assert all(torch.equal(a, b) for a, b in zip(gradients, copies, strict=True))


def test_mean_ignores_who_has_no_tokens() -> None:
    a, b = _random(33, 0), _random(33, 1)
    assert torch.equal(weighted_mean([a, b], [5, 0]), a)


@pytest.mark.parametrize(
    ("shapes", "weights"),
    [
        ([], []),
        ([3, 3], [1]),
        ([3, 4], [1, 1]),
        ([3], [0]),
        ([3, 3], [2, -1]),
        ([3], [math.nan]),
        ([3], [math.inf]),
    ],
)
def test_mean_that_makes_no_sense(shapes: list[int], weights: list[float]) -> None:
    with pytest.raises(ValueError, match=r"weight|shape"):
        weighted_mean([torch.ones(n) for n in shapes], weights)


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("foreach", [False, True])
def test_outer_step_is_torch_sgd_to_the_bit(momentum: float, foreach: bool) -> None:
    parameters = [nn.Parameter(t) for t in _tensors(1)]
    sgd = torch.optim.SGD(parameters, lr=0.7, momentum=momentum, nesterov=momentum > 0, foreach=foreach)
    theta = flatten(parameters)
    state = OuterState(theta, torch.zeros_like(theta))
    for step in range(100):
        gradients = _tensors(100 + step)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient.clone()  # SGD with foreach changes it in place
        sgd.step()
        state = outer_step(state, flatten(gradients), OuterConstants(learning_rate=0.7, momentum=momentum))
        assert torch.equal(state.theta, flatten(parameters))


def test_outer_step_makes_new_tensors() -> None:
    old = OuterState(torch.ones(5), torch.ones(5))
    new = outer_step(old, torch.ones(5), OuterConstants(learning_rate=0.7, momentum=0.9))
    assert torch.equal(old.theta, torch.ones(5))
    assert torch.equal(old.momentum, torch.ones(5))
    assert len({t.data_ptr() for t in (old.theta, old.momentum, new.theta, new.momentum)}) == 4


def test_shapes_are_checked() -> None:
    with pytest.raises(ValueError, match="vectors of one size"):
        OuterState(torch.ones(3), torch.ones(4))
    with pytest.raises(ValueError, match="3 numbers"):
        outer_step(OuterState(torch.ones(3), torch.ones(3)), torch.ones(4), OuterConstants(learning_rate=1, momentum=0))


@pytest.mark.parametrize(("learning_rate", "momentum"), [(0.0, 0.5), (math.nan, 0.5), (1.0, 1.0), (1.0, -0.1)])
def test_constants_are_checked(learning_rate: float, momentum: float) -> None:
    with pytest.raises(ValueError, match="learning rate"):
        OuterConstants(learning_rate=learning_rate, momentum=momentum)


def test_momentum_ramp() -> None:
    assert [momentum_at(r, 0.8, 4) for r in range(6)] == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 0.8])
    assert [momentum_at(r, 0.8, 0) for r in range(2)] == [0.8, 0.8]
    with pytest.raises(ValueError, match="negative"):
        momentum_at(-1, 0.8, 4)

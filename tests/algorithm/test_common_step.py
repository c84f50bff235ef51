"""Common step of a large batch: AdamW to torch's bits, LAMB as its paper says, sums in one order, and gradients added
up."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from swarmtrain.algorithm.common_step import CommonOptimizer, CommonStep, norm_of
from swarmtrain.algorithm.gradient_sum import GradientSum
from swarmtrain.algorithm.inner import InnerConstants, learning_rate_at
from swarmtrain.algorithm.outer import OuterState, flatten, kept_where, unflatten_into

SHAPES = [(40, 30), (30,), (7, 5, 3), (1,)]
SIZE = sum(math.prod(shape) for shape in SHAPES)
CONSTANTS = InnerConstants(
    learning_rate=3e-3,
    weight_decay=0.1,
    beta1=0.9,
    beta2=0.95,
    gradient_clip=1e9,
    warmup_fraction=0.1,
    floor_fraction=0.1,
)


def made(seed: int, scale: float = 1.0) -> Tensor:
    return torch.randn(SIZE, generator=torch.Generator().manual_seed(seed)) * scale


def split(vector: Tensor) -> list[Tensor]:
    parts = torch.split(vector.clone(), [math.prod(shape) for shape in SHAPES])
    return [part.view(shape) for part, shape in zip(parts, SHAPES, strict=True)]


def start() -> OuterState:
    return OuterState(made(0), torch.zeros(2 * SIZE))


def test_adamw_is_torchs_to_the_bit() -> None:
    optimizer, state = CommonOptimizer(SHAPES, CONSTANTS), start()
    parameters = [nn.Parameter(each) for each in split(state.theta)]
    groups = [
        {"params": [each for each in parameters if each.dim() >= 2], "weight_decay": CONSTANTS.weight_decay},
        {"params": [each for each in parameters if each.dim() < 2], "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8, foreach=False)
    for number in range(1, 9):
        progress, gradient = number / 10, made(number, 0.1)
        before = state
        state = optimizer.step(state, gradient, CommonStep(number, progress))
        for group in reference.param_groups:
            group["lr"] = learning_rate_at(CONSTANTS, progress)
        for parameter, part in zip(parameters, split(gradient), strict=True):
            parameter.grad = part
        reference.step()
        assert torch.equal(state.theta, flatten(parameters))
        assert before.theta.data_ptr() != state.theta.data_ptr(), "another thread may read the old one"


@pytest.mark.parametrize("weight_decay", [0.1, 0.0])
def test_lamb_scales_each_matrixs_step_to_its_weights(weight_decay: float) -> None:
    constants = InnerConstants(**{**vars(CONSTANTS), "weight_decay": weight_decay})
    optimizer, state = CommonOptimizer(SHAPES, constants, "lamb"), start()
    moments = [(torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)) for shape in SHAPES]
    weights = [each.double() for each in split(state.theta)]
    weights[1].zero_()  # as a bias begins
    weights[2].zero_()  # a matrix of zeros: its ratio is 1 in the first step
    state = OuterState(flatten(weights), state.momentum)
    for number in range(1, 5):
        gradient = made(number, 0.1)
        state = optimizer.step(state, gradient, CommonStep(number, 0.5))
        for index, part in enumerate(split(gradient)):
            m, v = moments[index]
            m.mul_(0.9).add_(0.1 * part.double())
            v.mul_(0.95).add_(0.05 * part.double() ** 2)
            update = (m / (1 - 0.9**number)) / ((v / (1 - 0.95**number)).sqrt() + 1e-8)
            ratio = 1.0
            if part.dim() >= 2:
                update += weight_decay * weights[index]
                size, length = float(weights[index].norm()), float(update.norm())
                ratio = size / length if size else 1.0
            weights[index] -= learning_rate_at(CONSTANTS, 0.5) * ratio * update
        assert torch.allclose(state.theta.double(), torch.cat([each.flatten() for each in weights]), atol=2e-6, rtol=0)


def test_the_mean_gradient_is_clipped_and_a_bad_one_changes_nothing() -> None:
    clipping = CommonOptimizer(SHAPES, InnerConstants(**{**vars(CONSTANTS), "gradient_clip": 0.5}))
    free, state, gradient = CommonOptimizer(SHAPES, CONSTANTS), start(), made(1)
    at, norm = CommonStep(1, 0.5), float(gradient.double().norm())
    clipped, same = clipping.step(state, gradient, at), free.step(state, gradient * (0.5 / norm), at)
    assert torch.allclose(clipped.momentum, same.momentum, rtol=1e-5)
    bad = gradient.clone()
    bad[3] = math.inf
    assert clipping.step(state, bad, at) is state
    with pytest.raises(ValueError, match="numbers with 2 moments"):
        free.step(OuterState(state.theta, torch.zeros(SIZE)), gradient, at)


def test_what_nobody_trained_keeps_its_weights_and_both_moments() -> None:
    optimizer, state = CommonOptimizer(SHAPES, CONSTANTS), start()
    before = optimizer.step(state, made(1), CommonStep(1, 0.5))
    place = slice(1200, 1230)
    after = kept_where(optimizer.step(before, made(2), CommonStep(2, 0.5)), before, [place])
    assert torch.equal(after.theta[place], before.theta[place]) and not torch.equal(after.theta, before.theta)
    for number in range(2):
        kept = slice(number * SIZE + place.start, number * SIZE + place.stop)
        assert torch.equal(after.momentum[kept], before.momentum[kept])


@pytest.mark.parametrize("size", [1, 2, 1000, (1 << 16) + 1, 3 * (1 << 16) + 12345])
def test_a_norm_does_not_depend_on_the_number_of_threads(size: int) -> None:
    vector, threads = torch.randn(size, generator=torch.Generator().manual_seed(size)), torch.get_num_threads()
    try:
        found = set()
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            found.add(norm_of(vector))
    finally:
        torch.set_num_threads(threads)
    assert len(found) == 1 and found.pop() == pytest.approx(float(vector.double().norm()), rel=1e-12)


def test_gradients_are_added_up_beside_unchanged_weights() -> None:
    model = nn.Linear(3, 2)
    before, summed = flatten(model.parameters()), GradientSum(model.named_parameters(), CONSTANTS)
    sizes, gradients = (4, 1, 6), list[Tensor]()
    for size in sizes:
        data = torch.randn(size, 3)
        model(data).square().mean(dim=1).mean().backward()
        gradients.append(flatten([each.grad for each in model.parameters() if each.grad is not None]))
        summed.targets = size
        norm = summed.step(0.5)
        assert float(norm) == pytest.approx(float(gradients[-1].norm()), rel=1e-6)
        assert all(each.grad is None for each in model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, math.nan)
    summed.targets = 5
    assert not summed.step(0.5).isfinite()
    weighted = [size * gradient for size, gradient in zip(sizes, gradients, strict=True)]
    wanted = torch.stack(weighted).sum(dim=0) / sum(sizes)
    mean, num_targets = summed.take_mean()
    assert torch.allclose(mean, wanted, rtol=1e-5) and torch.equal(flatten(model.parameters()), before)
    assert num_targets == sum(sizes), "without those of the gradient that was not finite"
    again, num_targets = summed.take_mean()
    assert not again.count_nonzero() and num_targets == 1, "each gradient is taken once"
    unflatten_into(before, model.parameters())

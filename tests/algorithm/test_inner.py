"""Inner loop against torch.optim.AdamW, its schedule, checkpoints that continue to the bit, and the scale of fp16."""

from __future__ import annotations

import itertools
import math
import sys

import pytest
import torch
from device_reads import DeviceReads
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from swarmtrain.algorithm.inner import (
    InnerConstants,
    InnerOptimizer,
    LossScale,
    Moments,
    learning_rate_at,
    moments_scale,
)


def _constants(**changes: float) -> InnerConstants:
    values = {
        "learning_rate": 0.01,
        "weight_decay": 0.1,
        "beta1": 0.9,
        "beta2": 0.95,
        "gradient_clip": 1.0,
        "warmup_fraction": 0.1,
        "floor_fraction": 0.1,
    }
    return InnerConstants(**{**values, **changes})


def _model(seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def _backward(model: nn.Module, seed: int, scale: float = 1.0) -> None:
    x = torch.randn(11, 5, generator=torch.Generator().manual_seed(seed))
    (scale * model(x).square().mean()).backward()


def _weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_frozen_parameters_keep_their_bits_and_their_moments() -> None:
    model = _model()
    optimizer = InnerOptimizer(model.named_parameters(), _constants())
    frozen = dict(model[0].named_parameters(prefix="0"))
    for step in range(4):
        for parameter in frozen.values():
            parameter.requires_grad_(step != 2)
        before = [parameter.detach().clone() for parameter in frozen.values()]
        moments = optimizer.copy_moments(torch.empty(2, len(_weights(model)))) if step == 2 else None
        _backward(model, step)
        optimizer.step(0.5)
        if moments is not None:
            after = optimizer.copy_moments(torch.empty(2, len(_weights(model))))
            num = sum(map(torch.numel, before))
            assert all(torch.equal(a, b) for a, b in zip(before, frozen.values(), strict=True))
            assert torch.equal(after.vectors[:, :num], moments.vectors[:, :num])
            assert torch.equal(after.steps[:2], moments.steps[:2]) and after.steps[2] == moments.steps[2] + 1
    assert optimizer.copy_moments(torch.empty(2, len(_weights(model)))).steps.tolist() == [3, 3, 4, 4, 4, 4]


def test_schedule() -> None:
    constants = _constants(learning_rate=1.0, warmup_fraction=0.2, floor_fraction=0.1)
    assert learning_rate_at(constants, 0.0) == pytest.approx(0.01)
    assert learning_rate_at(constants, 0.1) == pytest.approx(0.505)
    assert learning_rate_at(constants, 0.2) == pytest.approx(1.0)
    assert learning_rate_at(constants, 0.6) == pytest.approx(0.55)
    assert learning_rate_at(constants, 1.0) == pytest.approx(0.1)
    assert learning_rate_at(constants, 1.5) == pytest.approx(0.1)
    assert learning_rate_at(_constants(learning_rate=1.0, warmup_fraction=0.0), 0.0) == 1.0


@pytest.mark.parametrize("progress", [-0.1, math.nan])
def test_progress_that_makes_no_sense(progress: float) -> None:
    with pytest.raises(ValueError, match="progress"):
        learning_rate_at(_constants(), progress)


@given(
    progress=st.floats(0, 2),
    warmup=st.floats(0, 1, exclude_max=True),
    floor=st.floats(0, 1),
)
def test_learning_rate_stays_between_nothing_and_the_peak(progress: float, warmup: float, floor: float) -> None:
    constants = _constants(learning_rate=1.0, warmup_fraction=warmup, floor_fraction=floor)
    assert 0 <= learning_rate_at(constants, progress) <= 1 + 1e-12
    assert learning_rate_at(constants, 0.0) > 0


@pytest.mark.parametrize("fused", [False, True])
def test_matches_a_plain_adamw(fused: bool) -> None:
    constants = _constants()
    ours, plain = _model(), _model()
    optimizer = InnerOptimizer(ours.named_parameters(), constants)
    matrices = [p for p in plain.parameters() if p.dim() >= 2]
    others = [p for p in plain.parameters() if p.dim() < 2]
    reference = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
        foreach=False,
        fused=fused,
    )
    for step in range(50):
        for model in (ours, plain):
            _backward(model, step)
        expected_norm = nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        for group in reference.param_groups:
            group["lr"] = learning_rate_at(constants, step / 50)
        reference.step()
        reference.zero_grad()
        assert float(optimizer.step(step / 50)) == pytest.approx(float(expected_norm), rel=1e-4)
    assert torch.allclose(_weights(ours), _weights(plain), atol=1e-5)
    assert not fused or torch.equal(_weights(ours), _weights(plain)), "the same arithmetic, to the bit"


def test_a_step_does_not_import_torchs_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """It costs every volunteer a second of processor time and tens of megabytes."""
    monkeypatch.setitem(sys.modules, "torch._dynamo", None)  # an import of it fails
    model = _model()
    optimizer = InnerOptimizer(model.named_parameters(), _constants())
    _backward(model, 0)
    assert float(optimizer.step(0.5)) > 0


def _moments(model: nn.Module, optimizer: InnerOptimizer) -> Moments:
    return optimizer.copy_moments(torch.empty(2, sum(parameter.numel() for parameter in model.parameters())))


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("num_before", [0, 1, 7])
def test_a_gradient_that_is_not_finite_changes_nothing(poison: float, num_before: int) -> None:
    model, spared = _model(), _model()
    optimizer, other = (InnerOptimizer(each.named_parameters(), _constants()) for each in (model, spared))
    for step in range(num_before):
        for each, by in ((model, optimizer), (spared, other)):
            _backward(each, step)
            by.step(0.5)
    weights, moments = _weights(model).clone(), _moments(model, optimizer)
    for _ in range(3):
        _backward(model, 99)
        next(model.parameters()).grad[0, 0] = poison  # type: ignore[index]
        assert not math.isfinite(optimizer.step(0.5))
        assert all(p.grad is None for p in model.parameters())
    assert torch.equal(_weights(model), weights)
    after = _moments(model, optimizer)
    assert torch.equal(after.vectors, moments.vectors) and torch.equal(after.steps, moments.steps)
    for step in range(3):
        for each, by in ((model, optimizer), (spared, other)):
            _backward(each, step)
            by.step(0.5)
    assert torch.equal(_weights(model), _weights(spared)), "nor does it change the steps that follow"
    assert torch.equal(_moments(model, optimizer).vectors, _moments(spared, other).vectors)


def test_a_steps_norm_is_a_scalar_that_nothing_has_read() -> None:
    model = _model()
    optimizer = InnerOptimizer(model.named_parameters(), _constants(), loss_scale=LossScale(torch.device("cpu")))
    for step in range(3):
        _backward(model, step, 100.0)
        expected = _norm(model) / optimizer.loss_scale.factor  # type: ignore[union-attr]
        if step == 1:
            next(model.parameters()).grad[0, 0] = math.nan  # type: ignore[index]
        with DeviceReads() as reads:
            norm = optimizer.step(0.5)
        assert not reads.found and norm.shape == () and not norm.requires_grad
        assert math.isnan(norm) if step == 1 else float(norm) == pytest.approx(float(expected), rel=1e-5)


def _norm(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm()


def test_loading_copies() -> None:
    model = _model()
    optimizer = InnerOptimizer(model.named_parameters(), _constants())
    moments = _moments(model, optimizer)
    optimizer.load_moments(moments)
    moments.vectors.fill_(5)
    moments.steps.fill_(5)
    after = _moments(model, optimizer)
    assert not after.vectors.any() and not after.steps.any()


@pytest.mark.parametrize(
    "changes",
    [
        {"learning_rate": 0.0},
        {"learning_rate": math.nan},
        {"weight_decay": -0.1},
        {"gradient_clip": 0.0},
        {"beta1": 1.0},
        {"beta2": -0.1},
        {"warmup_fraction": 1.0},
        {"floor_fraction": 1.1},
    ],
)
def test_constants_are_checked(changes: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must"):
        _constants(**changes)


def test_no_parameters() -> None:
    with pytest.raises(ValueError, match="at least one"):
        InnerOptimizer(itertools.chain(), _constants())


def test_a_late_joiners_steps_grow_with_the_age_of_its_moments() -> None:
    scales = [moments_scale(step, 0.95) for step in range(40)]
    assert scales[0] == pytest.approx(0.05)
    assert scales == sorted(scales)
    assert scales[19:] == pytest.approx([1.0] * 21)


def test_scale_multiplies_the_learning_rate() -> None:
    def moved(scale: float) -> torch.Tensor:
        weight = torch.nn.Parameter(torch.zeros(2, 2))
        optimizer = InnerOptimizer([("weight", weight)], _constants(weight_decay=0.0))
        weight.grad = torch.ones(2, 2)
        optimizer.step(0.5, scale)
        return weight.detach()

    torch.testing.assert_close(moved(0.25), 0.25 * moved(1.0))


def test_moments_in_one_place_continue_to_the_bit() -> None:
    model = _model()
    optimizer = InnerOptimizer(model.named_parameters(), _constants())
    size = sum(parameter.numel() for parameter in model.parameters())
    fresh = optimizer.copy_moments(torch.full((2, size), 7.0))
    assert not fresh.vectors.any() and not fresh.steps.any()
    for step in range(3):
        _backward(model, step)
        optimizer.step(0.1 * step)
    moments = optimizer.copy_moments(torch.empty(2, size))
    assert moments.steps.tolist() == [3.0] * len(list(model.parameters()))
    with pytest.raises(ValueError, match="room for moments"):
        optimizer.copy_moments(torch.empty(2, size + 1))

    other = _model()
    other.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()})
    continued = InnerOptimizer(other.named_parameters(), _constants())
    with pytest.raises(ValueError, match="are needed, got"):
        continued.load_moments(Moments(vectors=moments.vectors[:, :-1], steps=moments.steps))
    continued.load_moments(moments)
    for step in range(3):
        for trained, by in ((model, optimizer), (other, continued)):
            _backward(trained, 10 + step)
            by.step(0.5)
    assert torch.equal(_weights(model), _weights(other))


# ---------------------------------------------------------------- fp16


def test_the_scale_follows_torchs_own_over_thousands_of_steps() -> None:
    """It grows after 2000 good steps in a row, which a bad one begins anew."""
    ours, theirs = LossScale(torch.device("cpu")), torch.full((), 2.0**16)
    good_steps = torch.zeros((), dtype=torch.int32)
    bad = {0, 1, 500, 501, 2502, 4600, 4601, 4602}  # 2000 good steps end at 2501, and again before 4600
    factors = list[float]()
    for step in range(6700):
        is_bad = torch.tensor(float(step in bad))
        ours.update(is_bad)
        torch._amp_update_scale_(theirs, good_steps, is_bad, 2.0, 0.5, 2000)
        assert torch.equal(ours.factor, theirs)
        if not factors or factors[-1] != float(ours.factor):
            factors.append(float(ours.factor))
    assert factors == [2.0**power for power in (15, 14, 13, 12, 13, 12, 13, 12, 11, 10, 11)]


def test_scaled_gradients_take_the_step_of_unscaled_ones_to_the_bit() -> None:
    """Powers of two only move exponents."""
    models = [_model(), _model()]
    scale = LossScale(torch.device("cpu"))
    scaled = InnerOptimizer(models[0].named_parameters(), _constants(), loss_scale=scale)
    plain = InnerOptimizer(models[1].named_parameters(), _constants())
    for step in range(10):
        _backward(models[0], step, float(scale.factor))
        _backward(models[1], step)
        assert torch.equal(scaled.step(step / 10), plain.step(step / 10))
    assert torch.equal(_weights(models[0]), _weights(models[1]))


def test_a_scale_leaves_parameters_without_gradients_alone() -> None:
    scale = LossScale(torch.device("cpu"))
    scale.unscale([])
    weight = nn.Parameter(torch.ones(3))
    optimizer = InnerOptimizer([("weight", weight)], _constants(), loss_scale=scale)
    assert float(optimizer.step(0.5)) == 0 and torch.equal(weight.detach(), torch.ones(3))


def test_the_loss_scale_does_not_fall_below_one() -> None:
    """It could never rise again from 0."""
    scale = LossScale(torch.device("cpu"))
    for _ in range(40):
        scale.update(torch.ones(()))
    assert float(scale.factor) == 1.0

"""Computation of a stage: bitwise equal to the whole model, versions, sums, recomputing, taking out and putting in."""

from __future__ import annotations

import gc
import itertools
import weakref
from contextlib import AbstractContextManager
from typing import TypeAlias

import pytest
import torch
from torch import Tensor

from swarmtrain.algorithm.inner import InnerConstants, InnerOptimizer
from swarmtrain.model.gpt import build_model
from swarmtrain.model.stage_work import BadGradientError, DeviceStageWork, StageWork
from swarmtrain.model.stages import Stage, build_stage, stage_shapes
from swarmtrain.peer.devices.compute import autocast
from swarmtrain.run_model import ModelSection

SECTION = ModelSection(context_tokens=16, num_layers=3, width=16, num_heads=2)
CONSTANTS = InnerConstants(
    learning_rate=1e-2,
    weight_decay=0.1,
    beta1=0.9,
    beta2=0.95,
    gradient_clip=1e9,  # the clip is per stage: here it must not act
    warmup_fraction=0.1,
    floor_fraction=0.1,
)
SCALE = 0.25  # four microbatches a batch
Computes: TypeAlias = type[StageWork]


@pytest.fixture(params=[StageWork, DeviceStageWork])
def computes(request: pytest.FixtureRequest) -> Computes:
    """How a stage is computed; the processor is the device of those on a device."""
    found: Computes = request.param
    return found


def _batch(number: int) -> Tensor:
    return torch.randint(0, 256, (2, 17), generator=torch.Generator().manual_seed(number))


class _Pipeline:
    """Pipeline with one peer per stage, in one process."""

    def __init__(self, computes: Computes, boundaries: tuple[int, ...], graph_bytes: float = float("inf")) -> None:
        self.stages = [build_stage(shape, 5) for shape in stage_shapes(SECTION, boundaries)]
        self.work = [computes(stage, graph_bytes) for stage in self.stages]
        self.inner = [InnerOptimizer(stage.named_parameters(), CONSTANTS) for stage in self.stages]

    def forward(self, number: int) -> Tensor:
        x = _batch(number)[:, :-1]
        for work in self.work[:-1]:
            x = work.forward(number, x)
        return x

    def back(self, number: int, x: Tensor, batch: int) -> float:
        result = self.work[-1].tail(number, x, _batch(number)[:, 1:], SCALE, batch)
        gradient = result.gradient
        for work in reversed(self.work[:-1]):
            assert gradient is not None
            gradient = work.backward(number, gradient, batch)
        for work in self.work:
            work.forget(number)
        assert gradient is None
        return result.loss

    def step(self, batch: int) -> list[float]:
        norms = []
        for work, inner in zip(self.work, self.inner, strict=True):
            work.gradients(batch, 1.0)
            norms.append(inner.step(0.5))
            work.replaced()
        return norms


def _whole(num_batches: int) -> tuple[list[float], dict[str, Tensor]]:
    model = build_model(SECTION, 5)
    inner = InnerOptimizer(model.named_parameters(), CONSTANTS)
    losses = []
    for number in range(4 * num_batches):
        loss = model.loss(_batch(number))
        (loss * SCALE).backward()
        losses.append(float(loss.detach()))
        if number % 4 == 3:
            inner.step(0.5)
    return losses, model.state_dict()


@pytest.mark.parametrize("boundaries", [(), (1,), (0, 2, 3)], ids=str)
@pytest.mark.parametrize("graph_bytes", [float("inf"), 0], ids=["graphs kept", "all recomputed"])
def test_batches_one_after_another_are_the_whole_model_to_the_bit(
    computes: Computes, boundaries: tuple[int, ...], graph_bytes: float
) -> None:
    pipeline = _Pipeline(computes, boundaries, graph_bytes)
    losses = []
    for number in range(12):
        losses.append(pipeline.back(number, pipeline.forward(number), number // 4))
        if number % 4 == 3:
            pipeline.step(number // 4)
    expected, weights = _whole(3)
    assert losses == expected
    for name, parameter in itertools.chain.from_iterable(stage.named_parameters() for stage in pipeline.stages):
        assert torch.equal(parameter, weights[name]), name
    assert sum(work.num_recomputed for work in pipeline.work) == (0 if graph_bytes else 12 * len(boundaries))


def _one(computes: Computes) -> tuple[StageWork, Stage, InnerOptimizer]:
    stage = build_stage(stage_shapes(SECTION, (1, 2))[1], 5)
    return computes(stage), stage, InnerOptimizer(stage.named_parameters(), CONSTANTS)


def _x(seed: int) -> Tensor:
    return torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(seed))


def _reference(seed: int, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the gradient of `_x(seed)` with output gradient `_x(seed + 100)`, by these weights."""
    stage = Stage(stage_shapes(SECTION, (1, 2))[1])
    stage.load_state_dict(weights)
    stage(_x(seed)).backward(_x(seed + 100))
    return {name: p.grad for name, p in stage.named_parameters() if p.grad is not None}


def _weights(stage: Stage) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in stage.state_dict().items()}


def _sums(work: StageWork, batch: int) -> dict[str, Tensor]:
    work.gradients(batch, 1.0)
    return {name: p.grad for name, p in work.stage.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("graph_bytes", [float("inf"), 0])
def test_a_backward_after_a_step_is_computed_by_the_weights_of_its_forward(
    computes: Computes, graph_bytes: float
) -> None:
    work, stage, inner = _one(computes)
    work.graph_bytes = graph_bytes
    before = _weights(stage)
    work.forward("old", _x(1))
    work.forward("stepped", _x(2))
    work.backward("stepped", _x(3), 0)
    work.forget("stepped")
    work.gradients(0, 1.0)
    inner.step(0.5)
    work.replaced()
    assert not torch.equal(before["blocks.1.attention.qkv.weight"], stage.state_dict()["blocks.1.attention.qkv.weight"])
    work.backward("old", _x(101), 1)
    expected = _reference(1, before)
    found = _sums(work, 1)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_old_weights_are_kept_as_long_as_somebody_needs_them(computes: Computes) -> None:
    work, _, inner = _one(computes)
    work.forward("a", _x(1))
    for batch in range(3):
        work.forward(batch, _x(2))
        work.backward(batch, _x(3), batch)
        work.forget(batch)
        work.gradients(batch, 1.0)
        inner.step(0.5)
        work.replaced()
    assert sorted(work._weights) == [1, 4]
    work.forget("a")
    assert sorted(work._weights) == [4]


def test_what_is_subtracted_is_gone_and_what_is_added_counts_once(computes: Computes) -> None:
    work, stage, _ = _one(computes)
    weights = _weights(stage)
    for seed in (1, 2, 3):
        work.forward(seed, _x(seed))
    for seed in (1, 2, 3):
        work.backward(seed, _x(seed + 100), 0)
    work.subtract(2, 0)
    alone = {name: _reference(1, weights)[name] + _reference(3, weights)[name] for name in _reference(1, weights)}
    work.add(2, 1)
    found = _sums(work, 0)
    for name in alone:
        torch.testing.assert_close(found[name], alone[name], rtol=1e-5, atol=1e-6)
    again = _sums(work, 1)
    assert all(torch.equal(again[name], each) for name, each in _reference(2, weights).items())


def test_a_tail_is_subtracted_too(computes: Computes) -> None:
    stage = build_stage(stage_shapes(SECTION, (2,))[1], 5)
    work = computes(stage)
    targets = _batch(0)[:, 1:]
    for seed in (1, 2):
        work.tail(seed, _x(seed), targets, 0.5, 0)
    work.subtract(1, 0)
    found = _sums(work, 0)
    other = StageWork(build_stage(stage_shapes(SECTION, (2,))[1], 5))
    other.tail(2, _x(2), targets, 0.5, 0)
    for name, expected in _sums(other, 0).items():
        torch.testing.assert_close(found[name], expected, rtol=1e-5, atol=1e-6)


def test_a_factor_scales_and_a_batch_that_came_to_nothing_is_discarded(computes: Computes) -> None:
    work, stage, _ = _one(computes)
    weights = _weights(stage)
    for seed in (1, 2):
        work.forward(seed, _x(seed))
        work.backward(seed, _x(seed + 100), seed)
    work.discard(1)
    work.gradients(2, 4.0)
    for name, parameter in stage.named_parameters():
        assert torch.equal(parameter.grad, 4.0 * _reference(2, weights)[name])
    assert not work._sums


def test_graphs_are_kept_within_their_budget(computes: Computes) -> None:
    work, _, _ = _one(computes)
    work.forward(0, _x(0))
    work.graph_bytes = 2.5 * work._graph_size_bytes
    assert work._graph_size_bytes > 4 * _x(0).numel()
    for seed in range(1, 5):
        work.forward(seed, _x(seed))
    assert [key for key, kept in work._kept.items() if kept.out is not None] == [3, 4]
    work.backward(1, _x(101), 0)
    work.backward(4, _x(104), 0)
    assert work.num_recomputed == 1


def test_merged_weights_are_a_version_of_their_own(computes: Computes) -> None:
    work, stage, _ = _one(computes)
    before = _weights(stage)
    work.forward(1, _x(1))
    work.let_go()
    with torch.no_grad():
        for parameter in stage.parameters():
            parameter.add_(1.0)
    work.replaced()
    work.backward(1, _x(101), 0)
    found = _sums(work, 0)
    assert all(torch.equal(found[name], each) for name, each in _reference(1, before).items())


def test_what_is_forgotten_is_freed(computes: Computes) -> None:
    work, _, _ = _one(computes)
    for graph_bytes in (float("inf"), 0.0):
        work.graph_bytes = graph_bytes
        kept = []
        for seed in range(5):
            x = _x(seed)
            kept.append(weakref.ref(x.untyped_storage()))
            work.forward(seed, x)
            work.forget(seed)
            del x
        gc.collect()
        assert not any(each() for each in kept)


@pytest.mark.parametrize("factor", [float("nan"), float("inf"), 1e30])
def test_a_gradient_that_would_spoil_the_others_is_not_added(computes: Computes, factor: float) -> None:
    work, stage, _ = _one(computes)
    weights = _weights(stage)
    work.forward(1, _x(1))
    work.backward(1, _x(101), 0)
    work.forward(2, _x(2))
    with pytest.raises(BadGradientError, match="allowed"):
        work.backward(2, factor * _x(102), 0)
    found = _sums(work, 0)
    assert all(torch.equal(found[name], each) for name, each in _reference(1, weights).items())


@pytest.mark.parametrize("others", [True, False])
def test_a_gradient_far_larger_than_usual_is_clipped_to_three_times_that(computes: Computes, others: bool) -> None:
    """It counts as much in the sums, in the input's gradient, and where it is subtracted again."""
    work, stage, _ = _one(computes)
    weights = _weights(stage)
    honest, large = _reference(1, weights), _reference(2, weights)
    if others:
        work.forward(1, _x(1))
        work.backward(1, _x(101), 0)
    total = sum(float(each.norm()) ** 2 for each in large.values()) ** 0.5
    usual = total / 3 * 0.5  # so that half of it is left, times 9,000
    work._norms.extend([usual] * 64)
    work.forward(2, _x(2))
    plain = _one(computes)[0]
    plain.forward(2, _x(2))
    given, expected = work.backward(2, 9000 * _x(102), 0), plain.backward(2, 0.5 * _x(102), 0)
    assert given is not None and expected is not None
    torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-5)
    for name, each in work._sums[0].items():
        torch.testing.assert_close(each, 0.5 * large[name] + (honest[name] if others else 0), rtol=1e-4, atol=1e-4)
    assert work._norms[-1] == pytest.approx(3 * usual)
    work.subtract(2, 0)
    for name, each in work._sums[0].items():
        torch.testing.assert_close(each, honest[name] if others else 0 * each, rtol=1e-4, atol=1e-4)


def test_what_was_added_can_be_taken_out_whatever_has_become_usual(computes: Computes) -> None:
    """A driver that sends a large gradient, and then many tiny ones, ends nobody."""
    work, _, _ = _one(computes)
    work.forward(1, _x(1))
    work.backward(1, _x(101), 0)
    for seed in range(2, 80):
        work.forward(seed, _x(seed))
        work.backward(seed, 1e-9 * _x(seed + 100), 0)
        work.forget(seed)
    work.subtract(1, 0)
    assert all(float(each.abs().max()) < 1e-5 for each in _sums(work, 0).values())


def test_on_a_device_the_norm_needs_nothing_that_older_versions_of_torch_lack(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.nn.utils, "get_total_norm", raising=False)  # of torch 2.6
    norms = []
    for computes in (StageWork, DeviceStageWork):
        work, _, _ = _one(computes)
        work.forward("a", _x(1))
        work.backward("a", _x(101), 0)
        norms.append(work._norms[0])
    assert norms[0] == pytest.approx(norms[1])


def test_on_a_device_a_refused_gradient_leaves_the_others_to_the_bit() -> None:
    """It is not added before all of it is known."""
    work, stage, _ = _one(DeviceStageWork)
    weights = _weights(stage)
    work.forward(1, _x(1))
    work.backward(1, _x(101), 0)
    for factor in (float("nan"), 1e30):
        work.forward(2, _x(2))
        with pytest.raises(BadGradientError):
            work.backward(2, factor * _x(102), 0)
        work.forget(2)
    found = _sums(work, 0)
    assert all(torch.equal(found[name], each) for name, each in _reference(1, weights).items())


def test_what_is_released_is_freed(computes: Computes) -> None:
    work, stage, _ = _one(computes)
    work.forward(1, _x(1))
    work.forward(2, _x(2))
    work.backward(1, _x(101), 0)
    weights = [weakref.ref(parameter.untyped_storage()) for parameter in stage.parameters()]
    kept = [weakref.ref(each.x.untyped_storage()) for each in work._kept.values()]
    sums = [weakref.ref(each.untyped_storage()) for each in work._sums[0].values()]
    work.release()
    gc.collect()
    assert not any(each() for each in (*weights, *kept, *sums))


# ---------------------------------------------------------------- in bf16


def _bf16() -> AbstractContextManager[None]:
    return autocast(torch.device("cpu"), "bf16")


def test_in_bf16_all_that_is_kept_or_sent_is_fp32(computes: Computes) -> None:
    shapes = stage_shapes(SECTION, (0, 2))
    first, middle, last = (computes(build_stage(shape, 5), autocast=_bf16) for shape in shapes)
    x = _batch(1)[:, :-1]
    between = first.forward(1, x)
    out = middle.forward(1, between)
    result = last.tail(1, out, _batch(1)[:, 1:], SCALE, 0)
    assert result.gradient is not None
    gradient = middle.backward(1, result.gradient, 0)
    assert gradient is not None and first.backward(1, gradient, 0) is None
    tensors = [between, out, result.gradient, gradient]
    for work in (first, middle, last):
        tensors += [*work._sums[0].values(), *work._weights[1].values()]
    assert {each.dtype for each in tensors} == {torch.float32}
    full = computes(build_stage(shapes[1], 5)).forward(1, between)
    assert not torch.equal(out, full) and float((out - full).norm() / full.norm()) < 1e-2, "products are bf16"


@pytest.mark.parametrize("graph_bytes", [float("inf"), 0])
def test_in_bf16_what_is_computed_again_is_the_same_and_what_is_subtracted_is_gone(
    computes: Computes, graph_bytes: float
) -> None:
    stage = build_stage(stage_shapes(SECTION, (1, 2))[1], 5)
    work, other = computes(stage, graph_bytes, _bf16), StageWork(stage, autocast=_bf16)
    for each, seeds in ((work, (1, 2, 3)), (other, (1, 3))):
        for seed in seeds:
            each.forward(seed, _x(seed))
        for seed in seeds:
            each.backward(seed, _x(seed + 100), 0)
    work.subtract(2, 0)
    found, alone = work._sums[0], other._sums[0]
    for name in alone:
        torch.testing.assert_close(found[name], alone[name], rtol=1e-4, atol=1e-5)

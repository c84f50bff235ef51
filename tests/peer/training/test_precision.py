"""Training in bf16 and fp16 on the processor: what is computed so, what stays fp32, and that it learns as fp32 does."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from swarmtrain.algorithm.inner import Moments
from swarmtrain.data.batches import Batches
from swarmtrain.model.gpt import build_model
from swarmtrain.peer.devices.compute import ComputeDevice
from swarmtrain.peer.training.loop import ModelLoop
from swarmtrain.protocol.devices import PRECISIONS, Precision
from swarmtrain.run import RunFile

TEXT = np.frombuffer(b"fewer bits for products, and all of them for what is kept. " * 30, dtype=np.uint8)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LOWER: list[Precision] = ["bf16", "fp16"]
STEPS = 40


def run_file() -> RunFile:
    return RunFile.model_validate(
        {
            "run": {"total_tokens": 64 * STEPS},
            "model": {"context_tokens": 16, "num_layers": 2, "width": 16, "num_heads": 2},
            "inner": {"batch_sequences": 4, "microbatch_sequences": 2, "learning_rate": 1e-2},
            "merge": {"method": "diloco", "inner_steps": 10, "outer_momentum": 0.5, "momentum_ramp_rounds": 0},
        }
    )


def loop_in(precision: Precision) -> ModelLoop:
    run = run_file()
    data = Batches(TEXT, context_tokens=16, batch_sequences=4, run_sha256="ab" * 32, peer_id="me")
    return ModelLoop(run, build_model(run.model, 0), data, compute=ComputeDevice(precision=precision))


def losses_of(loop: ModelLoop) -> list[float]:
    return [float(loop.take_step(step / STEPS).loss) for step in range(STEPS)]


@functools.cache
def trained_in(precision: Precision) -> tuple[list[float], Tensor]:
    """Return a run's losses and its last weights (P,), computed once."""
    loop = loop_in(precision)
    return losses_of(loop), loop.parameters.read()


def test_precisions_are_those_that_torch_computes_in() -> None:
    assert set(PRECISIONS) == set(DTYPES)
    for precision in PRECISIONS:
        with ComputeDevice(precision=precision).autocast():
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype is DTYPES[precision]
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype is torch.float32, "no longer than a context"


@pytest.mark.parametrize("precision", LOWER)
def test_losses_fall_as_in_fp32(precision: Precision) -> None:
    (full, _), (lower, _) = trained_in("fp32"), trained_in(precision)
    assert sum(lower[-5:]) < 0.8 * sum(lower[:5])
    assert sum(lower[-5:]) == pytest.approx(sum(full[-5:]), rel=0.02)
    assert lower[0] == pytest.approx(full[0], rel=1e-2) and lower != full, "it is computed in fewer bits"


@pytest.mark.parametrize("precision", PRECISIONS)
def test_what_is_kept_is_fp32_and_products_are_not(precision: Precision) -> None:
    loop, products, gradients = loop_in(precision), set[torch.dtype](), set[torch.dtype]()
    for block in loop.model.blocks:
        block.feed_forward.down.register_forward_hook(lambda module, given, made: products.add(made.dtype))
    step = loop.inner.step

    def note(progress: float, scale: float = 1.0) -> Tensor:
        gradients.update(each.grad.dtype for each in loop.model.parameters() if each.grad is not None)
        return step(progress, scale)

    loop.inner.step = note  # type: ignore[method-assign]
    done = loop.take_step(0.5)
    assert products == {DTYPES[precision]} and gradients == {torch.float32}
    assert {each.dtype for each in loop.model.parameters()} == {torch.float32}
    moments = loop.kept(torch.empty(2, loop.parameters.read().numel())).moments
    assert isinstance(moments, Moments) and moments.vectors.dtype is torch.float32 and moments.vectors.any()
    assert isinstance(done.loss, Tensor) and done.loss.dtype is torch.float64


def test_only_fp16_scales_its_losses() -> None:
    scales = {precision: loop_in(precision).inner.loss_scale for precision in PRECISIONS}
    assert scales["fp32"] is None and scales["bf16"] is None and scales["fp16"] is not None
    loop = loop_in("fp16")
    done, plain = loop.take_step(0.5), loop_in("fp32").take_step(0.5)
    assert float(done.loss) == pytest.approx(float(plain.loss), rel=1e-3), "what is told is not scaled"
    assert float(done.grad_norm) == pytest.approx(float(plain.grad_norm), rel=1e-2)


def test_a_scale_that_overflows_falls_until_steps_are_good_again() -> None:
    """No step changes a weight until then, and the rest is trained as if nothing had been."""
    loop = loop_in("fp16")
    scale, before = loop.inner.loss_scale, loop.parameters.read()
    assert scale is not None
    scale.factor.fill_(2.0**40)
    norms, unchanged = list[float](), 0
    for step in range(40):
        norms.append(float(loop.take_step(step / 40).grad_norm))
        unchanged += torch.equal(loop.parameters.read(), before)
    num_bad = sum(not math.isfinite(norm) for norm in norms)
    assert 5 < num_bad == unchanged < 35 and all(math.isfinite(norm) for norm in norms[num_bad:])
    assert float(scale.factor) == 2.0 ** (40 - num_bad)
    moments: Any = loop.kept(torch.empty(2, len(before))).moments
    assert set(moments.steps.tolist()) == {40.0 - num_bad}

"""Forward passes that are computed again in the backward pass: the same bits, and hardly anything kept between."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from device_reads import DeviceReads
from torch import Tensor

from swarmtrain.model.evaluation import evaluate
from swarmtrain.model.gpt import GPT, build_model
from swarmtrain.model.recomputation import recomputed
from swarmtrain.model.sampling import generate
from swarmtrain.run_model import ModelSection

SECTION = ModelSection(context_tokens=32, num_layers=3, width=32, num_heads=2)
BATCH = torch.randint(0, 256, (4, 33), generator=torch.Generator().manual_seed(1))


def _model(recomputes: bool) -> GPT:
    model = build_model(SECTION, 0)
    model.recomputes_blocks = recomputes
    return model


def _gradient(model: GPT) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


# ---------------------------------------------------------------- a model


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_loss_and_gradients_are_the_same_to_the_bit(dtype: torch.dtype | None) -> None:
    models = _model(False), _model(True)
    for model in models:
        for part in torch.split(BATCH, 3):  # the second microbatch's gradient is added to the first one's
            with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
                loss = model.loss(part)
            (loss * 0.7).backward()
    assert torch.equal(*map(_gradient, models))
    assert len(_gradient(models[0])) == sum(p.numel() for p in models[0].parameters())


def test_only_what_blocks_return_is_kept() -> None:
    kept = list[int]()
    for recomputes in (False, True):
        model, alive = _model(recomputes), set[weakref.ref[Tensor]]()

        def note(
            module: object, inputs: tuple[Tensor, ...], output: Tensor, alive: set[weakref.ref[Tensor]] = alive
        ) -> None:
            alive.add(weakref.ref(output))

        for module in model.blocks.modules():
            module.register_forward_hook(note)  # type: ignore[arg-type]
        loss = model.loss(BATCH)
        kept.append(sum(each() is not None for each in alive))
        loss.backward()
    assert kept[0] > 6 and kept[1] == 3, "what a block returns is what the next one, or the head, begins with"


def test_evaluating_and_writing_compute_each_block_once() -> None:
    results = list[object]()
    for recomputes in (False, True):
        model, calls = _model(recomputes), list[int]()
        for number, block in enumerate(model.blocks):
            block.register_forward_hook(lambda *_, number=number, calls=calls: calls.append(number))  # type: ignore[misc]
        results.append((evaluate(model, [BATCH]), generate(model, [1, 2, 3], 4, 0.8, 0), calls))
        assert calls == [0, 1, 2] * 5
        with torch.no_grad():
            model.loss(BATCH)
        assert calls == [0, 1, 2] * 6
        model.loss(BATCH).backward()
        # A block ends early when it is computed again, before this hook is called.
        assert calls == [0, 1, 2] * 7
    assert results[0][:2] == results[1][:2]  # type: ignore[index]


def test_nothing_waits_for_a_device() -> None:
    model = _model(True)
    with DeviceReads() as reads:
        model.loss(BATCH).backward()
    assert not reads.found and _gradient(model).isfinite().all()


@pytest.mark.slow
def test_a_compiled_model_recomputes_too() -> None:
    gradients = list[Tensor]()
    for compiled in (False, True):
        model = _model(True)
        loss_of = torch.compile(model.loss, backend="aot_eager", fullgraph=True) if compiled else model.loss
        loss_of(BATCH).backward()
        gradients.append(_gradient(model))
    assert torch.allclose(*gradients, atol=1e-6)


# ---------------------------------------------------------------- a function


def _square_chain(called: list[str]) -> Callable[[Tensor], Tensor]:
    weight = torch.full((3,), 2.0, requires_grad=True)

    def function(x: Tensor) -> Tensor:
        called.append("first")
        y = (x * weight).exp()
        called.append("second")
        z = y.square()
        called.append("third")  # a sum needs none of its inputs for its gradient
        return z.sum()

    return function


def test_computing_again_ends_when_the_gradient_has_all_that_it_needs() -> None:
    called = list[str]()
    function, x = _square_chain(called), torch.ones(3, requires_grad=True)
    y = recomputed(function, x)
    assert called == ["first", "second", "third"]
    y.backward()
    assert called == ["first", "second", "third", "first", "second"]
    twin = torch.ones(3, requires_grad=True)
    _square_chain([])(twin).backward()
    assert x.grad is not None and twin.grad is not None and torch.equal(x.grad, twin.grad)


def test_two_backward_passes_compute_it_again_twice() -> None:
    called = list[str]()
    x = torch.ones(3, requires_grad=True)
    y = recomputed(_square_chain(called), x)
    for _ in range(2):
        y.backward(retain_graph=True)
    twin = torch.ones(3, requires_grad=True)
    plain = _square_chain([])(twin)
    for _ in range(2):
        plain.backward(retain_graph=True)
    assert called.count("first") == 3
    assert x.grad is not None and twin.grad is not None and torch.equal(x.grad, twin.grad)


def test_an_input_without_a_gradient() -> None:
    weight = torch.full((3,), 2.0, requires_grad=True)
    recomputed(lambda x: (x * weight).square().sum(), torch.ones(3)).backward()
    assert weight.grad is not None and weight.grad.tolist() == [4.0] * 3


def test_the_type_of_the_forward_pass_is_that_of_the_second() -> None:
    weight, types = torch.ones(3, 3, requires_grad=True), list[torch.dtype]()

    def function(x: Tensor) -> Tensor:
        y = x @ weight
        types.append(y.dtype)
        return y.float().square()

    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = recomputed(function, torch.ones(2, 3, requires_grad=True)).sum()
    loss.backward()
    assert types == [torch.bfloat16] * 2
    recomputed(function, torch.ones(2, 3, requires_grad=True)).sum().backward()
    assert types[2:] == [torch.float32] * 2


@pytest.mark.parametrize(
    "error", [MemoryError("no"), torch.cuda.OutOfMemoryError("CUDA out of memory"), RuntimeError("x")]
)
def test_an_error_while_computing_again_comes_out_of_the_backward_pass(error: Exception) -> None:
    calls, held = 0, list[weakref.ref[Tensor]]()

    def function(x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        y = x.exp()
        held.append(weakref.ref(y))
        if calls == 2:
            raise error
        return y.square().sum()

    gc.disable()
    try:
        loss = recomputed(function, torch.ones(3, requires_grad=True))
        with pytest.raises(type(error)) as raised:
            loss.backward()
        assert raised.value is error
        del raised, loss
        error.__traceback__ = None
        assert all(each() is None for each in held)
    finally:
        gc.enable()


def test_nothing_is_held_after_the_backward_pass() -> None:
    held = list[weakref.ref[Tensor]]()

    def function(x: Tensor) -> Tensor:
        y = x.exp()
        held.append(weakref.ref(y))
        return y.square()

    gc.disable()
    try:
        x = torch.ones(3, requires_grad=True)
        between = recomputed(function, x * 2)
        held.append(weakref.ref(between))
        loss = recomputed(function, between).sum()
        del between
        loss.backward()
        del loss
        assert len(held) == 5 and all(each() is None for each in held)
    finally:
        gc.enable()

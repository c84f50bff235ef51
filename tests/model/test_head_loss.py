"""Loss in chunks of logits: torch's own within rounding, in less memory, and to the bit where there are few logits."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from device_reads import DeviceReads
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from swarmtrain.algorithm.batch import IGNORED, join_rows
from swarmtrain.model import head_loss, loss_chunks
from swarmtrain.model.evaluation import evaluate
from swarmtrain.model.gpt import build_model
from swarmtrain.model.head_loss import mean_loss, only_targets, sum_of_losses
from swarmtrain.model.loss_chunks import chunk_tokens
from swarmtrain.run_model import ModelSection

V, D = 300, 24


@pytest.fixture
def chunks_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Let at most so many tokens of a vocabulary of `V` have logits at once."""

    def set_up(tokens: int) -> None:
        monkeypatch.setattr(loss_chunks, "_LEAST_TOKENS", 1)
        for name in ("SMALL_BYTES", "LOW_PRECISION_BYTES", "CARD_BYTES"):
            monkeypatch.setattr(head_loss, name, 4 * V * tokens)

    return set_up


def _head(scale: float = 1.0) -> nn.Linear:
    head = nn.Linear(D, V, bias=False)
    with torch.no_grad():
        head.weight.copy_(scale * torch.randn(V, D, generator=torch.Generator().manual_seed(3)))
    return head


def _inputs(shape: tuple[int, int] = (3, 7)) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(*shape, D, generator=generator).requires_grad_()
    return x, torch.randint(V, shape, generator=generator)


def _plain(head: nn.Linear, x: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(head(x).flatten(0, 1).float(), targets.flatten())


def _results(
    loss_of: Callable[..., Tensor], scale: float = 1.0, factor: float = 1.0, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss and the gradients by input and head."""
    head, (x, targets) = _head(scale), _inputs()
    with nullcontext() if dtype is None else torch.autocast("cpu", dtype=dtype):
        loss = loss_of(head, x, targets)
    (loss * factor).backward()
    assert x.grad is not None and head.weight.grad is not None
    return loss.detach(), x.grad, head.weight.grad


def _error(found: Tensor, expected: Tensor) -> float:
    return float(torch.linalg.vector_norm(found - expected) / torch.linalg.vector_norm(expected))


# ---------------------------------------------------------------- numbers


@pytest.mark.parametrize("tokens", [1, 2, 4, 5, 10, 11, 20])
@pytest.mark.parametrize(("scale", "factor"), [(0.2, 1.0), (1.0, 0.125), (30.0, 65536.0)])
def test_chunks_give_torchs_loss_and_gradients(
    chunks_of: Callable[[int], None], tokens: int, scale: float, factor: float
) -> None:
    expected = _results(_plain, scale, factor)
    chunks_of(tokens)
    for found, wanted in zip(_results(mean_loss, scale, factor), expected, strict=True):
        assert found.dtype == wanted.dtype and found.shape == wanted.shape
        assert _error(found, wanted) <= 1e-6


def test_few_logits_give_the_bits_that_they_gave() -> None:
    for found, wanted in zip(_results(mean_loss), _results(_plain), strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("factor", [1.0, 1024.0])
def test_under_autocast_chunks_are_no_less_exact(
    chunks_of: Callable[[int], None], dtype: torch.dtype, factor: float
) -> None:
    exact = _results(_plain, factor=factor)
    plain = _results(_plain, factor=factor, dtype=dtype)
    chunks_of(5)
    for found, usual, wanted in zip(_results(mean_loss, factor=factor, dtype=dtype), plain, exact, strict=True):
        assert found.dtype == torch.float32
        assert _error(found, wanted) <= 1.1 * _error(usual, wanted) + 1e-6


def test_tiny_chances_do_not_vanish_in_fp16(chunks_of: Callable[[int], None]) -> None:
    """Divided by the number of tokens, as the gradient finally is, they would."""
    exact = _results(_plain, 0.01, 1e-4)
    chunks_of(5)
    for found, wanted in zip(_results(mean_loss, 0.01, 1e-4, torch.float16), exact, strict=True):
        assert _error(found, wanted) <= 2e-3


def test_logits_far_from_zero_and_chances_of_zero(chunks_of: Callable[[int], None]) -> None:
    head, (x, targets) = _head(), _inputs((1, 4))
    with torch.no_grad():
        head.weight[0] = 1e4
        x.abs_()
    targets = torch.full_like(targets, 5)
    expected = _plain(head, x, targets)
    chunks_of(2)
    loss = mean_loss(head, x, targets)
    loss.backward()
    assert float(expected.detach()) > 1e4 and _error(loss.detach(), expected.detach()) <= 1e-6
    assert x.grad is not None and x.grad.isfinite().all()


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(chunks_of: Callable[[int], None], poison: float) -> None:
    """The optimizer drops such a step; a loss that hides it would spoil the weights."""
    chunks_of(5)
    head, (x, targets) = _head(), _inputs()
    with torch.no_grad():
        x[1, 2, 3] = poison
    loss = mean_loss(head, x, targets)
    loss.backward()
    assert head.weight.grad is not None
    assert not loss.isfinite() and not head.weight.grad.isfinite().all()


def test_further_microbatches_add_their_gradients(chunks_of: Callable[[int], None]) -> None:
    heads = _head(), _head()
    for loss_of, head in zip((_plain, mean_loss), heads, strict=True):
        if loss_of is mean_loss:
            chunks_of(5)
        for _ in range(3):
            (loss_of(head, *_inputs()) / 3).backward()
    assert heads[0].weight.grad is not None and heads[1].weight.grad is not None
    assert _error(heads[1].weight.grad, heads[0].weight.grad) <= 1e-6


def test_a_second_backward_pass_is_refused(chunks_of: Callable[[int], None]) -> None:
    """The first has scaled the gradients in their place."""
    chunks_of(5)
    loss = mean_loss(_head(), *_inputs())
    (2 * loss).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("tokens", [5, 1000])
def test_without_a_gradient_it_is_the_same_loss(chunks_of: Callable[[int], None], tokens: int) -> None:
    head, (x, targets) = _head(), _inputs()
    expected = _plain(head, x, targets).detach()
    chunks_of(tokens)
    with torch.no_grad():
        assert _error(mean_loss(head, x, targets), expected) <= 1e-6
    with torch.inference_mode():
        assert _error(sum_of_losses(head, x, targets), expected * 21) <= 1e-6
    assert not sum_of_losses(head, x, targets).requires_grad


# ---------------------------------------------------------------- memory and speed


class _Largest(TorchDispatchMode):
    """Notes the most numbers of any tensor that is computed."""

    numbers = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return out


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_no_more_logits_exist_at_once_than_a_chunk_has(
    chunks_of: Callable[[int], None], dtype: torch.dtype | None
) -> None:
    head, (x, targets) = _head(), _inputs((8, 64))
    for tokens in (1000, 100):
        chunks_of(tokens)
        with (
            _Largest() as largest,
            nullcontext() if dtype is None else torch.autocast("cpu", dtype=dtype),
        ):
            mean_loss(head, x, targets).backward()
            sum_of_losses(head, x, targets)
        # 512 tokens are five parts of 86 and one of 82
        assert largest.numbers == (512 * V if tokens == 1000 else 86 * V)


@pytest.mark.parametrize("tokens", [5, 1000])
def test_tokens_that_are_no_targets_have_no_logits_and_torchs_gradients(
    chunks_of: Callable[[int], None], tokens: int
) -> None:
    heads, inputs = (_head(), _head()), (_inputs((4, 16)), _inputs((4, 16)))
    is_ignored = torch.rand(4, 16, generator=torch.Generator().manual_seed(1)) < 0.75
    wanted = inputs[0][1].masked_fill(is_ignored, IGNORED)
    number = int((~is_ignored).sum())
    chunks_of(tokens)
    with _Largest() as largest:
        loss = mean_loss(heads[0], *only_targets(inputs[0][0], wanted))
        loss.backward()
        summed = sum_of_losses(heads[0], *only_targets(inputs[0][0], wanted))
    assert largest.numbers == max(V * D, min(tokens, number) * V) < 64 * V
    expected = F.cross_entropy(heads[1](inputs[1][0]).flatten(0, 1), wanted.flatten(), ignore_index=IGNORED)
    expected.backward()
    assert _error(loss.detach(), expected.detach()) <= 1e-6 and _error(summed, number * expected.detach()) <= 1e-6
    for found, right in ((inputs[0][0].grad, inputs[1][0].grad), (heads[0].weight.grad, heads[1].weight.grad)):
        assert found is not None and right is not None and _error(found, right) <= 1e-6


@pytest.mark.parametrize("tokens", [5, 1000])
def test_without_any_target_loss_and_gradients_are_zero(chunks_of: Callable[[int], None], tokens: int) -> None:
    chunks_of(tokens)
    head, (x, targets) = _head(), _inputs()
    loss = mean_loss(head, *only_targets(x, torch.full_like(targets, IGNORED)))
    loss.backward()
    assert float(loss.detach()) == 0.0 and x.grad is not None and head.weight.grad is not None
    assert not x.grad.any() and not head.weight.grad.any()
    assert float(sum_of_losses(head, *only_targets(x, torch.full_like(targets, IGNORED)))) == 0.0


def test_where_memory_is_short_chunks_are_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_chunks, "_LEAST_TOKENS", 1)
    monkeypatch.setattr(head_loss, "SMALL_BYTES", 4 * V * 5)
    head, (x, targets) = _head(), _inputs()
    for is_short, dtype, numbers in (
        (False, None, 5),
        (True, None, 5),
        (False, torch.bfloat16, 21),
        (True, torch.bfloat16, 5),
    ):
        with (
            _Largest() as largest,
            torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None),
        ):
            mean_loss(head, x, targets, is_memory_short=is_short)
        assert largest.numbers == max(V * D, numbers * V)


def test_nothing_waits_for_a_device(chunks_of: Callable[[int], None]) -> None:
    chunks_of(5)
    head, (x, targets) = _head(), _inputs()
    with DeviceReads() as reads:
        mean_loss(head, x, targets).backward()
    assert not reads.found


def test_no_compiler_is_imported(chunks_of: Callable[[int], None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch._dynamo", None)  # an import of it fails
    chunks_of(5)
    mean_loss(_head(), *_inputs()).backward()


@given(tokens=st.integers(1, 10**6), vocabulary=st.integers(2, 10**6), most_bytes=st.integers(1, 10**9))
def test_chunks_are_equal_parts_of_enough_tokens(tokens: int, vocabulary: int, most_bytes: int) -> None:
    size = chunk_tokens(tokens, vocabulary, most_bytes)
    assert 1 <= size <= tokens
    if 4 * vocabulary * tokens <= most_bytes:
        assert size == tokens
    if size < tokens:
        parts = -(-tokens // size)
        assert size <= max(128, most_bytes // (4 * vocabulary))
        assert size == -(-tokens // parts), "no part is much smaller than the others"
        assert size > 128 // 2


# ---------------------------------------------------------------- models


def test_a_model_with_a_large_vocabulary_trains_and_is_evaluated_in_chunks(chunks_of: Callable[[int], None]) -> None:
    section = ModelSection(tokenizer="bpe", vocabulary_size=V, context_tokens=32, num_layers=2, width=16, num_heads=2)
    batch = torch.randint(V, (3, 33), generator=torch.Generator().manual_seed(0))
    gradients, evaluated = list[Tensor](), list[tuple[float, int]]()
    for tokens in (1000, 10):
        chunks_of(tokens)
        model = build_model(section, 0)
        model.loss(batch).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
        evaluated.append(evaluate(model, [batch, batch[:1]]))
    assert _error(gradients[1], gradients[0]) <= 1e-6
    assert evaluated[0][1] == evaluated[1][1] == 4 * 32
    assert evaluated[1][0] == pytest.approx(evaluated[0][0], rel=1e-6)


def test_only_targets_are_counted_when_a_model_is_evaluated() -> None:
    section = ModelSection(context_tokens=32, num_layers=1, width=16, num_heads=2)
    model, tokens = build_model(section, 0), torch.randint(256, (3, 33), generator=torch.Generator().manual_seed(0))
    is_target = torch.arange(33) >= 30
    sum_nats, number = evaluate(model, [join_rows(tokens, is_target.expand(3, 33)), tokens])
    logits = F.log_softmax(model(tokens[:, :-1]), -1).gather(2, tokens[:, 1:, None]).detach()
    assert number == 9 + 96 and sum_nats == pytest.approx(-float(logits[:, 29:].sum() + logits.sum()), rel=1e-5)

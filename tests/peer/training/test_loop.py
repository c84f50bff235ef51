"""Training loop, without a session and with one, compared bitwise with plain PyTorch."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lone_exchange import lone_exchange
from torch import Tensor

from swarmtrain.algorithm.batch import IGNORED, join_rows, num_targets
from swarmtrain.algorithm.inner import learning_rate_at, moments_scale
from swarmtrain.data.batches import Batches
from swarmtrain.model.gpt import GPT, build_model
from swarmtrain.peer.lifecycle.stop import StopTraining
from swarmtrain.peer.training.loop import ModelLoop, inner_constants
from swarmtrain.peer.training.session import RoundReport, Session
from swarmtrain.run import RunFile

TEXT = np.frombuffer(b"all that is gold does not glitter, not all those who wander are lost. " * 20, dtype=np.uint8)


def run_file(total_steps: int, **inner: Any) -> RunFile:
    return RunFile.model_validate(
        {
            "run": {"total_tokens": 64 * total_steps},
            "model": {"context_tokens": 16, "num_layers": 1, "width": 16, "num_heads": 2},
            "data": {"source": "text", "paths": ("x",)},
            "inner": {"batch_sequences": 4, "microbatch_sequences": 2, "learning_rate": 1e-2, **inner},
            "merge": {"method": "diloco", "inner_steps": 2, "outer_momentum": 0.5, "momentum_ramp_rounds": 0},
        }
    )


def batches_at(position: int) -> Batches:
    return Batches(TEXT, context_tokens=16, batch_sequences=4, run_sha256="ab" * 32, peer_id="me", position=position)


def loop_of(run: RunFile, position: int = 0) -> ModelLoop:
    return ModelLoop(run, build_model(run.model, 0), batches_at(position))


def session_of(run: RunFile, loop: ModelLoop, steps: int, reports: list[RoundReport]) -> Session:
    exchange = lone_exchange(run, run.merge.inner_steps, steps)
    return Session(run=run, parameters=loop.parameters, loop=loop, exchange=exchange, report=reports.append)


# ---------------------------------------------------------------- alone


def test_without_a_session_its_losses_fall() -> None:
    run = run_file(60)
    loop = loop_of(run)
    losses = [loop.take_step(step / 60).loss for step in range(60)]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5]) and loop.batches.position == 60


def test_a_step_is_adamw_on_clipped_gradients_to_the_bit() -> None:
    run = run_file(10, gradient_clip=0.1)
    loop, (model, optimizer) = loop_of(run), plain(run)
    data = batches_at(0)
    for step in range(5):
        done = loop.take_step(step / 10)
        loss, norm = plain_step(run, model, optimizer, data.next_batch(), step / 10)
        assert (done.tokens, done.loss, done.grad_norm) == (64, loss, norm) and norm > 0.1
    assert same_weights(loop, model)


def test_it_goes_on_from_what_a_checkpoint_keeps_of_it() -> None:
    run = run_file(10)
    straight, stopped = loop_of(run), loop_of(run)
    for step in range(6):
        straight.take_step(step / 10)
    for step in range(3):
        stopped.take_step(step / 10)
    part = stopped.kept(torch.empty(2, stopped.parameters.read().numel()))
    with pytest.raises(ValueError, match="stands at batch 3, the data at 0"):
        loop_of(run).resume(part)
    again = loop_of(run, part.batches)
    with pytest.raises(ValueError, match="not lent ones"):
        again.resume(stopped.kept(None))
    again.resume(part)
    again.parameters.write(stopped.parameters.read())
    for step in range(3, 6):
        again.take_step(step / 10)
    assert again.batches.position == straight.batches.position == 6
    assert torch.equal(again.parameters.read(), straight.parameters.read())


def test_a_late_comers_steps_are_smaller_until_its_moments_are_not_young() -> None:
    run = run_file(10)
    loop, (model, optimizer) = loop_of(run), plain(run)
    loop.weights_replaced()
    data, beta2 = batches_at(0), run.inner.beta2
    for step in range(3):
        loop.take_step(0.5)
        plain_step(run, model, optimizer, data.next_batch(), 0.5, scale=moments_scale(step, beta2))
    assert loop.young_steps == 3 and same_weights(loop, model)
    loop.weights_replaced()
    assert loop.young_steps == 3, "it has moments of its own by now"


def test_what_is_skipped_is_not_trained_on() -> None:
    run = run_file(10)
    skipped, began_there = loop_of(run), loop_of(run, 4)
    skipped.skip(4 * 64)
    assert skipped.take_step(0.5) == began_there.take_step(0.5)
    assert torch.equal(skipped.parameters.read(), began_there.parameters.read())


class Masked:
    """Batches of which the last tokens of each sequence are targets, as many as `counts` says, sequence by sequence."""

    num_shards = 0

    def __init__(self, counts: list[list[int]]) -> None:
        self._plain, self._counts = batches_at(0), counts

    @property
    def position(self) -> int:
        return self._plain.position

    def use_shard(self, shard: int) -> None:
        raise ValueError

    def next_batch(self) -> Tensor:
        counts = torch.tensor(self._counts[self.position % len(self._counts)])
        tokens = self._plain.next_batch()
        return join_rows(tokens, torch.arange(tokens.shape[1]) >= tokens.shape[1] - counts[:, None])


def masked_loop(run: RunFile, counts: list[list[int]]) -> ModelLoop:
    return ModelLoop(run, build_model(run.model, 0), Masked(counts))


def test_a_masked_batch_counts_by_its_targets_whatever_its_microbatches() -> None:
    counts = [[16, 1, 3, 0], [2, 2, 0, 0], [16, 16, 16, 16]]
    results = []
    for microbatch in (1, 2, 4):
        loop = masked_loop(run_file(10, microbatch_sequences=microbatch), counts)
        results.append([loop.take_step(step / 10) for step in range(3)])
    assert [each.tokens for each in results[0]] == [20, 4, 64] and {each.read_tokens for each in results[0]} == {64}
    for found in results[1:]:
        for ours, other in zip(found, results[0], strict=True):
            assert ours.tokens == other.tokens
            assert float(ours.loss) == pytest.approx(float(other.loss), rel=1e-5)
            assert float(ours.grad_norm) == pytest.approx(float(other.grad_norm), rel=1e-5)
    run = run_file(10)
    model, batch = build_model(run.model, 0), Masked(counts).next_batch()
    logits, labels = model(batch[:, 0, :-1]).flatten(0, 1), batch[:, 1, 1:].flatten()
    mean = torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORED)
    assert float(results[0][0].loss) == pytest.approx(float(mean.detach()), rel=1e-6), "not the mean of means"


def test_a_batch_without_a_target_is_a_step_like_any() -> None:
    run = run_file(10)
    loop = masked_loop(run, [[4, 4, 4, 4], [0, 0, 0, 0], [4, 4, 4, 4]])
    first, empty, third = (loop.take_step(step / 10) for step in range(3))
    assert empty.tokens == 0 and float(empty.loss) == 0.0 and float(empty.grad_norm) == 0.0
    assert math.isfinite(float(third.loss)) and bool(loop.parameters.read().isfinite().all())
    assert {int(loop.inner.moment_tensors()[0])} == {3}, "it is counted"
    assert float(first.loss) != float(third.loss)


def test_batches_that_others_merged_are_skipped_by_their_targets() -> None:
    run, counts = run_file(10), [[16, 1, 3, 0], [2, 2, 0, 0], [1, 1, 1, 1]]
    loop = masked_loop(run, counts)
    loop.skip(24)
    assert loop.batches.position == 2 and num_targets(loop.batches.next_batch()) == 4


def test_a_step_that_is_given_up_changes_no_weights_and_leaves_no_gradients() -> None:
    loop, looks = loop_of(run_file(10)), iter([False, True])
    before = loop.parameters.read()
    with pytest.raises(StopTraining):
        loop.take_step(0.5, lambda: next(looks))
    assert torch.equal(loop.parameters.read(), before)
    assert all(parameter.grad is None for parameter in loop.model.parameters())


def test_what_is_lent_of_its_weights_is_taken_back_before_a_step() -> None:
    loop = loop_of(run_file(10))
    before = loop.parameters.read()
    fragment: Any = SimpleNamespace(tensors=(0, 1), pick=lambda tensors: [tensors[0], tensors[1]])
    size = sum(tensor.numel() for tensor in list(loop.parameters.named.values())[:2])
    lent = loop.parameters.lend(fragment, torch.zeros(size))
    loop.take_step(0.5)
    assert not torch.equal(loop.parameters.read()[:size], before[:size])
    assert torch.equal(lent.gradient(), -before[:size]) and loop.waited_s > 0


# ---------------------------------------------------------------- with a session


def test_loop_and_session_are_plain_diloco_to_the_bit() -> None:
    """AdamW within rounds, and torch's Nesterov SGD on what they bring."""
    run, reports = run_file(10), list[RoundReport]()
    loop = loop_of(run)
    session = session_of(run, loop, 10, reports)
    assert loop.train(session) == "total_tokens"

    (model, inner), data, losses = plain(run), batches_at(0), list[float]()
    theta = [parameter.detach().clone() for parameter in model.parameters()]
    outer = torch.optim.SGD(theta, run.merge.outer_learning_rate, momentum=0.5, nesterov=True)
    for step in range(10):
        losses.append(plain_step(run, model, inner, data.next_batch(), step / 10)[0])
        if step % 2 == 1:
            for kept, parameter in zip(theta, model.parameters(), strict=True):
                kept.grad = kept - parameter.detach()
            outer.step()
            with torch.no_grad():
                for kept, parameter in zip(theta, model.parameters(), strict=True):
                    parameter.copy_(kept)
    assert torch.equal(session.replica.state.theta, torch.cat([kept.reshape(-1) for kept in theta]))
    assert [report.loss for report in reports] == [(losses[n] + losses[n + 1]) / 2 for n in range(0, 10, 2)]
    assert [report.learning_rate for report in reports] == [
        learning_rate_at(inner_constants(run), (2 * n + 1) / 10) for n in range(5)
    ]
    assert (session.progress.round, session.replica.own_tokens) == (5, 640)


def test_a_rounds_gradient_norm_is_the_mean_of_those_that_are_finite() -> None:
    run, reports = run_file(6), list[RoundReport]()
    loop, told = loop_of(run), iter([1.0, 2.0, 3.0, math.inf, math.inf, math.nan])
    step = loop.inner.step

    def step_of_a_told_norm(progress: float, scale: float = 1.0) -> float:
        step(progress, scale)
        return next(told)

    loop.inner.step = step_of_a_told_norm  # type: ignore[method-assign]
    loop.train(session_of(run, loop, 6, reports))
    assert [report.grad_norm for report in reports] == [1.5, 3.0, None]


# ---------------------------------------------------------------- plain PyTorch


def plain(run: RunFile) -> tuple[GPT, torch.optim.AdamW]:
    model = build_model(run.model, 0)
    groups = [
        {"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": run.inner.weight_decay},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    return model, torch.optim.AdamW(groups, betas=(run.inner.beta1, run.inner.beta2), fused=True)


def plain_step(
    run: RunFile, model: GPT, optimizer: torch.optim.AdamW, batch: Tensor, progress: float, scale: float = 1.0
) -> tuple[float, float]:
    """Train one batch in microbatches of two sequences; returns the loss and the gradient's norm."""
    loss_sum = 0.0
    for part in torch.split(batch, 2):
        loss = model.loss(part) * 0.5
        loss.backward()  # type: ignore[no-untyped-call]
        loss_sum += float(loss.detach())
    norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), run.inner.gradient_clip))
    for group in optimizer.param_groups:
        group["lr"] = learning_rate_at(inner_constants(run), progress) * scale
    optimizer.step()
    optimizer.zero_grad()
    return loss_sum, norm


def same_weights(loop: ModelLoop, model: GPT) -> bool:
    return all(torch.equal(a, b) for a, b in zip(loop.model.parameters(), model.parameters(), strict=True))

"""Methods with a barrier: every round, or every step, all wait for the slowest and for the wire."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from swarmtrain.algorithm.outer import OuterState, outer_step, weighted_mean
from swarmtrain.simulate.learning.setting import Outcome, Recorder, Setting

__all__ = ["data_parallel", "diloco"]

_BYTES = 4  # of a weight, as synchronous rounds send it


def data_parallel(setting: Setting) -> Outcome:
    """One step on the mean gradient of all volunteers' batches, the gradients averaged at every step."""
    run, number = setting.run, setting.num_peers
    first, *others = (setting.learner(n) for n in range(number))
    sources = [first.trainer.batches, *(one.trainer.batches for one in others)]
    size_bytes = _BYTES * first.reached.numel()
    step_s, rng = max(setting.step_s), random.Random(f"wire {run.run.seed}")
    recorder, tokens, steps, now_s = Recorder(setting), 0, 0, 0.0
    while tokens < setting.total_tokens:
        for source in sources:
            (first.trainer.model.loss(source.next_batch()) / number).backward()  # type: ignore[no-untyped-call]
        first.trainer.inner.step(tokens / setting.total_tokens)
        steps, tokens = steps + 1, tokens + number * run.tokens_per_step
        now_s += step_s + setting.all_reduce_s(number, size_bytes, rng)
        recorder.see(tokens, now_s, lambda: first.reached)
    return Outcome(
        held_out_loss=setting.text.held_out_loss(first.reached),
        virtual_time_s=now_s,
        tokens=tokens,
        inner_steps=number * steps,
        sent_bytes=2 * steps * (number - 1) * size_bytes,
        stall_share=1.0 - steps * sum(setting.step_s) / (number * now_s),
        curve=tuple(recorder.points),
    )


def diloco(setting: Setting) -> Outcome:
    """Rounds of H_i inner steps (`merge.pacing`), then one outer step on the mean pseudo-gradient (DiLoCo, arXiv
    2311.08105). Who hangs at a round's end is passed over after `merge.silence_s`, and comes back when it can."""
    run = setting.run
    everyone = [setting.learner(number) for number in range(setting.num_peers)]
    steps = [setting.steps_of_round(number) for number in range(setting.num_peers)]
    theta = everyone[0].reached
    state, recorder = OuterState(theta, torch.zeros_like(theta)), Recorder(setting)
    size_bytes, now_s, tokens, round, sent_bytes = _BYTES * theta.numel(), 0.0, 0, 0, 0
    rng = random.Random(f"wire {run.run.seed}")
    num_steps, worked_s, present_s = 0, 0.0, 0.0
    away: set[int] = set()
    while tokens < setting.total_tokens:
        here = [n for n in range(setting.num_peers) if n not in away]
        ends_s = now_s + max(steps[n] * setting.step_s[n] for n in here)
        hanging = {n for n in here if setting.is_hanging(n, ends_s)}
        trained = [n for n in here if n not in hanging]
        a_round = sum(steps[n] for n in trained) * run.tokens_per_step
        gradients: list[Tensor] = []
        for number in trained:
            learner = everyone[number]
            learner.enter(state.theta)
            for step in range(steps[number]):
                learner.step((tokens + a_round * step / steps[number]) / setting.total_tokens)
            gradients.append(state.theta - learner.reached)
        state = outer_step(state, weighted_mean(gradients, [steps[n] for n in trained]), setting.constants(round))
        tokens, round, num_steps = tokens + a_round, round + 1, num_steps + sum(steps[n] for n in trained)
        began_s, now_s = now_s, ends_s + setting.all_reduce_s(len(trained), size_bytes, rng)
        now_s += run.merge.silence_s if hanging else 0.0
        sent_bytes += 2 * (len(trained) - 1) * size_bytes
        worked_s += sum(steps[n] * setting.step_s[n] for n in trained)
        present_s += len(trained) * (now_s - began_s)
        away = {n for n in away | hanging if setting.is_hanging(n, now_s)}
        recorder.see(tokens, now_s, lambda: state.theta)  # noqa: B023 - called at once
    return Outcome(
        held_out_loss=setting.text.held_out_loss(state.theta),
        virtual_time_s=now_s,
        tokens=tokens,
        inner_steps=num_steps,
        sent_bytes=sent_bytes,
        stall_share=1.0 - worked_s / present_s,
        curve=tuple(recorder.points),
    )

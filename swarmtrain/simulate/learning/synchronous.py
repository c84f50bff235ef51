"""Methods with a barrier: after every round or every step all wait for the slowest and for the wire."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from swarmtrain.algorithm.fragments import fragments_of, mean_by_fragment
from swarmtrain.algorithm.gossip import layout_of
from swarmtrain.algorithm.outer import OuterConstants, OuterState, kept_where, outer_step, weighted_mean
from swarmtrain.simulate.learning.learner import Learner
from swarmtrain.simulate.learning.setting import Recorder, RunOutcome, Setting

__all__ = ["data_parallel", "diloco", "diloco_round"]

_BYTES = 4  # of a weight, as synchronous rounds send it


def data_parallel(setting: Setting) -> RunOutcome:
    """Train data-parallel: average the gradients of all volunteers' batches at every step."""
    run, everyone = setting.run, range(setting.num_peers)
    learners = [setting.learner(number) for number in everyone]
    first, sources = learners[0], [one.loop.batches for one in learners]
    size_bytes, rng = _BYTES * first.reached.numel(), random.Random(_wire(setting))
    recorder, tokens, num_steps, sent_bytes, now_s, worked_s = Recorder(setting), 0, 0, 0, 0.0, 0.0
    while tokens < setting.total_tokens:
        trained, met_s = setting.meets(now_s, {number: setting.step_s[number] for number in everyone})
        for number in trained:
            loss = first.loop.model.loss(sources[number].next_batch()) / len(trained)
            loss.backward()  # type: ignore[no-untyped-call]
        first.loop.inner.step(tokens / setting.total_tokens)
        num_steps, tokens = num_steps + len(trained), tokens + len(trained) * run.tokens_per_step
        worked_s += sum(setting.takes_s(number, now_s, 1) for number in trained)
        now_s = met_s + setting.all_reduce_s(len(trained), size_bytes, rng)
        sent_bytes += 2 * (len(trained) - 1) * size_bytes
        recorder.see(tokens, now_s, lambda: first.reached)
    return RunOutcome(
        held_out_loss=setting.text.held_out_loss(first.reached),
        virtual_time_s=now_s,
        tokens=tokens,
        inner_steps=num_steps,
        sent_bytes=sent_bytes,
        stall_share=1.0 - worked_s / (setting.num_peers * now_s),
        curve=tuple(recorder.points),
    )


def diloco_round(
    state: OuterState,
    trained: Sequence[tuple[Learner, int]],
    num_peers: int,
    run_tokens: int,
    constants: OuterConstants,
) -> OuterState:
    """Return the state after the inner steps of each of `trained` and the outer step.

    `num_peers` were present when the round began, and the run had `run_tokens`. For the schedule each assumes that all
    others train as much as itself.
    """
    gradients, weights = list[Tensor](), [steps for _, steps in trained]
    for learner, steps in trained:
        round_tokens = num_peers * steps * learner.text.run.tokens_per_step
        gradients.append(state.theta - learner.train(state.theta, steps, run_tokens, round_tokens))
    parameters = trained[0][0].loop.parameters
    if parameters.groups is None:
        return outer_step(state, weighted_mean(gradients, weights), constants)
    fragments, num = fragments_of(layout_of(parameters.shapes), 1, parameters.groups), max(parameters.groups) + 1
    have = [range(num) if learner.trained is None else sorted(learner.trained) for learner, _ in trained]
    mean, untrained = mean_by_fragment(fragments, gradients, weights, have)
    return kept_where(outer_step(state, mean, constants), state, untrained)


def diloco(setting: Setting) -> RunOutcome:
    """Run rounds of H_i inner steps (`merge.pacing`), each with one outer step (DiLoCo, arXiv 2311.08105).

    A volunteer that hangs at a round's end is passed over after `merge.silence_s`, and comes back when it can.
    """
    run = setting.run
    everyone = [setting.learner(number) for number in range(setting.num_peers)]
    steps = [setting.steps_of_round(number) for number in range(setting.num_peers)]
    theta = everyone[0].reached
    state, recorder, rng = OuterState(theta, torch.zeros_like(theta)), Recorder(setting), random.Random(_wire(setting))
    size_bytes, now_s, tokens, round, sent_bytes = _BYTES * theta.numel(), 0.0, 0, 0, 0
    num_steps, worked_s, num_lost = 0, 0.0, 0
    num_groups = 1 + max(everyone[0].loop.parameters.groups or [0])
    while tokens < setting.total_tokens:
        all_of_them = [n for n in range(setting.num_peers) if not setting.is_away(n, now_s)]
        here = [n for n in all_of_them if not setting.is_hanging(n, now_s)] or all_of_them
        if not here:
            now_s = setting.speaks_again_s(now_s)
            continue
        trained, met_s = setting.meets(now_s, {n: steps[n] * setting.step_s[n] for n in here})
        num_lost += sum(min(steps[n], setting.steps_between(n, now_s, met_s)) for n in here if n not in trained)
        if not trained:
            now_s = met_s
            continue
        for number in trained if round else ():
            everyone[number].comes_late()
        for number in trained:
            everyone[number].train_only(setting.groups_of_round(number, round, num_groups))
        took_part = [(everyone[n], steps[n]) for n in trained]
        state = diloco_round(state, took_part, len(here), tokens, setting.constants(round))
        a_round = sum(steps[n] for n in trained)
        tokens, round, num_steps = tokens + a_round * run.tokens_per_step, round + 1, num_steps + a_round
        worked_s += sum(setting.takes_s(n, now_s, steps[n]) for n in trained)
        now_s = met_s + setting.all_reduce_s(len(trained), size_bytes, rng)
        sent_bytes += 2 * (len(trained) - 1) * size_bytes
        recorder.see(tokens, now_s, lambda: state.theta)  # noqa: B023 - called at once
    return RunOutcome(
        held_out_loss=setting.text.held_out_loss(state.theta),
        virtual_time_s=now_s,
        tokens=tokens,
        inner_steps=num_steps,
        sent_bytes=sent_bytes,
        stall_share=1.0 - worked_s / (setting.num_peers * now_s),
        tokens_lost=num_lost * run.tokens_per_step,
        curve=tuple(recorder.points),
    )


def _wire(setting: Setting) -> str:
    """Return the seed of the random numbers for jitter and losses."""
    return f"wire {setting.run.run.seed}"

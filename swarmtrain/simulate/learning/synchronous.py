"""Methods with a barrier: after every round or every step all wait for the slowest and for the wire."""

from __future__ import annotations

import heapq
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from swarmtrain.algorithm.common_step import NUM_MOMENTS
from swarmtrain.algorithm.fragments import fragments_of, mean_by_fragment
from swarmtrain.algorithm.gossip import layout_of
from swarmtrain.algorithm.outer import OuterConstants, OuterState, kept_where, outer_step, weighted_mean
from swarmtrain.algorithm.quantize import FedBackSum, encoded_size_bytes
from swarmtrain.peer.merging.common_steps import common_optimizer, common_step
from swarmtrain.protocol.rounds.batch_end import planned_sequences
from swarmtrain.simulate.learning.learner import Learner
from swarmtrain.simulate.learning.setting import Recorder, RunOutcome, Setting

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
            recorder.count(number, run.tokens_per_step)
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
        peer_tokens=recorder.peer_tokens,
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
    mean, untrained = _mean_of([learner for learner, _ in trained], gradients, weights)
    return kept_where(outer_step(state, mean, constants), state, untrained)


def _mean_of(
    learners: Sequence[Learner], gradients: Sequence[Tensor], weights: Sequence[int]
) -> tuple[Tensor, tuple[slice, ...]]:
    """Return the weighted mean (P,) of these learners' gradients, and the places that nobody has trained."""
    parameters = learners[0].loop.parameters
    if parameters.groups is None:
        return weighted_mean(gradients, weights), ()
    fragments, num = fragments_of(layout_of(parameters.shapes), 1, parameters.groups), max(parameters.groups) + 1
    have = [range(num) if learner.trained is None else sorted(learner.trained) for learner in learners]
    return mean_by_fragment(fragments, gradients, weights, have)


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
        for number in trained:
            recorder.count(number, steps[number] * run.tokens_per_step)
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
        peer_tokens=recorder.peer_tokens,
    )


@dataclass(frozen=True, kw_only=True)
class _Batch:
    """One large batch in virtual time: the inner steps of each volunteer that counts, and of those that do not."""

    steps: Mapping[int, int]
    lost: Mapping[int, int]
    met_s: float
    """Time at which the step is taken."""


def _batch_of(
    setting: Setting, here: Sequence[int], now_s: float, sequences: Mapping[int, int], target_tokens: int
) -> _Batch:
    """Let the volunteers that are `here` add up gradients from `now_s` on, until they have `target_tokens` together.

    Each knows at once what the others have. It then ends with the step that it is in, and is waited for until
    `merge.max_wait_s` after the batch was there; `sequences` has the size of each one's steps. What those have that
    crash or leave before is lost. One that hangs is waited for as long as it says something, and loses its part.
    """
    run, merge = setting.run, setting.run.merge
    context, batch = run.model.context_tokens, run.inner.batch_sequences
    step_s = {number: setting.step_s[number] * sequences[number] / batch for number in here}

    def ends(number: int, steps: int) -> float:
        return setting.done_s(number, now_s, steps * step_s[number])

    done, tokens, full_s = dict.fromkeys(here, 0), 0, now_s
    coming = [(ends(number, 1), number) for number in here]
    heapq.heapify(coming)
    while coming and tokens < target_tokens and full_s < now_s + merge.round_limit_s:
        full_s, number = heapq.heappop(coming)
        if setting.goes_within(number, now_s, (done[number] + 1) * step_s[number]):
            tokens -= done[number] * sequences[number] * context
            continue
        done[number] += 1
        tokens += sequences[number] * context
        heapq.heappush(coming, (ends(number, done[number] + 1), number))
    lost, met_s = dict[int, int](), full_s
    for number in here:
        if setting.goes_within(number, now_s, (done[number] + 1) * step_s[number]):
            lost[number] = done.pop(number)
            continue
        last_s = ends(number, done[number])
        if last_s < full_s:  # it is in a step
            done[number] += 1
            last_s = ends(number, done[number])
        silent = setting.is_hanging(number, full_s)
        if last_s > full_s + (merge.silence_s if silent else merge.max_wait_s):
            lost[number] = done.pop(number) - 1
            last_s = full_s + (merge.silence_s if silent else merge.max_wait_s)
        met_s = max(met_s, last_s)
    return _Batch(steps={number: steps for number, steps in done.items() if steps}, lost=lost, met_s=met_s)


def batch(setting: Setting) -> RunOutcome:
    """Add up gradients at common weights until all volunteers together have `merge.target_tokens`, then take one step
    of AdamW or LAMB (DeDLOC, arXiv 2106.10207)."""
    run, num_peers = setting.run, setting.num_peers
    everyone = [setting.learner(number) for number in range(num_peers)]
    parameters, full = everyone[0].loop.parameters, run.inner.batch_sequences
    optimizer = common_optimizer(run, parameters.shapes)
    speeds, context = setting.speeds, run.model.context_tokens
    theta = everyone[0].reached
    state, recorder = OuterState(theta, torch.zeros(NUM_MOMENTS * theta.numel())), Recorder(setting)
    format = run.merge.roster_format
    encoders = [None if format == "fp32" else FedBackSum(format) for _ in everyone]
    # Gradients as they are published go to those who average, and fp32 means come back.
    size_bytes = (encoded_size_bytes(format, [theta.numel()]) + _BYTES * theta.numel()) // 2
    rng = random.Random(_wire(setting))
    now_s, tokens, sent_bytes, num_sequences, worked_s, lost, taken = 0.0, 0, 0, 0, 0.0, 0, 0
    before, arrives_s = state, 0.0  # with delayed steps, volunteers go on from `before` until the new weights arrive
    num_groups = 1 + max(parameters.groups or [0])
    while tokens < setting.total_tokens:
        present = [number for number in range(num_peers) if not setting.is_away(number, now_s)]
        here = [number for number in present if not setting.is_hanging(number, now_s)] or present
        if not here:
            now_s = setting.speaks_again_s(now_s)
            continue
        target = run.batch_target.at(tokens)
        sequences = {
            number: planned_sequences(
                full * speed, full * (sum(speeds) - speed), full, target / context, max_wait_s=run.merge.max_wait_s
            )
            for number, speed in enumerate(speeds)
        }
        found = _batch_of(setting, here, now_s, sequences, target)
        lost += sum(steps * sequences[number] for number, steps in found.lost.items())
        if not found.steps:
            now_s = max(found.met_s, setting.speaks_again_s(found.met_s))
            continue
        learners, gradients, weights = [everyone[number] for number in found.steps], list[Tensor](), list[int]()
        for number, steps in found.steps.items():
            learner = everyone[number]
            learner.train_only(setting.groups_of_round(number, taken, num_groups))
            share = sequences[number] / full
            stale = min(steps, setting.steps_between(number, now_s, arrives_s, share)) if arrives_s > now_s else 0
            for theta, number_of_them in ((before.theta, stale), (state.theta, steps - stale)):
                learner.enter(theta)
                for _ in range(number_of_them):
                    learner.step(tokens / setting.total_tokens, sequences[number])
            gradient, counted = learner.loop.mean_gradient()
            weights.append(counted)
            recorder.count(number, counted)
            encoder = encoders[number]
            gradients.append(gradient if encoder is None else encoder.decoded(gradient, counted))
            worked_s += setting.takes_s(number, now_s, steps) * sequences[number] / full
        mean, untrained = _mean_of(learners, gradients, weights)
        after = optimizer.step(state, mean, common_step(run, taken, tokens))
        before, state = state, kept_where(after, state, untrained)
        tokens, taken = tokens + sum(weights), taken + 1
        num_sequences += sum(weights) // context
        # The mean of one batch is not begun before that of the last one is there.
        now_s = max(found.met_s, arrives_s)
        arrives_s = now_s + setting.all_reduce_s(len(learners), size_bytes, rng)
        now_s = now_s if run.merge.delay_steps else arrives_s
        sent_bytes += 2 * (len(learners) - 1) * size_bytes
        recorder.see(tokens, arrives_s, lambda: state.theta)  # noqa: B023 - called at once
    now_s = arrives_s
    return RunOutcome(
        held_out_loss=setting.text.held_out_loss(state.theta),
        virtual_time_s=now_s,
        tokens=tokens,
        inner_steps=num_sequences // full,
        sent_bytes=sent_bytes,
        stall_share=1.0 - worked_s / (num_peers * now_s),
        tokens_lost=lost * context,
        curve=tuple(recorder.points),
        peer_tokens=recorder.peer_tokens,
    )


def _wire(setting: Setting) -> str:
    """Return the seed of the random numbers for jitter and losses."""
    return f"wire {setting.run.run.seed}"

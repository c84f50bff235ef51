"""Methods in which only some volunteers meet in a round: random pairs, or a random sample of all."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from swarmtrain.algorithm.outer import OuterState
from swarmtrain.simulate.learning.setting import GROUP, Recorder, RunOutcome, Setting

_BYTES = 4  # of a weight


class _Pairs:
    """Weights and clocks of all volunteers, which meet in pairs."""

    def __init__(self, setting: Setting) -> None:
        self.setting, self.steps = setting, setting.run.merge.inner_steps
        self.everyone = [setting.learner(number) for number in range(setting.num_peers)]
        thetas = [one.reached for one in self.everyone]
        self.states = [OuterState(theta, torch.zeros_like(theta)) for theta in thetas]
        self.gradients = list(thetas)
        self.size_bytes = _BYTES * thetas[0].numel()
        self.rng = random.Random(f"pairs {setting.run.run.seed}")
        self.now_s = [0.0] * setting.num_peers
        self.tokens = self.inner_steps = self.sent_bytes = self.num_rounds = 0
        self.waited_s = 0.0

    def train(self) -> None:
        """Train one round of every volunteer."""
        setting, a_round = self.setting, self.steps * self.setting.run.tokens_per_step * self.setting.num_peers
        for number, learner in enumerate(self.everyone):
            theta = self.states[number].theta
            self.gradients[number] = theta - learner.train(theta, self.steps, self.tokens, a_round)
            work_s = self.steps * setting.step_s[number]
            self.now_s[number] = setting.done_s(number, self.now_s[number], work_s)
        self.tokens += a_round
        self.num_rounds += 1
        self.inner_steps += self.steps * setting.num_peers

    def meet(self) -> None:
        """Merge in pairs that are drawn anew; if the number is odd, one volunteer stays alone."""
        order = self.rng.sample(range(self.setting.num_peers), self.setting.num_peers)
        for pair in (order[place : place + 2] for place in range(0, len(order), 2)):
            self._wait(pair)
            constants = self.setting.constants(self.num_rounds)
            gradient = torch.stack([self.gradients[number] for number in pair]).mean(0)
            mean = torch.stack([self.states[number].theta for number in pair]).mean(0)
            for number in pair:
                theta, momentum = self.states[number].theta, self.states[number].momentum
                momentum = constants.momentum * momentum + constants.learning_rate * (gradient + theta - mean)
                self.states[number] = OuterState(theta - momentum, momentum)

    def _wait(self, pair: list[int]) -> None:
        if len(pair) < 2:
            return
        setting, sent_bytes = self.setting, 2 * self.size_bytes  # weights and pseudo-gradient
        takes_s = setting.rtt_s + sent_bytes / setting.bytes_per_s
        takes_s += setting.lost_s(self.rng) + setting.late_s(sent_bytes, self.rng)
        met_s = max(self.now_s[number] for number in pair) + takes_s
        for number in pair:
            self.waited_s += met_s - self.now_s[number]
            self.now_s[number] = met_s
            self.sent_bytes += sent_bytes

    def mean(self) -> Tensor:
        """Return the mean of all weights."""
        return torch.stack([state.theta for state in self.states]).mean(0)


def noloco(setting: Setting) -> RunOutcome:
    """Run rounds of H steps, after which random pairs merge (NoLoCo, arXiv 2506.10911, as in its authors' code).

    With means over the pair of its pseudo-gradients g and weights theta: m <- beta m + eps (mean g + theta - mean
    theta), theta <- theta - m. Only the two of a pair wait for each other.
    """
    pairs, recorder = _Pairs(setting), Recorder(setting)
    while pairs.tokens < setting.total_tokens:
        pairs.train()
        for number in range(setting.num_peers):
            recorder.count(number, pairs.steps * setting.run.tokens_per_step)
        pairs.meet()
        recorder.see(pairs.tokens, max(pairs.now_s), pairs.mean)
    return RunOutcome(
        held_out_loss=setting.text.held_out_loss(pairs.mean()),
        own_loss=setting.own_loss([state.theta for state in pairs.states]),
        virtual_time_s=max(pairs.now_s),
        tokens=pairs.tokens,
        inner_steps=pairs.inner_steps,
        sent_bytes=pairs.sent_bytes,
        stall_share=pairs.waited_s / sum(pairs.now_s),
        curve=tuple(recorder.points),
        peer_tokens=recorder.peer_tokens,
    )


def _sample(setting: Setting, most: int, silent: set[int], now_s: float, rng: random.Random) -> tuple[list[int], float]:
    """Draw `most` volunteers that answer, or all that do; return them and the time at which they have answered.

    `silent` holds those known not to answer, and is updated. If nobody answers, all are returned.
    """
    silent.intersection_update([number for number in silent if setting.is_hanging(number, now_s)])
    asked = [number for number in range(setting.num_peers) if number not in silent]
    sample = rng.sample(asked, min(most, len(asked)))
    while new := {number for number in sample if setting.is_hanging(number, now_s)}:
        silent |= new
        now_s += setting.run.network.call_limit_s
        sample = [number for number in sample if number not in silent]
        asked = [number for number in range(setting.num_peers) if number not in {*silent, *sample}]
        sample += rng.sample(asked, min(most - len(sample), len(asked)))
    return sample or list(range(setting.num_peers)), now_s


def modest(setting: Setting) -> RunOutcome:
    """Run rounds in which a random sample trains from the last sample's mean weights (MoDeST, arXiv 2302.13837).

    A sample has `GROUP` volunteers. One that hangs is replaced when it has not answered for `network.call_limit_s`, and
    is not asked again while it hangs. One that begins to hang in its round is waited for `merge.silence_s` at most.
    """
    run = setting.run
    everyone = [setting.learner(number) for number in range(setting.num_peers)]
    theta, rng, recorder = everyone[0].reached, random.Random(f"samples {run.run.seed}"), Recorder(setting)
    size_bytes, steps = _BYTES * theta.numel(), run.merge.inner_steps
    num_sampled = min(setting.num_peers, GROUP)
    a_round = steps * run.tokens_per_step * num_sampled
    now_s, tokens, num_steps, num_lost, sent_bytes, worked_s = 0.0, 0, 0, 0, 0, 0.0
    silent = set[int]()
    while tokens < setting.total_tokens:
        sample, now_s = _sample(setting, num_sampled, silent, now_s, rng)
        trained, met_s = setting.meets(now_s, {number: steps * setting.step_s[number] for number in sample})
        reached = [everyone[number].train(theta, steps, tokens, a_round) for number in trained]
        transfer_s = setting.rtt_s + num_sampled * size_bytes / setting.bytes_per_s  # all to one, and from one to all
        num_lost += sum(min(steps, setting.steps_between(n, now_s, met_s)) for n in sample if n not in trained)
        late_s = [setting.lost_s(rng) + setting.late_s(size_bytes, rng) for _ in range(2 * num_sampled)]
        worked_s += sum(setting.takes_s(number, now_s, steps) for number in trained)
        now_s = met_s + 2 * transfer_s + max(late_s)
        theta = torch.stack(reached).mean(0)
        for number in trained:
            recorder.count(number, steps * run.tokens_per_step)
        tokens, num_steps = tokens + steps * run.tokens_per_step * len(trained), num_steps + steps * len(trained)
        sent_bytes += 2 * len(trained) * size_bytes
        recorder.see(tokens, now_s, lambda: theta)  # noqa: B023 - called at once
    return RunOutcome(
        held_out_loss=setting.text.held_out_loss(theta),
        virtual_time_s=now_s,
        tokens=tokens,
        inner_steps=num_steps,
        sent_bytes=sent_bytes,
        stall_share=1.0 - worked_s / (setting.num_peers * now_s),
        tokens_lost=num_lost * run.tokens_per_step,
        curve=tuple(recorder.points),
        peer_tokens=recorder.peer_tokens,
    )

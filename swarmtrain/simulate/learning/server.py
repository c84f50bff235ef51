"""Methods with one peer as the server of the weights, with workers that wait for it or do not."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from swarmtrain.algorithm.outer import DelayedNesterov, OuterState
from swarmtrain.network.codec import PublicationCodec
from swarmtrain.network.tensor_groups import groups_of
from swarmtrain.peer.merging.server_exchange import lead
from swarmtrain.protocol.server import GradientUpload, GradientUploads, UploadVersions, too_old
from swarmtrain.simulate.clock import Clock
from swarmtrain.simulate.learning.setting import GROUP, Recorder, RunOutcome, Setting
from swarmtrain.simulate.learning.wire import Wire

_SERVER = "server"


class _Worker:
    """Worker of a server.

    A waiting worker, as in the paper, continues from the weights that its gradient has entered. A worker that does not
    wait continues from the newest weights it pulled late in its round, less each of its gradients that they lack.
    """

    def __init__(self, served: _Served, number: int) -> None:
        self.served, self.number, self.name = served, number, f"p{number}"
        self.learner = served.setting.learner(number)
        self.theta = self.learner.reached
        section = served.setting.run.merge
        sections = groups_of(self.learner.specs, section.theta_format, section.gradient_formats)
        self.gradients = PublicationCodec(sections).gradient
        self.round = 0
        self.uploads: GradientUploads[Tensor] = GradientUploads()
        self.is_fetched = False
        """True while one of the worker's uploads is being transferred: the server asks for one after the other."""
        self.base_arrivals = 0
        """Number of gradients in the weights that the worker's round began with."""
        self.on_the_way: dict[int, int] = {}
        """Tokens, by round, of the rounds whose gradients the server does not have yet."""
        self.steps, self.is_over = 0, False
        self.came: tuple[Tensor, int | None, int] | None = None
        self.waited_s = self.handed_in_s = 0.0
        self.is_here = True
        self.num_lives = 0
        """Number of times that the worker has left. Calls that it scheduled before it left are dropped."""
        self.began_s = math.inf
        self.began_at = 0
        """Number of steps that the server had taken when it gave this worker its weights."""

    def begin(self) -> None:
        """Begin a round."""
        served, setting = self.served, self.served.setting
        self.waited_s += served.clock.now - self.handed_in_s if self.round and served.waiting else 0.0
        self.began_tokens, self.began_s = served.tokens, served.clock.now
        self.steps = setting.steps_of_round(self.number)
        self.learner.enter(self.theta)
        lasts_s = self.steps * setting.step_s[self.number]
        if not served.waiting:
            self.call_at(self.done_s(lasts_s - 2 * served.pull_s(self.name)), self.pull)
        self.call_at(self.done_s(lasts_s), self.end)

    def call_at(self, when_s: float, call: Callable[..., None], *args: Any) -> None:
        """Schedule a call on the run's clock; it is dropped if the worker has gone by then."""
        self.served.clock.call_at(when_s, self._if_here, self.num_lives, call, *args)

    def _if_here(self, num_lives: int, call: Callable[..., None], *args: Any) -> None:
        if num_lives == self.num_lives:
            call(*args)

    def go(self) -> None:
        """Crash or leave: the round and uploads under way are lost."""
        served = self.served
        if self.is_over or served.tokens >= served.setting.total_tokens:
            return
        steps = min(self.steps, served.setting.steps_between(self.number, self.began_s, served.clock.now))
        tokens = served.setting.run.tokens_per_step
        # Tokens are counted when a round ends; of those whose gradient has not arrived nothing will come.
        served.uncount(self.number, sum(self.on_the_way.values()))
        served.tokens_lost += steps * tokens
        self.on_the_way.clear()
        self.gradients = replace(self.gradients)  # no checkpoint keeps what it is to add to the next gradient
        self.num_lives += 1
        self.is_here, self.began_s, self.came = False, math.inf, None
        self.uploads, self.is_fetched = GradientUploads(), False

    def come(self) -> None:
        """Arrive, perhaps again, and ask for the server's weights."""
        served = self.served
        if self.is_here or served.tokens >= served.setting.total_tokens:
            return
        self.is_here = True
        arrives_s = served.arrives_s(_SERVER, self.name, served.theta_bytes)
        self.call_at(arrives_s, self.begin_with, served.weights(), served.arrivals)

    def begin_with(self, theta: Tensor, arrivals: int) -> None:
        """Begin with these weights. The server keeps what the worker uploaded before."""
        self.learner.comes_late()
        self.theta, self.base_arrivals = theta, arrivals
        self.begin()

    def done_s(self, work_s: float) -> float:
        """Return the time at which the worker has done work of `work_s` seconds, including the time in which it
        hangs."""
        return self.served.setting.done_s(self.number, self.served.clock.now, max(0.0, work_s))

    def pull(self) -> None:
        """Pull the server's weights, and learn up to which round they contain this worker's gradients."""
        served = self.served
        came = served.weights(), served.versions.round(self.name), served.arrivals
        arrives_s = served.arrives_s(_SERVER, self.name, served.theta_bytes)
        self.call_at(arrives_s, setattr, self, "came", came)

    def end(self) -> None:
        """End the round: take its inner steps, upload the gradient, and continue."""
        served, setting = self.served, self.served.setting
        step_tokens, total = setting.run.tokens_per_step, setting.total_tokens
        everybodys = setting.steps_of_everybody(self.number)
        for step in range(self.steps):
            self.learner.step((self.began_tokens + step * everybodys * step_tokens) / total)
        served.count(self.number, self.steps)
        reached, tokens = self.learner.reached, self.steps * step_tokens
        self.uploads.add(GradientUpload(
            round=self.round, tokens=tokens, inner_steps=self.steps, arrivals=self.base_arrivals,
            own_tokens=0, gradient=self.theta - reached,
        ))  # fmt: skip
        self.on_the_way[self.round] = tokens
        self.handed_in_s, self.round = served.clock.now, self.round + 1
        self.hand_in()
        if served.waiting:
            return
        self.theta = reached
        if self.came is not None:
            theta, entered, self.base_arrivals = self.came
            self.came = None
            self.uploads.entered(entered)
            self.theta = lead(theta, [piece.gradient for piece in self.uploads.pieces])
        self.go_on()

    def hand_in(self) -> None:
        """Upload what the server does not have yet, unless an upload is under way."""
        served = self.served
        piece = None if self.is_fetched else self.uploads.after(served.versions.round(self.name))
        if piece is not None:
            self.is_fetched = True
            arrives_s = served.arrives_s(self.name, _SERVER, served.gradient_bytes)
            self.call_at(arrives_s, served.take, self, piece)

    def go_on(self) -> None:
        """Begin another round unless the run has ended."""
        if self.served.tokens < self.served.setting.total_tokens:
            self.begin()
        else:
            self.is_over = True
            self.served.finished_s = max(self.served.finished_s, self.served.clock.now)


class _FedBuff:
    """Server that takes a step with the mean of a full buffer of updates (FedBuff, arXiv 2106.06639).

    An update is weighted by 1 / sqrt(1 + steps of the server since the update's weights).
    """

    def __init__(self, state: OuterState, learning_rate: float, size: int) -> None:
        self.state, self._learning_rate, self._size = state, learning_rate, size
        self.num_steps = 0
        self._buffer: list[Tensor] = []

    def arrive(self, gradient: Tensor, began_at: int) -> None:
        """Apply an update that was computed from the weights after `began_at` of the server's steps."""
        self._buffer.append(gradient / (1 + self.num_steps - began_at) ** 0.5)
        if len(self._buffer) == self._size:
            mean = torch.stack(self._buffer).mean(0)
            self.state = OuterState(self.state.theta - self._learning_rate * mean, self.state.momentum)
            self.num_steps += 1
            self._buffer.clear()


class _Served:
    """Server, its workers and the clock.

    `delay` is N of delayed Nesterov (`DelayedNesterov`), 0: as a real server computes it. With `buffered` the server is
    FedBuff's.
    """

    def __init__(self, setting: Setting, *, waiting: bool, delay: int = 0, buffered: bool = False) -> None:
        self.setting, self.waiting, self.clock = setting, waiting, Clock()
        self.tokens = self.inner_steps = self.refreshes = self.arrivals = 0
        self.tokens_lost, self.finished_s = 0, 0.0
        self.workers = [_Worker(self, number) for number in range(setting.num_peers)]
        theta, section = self.workers[0].theta, setting.run.merge
        specs = self.workers[0].learner.specs
        self.codec = PublicationCodec(groups_of(specs, section.theta_format, section.gradient_formats))
        self._format, sizes = next(iter(self.codec.sizes().items()))
        state = OuterState(theta, torch.zeros_like(theta))
        self._delay = delay or section.buffer_arrivals
        self.outer = DelayedNesterov(state, setting.constants(0), self.num_arrivals, section.momentum_share)
        size = min(self.num_arrivals, GROUP)
        self.fedbuff = _FedBuff(state, section.outer_learning_rate, size) if buffered else None
        self.versions = UploadVersions()
        self.theta_bytes, self.gradient_bytes = sizes.weights, sizes.gradient
        self.wire = Wire(setting)
        self._recorder, self._rng = Recorder(setting), random.Random(f"wire {setting.run.run.seed}")

    def weights(self) -> Tensor:
        """Return the weights as they travel, encoded and decoded."""
        return self.codec.weights.decode(self.codec.weights.encode(self.theta))

    @property
    def theta(self) -> Tensor:
        """Weights of the server."""
        return (self.fedbuff or self.outer).state.theta

    @property
    def num_arrivals(self) -> int:
        """N of delayed Nesterov: as configured, or the number of workers."""
        return self._delay or max(1, sum(worker.is_here for worker in self.workers))

    def take(self, worker: _Worker, piece: GradientUpload[Tensor]) -> None:
        """Apply a worker's upload that has arrived."""
        encoded = worker.gradients.encode_sum(piece.gradient, self._format, piece.round)
        gradient = worker.gradients.of[self._format].decode(encoded)
        self.versions.enter(worker.name, piece.round)
        worker.is_fetched = False
        worker.on_the_way = {round: tokens for round, tokens in worker.on_the_way.items() if round > piece.round}
        staleness = self.setting.run.merge.max_staleness_rounds
        if self.fedbuff is not None:
            self.fedbuff.arrive(gradient, worker.began_at)
        elif not self.waiting and too_old(piece.arrivals, self.arrivals, self.num_arrivals, staleness):
            self.tokens_lost += piece.tokens
        else:
            self.arrivals += 1
            self.outer.num_arrivals = self.num_arrivals
            self.outer.arrive(gradient)
            if not self.outer.buffer.arrivals:
                self.refreshes += 1
                self.outer.constants = self.setting.constants(self.refreshes)
        self._recorder.see(self.tokens, self.clock.now, lambda: self.theta)
        worker.hand_in()
        if self.waiting:
            worker.uploads.entered(piece.round)
            began_at = self.fedbuff.num_steps if self.fedbuff is not None else 0
            arrives_s = self.arrives_s(_SERVER, worker.name, self.theta_bytes)
            self.clock.call_at(arrives_s, self.answer, worker, self.weights(), began_at)

    def answer(self, worker: _Worker, theta: Tensor, began_at: int) -> None:
        """Give a waiting worker the weights that the server had after `began_at` steps."""
        worker.theta, worker.began_at = theta, began_at
        worker.go_on()

    def arrives_s(self, sender: str, receiver: str, size_bytes: int) -> float:
        """Return the time at which `size_bytes` that are sent now arrive."""
        return self.wire.arrives_at_last_s(self.clock.now, sender, receiver, size_bytes, self._rng)

    def pull_s(self, name: str) -> float:
        """Return the seconds that a worker's pull of the weights takes."""
        return self.setting.rtt_s + self.theta_bytes / min(
            self.setting.link_of(_SERVER)[0], self.setting.link_of(name)[1]
        )

    def count(self, number: int, steps: int) -> None:
        """Count the inner steps of a worker's round."""
        tokens = steps * self.setting.run.tokens_per_step
        self.tokens += tokens
        self.inner_steps += steps
        self._recorder.count(number, tokens)

    def uncount(self, number: int, tokens: int) -> None:
        """Take back tokens of a worker that were counted, because their upload never arrived."""
        self.tokens -= tokens
        self.inner_steps -= tokens // self.setting.run.tokens_per_step
        self._recorder.count(number, -tokens)
        self.tokens_lost += tokens

    @property
    def is_over(self) -> bool:
        """True if every worker that is present has ended the run."""
        stuck, now_s = self.setting.is_stuck, self.clock.now
        left = [worker for worker in self.workers if worker.is_here and not worker.is_over]
        return self.tokens >= self.setting.total_tokens and all(stuck(worker.number, now_s) for worker in left)

    def run(self) -> RunOutcome:
        """Run to the end of the run."""
        setting = self.setting
        for worker in self.workers:
            worker.call_at(0.0, worker.begin)
        for each in setting.away:
            worker = self.workers[each.peer]
            self.clock.call_at(each.at_s, worker.go)
            self.clock.call_at(each.at_s + each.for_s, worker.come)
        while self.clock.step():
            if (setting.away or setting.hangs) and self.is_over and not any(one.on_the_way for one in self.workers):
                break
        return RunOutcome(
            held_out_loss=self.setting.text.held_out_loss(self.theta),
            virtual_time_s=self.finished_s,
            tokens=self.tokens,
            inner_steps=self.inner_steps,
            sent_bytes=self.wire.sent_bytes,
            tokens_lost=self.tokens_lost,
            stall_share=sum(worker.waited_s for worker in self.workers) / (len(self.workers) * self.finished_s),
            curve=tuple(self._recorder.points),
            peer_tokens=self._recorder.peer_tokens,
        )


def server(setting: Setting) -> RunOutcome:
    """Run delayed Nesterov on one peer's weights. Workers pull them late in their rounds and wait for nothing."""
    return _Served(setting, waiting=False).run()


def server_waiting(setting: Setting) -> RunOutcome:
    """Run delayed Nesterov as published (Asynchronous Local-SGD, arXiv 2401.09135).

    A worker waits for the weights that have its gradient.
    """
    return _Served(setting, waiting=True).run()


def async_nesterov(setting: Setting) -> RunOutcome:
    """Run the naive variant of the same paper: each arriving gradient is a Nesterov step of its own."""
    return _Served(setting, waiting=True, delay=1).run()


def fedbuff(setting: Setting) -> RunOutcome:
    """Run a server that averages updates in a buffer of `GROUP` (FedBuff, arXiv 2106.06639).

    Workers continue from whatever weights the server has.
    """
    return _Served(setting, waiting=True, buffered=True).run()

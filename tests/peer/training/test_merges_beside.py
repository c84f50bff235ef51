"""Merges computed beside training, for parameters on a device (here the processor): no threads, the worker computes
when a test says, or when the trainer waits for it.

Against a plain replay in the order in which a session called its exchange: `w += theta_new - reached`.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from codes import raises_code
from test_session import GOSSIP, STEP, Fragments, Lived
from torch import Tensor

from swarmtrain.algorithm.outer import OuterState
from swarmtrain.errors import RunTimeError
from swarmtrain.peer.devices.device_parameters import DeviceParameters
from swarmtrain.peer.lifecycle.stop import StopTraining
from swarmtrain.peer.merging.gossip_exchange import GossipExchange
from swarmtrain.peer.merging.roster_exchange import RosterExchange
from swarmtrain.peer.merging.server_exchange import ServerExchange
from swarmtrain.peer.merging.updates import Gathered, Replaced, Served
from swarmtrain.peer.training.model_training import merge_thread
from swarmtrain.peer.training.parameters import HostParameters
from swarmtrain.peer.training.session import MergeOutcome
from swarmtrain.protocol.tokens.progress import Progress
from swarmtrain.run import RunFile


class LateMerge(Future[MergeOutcome]):
    """Merge that is computed by the thread that waits for it, if it was not before."""

    def __init__(self, worker: LateWorker, work: Callable[[], MergeOutcome], left: int) -> None:
        super().__init__()
        self.worker, self.work, self.left = worker, work, left

    def compute(self) -> None:
        try:
            self.set_result(self.work())
        except BaseException as error:
            self.set_exception(error)

    def result(self, timeout: float | None = None) -> MergeOutcome:
        if not self.done():
            self.worker.num_waited += 1
            self.compute()
        return super().result()


@dataclass
class LateWorker:
    """Worker that computes a merge once the trainer has taken `delay()` steps more, or waits."""

    delay: Callable[[], int]
    num_waited: int = 0
    merges: list[LateMerge] = field(default_factory=list)

    def __call__(self, work: Callable[[], MergeOutcome]) -> LateMerge:
        self.merges.append(merge := LateMerge(self, work, self.delay()))
        if not merge.left:
            merge.compute()
        return merge

    def step_taken(self) -> None:
        """Note that a step is done; the merges that it began count from the next one."""
        for merge in self.merges:
            if not merge.left and not merge.done():
                merge.compute()
            merge.left -= 1


class Beside(Lived):
    """Session on a device whose merges are computed by a `LateWorker`."""

    def step(self, loss: float = 2.0) -> None:
        super().step(loss)
        assert isinstance(self.worker, LateWorker)
        self.worker.step_taken()


def run_of(steps: int, **merge: object) -> RunFile:
    table = GOSSIP.model_dump(mode="json", exclude_unset=True)
    table["run"]["total_tokens"] = steps * STEP
    return RunFile.model_validate({**table, "merge": {**table["merge"], **merge}})


def beside(
    exchange: Fragments, delay: int | Callable[[], int], steps: int = 8, source: type[DeviceParameters] | None = None
) -> tuple[Beside, LateWorker]:
    worker = LateWorker(delay if callable(delay) else lambda: delay)
    one = Beside(exchange, source=source or DeviceParameters, run=run_of(steps), worker=worker)
    return one, worker


class Replay:
    """Two fragments trained, published and merged in the order of `calls`, in plain words."""

    def __init__(self, one: Lived) -> None:
        self.fragments = [fragment.tensors for fragment in one.session.replica.fragments]
        self.w = {name: tensor.clone() for name, tensor in fresh_tensors().items()}
        self.theta = {name: tensor.clone() for name, tensor in self.w.items()}
        section = one.run.merge
        self.optimizers = [
            torch.optim.SGD(
                [self.theta["abcd"[number]] for number in numbers],
                section.outer_learning_rate,
                momentum=section.outer_momentum,
                nesterov=True,
            )
            for numbers in self.fragments
        ]
        self.tokens, self.reached, self.published = 0, dict[str, Tensor](), list[list[Tensor]]()
        self.merged_tokens = [0] * len(self.fragments)
        self.published_tokens: list[list[int]] = []
        self.is_behind = False
        self.num_publications = 0
        for call in one.exchange.calls:
            what, _, number = call.partition(" ")
            {"step": self.step, "publish": self.publish, "merged": self.merge}.get(what, lambda n: None)(number)

    def step(self, number: str) -> None:
        for tensor in self.w.values():
            tensor += 0.125 * int(number)
        self.tokens += STEP
        self.is_behind = True

    def publish(self, part: str) -> None:
        self.reached = {name: tensor.clone() for name, tensor in self.w.items()}
        self.published.append([self.of(numbers, self.theta) - self.of(numbers, self.w) for numbers in self.fragments])
        self.published_tokens.append([self.tokens - merged for merged in self.merged_tokens])
        self.is_behind, self.tokens_then = False, self.tokens

    def merge(self, fragment: str) -> None:
        for name in ("abcd"[number] for number in self.fragments[int(fragment)]):
            self.theta[name].grad = self.theta[name] - self.reached[name]
        self.optimizers[int(fragment)].step()
        for name in ("abcd"[number] for number in self.fragments[int(fragment)]):
            if self.is_behind:
                self.w[name] += self.theta[name] - self.reached[name]
            else:
                self.w[name].copy_(self.theta[name])
        self.merged_tokens[int(fragment)] = self.tokens_then

    def of(self, numbers: Sequence[int], tensors: dict[str, Tensor]) -> Tensor:
        return torch.cat([tensors["abcd"[number]].reshape(-1) for number in numbers])


def fresh_tensors() -> dict[str, Tensor]:
    return {name: torch.arange(4.0).reshape(2, 2) + number for number, name in enumerate("abcd")}


def is_as_replayed(one: Lived) -> Replay:
    """Check weights, states, and every publication's gradients and tokens against the replay of its calls."""
    plain = Replay(one)
    assert all(torch.equal(one.tensors[name], plain.w[name]) for name in "abcd")
    for number, tensors in enumerate(plain.fragments):
        assert torch.equal(one.session.replica.state_of(number).theta, plain.of(tensors, plain.theta))
    for made, gradients, tokens in zip(one.exchange.published, plain.published, plain.published_tokens, strict=True):
        assert all(torch.equal(made.gradient_of(number), gradient) for number, gradient in enumerate(gradients))
        assert [of.tokens for of in made.fragment_rounds] == tokens
    return plain


def told(one: Lived) -> list[tuple[float, ...]]:
    return [
        (each.loss, each.learning_rate, each.seconds, each.merge_s, each.stall_s, each.contribution.tokens)
        for each in one.reports
    ]


# ---------------------------------------------------------------- with the trainer's own merges


@pytest.mark.parametrize("inner_steps", [4, 1, 3])
def test_merges_that_are_computed_at_once_are_those_without_a_worker_to_the_bit(inner_steps: int) -> None:
    one, worker = beside(Fragments(inner_steps), 0, 24)
    plain = Lived(Fragments(inner_steps), source=DeviceParameters, run=run_of(24))
    assert one.train() == plain.train() == "total_tokens"
    assert one.exchange.calls == plain.exchange.calls and told(one) == told(plain)
    assert all(torch.equal(one.tensors[name], plain.tensors[name]) for name in "abcd")
    states = [each.session.replica.state for each in (one, plain)]
    assert torch.equal(states[0].theta, states[1].theta) and torch.equal(states[0].momentum, states[1].momentum)
    assert one.session.steps_per_s == plain.session.steps_per_s and not worker.num_waited


# ---------------------------------------------------------------- later


def test_the_trainer_takes_the_next_steps_while_a_merge_is_computed() -> None:
    one, worker = beside(Fragments(8), 2, 16)
    assert one.train() == "total_tokens"
    assert one.exchange.calls[:32] == [
        *("hold", "start 0", "step 1", "step 2", "publish 1", "step 3", "step 4", "publish 2"),
        *("step 5", "step 6", "collect 0", "merged 0"),
        *("step 7", "publish 3", "step 8", "publish 4"),  # part 3 was due at step 6
        *("step 9", "step 10", "collect 1", "merged 1", "settled 1", "report"),
        *("start 1", "publish 1", "step 11", "step 12", "publish 2"),  # it begins with two steps, and part 1 is due
        *("step 13", "step 14", "collect 0", "merged 0", "step 15"),
    ]
    plain = is_as_replayed(one)
    assert one.exchange.told == [*range(1, 11), *range(3, 9)], "beyond the end, until the next round has those steps"
    assert plain.tokens == 16 * STEP == one.session.replica.own_tokens
    assert worker.num_waited == 1, "for the last merge of all: a step more would be for nothing"
    assert [each.contribution.inner_steps for each in one.reports] == [8, 8], "two of the second were there already"


@pytest.mark.parametrize("delay", [1, 2, 3, 5, 100])
def test_weights_are_those_of_the_plain_rule_however_late_merges_come(delay: int) -> None:
    one, worker = beside(Fragments(8, num_parts=8), delay, 64)
    assert one.train() == "total_tokens"
    is_as_replayed(one)
    assert one.session.replica.own_tokens == one.session.progress.run_tokens == 64 * STEP == one.num_steps * STEP
    assert [each.contribution.inner_steps for each in one.reports] == [8] * 8
    assert (worker.num_waited > 1) == (delay > 3), "a merge is waited for at the next one"


@pytest.mark.parametrize("seed", range(4))
def test_every_token_is_published_and_merged_once_whatever_the_delays(seed: int) -> None:
    """By the replay: each fragment's publications count from its last merge, and the weights lack nothing."""
    rng = random.Random(seed)
    one, _ = beside(Plans(8, num_parts=8, rng=rng), lambda: rng.choice([0, 0, 1, 2, 3, 7]), 400)
    assert one.train() == "total_tokens"
    plain = is_as_replayed(one)
    assert one.num_steps * STEP == plain.tokens == one.session.replica.own_tokens
    assert plain.merged_tokens[1] == plain.tokens and len(one.reports) > 40
    assert sum(each.contribution.tokens for each in one.reports) == plain.tokens
    assert [each.own_tokens for each in one.exchange.published] == sorted(
        each.own_tokens for each in one.exchange.published
    )


@dataclass
class Plans(Fragments):
    """Exchange whose rounds vary in length."""

    rng: random.Random = field(default_factory=random.Random)

    def _call(self, what: str, takes_s: float = 0.0) -> None:
        super()._call(what, takes_s)
        if what.startswith("start"):
            self.inner_steps = self.rng.choice([1, 2, 5, 8, 11])


def test_steps_that_fill_the_next_round_end_it_at_once() -> None:
    one, _ = beside(Shorter(8, num_parts=8), 3, 24)
    assert one.train() == "total_tokens"
    at = one.exchange.calls.index("start 1")
    assert one.exchange.calls[at : at + 2] == ["start 1", "publish 8"]
    assert [each.contribution.inner_steps for each in one.reports][:2] == [8, 3]
    is_as_replayed(one)


class Shorter(Fragments):
    """Exchange whose rounds after the first have two steps."""

    def _call(self, what: str, takes_s: float = 0.0) -> None:
        super()._call(what, takes_s)
        self.inner_steps = 2 if what == "start 1" else self.inner_steps


def test_no_round_becomes_longer_than_others_accept() -> None:
    """A merge that takes long, because this peer takes others' weights, is waited for before the next one is due."""
    one, worker = beside(Fragments(8), 1000, 80)
    assert one.train() == "total_tokens"
    assert [each.contribution.inner_steps for each in one.reports] == [8] * 10 and worker.num_waited > 10
    assert max(of.tokens for each in one.exchange.published for of in each.fragment_rounds) <= 8 * STEP
    is_as_replayed(one)


def test_the_schedule_goes_on_by_the_plan_that_ended_and_a_shard_is_told_with_its_round() -> None:
    one, _ = beside(Fragments(4, shard=3), 1, 16)
    shares, shards = list[float](), list[int | None]()
    while (ahead := one.session.next_step()) is not None:
        shares.append(ahead.progress)
        shards.append(ahead.shard)
        one.step()
    assert shares == [step / 16 for step in range(16)]
    assert shards == [3, None, None, None, None, 3, None, None, None, 3, None, None, None, 3, None, None]


# ---------------------------------------------------------------- time


def test_the_trainer_stalls_only_while_it_is_there() -> None:
    """A step takes a second, a publication 0.25, a collect 0.5, of which the trainer sees nothing, and entering 1.0."""
    one, _ = beside(Fragments(8), 2, 24)
    one.train(10)
    one.session.next_step()
    (report,) = one.reports
    assert report.merge_s == 0.25 + 2 * 1.0 + 0.5 + 1.0, "until the weights are there"
    assert report.stall_s == 4 * 0.25 + 2 * 1.0 + 10 * 0.0625
    assert report.seconds == 8.0 + 0.5 + 4 * 0.25 + 2 * 1.0, "with the first collect, in its steps"
    assert one.session.steps_per_s == 8 / (8.0 + 0.5)
    one.train()
    assert sum(each.seconds for each in one.reports) == pytest.approx(one.exchange.clock.now_s - 5.0 - 3 * 100.0)
    assert one.reports[1].seconds == report.seconds + 0.5, "and with the last collect of the round before"


# ---------------------------------------------------------------- stops and errors


@pytest.mark.parametrize("asks", ["a flag", "the loop"])
def test_who_is_stopped_while_a_merge_is_computed_has_it_and_loses_the_steps_since(asks: str) -> None:
    one, _ = beside(Fragments(4), 2, 16)
    one.train(5)
    assert one.exchange.calls[-2:] == ["publish 4", "step 5"]
    if asks == "a flag":
        one.stops = True
    else:
        assert one.session.next_step() is not None
        one.session.interrupt()
    assert one.session.next_step() is None and one.session.reason == "interrupted"
    assert one.exchange.calls[-4:] == ["collect 1", "merged 1", "settled 1", "report"] and len(one.reports) == 1
    assert one.session.progress.round == 1 and one.session.replica.own_tokens == 4 * STEP
    one.stops = False
    states = [state.theta for state in one.session.replica.states]
    assert one.session.next_step() is not None
    fragments = one.session.replica.fragments
    assert all(
        torch.equal(fragment.of(one.parameters.read()), theta)
        for fragment, theta in zip(fragments, states, strict=True)
    )
    assert one.train() == "total_tokens" and one.session.replica.own_tokens == 16 * STEP


def test_who_is_stopped_while_a_fragment_is_merged_within_a_round_has_it() -> None:
    one, _ = beside(Fragments(8), 3, 16)
    one.train(5)
    one.stops = True
    assert one.session.next_step() is None
    assert one.exchange.calls[-3:] == ["step 5", "collect 0", "merged 0"] and not one.reports
    assert one.session.progress.round == 0 and one.session.replica.own_tokens == 0
    assert not one.session.replica.is_entered


@pytest.mark.parametrize("fragment", [0, 1])
def test_an_error_of_the_worker_is_raised_by_the_trainers_next_call(fragment: int) -> None:
    one, _ = beside(
        Failing(4, fails_at=f"collect {fragment}", error=RunTimeError("gone", code="state-not-delivered")), 1, 16
    )
    with raises_code("state-not-delivered", RunTimeError):
        one.train()
    assert one.exchange.calls[-1] == f"collect {fragment}"
    assert one.num_steps == 2 * fragment + 3, "a step after the publication"


@pytest.mark.parametrize("fragment", [0, 1])
def test_a_worker_that_is_asked_to_end_ends_training(fragment: int) -> None:
    one, _ = beside(Failing(4, fails_at=f"collect {fragment}", error=StopTraining()), 1, 16)
    assert one.train() == "interrupted" and not one.reports
    assert not one.session.is_in_round and not one.session.replica.is_entered


@dataclass
class Failing(Fragments):
    fails_at: str = ""
    error: Exception | None = None

    def _call(self, what: str, takes_s: float = 0.0) -> None:
        super()._call(what, takes_s)
        if what == self.fails_at and self.error is not None:
            raise self.error


def test_weights_of_others_replace_the_steps_taken_meanwhile() -> None:
    one, _ = beside(Fragments(4), 2, 16)
    theta = torch.arange(16.0) + 100.0
    progress = Progress(round=7, run_tokens=5 * STEP, peer_tokens={"me": 1})
    state = OuterState(theta, torch.ones(16))
    one.exchange.replaced = Replaced(state=state, progress=progress, from_peer="x", reason="behind")
    one.train(6)
    assert not torch.equal(one.parameters.read(), theta)
    assert one.session.next_step() is not None
    assert one.exchange.calls[-5:] == ["step 6", "collect 1", "settled 7", "hold", "start 7"] and not one.reports
    assert torch.equal(one.parameters.read(), theta) and one.loop.told == ["replaced"]
    assert one.session.replica.own_tokens == 4 * STEP, "the steps since are counted nowhere"
    one.exchange.replaced = None
    one.train(4)
    assert one.exchange.published[-1].tokens == 4 * STEP


def test_steps_that_the_run_did_not_need_are_counted_nowhere() -> None:
    """Others have trained more than could be known."""
    one, _ = beside(Others(4), 2, 16)
    assert one.train() == "total_tokens" and one.num_steps == 6
    assert one.session.replica.own_tokens == 4 * STEP and one.session.progress.run_tokens == 16 * STEP
    state, progress = one.session.replica.state.frozen(), Progress(round=9, run_tokens=12 * STEP)
    one.session.adopt(Replaced(state=state, progress=progress, from_peer="x", reason="it was more after all"))
    one.train(4)
    assert one.exchange.published[-1].tokens == 4 * STEP


class Others(Fragments):
    """Exchange with peers that have trained as much as the run lacks."""

    def collect(self, fragment: int = 0) -> Any:  # type: ignore[override]
        found = super().collect(fragment)
        assert isinstance(found, Gathered)
        return dataclasses.replace(found, run_tokens=16 * STEP)


# ---------------------------------------------------------------- what a checkpoint keeps


def test_a_checkpoint_draws_again_what_the_steps_since_have_drawn() -> None:
    one, _ = beside(Fragments(4), 2, 16)
    kept = list[int]()
    one.session.on_new_state = lambda session: kept.append(session.local_checkpoint(None).batches)
    while one.session.next_step() is not None:
        one.loop.position = one.num_steps + 1
        one.step()
    assert kept == [4, 8, 12, 16], "those of the rounds that are in the state"


# ---------------------------------------------------------------- loops that end early


def test_a_round_that_ends_early_while_the_former_one_is_merged_has_the_steps_since() -> None:
    one, _ = beside(Fragments(4), 100, 16)
    one.train(5)
    assert one.session.next_step() is not None
    one.session.end_round()
    called = ("step 5", "collect 1", "merged 1", "settled 1", "report", "start 1", "publish 1", "publish 4")
    assert one.exchange.calls[-8:] == list(called)
    assert one.session.next_step() is not None
    one.session.end_round()
    assert one.session.next_step() is None and one.session.reason == "interrupted"
    assert [each.contribution.tokens for each in one.reports] == [4 * STEP, STEP]


# ---------------------------------------------------------------- a server


@dataclass
class Server(Fragments):
    """Exchange with a server whose weights come every second time."""

    num_parts: int = 1
    num_fragments: int = 1

    def collect(self, fragment: int = 0) -> Served:  # type: ignore[override]
        self._call(f"collect {fragment}", 0.5)
        own = self.published[-1]
        assert own.reached is not None and not own.lent
        self.run_tokens = own.own_tokens
        theta = own.reached if len(self.published) % 2 else own.reached * 0.5 + 1.0
        return Served(theta=theta, merged=(), run_tokens=self.run_tokens, peer_tokens={"me": self.run_tokens})


@pytest.mark.parametrize("delay", [0, 2])
def test_with_a_server_the_worker_waits_for_the_copy_and_publishes_it(delay: int) -> None:
    run = RunFile.model_validate(
        {
            "run": {"total_tokens": 20 * STEP},
            "model": {"context_tokens": 16, "num_layers": 1, "width": 16, "num_heads": 2},
            "inner": {"batch_sequences": 4},
            "merge": {"method": "server", "inner_steps": 4},
        }
    )
    one = Beside(Server(4), source=DeviceParameters, run=run, worker=LateWorker(lambda: delay))
    assert one.train() == "total_tokens"
    w = torch.cat([tensor.reshape(-1) for tensor in fresh_tensors().values()])
    theta, change, num_steps = w.clone(), torch.zeros(16), 0
    assert [each.tokens for each in one.exchange.published] == [4 * STEP] * 5
    for number, own in enumerate(one.exchange.published):
        while num_steps < 4 * (number + 1):
            num_steps += 1
            w += 0.125 * num_steps
            if num_steps == 4 * number + delay and number:
                w += change
        assert own.reached is not None and torch.equal(own.reached, w)
        assert torch.equal(own.gradient, theta - w)
        theta = own.reached if number % 2 == 0 else own.reached * 0.5 + 1.0
        change = theta - w
        if not delay:
            w = theta.clone()
    assert torch.equal(one.session.replica.state.theta, theta)
    is_asked = [call for call in one.exchange.calls if call.split()[0] in ("step", "publish", "collect")]
    assert is_asked[4 : 6 + delay] == [
        *(f"step {number}" for number in range(5, 5 + delay)),
        *("publish 1", "collect 0"),
    ]


def test_parameters_whose_loans_end_with_a_step_are_not_merged_beside_it() -> None:
    """Their steps would be lost without a word."""
    one = Beside(Fragments(4), run=run_of(16), worker=LateWorker(lambda: 1))
    with pytest.raises(AssertionError, match="would be lost"):
        one.train()


@pytest.mark.parametrize(
    ("exchange", "parameters", "is_beside"),
    [
        (GossipExchange, DeviceParameters, True),
        (ServerExchange, DeviceParameters, True),
        (RosterExchange, DeviceParameters, False),  # the peers wait for each other
        (GossipExchange, HostParameters, False),
    ],
)
def test_merges_have_a_thread_where_a_device_trains_and_nobody_waits(
    exchange: Any, parameters: Any, is_beside: bool
) -> None:
    found = merge_thread(exchange, parameters)
    assert (found is not None) == is_beside
    if found is not None:
        found.shutdown()
    delayed = merge_thread(exchange, parameters, delay_steps=1)
    assert delayed is not None
    delayed.shutdown()

"""Stages' trainers, each in its thread: rounds, publications and outer steps on what a driver sends through them."""

from __future__ import annotations

import asyncio
import math
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from codes import raises_code
from patience import PATIENCE_S
from torch import Tensor

from swarmtrain.algorithm.fragments import fragments_of
from swarmtrain.algorithm.gossip import layout_of
from swarmtrain.algorithm.inner import InnerOptimizer
from swarmtrain.algorithm.outer import OuterConstants, OuterState, flatten, outer_step, unflatten_into
from swarmtrain.errors import GoneError, PeerError
from swarmtrain.model.gpt import build_model
from swarmtrain.model.stage_work import DeviceStageWork, StageWork
from swarmtrain.model.stages import Stage, build_stage, stage_shapes
from swarmtrain.peer.devices.device_parameters import DeviceParameters
from swarmtrain.peer.merging.updates import Averaged, LocalUpdate
from swarmtrain.peer.pipeline.driver import Driver, StageAttempt, StageResult
from swarmtrain.peer.pipeline.request_queue import StageRequestQueue
from swarmtrain.peer.pipeline.stage_loop import StageTrainer, StageTransfer, stage_parameters
from swarmtrain.peer.training.loop import inner_constants
from swarmtrain.peer.training.parameters import HostParameters
from swarmtrain.peer.training.session import RoundReport, Session, Start
from swarmtrain.protocol.pipeline.ledger import Key, Kind, LedgerLimits, Settlement, StageLedger
from swarmtrain.protocol.pipeline.router import Router
from swarmtrain.protocol.tokens.progress import Progress
from swarmtrain.run import RunFile

BOUNDARIES = (1, 2)
RUN = RunFile.model_validate(
    {
        "run": {"total_tokens": 8 * 128, "seed": 5},
        "model": {"context_tokens": 16, "num_layers": 3, "width": 16, "num_heads": 2},
        "inner": {"batch_sequences": 8, "microbatch_sequences": 2, "learning_rate": 1e-2},
        "merge": {"method": "diloco", "inner_steps": 4, "outer_momentum": 0.5},
    }
)


def _microbatch(number: int) -> Tensor:
    return torch.randint(0, 256, (2, 17), generator=torch.Generator().manual_seed(number))


@dataclass
class Alone:
    """Exchange without partners, which keeps what is published."""

    published: list[LocalUpdate] = field(default_factory=list)

    def hold(self, states: Sequence[OuterState]) -> None:
        pass

    def merged(self, fragment: int, state: OuterState) -> None:
        pass

    def start_round(self, progress: Progress, steps_per_s: float) -> Start:
        return Start(inner_steps=RUN.merge.inner_steps, num_peers=1, num_parts=2)

    def step_done(self, inner_steps_done: int) -> None:
        pass

    def publish(self, contribution: LocalUpdate) -> None:
        self.published.append(contribution)

    def collect(self, fragment: int = 0) -> Averaged:
        own = self.published[-1]
        return Averaged(gradient=own.gradient, partners=("me",), weights=(own.tokens,), signer="me", roster_sha256="")


@dataclass
class Direct:
    """Calls to desks in this process."""

    queues: Sequence[StageRequestQueue]

    async def _ask(self, attempt: StageAttempt, kind: Kind, payload: Any) -> StageResult:
        return StageResult(await self.queues[attempt.stage].ask(attempt.key, kind, attempt.tokens, payload), 0)

    async def forward(self, peer: str, attempt: StageAttempt, x: Any) -> StageResult:
        return await self._ask(attempt, "forward", x)

    async def backward(self, peer: str, attempt: StageAttempt, gradient: Any) -> StageResult:
        return await self._ask(attempt, "backward", gradient)

    async def tail(self, peer: str, attempt: StageAttempt, x: Any, targets: Any) -> StageResult:
        return await self._ask(attempt, "tail", (x, targets))

    async def settle(self, peer: str, stage: int, settlement: Settlement) -> set[Key]:
        return self.queues[stage].settle("d", settlement)


class Told:
    def retried(self, sequence: int, stage: int, peer: str, reason: str) -> None:
        raise AssertionError(reason)

    def refused(self, peer: str, error: PeerError) -> None:
        raise AssertionError(str(error))

    def lost(self, stage: int, peer: str, key: Key, reason: str) -> None:
        raise AssertionError(reason)


@dataclass
class Trained:
    """Stage with its session."""

    loop: StageTrainer
    session: Session

    @property
    def queue(self) -> StageRequestQueue:
        return self.loop.queue

    def train(self) -> str:
        return self.loop.train(self.session)


def _trainer(
    stage: Stage | StageWork,
    reports: list[RoundReport],
    stop: threading.Event,
    graph_bytes: float,
    over: Callable[[], bool] = lambda: False,
    ends_by_count: bool = True,
) -> Trained:
    """Make a stage's trainer. With `DeviceStageWork` the processor is its device."""
    work = stage if isinstance(stage, StageWork) else StageWork(stage, graph_bytes)
    transfer = StageTransfer(torch.device("cpu")) if isinstance(work, DeviceStageWork) else None
    ledger = StageLedger(LedgerLimits(batch_tokens=RUN.tokens_per_step))
    queue = StageRequestQueue(ledger, time.monotonic, transfer)
    batches: Any = SimpleNamespace()
    loop = StageTrainer(RUN, work, batches, queue, over=over)
    session = Session(
        run=RUN,
        parameters=loop.parameters,
        loop=loop,
        exchange=Alone(),
        report=reports.append,
        should_stop=stop.is_set,
        ends=loop.ends_after(RUN.run.total_tokens if ends_by_count else math.inf),
    )
    return Trained(loop, session)


async def _drive(trainers: Sequence[Trained], num_batches: int) -> list[float]:
    routers = [Router(random.Random(0)) for _ in trainers[1:]]
    for stage, router in enumerate(routers, 1):
        router.set_peers([f"peer of stage {stage}"])
    driver = Driver("d", routers, Direct([each.queue for each in trainers]), Told(), time.monotonic, 0)
    losses = []
    for number in range(4 * num_batches):
        sequences = _microbatch(number)
        losses.append((await driver.drive(32, sequences[:, :-1], sequences[:, 1:])).loss)
        if number % 4 == 3:
            await driver.settled()  # a flush: everybody steps before the next one
    return losses


def _whole(num_batches: int) -> tuple[list[float], Tensor]:
    """Losses and weights of one process with the whole model, an outer step every round; the clip is per stage."""
    model = build_model(RUN.model, RUN.run.seed)
    parameters = dict(model.named_parameters())
    shapes = stage_shapes(RUN.model, BOUNDARIES)
    inner = [InnerOptimizer([(n, parameters[n]) for n in Stage(s).state_dict()], inner_constants(RUN)) for s in shapes]
    theta = flatten(model.parameters())
    state, losses = OuterState(theta, torch.zeros_like(theta)), []
    constants = OuterConstants(learning_rate=RUN.merge.outer_learning_rate, momentum=RUN.merge.outer_momentum)
    for batch in range(num_batches):
        for number in range(4 * batch, 4 * batch + 4):
            loss = model.loss(_microbatch(number))
            (loss / 4).backward()
            losses.append(float(loss.detach()))
        for each in inner:
            each.step(batch / num_batches)
        if batch % RUN.merge.inner_steps == RUN.merge.inner_steps - 1:
            state = outer_step(state, state.theta - flatten(model.parameters()), constants)
            unflatten_into(state.theta, model.parameters())
    return losses, state.theta


@pytest.mark.parametrize("graph_bytes", [float("inf"), 0.0], ids=["graphs kept", "all recomputed"])
@pytest.mark.parametrize("computes", [StageWork, DeviceStageWork])
def test_rounds_of_stages_are_those_of_the_whole_model(computes: type[StageWork], graph_bytes: float) -> None:
    reports: list[list[RoundReport]] = [[], [], []]
    stop = threading.Event()
    trainers = [
        _trainer(computes(build_stage(shape, RUN.run.seed), graph_bytes), each, stop, graph_bytes)
        for shape, each in zip(stage_shapes(RUN.model, BOUNDARIES), reports, strict=True)
    ]
    threads = [threading.Thread(target=each.train) for each in trainers]
    for thread in threads:
        thread.start()
    try:
        losses = asyncio.run(asyncio.wait_for(_drive(trainers, 8), 2 * PATIENCE_S))
        for thread in threads:
            thread.join(PATIENCE_S)
    finally:
        stop.set()
    expected, theta = _whole(8)
    assert losses == expected
    whole = build_model(RUN.model, 0)
    unflatten_into(theta, whole.parameters())
    weights = whole.state_dict()
    for trainer, each in zip(trainers, reports, strict=True):
        assert isinstance(trainer.loop.parameters, HostParameters if computes is StageWork else DeviceParameters)
        assert trainer.session.finished and trainer.session.progress.run_tokens == RUN.run.total_tokens
        assert [report.contribution.tokens for report in each] == [512, 512]
        assert [report.loss for report in each] == pytest.approx(
            [sum(expected[:16]) / 16, sum(expected[16:]) / 16], abs=1e-6
        )
        unflatten_into(trainer.session.replica.state.theta, trainer.loop.parameters.named.values())
        for name, parameter in trainer.loop.parameters.named.items():
            assert torch.equal(parameter, weights[name]), name


def test_a_stage_that_is_told_to_stop_stops_within_a_batch() -> None:
    stop = threading.Event()
    trainer = _trainer(build_stage(stage_shapes(RUN.model, BOUNDARIES)[1], 5), [], stop, float("inf"))
    ended: list[str] = []
    thread = threading.Thread(target=lambda: ended.append(trainer.train()))
    thread.start()

    async def ask() -> None:
        attempt = StageAttempt(1, Key("d", 0, 0), 32)
        asking = asyncio.ensure_future(Direct([trainer.queue] * 2).forward("p", attempt, torch.zeros(2, 16, 16)))
        assert (await asyncio.wait_for(asking, 10.0)).value.shape == (2, 16, 16)
        waiting = asyncio.ensure_future(trainer.queue.ask(Key("d", 1, 0), "backward", 32, None))
        with pytest.raises(GoneError):
            await waiting
        stop.set()
        await asyncio.to_thread(thread.join, 10.0)
        with raises_code("gone", GoneError):
            await trainer.queue.ask(Key("d", 2, 0), "forward", 32, None)

    asyncio.run(ask())
    assert ended == ["interrupted"]


def test_only_the_first_stage_ends_by_its_own_count() -> None:
    for ends_by_count in (True, False):
        stage = build_stage(stage_shapes(RUN.model, BOUNDARIES)[1], 5)
        session = _trainer(stage, [], threading.Event(), 0.0, ends_by_count=ends_by_count).session
        assert not session.finished
        session.replica.progress = Progress(run_tokens=RUN.run.total_tokens)
        assert session.finished == ends_by_count, "drivers still need it"


def test_a_stage_that_nothing_came_to_ends_without_a_round() -> None:
    reports: list[RoundReport] = []
    over = iter([False, *[True] * 9])
    stage = build_stage(stage_shapes(RUN.model, BOUNDARIES)[1], 5)
    trainer = _trainer(stage, reports, threading.Event(), 0.0, lambda: next(over))
    assert trainer.train() == "total_tokens"
    assert not reports and trainer.session.progress.round == 0 and not trainer.queue.is_open


@pytest.mark.parametrize("is_host", [True, False])
def test_what_is_under_way_keeps_the_weights_that_a_merge_replaces(is_host: bool) -> None:
    work = StageWork(build_stage(stage_shapes(RUN.model, BOUNDARIES)[1], 5))
    parameters = stage_parameters(work, is_host=is_host)
    x = torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(0))
    before, out = parameters.read(), work.forward("kept", x)
    parameters.write(torch.zeros_like(before))
    assert not torch.equal(work.forward("new", x), out)
    assert torch.equal(torch.cat([weight.reshape(-1) for weight in work._weights[1].values()]), before)


def test_a_merge_into_a_stage_on_a_device_keeps_steps_since_the_loan_and_what_is_under_way() -> None:
    work = DeviceStageWork(build_stage(stage_shapes(RUN.model, BOUNDARIES)[1], 5))
    parameters, x = stage_parameters(work, is_host=False), torch.ones(2, 16, 16)
    (fragment,) = fragments_of(layout_of(parameters.shapes), 1)
    inner = InnerOptimizer(parameters.named.items(), inner_constants(RUN), parameters.take_back)
    lent, reached = parameters.lend(fragment, torch.zeros(fragment.layout.size)), parameters.read()
    work.forward("stepped", x)
    work.backward("stepped", x, 0)
    work.gradients(0, 1.0)
    inner.step(0.5)
    work.replaced()
    stepped, out = parameters.read(), work.forward("kept", x)
    theta = torch.full_like(reached, 0.25)
    parameters.write(theta, fragment)
    torch.testing.assert_close(parameters.read(), stepped + (theta - reached))
    assert not torch.equal(stepped, reached) and torch.equal(lent.gradient(), -reached)
    assert torch.equal(torch.cat([weight.reshape(-1) for weight in work._weights[2].values()]), stepped)
    assert sorted(work._weights) == [1, 2, 3] and torch.equal(work.forward("again", x), work.forward("same", x))
    work.forget("stepped")
    assert sorted(work._weights) == [2, 3] and not torch.equal(work.forward("new", x), out)

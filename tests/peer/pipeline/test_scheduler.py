"""Keeping a driver busy: how many microbatches are under way, when none is, how it ends, and what is told."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from virtual_loop import virtually

from swarmtrain.errors import BadBytesError, GoneError, PeerError, Problem, RunTimeError, UnreachableError
from swarmtrain.events import Event, MicrobatchRetryEvent
from swarmtrain.peer.pipeline import scheduler
from swarmtrain.peer.pipeline.driver import StageAttempt, StageResult, Tail
from swarmtrain.peer.pipeline.request_queue import StageRequestQueue
from swarmtrain.peer.pipeline.scheduler import MicrobatchScheduler, TellRetries
from swarmtrain.protocol.pipeline.balance import StagePeer
from swarmtrain.protocol.pipeline.ledger import Key, LedgerLimits, Settlement, StageLedger
from swarmtrain.run import RunFile

STAGES = 3
SOON_S = 2.0


def run_file(batch: int = 32, microbatch: int = 2, in_flight: int = 0, stages: int = STAGES) -> RunFile:
    return RunFile.model_validate(
        {
            "run": {"total_tokens": 10**9},
            "model": {"context_tokens": 4, "num_layers": 3, "width": 16, "num_heads": 2},
            "inner": {"batch_sequences": batch, "microbatch_sequences": microbatch},
            "pipeline": {"stages": stages, "in_flight": in_flight},
        }
    )


# ---------------------------------------------------------------- what is told of them


def test_retries_are_told_at_most_once_a_second_and_all_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=50.0)
    monkeypatch.setattr(scheduler, "time", SimpleNamespace(monotonic=lambda: clock.now))
    told: list[MicrobatchRetryEvent] = []
    retries = TellRetries(told.append, lambda peer, error: None)  # type: ignore[arg-type]
    for number in range(95):
        retries.retried(number, 1, "p", f"reason {number}")
        clock.now += 1 / 32
    assert [event.count for event in told] == [1, 32, 32]
    assert [event.reason for event in told] == ["reason 0", "reason 32", "reason 64"]
    assert all((event.stage, event.asked) == (1, "p") for event in told)
    clock.now += 10.0
    retries.retried(95, 1, "p", "late")
    assert told[-1].count == 31 and sum(event.count for event in told) == 96


def test_each_peer_and_stage_is_told_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "time", SimpleNamespace(monotonic=lambda: 0.0))
    told: list[MicrobatchRetryEvent] = []
    retries = TellRetries(told.append, lambda peer, error: None)  # type: ignore[arg-type]
    for _ in range(3):
        for stage, peer in ((1, "p"), (2, "p"), (1, "q")):
            retries.retried(0, stage, peer, "why")
    assert [(event.stage, event.asked, event.count) for event in told] == [(1, "p", 1), (2, "p", 1), (1, "q", 1)]


def test_who_answers_what_it_must_not_is_handed_on_and_what_is_lost_is_counted() -> None:
    refused: list[tuple[str, PeerError]] = []
    retries = TellRetries(lambda event: pytest.fail("no event"), lambda *told: refused.append(told))
    error = BadBytesError("an impossible loss")
    retries.refused("p", error)
    retries.lost(1, "p", Key("d", 3, 0), "too late")
    retries.lost(2, "q", Key("d", 3, 0), "too late")
    assert refused == [("p", error)] and retries.num_lost == 2


# ---------------------------------------------------------------- a driver and its stages


@dataclass
class Stages:
    """Everyone that a driver asks; it answers after a while, unless it hangs or something is wrong."""

    took_s: float = 0.1
    hanging: set[str] = field(default_factory=set)
    hanging_backward: set[str] = field(default_factory=set)
    wrong: dict[str, Exception] = field(default_factory=dict)
    settling_hangs: bool = False
    asked: Counter[str] = field(default_factory=Counter)
    under_way: int = 0
    most_under_way: int = 0
    acknowledged: Counter[tuple[int, int]] = field(default_factory=Counter)
    """Scripted stages, by (stage, sequence)."""
    dropped: set[tuple[int, int]] = field(default_factory=set)

    async def _answer(self, peer: str, value: Any) -> StageResult:
        self.asked[peer] += 1
        if peer in self.wrong:
            raise self.wrong[peer]
        await asyncio.sleep(self.took_s if peer not in self.hanging else 1e6)
        return StageResult(value, 1)

    async def forward(self, peer: str, attempt: StageAttempt, x: Tensor) -> StageResult:
        if attempt.stage == 0:
            self.under_way += 1
            self.most_under_way = max(self.most_under_way, self.under_way)
        return await self._answer(peer, x)

    async def backward(self, peer: str, attempt: StageAttempt, gradient: Tensor) -> StageResult:
        if peer in self.hanging_backward:
            await asyncio.sleep(1e6)
        answered = await self._answer(peer, gradient)
        if attempt.stage == 0:
            self.under_way -= 1
        return answered

    async def tail(self, peer: str, attempt: StageAttempt, x: Tensor, targets: Tensor) -> StageResult:
        return await self._answer(peer, Tail(2.5, x))

    async def settle(self, peer: str, stage: int, settlement: Settlement) -> set[Key]:
        if self.settling_hangs:
            await asyncio.sleep(1e6)
        self.acknowledged.update((stage, key.sequence) for key, _ in settlement.acknowledged)
        self.dropped.update((stage, key.sequence) for key in settlement.dropped)
        return set()


@dataclass
class Site:
    """Driver "d" of three stages, which holds the first one."""

    now: Callable[[], float]
    run: RunFile = field(default_factory=run_file)
    stages: Stages = field(default_factory=Stages)
    peers: dict[int, list[str]] = field(default_factory=lambda: {0: ["d"], 1: ["p"], 2: ["q"]})
    queue: Any = field(default_factory=lambda: SimpleNamespace(is_open=True, has_worker=True))
    failures: list[Problem] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    drawn: int = 0

    def next_microbatch(self) -> tuple[Tensor, Tensor]:
        self.drawn += 1
        x = torch.full((2, 4), self.drawn)
        return x, x + 1

    def driving(self) -> MicrobatchScheduler:
        told = TellRetries(self.events.append, lambda peer, error: None)
        failed, source = self.failures.append, self
        return MicrobatchScheduler(
            "d", self.run, source, self.queue, self.stages, told, lambda: self.peers, failed, self.places
        )  # type: ignore[arg-type]

    def places(self) -> list[StagePeer]:
        """Return equal places for all."""
        names = {name for of in self.peers.values() for name in of}
        stages = {name: tuple(stage for stage, of in self.peers.items() if name in of) for name in sorted(names)}
        return [StagePeer(peer=name, stages=held, tokens_per_s=100.0) for name, held in stages.items()]


def _driving(body: Callable[[Site], Coroutine[Any, Any, None]]) -> None:
    """Run in virtual time, the driver's clock included."""

    async def run(now: Callable[[], float]) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(scheduler, "time", SimpleNamespace(monotonic=now, time=lambda: 1e9))
            await body(Site(now))

    virtually(run)


@pytest.mark.parametrize(
    ("batch", "microbatch", "in_flight", "most"),
    [
        (32, 2, 0, 4),  # a quarter of a batch
        (8, 2, 1, 1),  # what the run file says
        (8, 2, 7, 7),
        (24, 0, 0, 6),  # a sequence each
        (99, 0, 0, 8),  # three sequences each
    ],
)
def test_as_many_are_under_way_as_may_be_and_all_that_come_back_are_told_everyone(
    batch: int, microbatch: int, in_flight: int, most: int
) -> None:
    async def body(site: Site) -> None:
        site.run = run_file(batch, microbatch, in_flight)
        driver = site.driving()
        assert driver.num_in_flight == 0
        await driver.start()
        for _ in range(20):
            await asyncio.sleep(1.0)
            assert driver.num_in_flight == most
        await driver.stop()
        stages = site.stages
        assert stages.most_under_way == most and stages.under_way == driver.num_in_flight == 0
        num = site.drawn
        assert num > 20 * most, "a new one begins when one is back, not when it is looked for the next time"
        assert list(driver.losses) == [2.5] * min(num, 256)
        assert Counter(stage for stage, _ in stages.acknowledged) == {0: num, 1: num, 2: num}
        assert set(stages.acknowledged.values()) == {1} and not stages.dropped
        assert not site.failures and not site.events

    _driving(body)


def test_no_text_is_drawn_before_the_first_stages_trainer_has_begun_its_round() -> None:
    """Its shard is not chosen until then: the first batch came from all of the text, and was counted as the shard's."""

    async def body(site: Site) -> None:
        site.queue = StageRequestQueue(StageLedger(LedgerLimits(batch_tokens=64)), site.now)
        driver = site.driving()
        await driver.start()
        await asyncio.sleep(5.0)
        assert not site.drawn and not driver.num_in_flight
        site.queue.next()
        await asyncio.sleep(SOON_S)
        await driver.stop()
        assert site.drawn > 4 and not site.failures

    _driving(body)


def test_sequences_are_above_those_of_earlier_lives_and_in_order() -> None:
    async def body(site: Site) -> None:
        driver = site.driving()
        await driver.start()
        await asyncio.sleep(SOON_S)
        await driver.stop()
        told = sorted(sequence for stage, sequence in site.stages.acknowledged if not stage)
        assert told == list(range(10**15, 10**15 + site.drawn))

    _driving(body)


def test_while_the_first_stage_is_merged_none_begins() -> None:
    async def body(site: Site) -> None:
        site.queue.is_open = False
        driver = site.driving()
        await driver.start()
        await asyncio.sleep(5.0)
        assert driver.num_in_flight == site.drawn == 0
        site.queue.is_open = True
        await asyncio.sleep(SOON_S)
        assert driver.num_in_flight == 4
        await driver.stop()

    _driving(body)


def test_what_the_first_stage_gives_up_does_not_count_and_is_no_failure() -> None:
    async def body(site: Site) -> None:
        site.stages.wrong["d"] = GoneError("this peer does not train now")
        driver = site.driving()
        await driver.start()
        await asyncio.sleep(10.0)
        assert site.drawn <= 4 * 21, "it waits a while between two of them"
        assert not site.failures and not driver.losses
        del site.stages.wrong["d"]
        await asyncio.sleep(SOON_S)
        await driver.stop()
        assert len(driver.losses) > 4 and not site.failures

    _driving(body)


def test_a_peer_that_fails_is_told_of_and_another_is_asked() -> None:
    async def body(site: Site) -> None:
        site.peers[1] = ["p", "r"]
        site.stages.wrong["p"] = UnreachableError("nobody answers there")
        driver = site.driving()
        await driver.start()
        await asyncio.sleep(SOON_S)
        await driver.stop()
        assert site.stages.asked["r"] > site.stages.asked["p"] > 0
        event = site.events[0]
        assert isinstance(event, MicrobatchRetryEvent)
        assert (event.stage, event.asked, event.reason) == (1, "p", "nobody answers there")
        assert driver.losses and not site.failures

    _driving(body)


def test_what_this_peer_cannot_do_is_reported_in_a_sentence() -> None:
    async def body(site: Site) -> None:
        site.stages.wrong["p"] = RunTimeError("training diverged: lower inner.learning_rate")
        driver = site.driving()
        await driver.start()
        await asyncio.sleep(SOON_S)
        await driver.stop()
        assert set(site.failures) == {"training diverged: lower inner.learning_rate"}
        assert not driver.losses

    _driving(body)


def test_a_mistake_of_ours_is_reported_too(caplog: pytest.LogCaptureFixture) -> None:
    async def body(site: Site) -> None:
        site.stages.wrong["p"] = ZeroDivisionError("by zero")
        driver = site.driving()
        await driver.start()
        await asyncio.sleep(0.2)
        await driver.stop()
        assert "ZeroDivisionError('by zero')" in site.failures[0]
        assert "a microbatch failed" in caplog.text

    _driving(body)


# ---------------------------------------------------------------- the end


def test_the_end_waits_for_what_is_under_way_and_until_everyone_knows() -> None:
    async def body(site: Site) -> None:
        site.stages.took_s = 1.0
        driver = site.driving()
        await driver.start()
        await asyncio.sleep(0.5)
        assert site.drawn == 4
        began_s = site.now()
        await driver.stop(10.0)
        assert site.drawn == 4 and driver.num_in_flight == 0
        assert 4.0 < site.now() - began_s < 6.0, "five answers of a second each"
        assert len(site.stages.acknowledged) == 3 * 4 and not site.stages.dropped
        await asyncio.sleep(30.0)
        assert site.drawn == 4, "nothing begins after the end"

    _driving(body)


@pytest.mark.parametrize("drain_s", [0.5, 10.0])
def test_with_a_peer_that_hangs_it_ends_within_its_time_and_nothing_counts(drain_s: float) -> None:
    async def body(site: Site) -> None:
        site.stages.hanging = {"q"}
        driver = site.driving()
        await driver.start()
        await asyncio.sleep(SOON_S)
        began_s = site.now()
        await driver.stop(drain_s)
        assert site.now() - began_s < drain_s + 1.0
        assert driver.num_in_flight == 0 and not site.stages.acknowledged
        assert {stage for stage, _ in site.stages.dropped} == {0, 1, 2}, "they are told that it does not count"
        assert len(site.stages.dropped) == 3 * 4

    _driving(body)


def test_with_a_peer_that_cannot_be_told_it_ends_within_its_time() -> None:
    async def body(site: Site) -> None:
        site.stages.settling_hangs = True
        driver = site.driving()
        await driver.start()
        await asyncio.sleep(SOON_S)
        began_s = site.now()
        await driver.stop(3.0)
        assert site.now() - began_s < 4.0
        before = asyncio.all_tasks()
        assert len(before) == 1, "nothing goes on in the background"

    _driving(body)


def test_it_can_be_ended_before_it_began() -> None:
    async def body(site: Site) -> None:
        await site.driving().stop()
        driver = site.driving()
        await driver.start()
        await driver.stop()
        assert driver.num_in_flight == 0 and site.now() < 1.0

    _driving(body)


def test_data_that_cannot_be_read_is_a_failure() -> None:
    async def body(site: Site) -> None:
        def broken() -> tuple[Tensor, Tensor]:
            raise RunTimeError("the data cannot be read: the disk is gone")

        site.next_microbatch = broken  # type: ignore[method-assign]
        driver = site.driving()
        await driver.start()
        await asyncio.sleep(SOON_S)
        await driver.stop()
        assert site.failures == ["the data cannot be read: the disk is gone"]

    _driving(body)


def test_a_driver_that_ends_by_a_fault_of_ours_says_so() -> None:
    async def body(site: Site) -> None:
        driver = site.driving()
        driver.peers_of = lambda: {}[0]
        await driver.start()
        await asyncio.sleep(SOON_S)
        await driver.stop()
        (failure,) = site.failures
        assert failure.code == "bug" and "KeyError" in failure

    _driving(body)

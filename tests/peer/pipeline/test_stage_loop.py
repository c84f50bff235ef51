"""Loop that computes a stage: what a step consists of when drivers end, and its reported speed."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from codes import raises_code

from swarmtrain.errors import BadBytesError
from swarmtrain.model.stage_work import BadGradientError
from swarmtrain.peer.lifecycle.stop import StopTraining
from swarmtrain.peer.pipeline.driver import Tail
from swarmtrain.peer.pipeline.request_queue import StageRequestQueue, Task
from swarmtrain.peer.pipeline.stage_loop import StageLoop, WorkMeter
from swarmtrain.peer.training.loop import InnerStep, RoundOver
from swarmtrain.protocol.pipeline.ledger import (
    Acknowledged,
    Add,
    Discard,
    Due,
    Key,
    Kind,
    LedgerLimits,
    Settlement,
    StageLedger,
    Subtract,
    TakeStep,
)

TOKENS = 10
LIMITS = LedgerLimits(batch_tokens=4 * TOKENS, ack_wait_s=10.0)


def key(sequence: int, driver: str = "d") -> Key:
    return Key(driver, sequence, 0)


def loss_of(sequence: int) -> float:
    return 1.0 + sequence


@dataclass
class Bench:
    """Request queue whose time passes only while the loop waits; then the script's next line is played."""

    limits: LedgerLimits = LIMITS
    script: list[Callable[[], object]] = field(default_factory=list)
    now: float = 0.0
    ended: bool = False
    done: list[Task | Due] = field(default_factory=list)
    stops: bool = False

    def __post_init__(self) -> None:
        self.queue = StageRequestQueue(StageLedger(self.limits), lambda: self.now)
        self.queue.wait = self.wait  # type: ignore[method-assign]
        self.loop = StageLoop(
            self.queue,
            Work(),  # type: ignore[arg-type]
            Inner(),  # type: ignore[arg-type]
            self.limits.batch_tokens,
            over=lambda: self.ended,
            record=lambda what, answer: self.done.append(what),
        )

    def wait(self, most_s: float) -> None:
        """Play the next line of the script, or let time pass."""
        if self.script:
            self.script.pop(0)()
        else:
            self.now += most_s
            assert self.now < 1000.0, "it waits for ever"

    def end(self) -> None:
        self.ended = True

    def step(self) -> InnerStep:
        return self.loop.step(0.5, 1.0, lambda: self.stops)

    def acknowledge(self, *sequences: int, driver: str = "d") -> None:
        said = tuple(Acknowledged(key(number, driver), loss_of(number)) for number in sequences)
        self.queue.settle(driver, Settlement(0, said, (), 0))

    def of(self, kind: type) -> list[Any]:
        return [what for what in self.done if isinstance(what, kind)]


@dataclass
class Inner:
    """Counts its steps."""

    steps: list[tuple[float, float]] = field(default_factory=list)

    def step(self, progress: float, scale: float) -> float:
        self.steps.append((progress, scale))
        return 7.0


@dataclass
class Work:
    """Gradients are the sets of those they came from."""

    sums: dict[int, set[Key]] = field(default_factory=dict)
    stepped: list[tuple[set[Key], float]] = field(default_factory=list)
    num_versions: int = 1
    spoilt: set[Key] = field(default_factory=set)

    def forward(self, key: Key, x: Any) -> Any:
        return x

    def backward(self, key: Key, gradient: Any, batch: int) -> Any:
        if key in self.spoilt:
            raise BadGradientError("a gradient of norm inf, where 1 is usual")
        self.sums.setdefault(batch, set()).add(key)
        return gradient

    def tail(self, key: Key, x: Any, targets: Any, scale: float, batch: int) -> Tail:
        assert scale == TOKENS / (4 * TOKENS)
        self.backward(key, None, batch)
        return Tail(loss_of(key.sequence), x)

    def subtract(self, key: Key, batch: int) -> None:
        self.sums[batch].remove(key)

    def add(self, key: Key, batch: int) -> None:
        assert key not in self.sums.setdefault(batch, set())
        self.sums[batch].add(key)

    def discard(self, batch: int) -> None:
        assert not self.sums.pop(batch)

    def forget(self, key: Key) -> None:
        pass

    def gradients(self, batch: int, factor: float) -> None:
        self.stepped.append((self.sums.pop(batch), factor))

    def replaced(self) -> None:
        self.num_versions += 1


def _at(bench: Bench, body: Callable[[], Coroutine[Any, Any, None]]) -> None:
    async def run() -> None:
        await body()
        bench.queue.close()
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()

    asyncio.run(run())


async def _tails(bench: Bench, *sequences: int, driver: str = "d") -> list[asyncio.Task[Any]]:
    """Ask the last stage for these; each is computed when the loop comes to it."""
    asking = [
        asyncio.create_task(bench.queue.ask(key(number, driver), "tail", TOKENS, ("x", "y"))) for number in sequences
    ]
    await asyncio.sleep(0)
    return asking


# ---------------------------------------------------------------- when drivers end


def test_what_there_is_when_drivers_end_is_one_smaller_step_and_then_the_round_is_over() -> None:
    bench = Bench()

    async def body() -> None:
        await _tails(bench, *range(6))
        bench.script = [lambda: bench.acknowledge(*range(6)), bench.end]
        assert bench.step() == InnerStep(4 * TOKENS, 2.5, 7.0)
        assert bench.step() == InnerStep(2 * TOKENS, 5.5, 7.0), "the mean of the last two"
        with pytest.raises(RoundOver):
            bench.step()
        assert bench.queue.has_nothing_open and bench.now == 0.0, "nothing was waited for"
        work: Any = bench.loop.work
        assert work.stepped == [({key(n) for n in range(4)}, 1.0), ({key(4), key(5)}, 2.0)]
        assert work.num_versions == 3

    _at(bench, body)


def test_a_smaller_step_waits_for_what_is_not_acknowledged_and_goes_without_it() -> None:
    bench = Bench()

    async def body() -> None:
        await _tails(bench, 0, 1, 2)
        bench.script = [bench.end, lambda: bench.acknowledge(0, 2)]
        assert bench.step() == InnerStep(2 * TOKENS, 2.0, 7.0)
        assert 10.0 <= bench.now < 11.0, "as long as a full batch waits"
        assert [due.key for due in bench.of(Subtract)] == [key(1)]
        assert bench.loop.work.stepped == [({key(0), key(2)}, 2.0)]  # type: ignore[attr-defined]
        with pytest.raises(RoundOver):
            bench.step()

    _at(bench, body)


def test_a_batch_of_which_nothing_is_acknowledged_is_no_step() -> None:
    bench = Bench()

    async def body() -> None:
        await _tails(bench, 0, 1)
        bench.script = [bench.end]
        with pytest.raises(RoundOver):
            bench.step()
        assert len(bench.of(Subtract)) == 2 and len(bench.of(Discard)) == 1
        assert not bench.of(TakeStep) and not bench.loop.inner.steps  # type: ignore[attr-defined]

    _at(bench, body)


def test_the_round_is_not_over_while_drivers_are_there() -> None:
    bench = Bench()

    async def body() -> None:
        await _tails(bench, 0, 1, 2)
        waits: list[float] = []

        def patiently(most_s: float) -> None:
            waits.append(most_s)
            if len(waits) == 100:
                bench.stops = True

        bench.acknowledge(0, 1, 2)
        bench.queue.wait = patiently  # type: ignore[method-assign]
        with pytest.raises(StopTraining):
            bench.step()
        assert not bench.of(TakeStep), "a batch that is not full waits for more"
        bench.stops, bench.ended = False, True
        bench.queue.wait = bench.wait  # type: ignore[method-assign]
        bench.acknowledge(0, 1, 2)
        assert bench.step().tokens == 3 * TOKENS, "nothing was lost by the interruption"

    _at(bench, body)


def test_who_has_nothing_when_drivers_end_is_over_at_once() -> None:
    bench = Bench(ended=True)
    with pytest.raises(RoundOver):
        bench.step()
    assert bench.queue.has_nothing_open and bench.now == 0.0
    bench.stops = True
    with pytest.raises(StopTraining):
        bench.step()


def test_what_waits_is_still_computed_when_drivers_end() -> None:
    bench = Bench(ended=True)

    async def body() -> None:
        asking = await _tails(bench, 0, 1, 2)
        bench.script = [lambda: bench.acknowledge(0, 1, 2)]
        tokens = 0
        with pytest.raises(RoundOver):
            while True:
                tokens += bench.step().tokens
        assert tokens == 3 * TOKENS and bench.now == 0.0
        assert [answer.loss for answer in await asyncio.gather(*asking)] == [1.0, 2.0, 3.0]

    _at(bench, body)


def test_a_forward_without_its_backward_does_not_hold_up_the_end() -> None:
    bench = Bench(ended=True)

    async def body() -> None:
        asking = asyncio.create_task(bench.queue.ask(key(0), "forward", TOKENS, "x"))
        await asyncio.sleep(0)
        with pytest.raises(RoundOver):
            bench.step()
        assert await asking == "x" and bench.queue.has_nothing_open and bench.queue.ledger.num_open == 1

    _at(bench, body)


def test_a_gradient_that_would_spoil_the_others_is_refused_and_the_step_goes_without_it() -> None:
    bench = Bench(ended=True)
    bench.loop.work.spoilt = {key(1)}  # type: ignore[attr-defined]

    async def body() -> None:
        asking = await _tails(bench, 0, 1)
        bench.script = [lambda: bench.acknowledge(0)]
        assert bench.step() == InnerStep(TOKENS, 1.0, 7.0)
        with raises_code("bad-bytes", BadBytesError, "norm inf"):
            await asking[1]

    _at(bench, body)


def test_a_late_gradient_that_would_spoil_the_others_ends_nobody(caplog: pytest.LogCaptureFixture) -> None:
    """By the weights of now it may be what it was not by those of its first computation."""

    class Spoilt(Work):
        def add(self, key: Key, batch: int) -> None:
            raise BadGradientError("a gradient of norm inf, where 1 is usual")

    bench = Bench()
    bench.loop.work = Spoilt()  # type: ignore[assignment]
    bench.loop._correct(Add(key(0), 0))
    assert "left out: a gradient of norm inf" in caplog.text


# ---------------------------------------------------------------- the ledger alone


def test_a_closed_batch_is_closed_once_and_later_ones_fill_again() -> None:
    ledger = StageLedger(LIMITS)

    def computed(*sequences: int) -> None:
        for number in sequences:
            assert ledger.ask(key(number), "tail", TOKENS, 0.0).answer == "work"
            assert ledger.begin(key(number), "tail") is not None
            ledger.computed(key(number), "tail", 0.0)
            assert ledger.acknowledge(key(number), 1.0, 0.0)

    def steps() -> list[int]:
        found = []
        while (due := ledger.due(0.0)) is not None:
            found += [due.tokens] if isinstance(due, TakeStep) else []
        return found

    assert ledger.has_nothing_open
    computed(0)
    assert not ledger.has_nothing_open and not steps()
    ledger.close_batch()
    assert steps() == [TOKENS] and ledger.has_nothing_open
    computed(1, 2)
    assert not steps(), "what is said once holds for one batch"
    computed(3, 4)
    assert steps() == [4 * TOKENS] and ledger.has_nothing_open


# ---------------------------------------------------------------- how fast


def test_before_there_is_enough_nobody_knows_how_fast() -> None:
    meter = WorkMeter()
    for _ in range(23):
        meter.add("tail", 100, 0.5)
        assert meter.tokens_per_s is None
    meter.add("tail", 100, 0.5)
    assert meter.tokens_per_s == pytest.approx(200.0)


@pytest.mark.parametrize(("kinds", "passed"), [(["forward", "backward"], 30 * 100), (["tail"], 60 * 100)])
def test_a_microbatch_counts_once_whether_in_one_piece_or_two(kinds: list[Kind], passed: int) -> None:
    meter = WorkMeter()
    for number in range(60):
        meter.add(kinds[number % len(kinds)], 100, 1.0 / len(kinds))
    assert meter.tokens_per_s == pytest.approx(100.0)
    assert meter.passed_tokens == passed


def test_steps_cost_time_and_bring_no_tokens() -> None:
    meter = WorkMeter()
    for _ in range(30):
        meter.add("tail", 100, 0.5)
        meter.add(None, 10**6, 0.5)
    assert meter.tokens_per_s == pytest.approx(100.0) and meter.passed_tokens == 3000


def test_only_the_last_pieces_count() -> None:
    meter = WorkMeter()
    for _ in range(500):
        meter.add("tail", 100, 1000.0)
    for _ in range(96):
        meter.add("tail", 100, 0.1)
    assert meter.tokens_per_s == pytest.approx(1000.0)


@pytest.mark.parametrize(("kind", "took_s"), [(None, 1.0), ("tail", 0.0)])
def test_no_tokens_or_no_time_is_no_speed(kind: Kind | None, took_s: float) -> None:
    meter = WorkMeter()
    for _ in range(96):
        meter.add(kind, 100, took_s)
    assert meter.tokens_per_s is None


def test_what_it_waits_does_not_count_and_what_it_is_slowed_by_does(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(LedgerLimits(batch_tokens=4 * TOKENS, max_open=200, max_open_of_driver=200))
    slowed: list[Kind | None] = []

    @contextmanager
    def slowly(kind: Kind | None) -> Iterator[None]:
        slowed.append(kind)
        bench.now += 7.0  # another stage's turn on the device
        yield
        bench.now += 0.25

    bench.loop.slowed = slowly
    monkeypatch.setattr("swarmtrain.peer.pipeline.stage_loop.time.monotonic", lambda: bench.now)

    async def body() -> None:
        for first in range(0, 40, 4):
            await _tails(bench, *range(first, first + 4))
            bench.script = [lambda first=first: bench.acknowledge(*range(first, first + 4))]  # type: ignore[misc]
            bench.step()
            bench.now += 100.0
        meter = bench.loop.meter
        assert meter.passed_tokens == 40 * TOKENS
        assert meter.tokens_per_s == pytest.approx(4 * TOKENS / (5 * 0.25)), "four microbatches and a step"
        assert slowed == ["tail", "tail", "tail", "tail", None] * 10
        assert math.isclose(bench.now, 10 * (100.0 + 5 * 7.25))

    _at(bench, body)

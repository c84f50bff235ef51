"""Session without a model: which steps of which sizes publish, merge and end rounds, and what is reported.

Rounds are counted in tokens: a stage's inner steps are not all of one size.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from codes import raises_code
from torch import Tensor

from swarmtrain.algorithm.common_step import CommonOptimizer, CommonStep
from swarmtrain.algorithm.gossip import layout_of, prepare
from swarmtrain.algorithm.inner import Moments
from swarmtrain.algorithm.outer import OuterState
from swarmtrain.errors import RunTimeError
from swarmtrain.peer.devices.device_parameters import DeviceParameters
from swarmtrain.peer.lifecycle.stop import StopTraining
from swarmtrain.peer.merging.updates import Averaged, BatchMean, Gathered, LocalUpdate, Replaced
from swarmtrain.peer.training.loop import inner_constants
from swarmtrain.peer.training.parameters import HostParameters, ParameterSource
from swarmtrain.peer.training.session import LoopCheckpoint, RoundReport, Session, Start, Worker
from swarmtrain.protocol.tokens.progress import Progress
from swarmtrain.run import RunFile

STEP = 64
"""Tokens of a full step."""


def run_file(inner_steps: int, stages: int = 2) -> RunFile:
    return RunFile.model_validate(
        {
            "run": {"total_tokens": 10**6},
            "model": {"context_tokens": 16, "num_layers": 1, "width": 16, "num_heads": 2},
            "inner": {"batch_sequences": 4},
            "merge": {"inner_steps": inner_steps, "fragments": 1},
            "pipeline": {"stages": stages},
        }
    )


@dataclass
class Clock:
    now_s: float = 5.0

    def __call__(self) -> float:
        return self.now_s


@dataclass
class Alone:
    """Exchange without partners, which keeps what it is told."""

    inner_steps: int
    num_parts: int
    published: list[LocalUpdate] = field(default_factory=list)
    told: list[int] = field(default_factory=list)

    def hold(self, states: Sequence[OuterState]) -> None:
        pass

    def merged(self, fragment: int, state: OuterState) -> None:
        pass

    def start_round(self, progress: Progress, steps_per_s: float) -> Start:
        return Start(inner_steps=self.inner_steps, num_peers=1, num_parts=self.num_parts)

    def step_done(self, inner_steps_done: int) -> None:
        self.told.append(inner_steps_done)

    def publish(self, contribution: LocalUpdate) -> None:
        self.published.append(contribution)

    def collect(self, fragment: int = 0) -> Averaged:
        own = self.published[-1]
        return Averaged(gradient=own.gradient, partners=("me",), weights=(own.tokens,), signer="me", roster_sha256="")


@dataclass
class SmallBatch(Alone):
    """Exchange of a peer whose steps have one sequence of the run's batch."""

    def start_round(self, progress: Progress, steps_per_s: float) -> Start:
        return Start(inner_steps=self.inner_steps, num_peers=1, num_parts=self.num_parts, batch_sequences=1)


@dataclass
class NoLoop:
    """Loop without a model, as its session sees it."""

    waited_s: float = 0.0
    position: int = 7
    told: list[str] = field(default_factory=list)
    added: int = 0
    """Steps since a round began or its gradient was taken."""
    bad_tokens: int = 0
    """Targets of those of them whose gradients were not finite."""

    def kept(self, room: Tensor | None) -> LoopCheckpoint:
        return LoopCheckpoint(
            batches=7, young_steps=None, moments=Moments(vectors=torch.zeros(2, 6), steps=torch.zeros(2))
        )

    def resume(self, part: LoopCheckpoint) -> None:
        self.told.append(f"resume at {part.batches}")

    def skip(self, tokens: int) -> None:
        self.told.append(f"skip {tokens // STEP}")

    def weights_replaced(self) -> None:
        self.told.append("replaced")

    def begin_round(self) -> None:
        self.added = 0

    def mean_gradient(self) -> tuple[Tensor, int]:
        added, bad_tokens = self.added, self.bad_tokens
        self.added = self.bad_tokens = 0
        return torch.full((6,), float(added)), max(1, added * STEP - bad_tokens)

    def end(self) -> None:
        self.told.append("end")


def parameters() -> HostParameters:
    """Six numbers in two tensors, and no model."""
    return HostParameters([("a", torch.arange(4.0).reshape(2, 2)), ("b", torch.ones(2))])


def rounds(
    sizes: list[int], inner_steps: int, num_parts: int = 1, clock: Clock | None = None
) -> tuple[Session, Alone, list[RoundReport], list[float]]:
    """Play steps of these sizes, each of a second (0: no further step in the round); returns rounds, and the schedule's
    inputs."""
    run, exchange, reports = run_file(inner_steps), Alone(inner_steps, num_parts), list[RoundReport]()
    clock = clock or Clock()
    session = Session(
        run=run, parameters=parameters(), loop=NoLoop(), exchange=exchange, report=reports.append, clock=clock
    )
    schedule, sizes = list[float](), [*sizes]
    while (ahead := session.next_step()) is not None:
        schedule.append(ahead.progress)
        size = sizes.pop(0) if sizes else 0
        if size:
            clock.now_s += 1.0
            session.step(size, 2.0, grad_norm=1.0)
        else:
            session.end_round()
    assert session.reason == "interrupted", "a round that has no step ends it"
    return session, exchange, reports, schedule


@pytest.mark.parametrize(
    ("sizes", "inner_steps", "tokens"),
    [
        ([64, 64, 64, 64], 2, [128, 128]),
        ([32, 32, 32, 32, 64, 64], 2, [128, 128]),
        ([96, 31, 1, 64, 63, 10], 2, [128, 137]),  # it ends at the step that fills it
        ([127, 127], 2, [254]),
        ([128, 200], 2, [128, 200]),
        ([1] * 128, 1, [64, 64]),
        ([64, 0, 64, 64, 0], 2, [64, 128]),  # over before it is full
    ],
)
def test_a_round_ends_at_the_step_that_fills_it(sizes: list[int], inner_steps: int, tokens: list[int]) -> None:
    session, exchange, reports, _ = rounds(sizes, inner_steps)
    assert [report.contribution.tokens for report in reports] == tokens
    assert [each.tokens for each in exchange.published] == tokens
    assert session.replica.own_tokens == session.progress.run_tokens == sum(tokens)
    assert [report.progress.round for report in reports] == list(range(1, len(tokens) + 1))
    assert [each.own_tokens for each in exchange.published] == [sum(tokens[: n + 1]) for n in range(len(tokens))]


@pytest.mark.parametrize(
    ("sizes", "num_parts", "parts"),
    [
        ([64] * 4, 4, [(1, 1, 64), (2, 2, 128), (3, 3, 192), (4, 4, 256)]),
        ([32] * 8, 4, [(1, 2, 64), (2, 4, 128), (3, 6, 192), (4, 8, 256)]),
        ([64] * 4, 2, [(1, 2, 128), (2, 4, 256)]),
        ([130, 126], 4, [(2, 1, 130), (4, 2, 256)]),  # what is passed by is not published
        ([255, 1], 4, [(3, 1, 255), (4, 2, 256)]),
        ([256], 4, [(4, 1, 256)]),
        ([300], 4, [(4, 1, 300)]),
        ([100, 100, 100], 4, [(1, 1, 100), (3, 2, 200), (4, 3, 300)]),
        ([64, 64, 0], 4, [(1, 1, 64), (2, 2, 128), (4, 2, 128)]),  # over at a part's end: its last part all the same
        ([64] * 4, 9, [(6, 1, 64), (7, 2, 128), (8, 3, 192), (9, 4, 256)]),  # fewer steps than parts
    ],
)
def test_each_part_is_published_once_with_what_there_is_by_then(
    sizes: list[int], num_parts: int, parts: list[tuple[int, int, int]]
) -> None:
    _, exchange, reports, _ = rounds(sizes, 4, num_parts)
    assert [(each.part, each.inner_steps, each.tokens) for each in exchange.published] == parts
    assert len(reports) == 1 and reports[0].contribution is exchange.published[-1]


def test_for_any_sizes_the_parts_rise_end_with_the_last_and_the_round_is_full() -> None:
    rng = random.Random(3)
    for _ in range(60):
        inner_steps, num_parts = rng.randrange(1, 9), rng.randrange(1, 7)
        sizes = [rng.choice([1, 16, 32, 63, 64, 65, rng.randrange(1, 65)]) for _ in range(rng.randrange(1, 40))]
        _, exchange, reports, _ = rounds(sizes, inner_steps, num_parts)
        of_rounds: dict[int, list[LocalUpdate]] = {}
        for each in exchange.published:
            of_rounds.setdefault(each.round, []).append(each)
        for report in reports:
            of_round = of_rounds[report.progress.round - 1]
            numbers, tokens = [each.part for each in of_round], [each.tokens for each in of_round]
            assert numbers == sorted(set(numbers)) and numbers[-1] == num_parts and numbers[0] >= 1
            assert tokens == sorted(tokens)
            is_last = report is reports[-1]
            assert is_last or inner_steps * STEP <= tokens[-1] < inner_steps * STEP + 65
            assert tokens[-1] <= run_file(inner_steps).max_round_tokens
        assert sum(report.contribution.tokens for report in reports) == sum(sizes)


def test_others_are_told_how_far_it_is_in_full_steps() -> None:
    _, exchange, _, _ = rounds([32, 32, 65, 63, 100, 100], 3)
    assert exchange.told == [0, 1, 2, 3, 1, 3]


def test_the_schedule_follows_the_tokens() -> None:
    session, _, _, schedule = rounds([32, 96, 64, 64], 2)
    total = session.run.run.total_tokens
    assert schedule[:4] == pytest.approx([tokens / total for tokens in (0, 32, 128, 192)])


def test_a_slow_peers_steps_are_its_own_and_its_speed_is_told_in_the_runs() -> None:
    """Its steps have a quarter of the run's batch: publications and ends follow its own steps."""
    run, exchange, reports, clock = run_file(8), SmallBatch(8, 2), list[RoundReport](), Clock()
    session = Session(
        run=run, parameters=parameters(), loop=NoLoop(), exchange=exchange, report=reports.append, clock=clock
    )
    for _ in range(8):
        ahead = session.next_step()
        assert ahead is not None and ahead.batch_sequences == 1
        clock.now_s += 1.0
        session.step(STEP // 4, 2.0)
    assert exchange.told == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [(each.inner_steps, each.tokens) for each in exchange.published] == [(4, STEP), (8, 2 * STEP)]
    assert [each.contribution.tokens for each in reports] == [2 * STEP]
    assert session.steps_per_s == pytest.approx(0.25), "two steps of the run's batch in eight seconds"


# ---------------------------------------------------------------- what a session does after which step


@dataclass
class Fragments(Alone):
    """Two fragments that are merged with nobody; it writes down in which order it was called, and takes its time."""

    num_parts: int = 4
    num_fragments: int = 2
    calls: list[str] = field(default_factory=list)
    clock: Clock = field(default_factory=Clock)
    gradients: list[Tensor] = field(default_factory=list)
    stops_at: str = ""
    replaced: Replaced | None = None
    shard: int | None = None
    run_tokens: int = 0
    states: dict[int, OuterState] = field(default_factory=dict)

    def _call(self, what: str, takes_s: float = 0.0) -> None:
        self.calls.append(what)
        self.clock.now_s += takes_s
        if what == self.stops_at:
            raise StopTraining

    def hold(self, states: Sequence[OuterState]) -> None:
        self.states = dict(enumerate(states))
        self._call("hold")

    def start_round(self, progress: Progress, steps_per_s: float) -> Start:
        self._call(f"start {progress.round}", 100.0)  # it waits for company: no part of the round
        return Start(
            inner_steps=self.inner_steps,
            num_peers=1,
            num_parts=self.num_parts,
            num_fragments=self.num_fragments,
            shard=self.shard,
        )

    def publish(self, contribution: LocalUpdate) -> None:
        super().publish(contribution)
        self._call(f"publish {contribution.part}", 0.25)

    def collect(self, fragment: int = 0) -> Gathered | Replaced:  # type: ignore[override]
        self._call(f"collect {fragment}", 0.5)
        if self.replaced is not None and fragment == self.num_fragments - 1:
            return self.replaced
        own, state = self.published[-1], self.states[fragment]
        self.gradients.append(own.gradient_of(fragment))
        self.run_tokens = own.own_tokens
        prepared = prepare(state, [], layout_of([tuple(state.theta.shape)]), 0.7)
        return Gathered(prepared=prepared, merged=(), run_tokens=self.run_tokens, peer_tokens={"me": self.run_tokens})

    def merged(self, fragment: int, state: OuterState) -> None:
        self.states[fragment] = state
        self._call(f"merged {fragment}", 1.0)


GOSSIP = RunFile.model_validate(
    {
        "run": {"total_tokens": 2 * 4 * STEP},
        "model": {"context_tokens": 16, "num_layers": 1, "width": 16, "num_heads": 2},
        "inner": {"batch_sequences": 4},
        "merge": {"method": "gossip", "inner_steps": 4, "fragments": 2, "outer_momentum": 0.5, "init": "common"},
    }
)


def four_tensors() -> dict[str, Tensor]:
    """Return four tensors of equal size: two fragments."""
    return {name: torch.arange(4.0).reshape(2, 2) + number for number, name in enumerate("abcd")}


@dataclass
class Lived:
    """Session without a model, and all that it reported."""

    exchange: Fragments
    tensors: dict[str, Tensor] = field(default_factory=four_tensors)
    loop: NoLoop = field(default_factory=NoLoop)
    reports: list[RoundReport] = field(default_factory=list)
    stops: bool = False
    session: Session = field(init=False)
    num_steps: int = 0
    source: type[ParameterSource] = HostParameters
    run: RunFile = GOSSIP
    worker: Worker | None = None

    def __post_init__(self) -> None:
        self.parameters = self.source(self.tensors.items())
        self.session = Session(
            run=self.run,
            parameters=self.parameters,
            loop=self.loop,
            exchange=self.exchange,
            report=lambda report: (self.reports.append(report), self.exchange.calls.append("report"))[0],
            on_new_state=lambda session: self.exchange.calls.append(f"settled {session.progress.round}"),
            should_stop=lambda: self.stops,
            worker=self.worker,
            clock=self.exchange.clock,
        )

    def train(self, most_steps: int = 1000) -> str:
        """Train as a loop would, by steps of a second each that add to every number."""
        while most_steps and self.session.next_step() is not None:
            most_steps -= 1
            self.step()
        return self.session.reason

    def step(self, loss: float = 2.0) -> None:
        self.num_steps += 1
        self.exchange.calls.append(f"step {self.num_steps}")
        self.exchange.clock.now_s += 1.0
        self.parameters.take_back()
        for tensor in self.tensors.values():
            tensor += 0.125 * self.num_steps
        self.loop.waited_s += 0.0625
        self.session.step(STEP, loss, grad_norm=float(self.num_steps), learning_rate=1e-3 * self.num_steps)


def test_it_publishes_merges_and_ends_rounds_after_the_steps_that_are_due() -> None:
    one = Lived(Fragments(4))
    assert one.train() == "total_tokens"
    assert one.exchange.calls == [
        *("hold", "start 0", "step 1", "publish 1"),
        *("step 2", "publish 2", "collect 0", "merged 0"),
        *("step 3", "publish 3"),
        *("step 4", "publish 4", "collect 1", "merged 1", "settled 1", "report"),
        *("start 1", "step 5", "publish 1"),
        *("step 6", "publish 2", "collect 0", "merged 0"),
        *("step 7", "publish 3"),
        *("step 8", "publish 4", "collect 1", "merged 1", "settled 2", "report"),
    ]
    assert one.session.next_step() is None and one.session.reason == "total_tokens", "asked again it says the same"


def test_steps_train_the_groups_of_their_round_and_the_others_are_not_published_with_tokens() -> None:
    tensors = {f"group{number % 2}/{name}": tensor for number, (name, tensor) in enumerate(four_tensors().items())}
    one, seen = Lived(Fragments(4), tensors=dict(sorted(tensors.items()))), list[list[str]]()
    one.session.groups_of_round = lambda round: frozenset([(round + 1) % 2])
    for _ in range(8):
        assert one.session.next_step() is not None
        seen.append([name for name, tensor in one.tensors.items() if tensor.requires_grad])
        with torch.no_grad():
            one.step()
    first, second = [name for name in tensors if "group1" in name], [name for name in tensors if "group0" in name]
    assert seen == 4 * [first] + 4 * [second]
    counted = [[(of.round, of.tokens // STEP) for of in each.fragment_rounds] for each in one.exchange.published]
    assert counted == [
        *([(0, 0), (0, 1)], [(0, 0), (0, 2)], [(1, 0), (0, 3)], [(1, 0), (0, 4)]),
        *([(1, 1), (1, 0)], [(1, 2), (1, 0)], [(2, 1), (1, 0)], [(2, 2), (1, 0)]),
    ]
    assert [each.trained for each in one.exchange.published] == 4 * [frozenset([1])] + 4 * [frozenset([0])]


def test_what_a_round_took_is_told_apart_from_what_it_waited() -> None:
    one = Lived(Fragments(4))
    one.train(4)
    (report,) = one.reports
    assert report.seconds == 4 * 1.0 + 4 * 0.25 + 2 * (0.5 + 1.0)
    assert report.merge_s == 0.25 + 0.5 + 1.0, "the end of the round"
    assert report.stall_s == 4 * 0.25 + 2 * (0.5 + 1.0) + 4 * 0.0625, "and what its steps waited"
    assert one.session.steps_per_s == 1.0, "neither counts for its speed"
    assert (report.loss, report.first_loss, report.grad_norm, report.learning_rate) == (2.0, 2.0, 2.5, 4e-3)
    assert (report.progress.round, report.progress.run_tokens, report.num_peers) == (1, 4 * STEP, 1)


@pytest.mark.parametrize("stops_at", ["start 1", "publish 1", "collect 0", "publish 4", "collect 1"])
def test_who_is_stopped_anywhere_goes_on_as_if_it_had_been_killed_then(stops_at: str) -> None:
    """From its fragments' last merges, by which the round's tokens are given up."""
    one, killed = Lived(Fragments(4)), Lived(Fragments(4))
    one.train(4)
    one.exchange.stops_at = stops_at
    assert one.train() == "interrupted" and not one.session.is_in_round
    assert one.session.progress.round == 1 and one.session.replica.own_tokens == 4 * STEP
    own = one.session.local_checkpoint(None)
    killed.session.resume(one.session.replica.state.frozen(), one.session.progress, own)
    killed.exchange.clock.now_s = one.exchange.clock.now_s
    one.exchange.stops_at = ""
    for each in (one, killed):
        each.exchange.calls.clear()
        each.num_steps = 4
        assert each.train() == "total_tokens"
    assert one.exchange.calls == killed.exchange.calls
    assert one.exchange.calls[:3] == ["hold", "start 1", "step 5"]
    assert one.session.replica.own_tokens == one.session.progress.run_tokens == 8 * STEP
    for name in "abcd":
        assert torch.equal(one.tensors[name], killed.tensors[name])


def test_a_flag_stops_it_before_a_step_and_a_loop_within_one() -> None:
    one = Lived(Fragments(4))
    one.train(1)
    one.stops = True
    assert one.session.next_step() is None and one.session.reason == "interrupted"
    one.stops = False
    assert one.session.next_step() is not None and one.session.reason == ""
    one.session.interrupt()  # the loop gave its batch up
    assert one.session.next_step() is None and one.session.reason == "interrupted"
    with pytest.raises(RuntimeError, match="ask `next_step`"):
        one.session.step(STEP, 1.0)
    with pytest.raises(RuntimeError, match="ask `next_step`"):
        one.session.end_round()
    assert one.session.next_step() is not None, "after a pause it goes on"


def test_a_state_of_others_in_place_of_a_merge_is_settled_and_not_reported() -> None:
    one = Lived(Fragments(4))
    theta = torch.arange(16.0)
    progress = Progress(round=7, run_tokens=5 * STEP, peer_tokens={"me": 1})
    one.exchange.replaced = Replaced(
        state=OuterState(theta, torch.ones(16)), progress=progress, from_peer="x", reason="behind"
    )
    one.train(4)
    assert one.exchange.calls[-3:] == ["publish 4", "collect 1", "settled 7"] and not one.reports
    assert one.loop.told == ["replaced"] and one.session.progress is progress
    assert one.session.replica.own_tokens == 4 * STEP, "what it did was published, and counts"
    assert not one.session.replica.is_entered
    state, lent, reached = one.exchange.states[1], one.exchange.published[-1], one.parameters.read()
    one.exchange.replaced, one.num_steps = None, 0
    ahead = one.session.next_step()
    assert ahead is not None and ahead.progress == 5 / 8, "of the run, as the others count"
    assert one.exchange.calls[-2:] == ["hold", "start 7"]
    assert torch.equal(one.parameters.read(), theta), "the round begins with these"
    published = state.theta - one.session.replica.fragments[1].of(reached)
    assert torch.equal(lent.gradient_of(1), published), "nobody had asked for it before"


def test_training_that_diverged_is_told_in_one_line() -> None:
    one = Lived(Fragments(4))
    with raises_code("training-diverged", RunTimeError):
        while one.session.next_step() is not None:
            one.step(loss=math.nan)
    assert one.num_steps == 4 and "publish 4" not in one.exchange.calls
    one = Lived(Fragments(4))
    for loss in (math.nan, 3.0, math.inf, 5.0):
        assert one.session.next_step() is not None
        one.step(loss)
    assert (one.reports[0].loss, one.reports[0].first_loss) == (4.0, 3.0), "of those that are finite"


def test_a_checkpoint_is_the_replica_the_counters_and_what_the_loop_keeps() -> None:
    one = Lived(Fragments(4))
    one.train(4)
    own = one.session.local_checkpoint(None)
    assert (own.batches, own.own_tokens, own.steps_per_s) == (7, 4 * STEP, 1.0)
    again = Lived(Fragments(4))
    again.session.resume(one.session.replica.state.frozen(), one.session.progress, own)
    assert again.loop.told == ["resume at 7"] and again.session.steps_per_s == 1.0
    for each in (one, again):
        each.session.replica.restart()  # one of them was not killed
        each.num_steps = 4
        each.exchange.calls.clear()
        assert each.train() == "total_tokens"
    assert again.exchange.calls == one.exchange.calls
    assert all(torch.equal(one.tensors[name], again.tensors[name]) for name in "abcd")
    assert again.session.progress == one.session.progress


def test_a_round_is_planned_by_what_is_read_and_counts_by_its_targets() -> None:
    run, exchange, reports = run_file(2), Alone(2, 1), list[RoundReport]()
    session = Session(run=run, parameters=parameters(), loop=NoLoop(), exchange=exchange, report=reports.append)
    assert session.learnt_share == 1.0, "all tokens of a text"
    for targets, loss in ((16, 4.0), (0, 0.0), (48, 2.0), (16, 4.0)):
        ahead = session.next_step()
        assert ahead is not None
        session.step(targets, loss, read_tokens=STEP)
    assert [own.tokens for own in exchange.published] == [16, 64] and exchange.told == [1, 2, 1, 2]
    assert [own.inner_steps for own in exchange.published] == [2, 2]
    assert [report.loss for report in reports] == [4.0, 2.5], "a step without a target has no loss"
    assert session.replica.own_tokens == 80 and session.learnt_share == 80 / (4 * STEP)
    samples = run.model_copy(update={"data": run.data.model_copy(update={"packing": "documents"})})
    unknown = Session(run=samples, parameters=parameters(), loop=NoLoop(), exchange=exchange, report=reports.append)
    assert unknown.learnt_share == 0.0


@pytest.mark.parametrize(("merged", "skipped"), [(0, 0), (-5, 0), (3 * STEP, 3), (16 * STEP, 16), (16 * STEP + 1, 0)])
def test_tokens_that_others_merged_are_skipped_unless_they_are_a_few_rounds(merged: int, skipped: int) -> None:
    one = Lived(Fragments(4))
    assert one.session.skip_merged(merged) == (skipped > 0)
    assert one.loop.told == ([f"skip {skipped}"] if skipped else [])
    assert one.session.replica.own_tokens == skipped * STEP


def test_at_the_end_what_is_lent_is_taken_back_and_the_loop_lets_go() -> None:
    one = Lived(Fragments(4))
    one.train(1)
    before = one.parameters.read()
    lent = one.exchange.published[-1]
    one.session.end()
    for tensor in one.tensors.values():
        tensor.zero_()
    gradients = torch.cat([lent.gradient_of(fragment) for fragment in range(2)])
    states = torch.cat([one.session.replica.state_of(fragment).theta for fragment in range(2)])
    reached = torch.cat([fragment.of(before) for fragment in one.session.replica.fragments])
    assert torch.equal(gradients, states - reached) and one.loop.told == ["end"]


# ---------------------------------------------------------------- parameters of other kinds


@pytest.mark.parametrize("stops_at", ["publish 1", "collect 0", "publish 4", "collect 1"])
def test_parameters_on_a_device_go_on_from_a_stop_as_those_in_main_memory(stops_at: str) -> None:
    both = [Lived(Fragments(4, stops_at=stops_at), source=source) for source in (DeviceParameters, HostParameters)]
    for each in both:
        assert each.train() == "interrupted"
        each.exchange.stops_at = ""
        assert each.train() == "total_tokens"
    one, plain = both
    assert one.exchange.calls == plain.exchange.calls
    assert torch.equal(one.session.replica.state.theta, plain.session.replica.state.theta)
    assert all(torch.equal(one.tensors[name], plain.tensors[name]) for name in "abcd")


def test_a_loop_of_ones_own_trains_by_rounds() -> None:
    """Another model, another optimizer: the session asks for nothing but names, and that weights are taken back."""
    torch.manual_seed(0)
    model, x = torch.nn.Linear(4, 4), torch.randn(8, 4)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    parameters = HostParameters(model.named_parameters())
    optimizer.register_step_pre_hook(lambda *_: parameters.take_back())
    exchange, losses = Fragments(4, num_fragments=2), list[float]()
    session = Session(
        run=GOSSIP,
        parameters=parameters,
        loop=NoLoop(),
        exchange=exchange,
        report=lambda report: losses.append(report.loss),
    )
    while session.next_step() is not None:
        optimizer.zero_grad()
        loss = (model(x) - x).square().mean()
        loss.backward()
        optimizer.step()
        session.step(STEP, float(loss.detach()))
    assert session.reason == "total_tokens" and len(losses) == 2 and losses[1] < losses[0]
    (*_, last) = session.replica.fragments  # it was merged at the end
    assert torch.equal(last.of(parameters.read()), session.replica.state_of(1).theta)


def test_what_is_lent_twice_without_a_step_between_is_taken_back_twice() -> None:
    """As when no further microbatch comes just after a part was published, and the round ends with that."""
    one = Lived(Fragments(4))
    first, before = one.session.replica.fragments[0], one.parameters.read()
    lent = [one.parameters.lend(first, torch.zeros(8)) for _ in range(2)]
    one.parameters.write(torch.ones(8), first)
    for each in lent:
        assert torch.equal(each.gradient(), -first.of(before))


def test_writing_a_fragment_takes_back_what_is_lent_of_it_and_no_other() -> None:
    one = Lived(Fragments(4))
    first, second = one.session.replica.fragments
    before = one.parameters.read()
    lent = [one.parameters.lend(fragment, torch.zeros(8)) for fragment in (first, second)]
    one.parameters.write(torch.ones(8), first)
    for tensor in second.pick(list(one.tensors.values())):
        tensor.fill_(5.0)
    assert torch.equal(lent[0].gradient(), -first.of(before))
    assert torch.equal(lent[1].gradient(), torch.full((8,), -5.0)), "made when it is asked for"


@dataclass
class Together(Alone):
    """Exchange of one large batch, which is there after so many tokens of this peer."""

    ends_at: list[int] = field(default_factory=list)

    def start_round(self, progress: Progress, steps_per_s: float) -> Start:
        ends_at = self.ends_at.pop(0)
        return Start(inner_steps=self.inner_steps, num_peers=2, is_over=lambda tokens: tokens >= ends_at)

    def collect(self, fragment: int = 0) -> BatchMean:
        own, zeros = self.published[-1], torch.zeros(6)
        constants = inner_constants(run_file(4))
        return BatchMean(
            gradient=own.gradient + zeros,
            partners=("me",),
            weights=(own.tokens,),
            signer="me",
            roster_sha256="",
            optimizer=CommonOptimizer([(2, 2), (2,)], constants),
            at=CommonStep(len(self.published), 0.5),
        )


def test_a_large_batch_ends_when_all_have_it_and_its_gradients_are_of_the_same_weights() -> None:
    run = run_file(9, stages=1)
    run = run.model_copy(update={"merge": run.merge.model_copy(update={"method": "batch", "fragments": 1})})
    exchange, reports, loop, schedule = (
        Together(9, 1, ends_at=[3 * STEP, STEP, 10**9]),
        list[RoundReport](),
        NoLoop(),
        [],
    )
    session = Session(run=run, parameters=parameters(), loop=loop, exchange=exchange, report=reports.append)
    weights, loop.bad_tokens = list[list[float]](), STEP
    for _ in range(5):
        ahead = session.next_step()
        assert ahead is not None
        schedule.append(ahead.progress)
        weights.append(session.parameters.read().tolist())
        loop.added += 1
        session.step(STEP, 2.0)
    assert [report.contribution.inner_steps for report in reports] == [3, 1]
    assert [own.gradient.tolist() for own in exchange.published] == [[3.0] * 6, [1.0] * 6]
    assert [own.tokens for own in exchange.published] == [2 * STEP, STEP], "without those of gradients not finite"
    assert session.replica.own_tokens == session.progress.run_tokens == 3 * STEP
    assert weights[0] == weights[1] == weights[2] != weights[3] != weights[4], "they change between batches"
    assert schedule[0] == schedule[2] < schedule[3], "the step is of the weights at its start"
    assert session.replica.state.momentum.shape == (12,)
    session.interrupt()
    assert session.next_step() is None
    exchange.ends_at.append(10**9)
    assert session.next_step() is not None and loop.added == 0, "what was added up before a pause is dropped"


def test_of_samples_a_batch_is_measured_in_what_was_read_of_them() -> None:
    run = run_file(9, stages=1)
    run = run.model_copy(update={"merge": run.merge.model_copy(update={"method": "batch", "fragments": 1})})
    exchange, reports, loop = Together(9, 1, ends_at=[2 * STEP]), list[RoundReport](), NoLoop()
    session = Session(run=run, parameters=parameters(), loop=loop, exchange=exchange, report=reports.append)
    for _ in range(2):
        assert session.next_step() is not None and not reports
        loop.added += 1
        session.step(STEP // 4, 2.0, read_tokens=STEP)
    assert [report.contribution.inner_steps for report in reports] == [2]


@dataclass
class ByHand:
    """Worker whose merge is done when the test says so."""

    work: list[Callable[[], Any]] = field(default_factory=list)
    is_done: bool = False

    def __call__(self, work: Callable[[], Any]) -> ByHand:
        self.work.append(work)
        return self

    def done(self) -> bool:
        return self.is_done

    def result(self) -> Any:
        return self.work[-1]()


def test_with_delayed_steps_gradients_at_the_old_weights_are_of_the_next_batch() -> None:
    run = run_file(9, stages=1)
    run = run.model_copy(update={"merge": run.merge.model_copy(update={"method": "batch", "fragments": 1})})
    exchange, reports, loop, worker = (
        Together(9, 1, ends_at=[2 * STEP, 4 * STEP]),
        list[RoundReport](),
        NoLoop(),
        ByHand(),
    )
    session = Session(
        run=run, parameters=parameters(), loop=loop, exchange=exchange, report=reports.append, worker=worker
    )
    weights = list[list[float]]()
    for step in range(6):
        worker.is_done = step == 4
        assert session.next_step() is not None
        weights.append(session.parameters.read().tolist())
        loop.added += 1
        session.step(STEP, 2.0)
    assert weights[0] == weights[1] == weights[2] == weights[3] != weights[4] == weights[5]
    assert [own.gradient.tolist() for own in exchange.published] == [[2.0] * 6], "the second is not merged yet"
    assert len(reports) == 1 and reports[0].contribution.inner_steps == 2
    assert len(worker.work) == 2 and loop.added == 0, "two steps at the old weights and two at the new ones"
    worker.is_done = True
    exchange.ends_at.append(9 * STEP)
    assert session.next_step() is not None
    assert [own.gradient.tolist() for own in exchange.published] == [[2.0] * 6, [4.0] * 6]

"""A session without a model: which steps of which sizes publish, merge and end rounds, and what is told of them.

Rounds are counted in tokens: a stage's inner steps are not all of one size.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from swarmtrain.algorithm.inner import Moments
from swarmtrain.algorithm.outer import OuterState
from swarmtrain.peer.parameters import HostParameters
from swarmtrain.peer.session import LoopPart, RoundReport, Session, Start
from swarmtrain.peer.updates import Averaged, Contribution
from swarmtrain.protocol.progress import Progress
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
    """An exchange without partners, which keeps what it is told."""

    inner_steps: int
    num_parts: int
    published: list[Contribution] = field(default_factory=list)
    told: list[int] = field(default_factory=list)

    def hold(self, states: Sequence[OuterState]) -> None:
        pass

    def merged(self, fragment: int, state: OuterState) -> None:
        pass

    def start_round(self, progress: Progress, steps_per_s: float) -> Start:
        return Start(inner_steps=self.inner_steps, num_peers=1, num_parts=self.num_parts)

    def step_done(self, inner_steps_done: int) -> None:
        self.told.append(inner_steps_done)

    def publish(self, contribution: Contribution) -> None:
        self.published.append(contribution)

    def collect(self, fragment: int = 0) -> Averaged:
        own = self.published[-1]
        return Averaged(gradient=own.gradient, partners=("me",), weights=(own.tokens,), signer="me", roster_sha256="")


@dataclass
class NoLoop:
    """What a loop without anything of its own tells its session."""

    waited_s: float = 0.0
    told: list[str] = field(default_factory=list)

    def kept(self, room: Tensor | None) -> LoopPart:
        return LoopPart(batches=7, young_steps=None, moments=Moments(vectors=torch.zeros(2, 6), steps=torch.zeros(2)))

    def resume(self, part: LoopPart) -> None:
        self.told.append(f"resume at {part.batches}")

    def skip(self, num_batches: int) -> None:
        self.told.append(f"skip {num_batches}")

    def weights_replaced(self) -> None:
        self.told.append("replaced")

    def end(self) -> None:
        self.told.append("end")


def parameters() -> HostParameters:
    """Six numbers in two tensors, and no model."""
    return HostParameters([("a", torch.arange(4.0).reshape(2, 2)), ("b", torch.ones(2))])


def rounds(
    sizes: list[int], inner_steps: int, num_parts: int = 1, clock: Clock | None = None
) -> tuple[Session, Alone, list[RoundReport], list[float]]:
    """What becomes of steps of these sizes, each of which takes a second; 0: no further step comes in the round. And
    what the schedule went by."""
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
        of_rounds: dict[int, list[Contribution]] = {}
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


def test_speed_is_told_in_full_steps() -> None:
    session, _, _, _ = rounds([16] * 8, 2)
    assert session.steps_per_s == 2 / 8

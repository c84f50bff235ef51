"""Scenario files of the chaos tests, and the evaluation of their results; `make chaos` plays them."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from chaos import seen
from chaos.scenarios import read

CHAOS = Path(__file__).parent / "chaos"
SCENARIOS = sorted(CHAOS.glob("*.toml"))


@pytest.mark.parametrize("path", SCENARIOS, ids=lambda path: path.stem)
def test_each_file_is_a_scenario(path: Path) -> None:
    scenario = read(path)
    assert scenario.says and (scenario.steps or scenario.name == "none")
    assert all((CHAOS.parents[1] / name).is_file() for name in scenario.files)
    assert not scenario.without.steps and scenario.without.total_tokens == scenario.total_tokens


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("volunters = 3", "'volunters' is not known: did you mean volunteers?"),
        ('steps = [{ do = "unplause" }]', "'unplause' is not known: did you mean unpause?"),
        ("victims = 9", "9 victims of 4 volunteers"),
    ],
)
def test_what_is_not_known_is_said(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "wrong.toml"
    path.write_text(f'says = "wrong"\n{text}\n')
    with pytest.raises(ValueError, match=problem):
        read(path)


def rounds(*ends: float, partners: tuple[str, ...] = ("ben",)) -> list[dict[str, object]]:
    usual = {"seconds": 2.0, "inner_steps": 10, "stall_s": 0.1, "partners": partners}
    return [{"time": end, **usual} for end in ends]


def test_a_gap_is_what_a_round_took_longer_than_usual() -> None:
    told = rounds(2.0, 4.0, 6.0, 8.0, 13.0, 15.0)
    assert seen.gap_s(told, since_s=7.0, until_s=16.0) == 3.0
    assert seen.gap_s(told, since_s=7.0, until_s=30.0) == 13.0, "and none at all counts too"
    assert seen.gap_s([], since_s=7.0, until_s=30.0) == 23.0
    short = [event | {"seconds": 0.4, "inner_steps": 2} for event in rounds(2.0, 2.4, 2.8)]
    assert seen.gap_s([*short, *rounds(5.0, 7.0)], since_s=3.0, until_s=7.5) == pytest.approx(0.2)
    assert seen.gap_s([*short, *rounds(3.4)], since_s=3.0, until_s=4.0) == 0.0, "its round is a whole one"


def test_the_stall_is_of_the_rounds_of_that_time() -> None:
    assert seen.stall_share([rounds(2.0, 4.0), rounds(5.0)], 3.0, 9.0) == pytest.approx(0.05)
    assert seen.stall_share([], 0.0, 9.0) == 0.0


def test_back_is_who_merges_one_that_was_no_victim() -> None:
    told = [*rounds(4.0, 6.0), *rounds(11.0, partners=("victim",)), *rounds(13.0)]
    assert seen.returned_s(told, frozenset({"ben"}), 10.0) == 3.0
    assert seen.returned_s(told, frozenset({"cleo"}), 10.0) == math.inf


def test_tokens_that_are_counted_no_more_are_lost() -> None:
    assert seen.tokens_lost({"a": 5, "b": 7}, {"a": 9, "b": 4}) == 3
    assert seen.tokens_lost({"a": 5}, {}) == 5
    assert seen.contributions([{"peer": "a", "tokens": 5}]) == {"a": 5}


def test_the_loss_is_the_mean_of_those_who_measured_it() -> None:
    assert seen.held_out_loss([{"held_out_loss": 1.0}, {"held_out_loss": None}, {"held_out_loss": 2.0}]) == 1.5
    assert math.isnan(seen.held_out_loss([]))


def test_what_grows_is_said_and_noise_is_not() -> None:
    before = seen.Held(300 << 20, 40, 50)
    assert seen.grown(before, seen.Held(330 << 20, 45, 60)) == ""
    words = seen.grown(before, seen.Held(500 << 20, 80, 90))
    assert words == "500 MiB of memory instead of 300, 80 threads instead of 40, 90 files instead of 50"


def test_the_weights_are_as_near_as_before_after_so_many_rounds() -> None:
    def told(*pairs: tuple[float, float | None]) -> list[dict[str, object]]:
        return [{"time": time_s, "consensus_spread": spread} for time_s, spread in pairs]

    before = [(1.0, None), (2.0, 0.2), (3.0, 0.1), (4.0, 0.3)]
    assert seen.spread_returned(told(*before, (6.0, 0.9), (8.0, 0.5), (9.0, None), (10.0, 0.2)), 5.0, 7.0) == 3
    assert seen.spread_returned(told(*before, (8.0, 0.5)), 5.0, 7.0) == math.inf, "it never was, in the round there is"


def test_a_usual_round_is_one_of_those_before() -> None:
    slow = [event | {"seconds": 30.0} for event in rounds(40.0, 70.0, 100.0)]
    assert seen.usual_s([*rounds(2.0, 4.0), *slow], 10.0) == 2.0 and seen.usual_s(slow, 10.0) == 0.0

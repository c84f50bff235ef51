"""Scenario files: what they may say, and what is said of what they must not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from codes import raises_code
from learnt import tiny, write_scenario

from swarmtrain.errors import UserError
from swarmtrain.simulate.comparison import plays_of
from swarmtrain.simulate.learning.methods import METHODS
from swarmtrain.simulate.scenario import load_scenario

EXAMPLES = sorted((Path(__file__).parents[2] / "examples" / "scenarios").glob("*.toml"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_each_example_is_a_scenario(path: Path) -> None:
    scenario = load_scenario(path)
    assert scenario.scenario.name == path.stem and set(scenario.scenario.methods) <= METHODS.keys()
    assert plays_of(scenario, {}), "each point of its grid is a run file, and each method can be told it"


def test_what_a_scenario_changes_is_changed(tmp_path: Path) -> None:
    scenario = tiny(tmp_path, set={"run.total_tokens": 5000}, grid={"merge.outer_momentum": [0.1, 0.9]})
    first, second = scenario.points()
    assert scenario.run(7, first).merge.outer_momentum == 0.1 and scenario.run(7, second).merge.outer_momentum == 0.9
    assert scenario.run(7).run.seed == 7 and scenario.run(7).run.total_tokens == 5000
    assert scenario.peers.step_s == (0.01, 0.015, 0.03)
    more = scenario.with_changes(seeds=(1, 2), methods=("diloco",), changes={"merge.inner_steps": 3}, grid={})
    assert (more.scenario.seeds, more.scenario.methods) == ((1, 2), ("diloco",))
    assert more.run(1).merge.inner_steps == 3 and more.run(1).run.total_tokens == 5000


def test_a_grid_can_be_of_the_scenario_itself(tmp_path: Path) -> None:
    scenario = tiny(tmp_path, grid={"peers.number": [2, 5], "merge.outer_momentum": [0.1]}, set={"links.up_mbit": 3.0})
    first, second = scenario.points()
    assert scenario.links.up_mbit == 3.0 and scenario.links.down_mbit == 10.0
    assert [len(scenario.at(point).peers.step_s) for point in (first, second)] == [2, 5]
    assert scenario.run(0, second).merge.outer_momentum == 0.1
    set_one = scenario.with_changes(changes={"peers.number": 4})
    assert set_one.peers.number == 4 and list(set_one.grid) == ["merge.outer_momentum"]


def test_rounds_are_shared_among_all(tmp_path: Path) -> None:
    scenario = tiny(tmp_path, peers={"round_steps": 24}, grid={"peers.number": [2, 4, 100]})
    assert [scenario.at(point).run(0, point).merge.inner_steps for point in scenario.points()] == [12, 6, 1]
    assert scenario.run(0, (("merge.inner_steps", 9),)).merge.inner_steps == 9, "what is said there"


def test_slowdowns_are_gone_through_again(tmp_path: Path) -> None:
    scenario = tiny(tmp_path, peers={"number": 5, "step_ms": 10, "slowdowns": [1, 2]})
    assert scenario.peers.step_s == (0.01, 0.02, 0.01, 0.02, 0.01)


@pytest.mark.parametrize(
    ("sections", "code", "says"),
    [
        ({"scenario": {"sedes": [1]}}, "unknown-key", "scenario.sedes: unknown key; did you mean scenario.seeds?"),
        ({"scenario": {"seeds": []}}, "out-of-range", "scenario.seeds: "),
        ({"scenario": {"methods": ["gossip", "gossip"]}}, "bad-value", "scenario.methods: "),
        ({"peers": {"slowdowns": [0]}}, "bad-value", "peers.slowdowns: "),
        ({"links": {"rtt": 3}}, "unknown-key", "links.rtt: unknown key; did you mean links.rtt_ms?"),
        ({"set": {"momentum": 0.5}}, "bad-assignment", "momentum: "),
        ({"grid": {"merge.outer_momentum": 0.5}}, "wrong-type", "grid.merge.outer_momentum: "),
        ({"hangs": [{"peer": 3, "at_s": 1, "for_s": 1}]}, "no-such-volunteer", "hangs.peer: there is no volunteer 3; "),
        ({"hostile": {"attack": "sing-flip"}}, "bad-value", "there are absent, sign-flip"),
        ({"hostile": {"attack": "copycat x2"}}, "bad-value", "hostile.attack: "),
        ({"hostile": {"attack": "noise xx"}}, "bad-value", "hostile.attack: "),
        ({"hostile": {"percent": 90}}, "keys-disagree", "hostile.percent: "),
        ({"set": {"peers.number": 0}}, "out-of-range", "peers.number: "),
        ({"set": {"hostile.procent": 1}}, "unknown-key", "did you mean hostile.percent?"),
        ({"away": [{"peer": 3, "at_s": 1, "for_s": 1}]}, "no-such-volunteer", "away.peer: there is no volunteer 3; "),
        ({"away": [{"peer": 0, "at_s": at_s, "for_s": 2} for at_s in (4, 3)]}, "keys-disagree", "at 4 s"),
        ({"away": [{"peer": 0, "at_s": 1, "for_s": 1}], "churn": {"stays_s": 5}}, "keys-disagree", "churn.stays_s: "),
        ({"away": [{"peer": 0, "at_s": 1, "for": 1}]}, "unknown-key", "did you mean away.for_s?"),
        ({"hangs": {"peer": 0}}, "wrong-type", "write [[hangs]]"),
        ({"set": 3}, "wrong-type", "write [set]"),
        ({"scenario": {"run": "nothing.toml"}}, "file-unreadable", "nothing.toml: "),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, sections: dict[str, Any], code: str, says: str) -> None:
    with raises_code(code, UserError, says):
        load_scenario(write_scenario(tmp_path, **sections))


@pytest.mark.parametrize(
    ("sections", "code", "says"),
    [
        ({"set": {"merge.outer_momentun": 0.5}}, "unknown-key", "did you mean merge.outer_momentum?"),
        ({"grid": {"merge.outer_momentum": [0.5, 7]}}, "out-of-range", "merge.outer_momentum: 7 "),
        ({"set": {"model.width": 0}}, "out-of-range", "model.width: "),
        ({"grid": {"hostile.attack": ["absent", "flip"]}}, "bad-value", "hostile.attack: "),
        ({"scenario": {"methods": ["noloco"]}, "churn": {"stays_s": 9}}, "keys-disagree", "method noloco: "),
        ({"hostile": {"percent": 10, "attack": "noise"}}, "keys-disagree", "hostile.percent: 10 % of 3 "),
        ({"scenario": {"methods": ["diloco"]}, "hostile": {"percent": 40}}, "keys-disagree", "method diloco: "),
    ],
)
def test_what_no_run_file_can_say_is_said_before_the_work(
    tmp_path: Path, sections: dict[str, Any], code: str, says: str
) -> None:
    with raises_code(code, UserError, says):
        plays_of(load_scenario(write_scenario(tmp_path, **sections)), {})


@pytest.mark.parametrize("told", [{"changes": {"scenario.seeds": (1,)}}, {"grid": {"scenario.name": ("a", "b")}}])
def test_of_a_scenario_itself_little_can_be_changed(tmp_path: Path, told: dict[str, Any]) -> None:
    scenario = tiny(tmp_path)
    assert scenario.with_changes(changes={"scenario.rounds": 7}).scenario.rounds == 7
    with raises_code("key-not-changeable", UserError):
        scenario.with_changes(**told)


def test_no_scenario(tmp_path: Path) -> None:
    with raises_code("file-unreadable", UserError, "heterogeneous.toml"):
        load_scenario(tmp_path / "nowhere.toml")

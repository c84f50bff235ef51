"""Whole swarms without tensors."""

from __future__ import annotations

import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from codes import raises_code

from swarmtrain.errors import UserError
from swarmtrain.protocol.gossip.pulls import PublicationBytes
from swarmtrain.simulate.comparison import compare, document
from swarmtrain.simulate.scenario import ScenarioChurn, load_scenario
from swarmtrain.simulate.systems.messages import SimulatedLink
from swarmtrain.simulate.systems.play import MachineDistribution, SystemsSwarm, play, play_scenario
from swarmtrain.simulate.systems.publications import SimulatedGossipSettings

pytestmark = pytest.mark.slow

SETTINGS = SimulatedGossipSettings(
    inner_steps=16, keeps_past=False, sizes=PublicationBytes(weights=2_000_000, gradient=1_000_000), presence_ttl_s=12.0
)
HOME = SimulatedLink(latency_s=0.02, bytes_per_s=2.5e6, down_bytes_per_s=12.5e6)
NOBODY_GOES = ScenarioChurn()
COMING_AND_GOING = ScenarioChurn(stays_s=120.0, away_s=20.0, hangs_after_s=200.0, hangs_for_s=10.0)


def unequal(number: int, **more: Any) -> MachineDistribution:
    return MachineDistribution(number=number, slowdowns=(1.0, 2.0, 4.0), link=HOME, link_spread=0.3, **more)


def test_the_same_seed_is_the_same_swarm_and_another_is_another() -> None:
    played = [play(SETTINGS, unequal(30, spread=0.2), COMING_AND_GOING, 8, seed) for seed in (0, 0, 1)]
    assert replace(played[0], held_out_loss=0.0) == replace(played[1], held_out_loss=0.0)
    assert played[0].tokens != played[2].tokens


def test_a_swarm_mixes_and_nobody_waits() -> None:
    found = play(SETTINGS, unequal(60), NOBODY_GOES, 12)
    assert found.spread is not None and found.spread < 0.01
    assert found.fresh_share is not None and found.fresh_share > 0.97
    assert found.stall_share == 0 and found.tokens_lost == 0
    assert found.throughput_share == pytest.approx(1.0, abs=0.01), "less than a step of each is not counted"


def test_who_crashes_takes_unpublished_work_along_and_the_others_go_on() -> None:
    found = play(SETTINGS, unequal(60), COMING_AND_GOING, 20)
    assert found.tokens_lost > 0
    assert found.fresh_share is not None and found.fresh_share > 0.95
    assert found.throughput_share is not None and 0.75 < found.throughput_share < 0.98
    assert 0 < found.stall_share < 0.02, "a newcomer waits for a state"


def test_what_is_trained_counts_or_is_lost() -> None:
    """Of those who leave in the middle of a round, too, and of those who are in the middle of one at the end."""
    found = play(SETTINGS, unequal(60), ScenarioChurn(stays_s=240.0, away_s=20.0, crash_share=0.0), 20)
    assert found.tokens_lost > 0 and found.throughput_share is not None
    trained_share = found.throughput_share * (found.tokens + found.tokens_lost) / found.tokens
    assert trained_share == pytest.approx(1.0 - found.stall_share, abs=0.01)


def test_what_one_had_done_that_goes_while_it_hangs_is_lost() -> None:
    swarm = SystemsSwarm(SETTINGS, unequal(1), ScenarioChurn(crash_share=0.0))
    swarm.populate()
    swarm.run_until(28.0)
    (peer,) = swarm.running()
    done = peer.steps_done
    swarm.freeze(peer.name)
    swarm.run_until(38.0)
    swarm._go(peer, 0, 0)
    assert swarm.outcome().tokens_lost == done * SETTINGS.tokens_per_step > 0


def test_to_look_at_the_outcome_changes_nothing() -> None:
    swarm = SystemsSwarm(SETTINGS, unequal(4), NOBODY_GOES)
    swarm.populate()
    swarm.run_until(40.0)
    first, second = (replace(swarm.outcome(), held_out_loss=0.0) for _ in "12")
    assert first == second and first.throughput_share


def test_the_state_that_a_newcomer_takes_is_traffic() -> None:
    swarm = SystemsSwarm(replace(SETTINGS, state_bytes=4_000_000), unequal(2), NOBODY_GOES)
    swarm.found("a")
    swarm.at(0.1, swarm.join, "b")
    swarm.run_until(2.0)
    assert swarm.outcome().sent_bytes == swarm.peers["a"].bytes_up == 4_000_000


def test_traffic_of_a_volunteer_does_not_grow_with_the_swarm() -> None:
    small, large = (play(SETTINGS, unequal(number), NOBODY_GOES, 8) for number in (12, 120))
    assert small.received_bytes_a_round is not None and large.received_bytes_a_round is not None
    assert large.received_bytes_a_round == pytest.approx(small.received_bytes_a_round, rel=0.05)


def test_the_cheap_rule_for_links_agrees_with_max_min_fair_ones() -> None:
    """Of those who pull all the time: of their uplinks they plan to use two thirds. `test_shared_links.py` has fuller
    ones."""
    busy = replace(SETTINGS, sizes=PublicationBytes(weights=8_000_000, gradient=4_000_000))

    def figures(exact: bool) -> list[float]:
        swarm = SystemsSwarm(busy, unequal(60), NOBODY_GOES)
        swarm.links.exact = exact
        swarm.populate()
        swarm.run_until(8 * 16.0)
        found, seen = swarm.outcome(), [peer.engine.bytes_per_s for peer in swarm.running()]
        assert found.received_bytes_a_round and found.fresh_share
        return [found.received_bytes_a_round, found.fresh_share, statistics.mean(rate for rate in seen if rate)]

    exact, cheap = figures(True), figures(False)
    assert exact[0] / 16.0 > 0.5 * HOME.bytes_per_s
    assert cheap == pytest.approx(exact, rel=0.05)


def test_many_have_the_cheap_rule_from_the_first_transfer_on() -> None:
    swarm = SystemsSwarm(SETTINGS, unequal(501), NOBODY_GOES)
    swarm.populate()
    swarm.run_until(10.0)
    assert len(swarm.peers) < 500 and swarm.links.exact is False


def test_lost_packets_make_transfers_late_and_lose_no_call(tmp_path: Path) -> None:
    text = '[set]\n"merge.inner_steps" = 8\n[peers]\nnumber = 20\nstep_ms = 500\n'
    text += "[links]\nup_mbit = 20\ndown_mbit = 100\nrtt_ms = 80\nloss_percent = 50\n"
    scenario = load_scenario(scenario_file(tmp_path, text))
    found = play_scenario(scenario, scenario.run(0))
    assert found.fresh_share is not None and found.fresh_share > 0.95


def scenario_file(folder: Path, text: str = "") -> Path:
    run = Path(__file__).parents[3] / "examples" / "stdlib-gpt.toml"
    (folder / "run.toml").write_text(run.read_text(encoding="utf-8"), encoding="utf-8")
    path = folder / "scenario.toml"
    head = '[scenario]\nname = "many"\nwork = "systems"\nrun = "run.toml"\nmethods = ["gossip"]\nrounds = 4\n'
    path.write_text(head + text, encoding="utf-8")
    return path


def test_a_scenario_says_it_and_the_document_has_the_figures(tmp_path: Path) -> None:
    text = (
        '[set]\n"merge.inner_steps" = 8\n[grid]\n"merge.num_partners" = [1, 3]\n[peers]\nnumber = 20\nstep_ms = 500\n'
    )
    found = compare(load_scenario(scenario_file(tmp_path, text)), jobs=1, kept=None)
    one, three = document(found)["results"]
    assert one["constants"] == {"merge.num_partners": 1} and one["held_out_loss"] is None
    assert three["received_bytes_a_round"] > 1.3 * one["received_bytes_a_round"], "its weights are larger"
    assert three["rounds"] == 80, "four whole ones of each"
    assert 0 < one["spread"] < 0.3 and 0 < three["spread"] < 0.3, "weights are of one partner in both"


def test_a_run_is_played_in_its_own_fragments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def played(settings: SimulatedGossipSettings, *rest: Any) -> None:
        seen.append((settings.num_fragments, settings.fragment_sizes.share, settings.sizes.both))

    monkeypatch.setattr("swarmtrain.simulate.systems.play.play", played)
    for number in (1, 4):
        scenario = load_scenario(scenario_file(tmp_path, f'[set]\n"merge.fragments" = {number}\n'))
        play_scenario(scenario, scenario.run(0))
    assert [one[:2] for one in seen] == [(1, 1.0), (4, 0.25)] and seen[0][2] == seen[1][2]


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("[hostile]\npercent = 20\n", "hostile.percent: "),
        ("curve_points = 3\n", "scenario.curve_points: "),
        ("[[hangs]]\npeer = 0\nat_s = 1\nfor_s = 1\n", "[[hangs]]"),
    ],
)
def test_what_systems_work_cannot_do_is_said(text: str, key: str, tmp_path: Path) -> None:
    with raises_code("keys-disagree", UserError, key):
        load_scenario(scenario_file(tmp_path, text))


def test_what_only_systems_work_can_do_is_said(tmp_path: Path) -> None:
    path = scenario_file(tmp_path, "[peers]\nnumber = 2000\n")
    load_scenario(path)
    with raises_code("keys-disagree", UserError, "1024"):
        load_scenario(path).with_changes(changes={"scenario.work": "learning"})
    with raises_code("keys-disagree", UserError, "churn.hangs_after_s", "learning"):
        load_scenario(scenario_file(tmp_path, "[churn]\nhangs_after_s = 5\n")).with_changes(
            changes={"scenario.work": "learning"}
        )
    with raises_code("keys-disagree", UserError, "method diloco: ", "scenario.work", "gossip"):
        compare(load_scenario(path).with_changes(methods=("diloco",)), jobs=1, kept=None)


def test_rounds_end_by_their_limit() -> None:
    """Rounds of a hundred steps of a second, limited to ten seconds."""
    limited = replace(SETTINGS, inner_steps=100, round_limit_s=10.0)
    found = play(limited, MachineDistribution(number=4, step_s=1.0, link=HOME), NOBODY_GOES, 8)
    assert found.virtual_time_s == 90.0 and found.rounds is not None and 32 <= found.rounds <= 36

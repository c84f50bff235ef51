"""Pipelines as scenarios: who comes, goes and hangs, what gets through, and what is said of it."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from codes import raises_code

from swarmtrain.cli.simulate import table_lines
from swarmtrain.errors import UserError
from swarmtrain.run import RunFile
from swarmtrain.simulate.comparison import compare, document
from swarmtrain.simulate.pipeline.play import lived
from swarmtrain.simulate.pipeline.world import PipelineWorld, settings_of
from swarmtrain.simulate.scenario import Scenario, load_scenario

pytestmark = pytest.mark.slow

EXAMPLE = Path(__file__).parents[3] / "examples" / "scenarios" / "pipeline-churn.toml"
QUIET = {"churn.stays_s": 0.0}


def example(**sections: dict[str, Any]) -> Scenario:
    """Sixteen machines of four speeds, for twenty minutes, in microbatches that are few to count."""
    changes = {f"{section}.{key}": value for section, keys in sections.items() for key, value in keys.items()}
    fewer = {"inner.microbatch_sequences": 16, "inner.batch_sequences": 2048, "peers.step_ms": 3_600_000}
    fewer |= {"peers.number": 20, "peers.slowdowns": [1, 1.3, 2.6, 5.7]}
    loaded = load_scenario(EXAMPLE).with_changes(changes={**fewer, "scenario.lasts_s": 1200.0, **changes})
    return replace(loaded, grid={})


def world(scenario: Scenario, balance: str = "rates", seed: int = 4) -> PipelineWorld:
    return lived(scenario, of(scenario, balance, seed))


def of(scenario: Scenario, balance: str, seed: int) -> RunFile:
    return scenario.run(seed, (("pipeline.balance", balance),))


def test_moving_beats_staying_under_preemptions_and_empties_nothing() -> None:
    small = {"inner": {"microbatch_sequences": 4, "batch_sequences": 512}, "peers": {"step_ms": 1_000_000}}
    often = example(churn={"stays_s": 3600.0, "away_s": 900.0}, **small)
    ours, none, queues = (world(often, balance) for balance in ("rates", "none", "queues"))
    shares = [each.share for each in (ours, none, queues)]
    assert shares[0] >= max(shares[1:]) + 0.03 and ours.share_of_assignment >= 0.75, shares
    assert not ours.emptied and none.num_moves == 0 < ours.num_moves
    assert {moment.kind for moment in none.log} == {"joined", "serves", "died", "moves"}, "joiners move in"


def test_the_same_seed_is_the_same_pipeline() -> None:
    short = example(scenario={"lasts_s": 120.0}, churn={"stays_s": 600.0, "hangs_after_s": 600.0})
    first, second, other = (world(short, seed=seed) for seed in (4, 4, 5))
    assert (first.log, first.tokens_per_s) == (second.log, second.tokens_per_s)
    assert first.clock.num_events == second.clock.num_events
    assert first.log != other.log


def test_drivers_choose_as_the_run_file_says() -> None:
    chosen = example(pipeline={"wiring": "least-completion"})
    routers = [settings_of(of(each, "rates", 0), each.links).router(random.Random(0)) for each in (chosen, example())]
    assert [router.variant for router in routers] == ["least-completion", "round-robin"]


def test_all_that_can_get_through_does_where_nothing_happens() -> None:
    still = world(example(churn={"stays_s": 0.0}, links={"up_mbit": 0.0, "down_mbit": 0.0}))
    num_calls = 6 * still.tokens_per_s * 1200 / still.settings.microbatch_tokens
    assert still.num_late < 0.005 * num_calls and still.share >= 0.85
    rate = 2_097_152 / 3600 * 5 * sum(1 / slowdown for slowdown in (1, 1.3, 2.6, 5.7))
    assert still.ideal_per_s == pytest.approx(rate, rel=0.15), "speeds are spread by a tenth"


def test_a_trace_says_who_is_there(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("time_s,peer,event,speed\n610,1,hang,\n700,0,crash,2\n1000,2,join,\n1190,1,wake,\n")
    table = {
        "scenario": {"name": "few", "work": "pipeline", "run": "run.toml", "methods": ["pipeline"], "lasts_s": 600.0},
        "peers": {"number": 6, "step_ms": 60_000.0, "trace": "t.csv"},
    }
    (tmp_path / "run.toml").write_text((EXAMPLE.parents[1] / "pipeline.toml").read_text(encoding="utf-8"))
    (tmp_path / "few.toml").write_text(tomli_w.dumps(table))
    scenario = load_scenario(tmp_path / "few.toml")
    few = world(scenario)
    names = list(dict.fromkeys(moment.peer for moment in few.log))
    joined = [(moment.time_s, names.index(moment.peer)) for moment in few.log if moment.kind == "joined"]
    assert joined == [(0.0, 0), (0.0, 1), (0.0, 2), (0.0, 3), (0.0, 4), (1000.0, 5)]
    assert [(moment.time_s, moment.peer) for moment in few.log if moment.kind == "died"] == [(700.0, names[0])]
    assert few.ghosts[names[0]].machine.tokens_per_s == pytest.approx(2 * 2048 / 60)
    hung = world(replace(scenario, hangs=()))
    assert few.tokens_per_s < hung.tokens_per_s, "who hangs does nothing"


def test_chance_says_who_hangs_when() -> None:
    churn = example(churn={"hangs_after_s": 300.0, "hangs_for_s": 30.0}).churn
    hangs = churn.hangs(20, 0, 1e5)
    assert sum(hang.for_s for hang in hangs) / len(hangs) == pytest.approx(30, rel=0.1)
    assert len(hangs) == pytest.approx(20 * 1e5 / 330, rel=0.1)
    assert churn.hangs(20, 0, 1e5) == hangs != churn.hangs(20, 1, 1e5)


def test_the_document_and_the_table_have_the_figures() -> None:
    small = {"inner": {"batch_sequences": 128}, "peers": {"step_ms": 225_000}}  # steps to count
    scenario = replace(example(scenario={"lasts_s": 300.0}, **small), grid={"pipeline.balance_every_s": (60, 300)})
    found = compare(scenario.with_changes(seeds=(0, 1)), jobs=1, kept=None)
    rows = document(found)["results"]
    assert [(row["method"], row["constants"]) for row in rows] == [
        ("pipeline-fixed", {}),
        ("pipeline-swarm", {"pipeline.balance_every_s": 300}),
        ("pipeline-swarm", {"pipeline.balance_every_s": 60}),
        ("pipeline", {}),
    ]
    for row in rows:
        assert 0.1 < row["throughput_share"] < 1 and 0.1 < row["assignment_share"] <= 1
        assert row["held_out_loss"] is None and "spread" not in row and row["virtual_time_s"] == 300
        sent_bytes = 2 * 3 * 2 * 2048 * row["tokens"]  # three boundaries, both ways, two bytes a number
        steps = sum(one.inner_steps for play, one in found.outcomes.items() if play.method == row["method"]) / 2
        if row["method"] != "pipeline-swarm":  # which is there twice
            assert row["bytes_per_inner_step"] == pytest.approx(sent_bytes / steps, rel=0.01)
    head, fixed, *_ = table_lines(found)
    assert "of the ideal" in head and " +- " in fixed and fixed.startswith("pipeline-fixed")


@pytest.mark.parametrize(
    ("methods", "changes", "code", "says"),
    [
        (("pipeline",), {"pipeline.stages": 1}, "keys-disagree", "method pipeline: pipeline.stages: 1"),
        (
            ("pipeline",),
            {"peers.number": 3},
            "too-few-peers",
            "3 volunteers cannot hold 4 stages (pipeline.stages)",
        ),
        (("gossip",), {}, "keys-disagree", "pipeline, pipeline-swarm, pipeline-fixed"),
        (("pipeline",), {"scenario.work": "systems"}, "keys-disagree", "method pipeline: "),
        (("pipeline",), {"hostile.percent": 20}, "keys-disagree", "hostile.percent: "),
    ],
)
def test_what_cannot_be_played_is_said(methods: tuple[str, ...], changes: dict[str, Any], code: str, says: str) -> None:
    with raises_code(code, UserError, says):
        compare(replace(example(), grid={}).with_changes(methods=methods, changes=changes), jobs=1, kept=None)

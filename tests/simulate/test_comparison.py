"""Playing a scenario: constants are chosen on other seeds, what was run is kept, the document is the same each time."""

from __future__ import annotations

import io
import json
import math
import re
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from codes import codes_in, raises_code
from learnt import tiny, write_scenario
from patience import PATIENCE_S

from swarmtrain.cli.comparison_page import comparison_page
from swarmtrain.cli.main import cli, run
from swarmtrain.cli.simulate import _command, _texts, table_lines
from swarmtrain.errors import UserError
from swarmtrain.simulate import comparison
from swarmtrain.simulate.comparison import Comparison, Play, compare, document
from swarmtrain.simulate.learning.setting import RunOutcome

pytestmark = pytest.mark.slow

GRID = {"merge.outer_momentum": [0.1, 0.5, 0.9]}


def outcome(loss: float, **more: Any) -> RunOutcome:
    return RunOutcome(held_out_loss=loss, virtual_time_s=2.0, tokens=100, inner_steps=10, sent_bytes=500, **more)


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> list[Play]:
    """Record what is run; the best momentum is 0.5 for gossip and 0.9 for diloco, whatever the seed."""
    plays: list[Play] = []

    def play(scenario: Any, one: Play) -> RunOutcome:
        plays.append(one)
        best, momentum = (0.5 if one.method == "gossip" else 0.9), dict(one.point).get("merge.outer_momentum", 0.5)
        return outcome(1.0 + abs(momentum - best) + 0.01 * one.seed + (one.method == "diloco"))

    monkeypatch.setattr(comparison, "_play", play)
    return plays


def test_each_method_takes_the_constants_that_are_best_on_the_tuning_seeds(tmp_path: Path, played: list[Play]) -> None:
    section = {"methods": ["gossip", "diloco"], "seeds": [0, 1], "tuning_seeds": [9]}
    found = compare(tiny(tmp_path, scenario=section, grid=GRID), jobs=1, kept=None)
    assert len(played) == 2 * 3 + 2 * 2 and [one.tuning for one in played] == [True] * 6 + [False] * 4
    table = document(found)
    gossip, diloco = table["results"]
    assert gossip["constants"] == {"merge.outer_momentum": 0.5} and diloco["constants"] == {"merge.outer_momentum": 0.9}
    assert gossip["held_out_loss"] == pytest.approx(1.005) and gossip["losses"] == {"0": 1.0, "1": 1.01}
    assert gossip["ratio_to_diloco"] == pytest.approx((1.0 / 2.0 + 1.01 / 2.01) / 2)
    assert gossip["ratio_to_diloco_paced"] is None and diloco["ratio_to_diloco"] == 1.0
    assert gossip["bytes_per_inner_step"] == 50.0 and len(table["tuning"]) == 6
    json.dumps(table, allow_nan=False)


def test_without_tuning_seeds_all_points_are_compared(tmp_path: Path, played: list[Play]) -> None:
    found = compare(tiny(tmp_path, grid=GRID), jobs=1, kept=None)
    assert [row.point[0][1] for row in found.rows()] == [0.1, 0.5, 0.9] and len(played) == 3
    assert found.best()["gossip"].loss == 1.0


def test_what_was_run_is_not_run_again_unless_something_changed(tmp_path: Path, played: list[Play]) -> None:
    kept, scenario = tmp_path / "kept", tiny(tmp_path, scenario={"seeds": [0, 1]})
    first = document(compare(scenario, jobs=1, kept=kept))
    assert len(played) == 2 and document(compare(scenario, jobs=1, kept=kept)) == first and len(played) == 2
    compare(scenario.with_changes(seeds=(0, 1, 2)), jobs=1, kept=kept)
    assert len(played) == 3
    compare(scenario.with_changes(changes={"merge.inner_steps": 9}), jobs=1, kept=kept)
    assert len(played) == 5
    for path in kept.iterdir():
        path.write_text("{")
    compare(scenario, jobs=1, kept=kept)
    assert len(played) == 7, "a file that is broken is none"
    compare(scenario, jobs=1, kept=kept, fresh=True)
    compare(scenario, jobs=1, kept=kept)
    assert len(played) == 9, "what is run anew is kept"
    (tmp_path / "0.txt").write_text("another text\n" * 300)
    comparison._text_sha256.cache_clear()
    compare(scenario, jobs=1, kept=kept)
    assert len(played) == 11, "the text is another one"


def test_a_method_has_its_own_constants_once(tmp_path: Path, played: list[Play]) -> None:
    found = compare(tiny(tmp_path, scenario={"methods": ["local-sgd", "diloco"]}, grid=GRID), jobs=1, kept=None)
    assert [(row.method, len(row.point)) for row in found.rows()] == [("local-sgd", 0), *[("diloco", 1)] * 3]


def test_what_a_method_cannot_be_told_is_said_before_the_work(tmp_path: Path, played: list[Play]) -> None:
    scenario = tiny(tmp_path, scenario={"methods": ["gossip", "diloco"]}, set={"merge.robust": "flag"})
    with raises_code("keys-disagree", UserError, "method diloco: ", "merge.robust"):
        compare(scenario, jobs=1, kept=None)
    assert not played


def test_a_warm_start_is_another_run_and_is_of_the_same_weights_for_all(tmp_path: Path, played: list[Play]) -> None:
    kept = tmp_path / "kept"
    compare(tiny(tmp_path), jobs=1, kept=kept)
    compare(tiny(tmp_path, scenario={"warm_tokens": 4000}), jobs=1, kept=kept)
    assert len(played) == 2, "what was kept of the cold start is not taken for it"
    with raises_code("keys-disagree", UserError, "scenario.warm_tokens", "merge.init"):
        compare(tiny(tmp_path, scenario={"warm_tokens": 4000}, set={"merge.init": "own"}), jobs=1, kept=None)
    with raises_code("keys-disagree", UserError, "scenario.warm_tokens", "128"):
        compare(tiny(tmp_path, scenario={"warm_tokens": 100}), jobs=1, kept=None)
    with raises_code("keys-disagree", UserError, "scenario.warm_tokens", "systems"):
        tiny(tmp_path, scenario={"warm_tokens": 4000, "work": "systems"})


def test_a_sweep_goes_in_place_of_the_grid_and_a_change_out_of_it(tmp_path: Path) -> None:
    section = {"tuning_seeds": [9]}
    scenario = tiny(tmp_path, scenario=section, grid=GRID | {"merge.inner_steps": [5, 6]})
    swept = scenario.with_changes(grid={"merge.num_partners": [1, 2]})
    assert list(swept.grid) == ["merge.num_partners"] and not swept.scenario.tuning_seeds
    changed = scenario.with_changes(changes={"merge.inner_steps": 7})
    assert list(changed.grid) == ["merge.outer_momentum"] and changed.run(0).merge.inner_steps == 7
    with raises_code("seed-used-twice", UserError, "9"):
        scenario.with_changes(seeds=(8, 9))


def test_a_loss_that_is_no_number_is_the_worst(tmp_path: Path) -> None:
    point = (("merge.outer_momentum", 0.9),)
    outcomes = {Play("gossip", point, 0): outcome(math.nan), Play("gossip", (), 0): outcome(3.0)}
    assert Comparison(tiny(tmp_path), outcomes).best()["gossip"].loss == 3.0


def test_attacks_are_compared_with_none_and_no_rule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def play(scenario: Any, one: Play) -> RunOutcome:
        told = dict(one.point)
        loss = 2.0 + (told["merge.robust"] == "clip") * 0.01 + (told["hostile.attack"] == "noise x3") * 0.1
        return outcome(loss * (1 + one.seed), named_hostile=3, named_honest=1)

    monkeypatch.setattr(comparison, "_play", play)
    grid = {"hostile.attack": ["noise x3", "absent"], "hostile.percent": [25, 34], "merge.robust": ["none", "clip"]}
    found = compare(tiny(tmp_path, grid=grid, scenario={"seeds": [0, 1]}), jobs=1, kept=None)
    row = next(row for row in document(found)["results"] if row["constants"]["merge.robust"] == "clip")
    assert row["constants"] == {"hostile.attack": "absent", "hostile.percent": 25, "merge.robust": "clip"}
    assert row["ratio_to_absent"] == 1.0 and row["ratio_to_absent_no_rule"] == 1.005 and row["named_hostile"] == 3
    lines = table_lines(found)
    assert lines[1:5] == [
        "gossip hostile.percent=25, to 3.0000 nats/byte without them and without a rule",
        "attack    none               clip             ",
        "noise x3  1.0500 +- 0.0000   1.0550 +- 0.0000 ",
        "absent    1.0000 +- 0.0000   1.0050 +- 0.0000 ",
    ]
    assert lines[6].startswith("gossip hostile.percent=34") and len(lines) == 10


def test_a_method_that_there_is_not(tmp_path: Path) -> None:
    with raises_code("no-such-method", UserError, "gosip", "data-parallel, "):
        compare(tiny(tmp_path, scenario={"methods": ["gosip"]}), jobs=1, kept=None)


def test_figures_that_there_are_none_of_are_null(tmp_path: Path) -> None:
    scenario = tiny(tmp_path)
    found = Comparison(scenario, {Play("gossip", (), 0): outcome(math.inf)})
    (row,) = document(found)["results"]
    assert row["held_out_loss"] is None and row["own_loss"] is None and row["stderr"] is None


def test_the_command_writes_the_same_document_on_one_core_and_on_two(tmp_path: Path) -> None:
    """Whoever comes and goes meanwhile."""
    section = {"methods": ["gossip", "diloco-paced"], "curve_points": 3}
    path, texts = write_scenario(tmp_path, scenario=section, churn={"stays_s": 0.2, "away_s": 0.1}), []
    for jobs in ("1", "2"):
        json_file = tmp_path / f"{jobs}.json"
        given = ["simulate", str(path), "--jobs", jobs, "--fresh", "--json", str(json_file), "--seed", "3"]
        done = CliRunner().invoke(cli, given)
        assert done.exit_code == 0, done.output
        assert "gossip" in done.stdout and "diloco-paced" in done.stdout
        texts.append(json_file.read_text())
    assert texts[0] == texts[1]
    table = json.loads(texts[0])
    assert table["seeds"] == [3] and [row["method"] for row in table["results"]] == ["gossip", "diloco-paced"]
    assert all(0 < row["held_out_loss"] < 4 and len(row["curve"]) == 3 for row in table["results"])


def test_what_the_hostile_do_is_the_same_on_one_core_and_on_two(tmp_path: Path) -> None:
    hostile = {"percent": 34, "attack": "noise x3"}
    scenario = tiny(tmp_path, hostile=hostile, grid={"merge.robust": ["clip", "flag"]})
    first, second = (document(compare(scenario, jobs=jobs, kept=None)) for jobs in (1, 2))
    assert first == second and len(first["results"]) == 2


def test_a_pipe_is_told_that_it_goes_on_and_its_end_is_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the first run lasts nobody has said anything yet; a SIGTERM then leaves through all that is to be ended."""
    said, left = threading.Event(), list[str]()

    class Stderr(io.StringIO):
        def flush(self) -> None:
            if "0 of 6 runs are done, after" in self.getvalue():
                said.set()

    def play(*_: Any) -> RunOutcome:
        try:
            assert said.wait(PATIENCE_S)
            signal.raise_signal(signal.SIGTERM)
            raise AssertionError("it goes on")
        finally:
            left.append("in order")

    monkeypatch.setattr(comparison, "_play", play)
    monkeypatch.setattr("sys.stderr", Stderr())
    monkeypatch.setattr("swarmtrain.cli.progress._EVERY_S", 0.001)
    path = write_scenario(tmp_path, scenario={"methods": ["gossip", "diloco"], "seeds": [0, 1, 2]})
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended:
        run(["simulate", str(path), "--jobs", "1", "--fresh"])
    assert ended.value.code == 143 and left == ["in order"]
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(
    ("given", "code", "says"),
    [
        (["--sweep", "momentum=0.5"], "bad-assignment", "'momentum=0.5': "),
        (["--sweep", "merge.outer_momentum"], "bad-assignment", "'merge.outer_momentum': "),
        (["--set", "merge.outer_momentum"], "bad-assignment", "SECTION.KEY=VALUE"),
        (["--plot", "x.pdf"], "bad-plot-name", ".html, .png or .svg"),
        (["--plot", "x.svg"], "no-curves", "scenario.curve_points"),
        (["--plot", "nowhere/x.svg"], "no-such-folder", "nowhere"),
        (["--json", "nowhere/x.json"], "no-such-folder", "nowhere"),
        (["--method", "nothing"], "no-such-method", "nothing"),
        (["--sweep", "peers.slowdowns=[[1]]"], "wrong-type", "peers.slowdowns.0"),
        (["--sweep", "peers.slowdowns={a=1}"], "wrong-type", "peers.slowdowns.NAME"),
        (["--set", "merge.outer_momentum=7"], "out-of-range", "the run of scenario tiny: merge.outer_momentum: "),
    ],
)
def test_wrong_use_is_said(
    tmp_path: Path, given: list[str], code: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["simulate", str(write_scenario(tmp_path)), *given]) == 2
    told = capsys.readouterr().err
    assert code in codes_in(told) and says in told


@pytest.mark.parametrize("suffix", [".svg", ".png"])
def test_a_figure_is_drawn(tmp_path: Path, suffix: str) -> None:
    pytest.importorskip("matplotlib")
    path = write_scenario(tmp_path, scenario={"curve_points": 3})
    figure = tmp_path / f"figure{suffix}"
    done = CliRunner().invoke(cli, ["simulate", str(path), "--jobs", "1", "--fresh", "--plot", str(figure)])
    assert done.exit_code == 0, done.output
    assert figure.stat().st_size > 5000


def test_a_page_has_all_methods_with_the_figures_of_the_document(tmp_path: Path) -> None:
    changes = {"curve_points": 3, "methods": ["gossip", "diloco"], "seeds": [5, 6], "name": "<b>tiny"}
    path = write_scenario(tmp_path, scenario=changes, hangs=[{"peer": 1, "at_s": 0.1, "for_s": 0.2}])
    page, told = tmp_path / "methods.html", tmp_path / "methods.json"
    given = ["simulate", str(path), "--jobs", "1", "--plot", str(page), "--json", str(told)]
    for more in (["--fresh"], []):  # the second time what was kept, over the page of the first
        done = CliRunner().invoke(cli, [*given, *more])
        assert done.exit_code == 0, done.output
    text, results = page.read_text(), json.loads(told.read_text())["results"]
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text)
    found = json.loads(data)
    assert found["results"] == results and found["seeds"] == [5, 6]
    assert [curve["name"] for curve in found["curves"]] == ["gossip", "diloco"]
    for curve, result in zip(found["curves"], results, strict=True):
        assert list(curve["seeds"]) == ["5", "6"] and curve["shown"]
        drawn = curve["seeds"]["5"]
        assert drawn["tokens"] == [tokens for tokens, _, _ in result["curve"]]
        assert drawn["loss"] == pytest.approx([loss for _, _, loss in result["curve"]], rel=1e-4)
        assert f'<td class="number">{result["held_out_loss"]:.4f}</td>' in text
        assert len(result["peer_tokens"]) == 3 and all(
            f"{tokens / 1000:.3g} k, " in text for tokens in result["peer_tokens"]
        )
    tokens = [result["tokens"] for result in results]
    assert ("on equal tokens" in text) == (max(tokens) <= 1.02 * min(tokens))
    assert "&lt;b&gt;tiny" in text and "<b>tiny" not in text and "hangs at 0.1 s for 0.2 s" in text
    assert "<summary>scenario.toml</summary>" in text and "[model]\ncontext_tokens = 32" in text
    assert "<code>swarmtrain simulate scenario.toml</code>" in text and str(tmp_path) not in text


def page_of(found: Comparison) -> tuple[str, dict[str, Any]]:
    """The page of a comparison, and its data."""
    text = comparison_page(found, "swarmtrain simulate x.toml", {})
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text)
    return text, json.loads(data)


def bold(text: str) -> list[str]:
    """The rows of the methods' table that are bold."""
    return re.findall(r'<tr class="me"><th scope="row">(.*?)</th>', text)


def test_a_page_names_no_winner_where_volunteers_or_attacks_differ(tmp_path: Path, played: list[Play]) -> None:
    """Fewer volunteers or no attack are no better method."""
    grid = {"peers.number": [2, 4], "merge.outer_momentum": [0.1, 0.5]}
    text, data = page_of(compare(tiny(tmp_path, grid=grid), jobs=1, kept=None))
    assert "Which learns the most?" not in text and 'id="contributors"' not in text
    assert "<dt>What differs?</dt><dd>peers.number</dd>" in text and ">2, 4</dd>" in text
    assert bold(text) == ["gossip outer_momentum=0.5 number=2", "gossip outer_momentum=0.5 number=4"]
    assert [curve["name"] for curve in data["curves"] if curve["shown"]] == bold(text)[:1]
    text, _ = page_of(compare(tiny(tmp_path, grid=GRID), jobs=1, kept=None))
    assert "Which learns the most?" in text and 'id="contributors"' in text
    assert bold(text) == ["gossip outer_momentum=0.5"]


@pytest.mark.parametrize(
    ("lasts_s", "unit", "ends"),
    [(60.0, "virtual minutes", 1.0), (3 * 3600.0, "virtual hours", 3.0), (5 * 86400.0, "virtual days", 5.0)],
)
def test_curves_of_days_are_not_drawn_by_minutes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lasts_s: float, unit: str, ends: float
) -> None:
    curve = ((100, lasts_s / 2, 3.0), (200, lasts_s, 2.0))
    monkeypatch.setattr(comparison, "_play", lambda scenario, one: outcome(2.0, curve=curve))
    text, data = page_of(compare(tiny(tmp_path, grid=GRID), jobs=1, kept=None))
    assert f'value="{unit}"' in text and data["curves"][0]["seeds"]["0"][unit] == [ends / 2, ends]


def test_without_tensors_the_best_did_the_most_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def play(scenario: Any, one: Play) -> RunOutcome:
        return outcome(math.nan, throughput_share=dict(one.point)["merge.outer_momentum"], spread=0.02, rounds=7)

    monkeypatch.setattr(comparison, "_play", play)
    changes = {"work": "systems", "rounds": 3, "seeds": [0]}
    found = compare(tiny(tmp_path, scenario=changes, grid=GRID), jobs=1, kept=None)
    assert dict(found.best()["gossip"].point) == {"merge.outer_momentum": 0.9}
    text, _ = page_of(found)
    assert bold(text) == ["gossip outer_momentum=0.9"] and '<td class="number">2.0e-02</td>' in text


def test_a_page_has_the_errors_of_its_ratios(tmp_path: Path, played: list[Play]) -> None:
    found = compare(tiny(tmp_path, scenario={"methods": ["gossip", "diloco"], "seeds": [0, 1]}), jobs=1, kept=None)
    (gossip, _) = document(found)["results"]
    expected = f"{gossip['ratio_to_diloco']:.4f} ± {gossip['ratio_to_diloco_stderr']:.4f}"
    assert f'<td class="number">{expected}</td>' in page_of(found)[0]


def test_a_page_says_the_options_that_change_the_figures_and_has_both_texts(tmp_path: Path) -> None:
    given = {"--seed": (5, 6), "--method": ("gossip",), "--sweep": (), "--set": ("peers.slowdowns=[1, 2]",)}
    command = _command(tmp_path / "a b.toml", given)
    assert command == "swarmtrain simulate 'a b.toml' --seed 5 --seed 6 --method gossip --set 'peers.slowdowns=[1, 2]'"
    (tmp_path / "sub").mkdir()
    for folder, text in ((tmp_path, "the run"), (tmp_path / "sub", "the scenario")):
        (folder / "tiny.toml").write_text(text)
    scenario = tmp_path / "sub" / "tiny.toml"
    assert _texts(scenario, "../tiny.toml") == {"tiny.toml": "the scenario", "../tiny.toml": "the run"}
    (tmp_path / "run.toml").write_text("another run")
    assert _texts(scenario, "../run.toml") == {"tiny.toml": "the scenario", "run.toml": "another run"}


def test_a_page_of_work_without_tensors_has_no_curves(tmp_path: Path) -> None:
    path = write_scenario(tmp_path, scenario={"work": "systems", "rounds": 3})
    page = tmp_path / "methods.html"
    done = CliRunner().invoke(cli, ["simulate", str(path), "--jobs", "1", "--fresh", "--plot", str(page)])
    assert done.exit_code == 0, done.output
    text = page.read_text()
    assert 'id="chart-methods"' not in text and "Of the ideal" in text and ">p2<" in text


def test_a_page_replaces_only_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, page = write_scenario(tmp_path), tmp_path / "mine.html"
    page.write_text("mine")
    assert run(["simulate", str(path), "--plot", str(page)]) == 2
    assert codes_in(capsys.readouterr().err) == ["file-exists"] and page.read_text() == "mine"


def test_a_run_that_outlasts_what_is_known_of_its_churn_is_no_result(tmp_path: Path) -> None:
    scenario = tiny(tmp_path, churn={"stays_s": 0.01, "away_s": 1000.0}).with_changes(methods=("diloco",))
    with raises_code("too-much-churn", UserError, "churn.stays_s"):
        compare(scenario, jobs=1, kept=None)

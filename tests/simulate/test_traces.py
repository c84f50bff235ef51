"""Traces: what a file may say of who comes, goes and hangs, what is said of what it must not, and what comes of it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from codes import raises_code
from learnt import setting, tiny, write_scenario

from swarmtrain.errors import UserError
from swarmtrain.simulate import comparison
from swarmtrain.simulate.comparison import Play
from swarmtrain.simulate.learning.methods import METHODS
from swarmtrain.simulate.learning.server import _Served
from swarmtrain.simulate.learning.setting import RunOutcome
from swarmtrain.simulate.scenario import Scenario, load_scenario
from swarmtrain.simulate.traces import TraceSpan, load_trace, trace_of

pytestmark = pytest.mark.slow

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "scenarios" / "traces"
HEAD = "time_s,peer,event\n"
GONE_S = 1e9
EVENTS = HEAD + "0.1,0,hang\n0.15,2,join\n0.23,1,crash\n0.3,0,wake\n0.5,1,join\n"
SAME: dict[str, Any] = {
    "hangs": [{"peer": 0, "at_s": 0.1, "for_s": 0.3 - 0.1}],
    "away": [{"peer": 2, "at_s": 0.0, "for_s": 0.15}, {"peer": 1, "at_s": 0.23, "for_s": 0.5 - 0.23}],
}


def traced(folder: Path, text: str, **sections: Any) -> Scenario:
    (folder / "trace.csv").write_text(text)
    return tiny(folder, **{**sections, "peers": {"trace": "trace.csv", **sections.get("peers", {})}})


def test_a_life_is_read() -> None:
    text = "# a log\ntime_s, peer, event\n\n0,0,join\n1,1,join\n2,0,hang\n3,0,wake\n3,2,hang\n4,0,leave\n"
    trace = trace_of(text + "5,2,crash\n6,0,join\n8,0,hang\n", "t", 4)
    assert trace.away == (TraceSpan(1, 0, 1), TraceSpan(0, 4, 2), TraceSpan(2, 5, GONE_S))
    assert trace.hangs == (TraceSpan(0, 2, 1), TraceSpan(2, 3, 2), TraceSpan(0, 8, GONE_S)), (
        "who goes does not hang any more"
    )
    assert not any(trace.figures.values())
    assert trace_of(HEAD, "t", 1).away == () == trace_of(HEAD, "t", 1).hangs


def test_figures_are_said_once_or_the_same_again() -> None:
    text = "peer,event,time_s,speed,up_mbit\n1,join,3,0.5,\n0,hang,4,,20\n1,crash,5,0.5,7\n"
    assert trace_of(text, "t", 2).figures == {"speed": {1: 0.5}, "up_mbit": {0: 20.0, 1: 7.0}, "down_mbit": {}}


@pytest.mark.parametrize(
    ("text", "code", "says"),
    [
        ("", "bad-trace", "t: is empty"),
        ("1,0,join\n", "bad-trace", "line 1: "),
        ("time_s,peer,event,sped\n", "bad-trace", "line 1: "),
        ("time_s,peer,event,peer\n", "bad-trace", "line 1: "),
        ("# two\ntime_s,event\n", "bad-trace", "line 2: "),
        (HEAD + "1,0\n", "bad-trace", "line 2: 2 values for 3 columns; "),
        (HEAD + "1,3,join\n", "no-such-volunteer", "line 2: peer: there is no volunteer 3; "),
        (HEAD + "1,-1,join\n", "no-such-volunteer", "line 2: peer: there is no volunteer -1; "),
        (HEAD + "1,,join\n", "no-such-volunteer", "line 2: peer: is empty; "),
        (HEAD + "1,0,jion\n", "bad-trace", "line 2: event: jion; allowed: join, leave, crash, hang, wake"),
        (HEAD + "soon,0,join\n", "out-of-range", "line 2: time_s: soon; allowed: a number from 0 to 1e+09"),
        (HEAD + "nan,0,join\n", "out-of-range", "line 2: time_s: nan"),
        (HEAD + "-1,0,join\n", "out-of-range", "line 2: time_s: -1"),
        ("time_s,peer,event,speed\n1,0,join,0\n", "out-of-range", "line 2: speed: 0; allowed: a number from 0.001 "),
        ("time_s,peer,event,speed\n1,0,join,1\n2,0,leave,3\n", "bad-trace", "line 3: speed: 3, "),
        (HEAD + "2,0,join\n1,1,join\n", "bad-trace", "line 3: time_s: 1 stands after 2; "),
        (HEAD + "1,0,wake\n", "bad-trace", "possible: leave, crash, hang"),
        (HEAD + "1,0,leave\n2,0,hang\n", "bad-trace", "possible: join"),
        (HEAD + "1,0,hang\n2,0,join\n", "bad-trace", "possible: leave, crash, wake"),
        (HEAD + "1,0,leave\n1,0,join\n", "bad-trace", "line 3: time_s: peer 0 "),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_with_its_line(text: str, code: str, says: str) -> None:
    with raises_code(code, UserError, says) as caught:
        trace_of(text, "t", 3)
    assert str(caught.value).startswith("t: ")


def test_a_file_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with raises_code("file-unreadable", UserError, "no.csv: ", "examples/scenarios/traces"):
        load_trace(tmp_path / "no.csv", 3)
    monkeypatch.setattr("swarmtrain.simulate.traces._MAX_BYTES", 10)
    with raises_code("file-too-long", UserError, "18", "10"):
        traced(tmp_path, HEAD)


@pytest.mark.parametrize(
    ("sections", "code", "says"),
    [
        (SAME, "keys-disagree", "peers.trace: "),
        ({"churn": {"stays_s": 5}}, "keys-disagree", "churn.stays_s: "),
        ({"scenario": {"work": "systems"}}, "keys-disagree", "peers.trace: "),
        (
            {"peers": {"number": 2}},
            "no-such-volunteer",
            "trace.csv: line 3: peer: there is no volunteer 2; ",
        ),
        (
            {"set": {"peers.number": 2}},
            "no-such-volunteer",
            "trace.csv: line 3: peer: there is no volunteer 2; ",
        ),
    ],
)
def test_what_does_not_go_with_a_trace_is_said(tmp_path: Path, sections: dict[str, Any], code: str, says: str) -> None:
    with raises_code(code, UserError, says):
        traced(tmp_path, EVENTS, **sections)


def test_a_grid_can_be_of_traces(tmp_path: Path) -> None:
    (tmp_path / "figures.csv").write_text("time_s,peer,event,speed\n1,0,crash,2\n")
    scenario = traced(tmp_path, EVENTS, grid={"peers.trace": ["", "trace.csv", "figures.csv"]})
    none, same, figures = map(scenario.at, scenario.points())
    assert none.hangs == none.away == () and (same.hangs, same.away) == (scenario.hangs, scenario.away)
    assert figures.away[0].at_s == 1 and figures.step_s == (0.005, 0.015, 0.03) and figures.at(()).step_s[0] == 0.005
    assert none.step_s == same.step_s == (0.01, 0.015, 0.03)
    with raises_code("keys-disagree", UserError, "peers.trace"):
        tiny(tmp_path, **SAME).with_changes(changes={"peers.trace": "trace.csv"})


@pytest.mark.parametrize("method", ["gossip", "diloco-paced", "server"])
def test_what_comes_of_a_trace_is_what_comes_of_the_same_written_out(method: str, tmp_path: Path) -> None:
    scenario, written = traced(tmp_path, EVENTS), tiny(tmp_path, **SAME)
    assert (scenario.hangs, scenario.away) == (written.hangs, written.away)
    play = Play(method, (), 0)
    assert comparison._path(scenario, play, tmp_path) == comparison._path(written, play, tmp_path)
    outcome = comparison._play(scenario, play)
    assert outcome == comparison._play(written, play), "to the bit"
    assert outcome != comparison._play(tiny(tmp_path), play) and outcome.tokens_lost > 0


def played(scenario: Scenario, method: str) -> RunOutcome:
    return METHODS[method].run(setting(scenario, **{k.replace(".", "__"): v for k, v in METHODS[method].keys.items()}))


@pytest.mark.parametrize("method", ["gossip", "diloco-paced", "server"])
def test_speeds_and_links_are_each_volunteer_s_own(method: str, tmp_path: Path) -> None:
    figures = "time_s,peer,event,speed,up_mbit,down_mbit\n900,0,crash,{0},{1},{1}\n900,1,crash,{0},{1},{1}\n"
    said = ("", ""), ("1", "10"), ("4", ""), ("", "1")
    usual, same, fast, slow = (played(traced(tmp_path, figures.format(*each)), method) for each in said)
    assert usual == same and fast.virtual_time_s < 0.8 * usual.virtual_time_s, "the scenario's are 10 Mbit/s"
    assert slow != usual and slow.virtual_time_s >= usual.virtual_time_s


def test_a_result_is_kept_by_what_its_trace_says(tmp_path: Path) -> None:
    figures, play = "time_s,peer,event,speed\n9,0,crash,{}\n", Play("gossip", (), 0)
    paths = {comparison._path(traced(tmp_path, figures.format(speed)), play, tmp_path) for speed in ("", 2, 3)}
    assert len(paths) == 3
    usual = comparison._path(tiny(tmp_path, away=[{"peer": 0, "at_s": 9, "for_s": GONE_S}]), play, tmp_path)
    assert usual in paths, "what does not matter is not in its name"


def test_links_of_one_s_own(tmp_path: Path) -> None:
    text = "time_s,peer,event,up_mbit,down_mbit\n9,1,crash,2,\n9,2,crash,,40\n"
    one = setting(traced(tmp_path, text))
    byte = 1e6 / 8
    links = [(10 * byte, 10 * byte), (2 * byte, 10 * byte), (10 * byte, 40 * byte), (10 * byte, 10 * byte)]
    assert [one.link_of(name) for name in ("p0", "p1", "p2", "server")] == links
    assert one.bytes_per_s == 2 * byte
    fast = "".join(f"9,{number},crash,200,200\n" for number in range(3))
    assert setting(traced(tmp_path, text.splitlines()[0] + "\n" + fast)).bytes_per_s == 200 * byte, "nobody has 10"
    without = load_scenario(write_scenario(tmp_path, links={"up_mbit": 0.0}))
    assert setting(without).link_of("p0") == (1e12, 10 * byte)


def test_a_worker_pulls_through_the_servers_uplink_and_its_own_downlink(tmp_path: Path) -> None:
    text = "time_s,peer,event,up_mbit,down_mbit\n9,1,crash,2,\n9,2,crash,,5\n"
    served = _Served(setting(traced(tmp_path, text)), waiting=False, delay=1)
    p0, p1, p2 = (served.pull_s(name) - served.setting.rtt_s for name in ("p0", "p1", "p2"))
    assert p0 == p1 and p2 == pytest.approx(2 * p0), "what it sends through is not asked"


def test_the_examples_are_what_their_generator_writes() -> None:
    spec = importlib.util.spec_from_file_location("generate_traces", FOLDER / "generate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert {path.name for path in FOLDER.glob("*.csv")} == module.FILES.keys()
    for name, text in module.FILES.items():
        assert (FOLDER / name).read_text(encoding="utf-8") == text
        trace = load_trace(FOLDER / name, module.NUM_PEERS)
        assert len({span.peer for span in (*trace.away, *trace.hangs)}) == module.NUM_PEERS
    spot = load_trace(FOLDER / "preemptions.csv", module.NUM_PEERS).away
    away_s = [span.for_s for span in spot if span.for_s < GONE_S]
    assert 3 < sum(away_s) / len(away_s) < 5 and 0.1 < sum(away_s) / module.NUM_PEERS / module.UNTIL_S < 0.25

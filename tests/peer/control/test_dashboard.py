"""Grafana's dashboard and the alerts: each query is about metrics and labels that a scrape of two peers has."""

from __future__ import annotations

import http.client
import itertools
import json
import re
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import promql_parser as promql
import pytest
import yaml
from dashboard import ALERTS, DASHBOARD, PEERS, dashboard_queries, panels
from prometheus_client.parser import text_string_to_metric_families

from swarmtrain.events import (
    DeviceEvent,
    EvalEvent,
    FetchedEvent,
    JoinedEvent,
    RefusedEvent,
    RoundEvent,
    StartedEvent,
)
from swarmtrain.peer.control.board import Pulse, StatusBoard, Watched
from swarmtrain.peer.control.metrics import serving_metrics
from swarmtrain.peer.estimate import estimates_of
from swarmtrain.run import parse_run
from swarmtrain.v1 import control_pb2 as pb

PROMETHEUS = yaml.safe_load((PEERS / "prometheus.yml").read_text(encoding="utf-8"))
RUN = parse_run("[run]\ntotal_tokens = 9000\n", "r")
OF_PROMETHEUS = {"up": {}, "ALERTS": {"alertname": set(), "alertstate": {"pending", "firing"}}}
"""Metrics that Prometheus makes by itself, with their labels."""
OF_A_TARGET = {"instance": set(), "job": {each["job_name"] for each in PROMETHEUS["scrape_configs"]}}
"""Labels that Prometheus adds to each metric."""
LIMIT_S = 30.0

Labels = dict[str, set[str]]


def of_alerts() -> Iterator[tuple[str, str]]:
    for group in ALERTS["groups"]:
        for rule in group["rules"]:
            yield rule["alert"], rule["expr"]


QUERIES = dict([*dashboard_queries(), *of_alerts()])


def boards() -> list[StatusBoard]:
    """A volunteer and a bootstrap in the middle of a run, to which everything has happened that has a metric."""
    volunteer, bootstrap = StatusBoard("volunteer", 1000.0), StatusBoard("bootstrap", 1000.0)
    for board in (volunteer, bootstrap):
        state = pb.PEER_STATE_TRAINING if board is volunteer else pb.PEER_STATE_SERVING

        def look(status: pb.PeerStatus) -> None:
            status.peers.add(peer="P", present=True)
            status.peers.add(peer="B", present=True, bootstrap=True)
            status.checkpoint.CopyFrom(pb.KeptCheckpoint(round=6, time=1999.0, size_bytes=1))
            status.own_tokens, status.dht_records = 2000, 12

        estimates = estimates_of(RUN, 1_000_000) if board is volunteer else None
        if estimates is not None:
            estimates(1)  # imports torch, which may take longer than a scrape may
        pulse = Pulse(state=state, doing="", round=7)
        board.watch(
            Watched(pulse=lambda pulse=pulse: pulse, tokens_per_step=512, total_tokens=9000, estimates=estimates)
        )
        board.take(FetchedEvent(run_sha256="ab", run_name="tiny", held_out_bytes=1, from_peer="B", total_tokens=9000))
        board.take(JoinedEvent(round=6, run_tokens=6000, num_peers=2, state_from="", wall_s=1.0))
        board.doing(state, "")
        board.add_looker(look)
        board.tick()
    bootstrap.tell_losses({"P": 2.5})
    device = {"device": "cuda:0", "title": "A Card", "precision": "bf16"}
    volunteer.take(DeviceEvent(**device, microbatch_sequences=4, batch_sequences=8, why="it works"))
    volunteer.take(StartedEvent(inner_steps_per_round=64, num_parameters=10, total_tokens=9000, startup_s=1.0))
    return [volunteer, bootstrap]


def happens(board: StatusBoard) -> None:
    """Make those events that are counted only while metrics are served."""
    given: dict[str, Any] = {"round": 6, "inner_steps": 64, "tokens": 1000, "run_tokens": 7000, "loss": 2.5}
    given |= {"first_loss": 3.0, "learning_rate": 0.1, "seconds": 8.0, "merge_s": 1.5, "stall_s": 1.75, "bytes_sent": 9}
    board.take(RoundEvent(**given, bytes_received=1, times_below_allreduce=9.0, partners=("P",), weights=(1,)))
    board.take(EvalEvent(round=6, held_out_loss=2.0, sources=("code",), source_losses=(2.5,)))
    board.take(RefusedEvent(from_peer="Q", rule="hash", detail="?"))


@pytest.fixture(scope="module")
def exposed() -> dict[str, Labels]:
    """Every sample that the two peers expose, with its labels and their values, by a scrape of each."""
    found: dict[str, Labels] = {name: dict(labels) for name, labels in OF_PROMETHEUS.items()}
    for board in boards():
        with serving_metrics("127.0.0.1:0", board, lambda: True) as where:
            happens(board)
            with closing(http.client.HTTPConnection(where, timeout=LIMIT_S)) as connection:
                connection.request("GET", "/metrics")
                text = connection.getresponse().read().decode()
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                labels = found.setdefault(sample.name, {})
                for label, value in sample.labels.items():
                    labels.setdefault(label, set()).add(value)
    return {name: {**labels, **OF_A_TARGET} for name, labels in found.items()}


def parts(expr: Any) -> Iterator[Any]:
    """Every expression in an expression, itself included."""
    yield expr
    inner = [getattr(expr, name, None) for name in ("expr", "lhs", "rhs", "vector_selector", "param")]
    for each in [*inner, *getattr(expr, "args", ())]:
        if each is not None:
            yield from parts(each)


def selectors(text: str) -> list[Any]:
    return [each for each in parts(promql.parse(text)) if isinstance(each, promql.VectorSelector)]


def labels_named(text: str) -> set[str]:
    """Labels by which a query groups or joins."""
    found: set[str] = set()
    for each in parts(promql.parse(text)):
        modifier = getattr(each, "modifier", None)
        if isinstance(each, promql.AggregateExpr) and modifier is not None:
            found |= set(modifier.labels)
        elif isinstance(each, promql.BinaryExpr) and modifier is not None:
            found |= set(modifier.group_labels or ())
            found |= set(modifier.matching.labels if modifier.matching is not None else ())
    return found


@pytest.mark.parametrize("where", QUERIES)
def test_a_query_is_about_metrics_and_labels_that_there_are(where: str, exposed: dict[str, Labels]) -> None:
    found = selectors(QUERIES[where])
    assert found
    for selector in found:
        assert selector.name in exposed, f"no peer exposes {selector.name}"
        labels = exposed[selector.name]
        for matcher in selector.matchers.matchers:
            assert matcher.name in labels, f"{selector.name} has no label {matcher.name}"
            if labels[matcher.name]:
                values = [value for value in labels[matcher.name] if _matches(matcher, value)]
                assert values, f"{matcher.name} of {selector.name} is never {matcher.value}"
    known = {label for selector in found for label in exposed[selector.name]}
    assert labels_named(QUERIES[where]) <= known


def _matches(matcher: Any, value: str) -> bool:
    is_pattern = matcher.op in (promql.MatchOp.Re, promql.MatchOp.NotRe)
    return re.fullmatch(matcher.value if is_pattern else re.escape(matcher.value), value) is not None


def test_the_test_finds_what_a_query_names() -> None:
    text = 'sum by (rule) (rate(a{x="1"}[5m])) / on(y) group_left(z) (b or max_over_time(c[1h:5m] offset 1m))'
    assert [each.name for each in selectors(text)] == ["a", "b", "c"] and labels_named(text) == {"rule", "y", "z"}


def test_a_metric_that_is_gone_is_noticed(exposed: dict[str, Labels]) -> None:
    assert {"swarmtrain_loss", "swarmtrain_sent_bytes_total", "swarmtrain_info", "process_cpu_seconds_total"} <= set(
        exposed
    )
    assert "swarmtrain_sent_bytes" not in exposed and exposed["swarmtrain_peers"]["role"] == {"volunteer", "bootstrap"}


def test_a_legend_names_labels_that_its_query_keeps() -> None:
    for panel in panels():
        for target in panel["targets"]:
            named = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
            kept = labels_named(target["expr"].replace("$__rate_interval", "40s"))
            # Without an aggregation a query keeps its metric's own labels too.
            own = {"source"} if "source_held_out" in target["expr"] else set()
            assert named <= kept | own, panel["title"]


def test_each_panel_says_what_it_shows_and_has_its_place() -> None:
    everyone = DASHBOARD["panels"]
    assert len({panel["id"] for panel in everyone}) == len(everyone)
    assert len({panel["title"] for panel in everyone}) == len(everyone)
    for panel in panels():
        assert panel["description"].endswith(".") and panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert {target["refId"] for target in panel["targets"]} == set("ABCDEFGH"[: len(panel["targets"])])
    taken: set[tuple[int, int]] = set()
    for place in (panel["gridPos"] for panel in everyone):
        assert place["x"] + place["w"] <= 24
        cells = set(
            itertools.product(range(place["x"], place["x"] + place["w"]), range(place["y"], place["y"] + place["h"]))
        )
        assert not cells & taken, "two panels lie over each other"
        taken |= cells


def test_variables_are_those_that_queries_use_and_of_labels_that_there_are(exposed: dict[str, Labels]) -> None:
    source, *others = DASHBOARD["templating"]["list"]
    assert source["type"] == "datasource" and source["query"] == "prometheus"
    text = json.dumps(DASHBOARD["panels"])
    assert set(re.findall(r"\$(\w+)", text)) - {"__rate_interval"} == {each["name"] for each in others}
    assert set(re.findall(r"\${(\w+)}", text)) == {source["name"]}
    for variable in others:
        query = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["query"]["query"])
        assert query is not None
        (selector,) = selectors(query[1].replace("$run", ".*"))
        assert query[2] in exposed[selector.name]


def test_the_overlay_gives_grafana_what_it_reads() -> None:
    overlay = yaml.safe_load((PEERS / "metrics.yaml").read_text(encoding="utf-8"))
    places = {}
    for volume in overlay["services"]["grafana"]["volumes"]:
        source, target, *how = volume.split(":")
        if source.startswith("./"):
            assert (PEERS / source).is_file() and how == ["ro"], volume
            places[target] = PEERS / source
        else:
            assert source in overlay["volumes"]
    sources = yaml.safe_load(places["/etc/grafana/provisioning/datasources/swarmtrain.yml"].read_text())["datasources"]
    assert [(each["type"], each["url"]) for each in sources] == [("prometheus", "http://prometheus:9090")]
    assert sources[0]["jsonData"]["timeInterval"] == PROMETHEUS["global"]["scrape_interval"]
    assert "prometheus" in overlay["services"] and overlay["services"]["prometheus"]["ports"][0].endswith(":9090")
    (provider,) = yaml.safe_load(places["/etc/grafana/provisioning/dashboards/swarmtrain.yml"].read_text())["providers"]
    home = overlay["services"]["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert Path(home).parent == Path(provider["options"]["path"]) and home in places
    assert all(port.startswith("127.0.0.1:") for port in overlay["services"]["grafana"]["ports"])

"""Metrics overlay: Prometheus finds all peers, has real values, raises alerts, and answers the dashboard's queries.

Grafana itself is left out: its image is nowhere that these tests can reach.
"""

from __future__ import annotations

import json
import urllib.parse
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
from dashboard import dashboard_queries
from docker_engine import BUILD_S, IMAGE, ROOT, Project, build, docker

pytestmark = pytest.mark.containers

PROMETHEUS = "swarmtrain-test-prometheus"
FOUND_S = 90.0
"""Prometheus looks for peers and reads them every ten seconds or so, and rules are worked out as often."""
ANSWER_S = 10.0
"""Time limit for Prometheus, which is on this machine."""
LEAVES_S = "20"
"""Seconds for the bootstrap to leave before it is killed."""


@pytest.fixture(scope="module", autouse=True)
def images() -> None:
    build()
    try:
        recipe = "--file=tests/containers/prometheus.Dockerfile"
        docker("build", "--quiet", "--tag", PROMETHEUS, recipe, "tests", limit_s=BUILD_S)
    except AssertionError as error:
        pytest.skip(f"Prometheus is not to be had here: {str(error)[-300:]}")


@pytest.fixture
def swarm() -> Iterator[Project]:
    images = {"PROMETHEUS_IMAGE": PROMETHEUS, "GRAFANA_IMAGE": IMAGE}
    project = Project(("peers/compose.yaml", "peers/metrics.yaml"), images)
    try:
        project.up("--scale", "volunteer=2", "--scale", "grafana=0")
        yield project
    finally:
        project.down()


def test_the_rules_call_when_they_must_and_only_then() -> None:
    volumes = ("--volume", f"{ROOT}/peers:/peers:ro", "--volume", f"{ROOT}/tests/containers:/tests:ro")
    docker("run", "--rm", *volumes, PROMETHEUS, "promtool", "check", "config", "/peers/prometheus.yml")
    said = docker("run", "--rm", *volumes, PROMETHEUS, "promtool", "test", "rules", "/tests/alerts_test.yml")
    assert "SUCCESS" in said


def test_prometheus_has_everybodys_values_and_notices_that_the_bootstrap_is_gone(swarm: Project) -> None:
    address = swarm.compose("port", "prometheus", "9090").strip()

    def ask(path: str) -> Any:
        with urllib.request.urlopen(f"http://{address}/api/v1/{path}", timeout=ANSWER_S) as answer:
            return json.load(answer)["data"]

    def values(query: str) -> list[float]:
        found = ask(f"query?query={urllib.parse.quote(query)}")["result"]
        return [float(each["value"][1]) for each in found]

    def alerts() -> list[str]:
        """Pending for some minutes, then firing."""
        return [alert["labels"]["alertname"] for alert in ask("alerts")["alerts"]]

    swarm.wait_until(lambda: values("up") == [1.0] * 3, "a bootstrap and two volunteers are found", FOUND_S)
    swarm.wait_until(lambda: values("swarmtrain_healthy") == [1.0] * 3, "all of them healthy", FOUND_S)
    swarm.wait_until(lambda: values('swarmtrain_loss{job="volunteer"} < 5') != [], "it learns", FOUND_S)
    swarm.wait_until(lambda: values('swarmtrain_run_tokens{job="bootstrap"} > 0') != [], "it is archived", FOUND_S)
    both = 'swarmtrain_peers{job="bootstrap", role="volunteer"}'  # one alone trains and is archived before the other
    swarm.wait_until(lambda: values(both) == [2.0], "both volunteers are here", FOUND_S)
    assert not [alert for alert in ask("alerts")["alerts"] if alert["state"] == "firing"], "all is well"
    swarm.wait_until(lambda: "BootstrapGone" not in alerts(), "the bootstrap is known to be there", FOUND_S)

    answers = {where: values(query) for where, query in dashboard_queries()}
    drawn = {where.rpartition(" ")[0] for where, found in answers.items() if found}
    assert drawn >= {
        "Trained",
        "Volunteers",
        "Training loss",
        "Peers",
        "Speed of each",
        "Who did what",
        "Memory, and expected",
    }
    assert [answers[where] for where in ("Volunteers A", "Alerts A")] == [[2.0], [0.0]]

    swarm.compose("stop", "--timeout", LEAVES_S, "bootstrap")
    swarm.wait_until(lambda: "BootstrapGone" in alerts(), "it is noticed", FOUND_S)

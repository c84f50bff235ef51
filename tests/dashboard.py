"""Queries of Grafana's dashboard and of the alerts, as Prometheus gets them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

PEERS = Path(__file__).resolve().parents[1] / "peers"
DASHBOARD: dict[str, Any] = json.loads((PEERS / "grafana" / "swarm.json").read_text(encoding="utf-8"))
ALERTS: dict[str, Any] = yaml.safe_load((PEERS / "alerts.yml").read_text(encoding="utf-8"))
_FILLED_IN = {"$__rate_interval": "40s", "$run": ".*", "$volunteer": ".*"}
"""Values that Grafana gives to variables: all runs and all volunteers."""


def panels() -> list[dict[str, Any]]:
    """Return the dashboard's panels, without the titles of its rows."""
    return [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]


def dashboard_queries() -> Iterator[tuple[str, str]]:
    """Yield where each query of the dashboard is, and the query."""
    for panel in panels():
        for target in panel["targets"]:
            expr = target["expr"]
            for variable, value in _FILLED_IN.items():
                expr = expr.replace(variable, value)
            yield f"{panel['title']} {target['refId']}", expr

r"""Chaos on real containers: scenarios as files, what happens when, and what must hold.

    make chaos                                            # every file of tests/chaos, once
    python tests/chaos/run.py tests/chaos/kill.toml --times 5

A scenario starts a swarm by `docker compose` (`chaos.yaml` lies over it), lets it train for `settle_s`, takes its steps
against `victims` of its volunteers, and looks at the others from the first step until `watch_s` after the last. Times
are from the volunteers' own `round` events. What must hold:

- the victims train again within `return_within_s` of the last step (0: they are not to come back);
- the others end their rounds meanwhile: none of them stands still for more than `gap_s`, besides its usual round;
- their trainers' stall is at most `stall_share` of the time;
- no contribution that the swarm knew is lost from the totals.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from docker_engine import Project, build, docker, status

FILES = ("peers/compose.yaml", "tests/chaos/chaos.yaml")


@dataclass(frozen=True, kw_only=True)
class Step:
    """Something done to every victim, so long after the step before it."""

    do: str
    after_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """See the module."""

    name: str
    says: str
    steps: tuple[Step, ...]
    volunteers: int = 4
    victims: int = 1
    settle_s: float = 30.0
    watch_s: float = 40.0
    return_within_s: float = 30.0
    gap_s: float = 3.0
    stall_share: float = 0.01


def read(path: Path) -> Scenario:
    """A scenario file; ValueError for what is not known."""
    data = tomllib.loads(path.read_text())
    known = {each.name for each in fields(Scenario)} - {"name"}
    if unknown := set(data) - known:
        raise ValueError(f"{path}: {', '.join(sorted(unknown))}: there are {', '.join(sorted(known))}")
    steps = tuple(Step(**step) for step in data.pop("steps"))
    if unknown := {step.do for step in steps} - set(ACTIONS):
        raise ValueError(f"{path}: {', '.join(sorted(unknown))}: there are {', '.join(ACTIONS)}")
    return Scenario(name=path.stem, steps=steps, **data)


# ---------------------------------------------------------------- what is done


def _kill(swarm: Project, victim: str) -> None:
    pid = status(victim)["pid"]
    docker("exec", victim, "python", "-c", f"import os; os.kill({pid}, 9)")


def _delete(swarm: Project, victim: str) -> None:
    docker("rm", "--force", "--volumes", victim)


def _replace(swarm: Project, victim: str) -> None:
    swarm.compose("up", "--detach", "--no-build", "--no-recreate", f"--scale=volunteer={len(swarm.all)}", "volunteer")


def _kill_bootstrap(swarm: Project, victim: str) -> None:
    docker("kill", *swarm.of_service("bootstrap"))


ACTIONS = {
    "kill": _kill,
    "pause": lambda swarm, victim: docker("pause", victim),
    "unpause": lambda swarm, victim: docker("unpause", victim),
    "restart": lambda swarm, victim: docker("restart", "--time", "30", victim),
    "disconnect": lambda swarm, victim: docker("network", "disconnect", f"{swarm.name}_default", victim),
    "connect": lambda swarm, victim: docker("network", "connect", f"{swarm.name}_default", victim),
    "delete": _delete,
    "replace": _replace,
    "kill-bootstrap": _kill_bootstrap,
}


@dataclass
class Swarm(Project):
    """The project, and the volunteers it began with."""

    all: list[str] = field(default_factory=list)


# ---------------------------------------------------------------- what is seen


def rounds(container: str) -> list[dict[str, Any]]:
    """Its `round` events."""
    lines = docker("logs", container).splitlines()
    return [event for line in lines if line.startswith("{") and (event := json.loads(line))["event"] == "round"]


def gap_s(told: list[dict[str, Any]], since_s: float, until_s: float) -> float:
    """The longest time without a round's end, less the median of its rounds before."""
    before = sorted(event["seconds"] for event in told if event["time"] < since_s)
    ends = [since_s, *(event["time"] for event in told if since_s < event["time"] < until_s), until_s]
    return max(b - a for a, b in itertools.pairwise(ends)) - before[len(before) // 2]


def contributions(peers: Iterable[dict[str, Any]]) -> dict[str, int]:
    return {each["peer"]: each["tokens"] for each in peers}


# ---------------------------------------------------------------- one run


@dataclass
class Found:
    """Of one run."""

    return_s: float = 0.0
    gap_s: float = 0.0
    stall: float = 0.0
    tokens_lost: int = 0
    failed: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        back = f"{self.return_s:.1f} s" if self.return_s else "-"
        holds = "; ".join(self.failed) or "holds"
        return f"{back} | {self.gap_s:.1f} s | {100 * self.stall:.2f} % | {self.tokens_lost} | {holds}"


def run(scenario: Scenario) -> Found:
    """Start a swarm, do it, look, and clean up."""
    swarm = Swarm(FILES)
    try:
        swarm.up(f"--scale=volunteer={scenario.volunteers}")
        swarm.all = swarm.of_service("volunteer")
        time.sleep(scenario.settle_s)
        return _run(scenario, swarm)
    finally:
        swarm.down()


def _run(scenario: Scenario, swarm: Swarm) -> Found:
    victims, others = swarm.all[: scenario.victims], swarm.all[scenario.victims :]
    before = contributions(status(others[0])["peers"])
    began_s = time.time()
    for step in scenario.steps:
        time.sleep(step.after_s)
        for victim in victims or [""]:
            ACTIONS[step.do](swarm, victim)
    acted_s = time.time()
    time.sleep(scenario.watch_s)
    until_s = time.time()
    found = Found()
    told = {name: rounds(name) for name in others}
    found.gap_s = max(gap_s(each, began_s, until_s) for each in told.values())
    late = [event for each in told.values() for event in each if began_s < event["time"] < until_s]
    found.stall = sum(event["stall_s"] for event in late) / sum(event["seconds"] for event in late)
    after = contributions(status(others[0])["peers"])
    found.tokens_lost = sum(max(0, tokens - after.get(peer, 0)) for peer, tokens in before.items())
    if scenario.victims and scenario.return_within_s:
        back = [name for name in swarm.of_service("volunteer") if name not in others]
        ends = [[event["time"] for event in rounds(name) if event["time"] > acted_s] for name in back]
        found.return_s = max((min(each, default=until_s) for each in ends), default=until_s) - acted_s
        if len(back) < len(victims) or found.return_s > scenario.return_within_s:
            found.failed.append(f"not back within {scenario.return_within_s:g} s")
    if found.gap_s > scenario.gap_s:
        found.failed.append(f"another stood still for {found.gap_s:.1f} s")
    if found.stall > scenario.stall_share:
        found.failed.append(f"the others' stall is {100 * found.stall:.1f} %")
    if found.tokens_lost:
        found.failed.append(f"{found.tokens_lost} tokens are lost from the totals")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenarios", nargs="*", type=Path)
    parser.add_argument("--times", type=int, default=1, help="how often each is run")
    given = parser.parse_args()
    paths = given.scenarios or sorted(Path(__file__).parent.glob("*.toml"))
    scenarios = [read(path) for path in paths]
    build()
    print("| scenario | victims train again | others stand still | others' stall | tokens lost | |")
    print("|---|---|---|---|---|---|", flush=True)
    failed = 0
    for scenario in scenarios:
        for _ in range(given.times):
            found = run(scenario)
            failed += bool(found.failed)
            print(f"| {scenario.says} | {found} |", flush=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()

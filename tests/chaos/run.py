r"""Chaos tests on real containers: scenario files say what happens when, and what must hold.

    make chaos                                            # every file of tests/chaos, once
    python tests/chaos/run.py tests/chaos/kill.toml --times 5
    python tests/chaos/run.py --times 5 --json runs.jsonl # continues where it was stopped

A scenario starts a swarm by `docker compose` (extended by `chaos.yaml`), lets it train for `settle_s`, applies its
steps to `victims` of its volunteers, observes the others from the first step until `watch_s` after the last, and waits
for the run's end. Times are from the volunteers' own `round` events. What must hold:

- each victim merges with a volunteer that was no victim within `return_within_s` of the last step (0: it need not come
  back);
- the others end their rounds meanwhile: none is delayed by more than `gap_s` (or half a round, if that is more) beyond
  its usual round;
- their trainers' stall is at most `stall_share` of the time;
- no contribution that the swarm knew is lost from the totals;
- memory, threads and file handles of the others do not grow;
- the run ends by itself, its held-out loss is at most `worse_share` above that of the same run (the same seed, as many
  tokens) without faults, which is played too; this holds for the mean over `--times`, and twice as much for each run;
- no output or log file, not even of deleted containers, has a traceback or a reported bug; nothing is left behind;
- with `spread_rounds`: after at most this many rounds all weights are as close to each other as before.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from chaos import seen
from chaos.faults import ACTIONS, CHECKS, Swarm, build_images, hidden_reach, hosts
from chaos.scenarios import Scenario, read
from docker_engine import ROOT, build, status

FILES = ("peers/compose.yaml", "tests/chaos/chaos.yaml")
END_S = 1500.0
"""Time limit until a run has all its tokens after its scenario, on a busy machine."""
_NOT_PLAYED = "the scenario could not be played"
_OF_A_ROUND = 0.5
"""Share of a round by which rounds may vary without counting as a delay."""
_NOISE = 2.0
"""Factor by which a single run may be further off than the mean: runs without faults differ too."""
HEADER = "| what happens | victims merge again | others stand still | stall | tokens lost | loss | to that without | |"


@dataclass
class Found:
    """Results of one run."""

    return_s: float | None = None
    gap_s: float = 0.0
    stall: float = 0.0
    tokens_lost: int = 0
    held_out_loss: float = math.nan
    ratio: float | None = None
    spread_rounds: float | None = None
    """Rounds until the weights were as close to each other as before."""
    spreads: dict[str, list[tuple[float, float | None]]] = field(default_factory=dict)
    """(seconds since the first step, spread of the merged weights), by volunteer."""
    commit: str = ""
    failed: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        back = "-" if self.return_s is None else f"{self.return_s:.1f} s"
        ratio = "-" if self.ratio is None else f"{self.ratio:.3f}"
        spread = "" if self.spread_rounds is None else f"spread as before after {self.spread_rounds:g} rounds; "
        cells = [back, f"{self.gap_s:.1f} s", f"{100 * self.stall:.2f} %", str(self.tokens_lost)]
        return " | ".join([*cells, f"{self.held_out_loss:.3f}", ratio, spread + ("; ".join(self.failed) or "holds")])


def run_file(scenario: Scenario, seed: int, folder: Path) -> Path:
    """Write `examples/stdlib-gpt.toml` with the scenario's length."""
    text = (ROOT / "examples" / "stdlib-gpt.toml").read_text(encoding="utf-8")
    for key, value in (("total_tokens", scenario.total_tokens), ("seed", seed)):
        text = re.sub(rf"(?m)^{key} = \S+", f"{key} = {value}", text)
    path = folder / "run.toml"
    path.write_text(text, encoding="utf-8")
    return path


def run(scenario: Scenario, seed: int) -> Found:
    """Start a swarm, apply the scenario, observe, wait for the end, and clean up."""
    with tempfile.TemporaryDirectory() as folder:
        settings = {"SWARMTRAIN_RUN_FILE": str(run_file(scenario, seed, Path(folder)))}
        swarm = Swarm((*FILES, *scenario.files), settings)
        try:
            swarm.up(f"--scale=volunteer={scenario.volunteers}")
            swarm.all = swarm.of_service("volunteer")
            time.sleep(scenario.settle_s)
            found = Found()
            gone = _act(scenario, swarm, found)
            _end(swarm, gone, found)
        finally:
            swarm.down()
        if left := swarm.leftovers():
            found.failed.append(f"left behind: {' '.join(left)}")
        return found


def _act(scenario: Scenario, swarm: Swarm, found: Found) -> list[str]:
    """Apply the steps and observe; returns the volunteers that are gone for good."""
    victims = hosts(swarm)[:1] if scenario.victim == "host" else swarm.all[: scenario.victims]
    others = [name for name in swarm.all if name not in victims] or swarm.all
    others += swarm.of_service("unreachable")
    peers = frozenset(status(name)["peer"] for name in others)
    gone = status(victims[0])["peer"] if scenario.victim == "host" else ""
    witness = others[0]
    before, held = seen.contributions(status(witness)["peers"]), {name: seen.held(name) for name in others}
    began_s = time.time()
    for step in scenario.steps:
        time.sleep(step.after_s)
        ACTIONS[step.do](swarm, victims)
    acted_s = time.time()
    time.sleep(scenario.watch_s)
    until_s = time.time()
    found.tokens_lost = seen.tokens_lost(before, seen.contributions(status(witness)["peers"]))
    if gone and (reach := hidden_reach(swarm)) and (gone[-6:] in reach or " and " not in reach):
        found.failed.append(f"the hidden volunteer has not found another host: {reach}")
    found.failed += [problem for step in scenario.steps if (problem := CHECKS.get(step.do, _fine)(swarm))]
    if found.tokens_lost:
        found.failed.append(f"{found.tokens_lost} tokens are lost from the totals")
    present = [*swarm.of_service("volunteer"), *swarm.of_service("unreachable")]
    rounds = {name: seen.events(name, "round") for name in present}
    told = [rounds[name] for name in (swarm.all if scenario.victims_train else others)]
    found.gap_s = max(seen.gap_s(each, began_s, until_s) for each in told)
    found.stall = seen.stall_share(told, began_s, until_s)
    found.failed += [f"{name}: {words}" for name in others if (words := seen.grown(held[name], seen.held(name)))]
    if scenario.spread_rounds:
        found.spreads = {name: seen.spreads(each, began_s) for name, each in rounds.items()}
        found.spread_rounds = max(seen.spread_returned(each, began_s, acted_s) for each in rounds.values())
        if found.spread_rounds > scenario.spread_rounds:
            found.failed.append(f"the weights are not as near as before after {scenario.spread_rounds} rounds")
    if found.gap_s > max(scenario.gap_s, _OF_A_ROUND * max(seen.usual_s(each, began_s) for each in told)):
        found.failed.append(f"another stood still for {found.gap_s:.1f} s")
        print(f"steps from {began_s:.1f} to {acted_s:.1f}", *map(seen.in_short, told), sep="\n", file=sys.stderr)
    if found.stall > scenario.stall_share:
        found.failed.append(f"the others' stall is {100 * found.stall:.1f} %")
    if victims and scenario.steps and scenario.return_within_s:
        back = rounds if victims == others else {name: each for name, each in rounds.items() if name not in others}
        times = [seen.returned_s(each, peers, acted_s) for each in back.values()]
        found.return_s = max(times) if len(back) >= len(victims) else math.inf
        if found.return_s > scenario.return_within_s:
            found.failed.append(f"not back within {scenario.return_within_s:g} s")
    return [] if scenario.return_within_s else victims


def _fine(swarm: Swarm) -> str:
    return ""


def _end(swarm: Swarm, gone: list[str], found: Found) -> None:
    """Wait for the end of the run, and check how it ended."""
    give_up_s = time.monotonic() + END_S
    survivors = [name for name in swarm.of_service("volunteer") if name not in gone]
    while not all(swarm.containers()[name]["State"] == "exited" for name in survivors):
        if time.monotonic() > give_up_s:
            found.failed.append(f"the run does not end within {END_S:g} s")
            break
        time.sleep(1.0)
    done = [event for name in survivors for event in seen.events(name, "done")]
    found.held_out_loss = seen.held_out_loss(event for event in done if event["reason"] == "total_tokens")
    swarm.keep_logs(*swarm.containers())
    for name, said in swarm.logs:
        if (place := max(said.find("Traceback"), said.find("a bug in swarmtrain"))) >= 0:
            found.failed.append(f"{name}: a traceback, or a bug that was told")
            print(name, said[max(0, place - 1500) : place + 3000], sep="\n", file=sys.stderr)
    if found.failed:
        print(swarm.told(), file=sys.stderr)


def _found(row: dict[str, Any]) -> Found:
    return Found(**{key: one for key, one in row.items() if one is not None})


class Kept:
    """Results by scenario and seed, kept as lines of a JSON file."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._commit = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
        ).stdout.strip()
        lines = path.read_text(encoding="utf-8").splitlines() if path is not None and path.exists() else []
        self._found = {(row.pop("scenario"), row.pop("seed")): _found(row) for row in map(json.loads, lines)}

    def once(self, scenario: Scenario, seed: int, play: Callable[[Scenario, int], Found]) -> Found:
        """Return an earlier result, or play now."""
        key = scenario.name, seed
        if key not in self._found:
            found = self._found[key] = play(scenario, seed)
            found.commit = self._commit
            if self._path is not None and _NOT_PLAYED not in found.failed:
                with self._path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"scenario": key[0], "seed": seed, **_finite(asdict(found))}) + "\n")
        return self._found[key]


def _compared(scenario: Scenario, seed: int, kept: Kept) -> Found:
    """Play a scenario, and the same run without it."""
    found = Found()
    try:
        base = kept.once(scenario.without, seed, run)
        found = run(scenario, seed) if scenario.steps else base
        found.ratio = found.held_out_loss / base.held_out_loss
        if not found.ratio <= 1 + _NOISE * scenario.worse_share:
            found.failed.append(f"the loss is {found.ratio:.3f} of that without")
        if base is not found and base.failed:
            found.failed.append(f"the run without: {'; '.join(base.failed)}")
    except (AssertionError, subprocess.SubprocessError, ValueError, KeyError) as error:  # mostly docker's
        print(error, file=sys.stderr)
        found.failed.append(_NOT_PLAYED)
    return found


def _finite(row: dict[str, Any]) -> dict[str, Any]:
    """Replace infinities, which JSON does not have."""
    return {key: None if isinstance(one, float) and not math.isfinite(one) else one for key, one in row.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenarios", nargs="*", type=Path)
    parser.add_argument("--times", type=int, default=1, help="how often each is run, with as many seeds")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="add a line for each run; those that it has are not run again"
    )
    given = parser.parse_args()
    scenarios = [read(path) for path in given.scenarios or sorted(Path(__file__).parent.glob("*.toml"))]
    build()
    build_images(frozenset(step.do for scenario in scenarios for step in scenario.steps))
    print(f"{HEADER}\n|---|---|---|---|---|---|---|---|", flush=True)
    kept = Kept(given.json)
    failed = 0
    all_ratios: dict[str, list[float]] = {scenario.name: [] for scenario in scenarios}
    for seed, scenario in itertools.product(range(given.times), scenarios):
        found = kept.once(scenario, seed, functools.partial(_compared, kept=kept))
        failed += bool(found.failed)
        all_ratios[scenario.name] += [found.ratio] if found.ratio is not None else []
        print(f"| {scenario.says} | {found} |", flush=True)
    for scenario in scenarios:
        ratios = all_ratios[scenario.name]
        if ratios and not statistics.fmean(ratios) <= 1 + scenario.worse_share:
            failed += 1
            print(f"{scenario.name}: the loss is {statistics.fmean(ratios):.3f} of that without", flush=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()

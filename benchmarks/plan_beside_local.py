"""Compare what `plan` predicts with what `local` measured: rounds, time, traffic of links, stall.

    O="--slowdown 16,24,32,48 --rtt 40 --link-up 20 --link-down 100"
    swarmtrain local RUN.toml --peers 4 $O --json > run.jsonl
    python benchmarks/plan_beside_local.py RUN.toml run.jsonl $O

The options after the two files are those of `plan`; the seconds of a step are taken from the run. Traffic of links is
known only with links. Slowdowns must leave the volunteers enough of this machine's cores: a plan assumes a machine for
each.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from statistics import mean, median
from typing import Any


def main() -> None:
    """Run the command line described in the module's docstring."""
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    run, events, options = sys.argv[1], sys.argv[2], sys.argv[3:]
    slowdowns = [float(each) for each in options[options.index("--slowdown") + 1].split(",")]
    told = [json.loads(line) for line in Path(events).read_text().splitlines()]
    rounds = defaultdict[str, list[dict[str, Any]]](list)
    for event in told:
        if event["event"] == "round":
            rounds[event["name"]].append(event)
    names = sorted(rounds, key=lambda name: int(name.rpartition("-")[2]))
    step_s = mean(
        sum(each["seconds"] for each in rounds[name][1:])
        / sum(each["inner_steps"] for each in rounds[name][1:])
        / slowdowns[index % len(slowdowns)]
        for index, name in enumerate(names)
    )
    command = [sys.executable, "-m", "swarmtrain.cli", "plan", run, "--peers", str(len(names))]
    command += ["--step-s", f"{step_s:.6f}", "--json", *options]
    plan = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    lasted_s = {name: rounds[name][-1]["time"] - rounds[name][0]["time"] for name in names}
    every = [each for name in names for each in rounds[name]]
    links = {event["name"]: event for event in told if event["event"] == "link"}
    rows = {
        "rounds an hour": (plan["rounds_per_hour"], median(3600 * (len(rounds[n]) - 1) / lasted_s[n] for n in names)),
        "rounds in the run": (plan["num_rounds"], median(len(rounds[name]) for name in names)),
        "the whole run, s": (plan["run_s"], max(event["wall_s"] for event in told if event["event"] == "done")),
        "received for merging, MB": (
            plan["payload_down_bytes"] * plan["num_rounds"] / 1e6,
            sum(each["bytes_received"] for each in every) / len(names) / 1e6,
        ),
        "stall, %": (
            100 * plan["stall_share"],
            100 * sum(each["stall_s"] for each in every) / sum(each["seconds"] for each in every),
        ),
    }
    for way in ("up", "down") if links else ():
        rows[f"link {way}, MB"] = plan[f"{way}_bytes"] / 1e6, mean(links[n][f"{way}_bytes"] for n in names) / 1e6
    print(f"a step took {1000 * step_s:.1f} ms\n{'':26}{'planned':>10}{'measured':>10}{'ratio':>8}")
    for what, (planned, measured) in rows.items():
        print(f"{what:26}{planned:10.2f}{measured:10.2f}{planned / measured:8.3f}")


if __name__ == "__main__":
    main()

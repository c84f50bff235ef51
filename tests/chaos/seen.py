"""Observations of a swarm: its volunteers' events, its totals, and resources of its processes."""

from __future__ import annotations

import contextlib
import json
import math
import statistics
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from docker_engine import docker, docker_logs

Events = Sequence[Mapping[str, Any]]
_PROCESSES = """
import glob, json, os
rss = threads = files = 0
for path in glob.glob("/proc/[0-9]*"):
    try:
        command = open(f"{path}/cmdline").read()
        if "swarmtrain" not in command and "p2pd" not in command: continue
        told = dict(line.split(":", 1) for line in open(f"{path}/status"))
        rss += int(told["VmRSS"].split()[0]) * 1024
        threads += int(told["Threads"])
        files += len(os.listdir(f"{path}/fd"))
    except OSError:
        pass
print(json.dumps([rss, threads, files]))
"""


def events(container: str, kind: str) -> list[dict[str, Any]]:
    """Return its events of one kind, including those of earlier processes."""
    told = (json.loads(line) for line in docker("logs", container).splitlines() if line.startswith("{"))
    return [event for event in told if event["event"] == kind]


def said(container: str) -> str:
    """Return all that a container has written, to its outputs and to the log files in its folder."""
    told = [docker_logs(container)]
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.suppress(AssertionError):  # a container that was never a peer has no folder
            docker("cp", "--quiet", f"{container}:/data/swarmtrain", folder)
        told += [path.read_text(errors="replace") for path in sorted(Path(folder).rglob("*.log*"))]
    return "\n".join(told)


def usual_s(rounds: Events, before_s: float) -> float:
    """Return how long its largest round takes, scaled by inner steps from rounds before `before_s`; 0 without any.

    The first rounds are short.
    """
    return max((event["inner_steps"] for event in rounds), default=0) * _step_s(rounds, before_s)


def _step_s(rounds: Events, before_s: float) -> float:
    each = [event["seconds"] / event["inner_steps"] for event in rounds if event["time"] < before_s]
    return statistics.median_high(each) if each else 0.0


def gap_s(rounds: Events, since_s: float, until_s: float) -> float:
    """Return the longest time without a round's end, minus the usual time of its inner steps."""
    step_s = _step_s(rounds, since_s)
    last_s = max((event["time"] for event in rounds if event["time"] <= since_s), default=since_s)
    gap_s = 0.0
    for event in rounds:
        if since_s < event["time"] < until_s:
            gap_s = max(gap_s, event["time"] - last_s - event["inner_steps"] * step_s)
            last_s = event["time"]
    return max(gap_s, until_s - last_s - usual_s(rounds, since_s))


def in_short(rounds: Events) -> str:
    """Describe when its rounds ended and what took how long, to find a cause."""
    keys = ("time", "seconds", "stall_s", "merge_s", "pull_s")
    return "\n".join(" ".join(f"{event[key] or 0.0:.1f}" for key in keys) for event in rounds)


def stall_share(rounds: Iterable[Events], since_s: float, until_s: float) -> float:
    """Return the share of stalled time, over all rounds that ended in that time."""
    late = [event for each in rounds for event in each if since_s < event["time"] < until_s]
    return sum(event["stall_s"] for event in late) / max(1e-9, sum(event["seconds"] for event in late))


def returned_s(rounds: Events, partners: frozenset[str], after_s: float) -> float:
    """Return how long after `after_s` it merged one of `partners`; infinite if it did not."""
    ends = (event["time"] for event in rounds if event["time"] > after_s and partners & set(event["partners"]))
    return min(ends, default=math.inf) - after_s


def spread_returned(rounds: Events, since_s: float, after_s: float) -> float:
    """Return the rounds after `after_s` until merged weights are as close as in the median round before `since_s`.

    Infinite if no round is.
    """
    before = [event["consensus_spread"] for event in rounds if event["time"] < since_s]
    usual = statistics.median([spread for spread in before if spread is not None])
    late = [event["consensus_spread"] for event in rounds if event["time"] > after_s]
    near = (number for number, spread in enumerate(late, 1) if spread is not None and spread <= usual)
    return next(near, math.inf)


def spreads(rounds: Events, since_s: float) -> list[tuple[float, float | None]]:
    """Return (seconds since `since_s`, spread of the merged weights) for each round."""
    return [(round(event["time"] - since_s, 1), event["consensus_spread"]) for event in rounds]


def contributions(peers: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """Return the tokens of each peer listed by `status`."""
    return {each["peer"]: each["tokens"] for each in peers}


def tokens_lost(before: Mapping[str, int], after: Mapping[str, int]) -> int:
    """Return tokens that were counted before and no longer are."""
    return sum(max(0, tokens - after.get(peer, 0)) for peer, tokens in before.items())


def held_out_loss(done: Iterable[Mapping[str, Any]]) -> float:
    """Return the mean over ended volunteers; NaN if none measured it."""
    losses = [event["held_out_loss"] for event in done if event["held_out_loss"] is not None]
    return statistics.fmean(losses) if losses else math.nan


@dataclass(frozen=True)
class Held:
    """Resources of a container's processes."""

    rss_bytes: int
    threads: int
    files: int


def held(container: str) -> Held:
    """Measure its Python process and its libp2p daemon together."""
    return Held(*json.loads(docker("exec", container, "/opt/swarmtrain/bin/python", "-c", _PROCESSES)))


_MEMORY_SHARE, _MEMORY_MIB, _MORE_THREADS, _MORE_FILES = 0.15, 48, 12, 24
"""Normal variation within a minute: arenas, open pulls and their threads, connections, checkpoints."""


def grown(before: Held, after: Held) -> str:
    """Say what has grown beyond normal variation; empty if nothing has."""
    mib = 2**20
    was_mib = before.rss_bytes // mib
    rows = (
        ("MiB of memory", was_mib, after.rss_bytes // mib, was_mib * _MEMORY_SHARE + _MEMORY_MIB),
        ("threads", before.threads, after.threads, _MORE_THREADS),
        ("files", before.files, after.files, _MORE_FILES),
    )
    return ", ".join(f"{now} {what} instead of {was}" for what, was, now, more in rows if now > was + more)

"""Volunteers that train on several devices, each with a process of its own: what is killed takes nothing along."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import psutil
import pytest
from swarm import Child, Swarm, exit_limit_s, wait_until, write_run

from swarmtrain.events import ErrorEvent

pytestmark = pytest.mark.processes


def rank_of(child: Child) -> psutil.Process:
    """Return the process of a volunteer's second rank."""
    ours = [each for each in psutil.Process(child.process.pid).children() if "rank_process" in " ".join(each.cmdline())]
    assert len(ours) == 1, child.story()
    return ours[0]


def test_a_killed_rank_ends_its_volunteer_and_a_killed_volunteer_its_rank(swarm: Swarm) -> None:
    run_file = write_run(swarm.folder, merge={"inner_steps": 5})
    bootstrap = swarm.bootstrap(run_file, "--wait-for", "2")
    anna, ben = (swarm.join(name, bootstrap.invite.invite, "--device", "cpu,cpu") for name in ("anna", "ben"))
    for child in (anna, ben):
        child.wait_round(1)
    ranks = {child.name: rank_of(child) for child in (anna, ben)}
    folders = [Path(f"/proc/{rank.pid}/fd/2").readlink().parent for rank in ranks.values()]

    os.kill(ranks["anna"].pid, signal.SIGKILL)
    assert anna.wait() == 1, anna.story()
    (error,) = anna.all(ErrorEvent)
    assert error.code == "rank-lost" and "SIGKILL" in error.message and "\n" not in error.message
    assert list((anna.folder / "checkpoints").iterdir()), "it can go on from there"
    ben.wait_more_rounds(1)

    ben.kill()
    wait_until(lambda: not ranks["ben"].is_running(), "the end of the other rank", exit_limit_s())
    swarm.interrupt_all([bootstrap])
    assert len(folders) == 2 and not any(folder.exists() for folder in folders)

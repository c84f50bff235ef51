"""Trackers of real peers: curves over a kill and a restart, and a tracker that breaks while its peer trains."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path

import pytest
from swarm import Child, Swarm, write_run

from swarmtrain.events import RoundEvent, StartedEvent, TrackerEvent, WarningEvent

pytestmark = pytest.mark.processes

ROOT = Path(__file__).resolve().parents[2]
BROKEN = """
import time
class utils:
    TRACKIO_DIR = "/nowhere"
class Run:
    def log(self, metrics, step):
        raise ConnectionError("the server says no")
    def finish(self):
        time.sleep(1e6)
def init(**given):
    return Run()
"""


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Read a peer's curves as TensorBoard does: step and value of each point, in their order."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    read.Reload()
    return {tag: [(each.step, each.value) for each in read.Scalars(tag)] for tag in read.Tags()["scalars"]}


def losses(child: Child) -> list[float]:
    return [event.loss for event in child.all(RoundEvent)]


def test_curves_over_a_kill_and_a_restart_and_a_tracker_that_breaks(
    swarm: Swarm, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard")
    library = swarm.folder / "library"
    (library / "trackio-1.0.dist-info").mkdir(parents=True)
    (library / "trackio-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: trackio\nVersion: 1.0\n")
    (library / "trackio.py").write_text(BROKEN)
    monkeypatch.setenv("PYTHONPATH", f"{library}{os.pathsep}{ROOT}")
    network = {"archive_every_s": 2.0, "presence_ttl_s": 10.0}
    merge = {"method": "gossip", "min_peers": 1, "inner_steps": 5}
    file = write_run(swarm.folder, merge=merge, evaluation={"every_rounds": 3}, network=network)
    bootstrap = swarm.bootstrap(file, "--report-to", "tensorboard")
    anna = swarm.join("anna", bootstrap.invite.invite, "--report-to", "tensorboard")
    # Not forked: its library is found by PYTHONPATH.
    ben = swarm.join("ben", bootstrap.invite.invite, "--report-to", "trackio", prelude="import os")
    anna.wait_event(TrackerEvent)
    anna.wait_more_rounds(4)
    ben.wait_event(WarningEvent, lambda event: event.code == "tracker-failed")
    ben.wait_more_rounds(4)
    anna.kill()
    again = swarm.join("anna", bootstrap.invite.invite)  # the folder remembers the tracker
    again.wait_event(TrackerEvent)
    again.wait_more_rounds(4)
    swarm.interrupt_all([again, ben, bootstrap])

    drawn = curves(anna.folder)
    steps = [step for step, _ in drawn["train/loss"]]
    assert all(before < after for before, after in itertools.pairwise(steps))
    for tag, points in drawn.items():
        assert all(before < after for (before, _), (after, _) in itertools.pairwise(points)), tag
    told = [*losses(anna), *losses(again)]
    found = [value for _, value in drawn["train/loss"]]
    # The last round before the kill may have been told and not drawn, or drawn and not told.
    assert len(told) - 1 <= len(found) <= len(told) + 1
    assert found[-len(losses(again)) :] == pytest.approx(losses(again))
    assert found[: len(losses(anna)) - 1] == pytest.approx(losses(anna)[:-1])
    assert len(drawn["eval/loss"]) >= 2 and drawn["swarm/peers"][-1][1] == 2.0
    assert len(list((anna.folder / "tensorboard").glob("events.*"))) == 2
    sent = [value for _, value in drawn["link/sent_bytes"]]
    assert sent == sorted(sent) and sent[0] < sent[-1]
    kept = json.loads((anna.folder / "trackers.json").read_text())
    assert kept["step"] == max(step for points in drawn.values() for step, _ in points)

    whole = curves(bootstrap.folder)
    assert whole["train/tokens"][-1][1] == pytest.approx(whole["train/tokens"][-1][0], abs=1)
    assert whole["train/loss"] and whole["swarm/peers"]

    codes = [event.code for event in ben.all(WarningEvent)]
    assert codes.count("tracker-failed") == 1, codes
    assert ben.all(StartedEvent) and not (ben.folder / "tensorboard").exists()

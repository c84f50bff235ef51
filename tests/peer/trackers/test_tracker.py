"""A tracker's process: what is handed over, told once, tried again, dropped and left behind, with libraries of our own
that fail, hang and print as theirs may."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from codes import codes_in
from patience import PATIENCE_S

from swarmtrain.events import Event, TrackerEvent, WarningEvent, in_words
from swarmtrain.peer.trackers import tracker as tracker_module
from swarmtrain.peer.trackers.points import Point
from swarmtrain.peer.trackers.sinks import TrackedPeer
from swarmtrain.peer.trackers.tracker import Tracker, TrackerLimits

ROOT = Path(__file__).resolve().parents[3]

LIBRARY = """
import json, os, pathlib, sys, time
print("* a library prints")
here = pathlib.Path(__file__).parent
class utils:
    TRACKIO_DIR = "/curves"
def says(what):
    return (here / what).exists()
class Run:
    def log(self, metrics, step):
        if says("fail"):
            raise OSError("no space left on its device\\nreally")
        if says("die"):
            os._exit(7)
        if says("hang"):
            time.sleep(1e6)
        with (here / "points").open("a") as file:
            print(json.dumps([step, metrics]), file=file)
    def finish(self):
        with (here / "ends").open("a") as file:
            print(os.getpid(), file=file)
        if says("never ends"):
            time.sleep(1e6)
def init(**given):
    if says("no init"):
        raise ValueError("no account")
    with (here / "inits").open("a") as file:
        print(json.dumps({**given, "asked": sys.stdin.read(), "argv": sys.argv, "pid": os.getpid(),
            "environment": sorted(name for name in os.environ if "SWARMTRAIN" in name)}), file=file)
    return Run()
"""
"""Fake trackio, by the calls that `TrackioSink` makes; files beside it say what it does."""


class Library:
    """The fake library, and what it was told."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "library"
        self.folder.mkdir()
        (self.folder / "trackio.py").write_text(LIBRARY)

    def now(self, what: str, is_so: bool = True) -> None:
        if is_so:
            (self.folder / what).touch()
        else:
            (self.folder / what).unlink()

    def rows(self, name: str) -> list[Any]:
        path = self.folder / name
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    @property
    def steps(self) -> list[int]:
        return [step for step, _ in self.rows("points")]


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Library:
    library = Library(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{library.folder}{os.pathsep}{ROOT}")
    monkeypatch.setenv("SWARMTRAIN_JOIN_NAME", "anna")
    return library


class Told(list[Event]):
    """Events that a tracker has emitted."""

    def codes(self) -> list[str]:
        return [code for event in self for code in codes_in(in_words(event))]


PEER = {"id": "1a2b", "run": "tiny", "group": "tiny-ab", "name": "anna", "role": "volunteer", "step": 0}


def a_tracker(folder: Path, told: Told, **patience: float) -> Tracker:
    given = {"answer_s": 1000.0, "retry_s": 0.01, "finish_s": PATIENCE_S, **patience}
    peer = TrackedPeer(folder=str(folder), run_file="[run]", config={"run": {"seed": 1}, "machine": {}}, **PEER)  # type: ignore[arg-type]
    return Tracker("trackio", peer, told.append, TrackerLimits(**given))


def point(step: int) -> Point:
    return Point(step, 1e9 + step, {"train/loss": 1 / step})


def ended(tracker: Tracker) -> None:
    tracker.finish()
    tracker.close()


def until(condition: Callable[[], object]) -> None:
    give_up_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < give_up_s
        threading.Event().wait(0.005)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] not in "ZX"
    except OSError:
        return False


def test_points_arrive_in_their_order_and_what_a_library_prints_is_no_answer(tmp_path: Path, library: Library) -> None:
    told = Told()
    tracker = a_tracker(tmp_path, told)
    for step in (100, 200, 300):
        tracker.add(point(step))
    ended(tracker)
    assert library.rows("points") == [[step, {"train/loss": 1 / step}] for step in (100, 200, 300)]
    assert (tracker.num_taken, tracker.num_dropped) == (3, 0)
    (init,) = library.rows("inits")
    assert (init["name"], init["project"], init["resume"]) == ("anna-1a2b", "tiny", "allow")
    assert init["config"] == {"run": {"seed": 1}, "machine": {}}
    assert init["asked"] == "", "its input is not the peer's"
    assert init["environment"] == [] and init["argv"][1:] == ["trackio"], "nothing of how the peer was started"
    assert len(library.rows("ends")) == 1 and not is_running(init["pid"])
    assert told == [TrackerEvent(tracker="trackio", where="/curves", shown_by="trackio show --project tiny")]
    assert "a library prints" in (tmp_path / "trackio.log").read_text()


@pytest.mark.parametrize(("how", "why"), [("fail", "no space left on its device really"), ("die", "status 7")])
def test_a_failure_is_told_once_and_nothing_is_lost(tmp_path: Path, library: Library, how: str, why: str) -> None:
    told = Told()
    library.now(how)
    tracker = a_tracker(tmp_path, told)
    for step in (100, 200, 300):
        tracker.add(point(step))
    until(lambda: len(library.rows("inits")) > 2)  # tried again, and again
    library.now(how, False)
    until(lambda: tracker.num_taken == 3)
    ended(tracker)
    assert library.steps == [100, 200, 300]
    assert told.codes() == ["tracker-failed"]
    assert why in in_words(told[-1]) and sum(isinstance(event, TrackerEvent) for event in told) == 1


def test_a_library_that_does_not_begin_is_told_of_with_its_reason(tmp_path: Path, library: Library) -> None:
    told = Told()
    library.now("no init")
    tracker = a_tracker(tmp_path, told, retry_s=1000.0)
    tracker.add(point(100))
    until(lambda: told)
    ended(tracker)
    (warning,) = told
    assert isinstance(warning, WarningEvent) and "ValueError: no account" in warning.message
    assert tracker.num_dropped == 1


def test_one_that_hangs_is_told_of_and_ended_and_gets_the_point_again(tmp_path: Path, library: Library) -> None:
    told = Told()
    library.now("hang")
    tracker = a_tracker(tmp_path, told)
    tracker.add(point(100))
    until(lambda: tracker._asked_s is not None and library.rows("inits"))
    (init,) = library.rows("inits")
    tracker.check(time.monotonic() + 999.0)
    assert is_running(init["pid"]), "it has its time"
    library.now("hang", False)
    until(lambda: tracker.check(time.monotonic() + 1001.0) or told.codes())
    until(lambda: not is_running(init["pid"]))
    until(lambda: tracker.num_taken == 1)
    ended(tracker)
    assert library.steps == [100] and told.codes() == ["tracker-failed"]
    assert "no answer for 1000 s" in in_words(next(event for event in told if isinstance(event, WarningEvent)))


def test_who_adds_points_never_waits_and_the_oldest_are_dropped(
    tmp_path: Path, library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracker_module, "MAX_WAITING", 3)
    library.now("hang")
    tracker = a_tracker(tmp_path, Told(), finish_s=0.0)
    for step in range(1, 11):
        tracker.add(point(step))
    assert tracker.num_dropped == 7
    until(lambda: library.rows("inits"))
    ended(tracker)
    assert tracker.num_dropped == 10 and library.steps == []
    until(lambda: not is_running(library.rows("inits")[0]["pid"]))


def test_the_peers_end_does_not_wait_for_a_library_that_does_not(tmp_path: Path, library: Library) -> None:
    """It has all points, and some minutes to send them."""
    library.now("never ends")
    tracker = a_tracker(tmp_path, Told())
    tracker.add(point(100))
    until(lambda: tracker.num_taken == 1)
    tracker._limits = TrackerLimits(finish_s=0.0)
    ended(tracker)
    until(lambda: library.rows("ends"))
    (pid,) = library.rows("ends")
    assert is_running(pid)
    os.kill(pid, signal.SIGALRM)  # as at their end
    until(lambda: not is_running(pid))

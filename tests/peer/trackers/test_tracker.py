"""The trackers' process: what is handed over, told once, tried again and left behind, with libraries of our own that
fail, hang and print as theirs may."""

from __future__ import annotations

import io
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from codes import codes_in
from patience import PATIENCE_S

from swarmtrain.events import Event, TrackerEvent, WarningEvent, in_words
from swarmtrain.peer.trackers import process
from swarmtrain.peer.trackers import tracker as tracker_module
from swarmtrain.peer.trackers.points import Point
from swarmtrain.peer.trackers.sinks import Place, TrackedPeer
from swarmtrain.peer.trackers.tracker import Trackers

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


def trackers_of(folder: Path, told: Told) -> Trackers:
    peer = TrackedPeer(folder=str(folder), run_file="[run]", config={"run": {"seed": 1}, "machine": {}}, **PEER)  # type: ignore[arg-type]
    return Trackers(["trackio", "tensorboard"], peer, told.append)


def point(step: int) -> Point:
    return Point(step, 1e9 + step, {"train/loss": 1 / step})


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


def of_trackio(told: Told) -> list[Event]:
    return [event for event in told if "trackio" in in_words(event)]


def test_points_arrive_in_their_order_and_what_a_library_prints_is_no_answer(tmp_path: Path, library: Library) -> None:
    told = Told()
    trackers = trackers_of(tmp_path, told)
    for step in (100, 200, 300):
        trackers.add(point(step))
    trackers.close()
    until(lambda: trackers._process.poll() == 0)
    assert library.rows("points") == [[step, {"train/loss": 1 / step}] for step in (100, 200, 300)]
    (init,) = library.rows("inits")
    assert (init["name"], init["project"], init["resume"]) == ("anna-1a2b", "tiny", "allow")
    assert init["config"] == {"run": {"seed": 1}, "machine": {}}
    assert init["asked"] == "", "its input is not the peer's"
    assert init["environment"] == [] and init["argv"][1:] == [], "nothing of how the peer was started"
    assert len(library.rows("ends")) == 1
    assert of_trackio(told) == [
        TrackerEvent(tracker="trackio", where="/curves", shown_by="trackio show --project tiny")
    ]
    assert "a library prints" in (tmp_path / "trackers.log").read_text()
    assert list((tmp_path / "tensorboard").iterdir()), "each of them draws"


@pytest.mark.parametrize(
    ("how", "why"), [("no init", "ValueError: no account"), ("fail", "OSError: no space left on its device really")]
)
def test_one_that_fails_is_told_of_once_and_costs_the_other_nothing(
    tmp_path: Path, library: Library, how: str, why: str
) -> None:
    told = Told()
    library.now(how)
    trackers = trackers_of(tmp_path, told)
    for step in (100, 200, 300):
        trackers.add(point(step))
    until(lambda: told.codes())
    trackers.close()
    until(lambda: trackers._process.poll() == 0)
    assert told.codes() == ["tracker-failed"] and library.steps == []
    assert why in in_words(of_trackio(told)[-1])
    written = b"".join(path.read_bytes() for path in (tmp_path / "tensorboard").iterdir())
    assert written.count(b"train/loss") == 3


def test_one_that_fails_is_begun_anew_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    answers, begun = io.BytesIO(), list[str]()

    class Failing:
        def begin(self, peer: TrackedPeer) -> Place:
            begun.append(peer.name)
            return Place(where="here")

        def log(self, step: int, time: float, values: Mapping[str, float]) -> None:
            if step < 300:
                raise OSError("full")

        def end(self) -> None:
            raise OSError("still full")

    monkeypatch.setattr(process, "SINKS", {"a": Failing})
    monkeypatch.setattr(process, "_AGAIN_S", 0.0)
    head = {"kinds": ["a"], "peer": {**PEER, "folder": "", "run_file": "", "config": {}}}
    points = [{"step": step, "time": 0.0, "values": {}} for step in (100, 200, 300)]
    process.draw([json.dumps(line).encode() for line in (head, *points)], answers, lambda: None)
    found = [json.loads(line) for line in answers.getvalue().splitlines()]
    assert begun == ["anna"] * 3
    assert [line.get("error", line.get("where")) for line in found] == [
        *("here", "OSError: full", "OSError: still full") * 2,
        *("here", "OSError: still full"),
    ]


def test_a_process_that_ends_is_told_of_and_started_again(
    tmp_path: Path, library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = Told()
    library.now("die")
    trackers = trackers_of(tmp_path, told)
    trackers.add(point(100))
    until(lambda: len(told.codes()) == 2)
    assert told.codes() == ["tracker-failed"] * 2, "one for each tracker"
    assert all("ended with status 7" in in_words(event) for event in told if isinstance(event, WarningEvent))
    library.now("die", False)
    trackers.add(point(200))
    until(lambda: not trackers._listener.is_alive())
    monkeypatch.setattr(trackers, "_again_s", 0.0)
    trackers.add(point(300))
    trackers.close()
    until(lambda: trackers._process.poll() == 0)
    assert library.steps == [300] and len(told.codes()) == 2, "points in between are lost"


def test_who_adds_points_never_waits_for_one_that_hangs_nor_does_the_peers_end(
    tmp_path: Path, library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracker_module, "_FINISH_S", 0.0)
    library.now("hang")
    told = Told()
    trackers = trackers_of(tmp_path, told)
    for step in range(1, 5000):
        trackers.add(point(step))
    until(lambda: library.rows("inits"))
    trackers.close()
    (init,) = library.rows("inits")
    assert is_running(init["pid"]) and library.steps == []
    os.kill(init["pid"], signal.SIGALRM)  # as at the end of its time
    until(lambda: trackers._process.poll() is not None)


def test_one_that_hangs_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    entered, goes_on, answers = threading.Event(), threading.Event(), io.BytesIO()
    monkeypatch.setattr(process, "_HANGS_S", -1.0)

    class Hanging:
        def begin(self, peer: TrackedPeer) -> Place:
            entered.set()
            goes_on.wait()
            return Place(where="here")

        def log(self, step: int, time: float, values: Mapping[str, float]) -> None: ...

        def end(self) -> None: ...

    def lines() -> Iterator[bytes]:
        yield json.dumps({"kinds": ["a"], "peer": {**PEER, "folder": "", "run_file": "", "config": {}}}).encode()
        until(entered.is_set)
        yield b'{"step": 1, "time": 0.0, "values": {}}'
        goes_on.set()

    monkeypatch.setattr(process, "SINKS", {"a": Hanging})
    process.draw(lines(), answers, lambda: None)
    first, second = (json.loads(line) for line in answers.getvalue().splitlines())
    assert "gave no answer" in first["error"] and second["where"] == "here"

"""End of a swarm on one machine, with processes that only report when they end."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from codes import raises_code

from swarmtrain.cli.local import _again, _Plan, _train
from swarmtrain.errors import RunTimeError, SwarmtrainError, UserError
from swarmtrain.events import DoneEvent, ErrorEvent, Event, InviteEvent, WarningEvent
from swarmtrain.peer.lifecycle.stop import StopFlag
from swarmtrain.peer.local.swarm import LocalSwarm
from swarmtrain.run import RunFile

_PEER = """
import json, os, signal, sys, time
seen = []
def end(number, frame):
    seen.append(number)
    if len(seen) < int(sys.argv[1]):
        return
    print(json.dumps({"event": "done", "name": sys.argv[sys.argv.index("--name") + 1], "held_out_loss": None,
        "tokens": 0, "run_tokens": 0, "wall_s": time.monotonic(), "reason": "interrupted"}), flush=True)
    os._exit(0)
signal.signal(signal.SIGTERM, end)
print(json.dumps({"event": "invite", "line": "", "invite": "", "run_sha256": "", "addresses": []}), flush=True)
while True:
    time.sleep(60)
"""


def swarm_of(folder: Path, **needed: int) -> LocalSwarm:
    """Peers by name, each of which ends when it is told to so often."""
    swarm = LocalSwarm(folder)
    for name, times in needed.items():
        swarm.start(name, [str(times)], ("-c", _PEER))
    ready = [event for _, event in zip(needed, swarm.events(60.0), strict=False)]
    assert all(isinstance(event, InviteEvent) for event in ready) and len(ready) == len(needed)
    return swarm


def _when(event: Event) -> float:
    """Return the time of a line: the last lines of two processes may be read in either order."""
    return event.wall_s if isinstance(event, DoneEvent) else 0.0


def test_volunteers_end_before_the_bootstrap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("swarmtrain.peer.local.swarm._HAND_OVER_LIMIT_S", 0.2)
    swarm = swarm_of(tmp_path, bootstrap=1, anna=1, bert=2)
    groups = {os.getpgid(child.process.pid) for child in swarm.children.values()}
    assert os.getpgid(0) not in groups, "Ctrl-C in a terminal is for this process"
    said: list[Event] = []
    swarm.stop(said.append)
    said += swarm.last_words()
    ended = [event.name for event in sorted(said, key=_when) if isinstance(event, DoneEvent)]
    assert ended == ["anna", "bert", "bootstrap"], "bert was told twice"
    assert [child.process.returncode for child in swarm.children.values()] == [0, 0, 0]


def test_who_does_not_end_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for limit in ("_HAND_OVER_LIMIT_S", "_INSIST_S"):
        monkeypatch.setattr(f"swarmtrain.peer.local.swarm.{limit}", 0.2)
    swarm = swarm_of(tmp_path, bootstrap=1, anna=9)
    swarm.stop()
    assert [child.process.returncode for child in swarm.children.values()] == [0, -9]


_FAILING = """
import json, sys
print(json.dumps({"event": "error", "message": "no card; give another device", "code": "device-unusable",
    "exit_code": 2}), flush=True)
sys.exit(2)
"""


def test_a_bootstrap_whose_volunteers_have_all_failed_is_not_waited_for(tmp_path: Path) -> None:
    swarm = swarm_of(tmp_path, bootstrap=1, anna=1)
    told: list[Event] = []
    try:
        swarm.start("bert", [], ("-c", _FAILING))
        for event in swarm.events(60.0):
            told.append(event)
            if isinstance(event, WarningEvent):
                break
        assert [type(event) for event in told] == [ErrorEvent, WarningEvent], "anna goes on"
        swarm.children["anna"].process.kill()
        swarm.children["anna"].process.wait()
        swarm.start("anna", [], ("-c", _FAILING))
        with raises_code("device-unusable", UserError, "anna: no card"):
            told += swarm.events(60.0)
    finally:
        swarm.stop()


@pytest.mark.parametrize(("code", "error"), [(2, UserError), (1, RunTimeError)])
def test_the_code_of_a_child_is_that_of_the_swarm(tmp_path: Path, code: int, error: type[SwarmtrainError]) -> None:
    swarm = LocalSwarm(tmp_path)
    swarm.start("bootstrap", [], ("-c", f"raise SystemExit({code})"))
    with raises_code("peer-failed", error, f"ended with status {code}"):
        swarm.wait_for_invite()
    swarm.stop()


_PREPARING = """
import json
print(json.dumps({"event": "warning", "message": "the model is downloaded"}), flush=True)
print(json.dumps({"event": "invite", "line": "", "invite": "st1", "run_sha256": "", "addresses": []}), flush=True)
"""


def test_the_invite_is_waited_for_as_long_as_the_bootstrap_works(tmp_path: Path) -> None:
    """However long that is: what it says meanwhile is shown."""
    swarm, shown = LocalSwarm(tmp_path), list[Event]()
    swarm.start("bootstrap", [], ("-c", _PREPARING))
    invite, seen = swarm.wait_for_invite(show=shown.append)
    assert invite.invite == "st1" and seen == shown
    assert [type(event) for event in shown] == [WarningEvent, InviteEvent]
    swarm.stop()
    swarm = LocalSwarm(tmp_path)
    swarm.start("bootstrap", [], ("-c", _FAILING))
    with raises_code("device-unusable", UserError):
        swarm.wait_for_invite()
    swarm.stop()


def test_the_line_to_go_on_is_what_was_typed_with_its_folder() -> None:
    folder = Path("runs/x 1")
    assert _again(["local", "stdlib-gpt", "--peers", "2"], folder) == (
        "swarmtrain local stdlib-gpt --peers 2 --dir 'runs/x 1'"
    )
    for given in (["--dir", "a"], ["--dir=a"]):
        assert _again(["local", *given, "r.toml", "--rtt", "5"], folder) == (
            "swarmtrain local r.toml --rtt 5 --dir 'runs/x 1'"
        )


_WAITING = """
import json, signal, sys, time
def end(number, frame):
    print(json.dumps({"event": "done", "held_out_loss": None, "tokens": 0, "run_tokens": 0, "wall_s": 1.0,
        "reason": "asked"}), flush=True)
    sys.exit(0)
signal.signal(signal.SIGTERM, end)
if sys.argv[1] == "finishing":
    print(json.dumps({"event": "finishing", "doing": "measuring"}), flush=True)
time.sleep(float(sys.argv[2]))
end(0, None)
"""
_HOLDING = """
import json, subprocess, sys
subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=sys.stdin)
print(json.dumps({"event": "done", "held_out_loss": 1.0, "tokens": 0, "run_tokens": 0, "wall_s": 1.0,
    "reason": "total_tokens"}), flush=True)
"""


@pytest.mark.parametrize(("finishing", "seconds", "told"), [("no", "1000", 1), ("finishing", "2", 0)])
def test_a_bootstrap_that_waits_for_volunteers_that_have_all_ended_is_ended(
    finishing: str, seconds: str, told: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But not one that has seen the end of the run, and measures the model."""
    monkeypatch.setattr("swarmtrain.peer.local.swarm._ALONE_S", 0.5)
    swarm = LocalSwarm(tmp_path)
    try:
        swarm.start("bootstrap", [finishing, seconds], ("-c", _WAITING))
        swarm.start("anna", ["no", "0"], ("-c", _WAITING))
        events = list(swarm.events())
        warnings = [event for event in events if isinstance(event, WarningEvent)]
        assert [event.code for event in warnings] == ["bootstrap-left-alone"] * told
        assert len([event for event in events if isinstance(event, DoneEvent)]) == 2
        assert swarm.children["bootstrap"].process.returncode == 0
    finally:
        swarm.stop()


def test_a_bootstrap_does_not_wait_for_volunteers_that_a_rehearsal_does_not_start_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("swarmtrain.peer.local.swarm._ALONE_S", 0.1)
    swarm = swarm_of(tmp_path, bootstrap=1, anna=1)
    try:
        swarm.end("anna", cleanly=False)
        assert not list(swarm.events(1.0)), "anna may come back"
        swarm.end_restarts()
        events = list(swarm.events())
        assert [event.code for event in events if isinstance(event, WarningEvent)] == ["bootstrap-left-alone"]
        assert swarm.children["bootstrap"].process.returncode == 0
    finally:
        swarm.stop()


def test_a_child_of_a_child_that_stays_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It holds the pipe open in which the events come."""
    monkeypatch.setattr("swarmtrain.peer.local.swarm._PIPE_S", 0.3)
    read, write = os.pipe()
    plain = subprocess.Popen

    def popen(*args: Any, **given: Any) -> Any:
        return plain(*args, **given | {"stdin": read})

    monkeypatch.setattr("swarmtrain.peer.local.swarm.subprocess.Popen", popen)
    swarm = LocalSwarm(tmp_path)
    try:
        swarm.start("anna", [], ("-c", _HOLDING))
        assert [type(event) for event in swarm.events(60.0)] == [DoneEvent]
        assert swarm.children["anna"].closed
    finally:
        os.close(write)  # ends the one that stayed
        os.close(read)


_DIVERGED = """
import json, sys
name = sys.argv[sys.argv.index("--name") + 1]
done = {"event": "done", "name": name, "held_out_loss": None, "tokens": 9, "run_tokens": 9, "wall_s": 1.0,
    "reason": "total_tokens"}
if name == "bootstrap":
    print(json.dumps({"event": "invite", "name": name, "line": "", "invite": "st1", "run_sha256": "", "addresses": []}))
    print(json.dumps({"event": "warning", "name": name, "message": "not a finite number", "code": sys.argv[1]}))
print(json.dumps(done), flush=True)
"""


@pytest.mark.parametrize(
    ("said", "code"), [("training-diverged", "training-diverged"), ("archive-not-written", "loss-not-measured")]
)
def test_a_run_whose_final_loss_is_not_finite_says_where_its_model_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str, code: str
) -> None:
    start = LocalSwarm.start

    def start_told(self: LocalSwarm, name: str, arguments: object, program: object = ()) -> None:
        start(self, name, [said], ("-c", _DIVERGED))

    monkeypatch.setattr(LocalSwarm, "start", start_told)
    run = RunFile.model_validate({"run": {"total_tokens": 10_000}})
    plan = _Plan([], run, tmp_path, [[]], True, None)
    with raises_code(code, RunTimeError) as raised:
        _train(plan, StopFlag(), cast(Any, SimpleNamespace(start=lambda: None)))
    assert (str(tmp_path / "bootstrap" / "model") in str(raised.value)) is (code == "training-diverged")

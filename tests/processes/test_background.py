"""Peers in the background: they outlive what started them, say how it went, and end cleanly."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from codes import codes_in
from swarm import PATIENCE_S, Child, Swarm, wait_until, write_run

from swarmtrain.events import JoinedEvent, PeerLeftEvent, RoundEvent
from swarmtrain.network.discovery.invite import Invite, InvitedPeer, format_invite, parse_invite
from swarmtrain.network.identity import new_identity

pytestmark = pytest.mark.processes

ROUND = r" event: round \d+: loss "
LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3} (debug|info|warning|error) +[\w.]+: \S.*|    .*")


DIES = """
import os, sys
if "SWARMTRAIN_BACKGROUND" in os.environ:
    print("last words", file=sys.stderr, flush=True)
    os._exit(7)
"""


def in_session(swarm: Swarm, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a session of its own, as a terminal's, and wait until that session's leader has ended."""
    return subprocess.run(
        [sys.executable, "-m", "swarmtrain.cli", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=swarm.environment,
        cwd=swarm.folder,
        start_new_session=True,
        timeout=PATIENCE_S,
    )


def join(swarm: Swarm, bootstrap: Child, *extra: str) -> subprocess.CompletedProcess[str]:
    folder = str(swarm.folder / "anna")
    own = ["--name", "anna", "--dir", folder, "--listen", "127.0.0.1:0", "--threads", "1", "--data", str(swarm.folder)]
    return in_session(swarm, "join", bootstrap.invite.invite, *own, "--background", *extra)


@pytest.fixture
def adopts() -> Iterator[None]:
    """Adopt processes that outlive their parent, so that their exit codes can be read."""
    set_child_subreaper = 36
    ctypes.CDLL(None).prctl(set_child_subreaper, 1, 0, 0, 0)
    yield
    ctypes.CDLL(None).prctl(set_child_subreaper, 0, 0, 0, 0)


def pid_in(folder: Path) -> int:
    return int((folder / "peer.pid").read_text())


@pytest.mark.usefixtures("adopts")
def test_a_volunteer_in_the_background_outlives_its_session_and_ends_cleanly(swarm: Swarm) -> None:
    bootstrap = swarm.bootstrap(write_run(swarm.folder))
    beside = swarm.join("beside", bootstrap.invite.invite)
    beside.wait_event(JoinedEvent)
    started = join(swarm, bootstrap)
    assert started.returncode == 0, started.stderr
    folder = swarm.folder / "anna"
    pid = pid_in(folder)
    assert f"anna runs in the background, process {pid}\n" in started.stderr
    assert f"swarmtrain leave --dir {folder}\n" in started.stderr
    assert f"swarmtrain pause --dir {folder}\n" in started.stderr
    assert str(folder / "peer.log") in started.stderr
    assert " anna joined at round " in started.stdout
    assert os.getsid(pid) == pid, "a session of its own: its terminal may go"
    leads_to = [Path(f"/proc/{pid}/fd/{number}").readlink() for number in range(3)]
    assert leads_to == [Path(os.devnull), folder / "peer.log", folder / "peer.log"]
    beside.wait_event(RoundEvent, lambda event: len(event.partners) == 2)
    wait_until(lambda: re.search(ROUND, (folder / "peer.log").read_text()), "a round of anna's own")
    os.kill(pid, signal.SIGTERM)
    beside.wait_event(PeerLeftEvent)
    (status,) = wait_until(lambda: (had := os.waitpid(pid, os.WNOHANG))[0] and had[1:], "the end of anna")
    assert status == 0
    assert not (folder / "peer.pid").exists()
    log = (folder / "peer.log").read_text()
    for line in log.splitlines():
        assert LINE.fullmatch(line), line
    assert " event: joined at round " in log
    assert " event: done (interrupted) after " in log.splitlines()[-1]
    assert "hivemind" not in log, "nothing went wrong"
    swarm.interrupt_all([beside, bootstrap])


def test_a_volunteer_in_the_background_that_cannot_join_says_why_with_its_code(swarm: Swarm) -> None:
    bootstrap = swarm.bootstrap(write_run(swarm.folder))
    run_sha256 = parse_invite(bootstrap.invite.invite).run_sha256
    nobody = format_invite(Invite(run_sha256, (InvitedPeer(new_identity().peer_id, ("/ip4/127.0.0.1/tcp/1",)),)))
    for invite, exit_code, code in [("st1nonsense", 2, "invite-garbled"), (nobody, 1, "nobody-answers")]:
        folder = swarm.folder / f"failed-{exit_code}"
        failed = in_session(swarm, "join", invite, "--dir", str(folder), "--background", "--json")
        assert failed.returncode == exit_code, failed.stderr
        assert failed.stderr.startswith("error: ") and failed.stderr.count("\n") == 1
        assert codes_in(failed.stderr) == [code]
        assert f'"code": "{code}"' in failed.stdout.splitlines()[-1] and '"event": "error"' in failed.stdout
    assert re.search(
        r"event: error: .* \[nobody-answers\]$", (swarm.folder / "failed-1" / "peer.log").read_text(), re.MULTILINE
    )
    missing = in_session(swarm, "join", nobody, "--dir", "x", "--background", "--nonsense")
    assert missing.returncode == 2 and "--nonsense" in missing.stderr
    swarm.interrupt_all([bootstrap])


def test_a_process_that_dies_before_it_can_say_why(swarm: Swarm) -> None:
    child = swarm.start("join", ["join", "st1x", "--background"], prelude=DIES)
    assert child.wait() == 7
    assert child.error_line() == "error: the process in the background ended with code 7: last words [background-ended]"


def test_ctrl_c_while_waiting_leaves_it_running(swarm: Swarm) -> None:
    """A bootstrap that is held up at its imports until the one that waits for it is gone."""
    held = swarm.folder / "held"
    swarm.folder.mkdir(exist_ok=True)
    os.mkfifo(held)
    prelude = f"import os\nif 'SWARMTRAIN_BACKGROUND' in os.environ:\n    open({str(held)!r}).read()"
    run_file, folder = write_run(swarm.folder), swarm.folder / "kept"
    arguments = ["bootstrap", str(run_file), "--dir", str(folder), "--listen", "127.0.0.1:0", "--background"]
    waiting = swarm.start("waiting", arguments, prelude=prelude)
    with held.open("w"):  # opens when it has begun to read
        waiting.interrupt()
        assert waiting.wait() == 130
    said = b"".join(waiting.noise).decode()
    assert said.startswith("stopped waiting: it keeps running in the background, process ")
    pid = int(said.split("process ")[1].split(";")[0])
    wait_until(lambda: (folder / "invite.txt").exists(), "the bootstrap that was not waited for")
    assert pid_in(folder) == pid
    left = swarm.run("leave", "--dir", str(folder))
    assert left.code == 0, left.stderr
    swarm.assert_nothing_left()

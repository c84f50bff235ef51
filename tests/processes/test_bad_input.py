"""Mistakes of a person: one line that says what to do, an `error` event with --json, and nothing lost."""

from __future__ import annotations

import hashlib
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from codes import codes_in
from preloaded import Preloaded
from swarm import Child, Finished, Swarm, write_run

from swarmtrain.compatibility import PROTOCOL
from swarmtrain.errors import RunTimeError, UserError
from swarmtrain.events import ErrorEvent, JoinedEvent, RoundEvent, WarningEvent
from swarmtrain.network.daemon import swarm_time
from swarmtrain.network.discovery.invite import Invite, InvitedPeer, format_invite, parse_invite
from swarmtrain.network.identity import load_or_create_identity, new_identity
from swarmtrain.network.node import NetworkThread, Node, NodeSettings
from swarmtrain.network.service import namespace_of, service_type
from swarmtrain.network.snapshots.store import SnapshotStore
from swarmtrain.v1 import snapshot_pb2 as pb

pytestmark = pytest.mark.processes

WITHIN_S = 20.0
HERE = ("--listen", "127.0.0.1:0", "--json")


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory, preloaded: Preloaded) -> Iterator[tuple[Swarm, Child]]:
    """Run a bootstrap, and processes beside it."""
    with Swarm(tmp_path_factory.mktemp("live"), preloaded=preloaded) as swarm:
        yield swarm, swarm.bootstrap(write_run(swarm.folder))


def assert_one_line(finished: Finished, exit_code: int, code: str, *words: str) -> None:
    """It failed with this exit code, one line that has this code and these words, and the same as an event."""
    assert finished.code == exit_code, finished.stderr
    lines = finished.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), finished.stderr
    for word in words:
        assert word in lines[0]
    assert not finished.lines, "standard output is for events"
    (event,) = finished.errors
    assert (f"error: {event.message} [{event.code}]", event.exit_code) == (lines[0], exit_code)
    assert event.code == code


# ---------------------------------------------------------------- the run file and its data


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"merge": {"inner_stps": 10}}, ["unknown-key", "merge.inner_stps", "did you mean merge.inner_steps?"]),
        ({"merge": {"inner_steps": "ten"}}, ["wrong-type", "merge.inner_steps", '"ten"', "an integer from 1"]),
        ({"data": {"paths": ["nothing/*.txt"]}}, ["no-such-data", "data.paths", "nothing/*.txt"]),
        ({"data": {"paths": ["empty.txt"]}}, ["no-text", "empty.txt"]),
        ({"data": {"paths": ["short.txt"]}}, ["too-little-text", "the corpus has 4000 bytes", "8192"]),
    ],
)
def test_run_files(live: tuple[Swarm, Child], sections: dict[str, dict[str, object]], words: list[str]) -> None:
    swarm, _ = live
    (swarm.folder / "empty.txt").touch()
    (swarm.folder / "short.txt").write_text("word " * 800)
    bad = {"run": {"name": "bad"}, **sections}
    run_file = write_run(swarm.folder, **bad)
    finished = swarm.run("bootstrap", str(run_file), "--dir", str(swarm.folder / "bad"), *HERE)
    assert_one_line(finished, UserError.exit_code, *words)


def test_a_run_file_that_is_not_there(live: tuple[Swarm, Child]) -> None:
    finished = live[0].run("bootstrap", "nothing.toml", *HERE)
    assert_one_line(finished, UserError.exit_code, "no-run-file", "nothing.toml: ", "stdlib-gpt")


def test_a_volunteer_without_the_run_s_text(live: tuple[Swarm, Child]) -> None:
    swarm, bootstrap = live
    join = ("join", bootstrap.invite.invite, "--dir", str(swarm.folder / "textless"), *HERE)
    assert_one_line(swarm.run(*join), UserError.exit_code, "data-folder-needed", "--data FOLDER")
    (swarm.folder / "elsewhere").mkdir()
    finished = swarm.run(*join, "--data", str(swarm.folder / "elsewhere"))
    assert_one_line(finished, UserError.exit_code, "no-such-data", "texts/*.txt")


# ---------------------------------------------------------------- invites


def test_invites_that_cannot_be_read(live: tuple[Swarm, Child]) -> None:
    swarm, bootstrap = live
    word = bootstrap.invite.invite
    middle = "2" if word[60] != "2" else "3"
    for bad, code in [
        (word[:60] + middle + word[61:], "invite-garbled"),
        (word[:-5], "invite-garbled"),
        ("st9" + word[3:], "run-needs-newer"),
        (word[:40] + "0" + word[41:], "invite-garbled"),
        ("swarmtrain", "not-an-invite"),
    ]:
        finished = swarm.run("join", bad, "--dir", str(swarm.folder / "unread"), *HERE)
        assert_one_line(finished, UserError.exit_code, code)
    assert not (swarm.folder / "unread").exists(), "nothing was begun"


def test_nobody_answers(live: tuple[Swarm, Child]) -> None:
    swarm, bootstrap = live
    run_sha256 = parse_invite(bootstrap.invite.invite).run_sha256
    with socket.socket() as mute, socket.socket() as closed:
        mute.bind(("127.0.0.1", 0))
        mute.listen()  # connections are made, and nothing is ever said
        closed.bind(("127.0.0.1", 0))
        for taken, limit_s in [(mute, WITHIN_S), (closed, WITHIN_S)]:
            address = f"/ip4/127.0.0.1/tcp/{taken.getsockname()[1]}"
            invite = format_invite(Invite(run_sha256, (InvitedPeer(new_identity().peer_id, (address,)),)))
            began_s = time.monotonic()
            finished = swarm.run("join", invite, "--dir", str(swarm.folder / "alone"), *HERE)
            assert time.monotonic() - began_s < limit_s
            assert_one_line(finished, RunTimeError.exit_code, "nobody-answers", address)
            assert not (swarm.folder / "alone").exists(), "a new folder in which there is nothing yet"


def test_another_peer_answers_than_the_one_invited_to(live: tuple[Swarm, Child]) -> None:
    swarm, bootstrap = live
    real = parse_invite(bootstrap.invite.invite)
    addresses = real.peers[0].addresses
    invite = format_invite(Invite(real.run_sha256, (InvitedPeer(new_identity().peer_id, addresses),)))
    finished = swarm.run("join", invite, "--dir", str(swarm.folder / "alone"), *HERE)
    assert_one_line(finished, RunTimeError.exit_code, "nobody-answers", addresses[0])


class Liar:
    """Answers as a peer of the run would."""

    def hello(self, request: pb.HelloRequest, caller: str) -> pb.HelloReply:
        return pb.HelloReply(protocol=PROTOCOL, run_sha256=request.run_sha256, time=swarm_time())


async def lie(folder: Path, run_sha256: str) -> Node:
    """Start a node that serves another run under the hash of this one."""
    key_path = folder / "identity.key"
    settings = NodeSettings(directory=folder, listen=("/ip4/127.0.0.1/tcp/0",))
    node = await Node.start(settings, load_or_create_identity(key_path), key_path)
    service = service_type()(Liar(), SnapshotStore(), {run_sha256: b"[run]\nname = 'another'\n"}, node)
    await node.serve(service, namespace_of(run_sha256))
    return node


def test_a_run_that_does_not_match_the_invite_s_hash(live: tuple[Swarm, Child], tmp_path: Path) -> None:
    swarm, _ = live
    run_sha256 = hashlib.sha256(b"promised").hexdigest()
    network = NetworkThread()
    node = network.run(lie(tmp_path, run_sha256), 30)
    try:
        addresses = network.run(node.addresses(), 10)
        invite = format_invite(Invite(run_sha256, (InvitedPeer(node.identity.peer_id, addresses),)))
        finished = swarm.run("join", invite, "--dir", str(swarm.folder / "deceived"), *HERE)
    finally:
        network.run(node.stop(), 10)
        network.stop()
    assert_one_line(finished, RunTimeError.exit_code, "run-not-delivered", node.identity.peer_id, "hash")
    assert not (swarm.folder / "deceived" / "run.toml").exists(), "nothing of it was kept"


# ---------------------------------------------------------------- this machine


def test_a_taken_port(live: tuple[Swarm, Child]) -> None:
    swarm, bootstrap = live
    port = bootstrap.invite.addresses[0].split("/")[4]
    join = ("join", bootstrap.invite.invite, "--dir", str(swarm.folder / "portless"), "--json")
    finished = swarm.run(*join, "--listen", f"127.0.0.1:{port}", "--data", str(swarm.folder))
    assert_one_line(finished, RunTimeError.exit_code, "port-taken", f"/tcp/{port}", "--listen")


def test_a_folder_in_use(live: tuple[Swarm, Child]) -> None:
    swarm, bootstrap = live
    run_file = swarm.folder / "tiny.toml"
    for command in (["bootstrap", str(run_file)], ["join", bootstrap.invite.invite]):
        finished = swarm.run(*command, "--dir", str(bootstrap.folder), *HERE)
        words = ("folder-in-use", str(bootstrap.folder), f"(process {bootstrap.process.pid})", "--dir")
        assert_one_line(finished, UserError.exit_code, *words)
    printed = swarm.run("invite", "--dir", str(bootstrap.folder))
    assert printed.stdout.strip() == bootstrap.invite.line, "the owner's invite is still there"


def test_a_folder_that_cannot_be_written(live: tuple[Swarm, Child]) -> None:
    """Tests may run as root, whom no permission stops: a file stands in the way."""
    swarm, _ = live
    (swarm.folder / "file").write_text("not a folder")
    run_file = str(swarm.folder / "tiny.toml")
    finished = swarm.run("bootstrap", run_file, "--dir", str(swarm.folder / "file" / "below"), *HERE)
    assert_one_line(finished, UserError.exit_code, "folder-not-writable", f"{swarm.folder}/file/below", "--dir")
    finished = swarm.run("bootstrap", run_file, "--dir", "/proc/swarmtrain", *HERE)
    assert_one_line(finished, UserError.exit_code, "folder-not-writable", "/proc/swarmtrain", "--dir")
    assert (swarm.folder / "file").read_text() == "not a folder"


def test_a_folder_of_another_run(live: tuple[Swarm, Child]) -> None:
    swarm, _ = live
    folder = swarm.folder / "kept"
    first = swarm.start("first", ["bootstrap", str(swarm.folder / "tiny.toml"), "--dir", str(folder), *HERE])
    assert first.invite
    first.interrupt()
    assert first.wait() == 0
    other = write_run(swarm.folder, run={"name": "other"})
    finished = swarm.run("bootstrap", str(other), "--dir", str(folder), *HERE)
    assert_one_line(finished, UserError.exit_code, "folder-of-another-run", "(tiny)", "--dir")


def test_a_relative_folder(live: tuple[Swarm, Child], tmp_path: Path) -> None:
    swarm, _ = live
    child = swarm.start(
        "relative", ["bootstrap", str(swarm.folder / "tiny.toml"), "--dir", "here/too", *HERE], cwd=tmp_path
    )
    assert child.invite
    assert child.sockets().is_absolute()
    child.interrupt()
    assert child.wait() == 0
    assert {path.name for path in (tmp_path / "here" / "too").iterdir()} >= {"identity.key", "run.toml"}
    assert [path.name for path in tmp_path.iterdir()] == ["here"]


def test_no_running_peer_to_invite(live: tuple[Swarm, Child]) -> None:
    swarm, _ = live
    finished = swarm.run("invite", "--dir", str(swarm.folder / "nobody"))
    assert finished.code == UserError.exit_code and codes_in(finished.stderr) == ["peer-not-running"]


# ---------------------------------------------------------------- the clock


@pytest.mark.parametrize("off_s", [-300, 86_400])
def test_a_clock_that_is_off_is_corrected(live: tuple[Swarm, Child], off_s: int) -> None:
    swarm, bootstrap = live
    prelude = f"import time\nright = time.time\ntime.time = lambda: right() + {off_s}"
    name = f"off{abs(off_s)}"
    anna = swarm.join(f"on-time{abs(off_s)}", bootstrap.invite.invite)
    further = abs(off_s) > 600
    if further:  # nobody is there to be asked
        asked = swarm.join(f"{name}-asked", bootstrap.invite.invite, prelude=prelude)
        assert asked.wait() == 1
        (error,) = asked.all(ErrorEvent)
        assert error.code == "clock-differs" and "--accept-clock" in error.message
        assert "more than 10 minutes apart" in error.message
    ben = swarm.join(name, bootstrap.invite.invite, *(["--accept-clock"] if further else []), prelude=prelude)
    try:
        assert abs(ben.wait_event(JoinedEvent).time - anna.wait_event(JoinedEvent).time - off_s) < 60
        for child in (anna, ben):
            child.wait_event(RoundEvent, lambda event: set(event.partners) == {anna.id, ben.id})
        (warning,) = ben.all(WarningEvent)
        direction = "ahead of" if off_s > 0 else "behind"
        assert warning.code == "clock-skew" and re.search(rf"[0-9.]+ s {direction} ", warning.message)
        assert not anna.all(WarningEvent)
        assert not ben.all(ErrorEvent)
    finally:
        swarm.interrupt_some([anna, ben])

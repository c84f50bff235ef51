"""Finding the peer that a person means, telling what became of it, and plain words when it does not answer."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner
from codes import raises_code
from fake_peer import FakePeer, living, make_status
from google.protobuf import json_format

from swarmtrain.cli import peers as finding
from swarmtrain.cli.common import WhichPeer
from swarmtrain.cli.main import run
from swarmtrain.cli.peers import (
    ForeignError,
    LocalPeer,
    NoAnswerError,
    PeerPhase,
    find,
    find_all,
    find_running,
    listed,
    look,
    look_without_asking,
    view_as_json,
)
from swarmtrain.cli.status import command as status_command
from swarmtrain.errors import CODE_KEY, RunTimeError, UserError
from swarmtrain.v1 import control_pb2 as wire

Made = contextlib.ExitStack


@pytest.fixture
def home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make the folder of this user's peers, with a short path: a socket's path has at most 107 bytes."""
    data = tmp_path_factory.mktemp("data")
    monkeypatch.setenv("XDG_DATA_HOME", str(data))
    return data / "swarmtrain"


@pytest.fixture
def lives() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as stack:
        yield stack


def named(home: Path, name: str, peer: str = "") -> FakePeer:
    return FakePeer(home / f"volunteer-{name}", make_status(name=name, peer=peer or f"12D3KooW{name}Z1"))


def over(home: Path, name: str, state: int = wire.PEER_STATE_DONE, age_s: float = 0) -> FakePeer:
    peer = named(home, name)
    peer.status.state = state
    peer.hold()
    peer.save()
    peer.die()
    for file in ("lock", "status.json"):
        then = (home / f"volunteer-{name}" / file).stat().st_mtime - age_s
        os.utime(home / f"volunteer-{name}" / file, (then, then))
    return peer


def test_the_only_one_that_runs_is_meant(home: Path, lives: Made) -> None:
    over(home, "bert")
    anna = lives.enter_context(living(named(home, "anna").start()))
    assert find(WhichPeer()).folder == anna.folder
    assert find_running(WhichPeer()).folder == anna.folder
    view = look(find(WhichPeer()))
    assert (view.phase, view.status.name, view.folder) == (PeerPhase.RUNNING, "anna", anna.folder)


def test_of_several_one_must_be_named(home: Path, lives: Made) -> None:
    anna, bert = (lives.enter_context(living(named(home, name).start())) for name in ("anna", "bert"))
    with raises_code("several-peers", UserError, "NAME or --dir FOLDER") as caught:
        find(WhichPeer())
    for peer in (anna, bert):
        assert f"{peer.status.name} ({peer.folder})" in str(caught.value)
    for word in ("bert", "volunteer-bert", "bertZ1", "12D3KooWbertZ1"):
        assert find(WhichPeer(name=word)).folder == bert.folder
    assert find(WhichPeer(directory=anna.folder)).folder == anna.folder
    with raises_code("no-such-peer", UserError, "t has run"):
        find(WhichPeer(name="t"))
    with raises_code("no-such-peer", UserError, r"named b\x1b"):
        find(WhichPeer(name="b\x1b"))
    assert {peer.folder for peer in find_all(WhichPeer())} == {anna.folder, bert.folder}
    assert {peer.folder for peer in find_all(WhichPeer(directory=home))} == {anna.folder, bert.folder}


def test_one_that_has_just_begun_goes_by_its_name_before_it_has_left_a_status(home: Path, lives: Made) -> None:
    lives.enter_context(living(named(home, "bert").start()))
    anna = lives.enter_context(living(named(home, "anna").start()))
    (anna.folder / "status.json").unlink(missing_ok=True)
    assert find(WhichPeer(name="anna")).folder == anna.folder


def test_without_one_that_runs_the_last_is_shown_and_nothing_else_done(home: Path) -> None:
    over(home, "bert", age_s=100)
    over(home, "anna")
    over(home, "cleo", age_s=50)
    assert look(find(WhichPeer())).status.name == "anna"
    assert look(find(WhichPeer(name="bert"))).phase is PeerPhase.ENDED
    with raises_code("peer-not-running", RunTimeError, "swarmtrain status --dir ", "volunteer-anna`"):
        find_running(WhichPeer())
    over(home, "my run", age_s=-9)
    with raises_code("peer-not-running", RunTimeError, "swarmtrain status --dir '", "volunteer-my run'`"):
        find_running(WhichPeer())


def test_the_peers_of_local_are_found_while_it_runs(home: Path, tmp_path: Path, lives: Made) -> None:
    over(home, "bert")
    anna = lives.enter_context(living(FakePeer(tmp_path / "anna", make_status(name="anna")).start()))
    FakePeer(tmp_path / "cleo", make_status(name="cleo", state=wire.PEER_STATE_DONE)).save()
    assert look(find(WhichPeer())).status.name == "bert"
    with listed(tmp_path):
        assert find(WhichPeer()).folder == find(WhichPeer(name="anna")).folder == anna.folder
        assert [peer.folder for peer in find_all(WhichPeer())] == [home / "volunteer-bert", anna.folder]
        assert find(WhichPeer(directory=home)).folder == home / "volunteer-bert"
    assert look(find(WhichPeer())).status.name == "bert"
    (home / "local").mkdir(exist_ok=True)
    (home / "local" / "1").write_text(str(tmp_path / "gone"))
    assert look(find(WhichPeer())).status.name == "bert", "of a local that was killed"


def test_a_local_that_was_killed_and_goes_on_has_each_peer_once(home: Path, tmp_path: Path, lives: Made) -> None:
    anna = lives.enter_context(living(FakePeer(tmp_path / "anna", make_status(name="anna")).start()))
    (home / "local").mkdir(parents=True)
    for number, text in enumerate((str(tmp_path).encode(), b"", b"\xff", str(tmp_path / "a\0b").encode())):
        (home / "local" / str(number)).write_bytes(text)  # what a kill, a full disk or another program has left
    with listed(tmp_path):
        assert [peer.folder for peer in find_all(WhichPeer())] == [anna.folder]
        assert find(WhichPeer()).folder == find(WhichPeer(name="anna")).folder == anna.folder


def test_a_local_in_the_usual_place_has_each_peer_once(home: Path, lives: Made) -> None:
    anna = lives.enter_context(living(named(home, "anna").start()))
    with listed(home):
        assert find(WhichPeer()).folder == anna.folder


def test_one_that_failed_before_it_had_a_run_is_not_meant_where_there_are_others(home: Path) -> None:
    over(home, "bert", age_s=100)
    over(home, "anna", wire.PEER_STATE_FAILED)
    assert look(find(WhichPeer())).status.name == "bert"
    assert look(find(WhichPeer(name="anna"))).phase is PeerPhase.FAILED
    (home / "volunteer-anna" / "run.toml").touch()
    assert look(find(WhichPeer())).status.name == "anna"
    (home / "volunteer-anna" / "run.toml").unlink()
    shutil.rmtree(home / "volunteer-bert")
    assert look(find(WhichPeer())).status.name == "anna", "there is no other"


def test_no_peer_at_all(home: Path) -> None:
    with raises_code("no-such-peer", UserError, "give the same --dir"):
        find(WhichPeer())
    with raises_code("no-such-folder", UserError, f"{home} ", "--dir"):
        find(WhichPeer(directory=home))
    assert run(["status"]) == 2


@pytest.mark.parametrize(
    ("state", "phase"),
    [
        (wire.PEER_STATE_DONE, PeerPhase.ENDED),
        (wire.PEER_STATE_FAILED, PeerPhase.FAILED),
        (wire.PEER_STATE_TRAINING, PeerPhase.DIED),
        (wire.PEER_STATE_STARTING, PeerPhase.DIED),
    ],
)
def test_what_became_of_it(home: Path, state: int, phase: PeerPhase) -> None:
    peer = over(home, "anna", state)
    assert look(LocalPeer(folder=peer.folder)).phase is phase


def test_its_last_life_left_no_word(home: Path) -> None:
    peer = over(home, "anna")
    (peer.folder / "lock").write_text("1")
    assert look(LocalPeer(folder=peer.folder)).phase is PeerPhase.DIED, "status.json is of the life before"
    (peer.folder / "status.json").write_text("{ torn")
    view = look(LocalPeer(folder=peer.folder))
    assert (view.phase, view.status) == (PeerPhase.DIED, wire.PeerStatus())


def test_it_starts(home: Path, lives: Made) -> None:
    peer = over(home, "anna")
    peer.status.pid = 1
    peer.save()
    lives.enter_context(living(peer.hold()))
    assert look(find(WhichPeer())).phase is PeerPhase.STARTING
    with raises_code("peer-starting", NoAnswerError, "anna"):
        finding.ask(find_running(WhichPeer()), "Status", wire.StatusRequest())
    (peer.folder / "control.address").write_text(f"unix:{peer.folder}/old.sock\n")
    assert look(find(WhichPeer())).phase is PeerPhase.STARTING, "the address is of a peer that was killed"


def test_it_is_there_still_after_its_last_word(home: Path, lives: Made) -> None:
    """As watch, which has heard the word, looks at it: it does not hang."""
    peer = named(home, "anna")
    peer.save()
    lives.enter_context(living(peer.hold()))
    heard = make_status(state=wire.PEER_STATE_DONE, end_reason="asked", time=peer.status.time + 1)
    view = look_without_asking(LocalPeer(folder=peer.folder), problem=NoAnswerError(""), heard=heard)
    assert view.phase is PeerPhase.ENDING and not view.phase.over
    heard.state = wire.PEER_STATE_TRAINING
    assert (
        look_without_asking(LocalPeer(folder=peer.folder), problem=NoAnswerError(""), heard=heard).phase
        is PeerPhase.SILENT
    )
    peer.status.state = wire.PEER_STATE_DONE
    peer.save()
    assert look(LocalPeer(folder=peer.folder)).phase is PeerPhase.ENDING


def test_its_next_life_is_not_taken_for_the_last(home: Path, lives: Made) -> None:
    """Neither before nor after it has left its first word, which comes a moment before it serves."""
    peer = named(home, "anna")
    lives.enter_context(living(peer.hold()))
    heard = make_status(pid=1, time=peer.status.time - 12)
    for state in (wire.PEER_STATE_UNSPECIFIED, wire.PEER_STATE_STARTING):
        view = look_without_asking(LocalPeer(folder=peer.folder), problem=NoAnswerError(""), heard=heard)
        assert view.phase is PeerPhase.STARTING
        peer.status.state = state or wire.PEER_STATE_STARTING
        peer.save()


def test_one_that_is_gone_while_it_is_looked_at_does_not_start(
    home: Path, lives: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    peer = over(home, "anna")
    lives.enter_context(living(peer.hold()))
    of_process = finding.holder_pid

    def then_gone(folder: Path) -> int:
        found = of_process(folder)
        peer.die()
        return found

    monkeypatch.setattr(finding, "holder_pid", then_gone)
    assert look_without_asking(LocalPeer(folder=peer.folder), problem=NoAnswerError("")).phase is PeerPhase.ENDED


def test_it_hangs(home: Path, lives: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    peer = lives.enter_context(living(named(home, "anna").start()))
    asked = finding.ask
    peer.hanging.set()
    monkeypatch.setattr(finding, "ask", lambda *arguments: asked(*arguments, limit_s=0.2))
    view = look(find(WhichPeer()))
    assert view.phase is PeerPhase.SILENT
    assert view.note == "anna does not answer: it is stopped (Ctrl-Z) or very busy; try again"
    peer.hanging.clear()
    peer.tell()


def test_over_tcp(home: Path, lives: Made) -> None:
    peer = lives.enter_context(living(named(home, "anna").hold()))
    address = peer.serve(tcp=True)
    view = look(find(WhichPeer(address=address)))
    assert (view.phase, view.status.name, view.folder) == (PeerPhase.RUNNING, "anna", None)
    peer.die()
    with raises_code("nobody-at-address", NoAnswerError, address):
        look(find(WhichPeer(address=address)))


@pytest.mark.parametrize(
    ("status", "details", "told", "code", "says"),
    [
        ("UNAVAILABLE", "unix:/x: Permission denied", None, "other-user", ""),
        ("UNAVAILABLE", "unix:/x: Connection refused", None, "peer-starting", ""),
        ("DEADLINE_EXCEEDED", "", None, "peer-silent", ""),
        ("UNIMPLEMENTED", "Method not found!", None, "peer-of-another-version", ""),
        ("UNIMPLEMENTED", "this peer cannot pause", None, "peer-refused", "this peer cannot pause"),
        ("FAILED_PRECONDITION", "not\x1b[2J now", "no-checkpoint", "no-checkpoint", r"not\x1b[2J now"),
        ("FAILED_PRECONDITION", "not now", "no\x1b[2J code", "peer-refused", "not now"),
        ("INTERNAL", "", None, "peer-refused", "INTERNAL"),
    ],
)
def test_errors_in_words(tmp_path: Path, status: str, details: str, told: str | None, code: str, says: str) -> None:
    metadata = None if told is None else (("other", "x"), (CODE_KEY, told))
    error = SimpleNamespace(
        code=lambda: SimpleNamespace(name=status), details=lambda: details, trailing_metadata=lambda: metadata
    )
    found = finding.in_words(error, LocalPeer(folder=tmp_path / "swarm"))
    assert (found.code, str(found).partition(" ")[0].rstrip(":")) == (code, "swarm")
    assert says in str(found)


@contextlib.contextmanager
def as_another_user() -> Iterator[None]:
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_peer_of_another_user(lives: Made) -> None:
    root = Path(lives.enter_context(tempfile.TemporaryDirectory()))
    root.chmod(0o755)
    peer = lives.enter_context(living(FakePeer(root / "anna").start()))
    for file in ("lock", "control.sock"):
        (peer.folder / file).chmod(0o600)
    which = WhichPeer(directory=peer.folder)
    assert look(find(which)).phase is PeerPhase.RUNNING
    with as_another_user():
        for ask in (lambda: look(find(which)), lambda: finding.ask(find_running(which), "Pause", wire.PauseRequest())):
            with raises_code("other-user", ForeignError, "anna"):
                ask()
    peer.folder.chmod(0o700)
    with as_another_user():
        with raises_code("other-user", UserError, "anna"):
            find(which)
        with raises_code("no-such-peer", UserError):
            find(WhichPeer(directory=root))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_read(tmp_path: Path) -> None:
    folder = tmp_path / "theirs"
    folder.mkdir(mode=0)
    with raises_code("other-user", UserError):
        find(WhichPeer(directory=folder))
    folder.chmod(stat.S_IRWXU)


def test_a_status_as_json() -> None:
    status = make_status(own_tokens=2**60, held_out_loss=float("nan"))
    seen = finding.View(status=status, phase=PeerPhase.RUNNING, folder=Path("/x"))
    told = json.loads(json.dumps(view_as_json(seen), allow_nan=False))
    assert list(told)[:3] == ["process", "dir", "peer"]
    assert set(told) == {"process", "dir"} | {field.name for field in wire.PeerStatus.DESCRIPTOR.fields}
    assert (told["process"], told["dir"], told["state"]) == ("running", "/x", "training")
    assert told["own_tokens"] == 2**60
    assert told["held_out_loss"] is None
    assert told["end_reason"] == ""
    assert told["limits"]["threads"] == 2
    assert told["limits"]["memory_bytes"] is None
    assert [peer["tokens"] for peer in told["peers"]] == [400_000, 600_000, 200_000, 0]
    assert view_as_json(finding.View(status=wire.PeerStatus(), phase=PeerPhase.DIED))["checkpoint"] is None
    on = wire.PeerStatus(device=wire.DeviceStatus(device="cuda:0", precision="bf16", microbatch_sequences=8))
    assert view_as_json(finding.View(status=on, phase=PeerPhase.RUNNING))["device"] == {
        "device": "cuda:0", "title": "", "precision": "bf16", "compiled": False, "microbatch_sequences": 8, "why": "",
    }  # fmt: skip


def test_a_status_of_a_newer_version_is_read(tmp_path: Path) -> None:
    status = make_status()
    (tmp_path / "status.json").write_text(json_format.MessageToJson(status)[:-1] + ', "whatNobodyKnows": 1}')
    assert LocalPeer(folder=tmp_path).last() == status


def test_the_command(home: Path, lives: Made) -> None:
    lives.enter_context(living(named(home, "anna").start()))
    over(home, "bert", wire.PEER_STATE_TRAINING, age_s=9)
    page = CliRunner().invoke(status_command, []).output
    assert page.splitlines()[0] == "anna (annaZ1), volunteer in run stdlib-gpt: training", "a pipe has no right edge"
    assert "swarmtrain join st1" + "x" * 300 + "\n" in page, "the invite is whole"
    (line,) = CliRunner().invoke(status_command, ["--json"]).output.splitlines()
    assert json.loads(line)["name"] == "anna"
    listed = CliRunner().invoke(status_command, ["--all"]).output.splitlines()
    assert [line.split()[:4] for line in listed] == [
        ["anna", "annaZ1", "volunteer", "training"],
        ["bert", "bertZ1", "volunteer", "died"],
    ]
    both = CliRunner().invoke(status_command, ["--all", "--json"]).output.splitlines()
    assert [json.loads(line)["process"] for line in both] == ["running", "died"]
    dead = CliRunner().invoke(status_command, ["bert"])
    assert dead.exit_code == 0
    assert "died about" in dead.output
    assert f"swarmtrain join --name bert --dir {home / 'volunteer-bert'}" in dead.output.replace("\n", " ")
    assert "others join with" not in dead.output


def processor_s(arguments: list[str]) -> float:
    """Return a command's processor time, which does not depend on other load, unlike the time by the clock."""
    code = (
        f"import sys; from swarmtrain.cli.main import run; code = run({arguments!r})\n"
        "heavy = {'torch', 'hivemind', 'numpy', 'pydantic'} & set(sys.modules)\n"
        "sys.exit(code or ', '.join(heavy) or 0)"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.parametrize("command", ["status", "pause", "limits"])
def test_it_is_quick_and_needs_nothing_heavy(command: str, home: Path, lives: Made) -> None:
    lives.enter_context(living(named(home, "anna").start()))
    assert any(processor_s([command]) < 0.4 for _ in range(3))

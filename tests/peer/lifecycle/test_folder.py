"""Folder of a peer: what it keeps, and how it refuses to be shared or altered."""

from __future__ import annotations

import datetime
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from codes import raises_code

from swarmtrain.errors import RunTimeError, UserError
from swarmtrain.network.discovery.invite import InvitedPeer
from swarmtrain.network.files import write_atomically
from swarmtrain.network.identity import load_or_create_identity, new_identity
from swarmtrain.peer.bootstrap import publish_run, run_bootstrap
from swarmtrain.peer.lifecycle.folder import peer_folder, running_invite
from swarmtrain.peer.lifecycle.folder_lock import is_in_use
from swarmtrain.peer.lifecycle.node import PeerSettings
from swarmtrain.peer.lifecycle.start_options import Started
from swarmtrain.peer.lifecycle.stop import StopFlag
from swarmtrain.run import parse_run


def _no_room(path: Path, data: bytes) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def _killed_after(num_written: int) -> Callable[[Path, bytes], None]:
    left = iter(range(num_written))

    def write(path: Path, data: bytes) -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt
        write_atomically(path, data)

    return write


def test_one_peer_at_a_time(tmp_path: Path) -> None:
    with peer_folder(tmp_path / "peer") as folder:
        assert is_in_use(folder.path)
        shown = str(os.getpid()), f"`swarmtrain status --dir {tmp_path}/peer`"
        with raises_code("folder-in-use", UserError, *shown), peer_folder(tmp_path / "peer"):
            pass
        folder.write_invite("swarmtrain join st1abc")
        assert running_invite(folder.path) == "swarmtrain join st1abc"
    assert not is_in_use(tmp_path / "peer")
    assert running_invite(tmp_path / "peer") is None, "an invite of a peer that is gone is not handed out"


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with raises_code("folder-not-writable", UserError, "--dir"), peer_folder(tmp_path / "file" / "peer"):
        pass


def failed_start(path: Path, *files: str, words: str = "nobody answers") -> None:
    """Fail to join, in a folder that may be new, after writing `files`."""
    with raises_code("nobody-answers", RunTimeError), peer_folder(path, removes_unused=True) as folder:
        load_or_create_identity(folder.key_path)
        folder.keep_port(["/ip4/127.0.0.1/tcp/4001"])
        folder.started.keep_command(Started(("join",)))
        for name in files:
            (path / name).write_text("kept")
        raise RunTimeError(words, code="nobody-answers")


def test_a_new_folder_of_a_start_that_failed_is_removed(tmp_path: Path) -> None:
    failed_start(tmp_path / "peer", "peer.log", "status.json")
    assert not (tmp_path / "peer").exists()


def test_a_folder_of_a_start_that_failed_stays_if_anything_may_be_needed(tmp_path: Path) -> None:
    (tmp_path / "made-before").mkdir()
    failed_start(tmp_path / "made-before")
    for kept in ("run.toml", "held-out.txt", "notes.txt"):
        failed_start(tmp_path / kept.partition(".")[0], kept)
    failed_start(tmp_path / "named", words=f"see {tmp_path}/named/peer.log")
    with peer_folder(tmp_path / "ended-well", removes_unused=True):
        pass
    with raises_code("bad-value", UserError), peer_folder(tmp_path / "bootstrap"):
        raise UserError("not for a volunteer", code="bad-value")
    names = {"made-before", "run", "held-out", "notes", "named", "ended-well", "bootstrap"}
    assert {path.name for path in tmp_path.iterdir()} == names
    assert (tmp_path / "made-before" / "identity.key").exists()


def test_a_folder_that_another_peer_uses_is_not_removed(tmp_path: Path) -> None:
    with peer_folder(tmp_path / "peer") as folder:
        with raises_code("folder-in-use", UserError), peer_folder(tmp_path / "peer", removes_unused=True):
            pass
        assert is_in_use(folder.path)


def when_locked(monkeypatch: pytest.MonkeyPatch, *happen: Callable[[], object]) -> None:
    """Let one of these happen before each of the next locks: after the lock file was opened."""
    left, flock = iter(happen), fcntl.flock

    def lock(descriptor: int, how: int) -> None:
        if how & fcntl.LOCK_EX and (one := next(left, None)):
            one()
        flock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", lock)


def test_a_folder_that_is_removed_while_it_is_opened_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a start that fails at that moment. Else two peers could hold one folder."""
    path = tmp_path / "peer"
    path.mkdir()
    (path / "lock").touch()

    def only_the_lock() -> None:
        (path / "lock").unlink()

    when_locked(monkeypatch, lambda: shutil.rmtree(path), only_the_lock)
    with peer_folder(path):
        assert is_in_use(path)
        with raises_code("folder-in-use", UserError, str(os.getpid())), peer_folder(path):
            pass
    assert not is_in_use(path)
    when_locked(monkeypatch, *[lambda: shutil.rmtree(path)] * 100)
    with raises_code("folder-in-use", UserError), peer_folder(path):
        pass


def test_who_comes_while_a_failed_start_removes_its_folder_has_the_folder_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, unlink = tmp_path / "peer", Path.unlink
    with ExitStack() as later:

        def removed(file: Path) -> None:
            unlink(file)
            if file == path / "lock":
                monkeypatch.setattr(Path, "unlink", unlink)
                later.enter_context(peer_folder(path))

        monkeypatch.setattr(Path, "unlink", removed)
        failed_start(path)
        assert is_in_use(path)
        with raises_code("folder-in-use", UserError), peer_folder(path):
            pass


def test_what_a_killed_export_left_is_removed(tmp_path: Path) -> None:
    kept = [".archive.old", ".models.abcdefgh", "archive", "model"]
    for name in (".archive.abc_1234", ".model.new-abcdefgh", *kept):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"half")
    with peer_folder(tmp_path):
        assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == sorted(kept)


def test_a_full_disk_does_not_stop_a_peer_that_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*given: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with peer_folder(tmp_path) as folder:
        assert is_in_use(folder.path)


def test_what_is_kept_comes_back(tmp_path: Path) -> None:
    peers = (InvitedPeer(new_identity().peer_id, ("/ip4/127.0.0.1/tcp/31337",)),)
    with peer_folder(tmp_path) as folder:
        assert (folder.kept_port(), folder.kept_peers()) == (None, ())
        folder.keep_port(["/ip4/127.0.0.1/tcp/4711"])
        folder.keep_peers(peers)
    with peer_folder(tmp_path) as folder:
        assert (folder.kept_port(), folder.kept_peers()) == (4711, peers)
        for name in ("port.txt", "peers.json"):
            (tmp_path / name).write_text("{")
        assert (folder.kept_port(), folder.kept_peers()) == (None, ())


def test_a_run_is_kept_whole_or_refused(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    for number in range(50):
        (tmp_path / "text" / f"{number}.txt").write_text("".join(f"line {number} {i * i}\n" for i in range(200)))
    text = "[run]\ntotal_tokens = 100_000\n[data]\nsource = 'text'\npaths = ['text/*.txt']\nheld_out_bytes = 1024\n"
    published = publish_run(parse_run(text, "r"), tmp_path, datetime.datetime.now(datetime.UTC))
    with peer_folder(tmp_path / "peer") as folder:
        assert folder.kept_run() is None
        for num_written in range(2):
            with pytest.MonkeyPatch.context() as killed, pytest.raises(KeyboardInterrupt):
                killed.setattr("swarmtrain.peer.lifecycle.folder.write_atomically", _killed_after(num_written))
                folder.keep_run(published)
            assert folder.kept_run() is None, "killed halfway, it begins anew"
        folder.keep_run(published)
        assert folder.kept_run() == published
        with pytest.MonkeyPatch.context() as full:
            full.setattr("swarmtrain.peer.lifecycle.folder.write_atomically", _no_room)
            folder.keep_run(published)  # it is here already
            folder.keep_port(["/ip4/127.0.0.1/tcp/4711"])
            (folder.path / "held-out.txt").unlink()
            with raises_code("folder-not-writable", UserError, "No space left"):
                folder.keep_run(published)
        (folder.path / "held-out.txt").write_bytes(b"altered")
        with raises_code("folder-altered", UserError):
            folder.kept_run()
        (folder.path / "run.toml").write_bytes(b"[run]\n")
        with raises_code("folder-altered", UserError):
            folder.kept_run()


def test_names_that_strangers_gave_are_not_kept(tmp_path: Path) -> None:
    """A folder of before says nothing of whose they were. Those of an invite are kept: it is not given again."""
    before = [
        {"peer": "P", "addresses": ["/dns4/evil.example/tcp/1", "/ip6/::ffff:a9fe:a9fe/tcp/80"]},
        {"peer": "Q", "addresses": ["/ip4/10.0.0.1/tcp/5", "/dns/evil.example/tcp/1"]},
    ]
    with peer_folder(tmp_path / "peer") as folder:
        (folder.path / "peers.json").write_text(json.dumps(before))
        assert folder.kept_peers() == (InvitedPeer("P", ()), InvitedPeer("Q", ("/ip4/10.0.0.1/tcp/5",)))
        given = InvitedPeer("R", ("/dns4/swarm.example/tcp/1", "/ip4/10.0.0.1/tcp/6"))
        folder.keep_peers([*folder.kept_peers(), given])
        folder.keep_peers(folder.kept_peers())
        assert folder.kept_peers()[-1] == given


def test_a_start_that_is_refused_is_not_remembered(tmp_path: Path) -> None:
    """Else it would be refused the next time too, for an option that nobody gives."""
    for number in range(20):
        (tmp_path / f"{number}.txt").write_text("".join(f"line {number} {i * i}\n" for i in range(100)))
    text = "[run]\ntotal_tokens = 100_000\n[data]\nsource = 'text'\npaths = ['*.txt']\nheld_out_bytes = 1024\n"
    run = parse_run(text, "r")
    before = Started(("bootstrap", "r.toml"), {"--listen": (":4000",)})
    with peer_folder(tmp_path / "peer") as folder:
        folder.keep_run(publish_run(run, tmp_path, datetime.datetime.now(datetime.UTC)))
        folder.started.keep_command(before)
    changed = run.model_copy(update={"merge": run.merge.model_copy(update={"min_peers": 3})})
    settings = PeerSettings(
        directory=tmp_path / "peer", name="", started=Started(("bootstrap", "r.toml"), {"--wait-for": ("3",)})
    )
    with raises_code("folder-of-another-run", UserError, "--wait-for"):
        run_bootstrap(changed, tmp_path, settings, lambda event: None, StopFlag())
    assert folder.started.read() == before

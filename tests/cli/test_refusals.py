"""A refusal writes nothing: a finished run's folder is the same after commands that were refused."""

from __future__ import annotations

import datetime
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from swarmtrain.cli.main import run
from swarmtrain.network.discovery.invite import Invite, InvitedPeer, format_invite
from swarmtrain.network.identity import load_or_create_identity, new_identity
from swarmtrain.peer.bootstrap import publish_run
from swarmtrain.peer.lifecycle.folder import PeerFolder
from swarmtrain.run import parse_run

RUN = "[run]\ntotal_tokens = 100_000\n[data]\nsource = 'text'\npaths = ['text.txt']\nheld_out_bytes = 1024\n"
OTHER = format_invite(Invite("5e" * 32, (InvitedPeer(new_identity().peer_id, ("/ip4/127.0.0.1/tcp/9",)),)))


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """Return the folder of a bootstrap whose run has ended, as it leaves it."""
    (tmp_path / "text.txt").write_text("it was a dark and stormy night; " * 600)
    (tmp_path / "run.toml").write_text(RUN)
    folder = tmp_path / "boot"
    folder.mkdir()
    me = load_or_create_identity(folder / "identity.key").peer_id
    published = publish_run(parse_run(RUN, "run.toml"), tmp_path, datetime.datetime.now(datetime.UTC), me)
    PeerFolder(folder).keep_run(published)
    (folder / "status.json").write_text('{"state": "PEER_STATE_DONE", "run_tokens": "100000"}')
    (folder / "history.pb").write_bytes(b"")
    (folder / "peer.log").write_text("it ended\n")
    (folder / "lock").write_text("1")
    return folder


@pytest.fixture
def taken() -> Iterator[str]:
    """Return the HOST:PORT of a socket that listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_finished_runs_folder_is_the_same_after_twenty_refused_commands(
    finished: Path, taken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "seed.toml").write_text(RUN.replace("[data]", "seed = 3\n[data]"))
    (tmp_path / "name.toml").write_text(RUN.replace("[data]", "name = 'mine'\nseed = 3\n[data]"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    again = ["bootstrap", "run.toml"]
    before = contents(finished)
    refused: list[tuple[list[str], int, str]] = [
        (["bootstrap", "name.toml"], 2, "run.name is"),
        (["bootstrap", "seed.toml"], 2, "there run.seed is 0, and here 3"),
        ([*again, "--wait-for", "9"], 2, "there merge.min_peers (--wait-for) is"),
        ([*again, "--listen", taken], 1, "the port is taken; choose another with --listen"),
        ([*again, "--control", taken], 1, "the port is taken; choose another with --control"),
        ([*again, "--metrics", taken], 1, "the port is taken; choose another with --metrics"),
        ([*again, "--web", taken], 1, "the port is taken; choose another with --web"),
        ([*again, "--metrics", "nowhere"], 2, ""),
        (["bootstrap", "none.toml"], 2, "no such run file"),
        (["join", OTHER], 2, "holds another run"),
        (["join", "no-invite"], 2, ""),
        (["join", "--device", "cuda:77"], 2, ""),
        (["join", "--listen", taken], 1, "the port is taken"),
        (["join", "--nice", "99"], 2, ""),
        (["pause"], 1, ""),
        (["resume"], 1, ""),
        (["leave"], 1, ""),
        (["limits", "--nice", "5"], 1, ""),
        (["export", "--to", "full"], 2, ""),
        (["generate"], 2, ""),
    ]
    for words, code, says in refused:
        found = run([*words, "--dir", str(finished)])
        said = capsys.readouterr().err
        assert (found, contents(finished) == before) == (code, True), (words, said)
        assert says in " ".join(said.split()), said
    assert len(refused) == 20

"""Folders of volunteers: one folder, one run."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
from codes import raises_code

from swarmtrain.cli.common import PeerOptions
from swarmtrain.cli.join import free_directory
from swarmtrain.errors import UserError
from swarmtrain.peer.lifecycle.folder import peer_folder

ONE, OTHER = b"a run", b"another run"


def sha256(run: bytes) -> str:
    return hashlib.sha256(run).hexdigest()


def options(folder: Path | None = None, name: str = "") -> PeerOptions:
    return PeerOptions(dir=folder, name=name, json=False, listen=(), announce=(), log_level="warning")


def holding(folder: Path, run: bytes) -> Path:
    folder.mkdir(parents=True)
    (folder / "run.toml").write_bytes(run)
    return folder


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "Application Support"))  # where it is on macOS
    return tmp_path / "Application Support" / "swarmtrain"


def test_a_run_goes_where_it_is_or_where_none_is(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert free_directory(options(), sha256(ONE)) == home / "volunteer"
    holding(home / "volunteer", ONE)
    assert free_directory(options(), sha256(ONE)) == home / "volunteer"
    assert capsys.readouterr().err == ""
    assert free_directory(options(), sha256(OTHER)) == home / "volunteer-2"
    assert "holds another run: this one uses" in capsys.readouterr().err
    holding(home / "volunteer-2", OTHER)
    assert free_directory(options(), sha256(OTHER)) == home / "volunteer-2"
    assert free_directory(options(name="anna"), sha256(OTHER)) == home / "volunteer-anna"
    assert free_directory(options(), None) == home / "volunteer", "without an invite it goes on"


def test_two_at_once_have_each_their_own(home: Path) -> None:
    holding(home / "volunteer", ONE)
    holding(home / "volunteer-2", OTHER)
    with peer_folder(home / "volunteer"):
        assert free_directory(options(), sha256(ONE)) == home / "volunteer-3"
        assert free_directory(options(), None) == home / "volunteer-2"


def test_without_an_invite_it_goes_on_where_nobody_runs(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    volunteer, anna, bert = (holding(home / f"volunteer{end}", ONE) for end in ("", "-anna", "-bert"))
    for path, used in ((volunteer, 30), (anna, 20), (bert, 10)):
        os.utime(path / "run.toml", (used, used))
    with peer_folder(volunteer):
        assert free_directory(options(), None) == anna, "and not in a folder in use"
        assert capsys.readouterr().err == f"continuing in {anna}; also stopped: `swarmtrain join --dir '{bert}'`\n"
        with peer_folder(anna):
            assert free_directory(options(), None) == bert
            assert capsys.readouterr().err == f"continuing in {bert}\n"
            with peer_folder(bert), raises_code("all-volunteers-run", UserError):
                free_directory(options(), None)
    assert free_directory(options(), None) == volunteer
    assert str(anna) in capsys.readouterr().err


def test_a_given_folder_of_another_run_is_refused(tmp_path: Path) -> None:
    folder = holding(tmp_path / "mine", ONE)
    assert free_directory(options(folder), sha256(ONE)) == free_directory(options(folder), None) == folder
    with raises_code("folder-of-another-run", UserError, f"{folder} ", "another --dir"):
        free_directory(options(folder), sha256(OTHER))


def test_a_folder_that_cannot_be_read_is_refused_later_by_whoever_takes_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    folder = tmp_path / "file" / "below"
    assert free_directory(options(folder), sha256(ONE)) == folder
    with raises_code("folder-not-writable", UserError), peer_folder(folder):
        pass

"""Output of the command that waits for a peer in the background."""

from __future__ import annotations

import io
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest

from swarmtrain.cli import background, join
from swarmtrain.cli.background import _Started
from swarmtrain.cli.kept_options import restore
from swarmtrain.cli.main import run
from swarmtrain.events import ErrorEvent, Event, PausedEvent, to_json_line
from swarmtrain.peer.lifecycle.start_options import Started, StartedFile


def test_torn_lines_are_passed_over(tmp_path: Path) -> None:
    whole = to_json_line(ErrorEvent(message="full", code="folder-not-writable", exit_code=1))
    folder = f'{{"folder": "{tmp_path}"}}'
    process: Any = None
    peer, shown = _Started(process, by_folder=True), list[Event]()
    pipe = io.BytesIO("\n".join([folder[:-9], folder, whole[:40], whole, whole[:-3]]).encode())
    peer.listen(pipe, shown.append)
    assert peer.folder == tmp_path
    assert peer.error == "full [folder-not-writable]"
    assert len(shown) == 1 and peer.up is None


def test_how_to_go_on_can_be_typed(capsys: pytest.CaptureFixture[str]) -> None:
    process: Any = SimpleNamespace(pid=1)
    peer = _Started(process, by_folder=True)
    peer.folder, peer.up = Path("/home/ada/my run"), PausedEvent(reason="")
    assert peer.tell_up() == 0
    assert "swarmtrain leave --dir '/home/ada/my run'\n" in capsys.readouterr().err


@pytest.mark.parametrize("as_json", [False, True])
def test_why_it_ended_is_said_once(
    as_json: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With --json as an event too."""

    class Ended:
        pid = 1

        def __init__(self, arguments: list[str], pass_fds: tuple[int], **_: Any) -> None:
            error = ErrorEvent(message="garbled", code="invite-garbled", exit_code=2)
            os.write(pass_fds[0], to_json_line(error).encode() + b"\n")

        def wait(self) -> int:
            return 2

    monkeypatch.setattr(subprocess, "Popen", Ended)
    assert not background.is_the_background()
    assert run(["join", "st1abc", "--background", "--dir", str(tmp_path), *["--json"] * as_json]) == 2
    said = capsys.readouterr()
    assert said.err == "error: garbled [invite-garbled]\n"
    assert said.out.count('"garbled"') == as_json


def test_what_is_taken_from_the_folder_reaches_who_waits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new process says it before it has a folder, into a pipe: its standard error is nobody's."""
    StartedFile(tmp_path).keep_command(Started(("join",), {"--threads": ("2",), "--nice": ("5",)}))
    reading, writing = os.pipe()
    monkeypatch.setattr(background, "_pipe", lambda: writing)
    with click.Context(join.command, info_name="join") as ctx:
        join.command.parse_args(ctx, ["--dir", str(tmp_path)])
        restore(tmp_path, ("join",))
    os.close(writing)
    capsys.readouterr()
    process: Any = None
    peer, shown = _Started(process, by_folder=True), list[Event]()
    with os.fdopen(reading, "rb") as pipe:
        peer.listen(pipe, shown.append)
    assert capsys.readouterr().err == f"as last time in {tmp_path}: --threads 2 --nice 5\n"

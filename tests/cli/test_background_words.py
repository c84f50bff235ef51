"""What the command that waits for a peer in the background makes of its words."""

from __future__ import annotations

import io
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from swarmtrain.cli import background
from swarmtrain.cli.background import _Started
from swarmtrain.cli.main import run
from swarmtrain.events import ErrorEvent, Event, PausedEvent, to_json_line


def test_torn_lines_are_passed_over(tmp_path: Path) -> None:
    whole = to_json_line(ErrorEvent(message="no room", exit_code=1))
    folder = f'{{"folder": "{tmp_path}"}}'
    process: Any = None
    peer, shown = _Started(process, by_folder=True), list[Event]()
    pipe = io.BytesIO("\n".join([folder[:-9], folder, whole[:40], whole, whole[:-3]]).encode())
    peer.listen(pipe, shown.append)
    assert peer.folder == tmp_path
    assert peer.error == "no room"
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
            os.write(
                pass_fds[0], to_json_line(ErrorEvent(message="the invite is garbled", exit_code=2)).encode() + b"\n"
            )

        def wait(self) -> int:
            return 2

    monkeypatch.setattr(subprocess, "Popen", Ended)
    assert not background.is_the_background()
    assert run(["join", "st1abc", "--background", "--dir", str(tmp_path), *["--json"] * as_json]) == 2
    said = capsys.readouterr()
    assert said.err == "error: the invite is garbled\n"
    assert said.out.count("the invite is garbled") == as_json

"""The invite by a file, the health by one word, options by the environment."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from swarmtrain.cli.join import _word_in
from swarmtrain.cli.main import run
from swarmtrain.peer.stopping import StopFlag


@pytest.mark.parametrize("text", ["st1abc\n", "swarmtrain join st1abc\n", "  st1abc"])
def test_the_invite_is_the_last_word_of_the_file(tmp_path: Path, text: str) -> None:
    (tmp_path / "invite").write_text(text)
    assert _word_in(tmp_path / "invite", StopFlag()) == "st1abc"
    assert _word_in(None, StopFlag()) == ""


def test_join_waits_until_the_file_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, found, waited = tmp_path / "invite", [], threading.Event()

    class Looked(StopFlag):
        def sleep(self, seconds: float) -> None:
            waited.set()
            super().sleep(0.01)

    thread = threading.Thread(target=lambda: found.append(_word_in(path, Looked())))
    thread.start()
    assert waited.wait(10)
    path.write_text("")  # somebody has just opened it
    path.write_text("st1abc\n")
    thread.join(10)
    assert found == ["st1abc"]
    assert capsys.readouterr().err == f"waiting for an invite in {path}\n"


def test_what_is_wrong_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    for arguments, said in (
        (["join", "st1abc", "--invite-file", "x"], "give one of them"),
        (["join", "--invite-file", str(tmp_path / "bytes")], "cannot be read"),
        (["join", "--invite-file", str(tmp_path)], "is a directory"),
        (["status", "--healthy", "--all"], "stands alone"),
        (["status", "--healthy", "--dir", str(tmp_path)], "has run"),
    ):
        assert run(arguments) == 2, arguments
        assert said in capsys.readouterr().err


def test_options_come_from_the_environment(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("SWARMTRAIN_JOIN_SLOWDOWN", "0.5")
    assert run(["join", "st1abc"]) == 2
    assert "slowdown" in capsys.readouterr().err.lower()
    assert run(["join", "st1abc", "--slowdown", "2", "--dir", "/nowhere/at/all"]) != 0
    assert "slowdown" not in capsys.readouterr().err.lower(), "what is typed goes before"


@pytest.mark.parametrize(
    ("variable", "option", "arguments"),
    [("JOIN_UP", "--up", ["x"]), ("PLAN_LINK_DOWN", "--link-down", ["x"]), ("LOCAL_SLOWDOWN", "--slowdown", ["x"])],
)
def test_a_variable_is_named_as_the_option_is_typed(
    variable: str,
    option: str,
    arguments: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(f"SWARMTRAIN_{variable}", "nothing")
    assert run([variable.partition("_")[0].lower(), *arguments]) == 2
    assert option in capsys.readouterr().err

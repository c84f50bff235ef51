"""What is written to the terminal cannot control it, whoever wrote it: models, peers, libraries or files."""

from __future__ import annotations

import io
import json
import logging
from pathlib import Path

import click
import pytest
from rich.text import Text

from swarmtrain.cli.display import PeerDisplay
from swarmtrain.cli.main import cli, run
from swarmtrain.cli.output import echo
from swarmtrain.cli.terminal import TerminalConsole
from swarmtrain.errors import UserError
from swarmtrain.events import WarningEvent, to_json_line
from swarmtrain.model.export import export_model
from swarmtrain.model.gpt import build_model
from swarmtrain.peer.checkpoints import export
from swarmtrain.run_model import ModelSection
from swarmtrain.words import printable

HOSTILE = "a\x1b]52;c;cm0gLXJm\x07\x9b2Jb\u202etxt.exe\u2066\x7f\x08\r\u2028c"
"""Sets the clipboard, clears the screen by a C1 control, and turns the order of what is read."""


def harmless(text: str, *ours: str) -> bool:
    for escape in ours:
        text = text.replace(escape, "")
    return all(c.isprintable() or c in "\n\t" for c in text)


def test_a_text_keeps_its_lines_and_scripts() -> None:
    kept = "def f():\n\treturn 1\n\xa0\u3000\u202f نمی\u200cخواهم 👩\u200d🚀 größer"
    assert printable(kept) == kept
    assert printable("a\r\nb") == "a\nb"
    assert printable(HOSTILE) == "a\ufffd]52;c;cm0gLXJm\ufffd\ufffd2Jb\ufffdtxt.exe\ufffd\ufffd\ufffd\ufffd\ufffdc"


def test_echo(capsys: pytest.CaptureFixture[str]) -> None:
    echo(HOSTILE)
    echo(HOSTILE, err=True, nl=False)
    out, err = capsys.readouterr()
    assert harmless(out) and harmless(err) and out == err + "\n"


def test_a_model_writes_lines_and_tabs_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = build_model(ModelSection(context_tokens=16, num_layers=1, width=16, num_heads=2), seed=1)
    folder = tmp_path / "model"
    export_model(folder, dict(made.named_parameters()), made.spec, 1, {"held-out.txt": b"some text " * 8})
    monkeypatch.setattr(export, "sample_text", lambda *given: f"def f():\n\treturn{HOSTILE}")
    assert run(["generate", str(folder)]) == 0
    out = capsys.readouterr().out
    assert harmless(out) and "def f():\n\treturna" in out


@pytest.mark.parametrize("error", [UserError(HOSTILE, code="bad"), click.UsageError(HOSTILE), ValueError(HOSTILE)])
def test_an_error_is_one_harmless_line(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    @click.command()
    def failing() -> None:
        raise error

    monkeypatch.setattr(cli, "resolve_command", lambda ctx, args: (args[0], failing, args[1:]))
    assert run(["check"])
    err = capsys.readouterr().err
    assert harmless(err) and err.count("\n") == 1 and "\\x1b" in err


def test_a_log_message_of_a_command_without_a_log(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["--version"]) == 0
    capsys.readouterr()
    assert logging.lastResort is not None
    logging.lastResort.handle(logging.makeLogRecord({"msg": "of %s", "args": (HOSTILE,), "levelno": logging.ERROR}))
    err = capsys.readouterr().err
    assert harmless(err) and err.startswith("of a")


def test_json_is_plain_ascii() -> None:
    line = to_json_line(WarningEvent(message=HOSTILE, code="x"))
    assert line.isascii() and line.isprintable() and json.loads(line)["message"] == HOSTILE


def test_screens_keep_our_styles_and_nobody_elses() -> None:
    stream = io.StringIO()
    console = TerminalConsole(file=stream, force_terminal=True, color_system="standard", width=80)
    console.print(Text(HOSTILE, style="red"), soft_wrap=True)
    written = stream.getvalue()
    assert written.startswith("\x1b[31m") and harmless(written, "\x1b[31m", "\x1b[0m")


def test_a_peers_display_draws_with_it() -> None:
    assert isinstance(PeerDisplay()._live.console, TerminalConsole)

"""`swarmtrain service`: the file that it prints says what the peer's folder remembers, as the system reads it."""

from __future__ import annotations

import plistlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from codes import codes_in

from swarmtrain.cli.main import main, run
from swarmtrain.cli.service import UNDER_LAUNCHD, unit
from swarmtrain.peer.lifecycle.start_options import Started, StartedFile

ODD = """an na%h$HOME x"q"\\ü ;'#"""
"""Name of a folder with all that systemd would read as something else."""


def ran(folder: Path, command: tuple[str, ...] = ("join",), **options: tuple[str, ...]) -> Path:
    """Make the folder of a peer that has run there with these options."""
    folder.mkdir(parents=True)
    (folder / "lock").touch()
    (folder / "run.toml").write_text("[run]\nname = 'stdlib-gpt'\n")
    StartedFile(folder).keep_command(Started(command, {f"--{name}": words for name, words in options.items()}))
    return folder


def lines_of(text: str, key: str) -> list[str]:
    return [line.partition("=")[2] for line in text.splitlines() if line.startswith(f"{key}=")]


def words_of(value: str) -> list[str]:
    """Read words as systemd does: quotes, escapes, then specifiers; variables are left."""
    found = re.findall(r'"((?:[^"\\]|\\.)*)"|(\S+)', value)
    words = [re.sub(r"\\(.)", r"\1", quoted) if quoted or not plain else plain for quoted, plain in found]
    assert all("%" not in word.replace("%%", "") for word in words), "a lone % is a specifier"
    return [word.replace("%%", "%") for word in words]


def test_the_unit_starts_the_peer_of_the_folder_with_no_option_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = ran(tmp_path / ODD, name=("anna",), memory=("4GB",))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    before = sorted(tmp_path.rglob("*"))
    assert run(["service", "--dir", str(folder)]) == 0
    out, err = capsys.readouterr()
    (line,) = lines_of(out, "ExecStart")
    assert "$HOME" not in line.replace("$$", ""), "a lone $ is a variable"
    assert [word.replace("$$", "$") for word in words_of(line)][-3:] == ["join", "--dir", str(folder)]
    assert words_of(lines_of(out, "Environment")[0]) == [f"HF_HOME={tmp_path / 'hf'}"]
    places = [words_of(each)[0] for each in lines_of(out, "ReadWritePaths")]
    assert {f"-{folder}", f"-{tmp_path / 'hf'}", "-/tmp"} <= set(places)
    assert lines_of(out, "RestartPreventExitStatus") == ["2"] and "OOMScoreAdjust=500" in out
    assert "hf_secret" not in out and "--memory" not in out, "secrets, and what the folder remembers"
    assert "systemctl --user enable --now swarmtrain-anna" in err and "disable --now swarmtrain-anna" in err
    assert sorted(tmp_path.rglob("*")) == before, "nothing is written"


def test_a_bootstrap_is_started_with_its_run_file_and_does_not_give_way(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = ran(tmp_path / "boot", ("bootstrap", "/runs/run.toml"))
    assert run(["service", "--dir", str(folder)]) == 0
    out = capsys.readouterr().out
    assert words_of(lines_of(out, "ExecStart")[0])[-4:] == ["bootstrap", "/runs/run.toml", "--dir", str(folder)]
    assert "OOMScoreAdjust" not in out and "SyslogIdentifier=swarmtrain-boot\n" in out


def test_a_folder_without_a_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = ran(tmp_path / "peer")
    (folder / "run.toml").unlink()
    assert run(["service", "--dir", str(folder)]) == 2
    assert codes_in(capsys.readouterr().err) == ["nothing-to-resume"]


def test_what_no_unit_can_hold_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = ran(tmp_path / "a\nExecStart=-evil")
    assert run(["service", "--dir", str(folder)]) == 2
    out, err = capsys.readouterr()
    assert codes_in(err) == ["not-for-a-service"] and not out


def test_a_program_whose_path_has_a_dollar_is_started_by_env() -> None:
    """systemd replaces variables in arguments and not in the program's path."""
    text = unit("swarmtrain-anna", ("/opt/$x/swarmtrain", "join"), {}, Path("/home/anna/swarm"))
    assert lines_of(text, "ExecStart") == ['/usr/bin/env "/opt/$$x/swarmtrain" join']


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_systemd_itself_finds_nothing_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "the program" / "swarmtrain"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    folder = tmp_path / ODD
    text = unit("swarmtrain-anna", (str(program), "join", "--dir", str(folder)), {"HF_HOME": str(folder)}, folder)
    path = tmp_path / "swarmtrain-anna.service"
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    for content, is_right in ((text, True), (text.replace("Restart=", "Restrat="), False)):
        path.write_text(content)
        done = subprocess.run(
            ["systemd-analyze", "verify", "--user", "--man=no", path], capture_output=True, text=True, check=False
        )
        assert (done.returncode == 0 and not done.stderr) == is_right, done.stderr


def test_on_a_mac_it_is_an_agent_of_launchd(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = ran(tmp_path / ODD, name=("anna",))
    monkeypatch.setattr(sys, "platform", "darwin")
    assert run(["service", "--dir", str(folder)]) == 0
    out, err = capsys.readouterr()
    job = plistlib.loads(out.encode())
    assert job["Label"] == "swarmtrain-anna" and job["ProgramArguments"][-3:] == ["join", "--dir", str(folder)]
    assert job["KeepAlive"] == {"SuccessfulExit": False} and job["EnvironmentVariables"][UNDER_LAUNCHD] == "1"
    assert "launchctl bootstrap" in err and "launchctl bootout" in err


def test_under_launchd_wrong_use_ends_with_code_0(monkeypatch: pytest.MonkeyPatch) -> None:
    """launchd starts again whatever failed, and this would fail for ever."""
    monkeypatch.setattr(sys, "argv", ["swarmtrain", "join", "--nope"])
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    for value, code in (("1", 0), ("", 2)):
        monkeypatch.setenv(UNDER_LAUNCHD, value)
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == code

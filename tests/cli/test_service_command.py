"""`swarmtrain service`: which peer is started, with which command line, and what a person is told."""

from __future__ import annotations

import json
import os
import shlex
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from click.testing import CliRunner
from codes import codes_in
from fake_peer import FakePeer, living
from fake_system import FakeSystem

from swarmtrain.cli import served_peer
from swarmtrain.cli.main import cli, main, run
from swarmtrain.network.discovery.invite import Invite, InvitedPeer, format_invite
from swarmtrain.network.identity import new_identity
from swarmtrain.peer.lifecycle.start_options import Started, StartedFile
from swarmtrain.peer.service import systemd

SHA256 = "5e" * 32
INVITE = format_invite(Invite(SHA256, (InvitedPeer(new_identity().peer_id, ("/ip4/203.0.113.5/tcp/4001",)),)))


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """A folder whose path is short enough for the sockets of the peers in it."""
    with tempfile.TemporaryDirectory(prefix="st-") as folder:
        yield Path(folder)


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeSystem]:
    """Put a fake systemd in place; each peer that it starts answers at once."""
    fake = FakeSystem(tmp_path / "home")
    monkeypatch.setattr(systemd, "BOOTED", tmp_path)
    monkeypatch.setattr("swarmtrain.peer.service.managers.service_manager", lambda command: fake.manager())
    monkeypatch.setattr("swarmtrain.peer.service.managers.service_files", fake.manager)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.chdir(tmp_path)
    with ExitStack() as peers:

        def start(unit: str) -> None:
            folder = next(each.folder for each in fake.manager().installed() if each.path.name == unit)
            peers.enter_context(living(FakePeer(folder).start()))

        fake.on_start = start
        yield fake


def ran(folder: Path, command: tuple[str, ...] = ("join",), **options: tuple[str, ...]) -> Path:
    """Make the folder of a peer that has run there with these options."""
    folder.mkdir(parents=True)
    (folder / "lock").touch()
    (folder / "run.toml").write_text("[run]\nname = 'stdlib-gpt'\n")
    StartedFile(folder).keep_command(Started(command, {f"--{name}": words for name, words in options.items()}))
    return folder


def words_of_unit(system: FakeSystem, name: str) -> list[str]:
    """Return the command line of a unit, from the folder's name on as plain words."""
    (line,) = [line for line in system.loaded[f"{name}.service"].splitlines() if line.startswith("ExecStart=")]
    return shlex.split(line.removeprefix("ExecStart="))


PROGRAM = served_peer.program()


# ---------------------------------------------------------------- install


def test_a_peer_that_has_run_is_installed_with_what_its_folder_remembers(
    system: FakeSystem, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = ran(tmp_path / "data" / "swarmtrain" / "volunteer-anna", name=("anna",), memory=("4GB",), nice=("10",))
    assert run(["service", "install", "volunteer-anna"]) == 0
    unit = system.loaded["swarmtrain-anna.service"]
    assert words_of_unit(system, "swarmtrain-anna") == [*PROGRAM, "join", "--dir", str(folder)]
    assert "Description=swarmtrain volunteer anna, run stdlib-gpt\n" in unit
    assert "MemoryMax=6000000000\n" in unit and "CPUWeight=11\n" in unit and "--memory" not in unit
    places = [line.partition("=-")[2] for line in unit.splitlines() if line.startswith("ReadWritePaths=")]
    assert {str(folder), str(tmp_path / "cache"), "/tmp"} <= set(places)
    assert f"Environment=XDG_CACHE_HOME={tmp_path / 'cache'}\n" in unit
    out = capsys.readouterr().out
    assert "swarmtrain-anna is installed and runs" in out and f"swarmtrain watch --dir {folder}" in out
    assert system.started == ["swarmtrain-anna.service"]

    assert run(["service", "install", "volunteer-anna"]) == 0, "while it runs as the service"
    assert system.loaded["swarmtrain-anna.service"] == unit and len(system.manager().installed()) == 1


def test_options_after_the_dashes_are_remembered_by_the_folder_and_not_by_the_unit(
    system: FakeSystem, tmp_path: Path
) -> None:
    folder = ran(tmp_path / "peer", hours=("22-7",), nice=("3",))
    (tmp_path / "texts").mkdir()
    words = ["--name", "bert", "--nice", "19", "--data", "texts", "--log-level", "info", "--accept-clock"]
    assert run(["service", "install", "--dir", "peer", "--", *words]) == 0
    assert StartedFile(folder).read().options == {
        "--hours": ("22-7",),
        "--nice": ("19",),
        "--name": ("bert",),
        "--data": (str(tmp_path / "texts"),),
    }
    line = words_of_unit(system, "swarmtrain-bert")
    assert line == [*PROGRAM, "join", "--dir", str(folder), "--log-level", "info", "--accept-clock"]
    assert "IOSchedulingClass=idle\n" in system.loaded["swarmtrain-bert.service"]


def test_a_new_peer_is_installed_with_its_invite_which_only_its_user_can_read(
    system: FakeSystem, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither the unit nor the process list has it."""
    assert run(["service", "install", "--", INVITE, "--name", "carl"]) == 0
    folder = tmp_path / "data" / "swarmtrain" / "volunteer-carl"
    invite = folder / served_peer.INVITE_FILE
    assert invite.read_text() == f"{INVITE}\n" and stat.S_IMODE(invite.stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert words_of_unit(system, "swarmtrain-carl") == [
        *(*PROGRAM, "join", "--dir", str(folder)),
        *("--invite-file", str(invite)),
    ]
    assert INVITE not in system.loaded["swarmtrain-carl.service"]
    assert StartedFile(folder).read() == Started(("join",), {"--name": ("carl",)})

    assert run(["service", "install", "--dir", str(folder)]) == 0, "it has no run yet, and the invite is still there"
    assert "--invite-file" in words_of_unit(system, "swarmtrain-carl")
    (folder / "run.toml").write_text("[run]\n")
    assert run(["service", "install", "--dir", str(folder)]) == 0
    assert "--invite-file" not in words_of_unit(system, "swarmtrain-carl"), "the folder has the run now"
    capsys.readouterr()
    assert run(["service", "uninstall"]) == 0
    assert not invite.exists() and folder.exists() and str(folder) in capsys.readouterr().out


def test_options_without_an_invite_are_for_the_peer_that_is_here(system: FakeSystem, tmp_path: Path) -> None:
    folder = ran(tmp_path / "data" / "swarmtrain" / "volunteer")
    assert run(["service", "install", "--", "--nice", "5"]) == 0
    assert StartedFile(folder).read().options == {"--nice": ("5",)}
    assert [each.folder for each in system.manager().installed()] == [folder]


def test_a_bootstrap_is_installed_with_its_run_file(system: FakeSystem, tmp_path: Path) -> None:
    run_file = tmp_path / "run.toml"
    run_file.write_text("[run]\ntotal_tokens = 1\n")
    folder = ran(tmp_path / "boot", ("bootstrap", str(run_file)), listen=(":31337",))
    invite = tmp_path / "out" / "invite.txt"
    assert run(["service", "install", "--dir", "boot", "--", "--wait-for", "2", "--invite-file", str(invite)]) == 0
    unit = "swarmtrain-bootstrap-stdlib-gpt"
    line = [*PROGRAM, "bootstrap", str(run_file), "--dir", str(folder), "--invite-file", str(invite)]
    assert words_of_unit(system, unit) == line
    assert f"ReadWritePaths=-{tmp_path / 'out'}\n" in system.loaded[f"{unit}.service"]
    assert "OOMScoreAdjust" not in system.loaded[f"{unit}.service"], "it does not give way"
    assert "Description=swarmtrain bootstrap, run stdlib-gpt\n" in system.loaded[f"{unit}.service"]
    assert StartedFile(folder).read().options == {"--listen": (":31337",), "--wait-for": ("2",)}


def test_print_writes_and_starts_nothing(
    system: FakeSystem, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["service", "install", "--dir", "new", "--print", "--", INVITE, "--memory", "1GB"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("# Written by") and "MemoryMax=1512000000\n" in out and INVITE not in out
    assert not system.units.exists() and not (tmp_path / "new").exists() and not system.started


def test_a_peer_that_runs_already_is_not_started_twice(
    system: FakeSystem, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = ran(tmp_path / "peer")
    with living(FakePeer(folder).start()):
        assert run(["service", "install", "--dir", str(folder)]) == 0
        out = capsys.readouterr().out
        assert run(["service", "status"]) == 0
        rows = capsys.readouterr().out
        assert "not started, since" in rows and f"the peer runs beside it, as process {os.getpid()}" in rows
        assert (
            f"`swarmtrain leave --dir {folder} && systemctl --user start swarmtrain-stdlib-gpt.service` hands" in rows
        )
    assert "runs already, as process" in out and not system.started
    assert f"swarmtrain leave --dir {folder} && systemctl --user start swarmtrain-stdlib-gpt.service" in out
    assert system.manager().state("swarmtrain-stdlib-gpt").is_enabled


def test_two_peers_of_one_name_get_two_services(system: FakeSystem, tmp_path: Path) -> None:
    for folder in ("one", "two"):
        ran(tmp_path / folder)
        assert run(["service", "install", "--dir", folder]) == 0
    assert {each.name: each.folder.name for each in system.manager().installed()} == {
        "swarmtrain-stdlib-gpt": "one",
        "swarmtrain-stdlib-gpt-2": "two",
    }


def test_a_peer_that_ends_at_once_is_an_error_with_the_way_to_its_log(
    system: FakeSystem, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ran(tmp_path / "peer")
    ended = {"ActiveState": "failed", "ExecMainCode": "1", "ExecMainStatus": "2", "Result": "exit-code"}
    ended["ExecMainExitTimestampMonotonic"] = "5"
    system.on_start = lambda unit: system.told.update({unit: ended})
    assert run(["service", "install", "--dir", "peer"]) == 1
    err = capsys.readouterr().err
    assert codes_in(err) == ["service-ended"] and "code 2" in err
    assert "`journalctl --user-unit swarmtrain-stdlib-gpt.service` says what has to be changed" in err


def test_a_peer_whose_run_is_over_is_no_error(
    system: FakeSystem, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ran(tmp_path / "peer")
    ended = {"ActiveState": "inactive", "ExecMainCode": "1", "ExecMainExitTimestampMonotonic": "5"}
    system.on_start = lambda unit: system.told.update({unit: ended})
    assert run(["service", "install", "--dir", "peer"]) == 0
    assert "has ended well already" in capsys.readouterr().out


def test_who_stops_waiting_lets_the_peer_start_on(
    system: FakeSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(peer: object) -> object:
        raise KeyboardInterrupt

    ran(tmp_path / "peer")
    monkeypatch.setattr("swarmtrain.cli.peers.look", interrupt)
    assert run(["service", "install", "--dir", "peer"]) == 0
    out, err = capsys.readouterr()
    assert not err and "is installed and starts" in out


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--dir", "peer", "--", "--nice", "99"], ""),
        (["--dir", "peer", "--", "--memory", "much"], "bad-limit"),
        (["--dir", "peer", "--", "--nope"], ""),
        (["--dir", "peer", "--", "--dir", "x"], "options-conflict"),
        (["--dir", "peer", "--", "--background"], "options-conflict"),
        (["--dir", "peer", "--", "--fail-pulls", "5"], "options-conflict"),
        (["--dir", "peer", "--", INVITE], "folder-of-another-run"),
        (["--dir", "peer", "--", "st1garbled"], "invite-garbled"),
        (["--dir", "new"], "nothing-to-resume"),
        (["--dir", "new", "--", "--nice", "5"], "nothing-to-resume"),
        (["nobody"], "no-such-peer"),
        ([INVITE], "options-conflict"),
    ],
)
def test_what_cannot_be_a_service_is_refused_before_anything_is_written(
    words: list[str], code: str, system: FakeSystem, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = ran(tmp_path / "peer")
    before = StartedFile(folder).read()
    assert run(["service", "install", *words]) == 2
    err = capsys.readouterr().err
    assert codes_in(err) == [code] * bool(code) and err.count("\n") == 1
    assert not system.units.exists() and StartedFile(folder).read() == before and not (tmp_path / "new").exists()


def test_variables_of_this_shell_that_the_peer_needs_go_with_it_and_secrets_do_not(
    system: FakeSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran(tmp_path / "peer")
    monkeypatch.setenv("HF_HOME", "/big disk/hf")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    monkeypatch.setenv("WANDB_PROJECT", "swarm")
    monkeypatch.setenv("SWARMTRAIN_JOIN_UP", "5")
    monkeypatch.setenv("SWARMTRAIN_BOOTSTRAP_WAIT_FOR", "2")
    assert run(["service", "install", "--dir", "peer"]) == 0
    unit = system.loaded["swarmtrain-stdlib-gpt.service"]
    assert 'Environment="HF_HOME=/big disk/hf"\n' in unit and 'ReadWritePaths="-/big disk/hf"\n' in unit
    assert "Environment=SWARMTRAIN_JOIN_UP=5\n" in unit
    assert "secret" not in unit and "WAIT_FOR" not in unit
    assert "Environment=WANDB_PROJECT=swarm\n" in unit
    err = capsys.readouterr().err
    assert err.count("systemctl --user edit swarmtrain-stdlib-gpt.service") == 2
    assert "Environment=HF_TOKEN=" in err and "Environment=WANDB_API_KEY=" in err


def test_limits_of_a_running_service_are_written_into_its_unit(
    system: FakeSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = ran(tmp_path / "peer", memory=("1GB",))

    def remembered(fake: FakePeer, request: object, context: object) -> object:
        StartedFile(folder).keep_options({"--memory": ("10GB",)})
        return limited(fake, request, context)

    limited = FakePeer.Limit
    monkeypatch.setattr(FakePeer, "Limit", remembered)
    assert run(["service", "install", "--dir", "peer"]) == 0
    assert run(["limits", "--dir", "peer", "--memory", "10GB"]) == 0
    assert "MemoryMax=15000000000\n" in system.loaded["swarmtrain-stdlib-gpt.service"]
    system.refuses = "daemon-reload"
    StartedFile(folder).keep_options({"--nice": ("5",)})
    capsys.readouterr()
    assert run(["limits", "--dir", "peer", "--memory", "10GB"]) == 0, "the limits hold in the peer all the same"
    assert "service install" in capsys.readouterr().err


# ---------------------------------------------------------------- status and uninstall


def test_status_says_what_a_person_asks(system: FakeSystem, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["service", "status"]) == 0
    assert "no service is installed" in capsys.readouterr().out
    folder = ran(tmp_path / "pe er", name=("anna",))
    assert run(["service", "install", "--dir", str(folder)]) == 0
    system.told["swarmtrain-anna.service"] = {
        "ActiveState": "active",
        "MainPID": str(os.getpid()),
        "NRestarts": "1",
    } | {
        "ExecMainCode": "2",
        "ExecMainStatus": "9",
        "ExecMainExitTimestampMonotonic": "5",
    }
    capsys.readouterr()
    for words in ([], ["anna"], ["swarmtrain-anna"], ["pe er"], ["--dir", str(folder)]):
        assert run(["service", "status", *words]) == 0
        rows = dict(line.strip().split(maxsplit=1) for line in capsys.readouterr().out.splitlines()[1:])
        assert rows["folder"] == str(folder) and rows["enabled"] == "yes, it starts when the machine starts"
        assert rows["now"].startswith(f"running, process {os.getpid()}, since 20") and rows["now"].endswith(
            "(1 min ago)"
        )
        assert rows["last"] == "exit  killed by signal 9; started again 1 time"
        assert "journalctl --user-unit swarmtrain-anna.service -f" in rows["logs"]
        assert f"swarmtrain logs --dir {shlex.quote(str(folder))} -F" in rows["logs"]
        assert rows["next"] == f"`swarmtrain watch --dir {shlex.quote(str(folder))}`"
    assert run(["service", "status", "--json"]) == 0
    table = json.loads(capsys.readouterr().out)
    assert (table["name"], table["dir"], table["state"], table["pid"]) == (
        "swarmtrain-anna",
        str(folder),
        "running",
        os.getpid(),
    )
    assert (
        table["beside"] is None
        and table["enabled"] is True
        and table["starts_at"] == "boot"
        and table["exit_code"] is None
    )
    system.told["swarmtrain-anna.service"]["ExecMainExitTimestampMonotonic"] = "0"
    assert run(["service", "status"]) == 0
    out = capsys.readouterr().out
    assert "the log says which; started again 1 time" in out, "systemd forgets it once the next process runs"
    assert run(["service", "status", "bert"]) == 2
    err = capsys.readouterr().err
    assert codes_in(err) == ["no-such-service"] and str(folder) in err


@pytest.mark.parametrize(
    ("told", "next_step"),
    [
        ({"ActiveState": "failed", "ExecMainStatus": "2"}, "says what has to be changed"),
        ({"ActiveState": "failed", "ExecMainStatus": "1"}, "says why it failed"),
        ({"ActiveState": "activating", "SubState": "auto-restart", "ExecMainStatus": "1"}, "nothing: it is started"),
        ({}, "nothing, if the run has ended"),
        ({"ExecMainExitTimestampMonotonic": "0"}, "`systemctl --user start swarmtrain-anna.service`"),
        ({"UnitFileState": "disabled"}, "`swarmtrain service install --dir "),
    ],
)
def test_status_names_the_next_step(
    told: dict[str, str], next_step: str, system: FakeSystem, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ran(tmp_path / "peer", name=("anna",))
    peers: list[FakePeer] = []
    system.on_start = lambda unit: peers.append(FakePeer(tmp_path / "peer").start())
    assert run(["service", "install", "--dir", "peer"]) == 0
    peers[0].die()
    ended = {"ActiveState": "inactive", "ExecMainCode": "1", "ExecMainExitTimestampMonotonic": "5"}
    system.told["swarmtrain-anna.service"] = ended | told
    capsys.readouterr()
    assert run(["service", "status"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  next")]
    assert next_step in rows[0]


def test_uninstall_of_nothing_and_of_several_says_so(
    system: FakeSystem, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["service", "uninstall"]) == 2
    assert codes_in(capsys.readouterr().err) == ["no-such-service"]
    for folder in ("one", "two"):
        ran(tmp_path / folder)
        assert run(["service", "install", "--dir", folder]) == 0
    capsys.readouterr()
    assert run(["service", "uninstall"]) == 2
    assert codes_in(capsys.readouterr().err) == ["several-services"]
    assert run(["service", "uninstall", "--dir", "two"]) == run(["service", "uninstall", "stdlib-gpt"]) == 0
    assert system.manager().installed() == [] and not list(system.units.rglob("*.service"))


def test_leaving_says_that_the_service_brings_the_peer_back(
    system: FakeSystem, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ran(tmp_path / "peer", name=("anna",))
    peers: list[FakePeer] = []
    system.on_start = lambda unit: peers.append(FakePeer(tmp_path / "peer").start())
    assert run(["service", "install", "--dir", "peer"]) == 0
    with living(peers[0]) as peer:
        assert run(["leave", "--dir", "peer", "--no-wait"]) == 0
        assert peer.on_leave.is_set()
    out = capsys.readouterr().out
    assert "swarmtrain-anna starts it again after the next reboot" in out
    assert "`swarmtrain service uninstall swarmtrain-anna`" in out


# ---------------------------------------------------------------- the command line


def test_another_word_is_answered_with_the_three(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["service", "restart"]) == 2
    err = capsys.readouterr().err
    assert codes_in(err) == ["no-such-command"] and "install, status, uninstall" in err
    assert run(["service"]) == 0
    assert "uninstall" in capsys.readouterr().out


@pytest.mark.parametrize("word", ["install", "status", "uninstall"])
def test_help_ends_with_an_example_of_the_service_command(word: str) -> None:
    text = CliRunner().invoke(cli, ["service", word, "--help"]).output
    assert text.rstrip().splitlines()[-1].startswith(f"    swarmtrain service {word} ")
    whole = CliRunner().invoke(cli, ["service", "--help"]).output
    line = next(line for line in whole.splitlines() if line.startswith(f"  {word} "))
    assert not line.endswith("...")


def test_under_launchd_wrong_use_ends_with_code_0(monkeypatch: pytest.MonkeyPatch) -> None:
    """launchd starts again whatever failed, and this would fail for ever."""
    monkeypatch.setattr(sys, "argv", ["swarmtrain", "join", "--nope"])
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    with pytest.raises(SystemExit) as plain:
        main()
    monkeypatch.setenv("SWARMTRAIN_UNDER_LAUNCHD", "1")
    with pytest.raises(SystemExit) as under:
        main()
    assert (plain.value.code, under.value.code) == (2, 0)

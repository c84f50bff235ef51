"""What systemd and launchd are asked, and what is made of their answers; where neither is, what is said instead."""

from __future__ import annotations

import plistlib
import stat
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from codes import raises_code
from fake_system import FakeSystem

from swarmtrain.errors import RunTimeError, UserError
from swarmtrain.peer.service import managers, systemd
from swarmtrain.peer.service.definition import ServiceDefinition, ServiceLimits
from swarmtrain.peer.service.launchd import Launchd
from swarmtrain.peer.service.managers import service_manager
from swarmtrain.peer.service.state import Answer, InstalledService, ServicePhase, run_command
from swarmtrain.peer.service.systemd import Systemd

NAME = "swarmtrain-anna"
UNIT = f"{NAME}.service"


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSystem:
    monkeypatch.setattr(systemd, "BOOTED", tmp_path)
    return FakeSystem(tmp_path / "home")


def definition(folder: Path, **changes: object) -> ServiceDefinition:
    command = ("/opt/swarmtrain", "join", "--dir", str(folder))
    return ServiceDefinition(name=NAME, title="t", folder=folder, command=command, **changes)  # type: ignore[arg-type]


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() or path.is_symlink())


# ---------------------------------------------------------------- systemd


def test_installing_twice_and_uninstalling_leaves_nothing(system: FakeSystem, tmp_path: Path) -> None:
    manager = system.manager()
    assert manager.install(definition(tmp_path / "peer")) == []
    unit = system.units / UNIT
    first, changed = unit.read_text(), unit.stat().st_mtime_ns
    assert stat.S_IMODE(unit.stat().st_mode) == 0o600, "it may hold what others must not read"
    assert system.loaded[UNIT] == first and (system.home / "linger" / "anna").exists()
    assert manager.installed() == [InstalledService(name=NAME, path=unit, folder=tmp_path / "peer")]

    assert manager.install(definition(tmp_path / "peer")) == []
    assert unit.read_text() == first and unit.stat().st_mtime_ns == changed, "it is not written anew"
    (told,) = manager.remove(manager.installed()[0])
    assert "as before" in told and manager.installed() == []
    assert files(system.home) == [] and not system.loaded
    assert f"systemctl --user disable --now --quiet {UNIT}" in system.asked


def test_what_a_person_added_to_a_unit_stays_and_is_named(system: FakeSystem, tmp_path: Path) -> None:
    manager = system.manager()
    manager.install(definition(tmp_path))
    additions = system.units / f"{UNIT}.d"
    additions.mkdir()
    told = manager.remove(manager.installed()[0])
    assert str(additions) in told[0] and additions.is_dir()


def test_services_at_boot_that_a_person_had_already_stay(system: FakeSystem, tmp_path: Path) -> None:
    manager = system.manager()
    (system.home / "linger" / "anna").touch()
    manager.install(definition(tmp_path))
    assert manager.remove(manager.installed()[0]) == []
    assert files(system.home) == [system.home / "linger" / "anna"]


def test_services_at_boot_stay_where_others_need_them_by_now(system: FakeSystem, tmp_path: Path) -> None:
    manager = system.manager()
    manager.install(definition(tmp_path))
    (system.units / "default.target.wants" / "syncthing.service").touch()
    (told,) = manager.remove(manager.installed()[0])
    assert "loginctl disable-linger anna" in told and (system.home / "linger" / "anna").exists()


def test_who_may_not_linger_is_told_how_an_administrator_does_it(system: FakeSystem, tmp_path: Path) -> None:
    system.may_linger = False
    manager = system.manager()
    (told,) = manager.install(definition(tmp_path))
    assert "when you log in" in told and "sudo loginctl enable-linger anna" in told
    assert not manager.state(NAME).starts_at_boot and manager.state(NAME).is_enabled
    assert manager.remove(manager.installed()[0]) == []


def test_where_a_user_may_have_no_sandbox_the_unit_has_none_and_it_is_said(system: FakeSystem, tmp_path: Path) -> None:
    system.has_sandbox = False
    (told,) = system.manager().install(definition(tmp_path))
    assert "nothing but this user's rights" in told
    assert "ProtectSystem" not in system.loaded[UNIT] and "NoNewPrivileges=yes" in system.loaded[UNIT]


def test_limits_that_change_are_written_into_the_unit_of_that_folder(system: FakeSystem, tmp_path: Path) -> None:
    manager = system.manager()
    manager.install(definition(tmp_path / "peer"))
    limits = ServiceLimits(memory_bytes=10**10)
    manager.keep_limits(tmp_path / "other", limits)
    assert "MemoryMax" not in system.loaded[UNIT]
    manager.keep_limits(tmp_path / "peer", limits)
    assert "MemoryMax=15000000000\n" in system.loaded[UNIT], "and the manager has read it"
    assert stat.S_IMODE((system.units / UNIT).stat().st_mode) == 0o600
    count = len(system.asked)
    manager.keep_limits(tmp_path / "peer", limits)
    assert len(system.asked) == count, "nothing is new"


def test_a_refusal_is_said_in_its_words(system: FakeSystem, tmp_path: Path) -> None:
    system.refuses = "daemon-reload"
    with raises_code("service-refused", RunTimeError, "systemctl --user daemon-reload", "Connection refused"):
        system.manager().install(definition(tmp_path))


@pytest.mark.parametrize(
    ("told", "phase", "last_exit", "code"),
    [
        ({}, ServicePhase.NOT_STARTED, "", None),
        ({"ActiveState": "active", "MainPID": "77"}, ServicePhase.RUNNING, "", None),
        ({"ActiveState": "activating", "SubState": "start-pre"}, ServicePhase.STARTING, "", None),
        ({"ActiveState": "deactivating"}, ServicePhase.STOPPING, "", None),
        ({"ExecMainCode": "1", "exited": "5"}, ServicePhase.ENDED, "code 0", 0),
        (
            {"ActiveState": "failed", "ExecMainCode": "1", "ExecMainStatus": "2", "exited": "5"},
            ServicePhase.FAILED,
            "code 2",
            2,
        ),
        (
            {"ActiveState": "activating", "SubState": "auto-restart", "ExecMainCode": "2", "ExecMainStatus": "9"}
            | {"exited": "5", "Result": "oom-kill"},
            ServicePhase.WAITING,
            "killed by signal 9 (it used too much memory)",
            None,
        ),
        (
            {"ActiveState": "failed", "Result": "start-limit-hit", "ExecMainCode": "1", "ExecMainStatus": "1"}
            | {"exited": "5"},
            ServicePhase.FAILED,
            "code 1 (it failed too often)",
            1,
        ),
    ],
)
def test_what_systemd_tells_of_a_unit(
    system: FakeSystem, told: dict[str, str], phase: ServicePhase, last_exit: str, code: int | None
) -> None:
    told = {"ExecMainExitTimestampMonotonic" if name == "exited" else name: value for name, value in told.items()}
    system.told[UNIT] = told | {"NRestarts": "3"}
    state = system.manager().state(NAME)
    assert (state.phase, state.last_exit, state.exit_code) == (phase, last_exit, code)
    assert state.restarts == 3 and state.pid == int(told.get("MainPID", 0)) and not state.is_enabled
    assert state.since is not None and state.since == pytest.approx(time.time() - 90, abs=5)


def test_files_of_others_are_no_services_of_swarmtrain(system: FakeSystem) -> None:
    manager = system.manager()
    system.units.mkdir(parents=True)
    (system.units / "swarmtrain-mine.service").write_text("[Service]\nExecStart=/mine\n")
    (system.units / "swarmtrain-odd.service").write_bytes(b"\xff\n[X-Swarmtrain]\n")
    (system.units / "other.service").write_text('\n[X-Swarmtrain]\nFolder="/x"\n')
    assert manager.installed() == []


def test_devices_of_cards_are_created_by_a_helper_that_needs_an_administrators_rights(
    system: FakeSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`NoNewPrivileges` would keep the driver from calling it."""
    helper, cards = tmp_path / "nvidia-modprobe", tmp_path / "gpus"
    helper.touch(mode=0o755)
    places = {"nvidia-modprobe": str(helper), "systemd-run": "/usr/bin/systemd-run"}
    monkeypatch.setattr("shutil.which", places.get)
    monkeypatch.setattr(systemd, "_CARDS", cards)
    text = system.manager().content(definition(tmp_path)).decode
    assert "ExecStartPre" not in text(), "there is no card"
    for number in range(2):
        (cards / f"0000:0{number}:00.0").mkdir(parents=True)
    manager = system.manager()
    assert b"ExecStartPre" not in manager.content(definition(tmp_path)), "the helper has no special rights"
    helper.chmod(0o4755)
    runs = f"ExecStartPre=-/usr/bin/systemd-run --user --quiet --wait --collect {helper} -u -c 0 -c 1\n"
    assert runs in manager.content(definition(tmp_path)).decode()
    assert b"ExecStartPre" not in manager.content(definition(tmp_path, gives_way=False)), "a bootstrap needs no card"


# ---------------------------------------------------------------- launchd

PRINTED = """gui/501/swarmtrain-anna = {
\tactive count = 1
\tpath = /Users/anna/Library/LaunchAgents/swarmtrain-anna.plist
\tstate = running

\tprogram = /opt/swarmtrain
\tspawn type = daemon (3)
\truns = 3
\tpid = 4711
\tlast exit code = 1
}
"""


class FakeLaunchd:
    """Answers as launchctl does, as far as its manual tells."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.loaded = ""

    def __call__(self, words: Sequence[str]) -> Answer:
        self.asked.append(" ".join(words))
        if words[1] == "print":
            return Answer(0, self.loaded) if self.loaded else Answer(113, err="Could not find service")
        self.loaded = PRINTED if words[1] == "bootstrap" else ""
        return Answer(0)


def test_an_agent_is_installed_started_and_removed(tmp_path: Path) -> None:
    fake = FakeLaunchd()
    manager = Launchd(agents=tmp_path / "LaunchAgents", logs=tmp_path / "Logs", ask=fake, uid=501)
    for _ in range(2):
        (told,) = manager.install(definition(tmp_path / "peer"))
        assert "when you log in" in told
        manager.start(NAME)
    agent = tmp_path / "LaunchAgents" / f"{NAME}.plist"
    assert plistlib.loads(agent.read_bytes())["StandardErrorPath"] == str(tmp_path / "Logs" / f"{NAME}.log")
    assert [stat.S_IMODE(path.stat().st_mode) for path in files(tmp_path)] == [0o600, 0o600]
    assert fake.asked[-2:] == [f"launchctl bootout gui/501/{NAME}", f"launchctl bootstrap gui/501 {agent}"]
    (service,) = manager.installed()
    assert service == InstalledService(name=NAME, path=agent, folder=tmp_path / "peer")
    state = manager.state(NAME)
    assert (state.phase, state.pid, state.restarts, state.exit_code) == (ServicePhase.RUNNING, 4711, 2, 1)
    assert manager.remove(service) == [] and files(tmp_path) == []
    assert manager.state(NAME).phase is ServicePhase.NOT_STARTED and not manager.state(NAME).is_enabled


@pytest.mark.parametrize(
    ("exit_line", "phase"),
    [
        ("last exit code = 0", ServicePhase.ENDED),
        ("last exit code = 78: EX_CONFIG", ServicePhase.WAITING),
        ("last exit code = (never exited)", ServicePhase.NOT_STARTED),
    ],
)
def test_an_agent_that_does_not_run(exit_line: str, phase: ServicePhase, tmp_path: Path) -> None:
    printed = PRINTED.replace("state = running", "state = not running").replace("last exit code = 1", exit_line)
    manager = Launchd(agents=tmp_path, logs=tmp_path, ask=lambda words: Answer(0, printed), uid=501)
    assert manager.state(NAME).phase is phase


def test_a_refusal_of_launchd_is_said(tmp_path: Path) -> None:
    manager = Launchd(agents=tmp_path, logs=tmp_path, ask=lambda words: Answer(5, err="Input/output error"), uid=501)
    with raises_code("service-refused", RunTimeError, "Input/output error"):
        manager.start(NAME)


# ---------------------------------------------------------------- which one is here


@pytest.mark.parametrize(
    ("platform_name", "release", "mark", "says"),
    [
        ("linux", "6.1", "", "@reboot"),
        ("linux", "5.15-microsoft-standard-WSL2", "", "/etc/wsl.conf"),
        ("linux", "6.1", "container", "--restart on-failure"),
        ("freebsd14", "14", "", "own scheduler"),
    ],
)
def test_where_nothing_starts_services_it_is_said_what_does(
    platform_name: str, release: str, mark: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", platform_name)
    monkeypatch.setattr("platform.release", lambda: release)
    monkeypatch.setattr(managers, "BOOTED", tmp_path / "nowhere")
    monkeypatch.setattr(managers, "_CONTAINER_FILES", (tmp_path / mark,) if mark else ())
    (tmp_path / mark).mkdir(exist_ok=True)
    with raises_code("no-service-manager", UserError, says):
        service_manager("swarmtrain join --dir /x")


def test_a_user_manager_that_does_not_answer_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(managers, "BOOTED", tmp_path)
    silent = Answer(1, err="Failed to connect to bus: No medium found\n")
    with raises_code("no-service-manager", UserError, "No medium found", "ssh"):
        service_manager("x", lambda words: silent)
    assert isinstance(service_manager("x", lambda words: Answer(0)), Systemd)
    monkeypatch.setattr(sys, "platform", "darwin")
    assert isinstance(service_manager("x"), Launchd) and isinstance(managers.service_files(), Launchd)


def test_a_command_that_is_not_there_is_an_answer() -> None:
    assert run_command(["/nowhere/systemctl"]).code == 127
    said = run_command(["sh", "-c", "echo out; echo 'one\ntwo' >&2; exit 3"])
    assert (said.code, said.out, said.reason) == (3, "out\n", "one two")

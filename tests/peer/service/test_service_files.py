"""Units of systemd and agents of launchd: what they say, that systems read it as it is meant, and limits in them."""

from __future__ import annotations

import dataclasses
import plistlib
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from codes import raises_code

from swarmtrain.errors import UserError
from swarmtrain.peer.service.definition import (
    PREFIX,
    ServiceDefinition,
    ServiceLimits,
    free_name,
    is_service_name,
    service_limits,
)
from swarmtrain.peer.service.launchd_agent import UNDER_LAUNCHD, agent_bytes, folder_of_agent
from swarmtrain.peer.service.systemd_unit import (
    UnitFeatures,
    folder_of_unit,
    has_set_lingering,
    set_lingering,
    unit_text,
    with_limits,
)

ODD = """an na%h$HOME x"q"\\ü ;'#"""
"""Name of a folder with all that systemd would read as something else."""


def definition(folder: Path = Path("/home/anna/swarm"), **changes: object) -> ServiceDefinition:
    made = ServiceDefinition(
        name="swarmtrain-anna",
        title="swarmtrain volunteer anna in the run stdlib-gpt",
        folder=folder,
        command=("/opt/venv/bin/swarmtrain", "join", "--dir", str(folder)),
        writable=(Path("/home/anna/.cache"), Path("/tmp")),
    )
    return dataclasses.replace(made, **changes)  # type: ignore[arg-type]


def lines_of(text: str, key: str) -> list[str]:
    return [line.partition("=")[2] for line in text.splitlines() if line.startswith(f"{key}=")]


def words_of(value: str) -> list[str]:
    """Read words as systemd does: quotes, escapes, then specifiers; variables are left."""
    found = re.findall(r'"((?:[^"\\]|\\.)*)"|(\S+)', value)
    words = [re.sub(r"\\(.)", r"\1", quoted) if quoted or not plain else plain for quoted, plain in found]
    assert all("%" not in word.replace("%%", "") for word in words), "a lone % is a specifier"
    return [word.replace("%%", "%") for word in words]


# ---------------------------------------------------------------- systemd


def test_a_unit_restarts_what_failed_and_nothing_else() -> None:
    text = unit_text(definition(), UnitFeatures())
    assert lines_of(text, "ExecStart") == ["/opt/venv/bin/swarmtrain join --dir /home/anna/swarm"]
    assert lines_of(text, "Restart") == ["on-failure"] and lines_of(text, "RestartPreventExitStatus") == ["2"]
    assert lines_of(text, "RestartSteps") and lines_of(text, "StartLimitIntervalSec") == ["0"]
    assert lines_of(text, "KillMode") == ["mixed"] and lines_of(text, "WantedBy") == ["default.target"]
    assert int(lines_of(text, "TimeoutStopSec")[0]) > 100, "the last volunteer of a run waits so long for the archive"
    older = unit_text(definition(), UnitFeatures(version=247))
    assert lines_of(older, "StartLimitBurst") == ["30"] and not lines_of(older, "RestartSteps")


def test_a_unit_writes_into_its_folders_only_where_the_system_allows_that() -> None:
    text = unit_text(definition(), UnitFeatures())
    assert lines_of(text, "ProtectHome") == ["read-only"], "which ProtectSystem leaves out"
    assert lines_of(text, "ProtectSystem") == ["strict"] and lines_of(text, "NoNewPrivileges") == ["yes"]
    assert lines_of(text, "ReadWritePaths") == ["-/home/anna/swarm", "-/home/anna/.cache", "-/tmp"]
    without = unit_text(definition(), UnitFeatures(has_sandbox=False))
    assert not lines_of(without, "ReadWritePaths") and lines_of(without, "NoNewPrivileges") == ["yes"]


def test_the_limits_of_the_volunteer_are_in_the_unit_and_can_be_changed() -> None:
    limits = ServiceLimits(memory_bytes=4 * 10**9, nice=10)
    text = unit_text(definition(limits=limits), UnitFeatures())
    assert lines_of(text, "MemoryMax") == ["6000000000"] and lines_of(text, "CPUWeight") == ["11"]
    assert not lines_of(text, "IOSchedulingClass")
    assert with_limits(text, limits) == text
    bare = unit_text(definition(), UnitFeatures())
    assert with_limits(text, ServiceLimits()) == bare and with_limits(bare, limits) == text
    idle = with_limits(text, ServiceLimits(nice=19))
    assert lines_of(idle, "CPUWeight") == ["1"] and lines_of(idle, "IOSchedulingClass") == ["idle"]
    section = idle.partition("[Service]")[2].partition("\n[")[0]
    assert "CPUWeight=1" in section
    assert with_limits("[Service]\nExecStart=/mine\n", limits) == "[Service]\nExecStart=/mine\n", "a person's own"


def test_memory_of_the_fence_is_well_above_the_limit() -> None:
    """The peer itself pauses at its limit, and may be above it for half a minute."""
    assert ServiceLimits().fence_bytes == 0
    assert ServiceLimits(memory_bytes=10**8).fence_bytes == 612 * 10**6
    assert ServiceLimits(memory_bytes=10**10).fence_bytes == 15 * 10**9


def test_weights_are_those_of_niceness() -> None:
    """A step of niceness is a factor of 1.25 to the Linux scheduler; 100 is what everything else has."""
    assert [ServiceLimits(nice=nice).processor_weight for nice in (0, 1, 5, 10, 19)] == [100, 80, 33, 11, 1]


@pytest.mark.parametrize(
    ("options", "limits"),
    [
        ({}, ServiceLimits()),
        ({"--memory": ("1.5GiB",), "--nice": ("7",)}, ServiceLimits(memory_bytes=1_610_612_736, nice=7)),
        ({"--only-when-idle": (), "--memory": ("none",)}, ServiceLimits(only_when_idle=True)),
        ({"--memory": ("much",)}, ServiceLimits()),
        ({"--nice": ()}, ServiceLimits()),
        ({"--nice": ("99",)}, ServiceLimits(nice=19)),
    ],
)
def test_limits_are_read_from_what_the_folder_remembers(
    options: dict[str, tuple[str, ...]], limits: ServiceLimits
) -> None:
    assert service_limits(options) == limits


def test_words_are_escaped_as_systemd_reads_them() -> None:
    folder = Path("/home") / ODD
    command = ("/opt/my venv/bin/swarmtrain", "join", "--dir", str(folder), "--log-level", ";")
    made = definition(folder, command=command, environment={"HF_HOME": f"/cache/{ODD}"})
    text = unit_text(made, UnitFeatures())
    (line,) = lines_of(text, "ExecStart")
    assert "$HOME" not in line.replace("$$", ""), "a lone $ is a variable"
    assert [word.replace("$$", "$") for word in words_of(line)] == list(command)
    assert words_of(lines_of(text, "Environment")[0]) == [f"HF_HOME=/cache/{ODD}"], "no variables are replaced there"
    assert words_of(lines_of(text, "ReadWritePaths")[0]) == [f"-{folder}"]
    assert '";"' in line, "a lone ; begins another command"
    assert folder_of_unit(text) == folder


def test_a_program_whose_path_has_a_dollar_is_started_by_env() -> None:
    """systemd replaces variables in arguments and not in the program's path."""
    text = unit_text(definition(command=("/opt/$x/swarmtrain", "join")), UnitFeatures())
    assert lines_of(text, "ExecStart") == ['/usr/bin/env "/opt/$$x/swarmtrain" join']


@pytest.mark.parametrize("word", ["a\nExecStart=/bin/evil", "a\x07", "a\udcff"])
def test_what_no_unit_can_hold_is_refused(word: str) -> None:
    with raises_code("not-for-a-service", UserError, "--dir"):
        definition(Path("/home") / word)


def test_only_units_of_swarmtrain_have_a_folder() -> None:
    assert folder_of_unit(unit_text(definition(), UnitFeatures())) == Path("/home/anna/swarm")
    for text in ("", "[Unit]\n", "[X-Swarmtrain]\n", "\n[X-Swarmtrain]\nFolder=7\n", "\n[X-Swarmtrain]\nFolder={\n"):
        assert folder_of_unit(text) is None


def test_a_unit_notes_that_install_had_services_started_at_boot() -> None:
    text = unit_text(definition(), UnitFeatures())
    noted = set_lingering(text)
    assert not has_set_lingering(text) and has_set_lingering(noted)
    assert noted == set_lingering(noted) == unit_text(definition(), UnitFeatures(has_set_lingering=True))
    assert folder_of_unit(noted) == Path("/home/anna/swarm")


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
@pytest.mark.parametrize("version", [257, 241])
def test_systemd_itself_finds_nothing_wrong(version: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "the program" / "swarmtrain"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    folder = tmp_path / ODD
    made = definition(
        folder,
        command=(str(program), "join", "--dir", str(folder), "--log-level", ";"),
        environment={"HF_HOME": f"{tmp_path}/{ODD}"},
        limits=ServiceLimits(memory_bytes=10**9, nice=19),
    )
    features = UnitFeatures(version=version, before=(str(program), "-u"))
    path = tmp_path / "swarmtrain-anna.service"
    path.write_text(unit_text(made, features))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--user", "--man=no", path], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
    path.write_text(unit_text(made, features).replace("Restart=", "Restrat="))
    again = subprocess.run(
        ["systemd-analyze", "verify", "--user", "--man=no", path], capture_output=True, text=True, check=False
    )
    assert "Restrat" in again.stderr, "it does look"


# ---------------------------------------------------------------- launchd


def test_an_agent_is_what_launchd_reads() -> None:
    made = definition(Path("/Users") / ODD, limits=ServiceLimits(nice=19), environment={"HF_HOME": "/x & y"})
    data = agent_bytes(made, Path("/Users/anna/Library/Logs/swarmtrain-anna.log"))
    agent = plistlib.loads(data)
    assert agent["Label"] == "swarmtrain-anna" and agent["ProgramArguments"] == list(made.command)
    assert agent["RunAtLoad"] is True and agent["KeepAlive"] == {"SuccessfulExit": False}
    assert agent["EnvironmentVariables"] == {"HF_HOME": "/x & y", UNDER_LAUNCHD: "1"}
    assert agent["StandardErrorPath"] == agent["StandardOutPath"] == "/Users/anna/Library/Logs/swarmtrain-anna.log"
    assert agent["LowPriorityIO"] is True and agent["ExitTimeOut"] > 100
    assert "Nice" not in agent, "a peer that is to be less nice next time could not lower it"
    assert folder_of_agent(data) == made.folder
    bare = plistlib.loads(agent_bytes(definition(), Path("/log")))
    assert "LowPriorityIO" not in bare


@pytest.mark.parametrize("table", [{}, {"ProgramArguments": ["x", "--dir"]}, {"ProgramArguments": 7}, [1]])
def test_only_agents_of_swarmtrain_have_a_folder(table: object) -> None:
    assert folder_of_agent(plistlib.dumps(table)) is None  # type: ignore[arg-type]
    assert folder_of_agent(b"no plist") is None


# ---------------------------------------------------------------- names


def test_a_service_is_called_like_the_peer_or_with_a_number() -> None:
    taken = {"swarmtrain-anna", "swarmtrain-anna-2"}
    assert free_name("anna", ()) == "swarmtrain-anna" and free_name("anna", taken) == "swarmtrain-anna-3"
    assert free_name("my swarm/ü", ()) == "swarmtrain-my-swarm" and free_name("..", ()) == "swarmtrain-peer"
    long = free_name("a" * 200, {free_name("a" * 200, ())})
    assert long.endswith("-2") and len(long) < 80
    assert all(is_service_name(name) for name in (*taken, long, free_name("x.y_z-1", ())))
    assert not any(is_service_name(name) for name in ("anna", PREFIX, f"{PREFIX}a b", f"{PREFIX}../x"))

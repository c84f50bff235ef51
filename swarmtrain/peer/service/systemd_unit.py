"""Text of a systemd user unit, and what a unit that was written before says. Pure.

Escaping is as in systemd.syntax(7) and systemd.service(5): `%` begins a specifier everywhere, `$` a variable in command
lines, and a backslash an escape.
"""

from __future__ import annotations

import contextlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

from swarmtrain.errors import UserError
from swarmtrain.peer.service.definition import FAILED_RESTART_S, STOP_S, ServiceDefinition, ServiceLimits

__all__ = ["UnitFeatures", "folder_of_unit", "set_lingering", "unit_text", "with_limits"]

_SAFE = re.compile(r"[A-Za-z0-9@_./:=,+-]+")
_LIMIT_KEYS = ("MemoryMax", "CPUWeight", "IOSchedulingClass")
_GROWING_DELAY_SINCE = 254
_SECTION = "[X-Swarmtrain]"
_LINGERS = "Linger=enabled by install"


@dataclass(frozen=True, kw_only=True)
class UnitFeatures:
    """What this machine's systemd can do for a user's unit, and what the unit has to do for this machine."""

    version: int = _GROWING_DELAY_SINCE
    """Of systemd."""
    has_sandbox: bool = True
    """True if a user's unit may get a view of the file system of its own, which needs user namespaces."""
    before: tuple[str, ...] = ()
    """Command to run before each start, outside the unit's restrictions; empty: none."""
    has_set_lingering: bool = False
    """True if `install` made the system start this user's services at boot."""


def unit_text(definition: ServiceDefinition, features: UnitFeatures) -> str:
    """Return the unit that starts the peer with the user's services, and again when it has failed or was killed."""
    before = [f"ExecStartPre=-{_command_line(features.before)}"] if features.before else []
    environment = [f"Environment={_quoted(f'{name}={value}')}" for name, value in definition.environment.items()]
    lines = [
        f"# Written by `swarmtrain service install`; `swarmtrain service uninstall {definition.name}` removes it.",
        "",
        "[Unit]",
        f"Description={definition.title.replace('%', '%%')}",
        *_restart_limits(features.version),
        "",
        "[Service]",
        "Type=exec",
        *before,
        f"ExecStart={_command_line(definition.command)}",
        *environment,
        f"SyslogIdentifier={definition.name}",
        "# Code 0: the run has ended, or somebody asked the peer to leave. Code 2: a person has to change something.",
        "Restart=on-failure",
        f"RestartPreventExitStatus={UserError.exit_code}",  # until a person changes something
        *_restart_delay(features.version),
        "# The peer says goodbye, and then ends its network daemon itself.",
        "KillMode=mixed",
        f"TimeoutStopSec={STOP_S}",
        *(["OOMScoreAdjust=500"] if definition.gives_way else []),
        *_hardening(definition, features),
        "",
        "[Install]",
        "WantedBy=default.target",
        "",
        _SECTION,
        f"Folder={json.dumps(str(definition.folder))}",
    ]
    text = with_limits("\n".join([*lines, ""]), definition.limits)
    return set_lingering(text) if features.has_set_lingering else text


def _restart_limits(version: int) -> list[str]:
    """With delays that grow it is never given up, else after half an hour or so of nothing but failures."""
    if version >= _GROWING_DELAY_SINCE:
        return ["StartLimitIntervalSec=0"]
    return ["StartLimitIntervalSec=1h", "StartLimitBurst=30"]


def _restart_delay(version: int) -> list[str]:
    delay = [f"RestartSec={FAILED_RESTART_S}"]
    return [*delay, "RestartSteps=6", "RestartMaxDelaySec=15min"] if version >= _GROWING_DELAY_SINCE else delay


def _hardening(definition: ServiceDefinition, features: UnitFeatures) -> list[str]:
    lines = ["NoNewPrivileges=yes", "RestrictSUIDSGID=yes", "RestrictRealtime=yes", "LockPersonality=yes"]
    lines += ["SystemCallArchitectures=native"]
    if features.has_sandbox:
        places = [definition.folder, *definition.writable]
        # Of everything "strict" makes read-only it leaves out the home folders.
        lines += [
            "ProtectSystem=strict",
            "ProtectHome=read-only",
            *(f"ReadWritePaths={_quoted(f'-{place}')}" for place in places),
        ]
    return lines


def with_limits(text: str, limits: ServiceLimits) -> str:
    """Return the unit with these limits in place of those that it has."""
    found = [line for line in text.split("\n") if line.partition("=")[0] not in _LIMIT_KEYS]
    lines = [f"MemoryMax={limits.fence_bytes}"] if limits.fence_bytes else []
    lines += [f"CPUWeight={limits.processor_weight}"] if limits.processor_weight < 100 else []
    lines += ["IOSchedulingClass=idle"] if limits.yields_disk else []
    place = next((n for n, line in enumerate(found) if line.startswith("KillMode=")), None)
    if place is None:  # a person has rewritten it
        return text
    place += 2  # after the time that it gets to end
    return "\n".join([*found[:place], *lines, *found[place:]])


def set_lingering(text: str) -> str:
    """Return the unit with the note that `install` made the system start this user's services at boot."""
    return text if has_set_lingering(text) else f"{text.rstrip(chr(10))}\n{_LINGERS}\n"


def has_set_lingering(text: str) -> bool:
    """Return whether the unit has that note."""
    return _LINGERS in text.split("\n")


def folder_of_unit(text: str) -> Path | None:
    """Return the folder of the peer that a unit starts; None if swarmtrain did not write the unit."""
    section = text.partition(f"\n{_SECTION}\n")[2]
    for line in section.split("\n"):
        if line.startswith("Folder="):
            with contextlib.suppress(ValueError):
                folder = json.loads(line.removeprefix("Folder="))
                return Path(folder) if isinstance(folder, str) else None
    return None


def _command_line(words: tuple[str, ...]) -> str:
    """Return the words as systemd reads them back.

    Variables are replaced in arguments and not in the program's path, so a path with `$` is an argument of env.
    """
    program, *arguments = words
    if "$" in program:
        program, *arguments = ("/usr/bin/env", *words)
    return " ".join([_quoted(program), *(_quoted(word).replace("$", "$$") for word in arguments)])


def _quoted(word: str) -> str:
    word = word.replace("%", "%%")
    if _SAFE.fullmatch(word):
        return word
    return '"' + word.replace("\\", "\\\\").replace('"', '\\"') + '"'

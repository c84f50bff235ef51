"""systemd's manager of a user's own services, asked by `systemctl` and `loginctl`; no administrator is needed."""

from __future__ import annotations

import contextlib
import getpass
import re
import shutil
import stat
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from swarmtrain.errors import RunTimeError
from swarmtrain.network.files import write_atomically
from swarmtrain.peer.service.definition import PREFIX, ServiceDefinition, ServiceLimits, is_service_name
from swarmtrain.peer.service.state import Ask, InstalledService, ServicePhase, ServiceState, run_command
from swarmtrain.peer.service.systemd_unit import (
    UnitFeatures,
    folder_of_unit,
    has_set_lingering,
    set_lingering,
    unit_text,
    with_limits,
)

__all__ = ["BOOTED", "Systemd"]

BOOTED = Path("/run/systemd/system")
"""Folder that is there if systemd runs this machine."""
_LINGERING = Path("/var/lib/systemd/linger")
_CARDS = Path("/proc/driver/nvidia/gpus")
_OWNER_ONLY = 0o600
_TRIED = ("ProtectSystem=strict", "ProtectHome=read-only", "ReadWritePaths=-/tmp", "NoNewPrivileges=yes")


@dataclass
class Systemd:
    """systemd's manager of the user's own services."""

    units: Path = field(default_factory=lambda: Path.home() / ".config" / "systemd" / "user")
    ask: Ask = run_command
    user: str = field(default_factory=getpass.getuser)
    lingering: Path = _LINGERING

    def installed(self) -> list[InstalledService]:
        """List the units that swarmtrain wrote."""
        found = []
        for path in sorted(self.units.glob(f"{PREFIX}*.service")):
            with contextlib.suppress(OSError, UnicodeDecodeError):
                folder = folder_of_unit(path.read_text(encoding="utf-8"))
                if folder is not None and is_service_name(path.stem):
                    found.append(InstalledService(name=path.stem, path=path, folder=folder))
        return found

    def content(self, definition: ServiceDefinition) -> bytes:
        """Return the unit."""
        path = self._path(definition.name)
        before = path.read_text(encoding="utf-8") if path.exists() else ""
        return unit_text(definition, self._features(definition, has_set_lingering(before))).encode()

    def _path(self, name: str) -> Path:
        return self.units / f"{name}.service"

    def _features(self, definition: ServiceDefinition, has_set: bool) -> UnitFeatures:
        version = re.search(r"systemd (\d+)", self.ask(["systemctl", "--version"]).out)
        return UnitFeatures(
            version=int(version[1]) if version else UnitFeatures.version,
            has_sandbox=self._has_sandbox(),
            before=_creates_devices() if definition.gives_way else (),
            has_set_lingering=has_set,
        )

    def _has_sandbox(self) -> bool:
        """Try whether a user's unit may get a view of the file system of its own; where no systemd runs, it may."""
        words = [word for each in _TRIED for word in ("-p", each)]
        trial = ["systemd-run", "--user", "--quiet", "--wait", "--collect", *words, "/bin/true"]
        return not BOOTED.is_dir() or self.ask(trial).code == 0

    def install(self, definition: ServiceDefinition) -> list[str]:
        """Write the unit, enable it, and have this user's services started at boot."""
        path, content = self._path(definition.name), self.content(definition)
        self.units.mkdir(parents=True, exist_ok=True)
        if not path.exists() or path.read_bytes() != content:
            write_atomically(path, content, mode=_OWNER_ONLY)
        self._systemctl("daemon-reload")
        self._systemctl("enable", "--quiet", path.name)
        told = [] if b"\nProtectSystem=" in content else [
            "this system gives a user's services no view of the file system of their own: nothing but this user's "
            "rights bounds where the peer can write"
        ]  # fmt: skip
        if self._lingers():
            return told
        answer = self.ask(["loginctl", "--no-ask-password", "enable-linger", self.user])
        if answer.code:
            return [*told, f"it starts when you log in; to start it at boot: sudo loginctl enable-linger {self.user}"]
        write_atomically(path, set_lingering(content.decode()).encode(), mode=_OWNER_ONLY)
        self._systemctl("daemon-reload")
        return told

    def _lingers(self) -> bool:
        """Return whether the user's services run without the user being logged in."""
        return (self.lingering / self.user).exists()

    def start(self, name: str) -> None:
        """Start the unit now, also if it was given up."""
        self.ask(["systemctl", "--user", "reset-failed", f"{name}.service"])
        self._systemctl("start", f"{name}.service")

    def _systemctl(self, *words: str) -> None:
        answer = self.ask(["systemctl", "--user", *words])
        if answer.code:
            raise RunTimeError(
                f"`systemctl --user {' '.join(words)}` was refused: {answer.reason}; `swarmtrain service status` says "
                "what there is now",
                code="service-refused",
            )

    def state(self, name: str) -> ServiceState:
        """Return what the unit does now."""
        answer = self.ask(["systemctl", "--user", "show", f"--property={','.join(_SHOWN)}", f"{name}.service"])
        if answer.code:
            raise RunTimeError(f"systemd does not tell of {name}: {answer.reason}; try again", code="service-refused")
        told = dict(line.partition("=")[::2] for line in answer.out.splitlines())
        return _state_of_unit(told, time.time() - time.monotonic(), starts_at_boot=self._lingers())

    def remove(self, service: InstalledService) -> list[str]:
        """Stop, disable and remove the unit; stop starting this user's services at boot if `install` began that."""
        unit = service.path.name
        had_set = has_set_lingering(service.path.read_text(encoding="utf-8"))
        self._systemctl("disable", "--now", "--quiet", unit)
        service.path.unlink(missing_ok=True)
        self._systemctl("daemon-reload")
        self.ask(["systemctl", "--user", "reset-failed", unit])  # fails if it did not fail
        additions = self.units / f"{unit}.d"  # of `systemctl edit`: a person's own
        told = [f"your own additions stay in {additions}"] if additions.is_dir() else []
        return [*told, *(self._end_lingering() if had_set and self._lingers() else [])]

    def _end_lingering(self) -> list[str]:
        """Stop starting this user's services at boot, unless others need it by now."""
        undo = f"loginctl disable-linger {self.user}"
        if next((self.units / "default.target.wants").glob("*"), None) is not None:
            return [f"your other services are still started at boot, which `install` began; `{undo}` ends that"]
        self.ask(["loginctl", "--no-ask-password", "disable-linger", self.user])
        return ["your services are no longer started at boot, as before `install`"]

    def log_command(self, name: str) -> str:
        """Return journalctl's command."""
        return f"journalctl --user-unit {name}.service -f"

    def start_command(self, name: str) -> str:
        """Return systemctl's command."""
        return f"systemctl --user start {name}.service"

    def variable_advice(self, name: str, variable: str) -> str:
        """Name systemctl's command, and what to write."""
        return f"`systemctl --user edit {name}.service`, with the lines [Service] and Environment={variable}=..."

    def keep_limits(self, folder: Path, limits: ServiceLimits) -> None:
        """Write these limits into the unit that starts the peer in `folder`, if there is one, and apply them now."""
        for service in self.installed():
            if service.folder.absolute() == folder.absolute():
                before = service.path.read_text(encoding="utf-8")
                if (after := with_limits(before, limits)) != before:
                    write_atomically(service.path, after.encode(), mode=_OWNER_ONLY)
                    self._systemctl("daemon-reload")


_SHOWN = (
    *("ActiveState", "SubState", "Result", "UnitFileState", "MainPID", "NRestarts"),
    *("ExecMainCode", "ExecMainStatus", "ExecMainExitTimestampMonotonic", "StateChangeTimestampMonotonic"),
)
_PHASES = {
    "active": ServicePhase.RUNNING,
    "activating": ServicePhase.STARTING,
    "reloading": ServicePhase.RUNNING,
    "deactivating": ServicePhase.STOPPING,
    "failed": ServicePhase.FAILED,
}
_WHY = {
    "oom-kill": " (it used too much memory)",
    "start-limit-hit": " (it failed too often)",
    "timeout": " (it took too long to end)",
}
"""What a unit's `Result` adds to how its process ended."""
_EXITED = "1"
"""`ExecMainCode` of a process that ended by itself, of CLD_EXITED."""


def _state_of_unit(told: Mapping[str, str], epoch: float, *, starts_at_boot: bool) -> ServiceState:
    """Return the state that the unit's properties tell; `epoch` is the Unix time of the monotonic clock's zero."""

    def number(name: str) -> int:
        return int(told.get(name) or 0) if (told.get(name) or "0").isdigit() else 0

    has_exited = bool(number("ExecMainExitTimestampMonotonic"))
    status, by_itself = number("ExecMainStatus"), told.get("ExecMainCode") == _EXITED
    phase = _PHASES.get(told.get("ActiveState", ""))
    if told.get("SubState") == "auto-restart":
        phase = ServicePhase.WAITING
    if phase is None:
        phase = ServicePhase.ENDED if has_exited else ServicePhase.NOT_STARTED
    last_exit = ""
    if has_exited:
        last_exit = f"code {status}" if by_itself else f"killed by signal {status}"
        last_exit += _WHY.get(told.get("Result", ""), "")
    changed = number("StateChangeTimestampMonotonic")
    return ServiceState(
        phase=phase,
        is_enabled=told.get("UnitFileState", "").startswith("enabled"),
        starts_at_boot=starts_at_boot,
        pid=number("MainPID"),
        since=epoch + changed / 1e6 if changed else None,
        restarts=number("NRestarts"),
        last_exit=last_exit,
        exit_code=status if has_exited and by_itself else None,
    )


def _creates_devices() -> tuple[str, ...]:
    """Return the command that creates the devices of NVIDIA's cards after a reboot; empty if nothing is needed.

    Some systems leave that to the first program that uses a card: its driver calls a helper with the rights of an
    administrator, which a unit with `NoNewPrivileges` cannot. So systemd is asked to run the helper beside it.
    """
    helper = shutil.which("nvidia-modprobe")
    if helper is None or not _CARDS.is_dir() or not Path(helper).stat().st_mode & stat.S_ISUID:
        return ()
    numbers = [word for number in range(len(list(_CARDS.iterdir()))) for word in ("-c", str(number))]
    runs = shutil.which("systemd-run") or "/usr/bin/systemd-run"
    return (runs, "--user", "--quiet", "--wait", "--collect", helper, "-u", *numbers)

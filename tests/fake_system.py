"""Fake systemd and loginctl of one user: they record what they are asked, and behave as far as services need it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from swarmtrain.peer.service.state import Answer
from swarmtrain.peer.service.systemd import Systemd

__all__ = ["FakeSystem"]


@dataclass
class FakeSystem:
    """Machine with one user, anna, whose folders are below `home`."""

    home: Path
    may_linger: bool = True
    has_sandbox: bool = True
    refuses: str = ""
    """Word of `systemctl` that is refused."""
    asked: list[str] = field(default_factory=list)
    loaded: dict[str, str] = field(default_factory=dict)
    """Text of each unit, as it was when the manager last read it."""
    told: dict[str, dict[str, str]] = field(default_factory=dict)
    """Properties of units, besides those that follow from what was asked."""
    started: list[str] = field(default_factory=list)
    on_start: Callable[[str], object] = lambda unit: None

    def manager(self) -> Systemd:
        """Return the manager that asks this system."""
        (self.home / "linger").mkdir(parents=True, exist_ok=True)
        return Systemd(units=self.units, ask=self.ask, user="anna", lingering=self.home / "linger")

    @property
    def units(self) -> Path:
        """Folder of the user's units."""
        return self.home / ".config" / "systemd" / "user"

    def ask(self, words: Sequence[str]) -> Answer:
        """Do what the command would do."""
        self.asked.append(" ".join(words))
        program, *rest = words
        if program == "loginctl":
            return self._linger(rest[1])
        if program == "systemd-run":
            return Answer(0 if self.has_sandbox else 226)
        if rest == ["--version"]:
            return Answer(0, "systemd 257 (257.13-1~deb13u1)\n+PAM\n")
        assert program == "systemctl" and rest[0] == "--user", words
        verb, *more = [word for word in rest[1:] if word != "--quiet"]
        if verb == self.refuses:
            return Answer(1, err="Failed to do it: Connection\nrefused\n")
        return getattr(self, f"_{verb.replace('-', '_')}")(*more)  # type: ignore[no-any-return]

    def _linger(self, verb: str) -> Answer:
        if not self.may_linger:
            return Answer(1, err="Could not enable linger: Interactive authentication required.\n")
        mark = self.home / "linger" / "anna"
        mark.touch() if verb == "enable-linger" else mark.unlink()
        return Answer(0)

    def _daemon_reload(self) -> Answer:
        self.loaded = {path.name: path.read_text() for path in self.units.glob("*.service")}
        return Answer(0)

    def _enable(self, unit: str) -> Answer:
        wants = self.units / "default.target.wants"
        wants.mkdir(exist_ok=True)
        (wants / unit).unlink(missing_ok=True)
        (wants / unit).symlink_to(self.units / unit)
        return Answer(0)

    def _disable(self, now: str, unit: str) -> Answer:
        assert now == "--now"
        (self.units / "default.target.wants" / unit).unlink(missing_ok=True)
        self.told.pop(unit, None)
        return Answer(0)

    def _reset_failed(self, unit: str) -> Answer:
        return Answer(1, err=f"Failed to reset failed state of unit {unit}: Unit {unit} not loaded.\n")

    def _start(self, unit: str) -> Answer:
        assert unit in self.loaded, "the manager has not read it"
        self.started.append(unit)
        self.told.setdefault(unit, {"ActiveState": "active", "SubState": "running", "MainPID": str(os.getpid())})
        self.on_start(unit)
        return Answer(0)

    def _show(self, wanted: str, unit: str) -> Answer:
        is_enabled = (self.units / "default.target.wants" / unit).is_symlink()
        ago_us = int((time.monotonic() - 90) * 1e6)
        found = {
            "ActiveState": "inactive",
            "SubState": "dead",
            "Result": "success",
            "UnitFileState": "enabled" if is_enabled else "disabled",
            "MainPID": "0",
            "NRestarts": "0",
            "ExecMainCode": "0",
            "ExecMainStatus": "0",
            "ExecMainExitTimestampMonotonic": "0",
            "StateChangeTimestampMonotonic": str(ago_us),
        }
        found |= self.told.get(unit, {})
        assert set(wanted.removeprefix("--property=").split(",")) == set(found)
        return Answer(0, "".join(f"{name}={value}\n" for name, value in found.items()))

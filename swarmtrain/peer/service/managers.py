"""The systems that start services for a user: systemd on Linux, launchd on macOS; and which one is here."""

from __future__ import annotations

import platform
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from swarmtrain.errors import SwarmtrainError, UserError
from swarmtrain.peer.service.definition import ServiceDefinition, service_limits
from swarmtrain.peer.service.launchd import Launchd
from swarmtrain.peer.service.state import Ask, InstalledService, ServiceState, run_command
from swarmtrain.peer.service.systemd import BOOTED, Systemd

__all__ = ["ServiceManager", "keep_service_limits", "service_files", "service_manager", "service_of"]

_CONTAINER_FILES = (Path("/.dockerenv"), Path("/run/.containerenv"))


class ServiceManager(Protocol):
    """System that starts services. Its calls raise RunTimeError if the system refuses."""

    def installed(self) -> list[InstalledService]:
        """List the services of swarmtrain."""

    def content(self, definition: ServiceDefinition) -> bytes:
        """Return the file that `install` would write."""

    def install(self, definition: ServiceDefinition) -> list[str]:
        """Write the service's file and have it started from now on; return sentences for the person."""

    def start(self, name: str) -> None:
        """Start it now."""

    def state(self, name: str) -> ServiceState:
        """Return what it does now."""

    def remove(self, service: InstalledService) -> list[str]:
        """End it, and remove all that `install` did; return sentences for the person."""

    def log_command(self, name: str) -> str:
        """Return the command that shows what it printed."""

    def start_command(self, name: str) -> str:
        """Return the command that starts it now."""

    def variable_advice(self, name: str, variable: str) -> str:
        """Say how a person gives it one more environment variable."""


def service_files() -> ServiceManager:
    """Return the system that this operating system would start services with, whether or not it can be used here: only
    for what needs no answer of it."""
    return Launchd() if sys.platform == "darwin" else Systemd()


def service_of(folder: Path) -> InstalledService | None:
    """Return the service that starts the peer in `folder`; None without one."""
    wanted = folder.absolute()
    return next((service for service in service_files().installed() if service.folder == wanted), None)


def keep_service_limits(folder: Path, options: Mapping[str, tuple[str, ...]]) -> str:
    """Have the service of the peer in `folder`, if there is one, keep the limits among these options of the folder.

    Return a line for the person if that failed, else nothing: the peer itself keeps its limits all the same.
    """
    files = service_files()
    try:
        if isinstance(files, Systemd):
            files.keep_limits(folder, service_limits(options))
    except (OSError, SwarmtrainError) as error:
        again = f"swarmtrain service install --dir {shlex.quote(str(folder))}"
        return f"the service keeps the limits that it had, since its unit cannot be changed: {error}; try `{again}`"
    return ""


def service_manager(command: str, ask: Ask = run_command) -> ServiceManager:
    """Return the system that starts services here.

    Raises UserError if there is none, which says what to do instead; `command` is the command line that starts the
    peer.
    """
    if sys.platform == "darwin":
        return Launchd(ask=ask)
    if reason := _missing(command, ask):
        raise UserError(reason, code="no-service-manager")
    return Systemd(ask=ask)


def _missing(command: str, ask: Ask) -> str:
    """Return why systemd cannot start a user's services here, and what to do instead; empty if it can."""
    if not sys.platform.startswith("linux"):
        return f"there is neither systemd nor launchd here: have this system's own scheduler run `{command}` at boot"
    if not BOOTED.is_dir():
        if "microsoft" in platform.release().lower():
            return (
                "this WSL runs without systemd: put `[boot]` and `systemd=true` on two lines of /etc/wsl.conf, type "
                "`wsl --shutdown` in Windows, and then this again"
            )
        if any(path.exists() for path in _CONTAINER_FILES):
            return "in a container its engine starts the peer again: run it with `--restart on-failure`, without this"
        return f"this system does not run systemd: have it run `{command}` at boot, such as after @reboot in a crontab"
    answer = ask(["systemctl", "--user", "show-environment"])
    if answer.code:
        return (
            f"systemd's services of this user do not answer ({answer.reason}): log in as this user itself, at a screen "
            "or by ssh and not by su or sudo, and type this again"
        )
    return ""

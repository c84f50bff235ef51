"""launchd's manager of a user's own agents on macOS, asked by `launchctl`."""

from __future__ import annotations

import contextlib
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from swarmtrain.errors import RunTimeError
from swarmtrain.network.files import write_atomically
from swarmtrain.peer.service.definition import PREFIX, ServiceDefinition, is_service_name
from swarmtrain.peer.service.launchd_agent import agent_bytes, folder_of_agent
from swarmtrain.peer.service.state import Ask, InstalledService, ServicePhase, ServiceState, run_command

__all__ = ["Launchd"]

_OWNER_ONLY = 0o600


@dataclass
class Launchd:
    """launchd's manager of the user's own agents. Nobody has tried it on a Mac yet."""

    agents: Path = field(default_factory=lambda: Path.home() / "Library" / "LaunchAgents")
    logs: Path = field(default_factory=lambda: Path.home() / "Library" / "Logs")
    ask: Ask = run_command
    uid: int = field(default_factory=os.getuid)

    def installed(self) -> list[InstalledService]:
        """List the agents that swarmtrain wrote."""
        found = []
        for path in sorted(self.agents.glob(f"{PREFIX}*.plist")):
            with contextlib.suppress(OSError):
                folder = folder_of_agent(path.read_bytes())
                if folder is not None and is_service_name(path.stem):
                    found.append(InstalledService(name=path.stem, path=path, folder=folder))
        return found

    def content(self, definition: ServiceDefinition) -> bytes:
        """Return the agent."""
        return agent_bytes(definition, self._log(definition.name))

    def _log(self, name: str) -> Path:
        return self.logs / f"{name}.log"

    def install(self, definition: ServiceDefinition) -> list[str]:
        """Write the agent and its log, which only this user can read."""
        for folder in (self.agents, self.logs):
            folder.mkdir(parents=True, exist_ok=True)
        self._log(definition.name).touch(mode=_OWNER_ONLY)
        write_atomically(self.agents / f"{definition.name}.plist", self.content(definition), mode=_OWNER_ONLY)
        return ["it starts when you log in; macOS starts nothing of a user before that"]

    def start(self, name: str) -> None:
        """Load the agent anew, which starts it."""
        self.ask(["launchctl", "bootout", self._target(name)])  # fails if it was not loaded
        answer = self.ask(["launchctl", "bootstrap", f"gui/{self.uid}", str(self.agents / f"{name}.plist")])
        if answer.code:
            raise RunTimeError(
                f"launchd does not start {name}: {answer.reason}; log in at the screen of this Mac and type it again",
                code="service-refused",
            )

    def _target(self, name: str) -> str:
        return f"gui/{self.uid}/{name}"

    def state(self, name: str) -> ServiceState:
        """Return what the agent does now."""
        answer = self.ask(["launchctl", "print", self._target(name)])
        return _state_of_agent(answer.out if not answer.code else "")

    def remove(self, service: InstalledService) -> list[str]:
        """End and unload the agent, and remove it and its log."""
        self.ask(["launchctl", "bootout", self._target(service.name)])  # fails if it was not loaded
        service.path.unlink(missing_ok=True)
        self._log(service.name).unlink(missing_ok=True)
        return []

    def log_command(self, name: str) -> str:
        """Return the command that follows the log."""
        return f"tail -f ~/Library/Logs/{name}.log"

    def start_command(self, name: str) -> str:
        """Return launchctl's command."""
        return f"launchctl kickstart {self._target(name)}"

    def variable_advice(self, name: str, variable: str) -> str:
        """Name the agent's file."""
        return f"add {variable} to EnvironmentVariables in {self.agents / f'{name}.plist'}"


def _state_of_agent(printed: str) -> ServiceState:
    """Return the state that `launchctl print` tells; an agent that is not loaded prints nothing."""
    found = dict(re.findall(r"^\t([a-z ]+) = (.*)$", printed, re.MULTILINE))
    code = re.match(r"\d+", found.get("last exit code", ""))
    exit_code = int(code[0]) if code else None
    if found.get("state") == "running":
        phase = ServicePhase.RUNNING
    elif exit_code is None:
        phase = ServicePhase.NOT_STARTED
    else:
        phase = ServicePhase.ENDED if exit_code == 0 else ServicePhase.WAITING
    runs = found.get("runs", "0")
    return ServiceState(
        phase=phase,
        is_enabled=bool(printed),
        starts_at_boot=False,
        pid=int(found["pid"]) if found.get("pid", "").isdigit() else 0,
        restarts=max(0, int(runs) - 1) if runs.isdigit() else 0,
        last_exit="" if exit_code is None else f"code {exit_code}",
        exit_code=exit_code,
    )

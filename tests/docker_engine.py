"""Docker for the tests: commands, separate compose projects, and waiting for them."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
IMAGE = "swarmtrain-test"
BUILD_S = 1200.0
"""Time limit for building an image with torch on a slow link; two minutes on a quick one."""
_COMMAND_S = 120.0
"""Time limit for other commands, which take a second unless the machine is busy."""
_LOOK_EVERY_S = 1.0
"""Seconds between checks: each starts several interpreters in containers."""
_SETTINGS = {"SWARMTRAIN_IMAGE": IMAGE, "SWARMTRAIN_PORT": "0", "PROMETHEUS_PORT": "0"}


def docker(*arguments: str, limit_s: float = _COMMAND_S, given: str | None = None, **settings: str) -> str:
    """Run a docker command with input `given`; returns its output. AssertionError with its error output if it fails."""
    done = subprocess.run(
        ["docker", *arguments],
        cwd=ROOT,
        env=os.environ | _SETTINGS | settings,
        input=given,
        capture_output=True,
        text=True,
        timeout=limit_s,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def docker_logs(container: str) -> str:
    """Return all that a container has written to standard output and error."""
    done = subprocess.run(
        ["docker", "logs", container], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=_COMMAND_S
    )
    return done.stdout


def build() -> None:
    """Build the image of the code under test."""
    docker("build", "--quiet", "--tag", IMAGE, ".", limit_s=BUILD_S)


def status(container: str) -> dict[str, Any]:
    """Return what `swarmtrain status --json` says in a container."""
    told: dict[str, Any] = json.loads(docker("exec", container, "swarmtrain", "status", "--json"))
    return told


@dataclass
class Project:
    """Compose project."""

    files: tuple[str, ...] = ("compose.yaml",)
    settings: dict[str, str] = field(default_factory=dict)
    name: str = f"swarmtrain-test-{os.getpid()}"

    def compose(self, *arguments: str, limit_s: float = 180.0) -> str:
        """Run a compose command; returns its output."""
        files = [f"--file={name}" for name in self.files]
        return docker("compose", f"--project-name={self.name}", *files, *arguments, limit_s=limit_s, **self.settings)

    def up(self, *arguments: str) -> None:
        """Start it, and wait until all containers are healthy."""
        self.compose("up", "--detach", "--no-build", *arguments, "--wait", "--wait-timeout", "150")

    def down(self, timeout_s: int = 5) -> None:
        """Remove it with all its data."""
        self.compose("down", "--volumes", "--timeout", str(timeout_s))

    def containers(self) -> dict[str, dict[str, str]]:
        """Map each container's name to what compose says of it."""
        rows = [json.loads(line) for line in self.compose("ps", "--all", "--format", "json").splitlines()]
        return {row["Name"]: row for row in rows}

    def of_service(self, service: str) -> list[str]:
        """List the containers of a service."""
        return sorted(name for name, row in self.containers().items() if row["Service"] == service)

    def num_healthy(self) -> int:
        """Count the healthy containers."""
        return sum(row["Health"] == "healthy" for row in self.containers().values())

    def leftovers(self) -> list[str]:
        """List what is left of it."""
        label = f"label=com.docker.compose.project={self.name}"
        kinds = (("ps", "--all"), ("volume", "ls"), ("network", "ls"))
        return [line for kind in kinds for line in docker(*kind, "--quiet", "--filter", label).split()]

    def wait_until(self, holds: Callable[[], bool], what: str, limit_s: float) -> float:
        """Wait until `holds`; returns the seconds it took. Fails with the logs if it takes too long."""
        began_s = time.monotonic()
        while not holds():
            if time.monotonic() - began_s > limit_s:
                logs = self.compose("logs", "--tail", "30")[-6000:]
                pytest.fail(f"not in {limit_s:g} s: {what}\n{self.health()}\n{logs}\n{self.told()}")
            time.sleep(_LOOK_EVERY_S)
        return time.monotonic() - began_s

    def health(self) -> str:
        """Describe each container's state and last health checks, one line each."""
        lines = []
        for name in self.containers():
            state = json.loads(docker("inspect", "--format", "{{json .State}}", name))
            found = state.get("Health", {})
            checks = [f"{check['ExitCode']} {check['Output'].strip()[-200:]!r}" for check in found.get("Log", [])[-3:]]
            is_now = f"{state['Status']} since {state['StartedAt']}, {found.get('Status')}"
            lines.append(f"{name}: {is_now}: {'; '.join(checks)}")
        return "\n".join(lines)

    def told(self) -> str:
        """Return the ends of the running containers' logs, for the message of a failed test."""
        ends = []
        for name in (name for name, row in self.containers().items() if row["State"] == "running"):
            show = ["docker", "exec", name, "sh", "-c", "tail -n 40 /data/swarmtrain/*/peer.log"]
            done = subprocess.run(show, capture_output=True, text=True, timeout=_COMMAND_S)
            ends.append(f"{name}:\n{done.stdout[-4000:]}")
        return "\n".join(ends)

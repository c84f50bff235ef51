"""Property list of a launchd agent of macOS, and what one that was written before says. Pure.

launchd starts a job again whatever code it failed with. So the peer is told by an environment variable to end with code
0 where a person has to change something (`swarmtrain/cli/main.py`).
"""

from __future__ import annotations

import plistlib
from pathlib import Path
from typing import Any

from swarmtrain.peer.service.definition import FAILED_RESTART_S, STOP_S, ServiceDefinition

__all__ = ["UNDER_LAUNCHD", "agent_bytes", "folder_of_agent"]

UNDER_LAUNCHD = "SWARMTRAIN_UNDER_LAUNCHD"
"""Variable that launchd sets for a peer that it starts as a service."""


def agent_bytes(definition: ServiceDefinition, log: Path) -> bytes:
    """Return the agent that starts the peer when its user logs in, and again when it has failed or was killed.

    What it prints is appended to `log`. Niceness is left to the peer, which could not go below one that is set here.
    """
    agent: dict[str, Any] = {
        "Label": definition.name,
        "ProgramArguments": list(definition.command),
        "EnvironmentVariables": {**definition.environment, UNDER_LAUNCHD: "1"},
        "RunAtLoad": True,
        "KeepAlive": {"SuccessfulExit": False},
        "ThrottleInterval": FAILED_RESTART_S,
        "ExitTimeOut": STOP_S,
        "StandardOutPath": str(log),
        "StandardErrorPath": str(log),
    }
    if definition.limits.yields_disk:
        agent["LowPriorityIO"] = True
    return plistlib.dumps(agent, sort_keys=False)


def folder_of_agent(data: bytes) -> Path | None:
    """Return the folder of the peer that an agent starts; None if swarmtrain did not write the agent."""
    try:
        agent = plistlib.loads(data)
        words = agent["ProgramArguments"]
        if UNDER_LAUNCHD not in agent["EnvironmentVariables"]:
            return None
        return Path(words[words.index("--dir") + 1])
    except (plistlib.InvalidFileException, ValueError, KeyError, TypeError, IndexError, AttributeError):
        return None

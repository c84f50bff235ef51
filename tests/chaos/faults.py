"""Faults for the containers of a swarm: each takes the swarm and its victims."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from chaos import seen
from docker_engine import BUILD_S, IMAGE, Project, docker, status

_FIREWALL = "swarmtrain-test-firewall"
_NEXT = "swarmtrain-test-next"
_CLOCKED = "swarmtrain-test-clock"
_NEXT_VERSION = "99.0.0"
_UPGRADED_S = 400.0
"""Time limit for restarting all containers in turn until healthy: half a minute each."""
_ATTEMPTS = 5
"""Attempts to freeze a container; the second one usually works."""
_MOST_LOOKS, _FREED_S = 20, 0.2
"""Checks, and seconds between them: a killed process's memory is free within four seconds."""
_NEXT_DOCKERFILE = f"""
FROM {IMAGE}
USER root
RUN path=$(python -c 'import swarmtrain; print(swarmtrain.__file__)') \\
    && sed -i 's/^__version__ = .*/__version__ = "{_NEXT_VERSION}"/' $path
USER swarmtrain
"""


@dataclass
class Swarm(Project):
    """Compose project, and the volunteers that it began with."""

    all: list[str] = field(default_factory=list)
    logs: list[tuple[str, str]] = field(default_factory=list)
    """(container, its output) of deleted containers."""

    def keep_logs(self, *names: str) -> None:
        """Keep the logs of containers before they are deleted."""
        self.logs += [(name, seen.said(name)) for name in names]


Victims = Sequence[str]
Action = Callable[[Swarm, Victims], object]


def build_images(wanted: frozenset[str]) -> None:
    """Build the images needed besides the one under test."""
    docker("build", "--quiet", "--tag", _FIREWALL, "peers/firewall", limit_s=BUILD_S)
    if "upgrade" in wanted:
        docker("build", "--quiet", "--tag", _NEXT, "-", given=_NEXT_DOCKERFILE)
    if "move-clock" in wanted:
        dockerfile = "tests/chaos/clock.Dockerfile"
        docker("build", "--quiet", "--tag", _CLOCKED, "--file", dockerfile, "tests/chaos", limit_s=BUILD_S)


def _each(do: Callable[[str], object]) -> Action:
    """Return an action that does `do` to all victims at once."""

    def action(swarm: Swarm, victims: Victims) -> None:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(do, victims))

    return action


def _pause(victim: str) -> None:
    """Freeze a container, repeatedly if necessary.

    The freezer of version 1 control groups fails ("unable to freeze") while a process is being created or waits for a
    disk, which happens on a busy machine.
    """
    for attempt in range(_ATTEMPTS):
        try:
            docker("pause", victim)
        except AssertionError as error:
            if attempt == _ATTEMPTS - 1 or "unable to freeze" not in str(error):
                raise
        else:
            return


def _python(victim: str, code: str) -> None:
    docker("exec", victim, "python", "-c", code)


def _kill(victim: str) -> None:
    _python(victim, f"import os; os.kill({status(victim)['pid']}, 9)")


def _delete(swarm: Swarm, victims: Victims) -> None:
    swarm.keep_logs(*victims)
    _each(lambda victim: docker("rm", "--force", "--volumes", victim))(swarm, victims)


def _replace(swarm: Swarm, victims: Victims) -> None:
    swarm.compose("up", "--detach", "--no-build", "--no-recreate", f"--scale=volunteer={len(swarm.all)}", "volunteer")


def _upgrade(swarm: Swarm, victims: Victims) -> None:
    """Upgrade as a coordinator would: restart all from the new image, one after the other, on their volumes."""
    swarm.keep_logs(*swarm.containers())
    swarm.settings["SWARMTRAIN_IMAGE"] = _NEXT
    scale = f"--scale=volunteer={len(swarm.all)}"
    swarm.compose("--parallel=1", "up", "--detach", "--no-build", scale, limit_s=_UPGRADED_S)


def _all_are_upgraded(swarm: Swarm) -> str:
    old = [name for name in swarm.all if status(name)["version"] != _NEXT_VERSION]
    return f"not of the new version: {', '.join(old)}" if old else ""


def hidden_reach(swarm: Swarm) -> str:
    """Return what the hidden volunteer says about its reachability."""
    (hidden,) = swarm.of_service("unreachable")
    reach: str = status(hidden)["reach"]
    return reach


def hosts(swarm: Swarm) -> list[str]:
    """List the volunteers that host the hidden one."""
    reach = hidden_reach(swarm)
    found = [name for name in swarm.all if status(name)["peer"][-6:] in reach]
    assert found, f"the volunteer behind the firewall has no volunteer as its host: {reach}"
    return found


# ---------------------------------------------------------------- networks

_CHAINS = "add table inet chaos; add chain inet chaos {way} {{ type filter hook {way} priority 0; }}; "


def _rule(way: str, what: str) -> Callable[[str], object]:
    """Return an action that adds a rule to a container's packets of one direction."""
    chains = _CHAINS.format(way=way)
    return lambda victim: _nft(victim, f"{chains} add rule inet chaos {way} {what}")


def _nft(container: str, commands: str) -> None:
    """Run nft in a container's network, from outside, since the container lacks the privilege."""
    network = f"--network=container:{container}"
    docker("run", "--rm", network, "--cap-add=NET_ADMIN", "--entrypoint=nft", _FIREWALL, commands)


def _address(container: str) -> str:
    return docker("inspect", "--format={{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}", container).strip()


def _halve(swarm: Swarm, victims: Victims) -> None:
    """Partition the swarm: the victims on one side, all others and the bootstrap on the other."""
    others = [*(name for name in swarm.all if name not in victims), *swarm.of_service("bootstrap")]
    addresses = ", ".join(map(_address, others))
    for way, end in (("input", "saddr"), ("output", "daddr")):
        _each(_rule(way, f"ip {end} {{ {addresses} }} drop"))(swarm, victims)


# ---------------------------------------------------------------- computers


def _fill_disk(victim: str) -> None:
    _python(victim, _FILL)


_FILL = """
try:
    with open("/data/filler", "wb", buffering=0) as file:
        while True:
            file.write(bytes(65536))
except OSError:
    pass
"""


def _squeeze(victim: str) -> None:
    """Restart it with less memory than it needs: the system kills it at each start."""
    _kill(victim)
    for _ in range(_MOST_LOOKS):  # the killed process's memory must be free first
        with contextlib.suppress(AssertionError):
            docker("update", "--memory=64m", "--memory-swap=64m", victim)
            return
        time.sleep(_FREED_S)
    raise AssertionError(f"{victim} gave no memory back")


_SPOIL = """
import glob, os
paths = glob.glob("/data/swarmtrain/*/checkpoints/*")
assert paths, "there are no checkpoints yet"
for path in paths:
    open(path, "wb").write(os.urandom(4096))
"""


def _corrupt(victim: str) -> None:
    """Kill it, with noise in all its checkpoints."""
    _python(victim, _SPOIL)
    _kill(victim)


def _set_clock(victim: str, offset: str) -> None:
    docker("exec", victim, "sh", "-c", f"echo {offset} > /tmp/moved && mv /tmp/moved /tmp/clock")


ACTIONS: dict[str, Action] = {
    "kill": _each(_kill),
    "pause": _each(_pause),
    "unpause": _each(lambda victim: docker("unpause", victim)),
    "restart": _each(lambda victim: docker("restart", "--time", "30", victim)),
    "disconnect": lambda swarm, victims: [docker("network", "disconnect", f"{swarm.name}_default", v) for v in victims],
    "connect": lambda swarm, victims: [docker("network", "connect", f"{swarm.name}_default", v) for v in victims],
    "delete": _delete,
    "replace": _replace,
    "upgrade": _upgrade,
    "kill-bootstrap": lambda swarm, victims: docker("kill", *swarm.of_service("bootstrap")),
    "kill-container": _each(lambda victim: docker("kill", victim)),
    "drop-incoming": _each(_rule("input", "iif != lo drop")),
    "drop-outgoing": _each(_rule("output", "oif != lo drop")),
    "lose-30": _each(_rule("input", "iif != lo numgen random mod 100 < 30 drop")),
    "halve": _halve,
    "mend": _each(lambda victim: _nft(victim, "delete table inet chaos")),
    "fill-disk": _each(_fill_disk),
    "free-disk": _each(lambda victim: docker("exec", victim, "rm", "-f", "/data/filler")),
    "squeeze": _each(_squeeze),
    "unsqueeze": _each(lambda victim: docker("update", "--memory=4g", "--memory-swap=4g", victim)),
    "slow-cpu": _each(lambda victim: docker("update", "--cpus=0.05", victim)),
    "fast-cpu": _each(lambda victim: docker("update", "--cpus=2", victim)),
    "corrupt": _each(_corrupt),
    "move-clock": _each(lambda victim: _set_clock(victim, "+600")),
    "clock-back": _each(lambda victim: _set_clock(victim, "+0")),
}

CHECKS: dict[str, Callable[[Swarm], str]] = {"upgrade": _all_are_upgraded}
"""Checks some time after a fault; each returns a problem in words, or an empty string."""

"""Checks of `swarmtrain doctor` on this machine: small functions that each return a `Finding`.

A check takes what it judges as an argument, with the real thing as its default, so that tests can show that each fault
is found. Nothing here imports torch before it is asked to: a broken torch is one of the faults.
"""

from __future__ import annotations

import errno
import importlib
import ipaddress
import os
import platform
import re
import socket
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any, Literal

from swarmtrain.words import counted

Level = Literal["ok", "warning", "problem"]

MIN_PYTHON = (3, 11)
MIN_TORCH = (2, 4)
_SHARED_BY_PROVIDER = ipaddress.ip_network("100.64.0.0/10")


@dataclass(frozen=True)
class Finding:
    """Result of one check; `advice` says what to do unless the level is "ok"."""

    check: str
    level: Level
    found: str
    advice: str = ""


# ---------------------------------------------------------------- Python and torch


def check_python(
    version: tuple[int, ...] = tuple(sys.version_info[:3]),
    system: str = platform.system(),
    machine: str = platform.machine(),
) -> Finding:
    """Check the version of Python and the system below it."""
    found = f"{'.'.join(map(str, version))} on {system} {machine}"
    if version[:2] < MIN_PYTHON:
        wanted = ".".join(map(str, MIN_PYTHON))
        advice = f"make an environment with Python {wanted} or newer and install swarmtrain there"
        return Finding("python", "problem", f"{found}; {wanted} or newer is needed", advice)
    if system == "Windows":
        return Finding("python", "problem", found, "use WSL 2: install and run swarmtrain inside it")
    if system != "Linux":
        return Finding("python", "warning", f"{found}, where nothing was tested", "if something fails, try it on Linux")
    return Finding("python", "ok", found)


def check_torch(load: Callable[[str], Any] = importlib.import_module, cores: int | None = None) -> Finding:
    """Check whether torch can be imported, and what it would compute with."""
    try:
        torch = load("torch")
    except (ImportError, OSError, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        return Finding("torch", "problem", f"cannot be imported: {reason}", "install it again: pip install torch")
    version = str(torch.__version__)
    if tuple(int(number) for number in re.findall(r"\d+", version)[:2]) < MIN_TORCH:
        wanted = ".".join(map(str, MIN_TORCH))
        advice = "upgrade it: pip install --upgrade torch"
        return Finding("torch", "problem", f"{version}; {wanted} or newer is needed", advice)
    threads, cores = torch.get_num_threads(), cores or _usable_cores()
    instructions = torch.backends.cpu.get_cpu_capability()
    found = f"{version}, {threads} of {counted(cores, 'core')}, instructions {instructions}"
    if instructions == "DEFAULT" and platform.machine() in ("x86_64", "AMD64"):
        advice = "training will be slow here; on a virtual machine, let it see the host's processor"
        return Finding("torch", "warning", f"{found} (no AVX)", advice)
    return Finding("torch", "ok", found)


def _usable_cores() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on every system
        return os.cpu_count() or 1


def version_of(distribution: str) -> str:
    """Return the installed version of a distribution, or "missing"."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "missing"


# ---------------------------------------------------------------- ports and addresses


def check_ports(listen: Sequence[str], used_by: str = "") -> Finding:
    """Check whether this machine can listen at these multiaddresses; `used_by` names the peer running in the folder, if
    any.
    """
    free: list[str] = []
    for address in listen:
        match = re.fullmatch(r"/(ip4|ip6)/([^/]+)/tcp/([0-9]{1,5})", address)
        if match is None:
            advice = "write --listen HOST:PORT with an IP address of this machine"
            return Finding(
                "ports", "problem", f"cannot listen at {address}: it is not an IP address with a port", advice
            )
        try:
            _listen(match[1], match[2], int(match[3]))
        except OSError as error:
            if len(listen) > 1 and match[1] == "ip6" and error.errno in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
                continue  # the machine has no IPv6
            return _cannot_listen(address, error, used_by)
        free.append(address)
    ports = "any free port" if all(address.endswith("/tcp/0") for address in free) else "the port is free"
    return Finding("ports", "ok", f"can listen at {', '.join(free)}: {ports}")


def _listen(family: str, host: str, port: int) -> None:
    with socket.socket(socket.AF_INET6 if family == "ip6" else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # old connections on that port are no obstacle
        if family == "ip6":
            probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        probe.bind((host, port))
        probe.listen()


def _cannot_listen(address: str, error: OSError, used_by: str) -> Finding:
    if error.errno == errno.EADDRINUSE:
        who = f" by {used_by}" if used_by else ""
        advice = (
            "stop it first if this port is to be tested (swarmtrain leave)"
            if used_by
            else "another program, or another peer of yours, listens there: choose another port with --listen"
        )
        return Finding("ports", "problem", f"cannot listen at {address}: the port is taken{who}", advice)
    if error.errno in (errno.EACCES, errno.EPERM):
        return Finding(
            "ports", "problem", f"cannot listen at {address}: not allowed", "choose a port above 1023 with --listen"
        )
    if error.errno == errno.EADDRNOTAVAIL:
        advice = "listen at an address of this machine (:PORT is all of them), and give the router's with --announce"
        return Finding("ports", "problem", f"cannot listen at {address}: this machine has no such address", advice)
    advice = "choose another address with --listen"
    return Finding("ports", "problem", f"cannot listen at {address}: {error.strerror or error}", advice)


DiskPlace = Literal["loopback", "private", "provider", "public"]
"""Where an address can be reached from: this machine, its network, its provider's network (CGNAT), anywhere."""


def place_of(address: str) -> DiskPlace | None:
    """Return where an IP address can be reached from; None for link-local and multicast addresses."""
    try:
        host = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return None
    if host.is_loopback:
        return "loopback"
    if host.is_link_local or host.is_multicast or host.is_unspecified:
        return None
    if host.version == 4 and host in _SHARED_BY_PROVIDER:
        return "provider"
    return "public" if host.is_global else "private"


def check_addresses(addresses: Iterable[str]) -> Finding:
    """Check which of this machine's own addresses others could dial."""
    by_place: dict[DiskPlace | None, list[str]] = {}
    for address in addresses:
        by_place.setdefault(place_of(address), []).append(address.partition("%")[0])
    public = by_place.get("public", [])
    inside = [*by_place.get("private", []), *by_place.get("provider", [])]
    if public:
        return Finding("addresses", "ok", f"public: {', '.join(public[:4])}" + (", and private ones" if inside else ""))
    if not inside:
        advice = "only peers on this machine can be met: connect it to a network"
        return Finding("addresses", "warning", "loopback only: this machine has no network", advice)
    found = f"private only: {', '.join(inside[:4])}; peers elsewhere see the router's"
    return Finding("addresses", "ok", found)


# ---------------------------------------------------------------- power


def check_power(on_battery: bool | None) -> list[Finding]:
    """Judge a machine that runs on battery; returns nothing about one without a battery."""
    if on_battery is None:
        return []
    if not on_battery:
        return [Finding("power", "ok", "this machine has a battery and runs on mains power")]
    found = "this machine runs on battery, on which training pauses"
    return [Finding("power", "warning", found, "plug it in, or join with --on-battery")]

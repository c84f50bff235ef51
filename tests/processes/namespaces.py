"""Separate machines for peers: network namespaces on one bridge, some of which nobody can dial.

Needs root and `ip`. A hidden machine drops what arrives for the port that its peer listens at, like a router that lets
nothing in; connections that it opens work both ways. libp2p would also dial *from* that port and get no answer, so
there port reuse is switched off.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

PORT = 31337
_COMMAND_S = 30.0
"""Time limit for `ip`, which takes milliseconds."""
_TAG = f"st{os.getpid() % 100_000}"


def why_not() -> str:
    """Say why namespaces cannot be made here; empty if they can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "there is no `ip` command"
    try:
        with machines(["probe"], hidden=["probe"]):
            return ""
    except subprocess.CalledProcessError as error:
        return f"no network namespaces here: {error.stderr.decode(errors='replace').strip()}"


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=_COMMAND_S)


@contextmanager
def machines(names: Sequence[str], *, hidden: Sequence[str] = ()) -> Iterator[dict[str, list[str]]]:
    """Make a machine for each name; yields the words that run a command on it."""
    hub = f"{_TAG}-hub"  # also a namespace: with Docker, its firewall drops traffic over bridges outside
    spaces = {name: f"{_TAG}-{name}" for name in names}
    try:
        _ip("netns", "add", hub)
        _ip("-n", hub, "link", "add", "bridge", "type", "bridge")
        _ip("-n", hub, "link", "set", "bridge", "up")
        for number, (name, space) in enumerate(spaces.items(), start=1):
            _add(space, hub, f"v{number}", f"10.77.{os.getpid() % 250}.{number}/24")
            if name in hidden:
                arriving = ["iif", "e0", "ipproto", "tcp", "dport", str(PORT)]
                _ip("-n", space, "rule", "add", "pref", "5", *arriving, "blackhole")
                _ip("-n", space, "rule", "add", "pref", "10", "lookup", "local")
                _ip("-n", space, "rule", "del", "pref", "0", "lookup", "local")
        ip, quiet = shutil.which("ip") or "ip", ["env", "LIBP2P_TCP_REUSEPORT=false"]
        yield {name: [ip, "netns", "exec", space, *(quiet if name in hidden else [])] for name, space in spaces.items()}
    finally:
        for space in (*spaces.values(), hub):
            with suppress(subprocess.SubprocessError):
                _ip("netns", "del", space)


def _add(space: str, hub: str, outside: str, address: str) -> None:
    _ip("netns", "add", space)
    _ip("-n", hub, "link", "add", outside, "type", "veth", "peer", "name", "e0", "netns", space)
    _ip("-n", hub, "link", "set", outside, "master", "bridge", "up")
    _ip("-n", space, "link", "set", "lo", "up")
    _ip("-n", space, "addr", "add", address, "dev", "e0")
    _ip("-n", space, "link", "set", "e0", "up")

"""Machines of their own for peers: network namespaces on one bridge, some of which nobody can dial.

Needs root and `ip`. A hidden machine throws away what arrives for the port that its peer listens at, as a router does
that lets nothing in; what it opens itself works both ways. libp2p would dial *from* that port too, and hear no answer,
so there it is told not to.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

PORT = 31337
_COMMAND_S = 30.0
"""Of `ip`, which takes milliseconds."""
_TAG = f"st{os.getpid() % 100_000}"


def why_not() -> str:
    """Why there can be none here; empty if there can."""
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
    """For each name the words that run a command on its machine."""
    hub = f"{_TAG}-hub"  # a space too: where Docker runs, its firewall drops what passes bridges outside
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

"""Explain why a peer cannot listen where it was told to, by binding a socket of our own: the daemon does not say."""

from __future__ import annotations

import errno
import ipaddress
import re
import socket
from collections.abc import Collection, Mapping, Sequence

import psutil

from swarmtrain.errors import RunTimeError

_MAX_SHOWN = 4
_FOREIGN = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
_FORBIDDEN = (errno.EACCES, errno.EPERM)


def check_addresses(listen: Sequence[str], others: Mapping[str, str]) -> None:
    """Raise RunTimeError if a peer cannot listen at these multiaddresses, or, by option, at one of these HOST:PORT.

    Asked before anything is written: a peer that cannot start leaves no trace.
    """
    if any(map(is_taken, listen)) or (listen and all(map(_errno_of, listen))):
        raise cannot_listen(listen)
    for option, address in others.items():
        host, _, port = address.rpartition(":")
        host = {"": "127.0.0.1", "localhost": "127.0.0.1"}.get(host, host.strip("[]"))
        if is_taken(f"/ip{6 if ':' in host else 4}/{host}/tcp/{port}"):
            raise port_taken(address, option)


def port_taken(where: str, option: str) -> RunTimeError:
    """Return the error of an address at which somebody listens already."""
    return RunTimeError(f"cannot listen at {where}: the port is taken; choose another with {option}", code="port-taken")


def is_taken(address: str) -> bool:
    """Return whether a process listens at this multiaddress already.

    Two daemons of one user would not notice: libp2p asks the system to share the port, and each connection then goes to
    one of them at random.
    """
    match = re.search(r"/tcp/([1-9][0-9]*)", address)
    return match is not None and _errno_of(address) == errno.EADDRINUSE  # the daemon reports any other error


def cannot_listen(listen: Sequence[str]) -> RunTimeError:
    """Return the error that explains why the daemon could listen at none of these multiaddresses."""
    where = ", ".join(listen)
    found = {address: _errno_of(address) for address in listen}
    foreign = [address for address, number in found.items() if number in _FOREIGN]
    if foreign and errno.EADDRINUSE not in found.values():
        _, _, host, _, port = foreign[0].split("/")[:5]
        shown = f"[{host}]" if ":" in host else host
        return RunTimeError(
            f"cannot listen at {where}: {host} does not belong to this machine, which has {_own_in_words()}; if it is "
            f"the router's, give --listen :{port} --announce {shown}:{port}",
            code="address-elsewhere",
        )
    if any(number in _FORBIDDEN for number in found.values()):
        return RunTimeError(
            f"cannot listen at {where}: the system does not allow it; choose a port above 1023 with --listen",
            code="port-forbidden",
        )
    named = any(not address.startswith(("/ip4/", "/ip6/")) for address in listen)
    if named and errno.EADDRINUSE not in found.values():
        return RunTimeError(
            f"cannot listen at {where}: a host's name is not an IP address; give one with --listen, or :PORT for all "
            "of this machine's",
            code="address-not-an-ip",
        )
    return port_taken(where, "--listen")


def is_own_host(host: str, names: Collection[str]) -> bool:
    """Return whether the `Host` of an HTTP request is one of `names`, in lower case, or any address: only a name can be
    made to lead here (DNS rebinding)."""
    name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
    if name.lower().rstrip(".") in names:
        return True
    try:
        ipaddress.ip_address(name.removeprefix("[").removesuffix("]"))
    except ValueError:
        return False
    return True


def own_addresses() -> list[str]:
    """Return the IP addresses of this machine's network interfaces."""
    families = (socket.AF_INET, socket.AF_INET6)
    return [item.address for items in psutil.net_if_addrs().values() for item in items if item.family in families]


def _own_in_words() -> str:
    """Return in words the addresses at which a person may want to listen; no link-local ones, loopback last."""
    found = [ipaddress.ip_address(address.partition("%")[0]) for address in own_addresses()]
    usable = [address for address in found if not address.is_link_local]
    usable.sort(key=lambda address: address.is_loopback)
    more = len(usable) - _MAX_SHOWN
    return ", ".join(map(str, usable[:_MAX_SHOWN])) + (f" and {more} more" if more > 0 else "") or "no address"


def _errno_of(address: str) -> int:
    """Return the errno of binding a multiaddress; 0 if it works, or if it is not an IP address with a TCP port."""
    match = re.fullmatch(r"/(ip4|ip6)/([^/]+)/tcp/([0-9]{1,5})", address)
    if match is None or int(match[3]) > 65535:
        return 0
    try:
        with socket.socket(socket.AF_INET6 if match[1] == "ip6" else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # old connections in TIME_WAIT are no obstacle
            if match[1] == "ip6":
                probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            probe.bind((match[2], int(match[3])))
    except OSError as error:
        return error.errno or 0
    return 0

"""Where a peer's page is served: the option `--web`, its socket, and the key of the peer's own user.

An address has no key, since other users of the machine read command lines, and logs keep what is printed: it has a code
that the page exchanges for the key, once.

page.json in the peer's folder   the port and the key, so that a peer that is started again has the same page: browsers
                                 that show it go on
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import json
import re
import secrets
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from swarmtrain.cli.option_errors import OptionError, OptionsError

DEFAULT_PORT = 7117
_PORTS = 20
"""Ports that are tried, from the default one on, if none was named."""
_ON, _OFF = "on", "off"
_ADDRESS = re.compile(r"(?:(\[[0-9A-Fa-f:.]+\]|[0-9A-Za-z_.-]*):)?(\d{1,5})")
_MAX_PORT = 65535
_AGAIN_S = 0.25
_ATTEMPTS = 8
"""Attempts to have a port again that the page of this peer had: its last server may be about to end."""


@dataclass(frozen=True, kw_only=True)
class PageAddress:
    """Address of a page."""

    host: str
    port: int
    """0: none was named."""

    @property
    def is_public(self) -> bool:
        """True if other machines may reach it."""
        try:
            return not ipaddress.ip_address(self.host.strip("[]")).is_loopback
        except ValueError:
            return self.host != "localhost"

    @property
    def url_for_others(self) -> str:
        """What to open on other machines."""
        host = self.host
        if host in ("0.0.0.0", "[::]"):
            host = _own_address(socket.AF_INET if host == "0.0.0.0" else socket.AF_INET6)
        return f"http://{host}:{self.port}/"

    def url(self, code: str = "") -> str:
        """Return what to open on this machine. With a code, the page may do what its peer's own user may."""
        host = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}.get(self.host, self.host)
        return f"http://{host}:{self.port}/" + (f"#code={code}" if code else "")


class CommandWithPage(click.Command):
    """Command with `--web [HOST:PORT]`, whose value may be left out, also before an argument that is no address."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, list(_with_values(args)))


def _with_values(words: Sequence[str]) -> Iterator[str]:
    """Yield `words`, with each `--web` and its value in one word."""
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if word == "--":
            yield word
            yield from rest
            return
        if word != "--web":
            yield word
        elif rest and (rest[0] in (_ON, _OFF) or _ADDRESS.fullmatch(rest[0])):
            yield f"--web={rest.pop(0)}"
        else:
            yield f"--web={_ON}"


def web_option(cls: type[click.Option], sentence: str) -> Callable[[Any], Any]:
    """Return the option `--web`, whose value is a `PageAddress`, or None if it is not given."""
    return click.option(
        "--web",
        cls=cls,
        callback=_page_address,
        metavar="[HOST:PORT]",
        help=f"{sentence} Without an address at 127.0.0.1:{DEFAULT_PORT} or the next free port; at :PORT for this "
        "machine only; at HOST:PORT for anyone who reaches it, who may read only.  [default: off]",
    )


def _page_address(ctx: click.Context, param: click.Parameter, value: str | None) -> PageAddress | None:
    if value is None or value.lower() in ("", "0", "no", _OFF, "false"):
        return None
    if value.lower() in (_ON, "1", "yes", "true"):  # 1 is a port of nobody
        return PageAddress(host="127.0.0.1", port=0)
    match = _ADDRESS.fullmatch(value)
    if match is None or int(match[2]) > _MAX_PORT:
        raise OptionError(
            f"{value!r} is not an address; write HOST:PORT, [IPv6]:PORT or :PORT (this machine only), such as "
            f":{DEFAULT_PORT}, or nothing",
            ctx,
            param,
            code="bad-address",
        )
    _check_packages()
    return PageAddress(host=match[1] or "127.0.0.1", port=int(match[2]))


def _check_packages() -> None:
    """Raise a usage error unless the libraries of the extra `web` are installed."""
    import importlib.util

    from swarmtrain.extras import install_in_words

    if any(importlib.util.find_spec(name) is None for name in ("starlette", "uvicorn", "segno")):
        raise OptionsError(
            f"--web needs starlette, uvicorn and segno: {install_in_words('web')}", code="package-missing"
        )


def new_code() -> str:
    """Return a code for an address, to be admitted by the page's server."""
    return secrets.token_urlsafe(24)


def page_lines(address: PageAddress, code: str) -> list[str]:
    """Return lines that say where a page is, for its peer's user and for others."""
    lines = [f"its page: {address.url(code)}"]
    return [*lines, f"the same for others, to read only: {address.url_for_others}"] if address.is_public else lines


# ---------------------------------------------------------------- the socket, and what is remembered


def kept_page(folder: Path | None) -> tuple[int, str]:
    """Return the port and the key of the page that the peer of `folder` had; 0 and a new key if it had none."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        if folder is not None:
            kept = json.loads((folder / "page.json").read_bytes())
            port, key = kept["port"], kept["key"]
            if isinstance(port, int) and 0 < port <= _MAX_PORT and isinstance(key, str) and len(key) >= 16:
                return port, key
    return 0, secrets.token_urlsafe(24)


def keep_page(folder: Path, port: int, key: str) -> None:
    """Remember them for the next start. A folder that cannot be written costs only that."""
    from swarmtrain.network.files import write_atomically

    with contextlib.suppress(OSError):
        write_atomically(folder / "page.json", json.dumps({"port": port, "key": key}).encode(), mode=0o600)


def bound(address: PageAddress, kept_port: int) -> tuple[socket.socket, PageAddress]:
    """Return a socket that listens at `address`, and the address with its port. Raises RunTimeError if it is taken.

    If no port was named, `kept_port` is taken if it can be had, else the default one or one of the next.
    """
    usual = [*([kept_port] if kept_port else []), *range(DEFAULT_PORT, DEFAULT_PORT + _PORTS)]
    for port in [address.port] if address.port else usual:
        for attempt in range(_ATTEMPTS if port == kept_port else 1):
            if attempt:
                threading.Event().wait(_AGAIN_S)
            try:
                return _listening(address.host, port), PageAddress(host=address.host, port=port)
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise _unusable(address, error.strerror or str(error)) from None
    from swarmtrain.network.reachability.listen import port_taken

    raise port_taken(f"{address.host}:{address.port or f'{usual[0]} to {usual[-1]}'}", "--web")


def _listening(host: str, port: int) -> socket.socket:
    family, kind, protocol, _, where = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)[0]
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(where)
        sock.listen(128)
    except BaseException:
        sock.close()
        raise
    return sock


def _own_address(family: socket.AddressFamily) -> str:
    """Return the address at which this machine is reached from others, as far as it knows; else its name."""
    outside = "192.0.2.1" if family == socket.AF_INET else "2001:db8::1"  # of nobody; nothing is sent
    with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((outside, 9))
        address = str(probe.getsockname()[0])
        return address if family == socket.AF_INET else f"[{address}]"
    return socket.gethostname()


def _unusable(address: PageAddress, why: str) -> OptionsError:
    where = f"{address.host}:{address.port}" if address.port else address.host
    return OptionsError(f"cannot serve the page at {where}: {why}; choose another with --web", code="bad-address")

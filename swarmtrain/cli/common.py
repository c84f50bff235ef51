"""Shared parts of the commands: options, event sinks, addresses, logging.

A command that runs a peer starts like this:

    @click.command(epilog=example("swarmtrain join INVITE --name anna"))
    @click.argument("invite")
    @peer_options
    def command(invite: str, options: PeerOptions) -> None:
        from swarmtrain.cli.display import PeerDisplay

        with open_sink(options, PeerDisplay) as emit:
            ...  # emit(event), from any thread
"""

from __future__ import annotations

import contextlib
import functools
import ipaddress
import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, TextIO, TypeVar

import click

from swarmtrain.cli.background import is_the_background, report, report_folder, start_in_background
from swarmtrain.cli.kept_options import KeptOption
from swarmtrain.cli.option_errors import OptionError, OptionsError
from swarmtrain.cli.output import echo
from swarmtrain.cli.page_address import PageAddress, web_option
from swarmtrain.cli.tracker_options import report_to_option
from swarmtrain.errors import SwarmtrainError, with_code
from swarmtrain.hub_login import USE_LOGIN, has_unused_login, use_login
from swarmtrain.peer.lifecycle.stop import StopFlag
from swarmtrain.words import one_line

if TYPE_CHECKING:
    from swarmtrain.events import DoneEvent, Event
    from swarmtrain.v1.control_pb2 import PeerStatus

_F = TypeVar("_F", bound=Callable[..., Any])


_MAX_PORT = 65535
PEERS_ASSUMED = 3
"""Volunteers that `check`, `plan` and `local` assume of a run that has not begun, unless it has more stages."""


class Display(Protocol):
    """Display of events on a terminal; see `cli/display.py`."""

    def start(self) -> None: ...

    def show(self, event: Event) -> None: ...

    def look_at(self, status: Callable[[], PeerStatus]) -> None: ...

    def stop(self) -> None: ...


@dataclass(frozen=True, kw_only=True)
class PeerOptions:
    """Options of every peer, as `peer_options` collects them, and the flag that Ctrl-C sets from then on."""

    dir: Path | None
    name: str
    json: bool
    listen: tuple[str, ...]  # multiaddresses
    announce: tuple[str, ...]  # multiaddresses
    log_level: str
    background: bool = False
    control: str = ""  # HOST:PORT
    metrics: str = ""  # HOST:PORT
    web: PageAddress | None = None
    report_to: tuple[str, ...] = ()
    accept_clock: bool = False
    only_announced: bool = False
    check_reach: bool = False
    stop: StopFlag = field(default_factory=StopFlag, compare=False)

    def with_kept(self, kept: Mapping[str, Any]) -> PeerOptions:
        """Return these options with those that the peer's folder remembers, by parameter name."""
        names = ("name", "listen", "announce", "control", "metrics", "web", "report_to")
        return replace(self, **{name: kept[name] for name in names if name in kept})


def to_multiaddr(text: str) -> str:
    """Parse an address (HOST:PORT, [IPv6]:PORT, :PORT or a multiaddress) into a multiaddress.

    Raises `ValueError`, which says what is allowed.
    """
    if text.startswith("/"):
        if re.fullmatch(r"/(ip4|ip6|dns|dns4|dns6)/[^/]+/tcp/\d+(/.*)?", text):
            return text
        raise ValueError(f"{text!r} is no TCP multiaddress, such as /ip4/203.0.113.5/tcp/31337")
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+)\]|([^\[\]:/\s]*)):(\d{1,5})", text)
    if match is None or int(match[3]) > _MAX_PORT:
        raise ValueError(f"{text!r} {_wrong_with_address(text)}")
    host, port = match[1] or match[2] or "0.0.0.0", int(match[3])
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        if match[1] or not re.fullmatch(r"[0-9A-Za-z_]([0-9A-Za-z_.-]*[0-9A-Za-z_])?", host) or host[-1].isdigit():
            raise ValueError(f"{host!r} is neither an IP address nor a host name") from None
        return f"/dns/{host}/tcp/{port}"
    return f"/ip{address.version}/{address}/tcp/{port}"


def _wrong_with_address(text: str) -> str:
    """Say what is wrong with `text`, which is no address, with an example of what is wanted."""
    forms = "write HOST:PORT, [IPv6]:PORT or :PORT, such as 203.0.113.5:31337"
    host, colon, port = text.rpartition(":")
    if re.fullmatch(r"\d{1,5}", text) and int(text) <= _MAX_PORT:
        return f"is a port without an address; write :{text} for all addresses of this machine, or HOST:{text}"
    if re.fullmatch(r"\d+", port) and int(port) > _MAX_PORT:
        return f"has a port above {_MAX_PORT}; {forms}"
    with contextlib.suppress(ValueError):
        if ipaddress.ip_address(text.strip("[]")).version == 6:
            return f"has no port; write [{text.strip('[]')}]:31337"
    if re.fullmatch(r"[0-9A-Za-z_.-]+", host if colon and not port else text):
        return f"has no port; write HOST:PORT, such as {host if colon else text}:31337"
    return f"is not an address; {forms}"


def limit(parser: str) -> Callable[[click.Context, click.Parameter, str | None], Any]:
    """Return a click callback that reads an option's value, if it has one, by function `parser` of `protocol.limits`."""

    def read(ctx: click.Context, param: click.Parameter, value: str | None) -> Any:
        from swarmtrain.protocol import limits

        try:
            return None if value is None else getattr(limits, parser)(value)
        except ValueError as error:
            raise OptionError(str(error), ctx, param, code="bad-limit") from None

    return read


def addresses(ctx: click.Context, param: click.Parameter, value: tuple[str, ...]) -> tuple[str, ...]:
    """Parse an option's addresses into multiaddresses."""
    try:
        found = tuple(to_multiaddr(text) for text in value)
        for text, address in zip(value, found, strict=True):
            if param.name == "announce" and re.match(r"/ip4/0\.0\.0\.0/|/ip6/::/", address):
                port = address.split("/")[4]
                raise ValueError(
                    f"{text!r} does not say where others find this machine; write HOST:PORT, such as 203.0.113.5:{port}"
                )
        return found
    except ValueError as error:
        raise OptionError(str(error), ctx, param, code="bad-address") from None


def _tcp_address(ctx: click.Context, param: click.Parameter, value: str) -> str:
    """Parse the HOST:PORT of a control service; `:PORT` is a port of this machine only."""
    if not value:
        return ""
    match = re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[0-9A-Za-z_.-]*):(\d{1,5})", value)
    if match is None or int(match[2]) > _MAX_PORT:
        raise OptionError(
            f"{value!r} is not an address; write HOST:PORT, [IPv6]:PORT or :PORT (this machine only), such as :7000",
            ctx,
            param,
            code="bad-address",
        )
    return f"{match[1] or '127.0.0.1'}:{int(match[2])}"


def _metrics_address(ctx: click.Context, param: click.Parameter, value: str) -> str:
    return _tcp_address(ctx, param, f":{value}" if re.fullmatch(r"\d{1,5}", value) else value)


def peer_name(ctx: click.Context, param: click.Parameter, value: str) -> str:
    """Check a peer's name: others see it, so its characters are restricted."""
    if value and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,31}", value):
        near = re.sub(r"[^A-Za-z0-9._-]+", "-", value).strip("-._")[:32]
        such = f"; write {near}, say" if near else ""
        raise OptionError(
            f"{value!r} is not a name; allowed: up to 32 letters a to z, digits, dots, hyphens and underscores, a letter or "
            f"digit first{such}",
            ctx,
            param,
            code="bad-name",
        )
    return value


def finite(ctx: click.Context, param: click.Parameter, value: float | None) -> float | None:
    """Reject nan, which click's ranges let pass."""
    if value is not None and value != value:
        raise OptionError("nan is not a number; write one, such as 10", ctx, param, code="not-a-number")
    return value


def _use_login(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value:
        use_login()


def use_hf_token(cls: type[click.Option] = click.Option) -> Callable[[_F], _F]:
    """Return the option by which the owner of a login of the hub says that it may be used."""
    return click.option("--use-hf-token", cls=cls, is_flag=True, expose_value=False, callback=_use_login, envvar=USE_LOGIN, help="Use the login in HF_TOKEN for the data, model and tokenizer that the run names. Without it private ones cannot be read.")  # fmt: skip


_PEER_OPTIONS = (
    click.option(
        "--dir",
        type=click.Path(file_okay=False, path_type=Path),
        metavar="FOLDER",
        help="Folder of the peer's identity and checkpoints.  [default: a folder of this user, chosen by command and --name]",
    ),
    click.option(
        "--name",
        cls=KeptOption,
        callback=peer_name,
        default="",
        metavar="NAME",
        help="Name that others see beside the PeerID.  [default: bootstrap, or the end of a volunteer's PeerID]",
    ),
    click.option("--json", is_flag=True, help="Write events as JSON lines to standard output, and nothing else there."),
    click.option(
        "--listen",
        cls=KeptOption,
        callback=addresses,
        multiple=True,
        metavar="ADDRESS",
        help="Address to listen at: HOST:PORT, [IPv6]:PORT, :PORT (all IPv4 addresses) or a multiaddress; may be repeated.  [default: any free port]",
    ),
    click.option(
        "--announce",
        cls=KeptOption,
        callback=addresses,
        multiple=True,
        metavar="ADDRESS",
        help="Address to advertise to other peers, such as a router's forwarded port; may be repeated.  [default: the addresses that the peer finds]",
    ),
    click.option(
        "--control",
        cls=KeptOption,
        callback=_tcp_address,
        default="",
        metavar="ADDRESS",
        help="Serve `status`, `pause`, `leave` and the like over TCP too: at :PORT for this machine only, at HOST:PORT for others. Anyone who reaches it controls this peer.  [default: only this user, through --dir]",
    ),
    click.option(
        "--metrics",
        cls=KeptOption,
        callback=_metrics_address,
        default="",
        metavar="PORT",
        help="Serve Prometheus metrics: at PORT for this machine only, at HOST:PORT for anyone who reaches it.  [default: off]",
    ),
    web_option(KeptOption, "Serve a page for browsers that shows the swarm, and this peer."),
    report_to_option(KeptOption),
    click.option(
        "--log-level",
        type=click.Choice(["debug", "info", "warning", "error"]),
        default="warning",
        show_default=True,
        help="Write log messages of at least this severity to standard error.",
    ),
    click.option(
        "--background",
        is_flag=True,
        help="Return once the peer takes part, and leave it running without this terminal.",
    ),
    click.option(
        "--accept-clock",
        is_flag=True,
        help="Use the other peers' clock even if it differs from this machine's by more than ten minutes.",
    ),
    use_hf_token(KeptOption),
    click.option(
        "--only-announced",
        is_flag=True,
        hidden=True,
        help="For a rehearsal: advertise the addresses of --announce and no others.",
    ),
    click.option(
        "--check-reach",
        is_flag=True,
        hidden=True,
        help="For a rehearsal: ask the others whether they can dial this peer, although all are on this machine.",
    ),
)


LINK_OPTIONS = (
    click.option("--up", "up_mbit", cls=KeptOption, type=click.FloatRange(0, 100_000), callback=finite, metavar="MBIT", help="Upload limit in Mbit/s; 0: no limit.  [default: the run's network.up_mbit]"),
    click.option("--down", "down_mbit", cls=KeptOption, type=click.FloatRange(0, 100_000), callback=finite, metavar="MBIT", help="Limit in Mbit/s of what comes from other peers; 0: none. Models and data sets of the Hugging Face hub come unlimited, as its library knows no limit.  [default: the run's network.down_mbit]"),
)  # fmt: skip


THREADS = click.option("--threads", type=click.IntRange(1, 4096), metavar="N", help="Processor threads to compute with.  [default: 1 for a model below 10 million parameters, else all cores]")  # fmt: skip


def peer_options(function: _F) -> _F:
    """Give a command the options of every peer; it receives them as one argument, `options: PeerOptions`.

    Signals are handled before anything heavy is imported: until the command has its imports and calls
    `options.stop.begin()`, Ctrl-C ends the process at once.
    """

    @functools.wraps(function)
    def bundled(**values: Any) -> Any:
        if values["only_announced"] and not values["announce"]:
            raise OptionsError(
                "--only-announced without --announce: nobody could find this peer; give --announce ADDRESS too",
                code="nothing-announced",
            )
        if values["background"] and not is_the_background():
            return _start_in_background(values)
        from swarmtrain.cli.stop_signals import stop_on_signals
        from swarmtrain.peer.lifecycle.process import use_few_arenas

        use_few_arenas()
        with stop_on_signals(functools.partial(_end_at_once, values["json"], values["name"])) as stop:
            given = {item.name: values.pop(item.name) for item in fields(PeerOptions) if item.name in values}
            options = PeerOptions(**given, stop=stop)
            from swarmtrain.peer.control.logs import log_to_file_only, log_to_terminal

            (log_to_file_only if is_the_background() else log_to_terminal)(options.log_level)
            return function(options=options, **values)

    decorated: Any = bundled
    for option in reversed(_PEER_OPTIONS):
        decorated = option(decorated)
    return decorated  # type: ignore[no-any-return]


def _start_in_background(values: dict[str, Any]) -> int:
    from swarmtrain.events import to_json_line, to_plain_line

    show, as_json = _lines(sys.stdout, to_json_line if values["json"] else to_plain_line), values["json"]

    def show_once(event: Event) -> None:
        if as_json or event.event != "error":  # why it ended is said at the end, on standard error
            show(event)

    return start_in_background(show_once, by_folder=values["dir"] is not None)


def _end_at_once(as_json: bool, name: str) -> None:
    """End during the imports: nothing has begun, and half-imported modules cannot be relied on."""
    echo("interrupted before it began", err=True)
    if as_json:
        from swarmtrain.peer.lifecycle.process import process_age_s

        head = {"event": "done", "time": time.time(), "peer": "", "name": name}
        counts = {"held_out_loss": None, "tokens": 0, "run_tokens": 0, "wall_s": process_age_s()}
        echo(json.dumps({**head, **counts, "reason": "interrupted"}))
    os._exit(0)


_QUESTIONS = {
    "clock-differs": ("Go by their clock?", "accept_clock"),
    "takes-much": ("Take part all the same?", "accept_size"),
}
"""Question by which an error with this code can be overcome, and the setting that says yes."""
_HUB_CODES = ("dataset-not-loaded", "hub-failed", "tokenizer-not-loaded")


def asking(options: PeerOptions, live: Callable[[Mapping[str, Any]], None]) -> None:
    """Call `live` with settings by their names. If it raises an error that a person may overrule, and a person is at
    the terminal, ask, and call it again."""
    agreed: dict[str, Any] = {"accept_clock": options.accept_clock}
    while True:
        try:
            return live(agreed)
        except SwarmtrainError as error:
            question, setting = _QUESTIONS.get(error.code, ("", ""))
            if error.code in _HUB_CODES and has_unused_login():
                question = "Use your login of Hugging Face (HF_TOKEN) for this run?"
            if not question or options.json or is_the_background() or not (sys.stdin.isatty() and sys.stderr.isatty()):
                raise
            echo(one_line(with_code(f"warning: {error}", error.code)), err=True)
            with options.stop.before_it_begins():
                is_agreed = click.confirm(question, default=False, err=True)
            if not is_agreed:
                raise
            if setting:
                agreed[setting] = True
            else:
                use_login()


def example(*lines: str) -> str:
    """Format the end of a command's help: one or more examples, as they are typed."""
    return "\b\nExample:\n" + "\n".join(f"  {line}" for line in lines)


def peer_directory(options: PeerOptions, role: str) -> Path:
    """Return the peer's folder: `--dir`, else this user's by `role` ("bootstrap", "volunteer") and name. Creates nothing."""
    return options.dir if options.dir is not None else user_directory(role, options.name)


def user_directory(role: str, name: str) -> Path:
    """Return the folder of a peer that is started without `--dir`. Creates nothing."""
    import platformdirs

    return platformdirs.user_data_path("swarmtrain") / (f"{role}-{name}" if name else role)


def say_the_end(done: DoneEvent, folder: Path, options: PeerOptions, usual: Path) -> None:
    """Print the last line for a person, if one is there. `usual` is the folder that this peer has without `--dir`."""
    from swarmtrain.cli.closing_line import closing_line

    if options.json or is_the_background():
        return
    if line := closing_line(done, folder, is_usual=folder == usual):
        with contextlib.suppress(OSError):  # a reader that is gone costs the line, and not the exit code
            echo(line, err=True)


class EventSink:
    """Output of events: takes them from any thread and writes each at once. If the reader is gone, the peer keeps running.

    Fills in an event's missing time, peer and name. As a context manager it starts and stops the display; with JSON it
    also writes a `SwarmtrainError` that ends the command as an `error` event.
    """

    def __init__(self, write: Callable[[Event], None], *, name: str = "", display: Display | None = None) -> None:
        self.display = display
        self.broken = False
        self._write = write
        self._peer = ""
        self._name = name
        self._lock = threading.Lock()

    def look_at(self, status: Callable[[], PeerStatus]) -> None:
        """Give a display the peer's status to show."""
        if self.display is not None:
            self.display.look_at(status)

    def identify(self, peer: str, name: str) -> None:
        """Attribute events that name no peer to this one from now on."""
        self._peer, self._name = peer, name

    def __call__(self, event: Event) -> None:
        from swarmtrain.events import stamped

        event = stamped(event, time.time(), self._peer, self._name)
        with self._lock:
            if self.broken:
                return
            try:
                self._write(event)
            except (OSError, ValueError):  # the reader is gone, the disk is full, or the stream is closed
                self.broken = True

    def __enter__(self) -> EventSink:
        if self.display is not None:
            self.display.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.display is not None:
            self.display.stop()


class _JsonSink(EventSink):
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, SwarmtrainError):
            from swarmtrain.events import ErrorEvent

            self(ErrorEvent(message=str(error), code=error.code, exit_code=error.exit_code))


def _lines(stream: TextIO, render: Callable[[Event], str]) -> Callable[[Event], None]:
    def write(event: Event) -> None:
        stream.write(render(event) + "\n")
        stream.flush()

    return write


def errors_as_events(as_json: bool, name: str) -> EventSink:
    """Return a sink for the time before `open_sink`: with JSON, an error of then is an event too."""
    from swarmtrain.events import to_json_line

    if is_the_background():
        return _JsonSink(report, name=name)
    return _JsonSink(_lines(sys.stdout, to_json_line), name=name) if as_json else EventSink(lambda event: None)


def open_sink(options: PeerOptions, make_display: Callable[[], Display], folder: Path | None = None) -> EventSink:
    """Open the sink that the options ask for: JSON lines, a display if standard output is a terminal, or plain lines.

    In the background, events go to the waiting command, which is also told the peer's `folder`.
    """
    from swarmtrain.events import to_json_line, to_plain_line

    if is_the_background():
        if folder is not None:
            report_folder(folder)
        return _JsonSink(report, name=options.name)
    if options.json:
        return _JsonSink(_lines(sys.stdout, to_json_line), name=options.name)
    if sys.stdout.isatty():
        display = make_display()
        return EventSink(display.show, name=options.name, display=display)
    return EventSink(_lines(sys.stdout, to_plain_line), name=options.name)


@dataclass(frozen=True, kw_only=True)
class WhichPeer:
    """Peer of this machine that a command means; all empty: the only one that runs."""

    name: str = ""  # its name, its folder's name, or the end of its PeerID
    directory: Path | None = None  # its folder, or one that has several peers' folders
    address: str = ""  # HOST:PORT


_WHICH_PEER = (
    click.argument("name", metavar="[NAME]", default=""),
    click.option(
        "--dir",
        "directory",
        type=click.Path(file_okay=False, path_type=Path),
        metavar="FOLDER",
        help="The peer's folder, or one that holds several peers' folders.  [default: the folder of this user's peers]",
    ),
    click.option(
        "--address",
        callback=_tcp_address,
        default="",
        metavar="HOST:PORT",
        help="Ask over TCP a peer that was started with --control.",
    ),
)


def which_peer(function: _F) -> _F:
    """Give a command `[NAME]`, `--dir` and `--address`; it receives them as one argument, `which: WhichPeer`."""

    @functools.wraps(function)
    def bundled(**values: Any) -> Any:
        which = WhichPeer(**{field.name: values.pop(field.name) for field in fields(WhichPeer)})
        return function(which=which, **values)

    decorated: Any = bundled
    for option in reversed(_WHICH_PEER):
        decorated = option(decorated)
    return decorated  # type: ignore[no-any-return]

"""`swarmtrain service`: have the system start a peer of this machine, also after a reboot."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from swarmtrain.cli.common import example
from swarmtrain.cli.option_errors import OptionsError
from swarmtrain.cli.served_peer import INVITE_FILE, definition_of, missing_secrets, peer_to_serve, write_folder

if TYPE_CHECKING:
    from swarmtrain.peer.service.managers import ServiceManager
    from swarmtrain.peer.service.state import InstalledService, ServiceState

__all__ = ["command"]

_F = TypeVar("_F", bound=Callable[..., Any])
_AFTER = "swarmtrain.after_dashes"
_UP_S = 60.0
_LOOK_EVERY_S = 0.25


def _directory(text: str) -> Callable[[_F], _F]:
    kind = click.Path(file_okay=False, path_type=Path)
    return click.option("--dir", "directory", type=kind, metavar="FOLDER", help=text)


class _Service(click.Group):
    """The three commands; a word that is none of them is answered with them."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] not in self.commands and not args[0].startswith("-"):
            raise OptionsError(
                f"No such command {args[0]!r}; there are {', '.join(self.commands)}; `swarmtrain service status` says "
                "how to start, stop and follow a service",
                ctx,
                code="no-such-command",
            )
        return super().resolve_command(ctx, args)


class _TakesPeerOptions(click.Command):
    """Command whose words after `--` are those of the peer's own command."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        at = args.index("--") if "--" in args else len(args)
        ctx.meta[_AFTER] = tuple(args[at + 1 :])
        return super().parse_args(ctx, args[:at])

    def collect_usage_pieces(self, ctx: click.Context) -> list[str]:
        return [*super().collect_usage_pieces(ctx), "[-- INVITE and OPTIONS of join]"]


@click.group(
    name="service",
    cls=_Service,
    invoke_without_command=True,
    subcommand_metavar="install|status|uninstall",
    epilog=example("swarmtrain service install anna", "swarmtrain service status", "swarmtrain service uninstall anna"),
)
@click.pass_context
def command(ctx: click.Context) -> None:
    """Have the system start a peer, also after a reboot.

    A service is for one user: a unit of systemd on Linux, an agent of launchd on macOS. It starts the peer with all
    that the peer's folder remembers, and again when it fails or is killed. When the run has ended or after `swarmtrain
    leave` it leaves the peer alone until the next reboot.
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


# ---------------------------------------------------------------- install


@command.command(
    name="install",
    cls=_TakesPeerOptions,
    epilog=example(
        "swarmtrain service install anna",
        "swarmtrain service install --dir ~/swarm -- INVITE --name anna --hours 22-7",
        "swarmtrain service install anna --print -- --memory 4GB",
    ),
)
@click.argument("name", metavar="[NAME]", default="")
@_directory("The peer's folder, or one that holds several peers' folders.  [default: the folder of this user's peers]")
@click.option("--print", "only_print", is_flag=True, help="Print the unit or agent; write and start nothing.")
@click.pass_context
def install(ctx: click.Context, name: str, directory: Path | None, only_print: bool) -> None:
    """Start a peer now and after each reboot.

    NAME is as for `status`: a peer that runs or has run here, a bootstrap too. What follows -- is as for `join`, and
    the folder remembers it. With an INVITE the peer may be a new one. Installing a service again updates it.

    Only this user can read the unit. It bounds memory well above --memory, and lets the peer write into its folder,
    this user's cache and the folders of temporary files only, if this system allows a user's service that.
    """
    from swarmtrain.cli.background import say
    from swarmtrain.peer.service.managers import service_files, service_manager

    peer = peer_to_serve(name, directory, ctx.meta[_AFTER])
    if only_print:
        click.echo(service_files().content(definition_of(peer, service_files())).decode(), nl=False)
        return
    manager = service_manager(shlex.join(peer.command))
    definition = definition_of(peer, manager)
    write_folder(peer)
    for sentence in manager.install(definition):
        say(sentence)
    for variable in missing_secrets():
        advice = manager.variable_advice(definition.name, variable)
        say(f"{variable} of this shell does not go with it; if the peer needs it: {advice}")
    service = next(each for each in manager.installed() if each.name == definition.name)
    state, folder = manager.state(service.name), shlex.quote(str(service.folder))
    if process := _beside(service, state):
        click.echo(
            f"{service.name} is installed; the peer runs already, as process {process}, and goes on: the system starts "
            f"it from the next reboot on. To hand it over now: swarmtrain leave --dir {folder} && "
            f"{manager.start_command(service.name)}"
        )
        return
    if state.pid:
        click.echo(f"{service.name} is installed and runs already; what is new holds from its next start on")
        return
    manager.start(service.name)
    how = _wait_until_up(manager, service)
    click.echo(
        f"{service.name} is installed and {how}; look: swarmtrain watch --dir {folder}; "
        f"stop it for good: swarmtrain service uninstall {service.name}"
    )


def _wait_until_up(manager: ServiceManager, service: InstalledService) -> str:
    """Wait until the peer answers, for a minute at most; return what it does, in words.

    Raises RunTimeError if it fails before. Ctrl-C stops the waiting, and the peer starts on.
    """
    import threading
    import time

    from swarmtrain.cli.peers import LocalPeer, PeerPhase, look
    from swarmtrain.errors import RunTimeError
    from swarmtrain.peer.service.state import ServicePhase

    give_up_s, pause = time.monotonic() + _UP_S, threading.Event()
    try:
        while time.monotonic() < give_up_s:
            view, state = look(LocalPeer(folder=service.folder)), manager.state(service.name)
            if view.phase is PeerPhase.RUNNING:
                return "runs"
            if state.phase is ServicePhase.ENDED and state.exit_code == 0:
                return "has ended well already, as when its run is over"
            if state.phase in (ServicePhase.ENDED, ServicePhase.FAILED, ServicePhase.WAITING) and state.last_exit:
                raise RunTimeError(
                    f"{service.name} is installed, but the peer ended ({state.last_exit}); "
                    f"{_next_step(manager, service, state)}",
                    code="service-ended",
                )
            pause.wait(_LOOK_EVERY_S)
    except KeyboardInterrupt:
        pass  # of the waiting
    return "starts; it does not answer yet"


# ---------------------------------------------------------------- status and uninstall


@command.command(name="status", epilog=example("swarmtrain service status", "swarmtrain service status anna --json"))
@click.argument("name", metavar="[NAME]", default="")
@_directory("The peer's folder.  [default: all services]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object for each service.")
def status(name: str, directory: Path | None, as_json: bool) -> None:
    """Show the installed services.

    Does the peer run, since when, how did it end, where are the logs, and what may be done now.

    NAME is the service's, the peer's or its folder's name. Without NAME and --dir it shows all of them.
    """
    import json

    from swarmtrain.peer.service.managers import service_manager

    manager = service_manager("swarmtrain join --dir FOLDER")
    found = manager.installed()
    if name or directory is not None:
        found = _meant(found, name, directory)
    if not found and not as_json:
        click.echo("no service is installed; `swarmtrain service install NAME` has the system start a peer")
    for number, service in enumerate(found):
        state = manager.state(service.name)
        if as_json:
            click.echo(json.dumps(_as_json(manager, service, state), ensure_ascii=False))
        else:
            click.echo(("\n" if number else "") + "\n".join(_page(manager, service, state)))


def _as_json(manager: ServiceManager, service: InstalledService, state: ServiceState) -> dict[str, Any]:
    return {
        "name": service.name,
        "dir": str(service.folder),
        "file": str(service.path),
        "enabled": state.is_enabled,
        "starts_at": "boot" if state.starts_at_boot else "login",
        "state": state.phase.value,
        "since": state.since,
        "pid": state.pid or None,
        "beside": _beside(service, state) or None,
        "restarts": state.restarts,
        "last_exit": state.last_exit or None,
        "exit_code": state.exit_code,
        "log": manager.log_command(service.name),
        "next": _next_step(manager, service, state),
    }


def _page(manager: ServiceManager, service: InstalledService, state: ServiceState) -> list[str]:
    """Return the lines about one service."""
    import time

    from swarmtrain.words import ago_in_words, counted, one_line

    when = "when the machine starts" if state.starts_at_boot else "when you log in"
    now = state.phase.value + (f", process {state.pid}" if state.pid else "")
    if state.since is not None:
        at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(state.since))
        now += f", since {at} ({ago_in_words(max(0.0, time.time() - state.since))})"
    if other := _beside(service, state):
        now += f"; the peer runs beside it, as process {other}"
    last = state.last_exit or ("a failure, or it was killed: the log says which" if state.restarts else "none yet")
    last += f"; started again {counted(state.restarts, 'time')}" if state.restarts else ""
    rows = {
        "folder": str(service.folder),
        "file": str(service.path),
        "enabled": f"yes, it starts {when}" if state.is_enabled else "no: the system does not start it by itself",
        "now": now,
        "last exit": last,
        "logs": f"{manager.log_command(service.name)}; or swarmtrain logs --dir {shlex.quote(str(service.folder))} -F",
        "next": _next_step(manager, service, state),
    }
    return [service.name, *(f"  {title:<10} {one_line(text)}" for title, text in rows.items())]


def _beside(service: InstalledService, state: ServiceState) -> int:
    """Return the process of the peer if somebody else has started it than the service; 0 if not."""
    from swarmtrain.peer.lifecycle.folder_lock import holder_pid

    process = holder_pid(service.folder)
    return 0 if process == state.pid else process


def _next_step(manager: ServiceManager, service: InstalledService, state: ServiceState) -> str:
    """Say what a person may want to do now."""
    from swarmtrain.errors import UserError
    from swarmtrain.peer.service.state import ServicePhase

    start, logs = manager.start_command(service.name), manager.log_command(service.name).removesuffix(" -f")
    which = f"--dir {shlex.quote(str(service.folder))}"
    if not state.is_enabled:
        return f"`swarmtrain service install {which}` has the system start it again"
    if _beside(service, state):
        return f"`swarmtrain leave {which} && {start}` hands the peer over to the service"
    match state.phase:
        case ServicePhase.FAILED if state.exit_code == UserError.exit_code:
            return f"`{logs}` says what has to be changed; then `{start}`"
        case ServicePhase.FAILED:
            return f"`{logs}` says why it failed; `{start}` tries again"
        case ServicePhase.WAITING:
            return f"nothing: it is started again soon; `{logs}` says why it ended"
        case ServicePhase.ENDED:
            return f"nothing, if the run has ended; `{start}` starts it before the next reboot"
        case ServicePhase.NOT_STARTED:
            return f"`{start}` starts it now"
    return f"`swarmtrain watch {which}`"


def _meant(found: list[InstalledService], name: str, directory: Path | None) -> list[InstalledService]:
    """Return the services that NAME and `--dir` mean. Raises UserError if there is none."""
    from swarmtrain.errors import UserError
    from swarmtrain.peer.lifecycle.start_options import StartedFile

    def is_called(service: InstalledService) -> bool:
        peer = StartedFile(service.folder).read().options.get("--name", ("",))[0]
        return name in (service.name, service.name.removeprefix("swarmtrain-"), service.folder.name, peer)

    kept = [service for service in found if not name or is_called(service)]
    if directory is not None:
        kept = [service for service in kept if service.folder == directory.absolute()]
    if not kept:
        listed = ", ".join(f"{service.name} ({service.folder})" for service in found) or "none at all"
        what = f"for {directory}" if directory is not None else f"called {name}"
        raise UserError(f"no service {what} is installed; there are: {listed}", code="no-such-service")
    return kept


@command.command(
    name="uninstall", epilog=example("swarmtrain service uninstall anna", "swarmtrain service uninstall --dir ~/swarm")
)
@click.argument("name", metavar="[NAME]", default="")
@_directory("The peer's folder.  [default: that of the only service]")
def uninstall(name: str, directory: Path | None) -> None:
    """End a peer cleanly, and start it no more.

    NAME is the service's, the peer's or its folder's name. The folder stays: `swarmtrain join --dir FOLDER` continues
    from there.
    """
    from swarmtrain.cli.background import say
    from swarmtrain.errors import UserError
    from swarmtrain.peer.service.definition import STOP_S
    from swarmtrain.peer.service.managers import service_manager

    manager = service_manager("swarmtrain join --dir FOLDER")
    found = _meant(manager.installed(), name, directory) if name or directory is not None else manager.installed()
    if not found:
        raise UserError("no service is installed: there is nothing to remove", code="no-such-service")
    if len(found) > 1:
        listed = ", ".join(f"{service.name} ({service.folder})" for service in found)
        raise UserError(
            f"several services are installed: {listed}; say which with NAME or --dir", code="several-services"
        )
    (service,) = found
    if manager.state(service.name).pid:
        say(f"ending the peer: it finishes its step and says goodbye, which takes {STOP_S} s at most")
    for sentence in manager.remove(service):
        say(sentence)
    (service.folder / INVITE_FILE).unlink(missing_ok=True)
    click.echo(f"{service.name} is removed; what the peer has is still in {service.folder}")

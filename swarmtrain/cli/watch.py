"""`swarmtrain watch`: show a peer until it ends."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any

import click

from swarmtrain.cli.common import WhichPeer, example, which_peer
from swarmtrain.cli.option_errors import OptionsError
from swarmtrain.cli.output import echo
from swarmtrain.cli.page_address import CommandWithPage, PageAddress, web_option

if TYPE_CHECKING:
    from swarmtrain.cli.peers import LocalPeer, View


@click.command(
    name="watch",
    cls=CommandWithPage,
    epilog=example("swarmtrain watch", "swarmtrain watch anna", "swarmtrain watch --web", "swarmtrain watch --json"),
)
@which_peer
@click.option("--json", "as_json", is_flag=True, help="Write each status as one JSON line.")
@web_option(click.Option, "Show the swarm, and this peer, on a page in the browser, until Ctrl-C.")
@click.option("--page-socket", type=int, hidden=True, help="Socket on which a peer that serves its page has it served.")
@click.pass_context
def command(
    ctx: click.Context, which: WhichPeer, as_json: bool, web: PageAddress | None, page_socket: int | None
) -> None:
    """Show what a peer of this machine does, until it ends.

    NAME is the peer's name, its folder's name, or the end of its PeerID; give it if several peers run. Press q or
    Ctrl-C to close the screen; the peer keeps running. `watch` ends when the peer ends, with exit code 0 if the peer
    ended well. If the peer dies, it waits a while for the peer to come back.
    """
    import sys

    from swarmtrain.cli.peers import PeerPhase, find, look

    if page_socket is not None:
        _serve_for_peer(which, page_socket)
        return
    if as_json and web is not None:
        raise OptionsError("--web shows a page and --json writes lines; give one of them", code="options-conflict")
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    peer = find(which)
    if web is not None:
        _show_page(peer, web, _command_of(which))
        return
    view = look(peer)
    last = view if view.phase.over else _watched(peer, view, _command_of(which), as_json)
    if last is None:
        return
    _print_last(last, as_json)
    if last.phase is not PeerPhase.ENDED or last.status.exit_code:
        ctx.exit(1)


def _command_of(which: WhichPeer) -> str:
    """Return the command that shows the same peer, also where several run."""
    directory = "" if which.directory is None else str(which.directory)
    given = {"": which.name, " --dir": directory, " --address": which.address}
    return "swarmtrain watch" + "".join(f"{option} {shlex.quote(value)}" for option, value in given.items() if value)


def _watched(peer: LocalPeer, view: View, again: str, as_json: bool) -> View | None:
    """Show the peer until it is over; returns its last view, or None if the person closed the screen."""
    import os
    import sys
    from queue import SimpleQueue

    from swarmtrain.cli.follow import Patience, follow
    from swarmtrain.cli.terminal import listening

    news: SimpleQueue[Any] = SimpleQueue()
    patience = Patience()
    with listening(news):
        if as_json or not sys.stdout.isatty() or os.environ.get("TERM", "dumb") in ("dumb", "unknown"):
            return follow(peer, view, _JsonLines() if as_json else _PlainLines(), news, patience)
        from swarmtrain.cli.peers import title
        from swarmtrain.cli.screen import draw_watch
        from swarmtrain.cli.terminal import TerminalConsole, drawing

        with drawing(TerminalConsole()) as draw:

            def show(seen: View) -> None:
                draw(lambda width, height, plain: draw_watch(seen, width, height, again, ascii_only=plain))

            last = follow(peer, view, show, news, patience)
    if last is None:
        echo(f"{title(view.status, view.folder)} keeps running; `{again}` shows it again")
    return last


def _show_page(peer: LocalPeer, wanted: PageAddress, again: str) -> None:
    """Serve the peer's page, and open it, until the person ends that."""
    from swarmtrain.cli.page_address import bound, keep_page, kept_page, new_code, page_lines
    from swarmtrain.cli.page_service import PageService, open_in_browser
    from swarmtrain.cli.peers import look, title
    from swarmtrain.cli.terminal import listening

    view = look(peer)
    port, key = kept_page(peer.folder)
    sock, address = bound(wanted, port)
    if peer.folder is not None:
        keep_page(peer.folder, address.port, key)
    service = PageService(peer, sock, address, key)
    printed, opened = new_code(), new_code()
    service.admit(printed)
    service.admit(opened, 60.0)  # it is on the browser's command line
    for line in page_lines(address, printed):
        echo(line)
    echo("Ctrl-C, or q, closes it; the peer keeps running" if not view.phase.over else "Ctrl-C, or q, closes it")
    with listening(service.news):
        open_in_browser(address.url(opened))
        service.run()
    if not view.phase.over:
        echo(f"{title(view.status, view.folder)} keeps running; `{again} --web` shows it again")


def _serve_for_peer(which: WhichPeer, descriptor: int) -> None:
    from swarmtrain.cli.page_address import kept_page
    from swarmtrain.cli.page_service import serve_until_parent_ends

    assert which.directory is not None
    _, key = kept_page(which.directory)
    serve_until_parent_ends(which.directory, descriptor, key)


class _PlainLines:
    """Line whenever something happens that a person would want to read later; single steps are too many."""

    def __init__(self) -> None:
        self._told: object = None

    def __call__(self, view: View) -> None:
        from swarmtrain.cli.facts import state_in_words
        from swarmtrain.cli.screen import plain_line

        status = view.status
        notice = status.notices[-1].time if status.notices else 0
        waiting = status.doing if status.state != _training() else ""
        news = (state_in_words(view), status.state, status.round, notice, status.pid, waiting)
        if news != self._told:
            self._told = news
            echo(plain_line(view))


class _JsonLines:
    """Line for each status and for each change of its process's state."""

    def __init__(self) -> None:
        self._told: object = None

    def __call__(self, view: View) -> None:
        import json

        from swarmtrain.cli.peers import view_as_json

        news = (view.phase, view.status.time)
        if news != self._told:
            self._told = news
            echo(json.dumps(view_as_json(view), allow_nan=False))


def _training() -> int:
    from swarmtrain.v1 import control_pb2 as wire

    return int(wire.PEER_STATE_TRAINING)


def _print_last(view: View, as_json: bool) -> None:
    import sys

    if as_json:
        _JsonLines()(view)
        return
    from swarmtrain.cli.status import print_page

    if sys.stdout.isatty():
        print_page(view)
    else:
        _PlainLines()(view)

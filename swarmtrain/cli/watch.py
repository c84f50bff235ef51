"""`swarmtrain watch`: show a peer until it ends."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from swarmtrain.cli.common import WhichPeer, example, which_peer

if TYPE_CHECKING:
    from swarmtrain.cli.peers import LocalPeer, View

__all__ = ["command"]


@click.command(name="watch", epilog=example("swarmtrain watch", "swarmtrain watch anna", "swarmtrain watch --json"))
@which_peer
@click.option("--json", "as_json", is_flag=True, help="Write each status as one JSON line.")
@click.pass_context
def command(ctx: click.Context, which: WhichPeer, as_json: bool) -> None:
    """Show what a peer of this machine does, until it ends.

    NAME is the peer's name, its folder's name, or the end of its PeerID; give it if several peers run. Press q or
    Ctrl-C to close the screen; the peer keeps running. `watch` ends when the peer ends, with exit code 0 if the peer
    ended well. If the peer dies, it waits a while for the peer to come back.
    """
    import sys

    from swarmtrain.cli.peers import PeerPhase, find, look

    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    peer = find(which)
    view = look(peer)
    last = view if view.phase.over else _watched(peer, view, as_json)
    if last is None:
        return
    _print_last(last, as_json)
    if last.phase is not PeerPhase.ENDED or last.status.exit_code:
        ctx.exit(1)


def _watched(peer: LocalPeer, view: View, as_json: bool) -> View | None:
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
        from rich.console import Console

        from swarmtrain.cli.peers import title
        from swarmtrain.cli.screen import draw_watch
        from swarmtrain.cli.terminal import drawing

        with drawing(Console()) as draw:

            def show(seen: View) -> None:
                draw(lambda width, height, plain: draw_watch(seen, width, height, ascii_only=plain))

            last = follow(peer, view, show, news, patience)
    if last is None:
        click.echo(f"{title(view.status, view.folder)} keeps running; `swarmtrain watch` shows it again")
    return last


class _PlainLines:
    """Line whenever something happens that a person would want to read later; single steps are too many."""

    def __init__(self) -> None:
        self._told: object = None

    def __call__(self, view: View) -> None:
        from swarmtrain.cli.screen import plain_line, state_in_words

        status = view.status
        notice = status.notices[-1].time if status.notices else 0
        waiting = status.doing if status.state != _training() else ""
        news = (state_in_words(view), status.state, status.round, notice, status.pid, waiting)
        if news != self._told:
            self._told = news
            click.echo(plain_line(view))


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
            click.echo(json.dumps(view_as_json(view), ensure_ascii=False, allow_nan=False))


def _training() -> int:
    from swarmtrain.cli.peers import wire

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

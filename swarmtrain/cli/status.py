"""`swarmtrain status`: show a peer of this machine, or list all of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from swarmtrain.cli.common import WhichPeer, example, which_peer
from swarmtrain.cli.option_errors import OptionsError
from swarmtrain.cli.output import echo

if TYPE_CHECKING:
    from swarmtrain.cli.peers import View


@click.command(
    name="status",
    epilog=example(
        "swarmtrain status", "swarmtrain status --all", "swarmtrain status anna", "swarmtrain status --healthy"
    ),
)
@which_peer
@click.option("--all", "everyone", is_flag=True, help="Print one line for each peer of this machine.")
@click.option(
    "--json", "as_json", is_flag=True, help="Print the status as one JSON line; with --all, one line for each peer."
)
@click.option(
    "--healthy",
    is_flag=True,
    help="Only check that the peer trains or serves, and makes progress: exit code 0, else 1.",
)
def command(which: WhichPeer, everyone: bool, as_json: bool, healthy: bool) -> None:
    """Show what a peer of this machine does, or how it ended.

    NAME is the peer's name, its folder's name, or the end of its PeerID; give it if several peers run. The list of
    contributions has everyone who ever took part in the run.
    """
    import json
    import sys

    from swarmtrain.cli.peers import check_health, find, find_all, find_running, look, view_as_json

    if healthy:
        if everyone or as_json:
            raise OptionsError(
                "--healthy answers in one word about one peer; leave out --all and --json",
                code="options-conflict",
            )
        check_health(find_running(which))
        echo("healthy")
        return

    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    views = [look(peer) for peer in (find_all(which) if everyone else [find(which)])]
    if as_json:
        for view in views:
            echo(json.dumps(view_as_json(view), allow_nan=False))
    elif everyone:
        _print_list(views)
    else:
        print_page(views[0])


_PAGE_LINES = 20  # lines of a page without its contributors and the invite


def print_page(view: View) -> None:
    """Print all about one peer: cut to the terminal's size, or whole if the output is no terminal."""
    import sys

    from swarmtrain.cli.peers import PeerPhase
    from swarmtrain.cli.screen import UNCUT, draw_status
    from swarmtrain.cli.terminal import TerminalConsole
    from swarmtrain.words import one_line

    console = TerminalConsole()
    width, height = console.size if sys.stdout.isatty() else (UNCUT, UNCUT)
    for line in draw_status(view, width, max(6, height - _PAGE_LINES)):
        console.print(line, soft_wrap=True)
    if view.status.invite_line and view.phase is PeerPhase.RUNNING:
        echo(f"others join with:\n{one_line(view.status.invite_line)}")  # uncut: it is meant to be copied


def _print_list(views: list[View]) -> None:
    import sys

    from swarmtrain.cli.screen import UNCUT, list_peers
    from swarmtrain.cli.terminal import TerminalConsole

    console = TerminalConsole()
    for line in list_peers(views, console.width if sys.stdout.isatty() else UNCUT):
        console.print(line, soft_wrap=True)

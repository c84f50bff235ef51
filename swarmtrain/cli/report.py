"""`swarmtrain report`: write what is known of a run into one HTML file, to keep or to pass on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from swarmtrain.cli.common import WhichPeer, example, which_peer
from swarmtrain.cli.option_errors import OptionsError
from swarmtrain.cli.output import echo

if TYPE_CHECKING:
    from swarmtrain.cli.peers import LocalPeer

_SUFFIXES = (".html", ".htm")
_GENERATOR = b'<meta name="generator" content="swarmtrain">'
_HEAD_BYTES = 16_384


@click.command(
    name="report",
    epilog=example(
        "swarmtrain report --to run.html",
        "swarmtrain report bert --to bert.html",
        "swarmtrain report --dir runs/first --to first.html",
    ),
)
@which_peer
@click.option(
    "--to",
    "target",
    type=click.Path(dir_okay=False, path_type=Path),
    required=True,
    metavar="FILE.html",
    help="File to write. An earlier report is replaced, another file is not.",
)
@click.option(
    "--with-machine",
    is_flag=True,
    help="Also tell what is this machine's own: its folder, limits, warnings and errors.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object: the file, and the figures in it.")
def command(which: WhichPeer, target: Path, with_machine: bool, as_json: bool) -> None:
    """Write a report of a run: one HTML file that needs no network.

    It has the curves of the page, everyone who took part, what happened, the run file and how to make the run again.
    It is made from what one peer knows, while it runs or after its end, however it ended. NAME is as for `status`; of a
    folder with all the peers of a run it takes the bootstrap.
    """
    import json

    from swarmtrain.cli.peers import look, run_history
    from swarmtrain.cli.report_page import ReportSources, report_of
    from swarmtrain.errors import RunTimeError
    from swarmtrain.words import one_line

    check_target(target, "--to")
    peer = _chosen(which)
    view = look(peer)
    history = run_history(peer, view)
    run_toml = b"" if peer.folder is None else _run_toml(peer.folder)
    if not run_toml and not view.status.run_sha256:
        raise RunTimeError(
            "there is nothing to report yet: the peer has no run; `swarmtrain status` shows what it does, or how it "
            "ended",
            code="nothing-to-report",
        )
    made = report_of(ReportSources(view=view, history=history, run_toml=run_toml, with_machine=with_machine))
    write_page(target, made.html)
    if as_json:
        told = {
            "report": str(target),
            "size_bytes": len(made.html.encode()),
            "events": made.num_events,
            "events_left_out": made.num_left_out,
            "points": dict(made.num_points),
            "figures": dict(made.figures),
        }
        echo(json.dumps(told, allow_nan=False))
        return
    if made.num_left_out:
        echo(
            f"left out: {made.num_left_out} of this machine's own events, such as warnings; --with-machine adds them",
            err=True,
        )
    echo(f"wrote the report of {one_line(view.status.run_name) or 'the run'} to {target}; open it in a browser")


def check_target(path: Path, option: str) -> None:
    """Check the name of a page that will be written. Raises a usage error."""
    if path.suffix.lower() not in _SUFFIXES:
        raise OptionsError(f"{option} {path}: its name must end with .html", code="bad-report-name")
    if not path.parent.is_dir():
        raise OptionsError(f"{option} {path}: there is no folder {path.parent}; create it first", code="no-such-folder")
    try:
        with path.open("rb") as file:
            if _GENERATOR not in file.read(_HEAD_BYTES):
                raise OptionsError(
                    f"{option} {path}: already exists, and is no page that swarmtrain wrote; give another name",
                    code="file-exists",
                )
    except FileNotFoundError:
        pass
    except OSError as error:
        raise OptionsError(
            f"{option} {path}: cannot be written: {error.strerror}; give another file", code="file-not-written"
        ) from None


def write_page(path: Path, html: str) -> None:
    """Write a page, all of it or nothing. Raises RunTimeError if the disk does not take it."""
    from swarmtrain.errors import RunTimeError
    from swarmtrain.network.files import write_atomically

    try:
        write_atomically(path, html.encode())
    except OSError as error:
        raise RunTimeError(
            f"{path}: cannot be written: {error.strerror}; give another file", code="file-not-written"
        ) from None


# ---------------------------------------------------------------- whose report


def _chosen(which: WhichPeer) -> LocalPeer:
    """Return the peer meant; of peers of one run, none of which was named, the bootstrap: it saw the whole run.

    Raises UserError as `find` does.
    """
    from swarmtrain.cli.peers import find, find_all
    from swarmtrain.peer.lifecycle.folder_lock import Holder, holder

    if which.address or which.name or which.directory is None:
        return find(which)
    peers = [peer for peer in find_all(which) if peer.folder is not None]
    running = [peer for peer in peers if peer.folder is not None and holder(peer.folder) is not Holder.NOBODY]
    candidates = [(peer, peer.last()) for peer in running or peers]
    bootstraps = [peer for peer, status in candidates if status.role == "bootstrap"]
    is_one_run = len({status.run_sha256 for _, status in candidates if status.run_sha256}) == 1
    return bootstraps[0] if is_one_run and len(bootstraps) == 1 else find(which)


def _run_toml(folder: Path) -> bytes:
    """Return the run file that the peer keeps; empty without one."""
    from swarmtrain.run import MAX_RUN_FILE_BYTES

    try:
        with (folder / "run.toml").open("rb") as file:
            data = file.read(MAX_RUN_FILE_BYTES + 1)
    except OSError:
        return b""
    return data if len(data) <= MAX_RUN_FILE_BYTES else b""

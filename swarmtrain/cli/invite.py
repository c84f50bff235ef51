"""`swarmtrain invite`: print the line to hand out, from any peer that runs on this machine."""

from __future__ import annotations

from pathlib import Path

import click

from swarmtrain.cli.common import example
from swarmtrain.cli.output import echo


@click.command(name="invite", epilog=example("swarmtrain invite", "swarmtrain invite --dir ~/swarm"))
@click.option("--dir", "directory", type=click.Path(file_okay=False, path_type=Path), metavar="FOLDER", help="The peer's folder.  [default: those of this user's running peers]")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object for each peer.")
def command(directory: Path | None, as_json: bool) -> None:
    """Print the line with which others join.

    The invite leads to a peer that runs on this machine. Every volunteer serves the run, so a swarm outlives its
    bootstrap. If several peers run, each one's name stands above its line.
    """
    import contextlib
    import json

    import platformdirs

    from swarmtrain.cli.peers import LocalPeer
    from swarmtrain.errors import InviteError, UserError
    from swarmtrain.peer.lifecycle.folder import running_invite
    from swarmtrain.words import one_line

    if directory is not None:
        folders = [directory]
    else:
        home = platformdirs.user_data_path("swarmtrain")
        folders = sorted(path for path in home.glob("*") if path.is_dir())
    from swarmtrain.network.discovery.invite import parse_invite, where_it_serves

    found = {folder: line for folder in folders if (line := running_invite(folder)) is not None}
    if not found:
        if directory is not None:
            raise UserError(
                f"no peer runs in {directory}; start it again, or give the folder of one that runs",
                code="peer-not-running",
            )
        raise UserError(
            "no peer of this user runs in the usual folders; give its folder with --dir", code="peer-not-running"
        )
    for folder, line in found.items():
        status, words = LocalPeer(folder=folder).last(), ""
        with contextlib.suppress(InviteError):  # of a peer of another version
            words = where_it_serves(parse_invite(line))
        if as_json:
            about = {"name": status.name, "run": status.run_name, "note": words}
            echo(json.dumps({"dir": str(folder), "line": line, "invite": line.split()[-1], **about}))
            continue
        if len(found) > 1:
            run = f", run {status.run_name}" if status.run_name else ""
            echo(one_line(f"{status.name or folder.name}{run} ({folder}):"))
        echo(line)
        if words:
            echo(f"note: {words}", err=True)

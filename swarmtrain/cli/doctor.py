"""`swarmtrain doctor`: find what would keep this machine from taking part, and say what to do about it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from swarmtrain.cli.common import addresses, example, peer_name, user_directory

if TYPE_CHECKING:
    from swarmtrain.peer.doctor.doctor import DoctorSettings
    from swarmtrain.peer.doctor.machine import Finding

_COLOURS = {"ok": "green", "warning": "yellow", "problem": "red"}


@click.command(name="doctor", epilog=example("swarmtrain doctor", "swarmtrain doctor INVITE --listen :31337"))
@click.argument("invite", metavar="[INVITE]", required=False)
@click.option("--dir", "directory", type=click.Path(file_okay=False, path_type=Path), metavar="FOLDER", help="Folder that the peer would use.  [default: that of `swarmtrain join`]")  # fmt: skip
@click.option(
    "--name",
    default="",
    callback=peer_name,
    metavar="NAME",
    help="Name of the peer, by which `swarmtrain join` finds its folder.",
)
@click.option("--listen", callback=addresses, multiple=True, metavar="ADDRESS", help="Address at which the peer would listen; may be repeated.  [default: any free port]")  # fmt: skip
@click.option("--announce", callback=addresses, multiple=True, metavar="ADDRESS", help="Address that the peer would advertise, such as a router's forwarded port; may be repeated.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Write one JSON object for each check.")
def command(
    invite: str | None,
    directory: Path | None,
    name: str,
    listen: tuple[str, ...],
    announce: tuple[str, ...],
    as_json: bool,
) -> None:
    """Check this machine and its connection to a run.

    For each check, prints whether all is well and, if not, what to do. Joins no run, leaves nothing behind, and ends
    within half a minute. The exit code is 1 if there is a problem. What a run takes of this machine, and whether its
    text is here, `join` says before it fetches anything large.
    """
    from swarmtrain.peer.control.logs import log_to_terminal
    from swarmtrain.peer.doctor.doctor import DoctorSettings

    log_to_terminal("error")
    settings = DoctorSettings(
        invite=invite,
        directory=directory or user_directory("volunteer", name),
        listen=listen,
        announce=announce,
    )
    if examine(settings, as_json):
        click.get_current_context().exit(1)


def examine(settings: DoctorSettings, as_json: bool) -> int:
    """Print each finding as it comes; returns the number of problems."""
    import signal
    import sys
    from collections import Counter

    from swarmtrain.peer.doctor.doctor import Doctor

    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)  # SIGTERM too must clean up
    progress = _Progress(sys.stderr.isatty() and not as_json)
    counts: Counter[str] = Counter()
    try:
        with Doctor(settings) as doctor:
            for finding in doctor.findings(progress.show):
                progress.clear()
                counts[finding.level] += 1
                (_say_json if as_json else _say)(finding)
    finally:
        progress.clear()
        signal.signal(signal.SIGTERM, previous)
    if not as_json:
        from swarmtrain.words import counted

        parts = [counted(counts[level], level) for level in ("problem", "warning") if counts[level]]
        click.echo(", ".join(parts) or "all is well")
    return counts["problem"]


class _Progress:
    """Line on a terminal that names the check in progress."""

    def __init__(self, shown: bool) -> None:
        self._shown = shown

    def show(self, name: str) -> None:
        if self._shown:
            click.echo(f"\r\x1b[K         {name} ...", nl=False, err=True)

    def clear(self) -> None:
        if self._shown:
            click.echo("\r\x1b[K", nl=False, err=True)


def _say(finding: Finding) -> None:
    from swarmtrain.words import one_line

    mark = click.style(f"{finding.level:<8}", fg=_COLOURS[finding.level])
    click.echo(f"{mark} {finding.check:<10} {one_line(finding.found)}")
    if finding.advice:
        click.echo(f"{'':<19} -> {one_line(finding.advice)}")


def _say_json(finding: Finding) -> None:
    import dataclasses
    import time

    from swarmtrain.events import CheckEvent, stamped, to_json_line

    click.echo(to_json_line(stamped(CheckEvent(**dataclasses.asdict(finding)), time.time(), "", "")))

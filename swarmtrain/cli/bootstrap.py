"""`swarmtrain bootstrap`: publish a run, print the invite, serve and archive."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from swarmtrain.cli.common import (
    LINK_OPTIONS,
    PeerOptions,
    asking,
    errors_as_events,
    example,
    open_sink,
    peer_directory,
    peer_options,
    say_the_end,
    user_directory,
)
from swarmtrain.cli.kept_options import KeptOption, restore
from swarmtrain.cli.page_address import CommandWithPage
from swarmtrain.cli.run_files import GivenRun, run_argument, run_examples

if TYPE_CHECKING:
    from swarmtrain.events import Event
    from swarmtrain.peer.lifecycle.node import Emit


@click.command(
    name="bootstrap",
    cls=CommandWithPage,
    epilog=run_examples()
    + example(
        "swarmtrain bootstrap stdlib-gpt --web",
        "swarmtrain bootstrap run.toml --dir my-run --listen :31337 --announce 203.0.113.5:31337",
    ),
)
@run_argument
@click.option("--wait-for", cls=KeptOption, type=click.IntRange(1, 10_000), default=None, metavar="N", help="Begin round 0 when N volunteers are present.  [default: the run's merge.min_peers]")  # fmt: skip
@click.option("--data", cls=KeptOption, type=click.Path(file_okay=False, exists=True, path_type=Path), metavar="FOLDER", help="Folder of your own text, to which the run's data paths are relative.  [default: the run file's folder]")  # fmt: skip
@LINK_OPTIONS[0]
@LINK_OPTIONS[1]
@click.option("--invite-file", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE", help="Write the invite to FILE too, for `join --invite-file FILE`.")  # fmt: skip
@click.option("--no-samples", cls=KeptOption, is_flag=True, help="Do not measure the archived model and let it write text while the run goes on, which takes a twentieth of one processor at most.")  # fmt: skip
@peer_options
def command(
    given: GivenRun,
    wait_for: int | None,
    data: Path | None,
    up_mbit: float | None,
    down_mbit: float | None,
    invite_file: Path | None,
    no_samples: bool,
    options: PeerOptions,
) -> None:
    """Publish RUN.toml, print an invite, serve and archive the run.

    The bootstrap does not train: to train, join the run with the line it prints, on this or another machine. To
    continue the same run with the same identity, start it again with the same --dir and run file.
    """
    with errors_as_events(options.json, options.name):
        run = given.load()
        directory = peer_directory(options, f"bootstrap-{run.run.name}")
        kept, started = restore(directory, ("bootstrap", given.to_start_again))
    options, wait_for = options.with_kept(kept), kept.get("wait_for", wait_for)
    data, up_mbit, down_mbit = kept.get("data", data), kept.get("up_mbit", up_mbit), kept.get("down_mbit", down_mbit)
    if wait_for is not None:
        run = run.model_copy(update={"merge": run.merge.model_copy(update={"min_peers": wait_for})})
    import platformdirs

    from swarmtrain.cli.background import outputs_to_log
    from swarmtrain.cli.display import PeerDisplay
    from swarmtrain.cli.page_process import PageProcess
    from swarmtrain.peer.bootstrap import run_bootstrap
    from swarmtrain.peer.lifecycle.node import PeerSettings
    from swarmtrain.protocol.limits import Limits

    options.stop.begin()
    settings = PeerSettings(
        directory=directory,
        name=options.name or "bootstrap",
        cache_folder=platformdirs.user_cache_path("swarmtrain"),
        listen=options.listen,
        announce=options.announce,
        limits=Limits(up_mbit=up_mbit, down_mbit=down_mbit),
        log_descriptors=outputs_to_log(),
        control=options.control,
        metrics=options.metrics,
        report_to=options.report_to,
        only_announced=options.only_announced,
        samples_archive=not kept.get("no_samples", no_samples),
        started=started,
    )

    def make_display() -> PeerDisplay:
        return PeerDisplay(f"swarmtrain bootstrap: {run.run.name}", run.run.total_tokens)

    def live(agreed: Mapping[str, Any]) -> None:
        with PageProcess(options.web, directory) as page, open_sink(options, make_display, directory) as sink:
            by_that = dataclasses.replace(settings, **agreed, show_status=page.started_by(sink.look_at))
            emit = sink if invite_file is None else _also_to_file(sink, invite_file)
            done = run_bootstrap(run, data or given.base, by_that, emit, options.stop)
            emit(done)
        say_the_end(done, directory, options, user_directory(f"bootstrap-{run.run.name}", options.name))

    asking(options, live)


def _also_to_file(emit: Emit, path: Path) -> Emit:
    """Return an `emit` that first writes the invite to a file."""
    from swarmtrain.events import InviteEvent, WarningEvent
    from swarmtrain.network.files import write_atomically

    def told(event: Event) -> None:
        if isinstance(event, InviteEvent):
            try:
                write_atomically(path, (event.invite + "\n").encode())
            except OSError as error:
                emit(
                    WarningEvent(
                        message=f"the invite could not be written to {path}: {error.strerror}; make room, or give "
                        "another file with --invite-file",
                        code="invite-not-written",
                    )
                )
        emit(event)

    return told

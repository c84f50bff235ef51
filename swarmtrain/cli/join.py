"""`swarmtrain join`: the one line a volunteer types."""

from __future__ import annotations

from pathlib import Path

import click

from swarmtrain.cli.common import PeerOptions, errors_as_events, example, open_sink, peer_directory, peer_options

__all__ = ["command"]


@click.command(
    name="join",
    epilog=example("swarmtrain join INVITE", "swarmtrain join INVITE --name anna --threads 2 --dir ~/swarm"),
)
@click.argument("invite", metavar="INVITE")
@click.option(
    "--threads",
    type=click.IntRange(1),
    default=None,
    metavar="N",
    help="Processor threads to train with.  [default: all cores]",
)
@click.option(
    "--data",
    type=click.Path(file_okay=False, exists=True, path_type=Path),
    metavar="FOLDER",
    help="Where your own files are, for runs that train on text or JSON lines.",
)
@peer_options
def command(invite: str, threads: int | None, data: Path | None, options: PeerOptions) -> None:
    """Join the run of INVITE and train until it ends.

    Fetches the run, checks it against the hash in the invite, and trains on this machine. Nothing that arrives is
    executed. Ctrl-C once leaves cleanly, twice at once.
    """
    from swarmtrain.network.invite import parse_invite

    with errors_as_events(options.json, options.name):
        parsed = parse_invite(invite)
    import platformdirs

    from swarmtrain.cli.background import outputs_to_log
    from swarmtrain.cli.display import PeerDisplay
    from swarmtrain.peer.common import PeerSettings
    from swarmtrain.peer.volunteer import run_volunteer

    options.stop.check()
    settings = PeerSettings(
        directory=_free_directory(options),
        name=options.name,
        listen=options.listen,
        announce=options.announce,
        data_folder=data,
        cache_folder=platformdirs.user_cache_path("swarmtrain"),
        threads=threads or 0,
        log_descriptors=outputs_to_log(),
    )
    with open_sink(options, lambda: PeerDisplay("swarmtrain join"), settings.directory) as emit:
        emit(run_volunteer(parsed, settings, emit, options.stop))


def _free_directory(options: PeerOptions) -> Path:
    """`--dir`; else this user's folder for volunteers, or a numbered one beside it while that is in use."""
    from swarmtrain.peer.folder import is_in_use

    folder = peer_directory(options, "volunteer")
    if options.dir is not None:
        return folder
    number = 2
    candidate = folder
    while is_in_use(candidate):
        candidate = folder.with_name(f"{folder.name}-{number}")
        number += 1
    return candidate

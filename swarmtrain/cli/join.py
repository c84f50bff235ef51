"""`swarmtrain join`: take part in a run, as the one line that a volunteer types."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from swarmtrain.cli.background import is_the_background, say
from swarmtrain.cli.common import (
    LINK_OPTIONS,
    PeerOptions,
    asking,
    errors_as_events,
    example,
    finite,
    limit,
    open_sink,
    peer_directory,
    peer_options,
    say_the_end,
    user_directory,
)
from swarmtrain.cli.device_options import DeviceOptions, device_options
from swarmtrain.cli.kept_options import KeptOption, restore
from swarmtrain.cli.option_errors import OptionError, OptionsError
from swarmtrain.cli.page_address import CommandWithPage

if TYPE_CHECKING:
    from swarmtrain.events import Event
    from swarmtrain.network.discovery.invite import Invite
    from swarmtrain.network.snapshots.store import NumServed
    from swarmtrain.peer.lifecycle.node import Emit
    from swarmtrain.peer.lifecycle.stop import StopFlag
    from swarmtrain.protocol.limits import Limits

_F = TypeVar("_F", bound=Callable[..., Any])
_POLL_INTERVAL_S = 0.5


def _stages(ctx: click.Context, param: click.Parameter, value: str) -> tuple[int, ...]:
    try:
        return tuple(sorted({int(part) for part in value.split(",") if part}))
    except ValueError:
        raise OptionError(
            f"{value} is not a list of stages; write their numbers, such as 0,1", ctx, param, code="bad-stages"
        ) from None


_SCOPE = (
    click.option("--threads", cls=KeptOption, type=click.IntRange(1, 4096), metavar="N", help="Processor threads to train with.  [default: all cores]"),
    click.option("--memory", cls=KeptOption, callback=limit("parse_size"), default="none", metavar="SIZE", help="Memory this peer may use, such as 4GB; none: no limit. If the model is cut into stages, the peer holds as many as fit.  [default: none]"),
    click.option("--nice", cls=KeptOption, type=click.IntRange(0, 19), metavar="N", help="Processor priority. 0: the same as other programs; 19: only idle time.  [default: inherited]"),
    click.option("--only-when-idle", cls=KeptOption, is_flag=True, help="Pause while other programs use the processors."),
    click.option("--gpu-share", cls=KeptOption, type=click.IntRange(1, 100), default=100, show_default=True, metavar="PCT", help="Percentage of the graphics card's time to train for; the peer rests after each step."),
    click.option("--gpu-any-time", cls=KeptOption, is_flag=True, help="Train while other programs use the graphics card, too. Without it the peer pauses until they have not used it for a minute."),
    click.option("--on-battery", cls=KeptOption, is_flag=True, help="Train on battery, too. Without it a laptop pauses until it is plugged in."),
    click.option("--max-temperature", cls=KeptOption, callback=limit("parse_temperature"), default="auto", show_default=True, metavar="C", help="Pause when the graphics card, or without one the processor, has so many degrees Celsius; none: never; auto: shortly before the card would slow itself down."),
    click.option("--hours", cls=KeptOption, callback=limit("parse_hours"), default="any", metavar="FROM-TO", help="Hours in which to train, local time, such as 22-7 or 12-13,18:30-8; any: always.  [default: any]"),
    *LINK_OPTIONS,
    click.option("--slowdown", cls=KeptOption, callback=limit("parse_slowdown"), metavar="F", help="To rehearse an unequal swarm: train F times slower than this machine could, such as 2.6. Uses one thread unless --threads is given; less exact with more.  [default: 1]"),
)  # fmt: skip


_BY_NAME = ("gpu_share", "gpu_any_time", "on_battery", "max_temperature")
"""Limits whose options have the names of their fields."""


def _limit_options(function: _F) -> _F:
    """Give a command the options that limit its use of the machine; it receives them as one argument, `limits: Limits`."""

    @functools.wraps(function)
    def bundled(**values: Any) -> Any:
        from swarmtrain.protocol.limits import Limits

        slowdown = values.pop("slowdown")
        limits = Limits(
            threads=values.pop("threads") or (0 if slowdown is None else 1),
            memory_bytes=values.pop("memory"),
            nice=values.pop("nice"),
            only_when_idle=values.pop("only_when_idle"),
            **{name: values.pop(name) for name in _BY_NAME},
            hours=values.pop("hours"),
            up_mbit=values.pop("up_mbit"),
            down_mbit=values.pop("down_mbit"),
            slowdown=slowdown or 1.0,
        )
        return function(limits=limits, **values)

    decorated: Any = bundled
    for option in reversed(_SCOPE):
        decorated = option(decorated)
    return decorated  # type: ignore[no-any-return]


@click.command(
    name="join",
    cls=CommandWithPage,
    epilog=example(
        "swarmtrain join INVITE",
        "swarmtrain join INVITE --name anna --threads 2 --dir ~/swarm",
        "swarmtrain join INVITE --background --nice 10 --hours 22-7",
        "swarmtrain join INVITE --device cuda:1 --vram 8GB",
        "swarmtrain join INVITE --gpu-share 50 --max-temperature 80",
        "swarmtrain join INVITE --slowdown 2.6",
        "swarmtrain join INVITE --web",
        "swarmtrain join INVITE --rank 4",
    ),
)
@click.argument("words", metavar="[INVITE]", nargs=-1)
@click.option("--invite-file", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE", help="Read the invite from FILE; wait until FILE holds one.")  # fmt: skip
@_limit_options
@device_options(KeptOption)
@click.option(
    "--data",
    cls=KeptOption,
    type=click.Path(file_okay=False, exists=True, path_type=Path),
    metavar="FOLDER",
    help="Folder of your own text, for runs that train on text or JSON lines.",
)
@click.option("--model-dir", cls=KeptOption, type=click.Path(file_okay=False, exists=True, path_type=Path), metavar="FOLDER", help="Folder with the files of the run's model, which are then not fetched if they are the run's.")  # fmt: skip
@click.option("--disk", cls=KeptOption, callback=limit("parse_size"), default="20GB", show_default=True, metavar="SIZE", help="Space on the disk that the run may take; none: what is free. If it takes more, `join` asks, or ends if nobody is at the terminal.")  # fmt: skip
@click.option("--rank", cls=KeptOption, type=click.IntRange(1, 1024), metavar="N", help="If the run trains an adapter: train only N of its components in each round, other ones in the next. Fewer gradients to compute and to send.  [default: all]")  # fmt: skip
@click.option("--fail-pulls", type=click.FloatRange(0, 100), callback=finite, default=0.0, hidden=True, metavar="PCT", help="For a rehearsal: percentage of the pulls from this peer that break off midway; the same pulls for the same --name.")  # fmt: skip
@click.option("--first-stages", callback=_stages, default="", hidden=True, metavar="N,...", help="For a rehearsal: stages of a pipeline to take first, whatever the run needs.")  # fmt: skip
@peer_options
def command(
    words: tuple[str, ...],
    invite_file: Path | None,
    limits: Limits,
    on: DeviceOptions,
    data: Path | None,
    model_dir: Path | None,
    disk: int,
    rank: int | None,
    fail_pulls: float,
    first_stages: tuple[int, ...],
    options: PeerOptions,
) -> None:
    """Join the run of INVITE and train until it ends.

    Fetches the run, checks it against the hash in the invite, and trains on this machine: on a graphics card if torch
    shows one that works. Never executes anything it receives. Press Ctrl-C once to leave cleanly, twice to stop at once.

    Without INVITE, and with the same --name and --dir, it continues the run of its folder, through the peers it knew.
    The folder remembers --data, --model-dir, --rank, the device, the addresses, the limits and a pause; an option given anew replaces what it remembers.
    `swarmtrain limits` changes the limits while the peer runs.

    Before anything large is fetched, it says how much memory and disk the run takes.
    """
    with errors_as_events(options.json, options.name):
        from swarmtrain.network.discovery.invite import parse_invite

        invite = " ".join(words)  # perhaps the whole line that was handed out, or an invite with a line break in it
        if invite and invite_file is not None:
            raise OptionsError(
                "INVITE and --invite-file are both given; give only one of them", code="options-conflict"
            )
        invite = invite or _word_in(invite_file, options.stop)
        parsed = parse_invite(invite) if invite else None
        directory = free_directory(options, parsed.run_sha256 if parsed is not None else None)
        parsed = parsed or _of_folder(directory)
        kept, started = restore(directory, ("join",))
        options = options.with_kept(kept)
        limits, on, data = _with_kept(limits, kept), on.with_kept(kept), kept.get("data", data)
        model_dir, rank = kept.get("model_dir", model_dir), kept.get("rank", rank)
        disk = kept.get("disk", disk)
    import platformdirs

    from swarmtrain.cli.background import outputs_to_log
    from swarmtrain.cli.display import PeerDisplay
    from swarmtrain.cli.page_process import PageProcess
    from swarmtrain.peer.lifecycle.node import PeerSettings
    from swarmtrain.peer.volunteer import run_volunteer

    options.stop.begin()
    settings = PeerSettings(
        directory=directory,
        name=options.name,
        listen=options.listen,
        announce=options.announce,
        data_folder=data,
        cache_folder=platformdirs.user_cache_path("swarmtrain"),
        limits=limits,
        device=on.device,
        precision=on.precision,
        compile=on.compile,
        vram_bytes=on.vram_bytes,
        base_bits=int(on.base_bits),
        adapter_rank=rank or 0,
        disk_bytes=disk,
        log_descriptors=outputs_to_log(),
        control=options.control,
        metrics=options.metrics,
        report_to=options.report_to,
        only_announced=options.only_announced,
        checks_reach=options.check_reach,
        num_served_by=_serving(fail_pulls / 100),
        model_folder=model_dir,
        first_stages=first_stages,
        started=started,
    )

    def live(agreed: Mapping[str, Any]) -> None:
        make_display = functools.partial(PeerDisplay, "swarmtrain join")
        with PageProcess(options.web, directory) as page, open_sink(options, make_display, directory) as emit:
            show_status = page.started_by(emit.look_at)
            by_that = dataclasses.replace(settings, **agreed, show_status=show_status)
            shown = emit if options.json or is_the_background() else _in_short(emit)
            done = run_volunteer(parsed, by_that, shown, options.stop)
            emit(done)
        say_the_end(done, directory, options, user_directory("volunteer", options.name))

    asking(options, live)


def _in_short(emit: Emit) -> Emit:
    """Return an `emit` for a person who joins: without the invite, which `swarmtrain invite` prints, and before training
    without a line for each peer that is here already, since `joined` counts them."""
    from swarmtrain.events import InviteEvent, PeerJoinedEvent, StartedEvent

    left_out: tuple[type, ...] = (InviteEvent, PeerJoinedEvent)

    def shown(event: Event) -> None:
        nonlocal left_out
        if isinstance(event, StartedEvent):
            left_out = (InviteEvent,)
        if not isinstance(event, left_out):
            emit(event)

    return shown


def _with_kept(limits: Limits, kept: Mapping[str, Any]) -> Limits:
    """Return `limits` with those that the folder remembers."""
    fields = {"memory": "memory_bytes"}
    names = ("threads", "memory", "nice", "only_when_idle", "hours", "up_mbit", "down_mbit", "slowdown", *_BY_NAME)
    changed = limits.with_changes(**{fields.get(name, name): kept[name] for name in names if name in kept})
    return changed if changed.threads or changed.slowdown == 1 else changed.with_changes(threads=1)


def _serving(fail_share: float) -> Callable[[str], NumServed]:
    """Return a function from a peer's name to the chunks of each pull that it serves: all of them, or in a rehearsal
    sometimes fewer."""
    from swarmtrain.network.links.proxy import FailingPulls
    from swarmtrain.network.snapshots.store import all_chunks

    return lambda name: FailingPulls(fail_share, name).num_served if fail_share else all_chunks


def _word_in(path: Path | None, stop: StopFlag) -> str:
    """Read the invite from a file, alone or in a line of `swarmtrain invite`; waits until there is one.

    Empty without `path`. Raises OptionsError if the file cannot be read.
    """
    from swarmtrain.network.discovery.invite import invite_in

    if path is None:
        return ""
    told = False
    while True:
        try:
            found = invite_in(path.read_text())
        except FileNotFoundError:
            found = ""
        except (OSError, UnicodeDecodeError) as error:
            raise OptionsError(
                f"--invite-file: {path} cannot be read: {error}; give a file with the invite", code="file-unreadable"
            ) from None
        if found:
            return found
        if not told:
            say(f"waiting for an invite in {path}")
            told = True
        stop.sleep(_POLL_INTERVAL_S)


def _of_folder(directory: Path) -> Invite:
    """Return the folder's run and the peers known there. Raises UserError if the folder has no run."""
    from swarmtrain.errors import UserError
    from swarmtrain.network.discovery.invite import Invite
    from swarmtrain.peer.lifecycle.folder import PeerFolder

    folder = PeerFolder(directory)
    kept = folder.kept_run()
    if kept is None:
        raise UserError(
            f"{directory} has no run to continue; give the invite, or the run's folder with --dir",
            code="nothing-to-resume",
        )
    return Invite(kept.sha256, folder.kept_peers())


def free_directory(options: PeerOptions, run_sha256: str | None) -> Path:
    """Choose the peer's folder: `--dir`, else this user's folder for volunteers, or a numbered one beside it.

    A numbered one is used while the usual one is in use or holds another run than `run_sha256`. Without a run and a
    name, see `_stopped`. Raises UserError if `--dir` holds another run.
    """
    from swarmtrain.errors import UserError
    from swarmtrain.peer.lifecycle.folder import PeerFolder
    from swarmtrain.peer.lifecycle.folder_lock import is_in_use

    folder = peer_directory(options, "volunteer")
    is_other = run_sha256 is not None and PeerFolder(folder).kept_sha256() not in (None, run_sha256)
    if options.dir is not None:
        if is_other:
            raise UserError(
                f"{folder} holds another run, with its checkpoints and its model: give another --dir",
                code="folder-of-another-run",
            )
        return folder
    if run_sha256 is None and not options.name and (stopped := _stopped(folder)):
        return stopped
    numbered = (folder.with_name(f"{folder.name}-{number}") for number in itertools.count(2))
    for candidate in itertools.chain([folder], numbered):
        kept = None if run_sha256 is None else PeerFolder(candidate).kept_sha256()
        if kept in (None, run_sha256) and not is_in_use(candidate):
            break
    if is_other:
        say(f"{folder} holds another run: this one uses {candidate}")
    return (
        candidate if run_sha256 or candidate.exists() else folder
    )  # without a run there is nothing to continue in a new folder


def _stopped(folder: Path) -> Path | None:
    """Choose where to continue without an invite and a name: `folder`, else the numbered one beside it used last.

    Only folders with a run that no peer uses count. Prints which folder it is, and which others are stopped. None if
    there is no run. Raises UserError if a peer runs in each of them.
    """
    from swarmtrain.errors import UserError
    from swarmtrain.peer.lifecycle.folder import PeerFolder
    from swarmtrain.peer.lifecycle.folder_lock import is_in_use

    beside = sorted(folder.parent.glob(f"{folder.name}-*"), key=_last_used, reverse=True)
    ours = [path for path in (folder, *beside) if PeerFolder(path).kept_sha256() is not None]
    free = [path for path in ours if not is_in_use(path)]
    if ours and not free:
        running = ", ".join(str(path) for path in ours)
        raise UserError(
            f"all volunteers of this user are running ({running}); give an invite to start another",
            code="all-volunteers-run",
        )
    if free and (len(ours) > 1 or free[0] != folder):
        others = ", ".join(f"`swarmtrain join --dir {shlex.quote(str(path))}`" for path in free[1:])
        say(f"continuing in {free[0]}" + (f"; also stopped: {others}" if others else ""))
    return free[0] if free else None


def _last_used(folder: Path) -> float:
    """Return the Unix time at which a peer last ran in a folder; 0 if none did."""
    times = [path.stat().st_mtime for name in ("status.json", "run.toml") if (path := folder / name).exists()]
    return max(times, default=0.0)

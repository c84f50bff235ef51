"""`swarmtrain local`: run a whole swarm on this machine."""

from __future__ import annotations

import datetime
import math
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from swarmtrain.cli import swarm_options
from swarmtrain.cli.closing_line import model_line
from swarmtrain.cli.common import example, finite, use_hf_token
from swarmtrain.cli.device_options import DeviceOptions, device_options
from swarmtrain.cli.option_errors import OptionsError
from swarmtrain.cli.output import echo
from swarmtrain.cli.page_address import CommandWithPage, PageAddress, web_option
from swarmtrain.cli.run_files import GivenRun, run_argument, run_examples
from swarmtrain.cli.tracker_options import report_to_option
from swarmtrain.errors import RunTimeError, with_code
from swarmtrain.words import counted, one_line

if TYPE_CHECKING:
    from swarmtrain.cli.common import EventSink
    from swarmtrain.cli.page_process import PageProcess
    from swarmtrain.events import DoneEvent, Event
    from swarmtrain.peer.lifecycle.stop import StopFlag
    from swarmtrain.peer.local.faults import FaultInjection
    from swarmtrain.peer.local.swarm import LocalSwarm
    from swarmtrain.rehearsal import RehearsalFile
    from swarmtrain.run import RunFile

_SAMPLE_TOKENS = 240
_LOST_TIMES = 8
"""Ratio of wanted to existing cores from which answers come so late that peers may be considered lost."""


@click.command(
    name="local",
    cls=CommandWithPage,
    epilog=run_examples()
    + example(
        "swarmtrain local stdlib-gpt --peers 3 --web",
        "swarmtrain local run.toml --peers 4 --compare-alone --dir runs/first",
        "swarmtrain local run.toml --peers 4 --slowdown 2,2.6,5.2,11.4",
        "swarmtrain local run.toml --rtt 100 --link-up 10 --link-down 10 --fail-pulls 5",
        "swarmtrain local run.toml --peers 2 --device cuda --vram 8GB",
        "swarmtrain local run.toml --peers 3 --ranks 4,8,16",
        "swarmtrain local run.toml --peers 6 --faults examples/rehearsals/bad-internet.toml --churn 60",
    ),
)
@run_argument
@click.option(
    "--peers",
    type=click.IntRange(1, 256),
    default=3,
    show_default=True,
    metavar="N",
    help="Number of volunteers to start.",
)
@click.option(
    "--threads",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    metavar="N",
    help="Processor threads of each volunteer.",
)
@device_options(click.Option)
@click.option("--slowdown", "slowdowns", callback=swarm_options.slowdowns, metavar="F,...", help="To rehearse an unequal swarm: how many times slower each volunteer trains than this machine could, such as 2,2.6,5.2,11.4 for four. Less exact with more than one thread.  [default: 1 for each]")  # fmt: skip
@click.option("--ranks", callback=swarm_options.ranks, metavar="N,...", help="If the run trains an adapter: how many of its components each volunteer trains in a round, such as 4,8,16 for three.  [default: all]")  # fmt: skip
@swarm_options.RTT
@swarm_options.LINK_UP
@swarm_options.LINK_DOWN
@click.option("--fail-pulls", type=click.FloatRange(0, 100), callback=finite, default=0.0, metavar="PCT", help="Percentage of the volunteers' transfers that break off midway.  [default: 0]")  # fmt: skip
@swarm_options.JITTER
@swarm_options.LOSS
@swarm_options.CHURN
@click.option("--faults", type=click.Path(dir_okay=False, exists=True, path_type=Path), metavar="FILE.toml", help="Rehearsal file with links, churn and timed faults; the options above override it.")  # fmt: skip
@click.option("--compare-alone", is_flag=True, help="Afterwards, train one volunteer alone at full speed, on as many tokens as the fastest volunteer.")  # fmt: skip
@click.option("--data", type=click.Path(file_okay=False, exists=True, path_type=Path), metavar="FOLDER", help="Folder of your own text, to which the run's data paths are relative.  [default: the run file's folder]")  # fmt: skip
@click.option("--model-dir", type=click.Path(file_okay=False, exists=True, path_type=Path), metavar="FOLDER", help="Folder with the files of the run's model, for the volunteers; see `swarmtrain join`.")  # fmt: skip
@use_hf_token()
@click.option("--dir", "directory", type=click.Path(file_okay=False, path_type=Path), metavar="FOLDER", help="Folder of the peers' files and the trained model.  [default: runs/NAME-TIME]")  # fmt: skip
@report_to_option(click.Option)
@click.option("--json", "as_json", is_flag=True, help="Write the peers' events as JSON lines to standard output.")
@web_option(click.Option, "Serve a page for browsers that shows the swarm.")
@click.option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error"]),
    default="warning",
    show_default=True,
    help="Write log messages of at least this severity to the peers' log files.",
)
def command(
    given: GivenRun,
    peers: int,
    threads: int,
    on: DeviceOptions,
    slowdowns: tuple[float, ...],
    ranks: tuple[int, ...],
    rtt: float | None,
    link_up: float | None,
    link_down: float | None,
    fail_pulls: float,
    jitter: float | None,
    loss: float | None,
    churn: float | None,
    faults: Path | None,
    compare_alone: bool,
    data: Path | None,
    model_dir: Path | None,
    directory: Path | None,
    report_to: tuple[str, ...],
    as_json: bool,
    web: PageAddress | None,
    log_level: str,
) -> None:
    """Run a bootstrap and volunteers here until the run ends.

    The peers are real processes that talk over real sockets; one display shows them all. At the end it prints a sample
    of generated text (of conversations, an answer to a held-out question), each volunteer's share and the held-out
    loss. Press Ctrl-C once to end the volunteers and then the bootstrap, twice to end all at once. To continue the run,
    start it again with the same --dir.
    """
    from swarmtrain.cli.common import errors_as_events
    from swarmtrain.cli.stop_signals import stop_on_signals
    from swarmtrain.peer.lifecycle.stop import Interrupted

    if slowdowns and len(slowdowns) != peers:
        factors = "1 factor" if len(slowdowns) == 1 else f"{len(slowdowns)} factors"
        raise OptionsError(
            f"--slowdown has {factors} for {peers} volunteers: give one for each, or --peers {len(slowdowns)}",
            code="slowdown-count",
        )
    if ranks and len(ranks) != peers:
        raise OptionsError(
            f"--ranks has {counted(len(ranks), 'rank')} for {peers} volunteers: give one for each, or --peers "
            f"{len(ranks)}",
            code="rank-count",
        )
    with stop_on_signals() as stop:
        with errors_as_events(as_json, ""):
            on.check_here()  # each volunteer would find it out only after it has fetched the run
            run = given.load()
            on.check_run(run)
            for rank in ranks:
                run.adapter.groups_worth(rank)
            links = swarm_options.links_said(rtt, link_up, link_down, jitter, loss)
            rehearsal = _rehearsal(faults, links, churn, _names(peers))
        most_threads = max(threads, on.device.num_host_ranks)
        if crowded := crowded_in_words(peers, most_threads, slowdowns, _num_cores()):
            echo(with_code(f"warning: {crowded}", "crowded-machine"), err=True)
        if directory is None:
            directory = Path("runs") / f"{run.run.name}-{datetime.datetime.now():%Y%m%d-%H%M%S}"
        directory.mkdir(parents=True, exist_ok=True)
        base = data or given.base
        # Somebody waits for it: it must not pause, nor take the volunteers' own use of a card for other programs'.
        undisturbed = ["--on-battery", "--gpu-any-time"]
        common = ["--threads", str(threads), *on.words(), *undisturbed, "--data", str(base), "--log-level", log_level]
        common += [f"--fail-pulls={fail_pulls}"] if fail_pulls else []
        common += ["--model-dir", str(model_dir)] if model_dir is not None else []
        tracked = [f"--report-to={tracker}" for tracker in report_to]
        common += tracked
        if "tensorboard" in report_to:
            echo(f"curves of all peers: tensorboard --logdir {shlex.quote(str(directory))}", err=True)
        extra = [common + ([f"--slowdown={factor}"] if slowdowns else []) for factor in slowdowns or peers * (1.0,)]
        extra = [
            each + ([f"--rank={rank}"] if rank else []) for each, rank in zip(extra, ranks or peers * (0,), strict=True)
        ]
        plan = _Plan([given.argument, "--data", str(base), *tracked], run, directory, extra, as_json, rehearsal, web)
        try:
            with _page(plan) as page:
                trained = _train(plan, stop, page)
                _show_sample(directory, as_json, on)
                for part in trained.parts.values():
                    echo(part.line(), err=as_json)
                line = f"held-out loss {trained.loss}"
                if compare_alone:
                    try:
                        part, loss = _alone(directory, base, trained, on, stop)
                    except RunTimeError:
                        echo(line, err=as_json)
                        raise
                    echo(part.line(), err=as_json)
                    line += f"; one volunteer alone {loss:.3f}"
        except Interrupted:
            echo(f"stopped; the peers' files are in {directory}; to continue:", err=True)
            echo(f"  {_again(sys.argv[1:], directory)}", err=True)
            return
        echo(line, err=as_json)


def _again(words: Sequence[str], directory: Path) -> str:
    """Return what to type to continue in `directory`, if `words` were typed after `swarmtrain`."""
    kept: list[str] = []
    is_folder = False
    for word in words:
        if not (is_folder or word == "--dir" or word.startswith("--dir=")):
            kept.append(word)
        is_folder = word == "--dir"
    return shlex.join(["swarmtrain", *kept, "--dir", str(directory)])


def _num_cores() -> int:
    """Return the number of processor cores that this process and its children may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def crowded_in_words(num_volunteers: int, threads: int, slowdowns: Sequence[float], num_cores: int) -> str:
    """Warn if the volunteers want more cores than there are, with what happens and what would fit; else empty."""
    wanted = threads * (sum(1 / factor for factor in slowdowns) if slowdowns else num_volunteers)
    if wanted <= num_cores:
        return ""
    cores = "1 core" if num_cores == 1 else f"{num_cores} cores"
    times = wanted / num_cores
    what = (
        f"{num_volunteers} volunteers want {wanted:.3g} cores and this machine has {cores}: they take turns, and each "
        f"trains {times:.1f} times slower than it is told to"
    )
    if slowdowns:
        fitting = ",".join(f"{math.ceil(10 * factor * times) / 10:g}" for factor in slowdowns)
        return f"{what}; --slowdown {fitting} fits"
    fewer = f"--peers {num_cores // threads} fits" if threads <= num_cores else f"--threads {num_cores} is the most"
    lost = ", and may consider each other lost" if times >= _LOST_TIMES else ""
    return f"{what}{lost}; {fewer}"


@dataclass(frozen=True)
class _Plan:
    run_arguments: list[str]
    """Arguments of the bootstrap: the run, and where its data are."""
    run: RunFile
    directory: Path
    extra: list[list[str]]
    """Options of each volunteer's `join`."""
    as_json: bool
    rehearsal: RehearsalFile | None
    """None if the internet is not rehearsed."""
    web: PageAddress | None = None
    """Where the swarm's page is served; None for no page."""

    @property
    def names(self) -> list[str]:
        """Names of the volunteers."""
        return _names(len(self.extra))


def _names(num_volunteers: int) -> list[str]:
    return [f"volunteer-{number}" for number in range(1, num_volunteers + 1)]


def _rehearsal(
    path: Path | None, said: dict[str, float], churn_s: float | None, names: list[str]
) -> RehearsalFile | None:
    """Combine the rehearsal file with the options that override it; None if there is neither.

    Raises UserError if it does not fit these volunteers.
    """
    from swarmtrain.rehearsal import RehearsalFile, fault_events, load_rehearsal

    if path is None and not said and churn_s is None:
        return None
    read = load_rehearsal(path) if path is not None else RehearsalFile()
    churn = read.churn if churn_s is None else read.churn.model_copy(update={"every_s": churn_s})
    rehearsal = read.model_copy(update={"links": read.links.model_copy(update=said), "churn": churn})
    fault_events(rehearsal, names)
    return rehearsal


@dataclass
class _Part:
    """Work of one volunteer, by its events."""

    name: str
    rounds: int = 0
    tokens: int = 0
    link_bytes: tuple[int, int] | None = None
    """Bytes that the volunteer's emulated link carried up and down; None without one."""

    def take(self, event: Event) -> None:
        from swarmtrain.events import DoneEvent, RoundEvent

        if isinstance(event, RoundEvent):
            self.rounds += 1
            self.tokens += event.tokens
        elif isinstance(event, DoneEvent):
            self.tokens = max(self.tokens, event.tokens)  # includes a round that was too late to be merged

    def line(self) -> str:
        """Return a line for a person."""
        from swarmtrain.words import count_in_words, size_in_words

        rounds = "1 round" if self.rounds == 1 else f"{self.rounds} rounds"
        merged = f", {rounds} merged" if self.rounds else ""
        up, down = map(size_in_words, self.link_bytes or (0, 0))
        link = f", {up} sent and {down} received" if self.link_bytes else ""
        return f"{self.name}: {count_in_words(self.tokens)} tokens{merged}{link}"


@dataclass(frozen=True)
class _Trained:
    """Result of training: each volunteer's work by name, the held-out loss in words, and the event sink."""

    parts: dict[str, _Part]
    loss: str
    emit: EventSink

    @property
    def most_tokens(self) -> int:
        """Tokens that the fastest volunteer has trained on."""
        return max((part.tokens for part in self.parts.values()), default=0)


def _page(plan: _Plan) -> PageProcess:
    from swarmtrain.cli.page_process import PageProcess

    return PageProcess(plan.web, plan.directory / "bootstrap")


def _train(plan: _Plan, stop: StopFlag, page: PageProcess) -> _Trained:
    """Run the swarm to its end. The swarm's processes end with this one, whatever happens."""
    from swarmtrain.cli.common import PeerOptions, open_sink
    from swarmtrain.cli.display import SwarmDisplay
    from swarmtrain.cli.peers import listed
    from swarmtrain.events import LinkEvent
    from swarmtrain.peer.lifecycle.stop import Interrupted
    from swarmtrain.peer.local.swarm import LocalLinks, LocalSwarm
    from swarmtrain.words import loss_in_words, source_losses_in_words

    run = plan.run.run

    def make_display() -> SwarmDisplay:
        return SwarmDisplay(f"swarmtrain local: {run.name}, {len(plan.extra)} volunteers", run.total_tokens)

    options = PeerOptions(
        dir=plan.directory, name="", json=plan.as_json, listen=(), announce=(), log_level="warning", stop=stop
    )
    given = plan.rehearsal
    links = LocalLinks(given) if given is not None and given.needs_links else None
    rehearsing: FaultInjection | None = None

    def check() -> None:
        stop.check()
        if rehearsing is not None:
            rehearsing.tick()

    swarm = LocalSwarm(plan.directory, check, links)
    rehearsing = _rehearsing(swarm, plan)
    try:
        with listed(plan.directory), open_sink(options, make_display) as emit:
            try:
                parts, measured, has_diverged = _watch(swarm, emit, plan, rehearsing, page)
            except Interrupted:
                # not click.echo, which would write past the display
                sys.stderr.write("ending the volunteers, then the bootstrap; Ctrl-C again ends all at once\n")
                swarm.stop(emit)
                for event in swarm.last_words():
                    emit(event)
                raise
            for name, (up_bytes, down_bytes) in links.passed_bytes.items() if links is not None else ():
                emit(LinkEvent(name=name, up_bytes=up_bytes, down_bytes=down_bytes))
                if name in parts:
                    parts[name].link_bytes = up_bytes, down_bytes
    finally:
        swarm.stop()
    if measured is None or measured.held_out_loss is None:
        if has_diverged:
            raise RunTimeError(
                "the final model's held-out loss is not a finite number: training diverged; lower inner.learning_rate. "
                f"The model is in {plan.directory / 'bootstrap' / 'model'}",
                code="training-diverged",
            )
        raise RunTimeError(
            "the run ended before the held-out loss was measured; see the logs in its folder", code="loss-not-measured"
        )
    by_source = source_losses_in_words(measured.sources, measured.source_losses)
    loss = loss_in_words(measured.held_out_loss)
    return _Trained(parts, f"{loss}: {by_source}" if by_source else loss, emit)


def _rehearsing(swarm: LocalSwarm, plan: _Plan) -> FaultInjection | None:
    """Return the fault injection, which acts from `begin` on whenever the swarm waits for events; None without faults."""
    from swarmtrain.peer.local.faults import FaultInjection
    from swarmtrain.rehearsal import fault_events

    if plan.rehearsal is None or not plan.rehearsal.strikes:
        return None
    return FaultInjection(swarm, swarm.links, fault_events(plan.rehearsal, plan.names))


def _watch(
    swarm: LocalSwarm, emit: EventSink, plan: _Plan, rehearsing: FaultInjection | None, page: PageProcess
) -> tuple[dict[str, _Part], DoneEvent | None, bool]:
    """Start all peers and show their events to the end; return (each volunteer's work, the last event of a peer that
    measured the model, whether a peer warned that training diverged)."""
    from swarmtrain.cli.background import say
    from swarmtrain.cli.progress import said_meanwhile
    from swarmtrain.events import DoneEvent, InviteEvent, WarningEvent

    company, place = ["--wait-for", str(len(plan.extra))], swarm.place("bootstrap", limited=False)
    swarm.start("bootstrap", ["bootstrap", *plan.run_arguments, *place, *company])
    with said_meanwhile(lambda: "the bootstrap is preparing the run"):
        invite, _ = swarm.wait_for_invite(show=emit)
    page.start()
    if plan.web is None and not plan.as_json:
        say(f"to see it in a browser: swarmtrain watch bootstrap --dir {shlex.quote(str(plan.directory))} --web")
    parts = {name: _Part(name) for name in plan.names}
    for name, extra in zip(parts, plan.extra, strict=True):
        swarm.start(name, ["join", invite.invite, *swarm.place(name, limited=True), *extra])
    measured: dict[str, DoneEvent] = {}
    has_diverged = False
    if rehearsing is not None:
        rehearsing.begin()
    for event in swarm.events():
        if rehearsing is not None and isinstance(event, DoneEvent) and event.reason == "total_tokens":
            rehearsing.stop()  # the run is over
        if not isinstance(event, InviteEvent):  # the bootstrap's invite is enough
            emit(event)
        if event.name in parts:
            parts[event.name].take(event)
        if isinstance(event, DoneEvent) and event.held_out_loss is not None:
            measured[event.name] = event
        has_diverged |= isinstance(event, WarningEvent) and event.code == "training-diverged"
    # The bootstrap has the model that is shown.
    return parts, measured.get("bootstrap", next(iter(measured.values()), None)), has_diverged


def _show_sample(directory: Path, as_json: bool, on: DeviceOptions) -> None:
    """Print what the model writes after the beginning of a held-out document, and how to let it write more."""
    model = directory / "bootstrap" / "model"
    from swarmtrain.cli.exported_model import load_for_use
    from swarmtrain.cli.progress import long_work
    from swarmtrain.data.sample_prompt import sample_prompt
    from swarmtrain.peer.checkpoints.export import Sampling, sample_text, tokenizer_of
    from swarmtrain.peer.lifecycle.folder import PeerFolder

    published = PeerFolder(directory / "bootstrap").kept_run()
    assert published is not None, "the bootstrap kept its run"
    exported = load_for_use(model)
    tokenizer = tokenizer_of(exported)
    prompt = sample_prompt(published.run, published.held_out, tokenizer)
    echo(f"a sample of up to {_SAMPLE_TOKENS} tokens from the model:", err=True)
    with long_work("a sample", _SAMPLE_TOKENS, "tokens") as advance:
        sampling = Sampling(_SAMPLE_TOKENS, 0.7, seed=0, device=on.device.each[0])
        text = sample_text(exported, prompt, sampling, advance)
    echo(tokenizer.decode(prompt).decode(errors="replace") + text, err=as_json)
    echo(model_line(model), err=as_json)
    where = shlex.quote(one_line(str(directory)))
    echo(f"to keep how it went: swarmtrain report --dir {where} --to run.html", err=as_json)


def _alone(directory: Path, data: Path, trained: _Trained, on: DeviceOptions, stop: StopFlag) -> tuple[_Part, float]:
    """Train one volunteer alone at full speed on as many tokens as the fastest, with a progress bar.

    Return (its work, its held-out loss).
    """
    import time

    import platformdirs
    from rich.progress import Progress

    from swarmtrain.cli.terminal import TerminalConsole
    from swarmtrain.events import AloneEvent, stamped, to_plain_line
    from swarmtrain.peer.alone import train_alone
    from swarmtrain.peer.lifecycle.folder import PeerFolder
    from swarmtrain.peer.lifecycle.node import PeerSettings
    from swarmtrain.protocol.limits import Limits
    from swarmtrain.words import count_in_words

    settings = PeerSettings(
        directory=directory,
        name="alone",
        data_folder=data,
        cache_folder=platformdirs.user_cache_path("swarmtrain"),
        limits=Limits(threads=1),  # small models gain nothing from a second thread, and lose much if cores are shared
        device=on.device,
        precision=on.precision,
        compile=on.compile,
        vram_bytes=on.vram_bytes,
        base_bits=int(on.base_bits),
    )
    published = PeerFolder(directory / "bootstrap").kept_run()
    assert published is not None, "the bootstrap kept its run"
    tokens, began_s = trained.most_tokens, time.monotonic()
    with Progress(console=TerminalConsole(stderr=True), transient=True) as progress:
        bar = progress.add_task(f"one volunteer alone, {count_in_words(tokens)} tokens", total=tokens)

        def advance(num_tokens: int) -> None:
            stop.check()
            progress.advance(bar, num_tokens)

        def tell(event: Event) -> None:
            event = stamped(event, time.time(), "", settings.name)
            if trained.emit.display is None:
                trained.emit(event)
            else:
                progress.console.print(to_plain_line(event), markup=False, highlight=False)

        found = train_alone(published, tokens, settings, advance, tell)
    if trained.emit.display is None:
        wall_s = time.monotonic() - began_s
        trained.emit(AloneEvent(held_out_loss=found.loss, inner_steps=found.inner_steps, wall_s=wall_s))
    return _Part(settings.name, tokens=found.tokens), found.loss

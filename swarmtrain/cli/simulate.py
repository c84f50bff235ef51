"""`swarmtrain simulate`: compare methods in virtual time, by the code that real peers run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from swarmtrain.cli.common import example
from swarmtrain.cli.option_errors import OptionsError
from swarmtrain.cli.output import echo
from swarmtrain.cli.report import check_target, write_page

if TYPE_CHECKING:
    from rich.console import RenderableType

    from swarmtrain.simulate.comparison import Comparison, ComparisonRow
    from swarmtrain.simulate.scenario import Scenario


@click.command(
    name="simulate",
    epilog=example(
        "swarmtrain simulate examples/scenarios/heterogeneous.toml",
        "swarmtrain simulate my.toml --plot methods.html",
        "swarmtrain simulate my.toml --sweep merge.outer_momentum=0.5,0.8 --json found.json",
    ),
)
@click.argument("scenario", metavar="SCENARIO.toml", type=click.Path(path_type=Path))
@click.option("--seed", "seeds", multiple=True, type=int, metavar="N", help="Seed of the runs; may be repeated.  [default: the file's]")  # fmt: skip
@click.option("--method", "methods", multiple=True, metavar="NAME", help="Method to compare; may be repeated.  [default: the file's]")  # fmt: skip
@click.option("--sweep", "sweeps", multiple=True, metavar="KEY=V,V", help="Values to compare of a key of the run file or the scenario; replaces the file's grid; may be repeated.")  # fmt: skip
@click.option("--set", "changes", multiple=True, metavar="KEY=V", help="Change a key of the run file or the scenario; may be repeated.")  # fmt: skip
@click.option(
    "--jobs", type=click.IntRange(1), metavar="N", help="Number of runs at once.  [default: one for each core]"
)
@click.option("--fresh", is_flag=True, help="Run everything again, without results kept from earlier.")
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE", help="Show the methods beside each other in FILE: .html for a page with figures and curves to choose from, .png or .svg for a picture.")  # fmt: skip
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE", help="Write the results to FILE, as one JSON document.")  # fmt: skip
def command(
    scenario: Path,
    seeds: tuple[int, ...],
    methods: tuple[str, ...],
    sweeps: tuple[str, ...],
    changes: tuple[str, ...],
    jobs: int | None,
    fresh: bool,
    plot: Path | None,
    json_file: Path | None,
) -> None:
    """Compare methods of training in virtual time.

    Trains real models on real text on this machine, but counts the time that the scenario's machines and links would
    take. The same file and seed give the same results, on any number of cores.
    """
    import json
    import os

    import platformdirs

    from swarmtrain.simulate.scenario import load_scenario

    grid = dict(map(_swept, sweeps))
    loaded = load_scenario(scenario).with_changes(
        seeds=seeds, methods=methods, grid=grid, changes=dict(_changed(change) for change in changes)
    )
    files: dict[str, str] = {}
    if plot is not None:
        _check_plot(plot, loaded)
        files = _texts(scenario, loaded.scenario.run)  # now, since a person may change them while it computes
    if json_file is not None and not json_file.parent.is_dir():
        raise OptionsError(
            f"--json {json_file}: there is no folder {json_file.parent}; create it first", code="no-such-folder"
        )
    from swarmtrain.simulate.comparison import (
        compare,
        document,
    )  # takes a second: imported once the file is known to be good

    kept = platformdirs.user_cache_path("swarmtrain") / "simulate"
    with _ended_in_order(), _shown(loaded) as told:
        found = compare(loaded, jobs=jobs or os.cpu_count() or 1, kept=kept, fresh=fresh, told=told)
    for line in table_lines(found):
        echo(line)
    if json_file is not None:
        from swarmtrain.network.files import write_atomically

        write_atomically(json_file, (json.dumps(document(found), indent=1, allow_nan=False) + "\n").encode())
    if plot is not None:
        given = {"--seed": seeds, "--method": methods, "--sweep": sweeps, "--set": changes}
        _draw(found, plot, _command(scenario, given), files)


def _say(line: str) -> None:
    echo(line, err=True)


def _key_and_value(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or key.count(".") != 1:
        raise OptionsError(
            f"{text!r}: write SECTION.KEY=VALUE, such as merge.outer_momentum=0.5", code="bad-assignment"
        )
    return key, value


def _changed(text: str) -> tuple[str, Any]:
    """Parse KEY=VALUE as in a run file; a word without quotes is text."""
    import tomllib

    key, value = _key_and_value(text)
    try:
        return key, tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return key, value


def _swept(text: str) -> tuple[str, list[Any]]:
    key, values = _key_and_value(text)
    return key, [_changed(f"{key}={value}")[1] for value in values.split(",")]


def _check_plot(path: Path, scenario: Scenario) -> None:
    """Check `--plot` before hours of work. Raises a usage error."""
    import importlib.util

    from swarmtrain.extras import install_in_words

    if path.suffix == ".html":
        check_target(path, "--plot")
    elif path.suffix not in (".png", ".svg"):
        raise OptionsError(f"--plot {path}: its name must end with .html, .png or .svg", code="bad-plot-name")
    if not path.parent.is_dir():
        raise OptionsError(f"--plot {path}: there is no folder {path.parent}; create it first", code="no-such-folder")
    if path.suffix == ".html" and scenario.scenario.work != "learning":
        return  # its tables say it all
    if not scenario.scenario.curve_points:
        raise OptionsError("--plot needs curves: set scenario.curve_points in the scenario, 20 say", code="no-curves")
    if path.suffix != ".html" and importlib.util.find_spec("matplotlib") is None:
        raise OptionsError(f"--plot needs matplotlib: {install_in_words('plot')}", code="package-missing")


def _texts(scenario: Path, run: str) -> dict[str, str]:
    """Return the texts of the scenario and its run file, by their names without folders, unless those are the same."""
    files = {}
    run_name = Path(run).name
    for name, source in (
        (scenario.name, scenario),
        (run if run_name == scenario.name else run_name, scenario.parent / run),
    ):
        with suppress(OSError, UnicodeDecodeError):
            files[name] = source.read_text(encoding="utf-8")
    return files


def _command(scenario: Path, given: Mapping[str, Sequence[object]]) -> str:
    """Return the command that computes the same where the scenario lies, with the values `given` of each option."""
    import shlex

    options = [word for option, values in given.items() for value in values for word in (option, str(value))]
    return shlex.join(["swarmtrain", "simulate", scenario.name, *options])


def _draw(found: Comparison, path: Path, command: str, files: Mapping[str, str]) -> None:
    """Write the page or the picture of a comparison. `command` and `files` are those of `comparison_page`."""
    if path.suffix != ".html":
        from swarmtrain.cli.figure import draw

        draw(found, path)
        return
    from swarmtrain.cli.comparison_page import comparison_page

    write_page(path, comparison_page(found, command, files))
    _say(f"wrote the comparison to {path}; open it in a browser")


@contextmanager
def _ended_in_order() -> Iterator[None]:
    """Inside, SIGTERM also ends the processes of a pool, as Ctrl-C does."""
    import signal
    from types import FrameType

    def end(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)  # the exit code that a shell reports

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


# ---------------------------------------------------------------- what a person sees


@contextmanager
def _shown(scenario: Scenario) -> Iterator[Any]:
    """Show a bar with the time left and the growing table on standard error; yields a callback for each finished run."""
    from rich.console import Group
    from rich.live import Live
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.text import Text

    from swarmtrain.cli.progress import said_meanwhile
    from swarmtrain.cli.terminal import TerminalConsole
    from swarmtrain.simulate.comparison import Comparison, Play, num_plays
    from swarmtrain.simulate.learning.setting import RunOutcome

    console, found = TerminalConsole(stderr=True), Comparison(scenario)
    bar = Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    task = bar.add_task(scenario.scenario.name, total=None)

    def picture() -> RenderableType:
        lines = table_lines(found) if found.rows() else []
        return Group(*(Text(line) for line in lines), bar)

    total_runs = num_plays(scenario)

    def so_far() -> str:
        return f"{scenario.scenario.name}: {len(found.outcomes)} of {total_runs} runs are done"

    with said_meanwhile(so_far), Live(picture(), console=console, refresh_per_second=4, transient=True) as live:

        def told(play: Play, outcome: RunOutcome, done: int, total: int) -> None:
            found.outcomes[play] = outcome
            bar.update(task, completed=done, total=total)
            live.update(picture())
            if not console.is_terminal:
                loss = "" if outcome.throughput_share is not None else f": {outcome.held_out_loss:.4f} nats/byte"
                echo(f"{done} of {total}: {play.words}{loss}", err=True)

        yield told


def table_lines(found: Comparison) -> list[str]:
    """Return the lines of a table with one row per method and its constants. Values are means over the seeds; a ratio
    to `diloco` is the mean of the ratios of equal seeds."""
    if "hostile.attack" in found.scenario.grid:
        return _attack_lines(found)
    if found.scenario.scenario.work == "systems":
        return _systems_lines(found)
    if found.scenario.scenario.work == "pipeline":
        return _pipeline_lines(found)
    rows, best = found.rows(), found.best()
    names = [_name(row) for row in rows]
    width = max([len(name) for name in names] + [6])
    lines = [f"{'method':{width}}  nats/byte  virtual time  to diloco          to diloco-paced    bytes/step   stall"]
    for name, row in zip(names, rows, strict=True):
        lines.append(
            f"{name:{width}}  {row.loss:9.4f}  {row.mean('virtual_time_s'):10.1f} s  {_ratio(row, best.get('diloco'))}"
            f"  {_ratio(row, best.get('diloco-paced'))}  {row.mean('sent_bytes') / row.mean('inner_steps'):10.0f}"
            f"  {row.mean('stall_share'):6.1%}"
        )
    return lines


def _name(row: ComparisonRow) -> str:
    return " ".join([row.method, *(f"{key.partition('.')[2]}={value}" for key, value in row.point)])


def _systems_lines(found: Comparison) -> list[str]:
    """Return the table of `work = "systems"` (swarms without tensors): means over the seeds."""
    rows = found.rows()
    width = max([len(_name(row)) for row in rows] + [6])
    lines = [
        f"{'method':{width}}     rounds  throughput   stall   fresh  rounds old  bytes/round    apart  tokens lost"
    ]
    for row in rows:
        lines.append(
            f"{_name(row):{width}}  {row.mean('rounds'):9.0f}  {row.mean('throughput_share'):10.1%}  {row.mean('stall_share'):6.2%}"
            f"  {row.mean('fresh_share'):6.1%}  {row.mean('staleness_rounds'):10.2f}  {row.mean('received_bytes_a_round'):11.0f}"
            f"  {row.mean('spread'):7.1e}  {row.mean('tokens_lost'):11.0f}"
        )
    return lines


def _pipeline_lines(found: Comparison) -> list[str]:
    """Return the table of `work = "pipeline"`: means over the seeds, as shares of the best assignment of stages."""
    import math

    rows = found.rows()
    width = max([len(_name(row)) for row in rows] + [6])
    lines = [f"{'method':{width}}    tokens/s  of the ideal    stages could    moves"]
    for row in rows:
        error = row.error("throughput_share")
        share = f"{row.mean('throughput_share'):6.1%}" + (f" +- {error:5.1%}" if math.isfinite(error) else f"{'':9}")
        lines.append(
            f"{_name(row):{width}}  {row.mean('tokens') / row.mean('virtual_time_s'):10.0f}  {share}"
            f"  {row.mean('assignment_share'):10.1%}  {row.mean('moves'):7.0f}"
        )
    return lines


def _attack_lines(found: Comparison) -> list[str]:
    """Return a table of attacks by rules for each combination of the other constants.

    Cells are losses relative to the run without hostile peers and without a rule.
    """
    grid, the_runs, lines = found.scenario.grid, "the run file's", list[str]()
    attacks, rules = grid["hostile.attack"], grid.get("merge.robust", (the_runs,))
    tables: dict[tuple[str, Any], dict[tuple[str, str], ComparisonRow]] = {}
    for row in found.rows():
        rest = dict(row.point)
        cell = rest.pop("hostile.attack"), rest.pop("merge.robust", the_runs)
        tables.setdefault((row.method, tuple(rest.items())), {})[cell] = row
    width = max(len(attack) for attack in [*attacks, "attack"])
    for (method, rest), cells in tables.items():
        base = cells.get(("absent", "none" if "none" in rules else rules[0]))
        loss = "" if base is None else f", to {base.loss:.4f} nats/byte without them and without a rule"
        lines += ["", " ".join([method, *(f"{key}={value}" for key, value in rest)]) + loss]
        lines.append(f"{'attack':{width}}" + "".join(f"  {rule:17}" for rule in rules))
        for attack in attacks:
            each = [cells.get((attack, rule)) for rule in rules]
            lines.append(
                f"{attack:{width}}" + "".join(f"  {'' if row is None else _ratio(row, base):17}" for row in each)
            )
    return lines


def _ratio(row: ComparisonRow, other: ComparisonRow | None) -> str:
    import math

    if other is None or set(row.outcomes) - set(other.outcomes):
        return f"{'':17}"
    mean, error = row.ratio(other)
    return f"{mean:.4f}" + (f" +- {error:.4f}" if math.isfinite(error) else f"{'':10}")

"""A scenario: which peers, on which links, train by which methods, and which faults strike them.

A file that a person writes, in the words of run files and rehearsals.
"""

from __future__ import annotations

import itertools
import math
import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import tomli_w
from pydantic import Field, ValidationError, field_validator

from swarmtrain.errors import UserError
from swarmtrain.model.base import resolved_run
from swarmtrain.problems import Section, problems_in_words, read_small_file
from swarmtrain.rehearsal import LinksSection
from swarmtrain.run import EXAMPLE as _RUN_EXAMPLE
from swarmtrain.run import RunFile, parse_run
from swarmtrain.simulate.traces import TraceSpan, load_trace
from swarmtrain.words import one_line

_MAX_POINTS = 10_000
_EXAMPLE = "examples/scenarios/heterogeneous.toml"

GridPoint = tuple[tuple[str, Any], ...]
"""(key of the run file or of a section in `_OWN`, value), sorted."""

_CHANGEABLE = (
    "scenario.rounds", "scenario.lasts_s", "scenario.curve_points", "scenario.work", "scenario.warm_tokens",
)  # fmt: skip
_OWN = ("scenario", "peers", "links", "hostile", "churn")
"""Sections of a scenario that its grid, a sweep and `[set]` can change like a run file's."""

ATTACKS = {
    "absent": "nothing: they are not there, for comparison",
    "sign-flip": "the pseudo-gradient with its sign turned",
    "scaled": "the pseudo-gradient times the factor",
    "noise": "random numbers, tensor by tensor as large as the pseudo-gradient",
    "little-is-enough": "the honest ones' mean less the factor times their standard deviation (arXiv 1902.06635)",
    "copycat": "another's pseudo-gradient as one's own",
    "drag": "an honest pseudo-gradient, and weights that are moved back by the factor times it",
    "huge": "every number 1e30",
    "nan": "no numbers",
    "tokens": "a slow volunteer's few inner steps, said to be a whole round's tokens",
    "speed": "a speed of a billion inner steps a second is said",
}
_WITH_FACTOR = ("sign-flip", "scaled", "noise", "little-is-enough", "drag")


class ScenarioSection(Section):
    """Section `[scenario]`."""

    name: str = Field(min_length=1, max_length=64, description="Name of the scenario.")
    work: Literal["learning", "systems", "pipeline"] = Field(
        "learning",
        description="Real models that learn; or, without tensors, sizes and times of a swarm or of a pipeline.",
    )
    rounds: int = Field(100, ge=1, le=1_000_000, description="Systems work: rounds of each volunteer.")
    lasts_s: float = Field(
        3600.0, gt=0, le=1e7, description="Pipeline work: measured seconds, after ten unmeasured minutes."
    )
    run: str = Field(min_length=1, description="Run file, relative to the scenario's folder.")
    methods: tuple[str, ...] = Field(strict=False, min_length=1, description="Methods to compare.")
    seeds: tuple[int, ...] = Field(
        (0,), strict=False, min_length=1, description="Seeds of the runs; each method runs with each."
    )
    tuning_seeds: tuple[int, ...] = Field(
        (),
        strict=False,
        description="Seeds on which each method's constants are chosen from `[grid]`; none: all are shown.",
    )
    curve_points: int = Field(0, ge=0, le=1000, description="Number of measurements of the held-out loss during a run.")
    warm_tokens: int = Field(
        0,
        ge=0,
        le=10**12,
        description="Tokens that one machine trains alone beforehand, in no time; all start from its weights.",
    )

    @field_validator("methods", "seeds", "tuning_seeds")
    @classmethod
    def _once(cls, given: tuple[object, ...]) -> tuple[object, ...]:
        if len(set(given)) < len(given):
            raise ValueError("one is there twice")
        return given


class PeersSection(Section):
    """Section `[peers]`."""

    number: int = Field(4, ge=1, le=100_000, description="Number of volunteers; with learning, at most 1024.")
    step_ms: float = Field(10.0, gt=0, le=3_600_000, description="Milliseconds of an inner step without slowdown.")
    slowdowns: tuple[float, ...] = Field(
        (), strict=False, description="Slowdown factor of each volunteer; repeated if there are fewer; none: all equal."
    )
    ranks: tuple[int, ...] = Field(
        (),
        strict=False,
        description="Learning, if the run trains an adapter: how many of its components each volunteer trains in a "
        "round; repeated if there are fewer; none: all.",
    )
    spread: float = Field(
        0.0,
        ge=0,
        le=3,
        description="Without tensors: speeds are lognormal around these; standard deviation of the logarithm.",
    )
    noise: float = Field(
        0.0,
        ge=0,
        le=3,
        description="Learning: speeds change over time, lognormal around those; standard deviation of the logarithm.",
    )
    noise_lasts_s: float = Field(30.0, gt=0, le=1e7, description="Virtual seconds between two changes of speed.")
    most_stages: int = Field(
        2,
        ge=1,
        le=1024,
        description="Pipeline work: stages that fit into a volunteer's memory.",
    )
    round_steps: int = Field(
        0,
        ge=0,
        description="Total inner steps of a round, of which merge.inner_steps becomes a share; 0: it is given.",
    )
    trace: str = Field(
        "", description="Trace file, relative to the scenario's folder, of who comes, goes and hangs when."
    )
    own_text: bool = Field(
        False, description="Each volunteer learns from its own part of the corpus, of consecutive documents."
    )

    @field_validator("slowdowns")
    @classmethod
    def _positive(cls, slowdowns: tuple[float, ...]) -> tuple[float, ...]:
        if any(not (0 < each < math.inf) for each in slowdowns):
            raise ValueError("a slowdown is not above 0")
        return slowdowns

    @property
    def step_s(self) -> tuple[float, ...]:
        """Seconds of an inner step of each volunteer."""
        factors = itertools.islice(itertools.cycle(self.slowdowns or (1.0,)), self.number)
        return tuple(self.step_ms / 1000 * factor for factor in factors)


class ScenarioLinks(LinksSection):
    """Section `[links]`, as in a rehearsal."""

    failing_percent: float = Field(0.0, ge=0, le=100, description="Percentage of transfers that break off.")
    spread: float = Field(
        0.0,
        ge=0,
        le=3,
        description="Without tensors: rates are lognormal around these; standard deviation of the logarithm.",
    )


class Hang(Section):
    """Entry of `[[hangs]]`: a volunteer hangs for a while."""

    peer: int = Field(ge=0, description="Number of the volunteer, from 0.")
    at_s: float = Field(ge=0, description="Time, in virtual seconds.")
    for_s: float = Field(gt=0, description="Duration, in virtual seconds.")

    def is_on(self, number: int, now_s: float) -> bool:
        """Return whether volunteer `number` hangs (or, for `Away`, is away) because of this entry at `now_s`."""
        return number == self.peer and self.at_s <= now_s < self.at_s + self.for_s


class Away(Hang):
    """Entry of `[[away]]`: a volunteer has crashed or left, and comes back; an absence that begins at time 0 makes it a
    late joiner."""


class ScenarioChurn(Section):
    """Section `[churn]`: all come and go by chance, by the run's seed. Both times are means of exponential ones."""

    stays_s: float = Field(0.0, ge=0, description="Mean seconds that a volunteer stays; 0: nobody leaves.")
    away_s: float = Field(60.0, gt=0, description="Mean seconds that it is away.")
    crash_share: float = Field(
        0.5, ge=0, le=1, description="Without tensors: share of departures that are crashes; the others leave cleanly."
    )
    hangs_after_s: float = Field(
        0.0, ge=0, description="Without tensors: mean seconds until a volunteer hangs; 0: none does."
    )
    hangs_for_s: float = Field(60.0, gt=0, description="Without tensors: mean seconds of a hang.")

    def away(self, num_peers: int, seed: int, until_s: float) -> list[Away]:
        """Draw the volunteers' absences."""
        means_s = self.stays_s, self.away_s
        return [Away(**span._asdict()) for span in _spans(f"churn {seed}", num_peers, means_s, until_s)]

    def hangs(self, num_peers: int, seed: int, until_s: float) -> list[Hang]:
        """Draw the times at which volunteers hang, whether they are present or not."""
        means_s = self.hangs_after_s, self.hangs_for_s
        return [Hang(**span._asdict()) for span in _spans(f"hangs {seed}", num_peers, means_s, until_s)]


def _spans(key: str, num_peers: int, means_s: tuple[float, float], until_s: float) -> Iterator[TraceSpan]:
    """Draw spans of each peer in turn, with exponential lengths and distances.

    `means_s` are the means of the time between two spans and of a span. None are drawn if the first is 0.
    """
    between_s, for_s = means_s
    for number in range(num_peers if between_s else 0):
        rng, now_s = random.Random(f"{key} {number}"), 0.0
        while (at_s := now_s + rng.expovariate(1 / between_s)) < until_s:
            span = TraceSpan(number, at_s, rng.expovariate(1 / for_s) or for_s)
            yield span
            now_s = at_s + span.for_s


class HostileSection(Section):
    """Section `[hostile]`: volunteers that train and merge like the others, and publish or say something else."""

    percent: float = Field(0.0, ge=0, lt=100, description="Percentage of hostile volunteers, rounded: the last ones.")
    attack: str = Field("absent", description='Attack, with its factor if it has one: "noise", "noise x3".')

    @field_validator("attack")
    @classmethod
    def _known(cls, attack: str) -> str:
        kind, x, factor = attack.partition(" x")
        if kind not in ATTACKS:
            raise ValueError(f"no such attack; there are {', '.join(ATTACKS)}")
        if x and (kind not in _WITH_FACTOR or not re.fullmatch(r"\d+(\.\d+)?", factor)):
            raise ValueError(f'a factor is a number, as in "noise x3", of {", ".join(_WITH_FACTOR)}')
        return attack

    @property
    def kind(self) -> str:
        """Attack, one of `ATTACKS`."""
        return self.attack.partition(" x")[0]

    @property
    def factor(self) -> float:
        """Factor of the attack; 1 if none is given."""
        return float(self.attack.partition(" x")[2] or 1)

    def number(self, num_peers: int) -> int:
        """Return how many of `num_peers` volunteers are hostile."""
        return round(num_peers * self.percent / 100)


class _Sections(Section):
    scenario: ScenarioSection
    peers: PeersSection = Field(default_factory=lambda: PeersSection())
    links: ScenarioLinks = Field(default_factory=lambda: ScenarioLinks())
    hostile: HostileSection = Field(default_factory=lambda: HostileSection())
    churn: ScenarioChurn = Field(default_factory=lambda: ScenarioChurn())


class _HangRow(Section):
    hangs: Hang


class _AwayRow(Section):
    away: Away


_Row = TypeVar("_Row", _HangRow, _AwayRow)
_MOST_LEARNERS = 1024
_NOT_LEARNING = ("peers.spread", "links.spread", "churn.hangs_after_s")
_LEARNING_ONLY = (
    "hostile.percent",
    "peers.own_text",
    "peers.noise",
    "peers.round_steps",
    "links.failing_percent",
    "scenario.curve_points",
    "scenario.tuning_seeds",
    "scenario.warm_tokens",
)
_ABSENT = {
    "learning": _NOT_LEARNING,
    "systems": (*_LEARNING_ONLY, "peers.trace", "links.jitter_ms"),
    "pipeline": _LEARNING_ONLY,
}
"""Keys that have no meaning in work of that kind."""


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """A whole scenario.

    `table` is the run file's, with the changes of `[set]`; `base` is the folder of that file, and `folder` the
    scenario's. With `peers.trace`, `hangs` and `away` are those of the trace.
    """

    scenario: ScenarioSection
    peers: PeersSection
    links: ScenarioLinks
    hostile: HostileSection
    churn: ScenarioChurn
    hangs: tuple[Hang, ...]
    away: tuple[Away, ...]
    table: Mapping[str, Any]
    base: Path
    folder: Path
    grid: Mapping[str, tuple[Any, ...]]
    figures: Mapping[str, Mapping[int, float]] = field(default_factory=dict)
    """Values `speed`, `up_mbit` and `down_mbit` of a trace, by volunteer."""

    @property
    def step_s(self) -> tuple[float, ...]:
        """Seconds of an inner step of each volunteer."""
        speeds = self.figures.get("speed", {})
        return tuple(step_s / speeds.get(number, 1.0) for number, step_s in enumerate(self.peers.step_s))

    def with_changes(
        self,
        *,
        seeds: tuple[int, ...] = (),
        methods: tuple[str, ...] = (),
        grid: Mapping[str, Sequence[Any]] | None = None,
        changes: Mapping[str, Any] | None = None,
    ) -> Scenario:
        """Return the scenario with the changes that a person asks for on the command line.

        A `grid` replaces the file's, and all of it is compared. Keys in `changes` are removed from the grid. Raises
        UserError if a run file cannot have the changes.
        """
        own, changes = _apart(changes or {})
        for key in {**own, **(grid or self.grid)}:
            if key.startswith("scenario.") and key not in _CHANGEABLE:
                raise UserError(
                    f"{key}: cannot be changed here; set it in the scenario's file (of [scenario], a grid and the "
                    f"command line can change {', '.join(_CHANGEABLE)})",
                    code="key-not-changeable",
                )
        here = self.at(tuple(own.items()))
        told: dict[str, Any] = {"seeds": seeds or here.scenario.seeds, "methods": methods or here.scenario.methods}
        if grid:
            told["tuning_seeds"] = ()
        left = {key: tuple(values) for key, values in (grid or self.grid).items() if key not in {**own, **changes}}
        new = replace(
            here,
            scenario=here.scenario.model_copy(update=told),
            table=_changed(self.table, changes.items()),
            grid={key: tuple(_hashable(key, value) for value in values) for key, values in left.items()},
        )
        if twice := sorted(set(new.scenario.seeds) & set(new.scenario.tuning_seeds)):
            raise UserError(
                f"scenario.tuning_seeds: seed {twice[0]} is in scenario.seeds too; give other tuning seeds",
                code="seed-used-twice",
            )
        return new

    def points(self) -> Iterator[GridPoint]:
        """Yield all points of the grid; without a grid, one that changes nothing."""
        keys = sorted(self.grid)
        for values in itertools.product(*(self.grid[key] for key in keys)):
            yield tuple(zip(keys, values, strict=True))

    def at(self, point: GridPoint) -> Scenario:
        """Return the scenario with the keys of its own sections as at `point`.

        Raises UserError if the sections cannot have these values.
        """
        own, _ = _apart(dict(point))
        if not own:
            return self
        tables = {name: getattr(self, name).model_dump() for name in _OWN}
        origin = f"scenario {self.scenario.name}"
        sections = _sections_of(_changed(tables, own.items()), origin)
        new = replace(self, **{name: getattr(sections, name) for name in _OWN})
        if (new.peers.trace, new.peers.number) != (self.peers.trace, self.peers.number):
            if self.peers.trace:
                new = replace(new, hangs=(), away=(), figures={})
            new = _traced(new, origin)
        return _checked(new, origin)

    def run(self, seed: int, *changes: GridPoint) -> RunFile:
        """Return the run file with the seed and these changes. Raises UserError if a run file cannot have them."""
        told = [*(pair for point in changes for pair in _apart(dict(point))[1].items()), ("run.seed", seed)]
        if self.peers.round_steps:
            told.insert(0, ("merge.inner_steps", max(1, self.peers.round_steps // self.peers.number)))
        table = _changed(self.table, told)
        run = parse_run(tomli_w.dumps(table), f"the run of scenario {self.scenario.name}", has_lines=False)
        return resolved_run(run, self.base)


def conditions_of(point: GridPoint) -> GridPoint:
    """Return the part of a point that is of the scenario's sections: other volunteers, links or attacks. The rest are
    constants of the run file.
    """
    return tuple(_apart(dict(point))[0].items())


def load_scenario(path: Path) -> Scenario:
    """Read a scenario file.

    Raises UserError, one line that names the file and the key.
    """
    origin = one_line(str(path))
    table = read_small_file(path, "a scenario file", _EXAMPLE)
    changes, grid = _keys(table, "set", origin), _keys(table, "grid", origin)
    rows = {name: table.pop(name, []) for name in ("hangs", "away")}
    sections = _sections_of(table, origin)
    run_path = path.parent / sections.scenario.run
    run_table = read_small_file(run_path, "a run file", _RUN_EXAMPLE)
    for key, values in grid.items():
        if not isinstance(values, list) or not values:
            raise UserError(f"{origin}: grid.{key}: allowed: a list of values, such as [0.5, 0.8]", code="wrong-type")
    if math.prod(map(len, grid.values())) > _MAX_POINTS:
        raise UserError(
            f"{origin}: grid: more than {_MAX_POINTS} combinations; give fewer keys or values", code="out-of-range"
        )
    found = Scenario(
        scenario=sections.scenario,
        peers=sections.peers,
        links=sections.links,
        hostile=sections.hostile,
        churn=sections.churn,
        hangs=tuple(row.hangs for row in _rows(rows["hangs"], "hangs", _HangRow, origin)),
        away=tuple(row.away for row in _rows(rows["away"], "away", _AwayRow, origin)),
        table=run_table,
        base=run_path.parent,
        folder=path.parent,
        grid={key: tuple(values) for key, values in grid.items()},
    )
    return _checked(_traced(found, origin), origin).with_changes(changes=changes)


def _sections_of(table: Mapping[str, Any], origin: str) -> _Sections:
    try:
        return _Sections.model_validate(table)
    except ValidationError as error:
        raise UserError(*(each.found_in(origin) for each in problems_in_words(error, _Sections))) from None


def _rows(rows: Any, name: str, model: type[_Row], origin: str) -> list[_Row]:
    if not isinstance(rows, list):
        raise UserError(f"{origin}: {name}: is a list; write [[{name}]] for each", code="wrong-type")
    try:
        return [model.model_validate({name: row}) for row in rows]
    except ValidationError as error:
        raise UserError(*(each.found_in(origin) for each in problems_in_words(error, model))) from None


def _traced(scenario: Scenario, origin: str) -> Scenario:
    """Return the scenario with the values of its trace, if it has one. Raises UserError if the scenario sets one of
    them as well."""
    name = scenario.peers.trace
    if not name:
        return scenario
    if scenario.hangs or scenario.away:
        raise UserError(
            f"{origin}: peers.trace: cannot be combined with [[hangs]] and [[away]]; write those into the trace",
            code="keys-disagree",
        )
    trace = load_trace(scenario.folder / name, scenario.peers.number)
    return replace(
        scenario,
        hangs=tuple(Hang(**span._asdict()) for span in trace.hangs),
        away=tuple(Away(**span._asdict()) for span in trace.away),
        figures=trace.figures,
    )


def _checked(scenario: Scenario, origin: str) -> Scenario:
    """Check that the scenario's sections agree with each other. Raises UserError if they do not."""
    number, work = scenario.peers.number, scenario.scenario.work
    for key in _ABSENT[work]:
        section, _, name = key.partition(".")
        if getattr(getattr(scenario, section), name):
            raise UserError(
                f'{origin}: {key}: has no meaning with scenario.work = "{work}"; leave it out', code="keys-disagree"
            )
    if work == "learning" and number > _MOST_LEARNERS:
        raise UserError(
            f"{origin}: peers.number: at most {_MOST_LEARNERS} volunteers can learn in a simulation; lower it, or set "
            'scenario.work = "systems", in which nobody learns',
            code="keys-disagree",
        )
    if work == "systems" and (scenario.hangs or scenario.away):
        raise UserError(
            f'{origin}: [[hangs]] and [[away]]: with scenario.work = "systems" they are drawn at random; leave them '
            "out, and set how often they happen in [churn]",
            code="keys-disagree",
        )
    for name, rows in ("hangs", scenario.hangs), ("away", scenario.away):
        if missing := [each for each in rows if each.peer >= number]:
            raise UserError(
                f"{origin}: {name}.peer: there is no volunteer {missing[0].peer}; the {number} volunteers are 0 to "
                f"{number - 1}",
                code="no-such-volunteer",
            )
    for before, after in itertools.pairwise(sorted(scenario.away, key=lambda each: (each.peer, each.at_s))):
        if before.peer == after.peer and before.at_s + before.for_s >= after.at_s:
            raise UserError(
                f"{origin}: away.at_s: volunteer {after.peer}, away from {before.at_s:g} s on, is still away at "
                f"{after.at_s:g} s; move one of the two, or make one of both",
                code="keys-disagree",
            )
    if (scenario.away or scenario.peers.trace) and scenario.churn.stays_s:
        raise UserError(
            f"{origin}: churn.stays_s: cannot be combined with [[away]] or peers.trace; leave one of them out",
            code="keys-disagree",
        )
    if scenario.hostile.number(number) >= number:
        raise UserError(
            f"{origin}: hostile.percent: leaves none of {number} volunteers honest; lower it", code="keys-disagree"
        )
    return scenario


def _apart(pairs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split the keys into those of a scenario's own sections and those of the run file."""
    own = {key: value for key, value in pairs.items() if key.partition(".")[0] in _OWN}
    return own, {key: value for key, value in pairs.items() if key not in own}


def _hashable(key: str, value: Any) -> Any:
    if isinstance(value, dict):
        raise UserError(
            f"{key}: is a section, whose keys must be varied one by one; write {key}.NAME=VALUE,VALUE",
            code="wrong-type",
        )
    return tuple(_hashable(key, each) for each in value) if isinstance(value, list) else value


def _changed(table: Mapping[str, Any], changes: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Return a run file's tables with other values of some keys."""
    new = {section: dict(keys) if isinstance(keys, dict) else keys for section, keys in table.items()}
    for key, value in changes:
        section, _, name = key.partition(".")
        keys = new.setdefault(section, {})
        if isinstance(keys, dict):  # else it is no run file, as will be said
            keys[name] = list(value) if isinstance(value, tuple) else value
    return new


def _keys(table: dict[str, Any], name: str, origin: str) -> dict[str, Any]:
    """Take out a section whose keys are those of a run file, with a dot."""
    section = table.pop(name, {})
    if not isinstance(section, dict):
        raise UserError(f"{origin}: {name}: is a section; write [{name}]", code="wrong-type")
    for key in section:
        if key.count(".") != 1:
            raise UserError(
                f'{origin}: {name}.{key}: write the run file\'s key with its section: "run.total_tokens"',
                code="bad-assignment",
            )
    return section

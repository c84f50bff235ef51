"""Play a scenario (each method with each seed, on all cores) and collect the results in one document.

Constants first: where a scenario has a grid and tuning seeds, each method takes the point of the grid that is best on
those seeds, and is compared with that on the other seeds. Runs are deterministic, so results are kept in a folder and
not computed again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import multiprocessing
import signal
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from swarmtrain import __version__
from swarmtrain.data.documents import read_documents
from swarmtrain.environment import PEER, keep_minimal_environment
from swarmtrain.errors import UserError
from swarmtrain.network.files import write_atomically
from swarmtrain.packages import file_sha256
from swarmtrain.peer.merging.rules import mean_of, source_sha256
from swarmtrain.run import RunFile
from swarmtrain.run_data import DataSection
from swarmtrain.simulate.learning.learner import Text, warm_weights
from swarmtrain.simulate.learning.methods import METHODS, scenario_method
from swarmtrain.simulate.learning.setting import RunOutcome, setting_of
from swarmtrain.simulate.pipeline import play as pipeline_play
from swarmtrain.simulate.scenario import GridPoint, Scenario, conditions_of
from swarmtrain.simulate.systems.play import play_scenario

_Key = TypeVar("_Key")


@dataclass(frozen=True)
class Play:
    """Play to make: a method with its constants, and a seed. `tuning` is True if it is made only to choose
    constants."""

    method: str
    point: GridPoint
    seed: int
    tuning: bool = False

    @property
    def words(self) -> str:
        """Description for a person."""
        constants = "".join(f", {key.partition('.')[2]} {value}" for key, value in self.point)
        return f"{self.method}, seed {self.seed}{constants}"


@dataclass(frozen=True, kw_only=True)
class ComparisonRow:
    """Runs of a method with the same constants, one a seed."""

    method: str
    point: GridPoint
    outcomes: Mapping[int, RunOutcome]

    @property
    def conditions(self) -> GridPoint:
        """Part of `point` under which the method is tried: volunteers, links, attacks. The rest are its constants."""
        return conditions_of(self.point)

    @property
    def loss(self) -> float:
        """Mean held-out loss, nats per byte."""
        return self.mean("held_out_loss")

    @property
    def bytes_per_inner_step(self) -> float:
        """Bytes that were sent for an inner step."""
        return self.mean("sent_bytes") / max(1, self.mean("inner_steps"))

    def mean(self, name: str) -> float:
        """Return the mean of a figure over the outcomes; NaN if they do not have it."""
        values = [value for one in self.outcomes.values() if (value := getattr(one, name)) is not None]
        return statistics.fmean(values) if values else math.nan

    def error(self, name: str) -> float:
        """Return the standard error of that mean."""
        return standard_error([value for one in self.outcomes.values() if (value := getattr(one, name)) is not None])

    def ratio(self, other: ComparisonRow | None) -> tuple[float, float]:
        """Return (mean, standard error) of the ratios of this row's losses to those of `other` with the same seeds; NaN
        if `other` lacks one of the seeds."""
        if other is None or set(self.outcomes) - set(other.outcomes):
            return math.nan, math.nan
        ratios = [one.held_out_loss / other.outcomes[seed].held_out_loss for seed, one in self.outcomes.items()]
        return statistics.fmean(ratios), standard_error(ratios)


def standard_error(values: Sequence[float]) -> float:
    """Return the standard error of the mean; NaN for fewer than two values, or if one is not finite."""
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return math.nan
    return statistics.stdev(values) / math.sqrt(len(values))


@dataclass
class Comparison:
    """Outcomes of a scenario's plays so far."""

    scenario: Scenario
    outcomes: dict[Play, RunOutcome] = field(default_factory=dict)

    def rows(self, *, tuning: bool = False) -> list[ComparisonRow]:
        """Return the rows by method and constants, in the scenario's order."""
        found: dict[tuple[str, GridPoint], dict[int, RunOutcome]] = {}
        for play, outcome in self.outcomes.items():
            if play.tuning == tuning:
                found.setdefault((play.method, play.point), {})[play.seed] = outcome
        order = {method: number for number, method in enumerate(self.scenario.scenario.methods)}
        keys = sorted(found, key=lambda key: (order[key[0]], repr(key[1])))
        return [ComparisonRow(method=key[0], point=key[1], outcomes=dict(sorted(found[key].items()))) for key in keys]

    def best(self) -> dict[str, ComparisonRow]:
        """Return the row with the least loss of each method; without tensors that with the most work."""
        return self._best(lambda row: row.method)

    def best_under_conditions(self) -> dict[tuple[str, GridPoint], ComparisonRow]:
        """Return the same under each of the scenario's conditions: by method and `ComparisonRow.conditions`."""
        return self._best(lambda row: (row.method, row.conditions))

    def _best(self, key: Callable[[ComparisonRow], _Key]) -> dict[_Key, ComparisonRow]:
        found: dict[_Key, ComparisonRow] = {}
        for row in self.rows():
            if key(row) not in found or _best_first(row) < _best_first(found[key(row)]):
                found[key(row)] = row
        return found

    def without_attack(self, row: ComparisonRow, rule: str | None = None) -> ComparisonRow | None:
        """Return the same row where the hostile volunteers are absent, and with `rule` if given."""
        told = {"hostile.attack": "absent"} | ({} if rule is None else {"merge.robust": rule})
        point = tuple((key, told.get(key, value)) for key, value in row.point)
        return next((one for one in self.rows() if (one.method, one.point) == (row.method, point)), None)


def _best_first(row: ComparisonRow) -> tuple[bool, float, float]:
    """Return a sort key: by loss, and where nothing learns by the share of the possible work; NaN is the worst."""
    loss, share = row.loss, row.mean("throughput_share")
    return math.isnan(loss), 0.0 if math.isnan(loss) else loss, 0.0 if math.isnan(share) else -share


def plays_of(scenario: Scenario, chosen: Mapping[str, GridPoint] | None) -> list[Play]:
    """Return the runs to make now: to choose constants while `chosen` is None, then to compare.

    Raises UserError for a method that does not exist.
    """
    section = scenario.scenario
    for method in section.methods:
        scenario_method(method)
    points = [
        (method, point)
        for method in section.methods
        for point in dict.fromkeys(_without(point, scenario_method(method).keys) for point in scenario.points())
    ]
    for method, point in points:
        _run(scenario, Play(method, point, 0))
    if chosen is None:
        if not section.tuning_seeds or not scenario.grid:
            return []
        return [Play(method, point, seed, tuning=True) for method, point in points for seed in section.tuning_seeds]
    if chosen:
        return [Play(method, chosen[method], seed) for seed in section.seeds for method in section.methods]
    return [Play(method, point, seed) for seed in section.seeds for method, point in points]


def _without(point: GridPoint, keys: Mapping[str, Any]) -> GridPoint:
    """Return the point without the keys that the method sets itself."""
    return tuple(pair for pair in point if pair[0] not in keys)


def num_plays(scenario: Scenario) -> int:
    """Return the number of runs of a comparison, those to choose constants included.

    Raises UserError as `plays_of` does.
    """
    section, tuning = scenario.scenario, plays_of(scenario, None)
    return len(tuning) + (len(section.methods) * len(section.seeds) if tuning else len(plays_of(scenario, {})))


def compare(
    scenario: Scenario,
    *,
    jobs: int,
    kept: Path | None,
    fresh: bool = False,
    told: Callable[[Play, RunOutcome, int, int], None] = lambda play, outcome, done, total: None,
) -> Comparison:
    """Make all runs.

    `kept` is the folder of results; with `fresh` they are computed anew. `told` is called after each run with the play,
    its outcome, the number done and the total.
    """
    found, chosen, section = Comparison(scenario), dict[str, GridPoint](), scenario.scenario
    tuning, total = plays_of(scenario, None), num_plays(scenario)
    for play, outcome in _played(scenario, tuning, jobs, kept, fresh):
        found.outcomes[play] = outcome
        told(play, outcome, len(found.outcomes), total)
    if tuning:
        for method in section.methods:
            rows = [row for row in found.rows(tuning=True) if row.method == method]
            chosen[method] = min(rows, key=_best_first).point
    for play, outcome in _played(scenario, plays_of(scenario, chosen), jobs, kept, fresh):
        found.outcomes[play] = outcome
        told(play, outcome, len(found.outcomes), total)
    return found


def _played(
    scenario: Scenario, plays: Sequence[Play], jobs: int, kept: Path | None, fresh: bool
) -> Iterable[tuple[Play, RunOutcome]]:
    """Yield the kept results first, then the others as they end."""
    left, paths = [], {play: _path(scenario, play, kept) for play in plays}
    for play in plays:
        outcome = None if fresh else _kept(paths[play])
        if outcome is None:
            left.append(play)
        else:
            yield play, outcome
    if jobs == 1 or len(left) < 2:
        yield from ((play, _keep(paths[play], _play(scenario, play))) for play in left)
        return
    context = multiprocessing.get_context("spawn")
    with context.Pool(min(jobs, len(left)), _begin) as pool:  # whatever ends this ends them
        for number, outcome in pool.imap_unordered(functools.partial(_play_numbered, scenario), enumerate(left)):
            yield left[number], _keep(paths[left[number]], outcome)


def _play_numbered(scenario: Scenario, numbered: tuple[int, Play]) -> tuple[int, RunOutcome]:
    return numbered[0], _play(scenario, numbered[1])


def _begin() -> None:
    """Prepare a worker process: ignore Ctrl-C, because the process that started it ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    keep_minimal_environment(PEER)


def _run(scenario: Scenario, play: Play) -> RunFile:
    """Return the run file of a play. Raises UserError, which names the method, if the method and the scenario do not
    fit."""
    method, here = scenario_method(play.method), scenario.at(play.point)
    work = here.scenario.work
    if work not in method.works:
        able = ", ".join(name for name, one in METHODS.items() if work in one.works)
        raise UserError(
            f'method {play.method}: cannot be played with scenario.work = "{work}"; possible methods: {able}',
            code="keys-disagree",
        )
    if here.hostile.percent and not method.hostile:
        raise UserError(
            f"method {play.method}: hostile.percent: hostile volunteers cannot be simulated with it; leave the key "
            "out, or take gossip",
            code="keys-disagree",
        )
    if here.hostile.kind != "absent" and not here.hostile.number(here.peers.number):
        raise UserError(
            f"hostile.percent: {here.hostile.percent:g} % of {here.peers.number} volunteers is nobody, so nobody makes "
            f'the attack "{here.hostile.attack}"; raise it, or set hostile.attack = "absent"',
            code="keys-disagree",
        )
    if (here.away or here.churn.stays_s) and not method.churn:
        raise UserError(
            f"method {play.method}: volunteers that come and go cannot be simulated with it; leave out churn.stays_s, "
            "[[away]] and peers.trace",
            code="keys-disagree",
        )
    try:
        run = here.run(play.seed, play.point, tuple(method.keys.items()))
        mean_of(run.merge.robust)  # raises if the rule's package is not installed
        if work == "pipeline":
            pipeline_play.check(here, run)
    except UserError as error:
        raise UserError(*(each.found_in(f"method {play.method}") for each in error.problems)) from None
    if here.scenario.warm_tokens and run.merge.init == "own":
        raise UserError(
            "scenario.warm_tokens: after a warm start all volunteers begin with the same weights; set merge.init = "
            '"common", or leave the key out',
            code="keys-disagree",
        )
    if 0 < here.scenario.warm_tokens < run.tokens_per_step:
        raise UserError(
            f"scenario.warm_tokens: less than one inner step, which is {run.tokens_per_step} tokens; raise it, or "
            "leave the key out",
            code="keys-disagree",
        )
    if here.peers.own_text and any(source.is_streamed for source in run.data.mixture):
        raise UserError(
            "peers.own_text: a data set that is streamed cannot be divided among the volunteers; set data.streaming = "
            "false",
            code="keys-disagree",
        )
    return run


def _play(scenario: Scenario, play: Play) -> RunOutcome:
    learn, threads = scenario_method(play.method).run, torch.get_num_threads()
    run, here = _run(scenario, play), scenario.at(play.point)
    if here.scenario.work == "systems":
        return play_scenario(here, run)
    if here.scenario.work == "pipeline":
        return pipeline_play.play_pipeline(here, run)
    assert learn is not None, "a method that learns"
    torch.set_num_threads(1)  # a core is its share, and sums are made in one order
    try:
        num_parts = here.peers.number if here.peers.own_text else 1
        setting = setting_of(here, Text.of(run, here.base, num_parts))
        if tokens := here.scenario.warm_tokens:
            setting = dataclasses.replace(setting, warm=warm_weights(run, here.base, tokens))
        outcome = learn(setting)
    finally:
        torch.set_num_threads(threads)
    if outcome.virtual_time_s > setting.churn_until_s:
        raise UserError(
            f"method {play.method}: churn.stays_s: volunteers are away so often that the run takes "
            f"{outcome.virtual_time_s:.0f} s, but their coming and going is drawn for {setting.churn_until_s:.0f} s "
            "only; raise churn.stays_s",
            code="too-much-churn",
        )
    return outcome


# ---------------------------------------------------------------- what was run before


def _path(scenario: Scenario, play: Play, folder: Path | None) -> Path | None:
    """Return the path at which a play's result is kept. Its name is a hash of everything that the result follows from;
    the version stands for the code."""
    if folder is None:
        return None
    run, scenario = _run(scenario, play), scenario.at(play.point)
    if not (run.model.is_built_in or run.model.from_scratch):
        return None  # its weights may be others next time
    has_text = scenario.scenario.work == "learning"  # else none is read
    text_sha256 = _text_sha256(run.data.model_dump_json(), scenario.base) if has_text else None
    told: dict[str, Any] = {
        "method": play.method,
        "run": run.model_dump(mode="json"),
        "text": text_sha256,
        "peers": scenario.peers.model_dump(mode="json", exclude={"round_steps", "trace", "most_stages"}),
        "links": scenario.links.model_dump(mode="json"),
        "hangs": [hang.model_dump(mode="json") for hang in scenario.hangs],
        "away": [away.model_dump(mode="json") for away in scenario.away],
        "churn": scenario.churn.model_dump(mode="json"),
        "hostile": scenario.hostile.model_dump(mode="json"),
        "curve_points": scenario.scenario.curve_points,
        "work": [scenario.scenario.work, scenario.scenario.rounds],
        "versions": [__version__, torch.__version__],
    }
    if scenario.scenario.work == "pipeline":
        told["pipeline"] = [scenario.scenario.lasts_s, scenario.peers.most_stages]
    if scenario.scenario.warm_tokens:
        told["warm"] = scenario.scenario.warm_tokens
    if any(scenario.figures.values()):
        told["figures"] = scenario.figures
    if rule_sha256 := source_sha256(run.merge.robust):
        told["rule"] = rule_sha256
    if ":" in play.method:
        told["learns"] = file_sha256("method", play.method, run.merge.kind.learns.partition(":")[0])
    return folder / f"{hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()}.json"


@functools.lru_cache(64)
def _text_sha256(data_json: str, base: Path) -> str:
    """Return the hash of the run's documents, from which follow the training text and the held-out text.

    Streamed documents are left out: they are read as they come.
    """
    digest = hashlib.sha256()
    for source in DataSection.model_validate_json(data_json).mixture:
        for document in () if source.is_streamed else read_documents(source, base):
            digest.update(hashlib.sha256(document.text).digest())
    return digest.hexdigest()


def _kept(path: Path | None) -> RunOutcome | None:
    if path is None:
        return None
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        table = json.loads(path.read_text(encoding="utf-8"))
        curve, counted = (tuple(point) for point in table["curve"]), table.get("peer_tokens", ())
        return RunOutcome(**table | {"curve": tuple(curve), "peer_tokens": tuple(counted)})
    return None


def _keep(path: Path | None, outcome: RunOutcome) -> RunOutcome:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(dataclasses.asdict(outcome)).encode())
    return outcome


# ---------------------------------------------------------------- the document


def document(found: Comparison) -> dict[str, Any]:
    """Return the document that `swarmtrain simulate --json` writes. Figures that do not exist are null."""
    section, best = found.scenario.scenario, found.best()
    rows = found.rows()
    return {
        "scenario": section.name,
        "seeds": list(section.seeds),
        "tuned_on": list(section.tuning_seeds) if found.scenario.grid else [],
        "results": [_result(row, best) | _attacked(found, row) for row in rows],
        "tuning": [
            {"method": row.method, "constants": dict(row.point), "held_out_loss": _figure(row.loss)}
            for row in found.rows(tuning=True)
        ],
    }


_WITHOUT_TENSORS = (
    "rounds",
    "throughput_share",
    "assignment_share",
    "moves",
    "staleness_rounds",
    "spread",
    "received_bytes_a_round",
)
"""Names of the results of kinds of work without tensors. A row has those that its kind of work produces."""


def _result(row: ComparisonRow, best: Mapping[str, ComparisonRow]) -> dict[str, Any]:
    to_diloco, to_paced = (row.ratio(best.get(name)) for name in ("diloco", "diloco-paced"))
    losses = [one.held_out_loss for one in row.outcomes.values()]
    first = next(iter(row.outcomes.values()))
    return {
        "method": row.method,
        "constants": dict(row.point),
        "held_out_loss": _figure(row.loss),
        "own_loss": _figure(row.mean("own_loss")),
        "stderr": _figure(standard_error(losses)),
        "ratio_to_diloco": _figure(to_diloco[0]),
        "ratio_to_diloco_stderr": _figure(to_diloco[1]),
        "ratio_to_diloco_paced": _figure(to_paced[0]),
        "ratio_to_diloco_paced_stderr": _figure(to_paced[1]),
        "virtual_time_s": _figure(row.mean("virtual_time_s")),
        "tokens": round(row.mean("tokens")),
        "bytes_per_inner_step": _figure(row.bytes_per_inner_step),
        "stall_share": _figure(row.mean("stall_share")),
        "fresh_share": _figure(row.mean("fresh_share")),
        "tokens_lost": round(row.mean("tokens_lost")),
        **{name: _figure(row.mean(name)) for name in _WITHOUT_TENSORS if getattr(first, name) is not None},
        "losses": {str(seed): _figure(one.held_out_loss) for seed, one in row.outcomes.items()},
        "curve": [[tokens, _figure(time_s), _figure(loss)] for tokens, time_s, loss in first.curve],
        "peer_tokens": list(first.peer_tokens),
    }


def _attacked(found: Comparison, row: ComparisonRow) -> dict[str, Any]:
    """Return the ratios of the losses to those without hostile volunteers, if the scenario has hostile volunteers."""
    if "hostile.attack" not in dict(row.point):
        return {}
    same, no_rule = (row.ratio(found.without_attack(row, rule)) for rule in (None, "none"))
    return {
        "ratio_to_absent": _figure(same[0]),
        "ratio_to_absent_stderr": _figure(same[1]),
        "ratio_to_absent_no_rule": _figure(no_rule[0]),
        "ratio_to_absent_no_rule_stderr": _figure(no_rule[1]),
        "named_hostile": _figure(row.mean("named_hostile")),
        "named_honest": _figure(row.mean("named_honest")),
    }


def _figure(value: float) -> float | None:
    return round(value, 6) if math.isfinite(value) else None

"""Comparison of methods in one file, for `simulate --plot FILE.html`: methods beside each other. Pure.

Figures are those of `simulate --json`. It draws the loss curves of each method and seed, which the reader chooses.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from swarmtrain.cli.report_parts import (
    answers_list,
    axis_choice,
    numbered,
    section,
    text_file,
    titled_table,
    top,
)
from swarmtrain.simulate.comparison import document
from swarmtrain.web.markup import Markup, element, joined
from swarmtrain.web.single_file import single_file
from swarmtrain.words import count_in_words, counted, one_line, shares_in_words, size_in_words, time_in_words

if TYPE_CHECKING:
    from swarmtrain.simulate.comparison import Comparison, ComparisonRow
    from swarmtrain.simulate.scenario import Scenario

_COLOURS = ("--training", "--held-out", "--other-1", "--other-2", "--other-3", "--other-4")
_DASHES = ((), (6, 4), (2, 3))
"""Of the curves: with the colours, so many differ."""
_KNOWN_VOLUNTEERS = 1024
_TIME_UNITS = (("virtual days", 86400.0), ("virtual hours", 3600.0), ("virtual minutes", 60.0))
_NEARLY_EQUAL = 1.02
"""Ratio of tokens at which losses are still said to be of equal tokens."""


def _of(unit: str) -> Callable[[float], str]:
    return lambda value: f"{value:.4g}{unit}"


def _loss(value: float) -> str:
    return f"{value:.4f}"


_COLUMNS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("held_out_loss", "Held-out, nats/byte", _loss),
    ("stderr", "± standard error", _loss),
    ("own_loss", "Of own weights", _loss),
    ("ratio_to_diloco", "To diloco", _loss),
    ("ratio_to_diloco_paced", "To diloco-paced", _loss),
    ("ratio_to_absent", "To no attack", _loss),
    ("ratio_to_absent_no_rule", "To no attack and no rule", _loss),
    ("named_hostile", "Named: hostile", _of("")),
    ("named_honest", "Named: honest", _of("")),
    ("throughput_share", "Of the ideal", lambda value: f"{value:.1%}"),
    ("assignment_share", "Stages could", lambda value: f"{value:.1%}"),
    ("virtual_time_s", "Virtual time", time_in_words),
    ("tokens", "Tokens", count_in_words),
    ("tokens_lost", "Tokens lost", count_in_words),
    ("bytes_per_inner_step", "Sent an inner step", size_in_words),
    ("stall_share", "Stall", lambda value: f"{value:.1%}"),
    ("fresh_share", "Fresh", lambda value: f"{value:.1%}"),
    ("staleness_rounds", "Rounds old", _of("")),
    ("spread", "Apart", lambda value: f"{value:.1e}"),
    ("received_bytes_a_round", "Received a round", size_in_words),
    ("rounds", "Rounds", count_in_words),
    ("moves", "Moves", _of("")),
)
"""Fields of a result, and how they are shown; a column is there if one of the results has it. A ratio has its standard
error beside it."""
_SHOWN_VALUES = 8


def comparison_page(found: Comparison, command: str, files: Mapping[str, str]) -> str:
    """Return the page as an HTML document.

    `command` made the comparison; `files` are the texts of the scenario and its run file, by name.
    """
    scenario, rows, results = found.scenario, found.rows(), document(found)["results"]
    best, name = found.best_under_conditions(), one_line(scenario.scenario.name)
    is_best = [best[row.method, row.conditions].point == row.point for row in rows]
    is_shown = [good and row.conditions == rows[0].conditions for good, row in zip(is_best, rows, strict=True)]
    seeds = counted(len(scenario.scenario.seeds), "seed")
    body = [
        top(
            name,
            element("span", "simulated", id="state", class_="pill", data_tone="good"),
            f"{counted(len({row.method for row in rows}), 'method')}, {seeds}, in virtual time",
            "Real models that learned real text; the clock is the scenario's."
            if scenario.scenario.work == "learning"
            else "Sizes and times of a swarm, without tensors.",
        ),
        element(
            "main",
            answers_list(_answers(found)),
            element(
                "div",
                *_curves(found, rows),
                _methods(rows, results, is_best),
                *_volunteers(found),
                _again(command, files),
                class_="column",
            ),
            id="main",
        ),
        element("footer", element("p", "This file asks nobody for anything."), class_="quiet"),
    ]
    data = {"curves": _drawn(rows, is_shown), "seeds": list(scenario.scenario.seeds), "results": results}
    return single_file(name, body, data, script="comparison", styles=("page.css", "report.css"))


def _name(row: ComparisonRow) -> str:
    return " ".join([row.method, *(f"{key.partition('.')[2]}={one_line(str(value))}" for key, value in row.point)])


def _answers(found: Comparison) -> list[tuple[str, str, str]]:
    """Answer what a comparison is made for: which method is best, and how sure that is. Under several conditions none
    is, and the answer is what they are.
    """
    if conditions := _varied(found.rows()):
        return [("What differs?", key, values) for key, values in conditions.items()]
    if found.scenario.scenario.work != "learning":
        rows = sorted(found.rows(), key=lambda row: -row.mean("throughput_share"))
        first = rows[0]
        return [("Which does the most?", _name(first), f"{first.mean('throughput_share'):.1%} of the possible work")]
    rows = sorted(found.best().values(), key=lambda row: (math.isnan(row.loss), row.loss))
    first, error = rows[0], rows[0].error("held_out_loss")
    sure = f" ± {error:.4f}" if math.isfinite(error) else ", of one seed"
    answers = [("Which learns the most?", _name(first), f"{first.loss:.4f} nats/byte{sure}, {_on_tokens(rows, first)}")]
    quickest = min(rows, key=lambda row: row.mean("virtual_time_s"))
    took = time_in_words(quickest.mean("virtual_time_s"))
    answers.append(("Which is over first?", _name(quickest), f"after {took}, with {quickest.loss:.4f} nats/byte"))
    least = min(rows, key=lambda row: row.bytes_per_inner_step)
    sent = size_in_words(least.bytes_per_inner_step)
    return [*answers, ("Which sends the least?", _name(least), f"{sent} an inner step")]


def _varied(rows: Sequence[ComparisonRow]) -> dict[str, str]:
    """Return the conditions of which the rows have several, and their values in words."""
    values: dict[str, dict[str, None]] = {}
    for row in rows:
        for key, value in row.conditions:
            values.setdefault(key, {})[one_line(str(value)) or "none"] = None
    return {
        key: ", ".join([*each][:_SHOWN_VALUES])
        + (f" and {len(each) - _SHOWN_VALUES} more" if len(each) > _SHOWN_VALUES else "")
        for key, each in values.items()
        if len(each) > 1
    }


def _on_tokens(rows: Sequence[ComparisonRow], first: ComparisonRow) -> str:
    """Say on how many tokens the best loss was reached; in a short run the last rounds end far apart."""
    least, most = (pick(row.mean("tokens") for row in rows) for pick in (min, max))
    if most <= _NEARLY_EQUAL * least:
        return "on equal tokens"
    own = count_in_words(round(first.mean("tokens")))
    return f"on {own} tokens; others on {count_in_words(round(least))} or more"


# ---------------------------------------------------------------- the curves


def _curves(found: Comparison, rows: Sequence[ComparisonRow]) -> list[Markup]:
    """Return the section that a script fills; nothing if no curve was measured."""
    if not any(one.curve for row in rows for one in row.outcomes.values()):
        return []
    title = element("h2", "Held-out loss ", element("span", "lower is better", class_="quiet"), id="learning-title")
    choice = axis_choice((("tokens", "by tokens"), (_time_unit(rows)[0], "by virtual time")))
    seeds = [element("option", f"seed {seed}", value=str(seed)) for seed in found.scenario.scenario.seeds]
    seed = element("label", "Of ", element("select", *seeds, id="seed"), class_="seed")
    chosen = element("div", element("legend", "Methods", class_="unseen"), id="methods", class_="methods")
    part = element(
        "section",
        element("div", title, choice, class_="title"),
        element("fieldset", chosen, seed, class_="chosen"),
        element("figure", id="chart-methods"),
        element("p", "Draw over a part to see it larger, and click twice to see all again.", class_="quiet"),
        id="learning",
        aria_labelledby="learning-title",
    )
    return [part]


def _drawn(rows: Sequence[ComparisonRow], is_shown: Sequence[bool]) -> list[dict[str, Any]]:
    """Return the curves of each row by seed, and how they are drawn, those that are shown at first first."""
    order = sorted(range(len(rows)), key=lambda place: (not is_shown[place], place))
    unit = _time_unit(rows)
    return [
        {
            "name": _name(rows[row]),
            "shown": is_shown[row],
            "colour": _COLOURS[place % len(_COLOURS)],
            "dash": list(_DASHES[place // len(_COLOURS) % len(_DASHES)]),
            "seeds": {str(seed): _curve(one.curve, unit) for seed, one in rows[row].outcomes.items()},
        }
        for place, row in enumerate(order)
    ]


def _time_unit(rows: Sequence[ComparisonRow]) -> tuple[str, float]:
    """Return the unit of the curves' times, and its seconds: of days, minutes would be numbers without meaning."""
    times_s = (time_s for row in rows for one in row.outcomes.values() for _, time_s, _ in one.curve)
    longest_s = max(filter(math.isfinite, times_s), default=0.0)
    return next(((name, unit_s) for name, unit_s in _TIME_UNITS if longest_s >= 2 * unit_s), _TIME_UNITS[-1])


def _curve(points: Sequence[tuple[int, float, float]], unit: tuple[str, float]) -> dict[str, list[float]]:
    """Return a curve as `{tokens, NAME, loss}`, with its times in the `unit` of that name."""
    name, unit_s = unit
    kept = [point for point in points if all(map(math.isfinite, point))]
    return {
        "tokens": [tokens for tokens, _, _ in kept],
        name: [round(time_s / unit_s, 4) for _, time_s, _ in kept],
        "loss": [float(f"{loss:.5g}") for _, _, loss in kept],
    }


# ---------------------------------------------------------------- the tables


def _methods(rows: Sequence[ComparisonRow], results: Sequence[Mapping[str, Any]], is_best: Sequence[bool]) -> Markup:
    columns = [column for column in _COLUMNS if any(result.get(column[0]) is not None for result in results)]
    lines = []
    for row, result, best in zip(rows, results, is_best, strict=True):
        cells = [element("td", _figure(result, key, words), class_="number") for key, _, words in columns]
        lines.append(element("tr", element("th", _name(row), scope="row"), *cells, class_="me" if best else ""))
    heads = [("Method", "name"), *((title, "number") for _, title, _ in columns)]
    table = titled_table("Methods and their figures", heads, lines, "figures")
    where = " under the same conditions" if _varied(rows) else ""
    about = f"means over the seeds; each method with its best constants{where} is bold"
    return section("comparison", "Methods", table, about=about)


def _figure(result: Mapping[str, Any], key: str, words: Callable[[float], str]) -> str:
    """Return a figure in words, with the standard error that a ratio has; empty if it does not exist."""
    value, error = result.get(key), result.get(f"{key}_stderr")
    if value is None:
        return ""
    return words(value) + (f" ± {words(error)}" if error is not None else "")


def _volunteers(found: Comparison) -> list[Markup]:
    """Return the table of the scenario's volunteers, and how much each trained with each method, at the first seed;
    nothing if they are others in each row.
    """
    rows = found.rows()
    if _varied(rows):
        return []
    scenario = found.scenario.at(rows[0].point)
    step_s = scenario.step_s
    best = [(row, next(iter(row.outcomes.values())).peer_tokens) for row in found.best().values()]
    counted_rows = [(row, tokens, shares_in_words(tokens)) for row, tokens in best if tokens]
    hostile = scenario.hostile.number(len(step_s))
    lines = []
    for number, each_s in enumerate(step_s[:_KNOWN_VOLUNTEERS]):
        cells = [element("td", f"{1000 * each_s:.4g} ms", class_="number"), element("td", _fate(scenario, number))]
        for _, tokens, shares in counted_rows:
            known = number < len(tokens)
            words = f"{count_in_words(tokens[number])}, {shares[number]}" if known else ""
            cells.append(element("td", words, class_="number"))
        name = f"p{number}" + (" (hostile)" if number >= len(step_s) - hostile else "")
        lines.append(element("tr", element("th", name, scope="row"), *cells))
    heads = [("Volunteer", "name"), ("Inner step", "number"), ("What befalls it", "")]
    heads += [(row.method, "number") for row, _, _ in counted_rows]
    notes = []
    if counted_rows:
        notes.append(f"tokens and share of the work, with seed {next(iter(counted_rows[0][0].outcomes))}")
    elif scenario.scenario.work == "learning":
        notes.append("these results were kept before each volunteer's work was counted; --fresh counts it")
    if len(step_s) > _KNOWN_VOLUNTEERS:
        notes.append(f"the first {_KNOWN_VOLUNTEERS} of {len(step_s)}")
    table = titled_table("Volunteers of the scenario", heads, lines, "volunteers")
    return [section("contributors", "Who took part", table, about="; ".join(notes))]


def _fate(scenario: Scenario, number: int) -> str:
    hangs = [each for each in scenario.hangs if each.peer == number]
    away = [each for each in scenario.away if each.peer == number]
    told = [f"hangs at {each.at_s:g} s for {each.for_s:g} s" for each in hangs[:3]]
    told += [f"is away from {each.at_s:g} s for {each.for_s:g} s" for each in away[:3]]
    more = len(hangs) + len(away) - len(told)
    return ", ".join(told) + (f" and {more} more" if more > 0 else "")


def _again(command: str, files: Mapping[str, str]) -> Markup:
    names = " and ".join(files)
    steps = [
        joined([f"Save {names}, with the run file where the scenario names it." if files else "Take the same files."]),
        joined([element("code", command), " computes the same. The same file and seed give the same results."]),
    ]
    texts = [element("details", element("summary", name), text_file(name, text)) for name, text in files.items()]
    return section("again", "How to make it again", numbered(steps), *texts)

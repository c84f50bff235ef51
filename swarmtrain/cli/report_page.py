"""Report of a run in one file: what the page shows, and what one wants to know later. Pure: a view in, HTML out.

Its words and curves are the page's (`cli/page.py`), its figures are those of `status --json`. Names and messages of
other peers only ever become text. A report is made to be passed on: what names files of the machine, or says what its
user does there, is only in it if that is asked for.
"""

from __future__ import annotations

import contextlib
import datetime
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import tomli_w

from swarmtrain.cli.facts import finite, sentence, shares_of, speed_of, state_in_words
from swarmtrain.cli.lines import clipped
from swarmtrain.cli.page import OF_THE_SWARM, panels_of
from swarmtrain.cli.peers import View, view_as_json
from swarmtrain.cli.report_parts import (
    answers_list,
    axis_choice,
    facts_list,
    moment,
    numbered,
    section,
    text_file,
    titled_table,
    top,
)
from swarmtrain.web.markup import Markup, element, joined
from swarmtrain.web.single_file import single_file
from swarmtrain.words import count_in_words, counted, one_line, short_peer

KNOWN_CONTRIBUTORS = 1024
"""Contributors that a peer's status has at most: those present and those who contributed most."""
_NAME_CELLS = 32
_FIRST_EVENTS, _LAST_EVENTS = 60, 140
"""Events of a group that are shown, if there are more."""
_GROUPS = (
    ("Who came and went", ("joined", "peer_joined", "peer_left", "done")),
    ("What failed", ("peer_lost", "error", "warning")),
    ("What was refused", ("refused", "clipped")),
    ("What changed", ("caught_up", "assigned", "moved", "paused", "resumed")),
)
_FIGURES = (
    *("peer", "name", "role", "version", "state", "process", "started_time", "time", "run_name", "run_sha256"),
    *("round", "run_tokens", "total_tokens", "own_tokens", "own_tokens_per_s", "swarm_tokens_per_s", "end_time"),
    *("held_out_loss", "swarm_loss", "source_losses", "sent_bytes", "received_bytes", "times_below_allreduce"),
    *("stall_share", "stages", "peers"),
)
"""Fields of `status --json` that a report repeats as they are. The others are the machine's, or mean nothing later."""


@dataclass(frozen=True, kw_only=True)
class ReportSources:
    """What a report is made of."""

    view: View
    history: Any
    """Record of the run, a `RunHistory`; None without one."""
    run_toml: bytes
    """The published run file; empty if it is not known."""
    with_machine: bool = False
    """True to tell also what is the machine's own: its paths, limits, warnings and errors."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """A report: its HTML document and what is in it."""

    html: str
    figures: Mapping[str, Any]
    """Fields of `status --json`."""
    num_events: int
    num_left_out: int
    """Events that are the machine's own, and were not asked for."""
    num_points: Mapping[str, int] = field(default_factory=dict)
    """Points of each curve, as they are drawn."""


def report_of(sources: ReportSources) -> Report:
    """Return the report of a run, as one of its peers knows it."""
    view, told = sources.view, sources.with_machine
    panels = panels_of(view, sources.history, is_owner=told)
    figures = {name: value for name, value in view_as_json(view).items() if name in _FIGURES}
    events = [] if sources.history is None else list(sources.history.events)
    shown = [event for event in events if told or event.event in OF_THE_SWARM]
    num_left_out = sum(event.event != "done" for event in events) - sum(event.event != "done" for event in shown)
    learning = panels["learning"]
    head, run = panels["head"], _published(sources.run_toml)
    body = [
        top(
            head["run"] or head["peer"],
            element("span", head["state"], id="state", class_="pill", data_tone=head["tone"]),
            joined([f"as {head['peer']} ({head['role']}) saw it, ", moment(view.status.time or view.now)]),
            sentence(view, for_strangers=not told, for_later=True),
        ),
        element(
            "main",
            _progress(panels["progress"]),
            answers_list(_answers(view, panels)),
            element(
                "div",
                _loss(learning),
                _contributors(view, events),
                *_stages(panels["pipeline"]),
                *_happened(shown, num_left_out),
                *_sample(panels["sample"]),
                section("traffic", f"Traffic of {head['peer']}", facts_list(_traffic(panels["traffic"]))),
                *_machine(panels),
                _run_file(run, view.status),
                _reproduction(run, view.status, learning["held_out"]),
                class_="column",
            ),
            id="main",
        ),
        _footer(view, head["version"]),
    ]
    title = f"{head['run'] or head['peer']}: {head['state']}"
    data = {"learning": learning, "figures": figures}
    return Report(
        html=single_file(title, body, data, script="report", styles=("page.css", "report.css")),
        figures=figures,
        num_events=len(shown),
        num_left_out=num_left_out,
        num_points={name: len(learning[name]["loss"]) for name in ("held_out", "swarm", "own")},
    )


def _answers(view: View, panels: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Return the page's first answers, with the one about the time as it is asked later."""
    learns, ends, here = ((each["name"], each["answer"], each["more"]) for each in panels["answers"])
    learns = (*learns[:2], learns[2].replace(" ago", " before this report"))  # which is read later
    status, tokens = view.status, panels["progress"]["tokens"]
    if status.total_tokens and status.run_tokens >= status.total_tokens:
        at = moment(status.end_time) if finite(status.end_time) > 0 else "it has all its tokens"
        return [learns, ("When was it complete?", at, tokens), here]
    return [learns, ends, here]


def _progress(progress: Mapping[str, Any]) -> Markup:
    percent = f"{100 * progress['done']:.1f}"
    bar = element(
        "div",
        element("div", data_part=f"{percent}%"),
        id="progress-bar",
        role="progressbar",
        aria_label="Share of the run's tokens",
        aria_valuemin="0",
        aria_valuemax="100",
        aria_valuenow=percent,
        aria_valuetext=progress["words"],
    )
    return element("section", bar, id="progress", aria_label="How far the run is")


def _loss(learning: Mapping[str, Any]) -> Markup:
    title = element("h2", "Loss ", element("span", "lower is better", class_="quiet"), id="learning-title")
    choice = axis_choice((("tokens", "by tokens"), ("time", "by time")))
    figures = [element("figure", id=name) for name in ("chart-held-out", "chart-training")]
    told = f"held-out by source: {learning['sources']}" if learning["sources"] else ""
    return element(
        "section",
        element("div", title, choice, class_="title"),
        element("div", *figures, class_="charts"),
        element("p", learning["help"], id="loss-help", class_="quiet"),
        element("p", told, id="sources", class_="quiet"),
        id="learning",
        aria_labelledby="learning-title",
    )


# ---------------------------------------------------------------- who took part


def _contributors(view: View, events: Iterable[Any]) -> Markup:
    """Return the table of everyone whom the peer's status has, the most work first."""
    peers = list(view.status.peers)
    shares = dict(zip((peer.peer for peer in peers), shares_of(peers), strict=True))
    most = max([1, *(peer.tokens for peer in peers)])
    last = {event.about: event for event in events if event.event in ("peer_joined", "peer_lost", "peer_left")}
    peers.sort(key=lambda peer: (peer.bootstrap and not peer.tokens, -peer.tokens, peer.peer))
    rows = [_contributor(view, peer, shares[peer.peer], peer.tokens / most, last.get(peer.peer)) for peer in peers]
    numbers = [(name, "number") for name in ("Share", "Tokens", "Speed")]
    heads = [("Name", "name"), *numbers, ("Trains on", ""), ("How it ended", "wraps")]
    volunteers = counted(sum(not peer.bootstrap for peer in peers), "volunteer")
    bounded = f", those present and those with the most work of more than {KNOWN_CONTRIBUTORS}"
    about = volunteers + (bounded if len(peers) >= KNOWN_CONTRIBUTORS else "")
    table = titled_table("Everyone who took part, the most work first", heads, rows, "peers")
    return section("contributors", "Who took part", table, about=about)


def _contributor(view: View, peer: Any, share: str, part: float, last: Any) -> Markup:
    is_me, is_role = peer.peer == view.status.peer, peer.bootstrap and not peer.tokens
    name, short = clipped(peer.name, _NAME_CELLS), short_peer(one_line(peer.peer))
    parts = [element("bdi", name or short)]
    parts += [element("span", short, class_="quiet")] if name and short != name else []
    parts += [element("span", "this peer", class_="you")] if is_me else []
    last_speed = finite(peer.tokens_per_s) or finite(peer.last_tokens_per_s)
    tokens, kind = ("bootstrap", "number") if is_role else (count_in_words(peer.tokens), "number tokens")
    cells = [
        element("td", "" if is_role else share, class_="number share"),
        element("td", tokens, class_=kind),
        element("td", speed_of(last_speed) if last_speed > 0 else "", class_="number"),
        element("td", clipped(peer.device, _NAME_CELLS)),
        element("td", _how_it_ended(view, peer, last), class_="wraps"),
    ]
    width = f"{100 * part:.1f}%"
    head = element("th", *parts, scope="row", title=one_line(peer.peer), data_part=width)
    return element("tr", head, *cells, class_="me" if is_me else "")


def _how_it_ended(view: View, peer: Any, last: Any) -> Markup:
    """Say how a peer ended, as far as the one that tells it knows; `last` is the last event about it, or None."""
    if peer.peer == view.status.peer:
        told = state_in_words(view)
        return joined([f"{told}, ", moment(view.status.time)] if view.phase.over else [told])
    if peer.present:
        return joined(["was here at the last look" if view.phase.over else "is here"])
    if last is not None and last.event != "peer_joined":
        return joined(["left, " if last.event == "peer_left" else "was lost, ", moment(last.last_time)])
    if finite(peer.heard_time) > 0:
        return joined(["is gone; last heard of ", moment(peer.heard_time)])
    return joined(["is gone"])


def _stages(stages: Sequence[Mapping[str, Any]] | None) -> list[Markup]:
    """Return who held the stages of a pipeline; nothing without one."""
    if not stages:
        return []
    rows = [
        element(
            "tr",
            element("th", str(stage["number"]), scope="row"),
            element("td", stage["holders"], class_="wraps"),
            element("td", stage["speed"], class_="number"),
            element("td", stage["most"], class_="number"),
        )
        for stage in stages
    ]
    heads = (("Stage", ""), ("Held by", "wraps"), ("Speed", "number"), ("Could do", "number"))
    return [section("pipeline", "Stages", titled_table("Stages", heads, rows, "stages"))]


# ---------------------------------------------------------------- what happened


def _happened(events: Sequence[Any], num_left_out: int) -> list[Markup]:
    """Return the events by groups, the oldest first; those with the same words are one line."""
    parts: list[Markup] = []
    for title, names in _GROUPS:
        lines = _lines(event for event in events if event.event in names)
        if lines:
            listed = element("ol", *lines, class_="events", tabindex="0", aria_label=title)
            parts += [element("h3", title), listed]
    if num_left_out:
        many = counted(num_left_out, "event")
        verb = "is" if num_left_out == 1 else "are"
        parts.append(element("p", f"{many} of this peer's own machine {verb} not in this report.", class_="quiet"))
    return [section("events", "What happened", *parts)] if parts else []


def _lines(events: Iterable[Any]) -> list[Markup]:
    """Return list items of events, and how many were left out if there are too many."""
    found: dict[str, list[float]] = {}  # by words: first time, last time, how often
    for event in events:
        first, last = finite(event.time), finite(event.last_time)
        known = found.setdefault(one_line(event.words), [first, last, 0])
        known[:] = [min(known[0], first), max(known[1], last), known[2] + max(1, event.count)]
    rows = sorted(found.items(), key=lambda row: row[1][0])
    items = [_line(words, *times) for words, times in rows]
    more = len(items) - _FIRST_EVENTS - _LAST_EVENTS
    if more <= 0:
        return items
    return [*items[:_FIRST_EVENTS], element("li", f"… {more} more …", class_="quiet"), *items[-_LAST_EVENTS:]]


def _line(words: str, first: float, last: float, count: float) -> Markup:
    if count < 2:
        return element("li", moment(first), f" {words}")
    return element("li", moment(first), f" {words} ({count:.0f} times, the last ", moment(last), ")")


def _sample(sample: Mapping[str, Any] | None) -> list[Markup]:
    if sample is None:
        return []
    about = joined(
        [
            "The swarm's model continued a line of its held-out text, ",
            moment(sample["time"]),
            f", after round {sample['round']} and {sample['tokens']} tokens.",
        ]
    )
    text = element(
        "pre",
        element("span", sample["prompt"], id="sample-prompt"),
        element("span", sample["text"], id="sample-written"),
        id="sample-text",
        tabindex="0",
    )
    return [section("sample", "What the model writes", element("p", about, class_="quiet"), text)]


def _traffic(traffic: Mapping[str, str]) -> list[tuple[str, str]]:
    names = (("Sent", "sent"), ("Received", "received"), ("Exchange", "exchange"), ("Merged", "merged"))
    return [(name, traffic[key]) for name, key in (*names, ("Reach", "reach"))]


def _machine(panels: Mapping[str, Any]) -> list[Markup]:
    """Return the machine's own facts and warnings, if they were asked for."""
    if panels["machine"] is None:
        return []
    warnings = [element("li", moment(time), f" {words}") for time, words in panels["notices"]]
    listed = [element("h3", "Warnings"), element("ol", *warnings, class_="events")] if warnings else []
    return [section("machine", f"Machine of {panels['head']['peer']}", facts_list(panels["machine"]["facts"]), *listed)]


# ---------------------------------------------------------------- the run, and how to make it again


@dataclass(frozen=True, kw_only=True)
class _PublishedFile:
    """A run file as it was published, and as one writes it to begin it again."""

    toml: str = ""
    """Without the section that only a bootstrap writes; empty if the file is not known."""
    table: Mapping[str, Any] = field(default_factory=dict)
    published: Mapping[str, Any] = field(default_factory=dict)


def _published(data: bytes) -> _PublishedFile:
    try:
        table = tomllib.loads(data.decode())
        published = table.pop("published", {})
        if not _has_types(table, published):
            return _PublishedFile()
        return _PublishedFile(toml=tomli_w.dumps(table) if table else "", table=table, published=published)
    except (ValueError, RecursionError):
        return _PublishedFile()


def _has_types(table: Mapping[str, Any], published: Any) -> bool:
    """Return whether what a report reads of a run file has the types that it has in one."""
    data = table.get("data", {})
    sources: Any = data.get("sources", []) if isinstance(data, dict) else []
    if not isinstance(sources, list):
        return False
    sections = [published, table.get("model", {}), data, *sources]
    if not all(isinstance(section, dict) for section in sections):
        return False
    lists = [published.get("dataset_revisions", []), *(source.get("paths", []) for source in (data, *sources))]
    return all(isinstance(each, list) for each in lists)


def _file_name(status: Any) -> str:
    """Return a name for the run file."""
    return f"{re.sub(r'[^A-Za-z0-9._-]+', '-', status.run_name).strip('-.')[:64] or 'run'}.toml"


def _run_file(run: _PublishedFile, status: Any) -> Markup:
    facts = [
        ("Identity", one_line(status.run_sha256)),
        ("Published", _published_at(run)),
        ("By", f"swarmtrain {run.published['swarmtrain']}" if "swarmtrain" in run.published else ""),
        ("Held-out text", _digest_of(run.published, "held_out")),
        ("Tokenizer", _digest_of(run.published, "tokenizer")),
        ("Model's files", _digest_of(run.published, "model_files")),
    ]
    if run.toml:
        shown = text_file(_file_name(status), run.toml)
    else:
        shown = element("p", "The run file is not known here; every peer has it in its folder, as run.toml.")
    return section("run-file", "The run file", facts_list(facts), shown)


def _published_at(run: _PublishedFile) -> str:
    with contextlib.suppress(ValueError, OverflowError, OSError):
        return moment(datetime.datetime.fromisoformat(str(run.published.get("created", ""))).timestamp())
    return ""


def _digest_of(published: Mapping[str, Any], name: str) -> str:
    sha256 = published.get(f"{name}_sha256")
    return f"{published.get(f'{name}_bytes', 0)} bytes, SHA-256 {sha256}" if sha256 else ""


def _reproduction(run: _PublishedFile, status: Any, held_out: Mapping[str, Any]) -> Markup:
    """Say how to train the same again, and what will not be the same."""
    name, volunteers = _file_name(status), sum(not peer.bootstrap for peer in status.peers)
    version = run.published.get("swarmtrain", one_line(status.version))
    code = [
        f"swarmtrain check {name}",
        f"swarmtrain local {name} --peers {min(max(1, volunteers), 256)}",
        f"swarmtrain bootstrap {name}",
    ]
    check, local, bootstrap = (element("code", line) for line in code)
    steps = [
        joined([f"Install swarmtrain {version}."]),
        joined([f"Save the run file above as {name}, in a folder of its own. ", _needed(run.table, run.published)]),
        joined([check, " says what will be trained, and what it costs."]),
        joined([local, " trains it on one machine with as many volunteers; ", bootstrap, " begins it for others."]),
    ]
    aim = ""
    if held_out["loss"]:
        loss, tokens = held_out["loss"][-1], count_in_words(held_out["tokens"][-1])
        aim = f"The last held-out loss of this run was {loss:.3f} nats/byte, at {tokens} tokens. "
    same = (
        "The initial weights follow from the seed, and the held-out text is the same if its SHA-256 is, which a new "
        "run's report says. Who trains how much, and who merges what when, depends on the volunteers' machines and "
        "links: the curves come out similar, and not equal."
    )
    return section("again", "How to make it again", numbered(steps), element("p", aim + same))


def _needed(table: Mapping[str, Any], published: Mapping[str, Any]) -> str:
    """Say what the run needs beside its file."""
    data, model = table.get("data", {}), table.get("model", {})
    sources = data.get("sources") or [data]
    revisions = published.get("dataset_revisions") or [published.get("dataset_revision", "")]
    told = [
        _source_in_words(source, revisions[place] if place < len(revisions) else "")
        for place, source in enumerate(sources)
    ]
    if model.get("source") == "huggingface":
        base = one_line(str(model.get("base", "")))
        # A bootstrap pins a model of the hub to a commit, and publishes of a folder its last name only.
        told.append(f"Its model is {base} of Hugging Face." if "@" in base else f"Its model is in a folder {base}.")
    return " ".join(dict.fromkeys(told))


def _source_in_words(source: Mapping[str, Any], revision: str) -> str:
    kind = source.get("source", "")
    if kind == "python-stdlib":
        return "It learns from the standard library of Python: another Python has another text."
    if kind == "datasets":
        at = f" at commit {revision}" if revision else ""
        return f"It learns from the data set {one_line(str(source.get('dataset', '')))}{at}."
    paths = ", ".join(one_line(str(path)) for path in source.get("paths", ()))
    return f"It learns from files that are not in this report, and belong beside it: {paths}." if paths else ""


def _footer(view: View, version: str) -> Markup:
    made = joined(
        [
            "Made ",
            moment(view.now),
            f" by swarmtrain {version}, ".replace(" ,", ","),
            "from what one peer knows; figures are those of its status. This file asks nobody for anything.",
        ]
    )
    return element("footer", element("p", made), class_="quiet")

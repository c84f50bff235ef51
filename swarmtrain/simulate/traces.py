"""Traces: files that say which peers came, went and hung when, one `time_s,peer,event` a line.

They come from a log or a generator. Events are `join`, `leave`, `crash`, `hang` and `wake`. A peer whose first event is
a `join` comes late; all others are present from the beginning. Optional columns are `speed`, `up_mbit` and `down_mbit`,
one value a peer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from swarmtrain.errors import UserError
from swarmtrain.problems import read_small_text
from swarmtrain.words import one_line

EVENTS = ("join", "leave", "crash", "hang", "wake")
_COLUMNS = ("time_s", "peer", "event")
_FIGURES = ("speed", "up_mbit", "down_mbit")
_LEAST, _MOST = 1e-3, 1e5
_MAX_BYTES = 16 * 2**20
_FOREVER_S = 1e9
_EXAMPLE = "examples/scenarios/traces/day-and-night.csv"


class TraceSpan(NamedTuple):
    """Span of time of one peer: its beginning and its length."""

    peer: int
    at_s: float
    for_s: float


@dataclass(frozen=True, kw_only=True)
class Trace:
    """Contents of a trace file.

    Spans are in the order in which they begin. One that never ends lasts for a billion seconds.
    """

    away: tuple[TraceSpan, ...] = ()
    hangs: tuple[TraceSpan, ...] = ()
    figures: Mapping[str, Mapping[int, float]] = field(default_factory=dict)
    """Values `speed`, `up_mbit` and `down_mbit` of the peers that have one."""


class _Row(NamedTuple):
    where: str
    time_s: float
    peer: int
    event: str
    figures: dict[str, float]


def load_trace(path: Path, num_peers: int) -> Trace:
    """Read a trace of peers from 0 to `num_peers` - 1. Raises UserError, which names the file and the line."""
    return trace_of(read_small_text(path, "a trace", _EXAMPLE, _MAX_BYTES), one_line(str(path)), num_peers)


def trace_of(text: str, origin: str, num_peers: int) -> Trace:
    """Parse a trace's text; `origin` names it in errors."""
    peers: dict[int, _TracedPeer] = {}
    figures: dict[str, dict[int, float]] = {name: {} for name in _FIGURES}
    now_s = 0.0
    for row in _rows(text, origin, num_peers):
        if row.time_s < now_s:
            raise UserError(
                f"{row.where}: time_s: {row.time_s:g} stands after {now_s:g}; sort the lines by time",
                code="bad-trace",
            )
        now_s = row.time_s
        peers.setdefault(row.peer, _TracedPeer(row.peer, is_away=row.event == "join")).goes_on(row)
        for name, value in row.figures.items():
            if (before := figures[name].setdefault(row.peer, value)) != value:
                raise UserError(
                    f"{row.where}: {name}: {value:g}, but an earlier line gives {before:g} for peer {row.peer}; give "
                    "each peer the same value everywhere",
                    code="bad-trace",
                )
    away, hangs = ([span for peer in peers.values() for span in peer.spans(kind)] for kind in ("away", "hangs"))
    return Trace(away=_in_order(away), hangs=_in_order(hangs), figures=figures)


def _in_order(spans: Sequence[TraceSpan]) -> tuple[TraceSpan, ...]:
    return tuple(sorted(spans, key=lambda span: (span.at_s, span.peer)))


class _TracedPeer:
    """Present state of one peer, the time since which it lasts, and the peer's earlier states."""

    def __init__(self, peer: int, *, is_away: bool) -> None:
        self.peer, self.since_s, self.last_s = peer, 0.0, -math.inf
        self.state = "away" if is_away else "here"
        self._past: list[tuple[str, TraceSpan]] = []

    def goes_on(self, row: _Row) -> None:
        """Process the peer's next event."""
        allowed = {"here": ("leave", "crash", "hang"), "hangs": ("leave", "crash", "wake"), "away": ("join",)}
        if row.event not in allowed[self.state]:
            is_what = {"here": "is there", "hangs": "hangs", "away": "is away"}[self.state]
            raise UserError(
                f"{row.where}: event: {row.event} is impossible, because peer {self.peer} {is_what} then; possible: "
                f"{', '.join(allowed[self.state])}",
                code="bad-trace",
            )
        if row.time_s <= self.last_s:
            raise UserError(
                f"{row.where}: time_s: peer {self.peer} has an event at {row.time_s:g} s already; give another time",
                code="bad-trace",
            )
        self._end(row.time_s)
        self.state = {"hang": "hangs", "leave": "away", "crash": "away"}.get(row.event, "here")
        self.since_s = self.last_s = row.time_s

    def _end(self, now_s: float) -> None:
        if now_s > self.since_s:  # who joins at 0 was never away
            self._past.append((self.state, TraceSpan(self.peer, self.since_s, now_s - self.since_s)))

    def spans(self, state: str) -> list[TraceSpan]:
        """Return the spans of time in which the peer was in `state`, once all events are processed."""
        last = (self.state, TraceSpan(self.peer, self.since_s, _FOREVER_S))
        return [span for each, span in (*self._past, last) if each == state]


def _rows(text: str, origin: str, num_peers: int) -> Iterator[_Row]:
    """Yield the rows line by line; empty lines and those that begin with # are skipped."""
    columns = list[str]()
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        where, cells = f"{origin}: line {number}", [cell.strip() for cell in line.split(",")]
        if not columns:
            columns = _columns(cells, where)
            continue
        if len(cells) != len(columns):
            raise UserError(
                f"{where}: {len(cells)} values for {len(columns)} columns; give a value, or nothing between commas, "
                f"for each of {', '.join(columns)}",
                code="bad-trace",
            )
        yield _row(dict(zip(columns, cells, strict=True)), where, num_peers)
    if not columns:
        raise UserError(
            f"{origin}: is empty; its first line must name the columns: {','.join(_COLUMNS)}", code="bad-trace"
        )


def _columns(cells: list[str], where: str) -> list[str]:
    missing = [name for name in _COLUMNS if name not in cells]
    others = [name for name in cells if name not in (*_COLUMNS, *_FIGURES)]
    if missing or others or len(set(cells)) < len(cells):
        raise UserError(
            f"{where}: the first line must name the columns, each once: {', '.join(_COLUMNS)}, and those of "
            f"{', '.join(_FIGURES)} that the file has",
            code="bad-trace",
        )
    return cells


def _row(cells: Mapping[str, str], where: str, num_peers: int) -> _Row:
    peer = cells["peer"]
    if not peer:
        raise UserError(
            f"{where}: peer: is empty; give the number of a volunteer, 0 to {num_peers - 1}", code="no-such-volunteer"
        )
    if not (peer.isascii() and peer.isdigit() and int(peer) < num_peers):
        raise UserError(
            f"{where}: peer: there is no volunteer {_shown(peer)}; the {num_peers} volunteers are 0 to {num_peers - 1}",
            code="no-such-volunteer",
        )
    if cells["event"] not in EVENTS:
        raise UserError(f"{where}: event: {_shown(cells['event'])}; allowed: {', '.join(EVENTS)}", code="bad-trace")
    figures = {
        name: _number(cells[name], f"{where}: {name}", least=_LEAST, most=_MOST) for name in _FIGURES if cells.get(name)
    }
    time_s = _number(cells["time_s"], f"{where}: time_s", least=0.0, most=_FOREVER_S)
    return _Row(where, time_s, int(peer), cells["event"], figures)


def _number(text: str, what: str, *, least: float, most: float) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not least <= value <= most:
        raise UserError(f"{what}: {_shown(text)}; allowed: a number from {least:g} to {most:g}", code="out-of-range")
    return value


def _shown(text: str) -> str:
    return one_line(text[:60]) or "nothing"

"""Text about a peer: the status page, the screen of `watch`, and one plain line. Pure: a view in, lines out.

No line is wider and no screen higher than asked for: longer text wraps, or its less important part is left out. Names
and messages may come from other peers: they are shown as plain text, escaped and shortened.
"""

from __future__ import annotations

import time
from collections.abc import Container, Sequence
from typing import Any

from rich.cells import cell_len, chop_cells
from rich.text import Text

from swarmtrain.cli.facts import (
    age_in_words,
    archive_in_words,
    blind_guess_in_words,
    checkpoint_in_words,
    clock_in_words,
    contribution_in_words,
    device_of,
    exchange_in_words,
    finite,
    limits_in_words,
    losses_in_words,
    progress_in_words,
    round_in_words,
    sentence,
    shares_of,
    speed_of,
    speeds_in_words,
    state_in_words,
    time_left_in_words,
    tokens_in_words,
    traffic_in_words,
    volunteers_in_words,
)
from swarmtrain.cli.lines import FACT_INDENT, FACT_LINES, aligned, clipped, cut_line, fact_lines, wrapped_lines
from swarmtrain.cli.peers import PeerPhase, View, title
from swarmtrain.cli.plot import plot
from swarmtrain.v1 import control_pb2 as wire
from swarmtrain.words import (
    count_in_words,
    one_line,
    percent_in_words,
    short_peer,
    time_in_words,
)

UNCUT = 10_000
"""Width, or number of lines, without a terminal: everything is written."""
_NAME_CELLS = 16
_LEAST_NAME_CELLS = 8
_MOST_STAGES = 8
_LABEL_CELLS = 8
_TITLE_CELLS = 160
_SERVED_PEERS = 8
_MIN_PLOT_LINES = 3
_HIGH_LINES = 30
_COLOURS = {"training": "green", "serving": "green", "waiting": "yellow", "paused": "yellow", "finishing": "cyan"}


# ---------------------------------------------------------------- lines


def _peer_rows(view: View, width: int, most: int) -> list[tuple[str, bool]]:
    """Return rows of at most `most` peers, as (line, whether it is present), this one first.

    The last row may sum up the rest. Narrow lines leave out less important columns; if this peer is over, presence is
    left out.
    """
    status = view.status
    order = sorted(
        zip(status.peers, shares_of(status.peers), strict=True),
        key=lambda row: (row[0].peer != status.peer, not row[0].present, -row[0].tokens, row[0].peer),
    )
    shown = order if len(order) <= most else order[: max(0, most - 1)]
    cells, columns = _NAME_CELLS, {"name", "peer", "tokens", "share", "now", "here", "doing", "speed"}
    if view.phase.over:
        columns -= {"now", "here", "doing", "speed"}
    for less in ("", "peer", "here", "doing", "share", "cells"):
        columns -= {less}
        cells = _LEAST_NAME_CELLS if less == "cells" else cells
        lines = aligned([_peer_row(status, peer, share, columns, cells) for peer, share in shown], right=(2, 3))
        if all(cell_len(line) <= width for line in lines):
            break
    found = [(line, peer.present or view.phase.over) for line, (peer, _) in zip(lines, shown, strict=True)]
    if rest := [peer for peer, _ in order[len(shown) :]]:
        here, tokens = sum(peer.present for peer in rest), sum(peer.tokens for peer in rest)
        now = "" if view.phase.over else f"{here} here, {len(rest) - here} away, "
        words = f"and {len(rest)} more: {now}{count_in_words(tokens)} tokens"
        found.append((words, False))
    return found if most > 0 else []


def _peer_row(status: Any, peer: Any, share: str, columns: Container[str], cells: int) -> list[str]:
    """Return the cells of a peer's row; unwanted columns are empty."""
    own, is_role = peer.peer == status.peer, peer.bootstrap and not peer.tokens
    short, name = short_peer(one_line(peer.peer)), clipped(peer.name, cells)
    doing = round_in_words(peer) if peer.present and not peer.bootstrap else ""
    here = "here" if peer.present else "away"
    if "now" not in columns:
        doing = ""
    elif "doing" not in columns or not ("here" in columns or doing):
        doing = here
    row = {
        "name": name + " (you)" * own,
        "peer": short if short != one_line(peer.name) else "",
        "tokens": "bootstrap" if is_role else f"{count_in_words(peer.tokens)} tokens",
        "share": "" if is_role else share,
        "here": here,
        "doing": doing,
        "speed": speed_of(peer.tokens_per_s) if peer.present and finite(peer.tokens_per_s) > 0 else "",
    }
    return [text if name in columns or name == "doing" else "" for name, text in row.items()]


def _stage_lines(status: Any, width: int) -> list[Text]:
    """Return a line for each stage of a pipeline; of many stages, those that lack peers or are slow."""
    stages = sorted(status.stages, key=lambda stage: (finite(stage.most_tokens_per_s), stage.number))[:_MOST_STAGES]
    rows = [
        (
            f"stage {stage.number}",
            f"{stage.num_peers} peer{'s' if stage.num_peers != 1 else ''}" if stage.num_peers else "nobody",
            f"{speed_of(stage.tokens_per_s)} of {speed_of(stage.most_tokens_per_s)}",
            "(you)" if stage.mine else "",
        )
        for stage in sorted(stages, key=lambda stage: stage.number)
    ]
    lines = [cut_line(width, line) for line in aligned(rows)]
    rest = len(status.stages) - len(lines)
    more = f"and {rest} more stage{'s' if rest != 1 else ''}, not slower than these"
    return [*lines, cut_line(width, (more, "dim"))] if rest else lines


def _peer_lines(view: View, width: int, most: int) -> list[Text]:
    return [cut_line(width, (line, "" if here else "dim")) for line, here in _peer_rows(view, width, most)]


def _notice_lines(view: View, width: int, most: int) -> list[Text]:
    """Return the last few warnings, each whole."""
    notices = list(view.status.notices)[-most:] if most else []
    return [
        line
        for notice in notices
        for line in wrapped_lines(
            f"{clock_in_words(notice.time, view.now)} {one_line(notice.message)}", width, FACT_LINES, "yellow"
        )
    ]


def _title_line(view: View, width: int) -> Text:
    """Return a line with who the peer is, and at the right in a word what it does."""
    status, word = view.status, state_in_words(view)
    name, short = title(status, view.folder), short_peer(one_line(status.peer)) if status.peer else ""
    role = one_line(status.role) or "peer"
    colour = _COLOURS.get(
        word,
        "red" if view.phase in (PeerPhase.DIED, PeerPhase.FAILED, PeerPhase.LOST, PeerPhase.SILENT) else "",
    )
    styled = (word, f"bold {colour}".strip())
    peer = f" ({short})" if short and short != name else ""
    for cells in (32, 24, _NAME_CELLS):  # of the peer's name, and of the run's
        who, run = clipped(name, cells), clipped(status.run_name, cells)
        about = f"{'' if name == role else f', {role}'}" + (f" in run {run}" if run else "")
        if cell_len(who + peer + about) + len(word) < width:
            break
    left = cut_line(max(1, width - len(word) - 1), (who, "bold"), f"{peer}{about}")
    if width >= UNCUT:  # for a file or another program: there is no right edge
        return cut_line(width, left, ": ", styled)
    return cut_line(width, left, " " * max(1, min(width, _TITLE_CELLS) - left.cell_len - len(word)), styled)


# ---------------------------------------------------------------- the status page


def draw_status(view: View, width: int, most_peers: int) -> list[Text]:
    """Draw all that is known of a peer, a line for each fact. The invite is not included, since it must not be cut."""
    status = view.status
    lines = [_title_line(view, width), *wrapped_lines(sentence(view), width, 5)]
    if view.folder is not None:
        lines += fact_lines(width, "folder", one_line(str(view.folder)))
    if not status.time:
        return lines
    loss = losses_in_words(view)
    steps = f", inner step {status.inner_steps_done} of {status.inner_steps}" if status.inner_steps else ""
    facts = {
        "run": f"{one_line(status.run_name) or 'not known yet'} {one_line(status.run_sha256)[:12]}",
        "progress": progress_in_words(view),
        "round": f"{status.round}{steps}",
        "loss": loss + _loss_hint(status, width - FACT_INDENT - cell_len(loss)),
        "speed": speeds_in_words(status),
        "contribution": contribution_in_words(status),
        "traffic": traffic_in_words(status),
        "exchange": exchange_in_words(status),
        "merged": one_line(status.last_merge),
        "data": one_line(status.data),
        "adapter": one_line(status.adapter),
        "reach": one_line(status.reach),
        "archive": archive_in_words(view),
        "checkpoint": "" if status.HasField("archive") else checkpoint_in_words(view),
        "device": device_of(status),
        "limits": limits_in_words(status.limits) if status.HasField("limits") else "",
    }
    if view.phase is PeerPhase.RUNNING:
        up = time_in_words(max(0.0, finite(view.now - status.started_time)))
        facts["process"] = f"{status.pid}, for {up}, version {one_line(status.version)}"
    if status.role == "bootstrap":
        del facts["contribution"]
    lines += [line for name, text in facts.items() if text for line in fact_lines(width, name, text)]
    if status.stages:
        lines += [cut_line(width, ("stages", "dim")), *_stage_lines(status, width)]
    if status.notices:
        lines += [cut_line(width, ("last warnings", "dim")), *_notice_lines(view, width, 3)]
    return [*lines, *_contributors(view, width, most_peers)]


def _contributors(view: View, width: int, most: int) -> list[Text]:
    if not view.status.peers:
        return []
    caption = cut_line(width, ("contributions", "dim"), f"  {volunteers_in_words(view)}")
    return [caption, *_peer_lines(view, width, most)]


def serving_lines(view: View, width: int) -> list[Text]:
    """Draw what a bootstrap's own display adds: the swarm's loss, the archive, who is present."""
    facts = {"loss": losses_in_words(view), "archive": archive_in_words(view)}
    lines = [line for name, text in facts.items() for line in fact_lines(width, name, text)]
    if all(peer.peer == view.status.peer for peer in view.status.peers):
        return lines
    return lines + _contributors(view, width, _SERVED_PEERS)


def list_peers(views: Sequence[View], width: int) -> list[Text]:
    """Return one line per peer; if that is too wide, the peer's folder has a line of its own."""
    rows = [
        [
            clipped(title(view.status, view.folder), _NAME_CELLS),
            short_peer(one_line(view.status.peer)) if view.status.peer else "",
            one_line(view.status.role),
            state_in_words(view),
            "" if view.phase is PeerPhase.RUNNING or not view.status.time else age_in_words(view.status.time, view),
            clipped(view.status.run_name, _NAME_CELLS),
            percent_in_words(view.status.run_tokens, view.status.total_tokens) if view.status.total_tokens else "",
            one_line(str(view.folder)),
        ]
        for view in views
    ]
    lines = aligned(rows, right=(6,))
    if all(cell_len(line) <= width for line in lines):
        return [cut_line(width, line) for line in lines]
    short = aligned([row[:-1] for row in rows], right=(6,))
    folders = [chop_cells(f"  {row[-1]}", max(2, width)) for row in rows]
    return [
        line
        for head, folder in zip(short, folders, strict=True)
        for line in [cut_line(width, head), *(cut_line(width, (piece, "dim")) for piece in folder)]
    ]


def plain_line(view: View) -> str:
    """Return one line, for a terminal that cannot be drawn on and for a file."""
    status = view.status
    clock = time.strftime("%H:%M:%S", time.localtime(view.now))
    state, said = state_in_words(view), sentence(view)
    said = said.removeprefix(f"{PeerPhase.ENDING.value}: ")
    parts = [f"{clock} {title(status, view.folder)} {state}: {said}"]
    is_known = status.run_tokens or status.state != wire.PEER_STATE_STARTING  # figures only once it has some
    if status.time and is_known and not view.phase.over:
        parts += [f"round {status.round}", f"loss {losses_in_words(view)}"]
        parts += [tokens_in_words(view), time_left_in_words(view)]
        parts.append(f"own {contribution_in_words(status)}")
    return "; ".join(part for part in parts if part)


# ---------------------------------------------------------------- the screen of `watch`


def draw_watch(
    view: View, width: int, height: int, again: str = "swarmtrain watch", *, ascii_only: bool = False
) -> list[Text]:
    """Draw a screen of at most `height` lines; the least important blocks are dropped first. `again` is the command
    that shows this peer."""
    status = view.status
    top = [
        _title_line(view, width),
        *wrapped_lines(sentence(view), width, 3 if view.phase is PeerPhase.RUNNING else 5),
    ]
    foot = cut_line(width, (_foot(view, width, again), "dim"))
    room = height - len(top) - 1
    blocks = {}
    for name, variants in _blocks(view, width, height, ascii_only).items():
        blocks[name] = next((block for block in variants if len(block) <= room), [])
        room -= len(blocks[name])
    progress, notices = blocks.pop("progress"), blocks.pop("warnings")
    plot_lines, peer_lines = _shares_of(room, len(status.peers))
    body = [
        *top,
        *(_draw_losses(view, width, plot_lines, ascii_only) if plot_lines else []),
        *progress,
        *(line for block in blocks.values() for line in block),
        *(_contributors(view, width, peer_lines) if peer_lines else []),
        *notices,
    ]
    return [*body[: height - 1], foot][:height]


def _foot(view: View, width: int, again: str) -> str:
    """Return the last line: on a narrow screen what leads on is kept, before what explains."""
    leave, page = "q closes this screen", f"a page: {again} --web"
    if view.phase.over:
        return leave if view.note else ""
    lines = (
        f"{leave}; the peer keeps running; {page}",
        f"{leave}, not the peer; {page}",
        f"q: close; {page}",
        f"{leave}; the peer keeps running; a page: add --web",
        f"{leave}; a page: add --web",
    )
    return next((line for line in lines if cell_len(line) <= width), leave)


def _blocks(view: View, width: int, height: int, ascii_only: bool) -> dict[str, list[list[Text]]]:
    """Return the blocks of fixed height, the most important first, each with its variants, the longest first."""
    status = view.status
    bootstrap = status.role == "bootstrap"
    facts = {
        "progress": "",
        "stages": "",
        "speed": speeds_in_words(status),
        "archive": archive_in_words(view),
        "contribution": "" if bootstrap else contribution_in_words(status),
        "traffic": traffic_in_words(status),
        "warnings": "",
        "checkpoint": "" if bootstrap else checkpoint_in_words(view),
        "exchange": exchange_in_words(status),
        "merged": one_line(status.last_merge),
        "device": device_of(status),
        "limits": limits_in_words(status.limits) if height >= _HIGH_LINES and status.HasField("limits") else "",
    }
    blocks = {
        name: [fact_lines(width, name, text), fact_lines(width, name, text, 1)] if text else []
        for name, text in facts.items()
    }
    blocks["progress"] = [_progress_bar(view, width, ascii_only)]
    blocks["stages"] = [_stage_lines(status, width)]
    blocks["warnings"] = [_notice_lines(view, width, most) for most in (2, 1)]
    return blocks


def _shares_of(room: int, num_peers: int) -> tuple[int, int]:
    """Return (lines of the loss curve with its two captions, rows of peers below their caption)."""
    most_plot = _MIN_PLOT_LINES + 2
    if room < most_plot:
        return 0, max(0, min(num_peers, room - 1))
    rows = max(0, min(num_peers, max(room - most_plot - 1, 0), max(3, room // 3)))
    return min(room - (rows + 1 if rows else 0), 2 + 20), rows


def _progress_bar(view: View, width: int, ascii_only: bool) -> list[Text]:
    status = view.status
    words = progress_in_words(view)
    cells = width - cell_len(words) - 2
    if cells < 8 or not status.total_tokens:
        return fact_lines(width, "progress", words)
    done = int(cells * min(1.0, status.run_tokens / status.total_tokens))
    full, empty = ("#", ".") if ascii_only else ("█", "░")
    return [cut_line(width, (full * done, "green"), (empty * (cells - done), "dim"), f"  {words}")]


def _loss_hint(status: Any, cells: int) -> str:
    """Say how to read a loss, in at most `cells`; empty if they do not do, or there is none. A guess is compared with a
    training loss only: held-out losses are by the byte."""
    hints = ["; lower is better"] if status.losses else []
    if any(finite(point.loss) for point in status.losses):
        hints.insert(0, f"; {blind_guess_in_words(status)}")
    return next((hint for hint in hints if cell_len(hint) <= cells), "")


def _draw_losses(view: View, width: int, height: int, ascii_only: bool) -> list[Text]:
    """Draw the loss curves with their axes in `height` lines; without a loss, only a line that says so."""
    status, points = view.status, list(view.status.losses)
    training = [(float(point.run_tokens), point.loss) for point in points if finite(point.loss)]
    held_out = [(float(point.run_tokens), point.held_out_loss) for point in points if finite(point.held_out_loss)]
    told = losses_in_words(view, width - cell_len("loss  "))
    caption = cut_line(width, ("loss  ", "dim"), told, (_loss_hint(status, width - cell_len(f"loss  {told}")), "dim"))
    if not training and not held_out:
        return [caption]
    inner = max(1, width - 2 * (_LABEL_CELLS + 1))
    drawn = plot(training, held_out, inner, height - 2, ascii_only=ascii_only)
    wall = "|" if ascii_only else "│"
    lines = [caption]
    for number, line in enumerate(drawn.lines):
        ends = {0: 0, len(drawn.lines) - 1: 1}
        left, right = (labels[ends[number]] if number in ends else "" for labels in drawn.labels)
        curve = Text()
        for character, owner in zip(line, drawn.owners[number], strict=True):
            curve.append(character, ("cyan", "magenta")[owner] if owner >= 0 else "")
        lines.append(cut_line(width, (f"{left:>{_LABEL_CELLS}}", "cyan"), wall, curve, wall, (right, "magenta")))
    first, last = (f"{count_in_words(points[place].run_tokens)} tokens" for place in (0, -1))
    between = " " * max(1, inner - len(first) - len(last))
    legends = ("training", "held-out") if training and held_out else ("", "")
    lines.append(
        cut_line(width, (f"{legends[0]:>{_LABEL_CELLS}} ", "cyan"), first, between, last, (f" {legends[1]}", "magenta"))
    )
    return lines

"""Text about a peer: the status page, the screen of `watch`, and one plain line. Pure: a view in, lines out.

No line is wider and no screen higher than asked for: longer text wraps, or its less important part is left out. Names
and messages may come from other peers: they are shown as plain text, escaped and shortened.
"""

from __future__ import annotations

import math
import shlex
import time
from collections.abc import Container, Sequence
from typing import Any

from rich.cells import cell_len, chop_cells
from rich.text import Text

from swarmtrain.cli.lines import FACT_LINES, aligned, clipped, cut_line, fact_lines, wrapped_lines
from swarmtrain.cli.peers import PeerPhase, View, title
from swarmtrain.cli.plot import plot
from swarmtrain.peer.lifecycle.start_options import Started, StartedFile
from swarmtrain.v1 import control_pb2 as wire
from swarmtrain.words import (
    ago_in_words,
    below_in_words,
    count_in_words,
    counted,
    device_in_words,
    loss_in_words,
    one_line,
    percent_in_words,
    shares_in_words,
    short_peer,
    size_in_words,
    source_losses_in_words,
    speed_in_words,
    stages_in_words,
    time_in_words,
)

__all__ = [
    "UNCUT",
    "contribution_in_words",
    "draw_status",
    "draw_watch",
    "limits_in_words",
    "list_peers",
    "plain_line",
    "progress_in_words",
    "sentence",
    "serving_lines",
    "state_in_words",
]

UNCUT = 10_000
"""Width, or number of lines, without a terminal: everything is written."""
_NAME_CELLS = 16
_LEAST_NAME_CELLS = 8
_MAX_YEARS = 10
_MOST_STAGES = 8
_LABEL_CELLS = 8
_TITLE_CELLS = 160
_SERVED_PEERS = 8
_MIN_PLOT_LINES = 3
_HIGH_LINES = 30
_STATES = {
    wire.PEER_STATE_STARTING: "starting",
    wire.PEER_STATE_WAITING: "waiting",
    wire.PEER_STATE_TRAINING: "training",
    wire.PEER_STATE_PAUSED: "paused",
    wire.PEER_STATE_SERVING: "serving",
    wire.PEER_STATE_FINISHING: "finishing",
    wire.PEER_STATE_DONE: "done",
    wire.PEER_STATE_FAILED: "failed",
}
_WORKING = (wire.PEER_STATE_WAITING, wire.PEER_STATE_TRAINING, wire.PEER_STATE_SERVING, wire.PEER_STATE_FINISHING)
_OVER = (wire.PEER_STATE_DONE, wire.PEER_STATE_FAILED)
_REASONS = {
    "total_tokens": "total_tokens: the run has trained all of them",
    "interrupted": "it was interrupted",
    "asked": "it was asked to leave",
}
_COLOURS = {"training": "green", "serving": "green", "waiting": "yellow", "paused": "yellow", "finishing": "cyan"}


# ---------------------------------------------------------------- facts in words


def state_in_words(view: View) -> str:
    """Say in a word what the peer is doing."""
    if view.phase is PeerPhase.RUNNING and view.status.state in _OVER:
        return PeerPhase.ENDING.value
    return _STATES.get(view.status.state, "running") if view.phase is PeerPhase.RUNNING else view.phase.value


def sentence(view: View) -> str:
    """Say what the peer is doing and why, or how it ended and what to do about it."""
    status = view.status
    ago = _ago(status.time, view)
    told = _REASONS.get(status.end_reason, one_line(status.end_reason))
    then = [one_line(view.note)] if view.note else []
    match view.phase:
        case PeerPhase.RUNNING | PeerPhase.ENDING:
            text = one_line(status.doing) or f"{_STATES.get(status.state, 'running')}, no details"
            return f"ending: {told or text}" if status.state in _OVER else text
        case PeerPhase.STARTING:
            return "it is starting, and does not answer yet"
        case PeerPhase.SILENT:
            return f"it runs but does not answer; its last status, {ago}: {one_line(status.doing) or 'none'}"
        case PeerPhase.ENDED:
            return "; ".join([f"ended {ago}" + (f": {told}" if told else ""), *then])
        case PeerPhase.LOST:
            return "; ".join([f"no answer since {_clock(status.time, view.now)} ({_was(status)})", *then])
        case PeerPhase.FAILED:
            text = f"failed {ago}: {told or 'it did not say why'} (exit code {status.exit_code})"
        case PeerPhase.DIED if not status.time or status.state in _OVER:
            text = "died while it was starting, without an error message"
        case PeerPhase.DIED:
            text = f"died about {_clock(status.time, view.now)} ({_was(status)})"
    return "; ".join([text, *then, _start_again(view)])


def _was(status: Any) -> str:
    state = _STATES.get(status.state, "running")
    return f"it was training round {status.round}" if state == "training" else f"it was {state}"


def _start_again(view: View) -> str:
    status = view.status
    started = StartedFile(view.folder).read() if view.folder is not None else Started()
    if started.command:
        return f"start it again with `{one_line(started.line(view.folder))}`"
    what = "bootstrap RUN.toml" if status.role == "bootstrap" else "join"
    given = status.name not in ("", short_peer(status.peer), "bootstrap" if status.role == "bootstrap" else "")
    name = f" --name {shlex.quote(one_line(status.name))}" if given else ""
    where = f" --dir {shlex.quote(str(view.folder))}" if view.folder is not None else ""
    return f"start it again with `swarmtrain {what}{name}{where}` and the other options it had"


def _ago(at: float, view: View) -> str:
    return ago_in_words(_finite(view.now - at))


def _clock(at: float, now: float) -> str:
    """Format a local time, with the date if it is not today's."""
    try:
        then, today = time.localtime(at), time.localtime(now)
    except (OverflowError, ValueError, OSError):
        return "an unknown time"
    return time.strftime("%H:%M" if then[:3] == today[:3] else "%Y-%m-%d %H:%M", then)


def _finite(number: float) -> float:
    return number if math.isfinite(number) else 0.0


def _speed(tokens_per_s: float) -> str:
    return speed_in_words(_finite(tokens_per_s))


def _speeds(status: Any) -> str:
    """Format the peer's own speed and the swarm's, which is the sum of all peers' speeds."""
    swarm = f"swarm {_speed(status.swarm_tokens_per_s)}"
    return swarm if status.role == "bootstrap" else f"own {_speed(status.own_tokens_per_s)}, {swarm}"


def _progress(view: View) -> str:
    status = view.status
    if not status.total_tokens:
        return f"{count_in_words(status.run_tokens)} tokens" if status.run_tokens else "not known yet"
    return f"{percent_in_words(status.run_tokens, status.total_tokens)} of {count_in_words(status.total_tokens)} tokens"


def _left(view: View) -> str:
    """Say how long the run still takes at its measured speed, or when it was completed; empty if neither is known."""
    status = view.status
    end_time = _finite(status.end_time)
    if not status.total_tokens:
        return ""
    if status.run_tokens >= status.total_tokens:
        return f"reached at {_clock(end_time, view.now)}" if end_time > 0 else "reached"
    if view.phase is not PeerPhase.RUNNING or status.state not in _WORKING or end_time <= 0:
        return ""
    left_s = _finite(end_time - view.now)
    if left_s < 1:
        return "about to be reached"
    years = left_s / (365 * 86400)
    return f"about {time_in_words(left_s)} left" if years < _MAX_YEARS else f"more than {_MAX_YEARS} years left"


def progress_in_words(view: View) -> str:
    """Say how far the run is, and how long it still takes."""
    return ", ".join(part for part in (_progress(view), _left(view)) if part)


def _losses(status: Any, cells: float = math.inf) -> str:
    """Format the losses in at most `cells`, without those by source and without bits if these do not fit."""
    training = [point.loss for point in status.losses if math.isfinite(point.loss) and point.loss]
    whose = " (median of the volunteers)" if status.role == "bootstrap" else ""
    parts = [f"{training[-1]:.3f} nats/token{whose}"] if training else []
    if _finite(status.held_out_loss):
        in_nats = ", ".join([*parts, f"held-out {status.held_out_loss:.3f} nats/byte"])
        in_both = ", ".join([*parts, f"held-out {loss_in_words(status.held_out_loss)}"])
        of_sources = [each for each in status.source_losses if _finite(each.held_out_loss)]
        names, losses = [one_line(each.name) for each in of_sources], [each.held_out_loss for each in of_sources]
        with_sources = ": ".join(part for part in (in_both, source_losses_in_words(names, losses)) if part)
        return next((text for text in (with_sources, in_both) if cell_len(text) <= cells), in_nats)
    return parts[0] if parts else "none yet"


def _shares(peers: Sequence[Any]) -> list[str]:
    return shares_in_words([peer.tokens for peer in peers])


def contribution_in_words(status: Any) -> str:
    """Format the peer's tokens and its share, the same one as in the list of contributions."""
    shares = dict(zip((peer.peer for peer in status.peers), _shares(status.peers), strict=True))
    if status.peer in shares and any(peer.tokens for peer in status.peers):
        share = f", {shares[status.peer]} of all"
    else:
        share = ", 100% of all" if status.own_tokens and not shares else ""
    return f"{count_in_words(status.own_tokens)} tokens{share}"


def _traffic(status: Any) -> str:
    sent, received = _finite(status.sent_bytes_per_s), _finite(status.received_bytes_per_s)
    return (
        f"sent {size_in_words(status.sent_bytes)} ({size_in_words(sent)}/s), "
        f"received {size_in_words(status.received_bytes)} ({size_in_words(received)}/s)"
    )


def _economy(status: Any) -> str:
    below = _finite(status.times_below_allreduce)
    parts = [below_in_words(below)] if below else []
    if status.role != "bootstrap" and status.losses:
        share = _finite(status.stall_share)
        parts.append(f"{share:.0%} of the time stalled" if share >= 0.01 else f"{share:.1%} stalled")
    return ", ".join(parts)


def _checkpoint(view: View) -> str:
    kept = view.status.checkpoint
    if not view.status.HasField("checkpoint"):
        return "none yet"
    return f"of round {kept.round}, {_ago(kept.time, view)}, {size_in_words(kept.size_bytes)}"


def _archive(view: View) -> str:
    """Describe a bootstrap's last archive; empty for other peers."""
    status, kept = view.status, view.status.archive
    if status.role != "bootstrap":
        return ""
    if not status.HasField("archive"):
        return "nothing yet"
    rounds = counted(kept.num_rounds, "round")
    return f"{rounds}, {count_in_words(kept.run_tokens)} tokens, {_ago(kept.time, view)}, in {one_line(kept.path)}"


def _device(status: Any) -> str:
    """Say what a volunteer trains on, and why; empty while that is not known."""
    device = status.device
    if not status.HasField("device"):
        return ""
    parts = [f"{one_line(device_in_words(device.device, device.title))} in {one_line(device.precision)}"]
    parts += ["compiled"] if device.compiled else []
    on_each = " on each" if "," in device.device else ""
    parts += (
        [f"{counted(device.microbatch_sequences, 'sequence')} at once{on_each}"] if device.microbatch_sequences else []
    )
    return ", ".join(parts) + (f": {one_line(device.why)}" if device.why else "")


def limits_in_words(limits: Any) -> str:
    """Describe what a peer may use of its machine."""
    threads = f"{limits.threads} thread{'s' if limits.threads != 1 else ''}" if limits.threads else "all threads"
    memory = f"at most {size_in_words(limits.memory_bytes)} of memory" if limits.memory_bytes else "any memory"
    parts = [threads, memory, *([f"nice {limits.nice}"] if limits.HasField("nice") else [])]
    parts.append("only when the machine is idle" if limits.only_when_idle else "at any load")
    hours = one_line(limits.hours)
    parts.append("at any hour" if hours in ("", "any") else f"in the hours {hours}")
    if limits.HasField("gpu_share"):
        parts.append(f"{limits.gpu_share}% of the graphics card's time")
    if limits.HasField("gpu_any_time"):
        parts.append("whatever else uses the card" if limits.gpu_any_time else "only while nothing else uses the card")
    if limits.HasField("on_battery"):
        parts.append("also on battery" if limits.on_battery else "not on battery")
    if limits.HasField("max_temperature"):
        parts.append(f"up to {_finite(limits.max_temperature):g} °C")
    for mbit, verb in ((limits.up_mbit, "sends"), (limits.down_mbit, "receives")):
        if mbit > 0:
            parts.append(f"{verb} at most {_finite(mbit):g} Mbit/s")
    if limits.HasField("slowdown"):
        parts.append(f"slowed {_finite(limits.slowdown):g} times for a rehearsal")
    return ", ".join(parts)


# ---------------------------------------------------------------- lines


def _peer_rows(view: View, width: int, most: int) -> list[tuple[str, bool]]:
    """Return rows of at most `most` peers, as (line, whether it is present), this one first.

    The last row may sum up the rest. Narrow lines leave out less important columns; if this peer is over, presence is
    left out.
    """
    status = view.status
    order = sorted(
        zip(status.peers, _shares(status.peers), strict=True),
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
    doing = _round_of(peer) if peer.present and not peer.bootstrap else ""
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
        "speed": _speed(peer.tokens_per_s) if peer.present and _finite(peer.tokens_per_s) > 0 else "",
    }
    return [text if name in columns or name == "doing" else "" for name, text in row.items()]


def _round_of(peer: Any) -> str:
    return f"{_stages(peer.stages)}, round {peer.round}" if peer.stages else f"round {peer.round}"


def _stages(stages: Sequence[int]) -> str:
    """Name stages, such as `stage 2`, `stages 0 and 1`, or `stages 0-2`."""
    if len(stages) > 2 and list(stages) == list(range(stages[0], stages[-1] + 1)):
        return f"stages {stages[0]}-{stages[-1]}"
    return stages_in_words(stages)


def _stage_lines(status: Any, width: int) -> list[Text]:
    """Return a line for each stage of a pipeline; of many stages, those that lack peers or are slow."""
    stages = sorted(status.stages, key=lambda stage: (_finite(stage.most_tokens_per_s), stage.number))[:_MOST_STAGES]
    rows = [
        (
            f"stage {stage.number}",
            f"{stage.num_peers} peer{'s' if stage.num_peers != 1 else ''}" if stage.num_peers else "nobody",
            f"{_speed(stage.tokens_per_s)} of {_speed(stage.most_tokens_per_s)}",
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
            f"{_clock(notice.time, view.now)} {one_line(notice.message)}", width, FACT_LINES, "yellow"
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
    steps = f", inner step {status.inner_steps_done} of {status.inner_steps}" if status.inner_steps else ""
    facts = {
        "run": f"{one_line(status.run_name) or 'not known yet'} {one_line(status.run_sha256)[:12]}",
        "progress": progress_in_words(view),
        "round": f"{status.round}{steps}",
        "loss": _losses(status),
        "speed": _speeds(status),
        "contribution": contribution_in_words(status),
        "traffic": _traffic(status),
        "exchange": _economy(status),
        "merged": one_line(status.last_merge),
        "data": one_line(status.data),
        "adapter": one_line(status.adapter),
        "reach": one_line(status.reach),
        "archive": _archive(view),
        "checkpoint": "" if status.HasField("archive") else _checkpoint(view),
        "device": _device(status),
        "limits": limits_in_words(status.limits) if status.HasField("limits") else "",
    }
    if view.phase is PeerPhase.RUNNING:
        up = time_in_words(max(0.0, _finite(view.now - status.started_time)))
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
    return [cut_line(width, ("contributions", "dim"), f"  {_here(view)}"), *_peer_lines(view, width, most)]


def serving_lines(view: View, width: int) -> list[Text]:
    """Draw what a bootstrap's own display adds: the swarm's loss, the archive, who is present."""
    facts = {"loss": _losses(view.status), "archive": _archive(view)}
    lines = [line for name, text in facts.items() for line in fact_lines(width, name, text)]
    if all(peer.peer == view.status.peer for peer in view.status.peers):
        return lines
    return lines + _contributors(view, width, _SERVED_PEERS)


def _here(view: View) -> str:
    status = view.status
    volunteers = [peer for peer in status.peers if not peer.bootstrap]
    if view.phase.over:  # the others may have left long ago
        return f"{len(volunteers)} volunteer{'s' if len(volunteers) != 1 else ''} in all"
    here = sum(peer.present for peer in volunteers)
    bootstrap = any(peer.bootstrap and peer.present for peer in status.peers)
    words = f"{here} of {len(volunteers)} volunteer{'s' if len(volunteers) != 1 else ''} here"
    return words + (", and a bootstrap" if bootstrap else "")


def list_peers(views: Sequence[View], width: int) -> list[Text]:
    """Return one line per peer; if that is too wide, the peer's folder has a line of its own."""
    rows = [
        [
            clipped(title(view.status, view.folder), _NAME_CELLS),
            short_peer(one_line(view.status.peer)) if view.status.peer else "",
            one_line(view.status.role),
            state_in_words(view),
            "" if view.phase is PeerPhase.RUNNING or not view.status.time else _ago(view.status.time, view),
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
        parts += [f"round {status.round}", f"loss {_losses(status)}", _progress(view), _left(view)]
        parts.append(f"own {contribution_in_words(status)}")
    return "; ".join(part for part in parts if part)


# ---------------------------------------------------------------- the screen of `watch`


def draw_watch(view: View, width: int, height: int, *, ascii_only: bool = False) -> list[Text]:
    """Draw a screen of at most `height` lines; the least important blocks are dropped first."""
    status = view.status
    top = [
        _title_line(view, width),
        *wrapped_lines(sentence(view), width, 3 if view.phase is PeerPhase.RUNNING else 5),
    ]
    leave = "" if view.phase.over and not view.note else "q closes this screen"
    foot = cut_line(width, (leave if view.phase.over else f"{leave}; the peer keeps running", "dim"))
    room = height - len(top) - 1
    blocks = {}
    for name, variants in _blocks(view, width, height, ascii_only).items():
        blocks[name] = next((block for block in variants if len(block) <= room), [])
        room -= len(blocks[name])
    progress, notices = blocks.pop("progress"), blocks.pop("warnings")
    plot_lines, peer_lines = _shares_of(room, len(status.peers))
    body = [
        *top,
        *(_draw_losses(status, width, plot_lines, ascii_only) if plot_lines else []),
        *progress,
        *(line for block in blocks.values() for line in block),
        *(_contributors(view, width, peer_lines) if peer_lines else []),
        *notices,
    ]
    return [*body[: height - 1], foot][:height]


def _blocks(view: View, width: int, height: int, ascii_only: bool) -> dict[str, list[list[Text]]]:
    """Return the blocks of fixed height, the most important first, each with its variants, the longest first."""
    status = view.status
    bootstrap = status.role == "bootstrap"
    facts = {
        "progress": "",
        "stages": "",
        "speed": _speeds(status),
        "archive": _archive(view),
        "contribution": "" if bootstrap else contribution_in_words(status),
        "traffic": _traffic(status),
        "warnings": "",
        "checkpoint": "" if bootstrap else _checkpoint(view),
        "exchange": _economy(status),
        "merged": one_line(status.last_merge),
        "device": _device(status),
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


def _draw_losses(status: Any, width: int, height: int, ascii_only: bool) -> list[Text]:
    """Draw the loss curves with their axes in `height` lines; without a loss, only a line that says so."""
    points = list(status.losses)
    training = [(float(point.run_tokens), point.loss) for point in points if _finite(point.loss)]
    held_out = [(float(point.run_tokens), point.held_out_loss) for point in points if _finite(point.held_out_loss)]
    caption = cut_line(width, ("loss  ", "dim"), _losses(status, width - cell_len("loss  ")))
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

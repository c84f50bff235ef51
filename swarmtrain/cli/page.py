"""State of a swarm's page: what a peer's view says, in the panels and rows that the browser shows. Pure.

The words are those of the screens (`cli/facts.py`). Everybody sees the swarm. Only the peer's own user sees what names
files of its machine, what may be changed there, and warnings. All values are finite; names and messages are escaped,
and the browser shows them as text.
"""

from __future__ import annotations

import functools
import shlex
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swarmtrain.cli.facts import (
    age_if_old,
    archive_in_words,
    checkpoint_in_words,
    contribution_in_words,
    device_of,
    exchange_in_words,
    finite,
    limits_in_words,
    losses_explained,
    progress_in_words,
    sentence,
    shares_of,
    speed_of,
    speeds_in_words,
    stage_range_in_words,
    state_in_words,
    time_left_in_words,
    tokens_in_words,
    volunteers_in_words,
)
from swarmtrain.cli.lines import clipped
from swarmtrain.cli.peers import PeerPhase, View, title
from swarmtrain.protocol.limits import exact_size, temperature_of_limit
from swarmtrain.v1 import control_pb2 as wire
from swarmtrain.web.downsample import largest_triangles
from swarmtrain.words import (
    count_in_words,
    counted,
    one_line,
    printable,
    short_peer,
    size_in_words,
    source_losses_in_words,
)

if TYPE_CHECKING:
    from swarmtrain.web.server import State  # a report is made without the page's server

_NAME_CELLS = 32
_MOST_POINTS = 600
_MOST_NAMED = 8
_MOST_EVENTS = 60
_CHANCE = 0.02
"""Relative change of a loss that says nothing: one round's training loss differs so much from the next one's."""
OF_THE_SWARM = (
    *("joined", "peer_joined", "peer_lost", "peer_left", "refused", "clipped", "caught_up", "assigned", "moved"),
)
"""Events that everybody may see: others may name files of the machine, or what its user does there."""
_TONES = {
    "training": "good",
    "serving": "good",
    "done": "good",
    "ended": "good",
    "waiting": "wait",
    "paused": "wait",
    "starting": "wait",
    "finishing": "wait",
    "ending": "wait",
}
"""Tone of each state; any other is bad."""


@dataclass(frozen=True, kw_only=True)
class MachineUse:
    """What a peer and its daemon use of their machine now."""

    processor_share: float
    """Processors in use, 1.0 for a whole one."""
    memory_bytes: int


def page_of(view: View, use: MachineUse | None = None, history: Any = None) -> tuple[State, State]:
    """Return the page's state for everybody, and for the peer's own user.

    `history` is the record of the run, a `RunHistory`; without it curves show what the peer itself has seen.
    """
    status, rows, shared = view.status, _rows(view), _shared(view, history)
    for_everybody = shared | _panels_for(view, history, is_owner=False)
    for_owner = shared | _panels_for(view, history, is_owner=True, use=use)
    for_everybody["invite"] = _invite(status) if status.shows_invite else None
    for_owner["invite"] = None if view.phase.over else _invite(status)
    return (for_everybody, rows), (for_owner, rows)


def panels_of(view: View, history: Any, *, is_owner: bool) -> dict[str, Any]:
    """Return the panels for the peer's own user, or for everybody, without the invite."""
    return _shared(view, history) | _panels_for(view, history, is_owner=is_owner)


def _shared(view: View, history: Any) -> dict[str, Any]:
    """Return the panels that are the same for everybody."""
    curves = _Curves(view.status, history)
    return {
        "progress": _progress(view),
        "learning": curves.shown(),
        "answers": _answers(view, curves),
        "traffic": _traffic(view.status),
        "pipeline": _pipeline(view.status),
        "sample": _sample(view, history),
    }


def _panels_for(view: View, history: Any, *, is_owner: bool, use: MachineUse | None = None) -> dict[str, Any]:
    """Return the panels that tell the peer's own user more than others."""
    notices = [[round(item.time), one_line(item.message)] for item in reversed(view.status.notices)]
    return {
        "head": _head(view, is_owner=is_owner),
        "machine": _machine(view, use) if is_owner else None,
        "notices": notices if is_owner else [],
        "events": _events(history, None if is_owner else OF_THE_SWARM),
    }


def _head(view: View, *, is_owner: bool) -> dict[str, Any]:
    status, state = view.status, state_in_words(view)
    return {
        "run": one_line(status.run_name),
        "run_sha256": one_line(status.run_sha256)[:12],
        "peer": clipped(title(status, view.folder), _NAME_CELLS),
        "role": one_line(status.role) or "peer",
        "version": one_line(status.version),
        "state": state,
        "tone": _TONES.get(state, "bad"),
        "sentence": sentence(view, for_strangers=not is_owner),
        "over": view.phase.over,
        "time": round(finite(status.time), 1),
        "is_owner": is_owner,
        "total_tokens": status.total_tokens,
        "keep": _keep(view) if is_owner and view.phase.over else "",
    }


def _keep(view: View) -> str:
    """Return the command that writes a report of the run; empty if the folder is not here."""
    if view.folder is None:
        return ""
    return f"swarmtrain report --dir {shlex.quote(one_line(str(view.folder)))} --to run.html"


def _progress(view: View) -> dict[str, Any]:
    status = view.status
    done = min(1.0, status.run_tokens / status.total_tokens) if status.total_tokens else 0.0
    ends = view.phase is PeerPhase.RUNNING and status.run_tokens < status.total_tokens
    return {
        "done": round(done, 4),
        "words": progress_in_words(view),
        "tokens": tokens_in_words(view),
        "left": time_left_in_words(view),
        "end_time": round(finite(status.end_time)) if ends else 0,
        "round": status.round,
        "inner_steps_done": status.inner_steps_done,
        "inner_steps": status.inner_steps,
    }


# ---------------------------------------------------------------- does it learn


class _Curves:
    """Losses by tokens and time: of the swarm from the run's start as far as that is known, and of this peer."""

    def __init__(self, status: Any, history: Any) -> None:
        self._status = status
        own = [point for point in status.losses if point.run_tokens]
        of_swarm = [] if history is None else list(history.points)
        is_own = status.role != "bootstrap"
        self.own = _measured(own, "loss") if is_own else []
        self.swarm = _measured(of_swarm, "loss") or ([] if is_own else _measured(own, "loss"))
        by_tokens = {point[0]: point for point in _measured([*own, *of_swarm], "held_out_loss")}
        self.held_out = [by_tokens[tokens] for tokens in sorted(by_tokens)]
        self.held_out_time, self.newest_held_out = self.held_out[-1][1:] if self.held_out else (0.0, 0.0)
        if finite(status.held_out_loss) and not (of_swarm and self.held_out):
            self.held_out_time, self.newest_held_out = status.held_out_time, status.held_out_loss

    @property
    def training(self) -> list[_Point]:
        """Training loss of the swarm; of this peer while that of the swarm is not known."""
        return self.swarm or self.own

    def shown(self) -> dict[str, Any]:
        """Return the curves for the charts."""
        names = [one_line(item.name) for item in self._status.source_losses]
        losses = [finite(item.held_out_loss) for item in self._status.source_losses]
        return {
            "held_out": _curve(self.held_out),
            "swarm": _curve(self.swarm),
            "own": _curve(self.own if len(self._status.peers) != 1 or not self.swarm else []),
            "sources": source_losses_in_words(names, losses),
            "help": losses_explained(self._status, self.training[-1][2] if self.training else 0.0),
        }


_Point = tuple[int, float, float]


def _measured(points: Iterable[Any], name: str) -> list[_Point]:
    """Return (tokens, Unix seconds, loss) of those points that have the loss of that name."""
    return [
        (point.run_tokens, finite(point.time), getattr(point, name))
        for point in points
        if finite(getattr(point, name)) > 0
    ]


def _curve(points: Sequence[_Point]) -> dict[str, list[float]]:
    """Return a curve, thinned for the screen."""
    tokens, times, losses = ([point[axis] for point in points] for axis in range(3))
    kept = largest_triangles(tokens, losses, _MOST_POINTS) if points else []
    return {
        "tokens": [tokens[place] for place in kept],
        "time": [round(times[place]) for place in kept],
        "loss": [_rounded(losses[place]) for place in kept],
    }


def _rounded(loss: float) -> float:
    return float(f"{loss:.5g}")


# ---------------------------------------------------------------- the first answers


def _answers(view: View, curves: _Curves) -> list[dict[str, str]]:
    """Answer what a person asks first: does it learn, when does it end, who is here."""
    status = view.status
    here = [peer for peer in status.peers if _trains(view, peer)]
    learns, how = _learns(view, curves)
    left = time_left_in_words(view)
    speed = f"{speed_of(status.swarm_tokens_per_s)} together" if finite(status.swarm_tokens_per_s) else ""
    rests = _is_paused(view)
    known = [peer for peer in status.peers if not peer.bootstrap and not (rests and peer.peer == status.peer)]
    with_whom = ", ".join(part for part in (speed, "this peer is paused" if rests else "", _away(known, here)) if part)
    how_far = {"name": "How long yet?", "answer": left or _why_no_end(view, here), "more": tokens_in_words(view)}
    if view.phase.over and left:  # "reached", and when, if that is known
        how_far |= {"name": "When was it complete?", "answer": left.removeprefix("reached ")}
    elif view.phase.over:  # it heard no more of the run
        how_far = {"name": "How far did it come?", "answer": tokens_in_words(view), "more": ""}
    return [
        {"name": "Did it learn?" if view.phase.over else "Is it learning?", "answer": learns, "more": how},
        how_far,
        {
            "name": "Who took part?" if view.phase.over else "Who is here?",
            "answer": volunteers_in_words(view) if view.phase.over else counted(len(here), "volunteer"),
            "more": "" if view.phase.over else with_whom,
        },
    ]


def _trains(view: View, peer: Any) -> bool:
    """Return whether a volunteer is here; one that is paused on this machine is not."""
    return bool(peer.present and not peer.bootstrap and not (_is_paused(view) and peer.peer == view.status.peer))


def _is_paused(view: View) -> bool:
    return view.phase is PeerPhase.RUNNING and bool(view.status.state == wire.PEER_STATE_PAUSED)


def _away(known: Sequence[Any], here: Sequence[Any]) -> str:
    number = len(known) - len(here)
    return f"{number} {'more ' if here else ''}took part before" if number else ""


def _why_no_end(view: View, here: Sequence[Any]) -> str:
    if _is_paused(view) and here:
        return "not known while paused"
    is_idle = view.phase is PeerPhase.RUNNING and view.status.run_tokens and not here
    return "nobody trains now" if is_idle else "not known yet"


def _learns(view: View, curves: _Curves) -> tuple[str, str]:
    """Return the newest loss, and how it has changed since the first one that is known; with "yes" or "no" if it has
    changed by more than chance.

    It is the held-out loss, with its age if it is old, unless that is of a time when the run had not half of its
    present tokens.
    """
    held_out, training = [loss for _, _, loss in curves.held_out], [loss for _, _, loss in curves.training]
    is_old = bool(held_out and training) and 2 * curves.held_out[-1][0] < curves.training[-1][0]
    if (newest := curves.newest_held_out) and not is_old:
        first = held_out[0] if held_out else newest
        more = f"held-out loss{_change(first, newest)}{age_if_old(curves.held_out_time, view)}"
        return f"{_yes_or_no(first, newest)}{newest:.3f} nats/byte", more
    if training:
        first, newest = training[0], training[-1]
        return f"{_yes_or_no(first, newest)}{newest:.3f} nats/token", f"training loss{_change(first, newest)}"
    return "no loss yet", "the first round is not over"


def _yes_or_no(first: float, last: float) -> str:
    if abs(last - first) < _CHANCE * first:
        return ""
    return "Yes: " if last < first else "No: "


def _change(first: float, last: float) -> str:
    if f"{first:.3f}" == f"{last:.3f}":
        return ""
    return f", {'down' if last < first else 'up'} from {first:.3f}"


# ---------------------------------------------------------------- who is here


def _rows(view: View) -> dict[str, Any]:
    """Return a row of each peer, by its PeerID."""
    status = view.status
    return {
        one_line(peer.peer): _row(view, peer, share)
        for peer, share in zip(status.peers, shares_of(status.peers), strict=True)
    }


def _row(view: View, peer: Any, share: str) -> dict[str, Any]:
    status, is_role = view.status, peer.bootstrap and not peer.tokens
    is_me = peer.peer == status.peer
    rests = is_me and _is_paused(view)  # it has left the swarm until it is resumed, and still runs
    is_here = (peer.present or rests) and not view.phase.over
    name, short = clipped(peer.name, _NAME_CELLS), short_peer(one_line(peer.peer))
    return {
        "name": name,
        "short": short if short != name else "",
        "me": is_me,
        "here": is_here,
        "bootstrap": peer.bootstrap,
        "tokens": peer.tokens,
        "work": "" if is_role else count_in_words(peer.tokens),
        "share": "" if is_role else share,
        "speed": speed_of(peer.tokens_per_s) if is_here and not rests and finite(peer.tokens_per_s) > 0 else "",
        "device": clipped(peer.device, _NAME_CELLS),
        "heard": 0 if is_me else round(finite(peer.heard_time)),
        "reached": _reached(peer, is_me),
        "round": peer.round if is_here and not rests and not peer.bootstrap else -1,
        "doing": "paused" if rests else "",
        "loss": _rounded(finite(peer.loss)),
        "stages": stage_range_in_words(peer.stages) if peer.stages and is_here else "",
    }


def _reached(peer: Any, is_me: bool) -> str:
    if is_me or not peer.present:
        return ""
    return "through hosts" if peer.hidden else "directly"


# ---------------------------------------------------------------- what happened, the sample, the invite


def _events(history: Any, allowed: Container[str] | None) -> list[list[Any]]:
    """Return the last events, the newest first, as [Unix seconds, sentence, how often]; `allowed` ones, None: all."""
    if history is None:
        return []
    noted = [item for item in history.events if allowed is None or item.event in allowed]
    newest = sorted(noted, key=lambda item: finite(item.last_time))[-_MOST_EVENTS:]
    return [[round(finite(item.last_time)), one_line(item.words), item.count] for item in reversed(newest)]


def _sample(view: View, history: Any) -> dict[str, Any] | None:
    """Return the newest text that the model wrote, as it is: the browser shows its lines and nothing else of it."""
    if history is None or not history.HasField("sample"):
        return None
    sample = history.sample
    return {
        "prompt": printable(sample.prompt),
        "text": printable(sample.text),
        "round": sample.round,
        "tokens": count_in_words(sample.run_tokens),
        "time": round(finite(sample.time)),
        "age": age_if_old(sample.time, view),
    }


def _invite(status: Any) -> dict[str, Any] | None:
    line = one_line(status.invite_line)
    return {"line": line, "code": _quick_response(line.rpartition(" ")[2])} if line else None


@functools.lru_cache(maxsize=4)
def _quick_response(text: str) -> dict[str, Any] | None:
    """Return a QR code of `text`: its width in modules, and an SVG path of the dark ones; None if it is too long."""
    import segno

    try:
        rows = segno.make_qr(text, error="l").matrix
    except segno.DataOverflowError:
        return None
    path = []
    for y, row in enumerate(rows):
        dark = bytes(row) + b"\0"
        for x in range(len(row)):
            if dark[x] and not (x and dark[x - 1]):
                path.append(f"M{x} {y}h{dark.index(0, x) - x}v1h-{dark.index(0, x) - x}z")
    return {"width": len(rows), "path": "".join(path)}


# ---------------------------------------------------------------- traffic, stages, machine


def _traffic(status: Any) -> dict[str, Any]:
    sent, received = finite(status.sent_bytes_per_s), finite(status.received_bytes_per_s)
    return {
        "sent": size_in_words(status.sent_bytes),
        "sent_per_s": f"{size_in_words(sent)}/s",
        "received": size_in_words(status.received_bytes),
        "received_per_s": f"{size_in_words(received)}/s",
        "exchange": exchange_in_words(status),
        "merged": one_line(status.last_merge),
        "reach": one_line(status.reach),
    }


def _pipeline(status: Any) -> list[dict[str, Any]] | None:
    """Return the stages of a pipeline; None if every peer holds the whole model."""
    if not status.stages:
        return None
    return [
        {
            "number": stage.number,
            "mine": stage.mine,
            "holders": _named(peer for peer in status.peers if peer.present and stage.number in peer.stages)
            or (counted(stage.num_peers, "peer") if stage.num_peers else "nobody"),
            "speed": speed_of(stage.tokens_per_s),
            "most": speed_of(stage.most_tokens_per_s),
            "queue": round(finite(stage.queue), 1),
        }
        for stage in sorted(status.stages, key=lambda stage: stage.number)
    ]


def _named(peers: Iterable[Any]) -> str:
    names = [clipped(peer.name, _NAME_CELLS) for peer in peers]
    more = len(names) - _MOST_NAMED
    return ", ".join(names[:_MOST_NAMED]) + (f" and {more} more" if more > 0 else "")


def _machine(view: View, use: MachineUse | None) -> dict[str, Any]:
    status = view.status
    is_volunteer = status.role != "bootstrap"
    uses = ""
    if use is not None:
        uses = f"{use.processor_share:.1f} processors, {size_in_words(use.memory_bytes)} of memory"
    facts = {
        "Uses now": uses,
        "Trains on": device_of(status),
        "May use": limits_in_words(status.limits) if status.HasField("limits") else "",
        "Contributed": contribution_in_words(status) if is_volunteer else "",
        "Speed": speeds_in_words(status),
        "Data": one_line(status.data),
        "Adapter": one_line(status.adapter),
        "Checkpoint": "" if status.HasField("archive") else checkpoint_in_words(view),
        "Archive": archive_in_words(view),
        "Folder": _folder_in_words(view.folder) if view.folder is not None else "",
    }
    running = view.phase is PeerPhase.RUNNING
    return {
        "facts": [[name, words] for name, words in facts.items() if words],
        "running": running,
        "volunteer": is_volunteer,
        "paused": status.state == wire.PEER_STATE_PAUSED,
        "limits": _limits(status.limits) if status.HasField("limits") and is_volunteer else None,
    }


def _folder_in_words(folder: Path) -> str:
    """Return a path as a person writes it: from the home folder on, if it is below that."""
    home = Path.home()
    return one_line(str(Path("~", folder.relative_to(home)) if folder.is_relative_to(home) else folder))


def _limits(limits: Any) -> dict[str, Any]:
    """Return the limits as a person writes them, for a form."""
    return {
        "threads": limits.threads,
        "memory": exact_size(limits.memory_bytes) if limits.memory_bytes else "none",
        "hours": one_line(limits.hours) or "any",
        "up": _number(limits.up_mbit),
        "down": _number(limits.down_mbit),
        "only_when_idle": limits.only_when_idle,
        "nice": limits.nice if limits.HasField("nice") else None,
        "gpu_share": limits.gpu_share if limits.HasField("gpu_share") else None,
        "max_temperature": temperature_of_limit(finite(limits.max_temperature))
        if limits.HasField("max_temperature")
        else None,
    }


def _number(value: float) -> float:
    return float(f"{finite(value):g}")

"""Facts about a peer in words, for the screens and the page. Pure: a view in, text out.

Names and messages may come from other peers: they are escaped, and shortened by whoever shows them.
"""

from __future__ import annotations

import math
import shlex
import time
from collections.abc import Sequence
from typing import Any

from rich.cells import cell_len

from swarmtrain.cli.peers import PeerPhase, View
from swarmtrain.peer.lifecycle.start_options import Started, StartedFile
from swarmtrain.v1 import control_pb2 as wire
from swarmtrain.words import (
    ago_in_words,
    below_in_words,
    count_in_words,
    counted,
    device_in_words,
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

_OLD_S = 300.0
_MAX_YEARS = 10
_MOST_NATS = 40.0
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


def state_in_words(view: View) -> str:
    """Say in a word what the peer is doing."""
    if view.phase is PeerPhase.RUNNING and view.status.state in _OVER:
        return PeerPhase.ENDING.value
    return _STATES.get(view.status.state, "running") if view.phase is PeerPhase.RUNNING else view.phase.value


def sentence(view: View, *, for_strangers: bool = False, for_later: bool = False) -> str:
    """Say what the peer is doing and why, or how it ended and what to do about it.

    Strangers are not told why it failed nor what to do about it, since that may name its user's files. `for_later`
    leaves out when it was, for what is read at another time and place.
    """
    status = view.status
    ago, clock = age_in_words(status.time, view), clock_in_words(status.time, view.now)
    ago, last, about, since = 4 * ("",) if for_later else (f" {ago}", f", {ago}", f" about {clock}", f" since {clock}")
    told = _REASONS.get(status.end_reason, "" if for_strangers else one_line(status.end_reason))
    doing = "" if for_strangers and status.state in _OVER else one_line(status.doing)  # of who has ended it says why
    then = [one_line(view.note)] if view.note else []
    match view.phase:
        case PeerPhase.RUNNING | PeerPhase.ENDING if status.state in _OVER:
            return "ending" + (f": {told or doing}" if told or doing else "")
        case PeerPhase.RUNNING | PeerPhase.ENDING:
            return doing or f"{_STATES.get(status.state, 'running')}, no details"
        case PeerPhase.STARTING:
            return "it is starting, and does not answer yet"
        case PeerPhase.SILENT:
            return f"it runs but does not answer; its last status{last}: {doing or _STATES.get(status.state, 'none')}"
        case PeerPhase.ENDED:
            return "; ".join([f"ended{ago}" + (f": {told}" if told else ""), *then])
        case PeerPhase.LOST:
            return "; ".join([f"no answer{since} ({_was(status)})", *then])
        case PeerPhase.FAILED:
            why = "" if for_strangers else f": {told or 'it did not say why'}"
            text = f"failed{ago}{why} (exit code {status.exit_code})"
        case PeerPhase.DIED if not status.time or status.state in _OVER:
            text = "died while it was starting, without an error message"
        case PeerPhase.DIED:
            text = f"died{about} ({_was(status)})"
    return "; ".join([text, *then, *([] if for_strangers else [_start_again(view)])])


def _was(status: Any) -> str:
    state = _STATES.get(status.state, "running")
    return f"it was training round {status.round}" if state == "training" else f"it was {state}"


def _start_again(view: View) -> str:
    status = view.status
    started = StartedFile(view.folder).read() if view.folder is not None else Started()
    if started.command[:1] == ("join",) and view.folder is not None and not (view.folder / "run.toml").exists():
        where = shlex.quote(one_line(str(view.folder)))
        return f"ask for a new invite, and start it with `swarmtrain join INVITE --dir {where}`"
    if started.command:
        return f"start it again with `{one_line(started.line(view.folder))}`"
    what = "bootstrap RUN.toml" if status.role == "bootstrap" else "join"
    given = status.name not in ("", short_peer(status.peer), "bootstrap" if status.role == "bootstrap" else "")
    name = f" --name {shlex.quote(one_line(status.name))}" if given else ""
    where = f" --dir {shlex.quote(str(view.folder))}" if view.folder is not None else ""
    return f"start it again with `swarmtrain {what}{name}{where}` and the other options it had"


def age_in_words(at: float, view: View) -> str:
    """Say how long before the view something was, by its Unix time."""
    return ago_in_words(finite(view.now - at))


def age_if_old(at: float, view: View) -> str:
    """Say how old something measured at a Unix time is, such as `, 12 min ago`, if that is more than five minutes; else
    empty. For a peer that is gone, compare with its last status."""
    age_s = finite((view.status.time if view.phase.over else view.now) - at)
    if not at > 0 or age_s <= _OLD_S:
        return ""
    return f", {ago_in_words(age_s)}".replace("ago", "before the end" if view.phase.over else "ago")


def clock_in_words(at: float, now: float) -> str:
    """Format a local time, with the date if it is not today's."""
    try:
        then, today = time.localtime(at), time.localtime(now)
    except (OverflowError, ValueError, OSError):
        return "an unknown time"
    return time.strftime("%H:%M" if then[:3] == today[:3] else "%Y-%m-%d %H:%M", then)


def finite(number: float) -> float:
    """Return the number, or 0 for one that is not finite."""
    return number if math.isfinite(number) else 0.0


def speed_of(tokens_per_s: float) -> str:
    """Format a speed that a peer reports."""
    return speed_in_words(finite(tokens_per_s))


def speeds_in_words(status: Any) -> str:
    """Format the peer's own speed and the swarm's, which is the sum of all peers' speeds."""
    swarm = f"swarm {speed_of(status.swarm_tokens_per_s)}"
    return swarm if status.role == "bootstrap" else f"own {speed_of(status.own_tokens_per_s)}, {swarm}"


def tokens_in_words(view: View) -> str:
    """Say how many tokens the run has been trained on, and their share of all."""
    status = view.status
    if not status.total_tokens:
        return f"{count_in_words(status.run_tokens)} tokens" if status.run_tokens else "not known yet"
    return f"{percent_in_words(status.run_tokens, status.total_tokens)} of {count_in_words(status.total_tokens)} tokens"


def time_left_in_words(view: View) -> str:
    """Say how long the run still takes at its measured speed, or when it was completed; empty if neither is known."""
    status = view.status
    end_time = finite(status.end_time)
    if not status.total_tokens:
        return ""
    if status.run_tokens >= status.total_tokens:
        return f"reached at {clock_in_words(end_time, view.now)}" if end_time > 0 else "reached"
    if view.phase is not PeerPhase.RUNNING or status.state not in _WORKING or end_time <= 0:
        return ""
    left_s = finite(end_time - view.now)
    if left_s < 1:
        return "about to be reached"
    years = left_s / (365 * 86400)
    return f"about {time_in_words(left_s)} left" if years < _MAX_YEARS else f"more than {_MAX_YEARS} years left"


def progress_in_words(view: View) -> str:
    """Say how far the run is, and how long it still takes."""
    return ", ".join(part for part in (tokens_in_words(view), time_left_in_words(view)) if part)


def losses_in_words(view: View, cells: float = math.inf) -> str:
    """Format the losses in at most `cells`, without those by source if these do not fit."""
    status = view.status
    training = [point.loss for point in status.losses if math.isfinite(point.loss) and point.loss]
    whose = " (median of the volunteers)" if status.role == "bootstrap" else ""
    parts = [f"{training[-1]:.3f} nats/token{whose}"] if training else []
    if finite(status.held_out_loss):
        age = age_if_old(status.held_out_time, view)
        in_nats = ", ".join([*parts, f"held-out {status.held_out_loss:.3f} nats/byte{age}"])
        of_sources = [each for each in status.source_losses if finite(each.held_out_loss)]
        names, losses = [one_line(each.name) for each in of_sources], [each.held_out_loss for each in of_sources]
        with_sources = ": ".join(part for part in (in_nats, source_losses_in_words(names, losses)) if part)
        return with_sources if cell_len(with_sources) <= cells else in_nats
    return parts[0] if parts else "none yet"


def blind_guess_in_words(status: Any) -> str:
    """Say how to read a training loss, in a few words."""
    if not status.vocabulary_size:
        return "lower is better"
    return f"lower is better, a blind guess: {math.log(status.vocabulary_size):.3f}/token"


def losses_explained(status: Any, training_loss: float) -> str:
    """Say in some sentences what losses are, by a training loss in nats per token; 0: there is none yet."""
    told = ["Nats say how unsure the model is of what comes next."]
    blind = ""
    if status.vocabulary_size:
        number = count_in_words(status.vocabulary_size)
        blind = f"a blind guess among its {number} tokens would be {math.log(status.vocabulary_size):.3f} nats/token"
    choices = math.exp(min(training_loss, _MOST_NATS)) if training_loss > 0 else 0.0
    among = f"{choices:.1f}" if choices < 10 else count_in_words(round(choices))
    now = f"{training_loss:.3f} is as unsure as a blind guess among {among} tokens" if choices else ""
    if blind or now:
        words = "; ".join(part for part in (blind, now) if part)
        told.append(f"{words[0].upper()}{words[1:]}.")
    told.append(f"Nats/byte count each byte of text alike, whatever the tokens; a blind guess: {math.log(256):.3f}.")
    return " ".join(told)


def shares_of(peers: Sequence[Any]) -> list[str]:
    """Format each peer's share of the work; together they are 100 %."""
    return shares_in_words([peer.tokens for peer in peers])


def contribution_in_words(status: Any) -> str:
    """Format the peer's tokens and its share, the same one as in the list of contributions."""
    shares = dict(zip((peer.peer for peer in status.peers), shares_of(status.peers), strict=True))
    if status.peer in shares and any(peer.tokens for peer in status.peers):
        share = f", {shares[status.peer]} of all"
    else:
        share = ", 100% of all" if status.own_tokens and not shares else ""
    return f"{count_in_words(status.own_tokens)} tokens{share}"


def traffic_in_words(status: Any) -> str:
    """Format what the peer has sent and received, and how much it does now."""
    sent, received = finite(status.sent_bytes_per_s), finite(status.received_bytes_per_s)
    return (
        f"sent {size_in_words(status.sent_bytes)} ({size_in_words(sent)}/s), "
        f"received {size_in_words(status.received_bytes)} ({size_in_words(received)}/s)"
    )


def exchange_in_words(status: Any) -> str:
    """Compare the traffic with an all-reduce, and say for how long the training was stalled."""
    below = finite(status.times_below_allreduce)
    parts = [below_in_words(below)] if below else []
    if status.role != "bootstrap" and status.losses:
        share = finite(status.stall_share)
        parts.append(f"{share:.0%} of the time stalled" if share >= 0.01 else f"{share:.1%} stalled")
    return ", ".join(parts)


def checkpoint_in_words(view: View) -> str:
    """Describe the newest checkpoint on the disk."""
    kept = view.status.checkpoint
    if not view.status.HasField("checkpoint"):
        return "none yet"
    return f"of round {kept.round}, {age_in_words(kept.time, view)}, {size_in_words(kept.size_bytes)}"


def archive_in_words(view: View) -> str:
    """Describe a bootstrap's last archive; empty for other peers."""
    status, kept = view.status, view.status.archive
    if status.role != "bootstrap":
        return ""
    if not status.HasField("archive"):
        return "nothing yet"
    rounds = counted(kept.num_rounds, "round")
    return (
        f"{rounds}, {count_in_words(kept.run_tokens)} tokens, {age_in_words(kept.time, view)}, in {one_line(kept.path)}"
    )


def device_of(status: Any) -> str:
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
        parts.append(f"up to {finite(limits.max_temperature):g} °C")
    for mbit, verb in ((limits.up_mbit, "sends"), (limits.down_mbit, "receives")):
        if mbit > 0:
            parts.append(f"{verb} at most {finite(mbit):g} Mbit/s")
    if limits.HasField("slowdown"):
        parts.append(f"slowed {finite(limits.slowdown):g} times for a rehearsal")
    return ", ".join(parts)


def volunteers_in_words(view: View) -> str:
    """Say how many volunteers are here, of those who took part."""
    status = view.status
    volunteers = [peer for peer in status.peers if not peer.bootstrap]
    if view.phase.over:  # the others may have left long ago
        return f"{len(volunteers)} volunteer{'s' if len(volunteers) != 1 else ''} in all"
    here = sum(peer.present for peer in volunteers)
    bootstrap = any(peer.bootstrap and peer.present for peer in status.peers)
    words = f"{here} of {len(volunteers)} volunteer{'s' if len(volunteers) != 1 else ''} here"
    return words + (", and a bootstrap" if bootstrap else "")


def stage_range_in_words(stages: Sequence[int]) -> str:
    """Name stages, such as `stage 2`, `stages 0 and 1`, or `stages 0-2`."""
    if len(stages) > 2 and list(stages) == list(range(stages[0], stages[-1] + 1)):
        return f"stages {stages[0]}-{stages[-1]}"
    return stages_in_words(stages)


def round_in_words(peer: Any) -> str:
    """Name a peer's round, and in a pipeline its stages."""
    return f"{stage_range_in_words(peer.stages)}, round {peer.round}" if peer.stages else f"round {peer.round}"

"""Events: what a peer reports to the people, programs and tests that watch it.

Each event is a frozen class with one sentence per field; `docs/events.md` is generated from them. A peer creates an
event and passes it to its listeners; the command line writes it as JSON, as one plain line, or into a live display.
`stamped` fills in `time`, `peer` and `name` at the edge, so that the code that creates an event needs neither the clock
nor its own name.

Numbers are finite: an event with a NaN loss cannot be created.
"""

from __future__ import annotations

import datetime
import json
from typing import Annotated, Literal, TypeVar, Union, get_args

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from swarmtrain.errors import with_code
from swarmtrain.words import (
    below_in_words,
    count_in_words,
    counted,
    device_in_words,
    loss_in_words,
    one_line,
    short_peer,
    size_in_words,
    source_losses_in_words,
    stages_in_words,
    time_in_words,
)


class _Event(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    time: float = Field(0.0, description="When it happened, in Unix seconds by this machine's clock.")
    peer: str = Field("", description="PeerID (base58) of the peer that reports it; empty before it is known.")
    name: str = Field("", description="Name of that peer, as given by `--name`.")


class InviteEvent(_Event):
    """Others can join from now on, with this line."""

    event: Literal["invite"] = "invite"
    line: str = Field(description="Command to hand out: `swarmtrain join INVITE`.")
    invite: str = Field(description="The invite alone: one word with the run's hash and addresses.")
    run_sha256: str = Field(description="The run's identity: the SHA-256 of its published bytes.")
    addresses: tuple[str, ...] = Field(description="Addresses in the invite, as multiaddresses.")


class FetchedEvent(_Event):
    """The run and its held-out text have arrived and match their hashes."""

    event: Literal["fetched"] = "fetched"
    run_sha256: str = Field(description="The run's identity: the SHA-256 of its published bytes.")
    run_name: str = Field(description="Name of the run, from its run file.")
    total_tokens: int = Field(0, description="Tokens at which the run ends; 0 if not given here.")
    held_out_bytes: int = Field(description="Size of the held-out text, in bytes.")
    from_peer: str = Field(description="PeerID of the peer that served them.")
    summary: str = Field("", description="One sentence on what is about to be trained.")


class ArrivingEvent(_Event):
    """The swarm's current weights, or the files of the run's model, are arriving; repeated every few seconds until they
    are here."""

    event: Literal["arriving"] = "arriving"
    doing: str = Field(
        "fetching the current weights",
        description="What the peer does, in words: fetches the weights or the model's files, or checks files that are here.",
    )
    received_bytes: int = Field(description="Bytes that have arrived and match their hashes.")
    total_bytes: int = Field(gt=0, description="Bytes in all.")
    seconds: float = Field(description="Seconds since the transfer began.")

    @property
    def share(self) -> float:
        """Share of them that has arrived, 0 to 1."""
        return min(1.0, max(0, self.received_bytes) / self.total_bytes)

    @property
    def left_s(self) -> float:
        """Seconds left at the average speed so far; a year at most."""
        return min(3.2e7, max(0.0, self.seconds) * (1.0 - self.share) / max(self.share, 1e-9))


class JoinedEvent(_Event):
    """The peer has the swarm's current state and belongs to the swarm."""

    event: Literal["joined"] = "joined"
    round: int = Field(description="First round in which it takes part.")
    run_tokens: int = Field(description="Tokens the whole run had been trained on by then.")
    num_peers: int = Field(description="Volunteers present, this one included.")
    state_from: str = Field(description="PeerID whose state it took; empty if it began with the initial weights or its own checkpoint.")  # fmt: skip
    state_from_name: str = Field("", description="Name of that peer, if known.")
    resumed_round: int | None = Field(None, description="Round of the checkpoint that it resumed from; null without one.")  # fmt: skip
    wall_s: float = Field(description="Seconds since the process began.")


class DeviceEvent(_Event):
    """What this peer trains on, and why; again when it changes."""

    event: Literal["device"] = "device"
    device: str = Field(
        description="Name of the device, as torch calls it: `cpu`, `cuda:0`; of several, as `--device` takes them: `cuda:0,1`, `cpu,cpu`."
    )
    title: str = Field("", description="Model of the graphics card, or of each kind of card; empty for the processor.")
    precision: str = Field(description="Precision that it computes in: `fp32`, `bf16` or `fp16`.")
    compiled: bool = Field(False, description="Whether the model is compiled.")
    microbatch_sequences: int = Field(description="Sequences that it computes at once, on each device.")
    batch_sequences: int = Field(description="Sequences of an inner step.")
    why: str = Field(description="Why this device, precision and number of sequences, in a sentence for a person.")


class StartedEvent(_Event):
    """The first inner step begins."""

    event: Literal["started"] = "started"
    inner_steps_per_round: int = Field(description="Inner steps that this peer takes in its first round.")
    num_parameters: int = Field(description="Parameters that are trained: those of the model, or of its adapter.")
    total_tokens: int = Field(description="The run ends when its peers together have trained on this many tokens.")
    startup_s: float = Field(description="Seconds from the start of the process to the first inner step.")


class RoundEvent(_Event):
    """A round is over and merged."""

    event: Literal["round"] = "round"
    round: int = Field(description="Number of the round, from 0.")
    stage: int | None = Field(None, description="In a pipeline: the stage whose round it is; null if every peer holds the whole model.")  # fmt: skip
    inner_steps: int = Field(description="Inner steps that this peer took in it.")
    tokens: int = Field(description="Tokens that this peer trained on in it.")
    run_tokens: int = Field(description="Tokens the whole run has been trained on, this round included.")
    num_peers: int = Field(1, description="Volunteers that it believed present when the round began, itself included; the schedule advances by their tokens.")  # fmt: skip
    loss: float = Field(description="This peer's mean training loss over the round, in nats per token.")
    first_loss: float = Field(description="Its training loss at the round's first inner step, in nats per token.")
    learning_rate: float = Field(description="Learning rate of the round's last inner step.")
    grad_norm: float | None = Field(None, description="Mean norm of the gradient over the round's inner steps, before the clip (`inner.gradient_clip`); null when none was finite.")  # fmt: skip
    seconds: float = Field(description="Seconds of the whole round, merge and waiting included; without those in which a graphics card took steps of the next round.")  # fmt: skip
    merge_s: float = Field(description="Seconds from the end of its own inner steps to the merged weights.")
    stall_s: float = Field(description="Seconds in which the trainer did not compute because of network or merge: publishing and merging within the round, and `merge_s`, without the time in which a graphics card took the next steps meanwhile.")  # fmt: skip
    bytes_sent: int = Field(description="Payload bytes that this peer sent to others in the round.")
    bytes_received: int = Field(description="Payload bytes that this peer received from others in the round.")
    times_below_allreduce: float | None = Field(None, description="How many times fewer bytes it sent than an fp32 ring all-reduce at every inner step would (8 bytes per parameter and step); null if it was alone or sent none.")  # fmt: skip
    partners: tuple[str, ...] = Field(description="PeerIDs on the round's roster, in its order, this peer included; with `gossip`, those whose pseudo-gradient or weights were merged; with `server`, the server, if newer weights of it had arrived.")  # fmt: skip
    weights: tuple[int, ...] = Field(description="Tokens of each partner in the round, in the same order: the weights of the average. With `gossip`: tokens of its pseudo-gradient that had not been merged before, averaged over the fragments; 0 if only its weights were merged. With `server`: tokens that all have trained since its previous weights.")  # fmt: skip
    signer: str = Field("", description="PeerID that signed the roster; empty with `gossip` and `server`.")
    staleness_rounds: tuple[int, ...] = Field((), description="With `gossip`: how many rounds each partner was behind this peer. With `server`: how many of this peer's uploads its weights did not contain yet.")  # fmt: skip
    pull_s: float | None = Field(None, description="With `gossip` and `server`: seconds of the longest pull; null without any.")  # fmt: skip
    variance_factor: float | None = Field(None, description="With `gossip`: the largest factor of the variance correction in any fragment.")  # fmt: skip
    consensus_spread: float | None = Field(None, description="With `gossip`: spread of the merged weights relative to their size, the largest of the fragments; 0 if all agree, null if no weights were merged.")  # fmt: skip
    displacement: float | None = Field(None, description="With `gossip`: distance of the farthest partner's weights from this peer's, relative to their size, the largest of the fragments.")  # fmt: skip
    shard: int | None = Field(None, description="Shard of the data that the round read; null if the data have no shards.")  # fmt: skip
    unseen_shards: int | None = Field(None, description="Shards that nobody has trained on yet, as far as this peer knows.")  # fmt: skip
    adapter_groups: tuple[int, ...] | None = Field(None, description="Groups of the run's adapter that this peer trained in the round; null if it trained everything.")  # fmt: skip
    state_sha256: str = Field("", description="With `diloco`: SHA-256 of the weights after the merge, equal on all peers that merged the round; empty with `gossip` and `server`, where each peer has its own.")  # fmt: skip


class EvalEvent(_Event):
    """The held-out loss was measured."""

    event: Literal["eval"] = "eval"
    round: int = Field(description="Last round merged into the measured weights.")
    held_out_loss: float = Field(description="Loss on the run's held-out text, in nats per byte.")
    bits_per_byte: float | None = Field(None, description="The same loss in bits per byte.")
    perplexity: float | None = Field(None, description="exp of the loss in nats per token; null if it is too large to represent.")  # fmt: skip
    own_loss: float | None = Field(None, description="At the end with `gossip` and `server`: the loss of this peer's own weights; `held_out_loss` is the consensus' or the server's.")  # fmt: skip
    sources: tuple[str, ...] = Field((), description="With data.sources: their names; empty otherwise.")
    source_losses: tuple[float, ...] = Field((), description="Loss on the part of the held-out text of each of `sources`, in nats per byte.")  # fmt: skip


class PeerJoinedEvent(_Event):
    """Another volunteer is present."""

    event: Literal["peer_joined"] = "peer_joined"
    joined: str = Field(description="Its PeerID.")
    joined_name: str = Field("", description="Its name, as it states it.")


class PeerLostEvent(_Event):
    """Another volunteer vanished without leaving; the swarm continues without it."""

    event: Literal["peer_lost"] = "peer_lost"
    lost: str = Field(description="Its PeerID.")
    lost_name: str = Field("", description="Its name, as it told it.")
    reason: str = Field(description="How the loss was noticed.")


class PeerLeftEvent(_Event):
    """Another volunteer left the swarm."""

    event: Literal["peer_left"] = "peer_left"
    left: str = Field(description="Its PeerID.")
    left_name: str = Field("", description="Its name, as it told it.")


class RefusedEvent(_Event):
    """Data from a peer was refused; it costs that peer, and nobody else."""

    event: Literal["refused"] = "refused"
    from_peer: str = Field(description="PeerID of the sender.")
    from_name: str = Field("", description="Its name, if this peer knows it.")
    rule: str = Field(description="Broken rule, in one or two words, such as `hash`, `shape`, `finite`, `signature`, `size`, `huge`, `direction`, `round` (too old), `stall`, `flood`.")  # fmt: skip
    detail: str = Field(description="What was expected and what was received.")


class ClippedEvent(_Event):
    """A partner's publication was far larger than usual and was clipped. Reported once clipping repeats, since an honest
    peer that comes back is clipped for a round or two: from the third round with a clip on, where each round without one
    subtracts one; with gossip not before this peer has published 40 times since it joined."""

    event: Literal["clipped"] = "clipped"
    from_peer: str = Field(description="PeerID of the publisher.")
    from_name: str = Field("", description="Its name, if this peer knows it.")
    rule: str = Field(description="Rule: `gradient`, `displacement`, or `length` (the gradient was too short for its tokens).")  # fmt: skip
    detail: str = Field(description="What was clipped, and to what.")


class CaughtUpEvent(_Event):
    """This peer had missed a merge and took the resulting state from another peer."""

    event: Literal["caught_up"] = "caught_up"
    round: int = Field(description="Round that it is in now.")
    from_peer: str = Field(description="PeerID whose state it took.")
    from_name: str = Field("", description="Its name, if this peer knows it.")
    reason: str = Field(description="What it had missed.")


class AssignedEvent(_Event):
    """In a pipeline: the stages that this peer will hold; it fetches them now."""

    event: Literal["assigned"] = "assigned"
    stages: tuple[int, ...] = Field(description="Numbers of the stages, from 0.")
    reason: str = Field(description="Why these stages, in a sentence for a person.")


class MovedEvent(_Event):
    """In a pipeline: this peer holds other stages now."""

    event: Literal["moved"] = "moved"
    before: tuple[int, ...] = Field(description="Stages that it held before.")
    after: tuple[int, ...] = Field(description="Stages that it holds now.")
    reason: str = Field(description="Why, in a sentence for a person.")
    seconds: float = Field(description="Seconds since the decision, including the transfer of the new stages' weights.")


class MicrobatchRetryEvent(_Event):
    """In a pipeline, from a driver: a part of a microbatch failed at a peer, and this or another peer is asked again.
    Reported at most once a second per peer and stage."""

    event: Literal["microbatch_retry"] = "microbatch_retry"
    stage: int = Field(description="Stage that was asked.")
    asked: str = Field(description="PeerID that was asked.")
    asked_name: str = Field("", description="Its name, if this peer knows it.")
    reason: str = Field(description="What went wrong.")
    count: int = Field(1, description="Number of failures since the last event of this peer and stage.")


class StageThroughputEvent(_Event):
    """In a pipeline: throughput of the stages that this peer holds; reported every ten seconds."""

    event: Literal["stage_throughput"] = "stage_throughput"
    stages: tuple[int, ...] = Field(description="Stages that it holds.")
    tokens_per_s: float = Field(description="Tokens per second whose gradient it has computed since the last event.")
    most_tokens_per_s: float = Field(description="Measured tokens per second that it could do if it never waited.")
    waiting: int = Field(description="Requests of drivers that wait here.")
    in_flight: int = Field(description="Microbatches in flight that it drives; 0 if it is no driver.")
    loss: float | None = Field(None, description="Of a driver: mean loss of the returned microbatches, in nats per token; null without any.")  # fmt: skip


class PausedEvent(_Event):
    """This peer is paused: it has left the swarm, and its process keeps running."""

    event: Literal["paused"] = "paused"
    reason: str = Field(description="Why, in a sentence for a person.")


class ResumedEvent(_Event):
    """The pause is over: this peer is back among the others."""

    event: Literal["resumed"] = "resumed"
    round: int = Field(description="Next round in which it takes part.")
    paused_s: float = Field(description="Seconds of the pause.")


class ArchivedEvent(_Event):
    """The bootstrap saved the run's state."""

    event: Literal["archived"] = "archived"
    round: int = Field(description="Round that begins with the state: the number of rounds merged into it.")
    run_tokens: int = Field(description="Tokens the whole run had been trained on by then.")
    path: str = Field(description="Folder in which it was saved.")


class TrackerEvent(_Event):
    """This peer's curves are drawn by a tracker from now on (`--report-to`)."""

    event: Literal["tracker"] = "tracker"
    tracker: str = Field(description="Which one: `tensorboard`, `wandb` or `trackio`.")
    where: str = Field(description="Folder or address of the curves.")
    shown_by: str = Field("", description="Command that shows them; empty if `where` is an address to open.")


class WarningEvent(_Event):
    """Something is not as it should be; the process keeps running."""

    event: Literal["warning"] = "warning"
    message: str = Field(description="One line for a person.")
    code: str = Field("", description="Stable code of the warning: `swarmtrain explain CODE` and [troubleshooting](troubleshooting.md) say what to do.")  # fmt: skip


class ErrorEvent(_Event):
    """The process ends because of this error."""

    event: Literal["error"] = "error"
    message: str = Field(description="One line for a person.")
    hint: str = Field("", description="What to try, if the message does not say it.")
    code: str = Field("", description="Stable code of the error: `swarmtrain explain CODE` and [troubleshooting](troubleshooting.md) say what to do.")  # fmt: skip
    exit_code: int = Field(description="Exit code of the process: 2 for unusable input of a person, 1 otherwise.")


class FinishingEvent(_Event):
    """The run has trained all its tokens, and this peer does what is left to do, which may take a while."""

    event: Literal["finishing"] = "finishing"
    doing: str = Field(description="What it does now, such as `measuring and saving the model`.")


class AloneEvent(_Event):
    """One volunteer alone has trained on as many tokens as the swarm's fastest, for comparison."""

    event: Literal["alone"] = "alone"
    held_out_loss: float = Field(description="Loss on the held-out text, in nats per byte.")
    inner_steps: int = Field(description="Inner steps that it took.")
    wall_s: float = Field(description="Seconds of training.")


class LinkEvent(_Event):
    """A rehearsal is over: all that this peer's link carried. Only from `swarmtrain local`."""

    event: Literal["link"] = "link"
    up_bytes: int = Field(description="Bytes that the peer sent, including traffic of libp2p and the DHT.")
    down_bytes: int = Field(description="Bytes that the peer received.")


class CheckEvent(_Event):
    """`swarmtrain doctor` has finished a check."""

    event: Literal["check"] = "check"
    check: str = Field(description="Name of the check: one of those in docs/troubleshooting.md.")
    level: Literal["ok", "warning", "problem"] = Field(description="`problem` if a peer could not take part like this, `warning` if it could, but not well.")  # fmt: skip
    found: str = Field(description="Result, in one line for a person.")
    advice: str = Field("", description="What to do about it; empty if the level is `ok`.")


class DoneEvent(_Event):
    """The peer's work is over: the run has ended, or the peer leaves it."""

    event: Literal["done"] = "done"
    held_out_loss: float | None = Field(description="Last loss on the held-out text, in nats per byte; null if it was not measured, or is not a finite number.")  # fmt: skip
    own_loss: float | None = Field(None, description="With `gossip` and `server`: the loss of this peer's own weights; `held_out_loss` is the consensus' or the server's.")  # fmt: skip
    sources: tuple[str, ...] = Field((), description="With data.sources: their names; empty otherwise.")
    source_losses: tuple[float, ...] = Field((), description="Loss on the part of the held-out text of each of `sources`, in nats per byte.")  # fmt: skip
    tokens: int = Field(description="Tokens that this peer trained on in the rounds that it ended, whether or not a merge counted them (one that came too late does not); `run_tokens` has only what was counted.")  # fmt: skip
    run_tokens: int = Field(description="Tokens the whole run was trained on.")
    wall_s: float = Field(description="Seconds that the process ran.")
    reason: str = Field(description="Why it ends: `total_tokens`, `interrupted`, `asked` (by the control socket) or a sentence.")  # fmt: skip


Event = Annotated[
    Union[  # noqa: UP007 - spelt so that its members can be listed below
        InviteEvent,
        FetchedEvent,
        ArrivingEvent,
        JoinedEvent,
        DeviceEvent,
        StartedEvent,
        RoundEvent,
        EvalEvent,
        PeerJoinedEvent,
        PeerLostEvent,
        PeerLeftEvent,
        RefusedEvent,
        ClippedEvent,
        CaughtUpEvent,
        AssignedEvent,
        MovedEvent,
        MicrobatchRetryEvent,
        StageThroughputEvent,
        PausedEvent,
        ResumedEvent,
        ArchivedEvent,
        TrackerEvent,
        WarningEvent,
        ErrorEvent,
        FinishingEvent,
        AloneEvent,
        LinkEvent,
        CheckEvent,
        DoneEvent,
    ],
    Field(discriminator="event"),
]
EVENT_CLASSES: tuple[type[_Event], ...] = get_args(get_args(Event)[0])
_ADAPTER: TypeAdapter[Event] = TypeAdapter(Event)
_E = TypeVar("_E", bound=_Event)


def parse_event(line: str | bytes) -> Event:
    """Parse the event in a line of JSON. Raises `ValueError` when it is none of these."""
    return _ADAPTER.validate_json(line)


def to_json_line(event: Event) -> str:
    """Return one line of JSON without its line end; the event's kind, time, peer and name come first."""
    fields = event.model_dump(mode="json")
    head = {key: fields[key] for key in ("event", "time", "peer", "name")}
    return json.dumps(head | fields, allow_nan=False)


def stamped(event: _E, time: float, peer: str, name: str) -> _E:
    """Fill in `time` (Unix seconds), `peer` and `name` where `event` has none of its own."""
    return event.model_copy(update={"time": event.time or time, "peer": event.peer or peer, "name": event.name or name})


def times_below_allreduce(num_parameters: int, inner_steps: int, bytes_sent: int) -> float | None:
    """Compare `bytes_sent` with an fp32 ring all-reduce at every step, which sends 8 bytes per parameter and step.

    Return how many times fewer bytes were sent; None if none were.
    """
    return 8 * num_parameters * inner_steps / bytes_sent if bytes_sent else None


def to_plain_line(event: Event) -> str:
    """Return one line for a person: local time, the peer's name, what happened. Control characters are escaped."""
    clock = datetime.datetime.fromtimestamp(event.time).strftime("%H:%M:%S")
    line = " ".join(part for part in (clock, event.name, in_words(event)) if part)
    return one_line(line)


def arrived_in_words(event: ArrivingEvent) -> str:
    """Say how much of a state has arrived, such as `12 MB of 400 MB (3%), 2 min 5 s left`."""
    sizes = f"{size_in_words(event.received_bytes)} of {size_in_words(event.total_bytes)}"
    return f"{sizes} ({event.share:.0%}), {time_in_words(event.left_s)} left"


def who_in_words(peer: str, name: str) -> str:
    """Name a peer, with the end of its PeerID: other peers may have or take the same name."""
    short = short_peer(peer)
    return f"{name} ({short})" if name and name != short else short


def merge_in_words(event: RoundEvent) -> str:
    """Describe an asynchronous round's merge for a person, with whole PeerIDs, which the caller may replace by names."""
    if not event.partners:
        return "nobody this round: no partner had anything new yet (this costs nothing)"
    parts = [f"{', '.join(event.partners)} in {time_in_words(event.pull_s or 0.0)}"]
    if (stalest := max(event.staleness_rounds, default=0)) > 0:  # of who is ahead it is below 0
        parts.append(f"at most {counted(stalest, 'round')} old")
    if event.consensus_spread is not None:
        parts.append(f"weights {event.consensus_spread:.1%} apart")
    return ", ".join(parts)


def data_in_words(event: RoundEvent) -> str:
    """Say which shard a round read, for a person; empty if the data have no shards."""
    if event.shard is None:
        return ""
    unseen = {None: "", 0: "; none is unseen", 1: "; 1 is still unseen by all"}
    return f"the last round from shard {event.shard}" + unseen.get(
        event.unseen_shards, f"; {event.unseen_shards} are still unseen by all"
    )


def _merge_in_words(event: RoundEvent) -> list[str]:
    if event.signer:
        return [f"{len(event.partners)} on the roster", f"merged in {time_in_words(event.merge_s)}"]
    number = len(event.partners)
    partners = counted(number, "partner") if number else "nobody"
    return [f"merged with {partners}", f"stalled for {time_in_words(event.stall_s)}"]


def _of_stage(stage: int | None) -> str:
    return "" if stage is None else f" of stage {stage}"


def _round_in_words(event: RoundEvent) -> str:
    parts = [
        f"round {event.round}{_of_stage(event.stage)}: loss {event.loss:.3f}",
        f"{counted(event.inner_steps, 'step')} in {time_in_words(event.seconds)}",
        *_merge_in_words(event),
        f"sent {size_in_words(event.bytes_sent)}",
    ]
    if event.times_below_allreduce is not None:
        parts.append(below_in_words(event.times_below_allreduce))
    return ", ".join([*parts, f"{count_in_words(event.run_tokens)} tokens in all"])


def _pipeline_in_words(event: AssignedEvent | MovedEvent | MicrobatchRetryEvent | StageThroughputEvent) -> str:
    match event:
        case AssignedEvent():
            return f"takes {stages_in_words(event.stages)}: {event.reason}"
        case MovedEvent():
            return (
                f"holds {stages_in_words(event.after)} now, {stages_in_words(event.before)} before, after "
                f"{time_in_words(event.seconds)}: {event.reason}"
            )
        case MicrobatchRetryEvent():
            times = "" if event.count == 1 else f" ({event.count} times)"
            return f"asks stage {event.stage} again, {who_in_words(event.asked, event.asked_name)} failed{times}: {event.reason}"
        case StageThroughputEvent():
            rates = f"{count_in_words(event.tokens_per_s)} of {count_in_words(event.most_tokens_per_s)} tokens/s"
            under_way = f", {event.in_flight} microbatches under way" if event.in_flight else ""
            return f"{stages_in_words(event.stages)}: {rates}, {event.waiting} requests waiting{under_way}"


def _device_event_in_words(event: DeviceEvent) -> str:
    compiled = ", compiled" if event.compiled else ""
    sequences, on_each = counted(event.microbatch_sequences, "sequence"), " on each" if "," in event.device else ""
    if event.microbatch_sequences < event.batch_sequences:
        sequences = f"{event.microbatch_sequences} of {counted(event.batch_sequences, 'sequence')}"
    where = f"{device_in_words(event.device, event.title)} in {event.precision}{compiled}"
    return f"training on {where}, {sequences} at once{on_each}" + (f": {event.why}" if event.why else "")


def in_words(event: Event) -> str:
    """Describe an event for a person: not yet escaped, without time and name."""
    match event:
        case InviteEvent():
            return f"others join with: {event.line}"
        case FetchedEvent():
            return (
                f"fetched run {event.run_name} ({event.run_sha256[:12]}) with {size_in_words(event.held_out_bytes)} "
                f"of held-out text from {short_peer(event.from_peer)}" + (f": {event.summary}" if event.summary else "")
            )
        case ArrivingEvent():
            return f"{event.doing}: {arrived_in_words(event)}"
        case JoinedEvent():
            source = (
                f"the state of {who_in_words(event.state_from, event.state_from_name)}"
                if event.state_from
                else "the initial weights"
            )
            if event.resumed_round is not None:
                own = f"its own checkpoint of round {event.resumed_round}"
                source = f"{own}, then {source}" if event.state_from else own
            return (
                f"joined at round {event.round} with {source}, {_peers(event.num_peers)} present, "
                f"{count_in_words(event.run_tokens)} tokens so far"
            )
        case DeviceEvent():
            return _device_event_in_words(event)
        case StartedEvent():
            many = counted(event.inner_steps_per_round, "inner step")
            return (
                f"training {count_in_words(event.num_parameters)} parameters, {many} in the first round, "
                f"{time_in_words(event.startup_s)} after the start"
            )
        case RoundEvent():
            return _round_in_words(event)
        case EvalEvent():
            by_source = source_losses_in_words(event.sources, event.source_losses)
            parts = f": {by_source}" if by_source else ""
            return f"held-out loss {loss_in_words(event.held_out_loss)} after round {event.round}{parts}"
        case AssignedEvent() | MovedEvent() | MicrobatchRetryEvent() | StageThroughputEvent():
            return _pipeline_in_words(event)
        case PeerJoinedEvent():
            return f"peer {event.joined_name or short_peer(event.joined)} joined"
        case PeerLostEvent():
            return f"peer {event.lost_name or short_peer(event.lost)} is lost: {_reason_in_words(event.reason)}"
        case PeerLeftEvent():
            return f"peer {event.left_name or short_peer(event.left)} left"
        case RefusedEvent():
            return f"refused what {who_in_words(event.from_peer, event.from_name)} sent ({event.rule}): {event.detail}"
        case ClippedEvent():
            return f"clipped what {who_in_words(event.from_peer, event.from_name)} published ({event.rule}): {event.detail}"
        case CaughtUpEvent():
            return f"caught up to round {event.round} from {who_in_words(event.from_peer, event.from_name)}: {event.reason}"
        case PausedEvent():
            return f"paused: {event.reason}"
        case FinishingEvent():
            return f"the run is complete: {event.doing}"
        case ResumedEvent():
            return f"resumed at round {event.round} after a pause of {time_in_words(event.paused_s)}"
        case LinkEvent():
            return f"its link carried {size_in_words(event.up_bytes)} up and {size_in_words(event.down_bytes)} down"
        case AloneEvent():
            steps, time = event.inner_steps, time_in_words(event.wall_s)
            return (
                f"one volunteer alone: held-out loss {loss_in_words(event.held_out_loss)} after {steps} steps in {time}"
            )
        case ArchivedEvent():
            rounds = counted(event.round, "round")
            return f"archived {rounds} ({count_in_words(event.run_tokens)} tokens) in {event.path}"
        case TrackerEvent():
            return f"curves in {event.tracker}: {event.shown_by or event.where}"
        case WarningEvent():
            return with_code(f"warning: {event.message}", event.code)
        case ErrorEvent():
            return with_code(f"error: {event.message}" + (f"; {event.hint}" if event.hint else ""), event.code)
        case CheckEvent():
            return f"{event.level}: {event.check}: {event.found}" + (f"; {event.advice}" if event.advice else "")
        case DoneEvent():
            loss = "not measured" if event.held_out_loss is None else loss_in_words(event.held_out_loss)
            by_source = source_losses_in_words(event.sources, event.source_losses)
            loss += f" [{by_source}]" if by_source else ""
            run = f"{count_in_words(event.run_tokens)} tokens"
            part = f"{count_in_words(event.tokens)} of {run} trained here" if event.tokens else f"{run} in all"
            return f"done ({event.reason}) after {time_in_words(event.wall_s)}: held-out loss {loss}, {part}"


def _reason_in_words(reason: str) -> str:
    """Say why a peer is lost: the network's own words name each address that it tried."""
    return "it cannot be reached" if "failed to dial" in reason else reason


def _peers(number: int) -> str:
    return f"{number} peer" if number == 1 else f"{number} peers"

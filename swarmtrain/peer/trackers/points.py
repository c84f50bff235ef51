"""Points of a peer's curves, from its events and its status, for trackers such as TensorBoard.

Pure: no clock, no thread, no library. A point's step is the number of tokens that the whole run has been trained on, so
that the curves of all peers of a run have the same axis, also of one that was away. Steps always rise: where the tokens
have not grown since the point before (two points of one round, or a run that continues from an older state), a step is
one higher than the last.

A point has numbers only, under fixed names, and the names of the run's own sources of text and stages: nothing about
another peer, and no text that another peer chose.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from swarmtrain.events import EvalEvent, Event, RoundEvent, StageThroughputEvent
from swarmtrain.v1 import control_pb2 as pb


@dataclass(frozen=True)
class Point:
    """Values of some curves at one step, at a time in Unix seconds."""

    step: int
    time: float
    values: Mapping[str, float]


@dataclass(frozen=True)
class Position:
    """How far a peer's curves have been drawn, over all its processes."""

    step: int = 0
    """Step of the last point; 0 before the first."""
    sent_bytes: int = 0
    """Payload bytes that the peer had sent by then."""
    received_bytes: int = 0


class Curves:
    """Makes the points of one peer. Events and statuses must be those of one process, in their order."""

    def __init__(self, position: Position) -> None:
        """Continue where the peer's last process ended."""
        self.position = self._began = position
        self._sampled: tuple[float, ...] = ()

    def of_event(self, event: Event, status: pb.PeerStatus, time: float) -> Point | None:
        """Return the point that an event of this peer makes, with the status just after it; None if it makes none."""
        match event:
            case RoundEvent(stage=None):
                values = _of_round(event, status)
            case RoundEvent():
                values = _of_stage_round(event, status)
            case StageThroughputEvent():
                values = _of_throughput(event)
            case EvalEvent():
                return self._point(_of_eval(event), status.run_tokens, time)
            case _:
                return None
        values |= self._traffic(status)
        tokens = event.run_tokens if isinstance(event, RoundEvent) else status.run_tokens
        return self._point(values, tokens, time)

    def of_status(self, status: pb.PeerStatus, time: float) -> Point | None:
        """Return the point of the whole run as a bootstrap sees it now; None if nothing has changed since the last one
        but its traffic."""
        seen = (status.run_tokens, _num_volunteers(status), status.swarm_loss)
        if seen == self._sampled or not status.run_tokens:
            return None
        self._sampled = seen
        values = {
            "train/tokens": status.run_tokens,
            "train/tokens_per_s": status.swarm_tokens_per_s,
            "train/round": status.round,
            **_of_swarm(status),
            **self._traffic(status),
        }
        if status.swarm_loss:
            values["train/loss"] = status.swarm_loss
        for stage in status.stages:
            of_stage = f"stage-{stage.number}"
            values[f"{of_stage}/peers"] = stage.num_peers
            values[f"{of_stage}/tokens_per_s"] = stage.tokens_per_s
            values[f"{of_stage}/most_tokens_per_s"] = stage.most_tokens_per_s
        return self._point(values, status.run_tokens, time)

    def of_past(self, losses: Iterable[pb.LossPoint], time: float) -> list[Point]:
        """Return the points of the losses that a peer remembers from before its curves were drawn, oldest first; at
        `time` where it does not know when they were."""
        points = []
        for loss in losses:
            if loss.run_tokens > self.position.step:
                values = {"train/loss": loss.loss, "train/round": loss.round, "swarm/tokens": loss.run_tokens}
                if loss.held_out_loss:
                    values["eval/loss"] = loss.held_out_loss
                points.append(self._point(values, loss.run_tokens, loss.time or time))
        return points

    def _point(self, values: Mapping[str, float], run_tokens: int, time: float) -> Point:
        step = max(self.position.step + 1, run_tokens)
        self.position = Position(step, self.position.sent_bytes, self.position.received_bytes)
        return Point(step, time, {name: float(value) for name, value in values.items() if math.isfinite(value)})

    def _traffic(self, status: pb.PeerStatus) -> dict[str, float]:
        """Return the payload bytes over all processes of the peer.

        While a peer ends, its status may show a little less than before: a sum never falls.
        """
        sent = max(self.position.sent_bytes, self._began.sent_bytes + status.sent_bytes)
        received = max(self.position.received_bytes, self._began.received_bytes + status.received_bytes)
        self.position = Position(self.position.step, sent, received)
        return {"link/sent_bytes": sent, "link/received_bytes": received}


def _num_volunteers(status: pb.PeerStatus) -> int:
    return sum(peer.present and not peer.bootstrap for peer in status.peers)


def _of_swarm(status: pb.PeerStatus) -> dict[str, float]:
    return {
        "swarm/tokens": status.run_tokens,
        "swarm/tokens_per_s": status.swarm_tokens_per_s,
        "swarm/peers": _num_volunteers(status),
    }


def _of_training(event: RoundEvent) -> dict[str, float]:
    """Return what every round has, by the names of its curves without their group."""
    values = {"loss": event.loss, "lr": event.learning_rate, "round": event.round}
    if event.grad_norm is not None:
        values["grad_norm"] = event.grad_norm
    return values


def _of_round(event: RoundEvent, status: pb.PeerStatus) -> dict[str, float]:
    values = {f"train/{name}": value for name, value in _of_training(event).items()}
    values["train/tokens"] = status.own_tokens
    values |= {**_of_swarm(status), "swarm/tokens": event.run_tokens, "swarm/peers": event.num_peers}
    values["swarm/merge_s"] = event.merge_s
    if event.seconds > 0:
        values["train/tokens_per_s"] = event.tokens / event.seconds
        values["swarm/stall"] = event.stall_s / event.seconds
    if event.staleness_rounds:
        values["swarm/staleness_rounds"] = max(event.staleness_rounds)
    if event.consensus_spread is not None:
        values["swarm/consensus_spread"] = event.consensus_spread
    if event.times_below_allreduce is not None:
        values["link/times_below_allreduce"] = event.times_below_allreduce
    return values


def _of_stage_round(event: RoundEvent, status: pb.PeerStatus) -> dict[str, float]:
    """A stage's round has the curves of the stage and, as it trains the run too, those of the peer."""
    training, of_stage = _of_training(event), f"stage-{event.stage}"
    values = {f"{of_stage}/{name}": value for name, value in training.items()}
    values |= {f"train/{name}": training[name] for name in ("loss", "lr")}
    values |= {"train/tokens": status.own_tokens, "train/tokens_per_s": status.own_tokens_per_s, **_of_swarm(status)}
    values |= {f"{of_stage}/peers": event.num_peers, f"{of_stage}/merge_s": event.merge_s}
    if event.seconds > 0:
        values[f"{of_stage}/stall"] = event.stall_s / event.seconds
    return values


def _of_throughput(event: StageThroughputEvent) -> dict[str, float]:
    values: dict[str, float] = {}
    for number in event.stages:
        values[f"stage-{number}/tokens_per_s"] = event.tokens_per_s
        values[f"stage-{number}/most_tokens_per_s"] = event.most_tokens_per_s
        values[f"stage-{number}/waiting"] = event.waiting
    return values


def _of_eval(event: EvalEvent) -> dict[str, float]:
    found = {
        "eval/loss": event.held_out_loss,
        "eval/bits_per_byte": event.bits_per_byte,
        "eval/perplexity": event.perplexity,
        "eval/own_loss": event.own_loss,
    }
    values = {name: value for name, value in found.items() if value is not None}
    of_sources = zip(event.sources, event.source_losses, strict=False)
    return values | {f"eval/loss/{source}": loss for source, loss in of_sources}

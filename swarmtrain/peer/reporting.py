"""What is told of a finished round, as an event."""

from __future__ import annotations

import math
from typing import Any

from swarmtrain.events import RoundEvent, times_below_allreduce
from swarmtrain.network.codec import vector_sha256
from swarmtrain.peer.exchange import SwarmExchange
from swarmtrain.peer.trainer import Averaged, RoundReport, Served

__all__ = ["round_event", "what_was_merged"]


def round_event(report: RoundReport, exchange: SwarmExchange, stage: int | None = None) -> RoundEvent:
    """A round of a whole model, or of a stage."""
    sent, received = exchange.traffic_since_last()
    contribution = report.contribution
    below = None
    if report.num_peers > 1:
        below = times_below_allreduce(report.state.theta.numel(), contribution.inner_steps, sent)
    return RoundEvent(
        round=contribution.round,
        stage=stage,
        inner_steps=contribution.inner_steps,
        tokens=contribution.tokens,
        run_tokens=report.progress.run_tokens,
        num_peers=report.num_peers,
        loss=report.loss,
        first_loss=report.first_loss,
        learning_rate=report.learning_rate,
        grad_norm=report.grad_norm,
        seconds=report.seconds,
        merge_s=report.merge_s,
        stall_s=report.stall_s,
        bytes_sent=sent,
        bytes_received=received,
        times_below_allreduce=below,
        **what_was_merged(report),
        **exchange.data_seen(),
    )


def what_was_merged(report: RoundReport) -> dict[str, Any]:
    """The fields of a round's event that tell of its merge. Only weights that others should have too are hashed: that
    takes the trainer's time."""
    arrived = report.arrived
    if isinstance(arrived, Averaged):
        roster = {"partners": arrived.partners, "weights": arrived.weights, "signer": arrived.signer}
        return {**roster, "state_sha256": vector_sha256(report.state.theta)}
    pulled = {
        "partners": tuple(merged.peer for merged in arrived.merged),
        "weights": tuple(merged.tokens for merged in arrived.merged),
        "staleness_rounds": tuple(merged.staleness_rounds for merged in arrived.merged),
        "pull_s": max((merged.pull_s for merged in arrived.merged), default=None),
    }
    if isinstance(arrived, Served):
        return pulled
    prepared = arrived.prepared
    return {
        **pulled,
        "variance_factor": prepared.variance_factor,
        "consensus_spread": prepared.consensus_spread,
        "displacement": None if prepared.displacement == math.inf else prepared.displacement,
    }

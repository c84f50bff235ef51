"""What is told of a finished round, as an event."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

from swarmtrain.events import RoundEvent, times_below_allreduce
from swarmtrain.network.codec import vector_sha256
from swarmtrain.network.node import NetworkThread
from swarmtrain.network.records import MAX_LOSS
from swarmtrain.network.swarm import Swarm
from swarmtrain.peer.exchange import SwarmExchange
from swarmtrain.peer.trainer import Averaged, Gathered, Merged, RoundReport, Served

__all__ = ["round_event", "tell_loss", "what_was_merged"]


def round_event(report: RoundReport, exchange: SwarmExchange, stage: int | None = None) -> RoundEvent:
    """A round of a whole model, or of a stage."""
    sent, received = exchange.traffic_since_last()
    contribution = report.contribution
    below = None
    if report.num_peers > 1:
        below = times_below_allreduce(report.state.size, contribution.inner_steps, sent)
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


def tell_loss(network: NetworkThread, swarm: Swarm, loss: float) -> None:
    """Have the next presence say what the loss was, if it is one; the trainer does not wait for it."""

    async def describe() -> None:
        swarm.me = dataclasses.replace(swarm.me, loss=loss if 0 <= loss <= MAX_LOSS else 0.0)

    network.submit_unhurried(describe())


def what_was_merged(report: RoundReport) -> dict[str, Any]:
    """The fields of a round's event that tell of its merge. Only weights that others should have too are hashed: that
    takes the trainer's time."""
    arrived = report.arrived
    if isinstance(arrived, Averaged):
        roster = {"partners": arrived.partners, "weights": arrived.weights, "signer": arrived.signer}
        return {**roster, "state_sha256": vector_sha256(report.state.theta)}
    if isinstance(arrived, Served):
        return _pulled(arrived.merged)
    prepared = [each.prepared for each in arrived]
    return {
        **_pulled(_of_the_model(arrived)),
        "variance_factor": max(each.variance_factor for each in prepared),
        "consensus_spread": _most(each.consensus_spread for each in prepared),
        "displacement": _most(each.displacement for each in prepared if each.displacement != math.inf),
    }


def _pulled(merged: Sequence[Merged]) -> dict[str, Any]:
    return {
        "partners": tuple(each.peer for each in merged),
        "weights": tuple(each.tokens for each in merged),
        "staleness_rounds": tuple(each.staleness_rounds for each in merged),
        "pull_s": max((each.pull_s for each in merged), default=None),
    }


def _most(values: Iterable[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)


def _of_the_model(gathered: Sequence[Gathered]) -> list[Merged]:
    """What was merged of each partner, of any fragment; of the tokens so many as the merged part of the model is."""
    size = sum(each.prepared.theta_mean.numel() for each in gathered)
    found: dict[str, Merged] = {}
    tokens = dict[str, float]()
    for each in gathered:
        for merged in each.merged:
            share = each.prepared.theta_mean.numel() / size
            tokens[merged.peer] = tokens.get(merged.peer, 0.0) + share * merged.tokens
            before = found.setdefault(merged.peer, merged)
            found[merged.peer] = dataclasses.replace(
                merged,
                tokens=round(tokens[merged.peer]),
                staleness_rounds=max(before.staleness_rounds, merged.staleness_rounds),
                pull_s=max(before.pull_s, merged.pull_s),
            )
    return list(found.values())

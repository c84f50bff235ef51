"""Reports of finished rounds, as the `round` event."""

from __future__ import annotations

from swarmtrain.events import RoundEvent, times_below_allreduce
from swarmtrain.network.codec import vector_sha256
from swarmtrain.network.discovery.records import MAX_LOSS
from swarmtrain.network.node import NetworkThread
from swarmtrain.network.swarm import Swarm
from swarmtrain.peer.merging.roster_exchange import SwarmExchange
from swarmtrain.peer.merging.updates import MergeFields
from swarmtrain.peer.training.session import RoundReport


def round_event(report: RoundReport, exchange: SwarmExchange, stage: int | None = None) -> RoundEvent:
    """Return the event of a round of a whole model, or of `stage`."""
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
        adapter_groups=None if contribution.trained is None else tuple(sorted(contribution.trained)),
        **what_was_merged(report),
        **exchange.data_seen(),
    )


def tell_loss(network: NetworkThread, swarm: Swarm, loss: float) -> None:
    """Put the loss into the next presence record, if it is a valid one; the trainer does not wait for that."""

    async def describe() -> None:
        swarm.presence.change(loss=loss if 0 <= loss <= MAX_LOSS else 0.0)

    network.submit_unhurried(describe())


def what_was_merged(report: RoundReport) -> MergeFields:
    """Return the fields of a round's event that describe its merge.

    The state is hashed only if others should hold the same weights: hashing takes the trainer's time.
    """
    *before, last = report.arrived
    told = last.told(before)
    return {**told, "state_sha256": vector_sha256(report.state.theta)} if last.is_shared else told

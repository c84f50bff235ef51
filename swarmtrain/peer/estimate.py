"""What a run costs each of its peers: memory, bytes on the link and disk, computed from the run file alone.

The constants were measured (2 cores, torch on the CPU), see the comments; `benchmarks/memory.py` compares memory and
bytes with real volunteers. Two numbers are given for the link: the bytes of the merges in a round, and the most in a
round, which adds a state that the archive or a late joiner pulls. Presence records add a little.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

from swarmtrain.events import times_below_allreduce
from swarmtrain.peer.checkpoints.files import KEPT
from swarmtrain.peer.merging.costs import BYTES_PER_PARAMETER, copies, costs_of, publication_sizes, pulled_bytes
from swarmtrain.run import RunFile

__all__ = [
    "Estimate",
    "activation_wire_bytes",
    "copies",
    "disk_bytes",
    "estimate",
    "estimates_of",
    "merge_bytes",
    "publication_sizes",
    "pulled_bytes",
]

# Proportional set sizes: torch, hivemind and swarmtrain's imports; the network daemon.
IMPORTS_BYTES = 250_000_000
DAEMON_BYTES = 75_000_000
# A stage has two more versions of the weights, and a batch's gradients while the next batch is summed.
STAGE_BYTES_PER_PARAMETER = BYTES_PER_PARAMETER + 3 * 4
CHECKPOINT_BYTES_PER_PARAMETER = 16  # weights, AdamW's two moments, the outer momentum
# Numbers kept for the backward pass per token and layer, in widths: measured 16.8 at ratio 2, 21.4 at ratio 4.
ACTIVATION_WIDTHS = 13
ACTIVATION_WIDTHS_PER_RATIO = 2
LOGITS_COPIES = 3
_TALK_BYTES = 500_000
"""Bytes of presence, progress records, greetings and manifests in a round, as measured; with a large model they are
negligible.
"""
_UNEVEN = 1.25
"""Factor from a peer's mean to its busiest round: others' rounds do not end in step with its own."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Cost of a run for each of `num_peers` equal peers."""

    num_peers: int
    num_parameters: int
    tokens_per_step: int  # of one peer
    tokens_per_round: int  # of all peers
    num_rounds: int
    inner_steps_per_peer: int
    bytes_sent_per_round: int
    bytes_received_per_round: int
    state_bytes: int  # weights and momentum, which the archive or a late joiner takes from the peer that it asks first
    bytes_sent_most_per_round: int  # merges that others end twice within this peer's round, and a state
    times_below_allreduce: float | None  # None for a peer alone
    memory_bytes: int  # program + parameters + activations
    memory_program_bytes: int
    memory_parameters_bytes: int
    memory_activations_bytes: int


def estimate(run: RunFile, num_parameters: int, num_peers: int) -> Estimate:
    """Return the memory and traffic of each of `num_peers` (>= 1) equal peers in this run, and the tokens that it
    trains.

    In a pipeline it is the cost of one stage, as if all stages were alike, without activations.
    """
    stages = run.pipeline.stages
    if stages > 1:
        num_parameters, num_peers = math.ceil(num_parameters / stages), max(1, num_peers // stages)
    steps = math.ceil(run.run.total_tokens / (run.tokens_per_step * num_peers))
    costs = costs_of(run)
    sent, incoming = costs.merge_bytes(run, num_parameters, num_peers - 1)
    if stages == 1:
        parameters_bytes = costs.memory_bytes(run, num_parameters, num_peers - 1)
    else:
        parameters_bytes = STAGE_BYTES_PER_PARAMETER * num_parameters + incoming
    activations_bytes = _activations_bytes(run)
    program_bytes = IMPORTS_BYTES + DAEMON_BYTES
    return Estimate(
        num_peers=num_peers,
        num_parameters=num_parameters,
        tokens_per_step=run.tokens_per_step,
        tokens_per_round=run.tokens_per_step * run.merge.inner_steps * num_peers,
        num_rounds=math.ceil(steps / run.merge.inner_steps),
        inner_steps_per_peer=steps,
        bytes_sent_per_round=sent,
        bytes_received_per_round=sent,
        state_bytes=8 * num_parameters,
        bytes_sent_most_per_round=round(_UNEVEN * sent)
        + _TALK_BYTES
        + (0 if run.merge.kind.has_server else 8 * num_parameters),
        times_below_allreduce=times_below_allreduce(num_parameters, run.merge.inner_steps, sent),
        memory_bytes=program_bytes + parameters_bytes + activations_bytes,
        memory_program_bytes=program_bytes,
        memory_parameters_bytes=parameters_bytes,
        memory_activations_bytes=activations_bytes,
    )


def estimates_of(run: RunFile, num_parameters: int) -> Callable[[int], Estimate]:
    """Return `estimate` of this run as a cached function of the number of peers."""
    return functools.lru_cache(maxsize=8)(functools.partial(estimate, run, num_parameters))


def merge_bytes(run: RunFile, num_parameters: int, others: int) -> tuple[int, int]:
    """Return (bytes sent per round, bytes held of what arrives and is being merged) with `others` other peers."""
    return costs_of(run).merge_bytes(run, num_parameters, others)


def _activations_bytes(run: RunFile) -> int:
    sequences = max(run.microbatch_sequences, run.evaluation.batch_sequences // 4)
    return activation_bytes(run, sequences, run.model.num_layers, has_head=True)


def activation_bytes(run: RunFile, num_sequences: int, num_layers: int, *, has_head: bool) -> int:
    """Return the bytes of activations kept from the forward pass of `num_sequences` sequences until their backward."""
    model = run.model
    widths = ACTIVATION_WIDTHS + ACTIVATION_WIDTHS_PER_RATIO * model.feed_forward_ratio
    numbers = num_layers * model.width * widths + LOGITS_COPIES * model.vocabulary_size * has_head
    return round(4 * num_sequences * model.context_tokens * numbers)


def disk_bytes(num_parameters: int) -> int:
    """Return the disk space for the kept checkpoints and the one being written."""
    return (KEPT + 1) * CHECKPOINT_BYTES_PER_PARAMETER * num_parameters


def activation_wire_bytes(run: RunFile) -> int:
    """Return the bytes of one microbatch's activations between two stages; its gradients back are as large."""
    from swarmtrain.algorithm.quantize import encoded_size_bytes

    numbers = run.microbatch_sequences * run.model.context_tokens * run.model.width
    return encoded_size_bytes(run.pipeline.activations, [numbers])

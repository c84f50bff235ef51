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
from swarmtrain.model.loss_chunks import CARD_BYTES, SMALL_BYTES, chunk_tokens
from swarmtrain.model.parameter_count import FROZEN_BYTES_PER_PARAMETER, num_frozen_parameters, position_numbers
from swarmtrain.peer.checkpoints.files import KEPT
from swarmtrain.peer.merging.costs import BYTES_PER_PARAMETER, costs_of
from swarmtrain.protocol.devices import largest_part
from swarmtrain.protocol.rounds.batch_end import planned_sequences
from swarmtrain.run import RunFile

# Proportional set sizes: torch, hivemind and swarmtrain's imports; the network daemon.
IMPORTS_BYTES = 250_000_000
DAEMON_BYTES = 75_000_000
# Computing blocks again imports torch's compiler: 80 to 88 MB.
RECOMPUTING_BYTES = 85_000_000
_TRANSFORMERS_BYTES = 155_000_000  # importing that library, of which ranks share nothing
RANK_BYTES = 175_000_000  # of a further rank, without what it shares with the others
RANK_BYTES_PER_PARAMETER = 16  # weights, gradients, AdamW's two moments
# A stage has two more versions of the weights, and a batch's gradients while the next batch is summed.
STAGE_BYTES_PER_PARAMETER = BYTES_PER_PARAMETER + 3 * 4
CHECKPOINT_BYTES_PER_PARAMETER = 16  # weights, AdamW's two moments, the outer momentum
# Numbers kept for the backward pass per token and block, in widths: counted 17.1 at ratio 1, 21.1 at ratio 2, 23.8 at
# 2.667 and 29.1 at 4 (fp32; a third fewer under bf16).
ACTIVATION_WIDTHS = 13.2
ACTIVATION_WIDTHS_PER_RATIO = 4
# A block's backward pass makes more of them: counted 1.29 at ratio 2, 1.31 at 2.667, 1.33 at 4.
_IN_BACKWARD = 1.3
# Numbers at once in a block's forward pass without a backward pass: counted 9.9 at ratio 2, 12.5 at 2.667, 17.7 at 4.
_FORWARD_WIDTHS = 3
_FORWARD_WIDTHS_PER_RATIO = 3.7
# Logits, probabilities and their gradient; where the loss is computed in chunks, a chunk's logits and probabilities.
LOGITS_COPIES = 3
_CHUNK_COPIES = 2
_NOT_AT_ONCE = 0.2
"""Share of the gradient, or of the activations if they are fewer, that the others have made room for where a step is
one microbatch. With 124 million parameters 0.21 was measured at 512 tokens and 0.61 at 1,024: the allocator keeps what
is freed.
"""
_TALK_BYTES = 500_000
"""Bytes of presence, progress records, greetings and manifests in a round, as measured; with a large model they are
negligible.
"""
_UNEVEN = 1.25
"""Factor from a peer's mean to its busiest round: others' rounds do not end in step with its own."""

_LATE_STEPS = 2
"""Steps that a volunteer has too many in a large batch: one while it asks the others how far they are, and the one that
it is in when the batch is there."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Cost of a run for each of `num_peers` equal peers."""

    num_peers: int
    num_parameters: int  # trained ones
    tokens_per_step: int  # of one peer
    tokens_per_round: int  # of all peers
    num_rounds: int
    fewest_rounds: int  # where volunteers end large batches late
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


def estimate(
    run: RunFile,
    num_parameters: int,
    num_peers: int,
    *,
    microbatch_sequences: int = 0,
    recomputes: bool = False,
    num_ranks: int = 1,
) -> Estimate:
    """Return the memory and traffic of each of `num_peers` (>= 1) equal peers in this run, and the tokens that it
    trains. `num_parameters` are trained; those that are frozen beside an adapter take memory and nothing else.

    In a pipeline it is the cost of one stage, as if all stages were alike, without activations. `microbatch_sequences`
    are computed at once, 0: as the run file says; `recomputes` is as in `activation_bytes`. `num_ranks` of the
    peer train on the processor, each with weights, moments and activations of its own.
    """
    stages = run.pipeline.stages
    if stages > 1:
        num_parameters, num_peers = math.ceil(num_parameters / stages), max(1, num_peers // stages)
    steps = math.ceil(run.run.total_tokens / (run.tokens_per_step * num_peers))
    # Of one large batch each computes its share; elsewhere a round has as many inner steps on each.
    round_steps: float = run.merge.inner_steps
    if run.merge.kind.common_step:
        round_steps = run.batch_target.mean_tokens / run.tokens_per_step / num_peers
    state_bytes = run.merge.kind.state_bytes(num_parameters)
    costs = costs_of(run)
    sent, incoming = costs.merge_bytes(run, num_parameters, num_peers - 1)
    if stages == 1:
        parameters_bytes = costs.memory_bytes(run, num_parameters, num_peers - 1)
    else:
        parameters_bytes = STAGE_BYTES_PER_PARAMETER * num_parameters + incoming
    parameters_bytes += FROZEN_BYTES_PER_PARAMETER * num_frozen_parameters(run)
    parameters_bytes += num_ranks * positions_bytes(run)
    at_once = microbatch_sequences or min(run.microbatch_sequences, largest_part(run.inner.batch_sequences, num_ranks))
    activations_bytes = _activations_bytes(run, at_once, recomputes, num_ranks)
    if num_ranks == 1 and at_once >= run.inner.batch_sequences:
        activations_bytes -= round(_NOT_AT_ONCE * min(activations_bytes, 4 * num_parameters))
    parameters_bytes += (num_ranks - 1) * RANK_BYTES_PER_PARAMETER * num_parameters
    program_bytes = own_program_bytes(run) + (num_ranks - 1) * RANK_BYTES
    program_bytes += (num_ranks - 1) * _library_bytes(run) + num_ranks * RECOMPUTING_BYTES * recomputes
    num_rounds = math.ceil(steps / round_steps)
    return Estimate(
        num_peers=num_peers,
        num_parameters=num_parameters,
        tokens_per_step=run.tokens_per_step,
        tokens_per_round=round(run.tokens_per_step * round_steps * num_peers),
        num_rounds=num_rounds,
        fewest_rounds=_fewest_rounds(run, num_peers) if run.merge.kind.common_step else num_rounds,
        inner_steps_per_peer=steps,
        bytes_sent_per_round=sent,
        bytes_received_per_round=sent,
        state_bytes=state_bytes,
        bytes_sent_most_per_round=round(_UNEVEN * sent)
        + _TALK_BYTES
        + (0 if run.merge.kind.has_server else state_bytes),
        times_below_allreduce=times_below_allreduce(num_parameters, max(1, round(round_steps)), sent),
        memory_bytes=program_bytes + parameters_bytes + activations_bytes,
        memory_program_bytes=program_bytes,
        memory_parameters_bytes=parameters_bytes,
        memory_activations_bytes=activations_bytes,
    )


def _fewest_rounds(run: RunFile, num_peers: int) -> int:
    """Return the steps of a run of large batches if each of `num_peers` equal volunteers has `_LATE_STEPS` steps of its
    own too many in every batch."""
    target, context, batch = run.batch_target, run.model.context_tokens, run.inner.batch_sequences
    if num_peers < 2:
        return target.num_steps

    def at(run_tokens: int) -> int:
        wanted = target.at(run_tokens)
        return wanted + _LATE_STEPS * num_peers * context * planned_sequences(1, num_peers - 1, batch, wanted / context)

    if not target.grows:
        return math.ceil(run.run.total_tokens / at(0))
    tokens, rounds = 0, 0
    while tokens < run.run.total_tokens:
        tokens, rounds = tokens + at(tokens), rounds + 1
    return rounds


def positions_bytes(run: RunFile) -> int:
    """Return the bytes of the built-in model's table of positions, of which each stage and rank has one."""
    return 4 * position_numbers(run.model)


def own_program_bytes(run: RunFile) -> int:
    """Return the bytes of a peer's program and its network daemon, with the libraries that the run's model needs."""
    return IMPORTS_BYTES + DAEMON_BYTES + _library_bytes(run)


def _library_bytes(run: RunFile) -> int:
    return 0 if run.model.is_built_in else _TRANSFORMERS_BYTES


def estimates_of(
    run: RunFile, num_parameters: int, *, microbatch_sequences: int = 0, recomputes: bool = False, num_ranks: int = 1
) -> Callable[[int], Estimate]:
    """Return `estimate` of this run as a cached function of the number of peers."""

    @functools.lru_cache(maxsize=8)
    def of(num_peers: int) -> Estimate:
        return estimate(
            run,
            num_parameters,
            num_peers,
            microbatch_sequences=microbatch_sequences,
            recomputes=recomputes,
            num_ranks=num_ranks,
        )

    return of


def merge_bytes(run: RunFile, num_parameters: int, others: int) -> tuple[int, int]:
    """Return (bytes sent per round, bytes held of what arrives and is being merged) with `others` other peers."""
    return costs_of(run).merge_bytes(run, num_parameters, others)


def _activations_bytes(run: RunFile, num_sequences: int, recomputes: bool, num_ranks: int) -> int:
    training = activation_bytes(run, num_sequences, run.model.num_layers, has_head=True, recomputes=recomputes)
    return max(num_ranks * training, _evaluation_bytes(run))


def activation_bytes(
    run: RunFile,
    num_sequences: int,
    num_layers: int,
    *,
    has_head: bool,
    recomputes: bool = False,
    on_card: bool = False,
) -> int:
    """Return the bytes of activations kept from the forward pass of `num_sequences` sequences until their backward.

    `recomputes` is whether blocks are computed again in the backward pass, because memory is short.
    """
    model, num_tokens = run.model, num_sequences * run.model.context_tokens
    width_bytes = 4 * num_tokens * model.width
    block_bytes = width_bytes * (ACTIVATION_WIDTHS + ACTIVATION_WIDTHS_PER_RATIO * model.feed_forward_ratio)
    head_bytes = _head_bytes(run, num_tokens, CARD_BYTES if on_card and not recomputes else SMALL_BYTES)
    blocks_bytes = num_layers * block_bytes
    if recomputes:  # one block's are there at a time, and its backward pass's; with few blocks that gains nothing
        blocks_bytes = min(blocks_bytes, num_layers * width_bytes + _IN_BACKWARD * block_bytes)
    # Where documents are kept apart, attention has a mask, one for all blocks.
    mask_bytes = 4 * num_tokens * model.context_tokens if run.data.packing == "documents" else 0
    return round(blocks_bytes + head_bytes * has_head + mask_bytes)


def _head_bytes(run: RunFile, num_tokens: int, chunk_bytes: int) -> int:
    """Return the bytes of the head's logits, and of its gradient if that is made in the forward pass."""
    model = run.model
    chunk = chunk_tokens(num_tokens, model.vocabulary_size, chunk_bytes)
    if chunk == num_tokens:
        return 4 * LOGITS_COPIES * model.vocabulary_size * num_tokens
    return 4 * model.vocabulary_size * (_CHUNK_COPIES * chunk + model.width)


def _evaluation_bytes(run: RunFile) -> int:
    """Return the bytes of the activations of `evaluation.batch_sequences` sequences whose loss is measured."""
    model, num_tokens = run.model, run.evaluation.batch_sequences * run.model.context_tokens
    widths = _FORWARD_WIDTHS + _FORWARD_WIDTHS_PER_RATIO * model.feed_forward_ratio
    logits = _CHUNK_COPIES * model.vocabulary_size * chunk_tokens(num_tokens, model.vocabulary_size, SMALL_BYTES)
    return round(4 * (num_tokens * model.width * widths + logits))


def disk_bytes(num_parameters: int) -> int:
    """Return the disk space for the kept checkpoints and the one being written."""
    return (KEPT + 1) * CHECKPOINT_BYTES_PER_PARAMETER * num_parameters


def activation_wire_bytes(run: RunFile) -> int:
    """Return the bytes of one microbatch's activations between two stages; its gradients back are as large."""
    from swarmtrain.algorithm.quantize import encoded_size_bytes

    numbers = run.microbatch_sequences * run.model.context_tokens * run.model.width
    return encoded_size_bytes(run.pipeline.activations, [numbers])

"""What a run costs each of its peers: arithmetic on the run file alone.

The constants were measured (2 cores, CPU torch): see the comments; `benchmarks/memory.py` holds memory and bytes
against real volunteers. Of bytes there are those of the merges in a round, and the most in a round: the same and a
state, which the archive or a late joiner takes. Presence records add a little.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

from swarmtrain.events import times_below_allreduce
from swarmtrain.peer.checkpoint_files import KEPT
from swarmtrain.protocol.pulls import LARGE_MODEL, SectionBytes, Wanted, gradient_format
from swarmtrain.run import RunFile

__all__ = [
    "Estimate",
    "activation_wire_bytes",
    "copies",
    "disk_bytes",
    "estimate",
    "estimates_of",
    "merge_bytes",
    "pulled_bytes",
    "section_bytes",
]

# Proportional set sizes: torch, hivemind and our own imports; the networking daemon.
IMPORTS_BYTES = 250_000_000
DAEMON_BYTES = 75_000_000
# fp32: weights, gradients, AdamW's two moments, outer weights, outer momentum, the last two publications, and the copy
# of the moments that a checkpoint is written from.
BYTES_PER_PARAMETER = 4 + 4 + 8 + 4 + 4 + 2 * 4 + 8
# Of a stage: two versions of the weights more, and a batch's gradients while the next one is summed.
STAGE_BYTES_PER_PARAMETER = BYTES_PER_PARAMETER + 3 * 4
CHECKPOINT_BYTES_PER_PARAMETER = 16  # weights, AdamW's two moments, the outer momentum
# Numbers kept for the backward pass per token and layer, in widths: measured 16.8 at ratio 2, 21.4 at ratio 4.
ACTIVATION_WIDTHS = 13
ACTIVATION_WIDTHS_PER_RATIO = 2
LOGITS_COPIES = 3
_MOST_FREE_BYTES = 120_000_000
"""Measured with 0.5, 10 and 57 million parameters: what the heap holds free stops growing with the model, whose large
vectors are mapped."""
_TALK_BYTES = 500_000
"""Presence, progress records, greetings and manifests of a round, as measured; a large model's are lost in the rest."""
_READ_SHARE = 2 / 3
"""Of a round, in which a state is read and let go, as measured where rounds last 20 s and more."""
_UNEVEN = 1.25
"""Others' rounds end when they end: in some of its own a peer sends so much of what it sends in the mean."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """The cost of a run for each of `num_peers` equal peers."""

    num_peers: int
    num_parameters: int
    tokens_per_step: int  # of one peer
    tokens_per_round: int  # of all peers
    num_rounds: int
    inner_steps_per_peer: int
    bytes_sent_per_round: int
    bytes_received_per_round: int
    state_bytes: int  # weights and momentum: what the archive or a late joiner takes of the peer it asks first
    bytes_sent_most_per_round: int  # merges that others end twice in this peer's round, and a state
    times_below_allreduce: float | None  # None for a peer alone
    memory_bytes: int  # program + parameters + activations
    memory_program_bytes: int
    memory_parameters_bytes: int
    memory_activations_bytes: int


def estimate(run: RunFile, num_parameters: int, num_peers: int) -> Estimate:
    """What each of `num_peers` (>= 1) peers trains, sends and holds in this run; in a pipeline, of one stage, as if all
    stages were alike, activations not counted."""
    stages = run.pipeline.stages
    if stages > 1:
        num_parameters, num_peers = math.ceil(num_parameters / stages), max(1, num_peers // stages)
    steps = math.ceil(run.run.total_tokens / (run.tokens_per_step * num_peers))
    sent, incoming = merge_bytes(run, num_parameters, num_peers - 1)
    if stages == 1 and run.merge.method == "gossip":
        parameters_bytes = math.ceil(sum(copies(run, num_parameters, num_peers - 1).values()) * num_parameters)
    else:
        parameters_bytes = (BYTES_PER_PARAMETER if stages == 1 else STAGE_BYTES_PER_PARAMETER) * num_parameters
        parameters_bytes += incoming
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
        + (0 if run.merge.method == "server" else 8 * num_parameters),
        times_below_allreduce=times_below_allreduce(num_parameters, run.merge.inner_steps, sent),
        memory_bytes=program_bytes + parameters_bytes + activations_bytes,
        memory_program_bytes=program_bytes,
        memory_parameters_bytes=parameters_bytes,
        memory_activations_bytes=activations_bytes,
    )


def estimates_of(run: RunFile, num_parameters: int) -> Callable[[int], Estimate]:
    """`estimate` of a run by the number of peers, reckoned once for each."""
    return functools.lru_cache(maxsize=8)(functools.partial(estimate, run, num_parameters))


def copies(run: RunFile, num_parameters: int, others: int) -> dict[str, float]:
    """What a volunteer that merges by gossip with so many others holds at its worst moment, in bytes a parameter."""
    merge, sizes = run.merge, section_bytes(run, num_parameters, others)
    partners, thetas = min(merge.num_partners, others), min(merge.num_weights, others)
    weights, gradient = sizes.weights / num_parameters, sizes.gradient / num_parameters
    fragment = 4 / merge.num_fragments
    fed_back = any(format in ("int4", "int2") for format in merge.gradient_formats)
    judged = merge.robust != "none" and others > 0
    decoded, prepared = 4.0 * (partners + thetas), 8.0
    if num_parameters >= LARGE_MODEL:  # one fragment after the other
        prepared = 2 * fragment
        if merge.robust in ("none", "clip", "direction"):  # other rules take them one by one at the merge
            decoded = 2 * fragment
    return {
        "the model's weights": 4,
        "their gradient, from a step's backward to its end": 4,
        "AdamW's two moments": 8,
        "weights after each fragment's last merge, and the outer momentum": 8,
        "the newest pseudo-gradient, which is published and compared with": 4,
        "the one before it, until the newest is made, fragment by fragment": fragment * judged,
        "what rounding has lost of pseudo-gradients, for the next ones": 2.0 * fed_back,
        "the same of the round under way": 2.0 * fed_back,
        "publications as they travel": (weights + gradient) * (others > 0),
        "partners' publications as they came, and the gradients merged last": 2 * partners * gradient
        + thetas * weights,
        "partners' publications decoded": decoded * (others > 0),
        "merges that are prepared": prepared * (others > 0),
        "what merges have replaced of a state that the archive or a joiner reads": _READ_SHARE * (8.0 - 2 * fragment),
        "what the heap holds free until the next checkpoint": min(6.0, _MOST_FREE_BYTES / num_parameters),
    }


def section_bytes(
    run: RunFile, num_parameters: int, others: int, round_s: float = math.inf, bytes_per_s: float = math.inf
) -> SectionBytes:
    """A publication of so many parameters as it travels among so many others, in rounds that last so long, over links
    that carry so much."""
    from swarmtrain.algorithm.quantize import encoded_size_bytes  # torch takes a second: not before a file is read

    merge = run.merge
    theta = encoded_size_bytes(merge.theta_format, [num_parameters])
    sizes = {one: SectionBytes(theta, encoded_size_bytes(one, [num_parameters])) for one in merge.gradient_formats}
    return sizes[gradient_format(sizes, others, round_s, bytes_per_s, Wanted(merge.num_partners, merge.num_weights))]


def pulled_bytes(run: RunFile, sizes: SectionBytes, others: int) -> int:
    """What a round of gossip pulls of so many others, where links carry it."""
    merge = run.merge
    return min(merge.num_partners, others) * sizes.gradient + min(merge.num_weights, others) * sizes.weights


def merge_bytes(run: RunFile, num_parameters: int, others: int) -> tuple[int, int]:
    """With so many others: (bytes sent in a round, bytes held of what arrives and is being merged)."""
    merge, gradient_bytes, sizes = run.merge, 4 * num_parameters, section_bytes(run, num_parameters, others)
    if merge.method == "gossip":
        num, sent = min(merge.num_partners, others), pulled_bytes(run, sizes, others)
        num += min(merge.num_weights, others)
        # of each the bytes and the decoded vector; the prepared merge; the bytes of parts that may go on
        pieces = merge.num_fragments
        whole = 2 * gradient_bytes if pieces > 1 else 0  # weights and momentum as a joiner takes them
        return sent, 2 * sent + (num + 2) * gradient_bytes // pieces + whole
    if merge.method == "server":  # its gradient, to the server; of the server its weights, and what is not in them
        return sizes.gradient, sizes.both + 3 * gradient_bytes
    if others + 1 <= merge.share_above:
        return gradient_bytes * others, gradient_bytes * others  # the whole pseudo-gradient, to each
    # as an all-reduce: scatter the shares, gather the results
    return 2 * gradient_bytes * others // (others + 1), 2 * gradient_bytes


def _activations_bytes(run: RunFile) -> int:
    sequences = max(run.microbatch_sequences, run.evaluation.batch_sequences // 4)
    return activation_bytes(run, sequences, run.model.num_layers, has_head=True)


def activation_bytes(run: RunFile, num_sequences: int, num_layers: int, *, has_head: bool) -> int:
    """What is kept of so many sequences' forward through so many layers until their backward."""
    model = run.model
    widths = ACTIVATION_WIDTHS + ACTIVATION_WIDTHS_PER_RATIO * model.feed_forward_ratio
    numbers = num_layers * model.width * widths + LOGITS_COPIES * model.vocabulary_size * has_head
    return round(4 * num_sequences * model.context_tokens * numbers)


def disk_bytes(num_parameters: int) -> int:
    """Room for the checkpoints that are kept and the one that is being written."""
    return (KEPT + 1) * CHECKPOINT_BYTES_PER_PARAMETER * num_parameters


def activation_wire_bytes(run: RunFile) -> int:
    """What travels of one microbatch from one stage to the next, and as gradients back."""
    from swarmtrain.algorithm.quantize import encoded_size_bytes

    numbers = run.microbatch_sequences * run.model.context_tokens * run.model.width
    return encoded_size_bytes(run.pipeline.activations, [numbers])

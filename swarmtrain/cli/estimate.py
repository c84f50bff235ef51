"""What a run will cost each peer, and what is doubtful about it: arithmetic on the run file alone.

The constants were measured (2 cores, CPU torch): see the comments. Bytes sent count the payload of the merges;
presence records and late joiners add a little.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from swarmtrain.events import count_in_words, size_in_words, times_below_allreduce
from swarmtrain.run import RunFile

__all__ = ["Estimate", "doubts", "estimate"]

# Proportional set sizes: torch, hivemind and our own imports; the networking daemon.
IMPORTS_BYTES = 240_000_000
DAEMON_BYTES = 60_000_000
# fp32: weights, gradients, AdamW's two moments, outer weights, outer momentum, the last two publications.
BYTES_PER_PARAMETER = 4 + 4 + 8 + 4 + 4 + 2 * 4
# Numbers kept for the backward pass per token and layer, in widths: measured 16.8 at ratio 2, 21.4 at ratio 4.
ACTIVATION_WIDTHS = 13
ACTIVATION_WIDTHS_PER_RATIO = 2
LOGITS_COPIES = 3


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
    times_below_allreduce: float | None  # None for a peer alone
    memory_bytes: int  # program + parameters + activations
    memory_program_bytes: int
    memory_parameters_bytes: int
    memory_activations_bytes: int


def estimate(run: RunFile, num_parameters: int, num_peers: int) -> Estimate:
    """What each of `num_peers` (>= 1) peers trains, sends and holds in this run."""
    steps = math.ceil(run.run.total_tokens / (run.tokens_per_step * num_peers))
    gradient_bytes, others = 4 * num_parameters, num_peers - 1
    if num_peers <= run.merge.share_above:
        sent = gradient_bytes * others  # the whole pseudo-gradient, to each
        incoming = gradient_bytes * others
    else:
        sent = 2 * gradient_bytes * others // num_peers  # as an all-reduce: scatter the shares, gather the results
        incoming = 2 * gradient_bytes
    parameters_bytes = BYTES_PER_PARAMETER * num_parameters + incoming
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
        times_below_allreduce=times_below_allreduce(num_parameters, run.merge.inner_steps, sent),
        memory_bytes=program_bytes + parameters_bytes + activations_bytes,
        memory_program_bytes=program_bytes,
        memory_parameters_bytes=parameters_bytes,
        memory_activations_bytes=activations_bytes,
    )


def _activations_bytes(run: RunFile) -> int:
    model = run.model
    sequences = max(run.inner.microbatch_sequences or run.inner.batch_sequences, run.evaluation.batch_sequences // 4)
    widths = ACTIVATION_WIDTHS + ACTIVATION_WIDTHS_PER_RATIO * model.feed_forward_ratio
    numbers = model.num_layers * model.width * widths + LOGITS_COPIES * model.vocabulary_size
    return round(4 * sequences * model.context_tokens * numbers)


def doubts(run: RunFile, cost: Estimate, corpus_bytes: int | None, machine_bytes: int | None) -> tuple[str, ...]:
    """What is allowed but may not be meant, a sentence each. `None` for what is not known here."""
    return (*_schedule_doubts(run, cost), *_data_doubts(run, corpus_bytes), *_machine_doubts(run, cost, machine_bytes))


def _schedule_doubts(run: RunFile, cost: Estimate) -> list[str]:
    found = []
    merge, inner = run.merge, run.inner
    warmup_rounds = inner.warmup_fraction * run.run.total_tokens / cost.tokens_per_round
    if cost.num_rounds < 20:
        found.append(
            f"only {cost.num_rounds} rounds with {cost.num_peers} peers: they average each other's work few times; "
            f"lower merge.inner_steps = {merge.inner_steps} or raise run.total_tokens"
        )
    if 0 < warmup_rounds < 1:
        found.append(
            f"the warm-up (inner.warmup_fraction = {inner.warmup_fraction}) ends within the first round, after "
            f"{warmup_rounds:.2g} of it"
        )
    if merge.outer_momentum >= 0.9 and not merge.momentum_ramp_rounds and cost.num_rounds < 100:
        found.append(
            f"merge.outer_momentum = {merge.outer_momentum} from the first round on, in a run of {cost.num_rounds} "
            "rounds: from fresh weights that was no better than one peer alone; set merge.momentum_ramp_rounds"
        )
    if merge.momentum_ramp_rounds > cost.num_rounds:
        found.append(
            f"merge.momentum_ramp_rounds = {merge.momentum_ramp_rounds} is longer than the run's {cost.num_rounds} "
            f"rounds with {cost.num_peers} peers"
        )
    if cost.num_peers < merge.min_peers:
        found.append(f"round 0 begins with merge.min_peers = {merge.min_peers} peers; {cost.num_peers} assumed")
    if inner.batch_sequences > 1 and inner.batch_sequences % 2:
        found.append(
            f"inner.batch_sequences = {inner.batch_sequences} is odd: a peer short of memory cannot halve it into "
            "equal microbatches"
        )
    return found


def _data_doubts(run: RunFile, corpus_bytes: int | None) -> list[str]:
    found = []
    held_out, context = run.data.held_out_bytes, run.model.context_tokens
    if held_out < max(32_768, 16 * context):
        found.append(
            f"data.held_out_bytes = {held_out} is small: the held-out loss will be noisy; {max(32_768, 16 * context)} "
            "or more is better"
        )
    if corpus_bytes is None:
        return found
    if corpus_bytes < 10 * held_out:
        found.append(
            f"the corpus here has {size_in_words(corpus_bytes)}, less than ten times data.held_out_bytes = {held_out}: "
            "little is left to train on"
        )
    elif run.model.tokenizer == "bytes" and (passes := run.run.total_tokens / corpus_bytes) > 8:
        found.append(
            f"the corpus here has {size_in_words(corpus_bytes)} and the run {count_in_words(run.run.total_tokens)} "
            f"tokens: each byte is read {passes:.0f} times, and the model will learn it by heart"
        )
    return found


def _machine_doubts(run: RunFile, cost: Estimate, machine_bytes: int | None) -> list[str]:
    if machine_bytes is None or cost.memory_bytes <= machine_bytes:
        return []
    return [
        f"a peer needs about {size_in_words(cost.memory_bytes)}, this machine has {size_in_words(machine_bytes)}: "
        f"lower inner.microbatch_sequences, or make the model smaller"
    ]

"""Warnings about a run: what is allowed, but perhaps not meant. Its costs are in `peer/estimate.py`."""

from __future__ import annotations

from collections.abc import Sequence

from swarmtrain.machine_memory import Memory
from swarmtrain.peer.estimate import Estimate
from swarmtrain.run import RunFile
from swarmtrain.words import count_in_words, counted, size_in_words


def doubts(run: RunFile, cost: Estimate, corpus_bytes: Sequence[int | None], memory: Memory | None) -> tuple[str, ...]:
    """List what is allowed but may not be meant, one sentence each, given the bytes of each source's text and the
    memory here. `None`: not known here."""
    return (*_schedule_doubts(run, cost), *_data_doubts(run, corpus_bytes), *_memory_doubts(run, cost, memory))


def _schedule_doubts(run: RunFile, cost: Estimate) -> list[str]:
    found = []
    merge, inner = run.merge, run.inner
    warmup_rounds = inner.warmup_fraction * run.run.total_tokens / cost.tokens_per_round
    if cost.num_rounds < 20:
        what, few = counted(cost.num_rounds, "round"), "they average each other's work few times"
        lower = f"merge.inner_steps = {merge.inner_steps}"
        if merge.kind.common_step:
            what, few = counted(cost.num_rounds, "step"), "large batches need some too"
            if isinstance(merge.target_tokens, int) and merge.target_tokens:  # inner_steps follows from it
                lower = f"merge.target_tokens = {merge.target_tokens}"
        found.append(
            f"only {what} with {counted(cost.num_peers, 'peer')}: {few}; lower {lower} or raise run.total_tokens"
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
            f"merge.momentum_ramp_rounds = {merge.momentum_ramp_rounds} is longer than the run's "
            f"{counted(cost.num_rounds, 'round')} with {counted(cost.num_peers, 'peer')}"
        )
    if cost.num_peers < merge.min_peers:
        found.append(f"round 0 begins with merge.min_peers = {merge.min_peers} peers; {cost.num_peers} assumed")
    if run.pipeline.stages > 1 and not run.pipeline.in_flight and run.batch_microbatches < 4 * run.pipeline.stages:
        found.append(
            f"a batch is {counted(run.batch_microbatches, 'microbatch', 'microbatches')}, and drivers have a quarter "
            f"of that under way for each peer of a stage: too few to keep {run.pipeline.stages} stages busy; lower "
            f"inner.microbatch_sequences = {run.microbatch_sequences} or raise "
            f"inner.batch_sequences = {inner.batch_sequences}"
        )
    if inner.batch_sequences > 1 and inner.batch_sequences % 2:
        found.append(
            f"inner.batch_sequences = {inner.batch_sequences} is odd: a peer short of memory cannot halve it into "
            "equal microbatches"
        )
    return found


def _data_doubts(run: RunFile, corpus_bytes: Sequence[int | None]) -> list[str]:
    found = []
    held_out, context = run.data.held_out_bytes, run.model.context_tokens
    if all(corpus_bytes):
        held_out = min(held_out, sum(size or 0 for size in corpus_bytes) // 8)  # as `cut_held_out` does
    number = run.model.vocabulary_size
    if run.model.tokenizer == "bytes" and number > 256 and not run.model.from_scratch:
        found.append(
            f'model.tokenizer = "bytes" with the weights of a model of {number} tokens: its tokens 0 to 255 mean other '
            "text, unless it was trained on bytes; leave model.tokenizer out for the model's own"
        )
    if held_out < max(32_768, 16 * context):
        found.append(
            f"{held_out} bytes of held-out text are few: the held-out loss will be noisy; {max(32_768, 16 * context)} "
            "or more are better, so raise data.held_out_bytes, or give eight times as much text"
        )
    for source, share, size in zip(run.data.mixture, run.data.shares, corpus_bytes, strict=True):
        tokens = run.run.total_tokens * share
        if not size or run.model.tokenizer != "bytes" or (passes := tokens / size) <= 8:
            continue
        what = f"source {source.name}" if source.name else "the corpus"
        of_run = (
            f"the run takes {count_in_words(tokens)} tokens of it"
            if source.name
            else f"the run {count_in_words(tokens)} tokens"
        )
        found.append(
            f"{what} here has {size_in_words(size)} and {of_run}: each byte is read {passes:.0f} times, and the model "
            "will learn it by heart"
        )
    return found


def _memory_doubts(run: RunFile, cost: Estimate, memory: Memory | None) -> list[str]:
    if memory is None or cost.memory_bytes <= memory.total_bytes:
        return []
    has = f"{memory.limited_by} has {size_in_words(memory.total_bytes)}"
    return [
        f"a peer needs about {size_in_words(cost.memory_bytes)} with {counted(cost.num_peers, 'peer')}, {has}: lower "
        "inner.microbatch_sequences, or make the model smaller"
    ]

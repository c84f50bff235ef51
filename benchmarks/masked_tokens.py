"""Measure what tokens that are no targets cost, and keeping documents apart: the processor time of a gradient.

    python benchmarks/masked_tokens.py [--threads 1] [--repeats 7]

A model with a vocabulary of 32,000 computes loss and gradient of one batch, in which all tokens are targets, some, or
none; then of batches whose sequences have several documents. Medians, the kinds in turn. Processor time, because other
programs of the machine count less in it.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch import Tensor

from swarmtrain.algorithm.batch import compacted, join_rows
from swarmtrain.model.gpt import build_model
from swarmtrain.run import ModelSection

SECTION = ModelSection(
    tokenizer="bpe", vocabulary_size=32_000, context_tokens=512, num_layers=6, width=256, num_heads=4
)
SEQUENCES = 4
SHARES = (1.0, 0.5, 0.25, 0.1, 0.0)
DOCUMENT_TOKENS = (512, 128, 32)


def batches() -> dict[str, Tensor]:
    """Return batches by what is special about them."""
    generator = torch.Generator().manual_seed(0)
    shape = (SEQUENCES, SECTION.context_tokens + 1)
    tokens, chance = torch.randint(32_000, shape, generator=generator), torch.rand(shape, generator=generator)
    found = {f"{share:.0%} targets": join_rows(tokens, chance < share) for share in SHARES}
    places = torch.arange(shape[1]).expand(shape)
    return found | {f"documents of {size}": join_rows(tokens, None, places % size) for size in DOCUMENT_TOKENS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model, kinds = build_model(SECTION, 0), batches()
    times_s: dict[str, list[float]] = {name: [] for name in kinds}
    for repeat in range(options.repeats + 1):
        for name, batch in kinds.items():
            began_s = time.process_time()
            model.loss(compacted(batch)).backward()  # type: ignore[no-untyped-call]
            model.zero_grad()
            if repeat:  # the first one fetches memory
                times_s[name].append(time.process_time() - began_s)
    medians = {name: statistics.median(each) for name, each in times_s.items()}
    whole, none = medians["100% targets"], medians["0% targets"]
    print(f"{SEQUENCES} x {SECTION.context_tokens} tokens, {options.threads} thread(s), {options.repeats} times")
    print(f"without any target {none / whole:.3f} of the time, so the head takes {1 - none / whole:.3f}")
    for share in SHARES[1:-1]:
        found = medians[f"{share:.0%} targets"]
        of_head = (found - none) / (whole - none)
        print(f"{share:.0%} targets: {found / whole:.3f} of the time, {of_head:.3f} of the head's")
    for size in DOCUMENT_TOKENS:
        print(f"documents of {size} tokens: {medians[f'documents of {size}'] / whole:.3f} of the time")


if __name__ == "__main__":
    main()

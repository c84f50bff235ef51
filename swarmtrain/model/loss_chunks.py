"""How many tokens' logits exist at once while a loss is computed: all of a microbatch, or a chunk of them.

The head's whole gradient, of V D numbers, is read and written once a chunk, so chunks must have enough tokens.
"""

from __future__ import annotations

import math

SMALL_BYTES = 30 << 20
"""Most bytes of fp32 logits at once on a processor that computes in fp32, and wherever memory is short.

Measured with vocabularies of 25,600 and 50,000, and one thread: loss and gradient take 0.91 to 0.98 of the time that
they take from all logits at once; with half of these bytes up to 1.1. A larger piece of memory does not stay in glibc's
heap, and would be fetched from the system each time.
"""
LOW_PRECISION_BYTES = 4 * SMALL_BYTES
"""The same on a processor that computes in bf16: the gradient is added up in fp32, by a pass of its own. Measured for
the head alone: 1.05 of the time; with half of these bytes 1.13."""
CARD_BYTES = 1 << 30
"""The same on a card, which computes faster by more than it reads faster. Computed, not measured: 2 % of a step."""
_LEAST_TOKENS = 128


def chunk_tokens(num_tokens: int, vocabulary_size: int, most_bytes: int) -> int:
    """Return how many of `num_tokens` tokens have logits at once: all of them if those are few bytes, else equal
    parts."""
    if 4 * vocabulary_size * num_tokens <= most_bytes:  # 0 too
        return num_tokens
    most = max(_LEAST_TOKENS, most_bytes // (4 * vocabulary_size))
    return math.ceil(num_tokens / math.ceil(num_tokens / most))

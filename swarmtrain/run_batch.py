"""Size of one large batch, `merge.target_tokens`: a number, or one that grows with the run.

A batch that grows follows from the run's tokens before it and from nothing else. All who applied the same rosters have
these, so all want the same batch, and who joins late has it from its snapshot.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal, TypeAlias

from pydantic import BeforeValidator

from swarmtrain.problems import shown

_MOST_TOKENS = 10**12
TARGETS = f'an integer from 0 to {_MOST_TOKENS}, or "auto"'
"""Values of `merge.target_tokens`, in words."""


def _target_of(given: object) -> object:
    tokens = int(given) if isinstance(given, float) and given.is_integer() else given
    if tokens == "auto" or (type(tokens) is int and 0 <= tokens <= _MOST_TOKENS):
        return tokens
    raise ValueError(f"{shown(given)} is refused; allowed: {TARGETS}")


TargetTokens: TypeAlias = Annotated[int | Literal["auto"], BeforeValidator(_target_of)]
"""Type of `merge.target_tokens`; another value is refused in one sentence."""

GROWTH = 0.02
"""Size of a batch that grows, as a share of the run's tokens before it; chosen in docs/results/large-batch.md."""


@dataclass(frozen=True)
class BatchTarget:
    """Size of each large batch of a run, in tokens: `first_tokens`, or if `grows` at least so many."""

    first_tokens: int
    total_tokens: int
    """Tokens of the whole run."""
    grows: bool = False

    def at(self, run_tokens: int) -> int:
        """Return the tokens of the batch that begins when the run has had `run_tokens`.

        One that grows is no larger than what is left of the run, but never smaller than the first.
        """
        if not self.grows:
            return self.first_tokens
        left = self.total_tokens - run_tokens
        return max(self.first_tokens, min(math.ceil(GROWTH * run_tokens), left))

    @property
    def most_tokens(self) -> int:
        """Tokens that no batch of the run exceeds."""
        if not self.grows:
            return self.first_tokens
        return max(self.first_tokens, math.ceil(GROWTH / (1 + GROWTH) * self.total_tokens))

    @property
    def mean_tokens(self) -> float:
        """Mean size of the run's batches."""
        return self.total_tokens / self.num_steps if self.grows else self.first_tokens

    @property
    def num_steps(self) -> int:
        """Steps of the whole run, if every batch has its size."""
        if not self.grows:
            return math.ceil(self.total_tokens / self.first_tokens)
        even_tokens = min(self.total_tokens, self.first_tokens / GROWTH)  # until it grows
        return math.ceil(
            even_tokens / self.first_tokens + math.log(self.total_tokens / even_tokens) / math.log1p(GROWTH)
        )

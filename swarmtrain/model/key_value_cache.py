"""Keep the keys and values of tokens that a model has read, so that the next token is computed alone.

Shapes: B batch, T new tokens, S tokens read with them, H heads, K head width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class KeyValueCache:
    """Keys and values of each block of a model, for one sequence or a batch of equal length."""

    def __init__(self) -> None:
        self.num_tokens = 0
        """Tokens read so far."""
        self.tokens: Tensor | None = None
        """The tokens (1, S) themselves, where a model keeps nothing else of them."""
        self.of_library: Any = None
        """Cache of a model of another library, which keeps its own."""
        self._blocks: list[Tensor] = []

    def extend(self, block: int, keys_values: Tensor) -> Tensor:
        """Append the new tokens' keys and values (2, B, H, T, K) in this block, counted from 0; return all of them,
        (2, B, H, S, K)."""
        if block == len(self._blocks):
            self._blocks.append(keys_values)
        else:
            self._blocks[block] = torch.cat([self._blocks[block], keys_values], dim=-2)
        return self._blocks[block]

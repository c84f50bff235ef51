"""Layout of a batch: what a model reads, what it must predict, and where its documents begin.

A batch is one int64 tensor, so that it is drawn ahead, pinned, sent to ranks and cut by sequences as one. Its rows:

    (B, T + 1)       tokens, of which each but the first is a target
    (B, 2, T + 1)    tokens; labels, the token itself where it is a target, else `IGNORED`
    (B, 3, T + 1)    tokens; labels; positions of the tokens in their documents, each of which begins with 0

Without positions a sequence is one document. The loss of a batch is the sum over its targets divided by their number.

Shapes: B sequences, T context tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

IGNORED = -100
"""Label of a token that is no target: the number that torch's cross entropy ignores."""


def inputs_of(batch: Tensor) -> Tensor:
    """Return the tokens (B, T) that a model reads."""
    return batch[:, :-1] if batch.dim() == 2 else batch[:, 0, :-1]


def targets_of(batch: Tensor) -> Tensor:
    """Return the token (B, T) to predict from each input; `IGNORED` where there is none."""
    return batch[:, 1:] if batch.dim() == 2 else batch[:, 1, 1:]


def positions_of(batch: Tensor) -> Tensor | None:
    """Return the position (B, T) of each input in its document; None if each sequence is one document."""
    return batch[:, 2, :-1] if num_rows(batch) > 2 else None


def num_rows(batch: Tensor) -> int:
    """Return how many rows a sequence has: 1, 2 or 3."""
    return 1 if batch.dim() == 2 else batch.shape[1]


def num_targets(batch: Tensor) -> int:
    """Return the number of tokens to predict. It reads the tensor, so give it one in main memory."""
    targets = targets_of(batch)
    return targets.numel() if batch.dim() == 2 else int(torch.count_nonzero(targets != IGNORED))


def join_rows(tokens: Any, is_target: Any = None, positions: Any = None) -> Tensor:
    """Return the batch of tokens (B, T + 1), of which those where `is_target` is true are targets; default: all.

    `positions` are those in the documents; default: each sequence is one document. All are integers of any type, as
    tensors or as numpy arrays.
    """
    rows = [torch.as_tensor(tokens).to(torch.int64)]
    if is_target is None and positions is None:
        return rows[0]
    wanted = torch.ones_like(rows[0]) if is_target is None else torch.as_tensor(is_target)
    rows.append(torch.where(wanted.bool(), rows[0], IGNORED))
    if positions is not None:
        rows.append(torch.as_tensor(positions).to(torch.int64))
    return torch.stack(rows, dim=1)


def compacted(batch: Tensor) -> Tensor:
    """Return the batch without rows that say nothing: positions that only count up, then labels of which all are
    targets. It reads the tensor, so give it one in main memory."""
    positions = positions_of(batch)
    if positions is not None and torch.equal(positions, torch.arange(positions.shape[1]).expand_as(positions)):
        batch = batch[:, :2]
    if num_rows(batch) == 2 and num_targets(batch) == inputs_of(batch).numel():
        return batch[:, 0]
    return batch


def with_rows(batch: Tensor, number: int) -> Tensor:
    """Return the same batch with `number` rows, at least as many as it has. Nothing is read from its device."""
    missing = number - num_rows(batch)
    if missing == 0:
        return batch
    rows = [batch, batch] if batch.dim() == 2 else list(batch.unbind(1))
    if number == 3:
        rows.append(torch.arange(batch.shape[-1], device=batch.device).expand_as(rows[0]))
    return torch.stack(rows, dim=1)

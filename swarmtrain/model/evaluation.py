"""Loss of a model on a text that it was not trained on, in the units in which it is told."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from swarmtrain.algorithm.batch import compacted, num_targets
from swarmtrain.model.language_model import LanguageModel


@torch.inference_mode()
def evaluate(model: LanguageModel, batches: Iterable[Tensor]) -> tuple[float, int]:
    """Return (sum of nats, number of targets) over batches in main memory.

    With one byte per token, their quotient is the held-out loss.
    """
    sum_nats, number = 0.0, 0
    for batch in batches:
        sum_nats += float(model.sum_of_losses(compacted(batch).to(model.device)))
        number += num_targets(batch)
    return sum_nats, number


@dataclass(frozen=True)
class TextLoss:
    """Loss on a text of which each byte is in exactly one target token (`held_out_batches`)."""

    sum_nats: float
    num_tokens: int
    num_bytes: int
    by_source: Mapping[str, TextLoss] = field(default_factory=dict)
    """Loss on the part of each of several sources, by name; empty for a text of one source."""

    @classmethod
    def of_parts(cls, parts: Mapping[str, TextLoss]) -> TextLoss:
        """Return the loss on the parts of a text together, given each part's by the name of its source. The part of a
        source without a name, "", is the whole text."""
        if "" in parts:
            return parts[""]
        losses = parts.values()
        nats, tokens = math.fsum(each.sum_nats for each in losses), sum(each.num_tokens for each in losses)
        return cls(nats, tokens, sum(each.num_bytes for each in losses), dict(parts))

    @property
    def source_losses(self) -> tuple[float, ...]:
        """Losses of `by_source`, in nats per byte."""
        return tuple(loss.nats_per_byte for loss in self.by_source.values())

    @property
    def is_finite(self) -> bool:
        """Whether the loss is a number that events can tell: it is not if training has diverged."""
        return math.isfinite(self.sum_nats)

    @property
    def nats_per_byte(self) -> float:
        """Held-out loss as the run reports it."""
        return self.sum_nats / self.num_bytes

    @property
    def bits_per_byte(self) -> float:
        """Held-out loss in bits per byte, which does not depend on the tokenizer: models with different ones compare by
        it."""
        return self.nats_per_byte / math.log(2)

    @property
    def perplexity(self) -> float | None:
        """exp(nats per token): the number of equally likely tokens among which the next one is guessed.

        None if a float cannot hold it, or the loss is not finite, since events hold finite numbers only.
        """
        try:
            return math.exp(self.sum_nats / self.num_tokens) if self.is_finite else None
        except OverflowError:
            return None

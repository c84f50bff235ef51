"""Base class of the models that are trained: what the rest of the package asks of one, whatever it is made of.

A model is a torch module whose parameters have names; peers publish, merge and checkpoint them in their order. Its loss
is computed by its head in chunks (`head_loss.py`), so that all logits need not exist at once.

Shapes: B batch, T time (tokens), D width, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from swarmtrain.algorithm.batch import inputs_of, positions_of, targets_of
from swarmtrain.model.head_loss import mean_loss, only_targets, sum_of_losses
from swarmtrain.model.key_value_cache import KeyValueCache
from swarmtrain.run_adapter import AdapterSection
from swarmtrain.run_model import ModelSection

if TYPE_CHECKING:
    from swarmtrain.model.adapter import LoraAdapter


@dataclass(frozen=True)
class ModelSpec:
    """What a whole model is built from (`run_model.py`), in a form that a peer's other processes can be told."""

    section: ModelSection
    files: Path | None = None
    """Folder of the run's pinned model files; None for a built-in model."""
    adapter: AdapterSection = field(default_factory=AdapterSection)
    """Adapter that is trained in place of the model's own weights, if there is one."""


class LanguageModel(nn.Module, ABC):
    """Whole causal language model: from tokens to the logits of each next one."""

    head: nn.Linear
    """Last layer, from features to logits."""
    blocks: Iterable[nn.Module]
    """Its blocks in their order, each from (B, T, D) to (B, T, D)."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        self.recomputes_blocks = False
        """True where memory is short: of the blocks only inputs are kept for the backward pass, which computes each
        block again, to the same bits."""

    @property
    def section(self) -> ModelSection:
        """Section of the run file that describes the model."""
        return self.spec.section

    @property
    def vocabulary_size(self) -> int:
        """Number of distinct tokens."""
        return self.section.vocabulary_size

    @property
    def context_tokens(self) -> int:
        """Longest sequence, in tokens."""
        return self.section.context_tokens

    @property
    def keeps_documents_apart(self) -> bool:
        """Whether tokens see only their own document where `features` is given positions, with this machine's
        libraries."""
        return True

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return next(self.parameters()).device

    adapter: LoraAdapter | None = None
    """Adapter in the model, which alone is trained; None if all weights are."""

    def trained_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Return the tensors that are trained and published, by name, in the order in which they are flattened."""
        return list(self.named_parameters()) if self.adapter is None else self.adapter.named()

    def trained_tensors(self) -> list[nn.Parameter]:
        """Return the tensors that are trained and published, in the order in which they are flattened."""
        return [tensor for _, tensor in self.trained_parameters()]

    @abstractmethod
    def features(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        """Return the head's input (B, T, D) of tokens (B, T), int64.

        With `positions` (B, T) in their documents, each of which begins with 0, tokens see only their own document;
        without, a sequence is one document. Raises ValueError if T is more than `context_tokens`.
        """

    def forward(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        """Return logits (B, T, V) of tokens (B, T), int64; see `features`."""
        return cast(Tensor, self.head(self.features(tokens, positions)))

    def next_logits(self, tokens: Tensor, cache: KeyValueCache) -> Tensor:
        """Return the logits (V,) of the next token after `tokens` (1, T), int64, which follow those in `cache`, and
        add them to it.

        After others they are given one by one. Raises ValueError if all are more than `context_tokens`.
        """
        cache.tokens = tokens if cache.tokens is None else torch.cat([cache.tokens, tokens], dim=1)
        cache.num_tokens += tokens.shape[1]
        return cast(Tensor, self.head(self.features(cache.tokens)[0, -1]))

    def loss(self, batch: Tensor) -> Tensor:
        """Return mean nats per target of `batch` (see `algorithm/batch.py`), a scalar; 0 if it has none."""
        return self.loss_of_features(self.features(inputs_of(batch), positions_of(batch)), batch)

    def loss_of_features(self, x: Tensor, batch: Tensor) -> Tensor:
        """Return the loss of `batch`, given the features x (B, T, D) of its inputs."""
        return mean_loss(self.head, *with_targets(x, batch), is_memory_short=self.recomputes_blocks)

    def sum_of_losses(self, batch: Tensor) -> Tensor:
        """Return the sum of nats over the targets of `batch`, a scalar without a gradient."""
        x = self.features(inputs_of(batch), positions_of(batch))
        return sum_of_losses(self.head, *with_targets(x, batch))


def with_targets(x: Tensor, batch: Tensor) -> tuple[Tensor, Tensor]:
    """Return the features x (B, T, D) that have a target, and their targets; all of them of a batch without labels."""
    targets = targets_of(batch)
    return (x, targets) if batch.dim() == 2 else only_targets(x, targets)


def check_length(num_tokens: int, context_tokens: int) -> None:
    """Raise ValueError when the tokens are more than the context."""
    if num_tokens > context_tokens:
        raise ValueError(f"{num_tokens} tokens are more than the context of {context_tokens}")

"""Cut the built-in model into stages, each built from the run's seed without the whole model existing anywhere.

A model of L blocks can be cut at L + 1 places: before each block, and before the head. `boundaries` are the places of a
run's cuts, ascending: stage s holds the blocks from boundary s - 1 up to boundary s. The first stage holds the
embedding too, the last one the final norm and the head. Boundary 0 leaves only the embedding in the first stage,
boundary L only the norm and the head in the last.

A stage's parameters have the names that they have in the whole model. So initial weights are the same bits however it
is cut, and stages joined by name are the model.

Shapes: B batch, T time (tokens), D width, V vocabulary.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from swarmtrain.model.gpt import NORM_EPSILON, Block, Embedding, Linear, initial_weight, rotary_table
from swarmtrain.model.head_loss import mean_loss
from swarmtrain.model.language_model import check_length
from swarmtrain.model.parameter_count import block_parameters
from swarmtrain.run_model import ModelSection


@dataclass(frozen=True, kw_only=True)
class StageShape:
    """Part of a model that a stage holds."""

    model: ModelSection
    first_block: int
    last_block: int
    """Exclusive."""
    has_embedding: bool
    has_head: bool

    @property
    def num_parameters(self) -> int:
        """Number of parameters, computed without building the stage."""
        table = self.model.vocabulary_size * self.model.width
        blocks = (self.last_block - self.first_block) * block_parameters(self.model)
        return blocks + table * self.has_embedding + (table + self.model.width) * self.has_head


def stage_shapes(model: ModelSection, boundaries: Sequence[int]) -> list[StageShape]:
    """Return the stages of a model cut at `boundaries`; one if there are none. Raises ValueError for an
    impossible cut."""
    places = [0, *boundaries, model.num_layers]
    if list(boundaries) != sorted(set(boundaries)) or not all(0 <= place <= model.num_layers for place in boundaries):
        raise ValueError(
            f"boundaries must ascend from 0 to {model.num_layers} (the number of blocks) at most, "
            f"got {list(boundaries)}"
        )
    last = len(places) - 2
    return [
        StageShape(model=model, first_block=a, last_block=b, has_embedding=number == 0, has_head=number == last)
        for number, (a, b) in enumerate(itertools.pairwise(places))
    ]


class Stage(nn.Module):
    """Part of a GPT. `build_stage` builds it; the constructor alone leaves weights uninitialised."""

    rotary: Tensor

    def __init__(self, shape: StageShape) -> None:
        super().__init__()
        self.shape, section = shape, shape.model
        if shape.has_embedding:
            self.embed = Embedding(section.vocabulary_size, section.width)
        self.blocks = nn.ModuleDict({str(n): Block(section) for n in range(shape.first_block, shape.last_block)})
        if shape.has_head:
            self.final_norm = nn.RMSNorm(section.width, eps=NORM_EPSILON)
            self.head = Linear(section.width, section.vocabulary_size, bias=False)
        table = rotary_table(section.context_tokens, section.width // section.num_heads)
        self.register_buffer("rotary", table, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the next stage's input (B, T, D), or the last stage's logits (B, T, V).

        `x` is tokens (B, T), int64, for the first stage, else the output of the stage before, (B, T, D). Raises
        ValueError when it is longer than the context.
        """
        x = self._features(x)
        return cast(Tensor, self.head(x)) if self.shape.has_head else x

    def loss(self, x: Tensor, targets: Tensor) -> Tensor:
        """Return the last stage's loss: mean nats per token, a scalar, of predicting targets (B, T), int64."""
        return mean_loss(self.head, self._features(x), targets)

    def _features(self, x: Tensor) -> Tensor:
        """Return the head's input, or in other stages the next stage's (B, T, D)."""
        T = x.shape[1]
        check_length(T, self.shape.model.context_tokens)
        if self.shape.has_embedding:
            x = self.embed(x)
        rotary = self.rotary[:, :T]
        for block in self.blocks.values():
            x = block(x, rotary)
        return cast(Tensor, self.final_norm(x)) if self.shape.has_head else x


def build_stage(shape: StageShape, seed: int) -> Stage:
    """Return a stage on the processor, fp32, with the initial weights that its parameters have in the whole model."""
    stage = Stage(shape)
    for name, parameter in stage.named_parameters():
        with torch.no_grad():
            parameter.copy_(initial_weight(name, parameter.shape, seed))
    return stage


def joined_weights(stages: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return the whole model's weights by name. Raises ValueError when two stages have the same one."""
    weights: dict[str, Tensor] = {}
    for stage in stages:
        if both := weights.keys() & stage.keys():
            raise ValueError(f"two stages have {min(both)}: they are not stages of one model")
        weights |= stage
    return weights


# ---------------------------------------------------------------- where to cut


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Cost of a microbatch, forward and backward, in any unit: the embedding, each block, and the head."""

    embedding: float
    block: float
    head: float


def balanced_boundaries(num_layers: int, num_stages: int, costs: Costs) -> tuple[int, ...]:
    """Return where to cut so that the costliest stage costs as little as possible.

    Of equal cuts, chooses the one whose stages differ least. Raises ValueError for more than `num_layers` + 2 stages:
    only the first and the last can be without a block.
    """
    if not 1 <= num_stages <= num_layers + 2:
        raise ValueError(f"{num_layers} blocks can be cut into 1 to {num_layers + 2} stages, not {num_stages}")
    last = num_stages - 1
    best: dict[int, _Cut] = {0: (0.0, 0.0, ())}  # by the number of blocks in the stages so far
    for stage in range(num_stages):
        ends = costs.embedding * (stage == 0) + costs.head * (stage == last)
        longer: dict[int, _Cut] = {}
        for place, (largest, squares, cuts) in best.items():
            for end in range(place if stage in (0, last) else place + 1, num_layers + 1):
                cost = ends + costs.block * (end - place)
                cut = (max(largest, cost), squares + cost**2, (*cuts, end))
                longer[end] = min(longer.get(end, cut), cut)
        best = longer
    return best[num_layers][2][:-1]


def expected_boundaries(section: ModelSection, num_stages: int) -> tuple[int, ...]:
    """Return where to cut by the numbers of multiplications alone, where nothing can be measured."""
    head = section.vocabulary_size * section.width
    costs = Costs(embedding=0.0, block=block_parameters(section), head=head)
    return balanced_boundaries(section.num_layers, num_stages, costs)


_Cut = tuple[float, float, tuple[int, ...]]
"""(cost of the costliest stage, sum of all costs' squares, ends of the stages)"""

_TIMES = 5  # measurements, of which the least counts
_PROCESSOR = torch.device("cpu")


def measured_costs(
    section: ModelSection,
    num_sequences: int,
    device: torch.device = _PROCESSOR,
    autocast: Callable[[], AbstractContextManager[None]] = nullcontext,
    finish: Callable[[], None] = lambda: None,
) -> Costs:
    """Measure what a microbatch of `num_sequences` costs on this machine, in seconds; the least of five times.

    On a `device` other than the processor, `finish` waits until it has done everything; parts are called in contexts
    that `autocast` makes.
    """
    shape = (num_sequences, section.context_tokens)
    tokens = torch.zeros(shape, dtype=torch.int64, device=device)
    x = torch.zeros((*shape, section.width), device=device, requires_grad=True)
    first, block, head = (
        build_stage(
            StageShape(model=section, first_block=a, last_block=b, has_embedding=a == b == 0, has_head=a == b == 1), 0
        ).to(device)
        for a, b in ((0, 0), (0, 1), (1, 1))
    )

    def seconds(forward: Callable[[], Tensor]) -> float:
        times = []
        for _ in range(_TIMES):
            finish()
            began_s = time.perf_counter()
            with autocast():
                out = forward()
            out.backward()  # type: ignore[no-untyped-call]
            finish()
            times.append(time.perf_counter() - began_s)
        return min(times)

    return Costs(
        embedding=seconds(lambda: first(tokens).sum()),
        block=seconds(lambda: block(x).sum()),
        head=seconds(lambda: head.loss(x, tokens)),
    )

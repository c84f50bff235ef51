"""The sections that a peer publishes of a model: tensors that travel together, and what a merge makes of them.

A run's list of them is what codecs, the rules for others' publications and publishers are built from. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeAlias

from swarmtrain.methods import GradientFormat
from swarmtrain.network.snapshots import TensorSpec
from swarmtrain.protocol.pulls import Section

__all__ = ["SectionRule", "SectionSpec", "sections_of"]

SectionRule: TypeAlias = Literal["mean", "outer step"]
"""What a merge makes of partners' values: the mean with this peer's own, or, weighted by their tokens, the gradient of
one outer step."""

_DTYPES: dict[GradientFormat, str] = {
    "fp32": "float32",
    "bf16": "bfloat16",
    "int8": "int8",
    "int4": "int4",
    "int2": "int2",
}


@dataclass(frozen=True, kw_only=True)
class SectionSpec:
    """One of them."""

    name: Section
    """As it is asked for."""
    prefix: str
    """Of its tensors' names in a publication."""
    tensors: tuple[TensorSpec, ...]
    """Names and shapes, as the parameters have them."""
    formats: tuple[GradientFormat, ...]
    """Those that a publication may have, the coarsest first."""
    rule: SectionRule
    num_parts: int
    """With the ends of how many parts of a round it may be published; 0: once, as the round begins."""

    @cached_property
    def tables(self) -> tuple[tuple[TensorSpec, ...], ...]:
        """The tensor table of a publication in each of the formats."""
        return tuple(self.table(format) for format in self.formats)

    def table(self, format: GradientFormat) -> tuple[TensorSpec, ...]:
        """That of a publication in this format."""
        return tuple(TensorSpec(f"{self.prefix}/{one.name}", one.shape, _DTYPES[format]) for one in self.tensors)

    def format_of(self, dtype: str) -> GradientFormat:
        """The format of a publication whose tensors are of this type in its table."""
        return next(format for format in self.formats if _DTYPES[format] == dtype)


def sections_of(
    tensors: Sequence[TensorSpec],
    weights_format: GradientFormat,
    gradient_formats: tuple[GradientFormat, ...],
    num_parts: int = 1,
) -> tuple[SectionSpec, ...]:
    """What is published of these tensors where peers merge at their own pace: the pseudo-gradient of a round so far,
    and the weights that it began with."""
    gradient = SectionSpec(
        name="gradient",
        prefix="gradient",
        tensors=tuple(tensors),
        formats=gradient_formats,
        rule="outer step",
        num_parts=num_parts,
    )
    weights = SectionSpec(
        name="weights", prefix="theta", tensors=tuple(tensors), formats=(weights_format,), rule="mean", num_parts=0
    )
    return gradient, weights

"""The sections that a peer publishes of a model: tensors that travel together, and what a merge makes of them.

A run's list of them is what codecs, the rules for others' publications, publishers and pulls are built from: a section
that is added to it is published, pulled and merged. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from swarmtrain.methods import GradientFormat
from swarmtrain.network.snapshots.store import TensorSpec
from swarmtrain.protocol.gossip.pulls import Section, SectionRule

__all__ = ["SectionRule", "SectionSpec", "rules_of", "sections_of"]

_DTYPES: dict[GradientFormat, str] = {
    "fp32": "float32",
    "bf16": "bfloat16",
    "int8": "int8",
    "int4": "int4",
    "int2": "int2",
}


@dataclass(frozen=True, kw_only=True)
class SectionSpec:
    """One of them. Each fragment of a model has all of the run's, over tensors of its own; two make its outer step: the
    one with that rule, and the weights, which are averaged and have no parts."""

    name: Section
    """As it is asked for, at most 32 bytes."""
    prefix: str
    """Of its tensors' names in a publication."""
    tensors: tuple[TensorSpec, ...]
    """Names and shapes, as the parameters have them."""
    formats: tuple[GradientFormat, ...]
    """Those that a publication may have, the coarsest first; one if it is averaged."""
    rule: SectionRule
    num_parts: int
    """With the ends of how many parts of a round it may be published; 0: once, as the round begins, of weights."""

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


def rules_of(sections: Sequence[SectionSpec]) -> dict[Section, SectionRule]:
    """What is pulled of a partner, and what a merge makes of it, in the order of the pulls: what is averaged first, as
    it stays what it is for longest, and of that the weights."""
    ordered = sorted(sections, key=lambda section: (section.rule != "mean", section.num_parts))
    return {section.name: section.rule for section in ordered}

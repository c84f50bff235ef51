"""Define the tensor groups of a model that a peer publishes: tensors that travel together, and how a merge uses them.

Codecs, rules for other peers' publications, publishers and pulls are all built from a run's list of tensor groups:
adding one to the list has it published, pulled and merged. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from swarmtrain.methods import GradientFormat
from swarmtrain.network.snapshots.store import TensorSpec
from swarmtrain.protocol.gossip.pulls import GroupName, GroupRule

DTYPES: dict[GradientFormat, str] = {
    "fp32": "float32",
    "bf16": "bfloat16",
    "int8": "int8",
    "int4": "int4",
    "int2": "int2",
}
"""Types of numbers in manifests, by format."""


@dataclass(frozen=True, kw_only=True)
class TensorGroup:
    """Tensor group that each fragment has, over the fragment's own tensors.

    Two tensor groups make a fragment's outer step: the one whose rule is "outer step", and the weights, which are
    averaged and have no parts.
    """

    name: GroupName
    """Name in requests, at most 32 bytes."""
    prefix: str
    """Prefix of its tensors' names in a publication."""
    tensors: tuple[TensorSpec, ...]
    """Names and shapes of the parameters."""
    formats: tuple[GradientFormat, ...]
    """Formats that a publication may have, the coarsest first; one if it is averaged."""
    rule: GroupRule
    num_parts: int
    """Number of parts of a round at whose ends the group may be published; 0: only at the round's start, as weights
    are."""

    @cached_property
    def tables(self) -> tuple[tuple[TensorSpec, ...], ...]:
        """Tensor table of a publication in each format."""
        return tuple(self.table(format) for format in self.formats)

    def table(self, format: GradientFormat) -> tuple[TensorSpec, ...]:
        """Return the tensor table of a publication in this format."""
        return tuple(TensorSpec(f"{self.prefix}/{one.name}", one.shape, DTYPES[format]) for one in self.tensors)

    def format_of(self, dtype: str) -> GradientFormat:
        """Return the format of a publication whose tensors have this dtype."""
        return next(format for format in self.formats if DTYPES[format] == dtype)


def groups_of(
    tensors: Sequence[TensorSpec],
    weights_format: GradientFormat,
    gradient_formats: tuple[GradientFormat, ...],
    num_parts: int = 1,
) -> tuple[TensorGroup, ...]:
    """Return the tensor groups for asynchronous merging: a round's pseudo-gradient so far, and the weights it began
    with."""
    gradient = TensorGroup(
        name="gradient",
        prefix="gradient",
        tensors=tuple(tensors),
        formats=gradient_formats,
        rule="outer step",
        num_parts=num_parts,
    )
    weights = TensorGroup(
        name="weights", prefix="theta", tensors=tuple(tensors), formats=(weights_format,), rule="mean", num_parts=0
    )
    return gradient, weights


def rules_of(groups: Sequence[TensorGroup]) -> dict[GroupName, GroupRule]:
    """Return the rule of each tensor group, in the order in which they are pulled of a partner.

    Averaged tensor groups come first, since they stay valid longest, and the weights first among those.
    """
    ordered = sorted(groups, key=lambda group: (group.rule != "mean", group.num_parts))
    return {group.name: group.rule for group in ordered}

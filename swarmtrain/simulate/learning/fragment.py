"""What a simulated volunteer publishes of one fragment of the model, and what it holds for usual there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from swarmtrain.algorithm.fragments import Fragment
from swarmtrain.network.codec import PublicationCodec
from swarmtrain.peer.merging.robustness import Robustness
from swarmtrain.protocol.gossip.partners import PublicationVersion
from swarmtrain.protocol.gossip.pulls import Section, SectionBytes
from swarmtrain.protocol.tokens.shards import CoverageRow
from swarmtrain.run import GradientFormat

__all__ = ["LearningFragment", "Published"]


@dataclass
class Published:
    """A fragment's weights at its round's start or its pseudo-gradient since, which travel as the run file says."""

    mark: PublicationVersion
    vector: Tensor
    num_bytes: int
    format: GradientFormat | None = None
    """Of a pseudo-gradient."""
    sent: Tensor | None = None
    """What everybody gets of it, once it was asked for."""
    rows: Sequence[CoverageRow] = ()
    """Who has seen which data, as it tells with it."""


@dataclass
class LearningFragment:
    """One fragment."""

    number: int
    fragment: Fragment
    sizes: Mapping[GradientFormat, SectionBytes]
    robustness: Robustness
    codec: PublicationCodec
    newest: Published | None = field(default=None, init=False)
    """Its gradient's."""
    weights: Published | None = field(default=None, init=False)

    def forget(self, codec: PublicationCodec) -> None:
        """All that a process holds and no checkpoint keeps; another has a codec of its own."""
        self.codec, self.newest, self.weights = codec, None, None
        self.robustness.comes_back()

    def begins(self, round: int, theta: Tensor) -> None:
        """A round of it, with the weights `theta`, (Q,), which weigh the same in any format of gradients."""
        num_bytes = next(iter(self.sizes.values())).weights
        self.weights = Published(PublicationVersion(round, 0, 0), theta, num_bytes)

    def brought(self, mark: PublicationVersion, gradient: Tensor, format: GradientFormat) -> None:
        """So much of its round, (Q,)."""
        self.newest = Published(mark, gradient, self.sizes[format].gradient, format)

    def newer(self, section: Section, known: PublicationVersion | None) -> Published | None:
        """The newest that it has of a section; None if that is what the reader knows."""
        found = self.weights if section in self.codec.averaged else self.newest
        if found is None or (known is not None and (found.mark.round, found.mark.part) <= (known.round, known.part)):
            return None
        return found

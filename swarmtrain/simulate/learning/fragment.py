"""What a simulated volunteer publishes of one fragment of the model, and its record of usual norms there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from swarmtrain.algorithm.fragments import Fragment
from swarmtrain.methods.method import GradientFormat
from swarmtrain.network.codec import PublicationCodec
from swarmtrain.peer.merging.robustness import Robustness
from swarmtrain.protocol.gossip.partners import PublicationVersion
from swarmtrain.protocol.gossip.pulls import GroupName, PublicationBytes
from swarmtrain.protocol.tokens.shards import CoverageRow


@dataclass
class Published:
    """Publication of one fragment: weights at the start of its round, or the pseudo-gradient since.

    It travels in the format that the run file says.
    """

    version: PublicationVersion
    vector: Tensor
    num_bytes: int
    format: GradientFormat | None = None
    """Format of a pseudo-gradient; None for weights."""
    sent: Tensor | None = None
    """Vector as every reader decodes it; set at the first request."""
    rows: Sequence[CoverageRow] = ()
    """Rows that say which data were seen, sent with the publication."""


@dataclass
class LearningFragment:
    """One fragment of one volunteer's model."""

    number: int
    fragment: Fragment
    sizes: Mapping[GradientFormat, PublicationBytes]
    robustness: Robustness
    codec: PublicationCodec
    newest: Published | None = field(default=None, init=False)
    """Newest pseudo-gradient."""
    weights: Published | None = field(default=None, init=False)

    def forget(self, codec: PublicationCodec) -> None:
        """Forget everything that a process holds in memory and no checkpoint keeps; a new process has a new codec."""
        self.codec, self.newest, self.weights = codec, None, None
        self.robustness.comes_back()

    def begins(self, round: int, theta: Tensor) -> None:
        """Begin a round of the fragment with the weights `theta` (Q,).

        Weights have the same size whatever the format of gradients.
        """
        num_bytes = next(iter(self.sizes.values())).weights
        self.weights = Published(PublicationVersion(round, 0, 0), theta, num_bytes)

    def set_newest(self, version: PublicationVersion, gradient: Tensor, format: GradientFormat) -> None:
        """Set the newest pseudo-gradient (Q,) of the fragment's round so far."""
        self.newest = Published(version, gradient, self.sizes[format].gradient, format)

    def drop_before(self, round: int) -> None:
        """Publish no pseudo-gradient of a round before this one any more."""
        if self.newest is not None and self.newest.version.round < round:
            self.newest = None

    def newer(self, group: GroupName, known: PublicationVersion | None) -> Published | None:
        """Return the newest publication of a tensor group; None if the reader has it."""
        found = self.weights if group in self.codec.averaged else self.newest
        if found is None or (
            known is not None and (found.version.round, found.version.part) <= (known.round, known.part)
        ):
            return None
        return found

"""Describe a merge method to all code that is not its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

GradientFormat = Literal["fp32", "bf16", "int8", "int4", "int2"]
"""Equals `algorithm.quantize.Format`, which is in a layer above."""


@dataclass(frozen=True, kw_only=True)
class MergeMethod:
    """Properties and parts of one merge method."""

    name: str
    """Name in `merge.method`. A method of another package gets the run file's name instead."""
    says: str
    """Description for the documentation of that key."""
    exchange: str
    """Class that answers the trainer's calls, a `SwarmExchange` (peer/merging/roster_exchange.py), as
    "module:class"."""
    costs: str
    """Class that computes what merging costs each peer, a `peer.merging.costs.MergeCosts`, as "module:class"."""
    lives: str
    """Function that plays part of a swarm in virtual time, a `Lives` (simulate/planning/playback.py), as
    "module:function"."""
    learns: str = ""
    """Function that trains in virtual time, from a `simulate.learning.setting.Setting` to an `Outcome`, as
    "module:function".

    Empty if the method cannot be compared in this way.
    """
    keys: frozenset[str] = frozenset()
    """Keys of `[merge]` that this method reads and not every method does. Other methods' keys are refused with it."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Defaults of keys of `[merge]` that differ from the fields' own."""
    auto_formats: tuple[GradientFormat, ...] = ("int2",)
    """Formats of a pseudo-gradient if `merge.gradient_format` is "auto", the coarsest first."""
    unread: frozenset[str] = frozenset()
    """Keys of `[merge]` that every other method reads. Only their defaults are accepted with this one."""
    formats: tuple[GradientFormat, ...] = ()
    """Values of `merge.gradient_format` that are accepted; empty for all, if the method reads the key."""
    asynchronous: bool = True
    """True if peers merge at their own pace, without rosters."""
    own_weights: bool = False
    """True if each volunteer has weights of its own and pulls those of others. The run's weights are their mean."""
    server: str = ""
    """Class in the bootstrap that takes in each pseudo-gradient as it arrives, a `peer.merging.server.MergeServer`.

    The published run names the bootstrap. All volunteers continue from its weights, and only those are archived.
    "module:class"; empty if there is none.
    """
    in_step: bool = False
    """True if paced rounds end at the same moment, for which a peer may take more steps than `merge.inner_steps`."""
    hosting: bool = False
    """True if hidden peers are reached through hosts or the bootstrap."""
    shards: bool = False
    """True if the data can be drawn from shards, so that all of it is seen by some peer."""
    stages: bool = False
    """True if the model can be cut into a pipeline's stages."""
    adapters: bool = False
    """True if peers can train an adapter, of which some train more groups than others."""
    common_step: bool = False
    """True if peers only add up gradients at the common weights, and all take one and the same optimizer step."""
    num_moments: int = 1
    """Vectors as long as the weights that the outer step keeps."""
    lends_weights: bool = False
    """True if a publication borrows the model's weights, from which its pseudo-gradient is computed on request."""

    @property
    def has_server(self) -> bool:
        """True if the bootstrap keeps the run's weights."""
        return bool(self.server)

    def state_bytes(self, num_parameters: int) -> int:
        """Return the bytes of a state of so many parameters: weights and moments, fp32."""
        return 4 * (1 + self.num_moments) * num_parameters

    def reads(self, key: str) -> bool:
        """Return whether a key of `[merge]` that not every method reads has a meaning with this one."""
        return key in self.keys

"""What one way to merge is, for all code that is not its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = ["GradientFormat", "MergeMethod"]

GradientFormat = Literal["fp32", "bf16", "int8", "int4", "int2"]
"""`algorithm.quantize.Format`, which is a layer above."""


@dataclass(frozen=True, kw_only=True)
class MergeMethod:
    """One way in which peers become one model."""

    name: str
    """In `merge.method`; of another package's method the run file's name takes its place."""
    says: str
    """What it is, in the documentation of that key."""
    exchange: str
    """Answers the trainer's calls: a `SwarmExchange` (peer/merging/roster_exchange.py), as "module:class"."""
    costs: str
    """What merging costs each peer, a `peer.merging.costs.MergeCosts`: "module:class"."""
    lives: str
    """Plays part of a swarm in virtual time: a `Lives` (simulate/planning/playback.py), "module:function"."""
    learns: str = ""
    """How it learns in virtual time, a function of a `simulate.learning.setting.Setting` that gives an `Outcome`:
    "module:function"; empty where it cannot be compared so."""
    keys: frozenset[str] = frozenset()
    """Keys of `[merge]` that not every method has, but this one; those of others are refused with it."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Of keys of `[merge]`, where they are not the fields' own."""
    auto_formats: tuple[GradientFormat, ...] = ("int2",)
    """Those that a pseudo-gradient may have where `merge.gradient_format` is "auto", the coarsest first."""
    asynchronous: bool = True
    """Peers merge at their own pace, without rosters."""
    own_weights: bool = False
    """Each volunteer has weights of its own, and pulls those of others: the run's are the mean of theirs."""
    server: str = ""
    """What takes in each pseudo-gradient as it arrives, in the bootstrap, which the published run names: a
    `peer.merging.server.MergeServer`, "module:class". Everybody goes on from its weights, and nobody else's are
    archived.
    Empty where there is none."""
    in_step: bool = False
    """Paced rounds end in the same moment, for which one takes more inner steps than `merge.inner_steps`."""
    hosting: bool = False
    """Those who cannot be dialled are reached through others, or through the bootstrap."""
    shards: bool = False
    """The data can be drawn from shards, so that all of it is seen by somebody."""
    stages: bool = False
    """The model can be cut into a pipeline's stages."""
    lends_weights: bool = False
    """A publication lends the model's weights, of which its pseudo-gradient is made when somebody asks for it."""

    @property
    def has_server(self) -> bool:
        """Whether the bootstrap keeps the run's weights."""
        return bool(self.server)

    def reads(self, key: str) -> bool:
        """Whether that key of `[merge]`, which not every method has, means something with it."""
        return key in self.keys

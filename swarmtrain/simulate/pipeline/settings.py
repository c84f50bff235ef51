"""The machines of a simulated pipeline, its settings, and what its log tells."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from swarmtrain.protocol.pipeline.balance import Rule
from swarmtrain.protocol.pipeline.router import Router

__all__ = ["Kind", "PipelineMachine", "PipelineSettings"]


@dataclass(frozen=True, kw_only=True)
class PipelineMachine:
    """A volunteer's machine. `tokens_per_s`: what it would do with the whole model."""

    name: str
    tokens_per_s: float
    fetch_s: float = 60.0
    """To download a stage takes it so long."""
    most_stages: int = 1
    """So many fit into its memory. With two, a stage is served until the next one is there."""


@dataclass(frozen=True, kw_only=True)
class PipelineSettings:
    """Everything about a swarm that is not a machine."""

    rule: Rule = field(default_factory=lambda: Rule(costs=(0.25,) * 4, live_s=30.0))
    balance: Literal["none", "queues", "rates"] = "rates"
    """Nobody moves; SWARM's own rule; ours."""
    balance_every_s: float = 10.0
    placed: bool = True
    """A joiner goes where it is needed most; else to any stage by chance."""
    router: Callable[[random.Random], Router] = Router
    microbatch_tokens: int = 4096
    batch_microbatches: int = 128
    """So many are an inner step of a peer, here 524,288 tokens. It bounds how many may be under way, and with it how
    many peers have work."""
    in_flight: int = 0
    """A driver's microbatches; 0: as many as `most_in_flight` says."""
    latency_s: float = 0.1
    """A message takes so long, one way,"""
    tensors_s: float = 0.0
    """and so much longer if it brings a microbatch's tensors."""
    jitter: float = 0.1
    """A task's time varies by so much (standard deviation of its logarithm)."""
    announce_every_s: float = 10.0
    look_every_s: float = 5.0
    record_delay_s: tuple[float, float] = (0.5, 5.0)
    """Between a record's publication and its being seen, another for each two peers."""
    missed: float = 0.05
    """So often a look does not find a peer's newest record."""
    drain_s: float = 4.0
    """Who leaves the first stage waits so long for what it drives."""


Kind: TypeAlias = Literal["joined", "serves", "moves", "stays", "died"]
"""What a peer did, or what happened to it."""

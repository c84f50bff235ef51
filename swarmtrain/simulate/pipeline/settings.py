"""Machines of a simulated pipeline, its settings, and the kinds of events in its log."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from swarmtrain.protocol.pipeline.balance import Rule
from swarmtrain.protocol.pipeline.router import Router


@dataclass(frozen=True, kw_only=True)
class PipelineMachine:
    """Machine of a volunteer. `tokens_per_s` is what it would do with the whole model."""

    name: str
    tokens_per_s: float
    fetch_s: float = 60.0
    """Seconds to download a stage."""
    most_stages: int = 1
    """Stages that fit into its memory. With two, a stage is served until the next one is there."""


@dataclass(frozen=True, kw_only=True)
class PipelineSettings:
    """Settings of a swarm that are not those of a machine."""

    rule: Rule = field(default_factory=lambda: Rule(costs=(0.25,) * 4, live_s=30.0))
    balance: Literal["none", "queues", "rates"] = "rates"
    """Rule for moves.

    - "none": nobody moves;
    - "queues": SWARM's own rule;
    - "rates": the product's rule.
    """
    balance_every_s: float = 10.0
    placed: bool = True
    """True if a joiner goes where it is needed most; otherwise it takes a random stage."""
    router: Callable[[random.Random], Router] = Router
    microbatch_tokens: int = 4096
    batch_microbatches: int = 128
    """Microbatches in an inner step of a peer, here 524,288 tokens.

    This bounds how many may be under way, and so how many peers have work.
    """
    in_flight: int = 0
    """Number of microbatches that a driver has under way; 0: computed by `most_in_flight`."""
    latency_s: float = 0.1
    """One-way seconds of a message."""
    tensors_s: float = 0.0
    """Additional seconds of a message with a microbatch's tensors."""
    jitter: float = 0.1
    """Standard deviation of the logarithm of a task's time."""
    announce_every_s: float = 10.0
    look_every_s: float = 5.0
    record_delay_s: tuple[float, float] = (0.5, 5.0)
    """Least and most seconds until a published record is seen, drawn for each pair of peers."""
    missed: float = 0.05
    """Share of readings of the DHT that do not find a peer's newest record."""
    drain_s: float = 4.0
    """Seconds that a peer that leaves the first stage waits for its microbatches under way."""


Kind: TypeAlias = Literal["joined", "serves", "moves", "stays", "died"]
"""Kind of event in the log."""

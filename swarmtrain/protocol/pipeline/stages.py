"""Conclusions from the records of all of a pipeline's peers: who holds which stage, and whether the run has its tokens.

Everything here is pure.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from swarmtrain.protocol.membership.membership import PeerInfo
from swarmtrain.protocol.pipeline.balance import StagePeer

_NEARLY = 0.95
"""Share of the run's tokens that counts as nearly all: the rounds under way are not counted yet."""
_LAST_ROUND_S = 30.0
"""Seconds that the other drivers have to end their last round."""


def stage_costs(measured: Sequence[float]) -> tuple[float, ...]:
    """Return each stage's share of the whole model's computation; the shares add up to one."""
    return tuple(cost / sum(measured) for cost in measured)


def places_of(infos: Iterable[PeerInfo]) -> list[StagePeer]:
    """Return the stages and speeds that these peers advertise, of those that do."""
    return [info.place for info in infos if info.place is not None]


@dataclass
class FirstStageWatch:
    """Watches whether all of the run's tokens have passed the first stage, so that no more reach the later ones.

    They have if every driver says so: while they drive, drivers need each other. A driver that never says so holds
    nobody up for ever: once most drivers say so, or one does and this peer has itself counted nearly as many tokens,
    the others have `_LAST_ROUND_S` left. If nobody drives, the word of a driver that has left is believed at once if
    this peer has counted nearly as many tokens, and otherwise after that time, because a view of the DHT may miss live
    drivers for a moment.
    """

    total_tokens: int
    is_over: bool = False
    _claimed_s: float = math.inf
    """Time since which most drivers have said so, or one has while this peer has counted nearly as many tokens; without
    interruption."""

    def look(self, here: Iterable[PeerInfo], known: Iterable[PeerInfo], counted_tokens: int, now: float) -> bool:
        """Return whether the first stage is done; once True it remains so. `counted_tokens` is the run's total by this
        peer's own count."""
        total = self.total_tokens
        told = [info.run_tokens for info in here if _drives(info)]
        said = max(told, default=0) >= total or any(info.run_tokens >= total for info in known if _drives(info))
        is_near = said and counted_tokens >= _NEARLY * total
        is_sure = min(told) >= total if told else is_near
        # The lower median: half of the drivers, or a single liar of two, are not enough.
        is_claimed = is_near or (statistics.median_low(told) >= total if told else said)
        self._claimed_s = min(self._claimed_s, now) if is_claimed else math.inf
        self.is_over = self.is_over or is_sure or now >= self._claimed_s + _LAST_ROUND_S
        return self.is_over


def _drives(info: PeerInfo) -> bool:
    return info.place is not None and 0 in info.place.planned

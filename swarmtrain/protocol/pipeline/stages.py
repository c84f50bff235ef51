"""What a pipeline's records say together: who holds what, and whether the run has had its tokens.

Pure: everything is an argument.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from swarmtrain.protocol.membership.membership import PeerInfo
from swarmtrain.protocol.pipeline.balance import StagePeer

__all__ = ["FirstStageWatch", "places_of", "stage_costs"]

_NEARLY = 0.95
"""Of the run's tokens: what the rounds under way bring is not counted yet."""
_LAST_ROUND_S = 30.0


def stage_costs(measured: Sequence[float]) -> tuple[float, ...]:
    """The stages' parts of the whole model's computing, which add up to one."""
    return tuple(cost / sum(measured) for cost in measured)


def places_of(infos: Iterable[PeerInfo]) -> list[StagePeer]:
    """What these peers hold, as far as they say."""
    return [info.place for info in infos if info.place is not None]


@dataclass
class FirstStageWatch:
    """Watches whether the run's tokens have gone through the first stage: no more come then to those after it.

    Where everybody who drives says so, they have: each needs the others while it drives. One that never says so keeps
    nobody for ever: once most of them do, or one does and this peer has counted nearly as many tokens itself, the
    others have the time of a last round. What only somebody who has gone says, while nobody drives, is believed at once
    if this peer has counted nearly as many, and else after that time: a view may miss those who drive for a moment.
    """

    total_tokens: int
    is_over: bool = False
    _claimed_s: float = math.inf
    """Since when what was seen would do, if it lasts."""

    def look(self, here: Iterable[PeerInfo], known: Iterable[PeerInfo], counted_tokens: int, now: float) -> bool:
        """Whether it is over, and it stays over. `counted_tokens` are the run's, by this peer's own count."""
        total = self.total_tokens
        told = [info.run_tokens for info in here if _drives(info)]
        said = max(told, default=0) >= total or any(info.run_tokens >= total for info in known if _drives(info))
        is_near = said and counted_tokens >= _NEARLY * total
        is_sure = min(told) >= total if told else is_near
        is_claimed = is_near or (statistics.median_low(told) >= total if told else said)
        self._claimed_s = min(self._claimed_s, now) if is_claimed else math.inf
        self.is_over = self.is_over or is_sure or now >= self._claimed_s + _LAST_ROUND_S
        return self.is_over


def _drives(info: PeerInfo) -> bool:
    return info.place is not None and 0 in info.place.planned

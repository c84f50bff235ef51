"""What a pipeline's records say together: who holds what, and whether the run has had its tokens.

Pure: everything is an argument.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from swarmtrain.membership.balance import StagePeer
from swarmtrain.membership.lifecycle import PeerInfo

__all__ = ["is_first_stage_done", "places_of", "stage_costs"]


def stage_costs(measured: Sequence[float]) -> tuple[float, ...]:
    """The stages' parts of the whole model's computing, which add up to one."""
    return tuple(cost / sum(measured) for cost in measured)


def places_of(infos: Iterable[PeerInfo]) -> list[StagePeer]:
    """What these peers hold, as far as they say."""
    return [info.place for info in infos if info.place is not None]


def is_first_stage_done(here: Iterable[PeerInfo], known: Iterable[PeerInfo], total_tokens: int) -> bool:
    """Whether the run's tokens have gone through the first stage: no more come then to those after it.

    Everybody who drives must say so, since each still needs the others while it drives. Where nobody is left that does,
    it is enough that somebody who has gone had said it; else the stage is to be held again.
    """
    drivers = [info for info in here if info.place is not None and 0 in info.place.planned]
    if drivers:
        return all(info.run_tokens >= total_tokens for info in drivers)
    return any(info.run_tokens >= total_tokens and info.place is not None and 0 in info.place.planned for info in known)

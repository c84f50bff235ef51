"""What a peer keeps of a publication until it is merged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from swarmtrain.algorithm.gossip import PartnerUpdate

__all__ = ["KeptPublication"]


@dataclass(frozen=True)
class KeptPublication:
    """What was pulled and may be merged. Of a large model it is kept as its bytes: decoded it takes four to sixteen
    times as much."""

    tokens: float
    decoded: Callable[[], PartnerUpdate]
    is_made_anew: bool = False
    """Each time, so that whoever asks may write into it."""

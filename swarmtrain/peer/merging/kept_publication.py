"""Pulled publications in the form in which a peer keeps them until they are merged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from swarmtrain.algorithm.gossip import PartnerUpdate


@dataclass(frozen=True)
class KeptPublication:
    """Publication that was pulled, checked and may be merged.

    For a large model only its bytes are kept and decoded again at the merge: decoded it takes four to sixteen times as
    much memory.
    """

    tokens: float
    decoded: Callable[[], PartnerUpdate]
    is_made_anew: bool = False
    """True if each call of `decoded` returns new tensors, which the caller may write into."""

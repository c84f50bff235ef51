"""By which clock a peer goes: the median of those who answer, if that is no wonder.

A peer's word about the time costs it nothing, and a peer that goes by a wrong time takes honest presences for old ones
or for ones from the future. So a correction of more than ten minutes is a person's to decide, and of several who
answer those are named that are far from the rest.

Pure: offsets are arguments, another's clock less this machine's, in seconds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["MOST_CORRECTED_S", "ClockVerdict", "judge_clock"]

_TOLERANCE_S = 1.0
_OUTLIER_S = 60.0
MOST_CORRECTED_S = 600.0
"""A clock that is further off is not corrected unasked."""


@dataclass(frozen=True, kw_only=True)
class ClockVerdict:
    """The correction, 0 within a second; who tells another time than the others, with their offsets."""

    offset_s: float = 0.0
    outliers: tuple[tuple[str, float], ...] = ()

    @property
    def is_doubtful(self) -> bool:
        """Whether a person is to decide."""
        return abs(self.offset_s) > MOST_CORRECTED_S


def judge_clock(offsets_s: Mapping[str, float]) -> ClockVerdict:
    """The median of the offsets by PeerID, of two in the middle the smaller one: of an honest peer and a liar neither
    one nor the mean of both is known to be right, and this machine's clock has a voice. What is no number is no offset.
    """
    told = {peer: offset_s for peer, offset_s in offsets_s.items() if math.isfinite(offset_s)}
    if not told:
        return ClockVerdict()
    ordered = sorted(told.values())
    middle = ordered[(len(ordered) - 1) // 2 : len(ordered) // 2 + 1]
    offset_s = min(middle, key=abs)
    far = tuple((peer, other_s) for peer, other_s in sorted(told.items()) if abs(other_s - offset_s) > _OUTLIER_S)
    return ClockVerdict(offset_s=0.0 if abs(offset_s) < _TOLERANCE_S else offset_s, outliers=far)

"""Correction of this machine's clock: the median of the peers that answer, if it is plausible.

A false claim about the time costs a peer nothing, and a peer with a wrong clock takes honest presence records for
expired or for ones from the future. So a correction of more than ten minutes is left to the user, and peers whose
clocks are far from the rest are named.

Everything here is pure. Offsets are another peer's clock minus this machine's, in seconds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

_TOLERANCE_S = 1.0
"""Offsets below this are not corrected."""
_OUTLIER_S = 60.0
"""Difference from the result above which a clock is an outlier."""
MOST_CORRECTED_S = 600.0
"""Largest offset that is corrected without asking the user."""


@dataclass(frozen=True, kw_only=True)
class ClockVerdict:
    """Correction of this clock (0 if it is within a second), and the peers whose clocks are outliers, with their
    offsets."""

    offset_s: float = 0.0
    outliers: tuple[tuple[str, float], ...] = ()

    @property
    def is_doubtful(self) -> bool:
        """True if the user must decide."""
        return abs(self.offset_s) > MOST_CORRECTED_S


def judge_clock(offsets_s: Mapping[str, float]) -> ClockVerdict:
    """Return the median of the offsets by PeerID, ignoring those that are not finite.

    Of two in the middle the one closer to zero is taken: of an honest peer and a liar neither value nor their mean is
    known to be right, and so this machine's own clock counts too.
    """
    told = {peer: offset_s for peer, offset_s in offsets_s.items() if math.isfinite(offset_s)}
    if not told:
        return ClockVerdict()
    ordered = sorted(told.values())
    middle = ordered[(len(ordered) - 1) // 2 : len(ordered) // 2 + 1]
    offset_s = min(middle, key=abs)
    far = tuple((peer, other_s) for peer, other_s in sorted(told.items()) if abs(other_s - offset_s) > _OUTLIER_S)
    return ClockVerdict(offset_s=0.0 if abs(offset_s) < _TOLERANCE_S else offset_s, outliers=far)

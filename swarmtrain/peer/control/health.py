"""Decide whether a peer really trains or serves: the answer of its health service.

Pure: `now` is an argument, and the answer carries its reason.
"""

from __future__ import annotations

from dataclasses import dataclass

from swarmtrain.v1 import control_pb2 as pb

_AT_WORK = (pb.PEER_STATE_TRAINING, pb.PEER_STATE_SERVING)


@dataclass(frozen=True, kw_only=True)
class Vitals:
    """Input of the decision; times in seconds of the clock that gives `now`."""

    state: pb.PeerState
    progressed_s: float
    """Time of the last progress: an inner step, a merge, a look at the swarm, a piece of a transfer."""
    patience_s: float
    """Seconds without progress after which the peer counts as stuck."""


def health(vitals: Vitals, now: float) -> tuple[bool, str]:
    """Return (True if this peer trains or serves as it should, the reason)."""
    if vitals.state == pb.PEER_STATE_FINISHING:
        return True, "it serves on for the others"  # for a minute at most, perhaps measuring meanwhile
    if vitals.state not in _AT_WORK:
        name = pb.PeerState.Name(vitals.state) if vitals.state in pb.PeerState.values() else str(vitals.state)
        return False, f"it is {name.removeprefix('PEER_STATE_').lower()}"
    still_s = now - vitals.progressed_s
    if still_s > vitals.patience_s:
        return False, f"nothing got further for {still_s:.0f} s, more than {vitals.patience_s:.0f} s"
    return True, f"it got further {still_s:.0f} s ago"

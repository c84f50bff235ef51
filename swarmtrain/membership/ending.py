"""The end of a run: whom a peer that is done serves on for.

Pure: `now` is an argument, the answer carries its reason.
"""

from __future__ import annotations

from swarmtrain.membership.lifecycle import Membership, PeerState
from swarmtrain.membership.progress import Progress

__all__ = ["still_needed"]

_ARCHIVE_RETURNS_S = 60.0


def still_needed(membership: Membership, last: Progress, now: float) -> str:
    """Why a peer with the run's `last` state should stay; empty when nobody needs it.

    The archive must have that state: a bootstrap that was heard of a minute ago may be on its way back. Volunteers
    that merge the last round may need its bytes, as long as they are believed alive.
    """
    for info in membership.known():
        state = membership.state(info.peer)
        if info.is_bootstrap:
            recent = membership.heard_s(info.peer) > now - _ARCHIVE_RETURNS_S
            here = state is PeerState.LIVE or (state is PeerState.LOST and recent)
            if here and info.run_tokens < last.run_tokens:
                return f"the archive of {info.name or info.peer} does not have the last state yet"
        elif state is PeerState.LIVE and info.training and info.round < last.round:
            return f"{info.name or info.peer} has not merged the last round yet"
    return ""

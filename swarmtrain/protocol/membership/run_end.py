"""Rules for the end of a run: for which peers one that is done continues to serve.

Everything here is pure: `now` is an argument, and the answer carries its reason.
"""

from __future__ import annotations

from swarmtrain.protocol.membership.membership import Membership, PeerState
from swarmtrain.protocol.tokens.progress import Progress

_RETURNS_S = 120.0
"""Seconds within which a peer that went away may come back."""


def still_needed(membership: Membership, last: Progress) -> str:
    """Return the reason why a peer with the run's `last` state should stay; "" if nobody needs it.

    The archive must have that state; a bootstrap that is gone may be on its way back. Live volunteers that have not
    merged the last round may need its bytes.
    """
    for info in membership.known():
        live = membership.state(info.peer) is PeerState.LIVE
        if info.is_bootstrap:
            if info.run_tokens < last.run_tokens:
                return f"the archive of {info.name or info.peer} does not have the last state yet"
        elif live and info.training and info.round < last.round:
            return f"{info.name or info.peer} has not merged the last round yet"
    return ""


def still_needed_apart(membership: Membership, total_tokens: int) -> str:
    """Return the same as `still_needed` for runs in which each peer has its own weights.

    The archive must have been made after `total_tokens`, and every volunteer must have its consensus of the last
    weights.
    """
    for info in membership.known():
        live = membership.state(info.peer) is PeerState.LIVE
        if info.is_bootstrap:
            if info.run_tokens < total_tokens:
                return f"the archive of {info.name or info.peer} does not have the last weights yet"
        elif live and info.training and not info.is_finished:
            return f"{info.name or info.peer} does not have the last weights yet"
    return ""


def may_come_back(
    membership: Membership, last: Progress, since_s: float, now: float, total_tokens: int | None = None
) -> str:
    """Return the reason why the archive with the run's `last` state should stay; "" if nobody needs it.

    Volunteers must have said goodbye. One that went away recently without that state may be on its way back; it would
    find nobody, and train the rest of the run once more, alone. An archive that has been here only since `since_s` may
    not have seen who went away. If each peer counts its own rounds, `total_tokens` decides who has reached the end.
    """
    if since_s > now - _RETURNS_S:
        strangers = sorted(peer for peer in last.peer_tokens if membership.state(peer) is None)
        if strangers:
            return f"{strangers[0]} has trained and was not seen since; it may come back"
    for info in membership.known():
        if info.is_bootstrap or not info.training:
            continue
        name = info.name or info.peer
        if membership.state(info.peer) is PeerState.LIVE:
            return f"{name} has not left yet"
        behind = info.round < last.round if total_tokens is None else info.run_tokens < total_tokens
        if behind and membership.heard_s(info.peer) > now - _RETURNS_S:
            return f"{name} went away before the end, and may come back"
    return ""

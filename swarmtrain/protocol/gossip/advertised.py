"""Fragments' rounds and publications, inferred from peers' presence records; once for all who have read the same
record.

Everything here is pure. All peers of a simulated swarm share one such table.
"""

from __future__ import annotations

from dataclasses import replace

from swarmtrain.protocol.adapter_groups import trained_groups
from swarmtrain.protocol.gossip.fragments import advertised_round, advertised_version
from swarmtrain.protocol.gossip.partners import Candidate, PublicationVersion
from swarmtrain.protocol.membership.membership import PeerInfo

_MOST = 16384
"""Limit of cached records."""


class AdvertisedFragments:
    """Cache of the round and newest publication of each fragment, as inferred from presence records."""

    def __init__(self, num_fragments: int, num_parts: int) -> None:
        self._num_fragments, self._num_parts = num_fragments, num_parts
        self._of: dict[str, tuple[PeerInfo, list[tuple[int, Candidate] | None]]] = {}

    def of(self, info: PeerInfo, fragment: int) -> tuple[int, Candidate]:
        """Return (round of that fragment at the peer, candidate with its newest publication), inferred from the
        presence record `info`."""
        known = self._of.get(info.peer)
        if known is None or known[0] is not info:
            if len(self._of) > _MOST:
                self._of.clear()
            known = self._of[info.peer] = info, [None] * self._num_fragments
        if (found := known[1][fragment]) is None:  # one at a time, on demand: all fragments of many peers take long
            advertised = PublicationVersion(info.round, info.part, info.part_tokens)
            number, num_parts = self._num_fragments, self._num_parts
            version = advertised_version(fragment, number, advertised, num_parts)
            if not self._may_have_trained(info, fragment, version.round):
                version = PublicationVersion(version.round, 0, 0)
            candidate = Candidate(peer=info.peer, round=version.round, part=version.part, tokens=version.tokens)
            found = known[1][fragment] = advertised_round(fragment, number, advertised, num_parts), candidate
        return found

    def _may_have_trained(self, info: PeerInfo, fragment: int, round: int) -> bool:
        """Return whether a peer has trained a fragment, a group of an adapter, in the fragment's round of that number.

        That began in the peer's round before, with the fragment's merge.
        """
        if not info.adapter_groups:
            return True
        of_peer = range(max(0, round - 1), min(round, info.round) + 1)
        return any(
            fragment in trained_groups(info.peer, each, self._num_fragments, info.adapter_groups) for each in of_peer
        )


def beyond(candidate: Candidate, known: PublicationVersion) -> Candidate:
    """Correct an inferred publication that has no more tokens than what was merged of it: a later part has at least one
    more."""
    if known.round != candidate.round or known.part >= candidate.part or candidate.tokens > known.tokens:
        return candidate
    return replace(candidate, tokens=known.tokens + 1)

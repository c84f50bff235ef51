"""Write and read the rows of a state's manifest that say which publications its weights contain.

A row gives an author and the place (round, part) up to which its publications of a fragment are in the weights. A peer
that takes the state merges nothing of that again (decision 60).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from swarmtrain.errors import BadBytesError
from swarmtrain.network.identity import is_peer_id, peer_bytes, peer_id_from_bytes_untrusted
from swarmtrain.protocol.gossip.partners import Place
from swarmtrain.v1 import snapshot_pb2 as pb

MAX_ROWS_TOLD = 1024
"""Rows over all fragments at most; they make a state 50 KB larger."""
_MAX_ROWS_READ = 4096  # four times what a peer of today writes
_MOST_ROUNDS = 2**40


def add_place_rows(manifest: pb.Manifest, places: Sequence[Mapping[str, Place]]) -> None:
    """Add each fragment's rows to a manifest; if there are too many, those of the latest rounds."""
    most = MAX_ROWS_TOLD // max(1, len(places))
    for fragment, of_fragment in enumerate(places):
        latest = sorted(of_fragment.items(), key=lambda item: (item[1], item[0]), reverse=True)[:most]
        for peer, (round, part) in latest:
            manifest.entered.add(peer=peer_bytes(peer), round=round, part=part, fragment=fragment)


def check_place_rows_untrusted(manifest: pb.Manifest) -> None:
    """Raise BadBytesError if there are too many rows, or if one names no peer or a round out of range."""
    if len(manifest.entered) > _MAX_ROWS_READ:
        raise BadBytesError(
            f"a state with {len(manifest.entered)} publications that entered it, more than {_MAX_ROWS_READ}",
            code="bad-size",
        )
    if not all(is_peer_id(item.peer) and item.round < _MOST_ROUNDS for item in manifest.entered):
        raise BadBytesError(
            "a state that names an invalid peer, or a round out of range, among what entered it", code="bad-number"
        )


def places_untrusted(manifest: pb.Manifest, num_fragments: int, num_parts: int) -> list[dict[str, Place]]:
    """Return for each fragment the places that a manifest gives. Raises BadBytesError if its rows are invalid."""
    check_place_rows_untrusted(manifest)
    places: list[dict[str, Place]] = [{} for _ in range(num_fragments)]
    for item in manifest.entered:
        if item.fragment < num_fragments and 1 <= item.part <= num_parts:  # a server's rows have no part
            places[item.fragment][peer_id_from_bytes_untrusted(item.peer)] = item.round, item.part
    return places

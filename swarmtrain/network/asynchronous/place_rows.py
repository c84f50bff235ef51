"""Up to where each peer is in a state's weights, as its manifest tells it: who takes it merges nothing of it again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from swarmtrain.errors import BadBytesError
from swarmtrain.network.identity import is_peer_id, peer_bytes, peer_id_from_bytes_untrusted
from swarmtrain.protocol.gossip.partners import Place
from swarmtrain.v1 import snapshot_pb2 as pb

__all__ = ["MAX_ROWS_TOLD", "add_place_rows", "check_place_rows_untrusted", "places_untrusted"]

MAX_ROWS_TOLD = 1024
"""Of all fragments together: a state is 50 KB larger by so many."""
_MAX_ROWS_READ = 4096
_MOST_ROUNDS = 2**40


def add_place_rows(manifest: pb.Manifest, places: Sequence[Mapping[str, Place]]) -> None:
    """Add each fragment's; of too many those of the latest rounds."""
    most = MAX_ROWS_TOLD // max(1, len(places))
    for fragment, of_fragment in enumerate(places):
        latest = sorted(of_fragment.items(), key=lambda item: (item[1], item[0]), reverse=True)[:most]
        for peer, (round, part) in latest:
            manifest.entered.add(peer=peer_bytes(peer), round=round, part=part, fragment=fragment)


def check_place_rows_untrusted(manifest: pb.Manifest) -> None:
    """BadBytesError unless the rows are peers', few enough, and of rounds that can be."""
    if len(manifest.entered) > _MAX_ROWS_READ:
        raise BadBytesError(
            f"a state with {len(manifest.entered)} rows of what entered it, more than {_MAX_ROWS_READ}", code="bad-size"
        )
    if not all(is_peer_id(item.peer) and item.round < _MOST_ROUNDS for item in manifest.entered):
        raise BadBytesError(
            "a state that what one who is no peer published entered, or a round out of range", code="bad-number"
        )


def places_untrusted(manifest: pb.Manifest, num_fragments: int, num_parts: int) -> list[dict[str, Place]]:
    """Of each fragment, the places that a manifest tells; BadBytesError if it is nonsense."""
    check_place_rows_untrusted(manifest)
    places: list[dict[str, Place]] = [{} for _ in range(num_fragments)]
    for item in manifest.entered:
        if item.fragment < num_fragments and 1 <= item.part <= num_parts:  # a server's rows have no part
            places[item.fragment][peer_id_from_bytes_untrusted(item.peer)] = item.round, item.part
    return places

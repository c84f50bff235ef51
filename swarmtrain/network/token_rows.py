"""Who has trained on how many tokens, as a manifest tells it: few rows, and read for little.

A manifest of 2 MiB holds 44,000 rows, and to turn as many PeerIDs into text holds the event loop up for a third of a
second. So the sum is looked at in bytes, and there is a bound. What an honest peer sends has a smaller one: the
greatest counts, and all others' in one row of nobody's, since the rows must add up to the run's tokens.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping

from swarmtrain.errors import BadBytesError
from swarmtrain.network.identity import is_peer_id, peer_bytes
from swarmtrain.protocol.tokens.tally import ALL_OTHERS
from swarmtrain.v1 import snapshot_pb2 as pb

__all__ = ["MAX_ROWS_READ", "MAX_ROWS_TOLD", "add_token_rows", "check_token_rows_untrusted"]

MAX_ROWS_READ = 16_384
"""As many as anybody counts (`protocol.tokens.tally`)."""
MAX_ROWS_TOLD = 4096
"""A state is 180 KB larger by so many."""
_NOBODY = peer_bytes(ALL_OTHERS)
"""A PeerID whose key nobody has: its public half is the SHA-256 of "swarmtrain: all others"."""


def add_token_rows(manifest: pb.Manifest, peer_tokens: Mapping[str, int]) -> None:
    """Add each peer's tokens, by PeerID; of very many the least ones as one row."""
    rows = {peer_bytes(peer): tokens for peer, tokens in peer_tokens.items()}
    if len(rows) > MAX_ROWS_TOLD:
        told = dict(heapq.nlargest(MAX_ROWS_TOLD - 1, rows.items(), key=lambda row: (row[1], row[0])))
        rest = sum(rows.values()) - sum(told.values())
        rows = told | {_NOBODY: told.get(_NOBODY, 0) + rest}
    for peer, tokens in sorted(rows.items()):
        manifest.peer_tokens.add(peer=peer, tokens=tokens)


def check_token_rows_untrusted(manifest: pb.Manifest) -> None:
    """BadBytesError unless the rows are peers', few enough, and add up to the run's tokens."""
    if len(manifest.peer_tokens) > MAX_ROWS_READ:
        raise BadBytesError(
            f"a state with the tokens of {len(manifest.peer_tokens)} peers, more than {MAX_ROWS_READ}", code="bad-size"
        )
    counted = {item.peer: item.tokens for item in manifest.peer_tokens}
    if not all(map(is_peer_id, counted)):
        raise BadBytesError("a state with the tokens of one who is no peer", code="bad-format")
    if sum(counted.values()) != manifest.run_tokens:
        raise BadBytesError("a state whose peers' tokens do not add up to the run's", code="bad-tokens")

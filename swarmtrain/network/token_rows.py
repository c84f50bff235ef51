"""Write and check the rows of a manifest that say how many tokens each peer has trained on, with bounds.

A manifest of 2 MiB holds 44,000 rows, and converting as many PeerIDs to text blocks the event loop for a third of a
second. So the sum is computed on bytes, and the number of rows is bounded. An honest peer sends fewer: the greatest
counts, and all others in one row of a PeerID that is nobody's, since the rows must add up to the run's tokens.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping

from swarmtrain.errors import BadBytesError
from swarmtrain.network.identity import is_peer_id, peer_bytes
from swarmtrain.protocol.tokens.tally import ALL_OTHERS
from swarmtrain.v1 import snapshot_pb2 as pb

MAX_ROWS_READ = 16_384
"""Rows accepted: as many as a tally counts (`protocol.tokens.tally`)."""
MAX_ROWS_TOLD = 4096
"""Rows written at most; they make a state 180 KB larger."""
_NOBODY = peer_bytes(ALL_OTHERS)
"""PeerID whose key nobody has: its public half is the SHA-256 of "swarmtrain: all others"."""


def add_token_rows(manifest: pb.Manifest, peer_tokens: Mapping[str, int]) -> None:
    """Add each peer's tokens, by PeerID; if there are very many, the smallest counts as one row."""
    rows = {peer_bytes(peer): tokens for peer, tokens in peer_tokens.items()}
    if len(rows) > MAX_ROWS_TOLD:
        told = dict(heapq.nlargest(MAX_ROWS_TOLD - 1, rows.items(), key=lambda row: (row[1], row[0])))
        rest = sum(rows.values()) - sum(told.values())
        rows = told | {_NOBODY: told.get(_NOBODY, 0) + rest}
    for peer, tokens in sorted(rows.items()):
        manifest.peer_tokens.add(peer=peer, tokens=tokens)


def check_token_rows_untrusted(manifest: pb.Manifest) -> None:
    """Raise BadBytesError unless the rows are peers', few enough, and add up to the run's tokens."""
    if len(manifest.peer_tokens) > MAX_ROWS_READ:
        raise BadBytesError(
            f"a state with the tokens of {len(manifest.peer_tokens)} peers, more than {MAX_ROWS_READ}", code="bad-size"
        )
    counted = {item.peer: item.tokens for item in manifest.peer_tokens}
    if not all(map(is_peer_id, counted)):
        raise BadBytesError("a state with tokens of an invalid peer", code="bad-format")
    if sum(counted.values()) != manifest.run_tokens:
        raise BadBytesError("a state whose peers' tokens do not add up to the run's", code="bad-tokens")

"""Sign, verify and read rosters and pseudo-gradient manifests as messages.

`protocol/rounds/rosters.py` decides about them; `network/rounds/runner.py` drives it.
"""

from __future__ import annotations

from swarmtrain.errors import BadBytesError
from swarmtrain.network.identity import (
    Identity,
    open_signed_untrusted,
    payload_sha256,
    peer_bytes,
    peer_id_from_bytes_untrusted,
    sign,
)
from swarmtrain.network.snapshots.store import Snapshot
from swarmtrain.protocol.rounds.messages import SignedRoster
from swarmtrain.protocol.rounds.rosters import Roster, RoundPublication
from swarmtrain.v1 import snapshot_pb2 as pb

_MAX_ENTRIES = 4096
_MAX_COUNTER = 2**60
_MAX_CHECKED = 256  # rosters remembered as verified
_MAX_CHECKED_ENTRIES = 65_536  # in all of them together


def sign_roster(identity: Identity, run_sha256: str, roster: Roster) -> pb.Signed:
    """Return the roster as a message signed by `identity`, which must be its signer."""
    message = pb.Roster(
        round=roster.round,
        attempt=roster.attempt,
        base=bytes.fromhex(roster.base),
        base_tokens=roster.base_tokens,
        shares=roster.shares,
    )
    for entry in roster.entries:
        message.entries.add(
            peer=peer_bytes(entry.peer),
            snapshot_sha256=bytes.fromhex(entry.snapshot),
            tokens=entry.tokens,
            inner_steps=entry.inner_steps,
        )
    return sign(identity, "roster", run_sha256, message)


def roster_untrusted(signed: pb.Signed, run_sha256: str, max_tokens: int, num_chunks: int | None = None) -> Roster:
    """Return a verified roster. `max_tokens` is the most that one peer can train on in one round, `num_chunks` what the
    shares add up to; None: not checked, for one of this peer's own files.

    Raises BadBytesError if it is forged, unsorted, or claims more than a round can have had.
    """
    signer, message = open_signed_untrusted(signed, "roster", run_sha256, pb.Roster)
    if not 1 <= len(message.entries) <= _MAX_ENTRIES or message.attempt > _MAX_ENTRIES:
        raise BadBytesError("a roster with its size or attempt out of range", code="bad-size")
    if len(message.base) != (32 if message.round else 0) or message.round >= 2**40:
        raise BadBytesError("a roster with a malformed base or round", code="bad-round")
    # Only the signer's word, bounded here; the chain of rosters is what counts (decision 50).
    if message.base_tokens > message.round * max_tokens * _MAX_ENTRIES or message.base_tokens >= _MAX_COUNTER:
        raise BadBytesError("a roster that counts more tokens than its rounds can have had", code="bad-tokens")
    base = message.base.hex()
    entries = tuple(
        RoundPublication(
            peer=peer_id_from_bytes_untrusted(entry.peer),
            snapshot=entry.snapshot_sha256.hex(),
            tokens=entry.tokens,
            inner_steps=entry.inner_steps,
            base=base,
        )
        for entry in message.entries
    )
    peers = [entry.peer for entry in entries]
    # The mean is summed in the roster's order, so one order gives everyone the same bits.
    if peers != sorted(set(peers)):
        raise BadBytesError("a roster that is not sorted by peer", code="bad-format")
    if any(len(entry.snapshot) != 64 for entry in entries):
        raise BadBytesError("a roster with a malformed hash", code="bad-hash")
    if any(not 0 < entry.tokens <= max_tokens for entry in entries):
        raise BadBytesError("a roster that counts more tokens for a peer than a round has", code="bad-tokens")
    shares = tuple(message.shares)
    if shares and (len(shares) != len(entries) or num_chunks not in (None, sum(shares))):
        raise BadBytesError("a roster whose shares are not those of its peers, or not the whole mean", code="bad-size")
    return Roster(
        round=message.round,
        signer=signer,
        entries=entries,
        attempt=message.attempt,
        base=base,
        base_tokens=message.base_tokens,
        shares=shares,
    )


def named(roster: Roster, signed: pb.Signed) -> SignedRoster[pb.Signed]:
    """Return a roster with its signed message and the name that peers give to that message."""
    return SignedRoster(roster, signed, payload_sha256(signed))


class CheckedRosters:
    """Rosters received from others, each verified once. The latest are kept, up to a number of entries."""

    def __init__(self, run_sha256: str, max_tokens: int, num_chunks: int | None = None) -> None:
        """See `roster_untrusted`."""
        self._run_sha256, self._max_tokens, self._num_chunks = run_sha256, max_tokens, num_chunks
        self._checked: dict[str, Roster] = {}
        """Rosters by hash of the signed payload, author and signature."""

    def read_untrusted(self, signed: pb.Signed) -> SignedRoster[pb.Signed]:
        """Return the same as `roster_untrusted`, with its name. Raises BadBytesError."""
        name = payload_sha256(signed)
        key = name + signed.author.hex() + signed.signature.hex()
        if (roster := self._checked.get(key)) is None:
            roster = roster_untrusted(signed, self._run_sha256, self._max_tokens, self._num_chunks)
            self._checked[key] = roster
            num_entries = sum(len(kept.entries) for kept in self._checked.values())
            while len(self._checked) > _MAX_CHECKED or num_entries > _MAX_CHECKED_ENTRIES:
                num_entries -= len(self._checked.pop(next(iter(self._checked))).entries)
        return SignedRoster(roster, signed, name)


def publication_of(snapshot: Snapshot) -> RoundPublication:
    """Return a pseudo-gradient's manifest in the form that the rules of rounds use."""
    manifest = snapshot.manifest
    return RoundPublication(
        peer=snapshot.author,
        snapshot=snapshot.sha256,
        tokens=manifest.tokens,
        inner_steps=manifest.inner_steps,
        base=manifest.roster_sha256.hex(),
    )


def check_publication(snapshot: Snapshot, peer: str, round: int, max_tokens: int) -> None:
    """Raise BadBytesError unless this is a pseudo-gradient of `peer` for `round` with 1 to `max_tokens` tokens."""
    manifest = snapshot.manifest
    if snapshot.author != peer or manifest.round != round or len(manifest.roster_sha256) != (32 if round else 0):
        raise BadBytesError("a publication of another peer or round than asked for", code="bad-round")
    if not 0 < manifest.tokens <= max_tokens:
        raise BadBytesError(
            f"a publication that claims {manifest.tokens} tokens, not between 1 and {max_tokens}", code="bad-tokens"
        )

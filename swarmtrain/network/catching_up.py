"""States of other peers: pulled by a joiner, by the archive, and by whoever missed a round; checked before use."""

from __future__ import annotations

from dataclasses import dataclass

from swarmtrain.errors import BadBytesError
from swarmtrain.network.merging import Merger
from swarmtrain.network.snapshots import Held, empty_held, manifest_untrusted
from swarmtrain.network.token_rows import check_token_rows_untrusted
from swarmtrain.protocol.rosters import Roster
from swarmtrain.v1 import snapshot_pb2 as pb

__all__ = ["NewState", "offered_state_untrusted", "take_state"]


@dataclass(frozen=True, kw_only=True)
class NewState:
    """A state pulled from another peer: outer parameters, then momentum, fp32; and the roster that led to it."""

    held: Held
    roster: Roster
    signed_roster: pb.Signed
    from_peer: str
    reason: str = ""


def offered_state_untrusted(
    merger: Merger, reply: pb.StateReply, source: str, min_round: int, roster: Roster
) -> NewState:
    """The state that `source` offers, none of whose bytes are here yet; `roster` is the one in `reply`, checked."""
    kind, settings = pb.SNAPSHOT_KIND_STATE, merger.settings
    snapshot = manifest_untrusted(reply.manifest, settings.run_sha256, kind, settings.state_specs)
    manifest = snapshot.manifest
    if manifest.round < min_round or manifest.round != roster.round + 1:
        raise BadBytesError("a state of another round than asked for, or than its roster leads to")
    if manifest.roster_sha256.hex() != roster.digest or manifest.run_tokens != roster.total_tokens:
        raise BadBytesError("a state that does not fit its roster")
    check_token_rows_untrusted(manifest)
    return NewState(held=empty_held(snapshot), roster=roster, signed_roster=reply.roster, from_peer=source)


async def take_state(merger: Merger, state: NewState) -> None:
    """Bring its bytes here. Raises PeerError."""
    snapshot = state.held.snapshot
    with merger.store.showing(state.held):
        await merger.pull(state.held, range(snapshot.num_chunks), [state.from_peer])
        await merger.check_finite(state.held.part(0, snapshot.manifest.total_bytes))

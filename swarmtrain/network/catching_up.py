"""States of other peers: pulled by a joiner, by the archive, and by whoever missed a round; checked before use."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from swarmtrain.errors import BadBytesError, PeerError
from swarmtrain.network.merging import Merger
from swarmtrain.network.snapshots import Held, empty_held, manifest_untrusted
from swarmtrain.network.token_rows import check_token_rows_untrusted
from swarmtrain.protocol.rosters import Roster
from swarmtrain.v1 import snapshot_pb2 as pb

__all__ = ["Check", "NewState", "WantedState", "fetch_state", "unchecked"]

Check = Callable[[str, Roster], Awaitable[None]]
"""Told the source and the roster of a state before its bytes are pulled; raises PeerError if it is not to be taken."""


async def unchecked(source: str, roster: Roster) -> None:
    """Takes every state."""


@dataclass(frozen=True, kw_only=True)
class NewState:
    """A state pulled from another peer: outer parameters, then momentum, fp32; and the roster that led to it."""

    held: Held
    roster: Roster
    signed_roster: pb.Signed
    from_peer: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class WantedState:
    """Which state is wanted, and why."""

    min_round: int
    reason: str


async def fetch_state(
    merger: Merger,
    sources: Sequence[str],
    wanted: WantedState,
    roster_untrusted: Callable[[pb.Signed], Roster],
    check: Check = unchecked,
) -> NewState | None:
    """The newest state of the first source that delivers one that is new enough and passes `check`."""
    for source in sources:
        try:
            reply = await merger.calls.state(source, wanted.min_round)
            if not reply.HasField("manifest"):
                continue
            state = _state_untrusted(merger, reply, source, wanted, roster_untrusted(reply.roster))
            await check(source, state.roster)
            with merger.store.showing(state.held):
                await merger.pull(state.held, range(state.held.snapshot.num_chunks), [source])
                await merger.check_finite(state.held.part(0, state.held.snapshot.manifest.total_bytes))
            return state
        except PeerError as error:
            merger.blame(source, error)
    return None


def _state_untrusted(
    merger: Merger, reply: pb.StateReply, source: str, wanted: WantedState, roster: Roster
) -> NewState:
    kind, settings = pb.SNAPSHOT_KIND_STATE, merger.settings
    snapshot = manifest_untrusted(reply.manifest, settings.run_sha256, kind, settings.state_specs)
    manifest = snapshot.manifest
    if manifest.round < wanted.min_round or manifest.round != roster.round + 1:
        raise BadBytesError("a state of another round than asked for, or than its roster leads to")
    if manifest.roster_sha256.hex() != roster.digest or manifest.run_tokens != roster.total_tokens:
        raise BadBytesError("a state that does not fit its roster")
    check_token_rows_untrusted(manifest)
    return NewState(
        held=empty_held(snapshot), roster=roster, signed_roster=reply.roster, from_peer=source, reason=wanted.reason
    )

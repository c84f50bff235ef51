"""Fetch and check other peers' states: for late joiners, for the archive, and after a missed round."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from swarmtrain.errors import BadBytesError, PeerError
from swarmtrain.network.rounds.downloads import Downloads, check_finite, check_not_negative
from swarmtrain.network.rounds.merger import RoundSettings
from swarmtrain.network.rounds.roster import CheckedRosters, named
from swarmtrain.network.snapshots.state_provider import SECOND_MOMENT
from swarmtrain.network.snapshots.store import HeldSnapshot, empty_held, manifest_untrusted
from swarmtrain.network.tasks import Awaited
from swarmtrain.network.token_rows import check_token_rows_untrusted
from swarmtrain.protocol.rounds import messages as ev
from swarmtrain.protocol.rounds.rosters import AdvertisedRound, Roster
from swarmtrain.v1 import snapshot_pb2 as pb

_MAX_OFFERED = 8
"""Limit of offered states that are kept, the latest ones: most are never pulled, and none of their bytes have
arrived."""


@dataclass(frozen=True, kw_only=True)
class NewState:
    """State pulled from another peer (outer parameters, then momentum, fp32), and the roster that led to it."""

    held: HeldSnapshot
    roster: Roster
    signed_roster: pb.Signed
    from_peer: str
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class JoinedState:
    """State with which a peer begins that joins or comes back, and the reason for the choice."""

    begins: ev.JoinsWith
    state: NewState | None
    advertised: Mapping[str, AdvertisedRound]
    """Rounds advertised by the peers that answered."""


class StateSource(Protocol):
    """Source of other peers' states."""

    async def offered_untrusted(self, source: str, min_round: int) -> NewState | None:
        """Ask a peer for its state; pull none of its bytes yet. Returns None if it has none. Raises PeerError."""

    async def take(self, state: NewState) -> None:
        """Pull the state's bytes. Raises PeerError."""

    def blame(self, peer: str, error: PeerError) -> None:
        """Report this peer for offering a state that it did not deliver correctly."""


class PeerStates:
    """Implementation of `StateSource` over the network."""

    def __init__(self, downloads: Downloads, settings: RoundSettings, rosters: CheckedRosters) -> None:
        self._downloads, self._settings, self._rosters = downloads, settings, rosters
        sizes = [(spec.name.startswith(f"{SECOND_MOMENT}/"), spec.size_bytes) for spec in settings.state_specs]
        total_bytes = sum(size_bytes for _, size_bytes in sizes)
        second_bytes = sum(size_bytes for is_second, size_bytes in sizes if is_second)
        self._second_moments = (total_bytes - second_bytes, total_bytes)
        """Where a state's second moments begin and end, in bytes: they are its last tensors, if it has any."""

    async def offered_untrusted(self, source: str, min_round: int) -> NewState | None:
        """Ask a peer for its state; pull none of its bytes yet. See `StateSource`."""
        reply = await self._downloads.calls.state(source, min_round)
        if not reply.HasField("manifest"):
            return None
        roster, settings = self._rosters.read_untrusted(reply.roster).roster, self._settings
        snapshot = manifest_untrusted(reply.manifest, settings.run_sha256, pb.SNAPSHOT_KIND_STATE, settings.state_specs)
        manifest = snapshot.manifest
        if manifest.round < min_round or manifest.round != roster.round + 1:
            raise BadBytesError(
                "a state of another round than asked for, or than its roster leads to", code="bad-round"
            )
        if manifest.roster_sha256.hex() != roster.digest or manifest.run_tokens != roster.total_tokens:
            raise BadBytesError("a state that does not fit its roster", code="bad-chain")
        check_token_rows_untrusted(manifest)
        return NewState(held=empty_held(snapshot), roster=roster, signed_roster=reply.roster, from_peer=source)

    async def take(self, state: NewState) -> None:
        """Pull the state's bytes. See `StateSource`."""
        snapshot = state.held.snapshot
        with self._downloads.store.showing(state.held):
            await self._downloads.pull(state.held, range(snapshot.num_chunks), [state.from_peer])
            await check_finite(state.held.part(0, snapshot.manifest.total_bytes))
            await check_not_negative(state.held.part(*self._second_moments))

    def blame(self, peer: str, error: PeerError) -> None:
        """Blame this peer for a state that did not come. See `StateSource`."""
        self._downloads.blame(peer, error)


class RequestedStates:
    """Requested states, by the numbers that the engine gave them."""

    def __init__(self, source: StateSource) -> None:
        self._source = source
        self._offered: dict[int, NewState] = {}
        self._taken: dict[int, NewState] = {}
        """States whose bytes are being pulled, or have been pulled."""

    async def fetch(self, fetch: ev.RequestState) -> ev.StateOffered[pb.Signed] | ev.StateNotFetched:
        """Ask a peer to offer its state."""
        try:
            state = await self._source.offered_untrusted(fetch.source, fetch.min_round)
        except PeerError as error:
            self._source.blame(fetch.source, error)
            state = None
        if state is None:
            return ev.StateNotFetched(fetch.number)
        self._offered[fetch.number] = state
        while len(self._offered) > _MAX_OFFERED:
            del self._offered[next(iter(self._offered))]
        return ev.StateOffered(fetch.number, named(state.roster, state.signed_roster))

    async def take(self, number: int) -> ev.StateDownloaded | ev.StateNotFetched:
        """Pull the bytes of an offered state."""
        state = self._taken[number] = self._offered.pop(number)
        try:
            await self._source.take(state)
        except PeerError as error:
            self.drop(number)  # its partial bytes take memory
            self._source.blame(state.from_peer, error)
            return ev.StateNotFetched(number)
        return ev.StateDownloaded(number)

    def pop(self, number: int) -> NewState:
        """Return and forget a state that has been pulled completely."""
        return self._taken.pop(number)

    def drop(self, number: int) -> None:
        """Drop the state with this number, if there is one. A task that still pulls it leaves nothing behind."""
        self._offered.pop(number, None)
        self._taken.pop(number, None)


class StateSearch:
    """Asks other peers how far they are, and finds the state that holds among theirs."""

    def __init__(self, awaited: Awaited[ev.Event[pb.Signed, pb.ChainLink]]) -> None:
        self._awaited = awaited

    async def ask_now(self, peers: Sequence[str]) -> dict[str, AdvertisedRound]:
        """Ask `peers` for their rounds now. The result lacks the peers that do not answer."""
        search = self._awaited.next_number()
        survey = ev.SurveyPeers(search, tuple(peers))
        advertised: dict[str, AdvertisedRound] = await self._awaited.result(search, survey, ev.RoundAbandoned(search))
        return advertised

    async def join(self, peers: Sequence[str]) -> JoinedState:
        """Find out what this peer begins with when it joins or comes back: the state that holds among `peers`, or its
        own. No peer is asked twice in this search."""
        search = self._awaited.next_number()
        joined: JoinedState = await self._awaited.result(
            search, ev.Join(search, tuple(peers)), ev.RoundAbandoned(search)
        )
        return joined

    async def took(self, state: NewState) -> None:
        """Record that this peer adopts `state`: ask its source once more about the round under way, which this peer
        enters late."""
        search = self._awaited.next_number()
        await self._awaited.result(search, ev.StateAdopted(search, state.from_peer), ev.RoundAbandoned(search))

    async def holds(self, advertised: Mapping[str, AdvertisedRound]) -> bool:
        """Return whether this peer's chain holds against those of the peers in `advertised`.

        Each of them is asked for its chain before any is judged.
        """
        is_ours, _ = await self._seek(ev.SearchState(self._awaited.next_number(), advertised, fetches=False))
        return is_ours

    async def fetch_advertised_state(
        self, advertised: Mapping[str, AdvertisedRound], reason: str, above_tokens: int = 0
    ) -> NewState | None:
        """Fetch the state that holds among those of the peers in `advertised`, if it counts more than `above_tokens`
        tokens.

        Returns None if there is none, or if no peer delivers it.
        """
        _, state = await self._seek(ev.SearchState(self._awaited.next_number(), advertised, above_tokens))
        return None if state is None else dataclasses.replace(state, reason=reason)

    async def fetch_newest_state(self, peers: Sequence[str], reason: str, above_tokens: int = 0) -> NewState | None:
        """Ask `peers` for their rounds now, then fetch their newest state as `fetch_advertised_state` does."""
        return await self.fetch_advertised_state(await self.ask_now(peers), reason, above_tokens)

    async def _seek(self, seek: ev.SearchState) -> tuple[bool, NewState | None]:
        found: tuple[bool, NewState | None] = await self._awaited.result(
            seek.search, seek, ev.RoundAbandoned(seek.search)
        )
        return found

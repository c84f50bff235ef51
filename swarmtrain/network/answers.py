"""Answer the calls of other peers of the run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from swarmtrain.errors import BadBytesError, PeerError
from swarmtrain.network.asynchronous.publications import Publisher, Pulling, group_untrusted
from swarmtrain.network.daemon import swarm_time
from swarmtrain.network.discovery.greeter import Greeter
from swarmtrain.network.discovery.known_peers import KnownPeers
from swarmtrain.network.discovery.presence import OwnPresence
from swarmtrain.network.discovery.run_lookup import PublishedRun, version_fields
from swarmtrain.network.identity import peer_bytes
from swarmtrain.network.model_files.source_table import FileSourceTable
from swarmtrain.network.reachability.hosts import HostedPublications
from swarmtrain.network.rounds.runner import RoundRunner
from swarmtrain.network.snapshots.state_provider import StateProvider
from swarmtrain.network.snapshots.store import SnapshotStore
from swarmtrain.protocol.archive.departure import DepartureQueue, FellowDepartures
from swarmtrain.protocol.gossip.partners import Place
from swarmtrain.protocol.gossip.pulls import GroupName
from swarmtrain.v1 import snapshot_pb2 as pb

_STATE_WAIT_S = 3.0  # a caller may ask for the state of a round that this peer is about to finish
_MAX_OTHERS = 64  # presences in the reply to a greeting


@dataclass(frozen=True, kw_only=True)
class Serving:
    """Services of a peer besides its rounds. Given when it enters the swarm, since its exchange exists only then."""

    publishers: Mapping[tuple[GroupName, int], Publisher] = field(default_factory=dict)
    """Publishers of each tensor group and fragment, if rounds are asynchronous."""
    pulling: Pulling | None = None
    """Background pulls to stop at the goodbye."""
    called: Callable[[str], None] = lambda peer: None
    """Called with each peer that requests a publication."""
    rows: Callable[[], Sequence[pb.Signed]] = tuple
    """Returns other peers' rows of seen data, which go with the states offered."""
    places: Callable[[], Sequence[Mapping[str, Place]]] = tuple
    """Returns the places of all peers' publications, which go with the states offered."""
    hosting: HostedPublications | None = None
    """Publications hosted for hidden peers."""
    leavers: DepartureQueue | None = None
    """Volunteers that want to leave with work that is in no archive yet; only on a bootstrap, else None."""


@dataclass
class SwarmAnswers:
    """Implements `service.Answers`."""

    published: PublishedRun
    presence: OwnPresence
    peers: KnownPeers
    greeter: Greeter
    rounds: RoundRunner
    offer: StateProvider
    store: SnapshotStore
    serving: Callable[[], Serving]
    fellows: Callable[[], FellowDepartures | None]
    """Returns the fellow peers that leave, while this peer is leaving; else None."""
    history: Callable[[], pb.HistoryReply]
    """Returns what this peer tells of the run since its start."""
    refused: Callable[[str, PeerError], None]
    file_sources: FileSourceTable = field(init=False)

    def __post_init__(self) -> None:
        self.file_sources = FileSourceTable(self.published.sha256)

    def hello(self, request: pb.HelloRequest, caller: str) -> pb.HelloReply:
        """Answer a greeting with this peer's presence and those of other peers it knows. A caller that introduces
        itself is known from then on."""
        serving, away, run_sha256 = self.serving(), self.rounds.away, bytes.fromhex(self.published.sha256)
        is_source = request.HasField("file_source")
        with contextlib.suppress(BadBytesError):
            if is_source:
                self.file_sources.take_untrusted(request.file_source, caller)
            if request.HasField("presence"):
                self.peers.receive_untrusted(request.presence, caller, first_hand=not request.leaving)
                if request.leaving:
                    self.peers.left(caller)
                    if serving.hosting is not None:
                        serving.hosting.left(caller)
        if request.wants_host:
            hosting = None if away or self.presence.me.hidden else serving.hosting
            return pb.HelloReply(run_sha256=run_sha256, hosting=hosting is not None and hosting.ask(caller))
        asked = [each for each in (serving.leavers, self.fellows()) if each is not None and request.asks_to_leave]
        return pb.HelloReply(
            **version_fields(),
            run_sha256=run_sha256,
            time=swarm_time(),
            # Empty before `announce`, which finds out where this peer listens.
            presence=self.presence.signed() if self.presence.listens_at and not away else None,
            others=self.peers.others_than(caller, _MAX_OTHERS),
            file_sources=self.file_sources.others_than(caller) if is_source else (),
            away=away,
            stay=any(each.ask(caller, swarm_time()) for each in asked),
        )

    async def round(self, request: pb.RoundRequest, caller: str) -> pb.RoundReply:
        """Answer what this peer knows of a round, and greet the caller if it is unknown."""
        self.greeter.meet([caller])
        return await self.rounds.answer(request, caller)

    async def publication(self, request: pb.PublicationRequest, caller: str) -> pb.PublicationReply:
        """Return this peer's newest publication, or that of a guest, and record the caller's presence. The publication
        becomes a snapshot at the first request."""
        serving = self.serving()
        serving.called(caller)
        with contextlib.suppress(BadBytesError):
            self.peers.receive_untrusted(request.presence, caller)
        if request.author and request.author != peer_bytes(self.presence.me.peer):
            if serving.hosting is None or self.rounds.away:
                return pb.PublicationReply(away=True)
            return await serving.hosting.answer(request, caller)
        if self.rounds.away or not serving.publishers:
            return pb.PublicationReply(away=self.rounds.away)
        try:
            group = group_untrusted(request, {name for name, _ in serving.publishers})
        except BadBytesError as error:
            self.refused(caller, error)
            return pb.PublicationReply()
        publisher = serving.publishers.get((group, request.fragment))
        if publisher is None:
            return pb.PublicationReply()
        reply = pb.PublicationReply(presence=self.presence.signed(), busy=not self.store.has_room_for(caller))
        if not reply.busy and (held := await publisher.held_after(request, caller)) is not None:
            reply.manifest.CopyFrom(held.snapshot.signed)
        return reply

    async def state(self, request: pb.StateRequest) -> pb.StateReply:
        """Return the manifest of this peer's newest state, built at the first request.

        Empty if there is none, and in asynchronous rounds while this peer is away, since each peer then has its own
        state.
        """
        await self.rounds.wait_for_round(min(request.min_round, self.rounds.current_round + 1), _STATE_WAIT_S)
        found, last = await self.offer.held(request.min_round), self.rounds.last
        asynchronous = self.published.run.merge.kind.asynchronous
        if found is None or (asynchronous and self.rounds.away):
            return pb.StateReply()
        progress, held = found
        if asynchronous:
            return pb.StateReply(manifest=held.snapshot.signed)
        # The rounds may have moved on while the snapshot was built: never pair a state with another branch's roster.
        if last is None or last[0].digest != progress.roster_sha256:
            return pb.StateReply()
        return pb.StateReply(manifest=held.snapshot.signed, roster=last[1])

"""What this peer answers to others of its run, and with what."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from swarmtrain.errors import BadBytesError, PeerError
from swarmtrain.network.asynchronous.publications import Publisher, Pulling, section_untrusted
from swarmtrain.network.daemon import swarm_time
from swarmtrain.network.discovery.greeter import Greeter
from swarmtrain.network.discovery.known_peers import KnownPeers
from swarmtrain.network.discovery.presence import OwnPresence
from swarmtrain.network.discovery.run_lookup import PublishedRun, version_fields
from swarmtrain.network.identity import peer_bytes
from swarmtrain.network.reachability.hosts import HostedPublications
from swarmtrain.network.rounds.runner import RoundRunner
from swarmtrain.network.snapshots.state_provider import StateProvider
from swarmtrain.network.snapshots.store import SnapshotStore
from swarmtrain.protocol.archive.departure import DepartureQueue, FellowDepartures
from swarmtrain.protocol.gossip.partners import Place
from swarmtrain.protocol.gossip.pulls import Section
from swarmtrain.v1 import snapshot_pb2 as pb

__all__ = ["Serving", "SwarmAnswers"]

_STATE_WAIT_S = 3.0
_MAX_OTHERS = 64


@dataclass(frozen=True, kw_only=True)
class Serving:
    """What a peer does for others beside its rounds, given when it enters the swarm: its exchange is made by then."""

    publishers: Mapping[tuple[Section, int], Publisher] = field(default_factory=dict)
    """Where rounds are asynchronous: of each section of each fragment."""
    pulling: Pulling | None = None
    """Stopped at the goodbye."""
    called: Callable[[str], None] = lambda peer: None
    """Told who asks for a publication."""
    rows: Callable[[], Sequence[pb.Signed]] = tuple
    """What goes with the states that it offers of the data that others have seen."""
    places: Callable[[], Sequence[Mapping[str, Place]]] = tuple
    """The same of everyone's publications."""
    hosting: HostedPublications | None = None
    """For peers that nobody can dial."""
    leavers: DepartureQueue | None = None
    """Of a bootstrap: who would leave with what is in no archive."""


@dataclass
class SwarmAnswers:
    """Answers to the calls of `service.Answers`."""

    published: PublishedRun
    presence: OwnPresence
    peers: KnownPeers
    greeter: Greeter
    rounds: RoundRunner
    offer: StateProvider
    store: SnapshotStore
    serving: Callable[[], Serving]
    fellows: Callable[[], FellowDepartures | None]
    """Who leaves too, while this peer would leave."""
    refused: Callable[[str, PeerError], None]

    def hello(self, request: pb.HelloRequest, caller: str) -> pb.HelloReply:
        """Who we are and whom we know. A caller that introduces itself is known from then on."""
        serving, away, run_sha256 = self.serving(), self.rounds.away, bytes.fromhex(self.published.sha256)
        with contextlib.suppress(BadBytesError):
            if request.HasField("presence"):
                self.peers.hear_untrusted(request.presence, caller, first_hand=not request.leaving)
                if request.leaving:
                    self.peers.left(caller)
                    if serving.hosting is not None:
                        serving.hosting.left(caller)
        if request.wants_host:
            hosting = None if away or self.presence.me.hidden else serving.hosting
            return pb.HelloReply(run_sha256=run_sha256, hosting=hosting is not None and hosting.ask(caller))
        asked = [each for each in (serving.leavers, self.fellows()) if each is not None and request.asks_to_leave]
        return pb.HelloReply(
            **version_fields(self.published.run.needs),
            run_sha256=run_sha256,
            time=swarm_time(),
            presence=self.presence.signed() if self.presence.listens_at and not away else None,
            others=self.peers.others_than(caller, _MAX_OTHERS),
            away=away,
            stay=any(each.ask(caller, swarm_time()) for each in asked),
        )

    async def round(self, request: pb.RoundRequest, caller: str) -> pb.RoundReply:
        """What we know of a round."""
        self.greeter.meet([caller])
        return await self.rounds.answer(request)

    async def publication(self, request: pb.PublicationRequest, caller: str) -> pb.PublicationReply:
        """Our newest publication, made a snapshot at the first request. What the caller says of itself is news."""
        serving = self.serving()
        serving.called(caller)
        with contextlib.suppress(BadBytesError):
            self.peers.hear_untrusted(request.presence, caller)
        if request.author and request.author != peer_bytes(self.presence.me.peer):
            if serving.hosting is None or self.rounds.away:
                return pb.PublicationReply(away=True)
            return await serving.hosting.answer(request, caller)
        if self.rounds.away or not serving.publishers:
            return pb.PublicationReply(away=self.rounds.away)
        try:
            section = section_untrusted(request, {name for name, _ in serving.publishers})
        except BadBytesError as error:
            self.refused(caller, error)
            return pb.PublicationReply()
        publisher = serving.publishers.get((section, request.fragment))
        if publisher is None:
            return pb.PublicationReply()
        reply = pb.PublicationReply(presence=self.presence.signed(), busy=not self.store.has_room_for(caller))
        if not reply.busy and (held := await publisher.held_after(request, caller)) is not None:
            reply.manifest.CopyFrom(held.snapshot.signed)
        return reply

    async def state(self, request: pb.StateRequest) -> pb.StateReply:
        """The manifest of our newest state, made when first asked for; none where each has its own and we are away."""
        await self.rounds.wait_for_round(min(request.min_round, self.rounds.current_round + 1), _STATE_WAIT_S)
        found, last = await self.offer.held(request.min_round), self.rounds.last
        asynchronous = self.published.run.merge.kind.asynchronous
        if found is None or (asynchronous and self.rounds.away):
            return pb.StateReply()
        progress, held = found
        if asynchronous:
            return pb.StateReply(manifest=held.snapshot.signed)
        if last is None or last[0].digest != progress.roster_sha256:
            return pb.StateReply()
        return pb.StateReply(manifest=held.snapshot.signed, roster=last[1])

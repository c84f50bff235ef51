"""Greet other peers: introduce this one to them, and learn about them and the peers they know."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from swarmtrain.errors import BadBytesError, PeerError
from swarmtrain.network.daemon import swarm_time
from swarmtrain.network.discovery.known_peers import KnownPeers
from swarmtrain.network.discovery.presence import OwnPresence
from swarmtrain.network.node import Node
from swarmtrain.network.service import PeerCalls
from swarmtrain.network.tasks import end_tasks
from swarmtrain.protocol.membership.membership import PeerState
from swarmtrain.v1 import snapshot_pb2 as pb

_log = logging.getLogger(__name__)
_REDIALLED = 4  # peers that seem gone, dialled each time
_NEW_AT_ONCE = 32  # peers greeted each time that may not know us
_ASKED = 16  # volunteers asked for their progress each time
_GREETING_S = 3.0
_GREETING_PASSES = 3  # each pass greets those named in the pass before
_MAX_MEETINGS, _MAX_MET, _MEET_AGAIN_S = 16, 1024, 5.0


@dataclass
class Greeter:
    """Calls peers that are, may be or were present, and introduces this one."""

    node: Node
    calls: PeerCalls
    peers: KnownPeers
    presence: OwnPresence
    _meets: bool = field(default=False, init=False)
    _met_s: dict[str, float] = field(default_factory=dict, init=False)
    _meetings: set[asyncio.Task[None]] = field(default_factory=set, init=False)

    async def greet_everyone(self) -> None:
        """Greet every peer believed alive, and those that they name; their replies update what is known of them."""
        greeted: set[str] = set()
        for _ in range(_GREETING_PASSES):
            strangers = [info.peer for info in self.peers.membership.live() if info.peer not in greeted]
            await self.greet_all(strangers, self.presence.signed())
            greeted.update(strangers)

    async def greet_some(self) -> None:
        """Ask a sample of the volunteers for their progress, without introducing this peer."""
        volunteers = [info.peer for info in self.peers.membership.volunteers()]
        sample = random.sample(volunteers, min(_ASKED, len(volunteers)))
        await asyncio.gather(*(self._greet(peer, None) for peer in sample))

    async def greet(self, peer: str) -> None:
        """Greet one peer; its reply updates what is known of it."""
        await self._greet(peer, self.presence.signed())

    async def greet_newcomers(self) -> None:
        """Greet some peers that may not know this one yet."""
        live = self.peers.membership.live()
        new = [info.peer for info in live if info.peer not in self.peers.greeted]
        await self.greet_all(random.sample(new, min(_NEW_AT_ONCE, len(new))), self.presence.signed())

    async def redial(self) -> None:
        """Dial a few peers that seem gone. Otherwise two parts of a swarm that an outage has separated would never find
        each other again."""
        membership = self.peers.membership
        known = {*(peer.peer for peer in self.peers.through), *self.node.known_peers()} - {membership.me}
        away = [peer for peer in known if membership.state(peer) is not PeerState.LIVE]
        sample = random.sample(away, min(_REDIALLED, len(away)))
        await self.greet_all(sample, self.presence.signed())
        for peer in sample:
            if membership.state(peer) is PeerState.LIVE:
                await self.node.enter_routing_table(peer)

    async def greet_all(self, peers: Sequence[str], presence: pb.Signed | None = None) -> None:
        """Greet peers side by side. Returns after 3 s at most; slower replies are still processed."""
        tasks = [asyncio.create_task(self._greet(peer, presence)) for peer in peers]
        if tasks:
            await asyncio.wait(tasks, timeout=_GREETING_S)

    def start(self) -> None:
        """Begin to greet unknown peers."""
        self._meets = True

    def meet(self, peers: Iterable[str]) -> None:
        """Greet those of `peers` that take part in the run and are unknown here, or seemed gone.

        Peers that join at the same moment may each have been told of everyone but each other. A peer that does not know
        of another volunteer would close the round without it.
        """
        now, membership = swarm_time(), self.peers.membership
        self._met_s = {peer: met_s for peer, met_s in self._met_s.items() if now < met_s + _MEET_AGAIN_S}
        for peer in peers:
            known = peer == membership.me or membership.state(peer) is PeerState.LIVE
            if known or not self._meets or peer in self._met_s or not membership.has_room_for(peer):
                continue
            if len(self._meetings) >= _MAX_MEETINGS or len(self._met_s) >= _MAX_MET:
                return
            self._met_s[peer] = now
            meeting = asyncio.create_task(self.greet(peer))
            self._meetings.add(meeting)
            meeting.add_done_callback(self._meetings.discard)

    async def stop(self) -> None:
        """Stop greeting unknown peers, and cancel greetings under way."""
        self._meets = False
        await end_tasks(self._meetings)

    async def _greet(self, peer: str, presence: pb.Signed | None) -> None:
        """Greet a peer. Without `presence`, only ask for the peer's own presence."""
        peers = self.peers
        request = pb.HelloRequest(run_sha256=bytes.fromhex(self.presence.run_sha256), presence=presence)
        try:
            reply = await self.calls.hello(peer, request)
            peers.receive_untrusted(reply.presence, peer, answered=True, first_hand=not reply.away)
            if reply.away:  # its old record may still be read for some time
                peers.left(peer)
            for other in list(reply.others)[:64]:
                await asyncio.sleep(0)  # verifying all of them takes about 30 ms
                peers.receive_untrusted(other, None)
            if presence is not None and peers.membership.info(peer) is not None:
                peers.greeted.add(peer)
        except BadBytesError as error:
            peers.refused(peer, error)
        except PeerError as error:
            _log.debug("greeting %s failed: %s", peer, error)

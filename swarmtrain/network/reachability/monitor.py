"""Find out whether other peers can dial this one; if none can, keep connections to its hosts.

Runs beside the training, in the network thread. The result goes into this peer's presence: its hosts, and no address,
since none works.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from swarmtrain.errors import PeerError
from swarmtrain.network.daemon import swarm_time
from swarmtrain.network.reachability.probe import DialOutcome, ask_to_be_dialled, tcp_ports
from swarmtrain.network.service import PeerCalls
from swarmtrain.network.tasks import end_tasks
from swarmtrain.protocol.membership.budgets import is_public
from swarmtrain.protocol.membership.hosts import (
    NUM_ASKED,
    HostChoice,
    Reach,
    Reachability,
    from_outside,
    host_candidates,
)
from swarmtrain.protocol.membership.membership import Membership
from swarmtrain.v1 import snapshot_pb2 as pb
from swarmtrain.words import short_peer

_log = logging.getLogger(__name__)
_POLL_INTERVAL_S = 1.0
_KEEP_ALIVE_S = 3.0  # between two calls to each host, which keep its connection open (decision 19)
_CALL_S = 3.0
_SUSPENDED_S = 5.0  # a longer gap between two looks means that this process was suspended
_ANSWERS = {DialOutcome.REACHED: True, DialOutcome.NOT_REACHED: False}


def is_loopback_only(addresses: Sequence[str]) -> bool:
    """Return whether these addresses are on loopback only, for peers of this machine, which can always dial."""
    return all("/127." in address or "/::1/" in address for address in addresses)


@dataclass
class ReachabilityMonitor:
    """Reachability and hosts of this peer.

    `changed` is called, in the network thread, when `hidden` or `hosts` changes.
    """

    calls: PeerCalls
    membership: Membership
    greeting: Callable[[], pb.HelloRequest]
    """Returns the greeting to send to this peer's hosts."""
    listens_at: Callable[[], Sequence[str]]
    changed: Callable[[], None]
    has_hosts: bool = True
    """True if hosts serve what a hidden peer publishes; in synchronous rounds it is called over the connections that it
    has opened."""
    rng: random.Random = field(default_factory=random.Random)
    reachability: Reachability = field(default_factory=Reachability)
    choice: HostChoice = field(init=False)
    _asking: asyncio.Task[None] | None = field(default=None, init=False)
    _kept_s: float = field(default=float("-inf"), init=False)
    _looked_s: float = field(default=float("-inf"), init=False)
    _told: tuple[bool, tuple[str, ...]] = field(default=(False, ()), init=False)

    def __post_init__(self) -> None:
        self.choice = HostChoice(me=self.membership.me)

    @property
    def hidden(self) -> bool:
        """True if no other peer can dial this one."""
        return self.reachability.state is Reach.HIDDEN

    @property
    def hosts(self) -> tuple[str, ...]:
        """Hosts that serve this peer's publications; empty unless it is hidden."""
        return self.choice.serving if self.hidden else ()

    def in_words(self) -> str:
        """Describe to a person that nobody can dial this peer, and which hosts serve its publications; "" if it can be
        dialled."""
        if not self.hidden:
            return ""
        if not self.has_hosts:
            return "nobody can dial this computer; the others average its part of the model for it"
        through = " and ".join(self._name(host) for host in self.hosts)
        how = f"its work goes through {through}" if through else "it looks for others through which its work can go"
        return f"nobody can dial this computer; {how}"

    def _name(self, peer: str) -> str:
        info = self.membership.info(peer)
        return (info.name if info is not None else "") or short_peer(peer)

    async def keep(self) -> None:
        """Call `look` every second until cancelled."""
        try:
            while True:
                await self.look()
                await asyncio.sleep(_POLL_INTERVAL_S)
        finally:
            if self._asking is not None:
                await end_tasks([self._asking])

    async def look(self) -> None:
        """Ask other peers to dial this one if that is due, and call this peer's hosts if it has or needs any."""
        now = swarm_time()
        if now > self._looked_s + _SUSPENDED_S:  # this process was suspended: its hosts were not silent
            self.choice.clear()
        if self.reachability.is_due(now) and (self._asking is None or self._asking.done()):
            self._asking = asyncio.create_task(self._ask_to_be_dialled())
        if not self.hidden:
            self.choice.clear()
        elif not self.has_hosts:
            pass
        elif now >= self._kept_s + _KEEP_ALIVE_S or len(self.choice.serving) < self.choice.number:
            self._kept_s = now
            await self._keep_hosts()
        if self._told != (self.hidden, self.hosts):
            self._told = (self.hidden, self.hosts)
            self.changed()
        self._looked_s = swarm_time()

    async def _ask_to_be_dialled(self) -> None:
        ports = tcp_ports(self.listens_at())
        others = [candidate.peer for candidate in host_candidates(self.membership.live())]
        asked = self.rng.sample(others, min(NUM_ASKED, len(others))) if ports else []
        outcomes = await asyncio.gather(*(ask_to_be_dialled(self.calls, peer, ports) for peer in asked))
        outside = [any(map(is_public, await self.calls.node.seen_at(peer))) for peer in asked]
        answers = from_outside([(_ANSWERS.get(outcome), far) for outcome, far in zip(outcomes, outside, strict=True)])
        _log.info("can others dial this peer: %s", self.reachability.told(answers, swarm_time(), self.rng))

    async def _keep_hosts(self) -> None:
        """Choose new hosts where needed, and call each host: the call keeps the connection to it, or opens another."""
        for change in self.choice.choose(host_candidates(self.membership.live()), swarm_time()):
            _log.info("hosts of this peer: %s", change)
        await asyncio.gather(*(self._call(host) for host in self.choice.chosen))

    async def _call(self, host: str) -> None:
        try:
            reply = await self.calls.hello(host, self.greeting(), _CALL_S)
        except PeerError as error:
            _log.debug("host %s: %s", host, error)
        else:
            _log.debug("host %s: %s", host, self.choice.answered(host, reply.hosting, swarm_time()))

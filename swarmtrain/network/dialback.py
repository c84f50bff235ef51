"""The answer to "can you reach me?": this peer dials the one who asks, and says whether that worked.

What was measured of the daemon shapes it: told to connect to a peer that it is connected to, it says yes without
dialling; and it dials every address that it, or the libp2p DHT, has ever learnt of a peer beside those it was given.
So only an identity that nobody knows can be tested, and an answer counts only at an address that was asked for. (The
asker's part is that its listener dials nobody: see `dialling.ask_to_dial`.)
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from swarmtrain.errors import BadBytesError, UnreachableError
from swarmtrain.membership.dialling import DialBudget, dial_targets
from swarmtrain.network.identity import peer_bytes
from swarmtrain.network.node import Node
from swarmtrain.network.signing import open_signed_untrusted
from swarmtrain.v1 import snapshot_pb2 as pb

__all__ = ["DIAL_S", "PURPOSE", "DialBack"]

DIAL_S = 4.0
PURPOSE = "dial"
_MAX_AT_ONCE = 2
_MAX_TARGET_BYTES = 256


@dataclass
class DialBack:
    """Answers for one node."""

    node: Node
    limit_s: float = DIAL_S
    budget: DialBudget = field(default_factory=DialBudget)
    _at_once: int = 0

    async def answer(self, request: pb.DialRequest, caller: str) -> pb.DialReply:
        """Dial, if it is allowed. A failure is always told after the same time, so that it tells nothing more."""
        try:
            author, target = open_signed_untrusted(request.target, PURPOSE, "", pb.DialTarget, _MAX_TARGET_BYTES)
        except BadBytesError:
            return pb.DialReply(outcome=pb.DialReply.OUTCOME_REFUSED)
        if target.caller != peer_bytes(caller) or author in (caller, self.node.identity.peer_id):
            return pb.DialReply(outcome=pb.DialReply.OUTCOME_REFUSED)
        if self._at_once >= _MAX_AT_ONCE:
            return pb.DialReply(outcome=pb.DialReply.OUTCOME_BUSY)
        self._at_once += 1
        try:
            return await self._answer(author, target, caller)
        finally:
            self._at_once -= 1

    async def _answer(self, author: str, target: pb.DialTarget, caller: str) -> pb.DialReply:
        targets = dial_targets(await self.node.seen_at(caller), target.ports)
        if not targets or await self.node.seen_at(author):
            return pb.DialReply(outcome=pb.DialReply.OUTCOME_REFUSED)
        loop = asyncio.get_running_loop()
        if not self.budget.admit(targets, loop.time()):
            return pb.DialReply(outcome=pb.DialReply.OUTCOME_BUSY)
        until_s = loop.time() + self.limit_s
        address = await self._dial(author, targets)
        if address:
            return pb.DialReply(outcome=pb.DialReply.OUTCOME_REACHED, address=address)
        await asyncio.sleep(until_s - loop.time())
        return pb.DialReply(outcome=pb.DialReply.OUTCOME_NOT_REACHED)

    async def _dial(self, peer: str, targets: tuple[str, ...]) -> str:
        """The target at which `peer` answered; "" if it did at none."""
        try:
            await self.node.dial_once(peer, targets, self.limit_s)
            arrived = await self.node.seen_at(peer)
        except UnreachableError:
            return ""
        finally:
            await self.node.hang_up(peer)
        return next((address for address in arrived if address in targets), "")

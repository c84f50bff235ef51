"""Answer "can you reach me?": dial the peer that asks, and say whether that worked.

Two measured properties of the daemon shape this (decision 10). Told to connect to a connected peer, it says yes without
dialling; and it dials every address that it, or libp2p's DHT, has ever learned of a peer, besides those it was given.
So only an identity that nobody knows can be tested, and an answer counts only at one of the requested addresses. (The
asker, for its part, uses a listener that dials nobody: see `probe.ask_to_dial`.)

A peer that trains has its port in use and is known to everyone. It asks to be dialled itself, and the peer that it asks
dials as a stranger: with a daemon that lives for some seconds and has met nobody.
"""

from __future__ import annotations

import asyncio
import logging
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from swarmtrain.errors import BadBytesError, RunTimeError, UnreachableError
from swarmtrain.network.identity import load_or_create_identity, open_signed_untrusted, peer_bytes
from swarmtrain.network.node import Node, NodeSettings
from swarmtrain.protocol.membership.budgets import DialBudget, dial_targets
from swarmtrain.v1 import snapshot_pb2 as pb

DIAL_S = 4.0  # a failure is reported after exactly this
PURPOSE = "dial"
_log = logging.getLogger(__name__)
_MAX_AT_ONCE = 2  # dials for others
_MAX_TARGET_BYTES = 256


class Dialler(Protocol):
    """Node that dials: this peer's own node, or a temporary node that nobody knows (a stranger)."""

    async def dial_once(self, peer: str, addresses: tuple[str, ...], limit_s: float) -> None:
        """Dial a peer. Raises UnreachableError if nobody with that PeerID answers there."""

    async def seen_at(self, peer: str) -> tuple[str, ...]:
        """Return the addresses of the node's connections to `peer`."""

    async def hang_up(self, peer: str) -> None:
        """Close its connections to `peer`."""


@asynccontextmanager
async def _stranger() -> AsyncIterator[Dialler]:
    """Start a node that nobody knows and that knows nobody. Raises RunTimeError if it does not start."""
    with tempfile.TemporaryDirectory(prefix="swarmtrain-dial-") as folder:
        key_path = Path(folder) / "identity.key"
        settings = NodeSettings(directory=Path(folder), listen=("/ip4/127.0.0.1/tcp/0",), dht_mode="off")
        node = await Node.start(settings, load_or_create_identity(key_path), key_path)
        try:
            yield node
        finally:
            await node.stop()


@dataclass
class DialBack:
    """Answers dial requests for one node."""

    node: Node
    limit_s: float = DIAL_S
    budget: DialBudget = field(default_factory=DialBudget)
    stranger: Callable[[], AbstractAsyncContextManager[Dialler]] = _stranger
    _at_once: int = 0

    async def answer(self, request: pb.DialRequest, caller: str) -> pb.DialReply:
        """Dial the peer of the request, if that is allowed. A failure is always reported after the same time, so that
        the reply's timing reveals nothing."""
        peer, ports = caller, list(request.own_ports)
        if not ports:
            try:
                peer, target = open_signed_untrusted(request.target, PURPOSE, "", pb.DialTarget, _MAX_TARGET_BYTES)
            except BadBytesError:
                return pb.DialReply(outcome=pb.DialReply.OUTCOME_REFUSED)
            if target.caller != peer_bytes(caller) or peer in (caller, self.node.identity.peer_id):
                return pb.DialReply(outcome=pb.DialReply.OUTCOME_REFUSED)
            ports = list(target.ports)
        if self._at_once >= _MAX_AT_ONCE:
            return pb.DialReply(outcome=pb.DialReply.OUTCOME_BUSY)
        self._at_once += 1
        try:
            return await self._answer(peer, caller, ports)
        except RunTimeError as error:
            _log.debug("no stranger to dial with: %s", error)
            return pb.DialReply(outcome=pb.DialReply.OUTCOME_BUSY)
        finally:
            self._at_once -= 1

    async def _answer(self, peer: str, caller: str, ports: list[int]) -> pb.DialReply:
        """Dial `peer`. If the caller asks for itself, a stranger's node dials, because this node knows the caller
        already."""
        targets = dial_targets(await self.node.seen_at(caller), ports)
        # Told to connect to a connected peer, the daemon says yes without dialling (decision 10).
        if not targets or (peer != caller and await self.node.seen_at(peer)):
            return pb.DialReply(outcome=pb.DialReply.OUTCOME_REFUSED)
        loop = asyncio.get_running_loop()
        if not self.budget.admit(targets, loop.time()):
            return pb.DialReply(outcome=pb.DialReply.OUTCOME_BUSY)
        async with self.stranger() if peer == caller else nullcontext(self.node) as dialler:
            until_s = loop.time() + self.limit_s
            address = await self._dial(dialler, peer, targets)
        if address:
            return pb.DialReply(outcome=pb.DialReply.OUTCOME_REACHED, address=address)
        await asyncio.sleep(until_s - loop.time())
        return pb.DialReply(outcome=pb.DialReply.OUTCOME_NOT_REACHED)

    async def _dial(self, dialler: Dialler, peer: str, targets: tuple[str, ...]) -> str:
        """Return the target at which `peer` answered, or ""."""
        try:
            await dialler.dial_once(peer, targets, self.limit_s)
            arrived = await dialler.seen_at(peer)
        except UnreachableError:
            return ""
        finally:
            await dialler.hang_up(peer)
        return next((address for address in arrived if address in targets), "")

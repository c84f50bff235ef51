"""Advertise this peer: its signed presence, sent with calls, and its records in the DHT."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypedDict, Unpack

from swarmtrain.network.daemon import swarm_time
from swarmtrain.network.discovery.records import PRESENCE, presence_to_proto, progress_to_proto
from swarmtrain.network.discovery.token_accounting import TokenAccounting
from swarmtrain.network.identity import Identity, sign
from swarmtrain.network.node import Node
from swarmtrain.protocol.membership.membership import PeerInfo
from swarmtrain.protocol.membership.records import bucket_of, choose_bucket
from swarmtrain.protocol.pipeline.balance import StagePeer
from swarmtrain.protocol.rounds.roles import LinkRates
from swarmtrain.protocol.tokens.progress import Progress
from swarmtrain.v1 import snapshot_pb2 as pb

_MAX_OWN_ADDRESSES = 8
_PROGRESS_TTL_S = 86_400.0  # a day: the tokens of a peer that left still count


class _Changes(TypedDict, total=False):
    """Fields of a `PeerInfo` that `OwnPresence.change` sets."""

    round: int
    run_tokens: int
    inner_steps: int
    loss: float
    place: StagePeer
    is_finished: bool


@dataclass
class OwnPresence:
    """Presence of this peer. `me` is what was last advertised."""

    identity: Identity
    run_sha256: str
    me: PeerInfo
    steps_done: Callable[[], int]
    """Returns the inner steps done in the present round."""
    link: Callable[[], LinkRates | None] = lambda: None
    """Returns this peer's link, as it is measured by now; None if it is not told."""
    listens_at: tuple[str, ...] = field(default=(), init=False)

    def describe(self, *, round: int, steps_per_s: float, run_tokens: int, inner_steps: int = 0) -> None:
        """Set the progress that the next presence advertises."""
        self.me = dataclasses.replace(
            self.me, round=round, steps_per_s=steps_per_s, run_tokens=run_tokens, inner_steps=inner_steps
        )

    def describe_part(self, part: int, tokens: int) -> None:
        """Set the newest publication of this round that the next presence advertises."""
        self.me = dataclasses.replace(self.me, part=part, part_tokens=tokens)

    def change(self, **what: Unpack[_Changes]) -> None:
        """Set other fields that the next presence advertises."""
        self.me = dataclasses.replace(self.me, **what)

    def describe_place(self, listens_at: Sequence[str], hidden: bool, hosts: tuple[str, ...]) -> None:
        """Set how the next presence says that this peer can be reached. Keeps the old addresses if `listens_at` is
        empty."""
        self.listens_at = tuple(listens_at) or self.listens_at
        addresses = () if hidden else self.listens_at[:_MAX_OWN_ADDRESSES]
        self.me = dataclasses.replace(self.me, addresses=addresses, hidden=hidden, hosts=hosts)

    def renewed(self) -> pb.Presence:
        """Return a new presence, stamped with the present time."""
        # Strictly later than the last stamp, even if the clock was set back: others keep the presence of the latest
        # stamp.
        stamp = max(swarm_time(), self.me.stamp + 1e-6)
        self.me = dataclasses.replace(self.me, stamp=stamp, inner_steps_done=self.steps_done(), link=self.link())
        return presence_to_proto(self.me)

    def signed(self) -> pb.Signed:
        """Return a new presence, signed. Peers that receive it may pass it on to others."""
        return sign(self.identity, PRESENCE, self.run_sha256, self.renewed())


@dataclass
class OwnRecords:
    """Stores this peer's records in the DHT, each kind in the shallowest bucket with room, which is looked up once."""

    node: Node
    presence: OwnPresence
    accounting: TokenAccounting
    presence_ttl_s: float
    safe: Callable[[], Progress | None]
    """Returns the progress that is safe on this peer's disk, so that no kill can take it back."""
    _buckets: dict[str, str] = field(default_factory=dict, init=False)

    async def store(self) -> None:
        """Store this peer's presence record, which expires soon, and if it trains, its progress record, which is kept
        for a day."""
        run_sha256 = bytes.fromhex(self.presence.run_sha256)
        presence = pb.Record(run_sha256=run_sha256, presence=self.presence.renewed())
        await self._store(presence, self.presence_ttl_s)
        safe = self.safe()
        if self.presence.me.training and safe is not None:
            tokens = self.accounting.own_to_tell(safe.peer_tokens.get(self.presence.me.peer, 0))
            message = progress_to_proto(tokens, safe.round, name=self.presence.me.name)
            progress = pb.Record(run_sha256=run_sha256, progress=message)
            await self._store(progress, _PROGRESS_TTL_S)

    async def _store(self, record: pb.Record, lifetime_s: float) -> None:
        """Store a record in its bucket."""
        kind = record.WhichOneof("body")
        assert kind is not None
        if kind not in self._buckets:
            self._buckets[kind] = await self._find_bucket(record.run_sha256, kind)
        record.prefix = self._buckets[kind]
        await self.node.store(record, lifetime_s)

    async def _find_bucket(self, run_sha256: bytes, kind: str) -> str:
        depth, me = 0, self.presence.me.peer
        while True:
            prefix = bucket_of(me, depth)
            occupants = await self.node.read_bucket(run_sha256, kind, prefix)
            if choose_bucket(me, depth, occupants.keys())[0]:
                return prefix
            depth += 1

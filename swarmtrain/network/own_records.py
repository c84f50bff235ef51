"""Storing this peer's own records: each kind in the shallowest bucket with room, found once."""

from __future__ import annotations

from dataclasses import dataclass, field

from swarmtrain.network.node import Node
from swarmtrain.protocol.records import bucket_of, choose_bucket
from swarmtrain.v1 import snapshot_pb2 as pb

__all__ = ["OwnRecords"]


@dataclass
class OwnRecords:
    """Where this peer's records live."""

    node: Node
    _buckets: dict[str, str] = field(default_factory=dict)

    async def store(self, record: pb.Record, lifetime_s: float) -> None:
        """Store a record, whose bucket is filled in here."""
        kind = record.WhichOneof("body")
        assert kind is not None
        if kind not in self._buckets:
            self._buckets[kind] = await self._find_bucket(record.run_sha256, kind)
        record.prefix = self._buckets[kind]
        await self.node.store(record, lifetime_s)

    async def _find_bucket(self, run_sha256: bytes, kind: str) -> str:
        depth, me = 0, self.node.identity.peer_id
        while True:
            prefix = bucket_of(me, depth)
            occupants = await self.node.read_bucket(run_sha256, kind, prefix)
            if choose_bucket(me, depth, occupants.keys())[0]:
                return prefix
            depth += 1

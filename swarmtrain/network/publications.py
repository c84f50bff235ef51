"""What this peer publishes in asynchronous rounds.

The trainer hands over a publication and goes on; nothing is computed before somebody asks. At the first request it is
quantised, hashed and signed, in a thread, and from then on it is that snapshot: every reader decodes the same bytes.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from swarmtrain.network.identity import Identity
from swarmtrain.network.snapshots import Body, Held, SnapshotStore, TensorSpec, build_snapshot
from swarmtrain.v1 import snapshot_pb2 as pb

__all__ = ["Publication", "Publisher"]

_KEPT = 2
"""So many publications stay, and those being read."""


@dataclass(frozen=True, kw_only=True)
class Publication:
    """A round's work up to its part number `part`; `encode` makes the bytes: theta, then the pseudo-gradient."""

    round: int
    part: int
    tokens: int
    inner_steps: int
    author_tokens: int
    encode: Callable[[], Body]


@dataclass
class Publisher:
    """Keeps the newest publication, and makes it a snapshot when it is asked for."""

    identity: Identity
    run_sha256: str
    specs: Sequence[TensorSpec]
    store: SnapshotStore
    newest: Publication | None = None
    """Set by the trainer's thread, read in the network's."""
    shard_rows: Callable[[], Iterable[pb.Signed]] = tuple
    """Who has seen which data, for the manifest."""
    _built: deque[tuple[Publication, Held]] = field(default_factory=deque)
    _building: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def held_after(self, request: pb.PublicationRequest) -> Held | None:
        """The newest publication as a snapshot, if the caller does not have it."""
        async with self._building:
            newest = self.newest
            if newest is None or (request.has_any and (newest.round, newest.part) == (request.round, request.part)):
                return None
            if not self._built or self._built[-1][0] is not newest:
                held = await asyncio.to_thread(self._build, newest)
                self._built.append((newest, held))
                self.store.add(held)
                while len(self._built) > _KEPT:
                    self.store.drop(self._built.popleft()[1].snapshot.sha256)
            return self._built[-1][1]

    def _build(self, publication: Publication) -> Held:
        manifest = pb.Manifest(
            run_sha256=bytes.fromhex(self.run_sha256),
            kind=pb.SNAPSHOT_KIND_PUBLICATION,
            round=publication.round,
            part=publication.part,
            tokens=publication.tokens,
            inner_steps=publication.inner_steps,
            author_tokens=publication.author_tokens,
            coverage=self.shard_rows(),
        )
        return build_snapshot(self.identity, manifest, self.specs, publication.encode())

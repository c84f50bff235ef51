"""Stream of a pull without a network: the sender's replies, one after the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from swarmtrain.network.snapshots.replies import put_untrusted
from swarmtrain.v1 import snapshot_pb2 as pb


class Replies:
    """Fake `PullStream` over the replies of `SnapshotStore.serve`."""

    def __init__(self, replies: Any) -> None:
        self._replies = replies

    async def __anext__(self) -> pb.PullReply:
        reply: pb.PullReply = await anext(self._replies)
        return reply

    async def take(self, chunks: range, room_of: Callable[[int], memoryview], came: Callable[[int], None]) -> None:
        """Take the chunk of the next reply."""
        put_untrusted(await self.__anext__(), chunks.start, room_of(chunks.start))
        came(chunks.start)

    async def count(self, size_bytes: int) -> None:
        """Count nothing."""

    async def aclose(self) -> None:
        """Hang up."""
        await self._replies.aclose()

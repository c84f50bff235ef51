"""Pull from one peer: only a stream that breaks off is requested again, from where it broke."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
from codes import raises_code
from replies import Replies

from swarmtrain.errors import BadBytesError, BusyError, PeerError, StalledError, UnreachableError
from swarmtrain.network.identity import new_identity
from swarmtrain.network.snapshots.download import download_snapshot
from swarmtrain.network.snapshots.store import (
    Body,
    HeldSnapshot,
    PullLimits,
    SnapshotStore,
    TensorSpec,
    build_snapshot,
    empty_held,
)
from swarmtrain.run import CHUNK_BYTES
from swarmtrain.v1 import snapshot_pb2 as pb

NUM_CHUNKS = 6
BYTES = hashlib.shake_128(b"a state").digest(NUM_CHUNKS * CHUNK_BYTES)
SPECS = (TensorSpec("weights", (len(BYTES) // 4,)),)
WHOLE = build_snapshot(new_identity(), pb.Manifest(run_sha256=bytes(32)), SPECS, Body([BYTES]))
OK = pb.PullReply(status=pb.PullReply.STATUS_OK)


def brought(
    serve: Any, asked: list[int], chunks: range | None = None, wrong: list[PeerError | None] | None = None
) -> HeldSnapshot:
    """Pull from a peer that serves so; `asked` receives the first chunk of each pull."""
    held, slots = empty_held(WHOLE.snapshot), asyncio.Semaphore(1)

    async def open_pull(peer: str, request: pb.PullRequest) -> Replies:
        assert slots.locked()
        asked.append(request.first_chunk)
        return Replies(serve(request))

    async def run() -> None:
        limits = PullLimits(stall_limit_s=0.05, busy_limit_s=0.0)
        found = await download_snapshot(
            SimpleNamespace(open_pull=open_pull, pull_slots=slots), "anna", held, limits, chunks
        )
        if wrong is not None:
            wrong.append(found)

    asyncio.run(run())
    return held


def serving(*num_served: int) -> Any:
    """Return a store that serves so many chunks of each pull."""
    served = iter(num_served)
    store = SnapshotStore(num_served=lambda num_chunks: min(num_chunks, next(served)))
    store.add(WHOLE)
    return store.serve


def test_a_stream_that_breaks_off_goes_on_where_it_broke() -> None:
    asked, wrong = list[int](), list[PeerError | None]()
    held = brought(serving(2, 1, 6), asked, wrong=wrong)
    assert held.complete and asked == [0, 2, 3] and wrong == [None]
    assert held.buffer is not None and bytes(held.buffer) == BYTES


def test_a_part_goes_on_too() -> None:
    asked = list[int]()
    held = brought(serving(1, 6), asked, range(3))
    assert held.have == {0, 1, 2} and asked == [0, 1]


def test_three_times_at_most() -> None:
    asked = list[int]()
    with raises_code("broken-off", UnreachableError):
        brought(serving(2, 0, 0, 0, 6), asked)
    assert asked == [0, 2, 2, 2], "without any chunk that comes"


async def lies(request: pb.PullRequest) -> AsyncIterator[pb.PullReply]:
    yield OK
    for chunk in range(NUM_CHUNKS):
        yield pb.PullReply(chunk=chunk, data=bytes(CHUNK_BYTES))


async def stands_still(request: pb.PullRequest) -> AsyncIterator[pb.PullReply]:
    yield OK
    yield pb.PullReply(chunk=0, data=BYTES[:CHUNK_BYTES])
    await asyncio.Event().wait()


async def is_busy(request: pb.PullRequest) -> AsyncIterator[pb.PullReply]:
    yield pb.PullReply(status=pb.PullReply.STATUS_BUSY)


async def has_it_not(request: pb.PullRequest) -> AsyncIterator[pb.PullReply]:
    yield pb.PullReply(status=pb.PullReply.STATUS_UNKNOWN)


@pytest.mark.parametrize(
    ("serve", "error"),
    [(lies, BadBytesError), (stands_still, StalledError), (is_busy, BusyError), (has_it_not, UnreachableError)],
)
def test_whoever_does_anything_else_is_not_asked_again(serve: Any, error: type[PeerError]) -> None:
    asked = list[int]()
    with pytest.raises(error):
        brought(serve, asked)
    assert asked == [0]


def test_what_is_wrong_when_all_is_here_is_told() -> None:
    async def endless(request: pb.PullRequest) -> AsyncIterator[pb.PullReply]:
        async for reply in serving(6)(request):
            yield reply if not reply.end else OK

    wrong = list[PeerError | None]()
    assert brought(endless, [], wrong=wrong).complete
    assert isinstance(wrong[0], BadBytesError)

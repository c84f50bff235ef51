"""A state whose stream breaks off is asked for again, from where it broke; a wrong one is not."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
from replies import Replies

from swarmtrain.errors import BadBytesError, UnreachableError
from swarmtrain.network.consensus import StateFetcher
from swarmtrain.network.identity import new_identity
from swarmtrain.network.snapshots import (
    CHUNK_BYTES,
    Body,
    Held,
    PullLimits,
    SnapshotStore,
    TensorSpec,
    build_snapshot,
    empty_held,
)
from swarmtrain.v1 import snapshot_pb2 as pb

NUM_CHUNKS = 6
BYTES = hashlib.shake_128(b"a state").digest(NUM_CHUNKS * CHUNK_BYTES)
SPECS = (TensorSpec("weights", (len(BYTES) // 4,)),)
WHOLE = build_snapshot(new_identity(), pb.Manifest(run_sha256=bytes(32)), SPECS, Body([BYTES]))


def bring(serve: Any, asked: list[int]) -> Held:
    """What came from a peer that serves so; `asked` gets the first chunk of each pull."""
    held = empty_held(WHOLE.snapshot)

    async def open_pull(peer: str, request: pb.PullRequest) -> Replies:
        asked.append(request.first_chunk)
        return Replies(serve(request))

    calls: Any = SimpleNamespace(open_pull=open_pull)
    settings: Any = SimpleNamespace(pull=PullLimits())
    fetcher = StateFetcher(calls, SnapshotStore(), settings, lambda peer, error: None)
    asyncio.run(fetcher._bring(held, range(NUM_CHUNKS), "anna"))
    return held


def serving(*num_served: int) -> Any:
    """A store that serves so many chunks of each pull."""
    served = iter(num_served)
    store = SnapshotStore(num_served=lambda num_chunks: min(num_chunks, next(served)))
    store.add(WHOLE)
    return store.serve


def test_a_stream_that_breaks_off_goes_on_where_it_broke() -> None:
    asked = list[int]()
    held = bring(serving(2, 1, 6), asked)
    assert held.complete and asked == [0, 2, 3]
    assert held.buffer is not None and bytes(held.buffer) == BYTES


def test_three_times_at_most() -> None:
    asked = list[int]()
    with pytest.raises(UnreachableError, match="ended early"):
        bring(serving(2, 0, 1, 6), asked)
    assert asked == [0, 2, 2]


def test_wrong_bytes_are_not_asked_for_again() -> None:
    async def lies(request: pb.PullRequest) -> AsyncIterator[pb.PullReply]:
        yield pb.PullReply(status=pb.PullReply.STATUS_OK)
        for chunk in range(NUM_CHUNKS):
            yield pb.PullReply(chunk=chunk, data=bytes(CHUNK_BYTES))

    asked = list[int]()
    with pytest.raises(BadBytesError):
        bring(lies, asked)
    assert asked == [0]

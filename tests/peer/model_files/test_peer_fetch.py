"""Files fetched from peers that are quick, lying, changed or gone, onto a disk that may be full: none comes twice."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from codes import raises_code
from model_files import CONTENTS, NUM_CHUNKS, WEIGHTS, FilePeer, FilePeers, model_folder, pinned, write_model
from virtual_loop import virtually

from swarmtrain.errors import RunTimeError
from swarmtrain.network.links.throttle import Throttle
from swarmtrain.network.model_files.fetch import PeerFetch
from swarmtrain.network.snapshots.store import PullLimits, SnapshotStore
from swarmtrain.peer.model_files.fetcher import Disk
from swarmtrain.peer.model_files.model_folder import ModelFolder
from swarmtrain.protocol.pinned_files.file_list import PinnedFile, PinnedFiles
from swarmtrain.run import CHUNK_BYTES
from swarmtrain.v1 import snapshot_pb2 as pb

TOTAL = sum(map(len, CONTENTS.values()))


class World:
    """Some peers that have a model, and one that fetches it."""

    def __init__(self, folder: Path, num_peers: int = 2) -> None:
        self.folder, self.source = folder, write_model(folder / "source")
        self.files = pinned(self.source)
        whole = [model_folder(folder / f"peer-{number}", self.copy(number), self.files) for number in range(num_peers)]
        self.peers = FilePeers({f"peer-{number}": FilePeer(each.served_files()) for number, each in enumerate(whole)})
        self.blamed: list[tuple[str, str]] = []

    def copy(self, number: int) -> Path:
        return write_model(self.folder / f"copy-{number}")

    @property
    def sent_bytes(self) -> int:
        return sum(peer.sent_bytes for peer in self.peers.peers.values())

    @property
    def here(self) -> ModelFolder:
        return ModelFolder(self.folder / "here", self.files)

    def fetch(self, look: Callable[[PeerFetch], None] = lambda fetch: None, files: PinnedFiles | None = None) -> float:
        """Fetch all files; returns the seconds that it took. `look` is called at each step."""
        self.files = files or self.files
        here = self.here

        async def run(clock: Any) -> float:
            fetch = PeerFetch(
                files=self.files.files,
                disk=Disk(here),
                calls=self.peers,
                limits=PullLimits(stall_limit_s=1.0, clock=clock),
                blame=lambda peer, error: self.blamed.append((peer, error.code)),
                find=self.peers.find,
                clock=clock,
            )
            step = fetch._step

            async def looked_at() -> None:
                await step()
                look(fetch)

            fetch._step = looked_at  # type: ignore[method-assign]
            await fetch.run()
            return clock()

        with here.locked(lambda: None):
            return virtually(run)

    def assert_complete(self) -> None:
        assert {name: (self.here.path / name).read_bytes() for name in CONTENTS} == CONTENTS
        assert not list(self.here.path.glob("*.part"))


def test_two_sources_share_the_work_and_nothing_is_sent_twice(tmp_path: Path) -> None:
    world, seen = World(tmp_path), list[int]()
    world.fetch(lambda fetch: seen.append(fetch.here_bytes))
    world.assert_complete()
    assert world.sent_bytes == TOTAL == seen[-1] and seen == sorted(seen)
    assert all(peer.sent_bytes > 0 for peer in world.peers.peers.values()) and not world.blamed


def test_what_was_fetched_is_served_to_the_next(tmp_path: Path) -> None:
    world = World(tmp_path, num_peers=1)
    here = world.here
    world.fetch()
    with here.locked(lambda: None):
        assert all(here.has(file) for file in here.files.files)
    world.peers = FilePeers({"here": FilePeer(here.served_files())})
    world.folder = tmp_path / "another"
    world.fetch()
    world.assert_complete()


class KilledError(Exception):
    """Ends a fetch as a kill does."""


def test_after_a_kill_only_the_rest_is_fetched(tmp_path: Path) -> None:
    world = World(tmp_path)
    for peer in world.peers.peers.values():
        peer.num_served = lambda num_chunks: min(num_chunks, 2)

    def kill(fetch: PeerFetch) -> None:
        if fetch.here_bytes > 5 * CHUNK_BYTES:
            raise KilledError

    with pytest.raises(KilledError):
        world.fetch(kill)
    kept = len(list(world.here.part(world.files.files[1]).kept_chunks()))
    assert 5 <= kept < NUM_CHUNKS - 5
    before = world.sent_bytes
    world.fetch()
    world.assert_complete()
    assert world.sent_bytes - before <= TOTAL - kept * CHUNK_BYTES


def test_one_that_lies_is_refused_and_another_delivers(tmp_path: Path) -> None:
    world = World(tmp_path)
    path = tmp_path / "copy-0" / "model.safetensors"
    state = path.stat()
    path.write_bytes(WEIGHTS[:CHUNK_BYTES] + bytes(len(WEIGHTS) - CHUNK_BYTES))
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    world.fetch()
    world.assert_complete()
    assert world.blamed == [("peer-0", "bad-hash")]
    assert world.peers.peers["peer-1"].sent_bytes >= (NUM_CHUNKS - 2) * CHUNK_BYTES


def test_a_source_whose_files_have_changed_serves_none(tmp_path: Path) -> None:
    world = World(tmp_path)
    (tmp_path / "copy-0" / "model.safetensors").write_bytes(WEIGHTS[::-1])
    os.utime(tmp_path / "copy-0" / "model.safetensors", ns=(1, 1))
    world.fetch()
    world.assert_complete()
    assert not world.blamed


def test_a_source_that_goes_is_replaced_by_one_that_comes(tmp_path: Path) -> None:
    world = World(tmp_path)
    gone = world.peers.peers.pop("peer-1")
    world.peers.peers["peer-0"].num_served = lambda num_chunks: min(num_chunks, 3)

    def change(fetch: PeerFetch) -> None:
        if fetch.here_bytes > 5 * CHUNK_BYTES and "peer-0" in world.peers.peers:
            del world.peers.peers["peer-0"]
            world.peers.peers["peer-1"] = gone

    took_s = world.fetch(change)
    world.assert_complete()
    assert gone.sent_bytes > 0 and took_s < 60


def test_a_full_disk_ends_it_and_keeps_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world, left, pwrite = World(tmp_path), [8], os.pwrite

    def full(*args: Any) -> int:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return pwrite(*args)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space left"):
        world.fetch()
    monkeypatch.setattr(os, "pwrite", pwrite)
    before, kept = world.sent_bytes, len(world.here.part(world.files.files[1]).kept_chunks())
    assert kept >= 7
    world.fetch()
    world.assert_complete()
    assert world.sent_bytes - before <= TOTAL - kept * CHUNK_BYTES


def test_it_gives_up_when_nobody_has_them(tmp_path: Path) -> None:
    world = World(tmp_path, num_peers=0)
    world.peers.peers["peer"] = FilePeer({})
    with raises_code("files-not-delivered", RunTimeError):
        world.fetch()


def test_a_file_that_is_pinned_wrongly_is_the_publishers_fault(tmp_path: Path) -> None:
    world = World(tmp_path)
    config, weights = world.files.files
    wrong = PinnedFile(weights.name, weights.size_bytes, "ab" * 32, weights.chunks_sha256)
    for peer in world.peers.peers.values():
        peer.served = {**peer.served, wrong.sha256: peer.served[weights.sha256]}
    with raises_code("files-not-delivered", RunTimeError, "model.safetensors"):
        world.fetch(files=PinnedFiles((config, wrong)))


def test_a_reader_waits_for_its_turn_on_a_limited_link(tmp_path: Path) -> None:
    """One reader of model files at a time: a second is told to wait, and snapshots have their own slots."""
    world = World(tmp_path, num_peers=1)
    peer = world.peers.peers["peer-0"]

    async def run(clock: Any) -> None:
        store = SnapshotStore(up=Throttle(CHUNK_BYTES, clock), clock=clock)
        file = peer.served[world.files.files[1].sha256]
        request = pb.PullRequest(num_chunks=4)
        first = store.serve_model_file(file, request, peer="anna")
        assert (await anext(first)).status == pb.PullReply.STATUS_OK
        await anext(first)
        second = store.serve_model_file(file, request, peer="ben")
        assert (await anext(second)).status == pb.PullReply.STATUS_BUSY
        assert store.has_room_for("ben")
        assert [reply async for reply in first][-1].end
        assert 2.9 < clock() < 4.0
        third = store.serve_model_file(file, pb.PullRequest(first_chunk=NUM_CHUNKS, num_chunks=1), peer="ben")
        assert (await anext(third)).status == pb.PullReply.STATUS_UNKNOWN

    virtually(run)

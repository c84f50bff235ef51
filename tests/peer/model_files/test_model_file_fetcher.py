"""Order in which a peer looks for its model's files: `--model-dir`, the cache, the hub, other peers; its words."""

from __future__ import annotations

import asyncio
import dataclasses
import errno
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from codes import raises_code
from model_files import CONTENTS, WEIGHTS, FilePeer, FilePeers, model_folder, pinned, write_model
from small_hub import SmallHub, small_hub

from swarmtrain.errors import BusyError, RunFileError, RunTimeError
from swarmtrain.events import ArrivingEvent, Event, WarningEvent
from swarmtrain.network.node import NetworkThread
from swarmtrain.peer.control.arrival import FileProgress
from swarmtrain.peer.control.board import StatusBoard
from swarmtrain.peer.lifecycle.stop import Interrupted, StopFlag
from swarmtrain.peer.model_files import fetcher as fetcher_module
from swarmtrain.peer.model_files.fetcher import (
    FilesPlace,
    ModelFileFetcher,
    SwarmSource,
    fetch_and_serve,
    names_in,
    pin_folder,
)
from swarmtrain.peer.model_files.model_folder import ModelFolder
from swarmtrain.run import CHUNK_BYTES, NetworkSection

TOTAL = sum(map(len, CONTENTS.values()))


@dataclass
class Peer:
    """Peer that needs a model's files, and another one that has them."""

    folder: Path
    others: FilePeers
    network: NetworkThread
    base: str = "tiny"
    given: Path | None = None
    events: list[Event] = field(default_factory=list)
    stop: StopFlag = field(default_factory=StopFlag)
    on_event: Callable[[Event], None] = lambda event: None
    down_mbit: float | None = None

    def __post_init__(self) -> None:
        self.files = pinned(write_model(self.folder / "source"))
        self.board = StatusBoard("volunteer", 0.0)

    @property
    def place(self) -> FilesPlace:
        clock = iter(range(10**6))  # three seconds between two looks
        progress = FileProgress(self.board, self._emit, lambda: 3.0 * next(clock))
        return FilesPlace(
            cache=self.folder / "cache",
            given=self.given,
            progress=progress,
            emit=self._emit,
            stop=self.stop,
            down_mbit=self.down_mbit,
        )

    def _emit(self, event: Event) -> None:
        self.events.append(event)
        self.on_event(event)

    def fetch(self, alone: bool = False) -> ModelFolder:
        run = SimpleNamespace(model=SimpleNamespace(base=self.base), network=NetworkSection(stall_limit_s=1.0))
        published: Any = SimpleNamespace(model_files=self.files.to_bytes(), sha256="ab" * 32, run=run)
        node: Any = SimpleNamespace(identity=SimpleNamespace(peer_id="me"))
        swarm = None if alone else SwarmSource(self.network, node, ())
        return ModelFileFetcher(published, self.place).fetch(swarm)

    @property
    def warnings(self) -> list[str]:
        return [event.code for event in self.events if isinstance(event, WarningEvent)]

    @property
    def sent_bytes(self) -> int:
        return sum(peer.sent_bytes for peer in self.others.peers.values())


@pytest.fixture(scope="module")
def network() -> Iterator[NetworkThread]:
    network = NetworkThread()
    yield network
    network.stop()


@pytest.fixture
def peer(tmp_path: Path, network: NetworkThread, monkeypatch: pytest.MonkeyPatch) -> Peer:
    source = write_model(tmp_path / "others")
    whole = model_folder(tmp_path / "others-cache", source, pinned(source))
    others = FilePeers({"other": FilePeer(whole.served_files())})
    monkeypatch.setattr(fetcher_module, "PeerCalls", lambda *args: others)
    monkeypatch.setattr(fetcher_module, "FileSources", lambda *args, **more: others)
    return Peer(tmp_path, others, network)


def assert_whole(folder: ModelFolder) -> None:
    assert {name: (folder.path / name).read_bytes() for name in CONTENTS} == CONTENTS
    hashes = {file.sha256 for file in folder.files.files} | {folder.files.files[1].chunks_sha256}
    assert folder.served_files().keys() == hashes, "ready to be served, with the chunk list"


def test_files_of_model_dir_are_used_where_they_are(peer: Peer) -> None:
    peer.given = peer.folder / "source"
    folder = peer.fetch(alone=True)
    assert_whole(folder)
    assert peer.sent_bytes == 0 and not peer.warnings
    assert all((folder.path / name).is_symlink() for name in CONTENTS)


def test_a_file_of_model_dir_that_is_another_is_named_and_fetched(peer: Peer) -> None:
    peer.given = write_model(peer.folder / "given", {**CONTENTS, "model.safetensors": WEIGHTS[::-1]})
    assert_whole(peer.fetch())
    assert peer.warnings == ["model-files-differ"] and peer.sent_bytes == len(WEIGHTS)
    (told,) = [event.message for event in peer.events if isinstance(event, WarningEvent)]
    assert "model.safetensors" in told and "config.json" not in told


def test_what_other_peers_delivered_is_there_at_the_next_start(peer: Peer) -> None:
    folder = peer.fetch()
    assert_whole(folder)
    assert peer.sent_bytes == TOTAL
    assert_whole(peer.fetch(alone=True))
    assert peer.sent_bytes == TOTAL and not list(folder.path.glob("*.part"))


def test_each_file_is_served_from_the_moment_at_which_it_is_complete_and_checked(
    peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[str] = []
    small, large = peer.files.files

    class Served(dict[str, Any]):
        has_small = threading.Event()

        def __setitem__(self, sha256: str, file: Any) -> None:
            super().__setitem__(sha256, file)
            if sha256 == small.sha256:
                self.has_small.set()

    node: Any = SimpleNamespace(identity=SimpleNamespace(peer_id="me"), served_files=Served())

    async def begin(node: Any, published: Any, sources: Any) -> None:
        begun.append(sources)

    monkeypatch.setattr(fetcher_module, "serve_files_early", begin)
    open_pull = peer.others.open_pull

    async def pull(asked: str, request: Any) -> Any:
        if request.snapshot_sha256.hex() == large.sha256:
            assert await asyncio.to_thread(node.served_files.has_small.wait, 20), "it is served meanwhile"
        assert large.sha256 not in node.served_files, "before its last chunk was checked"
        return await open_pull(asked, request)

    monkeypatch.setattr(peer.others, "open_pull", pull)
    run = SimpleNamespace(model=SimpleNamespace(base="tiny"), network=NetworkSection(stall_limit_s=1.0))
    published: Any = SimpleNamespace(model_files=peer.files.to_bytes(), sha256="ab" * 32, run=run)
    others = SwarmSource(peer.network, node, ())
    folder = fetch_and_serve(published, peer.place, node, others)
    assert begun == [peer.others] and node.served_files == folder.served_files() and len(node.served_files) == 3
    again: Any = SimpleNamespace(served_files={})
    fetch_and_serve(published, peer.place, again, None)
    assert again.served_files == node.served_files and len(begun) == 1, "nobody is known: it is served once it enters"


def test_progress_is_an_event_now_and_then_and_on_the_board(peer: Peer) -> None:
    seen = list[str]()
    peer.on_event = lambda event: seen.append(peer.board.status().doing)
    peer.others.peers["other"].num_served = lambda num_chunks: min(num_chunks, 12)
    peer.fetch()
    told = [event for event in peer.events if isinstance(event, ArrivingEvent)]
    assert told and {event.doing for event in told} == {"fetching the model's files from other peers"}
    assert all(event.total_bytes == TOTAL for event in told)
    assert any(words.startswith("fetching the model's files from other peers (") for words in seen)


# ---------------------------------------------------------------- the hub


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SmallHub]:
    pytest.importorskip("huggingface_hub")
    with small_hub() as hub:
        hub.use_in(monkeypatch, tmp_path / "hub-cache")
        yield hub


def test_the_hub_comes_before_other_peers(peer: Peer, hub: SmallHub) -> None:
    peer.base = f"anna/tiny@{hub.push_folder('anna/tiny', peer.folder / 'source')}"
    folder = peer.fetch()
    assert_whole(folder)
    assert peer.sent_bytes == 0 and not peer.warnings and set(hub.downloads()) == set(CONTENTS)
    assert (folder.path / "model.safetensors").resolve().is_relative_to(peer.folder / "hub-cache"), "not copied"
    num_asked = len(hub.asked)
    assert_whole(peer.fetch())
    assert len(hub.asked) == num_asked, "it is here by now"


def test_that_the_hub_knows_no_limit_is_said_once_before_it_is_asked(peer: Peer, hub: SmallHub) -> None:
    peer.base = f"anna/tiny@{hub.push_folder('anna/tiny', peer.folder / 'source')}"
    peer.down_mbit = 5.0
    assert_whole(peer.fetch())
    assert peer.warnings == ["hub-not-limited"] and peer.sent_bytes == 0
    assert_whole(peer.fetch())
    assert len(peer.warnings) == 1, "it is here by now"
    limits, said = NetworkSection(down_mbit=5.0), len(peer.events)
    dataclasses.replace(peer.place, down_mbit=0.0).asks_hub(limits)
    assert len(peer.events) == said, "the person has lifted the run's limit"
    dataclasses.replace(peer.place, down_mbit=None).asks_hub(limits)
    assert peer.warnings == ["hub-not-limited"] * 2


def test_a_hub_with_other_bytes_is_not_believed(peer: Peer, hub: SmallHub) -> None:
    peer.base = f"anna/tiny@{hub.push_folder('anna/tiny', peer.folder / 'source')}"
    hub.altered = lambda name, data: data[::-1]
    assert_whole(peer.fetch())
    assert peer.warnings == ["hub-failed"] and peer.sent_bytes == TOTAL


def test_a_file_of_another_size_is_not_even_fetched_from_the_hub(peer: Peer, hub: SmallHub) -> None:
    peer.base = f"anna/tiny@{hub.push('anna/tiny', {**CONTENTS, 'model.safetensors': 2 * WEIGHTS})}"
    assert_whole(peer.fetch())
    assert peer.warnings == ["hub-failed"] and hub.downloads() == ["config.json"] and peer.sent_bytes == len(WEIGHTS)


def test_a_hub_that_has_withdrawn_the_model_is_one_line(peer: Peer, hub: SmallHub) -> None:
    peer.base = f"anna/tiny@{'ab' * 20}"
    assert_whole(peer.fetch())
    assert peer.warnings == ["hub-failed"] and peer.sent_bytes == TOTAL


def test_without_the_hub_peers_deliver(peer: Peer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with small_hub() as hub:
        peer.base = f"anna/tiny@{hub.push_folder('anna/tiny', peer.folder / 'source')}"
        hub.use_in(monkeypatch, tmp_path / "hub-cache")
    assert_whole(peer.fetch())
    assert peer.warnings == ["hub-failed"] and peer.sent_bytes == TOTAL


def test_what_peers_have_begun_they_finish(peer: Peer, hub: SmallHub) -> None:
    peer.base = f"anna/tiny@{hub.push_folder('anna/tiny', peer.folder / 'source')}"
    folder = ModelFolder(peer.folder / "cache", peer.files)
    with folder.locked(lambda: None):
        digests = model_folder(peer.folder / "x", peer.folder / "source", peer.files).chunk_list(peer.files.files[1])
        assert digests is not None
        folder.keep_chunk_list(peer.files.files[1], digests)
        assert folder.part(peer.files.files[1]).write(0, memoryview(WEIGHTS[:CHUNK_BYTES]))
    assert_whole(peer.fetch())
    assert hub.downloads() == ["config.json"] and peer.sent_bytes == len(WEIGHTS) - CHUNK_BYTES


def test_the_hub_has_what_peers_began_and_no_longer_have(
    peer: Peer, hub: SmallHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    peer.base = f"anna/tiny@{hub.push_folder('anna/tiny', peer.folder / 'source')}"
    monkeypatch.setattr("swarmtrain.protocol.pinned_files.transfer.PATIENCE_S", 0.0)
    peer.others.peers.clear()
    (ModelFolder(peer.folder / "cache", peer.files).path).mkdir(parents=True)
    (ModelFolder(peer.folder / "cache", peer.files).path / "model.safetensors.part").write_bytes(b"some")
    assert_whole(peer.fetch())


def test_the_hub_is_asked_again_when_peers_are_only_busy_and_nobody_is_one_line(
    peer: Peer, hub: SmallHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("swarmtrain.network.model_files.fetch.PATIENCE_S", 0.5)
    monkeypatch.setattr("swarmtrain.network.model_files.fetch._BUSY_STALLS", 0)

    async def busy(asked: str, request: Any) -> Any:
        raise BusyError("it serves as many readers as it may")

    monkeypatch.setattr(peer.others, "open_pull", busy)
    peer.base = f"anna/tiny@{'ab' * 20}"
    with raises_code("files-not-delivered", RunTimeError, "are busy"):
        peer.fetch()
    assert peer.warnings == ["hub-failed"] * 2 and peer.sent_bytes == 0
    peer.base = f"anna/tiny@{hub.push_folder('anna/tiny', peer.folder / 'source')}"
    (ModelFolder(peer.folder / "cache", peer.files).path / "model.safetensors.part").write_bytes(b"some")
    assert_whole(peer.fetch())
    assert "model.safetensors" in hub.downloads()


# ---------------------------------------------------------------- what goes wrong


def test_nobody_has_them(peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    with raises_code("files-not-delivered", RunTimeError, "--model-dir"):
        peer.fetch(alone=True)
    monkeypatch.setattr("swarmtrain.protocol.pinned_files.transfer.PATIENCE_S", 0.0)
    peer.others.peers.clear()
    with raises_code("files-not-delivered", RunTimeError, "--model-dir"):
        peer.fetch()


def test_a_disk_without_room_is_one_line_before_anything_is_fetched(
    peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=TOTAL - 1))
    with raises_code("disk-full", RunTimeError, "--model-dir") as raised:
        peer.fetch()
    assert peer.sent_bytes == 0 and raised.value.exit_code == 1


def test_a_disk_that_fills_up_is_one_line_and_nothing_is_fetched_twice(
    peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    pwrite, left = os.pwrite, [9]

    def full(*args: Any) -> int:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return pwrite(*args)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with raises_code("disk-full", RunTimeError):
            peer.fetch()
    sent_bytes = peer.sent_bytes
    assert_whole(peer.fetch())
    assert peer.sent_bytes - sent_bytes <= TOTAL - 8 * CHUNK_BYTES


def test_whoever_is_asked_to_end_ends_and_frees_the_folder(peer: Peer) -> None:
    peer.others.peers["other"].num_served = lambda num_chunks: min(num_chunks, 12)
    peer.on_event = lambda event: peer.stop.stop()
    peer.stop.begin()
    with pytest.raises(Interrupted):
        peer.fetch()
    peer.stop, peer.on_event = StopFlag(), lambda event: None
    assert_whole(peer.fetch())


def test_two_peers_of_one_machine_fetch_once(peer: Peer) -> None:
    folder = ModelFolder(peer.folder / "cache", peer.files)
    with folder.locked(lambda: None):
        peer.stop.begin()
        peer.stop.stop()
        with pytest.raises(Interrupted):
            peer.fetch()
        assert "another peer of this machine" in peer.board.status().doing and peer.sent_bytes == 0


# ---------------------------------------------------------------- what a bootstrap publishes


def test_a_bootstrap_pins_the_files_of_its_folder(peer: Peer) -> None:
    source = peer.folder / "source"
    files = pin_folder(source, names_in(source, weights=True), peer.place)
    assert files == peer.files
    assert [file.name for file in pin_folder(source, names_in(source, weights=False), peer.place).files] == [
        "config.json"
    ]


def test_a_file_that_cannot_be_pinned_is_one_line(peer: Peer) -> None:
    source = peer.folder / "source"
    with raises_code("file-unreadable", RunFileError, "tokenizer.json"):
        pin_folder(source, ["config.json", "tokenizer.json"], peer.place)
    with raises_code("file-unreadable", RunFileError):
        names_in(peer.folder / "nowhere", weights=True)
    (source / "tokenizer.json").write_bytes(b"")
    with raises_code("bad-model-file", RunFileError, "tokenizer.json"):
        pin_folder(source, ["config.json", "tokenizer.json"], peer.place)

"""Calls that a peer answers, without a network: a flood gets short answers and is named, others are served."""

from __future__ import annotations

import asyncio
import hashlib
import tracemalloc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from test_throttle import held_of, request
from virtual_loop import virtually

from swarmtrain.errors import BusyError, PeerError
from swarmtrain.network import service as service_module
from swarmtrain.network.model_files.served_file import ServedFile
from swarmtrain.network.node import TrafficCount
from swarmtrain.network.refusals import rule_of
from swarmtrain.network.service import service_type
from swarmtrain.network.snapshots.replies import Reply
from swarmtrain.network.snapshots.store import SnapshotStore
from swarmtrain.run import CHUNK_BYTES
from swarmtrain.v1 import snapshot_pb2 as pb

MALLORY, ANNA = SimpleNamespace(remote_id="mallory"), SimpleNamespace(remote_id="anna")


class Peer:
    """Answers, and what it was told (`Answers`)."""

    def __init__(self) -> None:
        self.store = SnapshotStore()
        self.store.add(held_of(4))
        self.num_answered = 0
        self.named: list[tuple[str, PeerError]] = []
        self.node = node = SimpleNamespace(traffic=TrafficCount(), settings=None, served_files={})
        self.service = service_type()(self, self.store, {}, node)

    def hello(self, request: pb.HelloRequest, caller: str) -> pb.HelloReply:
        self.num_answered += 1
        return pb.HelloReply(swarmtrain_version="1")

    async def state(self, request: pb.StateRequest) -> pb.StateReply:
        self.num_answered += 1
        return pb.StateReply(manifest=pb.Signed())

    async def publication(self, request: pb.PublicationRequest, caller: str) -> pb.PublicationReply:
        self.num_answered += 1
        return pb.PublicationReply(manifest=pb.Signed())

    async def round(self, request: pb.RoundRequest, caller: str) -> pb.RoundReply:
        self.num_answered += 1
        return pb.RoundReply(current_round=7)

    def history(self) -> pb.HistoryReply:
        self.num_answered += 1
        return pb.HistoryReply(sample=pb.TextSample(text="f()"))

    def refused(self, peer: str, error: PeerError) -> None:
        self.named.append((peer, error))

    async def pull(self, caller: str) -> list[Reply]:
        return [reply async for reply in self.service.pull_replies(request(4), caller)]


@pytest.fixture
def in_virtual_time(monkeypatch: pytest.MonkeyPatch) -> Any:
    def run(body: Any) -> None:
        async def whole(clock: Any) -> None:
            monkeypatch.setattr(service_module, "time", SimpleNamespace(monotonic=clock))
            await body(Peer(), clock)

        virtually(whole)

    return run


def test_a_flood_of_calls_gets_short_answers_and_is_named_and_others_are_served(in_virtual_time: Any) -> None:
    async def body(peer: Peer, clock: Any) -> None:
        service = peer.service
        calls = [
            lambda: service.rpc_publication(pb.PublicationRequest(), MALLORY),
            lambda: service.rpc_hello(pb.HelloRequest(), MALLORY),
            lambda: service.rpc_state(pb.StateRequest(), MALLORY),
        ]
        for number in range(900):
            await calls[number % 3]()
        assert peer.num_answered == 256, "a burst"
        assert (await calls[0]()).busy and await calls[1]() == pb.HelloReply() and await calls[2]() == pb.StateReply()
        assert {(who, rule_of(error.code)) for who, error in peer.named} == {("mallory", "flood")}
        assert str(peer.named[0][1]) == "more than 64 calls a second"
        assert [reply.status for reply in await peer.pull("mallory")] == [pb.PullReply.STATUS_BUSY] and clock() == 0.0

        assert (await service.rpc_publication(pb.PublicationRequest(), ANNA)).HasField("manifest")
        assert sum(len(reply.data) for reply in await peer.pull("anna")) == 4 * CHUNK_BYTES
        for _ in range(100):
            await asyncio.sleep(0.02)
            assert not (await calls[0]()).busy, "fifty a second are answered again"

    in_virtual_time(body)


def test_a_history_is_told_now_and_then(in_virtual_time: Any) -> None:
    async def body(peer: Peer, clock: Any) -> None:
        ask = lambda caller: peer.service.rpc_history(pb.HistoryRequest(), caller)  # noqa: E731
        for _ in range(4):
            assert (await ask(MALLORY)).sample.text == "f()"
        with pytest.raises(BusyError):
            await ask(MALLORY)
        assert [who for who, _ in peer.named] == ["mallory"] and (await ask(ANNA)).sample.text == "f()"
        await asyncio.sleep(60.0)
        assert (await ask(MALLORY)).sample.text == "f()", "once a minute is welcome"
        assert peer.num_answered == 6

    in_virtual_time(body)


def test_so_do_floods_of_files_and_of_questions_to_be_dialled(in_virtual_time: Any) -> None:
    async def body(peer: Peer, clock: Any) -> None:
        service, unknown, busy = peer.service, pb.PullReply.STATUS_UNKNOWN, pb.PullReply.STATUS_BUSY

        async def file_status(caller: str) -> Any:
            return [reply.status async for reply in service.blob_replies(pb.BlobRequest(sha256=bytes(32)), caller)]

        for _ in range(128):
            assert await file_status("mallory") == [unknown]
            refused = await service.rpc_dial(pb.DialRequest(), MALLORY)
            assert refused.outcome == pb.DialReply.OUTCOME_REFUSED
        assert await file_status("mallory") == [busy]
        assert (await service.rpc_dial(pb.DialRequest(), MALLORY)).outcome == pb.DialReply.OUTCOME_BUSY
        assert {(who, rule_of(error.code)) for who, error in peer.named} == {("mallory", "flood")}
        assert await file_status("anna") == [unknown]

    in_virtual_time(body)


def test_files_on_the_disk_are_served_by_their_hash_until_they_change(tmp_path: Path) -> None:
    """A file by chunks, as a snapshot; a small one, such as a chunk list, as a whole too."""
    path, data = tmp_path / "model.safetensors", bytes(range(256)) * 2048
    path.write_bytes(data)
    peer, name = Peer(), hashlib.sha256(data).digest()
    peer.node.served_files = {name.hex(): ServedFile.of(path)}

    async def chunks(first: int, number: int) -> list[Reply]:
        wanted = pb.PullRequest(snapshot_sha256=name, first_chunk=first, num_chunks=number)
        return [reply async for reply in peer.service.pull_replies(wanted, "anna")]

    async def whole() -> list[Reply]:
        return [reply async for reply in peer.service.blob_replies(pb.BlobRequest(sha256=name), "anna")]

    async def run() -> None:
        ok, *replies, end = await chunks(0, 2)
        assert ok.status == pb.PullReply.STATUS_OK and end.end
        assert b"".join(reply.data for reply in replies) == data and [reply.chunk for reply in replies] == [0, 1]
        assert peer.node.traffic.sent_bytes == len(data)
        assert b"".join(reply.data for reply in await whole()) == data
        assert [reply.status for reply in await chunks(1, 2)] == [pb.PullReply.STATUS_UNKNOWN]
        path.write_bytes(data[1:])
        assert [reply.status for reply in await chunks(0, 1)] == [pb.PullReply.STATUS_UNKNOWN]
        assert [reply.status for reply in await whole()] == [pb.PullReply.STATUS_UNKNOWN]

    asyncio.run(run())


def test_a_crowd_that_asks_for_files_on_the_disk_takes_no_memory(tmp_path: Path) -> None:
    path, data = tmp_path / "chunks", bytes(3 * CHUNK_BYTES)
    path.write_bytes(data)
    peer, name = Peer(), hashlib.sha256(data).digest()
    peer.node.served_files = {name.hex(): ServedFile.of(path)}

    async def run() -> None:
        asked = [peer.service.blob_replies(pb.BlobRequest(sha256=name), f"peer {number}") for number in range(40)]
        tracemalloc.start()
        statuses = [reply.status for reply in await asyncio.gather(*map(anext, asked))]
        _, peak_bytes = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert statuses.count(pb.PullReply.STATUS_OK) == 8 and peak_bytes < 25 * len(data)
        for replies in asked:
            await replies.aclose()

    asyncio.run(run())


def test_a_flood_of_questions_about_rounds_is_not_answered_and_one_that_pulls_hears_of_the_round(
    in_virtual_time: Any,
) -> None:
    async def body(peer: Peer, clock: Any) -> None:
        for _ in range(300):
            await peer.service.rpc_hello(pb.HelloRequest(), ANNA)
        assert (await peer.service.rpc_round(pb.RoundRequest(), ANNA)).current_round == 7
        peer.num_answered = 0
        for _ in range(256):
            await peer.service.rpc_round(pb.RoundRequest(), MALLORY)
        with pytest.raises(BusyError):
            await peer.service.rpc_round(pb.RoundRequest(), MALLORY)
        assert peer.num_answered == 256 and str(peer.named[-1][1]) == "more than 64 calls a second"

    in_virtual_time(body)


def test_a_flood_of_questions_for_whole_chains_is_not_answered(in_virtual_time: Any) -> None:
    """Each is 2.5 MiB, and some 10 ms of the loop."""

    async def body(peer: Peer, clock: Any) -> None:
        wanted = pb.RoundRequest(wants_chain=True)
        for _ in range(8):
            await peer.service.rpc_round(wanted, MALLORY)
        for _ in range(100):
            with pytest.raises(BusyError):
                await peer.service.rpc_round(wanted, MALLORY)
        assert peer.num_answered == 8 and str(peer.named[-1][1]) == "more than 1 calls a second"
        assert (await peer.service.rpc_round(pb.RoundRequest(), MALLORY)).current_round == 7
        for _ in range(20):
            await asyncio.sleep(1)
            assert (await peer.service.rpc_round(wanted, ANNA)).current_round == 7, "as who lacks one asks"

    in_virtual_time(body)


def test_a_flood_of_pulls_leaves_places_for_others(in_virtual_time: Any) -> None:
    async def body(peer: Peer, clock: Any) -> None:
        flood = [peer.service.pull_replies(request(4), "mallory") for _ in range(20)]
        started = [(await anext(pull)).status for pull in flood]
        assert started.count(pb.PullReply.STATUS_OK) == 2
        assert sum(len(reply.data) for reply in await peer.pull("anna")) == 4 * CHUNK_BYTES
        for pull in flood:
            await pull.aclose()

    in_virtual_time(body)

"""Nodes with real daemons on loopback: calls, records, pulls, hostile peers, deaths."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import hashlib
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest
from codes import raises_code

from swarmtrain.compatibility import PROTOCOL
from swarmtrain.errors import BadBytesError, ClockError, PeerError, RunTimeError, UnreachableError
from swarmtrain.network import daemon
from swarmtrain.network.daemon import hivemind_module, set_clock_offset, swarm_time
from swarmtrain.network.discovery.invite import InvitedPeer
from swarmtrain.network.discovery.records import PRESENCE, bucket_key
from swarmtrain.network.discovery.run_lookup import find_run
from swarmtrain.network.identity import load_or_create_identity, new_identity
from swarmtrain.network.model_files.early_service import serve_files_early
from swarmtrain.network.model_files.served_file import ServedFile
from swarmtrain.network.model_files.sources import FileSources
from swarmtrain.network.node import NOT_SERVED, NetworkThread, Node, NodeSettings
from swarmtrain.network.reachability import listen
from swarmtrain.network.reachability.listen import cannot_listen
from swarmtrain.network.service import PeerCalls, namespace_of, service_type
from swarmtrain.network.snapshots.store import (
    Body,
    HeldSnapshot,
    PullLimits,
    SnapshotStore,
    TensorSpec,
    build_snapshot,
    empty_held,
    manifest_untrusted,
    pull_chunks,
    pull_manifest,
)
from swarmtrain.peer.lifecycle.node import clock_warning
from swarmtrain.protocol.membership.budgets import may_dial
from swarmtrain.run import CHUNK_BYTES, NetworkSection
from swarmtrain.v1 import snapshot_pb2 as pb

pytestmark = pytest.mark.processes

RUN, OTHER_RUN = (hashlib.sha256(name).hexdigest() for name in (b"a run", b"another"))
LOOPBACK = ("/ip4/127.0.0.1/tcp/0",)
BLOB = bytes(hashlib.shake_128(b"blob").digest(CHUNK_BYTES + 1000))
_T = TypeVar("_T")


@dataclass
class Peer:
    """Node, what it serves, and its calls to others; also the answers for its service (`Answers`)."""

    node: Node
    run: str
    store: SnapshotStore = field(default_factory=SnapshotStore)
    waits_s: list[float] = field(default_factory=list)
    named: list[str] = field(default_factory=list)
    reply_bytes: int = 0
    clock_ahead_s: float = 0.0

    def __post_init__(self) -> None:
        self.calls = PeerCalls(self.node, self.run, stall_limit_s=1.0)

    @property
    def id(self) -> str:
        return self.node.identity.peer_id

    def hello(self, request: pb.HelloRequest, caller: str) -> pb.HelloReply:
        return pb.HelloReply(protocol=PROTOCOL, swarmtrain_version=caller, time=swarm_time() + self.clock_ahead_s)

    async def state(self, request: pb.StateRequest) -> pb.StateReply:
        return pb.StateReply(manifest=pb.Signed(payload=bytes(self.reply_bytes)))

    def history(self) -> pb.HistoryReply:
        return pb.HistoryReply(sample=pb.TextSample(text="f()"))

    def refused(self, peer: str, error: PeerError) -> None:
        self.named.append(peer)

    async def round(self, request: pb.RoundRequest, caller: str) -> pb.RoundReply:
        self.waits_s.append(request.wait_s)
        return pb.RoundReply(current_round=request.round)


async def start(directory: Path, run: str) -> Peer:
    directory.mkdir()
    key_path = directory / "identity.key"
    settings = NodeSettings(directory=directory, listen=LOOPBACK, call_limit_s=1.0)
    peer = Peer(await Node.start(settings, load_or_create_identity(key_path), key_path), run)
    blobs = {hashlib.sha256(BLOB).hexdigest(): BLOB}
    await peer.node.serve(service_type()(peer, peer.store, blobs, peer.node), namespace_of(run))
    return peer


@dataclass
class Here:
    """Network thread and peers of this module: a and b are of one run, c of another."""

    network: NetworkThread
    folder: Path
    a: Peer
    b: Peer
    c: Peer

    @property
    def all(self) -> tuple[Peer, ...]:
        return self.a, self.b, self.c

    def run(self, coroutine: Coroutine[Any, Any, _T]) -> _T:
        return self.network.run(coroutine, 20)


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Here]:
    folder = tmp_path_factory.mktemp("nodes")
    network = NetworkThread()

    async def all_of_them() -> list[Peer]:
        peers = [await start(folder / name, run) for name, run in (("a", RUN), ("b", RUN), ("c", OTHER_RUN))]
        addresses = await peers[0].node.addresses()
        await peers[0].node.join_dht([])
        for peer in peers[1:]:
            await peer.node.connect(peers[0].id, addresses)
            await peer.node.join_dht([(peers[0].id, addresses)])
        return peers

    peers = network.run(all_of_them(), 60)
    yield Here(network, folder, *peers)
    for peer in peers:
        network.run(peer.node.stop(), 10)
    network.stop()


# ---------------------------------------------------------------- calls and records


def test_a_history_is_asked_for_and_no_failure_counts(here: Here) -> None:
    failed: list[str] = []
    here.a.calls.on_failure = lambda peer, error: failed.append(peer)
    try:
        assert here.run(here.a.calls.history(here.b.id)).sample.text == "f()"
        with pytest.raises(PeerError):
            here.run(here.a.calls.history(here.c.id))  # of another run: it does not know the call
        assert not failed
    finally:
        here.a.calls.on_failure = lambda peer, error: None


def test_the_daemon_has_our_identity_and_sees_the_callers(here: Here) -> None:
    assert str(here.a.node._p2p.peer_id) == here.a.id
    reply = here.run(here.b.calls.hello(here.a.id, pb.HelloRequest()))
    assert reply.swarmtrain_version == here.b.id, "the transport says who calls"
    assert abs(reply.time - swarm_time()) < 1
    assert here.run(here.a.calls.hello(here.b.id, pb.HelloRequest())).swarmtrain_version == here.a.id
    assert here.b.node.traffic.received_bytes > 0 and here.a.node.traffic.sent_bytes > 0


def test_addresses_are_where_it_listens(here: Here) -> None:
    (address,) = here.run(here.a.node.addresses())
    assert address.startswith("/ip4/127.0.0.1/tcp/") and not address.endswith("/0")


def presence(peer: Peer, prefix: str = "") -> pb.Record:
    return pb.Record(run_sha256=bytes.fromhex(RUN), prefix=prefix, presence=pb.Presence(name=peer.id[-6:]))


def test_a_record_stored_by_one_is_read_by_the_others(here: Here) -> None:
    for peer in (here.a, here.b):
        assert here.run(peer.node.store(presence(peer), 60))
    for reader in (here.a, here.b, here.c):
        found = here.run(reader.node.read_bucket(bytes.fromhex(RUN), PRESENCE, ""))
        assert {name: record.presence.name for name, (record, _) in found.items()} == {
            here.a.id: here.a.id[-6:],
            here.b.id: here.b.id[-6:],
        }
        assert all(50 < expiry_s - swarm_time() <= 60 for _, expiry_s in found.values())
    assert here.run(here.a.node.read_bucket(bytes.fromhex(OTHER_RUN), PRESENCE, "")) == {}
    assert not here.a.node.rules.refused


def test_a_forged_record_is_refused_where_it_would_be_stored(here: Here) -> None:
    """c keeps no rules: it stores for a victim, and leaves its own validator out."""
    victim = new_identity().peer_id
    protocol, dht_id = here.c.node._dht.protocol, hivemind_module("dht.routing").DHTID
    key = dht_id.generate(bucket_key(bytes.fromhex(RUN), PRESENCE, ""))
    value = protocol.serializer.dumps(presence(here.c).SerializeToString()) + bytes(64)
    storing = protocol.call_store(here.a.node._p2p.peer_id, [key], [value], swarm_time() + 30, subkeys=[victim])
    assert here.run(storing) == [False]
    assert here.a.node.rules.refused["forged"] == 1
    big = protocol.call_store(here.a.node._p2p.peer_id, [key], [bytes(3_000_000)], swarm_time() + 30, subkeys=[victim])
    assert here.run(big) == [False]
    assert here.a.node.rules.refused["oversized"] == 1
    found = here.run(here.b.node.read_bucket(bytes.fromhex(RUN), PRESENCE, ""))
    assert victim not in found
    here.a.node.rules.refused.clear()


def test_another_service_takes_the_place_of_the_one_before(here: Here) -> None:
    """A peer that fetches its model serves files before its swarm does; what ran beside that ends."""
    run, ended = hashlib.sha256(b"a third run").hexdigest(), list[str]()

    async def beside(name: str) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(name)

    async def serve(blob: bytes, name: str) -> str:
        sha256 = hashlib.sha256(blob).hexdigest()
        service = service_type()(here.a, here.a.store, {sha256: blob}, here.a.node)
        await here.a.node.serve(service, namespace_of(run), beside(name))
        await asyncio.sleep(0)  # it begins
        return sha256

    calls = PeerCalls(here.b.node, run)
    first = here.run(serve(b"early", "first"))
    assert here.run(calls.blob_once_untrusted(here.a.id, first, 100)) == b"early" and ended == []
    second = here.run(serve(b"late", "second"))
    assert ended == ["first"] and here.run(calls.blob_once_untrusted(here.a.id, second, 100)) == b"late"
    with raises_code("not-held", UnreachableError):
        here.run(calls.blob_once_untrusted(here.a.id, first, 100))
    assert here.run(calls.hello(here.a.id, pb.HelloRequest())).swarmtrain_version == here.b.id
    here.run(here.a.node._end_service(namespace_of(run)))
    assert ended == ["first", "second"]
    for _ in range(100):
        with raises_code("unreachable", UnreachableError) as refused:
            here.run(calls.hello(here.a.id, pb.HelloRequest()))
        if NOT_SERVED in str(refused.value):
            break
        assert "stream reset" in str(refused.value)  # until the daemon knows that the other one serves this no more
    else:
        pytest.fail(f"never told: {refused.value}")


def test_of_three_that_begin_at_once_one_gets_a_file_from_another_that_has_it(here: Here, tmp_path: Path) -> None:
    """None of them is in a swarm yet, and each of two knows the third one alone."""
    limits = NetworkSection()
    run: Any = SimpleNamespace(network=limits)
    sha256 = hashlib.sha256(b"a fourth run").hexdigest()
    published: Any = SimpleNamespace(sha256=sha256, run=run, blobs=dict)
    (tmp_path / "config.json").write_bytes(BLOB)
    name = hashlib.sha256(BLOB).hexdigest()
    here.b.node.served_files[name] = ServedFile.of(tmp_path / "config.json")
    calls = PeerCalls(here.c.node, sha256)

    async def first() -> tuple[list[str], bytes]:
        known = [InvitedPeer(here.a.id, await here.a.node.addresses())]
        sources = {peer.id: FileSources(peer.node, PeerCalls(peer.node, sha256), known, True) for peer in here.all}
        for peer in here.all:
            await serve_files_early(peer.node, published, sources[peer.id])
        await sources[here.b.id].find()  # as it does every 15 s, and says that it serves
        found = await sources[here.c.id].find()
        blob = await calls.blob_once_untrusted(here.b.id, name, 2 * len(BLOB))
        for peer in here.all:
            await peer.node._end_service(namespace_of(sha256))
        return found, blob

    found, blob = here.run(first())
    assert set(found) == {here.a.id, here.b.id} and blob == BLOB
    del here.b.node.served_files[name]


def test_a_peer_of_another_run_does_not_find_the_calls(here: Here) -> None:
    with raises_code("unreachable", UnreachableError, NOT_SERVED):
        here.run(here.c.calls.hello(here.a.id, pb.HelloRequest()))
    failures: list[str] = []
    stranger = PeerCalls(here.c.node, RUN, on_failure=lambda peer, error: failures.append(peer))
    assert here.run(stranger.hello(here.a.id, pb.HelloRequest())).swarmtrain_version == here.c.id, "but who knows it"
    assert not failures


def test_nobody_there(here: Here) -> None:
    nobody = new_identity().peer_id
    began_s = time.monotonic()
    with raises_code("unreachable", UnreachableError, "127.0.0.1/tcp/1"):
        here.run(here.a.node.connect(nobody, ["/ip4/127.0.0.1/tcp/1"]))
    with pytest.raises(UnreachableError):
        here.run(here.a.node.connect(nobody, ["no address"]))
    with pytest.raises(UnreachableError):
        here.run(here.a.calls.hello(nobody, pb.HelloRequest()))
    with pytest.raises(UnreachableError):
        here.run(here.a.calls.open_pull(nobody, pb.PullRequest()))
    assert time.monotonic() - began_s < 5


def test_calls_that_fail_leave_no_connection_behind(here: Here) -> None:
    nobody = new_identity().peer_id

    def num_open() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    async def fail() -> None:
        for _ in range(20):
            with pytest.raises(UnreachableError):
                await here.a.calls.open_pull(nobody, pb.PullRequest())
            with pytest.raises(UnreachableError):
                await here.a.node.connect(nobody, ["/ip4/192.0.2.1/tcp/9"], 0.01)
        await asyncio.sleep(0.05)

    before = num_open()
    here.run(fail())
    assert num_open() <= before + 2


def test_held_calls_are_bounded_whatever_is_asked(here: Here) -> None:
    for wait_s, held_s in [(2.0, 2.0), (float("nan"), 0.0), (float("inf"), 0.0), (-1.0, 0.0)]:
        here.run(here.b.calls.node.call(stub(here), "rpc_round", pb.RoundRequest(wait_s=wait_s)))
        assert here.a.waits_s.pop() == held_s


def stub(here: Here) -> Any:
    return here.run(here.b.node.stub_of(service_type(), here.a.id, namespace_of(RUN)))


def test_a_flood_of_calls_gets_short_answers_and_others_are_served(here: Here) -> None:
    mallory = PeerCalls(here.c.node, RUN)

    async def flood() -> list[bool]:
        answered: list[bool] = []
        for _ in range(12):
            calls = [mallory.hello(here.a.id, pb.HelloRequest()) for _ in range(50)]
            answered.extend(reply.time > 0 for reply in await asyncio.gather(*calls))
        return answered

    answered = here.run(flood())
    assert all(answered[:100]) and not all(answered[-50:])
    assert set(here.a.named) == {here.c.id}
    assert here.run(here.b.calls.hello(here.a.id, pb.HelloRequest())).time > 0


def test_an_answer_too_large_for_a_call_fails_at_once(here: Here) -> None:
    here.a.reply_bytes = 5 * 1024 * 1024
    try:
        began_s = time.monotonic()
        with raises_code("unreachable", UnreachableError, "answer"):
            here.run(here.b.calls.state(here.a.id, 0))
        assert time.monotonic() - began_s < 2
        here.a.reply_bytes = 3 * 1024 * 1024
        assert len(here.run(here.b.calls.state(here.a.id, 0)).manifest.payload) == here.a.reply_bytes
    finally:
        here.a.reply_bytes = 0


# ---------------------------------------------------------------- pulls

SPECS = (TensorSpec("theta", (2 * 1024 * 1024 + 3,)),)
CONTENT = bytes(hashlib.shake_128(b"theta").digest(SPECS[0].size_bytes))
LIMITS = PullLimits(stall_limit_s=2.0)


def published(peer: Peer) -> HeldSnapshot:
    manifest = pb.Manifest(run_sha256=bytes.fromhex(RUN), kind=pb.SNAPSHOT_KIND_STATE, round=1)
    held = build_snapshot(peer.node.identity, manifest, SPECS, Body([CONTENT]))
    peer.store.add(held)
    return held


async def pulled(
    peer: Peer, name: str, sources: list[str], limits: PullLimits = LIMITS
) -> tuple[HeldSnapshot, list[str]]:
    blamed: list[str] = []
    signed = await pull_manifest(sources[-1], name, peer.calls.open_pull, limits)
    held = empty_held(manifest_untrusted(signed, RUN, pb.SNAPSHOT_KIND_STATE, SPECS))
    await pull_chunks(
        held,
        range(held.snapshot.num_chunks),
        sources,
        peer.calls.open_pull,
        limits,
        lambda source, error: blamed.append(source),
    )
    return held, blamed


def test_some_megabytes_arrive_and_are_served_on(here: Here) -> None:
    name = published(here.a).snapshot.sha256
    before = here.b.node.traffic.received_bytes
    held, blamed = here.run(pulled(here.b, name, [here.a.id]))
    assert bytes(held.buffer) == CONTENT and not blamed
    assert len(CONTENT) <= here.b.node.traffic.received_bytes - before < 1.01 * len(CONTENT)
    here.b.store.add(held)
    again, blamed = here.run(pulled(here.a, name, [here.b.id]))
    assert bytes(again.buffer) == CONTENT and not blamed


@pytest.mark.parametrize("end", ["up", "down"])
def test_a_limit_at_either_end_holds_for_a_pull(here: Here, end: str) -> None:
    name = published(here.a).snapshot.sha256
    throttle = here.a.store.up if end == "up" else here.b.node.traffic.down
    throttle.bytes_per_s = 8e6
    try:
        began_s = time.monotonic()
        held, blamed = here.run(pulled(here.b, name, [here.a.id]))
        took_s = time.monotonic() - began_s
    finally:
        throttle.bytes_per_s = 0.0
    assert bytes(held.buffer) == CONTENT and not blamed
    assert took_s >= (len(CONTENT) - 800_000) / 8e6, "a tenth of a second's bytes may pass at once"
    assert here.b.node.traffic.times.bytes_per_s is not None


def test_a_reader_that_hangs_up_gives_its_place_back(here: Here) -> None:
    name = published(here.a).snapshot.sha256
    pull = pb.PullRequest(snapshot_sha256=bytes.fromhex(name), first_chunk=0, num_chunks=32)

    async def hang_up() -> int:
        stream = await here.b.calls.open_pull(here.a.id, pull)
        await stream.__anext__()
        assert here.a.store.num_readers == 1
        await stream.aclose()
        for _ in range(200):  # the other end has no event to wait for
            if not here.a.store.num_readers:
                break
            await asyncio.sleep(0.01)
        return here.a.store.num_readers

    assert here.run(hang_up()) == 0


def test_files_of_the_run_arrive_whole_or_not_at_all(here: Here) -> None:
    name = hashlib.sha256(BLOB).hexdigest()
    assert here.run(here.b.calls.blob_untrusted(here.a.id, name, len(BLOB))) == BLOB
    with raises_code("bad-size", BadBytesError):
        here.run(here.b.calls.blob_untrusted(here.a.id, name, len(BLOB) - 1))
    with raises_code("not-held", UnreachableError):
        here.run(here.b.calls.blob_untrusted(here.a.id, "00" * 32, 100))


# ---------------------------------------------------------------- hostile peers

Writes = Callable[[asyncio.StreamWriter], Coroutine[Any, Any, None]]


@contextlib.contextmanager
def answering(here: Here, method: str, write: Writes) -> Iterator[None]:
    """c answers a stream of our run with bytes of its own making, once it is asked: what came before the request would
    be read with the daemon's answer to the opening, or not, as it happens."""
    name = f"{namespace_of(RUN)}::PeerService.{method}"

    async def handle(info: object, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer), contextlib.suppress(ConnectionError):
            await reader.readexactly(len(frame(pb.PullReply())))
            await write(writer)

    here.run(here.c.node._p2p.add_binary_stream_handler(name, handle))
    try:
        yield
    finally:
        here.run(here.c.node._p2p.remove_binary_stream_handler(name))


@contextlib.contextmanager
def flat_memory(limit_bytes: int) -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < limit_bytes
    finally:
        tracemalloc.stop()


def frame(message: Any) -> bytes:
    data = message.SerializeToString()
    return b"\0" + len(data).to_bytes(8, "big") + data


async def huge_frame(writer: asyncio.StreamWriter) -> None:
    writer.write(b"\0" + (1 << 30).to_bytes(8, "big"))
    for _ in range(1024):
        writer.write(bytes(1 << 20))
        await writer.drain()


def test_a_frame_of_a_gigabyte_is_refused_before_it_is_read(here: Here) -> None:
    name = "ab" * 32
    with answering(here, "rpc_pull", huge_frame), flat_memory(20_000_000), pytest.raises(UnreachableError):
        here.run(pull_manifest(here.c.id, name, here.b.calls.open_pull, LIMITS))


def test_a_request_of_a_gigabyte_is_refused_before_it_is_read(here: Here) -> None:
    async def send() -> None:
        name = f"{namespace_of(RUN)}::PeerService.rpc_pull"
        _, _, writer = await here.c.node._p2p.call_binary_stream_handler(here.a.node._p2p.peer_id, name)
        with contextlib.closing(writer), pytest.raises(ConnectionError):
            await asyncio.wait_for(huge_frame(writer), 10)

    with flat_memory(20_000_000):
        here.run(send())
    assert here.run(here.b.calls.hello(here.a.id, pb.HelloRequest())), "and it lives on"


async def endless_blob(writer: asyncio.StreamWriter) -> None:
    writer.write(frame(pb.PullReply(status=pb.PullReply.STATUS_OK)))
    for _ in range(1000):
        writer.write(frame(pb.PullReply(data=bytes(CHUNK_BYTES))))
        await writer.drain()


async def endless_nothing(writer: asyncio.StreamWriter) -> None:
    while True:
        writer.write(frame(pb.PullReply(status=pb.PullReply.STATUS_OK)))
        await writer.drain()
        await asyncio.sleep(0)


async def crumbs(writer: asyncio.StreamWriter) -> None:
    writer.write(frame(pb.PullReply(status=pb.PullReply.STATUS_OK)))
    while True:
        writer.write(frame(pb.PullReply(data=b"x")))
        await writer.drain()
        await asyncio.sleep(0)


async def garbage(writer: asyncio.StreamWriter) -> None:
    writer.write(b"\0" + (100).to_bytes(8, "big") + b"\xff" * 100)
    await writer.drain()


async def no_frame(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
    await writer.drain()


async def silence(writer: asyncio.StreamWriter) -> None:
    await asyncio.sleep(20)  # the reader gives up after its stall limit, 1 s


@pytest.mark.parametrize(
    ("write", "error"),
    [
        (endless_blob, BadBytesError),
        (endless_nothing, BadBytesError),
        (crumbs, BadBytesError),
        (garbage, UnreachableError),
        (no_frame, UnreachableError),
        (silence, UnreachableError),
    ],
)
def test_hostile_files_are_cut(here: Here, write: Writes, error: type[Exception]) -> None:
    began_s = time.monotonic()
    with answering(here, "rpc_blob", write), flat_memory(20_000_000), pytest.raises(error):
        here.run(here.b.calls.blob_untrusted(here.c.id, "ab" * 32, 1_000_000))
    assert time.monotonic() - began_s < 8


def test_what_a_peer_writes_cannot_steer_a_terminal(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(request: object) -> None:
        raise ValueError("\x1b[2J\x07 gotcha\nsecond line")

    monkeypatch.setattr(here.a, "state", fail)
    with pytest.raises(UnreachableError) as caught:
        here.run(here.b.calls.state(here.a.id, 0))
    assert str(caught.value).isprintable()


def test_strangers_cannot_make_us_dial_everything(here: Here) -> None:
    good = [
        "/ip4/203.0.113.7/tcp/4001",
        "/ip6/2001:db8::1/tcp/4001",
        "/ip4/10.0.0.1/tcp/5",
    ]
    bad = [
        "/dns4/example.org/tcp/443",
        "/dnsaddr/example.org/tcp/443",
        "/ip6/::ffff:169.254.169.254/tcp/80",
        "/ip4/224.0.0.1/tcp/4001",
        "/ip4/0.0.0.0/tcp/4001",
        "/ip4/169.254.169.254/tcp/80",
        "/ip6/fe80::1/tcp/4001",
        "/ip4/1.2.3.4/udp/53",
        "/ip4/1.2.3.4/tcp/0",
        "/ip4/1.2.3.4/tcp/70000",
        "/ip4/nonsense/tcp/1",
        "/unix/run/docker.sock",
    ]
    assert all(map(may_dial, good)) and not any(map(may_dial, bad))
    here.c.node.remember_addresses("x", (*bad, *good * 10))
    assert here.c.node._known["x"] == tuple(good * 10)[:8]
    here.c.node.remember_addresses("x", (*bad, *good), ("/dns4/example.org/tcp/443",))
    assert here.c.node._known["x"] == ("/dns4/example.org/tcp/443", *good), "a name that the user gave"
    for number in range(5000):
        here.c.node.remember_addresses(f"peer {number}", ())
    assert len(here.c.node._known) <= 4096 and "peer 4999" in here.c.node._known
    here.c.node._known.clear()


def test_the_buckets_for_which_there_is_always_room_are_bounded(here: Here) -> None:
    here.c.node._own_buckets = set(here.c.node._own_buckets)
    for number in range(2000):
        here.c.node._own_bucket(bytes(32), PRESENCE, f"{number:b}")
    assert 0 < len(here.c.node._own_buckets) <= 512


# ---------------------------------------------------------------- clocks


def test_the_clock_is_corrected_for_us_and_for_hivemind() -> None:
    dht_times = [hivemind_module(name).get_dht_time for name in ("utils.timed_storage", "dht.protocol", "dht.node")]
    assert abs(swarm_time() - time.time()) < 0.1
    try:
        set_clock_offset(100.25)
        for clock in (swarm_time, *dht_times):
            assert abs(clock() - time.time() - 100.25) < 0.1
    finally:
        set_clock_offset(0.0)


def test_setting_the_machines_clock_does_not_move_the_swarms(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was an hour behind, the others said so, and then somebody set it right."""
    real = time.time
    try:
        set_clock_offset(3600.0)
        before_s = swarm_time()
        monkeypatch.setattr(time, "time", lambda: real() + 3600.0)
        assert 0 <= swarm_time() - before_s < 5, "it goes on, and does not jump"
    finally:
        set_clock_offset(0.0)


def test_a_machine_whose_clock_is_off_takes_the_time_of_those_it_joins(here: Here) -> None:
    invited = InvitedPeer(here.a.id, here.run(here.a.node.addresses()))
    assert here.run(find_run(here.b.node, RUN, [invited])).clock_correction_s == 0.0
    here.a.clock_ahead_s = 300.0
    try:
        found = here.run(find_run(here.b.node, RUN, [invited]))
        assert found.peer == here.a.id
        assert found.clock_correction_s == pytest.approx(300, abs=1)
        assert swarm_time() - time.time() == pytest.approx(300, abs=1)
        warning = clock_warning(found.clock_correction_s).message
        assert "300.0 s behind the others'" in warning and "set it right" in warning
    finally:
        here.a.clock_ahead_s = 0.0
        set_clock_offset(0.0)


def test_one_that_answers_cannot_move_a_clock_by_31_years(here: Here) -> None:
    invited = InvitedPeer(here.a.id, here.run(here.a.node.addresses()))
    here.a.clock_ahead_s = 31 * 365.25 * 86_400
    try:
        with raises_code("clock-differs", ClockError, "--accept-clock") as caught:
            here.run(find_run(here.b.node, RUN, [invited]))
        assert abs(swarm_time() - time.time()) < 0.1, "nothing is corrected unasked"
        year = time.gmtime().tm_year
        assert all(each in str(caught.value) for each in (f" {year}-", here.a.id[-6:], f" {year + 31}-"))
        assert caught.value.exit_code == 1
        found = here.run(find_run(here.b.node, RUN, [invited], accept_clock=True))
        assert swarm_time() - time.time() == pytest.approx(here.a.clock_ahead_s, abs=1) == found.clock_correction_s
        here.a.clock_ahead_s = 1e300
        with raises_code("clock-differs", ClockError, "an impossible date, more than 10 minutes apart: ") as caught:
            here.run(find_run(here.b.node, RUN, [invited]))
        assert len(str(caught.value)) < 500, "a peer's number does not fill the screen"
    finally:
        here.a.clock_ahead_s = 0.0
        set_clock_offset(0.0)


def test_a_dead_peer_in_an_invite_holds_nobody_up(here: Here) -> None:
    nobody = InvitedPeer(new_identity().peer_id, ("/ip4/127.0.0.1/tcp/9",))
    alive = InvitedPeer(here.a.id, here.run(here.a.node.addresses()))
    began_s = time.monotonic()
    assert here.run(find_run(here.b.node, RUN, [nobody, alive])).peer == here.a.id
    assert time.monotonic() - began_s < 5
    with raises_code("nobody-answers", RunTimeError, "/ip4/127.0.0.1/tcp/9"):
        here.run(find_run(here.b.node, RUN, [nobody], 3.0))


def test_who_does_not_answer_is_said_in_a_few_addresses(here: Here) -> None:
    """A peer that was here before knows sixteen others with eight addresses each."""
    known = [
        InvitedPeer(new_identity().peer_id, tuple(f"/ip4/127.0.0.1/tcp/{9 - i % 3}" for i in range(2)))
        for _ in range(5)
    ]
    myself = InvitedPeer(here.b.id, ("/ip4/127.0.0.1/tcp/8",))
    said = "/ip4/127.0.0.1/tcp/9, /ip4/127.0.0.1/tcp/8, /ip4/127.0.0.1/tcp/9 and 7 more"
    with raises_code("nobody-answers", RunTimeError, said):
        here.run(find_run(here.b.node, RUN, [myself, *known], 3.0))
    with raises_code("nobody-known", RunTimeError):
        here.run(find_run(here.b.node, RUN, [myself]))
    with raises_code("nobody-known", RunTimeError):
        here.run(find_run(here.b.node, RUN, []))


def test_only_the_one_that_serves_another_run_is_said_to(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("swarmtrain.network.discovery.run_lookup._STARTING_S", 0.01)
    nobody = InvitedPeer(new_identity().peer_id, ("/ip4/127.0.0.1/tcp/9",))
    address = here.run(here.a.node.addresses())[0]
    with raises_code("another-run", RunTimeError, address):
        here.run(find_run(here.b.node, "cd" * 32, [nobody, InvitedPeer(here.a.id, (address,))], 10.0))


# ---------------------------------------------------------------- deaths


def test_a_taken_port_is_said_with_the_option_to_change(here: Here) -> None:
    folder = here.folder / "taken"
    folder.mkdir()
    key_path = folder / "identity.key"
    identity = load_or_create_identity(key_path)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        where = f"/ip4/127.0.0.1/tcp/{taken.getsockname()[1]}"
        settings = NodeSettings(directory=folder, listen=(where,))
        with raises_code("port-taken", RunTimeError, where, "--listen"):
            here.run(Node.start(settings, identity, key_path))


def test_an_address_of_the_router_is_not_said_to_be_taken(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = here.folder / "foreign"
    folder.mkdir()
    key_path = folder / "identity.key"
    identity = load_or_create_identity(key_path)
    monkeypatch.setattr(listen, "own_addresses", lambda: ["127.0.0.1", "fe80::1%eth0", "10.1.2.3"])
    settings = NodeSettings(directory=folder, listen=("/ip4/192.0.2.77/tcp/31337",))
    typed = "--listen :31337 --announce 192.0.2.77:31337"
    with raises_code("address-elsewhere", RunTimeError, "/ip4/192.0.2.77/tcp/31337", "10.1.2.3, 127.0.0.1", typed):
        here.run(Node.start(settings, identity, key_path))
    assert "--announce [2001:db8::7]:31337" in str(cannot_listen(["/ip6/2001:db8::7/tcp/31337"]))


def test_a_port_for_administrators_is_not_said_to_be_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listen, "_errno_of", lambda address: errno.EACCES)
    told = cannot_listen(["/ip4/0.0.0.0/tcp/80"])
    assert told is not None and told.code == "port-forbidden" and "1023" in str(told)


def test_a_hosts_name_is_not_said_to_be_a_taken_port() -> None:
    told = cannot_listen(["/dns/localhost/tcp/41337"])
    assert told is not None and told.code == "address-not-an-ip"


def test_it_may_announce_just_where_it_listens(here: Here) -> None:
    folder = here.folder / "announces"
    folder.mkdir()
    key_path = folder / "identity.key"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        where = f"/ip4/127.0.0.1/tcp/{free.getsockname()[1]}"
    settings = NodeSettings(directory=folder, listen=(where,), announce=(where,))
    node = here.run(Node.start(settings, load_or_create_identity(key_path), key_path))
    assert here.run(node.addresses()) == (where,)
    here.run(node.stop())


def test_a_daemon_that_is_killed_is_noticed_by_everyone(here: Here) -> None:
    victim = here.run(start(here.folder / "victim", RUN))
    here.run(victim.node.connect(here.a.id, here.run(here.a.node.addresses())))
    assert here.run(here.a.calls.hello(victim.id, pb.HelloRequest()))
    dead = here.network.submit(victim.node.wait_until_dead())
    os.kill(victim.node._p2p._child.pid, signal.SIGKILL)
    assert dead.result(2)
    began_s = time.monotonic()
    for caller, callee in ((victim, here.a.id), (here.a, victim.id)):
        with pytest.raises(UnreachableError):
            here.run(caller.calls.hello(callee, pb.HelloRequest()))
        with pytest.raises(UnreachableError):
            here.run(caller.calls.open_pull(callee, pb.PullRequest()))
    assert time.monotonic() - began_s < 6
    here.run(victim.node.stop())
    assert not victim.node._sockets.exists()  # type: ignore[union-attr]


@pytest.mark.parametrize("moment", ["while it starts", "before somebody has it"])
def test_a_start_that_is_given_up_leaves_nothing_to_a_closed_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """Python would say "RuntimeError: Event loop is closed" when it lets go of the process."""
    said: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda told: said.append(told.exc_value))
    network, key_path = NetworkThread(), tmp_path / "identity.key"
    before = set(daemon._begun)
    settings = NodeSettings(directory=tmp_path, listen=LOOPBACK)
    starting = network.submit(Node.start(settings, load_or_create_identity(key_path), key_path))
    while not (begun := [p2p for p2p in daemon._begun if p2p not in before and p2p._child is not None]):
        time.sleep(0.001)
    child = begun.pop()._child.pid
    if moment == "before somebody has it":
        starting.result(30)
    starting.cancel()
    network.stop()
    del starting, network
    gc.collect()
    assert not said
    assert set(daemon._begun) <= before and not (tmp_path / "sockets").exists()
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)


def test_a_long_folder_gets_its_sockets_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(daemon.tempfile, "gettempdir", lambda: str(short))
    short = Path("/tmp") / f"st-{os.getpid()}"
    short.mkdir(mode=0o700)
    try:
        folder = daemon._sockets_folder(tmp_path / ("x" * 60))
        assert folder.parent == short and folder.stat().st_mode & 0o777 == 0o700
        (folder / "p2pd-old.sock").touch()
        assert daemon._sockets_folder(tmp_path / ("x" * 60)) == folder, "the same one, so that nothing piles up"
        assert list(folder.iterdir()) == []
        folder.rmdir()
        folder.symlink_to(tmp_path)  # somebody else was there first
        other = daemon._sockets_folder(tmp_path / ("x" * 60))
        assert other != folder and other.is_dir() and not other.is_symlink()
        assert other.stat().st_mode & 0o777 == 0o700
    finally:
        for found in short.iterdir():
            found.unlink() if found.is_symlink() else found.rmdir()
        short.rmdir()


@dataclass
class Owner:
    """Process with a node, and a descriptor of its daemon."""

    process: subprocess.Popen[str]
    daemon_fd: int
    sockets: Path

    def daemon_ends_within(self, limit_s: float) -> bool:
        return bool(select.select([self.daemon_fd], [], [], limit_s)[0])


@pytest.fixture
def owner(tmp_path: Path) -> Iterator[Owner]:
    command = [sys.executable, str(Path(__file__).parent / "owner.py"), str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None
    pid, sockets = process.stdout.readline().split()
    descriptor = os.pidfd_open(int(pid))
    yield Owner(process, descriptor, Path(sockets))
    process.kill()
    process.wait()
    process.stdout.close()
    os.close(descriptor)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere it ends when its socket closes")
def test_a_killed_owner_leaves_no_daemon(owner: Owner) -> None:
    assert not owner.daemon_ends_within(0)
    owner.process.kill()
    assert owner.daemon_ends_within(2)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs a process descriptor")
def test_an_interrupt_of_the_group_leaves_the_daemon_until_the_goodbye(owner: Owner) -> None:
    os.killpg(owner.process.pid, signal.SIGINT)
    assert owner.process.stdout is not None
    assert owner.process.stdout.readline().strip() == "alive"
    assert owner.process.wait(5) == 0
    assert owner.daemon_ends_within(1) and not owner.sockets.exists()


def test_what_is_not_hurried_is_done_soon_and_in_order_and_is_closed_at_the_end() -> None:
    network, done = NetworkThread(), list[int]()
    all_done = threading.Event()

    async def work(number: int) -> None:
        done.append(number)
        if number == 2:
            all_done.set()

    for number in range(3):
        network.submit_unhurried(work(number))
    assert all_done.wait(10) and done == [0, 1, 2]
    network.run(_end_of_unhurried(network))
    left = work(3)
    network.submit_unhurried(left)
    network.stop()
    assert done == [0, 1, 2] and left.cr_frame is None, "closed, so that nobody is warned of it"


async def _end_of_unhurried(network: NetworkThread) -> None:
    assert network._timer is not None
    network._timer.cancel()

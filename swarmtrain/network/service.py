"""Define the eight calls between peers of a run: the service that answers them, and the client.

The calls' namespace is the run's hash, so a peer of another run does not even find them.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import logging
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from google.protobuf.message import Message

from swarmtrain.errors import BadBytesError, BusyError, PeerError, UnreachableError
from swarmtrain.network.daemon import MAX_FRAME_BYTES, hivemind_module
from swarmtrain.network.links.throttle import Places, num_at_once
from swarmtrain.network.node import Node, Stream
from swarmtrain.network.reachability.dial_back import DialBack
from swarmtrain.network.snapshots.replies import Reply, answer
from swarmtrain.network.snapshots.store import SnapshotStore, next_message
from swarmtrain.protocol.membership.budgets import CallBudget
from swarmtrain.run import CHUNK_BYTES
from swarmtrain.v1 import snapshot_pb2 as pb

_log = logging.getLogger(__name__)
_MAX_PULLS = 8
_MAX_HELD_CALLS = 64  # calls about rounds that may wait for news; others are answered at once
_MAX_HELD_CALLS_A_PEER = 2
_MAX_WAIT_S = 60.0
_MAX_STUBS = 4096  # peers to which stubs are kept
_CHAINS_PER_S, _CHAINS_AT_ONCE = 1.0, 8.0
"""Requests for a chain of rosters from one caller: each costs 2.5 MiB and about 10 ms of the loop. Honest peers that
lack a chain ask once a second."""
_HISTORIES_PER_S, _HISTORIES_AT_ONCE = 0.1, 4.0
"""Requests for the run's history from one caller: each costs up to 150 kB. Honest peers ask once a minute."""
_FILE_ATTEMPTS = 240
_FILE_AGAIN_S = 0.5
_MAKE_LIMIT_S = 60.0
"""Seconds for a reply that may have to be computed first."""
_MAX_REPLY_BYTES = MAX_FRAME_BYTES - 64 * 1024  # leaves room for the frame's own fields
_R = TypeVar("_R", bound=Message)


class Answers(Protocol):
    """Peer behind the service. `caller` is a PeerID in base58."""

    def hello(self, request: pb.HelloRequest, caller: str) -> pb.HelloReply:
        """Answer a greeting; the caller may introduce itself or say goodbye."""

    async def state(self, request: pb.StateRequest) -> pb.StateReply:
        """Return the manifest of the newest state, if it is new enough."""

    async def round(self, request: pb.RoundRequest, caller: str) -> pb.RoundReply:
        """Answer what is known about a round; may take up to `request.wait_s` seconds."""

    async def publication(self, request: pb.PublicationRequest, caller: str) -> pb.PublicationReply:
        """Return the newest publication, if the caller does not have it."""

    @property
    def history(self) -> Callable[[], pb.HistoryReply]:
        """Function that returns what is known of the run since its start."""

    def refused(self, peer: str, error: PeerError) -> None:
        """Report a peer that calls too often; called for each such call."""


def namespace_of(run_sha256: str) -> str:
    """Return the namespace of a run's calls."""
    return f"swarmtrain1.{run_sha256[:32]}"


def stream_name(namespace: str, method: str) -> str:
    """Return the name of a call that a stream answers."""
    return f"{namespace}::PeerService.rpc_{method}"


@functools.cache
def service_type() -> Any:
    """Return the servicer class. Its base is hivemind's, which is imported only at the first use."""
    base = hivemind_module("p2p.servicer").ServicerBase

    class PeerService(base):  # type: ignore[misc, valid-type]
        def __init__(self, answers: Answers, store: SnapshotStore, blobs: dict[str, bytes], node: Node) -> None:
            self._answers, self._store, self._blobs, self._node = answers, store, blobs, node
            self._held_calls: Counter[str] = Counter()
            self._budget = CallBudget()
            # Of its own: a caller that has used up the other must still learn of the round.
            self._rounds_budget = CallBudget()
            self._chains_budget = CallBudget(per_s=_CHAINS_PER_S, burst=_CHAINS_AT_ONCE)
            self._histories_budget = CallBudget(per_s=_HISTORIES_PER_S, burst=_HISTORIES_AT_ONCE)
            self._dial_back = DialBack(node)

        def _is_too_often(self, caller: str, budget: CallBudget | None = None) -> bool:
            """Return whether a call exceeds its budget. If so, the caller gets the shortest reply, for which nothing is
            read or computed."""
            budget = budget or self._budget
            if budget.allows(caller, time.monotonic()):
                return False
            self._answers.refused(caller, BadBytesError(budget.in_words, code="too-often"))
            return True

        async def rpc_hello(self, request: pb.HelloRequest, context: Any) -> pb.HelloReply:
            caller = str(context.remote_id)
            if self._is_too_often(caller):
                return pb.HelloReply()
            return self._count(request, self._answers.hello(request, caller))

        async def rpc_state(self, request: pb.StateRequest, context: Any) -> pb.StateReply:
            if self._is_too_often(str(context.remote_id)):
                return pb.StateReply()
            return self._count(request, await self._answers.state(request))

        async def rpc_round(self, request: pb.RoundRequest, context: Any) -> pb.RoundReply:
            caller, held = str(context.remote_id), self._held_calls
            if self._is_too_often(caller, self._rounds_budget):
                raise BusyError(self._rounds_budget.in_words)  # an empty reply would mean round 0
            if request.wants_chain and self._is_too_often(caller, self._chains_budget):
                raise BusyError(self._chains_budget.in_words)
            if held.total() >= _MAX_HELD_CALLS or held[caller] >= _MAX_HELD_CALLS_A_PEER:
                request.wait_s = 0
            # False for NaN too, which would break the order of the loop's timers.
            if not 0 <= request.wait_s <= _MAX_WAIT_S:
                request.wait_s = 0
            held[caller] += 1
            try:
                return self._count(request, await self._answers.round(request, caller))
            finally:
                held[caller] -= 1
                if not held[caller]:
                    del held[caller]

        async def rpc_publication(self, request: pb.PublicationRequest, context: Any) -> pb.PublicationReply:
            caller = str(context.remote_id)
            if self._is_too_often(caller):
                return pb.PublicationReply(busy=True)
            return self._count(request, await self._answers.publication(request, caller))

        async def rpc_history(self, request: pb.HistoryRequest, context: Any) -> pb.HistoryReply:
            caller = str(context.remote_id)
            if self._is_too_often(caller, self._histories_budget):
                raise BusyError(self._histories_budget.in_words)
            return self._count(request, self._answers.history())

        async def rpc_dial(self, request: pb.DialRequest, context: Any) -> pb.DialReply:
            caller = str(context.remote_id)
            if self._is_too_often(caller):
                return pb.DialReply(outcome=pb.DialReply.OUTCOME_BUSY)
            return self._count(request, await self._dial_back.answer(request, caller))

        async def add_p2p_handlers(self, p2p: Any, *, namespace: str) -> None:
            await super().add_p2p_handlers(p2p, namespace=namespace)
            await p2p.add_binary_stream_handler(stream_name(namespace, "pull"), self._answer_pull)
            await p2p.add_binary_stream_handler(stream_name(namespace, "blob"), self._answer_blob)

        async def remove_p2p_handlers(self, p2p: Any, *, namespace: str) -> None:
            await super().remove_p2p_handlers(p2p, namespace=namespace)
            await p2p.remove_binary_stream_handler(stream_name(namespace, "pull"))
            await p2p.remove_binary_stream_handler(stream_name(namespace, "blob"))

        async def _answer_pull(self, info: Any, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await answer(reader, writer, pb.PullRequest(), lambda it: self.pull_replies(it, str(info.peer_id)))

        async def pull_replies(self, request: pb.PullRequest, caller: str) -> AsyncGenerator[Reply, None]:
            if self._is_too_often(caller):
                yield pb.PullReply(status=pb.PullReply.STATUS_BUSY)
                return
            file = self._node.served_files.get(request.snapshot_sha256.hex())
            if self._node.traffic.up_meter is not None:
                self._node.traffic.up_meter.asks(caller)
            count_sent = functools.partial(self._count_sent_to, caller)
            if file is None:
                answers = self._store.serve(request, count_sent, caller)
            else:
                answers = self._store.serve_model_file(file, request, count_sent, caller)
            async with contextlib.aclosing(answers) as replies:
                async for reply in replies:
                    yield reply

        async def _answer_blob(self, info: Any, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await answer(reader, writer, pb.BlobRequest(), lambda it: self.blob_replies(it, str(info.peer_id)))

        async def blob_replies(self, request: pb.BlobRequest, caller: str) -> AsyncGenerator[Reply, None]:
            if self._is_too_often(caller):
                yield pb.PullReply(status=pb.PullReply.STATUS_BUSY)
                return
            name = request.sha256.hex()
            file = self._blobs.get(name) or self._node.served_files.get(name)
            if file is None:
                yield pb.PullReply(status=pb.PullReply.STATUS_UNKNOWN)
                return
            async with contextlib.aclosing(self._store.serve_file(file, self._count_sent, caller)) as replies:
                async for reply in replies:
                    yield reply

        def _count_sent(self, size_bytes: int) -> None:
            self._node.traffic.sent_bytes += size_bytes

        def _count_sent_to(self, reader: str, size_bytes: int) -> None:
            self._count_sent(size_bytes)
            if self._node.traffic.up_meter is not None:
                self._node.traffic.up_meter.sent(reader, size_bytes)

        def _count(self, request: Any, reply: _R) -> _R:
            size = reply.ByteSize()
            if size > _MAX_REPLY_BYTES:  # the daemon would drop it, and the caller would wait in vain
                raise ValueError(f"an answer of {size} bytes, more than {_MAX_REPLY_BYTES}")
            self._node.traffic.called(size, 0 if request is None else request.ByteSize())
            return reply

    return PeerService


@dataclass
class PeerCalls:
    """Calls to other peers of one run. Every failure is a `PeerError`; replies are not yet verified."""

    node: Node
    run_sha256: str
    stall_limit_s: float = 10.0
    min_bytes_per_s: float = 0.0
    on_failure: Callable[[str, PeerError], None] = lambda peer, error: None
    on_answer: Callable[[str], None] = lambda peer: None
    is_hidden: Callable[[str], bool] = lambda peer: False
    """Returns whether nobody can dial a peer; such a peer is called only over a connection that it opened."""
    pull_slots: Places = field(init=False)
    """Slots for pulls: at most 8, since libp2p resets streams beyond about 120 and an uplink gains nothing from more.

    Fewer while downloads are limited: a reader that takes a chunk now and then loses its slot at the source.
    """
    _stubs: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.pull_slots = Places(self._num_pulls)

    def _num_pulls(self) -> int:
        return num_at_once(_MAX_PULLS, self.node.traffic.down.bytes_per_s, self.min_bytes_per_s)

    async def _stub(self, peer: str) -> Any:
        if self.is_hidden(peer) and not await self.node.seen_at(peer):
            self._stubs.pop(peer, None)
            raise UnreachableError("nobody can dial it, and it has no connection to this peer")
        if peer not in self._stubs:
            while len(self._stubs) >= _MAX_STUBS:
                del self._stubs[next(iter(self._stubs))]
            self._stubs[peer] = await self.node.stub_of(service_type(), peer, namespace_of(self.run_sha256))
        return self._stubs[peer]

    async def _call(self, peer: str, method: str, request: Any, limit_s: float | None = None) -> Any:
        try:
            reply = await self.node.call(await self._stub(peer), method, request, limit_s)
        except PeerError as error:
            self._stubs.pop(peer, None)  # dial again next time
            self.on_failure(peer, error)
            raise
        self.on_answer(peer)
        return reply

    async def hello(self, peer: str, request: pb.HelloRequest, limit_s: float | None = None) -> pb.HelloReply:
        """Greet a peer and ask for its presence; introduce this peer or say goodbye."""
        reply: pb.HelloReply = await self._call(peer, "rpc_hello", request, limit_s)
        return reply

    async def state(self, peer: str, min_round: int) -> pb.StateReply:
        """Ask a peer for the manifest of its newest state."""
        request = pb.StateRequest(min_round=min_round)
        reply: pb.StateReply = await self._call(peer, "rpc_state", request, _MAKE_LIMIT_S)
        return reply

    async def round(self, peer: str, request: pb.RoundRequest) -> pb.RoundReply:
        """Ask a peer what it knows about a round."""
        limit_s = request.wait_s + self.node.settings.call_limit_s
        reply: pb.RoundReply = await self._call(peer, "rpc_round", request, limit_s)
        return reply

    async def publication(self, peer: str, request: pb.PublicationRequest) -> pb.PublicationReply:
        """Ask a peer for its newest publication, which the peer may have to build first."""
        reply: pb.PublicationReply = await self._call(peer, "rpc_publication", request, _MAKE_LIMIT_S)
        return reply

    async def history(self, peer: str) -> pb.HistoryReply:
        """Ask a peer for what it knows of the run since its start.

        A failure says nothing about the peer: it may be of a version that tells no history.
        """
        reply: pb.HistoryReply = await self.node.call(await self._stub(peer), "rpc_history", pb.HistoryRequest())
        return reply

    async def dial(self, peer: str, request: pb.DialRequest, limit_s: float) -> pb.DialReply:
        """Ask a peer whether it can dial the peer named in the request."""
        reply: pb.DialReply = await self._call(peer, "rpc_dial", request, limit_s)
        return reply

    async def open_pull(self, peer: str, request: pb.PullRequest) -> Stream:
        """Open a pull's stream. A peer whose bytes come is alive, although answers to calls may be late behind them."""
        stream = await self._open(peer, "pull", request)
        stream.on_bytes = self.on_answer
        return stream

    async def _open(self, peer: str, method: str, request: Any) -> Stream:
        try:
            await self._stub(peer)  # dials it
            name = stream_name(namespace_of(self.run_sha256), method)
            return await self.node.open_stream(peer, name, request)
        except UnreachableError:
            self._stubs.pop(peer, None)  # dial again next time
            raise

    async def blob_untrusted(self, peer: str, sha256: str, max_bytes: int) -> bytes:
        """Fetch a file of the run by its hash, retrying for two minutes while the peer is busy.

        Raises BadBytesError if it is longer than `max_bytes` or has another hash.
        """
        for attempts_left in reversed(range(_FILE_ATTEMPTS)):
            try:
                return await self.blob_once_untrusted(peer, sha256, max_bytes)
            except BusyError:
                if not attempts_left:
                    raise
            await asyncio.sleep(_FILE_AGAIN_S)
        raise AssertionError("the last attempt returns or raises")

    async def blob_once_untrusted(self, peer: str, sha256: str, max_bytes: int) -> bytes:
        """Fetch a file in one stream. Raises BusyError, UnreachableError or BadBytesError."""
        request = pb.BlobRequest(sha256=bytes.fromhex(sha256), max_bytes=max_bytes)
        stream = await self._open(peer, "blob", request)
        parts: list[bytes] = []
        size = 0
        try:
            status = (await next_message(stream, self.stall_limit_s)).status
            if status == pb.PullReply.STATUS_BUSY:
                raise BusyError("it serves as many readers as it may")
            if status != pb.PullReply.STATUS_OK:
                raise UnreachableError("it does not hold this file of the run", code="not-held")
            while not (message := await next_message(stream, self.stall_limit_s)).end:
                data = message.data  # a copy, each time
                if not data or size % CHUNK_BYTES:
                    raise BadBytesError("a file of the run in pieces of another size than agreed", code="bad-size")
                parts.append(data)
                size += len(data)
                await stream.count(len(data))
                if size > max_bytes:
                    raise BadBytesError(f"a file of the run longer than {max_bytes} bytes", code="bad-size")
        finally:
            await stream.aclose()
        whole = b"".join(parts)
        if await _sha256(whole) != sha256:
            raise BadBytesError("a file of the run that does not match its hash", code="bad-hash")
        return whole


async def _sha256(data: bytes) -> str:
    """Return the SHA-256, of much data in a thread: the chunk list of a large file, 8 MiB, takes 10 ms."""
    if len(data) <= CHUNK_BYTES:
        return hashlib.sha256(data).hexdigest()
    return await asyncio.to_thread(lambda: hashlib.sha256(data).hexdigest())

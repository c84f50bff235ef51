"""Run this peer's node: an event loop in a background thread, the daemon, the DHT, and calls to other peers.

Only this module speaks to hivemind's P2P and DHTNode. Every call has a time limit, every failure becomes an
`UnreachableError`, and the daemon's death is noticed. The trainer never enters this loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import logging
import math
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Coroutine, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from google.protobuf.message import Message

from swarmtrain.errors import RunTimeError, UnreachableError
from swarmtrain.network import daemon
from swarmtrain.network.daemon import hivemind_module, swarm_time
from swarmtrain.network.discovery.bounded_dht import use_bounded_protocol
from swarmtrain.network.discovery.buckets import Buckets
from swarmtrain.network.discovery.records import RecordRules, bucket_key, hashed_key, make_validator, num_records
from swarmtrain.network.identity import Identity
from swarmtrain.network.links.meter import LinkMeter
from swarmtrain.network.links.throttle import Throttle, TransferTimes
from swarmtrain.network.model_files.served_file import ServedFile
from swarmtrain.network.reachability.listen import cannot_listen, is_taken
from swarmtrain.network.snapshots.replies import Replies
from swarmtrain.network.tasks import end_tasks, logged
from swarmtrain.protocol.membership.budgets import may_dial
from swarmtrain.v1 import snapshot_pb2 as pb
from swarmtrain.words import one_line

NOT_SERVED = "does not serve this run"
"""Text of the `UnreachableError` for a peer that answers, but does not know the run or the call."""

_log = logging.getLogger(__name__)
_T = TypeVar("_T")
PipeHandler = Callable[[str, asyncio.StreamReader, asyncio.StreamWriter], Coroutine[Any, Any, None]]
_MAX_KNOWN = 4096  # peers whose addresses are remembered
_MAX_DIALLED = 8  # addresses remembered of one peer
_MAX_OWN_BUCKETS = 512
DAEMON_START_S = 60.0
"""Time limit of the daemon's start, usually a tenth of a second; at a load of 20 on two cores 15 s were not enough.
A daemon that dies is told at once."""
_REAPED_S = 0.5  # for the status of a daemon whose sockets have closed
_UNHURRIED_S = 0.1  # see `submit_unhurried`


class NetworkThread:
    """Event loop in a thread of its own, in which everything of the network runs."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._loop.set_exception_handler(_log_stray_error)
        self._unhurried: deque[Coroutine[Any, Any, None]] = deque()
        self._timer: asyncio.Handle | None = None
        self._thread = threading.Thread(target=self._loop.run_forever, name="network", daemon=True)
        self._thread.start()

    def submit(self, coroutine: Coroutine[Any, Any, _T]) -> Future[_T]:
        """Start a coroutine in the network thread. Any thread may wait for the returned future."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def submit_unhurried(self, coroutine: Coroutine[Any, Any, None]) -> None:
        """Start a coroutine in the network thread within `_UNHURRIED_S`, without waking that thread.

        A woken thread would take Python's lock from the caller, and the trainer would wait until it has it back.
        """
        self._unhurried.append(coroutine)
        if self._timer is None:  # only the first one wakes the thread; most processes have none
            self._timer = self._loop.call_soon_threadsafe(self._begin_unhurried)

    def _begin_unhurried(self) -> None:
        while self._unhurried:
            logged(self._loop.create_task(self._unhurried.popleft()), "network")
        self._timer = self._loop.call_later(_UNHURRIED_S, self._begin_unhurried)

    def run(self, coroutine: Coroutine[Any, Any, _T], limit_s: float | None = None) -> _T:
        """Run a coroutine in the network thread and wait for its result."""
        future = self.submit(coroutine)
        try:
            return future.result(limit_s)
        except BaseException:
            future.cancel()
            raise

    def log_tasks(self) -> None:
        """Log what every task of the network thread waits for, to find out why a peer is stuck."""

        def write() -> None:
            for task in asyncio.all_tasks(self._loop):
                text = io.StringIO()
                task.print_stack(file=text)
                _log.warning("%s", text.getvalue())

        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(write)

    def stop(self) -> None:
        """Cancel all tasks of the network thread and end it."""
        with contextlib.suppress(Exception):
            self.run(self._end(), 5)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)
        for coroutine in self._unhurried:
            coroutine.close()
        if not self._thread.is_alive():
            self._loop.close()

    async def _end(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        await _cancel_others()
        await daemon.stop_left_daemons()


def _log_stray_error(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Log failed hivemind tasks, which fail whenever the daemon ends, for debugging only; report all others."""
    if "hivemind" in repr(context.get("future") or context.get("task")):
        _log.debug("%s: %s", context.get("message"), context.get("exception"))
    else:
        loop.default_exception_handler(context)


async def _cancel_others() -> None:
    await end_tasks(task for task in asyncio.all_tasks() if task is not asyncio.current_task())
    await asyncio.get_running_loop().shutdown_asyncgens()


@dataclass(frozen=True, kw_only=True)
class NodeSettings:
    """Addresses and folder of a node. Addresses are multiaddresses without /p2p.

    `dht_mode` is that of libp2p's own DHT, through which daemons find each other; with "off" a node dials nobody by
    itself. With `only_announced` the node advertises only what it announces, not where it listens. With `checks_reach`
    it asks others whether they can dial it although all of them are on this machine.
    """

    directory: Path
    listen: tuple[str, ...] = ("/ip4/0.0.0.0/tcp/0", "/ip6/::/tcp/0")
    announce: tuple[str, ...] = ()
    call_limit_s: float = 5.0
    dht_mode: str = "server"
    only_announced: bool = False
    checks_reach: bool = False


@dataclass
class TrafficCount:
    """Traffic of a node: bytes of its messages in serialised form (the transport adds a few per cent).

    Also holds the limits of both directions, how long received transfers took, and what the link was measured to carry,
    if `measure_link` was called.
    """

    sent_bytes: int = 0
    received_bytes: int = 0
    up: Throttle = field(default_factory=Throttle)
    down: Throttle = field(default_factory=Throttle)
    times: TransferTimes = field(init=False)
    up_meter: LinkMeter | None = field(default=None, init=False)
    down_meter: LinkMeter | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.times = TransferTimes(self.down)

    def measure_link(self) -> None:
        """Measure from now on what the link carries, for runs whose peers divide their work by it."""
        self.up_meter, self.down_meter = LinkMeter(self.up), LinkMeter(self.down)

    @property
    def _meters(self) -> list[LinkMeter]:
        """Meters of both directions; none where nothing is measured."""
        return [meter for meter in (self.up_meter, self.down_meter) if meter is not None]

    def disturbed(self) -> None:
        """Record that a transfer failed, so that what is measured now is less than the links can carry."""
        for meter in self._meters:
            meter.disturbed()

    @property
    def link_bytes_per_s(self) -> tuple[float, float]:
        """Measured rates of the link up and down; 0 where nothing is measured."""
        up, down = (0.0 if meter is None else meter.bytes_per_s for meter in (self.up_meter, self.down_meter))
        return up, down

    def round_over(self) -> None:
        """Let what was measured of the link in a round count; see `LinkMeter.round_over`."""
        for meter in self._meters:
            meter.round_over()

    def called(self, sent_bytes: int, received_bytes: int) -> None:
        """Count a small call or its reply."""
        self.sent_bytes += sent_bytes
        self.received_bytes += received_bytes
        self.up.count(sent_bytes)
        self.down.count(received_bytes)


class Stream:
    """Stream of messages that answers a call.

    Callers that take data out of a message report its size to `count`: asking the message itself would copy the data.
    """

    def __init__(self, stream: Any, traffic: TrafficCount, peer: str = "") -> None:
        self._stream, self._traffic, self._peer = stream, traffic, peer
        self.on_bytes: Callable[[str], None] = lambda peer: None
        """Called with the peer when bytes came from it."""
        self._opened_s, self._received_bytes = time.monotonic(), 0

    async def __anext__(self) -> Any:
        message = await anext(self._stream)
        if message.end:
            self._traffic.times.finished(self._received_bytes, time.monotonic() - self._opened_s)
        return message

    async def take(self, chunks: range, room_of: Callable[[int], memoryview], came: Callable[[int], None]) -> None:
        """Put the next chunks where they belong, few at once while downloads are limited, and call `came` for each."""
        at_once_bytes = self._traffic.down.at_once_bytes
        if math.isfinite(at_once_bytes):
            chunks = chunks[: max(1, int(at_once_bytes / len(room_of(chunks.start))))]
        await self._stream.take(chunks, room_of, came)

    async def count(self, size_bytes: int) -> None:
        """Count `size_bytes` as received; returns when more may be received."""
        self._received_bytes += size_bytes
        self._traffic.received_bytes += size_bytes
        if self._traffic.down_meter is not None:
            self._traffic.down_meter.passed(self._peer, size_bytes)
        self.on_bytes(self._peer)
        await self._traffic.down.turn(size_bytes)

    async def aclose(self) -> None:
        """Hang up."""
        with contextlib.suppress(Exception):
            await self._stream.aclose()


@dataclass
class Node:
    """Running node. `Node.start` makes one, inside the network thread's loop."""

    identity: Identity
    settings: NodeSettings
    rules: RecordRules
    traffic: TrafficCount = field(default_factory=TrafficCount)
    served_files: dict[str, ServedFile] = field(default_factory=dict)
    """Files on the disk that this node serves in its runs, by SHA-256: the run's model files and their chunk lists.
    Threads add to them."""
    _p2p: Any = None
    _dht: Any = None
    _buckets: Buckets = field(init=False, repr=False)
    _sockets: Path | None = None
    _known: dict[str, tuple[str, ...]] = field(default_factory=dict)
    _own_buckets: set[bytes] = field(default_factory=set)
    _services: dict[str, tuple[Any, list[asyncio.Task[None]]]] = field(default_factory=dict, init=False, repr=False)
    """What answers in each namespace, and what runs beside it."""

    @classmethod
    async def start(cls, settings: NodeSettings, identity: Identity, key_path: Path) -> Node:
        """Start the daemon and listen. Raises RunTimeError when the port is taken or the daemon does not start."""
        node = cls(identity, settings, RecordRules(identity))
        loopback = all("/127." in address or "/::1/" in address for address in settings.listen)
        if any(map(is_taken, settings.listen)):
            raise cannot_listen(settings.listen)
        try:
            node._p2p, node._sockets = await daemon.start_daemon(
                settings.directory,
                key_path,
                host_maddrs=list(settings.listen),
                announce_maddrs=list(settings.announce) if settings.only_announced else None,
                dht_mode=settings.dht_mode,
                nat_port_map=not loopback,
                auto_nat=not loopback,
                # libp2p's relays cut every stream silently after 131,072 bytes at most starts (measured), so hidden
                # peers use hosts of our own (decision 19).
                use_relay=False,
                startup_timeout=DAEMON_START_S,
            )
        except Exception as error:  # boundary to hivemind: whatever it raises becomes one sentence
            raise _start_error(error, settings) from error
        if not settings.only_announced and not await node._listening_at():
            await node.stop()
            raise cannot_listen(settings.listen)
        return node

    async def addresses(self) -> tuple[str, ...]:
        """Return the addresses that others may dial, without /p2p: announced ones first, loopback last."""
        found = await self._listening_at()
        told = dict.fromkeys([*self.settings.announce, *found] if found else ())
        return tuple(sorted(told, key=lambda a: "/127." in a or "/::1/" in a))

    async def _listening_at(self) -> list[str]:
        """Return the daemon's addresses, without /p2p; empty if it could not listen."""
        try:
            visible = await self._p2p.get_visible_maddrs(latest=True)
        except ValueError:
            return []
        found = (str(address).split("/p2p/")[0] for address in visible)
        return [address for address in found if "/tcp/" in address]

    async def wait_until_dead(self) -> str:
        """Wait until the daemon, or its connection to this process, has ended; return in words which of the two.
        hivemind itself never notices: calls would hang (measured)."""
        control = self._p2p._client.control
        ended = asyncio.create_task(self._p2p._child.wait())
        await asyncio.wait({ended, control._read_task, control._write_task}, return_when=asyncio.FIRST_COMPLETED)
        await asyncio.wait({ended}, timeout=_REAPED_S)  # its sockets close before its status is known
        return _how_it_ended(ended.result()) if ended.done() else "was cut off from this process"

    # ------------------------------------------------------------- calls

    async def serve(self, service: Any, namespace: str, beside: Coroutine[Any, Any, None] | None = None) -> None:
        """Answer calls to `service` in the run's `namespace`, in place of what answered there before. `beside` runs
        until another one answers there, or the node ends."""
        await self._end_service(namespace)
        tasks = [] if beside is None else [logged(asyncio.create_task(beside), namespace)]
        self._services[namespace] = service, tasks
        await service.add_p2p_handlers(self._p2p, namespace=namespace)

    async def _end_service(self, namespace: str) -> None:
        if (former := self._services.pop(namespace, None)) is not None:
            service, beside = former
            await end_tasks(beside)
            await service.remove_p2p_handlers(self._p2p, namespace=namespace)

    async def connect(self, peer: str, addresses: Iterable[str], limit_s: float | None = None) -> None:
        """Dial a peer and remember its addresses. Raises UnreachableError if nobody with that PeerID answers there."""
        addresses = tuple(addresses)
        await self.dial_once(peer, addresses, limit_s or self.settings.call_limit_s)
        self._remember(peer, addresses)

    async def dial_once(self, peer: str, addresses: tuple[str, ...], limit_s: float) -> None:
        """Dial a peer without remembering its addresses. Raises UnreachableError."""
        multiaddr = hivemind_module("utils.multiaddr").Multiaddr
        try:
            maddrs = [multiaddr(address) for address in addresses]
            with daemon.closed_on_failure():
                await asyncio.wait_for(self._p2p._client.connect(self._peer_id(peer), maddrs), limit_s)
        except Exception as error:  # boundary to hivemind
            raise UnreachableError(f"{peer} does not answer at {', '.join(addresses) or 'any address'}") from error

    async def seen_at(self, peer: str) -> tuple[str, ...]:
        """Return the remote multiaddresses of the open connections to `peer`; empty if there are none."""
        try:
            found = await asyncio.wait_for(self._p2p._client.list_peers(), self.settings.call_limit_s)
        except Exception as error:  # boundary to hivemind
            _log.debug("listing connections failed: %s", error)
            return ()
        wanted = self._peer_id(peer)
        return tuple(str(address) for item in found if item.peer_id == wanted for address in item.addrs)

    async def hang_up(self, peer: str) -> None:
        """Close the connections to `peer`."""
        with contextlib.suppress(Exception):
            await asyncio.wait_for(self._p2p._client.disconnect(self._peer_id(peer)), self.settings.call_limit_s)

    def remember_addresses(self, peer: str, addresses: Iterable[str], given: Collection[str] = ()) -> None:
        """Remember the addresses that `peer` advertises; a call without a connection dials them. Addresses in `given`
        come from the user.

        A stranger chooses which addresses this peer dials, so only a few addresses are kept: TCP, no names, and no
        group, any or link-local address. Private addresses must be allowed, since swarms live in local networks; what
        the daemon sends there is a greeting of twenty bytes.
        """
        allowed = (address for address in addresses if address in given or may_dial(address))
        self._remember(peer, tuple(allowed)[:_MAX_DIALLED])

    def _remember(self, peer: str, addresses: tuple[str, ...]) -> None:
        self._known.pop(peer, None)
        while len(self._known) >= _MAX_KNOWN:
            del self._known[next(iter(self._known))]  # the one remembered longest ago
        self._known[peer] = addresses

    def known_peers(self) -> list[str]:
        """Return all peers whose addresses are remembered."""
        return list(self._known)

    async def enter_routing_table(self, peer: str) -> None:
        """Enter `peer` into the DHT's routing table (again): the DHT drops a node that fails to answer once."""
        with contextlib.suppress(Exception):
            await asyncio.wait_for(self._dht.protocol.call_ping(self._peer_id(peer)), self.settings.call_limit_s)

    async def call(self, stub: Any, method: str, request: Message, limit_s: float | None = None) -> Any:
        """Make one small call with a stub of `stub_of`. Raises UnreachableError on any failure or after the
        time limit."""
        limit_s = limit_s or self.settings.call_limit_s
        try:
            reply = await getattr(stub, method)(request, timeout=limit_s)
        except asyncio.CancelledError:
            raise
        except TimeoutError:
            raise UnreachableError(f"no answer within {limit_s:g} s") from None
        except Exception as error:  # boundary to hivemind
            raise UnreachableError(_reason(error)) from error
        self.traffic.called(request.ByteSize(), reply.ByteSize())
        return reply

    async def open_stream(self, peer: str, handler: str, request: Message) -> Stream:
        """Make a call that a stream answers. The caller limits the time between messages and must `aclose`
        the stream."""
        _, writer = await self.open_pipe(peer, handler)
        try:
            replies = Replies(writer, request)
        except Exception as error:  # boundary to hivemind
            writer.close()
            raise UnreachableError(_reason(error)) from error
        self.traffic.called(request.ByteSize(), 0)
        return Stream(replies, self.traffic, peer)

    async def open_pipe(self, peer: str, handler: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Open a two-way byte stream to a handler of `serve_pipes`. The caller limits its times and must close it."""
        try:
            with daemon.closed_on_failure():
                opening = self._p2p.call_binary_stream_handler(self._peer_id(peer), handler)
                _, reader, writer = await asyncio.wait_for(opening, self.settings.call_limit_s)
        except Exception as error:  # boundary to hivemind
            raise UnreachableError(_reason(error)) from error
        return reader, writer

    async def serve_pipes(self, handler: str, answer: PipeHandler) -> None:
        """Pass streams that other peers open with `open_pipe` to `answer`, with their PeerIDs."""

        async def answered(info: Any, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await answer(str(info.peer_id), reader, writer)

        await self._p2p.add_binary_stream_handler(handler, answered)

    async def stub_of(self, service_type: Any, peer: str, namespace: str) -> Any:
        """Return a stub for calls to `peer`; dials its remembered addresses first."""
        # A peer that is connected already is not dialled again: the daemon says yes in under 1 ms (decision 10).
        if peer in self._known:
            with contextlib.suppress(UnreachableError):
                await self.connect(peer, self._known[peer])
        return service_type.get_stub(self._p2p, self._peer_id(peer), namespace=namespace)

    def _peer_id(self, peer: str) -> Any:
        return hivemind_module("p2p.p2p_daemon_bindings.datastructures").PeerID.from_base58(peer)

    # ------------------------------------------------------------- the DHT

    async def join_dht(self, peers: Sequence[tuple[str, tuple[str, ...]]]) -> None:
        """Enter the DHT through connected `peers`, or alone if there are none. Does nothing the second time."""
        if self._dht is not None:
            return
        initial = [f"/p2p/{peer}" for peer, addresses in peers if addresses]  # hivemind uses only the PeerIDs
        try:
            self._dht = await asyncio.wait_for(
                use_bounded_protocol().create(
                    p2p=self._p2p,
                    initial_peers=initial or None,
                    record_validator=make_validator(self.rules),
                    cache_locally=False,
                    cache_nearest=0,
                    num_workers=4,
                    strict=False,
                    ensure_bootstrap_success=False,
                ),
                20,
            )
        except Exception as error:  # boundary to hivemind
            raise RunTimeError(
                f"could not join the DHT: {_reason(error)}; try again, or ask for a new invite", code="dht-not-joined"
            ) from error
        self._buckets = Buckets(self._dht, self.rules)
        self._own_buckets = self._dht.protocol.own_buckets

    async def store(self, record: pb.Record, lifetime_s: float) -> bool:
        """Store this peer's record in its bucket for `lifetime_s`. Returns False if no node took it."""
        kind = record.WhichOneof("body")
        key = self._own_bucket(record.run_sha256, kind, record.prefix)
        try:
            storing = self._buckets.store(
                key, self.identity.peer_id, record.SerializeToString(), swarm_time() + lifetime_s
            )
            return await asyncio.wait_for(storing, 10)
        except Exception as error:  # boundary to hivemind
            _log.debug("storing a record failed: %s", error)
            return False

    async def read_bucket(self, run_sha256: bytes, kind: str, prefix: str) -> dict[str, tuple[pb.Record, float]]:
        """Return PeerID -> (record, expiry in swarm time) of one bucket, without invalid records."""
        try:
            found = await asyncio.wait_for(self._buckets.read(self._own_bucket(run_sha256, kind, prefix)), 10)
        except Exception as error:  # boundary to hivemind
            _log.debug("reading a bucket failed: %s", error)
            return {}
        records = {}
        for peer, (value, expiry_s) in found.items():
            try:
                records[peer] = (pb.Record.FromString(value), expiry_s)
            except Exception as error:  # it passed the validator but is not one of our records
                _log.debug("dropped a record of %s: %s", peer, error)
        return records

    @property
    def num_dht_records(self) -> int:
        """Number of records that this node keeps for the swarm, its own included."""
        return num_records(self._dht.protocol.storage) if self._dht is not None else 0

    def _own_bucket(self, run_sha256: bytes, kind: str | None, prefix: str) -> str:
        key = bucket_key(run_sha256, kind or "", prefix)
        if len(self._own_buckets) >= _MAX_OWN_BUCKETS:  # strangers that fill buckets decide which others are read
            self._own_buckets.clear()
        self._own_buckets.add(hashed_key(key))
        return key

    async def stop(self) -> None:
        """Leave the DHT and end the daemon."""
        for _, beside in self._services.values():
            await end_tasks(beside)
        if self._dht is not None:
            with contextlib.suppress(Exception):
                await asyncio.wait_for(self._dht.shutdown(), 1)
        if self._p2p is not None and self._sockets is not None:
            await daemon.stop_daemon(self._p2p, self._sockets)


def _how_it_ended(status: int) -> str:
    if status >= 0:
        return f"ended with status {status}"
    with contextlib.suppress(ValueError):
        return f"was ended by {signal.Signals(-status).name}"
    return f"was ended by signal {-status}"


def _reason(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    if "protocol" in text and "not supported" in text:
        return f"it {NOT_SERVED}"
    return one_line(text.splitlines()[0][:200])


def _start_error(error: Exception, settings: NodeSettings) -> RunTimeError:
    text = str(error)
    if "address already in use" in text or "failed to listen" in text:
        return cannot_listen(settings.listen)
    reason = text.splitlines()[0] if text else type(error).__name__
    if "failed to start in" in text:
        reason += "; this machine may be too busy: try again with fewer programs beside it"
    return RunTimeError(
        f"the network daemon did not start: {reason}; `swarmtrain doctor` looks at what it needs",
        code="daemon-not-started",
    )

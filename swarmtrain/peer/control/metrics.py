"""Prometheus metrics of one peer, served over HTTP where `--metrics` says.

A scrape reads the status that `swarmtrain status` shows (`peer/control/board.py`). Counts that are not in it come from
the peer's events. So the training pays nothing for metrics, and nothing happens between scrapes. Durations are in
seconds, sizes in bytes; what is unknown is left out. No label names another peer: there may be any number of them, and
they choose their names (decision 17).
"""

from __future__ import annotations

import logging
import socket
import socketserver
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import CollectorRegistry, ProcessCollector, make_wsgi_app
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from swarmtrain.errors import UserError
from swarmtrain.events import CaughtUpEvent, Event, PeerLostEvent, RefusedEvent, RoundEvent, WarningEvent
from swarmtrain.network.reachability.listen import is_own_host
from swarmtrain.peer.control.board import StatusBoard
from swarmtrain.peer.control.usage import Usage
from swarmtrain.peer.estimate import Estimate
from swarmtrain.v1 import control_pb2 as pb

_log = logging.getLogger(__name__)
_MAX_RULES = 32
_MAX_CALLS = 8
_CALL_LIMIT_S = 10.0
_STOP_POLL_S = 0.1
_JOIN_S = 2.0
_STATES = {
    number: name.removeprefix("PEER_STATE_").lower()
    for name, number in pb.PeerState.items()
    if number != pb.PEER_STATE_UNSPECIFIED
}


class EventCounts:
    """Sums over a peer's events since its process began. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sums: Counter[str] = Counter()
        self._refused: Counter[str] = Counter()

    def take(self, event: Event) -> None:
        """Count an event."""
        with self._lock:
            match event:
                case RoundEvent():
                    self._sums["rounds"] += 1
                    self._sums["inner_steps"] += event.inner_steps
                    for name in ("seconds", "merge_s", "stall_s"):
                        self._sums[name] += getattr(event, name)
                case RefusedEvent():
                    known = event.rule in self._refused or len(self._refused) < _MAX_RULES
                    self._refused[event.rule if known else "other"] += 1
                case WarningEvent() | CaughtUpEvent() | PeerLostEvent():
                    self._sums[event.event] += 1
                case _:
                    pass

    def sum(self, name: str) -> float:
        """Return the sum of a field of the rounds, or the number of events of a kind."""
        with self._lock:
            return float(self._sums[name])

    def refused(self) -> dict[str, float]:
        """Return how often something was refused, by the rule that it broke."""
        with self._lock:
            return {rule: float(number) for rule, number in self._refused.items()}


# ---------------------------------------------------------------- what there is


@dataclass(frozen=True, kw_only=True)
class _Look:
    """Peer's status and counts, as one scrape reads them."""

    status: pb.PeerStatus
    counts: EventCounts
    healthy: bool
    tokens_per_step: float
    memory_bytes: int
    expected: Estimate | None
    """Expected cost of the run for a volunteer, with as many volunteers as are present; None if unknown."""

    @property
    def joined(self) -> bool:
        """True once the peer has joined. Before, counts of earlier processes may be missing, and a counter must not
        shrink.
        """
        return self.status.state != pb.PEER_STATE_STARTING

    @property
    def trains(self) -> bool:
        return self.status.role == "volunteer"


_Read = Callable[[_Look], "float | Mapping[str, float] | None"]


@dataclass(frozen=True)
class _Metric:
    name: str
    """Name with its unit; for a counter without `_total`."""
    family: type[GaugeMetricFamily] | type[CounterMetricFamily]
    meaning: str
    read: _Read
    unit: str = ""
    label: str = ""
    """Name of the label whose values are the keys that `read` gives."""

    @property
    def exposed(self) -> str:
        """Metric's name as Prometheus knows it."""
        return f"swarmtrain_{self.name}" + ("_total" if self.family is CounterMetricFamily else "")


def _count(name: str) -> _Read:
    return lambda look: look.counts.sum(name)


def _present(look: _Look) -> Mapping[str, float]:
    found = {"volunteer": 0.0, "bootstrap": 0.0}
    for peer in look.status.peers:
        found["bootstrap" if peer.bootstrap else "volunteer"] += peer.present
    return found


def _inner_steps_per_s(look: _Look) -> float | None:
    if not look.trains or not look.tokens_per_step:
        return None
    return look.status.own_tokens_per_s / look.tokens_per_step


def _newest_loss(look: _Look) -> float | None:
    return look.status.losses[-1].loss if look.status.losses else None


def _expected(name: str) -> _Read:
    return lambda look: None if look.expected is None else float(getattr(look.expected, name))


# Counters are made at each scrape, not as `prometheus_client.Counter`: that adds a `_created` series to each, which
# only a switch for the whole process turns off (decision 17).
_GAUGE, _COUNTER = GaugeMetricFamily, CounterMetricFamily

METRICS: tuple[_Metric, ...] = (
    _Metric("state", _GAUGE, "State of the peer: 1 for the current one, 0 for the others.", lambda look: {name: float(look.status.state == number) for number, name in _STATES.items()}, label="state"),
    _Metric("training", _GAUGE, "1 if it is in its training rounds, merges included; else 0.", lambda look: float(look.status.state == pb.PEER_STATE_TRAINING)),
    _Metric("healthy", _GAUGE, "1 if it trains or serves and makes progress, as its health service says; else 0.", lambda look: float(look.healthy)),
    _Metric("start_time_seconds", _GAUGE, "Start of its process, in seconds since 1970.", lambda look: look.status.started_time, unit="seconds"),
    _Metric("peers", _GAUGE, "Peers present in the swarm, as far as this one knows, itself included, by role.", _present, label="role"),
    _Metric("round", _GAUGE, "Round that it is in.", lambda look: look.status.round if look.joined else None),
    _Metric("loss", _GAUGE, "Mean training loss over its last round, in nats per token; of a bootstrap, the median that volunteers report.", _newest_loss),
    _Metric("held_out_loss", _GAUGE, "Last loss that it measured on the run's held-out text, in nats per byte.", lambda look: look.status.held_out_loss or None),
    _Metric("source_held_out_loss", _GAUGE, "The same on the part of each source, where the run has several sources of text.", lambda look: {each.name: each.held_out_loss for each in look.status.source_losses} or None, label="source"),
    _Metric("tokens", _COUNTER, "Tokens that it has contributed to the run, over all its processes; of samples, those to be learnt, as in `run.total_tokens`.", lambda look: look.status.own_tokens if look.joined and look.trains else None),
    _Metric("tokens_per_second", _GAUGE, "Such tokens per second, over the last half minute.", lambda look: look.status.own_tokens_per_s if look.trains else None),
    _Metric("run_tokens", _GAUGE, "Tokens that the whole run has been trained on, as far as this peer knows.", lambda look: look.status.run_tokens if look.joined else None),
    _Metric("run_target_tokens", _GAUGE, "Tokens at which the run ends.", lambda look: look.status.total_tokens or None),
    _Metric("run_tokens_per_second", _GAUGE, "Tokens per second of the whole run, as far as this peer knows; those that `swarmtrain_run_tokens` counts.", lambda look: look.status.swarm_tokens_per_s if look.joined else None),
    _Metric("rounds", _COUNTER, "Rounds that it has trained and merged since its process began.", _count("rounds")),
    _Metric("inner_steps", _COUNTER, "Inner steps that it took in these rounds.", _count("inner_steps")),
    _Metric("inner_steps_per_second", _GAUGE, "Inner steps per second, over the last half minute.", _inner_steps_per_s),
    _Metric("round_seconds", _COUNTER, "Seconds in these rounds, merges and waiting included.", _count("seconds"), unit="seconds"),
    _Metric("merge_seconds", _COUNTER, "Seconds from the end of its inner steps to the merged weights in these rounds.", _count("merge_s"), unit="seconds"),
    _Metric("stall_seconds", _COUNTER, "Seconds in which its trainer was stalled by the network or a merge in these rounds.", _count("stall_s"), unit="seconds"),
    _Metric("sent_bytes", _COUNTER, "Payload bytes that it has sent since its process began.", lambda look: look.status.sent_bytes, unit="bytes"),
    _Metric("received_bytes", _COUNTER, "Payload bytes that it has received since its process began.", lambda look: look.status.received_bytes, unit="bytes"),
    _Metric("estimated_round_sent_bytes", _GAUGE, "Bytes that it is expected to send for merges in a round, as estimated by `swarmtrain check` for the number of volunteers present.", _expected("bytes_sent_per_round"), unit="bytes"),
    _Metric("estimated_round_most_sent_bytes", _GAUGE, "Most bytes that it is expected to send in a round in which the archive or a late joiner takes its state.", _expected("bytes_sent_most_per_round"), unit="bytes"),
    _Metric("estimated_round_received_bytes", _GAUGE, "Bytes that it is expected to receive for merges in a round.", _expected("bytes_received_per_round"), unit="bytes"),
    _Metric("memory_bytes", _GAUGE, "Bytes of memory of its process and its network daemon; memory shared with other programs counts in proportion.", lambda look: look.memory_bytes, unit="bytes"),
    _Metric("estimated_memory_bytes", _GAUGE, "Most bytes of memory that it is expected to use, as estimated by `swarmtrain check` for the number of volunteers present.", _expected("memory_bytes"), unit="bytes"),
    _Metric("times_below_allreduce", _GAUGE, "How many times fewer bytes it sent than an all-reduce at each step would.", lambda look: look.status.times_below_allreduce or None),
    _Metric("checkpoint_time_seconds", _GAUGE, "Time of its newest checkpoint, in seconds since 1970.", lambda look: look.status.checkpoint.time if look.status.HasField("checkpoint") else None, unit="seconds"),
    _Metric("dht_records", _GAUGE, "DHT records that it stores for the swarm.", lambda look: look.status.dht_records if look.joined else None),
    _Metric("refused", _COUNTER, "Data from other peers that it refused, by broken rule.", lambda look: look.counts.refused(), label="rule"),
    _Metric("warnings", _COUNTER, "Warnings that it gave.", _count("warning")),
    _Metric("catch_ups", _COUNTER, "Merges that it missed, and whose state it took from another peer.", _count("caught_up")),
    _Metric("peers_lost", _COUNTER, "Peers that vanished without leaving.", _count("peer_lost")),
)  # fmt: skip
"""Metrics, one per line; the table in docs/control.md has the same names."""


class PeerCollector(Collector):
    """Turns a peer's status and its counted events into metrics, anew at each scrape."""

    def __init__(
        self,
        board: StatusBoard,
        counts: EventCounts,
        is_healthy: Callable[[], bool],
        memory_bytes: Callable[[], int] | None = None,
    ) -> None:
        self._board, self._counts, self._is_healthy = board, counts, is_healthy
        self._memory_bytes = memory_bytes or Usage().memory_bytes
        self._highest: dict[tuple[str, str], float] = {}
        self._lock = threading.Lock()

    def collect(self) -> Iterable[Metric]:
        """Return the metrics now."""
        status = self._board.status()
        look = _Look(
            status=status,
            counts=self._counts,
            healthy=self._is_healthy(),
            tokens_per_step=self._board.tokens_per_step,
            memory_bytes=self._memory_bytes(),
            expected=self._board.estimate_now(status),
        )
        facts = {"version": status.version, "role": status.role, "run": status.run_name}
        facts |= {"run_sha256": status.run_sha256, "name": status.name, "peer": status.peer}
        yield InfoMetricFamily("swarmtrain", "Identity of this peer and of its run.", facts)
        if status.HasField("device"):
            on = {"device": status.device.device, "title": status.device.title, "precision": status.device.precision}
            yield InfoMetricFamily("swarmtrain_device", "Device that it trains on, and the precision there.", on)
        for metric in METRICS:
            if (value := metric.read(look)) is not None:
                yield self._family(metric, value if isinstance(value, Mapping) else {"": value})

    def _family(self, metric: _Metric, values: Mapping[str, float]) -> Metric:
        labels = [metric.label] if metric.label else []
        family = metric.family(f"swarmtrain_{metric.name}", metric.meaning, labels=labels, unit=metric.unit)
        for key, value in values.items():
            if metric.family is CounterMetricFamily:
                value = self._grown((metric.name, key), value)
            family.add_metric([key] if metric.label else [], value)
        return family

    def _grown(self, which: tuple[str, str], value: float) -> float:
        """Return the highest value of a counter so far.

        Without a pulse the traffic is that of the last pulse, which was a little less; Prometheus would take a drop for
        a restart.
        """
        with self._lock:
            self._highest[which] = max(value, self._highest.get(which, 0.0))
            return self._highest[which]


# ---------------------------------------------------------------- serving them


class _Handler(WSGIRequestHandler):
    timeout = _CALL_LIMIT_S

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing: a scrape every few seconds is not worth a line."""


class _HttpServer(socketserver.ThreadingMixIn, WSGIServer):
    """HTTP server with a thread for each call, for a few calls at once; further callers are disconnected."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 2 * _MAX_CALLS

    def __init__(self, family: socket.AddressFamily, address: tuple[Any, ...]) -> None:
        self.address_family = family
        self._room = threading.BoundedSemaphore(_MAX_CALLS)
        super().__init__(address, _Handler)

    def server_bind(self) -> None:
        """Bind without looking up this machine's name, which can take long where no name server answers."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]  # type: ignore[assignment]
        self.setup_environ()

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._room.acquire(blocking=False):
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._room.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log that somebody hung up or was too slow."""
        _log.debug("a call for metrics failed: %r", sys.exception())


class MetricsServer:
    """Serves `collector`, and what the process uses, at `address` (HOST:PORT), from `start` to `stop`."""

    def __init__(self, address: str, collector: Collector) -> None:
        self._address = address
        registry = CollectorRegistry()  # not the global one: a process may have several peers, or metrics of its own
        registry.register(collector)
        ProcessCollector(registry=registry)
        self._app = make_wsgi_app(registry)
        self._server: _HttpServer | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> str:
        """Start serving; return the address, with the port that was chosen if none was given. Raises UserError if it
        cannot.
        """
        host, _, port = self._address.rpartition(":")
        try:
            family, *_, address = socket.getaddrinfo(
                host.strip("[]"), int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
            server = self._server = _HttpServer(family, address)
        except OSError as error:
            raise UserError(
                f"cannot serve metrics at {self._address}: {error.strerror or error}; choose another with --metrics",
                code="metrics-address",
            ) from None
        server.set_app(self._answer)
        self._thread = threading.Thread(target=server.serve_forever, args=(_STOP_POLL_S,), name="metrics", daemon=True)
        self._thread.start()
        return f"{host}:{server.server_port}"

    def stop(self) -> None:
        """Stop serving; a call being answered is not waited for."""
        if self._server is not None and self._thread is not None:
            self._server.shutdown()
            self._thread.join(_JOIN_S)
            self._server.server_close()

    def _answer(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        names = ("localhost", self._address.rpartition(":")[0].lower(), socket.gethostname().lower())
        if not is_own_host(environ.get("HTTP_HOST", ""), names):
            start_response("403 Forbidden", [("Content-Type", "text/plain")])
            return [b"refused: metrics are not served under that name; ask by the address that was given\n"]
        try:
            answer: Iterable[bytes] = self._app(environ, start_response)
            return answer
        except Exception:  # the boundary of a call: the next scrape may succeed
            _log.exception("metrics could not be collected")
            start_response("500 Internal Server Error", [("Content-Type", "text/plain")])
            return [b"metrics could not be collected; the peer's log says why\n"]


@contextmanager
def serving_metrics(address: str, board: StatusBoard, is_healthy: Callable[[], bool]) -> Iterator[str]:
    """Serve a peer's metrics at `address` while inside the context; yield the address. Raises UserError if the port is
    taken.
    """
    counts = EventCounts()
    server = MetricsServer(address, PeerCollector(board, counts, is_healthy))
    where = server.start()
    board.add_listener(counts.take)
    _log.info("metrics at http://%s/metrics", where)
    try:
        yield where
    finally:
        server.stop()

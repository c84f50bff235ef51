"""`swarmtrain doctor`: examine this machine, and with an invite the run and the way to it, without joining.

What `join` says itself before it fetches anything large (text, packages, memory, disk) is not looked at here.

The examination is a list of steps; each ends within its own time limit and yields findings. Nothing is left behind: its
folders are temporary, and its nodes end with it.
"""

from __future__ import annotations

import contextlib
import logging
import math
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from swarmtrain import __version__
from swarmtrain.errors import (
    BadBytesError,
    InviteError,
    NewerRunError,
    PeerError,
    SwarmtrainError,
)
from swarmtrain.machine_memory import machine_memory
from swarmtrain.model.base import base_in_words
from swarmtrain.network.discovery.invite import Invite, InvitedPeer, parse_invite
from swarmtrain.network.identity import load_or_create_identity
from swarmtrain.network.node import DAEMON_START_S, NOT_SERVED, NetworkThread, Node, NodeSettings
from swarmtrain.network.reachability.listen import own_addresses
from swarmtrain.network.reachability.probe import DialOutcome, GreetingAnswer, ask_to_dial, knock
from swarmtrain.network.service import PeerCalls
from swarmtrain.peer.control.usage import Usage
from swarmtrain.peer.doctor.machine import (
    DiskPlace,
    Finding,
    check_addresses,
    check_ports,
    check_power,
    check_python,
    check_torch,
    place_of,
    version_of,
)
from swarmtrain.peer.lifecycle.folder import PeerFolder
from swarmtrain.peer.lifecycle.folder_lock import holder_pid
from swarmtrain.protocol.devices import DeviceRequest, FoundDevice, ProbeResult, fastest_precision, matching_devices
from swarmtrain.protocol.membership.budgets import MAX_PORTS
from swarmtrain.run import MAX_RUN_FILE_BYTES, RunFile, parse_published_untrusted, run_sha256
from swarmtrain.words import count_in_words, counted, short_peer, size_in_words, time_in_words

if TYPE_CHECKING:
    from swarmtrain.peer.devices.compute import ComputeDevice

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

CLOCK_TOLERANCE_S = 1.0
SLOWER_THAN_OTHERS = 3.0
_DIAL_S = 5.0
_FETCH_S = 10.0
_START_S = DAEMON_START_S + 10.0
"""So long that the daemon's own error comes first."""
_ASK_S = 20.0
"""A peer that is asked to dial answers within 8 s, or is given up."""
_MAX_OTHERS = 6
_MAX_HELPERS = 3
_NEARNESS: dict[DiskPlace | None, int] = {"public": 0, "provider": 1, "private": 2, None: 3, "loopback": 4}
_NEED_TORCH = frozenset({"daemon", "peers", "device", "speed"})
"""Daemon and peers too: hivemind imports torch."""
_ANYWHERE = ("/ip4/0.0.0.0/tcp/0", "/ip6/::/tcp/0")
_LOOPBACK = ("/ip4/127.0.0.1/tcp/0",)


@dataclass(frozen=True, kw_only=True)
class DoctorSettings:
    """Settings of an examination; addresses are multiaddresses."""

    invite: str | None
    directory: Path
    listen: tuple[str, ...] = ()
    announce: tuple[str, ...] = ()


DoctorStep = tuple[str, Callable[[], Iterable[Finding]]]


@dataclass
class Doctor:
    """One examination; a context manager that ends what it started. `findings` yields the results."""

    settings: DoctorSettings
    network: NetworkThread = field(default_factory=NetworkThread)
    invite: Invite | None = None
    answers: list[GreetingAnswer] = field(default_factory=list)
    run: RunFile | None = None
    has_torch: bool = True
    card: FoundDevice | None = None
    """Graphics card that the run would be trained on; None: on the processor."""
    probed: ProbeResult | None = None
    """Result of trying the best card."""
    _nodes: list[Node] = field(default_factory=list)
    _caller: Node | None = None
    _listener: Node | None = None
    _temporary: Any = field(default_factory=lambda: tempfile.TemporaryDirectory(prefix="swarmtrain-doctor-"))

    def __enter__(self) -> Doctor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for node in self._nodes:
            with contextlib.suppress(Exception):
                self.network.run(node.stop(), 5)
        self.network.stop()
        self._temporary.cleanup()

    def findings(self, begin: Callable[[str], None]) -> Iterator[Finding]:
        """Yield all findings, each as soon as it is known; `begin` is called with the name of the next step."""
        for name, look in self.steps():
            if name in _NEED_TORCH and not self.has_torch:
                continue
            begin(name)
            try:
                for finding in look():
                    self.has_torch &= (finding.check, finding.level) != ("torch", "problem")
                    yield finding
            except (SwarmtrainError, TimeoutError) as error:
                yield Finding(name, "problem", f"not known: {error or 'it took too long'}", "try again in a minute")
            except Exception as error:
                # The boundary of a step: a failure must not keep the other steps from being examined.
                _log.error("the check %s failed", name, exc_info=error)
                what = f"this check failed ({type(error).__name__}: {error})"
                yield Finding(name, "problem", what, "this is a bug in swarmtrain: please report it")

    def steps(self) -> list[DoctorStep]:
        """Return the steps in order."""
        local: list[DoctorStep] = [
            ("python", lambda: [check_python()]),
            ("torch", lambda: [check_torch()]),
            ("daemon", lambda: [self.look_at_daemon()]),
            ("ports", lambda: [self.look_at_ports()]),
            ("addresses", lambda: [check_addresses(own_addresses())]),
            ("power", lambda: check_power(Usage().on_battery())),
        ]
        swarm: list[DoctorStep] = [
            ("invite", lambda: [self.look_at_invite()]),
            ("peers", self.look_at_peers),
            ("run", self.look_at_run),
            ("clock", self.look_at_clock),
        ]
        cost: list[DoctorStep] = [
            ("device", self.look_at_devices),
            ("speed", self.look_at_speed),
        ]
        if self.settings.invite is None:
            return [*local, ("run", self.look_at_kept_run), *cost]
        # Last: a router that opens ports on request has had time to do so.
        return [*local, *swarm, *cost, ("reachable", lambda: [self.look_from_outside()] if self.answers else [])]

    # ------------------------------------------------------------- the daemon and ports

    def _start(self, name: str, listen: Sequence[str], announce: Sequence[str] = ()) -> Node:
        """Start a node with an identity of its own; it ends with the examination at the latest. Raises RunTimeError."""
        folder = Path(self._temporary.name) / name
        folder.mkdir()
        # Without libp2p's DHT: with it a second peer connected to a listener by itself within 25 ms, and dialling
        # back would prove nothing (decision 10).
        settings = NodeSettings(directory=folder, listen=tuple(listen), announce=tuple(announce), dht_mode="off")
        key_path = folder / "identity.key"
        node = self.network.run(Node.start(settings, load_or_create_identity(key_path), key_path), _START_S)
        self._nodes.append(node)
        return node

    def look_at_daemon(self) -> Finding:
        """Check that hivemind's network daemon starts, and ends when asked to."""
        version = f"hivemind {version_of('hivemind')}"
        advice = "install hivemind again (pip install --force-reinstall hivemind), on Linux or macOS, x86-64 or arm64"
        began_s = time.perf_counter()
        try:
            node = self._start("daemon", _LOOPBACK)
        except SwarmtrainError as error:
            return Finding("daemon", "problem", f"{version}: {error}", advice)
        started_s = time.perf_counter() - began_s
        dead = self.network.submit(node.wait_until_dead())
        self.network.run(node.stop(), 10)
        self._nodes.remove(node)
        try:
            dead.result(5)
        except TimeoutError:
            return Finding("daemon", "problem", f"{version}: it does not end when it is asked to", advice)
        return Finding("daemon", "ok", f"{version}, starts in {time_in_words(started_s)} and ends when asked")

    def look_at_ports(self) -> Finding:
        """Check whether this machine can listen where a peer would."""
        pid = holder_pid(self.settings.directory)
        used_by = f"the peer that runs in {self.settings.directory} (process {pid})" if pid else ""
        return check_ports(self.settings.listen or _ANYWHERE, used_by)

    # ------------------------------------------------------------- the swarm

    def look_at_invite(self) -> Finding:
        """Check whether the invite is whole, and report what it says."""
        try:
            invite = self.invite = parse_invite(self.settings.invite or "")
        except InviteError as error:
            return Finding("invite", "problem", *_with_advice(str(error)))
        addresses = [address for peer in invite.peers for address in peer.addresses]
        if not addresses:
            self.invite = None
            return Finding("invite", "problem", "it names no address", "ask for another invite")
        return Finding(
            "invite", "ok", f"run {invite.run_sha256[:12]}, {counted(len(invite.peers), 'peer')} at {_some(addresses)}"
        )

    def look_at_peers(self) -> Iterator[Finding]:
        """Report which peers of the invite answer, how quickly and where; then who else can be dialled."""
        if self.invite is None:
            return
        self._caller = self._start("caller", _ANYWHERE)
        self._start_listener()
        silent: list[tuple[InvitedPeer, str]] = []
        for peer, answer in self._knock(self.invite.peers):
            if isinstance(answer, GreetingAnswer):
                self.answers.append(answer)
                yield _answered(answer)
            else:
                silent.append((peer, answer))
        for peer, reason in silent:
            yield _silent(peer, reason, alone=not self.answers)
        seen = {peer.peer for peer in self.invite.peers}
        others = {info.peer: info for answer in self.answers for info in answer.known if info.peer not in seen}
        sample = [InvitedPeer(info.peer, info.addresses[:4]) for info in others.values() if info.addresses]
        if sample:
            reached = [answer for _, answer in self._knock(sample[:_MAX_OTHERS]) if isinstance(answer, GreetingAnswer)]
            self.answers += reached
            asked = len(sample[:_MAX_OTHERS])
            yield Finding("peers", "ok", f"of {counted(asked, 'other')} asked, {len(reached)} can be dialled from here")

    def _knock(self, peers: Sequence[InvitedPeer]) -> list[tuple[InvitedPeer, GreetingAnswer | str]]:
        """Return each peer with its answer, or the reason why there is none; all are asked at once."""
        assert self._caller is not None and self.invite is not None
        coroutines = [knock(self._caller, self.invite.run_sha256, peer, _DIAL_S) for peer in peers]
        futures = [self.network.submit(coroutine) for coroutine in coroutines]
        found: list[tuple[InvitedPeer, GreetingAnswer | str]] = []
        for peer, future in zip(peers, futures, strict=True):
            try:
                found.append((peer, future.result(4 * _DIAL_S)))
            except PeerError as error:
                found.append((peer, str(error)))
        return found

    def look_at_run(self) -> Iterator[Finding]:
        """Check whether somebody serves the run, and report what it is."""
        for answer in self.answers[:3]:
            assert self._caller is not None and self.invite is not None
            calls = PeerCalls(self._caller, self.invite.run_sha256)
            fetching = calls.blob_untrusted(answer.peer, self.invite.run_sha256, MAX_RUN_FILE_BYTES)
            try:
                data = self.network.run(fetching, _FETCH_S)
                self.run = parse_published_untrusted(data, self.invite.run_sha256)
            except NewerRunError as error:
                yield Finding("run", "problem", *_with_advice(str(error)))
                return
            except BadBytesError as error:
                yield Finding("run", "problem", str(error), "ask for a new invite")
                return
            except (PeerError, TimeoutError) as error:
                _log.debug("fetching the run from %s failed: %s", answer.peer, error)
                continue
            yield Finding("run", "ok", f"{_run_in_words(self.run)}; served by {_who(answer)}")
            return
        if self.answers:
            yield Finding("run", "problem", "nobody who answers delivers the run file", "ask for a new invite")
        else:
            yield from self.look_at_kept_run()

    def look_at_kept_run(self) -> Iterator[Finding]:
        """Report the run that is kept in the folder, if there is one, as there is no swarm to ask."""
        try:
            data = (self.settings.directory / "run.toml").read_bytes()
            sha256 = run_sha256(data)
            if self.invite is None or self.invite.run_sha256 == sha256:
                self.run = parse_published_untrusted(data, sha256)
                yield Finding("run", "ok", f"{_run_in_words(self.run)}; as kept in {self.settings.directory}")
        except (OSError, BadBytesError) as error:
            _log.debug("no saved run: %s", error)

    def look_at_clock(self) -> Iterator[Finding]:
        """Compare this machine's clock with those of the peers that answered."""
        offsets_s = [answer.offset_s for answer in self.answers if math.isfinite(answer.offset_s)]
        if offsets_s:
            yield check_clock(statistics.median(offsets_s), len(offsets_s))

    # ------------------------------------------------------------- seen from outside

    def _start_listener(self) -> None:
        """Start a node that nobody knows, listening where the peer would."""
        listen = self.settings.listen
        if not listen:
            # The port of last time: a router may forward just that one.
            port = PeerFolder(self.settings.directory).kept_port() or 0
            same = tuple(address.replace("/tcp/0", f"/tcp/{port}") for address in _ANYWHERE)
            listen = same if check_ports(same).level == "ok" else _ANYWHERE
        try:
            self._listener = self._start("listener", listen, self.settings.announce)
        except SwarmtrainError as error:  # reported by the check of ports already
            _log.debug("cannot listen: %s", error)

    def look_from_outside(self) -> Finding:
        """Check whether others can dial this machine, by asking some peers that answered to try."""
        if self._listener is None:
            return Finding("reachable", "warning", "not known: nothing could listen here", "see ports")
        ports = _tcp_ports(self.network.run(self._listener.addresses(), _DIAL_S))
        helpers = sorted(self.answers, key=lambda answer: _NEARNESS[_place_of(answer.address)])[:_MAX_HELPERS]
        assert self._caller is not None and self.invite is not None
        identity, run = self._listener.identity, self.invite.run_sha256
        futures = [
            self.network.submit(ask_to_dial(self._caller, run, helper.peer, identity, ports)) for helper in helpers
        ]
        asked = [
            DialBackPeer(_who(helper), helper.address, *future.result(_ASK_S))
            for helper, future in zip(helpers, futures, strict=True)
        ]
        fixed = any(not a.endswith("/tcp/0") for a in self.settings.listen)
        hosted = self.run is not None and self.run.merge.kind.hosting
        return check_reachable(asked, ports, fixed=fixed, hosted=hosted)

    # ------------------------------------------------------------- what the run costs

    def look_at_devices(self) -> Iterator[Finding]:
        """List the devices to train on; with a run at hand, try the best card. Then look whether it can be watched."""
        from swarmtrain.model.parameter_count import num_trained_parameters
        from swarmtrain.peer.devices.card_usage import card_problem
        from swarmtrain.peer.devices.choice import precisions_of
        from swarmtrain.peer.devices.machine import find_devices, least_bytes, missing_card, probe_device
        from swarmtrain.peer.doctor.devices import check_card, check_card_watch, check_devices

        run = self.run
        found = find_devices(0 if run is None else num_trained_parameters(run))
        yield check_devices(found, missing_card())
        best = matching_devices(DeviceRequest(), found, "")[0]
        if not best.is_card:
            return

        def probe(card: FoundDevice) -> ProbeResult:
            assert run is not None
            self.probed = probe_device(run, card, precisions_of(run, card))
            return self.probed

        if run is not None:
            finding = check_card(best, least_bytes(run), probe)
            self.card = best if finding.level == "ok" else None
            yield finding
        yield check_card_watch(best.name, card_problem(best.name))

    def look_at_speed(self) -> Iterator[Finding]:
        """Measure how fast this machine would train."""
        if self.run is None:
            return
        from swarmtrain.model.parameter_count import num_trained_parameters
        from swarmtrain.peer.control.limits import least_cost
        from swarmtrain.peer.training.speed import measure_speed

        needed = least_cost(self.run, num_trained_parameters(self.run)).memory_bytes
        if needed > (free := machine_memory().available_bytes):
            takes = f"the run takes about {size_in_words(needed)} of memory, and {size_in_words(free)} are free"
            advice = "close other programs, or join a run with a smaller model"
            yield Finding("speed", "warning", f"not measured: {takes}", advice)
            return
        where = "" if self.card is None else self.card.name
        try:
            tokens_per_s = measure_speed(self.run, compute=self._compute(self.run))
        except RuntimeError as error:
            if self.card is None:
                raise
            what = (str(error).strip().splitlines() or ["no reason"])[0][:200]
            yield Finding(
                "speed", "warning", f"not measured on {where}: {what}", "end other programs that use the card"
            )
            return
        own = {info.peer: info.steps_per_s for answer in self.answers for info in answer.known if info.steps_per_s > 0}
        yield check_speed(self.run, tokens_per_s, own, where)

    def _compute(self, run: RunFile) -> ComputeDevice | None:
        """Return what the run would be trained on, if that is the card that was tried; else None."""
        if self.card is None or self.probed is None:
            return None
        import torch

        from swarmtrain.peer.devices.choice import fitting_microbatch
        from swarmtrain.peer.devices.compute import ComputeDevice

        precision, _ = fastest_precision(self.probed.tokens_per_s)
        fitting = fitting_microbatch(run, self.card, 0)
        return ComputeDevice(torch.device(self.card.name), precision, fitting.sequences, fitting.recomputes)


# ---------------------------------------------------------------- judgements


def _some(texts: Sequence[str], limit: int = 3) -> str:
    more = f" and {len(texts) - limit} more" if len(texts) > limit else ""
    return ", ".join(texts[:limit]) + more


def _who(answer: GreetingAnswer) -> str:
    return answer.name or short_peer(answer.peer)


def _run_in_words(run: RunFile) -> str:
    model = "" if run.model.is_built_in else f", model {base_in_words(run.model)}"
    data = ", ".join(source.name for source in run.data.sources) or run.data.source
    return f"{run.run.name}, {count_in_words(run.run.total_tokens)} tokens, data {data}{model}"


def _with_advice(message: str) -> tuple[str, str]:
    """Split an error's message into what is wrong and what to do."""
    what, _, advice = message.partition("; " if "; ask" in message else ": ")
    return what, advice


def _answered(answer: GreetingAnswer) -> Finding:
    found = (
        f"{_who(answer)} answers in {1000 * answer.round_trip_s:.1f} ms at {answer.address or 'a connection it opened'}"
    )
    if answer.misfit:
        what, advice = _with_advice(answer.misfit)
        return Finding("peers", "problem", f"{found}; {what}", advice)
    if answer.version.split(".")[:2] != __version__.split(".")[:2]:
        advice = f"this is {__version__}: run the version the others run"
        return Finding("peers", "warning", f"{found}; it runs swarmtrain {answer.version or 'of no version'}", advice)
    return Finding("peers", "ok", found)


def _silent(peer: InvitedPeer, reason: str, *, alone: bool) -> Finding:
    where = _some(peer.addresses) or "no address"
    if NOT_SERVED in reason:
        found = f"{short_peer(peer.peer)} at {where} serves another run"
        return Finding("peers", "problem" if alone else "warning", found, "ask for a new invite")
    found = f"{short_peer(peer.peer)} does not answer at {where}"
    if alone:
        advice = "is the swarm up, and does a firewall let this machine out to that port? If so, ask for a new invite"
        return Finding("peers", "problem", found, advice)
    return Finding("peers", "warning", found, "nothing need be done: another peer of the invite answers")


@dataclass(frozen=True)
class DialBackPeer:
    """Peer that was asked to dial this machine: its name and address, the outcome, and the address at which it reached
    this machine."""

    name: str
    address: str
    outcome: DialOutcome
    reached: str = ""


def _place_of(multiaddr: str) -> DiskPlace | None:
    match = re.match(r"/ip[46]/([^/]+)/", multiaddr)
    return place_of(match[1]) if match else None


def _tcp_ports(addresses: Iterable[str]) -> list[int]:
    """Return the distinct TCP ports of multiaddresses, at most as many as may be asked for."""
    found = [re.search(r"/tcp/([0-9]+)", address) for address in addresses]
    return list(dict.fromkeys(int(match[1]) for match in found if match is not None))[:MAX_PORTS]


def check_reachable(
    asked: Sequence[DialBackPeer], ports: Sequence[int], *, fixed: bool, hosted: bool = False
) -> Finding:
    """Judge whether the asked peers could dial this machine.

    `fixed` is True if the person chose the port, `hosted` is True if other peers serve the publications of those that
    nobody can dial.
    """
    for one in asked:
        if one.outcome is not DialOutcome.REACHED:
            continue
        place = _place_of(one.reached)
        within = {"loopback": ", on this machine", "private": ", within this network"}.get(place or "", "")
        nobody = "; nobody outside was there to be asked" if within else ""
        return Finding("reachable", "ok", f"{one.name} could dial this machine at {one.reached}{within}{nobody}")
    names = ", ".join(one.name for one in asked)
    outcomes = {one.outcome for one in asked}
    if DialOutcome.NOT_REACHED in outcomes:
        tried = ", ".join(one.name for one in asked if one.outcome is DialOutcome.NOT_REACHED)
        where = f"port {' or '.join(map(str, ports))}"
        advice = "let the port in through this machine's firewall, and forward it in the router"
        if not fixed:
            advice += ", after choosing one: --listen :31337"
        found = f"{tried} could not dial this machine at {where}: "
        if hosted:
            found += "two others will serve its work on, and it counts in full"
            advice = f"nothing need be done; to be dialled, {advice}"
        else:
            found += "it can exchange only with peers that it dials itself"
        return Finding("reachable", "warning", found, advice)
    if outcomes == {DialOutcome.CANNOT}:
        advice = f"try from elsewhere whether TCP port {ports[0] if ports else '?'} of your public address is open"
        return Finding("reachable", "warning", f"cannot be asked: {names} run an older swarmtrain", advice)
    found = f"not known: {', '.join(f'{one.name}: {one.outcome.value}' for one in asked)}"
    return Finding("reachable", "warning", found, "try again in a minute")


def check_clock(offset_s: float, num_asked: int) -> Finding:
    """Judge this machine's clock; `offset_s` is the swarm's time minus this machine's."""
    if abs(offset_s) < CLOCK_TOLERANCE_S:
        return Finding("clock", "ok", f"{abs(offset_s):.2f} s from the swarm's ({counted(num_asked, 'peer')} asked)")
    direction = "behind" if offset_s > 0 else "ahead of"
    found = (
        f"this machine's clock is {abs(offset_s):.1f} s {direction} the swarm's ({counted(num_asked, 'peer')} asked)"
    )
    advice = "it would be corrected for the run; set it right (on Linux: timedatectl set-ntp true)"
    return Finding("clock", "warning", found, advice)


def _speed_in_batches(run: RunFile, tokens_per_s: float, where: str) -> Finding:
    """Judge the speed for large batches, of which each computes what it can: a sequence at least."""
    sequence_s, limit_s = run.model.context_tokens / tokens_per_s, run.merge.max_wait_s
    found = (
        f"{count_in_words(tokens_per_s)} tokens/s{f' on {where}' if where else ''}: {time_in_words(sequence_s)} for a "
        "sequence; of each large batch it computes what it can"
    )
    if sequence_s <= limit_s:
        return Finding("speed", "ok", found)
    advice = (
        f"a step waits for a gradient {time_in_words(limit_s)} at most (merge.max_wait_s): this machine would mostly "
        "be left out; use a quicker one"
    )
    return Finding("speed", "problem", found, advice)


def check_speed(run: RunFile, tokens_per_s: float, others_steps_per_s: Mapping[str, float], where: str = "") -> Finding:
    """Judge whether this machine keeps up with the run's limit for a round, and with the other peers; `where` names the
    card on which its speed was measured."""
    steps_per_s = tokens_per_s / run.tokens_per_step
    if run.merge.kind.common_step:
        return _speed_in_batches(run, tokens_per_s, where)
    round_s = run.merge.inner_steps / steps_per_s
    found = (
        f"{count_in_words(tokens_per_s)} tokens/s{f' on {where}' if where else ''}: {time_in_words(round_s)} for a "
        f"round of {counted(run.merge.inner_steps, 'inner step')}"
    )
    if round_s > run.merge.round_limit_s and not run.merge.kind.asynchronous:  # else slow peers take fewer steps
        advice = (
            f"a round is closed after {time_in_words(run.merge.round_limit_s)} (merge.round_limit_s): this machine "
            "would be left out; use a quicker one, or ask for a run with fewer inner steps"
        )
        return Finding("speed", "problem", found, advice)
    typical = statistics.median(others_steps_per_s.values()) if others_steps_per_s else 0.0
    if typical > SLOWER_THAN_OTHERS * steps_per_s and not run.merge.pacing:
        found += f"; the others take {typical / steps_per_s:.0f} times as many steps in that time"
        advice = "they would wait for this machine: close other programs, or ask for a run with merge.pacing = true"
        return Finding("speed", "warning", found, advice)
    return Finding("speed", "ok", found)

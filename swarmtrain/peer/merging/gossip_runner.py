"""Drives the gossip engine in a real peer, and executes its commands.

Commands run in the network thread, on a pool of threads, or at the trainer. A lock around the engine is held only for
the microseconds in which it decides; everything slower happens outside the lock.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from typing import Any, Protocol, TypeAlias

from swarmtrain.algorithm.gossip import PreparedMerge as PreparedMerge
from swarmtrain.errors import BadBytesError, PeerError
from swarmtrain.methods.method import GradientFormat
from swarmtrain.network.asynchronous.puller import Puller, failure_of
from swarmtrain.network.daemon import swarm_time
from swarmtrain.network.snapshots.store import HeldSnapshot
from swarmtrain.network.tasks import end_tasks, logged
from swarmtrain.peer.merging.kept_publication import KeptPublication
from swarmtrain.protocol.gossip.engine import GossipEngine
from swarmtrain.protocol.gossip.merge_plans import MergePlan
from swarmtrain.protocol.gossip.messages import (
    AskPartner,
    CancelPull,
    ConsensusTaken,
    DecodePublication,
    DownloadPublication,
    FetchConsensus,
    FindRoute,
    GossipCommand,
    GossipEvent,
    LinkRateAssumed,
    MergeDue,
    MergeFragment,
    MergePrepared,
    MergesPlanned,
    PartnerBackedOff,
    PartnersChanged,
    PeerCalled,
    PrepareMerge,
    PublicationDecoded,
    PullFailed,
    PullFailure,
    PullsPaused,
    PullTimerFired,
    ReportFailure,
)
from swarmtrain.protocol.gossip.partners import Place
from swarmtrain.protocol.membership.membership import Membership

_log = logging.getLogger(__name__)
_POLL_INTERVAL_S = 0.25
"""Seconds between two looks for new partners while merges are planned."""

Engine: TypeAlias = GossipEngine[HeldSnapshot, KeptPublication, PreparedMerge]
_Event: TypeAlias = GossipEvent[HeldSnapshot, KeptPublication, PreparedMerge]
_Command: TypeAlias = GossipCommand[HeldSnapshot, KeptPublication, PreparedMerge]


class Merging(Protocol):
    """Work on tensors that the engine asks for. `decode_untrusted` and `prepare` run on a pool of threads."""

    def decode_untrusted(self, command: DecodePublication[HeldSnapshot]) -> KeptPublication:
        """Return the part of a publication that may enter a merge. Raises BadBytesError if nothing may."""

    def prepare(self, command: PrepareMerge[HeldSnapshot, KeptPublication]) -> PreparedMerge:
        """Compute everything of a merge that does not need this peer's own gradient."""

    def took_untrusted(self, command: DecodePublication[HeldSnapshot]) -> None:
        """Count what was decoded. Runs in the network thread."""


class GossipRunner:
    """Executes a gossip engine's commands.

    Any thread may call `merge_due`, `plan`, `took_states`, `gradient_format`, `places` and `rows`; the other methods
    belong to the network thread.
    """

    def __init__(
        self,
        engine: Engine,
        puller: Puller,
        membership: Membership,
        merging: Merging,
        refused: Callable[[str, PeerError], None],
        expected_s: Callable[[int], float | None],
    ) -> None:
        self.engine, self._puller, self._membership, self._merging = engine, puller, membership, merging
        self._refused = refused
        self._expected_s = expected_s
        """Maps bytes to the seconds that they are expected to take before the first pull was measured; None if
        unknown."""
        self._lock = threading.Lock()
        self._told_version = -1
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._timer: asyncio.TimerHandle | None = None

    # ------------------------------------------------------------- the trainer's side

    def merge_due(
        self, round: int, fragment: int, *, may_catch_up: bool
    ) -> MergeFragment[HeldSnapshot, KeptPublication, PreparedMerge] | FetchConsensus:
        """Ask what to merge now into a fragment: what is ready, or an order to take the others' weights. Returns at
        once.
        """
        (command,) = self._receive(MergeDue(round, fragment, may_catch_up))
        assert isinstance(command, MergeFragment | FetchConsensus)
        return command

    def plan(self, round: int, plans: Sequence[MergePlan]) -> Coroutine[Any, Any, None]:
        """Report that a round begins, or that the times of merges are better known.

        Run the returned coroutine soon, in the network thread.
        """
        commands = self._receive(MergesPlanned(round, plans))

        async def follow() -> None:
            if known_s := self._expected_s(self.engine.partner_bytes):
                self._happened(LinkRateAssumed(self.engine.partner_bytes / known_s))
            self._follow(commands)

        return follow()

    def took_states(self, told: Sequence[Sequence[Mapping[str, Place]]], rounds: Mapping[str, int], round: int) -> None:
        """Report that this peer continues in `round` from the mean of some states; see `ConsensusTaken`."""
        self._receive(ConsensusTaken(round, told, rounds))

    def gradient_format(self, round_s: float) -> GradientFormat:
        """Return the format for pseudo-gradients in a round of `round_s` seconds (0: unknown)."""
        with self._lock:
            self._tell_of_others()
            return self.engine.gradient_format(round_s, self._puller.calls.node.traffic.up.bytes_per_s)

    def places(self, round: int) -> list[dict[str, Place]]:
        """For each fragment, map each peer to the place up to which this peer's weights contain its publications.
        `round` is the last round that this peer ended."""
        with self._lock:
            return self.engine.places(round)

    def rows(self) -> list[list[list[str | int]]]:
        """Return, by fragment, the rows of the ledger of merged publications, for a checkpoint."""
        with self._lock:
            return self.engine.rows()

    def load(self, rows: Sequence[Iterable[Sequence[object]]]) -> None:
        """Restore what `rows` gave. Raises ValueError if it is malformed."""
        with self._lock:
            self.engine.load(rows)

    # ------------------------------------------------------------- the network's thread

    def called(self, peer: str) -> None:
        """Note that a peer has called this one."""
        self._happened(PeerCalled(peer))

    async def stop(self) -> None:
        """Cancel all pulls; none begin until merges are planned again."""
        self._happened(PullsPaused())
        await end_tasks(self._tasks.values())
        self._tasks.clear()  # a task cancelled before it ran has not removed itself

    def _receive(self, event: _Event) -> list[_Command]:
        with self._lock:
            self._tell_of_others()
            return self.engine.receive(event, swarm_time())

    def _tell_of_others(self) -> None:
        version = self._membership.version
        # Only when membership has changed: the list may be long, and most events find the same peers.
        if version != self._told_version:
            self._told_version = version
            self.engine.receive(PartnersChanged(self._membership.volunteers()), swarm_time())

    def _happened(self, event: _Event) -> None:
        self._follow(self._receive(event))

    def _follow(self, commands: Sequence[_Command]) -> None:
        for command in commands:
            match command:
                case FindRoute():
                    self._start(command.pull, self._puller.route(command))
                case AskPartner():
                    self._start(command.pull, self._puller.ask(command))
                case DownloadPublication():
                    self._start(command.pull, self._puller.download(command))
                case DecodePublication():
                    self._start(command.pull, self._decoded(command))
                case PrepareMerge():
                    self._start(command.number, self._prepared(command))
                case CancelPull():
                    if (task := self._tasks.get(command.pull)) is not None:
                        task.cancel()
                case ReportFailure():
                    self._refused(command.peer, BadBytesError(command.failure.reason, code=command.failure.code))
                case PartnerBackedOff():
                    _log.debug("%s: %s", command.peer, command.follows)
                case MergeFragment() | FetchConsensus():
                    raise AssertionError("nobody has asked for a merge here")
        self._set_timer()

    def _set_timer(self) -> None:
        """Set the timer for the engine's next wake-up, and for a check which peers have joined."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        with self._lock:
            wake_s, is_planned = self.engine.wake_at(), self.engine.has_plans
        if not is_planned:
            return
        wait_s = _POLL_INTERVAL_S if wake_s is None else min(_POLL_INTERVAL_S, max(0.0, wake_s - swarm_time()))
        self._timer = asyncio.get_running_loop().call_later(wait_s, self._look)

    def _look(self) -> None:
        self._timer = None
        with self._lock:
            self._tell_of_others()
            now, wake_s = swarm_time(), self.engine.wake_at()
            commands = self.engine.receive(PullTimerFired(), now) if wake_s is not None and wake_s <= now else []
        self._follow(commands)

    def _start(self, number: int, work: Coroutine[Any, Any, _Event]) -> None:
        async def run() -> None:
            try:
                event = await work
            except Exception:
                # An error of this peer: the host that was asked is not at fault, nor would another one help.
                self._happened(PullFailed(number, PullFailure("it could not be looked at", is_authors=True)))
                raise
            finally:
                if self._tasks.get(number) is asyncio.current_task():
                    del self._tasks[number]
            self._happened(event)

        task = self._tasks[number] = logged(asyncio.create_task(run()), "gossip")
        # A task that is cancelled at once never starts its coroutine, and Python would warn that it was not awaited.
        task.add_done_callback(lambda ended: work.close())

    async def _decoded(
        self, command: DecodePublication[HeldSnapshot]
    ) -> PublicationDecoded[KeptPublication] | PullFailed:
        try:
            kept = await asyncio.to_thread(self._merging.decode_untrusted, command)
            self._merging.took_untrusted(command)
        except PeerError as error:
            return PullFailed(command.pull, failure_of(error, is_authors=True))
        return PublicationDecoded(command.pull, kept)

    async def _prepared(self, command: PrepareMerge[HeldSnapshot, KeptPublication]) -> MergePrepared[PreparedMerge]:
        try:
            return MergePrepared(command.number, await asyncio.to_thread(self._merging.prepare, command))
        except Exception:  # the boundary of a task: one bad publication must not cost all later merges
            peers = ", ".join(one.peer for one in command.pulled)
            _log.exception("gossip: could not prepare a merge with what was pulled from %s", peers)
            return MergePrepared(command.number, None)

"""Take part in the swarm of one run, from the first dial to the goodbye.

Bootstrap and volunteer are both a `Swarm`; they differ in what they advertise and serve. Everything here runs in the
network thread's loop. Other threads go through `NetworkThread`, or set plain attributes that are only read here.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import logging
import math
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import InitVar, dataclass, field
from typing import Any

from swarmtrain.errors import Problem
from swarmtrain.events import Event, RefusedEvent, WarningEvent
from swarmtrain.network.answers import Serving, SwarmAnswers
from swarmtrain.network.asynchronous.state_fetcher import StateFetcher
from swarmtrain.network.coverage import DataCoverage, ShardsOf, rows_of
from swarmtrain.network.daemon import swarm_time
from swarmtrain.network.discovery.greeter import Greeter
from swarmtrain.network.discovery.invite import Invite, InvitedPeer
from swarmtrain.network.discovery.known_peers import KnownPeers
from swarmtrain.network.discovery.presence import OwnPresence, OwnRecords
from swarmtrain.network.discovery.run_lookup import PublishedRun
from swarmtrain.network.discovery.token_accounting import TokenAccounting, counting_rules
from swarmtrain.network.identity import Identity
from swarmtrain.network.node import Node
from swarmtrain.network.reachability.monitor import ReachabilityMonitor, is_loopback_only
from swarmtrain.network.rounds.downloads import Downloads
from swarmtrain.network.rounds.merger import Average, RoundSettings
from swarmtrain.network.rounds.runner import RoundRunner
from swarmtrain.network.service import PeerCalls, namespace_of, service_type
from swarmtrain.network.snapshots.state_provider import FillManifest, StateProvider, state_specs
from swarmtrain.network.snapshots.store import Body, NumServed, PullLimits, SnapshotStore, TensorSpec, all_chunks
from swarmtrain.network.tasks import end_tasks
from swarmtrain.network.tensor_groups import DTYPES
from swarmtrain.protocol.archive.departure import FellowDepartures
from swarmtrain.protocol.membership import records
from swarmtrain.protocol.membership.membership import Membership, PeerInfo
from swarmtrain.protocol.rounds.roles import LinkRates
from swarmtrain.protocol.tokens.progress import Progress
from swarmtrain.v1 import snapshot_pb2 as pb

_log = logging.getLogger(__name__)
_MAX_INVITED = 4  # peers in an invite
_MAX_ADDRESSES = 4  # of this peer in an invite
_FORGET_AFTER_S = 600.0  # after a peer has gone
_REDIAL_EVERY = 4  # readings of presence between two tries to reach peers that seem gone
_HEARTBEAT_S = 0.25  # between two looks at the clock for a gap
_ROUND_PLACES = 4
"""Multiple of `network.max_readers` that may read what a synchronous round averages: everyone on the roster comes at
once, and the slowest must not wait for a place."""
_GOODBYE_S = 3.0
_LAST_GOODBYE_S = 1.0  # the process waits for it, and the user for the process


@dataclass(eq=False, repr=False)
class Swarm:
    """Place of this peer in the swarm of one run. It owns the objects that do the work, and callers use these directly.

    `shards` are those of the training data, if it has any. `durable` returns the progress that is safe on this peer's
    disk, for its progress record; None means the present progress.
    """

    node: Node
    published: PublishedRun
    specs: tuple[TensorSpec, ...]
    average: InitVar[Average]
    emit: Callable[[Event], None]
    me: InitVar[PeerInfo]
    num_served: InitVar[NumServed] = field(default=all_chunks, kw_only=True)
    shards: InitVar[ShardsOf | None] = field(default=None, kw_only=True)
    durable: InitVar[Callable[[], Progress | None] | None] = field(default=None, kw_only=True)

    def __post_init__(
        self,
        average: Average,
        me: PeerInfo,
        num_served: NumServed,
        shards: ShardsOf | None,
        durable: Callable[[], Progress | None] | None,
    ) -> None:
        node, published, specs, emit = self.node, self.published, self.specs, self.emit
        identity, run, sha256, limits = node.identity, published.run, published.sha256, published.run.network
        node.settings = dataclasses.replace(node.settings, call_limit_s=limits.call_limit_s)
        members = self.membership = Membership(identity.peer_id)
        presence = self.presence = OwnPresence(identity, sha256, me, lambda: self.rounds.inner_steps_done)
        accounting = self.accounting = TokenAccounting(
            identity.peer_id,
            counting_rules(run, swarm_time()),
            lambda kind, prefix: node.read_bucket(bytes.fromhex(sha256), kind, prefix),
            self._speeds,
            swarm_time,
            lambda peer, rule, detail: emit(RefusedEvent(from_peer=peer, rule=rule, detail=detail)),
        )
        peers = self.peers = KnownPeers(node, published, members, accounting, emit, lambda: self.rounds.peers_changed())
        calls = self.calls = PeerCalls(
            node,
            sha256,
            limits.stall_limit_s,
            limits.least_bytes_per_s,
            on_failure=peers.call_failed,
            on_answer=peers.answered,
            is_hidden=peers.is_hidden,
        )
        greeter = self.greeter = Greeter(node, calls, peers, presence)
        store = self.store = SnapshotStore(
            limits.max_readers,
            up=node.traffic.up,
            min_bytes_per_s=limits.least_bytes_per_s,
            num_served=num_served,
            round_places=_ROUND_PLACES,
            is_of_round=lambda peer: (info := members.info(peer)) is not None and info.training,
        )
        settings = RoundSettings(
            run_sha256=sha256,
            specs=specs,
            state_specs=state_specs(specs, run.merge.kind.num_moments),
            max_tokens=run.max_round_tokens,
            share_above=run.merge.share_above,
            round_limit_s=run.merge.round_limit_s,
            silence_s=run.merge.silence_s,
            pull=PullLimits(stall_limit_s=limits.stall_limit_s, min_bytes_per_s=limits.min_pull_bytes_per_s),
            max_wait_s=run.merge.max_wait_s if run.merge.kind.reads("max_wait_s") else math.inf,
            target=run.batch_target if run.merge.kind.common_step else None,
            dtype=DTYPES[run.merge.roster_format],
        )
        downloads = Downloads(identity.peer_id, calls, store, settings.pull, peers.refused, node.traffic.disturbed)
        rounds = self.rounds = RoundRunner(
            identity,
            downloads,
            members,
            settings,
            average,
            report=peers.report,
            trains=not me.is_bootstrap,
            own_link=self._own_link,
        )
        self.coverage: DataCoverage | None = None  # None on a bootstrap, and if the data has no shards
        if shards is not None:
            told = accounting.explained, accounting.refused
            self.coverage = DataCoverage(identity, shards, *told, swarm_time, spares=peers.spares)
        self.serving = Serving()
        rows = lambda: [*rows_of(self.coverage), *self.serving.rows()]  # noqa: E731 - it changes
        offer = self.offer = StateProvider(
            identity, sha256, settings.state_specs, store, rows, lambda: self.serving.places()
        )
        safe = durable or (lambda: offer.progress)
        self.records = OwnRecords(node, presence, accounting, limits.presence_ttl_s, safe)
        self.reaching = ReachabilityMonitor(
            calls,
            members,
            self._ask_for_host,
            lambda: presence.listens_at,
            self._reach_changed,
            has_hosts=self.asynchronous,
        )
        if not self.asynchronous:
            node.traffic.measure_link()
            presence.link = self._own_link
        self.history: Callable[[], pb.HistoryReply] = pb.HistoryReply
        """Returns what this peer tells of the run since its start."""
        self.fellows: FellowDepartures | None = None  # set while a volunteer leaves: the peers that leave too
        self.answers = SwarmAnswers(
            published,
            presence,
            peers,
            greeter,
            rounds,
            offer,
            store,
            lambda: self.serving,
            lambda: self.fellows,
            lambda: self.history(),
            peers.refused,
        )
        self._tasks = set[asyncio.Task[None]]()
        self._daemon_watch: asyncio.Task[None] | None = None

    @property
    def identity(self) -> Identity:
        """Key of this peer."""
        return self.node.identity

    @property
    def asynchronous(self) -> bool:
        """True if peers merge at their own pace, without rosters."""
        return self.published.run.merge.kind.asynchronous

    @property
    def states(self) -> StateFetcher:
        """Fetches states of peers that merge asynchronously."""
        return StateFetcher(self.calls, self.store, self.rounds.settings, self.peers.refused)

    # ------------------------------------------------------------- life

    async def start(self, through: Sequence[InvitedPeer], serving: Serving | None = None) -> None:
        """Answer calls, enter the DHT through `through`, and learn which peers are present. Advertises nothing yet."""
        self.serving = serving or self.serving
        service = service_type()(self.answers, self.store, self.published.blobs(), self.node)
        await self.node.serve(service, namespace_of(self.published.sha256))
        named = self.peers.begin_with(through)
        await self.node.join_dht([(peer.peer, peer.addresses) for peer in self.peers.through])
        await self.greeter.greet_all(named)
        await self.peers.read_records()

    async def announce(self) -> None:
        """Advertise this peer to everyone known and in the DHT, and keep doing so."""
        self.rounds.come_back()
        self.peers.arrivals.came_myself(swarm_time())
        await self._look_where_we_are()
        await self.greeter.greet_everyone()
        kept = [self._keep_present(), self._keep_reading(), self._keep_counting(), self._notice_gaps()]
        may_be_hidden = self.serving.hosting is not None or not self.asynchronous
        # Peers on loopback are all on this machine, and can dial each other without hosts.
        is_near = is_loopback_only(self.presence.listens_at) and not self.node.settings.checks_reach
        if may_be_hidden and not self.presence.me.is_bootstrap and not is_near:
            kept.append(self.reaching.keep())
        for work in kept:
            self._begin(work).add_done_callback(self._work_ended)
        self.greeter.start()

    def set_state(
        self, progress: Progress, body: Body | Callable[[], Body], fill: FillManifest = lambda manifest: None
    ) -> None:
        """Offer this state to late joiners from now on (`StateProvider.put`). Nobody may write into its buffers any
        more."""
        self.offer.put(progress, body, fill)
        self.node.traffic.round_over()
        self.accounting.learn(progress.peer_tokens)
        self.rounds.advance(progress)
        if self.rounds.last is not None:
            self.greeter.meet(self.rounds.last[0].peers)

    def would_leave(self) -> None:
        """Prepare to leave: from now on answer other volunteers that ask whether this one leaves too."""
        self.fellows = FellowDepartures(self.identity.peer_id)

    async def count_once_more(self) -> None:
        """Store this peer's own counts and read those of others a last time, at the end of the run."""
        await self.records.store()
        await self.accounting.read_all()

    async def withdraw(self, limit_s: float = _GOODBYE_S) -> None:
        """Say goodbye to everyone and stop advertising until `come_back`; the node keeps running.

        A peer that misses the goodbye, or takes longer than `limit_s`, learns it when it asks about a round.
        """
        if self.rounds.away:
            return
        presence = self.presence
        self.rounds.leave()
        presence.change(inner_steps=0)  # a peer that comes back begins another round
        for work in (self.serving.pulling, self.serving.hosting):
            if work is not None:
                await work.stop()
        await end_tasks(self._tasks)
        await self.greeter.stop()
        run_sha256 = bytes.fromhex(self.published.sha256)
        request = pb.HelloRequest(run_sha256=run_sha256, presence=presence.signed(), leaving=True)
        goodbyes = [asyncio.create_task(self.calls.hello(i.peer, request, limit_s)) for i in self.membership.live()]
        if goodbyes:
            await asyncio.wait(goodbyes, timeout=limit_s)
            for task in goodbyes:
                # Goodbyes that end later: retrieve their errors, or the loop reports them.
                task.add_done_callback(lambda ended: ended.cancelled() or ended.exception())

    async def come_back(self, serving: Serving | None = None) -> None:
        """Return after `withdraw`: find out which peers are present. `serving`, if given, replaces what is served; call
        `announce` next.

        Peers that neither answer nor have renewed their presence are gone. Older failures do not count: this peer did
        not listen.
        """
        self.serving = serving or self.serving
        self.peers.greeted.clear()
        self.membership.forgive()
        await self.greeter.redial()
        await self.peers.read_records()
        await self.greeter.greet_all([info.peer for info in self.membership.live()])
        self.peers.expire()
        self.rounds.was_suspended(forgives=False)  # `forgives` no failures: the peers just called in vain may be dead

    async def leave(self) -> None:
        """Say goodbye to everyone and end the node."""
        if self._daemon_watch is not None:
            await end_tasks([self._daemon_watch])
        await self.withdraw(_LAST_GOODBYE_S)
        await self.node.stop()

    # ------------------------------------------------------------- between `announce` and `withdraw`

    def _begin(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _work_ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("an error in the network code", exc_info=error)
            self.emit(
                WarningEvent(
                    message=f"an error in this peer's network code ({error}); restart this peer", code="network-broke"
                )
            )

    async def _keep_present(self) -> None:
        while True:
            await self._say_where_we_are()
            # A presence outlives two failed renewals.
            await asyncio.sleep(self.published.run.network.presence_ttl_s / 3)

    async def _keep_reading(self) -> None:
        for look in itertools.count(1):
            await asyncio.sleep(records.READ_EVERY_S)
            if look % _REDIAL_EVERY == 0:
                await self.greeter.redial()
            most_s = self.published.run.network.presence_ttl_s / 3
            # Each read costs more the more peers there are, so a large swarm is read less often (decision 33).
            every_s = records.read_every_s(len(self.membership.live()), records.READ_EVERY_S, most_s)
            if look % round(every_s / records.READ_EVERY_S) == 0:
                await self.peers.read_records()
            self.peers.expire()
            for peer in self.peers.forget(swarm_time() - _FORGET_AFTER_S):
                self.rounds.forget_peer(peer)
            await self.greeter.greet_newcomers()

    async def _keep_counting(self) -> None:
        while True:
            await self.accounting.read_some()
            least_s, most_s = records.COUNT_EVERY_S, records.MOST_COUNT_EVERY_S
            await asyncio.sleep(records.read_every_s(len(self.membership.live()), least_s, most_s))

    async def _notice_gaps(self) -> None:
        """Notify the rounds when this process was stopped or its machine slept: the other peers were not silent in that
        time."""
        while True:
            before_s = swarm_time()
            await asyncio.sleep(_HEARTBEAT_S)
            if abs(swarm_time() - before_s) > self.rounds.gap_s:
                self.rounds.was_suspended()

    async def _look_where_we_are(self) -> None:
        """Update this peer's addresses, which change: a router opens a port late, a home connection gets another
        address."""
        self.presence.describe_place(await self.node.addresses(), self.reaching.hidden, self.reaching.hosts)

    async def _say_where_we_are(self) -> None:
        await self._look_where_we_are()
        await self.records.store()

    def _reach_changed(self) -> None:
        """Advertise a changed reachability at once: until then others call this peer in vain."""
        self._begin(self._say_where_we_are())
        if self.reaching.hidden:
            self.emit(WarningEvent(message=self.reaching.in_words(), code="nobody-can-dial"))

    def _ask_for_host(self) -> pb.HelloRequest:
        run_sha256 = bytes.fromhex(self.published.sha256)
        return pb.HelloRequest(run_sha256=run_sha256, presence=self.presence.signed(), wants_host=True)

    def _own_link(self) -> LinkRates:
        """Return this peer's link, as it is measured by now."""
        up, down = self.node.traffic.link_bytes_per_s
        return LinkRates(up, down, not self.reaching.hidden)

    def _speeds(self) -> dict[str, float]:
        """Return the tokens per second that each volunteer claims."""
        tokens, infos = self.published.run.tokens_per_step, (self.presence.me, *self.membership.volunteers())
        return {info.peer: info.steps_per_s * tokens for info in infos}

    # ------------------------------------------------------------- what others ask of it

    def invite(self) -> Invite:
        """Return an invite that names this peer, the bootstrap and a few others."""
        others = [info for info in self.membership.live() if info.addresses]
        others.sort(key=lambda info: not info.is_bootstrap)
        # Addresses where this peer listens are of no use to others if it is hidden.
        own = self.presence.me.addresses or self.presence.listens_at
        peers = [InvitedPeer(self.identity.peer_id, own[:_MAX_ADDRESSES])]
        peers += [InvitedPeer(info.peer, info.addresses[:2]) for info in others[: _MAX_INVITED - 1]]
        return Invite(self.published.sha256, tuple(peers))

    async def watch_daemon(self, died: Callable[[Problem], None]) -> None:
        """Call `died` with a sentence if the network daemon ends before this peer leaves."""

        async def watch() -> None:
            how = await self.node.wait_until_dead()
            problem = Problem(f"the network daemon {how}; start this peer again", "daemon-died")
            self.emit(WarningEvent(message=problem, code=problem.code))
            died(problem)

        self._daemon_watch = asyncio.create_task(watch())

"""A peer among others: presence, greetings, the run's files, states and rounds, in the network thread.

Bootstrap and volunteer are both a `Swarm`; they differ in what they say of themselves. Everything here runs in the
network thread's loop; other threads go through `NetworkThread`, or set plain attributes that are only read here.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import logging
import random
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from swarmtrain.errors import BadBytesError, PeerError
from swarmtrain.events import Event, PeerJoinedEvent, PeerLeftEvent, PeerLostEvent, RefusedEvent, WarningEvent
from swarmtrain.network.consensus import StateFetcher
from swarmtrain.network.coverage import DataCoverage, ShardsOf, rows_of
from swarmtrain.network.daemon import swarm_time
from swarmtrain.network.finding import FoundRun, PublishedRun, fetch_published, find_run, version_fields
from swarmtrain.network.hosting import Hosting
from swarmtrain.network.identity import Identity, peer_bytes
from swarmtrain.network.invite import Invite, InvitedPeer
from swarmtrain.network.merging import Average, RoundSettings
from swarmtrain.network.node import Node
from swarmtrain.network.offering import FillManifest, Offer, state_specs
from swarmtrain.network.own_records import OwnRecords
from swarmtrain.network.publications import Publisher, Pulling, section_of
from swarmtrain.network.reaching import Reaching, is_loopback_only
from swarmtrain.network.records import (
    PRESENCE,
    open_presence_untrusted,
    presence_from_proto_untrusted,
    presence_to_proto,
    progress_to_proto,
)
from swarmtrain.network.refusals import Refusals
from swarmtrain.network.rounds import Rounds
from swarmtrain.network.service import PeerCalls, namespace_of, service_type
from swarmtrain.network.signing import sign
from swarmtrain.network.snapshots import Body, NumServed, PullLimits, SnapshotStore, TensorSpec, all_chunks
from swarmtrain.network.tallying import Tallying, counting_rules
from swarmtrain.network.tasks import end_tasks
from swarmtrain.protocol import records
from swarmtrain.protocol.arrivals import Arrivals
from swarmtrain.protocol.leaving import FellowLeavers, Leavers
from swarmtrain.protocol.lifecycle import Change, Membership, PeerInfo, PeerState
from swarmtrain.protocol.partners import Place
from swarmtrain.protocol.progress import Progress
from swarmtrain.protocol.pulls import Section
from swarmtrain.v1 import snapshot_pb2 as pb

__all__ = ["FoundRun", "PublishedRun", "Swarm", "fetch_published", "find_run", "state_specs"]

_log = logging.getLogger(__name__)
_MAX_INVITED = 4
_STATE_WAIT_S = 3.0
_MAX_ADDRESSES = 4
_FORGET_AFTER_S = 600.0
_PROGRESS_TTL_S = 86_400.0
_REDIAL_EVERY, _REDIALLED = 4, 4
_GREETING_S = 3.0
_MAX_OWN_ADDRESSES = 8
_HEARTBEAT_S = 0.25
_MAX_STAMP_SKEW_S = 120.0
_MAX_MEETINGS, _MAX_MET, _MEET_AGAIN_S = 16, 1024, 5.0
_GREETING_PASSES = 3
_GOODBYE_S = 3.0
_LAST_GOODBYE_S = 1.0  # the process waits for it, and the user for the process


@dataclass
class Swarm:
    """This peer's view of, and place in, the swarm of one run."""

    node: Node
    published: PublishedRun
    specs: tuple[TensorSpec, ...]
    average: Average
    emit: Callable[[Event], None]
    me: PeerInfo
    num_served: NumServed = field(default=all_chunks, kw_only=True)
    shards: ShardsOf | None = field(default=None, kw_only=True)
    """Of the data that it trains on, where these have some."""
    durable: Callable[[], Progress | None] | None = field(default=None, kw_only=True)
    """The progress that is safe on this peer's disk, which its progress record tells; None: the present one."""
    membership: Membership = field(init=False)
    calls: PeerCalls = field(init=False)
    store: SnapshotStore = field(init=False)
    rounds: Rounds = field(init=False)
    coverage: DataCoverage | None = field(init=False)  # None too where the data have no shards, and in a bootstrap
    tallying: Tallying = field(init=False)
    hosting: Hosting | None = field(default=None, init=False)  # what it serves of peers that nobody can dial
    leavers: Leavers | None = field(default=None, init=False)  # who waits for an archive to leave: of a bootstrap
    fellows: FellowLeavers | None = field(default=None, init=False)  # who leaves too: of a volunteer that leaves
    reaching: Reaching = field(init=False)
    offer: Offer = field(init=False)
    _publishers: Mapping[tuple[Section, int], Publisher] = field(default_factory=dict)
    """Empty where rounds are synchronous, and in a bootstrap."""
    _pulling: Pulling | None = None
    _called: Callable[[str], None] = lambda peer: None
    _rows: Callable[[], Sequence[pb.Signed]] = field(init=False)
    _places: Callable[[], Sequence[Mapping[str, Place]]] = tuple
    _listens_at: tuple[str, ...] = ()
    _signed: dict[str, pb.Signed] = field(default_factory=dict)
    _records: OwnRecords = field(init=False)
    _read_bucket: Callable[[str, str], Awaitable[dict[str, tuple[pb.Record, float]]]] = field(init=False)
    _tasks: list[asyncio.Task[None]] = field(default_factory=list)
    _greeted: set[str] = field(default_factory=set)
    _met_s: dict[str, float] = field(default_factory=dict)
    _meetings: set[asyncio.Task[None]] = field(default_factory=set)
    _through: tuple[InvitedPeer, ...] = ()
    _refusals: Refusals = field(init=False)
    _untold: dict[str, float] = field(default_factory=dict)
    """Those known by hearsay and records alone, with the stamp of these: they may just have gone, and nobody is told of
    them yet."""
    _arrivals: Arrivals = field(default_factory=Arrivals)
    _daemon_watch: asyncio.Task[None] | None = None

    def __post_init__(self) -> None:
        run = self.published.run
        limits = run.network
        self.node.settings = dataclasses.replace(self.node.settings, call_limit_s=limits.call_limit_s)
        self.membership = Membership(self.identity.peer_id)
        self._refusals = Refusals(self.emit, self.spares)
        self.calls = PeerCalls(
            self.node,
            self.published.sha256,
            limits.stall_limit_s,
            limits.least_bytes_per_s,
            on_failure=self.call_failed,
            on_answer=lambda peer: self.membership.heard(peer, swarm_time()),
            is_hidden=self._is_hidden,
        )
        self.store = SnapshotStore(
            limits.max_readers,
            up=self.node.traffic.up,
            min_bytes_per_s=limits.least_bytes_per_s,
            num_served=self.num_served,
        )
        settings = RoundSettings(
            run_sha256=self.published.sha256,
            specs=self.specs,
            state_specs=state_specs(self.specs),
            max_tokens=run.max_round_tokens,
            share_above=run.merge.share_above,
            round_limit_s=run.merge.round_limit_s,
            silence_s=run.merge.silence_s,
            pull=PullLimits(stall_limit_s=limits.stall_limit_s, min_bytes_per_s=limits.min_pull_bytes_per_s),
        )
        self.rounds = Rounds(
            self.identity,
            self.calls,
            self.store,
            self.membership,
            settings,
            self.average,
            refused=self.refused,
            report=self._report,
            trains=not self.me.is_bootstrap,
        )
        self._records = OwnRecords(self.node)
        self._read_bucket = lambda kind, prefix: self.node.read_bucket(self._run_bytes, kind, prefix)
        self._rows = lambda: rows_of(self.coverage)
        self.offer = Offer(
            self.identity,
            self.published.sha256,
            settings.state_specs,
            self.store,
            coverage=lambda: self._rows(),
            places=lambda: self._places(),
        )
        listens = lambda: self._listens_at  # noqa: E731 - it changes
        self.reaching = Reaching(self.calls, self.membership, self._ask_for_host, listens, self._reach_changed)
        self.tallying = Tallying(
            self.identity.peer_id,
            counting_rules(run, swarm_time()),
            self._read_bucket,
            self._speeds,
            swarm_time,
            lambda peer, rule, detail: self.emit(RefusedEvent(from_peer=peer, rule=rule, detail=detail)),
        )
        self.coverage = None if self.shards is None else self._coverage_of(self.shards)

    def _coverage_of(self, shards: ShardsOf) -> DataCoverage:
        tallying = self.tallying
        return DataCoverage(self.identity, shards, tallying.explained, tallying.refused, swarm_time, spares=self.spares)

    @property
    def identity(self) -> Identity:
        """This peer's key."""
        return self.node.identity

    @property
    def asynchronous(self) -> bool:
        """Whether peers merge at their own pace, without rosters."""
        return self.published.run.merge.kind.asynchronous

    @property
    def states(self) -> StateFetcher:
        """For pulling states of peers that merge asynchronously."""
        return StateFetcher(self.calls, self.store, self.rounds.settings, self.refused)

    @property
    def _run_bytes(self) -> bytes:
        return bytes.fromhex(self.published.sha256)

    # ------------------------------------------------------------- what it does for others

    def publishes(
        self,
        publishers: Mapping[tuple[Section, int], Publisher],
        pulling: Pulling,
        *,
        called: Callable[[str], None] = lambda peer: None,
        places: Callable[[], Sequence[Mapping[str, Place]]] = tuple,
    ) -> None:
        """Rounds are asynchronous: answer with these, in gossip gradients and weights of each fragment. `called` is
        told who asks, `pulling` is stopped at the goodbye, `places` go with the states that it offers."""
        self._publishers, self._pulling, self._called, self._places = publishers, pulling, called, places

    def offers_archive(
        self, rows: Callable[[], Sequence[pb.Signed]], places: Callable[[], Sequence[Mapping[str, Place]]]
    ) -> None:
        """The states that it offers are an archive: with them go what that says of the data and of everyone's place."""
        self._rows, self._places = rows, places

    def hosts(self, hosting: Hosting) -> None:
        """Peers that nobody can dial may be served from here."""
        self.hosting = hosting

    def keep_leavers(self) -> None:
        """Whoever would leave with what is in no archive is asked to stay until it is."""
        self.leavers = Leavers(self.membership)

    def release_leavers(self) -> None:
        """The last archive is made: they may go."""
        self.leavers = None

    def would_leave(self) -> None:
        """This peer would leave: those who ask whether they may are told so."""
        self.fellows = FellowLeavers(self.identity.peer_id)

    # ------------------------------------------------------------- life

    async def start(self, through: Sequence[InvitedPeer]) -> None:
        """Answer calls, enter the DHT through `through`, learn who is here. Nothing is said of ourselves yet."""
        service = service_type()(self, self.store, self.published.blobs(), self.node)
        await self.node.serve(service, namespace_of(self.published.sha256))
        self._through = tuple(peer for peer in through if peer.peer != self.identity.peer_id)
        for peer in self._through:
            self.node.remember_addresses(peer.peer, peer.addresses, peer.addresses)
        await self.node.join_dht([(peer.peer, peer.addresses) for peer in self._through])
        await self._greet_all([peer.peer for peer in self._through], None)
        await self.read_presences()

    async def announce(self) -> None:
        """Say that we are here, to everyone known and in the DHT, and keep saying so."""
        self.rounds.come_back()
        self._arrivals.came_myself(swarm_time())
        await self._look_where_we_are()
        await self.greet_everyone()
        kept = [self._keep_present(), self._keep_reading(), self._keep_counting(), self._notice_gaps()]
        if self.hosting is not None and not self.me.is_bootstrap and not is_loopback_only(self._listens_at):
            kept.append(self.reaching.keep())
        for work in kept:
            task = asyncio.create_task(work)
            task.add_done_callback(self._work_ended)
            self._tasks.append(task)

    def _work_ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("the network's work ended", exc_info=error)
            self.emit(WarningEvent(message=f"part of the network's work ended ({error}); restart this peer"))

    async def _look_where_we_are(self) -> None:
        """Our addresses, which change: a router opens a port late, a home connection gets another address."""
        self._listens_at = await self.node.addresses() or self._listens_at
        hidden, hosts = self.reaching.hidden, self.reaching.hosts
        addresses = () if hidden else self._listens_at[:_MAX_OWN_ADDRESSES]
        self.me = dataclasses.replace(self.me, addresses=addresses, hidden=hidden, hosts=hosts)

    def _reach_changed(self) -> None:
        """Say so at once: until then others call this peer in vain."""

        async def say() -> None:
            await self._look_where_we_are()
            await self._store_records()

        task = asyncio.create_task(say())
        self._meetings.add(task)
        task.add_done_callback(self._meetings.discard)
        if self.reaching.hidden:
            self.emit(WarningEvent(message=self.reaching.in_words()))

    def _ask_for_host(self) -> pb.HelloRequest:
        return pb.HelloRequest(run_sha256=self._run_bytes, presence=self.signed_presence(), wants_host=True)

    def _is_hidden(self, peer: str) -> bool:
        info = self.membership.info(peer)
        return info is not None and info.hidden

    async def leave(self) -> None:
        """Say goodbye to everyone, and stop answering."""
        if self._daemon_watch is not None:
            await end_tasks([self._daemon_watch])
        await self.withdraw(_LAST_GOODBYE_S)
        await self.node.stop()

    async def withdraw(self, limit_s: float = _GOODBYE_S) -> None:
        """Say goodbye to everyone, and nothing more of ourselves until `come_back`; the node stays.

        Whoever misses that, or takes longer than `limit_s`, learns it when it asks about a round.
        """
        if self.rounds.away:
            return
        self.rounds.leave()
        self.me = dataclasses.replace(self.me, inner_steps=0)  # whoever comes back begins another round
        for work in (self._pulling, self.hosting):
            if work is not None:
                await work.stop()
        await end_tasks([*self._tasks, *self._meetings])
        self._tasks.clear()
        request = pb.HelloRequest(run_sha256=self._run_bytes, presence=self.signed_presence(), leaving=True)
        goodbyes = [asyncio.create_task(self.calls.hello(i.peer, request, limit_s)) for i in self.membership.live()]
        if goodbyes:
            await asyncio.wait(goodbyes, timeout=limit_s)
            for task in goodbyes:
                task.add_done_callback(lambda ended: ended.cancelled() or ended.exception())

    async def come_back(self) -> None:
        """After `withdraw`: look who is here now. `announce` says that we are.

        Whoever neither answers nor has renewed its presence is gone; the others were not silent, we were deaf.
        """
        self._greeted.clear()
        self.membership.forgive()
        await self._redial()
        await self.read_presences()
        await self._greet_all([info.peer for info in self.membership.live()], None)
        self._expire()
        self.rounds.stood_still(swarm_time(), forgives=False)  # whom it has just called in vain may be dead

    async def _keep_present(self) -> None:
        while True:
            await self._look_where_we_are()
            await self._store_records()
            await asyncio.sleep(self.published.run.network.presence_ttl_s / 3)

    async def _keep_reading(self) -> None:
        for look in itertools.count(1):
            await asyncio.sleep(records.READ_EVERY_S)
            if look % _REDIAL_EVERY == 0:
                await self._redial()
            most_s = self.published.run.network.presence_ttl_s / 3
            every_s = records.read_every_s(len(self.membership.live()), records.READ_EVERY_S, most_s)
            if look % round(every_s / records.READ_EVERY_S) == 0:
                await self.read_presences()
            self._expire()
            for peer in self.membership.forget(swarm_time() - _FORGET_AFTER_S):
                self._signed.pop(peer, None)
                self._untold.pop(peer, None)
                self._greeted.discard(peer)
                self.rounds.forget_peer(peer)
            new = [info.peer for info in self.membership.live() if info.peer not in self._greeted]
            await self._greet_all(random.sample(new, min(32, len(new))), self.signed_presence())

    def _expire(self) -> None:
        for change in self.membership.expire(swarm_time()):
            self._report(change)

    async def _keep_counting(self) -> None:
        while True:
            await self.tallying.read_some()
            least_s, most_s = records.COUNT_EVERY_S, records.MOST_COUNT_EVERY_S
            await asyncio.sleep(records.read_every_s(len(self.membership.live()), least_s, most_s))

    async def count_once_more(self) -> None:
        """At the end: tell what is counted here, and count what others have told by now."""
        await self._store_records()
        await self.tallying.read_all()

    def _speeds(self) -> dict[str, float]:
        """What the volunteers say they do, in tokens per second."""
        tokens = self.published.run.tokens_per_step
        return {info.peer: info.steps_per_s * tokens for info in (self.me, *self.membership.volunteers())}

    async def _redial(self) -> None:
        """Knock at a few peers that seem gone: after an outage nobody else would, and a swarm would stay apart."""
        known = {*(peer.peer for peer in self._through), *self.node.known_peers()} - {self.identity.peer_id}
        away = [peer for peer in known if self.membership.state(peer) is not PeerState.LIVE]
        sample = random.sample(away, min(_REDIALLED, len(away)))
        await self._greet_all(sample, self.signed_presence())
        for peer in sample:
            if self.membership.state(peer) is PeerState.LIVE:
                await self.node.enter_routing_table(peer)

    async def _greet_all(self, peers: Sequence[str], presence: pb.Signed | None) -> None:
        """Greet side by side; whoever takes long is left to answer later."""
        tasks = [asyncio.create_task(self._greet(peer, presence)) for peer in peers]
        if tasks:
            await asyncio.wait(tasks, timeout=_GREETING_S)

    async def _notice_gaps(self) -> None:
        """A process that was stopped, or a laptop that slept, must not take its own gap for others' silence."""
        while True:
            before_s = swarm_time()
            await asyncio.sleep(_HEARTBEAT_S)
            if abs(swarm_time() - before_s) > self.rounds.gap_s:
                self.rounds.stood_still(swarm_time())

    # ------------------------------------------------------------- presence

    def describe(self, *, round: int, steps_per_s: float, run_tokens: int, inner_steps: int = 0) -> None:
        """What the next presence says of our progress."""
        self.me = dataclasses.replace(
            self.me, round=round, steps_per_s=steps_per_s, run_tokens=run_tokens, inner_steps=inner_steps
        )

    def describe_part(self, part: int, tokens: int) -> None:
        """What the next presence says of our newest publication in this round."""
        self.me = dataclasses.replace(self.me, part=part, part_tokens=tokens)

    def signed_presence(self) -> pb.Signed:
        self._renew()
        return sign(self.identity, PRESENCE, self.published.sha256, presence_to_proto(self.me))

    def _renew(self) -> None:
        stamp = max(swarm_time(), self.me.stamp + 1e-6)
        self.me = dataclasses.replace(self.me, stamp=stamp, inner_steps_done=self.rounds.inner_steps_done)

    async def _store_records(self) -> None:
        """Our presence, which expires soon, and if we train, what we have trained, which is kept for a day."""
        self._renew()
        presence = pb.Record(run_sha256=self._run_bytes, presence=presence_to_proto(self.me))
        await self._records.store(presence, self.published.run.network.presence_ttl_s)
        safe = self.durable() if self.durable is not None else self.offer.progress
        if self.me.training and safe is not None:
            tokens = self.tallying.own_to_tell(safe.peer_tokens.get(self.identity.peer_id, 0))
            progress = progress_to_proto(tokens, safe.round)
            await self._records.store(pb.Record(run_sha256=self._run_bytes, progress=progress), _PROGRESS_TTL_S)

    async def read_presences(self) -> None:
        """Read the presence buckets, the root first, then what lies below full ones."""
        sizes: dict[str, int] = {}
        while wanted := list(records.buckets_to_read(sizes)):
            if len(sizes) + len(wanted) > records.MAX_READ_BUCKETS:
                break
            for prefix in wanted:
                found = await self._read_bucket(PRESENCE, prefix)
                sizes[prefix] = len(found)
                for peer in filter(self.membership.has_room_for, found):
                    self._saw(peer, found[peer][0].presence)

    def _saw(self, peer: str, presence: pb.Presence, *, answered: bool = False, first_hand: bool = False) -> None:
        """`first_hand`: `peer` itself says it now, and is here."""
        try:
            given = next((known.addresses for known in self._through if known.peer == peer), ())
            info = presence_from_proto_untrusted(peer, presence, given)
            if info.stamp > swarm_time() + _MAX_STAMP_SKEW_S:
                raise BadBytesError("a presence from the future")
        except BadBytesError as error:
            self.refused(peer, error)
            return
        info = dataclasses.replace(info, hidden=info.hidden and self.asynchronous)  # synchronously nobody is
        expires_s = info.stamp + self.published.run.network.presence_ttl_s  # whatever its record says
        self.node.remember_addresses(peer, info.addresses, given)
        self.tallying.meet(peer)
        is_here = first_hand or info.hidden  # of who cannot be dialled, its presence alone decides
        self._report(self.membership.saw_presence(info, expires_s, swarm_time(), answered=answered), is_here)
        if peer in self._untold and (is_here or info.stamp > self._untold[peer]):  # it has renewed its presence
            del self._untold[peer]
            self.emit(PeerJoinedEvent(joined=peer, joined_name=info.name))

    async def greet_everyone(self) -> None:
        """Introduce ourselves to everyone believed alive, and to whom they name; what they answer is news of them."""
        greeted: set[str] = set()
        for _ in range(_GREETING_PASSES):
            strangers = [info.peer for info in self.membership.live() if info.peer not in greeted]
            await self._greet_all(strangers, self.signed_presence())
            greeted.update(strangers)

    def _meet(self, peers: Iterable[str]) -> None:
        """Greet those who take part and were never heard of, or seemed gone: joiners at one moment may each have been
        told of everyone but each other, and whoever does not know that another trains closes the round without it."""
        now = swarm_time()
        self._met_s = {peer: met_s for peer, met_s in self._met_s.items() if now < met_s + _MEET_AGAIN_S}
        for peer in peers:
            known = peer == self.identity.peer_id or self.membership.state(peer) is PeerState.LIVE
            if known or not self._tasks or peer in self._met_s or not self.membership.has_room_for(peer):
                continue
            if len(self._meetings) >= _MAX_MEETINGS or len(self._met_s) >= _MAX_MET:
                return
            self._met_s[peer] = now
            meeting = asyncio.create_task(self._greet(peer, self.signed_presence()))
            self._meetings.add(meeting)
            meeting.add_done_callback(self._meetings.discard)

    async def greet(self, peer: str) -> None:
        """Introduce ourselves to one peer; what it answers is news of it."""
        await self._greet(peer, self.signed_presence())

    async def greet_some(self, number: int = 16) -> None:
        """Ask a sample of the volunteers how far they are."""
        volunteers = [info.peer for info in self.membership.volunteers()]
        sample = random.sample(volunteers, min(number, len(volunteers)))
        await asyncio.gather(*(self._greet(peer, None) for peer in sample))

    async def _greet(self, peer: str, presence: pb.Signed | None) -> None:
        request = pb.HelloRequest(run_sha256=self._run_bytes, presence=presence)
        try:
            reply = await self.calls.hello(peer, request)
            self._read_presence_untrusted(reply.presence, peer, answered=True, first_hand=not reply.away)
            if reply.away:  # its record of before may be read for some time yet
                self._report(self.membership.left(peer, swarm_time()))
            for other in list(reply.others)[:64]:
                await asyncio.sleep(0)  # all of them take some 30 ms
                self._read_presence_untrusted(other, None)
            if presence is not None and self.membership.info(peer) is not None:
                self._greeted.add(peer)
        except BadBytesError as error:
            self.refused(peer, error)
        except PeerError as error:
            _log.debug("greeting %s: %s", peer, error)

    def _read_presence_untrusted(
        self, signed: pb.Signed, expected_author: str | None, *, answered: bool = False, first_hand: bool = False
    ) -> None:
        if not signed.payload:
            return
        author, message = open_presence_untrusted(signed, self.published.sha256)
        if author == self.identity.peer_id:
            return
        if expected_author is not None and author != expected_author:
            raise BadBytesError("a presence of another peer than the one that sent it")
        if expected_author is None and not self.membership.has_room_for(author):
            return  # hearsay of strangers, of whom anyone can invent any number
        self._saw(author, message, answered=answered, first_hand=first_hand)
        info = self.membership.info(author)
        if info is not None and info.stamp == message.stamp:
            self._signed[author] = signed

    # ------------------------------------------------------------- answers to others

    def hello(self, request: pb.HelloRequest, caller: str) -> pb.HelloReply:
        """Who we are and whom we know. A caller that introduces itself is known from then on."""
        with contextlib.suppress(BadBytesError):
            if request.HasField("presence"):
                self._read_presence_untrusted(request.presence, caller, first_hand=not request.leaving)
                if request.leaving:
                    self._report(self.membership.left(caller, swarm_time()))
                    if self.hosting is not None:
                        self.hosting.left(caller)
        if request.wants_host:
            hosting = None if self.rounds.away or self.me.hidden else self.hosting
            return pb.HelloReply(run_sha256=self._run_bytes, hosting=hosting is not None and hosting.ask(caller))
        known = [info.peer for info in self.membership.live() if info.peer in self._signed and info.peer != caller]
        return pb.HelloReply(
            **version_fields(self.published.run.needs),
            run_sha256=self._run_bytes,
            time=swarm_time(),
            presence=self.signed_presence() if self._listens_at and not self.rounds.away else None,
            others=[self._signed[peer] for peer in known[:64]],
            away=self.rounds.away,
            stay=request.asks_to_leave
            and any(each.ask(caller, swarm_time()) for each in (self.leavers, self.fellows) if each is not None),
        )

    async def round(self, request: pb.RoundRequest, caller: str) -> pb.RoundReply:
        """What we know of a round."""
        self._meet([caller])
        return await self.rounds.answer(request)

    async def publication(self, request: pb.PublicationRequest, caller: str) -> pb.PublicationReply:
        """Our newest publication, made a snapshot at the first request. What the caller says of itself is news."""
        self._called(caller)
        with contextlib.suppress(BadBytesError):
            self._read_presence_untrusted(request.presence, caller)
        if request.author and request.author != peer_bytes(self.identity.peer_id):
            if self.hosting is None or self.rounds.away:
                return pb.PublicationReply(away=True)
            return await self.hosting.answer(request, caller)
        publisher = self._publishers.get((section_of(request), request.fragment))
        if publisher is None or self.rounds.away:
            return pb.PublicationReply(away=self.rounds.away)
        reply = pb.PublicationReply(presence=self.signed_presence(), busy=not self.store.has_room_for(caller))
        if not reply.busy and (held := await publisher.held_after(request, caller)) is not None:
            reply.manifest.CopyFrom(held.snapshot.signed)
        return reply

    def heard_untrusted(self, peer: str, reply: pb.PublicationReply) -> None:
        """What a partner tells of itself with its publication."""
        self._read_presence_untrusted(reply.presence, peer, answered=True)
        if reply.away:
            self._report(self.membership.left(peer, swarm_time()))

    async def state(self, request: pb.StateRequest) -> pb.StateReply:
        """The manifest of our newest state, made when first asked for; none where each has its own and we are away."""
        await self.rounds.wait_for_round(min(request.min_round, self.rounds.current_round + 1), _STATE_WAIT_S)
        found, last = await self.offer.held(request.min_round), self.rounds.last
        if found is None or (self.asynchronous and self.rounds.away):
            return pb.StateReply()
        progress, held = found
        if self.asynchronous:
            return pb.StateReply(manifest=held.snapshot.signed)
        if last is None or last[0].digest != progress.roster_sha256:
            return pb.StateReply()
        return pb.StateReply(manifest=held.snapshot.signed, roster=last[1])

    def set_state(
        self, progress: Progress, body: Body | Callable[[], Body], fill: FillManifest = lambda manifest: None
    ) -> None:
        """Offer this state to joiners from now on (`Offer.put`); nobody may write into its buffers any more."""
        self.offer.put(progress, body, fill)
        self.tallying.learn(progress.peer_tokens)
        self.rounds.advance(progress)
        if self.rounds.last is not None:
            self._meet(self.rounds.last[0].peers)

    # ------------------------------------------------------------- news

    def invite(self) -> Invite:
        """An invite through this peer, the bootstrap and a few others."""
        others = [info for info in self.membership.live() if info.addresses]
        others.sort(key=lambda info: not info.is_bootstrap)
        own = self.me.addresses or self._listens_at  # of no use where nobody can dial this peer, and an invite has some
        peers = [InvitedPeer(self.identity.peer_id, own[:_MAX_ADDRESSES])]
        peers += [InvitedPeer(info.peer, info.addresses[:2]) for info in others[: _MAX_INVITED - 1]]
        return Invite(self.published.sha256, tuple(peers), self.published.run.needs)

    def call_failed(self, peer: str, error: PeerError) -> None:
        """Told of a call to `peer` that brought nothing."""
        self._report(self.membership.call_failed(peer, swarm_time(), str(error)))

    def _report(self, change: Change | None, is_here: bool = False) -> None:
        """Tell of a change. Of one that came it is told now if it certainly `is_here`, else once that is known."""
        if change is None:
            return
        self.rounds.peers_changed()
        info = self.membership.info(change.peer)
        if change.state is PeerState.LIVE:
            self._arrivals.came(change.peer, swarm_time())
            if info is not None and info.training:
                if is_here:
                    self.emit(PeerJoinedEvent(joined=change.peer, joined_name=info.name))
                else:
                    self._untold[change.peer] = info.stamp
        else:
            self._greeted.discard(change.peer)
            if self._untold.pop(change.peer, None) is not None or info is None or not info.training:
                return
            if change.state is PeerState.LOST:
                self.emit(PeerLostEvent(lost=change.peer, lost_name=info.name, reason=change.reason))
            else:
                self.emit(PeerLeftEvent(left=change.peer, left_name=info.name))

    def spares(self, peer: str, rule: str, detail: str) -> bool:
        """Whether what was refused is not told yet, since somebody came lately."""
        return self._arrivals.spares(peer, rule, detail, swarm_time())

    def refused(self, peer: str, error: PeerError) -> None:
        """Tell of hostile bytes."""
        self._refusals.tell(peer, error)

    async def watch_daemon(self, died: Callable[[str], None]) -> None:
        """Calls `died` with a sentence when the network daemon ends before we leave."""

        async def watch() -> None:
            message = f"the network daemon {await self.node.wait_until_dead()}; start this peer again"
            self.emit(WarningEvent(message=message))
            died(message)

        self._daemon_watch = asyncio.create_task(watch())

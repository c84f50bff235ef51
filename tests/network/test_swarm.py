"""Knowledge of other peers: peers that meet in a round greet each other, whatever the DHT has said so far."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Coroutine
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from virtual_loop import virtual_swarm

from swarmtrain.compatibility import PROTOCOL
from swarmtrain.errors import BadBytesError, PeerError, UnreachableError
from swarmtrain.events import Event, PeerJoinedEvent, PeerLeftEvent, RefusedEvent
from swarmtrain.network.answers import Serving
from swarmtrain.network.codec import average_bytes_untrusted
from swarmtrain.network.daemon import swarm_time
from swarmtrain.network.discovery.invite import InvitedPeer
from swarmtrain.network.discovery.records import presence_to_proto
from swarmtrain.network.discovery.run_lookup import PublishedRun
from swarmtrain.network.identity import Identity, new_identity, peer_bytes, sign
from swarmtrain.network.node import NodeSettings, TrafficCount
from swarmtrain.network.snapshots.store import Body
from swarmtrain.network.swarm import Swarm
from swarmtrain.protocol.archive.departure import DepartureQueue
from swarmtrain.protocol.membership import membership
from swarmtrain.protocol.membership.hosts import HostCandidate, Reach
from swarmtrain.protocol.membership.membership import PeerInfo, PeerState
from swarmtrain.protocol.membership.records import READ_EVERY_S
from swarmtrain.protocol.rounds.messages import SignedRoster
from swarmtrain.protocol.rounds.rosters import Roster, RoundPublication
from swarmtrain.protocol.tokens.progress import Progress
from swarmtrain.run import RunFile
from swarmtrain.v1 import snapshot_pb2 as pb

RUN = "ab" * 32
ME, BEN, CARL, DORA = (new_identity(bytes([i]) * 32) for i in range(4))


def presence(identity: Identity) -> pb.Signed:
    info = PeerInfo(peer=identity.peer_id, name="someone", training=True, stamp=swarm_time())
    return sign(identity, "presence", RUN, presence_to_proto(info))


class Hellos:
    """Stands in for `PeerCalls`: those in `others` answer a greeting and name everyone they `know`."""

    def __init__(self, *others: Identity, know: dict[str, list[Identity]] | None = None) -> None:
        self.goodbyes: list[str] = []
        self.others, self.know = {other.peer_id: other for other in others}, know or {}
        self.asked: list[str] = []
        self.away: set[str] = set()
        self.on_failure: Callable[[str, PeerError], None] = lambda peer, error: None

    async def hello(self, peer: str, request: pb.HelloRequest, limit_s: float | None = None) -> pb.HelloReply:
        (self.goodbyes if request.leaving else self.asked).append(peer)
        await asyncio.sleep(0)
        if peer not in self.others:
            self.on_failure(peer, UnreachableError("nobody"))
            raise UnreachableError("nobody")
        named = [presence(other) for other in self.know.get(peer, [])]
        away = peer in self.away
        return pb.HelloReply(presence=None if away else presence(self.others[peer]), others=named, away=away)


def a_swarm(calls: Hellos, method: str = "diloco", **given: Any) -> tuple[Swarm, list[Event]]:
    events: list[Event] = []
    settings = NodeSettings(directory=Path("/nowhere"))
    node: Any = SimpleNamespace(
        identity=ME, settings=settings, traffic=TrafficCount(), remember_addresses=lambda *_: None, known_peers=list
    )
    run_file = RunFile.model_validate({"run": {"total_tokens": 100_000}, "merge": {"method": method}})
    published = PublishedRun(b"", RUN, run_file, b"", b"")
    swarm = Swarm(node, published, (), average_bytes_untrusted, events.append, PeerInfo(peer=ME.peer_id), **given)
    swarm.calls.hello = calls.hello  # type: ignore[method-assign]
    calls.on_failure = swarm.peers.call_failed
    return swarm, events


def run(body: Callable[[Swarm], Coroutine[Any, Any, None]], calls: Hellos, method: str = "diloco") -> list[Event]:
    async def announced() -> None:
        swarm, told = a_swarm(calls, method)
        events.append(told)
        swarm.greeter.start()
        await body(swarm)

    events: list[list[Event]] = []
    asyncio.run(announced())
    return events[0]


def joined(events: list[Event]) -> list[str]:
    return [event.joined for event in events if isinstance(event, PeerJoinedEvent)]


def told(swarm: Swarm) -> list[Event]:
    events: Any = swarm.emit
    return list(events.__self__)


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def test_a_stranger_that_asks_about_a_round_is_greeted_once() -> None:
    calls = Hellos(BEN)

    async def body(swarm: Swarm) -> None:
        for _ in range(5):
            await swarm.answers.round(pb.RoundRequest(round=0), BEN.peer_id)
            await settle()

    assert joined(run(body, calls)) == [BEN.peer_id] and calls.asked == [BEN.peer_id]


@pytest.mark.parametrize("state", [PeerState.LOST, PeerState.LEFT])
def test_a_peer_that_seemed_gone_and_asks_about_a_round_is_back_at_once(state: PeerState) -> None:
    """It stood still for a while, or came back with a clock a little behind: its next presence may be long in coming
    through the DHT."""
    calls = Hellos(BEN)

    async def body(swarm: Swarm) -> None:
        now = swarm_time()
        swarm.membership.saw_presence(PeerInfo(peer=BEN.peer_id, training=True, stamp=now - 60), now + 99, now)
        if state is PeerState.LEFT:
            swarm.membership.left(BEN.peer_id, now - 1)
        for failed_s in (now - 50, now - 40):
            swarm.membership.call_failed(BEN.peer_id, failed_s, "no answer")
        assert swarm.membership.state(BEN.peer_id) is state
        await swarm.answers.round(pb.RoundRequest(round=0), BEN.peer_id)
        await settle()
        assert swarm.membership.state(BEN.peer_id) is PeerState.LIVE

    assert joined(run(body, calls)) == [BEN.peer_id]


def test_callers_that_do_not_answer_a_greeting_cost_a_bounded_number_of_them() -> None:
    calls = Hellos()

    async def body(swarm: Swarm) -> None:
        for number in range(100):
            await swarm.answers.round(pb.RoundRequest(round=0), f"stranger {number % 50}")
        await settle()

    assert joined(run(body, calls)) == [] and len(calls.asked) == len(set(calls.asked)) <= 16


def test_who_was_greeted_is_remembered_within_bounds() -> None:
    """Whoever calls is met, identities cost nothing, and of who has no place in the swarm nothing is kept."""
    calls = Hellos(BEN, CARL)
    calls.away.add(BEN.peer_id)

    async def body(swarm: Swarm) -> None:
        for number in range(0, 3000, 15):
            swarm.greeter.meet([f"stranger {number + one}" for one in range(15)])
            await settle()
        assert 900 < len(swarm.greeter._met_s) <= 1024
        for peer in (BEN.peer_id, CARL.peer_id):
            await swarm.greeter.greet(peer)
        assert swarm.peers.greeted == {CARL.peer_id}, "the other one said that it is away"

    run(body, calls)


def test_strangers_on_a_roster_that_is_applied_are_greeted() -> None:
    calls = Hellos(BEN, CARL)

    async def body(swarm: Swarm) -> None:
        entries = tuple(
            RoundPublication(peer=peer.peer_id, snapshot="5" * 64, tokens=1, inner_steps=1) for peer in (ME, BEN, CARL)
        )
        roster = Roster(round=0, signer=BEN.peer_id, entries=entries)
        swarm.rounds.engine.last = SignedRoster(roster, pb.Signed(), "")
        swarm.greeter.meet(roster.peers)
        await settle()

    assert sorted(joined(run(body, calls))) == sorted([BEN.peer_id, CARL.peer_id])


def test_those_whom_a_greeted_peer_names_are_greeted_too() -> None:
    calls = Hellos(BEN, CARL, know={BEN.peer_id: [CARL, ME]})

    async def body(swarm: Swarm) -> None:
        swarm.peers.receive_untrusted(presence(BEN), BEN.peer_id)
        await swarm.greeter.greet_everyone()

    assert sorted(joined(run(body, calls))) == sorted([BEN.peer_id, CARL.peer_id])
    assert calls.asked == [BEN.peer_id, CARL.peer_id]


def test_a_peer_that_rests_says_goodbye_and_tells_nothing_of_itself_until_it_is_back() -> None:
    calls = Hellos(BEN)

    async def body(swarm: Swarm) -> None:
        async def read_presences() -> None: ...

        swarm.peers.read_records = read_presences  # type: ignore[method-assign]
        swarm.presence.me = dataclasses.replace(swarm.presence.me, addresses=("/ip4/127.0.0.1/tcp/1",))
        swarm.presence.describe(round=3, steps_per_s=1.0, run_tokens=0, inner_steps=40)
        swarm.peers.receive_untrusted(presence(BEN), BEN.peer_id)
        await swarm.withdraw()
        await swarm.withdraw()
        assert calls.goodbyes == [BEN.peer_id] and calls.asked == []
        assert swarm.presence.me.inner_steps == 0, "when it is back it begins another round"
        assert not swarm.answers.hello(pb.HelloRequest(), BEN.peer_id).HasField("presence")
        assert swarm.answers.hello(pb.HelloRequest(), BEN.peer_id).away
        await swarm.answers.round(pb.RoundRequest(round=0), CARL.peer_id)
        await settle()
        assert calls.asked == [], "it greets no stranger while it rests"
        reply = await asyncio.wait_for(swarm.answers.round(pb.RoundRequest(round=0, wait_s=2.0), BEN.peer_id), 1.0)
        assert reply.away and not reply.participating, "for those who missed the goodbye"
        await swarm.come_back()
        assert calls.asked == [BEN.peer_id] and len(swarm.membership.answering()) == 1
        calls.others.clear()
        await swarm.come_back()
        assert swarm.membership.volunteers() and not swarm.membership.answering(), "it was killed a moment ago"

    run(body, calls)


def test_who_answers_a_greeting_that_it_is_away_is_not_counted_with() -> None:
    """It left a stage, say, while this peer was not in it either, and its record has not run out."""
    calls = Hellos(BEN, CARL)
    calls.away = {BEN.peer_id}

    async def body(swarm: Swarm) -> None:
        for other in (BEN, CARL):
            swarm.peers.receive_untrusted(presence(other), other.peer_id)
        await swarm.greeter.greet_all([BEN.peer_id, CARL.peer_id], None)
        assert [info.peer for info in swarm.membership.volunteers()] == [CARL.peer_id]
        swarm.peers.receive_untrusted(presence(BEN), BEN.peer_id)
        assert len(swarm.membership.volunteers()) == 2, "it came back"

    run(body, calls)


@pytest.mark.parametrize(("method", "is_offered"), [("diloco", True), ("gossip", False)])
def test_who_is_away_offers_its_state_only_where_all_have_the_same(
    method: str, is_offered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body(swarm: Swarm) -> None:
        held = SimpleNamespace(snapshot=SimpleNamespace(signed=pb.Signed(payload=b"manifest")))

        async def newest(min_round: int) -> object:
            return Progress(round=6), held

        roster: Any = SimpleNamespace(digest="")
        swarm.rounds.engine.last = SignedRoster(roster, pb.Signed(), "")
        monkeypatch.setattr(swarm.offer, "held", newest)
        assert (await swarm.answers.state(pb.StateRequest())).HasField("manifest")
        swarm.rounds.leave()
        assert (await swarm.answers.state(pb.StateRequest())).HasField("manifest") is is_offered

    run(body, Hellos(), method)


def test_whoever_missed_the_goodbye_of_a_peer_that_rests_learns_it_by_asking() -> None:
    async def body(swarm: Swarm) -> None:
        swarm.peers.receive_untrusted(presence(BEN), BEN.peer_id, first_hand=True)
        replies = iter([pb.RoundReply(participating=True), pb.RoundReply(away=True)])

        async def answer(peer: str, request: pb.RoundRequest) -> pb.RoundReply:
            return next(replies)

        swarm.calls.round = answer  # type: ignore[method-assign]
        await swarm.rounds.search.ask_now([BEN.peer_id])
        assert swarm.membership.state(BEN.peer_id) is PeerState.LIVE
        await swarm.rounds.search.ask_now([BEN.peer_id])
        assert swarm.membership.state(BEN.peer_id) is PeerState.LEFT
        await asyncio.sleep(0.01)
        swarm.peers.receive_untrusted(presence(BEN), BEN.peer_id, first_hand=True)
        assert swarm.membership.state(BEN.peer_id) is PeerState.LIVE, "it is back"

    events = run(body, Hellos())
    assert joined(events) == [BEN.peer_id] * 2
    (left,) = (event for event in events if isinstance(event, PeerLeftEvent))
    assert (left.left, left.left_name) == (BEN.peer_id, "someone")


def test_a_state_of_another_branch_is_not_taken_for_the_present_one() -> None:
    """Of the same round: the one served last time was of rosters that do not hold."""

    async def body(swarm: Swarm) -> None:
        for peer in (BEN, CARL):
            entry = RoundPublication(peer=peer.peer_id, snapshot="5" * 64, tokens=9, inner_steps=1)
            roster = Roster(round=6, signer=peer.peer_id, entries=(entry,))
            swarm.rounds.know_roster(roster, pb.Signed())
            swarm.set_state(Progress(round=7, peer_tokens={peer.peer_id: 9}, roster_sha256=roster.digest), Body([]))
            for _ in range(2):
                reply = await swarm.answers.state(pb.StateRequest(min_round=7))
                assert reply.HasField("manifest") and swarm.offer._held is not None
                manifest = swarm.offer._held.snapshot.manifest
                assert manifest.roster_sha256.hex() == roster.digest
                assert reply.manifest == swarm.offer._held.snapshot.signed

    run(body, Hellos())


def test_those_who_went_during_a_rest_are_not_believed_alive_after_it() -> None:
    calls = Hellos(BEN)

    async def body(swarm: Swarm) -> None:
        async def read_presences() -> None: ...

        swarm.peers.read_records = read_presences  # type: ignore[method-assign]
        long_ago_s = swarm_time() - 1000
        for peer in (BEN, CARL):
            info = PeerInfo(peer=peer.peer_id, training=True, stamp=long_ago_s)
            swarm.membership.saw_presence(info, long_ago_s + 60, long_ago_s)
        await swarm.withdraw()
        began_s = swarm_time()
        await swarm.come_back()
        states = [swarm.membership.state(peer.peer_id) for peer in (BEN, CARL)]
        assert states == [PeerState.LIVE, PeerState.LOST], "one answered, the other's presence has run out"
        assert min(swarm.membership.heard_s(BEN.peer_id), swarm.rounds.listening_since_s) >= began_s

    run(body, calls)


def test_what_is_refused_of_one_peer_is_told_once_a_minute_for_each_rule() -> None:
    async def body(swarm: Swarm) -> None:
        future = presence_to_proto(PeerInfo(peer=BEN.peer_id, stamp=swarm_time() + 9999))
        for _ in range(50):
            swarm.peers.saw(BEN.peer_id, future)
            swarm.peers.refused(BEN.peer_id, BadBytesError("forged", code="bad-signature"))
            swarm.peers.refused(CARL.peer_id, BadBytesError("forged", code="bad-signature"))

    told = [(event.from_peer, event.rule) for event in run(body, Hellos()) if isinstance(event, RefusedEvent)]
    assert told == [(BEN.peer_id, "presence"), (BEN.peer_id, "signature"), (CARL.peer_id, "signature")]


def test_who_has_just_gone_is_not_told_to_be_here() -> None:
    calls = Hellos(BEN)

    async def body(swarm: Swarm) -> None:
        began_s = swarm_time()
        for peer in (BEN, CARL, DORA):  # by their records, as one that joins reads them
            swarm.peers.saw(
                peer.peer_id, presence_to_proto(PeerInfo(peer=peer.peer_id, stamp=began_s - 16, training=True))
            )
        assert joined(told(swarm)) == [], "records say nothing of who is here now"
        await swarm.greeter.greet_everyone()
        assert joined(told(swarm)) == [BEN.peer_id], "the one that answered"
        assert [info.peer for info in swarm.membership.answering()] == [BEN.peer_id]
        renewed = PeerInfo(peer=DORA.peer_id, stamp=began_s - 1, training=True)
        swarm.peers.saw(DORA.peer_id, presence_to_proto(renewed))
        assert joined(told(swarm)) == [BEN.peer_id, DORA.peer_id], "one that nobody can call renews its record"
        swarm.peers.report(swarm.membership.left(CARL.peer_id, swarm_time()))

    events = run(body, calls)
    assert not any(isinstance(event, PeerLeftEvent) for event in events), "nobody was told that it was here"


def test_who_came_lately_is_not_named_for_what_is_old() -> None:
    behind = BadBytesError("9 rounds behind the median; at most 8 are merged", code="bad-round")

    async def body(swarm: Swarm) -> None:
        long_ago_s = swarm_time() - 100.0
        swarm.peers.arrivals.came_myself(long_ago_s)
        swarm.peers.saw(BEN.peer_id, presence_to_proto(PeerInfo(peer=BEN.peer_id, stamp=swarm_time(), training=True)))
        for peer in (BEN, CARL):
            swarm.peers.refused(peer.peer_id, behind)
        swarm.peers.arrivals.came(BEN.peer_id, long_ago_s)
        swarm.peers.refused(BEN.peer_id, behind)

    told = [event.from_peer for event in run(body, Hellos()) if isinstance(event, RefusedEvent)]
    assert told == [CARL.peer_id, BEN.peer_id], "and of whom it was said before may be said later"


def test_who_is_seen_is_believed_from_then_on() -> None:
    """Its record is read a minute later: what it can have trained in that minute counts at once."""

    async def body(swarm: Swarm) -> None:
        began_s = swarm_time()
        ben = PeerInfo(peer=BEN.peer_id, stamp=began_s, training=True, steps_per_s=0.05)
        swarm.peers.saw(BEN.peer_id, presence_to_proto(ben))
        swarm.accounting.clock = lambda: began_s + 60.0
        for peer in (BEN, CARL):
            swarm.accounting.receive(peer.peer_id, 10**9)
        counts = swarm.accounting.contributions()
        burst = swarm.accounting.rules.burst_tokens
        assert counts[CARL.peer_id] == burst
        assert counts[BEN.peer_id] == pytest.approx(
            burst + 4 * 60 * 0.05 * swarm.published.run.tokens_per_step, rel=0.01
        )

    run(body, Hellos())


def test_a_progress_record_tells_what_is_safe_on_the_disk() -> None:
    told: list[pb.Progress] = []

    async def store(record: pb.Record, lifetime_s: float) -> bool:
        if record.WhichOneof("body") == "progress":
            told.append(record.progress)
        return True

    async def read_bucket(*_: object) -> dict[str, Any]:
        return {}

    async def body(swarm: Swarm) -> None:
        swarm.presence.me = dataclasses.replace(swarm.presence.me, training=True, name="me")
        swarm.node.store, swarm.node.read_bucket = store, read_bucket  # type: ignore[method-assign, assignment]
        roster = Roster(round=6, signer=BEN.peer_id, entries=())
        swarm.rounds.know_roster(roster, pb.Signed())
        counts = {ME.peer_id: 700, BEN.peer_id: 9}
        swarm.set_state(Progress(round=7, peer_tokens=counts, roster_sha256=roster.digest), Body([]))
        safe = Progress(round=6, peer_tokens={ME.peer_id: 600})
        for durable in (lambda: None, lambda: safe, swarm.records.safe):
            await dataclasses.replace(swarm.records, safe=durable).store()
        assert swarm.accounting.contributions() == counts

    run(body, Hellos())
    assert told == [pb.Progress(tokens=600, round=6, name="me"), pb.Progress(tokens=700, round=7, name="me")]


def test_what_a_rehearsal_brings_says_how_much_of_a_pull_is_served() -> None:
    assert a_swarm(Hellos())[0].store.num_served(20) == 20
    assert a_swarm(Hellos(), num_served=lambda num_chunks: num_chunks // 2)[0].store.num_served(20) == 10


# ---------------------------------------------------------------- who is known by records alone


def records_of(*infos: PeerInfo, lifetime_s: float = 30.0) -> Callable[[bytes, str, str], Coroutine[Any, Any, Any]]:
    """Stands in for `Node.read_bucket`: the root bucket has these."""
    expiry_s = swarm_time() + lifetime_s
    found = {info.peer: (pb.Record(presence=presence_to_proto(info)), expiry_s) for info in infos}

    async def read_bucket(*_: object) -> dict[str, tuple[pb.Record, float]]:
        return found

    return read_bucket


def test_a_full_table_takes_no_more_strangers_from_records(monkeypatch: pytest.MonkeyPatch) -> None:
    """One node of the DHT can answer with any number of them."""
    monkeypatch.setattr(membership, "MAX_PEERS", 5)

    async def body(swarm: Swarm) -> None:
        for stamp_s in (swarm_time(), swarm_time() + 1):
            infos = [PeerInfo(peer=new_identity(bytes([i]) * 32).peer_id, stamp=stamp_s) for i in range(100, 120)]
            swarm.node.read_bucket = records_of(*infos)  # type: ignore[method-assign, assignment]
            await swarm.peers.read_records()
            assert [info.stamp for info in swarm.membership.known()] == [stamp_s] * 5, "those who are known are renewed"
        await swarm.greeter.greet(BEN.peer_id)
        assert swarm.membership.state(BEN.peer_id) is PeerState.LIVE, "who answers is no invention"

    run(body, Hellos(BEN))


def test_a_record_that_nobody_renews_is_believed_as_long_as_the_run_says() -> None:
    """Whatever its author has chosen as its end."""

    async def body(swarm: Swarm) -> None:
        ben = PeerInfo(peer=BEN.peer_id, stamp=swarm_time(), training=True)
        swarm.node.read_bucket = records_of(ben, lifetime_s=3600.0)  # type: ignore[method-assign, assignment]
        await swarm.peers.read_records()
        assert swarm.membership.state(BEN.peer_id) is PeerState.LIVE and not swarm.membership.expire(swarm_time() + 29)
        swarm.membership.expire(swarm_time() + 31)
        await swarm.peers.read_records()
        assert swarm.membership.state(BEN.peer_id) is PeerState.LOST, "it is no news"

    run(body, Hellos())


def test_in_synchronous_rounds_nobody_is_hidden_whatever_it_says() -> None:
    """There failed calls are all that is known of one that is silent."""

    async def body(swarm: Swarm) -> None:
        now = swarm_time()
        for hidden_s in (now, now + 0.1):
            swarm.peers.saw(BEN.peer_id, presence_to_proto(PeerInfo(peer=BEN.peer_id, stamp=hidden_s, hidden=True)))
        for failed_s in (now + 1, now + 3):
            swarm.membership.call_failed(BEN.peer_id, failed_s, "no answer")
        assert swarm.membership.state(BEN.peer_id) is PeerState.LOST

    run(body, Hellos())


def test_inventions_do_not_keep_newcomers_from_being_greeted() -> None:
    calls = Hellos(BEN)

    async def look() -> None:
        swarm, _ = a_swarm(calls)
        swarm.node.read_bucket = records_of()  # type: ignore[method-assign, assignment]
        low = sorted(f"{number:04}" for number in range(64))
        for peer in (*low, BEN.peer_id):
            info = PeerInfo(peer=peer, stamp=swarm_time())
            swarm.membership.saw_presence(info, swarm_time() + 3600, swarm_time())
        reading = asyncio.create_task(swarm._keep_reading())
        await asyncio.sleep(100 * READ_EVERY_S)
        reading.cancel()

    virtual_swarm(look)
    assert BEN.peer_id in calls.asked


# ---------------------------------------------------------------- peers that nobody can dial


class AHost:
    """Stands in for `Hosting`."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.gone: list[str] = []

    def ask(self, peer: str) -> bool:
        self.asked.append(peer)
        return True

    def left(self, peer: str) -> None:
        self.gone.append(peer)

    async def answer(self, request: pb.PublicationRequest, caller: str) -> pb.PublicationReply:
        return pb.PublicationReply(busy=True)


def test_a_host_takes_a_guest_in_one_small_call_and_lets_it_go() -> None:
    async def body(swarm: Swarm) -> None:
        request = pb.HelloRequest(presence=presence(BEN), wants_host=True)
        assert not swarm.answers.hello(request, BEN.peer_id).hosting, "it merges with rosters"
        host: Any = AHost()
        swarm.serving = Serving(hosting=host)
        reply = swarm.answers.hello(request, BEN.peer_id)
        assert reply.hosting and not reply.others and reply.ByteSize() < 100
        assert host.asked == [BEN.peer_id]
        swarm.presence.me = dataclasses.replace(swarm.presence.me, hidden=True)
        assert not swarm.answers.hello(request, BEN.peer_id).hosting, "nobody can dial the host either"
        swarm.answers.hello(pb.HelloRequest(presence=presence(BEN), leaving=True), BEN.peer_id)
        assert host.gone == [BEN.peer_id]

    run(body, Hellos())


def test_who_asks_for_what_we_publish_is_told_to_whom_pulls() -> None:
    called: list[str] = []

    async def body(swarm: Swarm) -> None:
        await swarm.answers.publication(pb.PublicationRequest(), CARL.peer_id)
        swarm.serving = Serving(called=called.append)
        await swarm.answers.publication(pb.PublicationRequest(), BEN.peer_id)

    run(body, Hellos())
    assert called == [BEN.peer_id]


class Pulling:
    def __init__(self) -> None:
        self.num_stops = 0

    async def stop(self) -> None:
        self.num_stops += 1


def test_who_holds_a_stage_again_serves_with_what_it_has_by_then() -> None:
    first, second = Pulling(), Pulling()
    called: list[str] = []

    async def body(swarm: Swarm) -> None:
        async def read_records() -> None: ...

        swarm.peers.read_records = read_records  # type: ignore[method-assign]
        swarm.serving = Serving(pulling=first, called=lambda peer: called.append("of before"))
        await swarm.withdraw()
        await swarm.come_back()
        await swarm.answers.publication(pb.PublicationRequest(), BEN.peer_id)
        await swarm.come_back(Serving(pulling=second, called=called.append))
        swarm.rounds.come_back()
        await swarm.answers.publication(pb.PublicationRequest(), BEN.peer_id)
        await swarm.withdraw()
        assert not swarm.greeter._meets

    run(body, Hellos())
    assert (first.num_stops, second.num_stops) == (1, 1)
    assert called == ["of before", BEN.peer_id]


def test_a_guests_publication_is_the_hosts_business_and_nobody_elses() -> None:
    async def body(swarm: Swarm) -> None:
        of_carl = pb.PublicationRequest(author=peer_bytes(CARL.peer_id))
        assert (await swarm.answers.publication(of_carl, BEN.peer_id)).away
        host: Any = AHost()
        swarm.serving = Serving(hosting=host)
        assert (await swarm.answers.publication(of_carl, BEN.peer_id)).busy
        own = pb.PublicationRequest(author=peer_bytes(ME.peer_id))
        assert not (await swarm.answers.publication(own, BEN.peer_id)).busy

    run(body, Hellos())


def test_a_hidden_peer_tells_its_hosts_and_no_address() -> None:
    async def body(swarm: Swarm) -> None:
        async def addresses() -> tuple[str, ...]:
            return ("/ip4/10.0.0.7/tcp/31337",)

        swarm.node.addresses = addresses  # type: ignore[method-assign]
        await swarm._look_where_we_are()
        assert swarm.presence.me.addresses and not swarm.presence.me.hidden
        swarm.reaching.reachability.state = Reach.HIDDEN
        swarm.reaching.choice.choose([HostCandidate(peer=BEN.peer_id), HostCandidate(peer=CARL.peer_id)], 0.0)
        swarm.reaching.choice.answered(BEN.peer_id, True, 0.0)
        await swarm._look_where_we_are()
        assert (swarm.presence.me.addresses, swarm.presence.me.hidden, swarm.presence.me.hosts) == (
            (),
            True,
            (BEN.peer_id,),
        )
        reply = swarm.answers.hello(pb.HelloRequest(), CARL.peer_id)
        assert reply.HasField("presence")
        assert reply.protocol == PROTOCOL
        assert swarm.invite().peers[0].addresses, "an invite names somebody"

    run(body, Hellos())


def test_a_bootstrap_keeps_the_last_one_until_it_is_archived() -> None:
    async def body(swarm: Swarm) -> None:
        request = pb.HelloRequest(presence=presence(BEN), asks_to_leave=True)
        assert not swarm.answers.hello(request, BEN.peer_id).stay, "a volunteer has no archive"
        leavers = DepartureQueue(swarm.membership)
        swarm.serving = Serving(leavers=leavers)
        assert swarm.answers.hello(request, BEN.peer_id).stay
        assert not swarm.answers.hello(pb.HelloRequest(presence=presence(BEN)), BEN.peer_id).stay
        waiting = leavers.waiting(swarm_time())
        assert waiting == (BEN.peer_id,)
        leavers.taken(waiting, swarm_time())
        assert not swarm.answers.hello(request, BEN.peer_id).stay
        assert swarm.answers.hello(request, BEN.peer_id).stay, "it has trained on"
        leavers.release()
        assert not swarm.answers.hello(request, BEN.peer_id).stay, "there is no other archive"

    run(body, Hellos())


def test_names_that_strangers_give_are_neither_dialled_nor_handed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a presence of its own, by hearsay, and by what the user gave for another peer; the user's own names are."""
    calls, remembered = Hellos(BEN, CARL), dict[str, tuple[Any, Any]]()
    evil, home, plain = "/dns4/evil.example/tcp/80", "/dns/home.example.org/tcp/31337", "/ip4/10.0.0.7/tcp/5"
    hidden = "/ip6/::ffff:169.254.169.254/tcp/80"

    def says(identity: Identity, *addresses: str) -> pb.Signed:
        info = PeerInfo(peer=identity.peer_id, training=True, stamp=swarm_time(), addresses=addresses)
        return sign(identity, "presence", RUN, presence_to_proto(info))

    async def body(swarm: Swarm) -> None:
        async def nothing(*_: object) -> None: ...

        node: Any = swarm.node
        node.remember_addresses = lambda peer, addresses, given=(): remembered.update({peer: (addresses, given)})
        node.serve = node.join_dht = nothing
        monkeypatch.setattr(PublishedRun, "blobs", lambda _: {})
        swarm.peers.read_records = swarm.greeter.greet_all = nothing  # type: ignore[method-assign]
        await swarm.start([InvitedPeer(BEN.peer_id, (home,))])
        swarm.peers.receive_untrusted(says(BEN, evil, home, plain, hidden), BEN.peer_id)
        swarm.peers.receive_untrusted(says(CARL, evil, home, plain, hidden), None)
        assert remembered[BEN.peer_id] == ((home, plain), (home,))
        assert remembered[CARL.peer_id] == ((plain,), ()), "home is the user's word about Ben alone"
        told = {peer.peer: peer.addresses for peer in swarm.invite().peers}
        assert told[BEN.peer_id] == (home, plain) and told[CARL.peer_id] == (plain,)

    run(body, calls)

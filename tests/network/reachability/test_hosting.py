"""Publications of a peer that nobody can dial, had through its hosts: hosts, guests and readers in memory."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest
import torch
from replies import Replies
from test_puller import CARL, DORA, ME, ROUND_TOKENS, RULES, RUN, SIZE, Partner, Peer, run, until

from swarmtrain.errors import PeerError, UnreachableError
from swarmtrain.network.daemon import swarm_time
from swarmtrain.network.identity import Identity, new_identity, peer_bytes, sign
from swarmtrain.network.reachability import hosts as hosting_module
from swarmtrain.network.reachability import monitor as reaching_module
from swarmtrain.network.reachability.hosts import HostedPublications
from swarmtrain.network.reachability.monitor import ReachabilityMonitor, is_loopback_only
from swarmtrain.network.snapshots.store import SnapshotStore
from swarmtrain.protocol.gossip.partners import PublicationVersion
from swarmtrain.protocol.membership.hosts import Reach
from swarmtrain.protocol.membership.membership import Membership, PeerInfo
from swarmtrain.v1 import snapshot_pb2 as pb

ELSE = new_identity(b"e" * 32)


class GuestCalls:
    """Calls of a host, over the connection that the hidden peer has opened."""

    def __init__(self, guest: Partner) -> None:
        self.guest = guest
        self.pull_slots = asyncio.Semaphore(8)
        self.num_pulls = 0
        self.gate = asyncio.Event()
        self.gate.set()
        self.presence = pb.Signed()

    async def publication(self, peer: str, request: pb.PublicationRequest) -> pb.PublicationReply:
        assert peer == self.guest.identity.peer_id and not request.author
        self.guest.asked.append(request)
        await self.gate.wait()
        if self.guest.is_gone:
            raise UnreachableError("its connection is gone")
        held = await self.guest.held_after(request)
        return pb.PublicationReply(manifest=None if held is None else held.snapshot.signed, presence=self.presence)

    async def open_pull(self, peer: str, request: pb.PullRequest) -> Any:
        self.num_pulls += 1
        return Replies(self.guest.store.serve(request))


class Host:
    """Host, and its faults."""

    def __init__(self, identity: Identity, guest: Partner, fault: str = "") -> None:
        self.identity, self.fault = identity, fault
        self.calls, self.store = GuestCalls(guest), SnapshotStore()
        self.refused: list[tuple[str, str]] = []
        calls: Any = self.calls
        self.hosting = HostedPublications(calls, self.store, [RULES], pb.Signed, self._refuse, waits_a_caller=9)
        assert self.hosting.ask(guest.identity.peer_id)
        self.num_asked = 0

    def _refuse(self, peer: str, error: PeerError) -> None:
        self.refused.append((peer, str(error)))

    async def answer(self, request: pb.PublicationRequest) -> pb.PublicationReply:
        self.num_asked += 1
        await asyncio.sleep(0)
        if self.fault == "gone":
            raise UnreachableError("nobody")
        if self.fault == "full":
            return pb.PublicationReply(busy=True)
        if self.fault == "no host":
            return pb.PublicationReply(away=True)
        reply = await self.hosting.answer(request)
        if self.fault == "forges":
            reply.manifest.signature = bytes(64)
        if self.fault == "another's":
            other = Partner(ELSE, 0.75)
            other.publish(1, 1, 100)
            held = await other.held_after(request)
            assert held is not None
            reply.manifest.CopyFrom(held.snapshot.signed)
        return reply

    async def open_pull(self, request: pb.PullRequest) -> Any:
        if self.fault == "wrong bytes":
            return Replies(_spoiled(self.store.serve(request)))
        if self.fault == "breaks off":
            raise UnreachableError("the connection broke")
        return Replies(self.store.serve(request))


async def _spoiled(replies: Any) -> Any:
    async for reply in replies:
        if reply.data:
            reply = pb.PullReply(chunk=reply.chunk, data=bytes(len(reply.data)))
        yield reply


class ReaderCalls:
    """Calls of a reader: to the hosts, and to the hidden peer only if that one has connected to it."""

    def __init__(self, guest: Partner, *hosts: Host) -> None:
        self.guest, self.hosts = guest, {host.identity.peer_id: host for host in hosts}
        self.pull_slots = asyncio.Semaphore(8)
        self.connected = False

    async def publication(self, peer: str, request: pb.PublicationRequest) -> pb.PublicationReply:
        if peer != self.guest.identity.peer_id:
            assert request.author == peer_bytes(self.guest.identity.peer_id)
            return await self.hosts[peer].answer(request)
        assert self.connected, "a hidden peer was called in vain"
        self.guest.asked.append(request)
        held = await self.guest.held_after(request)
        return pb.PublicationReply(manifest=None if held is None else held.snapshot.signed)

    async def open_pull(self, peer: str, request: pb.PullRequest) -> Any:
        if peer in self.hosts:
            return await self.hosts[peer].open_pull(request)
        assert self.connected
        return Replies(self.guest.store.serve(request))

    async def seen_at(self, peer: str) -> tuple[str, ...]:
        return ("/ip4/10.0.0.9/tcp/5",) if self.connected and peer == self.guest.identity.peer_id else ()


def a_reader(guest: Partner, *hosts: Host) -> tuple[Peer, ReaderCalls]:
    me = Peer(guest)
    membership, now = me.membership, swarm_time()
    ids = tuple(host.identity.peer_id for host in hosts)
    info = PeerInfo(peer=guest.identity.peer_id, training=True, stamp=now + 1, hidden=True, hosts=ids)
    membership.saw_presence(info, now + 999, now)
    stand_in: Any = ReaderCalls(guest, *hosts)
    stand_in.node = stand_in
    me.gossip._puller = replace(me.puller, calls=stand_in)
    return me, stand_in


def test_it_is_merged_through_a_host_which_pulls_it_once_for_all_readers() -> None:
    async def script() -> None:
        guest = Partner(DORA, 0.5)
        guest.publish(3, 2, 400)
        host = Host(CARL, guest)
        for _ in range(3):
            me, _ = a_reader(guest, host)
            me.begin(3)
            arrival = (await me.take(1))[DORA.peer_id]
            assert arrival.tokens == 400 and torch.equal(arrival.theta, torch.full((SIZE,), 0.5))
            assert me.engine.merged_version(0, DORA.peer_id) == PublicationVersion(3, 2, 400) and me.counted == {
                DORA.peer_id: 405
            }
            await me.gossip.stop()
        assert [one.weights for one in guest.asked] in ([True, False], [False, True]) and host.calls.num_pulls == 2

    run(script)


def test_nothing_is_asked_of_a_guest_before_a_reader_asks_and_what_is_merged_is_not_sent_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hosting_module, "_ASK_AGAIN_S", 0.0)

    async def script() -> None:
        guest = Partner(DORA, 0.5)
        host = Host(CARL, guest)
        assert guest.asked == []
        request = pb.PublicationRequest(author=peer_bytes(DORA.peer_id))
        assert (await host.hosting.answer(request)).busy, "nothing is published yet"
        guest.publish(0, 1, 100)
        assert (await host.hosting.answer(request)).HasField("manifest")
        request.has_any, request.part = True, 1
        assert not (await host.hosting.answer(request)).HasField("manifest")
        assert (guest.asked[-1].has_any, guest.asked[-1].part) == (True, 1)
        names = []
        for part in (2, 3, 4):
            guest.publish(0, part, 100 * part)
            await host.hosting.answer(request)
            names.append(host.hosting._kept[DORA.peer_id, "gradient", 0].held[-1].snapshot.sha256)
        assert [host.store.get(name) is not None for name in names] == [False, True, True], "the last two stay"

    run(script)


def test_a_host_keeps_nothing_for_who_asks_for_a_section_that_the_run_does_not_have() -> None:
    async def script() -> None:
        guest = Partner(DORA, 0.5)
        host, dora = Host(CARL, guest), peer_bytes(DORA.peer_id)
        for name in ("buffers", "x" * 33):
            reply = await host.hosting.answer(pb.PublicationRequest(author=dora, section=name), ME.peer_id)
            assert reply == pb.PublicationReply(away=True)
        assert [peer for peer, _ in host.refused] == [ME.peer_id, ME.peer_id]
        assert guest.asked == [] and not host.hosting._kept

    run(script)


@pytest.mark.parametrize("fault", ["gone", "full", "no host", "forges", "another's", "wrong bytes", "breaks off"])
def test_a_host_that_fails_or_lies_costs_the_author_nothing(fault: str) -> None:
    async def script() -> None:
        guest = Partner(DORA, 0.5)
        guest.publish(0, 1, 100)
        bad, good = Host(CARL, guest, fault), Host(ELSE, guest)
        me, _ = a_reader(guest, bad, good)
        me.engine._others.hosts.back_off.failed(ELSE.peer_id, swarm_time(), "the bad one is to be asked first")
        me.begin(0)
        assert (await me.take(1))[DORA.peer_id].tokens == 100
        assert bad.num_asked >= 1
        lies = fault in ("forges", "another's", "wrong bytes")
        assert {peer for peer, _ in me.refused} == ({CARL.peer_id} if lies else set())
        await me.gossip.stop()

    run(script)


def test_what_this_peer_fails_to_decode_is_no_fault_of_a_host_and_not_asked_of_the_next() -> None:
    async def script() -> None:
        guest = Partner(DORA, 0.5)
        guest.publish(0, 1, 100)
        hosts = Host(CARL, guest), Host(ELSE, guest)
        me, _ = a_reader(guest, *hosts)

        def fail(command: Any) -> Any:
            raise RuntimeError("no memory")

        me.decode_untrusted = fail  # type: ignore[method-assign]
        me.begin(0)
        await until(lambda: sum(host.num_asked for host in hosts) >= 2)
        await until(lambda: not me.num_open())
        assert sum(host.num_asked for host in hosts) == 2, "for its weights and for its gradient"
        assert not any(me.engine._others.hosts.back_off.has_banned(host.identity.peer_id) for host in hosts)
        assert me.engine.is_left_alone(DORA.peer_id) and me.refused == []
        await me.gossip.stop()

    run(script)


def test_with_no_host_that_answers_the_author_is_asked_for_again_soon() -> None:
    async def script() -> None:
        guest = Partner(DORA, 0.5)
        guest.publish(0, 1, 100)
        host = Host(CARL, guest, "gone")
        me, _ = a_reader(guest, host)
        me.begin(0)
        await until(lambda: host.num_asked)
        await until(lambda: not me.num_open())
        ban = me.engine._others.back_off._bans[DORA.peer_id]
        assert ban.failures == 0 and ban.until_s < swarm_time() + 2 and me.refused == []
        await me.gossip.stop()

    run(script)


def test_with_a_connection_it_is_asked_itself() -> None:
    async def script() -> None:
        guest = Partner(DORA, 0.5)
        guest.publish(0, 1, 100)
        host = Host(CARL, guest)
        me, calls = a_reader(guest, host)
        calls.connected = True
        me.begin(0)
        await me.take(1)
        assert host.num_asked == 0 and len(guest.asked) == 2, "for its weights and for its gradient"
        await me.gossip.stop()

    run(script)


def test_a_host_with_an_old_publication_does_not_make_a_liar_of_its_author() -> None:
    async def script() -> None:
        guest = Partner(DORA, 0.5)
        guest.publish(1, 1, 100)
        host = Host(CARL, guest)
        await host.hosting.answer(pb.PublicationRequest(author=peer_bytes(DORA.peer_id)))
        me, calls = a_reader(guest, host)
        calls.connected = True
        guest.publish(9, 1, 100)
        me.begin(9)
        await me.take(1)
        calls.connected, guest.is_gone = False, True
        asked = host.num_asked
        me.begin(10)
        await until(lambda: host.num_asked > asked and not me.num_open())
        assert me.refused == []
        await me.gossip.stop()

    run(script)


# ---------------------------------------------------------------- a host and those who would abuse it


def test_a_stranger_is_not_served_and_a_guest_that_left_no_more() -> None:
    async def script() -> None:
        guest = Partner(DORA, 0.5)
        guest.publish(0, 1, 100)
        host = Host(CARL, guest)
        for author in (peer_bytes(ME.peer_id), b"", b"nonsense"):
            assert (await host.hosting.answer(pb.PublicationRequest(author=author))).away
        request = pb.PublicationRequest(author=peer_bytes(DORA.peer_id))
        held = (await host.hosting.answer(request)).manifest
        assert held.payload and host.hosting._kept
        host.hosting.left(DORA.peer_id)
        assert (await host.hosting.answer(request)).away and not host.hosting._kept

    run(script)


def test_what_is_pulled_of_a_guest_that_leaves_and_returns_meanwhile_is_not_kept() -> None:
    async def script() -> None:
        guest = Partner(DORA, 0.5)
        guest.publish(2**40 - 1, 1, 100)
        host = Host(CARL, guest)
        hosting, request = host.hosting, pb.PublicationRequest(author=peer_bytes(DORA.peer_id))
        for _ in range(3):
            host.calls.gate.clear()
            asking = asyncio.create_task(hosting.answer(request))
            await until(lambda: hosting._kept)
            await until(lambda: guest.asked)
            guest.asked.clear()
            downloading = hosting._kept[DORA.peer_id, "gradient", 0].downloading
            assert downloading is not None
            hosting.left(DORA.peer_id)
            assert hosting.ask(DORA.peer_id)
            host.calls.gate.set()
            assert (await asking).busy
            await asyncio.wait([downloading])
            assert not hosting._kept and not host.store._held
        assert (await hosting.answer(request)).HasField("manifest")

    run(script)


def test_what_somebody_waits_to_read_of_a_guest_that_leaves_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosting_module, "_ASK_AGAIN_S", 0.0)

    async def script() -> None:
        guest = Partner(DORA, 0.5)
        guest.publish(0, 1, 100)
        host = Host(CARL, guest)
        request = pb.PublicationRequest(author=peer_bytes(DORA.peer_id))
        assert (await host.hosting.answer(request)).HasField("manifest")
        host.calls.gate.clear()
        asking = asyncio.create_task(host.hosting.answer(request))
        await until(lambda: len(guest.asked) == 2)
        host.hosting.left(DORA.peer_id)
        host.calls.gate.set()
        assert (await asking).busy and not host.store._held

    run(script)


def test_a_flood_of_requests_asks_the_guest_once(monkeypatch: pytest.MonkeyPatch) -> None:
    async def script() -> None:
        guest = Partner(DORA, 0.5)
        guest.publish(0, 1, 100)
        host = Host(CARL, guest)
        host.calls.gate.clear()
        request = pb.PublicationRequest(author=peer_bytes(DORA.peer_id))
        asking = [asyncio.create_task(host.hosting.answer(request)) for _ in range(100)]
        await until(lambda: sum(task.done() for task in asking) == 64)
        assert all(task.result().busy for task in asking if task.done()), "so many wait, and no more"
        host.calls.gate.set()
        replies = await asyncio.gather(*asking)
        assert sum(reply.HasField("manifest") for reply in replies) == 36
        for _ in range(100):
            await host.hosting.answer(request)
        assert len(guest.asked) == 1 and host.calls.num_pulls == 1

    run(script)


def test_a_guest_that_stalls_keeps_nobody_waiting_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosting_module, "_WAIT_S", 0.01)
    monkeypatch.setattr(hosting_module, "_ASK_AGAIN_S", 0.0)

    async def script() -> None:
        guest = Partner(DORA, 0.5)
        guest.publish(0, 1, 100)
        host = Host(CARL, guest)
        request = pb.PublicationRequest(author=peer_bytes(DORA.peer_id))
        host.calls.gate.clear()
        assert (await host.hosting.answer(request)).busy
        host.calls.gate.set()
        await until(lambda: host.hosting._kept[DORA.peer_id, "gradient", 0].held)
        guest.publish(0, 2, 200)
        host.calls.gate.clear()
        assert (await host.hosting.answer(request)).HasField("manifest"), "the older one, while the newer is coming"
        await host.hosting.stop()

    run(script)


@pytest.mark.parametrize("fault", ["too many tokens", "another author", "gone"])
def test_what_is_wrong_with_a_guest_is_named_and_not_served(fault: str) -> None:
    async def script() -> None:
        guest = Partner(DORA, 0.5)
        guest.publish(0, 1, ROUND_TOKENS + 10 if fault == "too many tokens" else 100)
        guest.is_gone = fault == "gone"
        host = Host(CARL, guest)
        if fault == "another author":
            guest.publishers["gradient"].identity = ELSE
        reply = await host.hosting.answer(pb.PublicationRequest(author=peer_bytes(DORA.peer_id)))
        assert reply.busy and not reply.HasField("manifest")
        assert [peer for peer, _ in host.refused] == ([] if fault == "gone" else [DORA.peer_id])
        assert not host.store._held

    run(script)


@pytest.mark.parametrize("fault", ["", "forged", "another's", "long", "no presence"])
def test_what_a_guest_says_of_itself_is_read_before_it_is_told_on(fault: str) -> None:
    def say(presence: pb.Presence) -> pb.Signed:
        return sign(CARL if fault == "another's" else DORA, "presence", RUN, presence)

    said = say(pb.Presence(name="x" * 4096 if fault == "long" else "Dora"))
    if fault == "forged":
        said.signature = bytes(64)
    elif fault == "no presence":
        said = sign(DORA, "manifest", RUN, pb.Presence(name="Dora"))

    async def script() -> None:
        guest = Partner(DORA, 0.5)
        guest.publish(0, 1, 100)
        host = Host(CARL, guest)
        padding = b"\xfa\x3f\x88\x27" + bytes(5000)  # a field that nobody knows
        host.calls.presence = pb.Signed.FromString(said.SerializeToString() + padding)
        reply = await host.hosting.answer(pb.PublicationRequest(author=peer_bytes(DORA.peer_id)))
        assert [peer for peer, _ in host.refused] == ([DORA.peer_id] if fault else [])
        assert reply.presence == (pb.Signed() if fault else said) and reply.ByteSize() < 5000
        assert reply.HasField("manifest") != bool(fault)

    run(script)


def test_one_that_asks_for_a_guest_that_stalls_leaves_places_for_others() -> None:
    async def script() -> None:
        guest = Partner(DORA, 0.5)
        guest.publish(0, 1, 100)
        host = Host(CARL, guest)
        host.calls.gate.clear()
        request = pb.PublicationRequest(author=peer_bytes(DORA.peer_id))
        flood = [asyncio.create_task(host.hosting.answer(request, "mallory")) for _ in range(100)]
        await until(lambda: sum(task.done() for task in flood) == 91)
        anna = asyncio.create_task(host.hosting.answer(request, "anna"))
        await asyncio.sleep(0.01)
        assert not anna.done()
        host.calls.gate.set()
        assert (await anna).HasField("manifest")
        await asyncio.gather(*flood)
        assert not host.hosting._waiting

    run(script)


# ---------------------------------------------------------------- the hidden peer itself


class Around:
    """Other peers: which of them reach the peer, and which are hosts."""

    def __init__(self) -> None:
        self.now = 100.0
        self.outcome = pb.DialReply.OUTCOME_NOT_REACHED
        self.gone: set[str] = set()
        self.full: set[str] = set()
        self.node = self
        self.outside: set[str] = set()
        self.neighbours: set[str] = set()
        self.ports: list[list[int]] = []

    async def dial(self, peer: str, request: pb.DialRequest, limit_s: float) -> pb.DialReply:
        self.ports.append(list(request.own_ports))
        if peer in self.gone:
            raise UnreachableError("nobody")
        reached = pb.DialReply.OUTCOME_REACHED if peer in self.neighbours else self.outcome
        return pb.DialReply(outcome=reached)

    async def seen_at(self, peer: str) -> tuple[str, ...]:
        return (f"/ip4/{'8.8.8.8' if peer in self.outside else '10.0.0.1'}/tcp/5",)

    async def hello(self, peer: str, request: pb.HelloRequest, limit_s: float) -> pb.HelloReply:
        assert request.wants_host
        if peer in self.gone:
            raise UnreachableError("nobody")
        return pb.HelloReply(hosting=peer not in self.full)


def test_who_cannot_be_dialled_finds_hosts_replaces_them_and_needs_none_when_it_can(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    around, changes = Around(), list[tuple[bool, tuple[str, ...]]]()
    monkeypatch.setattr(reaching_module, "swarm_time", lambda: around.now)
    membership = Membership("me")
    for name in ("a", "b", "c"):
        membership.saw_presence(
            PeerInfo(peer=name, name=f"Peer {name}", stamp=1.0, addresses=("/ip4/10.0.0.1/tcp/1",)), 1e9, 1.0
        )
    membership.saw_presence(PeerInfo(peer="h", stamp=1.0, hidden=True, hosts=("a",)), 1e9, 1.0)
    around.full = {"c"}
    calls: Any = around

    async def script() -> None:
        addresses = ["/ip4/10.0.0.7/tcp/31337", "/ip6/::1/tcp/31337", "/ip4/10.0.0.7/tcp/31338"]
        reaching = ReachabilityMonitor(
            calls,
            membership,
            lambda: pb.HelloRequest(wants_host=True),
            lambda: addresses,
            lambda: changes.append((reaching.hidden, reaching.hosts)),
        )

        async def pass_s(seconds: float) -> None:
            for _ in range(int(seconds)):
                around.now += 1.0
                await reaching.look()
                for _ in range(5):
                    await asyncio.sleep(0)

        assert reaching.in_words() == ""
        await pass_s(8)
        assert around.ports == [[31337, 31338]] * 3, "each of those that can be dialled was asked"
        assert reaching.reachability.state is Reach.HIDDEN and set(reaching.hosts) == {"a", "b"}
        assert changes[-1] == (True, reaching.hosts) and len(changes) <= 3
        names = " and ".join(f"Peer {host}" for host in reaching.hosts)
        assert reaching.in_words() == f"nobody can dial this computer; its work goes through {names}"
        around.outside, around.neighbours = {"b", "c"}, {"a"}
        await pass_s(250)
        assert reaching.hidden, "the neighbour reaches it, and nobody outside does"
        around.now += 1000.0
        hosts = set(reaching.hosts)
        await pass_s(3)
        assert set(reaching.hosts) == hosts, "this machine slept, its hosts did not go"
        around.gone, around.full = {"a"}, set()
        await pass_s(130)
        assert set(reaching.hosts) == {"b", "c"} and changes[-1] == (True, reaching.hosts)
        around.outcome = pb.DialReply.OUTCOME_REACHED
        await pass_s(250)
        assert changes[-1] == (False, ()) and reaching.in_words() == "" and reaching.choice.chosen == ()

    run(script)


def test_who_listens_for_its_own_machine_only_needs_nobody() -> None:
    assert is_loopback_only(["/ip4/127.0.0.1/tcp/5", "/ip6/::1/tcp/6"])
    assert not is_loopback_only(["/ip4/127.0.0.1/tcp/5", "/ip4/10.0.0.1/tcp/5"])

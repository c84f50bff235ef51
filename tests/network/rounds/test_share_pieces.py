"""Shares by bandwidth over the network's code: pieces, what an owner may not send, and an owner that sends nothing."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from codes import raises_code
from virtual_loop import virtual_swarm

from swarmtrain.errors import BadBytesError, PeerError, UnreachableError
from swarmtrain.network.codec import average_bytes_untrusted
from swarmtrain.network.identity import Identity, new_identity
from swarmtrain.network.rounds.answers import RoundAnswers
from swarmtrain.network.rounds.chains import ChainStore
from swarmtrain.network.rounds.downloads import Downloads
from swarmtrain.network.rounds.merger import Merger, RoundSettings, ShareOwners, UnobtainableError
from swarmtrain.network.rounds.roster import publication_of, roster_untrusted, sign_roster
from swarmtrain.network.snapshots.store import (
    Body,
    HeldSnapshot,
    PullLimits,
    SnapshotStore,
    TensorSpec,
    build_snapshot,
    empty_held,
)
from swarmtrain.protocol.membership.membership import Membership, PeerInfo
from swarmtrain.protocol.rounds import messages as ev
from swarmtrain.protocol.rounds.link_claims import AveragingTimes, LinkClaims
from swarmtrain.protocol.rounds.roles import LinkRates
from swarmtrain.protocol.rounds.rosters import Roster, RoundPublication
from swarmtrain.protocol.rounds.share_waits import merge_limit_s
from swarmtrain.run import CHUNK_BYTES
from swarmtrain.v1 import snapshot_pb2 as pb

RUN, NUM_CHUNKS = "ab" * 32, 40
SPECS = (TensorSpec("weight", (NUM_CHUNKS * CHUNK_BYTES // 4 - 100,)),)
SETTINGS = RoundSettings(
    run_sha256=RUN,
    specs=SPECS,
    state_specs=SPECS,
    max_tokens=100,
    share_above=2,
    round_limit_s=600.0,
    silence_s=5.0,
    pull=PullLimits(),
)
PEERS = sorted((new_identity(bytes([i]) * 32) for i in range(4)), key=lambda identity: identity.peer_id)
SHARES = (0, 7, 33, 0)
MBIT = 125_000.0
TIMES = AveragingTimes(4.0, (4.0,) * 4)


@pytest.fixture(autouse=True)
def computed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check and average in no virtual time: a thread takes real time, in which the virtual clock runs on."""

    async def at_once(work: Any, *args: Any) -> Any:
        return work(*args)

    monkeypatch.setattr(asyncio, "to_thread", at_once)


class Stream:
    """Replies of a peer's store, as a pull's stream."""

    def __init__(self, replies: Any, passes: Callable[[bytes], bytes]) -> None:
        self._replies, self._passes = replies, passes

    async def __anext__(self) -> Any:
        return await anext(self._replies)

    async def take(self, chunks: range, room_of: Callable[[int], memoryview], came: Callable[[int], None]) -> None:
        for chunk in chunks:
            reply = await anext(self._replies)
            room_of(chunk)[:] = self._passes(b"".join(bytes(view) for view in reply.views))
            came(chunk)

    async def count(self, size_bytes: int) -> None:
        await asyncio.sleep(size_bytes / 10e6)

    async def aclose(self) -> None:
        await self._replies.aclose()


@dataclass
class Peer:
    """Peer that merges a roster, and serves the others."""

    identity: Identity
    swarm: dict[str, Peer]
    store: SnapshotStore = field(default_factory=lambda: SnapshotStore(max_readers=32))
    answers: RoundAnswers = field(default_factory=lambda: RoundAnswers(ChainStore()))
    pieces: int = 0
    judged: list[tuple[str, bool]] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    pull_slots: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(8))
    change: Callable[[pb.RoundReply], None] = lambda reply: None
    serves_shares: bool = True
    opens: Callable[[str, str, Any], Any] = lambda reader, sha256, stream: stream
    """Stream in place of the honest one, for a reader of a snapshot."""
    times: AveragingTimes = TIMES
    limit_s: float = 60.0
    ended_s: float = 0.0
    mean: bytearray = field(default_factory=bytearray)
    reckoned: int = 0

    def expects(self, roster: Roster) -> AveragingTimes:
        self.reckoned += 1
        return self.times

    async def round(self, peer: str, request: pb.RoundRequest) -> pb.RoundReply:
        other = self.swarm[peer]
        await asyncio.sleep(0.05)
        for _ in range(10):
            if other.pieces > request.share_piece:
                break
            await asyncio.sleep(0.1)
        question = ev.RoundQuestion(round=0, has_share=False, share_piece=request.share_piece)
        told = "x" if other.pieces > request.share_piece and other.serves_shares else ""
        answer: ev.AnswerRoundQuestion[pb.Signed] = ev.AnswerRoundQuestion(
            1, question, 0, True, False, None, None, None, told
        )
        reply = other.answers.reply(answer, request, 0)
        other.change(reply)
        return reply

    async def open_pull(self, peer: str, request: pb.PullRequest) -> Any:
        stream = Stream(self.swarm[peer].store.serve(request, peer=self.identity.peer_id), bytes)
        return self.swarm[peer].opens(self.identity.peer_id, request.snapshot_sha256.hex(), stream)

    def merger(self) -> Merger:
        me = self.identity.peer_id
        membership = Membership(me)
        for other in PEERS:
            membership.saw_presence(PeerInfo(peer=other.peer_id, training=True), 1e12, 0.0)

        def refuse(peer: str, error: PeerError) -> None:
            self.refused.append(str(error))

        calls: Any = self
        downloads = Downloads(me, calls, self.store, SETTINGS.pull, refuse)
        owners = ShareOwners(
            last_known=lambda owner: b"",
            averaging_times=self.expects,
            limit_s=lambda peers, shares: self.limit_s,
            judged=lambda owner, in_time: self.judged.append((owner, in_time)),
        )
        return Merger(self.identity, downloads, membership, SETTINGS, average_bytes_untrusted, owners)

    async def merge(self, roster: Roster, publications: list[HeldSnapshot]) -> bytearray:
        me, merger = self.identity.peer_id, self.merger()
        held = {
            each.snapshot.author: each if each.snapshot.author == me else empty_held(each.snapshot)
            for each in publications
        }

        def ready(pieces: Any) -> None:
            self.answers.shared(0, pieces)
            self.pieces = len(pieces)

        try:
            self.mean = await merger.merge(roster, "cd" * 32, held, ready)
        finally:
            self.ended_s = asyncio.get_running_loop().time()
        return self.mean


def published(bad: int | None = None) -> tuple[list[HeldSnapshot], torch.Tensor]:
    """Return a publication of each peer, and their mean weighted by tokens. In chunk `bad` the last one has a number
    that is not finite."""
    torch.manual_seed(0)
    made, vectors = [], []
    for number, identity in enumerate(PEERS):
        vectors.append(torch.randn(SPECS[0].shape))
        if bad is not None and identity is PEERS[-1]:
            vectors[-1][bad * CHUNK_BYTES // 4 + 77] = torch.nan
        manifest = pb.Manifest(
            run_sha256=bytes.fromhex(RUN), kind=pb.SNAPSHOT_KIND_PSEUDO_GRADIENT, tokens=10 + number, inner_steps=1
        )
        body = Body([memoryview(vectors[-1].numpy()).cast("B")])
        made.append(build_snapshot(identity, manifest, SPECS, body))
    weights = [10.0 + number for number in range(len(PEERS))]
    mean = torch.stack(vectors).mul(torch.tensor(weights)[:, None]).sum(0) / sum(weights)
    if bad is not None:
        part = slice(bad * CHUNK_BYTES // 4, (bad + 1) * CHUNK_BYTES // 4)
        mean[part] = sum(w * vector[part] for w, vector in zip(weights[:-1], vectors, strict=False)) / sum(weights[:-1])
    return made, mean


def merged(
    shares: tuple[int, ...],
    prepare: Callable[[dict[str, Peer]], None] = lambda swarm: None,
    bad: int | None = None,
    equal: Identity | None = None,
) -> dict[str, Peer]:
    """Let all peers merge one roster, and check each one's mean. Peer `equal` takes the shares for equal ones."""
    publications, mean = published(bad)
    entries = tuple(publication_of(each.snapshot) for each in publications)
    roster = Roster(round=0, signer=PEERS[0].peer_id, entries=entries, shares=shares)
    swarm: dict[str, Peer] = {}

    async def run() -> list[bytearray]:
        for identity, publication in zip(PEERS, publications, strict=True):
            swarm[identity.peer_id] = Peer(identity, swarm)
            swarm[identity.peer_id].store.add(publication)
        prepare(swarm)
        merges = []
        for peer in swarm.values():
            its = dataclasses.replace(roster, shares=()) if peer.identity is equal else roster
            merges.append(peer.merge(its, publications))
        return await asyncio.gather(*merges)

    for found in virtual_swarm(run):
        assert torch.allclose(torch.frombuffer(found, dtype=torch.float32), mean, atol=1e-5)
    return swarm


def test_everyone_gets_the_mean_from_those_who_average_it() -> None:
    swarm = merged(SHARES)
    first, small, large, last = (swarm[identity.peer_id] for identity in PEERS)
    assert (first.pieces, small.pieces, large.pieces, last.pieces) == (0, 7, 16, 0)
    assert sorted(last.judged) == sorted([(small.identity.peer_id, True), (large.identity.peer_id, True)])
    assert not any(peer.refused for peer in swarm.values())
    assert [peer.reckoned for peer in swarm.values()] == [1] * 4, "not at every look"


def test_what_is_not_finite_is_left_out_of_its_chunk_whoever_averages_it() -> None:
    swarms = [merged(shares, bad=19) for shares in ((), SHARES, (20, 20, 0, 0))]
    assert len({bytes(peer.mean) for swarm in swarms for peer in swarm.values()}) == 1
    assert all(any("not finite" in error for peer in swarm.values() for error in peer.refused) for swarm in swarms)


def test_equal_shares_are_one_piece_each_as_before() -> None:
    assert [peer.pieces for peer in merged(()).values()] == [1, 1, 1, 1]


def test_who_merges_with_other_shares_of_the_same_publications_is_not_blamed() -> None:
    """Two signers may have listed the same, and one of them told no shares, or some that this peer takes for none."""
    swarm = merged(SHARES, equal=PEERS[0])
    assert not any(peer.refused for peer in swarm.values())


def test_a_share_that_nobody_sends_is_averaged_by_whoever_misses_it() -> None:
    owner = PEERS[2].peer_id

    def is_silent(swarm: dict[str, Peer]) -> None:
        swarm[owner].serves_shares = False

    swarm = merged(SHARES, is_silent)
    assert (owner, False) in swarm[PEERS[0].peer_id].judged
    assert not any(peer.refused for peer in swarm.values()), "it may have been slow"


def test_a_piece_of_another_place_is_not_taken() -> None:
    owner = PEERS[2].peer_id

    def sends_each_twice(swarm: dict[str, Peer]) -> None:
        def change(reply: pb.RoundReply) -> None:
            if reply.HasField("share"):
                del reply.more_shares[:]
                reply.more_shares.add().CopyFrom(reply.share)

        swarm[owner].change = change

    swarm = merged(SHARES, sends_each_twice)
    assert any("another peer, round or index" in one or "shape" in one for one in swarm[PEERS[0].peer_id].refused)
    assert (owner, False) in swarm[PEERS[0].peer_id].judged


@pytest.fixture(scope="module")
def entries() -> tuple[RoundPublication, ...]:
    publications, _ = published()
    return tuple(publication_of(each.snapshot) for each in publications)


@pytest.mark.parametrize("shares", [(40,), (0, 7, 33, 1), (1, 1, 1, 1), (0, 0, 0, 0), (0, 7, 33)])
def test_a_roster_whose_shares_are_not_the_mean_is_refused(
    shares: tuple[int, ...], entries: tuple[RoundPublication, ...]
) -> None:
    roster = Roster(round=0, signer=PEERS[0].peer_id, entries=entries, shares=shares)
    signed = sign_roster(PEERS[0], RUN, roster)
    with raises_code("bad-size", BadBytesError):
        roster_untrusted(signed, RUN, 100, NUM_CHUNKS)
    good = dataclasses.replace(roster, shares=SHARES)
    assert roster_untrusted(sign_roster(PEERS[0], RUN, good), RUN, 100, NUM_CHUNKS) == good
    assert good.digest == roster.digest, "shares change nothing about the weights"


# ---------------------------------------------------------------- hostile authors


@dataclass
class Miser:
    """Author that says BUSY to each reader for `busy_s` seconds and then sends one chunk, again and again."""

    busy_s: float
    but: str = ""
    """Snapshot that it sends as it should."""
    readers: dict[str, float] = field(default_factory=dict)
    """Time at which each reader may have its next chunk."""

    def __call__(self, reader: str, sha256: str, stream: Stream) -> Any:
        if sha256 == self.but:
            return stream
        now = asyncio.get_running_loop().time()
        if now < self.readers.setdefault(reader, now + self.busy_s):
            return Busy()
        self.readers[reader] = now + self.busy_s
        return OneChunk(stream)


@dataclass
class OneChunk:
    """Stream that breaks off after its first chunk."""

    stream: Stream
    is_over: bool = False

    async def __anext__(self) -> Any:
        return await self.stream.__anext__()

    async def take(self, chunks: range, room_of: Callable[[int], memoryview], came: Callable[[int], None]) -> None:
        if self.is_over:
            raise ConnectionError
        self.is_over = True
        await self.stream.take(chunks[:1], room_of, came)

    async def count(self, size_bytes: int) -> None: ...

    async def aclose(self) -> None:
        await self.stream.aclose()


class Busy:
    """Stream of a peer that says that it has no place."""

    async def __anext__(self) -> pb.PullReply:
        return pb.PullReply(status=pb.PullReply.STATUS_BUSY)

    async def aclose(self) -> None: ...


def not_merged(prepare: Callable[[dict[str, Peer]], None]) -> dict[str, Peer]:
    """Let all peers merge a roster whose last author delivers nothing in time; return them."""
    publications, _ = published()
    entries = tuple(publication_of(each.snapshot) for each in publications)
    roster = Roster(round=0, signer=PEERS[0].peer_id, entries=entries, shares=SHARES)
    swarm: dict[str, Peer] = {}

    async def run() -> list[BaseException | bytearray]:
        for identity, publication in zip(PEERS, publications, strict=True):
            swarm[identity.peer_id] = Peer(identity, swarm)
            swarm[identity.peer_id].store.add(publication)
        prepare(swarm)
        merges = (peer.merge(roster, publications) for peer in swarm.values())
        return await asyncio.gather(*merges, return_exceptions=True)

    for peer, found in zip(PEERS[:3], virtual_swarm(run), strict=False):
        assert isinstance(found, UnobtainableError) and found.peers == {PEERS[3].peer_id}, (peer.peer_id, found)
    return swarm


def test_an_author_that_sends_a_chunk_now_and_then_holds_a_merge_up_for_its_limit() -> None:
    def prepare(swarm: dict[str, Peer]) -> None:
        swarm[PEERS[3].peer_id].opens = Miser(busy_s=29.0)

    swarm = not_merged(prepare)
    small, large = swarm[PEERS[1].peer_id], swarm[PEERS[2].peer_id]
    assert 60.0 <= small.ended_s < 63.0 and 60.0 <= large.ended_s < 63.0
    assert swarm[PEERS[0].peer_id].ended_s < 2 * 60.0 + 3.0, "an owner's time, and the authors'"


def test_an_author_that_tells_of_a_slow_link_and_sends_nothing_is_not_waited_for_as_long_as_a_round_may_last() -> None:
    def prepare(swarm: dict[str, Peer]) -> None:
        def nothing(reader: str, sha256: str, stream: Stream) -> Any:
            raise UnreachableError("no answer within 6 s")

        swarm[PEERS[3].peer_id].opens = nothing
        for peer in swarm.values():
            peer.times, peer.limit_s = AveragingTimes(600.0, (4.0, 4.0, 4.0, 600.0)), 600.0

    swarm = not_merged(prepare)
    assert 150.0 <= swarm[PEERS[2].peer_id].ended_s < 153.0, "a quarter of the time in which its bytes should come"


def test_authors_have_one_time_for_all_pieces_of_a_share_that_did_not_come() -> None:
    """An owner that sends no piece, and an author that lets each chunk come just before it would be given up."""

    def prepare(swarm: dict[str, Peer]) -> None:
        swarm[PEERS[2].peer_id].serves_shares = False
        swarm[PEERS[3].peer_id].opens = Miser(busy_s=20.0)

    swarm = not_merged(prepare)
    assert swarm[PEERS[0].peer_id].ended_s < 2 * 60.0 + 3.0


def test_an_owner_that_sends_its_share_by_drops_is_given_up() -> None:
    owner, publications = PEERS[2].peer_id, published()[0]

    def prepare(swarm: dict[str, Peer]) -> None:
        swarm[owner].opens = Miser(busy_s=20.0, but=publications[2].snapshot.sha256)

    swarm = merged((), prepare)
    assert (owner, False) in swarm[PEERS[0].peer_id].judged
    assert swarm[PEERS[0].peer_id].ended_s < 60.0 + 5.0, "it averages that share itself"


def test_in_a_small_group_an_author_has_the_same_limit() -> None:
    (publication, *_), swarm = published()[0], dict[str, Peer]()
    author, reader = (swarm.setdefault(one.peer_id, Peer(one, swarm)) for one in (PEERS[0], PEERS[1]))
    assert publication.snapshot.author == author.identity.peer_id
    author.opens = Miser(busy_s=29.0)

    async def run() -> float:
        author.store.add(publication)
        with pytest.raises(UnreachableError):
            await reader.merger().pull_whole(empty_held(publication.snapshot), [author.identity.peer_id])
        return asyncio.get_running_loop().time()

    assert 60.0 <= virtual_swarm(run) < 61.5


@dataclass
class Uplink:
    """Link of one peer: what it sends passes one after the other, in the order of asking."""

    bytes_per_s: float
    free_s: float = 0.0

    def __call__(self, reader: str, sha256: str, stream: Stream) -> Any:
        return ThrottledStream(stream, self)

    async def passes(self, size_bytes: int) -> None:
        now = asyncio.get_running_loop().time()
        self.free_s = max(now, self.free_s) + size_bytes / self.bytes_per_s
        await asyncio.sleep(self.free_s - now)


@dataclass
class ThrottledStream:
    """Stream that passes its author's link."""

    stream: Stream
    link: Uplink

    async def __anext__(self) -> Any:
        return await self.stream.__anext__()

    async def take(self, chunks: range, room_of: Callable[[int], memoryview], came: Callable[[int], None]) -> None:
        await self.link.passes(CHUNK_BYTES)
        await self.stream.take(chunks[:1], room_of, came)

    async def count(self, size_bytes: int) -> None: ...

    async def aclose(self) -> None:
        await self.stream.aclose()


@pytest.mark.parametrize("slow_mbit", [10.0, 1.0])
@pytest.mark.parametrize("owner_fails", [False, True])
def test_an_honest_author_behind_a_slow_link_is_merged(slow_mbit: float, owner_fails: bool) -> None:
    """Links of 200 Mbit/s and one of 10 or 1, 10 MB: with the product's own limit nobody is cut, also where an owner
    fails and everyone needs its share from the slow link too."""
    rates = [200.0, 200.0, 200.0, slow_mbit]

    def prepare(swarm: dict[str, Peer]) -> None:
        claims = LinkClaims(Membership("nobody"))
        for identity, rate in zip(PEERS, rates, strict=True):
            link = LinkRates(rate * MBIT, rate * MBIT)
            claims.membership.saw_presence(PeerInfo(peer=identity.peer_id, training=True, link=link), 1e12, 0.0)
            swarm[identity.peer_id].opens = Uplink(rate * MBIT)
        peers, size_bytes = [identity.peer_id for identity in PEERS], NUM_CHUNKS * CHUNK_BYTES
        for peer in swarm.values():
            times = claims.averaging_times(peers, SHARES, size_bytes, SETTINGS.round_limit_s)
            assert times is not None
            peer.times = times
            expected_s = claims.merging_s(peers, SHARES, size_bytes)
            peer.limit_s = merge_limit_s(expected_s, SETTINGS.silence_s, SETTINGS.round_limit_s)
        swarm[PEERS[2].peer_id].serves_shares = not owner_fails

    swarm = merged(SHARES, prepare)
    carried_s = NUM_CHUNKS * CHUNK_BYTES / (slow_mbit * MBIT)
    assert max(peer.ended_s for peer in swarm.values()) > carried_s * (NUM_CHUNKS - 1) / NUM_CHUNKS
    assert not any(peer.refused for peer in swarm.values())

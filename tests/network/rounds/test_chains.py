"""Chains of rosters between peers: shown, checked, and what moves a peer to another one's state."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from codes import raises_code
from virtual_loop import virtual_swarm

from swarmtrain.errors import BadBytesError, PeerError, UnreachableError
from swarmtrain.network.codec import average_bytes_untrusted
from swarmtrain.network.daemon import swarm_time
from swarmtrain.network.identity import Identity, new_identity, peer_bytes, sign
from swarmtrain.network.refusals import rule_of
from swarmtrain.network.rounds import chains, merger
from swarmtrain.network.rounds.chains import ChainStore, chain_untrusted
from swarmtrain.network.rounds.downloads import Downloads
from swarmtrain.network.rounds.merger import RoundSettings
from swarmtrain.network.rounds.roster import publication_of, roster_untrusted, sign_roster
from swarmtrain.network.rounds.round_end import Outcome, RosterMean
from swarmtrain.network.rounds.runner import RoundRunner
from swarmtrain.network.rounds.state_fetch import NewState
from swarmtrain.network.snapshots.store import Body, HeldSnapshot, PullLimits, SnapshotStore, TensorSpec, build_snapshot
from swarmtrain.protocol.membership.membership import Membership, PeerInfo
from swarmtrain.protocol.rounds import messages as ev
from swarmtrain.protocol.rounds.chains import Chain
from swarmtrain.protocol.rounds.rosters import Roster
from swarmtrain.protocol.tokens.progress import Progress
from swarmtrain.v1 import snapshot_pb2 as pb

RUN = "ab" * 32
SPECS = (TensorSpec("w", (64,)),)
SETTINGS = RoundSettings(
    run_sha256=RUN,
    specs=SPECS,
    state_specs=SPECS,
    max_tokens=100,
    share_above=5,
    round_limit_s=30.0,
    silence_s=0.3,
    pull=PullLimits(stall_limit_s=0.2),
)
A, B, C, D, LIAR = sorted(
    (new_identity(bytes([i]) * 32) for i in range(5)), key=lambda identity: identity.peer_id, reverse=True
)
HONEST = (A, B, C, D)
PUBLISHED: dict[str, HeldSnapshot] = {}
"""Publications by author. The liar's PeerID is the lowest, so that order alone would favour it."""


def publication(author: Identity, before: Roster | None, tokens: int = 10) -> HeldSnapshot:
    manifest = pb.Manifest(
        run_sha256=bytes.fromhex(RUN),
        kind=pb.SNAPSHOT_KIND_PSEUDO_GRADIENT,
        round=0 if before is None else before.round + 1,
        part=1,
        tokens=tokens,
        inner_steps=1,
        roster_sha256=b"" if before is None else bytes.fromhex(before.digest),
    )
    held = build_snapshot(author, manifest, SPECS, Body([bytes(SPECS[0].size_bytes)]))
    PUBLISHED[held.snapshot.sha256] = held
    return held


def go_on(
    store: ChainStore, authors: Sequence[Identity], tokens: int = 10, base_tokens: int | None = None
) -> tuple[Roster, pb.Signed]:
    """Play a round of these peers; the first one signs."""
    before = store.chain.head
    published = sorted((publication(author, before, tokens) for author in authors), key=lambda p: p.snapshot.author)
    counted = 0 if before is None else before.total_tokens
    roster = Roster(
        round=0 if before is None else before.round + 1,
        signer=authors[0].peer_id,
        entries=tuple(publication_of(held.snapshot) for held in published),
        base=store.chain.digest,
        base_tokens=counted if base_tokens is None else base_tokens,
    )
    signed = sign_roster(authors[0], RUN, roster)
    store.move_to(roster, signed, [held.snapshot.signed for held in published])
    return roster, signed


def common(*more: Sequence[Identity], tokens: int = 10) -> ChainStore:
    """Make a chain that all began together, and its continuation by some."""
    store = ChainStore()
    for authors in ((*HONEST, LIAR), (*HONEST, LIAR), *more):
        go_on(store, authors, tokens)
    return store


# ---------------------------------------------------------------- what is shown


def test_a_chain_is_shown_from_where_the_other_knows_it() -> None:
    ours, theirs = common(), common(HONEST, (A, B))
    message = theirs.shows(ours.known())
    assert [len(link.manifests) for link in message.links] == [4, 2]
    found = chain_untrusted(pb.RosterChain.FromString(message.SerializeToString()), ours.chain, SETTINGS)
    assert found.chain == theirs.chain, "joined to what both have"
    assert theirs.shows(theirs.known()).links == []
    assert len(theirs.shows([]).links) == 4 and chain_untrusted(theirs.shows([]), Chain(), SETTINGS)
    ours.keep(found)
    roster, signed = go_on(common(HONEST, (A, B)), HONEST)
    ours.move_to(roster, signed)
    assert len(ours.shows(common().known()).links) == 3, "who takes a state can show how it came about"


def test_who_is_started_again_knows_how_its_checkpoint_came_about() -> None:
    before = common(HONEST, (A, B))
    last, signed = before.chain.head, before._signed[before.chain.digest].roster
    assert last is not None
    again = ChainStore()
    again.restore_untrusted(before.kept(), SETTINGS)
    again.move_to(last, signed)
    assert again.chain == before.chain and again.shows([]) == before.shows([])
    for damaged in ("", "%", "AAAA", before.kept()[: len(before.kept()) // 8 * 4]):
        other = ChainStore()
        if damaged:
            with pytest.raises(BadBytesError):
                other.restore_untrusted(damaged, SETTINGS)
        other.move_to(last, signed)
        assert other.chain.head == last and len(other.chain.links) == 1


def test_what_is_kept_and_shown_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    store = common(*[HONEST] * 20)
    whole_bytes = store.shows([]).ByteSize()
    monkeypatch.setattr(chains, "_MAX_BYTES", whole_bytes // 2)
    shown = store.shows([])
    assert shown.ByteSize() <= whole_bytes // 2 and shown.links[-1].manifests
    assert chain_untrusted(shown, Chain(), SETTINGS).chain.digest == store.chain.digest
    go_on(store, HONEST)
    assert sum(link.ByteSize() for link in store._signed.values()) <= whole_bytes // 2
    for number in range(40):
        other = common((A,))
        go_on(other, (B,), tokens=1 + number)
        store.keep(chain_untrusted(other.shows([]), Chain(), SETTINGS))
    assert len(store.shown) == 16


def test_a_chain_that_is_not_signed_so_is_refused() -> None:
    ours, theirs = common(), common(HONEST)

    def refused(message: pb.RosterChain, code: str, *says: str) -> None:
        with raises_code(code, BadBytesError, *says):
            chain_untrusted(message, ours.chain, SETTINGS)

    message = theirs.shows(ours.known())
    message.links[0].manifests[0].CopyFrom(publication(LIAR, ours.chain.head).snapshot.signed)
    refused(message, "bad-publication")
    message.links[0].manifests[0].CopyFrom(theirs.shows([]).links[0].manifests[0])
    refused(message, "bad-round")
    forged = theirs.shows(ours.known())
    forged.links[0].roster.author = peer_bytes(LIAR.peer_id)
    refused(forged, "bad-signature")
    refused(pb.RosterChain(), "bad-size")
    torn = common(*[HONEST] * 3).shows([])
    del torn.links[1]
    refused(torn, "bad-chain")
    lie = common()
    go_on(lie, (LIAR,), base_tokens=40_000)
    refused(lie.shows(ours.known()), "bad-tokens", "40000 tokens", "100")


def test_a_roster_that_cannot_be_is_refused_by_its_rule() -> None:
    store = common(HONEST)
    right = pb.Roster.FromString(store.shows([]).links[-1].roster.payload)

    def rule_for(**changes: Any) -> str:
        roster = pb.Roster.FromString(right.SerializeToString())
        for key, value in changes.items():
            setattr(roster, key, value)
        if not changes:
            del roster.entries[:]
            roster.entries.extend(reversed(right.entries))
        with pytest.raises(BadBytesError) as caught:
            roster_untrusted(sign(A, "roster", SETTINGS.run_sha256, roster), SETTINGS.run_sha256, SETTINGS.max_tokens)
        return rule_of(caught.value.code)

    assert rule_for(base=b"x") == rule_for(round=2**40) == "round"
    assert rule_for(base_tokens=2**62) == "tokens"
    assert rule_for() == "format", "its entries are not in order"
    right.entries[0].snapshot_sha256 = b"x"
    assert rule_for(attempt=1) == "hash"


# ---------------------------------------------------------------- what moves a peer


@dataclass
class Peers:
    """Peers that stand on their chains, answer about rounds and give their states. Stands in for `PeerCalls`."""

    stores: dict[str, ChainStore]
    authors: dict[str, Identity]
    hiding: frozenset[str] = frozenset()
    """They answer, and show no chain when asked."""
    mute: bool = False
    """Nobody shows a chain, though asked."""
    quick: frozenset[str] = frozenset()
    """They end another round before they show their chain, and before they give a state."""
    withholding: frozenset[str] = frozenset()
    """They give no state."""
    asked: list[tuple[str, str]] = field(default_factory=list)
    pull_slots: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(8))
    membership: Membership | None = None
    open_pull: Any = None

    def on_failure(self, peer: str, error: PeerError) -> None:
        assert self.membership is not None
        self.membership.call_failed(peer, swarm_time(), str(error))

    def _last(self, peer: str) -> tuple[Roster, pb.Signed]:
        head = self.stores[peer].chain.head
        assert head is not None
        return head, self.stores[peer]._signed[head.digest].roster

    def _goes_on(self, peer: str) -> None:
        if peer in self.quick:
            go_on(self.stores[peer], (self.authors[peer],))

    async def round(self, peer: str, request: pb.RoundRequest) -> pb.RoundReply:
        if request.wants_chain:
            self._goes_on(peer)
        head, signed = self._last(peer)
        reply = pb.RoundReply(participating=True, current_round=head.round + 1, last_roster=signed)
        if request.wants_chain:
            self.asked.append((peer, "chain"))
            if self.mute:
                raise UnreachableError("it does not say")
            if peer not in self.hiding:
                reply.chain.CopyFrom(self.stores[peer].shows(request.chain_known))
        if request.round == head.round + 1 and not request.has_publication:
            reply.publication.CopyFrom(publication(self.authors[peer], head).snapshot.signed)
        else:
            await asyncio.sleep(min(request.wait_s, 0.05))
        assert self.membership is not None
        self.membership.heard(peer, swarm_time())
        return reply

    async def state(self, peer: str, min_round: int) -> pb.StateReply:
        self.asked.append((peer, "state"))
        if peer in self.withholding:
            raise UnreachableError("it delivers nothing")
        self._goes_on(peer)
        head, signed = self._last(peer)
        manifest = pb.Manifest(
            run_sha256=bytes.fromhex(RUN),
            kind=pb.SNAPSHOT_KIND_STATE,
            round=head.round + 1,
            run_tokens=head.total_tokens,
            roster_sha256=bytes.fromhex(head.digest),
        )
        manifest.peer_tokens.add(peer=peer_bytes(peer), tokens=head.total_tokens)
        held = build_snapshot(self.authors[peer], manifest, SPECS, Body([bytes(SPECS[0].size_bytes)]))
        return pb.StateReply(manifest=held.snapshot.signed, roster=signed)


@pytest.fixture(autouse=True)
def bytes_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """Deliver all bytes but those of the liar's publications."""

    async def pull(self: Downloads, held: HeldSnapshot, chunks: range, sources: Sequence[str], *_: object) -> None:
        manifest = held.snapshot.manifest
        if manifest.kind == pb.SNAPSHOT_KIND_PSEUDO_GRADIENT and held.snapshot.author == LIAR.peer_id:
            raise UnreachableError("it delivers nothing")
        held.have.update(range(held.snapshot.num_chunks))

    async def pull_manifest(source: str, sha256: str, *_: object) -> pb.Signed:
        if PUBLISHED[sha256].snapshot.author == LIAR.peer_id:
            raise UnreachableError("it delivers nothing")
        return PUBLISHED[sha256].snapshot.signed

    async def at_once(work: Any, *args: Any) -> Any:  # a thread takes real time, in which the virtual clock runs on
        return work(*args)

    monkeypatch.setattr(asyncio, "to_thread", at_once)
    monkeypatch.setattr(Downloads, "pull", pull)
    monkeypatch.setattr(merger, "pull_manifest", pull_manifest)


def rounds_of(me: Identity, own: ChainStore, peers: Peers, *, trains: bool = True) -> tuple[RoundRunner, list[str]]:
    """`me` on its own chain among `peers`; and who was refused, with why."""
    refused: list[str] = []
    now = swarm_time()
    peers.membership = membership = Membership(me.peer_id, grace_s=0.1)
    for peer in peers.stores:
        membership.saw_presence(PeerInfo(peer=peer, training=True, stamp=now), now + 999, now)
    calls: Any = peers
    refuse = lambda peer, error: refused.append(f"{peer} {error}")  # noqa: E731 - as short as it can be
    downloads = Downloads(me.peer_id, calls, SnapshotStore(), SETTINGS.pull, refuse)
    rounds = RoundRunner(me, downloads, membership, SETTINGS, average_bytes_untrusted, trains=trains, chains=own)
    rounds.begin(is_late_joiner=False)
    if (head := own.chain.head) is not None:
        rounds.know_roster(head, own._signed[head.digest].roster)
        rounds.advance(Progress(round=head.round + 1, roster_sha256=head.digest))
    return rounds, refused


def peers(**stores: ChainStore) -> Peers:
    names = {"a": A, "b": B, "c": C, "d": D, "liar": LIAR}
    authors = {names[name].peer_id: names[name] for name in stores}
    return Peers({names[name].peer_id: store for name, store in stores.items()}, authors)


def finish(own: ChainStore, others: Peers, *, slept: bool = False) -> tuple[Outcome, list[str]]:
    """Let A end its round among them."""

    async def run() -> tuple[Outcome, list[str]]:
        rounds, refused = rounds_of(A, own, others)
        if slept:
            await asyncio.sleep(0.1)
            rounds.was_suspended()
        round, started_s = rounds.current_round, 0.0 if slept else swarm_time()
        outcome = await asyncio.wait_for(rounds.finish(round, publication(A, own.chain.head), started_s), 100)
        if isinstance(outcome, RosterMean):
            rounds.advance(Progress(round=round + 1, roster_sha256=outcome.roster.digest))
            assert own.chain.links[-1].shown.keys() == set(outcome.roster.peers), "it can show what it merged"
        return outcome, refused

    return virtual_swarm(run)


LIES = {
    "tokens behind it": {"base_tokens": 2 * 100 * 4096, "rounds": 1},
    "a longer chain": {"tokens": 100, "rounds": 40},
}


@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize("shows", [True, False])
def test_one_volunteers_signature_moves_nobody(lie: str, shows: bool) -> None:
    """It signs a roster with all the tokens that are permitted behind it, and offers weights of its own."""
    own, wrong = common(), common()
    how = dict(LIES[lie])
    for _ in range(how.pop("rounds")):
        go_on(wrong, (LIAR,), **how)
    assert own.chain.head is not None and wrong.chain.head is not None
    others = peers(b=common(), c=common(), d=common(), liar=wrong)
    if not shows:
        others.hiding = frozenset([LIAR.peer_id])
    outcome, refused = finish(own, others)
    assert isinstance(outcome, RosterMean) and set(outcome.roster.peers) == {peer.peer_id for peer in HONEST}
    assert (LIAR.peer_id, "state") not in others.asked
    assert all(LIAR.peer_id in said for said in refused)
    assert bool(refused) == (lie == "tokens behind it" or not shows)


def test_one_who_signs_everybodys_work_and_withholds_its_own_moves_nobody() -> None:
    own, wrong = common(), common()
    go_on(wrong, (LIAR, A, B, C, D))
    others = peers(b=common(), c=common(), d=common(), liar=wrong)
    outcome, refused = finish(own, others)
    assert isinstance(outcome, RosterMean) and set(outcome.roster.peers) == {peer.peer_id for peer in HONEST}
    assert not refused, "it may be the network"


@pytest.mark.parametrize("base_tokens", [None, 2 * 100 * 4096])
def test_no_archive_and_no_newcomer_takes_one_volunteers_state(base_tokens: int | None) -> None:
    honest, wrong = common(HONEST), common()
    for _ in range(1 if base_tokens else 30):
        go_on(wrong, (LIAR,), tokens=100, base_tokens=base_tokens)
    advertised = peers(b=honest, c=honest, d=honest, liar=wrong)

    async def fetch(own: ChainStore) -> NewState | None:
        rounds, _ = rounds_of(A, own, advertised, trains=False)
        return await rounds.search.fetch_newest_state(sorted(advertised.stores), "archive", above_tokens=50)

    for own in (ChainStore(), common()):
        state = virtual_swarm(lambda own=own: fetch(own))  # type: ignore[misc]
        assert state is not None and state.roster == honest.chain.head
        assert state.held.snapshot.manifest.run_tokens == honest.chain.tokens_at(honest.chain.digest) == 140


def test_both_chains_are_there_before_a_state_is_given_up() -> None:
    own, theirs = common((A,), (A,), (A,)), common((B, C), (B, C))
    others = peers(b=theirs, c=theirs)
    outcome, refused = finish(own, others)
    assert isinstance(outcome, NewState) and outcome.roster == theirs.chain.head and not refused
    assert others.asked[0][1] == "chain" and others.asked[-1][1] == "state"
    silent = peers(b=theirs, c=theirs)
    silent.mute = True
    outcome, _ = finish(common((A,), (A,), (A,)), silent)
    assert isinstance(outcome, RosterMean) and not any(what == "state" for _, what in silent.asked)


def come_back(own: ChainStore, others: Peers) -> tuple[NewState | None, ChainStore]:
    """Start A again, and let it ask all others."""

    async def run() -> NewState | None:
        rounds, _ = rounds_of(A, own, others)
        new = await rounds.search.fetch_advertised_state(await rounds.search.ask_now(sorted(others.stores)), "was away")
        if new is not None:
            own.move_to(new.roster, new.signed_roster)
        return new

    return virtual_swarm(run), own


def test_who_comes_back_takes_the_state_of_one_that_ends_its_rounds_meanwhile() -> None:
    before, quick = common((A, B)), common((A, B), (B,), (B,))
    others = peers(b=quick)
    others.quick = frozenset([B.peer_id])
    new, own = come_back(before, others)
    assert new is not None and new.from_peer == B.peer_id
    assert len(own.chain.links) == 7 and own.chain.links == quick.chain.links[:7], "two rounds later, and how it came"
    assert len(quick.chain.links) == 8, "by the time that it shows its chain it is another round further"


def test_who_comes_back_takes_no_state_that_is_older_than_its_own() -> None:
    others = peers(b=common((A, B), (A, B), (B,)), c=common((A, B)))
    others.withholding = frozenset([B.peer_id])
    new, own = come_back(common((A, B), (A, B)), others)
    assert new is None and len(own.chain.links) == 4
    assert (C.peer_id, "state") not in others.asked


def test_who_went_on_with_more_stays() -> None:
    own, theirs = common((A, B, C), (A, B, C)), common((D,), (D,), (D,))
    outcome, _ = finish(own, peers(d=theirs))
    assert isinstance(outcome, RosterMean)


async def answers(rounds: RoundRunner, reply: pb.RoundReply) -> list[ev.Command[pb.Signed]]:
    """Return what follows from B's answer to the first question about the round that A has just ended."""
    held = publication(A, rounds.chains.chain.head)
    ended = ev.InnerStepsDone(rounds.current_round, publication_of(held.snapshot), swarm_time())
    rounds.engine.receive(ended, swarm_time())
    ask = next(
        one for one in rounds.engine.receive(ev.RoundTimerFired(), swarm_time()) if isinstance(one, ev.AskRoundQuestion)
    )
    assert ask.peer == B.peer_id
    said = await rounds._questions.read_untrusted(ask, reply)
    return rounds.engine.receive(said.event, swarm_time())


def test_a_roster_that_counts_other_tokens_than_its_base_is_not_kept() -> None:
    own = common()
    entry_of, other = go_on(common(), HONEST, base_tokens=77_000)

    async def run() -> list[ev.Command[pb.Signed]]:
        rounds, _ = rounds_of(A, own, peers(b=common()))
        assert rounds.last is not None and rounds.current_round == entry_of.round
        reply = pb.RoundReply(current_round=2, last_roster=rounds.last[1], roster=other)
        return await answers(rounds, reply)

    said = "a roster that counts 77000 tokens behind it where its chain has 100"
    assert virtual_swarm(run) == [ev.NamePeer(A.peer_id, said, "bad-tokens")], "and nobody is told that there is one"


def test_who_says_same_as_before_cannot_hand_out_another_roster_with_it() -> None:
    own = common()
    _, other = go_on(common(), HONEST, base_tokens=77_000)

    async def run() -> list[ev.Command[pb.Signed]]:
        rounds, _ = rounds_of(A, own, peers(b=common()))
        await rounds.search.ask_now([B.peer_id])
        assert rounds.engine.hearsay.last_of(B.peer_id) == own.chain.head
        return await answers(rounds, pb.RoundReply(current_round=2, same_last=True, last_roster=other))

    said = "a roster that counts 77000 tokens behind it where its chain has 100"
    assert virtual_swarm(run) == [ev.NamePeer(B.peer_id, said, "bad-tokens")]

"""Driver of rounds against scripted peers: lies and failures that must cost a bounded wait and nothing else."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from virtual_loop import virtual_swarm

from swarmtrain.errors import PeerError, UnreachableError
from swarmtrain.network.codec import average_bytes_untrusted
from swarmtrain.network.daemon import swarm_time
from swarmtrain.network.identity import Identity, new_identity
from swarmtrain.network.rounds.downloads import Downloads
from swarmtrain.network.rounds.merger import Average, Merger, RoundSettings
from swarmtrain.network.rounds.questions import RoundQuestions
from swarmtrain.network.rounds.roster import CheckedRosters, named, publication_of, sign_roster
from swarmtrain.network.rounds.round_end import EndedRound, RosterMean
from swarmtrain.network.rounds.runner import RoundRunner
from swarmtrain.network.rounds.state_fetch import NewState, StateSource
from swarmtrain.network.snapshots.store import (
    Body,
    HeldSnapshot,
    PullLimits,
    SnapshotStore,
    TensorSpec,
    build_snapshot,
    empty_held,
)
from swarmtrain.network.tasks import end_tasks
from swarmtrain.protocol.membership.membership import Membership, PeerInfo, PeerState
from swarmtrain.protocol.rounds import messages as ev
from swarmtrain.protocol.rounds.chains import Chain, ChainLink, ShownChain
from swarmtrain.protocol.rounds.rosters import AdvertisedRound, Roster, RoundPublication
from swarmtrain.v1 import snapshot_pb2 as pb

RUN = "ab" * 32
SPECS = (TensorSpec("w", (64,)),)
WRONG = (TensorSpec("w", (9,)),)
SILENCE_S = 0.3
SETTINGS = RoundSettings(
    run_sha256=RUN,
    specs=SPECS,
    state_specs=(),
    max_tokens=100,
    share_above=5,
    round_limit_s=30.0,
    silence_s=SILENCE_S,
    pull=PullLimits(stall_limit_s=0.2),
)


def publication(identity: Identity, specs: tuple[TensorSpec, ...] = SPECS, part: int = 1) -> HeldSnapshot:
    manifest = pb.Manifest(
        run_sha256=bytes.fromhex(RUN), kind=pb.SNAPSHOT_KIND_PSEUDO_GRADIENT, part=part, tokens=10, inner_steps=1
    )
    return build_snapshot(identity, manifest, specs, Body([bytes(specs[0].size_bytes)]))


@dataclass
class Others:
    """Peers that answer questions about round 0 and never deliver a byte. Stands in for `PeerCalls`."""

    identities: dict[str, Identity]
    specs: tuple[TensorSpec, ...] = SPECS
    change: Callable[[pb.RoundRequest, pb.RoundReply], None] = lambda request, reply: None
    pull_slots: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(8))
    membership: Membership | None = None
    frozen: frozenset[str] = frozenset()
    """Peers whose process stands still: they take a question and never answer."""

    def on_failure(self, peer: str, error: PeerError) -> None:
        assert self.membership is not None
        self.membership.call_failed(peer, swarm_time(), str(error))

    async def round(self, peer: str, request: pb.RoundRequest) -> pb.RoundReply:
        if peer in self.frozen:
            await asyncio.Event().wait()
        reply = pb.RoundReply(participating=True)
        if not request.has_publication:
            reply.publication.CopyFrom(publication(self.identities[peer], self.specs).snapshot.signed)
        else:
            await asyncio.sleep(min(request.wait_s, 0.05))
        self.change(request, reply)
        assert self.membership is not None
        self.membership.heard(peer, swarm_time())
        return reply

    async def open_pull(self, peer: str, request: pb.PullRequest) -> Any:
        raise UnreachableError("it delivers nothing")

    async def state(self, peer: str, min_round: int) -> pb.StateReply:
        raise UnreachableError("it delivers nothing")


class States:
    """Source of states that has none."""

    async def offered_untrusted(self, source: str, min_round: int) -> NewState | None:
        return None

    async def take(self, state: NewState) -> None:
        """Deliver the publication."""

    def blame(self, peer: str, error: PeerError) -> None:
        """Nobody asks."""


def driver(
    identities: list[Identity],
    me: Identity,
    others: Others,
    settings: RoundSettings = SETTINGS,
    *,
    average: Average = average_bytes_untrusted,
    states: StateSource | None = None,
) -> tuple[RoundRunner, list[tuple[str, str]]]:
    """Run the rounds of `me` among `identities`; returns refusals by peer."""
    refused: list[tuple[str, str]] = []

    def refuse(peer: str, error: PeerError) -> None:
        refused.append((peer, str(error)))

    now = swarm_time()
    others.membership = membership = Membership(me.peer_id, grace_s=SILENCE_S / 2)
    for identity in identities:
        info = PeerInfo(peer=identity.peer_id, training=True, stamp=now)
        membership.saw_presence(info, now + 999, now)
    calls: Any = others
    downloads = Downloads(me.peer_id, calls, SnapshotStore(), settings.pull, refuse)
    rounds = RoundRunner(me, downloads, membership, settings, average, states=states)
    rounds.begin(is_late_joiner=False)
    return rounds, refused


def finish(identities: list[Identity], me: Identity, others: Others) -> tuple[RosterMean, float, list[tuple[str, str]]]:
    """Let `me` finish round 0 among `identities`; (outcome, seconds, what was refused of whom)."""
    refused: list[tuple[str, str]] = []

    async def run() -> tuple[RosterMean, float]:
        rounds, advertised = driver(identities, me, others)
        began_s = swarm_time()
        outcome = await asyncio.wait_for(rounds.finish(0, publication(me), began_s), 100)
        assert isinstance(outcome, RosterMean)
        refused.extend(advertised)
        return outcome, swarm_time() - began_s

    outcome, wait_s = virtual_swarm(run)
    return outcome, wait_s, refused


def a_swarm(number: int) -> list[Identity]:
    return sorted((new_identity(bytes([i]) * 32) for i in range(number)), key=lambda identity: identity.peer_id)


@pytest.mark.parametrize("number", [3, 12])
def test_publications_that_nobody_delivers_are_left_out(number: int) -> None:
    identities = a_swarm(number)
    others = Others({identity.peer_id: identity for identity in identities})
    outcome, wait_s, _ = finish(identities, identities[0], others)
    assert outcome.roster.peers == (identities[0].peer_id,)
    assert wait_s < 5


def test_a_peer_that_sends_another_shape_is_named_and_not_waited_for() -> None:
    identities = a_swarm(3)
    others = Others({identity.peer_id: identity for identity in identities}, specs=WRONG)
    outcome, wait_s, refused = finish(identities, identities[0], others)
    assert outcome.roster.peers == (identities[0].peer_id,)
    assert wait_s < 5, "the round's limit is 30 s"
    assert {peer for peer, _ in refused} == {identity.peer_id for identity in identities[1:]}
    assert all("another shape" in detail for _, detail in refused)


def test_a_signer_that_names_a_publication_we_never_made_costs_its_turn() -> None:
    liar, me = a_swarm(2)
    entry = RoundPublication(peer=me.peer_id, snapshot="5" * 64, tokens=10, inner_steps=1)
    signed = sign_roster(liar, RUN, Roster(round=0, signer=liar.peer_id, entries=(entry,)))
    refusing = [0]

    def lie(request: pb.RoundRequest, reply: pb.RoundReply) -> None:
        refusing[0] += 1
        if refusing[0] > 5:
            raise UnreachableError("silent")
        if not request.has_roster_sha256:
            reply.roster.CopyFrom(signed)

    outcome, wait_s, _ = finish([liar, me], me, Others({liar.peer_id: liar}, change=lie))
    assert outcome.roster.peers == (me.peer_id,)
    assert wait_s < 10


def test_many_rosters_of_one_signer_are_bounded() -> None:
    flooder, me = a_swarm(2)
    attempts = iter(range(10_000))

    def flood(request: pb.RoundRequest, reply: pb.RoundReply) -> None:
        entry = RoundPublication(peer=me.peer_id, snapshot="5" * 64, tokens=10, inner_steps=1)
        attempt = next(attempts)
        if attempt > 20:
            raise UnreachableError("tired")
        roster = Roster(round=0, signer=flooder.peer_id, entries=(entry,), attempt=attempt, base_tokens=0)
        reply.roster.CopyFrom(sign_roster(flooder, RUN, roster))

    outcome, wait_s, _ = finish([flooder, me], me, Others({flooder.peer_id: flooder}, change=flood))
    assert outcome.roster.peers == (me.peer_id,)
    assert wait_s < 15


def test_rosters_that_were_checked_are_kept_up_to_a_number_of_entries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("swarmtrain.network.rounds.roster._MAX_CHECKED_ENTRIES", 20)
    identities, rosters = a_swarm(9), CheckedRosters(RUN, max_tokens=100)
    entries = tuple(
        RoundPublication(peer=identity.peer_id, snapshot="5" * 64, tokens=10, inner_steps=1) for identity in identities
    )
    for number, identity in enumerate(identities):
        roster = Roster(round=0, signer=identity.peer_id, entries=entries, attempt=number)
        assert rosters.read_untrusted(sign_roster(identity, RUN, roster)).roster == roster
        assert sum(len(kept.entries) for kept in rosters._checked.values()) <= 20
    assert [kept.signer for kept in rosters._checked.values()] == [identity.peer_id for identity in identities[-2:]]


def test_a_peer_whose_process_stands_still_is_lost_after_two_rounds() -> None:
    identities = a_swarm(3)
    me, frozen = identities[0], identities[1].peer_id
    others = Others({identity.peer_id: identity for identity in identities}, frozen=frozenset([frozen]))

    async def run() -> list[tuple[PeerState | None, float]]:
        rounds, _ = driver([identities[0], identities[1]], me, others)
        seen = []
        for _ in range(3):  # three times the same round, which is what it would cost in each
            began_s = swarm_time()
            await asyncio.wait_for(rounds.finish(0, publication(me), began_s), 20)
            seen.append((rounds.membership.state(frozen), swarm_time() - began_s))
        return seen

    (first, first_s), (second, second_s), (third, third_s) = virtual_swarm(run)
    assert (first, second, third) == (PeerState.LIVE, PeerState.LOST, PeerState.LOST)
    assert third_s < SILENCE_S <= min(first_s, second_s)


def test_who_ends_its_round_after_the_time_limit_asks_before_it_signs() -> None:
    """It slept in the midst of it: the others may have gone on without it."""
    identities, asked, signed_after = a_swarm(2), list[str](), list[int]()
    me = identities[0]
    others = Others(
        {identity.peer_id: identity for identity in identities},
        change=lambda request, reply: asked.append("answered"),
    )

    async def run() -> None:
        rounds, _ = driver(identities, me, others)
        do = rounds._do

        def noted(command: Any) -> None:
            if isinstance(command, ev.SignRoster):
                signed_after.append(len(asked))
            do(command)

        rounds._do = noted  # type: ignore[method-assign]
        await asyncio.wait_for(rounds.finish(0, publication(me), swarm_time() - 2 * SETTINGS.round_limit_s), 100)

    virtual_swarm(run)
    assert signed_after and signed_after[0] > 0


def test_nobody_waits_for_a_peer_that_answers_that_it_is_away() -> None:
    """It rests, and its goodbye got lost: it answers at once, for as long as it is asked."""
    identities = a_swarm(2)

    def rest(request: pb.RoundRequest, reply: pb.RoundReply) -> None:
        reply.ClearField("publication")
        reply.away = True

    others = Others({identity.peer_id: identity for identity in identities}, change=rest)
    outcome, wait_s, _ = finish(identities, identities[1], others)
    assert outcome.roster.peers == (identities[1].peer_id,)
    assert wait_s < SILENCE_S + 2, "the round's limit is 30 s"


def test_the_newest_state_never_counts_less_than_the_one_it_is_for() -> None:
    """The best roster's holders do not deliver, and the state that somebody else has is older than the archive."""
    (me, ahead, behind) = a_swarm(3)

    def led_by(identity: Identity, tokens: int, base: Roster | None = None) -> Roster:
        entry = RoundPublication(peer=identity.peer_id, snapshot="5" * 64, tokens=tokens, inner_steps=1)
        if base is None:
            return Roster(round=0, signer=identity.peer_id, entries=(entry,))
        more: dict[str, Any] = {"base": base.digest, "base_tokens": base.total_tokens}
        return Roster(round=1, signer=identity.peer_id, entries=(entry,), **more)

    older = led_by(behind, 40)
    last = {ahead.peer_id: led_by(ahead, 50, older), behind.peer_id: older}
    asked: list[str] = []

    async def ask_now(peers: Sequence[str]) -> dict[str, AdvertisedRound]:
        return {peer: AdvertisedRound(round=last[peer].round + 1, last=last[peer]) for peer in peers}

    class Offering(States):
        async def offered_untrusted(self, source: str, min_round: int) -> NewState | None:
            asked.append(source)
            if source == ahead.peer_id:
                return None
            held = empty_held(publication(behind).snapshot)
            return NewState(held=held, roster=last[source], signed_roster=pb.Signed(), from_peer=source)

    async def run(above_tokens: int) -> NewState | None:
        rounds, _ = driver([ahead, behind], me, Others({}), states=Offering())
        rounds.search.ask_now = ask_now  # type: ignore[method-assign]
        rounds.chains.keep(ShownChain(Chain((ChainLink(roster=older), ChainLink(roster=last[ahead.peer_id])))))
        rounds.chains.keep(ShownChain(Chain((ChainLink(roster=older),))))
        return await rounds.search.fetch_newest_state(sorted(last), "archive", above_tokens)

    found = asyncio.run(run(30))
    assert found is not None and found.roster == older
    assert asyncio.run(run(40)) is None and asyncio.run(run(60)) is None
    assert asked == [ahead.peer_id, behind.peer_id] * 3


def test_a_signer_that_never_signs_is_passed_over_after_two_rounds() -> None:
    idle, me = a_swarm(2)
    settings = dataclasses.replace(SETTINGS, round_limit_s=0.5, silence_s=0.7)
    others = Others({idle.peer_id: idle})

    async def run() -> list[float]:
        rounds, _ = driver([idle, me], me, others, settings)
        seen = []
        for _ in range(3):  # three times the same round, which is what it would cost in each
            began_s = swarm_time()
            await asyncio.wait_for(rounds.finish(0, publication(me), began_s), 20)
            seen.append(swarm_time() - began_s)
        assert rounds.membership.state(idle.peer_id) is PeerState.LIVE
        return seen

    first_s, second_s, third_s = virtual_swarm(run)
    assert third_s < 0.5 + 0.7 <= min(first_s, second_s)


def test_who_else_signs_what_is_being_merged_changes_nothing() -> None:
    """A signer that stood still names the same publications as the one that took its turn."""
    late, me = a_swarm(2)
    own, came = publication(me), threading.Event()
    roster = Roster(round=0, signer=late.peer_id, entries=(publication_of(own.snapshot),), attempt=1)

    def signs(request: pb.RoundRequest, reply: pb.RoundReply) -> None:
        if rounds and rounds[0].engine._ending is not None and rounds[0].engine._ending.merging:
            reply.roster.CopyFrom(sign_roster(late, RUN, roster))
            asyncio.get_running_loop().call_later(0.01, came.set)

    rounds: list[RoundRunner] = []

    def average(parts: Sequence[memoryview], weights: Sequence[int]) -> Any:
        assert came.wait(5)
        return average_bytes_untrusted(parts, weights)

    async def run() -> RosterMean:
        one, _ = driver([late, me], me, Others({late.peer_id: late}, change=signs), average=average)
        rounds.append(one)
        outcome = await asyncio.wait_for(one.finish(0, own, swarm_time()), 20)
        assert isinstance(outcome, RosterMean)
        return outcome

    outcome = virtual_swarm(run)
    assert came.is_set() and outcome.roster.digest == roster.digest


def test_an_error_of_ours_ends_what_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a command that a timer leads to: nobody waits for ever."""
    identities = a_swarm(2)
    me, other = identities

    def fail(self: RoundRunner, command: object) -> None:
        raise RuntimeError("a bug")

    async def run() -> None:
        rounds, _ = driver(identities, me, Others({other.peer_id: other}))
        monkeypatch.setattr(RoundRunner, "_do", fail)
        with pytest.raises(RuntimeError, match="a bug"):
            await asyncio.wait_for(rounds.finish(0, publication(me), swarm_time()), 20)
        with pytest.raises(RuntimeError, match="a bug"):
            await asyncio.wait_for(rounds.search.ask_now([other.peer_id]), 20)
        assert swarm_time() < 5

    virtual_swarm(run)


def test_an_error_of_ours_in_one_question_is_a_call_that_failed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is asked again, and the round goes on; the log shows where it was."""
    identities = a_swarm(3)
    me, good, bad = identities
    read, failures = RoundQuestions.read_untrusted, itertools.count()
    broken_for = [2]

    async def broken(self: RoundQuestions, ask: ev.AskRoundQuestion, reply: pb.RoundReply) -> object:
        if ask.peer == bad.peer_id and next(failures) < broken_for[0]:
            raise RuntimeError("a bug")
        return await read(self, ask, reply)

    async def bytes_come(
        self: Downloads, held: HeldSnapshot, chunks: range, sources: Sequence[str], *_: object
    ) -> None:
        held.have.update(chunks)

    monkeypatch.setattr(RoundQuestions, "read_untrusted", broken)
    monkeypatch.setattr(Downloads, "pull", bytes_come)
    outcome, wait_s, refused = finish(identities, me, Others({one.peer_id: one for one in identities}))
    assert set(outcome.roster.peers) == {me.peer_id, good.peer_id, bad.peer_id} and not refused
    advertised = [record for record in caplog.records if record.exc_info is not None]
    assert len(advertised) == 1 and "a bug" in str(advertised[0].exc_info), "it was so twice"
    broken_for[0] = 10**6
    caplog.clear()
    outcome, wait_s, refused = finish(identities, me, Others({one.peer_id: one for one in identities}))
    assert set(outcome.roster.peers) == {me.peer_id, good.peer_id} and not refused
    assert wait_s == pytest.approx(SETTINGS.round_limit_s, abs=1), "it lives, and may publish yet"
    assert sum(record.exc_info is not None for record in caplog.records) == 1

    async def ask() -> dict[str, AdvertisedRound]:
        rounds, _ = driver(identities, me, Others({one.peer_id: one for one in identities}))
        return await rounds.search.ask_now([good.peer_id, bad.peer_id])

    assert list(virtual_swarm(ask)) == [good.peer_id]


def test_an_error_of_ours_in_one_pull_leaves_that_publication_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    identities = a_swarm(3)
    me, good, bad = identities

    async def pull(self: Downloads, held: HeldSnapshot, chunks: range, sources: Sequence[str], *_: object) -> None:
        if held.snapshot.author == bad.peer_id:
            raise RuntimeError("a bug")
        held.have.update(chunks)

    monkeypatch.setattr(Downloads, "pull", pull)
    outcome, _, _ = finish(identities, me, Others({one.peer_id: one for one in identities}))
    assert set(outcome.roster.peers) == {me.peer_id, good.peer_id}
    failures = [record for record in caplog.records if "fetching a publication" in record.message]
    assert [record.exc_info is not None for record in failures] == [True]


def test_of_publications_in_answers_that_are_refused_nothing_is_kept() -> None:
    liar, me = a_swarm(2)
    parts, most = itertools.count(2), [0]

    def lie(request: pb.RoundRequest, reply: pb.RoundReply) -> None:
        if not request.has_publication:
            reply.publication.CopyFrom(publication(liar, part=next(parts)).snapshot.signed)
        reply.current_round = 7

    async def run() -> None:
        settings = dataclasses.replace(SETTINGS, silence_s=15.0)
        rounds, _ = driver([liar, me], me, Others({liar.peer_id: liar}, change=lie), settings)
        finishing = asyncio.create_task(rounds.finish(0, publication(me), swarm_time() - 60))
        while not finishing.done():
            await asyncio.sleep(0.5)
            if rounds._ended is not None:
                most[0] = max(most[0], len(rounds._ended._publications))

    virtual_swarm(run)
    assert next(parts) > 3
    assert most == [1], "that of this peer"


@pytest.mark.parametrize("ends", ["breaks off", "given up", "given up as it comes", "an error of ours"])
def test_nothing_is_kept_of_a_state_that_nobody_gets(ends: str) -> None:
    """It takes 8 bytes a parameter."""
    me, ahead = a_swarm(2)
    entry = RoundPublication(peer=ahead.peer_id, snapshot="5" * 64, tokens=50, inner_steps=1)
    last = Roster(round=0, signer=ahead.peer_id, entries=(entry,))
    begun = list[str]()

    class Breaking(States):
        async def offered_untrusted(self, source: str, min_round: int) -> NewState:
            held = empty_held(publication(ahead).snapshot)
            return NewState(held=held, roster=last, signed_roster=pb.Signed(), from_peer=source)

        async def take(self, state: NewState) -> None:
            begun.append(state.from_peer)
            if ends == "given up":
                await asyncio.Event().wait()
            if ends == "given up as it comes":
                with contextlib.suppress(asyncio.CancelledError):  # as `wait_for` does, see `end_tasks`
                    await asyncio.Event().wait()
                return
            if ends == "an error of ours":
                raise RuntimeError("a bug")
            raise UnreachableError("it broke off")

    async def run() -> None:
        rounds, _ = driver([ahead], me, Others({}), states=Breaking())
        rounds.chains.keep(ShownChain(Chain((ChainLink(roster=last),))))
        with contextlib.suppress(TimeoutError):
            advertised = {ahead.peer_id: AdvertisedRound(round=1, last=last)}
            assert await asyncio.wait_for(rounds.search.fetch_advertised_state(advertised, "joined late"), 5) is None
        await asyncio.sleep(1)
        assert begun and not rounds._states._offered and not rounds._states._taken

    virtual_swarm(run)


def test_what_a_merge_that_is_given_up_has_found_is_there_for_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """With shares, most publications are looked for by the merge, which another roster may end."""
    other, me = a_swarm(2)
    own, its = publication(me), publication(other)
    entries = tuple(publication_of(held.snapshot) for held in (its, own))
    roster = Roster(round=0, signer=other.peer_id, entries=entries)
    found = list[bool]()

    async def merge(
        self: Merger, roster: Roster, name: str, publications: dict[str, HeldSnapshot], _: object
    ) -> bytearray:
        found.append(other.peer_id in publications)
        publications[other.peer_id] = its
        await asyncio.sleep(1)
        return bytearray()

    async def run() -> None:
        rounds, _ = driver([other, me], me, Others({}, frozen=frozenset([other.peer_id])))
        monkeypatch.setattr(Merger, "merge", merge)
        finishing = asyncio.create_task(rounds.finish(0, own, swarm_time()))
        await asyncio.sleep(0)
        one = ev.SignedRoster(roster, sign_roster(other, RUN, roster), "ab")
        rounds._do(ev.MergeRoster(one))
        await asyncio.sleep(0.01)
        rounds._do(ev.CancelMerge())
        rounds._do(ev.MergeRoster(one))
        await asyncio.sleep(0.01)
        await end_tasks([finishing])

    virtual_swarm(run)
    assert found == [False, True]


@pytest.mark.parametrize("number", [5, 6])
def test_whole_publications_are_pulled_no_longer_once_the_roster_is_merged_in_shares(number: int) -> None:
    """They were begun while the group looked smaller; a slow link would carry all of each beside its part."""
    identities = a_swarm(number)
    published = [publication(identity) for identity in identities]
    entries = tuple(publication_of(each.snapshot) for each in published)
    roster = Roster(round=0, signer=identities[0].peer_id, entries=entries)
    ended_pulls: list[str] = []

    async def run() -> None:
        async def never(*_: object) -> Any:
            await asyncio.Event().wait()

        async def pull(held: HeldSnapshot, sources: Sequence[str]) -> None:
            try:
                await never()
            finally:
                ended_pulls.append(held.snapshot.author)

        merger: Any = SimpleNamespace(settings=SETTINGS, pull_whole=pull, merge=never)
        unused: Any = None
        told: list[Any] = []
        ended = EndedRound(published[0], merger, unused, unused, told.append)
        for each, entry in zip(published[1:], entries[1:], strict=True):
            ended.announced(each.snapshot)
            ended.fetch(ev.FetchPublication(entry, (entry.peer,)))
        await asyncio.sleep(0.1)
        assert not ended_pulls
        ended.merge(named(roster, sign_roster(identities[0], RUN, roster)))
        await asyncio.sleep(0.1)
        assert len(ended_pulls) == (number - 1 if number > SETTINGS.share_above else 0)
        assert not told and not ended.outcome.done(), "that is no failure"
        await ended.stop()

    virtual_swarm(run)

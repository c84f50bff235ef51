"""Identities cost nothing: whatever is kept by PeerID has a bound, however many call, and honest ones stay in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from swarmtrain.protocol.archive.departure import DepartureQueue
from swarmtrain.protocol.gossip.open_pulls import OpenPulls
from swarmtrain.protocol.gossip.partners import BackOff, Ledger, PublicationVersion
from swarmtrain.protocol.membership.budgets import CallBudget, NamedOnce, Readers
from swarmtrain.protocol.membership.hosts import Guests
from swarmtrain.protocol.membership.membership import MAX_PEERS, Membership, PeerInfo, PeerState
from swarmtrain.protocol.pipeline.ledger import Acknowledged, Key, LedgerLimits, Settlement, StageLedger
from swarmtrain.protocol.pipeline.router import Router
from swarmtrain.protocol.rounds.signers import Signers
from swarmtrain.protocol.server import UploadVersions
from swarmtrain.protocol.tokens.tally import CountingRules, Tally

NUMBER = 6000


def stranger(number: int) -> str:
    return f"stranger {number}"


def presence(peer: str, stamp: float) -> PeerInfo:
    return PeerInfo(peer=peer, training=True, stamp=stamp)


def a_membership() -> tuple[Callable[[str, float], Any], Callable[[], int]]:
    """Each says goodbye at once; `forget`, which runs every few seconds, tells of all who are not in it any more."""
    membership, kept = Membership("me"), set[str]()

    def call(peer: str, now: float) -> None:
        membership.saw_presence(presence(peer, now), now + 30, now)
        kept.add(peer)
        membership.left(peer, now)
        if int(now) % 50 == 0:
            kept.difference_update(membership.forget(now - 600))

    return call, lambda: max(len(membership._entries), len(membership._live), len(kept) - 50)


def live_ones() -> tuple[Callable[[str, float], Any], Callable[[], int]]:
    membership = Membership("me")
    return (
        lambda peer, now: membership.saw_presence(presence(peer, now), now + 1e6, now),
        lambda: max(len(membership._entries), len(membership._live)),
    )


def leavers() -> tuple[Callable[[str, float], Any], Callable[[], int]]:
    membership = Membership("me")
    asked = DepartureQueue(membership)

    def call(peer: str, now: float) -> None:
        membership.saw_presence(presence(peer, now), now + 1e6, now)
        asked._all_leave = lambda now: False  # type: ignore[method-assign] # else it looks at all, each time
        asked.ask(peer, now)

    return call, lambda: len(asked._asked_s)


def drivers() -> tuple[Callable[[str, float], Any], Callable[[], int]]:
    ledger = StageLedger(LedgerLimits(batch_tokens=8))

    def call(peer: str, now: float) -> None:
        ledger.ask(Key(peer, 0, 0), "forward", 4, now)
        ledger.settle(peer, Settlement(0, (Acknowledged(Key(peer, 1, 0), 1.0),), (), 5), now)

    return call, lambda: len(ledger._drivers) + len(ledger._open)


def of_a_ledger() -> tuple[Callable[[str, float], Any], Callable[[], int]]:
    ledger = Ledger()

    def call(peer: str, now: float) -> None:
        ledger.merged(peer, PublicationVersion(int(now) + 1, 1, 10), int(now))
        ledger.values_merged("weights", peer, (int(now), 0))

    return call, lambda: max(len(ledger._versions), len(ledger._averaged["weights"]), len(ledger._held))


def a_tally() -> tuple[Callable[[str, float], Any], Callable[[], int]]:
    tally = Tally(CountingRules(began_s=0.0, burst_tokens=100, most_tokens=10**9), max_counts=2000, typical_per_s=1.0)
    return (
        lambda peer, now: tally.observe(peer, 0, 10, now + 100),
        lambda: max(len(tally._told), len(tally._accounts)),
    )


def a_router() -> tuple[Callable[[str, float], Any], Callable[[], int]]:
    import random

    router = Router(random.Random(1))
    return lambda peer, now: router.set_peers([peer]), lambda: len(router._peers) + len(router._gone)


def a_reader() -> tuple[Callable[[str, float], Any], Callable[[], int]]:
    readers = Readers(20.0)
    return lambda peer, now: readers.admit(peer, 4, now), lambda: len(readers)


def pulls() -> tuple[Callable[[str, float], Any], Callable[[], int]]:
    opened = OpenPulls(BackOff(), 8)

    def call(peer: str, now: float) -> None:
        opened.nothing_new(opened.begin("weights", peer, now), now, 10.0)
        if int(now) % 100 == 0:
            opened.round_begins(now)

    return call, lambda: len(opened._idle_until_s) + len(opened.begun)


def simple(table: Any, call: Callable[[Any, str, float], Any], *names: str) -> Callable[[], Any]:
    return lambda: (
        lambda peer, now: call(table, peer, now),
        lambda: max(len(getattr(table, name)) for name in names),
    )


TABLES: dict[str, Callable[[], tuple[Callable[[str, float], Any], Callable[[], int]]]] = {
    "calls": simple(CallBudget(), lambda it, peer, now: it.allows(peer, now), "_left"),
    "those who left": a_membership,
    "those who live": live_ones,
    "leavers": leavers,
    "drivers": drivers,
    "merges": of_a_ledger,
    "bans": simple(BackOff(), lambda it, peer, now: it.failed(peer, now, "gone"), "_bans"),
    "marks": simple(UploadVersions(), lambda it, peer, now: it.enter(peer, int(now) + 1), "_rounds"),
    "guests": simple(Guests(), lambda it, peer, now: it.ask(peer, now), "_heard_s"),
    "signers": simple(Signers(), lambda it, peer, now: it.round_over(int(now), [peer], []), "_records"),
    "names": simple(NamedOnce(), lambda it, peer, now: it.is_due(peer, now, "tokens"), "_named_s", "_rates"),
    "counts": a_tally,
    "a stage's peers": a_router,
    "readers": a_reader,
    "pulls": pulls,
}


@pytest.mark.parametrize("what", TABLES)
def test_a_table_of_callers_stays_within_its_bound(what: str) -> None:
    call, size = TABLES[what]()
    most = 0
    for number in range(NUMBER):
        call(stranger(number), float(number) / 2)
        most = max(most, size())
    assert 0 < most <= MAX_PEERS + 200


def test_callers_are_forgotten_when_they_are_long_gone() -> None:
    budget = CallBudget()
    for number in range(1000):
        budget.allows(stranger(number), 0.0)
    assert len(budget._left) == 1000
    budget.allows("anna", 700.0)
    assert list(budget._left) == ["anna"]


def test_who_lives_stays_in_a_full_table_and_who_is_gone_gives_way() -> None:
    membership = Membership("me")
    membership.saw_presence(presence("anna", 0.0), 1e9, 0.0)
    for number in range(MAX_PEERS - 1):
        membership.saw_presence(presence(stranger(number), 1.0), 1e9, 1.0)
    assert membership.saw_presence(presence("ben", 2.0), 1e9, 2.0) is None, "all of them live"
    assert not membership.has_room_for("ben") and membership.has_room_for("anna")
    membership.heard("anna", 2.0)
    assert membership.saw_presence(presence("carl", 2.0), 1e9, 2.0, answered=True) is not None, "no invention"
    assert membership.state("anna") is PeerState.LIVE and membership.forget(-1e9) == [stranger(0)]
    membership.left(stranger(7), 3.0)
    assert membership.saw_presence(presence("ben", 4.0), 1e9, 4.0) is not None
    assert membership.state("ben") is membership.state("anna") is PeerState.LIVE
    assert membership.forget(-1e9) == [stranger(7)] and membership.forget(-1e9) == [], "told once"
    assert len(membership.live()) == MAX_PEERS


def test_a_driver_that_works_is_remembered_through_a_flood() -> None:
    ledger = StageLedger(LedgerLimits(batch_tokens=1000))
    assert ledger.ask(Key("anna", 3, 0), "forward", 4, 0.0).answer == "work"
    ledger.oldest_open("anna", 2, 0.0)
    for number in range(5000):
        ledger.settle(stranger(number), Settlement(0, (), (), 5), 1.0)
    assert ledger.ask(Key("anna", 1, 0), "forward", 4, 2.0).answer == "gone", "what she does not need any more"
    assert ledger.ask(Key("anna", 3, 0), "forward", 4, 2.0).answer == "repeat"

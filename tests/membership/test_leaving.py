"""Who leaves before the end stays until the archive has what nobody who goes on has."""

from __future__ import annotations

from swarmtrain.membership.leaving import Leavers
from swarmtrain.membership.lifecycle import Membership, PeerInfo


def bootstrap_of(*volunteers: str) -> tuple[Membership, Leavers]:
    members = Membership(me="boot")
    for peer in volunteers:
        members.saw_presence(PeerInfo(peer=peer, training=True, stamp=0.0), 1e9, 0.0)
    return members, Leavers(members)


def test_the_last_one_stays_until_it_is_archived() -> None:
    _, leavers = bootstrap_of("anna")
    assert leavers.waiting(0.0) == ()
    assert leavers.ask("anna", 1.0) and leavers.ask("anna", 1.5)
    assert leavers.waiting(2.0) == ("anna",)
    leavers.taken(("anna",), 2.5)
    assert not leavers.ask("anna", 3.0)


def test_who_leaves_others_that_train_on_goes_at_once() -> None:
    members, leavers = bootstrap_of("anna", "ben")
    assert not leavers.ask("anna", 1.0) and leavers.waiting(1.0) == ()
    members.left("anna", 1.1)
    assert leavers.ask("ben", 100.0) and leavers.waiting(100.0) == ("ben",), "ben is the last now"


def test_all_that_leave_together_stay_for_one_archive() -> None:
    """The first of them was told that it may go, before the second asked: one of them is enough."""
    members, leavers = bootstrap_of("anna", "ben", "carl")
    assert not leavers.ask("anna", 1.0) and not leavers.ask("ben", 1.1)
    assert leavers.ask("carl", 1.2)
    assert leavers.waiting(1.3) == ("anna", "ben", "carl")
    members.left("anna", 1.4)
    leavers.taken(("anna", "ben", "carl"), 2.0)
    assert not leavers.ask("ben", 2.1) and not leavers.ask("carl", 2.1)


def test_one_that_asked_and_trains_on_keeps_nobody() -> None:
    _, leavers = bootstrap_of("anna", "ben")
    leavers.ask("anna", 1.0)
    assert not leavers.ask("ben", 10.0) and leavers.waiting(10.0) == ()


def test_one_that_comes_back_and_leaves_again_is_archived_again() -> None:
    _, leavers = bootstrap_of("anna")
    leavers.ask("anna", 1.0)
    leavers.taken(leavers.waiting(1.0), 2.0)
    assert not leavers.ask("anna", 2.5)
    assert leavers.ask("anna", 20.0)
    leavers.taken(leavers.waiting(20.0), 20.0)
    assert leavers.ask("anna", 40.0), "what it was to be told in time was never asked for"


def test_asking_for_the_sake_of_asking_makes_few_archives() -> None:
    _, leavers = bootstrap_of("mallory")
    made = 0
    for tenth in range(1000):
        leavers.ask("mallory", tenth / 10)
        if who := leavers.waiting(tenth / 10):
            leavers.taken(who, tenth / 10)
            made += 1
    assert 15 < made <= 20


def test_strangers_and_those_who_do_not_train_need_not_ask() -> None:
    members, leavers = bootstrap_of()
    members.saw_presence(PeerInfo(peer="guest", stamp=0.0), 1e9, 0.0)
    for peer in ("nobody", "guest", "boot"):
        assert not leavers.ask(peer, 1.0)
    assert leavers.waiting(1.0) == ()

"""Departure before the end: a peer stays until the archive has what no remaining peer has."""

from __future__ import annotations

import pytest

from swarmtrain.protocol.archive.departure import LAST_HOLDER_S, DepartureQueue, FellowDepartures, Leave, before_leaving
from swarmtrain.protocol.membership.membership import Membership, PeerInfo


def bootstrap_of(*volunteers: str) -> tuple[Membership, DepartureQueue]:
    members = Membership(me="boot")
    for peer in volunteers:
        members.saw_presence(PeerInfo(peer=peer, training=True, stamp=0.0), 1e9, 0.0)
    return members, DepartureQueue(members)


def test_the_last_one_stays_until_it_is_archived() -> None:
    _, leavers = bootstrap_of("anna")
    assert leavers.waiting(0.0) == ()
    assert leavers.ask("anna", 1.0) and leavers.ask("anna", 1.5)
    assert leavers.waiting(2.0) == ("anna",)
    leavers.taken(("anna",), 2.5)
    assert not leavers.ask("anna", 3.0)


def test_who_begins_to_ask_is_news_once() -> None:
    _, leavers = bootstrap_of("anna", "ben")
    assert not leavers.take_news()
    assert leavers.ask("anna", 1.0) and leavers.take_news() and not leavers.take_news()
    assert leavers.ask("anna", 1.5) and not leavers.take_news(), "it asks again and again"
    assert leavers.ask("ben", 1.6) and not leavers.ask("nobody", 1.7) and leavers.take_news()


def test_a_look_at_who_waits_while_one_begins_to_ask_loses_nobody() -> None:
    """The network's thread is asked, the bootstrap's looks."""
    _, leavers = bootstrap_of("anna")

    class Looking(dict[str, float]):
        def __setitem__(self, peer: str, now: float) -> None:
            super().__setitem__(peer, now)
            leavers.waiting(now)

    leavers._began_s = Looking()
    assert leavers.ask("anna", 1.0)
    assert leavers.waiting(1.1) == ("anna",) and leavers.ask("anna", 1.2)


def test_who_leaves_others_that_train_on_goes_once_one_of_them_is_heard_of() -> None:
    members, leavers = bootstrap_of("anna", "ben")
    assert leavers.ask("anna", 1.0) and leavers.waiting(1.0) == (), "ben may have been killed a moment ago"
    members.heard("ben", 1.5)
    assert not leavers.ask("anna", 2.0) and leavers.waiting(2.0) == ()
    members.left("anna", 2.1)
    assert leavers.ask("ben", 100.0) and leavers.waiting(100.0) == ("ben",), "ben is the last now"


def test_one_that_was_killed_a_moment_ago_does_not_train_on() -> None:
    """It is believed alive until calls to it have failed often enough."""
    members, leavers = bootstrap_of("anna", "ben")
    members.heard("ben", 0.9)
    assert leavers.ask("anna", 1.0) and leavers.waiting(1.0) == ()
    members.call_failed("ben", 1.5, "refused")
    assert leavers.ask("anna", 1.6) and leavers.waiting(1.7) == ("anna",)


def test_all_that_leave_together_stay_for_one_archive() -> None:
    members, leavers = bootstrap_of("anna", "ben", "carl")
    assert leavers.ask("anna", 1.0) and leavers.ask("ben", 1.1) and leavers.waiting(1.15) == ()
    assert leavers.ask("carl", 1.2)
    assert leavers.waiting(1.3) == ("anna", "ben", "carl")
    members.left("anna", 1.4)
    leavers.taken(("anna", "ben", "carl"), 2.0)
    assert not leavers.ask("ben", 2.1) and not leavers.ask("carl", 2.1)


def test_one_that_asked_and_trains_on_keeps_nobody() -> None:
    members, leavers = bootstrap_of("anna", "ben")
    leavers.ask("anna", 1.0)
    leavers.ask("ben", 10.0)
    members.heard("anna", 10.1)
    assert not leavers.ask("ben", 10.5) and leavers.waiting(10.5) == ()


def test_one_that_comes_back_and_leaves_again_is_archived_again() -> None:
    _, leavers = bootstrap_of("anna")
    leavers.ask("anna", 1.0)
    leavers.taken(leavers.waiting(1.0), 2.0)
    assert not leavers.ask("anna", 2.5)
    assert leavers.ask("anna", 20.0)
    leavers.taken(leavers.waiting(20.0), 20.0)
    assert leavers.ask("anna", 40.0), "what it was to be told in time was never asked for"


def test_who_leaves_soon_after_others_does_not_wait_for_that() -> None:
    """Seen: of lives of a second, one after the other, each waited five seconds for its archive."""
    members, leavers = bootstrap_of()
    for now, peer, is_archived in ((1.0, "anna", True), (2.0, "ben", True), (3.0, "carl", True), (4.0, "dora", False)):
        members.saw_presence(PeerInfo(peer=peer, training=True, stamp=now), 1e9, now)
        assert leavers.ask(peer, now)
        assert leavers.waiting(now) == ((peer,) if is_archived else ())
        leavers.taken((peer,), now)
        members.left(peer, now)


def test_asking_for_the_sake_of_asking_makes_few_archives() -> None:
    _, leavers = bootstrap_of("mallory")
    made = 0
    for tenth in range(1000):
        leavers.ask("mallory", tenth / 10)
        if who := leavers.waiting(tenth / 10):
            leavers.taken(who, tenth / 10)
            made += 1
    assert 17 < made <= 20 + 2, "every five seconds, but for three at first"


def test_strangers_and_those_who_do_not_train_need_not_ask() -> None:
    members, leavers = bootstrap_of()
    members.saw_presence(PeerInfo(peer="guest", stamp=0.0), 1e9, 0.0)
    for peer in ("nobody", "guest", "boot"):
        assert not leavers.ask(peer, 1.0)
    assert leavers.waiting(1.0) == ()


# ---------------------------------------------------------------- what the leaver makes of it


def members_of(*bootstraps: PeerInfo) -> Membership:
    members = Membership(me="me")
    for info in bootstraps:
        members.saw_presence(info, 1e9, 0.0)
    return members


BOOT = PeerInfo(peer="boot", is_bootstrap=True, stamp=0.0, round=3)


def test_what_a_bootstrap_says_counts_before_all_else() -> None:
    members = members_of(BOOT)
    assert before_leaving(members, [None, True], 9, 1e9) is Leave.HAND_OVER
    assert before_leaving(members, [None, False], 9, 0.0) is Leave.GO


def test_the_last_holder_waits_a_minute_for_one_that_does_not_answer() -> None:
    members = members_of(BOOT)
    assert before_leaving(members, [None], 9, 0.0) is Leave.WAIT
    assert before_leaving(members, [None], 9, LAST_HOLDER_S) is Leave.GO_UNARCHIVED
    assert before_leaving(members, [None], 3, 0.0) is Leave.GO, "it told of an archive of that round"
    assert before_leaving(members, [None], 0, 0.0) is Leave.GO, "nothing was merged"
    members.call_failed("boot", 1.0, "gone")
    members.call_failed("boot", 9.0, "gone")
    assert before_leaving(members, [], 9, 0.0) is Leave.WAIT, "lost, and perhaps on its way back"


@pytest.mark.parametrize("has_left", [True, False])
def test_where_no_bootstrap_is_on_its_way_it_says_where_the_work_is(has_left: bool) -> None:
    members = members_of(*[BOOT] * has_left)
    members.left("boot", 5.0)
    assert before_leaving(members, [], 9, 0.0) is Leave.GO_UNARCHIVED
    members.saw_presence(PeerInfo(peer="ben", training=True, stamp=6.0), 1e9, 6.0)
    assert before_leaving(members, [], 9, 0.0) is Leave.GO, "ben trains on"


def test_of_those_who_leave_together_one_waits_for_the_bootstrap() -> None:
    """Each took the other for one that trains on, and nobody waited."""
    names = ("anna", "ben", "carl")
    fellows = {name: FellowDepartures(name) for name in names}
    leaves = {}
    for name in names:
        members = Membership(me=name)
        for info in (BOOT, *(PeerInfo(peer=other, training=True, stamp=1.0) for other in names if other != name)):
            members.saw_presence(info, 1e9, 1.0)
        fellows[name].told = {other for other in names if other != name and fellows[other].ask(name, 1.0)}
        leaves[name] = before_leaving(members, [None], 9, 0.0, fellows[name].leaving)
    assert leaves == {"anna": Leave.WAIT, "ben": Leave.GO, "carl": Leave.GO}


def test_who_was_let_go_is_not_counted_on() -> None:
    anna, ben = FellowDepartures("anna"), FellowDepartures("ben")
    assert not anna.ask("ben", 1.0), "anna stays, and ben may go"
    assert anna.leaving == {"ben"}, "though ben had told a moment ago that it trains"
    ben.is_going = True
    assert ben.ask("carl", 2.0) and ben.ask("anna", 2.0), "one that is on its way holds nothing for others"
    for number in range(3000):
        anna.ask(f"invented {number}", 3.0)
    assert len(anna.leaving) <= 1024

"""Hidden peers: who is hidden, which hosts it chooses and replaces, and whom a host serves."""

from __future__ import annotations

import random

import pytest

from swarmtrain.protocol.membership.hosts import (
    MAX_GUESTS,
    Guests,
    HostCandidate,
    HostChoice,
    HostOrder,
    Reach,
    Reachability,
    callable_first,
    from_outside,
    host_candidates,
    most_guests,
)
from swarmtrain.protocol.membership.membership import Membership, PeerInfo, PeerState

RNG = random.Random(1)


# ---------------------------------------------------------------- who is hidden


def after(*answers: list[bool | None]) -> Reachability:
    reach = Reachability()
    for now, each in enumerate(answers):
        reach.told(each, float(now), RNG)
    return reach


@pytest.mark.parametrize(
    ("answers", "state"),
    [
        ([], Reach.UNKNOWN),
        ([[]], Reach.UNKNOWN),
        ([[None, None, None]], Reach.UNKNOWN),
        ([[False]], Reach.UNKNOWN),
        ([[False, None]], Reach.UNKNOWN),
        ([[False, False, None]], Reach.HIDDEN),
        ([[False], [False]], Reach.HIDDEN),
        ([[False, False, True]], Reach.DIALABLE),
        ([[True], [False, False]], Reach.DIALABLE),
        ([[True], [False, False], [None], [False, False]], Reach.HIDDEN),
        ([[True], [False, False], [True], [False, False]], Reach.DIALABLE),
        ([[False, False], [None]], Reach.HIDDEN),
        ([[False, False], [False, True]], Reach.DIALABLE),
    ],
)
def test_one_who_reached_it_is_enough_and_several_must_fail(answers: list[list[bool | None]], state: Reach) -> None:
    assert after(*answers).state is state


def test_it_is_asked_again_soon_while_it_is_not_known_and_seldom_afterwards() -> None:
    reach, now = Reachability(), 100.0
    assert reach.is_due(now)
    assert "nobody could say" in reach.told([None], now, RNG)
    assert not reach.is_due(now + 3) and reach.is_due(now + 7)
    assert "2 of 2 could dial" in reach.told([True, True], now, RNG)
    assert not reach.is_due(now + 400) and reach.is_due(now + 800)
    reach.told([False] * 3, now, RNG)
    assert reach.is_due(now + 7), "a dialable peer that nobody reached is looked at again at once"
    assert "nobody can dial it: 6 tried and failed" in reach.told([False] * 3, now, RNG)
    for wait_s in (15, 30, 60, 120, 180, 180):  # it may have been by chance
        assert not reach.is_due(now + 0.7 * wait_s) and reach.is_due(now + 1.3 * wait_s)
        reach.told([False] * 3, now, RNG)
    assert reach.state is Reach.HIDDEN


def test_what_the_neighbours_say_counts_only_if_nobody_outside_can_say() -> None:
    assert from_outside([(True, False), (False, True), (False, True)]) == [False, False]
    assert from_outside([(True, False), (None, True)]) == [True, None]
    assert from_outside([(False, False), (True, True)]) == [True]
    assert from_outside([]) == []


# ---------------------------------------------------------------- hosts


def candidates(**guests: int) -> list[HostCandidate]:
    return [HostCandidate(peer=peer, num_guests=number) for peer, number in guests.items()]


def test_the_two_with_the_fewest_guests_are_asked() -> None:
    choice = HostChoice(me="me")
    changes = choice.choose(candidates(a=3, b=1, c=0, d=2, me=0, full=MAX_GUESTS), 0.0)
    assert set(choice.chosen) == {"b", "c"} and choice.serving == ()
    assert changes == [
        "c is asked to be a host: it serves 0 hidden peers",
        "b is asked to be a host: it serves 1 hidden peer",
    ]
    assert choice.choose(candidates(a=0, b=1, c=0, d=2), 1.0) == [], "those it has stay"
    choice.answered("b", True, 2.0)
    assert choice.serving == ("b",)


def test_a_host_without_a_place_and_a_silent_one_are_replaced_and_left_alone() -> None:
    choice = HostChoice(me="me")
    everyone = candidates(a=0, b=1, c=2, d=3)
    choice.choose(everyone, 0.0)
    choice.answered("a", True, 0.0)
    assert "no place" in choice.answered("b", False, 0.0)
    choice.choose(everyone, 1.0)
    choice.answered("c", True, 1.0)
    assert choice.serving == ("a", "c")
    for now in (4.0, 8.0):
        choice.answered("c", True, now)
    (gone, new) = choice.choose(everyone, 11.0)
    assert gone == "a is replaced: silent for 11 s: left alone for 15 s" and new.startswith("d is asked")
    choice.choose(everyone, 27.0)
    assert set(choice.chosen) == {"b", "a"}, "c and d have been silent for long by now, the others may be asked again"


def test_a_host_that_seems_gone_stays_while_it_answers() -> None:
    choice = HostChoice(me="me")
    choice.choose(candidates(a=0, b=0), 0.0)
    choice.answered("a", True, 0.0)
    choice.choose(candidates(c=0), 1.0)
    assert choice.chosen == ("a", "c"), "b was no host yet"
    choice.clear()
    assert choice.chosen == ()


def test_when_one_of_two_hosts_dies_the_only_other_peer_takes_over_though_it_failed_before() -> None:
    """It had been left alone for two minutes whatever happened meanwhile: until then the peer had one host."""
    choice = HostChoice(me="me")
    choice.choose(candidates(a=0, b=0, c=1), 0.0)
    choice.answered("a", True, 0.0)
    choice.choose(candidates(a=0, c=1), 1.0)  # b seemed to be gone
    choice.answered("c", True, 1.0)
    for now in (4.0, 8.0, 12.0):
        choice.answered("c", True, now)
        choice.choose(candidates(b=0, c=1), now)
    assert choice.chosen == ("c", "b"), "a has been silent"


def test_guests_come_first_and_go_when_they_are_silent_or_say_so() -> None:
    guests = Guests(most=2)
    assert guests.ask("a", 0.0)[0] and guests.ask("b", 1.0)[0]
    assert guests.ask("c", 2.0) == (False, "2 hidden peers are served already")
    assert guests.ask("a", 20.0) == (True, "it was hosted before")
    assert guests.ask("c", 32.0)[0] and guests.current(32.0) == ("a", "c"), "b was silent for 30 s"
    guests.left("a")
    guests.left("nobody")
    assert guests.current(33.0) == ("c",)


def test_a_host_has_fewer_guests_where_publications_are_large() -> None:
    assert most_guests(1) == MAX_GUESTS and most_guests(300_000_000) == 3 and most_guests(10**12) == 1


# ---------------------------------------------------------------- what others make of it


def test_candidates_are_those_that_can_be_dialled_with_the_guests_they_are_announced_to_have() -> None:
    live = [
        PeerInfo(peer="a", addresses=("/ip4/10.0.0.1/tcp/1",)),
        PeerInfo(peer="b", addresses=("/ip4/10.0.0.2/tcp/1",), is_bootstrap=True),
        PeerInfo(peer="c", hidden=True, hosts=("a", "x")),
        PeerInfo(peer="d", hidden=True, hosts=("a",)),
        PeerInfo(peer="e"),
        PeerInfo(peer="f", addresses=("/ip4/10.0.0.3/tcp/1",), hosts=("a",)),
    ]
    found = {one.peer: one.num_guests for one in host_candidates(live)}
    assert found == {"a": 2, "b": 0, "f": 0}
    assert [info.peer for info in callable_first(live)] == ["a", "b", "e", "f"]
    assert [info.peer for info in callable_first(live[2:4])] == ["c", "d"]


def test_a_hidden_peer_is_not_lost_because_calls_fail_but_because_its_presence_runs_out() -> None:
    table = Membership("me")
    table.saw_presence(PeerInfo(peer="a", stamp=0.0, hidden=True, hosts=("h",)), 30.0, 0.0)
    for now in range(1, 20):
        assert table.call_failed("a", float(now), "nobody can dial it") is None
    assert table.state("a") is PeerState.LIVE
    (change,) = table.expire(31.0)
    assert change.state is PeerState.LOST


def test_one_that_was_lost_again_and_again_is_believed_once_it_says_why() -> None:
    table = Membership("me")
    for start in (0.0, 10.0, 30.0):
        table.saw_presence(PeerInfo(peer="a", stamp=start + 5), start + 99, start + 5)
        for late in (6, 8):
            table.call_failed("a", start + late, "no answer")
    assert table.state("a") is PeerState.LOST
    table.saw_presence(PeerInfo(peer="a", stamp=39.0), 99.0, 39.0)
    assert table.state("a") is PeerState.LOST, "it is banned"
    table.saw_presence(PeerInfo(peer="a", stamp=39.5, hidden=True), 99.0, 39.5)
    assert table.state("a") is PeerState.LIVE


def test_a_reader_asks_others_than_itself_and_last_who_has_just_failed() -> None:
    order = HostOrder(me="anna", rng=random.Random(1))
    assert sorted(order.of(("anna", "ben", "cleo", "dora"), 0.0)) == ["ben", "cleo", "dora"]
    order.back_off.failed("ben", 0.0, "unreachable")
    assert {order.of(("ben", "cleo"), 1.0)[-1] for _ in range(20)} == {"ben"}
    assert {order.of(("ben", "cleo"), 9.0)[-1] for _ in range(20)} == {"ben", "cleo"}

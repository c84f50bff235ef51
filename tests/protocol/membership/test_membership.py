"""Membership: who is believed alive, from presences, answers, failures and goodbyes."""

from __future__ import annotations

import itertools
from typing import Any

from swarmtrain.protocol.membership.membership import Membership, PeerInfo, PeerState

LIVE, LOST, LEFT = PeerState.LIVE, PeerState.LOST, PeerState.LEFT


def info(peer: str = "a", stamp: float = 0.0, **more: Any) -> PeerInfo:
    return PeerInfo(peer=peer, stamp=stamp, training=True, **more)


def table(stamp: float = 0.0, now: float = 0.0) -> Membership:
    members = Membership(me="me")
    change = members.saw_presence(info(stamp=stamp), stamp + 30, now)
    assert change is not None
    assert change.state is LIVE
    return members


def lose(members: Membership, now: float) -> None:
    assert members.call_failed("a", now, "no answer") is None
    change = members.call_failed("a", now + 1.5, "no answer")
    assert change is not None
    assert (change.state, change.reason) == (LOST, "no answer")


def test_oneself_and_strangers_are_not_in_it() -> None:
    members = Membership(me="me")
    assert members.saw_presence(info("me"), 30, 0) is None
    members.heard("a", 1.0, round=3)
    assert members.call_failed("a", 1.0, "x") is None
    assert members.left("a", 1.0) is None
    assert members.state("a") is None
    assert members.info("a") is None
    assert members.heard_s("a") == float("-inf")
    assert members.live() == []


def test_a_presence_that_has_run_out_brings_nobody() -> None:
    members = Membership(me="me")
    assert members.saw_presence(info(stamp=1.0), 31.0, 40.0) is None
    assert members.state("a") is None


def test_an_old_presence_is_not_a_word_heard_now() -> None:
    members = table(stamp=2.0, now=9.0)
    assert members.heard_s("a") == 2.0
    members.saw_presence(info(stamp=12.0), 42.0, 20.0)
    assert members.heard_s("a") == 12.0
    members.heard("a", 21.0)
    members.saw_presence(info(stamp=13.0), 43.0, 22.0)
    assert members.heard_s("a") == 21.0


def test_calls_must_fail_often_and_long_enough() -> None:
    members = table()
    for now in (1.0, 1.2, 1.9):
        assert members.call_failed("a", now, "x") is None
    assert members.call_failed("a", 2.0, "x") is not None
    assert members.call_failed("a", 3.0, "x") is None, "it is lost already"


def test_an_answer_starts_the_count_anew_and_a_renewal_does_not() -> None:
    members = table()
    members.call_failed("a", 1.0, "x")
    members.heard("a", 1.5)
    assert members.call_failed("a", 3.0, "x") is None
    members.saw_presence(info(stamp=3.5), 33.5, 3.6)
    assert members.call_failed("a", 4.1, "x") is not None


def test_only_a_presence_newer_than_the_loss_brings_it_back() -> None:
    members = table()
    lose(members, 10.0)
    assert members.saw_presence(info(stamp=9.0), 39.0, 12.0) is None, "renewed before it was lost, read after"
    assert members.state("a") is LOST
    members.heard("a", 13.0)
    assert members.state("a") is LOST
    change = members.saw_presence(info(stamp=12.0), 42.0, 14.0)
    assert change is not None
    assert members.state("a") is LIVE


def test_a_call_of_its_own_brings_back_who_was_lost() -> None:
    members = table()
    assert members.was_called_by("a", 1.0) is None, "it is not lost"
    assert members.was_called_by("b", 1.0) is None, "nobody that it knows"
    assert [change.state for change in members.expire(31.0)] == [LOST]
    change = members.was_called_by("a", 40.0)
    assert change is not None and (change.state, members.state("a"), members.heard_s("a")) == (LIVE, LIVE, 40.0)
    assert members.expire(44.0) == [], "until its next record is here"
    lose(members, 44.0)
    assert members.was_called_by("a", 46.0) is not None
    lose(members, 47.0)
    assert members.was_called_by("a", 50.0) is None, "its calls come through, and calls to it do not"
    assert members.was_called_by("a", 58.0) is not None
    members.left("a", 59.0)
    assert members.was_called_by("a", 60.0) is None, "it asked before it said goodbye"


def test_who_calls_after_a_call_to_it_has_failed_is_counted_again() -> None:
    """Who was cut off, and calls nobody while it computes, would else count nobody for a whole batch."""
    members = table()
    members.call_failed("a", 1.0, "x")
    assert members.answering() == [] == members.in_touch()
    members.was_called_by("a", 2.0)
    assert [each.peer for each in members.in_touch()] == ["a"] and members.answering() == []
    assert members.call_failed("a", 3.0, "x") is not None, "that calls to it fail is counted all the same"


def test_one_that_calls_never_reach_comes_back_ever_more_slowly() -> None:
    members, returns, now = table(), [], 0.0
    while now < 1000:
        if members.state("a") is LIVE:
            returns.append(now)
            lose(members, now + 1)
        now += 5
        members.saw_presence(info(stamp=now), now + 30, now)
    gaps = [b - a for a, b in itertools.pairwise(returns)]
    assert gaps == sorted(gaps)
    assert gaps[0] <= 10
    assert gaps[-1] > 200
    members.heard("a", now)
    members.saw_presence(info(stamp=now + 2000), now + 2030, now + 2000)
    lose(members, now + 2001)
    assert members.saw_presence(info(stamp=now + 2005), now + 2035, now + 2005) is not None, "an answer forgives"


def test_goodbye_holds_against_presences_from_before() -> None:
    members = table()
    change = members.left("a", 10.0)
    assert change is not None
    assert change.state is LEFT
    assert members.left("a", 11.0) is None
    assert members.saw_presence(info(stamp=9.5), 39.5, 12.0) is None
    assert members.call_failed("a", 12.0, "x") is None
    assert members.saw_presence(info(stamp=12.5), 42.5, 13.0) is not None


def test_presences_expire_unless_something_was_heard() -> None:
    members = table()
    assert members.expire(30.0) == []
    members.heard("a", 29.0)
    assert members.expire(33.9) == []
    assert [change.state for change in members.expire(34.1)] == [LOST]
    assert members.expire(40.0) == []
    assert members.saw_presence(info(stamp=20.0), 50.0, 41.0) is not None, "only our reading of it was late"


def test_after_a_pause_of_ones_own_nobody_is_judged_for_it() -> None:
    members = table()
    members.call_failed("a", 5.0, "x")
    members.resume(500.0)
    assert members.expire(504.0) == []
    assert members.call_failed("a", 500.1, "x") is None
    assert members.state("a") is LIVE
    members.resume(500.5, forgives=False)
    assert members.answering() == [], "it was called after the pause"
    assert members.expire(506.0) != []


def test_what_a_peer_told_itself_beats_an_older_presence() -> None:
    members = table()
    members.heard("a", 5.0, round=7, inner_steps_done=3)
    members.saw_presence(info(stamp=4.0, round=6, inner_steps_done=30), 34.0, 6.0)
    assert (members.live()[0].round, members.live()[0].inner_steps_done) == (7, 3)
    members.saw_presence(info(stamp=14.0, round=6), 44.0, 20.0)
    assert members.live()[0].round == 6, "it went back to others' weights long ago"
    members.heard("a", 21.0, round=5)
    assert members.live()[0].round == 5
    assert members.live()[0].inner_steps_done == 3 or members.live()[0].inner_steps_done == 0


def test_volunteers_are_the_live_ones_that_train() -> None:
    members = Membership(me="me")
    members.saw_presence(info("c"), 30, 0)
    members.saw_presence(info("a"), 30, 0)
    members.saw_presence(PeerInfo(peer="b", is_bootstrap=True, training=True), 30, 0)
    members.saw_presence(PeerInfo(peer="d"), 30, 0)
    members.saw_presence(info("e"), 30, 0)
    members.left("e", 1.0)
    assert [i.peer for i in members.live()] == ["a", "b", "c", "d"]
    assert [i.peer for i in members.volunteers()] == ["a", "c"]
    members.call_failed("a", 2.0, "refused")
    assert [i.peer for i in members.answering()] == ["c"]
    members.heard("a", 3.0)
    assert [i.peer for i in members.answering()] == ["a", "c"]


def test_who_tells_anew_that_it_is_as_far_as_before_has_been_so_since_then() -> None:
    members = Membership(me="me")
    members.saw_presence(info(stamp=1.0, round=3, inner_steps_done=10), 31, 2.0)
    members.saw_presence(info(stamp=9.0, round=3, inner_steps_done=10), 39, 9.5)
    assert members.so_far_since_s("a") == 1.0, "it has stood still"
    members.saw_presence(info(stamp=19.0, round=3, inner_steps_done=11), 49, 19.5)
    assert members.so_far_since_s("a") == 19.0
    members.heard("a", 21.0, round=3, inner_steps_done=11)
    assert members.so_far_since_s("a") == 19.0
    members.heard("a", 23.0, round=4, inner_steps_done=0)
    assert members.so_far_since_s("a") == 23.0
    members.saw_presence(info(stamp=99.0, round=5), 129, 90.0)
    assert members.so_far_since_s("a") == 90.0, "a clock that is ahead"
    assert members.so_far_since_s("nobody") == float("-inf")


def test_who_looks_when_the_version_grows_sees_who_has_come_back() -> None:
    """The trainer's thread may look between any two lines, and looks again only when the version has grown."""
    seen: list[list[str]] = []

    class Watched(Membership):
        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, value)
            if name == "version" and value:
                seen.append([one.peer for one in self.volunteers()])

    members = Watched(me="me")
    members.saw_presence(info(stamp=0.0), 30.0, 0.0)
    members.left("a", 1.0)
    members.saw_presence(info(stamp=2.0), 32.0, 2.0)
    assert seen == [["a"], [], ["a"]]


def test_of_volunteers_without_a_bootstrap_one_measures() -> None:
    members = Membership(me="me")
    assert members.measurer() == "me"
    members.saw_presence(info("z"), 30, 0)
    members.saw_presence(PeerInfo(peer="b", is_bootstrap=True), 30, 0)
    assert members.measurer() == "b"
    members.left("b", 1.0)
    assert members.measurer() == "me"
    members.saw_presence(info("a"), 30, 1.0)
    assert members.measurer() == "a"
    members.expire(40.0)
    assert members.measurer() == "me", "the other is gone"

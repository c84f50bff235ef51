"""The end of a run: who is waited for."""

from __future__ import annotations

from typing import Any

from swarmtrain.membership.ending import still_needed
from swarmtrain.membership.lifecycle import Membership, PeerInfo
from swarmtrain.membership.progress import Progress

LAST = Progress(round=9, run_tokens=1000)


def table(**peers: dict[str, Any]) -> Membership:
    members = Membership(me="me")
    for peer, fields in peers.items():
        members.saw_presence(PeerInfo(peer=peer, name=peer, stamp=100.0, **fields), 130.0, 100.0)
    return members


ARCHIVE, ARCHIVED = ({"is_bootstrap": True, "round": 8, "run_tokens": tokens} for tokens in (900, 1000))
BEHIND, DONE = ({"training": True, "round": round} for round in (8, 9))


def test_nobody_is_waited_for_by_the_last_or_by_those_who_all_have_it() -> None:
    assert still_needed(table(), LAST, 100.0) == ""
    assert still_needed(table(boot=ARCHIVED, ben=DONE), LAST, 100.0) == ""


def test_the_archive_and_the_living_are_waited_for() -> None:
    assert "archive of boot" in still_needed(table(boot=ARCHIVE, ben=DONE), LAST, 100.0)
    assert "ben has not merged" in still_needed(table(boot=ARCHIVED, ben=BEHIND), LAST, 100.0)


def test_an_archive_that_was_just_lost_may_come_back_and_one_that_left_does_not() -> None:
    members = table(boot=ARCHIVE)
    members.expire(131.0)
    assert still_needed(members, LAST, 159.0)
    assert still_needed(members, LAST, 161.0) == "", "gone for a minute: it is gone"
    members = table(boot=ARCHIVE)
    members.left("boot", 101.0)
    assert still_needed(members, LAST, 102.0) == ""


def test_volunteers_that_are_lost_or_left_are_not_waited_for() -> None:
    members = table(ben=BEHIND, carl=BEHIND)
    members.left("carl", 101.0)
    assert "ben" in still_needed(members, LAST, 102.0)
    members.call_failed("ben", 102.0, "no answer")
    members.call_failed("ben", 104.0, "no answer")
    assert still_needed(members, LAST, 104.0) == ""

"""End of a run: which peers are waited for."""

from __future__ import annotations

from typing import Any

from swarmtrain.protocol.membership.membership import Membership, PeerInfo, may_come_back, still_needed
from swarmtrain.protocol.tokens.progress import Progress

LAST = Progress(round=9, run_tokens=1000)


def table(**peers: dict[str, Any]) -> Membership:
    members = Membership(me="me")
    for peer, fields in peers.items():
        members.saw_presence(PeerInfo(peer=peer, name=peer, stamp=100.0, **fields), 130.0, 100.0)
    return members


ARCHIVE, ARCHIVED = ({"is_bootstrap": True, "round": 8, "run_tokens": tokens} for tokens in (900, 1000))
BEHIND, DONE = ({"training": True, "round": round} for round in (8, 9))


def test_nobody_is_waited_for_by_the_last_or_by_those_who_all_have_it() -> None:
    assert still_needed(table(), LAST) == ""
    assert still_needed(table(boot=ARCHIVED, ben=DONE), LAST) == ""


def test_the_archive_and_the_living_are_waited_for() -> None:
    assert "archive of boot" in still_needed(table(boot=ARCHIVE, ben=DONE), LAST)
    assert "ben has not merged" in still_needed(table(boot=ARCHIVED, ben=BEHIND), LAST)


def test_an_archive_that_is_gone_may_come_back() -> None:
    members = table(boot=ARCHIVE)
    members.expire(131.0)
    assert "archive of boot" in still_needed(members, LAST)
    members = table(boot=ARCHIVE)
    members.left("boot", 101.0)
    assert "archive of boot" in still_needed(members, LAST)
    members.forget(200.0)
    assert still_needed(members, LAST) == "", "it was gone for so long that it is forgotten"


def test_volunteers_that_are_lost_or_left_are_not_waited_for() -> None:
    members = table(ben=BEHIND, carl=BEHIND)
    members.left("carl", 101.0)
    assert "ben" in still_needed(members, LAST)
    members.call_failed("ben", 102.0, "no answer")
    members.call_failed("ben", 104.0, "no answer")
    assert still_needed(members, LAST) == ""


def test_the_archive_stays_for_those_who_went_away_lately_without_the_end() -> None:
    members = table(ben=BEHIND, carl=DONE)
    assert "has not left yet" in may_come_back(members, LAST, 0.0, 101.0)
    members.left("carl", 101.0)
    members.left("ben", 101.0)
    assert "ben went away before the end" in may_come_back(members, LAST, 0.0, 102.0)
    assert may_come_back(members, LAST, 0.0, 300.0) == "", "it was away for long"
    members = table(carl=DONE, boot=ARCHIVED)
    members.left("carl", 101.0)
    assert may_come_back(members, LAST, 0.0, 102.0) == ""


def test_an_archive_that_was_just_started_stays_for_those_it_has_not_seen() -> None:
    members = table(carl=DONE, boot=ARCHIVED)
    members.left("carl", 101.0)
    last = Progress(round=9, run_tokens=1000, peer_tokens={"carl": 600, "ben": 400})
    assert "ben has trained" in may_come_back(members, last, 90.0, 102.0)
    assert may_come_back(members, last, 90.0, 300.0) == ""
    assert may_come_back(members, last, -50.0, 102.0) == "", "it would have seen ben, had it been here"

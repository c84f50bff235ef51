"""Readers of a peer: who may read now, and who gives way to whom."""

from __future__ import annotations

import pytest

from swarmtrain.protocol.membership.budgets import GIVES_WAY_S, Reader, Readers

MOST = 4


def full(now: float = 0.0) -> tuple[Readers, list[Reader]]:
    """Two of mallory's and two of eve's, who take and take."""
    readers = Readers(20.0)
    inside = [readers.admit(peer, MOST, now)[0] for peer in ("mallory", "mallory", "eve", "eve")]
    assert all(inside)
    return readers, [reader for reader in inside if reader is not None]


def take(readers: Readers, inside: list[Reader], until_s: float, bytes_per_s: list[float]) -> None:
    """Each takes a piece a second."""
    for second in range(1, int(until_s) + 1):
        for reader, rate in zip(inside, bytes_per_s, strict=True):
            readers.takes(reader, int(rate), float(second))


def test_nobody_gives_way_before_its_time_and_then_the_slowest() -> None:
    readers, inside = full()
    take(readers, inside, GIVES_WAY_S - 1, [54e3, 40e3, 1e6, 54e3])
    assert not readers.has_room_for("anna", MOST, GIVES_WAY_S - 1)
    assert readers.admit("anna", MOST, GIVES_WAY_S - 1) == (None, None)
    take(readers, inside, GIVES_WAY_S, [54e3, 40e3, 1e6, 54e3])
    assert readers.has_room_for("anna", MOST, GIVES_WAY_S)
    anna, gone = readers.admit("anna", MOST, GIVES_WAY_S)
    assert anna is not None and gone is inside[1] and gone not in readers and len(readers) == MOST


def test_while_there_are_places_nobody_gives_way_however_slow() -> None:
    readers = Readers(20.0)
    slow, _ = readers.admit("slow", MOST, 0.0)
    assert slow is not None
    readers.takes(slow, 1, 1000.0)
    assert [readers.admit(peer, MOST, 1000.0)[1] for peer in ("a", "b", "c")] == [None] * 3 and slow in readers


def test_who_has_as_many_places_as_another_does_not_drive_it_out() -> None:
    """Nor does one that asks all the time get more than its half."""
    readers = Readers(20.0)
    for peer in ("anna", "ben", "carl", "dora"):
        readers.admit(peer, MOST, 0.0)
    now = GIVES_WAY_S + 5
    for reader in list(readers._inside):
        readers.takes(reader, 1, now)
    assert not readers.has_room_for("anna", MOST, now) and readers.admit("ben", MOST, now) == (None, None)
    assert readers.has_room_for("eve", MOST, now), "one that has none"


def test_the_time_that_it_waits_for_us_is_not_its_own() -> None:
    """Our link is limited: each piece waits for its turn, and nobody is slow."""
    readers, inside = full()
    for second in range(0, 300, 3):
        for reader in inside:
            readers.waits(reader, float(second) + 0.1)
            readers.takes(reader, 1000, float(second) + 3.0)
    assert all(reader.own_s(300.0) == pytest.approx(10.0, abs=0.2) for reader in inside)
    assert not readers.has_room_for("anna", MOST, 300.0)


def test_one_that_takes_nothing_loses_its_place_before_any_other() -> None:
    readers, inside = full()
    take(readers, inside[1:], 25, [1e6, 1e3, 1e6])
    _, gone = readers.admit("anna", MOST, 25.0)
    assert gone is inside[0]


def test_places_go_in_the_order_of_asking_and_not_to_the_one_that_has_just_left() -> None:
    readers = Readers(20.0, in_order=True)
    inside = [readers.admit(peer, 2, 0.0)[0] for peer in ("anna", "ben")]
    assert [readers.admit(peer, 2, 1.0)[0] for peer in ("carl", "dora")] == [None, None]
    assert inside[0] is not None
    readers.leaves(inside[0])
    assert readers.admit("anna", 2, 1.1) == (None, None), "carl and dora asked before"
    assert readers.admit("dora", 2, 1.2) == (None, None), "carl asked before"
    carl, gone = readers.admit("carl", 2, 1.3)
    assert carl is not None and gone is None
    readers.leaves(carl)
    assert readers.admit("dora", 2, 1.4)[0] is not None
    assert len(readers) == 2


def test_a_place_is_kept_only_for_a_moment_and_never_for_one_that_has_half_of_them() -> None:
    readers = Readers(20.0, in_order=True)
    anna, _ = readers.admit("anna", 2, 0.0)
    assert readers.admit("anna", 2, 0.5) == (None, None), "it has its half"
    ben, _ = readers.admit("ben", 2, 0.6)
    assert anna is not None and ben is not None, "and nothing was kept for it"
    assert readers.admit("carl", 2, 1.0) == (None, None)
    readers.leaves(ben)
    assert readers.admit("ben", 2, 2.9) == (None, None)
    assert readers.admit("ben", 2, 3.1)[0] is not None, "carl has not come back"


def test_without_an_order_a_place_is_the_next_askers() -> None:
    readers = Readers(20.0)
    anna, _ = readers.admit("anna", 1, 0.0)
    assert readers.admit("ben", 1, 0.1) == (None, None) and anna is not None
    readers.leaves(anna)
    assert readers.admit("anna", 1, 0.2)[0] is not None


def test_any_number_of_strangers_keeps_no_volunteer_from_what_its_round_averages() -> None:
    readers, now = Readers(20.0, in_order=True, goes_first={"anna", "ben", "carl"}.__contains__), 0.0
    inside = [readers.admit(f"stranger {number}", 2, now)[0] for number in range(2)]
    for number in range(2, 600):
        assert readers.admit(f"stranger {number}", 2, now) == (None, None)
    anna, gone = readers.admit("anna", 2, 1.0)
    assert anna is not None and gone in inside, "at once"
    ben, gone = readers.admit("ben", 2, 1.1)
    assert ben is not None and gone in inside
    assert readers.admit("carl", 2, 1.2) == (None, None), "volunteers do not drive each other out"
    readers.leaves(anna)
    assert readers.admit("stranger 2", 2, 1.3) == (None, None), "carl goes before it"
    assert readers.admit("anna", 2, 1.4) == (None, None), "and before anna"
    assert readers.admit("carl", 2, 1.5)[0] is not None
    readers.leaves(ben)
    assert readers.admit("anna", 2, 1.6)[0] is not None


def test_strangers_alone_read_in_order() -> None:
    readers = Readers(20.0, in_order=True, goes_first=lambda peer: False)
    first, _ = readers.admit("anna", 1, 0.0)
    assert first is not None and readers.admit("ben", 1, 0.1) == (None, None) == readers.admit("carl", 1, 0.2)
    readers.leaves(first)
    assert readers.admit("carl", 1, 0.3) == (None, None) and readers.admit("ben", 1, 0.4)[0] is not None

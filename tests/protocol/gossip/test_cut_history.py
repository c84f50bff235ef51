"""Reports of peers whose publications were clipped."""

from __future__ import annotations

import random

import pytest

from swarmtrain.protocol.gossip.cut_history import NAMED_AT, CutHistory


def named_at(*cut: bool, kind: str = "gradient") -> list[int]:
    """Return the rounds in which a peer is reported, each checked once."""
    history = CutHistory()
    return [round for round, is_cut in enumerate(cut) if history.look("ben", kind, round, is_cut=is_cut)]


def test_who_is_cut_in_each_round_is_named_from_the_third_on() -> None:
    assert named_at(*[True] * 6) == [2, 3, 4, 5]


def test_a_clean_round_takes_a_cut_one_away() -> None:
    assert named_at(True, True, False, True) == []
    assert named_at(True, True, False, True, True) == [4]
    assert named_at(*[True, True, False, False] * 20) == []
    assert named_at(True, True, True, False, True, False, False, True) == [2, 4], "no sooner forgotten than it counts"


def test_a_round_counts_once_however_often_it_is_looked_at() -> None:
    history = CutHistory()
    assert not any(history.look("ben", "gradient", round, is_cut=True) for round in (7, 7, 8, 7, 8, 8, 7))
    assert history.look("ben", "gradient", 9, is_cut=True)


@pytest.mark.parametrize("clean_first", [True, False])
def test_a_round_with_one_cut_is_cut_whatever_else_came_of_it(clean_first: bool) -> None:
    history, named = CutHistory(), list[int]()
    for round in range(4):
        for is_cut in (not clean_first, clean_first):
            if history.look("ben", "gradient", round, is_cut=is_cut):
                named.append(round)
    assert named == [2, 3]


def test_peers_and_kinds_are_counted_apart() -> None:
    history = CutHistory()
    for round in range(2):
        for peer, kind in (("ben", "gradient"), ("ben", "weights"), ("carl", "gradient")):
            assert not history.look(peer, kind, round, is_cut=True)
        assert not history.look("ben", "more", round, is_cut=False)
    assert not history.look("carl", "weights", 2, is_cut=True)
    assert history.look("ben", "gradient", 2, is_cut=True)
    assert not history.look("ben", "weights", 2, is_cut=False), "nobody is named for what was not cut"


def test_one_that_comes_back_has_forgotten() -> None:
    history = CutHistory()
    for round in range(2):
        history.look("ben", "gradient", round, is_cut=True)
    history.forget()
    assert not history.look("ben", "gradient", 2, is_cut=True)


def test_identities_cost_no_memory() -> None:
    history = CutHistory()
    for number in range(5000):
        history.look(f"peer {number}", "gradient", 0, is_cut=True)
        history.look("ben", "gradient", number, is_cut=True)
    assert len(history._histories) == 1024 and history.look("ben", "gradient", 5000, is_cut=True)


def test_whoever_is_cut_in_most_rounds_is_named_soon_and_in_few_never() -> None:
    rng = random.Random(5)
    often = [named_at(*(rng.random() < 0.9 for _ in range(12))) for _ in range(200)]
    assert sum(bool(each) and each[0] < 8 for each in often) >= 195
    seldom = [named_at(*(rng.random() < 0.02 for _ in range(100))) for _ in range(200)]
    assert sum(map(bool, seldom)) <= 4 and NAMED_AT == 3

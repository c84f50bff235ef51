"""Signers that let their turn pass: after two such rounds passed over, for ever longer, and forgiven when they sign."""

from __future__ import annotations

import itertools

from swarmtrain.protocol.rounds.signers import Signers


def rounds_with_a_turn(signers: Signers, rounds: range) -> list[int]:
    """Return in which of `rounds` "a", which never signs, has its turn."""
    turns = []
    for round in rounds:
        has_turn = "a" not in signers.idle(round)
        turns += [round] if has_turn else []
        signers.round_over(round, ["a"] if has_turn else [], [] if has_turn else ["b"])
    return turns


def test_two_turns_let_pass_and_then_ever_fewer() -> None:
    turns = rounds_with_a_turn(Signers(), range(2000))
    assert turns[:6] == [0, 1, 4, 9, 18, 35]
    gaps = [later - sooner for sooner, later in itertools.pairwise(turns)]
    assert max(gaps) == 257, "for at most so many rounds"


def test_a_turn_taken_makes_up_for_a_quarter_of_one_let_pass() -> None:
    signers = Signers()
    rounds_with_a_turn(signers, range(4))
    signers.round_over(2, [], ["a"])
    signers.round_over(3, [], ["a"])  # out of its turn
    assert not signers.idle(4)
    signers.round_over(4, [], ["a"])
    signers.round_over(5, ["a"], [])
    assert signers.idle(6) == signers.idle(9) == {"a"} and not signers.idle(10)
    for round in range(10, 30):
        signers.round_over(round, [], ["a"])
    assert not signers._records


def test_one_turn_let_pass_is_forgotten_after_four_taken() -> None:
    signers = Signers()
    for start in range(0, 500, 5):
        signers.round_over(start, ["a"], [])
        for round in range(start + 1, start + 5):
            signers.round_over(round, [], ["a"])
        assert not signers.idle(start + 5)
    assert not signers._records


def test_every_other_turn_is_not_enough() -> None:
    signers, idle_rounds = Signers(), 0
    for round in range(1000):
        has_turn = "a" not in signers.idle(round)
        idles = has_turn and round % 2 == 0
        idle_rounds += idles
        signers.round_over(round, ["a"] if idles else [], ["a"] if has_turn and not idles else [])
    assert idle_rounds < 250


def test_what_is_remembered_is_bounded() -> None:
    signers = Signers()
    for number in range(10_000):
        signers.round_over(number, [f"stranger {number}"], [])
    assert len(signers._records) <= 256

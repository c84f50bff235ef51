"""Open pulls of a gossiping peer: how many more, whom not to ask, and what a failure costs."""

from __future__ import annotations

from swarmtrain.protocol.gossip.open_pulls import OpenPulls
from swarmtrain.protocol.gossip.partners import BackOff

PEERS = frozenset({"anna", "ben", "carl"})


def pulls(most: int = 8) -> OpenPulls:
    return OpenPulls(BackOff(), most)


def banned(of: OpenPulls, now: float) -> set[str]:
    return set(PEERS - of.back_off.ready(PEERS, now)[0])


def test_as_many_as_are_due_of_each_section_and_a_slow_one_does_not_count() -> None:
    of = pulls()
    assert of.is_wanted("gradient", 1, (), 5.0, 0.0)
    of.begin("gradient", "anna", 0.0)
    assert not of.is_wanted("gradient", 1, (), 5.0, 4.9)
    assert of.is_wanted("gradient", 2, (), 5.0, 4.9) and of.is_wanted("weights", 1, (), 5.0, 4.9)
    assert of.is_wanted("gradient", 1, (), 5.0, 5.0), "it is slow"
    assert not of.is_wanted("gradient", 1, [("gradient", "ben")], 5.0, 5.0), "but another's is here"
    assert of.coming("gradient", [("gradient", "ben"), ("weights", "carl")]) == {"anna", "ben"}


def test_never_more_than_so_many_at_once() -> None:
    of = pulls(most=2)
    of.begin("gradient", "anna", 0.0)
    of.begin("weights", "anna", 0.0)
    assert not of.is_wanted("gradient", 9, (), 5.0, 100.0)


def test_whom_not_to_ask() -> None:
    of = pulls()
    of.begin("gradient", "anna", 0.0)
    assert of.not_now("gradient", [("gradient", "ben")], 1.0) == {"anna", "ben"}
    assert of.not_now("weights", [("gradient", "ben")], 1.0) == set()
    again_s = of.nothing_new(of.begin("gradient", "carl", 1.0), 1.0, 8.0)
    assert again_s == 1.0 and of.not_now("gradient", (), 1.9) == {"anna", "carl"}
    assert of.not_now("weights", (), 1.9) == set() and of.not_now("gradient", (), 2.0) == {"anna"}
    of.leave_out("weights", "ben", 9.0)
    assert of.not_now("weights", (), 8.9) == {"ben"}
    of.round_begins(5.0)
    assert of.not_now("weights", (), 8.9) == {"ben"} and of.not_now("gradient", (), 8.9) == {"anna"}


def test_a_failure_costs_once_in_a_round_for_both_sections_and_is_not_forgiven_in_it() -> None:
    of = pulls()
    weights, gradient = of.begin("weights", "anna", 0.0), of.begin("gradient", "anna", 0.0)
    assert "left alone for 15 s" in of.fail(weights, 1.0, "no answer")
    assert of.fail(gradient, 20.0, "no answer") == "" and not of.begun
    assert banned(of, 15.9) == {"anna"} and banned(of, 16.0) == set(), "the second did not lengthen it"
    assert of.not_now("gradient", (), 20.0) == {"anna"}
    of.answered("anna")
    assert of.back_off.failed("anna", 20.0, "again") == "again: left alone for 30 s", "it was not forgiven"
    of.round_begins(21.0)
    assert of.not_now("gradient", (), 21.0) == set()
    of.answered("anna")
    assert of.back_off.failed("anna", 21.0, "again") == "again: left alone for 15 s"


def test_a_pull_of_the_round_before_counts_for_that_round() -> None:
    of = pulls()
    old = of.begin("weights", "anna", 0.0)
    of.round_begins(1.0)
    of.give_up(old)
    assert of.not_now("weights", (), 1.0) == set() and banned(of, 1.0) == set()
    late = of.begin("weights", "ben", 1.0)
    of.give_up(late)
    assert of.not_now("weights", (), 1.0) == {"ben"} and banned(of, 1.0) == set()


def test_nothing_new_is_an_answer_and_what_ended_ends_nothing_else() -> None:
    of = pulls()
    of.back_off.failed("anna", 0.0, "no answer")
    first = of.begin("weights", "anna", 1.0)
    of.nothing_new(first, 1.0, 8.0)
    assert banned(of, 1.0) == set()
    second = of.begin("weights", "anna", 2.0)
    of.end(first)
    assert list(of.begun.values()) == [second]

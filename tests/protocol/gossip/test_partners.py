"""Partners, times of pulls, and what is new in a publication: each inner step of a peer enters a merge at most once."""

from __future__ import annotations

import json
import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmtrain.protocol.gossip.partners import (
    VARIANTS,
    BackOff,
    Candidate,
    Delta,
    Full,
    Ledger,
    Partners,
    PublicationVersion,
    Stale,
    WeightsOnly,
    agreed_places,
    is_too_old,
    left_behind,
    median_round,
)


def ledger_with(*versions: tuple[str, int, int, int], max_staleness_rounds: int = 8) -> Ledger:
    ledger = Ledger(max_staleness_rounds=max_staleness_rounds)
    for peer, *version in versions:
        ledger.merged(peer, PublicationVersion(*version), 0)
    return ledger


# ---------------------------------------------------------------- what is new


PEERS, ROUNDS = st.sampled_from("abcd"), st.integers(0, 20)


@given(
    merged=st.dictionaries(PEERS, ROUNDS),
    averaged=st.dictionaries(PEERS, st.tuples(ROUNDS, st.integers(0, 4))),
    rounds=st.dictionaries(PEERS, ROUNDS),
    reference=ROUNDS,
)
def test_whose_values_are_new_is_the_same_for_all_at_once_and_for_each(
    merged: dict[str, int], averaged: dict[str, tuple[int, int]], rounds: dict[str, int], reference: int
) -> None:
    ledger = ledger_with(*((peer, round, 1, 100) for peer, round in merged.items()))
    for peer, place in averaged.items():
        ledger.values_merged("weights", peer, place)
    each = {peer for peer, round in rounds.items() if ledger.has_new_values("weights", peer, (round, 0), reference)}
    assert ledger.with_new_values("weights", rounds, reference) == each


def test_a_new_round_enters_whole_and_a_later_part_with_the_differences() -> None:
    ledger = ledger_with(("a", 3, 1, 100))
    new = ledger.news("b", PublicationVersion(0, 1, 50), 0)
    assert isinstance(new, Full) and new.tokens == 50
    new = ledger.news("a", PublicationVersion(4, 1, 80), 3)
    assert isinstance(new, Full) and new.tokens == 80
    new = ledger.news("a", PublicationVersion(3, 3, 310), 3)
    assert isinstance(new, Delta) and (new.since, new.tokens) == (PublicationVersion(3, 1, 100), 210)


@pytest.mark.parametrize(
    ("version", "turned_back", "words"),
    [
        (PublicationVersion(3, 2, 200), False, "round 3 part 2 was merged"),
        (PublicationVersion(3, 3, 200), False, "no token more"),
        (PublicationVersion(3, 1, 100), True, "turned back to round 3 part 1 from 3 part 2"),
        (PublicationVersion(2, 4, 400), True, "turned back to round 2 part 4 from 3 part 2"),
        (PublicationVersion(3, 3, 150), True, "turned back: 150 tokens at part 3 of round 3, and 200 at part 2"),
        (PublicationVersion(3, 2, 250), True, "turned back: 250 tokens at part 2"),
        (PublicationVersion(4, 0, 0), False, "published nothing yet"),
        (PublicationVersion(4, 1, 0), False, "published nothing yet"),
        (PublicationVersion(4, 1, -5), False, "published nothing yet"),
        (PublicationVersion(-1, 1, 5), False, "published nothing yet"),
    ],
)
def test_nothing_new_says_why_and_a_counter_that_turned_back_is_an_incident(
    version: PublicationVersion, turned_back: bool, words: str
) -> None:
    new = ledger_with(("a", 3, 2, 200)).news("a", version, 3)
    assert isinstance(new, Stale) and words in new.reason, new
    assert (new.turned_back, new.too_old) == (turned_back, False)


def test_a_round_too_far_behind_the_median_is_too_old() -> None:
    ledger = Ledger(max_staleness_rounds=2)
    assert isinstance(ledger.news("a", PublicationVersion(8, 1, 9), 10), Full)
    new = ledger.news("a", PublicationVersion(7, 1, 9), 10)
    assert isinstance(new, Stale) and "3 rounds behind the median" in new.reason
    assert (new.turned_back, new.too_old) == (False, True)
    assert isinstance(ledger.news("a", PublicationVersion(10**18, 1, 9), 10), Full), "who is ahead is fresh"
    assert median_round([4, 9, 1]) == 4 and median_round([4]) == 4 and median_round([4, 9]) == 9
    assert median_round([4, 5, 10**9]) == 5, "of three, one cannot move it"


def test_without_the_earlier_gradient_only_the_weights_enter_and_the_next_part_has_its_difference_again() -> None:
    ledger = ledger_with(("a", 3, 1, 100))
    assert ledger.held == {"a"}
    ledger.load(ledger.rows())  # after a restart no gradient is here
    new = ledger.news("a", PublicationVersion(3, 2, 200), 3)
    assert isinstance(new, WeightsOnly) and new.tokens == 0 and "not here any more" in new.reason
    ledger.merged("a", PublicationVersion(3, 2, 200), 3)
    new = ledger.news("a", PublicationVersion(3, 3, 290), 3)
    assert isinstance(new, Delta) and new.tokens == 90, "steps 100 to 200 never enter"


def test_the_weights_of_a_round_are_merged_once() -> None:
    ledger = ledger_with(("a", 3, 4, 400))
    assert ledger.has_new_values("weights", "a", (3, 0), 3), "only its gradient was merged"
    ledger.values_merged("weights", "a", (3, 0))
    assert not ledger.has_new_values("weights", "a", (3, 0), 3), "one that publishes no more holds nobody back"
    assert ledger.has_new_values("weights", "a", (4, 0), 3)
    ledger.values_merged("weights", "a", (4, 0))
    assert not ledger.has_new_values("weights", "a", (4, 0), 3)
    assert not ledger.has_new_values("weights", "a", (5, 0), 14), "too old"
    ledger.merged("a", PublicationVersion(6, 2, 200), 6)
    assert not ledger.has_new_values("weights", "a", (5, 0), 6), "its counter turned back"


def test_of_each_section_that_is_averaged_it_is_known_what_was_merged() -> None:
    ledger = Ledger()
    ledger.values_merged("buffers", "a", (3, 2))
    assert ledger.values_at("weights", "a") is None and ledger.values_at("buffers", "a") == (3, 2)
    assert ledger.has_new_values("weights", "a", (3, 0), 3)
    assert [ledger.has_new_values("buffers", "a", (3, part), 3) for part in (1, 2, 3)] == [False, False, True]
    assert ledger.with_new_values("buffers", {"a": 3, "b": 3}, 3) == {"b"}
    assert ledger.with_new_values("buffers", {"a": 4, "b": -6}, 3) == {"a"}, "too old"
    assert isinstance(ledger.news_of_values("buffers", "a", (3, 3), 3), Full)
    again = ledger.news_of_values("buffers", "a", (3, 2), 3)
    assert isinstance(again, Stale) and again.reason == "its buffers of round 3 were merged"


def test_what_was_pulled_stays_of_use_though_what_it_differs_from_is_not_held_any_more() -> None:
    ledger = ledger_with(("a", 3, 1, 100))
    assert ledger.new_tokens("a", PublicationVersion(3, 2, 200), 3) is not None
    for peer in "bcd":
        ledger.merged(peer, PublicationVersion(3, 1, 100), 3)
    assert isinstance(ledger.news("a", PublicationVersion(3, 2, 200), 3), WeightsOnly), (
        "a pull would bring what cannot be merged"
    )
    assert ledger.new_tokens("a", PublicationVersion(3, 2, 200), 3) is not None
    assert ledger.new_tokens("a", PublicationVersion(3, 1, 100), 3) is None
    assert ledger.has_new_values("weights", "a", (3, 0), 3)
    assert not ledger.has_new_values("weights", "a", (3, 0), 12)


def test_of_few_peers_weights_are_remembered() -> None:
    ledger = Ledger(max_peers=2)
    for peer in ("a", "b", "c"):
        ledger.values_merged("weights", peer, (7, 0))
    assert [ledger.has_new_values("weights", peer, (7, 0), 7) for peer in ("a", "b", "c")] == [True, False, False]


def test_gradients_are_held_of_the_last_few_peers_and_not_of_rounds_that_are_over() -> None:
    ledger = Ledger(max_held=2, num_parts=4)
    for peer in ("a", "b", "c"):
        ledger.merged(peer, PublicationVersion(1, 2, 100), 1)
    assert ledger.held == {"b", "c"}
    ledger.merged("b", PublicationVersion(1, 4, 200), 1)
    assert ledger.held == {"c"}, "nothing comes after the last part"


def test_merging_what_is_not_new_is_a_mistake_of_ours() -> None:
    ledger = ledger_with(("a", 3, 2, 200))
    with pytest.raises(AssertionError, match="not new"):
        ledger.merged("a", PublicationVersion(3, 2, 200), 3)


def test_memory_is_bounded_the_lowest_rounds_are_forgotten_and_nothing_enters_twice() -> None:
    ledger = Ledger(max_peers=64)
    ledger.merged("liar", PublicationVersion(2**60, 1, 5), 0)
    for i in range(1000):
        ledger.merged(f"p{i}", PublicationVersion(i // 10, 1, 5), i // 10)
    assert len(ledger.by_age()) <= 64 and ledger.version("p0") is None and ledger.version("liar") is not None
    assert 90 <= ledger.forgotten_round < 99
    assert isinstance(ledger.news("p910", PublicationVersion(91, 2, 9), 91), WeightsOnly), (
        "part 1 of that round was merged"
    )
    assert isinstance(ledger.news("p910", PublicationVersion(ledger.forgotten_round + 1, 1, 9), 99), Full)


def test_a_checkpoint_keeps_the_ledger_without_the_gradients() -> None:
    ledger = ledger_with(("a", 3, 2, 200), ("b", 1, 1, 7), ("a", 3, 3, 250))
    ledger.forgotten_round = 0
    again = ledger_with(("z", 9, 1, 1), ("a", 2, 1, 1))
    assert again.held == {"z", "a"}
    again.load(json.loads(json.dumps(ledger.rows())))
    assert again.rows() == ledger.rows() and again.by_age() == ["b", "a"] and again.forgotten_round == 0
    assert not again.held and isinstance(again.news("a", PublicationVersion(3, 3, 250), 3), Stale)
    assert isinstance(again.news("a", PublicationVersion(3, 4, 300), 3), WeightsOnly)
    assert isinstance(again.news("a", PublicationVersion(4, 1, 60), 3), Full)


@pytest.mark.parametrize(
    "row",
    [
        ["a"],
        ["a", 1, 1, -1],
        ["a", 1, 0, 0],
        ["a", -1, 1, 1],
        ["a", 1, 0, 1],
        [7, 1, 1, 1],
        ["a", 1, "1", 1],
        "text",
        None,
    ],
)
def test_rows_that_are_something_else_are_refused_whole(row: object) -> None:
    ledger = ledger_with(("a", 3, 2, 200))
    with pytest.raises(ValueError, match="ledger"):
        ledger.load([["b", 1, 1, 5], row])  # type: ignore[list-item]
    assert ledger.by_age() == ["a"]


@pytest.mark.parametrize("seed", range(30))
def test_each_inner_step_enters_at_most_once_whatever_the_order_the_losses_and_the_restarts(seed: int) -> None:
    rng = random.Random(seed)
    history = []  # every publication there ever was, as (peer, mark)
    for round in range(12):
        for peer in ("a", "b", "c", "d", "e"):
            tokens = 0
            for part in range(1, 5):
                tokens += rng.randrange(0, 30)
                history.append((peer, PublicationVersion(round, part, tokens)))
    ledger = Ledger(max_held=2, max_peers=rng.choice([3, 64]), max_staleness_rounds=rng.choice([1, 4, 100]))
    entered: dict[tuple[str, int], set[int]] = {}  # the reference: the steps of (peer, round) that entered, one by one
    saved = (ledger.rows(), {})
    num_merged = at = 0
    while at < len(history) * 4:
        at += 1
        # roughly in order, with repetitions, omissions and old ones
        peer, version = history[min(len(history) - 1, max(0, int(rng.gauss(at % len(history), 40))))]
        reference_round = at % len(history) // 20
        new = ledger.news(peer, version, reference_round)
        if not isinstance(new, Stale):
            since = new.since.tokens if isinstance(new, Delta) else 0
            steps = set() if isinstance(new, WeightsOnly) else set(range(since, version.tokens))
            assert len(steps) == new.tokens
            before = entered.setdefault((peer, version.round), set())
            assert not before & steps, (peer, version, new)
            before |= steps
            num_merged += 1
            ledger.merged(peer, version, reference_round)
            assert len(ledger.held) <= 2 and len(ledger.by_age()) <= ledger.max_peers
        if rng.random() < 0.02:
            saved = (json.loads(json.dumps(ledger.rows())), {key: set(steps) for key, steps in entered.items()})
        elif rng.random() < 0.01:  # a crash: weights and ledger are those of the last checkpoint
            ledger.load(saved[0])
            entered = {key: set(steps) for key, steps in saved[1].items()}
    assert num_merged > 20


def test_what_came_with_others_weights_is_not_merged_again() -> None:
    giver = ledger_with(("a", 3, 4, 400), ("b", 4, 2, 200))
    newcomer = Ledger(num_parts=4)
    newcomer.adopt(giver.places())
    for peer, version in (
        ("a", PublicationVersion(3, 4, 400)),
        ("a", PublicationVersion(2, 4, 400)),
        ("b", PublicationVersion(4, 2, 200)),
        ("b", PublicationVersion(4, 3, 300)),
    ):
        new = newcomer.news(peer, version, 4)
        assert isinstance(new, Stale) and "came with the weights" in new.reason and not new.turned_back
        assert newcomer.new_tokens(peer, version, 4) is None, (
            "nobody is asked for it first, nor is it merged if it came"
        )
    assert (
        newcomer.news("a", PublicationVersion(4, 1, 90), 4).tokens
        == newcomer.new_tokens("a", PublicationVersion(4, 1, 90), 4)
        == 90
    )
    assert newcomer.has_new_values("weights", "b", (4, 0), 4), "weights are averaged, and count as often as they come"
    newcomer.merged("a", PublicationVersion(4, 1, 90), 4)
    assert newcomer.news("a", PublicationVersion(4, 2, 190), 4).tokens == 100
    third = Ledger(num_parts=4)
    third.adopt(newcomer.places())
    assert isinstance(third.news("b", PublicationVersion(4, 4, 400), 4), Stale), (
        "it goes on to whoever takes its weights in turn"
    )


def test_what_was_merged_here_up_to_further_is_merged_on() -> None:
    ledger = ledger_with(("a", 4, 3, 300))
    ledger.adopt({"a": (4, 2)})
    assert ledger.news("a", PublicationVersion(4, 4, 400), 4).tokens == 100
    ledger.adopt({"a": (4, 4)})
    assert isinstance(ledger.news("a", PublicationVersion(4, 4, 400), 4), Stale), (
        "others' weights have more than is held here"
    )
    assert isinstance(ledger.news("a", PublicationVersion(4, 2, 200), 4), Stale)


def test_what_came_with_weights_goes_into_the_checkpoint_with_them() -> None:
    ledger, again = ledger_with(("b", 5, 4, 400)), Ledger()
    ledger.adopt({"a": (4, 2), "b": (4, 2)})
    again.load(json.loads(json.dumps(ledger.rows())))
    assert again.rows() == ledger.rows() and again.places() == {"a": (4, 2), "b": (5, 4)}
    few = Ledger(max_peers=2)
    few.adopt({f"p{i}": (i, 1) for i in range(5)})
    assert few.places() == {"p3": (3, 1), "p4": (4, 1)} and few.places(1) == {"p4": (4, 1)}


def test_of_several_states_the_furthest_counts_and_none_is_believed_beyond_what_a_peer_says_of_itself() -> None:
    told = [{"a": (3, 4), "b": (4, 2)}, {"a": (4, 1), "c": (9, 1)}, {"a": (10**12, 4), "d": (10**12, 4)}]
    agreed = agreed_places(told, {"a": 4, "b": 4}, 4, 8)
    assert agreed == {"a": (5, 1), "b": (4, 2), "c": (9, 1), "d": (12, 1)}
    assert agreed_places([], {"a": 4}, 4, 8) == {}
    behind = agreed_places([{"a": (7, 2), "b": (12, 1)}], {"a": 2, "b": 2}, 11, 8)
    assert behind == {"a": (7, 2), "b": (11, 1)}, "it had fallen behind, and has taken the others' weights since"


# ---------------------------------------------------------------- whom


def candidates(num: int, round: int = 1) -> list[Candidate]:
    return [Candidate(peer=f"p{i}", round=round, part=1, tokens=10 + i) for i in range(num)]


def drawn(partners: Partners, among: list[Candidate], num: int, exclude: tuple[str, ...] = ()) -> list[str | None]:
    partners.rng = random.Random(5)
    return [partners.choose(among, exclude=exclude, reference_round=1, now=0.0)[0] for _ in range(num)]


def test_partners_are_uniform() -> None:
    counts = Counter(drawn(Partners(Ledger()), candidates(10), 10_000))
    chi_square = sum((count - 1000) ** 2 / 1000 for count in counts.values())
    assert len(counts) == 10 and chi_square < 21.7, "99 % of uniform draws, nine degrees of freedom"


def test_the_same_seed_chooses_the_same_whatever_the_order_of_the_candidates() -> None:
    among = candidates(7)
    for variant in VARIANTS:
        forwards, backwards = Partners(Ledger(), variant=variant), Partners(Ledger(), variant=variant)
        assert drawn(forwards, among, 30) == drawn(backwards, among[::-1], 30)


def test_who_announced_nothing_new_is_asked_only_when_nobody_else_is_left() -> None:
    partners = Partners(ledger_with(("p0", 1, 1, 10), ("p1", 1, 1, 11)))
    among = [*candidates(3), Candidate(peer="p3", round=1)]
    partners.rng = random.Random(1)
    for _ in range(50):
        assert partners.choose(among, exclude=(), reference_round=1, now=0.0)[0] == "p2"
    peer, reason = partners.choose(among, exclude=("p2",), reference_round=1, now=0.0)
    assert peer in ("p0", "p1", "p3") and "may be old" in reason
    assert set(drawn(partners, among, 50, exclude=("p2",))) == {"p0", "p1", "p3"}


def test_nobody_and_everybody_asked_are_said() -> None:
    partners = Partners(Ledger())
    peer, reason = partners.choose([], exclude=(), reference_round=0, now=0.0)
    assert (peer, reason) == (None, "nobody else is there")
    peer, reason = partners.choose(candidates(2), exclude=("p0", "p1"), reference_round=0, now=0.0)
    assert (peer, reason) == (None, "everybody was asked in this round")


def test_new_weights_first() -> None:
    ledger = Ledger()
    ledger.values_merged("weights", "p0", (1, 0))
    partners, rounds = Partners(ledger), {"p0": 1, "p1": 1, "p2": 2}
    assert ledger.with_new_values("weights", rounds, 1) == {"p1", "p2"}, "those of p0 were merged"
    for _ in range(20):
        assert partners.choose(candidates(3), exclude=(), reference_round=1, now=0.0, first={"p1"})[0] == "p1"
        found = partners.choose(candidates(3), exclude=("p1",), reference_round=1, now=0.0, first={"p1"})[0]
        assert found in ("p0", "p2"), "another where nobody of them is left"


def test_variants() -> None:
    among = candidates(4)
    freshest = Partners(ledger_with(("p3", 1, 1, 13)), variant="freshest")
    assert set(drawn(freshest, among, 20)) == {"p2"}, "13 announced, of which none is new, against 12"
    merged = ledger_with(("p2", 0, 1, 1), ("p0", 0, 1, 1), ("p1", 0, 1, 1), ("p3", 0, 1, 1))
    longest = Partners(merged, variant="longest-unmerged")
    assert set(drawn(longest, among, 20)) == {"p2"}
    assert set(drawn(longest, candidates(6), 40)) == {"p4", "p5"}, "strangers first"
    each_once = drawn(Partners(Ledger(), variant="random-permutation"), among, 12)
    assert all(sorted(each_once[i : i + 4], key=str) == ["p0", "p1", "p2", "p3"] for i in (0, 4, 8))
    with pytest.raises(ValueError, match="allowed: uniform, freshest"):
        Partners(Ledger(), variant="best")


def test_busy_is_short_and_failures_double_up_to_a_cap() -> None:
    back_off = BackOff()
    assert "1 s" in back_off.busy("a", 0.0)
    assert back_off.ready(["a", "b"], 0.9)[0] == {"b"} and back_off.ready(["a", "b"], 1.0)[0] == {"a", "b"}
    now = 100.0
    for wait_s in (15, 30, 60, 120, 240, 480, 600, 600):
        assert f"unreachable: left alone for {wait_s} s" == back_off.failed("a", now, "unreachable")
        ready, reason = back_off.ready(["a", "b"], now + wait_s - 0.1)
        assert ready == {"b"} and "left alone" in reason
        now += wait_s
        assert back_off.ready(["a", "b"], now) == ({"a", "b"}, "")
    back_off.failed("a", now, "wrong hash")
    back_off.busy("a", now + 10)
    assert back_off.ready(["a", "b"], now + 12)[0] == {"b"}, "BUSY does not shorten a ban"
    back_off.answered("a")
    assert back_off.ready(["a", "b"], now + 12)[0] == {"a", "b"}
    assert "15 s" in back_off.failed("a", now, "unreachable")


def test_bans_do_not_count_when_everyone_is_banned_but_nobody_is_hammered() -> None:
    partners = Partners(Ledger())
    for peer in ("p0", "p1"):
        partners.back_off.failed(peer, 50.0, "unreachable")
    among = candidates(2)
    peer, reason = partners.choose(among, exclude=(), reference_round=1, now=50.5)
    assert peer is None and "within the last 1 s" in reason
    peer, reason = partners.choose(among, exclude=(), reference_round=1, now=51.0)
    assert peer is not None and "bans do not count" in reason
    peer, reason = partners.choose(candidates(3), exclude=("p2",), reference_round=1, now=51.0)
    assert peer is None and "left alone" in reason, "p2 answered in this round: the network works"


def test_what_fails_during_a_ban_does_not_lengthen_it() -> None:
    back_off = BackOff()
    assert "15 s" in back_off.failed("a", 10.0, "unreachable")
    for now in (10.2, 18.0, 24.9):
        assert "already" in back_off.failed("a", now, "unreachable")
    assert back_off.ready(["a", "b"], 25.0)[0] == {"a", "b"}
    assert "30 s" in back_off.failed("a", 25.0, "unreachable")


def test_one_that_only_gave_no_answer_is_left_alone_for_half_of_the_outage_at_most() -> None:
    """And for ten seconds more. An outage of the network looks like one of its own."""
    for outage_s in range(1, 400):
        back_off, now = BackOff(), 0.0
        while now < outage_s:
            back_off.failed("a", now, "no answer", True)
            now = back_off._bans["a"].until_s
        assert now - outage_s <= 10.0 + outage_s / 2
    back_off = BackOff()
    waits = [back_off.failed("a", 1e4 * number, "no answer", True) for number in range(20)]
    assert waits[0].endswith("10 s") and waits[2].endswith("22.5 s") and waits[-1].endswith("600 s")
    assert back_off.failed("a", 1e6, "wrong hash").endswith("600 s"), "now it did more than that"
    assert BackOff().failed("a", 0.0, "wrong hash").endswith("15 s")


def test_one_that_gave_no_answer_and_calls_is_asked_again_at_once() -> None:
    back_off, both = BackOff(), {"a", "b"}
    back_off.failed("a", 0.0, "unreachable", True)
    back_off.failed("a", 15.0, "unreachable", True)  # 15 s, of an outage that ends now
    assert back_off.ready(both, 20.0)[0] == {"b"}
    back_off.called("a", 20.0)
    assert back_off.ready(both, 20.0)[0] == both
    assert "22.5 s" in back_off.failed("a", 25.0, "unreachable", True), "one that calls and never answers gains nothing"
    for mute in (True, False, True):
        back_off.failed("b", 20.0, "no answer" if mute else "wrong hash", mute)
    back_off.called("b", 21.0)
    assert back_off.ready({"b", "c"}, 21.0)[0] == {"c"}, "it did answer once, with what was wrong"
    back_off.busy("c", 21.0)
    back_off.called("c", 21.1)
    assert back_off.ready({"c", "d"}, 21.5)[0] == {"d"}, "nor is being busy forgiven"


@pytest.mark.parametrize("most", [2, 4, 8])
def test_who_is_let_train_on_is_not_too_old_when_the_others_merge(most: int) -> None:
    for behind in range(1, most + 4):
        stays = not left_behind(100 - behind, [100, 100], most)
        merged_next_round = isinstance(Ledger(most).news("a", PublicationVersion(100 - behind, 4, 10), 101), Full)
        assert stays <= merged_next_round, behind


def test_who_comes_back_gives_its_weights_up_if_they_are_too_old_for_those_who_have_begun() -> None:
    assert is_too_old(3, [6, 6, 6], 2) and not is_too_old(4, [6, 6, 6], 2)
    assert is_too_old(3, [0, 6], 2), "one that has not begun says nothing"
    assert not is_too_old(3, [0, 0], 2) and not is_too_old(3, [], 2)

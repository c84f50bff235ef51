"""When a large batch is complete: what a peer believes of the others, and what it does not."""

from __future__ import annotations

import pytest

from swarmtrain.protocol.membership.membership import PeerInfo
from swarmtrain.protocol.rounds.batch_end import BatchEnd, BatchRules, planned_sequences, plausible_entries
from swarmtrain.protocol.rounds.rosters import RoundPublication
from swarmtrain.run_batch import BatchTarget

RULES = BatchRules(target=BatchTarget(1000, 10**6), step_tokens=10, max_wait_s=8.0, round_limit_s=600.0, stale_s=20.0)


def end(round: int = 5, own_rate: float = 20.0, now: float = 100.0) -> BatchEnd:
    """A batch that began at 100 s; the last rosters counted 30 tokens/s of ben, and this peer had 20."""
    found = BatchEnd(RULES)
    found.begin(round - 1, 0, own_rate, 90.0)
    found.counted({"anna": 200, "ben": 300}, 200, 100.0)
    found.begin(round, 0, own_rate, now)
    return found


def told(
    peer: str, at_s: float, steps: int = 0, round: int = 5, speed: float = 3.0, heard_s: float = 110.0
) -> tuple[PeerInfo, float, float]:
    return PeerInfo(peer=peer, round=round, inner_steps_done=steps, steps_per_s=speed), at_s, heard_s


def test_what_a_peer_told_goes_on_at_the_rate_that_rosters_counted() -> None:
    there = end().share(200, [told("ben", 104.0, steps=12)], 110.0)
    assert (there.own_tokens, there.others_tokens) == (200, 120 + 30 * 6)
    assert there.tokens_per_s == 50 and there.left_s == pytest.approx(500 / 50) and there.share == 0.5


def test_one_whose_record_is_of_the_round_before_began_when_this_peer_did() -> None:
    assert end().share(0, [told("ben", 90.0, steps=30, round=4)], 110.0).others_tokens == 300


@pytest.mark.parametrize(
    "other", [told("ben", 60.0, round=3), told("ben", 104.0, heard_s=85.0), told("ben", 100.0, round=6)]
)
def test_one_that_is_elsewhere_or_silent_is_not_counted(other: tuple[PeerInfo, float, float]) -> None:
    assert end().share(0, [other], 110.0).others_tokens == 0


def test_before_its_first_batch_a_peer_has_nothing_of_it() -> None:
    """Its status is asked for as soon as it has joined."""
    there = BatchEnd(RULES).share(0, [], 110.0)
    assert (there.share, there.target_tokens, there.left_s) == (0.0, 1000, None)


def test_a_boast_is_bounded_by_what_rosters_counted() -> None:
    """Of ben 30 tokens/s are known; of eve, whom no roster has, nothing: she may be as fast as the fastest."""
    known = end().share(0, [told("ben", 101.0, steps=10**6, speed=1e9)], 110.0)
    stranger = end().share(0, [told("eve", 101.0, steps=10**6, speed=1e9)], 110.0)
    assert known.others_tokens == stranger.others_tokens == 2 * 30 * 10 + 10
    slow = end().share(0, [told("eve", 101.0, steps=1, speed=0.5)], 110.0)
    assert slow.others_tokens == 10 + 5 * 9


def test_before_any_roster_a_peer_is_believed() -> None:
    first = BatchEnd(RULES)
    first.begin(0, 0, 0.0, 100.0)
    assert first.share(100, [told("ben", 104.0, steps=12, round=0)], 110.0).others_tokens == 120 + 30 * 6
    assert first.share(0, [told("ben", 104.0, round=0, speed=0.0)], 110.0).left_s is None
    silent = told("ben", 104.0, steps=12, round=0, speed=0.0)  # as one in its first round, which knows no speed yet
    assert first.share(100, [silent], 110.0).others_tokens == 120


def test_before_any_roster_a_boast_is_bounded_by_this_peers_own_rate() -> None:
    first = BatchEnd(RULES)
    first.begin(0, 0, 0.0, 100.0)
    there = first.share(20, [told("eve", 101.0, steps=10**6, round=0, speed=1e9)], 102.0)
    assert there.others_tokens == 2 * 8 * 10 * 2 + 10 and there.tokens_per_s == 10 + 8 * 10


def test_who_claims_a_whole_batch_on_rosters_counts_as_a_fast_volunteer() -> None:
    """Eve's publication claims everything each time. Anna and ben have 20 tokens/s."""
    batch, now, lasted = BatchEnd(RULES), 100.0, list[float]()
    for round in range(6):
        batch.begin(round, 0, 20.0, now)
        began = now
        while True:
            now += 0.5
            ben = told("ben", now, steps=int(2 * (now - began)), round=round, speed=2.0, heard_s=now)
            eve = told("eve", now, steps=100, round=round, speed=1e9, heard_s=now)
            there = batch.share(int(20 * (now - began)), [ben, eve], now)
            if batch.is_complete(there, wanted_by={"eve": began + 0.5}, is_asking=False, now=now):
                break
            assert now - began < 60
        lasted.append(now - began)
        own = int(20 * (now - began))
        batch.counted({"anna": own, "ben": own, "eve": 1000}, own, now)
    # 25 s without her. A volunteer of sixteen times their speed, which she may claim, would make it 2.8 s, and who is
    # on rosters is followed from half of the batch on. It gets no shorter.
    assert all(seconds >= 1.5 for seconds in lasted), lasted
    assert lasted[-1] == lasted[2], lasted


def test_one_that_came_late_learns_no_rates_from_that_batch() -> None:
    late = BatchEnd(RULES)
    late.begin(4, 0, 20.0, 98.0, is_late=True)
    assert late.share(0, [told("ben", 98.0, steps=55, round=4)], 98.0).others_tokens == 550
    late.counted({"anna": 40, "ben": 600}, 40, 100.0)  # ben's are of 20 s, of which this peer saw two
    late.begin(5, 0, 20.0, 100.0)
    there = late.share(0, [told("ben", 100.0, speed=3.0)], 110.0)
    assert there.others_tokens == 30 * 10 and there.own_per_s == 20


def test_one_that_two_rosters_left_out_is_not_counted_until_one_has_it() -> None:
    batch = end()
    for round in (5, 6):
        batch.begin(round, 0, 20.0, 100.0)
        assert batch.share(0, [told("eve", 101.0, steps=20, round=round)], 110.0).others_tokens > 0
        batch.counted({"anna": 200, "ben": 300}, 200, 110.0)
    batch.begin(7, 0, 20.0, 100.0)
    ghost = [told("eve", 101.0, steps=20, round=7)]
    there = batch.share(990, ghost, 110.0)
    assert there.others_tokens == 0 and there.tokens_per_s == 20
    few = batch.share(490, ghost, 110.0)
    assert not batch.is_complete(few, wanted_by={"eve": 100.0}, is_asking=False, now=110.0), "nor believed that it is"
    assert batch.is_complete(there, wanted_by={"eve": 100.0}, is_asking=False, now=110.0), "it may sign for itself"
    batch.counted({"anna": 200, "ben": 300, "eve": 100}, 200, 110.0)
    batch.begin(8, 0, 20.0, 100.0)
    assert batch.share(0, [told("eve", 101.0, steps=5, round=8)], 102.0).tokens_per_s == 20 + 10


def test_a_roster_without_this_peer_says_nothing_against_others_and_for_nobody() -> None:
    """Eve signs for herself alone, again and again: who is left out with this peer is not held for one that lies."""
    batch = end()
    for round in (5, 6, 7):
        batch.begin(round, 0, 20.0, 100.0)
        batch.share(0, [told("ben", 101.0, round=round), told("eve", 101.0, round=round)], 110.0)
        batch.counted({"eve": 10**9}, 200, 110.0, lists_this_peer=False)
    batch.begin(8, 0, 20.0, 100.0)
    both = [told("ben", 101.0, round=8), told("eve", 101.0, round=8, speed=1e9)]
    assert batch.share(0, both, 102.0).tokens_per_s == 20 + 30 + 30
    for _ in range(2):
        batch.share(0, both, 102.0)
        batch.counted({"anna": 200, "ben": 300}, 200, 110.0)
        batch.begin(8, 0, 20.0, 100.0)
    assert batch.share(0, both, 102.0).tokens_per_s == 20 + 30, "eve was on neither"
    batch.counted({"eve": 10**9}, 200, 110.0, lists_this_peer=False)
    assert batch.share(0, both, 102.0).tokens_per_s == 20 + 30 + 30, "she is there again"


def test_the_batch_ends_when_it_is_there_once_the_others_have_answered() -> None:
    batch = end()
    early, late = batch.share(700, [], 110.0), batch.share(760, [told("ben", 110.0, steps=1)], 110.0)
    assert not batch.asks_others(early, 110.0) and batch.asks_others(late, 110.0) and not batch.asks_others(late, 110.0)
    full = batch.share(1000, [told("ben", 110.0, steps=1)], 111.0)
    assert not batch.is_complete(late, wanted_by={}, is_asking=False, now=110.0)
    assert not batch.is_complete(full, wanted_by={}, is_asking=True, now=111.0)
    assert batch.is_complete(full, wanted_by={}, is_asking=False, now=111.0)
    assert batch.is_complete(early, wanted_by={}, is_asking=False, now=700.0), "the round's limit"


def test_who_does_not_answer_is_waited_for_until_half_of_the_wait_and_no_longer() -> None:
    batch = end()
    full = batch.share(1000, [told("ben", 110.0, steps=1)], 110.0)
    assert batch.asks_others(full, 110.0)
    assert not batch.is_complete(full, wanted_by={}, is_asking=True, now=113.9)
    assert batch.is_complete(full, wanted_by={}, is_asking=True, now=114.0)


def test_while_others_are_in_a_later_round_they_are_asked_from_time_to_time() -> None:
    batch = end()
    assert not batch.asks_others(batch.share(100, [told("ben", 104.0)], 110.0), 110.0)
    there = batch.share(100, [told("ben", 108.0, round=7)], 110.0)
    times = (103.9, 104.0, 107.9, 108.0, 109.0)
    assert [now for now in times if batch.asks_others(there, now)] == [104.0, 108.0]
    assert not batch.is_complete(there, wanted_by={}, is_asking=False, now=115.0), "what they tell ends nothing"
    assert not batch.is_complete(there, wanted_by={}, is_asking=True, now=115.0, is_overtaken=True), (
        "not all say so yet"
    )
    assert batch.is_complete(there, wanted_by={}, is_asking=False, now=115.0, is_overtaken=True)
    batch.begin(6, 0, 20.0, 120.0)
    assert not batch.asks_others(batch.share(100, [told("ben", 120.0, round=6)], 121.0), 121.0)


def test_a_roster_of_this_peer_alone_says_nothing_of_the_others() -> None:
    first = BatchEnd(RULES)
    first.begin(0, 0, 2.0, 90.0)
    first.counted({"anna": 20}, 20, 100.0)
    first.begin(1, 0, 2.0, 100.0)
    assert first.share(0, [told("ben", 101.0, round=1, speed=9.0)], 110.0).tokens_per_s == 2 + 8 * 2
    parted = end()
    parted.counted({"anna": 200}, 200, 110.0)
    parted.begin(6, 0, 20.0, 110.0)
    assert parted.share(0, [told("ben", 111.0, round=6, speed=9.0)], 112.0).tokens_per_s == 20 + 30, "as before"


def test_one_that_asks_is_believed_if_half_is_there_or_before_it_stops_waiting() -> None:
    batch = end()
    little, eighth, half = (batch.share(tokens, [], 110.0) for tokens in (120, 125, 500))
    assert not batch.is_complete(little, wanted_by={"ben": 110.0}, is_asking=False, now=110.0)
    assert not batch.is_complete(little, wanted_by={"ben": 110.0}, is_asking=False, now=113.9)
    assert not batch.is_complete(little, wanted_by={"ben": 110.0}, is_asking=False, now=114.0), "it cannot be"
    assert batch.is_complete(eighth, wanted_by={"ben": 110.0}, is_asking=False, now=114.0)
    assert batch.is_complete(half, wanted_by={"ben": 110.0}, is_asking=False, now=111.0)
    now = {"is_asking": False, "now": 111.0}
    assert not batch.is_complete(eighth, wanted_by={"ben": 110.0}, step_s=2.9, **now)
    assert batch.is_complete(eighth, wanted_by={"ben": 110.0}, step_s=3.0, **now), "the next step would end too late"
    assert not batch.is_complete(little, wanted_by={"ben": 110.0}, step_s=3.0, **now)


def test_one_that_came_late_follows_whoever_asks() -> None:
    batch = end()
    batch.begin(5, 0, 20.0, 100.0, is_late=True)
    little = batch.share(20, [told("ben", 101.0)], 102.0)
    assert not batch.is_complete(little, wanted_by={}, is_asking=False, now=102.0)
    assert batch.is_complete(little, wanted_by={"eve": 101.5}, is_asking=False, now=102.0)


def test_one_that_rosters_leave_out_again_and_again_follows_those_on_them() -> None:
    """It knows rates of slow ones alone, believes a fast one no more than them, and ends after it for ever."""
    batch, wanted = end(), {"fay": 104.0}
    for left_out in range(3):
        assert batch.is_complete(batch.share(20, [], 105.0), wanted_by=wanted, is_asking=False, now=105.0) == (
            left_out == 2
        )
        batch.counted({"fay": 900}, 20, 110.0, lists_this_peer=False)
    now = {"is_asking": False, "now": 105.0}
    assert not batch.is_complete(batch.share(20, [], 105.0), wanted_by={"eve": 104.0}, **now), "on no roster"
    batch.counted({"anna": 20, "fay": 900}, 20, 110.0)
    assert not batch.is_complete(batch.share(20, [], 105.0), wanted_by=wanted, **now), "it counts again"


def test_one_that_no_roster_has_counted_is_believed_from_three_quarters_on() -> None:
    batch = end()
    some, half, more = (batch.share(tokens, [], 110.0) for tokens in (490, 740, 750))
    assert not batch.is_complete(half, wanted_by={"eve": 110.0}, is_asking=False, now=110.0)
    assert batch.is_complete(more, wanted_by={"eve": 110.0}, is_asking=False, now=110.0)
    assert not batch.is_complete(some, wanted_by={"eve": 110.0}, is_asking=False, now=114.0)
    assert batch.is_complete(half, wanted_by={"eve": 110.0}, is_asking=False, now=114.0)
    assert batch.is_complete(half, wanted_by={"ben": 110.0, "eve": 110.0}, is_asking=False, now=110.0)
    quarter = batch.share(250, [], 110.0)
    assert not batch.is_complete(quarter, wanted_by={"ben": 110.0, "eve": 100.0}, is_asking=False, now=110.0)
    assert batch.is_complete(quarter, wanted_by={"ben": 110.0, "eve": 100.0}, is_asking=False, now=114.0)


def test_a_signer_leaves_out_who_claims_far_more_than_the_others_and_the_batch_has() -> None:
    def entries(**tokens: int) -> list[RoundPublication]:
        return [RoundPublication(peer=peer, snapshot=peer, tokens=one, inner_steps=1) for peer, one in tokens.items()]

    def left_out(me: str = "a", **tokens: int) -> list[str]:
        kept, out = plausible_entries(entries(**tokens), 1000, me)
        assert [one.peer for one in kept] == [peer for peer in tokens if peer not in {each.peer for each in out}]
        return [one.peer for one in out]

    assert left_out(a=100, b=100, c=90, eve=1000) == ["eve"]
    assert left_out(a=100, b=100, c=90, eve=1000, mallory=990) == ["eve", "mallory"]
    assert left_out(a=5, b=6, c=1000) == [], "they have a batch together: it is that fast"
    assert left_out(a=500, b=400, c=600) == [], "the batch is too large, and nobody stands out"
    assert left_out(a=1300, b=10, c=10) == [], "the signer itself"


@pytest.mark.parametrize(
    ("own", "others", "sequences"), [(0.0, 9.0, 8), (10.0, 10.0, 8), (1.0, 9.0, 2), (0.1, 9.9, 1), (1.0, 0.0, 8)]
)
def test_a_slow_volunteer_takes_smaller_steps(own: float, others: float, sequences: int) -> None:
    assert planned_sequences(own, others, 8, 96) == sequences


@pytest.mark.parametrize(("own", "sequences"), [(10.0, 8), (1.0, 5), (0.5, 2), (0.01, 1)])
def test_one_step_takes_at_most_half_of_the_wait(own: float, sequences: int) -> None:
    assert planned_sequences(own, 0.0, 8, 96, max_wait_s=10.0) == sequences

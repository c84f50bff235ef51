"""When a large batch is complete: what a peer believes of the others, and what it does not."""

from __future__ import annotations

import pytest

from swarmtrain.protocol.membership.membership import PeerInfo
from swarmtrain.protocol.rounds.batch_end import BatchEnd, BatchRules, planned_sequences

RULES = BatchRules(target_tokens=1000, step_tokens=10, max_wait_s=8.0, round_limit_s=600.0, stale_s=20.0)


def end(round: int = 5, own_rate: float = 20.0, now: float = 100.0) -> BatchEnd:
    """A batch that began at 100 s; the last rosters counted 30 tokens/s of ben, and this peer had 20."""
    found = BatchEnd(RULES)
    found.begin(round - 1, own_rate, 90.0)
    found.counted({"anna": 200, "ben": 300}, 200, 100.0)
    found.begin(round, own_rate, now)
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


def test_a_boast_is_bounded_by_what_rosters_counted() -> None:
    """Of ben 30 tokens/s are known; of eve, whom no roster has, nothing: she may be as fast as the fastest."""
    known = end().share(0, [told("ben", 101.0, steps=10**6, speed=1e9)], 110.0)
    stranger = end().share(0, [told("eve", 101.0, steps=10**6, speed=1e9)], 110.0)
    assert known.others_tokens == stranger.others_tokens == 2 * 30 * 10 + 10
    slow = end().share(0, [told("eve", 101.0, steps=1, speed=0.5)], 110.0)
    assert slow.others_tokens == 10 + 5 * 9


def test_before_any_roster_a_peer_is_believed() -> None:
    first = BatchEnd(RULES)
    first.begin(0, 0.0, 100.0)
    assert first.share(100, [told("ben", 104.0, steps=12, round=0)], 110.0).others_tokens == 120 + 30 * 6
    assert first.share(0, [told("ben", 104.0, round=0, speed=0.0)], 110.0).left_s is None


def test_the_batch_ends_when_it_is_there_once_the_others_have_answered() -> None:
    batch = end()
    early, late = batch.share(700, [], 110.0), batch.share(760, [told("ben", 110.0, steps=1)], 110.0)
    assert not batch.asks_others(early) and batch.asks_others(late) and not batch.asks_others(late)
    full = batch.share(1000, [told("ben", 110.0, steps=1)], 111.0)
    assert not batch.is_complete(late, is_wanted=False, is_asking=False, now=110.0)
    assert not batch.is_complete(full, is_wanted=False, is_asking=True, now=111.0)
    assert batch.is_complete(full, is_wanted=False, is_asking=False, now=111.0)
    assert batch.is_complete(early, is_wanted=False, is_asking=False, now=700.0), "the round's limit"


def test_one_that_asks_is_believed_if_half_is_there_or_before_it_stops_waiting() -> None:
    batch = end()
    little, half = batch.share(100, [], 110.0), batch.share(500, [], 110.0)
    assert not batch.is_complete(little, is_wanted=True, is_asking=False, now=110.0)
    assert not batch.is_complete(little, is_wanted=True, is_asking=False, now=113.9)
    assert batch.is_complete(little, is_wanted=True, is_asking=False, now=114.0)
    assert batch.is_complete(half, is_wanted=False, is_asking=False, now=111.0), "it has asked before"
    batch.begin(6, 20.0, 120.0)
    assert not batch.is_complete(half, is_wanted=False, is_asking=False, now=121.0), "of the batch before"


@pytest.mark.parametrize(
    ("own", "others", "sequences"), [(0.0, 9.0, 8), (10.0, 10.0, 8), (1.0, 9.0, 2), (0.1, 9.9, 1), (1.0, 0.0, 8)]
)
def test_a_slow_volunteer_takes_smaller_steps(own: float, others: float, sequences: int) -> None:
    assert planned_sequences(own, others, 8, 96) == sequences

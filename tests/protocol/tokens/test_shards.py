"""Data coverage: the least seen shard, rows that merge by the greater count, and what a liar can do."""

from __future__ import annotations

import json
import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmtrain.protocol.tokens.shards import MAX_ROWS, Coverage, CoverageRow
from swarmtrain.protocol.tokens.tally import CountingRules, Tally

NAMES = ("a", "b", "c", "d")
ROUND_TOKENS = 1000


def believe(_: str, tokens: int) -> int:
    return tokens


def pull(reader: Coverage, author: Coverage) -> None:
    assert reader.merge(author.rows_to_send(), author.me, believe) == []


# ---------------------------------------------------------------- choosing


def train(peer: Coverage, others: list[Coverage], round: int, rng: random.Random) -> int:
    """Play a round: choose a shard, train on it, pull what some others know. Peers differ in speed."""
    busy = peer.busy([other.me for other in others])
    shard, _ = peer.choose(round, seed=7, busy=busy, round_tokens=ROUND_TOKENS)
    peer.trained(shard, ROUND_TOKENS - 200 * NAMES.index(peer.me))
    for other in rng.sample(others, min(2, len(others))):
        pull(peer, other)
    return shard


def unseen_when_one_of_four_is_gone(*, fixed_quarters: bool) -> int:
    rng, seen = random.Random(3), set()
    peers = [Coverage(me=name, num_shards=64) for name in NAMES]
    for round in range(40):
        if round == 2:
            peers.pop()
        for i, peer in enumerate(peers):
            others = [other for other in peers if other is not peer]
            seen.add(16 * i + round % 16 if fixed_quarters else train(peer, others, round, rng))
    return 64 - len(seen)


def test_one_peer_of_four_is_gone_for_good_and_no_shard_stays_unseen() -> None:
    assert unseen_when_one_of_four_is_gone(fixed_quarters=False) == 0
    assert unseen_when_one_of_four_is_gone(fixed_quarters=True) == 14, "what the dead peer owned and had not seen"


def test_over_many_rounds_the_shards_are_seen_alike() -> None:
    rng, tokens = random.Random(4), Counter[int]()
    peers = [Coverage(me=name, num_shards=16) for name in NAMES]
    for round in range(200):
        for peer in peers:
            before = sum(peer.seen)
            shard = train(peer, [other for other in peers if other is not peer], round, rng)
            tokens[shard] += ROUND_TOKENS - 200 * NAMES.index(peer.me)
            assert sum(peer.seen) > before
    assert max(tokens.values()) < 1.1 * min(tokens.values())


def test_peers_that_know_the_same_spread_over_the_shards() -> None:
    chosen = Counter(Coverage(me=f"p{i}", num_shards=64).choose(0, seed=1)[0] for i in range(1000))
    assert len(chosen) == 64 and max(chosen.values()) < 2.5 * 1000 / 64
    one, again = Coverage(me="a", num_shards=64), Coverage(me="a", num_shards=64)
    assert one.choose(3, seed=1) == again.choose(3, seed=1), "deterministic"
    assert len({one.choose(round, seed=1)[0] for round in range(50)}) > 20, "another one each round"


def test_the_least_seen_is_taken_and_those_that_others_are_on_are_avoided() -> None:
    coverage = Coverage(me="a", num_shards=4)
    for shard, tokens in enumerate((500, 300, 0, 900)):
        coverage.trained(shard, tokens)
    assert coverage.choose(1, seed=0, round_tokens=10_000) == (2, "least seen (0 tokens)")
    coverage.trained(2, 310)
    assert coverage.choose(1, seed=0) == (1, "least seen (300 tokens)")
    shard, reason = coverage.choose(1, seed=0, round_tokens=100, busy={1})
    assert shard == 2 and reason == "one of 2 least seen"
    shard, reason = coverage.choose(1, seed=0, round_tokens=100, busy={1, 2})
    assert shard in (1, 2) and "others are on all" in reason


def test_where_others_are_comes_from_their_rows() -> None:
    reader, author = Coverage(me="a", num_shards=8), Coverage(me="b", num_shards=8)
    author.trained(5, 10)
    pull(reader, author)
    assert reader.busy(["a", "b", "stranger"]) == {5} and reader.busy(["a"]) == frozenset()


@pytest.mark.parametrize("num_shards", [0, -1, 1025])
def test_the_number_of_shards_is_bounded(num_shards: int) -> None:
    with pytest.raises(ValueError, match="allowed: 1 to 1024"):
        Coverage(me="a", num_shards=num_shards)


# ---------------------------------------------------------------- merging


ROWS = st.lists(st.tuples(st.sampled_from("bcd"), st.tuples(*[st.integers(0, 9)] * 3)), max_size=8)


@given(ROWS, st.randoms(use_true_random=False))
def test_merging_takes_the_greater_counts_in_any_order(
    said: list[tuple[str, tuple[int, ...]]], rng: random.Random
) -> None:
    expected = {peer: [0, 0, 0] for peer in "bcd"}
    for peer, counts in said:
        expected[peer] = [max(pair) for pair in zip(expected[peer], counts, strict=True)]
    for _ in range(2):
        coverage = Coverage(me="a", num_shards=3)
        for peer, counts in said:
            coverage.merge([CoverageRow(peer, counts)], "teller", believe)
        assert coverage.seen == [sum(column) for column in zip(*expected.values(), strict=True)]
        rng.shuffle(said)


def test_everyone_is_told_of_in_rotation_and_oneself_always() -> None:
    author = Coverage(me="m", num_shards=2)
    author.trained(0, 1)
    for i in range(100):
        author.merge([CoverageRow(f"p{i:02d}", (i, 1))], "x", believe)
    told = Counter[str]()
    for _ in range(20):
        rows = author.rows_to_send()
        assert len(rows) == MAX_ROWS and rows[0].peer == "m" and len({row.peer for row in rows}) == MAX_ROWS
        told.update(row.peer for row in rows)
    assert told["m"] == 20 and {told[f"p{i:02d}"] for i in range(100)} == {3}
    assert Coverage(me="m", num_shards=2).rows_to_send() == [CoverageRow("m", (0, 0))]


def test_what_a_peer_forgot_in_a_crash_comes_back_signed_and_hearsay_of_oneself_is_not_believed() -> None:
    coverage = Coverage(me="a", num_shards=2)
    coverage.trained(0, 5)
    coverage.merge([CoverageRow("a", (9, 9))], "b", believe)
    assert coverage.seen == [5, 0]
    coverage.merge([CoverageRow("a", (3, 9), signed=b"by a")], "b", believe)
    assert coverage.seen == [5, 9]


def test_a_checkpoint_keeps_everything() -> None:
    coverage = Coverage(me="a", num_shards=3)
    coverage.trained(1, 5)
    coverage.merge([CoverageRow("b", (1, 2, 3), 2, b"\x00\xff")], "b", believe)
    again = Coverage(me="a", num_shards=3)
    again.load(json.loads(json.dumps(coverage.rows())))
    assert again.rows() == coverage.rows() and again.seen == coverage.seen == [1, 7, 3]
    assert again.busy(["b"]) == {2} and again.rows_to_send() == coverage.rows_to_send()


@pytest.mark.parametrize(
    "row",
    [["b"], ["b", 0, [1, 2], ""], ["b", 3, [1, 2, 3], ""], ["b", 0, [1, 2, -3], ""], ["b", 0, [1, 2, True], ""],
     ["b", 0, [1, 2, 3], "xyz"], ["b", 0, "123", ""], [1, 0, [1, 2, 3], ""], None],
)  # fmt: skip
def test_rows_that_are_something_else_are_refused_whole(row: object) -> None:
    coverage = Coverage(me="a", num_shards=3)
    with pytest.raises(ValueError):
        coverage.load([["c", 0, [1, 1, 1], ""], row])  # type: ignore[list-item]
    assert coverage.seen == [0, 0, 0]


# ---------------------------------------------------------------- hostile input


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (CoverageRow("b", (1, 2)), "2 counts in a row; the run has 3"),
        (CoverageRow("b", ()), "0 counts"),
        (CoverageRow("b", (1, 2, 3, 4)), "4 counts"),
        (CoverageRow("b", (9, 9, -1)), "out of range"),
        (CoverageRow("b", (9, 9, 2**63)), "out of range"),
        (CoverageRow("b", (9, 9, 9), 3), "shard 3; allowed: below 3"),
        (CoverageRow("b", (9, 9, 9), -2), "shard -2"),
        (CoverageRow("b", (9, 0, 9)), "shard 1 shrank from 2 to 0 tokens"),
    ],
)
def test_a_row_out_of_range_or_shrinking_is_refused_and_the_others_are_taken(row: CoverageRow, words: str) -> None:
    coverage = Coverage(me="a", num_shards=3)
    coverage.merge([CoverageRow("b", (1, 2, 3))], "b", believe)
    incidents = coverage.merge([row, CoverageRow("c", (0, 0, 4))], "b", believe)
    assert [one.peer for one in incidents] == ["b"] and words in incidents[0].detail and incidents[0].rule == "shards"
    assert coverage.seen == [1, 2, 7]


def test_an_old_row_of_another_is_no_incident() -> None:
    coverage = Coverage(me="a", num_shards=2)
    coverage.merge([CoverageRow("b", (5, 5))], "b", believe)
    assert coverage.merge(
        [CoverageRow("b", (3, 5)), CoverageRow("b", (0, 6))], "c", believe
    ) == [] and coverage.seen == [5, 6]


def test_too_many_rows_are_not_read() -> None:
    coverage = Coverage(me="a", num_shards=1)
    rows = [CoverageRow(f"p{i}", (1,)) for i in range(MAX_ROWS + 5)]
    incidents = coverage.merge(rows, "b", believe)
    assert coverage.seen == [MAX_ROWS] and [(one.peer, "21 rows" in one.detail) for one in incidents] == [("b", True)]


def test_growth_that_the_speed_does_not_explain_waits_until_it_does() -> None:
    tally = Tally(CountingRules(began_s=0.0, burst_tokens=100, most_tokens=10**12), typical_per_s=10.0)
    coverage, now = Coverage(me="a", num_shards=2), 10.0

    def explained(peer: str, tokens: int) -> int:
        return tally.observe(peer, 0, tokens, now, 10.0)[0]

    assert coverage.merge([CoverageRow("b", (60, 40))], "b", explained) == []
    lie = CoverageRow("b", (10**6, 0))
    incidents = coverage.merge([lie], "b", explained)
    assert [one.peer for one in incidents] == ["b"] and coverage.seen == [60, 40]
    incidents = coverage.merge([CoverageRow("b", (10**6, 40))], "c", explained)
    assert incidents[0].peer == "c" and "says that b has trained on 1000040 tokens" in incidents[0].detail
    incidents = coverage.merge([CoverageRow("b", (10**6, 40), signed=b"by b")], "c", explained)
    assert incidents[0].peer == "b", "who passes on what another signed is not to blame"
    now = 10.0 + 10**6 / 40.0
    assert coverage.merge([CoverageRow("b", (10**6, 40))], "b", explained) == [] and coverage.seen == [10**6, 40]


def test_memory_is_bounded_the_greatest_rows_stay_and_the_own_one() -> None:
    coverage = Coverage(me="a", num_shards=2, max_peers=64)
    coverage.trained(0, 1)
    for i in range(1000):
        coverage.merge([CoverageRow(f"p{i}", (i, 1))], "x", believe)
        assert len(coverage.rows()) <= 73
    kept = {str(row[0]) for row in coverage.rows()}
    assert "a" in kept and {f"p{i}" for i in range(960, 1000)} <= kept
    assert coverage.seen == [sum(row.counts[s] for row in coverage._rows.values()) for s in (0, 1)]

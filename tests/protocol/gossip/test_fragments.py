"""Rounds of fragments: what is published of each rises, and each inner step is in one of its rounds."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from swarmtrain.peer.training.session import Start
from swarmtrain.protocol.gossip.fragments import (
    FragmentRounds,
    advertised_round,
    advertised_version,
    publishes_every,
    steps_of_fragment,
)
from swarmtrain.protocol.gossip.partners import PublicationVersion

TOKENS = 10
"""Tokens of a step."""


def play(rng: random.Random, number: int, num_parts: int, num_rounds: int) -> list[list[tuple[int, int, int, int]]]:
    """Rounds of various lengths: of each fragment its publications, (round, part, tokens, the run's step by then)."""
    rounds, found, before = FragmentRounds(number), [list[tuple[int, int, int, int]]() for _ in range(number)], 0
    for round in range(num_rounds):
        inner_steps = rng.choice([1, 2, 3, 7, 8, 16, 40, 61])
        start = Start(
            inner_steps=inner_steps,
            num_peers=1,
            num_parts=num_parts,
            every=rng.choice([1, 2, 4, 8]),
            num_fragments=number,
        )
        ends = start.merge_after
        assert list(ends) == sorted(ends) and ends[-1] == inner_steps and set(ends) <= set(start.publish_after)
        rounds.begin(round, num_parts)
        for moment in start.publish_after:
            part = start.part_after(moment)
            for fragment, each in enumerate(rounds.at(part, moment * TOKENS, moment)):
                assert each.tokens == each.inner_steps * TOKENS
                found[fragment].append((each.round, each.part, each.tokens, before + moment))
            for fragment, merged_after in enumerate(ends):
                if merged_after == moment:
                    rounds.merged(fragment, part, moment * TOKENS, moment)
        before += inner_steps
    return found


@pytest.mark.parametrize("number", [1, 2, 3, 4, 8, 16])
@pytest.mark.parametrize("num_parts", [1, 4, 8, 16, 24, 32])
def test_parts_and_tokens_rise_and_a_round_of_a_fragment_goes_from_merge_to_merge(number: int, num_parts: int) -> None:
    for seed in range(20):
        for fragment, published in enumerate(play(random.Random(seed), number, num_parts, 12)):
            versions = [(round, part) for round, part, _, _ in published]
            assert versions == sorted(set(versions)), "the ledger takes a part that turned back for a lie"
            assert {1 <= part <= num_parts for _, part in versions} == {True}
            for (round, _, tokens, step), (next_round, _, next_tokens, next_step) in pairwise(published):
                new = next_tokens - (tokens if next_round == round else 0)
                assert new == (next_step - step) * TOKENS, "each step is published once"
                assert next_round - round in (0, 1)
            complete = {round for round, part, _, _ in published if part == num_parts}
            assert complete >= {round for round, *_ in published[:-1]} - {published[-1][0]}, fragment


def test_of_one_fragment_it_is_the_round_itself() -> None:
    rounds = FragmentRounds(1)
    rounds.begin(3, 4)
    advertised = [
        (each.round, each.part, each.tokens) for part in range(1, 5) for each in rounds.at(part, 5 * part, part)
    ]
    assert advertised == [(3, 1, 5), (3, 2, 10), (3, 3, 15), (3, 4, 20)]
    rounds.merged(0, 4, 20, 4)
    rounds.begin(4, 4)
    assert rounds.at(1, 5, 1)[0].tokens == 5


def test_of_a_round_that_ends_early_the_last_part_is_complete() -> None:
    rounds = FragmentRounds(2)
    rounds.begin(0, 8)
    assert [each.part for each in rounds.at(8, 30, 3)] == [8, 8]


def test_what_another_has_taken_of_this_round() -> None:
    rounds = FragmentRounds(2)
    rounds.begin(0, 2)
    rounds.merged(0, 1, 30, 3)
    rounds.merged(1, 2, 60, 6)
    rounds.begin(1, 2)
    assert [each.tokens for each in rounds.at(1, 20, 2)] == [50, 20]
    assert rounds.of_round(0, 1, 50) == 20 and rounds.of_round(0, 1, 10) == 0, "30 of these are of the round before"
    rounds.merged(0, 1, 20, 2)
    assert rounds.of_round(0, 2, 15) == 35 and rounds.of_round(0, 0, 99) == 0
    rounds.restart()
    assert [each.tokens for each in rounds.at(1, 20, 2)] == [20, 20]


@pytest.mark.parametrize("number", [2, 3, 4, 8])
def test_only_rounds_in_which_a_fragment_is_trained_count_for_it(number: int) -> None:
    rng, rounds, counted = random.Random(number), FragmentRounds(number), [0] * number
    trained_steps, published = [0] * number, [dict[int, int]() for _ in range(number)]
    for round in range(30):
        start = Start(inner_steps=rng.choice([8, 16, 40]), num_peers=1, num_parts=16, num_fragments=number)
        trained = frozenset(rng.sample(range(number), rng.randrange(number)))
        rounds.begin(round, 16, trained)
        done = 0
        for moment in start.publish_after:
            for fragment in trained:
                trained_steps[fragment] += moment - done
            done = moment
            for fragment, each in enumerate(rounds.at(start.part_after(moment), moment * TOKENS, moment)):
                assert each.tokens == each.inner_steps * TOKENS
                before = published[fragment].get(each.round, 0)
                assert each.tokens >= before, "a count that turned back would be a lie"
                assert fragment in trained or each.tokens == before or round == 0
                published[fragment][each.round] = each.tokens
                counted[fragment] += each.tokens - before
            for fragment, merged_after in enumerate(start.merge_after):
                if merged_after == moment:
                    rounds.merged(fragment, start.part_after(moment), moment * TOKENS, moment)
        assert counted == [TOKENS * steps for steps in trained_steps], "each step that trained it counts once"


@pytest.mark.parametrize("inner_steps", [16, 25, 40])
@pytest.mark.parametrize(("most", "every"), [(8, 1), (16, 2), (32, 4), (32, 1), (64, 1)])
@pytest.mark.parametrize("number", [1, 2, 3, 4, 5, 7, 8])
def test_what_a_peer_tells_of_itself_gives_each_fragments_round_and_part(
    number: int, most: int, every: int, inner_steps: int
) -> None:
    """However often it publishes, which others do not know."""
    start = Start(inner_steps=inner_steps, num_peers=1, num_parts=most, every=every, num_fragments=number)
    rounds, ends = FragmentRounds(number), start.merge_after
    guessed = 1 if inner_steps % number == inner_steps % most == 0 else inner_steps * TOKENS / 2
    for round in range(3):
        rounds.begin(round, most)
        for moment in start.publish_after:
            advertised = PublicationVersion(round, start.part_after(moment), moment * TOKENS)
            for fragment, each in enumerate(rounds.at(advertised.part, advertised.tokens, moment)):
                if round == 0 and ends[fragment] < inner_steps:
                    continue  # the first round of a fragment is a shorter one
                version = advertised_version(fragment, number, advertised, most)
                assert (
                    version == PublicationVersion(each.round, each.part, version.tokens)
                    and abs(version.tokens - each.tokens) <= guessed
                )
                since = steps_of_fragment(fragment, number, moment, inner_steps, most)
                if moment not in ends:  # told after the merge, and this is before it
                    assert since == (each.round - round, each.inner_steps)
            for fragment, merged_after in enumerate(ends):
                if merged_after == moment:
                    rounds.merged(fragment, advertised.part, advertised.tokens, moment)
                    assert advertised_round(fragment, number, advertised, most) == round + (merged_after < inner_steps)
    assert advertised_version(0, number, PublicationVersion(0, 0, 0), most) == PublicationVersion(0, 0, 0), (
        "it has published nothing"
    )
    assert advertised_version(number - 1, number, PublicationVersion(4, 0, 160), most) == PublicationVersion(
        3, most, 160
    ), "all of the round before"


@pytest.mark.parametrize(
    ("most", "number", "round_s", "parameters", "every"),
    [
        (32, 4, 32.0, 400_000, 1),  # once a second at most
        (32, 4, 31.9, 400_000, 2),
        (32, 4, 15.9, 400_000, 4),
        (32, 4, 0.0, 400_000, 4),  # it is not known how long
        (32, 4, 205.0, 5_000_000, 1),  # publishing takes 30 ms, of six seconds
        (32, 4, 205.0, 10_000_000, 2),
        (32, 4, 600.0, 100_000_000, 4),
        (32, 8, 2.0, 400_000, 2),  # two for each fragment
        (32, 16, 2.0, 400_000, 1),
        (32, 1, 2.0, 400_000, 4),
        (32, 3, 2.0, 400_000, 4),
        (64, 4, 2.0, 400_000, 8),
        (8, 4, 2.0, 400_000, 1),
        (4, 1, 2.0, 400_000, 1),
        (1, 1, 2.0, 400_000, 1),
    ],
)
def test_with_how_many_parts_a_peer_publishes(
    most: int, number: int, round_s: float, parameters: int, every: int
) -> None:
    assert publishes_every(most, number, round_s, parameters) == every


@pytest.mark.parametrize(
    ("inner_steps", "most", "number", "every", "moments"),
    [
        (64, 32, 4, 4, [8, 16, 24, 32, 40, 48, 56, 64]),
        (16, 32, 4, 1, [2, 3, 4, 6, 7, 8, 10, 11, 12, 14, 15, 16]),
        (25, 32, 4, 1, [4, 5, 6, 7, 10, 11, 12, 13, 16, 17, 18, 19, 22, 23, 24, 25]),
        (3, 32, 4, 4, [1, 2, 3]),
        (64, 8, 1, 1, [8, 16, 24, 32, 40, 48, 56, 64]),  # in one piece
        (64, 32, 3, 4, [14, 22, 36, 44, 56, 64]),
        (1, 32, 4, 1, [1]),
    ],
)
def test_on_the_way_from_merge_to_merge_a_peer_publishes_from_the_middle_on(
    inner_steps: int, most: int, number: int, every: int, moments: list[int]
) -> None:
    start = Start(inner_steps=inner_steps, num_peers=2, num_parts=most, num_fragments=number, every=every)
    assert start.publish_after == moments
    assert set(start.merge_after) <= set(moments)
    parts = [start.part_after(moment) for moment in moments]
    assert parts == sorted(set(parts)) and parts[-1] == most


def test_since_when_a_fragments_round_goes_on() -> None:
    assert steps_of_fragment(3, 4, 5, 16, 8) == steps_of_fragment(3, 4, 5, 0, 8) == (0, 5), (
        "the last one's is the round"
    )
    assert steps_of_fragment(0, 4, 3, 16, 8) == (0, 15) and steps_of_fragment(0, 4, 4, 16, 8) == (1, 0)
    assert steps_of_fragment(1, 4, 15, 16, 8) == (1, 7) and steps_of_fragment(0, 4, 3, 0, 8) is None
    assert steps_of_fragment(0, 3, 6, 16, 16) == (1, 0), "it is merged with the sixth of sixteen publications"

"""Who averages how much of a roster's mean: against brute force, and against the linear program of the paper."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmtrain.protocol.rounds.roles import (
    LinkRates,
    averaging_s,
    divide,
    equal_shares,
    known_rates,
    largest_share,
    share_pieces,
)

MBIT = 125_000.0
BODY = 100_000_000

rates = st.floats(1e4, 1e9)
links = st.builds(LinkRates, rates, rates, st.booleans())
groups = st.lists(links, min_size=3, max_size=9)


def of_mbit(*mbit: float) -> list[LinkRates]:
    return [LinkRates(each * MBIT, each * MBIT) for each in mbit]


def program_s(links: Sequence[LinkRates], body_bytes: float) -> float:
    """Solve the linear program of the paper (section 3.2, equation 1) as it stands there, with scipy: rates a[i, j] at
    which j averages what i sends it, and g[j, i] at which j sends its averages to i. Return the seconds of averaging.
    """
    from scipy.optimize import linprog

    num = len(links)
    pairs = [(i, j) for i in range(num) for j in range(num)]
    at = {("a", *pair): number for number, pair in enumerate(pairs)}
    at |= {("g", *pair): len(pairs) + number for number, pair in enumerate(pairs)}
    slowest = 2 * len(pairs)  # the least rate at which any peer gets averages: what is maximised
    rows, limits = [], []

    def at_most(limit: float, *terms: tuple[int, float]) -> None:
        row = [0.0] * (slowest + 1)
        for index, factor in terms:
            row[index] += factor
        rows.append(row)
        limits.append(limit)

    owners = sum(link.can_be_dialled for link in links) or num
    for i in range(num):
        others = [j for j in range(num) if j != i]
        for j in range(num):  # the product's own limit
            at_most(0.0, (at["g", j, i], 1.0), (slowest, -max(3 / num, 1 / owners)))
        at_most(0.0, (slowest, 1.0), *((at["g", j, i], -1.0) for j in range(num)))
        for j, k in itertools.product(range(num), range(num)):  # j averages no faster than any k sends
            at_most(0.0, (at["g", j, i], 1.0), (at["a", k, j], -1.0))
        up = [(at[kind, i, j], 1.0) for kind in "ag" for j in others]
        down = [(at[kind, j, i], 1.0) for kind in "ag" for j in others]
        at_most(links[i].up_bytes_per_s / MBIT, *up)
        at_most(links[i].down_bytes_per_s / MBIT, *down)
        if not links[i].can_be_dialled and any(link.can_be_dialled for link in links):
            at_most(0.0, *((at["g", i, j], 1.0) for j in range(num)))
    found = linprog([0.0] * slowest + [-1.0], A_ub=rows, b_ub=limits, method="highs")
    assert found.success
    return body_bytes / MBIT / float(found.x[slowest])


@given(groups)
def test_shares_take_as_long_as_the_papers_linear_program(links: list[LinkRates]) -> None:
    links = links[:5]
    roles = divide(links, 100_000, BODY)
    assert sum(roles.shares) == 100_000
    ideal_s = program_s(links, BODY)
    assert ideal_s * (1 - 1e-6) <= roles.averaging_s <= ideal_s * 1.11  # a share that is tiny is left out


@given(groups, st.integers(0, 300))
def test_they_are_exact_and_never_slower_than_equal_ones(links: list[LinkRates], num_chunks: int) -> None:
    roles = divide(links, num_chunks, BODY)
    assert sum(roles.shares) == num_chunks and min(roles.shares) >= 0 and len(roles.shares) == len(links)
    assert roles == divide(links, num_chunks, BODY), "not the same each time"
    if num_chunks:
        assert math.isclose(roles.averaging_s, averaging_s(links, roles.shares, BODY))
        dialled = [link.can_be_dialled for link in links]
        owners = dialled if any(dialled) else [True] * len(links)
        assert roles.averaging_s <= averaging_s(links, equal_shares(num_chunks, owners), BODY) * (1 + 1e-9)
    if any(link.can_be_dialled for link in links):
        hidden = [share for share, link in zip(roles.shares, links, strict=True) if not link.can_be_dialled]
        assert not any(hidden)


def ways_to_divide(num_chunks: int, num: int) -> Iterator[tuple[int, ...]]:
    if num == 1:
        yield (num_chunks,)
        return
    for first in range(num_chunks + 1):
        for rest in ways_to_divide(num_chunks - first, num - 1):
            yield first, *rest


@given(st.lists(st.builds(LinkRates, rates, rates), min_size=3, max_size=4), st.integers(1, 9))
def test_no_division_of_few_chunks_is_faster(links: list[LinkRates], num_chunks: int) -> None:
    # With so few chunks none of a share is tiny.
    most = math.ceil(3 * num_chunks / len(links))
    ways = (shares for shares in ways_to_divide(num_chunks, len(links)) if max(shares) <= most)
    best_s = min(averaging_s(links, shares, BODY) for shares in ways)
    assert divide(links, num_chunks, BODY).averaging_s <= best_s * (1 + 1e-9)


@given(st.integers(3, 40), st.integers(0, 500), rates)
def test_equal_links_have_equal_shares(num: int, num_chunks: int, rate: float) -> None:
    shares = divide([LinkRates(rate, rate)] * num, num_chunks, BODY).shares
    assert max(shares) - min(shares) <= 1


def test_fast_links_average_much_and_slow_ones_nothing() -> None:
    hidden = LinkRates(50 * MBIT, 50 * MBIT, can_be_dialled=False)
    roles = divide([*of_mbit(10, 20, 50, 100, 200), hidden], 1000, BODY)
    assert roles.shares == (0, 0, 83, 417, 500, 0)
    assert roles.averaging_s == pytest.approx(BODY / (10 * MBIT)), "its own upload takes the slowest link so long"
    equal = equal_shares(1000, [True] * 5 + [False])
    assert averaging_s([*of_mbit(10, 20, 50, 100, 200), hidden], equal, BODY) == pytest.approx(1.8 * 80)


def test_whoever_boasts_gets_three_times_an_equal_share_at_most() -> None:
    told = divide([*[LinkRates(1e6, 1e6)] * 7, LinkRates(1e12, 1e12)], 870, BODY).shares
    assert told[7] == 327 and sum(told) == 870 and max(told[:7]) - min(told[:7]) <= 1
    both = divide([*[LinkRates(1e6, 1e6)] * 6, *[LinkRates(1e12, 1e12)] * 2], 870, BODY).shares
    assert both[6:] == (327, 327) and min(both[:6]) >= 36


@given(groups, st.integers(1, 300))
def test_no_share_is_larger_than_three_equal_ones(links: list[LinkRates], num_chunks: int) -> None:
    owners = sum(link.can_be_dialled for link in links) or len(links)
    assert max(divide(links, num_chunks, BODY).shares) <= largest_share(num_chunks, len(links), owners)


def test_the_largest_share_does_not_depend_on_who_can_be_dialled_unless_few_can() -> None:
    assert [largest_share(96, 8, dialled) for dialled in (8, 5, 3)] == [36, 36, 36]
    assert [largest_share(96, 8, dialled) for dialled in (2, 1)] == [48, 96]
    assert largest_share(1, 8, 8) == 1 and largest_share(10, 2, 2) == 10


anything = st.floats(0.0, math.inf) | st.just(math.nan)


@given(st.lists(st.builds(LinkRates, anything, anything, st.booleans()), min_size=1, max_size=9))
def test_no_rate_is_the_end_of_a_signer(links: list[LinkRates]) -> None:
    shares = divide(links, 96, BODY).shares
    assert sum(shares) == 96 and min(shares) >= 0


def test_rates_so_slow_that_nothing_can_be_reckoned_give_equal_shares() -> None:
    crawls = [LinkRates(1e-310, 1e-310), *[LinkRates()] * 5]
    assert divide(crawls, 96, BODY).shares == (16,) * 6


def test_a_link_that_nobody_has_measured_is_taken_for_the_median() -> None:
    assert known_rates([LinkRates(2.0, 30.0), LinkRates(4.0), LinkRates(), LinkRates(9.0, 7.0)]) == [2.0, 4.0, 4.0, 7.0]
    assert known_rates([LinkRates(), LinkRates()]) == [0.0, 0.0]
    nothing = divide([LinkRates(), LinkRates(), LinkRates(can_be_dialled=False), LinkRates()], 10, BODY)
    assert nothing.shares == (3, 3, 0, 4) and nothing.averaging_s == math.inf
    two = divide(of_mbit(1, 100), 10, BODY)
    assert two.shares == (5, 5), "with two peers each carries as much whoever averages"


def test_a_tiny_share_is_none() -> None:
    shares = divide(of_mbit(80, 99, 400, 400, 400, 400, 400), 10_000, BODY).shares
    assert all(share == 0 or share >= 10_000 / 7 / 10 for share in shares) and sum(shares) == 10_000


@given(st.integers(0, 1000), st.integers(0, 500))
def test_pieces_are_the_share_one_after_the_other(start: int, num: int) -> None:
    pieces = share_pieces(range(start, start + num))
    assert list(itertools.chain.from_iterable(pieces)) == list(range(start, start + num))
    assert len(pieces) <= 64 and max(map(len, pieces)) - min(map(len, pieces)) <= 1

"""Transfers that share links: max-min fair rates against a plain reference, and the cheap rule beside them."""

from __future__ import annotations

import random
import statistics
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarmtrain.simulate.clock import Clock
from swarmtrain.simulate.links import SharedLinks, Transfer, max_min_rates
from swarmtrain.simulate.systems.messages import SimulatedLink


@dataclass
class Machine:
    name: str
    link: SimulatedLink = field(default_factory=lambda: SimulatedLink(bytes_per_s=10.0))


def transfer(src: Machine, dst: Machine) -> Transfer:
    return Transfer(src, dst, 1.0, 0.0, lambda whole: None)


def timed(links: SharedLinks, clock: Clock, *wanted: tuple[Machine, Machine, float, float]) -> list[float]:
    """Return when each transfer (from, to, bytes, start) has arrived."""
    ends_s = [0.0] * len(wanted)
    for number, (src, dst, num_bytes, at_s) in enumerate(wanted):

        def begin(number: int = number, src: Machine = src, dst: Machine = dst, num_bytes: float = num_bytes) -> None:
            links.begin(src, dst, num_bytes, 0.0, lambda whole: ends_s.__setitem__(number, clock.now))

        clock.call_at(at_s, begin)
    clock.run_until(1e6)
    return ends_s


@pytest.mark.parametrize("exact", [True, False])
def test_who_sends_to_two_sends_half_to_each_and_all_to_the_one_that_is_left(exact: bool) -> None:
    a, b, c = Machine("a"), Machine("b"), Machine("c")
    clock = Clock()
    ends_s = timed(SharedLinks(clock, exact=exact), clock, (a, b, 100.0, 0.0), (a, c, 20.0, 2.0))
    assert ends_s == pytest.approx([12.0, 6.0])


def test_what_one_cannot_use_the_others_have() -> None:
    """`slow` takes 1 of the 10; max-min fair, the other one has 9 and not 5."""
    a, b, slow = Machine("a"), Machine("b"), Machine("slow", SimulatedLink(bytes_per_s=10.0, down_bytes_per_s=1.0))
    rates = max_min_rates([to_slow := transfer(a, slow), to_b := transfer(a, b)])
    assert rates == {to_slow: 1.0, to_b: 9.0}
    clock = Clock()
    assert timed(SharedLinks(clock, exact=False), clock, (a, slow, 10.0, 0.0), (a, b, 45.0, 0.0))[1] == pytest.approx(
        9.0
    )


@pytest.mark.parametrize(("load", "apart"), [(0.65, 0.05), (0.9, 0.10)])
def test_through_busy_uplinks_the_cheap_rule_takes_about_as_long(load: float, apart: float) -> None:
    """At such a share of what 20 Mbit/s up and 100 down, lognormal, can carry; pulls are planned for the first one."""
    chance, size_bytes, lasts_s = random.Random(0), 4e6, 40.0
    factors = [chance.lognormvariate(0.0, 0.3) for _ in range(20)]
    links = [SimulatedLink(bytes_per_s=2.5e6 * each, down_bytes_per_s=12.5e6 * each) for each in factors]
    machines = [Machine(f"m{i}", link) for i, link in enumerate(links)]
    all_per_s, at_s = sum(link.bytes_per_s for link in links), 0.0
    wanted: list[tuple[Machine, Machine, float, float]] = []
    while (at_s := at_s + chance.expovariate(load * all_per_s / size_bytes)) < lasts_s:
        (src,) = chance.choices(machines, factors)
        wanted.append((src, chance.choice([one for one in machines if one is not src]), size_bytes, at_s))
    means_s = []
    for exact in True, False:
        clock = Clock()
        ends_s = timed(SharedLinks(clock, exact=exact), clock, *wanted)
        means_s.append(statistics.mean(end_s - one[3] for end_s, one in zip(ends_s, wanted, strict=True)))
    assert len(wanted) * size_bytes > 0.9 * load * all_per_s * lasts_s
    assert means_s[0] > 1.5 * size_bytes / 2.5e6, "they share"
    assert means_s[1] == pytest.approx(means_s[0], rel=apart)


def test_the_connections_of_one_that_is_gone_break() -> None:
    a, b, c = Machine("a"), Machine("b"), Machine("c")
    clock, came = Clock(), list[tuple[str, bool, float]]()
    links = SharedLinks(clock)
    links.begin(a, b, 100.0, 0.0, lambda whole: came.append(("b", whole, clock.now)))
    links.begin(a, c, 100.0, 0.0, lambda whole: came.append(("c", whole, clock.now)))
    clock.call_at(4.0, links.gone, "b")
    clock.run_until(100.0)
    assert came == [("b", False, 4.0), ("c", True, pytest.approx(12.0))]
    assert links.num_out("a") == 0


@settings(max_examples=200, derandomize=True)
@given(
    rates=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 20)), min_size=2, max_size=6),
    pairs=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=12),
)
def test_nobody_can_have_more_without_one_that_has_no_more_having_less(
    rates: list[tuple[int, int]], pairs: list[tuple[int, int]]
) -> None:
    """The definition: each transfer is on a full link on which none has more than it."""
    machines = [
        Machine(f"m{i}", SimulatedLink(bytes_per_s=up, down_bytes_per_s=down)) for i, (up, down) in enumerate(rates)
    ]
    ends = [(machines[a % len(machines)], machines[b % len(machines)]) for a, b in pairs]
    found = max_min_rates([transfer(a, b) for a, b in ends])
    for one, rate in found.items():
        out = [other for it, other in found.items() if it.src is one.src]
        come = [other for it, other in found.items() if it.dst is one.dst]
        full_up = sum(out) >= one.src.link.bytes_per_s - 1e-9 and rate >= max(out) - 1e-9
        full_down = sum(come) >= one.dst.link.down_per_s - 1e-9 and rate >= max(come) - 1e-9
        assert full_up or full_down
        assert sum(out) <= one.src.link.bytes_per_s + 1e-9 and sum(come) <= one.dst.link.down_per_s + 1e-9

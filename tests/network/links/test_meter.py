"""What a link carries, measured by use."""

from __future__ import annotations

import pytest

from swarmtrain.network.links.meter import LinkMeter
from swarmtrain.network.links.throttle import Throttle

CHUNK = 256 * 1024


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def carry(meter: LinkMeter, clock: Clock, bytes_per_s: float, for_s: float, peers: str = "ab") -> None:
    """Let chunks pass, from or to each peer in turn."""
    for number in range(int(for_s * bytes_per_s / CHUNK)):
        clock.now += CHUNK / bytes_per_s
        meter.passed(peers[number % len(peers)], CHUNK)


@pytest.mark.parametrize("bytes_per_s", [1.25e6, 10e6, 100e6])
def test_a_busy_link_is_measured_and_never_far_above_what_it_carries(bytes_per_s: float) -> None:
    clock = Clock()
    meter = LinkMeter(clock=clock)
    assert meter.bytes_per_s == 0
    carry(meter, clock, bytes_per_s, 20.0)
    assert 0.8 * bytes_per_s <= meter.bytes_per_s <= 1.05 * bytes_per_s


def test_little_traffic_says_little_and_takes_nothing_back_at_once() -> None:
    clock = Clock()
    meter = LinkMeter(clock=clock)
    carry(meter, clock, 10e6, 10.0)
    meter.round_over()
    fast = meter.bytes_per_s
    meter.round_over()
    assert meter.bytes_per_s == fast, "nothing was carried"
    carry(meter, clock, 1e6, 30.0)
    meter.round_over()
    assert 0.65 * fast < meter.bytes_per_s < 0.75 * fast
    for _ in range(20):
        carry(meter, clock, 1e6, 30.0)
        meter.round_over()
    assert meter.bytes_per_s == pytest.approx(1e6, rel=0.2)


def test_a_round_in_which_transfers_failed_takes_nothing_back() -> None:
    """Then the link had less to carry than it should have; what did pass still counts."""
    clock = Clock()
    meter = LinkMeter(clock=clock)
    carry(meter, clock, 10e6, 10.0)
    meter.round_over()
    fast = meter.bytes_per_s
    carry(meter, clock, 1e6, 30.0)
    meter.disturbed()
    meter.round_over()
    assert meter.bytes_per_s == fast
    carry(meter, clock, 20e6, 10.0)
    meter.disturbed()
    meter.round_over()
    assert meter.bytes_per_s > 1.8 * fast
    carry(meter, clock, 1e6, 30.0)
    meter.round_over()
    assert meter.bytes_per_s < 1.5 * fast, "only that round"


def test_what_the_transport_has_buffered_is_not_counted_before_the_reader_asks_for_more() -> None:
    clock = Clock()
    meter = LinkMeter(clock=clock)
    for _ in range(40):  # all at once, into buffers of a link that carries 1 MB/s
        meter.sent("a", CHUNK // 8)
    assert meter.bytes_per_s == 0
    for _ in range(40):
        clock.now += 0.5
        meter.asks("a")
        meter.sent("a", CHUNK)
    assert 0.8 * 2 * CHUNK <= meter.bytes_per_s <= 1.1 * 2 * CHUNK
    long = LinkMeter(clock=clock)
    for _ in range(100):  # in one stream
        clock.now += 0.25
        long.sent("b", CHUNK)
    assert 0.8 * 4 * CHUNK <= long.bytes_per_s <= 1.1 * 4 * CHUNK


def test_a_limit_bounds_it_and_stands_for_it_until_there_is_traffic() -> None:
    clock = Clock()
    meter = LinkMeter(Throttle(2e6), clock=clock)
    assert meter.bytes_per_s == 2e6
    carry(meter, clock, 10e6, 10.0)
    assert meter.bytes_per_s == 2e6

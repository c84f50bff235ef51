"""Late joiners are not reported for what may be old."""

from __future__ import annotations

import pytest

from swarmtrain.protocol.membership.membership import LATELY_S, Arrivals

BEHIND = "9 rounds behind the median; at most 8 are merged"


@pytest.mark.parametrize("rule", ["round", "shards"])
def test_half_a_minute_after_somebody_came_nobody_is_named_for_what_may_be_old(rule: str) -> None:
    arrivals = Arrivals()
    assert arrivals.spares("ben", rule, BEHIND, 900.0), "this peer has not even come"
    arrivals.came_myself(900.0)
    assert not arrivals.spares("ben", rule, BEHIND, 1000.0), "ben has come long ago"
    arrivals.came("ben", 1000.0)
    assert arrivals.spares("ben", rule, BEHIND, 1000.0 + LATELY_S - 1)
    assert not arrivals.spares("carl", rule, BEHIND, 1001.0)
    about_ben = "says that ben has trained on 40 tokens; 30 are explained by now"
    assert arrivals.spares("carl", rule, about_ben if rule == "shards" else f"{BEHIND}: ben", 1001.0)
    assert not arrivals.spares("ben", rule, BEHIND, 1000.0 + LATELY_S)
    arrivals.came("ben", 1100.0)
    assert arrivals.spares("ben", rule, BEHIND, 1101.0), "it came back"
    arrivals.came_myself(2000.0)
    assert arrivals.spares("carl", rule, BEHIND, 2000.0 + LATELY_S - 1)
    assert not arrivals.spares("carl", rule, BEHIND, 2000.0 + LATELY_S)


@pytest.mark.parametrize(
    "rule", ["round", "tokens", "hash", "signature", "finite", "huge", "direction", "stall", "flood"]
)
def test_what_no_honest_peer_sends_is_named_at_once(rule: str) -> None:
    arrivals = Arrivals()
    arrivals.came("ben", 1000.0)
    arrivals.came_myself(1000.0)
    assert not arrivals.spares("ben", rule, "", 1001.0)


def test_who_comes_and_comes_costs_little_memory() -> None:
    arrivals = Arrivals()
    for number in range(5000):
        arrivals.came(str(number), 1000.0)
    assert len(arrivals._came_s) == 1024
    assert arrivals.spares("4999", "round", BEHIND, 1001.0)

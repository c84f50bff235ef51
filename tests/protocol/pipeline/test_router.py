"""Choice of a driver among a stage's peers, against plain references."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from swarmtrain.protocol.pipeline.router import VARIANTS, Router

SPEEDS = {"a": 100.0, "b": 200.0, "c": 400.0, "d": 100.0}


def _router(variant: str, peers: dict[str, float] = SPEEDS) -> Router:
    router = Router(random.Random(0), variant)
    router.set_peers(peers)
    return router


def _serve(router: Router, num_tasks: int, hung: str = "", in_flight: int = 8) -> tuple[Counter[str], float]:
    """Tasks of 100 tokens, so many at once, each peer one after the other at its speed; `hung` answers nothing. How
    many each did, and how long all took."""
    now, served = 0.0, Counter[str]()
    free = dict.fromkeys(SPEEDS, 0.0)
    under_way: list[tuple[float, float, str]] = []  # ends, began, by whom
    begun = 0
    while served.total() < num_tasks:
        while len(under_way) < in_flight and begun - served.total() < in_flight:
            peer, _ = router.choose(now, 100.0)
            if peer is None:
                break
            limit_s = router.limit_s(peer, 100.0)
            router.begun(peer, 100.0)
            free[peer] = max(free[peer], now) + 100.0 / SPEEDS[peer]
            under_way.append((now + limit_s if peer == hung else free[peer], now, peer))
            begun += 1
        under_way.sort()
        ends_s, began_s, peer = under_way.pop(0)
        now = max(now, ends_s)
        if peer == hung:
            router.timed_out(peer, now, now - began_s, 100.0)
            begun -= 1
        else:
            router.finished(peer, now, now - began_s, 100.0)
            served[peer] += 1
    return served, now


@pytest.mark.parametrize("variant", VARIANTS)
def test_peers_are_given_work_by_their_speed(variant: str) -> None:
    served, took_s = _serve(_router(variant), 2000)
    for peer, speed in SPEEDS.items():
        assert served[peer] / 2000 == pytest.approx(speed / sum(SPEEDS.values()), rel=0.1)
    assert took_s == pytest.approx(2000 * 100 / sum(SPEEDS.values()), rel=0.1)


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_that_hangs_costs_no_more_than_itself(variant: str) -> None:
    router = _router(variant)
    router.most_limit_s = 20.0  # for one of which nothing is known
    served, took_s = _serve(router, 2000, hung="d")
    assert not served["d"]
    assert took_s < 1.15 * 2000 * 100 / 700.0


def test_failures_ban_for_twice_as_long_each_time_and_an_answer_forgives_all() -> None:
    router = _router("round-robin")
    now = 0.0
    for ban_s in (15.0, 30.0, 60.0):
        router.begun("a", 1.0)
        router.failed("a", now, 0.0, 1.0, "gone")
        assert {router.choose(now + ban_s - 0.1, 1.0)[0] for _ in range(20)} == {"b", "c", "d"}
        now += ban_s
    router.begun("a", 1.0)
    router.finished("a", now, 1.0, 1.0)
    router.begun("a", 1.0)
    router.failed("a", now, 0.0, 1.0, "gone")
    assert "a" in {router.choose(now + 15.1, 1.0)[0] for _ in range(20)}


def test_bans_do_not_count_when_everyone_is_banned() -> None:
    router = _router("least-completion", {"a": 1.0, "b": 1.0})
    for peer in ("a", "b"):
        router.begun(peer, 1.0)
        router.failed(peer, 0.0, 0.0, 1.0, "gone")
    peer, reason = router.choose(0.1, 1.0)
    assert peer in ("a", "b") and "everyone is banned" in reason


def test_busy_is_a_short_pause_and_what_is_given_up_says_nothing() -> None:
    router = _router("round-robin", {"a": 1.0, "b": 1.0})
    router.begun("a", 1.0)
    router.refused_busy("a", 0.0, 1.0)
    assert {router.choose(0.0, 1.0)[0] for _ in range(5)} == {"b"}
    assert "a" in {router.choose(5.0, 1.0)[0] for _ in range(5)}
    for _ in range(50):
        router.begun("b", 1.0)
        router.given_up("b", 1.0)
    assert "b" in {router.choose(6.0, 1.0)[0] for _ in range(5)}


def test_nobody_is_chosen_where_nobody_is_or_all_were_asked() -> None:
    router = Router(random.Random(0))
    assert router.choose(0.0, 1.0) == (None, "the stage has no peer")
    router.set_peers(["a"])
    assert router.choose(0.0, 1.0, exclude={"a"})[0] is None

"""Routing of microbatches: in proportion to what each peer does, and past those that fail."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter

import pytest

from swarmtrain.protocol.pipeline.balance import StagePeer
from swarmtrain.protocol.pipeline.router import VARIANTS, Router, driver_share, most_in_flight

NAMES = ("a", "b", "c", "d")


def router(*peers: str, variant: str = "round-robin", seed: int = 0) -> Router:
    made = Router(random.Random(seed), variant)
    made.set_peers(peers)
    return made


def measured(rates: dict[str, float], variant: str = "round-robin", seed: int = 0) -> Router:
    """Return a router that has seen each peer do a task of 100 tokens at its rate."""
    made = router(*rates, variant=variant, seed=seed)
    for peer, rate in rates.items():
        done(made, peer, now=0.0, took_s=100 / rate)
    return made


def done(router: Router, peer: str, now: float, took_s: float, tokens: float = 100.0) -> None:
    router.begun(peer, tokens)
    router.finished(peer, now, took_s, tokens)


def chosen(router: Router, num: int, now: float = 0.0, tokens: float = 100.0) -> list[str]:
    peers = [router.choose(now, tokens)[0] for _ in range(num)]
    return [peer for peer in peers if peer is not None]


# ---------------------------------------------------------------- shares


def test_the_heap_is_what_a_plain_search_for_the_least_load_gives() -> None:
    rng = random.Random(7)
    rates = {f"p{i}": rng.uniform(1, 10) for i in range(12)}
    made, loads = measured(rates), dict.fromkeys(rates, 0.0)
    for _ in range(500):
        tokens = rng.choice([50.0, 100.0])
        peer, _ = made.choose(0.0, tokens)
        assert peer is not None and loads[peer] == pytest.approx(min(loads.values()))
        loads[peer] += tokens / rates[peer]


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_gets_its_share_of_the_work_within_two_percent(variant: str) -> None:
    """Against the plain reference: tasks in proportion to throughput. Ten tasks are in flight; each peer works off its
    own one after the other."""
    rng = random.Random(3)
    rates = {f"p{i:02d}": rng.uniform(100, 1000) for i in range(10)}
    made, free_s, now = router(*rates, variant=variant), dict.fromkeys(rates, 0.0), 0.0
    flying: list[tuple[float, str, float]] = []
    counts = Counter[str]()
    for task in range(4000):
        if len(flying) == 40:
            flying.sort()
            now, peer, begun_s = flying.pop(0)
            made.finished(peer, now, now - begun_s, 100.0)
        chosen_one, _ = made.choose(now, 100.0)
        assert chosen_one is not None
        made.begun(chosen_one, 100.0)
        free_s[chosen_one] = max(now, free_s[chosen_one]) + 100 / rates[chosen_one]
        flying.append((free_s[chosen_one], chosen_one, now))
        counts[chosen_one] += task >= 500
    ideal = 100 * sum(counts.values()) / sum(rates.values())
    worst = max(counts[peer] * 100 / rates[peer] for peer in rates)
    assert worst <= 1.03 * ideal, "the peer that has most to do ends last"
    assert now <= 1.03 * 100 * 4000 / sum(rates.values())


def test_first_done_counts_what_is_in_flight() -> None:
    made = measured({"a": 100.0, "b": 40.0}, variant="least-completion")
    order = []
    for _ in range(7):
        peer, reason = made.choose(0.0, 100.0)
        assert peer is not None and reason == "the first of 2 to be done"
        made.begun(peer, 100.0)
        order.append(peer)
    assert order == ["a", "a", "b", "a", "a", "a", "b"][:2] + order[2:]
    assert Counter(order) == {"a": 5, "b": 2}
    made.finished("b", 1.0, 1.0, 100.0)
    assert made.choose(1.0, 100.0)[0] == "b", "one in flight to it at 40 or 100 tokens/s, five to the other"


# ---------------------------------------------------------------- who is new, and what is measured


def test_who_was_not_measured_counts_as_the_median_of_the_others_and_enters_at_the_least_load() -> None:
    made = measured({"a": 100.0, "b": 50.0, "c": 10.0})
    assert router("x").tokens_per_s("x") == 1.0
    chosen(made, 100)
    made.set_peers([*"abc", "new"])
    assert made.tokens_per_s("new") == 50.0
    following = Counter(chosen(made, 21))
    assert following["new"] == pytest.approx(5, abs=1), f"not all 21 to make up for what it missed: {following}"


def test_what_was_charged_before_anybody_was_measured_starves_nobody() -> None:
    """Whoever had most then was charged as if it did a token per second, and waited until the other had made up for
    that: for thousands of tasks."""
    made = router("a", "b")
    assert {made.choose(0.0, tokens)[0] for tokens in (100.0, 1000.0)} == {"a", "b"}
    done(made, "a", now=1.0, took_s=0.1)
    assert Counter(chosen(made, 40, now=1.0)) == {"a": 20, "b": 20}


def test_a_peer_that_a_look_at_the_dht_missed_is_known_again_and_makes_up_for_nothing() -> None:
    made = measured({"a": 100.0, "b": 50.0})
    made.set_peers(["b"])
    assert set(chosen(made, 50)) == {"b"}
    made.set_peers(["a", "b"])
    assert made.tokens_per_s("a") == 100.0
    assert Counter(chosen(made, 30))["a"] == pytest.approx(20, abs=1)


def test_waiting_behind_ones_own_tasks_is_not_held_against_a_peer() -> None:
    made = router("a", "b")
    for _ in range(4):
        made.begun("a", 100.0)
    for end_s in (1.0, 2.0, 3.0, 4.0):
        made.finished("a", end_s, end_s, 100.0)  # all four had begun at 0
    assert made.tokens_per_s("a") == pytest.approx(100.0)


def test_one_slow_sample_moves_little_and_ten_times_slower_is_known_after_four() -> None:
    made, now = measured({"a": 100.0, "b": 100.0}), 0.0
    for _ in range(6):
        done(made, "a", now := now + 1, 1.0)
    done(made, "a", now := now + 60, 60.0)
    assert made.tokens_per_s("a") >= 70.0
    for _ in range(3):
        done(made, "a", now := now + 10, 10.0)
    assert made.tokens_per_s("a") <= 20.0
    for _ in range(6):
        done(made, "a", now := now + 10, 10.0)
    assert made.tokens_per_s("a") == pytest.approx(10.0)
    for _ in range(6):
        done(made, "a", now := now + 1, 1.0)
    assert made.tokens_per_s("a") == pytest.approx(100.0), "and back"


def test_a_forward_and_a_backward_are_one_measure() -> None:
    made = router("a")
    done(made, "a", 1.0, 1.0, tokens=100 / 3)
    done(made, "a", 3.0, 2.0, tokens=200 / 3)
    assert made.tokens_per_s("a") == pytest.approx(100 / 3)


def test_how_long_to_wait_follows_what_is_expected_and_what_was_seen() -> None:
    made = router("a")
    assert made.limit_s("a", 100.0) == made.most_limit_s == made.limit_s("stranger", 100.0)
    done(made, "a", 5.0, 5.0)
    assert made.limit_s("a", 100.0) == pytest.approx(30.0), "six times as long"
    made.begun("a", 300.0)
    assert made.limit_s("a", 100.0) == pytest.approx(120.0), "behind three others"
    for now in (6.0, 7.0, 8.0, 9.0, 10.0, 11.0):
        made.begun("a", 1.0)
        made.finished("a", now, 0.01, 1.0)
    made.finished("a", 12.0, 0.01, 300.0)
    assert made.limit_s("a", 1.0) == made.least_limit_s


# ---------------------------------------------------------------- who fails


def test_a_timeout_is_a_long_sample_and_bans_for_twice_as_long_each_time() -> None:
    made, now = measured({"a": 100.0, "b": 100.0}), 100.0
    for wait_s in (15, 30, 60, 120, 240, 480, 600, 600):
        made.begun("a", 100.0)
        assert made.timed_out("a", now, 10.0, 100.0) == f"no answer in 10.0 s: left alone for {wait_s} s"
        assert set(chosen(made, 20, now + wait_s - 0.01)) == {"b"}
        assert made.next_s(now) == now + wait_s
        now += wait_s + 10
        assert "a" in chosen(made, 20, now)
    done(made, "a", now, 1.0)
    made.begun("a", 100.0)
    assert made.failed("a", now + 20, 5.0, 100.0, "it is gone") == "it is gone: left alone for 15 s"


def test_many_tasks_that_fail_together_are_one_failure() -> None:
    made = measured({"a": 100.0, "b": 100.0})
    for _ in range(5):
        made.begun("a", 100.0)
    assert made.timed_out("a", 10.0, 10.0, 100.0).endswith("left alone for 15 s")
    for now in (10.0, 10.0, 12.0, 13.0):  # all of them had begun before the ban ended
        assert "already" in made.timed_out("a", now, 10.0, 100.0)
    assert "b" in chosen(made, 1, 20.0), "10 s were lost, not 50"
    assert "a" in chosen(made, 20, 25.0)


def test_after_a_ban_it_gets_one_task_until_it_answers_and_nothing_to_make_up_for() -> None:
    made = measured({"a": 100.0, "b": 100.0})
    made.begun("a", 100.0)
    made.failed("a", 0.0, 0.1, 100.0, "it is gone")
    chosen(made, 100, 1.0)
    first = next(i for i in range(10) if made.choose(16.0, 100.0)[0] == "a")
    assert first <= 2
    made.begun("a", 100.0)
    assert set(chosen(made, 10, 17.0)) == {"b"}, "on trial"
    made.finished("a", 18.0, 1.0, 100.0)
    assert Counter(chosen(made, 20, 18.0))["a"] == pytest.approx(10, abs=5)


def test_bans_do_not_count_when_everyone_is_banned() -> None:
    made = measured({"a": 100.0, "b": 100.0})
    for peer in "ab":
        made.begun(peer, 100.0)
        made.failed(peer, 0.0, 1.0, 100.0, "it is gone")
    peer, reason = made.choose(1.0, 100.0)
    assert peer in ("a", "b") and reason.endswith("everyone is banned, so that bans do not count")
    made.begun(peer, 100.0)
    assert "already" in made.failed(peer, 2.0, 1.0, 100.0, "it is gone"), "an outage of one's own bans nobody for long"
    assert router().choose(0.0, 1.0) == (None, "the stage has no peer")


def test_busy_is_a_short_pause_without_a_fault_and_the_task_is_not_charged() -> None:
    made = measured({"a": 1000.0, "b": 1000.0})
    for now in (0.0, 10.0, 20.0, 30.0):
        made.begun("a", 100.0)
        assert made.refused_busy("a", now, 100.0) == "busy: asked again after 0.2 s", "two tasks of 0.1 s"
        assert set(chosen(made, 6, now + 0.19)) == {"b"}
        assert "a" in chosen(made, 6, now + 0.21), "not longer the second time, and no trial"
    assert Counter(chosen(made, 100, 40.0))["a"] == pytest.approx(50, abs=3)
    for peer in "ab":
        made.begun(peer, 100.0)
        made.refused_busy(peer, 50.0, 100.0)
    assert made.choose(50.1, 100.0) == (None, "2 are busy, 0 are left alone")
    assert made.next_s(50.1) == pytest.approx(50.2)


def test_rather_wait_for_a_busy_one_than_ask_the_banned() -> None:
    made = measured({"a": 1000.0, "b": 1000.0})
    made.begun("a", 100.0)
    made.timed_out("a", 0.0, 10.0, 100.0)
    made.begun("b", 100.0)
    made.refused_busy("b", 1.0, 100.0)
    assert made.choose(1.1, 100.0) == (None, "1 are busy, 1 are left alone")
    assert made.next_s(1.1) == pytest.approx(1.2) and made.choose(1.21, 100.0)[0] == "b"
    quick = measured({"a": 100_000.0})
    quick.begun("a", 100.0)
    assert quick.refused_busy("a", 0.0, 100.0) == "busy: asked again after 0.1 s", "at least"


def test_a_task_is_not_sent_again_to_whom_it_was_with() -> None:
    made = measured({"a": 100.0, "b": 50.0, "c": 10.0})
    assert {made.choose(0.0, 100.0, exclude=["a", "b"])[0] for _ in range(20)} == {"c"}
    peer, reason = made.choose(0.0, 100.0, exclude=NAMES)
    assert peer is None and reason == "everyone that may be asked now was asked for this task"
    assert made.choose(0.0, 100.0)[0] in ("a", "b")


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_same_chance_gives_the_same_choices(variant: str) -> None:
    def played(seed: int) -> list[str | None]:
        rng, made = random.Random(11), router(*NAMES, variant=variant, seed=seed)
        peers = []
        for step in range(300):
            peer, _ = made.choose(step, 100.0)
            peers.append(peer)
            if peer is not None:
                made.begun(peer, 100.0)
                end = rng.random()
                if end < 0.8:
                    made.finished(peer, step + 0.5, rng.uniform(0.1, 2), 100.0)
                elif end < 0.9:
                    made.timed_out(peer, step + 0.5, 5.0, 100.0)
                else:
                    made.refused_busy(peer, step + 0.5, 100.0)
        return peers

    assert played(5) == played(5)
    assert played(5) != played(6), "of equals one is taken by chance"


def test_memory_is_bounded_whoever_comes_and_goes() -> None:
    made = router()
    for generation in range(23):
        made.set_peers([f"{generation}-{i}" for i in range(50)])
        chosen(made, 30)
    assert len(made._gone) <= 1024 and len(made._heap) <= 64 + 4 * 50 + 1
    with pytest.raises(ValueError, match="no such choice of a stage's peer: fastest; allowed: round-robin"):
        Router(random.Random(0), "fastest")


def test_one_that_left_the_stage_meanwhile_and_a_stranger_are_no_trouble() -> None:
    made = measured({"a": 100.0, "b": 100.0})
    made.begun("a", 100.0)
    made.set_peers(["b"])
    made.finished("a", 16.0, 1.0, 100.0)  # what it still did is counted
    for told in (made.timed_out("stranger", 16.0, 1.0, 1.0), made.refused_busy("stranger", 16.0, 1.0)):
        assert told == "it is not in the stage any more"
    made.given_up("stranger", 1.0)
    assert set(chosen(made, 10, 16.0)) == {"b"}


# ---------------------------------------------------------------- how many at once


def stages(*rates: list[float]) -> list[list[StagePeer]]:
    """Return for each stage a peer of each of these rates; those of the first stage are d0, d1, ..."""
    return [
        [
            StagePeer(peer=f"{'d' if stage == 0 else stage}{i}", stages=(stage,), tokens_per_s=rate)
            for i, rate in enumerate(of)
        ]
        for stage, of in enumerate(rates)
    ]


@pytest.mark.parametrize(
    ("rates", "quickest_s", "most"),
    [
        (([100.0], [100.0], [100.0]), None, 12),  # one in each stage's hands, and three that wait for it
        (([100.0], [100.0], [100.0]), 0.3, 12),  # they compute for 0.3 s: nothing of it is on the way
        (([100.0], [100.0], [100.0]), 0.8, 17),  # half a second on the way, ten a second
        (([100.0, 100.0], [100.0], [200.0]), None, 5),  # half of 4 + 4 + 2
        (([400.0], [100.0], [50.0]), None, 6),  # the fast ones do nothing most of the time
        (([100.0, 300.0], [400.0], [400.0]), None, 4),  # its part of the first stage's work
        (([100.0], [100.0] * 9, [100.0] * 2), None, 12),  # of nine one is busy
        (([0.0], [0.0], [0.0]), None, 12),  # nobody says
        (([100.0], [100.0], []), None, 0),  # nothing comes through
    ],
)
def test_so_many_are_under_way(rates: tuple[list[float], ...], quickest_s: float | None, most: int) -> None:
    assert most_in_flight("d0", stages(*rates), quickest_s, 10, 1000) == most


def test_no_more_than_a_quarter_of_a_batch_for_each_peer_of_the_smallest_stage_and_never_fewer_than_two() -> None:
    for batch, *sizes in itertools.product((1, 4, 8, 13, 64), range(1, 5), range(1, 7), range(1, 7)):
        made = stages(*([100.0] * size for size in sizes))
        each = [most_in_flight(one.peer, made, 1e6, 10, batch) for one in made[0]]
        assert len(set(each)) == 1 and 2 <= each[0] <= max(2, batch)
        assert each[0] == 2 or each[0] - 0.5 <= batch * min(sizes[1:]) / 4 / sizes[0]


def test_what_has_come_back_quickly_or_slowly_and_odd_moments_give_a_number_too() -> None:
    lone = stages([100.0])
    assert most_in_flight("d0", lone, None, 10, 8) == 2
    assert most_in_flight("d0", stages([100.0], [math.inf]), math.inf, 10, 8) == 2
    assert most_in_flight("somebody", stages([100.0], [1e-300]), 1e-9, 10, 800) == 2


def test_a_driver_that_lies_or_says_nothing_starves_nobody() -> None:
    drivers = [StagePeer(peer=name, stages=(0,), tokens_per_s=100.0) for name in "abc"]
    liar = StagePeer(peer="d", stages=(0,), tokens_per_s=9e11)
    assert driver_share("a", [*drivers, liar]) == 0.5 / 4 and driver_share("d", [*drivers, liar]) == 10 / 13
    silent = StagePeer(peer="d", stages=(0,), tokens_per_s=0.0)
    assert driver_share("a", [*drivers, silent]) == driver_share("d", [*drivers, silent]) == 1 / 4
    assert driver_share("d", drivers) == 1 / 4, "its own record says nothing of the first stage yet"
    assert driver_share("a", [silent]) == 1 / 2

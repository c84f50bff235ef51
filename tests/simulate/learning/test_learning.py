"""Learning in virtual time: each method against a plain loop or against what it must equal."""

from __future__ import annotations

import dataclasses
import functools
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from learnt import setting, tiny

from swarmtrain.algorithm.outer import OuterState, outer_step, weighted_mean
from swarmtrain.peer.training.session import Start
from swarmtrain.protocol.gossip.merge_plans import MergePlanner
from swarmtrain.protocol.gossip.messages import DownloadPublication, MergeDue, MergeFragment
from swarmtrain.protocol.gossip.partners import BackOff, PublicationVersion
from swarmtrain.simulate.comparison import compare
from swarmtrain.simulate.learning.gossip import LearningPeer, LearningWorld, VirtualRunner
from swarmtrain.simulate.learning.learner import Learner, Text, warm_weights
from swarmtrain.simulate.learning.methods import METHODS
from swarmtrain.simulate.learning.pace import Pace
from swarmtrain.simulate.learning.server import _Served, server, server_waiting
from swarmtrain.simulate.learning.setting import RunOutcome, Setting, setting_of
from swarmtrain.simulate.learning.synchronous import data_parallel, diloco

pytestmark = pytest.mark.slow

UNTRAINED = 5.5
"""Nats per byte of a model that knows nothing."""

LEARNING = [name for name, method in METHODS.items() if "learning" in method.works]


def played(method: str, one: Setting) -> RunOutcome:
    return METHODS[method].run(one)


def keys_of(method: str) -> dict[str, Any]:
    return {key.replace(".", "__"): value for key, value in METHODS[method].keys.items()}


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., RunOutcome]:
    """Play a method, with changes of the run file's keys, where nothing goes wrong; each play once."""
    scenario = tiny(tmp_path_factory.mktemp("calm"))

    @functools.cache
    def play(method: str, **changes: Any) -> RunOutcome:
        return played(method, setting(scenario, **keys_of(method), **changes))

    return play


@pytest.mark.parametrize("method", LEARNING)
def test_each_method_learns_the_same_thing_each_time(
    method: str, calm: Callable[..., RunOutcome], tmp_path: Path
) -> None:
    """Naive asynchronous momentum may not learn, which is why there are others."""
    scenario = tiny(tmp_path)
    # Of all inner steps of a round `batch` makes one step.
    changes = {"merge__inner_steps": 2} if method == "batch" else {}
    keys = keys_of(method) | changes
    one = setting(scenario, **keys)
    outcome = calm(method, **changes)
    assert outcome == played(method, one), "bit by bit"
    assert outcome.held_out_loss < (20 if method == "async-nesterov" else 4.2)
    assert outcome.tokens >= one.total_tokens and outcome.tokens == outcome.inner_steps * one.run.tokens_per_step
    assert outcome.virtual_time_s > 0 and outcome.sent_bytes > 0 and 0 <= outcome.stall_share < 1
    assert sum(outcome.peer_tokens) == outcome.tokens and len(outcome.peer_tokens) == one.num_peers
    other = setting(scenario.with_changes(seeds=(6,)), **keys)
    assert played(method, other).held_out_loss != outcome.held_out_loss


def test_diloco_is_a_plain_loop(tmp_path: Path) -> None:
    one = setting(tiny(tmp_path, peers={"number": 2, "slowdowns": [1, 2]}), merge__pacing=True)
    learners, steps = [one.learner(0), one.learner(1)], [one.steps_of_round(0), one.steps_of_round(1)]
    assert steps == [8, 4]
    theta = learners[0].reached
    state, tokens, round = OuterState(theta, torch.zeros_like(theta)), 0, 0
    while tokens < one.total_tokens:
        gradients = []
        for learner, number in zip(learners, steps, strict=True):
            learner.enter(state.theta)
            for step in range(number):
                done = tokens + 2 * one.run.tokens_per_step * step  # a volunteer reckons that both do what it does
                learner.step(done / one.total_tokens)
            gradients.append(state.theta - learner.reached)
        state = outer_step(state, weighted_mean(gradients, steps), one.constants(round))
        tokens, round = tokens + 12 * one.run.tokens_per_step, round + 1
    outcome = diloco(one)
    assert outcome.held_out_loss == one.text.held_out_loss(state.theta)
    size_bytes = 4 * theta.numel()
    a_round_s = 8 * 0.01 + 2 * (size_bytes / 2 / one.bytes_per_s + 0.02)
    assert outcome.virtual_time_s == pytest.approx(round * a_round_s)
    assert outcome.sent_bytes == 2 * round * size_bytes


def test_data_parallel_is_one_with_large_batches(tmp_path: Path) -> None:
    one = setting(tiny(tmp_path, peers={"number": 1}))
    alone = one.learner(0)
    for step in range(one.total_tokens // one.run.tokens_per_step + 1):
        alone.step(step * one.run.tokens_per_step / one.total_tokens)
    assert data_parallel(one).held_out_loss == pytest.approx(one.text.held_out_loss(alone.reached), abs=1e-6)
    two = data_parallel(setting(tiny(tmp_path, peers={"number": 2, "slowdowns": [1, 3]})))
    assert two.stall_share > 0.3, "the faster one waits for the slower, at every step"


def test_one_that_gossips_with_nobody_takes_outer_steps_alone(tmp_path: Path) -> None:
    one = setting(tiny(tmp_path, peers={"number": 1}))
    world = LearningWorld(one)
    world.run()
    outcome = world.outcome()
    assert outcome.own_loss == pytest.approx(outcome.held_out_loss) and outcome.sent_bytes == 0
    assert outcome.fresh_share == 0.0 and outcome.stall_share == 0.0


def test_gossip_waits_for_nobody_and_merges_somebody_in_most_rounds(tmp_path: Path) -> None:
    scenario, keys = tiny(tmp_path), {"run__total_tokens": 24_000}  # in its first round nobody knows when that ends
    gossip, paced = played("gossip", setting(scenario, merge__fragments=2, **keys)), diloco(setting(scenario, **keys))
    assert gossip.virtual_time_s < 0.7 * paced.virtual_time_s
    assert gossip.fresh_share is not None and gossip.fresh_share > 0.8


def test_fragments_lose_nothing_even_where_they_follow_each_other_within_the_time_of_a_call(tmp_path: Path) -> None:
    """20 ms, as long as bytes take there and back, so that what is pulled is often merged a round later."""
    keys = {"run__total_tokens": 36_000}
    whole, parts = (played("gossip", setting(tiny(tmp_path), merge__fragments=n, **keys)) for n in (1, 4))
    assert parts.fresh_share is not None and parts.fresh_share > 0.6
    assert parts.held_out_loss < whole.held_out_loss + 0.02 and parts.virtual_time_s == whole.virtual_time_s


def mean_age(one: Setting) -> tuple[float, RunOutcome]:
    """Return the mean age in seconds of merged pseudo-gradients, once rounds are in step; and the run's outcome."""
    world, made, ages = LearningWorld(one), dict[int, float](), list[float]()
    for peer in world.peers:
        train_to, tell = peer.train_to, peer.gossip.tell

        def noted(moment: int, peer: LearningPeer = peer, train_to: Any = train_to) -> None:
            train_to(moment)
            made.update({id(fragment.newest): world.clock.now for fragment in peer.fragments})

        def told(event: Any, peer: LearningPeer = peer, tell: Any = tell) -> Any:
            commands = tell(event)
            if isinstance(event, MergeDue) and peer.round > 2:
                pulled = [each for due in commands if isinstance(due, MergeFragment) for each in due.pulled]
                ages.extend(world.clock.now - made[id(each.held)] for each in pulled if each.group != "weights")
            return commands

        peer.train_to, peer.gossip.tell = noted, told  # type: ignore[method-assign]
    world.run()
    return sum(ages) / len(ages), world.outcome()


def in_long_rounds(tmp_path: Path, publications: int, noise: float = 0.0) -> Setting:
    """Rounds last 48 s, and the way from one fragment's merge to the next's 24."""
    peers = {"step_ms": 1000, "noise": noise, "noise_lasts_s": 8.0}
    keys: dict[str, Any] = {"merge__inner_steps": 48, "merge__fragments": 2}
    return setting(
        tiny(tmp_path, peers=peers), run__total_tokens=90_000, merge__publications_per_round=publications, **keys
    )


def test_what_is_merged_in_long_rounds_was_published_just_before(tmp_path: Path) -> None:
    late_s, early_s = (mean_age(in_long_rounds(tmp_path, publications))[0] for publications in (32, 4))
    assert late_s < 4.0 and early_s > 10.0, (late_s, early_s)


def test_where_steps_are_not_all_equally_quick_pulls_are_planned_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A merge may come some seconds earlier than was expected when the one before was."""
    one = in_long_rounds(tmp_path, 32, noise=0.2)
    anew_s, anew = mean_age(one)
    monkeypatch.setattr(MergePlanner, "steps_done", lambda *_: None)
    once_s, once = mean_age(one)
    assert anew_s < once_s, (anew_s, once_s)
    assert anew.fresh_share is not None and once.fresh_share is not None
    assert anew.fresh_share > max(0.9, once.fresh_share), (anew.fresh_share, once.fresh_share)


def test_a_machine_is_as_fast_as_its_owner_lets_it_be() -> None:
    pace, even = Pace(deviation=0.3, lasts_s=10.0, seed=1), Pace()
    since_s, ends_s = 3.0, [pace.done_s(0, 3.0, work_s) for work_s in (0.0, 1.0, 20.0, 500.0)]
    assert ends_s == sorted(ends_s) and ends_s[0] == since_s
    for end_s, work_s in zip(ends_s, (0.0, 1.0, 20.0, 500.0), strict=True):
        assert pace.worked_s(0, since_s, end_s) == pytest.approx(work_s)
    assert pace.done_s(0, pace.done_s(0, 3.0, 20.0), 30.0) == pytest.approx(pace.done_s(0, 3.0, 50.0))
    assert 0.9 < pace.worked_s(0, 0.0, 10_000.0) / 10_000 < 1.2
    assert len({pace.done_s(*who) for who in ((0, 0.0, 50.0), (1, 0.0, 50.0))}) == 2, "others at other times"
    assert pace.done_s(0, 0.0, 50.0) == Pace(deviation=0.3, lasts_s=10.0, seed=1).done_s(0, 0.0, 50.0)
    assert pace.done_s(0, 0.0, 50.0) != Pace(deviation=0.3, lasts_s=10.0, seed=2).done_s(0, 0.0, 50.0)
    assert even.done_s(0, 3.0, 20.0) == 23.0 and even.worked_s(0, 3.0, 23.0) == 20.0
    assert even.worked_s(0, 3.0, 2.0) == pace.worked_s(0, 3.0, 2.0) == 0.0


@pytest.mark.parametrize("method", ["diloco", "data-parallel", "noloco"])
def test_where_machines_are_busy_at_times_all_wait_for_them(tmp_path: Path, method: str) -> None:
    peers = {"slowdowns": [1], "noise_lasts_s": 0.5}
    even, busy = (played(method, setting(tiny(tmp_path, peers={**peers, "noise": noise}))) for noise in (0.0, 0.5))
    assert 1.03 * even.virtual_time_s < busy.virtual_time_s < 3 * even.virtual_time_s
    assert busy.stall_share > even.stall_share
    assert busy.held_out_loss == even.held_out_loss, "what is learnt is the same"


def test_who_hangs_and_is_slow_works_that_much_later(tmp_path: Path) -> None:
    hang = {"peer": 0, "at_s": 2.0, "for_s": 3.0}
    one = hung(tmp_path, hang, peers={"noise": 0.3, "noise_lasts_s": 1.0})
    for work_s in (0.5, 2.5, 7.0):
        done_s = one.done_s(0, 0.0, work_s)
        assert done_s == one.pace.done_s(0, 0.0, work_s) or done_s > 5.0
        assert one.steps_between(0, 0.0, done_s) == pytest.approx(work_s / one.step_s[0], abs=1)
    assert one.due_s(0, 0.0, 1.0) == 1.0 and one.due_s(0, 0.0, 3.0) == 6.0, "clocks are not slower"


def hung(tmp_path: Path, *hangs: dict[str, float], **groups: object) -> Setting:
    return setting(tiny(tmp_path, hangs=list(hangs), **groups), merge__pacing=True, merge__silence_s=0.5)


def test_who_hangs_works_that_much_later(tmp_path: Path) -> None:
    one = hung(tmp_path, {"peer": 0, "at_s": 2.0, "for_s": 3.0}, {"peer": 0, "at_s": 7.0, "for_s": 1.0})
    for since_s, work_s, done_s in (
        (0.0, 1.0, 1.0),
        (0.0, 2.0, 2.0),
        (0.0, 3.0, 6.0),
        (4.0, 1.0, 6.0),
        (0.0, 4.5, 8.5),
    ):
        assert one.done_s(0, since_s, work_s) == done_s
    assert one.done_s(1, 0.0, 3.0) == 3.0, "another one"


def test_who_hangs_longer_than_the_silence_is_passed_over_and_its_work_lost(tmp_path: Path) -> None:
    short, long = ({"peer": 0, "at_s": 0.05, "for_s": for_s} for for_s in (0.3, 2.0))
    calm = hung(tmp_path)
    for method in ("diloco", "data-parallel", "modest"):
        outcomes = [played(method, one) for one in (calm, hung(tmp_path, short), hung(tmp_path, long))]
        times = [outcome.virtual_time_s for outcome in outcomes]
        assert times[0] < times[1] <= times[0] + 0.35 and times[2] > times[0] + 0.3
        assert [outcome.tokens_lost > 0 for outcome in outcomes[:2]] == [False, False]
        assert outcomes[2].tokens_lost > 0 or method == "data-parallel"
    alone = hung(tmp_path, long, peers={"number": 1})
    assert diloco(alone).virtual_time_s > 2.0, "nobody else goes on"


def test_of_one_that_goes_the_steps_that_it_took_are_lost(tmp_path: Path) -> None:
    """The fifth ends just before it goes, of eight a round."""
    one = setting(tiny(tmp_path, away=[{"peer": 0, "at_s": 0.055, "for_s": 1000.0}]), merge__pacing=False)
    assert one.steps_of_round(0) == 8 and one.step_s[0] == 0.01
    assert diloco(one).tokens_lost == 5 * one.run.tokens_per_step


@pytest.mark.parametrize("method", LEARNING)
def test_each_method_goes_on_when_somebody_hangs_and_transfers_break_off(
    method: str, calm: Callable[..., RunOutcome], tmp_path: Path
) -> None:
    bad = {"up_mbit": 10.0, "down_mbit": 10.0, "rtt_ms": 20.0, "failing_percent": 30.0}
    hangs = [{"peer": 0, "at_s": 0.1, "for_s": 1.0}, {"peer": 1, "at_s": 0.3, "for_s": 0.2}]
    one = setting(tiny(tmp_path, hangs=hangs, links=bad), **keys_of(method))
    outcome = played(method, one)
    assert outcome.tokens >= one.total_tokens and outcome.held_out_loss < 20
    assert sum(outcome.peer_tokens) == outcome.tokens
    assert outcome.virtual_time_s > calm(method).virtual_time_s


def back_off_of(peer: LearningPeer) -> BackOff:
    return peer.gossip.engine._others.back_off


def test_a_transfer_that_breaks_off_goes_on_and_one_that_never_ends_costs_its_peer(tmp_path: Path) -> None:
    calm = LearningWorld(setting(tiny(tmp_path), run__total_tokens=24_000))
    some, all_of_them = (LearningWorld(dataclasses.replace(calm.setting, failing=failing)) for failing in (0.3, 1.0))
    for world in (calm, some, all_of_them):
        world.run()
    calm_share, some_share, none = (world.outcome().fresh_share or 0.0 for world in (calm, some, all_of_them))
    assert calm_share >= some_share > 0.6 and none == 0.0
    bans = [back_off_of(peer).ready([other.name], 0.0)[1] for peer in all_of_them.peers for other in calm.peers]
    assert any(bans), "it is left alone for a while"
    assert not any(back_off_of(peer).ready([name], 1e9)[1] for peer in some.peers for name in some.by_name)


def test_gradients_of_few_bits_feed_their_errors_back(tmp_path: Path) -> None:
    """As those of real peers: what one publication loses is in the next."""
    peer = LearningWorld(setting(tiny(tmp_path))).peers[0]
    peer.begin()
    peer.train_to(1)
    fragment = peer.fragments[1]
    first = fragment.newest
    assert first is not None
    peer.serve(fragment, "gradient", first)
    second = dataclasses.replace(first, version=PublicationVersion(1, 1, first.version.tokens), sent=None)
    peer.serve(fragment, "gradient", second)
    assert first.sent is not None and second.sent is not None
    one, both = (first.vector - first.sent).norm(), (2 * first.vector - first.sent - second.sent).norm()
    assert both < 1.5 * one, "without, it would be twice as much"


@pytest.mark.parametrize(("number", "up_mbit", "finer"), [(3, 10.0, True), (3, 0.2, False), (6, 10.0, False)])
def test_gradients_are_finer_where_they_are_few_and_pulls_are_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, up_mbit: float, finer: bool
) -> None:
    world = LearningWorld(setting(tiny(tmp_path, peers={"number": number, "step_ms": 200}, links={"up_mbit": up_mbit})))
    begun: dict[str, list[str]] = {peer.name: [] for peer in world.peers}
    num_pulls = 0
    download, all_sizes = VirtualRunner.download, world.gossip.sizes

    def brought(
        driver: VirtualRunner, one: DownloadPublication[Any], num_lives: int, size_bytes: int, *rest: Any
    ) -> None:
        nonlocal num_pulls
        weighs = [sizes[one.held.format or "int2"] for sizes in all_sizes]
        assert size_bytes in [each.gradient if one.held.format else each.weights for each in weighs]
        num_pulls += 1
        download(driver, one, num_lives, size_bytes, *rest)

    monkeypatch.setattr(VirtualRunner, "download", brought)
    for peer in world.peers:

        def entered(start: Start, tokens: int, peer: LearningPeer = peer, enter: Any = peer.enter) -> None:
            begun[peer.name].append(start.gradient_format)
            enter(start, tokens)

        peer.enter = entered  # type: ignore[method-assign]
    world.run()
    for formats in begun.values():
        assert formats[0] == "int2", "it does not know how long its rounds last"
        assert set(formats[1:]) == ({"int4"} if finer else {"int2"})
    sizes = world.peers[0].fragments[0].sizes
    assert sizes["int4"].gradient > 1.8 * sizes["int2"].gradient and num_pulls > 4 * number


def test_rounds_are_dealt_shards_of_the_data(tmp_path: Path) -> None:
    one = setting(tiny(tmp_path), merge__inner_steps=4)
    world = LearningWorld(one)
    assert world.peers[0].coverage is not None and world.peers[0].coverage.num_shards > 3
    seen = set[int]()
    for peer in world.peers:
        peer.enter = lambda start, tokens, enter=peer.enter: (seen.add(start.shard), enter(start, tokens))  # type: ignore
    world.run()
    assert None not in seen and len(seen) > 3
    assert sum(sum(peer.coverage.seen) for peer in world.peers if peer.coverage) > world.tokens, "they tell each other"


def test_a_part_of_a_round_never_comes_after_a_later_one(tmp_path: Path) -> None:
    """A hang within a round, over before its end, once turned two publications round."""
    one = hung(tmp_path, {"peer": 2, "at_s": 0.05, "for_s": 0.06})
    world, done = LearningWorld(one), dict[str, list[tuple[int, int]]]()
    for peer in world.peers:
        train_to, seen = peer.train_to, done.setdefault(peer.name, [])

        def noted(moment: int, peer: LearningPeer = peer, train_to: Any = train_to, seen: Any = seen) -> None:
            train_to(moment)
            seen.append((peer.round, moment))

        peer.train_to = noted  # type: ignore[method-assign]
    world.run()
    assert all(seen == sorted(seen) for seen in done.values())
    assert sum(peer.learner.loop.batches.position for peer in world.peers) == world.inner_steps


def test_a_server_has_one_link_for_all(tmp_path: Path) -> None:
    """Alike volunteers end their rounds together: the last of them has its weights when those of all have passed."""
    links = {"up_mbit": 1.0, "down_mbit": 1.0, "rtt_ms": 0.0}
    one, four = (
        server_waiting(
            setting(
                tiny(tmp_path, peers={"number": number, "slowdowns": [1.0]}, links=links),
                merge__method="server",
                run__total_tokens=128 * 8 * number * 3,
            )
        )
        for number in (1, 4)
    )
    assert one.inner_steps == 24 and four.inner_steps == 96, "three rounds each"
    assert four.virtual_time_s - 0.24 > 2.5 * (one.virtual_time_s - 0.24) > 0


def test_what_a_worker_hands_in_enters_once_also_where_rounds_are_shorter_than_transfers(tmp_path: Path) -> None:
    """What ends while the piece before is on its way is one piece, as among real peers; and what is too old is lost."""
    scenario = tiny(tmp_path, links={"up_mbit": 0.05, "down_mbit": 10.0, "rtt_ms": 0.0})
    for staleness, is_lost in ((1000, False), (1, True)):
        one = setting(scenario, merge__method="server", merge__max_staleness_rounds=staleness)
        served = _Served(one, waiting=False, delay=1)
        outcome = served.run()
        rounds = [worker.round for worker in served.workers]
        assert [served.versions.round(worker.name) for worker in served.workers] == [number - 1 for number in rounds]
        assert 0 < served.arrivals < sum(rounds) and (outcome.tokens_lost > 0) == is_lost
        assert outcome.tokens == outcome.inner_steps * one.run.tokens_per_step


def test_a_worker_that_waits_stands_still_and_one_that_does_not_does_not(tmp_path: Path) -> None:
    one = setting(tiny(tmp_path), merge__method="server", merge__pacing=True)
    assert server_waiting(one).stall_share > 0.05 and server(one).stall_share == 0.0


def test_a_curve_is_measured_on_the_way(tmp_path: Path) -> None:
    one = dataclasses.replace(setting(tiny(tmp_path)), curve_points=4)
    for method in ("gossip", "diloco", "data-parallel", "server"):
        curve = played(method, one).curve
        assert len(curve) == 4
        tokens, times, losses = zip(*curve, strict=True)
        assert list(tokens) == sorted(tokens) and list(times) == sorted(times) and times[0] > 0
        assert losses[-1] < losses[0] < UNTRAINED


def test_who_has_a_text_of_its_own_learns_from_no_other(tmp_path: Path) -> None:
    """Two documents, one of each kind: the held-out text is of both."""
    for number, kind in enumerate(("abc", "xyz")):
        text = "\n".join(" ".join(random.Random(n).choices(kind, k=20)) for n in range(1000))
        (tmp_path / f"kind{number}.txt").write_text(text + "\n")
    scenario = tiny(tmp_path, peers={"number": 2}, set={"data.paths": ["kind*.txt"]})
    run = scenario.run(0)
    common, own = Text.of(run, tmp_path), Text.of(run, tmp_path, 2)
    assert own.held_out == common.held_out and {*own.held_out} >= {*b"abcxyz"}
    seen = [{*bytes(own.batches(number).next_batch().flatten().tolist())} for number in (0, 1)]
    assert seen[0] <= {*b"abc \n"} and seen[1] <= {*b"xyz \n"} and len(seen[0] | seen[1]) == 8
    assert {*bytes(common.batches(0).next_batch().flatten().tolist())} == seen[0] | seen[1]
    for text, told in (common, True), (own, False):
        one, other = LearningWorld(setting_of(scenario, text)).peers
        assert one.coverage is not None and other.coverage is not None
        other.coverage.trained(0, 128)
        one.receive_rows(other.name, other.coverage.rows_to_send())
        assert (sum(one.coverage.seen) > 0) is told, "shards of another text are others"


def test_own_weights_are_different(tmp_path: Path) -> None:
    one = setting(tiny(tmp_path, peers={"number": 2}), merge__init="own")
    assert not torch.equal(one.learner(0).reached, one.learner(1).reached)
    common = setting(tiny(tmp_path, peers={"number": 2}))
    assert torch.equal(common.learner(0).reached, common.learner(1).reached)


def test_a_warm_start_is_what_one_alone_has_learnt(tmp_path: Path) -> None:
    """A plain loop of steps by one of whose batches nobody of the run sees any; whatever merges then begins there."""
    one = setting(tiny(tmp_path))
    warm = warm_weights(one.run, tmp_path, 4000)
    alone = one.run.model_copy(update={"run": one.run.run.model_copy(update={"total_tokens": 4000})})
    learner = Learner(Text.of(alone, tmp_path), 1_000_000)
    for step in range(31):  # of 128 tokens
        learner.step(step / 31)
    assert torch.equal(warm, learner.reached)
    assert torch.equal(warm, warm_weights(setting(tiny(tmp_path), merge__pacing=False).run, tmp_path, 4000))
    assert one.text.held_out_loss(warm) < UNTRAINED - 1
    for method in LEARNING:
        short = setting(tiny(tmp_path), **keys_of(method), run__total_tokens=128)
        cold, begun = (played(method, each) for each in (short, dataclasses.replace(short, warm=warm)))
        if method == "async-nesterov":  # it unlearns
            assert begun.held_out_loss != cold.held_out_loss
        else:
            assert begun.held_out_loss < cold.held_out_loss - 0.2, method
    scenarios = (tiny(tmp_path, scenario={"warm_tokens": tokens}) for tokens in (0, 4000))
    cold, begun = (next(iter(compare(each, jobs=1, kept=None).outcomes.values())) for each in scenarios)
    assert begun.held_out_loss < cold.held_out_loss - 0.05


def test_jitter_and_losses_make_those_wait_who_wait(tmp_path: Path) -> None:
    bad = {"up_mbit": 10.0, "down_mbit": 10.0, "rtt_ms": 20.0, "jitter_ms": 50.0, "loss_percent": 5.0}
    good, late = setting(tiny(tmp_path)), setting(tiny(tmp_path, links=bad))
    rng = random.Random(0)
    assert good.late_s(100_000, rng) == 0.0
    several = [late.late_s(100_000, rng) for _ in range(50)]
    assert min(several) > 0.04 and max(several) < 0.26, "the last pieces' lateness, and at most a retransmission's"
    assert diloco(late).virtual_time_s > 1.2 * diloco(good).virtual_time_s
    assert diloco(late).held_out_loss == diloco(good).held_out_loss, "what is learnt is the same"
    assert played("gossip", late).virtual_time_s < 1.1 * played("gossip", good).virtual_time_s


def test_the_method_of_the_page_for_researchers_learns(tmp_path: Path) -> None:
    page = (Path(__file__).parents[3] / "docs" / "simulating.md").read_text(encoding="utf-8")
    (code,) = (one for one in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "def averaging(" in one)
    names: dict[str, Any] = {"torch": torch, "Setting": Setting, "RunOutcome": RunOutcome}
    exec(code, names)
    outcome = names["averaging"](setting(tiny(tmp_path)))
    assert outcome.held_out_loss < 4.0 and outcome.virtual_time_s > 0 and outcome.inner_steps >= 94


def test_one_a_hundred_times_slower_contributes_and_costs_nobody_anything(tmp_path: Path) -> None:
    """Its steps have fewer sequences, so that its rounds take no longer than the others', after the first."""
    # Short sequences: what is shown depends on how many there are.
    inner = {"inner__batch_sequences": 16, "merge__inner_steps": 16, "model__context_tokens": 8}
    inner["run__total_tokens"] = 120_000  # twenty rounds of each
    three = setting(tiny(tmp_path, peers={"number": 3, "slowdowns": [1.0, 1.0, 1.0]}), **inner)
    four = setting(tiny(tmp_path, peers={"number": 4, "slowdowns": [1.0, 1.0, 1.0, 100.0]}), **inner)
    theirs, together = LearningWorld(three), LearningWorld(four)
    theirs.run()
    together.run()
    slow, others = together.peers[3], together.peers[:3]
    assert slow.start.batch_sequences == 2 and slow.start.inner_steps == 1 and slow.step_tokens == 16
    assert all(peer.start.batch_sequences == 0 for peer in others)
    # It begins up to six rounds later, and its first round, in which it knows no speed, takes six rounds of the others.
    assert slow.rounds_done >= min(peer.rounds_done for peer in others) - 13
    assert slow.rounds_fresh >= 0.8 * slow.rounds_done
    assert together.clock.now <= 1.02 * theirs.clock.now
    losses = [one.setting.text.held_out_loss(one.consensus()) for one in (together, theirs)]
    assert losses[0] <= 1.01 * losses[1]

"""Volunteers of a scenario that come late, crash, come back or say nothing: what counts, and who waits for whom."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from learnt import setting, tiny

from swarmtrain.peer.merging.consensus import mean_of_near
from swarmtrain.protocol.gossip.partners import BackOff, Delta, Ledger, PublicationVersion
from swarmtrain.simulate.learning.churn import _present_state
from swarmtrain.simulate.learning.gossip import LearningPeer, LearningWorld, VirtualRunner
from swarmtrain.simulate.learning.methods import METHODS
from swarmtrain.simulate.learning.sampled import _sample
from swarmtrain.simulate.learning.setting import Setting
from swarmtrain.simulate.scenario import ScenarioChurn

pytestmark = pytest.mark.slow

LATE = {"peer": 2, "at_s": 0.0, "for_s": 0.15}
CRASH = {"peer": 0, "at_s": 0.23, "for_s": 0.1}


def churned(tmp_path: Path, method: str, *away: dict[str, float], **groups: Any) -> Setting:
    keys = {key.replace(".", "__"): value for key, value in METHODS[method].keys.items()}
    return setting(tiny(tmp_path, away=list(away), **groups), **keys)


@pytest.mark.parametrize("method", ["gossip", "diloco-paced", "server"])
def test_who_crashes_loses_its_round_and_the_run_goes_on(method: str, tmp_path: Path) -> None:
    one, run = churned(tmp_path, method, LATE, CRASH), METHODS[method].run
    outcome = run(one)
    assert outcome == run(one), "bit by bit"
    assert outcome.tokens >= one.total_tokens and outcome.tokens == outcome.inner_steps * one.run.tokens_per_step
    assert outcome.held_out_loss < 4.0 and 0 < outcome.tokens_lost <= 2 * 8 * one.run.tokens_per_step
    assert run(churned(tmp_path, method)).virtual_time_s < outcome.virtual_time_s < 5.0


@pytest.mark.parametrize("method", ["gossip", "diloco-paced", "server"])
def test_all_come_and_go(method: str, tmp_path: Path) -> None:
    one = churned(tmp_path, method, churn={"stays_s": 0.2, "away_s": 0.05})
    assert len(one.away) > 10
    outcome = METHODS[method].run(one)
    assert outcome.tokens >= one.total_tokens and outcome.tokens_lost > 0
    assert sum(outcome.peer_tokens) == outcome.tokens and min(outcome.peer_tokens) > 0
    assert outcome.tokens == outcome.inner_steps * one.run.tokens_per_step


def finished_tokens(world: LearningWorld) -> Counter[str]:
    """Fills as rounds end."""
    finished = Counter[str]()
    for peer in world.peers:
        end = peer.end

        def noted(peer: LearningPeer = peer, end: Any = end) -> None:
            finished[peer.name] += peer.start.inner_steps * world.setting.run.tokens_per_step
            end()

        peer.end = noted  # type: ignore[method-assign]
    return finished


def test_what_another_has_taken_counts_and_the_rest_does_not(tmp_path: Path) -> None:
    taken = []
    for at_s in (0.13, 0.18, 0.22, 0.27):
        away = {"peer": 0, "at_s": at_s, "for_s": 99.0}
        world = LearningWorld(churned(tmp_path, "gossip", away, set={"merge.fragments": 1}))
        finished = finished_tokens(world)
        world.run()
        gone = world.peers[0]
        versions = [peer.gossip.engine.merged_version(0, gone.name) for peer in world.peers[1:]]
        taken.append(
            max((version.tokens for version in versions if version and version.round == gone.round), default=0)
        )
        assert world.tokens == finished.total() + taken[-1] >= world.setting.total_tokens
        assert not gone.is_over and all(peer.is_over for peer in world.peers[1:])
    assert max(taken) > 0 == min(taken)


def test_each_step_enters_each_fragment_of_another_once_at_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered, merged = dict[tuple[int, str, int], list[tuple[int, int]]](), Ledger.merged

    def noted(self: Ledger, name: str, version: PublicationVersion, reference: int) -> None:
        news = self.news(name, version, reference)
        since = news.since.tokens if isinstance(news, Delta) else 0
        assert version.tokens - since == news.tokens > 0
        entered.setdefault((id(self), name, version.round), []).append((since, version.tokens))
        merged(self, name, version, reference)

    monkeypatch.setattr(Ledger, "merged", noted)
    churn, hang = {"stays_s": 0.4, "away_s": 0.05}, {"peer": 1, "at_s": 0.3, "for_s": 0.1}
    world = LearningWorld(churned(tmp_path, "gossip", churn=churn, hangs=[hang], set={"run.total_tokens": 40_000}))
    world.run()
    assert len(world.fragments) > 2 and len(world.setting.away) > 5 < len(entered)
    for which, spans in entered.items():
        for before, after in itertools.pairwise(spans):
            assert before[1] <= after[0], which
    most = world.setting.run.max_round_tokens
    assert max(until for spans in entered.values() for _, until in spans) <= most


def test_who_comes_late_takes_the_others_weights_and_round(tmp_path: Path) -> None:
    world = LearningWorld(churned(tmp_path, "gossip", LATE))
    late, others = world.peers[2], world.peers[:2]
    begin, there, seen, told = late.begin, list[Any](), list[Any](), list[Any]()

    def noted() -> None:
        if not seen:
            seen.extend((late.round, late.trainer.state.theta, world.clock.now))
            told.append(late.coverage and sum(late.coverage.seen))
        begin()

    late.begin = noted  # type: ignore[method-assign]
    world.clock.call_at(0.15, lambda: there.extend((one.round, one.trainer.state.theta) for one in others))
    world.run()
    (round, theta, began_s), (rounds, thetas) = seen, zip(*there, strict=True)
    assert round == min(rounds) >= 1 and torch.allclose(theta, mean_of_near(thetas, world.layout)[0])
    assert told[0] >= 8 * world.setting.run.tokens_per_step, "who has seen which data"
    assert began_s > 0.15 + 12 * theta.numel() / 1.25e6, "a whole state, and other weights, at 10 Mbit/s"
    assert late.learner.loop.young_steps == len(late.learner.losses) > 0 and others[0].learner.loop.young_steps is None


def test_who_was_away_shortly_goes_on_with_its_own(tmp_path: Path) -> None:
    world = LearningWorld(churned(tmp_path, "gossip", CRASH))
    one = world.peers[0]
    before: list[Any] = []
    codec, gossip = one.fragments[0].codec, one.gossip
    for at_s in (0.3, 0.331):
        world.clock.call_at(at_s, lambda: before.append((one.trainer.state.theta, one.round, one.is_here)))
    world.run()
    (away, away_round, away_is_here), (back, back_round, back_is_here) = before
    assert torch.equal(away, back) and away_round == back_round and (away_is_here, back_is_here) == (False, True)
    assert one.learner.loop.young_steps is None and one.knows_speed
    assert one.fragments[0].codec is not codec and one.gossip is not gossip, "no checkpoint keeps these"


def test_who_goes_while_it_is_pulled_from_is_left_alone(tmp_path: Path) -> None:
    calm, begun = LearningWorld(churned(tmp_path, "gossip")), list[tuple[float, int, str]]()
    for peer in calm.peers:

        def noted(
            one: Any, *args: Any, number: int = peer.number, download: Callable[..., None] = peer.gossip.download
        ) -> None:
            begun.append((calm.clock.now, number, one.source))
            download(one, *args)

        peer.gossip.download = noted  # type: ignore[method-assign]
    calm.run()
    at_s, reader, name = next(each for each in begun if each[0] > 0.15)
    gone = LearningWorld(churned(tmp_path, "gossip", {"peer": int(name[1:]), "at_s": at_s + 0.001, "for_s": 99.0}))
    for world, left_alone in (calm, False), (gone, True):
        world.run()
        found = world.peers[reader].gossip.engine._others.back_off.ready({name, "another"}, world.clock.now)
        assert (found == (frozenset({"another"}), "1 are left alone for now")) is left_alone


def test_nobody_overlaps_with_itself(tmp_path: Path) -> None:
    churn = ScenarioChurn(stays_s=10.0, away_s=5.0)
    found = churn.away(20, 3, 300.0)
    assert found == churn.away(20, 3, 300.0) != churn.away(20, 4, 300.0)
    assert churn.away(5, 3, 300.0) == [each for each in found if each.peer < 5]
    for before, after in itertools.pairwise(found):
        assert before.peer < after.peer or before.at_s + before.for_s < after.at_s < 300.0
    assert 200 < len(found) < 600 and 3 < sum(each.for_s for each in found) / len(found) < 7
    assert not ScenarioChurn().away(20, 3, 300.0)


@pytest.mark.parametrize("method", ["gossip", "diloco-paced", "server", "modest"])
def test_nobody_waits_for_those_who_never_speak_again(method: str, tmp_path: Path) -> None:
    hangs = [{"peer": number, "at_s": 0.1, "for_s": 1e5} for number in (1, 2)]
    one = churned(tmp_path, method, hangs=hangs)
    outcome = METHODS[method].run(one)
    assert outcome.tokens >= one.total_tokens and outcome.held_out_loss < 4.0
    assert outcome.virtual_time_s < (1.5 if method in ("gossip", "server") else 20.0)


def test_who_says_nothing_is_left_alone_and_then_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hang = {"peer": 1, "at_s": 0.1, "for_s": 1e5}
    changes = {"network.presence_ttl_s": 3.0, "network.call_limit_s": 0.2, "run.total_tokens": 70_000}
    changes = {**changes, "merge.fragments": 1}  # each fragment finds it out for itself, and once it is known to all
    one = churned(tmp_path, "gossip", hangs=[hang], set=changes)
    world, asked, failed = LearningWorld(one), list[float](), BackOff.failed
    theirs = [world.peers[number].gossip.engine._others.back_off for number in (0, 2)]

    def noted(self: BackOff, name: str, now: float, *about: Any) -> str:
        if name == "p1" and any(self is one for one in theirs):
            asked.append(now)
        return failed(self, name, now, *about)

    monkeypatch.setattr(BackOff, "failed", noted)
    world.run()
    assert 1 <= len(asked) <= 2 and max(asked) < 0.5, "once each"
    assert world.clock.now > 3.2 and world.live == [world.peers[0], world.peers[2]]


@pytest.mark.parametrize("calls", [True, False])
def test_who_goes_on_is_asked_again_as_soon_as_it_calls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: bool
) -> None:
    hang = {"peer": 1, "at_s": 0.1, "for_s": 1.0}
    changes = {"network.call_limit_s": 0.2, "run.total_tokens": 70_000, "merge.max_staleness_rounds": 50}
    world = LearningWorld(churned(tmp_path, "gossip", hangs=[hang], set=changes))
    if not calls:
        monkeypatch.setattr(BackOff, "called", lambda *_: None)
    at_once = list[int]()
    world.clock.call_at(1.1, lambda: at_once.append(world.peers[1].round))
    world.run()
    merged = [world.peers[number].gossip.engine.merged_version(0, "p1") for number in (0, 2)]
    first = at_once[0] + 1  # the first fragment is a round further than the trainer
    again = [version is not None and version.round > first for version in merged]
    assert again == [calls, calls], "else it is left alone for 10 s, and the run is over"


def test_who_hangs_does_nothing_and_takes_what_came_as_soon_as_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = LearningWorld(churned(tmp_path, "gossip", hangs=[{"peer": 1, "at_s": 0.125, "for_s": 0.375}]))
    told, tell = list[tuple[float, bool]](), VirtualRunner.tell

    def noted(driver: VirtualRunner, event: Any) -> Any:
        if driver.peer.number == 1:
            told.append((world.clock.now, world.is_hanging("p1")))
        return tell(driver, event)

    monkeypatch.setattr(VirtualRunner, "tell", noted)
    world.run()
    assert not any(is_hanging for _, is_hanging in told)
    assert any(at_s < 0.125 for at_s, _ in told) and any(at_s == 0.5 for at_s, _ in told)


def test_a_silent_majority_has_so_many_pulls_at_most(tmp_path: Path) -> None:
    hangs = [{"peer": number, "at_s": 0.2, "for_s": 1e5} for number in range(1, 16)]
    changes = {
        "merge.fragments": 1,
        "merge.num_partners": 1,
        "network.call_limit_s": 60.0,
        "network.presence_ttl_s": 60.0,
    }
    peers = {"number": 16, "slowdowns": [1.0]}
    world = LearningWorld(
        churned(tmp_path, "gossip", hangs=hangs, peers=peers, set={**changes, "run.total_tokens": 150_000})
    )
    numbers = list[int]()
    for at_s in range(1, 7):
        world.clock.call_at(at_s, lambda: numbers.append(len(world.peers[0].gossip.engine._states[0].open.begun)))
    world.run()
    assert numbers == sorted(numbers) and numbers[0] == 2 and max(numbers) == 4, "others are tried after a second"


def test_a_sample_is_of_those_who_answer(tmp_path: Path) -> None:
    hangs = [{"peer": number, "at_s": 1.0, "for_s": 100.0} for number in range(1, 5)]
    one = churned(tmp_path, "modest", hangs=hangs, peers={"number": 6})
    rng, silent = random.Random(0), set[int]()
    sample, now_s = _sample(one, 3, silent, 0.0, rng)
    assert len(sample) == 3 and now_s == 0.0 and not silent
    sample, now_s = _sample(one, 3, silent, 2.0, rng)
    assert sorted(sample) == [0, 5] and silent == {1, 2, 3, 4} and now_s in (7.0, 12.0)
    assert _sample(one, 2, silent, 50.0, rng)[1] == 50.0, "they are not asked again"
    assert sorted(_sample(one, 6, silent, 200.0, rng)[0]) == list(range(6)) and not silent, "until they go on"


def test_who_stood_still_for_long_takes_the_others_weights(tmp_path: Path) -> None:
    for for_s, far in ((1.2, True), (0.1, False)):
        hang = {"peer": 2, "at_s": 0.1, "for_s": for_s}
        world = LearningWorld(
            setting(tiny(tmp_path, hangs=[hang], set={"run.total_tokens": 40_000}), merge__method="gossip")
        )
        ends: list[tuple[int, int]] = []
        late, end = world.peers[2], world.peers[2].end
        late.end = lambda end=end, late=late, ends=ends: (ends.append((late.round, late.rounds_done)), end())  # type: ignore[method-assign,misc]
        world.run()
        rounds = [round for round, _ in ends]
        assert rounds == sorted(rounds)
        jumps = [after - before for before, after in itertools.pairwise(rounds)]
        assert (max(jumps) > 1) is far, jumps
        outcome = world.outcome()
        assert (outcome.tokens_lost > 0) is far
        assert outcome.tokens == outcome.inner_steps * world.setting.run.tokens_per_step


def test_who_comes_has_the_median_momentum_of_those_that_are_not_far_behind(tmp_path: Path) -> None:
    world = LearningWorld(churned(tmp_path, "gossip"))
    world.run()
    sample = world.peers[:3]
    momenta = torch.stack([peer.trainer.state.momentum for peer in sample])
    state, _ = _present_state(world, sample)
    assert torch.equal(state.momentum, momenta.median(dim=0).values) and bool(state.momentum.any())
    sample[0].trainer.progress = replace(sample[0].trainer.progress, round=-9)
    momenta[0] = 0.0
    state, round = _present_state(world, sample)
    assert torch.equal(state.momentum, momenta.median(dim=0).values), "of two the nearer to zero, number by number"
    assert round == min(peer.round for peer in sample[1:])

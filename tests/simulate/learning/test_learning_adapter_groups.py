"""Groups of an adapter in virtual time: volunteers that train some of them in each round, by gossip and in step."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from grouped import NUM_GROUPS, grouped_model
from learnt import setting, tiny
from torch import Tensor

from swarmtrain.algorithm.outer import OuterState
from swarmtrain.model.gpt import GPT
from swarmtrain.run import RunFile
from swarmtrain.simulate.learning import synchronous
from swarmtrain.simulate.learning.gossip import LearningWorld
from swarmtrain.simulate.learning.setting import Setting

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _grouped(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(run: RunFile, files: None, seed: int | None = None) -> GPT:
        return grouped_model(run.model, run.run.seed if seed is None else seed)

    monkeypatch.setattr("swarmtrain.simulate.learning.learner.build_run_model", build)


def of_groups(folder: Path, *trained: int, rtt_ms: float = 20.0, **changes: Any) -> Setting:
    """Volunteers of equal speed that train so many of the four groups in a round."""
    scenario = tiny(folder, peers={"number": len(trained), "slowdowns": [1.0]}, links={"rtt_ms": rtt_ms})
    return replace(setting(scenario, **changes), adapter_groups=trained)


def played(one: Setting) -> LearningWorld:
    world = LearningWorld(one)
    world.run()
    return world


def groups_of(world: LearningWorld, theta: Tensor) -> list[Tensor]:
    return [fragment.of(theta) for fragment in world.fragments]


@pytest.mark.parametrize("rule", ["direction", "trimmed"])
def test_a_group_that_nobody_trains_keeps_its_bits(rule: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Setting, "groups_of_round", lambda self, number, round, *_: frozenset([round % 2, 3]))
    world = played(of_groups(tmp_path, *([2] * 5), merge__robust=rule))
    before = groups_of(world, world.setting.learner(0).reached)
    assert len(world.fragments) == NUM_GROUPS
    for peer in world.peers:
        assert peer.rounds_done > 2
        after = groups_of(world, peer.trainer.state.theta)
        assert torch.equal(after[2], before[2]) and not torch.count_nonzero(peer.trainer.state_of(2).momentum)
        assert not any(torch.equal(after[group], before[group]) for group in (0, 1, 3))
        assert torch.equal(groups_of(world, peer.learner.reached)[2], before[2]), "and in the model itself"


def test_unequal_volunteers_learn_together_and_the_same_each_time(tmp_path: Path) -> None:
    one = of_groups(tmp_path, 1, 2, 4)
    world = played(one)
    outcome = world.outcome()
    assert outcome == played(one).outcome(), "bit by bit"
    assert outcome.held_out_loss < 4.2 and outcome.fresh_share is not None and outcome.fresh_share > 0.4
    for peer, trained in zip(world.peers, one.adapter_groups, strict=True):
        assert len(peer.learner.trained or ()) == trained


def named_in(world: LearningWorld) -> list[tuple[str, str]]:
    """Play, and return who was named for what."""
    named = list[tuple[str, str]]()
    world.told = lambda peer, incident: named.append((peer, incident.detail))  # type: ignore[method-assign]
    world.run()
    return named


def test_a_group_that_was_trained_long_ago_is_not_published_as_if_it_were_sent_again(tmp_path: Path) -> None:
    world = LearningWorld(of_groups(tmp_path, 1, 4, merge__max_staleness_rounds=1, run__total_tokens=24_000))
    assert not named_in(world) and world.peers[0].round > 2 * NUM_GROUPS


def test_who_has_not_trained_a_group_for_some_rounds_judges_no_directions_of_it(tmp_path: Path) -> None:
    """The last own gradient is of other weights, and honest ones were refused for going against it."""
    keys = {"merge__robust": "direction", "merge__inner_steps": 16, "run__total_tokens": 24_000}
    world = LearningWorld(of_groups(tmp_path, 1, 2, 4, rtt_ms=1.0, **keys))
    assert not named_in(world)
    versions = [world.peers[2].gossip.engine.merged_version(group, "p0") for group in range(NUM_GROUPS)]
    assert all(versions), "one group in each round, and each of them by now"


def test_synchronous_rounds_average_each_group_over_those_who_trained_it(tmp_path: Path) -> None:
    one = of_groups(tmp_path, 1, 2, merge__method="diloco")
    learners = [one.learner(number) for number in range(2)]
    theta = learners[0].reached
    start = OuterState(theta, torch.full_like(theta, 0.01))
    trained = [one.groups_of_round(number, 3, NUM_GROUPS) or frozenset() for number in range(2)]
    for learner, groups in zip(learners, trained, strict=True):
        learner.train_only(groups)
    state = synchronous.diloco_round(start, [(learners[0], 2), (learners[1], 4)], 2, 0, one.constants(0))
    world = LearningWorld(of_groups(tmp_path, 4, 4))
    lr, beta, seen = one.constants(0).learning_rate, one.constants(0).momentum, set[int]()
    for group in range(NUM_GROUPS):
        gradients = [start.theta - learner.reached for learner in learners]
        have = [
            (gradient, steps) for gradient, steps, its in zip(gradients, (2, 4), trained, strict=True) if group in its
        ]
        seen.add(len(have))
        m, w = (groups_of(world, vector)[group] for vector in (start.momentum, start.theta))
        if have:
            mean = sum(steps * groups_of(world, gradient)[group] for gradient, steps in have) / sum(s for _, s in have)
            m = beta * m + mean
            w = w - lr * (mean + beta * m)
        got_m, got_w = (groups_of(world, vector)[group] for vector in (state.momentum, state.theta))
        assert torch.allclose(got_m, m, atol=1e-7) and torch.allclose(got_w, w, atol=1e-7)
        assert have or (torch.equal(got_m, m) and torch.equal(got_w, w)), "nobody: to the bit"
    assert 0 in seen and 1 in seen
    outcome = synchronous.diloco(one)
    assert outcome.held_out_loss < 4.2 and outcome == synchronous.diloco(one), "bit by bit"

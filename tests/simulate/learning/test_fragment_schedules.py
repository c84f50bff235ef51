"""Random schedules of who goes, hangs and loses transfers, in rounds of all shapes, by the code of real peers with real
tensors: each step enters each fragment of another once at most, and nobody waits."""

from __future__ import annotations

import itertools
import random
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from learnt import setting, tiny

from swarmtrain.protocol.gossip.messages import MergeFragment
from swarmtrain.simulate.learning.gossip import LearningPeer, LearningWorld, VirtualRunner

pytestmark = pytest.mark.slow

NUM_SCHEDULES = 8
"""Schedules that continuous integration plays: about two seconds of a core each."""
NUM_IN_EVIDENCE = 64
"""Schedules that `make evidence` plays, without those eight."""
SEEDS = [
    *range(NUM_SCHEDULES),
    *(pytest.param(seed, marks=pytest.mark.evidence) for seed in range(NUM_SCHEDULES, NUM_IN_EVIDENCE)),
]


def drawn(folder: Path, seed: int) -> LearningWorld:
    """Return the swarm of a seed."""
    rng = random.Random(seed)
    number = rng.randint(2, 6)
    groups: dict[str, Any] = {
        "peers": {
            "number": number,
            "step_ms": rng.choice((10, 20, 100)),
            "slowdowns": [rng.choice((1.0, 1.2, 2.0, 5.0)) for _ in range(number)],
            "noise": rng.choice((0.0, 0.1, 0.5)),
            "noise_lasts_s": 0.5,
        },
        "links": {"up_mbit": rng.choice((2.0, 10.0, 100.0)), "failing_percent": rng.choice((0.0, 0.0, 20.0, 60.0))},
        "set": {"run.total_tokens": 128 * rng.randint(100, 240)},
    }
    step_s = groups["peers"]["step_ms"] / 1000
    if rng.random() < 0.5:
        groups["churn"] = {"stays_s": rng.uniform(20, 60) * step_s, "away_s": rng.uniform(2, 10) * step_s}
    if rng.random() < 0.5:
        hang = {
            "peer": rng.randrange(number),
            "at_s": rng.uniform(1, 40) * step_s,
            "for_s": rng.uniform(1, 60) * step_s,
        }
        groups["hangs"] = [hang]
    merge = {
        "merge__inner_steps": rng.choice((4, 7, 16, 24, 40)),
        "merge__fragments": rng.choice((1, 2, 3, 4, 4, 5, 8)),
        "merge__publications_per_round": rng.choice((4, 8, 31, 32, 64)),
        "merge__num_partners": rng.choice((1, 3, 8)),
        "merge__pacing": rng.random() < 0.8,
        "merge__robust": rng.choice(("none", "direction", "trimmed")),
    }
    return LearningWorld(setting(tiny(folder, **groups), **merge))


@pytest.mark.parametrize("seed", SEEDS)
def test_each_step_enters_each_fragment_once_whatever_happens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    world = drawn(tmp_path, seed)
    entered, weights = defaultdict[tuple[Any, ...], list[tuple[int, int]]](list), dict[tuple[Any, ...], int]()
    new = dict[tuple[Any, ...], int]()

    def noted(peer: LearningPeer, due: MergeFragment[Any, Any, Any]) -> None:
        for each in due.pulled:
            version, which = each.version, (peer.name, due.fragment, each.peer)
            if each.group == "gradient":
                tokens = new[*which, version]
                assert 0 < tokens <= version.tokens
                entered[*which, version.round].append((version.tokens - tokens, version.tokens))
            else:
                which = peer.num_lives, *which  # no checkpoint keeps which weights were merged
                assert weights.get(which, -1) < version.round, "those of one round count once"
                weights[which] = version.round

    arrival_untrusted, tell = LearningPeer.arrival_untrusted, VirtualRunner.tell

    def looked_at(peer: LearningPeer, decode: Any) -> Any:
        new[peer.name, decode.fragment, decode.author, decode.held.version] = decode.news.tokens
        return arrival_untrusted(peer, decode)

    def told(driver: VirtualRunner, event: Any) -> Any:
        commands = tell(driver, event)
        for command in commands:
            if isinstance(command, MergeFragment):
                noted(driver.peer, command)
        return commands

    monkeypatch.setattr(LearningPeer, "arrival_untrusted", looked_at)
    monkeypatch.setattr(VirtualRunner, "tell", told)
    world.run()
    run, now_s = world.setting.run, world.clock.now
    for which, spans in entered.items():
        for before, after in itertools.pairwise(spans):
            assert before[1] <= after[0], which
    assert all(until <= run.max_round_tokens for spans in entered.values() for _, until in spans)
    assert len(entered) >= len(world.fragments), "somebody is merged"
    assert world.is_over and world.tokens == world.inner_steps * run.tokens_per_step >= world.setting.total_tokens
    alone_s = (world.inner_steps + world.tokens_lost / run.tokens_per_step) * max(world.setting.step_s)
    away_s = sum(away.for_s for away in world.setting.away) + sum(hang.for_s for hang in world.setting.hangs)
    assert now_s < alone_s + away_s, "nobody waits: the slowest alone would not take longer"
    for peer in world.peers:
        state = peer.trainer.state
        assert bool(torch.isfinite(state.theta).all()) and bool(torch.isfinite(state.momentum).all())

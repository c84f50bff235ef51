"""Groups of an adapter: each is trained equally often, and peers that train few of them train different ones."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest

from swarmtrain.protocol.adapter_groups import (
    group_named,
    groups_of_names,
    tensor_name,
    trained_groups,
)


@pytest.mark.parametrize("num_groups", [1, 2, 3, 4, 8, 16])
def test_no_group_is_trained_more_than_one_round_more_often_than_another(num_groups: int) -> None:
    for num_trained in range(1, num_groups + 1):
        times = Counter(dict.fromkeys(range(num_groups), 0))
        for round in range(3 * num_groups):
            groups = trained_groups("ada", round, num_groups, num_trained)
            assert len(groups) == num_trained and groups <= set(range(num_groups))
            assert min(times[group] for group in groups) == min(times.values()), "least trained first"
            times.update(groups)
            assert max(times.values()) - min(times.values()) <= 1


def test_it_depends_on_the_peer_and_the_round_alone() -> None:
    plans = {peer: [trained_groups(peer, round, 4, 1) for round in range(8)] for peer in ("ada", "ben", "cy")}
    trained_groups.cache_clear()
    assert plans["ben"] == list(reversed([trained_groups("ben", round, 4, 1) for round in reversed(range(8))]))
    assert all(one != other for one, other in itertools.combinations(plans.values(), 2))
    together = Counter(group for plan in plans.values() for groups in plan for group in groups)
    assert together == dict.fromkeys(range(4), 6)


def test_peers_that_train_one_group_do_not_all_train_the_same() -> None:
    rounds = [{min(trained_groups(f"peer {n}", round, 4, 1)) for n in range(8)} for round in range(40)]
    assert sum(map(len, rounds)) / len(rounds) > 3.4, "drawn at random 3.6 of 4 groups are trained by somebody"


def test_a_name_has_the_group() -> None:
    names = [tensor_name(group, "layers.0.q.lora_A") for group in (0, 3, 15)]
    assert groups_of_names(names) == [0, 3, 15] and group_named(names[1]) == 3
    assert groups_of_names(["embed.weight", "group.0/x", "a/group0/x"]) is None and groups_of_names([]) is None

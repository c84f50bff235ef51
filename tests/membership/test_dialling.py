"""Whom a peer dials when it is asked to, and how often."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmtrain.membership.dialling import MAX_PORTS, DialBudget, dial_targets, is_public


def test_only_where_the_question_came_from() -> None:
    assert dial_targets(["/ip4/203.0.113.5/tcp/50000"], [31337]) == ("/ip4/203.0.113.5/tcp/31337",)
    assert dial_targets(["/ip6/2001:db8::7/tcp/1", "/ip4/10.0.0.2/tcp/1"], [1, 2]) == (
        "/ip6/2001:db8::7/tcp/1",
        "/ip6/2001:db8::7/tcp/2",
        "/ip4/10.0.0.2/tcp/1",
        "/ip4/10.0.0.2/tcp/2",
    )


@pytest.mark.parametrize(
    "seen",
    [
        "",
        "/unix/run/docker.sock",
        "/dns/example.org/tcp/5",
        "/ip4/203.0.113.5/udp/50000",
        "/ip4/203.0.113.5/tcp/4001/p2p/Qm/p2p-circuit",
        "/ip4/169.254.169.254/tcp/80",
        "/ip6/fe80::1/tcp/80",
        "/ip4/224.0.0.1/tcp/80",
        "/ip4/0.0.0.0/tcp/80",
        "/ip4/300.1.1.1/tcp/80",
    ],
)
def test_nothing_is_dialled_for_one_who_comes_from_nowhere_plain(seen: str) -> None:
    assert dial_targets([seen], [31337]) == ()


@given(st.lists(st.integers(-5, 2**32), max_size=50), st.integers(0, 9))
def test_few_targets_whatever_is_asked(ports: list[int], num_seen: int) -> None:
    seen = [f"/ip4/10.0.0.{number}/tcp/9" for number in range(num_seen)]
    targets = dial_targets(seen, ports)
    assert len(targets) <= 2 * MAX_PORTS and len(set(targets)) == len(targets)
    for target in targets:
        assert target.split("/")[2] in [address.split("/")[2] for address in seen]
        assert 0 < int(target.rsplit("/", 1)[1]) < 65536


def test_a_budget_for_each_who_asks_and_for_all() -> None:
    budget = DialBudget(per_host=2, in_all=5)
    anna, ben = ["/ip4/10.0.0.1/tcp/1", "/ip4/10.0.0.1/tcp/2"], ["/ip4/10.0.0.2/tcp/1"]
    assert budget.admit(anna, 0.0) and budget.admit(anna, 1.0), "two ports are one dial"
    assert not budget.admit(anna, 59.9)
    assert budget.admit(ben, 59.9), "another may"
    assert budget.admit(anna, 60.0) and not budget.admit(anna, 60.9) and budget.admit(anna, 61.0)
    for number in range(3, 5):
        assert budget.admit([f"/ip4/10.0.0.{number}/tcp/1"], 62.0)
    assert not budget.admit(["/ip4/10.0.0.9/tcp/1"], 62.0), "all together have had theirs"


def test_the_owner_of_an_ipv6_network_counts_once() -> None:
    budget = DialBudget(per_host=2)
    assert budget.admit(["/ip6/2001:db8:0:1::1/tcp/1"], 0.0)
    assert budget.admit(["/ip6/2001:db8:0:1:ffff::2/tcp/1"], 0.0)
    assert not budget.admit(["/ip6/2001:db8:0:1:abcd::3/tcp/1"], 0.0)
    assert budget.admit(["/ip6/2001:db8:0:2::1/tcp/1"], 0.0)


def test_what_is_of_the_internet() -> None:
    public = ["/ip4/8.8.8.8/tcp/5", "/ip6/2606:4700::1111/tcp/5"]
    local = [
        "/ip4/10.0.0.1/tcp/5",
        "/ip4/100.64.0.9/tcp/5",
        "/ip6/fd00::1/tcp/5",
        "/ip4/300.1.1.1/tcp/5",
        "/dns/a/tcp/5",
    ]
    assert [is_public(address) for address in public + local] == [True] * 2 + [False] * 5

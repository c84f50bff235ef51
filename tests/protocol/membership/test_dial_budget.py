"""Addresses that a peer dials on request, and how often."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmtrain.protocol.membership.budgets import (
    MAX_PORTS,
    DialBudget,
    dial_targets,
    is_public,
    may_be_dialled,
    may_dial,
)


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


FORMS_OF_METADATA = [
    "169.254.169.254",
    "::ffff:169.254.169.254",
    "::ffff:a9fe:a9fe",
    "0:0:0:0:0:ffff:a9fe:a9fe",
    "::169.254.169.254",
    "::ffff:0:169.254.169.254",
    "64:ff9b::169.254.169.254",
    "64:ff9b:1::a9fe:a9fe",
    "2002:a9fe:a9fe::1",
    "2001:0:a9fe:a9fe:0:0:0:0",
    "2001:0:a9fe:a9fe:0:0:f7f7:f7f7",  # the tunnel's server; its other end is 8.8.8.8
    "2001:0:4136:e378:8000:63bf:5601:5601",
    "fd00:1::5efe:169.254.169.254",
    "2001:db8::200:5efe:a9fe:a9fe",
]


@pytest.mark.parametrize(
    "host",
    [
        *FORMS_OF_METADATA,
        "fe80::1%eth0",
        "fe80::1%1",
        "2606:4700::1111%eth0",
        "::ffff:224.0.0.1",
        "::ffff:0.0.0.0",
        "2002:e000:0001::",
        "64:ff9b::255.255.255.255",
        "255.255.255.255",
        "fd00:ec2::254",
        "100.100.100.200",
        "::ffff:100.100.100.200",
        "169.254.169.254.nip.io",
        "localhost",
        "",
    ],
)
def test_what_is_no_peers_is_not_dialled_in_whatever_form_it_is_written(host: str) -> None:
    assert not may_be_dialled(host)
    for kind in ("ip4", "ip6", "dns", "dns4", "dns6", "dnsaddr", "ip6zone"):
        assert not may_dial(f"/{kind}/{host}/tcp/80")
    for address in (f"/ip6/{host}/tcp/50000", f"/ip4/{host}/tcp/50000"):
        assert dial_targets([address], [80]) == ()


def test_a_zone_before_the_address_is_not_dialled() -> None:
    assert not may_dial("/ip6zone/eth0/ip6/fe80::1/tcp/80") and not may_dial("/ip6zone/x/ip6/2606:4700::1111/tcp/80")


@pytest.mark.parametrize(
    "host",
    [
        "::ffff:203.0.113.7",
        "2002:cb00:7107::1",
        "64:ff9b::203.0.113.7",
        "2001:0:4136:e378:8000:63bf:3fff:fdd2",
        "2001:db8::1",
        "fd00::1",
        "::1",
        "::ffff:127.0.0.1",
    ],
)
def test_what_may_be_a_peers_is_dialled(host: str) -> None:
    """Private ones too: swarms live in local networks."""
    assert may_be_dialled(host) and may_dial(f"/ip6/{host}/tcp/80")
    assert not may_dial(f"/ip4/{host}/tcp/80"), "of the other family"


@given(st.integers(0, 2**128 - 1))
def test_any_address_is_judged(number: int) -> None:
    host = str(ipaddress.IPv6Address(number))
    assert may_dial(f"/ip6/{host}/tcp/1") == may_be_dialled(host)


@pytest.mark.parametrize("kind", ["dns", "dns4", "dns6", "dnsaddr"])
def test_no_name_of_a_strangers_is_resolved(kind: str) -> None:
    assert not may_dial(f"/{kind}/example.org/tcp/443") and not may_dial(f"/{kind}/203.0.113.7/tcp/443")

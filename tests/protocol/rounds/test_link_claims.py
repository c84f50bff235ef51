"""What is believed of the links that peers tell."""

from __future__ import annotations

from swarmtrain.protocol.membership.membership import Membership, PeerInfo
from swarmtrain.protocol.rounds.link_claims import LinkClaims
from swarmtrain.protocol.rounds.roles import LinkRates

BODY, NUM_CHUNKS = 25_000_000, 96
MBIT = 125_000.0
PEERS = "abcd"


def link(mbit: float, can_be_dialled: bool = True) -> LinkRates:
    return LinkRates(mbit * MBIT, mbit * MBIT, can_be_dialled)


def claims(own: LinkRates, **told: LinkRates | None) -> LinkClaims:
    """Claims of a, which has told peers `told` of."""
    membership = Membership("a")
    for peer, rates in told.items():
        membership.saw_presence(PeerInfo(peer=peer, link=rates, training=True), 1000.0, 0.0)
    return LinkClaims(membership, own)


def shares(some: LinkClaims, peers: str = PEERS) -> tuple[int, ...]:
    return some.shares(list(peers), NUM_CHUNKS, BODY)


def test_fast_links_get_shares_and_a_peer_that_cannot_be_dialled_none() -> None:
    assert shares(claims(link(10), b=link(100), c=link(100), d=link(100, can_be_dialled=False))) == (0, 48, 48, 0)


def test_shares_are_equal_if_a_peer_is_older_or_unknown_or_nothing_is_measured() -> None:
    assert shares(claims(link(10), b=link(100), c=link(100), d=None)) == ()
    assert shares(claims(link(10), b=link(100), c=link(100))) == ()
    assert shares(claims(LinkRates(), b=LinkRates(), c=LinkRates(), d=LinkRates())) == ()
    assert shares(claims(link(50), b=link(50), c=link(50), d=link(50))) == ()
    assert claims(link(10), b=link(100)).shares(["a", "b"], 0, BODY) == ()


def test_shares_are_equal_while_a_volunteer_that_is_not_on_the_roster_is_older() -> None:
    told = {"b": link(100), "c": link(100), "d": link(20)}
    assert shares(claims(link(10), **told, e=link(20))) == (0, 48, 48, 0)
    some = claims(link(10), **told, e=None)
    assert shares(some) == (), "it would ask for equal shares, and take no other"
    some.membership.left("e", 1.0)
    assert shares(some) == (0, 48, 48, 0)


def test_a_late_share_makes_a_claim_a_quarter_and_shares_in_time_or_rounds_restore_it() -> None:
    some = claims(link(80), b=link(200), c=link(80), d=link(80))
    believed = shares(some)
    assert believed[1] > 70
    some.judged("b", in_time=False)
    doubted = shares(some)
    assert doubted == shares(claims(link(80), b=link(50), c=link(80), d=link(80)))
    some.judged("b", in_time=True)
    assert doubted[1] < shares(some)[1] < believed[1]
    some.judged("b", in_time=True)
    some.judged("b", in_time=True)
    assert shares(some) == believed
    for _ in range(40):
        some.judged("b", in_time=False)
    assert shares(some)[1] == 0
    for round in range(1, 81):
        some.round_over(round)
    assert shares(some) == believed


def test_what_averaging_should_take_is_known_only_if_a_link_is() -> None:
    some = claims(link(10), b=link(100), c=link(100), d=None)
    assert some.averaging_s(PEERS, (0, 48, 48, 0), BODY) == 20.0
    assert some.averaging_s(PEERS, (), BODY) == 0.0
    assert claims(LinkRates(), b=None).averaging_s("ab", (48, 48), BODY) == 0.0
    crawls = claims(link(100), b=LinkRates(1.0, 1.0))
    assert crawls.averaging_s("ab", (48, 48), BODY) < 1000, "nobody waits longer than a pull is given"

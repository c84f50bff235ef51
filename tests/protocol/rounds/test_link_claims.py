"""What is believed of the links that peers tell."""

from __future__ import annotations

from swarmtrain.protocol.membership.membership import Membership, PeerInfo
from swarmtrain.protocol.rounds.link_claims import AveragingTimes, LinkClaims
from swarmtrain.protocol.rounds.roles import LinkRates
from swarmtrain.protocol.rounds.rosters import Roster, RoundPublication
from swarmtrain.protocol.rounds.share_waits import MergeLimit, ShareWaits, author_due_s, merge_limit_s, piece_due_s

BODY, NUM_CHUNKS = 25_000_000, 96
MBIT = 125_000.0
PEERS = "abcd"
LIMIT_S = 600.0


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
    assert some.averaging_times(PEERS, (0, 48, 48, 0), BODY, LIMIT_S) == AveragingTimes(20.0, (20.0,) * 4)
    assert some.averaging_times(PEERS, (), BODY, LIMIT_S) is None
    assert claims(LinkRates(), b=None).averaging_times("ab", (48, 48), BODY, LIMIT_S) is None
    outside = claims(link(5), b=link(100), c=link(100), d=link(100))
    times = outside.averaging_times("bcd", (48, 48, 0), BODY, LIMIT_S)
    assert times == AveragingTimes(40.0, (40.0,) * 3), "it receives the mean"


def test_one_that_tells_of_a_link_that_crawls_makes_nobody_wait_for_hours() -> None:
    told = {"b": link(100), "c": link(100), "d": LinkRates(1.0, 1.0)}
    honest = claims(link(100), **(told | {"d": link(10)})).averaging_times(PEERS, (0, 48, 48, 0), 10 * BODY, LIMIT_S)
    assert honest == AveragingTimes(200.0, (20.0, 40.0, 40.0, 200.0))
    crawls = claims(link(100), **told).averaging_times(PEERS, (0, 48, 48, 0), 10 * BODY, LIMIT_S)
    assert crawls == AveragingTimes(LIMIT_S, (20.0, 40.0, 40.0, LIMIT_S)), "others take as long as before"

    def due_s(times: AveragingTimes | None, last_piece_s: float = 1000.0) -> float:
        assert times is not None
        return piece_due_s(1000.0, last_piece_s, times.pairs_s[1], times.everyone_s, silence_s=5.0) - 1000.0

    assert due_s(honest) == 80.0, "twice what b and a need"
    assert due_s(crawls) == LIMIT_S / 4, "b may have to wait for d's bytes, but not for all of them"
    assert due_s(honest, 1150.0) == 150.0 + 50.0, "pieces come as fast as the slowest sends"
    assert due_s(honest, 1790.0) == 4 * 200.0, "an owner that sends one now and then"


def roster(shares: tuple[int, ...], peers: str = "abcdef") -> Roster:
    entries = tuple(RoundPublication(peer=peer, snapshot=peer, tokens=1, inner_steps=1) for peer in peers)
    return Roster(round=0, signer="a", entries=entries, shares=shares)


def test_a_signer_cannot_give_one_peer_more_than_three_equal_shares() -> None:
    some = claims(link(10), **{peer: link(100) for peer in "bcdef"})
    for shares in ((), (0, 48, 48, 0, 0, 0), (16,) * 6):
        assert some.bounded(roster(shares)) == (roster(shares), "")
    for shares in ((0, 96, 0, 0, 0, 0), (0, 49, 47, 0, 0, 0)):
        bounded, flaw = some.bounded(roster(shares))
        assert bounded == roster(()) and bounded.digest == roster(shares).digest, "all take the same mean"
        assert flaw == f"a roster by which b averages {max(shares)} of 96 chunks of the mean, more than 48"


def test_where_few_can_be_dialled_they_may_average_everything_in_equal_shares() -> None:
    told = {peer: link(100, can_be_dialled=False) for peer in "cdefgh"}
    some = claims(link(10), b=link(100), **told)
    shares = some.shares(list("abcdefgh"), NUM_CHUNKS, BODY)
    assert shares == (48, 48, 0, 0, 0, 0, 0, 0), "however fast b is"
    assert some.bounded(roster(shares, "abcdefgh")) == (roster(shares, "abcdefgh"), "")
    assert some.bounded(roster((0, 96, 0, 0, 0, 0, 0, 0), "abcdefgh"))[0].shares == ()
    nobody = claims(link(10, can_be_dialled=False), b=link(100, can_be_dialled=False), **told)
    assert nobody.bounded(roster((96, 0, 0, 0, 0, 0, 0, 0), "abcdefgh"))[1]


def waits(crawls: float, num: int = 3) -> ShareWaits:
    """Waits of the last of `num` peers, which has no share, for shares of 48, 24 and 24 chunks; the first owner tells
    of a link with which it needs `crawls` seconds, the others ten."""
    times = AveragingTimes(crawls, (crawls, *[10.0] * (num - 1), 10.0))
    return ShareWaits(1000.0, (48, *[48 // (num - 1)] * (num - 1), 0), num, times, silence_s=5.0)


def test_an_owner_that_sends_nothing_is_measured_by_the_others() -> None:
    some = waits(crawls=600.0)
    assert some.due_s(0) == 2200.0, "twice what it says that it needs"
    some.came(1, 24, 1008.0)
    assert some.due_s(0) == 1032.0, "half of what the others average has come in 8 s"
    assert some.due_s(2) == 1150.0, "of the others of number 2 only a third has come"
    some.came(0, 3, 1030.0)
    assert some.due_s(0) == 1064.0, "it has sent something"
    some.came(2, 24, 1060.0)
    assert some.due_s(0) == 1064.0, "more that comes later does not move it"


def test_beside_others_that_are_fast_an_owner_still_has_the_time_of_a_silence() -> None:
    some = waits(crawls=10.0)
    some.came(1, 24, 1000.1)
    assert some.due_s(0) == 1005.0


def test_an_owner_of_all_and_equal_shares_are_waited_for_as_told() -> None:
    alone = ShareWaits(1000.0, (96, 0), 1, AveragingTimes(20.0, (20.0, 20.0)), silence_s=5.0)
    assert alone.due_s(0) == 1040.0
    equal = ShareWaits(1000.0, (48, 48), 1, None, silence_s=5.0)
    assert equal.due_s(0) == float("inf"), "its own share takes as long"
    equal.own_is_ready(1010.0)
    assert equal.due_s(0) == 1030.0


def test_what_one_tells_holds_a_merge_up_for_a_round_s_limit_at_most() -> None:
    honest = {peer: link(200) for peer in "bcdefg"}
    shares = (12,) * 8

    def limit_s(last: LinkRates, body_bytes: int = BODY) -> float:
        expected_s = claims(link(200), **honest, h=last).merging_s("abcdefgh", shares, body_bytes)
        return merge_limit_s(expected_s, 5.0, LIMIT_S)

    assert limit_s(link(200)) == 30.0, "six silences"
    assert limit_s(link(10)) == 8 * 1.75 * 20.0, "an honest slow link has eight times what it needs"
    assert limit_s(link(10), 300_000_000) == LIMIT_S
    assert limit_s(LinkRates(1.0, 1.0)) == LIMIT_S, "a link that crawls"
    assert limit_s(LinkRates()) == limit_s(LinkRates(0.0, 200 * MBIT)) == LIMIT_S, "how fast it sends is not known"
    assert limit_s(LinkRates(200 * MBIT, 0.0)) == 30.0
    assert merge_limit_s(claims(LinkRates(), b=None).merging_s("ab", (), BODY), 5.0, LIMIT_S) == LIMIT_S
    assert claims(link(100), b=link(10)).merging_s("ab", None, BODY) == 20.0
    assert claims(link(100), b=link(100), c=link(10)).merging_s("abc", None, BODY) == 40.0, "it sends it to both"
    outside = claims(link(5), b=link(100), c=link(100))
    assert outside.merging_s("bc", (), BODY) == 40.0 and outside.merging_s("bc", None, BODY) == 80.0


def test_whose_publication_could_not_be_had_is_not_waited_for_as_it_tells_for_some_rounds() -> None:
    told = {"b": link(100), "c": link(100), "d": LinkRates(1.0, 1.0)}
    some, usual = claims(link(100), **told), claims(link(100), **(told | {"d": link(100)}))

    def looks(of: LinkClaims) -> object:
        return of.merging_s(PEERS, (), BODY), of.averaging_times(PEERS, (32, 32, 32, 0), BODY, LIMIT_S)

    before = looks(some)
    some.not_delivered(["d"])
    for round in range(1, 9):
        assert looks(some) == looks(usual)
        some.not_delivered(["d"])  # it has too little time now, if its link is slow
        some.round_over(round)
    assert looks(some) == before


def test_authors_are_given_up_at_the_limit_unless_nearly_all_are_late() -> None:
    limit = MergeLimit(1000.0, 30.0)
    for _ in range(5):
        limit.asked()
    assert limit.due_s == 1120.0, "this peer's own link is slow"
    limit.ended(1002.0)
    assert limit.due_s == 1120.0
    limit.ended(1003.0)
    assert limit.due_s == 1030.0
    limit.ended(1029.0)
    assert limit.due_s == 1030.0, "those that come later do not move it"
    late = MergeLimit(1000.0, 30.0)
    for _ in range(3):
        late.asked()
    late.ended(1020.0)
    assert late.due_s == 1080.0, "four times as long as half of them took"
    alone = MergeLimit(1000.0, 30.0)
    alone.asked()
    assert alone.due_s == 1030.0, "one author alone cannot show that all are slow"
    slowest = MergeLimit(1000.0, 30.0)
    for _ in range(3):
        slowest.asked()
    slowest.ended(1110.0)
    assert slowest.due_s == 1120.0


def test_an_author_that_brings_nothing_is_given_up_before() -> None:
    assert author_due_s(1000.0, 1000.0, 600.0, 600.0, 5.0, LIMIT_S) == 1150.0, "a quarter of what it tells"
    assert author_due_s(1000.0, 1000.0, 100.0, 100.0, 5.0, 400.0) == 1100.0, "its link may be busy with others at first"
    assert author_due_s(1000.0, 1000.0, 20.0, 100.0, 5.0, 400.0) == 1040.0
    assert author_due_s(1000.0, 1000.0, 2.0, 2.0, 5.0, 30.0) == 1005.0, "a silence"
    assert author_due_s(1000.0, 1100.0, 100.0, 100.0, 5.0, 400.0) == 1125.0


def test_an_owner_has_no_more_than_a_merge_s_limit() -> None:
    times = AveragingTimes(600.0, (600.0, 10.0))
    assert ShareWaits(1000.0, (48, 48), 1, times, 5.0).due_s(0) == 2200.0
    assert ShareWaits(1000.0, (48, 48), 1, times, 5.0, LIMIT_S).due_s(0) == 1600.0

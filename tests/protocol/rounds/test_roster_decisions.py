"""Every branch of the decisions about a round."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmtrain.protocol.rounds.rosters import (
    AdvertisedRound,
    ApplyDecision,
    CatchUpDecision,
    Roster,
    RoundPublication,
    RoundView,
    SignDecision,
    Standing,
    WaitDecision,
    better_roster,
    decide,
    idled,
    is_silent,
    joining_steps,
    peers_to_ask,
    pulls_whole,
    round_steps,
    share_ranges,
    standing,
    standings,
)
from swarmtrain.protocol.rounds.share_waits import share_due_s


def offer(peer: str, base: str = "") -> RoundPublication:
    return RoundPublication(peer=peer, snapshot=f"hash-{peer}", tokens=100, inner_steps=10, base=base)


def roster(signer: str, peers: str = "abc", **more: Any) -> Roster:
    return Roster(**{"round": 3, "signer": signer, "entries": tuple(offer(p) for p in peers), **more})


def view(me: str, live: str = "", published: str | None = None, **more: Any) -> RoundView:
    """Ended at 100 s, limit at 200 s, silence 5 s; `published` are announced and held."""
    published = me if published is None else published
    fields: dict[str, Any] = {
        "announced": {p: offer(p) for p in published},
        "held": frozenset(published),
        "share_above": 5,
        **more,
    }
    return RoundView(me=me, round=3, ended_at_s=100, deadline_s=200, silence_s=5, live=frozenset(live), **fields)


def signed(decision: object) -> str:
    assert isinstance(decision, SignDecision), decision
    return "".join(entry.peer for entry in decision.entries)


# ---------------------------------------------------------------- decide


def test_alone_one_signs_at_once() -> None:
    assert signed(decide(view("a"), 100)) == "a"


def test_the_lowest_waits_for_the_others_then_signs() -> None:
    decision = decide(view("a", "bc", "ab"), 101)
    assert decision == WaitDecision(until_s=105, reason="waiting for c")
    assert signed(decide(view("a", "bc", "abc"), 101)) == "abc"
    assert signed(decide(view("a", "bc", "ab"), 105)) == "ab"


def test_an_answer_renews_the_wait_until_the_time_limit() -> None:
    advertised = {"heard_at_s": {"b": 150.0}}
    assert decide(view("a", "b", **advertised), 152) == WaitDecision(until_s=155, reason="waiting for b")
    advertised = {"heard_at_s": {"b": 198.0}}
    assert decide(view("a", "b", **advertised), 199) == WaitDecision(until_s=200, reason="waiting for b")
    decision = decide(view("a", "b", **advertised), 200)
    assert signed(decision) == "a"
    assert decision.reason == "time limit; without b"


def test_the_others_wait_for_the_lowest_and_pass_it_over_when_silent() -> None:
    assert decide(view("c", "ab", "abc"), 101) == WaitDecision(until_s=105, reason="a signs the roster")
    assert decide(view("c", "ab", "abc", heard_at_s={"b": 103.0}), 106) == WaitDecision(
        until_s=108, reason="b signs the roster"
    )
    assert signed(decide(view("b", "ac", "bc"), 105)) == "bc"
    assert signed(decide(view("b", "ac", "abc"), 105)) == "abc", "silent now, but it has published"


def test_a_signer_that_has_not_published_by_the_time_limit_is_passed_over() -> None:
    talks = {"heard_at_s": {"a": 199.9}}
    assert isinstance(decide(view("b", "a", **talks), 199.99), WaitDecision)
    assert signed(decide(view("b", "a", **talks), 200)) == "b"


def test_one_whose_turn_comes_at_the_time_limit_first_asks_those_whom_nobody_has_asked() -> None:
    """Of five with shares b has asked a alone, which answers and does not publish."""
    told: dict[str, Any] = {"share_above": 2, "heard_at_s": {"a": 199.0}}
    of_a = view("b", "acde", "b", asked_at_s={"a": 100.0}, answered_at_s={"a": 199.0}, **told)
    assert decide(of_a, 200) == WaitDecision(
        until_s=205, reason="the time limit is over: asking c, d, e for the first time"
    )
    asked = dict.fromkeys("acde", 200.0) | {"a": 100.0}
    of_two = view("b", "acde", "bc", asked_at_s=asked, answered_at_s={"a": 199.0, "c": 200.0, "d": 200.0}, **told)
    assert decide(of_two, 201) == WaitDecision(
        until_s=205, reason="the time limit is over: asking e for the first time"
    )
    assert signed(decide(of_two, 205)) == "bc"
    of_all = view("b", "acde", "bcde", asked_at_s=asked, answered_at_s=dict.fromkeys("acde", 200.0), **told)
    assert signed(decide(of_all, 200.1)) == "bcde"
    # Nor is one passed over that nobody has asked: it may have signed long ago.
    others = view("d", "abce", "ad", asked_at_s={"a": 100.0}, answered_at_s={"a": 199.0}, idle=frozenset("a"), **told)
    assert decide(others, 200) == WaitDecision(until_s=205, reason="b signs the roster")
    # One that it asked when its steps ended has had its time.
    silent = view("b", "ac", "b", asked_at_s={"a": 100.0, "c": 100.0}, heard_at_s={"a": 199.0, "c": 198.0})
    assert signed(decide(silent, 200)) == "b"


@pytest.mark.parametrize(("num_mute", "signs_s"), [(0, 200), (2, 200), (4, 205), (6, 210), (26, 220)])
def test_a_crowd_that_is_there_and_answers_nothing_holds_up_a_round_for_a_few_silences(
    num_mute: int, signs_s: float
) -> None:
    """They have the lowest PeerIDs. x asks two at a time, and everyone once it is its turn; z never publishes."""
    mute = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[:num_mute]
    asked, answered, now = dict[str, float](), dict[str, float](), 100.0
    while True:
        heard = dict.fromkeys((*mute, "y", "z"), now)
        of_x = view("x", mute + "yz", "xy", share_above=2, asked_at_s=asked, answered_at_s=answered, heard_at_s=heard)
        for peer in peers_to_ask(of_x, now):
            asked.setdefault(peer, now)
            if peer in "yz":
                answered[peer] = now
        if isinstance(decision := decide(of_x, now), SignDecision):
            assert (now, signed(decision)) == (signs_s, "xy")
            return
        now += 0.5


def test_a_signer_that_published_and_talks_yet_never_signs_is_passed_over_in_turn() -> None:
    talks = {"heard_at_s": {"a": 999.0, "b": 999.0}}
    assert decide(view("c", "ab", "abc", **talks), 201) == WaitDecision(until_s=205, reason="a signs the roster")
    assert decide(view("c", "ab", "abc", **talks), 205) == WaitDecision(until_s=210, reason="b signs the roster")
    assert signed(decide(view("c", "ab", "abc", **talks), 210)) == "abc"


def test_idle_is_who_published_and_talks_and_let_its_turn_pass() -> None:
    talks = {"heard_at_s": {"a": 999.0, "b": 999.0}}
    the_view = view("c", "ab", "abc", **talks)
    assert idled(the_view, 204.9) == frozenset()
    assert idled(the_view, 205) == {"a"}
    assert idled(the_view, 210) == {"a", "b"}
    assert idled(view("c", "ab", "bc", **talks), 210) == {"b"}, "a has not published: only late"
    assert idled(view("c", "ab", "abc"), 210) == frozenset(), "both are silent"


def test_an_idle_signer_is_passed_over_and_stays_a_member() -> None:
    idle = {"idle": frozenset("a")}
    assert signed(decide(view("b", "ac", "abc", **idle), 101)) == "abc"
    assert decide(view("b", "ac", "bc", **idle), 101) == WaitDecision(until_s=105, reason="waiting for a")
    assert decide(view("c", "ab", "abc", **idle), 101) == WaitDecision(until_s=105, reason="b signs the roster")
    its = roster("a")
    assert decide(view("b", "ac", "abc", **idle, rosters=[roster("b"), its]), 101) == ApplyDecision(
        roster=its, reason="signed by a"
    )
    assert peers_to_ask(view("z", "abcdefg", **idle), 101) == ["b", "c"]
    assert signed(decide(view("b", "a", "ab", **idle, is_late_joiner=True), 101)) == "ab"


def test_nobody_is_silent_who_was_not_asked() -> None:
    assert isinstance(decide(view("c", "ab", "abc", asked_at_s={}), 150), WaitDecision)
    assert decide(view("c", "a", "ac", asked_at_s={"a": 150.0}), 152) == WaitDecision(
        until_s=155, reason="a signs the roster"
    )
    assert signed(decide(view("c", "a", "ac", asked_at_s={"a": 150.0}), 155)) == "ac"


def test_silent_is_who_was_asked_and_has_not_said_a_word() -> None:
    asked = view("a", "bcd", asked_at_s={"b": 101.0, "c": 101.0}, heard_at_s={"c": 104.0, "d": 1.0})
    assert [p for p in "bcd" if is_silent(asked, p, 105.9)] == []
    assert [p for p in "bcd" if is_silent(asked, p, 106)] == ["b"]
    assert [p for p in "bcd" if is_silent(asked, p, 200)] == ["b", "c"]
    deaf = view("a", "b", asked_at_s={"b": 101.0}, listening_since_s=110.0)
    assert not is_silent(deaf, "b", 114)


def test_after_a_pause_of_ones_own_silence_counts_anew() -> None:
    answered = view("a", "b", listening_since_s=180.0, answered_at_s={"b": 180.0})
    assert decide(answered, 181) == WaitDecision(until_s=185, reason="waiting for b")


def test_after_a_pause_of_ones_own_nothing_is_signed_or_merged_before_the_others_have_been_heard() -> None:
    """They may have signed without it, and gone on."""
    was_suspended = {"listening_since_s": 180.0, "answered_at_s": {"b": 180.5, "c": 179.9}}
    reason = "this process was suspended: asking c what happened meanwhile"
    assert decide(view("a", "bc", "abc", **was_suspended), 181) == WaitDecision(until_s=185, reason=reason)
    assert decide(view("a", "bc", "abc", **was_suspended, rosters=[roster("a")]), 181) == WaitDecision(
        until_s=185, reason=reason
    )
    assert decide(view("a", "b", "ab", **was_suspended, late_joiners=frozenset("c")), 181) == WaitDecision(
        until_s=185, reason=reason
    )
    assert isinstance(decide(view("a", "bc", "abc", **was_suspended, ahead=frozenset("d")), 181), WaitDecision)
    assert isinstance(decide(view("a", "bc", "abc", **was_suspended, far_ahead=frozenset("d")), 181), CatchUpDecision)
    assert signed(decide(view("a", "bc", "abc", **was_suspended), 185)) == "abc", "c does not answer"
    was_suspended["answered_at_s"] = {"b": 180.5, "c": 180.0}
    assert signed(decide(view("a", "bc", "abc", **was_suspended), 181)) == "abc"
    assert signed(decide(view("a", "bc", "abc", listening_since_s=99.0), 181)) == "abc", "before it asked anybody"


@pytest.mark.parametrize("me", ["a", "d"])
def test_who_comes_after_its_time_limit_signs_nothing_before_the_others_have_been_heard(me: str) -> None:
    """Its machine slept in the midst of the round, say: they may have signed without it, and gone on."""
    late = dataclasses.replace(view(me, "bc", me), deadline_s=100.0)
    reason = "this process is past the time limit: asking b, c what happened meanwhile"
    assert decide(late, 100) == WaitDecision(until_s=105, reason=reason)
    answered = dataclasses.replace(late, answered_at_s={"b": 100.0, "c": 100.0})
    assert signed(decide(answered, 101)) == me, "nobody else has published, and the time is over"
    assert isinstance(decide(dataclasses.replace(answered, far_ahead=frozenset("b")), 101), CatchUpDecision)
    assert signed(decide(late, 105)) == me, "nobody answers"


def test_a_signer_whose_roster_nobody_applied_follows_those_who_went_on_without_it() -> None:
    own, theirs = roster("a"), roster("b", "bc")
    gone_on = {"rosters": [own, theirs], "ahead": frozenset("b")}
    left = decide(view("a", "c", "abc", **gone_on, applied=frozenset({theirs.digest})), 101)
    assert left == CatchUpDecision(sources=("b",), reason="others have finished this round")
    applied = frozenset({own.digest, theirs.digest})
    assert decide(view("a", "c", "abc", **gone_on, applied=applied), 101) == ApplyDecision(
        roster=own, reason="signed by a"
    )


def test_one_a_roster_behind_is_waited_for_as_if_silent() -> None:
    behind = {"behind": frozenset("b"), "heard_at_s": {"b": 104.0}}
    assert decide(view("a", "b", **behind), 104) == WaitDecision(until_s=105, reason="waiting for b")
    assert signed(decide(view("a", "b", **behind), 105)) == "a"


def test_guests_count_and_are_waited_for_only_while_their_bytes_come() -> None:
    late_joiners = {"late_joiners": frozenset("z")}
    assert signed(decide(view("a", "b", "ab", **late_joiners), 101)) == "ab"
    assert signed(decide(view("a", "b", "abz", **late_joiners), 101)) == "abz"
    coming = {"announced": {p: offer(p) for p in "abz"}, "held": frozenset("ab"), "heard_at_s": {"z": 104.0}}
    assert decide(view("a", "b", **late_joiners, **coming), 104) == WaitDecision(until_s=105, reason="waiting for z")
    assert signed(decide(view("a", "b", **late_joiners, **coming), 105)) == "ab"


def test_a_guest_signs_last_though_it_be_the_lowest() -> None:
    assert decide(view("a", "bc", "abc", is_late_joiner=True), 101) == WaitDecision(
        until_s=105, reason="b signs the roster"
    )
    assert signed(decide(view("a", "bc", "abc", is_late_joiner=True), 105)) == "abc"
    assert signed(decide(view("a", is_late_joiner=True), 100)) == "a"


def test_in_a_small_group_the_signer_lists_what_it_holds() -> None:
    announced = {"announced": {p: offer(p) for p in "abc"}, "held": frozenset("ab")}
    assert decide(view("a", "bc", **announced), 101) == WaitDecision(until_s=105, reason="waiting for c")
    assert signed(decide(view("a", "bc", **announced), 105)) == "ab"
    assert signed(decide(view("a", "bc", **announced, unobtainable=frozenset("c")), 101)) == "ab"


def test_with_shares_the_manifest_of_a_live_peer_is_enough() -> None:
    everyone = {p: offer(p) for p in "abcdefg"}
    shares = {"announced": everyone, "held": frozenset("a")}
    assert signed(decide(view("a", "bcdefg", **shares), 101)) == "abcdefg"
    assert signed(decide(view("a", "bcdef", **shares), 101)) == "abcdef", "g died with its bytes"
    shares["held"] = frozenset("ag")
    assert signed(decide(view("a", "bcdef", **shares), 101)) == "abcdefg"


def test_publications_and_rosters_of_other_weights_are_not_ours() -> None:
    announced = {"announced": {"a": offer("a", "x"), "b": offer("b", "y")}, "held": frozenset("ab"), "base": "x"}
    assert signed(decide(view("a", **announced), 101)) == "a"
    assert signed(decide(view("a", **announced, rosters=[roster("a", base="y")]), 101)) == "a"
    ours = roster("b", base="x")
    assert decide(view("a", **announced, rosters=[ours]), 101) == ApplyDecision(roster=ours, reason="signed by b")
    assert isinstance(decide(view("a", **announced, rosters=[roster("b", base="x", round=2)]), 101), SignDecision)


def test_the_better_roster_is_applied() -> None:
    a, b = roster("a"), roster("b")
    assert decide(view("c", "ab", rosters=[b, a]), 101) == ApplyDecision(roster=a, reason="signed by a")
    assert decide(view("c", "ab", rosters=[b]), 101) == ApplyDecision(roster=b, reason="signed by b")


def test_a_roster_with_bytes_that_nobody_has() -> None:
    a, b = roster("a"), roster("b", "bc")
    lacking = {"rosters": [a], "unobtainable": frozenset("a")}
    assert isinstance(decide(view("c", "ab", "bc", **lacking), 101), WaitDecision), "its signer may sign again"
    assert signed(decide(view("b", "c", "bc", **lacking), 101)) == "bc", "its signer is gone: the next one's turn"
    lacking["rosters"] = [a, b]
    assert decide(view("b", "c", "bc", **lacking), 101) == ApplyDecision(roster=b, reason="signed by b")
    lacking["ahead"] = frozenset("d")
    assert isinstance(decide(view("b", "c", "bc", **lacking), 101), CatchUpDecision), (
        "somebody could apply the better one"
    )


def test_the_signer_signs_again_without_what_nobody_has() -> None:
    decision = decide(view("a", "b", "abc", rosters=[roster("a")], unobtainable=frozenset("c")), 101)
    assert signed(decision) == "ab"
    assert decision.attempt == 1  # type: ignore[union-attr]
    again = [roster("a"), roster("a", "ab", attempt=1)]
    decision = decide(view("a", "b", "abc", rosters=again, unobtainable=frozenset("bc")), 101)
    assert signed(decision) == "a"
    assert decision.attempt == 2  # type: ignore[union-attr]
    ahead = view("a", "b", "abc", rosters=[roster("a")], unobtainable=frozenset("c"), ahead=frozenset("b"))
    assert isinstance(decide(ahead, 101), CatchUpDecision), "somebody applied the first attempt"


def test_catching_up() -> None:
    assert decide(view("a", "b", ahead=frozenset("dc")), 101) == CatchUpDecision(
        sources=("c", "d"), reason="others have finished this round"
    )
    fits = {"rosters": [roster("b")]}
    assert isinstance(decide(view("a", "b", ahead=frozenset("c"), **fits), 101), ApplyDecision)
    far = decide(view("a", "b", far_ahead=frozenset("c"), ahead=frozenset("d"), **fits), 101)
    assert isinstance(far, CatchUpDecision)
    assert far.sources == ("c",)


@given(st.data())
def test_a_decision_is_total_and_a_wait_ends(data: st.DataObject) -> None:
    """Whatever is known, there is a decision; waiting again and again without news ends in signing."""
    names = st.frozensets(st.sampled_from("bcdefgh"))
    me, live = data.draw(st.sampled_from("adz")), data.draw(names)
    published = data.draw(names) | {me}
    late_joiners = data.draw(names) - live - {me}
    live -= {me}
    the_view = view(
        me,
        "".join(live),
        "".join(published),
        is_late_joiner=data.draw(st.booleans()),
        late_joiners=late_joiners,
        behind=data.draw(names) & live,
        held=data.draw(names) | {me},
        heard_at_s={p: data.draw(st.floats(0, 300)) for p in live},
        unobtainable=data.draw(names) - {me},
        idle=data.draw(names),
        asked_at_s=dict.fromkeys(live | late_joiners, 100.0),
    )
    now, turns = 100.0, 0
    while isinstance(decision := decide(the_view, now), WaitDecision):
        assert decision.until_s > now
        now, turns = decision.until_s, turns + 1
    assert isinstance(decision, SignDecision)
    assert me in signed(decision)
    assert signed(decision) == "".join(sorted(signed(decision)))
    assert turns <= 12
    assert now <= 200 + 5 * (1 + len(live))


# ---------------------------------------------------------------- ranks and standings


def test_which_of_two_rosters_holds() -> None:
    assert better_roster([]) is None
    assert better_roster([roster("b"), roster("a")]) == roster("a")
    assert better_roster([roster("a"), roster("a", "ab", attempt=1)]) == roster("a", "ab", attempt=1)
    assert better_roster([roster("b", attempt=9), roster("a")]) == roster("a")
    heavier = roster("z", base_tokens=10**9)
    assert better_roster([roster("a"), heavier]) == roster("a"), "what a signer says of tokens counts for nothing"
    two = [roster("a", "ab"), roster("a", "ac")]
    assert better_roster(two) == better_roster(two[::-1]), "a signer that lost its memory"
    two = [roster("a", shares=(3, 3, 4)), roster("a", shares=(4, 3, 3))]
    assert two[0].digest == two[1].digest and better_roster(two) == better_roster(two[::-1]) == two[0]
    assert better_roster([*two, roster("a")]) == roster("a")


@given(st.permutations([roster(s, p, attempt=a) for s in "ab" for p in ("a", "ab") for a in (0, 1)]))
def test_the_order_is_total(rosters: list[Roster]) -> None:
    best = better_roster(rosters)
    assert best is not None and (best.signer, best.attempt) == ("a", 1)
    assert best == better_roster(rosters[::-1])
    for x, y in itertools.combinations(rosters, 2):
        assert better_roster([x, y]) == better_roster([y, x])


def test_digest_and_tokens() -> None:
    a = roster("a", base_tokens=50)
    assert a.peers == ("a", "b", "c")
    assert (a.tokens, a.total_tokens) == (300, 350)
    assert a.digest == roster("z", attempt=4).digest
    assert len({a.digest, roster("a", "ab").digest, roster("a", base="x").digest, roster("a", round=4).digest}) == 4


def chain(rounds: int, signer: str = "a", peers: str = "ab") -> list[Roster]:
    rosters: list[Roster] = []
    for r in range(rounds):
        last = rosters[-1] if rosters else None
        base, tokens = ("", 0) if last is None else (last.digest, last.total_tokens)
        rosters.append(roster(signer, peers, round=r, base=base, base_tokens=tokens))
    return rosters


def test_standings() -> None:
    ours, others = chain(6), chain(6, "b", "cd")
    mine, round = ours[3], 4

    def of(last: Roster | None, their_round: int, participating: bool = True) -> Standing:
        advertised = AdvertisedRound(round=their_round, last=last, participating=participating)
        return standing(mine, round, advertised, lambda heard: heard in (*ours[4:], *others[4:]))

    def at_the_start(advertised: AdvertisedRound) -> Standing:
        return standing(None, 0, advertised, lambda heard: heard is not None)

    assert at_the_start(AdvertisedRound(round=0, last=None)) is Standing.WITH_US
    assert at_the_start(AdvertisedRound(round=1, last=ours[0])) is Standing.AHEAD
    assert at_the_start(AdvertisedRound(round=2, last=ours[1])) is Standing.FAR_AHEAD
    assert of(ours[3], 4) is Standing.WITH_US
    assert of(ours[3], 4, participating=False) is Standing.LATE_JOINER
    assert of(ours[2], 3) is Standing.BEHIND
    assert of(ours[1], 2) is Standing.LATE_JOINER
    assert of(None, 0) is Standing.LATE_JOINER
    assert of(ours[4], 5) is Standing.AHEAD
    assert of(ours[5], 6) is Standing.FAR_AHEAD
    assert of(others[3], 4) is Standing.LATE_JOINER, "other weights, which lose"
    assert of(others[2], 3) is Standing.LATE_JOINER
    assert of(others[5], 6) is Standing.FAR_AHEAD


# ---------------------------------------------------------------- whom to ask, shares, steps


def test_a_group_whose_signer_lists_only_what_it_holds_pulls_everything() -> None:
    """One rule for both: else the signer would wait for bytes that nobody pulls."""
    small = view("a", "b", published="ab", held=frozenset("a"), share_above=2)
    assert isinstance(decide(small, 101), WaitDecision) and pulls_whole(small)
    for late in ({"late_joiners": frozenset("g")}, {"ahead": frozenset("g")}):
        large = view("a", "b", published="ab", held=frozenset("a"), share_above=2, **late)
        assert not pulls_whole(large), "or a slow link carries everything once for each peer because one is late"
    with_guest = view("a", "b", published="ab", held=frozenset("a"), share_above=2, late_joiners=frozenset("g"))
    assert signed(decide(with_guest, 101)) == "ab", "nobody waits for what a guest may publish"
    assert not pulls_whole(view("a", "b", published="abg", share_above=2, late_joiners=frozenset("g")))
    assert signed(decide(view("a", "bc", published="abc", held=frozenset("a"), share_above=2), 101)) == "abc"


def test_the_standings_of_all() -> None:
    mine, theirs = chain(2)[-1], chain(3)
    advertised = {
        "with": (5.0, AdvertisedRound(round=3, last=mine)),
        "ahead": (5.0, AdvertisedRound(round=3, last=theirs[2])),
        "refused": (5.0, AdvertisedRound(round=3, last=theirs[2])),
        "late joiner": (5.0, AdvertisedRound(round=2, last=None)),
        "old": (1.0, AdvertisedRound(round=2, last=None)),
        "old-ahead": (1.0, AdvertisedRound(round=3, last=theirs[2])),
        "gone": (5.0, AdvertisedRound(round=2, last=None)),
    }
    peers = [*advertised.keys() - {"gone"}, "unknown"]
    since: dict[str, Any] = {"since_s": 2.0, "undeliverable": {"refused", "late joiner", "with"}}
    of_all = {peer: advertised.get(peer) for peer in peers}
    found = standings(mine, 2, of_all, holds=lambda heard: heard == theirs[2], **since)
    assert found.of[Standing.WITH_US] == {"with", "unknown", "old"}, "what was told before the round is forgotten"
    assert found.of[Standing.AHEAD] == {"ahead", "old-ahead"}, "but for a roster that holds against ours"
    assert found.of[Standing.LATE_JOINER] == {"late joiner", "refused"}, "what nobody can have is nobody's to wait for"
    assert found.applied == {theirs[2].digest}
    assert sorted(itertools.chain(*found.of.values())) == sorted(peers), "each has one standing"


def test_whom_to_ask() -> None:
    assert peers_to_ask(view("c", "ab"), 101) == ["a", "b"]
    small = view("c", "ab", ahead=frozenset("d"), late_joiners=frozenset("z"))
    assert peers_to_ask(small, 101) == ["a", "b", "d", "z"]
    assert peers_to_ask(view("z", "abcdefg"), 101) == ["a", "b"]
    assert peers_to_ask(view("a", "bcdefgh"), 101) == list("bcdefgh")
    asked = {"asked_at_s": {"a": 100.0, "b": 100.0}}
    assert peers_to_ask(view("z", "abcdefg", **asked), 105) == ["c", "d"], "the next two, when these were silent"
    many_ahead = view("z", "abcdef", ahead=frozenset("ghi"), far_ahead=frozenset("x"))
    assert peers_to_ask(many_ahead, 101) == ["a", "b", "g", "h"]
    assert peers_to_ask(view("a"), 101) == []
    lacking = view("z", "abcdefg", unobtainable=frozenset("fx"))
    assert peers_to_ask(lacking, 101) == ["a", "b", "f"], "it may be there again"


@given(num_chunks=st.integers(0, 5000), num_peers=st.integers(1, 400))
def test_shares_cover_everything_once_and_evenly(num_chunks: int, num_peers: int) -> None:
    ranges = share_ranges(num_chunks, num_peers)
    assert len(ranges) == num_peers
    assert [chunk for share in ranges for chunk in share] == list(range(num_chunks))
    assert max(map(len, ranges)) - min(map(len, ranges)) <= 1


def test_how_long_to_wait_for_a_share() -> None:
    assert share_due_s(100, 101, 5) == 106
    assert share_due_s(100, 130, 5) == 190
    assert share_due_s(100, math.inf, 5) == math.inf


@pytest.mark.parametrize(
    ("inner_steps", "done", "steps"),
    [
        (32, [], 32),
        (32, [0, 0], 32),
        (32, [1], 29),
        (32, [4, 10], 20),
        (32, [31], 2),
        (32, [32], 2),
        (32, [99], 2),
        (1, [1], 1),
        (25, [3], 20),
    ],
)
def test_a_joiners_first_round(inner_steps: int, done: list[int], steps: int) -> None:
    assert joining_steps(inner_steps, done)[0] == steps


@pytest.mark.parametrize(("done", "steps"), [([], 32), ([5, 16], 32), ([17], 13), ([32], 2)])
def test_a_late_applier_comes_along_as_a_guest(done: list[int], steps: int) -> None:
    assert round_steps(32, done)[0] == steps

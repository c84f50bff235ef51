"""Gossip engine by its events and commands alone: plain data, without threads, clock or network."""

from __future__ import annotations

import random
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from swarmtrain.protocol.gossip.engine import GossipEngine, GossipSettings
from swarmtrain.protocol.gossip.merge_plans import MergePlan
from swarmtrain.protocol.gossip.messages import (
    AdvertisedProgress,
    AskPartner,
    CancelPull,
    ConsensusTaken,
    DecodePublication,
    DownloadPublication,
    FetchConsensus,
    FindRoute,
    LinkRateAssumed,
    MergeDue,
    MergeFragment,
    MergePrepared,
    MergesPlanned,
    PartnerBackedOff,
    PartnerReplied,
    PartnersChanged,
    PeerCalled,
    PrepareMerge,
    PublicationDecoded,
    PublicationDownloaded,
    PullFailed,
    PullFailure,
    PullsPaused,
    PullTimerFired,
    ReportFailure,
    RouteFound,
)
from swarmtrain.protocol.gossip.partners import Delta, Full, PublicationVersion
from swarmtrain.protocol.gossip.pulls import GroupName, GroupRule, PublicationBytes, WantedPartners
from swarmtrain.protocol.membership.membership import PeerInfo

GROUPS: dict[GroupName, GroupRule] = {"weights": "mean", "gradient": "outer step"}
SIZES = {"int2": PublicationBytes(1000, 250), "int4": PublicationBytes(1000, 500)}


class Driven:
    """Engine with at most two fragments, whose partners and times a test sets."""

    def __init__(
        self,
        *others: str,
        fragments: int = 1,
        wanted: int = 2,
        is_large: bool = False,
        groups: Mapping[GroupName, GroupRule] = GROUPS,
    ) -> None:
        settings = GossipSettings(
            groups=groups,
            sizes=[SIZES] * fragments,  # type: ignore[list-item]
            wanted=WantedPartners(wanted, wanted),
            num_parts=4,
            max_staleness_rounds=2,
            is_large=is_large,
        )
        self.engine: GossipEngine[str, str, str] = GossipEngine("me", settings, random.Random(1), random.Random(1))
        self.now = 0.0
        self.see(*others)

    def see(self, *others: str, **told: Any) -> None:
        """Make these peers present."""
        volunteers = [PeerInfo(peer=peer, training=True, **told) for peer in sorted(others)]
        assert self.tells(PartnersChanged(volunteers)) == []

    def tells(self, event: Any) -> list[Any]:
        """Return the commands that follow from an event."""
        return list(self.engine.receive(event, self.now))

    def plan(self, round: int = 0, *, lasts_s: float = 0.0, began_s: float | None = None) -> list[Any]:
        """Plan a round that begins now; all its pulls are due at its end."""
        began_s = self.now if began_s is None else began_s
        plan = MergePlan(round=round, began_s=(began_s,), ends_s=self.now + lasts_s, gradient_format="int2")
        return self.tells(MergesPlanned(round, [plan]))

    def asks(self) -> list[AskPartner]:
        """Return whom it asks now."""
        found = self.tells(PullTimerFired())
        assert all(isinstance(command, AskPartner) for command in found)
        return found

    def pulls(self, ask: AskPartner, version: PublicationVersion, held: str) -> list[Any]:
        """Let that pull's bytes arrive and be decoded."""
        (download,) = self.tells(PartnerReplied(ask.pull, version, held))
        assert download == DownloadPublication(ask.pull, ask.source, held)
        self.now += 0.1
        (decode,) = self.tells(PublicationDownloaded(ask.pull, 1000))
        assert isinstance(decode, DecodePublication) and (decode.pull, decode.held) == (ask.pull, held)
        return self.tells(PublicationDecoded(ask.pull, f"decoded {held}"))


def of(asks: Sequence[AskPartner], group: GroupName, peer: str = "") -> AskPartner:
    """Return the pull of that group."""
    return next(ask for ask in asks if ask.group == group and peer in ("", ask.author))


WEIGHTS, WHOLE = PublicationVersion(0, 0, 0), PublicationVersion(0, 4, 400)


def test_a_round_from_the_question_to_the_merge() -> None:
    me = Driven("ben")
    assert me.engine.wake_at() is None
    assert me.plan() == [] and me.engine.wake_at() == 0.0
    asks = me.asks()
    assert [(ask.source, ask.author, ask.group, ask.fragment, ask.known) for ask in asks] == [
        ("ben", "ben", "weights", 0, None),
        ("ben", "ben", "gradient", 0, None),
    ]
    (first,) = me.pulls(asks[0], WEIGHTS, "w")
    assert isinstance(first, PrepareMerge) and [one.payload for one in first.pulled] == ["decoded w"]
    assert me.engine.pulled_version(0, "ben") is None
    assert me.pulls(asks[1], WHOLE, "g") == [], "one merge is prepared after the other"
    assert (me.engine.pulled_version(0, "ben"), me.engine.merged_version(0, "ben")) == (WHOLE, None)
    (second,) = me.tells(MergePrepared(first.number, "merge of w"))
    assert [one.held for one in second.pulled] == ["w", "g"]
    assert me.tells(MergePrepared(second.number, "merge of both")) == []
    (merge,) = me.tells(MergeDue(0))
    assert isinstance(merge, MergeFragment) and merge.merge == "merge of both"
    assert [(one.group, one.version) for one in merge.pulled] == [("weights", WEIGHTS), ("gradient", WHOLE)]
    assert (me.engine.pulled_version(0, "ben"), me.engine.merged_version(0, "ben")) == (None, WHOLE)
    assert me.engine.places(-1) == [{"ben": (0, 4), "me": (0, 4)}]
    me.plan(round=1)
    assert [ask.known for ask in me.asks()] == [WEIGHTS, WHOLE], "only what is newer is asked for"


def test_what_else_the_run_averages_is_pulled_and_merged_as_its_author_gets_on() -> None:
    me = Driven("ben", groups={"weights": "mean", "buffers": "mean", "gradient": "outer step"})
    me.plan()
    asks = me.asks()
    assert [ask.group for ask in asks] == ["weights", "buffers", "gradient"]
    for ask, version in zip(asks, (WEIGHTS, PublicationVersion(0, 2, 200), WHOLE), strict=True):
        for prepare in me.pulls(ask, version, ask.group):
            me.tells(MergePrepared(prepare.number, "merge"))
    (merge,) = me.tells(MergeDue(0))
    assert [one.group for one in merge.pulled] == ["weights", "buffers", "gradient"]
    me.plan(round=1)
    asks = me.asks()
    assert [ask.known for ask in asks] == [WEIGHTS, PublicationVersion(0, 2, 0), WHOLE]
    assert me.tells(PartnerReplied(asks[1].pull, PublicationVersion(0, 2, 200), "the same")) == [], "it was merged"
    me.now += 99.0
    (again,) = (ask for ask in me.asks() if ask.group == "buffers")
    (download,) = me.tells(PartnerReplied(again.pull, PublicationVersion(0, 3, 300), "later ones of that round"))
    assert download.held == "later ones of that round"
    (decode,) = me.tells(PublicationDownloaded(again.pull, 10))
    assert isinstance(decode.news, Full) and decode.earlier is None, "nothing is subtracted of what is averaged"


def test_what_is_merged_of_a_round_is_subtracted_from_what_comes_of_it_later() -> None:
    me = Driven("ben")
    me.plan()
    asks = me.asks()
    (prepare,) = me.pulls(of(asks, "gradient"), PublicationVersion(0, 2, 200), "half")
    me.tells(MergePrepared(prepare.number, "merge"))
    me.tells(MergeDue(0))
    me.plan(round=1)
    ask = of(me.asks(), "gradient")
    me.tells(PartnerReplied(ask.pull, WHOLE, "whole"))
    (decode,) = me.tells(PublicationDownloaded(ask.pull, 250))
    assert decode.news == Delta(PublicationVersion(0, 2, 200), 200, "part 2 of its round was merged")
    assert decode.earlier == "half"


def test_nothing_newer_costs_an_eighth_of_the_round_and_another_is_asked() -> None:
    me = Driven("ben", wanted=1)
    me.plan(began_s=-80.0)
    weights, ask = me.asks()
    assert me.tells(PartnerReplied(weights.pull)) == me.tells(PartnerReplied(ask.pull)) == []
    assert [one.group for one in me.asks()] == []
    assert me.engine.wake_at() == 10.0
    me.see("ben", "carl")
    assert me.engine.wake_at() == 0.0, "somebody else has come"
    assert of(me.asks(), "gradient").author == "carl"


@pytest.mark.parametrize(
    ("failure", "waits_s", "told"),
    [
        (PullFailure("it serves many", "busy"), 1.0, False),
        (PullFailure("no answer", "silent"), 10.0, False),
        (PullFailure("it broke off"), 15.0, False),
        (PullFailure("a forged one", is_incident=True), 15.0, True),
    ],
)
def test_who_fails_is_left_alone_and_told_of_where_it_lied(failure: PullFailure, waits_s: float, told: bool) -> None:
    me = Driven("ben", "carl", wanted=1)
    me.plan()
    ask = of(me.asks(), "gradient")
    found = me.tells(PullFailed(ask.pull, failure))
    assert isinstance(found[0], PartnerBackedOff) and found[0].peer == ask.author
    assert found[1:] == ([ReportFailure(ask.author, failure)] if told else [])
    other = of(me.asks(), "gradient")
    assert other.author != ask.author
    me.tells(PullFailed(other.pull, PullFailure("gone too")))
    me.now = waits_s - 0.01
    banned = {one.author for one in me.tells(PullTimerFired()) if isinstance(one, AskPartner)}
    assert ask.author not in banned or waits_s == 1.0


def test_a_silent_one_that_calls_is_asked_again_in_the_next_round() -> None:
    me = Driven("ben", wanted=1)
    me.plan()
    for ask in me.asks():
        me.tells(PullFailed(ask.pull, PullFailure("no answer", "silent")))
    assert me.asks() == [] and me.engine.wake_at() == 1.0, "everybody is banned: soon bans do not count"
    me.now = 0.5
    me.tells(PeerCalled("ben"))
    me.plan(round=1)
    assert {ask.author for ask in me.asks()} == {"ben"}


def test_a_call_of_one_whom_nothing_is_held_against_makes_nobody_look_again() -> None:
    me = Driven("ben", wanted=1)
    me.plan()
    me.asks()
    for ask in list(me.engine._pulls.by_number):
        me.tells(PullFailed(ask, PullFailure("no answer", "silent")))
    assert me.asks() == [] and me.engine.wake_at() == 1.0
    me.now = 0.5
    me.tells(PeerCalled("carl"))
    assert me.engine.wake_at() == 1.0
    me.tells(PeerCalled("ben"))
    assert me.engine.wake_at() == 0.5


def test_a_slow_pull_does_not_keep_another_from_being_tried() -> None:
    me = Driven("ben", "carl", wanted=1)
    me.tells(LinkRateAssumed(1250.0))  # a second for both sections: slow after three
    me.plan(lasts_s=2.0)
    me.now = 2.0
    first = of(me.asks(), "gradient")
    assert me.engine.wake_at() == pytest.approx(5.0)
    me.now = 4.9
    assert me.asks() == []
    me.now = 5.0
    assert {ask.author for ask in me.asks()} == {"ben", "carl"} - {first.author}


def test_a_hidden_author_is_had_through_its_hosts_and_their_failures_are_theirs() -> None:
    me = Driven(wanted=1)
    hidden = PeerInfo(peer="ben", training=True, hidden=True, hosts=("h1", "h2", "h3"))
    me.tells(PartnersChanged([hidden]))
    me.plan()
    routes = me.tells(PullTimerFired())
    assert routes == [FindRoute(routes[0].pull, "ben"), FindRoute(routes[1].pull, "ben")]
    number = routes[1].pull
    (ask,) = me.tells(RouteFound(number, is_direct=False))
    assert ask.author == "ben" and ask.source in hidden.hosts
    lie = PullFailure("not signed by it", is_incident=True)
    report, ask = me.tells(PullFailed(number, lie))
    assert report.peer != "ben" and report.failure == lie
    busy = ask.source
    (ask,) = me.tells(PullFailed(number, PullFailure("it serves as many readers as it may", "busy")))
    assert not me.engine._others.hosts.back_off.has_banned(busy), "that is no fault"
    me.tells(PartnerReplied(number, WHOLE, "g"))
    (end,) = me.tells(PullFailed(number, PullFailure("it broke off")))
    assert end == PartnerBackedOff("ben", "busy: asked again after 1 s"), "nobody is left to ask: not its own fault"
    (ask,) = me.tells(RouteFound(routes[0].pull, is_direct=True))
    assert ask.source == "ben"


def test_its_own_fault_is_its_own_whoever_was_asked() -> None:
    me = Driven(wanted=1)
    me.tells(PartnersChanged([PeerInfo(peer="ben", training=True, hidden=True, hosts=("h1",))]))
    me.plan()
    number = me.tells(PullTimerFired())[1].pull
    me.tells(RouteFound(number, is_direct=False))
    wrong = PullFailure("claims too many tokens", is_incident=True, is_authors=True)
    assert me.tells(PullFailed(number, wrong))[1:] == [ReportFailure("ben", wrong)]


def test_an_old_publication_is_an_incident_of_its_author_and_of_no_host() -> None:
    me = Driven("ben")
    me.see("ben", "carl", "dora", round=9)
    me.plan(round=9)
    ask = of(me.asks(), "gradient")
    _, report = me.tells(PartnerReplied(ask.pull, PublicationVersion(3, 4, 400), "old"))
    assert isinstance(report, ReportFailure) and "6 rounds behind the median" in report.failure.reason
    assert report.failure.is_incident


def test_a_counter_that_turned_back_by_a_few_rounds_is_let_pass_for_some() -> None:
    me = Driven("ben", wanted=1)
    me.plan(round=4)
    (prepare,) = me.pulls(of(me.asks(), "gradient"), PublicationVersion(4, 4, 400), "g")
    me.tells(MergePrepared(prepare.number, "merge"))
    me.tells(MergeDue(4))
    for round in range(5, 10):
        me.now += 100.0
        me.plan(round=round)
        ask = of(me.asks(), "gradient")
        found = me.tells(PartnerReplied(ask.pull, PublicationVersion(3, 1, 100), "again"))
        assert any(isinstance(one, ReportFailure) for one in found) == (round > 8), "three rounds are excused"


def test_what_became_too_old_while_it_came_is_not_decoded() -> None:
    me = Driven("ben", wanted=1)
    me.plan()
    ask = of(me.asks(), "gradient")
    me.tells(PartnerReplied(ask.pull, WHOLE, "g"))
    me.see("ben", "carl", "dora", round=9)
    assert me.tells(PublicationDownloaded(ask.pull, 250)) == []


def test_what_is_ready_and_too_old_by_now_is_not_merged_and_the_rest_is_prepared_anew() -> None:
    me = Driven("ben", "carl")
    me.plan()
    asks = [ask for ask in me.asks() if ask.group == "gradient"]
    versions = {ask.author: PublicationVersion(round, 4, 400) for ask, round in zip(asks, (0, 3), strict=True)}
    (prepare,) = me.pulls(asks[0], versions[asks[0].author], "old")
    me.pulls(asks[1], versions[asks[1].author], "new")
    (both,) = me.tells(MergePrepared(prepare.number, "one"))
    me.tells(MergePrepared(both.number, "both"))
    me.see("ben", "carl", round=3)
    assert me.tells(MergeDue(0, may_catch_up=False)) == [MergeFragment(0)]
    (again,) = me.plan(round=1)
    assert [one.held for one in again.pulled] == ["new"]


def test_who_has_fallen_behind_is_told_before_anything_counts_as_merged() -> None:
    me = Driven("ben", "carl", wanted=1)
    me.plan()
    (prepare,) = me.pulls(of(me.asks(), "gradient"), WHOLE, "g")
    me.tells(MergePrepared(prepare.number, "merge"))
    me.see("ben", "carl", round=4)
    assert me.tells(MergeDue(0)) == [FetchConsensus(4)]
    assert me.engine.rows() == [[["", -1, 0, 0]]]
    author = prepare.pulled[0].peer
    assert me.tells(ConsensusTaken(4, [[{author: (3, 4)}]], {"ben": 4})) == []
    assert me.engine.places(3)[0] == {author: (3, 4), "me": (3, 4)}


def test_who_is_behind_and_gets_nothing_merges_what_it_has() -> None:
    me = Driven("ben", "carl", wanted=1)
    me.plan()
    (prepare,) = me.pulls(of(me.asks(), "gradient"), WHOLE, "g")
    me.tells(MergePrepared(prepare.number, "merge"))
    me.see("ben", "carl", round=2)
    assert me.tells(MergeDue(0, may_catch_up=False)) == [MergeFragment(0, "merge", prepare.pulled)]


def test_what_cannot_be_merged_with_those_before_it_costs_its_author() -> None:
    """Four pulls come while the first merge is prepared; of these Carl's cannot be merged with Ben's."""
    me = Driven("ben", "carl")
    me.plan()
    asks = me.asks()
    (prepare,) = me.pulls(of(asks, "weights", "ben"), WEIGHTS, "ben")
    for group, peer in (("weights", "carl"), ("gradient", "carl"), ("gradient", "ben")):
        assert me.pulls(of(asks, group, peer), WEIGHTS if group == "weights" else WHOLE, peer) == []  # type: ignore[arg-type]
    (prepare,) = me.tells(MergePrepared(prepare.number, "ben's weights"))
    tried = []
    commands: list[Any] = me.tells(MergePrepared(prepare.number, None))
    while isinstance(commands[0], PrepareMerge) and len(tried) < 4:
        together = [one.peer for one in commands[0].pulled]
        tried.append(together)
        commands = me.tells(MergePrepared(commands[0].number, None if "carl" in together else "good"))
    assert tried == [["ben"], ["ben", "carl"], ["ben", "carl"], ["ben", "ben"]]
    assert [command.peer for command in commands if isinstance(command, PartnerBackedOff)] == ["carl", "carl"]
    last = commands[-1]
    assert [one.peer for one in last.pulled] == ["ben", "ben"]
    me.tells(MergePrepared(last.number, "ben's"))
    assert me.tells(MergeDue(0)) == [MergeFragment(0, "ben's", last.pulled)]


def test_another_is_asked_at_once_in_place_of_what_came_a_round_ago_and_cannot_be_merged() -> None:
    me = Driven("ben", "carl", "dora", wanted=1)
    me.plan()
    late = of(me.asks(), "gradient")
    me.tells(MergeDue(0))
    me.pulls(late, WHOLE, "g")
    (prepare,) = me.plan(round=1)
    assert [ask.group for ask in me.asks()] == [], "its weights are on their way, its gradient is here"
    (prepare,) = me.tells(MergePrepared(prepare.number, None))
    me.tells(MergePrepared(prepare.number, None))
    assert me.engine.wake_at() == me.now
    assert {ask.group for ask in me.asks() if ask.author != late.author} >= {"gradient"}


def test_what_is_merged_is_held_no_longer_by_the_engine() -> None:
    class Large:
        pass

    me = Driven("ben", wanted=1)
    me.plan()
    (prepare,) = me.pulls(of(me.asks(), "gradient"), WHOLE, "g")
    merge: Any = Large()
    merge_ref = weakref.ref(merge)
    me.tells(MergePrepared(prepare.number, merge))
    del merge
    (due,) = me.tells(MergeDue(0))
    assert due.merge is merge_ref() is not None
    del due
    assert merge_ref() is None


def test_a_plan_that_comes_after_its_merge_changes_nothing() -> None:
    me = Driven("ben")
    me.tells(MergeDue(3))
    me.plan(round=3)
    assert me.asks() == []


def test_what_is_prepared_for_a_round_that_is_over_is_prepared_anew() -> None:
    me = Driven("ben", wanted=1)
    me.plan()
    (prepare,) = me.pulls(of(me.asks(), "gradient"), WHOLE, "g")
    assert me.tells(MergeDue(0)) == [MergeFragment(0)]
    me.plan(round=1)
    (again,) = me.tells(MergePrepared(prepare.number, "late"))
    assert again.plan.round == 1
    me.tells(MergePrepared(again.number, "in time"))
    assert me.tells(MergeDue(1)) == [MergeFragment(0, "in time", again.pulled)]


def test_a_large_model_has_one_merge_prepared_at_a_time() -> None:
    for is_large in (False, True):
        me = Driven("ben", fragments=2, is_large=is_large)
        plans = [
            MergePlan(round=0, began_s=(0.0,), ends_s=end_s, gradient_format="int2", fragments=(number,))
            for number, end_s in ((0, 0.0), (1, 0.05))
        ]
        me.tells(MergesPlanned(0, plans))
        me.now = 0.05
        asks = me.asks()
        gradients = [ask for ask in asks if ask.group == "gradient"]
        assert [ask.fragment for ask in gradients] == [0, 1]
        (prepare,) = me.pulls(gradients[0], WHOLE, "g0")
        me.pulls(gradients[1], WHOLE, "g1")
        assert [one.fragment for one in me.tells(MergePrepared(prepare.number, "0"))] == ([] if is_large else [1])


def test_a_pull_that_goes_on_for_rounds_is_given_up_and_what_it_brings_is_dropped() -> None:
    me = Driven("ben", wanted=1)
    me.plan()
    ask = of(me.asks(), "gradient")
    me.now = 31.0
    found = me.plan(round=1, lasts_s=1.0)
    assert CancelPull(ask.pull) in found
    assert me.tells(PartnerReplied(ask.pull, WHOLE, "late")) == []


def test_who_rests_gives_everything_up_until_more_is_planned() -> None:
    me = Driven("ben")
    me.plan()
    asks = me.asks()
    me.pulls(asks[0], WEIGHTS, "w")
    assert me.tells(PullsPaused()) == [CancelPull(ask.pull) for ask in asks]
    assert (
        me.engine.wake_at() is None and me.tells(PullTimerFired()) == [] and me.tells(MergeDue(0)) == [MergeFragment(0)]
    )
    me.plan(round=1)
    assert len(me.asks()) == 2


def test_a_round_that_is_begun_again_after_a_rest_has_all_its_merges() -> None:
    me = Driven("ben", fragments=2, wanted=1)

    def begin() -> None:
        ends_s = ((0, me.now), (1, me.now + 60.0))
        plans = [
            MergePlan(round=3, began_s=(me.now,), ends_s=at_s, gradient_format="int2", fragments=(number,))
            for number, at_s in ends_s
        ]
        me.tells(MergesPlanned(3, plans))

    begin()
    me.tells(MergeDue(3, 0))
    begin()
    assert me.asks() == [], "this plan has come after the merge"
    me.tells(PullsPaused())
    me.now = 10.0
    begin()
    assert {ask.fragment for ask in me.asks()} == {0}
    assert me.engine.places(2)[0]["me"] == (3, 4), "what was merged stays merged"


def test_when_weights_were_published_follows_from_what_their_author_told() -> None:
    me = Driven("ben", wanted=1)
    me.plan()
    ask = of(me.asks(), "weights")
    me.tells(PartnerReplied(ask.pull, WEIGHTS, "w", AdvertisedProgress(0, 100, 30, 2.0, since_s=-5.0)))
    me.tells(PublicationDownloaded(ask.pull, 1000))
    (prepare,) = me.tells(PublicationDecoded(ask.pull, "w"))
    assert prepare.pulled[0].began_s == -5.0 - 15.0


def test_a_restart_merges_nothing_that_was_merged_before() -> None:
    me, again = Driven("ben", wanted=1), Driven("ben", wanted=1)
    me.plan()
    (prepare,) = me.pulls(of(me.asks(), "gradient"), PublicationVersion(0, 2, 200), "g")
    me.tells(MergePrepared(prepare.number, "merge"))
    me.tells(MergeDue(0))
    again.engine.load(me.engine.rows())
    again.plan(round=1)
    ask = of(again.asks(), "gradient")
    assert ask.known == PublicationVersion(0, 2, 200)
    assert again.tells(PartnerReplied(ask.pull, WHOLE, "g")) == [], "what is to be subtracted is not here any more"
    with pytest.raises(ValueError, match="not a row"):
        again.engine.load([[["nonsense"]]])


def test_of_two_the_one_behind_goes_by_what_it_has_merged_of_the_other_and_not_by_its_word() -> None:
    """It stood still, and all that it publishes is too old for the other, who would never merge it again."""
    me = Driven("ben", wanted=1)
    me.see("ben", round=9)
    me.plan()
    (prepare,) = me.pulls(of(me.asks(), "gradient"), PublicationVersion(9, 4, 400), "g")
    me.tells(MergePrepared(prepare.number, "merge"))
    (merge,) = me.tells(MergeDue(0))
    assert isinstance(merge, MergeFragment) and [one.held for one in merge.pulled] == ["g"], (
        "what it claims moves nobody"
    )
    me.plan(round=1)
    assert me.tells(MergeDue(1)) == [FetchConsensus(8)]
    assert isinstance(me.tells(MergeDue(1, may_catch_up=False))[0], MergeFragment)
    me.plan(round=2)
    assert isinstance(me.tells(MergeDue(2))[0], MergeFragment), "what was merged once moves nobody twice"


def test_of_two_what_the_other_has_signed_and_does_not_say_moves_nobody() -> None:
    me = Driven("ben", wanted=1)
    me.see("ben", round=1)
    me.plan()
    (prepare,) = me.pulls(of(me.asks(), "gradient"), PublicationVersion(2**39, 1, 1), "g")
    me.tells(MergePrepared(prepare.number, "merge"))
    assert isinstance(me.tells(MergeDue(0))[0], MergeFragment)
    me.plan(round=1)
    assert isinstance(me.tells(MergeDue(1))[0], MergeFragment)

"""Engine of synchronous rounds, by its events and commands alone."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import TypeAlias

import pytest

from swarmtrain.protocol.membership.membership import Membership, PeerInfo, PeerState
from swarmtrain.protocol.rounds import messages as ev
from swarmtrain.protocol.rounds.chains import Chain, ChainLink, Chains, ShownChain
from swarmtrain.protocol.rounds.engine import RoundEngine, RoundRules
from swarmtrain.protocol.rounds.roles import LinkRates
from swarmtrain.protocol.rounds.rosters import AdvertisedRound, Roster, RoundPublication, SignDecision, steps_of_round
from swarmtrain.protocol.rounds.state import KnownRound
from swarmtrain.run_batch import BatchTarget

Engine: TypeAlias = RoundEngine[str, str]
Command: TypeAlias = ev.Command[str]

RULES = RoundRules(share_above=5, round_limit_s=30.0, silence_s=5.0, hold_s=2.0, retry_s=0.25, look_s=1.0)


def published(peer: str, round: int = 0, base: str = "") -> RoundPublication:
    return RoundPublication(peer=peer, snapshot=f"{peer}{round}", tokens=10, inner_steps=1, base=base)


def roster_of(*peers: str, signer: str = "", attempt: int = 0, before: Roster | None = None) -> Roster:
    round, base = (0, "") if before is None else (before.round + 1, before.digest)
    return Roster(
        round=round,
        signer=signer or peers[0],
        entries=tuple(published(peer, round, base) for peer in peers),
        attempt=attempt,
        base=base,
        base_tokens=0 if before is None else before.total_tokens,
    )


def signed(roster: Roster) -> ev.SignedRoster[str]:
    return ev.SignedRoster(roster, "signed", f"{roster.signer} {roster.attempt} {roster.digest}")


def chain_of(*rosters: Roster) -> Chain:
    return Chain(tuple(ChainLink(roster=one, shown={e.peer: e.tokens for e in one.entries}) for one in rosters))


def reply(
    last: Roster | None = None,
    publication: RoundPublication | None = None,
    roster: Roster | None = None,
    chain: Chain | None = None,
    away: bool = False,
) -> ev.PeerReply[str, str]:
    return ev.PeerReply(
        advertised=AdvertisedRound(round=0 if last is None else last.round + 1, last=last),
        last=None if last is None else signed(last),
        publication=publication,
        roster=None if roster is None else signed(roster),
        shown=None if chain is None else ShownChain(chain),
        away=away,
    )


def engine_of(me: str, *others: str, applied: Sequence[Roster] = (), rules: RoundRules = RULES) -> Engine:
    """Return an engine that has applied these rosters, among these others."""
    membership = Membership(me)
    for peer in others:
        membership.saw_presence(PeerInfo(peer=peer, training=True, stamp=0.0), 999.0, 0.0)
    chains: Chains[str] = Chains()
    engine: Engine = RoundEngine(membership, chains, rules, random.Random(0))
    assert engine.receive(ev.RoundBegun(is_late_joiner=False), 0.0) == []
    for roster in applied:
        chains.move(ChainLink(roster=roster, shown={entry.peer: entry.tokens for entry in roster.entries}))
        assert engine.receive(ev.RoundAdvanced(roster.round + 1, signed(roster)), 0.0) == []
    return engine


def ends(engine: Engine, now: float = 10.0) -> list[Command]:
    """End its inner steps, and let it look."""
    own = published(engine.me, engine.round, engine.base)
    assert engine.receive(ev.InnerStepsDone(engine.round, own, 0.0), now) == []
    return wakes(engine, now)


def wakes(engine: Engine, now: float) -> list[Command]:
    wake_s = engine.wake_at()
    assert wake_s is not None and wake_s <= now
    return engine.receive(ev.RoundTimerFired(), now)


def asked(commands: Sequence[Command]) -> dict[str, int]:
    """Return the numbers of the questions, by peer."""
    return {one.peer: one.number for one in commands if isinstance(one, ev.AskRoundQuestion)}


def of_kind(commands: Sequence[Command], *kinds: type) -> list[Command]:
    return [one for one in commands if isinstance(one, kinds)]


# ---------------------------------------------------------------- a round


def test_a_round_from_its_end_to_the_next() -> None:
    engine = engine_of("a", "b", "c")
    first = ev.RoundQuestion(round=0, has_publication=False)
    assert ends(engine) == [ev.AskRoundQuestion(1, "b", first), ev.AskRoundQuestion(2, "c", first)]
    assert engine.waiting_for == "waiting for b, c" and engine.wake_at() == 11.0
    assert engine.receive(ev.QuestionAnswered(1, reply(publication=published("b"))), 10.1) == []
    assert engine.receive(ev.QuestionAnswered(2, reply(publication=published("c"))), 10.1) == []
    held = ev.RoundQuestion(round=0, hold_s=2.0)
    assert wakes(engine, 10.1) == [
        ev.AskRoundQuestion(3, "b", held),
        ev.AskRoundQuestion(4, "c", held),
        ev.FetchPublication(published("b"), ("b", "c")),
        ev.FetchPublication(published("c"), ("c", "b")),
    ]
    for peer in "bc":
        assert engine.receive(ev.PublicationFetched(f"{peer}0"), 10.2) == []
    roster = roster_of("a", "b", "c")
    assert wakes(engine, 10.2) == [ev.SignRoster(roster, "everyone alive has published")]
    assert engine.receive(ev.RosterSigned(signed(roster)), 10.2) == []
    assert wakes(engine, 10.2) == [ev.MergeRoster(signed(roster))]
    assert engine.receive(ev.RosterMerged(roster.digest), 10.3) == []
    assert wakes(engine, 10.3) == [
        ev.DropRoundQuestion(3, "b"),
        ev.DropRoundQuestion(4, "c"),
        ev.FinishRound(signed(roster)),
    ]
    assert engine.wake_at() is None and engine.waiting_for == ""
    assert engine.receive(ev.RoundAdvanced(1, signed(roster)), 10.4) == []
    assert engine.round == 1 and engine.base == roster.digest and engine.knows(0)


def test_who_was_late_in_a_round_is_waited_for_again_once_it_has_ended() -> None:
    engine = engine_of("a", "b")
    engine.receive(ev.RoundBegun(is_late_joiner=True), 1.0)
    ends(engine)
    engine.receive(ev.QuestionAnswered(1, reply(publication=published("b"))), 10.1)
    wakes(engine, 10.1)
    engine.receive(ev.PublicationFetched("b0"), 10.2)
    roster = roster_of("a", "b")
    engine.receive(ev.RosterSigned(signed(roster)), 10.2)
    wakes(engine, 10.2)
    engine.receive(ev.RosterMerged(roster.digest), 10.3)
    assert of_kind(wakes(engine, 10.3), ev.FinishRound)
    assert engine.is_late_joiner, "until the outer step is done it is in the round that it began late"
    engine.receive(ev.RoundAdvanced(1, signed(roster)), 10.4)
    assert not engine.is_late_joiner, "others would end the next round without it while it evaluates or saves"


def test_who_takes_the_weights_of_others_is_not_waited_for() -> None:
    engine = engine_of("a", "b")
    engine.receive(ev.RoundBegun(is_late_joiner=True), 1.0)
    ends(engine)
    engine.receive(ev.RoundAdvanced(1, signed(roster_of("b", "c"))), 10.4)
    assert engine.is_late_joiner


def test_others_are_told_of_the_roster_that_can_be_had() -> None:
    """The signer of the first dies, and its bytes with it. The next one's would else be told once it is applied."""
    known: KnownRound[str, str] = KnownRound(0, 0.0, 10.0, published("b"))
    of_a, of_b = signed(roster_of("a", "b", "c")), signed(roster_of("b", "c"))
    assert known.best is None and known.keep(of_a) and known.best is of_a
    known.merging = of_a.roster.digest
    known.merge_went_on(ev.RosterNotMerged(of_a.roster.digest, frozenset("a")))
    assert known.best is of_a and not known.can_be_had(of_a.roster), "there is no other"
    assert known.keep(of_b) and known.best is of_b
    known.unobtainable.clear()
    assert known.best is of_a


def test_answers_while_it_trains_show_whether_the_others_have_gone_on() -> None:
    first = roster_of("a", "b", "c")
    second = roster_of("b", "c", before=first)
    third = roster_of("b", "c", before=second)

    def training() -> Engine:
        engine = engine_of("a", "b", "c", applied=[first])
        engine.receive(ev.RoundBegun(is_late_joiner=False), 1.0)
        return engine

    def survey(engine: Engine, last: Roster, now: float, chain: Chain | None = None) -> bool:
        (one,) = engine.receive(ev.SurveyPeers(7, ("b",)), now)
        assert isinstance(one, ev.AskRoundQuestion)
        engine.receive(
            ev.QuestionAnswered(one.number, reply(last, chain=chain if one.question.wants_chain else None)), now
        )
        return engine.is_overtaken

    engine = training()
    assert not survey(engine, first, 2.0)
    assert not survey(engine, roster_of("b", before=first), 3.0), "c has not gone on with it"
    assert survey(engine, second, 4.0)
    engine.receive(ev.RoundAdvanced(2, signed(second)), 5.0)
    assert not engine.is_overtaken
    further = training()
    assert not survey(further, third, 2.0), "what leads there is not known"
    assert survey(further, third, 3.5, chain_of(first, second, third)), "now it is: the second question asks for it"


def test_a_signer_leaves_out_a_claim_of_far_more_than_the_batch() -> None:
    engine = engine_of("a", "b", "c", rules=replace(RULES, target=BatchTarget(30, 1000)))
    ends(engine)
    liars = replace(published("c"), tokens=1000)
    for number, offer in enumerate((published("b"), liars), start=1):
        engine.receive(ev.QuestionAnswered(number, reply(publication=offer)), 10.1)
    wakes(engine, 10.1)
    for peer in "bc":
        engine.receive(ev.PublicationFetched(f"{peer}0"), 10.2)
    reason = "everyone alive has published; without c (1000 tokens), far more than the others have"
    assert wakes(engine, 10.2) == [ev.SignRoster(roster_of("a", "b"), reason)]


def test_a_signer_judges_claims_by_the_batch_that_has_grown() -> None:
    """The same claim is more than the first batch, and no more than a later one."""
    rules = replace(RULES, target=BatchTarget(30, 10**6, grows=True))
    claims = published("a"), published("b"), replace(published("c"), tokens=1000)
    decision = SignDecision(entries=claims, attempt=0, reason="everyone alive has published")
    first, later = (engine_of("a", "b", "c", rules=rules) for _ in "12")
    later.receive(ev.RoundAdvanced(1, signed(replace(roster_of("a", "b", "c"), base_tokens=10**5))), 9.0)
    assert [each.peer for each in first._plausible(decision).entries] == ["a", "b"]
    assert later._plausible(decision) is decision


def test_others_are_answered_at_once_if_they_lack_something_and_else_held() -> None:
    engine, calls = engine_of("a", "b"), itertools.count(1)

    def asks(now: float, **question: object) -> list[Command]:
        return engine.receive(ev.QuestionReceived(next(calls), ev.RoundQuestion(round=0, **question)), now)  # type: ignore[arg-type]

    assert [one.publication for one in asks(1.0, has_publication=False) if isinstance(one, ev.AnswerRoundQuestion)] == [
        None
    ]
    assert engine.wanted, "somebody has ended the round that this peer is in"
    assert not engine.wanted_by, "nobody that this peer knows"
    for asker in ("b", "stranger"):
        engine.receive(ev.QuestionReceived(0, ev.RoundQuestion(round=0, has_publication=False), asker), 1.0)
    assert engine.wanted_by == {"b": 1.0}
    assert asks(1.0, has_publication=False, hold_s=9.0) == []
    assert asks(1.0, has_publication=False, hold_s=1.0) == []
    assert engine.wake_at() == 2.0
    [answer] = wakes(engine, 2.0)
    assert isinstance(answer, ev.AnswerRoundQuestion) and answer.call == 3 and engine.wake_at() == 3.0
    own = published("a")
    [answer] = engine.receive(ev.InnerStepsDone(0, own, 0.0), 2.5)
    assert isinstance(answer, ev.AnswerRoundQuestion) and (answer.call, answer.publication) == (2, own)
    roster = roster_of("a", "b")
    assert asks(2.5, hold_s=2.0) == [] == asks(2.5, hold_s=2.0, has_roster=signed(roster).name)
    assert engine.receive(ev.QuestionDropped(99), 2.5) == []
    [answer] = engine.receive(ev.RosterSigned(signed(roster)), 2.6)
    assert isinstance(answer, ev.AnswerRoundQuestion) and (answer.call, answer.roster) == (4, signed(roster))
    assert engine.receive(ev.QuestionDropped(5), 2.6) == [] == engine.receive(ev.Left(), 2.7)
    assert [
        (one.away, one.participating) for one in asks(2.7, hold_s=2.0) if isinstance(one, ev.AnswerRoundQuestion)
    ] == [(True, False)]
    engine.receive(ev.CameBack(), 2.8)
    assert asks(2.8, hold_s=2.0, has_roster=signed(roster).name) == []


def test_of_a_round_three_rounds_ago_nothing_is_known_any_more() -> None:
    engine, before = engine_of("a"), None
    for round in range(4):
        ends(engine)
        roster = roster_of("a", before=before)
        engine.receive(ev.RoundAdvanced(round + 1, signed(roster)), 10.0)
        before = roster
    assert [engine.knows(round) for round in range(4)] == [False, False, True, True]


def test_who_answers_at_once_without_news_is_asked_again_a_little_later() -> None:
    engine = engine_of("b", "a")
    [number] = asked(ends(engine)).values()
    engine.receive(ev.QuestionAnswered(number, reply()), 10.0)
    [number] = asked(wakes(engine, 10.0)).values()
    engine.receive(ev.QuestionAnswered(number, reply()), 10.1)
    assert asked(wakes(engine, 10.1)) == {} and engine.wake_at() == pytest.approx(10.35)
    assert list(asked(wakes(engine, 10.35))) == ["a"]


def test_who_does_not_answer_is_asked_again_and_has_failed_when_it_is_given_up() -> None:
    engine = engine_of("b", "a")
    [number] = asked(ends(engine)).values()
    engine.receive(ev.QuestionFailed(number), 10.0)
    assert asked(wakes(engine, 10.0)) == {} and engine.wake_at() == 10.25
    [number] = asked(wakes(engine, 10.25)).values()
    commands = list[Command]()
    while not of_kind(commands, ev.SignRoster):
        wake_s = engine.wake_at()
        assert wake_s is not None and wake_s <= 15.0
        commands += wakes(engine, wake_s)
    roster = roster_of("b")
    assert wake_s == 15.0, "a silence"
    engine.receive(ev.RosterSigned(signed(roster)), 15.0)
    wakes(engine, 15.0)
    engine.receive(ev.RosterMerged(roster.digest), 15.0)
    assert wakes(engine, 15.0) == [ev.DropRoundQuestion(number, "a", failed=True), ev.FinishRound(signed(roster))]


def test_who_sends_what_is_malformed_is_asked_again_and_not_waited_for() -> None:
    engine = engine_of("a", "b")
    [number] = asked(ends(engine)).values()
    assert engine.receive(ev.ReplyRefused(number), 10.0) == []
    assert of_kind(wakes(engine, 10.0), ev.SignRoster, ev.AskRoundQuestion) == [
        ev.SignRoster(roster_of("a"), "everyone alive has published")
    ]
    other = engine_of("a", "b")
    [number] = asked(ends(other)).values()
    wrong: ev.PeerReply[str, str] = ev.PeerReply(advertised=AdvertisedRound(round=7, last=None))
    said = "a peer in another round than its last roster leads to"
    assert other.receive(ev.QuestionAnswered(number, wrong), 10.0) == [ev.NamePeer("b", said, "bad-round")]
    assert of_kind(wakes(other, 10.0), ev.SignRoster)


def test_who_says_that_it_is_away_is_not_waited_for() -> None:
    engine = engine_of("a", "b")
    [number] = asked(ends(engine)).values()
    [report] = engine.receive(ev.QuestionAnswered(number, reply(away=True)), 10.0)
    assert isinstance(report, ev.ReportChange) and report.change.state is PeerState.LEFT
    assert of_kind(wakes(engine, 10.0), ev.SignRoster)


def test_what_comes_late_is_dropped() -> None:
    engine = engine_of("a", "b")
    [number] = asked(ends(engine)).values()
    [hang_up] = engine.receive(ev.RoundAbandoned(), 10.1)
    assert hang_up == ev.DropRoundQuestion(number, "b")
    late: list[ev.Event[str, str]] = [
        ev.QuestionAnswered(number, reply(publication=published("b"))), ev.QuestionFailed(number),
        ev.ReplyRefused(number), ev.PublicationFetched("b0"), ev.PublicationNotFetched("b0"), ev.RosterMerged("?"),
        ev.RosterNotMerged("?", frozenset("b")), ev.ShareAveraged("?"), ev.PublicationFound(published("b")),
        ev.RosterSigned(signed(roster_of("a"))), ev.StateNotFetched(7), ev.StateDownloaded(7), ev.RoundAbandoned(),
        ev.RoundAbandoned(3), ev.StateOffered(7, signed(roster_of("b"))),
    ]  # fmt: skip
    assert [engine.receive(event, 10.2) for event in late] == [[]] * len(late)
    assert engine.hearsay.advertised == {} and engine.wake_at() is None


# ---------------------------------------------------------------- what is not delivered


def ended_with(engine: Engine, *rosters: Roster, now: float = 10.0) -> list[Command]:
    """B publishes, and hands out these rosters, one with each answer; its bytes are here."""
    commands = ends(engine, now)
    for roster in (None, *rosters):
        offer = published("b", engine.round, engine.base) if roster is None else None
        last = None if engine.last is None else engine.last.roster
        engine.receive(ev.QuestionAnswered(asked(commands)["b"], reply(last, offer, roster)), now)
        engine.receive(ev.PublicationFetched(f"b{engine.round}"), now)
        commands = wakes(engine, now)
    return commands


def test_who_delivers_nothing_is_left_off_the_roster() -> None:
    engine = engine_of("a", "b")
    [number] = asked(ends(engine)).values()
    engine.receive(ev.QuestionAnswered(number, reply(publication=published("b"))), 10.0)
    [bring] = of_kind(wakes(engine, 10.0), ev.FetchPublication)
    assert bring == ev.FetchPublication(published("b"), ("b",))
    engine.receive(ev.PublicationNotFetched("b0"), 10.1)
    assert of_kind(wakes(engine, 10.1), ev.SignRoster, ev.FetchPublication) == [
        ev.SignRoster(roster_of("a"), "everyone alive has published")
    ]


@pytest.mark.parametrize(("small", "is_gone"), [(True, False), (False, False), (False, True)])
def test_who_told_of_a_slow_link_and_delivered_nothing_is_not_waited_for_as_long_again(
    small: bool, is_gone: bool
) -> None:
    """Unless it was gone: that does not show that it lies."""
    engine = engine_of("a", "b", "c", rules=replace(RULES, body_bytes=25_000_000, round_limit_s=600.0))
    for peer, rate in {"b": 1.0, "c": 25e6}.items():
        info = PeerInfo(peer=peer, training=True, stamp=1.0, link=LinkRates(rate, rate))
        engine.membership.saw_presence(info, 999.0, 0.0)
    engine.claims.own = LinkRates(25e6, 25e6)
    assert engine.merge_limit_s("abc", ()) == 600.0
    ended_with(engine)
    if small:
        engine.receive(ev.PublicationNotFetched("b0"), 15.5)
    else:
        first = roster_of("a", "b")
        engine.receive(ev.RosterSigned(signed(first)), 15.0)
        assert of_kind(wakes(engine, 15.0), ev.MergeRoster) == [ev.MergeRoster(signed(first))]
        engine.receive(ev.RosterNotMerged("of an earlier roster", frozenset("c")), 15.4)
        if is_gone:
            engine.membership.left("b", 15.4)
        engine.receive(ev.RosterNotMerged(first.digest, frozenset("b")), 15.5)
    assert engine.merge_limit_s("abc", ()) == (600.0 if is_gone else 30.0)


def test_a_roster_that_cannot_be_merged_is_signed_again_without_who_lacks() -> None:
    engine = engine_of("a", "b", "c")
    ended_with(engine)
    first = roster_of("a", "b")
    engine.receive(ev.RosterSigned(signed(first)), 15.0)
    assert of_kind(wakes(engine, 15.0), ev.MergeRoster) == [ev.MergeRoster(signed(first))]
    engine.receive(ev.RosterNotMerged(first.digest, frozenset("b")), 15.5)
    again, now = roster_of("a", attempt=1), 15.5
    while not (signs := of_kind(wakes(engine, now), ev.SignRoster, ev.MergeRoster)):
        assert engine.waiting_for == "asking those whose publications nobody delivered"
        now = engine.wake_at() or now
    assert signs == [ev.SignRoster(again, "nobody could deliver b")] and now == 20.5, "a silence"
    engine.receive(ev.RosterSigned(signed(again)), now)
    assert of_kind(wakes(engine, now), ev.MergeRoster) == [ev.MergeRoster(signed(again))]


def test_who_hung_while_its_bytes_were_pulled_is_asked_for_them_once_more() -> None:
    """Without it, two that hung at one time were left off by a third, which signed alone when both were there again."""
    engine, first, again = engine_of("a", "b", "c"), roster_of("a", "b"), roster_of("a", attempt=1)
    ended_with(engine)
    engine.receive(ev.RosterSigned(signed(first)), 15.0)
    wakes(engine, 15.0)
    engine.receive(ev.RosterNotMerged(first.digest, frozenset("b")), 15.5)
    assert not of_kind(wakes(engine, 15.5), ev.SignRoster, ev.MergeRoster)
    [number] = (number for number, one in engine._questions.open.items() if one.peer == "b")
    engine.receive(ev.QuestionAnswered(number, reply(publication=published("b"))), 16.0)
    assert of_kind(wakes(engine, 16.0), ev.MergeRoster) == [ev.MergeRoster(signed(first))]
    engine.receive(ev.RosterNotMerged(first.digest, frozenset("b")), 16.5)
    assert of_kind(wakes(engine, 16.5), ev.SignRoster) == [ev.SignRoster(again, "nobody could deliver b")], "once"
    engine.receive(ev.RosterSigned(signed(again)), 16.5)
    wakes(engine, 16.5)
    engine.receive(ev.RosterMerged(again.digest), 16.6)
    assert of_kind(wakes(engine, 16.6), ev.FinishRound)
    engine.receive(ev.RoundAdvanced(1, signed(again)), 16.6)
    engine.receive(ev.InnerStepsDone(1, published("a", 1, again.digest), 16.6), 30.0)
    known = engine._ending
    assert known is not None and known.keep(signed(roster_of("a", "b", before=again)))
    known.unobtainable.add("b")
    known.try_again(engine.hearsay, {"b": 31.0}, 30.0)
    assert known.unobtainable == {"b"}, "it was there and delivered nothing: that costs one wait and no more"
    assert known.authors_due_s("bc", 5.0, 30.0) == 30.0


def test_who_was_lost_and_asks_is_there_again() -> None:
    """Else two sign at one moment: one that is there again, and one that has not read its presence yet."""
    engine = engine_of("b", "a")
    for now in (1.0, 2.5):
        engine.membership.call_failed("a", now, "no answer")
    assert engine.membership.volunteers() == []
    asks = ev.QuestionReceived(1, ev.RoundQuestion(round=0, has_publication=False), "a")
    [report, answer] = engine.receive(asks, 3.0)
    assert isinstance(report, ev.ReportChange) and report.change.state is PeerState.LIVE
    assert isinstance(answer, ev.AnswerRoundQuestion) and engine.wanted_by == {"a": 3.0}
    assert list(asked(ends(engine))) == ["a"] and engine.waiting_for == "a signs the roster"


def test_a_better_roster_takes_the_place_of_the_one_that_is_merged() -> None:
    engine = engine_of("c", "b")
    worse, better = roster_of("c"), roster_of("b", "c")
    ended_with(engine)
    engine.receive(ev.RosterSigned(signed(worse)), 15.0)
    commands = wakes(engine, 15.0)
    assert of_kind(commands, ev.MergeRoster) == [ev.MergeRoster(signed(worse))]
    engine.receive(ev.ShareAveraged(worse.digest), 15.0)
    [number] = (number for number, one in engine._questions.open.items() if one.peer == "b")
    engine.receive(ev.QuestionAnswered(number, reply(roster=better)), 15.1)
    assert of_kind(wakes(engine, 15.1), ev.CancelMerge, ev.MergeRoster) == [
        ev.CancelMerge(),
        ev.MergeRoster(signed(better)),
    ]
    engine.receive(ev.RosterMerged(worse.digest), 15.2)
    assert not of_kind(wakes(engine, 16.1), ev.FinishRound), "it comes late"


def test_a_roster_that_names_what_this_peer_never_published_is_not_merged_again() -> None:
    engine = engine_of("c", "b")
    wrong = Roster(
        round=0, signer="b", entries=(published("b"), RoundPublication(peer="c", snapshot="?", tokens=1, inner_steps=1))
    )
    assert of_kind(ended_with(engine, wrong), ev.MergeRoster) == [ev.MergeRoster(signed(wrong))]
    engine.receive(ev.RosterNotMerged(wrong.digest, frozenset("c")), 10.1)
    assert not of_kind(wakes(engine, 10.1), ev.MergeRoster, ev.SignRoster), "it is b's turn"


def test_a_roster_that_gives_one_peer_too_much_is_merged_in_equal_shares_and_its_signer_named() -> None:
    engine, right = engine_of("c", "b", "d", "e"), roster_of("b", "c", "d", "e")
    fair, wrong = replace(right, shares=(72, 24, 0, 0)), replace(right, shares=(73, 23, 0, 0))
    assert of_kind(ended_with(engine, fair), ev.MergeRoster, ev.NamePeer) == [ev.MergeRoster(signed(fair))]
    engine = engine_of("c", "b", "d", "e")
    said = "a roster by which b averages 73 of 96 chunks of the mean, more than 72"
    assert of_kind(ended_with(engine, wrong), ev.MergeRoster, ev.NamePeer) == [
        ev.NamePeer("b", said, "bad-size"),
        ev.MergeRoster(signed(right)),
    ]
    engine.receive(ev.RosterMerged(right.digest), 10.1)
    assert of_kind(wakes(engine, 10.1), ev.FinishRound) == [ev.FinishRound(signed(wrong))], (
        "others get it as it was signed"
    )


@pytest.mark.parametrize("comes", ["before", "after"])
def test_who_has_merged_what_nobody_else_could_pull_from_it_gets_another_chance_once(comes: str) -> None:
    """It stood still for as long as the others tried, and goes on with what it merged."""
    engine = engine_of("c", "b")
    roster = roster_of("b", "c")
    [question] = asked(ended_with(engine, roster)).values() or [0]
    if comes == "before":
        engine.receive(ev.QuestionAnswered(question, reply(roster)), 10.1)
        assert of_kind(wakes(engine, 10.1), ev.MergeRoster) == []
    engine.receive(ev.RosterNotMerged(roster.digest, frozenset("b")), 10.2)
    if comes == "after":
        assert of_kind(wakes(engine, 10.2), ev.MergeRoster) == []
        engine.receive(ev.QuestionAnswered(question, reply(roster)), 10.3)
    commands = wakes(engine, 10.3)
    assert of_kind(commands, ev.MergeRoster, ev.RequestState) == [ev.MergeRoster(signed(roster))]
    engine.receive(ev.RosterNotMerged(roster.digest, frozenset("b")), 10.4)
    [fetch] = of_kind(wakes(engine, 10.4), ev.MergeRoster, ev.RequestState)
    assert isinstance(fetch, ev.RequestState) and fetch.source == "b"
    engine.receive(ev.StateOffered(fetch.number, signed(roster)), 10.5)
    ask = asked(engine.receive(ev.StateOffered(fetch.number, signed(roster)), 10.5))
    chain = chain_of(roster)
    assert engine.receive(ev.QuestionAnswered(ask["b"], reply(roster, chain=chain)), 10.6) == [], "it withholds its own"
    assert not of_kind(wakes(engine, 10.6), ev.RequestState, ev.DownloadState)


def test_rosters_of_any_number_of_signers_are_bounded() -> None:
    """Keys cost nothing: what is kept is what holds against the rest, and this peer's own."""
    engine = engine_of("z", "b")
    known = list[str]()

    def keep(signer: str, attempt: int = 0) -> bool:
        one = signed(roster_of("z", signer=signer, attempt=attempt))
        engine.receive(ev.RosterSigned(one), 10.0)
        known[:] = list(engine._rounds[0].rosters)
        return one.name in known

    ends(engine)
    assert keep("z") and all(keep(f"s{100 - number:03d}") for number in range(64))
    assert all(keep(f"s{100 - number:03d}") for number in range(64, 100)), "each signer is lower than those before"
    assert not keep("s100"), "it holds against none of those kept"
    assert len(known) == 65 and engine._rounds[0].best is not None
    assert engine._rounds[0].best.roster.signer == "s001"
    assert all(keep("s001", attempt) for attempt in range(1, 20))
    assert sum(name.startswith("s001 ") for name in known) <= 8 and not keep("s001", 1)


# ---------------------------------------------------------------- falling behind


BEGAN = roster_of("a", "b", "c")
ONE = roster_of("b", "c", before=BEGAN)
TWO = roster_of("b", "c", before=ONE)


def test_who_is_rounds_behind_asks_for_the_chain_and_takes_the_state() -> None:
    """Publications of its round nobody serves any more: that speaks against nobody who is further than that."""
    engine = engine_of("a", "b", "c", applied=[BEGAN])
    numbers = asked(ends(engine))
    engine.receive(ev.ProcessSuspended(), 10.0)
    for peer, number in numbers.items():
        engine.receive(ev.QuestionAnswered(number, reply(TWO, published(peer, 1, BEGAN.digest))), 10.1)
    commands = wakes(engine, 10.1)
    question = ev.RoundQuestion(round=1, wants_chain=True)
    assert of_kind(commands, ev.AskRoundQuestion, ev.SignRoster) == [
        ev.AskRoundQuestion(3, "b", question),
        ev.AskRoundQuestion(4, "c", question),
    ]
    for peer in "bc":
        engine.receive(ev.PublicationNotFetched(f"{peer}1"), 10.2)
    shown = chain_of(BEGAN, ONE, TWO)
    engine.receive(ev.QuestionAnswered(3, reply(TWO, chain=shown)), 10.2)
    [fetch] = of_kind(wakes(engine, 10.2), ev.RequestState, ev.SignRoster)
    assert isinstance(fetch, ev.RequestState) and fetch.min_round == 3
    assert engine.receive(ev.StateOffered(fetch.number, signed(TWO)), 10.3) == [ev.DownloadState(fetch.number)]
    commands = engine.receive(ev.StateDownloaded(fetch.number), 10.4)
    assert commands[-1] == ev.AdoptState(fetch.number, "the agreed weights are beyond this round")
    assert engine.wake_at() is None
    engine.receive(ev.RoundBegun(is_late_joiner=True), 10.5)
    engine.chains.move(ChainLink(roster=TWO))
    assert engine.receive(ev.RoundAdvanced(3, signed(TWO)), 10.5) == [] and engine.chains.chain == shown


def test_a_source_that_does_not_deliver_makes_room_for_the_next_and_in_the_end_for_a_round_alone() -> None:
    engine = engine_of("a", "b", "c", applied=[BEGAN])
    engine.receive(ev.ProcessSuspended(), 10.0)
    numbers = asked(ends(engine))
    for number in numbers.values():
        engine.receive(ev.QuestionAnswered(number, reply(TWO)), 10.1)
    numbers = asked(wakes(engine, 10.1))
    engine.receive(ev.QuestionAnswered(numbers["b"], reply(TWO, chain=chain_of(BEGAN, ONE, TWO))), 10.2)
    [first] = of_kind(wakes(engine, 10.2), ev.RequestState)
    assert isinstance(first, ev.RequestState)
    [second] = engine.receive(ev.StateNotFetched(first.number), 10.3)
    assert isinstance(second, ev.RequestState) and {first.source, second.source} == {"b", "c"}
    assert engine.receive(ev.StateNotFetched(first.number), 10.3) == [], "it comes late"
    wrong = roster_of("b", before=TWO)
    lie = Roster(round=3, signer="b", entries=wrong.entries, base=TWO.digest, base_tokens=10**6)
    said = f"a roster that counts 1000000 tokens behind it where its chain has {TWO.total_tokens}"
    assert engine.receive(ev.StateOffered(second.number, signed(lie)), 10.4) == [
        ev.NamePeer(second.source, said, "bad-tokens")
    ]
    commands = wakes(engine, 10.4)
    assert of_kind(commands, ev.SignRoster), "nobody else is left that it could ask"


def test_nothing_is_signed_for_a_while_before_chains_are_shown() -> None:
    """And those who come one after the other with chains unknown hold no round up for ever."""
    engine, now, numbers = engine_of("a"), 10.0, itertools.count()
    engine.receive(ev.InnerStepsDone(0, published("a"), 0.0), now)
    signs = list[float]()
    while not signs and now < 60:
        peer = f"x{next(numbers)}"
        engine.membership.saw_presence(PeerInfo(peer=peer, training=True, stamp=now), now + 999, now)
        base = roster_of(peer)
        head = Roster(round=9, signer=peer, entries=base.entries, base=f"{peer:0>64}", base_tokens=0)
        engine.hearsay.advertised[peer] = now, AdvertisedRound(round=10, last=head)
        engine.receive(ev.MembersChanged(), now)
        signs += [now for one in wakes(engine, now) if isinstance(one, ev.SignRoster)]
        if not signs:
            assert engine.waiting_for == "asking others for the rosters behind their weights"
        now += 0.9 * RULES.silence_s
    assert signs and 10.0 + RULES.silence_s < signs[0] <= 10.0 + 4 * RULES.silence_s


def test_who_stood_still_asks_without_being_held_before_it_decides() -> None:
    engine = engine_of("a", "b")
    commands = ended_with(engine)
    assert of_kind(commands, ev.SignRoster)
    engine.receive(ev.ProcessSuspended(), 30.0)
    commands = wakes(engine, 30.0)
    assert not of_kind(commands, ev.SignRoster) and "was suspended" in engine.waiting_for
    [number] = (number for number, one in engine._questions.open.items() if one.peer == "b")
    engine.receive(ev.QuestionAnswered(number, reply()), 30.1)
    [again] = of_kind(wakes(engine, 30.1), ev.AskRoundQuestion, ev.SignRoster)
    assert isinstance(again, ev.AskRoundQuestion) and again.question.hold_s == 0.0
    engine.receive(ev.QuestionAnswered(again.number, reply()), 30.2)
    assert of_kind(wakes(engine, 30.2), ev.SignRoster)


# ---------------------------------------------------------------- the search for a state


def test_a_joiner_surveys_has_a_chain_shown_and_takes_the_state_that_holds() -> None:
    engine = engine_of("z", "b", "c")
    numbers = asked(engine.receive(ev.SurveyPeers(1, ("b", "c", "d")), 1.0))
    assert engine.receive(ev.QuestionFailed(numbers["d"]), 1.0) == []
    assert engine.receive(ev.QuestionAnswered(numbers["b"], reply(TWO)), 1.0) == []
    advertised = {"b": AdvertisedRound(round=3, last=TWO), "c": AdvertisedRound(round=0, last=None)}
    assert engine.receive(ev.QuestionAnswered(numbers["c"], reply()), 1.0) == [ev.PeersSurveyed(1, advertised)]
    [ask] = engine.receive(ev.SearchState(2, advertised), 1.1)
    assert ask == ev.AskRoundQuestion(4, "b", ev.RoundQuestion(round=0, wants_chain=True))
    [fetch] = engine.receive(ev.QuestionAnswered(4, reply(TWO, chain=chain_of(BEGAN, ONE, TWO))), 1.2)
    assert fetch == ev.RequestState(5, "b", 3)
    assert engine.receive(ev.StateOffered(5, signed(TWO)), 1.3) == [ev.DownloadState(5)]
    assert engine.receive(ev.StateDownloaded(5), 1.4) == [ev.StateSearched(2, False, 5)]


def test_a_search_ends_also_where_nobody_has_what_is_sought() -> None:
    engine = engine_of("z", "b")
    assert engine.receive(ev.SurveyPeers(1, ()), 1.0) == [ev.PeersSurveyed(1, {})]
    assert engine.receive(ev.SearchState(2, {}), 1.0) == [ev.StateSearched(2, True, None)]
    advertised = {"b": AdvertisedRound(round=3, last=TWO)}
    numbers = asked(engine.receive(ev.SearchState(3, advertised), 1.0))
    assert engine.receive(ev.QuestionFailed(numbers["b"]), 1.0) == [ev.StateSearched(3, True, None)], (
        "it shows no chain"
    )
    numbers = asked(engine.receive(ev.SearchState(4, advertised), 1.0))
    [fetch] = engine.receive(ev.QuestionAnswered(numbers["b"], reply(TWO, chain=chain_of(BEGAN, ONE, TWO))), 1.0)
    assert isinstance(fetch, ev.RequestState)
    assert engine.receive(ev.StateNotFetched(fetch.number), 1.0) == [ev.StateSearched(4, False, None)]
    assert engine.receive(ev.SearchState(5, advertised, fetches=False), 1.0) == [ev.StateSearched(5, False, None)]
    assert engine.receive(ev.SearchState(6, advertised, above_tokens=10**6), 1.0) == [ev.StateSearched(6, True, None)]


def test_a_search_that_is_given_up_asks_nobody_any_more() -> None:
    engine = engine_of("z", "b", "c")
    numbers = asked(engine.receive(ev.SurveyPeers(1, ("b", "c")), 1.0))
    engine.receive(ev.SurveyPeers(2, ("b",)), 1.0)
    assert engine.receive(ev.RoundAbandoned(1), 1.1) == [
        ev.DropRoundQuestion(number, peer) for peer, number in numbers.items()
    ]
    assert engine.receive(ev.QuestionAnswered(numbers["b"], reply(TWO)), 1.1) == [] and engine.hearsay.advertised == {}


# ---------------------------------------------------------------- joining


def joined(engine: Engine, answers: ev.PeerReply[str, str] | None, search: int = 1) -> list[Command]:
    """Let it ask B, which answers this, or nothing."""
    numbers = asked(engine.receive(ev.Join(search, ("b",)), 1.0))
    return engine.receive(
        ev.QuestionFailed(numbers["b"]) if answers is None else ev.QuestionAnswered(numbers["b"], answers), 1.0
    )


@pytest.mark.parametrize("applied", [(), (BEGAN, ONE)])
def test_who_joins_asks_three_times_before_it_goes_on_without_an_answer(applied: tuple[Roster, ...]) -> None:
    """That nobody answers says nothing of what they have."""
    engine = engine_of("z", "b", applied=applied)
    last = ev.JoinsWith.OWN if applied else ev.JoinsWith.NOTHING
    yet = ev.JoinsWith.NOTHING_YET
    for begins in (yet, yet, last, yet, yet, last, yet):
        assert joined(engine, None) == [ev.JoinDecided(1, begins, None, {})]
    engine.receive(ev.Left(), 1.0)
    for begins in (yet, yet, last):
        assert joined(engine, None) == [ev.JoinDecided(1, begins, None, {})], "it was paused meanwhile"


def test_who_joins_a_swarm_in_which_nobody_is_or_has_merged_a_round_begins_with_its_own() -> None:
    engine = engine_of("z", "b")
    assert engine.receive(ev.Join(1, ()), 1.0) == [ev.JoinDecided(1, ev.JoinsWith.OWN, None, {})]
    advertised = {"b": AdvertisedRound(round=0, last=None)}
    assert joined(engine, reply(), search=2) == [ev.JoinDecided(2, ev.JoinsWith.OWN, None, advertised)]


def test_who_joins_takes_the_state_that_holds_or_tries_again() -> None:
    engine = engine_of("z", "b")
    advertised = {"b": AdvertisedRound(round=3, last=TWO)}
    for begins in (ev.JoinsWith.NOTHING_YET, ev.JoinsWith.NOTHING_YET, ev.JoinsWith.OTHERS):
        commands = joined(engine, reply(TWO))
        if (ask := asked(commands)).keys():  # B's chain is known after the first time
            commands = engine.receive(ev.QuestionAnswered(ask["b"], reply(TWO, chain=chain_of(BEGAN, ONE, TWO))), 1.0)
        [fetch] = commands
        assert isinstance(fetch, ev.RequestState)
        if begins is ev.JoinsWith.NOTHING_YET:
            assert engine.receive(ev.StateNotFetched(fetch.number), 1.1) == [
                ev.JoinDecided(1, begins, None, advertised)
            ]
    assert engine.receive(ev.StateOffered(fetch.number, signed(TWO)), 1.2) == [ev.DownloadState(fetch.number)]
    assert engine.receive(ev.StateDownloaded(fetch.number), 1.3) == [
        ev.JoinDecided(1, ev.JoinsWith.OTHERS, fetch.number, advertised)
    ]


def test_who_takes_a_state_is_a_guest_and_asks_its_source_how_far_its_round_is() -> None:
    engine = engine_of("z", "b", "c", applied=(BEGAN,))
    assert not engine.is_late_joiner
    [ask] = engine.receive(ev.StateAdopted(7, "b"), 1.0)
    assert (
        engine.is_late_joiner
        and isinstance(ask, ev.AskRoundQuestion)
        and (ask.peer, ask.question) == ("b", ev.RoundQuestion(round=1))
    )
    advertised = {"b": AdvertisedRound(round=3, last=TWO)}
    assert engine.receive(ev.QuestionAnswered(ask.number, reply(TWO)), 1.1) == [ev.PeersSurveyed(7, advertised)]


def test_who_does_not_want_to_join_any_more_asks_nobody() -> None:
    engine = engine_of("z", "b")
    [number] = asked(engine.receive(ev.Join(1, ("b",)), 1.0)).values()
    assert engine.receive(ev.RoundAbandoned(1), 1.1) == [ev.DropRoundQuestion(number, "b")]
    assert engine.receive(ev.SurveyPeers(1, ()), 1.2) == [ev.PeersSurveyed(1, {})], "and the number is free"


# ---------------------------------------------------------------- steps


def test_who_comes_late_takes_fewer_steps() -> None:
    assert steps_of_round(32, 4, [], fresh=True)[0] == 32, "nobody has begun it"
    assert steps_of_round(32, 4, [(4, 10), (3, 31)], fresh=True)[0] == 20
    assert steps_of_round(32, 4, [(5, 1)], fresh=True)[0] == 2, "it is over already"
    assert steps_of_round(32, 4, [(5, 1), (4, 10)], fresh=False)[0] == 32
    assert steps_of_round(32, 4, [(4, 20)], fresh=False)[0] == 10


@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize(
    ("honest", "liars", "steps"),
    [
        ([(4, 0)] * 19, [(4, 100)], 100),
        ([(3, 99)] * 18 + [(4, 0)], [(4, 100)], 100),  # the others have not begun the round
        ([(4, 5)] * 16, [(4, 100)] * 4, 88),
        ([(4, 0)] * 19, [(10**6, 0)], 100),
        ([(4, 60)] * 16, [(4, 100)] * 4, 33),
        ([(4, 90)] * 5, [(4, 0)], 7),  # nobody is made early
    ],
)
def test_a_fifth_of_the_peers_cannot_make_anybody_late_by_what_they_claim(
    honest: list[tuple[int, int]], liars: list[tuple[int, int]], steps: int, fresh: bool
) -> None:
    expected = 100 if not fresh and steps > 50 else steps
    assert steps_of_round(100, 4, honest + liars, fresh=fresh)[0] == expected

"""Synchronous rounds: what one peer does in them, as events go in and commands come out.

A peer that has ended its own round asks the others about it. It is answered at once when there is news, and else held
for two seconds. The same answer tells how far a peer is and what it applied last, and hands out its publication's
manifest, the roster, and the share that it averaged. What to do about all this `rosters.decide` says: sign, merge,
take another's state, or wait.

`RoundEngine` holds all state of that: who was asked and has answered, what is brought, held, signed and merged, who
does not deliver, what is answered to whom, and when to look again. Whoever drives it moves bytes and has no rule of its
own: `network/rounds.py` between real peers, `simulate/volunteer.py` in virtual time. The membership and the chains are
told of by others too, and read here. Pure: rosters as they travel are handles that pass through.
"""

from __future__ import annotations

import itertools
import math
import random
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeAlias, assert_never

from swarmtrain.protocol import rosters
from swarmtrain.protocol import round_events as ev
from swarmtrain.protocol.chains import Chains, ChainView, Link, chain_view
from swarmtrain.protocol.lifecycle import Membership
from swarmtrain.protocol.rosters import (
    Apply,
    CatchUp,
    Decision,
    Publication,
    Roster,
    RoundView,
    Standing,
    Told,
    Wait,
    better_roster,
    decide,
    idled,
    is_silent,
    peers_to_ask,
    pulls_whole,
    standings,
    worst_roster,
)
from swarmtrain.protocol.round_events import Command, Envelope, Event, Question, Reply, SignedRoster
from swarmtrain.protocol.seeking import CatchUpSources, Hearsay, Search, Source
from swarmtrain.protocol.signers import Signers

__all__ = ["RoundEngine", "RoundRules"]

_LEAST_LOOK_S = 0.005
_KEEP_ROUNDS = 3
_SOURCES = 4
_MAX_ATTEMPTS = 8
_MAX_ROSTERS = 64
"""So many rosters of others are kept of a round, those that hold against the rest: signers cost nothing."""
_CHAIN_SILENCES = 3
"""For so many times as long as one may be silent nothing is signed before chains are shown."""


@dataclass(frozen=True, kw_only=True)
class RoundRules:
    """What the run file says, and how often others are asked. Durations in seconds."""

    share_above: int
    round_limit_s: float
    silence_s: float
    hold_s: float = 2.0
    """A question is held so long, at most, by who has no news."""
    retry_s: float = 0.25
    look_s: float = 0.5
    """Whoever waits looks so often at least, also when it heard of nothing."""

    @property
    def gap_s(self) -> float:
        """A process that comes so much later to something than it should has stood still."""
        return max(1.0, self.silence_s / 4)


@dataclass(slots=True)
class _Round(Generic[Envelope, Link]):
    """What is known of one round that this peer has ended itself."""

    round: int
    started_s: float
    ended_s: float
    own: Publication
    announced: dict[str, Publication] = field(default_factory=dict)
    rosters: dict[str, SignedRoster[Envelope]] = field(default_factory=dict)
    """By name."""
    best: SignedRoster[Envelope] | None = None
    """Of these the one that holds."""
    shared: str = ""
    asking: dict[str, int] = field(default_factory=dict)
    """The number of the question to each peer that is under way."""
    ask_again_s: dict[str, float] = field(default_factory=dict)
    told_of: dict[str, str] = field(default_factory=dict)
    """The name of the roster that each peer told of last."""
    asked_at_s: dict[str, float] = field(default_factory=dict)
    answered_at_s: dict[str, float] = field(default_factory=dict)
    """When what each peer answered last was asked."""
    brought: set[str] = field(default_factory=set)
    held: set[str] = field(default_factory=set)
    """The publications that were asked for, and those whose bytes are here, by their hashes."""
    unobtainable: set[str] = field(default_factory=set)
    tried_again: set[tuple[str, str]] = field(default_factory=set)
    undeliverable: set[str] = field(default_factory=set)
    distrusted: set[str] = field(default_factory=set)
    """Peers that sent something malformed about this round: asked again, but not waited for."""
    impossible: set[str] = field(default_factory=set)
    """Digests of rosters that name a publication of ours that we never made."""
    lacking_s: dict[str, float] = field(default_factory=dict)
    """Since when each peer has told of a roster whose chain nobody has shown yet."""
    merging: str = ""
    is_merged: bool = False
    catching_up: CatchUpSources[Envelope, Link] | None = None


@dataclass(slots=True)
class _Survey:
    """Who was asked how far it is, and what they said."""

    search: int
    open: set[int]
    told: dict[str, Told] = field(default_factory=dict)


_Fetching: TypeAlias = Search[Envelope, Link] | CatchUpSources[Envelope, Link]
_Asker: TypeAlias = _Round[Envelope, Link] | _Survey | Search[Envelope, Link] | CatchUpSources[Envelope, Link]


@dataclass(slots=True)
class _Open(Generic[Envelope, Link]):
    """A question under way, and what it is for."""

    peer: str
    asked_s: float
    question: Question
    of: _Asker[Envelope, Link]


class RoundEngine(Generic[Envelope, Link]):
    """One peer's side of all rounds. Times are seconds of one clock that the caller passes in as `now`."""

    def __init__(
        self,
        membership: Membership,
        chains: Chains[Link],
        rules: RoundRules,
        rng: random.Random,
        *,
        trains: bool = True,
    ) -> None:
        """The weights of one that does not train count for no chain: those of an archive."""
        self.me, self.membership, self.chains, self.rules = membership.me, membership, chains, rules
        self.round = 0
        self.last: SignedRoster[Envelope] | None = None
        self.guest = True
        """Whether nobody waits for this peer's round: before its first, in that one, and after catching up."""
        self.away = False
        """Whether this peer has said goodbye: whoever missed that, and asks, is told so."""
        self.wanted = False
        """Whether somebody has ended the round that this peer is in, and asked for this peer's part of it."""
        self.waiting_for, self.waiting_until_s = "", 0.0
        """Why it waits, and until when that may be; 0 when there is no such time."""
        self.listening_since_s = -math.inf
        self.signers = Signers()
        self.hearsay: Hearsay[Envelope, Link] = Hearsay(self.me, membership, chains)
        self._stands_for = self.me if trains else ""
        self._rng = rng
        self._numbers = itertools.count(1)
        self._rounds: dict[int, _Round[Envelope, Link]] = {}
        self._ending: _Round[Envelope, Link] | None = None
        """The round that is being ended."""
        self._look_s = math.inf
        self._held: dict[int, tuple[Question, float]] = {}
        """Questions of others that are held, and until when."""
        self._held_until_s = math.inf
        """The first of these times, or earlier."""
        self._open: dict[int, _Open[Envelope, Link]] = {}
        self._fetching: dict[int, _Fetching[Envelope, Link]] = {}

    # ------------------------------------------------------------- events

    def receive(self, event: Event[Envelope, Link], now: float) -> list[Command[Envelope]]:
        """What happened, and what is to be done about it."""
        match event:
            case ev.Woke():
                return self._woke(now)
            case ev.Answered():
                return self._answered(event.number, event.reply, now)
            case ev.Asked():
                return self._asked(event, now)
            case ev.Brought() | ev.NotBrought():
                return self._was_brought(event, now)
            case ev.Refused():
                return self._got_nothing(event.number, now, is_malformed=True)
            case ev.Failed():
                return self._got_nothing(event.number, now, is_malformed=False)
            case ev.Signed():
                return self._signed(event.roster, now)
            case ev.Found() | ev.Merged() | ev.NotMerged():
                return self._merge_went_on(event, now)
            case ev.Begun():
                self.guest = event.guest
            case ev.Left():
                self.away = self.guest = True
                return self._tell()
            case ev.CameBack():
                self.away = False
            case ev.Ended():
                return self._ended(event, now)
            case ev.Advanced():
                return self._advanced(event)
            case ev.GivenUp():
                return self._given_up(event.search, now)
            case ev.PeersChanged():
                self._look_s = now
            case ev.StoodStill():
                self.listening_since_s = self._look_s = now
                self.membership.resume(now, forgives=event.forgives)
            case ev.HungUp():
                self._held.pop(event.call, None)
            case ev.Shared():
                if self._ending is not None and self._ending.merging == event.roster:
                    self._ending.shared = event.roster
                    return self._tell()
            case ev.Survey():
                return self._survey(event, now)
            case ev.Seek():
                return self._seek(event, now)
            case ev.Offered() | ev.NotFetched() | ev.Taken():
                return self._fetch_went_on(event, now)
            case _:
                assert_never(event)
        return []

    def wake_at(self) -> float | None:
        """When `Woke` is wanted."""
        wake_s = math.inf if self._ending is None else self._look_s
        if self._held:
            wake_s = min(wake_s, self._held_until_s)
        return wake_s if wake_s < math.inf else None

    def knows(self, round: int) -> bool:
        """Whether others are still answered about that round of ours."""
        return round in self._rounds

    def forget_peer(self, peer: str) -> None:
        """A peer that has long been gone."""
        self.hearsay.forget(peer)

    @property
    def base(self) -> str:
        """The digest of the roster applied last."""
        return "" if self.last is None else self.last.roster.digest

    @property
    def _tokens(self) -> int:
        """Behind the weights."""
        return 0 if self.last is None else self.last.roster.total_tokens

    def _woke(self, now: float) -> list[Command[Envelope]]:
        commands: list[Command[Envelope]] = []
        if self._held_until_s <= now:
            due = [call for call, (_, until_s) in self._held.items() if until_s <= now]
            commands += [self._answer(call, self._held.pop(call)[0]) for call in due]
            self._held_until_s = min((until_s for _, until_s in self._held.values()), default=math.inf)
        if self._ending is not None and self._look_s <= now:
            commands += self._look(self._ending, now)
        return commands

    # ------------------------------------------------------------- answering

    def _asked(self, event: ev.Asked, now: float) -> list[Command[Envelope]]:
        question = event.question
        self.wanted = self.wanted or (question.round == self.round and not question.has_publication)
        if question.hold_s <= 0 or self._is_news(question):
            return [self._answer(event.call, question)]
        until_s = now + min(question.hold_s, self.rules.hold_s)
        self._held[event.call] = question, until_s
        self._held_until_s = min(self._held_until_s, until_s)
        return []

    def _is_news(self, question: Question) -> bool:
        if self.away or self.round > question.round or question.wants_chain:
            return True
        known = self._rounds.get(question.round)
        if known is None:
            return False
        lacks_roster = known.best is not None and known.best.name != question.has_roster
        return lacks_roster or not question.has_publication or (known.shared != "" and not question.has_share)

    def _answer(self, call: int, question: Question) -> ev.Answer[Envelope]:
        known = self._rounds.get(question.round)
        best = None if known is None else known.best
        return ev.Answer(
            call=call,
            question=question,
            round=self.round,
            participating=not (self.guest or self.away),
            away=self.away,
            last=self.last,
            publication=None if known is None or question.has_publication else known.own,
            roster=None if best is None or best.name == question.has_roster else best,
            share="" if known is None or question.has_share else known.shared,
        )

    def _tell(self) -> list[Command[Envelope]]:
        """Answer all who wait for what is news now."""
        due = [call for call, (question, _) in self._held.items() if self._is_news(question)]
        return [self._answer(call, self._held.pop(call)[0]) for call in due]

    # ------------------------------------------------------------- moving on

    def _advanced(self, event: ev.Advanced[Envelope]) -> list[Command[Envelope]]:
        if event.last is not None:
            self.last = event.last
        self.wanted = self.wanted and event.round == self.round
        self.round = event.round
        self._rounds = {r: known for r, known in self._rounds.items() if r > event.round - _KEEP_ROUNDS}
        return self._tell()

    def _ended(self, event: ev.Ended, now: float) -> list[Command[Envelope]]:
        known: _Round[Envelope, Link] = _Round(event.round, event.started_s, now, event.publication)
        known.announced[self.me] = event.publication
        known.held.add(event.publication.snapshot)
        self._rounds[event.round] = self._ending = known
        self._look_s = now
        return self._tell()

    def _over(self, known: _Round[Envelope, Link], now: float) -> list[Command[Envelope]]:
        """The round is over: the others are judged by it, and nothing is asked about it any more."""
        view = self._view(known)
        commands = [*self._unproved(known), *self._hang_up(known, view, list(known.asking), now)]
        self.signers.round_over(known.round, idled(view, now), {roster.signer for roster in view.rosters})
        if known.merging and not known.is_merged:
            commands.append(ev.GiveUpMerge())
        known.announced = {self.me: known.own}
        self._ending, self._look_s, self.waiting_for = None, math.inf, ""
        if known.catching_up is not None:
            commands += self._drop(known.catching_up)
            known.catching_up = None
        return commands

    def _given_up(self, search: int | None, now: float) -> list[Command[Envelope]]:
        if search is None:
            return [] if self._ending is None else self._over(self._ending, now)
        askers = [*(asked.of for asked in self._open.values()), *self._fetching.values()]
        return next(
            (self._drop(of) for of in askers if not isinstance(of, _Round | CatchUpSources) and of.search == search), []
        )

    def _drop(self, of: _Asker[Envelope, Link]) -> list[Command[Envelope]]:
        """Nothing is asked or fetched for it any more."""
        asked = [(number, one.peer) for number, one in self._open.items() if one.of is of]
        fetched = [(number, one.source) for number, one in self._fetching.items() if one is of]
        commands: list[Command[Envelope]] = []
        for number, peer in asked:
            del self._open[number]
            commands.append(ev.HangUp(number, peer))
        for number, source in fetched:
            del self._fetching[number]
            commands.append(ev.HangUp(number, "" if source is None else source.peer))
        return commands

    def _unproved(self, known: _Round[Envelope, Link]) -> list[Command[Envelope]]:
        """Those who claim more tokens than there are here, and neither show their chain nor move anybody."""
        commands: list[Command[Envelope]] = []
        view, shown = self._chain_view(known), self.chains.shown
        for peer, digest in view.stands.items():
            head, chain = view.heads.get(digest), shown.get(digest)
            if head is None or chain is None or len(chain.links) > 1 or view.holds(head):
                continue
            if head.total_tokens > self._tokens:
                detail = f"a roster with {head.base_tokens} tokens behind it, of which it shows nothing"
                commands.append(ev.Name(peer, detail))
        return commands

    # ------------------------------------------------------------- deciding

    def _look(self, known: _Round[Envelope, Link], now: float) -> list[Command[Envelope]]:
        """Decide, and do it."""
        self._look_s = now + self.rules.look_s
        self._try_again(known)
        view = self._view(known)
        commands = self._keep_asking(known, view, now)
        if known.catching_up is not None:
            return commands
        decision: Decision = decide(view, now)
        if isinstance(decision, rosters.Sign) and (until_s := self._chains_due_s(known, now)) > now:
            until_s = min(until_s, now + self.rules.retry_s)
            decision = Wait(until_s=until_s, reason="others are asked how they came to where they are")
        self.waiting_for = decision.reason
        self.waiting_until_s = decision.until_s if isinstance(decision, Wait) else 0.0
        merging = decision.roster.digest if isinstance(decision, Apply) else ""
        if known.merging and known.merging != merging:
            known.merging, known.is_merged = "", False
            commands.append(ev.GiveUpMerge())
        match decision:
            case Wait():
                self._look_s = min(self._look_s, max(decision.until_s, now + _LEAST_LOOK_S))
            case rosters.Sign():
                commands.append(ev.Sign(self._roster(known, decision), decision.reason))
            case Apply():
                roster = next(one for one in known.rosters.values() if one.roster is decision.roster)
                if known.is_merged:
                    return [*commands, *self._over(known, now), ev.Finish(roster)]
                if not known.merging:
                    known.merging = merging
                    commands.append(ev.Merge(roster))
            case CatchUp():
                sources = list(decision.sources)
                self._rng.shuffle(sources)
                left = deque(sources[:_SOURCES])
                known.catching_up = CatchUpSources(self.hearsay, known.round, decision.reason, left, known.unobtainable)
                commands += self._fetch_next(known.catching_up, now)
        return commands

    def _try_again(self, known: _Round[Envelope, Link]) -> None:
        """Who could not be pulled from, and has merged this round by now, may just have stood still: what is on its
        roster holds, so that it gets another chance, once."""
        for peer in list(known.unobtainable):
            last = self.hearsay.last_of(peer)
            if last is None or (last.round, last.base) != (known.round, self.base):
                continue
            if (peer, last.digest) not in known.tried_again:
                known.tried_again.add((peer, last.digest))
                known.unobtainable.discard(peer)

    def _roster(self, known: _Round[Envelope, Link], decision: rosters.Sign) -> Roster:
        return Roster(
            round=known.round,
            signer=self.me,
            entries=decision.entries,
            attempt=decision.attempt,
            base=self.base,
            base_tokens=self._tokens,
        )

    def _view(self, known: _Round[Envelope, Link]) -> RoundView:
        heard_at_s = self.membership.heard_at_s()
        distrusted = known.distrusted.intersection(heard_at_s)
        told = {peer: self.hearsay.told.get(peer) for peer in heard_at_s if peer not in distrusted}
        found = standings(
            None if self.last is None else self.last.roster,
            known.round,
            told,
            since_s=known.started_s,
            undeliverable=known.undeliverable,
            holds=self._chain_view(known, told).holds,
        )
        return RoundView(
            me=self.me,
            round=known.round,
            ended_at_s=known.ended_s,
            deadline_s=max(known.ended_s, known.started_s + self.rules.round_limit_s),
            silence_s=self.rules.silence_s,
            share_above=self.rules.share_above,
            live=found.of[Standing.WITH_US] | found.of[Standing.BEHIND],
            behind=found.of[Standing.BEHIND],
            base=self.base,
            guest=self.guest,
            guests=found.of[Standing.GUEST] | distrusted,
            ahead=found.of[Standing.AHEAD],
            applied=found.applied,
            far_ahead=found.of[Standing.FAR_AHEAD],
            announced=known.announced,
            held=frozenset(peer for peer, offer in known.announced.items() if offer.snapshot in known.held),
            rosters=[one.roster for one in known.rosters.values() if one.roster.digest not in known.impossible],
            heard_at_s=heard_at_s,
            asked_at_s=known.asked_at_s,
            answered_at_s=known.answered_at_s,
            listening_since_s=self.listening_since_s,
            unobtainable=frozenset(known.unobtainable),
            idle=self.signers.idle(known.round),
        )

    def _chain_view(
        self, known: _Round[Envelope, Link], told: Mapping[str, tuple[float, Told] | None] | None = None
    ) -> ChainView:
        """Which chain holds, for a peer in the midst of this round; by what these told, or all who train."""
        if told is None:
            told = {peer: self.hearsay.told.get(peer) for peer in self.membership.heard_at_s()}
        is_away = self.listening_since_s > known.started_s
        chain, shown = self.chains.chain, self.chains.shown
        return chain_view(chain, shown, told, since_s=known.started_s, me=self.me, is_away=is_away)

    def _chains_due_s(self, known: _Round[Envelope, Link], now: float) -> float:
        """Until when somebody has yet to show its chain, for which it has as long as it may be silent, and all together
        a few times as long: who comes after the other with one that nobody knows must not hold a round up for ever."""
        lacking = [peer for peer in self.membership.heard_at_s() if self.chains.lacks(self.hearsay.last_of(peer))]
        until_s = [known.lacking_s.setdefault(peer, now) + self.rules.silence_s for peer in lacking]
        most_s = min(known.lacking_s.values(), default=now) + _CHAIN_SILENCES * self.rules.silence_s
        return min(max(until_s, default=now), most_s)

    def _keep(self, known: _Round[Envelope, Link], one: SignedRoster[Envelope]) -> bool:
        """Remember a roster that starts from our weights, of one signer the latest few and of all signers those
        that hold against the rest; whether it is new."""
        roster = one.roster
        if one.name in known.rosters or roster.base != self.base:
            return False
        same_signer = [name for name, kept in known.rosters.items() if kept.roster.signer == roster.signer]
        if len(same_signer) >= _MAX_ATTEMPTS:
            oldest = min(same_signer, key=lambda name: known.rosters[name].roster.attempt)
            if roster.attempt <= known.rosters[oldest].roster.attempt:
                return False
            del known.rosters[oldest]
        known.rosters[one.name] = one
        others = [kept.roster for kept in known.rosters.values() if kept.roster.signer != self.me]
        if len(others) > _MAX_ROSTERS:
            worst = worst_roster(others)
            known.rosters = {name: kept for name, kept in known.rosters.items() if kept.roster is not worst}
            if worst is roster:
                return False
        best = better_roster([kept.roster for kept in known.rosters.values()])
        known.best = next(kept for kept in known.rosters.values() if kept.roster is best)
        known.unobtainable.difference_update(roster.peers)
        return True

    def _signed(self, one: SignedRoster[Envelope], now: float) -> list[Command[Envelope]]:
        known = self._ending
        if known is None or one.roster.round != known.round or not self._keep(known, one):
            return []
        self._look_s = now
        return self._tell()

    # ------------------------------------------------------------- asking

    def _keep_asking(self, known: _Round[Envelope, Link], view: RoundView, now: float) -> list[Command[Envelope]]:
        """One question to a peer, one pull of a publication; those no longer needed are given up."""
        wanted = dict.fromkeys(peers_to_ask(view, now))
        commands = self._hang_up(known, view, [peer for peer in known.asking if peer not in wanted], now)
        for peer in wanted:
            if peer in known.asking:
                continue
            if (again_s := known.ask_again_s.get(peer, now)) > now:
                self._look_s = min(self._look_s, again_s)
                continue
            known.asked_at_s.setdefault(peer, now)
            ask = self._ask(peer, self._question(known, peer, now), known, now)
            known.asking[peer] = ask.number
            commands.append(ask)
        if not pulls_whole(view):
            return commands
        for peer, offer in known.announced.items():
            is_here = offer.snapshot in known.held or offer.snapshot in known.brought
            if offer.base == view.base and not is_here and peer not in known.unobtainable:
                known.brought.add(offer.snapshot)
                others = (info.peer for info in self.membership.volunteers() if info.peer != peer)
                commands.append(ev.Bring(offer, (peer, *others)))
        return commands

    def _question(self, known: _Round[Envelope, Link], peer: str, now: float) -> Question:
        """About the round. The first answer is not held, nor is the first since this process stood still."""
        wants_chain = self.hearsay.wants_chain(peer, now)
        answered_s = known.answered_at_s.get(peer)
        is_deaf = answered_s is None or answered_s < self.listening_since_s
        return Question(
            round=known.round,
            hold_s=0.0 if is_deaf or wants_chain else self.rules.hold_s,
            has_publication=peer in known.announced,
            has_roster=known.told_of.get(peer, ""),
            wants_chain=wants_chain,
        )

    def _ask(self, peer: str, question: Question, of: _Asker[Envelope, Link], now: float) -> ev.Ask:
        number = next(self._numbers)
        self._open[number] = _Open(peer, now, question, of)
        return ev.Ask(number, peer, question)

    def _hang_up(
        self, known: _Round[Envelope, Link], view: RoundView, peers: Iterable[str], now: float
    ) -> list[Command[Envelope]]:
        """Questions that are given up now: one that was never answered has failed."""
        commands: list[Command[Envelope]] = []
        for peer in sorted(peers):
            number = known.asking.pop(peer)
            del self._open[number]
            commands.append(ev.HangUp(number, peer, is_silent(view, peer, now)))
        return commands

    def _answered(self, number: int, reply: Reply[Envelope, Link], now: float) -> list[Command[Envelope]]:
        asked = self._open.get(number)
        if asked is None:
            return []
        of, roster = asked.of, reply.roster
        found = self.hearsay.flaw_in(reply, asked.question.wants_chain)
        if not found and roster is not None and roster.roster.round != asked.question.round:
            found = "a roster of another round"
        if found:
            return [ev.Name(asked.peer, found), *self._got_nothing(number, now, is_malformed=True)]
        del self._open[number]
        change = self.hearsay.hear(asked.peer, reply, asked.question.wants_chain, now)
        commands: list[Command[Envelope]] = [] if change is None else [ev.Report(change)]
        match of:
            case _Round():
                commands += self._read(of, asked, reply, now)
            case _Survey():
                of.told[asked.peer] = reply.told
                commands += self._surveyed(of, number)
            case _:
                commands += self._chain_came(of, now)
        return commands

    def _read(
        self,
        known: _Round[Envelope, Link],
        asked: _Open[Envelope, Link],
        reply: Reply[Envelope, Link],
        now: float,
    ) -> list[Command[Envelope]]:
        """What an answer says of the round."""
        commands: list[Command[Envelope]] = []
        peer, offer, best, is_new = asked.peer, reply.publication, known.best, False
        if reply.last is not None:  # whoever has applied one hands it out, whatever others of the round it knows
            is_new = reply.last.roster.round == known.round and self._keep(known, reply.last)
        if offer is not None and peer not in known.announced and offer.base == self.base:
            known.announced[peer], is_new = offer, True
        if reply.roster is not None:
            known.told_of[peer] = reply.roster.name
            if found := self.chains.wrong_with(reply.roster.roster):
                commands.append(ev.Name(reply.roster.roster.signer, found))  # who hands it on may not know the base
            else:
                is_new = self._keep(known, reply.roster) or is_new
        del known.asking[peer]
        known.answered_at_s[peer] = asked.asked_s
        at_once = asked.question.hold_s > 0 and now - asked.asked_s < self.rules.retry_s
        known.ask_again_s[peer] = now + self.rules.retry_s if at_once and not is_new else now  # it may do so for long
        self._look_s = now
        return [*commands, *self._tell()] if known.best is not best else commands

    def _got_nothing(self, number: int, now: float, *, is_malformed: bool) -> list[Command[Envelope]]:
        asked = self._open.pop(number, None)
        if asked is None:
            return []
        of = asked.of
        match of:
            case _Round():
                del of.asking[asked.peer]
                if is_malformed:
                    of.distrusted.add(asked.peer)
                of.ask_again_s[asked.peer] = now + (self.rules.hold_s if is_malformed else self.rules.retry_s)
                self._look_s = now
                return []
            case _Survey():
                return self._surveyed(of, number)
            case _:
                return self._chain_came(of, now, came=False)

    # ------------------------------------------------------------- bytes

    def _was_brought(self, event: ev.Brought | ev.NotBrought, now: float) -> list[Command[Envelope]]:
        known = self._ending
        if known is None:
            return []
        if isinstance(event, ev.Brought):
            known.held.add(event.snapshot)
        else:
            known.unobtainable.update(p for p, offer in known.announced.items() if offer.snapshot == event.snapshot)
        self._look_s = now
        return []

    def _merge_went_on(self, event: ev.Found | ev.Merged | ev.NotMerged, now: float) -> list[Command[Envelope]]:
        known = self._ending
        if known is None:
            return []
        if isinstance(event, ev.Found):
            if event.publication.peer != self.me:
                known.announced[event.publication.peer] = event.publication
            return []
        if known.merging != event.roster:
            return []
        if isinstance(event, ev.Merged):
            known.is_merged = True
        else:
            known.merging = ""
            if self.me in event.lacking:
                known.impossible.add(event.roster)
            known.unobtainable.update(event.lacking - {self.me})
        self._look_s = now
        return []

    # ------------------------------------------------------------- states

    def _survey(self, event: ev.Survey, now: float) -> list[Command[Envelope]]:
        survey = _Survey(event.search, set())
        asks = [self._ask(peer, Question(self.round), survey, now) for peer in event.peers]
        survey.open.update(ask.number for ask in asks)
        return [*asks] if asks else [ev.Surveyed(event.search, {})]

    def _surveyed(self, survey: _Survey, number: int) -> list[Command[Envelope]]:
        survey.open.discard(number)
        return [] if survey.open else [ev.Surveyed(survey.search, survey.told)]

    def _seek(self, event: ev.Seek, now: float) -> list[Command[Envelope]]:
        search = Search(
            self.hearsay, event.search, self._stands_for, event.told, event.above_tokens, event.fetches, self._rng
        )
        return self._seek_on(search, now)

    def _seek_on(self, search: Search[Envelope, Link], now: float) -> list[Command[Envelope]]:
        if (peer := search.whose_chain()) is not None:
            return [self._ask(peer, Question(self.round, wants_chain=True), search, now)]
        is_ours = not search.choose()
        if is_ours or not search.fetches:
            return [ev.Sought(search.search, is_ours, None)]
        return self._fetch_next(search, now)

    def _fetch_next(self, of: _Fetching[Envelope, Link], now: float) -> list[Command[Envelope]]:
        """Have the next of them offer its state."""
        of.source = None
        if (found := of.next()) is None:
            if isinstance(of, Search):
                return [ev.Sought(of.search, False, None)]
            assert self._ending is not None
            self._ending.catching_up, self._look_s = None, now
            return []
        of.source = Source(next(self._numbers), found[0])
        self._fetching[of.source.number] = of
        return [ev.Fetch(of.source.number, *found)]

    def _fetch_went_on(
        self, event: ev.Offered[Envelope] | ev.NotFetched | ev.Taken, now: float
    ) -> list[Command[Envelope]]:
        of = self._fetching.get(event.number)
        if of is None or of.source is None:
            return []
        match event:
            case ev.NotFetched():
                return self._fetch_failed(of, now)
            case ev.Taken():
                del self._fetching[event.number]
                if isinstance(of, Search):
                    return [ev.Sought(of.search, False, event.number)]
                assert self._ending is not None
                return [*self._over(self._ending, now), ev.Adopt(event.number, of.reason)]
        source, roster = of.source, event.roster.roster
        if found := self.chains.wrong_with(roster):
            return [ev.Name(source.peer, found), *self._fetch_failed(of, now)]
        source.roster = roster
        if of.needs_chain(roster):
            return [self._ask(source.peer, Question(self.round, wants_chain=True), of, now)]
        return self._judge(of, now)

    def _chain_came(self, of: _Fetching[Envelope, Link], now: float, *, came: bool = True) -> list[Command[Envelope]]:
        """Somebody has shown its chain, or has not: one of those that are judged together, or that whose state is
        offered."""
        if of.source is None:
            assert isinstance(of, Search)
            return self._seek_on(of, now)
        return self._judge(of, now) if came else self._fetch_failed(of, now)

    def _judge(self, of: _Fetching[Envelope, Link], now: float) -> list[Command[Envelope]]:
        """Whether to take the state that is offered."""
        source = of.source
        assert source is not None and source.roster is not None
        if isinstance(of, Search):
            may = of.may_take(source.peer, source.roster)
        else:
            assert self._ending is not None
            may = of.may_take(source.peer, source.roster, self._chain_view(self._ending))
        return [ev.Take(source.number)] if may else self._fetch_failed(of, now)

    def _fetch_failed(self, of: _Fetching[Envelope, Link], now: float) -> list[Command[Envelope]]:
        assert of.source is not None
        del self._fetching[of.source.number]
        if not isinstance(of, Search):
            assert self._ending is not None
            self._ending.undeliverable.add(of.source.peer)
        return self._fetch_next(of, now)

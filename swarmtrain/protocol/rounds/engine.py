"""Synchronous rounds: what one peer does in them, as an engine that takes events and returns commands.

A peer that has done its inner steps asks the others about the round. The question is answered at once if there is news,
and otherwise held for up to two seconds (decision 3). The answer tells how far the other peer is and what it applied
last, and contains its publication's manifest, the roster, and whether it has averaged its share. `rosters.decide` then
says what to do: sign, merge, take another peer's state, or wait.

`RoundEngine` holds all state of this: who was asked and has answered, what was ordered, downloaded, signed and merged,
who does not deliver, which answers are owed, and when to check again. Its caller moves bytes and has no rules of its
own: `network/rounds/runner.py` between real peers, `simulate/systems/volunteer.py` in virtual time. Other parts of a
peer update the membership and the chains too; the engine reads them.

Everything here is pure. Rosters in their signed form are handles that pass through.
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeAlias

from swarmtrain.protocol.membership.membership import MAX_PEERS, Membership, PeerState
from swarmtrain.protocol.rounds import messages as ev
from swarmtrain.protocol.rounds import rosters
from swarmtrain.protocol.rounds.batch_end import plausible_entries
from swarmtrain.protocol.rounds.chains import Chains, Flaw, Link
from swarmtrain.protocol.rounds.link_claims import AveragingTimes, LinkClaims
from swarmtrain.protocol.rounds.messages import Command, Envelope, Event, PeerReply, RoundQuestion, SignedRoster
from swarmtrain.protocol.rounds.rosters import (
    ApplyDecision,
    CatchUpDecision,
    Decision,
    Roster,
    RoundPublication,
    RoundView,
    Standing,
    WaitDecision,
    decide,
    idled,
    is_silent,
    peers_to_ask,
    pulls_whole,
    standings,
)
from swarmtrain.protocol.rounds.share_waits import merge_limit_s
from swarmtrain.protocol.rounds.signers import Signers
from swarmtrain.protocol.rounds.state import KnownRound
from swarmtrain.protocol.rounds.state_search import CatchingUp, Hearsay, Open, PeerSurvey, Questions, StateSearches
from swarmtrain.run_batch import BatchTarget

_LEAST_LOOK_S = 0.005
"""Seconds between two checks, at least."""
_KEEP_ROUNDS = 3
"""Rounds about which other peers are still answered."""
_SOURCES = 4
"""Peers ahead that are asked for their state, at random, before the situation is judged anew."""


@dataclass(frozen=True, kw_only=True)
class RoundRules:
    """Settings of the run file, and how often other peers are asked. Durations in seconds."""

    share_above: int
    round_limit_s: float
    silence_s: float
    max_wait_s: float = math.inf
    """Longest time for which a peer that has ended its round waits for the others' publications."""
    num_chunks: int = 0
    """Chunks of the mean that shares are made of; 0: all shares are equal, whatever the links."""
    body_bytes: int = 0
    """Bytes of the mean."""
    target: BatchTarget | None = None
    """Size of the batches that all make together; None: a round has no such number."""
    hold_s: float = 2.0
    """Longest time for which a question without news is held."""
    retry_s: float = 0.25
    """Pause before a peer is asked again that failed, or answered at once without anything new."""
    look_s: float = 0.5
    """Longest time between two checks while this peer waits."""

    @property
    def gap_s(self) -> float:
        """Delay after which a late timer shows that the process was suspended."""
        return max(1.0, self.silence_s / 4)


_Commands: TypeAlias = list[Command[Envelope]]
_Progress: TypeAlias = (
    ev.PublicationFetched | ev.PublicationNotFetched | ev.PublicationFound | ev.RosterMerged | ev.RosterNotMerged
)


class RoundEngine(Generic[Envelope, Link]):
    """State and decisions of one peer in all rounds. Times are seconds of one clock that the caller passes as `now`."""

    def __init__(
        self,
        membership: Membership,
        chains: Chains[Link],
        rules: RoundRules,
        rng: random.Random,
        *,
        trains: bool = True,
    ) -> None:
        """`trains` is False for an archive, whose weights count for no chain."""
        self.me, self.membership, self.chains, self.rules = membership.me, membership, chains, rules
        self.round = 0
        self.last: SignedRoster[Envelope] | None = None
        self.is_late_joiner = True
        """True if nobody waits for this peer's round: before and in its first one, after catching up, and in one
        that it began late."""
        self.away = False
        """True if this peer has said goodbye. A peer that missed the goodbye and asks about a round learns it from the
        answer."""
        self.wanted_by: dict[str, float] = {}
        """When each volunteer first asked so. A caller that is none is not among them."""
        self.is_overtaken = False
        """True if answers of others, while this peer trains, show that they have gone on with weights that hold."""
        self.wanted = False
        """True if another peer has ended this peer's present round and asked for its publication."""
        self.waiting_for, self.waiting_until_s = "", 0.0
        """Reason why this peer waits, "" if it does not; and the time until which it waits at most, 0 without a
        limit."""
        self.signers = Signers()
        self.claims = LinkClaims(membership)
        self.hearsay: Hearsay[Envelope, Link] = Hearsay(membership, chains)
        self._rng = rng
        self._questions: Questions[Envelope, Link] = Questions()
        self._seeker = StateSearches(self.hearsay, self._questions, self.me if trains else "", rng)
        self._rounds: dict[int, KnownRound[Envelope, Link]] = {}
        self._began_s = -math.inf
        """Time at which the present round began."""
        self._ending: KnownRound[Envelope, Link] | None = None
        """Round whose end is being agreed on."""
        self._in_vain: set[str] = set()
        """Peers that were there again, and did not deliver what they had published."""
        self._look_s = math.inf
        self._held: dict[int, tuple[RoundQuestion, float]] = {}
        """Questions of other peers whose answers are held back, by call, each with the time until which it is held."""
        self._held_until_s = math.inf
        """Lower bound of the times in `_held`."""

    # ------------------------------------------------------------- events

    def receive(self, event: Event[Envelope, Link], now: float) -> _Commands[Envelope]:
        """Return the commands that follow from an event at time `now`."""
        match event:
            case ev.RoundTimerFired():
                return self._woke(now)
            case ev.QuestionAnswered():
                return self._answered(event.number, event.reply, now)
            case ev.QuestionReceived():
                return self._asked(event, now)
            case ev.ReplyRefused():
                return self._got_nothing(event.number, now, is_malformed=True)
            case ev.QuestionFailed():
                return self._got_nothing(event.number, now, is_malformed=False)
            case ev.RosterSigned():
                return self._signed(event.roster, now)
            case (
                ev.PublicationFetched()
                | ev.PublicationNotFetched()
                | ev.PublicationFound()
                | ev.RosterMerged()
                | ev.RosterNotMerged()
            ) if self._ending is not None:
                self._went_on(self._ending, event)
                self._look_s = now
            case ev.RoundBegun():
                self.is_late_joiner = event.is_late_joiner
                self._began_s, self.is_overtaken = now, False
            case ev.Left():
                self.away = self.is_late_joiner = True
                self._seeker.join_anew()
                return self._tell()
            case ev.CameBack():
                self.away = False
            case ev.InnerStepsDone():
                return self._ended(event, now)
            case ev.RoundAdvanced():
                return self._advanced(event)
            case ev.RoundAbandoned():
                if event.search is not None:
                    return self._seeker.drop(event.search)
                return [] if self._ending is None else self._over(self._ending, now)
            case ev.MembersChanged():
                self._look_s = now
            case ev.ProcessSuspended():
                self.hearsay.listening_since_s = self._look_s = now
                self.membership.resume(now, forgives=event.forgives)
            case ev.QuestionDropped():
                self._held.pop(event.call, None)
            case ev.ShareAveraged() if self._ending is not None and self._ending.merging == event.roster:
                self._ending.shared, self._ending.pieces = event.roster, event.pieces
                return self._tell()
            case ev.ShareJudged():
                self.claims.judged(event.owner, in_time=event.in_time)
            case ev.LinkMeasured():
                self.claims.own = event.rates
            case ev.SurveyPeers():
                return self._seeker.survey(event, self.round, now)
            case ev.SearchState():
                return self._seeker.seek(event, self.round, now)
            case ev.Join():
                return self._seeker.join(event, self.round, now)
            case ev.StateAdopted():
                self.is_late_joiner = True
                return self._seeker.survey(ev.SurveyPeers(event.search, (event.source,)), self.round, now)
            case ev.StateOffered() | ev.StateNotFetched() | ev.StateDownloaded():
                return self._caught_up(self._seeker.fetch_went_on(event, now), now)
        return []

    def wake_at(self) -> float | None:
        """Return the time at which to send `RoundTimerFired`; None: not before another event."""
        wake_s = math.inf if self._ending is None else self._look_s
        if self._held:
            wake_s = min(wake_s, self._held_until_s)
        return wake_s if wake_s < math.inf else None

    def knows(self, round: int) -> bool:
        """Return whether other peers are still answered about that round."""
        return round in self._rounds

    def is_announced(self, offer: RoundPublication) -> bool:
        """Return whether `offer` is a publication that the present round may merge."""
        return self._ending is not None and self._ending.announced.get(offer.peer) == offer

    @property
    def listening_since_s(self) -> float:
        """Time since which this process has run without a gap."""
        return self.hearsay.listening_since_s

    @property
    def base(self) -> str:
        """Digest of the roster applied last."""
        return "" if self.last is None else self.last.roster.digest

    @property
    def _tokens(self) -> int:
        """Tokens of the run that this peer's weights contain."""
        return 0 if self.last is None else self.last.roster.total_tokens

    def _woke(self, now: float) -> _Commands[Envelope]:
        commands: _Commands[Envelope] = []
        if self._held_until_s <= now:
            due = [call for call, (_, until_s) in self._held.items() if until_s <= now]
            commands += [self._answer(call, self._held.pop(call)[0]) for call in due]
            self._held_until_s = min((until_s for _, until_s in self._held.values()), default=math.inf)
        if self._ending is not None and self._look_s <= now:
            commands += self._look(self._ending, now)
        return commands

    # ------------------------------------------------------------- answering

    def _asked(self, event: ev.QuestionReceived, now: float) -> _Commands[Envelope]:
        question, commands = event.question, list[Command[Envelope]]()
        if (change := self.membership.was_called_by(event.asker, now)) is not None:
            self._look_s = now
            commands.append(ev.ReportChange(change))
        if question.round == self.round and not question.has_publication:
            self.wanted = True
            info = self.membership.info(event.asker)
            if info is not None and info.training:
                self.wanted_by.setdefault(event.asker, now)
        if question.hold_s <= 0 or self._is_news(question):
            return [*commands, self._answer(event.call, question)]
        until_s = now + min(question.hold_s, self.rules.hold_s)
        self._held[event.call] = question, until_s
        self._held_until_s = min(self._held_until_s, until_s)
        return commands

    def _is_news(self, question: RoundQuestion) -> bool:
        if self.away or self.round > question.round or question.wants_chain:
            return True
        known = self._rounds.get(question.round)
        if known is None:
            return False
        lacks_roster = known.best is not None and known.best.name != question.has_roster
        return lacks_roster or not question.has_publication or known.has_piece_for(question)

    def _answer(self, call: int, question: RoundQuestion) -> ev.AnswerRoundQuestion[Envelope]:
        """Answer a call with what the asker lacks."""
        known = self._rounds.get(question.round)
        best = None if known is None else known.best
        return ev.AnswerRoundQuestion(
            call=call,
            question=question,
            round=self.round,
            participating=not (self.is_late_joiner or self.away),
            away=self.away,
            last=self.last,
            publication=None if known is None or question.has_publication else known.own,
            roster=None if best is None or best.name == question.has_roster else best,
            share="" if known is None or not known.has_piece_for(question) else known.shared,
        )

    def _tell(self) -> _Commands[Envelope]:
        """Answer all held questions for which there is news now."""
        due = [call for call, (question, _) in self._held.items() if self._is_news(question)]
        return [self._answer(call, self._held.pop(call)[0]) for call in due]

    # ------------------------------------------------------------- moving on

    def _advanced(self, event: ev.RoundAdvanced[Envelope]) -> _Commands[Envelope]:
        if event.last is not None:
            ended = self._rounds.get(event.last.roster.round)
            if ended is not None and ended.is_merged and ended.merging == event.last.roster.digest:
                self.is_late_joiner = self.away  # on time again: others wait until its next round begins, and in it
            self.last = event.last
        if event.round != self.round:
            self.wanted, self.wanted_by, self.is_overtaken = False, {}, False
        self.round = event.round
        self._rounds = {r: known for r, known in self._rounds.items() if r > event.round - _KEEP_ROUNDS}
        return self._tell()

    def _ended(self, event: ev.InnerStepsDone, now: float) -> _Commands[Envelope]:
        known: KnownRound[Envelope, Link] = KnownRound(event.round, event.started_s, now, event.publication)
        known.in_vain = frozenset(self._in_vain)
        known.announced[self.me] = event.publication
        known.held.add(event.publication.snapshot)
        self._rounds[event.round] = self._ending = known
        self._look_s = now
        return self._tell()

    def _over(self, known: KnownRound[Envelope, Link], now: float) -> _Commands[Envelope]:
        """End the round: stop all questions about it, and record who did not sign."""
        view = self._view(known)
        commands = self._hang_up(known, view, list(known.asking), now)
        if len(self._in_vain) > MAX_PEERS:  # identities cost nothing
            self._in_vain.clear()
        self._in_vain |= {peer for peer, roster in known.tried_again if not roster and peer in known.unobtainable}
        self.claims.round_over(known.round)
        self.signers.round_over(known.round, known.idled | idled(view, now), {roster.signer for roster in view.rosters})
        if known.merging and not known.is_merged:
            commands.append(ev.CancelMerge())
        known.announced = {self.me: known.own}
        self._ending, self._look_s, self.waiting_for = None, math.inf, ""
        if known.state_fetch is not None:
            commands += self._seeker.drop(StateSearches.CATCH_UP)
            known.state_fetch = None
        return commands

    # ------------------------------------------------------------- deciding

    def _look(self, known: KnownRound[Envelope, Link], now: float) -> _Commands[Envelope]:
        """Ask the questions that are due, decide about the round, and return the commands of the decision."""
        self._look_s = now + self.rules.look_s
        if known.unobtainable:
            known.try_again(self.hearsay, self.membership.heard_at_s(), now)
        view = self._view(known)
        commands = self._keep_asking(known, view, now)
        if known.state_fetch is not None:
            return commands
        known.idled |= idled(view, now)
        decision: Decision = decide(view, now)
        # Before this peer signs, every peer with an unknown roster may show its chain: that chain may hold, and a
        # roster signed on the losing one is work that is given up.
        if isinstance(decision, rosters.SignDecision):
            lacking = [peer for peer in view.heard_at_s if self.chains.lacks(self.hearsay.last_of(peer))]
            if (until_s := known.chains_due_s(lacking, self.rules.silence_s, now)) > now:
                until_s = min(until_s, now + self.rules.retry_s)
                decision = WaitDecision(until_s=until_s, reason="asking others for the rosters behind their weights")
            elif (until_s := known.authors_due_s(view.heard_at_s, self.rules.silence_s, now)) > now:
                until_s = min(until_s, now + self.rules.retry_s)
                decision = WaitDecision(until_s=until_s, reason="asking those whose publications nobody delivered")
        self.waiting_for = decision.reason
        self.waiting_until_s = decision.until_s if isinstance(decision, WaitDecision) else 0.0
        merging = decision.roster.digest if isinstance(decision, ApplyDecision) else ""
        if known.merging and known.merging != merging:
            known.merging, known.is_merged = "", False
            commands.append(ev.CancelMerge())
        match decision:
            case WaitDecision():
                self._look_s = min(self._look_s, max(decision.until_s, now + _LEAST_LOOK_S))
            case rosters.SignDecision():
                decision = self._plausible(decision)
                roster = Roster(
                    round=known.round,
                    signer=self.me,
                    entries=decision.entries,
                    attempt=decision.attempt,
                    base=self.base,
                    base_tokens=self._tokens,
                    shares=self._shares(decision),
                )
                commands.append(ev.SignRoster(roster, decision.reason))
            case ApplyDecision():
                one = next(one for one in known.rosters.values() if one.roster is decision.roster)
                if known.is_merged:
                    return [*commands, *self._over(known, now), ev.FinishRound(one)]
                if not known.merging:
                    known.merging = merging
                    if len(one.roster.entries) > self.rules.share_above:
                        known.fetched.clear()  # such a merge ends the pulls of whole publications
                    roster, flaw = self.claims.bounded(one.roster)
                    if flaw:
                        commands.append(ev.NamePeer(roster.signer, flaw, "bad-size"))
                    commands.append(ev.MergeRoster(replace(one, roster=roster)))
            case CatchUpDecision():
                sources = list(decision.sources)
                self._rng.shuffle(sources)
                known.state_fetch = CatchingUp(
                    self.hearsay,
                    known.round,
                    known.started_s,
                    decision.reason,
                    deque(sources[:_SOURCES]),
                    known.unobtainable,
                    known.undeliverable,
                )
                commands += self._caught_up(self._seeker.catch_up(known.state_fetch), now)
        return commands

    def _plausible(self, decision: rosters.SignDecision) -> rosters.SignDecision:
        """Return the decision without entries that claim far too many tokens for the batch, if the round has one."""
        if self.rules.target is None:
            return decision
        entries, left_out = plausible_entries(decision.entries, self.rules.target.at(self._tokens), self.me)
        if not left_out:
            return decision
        claims = ", ".join(f"{entry.peer} ({entry.tokens} tokens)" for entry in left_out)
        reason = f"{decision.reason}; without {claims}, far more than the others have"
        return replace(decision, entries=entries, reason=reason)

    def _shares(self, decision: rosters.SignDecision) -> tuple[int, ...]:
        """Return who averages how much on the roster that this peer signs; empty for equal shares."""
        rules = self.rules
        if len(decision.entries) <= rules.share_above:
            return ()
        return self.claims.shares([entry.peer for entry in decision.entries], rules.num_chunks, rules.body_bytes)

    def averaging_times(self, roster: Roster) -> AveragingTimes | None:
        """Return how long averaging with a roster's shares takes, by the links that the peers tell; None: unknown."""
        rules = self.rules
        return self.claims.averaging_times(roster.peers, roster.shares, rules.body_bytes, rules.round_limit_s)

    def merge_limit_s(self, peers: Sequence[str], shares: Sequence[int] | None) -> float:
        """Return the seconds that the authors among `peers` have to deliver what this peer averages of them. For
        `shares` see `LinkClaims.merging_s`."""
        rules = self.rules
        expected_s = self.claims.merging_s(peers, shares, rules.body_bytes)
        return merge_limit_s(expected_s, rules.silence_s, rules.round_limit_s)

    def _went_on(self, known: KnownRound[Envelope, Link], event: _Progress) -> None:
        """Note what came of a download or a merge, and whose publications could not be had; those that are gone did not
        fail by their links."""
        before = set(known.unobtainable)
        if isinstance(event, ev.PublicationFetched | ev.PublicationNotFetched):
            known.was_fetched(event)
        else:
            known.merge_went_on(event)
        failed = known.unobtainable - before
        self.claims.not_delivered(peer for peer in failed if self.membership.state(peer) is PeerState.LIVE)

    def _caught_up(self, commands: _Commands[Envelope], now: float) -> _Commands[Envelope]:
        """Pass on the commands of a search. If catching up has ended, adopt the state, or decide anew if there
        is none."""
        known = self._ending
        if not commands or known is None or known.state_fetch is None:
            return commands
        match commands[-1]:
            case ev.StateSearched(search=StateSearches.CATCH_UP, number=None):
                known.state_fetch, self._look_s = None, now
                return commands[:-1]
            case ev.StateSearched(search=StateSearches.CATCH_UP, number=number) if number is not None:
                reason = known.state_fetch.reason
                return [*commands[:-1], *self._over(known, now), ev.AdoptState(number, reason)]
        return commands

    def _view(self, known: KnownRound[Envelope, Link]) -> RoundView:
        """Return the situation as input for `decide`."""
        heard_at_s = self.membership.heard_at_s()
        distrusted = known.distrusted.intersection(heard_at_s)
        advertised = self.hearsay.of_those_who_train(distrusted)
        found = standings(
            None if self.last is None else self.last.roster,
            known.round,
            advertised,
            since_s=known.started_s,
            undeliverable=known.undeliverable,
            holds=self.hearsay.in_round(advertised, known.started_s).holds,
        )
        return RoundView(
            me=self.me,
            round=known.round,
            ended_at_s=known.ended_s,
            deadline_s=self._deadline_s(known),
            silence_s=self.rules.silence_s,
            share_above=self.rules.share_above,
            live=found.of[Standing.WITH_US] | found.of[Standing.BEHIND],
            behind=found.of[Standing.BEHIND],
            base=self.base,
            is_late_joiner=self.is_late_joiner,
            late_joiners=found.of[Standing.LATE_JOINER] | distrusted,
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

    def _deadline_s(self, known: KnownRound[Envelope, Link]) -> float:
        """Return the time when the round is closed: at its limit, or where waits have a limit, so long after this
        peer's own end. The others' batches may end at the round's limit too, a moment later."""
        if self.rules.max_wait_s < math.inf:
            return known.ended_s + self.rules.max_wait_s
        return max(known.ended_s, known.started_s + self.rules.round_limit_s)

    def _signed(self, one: SignedRoster[Envelope], now: float) -> _Commands[Envelope]:
        if self._ending is None or not self._ending.keep(one):
            return []
        self._look_s = now
        return self._tell()

    # ------------------------------------------------------------- asking

    def _keep_asking(self, known: KnownRound[Envelope, Link], view: RoundView, now: float) -> _Commands[Envelope]:
        """Keep one open question to each peer that is to be asked, and one download of each publication; drop the
        others."""
        wanted = dict.fromkeys(peers_to_ask(view, now))
        commands = self._hang_up(known, view, [peer for peer in known.asking if peer not in wanted], now)
        for peer in wanted:
            if peer in known.asking:
                continue
            if (again_s := known.ask_again_s.get(peer, now)) > now:
                self._look_s = min(self._look_s, again_s)
                continue
            known.asked_at_s.setdefault(peer, now)
            ask = self._questions.ask(peer, self._question(known, peer, now), now)
            known.asking[peer] = ask.number
            commands.append(ask)
        # Those that have ended the round already are no longer in the group, but its roster is still merged in shares.
        best = None if known.best is None or not known.can_be_had(known.best.roster) else known.best.roster
        in_shares = best is not None and len(best.entries) > self.rules.share_above
        if in_shares or not pulls_whole(view):
            return commands
        for peer, offer in known.announced.items():
            is_here = offer.snapshot in known.held or offer.snapshot in known.fetched
            if offer.base == view.base and not is_here and peer not in known.unobtainable:
                known.fetched.add(offer.snapshot)
                others = (info.peer for info in self.membership.volunteers() if info.peer != peer)
                commands.append(ev.FetchPublication(offer, (peer, *others)))
        return commands

    def _question(self, known: KnownRound[Envelope, Link], peer: str, now: float) -> RoundQuestion:
        """Build the question about the round. Its first answer is not held, nor is the first after a suspension."""
        wants_chain = self.hearsay.wants_chain(peer, now)
        answered_s = known.answered_at_s.get(peer)
        is_deaf = answered_s is None or answered_s < self.listening_since_s
        return RoundQuestion(
            round=known.round,
            hold_s=0.0 if is_deaf or wants_chain else self.rules.hold_s,
            has_publication=peer in known.announced,
            has_roster=known.told_of.get(peer, ""),
            wants_chain=wants_chain,
        )

    def _hang_up(
        self, known: KnownRound[Envelope, Link], view: RoundView, peers: Iterable[str], now: float
    ) -> _Commands[Envelope]:
        """Drop the open questions to these peers; a question to a silent peer counts as a failed call."""
        commands: _Commands[Envelope] = []
        for peer in sorted(peers):
            number = known.asking.pop(peer)
            del self._questions.open[number]
            commands.append(ev.DropRoundQuestion(number, peer, is_silent(view, peer, now)))
        return commands

    def _answered(self, number: int, reply: PeerReply[Envelope, Link], now: float) -> _Commands[Envelope]:
        """Check and record an answer, and continue the round or search that its question belongs to."""
        asked = self._questions.open.get(number)
        if asked is None:
            return []
        wants_chain, roster = asked.question.wants_chain, reply.roster
        found = self.hearsay.flaw_in(reply, wants_chain)
        if not found and roster is not None and roster.roster.round != asked.question.round:
            found = Flaw("a roster of another round", "bad-round")
        if found:
            return [ev.NamePeer(asked.peer, *found), *self._got_nothing(number, now, is_malformed=True)]
        del self._questions.open[number]
        change = self.hearsay.receive(asked.peer, reply, wants_chain, now)
        commands: _Commands[Envelope] = [] if change is None else [ev.ReportChange(change)]
        if asked.of is not None:
            if isinstance(asked.of, PeerSurvey) and self._ending is None:
                self.is_overtaken = self._has_been_overtaken()
            went_on = self._seeker.answered(asked.of, number, (asked.peer, reply.advertised), self.round, now)
            return [*commands, *self._caught_up(went_on, now)]
        assert self._ending is not None
        return [*commands, *self._read(self._ending, asked, reply, now)]

    def _read(
        self,
        known: KnownRound[Envelope, Link],
        asked: Open[Envelope, Link],
        reply: PeerReply[Envelope, Link],
        now: float,
    ) -> _Commands[Envelope]:
        """Record what an answer says about the round."""
        commands: _Commands[Envelope] = []
        peer, offer, best, is_new = asked.peer, reply.publication, known.best, False
        if reply.last is not None:  # it has applied this one, whatever other rosters of the round it knows
            is_new = known.keep(reply.last)
        if offer is not None and peer not in known.announced and offer.base == self.base:
            known.announced[peer], is_new = offer, True
        if reply.roster is not None:
            known.told_of[peer] = reply.roster.name
            if found := self.chains.wrong_with(reply.roster.roster):
                # the signer, since a peer that passes it on may not know the base
                commands.append(ev.NamePeer(reply.roster.roster.signer, *found))
            else:
                is_new = known.keep(reply.roster) or is_new
        del known.asking[peer]
        known.answered_at_s[peer] = asked.asked_s
        at_once = asked.question.hold_s > 0 and now - asked.asked_s < self.rules.retry_s
        # otherwise a peer that answers at once would be asked without end
        known.ask_again_s[peer] = now + self.rules.retry_s if at_once and not is_new else now
        self._look_s = now
        return [*commands, *self._tell()] if known.best is not best else commands

    def _has_been_overtaken(self) -> bool:
        """Return whether others are beyond this peer's round, with weights that hold."""
        view = self.hearsay.in_round(self.hearsay.of_those_who_train(), self._began_s)
        return any(view.holds(head) for head in view.heads.values())

    def _got_nothing(self, number: int, now: float, *, is_malformed: bool) -> _Commands[Envelope]:
        """Continue after a question that got no valid answer; the peer is asked again later."""
        asked = self._questions.open.pop(number, None)
        if asked is None:
            return []
        if asked.of is not None:
            return self._caught_up(self._seeker.answered(asked.of, number, None, self.round, now), now)
        known = self._ending
        assert known is not None
        del known.asking[asked.peer]
        if is_malformed:
            known.distrusted.add(asked.peer)
        known.ask_again_s[asked.peer] = now + (self.rules.hold_s if is_malformed else self.rules.retry_s)
        self._look_s = now
        return []

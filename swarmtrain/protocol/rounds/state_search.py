"""What others told of themselves and of their chains, and the search for the state that holds among theirs.

A joiner, one that comes back, and an archive search alike: they ask some peers how far they are, have those show their
chains whose rosters they do not know, and take the state of the chain that holds, from whoever delivers it. Who missed
a round takes a state with the same steps. Pure; driven by `rounds.py`.
"""

from __future__ import annotations

import itertools
import math
import random
from collections import deque
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Generic, TypeAlias

from swarmtrain.protocol.membership.membership import Membership, MembershipChange
from swarmtrain.protocol.rounds import messages as ev
from swarmtrain.protocol.rounds.chains import Chain, Chains, ChainView, Link, chain_view, flaw
from swarmtrain.protocol.rounds.messages import Command, Envelope, PeerReply, RoundQuestion
from swarmtrain.protocol.rounds.rosters import AdvertisedRound, Roster

__all__ = ["CatchingUp", "Hearsay", "PeerSurvey", "Questions", "Search", "StateSearches"]

_CHAIN_TRIES = 2
_CHAIN_AGAIN_S = 1.0
"""A peer is asked for its chain so often at most: checking it takes a while."""
_MOST_STEPS = 2**31
_JOIN_TRIES = 3
"""So often who comes asks before it goes on with what it has."""


@dataclass
class Hearsay(Generic[Envelope, Link]):
    """What others told of themselves, and of how they came there."""

    membership: Membership
    chains: Chains[Link]
    told: dict[str, tuple[float, AdvertisedRound]] = field(default_factory=dict)
    listening_since_s: float = -math.inf
    """Since when this process has run without a gap."""
    _chain_asked_s: dict[str, float] = field(default_factory=dict)

    def last_of(self, peer: str) -> Roster | None:
        """The roster that it told it applied last."""
        one = self.told.get(peer)
        return None if one is None else one[1].last

    def forget(self, peer: str) -> None:
        """It has long been gone."""
        self.told.pop(peer, None)
        self._chain_asked_s.pop(peer, None)

    def flaw_in(self, reply: PeerReply[Envelope, Link], asked_for_chain: bool) -> str:
        """What is wrong with what a peer tells of itself, in words; "" if nothing."""
        told, last = reply.told, reply.told.last
        if told.round != (0 if last is None else last.round + 1):
            return "a peer in another round than its last roster leads to"
        if reply.last is not None and (found := self.chains.wrong_with(reply.last.roster)):
            return found
        shown = reply.shown
        if not asked_for_chain or shown is None or last is None or last.digest in self.chains.chain:
            return ""
        if shown.chain.digest != last.digest:
            return "a chain of rosters that does not lead to its last one"
        return flaw(shown.chain, self.chains.chain)

    def hear(
        self, peer: str, reply: PeerReply[Envelope, Link], asked_for_chain: bool, now: float
    ) -> MembershipChange | None:
        """Take in what a peer tells of itself, and shows of its chain. One that does not know the question shows
        nothing. Returns the change, if it says that it is away."""
        told = reply.told
        done = min(reply.inner_steps_done, _MOST_STEPS)
        self.membership.heard(peer, now, round=told.round, inner_steps_done=done)
        self.told[peer] = (now, told)
        if asked_for_chain and told.last is not None and told.last.digest not in self.chains.chain:
            if reply.shown is None:
                self.chains.keep_head(told.last)
            else:
                self.chains.keep(reply.shown)
        return self.membership.left(peer, now) if reply.away else None

    def wants_chain(self, peer: str, now: float) -> bool:
        """Whether to ask with this question for the chain of one that told of a roster that is not on ours, nor the
        next; it counts as asked then."""
        asked_s = self._chain_asked_s.get(peer, -math.inf)
        if not self.chains.lacks(self.last_of(peer)) or now < asked_s + _CHAIN_AGAIN_S:
            return False
        self._chain_asked_s[peer] = now
        return True

    def of_those_who_train(self, but: Collection[str] = ()) -> dict[str, tuple[float, AdvertisedRound] | None]:
        """What they told, and when; None of one that has told nothing."""
        return {peer: self.told.get(peer) for peer in self.membership.heard_at_s() if peer not in but}

    def in_round(self, told: Mapping[str, tuple[float, AdvertisedRound] | None], since_s: float) -> ChainView:
        """Which chain holds, for a peer in the midst of a round that began at `since_s`, by what these told."""
        me, is_away = self.membership.me, self.listening_since_s > since_s
        return chain_view(self.chains.chain, self.chains.shown, told, since_s=since_s, me=me, is_away=is_away)

    def view(self, told: Mapping[str, AdvertisedRound], me: str) -> ChainView:
        """Which chain holds, for a peer that comes, or comes back, and for an archive."""
        now = {peer: (0.0, one) for peer, one in told.items()}
        return chain_view(self.chains.chain, self.chains.shown, now, since_s=0.0, me=me, is_away=True)


@dataclass
class Source:
    """Whose state is asked for, and with which number."""

    number: int
    peer: str
    roster: Roster | None = None
    """It is offered, after this one; and its chain is asked for."""


@dataclass(slots=True)
class PeerSurvey:
    """Who was asked how far it is, and what they said."""

    search: int
    open: set[int] = field(default_factory=set)
    told: dict[str, AdvertisedRound] = field(default_factory=dict)


@dataclass
class CatchingUp(Generic[Envelope, Link]):
    """The peers that are ahead of one that ends `round`, one of which is to give its state."""

    hearsay: Hearsay[Envelope, Link]
    round: int
    since_s: float
    """When it began that."""
    reason: str
    left: deque[str]
    unobtainable: Collection[str]
    undeliverable: set[str]
    """Those whose state could not be had."""
    source: Source | None = None

    def next(self) -> tuple[str, int] | None:
        """Whom to ask now, and for a state of which round or later."""
        if not self.left:
            return None
        peer = self.left.popleft()
        last = self.hearsay.last_of(peer)
        return peer, 0 if last is None else last.round + 1

    def needs_chain(self, roster: Roster) -> bool:
        """Whether its source has to show how it came to this roster before it can be judged."""
        return roster.digest not in self.hearsay.chains.shown

    def may_take(self, source: str, roster: Roster) -> bool:
        """Whether the weights after `roster` hold. Who has a publication of its own on this round's, and does not
        deliver that, is believed nothing; who is further than that need not have it any more."""
        if roster.round == self.round and source in self.unobtainable and source in roster.peers:
            return False
        return self.hearsay.in_round(self.hearsay.of_those_who_train(), self.since_s).holds(roster)


@dataclass
class Search(Generic[Envelope, Link]):
    """One search for the state that holds."""

    hearsay: Hearsay[Envelope, Link]
    search: int
    round: int
    """That the one who seeks is in."""
    me: str
    """"" for an archive, whose weights count for no chain."""
    told: Mapping[str, AdvertisedRound]
    above_tokens: int
    fetches: bool
    rng: random.Random
    best: Chain | None = None
    source: Source | None = None
    _lacking: deque[tuple[str, list[str]]] = field(init=False)
    _sources: deque[tuple[str, int]] = field(default_factory=deque)

    def __post_init__(self) -> None:
        standing: dict[str, list[str]] = {}
        for peer, one in self.told.items():
            if one.last is not None:
                standing.setdefault(one.last.digest, []).append(peer)
        for peers in standing.values():
            self.rng.shuffle(peers)
        self._lacking = deque((digest, peers[:_CHAIN_TRIES]) for digest, peers in standing.items())

    def whose_chain(self) -> str | None:
        """Who is asked next for its chain: each is, before any is judged."""
        chains = self.hearsay.chains
        while self._lacking:
            digest, peers = self._lacking[0]
            if peers and digest not in chains.chain and digest not in chains.shown:
                return peers.pop()
            self._lacking.popleft()
        return None

    def choose(self) -> bool:
        """All have shown their chains, or will not: which holds? False if that is ours, or counts too little."""
        now = self.hearsay.told  # who was asked may have gone on since
        self.told = {peer: now[peer][1] if peer in now else before for peer, before in self.told.items()}
        self.best = best = self.hearsay.view(self.told, self.me).best
        if best is None or best.head is None or best.head.total_tokens <= self.above_tokens:
            return False
        lasts = {peer: one.last.digest for peer, one in self.told.items() if one.last is not None}
        holders = [peer for peer, digest in lasts.items() if digest == best.digest]
        ours = self.hearsay.chains.chain
        rest = [peer for peer, digest in lasts.items() if digest in best and digest not in ours and peer not in holders]
        self.rng.shuffle(holders)
        self._sources.extend((peer, best.head.round + 1) for peer in holders)
        self._sources.extend((peer, 1) for peer in rest)
        return True

    def next(self) -> tuple[str, int] | None:
        """Whom to ask now, and for a state of which round or later."""
        return self._sources.popleft() if self._sources else None

    def needs_chain(self, roster: Roster) -> bool:
        """Whether its source has to show how it came to this roster before it can be judged."""
        return self._is_newer(roster) and self.best is not None and roster.digest not in self.best

    def may_take(self, source: str, roster: Roster) -> bool:
        """Whether the state after `roster` is of the chain that holds: it may be further than it was, or forgotten."""
        if not self._is_newer(roster):
            return False
        assert self.best is not None
        if roster.digest not in self.best:
            last = self.hearsay.last_of(source)
            chain = None if last is None else self.hearsay.view(self.told, self.me).chain_of(last)
            if chain is None or self.best.digest not in chain or roster.digest not in chain:
                return False
        return roster.total_tokens > self.above_tokens

    def _is_newer(self, roster: Roster) -> bool:
        return roster.digest not in self.hearsay.chains.chain


Asker: TypeAlias = PeerSurvey | Search[Envelope, Link] | CatchingUp[Envelope, Link]


@dataclass(slots=True)
class Open(Generic[Envelope, Link]):
    """A question under way, and what it is for; None: the round that is being ended."""

    peer: str
    asked_s: float
    question: RoundQuestion
    of: Asker[Envelope, Link] | None


@dataclass
class Questions(Generic[Envelope, Link]):
    """All that is asked of others, by number."""

    open: dict[int, Open[Envelope, Link]] = field(default_factory=dict)
    numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    def ask(
        self,
        peer: str,
        question: RoundQuestion,
        now: float,
        of: Asker[Envelope, Link] | None = None,
    ) -> ev.AskRoundQuestion:
        """The next one."""
        number = next(self.numbers)
        self.open[number] = Open(peer, now, question, of)
        return ev.AskRoundQuestion(number, peer, question)


_Commands: TypeAlias = list[Command[Envelope]]
_Fetching: TypeAlias = Search[Envelope, Link] | CatchingUp[Envelope, Link]


class StateSearches(Generic[Envelope, Link]):
    """Surveys, searches, and states that are fetched. What comes of catching up is told as of the search `CATCH_UP`."""

    CATCH_UP: ClassVar[int] = -1

    def __init__(
        self, hearsay: Hearsay[Envelope, Link], questions: Questions[Envelope, Link], me: str, rng: random.Random
    ) -> None:
        self._hearsay, self._questions, self._me, self._rng = hearsay, questions, me, rng
        self._fetching: dict[int, _Fetching[Envelope, Link]] = {}
        self._joining: ev.Join | None = None
        self._join_told: Mapping[str, AdvertisedRound] = {}
        self._join_tries = 0

    def survey(self, event: ev.SurveyPeers, round: int, now: float) -> _Commands[Envelope]:
        """Ask some how far they are."""
        survey = PeerSurvey(event.search)
        asks = [self._questions.ask(peer, RoundQuestion(round), now, survey) for peer in event.peers]
        survey.open.update(ask.number for ask in asks)
        return [*asks] if asks else self._surveyed(survey, round, now)

    def join(self, event: ev.Join, round: int, now: float) -> _Commands[Envelope]:
        """Ask some how far they are, then look for the state that holds among theirs."""
        self._joining = event
        return self.survey(ev.SurveyPeers(event.search, event.peers), round, now)

    def seek(self, event: ev.SearchState, round: int, now: float) -> _Commands[Envelope]:
        """Look for the state that holds."""
        search = Search(
            self._hearsay, event.search, round, self._me, event.told, event.above_tokens, event.fetches, self._rng
        )
        return self._seek_on(search, now)

    def join_anew(self) -> None:
        """This peer has left: whatever it tried before, it tries as often when it comes back."""
        self._join_tries = 0

    def catch_up(self, of: CatchingUp[Envelope, Link]) -> _Commands[Envelope]:
        """Take the state of one of those ahead."""
        return self._fetch_next(of)

    def drop(self, search: int) -> _Commands[Envelope]:
        """Nothing is asked or fetched for it any more."""
        if self._joining is not None and self._joining.search == search:
            self._joining = None
        open_, fetching = self._questions.open, self._fetching
        asked = [n for n, one in open_.items() if one.of is not None and _number_of(one.of) == search]
        fetched = [n for n, one in fetching.items() if _number_of(one) == search]
        commands: _Commands[Envelope] = [ev.DropRoundQuestion(number, open_.pop(number).peer) for number in asked]
        return [*commands, *(ev.DropRoundQuestion(number, _peer_of(fetching.pop(number))) for number in fetched)]

    def answered(
        self,
        of: Asker[Envelope, Link],
        number: int,
        told: tuple[str, AdvertisedRound] | None,
        round: int,
        now: float,
    ) -> _Commands[Envelope]:
        """A question of one of these has its answer, or has none: of one that was to show its chain, then, what is
        judged by that goes on."""
        if isinstance(of, PeerSurvey):
            of.open.discard(number)
            of.told.update([] if told is None else [told])
            return [] if of.open else self._surveyed(of, round, now)
        if of.source is None:
            assert isinstance(of, Search)
            return self._seek_on(of, now)
        return self._fetch_failed(of) if told is None else self._judge(of)

    def fetch_went_on(
        self, event: ev.StateOffered[Envelope] | ev.StateNotFetched | ev.StateDownloaded, now: float
    ) -> _Commands[Envelope]:
        """A state is offered, is here, or does not come."""
        of = self._fetching.get(event.number)
        if of is None or of.source is None:
            return []
        match event:
            case ev.StateNotFetched():
                return self._fetch_failed(of)
            case ev.StateDownloaded():
                del self._fetching[event.number]
                return self._sought(_number_of(of), False, event.number)
        source, roster = of.source, event.roster.roster
        if found := self._hearsay.chains.wrong_with(roster):
            return [ev.NamePeer(source.peer, found), *self._fetch_failed(of)]
        source.roster = roster
        if of.needs_chain(roster):
            return [self._questions.ask(source.peer, RoundQuestion(of.round, wants_chain=True), now, of)]
        return self._judge(of)

    def _seek_on(self, search: Search[Envelope, Link], now: float) -> _Commands[Envelope]:
        if (peer := search.whose_chain()) is not None:
            return [self._questions.ask(peer, RoundQuestion(search.round, wants_chain=True), now, search)]
        is_ours = not search.choose()
        if is_ours or not search.fetches:
            return self._sought(search.search, is_ours, None)
        return self._fetch_next(search)

    def _surveyed(self, survey: PeerSurvey, round: int, now: float) -> _Commands[Envelope]:
        """All have answered, or will not."""
        join = self._joining
        if join is None or join.search != survey.search:
            return [ev.PeersSurveyed(survey.search, survey.told)]
        self._join_told = survey.told
        if join.peers and not survey.told:  # that nobody answers says nothing of what they have
            return self._joined(join, False, None)
        return self.seek(ev.SearchState(join.search, survey.told), round, now)

    def _sought(self, search: int, is_ours: bool, number: int | None) -> _Commands[Envelope]:
        """A search has ended."""
        if self._joining is None or self._joining.search != search:
            return [ev.StateSearched(search, is_ours, number)]
        return self._joined(self._joining, is_ours, number)

    def _joined(self, join: ev.Join, is_ours: bool, number: int | None) -> _Commands[Envelope]:
        """What this peer begins with."""
        self._join_tries += 1
        if number is not None:
            begins = ev.JoinsWith.OTHERS
        elif is_ours:
            begins = ev.JoinsWith.OWN
        elif self._join_tries < _JOIN_TRIES:
            begins = ev.JoinsWith.NOTHING_YET
        else:
            has_own = self._hearsay.chains.chain.head is not None
            begins = ev.JoinsWith.OWN if has_own else ev.JoinsWith.NOTHING
        if begins is not ev.JoinsWith.NOTHING_YET:
            self._join_tries = 0
        self._joining = None
        return [ev.JoinDecided(join.search, begins, number, self._join_told)]

    def _judge(self, of: _Fetching[Envelope, Link]) -> _Commands[Envelope]:
        """Whether to take the state that is offered."""
        assert of.source is not None and of.source.roster is not None
        may = of.may_take(of.source.peer, of.source.roster)
        return [ev.DownloadState(of.source.number)] if may else self._fetch_failed(of)

    def _fetch_failed(self, of: _Fetching[Envelope, Link]) -> _Commands[Envelope]:
        assert of.source is not None
        del self._fetching[of.source.number]
        if isinstance(of, CatchingUp):
            of.undeliverable.add(of.source.peer)
        return self._fetch_next(of)

    def _fetch_next(self, of: _Fetching[Envelope, Link]) -> _Commands[Envelope]:
        """Have the next of them offer its state."""
        of.source = None
        if (found := of.next()) is None:
            return self._sought(_number_of(of), False, None)
        of.source = Source(next(self._questions.numbers), found[0])
        self._fetching[of.source.number] = of
        return [ev.RequestState(of.source.number, *found)]


def _number_of(of: Asker[Envelope, Link]) -> int:
    return StateSearches.CATCH_UP if isinstance(of, CatchingUp) else of.search


def _peer_of(of: _Fetching[Envelope, Link]) -> str:
    return "" if of.source is None else of.source.peer

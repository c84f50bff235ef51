"""Search for the state that holds, by what other peers say of themselves and of their chains of rosters.

A joiner, a peer that comes back and an archive search in the same way. They ask some peers how far they are, ask for
the chains of rosters that they do not know, and download the state of the chain that holds from whoever delivers it. A
peer that missed a round fetches a state by the same steps.

Everything here is pure; `engine.py` calls it.
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
from swarmtrain.protocol.rounds.chains import Chain, Chains, ChainView, Flaw, Link, chain_view, flaw
from swarmtrain.protocol.rounds.messages import Command, Envelope, PeerReply, RoundQuestion
from swarmtrain.protocol.rounds.rosters import AdvertisedRound, Roster

_CHAIN_TRIES = 2
"""Peers that are asked for the chain of one roster."""
_CHAIN_AGAIN_S = 1.0
"""Seconds between two questions to a peer for its chain, because checking a chain takes a while."""
_MOST_STEPS = 2**31
"""Limit of the inner steps that a peer may claim."""
_JOIN_TRIES = 3
"""Attempts to join before a peer continues with what it has."""


@dataclass
class Hearsay(Generic[Envelope, Link]):
    """Answers of other peers about their rounds, and the chains of rosters that they have sent."""

    membership: Membership
    chains: Chains[Link]
    advertised: dict[str, tuple[float, AdvertisedRound]] = field(default_factory=dict)
    """Each peer's newest advertised round, and when it was received."""
    listening_since_s: float = -math.inf
    """Time since which this process has run without a gap."""
    _chain_asked_s: dict[str, float] = field(default_factory=dict)
    """Time when each peer was last asked for its chain."""

    def last_of(self, peer: str) -> Roster | None:
        """Return the roster that `peer` says it applied last; None if it has applied none, or is unknown."""
        one = self.advertised.get(peer)
        return None if one is None else one[1].last

    def forget(self, peer: str) -> None:
        """Forget a peer that has been gone for long."""
        self.advertised.pop(peer, None)
        self._chain_asked_s.pop(peer, None)

    def flaw_in(self, reply: PeerReply[Envelope, Link], asked_for_chain: bool) -> Flaw | None:
        """Return what is wrong with an answer; None if nothing is."""
        advertised, last = reply.advertised, reply.advertised.last
        if advertised.round != (0 if last is None else last.round + 1):
            return Flaw("a peer in another round than its last roster leads to", "bad-round")
        if reply.last is not None and (found := self.chains.wrong_with(reply.last.roster)):
            return found
        shown = reply.shown
        if not asked_for_chain or last is None or last.digest in self.chains.chain:
            return None
        if shown is None or shown.chain.digest != last.digest:
            return Flaw("no chain of rosters that leads to its last one", "bad-chain")
        return flaw(shown.chain, self.chains.chain)

    def receive(
        self, peer: str, reply: PeerReply[Envelope, Link], asked_for_chain: bool, now: float
    ) -> MembershipChange | None:
        """Record an answer, and the chain in it. Return the change of membership if the peer says that it is away."""
        advertised = reply.advertised
        done = min(reply.inner_steps_done, _MOST_STEPS)
        self.membership.heard(peer, now, round=advertised.round, inner_steps_done=done)
        self.advertised[peer] = (now, advertised)
        if asked_for_chain and reply.shown is not None and reply.shown.chain.digest not in self.chains.chain:
            self.chains.keep(reply.shown)
        return self.membership.left(peer, now) if reply.away else None

    def wants_chain(self, peer: str, now: float) -> bool:
        """Return whether this question should ask for the peer's chain; if so, record that it does.

        The chain is needed if the peer's last roster is neither on this peer's chain nor the next one.
        """
        asked_s = self._chain_asked_s.get(peer, -math.inf)
        if not self.chains.lacks(self.last_of(peer)) or now < asked_s + _CHAIN_AGAIN_S:
            return False
        self._chain_asked_s[peer] = now
        return True

    def of_those_who_train(self, but: Collection[str] = ()) -> dict[str, tuple[float, AdvertisedRound] | None]:
        """Map each live volunteer to (time, what it has advertised of its round); to None if it has not answered
        yet."""
        return {peer: self.advertised.get(peer) for peer in self.membership.heard_at_s() if peer not in but}

    def in_round(self, advertised: Mapping[str, tuple[float, AdvertisedRound] | None], since_s: float) -> ChainView:
        """Compare the chains for a peer in the middle of a round that began at `since_s`."""
        me, is_away = self.membership.me, self.listening_since_s > since_s
        return chain_view(self.chains.chain, self.chains.shown, advertised, since_s=since_s, me=me, is_away=is_away)

    def view(self, advertised: Mapping[str, AdvertisedRound], me: str) -> ChainView:
        """Compare the chains for a peer that joins or comes back, or for an archive."""
        now = {peer: (0.0, one) for peer, one in advertised.items()}
        return chain_view(self.chains.chain, self.chains.shown, now, since_s=0.0, me=me, is_away=True)


@dataclass
class Source:
    """Peer that is asked for its state, and the number of the request."""

    number: int
    peer: str
    roster: Roster | None = None
    """Roster of the offered state; the source may still have to send the chain of that roster."""


@dataclass(slots=True)
class PeerSurvey:
    """Survey under way: open questions, and the answers so far."""

    search: int
    open: set[int] = field(default_factory=set)
    advertised: dict[str, AdvertisedRound] = field(default_factory=dict)


@dataclass
class CatchingUp(Generic[Envelope, Link]):
    """Search, at the end of the round `round`, for the state of a peer that is ahead of this one."""

    hearsay: Hearsay[Envelope, Link]
    round: int
    since_s: float
    """Time when this peer began the round `round`."""
    reason: str
    left: deque[str]
    """Peers to ask, the next one first."""
    unobtainable: Collection[str]
    """Peers whose publication of this round nobody delivers."""
    undeliverable: set[str]
    """Peers whose state could not be fetched."""
    source: Source | None = None

    def next(self) -> tuple[str, int] | None:
        """Return the peer to ask next and the earliest round of its state; None if none is left."""
        if not self.left:
            return None
        peer = self.left.popleft()
        last = self.hearsay.last_of(peer)
        return peer, 0 if last is None else last.round + 1

    def needs_chain(self, roster: Roster) -> bool:
        """Return whether the source must send its chain before this roster can be judged."""
        return roster.digest not in self.hearsay.chains.shown

    def may_take(self, source: str, roster: Roster) -> bool:
        """Return whether to take the state of `source`, which has applied `roster`: the weights after that roster must
        hold.

        A source that lists its own publication on this round's roster but does not deliver it is not believed. One that
        is further ahead may have dropped that publication.
        """
        if roster.round == self.round and source in self.unobtainable and source in roster.peers:
            return False
        return self.hearsay.in_round(self.hearsay.of_those_who_train(), self.since_s).holds(roster)


@dataclass
class Search(Generic[Envelope, Link]):
    """Search for the state that holds."""

    hearsay: Hearsay[Envelope, Link]
    search: int
    round: int
    """Round of the peer that searches."""
    me: str
    """PeerID of the peer that searches; "" for an archive, whose weights count for no chain."""
    advertised: Mapping[str, AdvertisedRound]
    above_tokens: int
    """Tokens that a state must exceed."""
    fetches: bool
    """False if only chains are asked for, and no state."""
    rng: random.Random
    best: Chain | None = None
    """Chain that holds, once it is chosen."""
    source: Source | None = None
    _lacking: deque[tuple[str, list[str]]] = field(init=False)
    """Digests of the last rosters, each with some peers that can be asked for its chain."""
    _sources: deque[tuple[str, int]] = field(default_factory=deque)
    """Peers to ask for their state, with the earliest round."""

    def __post_init__(self) -> None:
        standing: dict[str, list[str]] = {}
        for peer, one in self.advertised.items():
            if one.last is not None:
                standing.setdefault(one.last.digest, []).append(peer)
        for peers in standing.values():
            self.rng.shuffle(peers)
        self._lacking = deque((digest, peers[:_CHAIN_TRIES]) for digest, peers in standing.items())

    def whose_chain(self) -> str | None:
        """Return the next peer to ask for its chain, None when all chains are known. None is judged before that."""
        chains = self.hearsay.chains
        while self._lacking:
            digest, peers = self._lacking[0]
            if peers and digest not in chains.chain and digest not in chains.shown:
                return peers.pop()
            self._lacking.popleft()
        return None

    def choose(self) -> bool:
        """Choose the chain that holds. Return False if it is this peer's own, or has too few tokens."""
        now = self.hearsay.advertised  # peers may have advanced since they were surveyed
        self.advertised = {peer: now[peer][1] if peer in now else before for peer, before in self.advertised.items()}
        self.best = best = self.hearsay.view(self.advertised, self.me).best
        if best is None or best.head is None or best.head.total_tokens <= self.above_tokens:
            return False
        lasts = {peer: one.last.digest for peer, one in self.advertised.items() if one.last is not None}
        holders = [peer for peer, digest in lasts.items() if digest == best.digest]
        ours = self.hearsay.chains.chain
        # If no holder delivers, a peer further back on the chain may give an older state of it.
        rest = [peer for peer, digest in lasts.items() if digest in best and digest not in ours and peer not in holders]
        self.rng.shuffle(holders)
        self._sources.extend((peer, best.head.round + 1) for peer in holders)
        self._sources.extend((peer, 1) for peer in rest)
        return True

    def next(self) -> tuple[str, int] | None:
        """Return the peer to ask next and the earliest round of its state; None if none is left."""
        return self._sources.popleft() if self._sources else None

    def needs_chain(self, roster: Roster) -> bool:
        """Return whether the source must send its chain before this roster can be judged."""
        return self._is_newer(roster) and self.best is not None and roster.digest not in self.best

    def may_take(self, source: str, roster: Roster) -> bool:
        """Return whether to take the state of `source`, which has applied `roster`: the roster must belong to the chain
        that holds.

        The source may have advanced since, or have dropped older rosters.
        """
        if not self._is_newer(roster):
            return False
        assert self.best is not None
        if roster.digest not in self.best:
            last = self.hearsay.last_of(source)
            chain = None if last is None else self.hearsay.view(self.advertised, self.me).chain_of(last)
            if chain is None or self.best.digest not in chain or roster.digest not in chain:
                return False
        return roster.total_tokens > self.above_tokens

    def _is_newer(self, roster: Roster) -> bool:
        return roster.digest not in self.hearsay.chains.chain


Asker: TypeAlias = PeerSurvey | Search[Envelope, Link] | CatchingUp[Envelope, Link]
"""Search or survey that a question belongs to."""


@dataclass(slots=True)
class Open(Generic[Envelope, Link]):
    """Open question. `of` is the search or survey that it belongs to; None: the round that is being ended."""

    peer: str
    asked_s: float
    question: RoundQuestion
    of: Asker[Envelope, Link] | None


@dataclass
class Questions(Generic[Envelope, Link]):
    """Open questions of this peer, by number."""

    open: dict[int, Open[Envelope, Link]] = field(default_factory=dict)
    numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    def ask(
        self,
        peer: str,
        question: RoundQuestion,
        now: float,
        of: Asker[Envelope, Link] | None = None,
    ) -> ev.AskRoundQuestion:
        """Open a question with the next number."""
        number = next(self.numbers)
        self.open[number] = Open(peer, now, question, of)
        return ev.AskRoundQuestion(number, peer, question)


_Commands: TypeAlias = list[Command[Envelope]]
_Fetching: TypeAlias = Search[Envelope, Link] | CatchingUp[Envelope, Link]


class StateSearches(Generic[Envelope, Link]):
    """Surveys, searches and downloads of states. Catching up counts as the search with number `CATCH_UP`."""

    CATCH_UP: ClassVar[int] = -1

    def __init__(
        self, hearsay: Hearsay[Envelope, Link], questions: Questions[Envelope, Link], me: str, rng: random.Random
    ) -> None:
        self._hearsay, self._questions, self._me, self._rng = hearsay, questions, me, rng
        self._fetching: dict[int, _Fetching[Envelope, Link]] = {}
        self._joining: ev.Join | None = None
        self._join_advertised: Mapping[str, AdvertisedRound] = {}
        self._join_tries = 0

    def survey(self, event: ev.SurveyPeers, round: int, now: float) -> _Commands[Envelope]:
        """Ask the event's peers how far they are, and for chains that are lacking."""
        survey, wants_chain = PeerSurvey(event.search), self._hearsay.wants_chain
        asks = [
            self._questions.ask(peer, RoundQuestion(round, wants_chain=wants_chain(peer, now)), now, survey)
            for peer in event.peers
        ]
        survey.open.update(ask.number for ask in asks)
        return [*asks] if asks else self._surveyed(survey, round, now)

    def join(self, event: ev.Join, round: int, now: float) -> _Commands[Envelope]:
        """Ask the event's peers how far they are, then search for the state that holds among theirs."""
        self._joining = event
        return self.survey(ev.SurveyPeers(event.search, event.peers), round, now)

    def seek(self, event: ev.SearchState, round: int, now: float) -> _Commands[Envelope]:
        """Search for the state that holds."""
        search = Search(
            self._hearsay, event.search, round, self._me, event.advertised, event.above_tokens, event.fetches, self._rng
        )
        return self._seek_on(search, now)

    def join_anew(self) -> None:
        """Reset the count of attempts to join, because this peer has left."""
        self._join_tries = 0

    def catch_up(self, of: CatchingUp[Envelope, Link]) -> _Commands[Envelope]:
        """Request the state of one of the peers ahead."""
        return self._fetch_next(of)

    def drop(self, search: int) -> _Commands[Envelope]:
        """Stop all questions and downloads of that search."""
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
        advertised: tuple[str, AdvertisedRound] | None,
        round: int,
        now: float,
    ) -> _Commands[Envelope]:
        """Continue the search or survey that an answered or failed (`advertised` is None) question belongs to."""
        if isinstance(of, PeerSurvey):
            of.open.discard(number)
            of.advertised.update([] if advertised is None else [advertised])
            return [] if of.open else self._surveyed(of, round, now)
        if of.source is None:
            assert isinstance(of, Search)
            return self._seek_on(of, now)
        return self._fetch_failed(of) if advertised is None else self._judge(of)

    def fetch_went_on(
        self, event: ev.StateOffered[Envelope] | ev.StateNotFetched | ev.StateDownloaded, now: float
    ) -> _Commands[Envelope]:
        """Continue when a state is offered, is downloaded, or does not come."""
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
            return [ev.NamePeer(source.peer, *found), *self._fetch_failed(of)]
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
        """End a survey, or continue the join that it is part of."""
        join = self._joining
        if join is None or join.search != survey.search:
            return [ev.PeersSurveyed(survey.search, survey.advertised)]
        self._join_advertised = survey.advertised
        if join.peers and not survey.advertised:  # silence of all peers does not show that they have nothing
            return self._joined(join, False, None)
        return self.seek(ev.SearchState(join.search, survey.advertised), round, now)

    def _sought(self, search: int, is_ours: bool, number: int | None) -> _Commands[Envelope]:
        """End a search, or the join that it belongs to."""
        if self._joining is None or self._joining.search != search:
            return [ev.StateSearched(search, is_ours, number)]
        return self._joined(self._joining, is_ours, number)

    def _joined(self, join: ev.Join, is_ours: bool, number: int | None) -> _Commands[Envelope]:
        """Decide which state this peer begins with."""
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
        return [ev.JoinDecided(join.search, begins, number, self._join_advertised)]

    def _judge(self, of: _Fetching[Envelope, Link]) -> _Commands[Envelope]:
        """Download the offered state, or try the next source."""
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
        """Request the state of the next source; end the search if none is left."""
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

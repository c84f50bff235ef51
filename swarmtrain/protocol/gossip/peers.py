"""Whom a peer that gossips sees, how far they are, and whom of them it asks next.

Pure: what the others say of themselves is told, `now` is an argument.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from swarmtrain.protocol.gossip.advertised import AdvertisedFragments, beyond
from swarmtrain.protocol.gossip.open_pulls import OpenPulls, Which
from swarmtrain.protocol.gossip.partners import (
    BackOff,
    Candidate,
    Ledger,
    Partners,
    PublicationVersion,
    left_behind,
    median_round,
)
from swarmtrain.protocol.gossip.pulls import Section
from swarmtrain.protocol.membership.hosts import HostOrder
from swarmtrain.protocol.membership.membership import PeerInfo

__all__ = ["OtherPeers", "PartnerChoice"]


class OtherPeers:
    """The live others that train, as they said last, and the round that staleness is measured from."""

    def __init__(self, me: str, tellings: AdvertisedFragments, host_rng: random.Random) -> None:
        self.me, self._tellings = me, tellings
        self.back_off = BackOff()
        """Whom of them it leaves alone for a while."""
        self.hosts = HostOrder(me, host_rng)
        """Through whom it asks those that nobody can dial."""
        self.round = 0
        """This peer's own."""
        self.infos: Sequence[PeerInfo] = ()
        self.version = 0
        """Another one after each change."""
        self._reference: int | None = None
        self._moved_by: tuple[str, PublicationVersion] | None = None
        self._hidden: dict[str, tuple[str, ...]] | None = None
        """Those of them that nobody can dial, with their hosts; None until somebody is asked."""

    def changed(self, infos: Sequence[PeerInfo]) -> bool:
        """These are there now. Whether that are more or fewer than before."""
        is_other_number = len(infos) != len(self.infos)
        self.infos, self._reference, self._hidden = infos, None, None
        self.version += 1
        return is_other_number

    def enter_round(self, round: int) -> None:
        """This peer is in that round."""
        if round != self.round:
            self.round, self._reference = round, None

    def reference_round(self) -> int:
        """The median of all rounds, this peer's own among them."""
        if self._reference is None:
            self._reference = median_round([self.round, *(info.round for info in self.infos)])
        return self._reference

    def left_behind(self, round: int, ledger: Ledger) -> int:
        """How many rounds this peer is too far behind, as it ends that one; 0: it is not."""
        rounds = {info.peer: info.round for info in self.infos if info.round}
        if len(rounds) != 1:
            return left_behind(round, rounds.values(), ledger.max_staleness_rounds)
        # What one other claims moves nobody, or a liar could have this peer's weights replaced again and again. But of
        # two, the one that stood still would be too old for the other for ever; so what it has merged of the other
        # counts, and once only.
        ((peer, told),) = rounds.items()
        mark = ledger.mark(peer)
        if mark is None or self._moved_by == (peer, mark):
            return 0
        behind = left_behind(round, [min(told, mark.round)], ledger.max_staleness_rounds)
        if behind:
            self._moved_by = peer, mark
        return behind

    def hosts_of(self, peer: str) -> tuple[str, ...] | None:
        """Who serves the publications of one that nobody can dial; None if it can be asked itself."""
        if self._hidden is None:
            self._hidden = {info.peer: info.hosts for info in self.infos if info.hidden}
        return self._hidden.get(peer)

    def told(self, fragment: int) -> list[tuple[int, Candidate]]:
        """In which round each says that a fragment is, and what it has published of it."""
        of = self._tellings.of
        return [of(info, fragment) for info in self.infos]


@dataclass(slots=True)
class _View:
    """What is seen of the others from one fragment, until they tell more or something is merged."""

    version: int
    candidates: list[Candidate]
    rounds: dict[str, int]
    from_round: int = -1
    """Of this peer, in which what follows was found."""
    reference: int = 0
    new_tokens: dict[str, int | None] = field(default_factory=dict)
    new_weights: set[str] | None = None


class PartnerChoice:
    """Whom to ask for one fragment."""

    def __init__(
        self,
        fragment: int,
        others: OtherPeers,
        partners: Partners,
        open: OpenPulls,
        leading: Section,
        *,
        is_part: bool,
    ) -> None:
        """`leading` is pulled first, and of whom it came or comes, all else. `is_part`: the model has other fragments
        too, so that what others told of this one is a guess."""
        self.fragment, self._others, self.partners, self._open = fragment, others, partners, open
        self._leading, self._is_part = leading, is_part
        self._ledger = partners.ledger
        self._view: _View | None = None

    def ledger_changed(self) -> None:
        """More was merged, or others' weights were taken."""
        self._view = None

    def choose(self, section: Section, round: int, here: Sequence[Which], now: float) -> str | None:
        """Whose to pull next for the merge of that round, when so much is `here`; None: there is nobody to ask."""
        view = self.view()
        if view.from_round != round:
            view.from_round, view.new_weights = round, None
            view.reference = reference = median_round([round, *view.rounds.values()])
            tokens = self._ledger.new_tokens
            view.new_tokens = {one.peer: tokens(one.peer, one, reference) for one in view.candidates}
        first: Collection[str]
        if section != self._leading:
            first = self._open.coming(self._leading, here)
        else:
            if view.new_weights is None:
                view.new_weights = self._ledger.with_new_values(section, view.rounds, view.reference)
            first = view.new_weights
        return self.partners.choose(
            view.candidates,
            exclude={self._others.me, *self._open.not_now(section, here, now)},
            reference_round=view.reference,
            now=now,
            first=first,
            new_tokens=view.new_tokens,
        )[0]

    def view(self) -> _View:
        """What the others have of this fragment."""
        view = self._view
        if view is None or view.version != self._others.version:
            view = self._view = _View(self._others.version, [], {})
            mark = self._ledger.mark
            for round, candidate in self._others.told(self.fragment):
                if self._is_part and (known := mark(candidate.peer)) is not None:
                    candidate = beyond(candidate, known)
                view.rounds[candidate.peer] = round
                view.candidates.append(candidate)
        return view

    def next_free_s(self, section: Section, now: float) -> float | None:
        """When somebody may be asked who may not be now; None if that is not a matter of time."""
        return self._open.next_free_s(section, [info.peer for info in self._others.infos], now)

"""View of the other peers: how far they are, and which of them to ask next.

Everything here is pure: the caller passes on what the others advertise, and `now` is an argument.
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
from swarmtrain.protocol.gossip.pulls import GroupName
from swarmtrain.protocol.membership.hosts import HostOrder
from swarmtrain.protocol.membership.membership import PeerInfo


class OtherPeers:
    """Other live volunteers, as they advertised themselves last, and the round from which staleness is measured."""

    def __init__(self, me: str, tellings: AdvertisedFragments, host_rng: random.Random) -> None:
        self.me, self._tellings = me, tellings
        self.back_off = BackOff()
        """Peers to avoid for a while."""
        self.hosts = HostOrder(me, host_rng)
        """Order in which to ask the hosts of a hidden peer."""
        self.round = 0
        """Round that this peer is in."""
        self.infos: Sequence[PeerInfo] = ()
        self.version = 0
        """Number that changes with each update of the list, so that caches notice it."""
        self._reference: int | None = None
        self._moved_by: tuple[str, PublicationVersion] | None = None
        """Peer and publication that last made this peer catch up while only one other volunteer was present."""
        self._hidden: dict[str, tuple[str, ...]] | None = None
        """Hosts of each hidden peer; None until they are needed."""

    def changed(self, infos: Sequence[PeerInfo]) -> bool:
        """Replace the list of live others. Return whether their number has changed."""
        is_other_number = len(infos) != len(self.infos)
        self.infos, self._reference, self._hidden = infos, None, None
        self.version += 1
        return is_other_number

    def enter_round(self, round: int) -> None:
        """Record the round that this peer is in."""
        if round != self.round:
            self.round, self._reference = round, None

    def reference_round(self) -> int:
        """Return the upper median of all rounds, this peer's own included."""
        if self._reference is None:
            self._reference = median_round([self.round, *(info.round for info in self.infos)])
        return self._reference

    def left_behind(self, round: int, ledger: Ledger) -> int:
        """Return by how many rounds this peer, which ends `round`, must catch up; 0 if it need not."""
        rounds = {info.peer: info.round for info in self.infos if info.round}
        if len(rounds) != 1:
            return left_behind(round, rounds.values(), ledger.max_staleness_rounds)
        # A single other peer's claim must not count, or a liar could have this peer's weights replaced again and again.
        # But if neither moves, the one that was suspended stays too old for the other for ever. So what counts is the
        # other's newest publication that this peer has merged, and each publication only once (decision 73).
        ((peer, told),) = rounds.items()
        version = ledger.version(peer)
        if version is None or self._moved_by == (peer, version):
            return 0
        behind = left_behind(round, [min(told, version.round)], ledger.max_staleness_rounds)
        if behind:
            self._moved_by = peer, version
        return behind

    def hosts_of(self, peer: str) -> tuple[str, ...] | None:
        """Return the hosts of a hidden peer; None if the peer can be asked directly."""
        if self._hidden is None:
            self._hidden = {info.peer: info.hosts for info in self.infos if info.hidden}
        return self._hidden.get(peer)

    def told(self, fragment: int) -> list[tuple[int, Candidate]]:
        """Return each peer's round and newest publication of the fragment, inferred from what it advertises."""
        of = self._tellings.of
        return [of(info, fragment) for info in self.infos]


@dataclass(slots=True)
class _View:
    """Cache of what the other peers have of one fragment. It is valid until they advertise more or something is
    merged."""

    version: int
    candidates: list[Candidate]
    rounds: dict[str, int]
    from_round: int = -1
    """Round of this peer for which the following fields were computed."""
    reference: int = 0
    new_tokens: dict[str, int | None] = field(default_factory=dict)
    new_weights: set[str] | None = None


class PartnerChoice:
    """Chooses the peer to ask next, for one fragment."""

    def __init__(
        self,
        fragment: int,
        others: OtherPeers,
        partners: Partners,
        open: OpenPulls,
        leading: GroupName,
        *,
        is_fragment: bool,
    ) -> None:
        """`leading`: the tensor group that is pulled first; the other tensor groups are pulled from the same peers if
        possible. `is_fragment`: the model has several fragments, so that what others have of this one is inferred from
        what they advertise."""
        self.fragment, self._others, self.partners, self._open = fragment, others, partners, open
        self._leading, self._is_fragment = leading, is_fragment
        self._ledger = partners.ledger
        self._view: _View | None = None

    def ledger_changed(self) -> None:
        """Drop the cached view, because more was merged or the weights came from other peers."""
        self._view = None

    def choose(self, group: GroupName, round: int, here: Sequence[Which], now: float) -> str | None:
        """Return the next peer to pull `group` from for the merge of `round`; None if there is nobody to ask.

        `here` lists what has already arrived for that merge.
        """
        view = self.view()
        if view.from_round != round:
            view.from_round, view.new_weights = round, None
            view.reference = reference = median_round([round, *view.rounds.values()])
            tokens = self._ledger.new_tokens
            view.new_tokens = {one.peer: tokens(one.peer, one, reference) for one in view.candidates}
        first: Collection[str]
        # Prefer the peers whose weights are here or on their way.
        if group != self._leading:
            first = self._open.coming(self._leading, here)
        else:
            if view.new_weights is None:
                view.new_weights = self._ledger.with_new_values(group, view.rounds, view.reference)
            first = view.new_weights
        return self.partners.choose(
            view.candidates,
            exclude={self._others.me, *self._open.not_now(group, here, now)},
            reference_round=view.reference,
            now=now,
            first=first,
            new_tokens=view.new_tokens,
        )[0]

    def view(self) -> _View:
        """Return the cached view of what the other peers have of this fragment, renewed if necessary."""
        view = self._view
        if view is None or view.version != self._others.version:
            view = self._view = _View(self._others.version, [], {})
            version = self._ledger.version
            for round, candidate in self._others.told(self.fragment):
                if self._is_fragment and (known := version(candidate.peer)) is not None:
                    candidate = beyond(candidate, known)
                view.rounds[candidate.peer] = round
                view.candidates.append(candidate)
        return view

    def next_free_s(self, group: GroupName, now: float) -> float | None:
        """Return the time at which a peer that may not be asked now may be asked again; None if time alone changes
        nothing."""
        return self._open.next_free_s(group, [info.peer for info in self._others.infos], now)

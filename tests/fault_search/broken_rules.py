"""Rules of the product, each without one of its guards: the search for faults must find them."""

from __future__ import annotations

import dataclasses
import math
import operator
import random
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import pytest

from fault_search.schedule import WorldKind
from swarmtrain.algorithm import pacing
from swarmtrain.peer.checkpoints import archive, archive_watch
from swarmtrain.peer.training import replica
from swarmtrain.protocol.archive import departure
from swarmtrain.protocol.gossip import partners
from swarmtrain.protocol.membership import hosts, membership
from swarmtrain.protocol.pipeline import balance, ledger, moves
from swarmtrain.protocol.rounds import batch_end, chains, engine, rosters, state_search
from swarmtrain.protocol.tokens import shards, tally
from swarmtrain.simulate.systems import publications, transfers

Patch = pytest.MonkeyPatch


def ledger_takes_everything(patch: Patch) -> None:
    """Merge again what was merged before."""

    def news(
        self: partners.Ledger, peer: str, version: partners.PublicationVersion, reference_round: int
    ) -> partners.News:
        if version.part < 1:
            return partners.Stale("it has published nothing yet")
        return partners.Full(version.tokens, "why not")

    patch.setattr(partners.Ledger, "news", news)


def restored_ledger_is_empty(patch: Patch) -> None:
    """Restore a checkpoint's weights without the record of what was merged into them."""
    patch.setattr(partners.Ledger, "load", lambda self, rows: None)


def states_say_not_what_entered_them(patch: Patch) -> None:
    """Merge, after taking a state, publications that the state contains already."""
    patch.setattr(partners.Ledger, "adopt", lambda self, places: None)


def old_rounds_are_merged(patch: Patch) -> None:
    """Merge rounds however far behind the median their author is."""
    news, new_tokens = partners.Ledger.news, partners.Ledger.new_tokens
    patch.setattr(partners.Ledger, "news", lambda self, peer, version, _: news(self, peer, version, -(10**9)))
    patch.setattr(
        partners.Ledger, "new_tokens", lambda self, peer, version, _: new_tokens(self, peer, version, -(10**9))
    )


def rounds_without_a_least(patch: Patch) -> None:
    """Pace down to zero steps."""

    def paced(own: float, reference: float, steps: int) -> int:
        return min(steps, math.floor(own / reference * steps))

    patch.setattr(pacing, "paced_inner_steps", paced)


def fastest_paces_all(patch: Patch) -> None:
    """Use the fastest claimed speed as the reference for all."""
    patch.setattr(pacing, "reference_speed", max)


def last_count_is_taken(patch: Patch) -> None:
    """Take a record's count even if it is lower than before."""

    def count_told(self: tally.Tally, key: tuple[str, int], believed: int) -> None:
        self._told[key] = believed

    patch.setattr(tally.Tally, "_count_told", count_told)


def everything_told_is_believed(patch: Patch) -> None:
    """Believe counts beyond what the peer's speed allows."""
    patch.setattr(tally, "_OWN_FACTOR", math.inf)
    patch.setattr(tally, "_QUICK_FACTOR", 1e12)
    patch.setattr(tally, "_SWARM_FACTOR", 1e12)


def who_was_lost_stays_lost(patch: Patch) -> None:
    """Keep a lost peer lost, despite newer presences."""
    saw = membership.Membership.saw_presence

    def saw_presence(
        self: membership.Membership, info: membership.PeerInfo, expires_s: float, now: float
    ) -> membership.MembershipChange | None:
        return None if self.state(info.peer) is membership.PeerState.LOST else saw(self, info, expires_s, now)

    patch.setattr(membership.Membership, "saw_presence", saw_presence)


def nobody_refetches(patch: Patch) -> None:
    """Keep each peer on its own weights."""
    patch.setattr(chains.ChainView, "holds", lambda self, heard: False)
    patch.setattr(chains.ChainView, "best_of", lambda self, heads: None)


def signers_are_believed(patch: Patch) -> None:
    """Choose the chain by the tokens that a roster's signer claims."""

    def behind(chain: chains.Chain) -> int:
        return -1 if chain.head is None else chain.head.base_tokens

    patch.setattr(chains, "chain_holds", lambda theirs, ours, *_, **__: behind(theirs) > behind(ours))
    patch.setattr(state_search, "flaw", lambda chain, ours: None)
    patch.setattr(chains.Chains, "wrong_with", lambda self, roster: None)


def tokens_go_before_peers(patch: Patch) -> None:
    """Choose the chain with more tokens, however few peers of the last common roster continued with it."""
    patch.setattr(chains, "_electors", lambda ours, theirs, common: frozenset())
    holds = chains.chain_holds
    patch.setattr(chains, "chain_holds", lambda theirs, ours, *_, **__: holds(theirs, ours, chains.Stands()))


def who_stood_still_asks_nobody(patch: Patch) -> None:
    """Sign and merge after a suspension as if there had been none."""
    patch.setattr(rosters, "_unheard", lambda view, now: frozenset())


def chains_by_digest(patch: Patch) -> None:
    """Choose the chain by digest, whatever it contains."""

    def holds(theirs: chains.Chain, ours: chains.Chain, *_: object, **__: object) -> bool:
        return theirs.digest not in ours and (not ours.links or theirs.digest < ours.digest)

    patch.setattr(chains, "chain_holds", holds)


def silence_never_ends(patch: Patch) -> None:
    """Wait for everybody."""
    patch.setattr(rosters, "_silence_after_s", lambda view, peer, heard_s, unasked_s: math.inf)


def shares_are_waited_for(patch: Patch) -> None:
    """Wait for shares however long their owner takes."""
    patch.setattr(transfers, "share_due_s", lambda roster_at_s, own_share_at_s, silence_s: math.inf)


def nobody_counts_who_is_left(patch: Patch) -> None:
    """Let a stage's only peer move."""
    patch.setattr(balance._Table, "keeps", lambda self, stage, peer: 1)


def promises_are_not_kept(patch: Patch) -> None:
    """Let a peer that has promised to stay move."""
    patch.setattr(moves.StageLeases, "bound_s", lambda self, stage, now: 0.0)
    patch.setattr(moves.StageLeases, "bound", lambda self, now: ())


def promises_are_given_to_all(patch: Patch) -> None:
    """Give promises even while wanting to leave."""

    def asked(
        self: moves.StageLeases, request: moves.LeaseRequest, stages: Iterable[int], now: float
    ) -> tuple[moves.StageLease, str]:
        return moves.StageLease(request=request, lasts_s=self.lasts_s), "why not"

    patch.setattr(moves.StageLeases, "asked", asked)


def nobody_is_hidden(patch: Patch) -> None:
    """Ignore reports of peers that failed to dial it."""

    def told(self: hosts.Reachability, answers: Sequence[bool | None], now: float, rng: random.Random) -> str:
        self.state, self._due_s = hosts.Reach.DIALABLE, now + self.again_s
        return "why not"

    patch.setattr(hosts.Reachability, "told", told)


def numbers_are_not_checked(patch: Patch) -> None:
    """Accept infinite and NaN values."""
    patch.setattr(publications.SimulatedPublication, "is_finite", True)


def shards_are_added(patch: Patch) -> None:
    """Count repeated rows again."""

    def take(
        self: shards.Coverage, row: shards.CoverageRow, teller: str, explained: Callable[[str, int], int]
    ) -> str | None:
        old = self.row(row.peer)
        if row.peer != self.me:
            counts = row.counts if old is None else tuple(map(operator.add, old.counts, row.counts))
            self._put(shards.CoverageRow(row.peer, counts, row.shard))
        return None

    patch.setattr(shards.Coverage, "_take", take)


def finished_microbatches_are_forgotten(patch: Patch) -> None:
    """Compute a repeated request again."""
    finish = ledger.StageLedger._finish

    def forget(self: ledger.StageLedger, key: ledger.Key, *, counted: bool) -> None:
        finish(self, key, counted=counted)
        self._drivers[key.driver].finished.clear()

    patch.setattr(ledger.StageLedger, "_finish", forget)


def gradients_count_at_once(patch: Patch) -> None:
    """Count gradients when computed, acknowledged or not."""
    computed = ledger.StageLedger.computed

    def counted(self: ledger.StageLedger, key: ledger.Key, kind: ledger.Kind, now: float) -> None:
        computed(self, key, kind, now)
        if kind != "forward":
            self.acknowledge(key, 1.0, now)

    patch.setattr(ledger.StageLedger, "computed", counted)


def states_bring_no_counts(patch: Patch) -> None:
    """Drop a state's counts, and keep only its own."""
    patch.setattr(tally.Tally, "adopt", lambda self, counts, num_sources, now: None)


def archives_by_who_counts_higher(patch: Patch) -> None:
    """Archive a state if it counts more than the bootstrap, whatever it contains."""

    def is_wanted(self: archive.Archive, counts: Mapping[str, int], authors: Collection[str]) -> bool:
        adds = sum(counts.values()) > self.swarm.accounting.total
        if not adds:
            self.watch.archived(self._asked)
        return adds

    patch.setattr(archive.Archive, "is_wanted", is_wanted)


def bootstrap_keeps_no_counts(patch: Patch) -> None:
    """Keep the bootstrap's counts between archives in memory only."""
    restore = archive.Archive.restore

    def restored(self: archive.Archive, kept: Any) -> None:
        patch.setattr(self.manager, "restore_counts", lambda: None)
        restore(self, kept)

    patch.setattr(archive.Archive, "restore", restored)


def last_holder_goes_at_once(patch: Patch) -> None:
    """Let the last holder leave even while the bootstrap is away."""
    patch.setattr(departure, "LAST_HOLDER_S", 0.0)


def nobody_is_asked_to_stay(patch: Patch) -> None:
    """Let the last peer leave like any other."""
    patch.setattr(departure.DepartureQueue, "ask", lambda self, peer, now: False)


def who_was_killed_trains_on(patch: Patch) -> None:
    """Assume that every peer believed alive has what a leaver has."""

    def ask(self: departure.DepartureQueue, peer: str, now: float) -> bool:
        if now < self._taken_s.pop(peer, -math.inf) + 5.0:
            return False
        self._asked_s[peer] = self._began_s[peer] = now
        return all(self._asks(info.peer, now) for info in self._membership.volunteers())

    patch.setattr(departure.DepartureQueue, "ask", ask)


def nobody_asks_archives(patch: Patch) -> None:
    """Stop asking archives once training in rounds."""
    patch.setattr(archive_watch.ArchiveWatch, "ask", lambda self: None)


def old_folder_counts_anew(patch: Patch) -> None:
    """Ignore the others' counts of it when it restarts from an old folder."""
    patch.setattr(replica.Replica, "count_on", lambda self, own_tokens: None)


def first_sightings_earn_from_the_beginning(patch: Patch) -> None:
    """Let an unknown peer have trained for the whole age of the run."""

    def since_s(self: tally.Tally, key: tuple[str, int], now: float) -> float:
        account = self._accounts.get(key)
        return self.rules.began_s if account is None else account.explained_s

    patch.setattr(tally.Tally, "_since_s", since_s)


def one_source_is_believed(patch: Patch) -> None:
    """Believe a single source, whatever it counts."""
    patch.setattr(tally.Tally, "_room_for_adopted", lambda self, *args: 2**60)


def boasts_are_believed(patch: Patch) -> None:
    """Count of a large batch whatever a peer tells of itself."""
    patch.setattr(batch_end, "_PLAUSIBLE", math.inf)


def batches_go_on(patch: Patch) -> None:
    """Compute for a large batch until it is there, however long that takes."""
    begin = batch_end.BatchEnd.begin

    def endless(self: batch_end.BatchEnd, *args: Any, **more: Any) -> None:
        self.rules = dataclasses.replace(self.rules, round_limit_s=math.inf)
        begin(self, *args, **more)

    patch.setattr(batch_end.BatchEnd, "begin", endless)


def gradients_are_waited_for(patch: Patch) -> None:
    """Wait for the gradients of a large batch until the round's time limit."""
    init = engine.RoundEngine.__init__

    def patient(self: Any, membership: Any, its_chains: Any, rules: engine.RoundRules, *args: Any, **more: Any) -> None:
        init(self, membership, its_chains, dataclasses.replace(rules, max_wait_s=math.inf), *args, **more)

    patch.setattr(engine.RoundEngine, "__init__", patient)


def late_signer_asks_nobody(patch: Patch) -> None:
    """Sign at the time limit for those who happen to be known."""
    patch.setattr(rosters, "_first_answer_due_s", lambda view, peer, now: -math.inf)


NEEDS: dict[Callable[[Patch], None], tuple[str, ...]] = {
    states_say_not_what_entered_them: ("join",),
    bootstrap_keeps_no_counts: ("bootstrap crash", "bootstrap away"),
    last_holder_goes_at_once: ("everybody",),
    nobody_is_asked_to_stay: ("everybody",),
    who_was_killed_trains_on: ("everybody",),
    old_folder_counts_anew: ("old folder",),
    first_sightings_earn_from_the_beginning: ("liar joins",),
    one_source_is_believed: ("liar joins",),
    boasts_are_believed: ("lie: boasts", "lie: whole batch"),
    late_signer_asks_nobody: ("lie: never ends",),
}
"""Kinds of faults without which a broken rule cannot show: schedules without them are not played."""

BEGIN_AT: dict[Callable[[Patch], None], int] = {
    restored_ledger_is_empty: 28,
    states_say_not_what_entered_them: 164,
    rounds_without_a_least: 30,
    fastest_paces_all: 13,
    last_count_is_taken: 11,
    everything_told_is_believed: 16,
    numbers_are_not_checked: 15,
    bootstrap_keeps_no_counts: 50,
    who_was_killed_trains_on: 79,
}
"""Seed at which the search for each begins: it shows the fault, and from 0 it would take seconds to reach it."""

BROKEN: dict[Callable[[Patch], None], tuple[WorldKind, str]] = {
    ledger_takes_everything: ("gossip", "exactly once"),
    restored_ledger_is_empty: ("gossip", "exactly once"),
    states_say_not_what_entered_them: ("gossip", "exactly once"),
    old_rounds_are_merged: ("gossip", "nothing too old is merged"),
    rounds_without_a_least: ("gossip", "rounds are bounded"),
    fastest_paces_all: ("gossip", "one liar paces nobody"),
    last_count_is_taken: ("gossip", "totals only grow"),
    everything_told_is_believed: ("gossip", "claims are bounded"),
    shards_are_added: ("gossip", "no token counts twice"),
    nobody_is_hidden: ("gossip", "nobody is left alone"),
    numbers_are_not_checked: ("gossip", "weights are finite"),
    who_was_lost_stays_lost: ("rounds", "one model"),
    nobody_refetches: ("rounds", "one model"),
    signers_are_believed: ("rounds", "no lie moves a majority"),
    tokens_go_before_peers: ("rounds", "no lie moves a majority"),
    who_stood_still_asks_nobody: ("rounds", "no token is lost"),
    chains_by_digest: ("rounds", "totals only grow"),
    silence_never_ends: ("rounds", "nobody waits"),
    shares_are_waited_for: ("rounds", "one model"),
    nobody_counts_who_is_left: ("stages", "every stage is held again"),
    promises_are_not_kept: ("stages", "promises are kept"),
    promises_are_given_to_all: ("stages", "no move empties a stage"),
    gradients_count_at_once: ("microbatches", "exactly once"),
    finished_microbatches_are_forgotten: ("microbatches", "exactly once"),
    states_bring_no_counts: ("lives", "the learning rate never rises again"),
    archives_by_who_counts_higher: ("lives", "acknowledged work is archived"),
    bootstrap_keeps_no_counts: ("lives", "a run's tokens never fall"),
    last_holder_goes_at_once: ("lives", "who has what nobody else has waits"),
    nobody_is_asked_to_stay: ("lives", "nobody leaves with what nobody else has"),
    who_was_killed_trains_on: ("lives", "nobody leaves with what nobody else has"),
    old_folder_counts_anew: ("lives", "what is trained counts"),
    first_sightings_earn_from_the_beginning: ("lives", "claims are bounded"),
    one_source_is_believed: ("lives", "claims are bounded"),
    boasts_are_believed: ("batches", "no liar ends batches"),
    batches_go_on: ("batches", "batches end"),
    gradients_are_waited_for: ("batches", "nobody waits longer than max_wait_s"),
    late_signer_asks_nobody: ("batches", "who delivers in time counts"),
}
"""World that shows each, and the violated invariant: an error in the patch itself does not count."""

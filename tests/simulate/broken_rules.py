"""Rules of the product, each with one guard taken away: what the search for faults must find."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest

from swarmtrain.membership import balance, microbatches, partners, promises, rosters, tally
from swarmtrain.simulate import gossip, transfers, volunteer

__all__ = ["BROKEN"]

Patch = pytest.MonkeyPatch


def ledger_takes_everything(patch: Patch) -> None:
    """What was merged before is merged again."""

    def news(self: partners.Ledger, peer: str, mark: partners.Mark, reference_round: int) -> partners.News:
        if mark.part < 1:
            return partners.Nothing("it has published nothing yet")
        return partners.Whole(mark.tokens, "why not")

    patch.setattr(partners.Ledger, "news", news)


def restored_ledger_is_empty(patch: Patch) -> None:
    """A checkpoint's weights come back, and not what was merged into them."""
    patch.setattr(partners.Ledger, "load", lambda self, rows: None)


def old_rounds_are_merged(patch: Patch) -> None:
    """However far behind the median their author is."""
    news = partners.Ledger.news
    patch.setattr(partners.Ledger, "news", lambda self, peer, mark, _: news(self, peer, mark, -(10**9)))


def left_behind_a_round_later(patch: Patch) -> None:
    """As it was once: who is just too far behind to be merged does not take the others' weights."""

    real = partners.left_behind

    def later(round: int, others: Sequence[int], max_staleness_rounds: int) -> int:
        return real(round + 2, others, max_staleness_rounds)

    patch.setattr(gossip, "left_behind", later)


def rounds_without_a_least(patch: Patch) -> None:
    """Paced to the last step, and none."""
    patch.setattr(
        gossip, "paced_inner_steps", lambda own, reference, steps: min(steps, math.floor(own / reference * steps))
    )


def fastest_paces_all(patch: Patch) -> None:
    """What one claims of its speed is the measure for everybody."""
    patch.setattr(gossip, "reference_speed", max)


def last_count_is_taken(patch: Patch) -> None:
    """What a record says, also when it said more before."""

    def count_told(self: tally.Tally, key: tuple[str, int], believed: int) -> None:
        self._told[key] = believed

    patch.setattr(tally.Tally, "_count_told", count_told)


def counts_are_added(patch: Patch) -> None:
    """Not the greater of two, but their sum."""

    def merge(self: tally.Tally, other: tally.Tally) -> None:
        for mine, theirs in ((self._learned, other._learned), (self._told, other._told)):
            for key, tokens in theirs.items():
                mine[key] = mine.get(key, 0) + tokens

    patch.setattr(tally.Tally, "merge", merge)


def everything_told_is_believed(patch: Patch) -> None:
    """Whatever the speed of who says so."""
    patch.setattr(tally, "_OWN_FACTOR", math.inf)
    patch.setattr(tally, "_SWARM_FACTOR", 1e12)


def nobody_refetches(patch: Patch) -> None:
    """Everyone keeps to the weights that it has."""
    patch.setattr(rosters, "must_refetch", lambda applied, heard: False)
    patch.setattr(volunteer, "must_refetch", lambda applied, heard: False)


def who_stood_still_asks_nobody(patch: Patch) -> None:
    """It signs and merges as if it had not."""
    patch.setattr(rosters, "_unheard", lambda view, now: frozenset())


def rosters_by_attempt(patch: Patch) -> None:
    """The latest attempt holds, whatever is behind it."""
    patch.setattr(rosters, "_rank", lambda roster: (-roster.attempt, roster.digest))


def silence_never_ends(patch: Patch) -> None:
    """Everyone is waited for."""
    patch.setattr(rosters, "_silence_after_s", lambda view, peer, heard_s, unasked_s: math.inf)


def rosters_fit_any_weights(patch: Patch) -> None:
    """A roster is applied whatever its base."""

    def decide(view: rosters.RoundView, now: float) -> rosters.Decision:
        fitted = [dataclasses.replace(roster, base=view.base) for roster in view.rosters]
        return real(dataclasses.replace(view, rosters=fitted), now)

    real = rosters.decide
    patch.setattr(volunteer, "decide", decide)


def shares_are_waited_for(patch: Patch) -> None:
    """However long their owner takes."""
    patch.setattr(transfers, "share_due_s", lambda roster_at_s, own_share_at_s, silence_s: math.inf)


def nobody_counts_who_is_left(patch: Patch) -> None:
    """A stage's only peer is as good as any to move."""
    patch.setattr(balance._Table, "keeps", lambda self, stage, peer: 1)


def promises_are_not_kept(patch: Patch) -> None:
    """Who has promised to stay moves."""
    patch.setattr(promises.Stays, "bound_s", lambda self, stage, now: 0.0)
    patch.setattr(promises.Stays, "bound", lambda self, now: ())


def promises_are_given_to_all(patch: Patch) -> None:
    """Also by who wants to leave itself."""

    def asked(
        self: promises.Stays, request: promises.Request, stages: Iterable[int], now: float
    ) -> tuple[promises.Promise, str]:
        return promises.Promise(request=request, lasts_s=self.lasts_s), "why not"

    patch.setattr(promises.Stays, "asked", asked)


def records_never_expire(patch: Patch) -> None:
    """Who was seen once is counted for ever."""
    patch.setattr(balance, "live", lambda peers, now, rule: sorted(peers, key=lambda one: one.peer))


def finished_microbatches_are_forgotten(patch: Patch) -> None:
    """What is asked again is computed again."""
    finish = microbatches.StageLedger._finish

    def forget(self: microbatches.StageLedger, key: microbatches.Key, *, counted: bool) -> None:
        finish(self, key, counted=counted)
        self._drivers[key.driver].finished.clear()

    patch.setattr(microbatches.StageLedger, "_finish", forget)


def nothing_is_too_late(patch: Patch) -> None:
    """A driver is not told that what it acknowledges does not count any more."""
    settle = microbatches.StageLedger.settle

    def silently(self: microbatches.StageLedger, *said: Any) -> set[microbatches.Key]:
        settle(self, *said)
        return set()

    patch.setattr(microbatches.StageLedger, "settle", silently)


BROKEN: dict[Callable[[Patch], None], tuple[str, int]] = {}

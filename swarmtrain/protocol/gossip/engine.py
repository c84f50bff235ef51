"""Gossip: pull what partners published while this peer trains, and merge what has arrived. Nobody waits for anybody.

As late before a fragment's merge as the link allows, the engine asks a few partners for their newest weights or
pseudo-gradients (`pulls` decides how many, and when). It has what arrives checked and decoded, and has a merge of all
that is here prepared in the background. When the merge is due the trainer takes what is ready; what arrives later
enters the next merge. A partner that has nothing new, is busy, slow, gone or wrong loses its place, and another is
tried.

    engine = GossipEngine(me, settings)
    commands = engine.receive(event, now)      # execute them, and report the end of each by an event
    engine.wake_at()                           # when to send the next `PullTimerFired`

Events of pulls that were given up are ignored. Publications, payloads and prepared merges are opaque handles that the
engine returns as they came: it has no thread, clock, socket or tensor.

Which module decides what:
- `peers`, `partners`: whom to ask, and from which round staleness is measured; `open_pulls`: who is left alone;
- `pull_schedule`, `pulls`: when pulls are due, and how many; `merge_plans`: when fragments are merged;
- `started_pulls`: what follows from an answer, a download and a failure;
- `merged`: what of a publication is new, and whose counter is wrong;
- `merge_preparation`: which merges are prepared, and what is dropped if one cannot be.

This module does what concerns several of them: the check whether a pull is due, the start of a round, the merge, and
pauses. The parts return whether more follows and call nobody back, so that the order of commands is visible here
(decision 72).
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic

from swarmtrain.methods.method import GradientFormat
from swarmtrain.protocol.gossip.advertised import AdvertisedFragments
from swarmtrain.protocol.gossip.merge_plans import MergePlan
from swarmtrain.protocol.gossip.merge_preparation import MergePreparation
from swarmtrain.protocol.gossip.merged import MergedPublications
from swarmtrain.protocol.gossip.messages import (
    ConsensusTaken,
    FetchConsensus,
    GossipCommand,
    GossipEvent,
    Held,
    LinkRateAssumed,
    MergeDue,
    MergeFragment,
    MergePrepared,
    MergesPlanned,
    PartnerReplied,
    PartnersChanged,
    Payload,
    PeerCalled,
    PublicationDecoded,
    PublicationDownloaded,
    PullFailed,
    PullsPaused,
    PullTimerFired,
    Ready,
    RouteFound,
)
from swarmtrain.protocol.gossip.open_pulls import OpenPulls
from swarmtrain.protocol.gossip.partners import Ledger, Partners, Place, PublicationVersion
from swarmtrain.protocol.gossip.peers import OtherPeers, PartnerChoice
from swarmtrain.protocol.gossip.pull_schedule import Due, PullSchedule
from swarmtrain.protocol.gossip.pulls import (
    GroupName,
    GroupRule,
    PublicationBytes,
    WantedPartners,
    gradient_format,
    most_pulls,
    total_bytes,
)
from swarmtrain.protocol.gossip.started_pulls import GossipPull, GossipPulls
from swarmtrain.protocol.gossip.state import CommandList, FragmentState, ReadyMerge, ReceivedPublications
from swarmtrain.run import MergeSection


@dataclass(frozen=True, kw_only=True)
class GossipSettings:
    """Settings of a run's publications and merges."""

    sizes: Sequence[Mapping[GradientFormat, PublicationBytes]]
    """Sizes by the format of pseudo-gradients, coarsest first, for each fragment."""
    groups: Mapping[GroupName, GroupRule]
    """Tensor groups to pull, in this order, and how a merge uses each; exactly one has the rule "outer step"."""
    wanted: WantedPartners
    num_parts: int
    """Number of parts into which a round's pseudo-gradients are divided."""
    max_staleness_rounds: int
    variant: str = "uniform"
    """Way of choosing partners; see `partners.VARIANTS`."""
    is_large: bool = False
    """True to prepare one merge at a time, because a prepared merge takes much memory."""

    @classmethod
    def of(
        cls,
        merge: MergeSection,
        groups: Mapping[GroupName, GroupRule],
        sizes: Sequence[Mapping[GradientFormat, PublicationBytes]],
        *,
        is_large: bool = False,
    ) -> GossipSettings:
        """Build the settings from a run file's `[merge]` section and the fragments' sections and sizes."""
        return cls(
            groups=groups,
            sizes=sizes,
            wanted=WantedPartners(merge.num_partners, merge.num_weights),
            num_parts=merge.publications_per_round,
            max_staleness_rounds=merge.max_staleness_rounds,
            variant=merge.partners,
            is_large=is_large,
        )


class GossipEngine(Generic[Held, Payload, Ready]):
    """State and decisions of one peer's gossip. Threads that share it must hold one lock around every call."""

    def __init__(
        self,
        me: str,
        settings: GossipSettings,
        rng: random.Random | None = None,
        host_rng: random.Random | None = None,
        tellings: AdvertisedFragments | None = None,
    ) -> None:
        self._settings, rng = settings, rng or random.Random()
        tellings = tellings or AdvertisedFragments(len(settings.sizes), settings.num_parts)
        self._commands = CommandList[Held, Payload, Ready]()
        self._others = OtherPeers(me, tellings, host_rng or random.Random())
        self._schedule = PullSchedule(settings.groups, settings.sizes, settings.wanted)
        self._states = [self._state_of_fragment(number, rng) for number in range(len(settings.sizes))]
        self._pulls = GossipPulls(self._states, settings.num_parts, self._others, self._schedule, self._commands)
        self._preparation = MergePreparation(
            self._states, self._others, self._schedule, self._commands, is_large=settings.is_large
        )
        formats = settings.sizes[0]
        self._whole = {format: total_bytes(each[format] for each in settings.sizes) for format in formats}

    def _state_of_fragment(self, number: int, rng: random.Random) -> FragmentState[Held, Payload, Ready]:
        settings, back_off = self._settings, self._others.back_off
        ledger = Ledger(settings.max_staleness_rounds, settings.num_parts, settings.wanted.gradients)
        opened = OpenPulls(back_off, most_pulls(settings.wanted))
        partners = Partners(ledger, back_off, settings.variant, rng)
        leading, is_fragment = next(iter(settings.groups)), len(settings.sizes) > 1
        choice = PartnerChoice(number, self._others, partners, opened, leading, is_fragment=is_fragment)
        merged = MergedPublications[Held](ledger, settings.groups)
        return FragmentState(number, opened, ReceivedPublications(), merged, choice)

    # ------------------------------------------------------------- what may be asked at any time

    def wake_at(self) -> float | None:
        """Return the time at which to send `PullTimerFired`; None: not before another event."""
        return self._schedule.wake_s

    @property
    def has_plans(self) -> bool:
        """True if merges are planned."""
        return bool(self._schedule.plans)

    @property
    def bytes_per_s(self) -> float | None:
        """Link rate of the last pulls; None before the first."""
        return self._schedule.times.bytes_per_s

    @property
    def partner_bytes(self) -> int:
        """Bytes of one partner's weights and pseudo-gradient, of all fragments, in the coarsest format."""
        return next(iter(self._whole.values())).both

    def gradient_format(self, round_s: float, up_bytes_per_s: float | None = None) -> GradientFormat:
        """Choose the format of this peer's pseudo-gradients for a round of `round_s` seconds (0: unknown).

        The slower of the measured download rate and the limit for uploads counts.
        """
        rate = self._schedule.times.bytes_per_s
        slower = min(rate, up_bytes_per_s) if rate and up_bytes_per_s else rate
        return gradient_format(self._whole, len(self._others.infos), round_s, slower, self._settings.wanted)

    def places(self, round: int) -> list[dict[str, Place]]:
        """For each fragment, map each peer to the place up to which this peer's weights contain its publications.
        `round` is the last round that this peer has ended."""
        me, merges = self._others.me, self._schedule.merges
        return [state.merged.places(me, max(round, merges[state.number].merged_round)) for state in self._states]

    def is_left_alone(self, peer: str) -> bool:
        """Return whether the engine avoids `peer` because of busy answers or failures, which `PeerCalled` could
        change."""
        return self._others.back_off.has_banned(peer)

    def merged_version(self, fragment: int, peer: str) -> PublicationVersion | None:
        """Return the version up to which the pseudo-gradients of `peer` are merged; None if none is."""
        return self._states[fragment].merged.ledger.version(peer)

    def pulled_version(self, fragment: int, peer: str) -> PublicationVersion | None:
        """Return the version of the newest pulled pseudo-gradient of `peer` that waits to be merged; None if there is
        none."""
        pulled, rules = self._states[fragment].received.pulled, self._settings.groups
        here = [each.version for each in pulled if each.peer == peer and rules[each.group] == "outer step"]
        return here[-1] if here else None

    def rows(self) -> list[list[list[str | int]]]:
        """Return for each fragment the rows of its ledger, for a checkpoint."""
        return [state.merged.rows() for state in self._states]

    def load(self, rows: Sequence[Iterable[Sequence[object]]]) -> None:
        """Restore the ledgers from `rows`. Raise ValueError if they are malformed."""
        for state, each in zip(self._states, rows, strict=True):
            state.merged.load(each)

    # ------------------------------------------------------------- events

    def receive(
        self, event: GossipEvent[Held, Payload, Ready], now: float
    ) -> list[GossipCommand[Held, Payload, Ready]]:
        """Return the commands that follow from an event at time `now`, in seconds of the caller's clock."""
        self._commands.take()  # commands of an event that raised an error
        match event:
            case PartnerReplied():
                self._pulls.replied(event, now)
            case PublicationDownloaded():
                self._pulls.downloaded(event, now)
            case PublicationDecoded():
                if self._pulls.decoded(event, now):
                    self._prepare_more(now)
            case MergePrepared():
                self._prepared(event.number, event.merge, now)
            case PullTimerFired():
                self._look(now)
            case PullFailed():
                self._pulls.failed(event, now)
            case RouteFound():
                self._pulls.routed(event, now)
            case PeerCalled():
                self._others.back_off.called(event.peer, now)
                if self.is_left_alone(event.peer):  # otherwise it could be asked before this call as well
                    self._look_if_short(now)
            case PartnersChanged():
                if self._others.changed(event.volunteers) and self._schedule.plans:
                    self._schedule.look_by(now)
                self._look_if_short(now)
            case MergeDue():
                self._merge_due(event, now)
            case MergesPlanned():
                self._planned(event.round, event.plans, now)
            case LinkRateAssumed():
                self._schedule.assume(event.bytes_per_s, now)
            case ConsensusTaken():
                self._took_states(event)
            case PullsPaused():
                self._rest()
        return self._commands.take()

    # ------------------------------------------------------------- looking whether a pull is due

    def _look(self, now: float) -> None:
        """Begin the pulls that are due, and others in place of pulls that failed."""
        self._schedule.looks()
        for due in self._schedule.due(len(self._others.infos), now):
            for fragment in due.fragments:
                state = self._states[fragment]
                if state.may_want(due.group, due.number):
                    self._ask_due(state, due, now)

    def _ask_due(self, state: FragmentState[Held, Payload, Ready], due: Due, now: float) -> None:
        """Begin pulls until as many as are due have arrived or are on their way."""
        group, here = due.group, state.received.here
        while state.open.is_wanted(group, due.number, here, due.slow_after_s, now):
            peer = state.choice.choose(group, due.plan.round, here, now)
            if peer is None:
                self._schedule.is_short = True
                self._schedule.look_by(state.choice.next_free_s(group, now))
                break
            self._pulls.begin(state, group, peer, self._schedule.begins_pull(state.number, due.plan), now)
        self._schedule.look_by(state.open.next_slow_s(group, due.slow_after_s, now))

    def _look_if_short(self, now: float) -> None:
        """Schedule a check soon if pulls were due for which no peer could be asked: one may be available then."""
        if self._schedule.is_short:
            self._schedule.look_by(now)

    def _look_if_moved(self, now: float) -> None:
        """Check at once after a successful pull only if the fragment still has fewer publications than are due by
        now."""
        for due in self._schedule.due(len(self._others.infos), now):
            for fragment in due.fragments:
                state = self._states[fragment]
                if not state.may_want(due.group, due.number):
                    continue
                if state.open.is_wanted(due.group, due.number, state.received.here, due.slow_after_s, now):
                    self._schedule.look_by(now)
                    return

    # ------------------------------------------------------------- preparing

    def _prepare_more(self, now: float) -> None:
        """Prepare merges until every received publication is in one; then all pulls that were decoded have ended."""
        if not self._preparation.more():
            for pull in self._pulls.take_decoded():
                self._end_prepared(pull, now)

    def _end_prepared(self, pull: GossipPull[Held], now: float) -> None:
        if self._pulls.end_prepared(pull, now):
            self._look_if_moved(now)

    def _prepared(self, number: int, merge: Ready | None, now: float) -> None:
        if self._preparation.prepared(number, merge, now):
            self._prepare_more(now)

    # ------------------------------------------------------------- rounds and merges

    def _planned(self, round: int, plans: Sequence[MergePlan], now: float) -> None:
        self._others.enter_round(round)
        for fragment in self._schedule.planned(plans):
            self._states[fragment].received.ready = None
            self._states[fragment].open.round_begins(now)
        self._pulls.give_up(self._schedule.old_s(now))
        for state in self._states:
            state.merged.forget_all_but(self._others.infos)
        if any(state.received.pulled for state in self._states):
            self._prepare_more(now)
        self._schedule.look_when_due(len(self._others.infos), now)

    def _merge_due(self, event: MergeDue, now: float) -> None:
        """Merge a fragment with the prepared merge of its round, or with nothing. At a round's end, catch up first if
        that is necessary."""
        # This comes before anything counts as merged: otherwise the last fragment's publications would be recorded as
        # merged into weights that are replaced (decision 65).
        if event.may_catch_up and event.fragment == len(self._states) - 1:
            behind = self._others.left_behind(event.round, self._states[-1].merged.ledger)
            if behind:
                self._commands.add(FetchConsensus(behind))
                return
        state = self._states[event.fragment]
        ready = state.received.take_ready()
        self._schedule.merge_due(event.fragment, event.round, now)
        is_ready = ready is not None and ready.round == event.round
        self._commands.add(self._merge(state, ready) if ready is not None and is_ready else MergeFragment(state.number))

    def _merge(
        self, state: FragmentState[Held, Payload, Ready], ready: ReadyMerge[Held, Payload, Ready]
    ) -> MergeFragment[Held, Payload, Ready]:
        """Record what is ready as merged.

        If some of it has become too old, merge this peer's own round alone, and have the rest prepared for the next
        round.
        """
        reference, received = self._others.reference_round(), state.received
        of_use = state.merged.of_use(received.pulled, reference)
        if any(pulled not in of_use for pulled in ready.pulled):
            received.hold(of_use)
            return MergeFragment(state.number)
        rest = [pulled for pulled in of_use if pulled not in ready.pulled]
        state.merged.merged(ready.pulled, reference)
        received.hold(state.merged.of_use(rest, reference))
        state.choice.ledger_changed()
        return MergeFragment(state.number, ready.merge, ready.pulled)

    def _took_states(self, event: ConsensusTaken) -> None:
        heard = {info.peer: info.round for info in self._others.infos}
        heard |= {peer: max(round, heard.get(peer, 0)) for peer, round in event.rounds.items()}
        for state in self._states:
            state.received.forget()
            state.merged.took_states([each[state.number] for each in event.advertised], heard, event.round)
            state.choice.ledger_changed()

    def _rest(self) -> None:
        self._pulls.stop()
        self._preparation.stop()
        self._schedule.rest()
        for state in self._states:
            state.received.forget()

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
    Section,
    SectionBytes,
    SectionRule,
    WantedPartners,
    gradient_format,
    most_pulls,
    total_bytes,
)
from swarmtrain.protocol.gossip.started_pulls import GossipPull, GossipPulls
from swarmtrain.protocol.gossip.state import CommandList, FragmentState, ReadyMerge, ReceivedPublications
from swarmtrain.run import GradientFormat, MergeSection

__all__ = ["GossipEngine", "GossipSettings"]


@dataclass(frozen=True, kw_only=True)
class GossipSettings:
    """Settings of a run's publications and merges."""

    sizes: Sequence[Mapping[GradientFormat, SectionBytes]]
    """Sizes by the format of pseudo-gradients, coarsest first, for each fragment."""
    sections: Mapping[Section, SectionRule]
    """Sections to pull, in this order, and how a merge uses each; exactly one has the rule "outer step"."""
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
        sections: Mapping[Section, SectionRule],
        sizes: Sequence[Mapping[GradientFormat, SectionBytes]],
        *,
        is_large: bool = False,
    ) -> GossipSettings:
        """Build the settings from a run file's `[merge]` section and the fragments' sections and sizes."""
        return cls(
            sections=sections,
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
        self._schedule = PullSchedule(settings.sections, settings.sizes, settings.wanted)
        self._lanes = [self._lane(number, rng) for number in range(len(settings.sizes))]
        self._pulls = GossipPulls(self._lanes, settings.num_parts, self._others, self._schedule, self._commands)
        self._preparation = MergePreparation(
            self._lanes, self._others, self._schedule, self._commands, is_large=settings.is_large
        )
        formats = settings.sizes[0]
        self._whole = {format: total_bytes(each[format] for each in settings.sizes) for format in formats}

    def _lane(self, number: int, rng: random.Random) -> FragmentState[Held, Payload, Ready]:
        settings, back_off = self._settings, self._others.back_off
        ledger = Ledger(settings.max_staleness_rounds, settings.num_parts, settings.wanted.gradients)
        opened = OpenPulls(back_off, most_pulls(settings.wanted))
        partners = Partners(ledger, back_off, settings.variant, rng)
        leading, is_part = next(iter(settings.sections)), len(settings.sizes) > 1
        choice = PartnerChoice(number, self._others, partners, opened, leading, is_part=is_part)
        merged = MergedPublications[Held](ledger, settings.sections)
        return FragmentState(number, opened, ReceivedPublications(), merged, choice)

    # ------------------------------------------------------------- what may be asked at any time

    def wake_at(self) -> float | None:
        """Return when to send `PullTimerFired`; None: not before another event."""
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
        """Return for each fragment up to where this peer's weights contain each peer; `round` is the last that it has
        ended."""
        me, merges = self._others.me, self._schedule.merges
        return [lane.merged.places(me, max(round, merges[lane.number].merged_round)) for lane in self._lanes]

    def is_left_alone(self, peer: str) -> bool:
        """Return whether anything is held against `peer`, so that `PeerCalled` could change something."""
        return self._others.back_off.has_banned(peer)

    def merged_mark(self, fragment: int, peer: str) -> PublicationVersion | None:
        """Return up to where the pseudo-gradients of `peer` were merged; None if none was."""
        return self._lanes[fragment].merged.ledger.mark(peer)

    def pulled_mark(self, fragment: int, peer: str) -> PublicationVersion | None:
        """Return up to where the pseudo-gradients of `peer` that wait to be merged go; None without any."""
        pulled, rules = self._lanes[fragment].received.pulled, self._settings.sections
        here = [each.mark for each in pulled if each.peer == peer and rules[each.section] == "outer step"]
        return here[-1] if here else None

    def rows(self) -> list[list[list[str | int]]]:
        """Return for each fragment the rows of its ledger, for a checkpoint."""
        return [lane.merged.rows() for lane in self._lanes]

    def load(self, rows: Sequence[Iterable[Sequence[object]]]) -> None:
        """Restore the ledgers from `rows`. Raise ValueError for anything else."""
        for lane, each in zip(self._lanes, rows, strict=True):
            lane.merged.load(each)

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
        """Begin the pulls that are due: as many as there should be by now, and others in place of those that failed."""
        self._schedule.looks()
        for due in self._schedule.due(len(self._others.infos), now):
            for fragment in due.fragments:
                lane = self._lanes[fragment]
                if lane.may_want(due.section, due.number):
                    self._ask_due(lane, due, now)

    def _ask_due(self, lane: FragmentState[Held, Payload, Ready], due: Due, now: float) -> None:
        """Begin pulls until as many as are due have arrived or are on their way."""
        section, here = due.section, lane.received.here
        while lane.open.is_wanted(section, due.number, here, due.slow_after_s, now):
            peer = lane.choice.choose(section, due.plan.round, here, now)
            if peer is None:
                self._schedule.is_short = True
                self._schedule.look_by(lane.choice.next_free_s(section, now))
                break
            self._pulls.begin(lane, section, peer, self._schedule.begins_pull(lane.number, due.plan), now)
        self._schedule.look_by(lane.open.next_slow_s(section, due.slow_after_s, now))

    def _look_if_short(self, now: float) -> None:
        """Check soon if pulls were due for which there was nobody to ask: somebody may be there now."""
        if self._schedule.is_short:
            self._schedule.look_by(now)

    def _look_if_moved(self, now: float) -> None:
        """Check at once after a successful pull only if still fewer are here than are due by now."""
        for due in self._schedule.due(len(self._others.infos), now):
            for fragment in due.fragments:
                lane = self._lanes[fragment]
                if not lane.may_want(due.section, due.number):
                    continue
                if lane.open.is_wanted(due.section, due.number, lane.received.here, due.slow_after_s, now):
                    self._schedule.look_by(now)
                    return

    # ------------------------------------------------------------- preparing

    def _prepare_more(self, now: float) -> None:
        """Prepare merges until everything here is in one; then all pulls that were decoded have ended."""
        if not self._preparation.more():
            for pull in self._pulls.take_settling():
                self._settled(pull, now)

    def _settled(self, pull: GossipPull[Held], now: float) -> None:
        if self._pulls.settled(pull, now):
            self._look_if_moved(now)

    def _prepared(self, number: int, merge: Ready | None, now: float) -> None:
        if self._preparation.prepared(number, merge, now):
            self._prepare_more(now)

    # ------------------------------------------------------------- rounds and merges

    def _planned(self, round: int, plans: Sequence[MergePlan], now: float) -> None:
        self._others.enter_round(round)
        for fragment in self._schedule.planned(plans):
            self._lanes[fragment].received.ready = None
            self._lanes[fragment].open.round_begins(now)
        self._pulls.give_up(self._schedule.old_s(now))
        for lane in self._lanes:
            lane.merged.forget_all_but(self._others.infos)
        if any(lane.received.pulled for lane in self._lanes):
            self._prepare_more(now)
        self._schedule.look_when_due(len(self._others.infos), now)

    def _merge_due(self, event: MergeDue, now: float) -> None:
        """Merge a fragment with what is ready for its round, or alone; at a round's end, catch up first if it is
        needed."""
        # This comes before anything counts as merged: otherwise the last fragment's publications would be recorded as
        # merged into weights that are replaced (decision 65).
        if event.may_catch_up and event.fragment == len(self._lanes) - 1:
            behind = self._others.left_behind(event.round, self._lanes[-1].merged.ledger)
            if behind:
                self._commands.add(FetchConsensus(behind))
                return
        lane = self._lanes[event.fragment]
        ready = lane.received.take_ready()
        self._schedule.merge_due(event.fragment, event.round, now)
        is_ready = ready is not None and ready.round == event.round
        self._commands.add(self._merge(lane, ready) if ready is not None and is_ready else MergeFragment(lane.number))

    def _merge(
        self, lane: FragmentState[Held, Payload, Ready], ready: ReadyMerge[Held, Payload, Ready]
    ) -> MergeFragment[Held, Payload, Ready]:
        """Record what is ready as merged.

        If some of it has become too old, merge this peer's own round alone, and have the rest prepared for the next
        round.
        """
        reference, received = self._others.reference_round(), lane.received
        of_use = lane.merged.of_use(received.pulled, reference)
        if any(pulled not in of_use for pulled in ready.pulled):
            received.hold(of_use)
            return MergeFragment(lane.number)
        rest = [pulled for pulled in of_use if pulled not in ready.pulled]
        lane.merged.merged(ready.pulled, reference)
        received.hold(lane.merged.of_use(rest, reference))
        lane.choice.ledger_changed()
        return MergeFragment(lane.number, ready.merge, ready.pulled)

    def _took_states(self, event: ConsensusTaken) -> None:
        heard = {info.peer: info.round for info in self._others.infos}
        heard |= {peer: max(round, heard.get(peer, 0)) for peer, round in event.rounds.items()}
        for lane in self._lanes:
            lane.received.forget()
            lane.merged.took_states([each[lane.number] for each in event.told], heard, event.round)
            lane.choice.ledger_changed()

    def _rest(self) -> None:
        self._pulls.stop()
        self._preparation.stop()
        self._schedule.rest()
        for lane in self._lanes:
            lane.received.forget()

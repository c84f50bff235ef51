"""Gossip: pull what partners published while this peer trains, and merge what is ready. Nobody waits for anybody.

As late before a fragment's merge as the link allows, a few partners are asked for their newest weights or
pseudo-gradient (`pulls` says of how many, and when). What comes is checked, decoded, and a merge of all that is here is
prepared; when it is time the trainer takes what is ready. What comes later enters the next merge. Whoever has nothing
new, is busy, slow, gone or wrong costs its place, and another is tried.

    engine = GossipEngine(me, settings)
    commands = engine.receive(event, now)      # do them, and tell how each ended by an event
    engine.wake_at()                           # when `PullTimerFired` is wanted next

An event that comes too late, since its pull was given up, is dropped. What is held, decoded and prepared is opaque: it
is handed back as it came. There is no thread, clock, socket or tensor in here.

Where it is decided:
- whom to ask, and from which round staleness is measured: `gossip_peers`, `partners`; who is left alone: `open_pulls`;
- when pulls are due, and how many: `pull_schedule`, `pulls`; when fragments are merged: `merge_plans`;
- what follows from an answer, from bytes that came, and from a failure: `gossip_pulls`;
- what of a publication is new, and whose counter is wrong: `gossip_merged`;
- which merges are prepared, and what is dropped where none can be: `merge_preparation`.

What goes across these is here: looking whether a pull is due, the beginning of a round, the merge, and rest.
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
    """What the run file says about publications and about merging them."""

    sizes: Sequence[Mapping[GradientFormat, SectionBytes]]
    """Of each fragment, by the format of pseudo-gradients, the coarsest first."""
    sections: Mapping[Section, SectionRule]
    """What of a partner is pulled, in that order, and what a merge makes of it; one with the rule "outer step"."""
    wanted: WantedPartners
    num_parts: int
    """Into how many parts a round's pseudo-gradients are divided."""
    max_staleness_rounds: int
    variant: str = "uniform"
    """How partners are chosen."""
    is_large: bool = False
    """Prepare one merge after the other, since what is prepared takes much memory."""

    @classmethod
    def of(
        cls,
        merge: MergeSection,
        sections: Mapping[Section, SectionRule],
        sizes: Sequence[Mapping[GradientFormat, SectionBytes]],
        *,
        is_large: bool = False,
    ) -> GossipSettings:
        """By a run file's section on merging, of fragments with these sections, of these sizes."""
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
    """All that one peer's gossip knows and decides. One lock lies around every call, if several threads call."""

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
        """When `PullTimerFired` is wanted; None: not before another event."""
        return self._schedule.wake_s

    @property
    def has_plans(self) -> bool:
        """Merges are planned."""
        return bool(self._schedule.plans)

    @property
    def bytes_per_s(self) -> float | None:
        """What the link carried in the last pulls; None before the first."""
        return self._schedule.times.bytes_per_s

    @property
    def partner_bytes(self) -> int:
        """A partner's weights and pseudo-gradient, of all fragments, in the coarsest format."""
        return next(iter(self._whole.values())).both

    def gradient_format(self, round_s: float, up_bytes_per_s: float | None = None) -> GradientFormat:
        """In which format to publish pseudo-gradients in a round that lasts so long (0: it is not known). What may be
        sent limits it as what is received does."""
        rate = self._schedule.times.bytes_per_s
        slower = min(rate, up_bytes_per_s) if rate and up_bytes_per_s else rate
        return gradient_format(self._whole, len(self._others.infos), round_s, slower, self._settings.wanted)

    def places(self, round: int) -> list[dict[str, Place]]:
        """Up to where each peer is in this one's weights, of each fragment; `round` is the last that it has ended."""
        me, merges = self._others.me, self._schedule.merges
        return [lane.merged.places(me, max(round, merges[lane.number].merged_round)) for lane in self._lanes]

    def is_left_alone(self, peer: str) -> bool:
        """Whether `peer` is held something against, which `PeerCalled` may end."""
        return self._others.back_off.has_banned(peer)

    def merged_mark(self, fragment: int, peer: str) -> PublicationVersion | None:
        """Up to where the pseudo-gradients of `peer` were merged; None if none was."""
        return self._lanes[fragment].merged.ledger.mark(peer)

    def pulled_mark(self, fragment: int, peer: str) -> PublicationVersion | None:
        """The same of what was pulled and waits to be merged."""
        pulled, rules = self._lanes[fragment].received.pulled, self._settings.sections
        here = [each.mark for each in pulled if each.peer == peer and rules[each.section] == "outer step"]
        return here[-1] if here else None

    def rows(self) -> list[list[list[str | int]]]:
        """What was merged of whom, of each fragment, for a checkpoint."""
        return [lane.merged.rows() for lane in self._lanes]

    def load(self, rows: Sequence[Iterable[Sequence[object]]]) -> None:
        """Go on from what `rows` gave. ValueError if they are anything else."""
        for lane, each in zip(self._lanes, rows, strict=True):
            lane.merged.load(each)

    # ------------------------------------------------------------- events

    def receive(
        self, event: GossipEvent[Held, Payload, Ready], now: float
    ) -> list[GossipCommand[Held, Payload, Ready]]:
        """What follows from what happened at `now`, in seconds of one clock."""
        self._commands.take()  # of an event that was refused
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
                if self.is_left_alone(event.peer):  # else it could be asked before too
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
        """Ask as many partners as there should be by now, others in place of those that fail, until the merges."""
        self._schedule.looks()
        for due in self._schedule.due(len(self._others.infos), now):
            for fragment in due.fragments:
                lane = self._lanes[fragment]
                if lane.may_want(due.section, due.number):
                    self._ask_due(lane, due, now)

    def _ask_due(self, lane: FragmentState[Held, Payload, Ready], due: Due, now: float) -> None:
        """Begin pulls until as many are here or on their way as are due."""
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
        """Somebody may be there now for what there was nobody to ask for."""
        if self._schedule.is_short:
            self._schedule.look_by(now)

    def _look_if_moved(self, now: float) -> None:
        """A pull has brought what it was for: more is asked for at once only where less is here than is due by now."""
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
        """Until there is nothing to prepare: then all that was decoded has ended."""
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
        """What is ready counts as merged from here on. If some of it is too old by now, the rest is prepared anew for
        the next round."""
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

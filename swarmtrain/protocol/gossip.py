"""Gossip: pull what partners published while this peer trains, and merge what is ready. Nobody waits for anybody.

As late before a fragment's merge as the link allows, a few partners are asked for their newest weights or
pseudo-gradient (`pulls` says of how many, and when). What comes is checked, decoded, and a merge of all that is here is
prepared; when it is time the trainer takes what is ready. What comes later enters the next merge. Whoever has nothing
new, is busy, slow, gone or wrong costs its place, and another is tried.

    engine = GossipEngine(me, settings)
    commands = engine.receive(event, now)      # do them, and tell how each ended by an event
    engine.wake_at()                           # when `Woke` is wanted next

An event that comes too late, since its pull was given up, is dropped. What is held, decoded and prepared is opaque: it
is handed back as it came. There is no thread, clock, socket or tensor in here.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic

from swarmtrain.protocol.fragments import steps_of_fragment
from swarmtrain.protocol.gossip_messages import (
    Ask,
    Called,
    Cancel,
    CatchUp,
    Decode,
    Decoded,
    Download,
    Downloaded,
    Failed,
    Failure,
    GossipCommand,
    GossipEvent,
    Held,
    LeftAlone,
    LinkAssumed,
    Merge,
    MergeDue,
    Payload,
    PeersChanged,
    Planned,
    Prepare,
    Prepared,
    Pulled,
    Ready,
    Replied,
    Report,
    Rested,
    Route,
    Routed,
    Told,
    TookStates,
    Woke,
)
from swarmtrain.protocol.gossip_state import (
    DueOfLane,
    DuePulls,
    GossipLane,
    GossipPull,
    LaneView,
    Preparing,
    ReadyMerge,
)
from swarmtrain.protocol.hosts import HostOrder
from swarmtrain.protocol.lifecycle import PeerInfo
from swarmtrain.protocol.merge_plans import MergePlan
from swarmtrain.protocol.open_pulls import OpenPulls, Which
from swarmtrain.protocol.partners import (
    BackOff,
    Difference,
    Ledger,
    Mark,
    News,
    Nothing,
    Partners,
    Place,
    Theta,
    agreed_places,
    left_behind,
    median_round,
)
from swarmtrain.protocol.pulls import (
    SECTIONS,
    PullTimes,
    Section,
    SectionBytes,
    Wanted,
    gradient_format,
    most_pulls,
    plan_pulls,
    round_began_s,
    total_bytes,
)
from swarmtrain.protocol.tellings import Tellings, beyond
from swarmtrain.run import GradientFormat, MergeSection

__all__ = ["GossipEngine", "GossipSettings"]

_LEFT_OUT_S = 0.25
_OLD_PULL_S = 30.0
_OLD_PULL_ROUNDS = 2
_RESTART_ROUNDS = 3
"""A peer that was killed and went on from its checkpoint is behind what it had published by so many rounds."""
_OF_A_PULL = (Replied, Downloaded, Decoded, Failed, Routed)


@dataclass(frozen=True, kw_only=True)
class GossipSettings:
    """What the run file says about publications and about merging them."""

    sizes: Sequence[Mapping[GradientFormat, SectionBytes]]
    """Of each fragment, by the format of pseudo-gradients, the coarsest first."""
    wanted: Wanted
    num_parts: int
    """Into how many parts a round's pseudo-gradients are divided."""
    max_staleness_rounds: int
    variant: str = "uniform"
    """How partners are chosen."""
    is_large: bool = False
    """Prepare one merge after the other, since what is prepared takes much memory."""

    @classmethod
    def of(
        cls, merge: MergeSection, sizes: Sequence[Mapping[GradientFormat, SectionBytes]], *, is_large: bool = False
    ) -> GossipSettings:
        """By a run file's section on merging, of fragments of these sizes."""
        return cls(
            sizes=sizes,
            wanted=Wanted(merge.num_partners, merge.num_weights),
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
        tellings: Tellings | None = None,
    ) -> None:
        self._me, self._settings, self._rng = me, settings, rng or random.Random()
        self._back_off = BackOff()
        self._hosts = HostOrder(me, host_rng or random.Random())
        self._tellings = tellings or Tellings(len(settings.sizes), settings.num_parts)
        self._times = PullTimes()
        formats = settings.sizes[0]
        self._whole = {format: total_bytes(each[format] for each in settings.sizes) for format in formats}
        self._lanes = [self._lane(number) for number in range(len(settings.sizes))]
        self._round = 0
        self._others: Sequence[PeerInfo] = ()
        self._reference: int | None = None
        self._hidden: dict[str, tuple[str, ...]] | None = None
        """Those of them that nobody can dial, with their hosts; None until somebody is asked."""
        self._plans: Sequence[MergePlan] = ()
        self._pull_plans: dict[tuple[int, ...], DuePulls] = {}
        """By fragments."""
        self._pulls: dict[int, GossipPull[Held]] = {}
        self._numbers = 0
        self._preparing: Preparing[Held, Payload] | None = None
        self._settling: list[GossipPull[Held]] = []
        """Those whose merge is being prepared."""
        self._wake_s: float | None = None
        self._is_short = False
        """More pulls were due than there was anybody to ask for."""
        self._out: list[GossipCommand[Held, Payload, Ready]] = []

    def _lane(self, number: int) -> GossipLane[Held, Payload, Ready]:
        settings = self._settings
        ledger = Ledger(settings.max_staleness_rounds, settings.num_parts, settings.wanted.gradients)
        return GossipLane(
            number,
            ledger,
            Partners(ledger, self._back_off, settings.variant, self._rng),
            OpenPulls(self._back_off, most_pulls(settings.wanted)),
            settings.sizes[number],
        )

    # ------------------------------------------------------------- what may be asked at any time

    def wake_at(self) -> float | None:
        """When `Woke` is wanted; None: not before another event."""
        return self._wake_s

    @property
    def has_plans(self) -> bool:
        """Merges are planned."""
        return bool(self._plans)

    @property
    def bytes_per_s(self) -> float | None:
        """What the link carried in the last pulls; None before the first."""
        return self._times.bytes_per_s

    @property
    def partner_bytes(self) -> int:
        """A partner's weights and pseudo-gradient, of all fragments, in the coarsest format."""
        return next(iter(self._whole.values())).both

    def gradient_format(self, round_s: float, up_bytes_per_s: float | None = None) -> GradientFormat:
        """In which format to publish pseudo-gradients in a round that lasts so long (0: it is not known). What may be
        sent limits it as what is received does."""
        rate = self._times.bytes_per_s
        slower = min(rate, up_bytes_per_s) if rate and up_bytes_per_s else rate
        return gradient_format(self._whole, len(self._others), round_s, slower, self._settings.wanted)

    def places(self, round: int) -> list[dict[str, Place]]:
        """Up to where each peer is in this one's weights, of each fragment; `round` is the last that it has ended."""
        found = []
        for lane in self._lanes:
            places, own_round = lane.ledger.places(), max(round, lane.merged_round)
            if own_round >= 0:
                places[self._me] = max(places.get(self._me, (-1, 0)), (own_round, lane.ledger.num_parts))
            found.append(places)
        return found

    def is_left_alone(self, peer: str) -> bool:
        """Whether `peer` is held something against, which `Called` may end."""
        return self._back_off.has_banned(peer)

    def merged_mark(self, fragment: int, peer: str) -> Mark | None:
        """Up to where the pseudo-gradients of `peer` were merged; None if none was."""
        return self._lanes[fragment].ledger.mark(peer)

    def pulled_mark(self, fragment: int, peer: str) -> Mark | None:
        """The same of what was pulled and waits to be merged."""
        here = [each.mark for each in self._lanes[fragment].pulled if each.peer == peer and each.section == "gradient"]
        return here[-1] if here else None

    def rows(self) -> list[list[list[str | int]]]:
        """What was merged of whom, of each fragment, for a checkpoint."""
        return [lane.ledger.rows() for lane in self._lanes]

    def load(self, rows: Sequence[Iterable[Sequence[object]]]) -> None:
        """Go on from what `rows` gave. ValueError if they are anything else."""
        for lane, each in zip(self._lanes, rows, strict=True):
            lane.ledger.load(each)

    # ------------------------------------------------------------- events

    def receive(
        self, event: GossipEvent[Held, Payload, Ready], now: float
    ) -> list[GossipCommand[Held, Payload, Ready]]:
        """What follows from what happened at `now`, in seconds of one clock."""
        self._out = []
        if isinstance(event, _OF_A_PULL):
            if (pull := self._pulls.get(event.pull)) is not None:
                self._of_pull(pull, event, now)
            return self._out
        match event:
            case Woke():
                self._look(now)
            case Prepared():
                self._prepared(event.number, event.merge, now)
            case Called():
                self._back_off.called(event.peer, now)
                self._look_again(now, self._is_short)
            case PeersChanged():
                self._peers_changed(event.volunteers, now)
            case MergeDue():
                self._merge_due(event, now)
            case Planned():
                self._planned(event.round, event.plans, now)
            case LinkAssumed():
                if self._times.bytes_per_s is None:
                    self._times.assume(event.bytes_per_s)
                    self._look_again(now, bool(self._plans))
            case TookStates():
                self._took_states(event)
            case Rested():
                self._rest()
        out, self._out = self._out, []  # a merge takes memory, and is held by who asked for it alone
        return out

    def _of_pull(
        self, pull: GossipPull[Held], event: Routed | Replied[Held] | Downloaded | Decoded[Payload] | Failed, now: float
    ) -> None:
        match event:
            case Replied():
                self._replied(pull, event, now)
            case Downloaded():
                self._downloaded(pull, event, now)
            case Decoded():
                self._decoded(pull, event.payload, now)
            case Failed():
                self._failed(pull, event.failure, now)
            case Routed():
                self._routed(pull, event.is_direct, now)

    # ------------------------------------------------------------- the others

    def _peers_changed(self, volunteers: Sequence[PeerInfo], now: float) -> None:
        if len(volunteers) != len(self._others):
            self._look_again(now, bool(self._plans))
        self._others, self._reference, self._hidden = volunteers, None, None
        for lane in self._lanes:
            lane.view = None
        self._look_again(now, self._is_short)

    def _reference_round(self) -> int:
        if self._reference is None:
            self._reference = median_round([self._round, *(info.round for info in self._others)])
        return self._reference

    def _view(self, lane: GossipLane[Held, Payload, Ready]) -> LaneView:
        if lane.view is None:
            lane.view = LaneView([], {})
            for info in self._others:
                lane.view.rounds[info.peer], candidate = self._tellings.of(info)[lane.number]
                if len(self._lanes) > 1 and (known := lane.ledger.mark(info.peer)) is not None:
                    candidate = beyond(candidate, known)
                lane.view.candidates.append(candidate)
        return lane.view

    # ------------------------------------------------------------- when to pull, and from whom

    def _planned(self, round: int, plans: Sequence[MergePlan], now: float) -> None:
        if round != self._round:
            self._round, self._reference = round, None
        self._plans = plans
        self._pull_plans.clear()  # those of other fragments
        for lane in self._lanes:
            lane.plan = None
        for plan in plans:
            for number, began_s in zip(plan.fragments, plan.began_s, strict=True):
                lane = self._lanes[number]
                if plan.round == lane.merged_round and not lane.begins_anew:
                    continue  # its merge was earlier than this plan came here
                lane.plan = plan
                if began_s != lane.began_s:  # another round of it
                    lane.ready, lane.began_s, lane.pulled_for_s = None, began_s, None
                    lane.open.round_begins(now)
        self._give_up_old_pulls(plans, now)
        if any(lane.pulled for lane in self._lanes):
            self._prepare_more(now)
        self._look_when_due(now)

    def _give_up_old_pulls(self, plans: Sequence[MergePlan], now: float) -> None:
        """A pull that has gone on for rounds would bring what is too old."""
        a_round_s = max((plan.ends_s - plan.started_s for plan in plans), default=0.0)
        old_s = now - max(_OLD_PULL_S, _OLD_PULL_ROUNDS * a_round_s)
        for pull in [pull for pull in self._pulls.values() if pull.open.began_s < old_s]:
            self._give_up(pull)
        for lane in self._lanes:
            if lane.turned_back:
                live = {info.peer for info in self._others}
                lane.turned_back = {which: since for which, since in lane.turned_back.items() if which[1] in live}

    def _look_when_due(self, now: float) -> None:
        """At once, unless nothing is due yet by the plans."""
        self._wake_s, self._is_short = None, False
        for plan in self._plans:
            if any(self._lanes[each].plan is plan for each in plan.fragments):
                pulls = self._pull_plan(plan).pulls
                self._wake_before(now if any(pulls.num_due(each, now) for each in SECTIONS) else pulls.next_s(now))

    def _look_if_moved(self, now: float) -> None:
        """A pull has brought what it was for: more is asked for at once only where less is here than is due by now."""
        for due in self._due(now):
            if due.lane.open.is_wanted(due.section, due.number, due.lane.here, due.slow_after_s, now):
                self._wake_before(now)
                return

    def _lanes_of(self, plan: MergePlan) -> list[GossipLane[Held, Payload, Ready]]:
        """Those of its fragments that are not merged yet."""
        if len(self._lanes) == 1:
            return self._lanes if self._lanes[0].plan is plan else []
        return [lane for each in plan.fragments if (lane := self._lanes[each]).plan is plan]

    def _look_again(self, now: float, is_wanted: bool = True) -> None:
        if is_wanted:
            self._wake_before(now)

    def _wake_before(self, at_s: float | None) -> None:
        if at_s is not None and (self._wake_s is None or at_s < self._wake_s):
            self._wake_s = at_s

    def _look(self, now: float) -> None:
        """Ask as many partners as there should be by now, others in place of those that fail, until the merges."""
        self._wake_s, self._is_short = None, False
        for due in self._due(now):
            self._ask_due(due, now)

    def _due(self, now: float) -> Iterator[DueOfLane[Held, Payload, Ready]]:
        """What should have begun by now, where less may be here; and this peer looks again when more is due."""
        for plan in self._plans:
            lanes = self._lanes_of(plan)
            if not lanes:
                continue  # they are merged
            _, pulls, slow_after_s = self._pull_plan(plan)
            self._wake_before(pulls.next_s(now))
            for section in SECTIONS:
                if num_due := pulls.num_due(section, now):
                    for lane in lanes:
                        if lane.may_want(section, num_due):
                            yield DueOfLane(lane, section, num_due, plan, slow_after_s)

    def _pull_plan(self, plan: MergePlan) -> DuePulls:
        times, num_others = self._times, len(self._others)
        basis = num_others, times.bytes_per_s, times.overhead_s, times.early_share
        known = self._pull_plans.get(plan.fragments)
        if known is None or known.basis != basis:
            sizes, wanted = self._sizes_of(plan), self._settings.wanted
            found = plan_pulls(num_others, plan.started_s, plan.ends_s, sizes, times, wanted)
            known = self._pull_plans[plan.fragments] = DuePulls(basis, found, times.slow_after_s(sizes, wanted))
        return known

    def _sizes_of(self, plan: MergePlan) -> SectionBytes:
        """All that is pulled of one partner."""
        if len(plan.fragments) == 1:
            return self._lanes[plan.fragments[0]].sizes[plan.gradient_format]
        return total_bytes(self._lanes[each].sizes[plan.gradient_format] for each in plan.fragments)

    def _ask_due(self, due: DueOfLane[Held, Payload, Ready], now: float) -> None:
        """Begin pulls until as many are here or on their way as are due."""
        lane, section, plan = due.lane, due.section, due.plan
        here = lane.here
        while lane.open.is_wanted(section, due.number, here, due.slow_after_s, now):
            peer = self._choose(lane, section, plan.round, here, now)
            if peer is None:
                self._is_short = True
                self._wake_before(lane.open.next_free_s(section, [info.peer for info in self._others], now))
                break
            if lane.pulled_for_s is None:
                lane.pulled_for_s = plan.ends_s
            self._begin(lane, section, peer, (plan.ends_s - plan.started_s) / len(self._lanes), now)
        self._wake_before(lane.open.next_slow_s(section, due.slow_after_s, now))

    def _choose(
        self, lane: GossipLane[Held, Payload, Ready], section: Section, round: int, here: Sequence[Which], now: float
    ) -> str | None:
        """Whose to pull next."""
        view = self._view(lane)
        if view.from_round != round:
            view.from_round, view.new_weights = round, None
            view.reference = reference = median_round([round, *view.rounds.values()])
            tokens = lane.ledger.new_tokens
            view.new_tokens = {one.peer: tokens(one.peer, one, reference) for one in view.candidates}
        first: Collection[str]
        if section == "gradient":
            first = lane.open.coming("weights", here)
        else:
            if view.new_weights is None:
                view.new_weights = lane.partners.first(view.rounds, view.reference)
            first = view.new_weights
        return lane.partners.choose(
            view.candidates,
            exclude={self._me, *lane.open.not_now(section, here, now)},
            reference_round=view.reference,
            now=now,
            first=first,
            new_tokens=view.new_tokens,
        )[0]

    # ------------------------------------------------------------- one pull

    def _begin(
        self, lane: GossipLane[Held, Payload, Ready], section: Section, peer: str, round_s: float, now: float
    ) -> None:
        if self._hidden is None:
            self._hidden = {info.peer: info.hosts for info in self._others if info.hidden}
        number, hosts = self._next_number(), self._hidden.get(peer)
        opened = lane.open.begin(section, peer, now)
        pull = self._pulls[number] = GossipPull(
            number, lane.number, opened, round_s, [peer] if hosts is None else [*hosts]
        )
        if hosts is None:
            self._ask_next(pull, now)
        else:
            self._out.append(Route(number, peer))

    def _next_number(self) -> int:
        self._numbers += 1
        return self._numbers

    def _routed(self, pull: GossipPull[Held], is_direct: bool, now: float) -> None:
        pull.sources = [pull.open.peer] if is_direct else self._hosts.of(pull.sources, now)
        self._ask_next(pull, now)

    def _ask_next(self, pull: GossipPull[Held], now: float) -> None:
        """Ask the next source, if there is one."""
        section, peer, ledger = pull.open.section, pull.open.peer, self._lanes[pull.fragment].ledger
        if not pull.sources:  # its hosts failed, which is not its own fault; it may be had again within the round
            self._busy(pull, now)
            return
        pull.source, pull.asked_s = pull.sources.pop(0), now
        known = ledger.mark(peer)
        if section == "weights":
            round = ledger.weights_round(peer)
            known = None if round is None else Mark(round, 0, 0)
        self._out.append(Ask(pull.number, pull.source, peer, section, pull.fragment, known))

    def _replied(self, pull: GossipPull[Held], event: Replied[Held], now: float) -> None:
        lane, peer, mark = self._lanes[pull.fragment], pull.open.peer, event.mark
        if mark is None or event.held is None:
            self._nothing_new(pull, now)
            return
        if self._news(lane, peer, mark) is None:
            wrong = self._wrong_counter(lane, peer, mark) if pull.source == peer else ""
            if wrong:
                self._failed(pull, Failure(wrong, is_incident=True), now)
            else:
                self._nothing_new(pull, now)
            return
        lane.turned_back.pop((pull.open.section, peer), None)
        pull.mark, pull.held = mark, event.held
        pull.began_s = self._round_began_s(lane, mark, event.told)
        pull.begun = self._times.bytes_begin(now)
        self._out.append(Download(pull.number, pull.source, event.held))

    def _news(self, lane: GossipLane[Held, Payload, Ready], peer: str, mark: Mark) -> tuple[News, Held | None] | None:
        """What of a publication can be merged, and what it is the difference to; None if nothing can."""
        news = lane.news(peer, mark, self._reference_round())
        if isinstance(news, Nothing | Theta):
            return None
        if not isinstance(news, Difference):
            return news, None
        earlier = lane.merged.get(peer)
        return None if earlier is None else (news, earlier)

    def _wrong_counter(self, lane: GossipLane[Held, Payload, Ready], peer: str, mark: Mark) -> str:
        """In what way `peer` publishes what is too old, or its counter turned back for good; "" if it did not.

        One that was killed turned back by a few rounds, and is past them soon."""
        news = lane.news(peer, mark, self._reference_round())
        if not isinstance(news, Nothing):
            return ""
        known = lane.ledger.mark(peer)
        if news.turned_back and known is not None:
            most = max(_RESTART_ROUNDS, lane.ledger.max_staleness_rounds)
            since = lane.turned_back.setdefault(("gradient" if mark.part else "weights", peer), self._round)
            if mark.round >= known.round - most and self._round <= since + most:
                return ""
        if news.turned_back or news.too_old:
            return f"a publication of an old round: {news.reason}"
        return ""

    def _round_began_s(self, lane: GossipLane[Held, Payload, Ready], mark: Mark, told: Told | None) -> float | None:
        """When its author's round of the fragment began; None if it is in another by what it told, or does not know its
        speed yet."""
        if told is None:
            return None
        num_parts, done = self._settings.num_parts, told.inner_steps_done
        found = steps_of_fragment(lane.number, len(self._lanes), done, told.inner_steps, num_parts)
        if found is None or told.round + found[0] != mark.round:
            return None
        return round_began_s(told.since_s, found[1], told.steps_per_s)

    def _downloaded(self, pull: GossipPull[Held], event: Downloaded, now: float) -> None:
        assert pull.mark is not None
        assert pull.held is not None
        assert pull.begun is not None
        pull.bytes_s = now - pull.begun.at_s
        self._times.bytes_end(pull.begun, now, event.num_bytes)
        if event.wrong is not None and event.wrong.is_incident:
            self._out.append(Report(pull.source, event.wrong))
        peer, lane = pull.open.peer, self._lanes[pull.fragment]
        if pull.source != peer:
            self._hosts.back_off.answered(pull.source)
        found = self._news(lane, peer, pull.mark)  # it may have taken long
        if found is None:
            self._nothing_new(pull, now)
        else:
            news, earlier = found
            self._out.append(Decode(pull.number, peer, pull.open.section, lane.number, pull.held, news, earlier))

    def _decoded(self, pull: GossipPull[Held], payload: Payload, now: float) -> None:
        assert pull.mark is not None
        assert pull.held is not None
        lane, peer = self._lanes[pull.fragment], pull.open.peer
        pulled = Pulled(
            section=pull.open.section,
            peer=peer,
            mark=pull.mark,
            payload=payload,
            held=pull.held,
            pull_s=now - pull.asked_s,
            began_s=pull.began_s,
        )
        lane.hold([*lane.pulled, pulled])
        lane.open.answered(peer)  # before it can turn out that nothing can be merged with it
        self._settling.append(pull)
        self._prepare_more(now)

    def _settled(self, pull: GossipPull[Held], now: float) -> None:
        """Its merge is prepared."""
        if pull.number in self._pulls:
            self._times.merged(now - pull.asked_s - pull.bytes_s)
            del self._pulls[pull.number]
            self._lanes[pull.fragment].open.end(pull.open)
            self._look_if_moved(now)

    def _end(self, pull: GossipPull[Held], now: float) -> None:
        del self._pulls[pull.number]
        self._look_again(now)

    def _nothing_new(self, pull: GossipPull[Held], now: float) -> None:
        self._end(pull, now)
        self._lanes[pull.fragment].open.nothing_new(pull.open, now, pull.round_s)

    def _busy(self, pull: GossipPull[Held], now: float) -> None:
        self._end(pull, now)
        self._lanes[pull.fragment].open.end(pull.open)
        self._out.append(LeftAlone(pull.open.peer, self._back_off.busy(pull.open.peer, now)))

    def _failed(self, pull: GossipPull[Held], failure: Failure, now: float) -> None:
        peer, source = pull.open.peer, pull.source
        if source != peer and not failure.is_authors:
            if failure.kind != "away":
                self._hosts.back_off.failed(source, now, failure.reason)
                if failure.is_incident:
                    self._out.append(Report(source, failure))
            self._ask_next(pull, now)
            return
        if failure.kind == "busy":
            self._busy(pull, now)
            return
        self._end(pull, now)
        is_silent = failure.kind == "silent"
        if follows := self._lanes[pull.fragment].open.fail(pull.open, now, failure.reason, is_silent):
            self._out.append(LeftAlone(peer, follows))
        if failure.is_incident:
            self._out.append(Report(peer, failure))

    def _give_up(self, pull: GossipPull[Held]) -> None:
        del self._pulls[pull.number]
        self._lanes[pull.fragment].open.give_up(pull.open)
        self._out.append(Cancel(pull.number))

    # ------------------------------------------------------------- preparing

    def _prepare_more(self, now: float) -> None:
        """Have a merge of all that is here prepared, one after the other, anew as long as more comes."""
        if self._preparing is not None:
            return
        for lane in self._prepared_now() if self._settings.is_large else self._lanes:
            if lane.plan is not None and lane.has_more():
                self._prepare(Preparing(lane.plan, lane.number, lane.began_s, tuple(lane.pulled)))
                return
        settling, self._settling = self._settling, []
        for pull in settling:
            self._settled(pull, now)

    def _prepare(self, preparing: Preparing[Held, Payload]) -> None:
        preparing.number, self._preparing = self._next_number(), preparing
        self._out.append(Prepare(preparing.number, preparing.plan, preparing.fragment, preparing.tried))

    def _prepared_now(self) -> list[GossipLane[Held, Payload, Ready]]:
        """Of a large model only the fragments that are merged first: what is prepared takes 8 bytes a number and what
        was pulled a few bits."""
        planned = [(lane.plan.ends_s, lane) for lane in self._lanes if lane.plan is not None]
        first_s = min((ends_s for ends_s, _ in planned), default=0.0)
        return [lane for ends_s, lane in planned if ends_s == first_s]

    def _prepared(self, number: int, merge: Ready | None, now: float) -> None:
        preparing = self._preparing
        if preparing is None or preparing.number != number:
            return
        self._preparing = None
        if preparing.is_sifted:
            self._sift(preparing, merge is not None, now)
        elif merge is None:
            preparing.is_sifted = True
            self._prepare(preparing)
        else:
            lane, round = self._lanes[preparing.fragment], preparing.plan.round
            if lane.plan is not None and lane.plan.round == round and lane.began_s == preparing.began_s:
                lane.ready = ReadyMerge(round, preparing.pulled, merge)
            self._prepare_more(now)

    def _sift(self, preparing: Preparing[Held, Payload], is_good: bool, now: float) -> None:
        """No merge of all that was pulled can be prepared: drop what cannot be merged with those that were here before
        it and stay. Who published it has failed, and another is tried."""
        tried = preparing.tried[-1]
        if is_good:
            preparing.stays = (*preparing.stays, tried)
        else:
            preparing.bad = (*preparing.bad, tried)
        if preparing.num_tried < len(preparing.pulled):
            self._prepare(preparing)
            return
        lane = self._lanes[preparing.fragment]
        for one in preparing.bad:
            follows = self._back_off.failed(one.peer, now, "what it published cannot be merged")
            lane.open.leave_out(one.section, one.peer, max(preparing.plan.ends_s, now + _LEFT_OUT_S))
            self._out.append(LeftAlone(one.peer, follows))
        lane.hold([one for one in lane.pulled if one not in preparing.bad])
        self._look_again(now, bool(preparing.bad))
        self._prepare_more(now)

    # ------------------------------------------------------------- merging

    def _merge_due(self, event: MergeDue, now: float) -> None:
        if event.may_catch_up and event.fragment == len(self._lanes) - 1:
            rounds = [info.round for info in self._others if info.round]
            if behind := left_behind(event.round, rounds, self._settings.max_staleness_rounds):
                self._out.append(CatchUp(behind))
                return
        lane = self._lanes[event.fragment]
        ready, plan, lane.ready, lane.plan = lane.ready, lane.plan, None, None
        lane.merged_round, lane.begins_anew = event.round, False
        if plan is not None and plan.is_sure and event.fragment == plan.fragments[0]:
            expected_s = plan.ends_s if lane.pulled_for_s is None else lane.pulled_for_s
            self._times.round_ended(expected_s - plan.started_s, now - plan.started_s)
        is_ready = ready is not None and ready.round == event.round
        self._out.append(self._merge(lane, ready) if ready is not None and is_ready else Merge(event.fragment))

    def _merge(
        self, lane: GossipLane[Held, Payload, Ready], ready: ReadyMerge[Held, Payload, Ready]
    ) -> Merge[Held, Payload, Ready]:
        """What is ready counts as merged from here on. If some of it is too old by now, the rest is prepared anew for
        the next round."""
        reference = self._reference_round()
        of_use = lane.of_use(reference)
        if any(pulled not in of_use for pulled in ready.pulled):
            lane.hold(of_use)
            return Merge(lane.number)
        rest = [pulled for pulled in of_use if pulled not in ready.pulled]
        for pulled in ready.pulled:
            if pulled.section == "weights":
                lane.ledger.weights_merged(pulled.peer, pulled.mark.round)
            else:
                lane.ledger.merged(pulled.peer, pulled.mark, reference)
                lane.merged[pulled.peer] = pulled.held
        lane.merged = {peer: held for peer, held in lane.merged.items() if peer in lane.ledger.held}
        lane.hold(rest)
        if rest:
            lane.hold(lane.of_use(reference))
        lane.view = None
        return Merge(lane.number, ready.merge, ready.pulled)

    # ------------------------------------------------------------- others' weights, rest

    def _forget_pulled(self) -> None:
        for lane in self._lanes:
            lane.hold([])
            lane.ready = None

    def _took_states(self, event: TookStates) -> None:
        self._forget_pulled()
        heard = {info.peer: info.round for info in self._others}
        heard |= {peer: max(round, heard.get(peer, 0)) for peer, round in event.rounds.items()}
        for lane in self._lanes:
            told = [each[lane.number] for each in event.told]
            lane.ledger.bring(agreed_places(told, heard, event.round, lane.ledger.max_staleness_rounds))
            lane.view = None

    def _rest(self) -> None:
        for pull in list(self._pulls.values()):
            self._give_up(pull)
        self._forget_pulled()
        self._preparing, self._settling, self._plans = None, [], ()
        self._wake_s, self._is_short = None, False
        for lane in self._lanes:
            lane.plan, lane.begins_anew = None, True

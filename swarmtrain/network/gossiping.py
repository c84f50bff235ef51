"""Pulling what partners published, in the background of this peer's own round: nobody waits for anybody.

Runs in the network thread, beside the trainer. As late before a fragment's merge as the link allows it asks a few
partners for its newest weights or pseudo-gradient (`protocol.pulls` says of how many, and when), pulls, checks and
decodes it, and has the merge prepared; when it is time the trainer takes what is ready. What comes later is there a
round later. Whoever has nothing new, is busy, slow, gone or wrong costs its place, and another is tried.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from swarmtrain.errors import BadBytesError, BusyError, PeerError, UnreachableError
from swarmtrain.network.bringing import bring
from swarmtrain.network.daemon import swarm_time
from swarmtrain.network.hosting import Routes
from swarmtrain.network.identity import peer_bytes
from swarmtrain.network.lanes import Lane, Plan, Pulled, Ready
from swarmtrain.network.publications import (
    PublicationRules,
    is_signed_by_untrusted,
    publication_untrusted,
    request_of,
    section_of,
)
from swarmtrain.network.service import PeerCalls
from swarmtrain.network.snapshots import Held
from swarmtrain.network.tasks import end_tasks, logged
from swarmtrain.protocol.fragments import steps_of_fragment, told_mark, told_round
from swarmtrain.protocol.lifecycle import Membership, PeerInfo
from swarmtrain.protocol.open_pulls import OpenPull, OpenPulls
from swarmtrain.protocol.partners import (
    BackOff,
    Candidate,
    Difference,
    Ledger,
    Mark,
    News,
    Nothing,
    Partners,
    Place,
    Theta,
    View,
    agreed_places,
    median_round,
)
from swarmtrain.protocol.pulls import (
    SECTIONS,
    PullPlan,
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
from swarmtrain.run import GradientFormat
from swarmtrain.v1 import snapshot_pb2 as pb

__all__ = ["Gossip", "GossipSettings"]

_log = logging.getLogger(__name__)
_LOOK_S = 0.25
_PLAN_AGAIN_S = 2.0
_OLD_PULL_S = 30.0
_OLD_PULL_ROUNDS = 2
_RESTART_ROUNDS = 3
"""A peer that was killed and went on from its checkpoint is behind what it had published by so many rounds."""


class _NoAnswerError(UnreachableError):
    """A partner gave no answer when it was asked."""


class _HostsFailedError(UnreachableError):
    """The hosts of a peer that nobody can dial failed: not its own fault."""


@dataclass(frozen=True, kw_only=True)
class GossipSettings:
    """What the run file says about publications, and about merging them; rules and sizes of each fragment."""

    rules: Sequence[Mapping[Section, PublicationRules]]
    sizes: Sequence[Mapping[GradientFormat, SectionBytes]]
    """By the format of pseudo-gradients, the coarsest first."""
    wanted: Wanted
    is_large: bool = False
    """Whether one merge is prepared after the other, since what is prepared takes much memory."""


DecodeWeights = Callable[[int, Held], Any]
"""(fragment, publication) -> arrival; BadBytesError if it is none."""

DecodeGradient = Callable[[int, Held, News, Held | None], Any]
"""(fragment, publication, what of it is new, the one that was merged before) -> arrival; BadBytesError if it is
none."""


@dataclass
class Gossip:
    """This peer's pulls, and what came of them. `take`, `forget_pulled`, `took_states`, `gradient_format` and
    `ledger_rows` are for the trainer's thread, `places` for any, the rest for the network's."""

    me: str
    calls: PeerCalls
    membership: Membership
    settings: GossipSettings
    decode_weights: DecodeWeights
    decode_gradient: DecodeGradient
    presence: Callable[[], pb.Signed]
    heard_untrusted: Callable[[str, pb.PublicationReply], None]
    """Told what a peer answered, before anything else is done with it."""
    counted: Callable[[str, int], None]
    """Told of an author's tokens, as it counts them itself."""
    refused: Callable[[str, PeerError], None]
    ledgers: Sequence[Ledger]
    """Of each fragment."""
    expected_s: Callable[[int], float | None] = lambda size_bytes: None
    """How long so many bytes would take, before the first pull."""
    heard_rows_untrusted: Callable[[str, Sequence[pb.Signed]], None] = lambda peer, rows: None
    """Told of the rows of the data's coverage in the manifest of what was pulled."""
    variant: str = "uniform"
    routes: Routes | None = None
    """How to get at those that cannot be called; None: everyone can."""
    rng: random.Random = field(default_factory=random.Random)
    round: int = 0
    back_off: BackOff = field(default_factory=BackOff)
    num_stops: int = 0
    """What was planned before the last of them is not begun."""
    lanes: list[Lane] = field(init=False)
    _tasks: dict[OpenPull, asyncio.Task[None]] = field(default_factory=dict)
    _whole: Mapping[GradientFormat, SectionBytes] = field(init=False)
    """The sizes of all fragments together."""
    _times: PullTimes = field(default_factory=PullTimes)
    _filling: asyncio.Task[None] | None = None
    _preparing: asyncio.Task[None] | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _news: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        settings, sizes = self.settings, self.settings.sizes
        self._whole = {format: total_bytes(each[format] for each in sizes) for format in sizes[0]}
        self.lanes = [
            Lane(
                number,
                ledger,
                Partners(ledger, self.back_off, self.variant),
                OpenPulls(self.back_off, most_pulls(settings.wanted)),
                settings.rules[number],
                settings.sizes[number],
            )
            for number, ledger in enumerate(self.ledgers)
        ]

    # ------------------------------------------------------------- the trainer's side

    def take(self, round: int, fragment: int = 0) -> Ready | None:
        """What is prepared of a fragment, which is merged now in `round`; it counts as merged from here on. Returns at
        once."""
        with self._lock:
            lane = self.lanes[fragment]
            ready, plan, lane.ready, lane.plan = lane.ready, lane.plan, None, None
            lane.merged_round = round
            if plan is not None and plan.is_sure and fragment == plan.fragments[0]:
                expected_s = plan.ends_s if lane.pulled_for_s is None else lane.pulled_for_s
                self._times.round_ended(expected_s - plan.started_s, swarm_time() - plan.started_s)
            if ready is None or ready.round != round:
                return None
            reference = self._reference_round()
            lane.pulled = lane.of_use(reference)
            if any(pulled not in lane.pulled for pulled in ready.pulled):
                return None  # some of it is too old by now; the rest is prepared anew for the next round
            lane.pulled = [pulled for pulled in lane.pulled if pulled not in ready.pulled]
            for pulled in ready.pulled:
                if pulled.section == "weights":
                    lane.ledger.weights_merged(pulled.peer, pulled.mark.round)
                else:
                    lane.ledger.merged(pulled.peer, pulled.mark, reference)
                    lane.merged[pulled.peer] = pulled.held
            lane.merged = {peer: held for peer, held in lane.merged.items() if peer in lane.ledger.held}
            lane.pulled = lane.of_use(reference)
            return ready

    def forget_pulled(self) -> None:
        """This peer has taken others' weights, or rests: what was pulled before is in them, or too old."""
        with self._lock:
            for lane in self.lanes:
                lane.pulled, lane.ready = [], None

    def took_states(self, told: Sequence[Sequence[Mapping[str, Place]]], rounds: Mapping[str, int], round: int) -> None:
        """This peer goes on in `round` from the mean of some states. `told`: up to where each peer is in each of them,
        by fragments; `rounds`: in which their authors say that they are. What was pulled before is in them, or too
        old."""
        self.forget_pulled()
        heard = {info.peer: info.round for info in self.membership.volunteers()}
        heard |= {peer: max(of, heard.get(peer, 0)) for peer, of in rounds.items()}
        with self._lock:
            for lane in self.lanes:
                of_lane = [each[lane.number] for each in told]
                lane.ledger.bring(agreed_places(of_lane, heard, round, lane.ledger.max_staleness_rounds))

    def places(self, round: int) -> list[dict[str, Place]]:
        """Up to where each peer is in this one's weights, of each fragment; `round` is the last that it has ended."""
        with self._lock:
            return [self._places(lane, max(round, lane.merged_round)) for lane in self.lanes]

    def _places(self, lane: Lane, own_round: int) -> dict[str, Place]:
        places = lane.ledger.places()
        if own_round >= 0:
            places[self.me] = max(places.get(self.me, (-1, 0)), (own_round, lane.ledger.num_parts))
        return places

    def gradient_format(self, others: int, round_s: float) -> GradientFormat:
        """That in which this peer publishes pseudo-gradients in a round that lasts so long (0: it is not known), beside
        so many others. What it may send limits it as what it receives does."""
        rate, up = self._times.bytes_per_s, self.calls.node.traffic.up.bytes_per_s
        slower = min(rate, up) if rate and up else rate
        return gradient_format(self._whole, others, round_s, slower, self.settings.wanted)

    def ledger_rows(self) -> list[list[list[str | int]]]:
        """What was merged of whom, of each fragment, as a checkpoint keeps it."""
        with self._lock:
            return [ledger.rows() for ledger in self.ledgers]

    # ------------------------------------------------------------- a round

    def begin(self, round: int, plans: Sequence[Plan]) -> None:
        """A round of this peer begins, or more is known by now of when fragments will be merged: all these plans take
        the place of those before. Pulls that still run go on."""
        now = swarm_time()
        with self._lock:
            self.round = round
            for lane in self.lanes:
                lane.plan = None
            for plan in plans:
                for lane, began_s in zip(self._lanes_of(plan), plan.began_s, strict=True):
                    if plan.round == lane.merged_round:
                        continue  # its merge was earlier than this plan came here
                    lane.plan = plan
                    if began_s != lane.began_s:  # another round of it
                        lane.ready, lane.began_s, lane.pulled_for_s = None, began_s, None
                        lane.open.round_begins(now)
        if self._filling is not None:
            self._filling.cancel()
        self._give_up_old_pulls(plans)
        self._filling = logged(asyncio.create_task(self._fill(plans)), "gossip")
        if any(lane.pulled for lane in self.lanes):
            self._prepare_soon()

    def _lanes_of(self, plan: Plan) -> list[Lane]:
        return [self.lanes[fragment] for fragment in plan.fragments]

    async def stop(self) -> None:
        """Pull nothing more, until more is planned from now on."""
        self.num_stops += 1
        tasks = [*self._tasks.values()]
        tasks += [task for task in (self._filling, self._preparing) if task is not None]
        await end_tasks(tasks)
        self.forget_pulled()
        self._tasks.clear()  # one that never ran has not ended either
        for lane in self.lanes:
            lane.open.begun.clear()
            lane.plan = None
        self._filling = self._preparing = None

    async def _fill(self, plans: Sequence[Plan]) -> None:
        """Pull from as many partners as there should be, others in place of those that fail, until the merges."""
        all_bytes = next(iter(self._whole.values())).both
        if self._times.bytes_per_s is None and (known_s := self.expected_s(all_bytes)):
            self._times.assume(all_bytes / known_s)
        while left := [plan for plan in plans if self._is_ahead(plan)]:
            news, look_s = self._news, _PLAN_AGAIN_S
            for plan in left:
                now, pulls = swarm_time(), self._pull_plan(plan)
                due = {section: pulls.num_due(section, now) for section in SECTIONS}
                for section, num_due in due.items():
                    for lane in self._lanes_of(plan):
                        self._begin_due(lane, section, num_due, plan)
                if any(due.values()):
                    look_s = min(look_s, _LOOK_S)
                if (next_s := pulls.next_s(now)) is not None:
                    look_s = min(look_s, next_s - now)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(news.wait(), look_s)

    def _is_ahead(self, plan: Plan) -> bool:
        return any(lane.plan is plan for lane in self._lanes_of(plan))

    def _pull_plan(self, plan: Plan) -> PullPlan:
        others, sizes = len(self.membership.volunteers()), self._sizes(plan)
        return plan_pulls(others, plan.started_s, plan.ends_s, sizes, self._times, self.settings.wanted)

    def _sizes(self, plan: Plan) -> SectionBytes:
        """Of all that is pulled of one partner."""
        return total_bytes(lane.sizes[plan.gradient_format] for lane in self._lanes_of(plan))

    def _begin_due(self, lane: Lane, section: Section, num_due: int, plan: Plan) -> None:
        """Begin pulls until as many are here or on their way as are due."""
        slow_after_s = self._times.slow_after_s(self._sizes(plan), self.settings.wanted)
        while lane.open.is_wanted(section, num_due, lane.here(), slow_after_s, swarm_time()):
            peer = self._choose(lane, section, plan)
            if peer is None:
                return
            if lane.pulled_for_s is None:
                lane.pulled_for_s = plan.ends_s
            self._start_pull(lane, peer, section, (plan.ends_s - plan.started_s) / len(self.lanes))

    def _give_up_old_pulls(self, plans: Sequence[Plan]) -> None:
        """A pull that has gone on for rounds would bring what is too old."""
        a_round_s = max((plan.ends_s - plan.started_s for plan in plans), default=0.0)
        old_s = swarm_time() - max(_OLD_PULL_S, _OLD_PULL_ROUNDS * a_round_s)
        for pull, task in self._tasks.items():
            if pull.began_s < old_s:
                task.cancel()
        live = {info.peer for info in self.membership.volunteers()}
        for lane in self.lanes:
            lane.turned_back = {which: round for which, round in lane.turned_back.items() if which[0] in live}

    def _reference_round(self) -> int:
        return median_round([self.round, *(info.round for info in self.membership.volunteers())])

    def _choose(self, lane: Lane, section: Section, plan: Plan) -> str | None:
        """Whose to pull next."""
        now, here, live = swarm_time(), lane.here(), self.membership.volunteers()
        with self._lock:
            view = View(
                candidates=[self._candidate(lane, one) for one in live],
                rounds={one.peer: told_round(*self._told_of(lane, one)) for one in live},
                own_round=plan.round,
                with_weights=lane.open.coming("weights", here),
                exclude={self.me, *lane.open.not_now(section, here, now)},
            )
            return lane.partners.next(section, view, now, self.rng)[0]

    def _told_of(self, lane: Lane, info: PeerInfo) -> tuple[int, int, Mark, int]:
        """What `protocol.fragments` is asked about a peer."""
        told = Mark(info.round, info.part, info.part_tokens)
        return lane.number, len(self.lanes), told, lane.rules["gradient"].num_parts

    def _candidate(self, lane: Lane, info: PeerInfo) -> Candidate:
        mark, known = told_mark(*self._told_of(lane, info)), lane.ledger.mark(info.peer)
        tokens = mark.tokens
        if len(self.lanes) > 1 and known is not None and known.round == mark.round and known.part < mark.part:
            tokens = max(tokens, known.tokens + 1)  # it is a guess
        return Candidate(
            peer=info.peer,
            round=mark.round,
            part=mark.part,
            tokens=tokens,
            inner_steps_done=info.inner_steps_done,
            steps_per_s=info.steps_per_s,
        )

    def _start_pull(self, lane: Lane, peer: str, section: Section, round_s: float) -> None:
        pull = lane.open.begin(section, peer, swarm_time())

        async def run() -> None:
            try:
                if await self._pull(lane, peer, section):
                    lane.open.end(pull)
                else:
                    lane.open.nothing_new(pull, swarm_time(), round_s)
            except (BusyError, _HostsFailedError):  # it may be free again within the round
                lane.open.end(pull)
                _log.debug("%s is %s", peer, self.back_off.busy(peer, swarm_time()))
            except PeerError as error:
                if follows := lane.open.fail(pull, swarm_time(), str(error), isinstance(error, _NoAnswerError)):
                    _log.debug("%s: %s", peer, follows)
                if error.is_incident:
                    self.refused(peer, error)
            except BaseException:
                lane.open.give_up(pull)
                raise
            finally:
                self._tasks.pop(pull, None)
                self._tell()

        self._tasks[pull] = logged(asyncio.create_task(run()), "gossip")

    def called(self, peer: str) -> None:
        """It has called this peer: after an outage it is asked again soon."""
        self.back_off.called(peer, swarm_time())

    def _tell(self) -> None:
        self._news.set()
        self._news = asyncio.Event()

    # ------------------------------------------------------------- one pull

    async def _pull(self, lane: Lane, peer: str, section: Section) -> bool:
        """Bring a section of the newest publication of `peer` here, from itself or one of its hosts after the other;
        False if there is none that can be merged. Raises PeerError."""
        sources = (peer,) if self.routes is None else await self.routes.to(peer)
        failure = _HostsFailedError("nobody can dial it, and it has no host that can be asked")
        for source in sources:
            try:
                return await self._pull_from(lane, peer, source, section)
            except _HostsFailedError as error:
                failure = error
        raise failure

    async def _pull_from(self, lane: Lane, peer: str, source: str, section: Section) -> bool:
        began_s = swarm_time()
        reply = await self._ask(lane, peer, source, section)
        if not reply.HasField("manifest"):
            return False
        held, mark = publication_untrusted(lane.rules[section], peer, reply.manifest)
        if self._news_untrusted(lane, peer, mark, is_own=source == peer) is None:
            return False
        lane.turned_back.pop((peer, section), None)
        began_with_s = self._round_began_s(lane, peer, mark)
        bytes_s = await self._bring(lane, peer, held, source, section)
        found = self._news_untrusted(lane, peer, mark, is_own=False)  # it may have taken long
        if found is None:
            return False
        news, earlier = found
        if section == "weights":
            arrival = await asyncio.to_thread(self.decode_weights, lane.number, held)
        else:
            arrival = await asyncio.to_thread(self.decode_gradient, lane.number, held, news, earlier)
        manifest = held.snapshot.manifest
        self.counted(peer, manifest.author_tokens)
        self.heard_rows_untrusted(peer, manifest.coverage)
        pulled = Pulled(
            section=section,
            peer=peer,
            mark=mark,
            arrival=arrival,
            held=held,
            pull_s=swarm_time() - began_s,
            began_s=began_with_s,
        )
        with self._lock:
            lane.pulled.append(pulled)
        lane.open.answered(peer)  # before it can turn out that nothing can be merged with it
        await asyncio.shield(self._prepare_soon())
        self._times.merged(swarm_time() - began_s - bytes_s)
        return True

    def _round_began_s(self, lane: Lane, peer: str, mark: Mark) -> float | None:
        """When the fragment's round of `peer` began that it published at `mark`, by what it has just told; None if it
        is in another by then, or does not know its speed yet."""
        info = self.membership.info(peer)
        if info is None:
            return None
        num_parts, done = lane.rules["gradient"].num_parts, info.inner_steps_done
        found = steps_of_fragment(lane.number, len(self.lanes), done, info.inner_steps, num_parts)
        if found is None or info.round + found[0] != mark.round:
            return None
        return round_began_s(self.membership.so_far_since_s(peer), found[1], info.steps_per_s)

    async def _ask(self, lane: Lane, peer: str, source: str, section: Section) -> pb.PublicationReply:
        """What `source`, `peer` itself or a host of its, has of `peer` that is newer than what was merged."""
        known = lane.ledger.mark(peer)
        if section == "weights" and (round := lane.ledger.weights_round(peer)) is not None:
            known = Mark(round, 0, 0)
        elif section == "weights":
            known = None
        request = request_of(section, lane.number, has_any=known is not None, presence=self.presence())
        if known is not None:
            request.round, request.part = known.round, known.part
        if source != peer:
            request.author = peer_bytes(peer)
            return await self._ask_host(lane, peer, source, request)
        try:
            reply = await self.calls.publication(peer, request)
        except UnreachableError as error:
            raise _NoAnswerError(str(error)) from error
        self.heard_untrusted(peer, reply)
        if reply.busy:
            raise BusyError("it serves as many readers as it may")
        return reply

    def _news_untrusted(self, lane: Lane, peer: str, mark: Mark, *, is_own: bool) -> tuple[News, Held | None] | None:
        """What of `peer`'s weights (part 0) or gradient can be merged, and the gradient it is the difference to; None
        if nothing can. BadBytesError if what it publishes itself (`is_own`) is old."""
        with self._lock:
            reference = self._reference_round()
            news: News
            if mark.part:
                news = lane.ledger.news(peer, mark, reference)
            else:
                news = lane.ledger.news_of_weights(peer, mark.round, reference)
            earlier = lane.merged.get(peer) if isinstance(news, Difference) else None
        if isinstance(news, Nothing) and is_own:
            self._check_counters_untrusted(lane, peer, mark, news)
        lacks_earlier = isinstance(news, Difference) and earlier is None
        if isinstance(news, Nothing | Theta) or lacks_earlier:
            _log.debug("%s has nothing new: %s", peer, news.reason)
            return None
        return news, earlier

    def _check_counters_untrusted(self, lane: Lane, peer: str, mark: Mark, news: Nothing) -> None:
        """BadBytesError if `peer` publishes what is too old, or its counter turned back for good.

        One that was killed turned back by a few rounds, and is past them soon."""
        known = lane.ledger.mark(peer)
        if news.turned_back and known is not None:
            most = max(_RESTART_ROUNDS, lane.ledger.max_staleness_rounds)
            since = lane.turned_back.setdefault((peer, "gradient" if mark.part else "weights"), self.round)
            if mark.round >= known.round - most and self.round <= since + most:
                return
        if news.turned_back or news.too_old:
            raise BadBytesError(f"a publication of an old round: {news.reason}")

    async def _ask_host(self, lane: Lane, peer: str, host: str, request: pb.PublicationRequest) -> pb.PublicationReply:
        """What a host has of `peer`; _HostsFailedError if it has nothing to say, or says what is not `peer`'s word."""
        try:
            rules = lane.rules[section_of(request)]
            reply = await self.calls.publication(host, request)
            if reply.HasField("manifest") and not is_signed_by_untrusted(rules, peer, reply.manifest):
                raise BadBytesError(f"a publication of {peer} that is not signed by it")
            self.heard_untrusted(peer, pb.PublicationReply(presence=reply.presence))
        except PeerError as error:
            raise self._host_failed(host, error) from error
        if reply.busy or reply.away:
            raise _HostsFailedError("its host is busy" if reply.busy else "who should be its host is not")
        return reply

    def _host_failed(self, host: str, error: PeerError) -> _HostsFailedError:
        assert self.routes is not None
        self.routes.failed(host, str(error))
        if error.is_incident:
            self.refused(host, error)
        return _HostsFailedError(f"its host failed: {error}")

    async def _bring(self, lane: Lane, peer: str, held: Held, source: str, section: Section) -> float:
        """Pull the bytes; returns the seconds that took. Raises the PeerError that says why not: BusyError when it
        serves others."""
        began_s = swarm_time()
        begun = self._times.bytes_begin(began_s)
        try:
            wrong = await bring(self.calls, source, held, lane.rules[section].pull)
        except PeerError as error:
            if source == peer:
                raise
            raise self._host_failed(source, error) from error
        self._times.bytes_end(begun, swarm_time(), held.snapshot.manifest.total_bytes)
        if wrong is not None and wrong.is_incident:
            self.refused(source, wrong)
        if self.routes is not None and source != peer:
            self.routes.answered(source)
        return swarm_time() - began_s

    # ------------------------------------------------------------- preparing

    def _prepare_soon(self) -> asyncio.Task[None]:
        if self._preparing is None or self._preparing.done():
            self._preparing = logged(asyncio.create_task(self._prepare()), "gossip")
        return self._preparing

    async def _prepare(self) -> None:
        """Have a merge of all that is here prepared, anew as long as more comes."""
        while True:
            with self._lock:
                lane = next((lane for lane in self._prepared_now() if lane.has_more()), None)
                if lane is None or (plan := lane.plan) is None:
                    return
                pulled, began_s = tuple(lane.pulled), lane.began_s
            found = await self._try_to_prepare(plan, lane, pulled)
            if found is None:
                await self._drop_unmergeable(lane, plan, pulled)
                continue
            with self._lock:
                if lane.plan is not None and lane.plan.round == plan.round and lane.began_s == began_s:
                    lane.ready = found

    def _prepared_now(self) -> list[Lane]:
        """The lanes whose next merges are prepared: of a large model only those that are merged first, since what is
        prepared takes 8 bytes a number and what was pulled a few bits."""
        planned = [(lane.plan, lane) for lane in self.lanes if lane.plan is not None]
        first_s = min((plan.ends_s for plan, _ in planned), default=0.0)
        return [lane for plan, lane in planned if not self.settings.is_large or plan.ends_s == first_s]

    async def _try_to_prepare(self, plan: Plan, lane: Lane, pulled: tuple[Pulled, ...]) -> Ready | None:
        """A merge of `pulled`; None if there cannot be one."""
        try:
            prepared = await asyncio.to_thread(plan.prepare, lane.number, pulled)
            return Ready(round=plan.round, pulled=pulled, prepared=prepared)
        except Exception:  # a task's boundary: one bad publication must not cost all later merges
            peers = ", ".join(one.peer for one in pulled)
            _log.exception("gossip: no merge could be prepared with what was pulled from %s", peers)
            return None

    async def _drop_unmergeable(self, lane: Lane, plan: Plan, pulled: tuple[Pulled, ...]) -> None:
        """No merge of all of `pulled` can be prepared: drop what cannot be merged with those that were here before it
        and stay. Who published it has failed, and another is tried."""
        stays, bad = tuple[Pulled, ...](), list[Pulled]()
        for one in pulled:
            if await self._try_to_prepare(plan, lane, (*stays, one)) is None:
                bad.append(one)
            else:
                stays = (*stays, one)
        now = swarm_time()
        for one in bad:
            self.back_off.failed(one.peer, now, "what it published cannot be merged")
            lane.open.leave_out(one.section, one.peer, max(plan.ends_s, now + _LOOK_S))
        with self._lock:
            lane.pulled = [one for one in lane.pulled if one not in bad]

"""The trainer's side of asynchronous merging: it hands over its publications and takes what is ready, and never waits.

A publication costs the trainer one copy of its weights; all else about it is done when a partner asks. Its partners'
publications are pulled, checked and averaged in the background, so that a round's end is one outer step.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from swarmtrain.algorithm.fragments import Fragment, fragments_of
from swarmtrain.algorithm.gossip import Arrival, Layout, Prepared, prepare
from swarmtrain.algorithm.outer import OuterState
from swarmtrain.algorithm.robust import Incident
from swarmtrain.errors import RunTimeError
from swarmtrain.events import CaughtUpEvent, ClippedEvent, WarningEvent
from swarmtrain.network.codec import PublicationCodec, VectorCodec
from swarmtrain.network.coverage import rows_of
from swarmtrain.network.daemon import swarm_time
from swarmtrain.network.gossiping import Gossip, GossipSettings
from swarmtrain.network.hosting import Hosting, Routes
from swarmtrain.network.lanes import Plan, Pulled
from swarmtrain.network.publications import Publication, PublicationRules, Publisher
from swarmtrain.network.snapshots import Body, Held
from swarmtrain.network.swarm import Swarm
from swarmtrain.peer.asynchronous import AsynchronousExchange
from swarmtrain.peer.common import wait_for
from swarmtrain.peer.consensus import (
    SAMPLE,
    consensus_of,
    layout_of_specs,
    mean_of_near,
    not_far_behind,
    places_of_untrusted,
    theta_of,
)
from swarmtrain.peer.merge_rules import mean_of
from swarmtrain.peer.robustness import Naming, Robustness, apart
from swarmtrain.peer.trainer import Contribution, Gathered, LentWeights, Merged, Replaced, Start
from swarmtrain.protocol.fragments import FragmentRound, publishes_every
from swarmtrain.protocol.hosts import callable_first
from swarmtrain.protocol.partners import Ledger, News, left_behind, rounds_behind
from swarmtrain.protocol.progress import Progress
from swarmtrain.protocol.pulls import LARGE_MODEL, Section, Wanted, ahead_rounds, expected_step_s, is_moved
from swarmtrain.run import GradientFormat
from swarmtrain.v1 import snapshot_pb2 as pb

__all__ = ["GossipExchange", "hosting_of"]

_LAST_ROUND_S = 20.0
"""How long a peer that is done waits for others' last round."""
_LOOK_S = 0.2
_TRIES = 3
_LEDGER = "ledger"
_CLIPPED = "clipped"
_COVERAGE = "coverage"


def codecs_of(swarm: Swarm) -> list[PublicationCodec]:
    """Of each fragment."""
    section = swarm.published.run.merge
    return [
        PublicationCodec(tuple(fragment.pick(swarm.specs)), section.theta_format, section.gradient_formats)
        for fragment in fragments_of(layout_of_specs(swarm.specs), section.num_fragments)
    ]


def _is_large(swarm: Swarm) -> bool:
    return layout_of_specs(swarm.specs).size >= LARGE_MODEL


def gossip_settings(swarm: Swarm, codecs: Sequence[PublicationCodec]) -> GossipSettings:
    """What the run file says about publications and merging them."""
    section, rounds = swarm.published.run.merge, swarm.rounds.settings

    def rules_of(fragment: int, codecs: Iterable[VectorCodec], num_parts: int) -> PublicationRules:
        return PublicationRules(
            run_sha256=rounds.run_sha256,
            tables=tuple(codec.tensors for codec in codecs),
            max_tokens=rounds.max_tokens,
            num_parts=num_parts,
            pull=dataclasses.replace(rounds.pull, busy_limit_s=0.0),
            fragment=fragment,
        )

    return GossipSettings(
        rules=[
            {
                "gradient": rules_of(fragment, codec.gradient.of.values(), section.publications_per_round),
                "weights": rules_of(fragment, [codec.weights], 0),
            }
            for fragment, codec in enumerate(codecs)
        ],
        sizes=[codec.sizes(1 / len(codecs)) for codec in codecs],
        wanted=Wanted(section.num_partners, section.num_weights),
        is_large=_is_large(swarm),
    )


def hosting_of(swarm: Swarm) -> Hosting:
    """What this peer, which may be a bootstrap, does for peers that nobody can dial."""
    settings = gossip_settings(swarm, codecs_of(swarm))
    return Hosting(
        swarm.calls,
        swarm.store,
        settings.rules,
        swarm.signed_presence,
        swarm.refused,
        waits_a_caller=sum(settings.wanted) * len(settings.sizes),
    )


@dataclass(frozen=True)
class Kept:
    """What was pulled and may be merged. Of a large model it is kept as its bytes: decoded it takes four to sixteen
    times as much."""

    tokens: float
    decoded: Callable[[], Arrival]
    is_made_anew: bool = False
    """Each time, so that whoever asks may write into it."""


@dataclass
class GossipExchange(AsynchronousExchange):
    """Asynchronous rounds: nobody waits for anybody."""

    keeps_in_step = True
    gossip: Gossip = field(init=False)
    publishers: dict[tuple[Section, int], Publisher] = field(init=False)
    _codecs: list[PublicationCodec] = field(init=False)
    """Of each fragment, as the lists below."""
    _layout: Layout = field(init=False)
    """Of the whole model."""
    _fragments: tuple[Fragment, ...] = field(init=False)
    _is_large: bool = field(init=False)
    _states: list[OuterState] = field(default_factory=list, repr=False)
    _began_s: list[float] = field(init=False)
    """When its round began."""
    _robustness: list[Robustness] = field(init=False)
    _unmade: Contribution | None = field(default=None, repr=False)
    """The newest, whose gradients are to be made."""
    _unlearned: deque[Contribution] = field(default_factory=deque, repr=False)
    _learning: threading.Lock = field(default_factory=threading.Lock, repr=False)
    _decoding: threading.Lock = field(default_factory=threading.Lock, repr=False)
    _own_tokens: int = 0
    _progress: Progress = field(default_factory=Progress)
    _start: Start = field(default_factory=lambda: Start(inner_steps=1, num_peers=1))
    _steps_per_s: float = 0.0
    _round_began_s: float = 0.0
    _newest_plans: Sequence[Plan] = ()
    """Those that were made last: older ones may reach the network's thread after them."""
    _is_held: bool = False
    """Whether the round that begins is the first with weights that this peer has not merged itself."""

    def __post_init__(self) -> None:
        swarm, section = self.swarm, self.run.merge
        self._codecs = codecs_of(swarm)
        settings = gossip_settings(swarm, self._codecs)
        self._layout, met = layout_of_specs(swarm.specs), section.init == "common"
        self._fragments, self._is_large = fragments_of(self._layout, section.num_fragments), settings.is_large
        self._began_s = [0.0] * len(self._fragments)
        naming = Naming(self._tell_clipped)
        self._robustness = [
            Robustness(section.robust, fragment.layout, naming, met=met) for fragment in self._fragments
        ]
        self.publishers = {
            (what, fragment): Publisher(
                swarm.identity,
                rules.run_sha256,
                rules.tables[0],
                swarm.store,
                shard_rows=lambda: rows_of(swarm.coverage),
                fragment=fragment,
            )
            for fragment, of_fragment in enumerate(settings.rules)
            for what, rules in of_fragment.items()
        }
        gossip = self.gossip = Gossip(
            me=swarm.identity.peer_id,
            calls=swarm.calls,
            membership=swarm.membership,
            settings=settings,
            decode_weights=self._decode_weights_untrusted,
            decode_gradient=self._decode_gradient_untrusted,
            presence=swarm.signed_presence,
            heard_untrusted=swarm.heard_untrusted,
            counted=swarm.tallying.hear,
            refused=swarm.refused,
            ledgers=[
                Ledger(section.max_staleness_rounds, section.publications_per_round, section.num_partners)
                for _ in self._fragments
            ],
            expected_s=swarm.node.traffic.times.expected_s,
            variant=section.partners,
            heard_rows_untrusted=self._hear_rows_untrusted,
            routes=Routes(swarm.node, swarm.membership),
        )
        swarm.publishes(
            self.publishers, gossip, called=gossip.called, places=lambda: gossip.places(self._progress.round - 1)
        )
        swarm.hosts(hosting_of(swarm))

    # ------------------------------------------------------------- the trainer's calls

    def hold(self, states: Sequence[OuterState]) -> None:
        """See `Exchange`."""
        self._states, self._is_held = list(states), True

    def start_round(self, progress: Progress, steps_per_s: float) -> Start:
        """See `Exchange`."""
        start, coverage = self._enter_round(progress, steps_per_s), self.swarm.coverage
        self._progress, self._steps_per_s = progress, steps_per_s
        others = [info.peer for info in self.swarm.membership.volunteers()]
        round_s = start.inner_steps / steps_per_s if steps_per_s > 0 else 0.0
        start = self._start = dataclasses.replace(
            start,
            num_parts=self.run.merge.publications_per_round,
            num_fragments=len(self._fragments),
            every=self._publishes_every(round_s),
            gradient_format=self.gossip.gradient_format(len(others), round_s),
            shard=None if coverage is None else coverage.begin(progress.round, others),
        )
        now, last = swarm_time(), len(self._fragments) - 1
        self._round_began_s = now
        for fragment in range(len(self._fragments)) if self._is_held else [last]:
            self._publish_weights(fragment, progress.round, now)
        self._is_held = False
        plans = self._newest_plans = self._plans(0, now)

        async def begin() -> None:
            self._describe_start(progress, steps_per_s)
            self.gossip.begin(progress.round, plans)

        self._do_soon(begin())
        return start

    def _publishes_every(self, round_s: float) -> int:
        """How-many-th part, in a round that lasts so long (0: it is not known)."""
        most = self.run.merge.publications_per_round
        return publishes_every(most, len(self._fragments), round_s, self._layout.size)

    def _publish_weights(self, fragment: int, round: int, now: float) -> None:
        """A round of that fragment begins, with its weights."""
        theta, peer_tokens = self._states[fragment].theta, self._progress.peer_tokens
        self._began_s[fragment] = now
        self.publishers["weights", fragment].newest = Publication(
            round=round,
            part=0,
            tokens=0,
            inner_steps=0,
            author_tokens=peer_tokens.get(self.swarm.identity.peer_id, 0),
            encode=functools.partial(self._encode_weights, theta, fragment),
        )

    def _plans(self, done: int, now: float) -> list[Plan]:
        """Each fragment's next merge, as far as it is known after so many steps, when those are merged that are due."""
        merge_after, inner_steps, speed = self._start.merge_after, self._start.inner_steps, self._steps_per_s
        if speed > 0 and self.sure_share == 1:
            speed = 1 / expected_step_s(1 / speed, now - self._round_began_s, done)
        found = []
        for moment in sorted(set(merge_after)):
            fragments = tuple(each for each, after in enumerate(merge_after) if after == moment)
            is_over = moment <= done
            steps_left = moment - done + (inner_steps if is_over else 0)
            ends_s = now + self._round_s(steps_left, speed)
            plan = Plan(
                round=self._progress.round + is_over,
                began_s=tuple(self._began_s[each] for each in fragments),
                ends_s=ends_s,
                prepare=functools.partial(self._prepare, tuple(self._states), tuple(self._began_s), ends_s),
                gradient_format=self._start.gradient_format,
                is_sure=self._steps_per_s > 0,
                fragments=fragments,
            )
            found.append(plan)
        return found

    def merged(self, fragment: int, state: OuterState) -> None:
        """See `Exchange`."""
        self._states[fragment] = state
        self._make_gradients()
        if fragment == len(self._fragments) - 1:
            return
        now, merge_after, round = swarm_time(), self._start.merge_after, self._progress.round
        self._publish_weights(fragment, round + 1, now)
        if merge_after[fragment + 1] == merge_after[fragment]:
            return  # that one is merged at once
        self._plan_anew(round, self._plans(merge_after[fragment], now))

    def _plan_anew(self, round: int, plans: Sequence[Plan]) -> None:
        """With what is known by now of when fragments are merged."""
        self._newest_plans, num_stops = plans, self.gossip.num_stops

        async def begin() -> None:
            if plans is self._newest_plans and num_stops == self.gossip.num_stops:
                self.gossip.begin(round, plans)

        self.network.submit_unhurried(begin())  # those before tell of the next merges what these tell, nearly

    def _plan_if_moved(self, done: int) -> None:
        """Plan anew if merges come at other times than was expected; where they are due, that comes of merging."""
        start = self._start
        if done in start.merge_after or not (self._steps_per_s > 0 and self.sure_share == 1):
            return
        plans, way_s = self._plans(done, swarm_time()), start.inner_steps / self._steps_per_s / len(self._fragments)
        was_s, is_s = (min(plan.ends_s for plan in each) for each in (self._newest_plans, plans))
        if is_moved(was_s, is_s, way_s):
            self._plan_anew(self._progress.round, plans)

    def publish(self, contribution: Contribution) -> None:
        """See `Exchange`."""
        if self.swarm.coverage is not None:
            self.swarm.coverage.reached(contribution.tokens)
        self._own_tokens, format = contribution.own_tokens, self._start.gradient_format
        for fragment, of in enumerate(contribution.fragment_rounds):
            if not of.tokens:
                continue  # it was merged a moment ago, and the round has ended early
            self._codecs[fragment].gradient.over(of.round - 1)
            self.publishers["gradient", fragment].newest = Publication(
                round=of.round,
                part=of.part,
                tokens=of.tokens,
                inner_steps=of.inner_steps,
                author_tokens=contribution.own_tokens,
                encode=functools.partial(self._encode_gradient, contribution.lent[fragment], of, fragment, format),
                specs=self._codecs[fragment].gradient.of[format].tensors,
            )

        async def describe() -> None:
            if contribution.round == self._progress.round:
                self.swarm.describe_part(contribution.part, contribution.tokens)
            elif self.swarm.me.part == 0:  # nothing of the next is published yet: of which tokens are told
                self.swarm.describe_part(0, contribution.tokens)

        if self.run.merge.robust != "none":
            self._unlearned.append(contribution)
        self.network.submit_unhurried(describe())
        self._unmade = contribution
        if contribution.inner_steps not in self._start.merge_after:
            self._make_gradients()
        self._plan_if_moved(contribution.inner_steps)

    def _make_gradients(self) -> None:
        """Beside the trainer, which is at the next step's gradient: until then the model's weights stay. Not while it
        merges, which would take longer for it."""
        contribution, self._unmade = self._unmade, None

        def make(contribution: Contribution) -> None:
            self._learn()
            contribution.take_back()

        if contribution is not None:
            self.network.submit_unhurried(asyncio.to_thread(make, contribution))

    def _learn(self) -> None:
        """What is usual here, from what this peer has published."""
        with self._learning:
            while self._unlearned:
                contribution = self._unlearned.popleft()
                for fragment, of in enumerate(contribution.fragment_rounds):
                    if of.tokens:
                        self._robustness[fragment].learn(contribution.gradient_of(fragment), of.tokens)

    def _accept_untrusted(self, fragment: int, held: Held, arrival: Arrival) -> Arrival:
        """What the run's rule lets enter a merge: it compares with all that was published here before."""
        self._learn()
        author, round = held.snapshot.author, held.snapshot.manifest.round
        return self._robustness[fragment].accept(author, arrival, self._states[fragment].theta, round)

    def _hear_rows_untrusted(self, peer: str, rows: Sequence[pb.Signed]) -> None:
        if self.swarm.coverage is not None:
            self.swarm.coverage.hear_untrusted(peer, rows)

    def _encode_weights(self, theta: Tensor, fragment: int) -> Body:
        return Body([self._codecs[fragment].weights.encode(theta)])

    def _encode_gradient(self, lent: LentWeights, of: FragmentRound, fragment: int, format: GradientFormat) -> Body:
        """It holds one fragment of a contribution, which may be published for long, and not all of them."""
        return Body([self._codecs[fragment].gradient.encode_sum(lent.gradient(), format, of.round, of.part)])

    def collect(self, fragment: int = 0) -> Gathered | Replaced:
        """See `Exchange`. Waits for nobody, unless this peer has fallen far behind and takes the others' weights."""
        round, swarm = self._progress.round, self.swarm
        ready, is_last = self.gossip.take(round, fragment), fragment == len(self._fragments) - 1
        if is_last:
            swarm.tallying.learn({swarm.identity.peer_id: self._own_tokens})
            if (replaced := self._catch_up(round)) is not None:
                return replaced
        counts = swarm.tallying.contributions() if is_last else {}
        pulled = () if ready is None else ready.pulled
        if ready is not None and ready.prepared.displacement is not None:
            self._robustness[fragment].merged(ready.prepared.displacement)
        return Gathered(
            prepared=self._merge_of(fragment, self._states[fragment], ()) if ready is None else ready.prepared,
            merged=self._merged(pulled),
            apart=self._apart(pulled),
            run_tokens=sum(counts.values()),
            peer_tokens=counts,
        )

    def _apart(self, pulled: Sequence[Pulled]) -> tuple[Arrival, ...]:
        rule = self.run.merge.robust
        return () if mean_of(rule) is None else apart(rule, [each.arrival.decoded() for each in pulled])

    def _catch_up(self, round: int) -> Replaced | None:
        """The others' weights, if this peer has fallen far behind."""
        behind = left_behind(round, self._rounds_of_others(), self.run.merge.max_staleness_rounds)
        reason = f"it was {behind} rounds behind the others"
        replaced = self._consensus(reason, round + 1) if behind else None
        if replaced is not None:
            self.swarm.emit(CaughtUpEvent(round=replaced.progress.round, from_peer=replaced.from_peer, reason=reason))
        return replaced

    def _merged(self, pulled: Sequence[Pulled]) -> tuple[Merged, ...]:
        """What was merged of each partner: its weights, its pseudo-gradient or both."""
        by_peer: dict[str, list[Pulled]] = {}
        for each in pulled:
            by_peer.setdefault(each.peer, []).append(each)
        return tuple(
            Merged(
                peer=peer,
                round=(newest := max(each.mark.round for each in sections)),
                part=max(each.mark.part for each in sections if each.mark.round == newest),
                tokens=sum(each.arrival.tokens for each in sections),
                staleness_rounds=self._progress.round - newest,
                pull_s=max(each.pull_s for each in sections),
            )
            for peer, sections in by_peer.items()
        )

    def _decode_weights_untrusted(self, fragment: int, held: Held) -> Kept:
        """What enters a merge of a publication's weights: decoded, and clipped as the run's rule says."""
        decode = functools.partial(self._codecs[fragment].weights_untrusted, held)
        return self._kept_untrusted(fragment, held, decode)

    def _decode_gradient_untrusted(self, fragment: int, held: Held, news: News, earlier: Held | None) -> Kept:
        """The same of its pseudo-gradient."""
        decode = functools.partial(self._codecs[fragment].gradient_untrusted, held, news, earlier)
        return self._kept_untrusted(fragment, held, decode)

    def _kept_untrusted(self, fragment: int, held: Held, decode: Callable[[], Arrival]) -> Kept:
        """Look at what was pulled, one at a time: what is decoded of a large model takes much memory."""
        with self._decoding:
            arrival = decode()
            accepted = self._accept_untrusted(fragment, held, arrival)
            tokens, factor = accepted.tokens, accepted.lengthened
            is_cut = factor is None or accepted.theta is not arrival.theta
            if factor is None or is_cut or not self._is_large or mean_of(self.run.merge.robust) is not None:
                return Kept(tokens, lambda: accepted)

        def again() -> Arrival:
            made = decode()
            if factor != 1:
                made.gradient.mul_(factor)
            return dataclasses.replace(made, tokens=tokens)

        return Kept(tokens, again, is_made_anew=True)

    def _tell_clipped(self, peer: str, incident: Incident) -> None:
        self.swarm.emit(ClippedEvent(from_peer=peer, rule=incident.rule, detail=incident.detail))

    def _prepare(
        self,
        states: Sequence[OuterState],
        began_s: Sequence[float],
        ends_s: float,
        fragment: int,
        pulled: Sequence[Pulled],
    ) -> Prepared:
        """All of a merge that does not need this peer's own gradient; in a thread beside the trainer's."""
        arrivals = (
            dataclasses.replace(
                each.arrival.decoded(), ahead_rounds=ahead_rounds(each.began_s, began_s[fragment], ends_s)
            )
            for each in pulled
        )
        with self._decoding:
            may_write = all(each.arrival.is_made_anew for each in pulled)
            return self._merge_of(fragment, states[fragment], arrivals, may_write=may_write)

    def _merge_of(
        self, fragment: int, state: OuterState, arrivals: Iterable[Arrival], *, may_write: bool = False
    ) -> Prepared:
        layout, rate = self._fragments[fragment].layout, self.run.merge.outer_learning_rate
        return prepare(state, arrivals, layout, rate, may_write=may_write)

    # ------------------------------------------------------------- present weights

    def _rounds_of_others(self) -> list[int]:
        return [info.round for info in self.swarm.membership.volunteers() if info.round]

    def _is_old(self, round: int) -> bool:
        """Whether what this peer has is to be given up. Where nobody else trains, no merge would bring what the archive
        has, so that this must not be ahead at all: nor where whoever did does not answer, and may have been killed."""
        members = self.swarm.membership
        if rounds_behind(round, self._rounds_of_others()) > self.run.merge.max_staleness_rounds:
            return True
        merges = any(info.round for info in members.answering())
        return not merges and any(info.round > round for info in members.live() if info.is_bootstrap)

    def present_state(self, progress: Progress) -> Replaced | None:
        """See `SwarmExchange`: the consensus, unless what this peer has is as good as new."""
        self._fresh = True
        has_own = progress.round > 0
        for _ in range(_TRIES):
            live = self.swarm.membership.live()
            if not any(info.round > 0 for info in live):
                return None
            if has_own and not self._is_old(progress.round):
                return None
            new = self._consensus("was away" if has_own else "joined late", progress.round)
            if new is not None:
                return new
            self.stop.sleep(1.0)
        if has_own:
            return None  # it goes on with what it has: the others' weights come with its first merges
        raise RunTimeError("nobody could deliver the run's present state; try again in a minute")

    def final_theta(self, own: Tensor) -> Tensor:
        """See `SwarmExchange`: the consensus of all who have finished. Waits for those who are about to."""
        swarm, total = self.swarm, self.run.run.total_tokens
        wait_for(self.network.submit(self.gossip.stop()), self.stop)  # nothing is merged any more
        give_up_s = time.monotonic() + _LAST_ROUND_S
        while time.monotonic() < give_up_s:
            wait_for(self.network.submit(swarm.greet_everyone()), self.stop)
            if all(info.run_tokens >= total for info in swarm.membership.volunteers()):
                break
            self.stop.sleep(_LOOK_S)
        volunteers = [info.peer for info in swarm.membership.volunteers() if info.run_tokens >= total]
        sample = random.sample(volunteers, min(SAMPLE, len(volunteers)))
        states = wait_for(self.network.submit(swarm.states.fetch_weights(sample)), self.stop)
        self._settle()
        if not states:
            return own
        others = [theta_of(state, own.numel()) for state in states]
        return mean_of_near([own, *others], self._layout, out=others[0])[0]

    def kept(self) -> Mapping[str, Callable[[], Any]]:
        """See `SwarmExchange`: what was merged of whom, and who has seen which data."""
        coverage = self.swarm.coverage
        seen = {} if coverage is None else {_COVERAGE: coverage.kept}
        return {_LEDGER: self.gossip.ledger_rows, _CLIPPED: self._clipped, **seen}

    def _clipped(self) -> list[dict[str, Any]]:
        """What is usual here of each fragment."""
        return [{name: give() for name, give in each.kept().items()} for each in self._robustness]

    def restore(self, extra: Mapping[str, Any]) -> None:
        """See `SwarmExchange`."""
        try:
            for ledger, rows in zip(self.gossip.ledgers, extra.get(_LEDGER, ()), strict=_LEDGER in extra):
                ledger.load(rows)
            for robustness, kept in zip(self._robustness, extra.get(_CLIPPED, ()), strict=_CLIPPED in extra):
                robustness.restore(kept)
        except (ValueError, TypeError) as error:
            message = f"what the checkpoint says of merges is not used ({error}); parts may be merged twice"
            self.swarm.emit(WarningEvent(message=message))
        try:
            if self.swarm.coverage is not None:
                self.swarm.coverage.restore(extra.get(_COVERAGE))
        except (ValueError, TypeError) as error:
            message = f"what the checkpoint says of the data is not used ({error}); it comes back from others"
            self.swarm.emit(WarningEvent(message=message))

    def _consensus(self, reason: str, own_round: int) -> Replaced | None:
        """The others' present weights; None if nobody delivers."""
        swarm = self.swarm
        live = swarm.membership.live()
        volunteers = [info.peer for info in callable_first(swarm.membership.volunteers())]
        sample = random.sample(volunteers, min(SAMPLE, len(volunteers)))
        for peers in (sample, [info.peer for info in live if info.is_bootstrap]):
            fetching = self.network.submit(swarm.states.fetch(peers, 1))
            states = wait_for(fetching, self.stop, lambda: self.on_arriving(swarm.store.arriving))
            if not states:
                continue
            more = self._counted_by_others(states)
            wait_for(self.network.submit(swarm.tallying.read_some()), self.stop)
            states = not_far_behind(states, self.run.merge.max_staleness_rounds)
            progress = self._progress_of(states, own_round, more)
            for found in states:
                self._hear_rows_untrusted(found.peer, found.held.snapshot.manifest.coverage)
            told = [places_of_untrusted(found.held.snapshot.manifest, self.run.merge) for found in states]
            state = consensus_of(states, self._layout)
            self.gossip.took_states(told, {found.peer: found.round for found in states}, progress.round)
            for robustness in self._robustness:
                robustness.comes_back()
            return Replaced(state=state, progress=progress, from_peer=states[0].peer, reason=reason)
        return None

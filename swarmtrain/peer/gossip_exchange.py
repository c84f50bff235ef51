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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from swarmtrain.algorithm.gossip import Arrival, Layout, Prepared, prepare
from swarmtrain.algorithm.outer import OuterState
from swarmtrain.algorithm.robust import Incident
from swarmtrain.errors import RunTimeError
from swarmtrain.events import CaughtUpEvent, ClippedEvent, WarningEvent
from swarmtrain.membership.hosts import callable_first
from swarmtrain.membership.partners import Ledger, News, left_behind, rounds_behind
from swarmtrain.membership.progress import Progress
from swarmtrain.membership.pulls import Wanted, ahead_rounds
from swarmtrain.network.codec import PublicationCodec
from swarmtrain.network.coverage import rows_of
from swarmtrain.network.daemon import swarm_time
from swarmtrain.network.gossiping import Gossip, GossipSettings, Plan, Pulled
from swarmtrain.network.hosting import Hosting, Routes
from swarmtrain.network.publications import Publication, PublicationRules, Publisher
from swarmtrain.network.snapshots import Body, Held
from swarmtrain.network.swarm import Swarm
from swarmtrain.peer.asynchronous import AsynchronousExchange
from swarmtrain.peer.common import wait_for
from swarmtrain.peer.consensus import SAMPLE, consensus_of, layout_of_specs, mean_of_near, not_far_behind, theta_of
from swarmtrain.peer.robustness import Robustness, apart
from swarmtrain.peer.trainer import Contribution, Gathered, Merged, Replaced, Start
from swarmtrain.v1 import snapshot_pb2 as pb

__all__ = ["GossipExchange", "hosting_of"]

_LAST_ROUND_S = 20.0
"""How long a peer that is done waits for others' last round."""
_LOOK_S = 0.2
_TRIES = 3
_LEDGER = "ledger"
_COVERAGE = "coverage"


def gossip_settings(swarm: Swarm) -> GossipSettings:
    """What the run file says about publications and merging them."""
    section, rounds = swarm.published.run.merge, swarm.rounds.settings
    codec = PublicationCodec(swarm.specs, section.theta_format, section.gradient_format)
    rules = PublicationRules(
        run_sha256=rounds.run_sha256,
        specs=codec.gradient.tensors,
        max_tokens=rounds.max_tokens,
        num_parts=section.publications_per_round,
        pull=dataclasses.replace(rounds.pull, busy_limit_s=0.0),
    )
    return GossipSettings(
        rules={"gradient": rules, "weights": dataclasses.replace(rules, specs=codec.weights.tensors, num_parts=0)},
        sizes=codec.sizes,
        wanted=Wanted(section.num_partners, section.num_weights),
    )


def hosting_of(swarm: Swarm) -> Hosting:
    """What this peer, which may be a bootstrap, does for peers that nobody can dial."""
    settings = gossip_settings(swarm)
    return Hosting(
        swarm.calls,
        swarm.store,
        settings.rules,
        swarm.signed_presence,
        swarm.refused,
        waits_a_caller=sum(settings.wanted),
    )


@dataclass
class GossipExchange(AsynchronousExchange):
    """Asynchronous rounds: nobody waits for anybody."""

    keeps_in_step = True
    gossip: Gossip = field(init=False)
    publisher: Publisher = field(init=False)
    weights_publisher: Publisher = field(init=False)
    _codec: PublicationCodec = field(init=False)
    _layout: Layout = field(init=False)
    _state: OuterState = field(init=False, repr=False)
    _robustness: Robustness = field(init=False)
    _unlearned: deque[Contribution] = field(default_factory=deque, repr=False)
    _learning: threading.Lock = field(default_factory=threading.Lock, repr=False)
    _own_tokens: int = 0
    _round: int = 0

    def __post_init__(self) -> None:
        swarm, section = self.swarm, self.run.merge
        self._codec = PublicationCodec(swarm.specs, section.theta_format, section.gradient_format)
        self._layout = layout_of_specs(swarm.specs)
        self._robustness = Robustness(section.robust, self._layout, self._tell_clipped, met=section.init == "common")
        settings = gossip_settings(swarm)
        self.publisher, self.weights_publisher = (
            Publisher(
                swarm.identity, rules.run_sha256, rules.specs, swarm.store, shard_rows=lambda: rows_of(swarm.coverage)
            )
            for rules in (settings.rules["gradient"], settings.rules["weights"])
        )
        self.gossip = Gossip(
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
            ledger=Ledger(
                max_staleness_rounds=section.max_staleness_rounds,
                num_parts=section.publications_per_round,
                max_held=section.num_partners,
            ),
            expected_s=swarm.node.traffic.times.expected_s,
            variant=section.partners,
            heard_rows_untrusted=self._hear_rows_untrusted,
            routes=Routes(swarm.node, swarm.membership),
        )
        swarm.publisher, swarm.weights_publisher = self.publisher, self.weights_publisher
        swarm.gossip, swarm.hosting, swarm.called = self.gossip, hosting_of(swarm), self.gossip.called

    # ------------------------------------------------------------- the trainer's calls

    def start_round(self, progress: Progress, steps_per_s: float) -> Start:
        """See `Exchange`."""
        start = self._enter_round(progress, steps_per_s)
        self._round = progress.round
        now, theta, coverage = swarm_time(), self._state.theta, self.swarm.coverage
        ends_s = now + self._round_s(start.inner_steps, steps_per_s)
        plan = Plan(
            round=progress.round,
            started_s=now,
            ends_s=ends_s,
            prepare=functools.partial(self._prepare, self._state, now, ends_s),
            is_sure=steps_per_s > 0,
        )
        self.weights_publisher.newest = Publication(
            round=progress.round,
            part=0,
            tokens=0,
            inner_steps=0,
            author_tokens=progress.peer_tokens.get(self.swarm.identity.peer_id, 0),
            encode=lambda: self._encode_weights(theta),
        )

        async def begin() -> None:
            self._describe_start(progress, steps_per_s)
            self.gossip.begin(plan)

        self._do_soon(begin())
        others = [info.peer for info in self.swarm.membership.volunteers()]
        return dataclasses.replace(
            start,
            num_parts=self.run.merge.publications_per_round,
            shard=None if coverage is None else coverage.begin(progress.round, others),
        )

    def publish(self, contribution: Contribution) -> None:
        """See `Exchange`."""
        if self.swarm.coverage is not None:
            self.swarm.coverage.reached(contribution.tokens)
        self._own_tokens = contribution.own_tokens
        self.publisher.newest = Publication(
            round=contribution.round,
            part=contribution.part,
            tokens=contribution.tokens,
            inner_steps=contribution.inner_steps,
            author_tokens=contribution.own_tokens,
            encode=lambda: self._encode_gradient(contribution),
        )

        async def describe() -> None:
            self.swarm.describe_part(contribution.part, contribution.tokens)
            if self._unlearned:  # in the thread too: the gradient is computed by who asks first
                await asyncio.to_thread(self._learn)

        if self.run.merge.robust != "none":
            self._unlearned.append(contribution)
        self.network.submit_unhurried(describe())

    def _learn(self) -> None:
        """What is usual here, from what this peer has published."""
        with self._learning:
            while self._unlearned:
                contribution = self._unlearned.popleft()
                self._robustness.learn(contribution.gradient, contribution.tokens)

    def _accept_untrusted(self, held: Held, arrival: Arrival) -> Arrival:
        """What the run's rule lets enter a merge: it compares with all that was published here before."""
        self._learn()
        return self._robustness.accept(held.snapshot.author, arrival, self._state.theta)

    def _hear_rows_untrusted(self, peer: str, rows: Sequence[pb.Signed]) -> None:
        if self.swarm.coverage is not None:
            self.swarm.coverage.hear_untrusted(peer, rows)

    def _encode_weights(self, theta: Tensor) -> Body:
        return Body([self._codec.weights.encode(theta)])

    def _encode_gradient(self, contribution: Contribution) -> Body:
        return Body([self._codec.gradient.encode_sum(contribution.gradient, contribution.round, contribution.part)])

    def collect(self) -> Gathered | Replaced:
        """See `Exchange`. Waits for nobody, unless this peer has fallen far behind and takes the others' weights."""
        ready, swarm = self.gossip.take(self._round), self.swarm
        swarm.tallying.learn({swarm.identity.peer_id: self._own_tokens})
        if behind := left_behind(self._round, self._rounds_of_others(), self.run.merge.max_staleness_rounds):
            reason = f"it was {behind} rounds behind the others"
            if (replaced := self._consensus(reason, self._round + 1)) is not None:
                swarm.emit(CaughtUpEvent(round=replaced.progress.round, from_peer=replaced.from_peer, reason=reason))
                return replaced
        counts = swarm.tallying.contributions()
        pulled = () if ready is None else ready.pulled
        if ready is not None and ready.prepared.displacement is not None:
            self._robustness.merged(ready.prepared.displacement)
        return Gathered(
            prepared=self._merge_of(self._state, ()) if ready is None else ready.prepared,
            merged=self._merged(pulled),
            apart=apart(self.run.merge.robust, [each.arrival for each in pulled]),
            run_tokens=sum(counts.values()),
            peer_tokens=counts,
        )

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
                staleness_rounds=self._round - newest,
                pull_s=max(each.pull_s for each in sections),
            )
            for peer, sections in by_peer.items()
        )

    def _decode_weights_untrusted(self, held: Held) -> Arrival:
        """What enters a merge of a publication's weights: decoded, and clipped as the run's rule says."""
        return self._accept_untrusted(held, self._codec.weights_untrusted(held))

    def _decode_gradient_untrusted(self, held: Held, news: News, earlier: Held | None) -> Arrival:
        """The same of its pseudo-gradient."""
        return self._accept_untrusted(held, self._codec.gradient_untrusted(held, news, earlier))

    def _tell_clipped(self, peer: str, incident: Incident) -> None:
        self.swarm.emit(ClippedEvent(from_peer=peer, rule=incident.rule, detail=incident.detail))

    def _prepare(self, state: OuterState, began_s: float, ends_s: float, pulled: Sequence[Pulled]) -> Prepared:
        """All of a merge that does not need this peer's own gradient; in a thread beside the trainer's."""
        arrivals = [
            dataclasses.replace(each.arrival, ahead_rounds=ahead_rounds(each.began_s, began_s, ends_s))
            for each in pulled
        ]
        return self._merge_of(state, arrivals)

    def _merge_of(self, state: OuterState, arrivals: Sequence[Arrival]) -> Prepared:
        return prepare(state, arrivals, self._layout, self.run.merge.outer_learning_rate)

    # ------------------------------------------------------------- present weights

    def offer(self, state: OuterState, progress: Progress) -> None:
        """See `SwarmExchange`. The trainer does not wait for it."""
        self._state = state
        super().offer(state, progress)

    def _rounds_of_others(self) -> list[int]:
        return [info.round for info in self.swarm.membership.volunteers() if info.round]

    def _is_old(self, round: int) -> bool:
        """Whether what this peer has is to be given up. Where nobody else trains, no merge would bring what the archive
        has, so that this must not be ahead at all."""
        if others := self._rounds_of_others():
            return rounds_behind(round, others) > self.run.merge.max_staleness_rounds
        return any(info.round > round for info in self.swarm.membership.live() if info.is_bootstrap)

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
        return mean_of_near([own, *(theta_of(state, own.numel()) for state in states)], self._layout)[0]

    def kept(self) -> Mapping[str, Callable[[], Any]]:
        """See `SwarmExchange`: what was merged of whom, and who has seen which data."""
        coverage = self.swarm.coverage
        seen = {} if coverage is None else {_COVERAGE: coverage.kept}
        return {_LEDGER: self.gossip.ledger_rows, **self._robustness.kept(), **seen}

    def restore(self, extra: Mapping[str, Any]) -> None:
        """See `SwarmExchange`."""
        try:
            self.gossip.ledger.load(extra.get(_LEDGER, []))
            self._robustness.restore(extra)
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
            wait_for(self.network.submit(swarm.tallying.read_some()), self.stop)
            for found in states:
                self._hear_rows_untrusted(found.peer, found.held.snapshot.manifest.coverage)
            states = not_far_behind(states, self.run.merge.max_staleness_rounds)
            progress = self._progress_of(states, own_round)
            state = consensus_of(states, self._layout)
            self.gossip.forget_pulled()
            self.offer(state, progress)
            return Replaced(state=state, progress=progress, from_peer=states[0].peer, reason=reason)
        return None

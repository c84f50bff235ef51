"""Trainer's side of gossip: it hands over its publications, takes what is ready to merge, and never waits.

A publication costs the trainer at most one copy of its weights; it is quantised, hashed and signed only when a partner
asks for it. Partners' publications are pulled, checked and averaged in the background, so that at a round's end the
trainer computes one outer step.

Threads: the `Exchange` methods run on the trainer's thread, or `collect` on one of its own while the trainer does not
publish; `decode_untrusted` and `prepare` on a pool (one at a time, `_decoding`); `took_untrusted` and the coroutines in
the network thread.
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

from swarmtrain.algorithm.fragments import Fragment
from swarmtrain.algorithm.gossip import Layout, PartnerUpdate, PreparedMerge, prepare
from swarmtrain.algorithm.outer import OuterState
from swarmtrain.algorithm.robust import ClipIncident
from swarmtrain.errors import RunTimeError
from swarmtrain.events import CaughtUpEvent, ClippedEvent, WarningEvent
from swarmtrain.methods.method import GradientFormat
from swarmtrain.network.answers import Serving
from swarmtrain.network.asynchronous.publications import OwnPublication, PublicationRules, Publisher
from swarmtrain.network.asynchronous.puller import Puller
from swarmtrain.network.codec import PublicationCodec
from swarmtrain.network.coverage import rows_of
from swarmtrain.network.daemon import swarm_time
from swarmtrain.network.reachability.hosts import HostedPublications
from swarmtrain.network.snapshots.store import Body, HeldSnapshot, TensorSpec
from swarmtrain.network.swarm import Swarm
from swarmtrain.network.tensor_groups import TensorGroup, groups_of, rules_of
from swarmtrain.peer.lifecycle.node import wait_for
from swarmtrain.peer.merging.asynchronous_exchange import AsynchronousExchange
from swarmtrain.peer.merging.averaged_group import AveragedGroup
from swarmtrain.peer.merging.consensus import (
    SAMPLE,
    consensus_of,
    fragments_of_specs,
    layout_of_specs,
    mean_of_near,
    not_far_behind,
    places_of_untrusted,
    theta_of,
)
from swarmtrain.peer.merging.gossip_runner import Engine, GossipRunner
from swarmtrain.peer.merging.kept_publication import KeptPublication
from swarmtrain.peer.merging.robustness import Naming, Robustness, apart
from swarmtrain.peer.merging.rules import mean_of
from swarmtrain.peer.merging.updates import Gathered, LentWeights, LocalUpdate, MergeInput, Replaced
from swarmtrain.peer.training.session import Start
from swarmtrain.protocol.gossip.engine import GossipEngine, GossipSettings
from swarmtrain.protocol.gossip.fragments import FragmentRound, publishes_every
from swarmtrain.protocol.gossip.merge_plans import MergePlan, MergePlanner, TrainersRound
from swarmtrain.protocol.gossip.messages import DecodePublication, FetchConsensus, PrepareMerge, ReceivedPublication
from swarmtrain.protocol.gossip.partners import is_too_old
from swarmtrain.protocol.gossip.pulls import LARGE_MODEL, GroupName
from swarmtrain.protocol.membership.hosts import callable_first
from swarmtrain.protocol.tokens.progress import Progress
from swarmtrain.v1 import snapshot_pb2 as pb

_LAST_ROUND_S = 20.0
"""Seconds that a peer that is done waits for others' last round."""
_POLL_INTERVAL_S = 0.2
_TRIES = 3
_LEDGER = "ledger"
_CLIPPED = "clipped"
_COVERAGE = "coverage"


def codecs_of(swarm: Swarm) -> list[PublicationCodec]:
    """Return the codec of each fragment."""
    group = swarm.published.run.merge
    formats = group.theta_format, group.gradient_formats
    return [
        PublicationCodec(groups_of(fragment.pick(swarm.specs), *formats, group.publications_per_round))
        for fragment in fragments_of_specs(swarm.specs, group.num_fragments)
    ]


def gossip_settings(swarm: Swarm, codecs: Sequence[PublicationCodec]) -> GossipSettings:
    """Return the run file's settings for merging publications."""
    sizes = [codec.sizes(1 / len(codecs)) for codec in codecs]
    is_large = layout_of_specs(swarm.specs).size >= LARGE_MODEL
    return GossipSettings.of(swarm.published.run.merge, rules_of(codecs[0].groups), sizes, is_large=is_large)


def publication_rules(swarm: Swarm, codecs: Sequence[PublicationCodec]) -> list[Mapping[GroupName, PublicationRules]]:
    """Return the run file's rules for publications: for each fragment, by tensor group."""
    rounds = swarm.rounds.settings

    def rules_of(fragment: int, group: TensorGroup) -> PublicationRules:
        return PublicationRules(
            run_sha256=rounds.run_sha256,
            tables=group.tables,
            max_tokens=rounds.max_tokens,
            num_parts=group.num_parts,
            # A busy partner is not waited for: another one is asked in its place.
            pull=dataclasses.replace(rounds.pull, busy_limit_s=0.0),
            fragment=fragment,
        )

    return [{group.name: rules_of(fragment, group) for group in codec.groups} for fragment, codec in enumerate(codecs)]


def hosting_of(swarm: Swarm) -> HostedPublications:
    """Return the publications that this peer, which may be a bootstrap, serves for peers that nobody can dial."""
    group, codecs = swarm.published.run.merge, codecs_of(swarm)
    num_pulls = {"mean": group.num_weights, "outer step": group.num_partners}
    return HostedPublications(
        swarm.calls,
        swarm.store,
        publication_rules(swarm, codecs),
        swarm.presence.signed,
        swarm.peers.refused,
        waits_a_caller=sum(num_pulls[each.rule] for codec in codecs for each in codec.groups),
    )


@dataclass
class GossipExchange(AsynchronousExchange):
    """Exchange of gossip: rounds in which no peer waits for another."""

    keeps_in_step = True
    gossip: GossipRunner = field(init=False)
    publishers: dict[tuple[GroupName, int], Publisher] = field(init=False)
    _codecs: list[PublicationCodec] = field(init=False)
    """Codec of each fragment; the lists below are by fragment too."""
    _layout: Layout = field(init=False)
    """Layout of the whole model."""
    _fragments: tuple[Fragment, ...] = field(init=False)
    _is_large: bool = field(init=False)
    _states: list[OuterState] = field(default_factory=list, repr=False)
    _planner: MergePlanner = field(init=False)
    _robustness: list[Robustness] = field(init=False)
    _averaged: dict[tuple[GroupName, int], AveragedGroup] = field(init=False)
    """Tensor groups averaged beside the weights, by name and fragment."""
    _unmade: LocalUpdate | None = field(default=None, repr=False)
    """Newest local update whose gradients have not been computed yet."""
    _unlearned: deque[LocalUpdate] = field(default_factory=deque, repr=False)
    _learning: threading.Lock = field(default_factory=threading.Lock, repr=False)
    _decoding: threading.Lock = field(default_factory=threading.Lock, repr=False)
    _own_tokens: int = 0
    _published_steps: int = 0
    """Inner steps of the round at the last publication, which merges are made of."""
    _progress: Progress = field(default_factory=Progress)
    _start: Start = field(default_factory=lambda: Start(inner_steps=1, num_peers=1))
    _is_held: bool = False
    """True if the next round begins with weights that this peer did not merge itself."""

    def __post_init__(self) -> None:
        swarm, group = self.swarm, self.run.merge
        self._codecs = codecs_of(swarm)
        settings, rules = gossip_settings(swarm, self._codecs), publication_rules(swarm, self._codecs)
        self._layout, met = layout_of_specs(swarm.specs), group.init == "common"
        self._fragments = fragments_of_specs(swarm.specs, group.num_fragments)
        self._is_large = settings.is_large
        self._planner = MergePlanner(len(self._fragments), self.sure_share)
        naming = Naming(self._tell_clipped)
        self._robustness = [Robustness(group.robust, fragment.layout, naming, met=met) for fragment in self._fragments]
        self._averaged = {
            (name, fragment): AveragedGroup(averaged, group.robust, naming)
            for fragment, codec in enumerate(self._codecs)
            for name, averaged in codec.averaged.items()
            if averaged is not codec.weights
        }
        self.publishers = {
            (what, fragment): Publisher(
                swarm.identity,
                of.run_sha256,
                of.tables[0],
                swarm.store,
                shard_rows=lambda: rows_of(swarm.coverage),
                fragment=fragment,
            )
            for fragment, of_fragment in enumerate(rules)
            for what, of in of_fragment.items()
        }
        engine: Engine = GossipEngine(swarm.identity.peer_id, settings)
        puller = Puller(
            swarm.calls, swarm.membership, rules, swarm.presence.signed, swarm.peers.receive_reply_untrusted
        )
        expected_s = swarm.node.traffic.times.expected_s
        self.gossip = GossipRunner(engine, puller, swarm.membership, self, swarm.peers.refused, expected_s)

    def serving(self) -> Serving:
        """Return what this peer serves to others from the moment it enters the swarm. See `SwarmExchange`."""
        gossip = self.gossip
        return Serving(
            publishers=self.publishers,
            pulling=gossip,
            called=gossip.called,
            places=lambda: gossip.places(self._progress.round - 1),
            hosting=hosting_of(self.swarm),
        )

    # ------------------------------------------------------------- the trainer's calls

    def hold(self, states: Sequence[OuterState]) -> None:
        """Receive each fragment's state before the first round, and again after the weights were taken from others. See
        `Exchange`."""
        super().hold(states)
        self._states, self._is_held = list(states), True

    def start_round(self, progress: Progress, steps_per_s: float) -> Start:
        """Return the plan of the next round. See `Exchange`."""
        steps_taken = self._take_over_steps()
        start, coverage = self._enter_round(progress, steps_per_s), self.swarm.coverage
        self._progress = progress
        others = [info.peer for info in self.swarm.membership.volunteers()]
        own_steps_per_s = steps_per_s / self.step_share
        round_s = start.inner_steps / own_steps_per_s if steps_per_s > 0 else 0.0
        start = self._start = dataclasses.replace(
            start,
            num_parts=self.run.merge.publications_per_round,
            num_fragments=len(self._fragments),
            every=self._publishes_every(round_s),
            gradient_format=self.gossip.gradient_format(round_s),
            shard=None if coverage is None else coverage.begin(progress.round, others),
        )
        # After a merge the weights of every other fragment are published already (`merged`).
        for fragment in range(len(self._fragments)) if self._is_held else [len(self._fragments) - 1]:
            self._publish_weights(fragment, progress.round)
        of = TrainersRound(
            number=progress.round,
            inner_steps=start.inner_steps,
            merge_after=start.merge_after,
            gradient_format=start.gradient_format,
            steps_per_s=own_steps_per_s,
        )
        plans = self._planner.round_began(of, swarm_time(), all_begin=self._is_held, steps_taken=steps_taken)
        self._is_held, planned = False, self.gossip.plan(progress.round, plans)

        async def begin() -> None:
            self._describe_start(progress, steps_per_s)
            await planned

        self._do_soon(begin())
        return start

    def _publishes_every(self, round_s: float) -> int:
        """Return n such that every n-th part is published, in a round of `round_s` seconds (0: unknown)."""
        most = self.run.merge.publications_per_round
        return publishes_every(most, len(self._fragments), round_s, self._layout.size)

    def _publish_weights(self, fragment: int, round: int) -> None:
        """Publish the weights with which a round of that fragment begins."""
        theta, peer_tokens = self._states[fragment].theta, self._progress.peer_tokens
        self.publishers[self._codecs[fragment].weights.group.name, fragment].newest = OwnPublication(
            round=round,
            part=0,
            tokens=0,
            inner_steps=0,
            author_tokens=peer_tokens.get(self.swarm.identity.peer_id, 0),
            encode=functools.partial(self._encode_weights, theta, fragment),
        )

    def merged(self, fragment: int, state: OuterState) -> None:
        """Receive a fragment's state after its merge. See `Exchange`."""
        self._states[fragment] = state
        self._make_gradients()
        if fragment < len(self._fragments) - 1:
            self._publish_weights(fragment, self._progress.round + 1)
        self._plan_anew(self._planner.merged(fragment, swarm_time(), self._told_steps - self._published_steps))

    def _plan_anew(self, plans: Sequence[MergePlan] | None) -> None:
        """Plan pulls anew for changed times of the next merges; None changes nothing."""
        if plans is not None:  # not urgent: the earlier plans say nearly the same of the next merges
            self.network.submit_unhurried(self.gossip.plan(self._progress.round, plans))

    def publish(self, contribution: LocalUpdate) -> None:
        """Hand over the round's update so far, for others to pull. See `Exchange`."""
        if self.swarm.coverage is not None:
            self.swarm.coverage.reached(contribution.tokens)
        self._own_tokens, format = contribution.own_tokens, self._start.gradient_format
        self._published_steps = self._told_steps
        for (name, fragment), averaged in self._averaged.items():
            averaged.published(contribution.values[name, fragment])
        for fragment, of in enumerate(contribution.fragment_rounds):
            codec = self._codecs[fragment]
            if not of.tokens:  # merged a moment ago, as the round ended early, or a group that is not trained
                if not contribution.has_trained(fragment):
                    self._drop_old(codec, fragment, of.round)
                continue
            # Nobody asks for earlier rounds any more: the residuals of their rounding are released, 4 bytes a number.
            codec.gradient.over(of.round - 1)
            for group in codec.groups:
                if group.num_parts:
                    encode, specs = self._encoding(contribution, fragment, group, format)
                    self.publishers[group.name, fragment].newest = OwnPublication(
                        round=of.round,
                        part=of.part,
                        tokens=of.tokens,
                        inner_steps=of.inner_steps,
                        author_tokens=contribution.own_tokens,
                        encode=encode,
                        specs=specs,
                    )

        async def describe() -> None:
            if contribution.round == self._progress.round:
                self.swarm.presence.describe_part(contribution.part, contribution.tokens)
            elif self.swarm.presence.me.part == 0:
                # The next round has begun and published nothing yet: part 0, with the tokens of the round that ended.
                self.swarm.presence.describe_part(0, contribution.tokens)

        if self.run.merge.robust != "none":
            self._unlearned.append(contribution)
        self.network.submit_unhurried(describe())
        self._unmade = contribution
        if contribution.inner_steps not in self._start.merge_after:
            self._make_gradients()
        self._plan_anew(self._planner.steps_done(contribution.inner_steps, swarm_time()))

    def _drop_old(self, codec: PublicationCodec, fragment: int, round: int) -> None:
        """Publish no gradient of a group that this peer trained two of its rounds ago or earlier: after some more
        rounds, others would take an old publication for a lie."""
        for group in codec.groups:
            publisher = self.publishers[group.name, fragment]
            if group.num_parts and publisher.newest is not None and publisher.newest.round < round - 1:
                publisher.newest = None

    def _make_gradients(self) -> None:
        """Compute the newest update's gradients on a pool thread, while the trainer computes the next step's gradient.

        Until that step the model's weights do not change. Not done while the trainer merges, since it would slow the
        merge.
        """
        contribution, self._unmade = self._unmade, None

        def make(contribution: LocalUpdate) -> None:
            self._learn()
            contribution.take_back()

        if contribution is not None:
            self.network.submit_unhurried(asyncio.to_thread(make, contribution))

    def _learn(self) -> None:
        """Update the robust rules with this peer's own publications, from which they learn what is usual."""
        with self._learning:
            while self._unlearned:
                contribution = self._unlearned.popleft()
                for fragment, of in enumerate(contribution.fragment_rounds):
                    if not contribution.has_trained(fragment):
                        self._robustness[fragment].not_trained()
                    elif of.tokens:
                        self._robustness[fragment].learn(contribution.gradient_of(fragment), of.tokens)

    def _accept_untrusted(
        self, group: GroupName, fragment: int, held: HeldSnapshot, arrival: PartnerUpdate
    ) -> PartnerUpdate:
        """Return the part of a publication that the run's robust rule lets enter a merge, judged by this peer's own
        earlier publications."""
        author, round = held.snapshot.author, held.snapshot.manifest.round
        if (averaged := self._averaged.get((group, fragment))) is not None:
            return averaged.accept_untrusted(author, arrival, round)
        self._learn()
        return self._robustness[fragment].accept(author, arrival, self._states[fragment].theta, round)

    def _receive_rows_untrusted(self, peer: str, rows: Sequence[pb.Signed]) -> None:
        if self.swarm.coverage is not None:
            self.swarm.coverage.receive_untrusted(peer, rows)

    def _encoding(
        self, contribution: LocalUpdate, fragment: int, group: TensorGroup, format: GradientFormat
    ) -> tuple[Callable[[], Body], Sequence[TensorSpec]]:
        """Return a function that makes a tensor group's bytes, and their tensor table.

        The function refers to nothing else of the update, so that the rest can be freed while the publication is
        served.
        """
        codec = self._codecs[fragment]
        if group.rule == "mean":
            averaged, values = codec.averaged[group.name], contribution.values[group.name, fragment]
            return lambda: Body([averaged.encode(values)]), averaged.tensors
        lent, of = contribution.lent[fragment], contribution.fragment_rounds[fragment]
        encode = functools.partial(self._encode_gradient, lent, of, fragment, format)
        return encode, codec.gradient.of[format].tensors

    def _encode_weights(self, theta: Tensor, fragment: int) -> Body:
        return Body([self._codecs[fragment].weights.encode(theta)])

    def _encode_gradient(self, lent: LentWeights, of: FragmentRound, fragment: int, format: GradientFormat) -> Body:
        """Encode one fragment's pseudo-gradient. Refers to that fragment's loan only: a publication may be served for
        long.
        """
        return Body([self._codecs[fragment].gradient.encode_sum(lent.gradient(), format, of.round, of.part)])

    def collect(self, fragment: int = 0) -> Gathered | Replaced:
        """See `Exchange`. Does not wait, unless this peer is far behind and takes the others' weights."""
        round, swarm = self._progress.round, self.swarm
        is_last = fragment == len(self._fragments) - 1
        if is_last:
            swarm.accounting.learn({swarm.identity.peer_id: self._own_tokens})
        due = self.gossip.merge_due(round, fragment, may_catch_up=True)
        if isinstance(due, FetchConsensus):
            if (replaced := self._catch_up(round, due.rounds_behind)) is not None:
                return replaced
            due = self.gossip.merge_due(round, fragment, may_catch_up=False)
            assert not isinstance(due, FetchConsensus)
        counts = swarm.accounting.contributions() if is_last else {}
        if due.merge is not None and due.merge.displacement is not None:
            self._robustness[fragment].merged(due.merge.displacement)
        return Gathered(
            prepared=self._merge_of(fragment, self._states[fragment], ()) if due.merge is None else due.merge,
            merged=self._merged(due.pulled),
            apart=self._apart(due.pulled),
            values=self._means_of(fragment, due.pulled),
            run_tokens=sum(counts.values()),
            peer_tokens=counts,
        )

    def _apart(self, pulled: Sequence[ReceivedPublication[HeldSnapshot, KeptPublication]]) -> tuple[PartnerUpdate, ...]:
        rule = self.run.merge.robust
        return () if mean_of(rule) is None else apart(rule, [each.payload.decoded() for each in pulled])

    def _means_of(
        self, fragment: int, pulled: Sequence[ReceivedPublication[HeldSnapshot, KeptPublication]]
    ) -> dict[tuple[GroupName, int], Tensor]:
        """Return the means of the tensor groups that are averaged beside the weights, where a partner brought one."""
        found = dict[tuple[GroupName, int], Tensor]()
        for which, averaged in self._averaged.items():
            arrivals = [each.payload.decoded() for each in pulled if (each.group, fragment) == which]
            if theirs := [arrival.theta for arrival in arrivals if arrival.theta is not None]:
                found[which] = averaged.mean(theirs)
        return found

    def _catch_up(self, round: int, rounds_behind: int) -> Replaced | None:
        """Take the others' weights because this peer has fallen far behind; None if nobody delivers them."""
        reason = f"it was {rounds_behind} rounds behind the others"
        replaced = self._consensus(reason, round + 1, least_round=round + 1)
        if replaced is not None:
            self.swarm.emit(CaughtUpEvent(round=replaced.progress.round, from_peer=replaced.from_peer, reason=reason))
        return replaced

    def _merged(self, pulled: Sequence[ReceivedPublication[HeldSnapshot, KeptPublication]]) -> tuple[MergeInput, ...]:
        """Return one entry for each partner, whether its weights, its pseudo-gradient or both were merged."""
        by_peer: dict[str, list[ReceivedPublication[HeldSnapshot, KeptPublication]]] = {}
        for each in pulled:
            by_peer.setdefault(each.peer, []).append(each)
        return tuple(
            MergeInput(
                peer=peer,
                round=(newest := max(each.version.round for each in groups)),
                part=max(each.version.part for each in groups if each.version.round == newest),
                tokens=sum(each.payload.tokens for each in groups),
                staleness_rounds=self._progress.round - newest,
                pull_s=max(each.pull_s for each in groups),
            )
            for peer, groups in by_peer.items()
        )

    def decode_untrusted(self, command: DecodePublication[HeldSnapshot]) -> KeptPublication:
        """See `Merging`: decode a publication and limit it by the run's robust rule."""
        codec, held, fragment = self._codecs[command.fragment], command.held, command.fragment
        decode = functools.partial(codec.arrival_untrusted, command.group, held, command.news, command.earlier)
        return self._kept_untrusted(command.group, fragment, held, decode)

    def took_untrusted(self, command: DecodePublication[HeldSnapshot]) -> None:
        """Count what was decoded. See `Merging`."""
        manifest = command.held.snapshot.manifest
        self.swarm.accounting.receive(command.author, manifest.author_tokens)
        self._receive_rows_untrusted(command.author, manifest.coverage)

    def _kept_untrusted(
        self, group: GroupName, fragment: int, held: HeldSnapshot, decode: Callable[[], PartnerUpdate]
    ) -> KeptPublication:
        """Judge a pulled publication, one at a time since decoding a large model's takes much memory.

        Of a large model only the bytes are kept, to be decoded again at the merge, unless a rule changed or needs the
        vectors.
        """
        with self._decoding:
            arrival = decode()
            accepted = self._accept_untrusted(group, fragment, held, arrival)
            tokens, factor = accepted.tokens, accepted.lengthened
            is_cut = factor is None or accepted.theta is not arrival.theta
            if factor is None or is_cut or not self._is_large or mean_of(self.run.merge.robust) is not None:
                return KeptPublication(tokens, lambda: accepted)

        def again() -> PartnerUpdate:
            made = decode()
            if factor != 1:
                made.gradient.mul_(factor)
            return dataclasses.replace(made, tokens=tokens)

        return KeptPublication(tokens, again, is_made_anew=True)

    def _tell_clipped(self, peer: str, incident: ClipIncident) -> None:
        self.swarm.emit(ClippedEvent(from_peer=peer, rule=incident.rule, detail=incident.detail))

    def prepare(self, command: PrepareMerge[HeldSnapshot, KeptPublication]) -> PreparedMerge:
        """Compute everything of a merge that does not need this peer's own gradient. See `Merging`."""
        plan, fragment = command.plan, command.fragment
        pulled = [each for each in command.pulled if (each.group, fragment) not in self._averaged]
        arrivals = (
            dataclasses.replace(each.payload.decoded(), ahead_rounds=plan.ahead_rounds(fragment, each.began_s))
            for each in pulled
        )
        with self._decoding:
            may_write = all(each.payload.is_made_anew for each in pulled)
            return self._merge_of(fragment, self._states[fragment], arrivals, may_write=may_write)

    def _merge_of(
        self, fragment: int, state: OuterState, arrivals: Iterable[PartnerUpdate], *, may_write: bool = False
    ) -> PreparedMerge:
        layout, rate = self._fragments[fragment].layout, self.run.merge.outer_learning_rate
        return prepare(state, arrivals, layout, rate, may_write=may_write)

    # ------------------------------------------------------------- present weights

    def _is_old(self, round: int) -> bool:
        """Return whether this peer must take the swarm's state in place of its own.

        It must if it is too many rounds behind. Where nobody else who answers has trained, it must not be behind the
        archive at all: no merge would bring what the archive has. A volunteer that trained and does not answer may have
        been killed.
        """
        members = self.swarm.membership
        if is_too_old(round, [info.round for info in members.volunteers()], self.run.merge.max_staleness_rounds):
            return True
        merges = any(info.round for info in members.answering())
        return not merges and any(info.round > round for info in members.live() if info.is_bootstrap)

    def present_state(self, progress: Progress) -> Replaced | None:
        """See `SwarmExchange`: the consensus, unless this peer's own state is recent enough."""
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
            return None  # it keeps its own state; its first merges bring the others' weights
        raise RunTimeError(
            "no peer delivered the run's current weights; try again in a minute", code="state-not-delivered"
        )

    def final_theta(self, own: Tensor) -> Tensor:
        """See `SwarmExchange`: the consensus of all that have finished. Waits up to 20 s for those about to."""
        swarm, total = self.swarm, self.run.run.total_tokens
        wait_for(self.network.submit(self.gossip.stop()), self.stop)  # no merge follows
        give_up_s = time.monotonic() + _LAST_ROUND_S
        while time.monotonic() < give_up_s:
            wait_for(self.network.submit(swarm.greeter.greet_everyone()), self.stop)
            if all(info.run_tokens >= total for info in swarm.membership.volunteers()):
                break
            self.stop.sleep(_POLL_INTERVAL_S)
        volunteers = [info.peer for info in swarm.membership.volunteers() if info.run_tokens >= total]
        sample = random.sample(volunteers, min(SAMPLE, len(volunteers)))
        states = wait_for(self.network.submit(swarm.states.fetch_weights(sample)), self.stop)
        self._say_that_it_is_finished()
        if not states:
            return own
        others = [theta_of(state, own.numel()) for state in states]
        return mean_of_near([own, *others], self._layout, out=others[0])[0]

    def kept(self) -> Mapping[str, Callable[[], Any]]:
        """See `SwarmExchange`: what was merged of each peer, what is usual, and which data has been seen."""
        coverage = self.swarm.coverage
        seen = {} if coverage is None else {_COVERAGE: coverage.kept}
        return {_LEDGER: self.gossip.rows, _CLIPPED: self._clipped, **seen}

    def _clipped(self) -> list[dict[str, Any]]:
        """Return, by fragment, what the robust rules have learned to be usual, for a checkpoint."""
        return [{name: give() for name, give in each.kept().items()} for each in self._robustness]

    def restore(self, extra: Mapping[str, Any]) -> None:
        """Restore what a checkpoint kept. See `SwarmExchange`."""
        try:
            if _LEDGER in extra:
                self.gossip.load(extra[_LEDGER])
            for robustness, kept in zip(self._robustness, extra.get(_CLIPPED, ()), strict=_CLIPPED in extra):
                robustness.restore(kept)
        except (ValueError, TypeError) as error:
            message = (
                f"cannot use the checkpoint's record of merges ({error}); some of the others' updates may count twice"
            )
            self.swarm.emit(WarningEvent(message=message, code="checkpoint-partly-used"))
        try:
            if self.swarm.coverage is not None:
                self.swarm.coverage.restore(extra.get(_COVERAGE))
        except (ValueError, TypeError) as error:
            message = f"cannot use the checkpoint's record of which data was seen ({error}); other peers send it again"
            self.swarm.emit(WarningEvent(message=message, code="checkpoint-partly-used"))

    def _consensus(self, reason: str, own_round: int, *, least_round: int = 0) -> Replaced | None:
        """Fetch the consensus of the others' present weights; None if nobody delivers any of `least_round` or later."""
        swarm = self.swarm
        live = swarm.membership.live()
        volunteers = [info.peer for info in callable_first(swarm.membership.volunteers())]
        sample = random.sample(volunteers, min(SAMPLE, len(volunteers)))
        # Volunteers first; the bootstrap's archive is older.
        for peers in (sample, [info.peer for info in live if info.is_bootstrap]):
            fetching = self.network.submit(swarm.states.fetch(peers, 1))
            states = wait_for(fetching, self.stop, lambda: self.on_arriving(swarm.store.arriving))
            states = [found for found in states if found.round >= least_round]
            if not states:
                continue
            more = self._counted_by_others(states)
            wait_for(self.network.submit(swarm.accounting.read_some()), self.stop)
            states = not_far_behind(states, self.run.merge.max_staleness_rounds)
            progress = self._progress_of(states, own_round, more)
            for found in states:
                self._receive_rows_untrusted(found.peer, found.held.snapshot.manifest.coverage)
            told = [places_of_untrusted(found.held.snapshot.manifest, self.run.merge) for found in states]
            state = consensus_of(states, self._layout)
            self.gossip.took_states(told, {found.peer: found.round for found in states}, progress.round)
            for robustness in self._robustness:
                robustness.comes_back()
            return Replaced(state=state, progress=progress, from_peer=states[0].peer, reason=reason)
        self.on_arriving(None)
        return None

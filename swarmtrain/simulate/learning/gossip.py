"""Gossip in virtual time: the product's decisions, merges and formats, with real models, on a virtual clock.

What a volunteer does in threads and over sockets happens here in events: inner steps are taken at the moments of
publications, and the commands of `protocol.gossip.engine` are carried out at once or, where bytes travel, when these
have arrived.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

from torch import Tensor

from swarmtrain.algorithm.fragments import Fragment, fragments_of
from swarmtrain.algorithm.gossip import Layout, PartnerUpdate, prepare, variance_corrected_mean
from swarmtrain.algorithm.pacing import first_inner_steps
from swarmtrain.algorithm.robust import ClipIncident
from swarmtrain.errors import BadBytesError
from swarmtrain.network.codec import PublicationCodec
from swarmtrain.network.refusals import rule_of
from swarmtrain.network.snapshots.download import ATTEMPTS
from swarmtrain.network.snapshots.store import TensorSpec
from swarmtrain.network.tensor_groups import groups_of, rules_of
from swarmtrain.peer.merging.consensus import layout_of_specs
from swarmtrain.peer.merging.robustness import Naming, Robustness, apart
from swarmtrain.peer.merging.updates import Gathered, LocalUpdate
from swarmtrain.peer.training.session import Start
from swarmtrain.protocol.adapter_groups import groups_of_names
from swarmtrain.protocol.gossip.engine import GossipEngine, GossipSettings
from swarmtrain.protocol.gossip.fragments import publishes_every
from swarmtrain.protocol.gossip.merge_plans import MergePlan, MergePlanner, TrainersRound
from swarmtrain.protocol.gossip.messages import (
    AdvertisedProgress,
    AskPartner,
    DecodePublication,
    DownloadPublication,
    FetchConsensus,
    GossipCommand,
    GossipEvent,
    LinkRateAssumed,
    MergeDue,
    MergeFragment,
    MergePrepared,
    MergesPlanned,
    PartnerReplied,
    PartnersChanged,
    PeerCalled,
    PrepareMerge,
    PublicationDecoded,
    PublicationDownloaded,
    PullFailed,
    PullFailure,
    PullsPaused,
    PullTimerFired,
    ReportFailure,
)
from swarmtrain.protocol.gossip.partners import PublicationVersion
from swarmtrain.protocol.gossip.pulls import GroupName
from swarmtrain.protocol.membership.membership import PeerInfo
from swarmtrain.protocol.tokens.shards import Coverage, CoverageRow
from swarmtrain.simulate.clock import Clock, Timer
from swarmtrain.simulate.learning.churn import schedule, takes_state
from swarmtrain.simulate.learning.fragment import LearningFragment, Published
from swarmtrain.simulate.learning.setting import Recorder, RunOutcome, Setting
from swarmtrain.simulate.learning.wire import Wire

Unprepared: TypeAlias = PrepareMerge[Published, PartnerUpdate]
"""Merge that is ready but for its arithmetic, which is done once, when it is merged."""
Event: TypeAlias = GossipEvent[Published, PartnerUpdate, Unprepared]
Command: TypeAlias = GossipCommand[Published, PartnerUpdate, Unprepared]


class VirtualRunner:
    """Carries out the commands of one peer's gossip engine in virtual time."""

    def __init__(self, peer: LearningPeer) -> None:
        self.peer, self.world, setting = peer, peer.world, peer.world.setting
        self.engine = GossipEngine[Published, PartnerUpdate, Unprepared](
            peer.name, self.world.gossip, peer.rng, peer.rng
        )
        self._others: list[PeerInfo] = []
        self._num_told = -1
        self._wake_s: float | None = None
        self._timer: Timer | None = None
        self.engine.receive(LinkRateAssumed(min(setting.link_of(peer.name))), self.world.clock.now)

    def tell(self, event: Event) -> list[Command]:
        """Pass an event to the engine, carry out its commands and return them.

        A caller that passes `MergeDue` carries out the merge itself.
        """
        self.receive()
        commands = self.engine.receive(event, self.world.clock.now)
        for command in commands:
            self._do(command)
        self._wake()
        return commands

    def receive(self) -> None:
        """Pass on to the engine everything that the other volunteers have announced by now."""
        world = self.world
        if self._num_told == world.num_told and not world.setting.hangs:
            return
        self._num_told, others = world.num_told, [each.info for each in world.live if each is not self.peer]
        if others != self._others:
            self._others = others
            self.engine.receive(PartnersChanged(others), world.clock.now)

    def _wake(self) -> None:
        """Schedule the engine's next timer; if this peer hangs at that time, as soon as it continues."""
        if (wake_s := self.engine.wake_at()) == self._wake_s:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._wake_s = wake_s
        self._timer = None if wake_s is None else self._call_at(max(wake_s, self.world.clock.now), self._woke)

    def _woke(self) -> None:
        self._wake_s = self._timer = None
        self.tell(PullTimerFired())

    def _call_at(self, when_s: float, call: Callable[..., object], *args: Any) -> Timer:
        setting = self.world.setting
        return self.peer.call_at(setting.due_s(self.peer.number, when_s, 0.0), call, *args)

    def _do(self, command: Command) -> None:
        match command:
            case AskPartner():
                self._ask(command)
            case DownloadPublication(_, source, held):  # the bytes follow the reply
                asked_s, author = self.world.clock.now - self.world.setting.rtt_s, self.world.by_name[source]
                self.download(command, author.num_lives, held.num_bytes, ATTEMPTS, asked_s)
            case DecodePublication(pull, author):
                try:
                    arrival = self.peer.arrival_untrusted(command)
                except BadBytesError as error:
                    self.tell(
                        PullFailed(pull, PullFailure(str(error), is_incident=True, is_authors=True, code=error.code))
                    )
                else:
                    self.peer.receive_rows(author, command.held.rows)
                    self.tell(PublicationDecoded(pull, arrival))
            case PrepareMerge(number):
                self.tell(MergePrepared(number, command))
            case ReportFailure(author, failure):
                self.world.told(author, ClipIncident(rule_of(failure.code), failure.reason))

    def _ask(self, ask: AskPartner) -> None:
        """Ask an author; the answer, as of now, arrives after a round trip. A hanging author does not answer."""
        now, setting, author = self.world.clock.now, self.world.setting, self.world.by_name[ask.source]
        if self.world.is_hanging(author.name):
            silent = PullFailed(ask.pull, PullFailure("no answer", "silent"))
            self._call_at(now + setting.run.network.call_limit_s, self.tell, silent)
            return
        author.gossip.tell(PeerCalled(self.peer.name))
        self._call_at(now + setting.rtt_s, self._ended, author, author.num_lives, author.answer(ask))

    def _ended(
        self,
        author: LearningPeer,
        num_lives: int,
        event: PartnerReplied[Published] | PublicationDownloaded | PullFailed,
    ) -> None:
        """Pass the event to the engine, or a failure if the author has left since the request."""
        is_gone = author.num_lives != num_lives
        self.tell(PullFailed(event.pull, PullFailure("it has gone")) if is_gone else event)

    def download(
        self,
        one: DownloadPublication[Published],
        num_lives: int,
        left_bytes: int,
        attempts: int,
        asked_s: float | None = None,
    ) -> None:
        """Transfer a publication's bytes; if the transfer breaks off, ask for the rest, `attempts` times in all.

        `num_lives` is the author's when the transfer began.
        """
        world, rng, author = self.world, self.peer.rng, self.world.by_name[one.source]
        event: PublicationDownloaded | PullFailed = PublicationDownloaded(one.pull, one.held.num_bytes)
        if author.num_lives != num_lives:
            self._ended(author, num_lives, event)
            return
        breaks = rng.random() < world.setting.failing
        come_bytes = int(rng.random() * left_bytes) if breaks else left_bytes
        asked_s = world.clock.now if asked_s is None else asked_s
        arrives_s = world.wire.arrives_s(asked_s, author.name, self.peer.name, come_bytes, rng)
        if breaks and attempts > 1:
            self._call_at(arrives_s, self.download, one, num_lives, left_bytes - come_bytes, attempts - 1)
            return
        if breaks:
            event = PullFailed(one.pull, PullFailure("its transfers break off"))
        self._call_at(arrives_s, self._ended, author, num_lives, event)


class LearningPeer:
    """Simulated volunteer of gossip: it merges at its own pace."""

    def __init__(self, world: LearningWorld, number: int) -> None:
        setting = world.setting
        self.world, self.number, self.name = world, number, f"p{number}"
        self.learner = setting.learner(number)
        self.trainer = self.learner.replica
        self.rng = random.Random(f"{setting.run.run.seed} {number}")
        self.rounds_done, self.rounds_fresh = 0, 0.0
        num_shards = self.learner.loop.batches.num_shards
        self.coverage = Coverage(self.name, num_shards) if num_shards else None
        self.start = Start(inner_steps=1, num_peers=1)
        self.done = self.run_tokens = 0
        self.is_here, self.is_over = True, False
        self.knows_speed = False
        """True after the first round has ended."""
        self.step_s = setting.step_s[number]
        """Seconds of an inner step of the run's batch, as measured in the last round."""
        self.step_share = 1.0
        """Size of this round's inner steps as a share of the run's batch."""
        self.num_lives = 0
        """Number of times that the volunteer has left. Calls that it scheduled before it left are dropped."""
        self.began_s = math.inf
        """Time at which the present round began."""
        self.own: LocalUpdate
        """Update of the present round so far."""
        self.info, self.so_far_since_s = PeerInfo(peer=self.name), 0.0
        """Presence record that the volunteer announced last, and the time."""
        self.naming = Naming(world.told)
        self.fragments = [world.fragment(fragment, self.naming) for fragment in range(len(world.fragments))]
        self.gossip, self.planner = VirtualRunner(self), MergePlanner(len(self.fragments))

    def forget(self) -> None:
        """Forget everything that a process holds in memory and no checkpoint keeps."""
        merged = self.gossip.engine.rows()
        self.gossip, self.planner = VirtualRunner(self), MergePlanner(len(self.fragments))
        self.gossip.engine.load(merged)
        # Setting the state gives up what was trained since the last merges, as a kill does.
        self.trainer.state = self.trainer.state
        for fragment in self.fragments:
            fragment.forget(self.world.codec(fragment.number))

    @property
    def round(self) -> int:
        """Round that the volunteer is in, or begins."""
        return self.trainer.progress.round

    def begin(self) -> None:
        """Begin a round: schedule its publications, merges and end."""
        setting, clock = self.world.setting, self.world.clock
        self.began_s, is_anew = clock.now, self.fragments[0].weights is None
        self.enter(self._next_start(), self.world.tokens)
        step_s = setting.step_s[self.number] * self.step_share
        for moment in self.start.publish_after:
            self.call_at(self.done_s(moment * step_s), self.publish, moment)
        for moment in sorted(set(self.start.merge_after))[:-1]:
            self.call_at(self.done_s(moment * step_s), self.end_of_some, moment)
        of = TrainersRound(
            number=self.round,
            inner_steps=self.start.inner_steps,
            merge_after=self.start.merge_after,
            gradient_format=self.start.gradient_format,
            steps_per_s=self.steps_per_s / self.step_share,
        )
        plans = self.planner.round_began(of, clock.now, all_begin=is_anew)
        self.tells(0, self.info.part_tokens)
        self.gossip.tell(MergesPlanned(self.round, plans))
        self.call_at(self.done_s(self.start.inner_steps * step_s), self.end)

    @property
    def step_tokens(self) -> int:
        """Tokens of each inner step of the round."""
        run = self.world.setting.run
        return (self.start.batch_sequences or run.inner.batch_sequences) * run.model.context_tokens

    @property
    def steps_per_s(self) -> float:
        """Inner steps of the run's batch per second, as far as the volunteer knows; 0 in its first round."""
        return 1 / self.step_s if self.knows_speed else 0.0

    def call_at(self, when_s: float, call: Callable[..., object], *args: Any) -> Timer:
        """Schedule a call on the world's clock; it is dropped if the peer has gone by then."""
        return self.world.clock.call_at(when_s, self._if_here, self.num_lives, call, *args)

    def _if_here(self, num_lives: int, call: Callable[..., object], *args: Any) -> None:
        if num_lives == self.num_lives:
            call(*args)

    def _next_start(self) -> Start:
        """Return the plan of the volunteer's next round. It does not know its speed before its first round has
        ended."""
        setting, group = self.world.setting, self.world.setting.run.merge
        others, most = [peer for peer in self.world.live if peer is not self], group.publications_per_round
        steps, everybodys, round_s = first_inner_steps(group.inner_steps, paced=group.pacing), 0.0, 0.0
        sequences, self.step_share = 0, 1.0
        if self.knows_speed:
            ends_s = [peer.ends_in_s() for peer in self.world.peers if peer is not self]
            speeds = [1 / peer.step_s for peer in self.world.peers]
            if (small := setting.small_batch_round(self.number, speeds)) is None:
                steps = setting.steps_of_round(self.number, ends_s, speeds)
            else:
                steps, sequences = small
                self.step_share = sequences / setting.run.inner.batch_sequences
            everybodys = setting.steps_of_everybody(self.number, speeds)
            round_s = steps * self.step_s * self.step_share
        shard = None
        if self.coverage is not None:
            names = [peer.name for peer in others]
            shard, _ = self.coverage.begin(self.round, setting.run.run.seed, names, setting.run.round_tokens)
        self.gossip.receive()
        return Start(
            inner_steps=steps,
            num_peers=1 + sum(peer.number < setting.num_counted for peer in others),
            shard=shard,
            batch_sequences=sequences,
            num_parts=most,
            every=publishes_every(most, len(self.fragments), round_s, self.world.layout.size),
            run_steps_a_step=everybodys,
            num_fragments=len(self.fragments),
            gradient_format=self.gossip.engine.gradient_format(round_s, setting.link_of(self.name)[0]),
        )

    def ends_in_s(self) -> float | None:
        """Return the seconds until the volunteer's round ends, as it announces; None before it knows its speed and
        while it is away."""
        if not (self.is_here and self.knows_speed):
            return None
        setting, now = self.world.setting, self.world.clock.now
        if not setting.pace.deviation:
            return self.began_s + self.start.inner_steps * self.step_s * self.step_share - now
        done = setting.steps_between(self.number, self.began_s, now, self.step_share)
        return (self.start.inner_steps - done) * self.step_s * self.step_share

    def enter(self, start: Start, run_tokens: int) -> None:
        """Enter a round; the run has `run_tokens` by now."""
        self.start, self.done, self.run_tokens = start, 0, run_tokens
        if start.shard is not None:
            self.learner.loop.batches.use_shard(start.shard)
        trained = self.world.setting.groups_of_round(self.number, self.round, len(self.fragments))
        self.trainer.begin(start.num_parts, trained)
        self.learner.train_only(trained)
        for fragment in self.fragments:
            if fragment.weights is None or fragment is self.fragments[-1]:
                self.begins(fragment, self.round)

    def begins(self, fragment: LearningFragment, round: int) -> None:
        """Begin a round of a fragment by publishing its weights."""
        fragment.begins(round, self.trainer.state_of(fragment.number).theta)

    def done_s(self, work_s: float) -> float:
        """Return the time at which work is done that takes `work_s` at the volunteer's own speed."""
        return self.world.setting.done_s(self.number, self.world.clock.now, work_s)

    def tells(self, part: int, tokens: int) -> None:
        """Announce the progress of the round: the last part published, and its tokens."""
        self.so_far_since_s = self.world.clock.now
        self.info = PeerInfo(
            peer=self.name,
            training=True,
            round=self.round,
            part=part,
            part_tokens=tokens,
            inner_steps=max(1, round(self.start.inner_steps * self.step_share)),
            inner_steps_done=math.floor(self.done * self.step_share + 1e-9),
            steps_per_s=self.steps_per_s,
            adapter_groups=next(iter(self.world.setting.adapter_groups[self.number :]), 0),
        )
        self.world.num_told += 1

    def train_to(self, moment: int) -> None:
        """Take the inner steps up to `moment` of the round, then make a publication."""
        world, step_tokens, whole = self.world, self.step_tokens, self.world.setting.run.tokens_per_step
        for step in range(self.done, moment):
            tokens = self.start.run_tokens(self.run_tokens, step * self.step_share, whole)
            self.learner.step(tokens / world.setting.total_tokens, self.start.batch_sequences)
        world.count(self.number, (moment - self.done) * step_tokens, moment - self.done)
        if self.coverage is not None and self.start.shard is not None:
            self.coverage.trained(self.start.shard, (moment - self.done) * step_tokens)
        self.done = moment
        self.own = self.trainer.contribution(self.start.part_after(moment), moment, moment * step_tokens)
        for fragment, of in zip(self.fragments, self.own.fragment_rounds, strict=True):
            is_trained = self.own.has_trained(fragment.number)
            if not is_trained:
                fragment.robustness.not_trained()
            if not of.tokens:
                fragment.drop_before(of.round - 1)
                continue
            gradient = self.own.gradient_of(fragment.number)
            if is_trained:
                fragment.robustness.learn(gradient, of.tokens)
            fragment.set_newest(PublicationVersion(of.round, of.part, of.tokens), gradient, self.start.gradient_format)
        self.tells(self.own.part, self.own.tokens)

    def publish(self, moment: int) -> None:
        """Train to that moment and publish. Pulls are planned anew if the merges' times have changed."""
        self.train_to(moment)
        self._plan(self.planner.steps_done(moment, self.world.clock.now))

    def _plan(self, plans: Sequence[MergePlan] | None) -> None:
        if plans is not None:
            self.gossip.tell(MergesPlanned(self.round, plans))

    def answer(self, ask: AskPartner) -> PartnerReplied[Published]:
        """Return the volunteer's answer to a request for a publication."""
        fragment, info = self.fragments[ask.fragment], self.info
        if (published := fragment.newer(ask.group, ask.known)) is None:
            return PartnerReplied(ask.pull)
        self.serve(fragment, ask.group, published)
        told = AdvertisedProgress(
            info.round, info.inner_steps, info.inner_steps_done, info.steps_per_s, self.so_far_since_s
        )
        return PartnerReplied(ask.pull, published.version, published, told)

    def serve(self, fragment: LearningFragment, group: GroupName, published: Published) -> None:
        """Encode a publication at the first request, for every reader."""
        if published.sent is not None:
            return
        if self.coverage is not None:
            published.rows = self.coverage.rows_to_send()
        if (averaged := fragment.codec.averaged.get(group)) is not None:
            published.sent = averaged.decode(averaged.encode(published.vector))
        else:
            gradients, version, format = fragment.codec.gradient, published.version, published.format
            assert format is not None
            encoded = gradients.encode_sum(published.vector, format, version.round, version.part)
            published.sent = gradients.of[format].decode(encoded)

    def receive_rows(self, name: str, rows: Sequence[CoverageRow]) -> None:
        """Merge the rows of another volunteer that say which data were seen, if both have the same part of the
        corpus."""
        share_of, other = self.world.setting.text.share_of, self.world.by_name[name]
        if self.coverage is not None and share_of(self.number) == share_of(other.number):
            self.coverage.merge(rows, name, lambda _, tokens: tokens)

    def arrival_untrusted(self, decode: DecodePublication[Published]) -> PartnerUpdate:
        """Return the new part of a publication, as the run's rule lets it enter a merge.

        Raises BadBytesError if it must not be taken.
        """
        fragment, vector, earlier = self.fragments[decode.fragment], decode.held.sent, decode.earlier
        assert vector is not None
        if not bool(vector.isfinite().all()):
            raise BadBytesError("a publication that is not finite", code="not-finite")
        if decode.group in fragment.codec.averaged:
            arrival = PartnerUpdate(vector, vector, 0)
        else:
            assert earlier is None or earlier.sent is not None
            new = vector if earlier is None or earlier.sent is None else vector - earlier.sent
            arrival = PartnerUpdate(None, new, decode.news.tokens)
        theta = self.trainer.state_of(fragment.number).theta
        return fragment.robustness.accept(decode.author, arrival, theta, decode.held.version.round)

    # ------------------------------------------------------------- the merge

    def end_of_some(self, moment: int) -> bool:
        """Merge the fragments that are due at `moment`; return False if it takes the others' weights instead."""
        for fragment, merged_after in zip(self.fragments, self.start.merge_after, strict=True):
            if merged_after != moment:
                continue
            due = self._due(MergeDue(self.round, fragment.number))
            if isinstance(due, FetchConsensus):
                if takes_state(self):
                    return False
                due = self._due(MergeDue(self.round, fragment.number, may_catch_up=False))
            assert isinstance(due, MergeFragment)
            self.merge(fragment, _arrivals(due))
            if fragment is not self.fragments[-1]:
                self.begins(fragment, self.round + 1)
            self._plan(self.planner.merged(fragment.number, self.world.clock.now))
        return True

    def _due(self, event: MergeDue) -> Command:
        return self.gossip.tell(event)[-1]

    def end(self) -> None:
        """End the round: merge the last fragments, or take the others' weights if the volunteer's own are too old."""
        world, self.knows_speed = self.world, True
        if world.setting.pace.deviation:
            took_s = world.setting.awake_s(self.number, self.began_s, world.clock.now)
            self.step_s = took_s / (self.start.inner_steps * self.step_share)
        if self.end_of_some(self.start.inner_steps):
            self.rounds_done += 1
            world.merged(self)
            self.begin_or_end()

    def begin_or_end(self) -> None:
        """Begin the next round, or end if the run has had its tokens."""
        if self.world.tokens < self.world.setting.total_tokens:
            self.begin()
        else:
            self.is_over = True
            self.gossip.tell(PullsPaused())
            self.world.finished(self)

    def merge(self, fragment: LearningFragment, arrivals: Sequence[PartnerUpdate]) -> None:
        """Merge what arrived into a fragment, which ends the fragment's round."""
        world, rate = self.world, self.world.setting.run.merge.outer_learning_rate
        prepared = prepare(self.trainer.state_of(fragment.number), arrivals, fragment.fragment.layout, rate)
        if prepared.displacement is not None:
            fragment.robustness.merged(prepared.displacement)
        gathered = Gathered(
            prepared=prepared,
            merged=(),
            run_tokens=world.tokens,
            peer_tokens={},
            apart=apart(fragment.robustness.rule, arrivals),
        )
        self.rounds_fresh += any(each.theta is None for each in arrivals) / len(self.fragments)
        self.trainer.merge(gathered, self.own, fragment.number)


def _arrivals(due: MergeFragment[Published, PartnerUpdate, Unprepared]) -> list[PartnerUpdate]:
    """Return the publications that enter a merge, each with the share of the planned round by which its author's round
    began later."""
    if due.merge is None:
        return []
    plan, number = due.merge.plan, due.fragment
    return [replace(each.payload, ahead_rounds=plan.ahead_rounds(number, each.began_s)) for each in due.pulled]


@dataclass
class LearningWorld:
    """All volunteers, and the clock."""

    setting: Setting
    clock: Clock = field(default_factory=Clock)
    tokens: int = 0
    inner_steps: int = 0
    tokens_lost: int = 0
    finished_s: float = 0.0
    num_told: int = 0
    """Number of times that a volunteer came, went or announced progress, so that engines notice news."""
    specs: tuple[TensorSpec, ...] = field(init=False)
    layout: Layout = field(init=False)
    fragments: tuple[Fragment, ...] = field(init=False)
    gossip: GossipSettings = field(init=False)
    peers: list[LearningPeer] = field(init=False)
    by_name: dict[str, LearningPeer] = field(init=False)

    def __post_init__(self) -> None:
        self.specs = self.setting.learner(0).specs
        self.layout = layout_of_specs(self.specs)
        if not self.setting.corrected:
            self.layout = replace(self.layout, corrected=(False,) * len(self.specs))
        groups = groups_of_names(spec.name for spec in self.specs)
        self.fragments = fragments_of(self.layout, self.setting.run.merge.num_fragments, groups)
        num_fragments = len(self.fragments)
        sizes = [self.codec(fragment).sizes(1 / num_fragments) for fragment in range(num_fragments)]
        self.gossip = GossipSettings.of(self.setting.run.merge, rules_of(self.codec(0).groups), sizes)
        self.peers = [self.peer(number) for number in range(self.setting.num_peers)]
        self.by_name = {peer.name: peer for peer in self.peers}
        self._recorder, self.wire = Recorder(self.setting), Wire(self.setting)

    def codec(self, fragment: int) -> PublicationCodec:
        """Return a codec of one peer's own fragment. What one publication loses is added to the next."""
        group, specs = self.setting.run.merge, tuple(self.fragments[fragment].pick(self.specs))
        return PublicationCodec(groups_of(specs, group.theta_format, group.gradient_formats))

    def fragment(self, fragment: int, naming: Naming) -> LearningFragment:
        """Return a fragment of a new peer."""
        rule, met = self.setting.run.merge.robust, not self.setting.own_weights
        robustness = Robustness(rule, self.fragments[fragment].layout, naming, met=met)
        codec, sizes = self.codec(fragment), self.gossip.sizes[fragment]
        return LearningFragment(fragment, self.fragments[fragment], sizes, robustness, codec)

    @property
    def live(self) -> list[LearningPeer]:
        """Volunteers that the others believe to be present."""
        gone, now_s = self.setting.is_gone, self.clock.now
        return [peer for peer in self.peers if peer.is_here and not gone(peer.number, now_s)]

    @property
    def answering(self) -> list[LearningPeer]:
        """Honest volunteers that can be asked for their weights; all honest ones if none of them can."""
        found = [peer for peer in self.honest if peer.is_here and not self.is_hanging(peer.name)]
        return found or self.honest

    def is_hanging(self, name: str) -> bool:
        """Return whether this peer hangs now."""
        return self.setting.is_hanging(self.by_name[name].number, self.clock.now)

    def peer(self, number: int) -> LearningPeer:
        """Return a new volunteer."""
        return LearningPeer(self, number)

    def count(self, number: int, tokens: int, inner_steps: int) -> None:
        """Count what volunteer `number` trained; negative numbers take back what was counted."""
        self.tokens += tokens
        self.inner_steps += inner_steps
        self._recorder.count(number, tokens)

    def told(self, peer: str, incident: ClipIncident) -> None:
        """Hook, called when a publication of `peer` was cut or refused."""

    def merged(self, peer: LearningPeer) -> None:
        """Note that a round of `peer` is over."""
        self._recorder.see(self.tokens, self.clock.now, self.consensus)

    def finished(self, peer: LearningPeer) -> None:
        """Note that the last round of `peer` is over."""
        self.finished_s = max(self.finished_s, self.clock.now)

    @property
    def honest(self) -> list[LearningPeer]:
        """Volunteers that are not hostile: their weights are the swarm's."""
        return self.peers[: self.setting.num_honest]

    def consensus(self) -> Tensor:
        """Return the variance-corrected mean of the weights of all that answer, (P,)."""
        return variance_corrected_mean([peer.trainer.state.theta for peer in self.answering], self.layout).mean

    def run(self) -> None:
        """Run to the end of the run."""
        for peer in self.peers:  # nobody presses the button in the same moment
            a_round_s = self.setting.steps_of_round(peer.number) * self.setting.step_s[peer.number]
            peer.call_at(peer.rng.random() * a_round_s, peer.begin)
        schedule(self)
        while self.clock.step():
            if (self.setting.away or self.setting.hangs) and self.is_over:
                break

    @property
    def is_over(self) -> bool:
        """True if every volunteer that is present has ended the run."""
        if self.tokens < self.setting.total_tokens:
            return False
        stuck, now_s = self.setting.is_stuck, self.clock.now
        return all(peer.is_over or not peer.is_here or stuck(peer.number, now_s) for peer in self.peers)

    def outcome(self) -> RunOutcome:
        """Return the results."""
        rounds = sum(peer.rounds_done for peer in self.honest)
        return RunOutcome(
            held_out_loss=self.setting.text.held_out_loss(self.consensus()),
            own_loss=self.setting.own_loss([peer.trainer.state.theta for peer in self.answering]),
            virtual_time_s=self.finished_s,
            tokens=self.tokens,
            inner_steps=self.inner_steps,
            sent_bytes=self.wire.sent_bytes,
            tokens_lost=self.tokens_lost,
            fresh_share=sum(peer.rounds_fresh for peer in self.honest) / max(1, rounds),
            curve=tuple(self._recorder.points),
            peer_tokens=self._recorder.peer_tokens,
        )

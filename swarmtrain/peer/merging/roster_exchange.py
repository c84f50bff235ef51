"""Trainer's calls to the network, answered by a `Swarm`; and the exchange of synchronous rounds.

`SwarmExchange` has what all merge methods share. `RosterExchange` is the synchronous one: at a round's end the trainer
makes one snapshot (hashed and signed here, because the roster needs the hash) and waits for the mean. The trainer's
thread calls; whatever touches the swarm is submitted to the network thread.
"""

from __future__ import annotations

import logging
import math
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from swarmtrain.algorithm.outer import OuterState
from swarmtrain.algorithm.pacing import round_inner_steps, small_batch_round
from swarmtrain.errors import RunTimeError
from swarmtrain.events import CaughtUpEvent
from swarmtrain.methods import MergeMethod, load_object
from swarmtrain.network.answers import Serving
from swarmtrain.network.codec import body_of
from swarmtrain.network.daemon import swarm_time
from swarmtrain.network.node import NetworkThread
from swarmtrain.network.rounds.round_end import Outcome, RosterMean
from swarmtrain.network.rounds.state_fetch import NewState
from swarmtrain.network.snapshots.store import Body, HeldSnapshot, build_snapshot
from swarmtrain.network.swarm import Swarm
from swarmtrain.peer.checkpoints.archive_watch import ArchiveWatch
from swarmtrain.peer.lifecycle.node import state_of, wait_for
from swarmtrain.peer.lifecycle.stop import StopFlag, StopTraining
from swarmtrain.peer.merging.updates import Averaged, LocalUpdate, OuterUpdate, Replaced
from swarmtrain.peer.training.pause import PauseSwitch
from swarmtrain.peer.training.session import Start
from swarmtrain.protocol.gossip.pulls import round_ends_s
from swarmtrain.protocol.membership.membership import still_needed
from swarmtrain.protocol.rounds.messages import JoinsWith
from swarmtrain.protocol.rounds.rosters import steps_of_round
from swarmtrain.protocol.tokens.progress import Progress
from swarmtrain.run import RunFile
from swarmtrain.v1 import snapshot_pb2 as pb

_log = logging.getLogger(__name__)
_SAMPLE = 16
_TRY_AGAIN_S = 1.0
_OFFER_S = 30.0


@dataclass
class SwarmExchange(ABC):
    """Answers the trainer's calls through a `Swarm` in the network thread. Merge methods derive from it."""

    network: NetworkThread
    swarm: Swarm
    run: RunFile
    stop: StopFlag
    pause: PauseSwitch = field(default_factory=PauseSwitch)
    on_first_round: Callable[[int], None] = lambda inner_steps: None
    on_arriving: Callable[[HeldSnapshot | None], None] = lambda held: None
    """Called several times a second while the peer waits for another's state, with the part that has arrived."""
    keeps_in_step: ClassVar[bool] = False
    """True if paced rounds are timed to end when those of others do."""
    merges_beside_training: ClassVar[bool] = False
    """True if `collect` does not wait for company, and may run on a thread of its own; see `Session.worker`."""
    num_missing: int = field(default=0, init=False)
    """Volunteers still missing before the first round may begin."""
    num_steps: float = field(default=0.0, init=False)
    """Inner steps taken in this process; of smaller ones the share that they have of the run's batch."""
    round_steps: int = field(default=0, init=False)
    """Inner steps of this round, including those that a late joiner missed."""
    steps_done: int = field(default=0, init=False)
    """Of these, the ones done."""
    step_share: float = field(default=1.0, init=False)
    """Size of this round's inner steps as a share of the run's batch: below 1 on a machine that is far too slow.

    Whatever other peers are told counts in steps of the run's batch.
    """
    expected_steps_per_s: float = field(default=0.0, init=False)
    """Most steps of the run's batch that this machine could take in a second, guessed before the first; 0: no guess."""
    _skipped_steps: int = field(default=0, init=False)
    _traffic: tuple[int, int] = field(default=(0, 0), init=False)
    _fresh: bool = field(default=True, init=False)
    """True if the next round is the first one, or the first with a state taken from another peer."""
    _first: bool = field(default=True, init=False)
    _offered: Progress | None = field(default=None, init=False)

    # ------------------------------------------------------------- the trainer's calls

    @abstractmethod
    def start_round(self, progress: Progress, steps_per_s: float) -> Start:
        """Return the plan of the next round. See `Exchange`."""

    @abstractmethod
    def publish(self, contribution: LocalUpdate) -> None:
        """Hand over the round's update so far, for others to pull. See `Exchange`."""

    @abstractmethod
    def collect(self, fragment: int = 0) -> OuterUpdate | Replaced:
        """Return what arrived for that fragment; wait as long as the merge method says. See `Exchange`."""

    def hold(self, states: Sequence[OuterState]) -> None:  # noqa: B027 - most have nothing to do
        """Receive each fragment's state before the first round, and again after the weights were taken from others. See
        `Exchange`."""

    def merged(self, fragment: int, state: OuterState) -> None:  # noqa: B027 - most have nothing to do
        """Receive a fragment's state after its merge. See `Exchange`."""

    def step_done(self, inner_steps_done: int) -> None:
        """Note that an inner step is done, so that others can ask for it. See `Exchange`."""
        self.num_steps += self.step_share
        self.steps_done = self._skipped_steps + inner_steps_done
        self.swarm.rounds.inner_steps_done = math.floor(self.steps_done * self.step_share + 1e-9)

    # ------------------------------------------------------------- what a volunteer asks

    @property
    def is_training(self) -> bool:
        """True until this peer's inner steps of the round are done. Any thread may ask."""
        return self.steps_done < self.round_steps or not self.round_steps

    def progress_in_words(self) -> str:
        """Say how far the round is. Any thread may ask."""
        return f"{self.steps_done} of {self.round_steps} steps"

    def serving(self) -> Serving:
        """Return the services that this peer offers to others from the moment it enters the swarm."""
        return Serving()

    @abstractmethod
    def present_state(self, progress: Progress) -> Replaced | None:
        """Return the swarm's present state if it is preferred to what this peer has; None to keep the own state.

        Called before the first round, and before the first after a pause. The own state is a checkpoint, or the initial
        weights if nobody has merged a round yet. Raises RunTimeError when others have trained, this peer has nothing,
        and nobody delivers.
        """

    def offer(self, state: OuterState, progress: Progress) -> None:
        """Serve `state` to joiners and to peers that missed a round, from now on."""
        if progress is not self._offered:
            self._offered = progress
            offering = self._offer(progress, body_of(state.theta, state.momentum))
            self.network.run(offering, _OFFER_S)  # finished even if the peer is asked to end: the round was merged

    async def _offer(self, progress: Progress, body: Body | Callable[[], Body]) -> None:
        """Serve the state and announce it. Runs in the network thread."""
        self.swarm.set_state(progress, body)
        self.swarm.presence.describe(
            round=progress.round, steps_per_s=self.swarm.presence.me.steps_per_s, run_tokens=progress.run_tokens
        )

    def kept(self) -> Mapping[str, Callable[[], Any]]:
        """Return functions, by name, that give what a checkpoint keeps of this exchange; the values must fit JSON."""
        return {}

    def restore(self, extra: Mapping[str, Any]) -> None:  # noqa: B027 - most have nothing to restore
        """Restore what a checkpoint kept."""

    def final_theta(self, own: Tensor) -> Tensor:
        """Return the run's final weights (P,), given this peer's `own` (P,)."""
        return own

    def still_needed(self, last: Progress) -> str:
        """Return the reason why this peer should stay after the run's end; empty if nobody needs it."""
        return still_needed(self.swarm.membership, last)

    def data_seen(self) -> dict[str, int | None]:
        """Return the data fields of a round's event: the round's shard, and the number of shards nobody has seen."""
        coverage = self.swarm.coverage
        return {} if coverage is None else {"shard": coverage.shard, "unseen_shards": coverage.num_unseen}

    def traffic_since_last(self) -> tuple[int, int]:
        """Return the bytes sent and received since the last call."""
        traffic = self.swarm.node.traffic
        now = (traffic.sent_bytes, traffic.received_bytes)
        sent, received = now[0] - self._traffic[0], now[1] - self._traffic[1]
        self._traffic = now
        return sent, received

    # ------------------------------------------------------------- in common

    def _begin(self, inner_steps: int) -> None:
        """Note that a round of `inner_steps` steps begins."""
        if self._first:
            self.on_first_round(inner_steps)
        self._first = self._fresh = False
        self.steps_done = self._skipped_steps

    def _check(self) -> None:
        """Raise StopTraining if this peer must end or pause."""
        self.stop.check()
        if self.pause.held:
            raise StopTraining

    def _wait_for_company(self) -> None:
        while True:
            self._check()
            others = self.swarm.membership.volunteers()
            begun = any(info.round > 0 or info.inner_steps_done > 0 for info in others)
            begun = begun or self.swarm.rounds.wanted
            self.num_missing = 0 if begun else max(0, self.run.merge.min_peers - len(others) - 1)
            if not self.num_missing:
                return
            self.stop.sleep(0.05)

    def _plan_steps(self, steps_per_s: float) -> tuple[int, int]:
        """Return the inner steps of a round, and of a peer too slow for the run's batch the sequences in each (else 0).

        `steps_per_s` counts steps of the run's batch.
        """
        run, others = self.run, self.swarm.membership.volunteers()
        sequences = run.inner.batch_sequences
        speeds, limit_s = [info.steps_per_s for info in others], run.merge.round_limit_s
        is_paced, speed = run.merge.pacing and run.pipeline.stages == 1, steps_per_s or self.expected_steps_per_s
        small = small_batch_round(speed, speeds, run.merge.inner_steps, sequences, limit_s) if is_paced else None
        self.step_share = 1.0 if small is None else small[1] / sequences
        return (self._paced(steps_per_s), 0) if small is None else small

    def _paced(self, steps_per_s: float) -> int:
        """Return the inner steps of a round, paced by the other volunteers' speeds, and in step with them if the method
        does that.
        """
        section, now, membership = self.run.merge, swarm_time(), self.swarm.membership
        others = membership.volunteers()
        ends_s = [
            round_ends_s(
                membership.so_far_since_s(info.peer), info.inner_steps, info.inner_steps_done, info.steps_per_s
            )
            for info in (others if self.keeps_in_step else ())
        ]
        return round_inner_steps(
            steps_per_s,
            [info.steps_per_s for info in others],
            section.inner_steps,
            paced=section.pacing,
            limit_s=section.round_limit_s,
            others_end_in_s=[None if end_s is None else end_s - now for end_s in ends_s],
        )


def exchange_of(method: MergeMethod) -> type[SwarmExchange]:
    """Return the exchange class of a merge method."""
    kind: type[SwarmExchange] = load_object(method.exchange)
    return kind


@dataclass
class RosterExchange(SwarmExchange):
    """Exchange of synchronous rounds: at a round's end the trainer waits for the mean over a roster."""

    _merge: Future[Outcome] | None = field(default=None, init=False)
    _started_s: float = field(default=0.0, init=False)
    """Swarm time at which this round's inner steps began."""

    def __post_init__(self) -> None:
        self.archives = ArchiveWatch(self.network, self.swarm, self.stop)

    def start_round(self, progress: Progress, steps_per_s: float) -> Start:
        """Return the plan of the next round. See `Exchange`."""
        if self._fresh and progress.round == 0:
            self._wait_for_company()
        self._check()
        inner_steps, sequences, is_late_joiner = self._inner_steps(progress.round, steps_per_s)
        is_missing_steps = is_late_joiner and not sequences
        self._skipped_steps = max(0, self.run.merge.inner_steps - inner_steps) if is_missing_steps else 0
        self.round_steps = self._skipped_steps + inner_steps
        self._started_s = swarm_time()

        async def begin() -> int:
            self.swarm.rounds.begin(is_late_joiner=is_late_joiner)
            self.swarm.rounds.inner_steps_done = self._skipped_steps
            self.swarm.presence.describe(round=progress.round, steps_per_s=steps_per_s, run_tokens=progress.run_tokens)
            # Counts this peer too.
            return len(self.swarm.membership.volunteers()) + 1

        num_peers = wait_for(self.network.submit(begin()), self.stop)
        self.archives.ask()
        self._begin(inner_steps)
        return Start(inner_steps=inner_steps, num_peers=num_peers, batch_sequences=sequences)

    def _inner_steps(self, round: int, steps_per_s: float) -> tuple[int, int, bool]:
        """Return a round's inner steps, the sequences in each (0: the run's batch), and whether this peer comes late.

        A late peer takes fewer steps and nobody waits for it. A slower peer also takes fewer if the run is paced.
        """
        section = self.run.merge
        others = [(info.round, info.inner_steps_done) for info in self.swarm.membership.volunteers()]
        if round == 0 and section.min_peers > 1:
            others = [(its, done) for its, done in others if its > 0]  # all have waited: a whole round for each
        steps, reason = steps_of_round(section.inner_steps, round, others, fresh=self._fresh)
        is_late = steps < section.inner_steps
        if is_late:
            _log.info("round %d: %d inner steps: %s", round, steps, reason)
        most, sequences = self._plan_steps(steps_per_s)
        return min(math.floor(steps / self.step_share + 1e-9), most), sequences, is_late

    def publish(self, contribution: LocalUpdate) -> None:
        """Hand over the round's update so far, for others to pull. See `Exchange`."""
        manifest = pb.Manifest(
            run_sha256=bytes.fromhex(self.swarm.published.sha256),
            kind=pb.SNAPSHOT_KIND_PSEUDO_GRADIENT,
            round=contribution.round,
            part=contribution.part,
            tokens=contribution.tokens,
            inner_steps=contribution.inner_steps,
            roster_sha256=bytes.fromhex(contribution.base),
        )
        table = self.swarm.rounds.settings.groups.table(contribution.trained)
        held = build_snapshot(self.swarm.identity, manifest, table, self._body(contribution))
        self._merge = self.network.submit(self.swarm.rounds.finish(contribution.round, held, self._started_s))

    def _body(self, contribution: LocalUpdate) -> Body:
        """Return the bytes to publish."""
        places = self.swarm.rounds.settings.groups.places(contribution.trained)
        return body_of(*(contribution.gradient[place] for place in places))

    def collect(self, fragment: int = 0) -> Averaged | Replaced:
        """Return what arrived for that fragment; wait as long as the merge method says. See `Exchange`."""
        assert self._merge is not None
        outcome = wait_for(self._merge, self.stop)
        if not isinstance(outcome, RosterMean):
            return self._replaced(outcome)
        if (archived := self.archives.state_that_holds()) is not None:
            # The bootstrap's archive may hold a state that is preferred to this round's result; see `ArchiveWatch`.
            return self._replaced(archived)
        return self._mean(outcome)

    def _mean(self, outcome: RosterMean) -> Averaged:
        """Return the update of a round that ended with a roster."""
        roster = outcome.roster
        return Averaged(
            gradient=torch.frombuffer(outcome.mean, dtype=torch.float32),
            untrained=outcome.untrained,
            partners=roster.peers,
            weights=tuple(entry.tokens for entry in roster.entries),
            signer=roster.signer,
            roster_sha256=roster.digest,
        )

    def _replaced(self, new: NewState) -> Replaced:
        replaced = self._adopted(new)
        self.swarm.emit(CaughtUpEvent(round=replaced.progress.round, from_peer=new.from_peer, reason=new.reason))
        return replaced

    def _adopted(self, new: NewState) -> Replaced:
        """Adopt another peer's state, then check how far its round is, because this peer comes into that round late."""
        state, progress = state_of(new)

        async def look() -> None:
            self.swarm.rounds.know_roster(new.roster, new.signed_roster)
            await self.swarm.rounds.search.took(new)

        wait_for(self.network.submit(look()), self.stop)
        self.offer(state, progress)
        self._fresh = True
        return Replaced(
            state=state, progress=progress, from_peer=new.from_peer, reason=new.reason, partners=new.roster.peers
        )

    async def _offer(self, progress: Progress, body: Body | Callable[[], Body]) -> None:
        """Serve the state and announce it. See `SwarmExchange`."""
        await super()._offer(progress, body)
        if progress.round == 0 and self.run.merge.min_peers > 1:
            self.swarm.rounds.begin(
                is_late_joiner=False
            )  # it will train this round whole: peers that begin sooner wait for it

    def present_state(self, progress: Progress) -> Replaced | None:
        """See `SwarmExchange`. The next round is then one that this peer comes into late."""
        self._fresh = True
        live, search = self.swarm.membership.live(), self.swarm.rounds.search
        peers = [info.peer for info in live if not info.is_bootstrap]
        asked = random.sample(peers, min(_SAMPLE, len(peers))) + [info.peer for info in live if info.is_bootstrap]
        while True:
            joining = self.network.submit(search.join(asked))
            joined = wait_for(joining, self.stop, lambda: self.on_arriving(self.swarm.store.arriving))
            self.archives.joined(joined.advertised)
            match joined.begins:
                case JoinsWith.OTHERS:
                    assert joined.state is not None
                    reason = "joined late" if self.swarm.rounds.last is None else "was away"
                    return self._adopted(replace(joined.state, reason=reason))
                case JoinsWith.OWN:
                    return None
                case JoinsWith.NOTHING:
                    raise RunTimeError(
                        "no peer delivered the run's current weights; try again in a minute",
                        code="state-not-delivered",
                    )
            self.stop.sleep(_TRY_AGAIN_S)

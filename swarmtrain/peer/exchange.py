"""The trainer's side of the network: its two calls, answered by a `Swarm` in the network thread.

The trainer's share of a round's end is one snapshot (hashed and signed here, since the roster needs the hash) and
the wait for the mean.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

import torch

from swarmtrain.algorithm.outer import OuterState
from swarmtrain.algorithm.pacing import paced_inner_steps, reference_speed
from swarmtrain.errors import RunTimeError
from swarmtrain.events import CaughtUpEvent
from swarmtrain.membership.lifecycle import PeerInfo
from swarmtrain.membership.progress import Progress
from swarmtrain.membership.rosters import joining_steps
from swarmtrain.network.codec import body_of
from swarmtrain.network.daemon import swarm_time
from swarmtrain.network.node import NetworkThread
from swarmtrain.network.roster import Merged, NewState, Outcome
from swarmtrain.network.snapshots import build_snapshot
from swarmtrain.network.swarm import Swarm
from swarmtrain.peer.common import Interrupted, StopFlag, state_from_untrusted, wait_for
from swarmtrain.peer.trainer import Averaged, Contribution, Replaced, Start, StopTraining
from swarmtrain.run import RunFile
from swarmtrain.v1 import snapshot_pb2 as pb

__all__ = ["SwarmExchange"]


@dataclass
class SwarmExchange:
    """The trainer's two calls, answered by a `Swarm` in the network thread."""

    network: NetworkThread
    swarm: Swarm
    run: RunFile
    stop: StopFlag
    on_first_round: Callable[[int], None] = lambda inner_steps: None
    _merge: Future[Outcome] | None = None
    _started_at_s: float = 0.0
    _traffic: tuple[int, int] = (0, 0)
    _first: bool = True

    def start_round(self, progress: Progress, steps_per_s: float) -> Start | Replaced:
        """See `Exchange`."""
        try:
            if self.swarm.rounds.must_fetch_from:
                source, self.swarm.rounds.must_fetch_from = self.swarm.rounds.must_fetch_from, ""
                fetching = self.swarm.rounds.fetch_state([source], progress.round, "another roster holds")
                new = wait_for(self.network.submit(fetching), self.stop)
                if new is not None:
                    return self._replaced(new)
            if self._first and progress.round == 0:
                self._wait_for_company()
        except Interrupted:
            raise StopTraining from None
        self.swarm.describe(
            round=progress.round, inner_steps_done=0, steps_per_s=steps_per_s, run_tokens=progress.run_tokens
        )
        self._started_at_s = swarm_time()
        volunteers = self.swarm.membership.volunteers()
        steps = self._inner_steps(progress.round, steps_per_s, volunteers)
        self.swarm.rounds.participating = True
        if self._first:
            self._first = False
            self.on_first_round(steps)
        return Start(inner_steps=steps, num_peers=len(volunteers) + 1)

    def _wait_for_company(self) -> None:
        while len(self.swarm.membership.volunteers()) + 1 < self.run.merge.min_peers:
            self.stop.sleep(0.05)

    def _inner_steps(self, round: int, steps_per_s: float, volunteers: list[PeerInfo]) -> int:
        inner_steps = self.run.merge.inner_steps
        if self._first:
            done = [info.inner_steps_done for info in volunteers if info.round == round]
            return joining_steps(inner_steps, done)[0]
        if self.run.merge.pacing and steps_per_s > 0:
            speeds = [steps_per_s] + [info.steps_per_s for info in volunteers if info.steps_per_s > 0]
            return paced_inner_steps(steps_per_s, reference_speed(speeds), inner_steps)
        return inner_steps

    def step_done(self, inner_steps_done: int) -> None:
        """See `Exchange`."""
        self.swarm.rounds.inner_steps_done = inner_steps_done
        self.swarm.me = dataclasses.replace(self.swarm.me, inner_steps_done=inner_steps_done)

    def publish(self, contribution: Contribution) -> None:
        """See `Exchange`."""
        manifest = pb.Manifest(
            run_sha256=bytes.fromhex(self.swarm.published.sha256),
            kind=pb.SNAPSHOT_KIND_PSEUDO_GRADIENT,
            round=contribution.round,
            part=1,
            tokens=contribution.tokens,
            inner_steps=contribution.inner_steps,
        )
        body = body_of(contribution.gradient)
        held = build_snapshot(self.swarm.identity, manifest, self.swarm.specs, body)
        self._merge = self.network.submit(self.swarm.rounds.finish(contribution.round, held, self._started_at_s))

    def collect(self) -> Averaged | Replaced:
        """See `Exchange`."""
        assert self._merge is not None
        try:
            outcome = wait_for(self._merge, self.stop)
        except Interrupted:
            raise StopTraining from None
        if isinstance(outcome, Merged):
            roster = outcome.roster
            return Averaged(
                gradient=torch.frombuffer(outcome.mean, dtype=torch.float32),
                partners=roster.peers,
                weights=tuple(entry.tokens for entry in roster.entries),
                signer=roster.signer,
                roster_sha256=outcome.roster_sha256,
            )
        return self._replaced(outcome)

    def _replaced(self, new: NewState) -> Replaced:
        state, progress = state_from_untrusted(new)
        self.offer(state, progress)
        self.swarm.emit(CaughtUpEvent(round=progress.round, from_peer=new.from_peer, reason=new.reason))
        return Replaced(state=state, progress=progress, from_peer=new.from_peer, reason=new.reason)

    def offer(self, state: OuterState, progress: Progress) -> None:
        """Serve `state` to joiners and those who missed a round from now on."""
        body = body_of(state.theta, state.momentum)

        async def offer() -> None:
            self.swarm.set_state(progress, body)
            self.swarm.describe(
                round=progress.round,
                inner_steps_done=0,
                steps_per_s=self.swarm.me.steps_per_s,
                run_tokens=progress.run_tokens,
            )

        wait_for(self.network.submit(offer()), self.stop)

    def present_state(self) -> Replaced | None:
        """The state that the swarm is at, before this peer's first round; None if that is the initial weights."""
        wait_for(self.network.submit(self.swarm.greet_everyone()), self.stop)
        live = self.swarm.membership.live()
        newest = max((info.round for info in live), default=0)
        if newest == 0:
            return None
        volunteers = [info.peer for info in live if info.round == newest and not info.is_bootstrap]
        random.shuffle(volunteers)
        sources = volunteers + [info.peer for info in live if info.is_bootstrap]
        for minimum in (newest, 1):
            fetching = self.swarm.rounds.fetch_state(sources, minimum, "joined late")
            new = wait_for(self.network.submit(fetching), self.stop)
            if new is not None:
                state, progress = state_from_untrusted(new)
                return Replaced(state=state, progress=progress, from_peer=new.from_peer, reason=new.reason)
        raise RunTimeError("nobody could deliver the run's present state; try again in a minute")

    def traffic_since_last(self) -> tuple[int, int]:
        """Bytes sent and received since the last call."""
        traffic = self.swarm.node.traffic
        now = (traffic.sent_bytes, traffic.received_bytes)
        sent, received = now[0] - self._traffic[0], now[1] - self._traffic[1]
        self._traffic = now
        return sent, received

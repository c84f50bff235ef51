"""Common part of the exchanges of asynchronous rounds: the trainer never waits for the network.

Public methods run on the trainer's thread and submit work to the network thread; `_describe_start` runs on the latter.
`collect` may run on a thread of its own while the trainer takes steps, on a device. Meanwhile the trainer calls nothing
but `step_done`. `publish` may too, right before `collect`, unless the method lends weights.
"""

from __future__ import annotations

import logging
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, ClassVar

from swarmtrain.algorithm.outer import OuterState
from swarmtrain.algorithm.pacing import first_inner_steps, steps_of_everybody
from swarmtrain.network.asynchronous.state_fetcher import FetchedState
from swarmtrain.network.codec import body_of_state
from swarmtrain.peer.lifecycle.node import wait_for
from swarmtrain.peer.merging.consensus import counts_in_untrusted, round_of
from swarmtrain.peer.merging.roster_exchange import SwarmExchange
from swarmtrain.peer.training.session import Start
from swarmtrain.protocol.membership.membership import still_needed_apart
from swarmtrain.protocol.tokens.progress import Progress

_log = logging.getLogger(__name__)
_ANNOUNCE_S = 5.0
_SOURCES = 3
"""Number of states that a newcomer needs to outvote one wrong count, if there are as many peers."""
_GUESSED_ROUND_S = 1.0
"""Seconds a round is assumed to last before this peer has measured its speed."""


@dataclass
class AsynchronousExchange(SwarmExchange):
    """Exchange of a peer with rounds of its own: it trains, publishes, merges what is there, and continues."""

    merges_beside_training: ClassVar[bool] = True
    sure_share: float = field(default=1.0, kw_only=True)
    """Share of a round's expected time by which pulls have to be done; below 1 where rounds vary in length."""
    _told_steps: int = field(default=0, init=False)
    """Inner steps of the round as `step_done` was told them last: more than it has while its merge is computed."""

    def hold(self, states: Sequence[OuterState]) -> None:
        """Receive each fragment's state before the first round, and again after the weights were taken from others. See
        `Exchange`."""
        self._told_steps = 0

    def step_done(self, inner_steps_done: int) -> None:
        """Note that an inner step is done; others are told of no more than the round has. See `Exchange`."""
        self._told_steps = inner_steps_done
        super().step_done(min(inner_steps_done, self.round_steps))

    def _take_over_steps(self) -> int:
        """Return how many inner steps of the round that begins now were taken while the former one was merged."""
        self._told_steps = max(0, self._told_steps - self.round_steps)
        return self._told_steps

    def _enter_round(self, progress: Progress, steps_per_s: float) -> Start:
        """Return the plan of the next round, which this peer alone decides; wait for company before the very first."""
        if self._fresh and progress.round == 0:
            self._wait_for_company()
        self._check()
        section, others = self.run.merge, self.swarm.membership.volunteers()
        steps, sequences = self._plan_steps(steps_per_s)
        if steps_per_s <= 0 and not sequences:
            steps = first_inner_steps(section.inner_steps, paced=section.pacing)
        self.round_steps = steps
        self._begin(steps)
        return Start(
            inner_steps=steps,
            num_peers=len(others) + 1,
            run_steps_a_step=steps_of_everybody(steps_per_s, [info.steps_per_s for info in others]),
            batch_sequences=sequences,
        )

    def _round_s(self, steps: int, steps_per_s: float) -> float:
        """Return the seconds that a round of `steps` steps may use for pulls."""
        return self.sure_share * steps / steps_per_s if steps_per_s > 0 else _GUESSED_ROUND_S

    def _describe_start(self, progress: Progress, steps_per_s: float) -> None:
        """Announce in the presence that a round has begun. Runs in the network thread."""
        self.swarm.rounds.inner_steps_done = 0
        self.swarm.presence.describe(
            round=progress.round,
            steps_per_s=steps_per_s,
            run_tokens=progress.run_tokens,
            inner_steps=max(1, round(self.round_steps * self.step_share)),
        )
        self.swarm.presence.describe_part(0, self.swarm.presence.me.part_tokens)

    def _do_soon(self, work: Coroutine[Any, Any, None]) -> None:
        """Run the coroutine in the network thread without waiting for it; log its failure."""
        self.network.submit(work).add_done_callback(_log_failure)

    def offer(self, state: OuterState, progress: Progress) -> None:
        """See `SwarmExchange`. Does not wait."""
        if progress is not self._offered:
            self._offered = progress
            self._do_soon(self._offer(progress, lambda: body_of_state(state)))

    def _progress_of(
        self,
        states: Sequence[FetchedState],
        own_round: int,
        more: Sequence[Mapping[str, int]] = (),
        *,
        is_server: bool = False,
    ) -> Progress:
        """Return the counters that belong to pulled states.

        Counts come with the states; with enough of them, and `more` from other peers, a lie is outvoted. What each
        author says of itself is believed as far as its speed explains it. The round never decreases: others would
        refuse publications of an earlier one.
        """
        accounting = self.swarm.accounting
        told = [counts_in_untrusted(state.held.snapshot.manifest) for state in states]
        accounting.adopt([*told, *more], is_server=is_server)
        for state, counts in zip(states, told, strict=True):
            accounting.receive(state.peer, counts.get(state.peer, 0))
        counts = accounting.contributions()
        round = max(round_of(states), own_round)
        return Progress(round=round, run_tokens=sum(counts.values()), peer_tokens=counts)

    def _counted_by_others(self, states: Sequence[FetchedState]) -> list[Mapping[str, int]]:
        """Fetch the counts of other peers if the states are too few to outvote one that lies.

        The bootstrap is asked first. `_SOURCES` counts are wanted in all.
        """
        have = {state.peer for state in states}
        live = sorted(self.swarm.membership.live(), key=lambda info: not info.is_bootstrap)
        others = [info.peer for info in live if info.peer not in have and (info.is_bootstrap or info.round > 0)]
        missing = max(0, _SOURCES - len(states))
        asking = self.swarm.states.fetch_manifests(others[:missing])
        return [counts_in_untrusted(each) for each in wait_for(self.network.submit(asking), self.stop)]

    def _say_that_it_is_finished(self) -> None:
        """Announce that this peer needs nothing more."""

        async def say() -> None:
            self.swarm.presence.change(is_finished=True)

        self.network.run(say(), _ANNOUNCE_S)

    def still_needed(self, last: Progress) -> str:
        """Return the reason why this peer should stay after the run's end; empty if nobody needs it. See
        `SwarmExchange`."""
        return still_needed_apart(self.swarm.membership, self.run.run.total_tokens)


def _log_failure(future: Future[None]) -> None:
    if not future.cancelled() and (error := future.exception()) is not None:
        _log.error("the network's part of a round failed", exc_info=error)

"""What the exchanges of asynchronous rounds have in common: nothing the trainer asks for waits for the network."""

from __future__ import annotations

import logging
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from swarmtrain.algorithm.outer import OuterState
from swarmtrain.algorithm.pacing import first_inner_steps, steps_of_everybody
from swarmtrain.network.asynchronous.state_fetcher import FetchedState
from swarmtrain.network.codec import body_of_state
from swarmtrain.peer.lifecycle.node import wait_for
from swarmtrain.peer.merging.consensus import counts_in_untrusted, round_of
from swarmtrain.peer.merging.roster_exchange import SwarmExchange
from swarmtrain.peer.training.session import Start
from swarmtrain.protocol.membership.run_end import still_needed_apart
from swarmtrain.protocol.tokens.progress import Progress

__all__ = ["AsynchronousExchange"]

_log = logging.getLogger(__name__)
_SETTLE_S = 5.0
_SOURCES = 3
"""So many count for a newcomer, where there are so many."""
_GUESSED_ROUND_S = 1.0
"""How long a round is taken to last before this peer knows how fast it is."""


@dataclass
class AsynchronousExchange(SwarmExchange):
    """Rounds of this peer's own: it trains, hands over, takes what is there, and goes on."""

    sure_share: float = field(default=1.0, kw_only=True)
    """After this part of the time that a round should take, what is pulled has to be there: less where rounds are not
    all equally long."""

    def _enter_round(self, progress: Progress, steps_per_s: float) -> Start:
        """How the next round begins, which is this peer's alone to say; waits for company before the first."""
        if self._fresh and progress.round == 0:
            self._wait_for_company()
        self._check()
        section, others = self.run.merge, self.swarm.membership.volunteers()
        steps = first_inner_steps(section.inner_steps, paced=section.pacing)
        if steps_per_s > 0:
            steps = self._paced(steps_per_s)
        self.round_steps = steps
        self._begin(steps)
        return Start(
            inner_steps=steps,
            num_peers=len(others) + 1,
            run_steps_a_step=steps_of_everybody(steps_per_s, [info.steps_per_s for info in others]),
        )

    def _round_s(self, steps: int, steps_per_s: float) -> float:
        """How long a round of so many steps will last."""
        return self.sure_share * steps / steps_per_s if steps_per_s > 0 else _GUESSED_ROUND_S

    def _describe_start(self, progress: Progress, steps_per_s: float) -> None:
        """Say that a round has begun. In the network thread."""
        self.swarm.rounds.inner_steps_done = 0
        self.swarm.presence.describe(
            round=progress.round,
            steps_per_s=steps_per_s,
            run_tokens=progress.run_tokens,
            inner_steps=self.round_steps,
        )
        self.swarm.presence.describe_part(0, self.swarm.presence.me.part_tokens)

    def _do_soon(self, work: Coroutine[Any, Any, None]) -> None:
        """Have the network thread do it; the trainer does not wait."""
        self.network.submit(work).add_done_callback(_log_failure)

    def offer(self, state: OuterState, progress: Progress) -> None:
        """See `SwarmExchange`. The trainer does not wait for it."""
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
        """The counters of states that were pulled: the counts that belong to them come with them, outvoted by `more`
        that others count where there are enough, and what each says of itself is believed as far as its speed explains
        it. A round that turns back would be refused by everyone."""
        tallying = self.swarm.tallying
        told = [counts_in_untrusted(state.held.snapshot.manifest) for state in states]
        tallying.bring([*told, *more], is_server=is_server)
        for state, counts in zip(states, told, strict=True):
            tallying.hear(state.peer, counts.get(state.peer, 0))
        counts = tallying.contributions()
        round = max(round_of(states), own_round)
        return Progress(round=round, run_tokens=sum(counts.values()), peer_tokens=counts)

    def _counted_by_others(self, states: Sequence[FetchedState]) -> list[Mapping[str, int]]:
        """What others count than those whose states are here, where these are too few to outvote one that lies."""
        have = {state.peer for state in states}
        live = sorted(self.swarm.membership.live(), key=lambda info: not info.is_bootstrap)
        others = [info.peer for info in live if info.peer not in have and (info.is_bootstrap or info.round > 0)]
        missing = max(0, _SOURCES - len(states))
        asking = self.swarm.states.fetch_manifests(others[:missing])
        return [counts_in_untrusted(each) for each in wait_for(self.network.submit(asking), self.stop)]

    def _settle(self) -> None:
        """Say that this peer needs nothing more."""

        async def settle() -> None:
            self.swarm.presence.change(settled=True)

        self.network.run(settle(), _SETTLE_S)

    def still_needed(self, last: Progress) -> str:
        """See `SwarmExchange`."""
        return still_needed_apart(self.swarm.membership, self.run.run.total_tokens)


def _log_failure(future: Future[None]) -> None:
    if not future.cancelled() and (error := future.exception()) is not None:
        _log.error("the network's part of a round failed", exc_info=error)

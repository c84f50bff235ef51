"""A simulated volunteer that makes one large batch after the other: the product's `BatchEnd` ends its rounds."""

from __future__ import annotations

from swarmtrain.protocol.rounds import messages as ev
from swarmtrain.protocol.rounds.batch_end import STALE_SHARE, BatchEnd, BatchRules, others_in
from swarmtrain.protocol.rounds.rosters import Roster
from swarmtrain.simulate.systems.messages import Phase, SimulatedLink
from swarmtrain.simulate.systems.volunteer import SimulatedVolunteer, Surroundings

_ASKS = 2
"""Number of this peer's search in which it asks the others how far they are."""


class BatchVolunteer(SimulatedVolunteer):
    """Volunteer whose round ends when all of them have the batch of `Settings.target` together, as it believes."""

    def __init__(self, world: Surroundings, name: str, steps_per_s: float, link: SimulatedLink) -> None:
        super().__init__(world, name, steps_per_s, link)
        s = self.settings
        assert s.target is not None
        self.end = BatchEnd(
            BatchRules(
                target=s.target,
                step_tokens=s.tokens_per_step,
                max_wait_s=s.max_wait_s,
                round_limit_s=s.round_limit_s,
                stale_s=STALE_SHARE * s.presence_ttl_s,
            )
        )
        self._is_asking = False

    @property
    def inner_steps_done(self) -> int:
        """Inner steps of this round, as advertised to others."""
        return self.steps if self.phase in (Phase.TRAINING, Phase.MERGING) else 0

    def _train(self, *, fresh: bool) -> None:
        """Begin to add up gradients for the next batch."""
        now, others = self.world.clock.now, self.membership.volunteers()
        is_late = fresh and any((info.round, info.inner_steps_done > 0) > (self.round, False) for info in others)
        run_tokens = 0 if self.last is None else self.last.total_tokens
        self.end.begin(self.round, run_tokens, self.steps_per_s * self.settings.tokens_per_step, now, is_late=is_late)
        self._is_asking = False
        self._begin_round(0, now + 1 / self.steps_per_s, is_late_joiner=is_late)

    def _steps_done(self) -> None:
        """Count a step; end the batch, or take another one."""
        self.steps += 1
        now, others = self.world.clock.now, others_in(self.membership)
        there = self.end.share(self.steps * self.settings.tokens_per_step, others, now)
        if self.end.asks_others(there, now):
            self._is_asking = True
            self.tell(ev.SurveyPeers(_ASKS, tuple(info.peer for info, _, _ in others)))
        if self.end.is_complete(
            there,
            wanted_by=self.engine.wanted_by,
            is_asking=self._is_asking,
            now=now,
            is_overtaken=self.engine.is_overtaken,
            step_s=1 / self.steps_per_s,
        ):
            self._publish()
        else:
            self._trains_until(now + 1 / self.steps_per_s)

    def _surveyed(self, search: int) -> None:
        if search == _ASKS:
            self._is_asking = False
        else:
            super()._surveyed(search)

    def _advance(self, roster: Roster) -> None:
        own_tokens = self.steps * self.settings.tokens_per_step
        tokens = {entry.peer: entry.tokens for entry in roster.entries}
        self.end.counted(tokens, own_tokens, self.ended_s, lists_this_peer=self.name in tokens)
        super()._advance(roster)

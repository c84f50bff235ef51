"""Trainer's calls with one large batch: rounds of rosters whose gradients are of the same weights.

A round ends when the volunteers together have the batch (`protocol/rounds/batch_end.py`), and its outer step is one of
AdamW or LAMB. All else is as in synchronous rounds (decision 92).
"""

from __future__ import annotations

import dataclasses
import logging
import math
import random
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

from swarmtrain.algorithm.quantize import FedBackSum
from swarmtrain.events import WarningEvent
from swarmtrain.network.codec import body_of_pieces
from swarmtrain.network.daemon import swarm_time
from swarmtrain.network.rounds.round_end import RosterMean
from swarmtrain.network.snapshots.store import Body
from swarmtrain.peer.merging.common_steps import common_optimizer, common_step
from swarmtrain.peer.merging.roster_exchange import RosterExchange
from swarmtrain.peer.merging.updates import Averaged, BatchMean, LocalUpdate, Replaced
from swarmtrain.peer.training.session import Start
from swarmtrain.protocol.rounds.batch_end import (
    STALE_SHARE,
    BatchEnd,
    BatchRules,
    BatchShare,
    others_in,
    planned_sequences,
)
from swarmtrain.protocol.rounds.rosters import AdvertisedRound
from swarmtrain.protocol.tokens.progress import Progress
from swarmtrain.words import count_in_words, time_in_words

_log = logging.getLogger(__name__)
_SAMPLE = 16
"""Peers that are asked how far they are, at random."""


@dataclass
class BatchExchange(RosterExchange):
    """Exchange of a collaboration that makes one large batch after the other."""

    _asking: Future[dict[str, AdvertisedRound]] | None = field(default=None, init=False)
    """Answers of the others on how far they are."""
    _published: LocalUpdate | None = field(default=None, init=False)
    _ended_s: float = field(default=0.0, init=False)
    """Swarm time at which this peer ended its part of the batch."""
    _stepped_s: float = field(default=0.0, init=False)
    """Swarm time at which this peer's last inner step ended."""
    _counted_tokens: int = field(default=0, init=False)
    """Tokens of this peer that were counted when the round began."""
    _run_tokens: int = field(default=0, init=False)
    """Tokens of the run when the round began."""
    _ahead_tokens: int = field(default=0, init=False)
    """Tokens of the steps taken while the last batch is merged."""

    def __post_init__(self) -> None:
        super().__post_init__()
        run, specs = self.run, self.swarm.rounds.settings.specs
        rules = BatchRules(
            target=run.batch_target,
            step_tokens=run.tokens_per_step,
            max_wait_s=run.merge.max_wait_s,
            round_limit_s=run.merge.round_limit_s,
            stale_s=STALE_SHARE * run.network.presence_ttl_s,
        )
        format = run.merge.roster_format
        self._encoder = None if format == "fp32" else FedBackSum(format)
        self._has_counted: Callable[[], None] = lambda: None
        """Called once this peer's gradient is on a roster."""
        self._end = BatchEnd(rules)
        self._optimizer = common_optimizer(run, [spec.shape for spec in specs])

    @property
    def is_training(self) -> bool:
        """True until this peer has ended the batch. Any thread may ask."""
        return self._merge is None or self._merge.done()

    def progress_in_words(self) -> str:
        """Say which part of the batch is there, as this peer believes. Any thread may ask."""
        there = self._share(math.floor(self.steps_done * self.step_share * self.run.tokens_per_step))
        soon = "" if there.left_s is None else f", about {time_in_words(there.left_s)}"
        of = f" of {count_in_words(there.target_tokens)} tokens" if self.run.batch_target.grows else ""
        return f"{100 * there.share:.0f} % of this step's batch{of} is here{soon}"

    def start_round(self, progress: Progress, steps_per_s: float) -> Start:
        """Return the plan of the next round. See `Exchange`."""
        if self._fresh and self._ahead_tokens:
            message = (
                f"about {self._ahead_tokens:,} tokens that this volunteer computed ahead of round {progress.round} do "
                "not count, since it took others' weights or paused; its next gradients are of the new weights"
            )
            self.swarm.emit(WarningEvent(message=message, code="gradient-not-counted"))
        self._ahead_tokens = 0
        self._counted_tokens = progress.peer_tokens.get(self.swarm.identity.peer_id, 0)
        self._run_tokens = progress.run_tokens
        start = super().start_round(progress, steps_per_s)
        return dataclasses.replace(start, is_over=self._is_over)

    def _inner_steps(self, round: int, steps_per_s: float) -> tuple[int, int, bool]:
        """Return the most inner steps of a round, the sequences in each (0: the run's batch), and whether this peer
        comes late.
        """
        section, batch, context = self.run.merge, self.run.inner.batch_sequences, self.run.model.context_tokens
        # Steps that are taken while the last batch is merged are of this one.
        goes_on = self.run.merge.delay_steps and self._ended_s and not self._fresh
        own_rate = (steps_per_s or self.expected_steps_per_s) * self.run.tokens_per_step
        others = self.swarm.membership.volunteers()
        has_waited = round == 0 and section.min_peers > 1
        is_late = self._fresh and any(
            info.round > round or (info.round == round and info.inner_steps_done > 0 and not has_waited)
            for info in others
        )
        began_s = self._ended_s if goes_on else swarm_time()
        self._end.begin(round, self._run_tokens, own_rate, began_s, is_late=is_late)
        there, target = self._share(0), self._end.target_tokens / context
        others_per_s = (there.tokens_per_s - there.own_per_s) / context
        sequences = planned_sequences(
            there.own_per_s / context, others_per_s, batch, target, max_wait_s=section.max_wait_s
        )
        self.step_share = sequences / batch
        return math.ceil(target / sequences), 0 if sequences == batch else sequences, is_late

    def step_done(self, inner_steps_done: int) -> None:
        """Note that an inner step is done. One taken while a batch is merged is of the next one. See `Exchange`."""
        num_ahead = inner_steps_done - self.round_steps
        if num_ahead <= 0:
            super().step_done(inner_steps_done)
        else:
            self.num_steps += self.step_share
            self._ahead_tokens = math.floor(num_ahead * self.step_share * self.run.tokens_per_step)

    def publish(self, contribution: LocalUpdate) -> None:
        """Hand over the mean gradient of this peer's part of the batch. See `Exchange`."""
        self._published, self._ended_s = contribution, swarm_time()
        super().publish(contribution)

    def _body(self, contribution: LocalUpdate) -> Body:
        """Return the bytes to publish."""
        if self._encoder is None:
            return super()._body(contribution)
        pieces, self._has_counted = self._encoder.encode(contribution.gradient, contribution.tokens)
        return body_of_pieces(pieces)

    def collect(self, fragment: int = 0) -> Averaged | Replaced:
        """Return the mean gradient of the batch, once a roster says whose are in it. See `Exchange`."""
        own, arrived = self._published, super().collect(fragment)
        assert own is not None
        if self._is_in(arrived, own):
            self._has_counted()
        else:
            message = (
                f"the step of round {own.round} was taken without this volunteer's {own.tokens:,} tokens, which came "
                "too late and do not count; its next gradients are of the new weights"
            )
            self.swarm.emit(WarningEvent(message=message, code="gradient-not-counted"))
        return arrived

    def _is_in(self, arrived: Averaged | Replaced, own: LocalUpdate) -> bool:
        """Return whether this peer's gradient is in what arrived. A state that it took because it could not get the
        mean may be of a roster that lists it, or of later ones, of which the state has only the sums.
        """
        me = self.swarm.identity.peer_id
        if isinstance(arrived, Replaced) and arrived.progress.round != own.round + 1:
            return arrived.progress.peer_tokens.get(me, 0) >= self._counted_tokens + own.tokens
        return me in arrived.partners

    def _mean(self, outcome: RosterMean) -> Averaged:
        """Return the update of a batch that ended with a roster."""
        roster, mean = outcome.roster, super()._mean(outcome)
        own, read, times = self._published, 0, 1.0
        if own is not None:
            read = own.tokens
            if self.run.batch_rows > 1 and own.tokens:  # rosters count targets, and steps cost what they read
                read = round(own.inner_steps * self.step_share * self.run.tokens_per_step)
                times = read / own.tokens
        tokens = {entry.peer: round(times * entry.tokens) for entry in roster.entries}
        self._end.counted(tokens, read, self._ended_s, lists_this_peer=self.swarm.identity.peer_id in tokens)
        at = common_step(self.run, roster.round, roster.base_tokens)
        fields = {each.name: getattr(mean, each.name) for each in dataclasses.fields(mean)}
        return BatchMean(**fields, optimizer=self._optimizer, at=at)

    def _is_over(self, tokens: int) -> bool:
        """Return whether the batch ends with the `tokens` that this peer has read for it."""
        there, rounds, now = self._share(tokens), self.swarm.rounds, swarm_time()
        if self._end.asks_others(there, now):
            peers = [info.peer for info in self.swarm.membership.volunteers()]
            self._asking = self.network.submit(rounds.search.ask_now(random.sample(peers, min(_SAMPLE, len(peers)))))
        is_asking = self._asking is not None and not self._asking.done()
        over = self._end.is_complete(
            there,
            wanted_by=rounds.wanted_by,
            is_asking=is_asking,
            now=now,
            is_overtaken=rounds.is_overtaken,
            step_s=now - max(self._stepped_s, self._end.started_s),
        )
        self._stepped_s = now
        if over:
            self._asking = None
            said = self._end.round, tokens, there.others_tokens, self._end.target_tokens
            _log.info("round %d: %d tokens here, %.0f elsewhere, of %d", *said)
        return over

    def _share(self, own_tokens: int) -> BatchShare:
        return self._end.share(own_tokens, others_in(self.swarm.membership), swarm_time())

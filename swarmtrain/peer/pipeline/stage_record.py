"""Record and events of a pipeline volunteer. From all peers' records each peer computes who should move.

Runs on the main thread (`tell_started` on a stage's); the presence is changed in the network thread.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence

from swarmtrain.events import StageThroughputEvent, StartedEvent
from swarmtrain.network.daemon import swarm_time
from swarmtrain.network.discovery.records import MAX_KEPT
from swarmtrain.network.tasks import logged
from swarmtrain.peer.lifecycle.process import process_age_s
from swarmtrain.peer.pipeline.context import PipelineContext
from swarmtrain.peer.pipeline.first_stage import FirstStage
from swarmtrain.peer.training.round_report import tell_loss
from swarmtrain.protocol.pipeline.balance import StagePeer
from swarmtrain.protocol.pipeline.moves import places_of

_TELL_EVERY_S = 1.0
_THROUGHPUT_EVERY_S = 10.0
_FIRST_MOVE_S = 20.0
"""Seconds that fetching a stage is assumed to take before one was measured."""


class StageRecord:
    """Place of this peer among the stages, as announced in the run's swarm."""

    def __init__(self, pipeline: PipelineContext, *, most_stages: int, whole_tokens_per_s: float) -> None:
        """`whole_tokens_per_s` is this machine's measured speed through the whole model."""
        self._context, self._swarm, self._stages = pipeline.volunteer, pipeline.swarm, pipeline.stages
        self._mover, self._rule, self._shapes = pipeline.mover, pipeline.rule, pipeline.shapes
        self._most_stages, self._whole_tokens_per_s = most_stages, whole_tokens_per_s
        self._kept: Mapping[int, int] = {}
        self._goes_to: tuple[int, ...] = ()
        self._move_s, self._move_began_s = _FIRST_MOVE_S, 0.0
        self._flow_tokens_per_s, self._flow_told_s = 0.0, 0.0
        self._next_tell_s = self._next_throughput_s = 0.0
        self._has_started = False

    # ------------------------------------------------------------- its place

    def places(self) -> list[StagePeer]:
        """Return the records of all peers that are present, this one included."""
        return [*places_of(self._swarm.membership.volunteers()), self.place()]

    def place(self) -> StagePeer:
        """Return this peer's record."""
        stages = self._stages.numbers
        return StagePeer(
            peer=self._context.me,
            stages=stages,
            moving_to=self._goes_to,
            bound=self._mover.bound if stages else (),
            tokens_per_s=self._tokens_per_s(stages or self._goes_to),
            most_stages=self._most_stages,
            kept=() if stages else tuple(self._kept.items())[:MAX_KEPT],
            move_s=self._move_s,
            queue=float(sum(held.queue.num_waiting for held in self._stages.all)),
            flow_tokens_per_s=self._flow_tokens_per_s,
            seen_s=swarm_time(),
        )

    def _tokens_per_s(self, stages: Sequence[int]) -> float:
        """Return the speed through these stages when always fed: as measured in them, else from the machine's speed."""
        if not stages:
            return self._whole_tokens_per_s
        measured = [held.trainer.loop.meter.tokens_per_s for held in self._stages.all if held.number in stages]
        rates = [rate for rate in measured if rate is not None]
        if len(rates) < len(stages):
            return self._whole_tokens_per_s / self._rule.cost(stages)
        # A token takes its time in each held stage, one after the other.
        rate = 1 / sum(1 / each for each in rates)
        self._whole_tokens_per_s = rate * self._rule.cost(stages)
        return rate

    def chooses(self, kept: Mapping[int, int]) -> None:
        """Announce that this peer is about to choose; `kept` maps stages with a checkpoint here to its round."""
        self._kept = kept
        self.tell(now=True)

    def goes_to(self, stages: tuple[int, ...]) -> None:
        """Announce that this peer is taking these stages."""
        self._goes_to, self._move_began_s = stages, time.monotonic()
        self.tell(now=True)

    def has_taken(self, num_moves: int = 1) -> float:
        """Announce that this peer serves the stages it was taking; return the seconds that each of `num_moves` moves
        took."""
        self._goes_to, self._move_s = (), (time.monotonic() - self._move_began_s) / num_moves
        self.tell(now=True)
        return self._move_s

    def stays(self) -> None:
        """Announce that this peer does not move after all."""
        self._goes_to = ()
        self.tell(now=True)

    # ------------------------------------------------------------- telling

    def tell(self, now: bool = False) -> None:
        """Update the record, once a second or `now`; greet everybody at once if something changed that they act on."""
        if not now and time.monotonic() < self._next_tell_s:
            return
        self._next_tell_s = time.monotonic() + _TELL_EVERY_S
        swarm, stages, total = self._swarm, self._stages, self._context.run.run.total_tokens
        place, is_done, contribution = self.place(), stages.have_had_tokens, stages.contribution
        # Only a peer that is done announces the total: stages after the first end once all drivers announce it
        # (decision 27).
        run_tokens = total if is_done else min(stages.run_tokens, total - 1)
        now = now or is_done != (swarm.presence.me.run_tokens >= total)
        round, steps_per_s = stages.round, stages.steps_per_s

        async def tell() -> None:
            swarm.presence.change(place=place)
            swarm.presence.describe(round=round, steps_per_s=steps_per_s, run_tokens=run_tokens)
            swarm.accounting.learn({place.peer: contribution})
            if now:
                logged(asyncio.create_task(swarm.greeter.greet_everyone()), "telling what this peer holds")

        self._context.wait(tell())

    def tell_throughput(self, first: FirstStage) -> None:
        """Emit the `stage_throughput` event every ten seconds: what has passed through the stages since."""
        now = time.monotonic()
        if now < self._next_throughput_s:
            return
        self._next_throughput_s = now + _THROUGHPUT_EVERY_S
        passed = [held.passed_since_last() for held in self._stages.all]
        if self._flow_told_s and passed:
            self._flow_tokens_per_s = sum(passed) / len(passed) / (now - self._flow_told_s)
            place, loss = self.place(), first.take_loss()
            tell_loss(self._context.network, self._swarm, loss or 0.0)
            self._context.emit(
                StageThroughputEvent(
                    stages=place.stages,
                    tokens_per_s=self._flow_tokens_per_s,
                    most_tokens_per_s=place.tokens_per_s,
                    waiting=int(place.queue),
                    in_flight=first.num_in_flight,
                    loss=loss,
                )
            )
        self._flow_told_s = now

    def tell_started(self, inner_steps: int) -> None:
        """Emit the `started` event when the first round of any stage begins; once."""
        if self._has_started:
            return
        self._has_started, stages = True, self._stages.numbers or self._goes_to
        self._context.emit(
            StartedEvent(
                inner_steps_per_round=inner_steps,
                num_parameters=sum(self._shapes[stage].num_parameters for stage in stages),
                total_tokens=self._context.run.run.total_tokens,
                startup_s=process_age_s(),
            )
        )

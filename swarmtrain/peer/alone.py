"""Train one volunteer alone: the same model, text and schedule without a swarm, as a baseline to compare with."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from swarmtrain.algorithm.common_step import CommonOptimizer
from swarmtrain.algorithm.outer import OuterState
from swarmtrain.data.mixture import PeerPlace
from swarmtrain.data.prepare import training_batches, training_data
from swarmtrain.errors import RunTimeError
from swarmtrain.events import Event
from swarmtrain.model.run_model import build_run_model
from swarmtrain.network.discovery.run_lookup import PublishedRun
from swarmtrain.peer.devices.choice import choose_compute
from swarmtrain.peer.devices.report import ComputeReport
from swarmtrain.peer.lifecycle.node import PeerSettings, held_out_loss, use_threads
from swarmtrain.peer.lifecycle.preparation import data_base
from swarmtrain.peer.merging.common_steps import common_optimizer, common_step
from swarmtrain.peer.merging.updates import Averaged, BatchMean, LocalUpdate, Replaced
from swarmtrain.peer.model_files.base_files import kept_model_folder
from swarmtrain.peer.training.loop import loop_class
from swarmtrain.peer.training.session import RoundReport, Session, Start
from swarmtrain.protocol.tokens.progress import Progress
from swarmtrain.run import RunFile

ALONE = "alone"


class TrainedAlone(NamedTuple):
    """What one volunteer did alone."""

    loss: float
    """Held-out loss, in nats per byte."""
    tokens: int
    """Tokens that count, as in `run.total_tokens`."""
    inner_steps: int


@dataclass
class _Nobody:
    """Exchange of a peer that trains alone: the mean is its own round."""

    run: RunFile
    optimizer: CommonOptimizer | None = None
    """Takes the step of each round, with a method whose peers take one together; else None."""
    _own: LocalUpdate | None = None
    _progress: Progress = field(default_factory=Progress)

    def hold(self, states: Sequence[OuterState]) -> None:
        pass

    def merged(self, fragment: int, state: OuterState) -> None:
        pass

    def start_round(self, progress: Progress, steps_per_s: float) -> Start:
        self._progress = progress
        # A step has at most so many targets. Where it has fewer, more rounds follow.
        left = math.ceil((self.run.run.total_tokens - progress.run_tokens) / self.run.tokens_per_step)
        steps = self.run.merge.inner_steps
        if self.optimizer is not None:
            steps = math.ceil(self.run.batch_target.at(progress.run_tokens) / self.run.tokens_per_step)
        return Start(inner_steps=max(1, min(steps, left)), num_peers=1)

    def step_done(self, inner_steps_done: int) -> None:
        pass

    def publish(self, contribution: LocalUpdate) -> None:
        self._own = contribution

    def collect(self, fragment: int = 0) -> Averaged | Replaced:
        assert self._own is not None
        gradient, weights, before = self._own.gradient, (self._own.tokens,), self._progress
        if self.optimizer is None:
            return Averaged(gradient=gradient, partners=(ALONE,), weights=weights, signer=ALONE, roster_sha256="")
        return BatchMean(
            gradient=gradient,
            partners=(ALONE,),
            weights=weights,
            signer=ALONE,
            roster_sha256="",
            optimizer=self.optimizer,
            at=common_step(self.run, before.round, before.run_tokens),
        )


def train_alone(
    published: PublishedRun,
    tokens: int,
    settings: PeerSettings,
    advance: Callable[[int], None],
    emit: Callable[[Event], None],
) -> TrainedAlone:
    """Train one volunteer by itself until it has had `tokens` that count; return what came of it.

    It chooses its device and precision as a volunteer with these settings does, and tells `emit` what it trains on. Its
    schedule runs over exactly those tokens, and it merges with nobody: an outer rate of 1 without momentum leaves plain
    AdamW. Where peers make a large batch together, it makes batches as large by itself, and takes the same step with
    each. `advance` is called after each round with the number of its tokens. Raises RunTimeError if training diverges.
    """
    use_threads(settings.limits.threads)
    run = _lone_run(published.run, tokens)
    limits = (settings.limits.memory_bytes, settings.vram_bytes)
    chosen = choose_compute(run, settings.device, settings.precision, *limits, settings.base_bits)
    compute, told = chosen.compute, ComputeReport(run, chosen, emit)
    told.start()
    base = data_base(run, settings.data_folder)
    data = training_data(run, base, published.held_out, published.tokenizer, settings.cache_folder)
    model = compute.placed(build_run_model(run, kept_model_folder(published, settings)))
    place = PeerPlace(run_sha256=published.sha256, peer_id=ALONE)
    batches = training_batches(run, data, place)

    num_steps = 0

    def report(finished: RoundReport) -> None:
        nonlocal num_steps
        num_steps += finished.contribution.inner_steps
        advance(finished.contribution.tokens)

    loop = loop_class(compute)(run, model, batches, compute=compute, told_smaller=told.smaller)
    optimizer = common_optimizer(run, loop.parameters.shapes) if run.merge.kind.common_step else None
    session = Session(run=run, parameters=loop.parameters, loop=loop, exchange=_Nobody(run, optimizer), report=report)
    try:
        loop.train(session)
    finally:
        loop.close()
    loss = held_out_loss(model, session.replica.state.theta, published, data.tokenizer)
    if not loss.is_finite:
        raise RunTimeError(
            "the volunteer alone has a held-out loss that is not a finite number: training diverged; lower "
            "inner.learning_rate",
            code="training-diverged",
        )
    return TrainedAlone(loss.nats_per_byte, session.replica.own_tokens, num_steps)


def _lone_run(run: RunFile, tokens: int) -> RunFile:
    alone: dict[str, Any] = {
        "outer_learning_rate": 1.0,
        "outer_momentum": 0.0,
        "momentum_ramp_rounds": 0,
        "pacing": False,
    }
    merge = run.merge.model_copy(update={**alone, "fragments": 1})
    total = run.run.model_copy(update={"total_tokens": tokens})
    return run.model_copy(update={"merge": merge, "run": total})

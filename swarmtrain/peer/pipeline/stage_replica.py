"""Stages that this peer holds: for each its swarm, its trainer on a thread of its own, its checkpoints.

Each stage is a merge group of its own (docs/decisions/0027): this is to a stage's run what `ModelTraining` is to a
whole model's. A peer that holds several stages has several of these.

The main thread enters and ends a stage; `_train`, and the session's calls in it, run on the stage's thread.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from swarmtrain.data.batches import BatchSource
from swarmtrain.errors import RunTimeError
from swarmtrain.events import PeerJoinedEvent, PeerLeftEvent, PeerLostEvent
from swarmtrain.model.run_stages import RunStageShape, build_run_stage
from swarmtrain.model.stage_work import DeviceStageWork, StageWork
from swarmtrain.network.codec import average_bytes_untrusted, tensor_specs
from swarmtrain.network.coverage import shards_of
from swarmtrain.network.discovery.invite import InvitedPeer
from swarmtrain.network.discovery.run_lookup import PublishedRun
from swarmtrain.network.snapshots.store import TensorSpec
from swarmtrain.network.swarm import Swarm
from swarmtrain.peer.checkpoints.checkpoint import Checkpoint
from swarmtrain.peer.checkpoints.manager import CheckpointManager, checkpointer_of
from swarmtrain.peer.checkpoints.writer import Checkpointer
from swarmtrain.peer.control.board import Pulse
from swarmtrain.peer.devices.compute import ComputeDevice, enough_memory, release_cached
from swarmtrain.peer.lifecycle.context import VolunteerContext
from swarmtrain.peer.lifecycle.node import Emit
from swarmtrain.peer.lifecycle.preparation import initial_seed
from swarmtrain.peer.lifecycle.stop import StopTraining
from swarmtrain.peer.merging.gossip_exchange import GossipExchange
from swarmtrain.peer.pipeline.request_queue import StageRequestQueue
from swarmtrain.peer.pipeline.stage_loop import StageTrainer, StageTransfer
from swarmtrain.peer.training.pause import PauseSwitch
from swarmtrain.peer.training.round_report import round_event
from swarmtrain.peer.training.session import RoundReport, Session
from swarmtrain.protocol.membership.membership import PeerInfo
from swarmtrain.protocol.pipeline.ledger import LedgerLimits, StageLedger
from swarmtrain.protocol.tokens.progress import Progress
from swarmtrain.v1 import control_pb2 as pb

_log = logging.getLogger(__name__)
_LEAVING = "leaving"
_END_S = 30.0
_GOODBYE_S = 1.0
_LAST_ROUND_S = 2.0
_LAST_FLUSH_S = 1.0
_SURE_SHARE = 0.6
"""Share of a round's expected time by which pulls must be done. It is low because drivers set how long a stage's round
lasts, and that changes from round to round.
"""


@dataclass(kw_only=True)
class StageSite:
    """Parts that all stages of a peer share."""

    context: VolunteerContext
    compute: ComputeDevice = field(default_factory=ComputeDevice)
    """Device on which the stages are, and the precision that they are computed in."""
    graph_bytes: float = float("inf")
    on_first_round: Callable[[int], None] = lambda inner_steps: None
    on_arriving: Callable[[Any], None] = lambda held: None
    swarms: dict[int, Swarm] = field(default_factory=dict)
    """Swarm of every stage that this process has held. They are kept, since calls once served cannot be withdrawn."""
    checkpointers: dict[int, Checkpointer] = field(default_factory=dict)
    """Checkpointer that writes each stage's rounds now, or wrote them last; kept for the same reason."""


def emit_of_stage(emit: Emit) -> Emit:
    """Return `emit` for a stage's swarm, without arrivals and departures: the run's swarm reports those."""
    return lambda event: None if isinstance(event, PeerJoinedEvent | PeerLostEvent | PeerLeftEvent) else emit(event)


@dataclass
class StageReplica:
    """Stage that this peer holds."""

    site: StageSite
    number: int
    shape: RunStageShape
    batches_at: Callable[[int], BatchSource]
    """Return the stage's data, given how many batches a checkpoint says were drawn."""
    over: Callable[[], bool]
    """Return whether drivers have no more; see `StageTrainer`."""
    corpus_sha256: str = ""
    state_from: str = field(default="", init=False)
    resumed_round: int | None = field(default=None, init=False)
    swarm: Swarm = field(init=False)
    exchange: GossipExchange = field(init=False)
    trainer: StageTrainer = field(init=False)
    session: Session = field(init=False)
    manager: CheckpointManager = field(init=False)
    pause: PauseSwitch = field(default_factory=PauseSwitch)
    """Pause of this stage alone."""
    training: Future[str] = field(default_factory=Future)
    """Reason why training ended, or the error that ended it."""
    _is_new: bool = field(default=True, init=False)
    _told_tokens: int = field(default=0, init=False)
    _kept: Checkpoint | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        site, context = self.site, self.site.context
        published, me = context.published.of_stage(self.number), context.me
        run = published.run
        compute = site.compute
        with enough_memory(f"taking stage {self.number}", compute.device):
            built = build_run_stage(run, self.shape, context.model_folder, initial_seed(run, me))
            model = built.to(compute.device)
        specs = tensor_specs(model.named_parameters())
        checkpointer = checkpointer_of(context.folder, published, me, context.emit, self.number)
        kept = self._kept = checkpointer.load(run, self.shape.num_parameters)
        site.checkpointers[self.number] = checkpointer
        batches = self.batches_at(0 if kept is None or kept.own is None else kept.own.batches)
        self._is_new = self.number not in site.swarms
        if self._is_new:
            site.swarms[self.number] = self._swarm_of(published, specs, batches.num_shards)
        self.swarm = site.swarms[self.number]
        self.exchange = GossipExchange(
            context.network,
            self.swarm,
            run,
            context.stop,
            self.pause,
            on_first_round=site.on_first_round,
            on_arriving=site.on_arriving,
            sure_share=_SURE_SHARE,
        )
        self.manager = CheckpointManager(
            context.folder,
            checkpointer,
            self.swarm,
            context.emit,
            stage=self.number,
            extras=dict(self.exchange.kept()),
        )
        limits = LedgerLimits(batch_tokens=run.tokens_per_step)
        # The incarnation: acknowledgements name it, so that a peer that came back empty does not take one for its
        # earlier self (decision 26).
        incarnation = time.time_ns() % 2**62
        transfer = None if compute.is_host else StageTransfer(compute.device)
        computes = StageWork if transfer is None else DeviceStageWork
        self.trainer = StageTrainer(
            run,
            computes(model, site.graph_bytes, compute.autocast),
            batches,
            StageRequestQueue(StageLedger(limits, incarnation), time.monotonic, transfer),
            context.slowed_work(compute, lambda: self.pause.held),
            self.over,
        )
        self.session = Session(
            run=run,
            parameters=self.trainer.parameters,
            loop=self.trainer,
            exchange=self.exchange,
            report=self._report,
            should_stop=self._should_stop,
            on_new_state=self._keep_round,
            ends=self.trainer.ends_after(math.inf if self.number else run.run.total_tokens),
        )

    def _swarm_of(self, published: PublishedRun, specs: tuple[TensorSpec, ...], num_shards: int) -> Swarm:
        """Make the stage's swarm, without entering it."""
        site, context, number = self.site, self.site.context, self.number
        me = PeerInfo(
            peer=context.me,
            name=context.name,
            training=True,
            corpus_sha256=self.corpus_sha256,
        )
        shards = shards_of(published.run, published.sha256, self.corpus_sha256, num_shards) if num_shards else None
        return Swarm(
            context.node,
            published,
            specs,
            average_bytes_untrusted,
            emit_of_stage(context.emit),
            me,
            shards=shards,
            durable=lambda: site.checkpointers[number].durable,
        )

    @property
    def queue(self) -> StageRequestQueue:
        """Queue at which drivers' questions to this stage arrive."""
        return self.trainer.queue

    # ------------------------------------------------------------- its life

    def enter(self, through: tuple[InvitedPeer, ...]) -> None:
        """Resume a checkpoint if there is one, take the stage's present weights, and announce this peer.

        Raises RunTimeError when others have trained the stage and nobody delivers its weights.
        """
        context, swarm, session, manager = self.site.context, self.swarm, self.session, self.manager
        replica, num_parameters = session.replica, self.shape.num_parameters
        kept, self._kept = self._kept, None  # frees 16 bytes a parameter
        manager.checkpointer.prepare(num_parameters)
        if kept is not None and kept.own is not None:
            own = dataclasses.replace(kept.own, batches=self.trainer.batches.position)  # further, if held before
            session.resume(kept.state, kept.progress, own)
            self.resumed_round = kept.progress.round
            self.exchange.restore(kept.extra)
            context.wait(manager.restore(kept))
        serving = self.exchange.serving()
        entering = swarm.start(through, serving) if self._is_new else swarm.come_back(serving)
        context.wait(entering)
        new = self.exchange.present_state(replica.progress)
        if new is not None:
            session.adopt(new)
            self.state_from = new.from_peer
        replica.count_on(swarm.accounting.contributions().get(context.me, 0))
        self.exchange.offer(replica.state, replica.progress)
        context.wait(swarm.announce())

    def begin(self) -> None:
        """Start training on a thread, until the run ends or `end` is called."""
        threading.Thread(target=self._train, name=f"stage {self.number}", daemon=True).start()

    def _train(self) -> None:
        try:
            with enough_memory(f"training stage {self.number}", self.site.compute.device):
                reason = self.trainer.train(self.session)
            self.training.set_result(reason)
        except StopTraining:
            self.training.set_result("interrupted")
        except BaseException as error:  # raised again in whoever waits for the result
            _log.info("stage %d ends: %r", self.number, error)
            self.training.set_exception(error)

    def stop_soon(self) -> None:
        """Let training end after the piece of work under way; `end` waits for it."""
        self.pause.hold(_LEAVING, "this peer leaves the stage")

    def end_round(self) -> None:
        """Finish the round under way and flush its checkpoint, within some seconds. The stage is still served
        afterwards."""
        self.stop_soon()
        with contextlib.suppress(TimeoutError):
            self.training.exception(_LAST_ROUND_S)  # an error that ended it is raised by `end`
        self.manager.checkpointer.flush(_LAST_FLUSH_S)

    def end(self) -> None:
        """Finish the piece of work, say goodbye to the stage's other peers, and keep the last round.

        Afterwards raises the error that ended the training, if there was one.
        """
        self.stop_soon()
        try:
            self.training.result(_END_S)
        except TimeoutError:
            _log.warning("stage %d has not ended after %g s", self.number, _END_S)
        finally:
            self.pause.release(_LEAVING)
            try:
                self.site.context.network.run(self.swarm.withdraw(_GOODBYE_S), _END_S)
            finally:
                self.manager.close()
                self._release()

    def _release(self) -> None:
        """Give back the memory that training took, unless it still trains or ended with an error: the stages that this
        peer takes next may need it."""
        if self.training.done() and self.training.exception() is None:
            self.session.end()
            self.trainer.loop.work.release()
            release_cached(self.site.compute.device)

    @property
    def is_done(self) -> bool:
        """True if the run has had its tokens here. Raises the error that ended the training, if there was one."""
        return self.training.done() and self.training.result() == "total_tokens"

    def passed_since_last(self) -> int:
        """Return the tokens of microbatches computed completely here since the last call."""
        passed = self.trainer.loop.meter.passed_tokens - self._told_tokens
        self._told_tokens += passed
        return passed

    def tell_done(self) -> None:
        """Announce that the run's tokens have passed through this stage, whatever entered its steps."""
        progress, total = self.session.progress, self.site.context.published.run.run.total_tokens

        async def tell() -> None:
            self.swarm.presence.describe(round=progress.round, steps_per_s=self.session.steps_per_s, run_tokens=total)
            self.swarm.presence.change(is_finished=True)
            await self.swarm.greeter.greet_everyone()

        self.site.context.wait(tell())

    # ------------------------------------------------------------- the session's calls

    def _should_stop(self) -> bool:
        self.site.context.limits.between_steps()
        return self.site.context.stop.is_set() or self.pause.held

    def _keep_round(self, session: Session) -> None:
        self.exchange.offer(session.replica.state, session.progress)
        self.manager.keep_round(session)

    def _report(self, report: RoundReport) -> None:
        self.site.context.emit(round_event(report, self.exchange, self.number))


_PATIENCE_S = 600.0
"""Seconds without progress before a stage counts as stuck: it may well wait for others, through no fault of this
peer.
"""


class StageReplicas:
    """Stages of a volunteer. The main thread changes them; any thread may read."""

    def __init__(self, me: str, costs: Sequence[float]) -> None:
        """`costs` are the stages' shares of the model's computing."""
        self._me, self._costs = me, costs
        self._held: dict[int, StageReplica] = {}
        self.queues: dict[int, StageRequestQueue] = {}
        """Request queue of each stage, by stage."""
        self._own_tokens: dict[int, int] = {}
        self._left_at_tokens = 0
        self._left_at_round = 0

    def add(self, held: StageReplica) -> None:
        """Add a stage that is held from now on."""
        self._held[held.number], self.queues[held.number] = held, held.queue

    def drop(self, number: int) -> StageReplica:
        """Remove a stage; what was trained of it still counts. Returns it."""
        self._left_at_round = max(self._left_at_round, self.round)
        del self.queues[number]
        held = self._held.pop(number)
        self._own_tokens[number] = held.session.replica.own_tokens
        self._left_at_tokens = max(self._left_at_tokens, held.session.progress.run_tokens)
        return held

    @property
    def all(self) -> list[StageReplica]:
        """All held stages, the longest held first."""
        return list(self._held.values())

    @property
    def numbers(self) -> tuple[int, ...]:
        """Numbers of the held stages, ascending."""
        return tuple(sorted(self._held))

    # ------------------------------------------------------------- how far they are

    @property
    def are_done(self) -> bool:
        """True if the run has had its tokens in all held stages.

        Asks each stage, also those behind one that still trains, so that an error that ended a stage's training is
        raised.
        """
        return min((held.is_done for held in self.all), default=True)

    @property
    def have_had_tokens(self) -> bool:
        """True if this peer reports its part as done.

        A driver is done when its first stage has had the tokens: its other stages wait for all drivers to say so.
        """
        first = self._held.get(0)
        return first.is_done if first is not None else bool(self._held) and self.are_done

    @property
    def any_has_ended(self) -> bool:
        """True if the training of any stage has ended."""
        return any(held.training.done() for held in self.all)

    @property
    def round(self) -> int:
        """Round of the stage furthest on; of the stages left if none is held."""
        return max((held.session.progress.round for held in self.all), default=self._left_at_round)

    @property
    def run_tokens(self) -> int:
        """Run's tokens as the held stages count them."""
        return max((held.session.progress.run_tokens for held in self.all), default=0)

    @property
    def most_run_tokens(self) -> int:
        """Run's tokens as the held stages and those left counted them."""
        return max(self.run_tokens, self._left_at_tokens)

    @property
    def contribution(self) -> int:
        """Tokens that this peer has trained, those of a stage weighted by its share of the model."""
        held = {each.number: each.session.replica.own_tokens for each in self.all}
        return int(sum(self._costs[stage] * number for stage, number in (self._own_tokens | held).items()))

    @property
    def steps_per_s(self) -> float:
        """Inner steps per second, those of a stage weighted by its share of the model."""
        return sum(self._costs[held.number] * held.session.steps_per_s for held in self.all)

    def durable(self) -> Progress:
        """Return the progress that this peer's progress record advertises."""
        return Progress(round=self.round, run_tokens=0, peer_tokens={self._me: self.contribution})

    # ------------------------------------------------------------- checkpoints, for who asks

    def show(self, status: pb.PeerStatus) -> None:
        """See `CheckpointManager.show`, for the stage held longest."""
        for held in self.all[:1]:
            held.manager.show(status)

    def flushed(self) -> pb.CheckpointReply:
        """See `CheckpointManager.flushed`, for the stage held longest."""
        for held in self.all[:1]:
            return held.manager.flushed()
        raise RunTimeError(
            "this peer has nothing to write yet, since it is still starting; try again in a minute",
            code="no-checkpoint",
        )


def stages_pulse(swarm: Swarm, stages: StageReplicas) -> Callable[[], Pulse]:
    """Return a function that describes what a pipeline volunteer is doing, stage by stage."""
    traffic = swarm.node.traffic

    def pulse() -> Pulse:
        held = stages.all
        about = [
            f"stage {each.number}, round {each.session.progress.round}: {each.swarm.rounds.inner_steps_done} of "
            f"{each.exchange.round_steps} steps"
            for each in held
        ]
        first = held[0] if held else None
        return Pulse(
            state=pb.PEER_STATE_TRAINING if held else pb.PEER_STATE_STARTING,
            doing=f"training {'; '.join(about)}" if about else "looking for a stage to hold",
            round=0 if first is None else first.session.progress.round,
            inner_steps_done=0 if first is None else first.swarm.rounds.inner_steps_done,
            inner_steps=0 if first is None else first.exchange.round_steps,
            num_steps=sum(each.exchange.num_steps for each in held),
            sent_bytes=traffic.sent_bytes,
            received_bytes=traffic.received_bytes,
            patience_s=_PATIENCE_S,
        )

    return pulse

"""Training of a whole model by a volunteer: its preparation and each phase of its life (see `volunteer.Training`).

All methods run on the main thread, which is also the trainer's thread. They reach the network only by submitting
coroutines to the network thread (`context.wait`).
"""

from __future__ import annotations

import logging
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor

from swarmtrain.algorithm.outer import flatten
from swarmtrain.data.mixture import PeerPlace
from swarmtrain.data.prefetch import PrefetchedBatches, prefetched
from swarmtrain.data.prepare import TrainingData, training_batches, training_data
from swarmtrain.errors import ClockError, RunTimeError
from swarmtrain.events import DoneEvent, JoinedEvent, StartedEvent, WarningEvent
from swarmtrain.model.evaluation import TextLoss
from swarmtrain.model.parameter_count import num_parameters, num_trained_parameters
from swarmtrain.model.run_model import build_run_model, check_positions
from swarmtrain.network.codec import average_of, tensor_specs
from swarmtrain.network.coverage import shards_of
from swarmtrain.network.swarm import Swarm
from swarmtrain.peer.checkpoints.checkpoint import Checkpoint
from swarmtrain.peer.checkpoints.manager import CheckpointManager, PeersFile, checkpointer_of
from swarmtrain.peer.checkpoints.writer import Checkpointer
from swarmtrain.peer.control.arrival import DownloadProgress
from swarmtrain.peer.control.session import volunteer_pulse
from swarmtrain.peer.devices.choice import choose_compute
from swarmtrain.peer.devices.compiled_loss import CompiledLoss
from swarmtrain.peer.devices.report import ComputeReport
from swarmtrain.peer.estimate import estimates_of
from swarmtrain.peer.lifecycle.context import VolunteerContext
from swarmtrain.peer.lifecycle.departure import hand_over
from swarmtrain.peer.lifecycle.node import (
    eval_event,
    had_ended,
    held_out_loss,
    held_out_loss_of,
    kept_final_model,
    leave_swarm,
    save_final_weights,
    show_invite,
    weights_in,
)
from swarmtrain.peer.lifecycle.preparation import data_base, initial_seed
from swarmtrain.peer.lifecycle.process import keeping_freed_memory, process_age_s
from swarmtrain.peer.lifecycle.stop import Interrupted
from swarmtrain.peer.merging.roster_exchange import SwarmExchange, exchange_of
from swarmtrain.peer.merging.updates import Replaced
from swarmtrain.peer.training.loop import ModelLoop, loop_class
from swarmtrain.peer.training.parameters import ParameterSource
from swarmtrain.peer.training.round_report import round_event, tell_loss
from swarmtrain.peer.training.session import RoundReport, Session
from swarmtrain.peer.training.speed import most_steps_per_s, too_slow_in_words
from swarmtrain.protocol.adapter_groups import trained_groups
from swarmtrain.protocol.archive.load import is_measurement_due
from swarmtrain.protocol.membership.membership import PeerInfo
from swarmtrain.run import RunFile
from swarmtrain.words import counted

_log = logging.getLogger(__name__)
_LINGER_S = 60.0
_LAST_READERS_S = 900.0
"""Seconds that this peer serves on at the end while somebody still pulls its last weights, perhaps over a slow link."""
_LAST_FLUSH_S = 1.0
_FIND_AGAIN_S = 5.0
_ALONE_AFTER_S = 15.0
_POLL_INTERVAL_S = 0.5


def prepare_model(context: VolunteerContext) -> ModelTraining:
    """Prepare what needs no other peer: read the text, build the model, load the newest checkpoint.

    Raises the context's `nobody` error if no other peer answered and there is no checkpoint to continue alone from.
    """
    run, published = context.run, context.published
    settings = context.settings
    check_positions(run.model)
    limits = (settings.limits.memory_bytes, settings.vram_bytes)
    chosen = choose_compute(run, settings.device, settings.precision, *limits, settings.base_bits)
    compute, told = chosen.compute, ComputeReport(run, chosen, context.emit)
    told.start()
    base = data_base(run, context.settings.data_folder)
    data = training_data(run, base, published.held_out, published.tokenizer, context.settings.cache_folder)
    if data.num_left_out:
        without = f"{counted(data.num_left_out, 'sample')} of the data without anything to learn"
        message = f"{without} (a conversation without a turn of the assistant, for example); they are left out"
        context.emit(WarningEvent(message=message, code="samples-left-out"))
    context.stop.check()
    model = compute.placed(build_run_model(run, context.model_folder, initial_seed(run, context.me)))
    checkpointer = checkpointer_of(context.folder, published, context.me, context.emit)
    kept = checkpointer.load(run, num_trained_parameters(run))
    if kept is not None and kept.own is None:
        kept = None  # it is a bootstrap's, which has not trained
    if context.nobody is not None and kept is None:
        raise context.nobody  # nothing to continue from alone
    position = 0 if kept is None or kept.own is None else kept.own.batches
    place = PeerPlace(run_sha256=published.sha256, peer_id=context.me, position=position)
    drawn = training_batches(run, data, place)
    batches = prefetched(drawn, compute.device, context.stop.check)
    loop = loop_class(compute)(run, model, batches, context.slowed(compute.is_host), compute, told.smaller)
    loop.rests = context.rests(compute)
    context.limits.trains_on([str(device) for device in (compute.device, *compute.others)])
    context.stop.check()
    training = ModelTraining(context, data, loop, checkpointer)
    if not compute.shards and compute.base_bits == 32:  # else its loss cannot be replaced
        training.compiled = CompiledLoss(loop, settings.cache_folder, told.compiled)
    training.resume(kept)
    return training


def merge_thread(
    exchange: SwarmExchange, parameters: ParameterSource, delay_steps: int = 0
) -> ThreadPoolExecutor | None:
    """Return the thread that computes merges beside the training; None if the trainer waits for them.

    On a processor the merge would take from the steps what they gain; in synchronous rounds the peers wait for company,
    and go on meanwhile only if `delay_steps` (`merge.delay_steps`) is not 0.
    """
    is_beside = exchange.merges_beside_training and parameters.loans_outlast_steps
    return ThreadPoolExecutor(1, "merges") if is_beside or delay_steps else None


def trained_part(run: RunFile, rank: int) -> int:
    """Return how many of an adapter's groups a volunteer trains in each round that trains components worth `rank`; 0 if
    it trains all that the run does. Raises UserError if that is not possible."""
    groups = run.adapter.groups_worth(rank)
    return groups if groups < run.adapter.num_groups else 0


class ModelTraining:
    """Whole model trained by a volunteer on its own text."""

    def __init__(
        self, context: VolunteerContext, data: TrainingData, loop: ModelLoop, checkpointer: Checkpointer
    ) -> None:
        self.context, self.data, self.loop = context, data, loop
        run, published, emit, num_shards = context.run, context.published, context.emit, loop.batches.num_shards
        groups = trained_part(run, context.settings.adapter_rank)
        me = PeerInfo(
            peer=context.me,
            name=context.name,
            training=True,
            device=context.control.board.device_in_short,
            corpus_sha256=data.digest,
            adapter_groups=groups,
        )
        swarm = self.swarm = Swarm(
            context.node,
            published,
            tensor_specs(loop.parameters.named.items()),
            average_of(run),
            emit,
            me,
            num_served=context.settings.num_served_by(context.name),
            shards=shards_of(run, published.sha256, me.corpus_sha256, num_shards) if num_shards else None,
            durable=lambda: checkpointer.durable,
        )
        exchange = self.exchange = exchange_of(run.merge.kind)(
            context.network,
            swarm,
            run,
            context.stop,
            context.pause,
            on_first_round=self._tell_started,
            on_arriving=DownloadProgress(context.control.board, emit).look,
        )
        self.manager = CheckpointManager(
            context.folder,
            checkpointer,
            swarm,
            emit,
            peers=PeersFile(context.folder, swarm),
            extras=dict(exchange.kept()),
        )
        self._merges = merge_thread(exchange, loop.parameters, run.merge.delay_steps)
        self.session = Session(
            run=run,
            parameters=loop.parameters,
            loop=loop,
            exchange=exchange,
            report=self._report,
            should_stop=self._should_stop,
            on_new_state=self._keep_round,
            worker=None if self._merges is None else self._merges.submit,
        )
        if groups:
            self.session.groups_of_round = partial(
                trained_groups, context.me, num_groups=run.adapter.num_groups, num_trained=groups
            )
        if not loop.parameters.loans_outlast_steps:  # a device copies its moments into memory of its own choice
            checkpointer.prepare(self.session.replica.state.size)
        self.compiled: CompiledLoss | None = None
        """The loop's compiled loss, if there may be one."""
        self.resumed_round: int | None = None
        """Round that the loaded checkpoint belongs to; None for a new peer."""
        self.has_joined = False
        self._measured = (0, time.monotonic(), 0.0)
        """Run's tokens at the last held-out measurement, when it ended, and how long it took."""
        self._had_ended = False
        """True if the run already had all its tokens when this peer last ran."""
        self._took_state = False
        """True if this peer has taken a state from others since it was started."""

    @property
    def round(self) -> int:
        """Round that the peer takes part in next. See `Training`."""
        return self.session.progress.round

    def resume(self, kept: Checkpoint | None) -> None:
        """Continue from the checkpoint, if there is one. Others can pull its state as soon as this peer answers."""
        if kept is not None:
            assert kept.own is not None
            self.session.resume(kept.state, kept.progress, kept.own)
            self.resumed_round, self._had_ended = kept.progress.round, self.session.finished
            self.context.wait(self.manager.restore(kept))
        self.exchange.restore({} if kept is None else kept.extra)

    # ------------------------------------------------------------- joining

    def enter(self) -> None:
        """Enter the swarm: answer other peers and learn which ones are present; announce nothing of this peer yet. See
        `Training`."""
        context, swarm = self.context, self.swarm
        if self.loop.ranks is not None:  # they begin beside what follows
            self.loop.ranks.on_lost = context.stop.fail
            self.loop.ranks.start()
        context.control.starting("looking for other peers")
        context.wait(swarm.start(context.fetcher.through, self.exchange.serving()))
        context.wait(swarm.watch_daemon(context.stop.fail))
        if context.nobody is not None:
            self._look_for_others()
        control, run, loop = context.control, context.run, self.loop
        estimates = estimates_of(
            run,
            num_trained_parameters(run),
            microbatch_sequences=loop.microbatch_sequences,
            recomputes=loop.compute.recomputes,
            num_ranks=loop.compute.num_host_ranks,
        )
        pulse = volunteer_pulse(control.board, self.exchange, lambda: self.session.learnt_share)
        control.watch(swarm, context.network, pulse, self.manager, estimates)

    def _look_for_others(self) -> None:
        """Search for others for `_ALONE_AFTER_S`, then go on alone. They may just be restarting too, and this peer
        answers already.
        """
        context, give_up_s = self.context, time.monotonic() + _ALONE_AFTER_S
        while time.monotonic() < give_up_s:
            try:
                context.fetcher.find(_FIND_AGAIN_S)
                context.wait(self.swarm.come_back())
            except ClockError:
                raise
            except RunTimeError as error:
                _log.debug("no other peer yet: %s", error)
            if self.swarm.membership.live():
                return
            context.stop.sleep(_POLL_INTERVAL_S)
        if self._had_ended:
            # Nothing to continue alone; `finish` decides what becomes of the model.
            return
        message = (
            "no other peer of this run answers: this peer trains on alone from its folder's checkpoint, and keeps "
            "calling the others"
        )
        context.emit(WarningEvent(message=message, code="going-on-alone"))

    def join(self) -> None:
        """Take the swarm's present weights, if they are preferred to this peer's, and announce this peer. See
        `Training`."""
        context, swarm, replica = self.context, self.swarm, self.session.replica
        context.control.starting("fetching the swarm's current weights")
        new = self._take_present()
        if swarm.asynchronous:
            replica.count_on(swarm.accounting.contributions().get(context.me, 0))
        self.exchange.offer(replica.state, replica.progress)
        context.wait(swarm.announce())
        self.has_joined = True
        context.emit(
            JoinedEvent(
                round=replica.progress.round,
                run_tokens=replica.progress.run_tokens,
                # Those that answer, since records of peers that have just left are still there.
                num_peers=len(swarm.membership.answering()) + 1,
                state_from="" if new is None else new.from_peer,
                resumed_round=self.resumed_round,
                wall_s=process_age_s(),
            )
        )
        context.control.joined(context.fetcher.invite.peers)
        show_invite(swarm, context.folder, context.emit)
        self._expect_speed()

    def _expect_speed(self) -> None:
        """Guess this machine's speed before its first round, and warn if no round of it could be merged."""
        context, run = self.context, self.context.run
        if self.session.steps_per_s > 0:
            return
        most = most_steps_per_s(run, self.loop.compute) / context.settings.limits.slowdown
        self.exchange.expected_steps_per_s = most
        others = [info.steps_per_s for info in self.swarm.membership.volunteers()]
        if message := too_slow_in_words(run, most, others):
            context.emit(WarningEvent(message=message, code="too-slow-for-run"))

    def _take_present(self) -> Replaced | None:
        """Adopt the swarm's state if it is preferred to this peer's; return it, or None if this peer keeps its own."""
        session, replica, me = self.session, self.session.replica, self.context.me
        new = self.exchange.present_state(replica.progress)
        if new is None:
            return None
        # A kill may have come after the others merged this peer's last tokens and before its checkpoint was on the
        # disk.
        if self.resumed_round is not None and not self.has_joined:
            merged = new.progress.peer_tokens.get(me, 0) - replica.progress.peer_tokens.get(me, 0)
            if session.skip_merged(merged):
                _log.info("the others have merged %d tokens of this peer that its checkpoint lacked", merged)
        session.adopt(new)
        self._took_state = True
        return new

    # ------------------------------------------------------------- training

    def train(self) -> bool:
        """Train until the run has its tokens (returns True) or this peer must pause (returns False). See `Training`."""
        with keeping_freed_memory() if self.loop.compute.is_host else nullcontext():
            has_tokens = self.loop.train(self.session) == "total_tokens"
        if not has_tokens or self.context.stop.failure is not None:
            self.context.stop.check()
        return has_tokens

    def _should_stop(self) -> bool:
        """Return whether training must end or pause. The trainer asks between two steps."""
        self.context.limits.between_steps(self.loop.compute.num_host_ranks)
        return self.context.stop.is_set() or self.context.pause.held

    def _tell_started(self, inner_steps: int) -> None:
        """Emit the `started` event when the first round begins."""
        run, asked = self.context.run, self.context.settings.compile
        if self.compiled is not None and self.session.groups_of_round is None:
            self.compiled.start(asked, num_parameters(run.model))
        elif self.compiled is not None:
            self.compiled.leave(asked, "each choice of an adapter's groups (--rank) would be compiled anew")
        self.context.emit(
            StartedEvent(
                inner_steps_per_round=inner_steps,
                num_parameters=num_trained_parameters(run),
                total_tokens=run.run.total_tokens,
                startup_s=process_age_s(),
            )
        )

    def _keep_round(self, session: Session) -> None:
        """Offer the new state to others and hand it to the checkpoint writer. Called after each round."""
        self.exchange.offer(session.replica.state, session.progress)
        self.manager.keep_round(session)

    def _report(self, report: RoundReport) -> None:
        """Emit the round's event, and measure the held-out loss every `evaluation.every_rounds` rounds, or while no
        bootstrap does."""
        context, contribution = self.context, report.contribution
        if self.compiled is not None:
            self.compiled.round_ended()
        context.emit(round_event(report, self.exchange))
        tell_loss(context.network, self.swarm, report.loss)
        every = context.run.evaluation.every_rounds
        if report.progress.round % every == 0 if every else self._measures_for_all(report.progress.run_tokens):
            contribution.take_back()
            theta, tokenizer, control = report.state.theta, self.data.tokenizer, context.control
            began_s = time.monotonic()
            with control.board.busy(f"measuring the held-out loss after round {contribution.round}"):
                loss = held_out_loss(self.loop.whole_model(), theta, context.published, tokenizer, control.check)
            context.emit(eval_event(contribution.round, loss))
            self._measured = (report.progress.run_tokens, now_s := time.monotonic(), now_s - began_s)

    def _measures_for_all(self, run_tokens: int) -> bool:
        """Return whether this peer measures now, in place of a bootstrap."""
        run, (tokens, at_s, took_s) = self.context.run, self._measured
        gained, every_s = (run_tokens - tokens) / run.run.total_tokens, run.network.archive_every_s
        size, since_s = num_trained_parameters(run), time.monotonic() - at_s
        is_due = is_measurement_due(gained, since_s, took_s, every_s, size)
        return is_due and self.swarm.membership.measurer() == self.context.me

    # ------------------------------------------------------------- a pause

    def withdraw(self) -> None:
        """Say goodbye to the others for the time of a pause, and let other programs have the memory that only steps
        need. See `Training`."""
        self.loop.release_cached()
        self.context.wait(self.swarm.withdraw())

    def come_back(self) -> None:
        """Rejoin after a pause, as `join` does. By then this peer knows which others are present. See `Training`."""
        self.context.control.starting("resuming after a pause: fetching the swarm's current weights")
        replica = self.session.replica
        if self._take_present() is not None:
            self.exchange.offer(replica.state, replica.progress)
        self.context.wait(self.swarm.announce())

    # ------------------------------------------------------------- the end

    def finish(self) -> DoneEvent:
        """See `Training`. Measure and save the model before serving on.

        The held-out loss is that of the run's final weights. If this peer's own weights differ, their loss is reported
        too.
        """
        context, swarm, give_up_s = self.context, self.swarm, time.monotonic() + _LINGER_S
        context.control.finishing("measuring and saving the model")
        loss = own_loss = None
        progress = self.session.progress
        try:
            self.session.end()  # frees 8 bytes a parameter, needed for others' weights
            own = self.session.replica.state.theta
            loss = self._measure(own)
            theta, is_kept = self._final_theta(own)
            if theta is not own:
                own_loss, loss = loss, self._measure(theta)
            context.emit(eval_event(progress.round - 1, loss, own_loss))
            if not is_kept:
                weights = weights_in(self.loop.model, theta)
                files = context.model_folder
                if warning := save_final_weights(context.folder, weights, context.published, progress, loss, files):
                    context.emit(warning)
            context.control.finishing("serving the last weights until others have them")
            while time.monotonic() < give_up_s or (
                swarm.store.num_readers and time.monotonic() < give_up_s + _LAST_READERS_S
            ):
                context.wait(swarm.greeter.greet_everyone())
                if not self.exchange.still_needed(progress):
                    break
                context.stop.sleep(0.3)
            context.wait(swarm.count_once_more())
        except (Interrupted, RunTimeError):
            pass  # whatever remained here is done, or is not wanted any more
        return self._done("total_tokens", loss, own_loss)

    def _final_theta(self, own: Tensor) -> tuple[Tensor, bool]:
        """Return the weights (P,) that the run ended with, given this peer's `own` (P,), and whether the folder already
        has them.

        If the run had ended when this peer last ran, the model in the folder is the one that everybody has; this peer's
        own weights alone are a different one.
        """
        context, theta = self.context, self.exchange.final_theta(own)
        if theta is not own or self._took_state:
            return theta, False
        kept = kept_final_model(context.folder, context.published, context.model_folder)
        if kept is not None:
            context.emit(had_ended(context.folder))
            theta = flatten(kept.trained_tensors())
            return own if torch.equal(theta, own) else theta, True
        # In synchronous rounds this peer's state is the run's, so the model is right.
        if self._had_ended and self.swarm.asynchronous:
            message = (
                "this run has ended, and no peer answers that has its final model: the one in "
                f"{context.folder.model_path} is made of this peer's own last weights"
            )
            context.emit(WarningEvent(message=message, code="no-final-model"))
        return own, False

    def _measure(self, theta: Tensor) -> TextLoss:
        """Load these weights into the model and measure its held-out loss."""
        weights_in(self.loop.model, theta)
        return held_out_loss_of(self.loop.model, self.context.published, self.data.tokenizer, self.context.stop.check)

    def hand_over(self) -> DoneEvent:
        """Continue to serve, if this peer ends before the run, until its work that no other peer has is archived;
        return the final event. See `Training`."""
        self.loop.close()
        if self.has_joined:
            self.manager.checkpointer.flush(_LAST_FLUSH_S)  # so that the reported state is the one on the disk
            hand_over(self.context.control, [self.swarm], self.context.network, self.context.folder.path)
        return self._done(self.context.stop.reason)

    def _done(self, reason: str, loss: TextLoss | None = None, own_loss: TextLoss | None = None) -> DoneEvent:
        replica = self.session.replica
        loss, own_loss = (each if each is not None and each.is_finite else None for each in (loss, own_loss))
        return DoneEvent(
            held_out_loss=None if loss is None else loss.nats_per_byte,
            own_loss=None if own_loss is None else own_loss.nats_per_byte,
            sources=() if loss is None else tuple(loss.by_source),
            source_losses=() if loss is None else loss.source_losses,
            tokens=replica.own_tokens,
            run_tokens=replica.progress.run_tokens,
            wall_s=process_age_s(),
            reason=reason,
        )

    def leave(self) -> None:
        """Say goodbye, end the network, and finish what is being written; within some seconds, whatever happens. See
        `Training`."""
        if self.compiled is not None:
            self.compiled.close()
        if isinstance(self.loop.batches, PrefetchedBatches):
            self.loop.batches.close()
        self.loop.close()
        leave_swarm(self.context.network, self.swarm, self.context.node)
        if self._merges is not None:
            self._merges.shutdown(wait=False, cancel_futures=True)
        self.manager.close()

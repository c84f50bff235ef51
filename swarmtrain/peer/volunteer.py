"""A volunteer: joins by an invite, trains, merges, and leaves cleanly.

The main thread trains; the network thread does everything else. The order of joining is chosen so that the state
taken from the swarm is fresh: dial, fetch the run, prepare text and model, and only then take the state.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from swarmtrain.data.prepare import PeerPlace, TrainingData, training_batches, training_data
from swarmtrain.errors import BadBytesError, ClockError, NewerRunError, PeerError, RunTimeError, VersionError
from swarmtrain.events import (
    DoneEvent,
    EvalEvent,
    FetchedEvent,
    JoinedEvent,
    PausedEvent,
    ResumedEvent,
    StartedEvent,
    WarningEvent,
    short_peer,
    stamped,
)
from swarmtrain.model.gpt import build_model, num_parameters
from swarmtrain.network.codec import average_bytes_untrusted, tensor_specs
from swarmtrain.network.coverage import shards_of
from swarmtrain.network.invite import Invite, InvitedPeer
from swarmtrain.network.node import NetworkThread, Node
from swarmtrain.network.service import PeerCalls
from swarmtrain.network.swarm import PublishedRun, Swarm, fetch_published, find_run
from swarmtrain.peer.arriving import Arrival
from swarmtrain.peer.checkpoint import Checkpoint
from swarmtrain.peer.checkpointer import Checkpointer
from swarmtrain.peer.common import (
    Emit,
    Interrupted,
    PeerSettings,
    StopFlag,
    as_peer,
    clock_warnings,
    held_out_loss,
    held_out_loss_of,
    leave_swarm,
    process_age_s,
    save_final_weights,
    show_invite,
    start_node,
    wait_for,
    weights_in,
)
from swarmtrain.peer.controlled import Controlled, controlled
from swarmtrain.peer.exchange import SwarmExchange, exchange_of
from swarmtrain.peer.folder import PeerFolder, peer_folder
from swarmtrain.peer.held_stage import SlowedWork
from swarmtrain.peer.keeping import Keeper, PeersFile, checkpointer_of, known_peers, run_to_resume
from swarmtrain.peer.leaving import hand_over
from swarmtrain.peer.limits import LimitKeeper, check_memory, kept_limits, options_of
from swarmtrain.peer.logs import log_event, logged, peer_log
from swarmtrain.peer.loop import ModelLoop
from swarmtrain.peer.merge_rules import mean_of
from swarmtrain.peer.pausing import ASKED, PauseSwitch
from swarmtrain.peer.pipeline import PipelineVolunteer
from swarmtrain.peer.preparing import data_base, initial_seed, summary_of
from swarmtrain.peer.reporting import round_event, tell_loss
from swarmtrain.peer.session import OwnPart, RoundReport, Session
from swarmtrain.peer.slowdown import SlowedSteps
from swarmtrain.protocol.lifecycle import PeerInfo
from swarmtrain.run import NetworkSection, RunFile, parse_published_untrusted
from swarmtrain.v1 import control_pb2 as pb

__all__ = ["run_volunteer"]

_log = logging.getLogger(__name__)
_LINGER_S = 60.0
_LAST_READERS_S = 900.0
"""Whoever is pulling this peer's last weights, over a slow link perhaps, is served on for so long."""
_LAST_FLUSH_S = 1.0
_FIND_S = 15.0
_FIND_AGAIN_S = 5.0
_ALONE_AFTER_S = 15.0
_LOOK_S = 0.5
_FETCH_ATTEMPTS = 3
_UNKNOWN_RUN = NetworkSection(min_pull_bytes_per_s=0, stall_limit_s=600)


def run_volunteer(invite: Invite, settings: PeerSettings, emit: Emit, stop: StopFlag) -> DoneEvent:
    """Join the run of `invite` and train until it ends or `stop` is set; returns how it went.

    Raises UserError and RunTimeError with one line for a person.
    """
    with (
        peer_folder(settings.directory) as folder,
        peer_log(folder.path, settings.log_descriptors),
        controlled("volunteer", folder, settings, logged(emit), stop) as control,
    ):
        folder.started.keep_command(settings.started)
        network = NetworkThread()
        stop.explained_by(network.log_tasks)
        volunteer = _Volunteer(invite, settings, folder, network, control)
        try:
            with kept_limits(volunteer.limits):
                return control.ended(log_event(volunteer.run()))
        except Interrupted:
            done = DoneEvent(held_out_loss=None, tokens=0, run_tokens=0, wall_s=process_age_s(), reason=stop.reason)
            return control.ended(log_event(volunteer.stamp(done)))
        finally:
            leave_swarm(network, volunteer.swarm, volunteer.node)
            if volunteer.keeper is not None:
                volunteer.keeper.close()


@dataclass(frozen=True)
class _Ready:
    """What is needed before the network is entered for good."""

    published: PublishedRun
    data: TrainingData
    loop: ModelLoop
    resumed_round: int | None
    """Where this peer was when it last ran."""


@dataclass
class _Volunteer:
    invite: Invite
    settings: PeerSettings
    folder: PeerFolder
    network: NetworkThread
    control: Controlled
    emit: Emit = field(init=False)
    stop: StopFlag = field(init=False)
    pause: PauseSwitch = field(default_factory=PauseSwitch)
    limits: LimitKeeper = field(init=False)
    node: Node | None = None
    swarm: Swarm | None = None
    keeper: Keeper | None = None
    nobody: RunTimeError | None = None
    """Nobody answered: what a peer that cannot go on alone says."""
    name: str = ""

    def __post_init__(self) -> None:
        self.emit, self.stop = self.control.emit, self.control.stop
        if self.folder.started.read().paused:
            self.pause.hold(ASKED, "you paused it before it was started again; `swarmtrain resume` lets it train")
        board = self.control.board
        self.limits = LimitKeeper(
            self.settings.limits,
            self.pause,
            lambda event: self.emit(event),
            expected=lambda: board.estimate_now(board.status()),
        )
        self.control.takes_orders(self.pause, self.folder.started.keep_pause, self._limit)
        board.add_looker(lambda status: status.limits.CopyFrom(self.limits.limits()))

    def run(self) -> DoneEvent:
        self.control.starting("starting the network")
        node = self.node = start_node(self.network, self.settings, self.folder, self.stop)
        self.name = self.settings.name or short_peer(node.identity.peer_id)
        self.emit = as_peer(self.emit, node.identity.peer_id, self.name)
        self.control.starting("looking for the swarm, and fetching the run")
        self.limits.limit_link(node.traffic, _UNKNOWN_RUN)
        through = self._through()
        published = self._fetch(node, through)
        mean_of(published.run.merge.robust)  # it is here, or that is said
        self.limits.limit_link(node.traffic, published.run.network)
        if published.run.pipeline.stages > 1:
            return self.stamp(self._live_in_pipeline(node, published, through))
        checkpointer = checkpointer_of(self.folder, published, node.identity.peer_id, self.emit)
        ready, kept = self._prepare(node, published, checkpointer)
        swarm = self.swarm = self._swarm(node, ready, checkpointer)
        answering = exchange_of(published.run.merge.kind)
        exchange = answering(
            self.network,
            swarm,
            published.run,
            self.stop,
            self.pause,
            on_first_round=lambda inner_steps: self._tell_started(inner_steps, published.run),
            on_arriving=Arrival(self.control.board, self.emit).look,
        )
        keeper = self.keeper = Keeper(
            self.folder,
            checkpointer,
            swarm,
            self.emit,
            peers=PeersFile(self.folder, swarm),
            extras=dict(exchange.kept()),
        )
        session = Session(
            run=published.run,
            parameters=ready.loop.parameters,
            loop=ready.loop,
            exchange=exchange,
            report=lambda report: self._report(report, exchange, ready),
            should_stop=self._should_stop,
            settled=lambda session: self._settle(exchange, session, keeper),
        )
        replica = session.replica
        keeper.checkpointer.prepare(replica.state.size)
        self.control.keeps_checkpoints(keeper.flushed, keeper.show)
        self._resume(swarm, session, kept, keeper)
        exchange.restore({} if kept is None else kept[0].extra)
        del kept  # 16 bytes a parameter
        self.control.starting("looking who is here")
        wait_for(self.network.submit(swarm.start(through, exchange.serving())), self.stop)
        wait_for(self.network.submit(swarm.watch_daemon(self.stop.fail)), self.stop)
        if self.nobody is not None:
            self._look_for_others(node, swarm, through)
        self.control.watch_volunteer(exchange)
        if self.pause.held:
            self._rest()
            wait_for(self.network.submit(swarm.come_back()), self.stop)
        self.control.starting("taking the swarm's present weights")
        self._join(swarm, exchange, session, ready)
        reason = self._train(swarm, exchange, session, ready.loop)
        if self.stop.failure is not None:
            raise RunTimeError(self.stop.failure)
        loss, own_loss = self._finish(exchange, session, ready) if reason == "total_tokens" else (None, None)
        done = DoneEvent(
            held_out_loss=loss,
            own_loss=own_loss,
            tokens=replica.own_tokens,
            run_tokens=replica.progress.run_tokens,
            wall_s=process_age_s(),
            reason=self.stop.reason if reason == "interrupted" else reason,
        )
        return self.stamp(done)

    def stamp(self, done: DoneEvent) -> DoneEvent:
        """`done` with this peer's PeerID and name, as far as they are known."""
        return stamped(done, 0.0, "" if self.node is None else self.node.identity.peer_id, self.name)

    def _limit(self, wanted: pb.Limits) -> str:
        """Change what `wanted` names, and remember it for the next start here."""
        told = self.limits.change(wanted)
        self.folder.started.keep_options(options_of(wanted))
        return told

    def _live_in_pipeline(self, node: Node, published: PublishedRun, through: tuple[InvitedPeer, ...]) -> DoneEvent:
        """The same where this peer holds stages of the model."""
        pipeline = PipelineVolunteer(
            published=published,
            settings=self.settings,
            folder=self.folder,
            network=self.network,
            node=node,
            control=self.control,
            emit=self.emit,
            pause=self.pause,
            between_steps=self.limits.between_steps,
            slowed=self._slowed_work,
            through=through,
            name=self.name,
        )
        try:
            return pipeline.live()
        finally:
            self.swarm = pipeline.swarm

    def _slowed_work(self) -> SlowedWork:
        """What each piece of a stage's work runs in: a factor of its own for each kind, which take different times."""
        kinds = {kind: self._slowed() for kind in ("forward", "backward", "tail", None)}
        return lambda kind: kinds[kind]()

    # ------------------------------------------------------------- joining

    def _through(self) -> tuple[InvitedPeer, ...]:
        """Whom to dial: those of the invite, and those known when this peer last ran in this folder."""
        return known_peers(list(self.invite.peers), self.folder.kept_peers())

    def _fetch(self, node: Node, through: tuple[InvitedPeer, ...]) -> PublishedRun:
        """Dial, correct the clock, and fetch the run by its hash.

        When nobody answers, the run that is kept here is good enough to go on from a checkpoint.
        """
        try:
            source = self._find(node, through, _FIND_S)
        except (ClockError, VersionError):
            raise  # somebody answers: alone it would be a run of its own
        except RunTimeError as error:
            published = run_to_resume(self.folder, self.invite, node.identity.peer_id)
            if published is None:
                raise
            _log.info("going on from this folder: %s", error)
            source, self.nobody = node.identity.peer_id, error
        else:
            published = self._fetch_from(PeerCalls(node, self.invite.run_sha256), source)
            self.folder.keep_run(published)
            if not self.folder.kept_peers():  # started again without the invite, it knocks where that led to
                with contextlib.suppress(OSError):
                    self.folder.keep_peers(through)
        self.emit(
            FetchedEvent(
                run_sha256=published.sha256,
                run_name=published.run.run.name,
                total_tokens=published.run.run.total_tokens,
                held_out_bytes=len(published.held_out),
                from_peer=source,
                summary=summary_of(published.run),
            )
        )
        return published

    def _find(self, node: Node, through: tuple[InvitedPeer, ...], limit_s: float) -> str:
        """Somebody who answers; the clock is right from then on. Raises RunTimeError when nobody does, ClockError when
        the clock would be corrected by much."""
        accept = self.settings.accept_clock
        finding = find_run(node, self.invite.run_sha256, through, limit_s, accept_clock=accept)
        found = wait_for(self.network.submit(finding), self.stop)
        for warning in clock_warnings(found):
            self.emit(warning)
        return found.peer

    def _fetch_from(self, calls: PeerCalls, source: str) -> PublishedRun:
        """The run from `source`, asked a few times: a stream may break without anybody's fault."""
        for attempts_left in reversed(range(_FETCH_ATTEMPTS)):
            fetching = fetch_published(calls, source, parse_published_untrusted, self.folder.kept_files())
            try:
                return wait_for(self.network.submit(fetching), self.stop)
            except NewerRunError as error:
                raise VersionError(str(error)) from None
            except PeerError as error:
                if not attempts_left or isinstance(error, BadBytesError):
                    raise RunTimeError(f"{source} did not deliver the run: {error}; ask for a new invite") from None
            self.stop.sleep(1.0)
        raise AssertionError("the last attempt returns or raises")

    def _prepare(
        self, node: Node, published: PublishedRun, checkpointer: Checkpointer
    ) -> tuple[_Ready, tuple[Checkpoint, OwnPart] | None]:
        """Text, model and checkpoint: what takes time and needs nobody else."""
        run = published.run
        check_memory(run, num_parameters(run.model), self.settings.limits.memory_bytes)
        base = data_base(run, self.settings.data_folder)
        data = training_data(run, base, published.held_out, published.tokenizer, self.settings.cache_folder)
        self.stop.check()
        model = build_model(run.model, initial_seed(run, node.identity.peer_id))
        kept = checkpointer.load(run, num_parameters(run.model))
        resumed = None if kept is None or kept.own is None else (kept, kept.own)  # a bootstrap's has not trained
        if self.nobody is not None and resumed is None:
            raise self.nobody  # there is nothing to go on with alone
        position = 0 if resumed is None else resumed[1].batches
        place = PeerPlace(run_sha256=published.sha256, peer_id=node.identity.peer_id, position=position)
        batches = training_batches(run, data, place, base, published.held_out)
        loop = ModelLoop(run, model, batches, self._slowed())
        self.stop.check()
        resumed_round = None if resumed is None else resumed[0].progress.round
        return _Ready(published, data, loop, resumed_round), resumed

    def _swarm(self, node: Node, ready: _Ready, checkpointer: Checkpointer) -> Swarm:
        """This peer's place in the swarm, not yet entered."""
        me = PeerInfo(
            peer=node.identity.peer_id,
            name=self.name,
            training=True,
            corpus_sha256=ready.data.corpus.digest,
        )
        published, num_shards = ready.published, ready.loop.batches.num_shards
        shards = shards_of(published.run, published.sha256, me.corpus_sha256, num_shards) if num_shards else None
        return Swarm(
            node,
            published,
            tensor_specs(ready.loop.parameters.named.items()),
            average_bytes_untrusted,
            self.emit,
            me,
            num_served=self.settings.num_served_by(self.name),
            shards=shards,
            durable=lambda: checkpointer.durable,
        )

    def _resume(
        self, swarm: Swarm, session: Session, resumed: tuple[Checkpoint, OwnPart] | None, keeper: Keeper
    ) -> None:
        """Go on from the checkpoint, if there is one; others can have its state as soon as this peer answers."""
        if resumed is not None:
            kept, own = resumed
            session.resume(kept.state, kept.progress, own)
            wait_for(self.network.submit(keeper.restore(kept)), self.stop)

    def _look_for_others(self, node: Node, swarm: Swarm, through: tuple[InvitedPeer, ...]) -> None:
        """Nobody answered: they may just be starting again too. This peer answers already; then it goes on alone."""
        give_up_s = time.monotonic() + _ALONE_AFTER_S
        while time.monotonic() < give_up_s:
            try:
                self._find(node, through, _FIND_AGAIN_S)
                wait_for(self.network.submit(swarm.come_back()), self.stop)
            except ClockError:
                raise
            except RunTimeError as error:
                _log.debug("still alone: %s", error)
            if swarm.membership.live():
                return
            self.stop.sleep(_LOOK_S)
        message = "nobody else of this run answers: going on alone from this folder's checkpoint, and knocking again"
        self.emit(WarningEvent(message=message))

    def _join(self, swarm: Swarm, exchange: SwarmExchange, session: Session, ready: _Ready) -> None:
        """Take the swarm's state if it holds against ours, and say that we are here."""
        state_from, replica = "", session.replica
        new = exchange.present_state(replica.progress)
        if new is not None:
            me = swarm.identity.peer_id
            merged = new.progress.peer_tokens.get(me, 0) - replica.progress.peer_tokens.get(me, 0)
            if ready.resumed_round is not None and session.skip_merged(merged):
                _log.info("the others have merged %d tokens of this peer's that it had forgotten", merged)
            session.adopt(new)
            state_from = new.from_peer
        if swarm.asynchronous:
            replica.count_on(swarm.tallying.contributions().get(swarm.identity.peer_id, 0))
        exchange.offer(replica.state, replica.progress)
        wait_for(self.network.submit(swarm.announce()), self.stop)
        self.emit(
            JoinedEvent(
                round=replica.progress.round,
                run_tokens=replica.progress.run_tokens,
                num_peers=len(swarm.membership.answering()) + 1,  # records of who has just gone are there still
                state_from=state_from,
                resumed_round=ready.resumed_round,
                wall_s=process_age_s(),
            )
        )
        show_invite(swarm, self.folder, self.emit)

    # ------------------------------------------------------------- training

    def _tell_started(self, inner_steps: int, run: RunFile) -> None:
        """Its first round begins."""
        self.emit(
            StartedEvent(
                inner_steps_per_round=inner_steps,
                num_parameters=num_parameters(run.model),
                total_tokens=run.run.total_tokens,
                startup_s=process_age_s(),
            )
        )

    def _train(self, swarm: Swarm, exchange: SwarmExchange, session: Session, loop: ModelLoop) -> str:
        """Train, with pauses, until the end; returns why it ended."""
        while True:
            reason = loop.train(session)
            if reason != "interrupted":
                return reason
            if self.stop.is_set():
                if self.keeper is not None:
                    self.keeper.checkpointer.flush(_LAST_FLUSH_S)  # what is told is what is on the disk
                hand_over(self.control, [swarm], self.network, self.folder.path)
                return reason
            try:
                wait_for(self.network.submit(swarm.withdraw()), self.stop)
                paused_s = self._rest()
                self._come_back(swarm, exchange, session)
            except Interrupted:
                return reason
            self.emit(ResumedEvent(round=session.progress.round, paused_s=paused_s))

    def _should_stop(self) -> bool:
        """Asked by the trainer between two steps."""
        self.limits.between_steps()
        return self.stop.is_set() or self.pause.held

    def _slowed(self) -> Callable[[], contextlib.AbstractContextManager[None]]:
        """What each inner step runs in: a wait after it, if this peer is slower than it could be."""
        factor = self.settings.limits.slowdown
        if factor == 1:
            return contextlib.nullcontext

        def too_busy() -> None:
            message = (
                f"this machine is too busy for --slowdown {factor:g}, this peer is slower than that; give every "
                "volunteer of the rehearsal a larger factor, or start fewer"
            )
            self.emit(WarningEvent(message=message))

        return SlowedSteps(factor, self.stop.sleep, lambda: self.pause.held, too_busy)

    def _rest(self) -> float:
        """Wait until the pause is over; how long that was, in seconds."""
        self.emit(PausedEvent(reason=self.pause.reason))
        return self.pause.wait_released(self.stop.sleep)

    def _come_back(self, swarm: Swarm, exchange: SwarmExchange, session: Session) -> None:
        """After a pause: take the swarm's present state, and say that we are here again."""
        self.control.starting("coming back after a pause: taking the swarm's present weights")
        wait_for(self.network.submit(swarm.come_back()), self.stop)
        replica = session.replica
        new = exchange.present_state(replica.progress)
        if new is not None:
            session.adopt(new)
            exchange.offer(replica.state, replica.progress)
        wait_for(self.network.submit(swarm.announce()), self.stop)

    def _settle(self, exchange: SwarmExchange, session: Session, keeper: Keeper) -> None:
        """After each round: offer the new state to others, and keep it."""
        exchange.offer(session.replica.state, session.progress)
        keeper.keep_round(session)

    def _report(self, report: RoundReport, exchange: SwarmExchange, ready: _Ready) -> None:
        """After each merge: tell, and measure the held-out loss if it is time."""
        self.emit(round_event(report, exchange))
        tell_loss(self.network, exchange.swarm, report.loss)
        contribution = report.contribution
        every = ready.published.run.evaluation.every_rounds
        if every and report.progress.round % every == 0:
            contribution.take_back()
            theta, tokenizer = report.state.theta, ready.data.tokenizer
            with self.control.board.busy(f"measuring the held-out loss after round {contribution.round}"):
                loss = held_out_loss(ready.loop.model, theta, ready.published, tokenizer, self.control.check)
            self.emit(EvalEvent(round=contribution.round, held_out_loss=loss))

    def _finish(self, exchange: SwarmExchange, session: Session, ready: _Ready) -> tuple[float | None, float | None]:
        """The run has its tokens: measure, save, and serve on for those who still need us.

        Returns the held-out loss of the run's weights and, if this peer has its own, of those.
        """
        give_up_s = time.monotonic() + _LINGER_S
        self.control.finishing("measuring and saving the model")
        loss = own_loss = None
        progress = session.progress
        try:
            session.end()  # 8 bytes a parameter, which others' weights need
            own = session.replica.state.theta
            loss = self._measure(own, ready)
            theta = exchange.final_theta(own)
            if theta is not own:
                own_loss, loss = loss, self._measure(theta, ready)
            self.emit(EvalEvent(round=progress.round - 1, held_out_loss=loss, own_loss=own_loss))
            weights = weights_in(ready.loop.model, theta)
            if warning := save_final_weights(self.folder, weights, ready.published, progress):
                self.emit(warning)
            self.control.finishing("serving on until others have them")
            while time.monotonic() < give_up_s or (
                exchange.swarm.store.num_readers and time.monotonic() < give_up_s + _LAST_READERS_S
            ):
                wait_for(self.network.submit(exchange.swarm.greeter.greet_everyone()), self.stop)
                if not exchange.still_needed(progress):
                    break
                self.stop.sleep(0.3)
            wait_for(self.network.submit(exchange.swarm.count_once_more()), self.stop)
        except (Interrupted, RunTimeError):
            pass  # what there was to do here is done, or was not wanted
        return loss, own_loss

    def _measure(self, theta: Tensor, ready: _Ready) -> float:
        """Of these weights, which are then the model's."""
        weights_in(ready.loop.model, theta)
        return held_out_loss_of(ready.loop.model, ready.published, ready.data.tokenizer, self.stop.check)

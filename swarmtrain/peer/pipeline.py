"""A volunteer of a run whose model is cut into stages: it is told what to hold, trains that, drives, and moves.

The main thread decides; each stage that is held trains in a thread of its own (`peer/held_stage.py`), and the network
thread drives microbatches while the first stage is held (`peer/driving.py`). The run's own swarm says who is here and
what each holds; each stage's swarm merges.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from swarmtrain.data.prepare import PeerPlace, TrainingData, training_batches, training_data
from swarmtrain.errors import RunTimeError
from swarmtrain.events import (
    AssignedEvent,
    DoneEvent,
    JoinedEvent,
    MovedEvent,
    PausedEvent,
    ResumedEvent,
    StageThroughputEvent,
    StartedEvent,
    WarningEvent,
)
from swarmtrain.model.stages import stage_shapes
from swarmtrain.network.codec import average_bytes_untrusted
from swarmtrain.network.daemon import swarm_time
from swarmtrain.network.finding import PublishedRun
from swarmtrain.network.invite import InvitedPeer
from swarmtrain.network.node import NetworkThread, Node
from swarmtrain.network.records import MAX_KEPT
from swarmtrain.network.stage_calls import StageClient, StageHost, stage_stream_name
from swarmtrain.network.swarm import Swarm
from swarmtrain.network.tasks import logged
from swarmtrain.peer.arriving import Arrival
from swarmtrain.peer.common import Emit, PeerSettings, process_age_s, show_invite, wait_for
from swarmtrain.peer.controlled import Controlled
from swarmtrain.peer.driving import Driving, TellRetries
from swarmtrain.peer.folder import PeerFolder
from swarmtrain.peer.held_stage import HeldStage, SlowedWork, StageSite
from swarmtrain.peer.keeping import PeersFile, kept_stages
from swarmtrain.peer.leaving import hand_over_stages
from swarmtrain.peer.microbatches import MicrobatchSource, NoBatches
from swarmtrain.peer.moving import Mover
from swarmtrain.peer.pausing import PauseSwitch
from swarmtrain.peer.preparing import data_base
from swarmtrain.peer.reporting import tell_loss
from swarmtrain.peer.stage_desk import StageDesk
from swarmtrain.peer.stage_service import StageServer, StageShapes, WireCalls
from swarmtrain.peer.stage_sizes import StageRoom, room_for_stages, whole_tokens_per_s
from swarmtrain.peer.stopping import Interrupted
from swarmtrain.protocol import moving
from swarmtrain.protocol.balance import Rule, StagePeer, first_stages
from swarmtrain.protocol.lifecycle import PeerInfo
from swarmtrain.protocol.progress import Progress
from swarmtrain.protocol.stages import FirstStageWatch, places_of, stage_costs
from swarmtrain.v1 import control_pb2 as control_pb
from swarmtrain.words import counted, stages_in_words

__all__ = ["PipelineVolunteer"]

_log = logging.getLogger(__name__)
_T = TypeVar("_T")
_LOOK_S = 0.2
_TELL_EVERY_S = 1.0
_THROUGHPUT_EVERY_S = 10.0
_KEEP_PEERS_EVERY_S = 10.0
_COMPANY_S = 1.0
"""Once enough are here, for so long nobody decides: by then all have seen each other."""
_LINGER_S = 60.0
_STOP_DRIVING_S = 15.0
_LAST_DRAIN_S = 0.5
_SWITCH_S = 0.0005
"""The threads that compute and the network's thread share one lock of Python's. Each message of a microbatch waits for
it, and with the usual 5 ms that adds up to more than its computing."""
_FIRST_MOVE_S = 20.0
"""How long fetching a stage is taken to last before it was done."""


@dataclass(kw_only=True)
class PipelineVolunteer:
    """One volunteer, from the moment in which it has the run."""

    published: PublishedRun
    settings: PeerSettings
    folder: PeerFolder
    network: NetworkThread
    node: Node
    control: Controlled
    emit: Emit
    pause: PauseSwitch
    between_steps: Callable[[], None]
    slowed: Callable[[], SlowedWork]
    through: tuple[InvitedPeer, ...]
    name: str
    swarm: Swarm = field(init=False)
    """The run's: who is here, and what each holds."""
    held: dict[int, HeldStage] = field(default_factory=dict)
    mover: Mover = field(init=False)
    end: FirstStageWatch = field(init=False)
    _desks: dict[int, StageDesk] = field(default_factory=dict)
    _moving_to: tuple[int, ...] = ()
    _move_s: float = _FIRST_MOVE_S
    _move_began_s: float = 0.0
    _driving: Driving | None = None
    _source: MicrobatchSource | None = None
    _whole_tokens_per_s: float = 0.0
    _kept_stages: Mapping[int, int] = field(default_factory=dict)
    """Of which there were checkpoints here when it last chose, each with its round."""
    _own_tokens: dict[int, int] = field(default_factory=dict)
    """Trained on here, by stage."""
    _left_at_tokens: int = 0
    """The most that a stage counted when it was left here."""
    _has_started: bool = False
    _next_tell_s: float = 0.0
    _next_throughput_s: float = 0.0
    _next_keep_s: float = 0.0
    _flow_told_s: float = 0.0
    _flow_tokens_per_s: float = 0.0

    def __post_init__(self) -> None:
        self.run, self.stop = self.published.run, self.control.stop
        published = self.run.published
        assert published is not None and published.boundaries is not None and published.stage_costs is not None
        self.rule = Rule(costs=stage_costs(published.stage_costs))
        self.end = FirstStageWatch(self.run.run.total_tokens)
        self.shapes = stage_shapes(self.run.model, published.boundaries)
        self.me = self.node.identity.peer_id
        self._first_stages = tuple(stage for stage in self.settings.first_stages if stage < len(self.shapes))
        info = PeerInfo(peer=self.me, name=self.name, training=True)
        self.swarm = Swarm(
            self.node, self.published, (), average_bytes_untrusted, self.emit, info, durable=self._durable
        )
        self.peers_file = PeersFile(self.folder, self.swarm)

    # ------------------------------------------------------------- life

    def live(self) -> DoneEvent:
        """Join, train until the run ends, and serve on as long as somebody needs it."""
        sys.setswitchinterval(_SWITCH_S)
        try:
            self._prepare()
            self._enter_run()
            self._choose()
            self._train()
            self._finish()
            return self._done("total_tokens")
        except Interrupted:
            driving, self._driving = self._driving, None
            hand_over_stages(self.control, self.network, driving, list(self.held.values()), self.folder.path)
            return self._done(self.stop.reason)
        finally:
            self._leave_everything()

    def _done(self, reason: str) -> DoneEvent:
        """How it ended, for this peer's part. What it told of the run last may be older than its last rounds."""
        counted = max(self._run_tokens(), self._left_at_tokens)
        return DoneEvent(
            held_out_loss=None,
            tokens=self._contribution(),
            run_tokens=max(self.swarm.presence.me.run_tokens, min(counted, self.run.run.total_tokens)),
            wall_s=process_age_s(),
            reason=reason,
        )

    def _prepare(self) -> None:
        """What takes time and needs nobody else: text, room in memory, speed."""
        run, limits = self.run, self.settings.limits
        self.control.starting("preparing the text, and measuring how fast this machine is")
        self._room: StageRoom = room_for_stages(run, self.shapes, limits.memory_bytes)
        base = data_base(run, self.settings.data_folder)
        self._base, held_out, tokenizer = base, self.published.held_out, self.published.tokenizer
        self._data: TrainingData = training_data(run, base, held_out, tokenizer, self.settings.cache_folder)
        self.between_steps()
        self._whole_tokens_per_s = whole_tokens_per_s(run) / limits.slowdown
        self.site = StageSite(
            published=self.published,
            network=self.network,
            node=self.node,
            folder=self.folder,
            emit=self.emit,
            stop=self.stop,
            name=self.name,
            between_steps=self.between_steps,
            slowed=self.slowed,
            graph_bytes=self._room.graph_bytes,
            on_first_round=self._tell_started,
            on_arriving=Arrival(self.control.board, self.emit).look,
        )

    def _enter_run(self) -> None:
        """Answer others' questions, learn who is here, and say that we are, without a stage yet."""
        swarm = self.swarm
        swarm.presence.change(place=self._place())
        client = StageClient(self.node, self.published.sha256, on_failure=swarm.peers.call_failed)
        wire = StageShapes(
            most_sequences=self.run.microbatch_sequences,
            context_tokens=self.run.model.context_tokens,
            width=self.run.model.width,
            vocabulary_size=self.run.model.vocabulary_size,
            activations=self.run.pipeline.activations,
        )
        self.calls = WireCalls(self.me, client, wire, self._desks)
        pipeline = self.run.pipeline
        balance, every_s, most_stages = pipeline.balance, pipeline.balance_every_s, self._room.most_stages
        policy = moving.MovePolicy(rule=self.rule, balance=balance, every_s=every_s, most_stages=most_stages)
        self.mover = Mover(self.me, policy)
        server = StageServer(wire, len(self.shapes), self._desks, swarm.peers.refused, self._asked_to_stay)
        host = StageHost(self.node.traffic, server)
        self.control.starting("looking who is here")
        self._wait(self.node.serve_pipes(stage_stream_name(self.published.sha256), host.serve))
        self._wait(swarm.start(self.through))
        self._wait(swarm.watch_daemon(self.stop.fail))
        self._wait(swarm.announce())
        self.control.keeps_checkpoints(self._flushed, self._show_checkpoint)
        self.control.watch_pipeline(swarm, lambda: list(self.held.values()))
        show_invite(swarm, self.folder, self.emit)

    def _wait(self, work: Coroutine[Any, Any, _T]) -> _T:
        return wait_for(self.network.submit(work), self.stop)

    # ------------------------------------------------------------- what to hold

    def _choose(self) -> None:
        """Take the stages that need this peer most, once there is company."""
        self._kept_stages = kept_stages(self.folder, self.published, self.me, len(self.shapes))
        self._tell(now=True)  # before the others choose, who must know it
        self._wait_for_company()
        stages, reason = first_stages(self.me, self.places(), swarm_time(), self.rule)
        if self._first_stages:
            stages, reason, self._first_stages = self._first_stages, "it was started so", ()
        self.emit(AssignedEvent(stages=stages, reason=reason))
        self._moving_to = stages
        self._tell(now=True)
        began_s = time.monotonic()
        for stage in stages:
            self._enter(stage)
        self._move_s = (time.monotonic() - began_s) / max(1, len(stages))
        self._moving_to = ()
        self._tell(now=True)
        self._tell_joined()

    def _wait_for_company(self) -> None:
        missing = self.run.merge.min_peers
        while missing > 0:
            others = self.swarm.membership.volunteers()
            begun = any(info.place is not None and info.place.stages for info in others)
            missing = 0 if begun else self.run.merge.min_peers - len(others) - 1
            if missing > 0:
                more = counted(missing, "more volunteer")
                self.control.starting(f"waiting for {more} before the first round")
                self.stop.sleep(_LOOK_S)
        self._wait(self.swarm.greeter.greet_everyone())
        self.stop.sleep(_COMPANY_S)
        self._wait(self.swarm.greeter.greet_everyone())

    def places(self) -> list[StagePeer]:
        """What everybody who is here holds, this peer included."""
        return [*places_of(self.swarm.membership.volunteers()), self._place()]

    def _place(self) -> StagePeer:
        """What this peer holds, for its record."""
        stages = tuple(sorted(self.held))
        return StagePeer(
            peer=self.me,
            stages=stages,
            moving_to=self._moving_to,
            bound=self.mover.bound if self.held else (),
            tokens_per_s=self._tokens_per_s(stages or self._moving_to),
            most_stages=self._room.most_stages,
            kept=() if self.held else tuple(self._kept_stages.items())[:MAX_KEPT],
            move_s=self._move_s,
            queue=float(sum(held.desk.num_waiting for held in self.held.values())),
            flow_tokens_per_s=self._flow_tokens_per_s,
            seen_s=swarm_time(),
        )

    def _tokens_per_s(self, stages: Sequence[int]) -> float:
        """Through these stages, if it were always fed: as measured where it was, else as its machine was."""
        if not stages:
            return self._whole_tokens_per_s
        measured = [held.trainer.loop.meter.tokens_per_s for stage, held in self.held.items() if stage in stages]
        rates = [rate for rate in measured if rate is not None]
        if len(rates) < len(stages):
            return self._whole_tokens_per_s / self.rule.cost(stages)
        rate = 1 / sum(1 / each for each in rates)
        self._whole_tokens_per_s = rate * self.rule.cost(stages)
        return rate

    def _enter(self, stage: int) -> None:
        """Fetch a stage and train it from now on; of the first one, drive too."""
        self.control.starting(f"taking stage {stage}: its present weights")
        held = HeldStage(
            self.site,
            stage,
            self.shapes[stage],
            self._batches_at if stage == 0 else lambda position: NoBatches(),
            lambda: self.end.is_over,
            corpus_sha256=self._data.corpus.digest if stage == 0 else "",
        )
        infos = [info for info in self.swarm.membership.live() if info.addresses]
        of_stage = [info for info in infos if info.is_bootstrap or (info.place and stage in info.place.planned)]
        held.enter(tuple(InvitedPeer(info.peer, info.addresses) for info in of_stage))
        held.begin()
        self.held[stage], self._desks[stage] = held, held.desk
        if stage == 0:
            self._wait(self._start_driving(held))

    def _batches_at(self, position: int) -> MicrobatchSource:
        if self._source is None:
            place = PeerPlace(run_sha256=self.published.sha256, peer_id=self.me, position=position)
            batches = training_batches(self.run, self._data, place, self._base, self.published.held_out)
            self._source = MicrobatchSource(batches, self.run.microbatch_sequences)
        return self._source

    async def _start_driving(self, held: HeldStage) -> None:
        assert self._source is not None
        self._driving = Driving(
            self.me,
            self.run,
            self._source,
            held.desk,
            self.calls,
            TellRetries(self.emit, self.swarm.peers.refused),
            self.peers_of_stages,
            self.stop.fail,
            self._places_told,
        )
        await self._driving.start()

    def peers_of_stages(self) -> Mapping[int, list[str]]:
        """Who holds each stage now. Asked in the network thread, while the main one enters and leaves stages."""
        peers: dict[int, list[str]] = {stage: [] for stage in range(len(self.shapes))}
        for stage, held in list(self.held.items()):
            if held.desk.is_open:
                peers[stage].append(self.me)
        for info in self.swarm.membership.volunteers():
            for stage in () if info.place is None else info.place.stages:
                peers.get(stage, []).append(info.peer)
        return peers

    def _places_told(self) -> list[StagePeer]:
        """As `places`, this peer's as it was told last. In the network thread."""
        others, mine = places_of(self.swarm.membership.volunteers()), self.swarm.presence.me.place
        return others if mine is None else [*others, mine]

    def _leave(self, stage: int) -> None:
        if stage == 0:
            self._stop_driving()
        self._desks.pop(stage, None)
        held = self.held.pop(stage)
        self._own_tokens[stage] = held.session.replica.own_tokens
        self._left_at_tokens = max(self._left_at_tokens, held.session.progress.run_tokens)
        held.end()

    def _stop_driving(self) -> None:
        driving, self._driving = self._driving, None
        if driving is not None:
            self._wait(driving.stop())

    # ------------------------------------------------------------- training

    def _train(self) -> None:
        """Until every stage held here has had the run's tokens."""
        while not self._all_done():
            self.stop.sleep(_LOOK_S)
            if self.pause.held:
                self._rest()
            self._look()
            if self.end.is_over:
                self._stop_driving()  # of a round that is not full, what there is counts
            elif not any(held.training.done() for held in self.held.values()):
                self._consider_moving()

    def _all_done(self) -> bool:
        """Asks each of them, also behind one that trains: what ended a stage's training is raised."""
        return min((held.is_done for held in self.held.values()), default=True)

    def _has_had_tokens(self) -> bool:
        """What it tells of its part: one that drives, that the first stage has; its others wait for all to say so."""
        return self.held[0].is_done if 0 in self.held else bool(self.held) and self._all_done()

    def _run_tokens(self) -> int:
        """The run's, as the stages here count them."""
        return max((held.session.progress.run_tokens for held in self.held.values()), default=0)

    def _look(self) -> None:
        now, membership = time.monotonic(), self.swarm.membership
        self.end.look([*membership.volunteers(), self.swarm.presence.me], membership.known(), self._run_tokens(), now)
        self._tell()
        if now >= self._next_throughput_s:
            self._tell_throughput(now)
            self._next_throughput_s = now + _THROUGHPUT_EVERY_S
        if now >= self._next_keep_s:
            self._next_keep_s = now + _KEEP_PEERS_EVERY_S
            with contextlib.suppress(OSError):  # checkpoints say it
                self.peers_file.keep()

    def _consider_moving(self) -> None:
        if self.mover.is_due:
            self.mover.look(moving.PlacesSeen(self.places(), swarm_time()), self._do)
            if not self.held:
                self._choose()

    def _do(self, command: moving.MoveCommand) -> moving.MoveEvent | None:
        """A part of a move, done when it returns."""
        match command:
            case moving.AskToStay():
                return moving.StayAnswered(
                    command.number, *self._wait(self.calls.ask_to_stay(command.peer, command.stage))
                )
            case moving.Moves():
                self._moving_to, self._move_began_s = command.change.after, time.monotonic()
                self._tell(now=True)
            case moving.FetchStages():
                try:
                    for stage in command.stages:
                        self._enter(stage)
                except RunTimeError as error:
                    if self.stop.failure is not None:
                        raise
                    self.emit(WarningEvent(message=f"{stages_in_words(command.stages)} could not be taken: {error}"))
                    return moving.FetchFailed(str(error))
                return moving.StagesFetched(self.places(), swarm_time())
            case moving.LeaveStages():
                for stage in command.stages:
                    self._leave(stage)
                self._tell(now=True)
                return moving.StagesLeft()
            case moving.Moved():
                change, self._moving_to = command.change, ()
                self._move_s = time.monotonic() - self._move_began_s
                self.control.training_stages(change.after)
                before, after = change.before, change.after
                self.emit(MovedEvent(before=before, after=after, reason=change.reason, seconds=self._move_s))
                self._tell(now=True)
            case moving.StaysHere():
                _log.info("stays: %s", command.reason)
                if command.had_begun:
                    self._moving_to = ()
                    self._tell(now=True)
        return None

    def _asked_to_stay(self, mover: str, stage: int) -> tuple[float, str]:
        """In the network thread."""
        info = self.swarm.membership.info(mover)
        is_known = info is not None and info.place is not None and stage in info.place.stages
        return self.mover.asked(mover, stage, tuple(self.held), is_known)

    def _rest(self) -> None:
        """Leave everything until the pause is over, and come back to where one is needed then."""
        self.emit(PausedEvent(reason=self.pause.reason))
        for stage in list(self.held):
            self._leave(stage)
        self._wait(self.swarm.withdraw())
        paused_s = self.pause.wait_released(self.stop.sleep)
        self.control.starting("coming back after a pause")
        self._wait(self.swarm.come_back())
        self._wait(self.swarm.announce())
        self._choose()
        rounds = [held.session.progress.round for held in self.held.values()]
        self.emit(ResumedEvent(round=max(rounds), paused_s=paused_s))

    # ------------------------------------------------------------- what it tells

    def _contribution(self) -> int:
        """Tokens that this peer has trained on, those of a stage by its part of the model."""
        held = {stage: each.session.replica.own_tokens for stage, each in list(self.held.items())}
        tokens = dict(self._own_tokens) | held
        return int(sum(self.rule.costs[stage] * number for stage, number in tokens.items()))

    def _durable(self) -> Progress:
        return Progress(round=self.swarm.presence.me.round, run_tokens=0, peer_tokens={self.me: self._contribution()})

    def _tell(self, now: bool = False) -> None:
        """What this peer's record says; at once to everybody if something has changed that they act on."""
        if not now and time.monotonic() < self._next_tell_s:
            return
        self._next_tell_s = time.monotonic() + _TELL_EVERY_S
        place, total = self._place(), self.run.run.total_tokens
        sessions = {stage: held.session for stage, held in self.held.items()}
        is_done = self._has_had_tokens()
        run_tokens = total if is_done else min(self._run_tokens(), total - 1)
        now = now or is_done != (self.swarm.presence.me.run_tokens >= total)
        steps_per_s = sum(self.rule.costs[stage] * session.steps_per_s for stage, session in sessions.items())
        round = max((session.progress.round for session in sessions.values()), default=self.swarm.presence.me.round)
        contribution = self._contribution()

        async def tell() -> None:
            swarm = self.swarm
            swarm.presence.change(place=place)
            swarm.presence.describe(round=round, steps_per_s=steps_per_s, run_tokens=run_tokens)
            swarm.tallying.learn({self.me: contribution})
            if now:
                logged(asyncio.create_task(swarm.greeter.greet_everyone()), "telling what this peer holds")

        self._wait(tell())

    def _tell_throughput(self, now: float) -> None:
        passed = [held.passed_since_last() for held in self.held.values()]
        if self._flow_told_s and passed:
            self._flow_tokens_per_s = sum(passed) / len(passed) / (now - self._flow_told_s)
            driving, place = self._driving, self._place()
            losses = [] if driving is None else [driving.losses.popleft() for _ in range(len(driving.losses))]
            loss = sum(losses) / len(losses) if losses else None
            tell_loss(self.network, self.swarm, loss or 0.0)
            self.emit(
                StageThroughputEvent(
                    stages=place.stages,
                    tokens_per_s=self._flow_tokens_per_s,
                    most_tokens_per_s=place.tokens_per_s,
                    waiting=int(place.queue),
                    in_flight=0 if driving is None else driving.num_in_flight,
                    loss=loss,
                )
            )
        self._flow_told_s = now

    def _tell_joined(self) -> None:
        held = list(self.held.values())
        self.emit(
            JoinedEvent(
                round=max(each.session.progress.round for each in held),
                run_tokens=max(each.session.progress.run_tokens for each in held),
                num_peers=len(self.swarm.membership.answering()) + 1,
                state_from=next((each.state_from for each in held if each.state_from), ""),
                resumed_round=next((each.resumed_round for each in held if each.resumed_round is not None), None),
                wall_s=process_age_s(),
            )
        )
        self.control.training_stages(tuple(self.held))

    def _tell_started(self, inner_steps: int) -> None:
        if self._has_started:
            return
        self._has_started = True
        self.emit(
            StartedEvent(
                inner_steps_per_round=inner_steps,
                num_parameters=sum(self.shapes[stage].num_parameters for stage in self.held or self._moving_to),
                total_tokens=self.run.run.total_tokens,
                startup_s=process_age_s(),
            )
        )

    def _show_checkpoint(self, status: control_pb.PeerStatus) -> None:
        for held in list(self.held.values())[:1]:
            held.keeper.show(status)

    def _flushed(self) -> control_pb.CheckpointReply:
        held = next(iter(self.held.values()), None)
        if held is None:
            raise RunTimeError("there is nothing to write yet: this peer is still starting, try again in a minute")
        return held.keeper.flushed()

    # ------------------------------------------------------------- the end

    def _finish(self) -> None:
        """The run has its tokens: serve on for those who still need this peer's weights."""
        give_up_s = time.monotonic() + _LINGER_S
        self.control.finishing("serving on until the archive has the last weights")
        self._stop_driving()
        self._tell(now=True)
        with contextlib.suppress(RunTimeError):
            for held in self.held.values():
                held.tell_done()
            while time.monotonic() < give_up_s:
                if not any(held.exchange.still_needed(held.session.progress) for held in self.held.values()):
                    break
                self._wait(self.swarm.greeter.greet_everyone())
                for held in self.held.values():
                    self._wait(held.swarm.greeter.greet_everyone())
                self.stop.sleep(0.3)

    def _leave_everything(self) -> None:
        """Goodbye to everyone; within a few seconds."""
        ends: list[Callable[[], object]] = [held.end for held in self.held.values()]
        if (driving := self._driving) is not None:
            ends.insert(0, lambda: self.network.run(driving.stop(_LAST_DRAIN_S), _STOP_DRIVING_S))
        for held in self.held.values():
            held.pause.hold("leaving", "this peer leaves")
        for end in ends:
            try:
                end()
            except Exception as error:  # whatever happens at the end, the other stages and the run's swarm are left
                _log.info("leaving the stages: %r", error)

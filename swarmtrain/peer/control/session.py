"""Control of a running peer: its status board, its control server, and the handlers through which the server acts on
it.

`control_session` surrounds a peer's life from the moment its folder is locked. The peer registers what it has (a swarm,
an exchange, a pause switch) as soon as it has it; a call that comes earlier is told that the peer is still starting.
"""

from __future__ import annotations

import asyncio
import heapq
import math
import statistics
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Protocol

from swarmtrain.errors import RunTimeError, SwarmtrainError, UserError, with_code
from swarmtrain.events import DoneEvent, FinishingEvent, WarningEvent
from swarmtrain.network.daemon import swarm_time
from swarmtrain.network.discovery.invite import InvitedPeer
from swarmtrain.network.history import ask_for_history, history_to_proto
from swarmtrain.network.node import NetworkThread
from swarmtrain.network.swarm import Swarm
from swarmtrain.peer.checkpoints.files import Written, newest_written
from swarmtrain.peer.control.board import Pulse, StatusBoard, Watched
from swarmtrain.peer.control.growth import Growth
from swarmtrain.peer.control.health import health
from swarmtrain.peer.control.history import read_history
from swarmtrain.peer.control.server import ControlHandlers, ControlServer, read_status
from swarmtrain.peer.estimate import Estimate
from swarmtrain.peer.lifecycle.folder import PeerFolder
from swarmtrain.peer.lifecycle.node import Emit, PeerSettings
from swarmtrain.peer.lifecycle.process import process_age_s
from swarmtrain.peer.lifecycle.stop import StopFlag, StopTraining
from swarmtrain.peer.merging.roster_exchange import SwarmExchange
from swarmtrain.peer.training.pause import ASKED, PauseSwitch
from swarmtrain.protocol.adapter_groups import trained_groups
from swarmtrain.protocol.membership.membership import PeerInfo
from swarmtrain.protocol.pipeline.moves import places_of
from swarmtrain.protocol.tokens.progress import Progress
from swarmtrain.run_adapter import AdapterSection
from swarmtrain.v1 import control_pb2 as pb
from swarmtrain.v1.snapshot_pb2 import HistoryReply
from swarmtrain.words import counted, stages_in_words

MAX_SHOWN_PEERS = 1024
_PATIENCE_S = 60.0
_FIRST_ROUND_PATIENCE_S = 600.0  # nobody knows yet how long an inner step takes on this machine
_STEPS_OF_PATIENCE = 4
_HISTORY_AGAIN_S = 60.0
_HISTORY_TIMES = 2
_COUNTS_LAG_S = 15.0
"""Greatest age of a bootstrap's counts, in seconds: progress records are written and read every few seconds."""


class Checkpoints(Protocol):
    """Checkpoints that a peer keeps, see `CheckpointManager`."""

    def flushed(self) -> pb.CheckpointReply:
        """Return the newest checkpoint once it is on the disk. Raises RunTimeError."""
        ...

    def show(self, status: pb.PeerStatus) -> None:
        """Fill in the newest checkpoint on the disk."""


@dataclass
class ControlSession:
    """Handle by which a peer reports to its own control what it does and what it can.

    The peer calls it from its threads; the handlers run in the control server's.
    """

    board: StatusBoard
    emit: Emit
    """Takes events, and notes them on the board."""
    stop: StopFlag
    reason: str = ""
    _pause: PauseSwitch | None = None
    _pause_asked: Callable[[bool], None] = lambda paused: None
    _limit: Callable[[pb.Limits], str] | None = None
    _checkpoints: Checkpoints | None = None
    _swarm: Swarm | None = None
    _submit: Callable[[Coroutine[Any, Any, None]], object] = lambda work: work.close()
    _history_asked_s: float = -math.inf
    _inviters: frozenset[str] = frozenset()

    def ended(self, done: DoneEvent) -> DoneEvent:
        """Record that the peer's work is over; what remains is to leave."""
        self.reason = done.reason
        self.board.take(done)
        self.board.doing(pb.PEER_STATE_FINISHING, "leaving: telling the other peers")
        return done

    # ------------------------------------------------------------- what it does

    def starting(self, what: str) -> None:
        """Report a phase on the way to the first round, or to serving."""
        self.board.doing(pb.PEER_STATE_STARTING, what)

    def finishing(self, what: str) -> None:
        """Report that the run is over and what is left to do."""
        self.board.doing(pb.PEER_STATE_FINISHING, f"the run is complete: {what}")
        self.emit(FinishingEvent(doing=what))

    def check(self) -> None:
        """Call `StopFlag.check` from within a long operation, and note that the operation makes progress."""
        self.board.beat()
        self.stop.check()

    def takes_orders(
        self, pause: PauseSwitch, pause_asked: Callable[[bool], None], limit: Callable[[pb.Limits], str]
    ) -> None:
        """Register the pause switch and the function that changes limits, so that a person can use them; `pause_asked`
        is called with each request to pause or resume. For volunteers."""
        self._pause_asked, self._limit = pause_asked, limit
        self._pause = pause  # last: whoever finds the switch also finds `pause_asked`

    def watch(
        self,
        swarm: Swarm,
        network: NetworkThread,
        pulse: Callable[[], Pulse],
        checkpoints: Checkpoints,
        estimates: Callable[[int], Estimate] | None = None,
    ) -> None:
        """Register the swarm of the run: from now on the board reads it and `pulse`, checkpoints can be asked for, and
        what is known of the run is told to other peers that ask.

        `estimates` gives what the run costs each of a number of volunteers that hold the whole model.
        """
        run, board = swarm.published.run, self.board
        board.add_looker(swarm_looker(board, swarm))
        board.add_looker(checkpoints.show)
        board.watch(
            Watched(
                pulse=pulse,
                peer=swarm.presence.me.peer,
                name=swarm.presence.me.name,
                run_name=run.run.name,
                run_sha256=swarm.published.sha256,
                total_tokens=run.run.total_tokens,
                shows_invite=run.run.show_invite,
                vocabulary_size=run.model.vocabulary_size,
                tokens_per_step=run.tokens_per_step,
                estimates=estimates,
            )
        )
        self._checkpoints = checkpoints
        history = board.history

        @lru_cache(maxsize=1)
        def told(version: int) -> HistoryReply:
            return history_to_proto(history.losses(), history.sample)

        swarm.history = lambda: told(history.version)  # made once for all who ask, in the network's thread
        self._swarm, self._submit = swarm, network.submit

    def joined(self, inviters: Iterable[InvitedPeer] = ()) -> None:
        """Report that the peer knows how far the run is: it asks others for what it does not know of the time before,
        and once more when it has counted on for a minute. `inviters` are those named in its invite.
        """
        self._inviters = frozenset(peer.peer for peer in inviters)

        async def ask() -> None:
            for _ in range(_HISTORY_TIMES):
                self._history_asked_s = time.monotonic()
                await self._fill_history()
                await asyncio.sleep(_HISTORY_AGAIN_S)

        self._submit(ask())

    def _ask_history(self) -> None:
        """Ask other peers for what this one does not know of the run, a minute after the last time at the earliest."""
        now_s = time.monotonic()
        if self._swarm is not None and now_s - self._history_asked_s >= _HISTORY_AGAIN_S:
            self._history_asked_s = now_s
            self._submit(self._fill_history())

    async def _fill_history(self) -> None:
        assert self._swarm is not None
        run_tokens = max(self.board.run_tokens, self._swarm.accounting.total)
        told = await ask_for_history(self._swarm, self._inviters, run_tokens)
        self.board.history.fill(told)

    def serving(self) -> None:
        """Report that the peer serves the run from now on."""
        self.board.doing(pb.PEER_STATE_SERVING, "serving the run")

    def training_stages(self, stages: Sequence[int]) -> None:
        """Report that the peer holds these stages now."""
        self.board.doing(pb.PEER_STATE_TRAINING, f"training {stages_in_words(stages)}")

    # ------------------------------------------------------------- powers

    def powers(self) -> ControlHandlers:
        """Return the handlers that the server may call."""
        return ControlHandlers(
            status=self.board.status,
            healthy=lambda: health(self.board.tick(), time.monotonic())[0],
            leave=self._leave,
            pause=self._order_pause,
            resume=self._order_resume,
            checkpoint=self._checkpoint,
            limit=self._order_limit,
            history=self.board.history.message,
            ask_history=self._ask_history,
        )

    def _leave(self) -> str:
        if self.stop.is_set():
            self.stop.insist()
        self.stop.stop("asked")
        return "leaving: it finishes its step, tells the other peers and ends"

    def _order_pause(self) -> str:
        if self._pause is None:
            raise UserError(
                "a bootstrap does not train: there is nothing to pause; name a volunteer", code="not-a-volunteer"
            )
        is_new = self._pause.hold(ASKED, "you asked for it")
        self._pause_asked(True)
        if not is_new:
            return "it is paused already; `swarmtrain resume` ends the pause"
        return "pausing: it finishes its step and leaves the swarm until you resume it"

    def _order_resume(self) -> str:
        if self._pause is None:
            raise UserError(
                "a bootstrap does not train: there is nothing to resume; name a volunteer", code="not-a-volunteer"
            )
        was_asked = self._pause.release(ASKED)
        self._pause_asked(False)
        if self._pause.held:
            return f"it stays paused: {self._pause.reason}"
        if not was_asked:
            return "it was not paused"
        return (
            "resuming: it continues from its own weights, or from the swarm's current ones if it is a few rounds behind"
        )

    def _checkpoint(self) -> pb.CheckpointReply:
        if self._checkpoints is None:
            raise RunTimeError(
                "this peer has nothing to write yet, since it is still starting; try again in a minute",
                code="no-checkpoint",
            )
        return self._checkpoints.flushed()

    def _order_limit(self, limits: pb.Limits) -> str:
        if self._limit is None:
            raise UserError(
                "the limits of this peer cannot be changed while it runs; end it, and start it again with new limits",
                code="limits-fixed",
            )
        return self._limit(limits)


@contextmanager
def control_session(
    role: str, folder: PeerFolder, settings: PeerSettings, emit: Emit, stop: StopFlag
) -> Iterator[ControlSession]:
    """Keep a peer's board and control server while it lives, and leave its last status in the folder.

    Raises UserError if a TCP address of `settings` is taken. If no socket can be made the peer runs all the same.
    """
    board = StatusBoard(role, time.time() - process_age_s())
    if (before := read_status(folder.path)) is not None:
        board.remember(before)
    board.history.remember(read_history(folder.path))
    board.called(settings.name)
    board.add_looker(partial(_show_checkpoint, newest_written(folder.checkpoints_path, folder.kept_sha256())))
    control = ControlSession(board, board.listening(emit), stop)
    settings.show_status(board.status)
    server = ControlServer(folder.path, control.powers(), settings.control)
    try:
        try:
            server.start()
        except (RunTimeError, OSError) as error:
            message = f"`swarmtrain status` and the like cannot reach this peer: {error}"
            control.emit(WarningEvent(message=message, code="no-control"))
        with _metrics(settings, control), _curves(folder, settings, control, before):
            yield control
        board.ended(pb.PEER_STATE_DONE, control.reason, 0)
    except StopTraining:  # asked to end before there was anything to end
        board.ended(pb.PEER_STATE_DONE, stop.reason, 0)
        raise
    except SwarmtrainError as error:
        board.ended(pb.PEER_STATE_FAILED, with_code(str(error), error.code), error.exit_code)
        raise
    except BaseException as error:
        board.ended(pb.PEER_STATE_FAILED, f"an error of swarmtrain itself: {error!r}", 1)
        raise
    finally:
        server.stop()


def _show_checkpoint(kept: Written | None, status: pb.PeerStatus) -> None:
    """Show the checkpoint that was on the disk at the start; a running peer's newest replaces it."""
    if kept is not None:
        checkpoint = pb.KeptCheckpoint(round=kept.round, time=kept.time, size_bytes=kept.size_bytes)
        status.checkpoint.CopyFrom(checkpoint)


def _metrics(settings: PeerSettings, control: ControlSession) -> AbstractContextManager[object]:
    if not settings.metrics:
        return nullcontext()
    from swarmtrain.peer.control.metrics import serving_metrics  # brings an HTTP server: only loaded if asked for

    return serving_metrics(settings.metrics, control.board, control.powers().healthy)


def _curves(
    folder: PeerFolder, settings: PeerSettings, control: ControlSession, before: pb.PeerStatus | None
) -> AbstractContextManager[object]:
    if not settings.report_to:
        return nullcontext()
    from swarmtrain.peer.trackers.recorder import recording

    return recording(folder.path, control.board, settings.report_to, control.emit, before)


# ---------------------------------------------------------------- where the board looks


def volunteer_pulse(
    board: StatusBoard, exchange: SwarmExchange, learnt_share: Callable[[], float]
) -> Callable[[], Pulse]:
    """Return a function that describes what a volunteer is doing in its rounds, read from where it happens.

    `learnt_share` returns that of its steps, see `Pulse`."""
    rounds, traffic, limit_s = exchange.swarm.rounds, exchange.swarm.node.traffic, exchange.run.merge.round_limit_s

    def pulse() -> Pulse:
        speed = exchange.swarm.presence.me.steps_per_s
        state, about = pb.PEER_STATE_TRAINING, ""
        patience_s = max(_PATIENCE_S, _STEPS_OF_PATIENCE / speed) if speed > 0 else _FIRST_ROUND_PATIENCE_S
        round, done, steps = rounds.current_round, exchange.steps_done, exchange.round_steps
        if exchange.num_missing:
            state = pb.PEER_STATE_WAITING
            doing = f"waiting for {_volunteers(exchange.num_missing, 'more ')} before the first round"
        elif exchange.is_training:
            doing = f"training round {round}: {exchange.progress_in_words()}"
        else:
            about, patience_s = rounds.waiting_for, limit_s + _PATIENCE_S
            doing = f"merging round {round}" + _merging(board, about, rounds.waiting_until_s - swarm_time())
        return Pulse(
            state=state,
            doing=doing,
            about=about,
            round=round,
            inner_steps_done=done,
            inner_steps=steps,
            num_steps=exchange.num_steps,
            learnt_share=learnt_share(),
            sent_bytes=traffic.sent_bytes,
            received_bytes=traffic.received_bytes,
            patience_s=patience_s,
        )

    return pulse


def _merging(board: StatusBoard, reason: str, at_most_s: float) -> str:
    if not reason:
        return ""
    sentence = board.in_names(reason)
    if reason.startswith("signed by "):
        return f": fetching what is on the roster {sentence}"
    return f": {sentence}" + (f", {max(1.0, at_most_s):.0f} s at most" if at_most_s > 0 else "")


def bootstrap_pulse(swarm: Swarm, archived: Callable[[], Progress]) -> Callable[[], Pulse]:
    """Return a function that describes what a bootstrap is doing: serving, or waiting for volunteers."""
    run = swarm.published.run
    min_peers, is_all_learnt = run.merge.min_peers, run.batch_rows == 1

    def pulse() -> Pulse:
        volunteers = swarm.membership.volunteers()
        round = max((info.round for info in volunteers), default=archived().round)
        kept = f"the archive holds {_rounds(archived().round)}" if archived().round else "nothing is archived yet"
        begun = bool(round) or any(info.inner_steps_done for info in volunteers)
        missing = (1 if begun else min_peers) - len(volunteers)
        doing = f"serving {_volunteers(len(volunteers))} in round {round}; {kept}"
        if missing > 0:
            more = _volunteers(missing, "more " if volunteers else "")
            begins = "to go on" if round else "before the first round"
            doing = f"waiting for {more} {begins}; send them the `swarmtrain join` line; {kept}"
        return Pulse(
            state=pb.PEER_STATE_SERVING,
            doing=doing,
            round=round,
            learnt_share=float(is_all_learnt),
            sent_bytes=swarm.node.traffic.sent_bytes,
            received_bytes=swarm.node.traffic.received_bytes,
        )

    return pulse


def _rounds(number: int) -> str:
    return counted(number, "round")


def _volunteers(number: int, more: str = "") -> str:
    return counted(number, f"{more}volunteer")


def reach_in_words(swarm: Swarm) -> str:
    """Return a sentence if nobody can dial this peer, or if it serves peers that nobody can dial; usually empty."""
    guests = () if swarm.serving.hosting is None else swarm.serving.hosting.guests.current(swarm_time())
    serving = f"serving the work of {counted(len(guests), 'peer')} that nobody can dial"
    return swarm.reaching.in_words() or (serving if guests else "")


def adapter_in_words(section: AdapterSection, me: PeerInfo) -> str:
    """Return a sentence about the run's adapter and what this peer trains of it; empty without an adapter."""
    if not section.is_used:
        return ""
    whole = f"rank {section.rank} in {counted(section.num_groups, 'group')}"
    if not (me.training and me.adapter_groups):
        return whole
    groups = sorted(trained_groups(me.peer, me.round, section.num_groups, me.adapter_groups))
    which = " and ".join(map(str, groups))
    return f"{whole}; trains {me.adapter_groups * section.rank_of_group} of it a round, now group {which}"


def swarm_looker(board: StatusBoard, swarm: Swarm) -> Callable[[pb.PeerStatus], None]:
    """Return a looker: a function that fills into a status which peers are present and how much each contributed."""
    tokens_per_step, gone, growth = swarm.published.run.tokens_per_step, PeerInfo(peer=""), Growth()

    def look(status: pb.PeerStatus) -> None:
        status.reach, status.dht_records = reach_in_words(swarm), swarm.node.num_dht_records
        status.adapter = adapter_in_words(swarm.published.run.adapter, swarm.presence.me)
        me, counts, acknowledged = swarm.presence.me, swarm.accounting.contributions(), swarm.accounting.acknowledged()
        live = {info.peer: info for info in (*swarm.membership.live(), me)}
        # A volunteer uses the rosters' total instead, which forks and liars do not change.
        if me.is_bootstrap:
            total, told = swarm.accounting.total, [info.run_tokens for info in live.values() if info.training]
            growth.take(total, board.now())
            # Its counts are some seconds old. Volunteers know better, and are believed as far as the counts can have
            # grown.
            per_s = growth.per_s(board.now())
            most = total + round(
                _COUNTS_LAG_S * (_told_per_s(live.values(), tokens_per_step) if per_s is None else per_s)
            )
            # Speeds are only claimed so far: a single liar must not complete the run on this screen.
            if per_s is None and status.total_tokens:
                most = max(total, min(most, status.total_tokens - 1))
            newest = min(most, statistics.median_low(told)) if told else 0
            status.run_tokens = max(status.run_tokens, total, newest)
        status.own_tokens = max(status.own_tokens, counts.get(me.peer, 0))
        for info in live.values():
            board.know_name(info.peer, info.name)
        here = status.state not in (pb.PEER_STATE_PAUSED, pb.PEER_STATE_DONE, pb.PEER_STATE_FAILED)
        shown = {*live, *heapq.nlargest(MAX_SHOWN_PEERS, counts, key=counts.__getitem__)}
        everyone = sorted(shown, key=lambda peer: (peer not in live, -counts.get(peer, 0), peer))
        _show_stages(status, swarm)
        board.tell_losses({info.peer: info.loss for info in live.values() if info.training and info.loss})
        for peer in everyone[:MAX_SHOWN_PEERS]:
            info = live.get(peer, gone)
            if info is gone:
                board.know_name(peer, swarm.accounting.names.get(peer, ""))
            status.peers.add(
                peer=peer,
                name=board.name_of(peer),
                tokens=counts.get(peer, 0),
                present=info is not gone and (peer != me.peer or here),
                bootstrap=info.is_bootstrap,
                round=info.round,
                tokens_per_s=info.steps_per_s * tokens_per_step,
                stages=() if info.place is None else info.place.planned,
                acknowledged_tokens=acknowledged.get(peer, 0),
                heard_time=max(0.0, swarm.membership.heard_s(peer)),
                hidden=info.hidden,
                loss=info.loss,
                device=info.device,
            )

    return look


def _told_per_s(live: Iterable[PeerInfo], tokens_per_step: int) -> float:
    """Return the swarm's tokens per second: the number of peers times the median of their advertised speeds. Used
    before it is measured."""
    speeds = [info.steps_per_s for info in live if info.training and info.steps_per_s > 0]
    return tokens_per_step * len(speeds) * statistics.median_low(speeds) if speeds else 0.0


def _show_stages(status: pb.PeerStatus, swarm: Swarm) -> None:
    """Fill in what each stage of a pipeline does, as its peers report."""
    num_stages = swarm.published.run.pipeline.stages
    if num_stages == 1:
        return
    places = places_of([*swarm.membership.volunteers(), swarm.presence.me])
    mine = () if swarm.presence.me.place is None else swarm.presence.me.place.planned
    for number in range(num_stages):
        here = [place for place in places if number in place.stages]
        status.stages.add(
            number=number,
            num_peers=len(here),
            tokens_per_s=sum(place.flow_tokens_per_s for place in here),
            most_tokens_per_s=sum(place.tokens_per_s for place in here),
            queue=sum(place.queue for place in here),
            mine=number in mine,
        )

"""Volunteer: joins a run by an invite, trains, merges, and leaves cleanly.

The main thread trains; the network thread does everything else. Joining has an order that makes the state taken from
the swarm fresh: dial, fetch the run, prepare text and model, and only then take the state.
"""

from __future__ import annotations

from typing import Protocol

from swarmtrain.events import DoneEvent, PausedEvent, ResumedEvent, stamped
from swarmtrain.network.discovery.invite import Invite
from swarmtrain.network.identity import load_or_create_identity
from swarmtrain.network.node import NetworkThread, Node
from swarmtrain.network.swarm import Swarm
from swarmtrain.peer.control.limits import LimitEnforcer, kept_limits, options_of
from swarmtrain.peer.control.logs import log_event, logged, peer_log
from swarmtrain.peer.control.session import ControlSession, control_session
from swarmtrain.peer.devices.choice import check_device
from swarmtrain.peer.lifecycle.context import VolunteerContext
from swarmtrain.peer.lifecycle.folder import PeerFolder, peer_folder
from swarmtrain.peer.lifecycle.needs import check_needs
from swarmtrain.peer.lifecycle.node import Emit, PeerSettings, as_peer, check_addresses, leave_swarm, start_node
from swarmtrain.peer.lifecycle.process import process_age_s
from swarmtrain.peer.lifecycle.run_fetch import RunFetcher
from swarmtrain.peer.lifecycle.stop import Interrupted, StopFlag, explained_on_signal
from swarmtrain.peer.merging.rules import mean_of
from swarmtrain.peer.model_files.fetcher import SwarmSource, fetch_and_serve, files_place
from swarmtrain.peer.pipeline.pipeline_training import prepare_pipeline
from swarmtrain.peer.training.model_training import prepare_model
from swarmtrain.peer.training.pause import ASKED, PauseSwitch
from swarmtrain.run import NetworkSection
from swarmtrain.v1 import control_pb2 as pb
from swarmtrain.words import short_peer

_UNKNOWN_RUN = NetworkSection(min_pull_bytes_per_s=0, stall_limit_s=600)


def run_volunteer(invite: Invite, settings: PeerSettings, emit: Emit, stop: StopFlag) -> DoneEvent:
    """Join the run of `invite` and train until it ends or `stop` is set; return the final event.

    Raises UserError and RunTimeError with one line for a person; UserError at once if the device asked for is not here.
    """
    check_device(settings.device)
    check_addresses(settings)
    with (
        # In the background its log is all that a person has to look at: it stays.
        peer_folder(settings.directory, removes_unused=not settings.log_descriptors) as folder,
        peer_log(folder.path, settings.log_descriptors),
        control_session("volunteer", folder, settings, logged(emit), stop) as control,
    ):
        folder.started.keep_command(settings.started)
        volunteer = Volunteer(invite, settings, folder, control)
        with kept_limits(volunteer.limits):
            network = NetworkThread()
            with explained_on_signal(network.log_tasks):
                return volunteer.live(network)


class Training(Protocol):
    """Training of a volunteer in its run: of a whole model, or of stages of one. `Volunteer.live` calls the steps."""

    swarm: Swarm
    """Swarm of the run."""

    @property
    def round(self) -> int:
        """Round that the peer takes part in next."""
        ...

    def enter(self) -> None:
        """Enter the swarm: answer other peers and learn which ones are present; announce nothing of this peer yet."""

    def join(self) -> None:
        """Take the swarm's present weights, if they are preferred to this peer's, and announce this peer."""

    def train(self) -> bool:
        """Train until the run has its tokens (returns True) or this peer must pause (returns False).

        Raises Interrupted when it is asked to end.
        """
        ...

    def withdraw(self) -> None:
        """Say goodbye to the others for the time of a pause."""

    def come_back(self) -> None:
        """Rejoin after a pause, as `join` does. By then this peer knows which others are present."""

    def finish(self) -> DoneEvent:
        """Continue to serve, at the run's end, for peers that still need this one; return the final event."""
        ...

    def hand_over(self) -> DoneEvent:
        """Continue to serve, if this peer ends before the run, until its work that no other peer has is archived;
        return the final event."""
        ...

    def leave(self) -> None:
        """Say goodbye, end the network, and finish what is being written; within some seconds, whatever happens."""


class Volunteer:
    """One volunteer, from joining to goodbye."""

    def __init__(self, invite: Invite, settings: PeerSettings, folder: PeerFolder, control: ControlSession) -> None:
        self.invite, self.settings, self.folder, self.control = invite, settings, folder, control
        self.me = load_or_create_identity(folder.key_path).peer_id
        self.name = settings.name or short_peer(self.me)
        self.emit, self.stop, board = as_peer(control.emit, self.me, self.name), control.stop, control.board
        self.pause = PauseSwitch()
        if folder.started.read().paused:
            self.pause.hold(ASKED, "you paused it before it was started again; `swarmtrain resume` ends the pause")
        self.limits = LimitEnforcer(
            settings.limits, self.pause, self.emit, expected=lambda: board.estimate_now(board.status())
        )
        control.takes_orders(self.pause, folder.started.keep_pause, self._limit)
        board.add_looker(lambda status: status.limits.CopyFrom(self.limits.limits()))

    def live(self, network: NetworkThread) -> DoneEvent:
        """Join, train until the run has its tokens or an end is asked for, and leave; return the final event."""
        node: Node | None = None
        training: Training | None = None
        try:
            self.control.starting("starting the network")
            node = start_node(network, self.settings, self.folder, self.stop)
            context = self._fetch_run(network, node)
            is_whole = context.run.pipeline.stages == 1
            training = prepare_model(context) if is_whole else prepare_pipeline(context)
            training.enter()
            if self.pause.held:  # before `join`, so that nobody counts on it yet
                self._rest(context, training.swarm)
            training.join()
            while not training.train():
                training.withdraw()
                paused_s = self._rest(context, training.swarm)
                training.come_back()
                self.emit(ResumedEvent(round=training.round, paused_s=paused_s))
            return self._ended(training.finish())
        except Interrupted:
            return self._ended(self._nothing_done() if training is None else training.hand_over())
        finally:
            if training is None:
                leave_swarm(network, None, node)
            else:
                training.leave()

    def _fetch_run(self, network: NetworkThread, node: Node) -> VolunteerContext:
        """Find the swarm and fetch what it trains."""
        self.control.starting("looking for the swarm, and fetching the run")
        self.limits.limit_link(node.traffic, _UNKNOWN_RUN)
        fetcher = RunFetcher(
            invite=self.invite,
            folder=self.folder,
            network=network,
            node=node,
            emit=self.emit,
            stop=self.stop,
            settings=self.settings,
        )
        published, nobody = fetcher.fetch()
        # Both raise before anything takes long: if the run's rule is not installed, or --rank is not possible.
        mean_of(published.run.merge.robust)
        published.run.adapter.groups_worth(self.settings.adapter_rank)
        self.limits.limit_link(node.traffic, published.run.network)
        check_needs(fetcher.needs, published, self.settings)
        others = SwarmSource(network, node, fetcher.through) if nobody is None else None
        model_folder = None
        if published.model_files:
            self.control.starting("getting the model's files")
            place = files_place(self.settings, self.control, self.emit)
            model_folder = fetch_and_serve(published, place, node, others).path
        return VolunteerContext(
            published=published,
            settings=self.settings,
            folder=self.folder,
            network=network,
            node=node,
            control=self.control,
            emit=self.emit,
            limits=self.limits,
            pause=self.pause,
            name=self.name,
            fetcher=fetcher,
            model_folder=model_folder,
            nobody=nobody,
        )

    def _rest(self, context: VolunteerContext, swarm: Swarm) -> float:
        """Wait until the pause is over, then look which peers are present; return how long the pause was, in
        seconds."""
        self.emit(PausedEvent(reason=self.pause.reason))
        paused_s = self.pause.wait_released(self.stop.sleep)
        self.control.starting("resuming after a pause")
        context.wait(swarm.come_back())
        return paused_s

    def _nothing_done(self) -> DoneEvent:
        """Return the final event if an end was asked for before there was anything to train."""
        return DoneEvent(held_out_loss=None, tokens=0, run_tokens=0, wall_s=process_age_s(), reason=self.stop.reason)

    def _ended(self, done: DoneEvent) -> DoneEvent:
        """Show `done` to whoever watches this peer, and return it."""
        return self.control.ended(log_event(stamped(done, 0.0, self.me, self.name)))

    def _limit(self, wanted: pb.Limits) -> str:
        """Change the limits that `wanted` names, and remember them for the next start in this folder."""
        told = self.limits.change(wanted)
        self.folder.started.keep_options(options_of(wanted))
        return told

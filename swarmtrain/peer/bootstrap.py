"""Bootstrap: publishes a run, is there for the first peers that join, and archives the run's state.

It does not train, sign rosters or count as a volunteer; the swarm goes on without it. The main thread archives and
submits work to the network thread.
"""

from __future__ import annotations

import asyncio
import dataclasses
import datetime
import gc
import hashlib
import logging
import math
import random
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from swarmtrain import __version__
from swarmtrain.algorithm.outer import OuterState, flatten, unflatten_into
from swarmtrain.data.prepare import publishable_data
from swarmtrain.errors import ClockError, RunTimeError, SwarmtrainError, UserError
from swarmtrain.events import DoneEvent, WarningEvent
from swarmtrain.methods import load_object
from swarmtrain.model.base import changed_keys, published_base, resolved_run
from swarmtrain.model.huggingface_model import cut_model
from swarmtrain.model.language_model import ModelSpec
from swarmtrain.model.parameter_count import num_trained_parameters
from swarmtrain.model.run_model import build_run_model
from swarmtrain.model.run_stages import check_weights
from swarmtrain.network.answers import Serving
from swarmtrain.network.codec import average_bytes_untrusted, tensor_specs
from swarmtrain.network.daemon import swarm_time
from swarmtrain.network.discovery.invite import InvitedPeer
from swarmtrain.network.discovery.run_lookup import PublishedRun, find_run
from swarmtrain.network.identity import load_or_create_identity
from swarmtrain.network.node import NetworkThread, Node
from swarmtrain.network.swarm import Swarm
from swarmtrain.network.tasks import end_tasks
from swarmtrain.peer.checkpoints.archive import Archive, checkpoint_of
from swarmtrain.peer.checkpoints.checkpoint import Checkpoint
from swarmtrain.peer.checkpoints.manager import CheckpointManager, PeersFile, checkpointer_of
from swarmtrain.peer.control.logs import log_event, logged, peer_log
from swarmtrain.peer.control.session import bootstrap_pulse, control_session
from swarmtrain.peer.lifecycle.bootstrap_peer import (
    COUNTS_EVERY_S,
    FLUSH_S,
    LAST_ARCHIVE_S,
    LAST_SAMPLE,
    LINGER_S,
    BootstrapPeer,
)
from swarmtrain.peer.lifecycle.folder import PeerFolder, peer_folder
from swarmtrain.peer.lifecycle.node import (
    Emit,
    PeerSettings,
    check_addresses,
    clock_warnings,
    leave_swarm,
    named_weights,
    show_invite,
    use_threads,
    wait_for,
)
from swarmtrain.peer.lifecycle.process import process_age_s
from swarmtrain.peer.lifecycle.stop import Interrupted, StopFlag
from swarmtrain.peer.merging.consensus import ARCHIVED
from swarmtrain.peer.merging.consensus_state import ConsensusState, consensus_state_of, fetch_consensus_state
from swarmtrain.peer.merging.gossip_exchange import hosting_of
from swarmtrain.peer.merging.rules import mean_of
from swarmtrain.peer.merging.server import MergeServer
from swarmtrain.peer.model_files.base_files import BaseFiles, pin_base, place_of_base
from swarmtrain.peer.model_files.fetcher import FilesPlace, files_place
from swarmtrain.peer.pipeline.bootstrap import PipelineBootstrap
from swarmtrain.peer.pipeline.stage_assignment import cut_and_measure
from swarmtrain.problems import shown
from swarmtrain.protocol.archive.departure import DepartureQueue
from swarmtrain.protocol.archive.load import (
    archive_every_s,
    archived_sources,
    is_early_archive_due,
    not_the_slowest,
)
from swarmtrain.protocol.tokens.progress import Progress
from swarmtrain.run import PublishedSection, RunFile, published_bytes, run_sha256
from swarmtrain.v1 import control_pb2 as pb
from swarmtrain.words import counted

_log = logging.getLogger(__name__)
_LAST_ROUND_S = 20.0
"""Seconds to wait for peers that have not ended their last round, where each has its own pace."""
_REDIAL_S = 3.0
_REFUSED_AGAIN_S = 10.0
"""Seconds before states that lack more of the archive than they bring are asked for again."""
_LAST_ANSWER_S = 2.0


def publish_run(
    run: RunFile, base: Path, created: datetime.datetime, me: str = "", model: BaseFiles | None = None
) -> PublishedRun:
    """Prepare a resolved run for publishing: cut its held-out text, learn its tokenizer, and write out every default.

    `me` is the PeerID of the publisher, which is the server if the run has one; `model` are the files of a model of
    Hugging Face, whose weights are read once. Raises UserError.
    """
    mean_of(run.merge.robust)  # the publisher of a rule must have it too
    files = publishable_data(run, base, None if model is None else model.folder)
    tokenizer = files.tokenizer_bytes
    run = run.model_copy(update={"model": run.model.model_copy(update={"tokenizer": files.tokenizer_name})})
    boundaries, costs = cut_and_measure(run) if run.pipeline.stages > 1 else (None, None)
    section = PublishedSection(
        created=created.isoformat(timespec="microseconds"),
        swarmtrain=__version__,
        held_out_sha256=hashlib.sha256(files.held_out.text).hexdigest(),
        held_out_bytes=len(files.held_out.text),
        tokenizer_sha256=hashlib.sha256(tokenizer).hexdigest() if tokenizer else None,
        tokenizer_bytes=len(tokenizer),
        boundaries=boundaries,
        stage_costs=costs,
        dataset_revision=None if run.data.sources else files.revisions[0] or None,
        dataset_revisions=files.revisions if run.data.sources and any(files.revisions) else None,
        held_out_source_bytes=files.held_out.source_bytes or None,
        server=me if run.merge.kind.has_server else None,
    )
    if model is not None:
        check_weights(run, model.folder, boundaries or ())
        section = section.model_copy(
            update={"model_files_sha256": model.pinned.sha256, "model_files_bytes": len(model.pinned.to_bytes())}
        )
        named = run.model.model_copy(update={"base": published_base(run.model.base)})
        run = run.model_copy(update={"model": named})
    complete = run.model_copy(update={"published": section})
    data = published_bytes(complete)
    pinned = b"" if model is None else model.pinned.to_bytes()
    return PublishedRun(data, run_sha256(data), complete, files.held_out.text, tokenizer, pinned)


def run_bootstrap(run: RunFile, base: Path, settings: PeerSettings, emit: Emit, stop: StopFlag) -> DoneEvent:
    """Publish `run` and serve it until it ends or `stop` is set; return the final event.

    `base` is the folder that the run's data paths are relative to. If the folder in `settings` holds this run already,
    that run continues with the same identity and invite.
    """
    use_threads(1)  # it computes only at the end; the cores are for those who train
    check_addresses(settings)
    _refuse_another(run, PeerFolder(settings.directory))
    with (
        peer_folder(settings.directory) as folder,
        peer_log(folder.path, settings.log_descriptors),
        control_session("bootstrap", folder, settings, logged(emit), stop) as control,
    ):
        control.starting("reading the run and cutting its held-out text")
        place = files_place(settings, control, control.emit)
        try:
            published = _published(run, base, folder, place)
        except Interrupted:  # there is nothing to serve yet
            done = DoneEvent(held_out_loss=None, tokens=0, run_tokens=0, wall_s=process_age_s(), reason=stop.reason)
            return control.ended(log_event(done))
        # After `_published`: the options of a start that was refused must not be used by the next one.
        folder.started.keep_command(settings.started)
        network = NetworkThread()
        kind = _Bootstrap if published.run.pipeline.stages == 1 else PipelineBootstrap
        bootstrap = kind(published, settings, folder, network, control)
        bootstrap.model_place = place_of_base(run, base, place)
        try:
            return control.ended(log_event(bootstrap.run()))
        except Interrupted:
            bootstrap.stop_sampling()
            bootstrap.archive_once_more()
            return control.ended(log_event(bootstrap.done(stop.reason)))
        finally:
            bootstrap.stop_sampling()
            bootstrap.leave_stages()
            leave_swarm(network, bootstrap.swarm, bootstrap.node)
            if bootstrap.manager is not None:
                bootstrap.manager.close()


def _refuse_another(run: RunFile, folder: PeerFolder) -> None:
    """Raise UserError if the folder holds another run; nothing is written."""
    kept = folder.kept_run()
    if kept is None or not (changes := changed_keys(kept.run, run)):
        return
    key, (before, now) = next(iter(sorted(changes.items(), key=lambda change: change[0] != "run.name")))
    key = "merge.min_peers (--wait-for)" if key == "merge.min_peers" else key
    more = f" (and {counted(len(changes) - 1, 'more key')})" if len(changes) > 1 else ""
    raise UserError(
        f"{folder.path} holds another run ({kept.run.run.name}): there {key} is {shown(before)}, and here "
        f"{shown(now)}{more}; a run's keys cannot be changed once it is published: give what it was published with, or "
        "export its model and start a new run from it, in another folder with --dir",
        code="folder-of-another-run",
    )


def _published(run: RunFile, base: Path, folder: PeerFolder, place: FilesPlace) -> PublishedRun:
    """Return the run in the folder, or publish a new one there."""
    kept = folder.kept_run()
    if kept is None:
        me = load_or_create_identity(folder.key_path).peer_id
        run = resolved_run(run, base)
        model = pin_base(run, base, place)
        published = publish_run(run, base, datetime.datetime.now(datetime.UTC), me, model)
        folder.keep_run(published)
        if model is not None and run.pipeline.stages > 1 and cut_model(ModelSpec(run.model, model.folder)).head_is_copy:
            begins = "has numbers of its own" if run.model.from_scratch else "begins as a copy of it"
            message = f"the head of this model is its embedding; in stages it {begins}, and the two are trained apart"
            place.emit(WarningEvent(message=message, code="tied-embeddings"))
        return published
    return kept


@dataclass
class _Bootstrap(BootstrapPeer):
    server: MergeServer | None = None
    """Server of the merge method, if it has one: its weights are the run's."""
    is_final: bool = False
    """True if the archive has the run's last weights."""
    progress: Progress = field(default_factory=Progress)
    state: OuterState | None = None
    archived: Archive | None = None
    """Knowledge of what the archive contains, where peers merge asynchronously; else None."""
    leavers: DepartureQueue | None = None
    """Volunteers that would leave with work that is in no archive; None if the run has a server."""
    _counts_kept_s: float = -math.inf
    _archived_arrivals: int = 0

    def run(self) -> DoneEvent:
        node, me = self.enter_network()
        kind = self.published.run.merge.kind
        model = build_run_model(self.published.run, self.model_folder)
        specs = tensor_specs(model.trained_parameters())
        checkpointer = checkpointer_of(self.folder, self.published, node.identity.peer_id, self.emit)
        swarm = self.swarm = Swarm(
            node, self.published, specs, average_bytes_untrusted, self.emit, me, durable=lambda: checkpointer.durable
        )
        peers = self.peers = PeersFile(self.folder, swarm)
        manager = self.manager = CheckpointManager(self.folder, checkpointer, swarm, self.emit, peers=peers)
        if swarm.asynchronous:
            self.archived = Archive(swarm, manager)
        kept = self._restore(swarm, manager, sum(spec.size_bytes for spec in specs) // 4)
        if kind.has_server:
            self.server = self._merge_server(swarm, manager, kept, flatten(model.parameters()))
            self._archived_arrivals = self.server.arrivals
        else:
            self.leavers = DepartureQueue(swarm.membership)
        del kept, model  # 8 bytes a parameter
        gc.collect()  # models of transformers refer to themselves
        serving = dataclasses.replace(
            Serving() if self.archived is None else self.archived.serving(),
            publishers={} if self.server is None else {("gradient", 0): self.server.publisher},
            pulling=self.server,
            hosting=hosting_of(swarm) if kind.hosting else None,
            leavers=self.leavers,
        )
        wait_for(self.network.submit(swarm.start(self._reachable(node), serving)), self.stop)
        wait_for(self.network.submit(swarm.watch_daemon(self.stop.fail)), self.stop)
        if self.server is not None:
            wait_for(self.network.submit(self.server.start()), self.stop)
        wait_for(self.network.submit(swarm.announce()), self.stop)
        show_invite(swarm, self.folder, self.emit)
        self.control.watch(swarm, self.network, bootstrap_pulse(swarm, lambda: self.progress), manager)
        self.control.joined()
        self.control.serving()
        self._archive_until_the_end(swarm)
        if self.leavers is not None:
            self.leavers.release()
        self.control.finishing("measuring and saving the model")
        self._measure_and_save()
        self.control.finishing("serving until all volunteers have left, including those that may come back")
        total = self.published.run.run.total_tokens if swarm.asynchronous else None
        self.wait_for_goodbyes(swarm, self.progress, total, lambda: self._tell_archived(swarm))
        wait_for(self.network.submit(swarm.accounting.read_all()), self.stop)
        complete = self.progress.run_tokens >= self.published.run.run.total_tokens
        return self.done("total_tokens" if complete else "the volunteers left without the last state")

    def done(self, reason: str) -> DoneEvent:
        """Return the final event."""
        return self.ended(reason, self.progress.run_tokens)

    def _reachable(self, node: Node) -> tuple[InvitedPeer, ...]:
        """Return the peers known from last time, so that a restarted bootstrap finds the same swarm; check first
        whether one answers."""
        known = self.folder.kept_peers()
        if not known:
            return known
        try:
            accept = self.settings.accept_clock
            finding = find_run(node, self.published.sha256, known, _REDIAL_S, accept_clock=accept)
            found = wait_for(self.network.submit(finding), self.stop)
        except ClockError as error:
            # It began the run: one peer with a wrong clock among those it knew must not end it.
            self.emit(WarningEvent(message=f"this bootstrap keeps its own clock: {error}", code="clock-differs"))
            return known
        except RunTimeError:
            return known  # nobody answers yet: it keeps trying
        for warning in clock_warnings(found):
            self.emit(warning)
        return known

    def _restore(self, swarm: Swarm, manager: CheckpointManager, num_parameters: int) -> Checkpoint | None:
        """Load and offer the state that was archived last time."""
        kept = manager.checkpointer.load(self.published.run, num_parameters)
        if kept is not None:
            wait_for(self.network.submit(manager.restore(kept)), self.stop)
            self._have(swarm, kept)
        if self.archived is not None:
            self.archived.restore(kept)
        return kept

    def _merge_server(
        self, swarm: Swarm, manager: CheckpointManager, kept: Checkpoint | None, theta: Tensor
    ) -> MergeServer:
        """Return the server, continuing from `kept`, or else from the initial weights `theta` (P,)."""

        def keep(checkpoint: Checkpoint) -> None:
            extra = {**manager.extra(), **checkpoint.extra}
            manager.keep(dataclasses.replace(checkpoint, extra=extra))

        kind: type[MergeServer] = load_object(self.published.run.merge.kind.server)
        server = kind(swarm, OuterState(theta, torch.zeros_like(theta)), keep)
        if kept is not None:
            try:
                server.restore(kept)
            except (ValueError, TypeError) as error:
                raise RunTimeError(
                    f"cannot continue from the newest checkpoint in {self.folder.path}: {error}; remove it to take the "
                    "one before",
                    code="checkpoint-unusable",
                ) from None
        return server

    def _have(self, swarm: Swarm, kept: Checkpoint) -> None:
        """Make the state of a checkpoint the one that is served to joiners."""
        self.state, self.progress = kept.state, kept.progress
        self._tell_archived(swarm)

    def _tell_archived(self, swarm: Swarm) -> None:
        """Announce which state is on the disk. At the end, volunteers leave once the last state is."""
        assert self.manager is not None
        durable = self.manager.checkpointer.durable
        if durable is None:
            return
        run_tokens = durable.run_tokens
        if swarm.asynchronous:  # only the last archive has everybody's last weights
            most = run_tokens if self.is_final else self.published.run.run.total_tokens - 1
            run_tokens = min(run_tokens, self.progress.run_tokens, most)
        if run_tokens == swarm.presence.me.run_tokens:
            return

        async def tell() -> None:
            round = durable.round if self.server is None else max(durable.round, swarm.presence.me.round)
            swarm.presence.change(round=round, run_tokens=run_tokens)

        wait_for(self.network.submit(tell()), self.stop)

    def _archive_until_the_end(self, swarm: Swarm) -> None:
        """Archive a volunteer's state as soon as there is one, then every `archive_every_s`, and at the end; a small
        model of a short run more often, so that its held-out loss becomes a curve.

        Gives up if the run has had its tokens and nobody has delivered the last state for a minute.
        """
        total = self.published.run.run.total_tokens
        every_s, size = self.published.run.network.archive_every_s, num_trained_parameters(self.published.run)
        # At once: after a restart it knows little of what was trained meanwhile, until it has pulled a state.
        next_s = ended_s = time.monotonic()
        took_s = 0.0
        end_seen_s = first_s = math.inf
        complete = self.is_final = self.progress.run_tokens >= total
        while not complete:
            self.rest([] if self.leavers is None else [self.leavers])
            self.control.board.beat()
            self._ask_how_far(swarm)
            told = [info.run_tokens for info in swarm.membership.volunteers()]
            newest = max(told, default=0)
            if told:  # a single peer's claim must not end a run that others still train
                end_seen_s = min(end_seen_s, time.monotonic()) if min(told) >= total else math.inf
            if time.monotonic() > end_seen_s + LINGER_S:
                self.emit(
                    WarningEvent(
                        message="the run is over, but no volunteer delivered its last weights: the archive is older; "
                        "start a volunteer again, and then this bootstrap, to have them",
                        code="last-state-lost",
                    )
                )
                return
            last = newest >= total
            if last and swarm.asynchronous:
                # Each peer has its own last weights, some are not done yet, and the claims of a few must end nothing.
                ended = swarm.accounting.total >= total or statistics.median_low(told) >= total
                first_s = min(first_s, time.monotonic()) if ended else math.inf
                last = min(told) >= total or time.monotonic() > first_s + _LAST_ROUND_S
            waiting = () if self.leavers is None else self.leavers.waiting(swarm_time())
            is_new = self._is_new(swarm, newest)
            gained, since_s = (newest - self.progress.run_tokens) / total, time.monotonic() - ended_s
            early = self.settings.samples_archive and is_early_archive_due(gained, since_s, took_s, every_s, size)
            due = is_new and (bool(waiting) or early or time.monotonic() >= next_s)
            archive, began_s = self._archive if self.server is None else self._archive_own, time.monotonic()
            archived = (due or last) and archive(swarm, last)
            if due or last:
                ended_s = time.monotonic()
                took_s = ended_s - began_s
            if archived:
                next_s = ended_s + archive_every_s(every_s, took_s, size)
                complete = self.is_final = last and self.progress.run_tokens >= total
            elif due and self.archived is not None and self.archived.watch.refused_s is not None:
                next_s = ended_s = time.monotonic() + _REFUSED_AGAIN_S
            elif not told and self.progress.run_tokens >= total:
                # An archive between two looks had all tokens, and everybody has left since.
                complete = self.is_final = True
            if self.leavers is not None and waiting and (archived or not self._is_new(swarm, newest)):
                self.leavers.taken(waiting, swarm_time())
        self._tell_archived(swarm)

    def _is_new(self, swarm: Swarm, newest_tokens: int) -> bool:
        """Return whether some volunteer may have work that the archive lacks.

        Where each peer has its own weights and counts, the number of tokens that a peer counts says nothing about that.
        """
        if self.server is not None:
            return self.server.arrivals != self._archived_arrivals
        if self.archived is not None:
            return self.archived.watch.is_new(swarm.membership.volunteers())
        return newest_tokens > self.progress.run_tokens

    def _ask_how_far(self, swarm: Swarm) -> None:
        """Ask the volunteers for their progress; keep the known peers and the counts for a restart."""
        self._tell_archived(swarm)
        wait_for(self.network.submit(swarm.greeter.greet_some()), self.stop)
        assert self.manager is not None and self.peers is not None
        try:
            self.peers.keep()
            if self.archived is not None and time.monotonic() >= self._counts_kept_s + COUNTS_EVERY_S:
                self._counts_kept_s = time.monotonic()
                self.manager.keep_counts()
                if self.server is None and self.state is not None:
                    serving = self.archived.serve_counts(self.state, self.progress)
                    wait_for(self.network.submit(serving), self.stop)
        except OSError as error:  # the archive's warning says so too, and not every second
            _log.info("%s cannot be written: %s", self.folder.path, error.strerror)

    def archive_once_more(self) -> None:
        """Archive what the volunteers have now, within some seconds, because this peer was asked to leave."""
        swarm = self.swarm
        if swarm is None or self.manager is None:
            return
        if self.archived is not None:
            self.count_once_more(swarm, [self.manager])
        if self.progress.run_tokens >= self.published.run.run.total_tokens:
            return
        self.stop = self.stop.last_work(LAST_ARCHIVE_S)
        self.control.board.doing(pb.PEER_STATE_FINISHING, "leaving: taking one last archive")
        try:
            kept = self._last_kept(swarm)
        except (Interrupted, SwarmtrainError) as error:
            _log.info("the run is not archived once more before the end: %r", error)
            return
        if kept is None:
            return
        self.manager.keep(kept)
        self.state, self.progress = kept.state, kept.progress
        self._write_kept(kept)

    def _last_kept(self, swarm: Swarm) -> Checkpoint | None:
        if self.server is not None:
            return self._of_server(self.server) if self.server.arrivals else None
        volunteers = sorted(swarm.membership.volunteers(), key=lambda info: -info.run_tokens)
        pulling = self._pull_from_the_quick(swarm, [info.peer for info in volunteers[: self._most_sources]])
        new = wait_for(self.network.submit(pulling), self.stop)
        return None if new is None else self._kept(new)

    async def _pull_from_the_quick(self, swarm: Swarm, peers: list[str]) -> ConsensusState | None:
        """Pull the newest state from peers that answer soon; None if none of them does."""
        if not peers:
            return None
        if self.archived is not None:
            self.archived.asks(swarm.membership.volunteers())
            return await fetch_consensus_state(swarm, peers[:LAST_SAMPLE], "archive", 0, self.archived.is_wanted)
        asking = [asyncio.create_task(swarm.rounds.search.ask_now([peer])) for peer in peers]
        answered, late = await asyncio.wait(asking, timeout=_LAST_ANSWER_S)
        await end_tasks(late)
        told = {peer: answer for task in answered for peer, answer in task.result().items()}
        new = await swarm.rounds.search.fetch_advertised_state(told, "archive", self.progress.run_tokens)
        return None if new is None else consensus_state_of(new)

    @property
    def _most_sources(self) -> int:
        """Number of peers to ask: those whose weights are averaged, or candidates where all peers hold the same."""
        run = self.published.run
        return archived_sources(num_trained_parameters(run)) if run.merge.kind.own_weights else ARCHIVED

    def _archive(self, swarm: Swarm, last: bool = False) -> bool:
        """Pull the newest state, write it to disk, and offer it to joiners; return False if nobody delivered."""
        infos = swarm.membership.volunteers()
        if self.published.run.merge.kind.own_weights:
            volunteers = [info.peer for info in infos]
        else:  # not only those on fast links that have just died
            volunteers = [info.peer for info in not_the_slowest(swarm.membership.answering() or infos)]
        sample = random.sample(volunteers, min(self._most_sources, len(volunteers)))
        if self.archived is None:
            fetching = fetch_consensus_state(swarm, sample, "archive", self.progress.run_tokens)
        else:  # the last weights are taken even if they hold no more tokens
            self.archived.asks(infos)
            fetching = fetch_consensus_state(swarm, sample, "archive", 0, None if last else self.archived.is_wanted)
        present = wait_for(self.network.submit(fetching), self.stop)
        if present is None:
            return False
        manager = self.manager
        assert manager is not None
        kept = self._kept(present)
        self.has_news = True
        manager.keep(kept)
        manager.checkpointer.flush(FLUSH_S)  # announced at once: volunteers may be waiting for it to leave
        wait_for(self.network.submit(manager.offer(kept)), self.stop)
        self._have(swarm, kept)
        self._write_kept(kept)
        return True

    def _archive_own(self, swarm: Swarm, last: bool) -> bool:
        """Write the server's weights to disk; with `last`, wait first until all uploads have entered them."""
        server, manager = self.server, self.manager
        assert server is not None and manager is not None
        if last:
            wait_for(self.network.submit(server.drain()), self.stop)
            if server.progress.run_tokens >= self.published.run.run.total_tokens:
                wait_for(self.network.submit(server.stop()), self.stop)
                self.is_final = True
        if not server.arrivals:
            return False
        arrivals = server.arrivals
        kept = self._of_server(server)
        self.has_news = True
        manager.keep(kept)
        manager.checkpointer.flush(FLUSH_S)
        self._archived_arrivals = arrivals
        self._have(swarm, kept)
        self._write_kept(kept)
        return True

    def _of_server(self, server: MergeServer) -> Checkpoint:
        """Return a checkpoint of the server, taken while no upload is being applied."""
        assert self.manager is not None
        manager = self.manager

        async def take() -> Checkpoint:
            return await server.checkpoint_when_idle(manager.extra())

        return wait_for(self.network.submit(take()), self.stop)

    def _kept(self, present: ConsensusState) -> Checkpoint:
        assert self.manager is not None
        if self.archived is not None:
            return self.archived.kept_of(present)
        return checkpoint_of(present, self.manager)

    def _write_kept(self, kept: Checkpoint) -> None:
        assert self.swarm is not None
        # Views of the state: building the model would take its memory once more.
        self.write_archive(named_weights(kept.state.theta, self.swarm.specs), kept.progress)

    def _measure_and_save(self) -> None:
        if self.state is not None:
            model = build_run_model(self.published.run, self.model_folder)
            unflatten_into(self.state.theta, model.trained_tensors())
            self.measure_and_save(model, self.progress)

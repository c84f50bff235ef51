"""Bootstrap of a run whose model is cut into stages: archives each stage, and joins them into one model.

It is in the run's swarm, which knows who holds what, and in every stage's swarm, whose present weights it keeps for
peers that take a stage that nobody holds any more. It trains no stage. Methods run on the main thread, coroutines in
the network thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import random
import time
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor

from swarmtrain.algorithm.outer import OuterState
from swarmtrain.errors import RunTimeError, SwarmtrainError
from swarmtrain.events import (
    DoneEvent,
    WarningEvent,
)
from swarmtrain.model.language_model import ModelSpec
from swarmtrain.model.run_model import empty_model
from swarmtrain.model.run_stages import RunStageShape, empty_run_stage, run_stage_shapes
from swarmtrain.model.stages import joined_weights
from swarmtrain.network.codec import average_bytes_untrusted, tensor_specs
from swarmtrain.network.daemon import swarm_time
from swarmtrain.network.node import Node
from swarmtrain.network.swarm import Swarm
from swarmtrain.peer.checkpoints.archive import Archive
from swarmtrain.peer.checkpoints.manager import CheckpointManager, PeersFile, checkpointer_of
from swarmtrain.peer.control.session import bootstrap_pulse
from swarmtrain.peer.lifecycle.bootstrap_peer import (
    COUNTS_EVERY_S,
    FLUSH_S,
    LAST_ARCHIVE_S,
    LAST_SAMPLE,
    LINGER_S,
    BootstrapPeer,
)
from swarmtrain.peer.lifecycle.node import (
    kept_final_model,
    named_weights,
    show_invite,
    wait_for,
)
from swarmtrain.peer.lifecycle.stop import Interrupted
from swarmtrain.peer.merging.consensus import ARCHIVED
from swarmtrain.peer.merging.consensus_state import ConsensusState, fetch_consensus_state
from swarmtrain.peer.merging.gossip_exchange import hosting_of
from swarmtrain.peer.pipeline.stage_replica import emit_of_stage
from swarmtrain.protocol.archive.departure import DepartureQueue
from swarmtrain.protocol.membership.membership import PeerInfo
from swarmtrain.protocol.pipeline.moves import FirstStageWatch
from swarmtrain.protocol.tokens.progress import Progress
from swarmtrain.v1 import control_pb2 as control_pb

_log = logging.getLogger(__name__)
_LAST_PULL_S = 3.0
_LAST_ROUND_S = 30.0
"""Seconds to wait for peers of a stage that have not ended their last round."""
_T = TypeVar("_T")


@dataclass(kw_only=True)
class StageArchive:
    """Archive of one stage."""

    number: int
    shape: RunStageShape
    swarm: Swarm
    manager: CheckpointManager
    archived: Archive
    leavers: DepartureQueue
    state: OuterState | None = None
    progress: Progress = field(default_factory=Progress)
    is_final: bool = False

    def weights(self) -> Mapping[str, Tensor]:
        """Return the stage's parameters by name, as views of the archived state."""
        assert self.state is not None
        return named_weights(self.state.theta, self.swarm.specs)


@dataclass
class PipelineBootstrap(BootstrapPeer):
    """Bootstrap of a pipeline; see `run_bootstrap`."""

    archives: list[StageArchive] = field(default_factory=list)
    _unjoined: set[int] = field(default_factory=set)
    """Stages whose archive is newer than the joined model."""
    _joined_s: float = float("-inf")
    _counts_kept_s: float = float("-inf")

    @property
    def progress(self) -> Progress:
        """Progress of the first stage, which counts the run's tokens."""
        return self.archives[0].progress if self.archives else Progress()

    def run(self) -> DoneEvent:
        """Publish, archive, measure, and wait for the volunteers' goodbyes."""
        run = self.published.run
        node, me = self.enter_network()
        swarm = self.swarm = Swarm(
            node, self.published, (), average_bytes_untrusted, self.emit, me, durable=lambda: None
        )
        self.peers = PeersFile(self.folder, swarm)
        known = self.folder.kept_peers()
        self._wait(swarm.start(known))
        self._wait(swarm.watch_daemon(self.stop.fail))
        published = run.published
        assert published is not None and published.boundaries is not None
        for number, shape in enumerate(run_stage_shapes(run, self.model_folder, published.boundaries)):
            self.archives.append(self._enter_stage(number, shape, node, me))
        self._wait(swarm.announce())
        show_invite(swarm, self.folder, self.emit)
        pulse = bootstrap_pulse(swarm, lambda: self.progress)
        self.control.watch(swarm, self.network, pulse, self.archives[0].manager)
        self.control.joined()
        self.control.serving()
        self._archive_until_the_end(swarm)
        self.control.finishing("measuring and saving the model")
        self._measure_and_save()
        self.control.finishing("serving until all volunteers have left, including those that may come back")
        self.wait_for_goodbyes(swarm, self.progress, self.published.run.run.total_tokens, self._tell_all)
        complete = all(archive.is_final for archive in self.archives)
        return self.done("total_tokens" if complete else "the volunteers left without the last state")

    def done(self, reason: str) -> DoneEvent:
        """Return the final event."""
        return self.ended(reason, self.progress.run_tokens)

    def _wait(self, work: Coroutine[Any, Any, _T]) -> _T:
        return wait_for(self.network.submit(work), self.stop)

    def _enter_stage(self, number: int, shape: RunStageShape, node: Node, me: PeerInfo) -> StageArchive:
        """Enter a stage's swarm, serving what was archived last time."""
        published = self.published.of_stage(number)
        specs = tensor_specs(empty_run_stage(shape).named_parameters())
        checkpointer = checkpointer_of(self.folder, published, me.peer, self.emit, number)
        emit = emit_of_stage(self.emit)
        swarm = Swarm(node, published, specs, average_bytes_untrusted, emit, me, durable=lambda: checkpointer.durable)
        manager = CheckpointManager(self.folder, checkpointer, swarm, self.emit, stage=number)
        archived, leavers = Archive(swarm, manager), DepartureQueue(swarm.membership)
        archive = StageArchive(
            number=number, shape=shape, swarm=swarm, manager=manager, archived=archived, leavers=leavers
        )
        kept = checkpointer.load(published.run, shape.num_parameters)
        if kept is not None:
            self._wait(manager.restore(kept))
            archive.state, archive.progress = kept.state, kept.progress
            self._unjoined.add(number)  # a kill may have come before they were joined
            self._tell(archive)
        archived.restore(kept)
        serving = dataclasses.replace(archived.serving(), hosting=hosting_of(swarm), leavers=leavers)
        self._wait(swarm.start(self.folder.kept_peers(), serving))
        self._wait(swarm.announce())
        return archive

    # ------------------------------------------------------------- archiving

    def _tell(self, archive: StageArchive) -> None:
        """Announce which weights of the stage are on the disk. At the end, volunteers leave once the last weights
        are."""
        total, durable = self.published.run.run.total_tokens, archive.manager.checkpointer.durable
        if durable is None:
            return
        run_tokens = total if archive.is_final else min(durable.run_tokens, total - 1)

        async def tell() -> None:
            archive.swarm.presence.change(round=durable.round, run_tokens=run_tokens)

        self._wait(tell())

    def _archive_until_the_end(self, swarm: Swarm) -> None:
        """Archive each stage as soon as it has been trained, then every `archive_every_s`, and at the end."""
        every_s = self.published.run.network.archive_every_s
        total = self.published.run.run.total_tokens
        next_s, ended_s, end = time.monotonic(), float("inf"), FirstStageWatch(total)
        if self._unjoined:
            self._write_joined()
        if self._had_ended():  # there may be nobody left to report the end
            for archive in self.archives:
                archive.is_final = True
        while not all(archive.is_final for archive in self.archives):
            self.rest([each.leavers for each in self.archives])
            self.control.board.beat()
            self._archive_for_leavers()
            now, counted = time.monotonic(), self.archives[0].swarm.accounting.total
            if end.look(swarm.membership.volunteers(), swarm.membership.known(), counted, now):
                ended_s = min(ended_s, now)
                self._archive_ended(time.monotonic() > ended_s + _LAST_ROUND_S)
                if time.monotonic() > ended_s + _LAST_ROUND_S + LINGER_S:
                    self.emit(
                        WarningEvent(
                            message="the run is over, but no volunteer delivered its last weights: the archive is "
                            "older; start a volunteer again, and then this bootstrap, to have them",
                            code="last-state-lost",
                        )
                    )
                    return
            else:
                self._archive_the_lonely()
                if time.monotonic() >= next_s:
                    next_s = time.monotonic() + (every_s if self._archive_all(every_s) else min(every_s, 5.0))
            self._keep_peers()

    def _had_ended(self) -> bool:
        """Return whether the run had ended before this process started: only then is there a model of all stages in the
        folder.
        """
        has_all = all(archive.state is not None for archive in self.archives)
        return has_all and kept_final_model(self.folder, self.published) is not None

    def _archive_all(self, every_s: float) -> bool:
        """Archive every stage that has something new; return whether all stages are newer than the joined model.

        The joined model is large, so it is written when all stages are new, or every `every_s` seconds.
        """
        for archive in self.archives:
            self._archive(archive)
        is_all = len(self._unjoined) == len(self.archives)
        if is_all or (self._unjoined and time.monotonic() >= self._joined_s + every_s):
            self._write_joined()
        return is_all

    def _archive_for_leavers(self) -> None:
        """Archive each stage that only leaving peers still train, then the joined model, since nobody else may come for
        long.
        """
        any_taken = False
        for archive in self.archives:
            swarm, leavers = archive.swarm, archive.leavers
            if not leavers.is_asked(swarm_time()):
                continue
            self._wait(swarm.greeter.greet_some())
            waiting = leavers.waiting(swarm_time())
            if waiting and archive.archived.watch.is_new(swarm.membership.volunteers()):
                self._archive(archive)
            if waiting and not archive.archived.watch.is_new(swarm.membership.volunteers()):
                leavers.taken(waiting, swarm_time())
                any_taken = True
        if any_taken and self._unjoined:
            self._write_joined()

    def _archive_the_lonely(self) -> bool:
        """Archive each stage held by a single peer after each of its rounds, since it would be lost with that peer.

        Returns whether anything was archived.
        """
        found = False
        for archive in self.archives:
            infos = archive.swarm.membership.volunteers()
            if len(infos) == 1 and infos[0].round > archive.progress.round:
                found = self._archive(archive, anyway=True) or found
        return found

    def _archive_ended(self, is_late: bool) -> None:
        """Archive the last weights of stages whose peers all have them, or of all stages if it is late.

        For the first stage one peer that has them is enough: drivers that did not report the end were waited for before
        the end was seen.
        """
        total = self.published.run.run.total_tokens
        for archive in self.archives:
            told = [info.run_tokens >= total for info in archive.swarm.membership.volunteers()]
            ended = any(told) if archive.number == 0 else bool(told) and all(told)
            if not archive.is_final and (ended or is_late):
                archive.is_final = self._archive(archive, anyway=True) or (is_late and archive.state is not None)
                self._tell(archive)
        if all(archive.is_final for archive in self.archives):
            self._write_joined()

    def _archive(self, archive: StageArchive, anyway: bool = False) -> bool:
        """Pull the stage's present weights, write them to disk, and offer them; return False if there is nothing
        new.
        """
        if not anyway and not archive.archived.watch.is_new(archive.swarm.membership.volunteers()):
            return False
        present = self._wait(self._pulled(archive, ARCHIVED, None, anyway))
        if present is None:
            return False
        self._keep(archive, present)
        archive.manager.checkpointer.flush(FLUSH_S)
        self._tell(archive)
        return True

    async def _pulled_soon(self, archives: Sequence[StageArchive]) -> list[ConsensusState | BaseException | None]:
        """Pull what a few peers of each stage have, all stages at once; a failed stage does not hold up the others."""
        pulls = (self._pulled(archive, LAST_SAMPLE, _LAST_PULL_S, anyway=True) for archive in archives)
        return await asyncio.gather(*pulls, return_exceptions=True)

    async def _pulled(
        self, archive: StageArchive, most_peers: int, limit_s: float | None, anyway: bool = False
    ) -> ConsensusState | None:
        """Pull the weights of a sample of the stage's peers.

        Returns None if they hold no more than the archive (unless `anyway`), or if nobody delivers within `limit_s`
        seconds.
        """
        infos = archive.swarm.membership.volunteers()
        volunteers = [info.peer for info in infos]
        sample = random.sample(volunteers, min(most_peers, len(volunteers)))
        if not sample:
            return None
        archive.archived.asks(infos)
        is_wanted = None if anyway else archive.archived.is_wanted
        try:
            async with asyncio.timeout(limit_s):
                return await fetch_consensus_state(archive.swarm, sample, "archive", 0, is_wanted)
        except TimeoutError:
            return None

    def _keep(self, archive: StageArchive, present: ConsensusState) -> None:
        manager = archive.manager
        kept = archive.archived.kept_of(present)
        self.has_news = True
        manager.keep(kept)
        self._wait(manager.offer(kept))
        archive.state, archive.progress = kept.state, kept.progress
        self._unjoined.add(archive.number)

    def archive_once_more(self) -> None:
        """Archive what the volunteers of each stage have now, within some seconds, because this peer was asked to
        leave.
        """
        if not self.archives or all(archive.is_final for archive in self.archives):
            return
        self.count_once_more(self.archives[0].swarm, [archive.manager for archive in self.archives])
        self.stop = self.stop.last_work(LAST_ARCHIVE_S)
        self.control.board.doing(control_pb.PEER_STATE_FINISHING, "leaving: taking one last archive")
        open_ones = [archive for archive in self.archives if not archive.is_final]
        try:
            for archive, present in zip(open_ones, self._wait(self._pulled_soon(open_ones)), strict=True):
                if isinstance(present, ConsensusState):
                    self._keep(archive, present)
        except (Interrupted, SwarmtrainError) as error:
            _log.info("some stages are not archived once more before the end: %r", error)
        self._write_joined()

    def _keep_peers(self) -> None:
        assert self.peers is not None
        with contextlib.suppress(OSError):  # the archive's warning says so too
            self.peers.keep()
            if time.monotonic() >= self._counts_kept_s + COUNTS_EVERY_S:
                self._counts_kept_s = time.monotonic()
                for archive in self.archives:
                    archive.manager.keep_counts()
                    if archive.state is not None:
                        self._wait(archive.archived.serve_counts(archive.state, archive.progress))

    # ------------------------------------------------------------- the model

    def _joined(self) -> Mapping[str, Tensor] | None:
        """Return the whole model's weights, or None if a stage was never archived."""
        is_whole = len(self.archives) == self.published.run.pipeline.stages
        if not is_whole or any(archive.state is None for archive in self.archives):
            return None
        return joined_weights(archive.weights() for archive in self.archives)

    def _write_joined(self) -> None:
        if (weights := self._joined()) is not None:
            self.write_archive(weights, self.progress)
            self._unjoined.clear()
            self._joined_s = time.monotonic()

    def _measure_and_save(self) -> None:
        if (weights := self._joined()) is not None:
            model = empty_model(ModelSpec(self.published.run.model, self.model_folder))
            model.load_state_dict(weights)
            self.measure_and_save(model, self.progress)

    def _tell_all(self) -> None:
        for archive in self.archives:
            self._tell(archive)

    def leave_stages(self) -> None:
        """Say goodbye to the peers that hold stages, before the run's swarm is left. See `BootstrapPeer`."""
        for archive in self.archives:
            try:
                self.network.run(archive.swarm.withdraw(1.0), 2.0)
            except (TimeoutError, RunTimeError):
                pass
            archive.manager.close()

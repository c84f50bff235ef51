"""Common part of the two kinds of bootstrap: that of a run, and that of a run whose model is cut into stages.

Methods run on the main thread and submit work to the network thread.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from swarmtrain.data.tokens import Tokenizer, tokenizer_from_bytes_untrusted
from swarmtrain.errors import RunTimeError, UserError
from swarmtrain.events import ArchivedEvent, DoneEvent, WarningEvent, stamped
from swarmtrain.model.evaluation import TextLoss
from swarmtrain.model.language_model import LanguageModel
from swarmtrain.network.daemon import swarm_time
from swarmtrain.network.discovery.run_lookup import PublishedRun
from swarmtrain.network.node import NetworkThread, Node
from swarmtrain.network.swarm import Swarm
from swarmtrain.peer.checkpoints.archive_sampler import ArchiveSampler, held_out_point, text_sample
from swarmtrain.peer.checkpoints.manager import CheckpointManager, PeersFile
from swarmtrain.peer.control.limits import limit_link
from swarmtrain.peer.control.session import ControlSession
from swarmtrain.peer.lifecycle.folder import PeerFolder
from swarmtrain.peer.lifecycle.node import (
    Emit,
    PeerSettings,
    as_peer,
    eval_event,
    had_ended,
    held_out_loss_of,
    kept_final_model,
    save_final_weights,
    save_weights,
    start_node,
)
from swarmtrain.peer.lifecycle.process import process_age_s
from swarmtrain.peer.lifecycle.stop import StopFlag
from swarmtrain.peer.model_files.fetcher import FilesPlace, SwarmSource, fetch_and_serve
from swarmtrain.peer.model_files.model_folder import ModelFolder
from swarmtrain.protocol.archive.departure import DepartureQueue
from swarmtrain.protocol.membership.membership import PeerInfo, may_come_back
from swarmtrain.protocol.tokens.progress import Progress
from swarmtrain.words import short_peer

_log = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0
_NAPS, _EARLY_LOOKS = 10, 3
COUNTS_EVERY_S = 5.0
"""Seconds between two writes of the counts, if they have changed."""

LAST_COUNT_S = 1.0
LINGER_S = 60.0
_FINAL_SAMPLE_S = 5.0
"""Longest time in which the final model writes: volunteers may wait for this peer's goodbye."""
FLUSH_S = 5.0
LAST_SAMPLE = 4
"""Peers that are asked for a last archive."""

LAST_ARCHIVE_S = 4.0
"""Seconds that the last archive may take when a bootstrap is asked to leave."""


@dataclass
class BootstrapPeer:
    """Peer that publishes, serves and archives, and does not train."""

    published: PublishedRun
    settings: PeerSettings
    folder: PeerFolder
    network: NetworkThread
    control: ControlSession
    emit: Emit = field(init=False)
    stop: StopFlag = field(init=False)
    node: Node | None = None
    swarm: Swarm | None = None
    manager: CheckpointManager | None = None
    peers: PeersFile | None = None
    model_place: FilesPlace | None = None
    """Where this machine may have the files of the run's model; None if the model is built in."""
    model_files: ModelFolder | None = None
    """Files of the run's model, which this peer serves; None if the model is built in, and before they are found."""
    name: str = ""
    loss: TextLoss | None = None
    """Held-out loss at the run's end, once it was measured; None too if it is not a finite number."""
    has_news: bool = False
    """True if anything was archived since this process started. Then the archived weights are newer than a model left
    in the folder."""
    sampler: ArchiveSampler | None = None
    """Measures the archive while the run goes on; None before the first one, or if that is not wanted."""
    since_s: float = field(default_factory=swarm_time)
    _early_looks: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self.emit, self.stop = self.control.emit, self.control.stop

    @property
    def model_folder(self) -> Path | None:
        """Folder of the run's pinned model files; None if its model is built in."""
        return None if self.model_files is None else self.model_files.path

    def enter_network(self) -> tuple[Node, PeerInfo]:
        """Start listening; return the node, and this peer's description."""
        self.control.starting("starting the network")
        node = self.node = start_node(self.network, self.settings, self.folder, self.stop)
        limit_link(node.traffic, self.settings.limits, self.published.run.network)
        if self.model_place is not None:
            known = self.folder.kept_peers()
            others = SwarmSource(self.network, node, known) if known else None
            self.model_files = fetch_and_serve(self.published, self.model_place, node, others)
        self.name = self.settings.name or short_peer(node.identity.peer_id)
        self.emit = as_peer(self.emit, node.identity.peer_id, self.name)
        return node, PeerInfo(peer=node.identity.peer_id, name=self.name, is_bootstrap=True)

    def write_archive(self, weights: Mapping[str, Tensor], progress: Progress) -> None:
        """Write the model's weights, by name, so that other programs can read them; emit a warning if the folder cannot
        be written."""
        path = self.folder.archive_path
        try:
            save_weights(path, weights, self.published, progress, self.model_folder)
        except OSError as error:
            self.emit(
                WarningEvent(
                    message=f"the archive could not be written to {path}: {error.strerror}; make room there or make it "
                    "writable: the next archive is written as usual",
                    code="archive-not-written",
                )
            )
        except UserError as error:
            self.emit(
                WarningEvent(message=f"the archive could not be written to {path}: {error}", code="archive-not-written")
            )
        else:
            self.emit(ArchivedEvent(round=progress.round, run_tokens=progress.run_tokens, path=str(path)))
            self._sample(progress)

    def _sample(self, progress: Progress) -> None:
        """Let the new archive be measured when that can be afforded."""
        if not self.settings.samples_archive:
            return
        if self.sampler is None:
            record, files = self.control.board.history.add_sample, lambda: self.model_folder
            self.sampler = ArchiveSampler(self.published, self.folder.archive_path, self.emit, record, files)
        self.sampler.offer(progress)

    def stop_sampling(self) -> None:
        """End the measurement of the archive: this peer measures the model at the run's end, or leaves."""
        if self.sampler is not None:
            self.sampler.close()

    def measure_and_save(self, model: LanguageModel, progress: Progress) -> None:
        """Measure the held-out loss at the run's end and save the model.

        A final model that an earlier process left in the folder stays as it is if nothing was archived since.
        """
        self.stop_sampling()
        kept = None if self.has_news else kept_final_model(self.folder, self.published, self.model_folder)
        model = model if kept is None else kept
        tokenizer = tokenizer_from_bytes_untrusted(self.published.tokenizer, self.published.run.model.vocabulary_size)
        loss = held_out_loss_of(model, self.published, tokenizer, self.stop.check)
        self.loss = loss if loss.is_finite else None
        self.emit(eval_event(max(0, progress.round - 1), loss))
        if kept is not None:
            self.emit(had_ended(self.folder))
            return
        weights = dict(model.trained_parameters())
        warning = save_final_weights(self.folder, weights, self.published, progress, loss, self.model_folder)
        if warning is not None:
            self.emit(warning)
        if loss.is_finite:
            self._sample_final(model, tokenizer, progress, loss)

    def _sample_final(self, model: LanguageModel, tokenizer: Tokenizer, progress: Progress, loss: TextLoss) -> None:
        """Let the final model write, for the page and for a report: some seconds at most, none if it must leave."""
        if not self.settings.samples_archive:
            return
        until_s = time.monotonic() + _FINAL_SAMPLE_S

        def goes_on() -> bool:
            self.control.board.beat()
            return time.monotonic() < until_s and not self.stop.is_set()

        point, history = held_out_point(progress, loss), self.control.board.history
        try:
            sample = text_sample(model, self.published, tokenizer, progress, goes_on)
        except Exception:  # whatever it is, such as weights that are no numbers: the run has ended, and is saved
            _log.exception("the final model could not write a sample")
            history.add(point)
        else:
            history.add_sample(point, sample)

    def rest(self, leavers: Sequence[DepartureQueue]) -> None:
        """Sleep for a second, or until a volunteer asks whether it may leave, since it waits for the next look.

        At most three looks in a row are early, however many ask.
        """
        asked = False
        for _ in range(_NAPS):
            self.stop.sleep(LOOK_EVERY_S / _NAPS)
            asked = sum(each.take_news() for each in leavers) > 0 or asked
            if asked and self._early_looks < _EARLY_LOOKS:
                self._early_looks += 1
                return
        self._early_looks = 0

    def wait_for_goodbyes(
        self, swarm: Swarm, progress: Progress, total_tokens: int | None, tell: Callable[[], None]
    ) -> None:
        """Continue to serve until the volunteers have left, and for those that may come back; a minute at most."""
        give_up_s = time.monotonic() + LINGER_S
        while time.monotonic() < give_up_s:
            tell()
            if not may_come_back(swarm.membership, progress, self.since_s, swarm_time(), total_tokens):
                return
            self.stop.sleep(0.1)

    def count_once_more(self, swarm: Swarm, managers: Sequence[CheckpointManager]) -> None:
        """Count and store what the volunteers have reported so far, because this peer was asked to leave."""
        with contextlib.suppress(TimeoutError, RunTimeError):
            self.network.run(swarm.accounting.read_all(), LAST_COUNT_S)
        with contextlib.suppress(OSError):  # the archive's warning says so
            for manager in managers:
                manager.keep_counts()

    def leave_stages(self) -> None:
        """Say goodbye to the peers that hold stages, before the run's swarm is left. A run without stages has none."""

    def ended(self, reason: str, run_tokens: int) -> DoneEvent:
        """Return the final event."""
        event = DoneEvent(
            held_out_loss=None if self.loss is None else self.loss.nats_per_byte,
            sources=() if self.loss is None else tuple(self.loss.by_source),
            source_losses=() if self.loss is None else self.loss.source_losses,
            tokens=0,
            run_tokens=run_tokens,
            wall_s=process_age_s(),
            reason=reason,
        )
        return stamped(event, 0.0, "" if self.node is None else self.node.identity.peer_id, self.name)

"""Keep what a peer needs in its folder while it runs, so that it can continue after a restart.

Checkpoints hold the state and everyone's token counts. `peers.json` beside them lists peers to dial when none of the
invite answers any more. A bootstrap writes checkpoints rarely, so it also keeps the counts in `counts.json`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from swarmtrain.errors import BadBytesError, RunTimeError, UserError
from swarmtrain.events import WarningEvent
from swarmtrain.network.codec import body_of_state
from swarmtrain.network.daemon import swarm_time
from swarmtrain.network.discovery.invite import Invite, InvitedPeer
from swarmtrain.network.discovery.run_lookup import PublishedRun
from swarmtrain.network.swarm import Swarm
from swarmtrain.peer.checkpoints.checkpoint import Checkpoint
from swarmtrain.peer.checkpoints.files import CheckpointFolder, StoredCheckpoint
from swarmtrain.peer.checkpoints.writer import Checkpointer
from swarmtrain.peer.lifecycle.folder import PeerFolder
from swarmtrain.peer.lifecycle.node import Emit
from swarmtrain.peer.training.session import Session
from swarmtrain.v1 import control_pb2 as control_pb

_log = logging.getLogger(__name__)
_MAX_PEERS = 16
_NUM_AWAY = 4
_FLUSH_S = 10.0
_ASKED_FLUSH_S = 60.0
_CHAIN = "chain"
_TALLY = "tally"
_TALLY_UNTIL = "tally_until"


def checkpointer_of(
    folder: PeerFolder, published: PublishedRun, peer: str, emit: Emit, stage: int | None = None
) -> Checkpointer:
    """Return the reader and writer of a peer's checkpoints in one run; each stage of a pipeline has a folder of its
    own.
    """
    path = folder.checkpoints_path
    if stage is not None:
        with contextlib.suppress(OSError):  # the first checkpoint reports it
            path.mkdir(0o700, exist_ok=True)
        path = stage_path(folder, stage)
    return Checkpointer(CheckpointFolder(path, published.sha256, peer), emit)


@dataclass
class CheckpointManager:
    """Keeps the files of one peer in one run: checkpoints, and the counts of its swarm."""

    folder: PeerFolder
    checkpointer: Checkpointer
    swarm: Swarm
    emit: Emit
    stage: int | None = None
    """Stage of a pipeline whose counts these are, in a file of their own; None for the whole run."""
    peers: PeersFile | None = None
    """File of known peers, written with each checkpoint. A pipeline has one for the whole run."""
    extras: dict[str, Callable[[], Any]] = field(default_factory=dict)
    """Functions, by name, that return what other parts keep in each checkpoint. `extra` calls them in the trainer's
    thread."""
    _kept_rows: list[list[str | int | float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        swarm = self.swarm
        own: dict[str, Callable[[], Any]] = {_TALLY: swarm.accounting.kept, _TALLY_UNTIL: swarm_time}
        if not swarm.asynchronous:
            own[_CHAIN] = swarm.rounds.chains.kept
        self.extras = own | self.extras

    async def restore(self, kept: Checkpoint) -> None:
        """Restore the counts of a loaded checkpoint and offer its state. Runs in the network thread."""
        swarm = self.swarm
        self._restore_counts(kept.extra.get(_TALLY, []), kept.extra.get(_TALLY_UNTIL))
        if not swarm.asynchronous and _CHAIN in kept.extra:
            chains, settings = swarm.rounds.chains, swarm.rounds.settings
            try:
                await asyncio.to_thread(chains.restore_untrusted, kept.extra[_CHAIN], settings)
            except BadBytesError as error:
                _log.warning("the rosters before the checkpoint are not known: %s", error)
        await self.offer(kept)

    def _restore_counts(self, rows: Any, until_s: Any) -> None:
        try:
            self.swarm.accounting.restore(rows, None if until_s is None else float(until_s))
        except (ValueError, TypeError) as error:
            self.emit(
                WarningEvent(
                    message=f"cannot use the token counts in the checkpoint ({error}); this peer reads them from the "
                    "swarm again",
                    code="checkpoint-partly-used",
                )
            )

    async def offer(self, kept: Checkpoint) -> None:
        """Offer a checkpoint's state to other peers. Runs in the network thread."""
        swarm = self.swarm
        if kept.roster is not None and kept.signed_roster is not None:
            swarm.rounds.know_roster(kept.roster, kept.signed_roster)
        swarm.set_state(kept.progress, body_of_state(kept.state))

    # ------------------------------------------------------------- while it runs

    def extra(self) -> dict[str, Any]:
        """Return, by name, the data that other parts keep in a checkpoint taken now."""
        return {name: give() for name, give in self.extras.items()}

    def keep(self, checkpoint: Checkpoint) -> None:
        """Hand a checkpoint to the writer, which also writes the known peers."""
        self.checkpointer.offer(checkpoint, None if self.peers is None else self.peers.keep)

    def keep_round(self, session: Session) -> None:
        """Hand the replica's state after a round to the writer, with this peer's own part and the roster behind it, if
        any.
        """
        swarm, replica = self.swarm, session.replica
        last = swarm.rounds.last
        # Without its roster a state could not be proved to others.
        if not swarm.asynchronous and (last is None or last[0].digest != replica.progress.roster_sha256):
            _log.warning("no checkpoint of round %d: its roster is not known", replica.progress.round)
            return
        room = self.checkpointer.room(replica.state.size)
        self.keep(
            Checkpoint(
                state=replica.state.frozen(),
                progress=replica.progress,
                roster=None if last is None else last[0],
                signed_roster=None if last is None else last[1],
                own=session.local_checkpoint(room),
                extra=self.extra(),
            )
        )

    # ------------------------------------------------------------- for who asks

    def flushed(self) -> control_pb.CheckpointReply:
        """Wait until the last round's checkpoint is on the disk, and return it. Raises RunTimeError if there is none or
        it cannot be written."""
        done, last = self.checkpointer.flush(_ASKED_FLUSH_S), self.checkpointer.last
        if not done:
            raise RunTimeError(
                f"the newest checkpoint is not on the disk yet; check that {self.folder.path} has room",
                code="checkpoint-not-written",
            )
        if last is None:
            raise RunTimeError(
                "there is no checkpoint yet: the first is written when the first round is merged; try again then",
                code="no-checkpoint",
            )
        return control_pb.CheckpointReply(round=last.round, path=str(last.path))

    def show(self, status: control_pb.PeerStatus) -> None:
        """Fill into `status` the newest checkpoint on the disk."""
        if (last := self.checkpointer.last) is not None:
            kept = control_pb.KeptCheckpoint(round=last.round, time=last.time, size_bytes=last.size_bytes)
            status.checkpoint.CopyFrom(kept)

    def restore_counts(self) -> None:
        """Restore the counts in `counts.json` too, if they are of this run. The greater count stands, so an old file
        does no harm.
        """
        kept = self.folder.kept_counts(self.stage)
        if isinstance(kept, dict) and kept.get("run_sha256") == self.swarm.published.sha256:
            self._restore_counts(kept.get(_TALLY, []), kept.get(_TALLY_UNTIL))

    def keep_counts(self) -> None:
        """Write the counts if they have changed, so that a kill does not lose them until the next checkpoint.

        Any thread may call it. Raises OSError.
        """
        rows = self.swarm.accounting.kept()
        if rows and rows != self._kept_rows:
            counts = {"run_sha256": self.swarm.published.sha256, _TALLY_UNTIL: swarm_time(), _TALLY: rows}
            self.folder.keep_counts(counts, self.stage)
            self._kept_rows = rows

    def close(self) -> None:
        """Wait for the last checkpoint, 10 s at most."""
        if not self.checkpointer.close(_FLUSH_S):
            _log.warning("the last checkpoint is not on the disk; the one before it is")


class PeersFile:
    """Keeps `peers.json`: the peers to dial after a restart. Thread-safe."""

    def __init__(self, folder: PeerFolder, swarm: Swarm) -> None:
        self._folder, self._swarm = folder, swarm
        self._known = folder.kept_peers()
        self._lock = threading.Lock()

    def keep(self) -> None:
        """Write the known peers, if they have changed. Raises OSError."""
        infos = sorted(self._swarm.membership.live(), key=lambda info: not info.is_bootstrap)
        live = [InvitedPeer(info.peer, info.addresses) for info in infos if info.addresses]
        with self._lock:
            known = known_peers(live, self._known)
            if known != self._known:
                self._folder.keep_peers(known)
                self._known = known


def known_peers(newest: list[InvitedPeer], before: tuple[InvitedPeer, ...]) -> tuple[InvitedPeer, ...]:
    """Return the present peers, then some of the former ones, 16 in all at most.

    A few places are kept for peers that are away: one of them may be the only one to come back.
    """
    here = {peer.peer for peer in newest}
    away = [peer for peer in before if peer.peer not in here]
    return (*newest[: _MAX_PEERS - min(len(away), _NUM_AWAY)], *away)[:_MAX_PEERS]


def kept_stages(folder: PeerFolder, published: PublishedRun, peer: str, num_stages: int) -> Mapping[int, int]:
    """Return the stages of a pipeline that have checkpoints here, with the round of each one's newest."""
    rounds: dict[int, int] = {}
    for stage in range(num_stages):
        files = CheckpointFolder(stage_path(folder, stage), published.of_stage(stage).sha256, peer)
        with contextlib.suppress(OSError):
            newest = next((entry for entry in files.newest_first() if isinstance(entry, StoredCheckpoint)), None)
            if newest is not None:
                rounds[stage] = newest.manifest["round"]
    return rounds


def stage_path(folder: PeerFolder, stage: int) -> Path:
    """Return the folder of a stage's checkpoints."""
    return folder.checkpoints_path / f"stage-{stage}"


def run_to_resume(folder: PeerFolder, invite: Invite, peer: str) -> PublishedRun | None:
    """Return the run of `invite` if the folder has it whole, with a checkpoint to continue from; else None."""
    try:
        published = folder.kept_run()
    except UserError as error:
        _log.info("not resumed: %s", error)
        return None
    if published is None or published.sha256 != invite.run_sha256:
        return None
    files = CheckpointFolder(folder.checkpoints_path, published.sha256, peer)
    num_stages = published.run.pipeline.stages
    try:
        if num_stages > 1 and kept_stages(folder, published, peer, num_stages):
            return published
        return published if any(isinstance(entry, StoredCheckpoint) for entry in files.newest_first()) else None
    except OSError as error:
        _log.warning("not resumed: the checkpoints in %s cannot be read: %s", files.path, error.strerror)
        return None

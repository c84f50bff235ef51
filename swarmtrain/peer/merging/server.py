"""Server of asynchronous Local-SGD (arXiv 2401.09135), run by the bootstrap with `merge.method = "server"`.

It applies each pseudo-gradient as it arrives, by delayed Nesterov, and publishes the weights that follow. It waits for
nobody, and nobody waits for it. Its weights are the run's; the archive is a copy of them.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from swarmtrain.algorithm.outer import Buffer, DelayedNesterov, OuterConstants, OuterState, momentum_at
from swarmtrain.algorithm.robust import ClipIncident
from swarmtrain.events import ClippedEvent, WarningEvent
from swarmtrain.network.asynchronous.publications import OwnPublication, Publisher
from swarmtrain.network.asynchronous.server_link import GradientReceiver, Pulls, UploadRules, describe_weights
from swarmtrain.network.codec import PublicationCodec, body_of
from swarmtrain.network.daemon import swarm_time
from swarmtrain.network.identity import peer_bytes
from swarmtrain.network.snapshots.store import Body, HeldSnapshot
from swarmtrain.network.swarm import Swarm
from swarmtrain.network.tasks import end_tasks
from swarmtrain.network.tensor_groups import groups_of
from swarmtrain.peer.checkpoints.checkpoint import Checkpoint
from swarmtrain.peer.merging.consensus import layout_of_specs
from swarmtrain.peer.merging.robustness import Naming, Robustness
from swarmtrain.protocol.membership.budgets import NamedOnce
from swarmtrain.protocol.server import UploadVersions, too_old
from swarmtrain.protocol.tokens.progress import Progress
from swarmtrain.v1 import snapshot_pb2 as pb
from swarmtrain.words import short_peer

_log = logging.getLogger(__name__)
_DRAIN_S = 20.0
_MAX_ENTERED = 256
"""Limit of workers whose last rounds are listed in the manifest of the weights: more would not fit."""
_KEPT = "server"


class MergeServer:
    """Applies what a run's workers upload. Coroutines run in the network thread, computing on a pool."""

    def __init__(self, swarm: Swarm, state: OuterState, keep: Callable[[Checkpoint], None]) -> None:
        """Start from `state`. `keep` is called with a checkpoint each time the momentum was refreshed."""
        self.swarm, self.section = swarm, swarm.published.run.merge
        section, rounds = self.section, swarm.rounds.settings
        self.arrivals = self.refreshes = 0
        self.versions = UploadVersions()
        self._keep = keep
        self._outer = DelayedNesterov(state, self._constants(), max(1, section.buffer_arrivals), section.momentum_share)
        self._robustness = Robustness(section.robust, layout_of_specs(swarm.specs), Naming(self._tell_clipped))
        codec = PublicationCodec(groups_of(swarm.specs, section.theta_format, section.gradient_formats))
        self._weights, (self._gradients,) = codec.weights, codec.gradient.of.values()
        self.publisher = Publisher(swarm.identity, rounds.run_sha256, self._weights.tensors, swarm.store)
        pulls = Pulls(
            swarm.calls,
            rounds.run_sha256,
            self._gradients.tensors,
            rounds.pull,
            swarm.presence.signed,
            swarm.peers.receive_reply_untrusted,
        )
        rules = UploadRules(max_tokens=rounds.max_tokens * section.max_staleness_rounds, refuse=self._too_old)
        self.intake = GradientReceiver(
            swarm.membership, pulls, self.versions, rules, self.take, self._tell_too_old, swarm.peers.refused
        )
        self._taking = asyncio.Lock()
        self._named = NamedOnce()
        self._task: asyncio.Task[None] | None = None

    @property
    def state(self) -> OuterState:
        """Weights and momentum of the run."""
        return self._outer.state

    @property
    def progress(self) -> Progress:
        """Progress of the run. A round ends with each refresh of the momentum; one that has begun counts."""
        counts = self.swarm.accounting.contributions()
        round = self.refreshes + (self._outer.buffer.arrivals > 0)
        return Progress(round=round, run_tokens=sum(counts.values()), peer_tokens=counts)

    # ------------------------------------------------------------- life

    def restore(self, kept: Checkpoint) -> None:
        """Continue from a checkpoint. Raises ValueError or TypeError, changing nothing, if it does not fit."""
        row = kept.extra.get(_KEPT)
        if not isinstance(row, Mapping) or kept.delta is None:
            raise ValueError("it is none of a server")
        counts = [row.get(name) for name in ("arrivals", "refreshes", "buffer_arrivals")]
        if not all(isinstance(count, int) and count >= 0 for count in counts):
            raise ValueError(f"its counts are {counts}")
        arrivals, refreshes, in_buffer = (int(count) for count in counts if count is not None)
        versions = UploadVersions()
        versions.load(row.get("marks", []))
        section = self.section
        outer = DelayedNesterov(
            kept.state,
            self._constants(),
            self._outer.num_arrivals,
            section.momentum_share,
            Buffer(kept.delta, in_buffer),
        )
        self._robustness.restore(row)
        self.versions.load(versions.rows())
        self._outer, self.arrivals, self.refreshes = outer, arrivals, refreshes

    async def start(self) -> None:
        """Serve the weights and accept uploads from now on."""
        self._serve()
        self._task = asyncio.create_task(self.intake.run())
        self._task.add_done_callback(self._ended)

    async def stop(self) -> None:
        """Accept no more uploads; the weights stay as they are, and served."""
        if self._task is not None:
            await end_tasks([self._task])
            self._task = None

    async def drain(self) -> None:
        """Apply the rounds that workers have not uploaded yet, for 20 s at most."""
        await self.intake.drain(_DRAIN_S)

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("a server task failed", exc_info=error)
            self.swarm.emit(
                WarningEvent(
                    message=f"an error in this peer's network code ({error}); restart this peer", code="network-broke"
                )
            )

    def checkpoint(self, extra: Mapping[str, Any]) -> Checkpoint:
        """Return a checkpoint with everything needed to continue, together with the `extra` of other parts."""
        buffer = self._outer.buffer
        row = {
            "arrivals": self.arrivals,
            "refreshes": self.refreshes,
            "buffer_arrivals": buffer.arrivals,
            "marks": self.versions.rows(),
            **{name: give() for name, give in self._robustness.kept().items()},
        }
        return Checkpoint(
            state=self.state,
            progress=self.progress,
            roster=None,
            signed_roster=None,
            delta=buffer.delta,
            extra={**extra, _KEPT: row},
        )

    async def checkpoint_when_idle(self, extra: Mapping[str, Any]) -> Checkpoint:
        """Return `checkpoint`, taken while no gradient is being applied."""
        async with self._taking:
            return self.checkpoint(extra)

    # ------------------------------------------------------------- taking in

    async def take(self, peer: str, held: HeldSnapshot) -> None:
        """Apply the pseudo-gradient that `peer` uploaded, unless that round has entered already.

        Raises BadBytesError if it is not a vector of numbers.
        """
        gradient = await asyncio.to_thread(self._decode_untrusted, peer, held)
        manifest = held.snapshot.manifest
        async with self._taking:
            # Decoding ran outside the lock: the same round may have entered meanwhile.
            if not self.versions.is_new(peer, manifest.round):
                return
            await asyncio.to_thread(self._apply, gradient)
            self.versions.enter(peer, manifest.round)
            self.swarm.accounting.receive(peer, manifest.author_tokens)
            self._serve()
            if not self._outer.buffer.arrivals:
                self._keep(self.checkpoint({}))

    def _decode_untrusted(self, peer: str, held: HeldSnapshot) -> Tensor:
        gradient = self._gradients.decode_untrusted(held)
        manifest = held.snapshot.manifest
        return self._robustness.accept_gradient(peer, gradient, manifest.tokens, self.state.theta, manifest.round)

    def _apply(self, gradient: Tensor) -> None:
        outer = self._outer
        outer.num_arrivals = self._buffer_arrivals()
        # The arrivals of one buffer share its constants, which change with the number of refreshes.
        if not outer.buffer.arrivals:
            outer.constants = self._constants()
        if not bool(torch.isfinite(outer.arrive(gradient).theta).all()):
            _log.error("the weights are no longer finite")
        self.arrivals += 1
        self.refreshes += not outer.buffer.arrivals

    def _constants(self) -> OuterConstants:
        section = self.section
        momentum = momentum_at(self.refreshes, section.outer_momentum, section.momentum_ramp_rounds)
        return OuterConstants(learning_rate=section.outer_learning_rate, momentum=momentum)

    def _buffer_arrivals(self) -> int:
        """Return N, the arrivals between two refreshes: the configured number, or the number of workers."""
        return self.section.buffer_arrivals or max(1, len(self.swarm.membership.volunteers()))

    def _too_old(self, manifest: pb.Manifest) -> str:
        limit = self.section.max_staleness_rounds
        return too_old(manifest.arrivals, self.arrivals, self._buffer_arrivals(), limit)

    def _tell_too_old(self, peer: str, reason: str) -> None:
        _log.info("rejected the upload of %s: %s", peer, reason)
        if self._named.is_due(peer, swarm_time()):
            info = self.swarm.membership.info(peer)
            name = (info.name if info is not None else "") or short_peer(peer)
            message = f"rejected the upload of {name}: {reason}; it continues from the newest weights"
            self.swarm.emit(WarningEvent(message=message, code="update-too-old"))

    def _tell_clipped(self, peer: str, incident: ClipIncident) -> None:
        self.swarm.emit(ClippedEvent(from_peer=peer, rule=incident.rule, detail=incident.detail))

    # ------------------------------------------------------------- serving

    def _serve(self) -> None:
        """Publish the present weights to the workers and the state to joiners. Runs in the network thread."""
        state, arrivals, progress = self.state, self.arrivals, self.progress
        if not arrivals:
            return  # everybody has the initial weights already
        entered = self.versions.newest(_MAX_ENTERED)

        def fill(manifest: pb.Manifest) -> None:
            describe_weights(manifest, arrivals, entered)

        def fill_counts(manifest: pb.Manifest) -> None:
            fill(manifest)
            manifest.run_tokens = progress.run_tokens
            for peer in entered:
                manifest.peer_tokens.add(peer=peer_bytes(peer), tokens=progress.peer_tokens.get(peer, 0))

        self.publisher.newest = OwnPublication(
            round=arrivals,
            part=1,
            tokens=0,
            inner_steps=0,
            author_tokens=0,
            encode=lambda: Body([self._weights.encode(state.theta)]),
            fill=fill_counts,
        )
        swarm = self.swarm
        swarm.set_state(progress, body_of(state.theta, state.momentum), fill)
        swarm.presence.change(round=progress.round)

"""Transfer publications between workers and the server of `merge.method = "server"`.

A worker's rounds and the server's weights are both publications, pulled like any other. The server asks every worker
for the rounds that it lacks, oldest first; a worker asks the server for its newest weights late in each round. This
module checks what arrives, and does not decide what happens to the weights (decision 22).
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from swarmtrain.errors import BadBytesError, BusyError, PeerError
from swarmtrain.network.asynchronous.publications import OwnPublication, Publisher
from swarmtrain.network.daemon import swarm_time
from swarmtrain.network.identity import peer_bytes, peer_id_from_bytes_untrusted
from swarmtrain.network.service import PeerCalls
from swarmtrain.network.snapshots.download import download_snapshot
from swarmtrain.network.snapshots.store import (
    Body,
    HeldSnapshot,
    PullLimits,
    Snapshot,
    TensorSpec,
    empty_held,
    manifest_untrusted,
)
from swarmtrain.network.tasks import end_tasks, logged
from swarmtrain.protocol.gossip.partners import BackOff
from swarmtrain.protocol.gossip.pulls import expected_transfer, pull_start
from swarmtrain.protocol.membership.membership import Membership, PeerInfo
from swarmtrain.protocol.server import GradientUpload, GradientUploads, UploadVersions
from swarmtrain.v1 import snapshot_pb2 as pb

_log = logging.getLogger(__name__)
_POLL_INTERVAL_S = 0.25  # between two looks at who may have a new round, and after a failed pull
_ASK_AGAIN_S = 2.0  # a worker that had nothing is asked again after this, even if its presence shows no new round
_KEPT_DURATIONS = 8  # pulls by which the next one's duration is estimated
_MAX_ROWS = 1024
"""Rows accepted in a server's manifest; a server writes at most 256."""


@dataclass
class Pulls:
    """Requests and downloads publications that have one tensor table."""

    calls: PeerCalls
    run_sha256: str
    specs: Sequence[TensorSpec]
    limits: PullLimits
    presence: Callable[[], pb.Signed]
    heard_untrusted: Callable[[str, pb.PublicationReply], None]
    """Called with (peer, reply) before the reply is used for anything else."""

    async def ask(self, peer: str, has_round: int | None) -> Snapshot | None:
        """Return the manifest of `peer`'s first publication after `has_round`, or None if there is none. Raises
        PeerError."""
        request = pb.PublicationRequest(has_any=has_round is not None, part=1, presence=self.presence())
        if has_round is not None:
            request.round = has_round
        reply = await self.calls.publication(peer, request)
        self.heard_untrusted(peer, reply)
        if reply.busy:
            raise BusyError("it serves as many readers as it may")
        if not reply.HasField("manifest"):
            return None
        snapshot = manifest_untrusted(reply.manifest, self.run_sha256, pb.SNAPSHOT_KIND_PUBLICATION, self.specs)
        if snapshot.author != peer:
            raise BadBytesError("a publication of another peer than the one that sent it", code="bad-publication")
        return snapshot

    async def download(self, peer: str, snapshot: Snapshot) -> HeldSnapshot:
        """Download a publication's bytes. Raises the PeerError that says why it failed: BusyError when `peer` serves
        others."""
        held = empty_held(snapshot)
        await download_snapshot(self.calls, peer, held, self.limits)
        return held


# ---------------------------------------------------------------- the server's side


@dataclass(frozen=True, kw_only=True)
class UploadRules:
    """Limits of an upload.

    `max_tokens` bounds the tokens of one upload; `refuse` returns why a manifest's upload is refused, or "".
    """

    max_tokens: int
    refuse: Callable[[pb.Manifest], str]


@dataclass
class GradientReceiver:
    """Pulls onto the server every round that its workers have and it lacks, each worker's in order."""

    membership: Membership
    pulls: Pulls
    versions: UploadVersions
    rules: UploadRules
    take: Callable[[str, HeldSnapshot], Awaitable[None]]
    """Enters an upload into the server's weights and records its version. Raises BadBytesError if that is
    impossible."""
    told_too_old: Callable[[str, str], None]
    refused: Callable[[str, PeerError], None]
    _back_off: BackOff = field(default_factory=BackOff)
    _asking: dict[str, asyncio.Task[None]] = field(default_factory=dict)
    _found_empty: dict[str, tuple[int, float]] = field(default_factory=dict)
    """By peer: the last round it had published when it had nothing new, and the time of that request."""

    async def run(self) -> None:
        """Ask workers until cancelled."""
        try:
            while True:
                self.look()
                await asyncio.sleep(_POLL_INTERVAL_S)
        finally:
            await end_tasks(list(self._asking.values()))

    def look(self) -> None:
        """Ask each worker that may have a new round, and take in what it has."""
        now = swarm_time()
        workers = self.membership.volunteers()
        ready, _ = self._back_off.ready({info.peer for info in workers}, now)
        for info in workers:
            if info.peer in ready and info.peer not in self._asking and self._is_due(info, now):
                self._asking[info.peer] = logged(asyncio.create_task(self.empty(info.peer)), "the server")

    def _is_due(self, info: PeerInfo, now: float) -> bool:
        found = self._found_empty.get(info.peer)
        return found is None or _published_round(info) > found[0] or now > found[1] + _ASK_AGAIN_S

    async def drain(self, limit_s: float) -> None:
        """Take in the rounds that reachable workers still have, for `limit_s` seconds at most."""

        async def empty(peer: str) -> None:
            if (running := self._asking.get(peer)) is not None:
                await asyncio.wait([running])
            await self.empty(peer)

        asking = [asyncio.create_task(empty(info.peer)) for info in self.membership.volunteers()]
        if asking:
            await asyncio.wait(asking, timeout=limit_s)
        await end_tasks(asking)

    async def empty(self, peer: str) -> None:
        """Take in every round that `peer` has and the server lacks."""
        info = self.membership.info(peer)
        round = -1 if info is None else _published_round(info)
        try:
            while await self._take_next(peer):
                self._back_off.answered(peer)
            self._found_empty[peer] = (round, swarm_time())
        except BusyError:
            _log.debug("%s is %s", peer, self._back_off.busy(peer, swarm_time()))
        except PeerError as error:
            _log.debug("%s: %s", peer, self._back_off.failed(peer, swarm_time(), str(error)))
            if error.is_incident:
                self.refused(peer, error)
        finally:
            if self._asking.get(peer) is asyncio.current_task():
                del self._asking[peer]
            while len(self._found_empty) > self.versions.max_workers:
                del self._found_empty[next(iter(self._found_empty))]

    async def _take_next(self, peer: str) -> bool:
        """Take in the first round that `peer` has and the server lacks. Returns False if there is none."""
        snapshot = await self.pulls.ask(peer, self.versions.round(peer))
        if snapshot is None:
            return False
        manifest = snapshot.manifest
        self._check_untrusted(manifest)
        if not self.versions.is_new(peer, manifest.round):
            _log.debug("%s has nothing new: its round %d is merged already", peer, manifest.round)
            return False
        if reason := self.rules.refuse(manifest):
            # Entered as refused: the worker must not offer it again, and its later rounds must still come.
            self.versions.enter(peer, manifest.round)
            self.told_too_old(peer, reason)
            return True
        await self.take(peer, await self.pulls.download(peer, snapshot))
        return True

    def _check_untrusted(self, manifest: pb.Manifest) -> None:
        if manifest.part != 1:
            raise BadBytesError(
                f"a publication of part {manifest.part} of a round, where rounds are handed in whole", code="bad-round"
            )
        if not 0 < manifest.inner_steps <= manifest.tokens <= self.rules.max_tokens:
            raise BadBytesError(
                f"a publication that claims {manifest.tokens} tokens in {manifest.inner_steps} steps, which cannot be",
                code="bad-tokens",
            )
        if not manifest.tokens <= manifest.author_tokens < 2**60 or manifest.arrivals >= 2**60:
            raise BadBytesError(
                "a publication that counts more tokens in its round than in all rounds of its author", code="bad-tokens"
            )


def _published_round(info: PeerInfo) -> int:
    """Return the last round that a worker has uploaded or is about to upload, by its presence; -1 for none."""
    return info.round - (info.part == 0)


def describe_weights(manifest: pb.Manifest, arrivals: int, entered: dict[str, int]) -> None:
    """Write into the manifest of a server's weights how many gradients entered them, and each worker's last round."""
    manifest.arrivals = arrivals
    for peer, round in entered.items():
        manifest.entered.add(peer=peer_bytes(peer), round=round)


# ---------------------------------------------------------------- a worker's side


@dataclass
class GradientUploader(Publisher):
    """Publishes a worker's rounds to the server alone.

    The round that the server's request names tells which rounds the server has (decision 22).
    """

    server: str = ""
    encode: Callable[[GradientUpload[Any]], Body] = field(kw_only=True)
    max_rounds_tokens: tuple[int, int] = field(kw_only=True)
    """(inner steps, tokens): the most that one upload may claim."""
    uploads: GradientUploads[Any] = field(default_factory=GradientUploads)
    lock: threading.Lock = field(default_factory=threading.Lock)
    """Guards `uploads`, to which the trainer's thread adds."""
    _last: tuple[GradientUpload[Any], OwnPublication] | None = None

    def wanted(self, request: pb.PublicationRequest, caller: str) -> OwnPublication | None:
        """Return the first round that the server lacks, or None if there is none or the caller is not the server."""
        if caller != self.server:
            return None
        with self.lock:
            piece = self.uploads.after(request.round if request.has_any else None)
        if piece is None:
            return None
        if self._last is None or self._last[0] is not piece:
            self._last = piece, self._publication(piece)
        return self._last[1]

    def _publication(self, piece: GradientUpload[Any]) -> OwnPublication:
        """Return the publication of an upload, whose claims are within what the server accepts."""
        max_steps, max_tokens = self.max_rounds_tokens

        def fill(manifest: pb.Manifest) -> None:
            manifest.arrivals = piece.arrivals

        return OwnPublication(
            round=piece.round,
            part=1,
            # A worker that was alone for long uploads one long piece. It claims no more than the server accepts, and
            # the clip may cut it (decision 22).
            tokens=min(piece.tokens, max_tokens),
            inner_steps=min(piece.inner_steps, max_steps),
            author_tokens=piece.own_tokens,
            encode=lambda: self.encode(piece),
            fill=fill,
        )


@dataclass(frozen=True, kw_only=True)
class ServedWeights:
    """Decoded weights of the server, with the number of gradients that had entered them and this worker's last round
    among those."""

    theta: Any
    arrivals: int
    entered_round: int | None
    run_tokens: int
    """Tokens of the run when these weights were published, as the server counts them."""
    pull_s: float


@dataclass(frozen=True, kw_only=True)
class RoundTimes:
    """Start and expected end of a round, in swarm time."""

    started_s: float
    ends_s: float


@dataclass
class ServerLink:
    """Pulls the server's weights for a worker.

    The trainer's thread calls `take`; the network's thread calls the rest.
    """

    me: str
    server: str
    pulls: Pulls
    decode: Callable[[HeldSnapshot], Any]
    """Decodes a snapshot. Raises BadBytesError if it is no vector of the model."""
    counted: Callable[[str, int], None]
    """Called with (PeerID, tokens) for each peer that the server has counted."""
    refused: Callable[[str, PeerError], None]
    heard_s: float = field(default_factory=swarm_time)
    """Time of the server's last reply."""
    _came: ServedWeights | None = None
    _has_arrivals: int | None = None
    _durations_s: deque[float] = field(default_factory=lambda: deque(maxlen=_KEPT_DURATIONS))
    _filling: asyncio.Task[None] | None = None
    _pulling: asyncio.Task[bool] | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def take(self) -> ServedWeights | None:
        """Return the newest weights that came since the last call, or None. Never blocks."""
        with self._lock:
            came, self._came = self._came, None
            return came

    def begin(self, times: RoundTimes) -> None:
        """Begin a round, and pull late in it. A pull that still runs continues."""
        if self._filling is not None:
            self._filling.cancel()
        self._filling = logged(asyncio.create_task(self._fill(times)), "the server's weights")

    async def stop(self) -> None:
        """Stop pulling until the next round."""
        await end_tasks([task for task in (self._filling, self._pulling) if task is not None])
        self._filling = self._pulling = None

    async def _fill(self, times: RoundTimes) -> None:
        when_s, reason = pull_start(times.started_s, times.ends_s, expected_transfer(list(self._durations_s)))
        _log.debug("fetching the server's weights in %.2f s: %s", when_s - swarm_time(), reason)
        await asyncio.sleep(max(0.0, when_s - swarm_time()))
        while True:
            if self._pulling is None or self._pulling.done():
                self._pulling = logged(asyncio.create_task(self._pull()), "the server's weights")
            await asyncio.wait([self._pulling])
            if self._pulling.done() and not self._pulling.cancelled() and self._pulling.result():
                return
            await asyncio.sleep(_POLL_INTERVAL_S)

    async def _pull(self) -> bool:
        """Pull the server's newest weights. Returns False if that failed, or if there are none."""
        began_s = swarm_time()
        try:
            snapshot = await self.pulls.ask(self.server, self._has_arrivals)
            self.heard_s = swarm_time()
            if snapshot is None:
                return False
            entered = self._entered_untrusted(snapshot.manifest)
            held = await self.pulls.download(self.server, snapshot)
            theta = await asyncio.to_thread(self.decode, held)
        except PeerError as error:
            _log.debug("the server: %s", error)
            if error.is_incident:
                self.refused(self.server, error)
            return False
        arrivals, now = snapshot.manifest.arrivals, swarm_time()
        with self._lock:
            self._came = ServedWeights(
                theta=theta,
                arrivals=arrivals,
                entered_round=entered,
                run_tokens=snapshot.manifest.run_tokens,
                pull_s=now - began_s,
            )
        self._has_arrivals, self.heard_s = arrivals, now
        self._durations_s.append(now - began_s)
        return True

    def _entered_untrusted(self, manifest: pb.Manifest) -> int | None:
        """Return this worker's last round in the server's weights, and pass on the manifest's counts of tokens.

        Raises BadBytesError when the manifest is invalid.
        """
        if manifest.round != manifest.arrivals:
            raise BadBytesError(
                "a publication of weights whose round is not the number of gradients in them", code="bad-round"
            )
        if len(manifest.peer_tokens) > _MAX_ROWS:
            raise BadBytesError(
                f"a manifest with the tokens of {len(manifest.peer_tokens)} peers, more than {_MAX_ROWS}",
                code="bad-size",
            )
        for item in manifest.peer_tokens:
            self.counted(peer_id_from_bytes_untrusted(item.peer), item.tokens)
        return entered_round_untrusted(manifest, self.me)


def entered_round_untrusted(manifest: pb.Manifest, peer: str) -> int | None:
    """Return the last round of `peer` in the weights of this manifest, or None. Raises BadBytesError if it is out of
    range."""
    if len(manifest.entered) > _MAX_ROWS:
        raise BadBytesError(
            f"a manifest with the rounds of {len(manifest.entered)} workers, more than {_MAX_ROWS}", code="bad-size"
        )
    wanted = peer_bytes(peer)
    round = next((item.round for item in manifest.entered if item.peer == wanted), None)
    if round is not None and round >= 2**40:
        raise BadBytesError("a manifest with a counter out of range", code="bad-number")
    return round

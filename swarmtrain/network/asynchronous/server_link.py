"""Merging with a server, the bytes: a worker's rounds to the server, the server's weights to the workers.

Both are publications, pulled like any other by whoever wants them. The server asks every worker for what it does not
have, oldest first; a worker asks the server for its newest weights late in each round. What arrives is checked here;
what it does to the weights is not decided here.
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

__all__ = [
    "GradientReceiver",
    "GradientUploader",
    "Pulls",
    "RoundTimes",
    "ServedWeights",
    "ServerLink",
    "UploadRules",
    "describe_weights",
    "entered_round_untrusted",
]

_log = logging.getLogger(__name__)
_LOOK_S = 0.25
_ASK_AGAIN_S = 2.0
_KEPT_DURATIONS = 8
_MAX_ROWS = 1024
"""Of a server's manifest; it tells of 256 workers."""


@dataclass
class Pulls:
    """Asks peers for publications with one tensor table, and brings them here."""

    calls: PeerCalls
    run_sha256: str
    specs: Sequence[TensorSpec]
    limits: PullLimits
    presence: Callable[[], pb.Signed]
    heard_untrusted: Callable[[str, pb.PublicationReply], None]
    """Told what a peer answered, before anything else is done with it."""

    async def ask(self, peer: str, has_round: int | None) -> Snapshot | None:
        """What `peer` publishes after `has_round`, not yet its bytes; None if there is nothing. Raises PeerError."""
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
            raise BadBytesError("a publication of another peer than the one that sent it", code="bad-sender")
        return snapshot

    async def bring(self, peer: str, snapshot: Snapshot) -> HeldSnapshot:
        """Its bytes. Raises the PeerError that says why not: BusyError when it serves others."""
        held = empty_held(snapshot)
        await download_snapshot(self.calls, peer, held, self.limits)
        return held


# ---------------------------------------------------------------- the server's side


@dataclass(frozen=True, kw_only=True)
class UploadRules:
    """What may be handed in: tokens at once, and why not at all (empty: it may), given its manifest."""

    max_tokens: int
    refuse: Callable[[pb.Manifest], str]


@dataclass
class GradientReceiver:
    """The server's pulls: whatever its workers have that it has not, each worker's rounds in their order."""

    membership: Membership
    pulls: Pulls
    marks: UploadVersions
    rules: UploadRules
    take: Callable[[str, HeldSnapshot], Awaitable[None]]
    """Takes in what a worker handed in, and enters its mark; BadBytesError if that cannot be."""
    told_too_old: Callable[[str, str], None]
    refused: Callable[[str, PeerError], None]
    _back_off: BackOff = field(default_factory=BackOff)
    _asking: dict[str, asyncio.Task[None]] = field(default_factory=dict)
    _found_empty: dict[str, tuple[int, float]] = field(default_factory=dict)
    """Who had nothing new when it had published which round, and when that was."""

    async def run(self) -> None:
        """Until it is cancelled."""
        try:
            while True:
                self.look()
                await asyncio.sleep(_LOOK_S)
        finally:
            await end_tasks(list(self._asking.values()))

    def look(self) -> None:
        """Ask those who may have something."""
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
        """Take in what is left with everyone who can be reached; `limit_s` at most."""

        async def empty(peer: str) -> None:
            if (running := self._asking.get(peer)) is not None:
                await asyncio.wait([running])
            await self.empty(peer)

        asking = [asyncio.create_task(empty(info.peer)) for info in self.membership.volunteers()]
        if asking:
            await asyncio.wait(asking, timeout=limit_s)
        await end_tasks(asking)

    async def empty(self, peer: str) -> None:
        """Take in whatever `peer` has, until it has nothing more."""
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
            while len(self._found_empty) > self.marks.max_workers:
                del self._found_empty[next(iter(self._found_empty))]

    async def _take_next(self, peer: str) -> bool:
        """Take in the first of what `peer` has and the server has not; False if there is nothing."""
        snapshot = await self.pulls.ask(peer, self.marks.round(peer))
        if snapshot is None:
            return False
        manifest = snapshot.manifest
        self._check_untrusted(manifest)
        if not self.marks.is_new(peer, manifest.round):
            _log.debug("%s has nothing new: its round %d has entered", peer, manifest.round)
            return False
        if reason := self.rules.refuse(manifest):
            self.marks.enter(peer, manifest.round)
            self.told_too_old(peer, reason)
            return True
        await self.take(peer, await self.pulls.bring(peer, snapshot))
        return True

    def _check_untrusted(self, manifest: pb.Manifest) -> None:
        if manifest.part != 1:
            raise BadBytesError(
                f"a publication with part {manifest.part}, where rounds are handed in whole", code="bad-number"
            )
        if not 0 < manifest.inner_steps <= manifest.tokens <= self.rules.max_tokens:
            raise BadBytesError(
                f"a publication that claims {manifest.tokens} tokens in {manifest.inner_steps} steps", code="bad-tokens"
            )
        if not manifest.tokens <= manifest.author_tokens < 2**60 or manifest.arrivals >= 2**60:
            raise BadBytesError(
                "a publication that counts more tokens in its round than its author in all", code="bad-tokens"
            )


def _published_round(info: PeerInfo) -> int:
    """The last round that a worker has handed in or is about to, as it announced it; -1 for none."""
    return info.round - (info.part == 0)


def describe_weights(manifest: pb.Manifest, arrivals: int, entered: dict[str, int]) -> None:
    """Say in the manifest of a server's weights how old they are, and whose rounds are in them."""
    manifest.arrivals = arrivals
    for peer, round in entered.items():
        manifest.entered.add(peer=peer_bytes(peer), round=round)


# ---------------------------------------------------------------- a worker's side


@dataclass
class GradientUploader(Publisher):
    """What a worker hands in. To the server alone: what that asks for says what it has."""

    server: str = ""
    encode: Callable[[GradientUpload[Any]], Body] = field(kw_only=True)
    max_rounds_tokens: tuple[int, int] = field(kw_only=True)
    """The most steps and tokens that may be claimed of one piece."""
    hand_ins: GradientUploads[Any] = field(default_factory=GradientUploads)
    lock: threading.Lock = field(default_factory=threading.Lock)
    """For `hand_ins`, which the trainer's thread adds to."""
    _last: tuple[GradientUpload[Any], OwnPublication] | None = None

    def wanted(self, request: pb.PublicationRequest, caller: str) -> OwnPublication | None:
        """See `Publisher`."""
        if caller != self.server:
            return None
        with self.lock:
            piece = self.hand_ins.after(request.round if request.has_any else None)
        if piece is None:
            return None
        if self._last is None or self._last[0] is not piece:
            self._last = piece, self._publication(piece)
        return self._last[1]

    def _publication(self, piece: GradientUpload[Any]) -> OwnPublication:
        max_steps, max_tokens = self.max_rounds_tokens

        def fill(manifest: pb.Manifest) -> None:
            manifest.arrivals = piece.arrivals

        return OwnPublication(
            round=piece.round,
            part=1,
            tokens=min(piece.tokens, max_tokens),
            inner_steps=min(piece.inner_steps, max_steps),
            author_tokens=piece.own_tokens,
            encode=lambda: self.encode(piece),
            fill=fill,
        )


@dataclass(frozen=True, kw_only=True)
class ServedWeights:
    """The server's weights, decoded, how many gradients had entered them, and this worker's last round among them."""

    theta: Any
    arrivals: int
    entered_round: int | None
    run_tokens: int
    """What all had trained on by then, as the server counts it."""
    pull_s: float


@dataclass(frozen=True, kw_only=True)
class RoundTimes:
    """When a round began and should end, in swarm time."""

    started_s: float
    ends_s: float


@dataclass
class ServerLink:
    """A worker's pulls of the server's weights. `take` is for the trainer's thread, the rest for the network's."""

    me: str
    server: str
    pulls: Pulls
    decode: Callable[[HeldSnapshot], Any]
    """BadBytesError if it is no vector of the model."""
    counted: Callable[[str, int], None]
    """Told how much each peer has trained, as the server counts it."""
    refused: Callable[[str, PeerError], None]
    heard_s: float = field(default_factory=swarm_time)
    """When the server answered last."""
    _came: ServedWeights | None = None
    _has_arrivals: int | None = None
    _durations_s: deque[float] = field(default_factory=lambda: deque(maxlen=_KEPT_DURATIONS))
    _filling: asyncio.Task[None] | None = None
    _pulling: asyncio.Task[bool] | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def take(self) -> ServedWeights | None:
        """The newest weights that came since it was last called. Returns at once."""
        with self._lock:
            came, self._came = self._came, None
            return came

    def begin(self, times: RoundTimes) -> None:
        """A round begins: pull late in it. A pull that still runs goes on."""
        if self._filling is not None:
            self._filling.cancel()
        self._filling = logged(asyncio.create_task(self._fill(times)), "the server's weights")

    async def stop(self) -> None:
        """Pull nothing more, until the next round."""
        await end_tasks([task for task in (self._filling, self._pulling) if task is not None])
        self._filling = self._pulling = None

    async def _fill(self, times: RoundTimes) -> None:
        when_s, reason = pull_start(times.started_s, times.ends_s, expected_transfer(list(self._durations_s)))
        _log.debug("the server's weights in %.2f s: %s", when_s - swarm_time(), reason)
        await asyncio.sleep(max(0.0, when_s - swarm_time()))
        while True:
            if self._pulling is None or self._pulling.done():
                self._pulling = logged(asyncio.create_task(self._pull()), "the server's weights")
            await asyncio.wait([self._pulling])
            if self._pulling.done() and not self._pulling.cancelled() and self._pulling.result():
                return
            await asyncio.sleep(_LOOK_S)

    async def _pull(self) -> bool:
        """Bring the server's newest weights here; False if that failed, or there are none that are new."""
        began_s = swarm_time()
        try:
            snapshot = await self.pulls.ask(self.server, self._has_arrivals)
            self.heard_s = swarm_time()
            if snapshot is None:
                return False
            entered = self._entered_untrusted(snapshot.manifest)
            held = await self.pulls.bring(self.server, snapshot)
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
        """This worker's last round in the server's weights; what the manifest says of others' tokens is told on."""
        if manifest.round != manifest.arrivals:
            raise BadBytesError("a publication of weights of another round than their arrivals", code="not-asked-for")
        if len(manifest.peer_tokens) > _MAX_ROWS:
            raise BadBytesError(
                f"a manifest with {len(manifest.peer_tokens)} rows of tokens, more than {_MAX_ROWS}", code="bad-size"
            )
        for item in manifest.peer_tokens:
            self.counted(peer_id_from_bytes_untrusted(item.peer), item.tokens)
        return entered_round_untrusted(manifest, self.me)


def entered_round_untrusted(manifest: pb.Manifest, peer: str) -> int | None:
    """The last round of `peer` that is in the weights of this manifest; BadBytesError if it is nonsense."""
    if len(manifest.entered) > _MAX_ROWS:
        raise BadBytesError(
            f"a manifest with the rounds of {len(manifest.entered)} workers, more than {_MAX_ROWS}", code="bad-size"
        )
    wanted = peer_bytes(peer)
    round = next((item.round for item in manifest.entered if item.peer == wanted), None)
    if round is not None and round >= 2**40:
        raise BadBytesError("a manifest with a counter out of range", code="bad-number")
    return round

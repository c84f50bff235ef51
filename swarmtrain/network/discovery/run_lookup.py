"""Find a run by its hash: dial the peers of an invite, correct the clock, fetch the run's files."""

from __future__ import annotations

import asyncio
import dataclasses
import datetime
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from swarmtrain import __version__
from swarmtrain.compatibility import PROTOCOL, protocol_mismatch
from swarmtrain.errors import (
    BadBytesError,
    ClockError,
    PeerError,
    Problem,
    RunTimeError,
    UnreachableError,
    VersionError,
)
from swarmtrain.network import daemon
from swarmtrain.network.daemon import own_time
from swarmtrain.network.discovery.invite import InvitedPeer
from swarmtrain.network.node import NOT_SERVED, Node
from swarmtrain.network.service import PeerCalls
from swarmtrain.network.tasks import end_tasks
from swarmtrain.protocol.membership.membership import MOST_CORRECTED_S, ClockVerdict, judge_clock
from swarmtrain.protocol.pinned_files.file_list import files_of_run_untrusted
from swarmtrain.run import RunFile, run_sha256
from swarmtrain.v1 import snapshot_pb2 as pb
from swarmtrain.words import short_peer, time_in_words

_OTHERS_S = 0.5  # peers that answer within this of the first count too
_MORE_VOICES_S = 3.0
"""Seconds to wait for more peers if those that answered first report that the clock is far off."""
_MAX_SHOWN = 3
_MOST_SHOWN_S = 100 * 365 * 86_400.0  # a difference beyond a lifetime is no figure for a person
_STARTING_LOOKS = 5  # a peer that listens but does not serve the run yet is asked so often
_STARTING_S = 1.0


@dataclass(frozen=True)
class PublishedRun:
    """Run as it is served: the exact bytes of the run file, their hash, and the files that belong to it."""

    data: bytes
    sha256: str
    run: RunFile
    held_out: bytes
    tokenizer: bytes
    model_files: bytes = b""
    """List of the model's files (`protocol.pinned_files`); empty for a built-in model."""

    def blobs(self) -> dict[str, bytes]:
        """Return the contents of the run's files by their SHA-256."""
        published = self.run.published
        assert published is not None
        blobs = {run_sha256(self.data): self.data, published.held_out_sha256: self.held_out}
        if published.tokenizer_sha256 is not None:
            blobs[published.tokenizer_sha256] = self.tokenizer
        if published.model_files_sha256 is not None:
            blobs[published.model_files_sha256] = self.model_files
        return blobs

    def of_stage(self, stage: int) -> PublishedRun:
        """Return the same run for the peers of one stage, which form a swarm of their own.

        Its hash is the SHA-256 of the run's hash and the stage's number. `merge.min_peers` is 1: a volunteer waits for
        others before it holds a stage, not in each stage.
        """
        digest = hashlib.sha256(bytes.fromhex(self.sha256) + stage.to_bytes(4, "big")).hexdigest()
        alone = self.run.model_copy(update={"merge": self.run.merge.model_copy(update={"min_peers": 1})})
        return dataclasses.replace(self, sha256=digest, run=alone)


@dataclass(frozen=True)
class FoundRun:
    """Peer that answered, and how this machine's clock was corrected.

    `clock_correction_s` is the correction in seconds; `clock_outliers` holds peers whose clocks are far from the
    corrected one, and by how many seconds they are ahead of it.
    """

    peer: str
    clock_correction_s: float
    clock_outliers: tuple[tuple[str, float], ...] = ()


async def find_run(
    node: Node, run_sha256: str, peers: Sequence[InvitedPeer], limit_s: float = 15.0, *, accept_clock: bool = False
) -> FoundRun:
    """Dial `peers`, correct the clock by the median of those that answer first, and return one of them.

    A correction of more than ten minutes needs `accept_clock`. Raises RunTimeError, within `limit_s`, when no peer
    answers; VersionError when the peers that do are too old or too new for this version; ClockError when a person has
    to decide about the clock.
    """
    calls = PeerCalls(node, run_sha256)
    of_another: list[InvitedPeer] = []
    misfits: list[Problem] = []

    async def knock(peer: InvitedPeer) -> tuple[str, float]:
        """Dial and greet a peer; return its PeerID and by how many seconds its clock is ahead. Raises PeerError."""
        await node.connect(peer.peer, peer.addresses, limit_s)
        for attempts_left in reversed(range(_STARTING_LOOKS)):
            asked_s = own_time()
            try:
                reply = await calls.hello(peer.peer, pb.HelloRequest(run_sha256=bytes.fromhex(run_sha256)), limit_s)
                # The peer read its clock in the middle of the call, give or take half a round trip.
                offset_s = reply.time - (asked_s + own_time()) / 2
                if misfit := refusal_untrusted(f"the peer at {_where([peer])}", reply):
                    misfits.append(misfit)
                    raise UnreachableError(misfit)
                return peer.peer, offset_s
            except PeerError as error:
                if NOT_SERVED not in str(error):
                    raise
                if not attempts_left:
                    of_another.append(peer)
                    raise
            await asyncio.sleep(_STARTING_S)  # a peer that was just started listens before it serves its run
        raise AssertionError("the last attempt returns or raises")

    others = [peer for peer in peers if peer.peer != node.identity.peer_id]
    if not others:
        raise RunTimeError(
            "this folder knows no other peer of this run; ask somebody in the run for an invite",
            code="nobody-known",
        )
    tasks = [asyncio.create_task(knock(peer)) for peer in others]
    answers: list[tuple[str, float]] = []
    try:
        for next_done in asyncio.as_completed(tasks, timeout=limit_s):
            try:
                await next_done
            except PeerError:
                continue
            await asyncio.wait(tasks, timeout=_OTHERS_S)
            answers = _answers_of(tasks)
            if judge_clock(dict(answers)).is_doubtful:
                await asyncio.wait(tasks, timeout=_MORE_VOICES_S)
                answers = _answers_of(tasks)
            break
    except TimeoutError:
        pass
    finally:
        await end_tasks(tasks)
    if not answers:
        if misfits:
            raise VersionError(misfits[0])
        if of_another:
            raise RunTimeError(
                f"the peer at {_where(of_another[:1])} serves another run; ask for a new invite", code="another-run"
            )
        raise RunTimeError(
            f"nobody answers at {_where(others)}: is the swarm up? If it is, ask for a new invite",
            code="nobody-answers",
        )
    verdict = judge_clock(dict(answers))
    if verdict.is_doubtful and not accept_clock:
        raise ClockError(_clocks_in_words(verdict, dict(answers)))
    daemon.set_clock_offset(verdict.offset_s)
    outliers = tuple((peer, offset_s - verdict.offset_s) for peer, offset_s in verdict.outliers)
    far = {peer for peer, _ in outliers}
    first = next((peer for peer, _ in answers if peer not in far), answers[0][0])
    return FoundRun(first, verdict.offset_s, outliers)


def _answers_of(tasks: Sequence[asyncio.Task[tuple[str, float]]]) -> list[tuple[str, float]]:
    return [task.result() for task in tasks if task.done() and not task.cancelled() and task.exception() is None]


def _clocks_in_words(verdict: ClockVerdict, offsets_s: Mapping[str, float]) -> str:
    now, far = own_time(), dict(verdict.outliers)
    who = " and ".join([short_peer(peer) for peer in offsets_s if peer not in far][:_MAX_SHOWN])
    others = "".join(f", by {short_peer(peer)}'s {_time_in_words(now + by_s)}" for peer, by_s in far.items())
    apart = f"more than {MOST_CORRECTED_S / 60:.0f} minutes apart"
    if abs(verdict.offset_s) < _MOST_SHOWN_S:
        apart += f" ({time_in_words(abs(verdict.offset_s))})"
    return (
        f"it is {_time_in_words(now)} by this machine's clock, by that of {who} "
        f"{_time_in_words(now + verdict.offset_s)}{others}, {apart}: if this machine's is wrong, set it right (Linux: "
        "timedatectl set-ntp true) and start again; if theirs is the one to go by, add --accept-clock; else ask "
        "somebody else for an invite"
    )


def _time_in_words(unix_s: float) -> str:
    try:
        return datetime.datetime.fromtimestamp(unix_s, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    except (ValueError, OverflowError, OSError):  # whatever a peer says
        return "an impossible date"


def version_fields() -> dict[str, Any]:
    """Return the fields of a greeting's reply that give this version."""
    return {"swarmtrain_version": __version__, "protocol": PROTOCOL}


def refusal_untrusted(who: str, reply: pb.HelloReply) -> Problem | None:
    """Explain why this version and the peer `who` cannot train together, by its greeting's reply; None if they can."""
    return protocol_mismatch(who, reply.protocol, reply.swarmtrain_version)


def _where(peers: Sequence[InvitedPeer]) -> str:
    addresses = [address for peer in peers for address in peer.addresses]
    more = len(addresses) - _MAX_SHOWN
    return ", ".join(addresses[:_MAX_SHOWN]) + (f" and {more} more" if more > 0 else "")


async def fetch_published(
    calls: PeerCalls, source: str, parse: Callable[[bytes, str], RunFile], kept: Mapping[str, bytes]
) -> PublishedRun:
    """Fetch the run and its files from `source`, each checked by its hash. Files in `kept` are not fetched again."""

    async def get(sha256: str, max_bytes: int) -> bytes:
        return kept.get(sha256) or await calls.blob_untrusted(source, sha256, max_bytes)

    data = await get(calls.run_sha256, 64 * 1024)
    run = parse(data, calls.run_sha256)
    published = run.published
    if published is None:
        raise BadBytesError("a run file that no bootstrap published", code="bad-format")
    held_out = await get(published.held_out_sha256, published.held_out_bytes)
    tokenizer = b""
    if published.tokenizer_sha256 is not None:
        tokenizer = await get(published.tokenizer_sha256, published.tokenizer_bytes)
    model_files = b""
    if published.model_files_sha256 is not None:
        model_files = await get(published.model_files_sha256, published.model_files_bytes)
        # At most 1 MiB of JSON.
        await asyncio.to_thread(files_of_run_untrusted, model_files, run.model.num_parameters)
    return PublishedRun(data, calls.run_sha256, run, held_out, tokenizer, model_files)

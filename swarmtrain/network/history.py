"""History of the run, as peers tell it to each other: asked for by who shows a page, answered by whoever has one."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

from swarmtrain.errors import BadBytesError, PeerError
from swarmtrain.network.daemon import swarm_time
from swarmtrain.network.discovery.records import MAX_LOSS
from swarmtrain.network.tasks import end_tasks
from swarmtrain.protocol.history import CELLS, HistoryPoint, TextSample, ToldHistory, bounded
from swarmtrain.v1 import snapshot_pb2 as pb

if TYPE_CHECKING:
    from swarmtrain.network.swarm import Swarm

_MAX_POINTS = 2 * CELLS
_MAX_TEXT = 4000
_POINT = [field.name for field in dataclasses.fields(HistoryPoint)]
_SAMPLE = [field.name for field in dataclasses.fields(TextSample)]
_MAX_TIME_S = 1e11
_MOST_ASKED = 5
_ANSWERS_S = 10.0
"""Seconds for all answers together. A call takes half of that at most, and the connection before it some time too."""


def history_to_proto(points: Sequence[HistoryPoint], sample: TextSample | None) -> pb.HistoryReply:
    """Return the answer to a peer that asks for the run's history."""
    reply = pb.HistoryReply()
    write_history(reply, points[-_MAX_POINTS:], sample)
    return reply


def write_history(message: Any, points: Sequence[HistoryPoint], sample: TextSample | None) -> None:
    """Write points and sample into a message that has the fields of a `HistoryReply`."""
    for point in points:
        message.points.add(**{name: getattr(point, name) for name in _POINT})
    if sample is not None:
        for name, value in dataclasses.asdict(sample).items():
            setattr(message.sample, name, value)


def history_from_proto_untrusted(reply: pb.HistoryReply) -> tuple[list[HistoryPoint], TextSample | None]:
    """Return what a peer tells of the run's history. Raises BadBytesError if a field is out of range."""
    if len(reply.points) > _MAX_POINTS:
        raise BadBytesError(f"a history of {len(reply.points)} points", code="bad-size")
    points = [_point_untrusted(point) for point in reply.points]
    return points, _sample_untrusted(reply.sample) if reply.HasField("sample") else None


def _point_untrusted(point: pb.HistoryPoint) -> HistoryPoint:
    losses = point.loss, point.held_out_loss
    if not all(0 <= loss <= MAX_LOSS for loss in losses) or not 0 <= point.time < _MAX_TIME_S:  # false for NaN too
        raise BadBytesError("a history with a loss or a time out of range", code="bad-number")
    if point.run_tokens >= 2**60 or point.round >= 2**40:
        raise BadBytesError("a history with a number out of range", code="bad-number")
    return point_of(point)


def point_of(message: Any) -> HistoryPoint:
    """Return the point of a message that has its fields, as checked or as this peer wrote it."""
    return HistoryPoint(**{name: getattr(message, name) for name in _POINT})


def sample_of(message: Any) -> TextSample:
    """Return the sample of a message that has its fields, as checked or as this peer wrote it."""
    return TextSample(**{name: getattr(message, name) for name in _SAMPLE})


def _sample_untrusted(sample: pb.TextSample) -> TextSample:
    if len(sample.prompt) + len(sample.text) > _MAX_TEXT:
        raise BadBytesError(f"a sample of {len(sample.prompt) + len(sample.text)} characters", code="bad-size")
    if not 0 <= sample.time < _MAX_TIME_S or sample.run_tokens >= 2**60 or sample.round >= 2**40:
        raise BadBytesError("a sample with a number out of range", code="bad-number")
    return sample_of(sample)


async def ask_for_history(swarm: Swarm, inviters: Collection[str], run_tokens: int) -> list[ToldHistory]:
    """Ask peers of `inviters`, who are named in the invite, and the one that measures, at once for the run's history.
    Return what each tells, as far as it can be, where this peer counts `run_tokens` now.

    Whoever has not answered after `_ANSWERS_S` is left out.
    """
    live = {info.peer for info in swarm.membership.live()}
    asked = [peer for peer in dict.fromkeys([swarm.membership.measurer(), *inviters]) if peer in live][:_MOST_ASKED]
    if not asked:
        return []
    tasks = [asyncio.create_task(_told_by(swarm, peer)) for peer in asked]
    try:
        await asyncio.wait(tasks, timeout=_ANSWERS_S)
    finally:
        await end_tasks(tasks)
    answers = [task.result() for task in tasks if not task.cancelled()]
    now, began_s = swarm_time(), swarm.accounting.rules.began_s
    return [bounded(told, run_tokens, began_s, now) for told in answers if told is not None]


async def _told_by(swarm: Swarm, peer: str) -> ToldHistory | None:
    """Return what a peer tells of the run's history; None if it tells nothing that can be used."""
    try:
        points, sample = history_from_proto_untrusted(await swarm.calls.history(peer))
    except BadBytesError as error:
        swarm.peers.refused(peer, error)
        return None
    except PeerError:
        return None  # it is gone, or of a version that tells no history
    return ToldHistory(points=points, sample=sample)

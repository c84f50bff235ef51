"""Asking a peer to stay in a stage, over streams: what it promises, and what is refused of either side."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import math
import socket
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

import pytest
from codes import raises_code
from virtual_loop import virtually

from swarmtrain.errors import BadBytesError, GoneError, PeerError, UnreachableError
from swarmtrain.network.node import TrafficCount
from swarmtrain.network.stage_calls import StageClient, StageHost
from swarmtrain.peer.pipeline.request_queue import StageRequestQueue
from swarmtrain.peer.pipeline.stage_service import StageServer, StageShapes, WireCalls
from swarmtrain.protocol.pipeline.ledger import LedgerLimits, StageLedger
from swarmtrain.v1 import pipeline_pb2 as pb

RUN = hashlib.sha256(b"a run").hexdigest()
SHAPES = StageShapes(most_sequences=2, context_tokens=8, width=4, vocabulary_size=256, activations="fp32")


@dataclass
class Wire:
    """Between "d", who wants to leave, and "p", who holds the first and the second of three stages."""

    now: Callable[[], float]
    promised: tuple[float, str] = (60.0, "it stays for 60 s")
    asked: list[tuple[str, int]] = field(default_factory=list)
    refused: list[tuple[str, str]] = field(default_factory=list)
    raw_answer: bytes | None = None
    """Connection to "p", which answers every request alike."""
    hangs: bool = False
    """"p" takes streams, and neither reads nor answers."""
    streams: list[asyncio.StreamWriter] = field(default_factory=list)
    tasks: list[asyncio.Task[Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        queue = StageRequestQueue(StageLedger(LedgerLimits(batch_tokens=64), incarnation=7), self.now)
        self.server = StageServer(
            SHAPES, 3, {0: queue, 1: queue}, lambda peer, error: self.refused.append((peer, str(error))), self.stays_s
        )
        self.calls = WireCalls("d", StageClient(self, RUN), SHAPES, {})  # type: ignore[arg-type]

    def stays_s(self, mover: str, stage: int) -> tuple[float, str]:
        self.asked.append((mover, stage))
        return self.promised

    async def open_pipe(self, peer: str, handler: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Open a pipe as a node does."""
        if peer != "p":
            raise UnreachableError("nobody")
        ours, theirs = socket.socketpair()
        reader, writer = await asyncio.open_connection(sock=theirs)
        self.streams.append(writer)
        if self.hangs:
            return await asyncio.open_connection(sock=ours)
        serving = StageHost(TrafficCount(), self.server).serve("d", reader, writer)
        self.tasks.append(asyncio.create_task(serving if self.raw_answer is None else self.say(serving, writer)))
        return await asyncio.open_connection(sock=ours)

    async def say(self, instead_of: Coroutine[Any, Any, None], writer: asyncio.StreamWriter) -> None:
        instead_of.close()
        assert self.raw_answer is not None
        writer.write(self.raw_answer)
        await writer.drain()
        writer.close()

    traffic = TrafficCount()

    async def raw(self, question: pb.StageQuestion, body: bytes = b"") -> pb.StageAnswer:
        """Return the answer to a request."""
        question.sha256 = hashlib.sha256(body).digest()
        reader, writer = await self.open_pipe("p", "")
        data = question.SerializeToString()
        writer.write(len(data).to_bytes(4, "big") + data + body)
        answer = pb.StageAnswer.FromString(await reader.readexactly(int.from_bytes(await reader.readexactly(4), "big")))
        writer.close()
        return answer


async def _tick() -> None:
    """Time passes in small steps, so that what is on its way arrives before somebody is tired of waiting."""
    for _ in itertools.count():
        await asyncio.sleep(0.01)


def _on_wire(body: Callable[[Wire], Coroutine[Any, Any, None]]) -> None:
    async def run(now: Callable[[], float]) -> None:
        wire = Wire(now)
        wire.tasks.append(asyncio.create_task(_tick()))
        try:
            await body(wire)
        finally:
            for task in wire.tasks:
                task.cancel()
            await asyncio.gather(*wire.tasks, return_exceptions=True)
            for writer in wire.streams:
                writer.close()

    virtually(run)


def _answer(**fields: Any) -> bytes:
    fields.setdefault("status", pb.StageAnswer.STATUS_OK)
    data = pb.StageAnswer(**fields).SerializeToString()
    return len(data).to_bytes(4, "big") + data


# ---------------------------------------------------------------- what must work


@pytest.mark.parametrize("promised", [(60.0, "it stays for 60 s"), (0.0, "p wants to leave stage 1 itself"), (0.5, "")])
@pytest.mark.parametrize("stage", [0, 1])
def test_who_is_asked_answers_the_one_who_asks(promised: tuple[float, str], stage: int) -> None:
    async def body(wire: Wire) -> None:
        wire.promised = promised
        assert await wire.calls.ask_to_stay("p", stage) == promised
        assert wire.asked == [("d", stage)], "by the name of the stream, not one that it says"
        assert not wire.refused

    _on_wire(body)


def test_where_nobody_moves_nobody_promises() -> None:
    async def body(wire: Wire) -> None:
        wire.server = StageServer(SHAPES, 3, wire.server.queues, wire.server.on_refused)
        assert await wire.calls.ask_to_stay("p", 1) == (0.0, "nobody moves in this run")

    _on_wire(body)


def test_one_that_has_moved_is_gone_and_one_that_is_away_unreachable() -> None:
    async def body(wire: Wire) -> None:
        with raises_code("gone", GoneError, "stage 2"):
            await wire.calls.ask_to_stay("p", 2)
        with pytest.raises(UnreachableError):
            await wire.calls.ask_to_stay("x", 1)
        assert not wire.asked and not wire.refused

    _on_wire(body)


def test_one_that_hangs_with_the_stream_open_is_unreachable_in_time() -> None:
    async def body(wire: Wire) -> None:
        wire.hangs, began_s = True, wire.now()
        with raises_code("unreachable", UnreachableError, "10 s"):
            await wire.calls.ask_to_stay("p", 1)
        assert wire.now() - began_s < 12.0

    _on_wire(body)


# ---------------------------------------------------------------- who asks what it must not


@pytest.mark.parametrize("number", [1, 3])
def test_a_question_with_tensors_is_refused_before_they_are_read_and_nothing_is_promised(number: int) -> None:
    tensor = pb.StageTensor(format="fp32", shape=[2, 8, 4], size_bytes=2**40)

    async def body(wire: Wire) -> None:
        answer = await wire.raw(pb.StageQuestion(stage=1, kind=pb.STAGE_KIND_STAY, tensors=[tensor] * number))
        assert answer.status == pb.StageAnswer.STATUS_REFUSED
        assert answer.reason == "tensors in a question of a kind that has none" and not answer.stays_s
        assert wire.refused == [("d", answer.reason)] and not wire.asked

    _on_wire(body)


@pytest.mark.parametrize("stage", [2, 3, 2**32 - 1])
def test_nothing_is_promised_for_a_stage_that_is_not_held(stage: int) -> None:
    async def body(wire: Wire) -> None:
        answer = await wire.raw(pb.StageQuestion(stage=stage, kind=pb.STAGE_KIND_STAY))
        assert answer.status == pb.StageAnswer.STATUS_GONE and not wire.asked and not wire.refused

    _on_wire(body)


def test_what_else_is_said_with_it_changes_nothing() -> None:
    question = pb.StageQuestion(stage=1, kind=pb.STAGE_KIND_STAY, tokens=10**9, key=pb.MicrobatchKey(sequence=5))
    question.settlement.acknowledged.add(sequence=5, loss=math.nan)

    async def body(wire: Wire) -> None:
        answer = await wire.raw(question)
        assert (answer.status, answer.stays_s, answer.life) == (pb.StageAnswer.STATUS_OK, 60.0, 7)
        assert wire.server.queues[1].ledger.num_open == 0

    _on_wire(body)


# ---------------------------------------------------------------- who answers what it must not


@pytest.mark.parametrize("stays_s", [math.nan, math.inf, -math.inf, -1.0, 3601.0, 1e30])
def test_an_absurd_promise_is_none(stays_s: float) -> None:
    async def body(wire: Wire) -> None:
        wire.raw_answer = _answer(stays_s=stays_s)
        with raises_code("bad-number", BadBytesError):
            await wire.calls.ask_to_stay("p", 1)

    _on_wire(body)


BAD_ANSWERS = {
    "tensors": _answer(stays_s=60.0, tensors=[pb.StageTensor(format="fp32", shape=[1], size_bytes=2**40)]),
    "no status": _answer(status=pb.StageAnswer.STATUS_UNSPECIFIED, stays_s=60.0),
    "a reason for the terminal": _answer(reason="\x1b[2J"),
    "busy": _answer(status=pb.StageAnswer.STATUS_BUSY, stays_s=60.0),
    "garbage": b"\x00\x00\x00\x04abcd",
    "without end": b"\xff\xff\xff\xff",
    "too short": _answer(stays_s=60.0)[:-1],
    "nothing": b"",
}


@pytest.mark.parametrize("name", BAD_ANSWERS)
def test_whatever_comes_is_no_promise(name: str) -> None:
    async def body(wire: Wire) -> None:
        wire.raw_answer = BAD_ANSWERS[name]
        with pytest.raises(PeerError):
            await wire.calls.ask_to_stay("p", 1)

    _on_wire(body)


def test_the_longest_promise_that_is_believed_is_an_hour() -> None:
    async def body(wire: Wire) -> None:
        wire.raw_answer = _answer(stays_s=3600.0)
        assert await wire.calls.ask_to_stay("p", 1) == (3600.0, "")

    _on_wire(body)


def test_a_reason_is_short_and_printable() -> None:
    async def body(wire: Wire) -> None:
        wire.raw_answer = _answer(reason="x" * 200 + "\x1b[2J" + "y" * 100_000)
        _, reason = await wire.calls.ask_to_stay("p", 1)
        assert len(reason) <= 200 and reason.isprintable(), len(reason)

    _on_wire(body)

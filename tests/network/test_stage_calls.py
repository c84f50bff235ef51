"""Questions to a stage over streams: what is announced is checked first, what comes is checked again, nothing hangs."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import socket
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from codes import raises_code
from virtual_loop import virtually

from swarmtrain.errors import (
    BadBytesError,
    BrokenOffError,
    BusyError,
    GoneError,
    PeerError,
    RunTimeError,
    StalledError,
    UnreachableError,
)
from swarmtrain.network.node import TrafficCount
from swarmtrain.network.stage_calls import StageClient, StageHost
from swarmtrain.peer.pipeline.driver import StageAttempt, Tail
from swarmtrain.peer.pipeline.request_queue import StageRequestQueue, Task
from swarmtrain.peer.pipeline.stage_service import StageServer, StageShapes, WireCalls
from swarmtrain.protocol.pipeline.ledger import Acknowledged, Key, LedgerLimits, Settlement, StageLedger
from swarmtrain.v1 import pipeline_pb2 as pb

RUN = hashlib.sha256(b"a run").hexdigest()
SHAPES = StageShapes(most_sequences=2, context_tokens=8, width=4, vocabulary_size=256, activations="fp32")
X = torch.arange(64, dtype=torch.float32).view(2, 8, 4)
TARGETS = torch.arange(16).view(2, 8)
TOKENS = 16


@dataclass
class Wire:
    """Between a driver "d" and a peer "p" that holds the second of three stages, and one "q" that holds the last."""

    now: Callable[[], float]
    streams: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = field(default_factory=list)
    named: list[tuple[str, str]] = field(default_factory=list)
    traffic: TrafficCount = field(default_factory=TrafficCount)
    silent: bool = False
    factor: float = 2.0

    def __post_init__(self) -> None:
        limits = LedgerLimits(batch_tokens=4 * TOKENS, max_open_of_driver=3)
        self.queues = {peer: StageRequestQueue(StageLedger(limits, incarnation=7), self.now) for peer in ("p", "q")}
        self.hosts = {
            peer: StageHost(TrafficCount(), StageServer(SHAPES, 3, {stage: self.queues[peer]}, self.refused))
            for peer, stage in (("p", 1), ("q", 2))
        }
        self.client = StageClient(self, RUN)  # type: ignore[arg-type]
        self.calls = WireCalls("d", self.client, SHAPES, {})
        self.tasks: list[asyncio.Task[None]] = []
        self.opened = asyncio.Event()

    def refused(self, peer: str, error: PeerError) -> None:
        self.named.append((peer, str(error)))

    async def open_pipe(self, peer: str, handler: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Open a pipe as a node does."""
        if peer not in self.hosts:
            raise UnreachableError("nobody")
        ours, theirs = socket.socketpair()
        reader, writer = await asyncio.open_connection(sock=theirs)
        self.streams.append((reader, writer))
        self.opened.set()
        if not self.silent:
            self.tasks.append(asyncio.create_task(self.hosts[peer].serve("d", reader, writer)))
        return await asyncio.open_connection(sock=ours)

    async def work(self, peer: str) -> None:
        """Compute what is asked: twice the input, a loss of 1."""
        while True:
            what = self.queues[peer].next()
            if isinstance(what, Task):
                payload = what.payload[0] if what.kind == "tail" else what.payload
                self.queues[peer].done(what, Tail(1.0, 2 * payload) if what.kind == "tail" else self.factor * payload)
            await asyncio.sleep(0.01)

    async def raw(self, peer: str, data: bytes) -> pb.StageAnswer:
        """Return the answer to these bytes."""
        reader, writer = await self.open_pipe(peer, "")
        writer.write(data)
        answer = pb.StageAnswer.FromString(await reader.readexactly(int.from_bytes(await reader.readexactly(4), "big")))
        writer.close()
        return answer


@contextlib.asynccontextmanager
async def _wire(now: Callable[[], float]) -> AsyncIterator[Wire]:
    wire = Wire(now)
    working = [asyncio.create_task(wire.work(peer)) for peer in ("p", "q")]
    try:
        yield wire
    finally:
        for task in (*working, *wire.tasks):
            task.cancel()
        await asyncio.gather(*working, *wire.tasks, return_exceptions=True)
        for _, writer in wire.streams:
            writer.close()


def _on_wire(body: Callable[[Wire], Coroutine[Any, Any, None]]) -> None:
    async def run(now: Callable[[], float]) -> None:
        async with _wire(now) as wire:
            await body(wire)

    virtually(run)


def _attempt(sequence: int = 0, stage: int = 1) -> StageAttempt:
    return StageAttempt(stage, Key("d", sequence, 0), TOKENS)


def _question(stage: int = 1, kind: pb.StageKind = pb.STAGE_KIND_FORWARD, **changes: Any) -> pb.StageQuestion:
    question = pb.StageQuestion(
        stage=stage, kind=kind, key=pb.MicrobatchKey(sequence=5), tokens=TOKENS, tensors=[SHAPES.describe(X)]
    )
    if kind == pb.STAGE_KIND_TAIL:
        question.tensors.append(SHAPES.describe_tokens(TARGETS))
    for name, value in changes.items():
        setattr(question, name, value)
    return question


def _frame(question: pb.StageQuestion, body: bytes = b"", sha256: bytes | None = None) -> bytes:
    question.sha256 = hashlib.sha256(body).digest() if sha256 is None else sha256
    data = question.SerializeToString()
    return len(data).to_bytes(4, "big") + data + body


# ---------------------------------------------------------------- what must work


def test_a_microbatch_there_and_back_and_what_counts() -> None:
    async def body(wire: Wire) -> None:
        forward = await wire.calls.forward("p", _attempt(), X)
        assert torch.equal(forward.value, 2 * X) and forward.incarnation == 7
        tail = await wire.calls.tail("q", _attempt(stage=2), forward.value, TARGETS)
        assert tail.value.loss == 1.0 and torch.equal(tail.value.gradient, 4 * X)
        back = await wire.calls.backward("p", _attempt(), tail.value.gradient)
        assert torch.equal(back.value, 8 * X)
        key = _attempt().key
        assert not await wire.calls.settle("p", 1, Settlement(7, (Acknowledged(key, 2.5),), (), 0))
        assert await wire.calls.settle("p", 1, Settlement(7, (Acknowledged(Key("d", 9, 0), 2.5),), (), 0)) == {
            Key("d", 9, 0)
        }
        assert await wire.calls.settle("q", 2, Settlement(8, (Acknowledged(key, 2.5),), (), 0)) == {key}, "another life"
        assert wire.queues["p"].ledger._open[key].acknowledged
        assert wire.queues["p"].ledger._open[key].loss == 2.5
        assert wire.traffic.sent_bytes > 4 * X.nbytes and wire.traffic.received_bytes == 3 * X.nbytes
        assert not wire.named

    _on_wire(body)


@pytest.mark.parametrize(("form", "atol"), [("bf16", 0.5), ("int8", 0.5)])
def test_activations_in_fewer_bytes(form: Any, atol: float) -> None:
    shapes = StageShapes(most_sequences=2, context_tokens=8, width=4, vocabulary_size=256, activations=form)
    data = bytearray(shapes.codec.encode(X))
    assert len(data) == shapes.describe(X).size_bytes < X.nbytes
    torch.testing.assert_close(shapes.codec.decode_untrusted(data, X.shape), X, rtol=0, atol=atol)


def test_busy_is_said_before_the_tensors_are_read() -> None:
    async def body(wire: Wire) -> None:
        for sequence in range(3):
            await wire.calls.forward("p", _attempt(sequence), X)
        answer = await wire.raw("p", _frame(_question()))
        assert (answer.status, answer.reason[:8]) == (pb.StageAnswer.STATUS_BUSY, "too many")
        with raises_code("busy", BusyError, "driver"):
            await wire.calls.forward("p", _attempt(3), X)

    _on_wire(body)


def test_a_stage_that_is_not_held_is_gone() -> None:
    async def body(wire: Wire) -> None:
        with raises_code("gone", GoneError, "stage 2"):
            await wire.calls.tail("p", _attempt(stage=2), X, TARGETS)
        with raises_code("gone", GoneError, "forward"):
            await wire.calls.backward("p", _attempt(), X)
        with raises_code("gone", GoneError, "stage 0"):
            await wire.calls.forward("d", _attempt(stage=0), X)

    _on_wire(body)


# ---------------------------------------------------------------- who asks what it must not


def _shape(*shape: int, size_bytes: int | None = None, form: str = "fp32") -> pb.StageTensor:
    numbers = 1
    for length in shape:
        numbers *= length
    return pb.StageTensor(format=form, shape=shape, size_bytes=4 * numbers if size_bytes is None else size_bytes)


BAD_QUESTIONS: dict[str, tuple[str, pb.StageQuestion, str]] = {
    "too many sequences": ("p", _question(), "at most 2 sequences of 8 tokens"),
    "another width": ("p", _question(), r"\(sequences, tokens, 4\) is needed"),
    "fewer dimensions": ("p", _question(), r"\(sequences, tokens, 4\) is needed"),
    "nothing": ("p", _question(), "at most 2 sequences"),
    "another size": ("p", _question(), "in 12 bytes"),
    "another format": ("p", _question(), "another format than this run's fp32"),
    "no tensors": ("p", _question(), "with 0 tensors"),
    "more tokens than there are": ("p", _question(tokens=1000), "claims 1000 tokens"),
    "a kind that is none": ("p", _question(kind=pb.STAGE_KIND_UNSPECIFIED), "kind 0"),
    "a tail to a stage between": ("p", _question(kind=pb.STAGE_KIND_TAIL), "which this stage does not answer"),
    "a forward to the last stage": ("q", _question(stage=2), "which this stage does not answer"),
    "targets of another shape": ("q", _question(stage=2, kind=pb.STAGE_KIND_TAIL), r"not tokens of shape \(2, 8\)"),
    "a settlement with tensors": ("p", _question(kind=pb.STAGE_KIND_SETTLE), r"with tensors \(1\)"),
    "a loss that is none": ("p", _question(kind=pb.STAGE_KIND_SETTLE), "an impossible loss"),
}
for _name, _tensors in {
    "too many sequences": [_shape(3, 8, 4)],
    "another width": [_shape(2, 8, 5)],
    "fewer dimensions": [_shape(16, 4)],
    "nothing": [_shape(0, 8, 4)],
    "another size": [_shape(2, 8, 4, size_bytes=12)],
    "another format": [_shape(2, 8, 4, form="int8")],
    "no tensors": [],
    "targets of another shape": [_shape(2, 8, 4), _shape(2, 7, form="tokens")],
}.items():
    del BAD_QUESTIONS[_name][1].tensors[:]
    BAD_QUESTIONS[_name][1].tensors.extend(_tensors)


del BAD_QUESTIONS["a loss that is none"][1].tensors[:]
BAD_QUESTIONS["a loss that is none"][1].settlement.acknowledged.add(loss=float("nan"))


@pytest.mark.parametrize("name", BAD_QUESTIONS)
def test_a_wrong_question_is_refused_before_its_tensors_are_read(name: str) -> None:
    peer, question, reason = BAD_QUESTIONS[name]

    async def body(wire: Wire) -> None:
        answer = await wire.raw(peer, _frame(question))
        assert answer.status == pb.StageAnswer.STATUS_REFUSED
        assert wire.named == [("d", answer.reason)]
        assert wire.queues[peer].ledger.num_open == 0
        with pytest.raises(AssertionError, match=reason):
            raise AssertionError(answer.reason)

    _on_wire(body)


NAN = X.clone()
NAN[1, 2, 3] = float("nan")
BAD_BODIES = {
    "not finite": (_frame(_question(), NAN.numpy().tobytes()), "p", "not finite"),
    "another hash": (_frame(_question(), X.numpy().tobytes(), bytes(32)), "p", "do not match their hash"),
    "an unknown token": (
        _frame(
            _question(stage=2, kind=pb.STAGE_KIND_TAIL),
            X.numpy().tobytes() + (TARGETS + 250).to(torch.int32).numpy().tobytes(),
        ),
        "q",
        "a token outside the vocabulary of 256",
    ),
    "no message": (b"\x00\x00\x00\x04abcd", "p", "not a message"),
    "a message without end": (b"\xff\xff\xff\xff", "p", "at most 262144 are accepted"),
}


@pytest.mark.parametrize("name", BAD_BODIES)
def test_wrong_bytes_are_refused_and_named(name: str) -> None:
    data, peer, reason = BAD_BODIES[name]

    async def body(wire: Wire) -> None:
        answer = await wire.raw(peer, data)
        assert answer.status == pb.StageAnswer.STATUS_REFUSED and reason in answer.reason
        assert wire.named == [("d", answer.reason)]
        assert wire.queues[peer].ledger.num_open == 0

    _on_wire(body)


def test_one_that_stalls_or_hangs_up_is_let_go_of() -> None:
    async def body(wire: Wire) -> None:
        whole = _frame(_question(), X.numpy().tobytes())
        for data in (b"", whole[:3], whole[:20], whole[:-1]):
            _, writer = await wire.open_pipe("p", "")
            writer.write(data)
            serving = wire.tasks[-1]
            await asyncio.wait([serving], timeout=60.0)
            assert serving.done()
            _, hung_up = await wire.open_pipe("p", "")
            hung_up.write(data)
            hung_up.close()
            serving = wire.tasks[-1]
            await asyncio.wait([serving], timeout=1.0)
            assert serving.done()
            writer.close()
        assert not wire.hosts["p"]._num_questions
        assert wire.queues["p"].ledger.num_open == 0

    _on_wire(body)


def test_a_flood_is_told_busy() -> None:
    async def body(wire: Wire) -> None:
        held = [await wire.open_pipe("p", "") for _ in range(40)]
        await asyncio.sleep(0.1)
        with raises_code("busy", BusyError, "32 questions"):
            await wire.calls.forward("p", _attempt(), X)
        for _, writer in held:
            writer.close()
        await asyncio.sleep(0.1)
        assert (await wire.calls.forward("p", _attempt(), X)).incarnation == 7

    _on_wire(body)


def test_a_backward_of_what_is_not_here_is_gone_before_its_tensors_are_read() -> None:
    async def body(wire: Wire) -> None:
        answer = await wire.raw("p", _frame(_question(kind=pb.STAGE_KIND_BACKWARD)))
        assert (answer.status, answer.reason) == (pb.StageAnswer.STATUS_GONE, "its forward is not known here")
        assert not wire.named

    _on_wire(body)


def test_a_flood_of_backwards_is_told_busy() -> None:
    async def body(wire: Wire) -> None:
        await wire.calls.forward("p", _attempt(5), X)
        held = [await wire.open_pipe("p", "") for _ in range(32)]
        for _, writer in held:
            writer.write(_frame(_question(kind=pb.STAGE_KIND_BACKWARD)))
        await asyncio.sleep(0.1)
        with raises_code("busy", BusyError, "32 backwards"):
            await wire.calls.backward("p", _attempt(5), X)
        for _, writer in held:
            writer.close()
        await asyncio.sleep(0.1)
        assert torch.equal((await wire.calls.backward("p", _attempt(5), X)).value, 2 * X)
        assert not wire.hosts["p"]._num_backwards

    _on_wire(body)


def test_the_work_goes_on_when_the_one_who_asked_hangs_up_and_is_answered_when_it_asks_again() -> None:
    async def body(wire: Wire) -> None:
        asking = asyncio.create_task(wire.calls.forward("p", _attempt(), X))
        await asyncio.sleep(0)
        await asyncio.sleep(0.005)
        asking.cancel()
        await asyncio.wait([asking])
        await asyncio.sleep(0.1)
        again = await wire.calls.forward("p", _attempt(), X)
        assert torch.equal(again.value, 2 * X)

    _on_wire(body)


def test_a_gradient_of_another_shape_than_the_answer_is_refused() -> None:
    async def body(wire: Wire) -> None:
        await wire.calls.forward("p", _attempt(), X)
        other = StageAttempt(1, _attempt().key, TOKENS // 2)
        with raises_code("question-refused", BadBytesError, "(1, 8, 4)", "(2, 8, 4)"):
            await wire.calls.backward("p", other, X[:1])
        assert torch.equal((await wire.calls.backward("p", _attempt(), X)).value, 2 * X)

    _on_wire(body)


def test_numbers_that_cannot_be_sent_are_nobody_elses_fault() -> None:
    async def body(wire: Wire) -> None:
        wire.factor = float("inf")
        with raises_code("gone", GoneError):
            await wire.calls.forward("p", _attempt(), 1 + X)
        with raises_code("training-diverged", RunTimeError):
            await wire.calls.forward("p", _attempt(1), NAN)

    _on_wire(body)


# ---------------------------------------------------------------- who answers what it must not


def _answers(*answers: bytes) -> Callable[[Wire], Coroutine[Any, Any, PeerError]]:
    """Return the error that a driver gets from a peer that answers so."""

    async def run(wire: Wire) -> PeerError:
        wire.silent = True
        asking = asyncio.create_task(wire.calls.forward("p", _attempt(), X))
        await wire.opened.wait()
        _, writer = wire.streams[-1]
        for answer in answers:
            writer.write(answer)
        await asyncio.sleep(0.1)
        writer.close()
        with pytest.raises(PeerError) as error:
            await asking
        return error.value

    return run


def _answer(body: bytes = b"", **fields: Any) -> bytes:
    fields.setdefault("status", pb.StageAnswer.STATUS_OK)
    fields.setdefault("sha256", hashlib.sha256(body).digest())
    data = pb.StageAnswer(**fields).SerializeToString()
    return len(data).to_bytes(4, "big") + data + body


BAD_ANSWERS: dict[str, tuple[bytes, type[PeerError], str]] = {
    "no tensors": (_answer(), BadBytesError, "without activations"),
    "another shape": (_answer(tensors=[_shape(1, 8, 4)]), BadBytesError, "without activations of shape"),
    "another size": (_answer(tensors=[_shape(2, 8, 4, size_bytes=2**40)]), BadBytesError, "in 1099511627776 bytes"),
    "not finite": (_answer(NAN.numpy().tobytes(), tensors=[SHAPES.describe(X)]), BadBytesError, "not finite"),
    "another hash": (
        _answer(X.numpy().tobytes(), tensors=[SHAPES.describe(X)], sha256=bytes(32)),
        BadBytesError,
        "do not match their hash",
    ),
    "the end too early": (_answer(X.numpy().tobytes()[:-4], tensors=[SHAPES.describe(X)]), BrokenOffError, "early"),
    "nothing": (b"", BrokenOffError, "early"),
    "no status": (_answer(status=pb.StageAnswer.STATUS_UNSPECIFIED), BadBytesError, "it refuses"),
    "a reason for the terminal": (
        _answer(status=pb.StageAnswer.STATUS_GONE, reason="\x1b[2J"),
        BadBytesError,
        "not text",
    ),
    "garbage": (b"\x00\x00\x00\x04abcd", BadBytesError, "not a message"),
}


@pytest.mark.parametrize("name", BAD_ANSWERS)
def test_a_wrong_answer_costs_the_one_who_gave_it(name: str) -> None:
    answer, kind, reason = BAD_ANSWERS[name]

    async def body(wire: Wire) -> None:
        error = await _answers(answer)(wire)
        assert type(error) is kind and reason in str(error)

    _on_wire(body)


def test_an_answer_that_stops_is_given_up() -> None:
    async def body(wire: Wire) -> None:
        wire.silent = True
        asking = asyncio.create_task(wire.calls.forward("p", _attempt(), X))
        await wire.opened.wait()
        _, writer = wire.streams[-1]
        writer.write(_answer(X.numpy().tobytes(), tensors=[SHAPES.describe(X)])[:-8])
        with raises_code("stalled", StalledError, "10 s"):
            await asking

    _on_wire(body)


def test_nobody_there() -> None:
    async def body(wire: Wire) -> None:
        with pytest.raises(UnreachableError):
            await wire.calls.forward("x", _attempt(), X)

    _on_wire(body)

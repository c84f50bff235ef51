"""Ask stages and answer for them: one question and one answer per stream, each a message followed by its tensors.

The tensors that a message announces are checked before one of their bytes is read: the caller, who knows what was
asked, decides how many and how large they may be. A hash ends them. Every wait has a limit. A peer takes in a limited
number of questions at once, and answers others BUSY before it reads their bytes.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from google.protobuf.message import DecodeError, Message

from swarmtrain.errors import (
    BadBytesError,
    BrokenOffError,
    BusyError,
    GoneError,
    PeerError,
    StalledError,
    UnreachableError,
)
from swarmtrain.network.node import Node, TrafficCount
from swarmtrain.network.tasks import end_tasks
from swarmtrain.v1 import pipeline_pb2 as pb

_LENGTH_BYTES = 4
_MAX_MESSAGE_BYTES = 256 * 1024
_PIECE_BYTES = 256 * 1024
_MAX_QUESTIONS = 32
"""Calls that one peer may have open at once, apart from those that free memory, and as many backward calls: libp2p
resets streams beyond about 120."""
_HANG_UP_S = 2.0  # for the other end to hang up first
_M = TypeVar("_M", bound=Message)
_T = TypeVar("_T")

Body = Sequence[bytes | bytearray | memoryview]
"""Bytes of tensors, one after the other."""


def stage_stream_name(run_sha256: str) -> str:
    """Return the name of the streams of a run's stages."""
    return f"swarmtrain1.{run_sha256[:32]}::Stage.ask"


@dataclass(frozen=True, kw_only=True)
class StageLimits:
    """Time limits in seconds."""

    stall_s: float = 10.0
    """Limit for the next piece that is sent or received."""
    answer_s: float = 600.0
    """Limit for an answer to begin; callers may limit it further."""


# ---------------------------------------------------------------- one direction of a stream


async def _send(
    writer: asyncio.StreamWriter, traffic: TrafficCount, message: Message, body: Body, stall_s: float
) -> None:
    """Send a message and the bytes of its tensors. Raises StalledError or BrokenOffError."""
    data = message.SerializeToString()
    await _write(writer, traffic, len(data).to_bytes(_LENGTH_BYTES, "big") + data, stall_s)
    for tensor in body:
        view = memoryview(tensor)
        for start in range(0, len(view), _PIECE_BYTES):
            await _write(writer, traffic, view[start : start + _PIECE_BYTES], stall_s)


async def _write(
    writer: asyncio.StreamWriter, traffic: TrafficCount, piece: bytes | memoryview, stall_s: float
) -> None:
    await traffic.up.turn(len(piece))
    traffic.sent_bytes += len(piece)
    writer.write(piece)
    try:
        async with asyncio.timeout(stall_s):
            await writer.drain()
    except TimeoutError:
        raise StalledError(f"it takes nothing for {stall_s:g} s") from None
    except OSError as error:
        raise BrokenOffError("the stream broke") from error


async def _message_untrusted(reader: asyncio.StreamReader, kind: type[_M], limit_s: float) -> _M:
    """Read the next message. Raises BadBytesError if it is none."""
    try:
        async with asyncio.timeout(limit_s):
            size = int.from_bytes(await reader.readexactly(_LENGTH_BYTES), "big")
            if size > _MAX_MESSAGE_BYTES:
                raise BadBytesError(
                    f"a message of {size} bytes; at most {_MAX_MESSAGE_BYTES} are accepted", code="bad-size"
                )
            return kind.FromString(await reader.readexactly(size))
    except DecodeError:
        raise BadBytesError("bytes that are not a message", code="bad-format") from None
    except TimeoutError:
        raise StalledError(f"it says nothing for {limit_s:g} s") from None
    except (OSError, EOFError) as error:
        raise BrokenOffError("the stream ended early") from error


async def _body_untrusted(
    reader: asyncio.StreamReader, traffic: TrafficCount, message: pb.StageQuestion | pb.StageAnswer, stall_s: float
) -> list[bytearray]:
    """Read the tensors of a message whose sizes are checked already. Raises BadBytesError if the hash differs."""
    body, digest = [], hashlib.sha256()
    for tensor in message.tensors:
        data = bytearray()
        while (left := tensor.size_bytes - len(data)) > 0:
            try:
                async with asyncio.timeout(stall_s):
                    piece = await reader.readexactly(min(left, _PIECE_BYTES))
            except TimeoutError:
                raise StalledError(f"it sends nothing for {stall_s:g} s") from None
            except (OSError, EOFError) as error:
                raise BrokenOffError("the stream ended early") from error
            data += piece
            digest.update(piece)
            traffic.received_bytes += len(piece)
            await traffic.down.turn(len(piece))
        body.append(data)
    if message.tensors and digest.digest() != message.sha256:
        raise BadBytesError("tensors that do not match their hash", code="bad-hash")
    return body


def _sha256(body: Body) -> bytes:
    digest = hashlib.sha256()
    for tensor in body:
        digest.update(tensor)
    return digest.digest()


# ---------------------------------------------------------------- the asking end


@dataclass
class StageClient:
    """Asks other peers' stages."""

    node: Node
    run_sha256: str
    limits: StageLimits = field(default_factory=StageLimits)
    on_failure: Callable[[str, PeerError], None] = lambda peer, error: None
    """Called with a peer that cannot be reached."""

    async def ask(
        self, peer: str, question: pb.StageQuestion, body: Body, check_untrusted: Callable[[pb.StageAnswer], None]
    ) -> tuple[pb.StageAnswer, list[bytearray]]:
        """Return a good answer and its tensors.

        `check_untrusted` raises BadBytesError, before they are read, for tensors that are not as they must be. Raises
        the PeerError that says why there is no answer.
        """
        question.sha256 = _sha256(body)
        try:
            reader, writer = await self.node.open_pipe(peer, stage_stream_name(self.run_sha256))
        except UnreachableError as error:
            self.on_failure(peer, error)
            raise
        traffic, stall_s = self.node.traffic, self.limits.stall_s
        sending = asyncio.create_task(_send(writer, traffic, question, body, stall_s))
        answering = asyncio.create_task(_message_untrusted(reader, pb.StageAnswer, self.limits.answer_s))
        try:
            # A busy peer answers before it has everything, and reads no further.
            await asyncio.wait({sending, answering}, return_when=asyncio.FIRST_COMPLETED)
            if sending.done() and not answering.done() and (failed := sending.exception()) is not None:
                await asyncio.wait({answering}, timeout=_HANG_UP_S)
                if not answering.done() or answering.exception() is not None:
                    raise failed
            answer = await answering
            _raise_status_untrusted(answer)
            check_untrusted(answer)
            return answer, await _body_untrusted(reader, traffic, answer, stall_s)
        finally:
            await end_tasks([sending, answering])
            with contextlib.suppress(OSError):
                writer.close()


def _raise_status_untrusted(answer: pb.StageAnswer) -> None:
    reason = answer.reason[:200]
    if not reason.isprintable():
        raise BadBytesError("a reason that is not text", code="bad-format")
    match answer.status:
        case pb.StageAnswer.STATUS_OK:
            return
        case pb.StageAnswer.STATUS_BUSY:
            raise BusyError(reason)
        case pb.StageAnswer.STATUS_GONE:
            raise GoneError(reason)
        case _:
            raise BadBytesError(f"it refuses the question: {reason}", code="question-refused")


# ---------------------------------------------------------------- the answering end


class StageAnswers(Protocol):
    """Answering side of a peer's stages. `caller` is a PeerID in base58."""

    def check_untrusted(self, caller: str, question: pb.StageQuestion) -> None:
        """Check a question before its tensors are read.

        Raises BadBytesError if it is not allowed, BusyError if it cannot be answered now, GoneError if its subject is
        not here.
        """

    async def answer_untrusted(
        self, caller: str, question: pb.StageQuestion, body: list[bytearray]
    ) -> tuple[pb.StageAnswer, Body]:
        """Return the answer and its tensors. Raises BusyError, GoneError or BadBytesError."""

    def refused(self, peer: str, error: PeerError) -> None:
        """Report a peer that asks what it must not."""


@dataclass
class StageHost:
    """Receives the calls to this peer's stages and sends their answers."""

    traffic: TrafficCount
    answers: StageAnswers
    limits: StageLimits = field(default_factory=StageLimits)
    _num_questions: Counter[str] = field(default_factory=Counter)
    """Questions being answered, by caller."""
    _num_backwards: Counter[str] = field(default_factory=Counter)
    """Backward questions among them, by caller."""

    async def serve(self, caller: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer the question of one stream."""
        try:
            with _counted(self._num_questions, caller), contextlib.suppress(PeerError):  # the caller has hung up
                await self._serve(caller, reader, writer)
                # If the stream were closed at once, bytes under way could be lost.
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_HANG_UP_S):
                        await _until_hung_up(reader)
        finally:
            with contextlib.suppress(OSError):
                writer.close()

    async def _serve(self, caller: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Read a question and send its answer, or the status that says why there is none."""
        body: Body = ()
        try:
            question = await _message_untrusted(reader, pb.StageQuestion, self.limits.stall_s)
            with self._admitted(caller, question.kind):
                self.answers.check_untrusted(caller, question)
                tensors = await _body_untrusted(reader, self.traffic, question, self.limits.stall_s)
                answer, body = await _unless_hung_up(reader, self.answers.answer_untrusted(caller, question, tensors))
            answer.status, answer.sha256 = pb.StageAnswer.STATUS_OK, _sha256(body)
        except BusyError as error:
            answer = pb.StageAnswer(status=pb.StageAnswer.STATUS_BUSY, reason=str(error))
        except GoneError as error:
            answer = pb.StageAnswer(status=pb.StageAnswer.STATUS_GONE, reason=str(error))
        except BadBytesError as error:
            self.answers.refused(caller, error)
            answer = pb.StageAnswer(status=pb.StageAnswer.STATUS_REFUSED, reason=str(error))
        await _send(writer, self.traffic, answer, body, self.limits.stall_s)

    @contextlib.contextmanager
    def _admitted(self, caller: str, kind: pb.StageKind) -> Iterator[None]:
        """Admit a question of this kind while the block runs. Raises BusyError if the caller has too many."""
        if kind in (pb.STAGE_KIND_FORWARD, pb.STAGE_KIND_TAIL) and self._num_questions[caller] > _MAX_QUESTIONS:
            raise BusyError(f"{_MAX_QUESTIONS} questions of this peer are being answered")
        if kind != pb.STAGE_KIND_BACKWARD:
            yield
            return
        with _counted(self._num_backwards, caller) as number:
            if number > _MAX_QUESTIONS:
                raise BusyError(f"{_MAX_QUESTIONS} backwards of this peer are being answered")
            yield


@contextlib.contextmanager
def _counted(numbers: Counter[str], caller: str) -> Iterator[int]:
    """Count one more of this caller while the block runs, and yield its number."""
    numbers[caller] += 1
    try:
        yield numbers[caller]
    finally:
        numbers[caller] -= 1
        if not numbers[caller]:
            del numbers[caller]


async def _until_hung_up(reader: asyncio.StreamReader) -> None:
    with contextlib.suppress(OSError):
        while await reader.read(_PIECE_BYTES):
            pass


async def _unless_hung_up(reader: asyncio.StreamReader, answering: Coroutine[Any, Any, _T]) -> _T:
    """Return the answer, or raise BrokenOffError as soon as the caller hangs up."""
    task, gone = asyncio.create_task(answering), asyncio.create_task(_until_hung_up(reader))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise BrokenOffError("it hung up")
        return task.result()
    finally:
        await end_tasks([task, gone])

"""Stages over the network: answer what drivers ask of this peer's stages, and ask other peers' stages as a driver.

Tensors are turned into bytes here, and bytes from others are checked here, before they are decoded. A peer's questions
to itself skip the network. Everything runs in the network thread but coding, which a pool does.

Shapes: B batch (a microbatch's sequences), T time (tokens), D width.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from swarmtrain.algorithm.quantize import Format
from swarmtrain.errors import BadBytesError, GoneError, PeerError, RunTimeError, UnreachableError
from swarmtrain.network.codec import ActivationCodec
from swarmtrain.network.stage_calls import Body, StageClient
from swarmtrain.peer.pipeline.driver import StageAttempt, StageResult, Tail
from swarmtrain.peer.pipeline.request_queue import StageRequestQueue
from swarmtrain.protocol.pipeline.ledger import Acknowledged, Key, Kind, Settlement
from swarmtrain.v1 import pipeline_pb2 as pb

_KINDS: dict[Kind, pb.StageKind] = {
    "forward": pb.STAGE_KIND_FORWARD,
    "backward": pb.STAGE_KIND_BACKWARD,
    "tail": pb.STAGE_KIND_TAIL,
}
_OF_KINDS = {number: kind for kind, number in _KINDS.items()}
_TOKENS = "tokens"
_MAX_KEYS = 4096
_MAX_LOSS = 1e6
_MOST_STAY_S = 3600.0
_ASK_TO_STAY_S = 10.0
_MAX_REASON = 200


@dataclass(frozen=True, kw_only=True)
class StageShapes:
    """Shapes and formats of what travels between a run's stages."""

    most_sequences: int
    """Sequences of a microbatch at most."""
    context_tokens: int
    width: int
    vocabulary_size: int
    activations: Format

    @property
    def codec(self) -> ActivationCodec:
        """Codec of activations and of their gradients."""
        return ActivationCodec(self.activations)

    def describe(self, tensor: Tensor) -> pb.StageTensor:
        """Return the description of activations (B, T, D), or of their gradient."""
        size_bytes = self.codec.size_bytes(tensor.shape)
        return pb.StageTensor(format=self.activations, shape=list(tensor.shape), size_bytes=size_bytes)

    def describe_tokens(self, tokens: Tensor) -> pb.StageTensor:
        """Return the description of tokens (B, T)."""
        size_bytes = self.codec.tokens_size_bytes(tokens.shape)
        return pb.StageTensor(format=_TOKENS, shape=list(tokens.shape), size_bytes=size_bytes)

    def check_untrusted(self, tensor: pb.StageTensor) -> None:
        """Raise BadBytesError if these are not activations of this run."""
        shape = tuple(tensor.shape)
        if tensor.format != self.activations:
            raise BadBytesError(f"activations in another format than this run's {self.activations}", code="bad-format")
        if len(shape) != 3 or shape[2] != self.width:
            raise BadBytesError(
                f"activations of shape {shape[:8]}, where (sequences, tokens, {self.width}) is needed", code="bad-shape"
            )
        self._check_microbatch_untrusted(shape)
        if tensor.size_bytes != self.codec.size_bytes(shape):
            raise BadBytesError(
                f"activations of shape {shape} in {tensor.size_bytes} bytes, not {self.codec.size_bytes(shape)}",
                code="bad-size",
            )

    def check_tokens_untrusted(self, tensor: pb.StageTensor, shape: tuple[int, ...]) -> None:
        """Raise BadBytesError if these are not tokens of this shape."""
        if tensor.format != _TOKENS or tuple(tensor.shape) != shape:
            raise BadBytesError(f"targets that are not tokens of shape {shape}", code="bad-shape")
        if tensor.size_bytes != self.codec.tokens_size_bytes(shape):
            raise BadBytesError(
                f"targets of shape {shape} in {tensor.size_bytes} bytes, not {self.codec.tokens_size_bytes(shape)}",
                code="bad-size",
            )

    def _check_microbatch_untrusted(self, shape: tuple[int, ...]) -> None:
        if not (0 < shape[0] <= self.most_sequences and 0 < shape[1] <= self.context_tokens):
            most = f"{self.most_sequences} sequences of {self.context_tokens} tokens"
            raise BadBytesError(
                f"activations of shape {shape}: a microbatch of this run has at most {most}", code="bad-size"
            )


# ---------------------------------------------------------------- being asked


@dataclass
class StageServer:
    """Answers questions to the stages that this peer holds."""

    shapes: StageShapes
    num_stages: int
    queues: Mapping[int, StageRequestQueue]
    """Request queue of each held stage, by stage."""
    on_refused: Callable[[str, PeerError], None]
    stays_s: Callable[[str, int], tuple[float, str]] = lambda mover, stage: (0.0, "nobody moves in this run")
    """Return the seconds that this peer promises `mover` to stay in a stage (0 if it does not), and the reason."""

    def check_untrusted(self, caller: str, question: pb.StageQuestion) -> None:
        """Check a question before its tensors are read. See `StageAnswers`."""
        queue = self._queue(question)
        tensors = list(question.tensors)
        if question.kind == pb.STAGE_KIND_STAY:
            if tensors:
                raise BadBytesError("tensors in a question of a kind that has none", code="bad-shape")
            return
        if question.kind == pb.STAGE_KIND_SETTLE:
            keys = len(question.settlement.acknowledged) + len(question.settlement.dropped)
            if tensors or keys > _MAX_KEYS:
                raise BadBytesError(
                    f"a settlement with too many microbatches ({keys}), or with tensors ({len(tensors)})",
                    code="bad-shape",
                )
            if not all(0 <= key.loss <= _MAX_LOSS for key in question.settlement.acknowledged):
                raise BadBytesError("a settlement with an impossible loss", code="not-finite")
            return
        kind = _OF_KINDS.get(question.kind)
        is_last = question.stage == self.num_stages - 1
        if kind is None or (kind == "tail") != is_last or len(tensors) != (2 if kind == "tail" else 1):
            raise BadBytesError(
                f"a question of kind {question.kind} with {len(tensors)} tensors, which this stage does not answer",
                code="bad-shape",
            )
        if question.stage == 0:
            raise BadBytesError(
                "a question to the first stage, which only its own driver may ask", code="not-asked-for"
            )
        self.shapes.check_untrusted(tensors[0])
        shape = tuple(tensors[0].shape)
        if kind == "tail":
            self.shapes.check_tokens_untrusted(tensors[1], shape[:2])
        if question.tokens != math.prod(shape[:2]):
            raise BadBytesError(
                f"a microbatch of shape {shape} that claims {question.tokens} tokens, another number", code="bad-tokens"
            )
        # BUSY comes before the tensors are read, so that asking again costs a round trip and no transfer (decision 38).
        queue.check(_key(caller, question.key), kind)

    async def answer_untrusted(
        self, caller: str, question: pb.StageQuestion, body: list[bytearray]
    ) -> tuple[pb.StageAnswer, Body]:
        """Return the answer and its tensors. See `StageAnswers`."""
        queue = self._queue(question)
        if question.kind == pb.STAGE_KIND_STAY:
            stays_s, reason = self.stays_s(caller, question.stage)
            return pb.StageAnswer(stays_s=stays_s, reason=reason, life=queue.ledger.incarnation), ()
        if question.kind == pb.STAGE_KIND_SETTLE:
            said = question.settlement
            late = queue.settle(caller, _settlement(caller, said))
            return pb.StageAnswer(late=[_key_message(key) for key in late], life=queue.ledger.incarnation), ()
        kind, shapes = _OF_KINDS[question.kind], self.shapes
        shape = tuple(question.tensors[0].shape)
        payload: Any = await asyncio.to_thread(shapes.codec.decode_untrusted, body[0], shape)
        if kind == "tail":
            payload = payload, shapes.codec.tokens_untrusted(body[1], shape[:2], shapes.vocabulary_size)
        answer = await queue.ask(_key(caller, question.key), kind, question.tokens, payload)
        tensor = answer.gradient if isinstance(answer, Tail) else answer
        message = pb.StageAnswer(tensors=[shapes.describe(tensor)], life=queue.ledger.incarnation)
        if isinstance(answer, Tail):
            message.loss = answer.loss
        try:
            return message, (await asyncio.to_thread(shapes.codec.encode, tensor),)
        except ValueError:
            raise GoneError("what was computed of it is not finite") from None

    def refused(self, peer: str, error: PeerError) -> None:
        """Report a peer that asks what it must not. See `StageAnswers`."""
        self.on_refused(peer, error)

    def _queue(self, question: pb.StageQuestion) -> StageRequestQueue:
        queue = self.queues.get(question.stage)
        if queue is None:
            raise GoneError(f"this peer does not hold stage {question.stage}")
        return queue


def _key(driver: str, key: pb.MicrobatchKey) -> Key:
    return Key(driver, key.sequence, key.attempt)


def _key_message(key: Key, loss: float = 0.0) -> pb.MicrobatchKey:
    return pb.MicrobatchKey(sequence=key.sequence, attempt=key.attempt, loss=loss)


def _settlement(driver: str, said: pb.Settlement) -> Settlement:
    return Settlement(
        incarnation=said.life,
        acknowledged=tuple(Acknowledged(_key(driver, key), key.loss) for key in said.acknowledged),
        dropped=tuple(_key(driver, key) for key in said.dropped),
        oldest_open=said.oldest_open,
    )


# ---------------------------------------------------------------- asking


@dataclass
class WireCalls:
    """Calls of a driver to stages, over the network or to itself: see `StageCalls`."""

    me: str
    client: StageClient
    shapes: StageShapes
    queues: Mapping[int, StageRequestQueue]
    """Request queues of this peer's own stages, by stage."""

    async def forward(self, peer: str, attempt: StageAttempt, x: Tensor) -> StageResult:
        """Return the input of the next stage (B, T, D)."""
        return await self._activations(peer, attempt, "forward", x)

    async def backward(self, peer: str, attempt: StageAttempt, gradient: Tensor) -> StageResult:
        """Return the gradient of the input (B, T, D); None from the first stage."""
        return await self._activations(peer, attempt, "backward", gradient)

    async def tail(self, peer: str, attempt: StageAttempt, x: Tensor, targets: Tensor) -> StageResult:
        """Return a `Tail`. Targets are (B, T)."""
        if peer == self.me:
            return await self._own(attempt, "tail", (x, targets))
        described = [self.shapes.describe(x), self.shapes.describe_tokens(targets)]
        body = [await self._encoded(x), self.shapes.codec.encode_tokens(targets)]
        answer, gradient = await self._ask(peer, _question(attempt, "tail", described), body, tuple(x.shape))
        if not 0 <= answer.loss <= _MAX_LOSS:  # NaN too
            raise BadBytesError("an impossible loss", code="not-finite")
        return StageResult(Tail(answer.loss, gradient), answer.life)

    async def settle(self, peer: str, stage: int, settlement: Settlement) -> set[Key]:
        """Tell a peer which microbatches count; return the acknowledged ones for which it comes too late."""
        if peer == self.me:
            return self._queue(stage).settle(self.me, settlement)
        said = pb.Settlement(
            acknowledged=[_key_message(key, loss) for key, loss in settlement.acknowledged],
            dropped=[_key_message(key) for key in settlement.dropped],
            oldest_open=settlement.oldest_open,
            life=settlement.incarnation,
        )
        question = pb.StageQuestion(stage=stage, kind=pb.STAGE_KIND_SETTLE, settlement=said)
        answer, _ = await self.client.ask(peer, question, (), _nothing_untrusted)
        return {_key(self.me, key) for key in answer.late}

    async def ask_to_stay(self, peer: str, stage: int) -> tuple[float, str]:
        """Ask `peer` to stay in the stage; return the seconds that it promises (0 if it does not), and its reason."""
        question = pb.StageQuestion(stage=stage, kind=pb.STAGE_KIND_STAY)
        try:
            async with asyncio.timeout(_ASK_TO_STAY_S):
                answer, _ = await self.client.ask(peer, question, (), _nothing_untrusted)
        except TimeoutError:
            raise UnreachableError(f"no answer within {_ASK_TO_STAY_S:g} s") from None
        if not 0 <= answer.stays_s <= _MOST_STAY_S:
            raise BadBytesError(f"a promise to stay for {answer.stays_s:g} s, which is out of range", code="bad-number")
        return answer.stays_s, answer.reason[:_MAX_REASON]

    async def _activations(self, peer: str, attempt: StageAttempt, kind: Kind, x: Tensor) -> StageResult:
        if peer == self.me:
            return await self._own(attempt, kind, x)
        body = [await self._encoded(x)]
        question = _question(attempt, kind, [self.shapes.describe(x)])
        answer, tensor = await self._ask(peer, question, body, tuple(x.shape))
        return StageResult(tensor, answer.life)

    async def _encoded(self, x: Tensor) -> memoryview:
        """Encode this peer's tensor. What others sent was checked, so numbers that are not finite are this peer's
        own.
        """
        try:
            return await asyncio.to_thread(self.shapes.codec.encode, x)
        except ValueError:
            raise RunTimeError(
                "training diverged: what the first stage computes is not finite; lower inner.learning_rate",
                code="training-diverged",
            ) from None

    async def _ask(
        self, peer: str, question: pb.StageQuestion, body: Body, shape: tuple[int, ...]
    ) -> tuple[pb.StageAnswer, Tensor]:
        """Ask a peer; return its answer and the activations of that shape in it."""

        def check_untrusted(answer: pb.StageAnswer) -> None:
            if len(answer.tensors) != 1 or tuple(answer.tensors[0].shape) != shape:
                raise BadBytesError(f"an answer without activations of shape {shape}", code="bad-shape")
            self.shapes.check_untrusted(answer.tensors[0])

        answer, tensors = await self.client.ask(peer, question, body, check_untrusted)
        return answer, await asyncio.to_thread(self.shapes.codec.decode_untrusted, tensors[0], shape)

    async def _own(self, attempt: StageAttempt, kind: Kind, payload: Any) -> StageResult:
        queue = self._queue(attempt.stage)
        return StageResult(await queue.ask(attempt.key, kind, attempt.tokens, payload), queue.ledger.incarnation)

    def _queue(self, stage: int) -> StageRequestQueue:
        queue = self.queues.get(stage)
        if queue is None:
            raise GoneError(f"this peer does not hold stage {stage} any more")
        return queue


def _question(attempt: StageAttempt, kind: Kind, tensors: list[pb.StageTensor]) -> pb.StageQuestion:
    return pb.StageQuestion(
        stage=attempt.stage, kind=_KINDS[kind], key=_key_message(attempt.key), tokens=attempt.tokens, tensors=tensors
    )


def _nothing_untrusted(answer: pb.StageAnswer) -> None:
    if answer.tensors:
        raise BadBytesError("tensors in an answer of a kind that has none", code="bad-shape")

"""Tensors to bytes and back: the one module of this folder that imports torch.

On the wire a vector is little-endian fp32; what cannot be a vector of the model is refused before it is used.
"""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from swarmtrain.algorithm.gossip import PartnerUpdate
from swarmtrain.algorithm.outer import OuterState, weighted_mean
from swarmtrain.algorithm.quantize import ErrorFeedback, Format, decode, encode, encoded_size_bytes, less_decoded
from swarmtrain.errors import BadBytesError
from swarmtrain.network.sections import SectionSpec
from swarmtrain.network.snapshots.store import Body, HeldSnapshot, TensorSpec, all_finite
from swarmtrain.protocol.gossip.partners import News
from swarmtrain.protocol.gossip.pulls import Section, SectionBytes

__all__ = [
    "ActivationCodec",
    "GradientCodec",
    "PublicationCodec",
    "VectorCodec",
    "average_bytes_untrusted",
    "body_of",
    "body_of_state",
    "tensor_specs",
    "vector_sha256",
    "vector_untrusted",
]

assert sys.byteorder == "little", "swarmtrain's wire format is little-endian, and so must the machine be"


def tensor_specs(parameters: Iterable[tuple[str, Tensor]]) -> tuple[TensorSpec, ...]:
    """The tensor table of named parameters, in the order in which they are flattened."""
    return tuple(TensorSpec(name, tuple(parameter.shape)) for name, parameter in parameters)


def _view(vector: Tensor) -> memoryview:
    assert vector.dtype is torch.float32 and vector.is_contiguous() and vector.device.type == "cpu"
    return memoryview(vector.detach().numpy()).cast("B")  # type: ignore[arg-type]


def body_of(*vectors: Tensor) -> Body:
    """A snapshot's body over fp32 vectors, which must not be written into afterwards; nothing is copied."""
    return Body([_view(vector) for vector in vectors])


def body_of_state(state: OuterState) -> Body:
    """The body of a state's snapshot: theta, then momentum; nothing is copied."""
    theta, momentum = state.pieces()
    return body_of(*theta, *momentum)


def vector_sha256(vector: Tensor) -> str:
    """SHA-256 of an fp32 vector's bytes, hex."""
    return hashlib.sha256(_view(vector)).hexdigest()


def vector_untrusted(data: bytearray | memoryview) -> Tensor:
    """An fp32 vector (N,) over the 4 N bytes given, which must be writable; BadBytesError if it is not finite."""
    if not len(data) or len(data) % 4:
        raise BadBytesError(f"{len(data)} bytes are no vector of fp32", code="bad-size")
    if not all_finite(data):
        raise BadBytesError("a vector that is not finite", code="not-finite")
    return torch.frombuffer(data, dtype=torch.float32)


def average_bytes_untrusted(parts: Sequence[memoryview], weights: Sequence[int]) -> tuple[bytearray, list[int]]:
    """The weighted mean of equally long fp32 vectors as bytes, and the indices left out as not finite.

    What is left out depends on the bytes alone, so everyone who averages the same parts gets the same bits. When
    nothing is left, the mean is zero: a round without progress. ValueError if the parts differ in length.
    """
    if len({len(part) for part in parts}) != 1:
        raise ValueError(f"parts of one length are needed, got {[len(part) for part in parts]}")
    vectors, kept, left_out = [], [], []
    for index, (part, weight) in enumerate(zip(parts, weights, strict=True)):
        try:
            vectors.append(vector_untrusted(part))
            kept.append(weight)
        except BadBytesError:
            left_out.append(index)
    mean = bytearray(len(parts[0]))
    if vectors:
        torch.frombuffer(mean, dtype=torch.float32).copy_(weighted_mean(vectors, kept))
    return mean, left_out


_PIECE = 1 << 18


@dataclass(frozen=True)
class VectorCodec:
    """One vector of the model as a publication's bytes and back, in one of the formats of its section."""

    section: SectionSpec
    format: Format

    @cached_property
    def tensors(self) -> tuple[TensorSpec, ...]:
        """Its place in the tensor table of a publication."""
        return self.section.table(self.format)

    @property
    def size_bytes(self) -> int:
        """What it takes of a publication."""
        return encoded_size_bytes(self.format, self._sizes)

    @property
    def _sizes(self) -> list[int]:
        return _sizes_of(self.section.tensors)

    def encode(self, vector: Tensor) -> memoryview:
        """The bytes of `vector` (P,)."""
        return _bytes_of(encode(vector, self.format, self._sizes))

    def decode_untrusted(self, held: HeldSnapshot) -> Tensor:
        """The vector (P,) of a publication that is here; BadBytesError if it is not finite."""
        vector = self.decode(held.part(0, self.size_bytes))
        _check_finite_untrusted(vector)
        return vector

    def decode(self, data: bytearray | memoryview) -> Tensor:
        """The vector (P,) of what `encode` gave, or of any bytes as many: its numbers may not be finite."""
        return decode(torch.frombuffer(data, dtype=torch.uint8), self.format, self._sizes)


@dataclass(frozen=True)
class GradientCodec:
    """A peer's pseudo-gradients as publications' bytes, and others' back, each in whichever of several formats its
    author has chosen."""

    section: SectionSpec

    @cached_property
    def of(self) -> dict[Format, VectorCodec]:
        """Of each format, the coarsest first."""
        return {format: VectorCodec(self.section, format) for format in self.section.formats}

    @cached_property
    def _feedback(self) -> ErrorFeedback:
        """What int4 or int2 has lost so far; the other formats lose too little to be worth it."""
        return ErrorFeedback(_sizes_of(self.section.tensors))

    def encode_sum(self, vector: Tensor, format: Format, round: int, part: int = 1) -> memoryview:
        """The bytes of one of many vectors (P,) whose sum counts, as of a part of a round. What int4 or int2 loses in a
        round is added to a later one's. Not for several threads at once."""
        if format not in ("int4", "int2"):
            return self.of[format].encode(vector)
        return _bytes_of(self._feedback.encode(vector, format, round, part))

    def over(self, round: int) -> None:
        """Nothing of that round, or of one before it, is asked for any more."""
        self._feedback.over(round)

    def decode_untrusted(self, held: HeldSnapshot) -> Tensor:
        """The vector (P,) of a publication that is here, with a tensor table of one of these formats; BadBytesError
        if it is not finite."""
        return self._codec_of(held).decode_untrusted(held)

    def less(self, vector: Tensor, held: HeldSnapshot) -> Tensor:
        """`vector` (P,) less that of a publication that was decoded before, in its place."""
        codec = self._codec_of(held)
        data = torch.frombuffer(held.part(0, codec.size_bytes), dtype=torch.uint8)
        return less_decoded(vector, data, codec.format, _sizes_of(self.section.tensors))

    def _codec_of(self, held: HeldSnapshot) -> VectorCodec:
        return self.of[self.section.format_of(held.snapshot.manifest.tensors[0].dtype)]


@dataclass(frozen=True)
class PublicationCodec:
    """What is published as bytes and back: the pseudo-gradient in one format or another, and what is averaged, the
    weights that a round begins with among it."""

    sections: tuple[SectionSpec, ...]

    @cached_property
    def averaged(self) -> dict[Section, VectorCodec]:
        """Of each section that is averaged."""
        return {one.name: VectorCodec(one, one.formats[0]) for one in self.sections if one.rule == "mean"}

    @cached_property
    def weights(self) -> VectorCodec:
        """Of theta, which the outer step begins with."""
        (codec,) = (each for each in self.averaged.values() if not each.section.num_parts)
        return codec

    @cached_property
    def gradient(self) -> GradientCodec:
        """Of the pseudo-gradient."""
        (section,) = (each for each in self.sections if each.rule == "outer step")
        return GradientCodec(section)

    def sizes(self, share: float = 1.0) -> dict[Format, SectionBytes]:
        """What they weigh with the pseudo-gradient in each of its formats; `share` of the whole model's number."""
        weights = sum(codec.size_bytes for codec in self.averaged.values())
        return {format: SectionBytes(weights, codec.size_bytes, share) for format, codec in self.gradient.of.items()}

    def arrival_untrusted(
        self, name: Section, held: HeldSnapshot, news: News, earlier: HeldSnapshot | None
    ) -> PartnerUpdate:
        """What is new of that section of a publication that is here, as its rule takes it into a merge; BadBytesError
        if it is not finite. `earlier` is the publication that `news` is the difference to."""
        if (codec := self.averaged.get(name)) is None:
            return self.gradient_untrusted(held, news, earlier)
        values = codec.decode_untrusted(held)
        return PartnerUpdate(values, values, 0)  # without tokens a gradient is not looked at

    def gradient_untrusted(self, held: HeldSnapshot, news: News, earlier: HeldSnapshot | None) -> PartnerUpdate:
        """What is new of a pseudo-gradient (P,) that is here, see `arrival_untrusted`."""
        gradient = self.gradient.decode_untrusted(held)
        if earlier is not None:
            self.gradient.less(gradient, earlier)
            _check_finite_untrusted(gradient)
        return PartnerUpdate(theta=None, gradient=gradient, tokens=news.tokens)


@dataclass(frozen=True)
class ActivationCodec:
    """Activations between stages, and their gradients, as bytes and back; and tokens."""

    format: Format

    def size_bytes(self, shape: Sequence[int]) -> int:
        """What a tensor of this shape takes."""
        return encoded_size_bytes(self.format, [math.prod(shape)])

    def encode(self, tensor: Tensor) -> memoryview:
        """The bytes of `tensor`, fp32."""
        return _bytes_of(encode(tensor.contiguous().view(-1), self.format, [tensor.numel()]))

    def decode_untrusted(self, data: bytearray, shape: Sequence[int]) -> Tensor:
        """The tensor of this shape; BadBytesError if the bytes are too few or many, or a number is not finite."""
        if len(data) != self.size_bytes(shape):
            raise BadBytesError(
                f"{len(data)} bytes where {self.size_bytes(shape)} are {tuple(shape)} as {self.format}", code="bad-size"
            )
        tensor = decode(torch.frombuffer(data, dtype=torch.uint8), self.format, [math.prod(shape)])
        if not bool(torch.isfinite(tensor).all()):
            raise BadBytesError("activations that are not finite", code="not-finite")
        return tensor.view(tuple(shape))

    @staticmethod
    def tokens_size_bytes(shape: Sequence[int]) -> int:
        """What tokens of this shape take."""
        return 4 * math.prod(shape)

    @staticmethod
    def encode_tokens(tokens: Tensor) -> memoryview:
        """The bytes of `tokens`, int64, each below 2**31."""
        return _bytes_of(tokens.to(torch.int32).contiguous().view(-1))

    @staticmethod
    def tokens_untrusted(data: bytearray, shape: Sequence[int], vocabulary_size: int) -> Tensor:
        """Tokens of this shape, int64; BadBytesError if the bytes are too few or many, or a token is unknown."""
        if len(data) != ActivationCodec.tokens_size_bytes(shape):
            raise BadBytesError(f"{len(data)} bytes are not {tuple(shape)} tokens", code="bad-size")
        tokens = torch.frombuffer(data, dtype=torch.int32).to(torch.int64)
        if not bool(((tokens >= 0) & (tokens < vocabulary_size)).all()):
            raise BadBytesError(f"a token that is not below {vocabulary_size}", code="bad-number")
        return tokens.view(tuple(shape))


def _sizes_of(specs: Sequence[TensorSpec]) -> list[int]:
    """Numbers of each of the model's tensors, which are fp32."""
    return [spec.size_bytes // 4 for spec in specs]


def _check_finite_untrusted(vector: Tensor) -> None:
    """Piece by piece: of all at once torch takes twice the vector's memory meanwhile."""
    if not all(bool(torch.isfinite(piece).all()) for piece in torch.split(vector, _PIECE)):
        raise BadBytesError("a publication that is not finite", code="not-finite")


def _bytes_of(codes: Tensor) -> memoryview:
    return memoryview(codes.numpy()).cast("B")  # type: ignore[arg-type]

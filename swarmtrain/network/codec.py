"""Convert tensors to bytes and back; the only module of this folder that imports torch.

On the wire a vector is little-endian fp32. Bytes that cannot be a vector of the model are refused before they are used.
"""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor

from swarmtrain.algorithm.gossip import PartnerUpdate
from swarmtrain.algorithm.outer import OuterState, weighted_mean
from swarmtrain.algorithm.quantize import (
    ErrorFeedback,
    Format,
    decode,
    decode_pieces,
    encode,
    encoded_size_bytes,
    less_decoded,
    surely_finite,
)
from swarmtrain.errors import BadBytesError
from swarmtrain.network.finite import all_finite
from swarmtrain.network.snapshots.store import Body, HeldSnapshot, TensorSpec
from swarmtrain.network.tensor_groups import TensorGroup
from swarmtrain.protocol.gossip.partners import News
from swarmtrain.protocol.gossip.pulls import GroupName, PublicationBytes
from swarmtrain.run import RunFile

assert sys.byteorder == "little", "swarmtrain's wire format is little-endian, and so must the machine be"


def tensor_specs(parameters: Iterable[tuple[str, Tensor]]) -> tuple[TensorSpec, ...]:
    """Return the tensor table of named parameters, in the order in which they are flattened."""
    return tuple(TensorSpec(name, tuple(parameter.shape)) for name, parameter in parameters)


def _view(vector: Tensor) -> memoryview:
    assert vector.dtype is torch.float32 and vector.is_contiguous()
    return _bytes_of(vector.detach())


def body_of(*vectors: Tensor) -> Body:
    """Return a snapshot's body over fp32 vectors without copying them. Nobody may write into them afterwards."""
    return Body([_view(vector) for vector in vectors])


def body_of_state(state: OuterState) -> Body:
    """Return the body of a state's snapshot, theta and then momentum, without copying it."""
    theta, momentum = state.pieces()
    return body_of(*theta, *momentum)


def vector_sha256(vector: Tensor) -> str:
    """Return the SHA-256 of an fp32 vector's bytes, hex."""
    return hashlib.sha256(_view(vector)).hexdigest()


def vector_untrusted(data: bytearray | memoryview) -> Tensor:
    """Return an fp32 vector (N,) over the given 4 N writable bytes. Raises BadBytesError if it is not finite."""
    if not len(data) or len(data) % 4:
        raise BadBytesError(f"{len(data)} bytes are not a vector of fp32 numbers", code="bad-size")
    if not all_finite(data):
        raise BadBytesError("a vector with numbers that are not finite", code="not-finite")
    return torch.frombuffer(data, dtype=torch.float32)


def average_bytes_untrusted(parts: Sequence[memoryview], weights: Sequence[int]) -> tuple[bytearray, list[int]]:
    """Return the weighted mean of equally long fp32 vectors as bytes, and the indices left out as not finite.

    What is left out depends on the bytes alone, so everyone who averages the same parts gets the same bits. If all are
    left out the mean is zero: a round without progress. Raises ValueError if the parts differ in length.
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


def average_encoded_untrusted(
    parts: Sequence[memoryview], weights: Sequence[int], format: Format
) -> tuple[bytearray, list[int]]:
    """Do what `average_bytes_untrusted` does with gradients encoded in whole pieces; the mean is fp32."""
    vectors = [decode_pieces(torch.frombuffer(part, dtype=torch.uint8), format) for part in parts]
    return average_bytes_untrusted([_bytes_of(vector) for vector in vectors], weights)


def average_of(run: RunFile) -> Callable[[Sequence[memoryview], Sequence[int]], tuple[bytearray, list[int]]]:
    """Return the function by which peers of a run average what a roster names."""
    format = run.merge.roster_format
    return average_bytes_untrusted if format == "fp32" else partial(average_encoded_untrusted, format=format)


def body_of_pieces(pieces: Sequence[Tensor]) -> Body:
    """Return the body of a gradient that was encoded in pieces."""
    return Body([_bytes_of(piece) for piece in pieces])


_PIECE = 1 << 18  # numbers checked at once


@dataclass(frozen=True)
class VectorCodec:
    """Codec of one vector of the model in one of its tensor group's formats."""

    group: TensorGroup
    format: Format

    @cached_property
    def tensors(self) -> tuple[TensorSpec, ...]:
        """Tensor table of a publication."""
        return self.group.table(self.format)

    @property
    def size_bytes(self) -> int:
        """Bytes of a publication."""
        return encoded_size_bytes(self.format, self._sizes)

    @property
    def _sizes(self) -> list[int]:
        return _sizes_of(self.group.tensors)

    def encode(self, vector: Tensor) -> memoryview:
        """Return the bytes of `vector` (P,)."""
        return _bytes_of(encode(vector, self.format, self._sizes))

    def decode_untrusted(self, held: HeldSnapshot) -> Tensor:
        """Return the vector (P,) of a downloaded publication. Raises BadBytesError if it is not finite."""
        data = torch.frombuffer(held.part(0, self.size_bytes), dtype=torch.uint8)
        vector = decode(data, self.format, self._sizes)
        if not surely_finite(data, self.format, self._sizes):
            _check_finite_untrusted(vector)
        return vector

    def decode(self, data: bytearray | memoryview) -> Tensor:
        """Return the vector (P,) of encoded bytes. Unlike `decode_untrusted` it may hold numbers that are
        not finite."""
        return decode(torch.frombuffer(data, dtype=torch.uint8), self.format, self._sizes)


@dataclass(frozen=True)
class GradientCodec:
    """Codec of pseudo-gradients in several formats; each publication's author has chosen one."""

    group: TensorGroup

    @cached_property
    def of(self) -> dict[Format, VectorCodec]:
        """Codec of each format, the coarsest first."""
        return {format: VectorCodec(self.group, format) for format in self.group.formats}

    @cached_property
    def _feedback(self) -> ErrorFeedback:
        """Rounding errors of int4 and int2 so far. The other formats lose too little to be worth it."""
        return ErrorFeedback(_sizes_of(self.group.tensors))

    def encode_sum(self, vector: Tensor, format: Format, round: int, part: int = 1) -> memoryview:
        """Encode a vector (P,), as of a part of a round, of which the sum over rounds matters.

        What int4 or int2 loses in a round is added to a later round's vector. Not thread-safe.
        """
        if format not in ("int4", "int2"):
            return self.of[format].encode(vector)
        return _bytes_of(self._feedback.encode(vector, format, round, part))

    def over(self, round: int) -> None:
        """Forget what is kept to encode `round` and earlier rounds: nobody will request them any more."""
        self._feedback.over(round)

    def decode_untrusted(self, held: HeldSnapshot) -> Tensor:
        """Return the vector (P,) of a downloaded publication in any of the formats. Raises BadBytesError if it is not
        finite."""
        return self._codec_of(held).decode_untrusted(held)

    def less(self, vector: Tensor, held: HeldSnapshot) -> Tensor:
        """Subtract an already decoded publication's vector from `vector` (P,) in place, and return it."""
        codec = self._codec_of(held)
        data = torch.frombuffer(held.part(0, codec.size_bytes), dtype=torch.uint8)
        return less_decoded(vector, data, codec.format, _sizes_of(self.group.tensors))

    def _codec_of(self, held: HeldSnapshot) -> VectorCodec:
        return self.of[self.group.format_of(held.snapshot.manifest.tensors[0].dtype)]


@dataclass(frozen=True)
class PublicationCodec:
    """Codec of publications: the pseudo-gradient in several formats, and the averaged tensor groups, the weights among
    them."""

    groups: tuple[TensorGroup, ...]

    @cached_property
    def averaged(self) -> dict[GroupName, VectorCodec]:
        """Codec of each averaged tensor group."""
        return {one.name: VectorCodec(one, one.formats[0]) for one in self.groups if one.rule == "mean"}

    @cached_property
    def weights(self) -> VectorCodec:
        """Codec of theta, with which the outer step begins."""
        (codec,) = (each for each in self.averaged.values() if not each.group.num_parts)
        return codec

    @cached_property
    def gradient(self) -> GradientCodec:
        """Codec of the pseudo-gradient."""
        (group,) = (each for each in self.groups if each.rule == "outer step")
        return GradientCodec(group)

    def sizes(self, share: float = 1.0) -> dict[Format, PublicationBytes]:
        """Return the sizes of publications for each format of the pseudo-gradient; `share` of the whole model's
        numbers."""
        weights = sum(codec.size_bytes for codec in self.averaged.values())
        return {
            format: PublicationBytes(weights, codec.size_bytes, share) for format, codec in self.gradient.of.items()
        }

    def arrival_untrusted(
        self, name: GroupName, held: HeldSnapshot, news: News, earlier: HeldSnapshot | None
    ) -> PartnerUpdate:
        """Return what a downloaded publication of a tensor group adds to a merge. Raises BadBytesError if it is not
        finite.

        `earlier` is the publication to which `news` is the difference.
        """
        if (codec := self.averaged.get(name)) is None:
            return self.gradient_untrusted(held, news, earlier)
        values = codec.decode_untrusted(held)
        return PartnerUpdate(values, values, 0)  # without tokens the gradient is not used

    def gradient_untrusted(self, held: HeldSnapshot, news: News, earlier: HeldSnapshot | None) -> PartnerUpdate:
        """Return the new part of a downloaded pseudo-gradient (P,); see `arrival_untrusted`."""
        gradient = self.gradient.decode_untrusted(held)
        if earlier is not None:
            self.gradient.less(gradient, earlier)
            # The difference of two finite vectors can overflow.
            _check_finite_untrusted(gradient)
        return PartnerUpdate(theta=None, gradient=gradient, tokens=news.tokens)


@dataclass(frozen=True)
class ActivationCodec:
    """Codec of tokens, and of activations between stages and their gradients."""

    format: Format

    def size_bytes(self, shape: Sequence[int]) -> int:
        """Return the bytes that a tensor of this shape takes."""
        return encoded_size_bytes(self.format, [math.prod(shape)])

    def encode(self, tensor: Tensor) -> memoryview:
        """Return the bytes of an fp32 `tensor`."""
        return _bytes_of(encode(tensor.contiguous().view(-1), self.format, [tensor.numel()]))

    def decode_untrusted(self, data: bytearray, shape: Sequence[int]) -> Tensor:
        """Return the tensor of this shape. Raises BadBytesError if the size is wrong or a number is not finite."""
        if len(data) != self.size_bytes(shape):
            raise BadBytesError(
                f"{len(data)} bytes, where shape {tuple(shape)} in {self.format} takes {self.size_bytes(shape)}",
                code="bad-size",
            )
        tensor = decode(torch.frombuffer(data, dtype=torch.uint8), self.format, [math.prod(shape)])
        if not bool(torch.isfinite(tensor).all()):
            raise BadBytesError("activations with numbers that are not finite", code="not-finite")
        return tensor.view(tuple(shape))

    @staticmethod
    def tokens_size_bytes(shape: Sequence[int]) -> int:
        """Return the bytes that tokens of this shape take."""
        return 4 * math.prod(shape)

    @staticmethod
    def encode_tokens(tokens: Tensor) -> memoryview:
        """Return the bytes of int64 `tokens`, each below 2**31."""
        return _bytes_of(tokens.to(torch.int32).contiguous().view(-1))

    @staticmethod
    def tokens_untrusted(data: bytearray, shape: Sequence[int], vocabulary_size: int) -> Tensor:
        """Return int64 tokens of this shape. Raises BadBytesError if the size is wrong or a token is unknown."""
        if len(data) != ActivationCodec.tokens_size_bytes(shape):
            raise BadBytesError(f"{len(data)} bytes are not tokens of shape {tuple(shape)}", code="bad-size")
        tokens = torch.frombuffer(data, dtype=torch.int32).to(torch.int64)
        if not bool(((tokens >= 0) & (tokens < vocabulary_size)).all()):
            raise BadBytesError(f"a token outside the vocabulary of {vocabulary_size}", code="bad-number")
        return tokens.view(tuple(shape))


def _sizes_of(specs: Sequence[TensorSpec]) -> list[int]:
    """Return how many numbers each of the model's tensors, all fp32, has."""
    return [spec.size_bytes // 4 for spec in specs]


def _check_finite_untrusted(vector: Tensor) -> None:
    """Raise BadBytesError if a number is not finite.

    Works piece by piece: on the whole vector torch would take twice its memory meanwhile.
    """
    if not all(bool(torch.isfinite(piece).all()) for piece in torch.split(vector, _PIECE)):
        raise BadBytesError("a publication with numbers that are not finite", code="not-finite")


def _bytes_of(tensor: Tensor) -> memoryview:
    """Return the bytes of a contiguous tensor without copying them. Raises ValueError if it is not in main memory.

    All that a peer publishes passes through here. Who trains on a device has copied it before: a copy that is made here
    would have other threads wait for the device.
    """
    if not tensor.is_cpu:
        raise ValueError(f"what is published must be in main memory, and this is on {tensor.device}")
    return memoryview(tensor.numpy()).cast("B")  # type: ignore[arg-type]

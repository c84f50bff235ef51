"""Tensors to bytes and back: the one module of this folder that imports torch.

On the wire a vector is little-endian fp32; what cannot be a vector of the model is refused before it is used.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from swarmtrain.algorithm.outer import weighted_mean
from swarmtrain.errors import BadBytesError
from swarmtrain.network.snapshots import Body, TensorSpec, all_finite

__all__ = ["average_bytes_untrusted", "body_of", "tensor_specs", "vector_sha256", "vector_untrusted"]

assert sys.byteorder == "little", "swarmtrain's wire format is little-endian, and so must the machine be"


def tensor_specs(parameters: Iterable[tuple[str, nn.Parameter]]) -> tuple[TensorSpec, ...]:
    """The tensor table of a model's named parameters, in the order in which they are flattened."""
    return tuple(TensorSpec(name, tuple(parameter.shape)) for name, parameter in parameters)


def _view(vector: Tensor) -> memoryview:
    assert vector.dtype is torch.float32 and vector.is_contiguous() and vector.device.type == "cpu"
    return memoryview(vector.detach().numpy()).cast("B")  # type: ignore[arg-type]


def body_of(*vectors: Tensor) -> Body:
    """A snapshot's body over fp32 vectors, which must not be written into afterwards; nothing is copied."""
    return Body([_view(vector) for vector in vectors])


def vector_sha256(vector: Tensor) -> str:
    """SHA-256 of an fp32 vector's bytes, hex."""
    return hashlib.sha256(_view(vector)).hexdigest()


def vector_untrusted(data: bytearray | memoryview) -> Tensor:
    """An fp32 vector (N,) over the 4 N bytes given, which must be writable; BadBytesError if it is not finite."""
    if not len(data) or len(data) % 4:
        raise BadBytesError(f"{len(data)} bytes are no vector of fp32")
    if not all_finite(data):
        raise BadBytesError("a vector that is not finite")
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

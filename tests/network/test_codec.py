"""Tensors as bytes: averages that anyone can recompute, and bytes that cannot be a vector."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from codes import raises_code
from torch import nn

from swarmtrain.algorithm.outer import OuterState
from swarmtrain.algorithm.quantize import Format
from swarmtrain.errors import BadBytesError
from swarmtrain.network.codec import (
    ActivationCodec,
    GradientCodec,
    PublicationCodec,
    average_bytes_untrusted,
    body_of,
    body_of_state,
    tensor_specs,
    vector_sha256,
    vector_untrusted,
)
from swarmtrain.network.identity import new_identity
from swarmtrain.network.snapshots.store import Body, HeldSnapshot, TensorSpec, build_snapshot
from swarmtrain.network.tensor_groups import groups_of
from swarmtrain.protocol.gossip.partners import Delta, Full, PublicationVersion
from swarmtrain.v1 import snapshot_pb2 as pb


def vectors(number: int, size: int = 1000) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(size, generator=generator) for _ in range(number)]


def as_part(vector: torch.Tensor) -> memoryview:
    return memoryview(bytearray(body_of(vector).read(0, 4 * len(vector))))


def as_vector(data: bytes | bytearray) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.float32)


def test_a_vector_goes_there_and_back_without_a_copy() -> None:
    vector = vectors(1)[0]
    body = body_of(vector, vector * 2)
    assert torch.equal(vector_untrusted(bytearray(body.read(4000, 4000))), vector * 2)
    vector[0] = 5.0
    assert as_vector(body.read(0, 4))[0] == 5.0


def test_the_table_follows_the_parameters() -> None:
    specs = tensor_specs(nn.Linear(3, 2).named_parameters())
    assert [(spec.name, spec.shape, spec.size_bytes) for spec in specs] == [("weight", (2, 3), 24), ("bias", (2,), 8)]


def test_equal_vectors_have_equal_hashes() -> None:
    vector = vectors(1)[0]
    other = vector.clone()
    assert vector_sha256(vector) == vector_sha256(other)
    other[3] += 1e-6
    assert vector_sha256(vector) != vector_sha256(other)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused(bad: float) -> None:
    vector = vectors(1)[0]
    vector[500] = bad
    with raises_code("not-finite", BadBytesError):
        vector_untrusted(bytearray(as_part(vector)))


@pytest.mark.parametrize("size", [0, 1, 6])
def test_what_has_no_whole_number_of_elements_is_refused(size: int) -> None:
    with raises_code("bad-size", BadBytesError):
        vector_untrusted(bytearray(size))


def test_the_mean_is_weighted() -> None:
    first, second = vectors(2)
    mean, left_out = average_bytes_untrusted([as_part(first), as_part(second)], [3, 1])
    torch.testing.assert_close(as_vector(mean), 0.75 * first + 0.25 * second)
    assert left_out == []


def test_a_vector_that_is_not_finite_is_left_out_and_the_others_count_as_if_alone() -> None:
    first, bad, third = vectors(3)
    bad[-1] = math.nan
    parts = [as_part(first), as_part(bad), as_part(third)]
    mean, left_out = average_bytes_untrusted(parts, [1, 5, 3])
    assert left_out == [1]
    assert mean == average_bytes_untrusted([parts[0], parts[2]], [1, 3])[0], "to the bit"


def test_nothing_finite_means_no_progress() -> None:
    bad = torch.full((10,), math.nan)
    mean, left_out = average_bytes_untrusted([as_part(bad)] * 2, [1, 1])
    assert mean == bytes(40) and left_out == [0, 1]


def test_the_mean_of_slices_is_the_slice_of_the_mean_to_the_bit() -> None:
    parts, weights = [as_part(vector) for vector in vectors(5)], [3, 1, 4, 1, 5]
    whole, _ = average_bytes_untrusted(parts, weights)
    for start, end in [(0, 400), (400, 404), (404, 4000), (1000, 3000)]:
        assert average_bytes_untrusted([part[start:end] for part in parts], weights)[0] == whole[start:end]


def test_averages_are_the_same_every_time() -> None:
    parts = [as_part(vector) for vector in vectors(4)]
    assert len({bytes(average_bytes_untrusted(parts, [1, 2, 3, 4])[0]) for _ in range(5)}) == 1


def test_parts_of_different_lengths_are_our_mistake() -> None:
    first, second = vectors(2)
    with pytest.raises(ValueError, match="one length"):
        average_bytes_untrusted([as_part(first), as_part(second)[:-4]], [1, 1])


def held_of(data: memoryview, codec: GradientCodec, format: Format) -> HeldSnapshot:
    manifest = pb.Manifest(run_sha256=bytes(32), kind=pb.SNAPSHOT_KIND_PUBLICATION)
    return build_snapshot(new_identity(b"a" * 32), manifest, codec.of[format].tensors, Body([data]))


def test_an_author_chooses_each_gradients_format_and_what_it_loses_in_one_comes_in_the_next() -> None:
    specs = (TensorSpec("w", (25, 30)), TensorSpec("norm", (250,)))
    authors, readers = (PublicationCodec(groups_of(specs, "fp32", ("int2", "int4"))).gradient for _ in range(2))

    def read(data: memoryview, format: Format) -> torch.Tensor:
        return readers.decode_untrusted(held_of(data, readers, format))

    formats: list[Format] = ["int2", "int4", "int4", "int2", "int2"]
    sizes, sent, last = {"int2": 283, "int4": 564}, torch.zeros(1000), torch.zeros(1000)
    for round, (format, gradient) in enumerate(zip(formats, vectors(5), strict=True)):
        data = authors.encode_sum(gradient, format, round)
        assert len(data) == sizes[format] == authors.of[format].size_bytes
        sent += read(data, format)
        last = gradient
    lost = sum(vectors(5)) - sent
    assert 0.05 < float(lost.square().mean() / last.square().mean()) < 0.25, "what the last lost, and no more"
    with raises_code("not-finite", BadBytesError):
        read(memoryview(b"\xff" * sizes["int4"]), "int4")


def test_what_loses_next_to_nothing_carries_nothing_over() -> None:
    codec = PublicationCodec(groups_of((TensorSpec("w", (1000,)),), "fp32", ("bf16",))).gradient
    one, other = vectors(2)
    assert [bytes(codec.encode_sum(each, "bf16", round)) for round, each in enumerate((one, other))] == [
        bytes(codec.of["bf16"].encode(each)) for each in (one, other)
    ]


def test_what_is_new_of_a_round_may_be_in_another_format_than_what_was_merged_of_it() -> None:
    """A fragment's round goes on where its author begins another of its own."""
    codec = PublicationCodec(groups_of((TensorSpec("w", (1000,)),), "int8", ("int2", "int4")))
    first, whole = vectors(2)
    formats: tuple[Format, Format] = ("int2", "int4")
    sent = [
        held_of(codec.gradient.encode_sum(each, format, 3, part), codec.gradient, format)
        for part, (each, format) in enumerate(zip((first, whole), formats, strict=True), 1)
    ]
    news = Delta(PublicationVersion(3, 1, 100), 50, "part 1 of its round was merged")
    merged = codec.gradient_untrusted(sent[0], Full(100, "nothing was merged"), None).gradient
    new = codec.gradient_untrusted(sent[1], news, sent[0])
    assert new.tokens == 50
    assert torch.allclose(merged + new.gradient, codec.gradient.decode_untrusted(sent[1]), atol=1e-6)


def test_a_section_says_what_travels_of_it_and_what_a_merge_takes_of_that() -> None:
    tensors = (TensorSpec("w", (25, 30)), TensorSpec("norm", (250,)))
    gradient, weights = groups = groups_of(tensors, "int8", ("int2", "int4"), 32)
    assert [(each.name, each.rule, each.num_parts) for each in groups] == [
        ("gradient", "outer step", 32),
        ("weights", "mean", 0),
    ]
    assert weights.tables == ((TensorSpec("theta/w", (25, 30), "int8"), TensorSpec("theta/norm", (250,), "int8")),)
    assert [table[1] for table in gradient.tables] == [
        TensorSpec("gradient/norm", (250,), "int2"),
        TensorSpec("gradient/norm", (250,), "int4"),
    ]
    assert [gradient.format_of(table[0].dtype) for table in gradient.tables] == ["int2", "int4"]
    codec, (vector,), news = PublicationCodec(groups), vectors(1), Full(100, "nothing was merged")
    manifest = pb.Manifest(run_sha256=bytes(32), kind=pb.SNAPSHOT_KIND_PUBLICATION)
    sent = build_snapshot(new_identity(b"a" * 32), manifest, weights.tables[0], Body([codec.weights.encode(vector)]))
    mean = codec.arrival_untrusted("weights", sent, news, None)
    assert mean.theta is not None and mean.tokens == 0 and torch.allclose(mean.theta, vector, atol=0.1)
    sent = held_of(codec.gradient.encode_sum(vector, "int4", 0), codec.gradient, "int4")
    step = codec.arrival_untrusted("gradient", sent, news, None)
    assert step.theta is None and step.tokens == 100


def _publications() -> dict[str, Callable[[torch.Tensor], object]]:
    """Return every way by which a tensor (1000,) becomes bytes for others."""
    ways: dict[str, Callable[[torch.Tensor], object]] = {
        "state": body_of,
        "theta": lambda vector: body_of_state(OuterState(vector, torch.zeros(1000))),
        "momentum": lambda vector: body_of_state(OuterState(torch.zeros(1000), vector)),
        "sha256": vector_sha256,
        "tokens": ActivationCodec.encode_tokens,
    }
    for format in ("fp32", "bf16", "int8", "int4", "int2"):
        codec = PublicationCodec(groups_of((TensorSpec("w", (1000,)),), format, (format,)))
        ways[f"weights in {format}"] = codec.weights.encode
        ways[f"gradient in {format}"] = partial(codec.gradient.encode_sum, format=format, round=0)
        ways[f"activations in {format}"] = ActivationCodec(format).encode
    return ways


@pytest.mark.parametrize("way", _publications())
def test_what_is_published_must_be_in_main_memory(way: str) -> None:
    """A copy made on the way would have other threads wait for a device."""
    publish = _publications()[way]
    publish(torch.ones(1000))
    with pytest.raises(ValueError, match="meta"):
        publish(torch.ones(1000, device="meta"))

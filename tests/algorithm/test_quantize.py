"""Quantisation against a plain numpy loop to the bit, its error bounds, hostile bytes, and error feedback."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from swarmtrain.algorithm.quantize import (
    FORMATS,
    ErrorFeedback,
    FedBackSum,
    Format,
    decode,
    decode_pieces,
    encode,
    encode_pieces,
    encoded_size_bytes,
    surely_finite,
)

INTEGER: tuple[Format, ...] = ("int8", "int4")
BLOCK = {"int8": 256, "int4": 64, "int2": 128}
SETTLED: tuple[Format, ...] = ("fp32", "bf16", "int8", "int4")
"""Formats in which decoded values encode to the same bytes again."""
LEVELS = {"int8": 127, "int4": 7}
# Whole blocks, neighbours that are one run, short and odd last blocks, single numbers, a tensor without any, and
# more whole blocks than are worked on at once.
SIZES = (512, 256, 64, 1, 0, 300, 63, 65, 255, 257, 1, 1, 128, (1 << 18) + 512 + 33, 7)


def _vector(sizes: Sequence[int], seed: int = 0) -> Tensor:
    """Numbers whose scale differs from tensor to tensor and from place to place."""
    generator = torch.Generator().manual_seed(seed)
    pieces = [torch.randn(n, generator=generator) * 10.0 ** (index % 7 - 4) for index, n in enumerate(sizes)]
    vector = torch.cat(pieces)
    return vector * torch.rand(len(vector), generator=generator).pow_(4)


def _blocks(format: Format, sizes: Sequence[int]) -> list[tuple[int, int]]:
    """(start, end) of each block in the vector."""
    blocks, start = [], 0
    for size in sizes:
        blocks += [(start + first, start + min(first + BLOCK[format], size)) for first in range(0, size, BLOCK[format])]
        start += size
    return blocks


def _plain_step(block: npt.NDArray[np.float32]) -> np.float32:
    """Return the step of int2: 1.2 times the mean magnitude, computed as repeatedly halved sums of neighbours."""
    padded = 1 << (len(block) - 1).bit_length()
    halves = np.zeros(padded, dtype=np.float32)
    halves[: len(block)] = np.abs(block)
    while len(halves) > 1:
        halves = halves[::2] * np.float32(0.5) + halves[1::2] * np.float32(0.5)
    step = np.float32(min(halves[0], np.float32(2.0**124)) * np.float32(padded / len(block))) * np.float32(1.2)
    return np.float32(0) if step <= 2.0**-112 else np.float32(step)


def _plain_encode_quarters(vector: npt.NDArray[np.float32], sizes: Sequence[int]) -> bytes:
    steps = [_plain_step(vector[start:end]) for start, end in _blocks("int2", sizes)]
    codes = np.full(len(vector), 2)
    for (start, end), step in zip(_blocks("int2", sizes), steps, strict=True):
        if step:
            codes[start:end] = np.clip(np.floor(vector[start:end] * (np.float32(1) / step)) + 2, 0, 3)
    data, start = np.array(steps, dtype="<f4").tobytes(), 0
    for size in sizes:
        own = [*map(int, codes[start : start + size]), *[0] * (-size % 4)]
        data += bytes(a | b << 2 | c << 4 | d << 6 for a, b, c, d in zip(*(own[i::4] for i in range(4)), strict=True))
        start += size
    return data


def _plain_decode_quarters(data: bytes, sizes: Sequence[int]) -> npt.NDArray[np.float32]:
    blocks = _blocks("int2", sizes)
    steps, rest = np.frombuffer(data[: 4 * len(blocks)], dtype="<f4"), data[4 * len(blocks) :]
    codes: list[int] = []
    for size in sizes:
        own, rest = rest[: -(-size // 4)], rest[-(-size // 4) :]
        codes += [byte >> shift & 3 for byte in own for shift in (0, 2, 4, 6)][:size]
    numbers = np.array(codes, dtype=np.float32) - np.float32(1.5)
    for (start, end), step in zip(blocks, steps, strict=True):
        numbers[start:end] *= step
    return numbers


def _plain_encode(vector: npt.NDArray[np.float32], format: Format, sizes: Sequence[int]) -> bytes:
    levels = np.float32(LEVELS[format])
    scales, codes = [], np.zeros(len(vector), dtype=np.int64)
    for start, end in _blocks(format, sizes):
        scale = np.abs(vector[start:end]).max()
        scale = np.float32(0) if scale <= 2.0**-112 else scale
        scales.append(scale)
        if scale:
            codes[start:end] = np.rint(vector[start:end] * (levels / scale))
    data = np.array(scales, dtype="<f4").tobytes()
    start = 0
    for size in sizes:
        own = codes[start : start + size]
        if format == "int8":
            data += own.astype(np.int8).tobytes()
        else:
            halves = [*(own + 8), *([0] if size % 2 else [])]
            data += bytes(int(low) | int(high) << 4 for low, high in zip(halves[::2], halves[1::2], strict=True))
        start += size
    return data


def _plain_decode(data: bytes, format: Format, sizes: Sequence[int]) -> npt.NDArray[np.float32]:
    blocks = _blocks(format, sizes)
    scales = np.frombuffer(data[: 4 * len(blocks)], dtype="<f4")
    rest = data[4 * len(blocks) :]
    codes: list[int] = []
    for size in sizes:
        own = rest[: size if format == "int8" else -(-size // 2)]
        rest = rest[len(own) :]
        if format == "int8":
            codes += [byte - 256 if byte > 127 else byte for byte in own]
        else:
            codes += [half - 8 for byte in own for half in (byte & 15, byte >> 4)][:size]
    numbers = np.empty(len(codes), dtype=np.float32)
    with np.errstate(all="ignore"):
        for (start, end), scale in zip(blocks, scales, strict=True):
            shares = np.array(codes[start:end], dtype=np.float32) * np.float32(1 / LEVELS[format])
            numbers[start:end] = shares * scale
    return numbers


def _same_bits(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.view(torch.int32), other.view(torch.int32))


@pytest.mark.parametrize("format", INTEGER)
def test_equals_a_plain_loop_to_the_bit(format: Format) -> None:
    vector = _vector(SIZES)
    data = encode(vector, format, SIZES)
    assert data.numpy().tobytes() == _plain_encode(vector.numpy(), format, SIZES)
    decoded = decode(data, format, SIZES)
    assert decoded.numpy().tobytes() == _plain_decode(data.numpy().tobytes(), format, SIZES).tobytes()


@pytest.mark.parametrize("sizes", [SIZES, (3, 5), (1,), (128,), (129, 2)])
def test_two_bits_equal_a_plain_loop_to_the_bit(sizes: Sequence[int]) -> None:
    vector = _vector(sizes)
    data = encode(vector, "int2", sizes)
    assert data.numpy().tobytes() == _plain_encode_quarters(vector.numpy(), sizes)
    decoded = decode(data, "int2", sizes)
    assert decoded.numpy().tobytes() == _plain_decode_quarters(data.numpy().tobytes(), sizes).tobytes()


def test_fp32_is_the_numbers_and_bf16_is_torchs() -> None:
    vector = _vector(SIZES)
    assert encode(vector, "fp32", SIZES).numpy().tobytes() == vector.numpy().astype("<f4").tobytes()
    assert _same_bits(decode(encode(vector, "fp32", SIZES), "fp32", SIZES), vector)
    data = encode(vector, "bf16", SIZES)
    assert torch.equal(data, vector.to(torch.bfloat16).view(torch.uint8))
    assert _same_bits(decode(data, "bf16", SIZES), vector.to(torch.bfloat16).float())


@pytest.mark.parametrize("format", FORMATS)
@given(
    sizes=st.lists(st.integers(0, 200), max_size=8),
    exponent=st.integers(-45, 38),
    seed=st.integers(0, 100),
)
@settings(max_examples=30)
def test_any_sizes_and_any_magnitude(format: Format, sizes: list[int], exponent: int, seed: int) -> None:
    uniform = torch.rand(sum(sizes), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    vector = ((2 * uniform - 1) * 10.0**exponent).float()
    data = encode(vector, format, sizes)
    assert data.shape == (encoded_size_bytes(format, sizes),) and data.is_contiguous()
    decoded = decode(data, format, sizes)
    assert torch.isfinite(decoded).all()
    assert format not in SETTLED or torch.equal(encode(decoded, format, sizes), data)
    assert bool((decoded * vector.sign() >= 0).all()), "a sign was turned"


@pytest.mark.parametrize("format", FORMATS)
def test_the_same_bytes_again_whatever_the_number_of_threads(format: Format) -> None:
    sizes = (900_001, 17, 300_000)
    vector = _vector(sizes)
    threads = torch.get_num_threads()
    results = []
    try:
        for number in (1, 2, 1):
            torch.set_num_threads(number)
            data = encode(vector, format, sizes)
            results.append((data, decode(data, format, sizes)))
    finally:
        torch.set_num_threads(threads)
    for (data, numbers), (other_data, other_numbers) in itertools.pairwise(results):
        assert torch.equal(data, other_data) and _same_bits(numbers, other_numbers)


@pytest.mark.parametrize("format", FORMATS)
def test_zero_is_zero_and_the_largest_numbers_stay_finite(format: Format) -> None:
    sizes = (130, 3)
    assert not decode(encode(torch.zeros(133), format, sizes), format, sizes).any()
    largest = torch.finfo(torch.float32).max
    vector = torch.linspace(-1, 1, 133) * largest
    vector[7] = -largest
    decoded = decode(encode(vector, format, sizes), format, sizes)
    assert torch.isfinite(decoded).all()
    assert format == "int2" or torch.allclose(decoded, vector, rtol=0, atol=largest / 7)


@pytest.mark.parametrize("format", INTEGER)
def test_a_block_next_to_nothing_is_zero(format: Format) -> None:
    vector = torch.tensor([1e-45, -(2.0**-112), 1.0])
    decoded = decode(encode(vector, format, (2, 1)), format, (2, 1))
    assert decoded.tolist() == [0.0, 0.0, 1.0]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_refused(format: Format, poison: float) -> None:
    for place in (0, 299, 300):
        vector = torch.ones(301)
        vector[place] = poison
        with pytest.raises(ValueError, match="not finite"):
            encode(vector, format, (300, 1))


@pytest.mark.parametrize("format", FORMATS)
def test_bytes_of_another_length_are_refused(format: Format) -> None:
    sizes = (300, 7)
    data = encode(torch.ones(307), format, sizes)
    out = torch.full((307,), 5.0)
    for wrong in (data[:-1], torch.cat([data, data[:1]]), data[:0], data.view(1, -1), data.view(torch.int8)):
        with pytest.raises(ValueError, match="bytes of uint8 are needed"):
            decode(wrong, format, sizes, out)
    for room in (torch.empty(306), torch.empty(307, dtype=torch.float64), torch.empty(614)[::2]):
        with pytest.raises(ValueError, match="is needed"):
            decode(data, format, sizes, room)
    assert out.eq(5).all()
    assert decode(data, format, sizes, out) is out and out.eq(out[0]).all() and 0.5 < out[0] <= 1


def test_vectors_and_formats_that_make_no_sense() -> None:
    for vector in (torch.ones(5), torch.ones(6, dtype=torch.float64), torch.ones(2, 3), torch.ones(12)[::2]):
        with pytest.raises(ValueError, match="is needed"):
            encode(vector, "int8", (3, 3))
    with pytest.raises(ValueError, match="fp32, bf16, int8, int4, int2"):
        encode(torch.ones(6), "int3", (6,))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="negative"):
        encoded_size_bytes("int8", (3, -1))


@pytest.mark.parametrize("format", FORMATS)
@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=30)
def test_any_bytes_decode(format: Format, seed: int) -> None:
    sizes = (70, 300, 1)
    raw = np.random.default_rng(seed).integers(0, 256, encoded_size_bytes(format, sizes), dtype=np.uint8)
    decoded = decode(torch.from_numpy(raw), format, sizes)
    assert bool(torch.isfinite(decoded).all()) or not surely_finite(torch.from_numpy(raw), format, sizes)
    if format in INTEGER:
        expected = torch.from_numpy(_plain_decode(raw.tobytes(), format, sizes))
        assert torch.equal(decoded.nan_to_num(nan=-3.25), expected.nan_to_num(nan=-3.25))


@pytest.mark.parametrize("format", INTEGER)
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_a_scale_that_is_not_finite_shows_in_every_number_of_its_block(format: Format, poison: float) -> None:
    sizes = (BLOCK[format], 5)
    vector = torch.arange(-100, BLOCK[format] - 95, dtype=torch.float32)  # has a zero: its code is 0
    data = encode(vector, format, sizes)
    assert surely_finite(data, format, sizes)
    data[4:8].view(torch.float32)[0] = poison
    assert torch.isfinite(decode(data, format, sizes)).tolist() == [True] * BLOCK[format] + [False] * 5
    assert not surely_finite(data, format, sizes)


@pytest.mark.parametrize("format", BLOCK)
def test_scales_that_show_no_overflow_have_none_with_any_code(format: Format) -> None:
    sizes = (4 * 256,)
    num_scales = sizes[0] // BLOCK[format]
    codes = torch.arange(256, dtype=torch.uint8).repeat(4)[: encoded_size_bytes(format, sizes) - 4 * num_scales]
    for scale in (2.0**126, -(2.0**126), 3.4e38, -3.4e38):
        data = torch.cat([torch.full((num_scales,), scale).view(torch.uint8), codes])
        is_finite = bool(torch.isfinite(decode(data, format, sizes)).all())
        assert is_finite == surely_finite(data, format, sizes) == (abs(scale) == 2.0**126)


@pytest.mark.parametrize("format", FORMATS)
def test_bytes_are_read_at_any_address(format: Format) -> None:
    vector = _vector((300, 7))
    data = encode(vector, format, (300, 7))
    shifted = torch.cat([torch.zeros(3, dtype=torch.uint8), data])[3:]
    assert _same_bits(decode(shifted, format, (300, 7)), decode(data, format, (300, 7)))


@pytest.mark.parametrize("format", ["int4", "int2"])
def test_what_is_sent_adds_up_to_the_gradients(format: Format) -> None:
    sizes = (100, 33)
    gradients = [0.01 * _vector(sizes, seed) + torch.linspace(-1e-4, 1e-4, 133) for seed in range(40)]
    feedback = ErrorFeedback(sizes)
    sent = torch.zeros(133, dtype=torch.float64)
    plain = torch.zeros(133, dtype=torch.float64)
    for round, gradient in enumerate(gradients):
        sent += decode(feedback.encode(gradient, format, round, 1), format, sizes)
        plain += decode(encode(gradient, format, sizes), format, sizes)
    total = torch.stack(gradients).double().sum(0)
    largest_lost = max(float(gradient.abs().max()) for gradient in gradients)
    most = len(gradients) ** 0.5 * largest_lost * 2**-8  # of each residual, kept as bf16, its rounding
    assert torch.allclose(sent + feedback.residual.double(), total, rtol=0, atol=most)
    assert (sent - total).abs().sum() < 0.5 * (plain - total).abs().sum()


def test_every_part_of_a_round_adds_the_same_residual_once() -> None:
    sizes = (64,)
    feedback = ErrorFeedback(sizes)
    first = _vector(sizes, 1)
    feedback.encode(first, "int4", 0, 4)
    residual = feedback.residual
    assert residual.any()
    gradients = {part: _vector(sizes, part) for part in (1, 2, 4)}
    for part in (1, 4, 2):  # 2 for a reader that came late: the highest part is what counts
        data = feedback.encode(gradients[part], "int4", 1, part)
        assert torch.equal(data, encode(gradients[part] + residual, "int4", sizes))
    last = gradients[4] + residual
    lost = last - decode(encode(last, "int4", sizes), "int4", sizes)
    assert torch.equal(feedback.residual, lost.bfloat16())


def test_rounds_without_readers_and_late_readers_lose_nothing() -> None:
    sizes = (64,)
    feedback = ErrorFeedback(sizes)
    first, second = _vector(sizes, 1), _vector(sizes, 2)
    feedback.encode(first, "int4", 1, 4)
    residual = feedback.residual
    assert torch.equal(feedback.encode(second, "int4", 6, 1), encode(second + residual, "int4", sizes))
    after = feedback.residual
    assert torch.equal(feedback.encode(first, "int4", 1, 4), encode(first, "int4", sizes))
    assert feedback.residual is after
    again = ErrorFeedback(sizes, residual=after)
    assert torch.equal(again.encode(first, "int4", 3, 1), feedback.encode(first, "int4", 7, 1))


def test_a_round_that_is_over_is_rounded_plainly_and_loses_nothing_of_the_next() -> None:
    sizes = (64,)
    feedback, other = ErrorFeedback(sizes), ErrorFeedback(sizes)
    first, second, third = (_vector(sizes, seed) for seed in (1, 2, 3))
    for one in (feedback, other):
        one.encode(first, "int4", 1, 4)
        one.encode(second, "int4", 2, 1)
    feedback.over(1)  # an earlier one than the latest: nothing of it was kept
    assert torch.equal(feedback.encode(third, "int4", 2, 2), other.encode(third, "int4", 2, 2))
    feedback.over(2)
    after = feedback.residual
    assert torch.equal(feedback.encode(third, "int4", 2, 3), encode(third, "int4", sizes))
    assert feedback.residual is after
    assert torch.equal(feedback.encode(first, "int4", 3, 1), other.encode(first, "int4", 3, 1))


def test_a_gradient_that_is_refused_leaves_the_residual() -> None:
    feedback = ErrorFeedback((8,))
    feedback.encode(torch.linspace(0, 1, 8), "int4", 0, 1)
    before = feedback.residual
    for wrong in (torch.full((8,), math.nan), torch.ones(7)):
        with pytest.raises(ValueError, match=r"finite|is needed"):
            feedback.encode(wrong, "int4", 1, 1)
    assert torch.equal(feedback.residual, before)
    with pytest.raises(ValueError, match="residual that is not finite"):
        ErrorFeedback((2,), residual=torch.tensor([1.0, math.inf]).bfloat16())


@pytest.mark.parametrize("format", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("size", [1, 255, 1 << 16, (1 << 17) + 300])
def test_pieces_decode_alone_and_together(format: Format, size: int) -> None:
    vector = torch.randn(size, generator=torch.Generator().manual_seed(size)) * 1e-3
    pieces = encode_pieces(vector, format)
    whole = decode_pieces(torch.cat(pieces), format)
    assert sum(map(len, pieces)) == encoded_size_bytes(format, [size])
    assert torch.equal(whole, torch.cat([decode_pieces(piece, format) for piece in pieces]))
    errors = {"fp32": 0.0, "bf16": 2**-8, "int8": 1 / 200}
    assert float((whole - vector).abs().max()) <= errors[format] * float(vector.abs().max())


def test_what_rounding_loses_of_a_gradient_goes_into_the_next_that_counts() -> None:
    generator, encoder, same = torch.Generator().manual_seed(3), FedBackSum("int8"), FedBackSum("int8")
    wanted, sent = torch.zeros(3000), torch.zeros(3000)
    for number, tokens in enumerate([512, 64, 2048, 512, 1024, 300]):
        gradient = torch.randn(3000, generator=generator)
        pieces, counted = encoder.encode(gradient, tokens)
        if number in (1, 3):  # it came too late: as if it had never been
            continue
        counted()
        read = torch.cat([decode_pieces(piece, "int8") for piece in pieces])
        assert torch.equal(same.decoded(gradient, tokens), read)
        wanted += tokens * gradient
        sent += tokens * read
    alone = tokens * float((decode_pieces(torch.cat(encode_pieces(gradient, "int8")), "int8") - gradient).abs().max())
    assert float((wanted - sent).abs().max()) <= 1.5 * alone, "only the last one's rounding is missing"
    gradient[7] = math.inf
    assert not decode_pieces(torch.cat(encoder.encode(gradient, 10)[0]), "int8").count_nonzero()
    assert not same.decoded(gradient, 10).count_nonzero()

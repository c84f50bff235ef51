"""Quantisation: flat fp32 vectors as fewer bytes, block by block, and the same bits again on every processor.

What a peer publishes is quantised once, and every reader decodes identical bytes to identical numbers: every
operation here is exact or rounds on its own (nothing fused, nothing summed), so results do not depend on processor,
thread or chunk. A vector of P numbers is its tensors one after the other, `sizes` their lengths; a block never
crosses a tensor's boundary, because tensors differ in scale by orders of magnitude.

Layout, little-endian as the rest of the wire:
- fp32, bf16: the numbers.
- int8, int4: all scales, then all codes, so that both are read in long runs. A tensor of n numbers has
  ceil(n / block) blocks, the last one possibly short. A scale is its block's largest magnitude, fp32; a number is
  code / L * scale with L = 127 or 7 and the code within -L .. L. Keeping the largest magnitude rather than the step
  makes that number exact, never overflows, and makes encoding what was decoded give the same bytes.
- int8: a byte a code. int4: code + 8 in four bits, the even number of a tensor in the low half of a byte; a tensor
  begins at a whole byte, and an odd one ends with a half that is 0.
- int2, for what is summed with error feedback: a scale is 1.2 times its block's mean magnitude, and a number is one of
  -1.5, -0.5, 0.5, 1.5 times it: a tenth to an eighth of a pseudo-gradient's energy is lost, where a scale from the
  largest magnitude would lose a quarter. Two bits a code, the first number of four in the lowest; what is missing of a
  tensor's last byte is 0. The mean is halved sums of neighbours, again and again, so that it is the same everywhere.

Scales are fp32, not fp16: pseudo-gradients of 1e-8 occur, and would be nothing or a few bits in fp16. At 4 bytes for
256 numbers, int8 weights and int8 gradients take 2.03 bytes per parameter together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from swarmtrain.algorithm import memory

Format = Literal["fp32", "bf16", "int8", "int4", "int2"]
FORMATS: tuple[Format, ...] = get_args(Format)

_CHUNK = 1 << 18  # numbers worked on at once: what is made on the way stays in the processor's cache
_SCALE_BYTES = 4
_LARGEST_BF16 = torch.finfo(torch.bfloat16).max
# Blocks no larger than this count as zero: 127 / scale stays finite, and no number decodes to a subnormal one, which
# some processors' threads flush to zero and others do not.
_LARGEST_ZERO = 2.0**-112
_LARGEST_MEAN = 2.0**124  # so that no step of int2 overflows
_LARGEST_SURE = 2.0**126  # no code of any format decodes to more than 1.5 times its scale
_STEP_OF_MEAN = 1.2  # least error of 1.15 to 1.45 on pseudo-gradients, and 1.25 on a normal distribution


@dataclass(frozen=True)
class _Blockwise:
    """Layout of a blockwise format."""

    block: int  # numbers that share a scale
    levels: int  # L: codes lie within -L .. L; 0 for int2
    per_byte: int  # codes in a byte


_BLOCKWISE: dict[Format, _Blockwise] = {
    "int8": _Blockwise(256, 127, 1),
    "int4": _Blockwise(64, 7, 2),
    "int2": _Blockwise(128, 0, 4),
}


class _Run(NamedTuple):
    """Neighbouring blocks of one width that are processed together, and where their numbers, scales and codes begin."""

    number: int
    scale: int
    code_byte: int
    num_blocks: int
    width: int

    def of(self, vector: Tensor) -> Tensor:
        """Return the run's part of `vector` (P,) as a view (num_blocks, width)."""
        return vector[self.number : self.number + self.num_blocks * self.width].view(self.num_blocks, self.width)


class _Plan(NamedTuple):
    """Runs of a vector, and the sizes of its scales and codes."""

    runs: tuple[_Run, ...]
    num_scales: int
    num_code_bytes: int


@lru_cache(maxsize=16)
def _plan(layout: _Blockwise, sizes: tuple[int, ...]) -> _Plan:
    """Plan where everything lies: neighbouring whole blocks form runs of at most a chunk; a short block is its
    own run."""
    runs: list[_Run] = []
    number = scale = code_byte = 0
    most = _CHUNK // layout.block
    for size in sizes:
        blocks, rest = divmod(size, layout.block)
        while blocks:
            last = runs[-1] if runs else None
            if last is not None and last.width == layout.block and last.num_blocks < most:
                added = min(blocks, most - last.num_blocks)
                runs[-1] = last._replace(num_blocks=last.num_blocks + added)
            else:
                added = min(blocks, most)
                runs.append(_Run(number, scale, code_byte, added, layout.block))
            blocks -= added
            number, scale = number + added * layout.block, scale + added
            code_byte += added * layout.block // layout.per_byte
        if rest:
            runs.append(_Run(number, scale, code_byte, 1, rest))
            number, scale, code_byte = number + rest, scale + 1, code_byte + -(-rest // layout.per_byte)
    return _Plan(tuple(runs), scale, code_byte)


def encoded_size_bytes(format: Format, sizes: Sequence[int]) -> int:
    """Return the bytes that `encode` makes of tensors of these sizes. ValueError: unknown format or negative size."""
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    if any(size < 0 for size in sizes):
        raise ValueError(f"sizes of tensors must not be negative, got {list(sizes)}")
    if format not in _BLOCKWISE:
        return sum(sizes) * (4 if format == "fp32" else 2)
    plan = _plan(_BLOCKWISE[format], tuple(sizes))
    return plan.num_scales * _SCALE_BYTES + plan.num_code_bytes


@torch.no_grad()
def encode(vector: Tensor, format: Format, sizes: Sequence[int]) -> Tensor:
    """Encode `vector` (P,) fp32 on the CPU as new bytes (encoded_size_bytes,) uint8, rounded to nearest, ties to even.

    bf16 is torch's rounding, except that a finite number stays finite. Raises ValueError when the vector does not fit
    the sizes, is not fp32 on the CPU, or holds a number that is not finite.
    """
    size_bytes = encoded_size_bytes(format, sizes)
    _check_vector(vector, sizes)
    data = memory.empty(size_bytes, torch.uint8)
    if format in _BLOCKWISE:
        largest = _encode_blocks(vector, _BLOCKWISE[format], tuple(sizes), data)
    elif format == "bf16":
        codes = data.view(torch.bfloat16)
        for place, chunk in zip(torch.split(codes, _CHUNK), torch.split(vector, _CHUNK), strict=True):
            place.copy_(chunk.clamp(-_LARGEST_BF16, _LARGEST_BF16))
        largest = _magnitudes(vector)
    else:
        data.view(torch.float32).copy_(vector)
        largest = _magnitudes(vector)
    if not torch.isfinite(largest).all():
        raise ValueError("a vector with a number that is not finite cannot be encoded")
    return data


@torch.no_grad()
def decode(data: Tensor, format: Format, sizes: Sequence[int], out: Tensor | None = None) -> Tensor:
    """Decode `data`, uint8 on the CPU at any address, to its numbers (P,) fp32; into `out` if given.

    Any bytes of the right length decode, also those that no `encode` made. A scale that is not finite makes *every*
    number of its block not finite (0 times infinity included), so a check of the result finds it. Nothing else is
    checked. Raises ValueError, leaving `out` alone, when the length is wrong or `out` does not fit the sizes.
    """
    size_bytes = encoded_size_bytes(format, sizes)
    if data.dtype is not torch.uint8 or data.shape != (size_bytes,) or data.device.type != "cpu":
        raise ValueError(
            f"{size_bytes} bytes of uint8 are needed for {sum(sizes)} numbers as {format}, "
            f"got {data.dtype} of shape {tuple(data.shape)}"
        )
    if out is None:
        out = memory.empty(sum(sizes))
    _check_vector(out, sizes)
    if format in _BLOCKWISE:
        _decode_blocks(data, _BLOCKWISE[format], tuple(sizes), out)
    elif format == "bf16":
        for place, chunk in zip(torch.split(out, _CHUNK), torch.split(data, 2 * _CHUNK), strict=True):
            place.copy_(_aligned(chunk, torch.bfloat16))
    else:
        out.view(torch.uint8).copy_(data)
    return out


_PIECE = 1 << 16  # numbers of a piece: those of a chunk of fp32


def encode_pieces(vector: Tensor, format: Format) -> list[Tensor]:
    """Encode `vector` (P,) fp32 in pieces of 65,536 numbers, the last one possibly short, as if each were a tensor.

    So what becomes of any run of whole pieces is known without the rest of the bytes. Blocks cross the boundaries of
    tensors. Raises as `encode` does.
    """
    return [encode(piece, format, [len(piece)]) for piece in torch.split(vector, _PIECE)]


def decode_pieces(data: Tensor, format: Format) -> Tensor:
    """Decode the bytes of one or more neighbouring pieces, of fp32, bf16 or int8, to their numbers (N,) fp32.

    Raises as `decode` does.
    """
    vectors = []
    for piece in torch.split(data, encoded_size_bytes(format, [_PIECE])):
        if format == "int8":
            blocks = -(-len(piece) // (_SCALE_BYTES + _BLOCKWISE[format].block))
            number = len(piece) - _SCALE_BYTES * blocks
        else:
            number = len(piece) // (4 if format == "fp32" else 2)
        vectors.append(decode(piece, format, [number]))
    return vectors[0] if len(vectors) == 1 else torch.cat(vectors, out=memory.empty(sum(map(len, vectors))))


@dataclass
class FedBackSum:
    """Encoder of gradients whose sum over steps, weighted by tokens, matters: what is lost of one goes into the next.

    It gives two values for each gradient: its bytes, and a function to call once the gradient has counted. Without that
    call the gradient is as if it had never been.
    """

    format: Format
    _lost: Tensor | None = None
    """What rounding has lost, (P,), times the tokens of the gradient that lost it."""

    @torch.no_grad()
    def encode(self, gradient: Tensor, tokens: int) -> tuple[list[Tensor], Callable[[], None]]:
        """Encode the mean gradient (P,) of so many tokens in pieces, with what earlier ones have lost.

        A gradient that is not finite is encoded as zeros.
        """
        pieces, wanted = self._encode(gradient, tokens)
        if wanted is None:
            return pieces, lambda: None
        lost = self._decode(pieces)
        lost = torch.sub(wanted, lost, out=lost).mul_(tokens)

        def counted() -> None:
            self._lost = lost

        return pieces, counted

    @torch.no_grad()
    def decoded(self, gradient: Tensor, tokens: int) -> Tensor:
        """Return what others decode (P,) of the same gradient, which has counted."""
        pieces, wanted = self._encode(gradient, tokens)
        decoded = self._decode(pieces)
        if wanted is not None:
            self._lost = torch.sub(wanted, decoded).mul_(tokens)
        return decoded

    def _encode(self, gradient: Tensor, tokens: int) -> tuple[list[Tensor], Tensor | None]:
        """Return the pieces, and what they encode (P,); None if that is not finite, and zeros are encoded."""
        wanted = gradient if self._lost is None else gradient + self._lost / tokens
        if not torch.isfinite(wanted).all():
            return encode_pieces(torch.zeros_like(gradient), self.format), None
        return encode_pieces(wanted, self.format), wanted

    def _decode(self, pieces: Sequence[Tensor]) -> Tensor:
        return torch.cat([decode_pieces(piece, self.format) for piece in pieces])


def surely_finite(data: Tensor, format: Format, sizes: Sequence[int]) -> bool:
    """Return True if the scales of `data` show that it decodes to finite numbers only.

    False if that depends on each number: in formats without scales, and where a scale is near fp32's end or not finite.
    """
    if format not in _BLOCKWISE:
        return False
    scales = _aligned(data[: _plan(_BLOCKWISE[format], tuple(sizes)).num_scales * _SCALE_BYTES], torch.float32)
    return not len(scales) or bool(scales.abs().amax() <= _LARGEST_SURE)


class ErrorFeedback:
    """Error feedback: what rounding lost in one round is added to the next. z = g + e is sent as q(z), then e = z -
    q(z).

    A round's g is cumulative and published in parts 1 .. F, so e belongs to the *round*: every part of a round adds the
    same e, and a reader of parts 1 and 3 gets the difference of their g, with e once. When a later round is first
    encoded, the remainder of the highest part encoded of the round before becomes e. A part that nobody asked for
    changes nothing; a round without any leaves e as it is. So the sum over rounds of the highest parts sent, plus
    `residual`, is the sum of their g, and what is lost never exceeds one round's rounding. This holds for what is
    *published*: a reader that skips a round misses its e as well.

    A part of an earlier round than the latest (its reader came late) is rounded plainly and changes nothing, because
    that round's remainder is already in the later one. Each part may have another format than the one before. Not
    thread-safe.
    """

    def __init__(self, sizes: Sequence[int], residual: Tensor | None = None) -> None:
        """`residual` (P,) bf16 is from a checkpoint; the new object then takes any round. Raises ValueError if it does
        not fit or is not finite."""
        self._sizes = tuple(sizes)
        if residual is None:
            residual = memory.zeros(sum(sizes), torch.bfloat16)
            """e of the next round, (P,) bf16. Nobody writes into it."""
        _check_vector(residual, self._sizes, torch.bfloat16)
        if not torch.isfinite(_magnitudes(residual)).all():
            raise ValueError("a residual that is not finite: start from none")
        self._latest: tuple[int, int] | None = None  # the highest (round, part) encoded
        self._carried: Tensor | None = residual  # e of that round; None: no part of it is encoded any more
        self._left_over = residual  # e of the next round

    @property
    def residual(self) -> Tensor:
        """e of the next round, (P,) bf16. Nobody writes into it."""
        return self._left_over

    def over(self, round: int) -> None:
        """Drop the e of `round` and those before it, which are over: 4 bytes a number.

        A part of them that is asked for all the same is rounded plainly.
        """
        if self._latest is not None and self._latest[0] <= round:
            self._carried = None

    @torch.no_grad()
    def encode(self, gradient: Tensor, format: Format, round: int, part: int) -> Tensor:
        """Encode `gradient` (P,), g of the round up to this part, plus the round's e.

        Raises ValueError as the function `encode` does, changing nothing.
        """
        _check_vector(gradient, self._sizes)
        latest_round, latest_part = self._latest if self._latest is not None else (round - 1, 0)
        carried = self._carried if round == latest_round else self._left_over
        if round < latest_round or carried is None:
            return encode(gradient, format, self._sizes)
        wanted = memory.empty(len(gradient)).copy_(carried).add_(gradient)  # a sum of two dtypes would copy one first
        data = encode(wanted, format, self._sizes)
        if round > latest_round or part >= latest_part:
            lost = less_decoded(wanted, data, format, self._sizes)
            self._left_over = memory.empty(len(lost), torch.bfloat16).copy_(lost)
            self._latest, self._carried = (round, part), carried
        return data


@torch.no_grad()
def less_decoded(vector: Tensor, data: Tensor, format: Format, sizes: Sequence[int]) -> Tensor:
    """Subtract the numbers of `data` from `vector` (P,) in place, run by run for blockwise formats, and return it."""
    if format not in _BLOCKWISE:
        return vector.sub_(decode(data, format, sizes))
    for run, numbers in _decoded_runs(
        data, _BLOCKWISE[format], tuple(sizes), lambda run: torch.empty_like(run.of(vector))
    ):
        run.of(vector).sub_(numbers)
    return vector


def _check_vector(vector: Tensor, sizes: Sequence[int], dtype: torch.dtype = torch.float32) -> None:
    shape = (sum(sizes),)
    if vector.dtype is not dtype or vector.shape != shape or vector.device.type != "cpu":
        raise ValueError(
            f"a vector of {shape[0]} numbers in {'fp32' if dtype is torch.float32 else 'bf16'} on the CPU is needed, "
            f"got {vector.dtype} of shape {tuple(vector.shape)} on {vector.device.type}"
        )
    if not vector.is_contiguous():
        raise ValueError("a contiguous vector is needed: call contiguous() first")


def _magnitudes(vector: Tensor) -> Tensor:
    """Return the largest magnitude of each chunk; NaN if the chunk has one."""
    return torch.stack([chunk.abs().amax() for chunk in torch.split(vector, _CHUNK)]) if len(vector) else vector


def _aligned(data: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a copy of bytes as `dtype`; what comes from the network may begin at an odd address."""
    return data.clone().view(dtype)


def _encode_blocks(vector: Tensor, layout: _Blockwise, sizes: tuple[int, ...], data: Tensor) -> Tensor:
    """Fill `data`, and return the scales, which are not finite where a number is not (the codes mean nothing then)."""
    plan = _plan(layout, sizes)
    scales = data[: plan.num_scales * _SCALE_BYTES].view(torch.float32)
    codes = data[plan.num_scales * _SCALE_BYTES :]
    for run, place in _places(plan, layout, codes):
        numbers = run.of(vector)
        largest = scales[run.scale : run.scale + run.num_blocks]
        if layout.per_byte == 4:
            place.copy_(_packed_quarters(_quarters(numbers, largest)))
            continue
        torch.amax(numbers.abs(), dim=1, out=largest)
        zero = largest <= _LARGEST_ZERO
        largest.masked_fill_(zero, 0.0)
        factor = torch.full_like(largest, layout.levels).div_(largest.masked_fill(zero, torch.inf))  # 0 for zero blocks
        rounded = (numbers * factor[:, None]).round_()
        if layout.per_byte == 1:
            place.view(torch.int8).view(rounded.shape).copy_(rounded)
        else:
            place.copy_(_packed(rounded))
    return scales


def _decode_blocks(data: Tensor, layout: _Blockwise, sizes: tuple[int, ...], out: Tensor) -> None:
    for _ in _decoded_runs(data, layout, sizes, lambda run: run.of(out)):
        pass


def _decoded_runs(
    data: Tensor, layout: _Blockwise, sizes: tuple[int, ...], room: Callable[[_Run], Tensor]
) -> Iterator[tuple[_Run, Tensor]]:
    """Yield each run with its numbers, written to the tensor that `room` provides."""
    plan = _plan(layout, sizes)
    scales = _aligned(data[: plan.num_scales * _SCALE_BYTES], torch.float32)
    codes = data[plan.num_scales * _SCALE_BYTES :]
    for run, place in _places(plan, layout, codes):
        numbers = room(run)
        if layout.per_byte == 4:
            numbers.copy_(_unpacked_quarters(place)[: numbers.numel()].view(numbers.shape)).sub_(1.5)
            numbers.mul_(scales[run.scale : run.scale + run.num_blocks, None])
            yield run, numbers
            continue
        if layout.per_byte == 1:
            numbers.copy_(place.view(torch.int8).view(numbers.shape))
        else:
            numbers.copy_(_unpacked(place)[: numbers.numel()].view(numbers.shape)).sub_(8)
        # In this order: 127 * (1 / 127) is exactly 1 in fp32, and 7 * (1 / 7), so a full code decodes to the scale.
        numbers.mul_(1 / layout.levels).mul_(scales[run.scale : run.scale + run.num_blocks, None])
        yield run, numbers


def _places(plan: _Plan, layout: _Blockwise, codes: Tensor) -> Iterator[tuple[_Run, Tensor]]:
    """Yield each run with its bytes of `codes`."""
    for run in plan.runs:
        num_bytes = -(-run.num_blocks * run.width // layout.per_byte)
        yield run, codes[run.code_byte : run.code_byte + num_bytes]


def _packed(rounded: Tensor) -> Tensor:
    """Pack codes -7 .. 7, fp32 of any shape, as half-bytes in order; an odd last byte's high half is 0."""
    halves = torch.zeros(rounded.numel() + rounded.numel() % 2, dtype=torch.uint8)
    halves[: rounded.numel()].view(rounded.shape).copy_(rounded + 8)
    pairs = halves.view(torch.int16)  # low | high << 8, two at a time
    return (pairs | pairs >> 4).to(torch.uint8)  # keeps the low eight bits


def _unpacked(packed: Tensor) -> Tensor:
    """Return the half-bytes of `packed` (n,) in order, (2 n,) uint8, each 0 .. 15."""
    pairs = packed.to(torch.int16)
    return ((pairs | pairs << 4) & 0x0F0F).view(torch.uint8)


# ---------------------------------------------------------------- two bits


def _quarters(numbers: Tensor, steps: Tensor) -> Tensor:
    """Return codes 0 .. 3 of int2 for blocks (n, width), fp32; fill `steps` (n,), not finite where a number is not."""
    num_blocks, width = numbers.shape
    padded = 1 << (width - 1).bit_length()
    halves = torch.zeros(num_blocks, padded)
    torch.abs(numbers, out=halves[:, :width])
    while halves.shape[1] > 1:
        halves = halves[:, ::2] * 0.5 + halves[:, 1::2] * 0.5
    mean = halves[:, 0]
    mean = torch.where(mean.isinf(), mean, mean.clamp(max=_LARGEST_MEAN))
    torch.mul(mean * (padded / width), _STEP_OF_MEAN, out=steps)
    zero = steps <= _LARGEST_ZERO
    steps.masked_fill_(zero, 0.0)
    factor = torch.ones_like(steps).div_(steps.masked_fill(zero, torch.inf))
    return (numbers * factor[:, None]).floor_().add_(2.0).clamp_(0.0, 3.0)


def _packed_quarters(codes: Tensor) -> Tensor:
    """Pack codes 0 .. 3, fp32 of any shape, four a byte in order; those missing at the end are 0."""
    fours = torch.zeros(-(-codes.numel() // 4) * 4, dtype=torch.uint8)
    fours[: codes.numel()].view(codes.shape).copy_(codes)
    packed = fours.view(torch.int32)  # first | second << 8 | third << 16 | fourth << 24
    return (packed | packed >> 6 | packed >> 12 | packed >> 18).to(torch.uint8)  # keeps the low eight bits


def _unpacked_quarters(packed: Tensor) -> Tensor:
    """Return the codes of `packed` (n,) in order, (4 n,) uint8, each 0 .. 3."""
    fours = packed.to(torch.int32)
    return ((fours | fours << 6 | fours << 12 | fours << 18) & 0x03030303).view(torch.uint8)

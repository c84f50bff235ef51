"""Define the built-in model: a GPT, its loss, its evaluation and a sampler, in one file to read from top to bottom.

Why our own: it is small enough to train on a laptop's processor, it starts from the same bits on every machine, and it
can be cut into stages anywhere (`stages.py`: `embed`, `blocks`, then `final_norm` and `head`).

Its parts: RMSNorm before each half of a block (arXiv 1910.07467), rotary positions (2104.09864), queries and keys
normalised per head (2010.04245), SwiGLU (2002.05202), no biases, embedding and head untied. Each was measured against
what it replaced (`docs/lab-log.md`).

Shapes: B batch, T time (tokens), D width, H heads, K = D / H head width, V vocabulary.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swarmtrain.model.head_loss import mean_loss, sum_of_losses
from swarmtrain.model.recomputation import recomputed
from swarmtrain.run import ModelSection
from swarmtrain.words import bits_per_byte

__all__ = ["GPT", "TextLoss", "build_model", "evaluate", "generate", "num_parameters"]

_ROTARY_BASE = 10_000.0
NORM_EPSILON = 1e-6


def _hidden_width(section: ModelSection) -> int:
    return max(1, round(section.feed_forward_ratio * section.width))


def rotary_table(num_positions: int, head_width: int) -> Tensor:
    """Return cosines and sines of each position's angles: (2, T, K / 2)."""
    frequencies = _ROTARY_BASE ** (-torch.arange(0, head_width, 2, dtype=torch.float64) / head_width)
    angles = torch.arange(num_positions, dtype=torch.float64)[:, None] * frequencies
    return torch.stack([angles.cos(), angles.sin()]).to(torch.float32)


def _rotate(x: Tensor, rotary: Tensor) -> Tensor:
    """Rotate each pair (i, i + K/2) of x (..., T, K) by its position's angle."""
    cos, sin = rotary[0], rotary[1]
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def check_length(num_tokens: int, section: ModelSection) -> None:
    """Raise ValueError when the tokens are more than the context."""
    if num_tokens > section.context_tokens:
        raise ValueError(f"{num_tokens} tokens are more than the context of {section.context_tokens}")


class Linear(nn.Linear):
    """Linear layer without torch's random initial weights, which would be overwritten."""

    def reset_parameters(self) -> None:
        """Leave the weights uninitialised."""


class Embedding(nn.Embedding):
    """Embedding without torch's random initial weights, which would be overwritten."""

    def reset_parameters(self) -> None:
        """Leave the weights uninitialised."""


class Attention(nn.Module):
    """Causal self-attention with H heads, whose queries and keys are normalised and then rotated."""

    def __init__(self, section: ModelSection) -> None:
        super().__init__()
        self.num_heads = section.num_heads
        self.qkv = Linear(section.width, 3 * section.width, bias=False)
        self.out = Linear(section.width, section.width, bias=False)

    def forward(self, x: Tensor, rotary: Tensor) -> Tensor:
        B, T, D = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.num_heads, D // self.num_heads).permute(2, 0, 3, 1, 4)  # (3, B, H, T, K)
        qk = _rotate(F.rms_norm(qkv[:2], qkv.shape[-1:], eps=NORM_EPSILON), rotary)
        mixed = F.scaled_dot_product_attention(qk[0], qk[1], qkv[2], is_causal=True)  # (B, H, T, K)
        return cast(Tensor, self.out(mixed.transpose(1, 2).reshape(B, T, D)))


class FeedForward(nn.Module):
    """SwiGLU: a SiLU of half of `gate_up` scales how much of the other half passes to `down`."""

    def __init__(self, section: ModelSection) -> None:
        super().__init__()
        hidden = _hidden_width(section)
        self.gate_up = Linear(section.width, 2 * hidden, bias=False)
        self.down = Linear(hidden, section.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return cast(Tensor, self.down(F.silu(gate) * up))


class Block(nn.Module):
    """Layer of attention and feed-forward, each added to the residual stream (B, T, D)."""

    def __init__(self, section: ModelSection) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(section.width, eps=NORM_EPSILON)
        self.attention = Attention(section)
        self.feed_forward_norm = nn.RMSNorm(section.width, eps=NORM_EPSILON)
        self.feed_forward = FeedForward(section)

    def forward(self, x: Tensor, rotary: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rotary)
        return cast(Tensor, x + self.feed_forward(self.feed_forward_norm(x)))


class GPT(nn.Module):
    """Whole model. `build_model` builds it; the constructor alone leaves weights uninitialised."""

    rotary: Tensor

    def __init__(self, section: ModelSection) -> None:
        super().__init__()
        self.section = section
        self.embed = Embedding(section.vocabulary_size, section.width)
        self.blocks = nn.ModuleList(Block(section) for _ in range(section.num_layers))
        self.final_norm = nn.RMSNorm(section.width, eps=NORM_EPSILON)
        self.head = Linear(section.width, section.vocabulary_size, bias=False)
        table = rotary_table(section.context_tokens, section.width // section.num_heads)
        self.register_buffer("rotary", table, persistent=False)
        self.recomputes_blocks = False
        """True where memory is short: of the blocks only inputs are kept for the backward pass, which computes each
        block again, to the same bits."""

    def trained_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Return the tensors that are trained and published, by name, in the order in which they are flattened."""
        return list(self.named_parameters())

    def trained_tensors(self) -> list[nn.Parameter]:
        """Return the tensors that are trained and published, in the order in which they are flattened."""
        return [tensor for _, tensor in self.trained_parameters()]

    def features(self, tokens: Tensor) -> Tensor:
        """Return the head's input (B, T, D) of tokens (B, T), int64.

        Raises ValueError if T is more than `context_tokens`.
        """
        T = tokens.shape[1]
        check_length(T, self.section)
        x = self.embed(tokens)
        rotary = self.rotary[:, :T]
        recomputes = self.recomputes_blocks and torch.is_grad_enabled()
        for block in self.blocks:
            x = recomputed(partial(block, rotary=rotary), x) if recomputes else block(x, rotary)
        return cast(Tensor, self.final_norm(x))

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits (B, T, V) of tokens (B, T), int64. Raises ValueError if T is more than `context_tokens`."""
        return cast(Tensor, self.head(self.features(tokens)))

    def loss(self, batch: Tensor) -> Tensor:
        """Return mean nats per token, a scalar: each token of `batch` (B, T + 1) but the first is predicted from those
        before it."""
        x = self.features(batch[:, :-1])
        return mean_loss(self.head, x, batch[:, 1:], is_memory_short=self.recomputes_blocks)


def num_parameters(section: ModelSection) -> int:
    """Return the number of parameters of `GPT(section)`, computed without building it."""
    D, hidden = section.width, _hidden_width(section)
    block = 4 * D * D + 3 * D * hidden + 2 * D
    return 2 * section.vocabulary_size * D + section.num_layers * block + D


def build_model(section: ModelSection, seed: int) -> GPT:
    """Build a GPT on the processor, fp32, whose initial weights depend on the shape and the seed alone.

    They are the same bits on every machine. Each parameter has a generator of its own, seeded from the SHA-256 of the
    seed and its name, so neither the order of building, nor the global generator, nor the cut into stages matters.
    Weights are uniform, not normal: torch makes uniform numbers one by one from 24 bits each, which is exact, but
    normal ones by code that depends on the tensor's size and the processor's vector instructions. Two roundings follow,
    as IEEE 754 prescribes. The one thing we cannot promise is torch's own Mersenne Twister; a test pins its result
    (decision 7).
    """
    model = GPT(section)
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            parameter.copy_(initial_weight(name, parameter.shape, seed))
    return model


def initial_weight(name: str, shape: torch.Size, seed: int) -> Tensor:
    """Return the initial value, fp32, of the parameter called `name` of a GPT.

    Norms are 1. Matrices are uniform with mean 0 and standard deviation 1 / sqrt(fan-in), embeddings with 1.
    """
    if name.endswith("norm.weight"):
        return torch.ones(shape)
    deviation = 1.0 if name == "embed.weight" else 1.0 / math.sqrt(shape[-1])
    return uniform_weight(name, shape, seed, deviation)


def uniform_weight(name: str, shape: torch.Size, seed: int, deviation: float) -> Tensor:
    """Return uniform numbers with mean 0, fp32, for the parameter called `name`: the same bits on every machine."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") % 2**63)
    uniform = torch.rand(shape, generator=generator, dtype=torch.float32)  # in [0, 1), multiples of 2**-24
    return uniform.sub_(0.5).mul_(2 * math.sqrt(3) * deviation)


@torch.inference_mode()
def evaluate(model: GPT, batches: Iterable[Tensor]) -> tuple[float, int]:
    """Return (sum of nats, number of predicted tokens) over batches (B, T + 1), int64, of any device.

    With one byte per token, their quotient is the held-out loss.
    """
    sum_nats, num_targets = 0.0, 0
    device = model.embed.weight.device
    for batch in batches:
        batch = batch.to(device)
        targets = batch[:, 1:]
        sum_nats += float(sum_of_losses(model.head, model.features(batch[:, :-1]), targets))
        num_targets += targets.numel()
    return sum_nats, num_targets


@dataclass(frozen=True)
class TextLoss:
    """Loss on a text of which each byte is in exactly one target token (`held_out_batches`)."""

    sum_nats: float
    num_tokens: int
    num_bytes: int

    @property
    def nats_per_byte(self) -> float:
        """Held-out loss as the run reports it."""
        return self.sum_nats / self.num_bytes

    @property
    def bits_per_byte(self) -> float:
        """Held-out loss in bits per byte, which does not depend on the tokenizer: models with different ones compare by
        it."""
        return bits_per_byte(self.nats_per_byte)

    @property
    def perplexity(self) -> float | None:
        """exp(nats per token): the number of equally likely tokens among which the next one is guessed.

        None if a float cannot hold it, since events hold finite numbers only.
        """
        try:
            return math.exp(self.sum_nats / self.num_tokens)
        except OverflowError:
            return None


@torch.inference_mode()
def generate(
    model: GPT,
    prompt_tokens: Sequence[int],
    num_tokens: int,
    temperature: float,
    seed: int,
    advance: Callable[[int], None] = lambda number: None,
) -> list[int]:
    """Return `num_tokens` tokens that continue the prompt, each drawn given the last `context_tokens`.

    Temperature 0 takes the likeliest token. The same arguments give the same tokens on one machine. Calls `advance` for
    each token. Raises ValueError when the prompt is empty or has an unknown token, or the temperature is negative.
    """
    vocabulary_size, context_tokens = model.section.vocabulary_size, model.section.context_tokens
    if not prompt_tokens or not all(0 <= token < vocabulary_size for token in prompt_tokens):
        raise ValueError(f"the prompt must hold at least one token, each below {vocabulary_size}")
    if not temperature >= 0:
        raise ValueError(f"temperature must not be negative, got {temperature}")
    generator = torch.Generator().manual_seed(seed)
    tokens = list(prompt_tokens)
    device = model.embed.weight.device
    for _ in range(num_tokens):
        logits = model(torch.tensor([tokens[-context_tokens:]], device=device))[0, -1].float().cpu()
        if temperature == 0:
            tokens.append(int(logits.argmax()))
        else:
            chances = torch.softmax(logits / temperature, dim=-1)
            tokens.append(int(torch.multinomial(chances, 1, generator=generator)))
        advance(1)
    return tokens[len(prompt_tokens) :]

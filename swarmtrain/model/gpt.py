"""Define the built-in model: a GPT and its initial weights, in one file to read from top to bottom.

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
from collections.abc import Callable
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swarmtrain.model.head_loss import product_type
from swarmtrain.model.key_value_cache import KeyValueCache
from swarmtrain.model.language_model import LanguageModel, ModelSpec, check_length
from swarmtrain.model.parameter_count import hidden_width
from swarmtrain.model.recomputation import recomputed
from swarmtrain.run_model import ModelSection

ROTARY_BASE = 10_000.0
NORM_EPSILON = 1e-6
_Extended = Callable[[Tensor], Tensor] | None


def rotary_table(num_positions: int, head_width: int) -> Tensor:
    """Return cosines and sines of each position's angles: (2, T, K / 2)."""
    frequencies = ROTARY_BASE ** (-torch.arange(0, head_width, 2, dtype=torch.float64) / head_width)
    angles = torch.arange(num_positions, dtype=torch.float64)[:, None] * frequencies
    return torch.stack([angles.cos(), angles.sin()]).to(torch.float32)


def _rotate(x: Tensor, rotary: Tensor) -> Tensor:
    """Rotate each pair (i, i + K/2) of x (..., T, K) by its position's angle."""
    cos, sin = rotary[0], rotary[1]
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def document_mask(positions: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what is added to the scores of attention, (B, 1, T, T), so that each token sees only earlier tokens of its
    own document and itself; positions (B, T) are 0 where a document begins."""
    documents, T = (positions == 0).cumsum(1), positions.shape[1]
    is_seen = documents[:, None, :, None] == documents[:, None, None, :]
    is_seen &= torch.ones(T, T, dtype=torch.bool, device=positions.device).tril()
    return torch.zeros(is_seen.shape, dtype=dtype, device=positions.device).masked_fill_(~is_seen, -math.inf)


class Linear(nn.Linear):
    """Linear layer without torch's random initial weights, which would be overwritten."""

    def reset_parameters(self) -> None:
        """Leave the weights uninitialised."""


class Embedding(nn.Embedding):
    """Embedding without torch's random initial weights, which would be overwritten."""

    def reset_parameters(self) -> None:
        """Leave the weights uninitialised."""


class Attention(nn.Module):
    """Causal self-attention with H heads, whose queries and keys are normalised and then rotated.

    With a mask (B, 1, T, T) it is added to the scores, and nothing else makes attention causal. `extended` returns the
    keys and values (2, B, H, S, K) of all tokens, given those of x: one token after others, or several after none.
    """

    def __init__(self, section: ModelSection) -> None:
        super().__init__()
        self.num_heads = section.num_heads
        self.qkv = Linear(section.width, 3 * section.width, bias=False)
        self.out = Linear(section.width, section.width, bias=False)

    def forward(
        self, x: Tensor, rotary: Tensor, mask: Tensor | None = None, extended: _Extended | None = None
    ) -> Tensor:
        B, T, D = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.num_heads, D // self.num_heads).permute(2, 0, 3, 1, 4)  # (3, B, H, T, K)
        qk = _rotate(F.rms_norm(qkv[:2], qkv.shape[-1:], eps=NORM_EPSILON), rotary)
        q, k, v = qk[0], qk[1], qkv[2]
        if extended is not None:
            k, v = extended(torch.stack([k, v]))
        is_causal = mask is None and k.shape[-2] == T
        mixed = F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal)  # (B, H, T, K)
        return cast(Tensor, self.out(mixed.transpose(1, 2).reshape(B, T, D)))


class FeedForward(nn.Module):
    """SwiGLU: a SiLU of half of `gate_up` scales how much of the other half passes to `down`."""

    def __init__(self, section: ModelSection) -> None:
        super().__init__()
        hidden = hidden_width(section)
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

    def forward(
        self, x: Tensor, rotary: Tensor, mask: Tensor | None = None, extended: _Extended | None = None
    ) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rotary, mask, extended)
        return cast(Tensor, x + self.feed_forward(self.feed_forward_norm(x)))


class GPT(LanguageModel):
    """Whole model. `build_model` builds it; the constructor alone leaves weights uninitialised."""

    rotary: Tensor

    def __init__(self, section: ModelSection) -> None:
        super().__init__(ModelSpec(section))
        self.embed = Embedding(section.vocabulary_size, section.width)
        self.blocks = nn.ModuleList(Block(section) for _ in range(section.num_layers))
        self.final_norm = nn.RMSNorm(section.width, eps=NORM_EPSILON)
        self.head = Linear(section.width, section.vocabulary_size, bias=False)
        table = rotary_table(section.context_tokens, section.width // section.num_heads)
        self.register_buffer("rotary", table, persistent=False)

    def features(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        """See `LanguageModel`."""
        T = tokens.shape[1]
        check_length(T, self.context_tokens)
        x, mask = self.embed(tokens), None
        rotary = self.rotary[:, :T]
        if positions is not None:
            rotary = self.rotary[:, positions][:, :, None]  # (2, B, 1, T, K / 2)
            mask = document_mask(positions, product_type(self.head.weight))
        recomputes = self.recomputes_blocks and torch.is_grad_enabled()
        for block in self.blocks:
            x = recomputed(partial(block, rotary=rotary, mask=mask), x) if recomputes else block(x, rotary, mask)
        return cast(Tensor, self.final_norm(x))

    def next_logits(self, tokens: Tensor, cache: KeyValueCache) -> Tensor:
        """See `LanguageModel`."""
        first, T = cache.num_tokens, tokens.shape[1]
        if first and T > 1:
            raise ValueError(f"{T} tokens at once after {first} others; one by one is possible")
        check_length(first + T, self.context_tokens)
        x, rotary = self.embed(tokens), self.rotary[:, first : first + T]
        for number, block in enumerate(self.blocks):
            x = block(x, rotary, extended=partial(cache.extend, number))
        cache.num_tokens += T
        return cast(Tensor, self.head(self.final_norm(x[0, -1])))


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

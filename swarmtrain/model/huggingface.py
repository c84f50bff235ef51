"""Cut a Hugging Face causal language model into stages: Llama, Qwen2, Qwen3 and GPT-2, from a seed or a checkpoint.

As in `stages.py`, whose names it keeps: a stage holds the blocks between two places where the model is cut, the first
one the embedding too, the last one the final norm and the head. Only that part is ever built or read. The blocks are
the library's own, so a stage computes what the whole model does, and its parameters have the whole model's names
(decision 25).

Nothing of a checkpoint is executed: its configuration is checked first (`huggingface_config.py`), and its tensors are
read from safetensors. The library `transformers` is imported when a stage is built or counted, and never contacts the
hub here.

Shapes: B batch, T time (tokens), D width, V vocabulary.
"""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from swarmtrain.errors import UserError
from swarmtrain.extras import install_in_words
from swarmtrain.model import stages
from swarmtrain.model.gpt import uniform_weight
from swarmtrain.model.head_loss import mean_loss
from swarmtrain.model.huggingface_config import HuggingFaceModel, read_config, untie
from swarmtrain.run import ModelSection
from swarmtrain.words import one_line

__all__ = [
    "HuggingFaceModel",
    "HuggingFaceShape",
    "HuggingFaceStage",
    "build_stage",
    "load_stage",
    "read_config",
    "stage_shapes",
    "tensor_files",
    "untie",
]


@dataclass(frozen=True, kw_only=True)
class HuggingFaceShape:
    """Part of a model that a stage holds."""

    model: HuggingFaceModel
    first_block: int
    last_block: int
    """Exclusive."""
    has_embedding: bool
    has_head: bool

    @cached_property
    def num_parameters(self) -> int:
        """Number of parameters, computed without memory for weights. Raises UserError without the extra `hf`."""
        ends, with_one = (
            sum(p.numel() for p in HuggingFaceStage(replace(self, first_block=0, last_block=last)).parameters())
            for last in (0, 1)
        )
        return ends + (self.last_block - self.first_block) * (with_one - ends)


def stage_shapes(model: HuggingFaceModel, boundaries: Sequence[int]) -> list[HuggingFaceShape]:
    """Return the stages of a model cut at `boundaries`; one if there are none. Raises ValueError for an
    impossible cut."""
    # The possible cuts depend only on the number of blocks.
    like = ModelSection().model_copy(update={"num_layers": model.num_layers})
    return [
        HuggingFaceShape(
            model=model,
            first_block=shape.first_block,
            last_block=shape.last_block,
            has_embedding=shape.has_embedding,
            has_head=shape.has_head,
        )
        for shape in stages.stage_shapes(like, boundaries)
    ]


# ---------------------------------------------------------------- what is computed


class HuggingFaceStage(nn.Module):
    """Part of a model. `build_stage` and `load_stage` build it; the constructor alone takes no memory for weights."""

    lm_head: nn.Linear

    def __init__(self, shape: HuggingFaceShape) -> None:
        super().__init__()
        self.shape, model = shape, shape.model
        # Body and head have the names that they have in the whole model.
        body: nn.Module = (_Gpt2Body if model.family == "gpt2" else _RotaryBody)(shape)
        self.add_module(_BODIES[model.family], body)
        if shape.has_head:
            self.lm_head = nn.Linear(model.width, model.vocabulary_size, bias=False, device="meta")

    def forward(self, x: Tensor) -> Tensor:
        """Return the next stage's input (B, T, D), or the last stage's logits (B, T, V).

        `x` is tokens (B, T), int64, for the first stage, else the output of the stage before, (B, T, D). Raises
        ValueError when it is longer than the context.
        """
        x = self._features(x)
        return cast(Tensor, self.lm_head(x)) if self.shape.has_head else x

    def loss(self, x: Tensor, targets: Tensor) -> Tensor:
        """Return the last stage's loss: mean nats per token, a scalar, of predicting targets (B, T), int64."""
        return mean_loss(self.lm_head, self._features(x), targets)

    def _features(self, x: Tensor) -> Tensor:
        """Return the head's input, or in other stages the next stage's (B, T, D)."""
        T, context_tokens = x.shape[1], self.shape.model.context_tokens
        if context_tokens < T:
            raise ValueError(f"{T} tokens are more than the context of {context_tokens}")
        return cast(Tensor, self.get_submodule(_BODIES[self.shape.model.family])(x))


_BODIES = {"llama": "model", "qwen2": "model", "qwen3": "model", "gpt2": "transformer"}
_NAMES_IN_CODE = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "gpt2": "GPT2"}


class _RotaryBody(nn.Module):
    """`model` of a Llama, Qwen2 or Qwen3. Each stage computes the rotary table itself."""

    def __init__(self, shape: HuggingFaceShape) -> None:
        super().__init__()
        code, config = _library(shape.model)
        with torch.device("meta"):
            if shape.has_embedding:
                self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
            self.layers = _blocks(shape, code("DecoderLayer"), config)
            if shape.has_head:
                self.norm = code("RMSNorm")(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = code("RotaryEmbedding")(config=config)
        self.shape = shape

    def forward(self, x: Tensor) -> Tensor:
        positions = torch.arange(x.shape[1], device=x.device)[None]
        if self.shape.has_embedding:
            x = self.embed_tokens(x)
        rotary = self.rotary_emb(x, positions)
        for block in self.layers.values():
            x = _hidden(block(x, position_embeddings=rotary))
        return cast(Tensor, self.norm(x)) if self.shape.has_head else x


class _Gpt2Body(nn.Module):
    """`transformer` of a GPT-2. Positions are learnt, and added once, by the first stage."""

    def __init__(self, shape: HuggingFaceShape) -> None:
        super().__init__()
        code, config = _library(shape.model)
        with torch.device("meta"):
            if shape.has_embedding:
                self.wte = nn.Embedding(config.vocab_size, config.n_embd)
                self.wpe = nn.Embedding(config.n_positions, config.n_embd)
            self.h = _blocks(shape, code("Block"), config)
            if shape.has_head:
                self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.shape = shape

    def forward(self, x: Tensor) -> Tensor:
        if self.shape.has_embedding:
            x = self.wte(x) + self.wpe(torch.arange(x.shape[1], device=x.device)[None])
        for block in self.h.values():
            x = _hidden(block(x))
        return cast(Tensor, self.ln_f(x)) if self.shape.has_head else x


def _blocks(shape: HuggingFaceShape, block: Any, config: Any) -> nn.ModuleDict:
    blocks = nn.ModuleDict({str(n): block(config, layer_idx=n) for n in range(shape.first_block, shape.last_block)})
    for module in blocks.modules():
        for name, _ in list(module.named_buffers(recurse=False)):
            delattr(module, name)  # the causal masks of another attention implementation, unused
    return blocks


def _hidden(output: Any) -> Tensor:
    """Return the hidden states of a block's output, which before version 5 is a tuple."""
    return cast(Tensor, output[0] if isinstance(output, tuple) else output)


def _library(model: HuggingFaceModel) -> tuple[Any, Any]:
    """Return (function from a short name to the family's class, the library's configuration of `model`).

    Without a mask, "sdpa" is causal by itself, with the same kernel that the whole model runs. Raises UserError without
    the extra `hf`.
    """
    family, prefix = model.family, _NAMES_IN_CODE[model.family]
    try:
        configurations = importlib.import_module(f"transformers.models.{family}.configuration_{family}")
        code = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    except ImportError as error:
        reason = one_line(str(error))[:200]
        raise UserError(
            f"a Hugging Face model needs transformers: {install_in_words('hf')} ({reason})", code="package-missing"
        ) from None
    config = getattr(configurations, f"{prefix}Config")(**model.as_json(), attn_implementation="sdpa")
    return (lambda name: getattr(code, prefix + name)), config


# ---------------------------------------------------------------- weights from a seed


def build_stage(shape: HuggingFaceShape, seed: int) -> HuggingFaceStage:
    """Build a stage on the processor, fp32, whose initial weights depend on the model and the seed, not on the cut.

    They are the same bits on every machine (see `gpt.uniform_weight`). Raises UserError without the extra `hf`.
    """
    stage = HuggingFaceStage(shape)
    weights = {name: initial_weight(name, p.shape, seed, shape.model) for name, p in stage.named_parameters()}
    stage.load_state_dict(weights, assign=True)
    return stage


def initial_weight(name: str, shape: torch.Size, seed: int, model: HuggingFaceModel) -> Tensor:
    """Return the initial value of a parameter: norms 1, biases 0, others with mean 0 and deviation `initializer_range`.

    In GPT-2, matrices whose output is added to the residual stream have it divided by the root of the number of such
    sums, as the library does.
    """
    if len(shape) == 1:
        return torch.zeros(shape) if name.endswith(".bias") else torch.ones(shape)
    deviation = model.config.initializer_range
    if model.family == "gpt2" and name.endswith(".c_proj.weight"):
        deviation /= math.sqrt(2 * model.num_layers)
    return uniform_weight(name, shape, seed, deviation)


# ---------------------------------------------------------------- weights from a checkpoint

_WHOLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_MAX_INDEX_BYTES = 67_108_864
_FLOATS = ("F32", "BF16", "F16", "F64")


def load_stage(shape: HuggingFaceShape, folder: Path) -> HuggingFaceStage:
    """Load a stage on the processor, fp32, with a checkpoint's weights; reads only those that it needs.

    Raises UserError, one line, when they are missing, of another shape, or torn, and without the extra `hf`.
    """
    stage = HuggingFaceStage(shape)
    wanted = {name: parameter.shape for name, parameter in stage.named_parameters()}
    weights: dict[str, Tensor] = {}
    for path, names in _places(folder, wanted, shape.model).items():
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                for name, stored in names.items():
                    weights[name] = _tensor(file, stored, wanted[name], path)
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{_shown(path)}: cannot be read: {one_line(str(error))}; fetch it again", code="file-unreadable"
            ) from None
    stage.load_state_dict(weights, assign=True)
    return stage


def _places(folder: Path, wanted: Iterable[str], model: HuggingFaceModel) -> dict[Path, dict[str, str]]:
    """Return, by file, the wanted parameters in it and their names there. Raises UserError if one is missing."""
    files = tensor_files(folder)
    body = _BODIES[model.family]
    places: dict[Path, dict[str, str]] = {}
    for name in wanted:
        source = name
        if name == "lm_head.weight" and model.head_is_copy:
            source = f"{body}.wte.weight" if model.family == "gpt2" else f"{body}.embed_tokens.weight"
        # A checkpoint of the body alone leaves its name out: GPT-2's own is one.
        stored = next((known for known in (source, source.removeprefix(f"{body}.")) if known in files), None)
        if stored is None:
            hint = (
                "if its head is tied to its embedding, cut it with swarmtrain.model.huggingface.untie"
                if name == "lm_head.weight"
                else "give the folder of the checkpoint whose config.json this is"
            )
            raise UserError(f"{_shown(folder)}: has no tensor {source}; {hint}", code="checkpoint-mismatch")
        places.setdefault(folder / files[stored], {})[name] = stored
    return places


def tensor_files(folder: Path) -> Mapping[str, str]:
    """Return the name of the file that holds each tensor. Raises UserError."""
    whole, index = folder / _WHOLE, folder / _INDEX
    try:
        if whole.is_file():
            with safe_open(whole, framework="pt", device="cpu") as file:
                return dict.fromkeys(file.keys(), _WHOLE)
        with index.open("rb") as stream:
            content = stream.read(_MAX_INDEX_BYTES + 1)
        if len(content) > _MAX_INDEX_BYTES:
            raise ValueError(f"more than {_MAX_INDEX_BYTES} bytes")
        files = json.loads(content)["weight_map"]
        if not isinstance(files, dict) or not all(_is_plain(file) for file in files.values()):
            raise ValueError("weight_map does not name files of this folder")
    except FileNotFoundError:
        raise UserError(
            f"{_shown(folder)}: has neither {_WHOLE} nor {_INDEX}; other formats can execute what they hold and are "
            "not read: save it as safetensors",
            code="not-safetensors",
        ) from None
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        path = whole if whole.is_file() else index
        raise UserError(
            f"{_shown(path)}: cannot be read: {one_line(str(error))}; fetch it again", code="file-unreadable"
        ) from None
    return files


def _is_plain(file: object) -> bool:
    return isinstance(file, str) and file.endswith(".safetensors") and not set(file) & set("/\\:\0")


def _tensor(file: Any, stored: str, shape: torch.Size, path: Path) -> Tensor:
    """Read one tensor as fp32, into memory of its own instead of the file's. Raises UserError."""
    header = file.get_slice(stored)
    if tuple(header.get_shape()) != tuple(shape) or header.get_dtype() not in _FLOATS:
        found = f"{header.get_dtype()} {list(header.get_shape())}"
        raise UserError(
            f"{_shown(path)}: {one_line(stored)} is {found}, but config.json says floats {list(shape)}; give the "
            "folder of one checkpoint",
            code="checkpoint-mismatch",
        )
    tensor = cast(Tensor, file.get_tensor(stored)).to(torch.float32, copy=True)
    if not tensor.isfinite().all():
        raise UserError(
            f"{_shown(path)}: {one_line(stored)} has numbers that are not finite; give another checkpoint",
            code="checkpoint-not-finite",
        )
    return tensor


def _shown(path: Path) -> str:
    return one_line(str(path))

"""Cut a causal language model of transformers into stages, from a seed or a checkpoint.

As in `stages.py`, whose names it keeps: a stage holds the blocks between two places where the model is cut, the first
one the embeddings too, the last one what comes after the blocks. Only that part takes memory or is read. A stage is the
library's own model, in which the parts that other stages hold only pass on what they are given. So it computes what the
whole model does, and its parameters have the whole model's names (decision 25).

Llama, Qwen2, Qwen3 and GPT-2 are tested by this project. Stages of any other family are compared with the whole first,
on the small model of `huggingface_probe.py`.

Shapes: B batch, T time (tokens), D width, V vocabulary.
"""

from __future__ import annotations

import copy
import functools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from swarmtrain.errors import UserError
from swarmtrain.model import stages
from swarmtrain.model.gpt import uniform_weight
from swarmtrain.model.head_loss import mean_loss
from swarmtrain.model.huggingface_library import (
    library_config,
    library_model_of_stage,
    load_library_model,
    tensor_files,
)
from swarmtrain.model.huggingface_probe import (
    TESTED,
    ModelTraits,
    is_near,
    logits_of,
    place_of,
    problem_of,
    small_model,
    traits_of,
)
from swarmtrain.model.language_model import check_length
from swarmtrain.run_model import ModelSection
from swarmtrain.words import one_line


@dataclass(frozen=True, eq=False)
class HuggingFaceModel:
    """Model that can be cut into stages. `model_to_cut` makes it."""

    config: Any
    """The library's configuration; the head is a matrix of its own."""
    traits: ModelTraits
    head_is_copy: bool = False
    """True if the head is read from the embedding's tensor of a checkpoint, as a copy that is then trained apart."""

    @property
    def num_layers(self) -> int:
        """Number of blocks."""
        return cast(int, self.config.get_text_config().num_hidden_layers)


def model_to_cut(data: Mapping[str, Any], origin: str) -> HuggingFaceModel:
    """Return the model of a configuration (`huggingface_config.whole_config`) with a head of its own.

    From a checkpoint, the head of a tied model begins as a copy of the embedding, and the two are trained apart. From a
    seed, they begin apart. Raises UserError, which names `origin`, if its stages do not compute what the whole does.
    """
    traits, config = traits_of(data, origin), library_config(data, origin)
    if config.model_type not in TESTED and (problem := _problem_of_stages(json.dumps(data, sort_keys=True), origin)):
        raise UserError(
            f"{origin}: model_type: {one_line(config.model_type)[:60]} cannot be cut into stages: {problem}; set "
            "pipeline.stages = 1, with an [adapter] if the whole model takes too much memory",
            code="model-family",
        )
    is_tied = bool(config.tie_word_embeddings)
    config.tie_word_embeddings = False
    return HuggingFaceModel(config, traits, is_tied)


@functools.lru_cache(8)
def _problem_of_stages(data: str, origin: str) -> str:
    """Return how stages of a small model differ from the whole; empty if loss and gradients are the same."""
    traits = traits_of(json.loads(data), origin)
    whole, tokens = small_model(json.loads(data) | {"tie_word_embeddings": False}, origin)
    model = HuggingFaceModel(copy.deepcopy(whole.config), traits)
    return problem_of(lambda: _difference(whole, model, tokens))


def _difference(whole: Any, model: HuggingFaceModel, tokens: Tensor) -> str:
    # The embedding, each block, and the head, apart.
    parts = [HuggingFaceStage(shape) for shape in stage_shapes(model, range(model.num_layers + 1))]
    for part in parts:
        part.load_state_dict({name: whole.get_parameter(name) for name, _ in part.named_parameters()}, assign=True)
    x, targets = tokens[:, :-1], tokens[:, 1:]
    expected = F.cross_entropy(logits_of(whole, x).flatten(0, 1), targets.flatten())
    for part in parts[:-1]:
        x = part(x)
    loss = parts[-1].loss(x, targets)
    if not is_near(loss, expected):
        return "its loss is another one"
    for each in (loss, expected):
        each.backward()  # type: ignore[no-untyped-call]
    gradients = {name: parameter.grad for part in parts for name, parameter in part.named_parameters()}
    for name, parameter in whole.named_parameters():
        gradient = gradients.get(name)
        if gradient is None or not is_near(gradient, parameter.grad):
            return f"the gradient of {one_line(name)[:100]} is another one"
    return ""


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
        return sum(parameter.numel() for parameter in HuggingFaceStage(self).parameters())


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

    library_model: Any
    _entry: nn.Module
    """Block that takes the output of the stage before."""
    copied: Mapping[str, str]
    """Map the head, if it is read from the embedding's tensor of a checkpoint, to that one's name."""

    def __init__(self, shape: HuggingFaceShape) -> None:
        super().__init__()
        self.shape = shape
        library_model = library_model_of_stage(copy.deepcopy(shape.model.config))
        names = {module: name for name, module in library_model.named_modules()}
        head, embedding = library_model.get_output_embeddings(), library_model.get_input_embeddings()
        self.copied = {f"{names[head]}.weight": f"{names[embedding]}.weight"} if shape.model.head_is_copy else {}
        _cut(library_model, shape)
        blocks = blocks_of(library_model)
        # Not a part of this module, whose parts are its parts: so parameters have the names that the library gives.
        object.__setattr__(self, "library_model", library_model)
        object.__setattr__(self, "_entry", blocks[min(shape.first_block, len(blocks) - 1)])
        for name, part in library_model.named_children():
            self.add_module(name, part)

    def forward(self, x: Tensor) -> Tensor:
        """Return the next stage's input (B, T, D), or the last stage's logits (B, T, V).

        `x` is tokens (B, T), int64, for the first stage, else the output of the stage before, (B, T, D). Raises
        ValueError when it is longer than the context.
        """
        if self.shape.has_head:
            return cast(Tensor, self._called(self.library_model, x).logits)
        return self._features(x)

    def loss(self, x: Tensor, targets: Tensor) -> Tensor:
        """Return the last stage's loss: mean nats per token, a scalar, of predicting targets (B, T), int64."""
        if self.shape.model.traits.has_plain_head:
            return mean_loss(self.library_model.get_output_embeddings(), self._features(x), targets)
        return F.cross_entropy(self(x).flatten(0, 1).float(), targets.flatten())

    def _features(self, x: Tensor) -> Tensor:
        """Return the head's input, or in other stages the next stage's (B, T, D)."""
        features: Tensor = self._called(self.library_model.base_model, x).last_hidden_state
        return features.as_subclass(Tensor)

    def _called(self, part: Any, x: Tensor) -> Any:
        most = getattr(self.shape.model.config.get_text_config(), "max_position_embeddings", None)
        if isinstance(most, int):
            check_length(x.shape[1], most)
        if self.shape.has_embedding:
            return part(input_ids=x, use_cache=False)
        # What comes before the blocks may scale it, which the first stage has done.
        with self._entry.register_forward_pre_hook(
            lambda _, args, kwargs: ((x, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": x}),
            with_kwargs=True,
        ):
            return part(inputs_embeds=x, use_cache=False)


def _cut(library_model: Any, shape: HuggingFaceShape) -> None:
    """Take the parts that other stages hold out of the library's model."""
    blocks = blocks_of(library_model)
    inside = {module for block in blocks for module in block.modules()}
    for n in range(len(blocks)):
        if not shape.first_block <= n < shape.last_block:
            blocks[n] = _Elsewhere(blocks[n])
    for name, module in list(library_model.named_modules()):
        is_held = shape.has_embedding if isinstance(module, nn.Embedding) else shape.has_head
        if not is_held and module not in inside and any(True for _ in module.parameters(recurse=False)):
            library_model.set_submodule(name, _Elsewhere(module))


class _Elsewhere(nn.Module):
    """Part that another stage holds: gives on the hidden states (B, T, D) that it is given, or else adds nothing."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        vars(self).update({**vars(part), **vars(self)})  # the whole may ask a block for its kind

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        for x in (*args, *kwargs.values()):
            if isinstance(x, Tensor) and x.dim() == 3 and x.is_floating_point():
                return x.as_subclass(_HiddenStates)
        return torch.zeros(())


class _HiddenStates(Tensor):
    """Output of a block in both forms that the library has: hidden states, or a tuple that begins with them."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __getitem__(self, index: Any) -> Tensor:
        return self.as_subclass(Tensor)


def blocks_of(library_model: Any) -> nn.ModuleList:
    """Return the blocks: the first list of modules that has as many as the configuration says."""
    number = library_model.config.get_text_config().num_hidden_layers
    lists = (part for part in library_model.modules() if isinstance(part, nn.ModuleList) and len(part) == number)
    return next(lists, nn.ModuleList())


# ---------------------------------------------------------------- weights from a seed


def build_stage(shape: HuggingFaceShape, seed: int) -> HuggingFaceStage:
    """Build a stage on the processor, fp32, whose initial weights depend on the model and the seed, not on the cut.

    They are the same bits on every machine (see `gpt.uniform_weight`). Raises UserError without the extra `hf`.
    """
    stage, model = HuggingFaceStage(shape), shape.model
    weights = {
        name: initial_weight(name, p.shape, seed, model.config, model.traits) for name, p in stage.named_parameters()
    }
    stage.load_state_dict(weights, assign=True)
    return stage


def initial_weight(name: str, shape: torch.Size, seed: int, config: Any, traits: ModelTraits) -> Tensor:
    """Return the initial value of a parameter: the family's constant, or mean 0 and deviation `initializer_range`.

    Constants of families that are tested are 1 for norms, 0 for biases. In GPT-2, matrices whose output is added to the
    residual stream have the deviation divided by the root of the number of such sums, as the library does.
    """
    constant = None if traits.constants is None else traits.constants.get(place_of(name))
    if traits.constants is None and len(shape) == 1:
        constant = 0.0 if name.endswith(".bias") else 1.0
    if constant is not None:
        return torch.full(shape, constant)
    text = config.get_text_config()
    deviation = float(getattr(text, "initializer_range", None) or 0.02)
    if config.model_type == "gpt2" and name.endswith(".c_proj.weight"):
        deviation /= math.sqrt(2 * text.num_hidden_layers)
    return uniform_weight(name, shape, seed, deviation)


# ---------------------------------------------------------------- weights from a checkpoint

_FLOATS = ("F32", "BF16", "F16", "F64")


def load_stage(shape: HuggingFaceShape, folder: Path) -> HuggingFaceStage:
    """Load a stage on the processor, fp32, with a checkpoint's weights; reads only those that it needs.

    Raises UserError, one line, when they are missing, of another shape, or torn, and without the extra `hf`.
    """
    stage = HuggingFaceStage(shape)
    wanted = {name: parameter.shape for name, parameter in stage.named_parameters()}
    weights: dict[str, Tensor] = {}
    places = _places(folder, wanted, stage)
    for path, names in places.items():
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                for name, stored in names.items():
                    weights[name] = _tensor(file, stored, wanted[name], path)
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{_shown(path)}: cannot be read: {one_line(str(error))}; fetch it again", code="file-unreadable"
            ) from None
    if not places:
        weights = _loaded_by_library(shape, folder, wanted, stage.copied)
    stage.load_state_dict(weights, assign=True)
    return stage


def _places(folder: Path, wanted: Iterable[str], stage: HuggingFaceStage) -> dict[Path, dict[str, str]]:
    """Return, by file, the wanted parameters in it and their names there; nothing if one has another name there."""
    files, body = tensor_files(folder), stage.library_model.base_model_prefix
    places: dict[Path, dict[str, str]] = {}
    for name in wanted:
        source = stage.copied.get(name, name)
        # A checkpoint of the body alone leaves its name out: GPT-2's own is one.
        stored = next((known for known in (source, source.removeprefix(f"{body}.")) if known in files), None)
        if stored is None:
            return {}
        places.setdefault(folder / files[stored], {})[name] = stored
    return places


def _loaded_by_library(
    shape: HuggingFaceShape, folder: Path, wanted: Iterable[str], copied: Mapping[str, str]
) -> dict[str, Tensor]:
    """Return a stage's weights from a checkpoint with other names, or other tensors, than the model has."""
    config, is_tied = copy.deepcopy(shape.model.config), shape.has_head and bool(copied)
    config.tie_word_embeddings = is_tied
    loaded = replace(shape, has_embedding=shape.has_embedding or is_tied)
    library_model = load_library_model(config, folder, lambda model: _cut(model, loaded))
    weights = {name: library_model.get_parameter(name).detach() for name in wanted}
    return weights | {name: weights[name].clone() for name in copied if name in weights}


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

"""Whole model of transformers, to be trained as the built-in one is: Llama, Qwen2, Qwen3, GPT-2, and others.

The model is the library's own, so it computes what everybody's does, and its parameters have the library's names.
Embedding and head stay one matrix where the configuration ties them: it is one parameter, published and merged once.
Which families can be trained is found by `huggingface_probe.py`.

Shapes: B batch, T time (tokens), D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swarmtrain.algorithm.batch import inputs_of, positions_of
from swarmtrain.errors import UserError
from swarmtrain.model.huggingface import HuggingFaceModel, blocks_of, initial_weight, model_to_cut
from swarmtrain.model.huggingface_config import whole_config
from swarmtrain.model.huggingface_library import (
    cache_argument,
    empty_library_model,
    library_config,
    load_library_model,
    parameters_of,
    shape_keys,
    tensor_files,
)
from swarmtrain.model.huggingface_probe import ModelTraits, traits_of
from swarmtrain.model.key_value_cache import KeyValueCache
from swarmtrain.model.language_model import LanguageModel, ModelSpec, check_length, with_targets
from swarmtrain.run_adapter import AdapterSection
from swarmtrain.run_model import ModelSection
from swarmtrain.words import one_line

if TYPE_CHECKING:
    from swarmtrain.model.adapter import LoraAdapter


class HuggingFaceLanguageModel(LanguageModel):
    """Causal language model of transformers. The functions below build it."""

    def __init__(self, spec: ModelSpec, library_model: Any, traits: ModelTraits) -> None:
        super().__init__(spec)
        # Not a part of this module, whose parts are its parts: so parameters have the names that the library gives.
        object.__setattr__(self, "library_model", library_model)
        object.__setattr__(self, "traits", traits)
        for name, part in library_model.named_children():
            self.add_module(name, part)
        object.__setattr__(self, "_blocks", tuple(blocks_of(library_model)))
        for block in self._blocks:
            block.forward = _recomputable(block.forward, self)
        self.eval()

    library_model: Any
    """The library's model, whose parts this one has."""
    traits: ModelTraits
    _blocks: tuple[nn.Module, ...]

    @property
    def head(self) -> nn.Linear:  # type: ignore[override]
        """Last layer. The logits are its output only if the model's traits say so."""
        return cast(nn.Linear, self.library_model.get_output_embeddings())

    @property
    def keeps_documents_apart(self) -> bool:
        """See `LanguageModel`."""
        return self.traits.keeps_documents_apart

    @property
    def blocks(self) -> Iterable[nn.Module]:  # type: ignore[override]
        """Blocks in their order; none if they are not found."""
        return self._blocks

    def features(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        """See `LanguageModel`. If something comes after the head, these are the logits (B, T, V)."""
        check_length(tokens.shape[1], self.context_tokens)
        told = {"input_ids": tokens, "position_ids": positions, "use_cache": False}
        if self.traits.has_plain_head:
            return cast(Tensor, self.library_model.base_model(**told).last_hidden_state)
        return cast(Tensor, self.library_model(**told).logits)

    def forward(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        """See `LanguageModel`."""
        x = self.features(tokens, positions)
        return cast(Tensor, self.head(x)) if self.traits.has_plain_head else x

    def next_logits(self, tokens: Tensor, cache: KeyValueCache) -> Tensor:
        """See `LanguageModel`."""
        check_length(cache.num_tokens + tokens.shape[1], self.context_tokens)
        cache.num_tokens += tokens.shape[1]
        name = cache_argument(self.library_model)
        out = self.library_model(input_ids=tokens, use_cache=True, **{name: cache.of_library})
        cache.of_library = out[name]
        return cast(Tensor, out.logits[0, -1])

    def loss_of_features(self, x: Tensor, batch: Tensor) -> Tensor:
        """See `LanguageModel`."""
        if self.traits.has_plain_head:
            return super().loss_of_features(x, batch)
        logits, targets = with_targets(x, batch)
        reduction = "mean" if targets.numel() else "sum"  # the mean of nothing is not a number
        return F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten(), reduction=reduction)

    def sum_of_losses(self, batch: Tensor) -> Tensor:
        """See `LanguageModel`."""
        if self.traits.has_plain_head:
            return super().sum_of_losses(batch)
        logits, targets = with_targets(self.features(inputs_of(batch), positions_of(batch)).detach(), batch)
        return F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten(), reduction="sum")


def _recomputable(forward: Callable[..., Any], model: LanguageModel) -> Callable[..., Any]:
    """Return a block's forward that keeps only its input where the model's blocks are computed again."""

    def call(*args: Any, **kwargs: Any) -> Any:
        if not (model.recomputes_blocks and torch.is_grad_enabled()):
            return forward(*args, **kwargs)
        from torch.utils.checkpoint import checkpoint

        draws = model.adapter is not None and model.adapter.draws
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=draws, **kwargs)

    return call


# ---------------------------------------------------------------- what its files say


def resolved_keys(folder: Path, *, is_cut: bool) -> dict[str, Any]:
    """Return the keys of `[model]` that the configuration in `folder` gives; besides, as `context_tokens`, its longest
    sequence, in tokens, if it has one, and as `keeps_documents_apart` whether it does.

    If the model `is_cut` into stages, its head is a matrix of its own. Nothing of the weights is read. Raises
    UserError, one line, if the model cannot be trained so.
    """
    data, origin = whole_config(folder), _origin(folder)
    config = library_config(data, origin)
    config.tie_word_embeddings &= not is_cut
    keys = shape_keys(config, origin)
    number = parameters_of(empty_library_model(config, on_meta=True))
    traits = model_to_cut(data, origin).traits if is_cut else traits_of(data, origin)
    keys |= {"constants_sha256": traits.constants_sha256, "keeps_documents_apart": traits.keeps_documents_apart}
    return {**keys, "num_parameters": number}


def cut_model(spec: ModelSpec) -> HuggingFaceModel:
    """Return the model of a run that is cut into stages, which is as the run says it is. Raises UserError."""
    _checked_config(spec)
    folder = _folder(spec)
    model = model_to_cut(whole_config(folder), _origin(folder))
    if spec.section.from_scratch:
        _check_beginning(spec, model.traits, model.config)
    return model


def _checked_config(spec: ModelSpec) -> tuple[Any, ModelTraits]:
    """Return the library's configuration and the traits of a run's model, which is as the run says it is.

    A stranger's run is compared with its configuration, and with what an adapter makes of it, before anything takes
    memory. Raises UserError.
    """
    folder = _folder(spec)
    data, origin = whole_config(folder), _origin(folder)
    config, counted = library_config(data, origin), library_config(data, origin)
    _check_keys(spec.section, config, origin)
    counted.tie_word_embeddings = spec.section.tied_embeddings
    without_memory = empty_library_model(counted, on_meta=True)
    number = parameters_of(without_memory)
    if number != spec.section.num_parameters:
        raise UserError(
            f"{origin}: gives {number} parameters, but the run says {spec.section.num_parameters}: it was published "
            "with another version of transformers; install that one",
            code="checkpoint-mismatch",
        )
    if spec.adapter.is_used:
        from swarmtrain.model.adapter import published_layers

        published_layers(without_memory, without_memory.get_output_embeddings(), spec.adapter)
    return config, traits_of(data, origin)


def _check_keys(section: ModelSection, config: Any, origin: str) -> None:
    for key, value in shape_keys(config, origin).items():
        if key not in ("context_tokens", "tied_embeddings") and value != getattr(section, key):
            raise UserError(
                f"{origin}: says {key} = {one_line(repr(value))}, but the run {getattr(section, key)!r}; give the "
                "files that the run was published with",
                code="checkpoint-mismatch",
            )


def _check_size(folder: Path, num_parameters: int) -> None:
    """Raise UserError if the weights have less than a byte for each parameter: the library gives memory to those that
    are missing before it says so."""
    paths = [folder / name for name in set(tensor_files(folder).values())]
    size_bytes = sum(path.stat().st_size for path in paths if path.is_file())
    if size_bytes < num_parameters:
        raise UserError(
            f"{one_line(str(folder))}: has {size_bytes} bytes of weights, but config.json describes {num_parameters} "
            "parameters; give the folder of the checkpoint whose config.json this is",
            code="checkpoint-mismatch",
        )


def _folder(spec: ModelSpec) -> Path:
    if spec.files is None:
        raise UserError(
            f"this run trains {spec.section.base}, whose files are not here; give their folder with --model-dir",
            code="model-files-needed",
        )
    return spec.files


def _origin(folder: Path) -> str:
    return one_line(str(folder / "config.json"))


# ---------------------------------------------------------------- build it


def build_huggingface_model(spec: ModelSpec, seed: int) -> HuggingFaceLanguageModel:
    """Build a run's model on the processor, fp32: with the weights of its files, or from scratch.

    From scratch the weights are the same bits on every machine, as those of the built-in model are: parameters that the
    library begins with a constant have that, others uniform numbers of the configuration's deviation. Raises UserError.
    """
    return _with_adapter(_whole_model(spec, seed), seed)


def _whole_model(spec: ModelSpec, seed: int) -> HuggingFaceLanguageModel:
    config, traits = _checked_config(spec)
    if not spec.section.from_scratch:
        _check_size(_folder(spec), spec.section.num_parameters)
        library_model = load_library_model(config, _folder(spec))
        if config.tie_word_embeddings and not spec.section.tied_embeddings:
            _untie(library_model)
        return HuggingFaceLanguageModel(spec, library_model, traits)
    config.tie_word_embeddings = spec.section.tied_embeddings
    model = HuggingFaceLanguageModel(spec, empty_library_model(config), traits)
    _check_beginning(spec, traits, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(initial_weight(name, parameter.shape, seed, config, traits))
    return model


def empty_huggingface_model(spec: ModelSpec) -> HuggingFaceLanguageModel:
    """Build a run's model on the processor, fp32, whose weights are whatever is in memory. Raises UserError."""
    config, traits = _checked_config(spec)
    config.tie_word_embeddings = spec.section.tied_embeddings
    return _with_adapter(HuggingFaceLanguageModel(spec, empty_library_model(config), traits), 0)


def _with_adapter(model: HuggingFaceLanguageModel, seed: int) -> HuggingFaceLanguageModel:
    """Add the run's adapter to a model, if it has one; `seed` is that of its initial factors."""
    if model.spec.adapter.is_used:
        from swarmtrain.model.adapter import LoraAdapter

        model.adapter = LoraAdapter.added_to(model.library_model, model.head, model.spec.adapter, seed)
    return model


def adapter_of(spec: ModelSpec) -> LoraAdapter:
    """Return the adapter that a spec describes, in a model without memory for weights. Raises UserError."""
    from swarmtrain.model.adapter import LoraAdapter

    model = empty_library_model(_checked_config(spec)[0], on_meta=True)
    return LoraAdapter.added_to(model, model.get_output_embeddings(), spec.adapter, 0)


def adapter_keys(section: ModelSection, folder: Path, adapter: AdapterSection) -> dict[str, Any]:
    """Return the keys of `[adapter]` that the model in `folder` gives. Raises UserError if it cannot be adapted so."""
    from swarmtrain.model.adapter import adapter_modules

    model = empty_library_model(_checked_config(ModelSpec(section, folder))[0], on_meta=True)
    modules, number = adapter_modules(model, model.get_output_embeddings(), adapter)
    return {"modules": list(modules), "num_parameters": number}


def _untie(library_model: Any) -> None:
    """Give the head a matrix of its own, a copy of the embedding: that of a run whose model is cut into stages."""
    head = library_model.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach().clone())
    library_model.config.tie_word_embeddings = False


def _check_beginning(spec: ModelSpec, traits: ModelTraits, config: Any) -> None:
    """Raise UserError if a run's model cannot begin from a seed with the same weights everywhere."""
    if traits.constants_sha256 != spec.section.constants_sha256:
        raise UserError(
            f"{_origin(_folder(spec))}: parameters of this {one_line(config.model_type)[:60]} begin with other "
            "constants here than for the run's publisher, who has another version of transformers; install that one",
            code="checkpoint-mismatch",
        )
    if traits.patterns:
        raise UserError(
            f"model.from_scratch: {one_line(min(traits.patterns))[:100]} of this model begins with numbers that "
            "may differ between machines; leave model.from_scratch out, or give a model of another family",
            code="model-refused",
        )

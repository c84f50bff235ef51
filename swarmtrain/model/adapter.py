"""LoRA adapter of a model of transformers (arXiv 2106.09685): peft puts it in, and its components are cut by rank.

The adapter is peft's own, of rank R, and computes what peft computes. Only its factors are trained: A (R, in) and B
(out, R) of each adapted layer are joined of the groups' parts before they are used (`torch.nn.utils.parametrize`), so
that a group is a few tensors that are trained, published and merged by themselves. A begins with uniform numbers, the
same bits on every machine, and B with zeros, so that the model begins as it was.

peft is imported when it is needed. Legend: R rank, r rank of a group.
"""

from __future__ import annotations

import importlib
import json
import logging
import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from swarmtrain.errors import UserError
from swarmtrain.extras import install_in_words
from swarmtrain.model.gpt import uniform_weight
from swarmtrain.protocol.adapter_groups import tensor_name
from swarmtrain.run_adapter import AdapterSection
from swarmtrain.words import one_line

_log = logging.getLogger(__name__)
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
_NAME = "default"
"""Name that peft gives an adapter by default."""
_ALL_LINEAR = "all-linear"


def _library() -> Any:
    """Import peft. Raises UserError without the extra `finetune`."""
    try:
        return importlib.import_module("peft")
    except ImportError as error:
        reason = one_line(str(error))[:200]
        raise UserError(
            f"an adapter needs peft: {install_in_words('finetune')} ({reason})", code="package-missing"
        ) from None


def adapter_modules(model: nn.Module, head: nn.Module, section: AdapterSection) -> tuple[tuple[str, ...], int]:
    """Return the names of the layers of `model` that the section's adapter has, and the numbers in all its factors.

    `model` is of transformers, may be without memory (on the device "meta"), and is changed. A name is the last part of
    a layer's place if all layers of that name are adapted, else the whole place: so every version of peft adapts the
    same layers. Experts whose weights are one tensor are left out, with a warning. Raises UserError if a target is no
    layer, or one that cannot be adapted.
    """
    targets, linear = section.targets or _usual_targets(model), _linear_names(model, head)
    layers = [(place, layer) for place, layer in _injected(model, head, section, targets) if not _is_stacked(layer)]
    places = [place for place, _ in layers]
    missing = [
        name
        for name in section.targets
        if name != _ALL_LINEAR and not any(f".{place}".endswith(f".{name}") for place in places)
    ]
    if missing:
        raise UserError(
            f"adapter.targets: {', '.join(missing)}: no linear layer that can be adapted has this name; name layers "
            f'of the model: {", ".join(sorted(linear - set(missing)))}; or take ["all-linear"]',
            code="adapter-targets",
        )
    by_name: dict[str, list[str]] = {}
    for place, _ in model.named_modules():
        if not place.endswith(".base_layer"):
            by_name.setdefault(place.rpartition(".")[2], []).append(place)
    names = set[str]()
    for place in places:
        last = place.rpartition(".")[2]
        names.add(last if set(by_name[last]) <= set(places) else place)
    if any("Expert" in type(each).__name__ and [*each.parameters(recurse=False)] for each in model.modules()):
        _log.warning("adapter: this model's experts are left out, as they are no linear layers: they stay as they are")
    return tuple(sorted(names)), _numbers_in(layers, section)


def published_layers(model: nn.Module, head: nn.Module, section: AdapterSection) -> list[tuple[str, Any]]:
    """Have peft put the layers of a published run's adapter into `model`, of transformers; return each with its place.

    Raises UserError unless it has as many numbers as the run says, which a stranger may have written: a volunteer is
    asked to find memory for that many. So it is called first with a model without memory (on the device "meta").
    """
    layers = _injected(model, head, section, section.modules)
    for place, layer in layers:
        if _is_stacked(layer):
            raise _not_linear(place)
    if (found := _numbers_in(layers, section)) != section.num_parameters:
        raise UserError(
            f"adapter.modules: this adapter has {found} numbers here, and {section.num_parameters} where the run was "
            f"published; update peft: {install_in_words('finetune')}",
            code="adapter-differs",
        )
    return layers


def _is_stacked(layer: Any) -> bool:
    """Return whether peft adapts a tensor here, of all experts or of their router, in place of a linear layer."""
    return hasattr(layer, "parameter_name")


def _not_linear(place: str) -> UserError:
    return UserError(
        f"adapter.targets: {one_line(place)} is no linear layer; name linear layers, such as q_proj",
        code="adapter-targets",
    )


def _linear_names(model: nn.Module, head: nn.Module) -> set[str]:
    """Return the last parts of the names of all linear layers; the head is none of them."""
    return {
        place.rpartition(".")[2]
        for place, layer in model.named_modules()
        if layer is not head and (isinstance(layer, nn.Linear) or type(layer).__name__ == "Conv1D")  # of GPT-2
    }


def _numbers_in(layers: list[tuple[str, Any]], section: AdapterSection) -> int:
    return sum(section.rank * (layer.in_features + layer.out_features) for _, layer in layers)


def _usual_targets(model: nn.Module) -> tuple[str, ...]:
    """Return the layers that peft adapts in a model of this family; all linear ones if it does not know the family."""
    table = importlib.import_module("peft.utils").TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    found = table.get(str(getattr(getattr(model, "config", None), "model_type", "")))
    return tuple(sorted(found)) if isinstance(found, list | set | tuple) else (_ALL_LINEAR,)


def _injected(
    model: nn.Module, head: nn.Module, section: AdapterSection, targets: tuple[str, ...]
) -> list[tuple[str, Any]]:
    """Have peft put its layers into `model`, and return each with its place. Raises UserError."""
    config = _config(section, targets)
    try:
        # peft draws numbers, which are replaced, and says which layers have transposed weights.
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings(action="ignore"):
            _library().inject_adapter_in_model(config, model)
    except ValueError as error:
        wanted = ", ".join(section.targets)
        raise UserError(
            f"adapter.targets: {wanted or 'the usual layers'}: {one_line(str(error))[:200]}; name layers of the model: "
            f'{", ".join(sorted(_linear_names(model, head)))}; or take ["all-linear"]',
            code="adapter-targets",
        ) from None
    kind = importlib.import_module("peft.tuners.lora").LoraLayer
    layers = [(place, module) for place, module in model.named_modules() if isinstance(module, kind)]
    for place, layer in layers:
        if _NAME not in layer.lora_A or not all(
            isinstance(of[_NAME], nn.Linear) for of in (layer.lora_A, layer.lora_B)
        ):
            raise _not_linear(place)
        if layer.get_base_layer() is head:
            raise UserError(
                f"adapter.targets: {one_line(place)} is the model's head, which is not adapted; leave it out",
                code="adapter-targets",
            )
    return layers


def _config(section: AdapterSection, targets: tuple[str, ...]) -> Any:
    """Return peft's configuration of the adapter."""
    return _library().LoraConfig(
        task_type="CAUSAL_LM",
        r=section.rank,
        lora_alpha=section.alpha,
        lora_dropout=section.dropout,
        target_modules=_ALL_LINEAR if targets == (_ALL_LINEAR,) else list(targets),
        bias="none",
    )


class _JoinedGroups(nn.Module):
    """Parametrization of a factor: the groups' parts, one after the other along the rank."""

    def __init__(self, dim: int, group_rank: int) -> None:
        super().__init__()
        self._dim, self._group_rank = dim, group_rank

    def forward(self, *parts: Tensor) -> Tensor:
        """Return the whole factor."""
        return torch.cat(parts, self._dim)

    def right_inverse(self, whole: Tensor) -> tuple[Tensor, ...]:
        """Return the parts of a factor."""
        return tuple(part.contiguous() for part in torch.split(whole, self._group_rank, self._dim))


class _TrainingDropout(nn.Module):
    """Dropout where gradients are wanted: a model that is measured has none, whatever mode it is in."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self._share = share

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` with some numbers set to zero, and the others made larger for it."""
        return F.dropout(x, self._share, training=torch.is_grad_enabled())


@dataclass(frozen=True)
class LoraAdapter:
    """Adapter in a model, whose other parameters are frozen."""

    section: AdapterSection
    layers: Mapping[str, Any]
    """peft's layers by their places in the model."""

    @classmethod
    def added_to(cls, model: nn.Module, head: nn.Module, section: AdapterSection, seed: int) -> LoraAdapter:
        """Add the adapter that a published run describes to a model of transformers, and freeze all else.

        `head` is the model's last layer. Raises UserError if the layers are not those that the run names.
        """
        adapter = cls(section, dict(published_layers(model, head, section)))
        model.requires_grad_(False)
        for layer in adapter.layers.values():
            layer.lora_dropout[_NAME] = _TrainingDropout(section.dropout) if section.dropout else nn.Identity()
            for factor, dim in ((layer.lora_A[_NAME], 0), (layer.lora_B[_NAME], 1)):
                parametrize.register_parametrization(factor, "weight", _JoinedGroups(dim, section.rank_of_group))
        for name, part in adapter.named():
            with torch.no_grad():
                part.copy_(_initial(name, part, seed))
            part.requires_grad_()
        return adapter

    @property
    def draws(self) -> bool:
        """True if training draws random numbers."""
        return self.section.dropout > 0

    def named(self) -> list[tuple[str, nn.Parameter]]:
        """Return the parts of all factors by name, in the order in which they are flattened: group by group."""
        return [
            (tensor_name(group, f"{place}.{factor}"), parts[group])
            for group in range(self.section.num_groups)
            for place, factor, parts in self._factors()
        ]

    def _factors(self) -> Iterator[tuple[str, str, list[nn.Parameter]]]:
        for place, layer in self.layers.items():
            for name in ("lora_A", "lora_B"):
                originals = getattr(layer, name)[_NAME].parametrizations.weight
                yield place, name, [getattr(originals, f"original{n}") for n in range(self.section.num_groups)]

    def whole_factors(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the factors of all groups, joined, by the names that a checkpoint of peft has.

        `weights` has the groups' parts by the names of `named`.
        """
        return {
            _name_of_peft(place, factor): torch.cat(
                [weights[tensor_name(n, f"{place}.{factor}")] for n in range(len(parts))], int(factor == "lora_B")
            )
            for place, factor, parts in self._factors()
        }

    @torch.no_grad()
    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Take the factors of a checkpoint of peft, by its names. Raises ValueError if they are not this adapter's."""
        factors = {_name_of_peft(place, factor): (factor, parts) for place, factor, parts in self._factors()}
        if factors.keys() != weights.keys():
            raise ValueError("its tensors are not those of its layers")
        for name, (factor, parts) in factors.items():
            dim = int(factor == "lora_B")
            if weights[name].shape[dim] != self.section.rank:
                raise ValueError(f"{name} has another rank than {self.section.rank}")
            for part, loaded in zip(parts, weights[name].chunk(self.section.num_groups, dim), strict=True):
                if part.shape != loaded.shape:
                    raise ValueError(f"{name} has another shape than its layer")
                part.copy_(loaded)

    def config(self, base: str, revision: str | None) -> dict[str, Any]:
        """Return what `adapter_config.json` says of an adapter of the model `base`, as peft writes it."""
        config = _config(self.section, self.section.modules)
        config.base_model_name_or_path, config.revision, config.inference_mode = base, revision, True
        config.fan_in_fan_out = any(layer.fan_in_fan_out for layer in self.layers.values())
        return cast(dict[str, Any], json.loads(json.dumps(config.to_dict(), default=_plain)))

    @torch.no_grad()
    def merged_weights(self, model: nn.Module) -> dict[str, Tensor]:
        """Add each product to its layer's own weights, in place; return all weights of `model`, which has the adapter,
        by the names that they have without it."""
        for layer in self.layers.values():
            base = layer.get_base_layer()
            base.weight.add_(layer.get_delta_weight(_NAME).to(base.weight.dtype))
        factors = {id(part) for _, part in self.named()}
        return {
            name.replace(".base_layer.", "."): parameter.detach()
            for name, parameter in model.named_parameters()
            if id(parameter) not in factors
        }


def _name_of_peft(place: str, factor: str) -> str:
    return f"base_model.model.{place}.{factor}.weight"


def _plain(value: object) -> object:
    return sorted(value) if isinstance(value, set | frozenset) else str(value)


def _initial(name: str, part: Tensor, seed: int) -> Tensor:
    """Return the initial value of a part: of B zeros, of A uniform numbers as peft draws them, by name."""
    if name.endswith(".lora_B"):
        return torch.zeros_like(part)
    return uniform_weight(name, part.shape, seed, 1.0 / math.sqrt(3 * part.shape[1]))

"""Weights of an adapter's frozen model in 4 bits (NF4, arXiv 2305.14314), by the library `bitsandbytes`.

Only linear layers are converted, and not the head: embedding, norms and the adapter stay fp32. Products are computed
in the precision that the peer computes in. `bitsandbytes` is imported when it is needed, and nobody needs it to train
beside a peer that uses it: what peers publish is the adapter, fp32.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import torch
from torch import nn

from swarmtrain.errors import UserError
from swarmtrain.model.language_model import LanguageModel
from swarmtrain.run import RunFile


def check_four_bits(run: RunFile) -> None:
    """Raise UserError if this run freezes no weights, or this machine has no `bitsandbytes`."""
    if not run.adapter.is_used:
        raise _refused("this run trains all weights, and freezes none")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise _refused("this needs the package bitsandbytes, which is not installed")


def check_card_for_four_bits(device: str) -> None:
    """Raise UserError unless `device`, as torch calls it, is a card that computes with 4 bits."""
    if not device.startswith("cuda"):
        raise _refused(f"this peer computes on {device}, and 4 bits are for a graphics card (cuda)")


def _refused(reason: str) -> UserError:
    return UserError(f"--base-bits 4: {reason}; leave --base-bits out", code="base-bits")


def convert_frozen_layers(model: LanguageModel, dtype: torch.dtype) -> None:
    """Convert the frozen linear layers of a model with an adapter, on the processor; it is moved to a card afterwards,
    which packs them. Products are computed in `dtype`.

    Raises UserError if it has none.
    """
    library = importlib.import_module("bitsandbytes.nn")
    found = [
        (parent, name, layer)
        for parent in model.modules()
        for name, layer in parent.named_children()
        if type(layer) is nn.Linear and layer is not model.head and not layer.weight.requires_grad
    ]
    for parent, name, layer in found:
        setattr(parent, name, _converted(library, layer, dtype))
    if not found:
        raise _refused("this model has no linear layer of torch that is frozen")


def _converted(library: Any, layer: nn.Linear, dtype: torch.dtype) -> nn.Module:
    new: nn.Module = library.Linear4bit(
        layer.in_features, layer.out_features, layer.bias is not None, compute_dtype=dtype, quant_type="nf4"
    )
    new.weight = library.Params4bit(layer.weight.detach(), requires_grad=False, quant_type="nf4")
    if layer.bias is not None:
        new.bias = layer.bias
    return new

"""Name the built-in model's weights as `Qwen3ForCausalLM` does, so that everything that loads such models loads it.

The built-in GPT is that model without grouped heads. There the projections of queries, keys and values are three
matrices and those of gate and up two, which here are rows of one; queries and keys are normalised with a weight, which
here is 1. Nothing is computed or copied: each tensor of Qwen3 is some rows of one of ours (tests compare the logits).

Shapes: D width, K head width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from swarmtrain.model.gpt import GPT, NORM_EPSILON, ROTARY_BASE
from swarmtrain.model.parameter_count import hidden_width
from swarmtrain.run_model import ModelSection


def qwen3_config(section: ModelSection) -> dict[str, Any]:
    """Return the configuration, with the keys that every version of transformers reads which has the model."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": section.vocabulary_size,
        "hidden_size": section.width,
        "intermediate_size": hidden_width(section),
        "num_hidden_layers": section.num_layers,
        "num_attention_heads": section.num_heads,
        "num_key_value_heads": section.num_heads,
        "head_dim": section.width // section.num_heads,
        "hidden_act": "silu",
        "max_position_embeddings": section.context_tokens,
        "rms_norm_eps": NORM_EPSILON,
        "rope_theta": ROTARY_BASE,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
        "use_cache": True,
        "torch_dtype": "float32",
    }


def as_qwen3(weights: Mapping[str, Tensor], section: ModelSection) -> dict[str, Tensor]:
    """Return views of the built-in model's `weights`, under their names in Qwen3, and the norms' weights of 1."""
    named = {rows.name: weights[rows.parameter][rows.first : rows.last] for rows in _rows(section)}
    return named | {name: torch.ones(section.width // section.num_heads) for name in _head_norms(section)}


class Qwen3Reader:
    """Fills a GPT with the tensors of its Qwen3 form, given one by one in any order."""

    def __init__(self, model: GPT) -> None:
        self._rows = {rows.name: rows for rows in _rows(model.section)}
        self._norms = set(_head_norms(model.section))
        self._parameters = dict(model.named_parameters())
        self._missing = self._rows.keys() | self._norms

    @torch.no_grad()
    def take(self, name: str, tensor: Tensor) -> None:
        """Copy the tensor called `name` to its place. Raises ValueError if the model cannot hold it."""
        if name in self._norms:
            if not bool((tensor == 1).all()):
                raise ValueError(f"{name} is not 1, and the built-in model has no such weight")
        elif (rows := self._rows.get(name)) is not None:
            place = self._parameters[rows.parameter][rows.first : rows.last]
            if place.shape != tensor.shape:
                raise ValueError(f"{name} has the shape {list(tensor.shape)}, not {list(place.shape)}")
            place.copy_(tensor)
        else:
            raise ValueError(f"{name} is no tensor of this model")
        self._missing.discard(name)

    def finish(self) -> None:
        """Raise ValueError if a tensor has not come."""
        if self._missing:
            raise ValueError(f"{min(self._missing)} is missing")


@dataclass(frozen=True)
class _Rows:
    """Tensor of Qwen3, and which rows of which of our parameters it is."""

    name: str
    parameter: str
    first: int
    last: int
    """Exclusive."""


def _rows(section: ModelSection) -> Iterator[_Rows]:
    D, hidden = section.width, hidden_width(section)
    yield _Rows("model.embed_tokens.weight", "embed.weight", 0, section.vocabulary_size)
    for number in range(section.num_layers):
        ours, theirs = f"blocks.{number}", f"model.layers.{number}"
        yield _Rows(f"{theirs}.input_layernorm.weight", f"{ours}.attention_norm.weight", 0, D)
        for place, letter in enumerate("qkv"):
            name = f"{theirs}.self_attn.{letter}_proj.weight"
            yield _Rows(name, f"{ours}.attention.qkv.weight", place * D, (place + 1) * D)
        yield _Rows(f"{theirs}.self_attn.o_proj.weight", f"{ours}.attention.out.weight", 0, D)
        yield _Rows(f"{theirs}.post_attention_layernorm.weight", f"{ours}.feed_forward_norm.weight", 0, D)
        for place, part in enumerate(("gate", "up")):
            parameter = f"{ours}.feed_forward.gate_up.weight"
            yield _Rows(f"{theirs}.mlp.{part}_proj.weight", parameter, place * hidden, (place + 1) * hidden)
        yield _Rows(f"{theirs}.mlp.down_proj.weight", f"{ours}.feed_forward.down.weight", 0, D)
    yield _Rows("model.norm.weight", "final_norm.weight", 0, D)
    yield _Rows("lm_head.weight", "head.weight", 0, section.vocabulary_size)


def _head_norms(section: ModelSection) -> Iterator[str]:
    """Yield the names of the weights (K,) by which queries and keys are scaled in Qwen3."""
    for number in range(section.num_layers):
        for letter in "qk":
            yield f"model.layers.{number}.self_attn.{letter}_norm.weight"

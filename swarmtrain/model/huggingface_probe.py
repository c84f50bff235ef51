"""Look whether a model of transformers can be trained here: by a small one of two layers, made from its configuration.

Llama, Qwen2, Qwen3 and GPT-2 are tested by this project. Of any other family only what is seen here is known: that the
loss is finite, that its gradient reaches every parameter, that no token sees a later one, that the same tokens give the
same numbers. And some traits: whether the logits are those of its last layer alone, whether it keeps documents apart
by their positions, and which parameters begin with a constant.

Shapes: B batch, T time (tokens), V vocabulary.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swarmtrain.errors import UserError
from swarmtrain.model.huggingface_library import empty_library_model, library_config, random_library_model
from swarmtrain.words import count_in_words, one_line

TESTED = ("llama", "qwen2", "qwen3", "gpt2")
"""Families, by `model_type`, that this project tests."""

_log = logging.getLogger(__name__)
_LAYERS = 2
_VOCABULARY = 4096
"""Most tokens of the small model: a table of more takes memory and shows nothing."""
_SEQUENCES, _TOKENS = 2, 16
_MOST_NUMBERS = 2**31
"""Most numbers of the small model: 8 GiB."""
_LARGE_LOGITS = 200.0
_TOLERANCE = 1e-4
"""Difference of logits, relative to the largest one, that rounding may make."""


@dataclass(frozen=True)
class ModelTraits:
    """What must be known of a family of models to train one."""

    has_plain_head: bool = True
    """True if the logits are those of the last layer, without a bias and without anything after it."""
    keeps_documents_apart: bool = True
    """True if tokens whose positions begin again do not see those before."""
    constants: Mapping[str, float] | None = None
    """Map parameters that begin with a constant to it, by `place_of` their name; None if it follows from the name."""
    patterns: frozenset[str] = frozenset()
    """Places of parameters that begin with numbers that are neither random nor all the same."""

    @property
    def constants_sha256(self) -> str:
        """SHA-256 of the constants; empty if they follow from the names. Versions of the library differ in them."""
        if self.constants is None:
            return ""
        return hashlib.sha256(json.dumps(self.constants, sort_keys=True).encode()).hexdigest()


def place_of(name: str) -> str:
    """Return a parameter's name without the numbers of its block: the same in all blocks."""
    return re.sub(r"\.\d+(?=\.)", ".N", name)


def traits_of(data: Mapping[str, Any], origin: str) -> ModelTraits:
    """Return the traits of a model by its configuration (`huggingface_config.whole_config`).

    A family that is not tested is tried. Raises UserError, which names `origin` and the reason, if the model cannot be
    trained.
    """
    is_plain = data.get("is_causal") in (None, True) and not data.get("add_cross_attention")
    if data["model_type"] in TESTED and is_plain:
        _check_number(_small(library_config(data, origin)), origin, is_made=False)
        return ModelTraits()
    return _tried(json.dumps(data, sort_keys=True), origin)


def small_model(data: Mapping[str, Any], origin: str, seed: int = 0) -> tuple[Any, Tensor]:
    """Return the library's model of two layers, and tokens (B, T + 1) for it. Raises UserError if it is too large."""
    config = _small(library_config(data, origin))
    _check_number(config, origin)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(config.get_text_config().vocab_size, (_SEQUENCES, _TOKENS + 1), generator=generator)
    return random_library_model(config, seed), tokens


@functools.lru_cache(8)
def _tried(data: str, origin: str) -> ModelTraits:
    (first, tokens), (second, _) = (small_model(json.loads(data), origin, seed) for seed in (0, 1))
    if problem := problem_of(lambda: _problem(first, tokens)):
        raise _refused(origin, first.config, problem)
    constants, patterns = _beginnings(first, second)
    return ModelTraits(
        keeps_documents_apart=_keeps_apart(first, tokens[:, 1:]),
        has_plain_head=_has_plain_head(second, tokens[:, 1:]),
        constants=constants,
        patterns=patterns,
    )


def _check_number(config: Any, origin: str, *, is_made: bool = True) -> None:
    """Raise UserError if the small model would take too much memory, which it does not take yet.

    If it is not made, only tables count, which each stage has.
    """
    empty = empty_library_model(copy.deepcopy(config), on_meta=True)
    made = empty.parameters() if is_made else ()
    number = sum(tensor.numel() for tensor in (*made, *empty.buffers()))
    if number > _MOST_NUMBERS:
        raise _refused(origin, config, f"two layers of it, {count_in_words(number)} numbers, are too many to try it")


def _refused(origin: str, config: Any, problem: str) -> UserError:
    return UserError(
        f"{origin}: model_type: {one_line(config.model_type)[:60]} cannot be trained: {problem}; give a model of "
        f"another family, such as {', '.join(TESTED)}",
        code="model-refused",
    )


def _small(config: Any) -> Any:
    """Change a configuration to two layers, the first and the first that is unlike it, and to few tokens."""
    text = config.get_text_config()
    num_layers = text.num_hidden_layers
    kinds = getattr(text, "layer_types", None)
    kinds = kinds if isinstance(kinds, list) and len(kinds) == num_layers else [None] * num_layers
    other = next((n for n, kind in enumerate(kinds) if kind != kinds[0]), min(1, num_layers - 1))
    for name, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == num_layers:
            setattr(text, name, [value[0], value[other]])
    text.num_hidden_layers = _LAYERS
    if isinstance(getattr(text, "sliding_window", None), int):
        text.sliding_window = _TOKENS // 4  # so that these tokens show which layer has it
    if text.vocab_size > _VOCABULARY:
        text.vocab_size = _VOCABULARY
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            setattr(text, name, None)
    return config


def problem_of(look: Callable[[], str]) -> str:
    """Return what `look` finds, or in a line why it fails."""
    try:
        return look()
    except Exception as error:
        # Whatever the library raises: a model that cannot be called cannot be trained.
        _log.info("a small model of this family fails", exc_info=error)
        return one_line((str(error).strip().splitlines() or [type(error).__name__])[0])[:200]


def _problem(model: Any, tokens: Tensor) -> str:
    """Return why a model cannot be trained on tokens (B, T + 1); empty if it can."""
    inputs = tokens[:, :-1]
    logits = logits_of(model, inputs)
    loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    if not torch.isfinite(loss):
        return "its loss is not finite"
    loss.backward()  # type: ignore[no-untyped-call]
    unreached = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    model.zero_grad(set_to_none=True)
    if unreached:
        return f"no gradient reaches {one_line(unreached[0])[:100]}"
    with torch.no_grad():
        if not is_near(logits_of(model, inputs), logits):
            return "the same tokens do not give the same numbers"
        changed = inputs.clone()
        changed[:, -1] = (changed[:, -1] + 1) % logits.shape[-1]
        if not is_near(logits_of(model, changed)[:, :-1], logits[:, :-1]):
            return "a token sees those that come after it"
    return ""


def logits_of(model: Any, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
    """Return the logits (B, T, V) of the library's model."""
    out: Tensor = model(input_ids=tokens, position_ids=positions, use_cache=False).logits
    return out.float()


def is_near(one: Tensor, other: Tensor) -> bool:
    """Return whether numbers differ by no more than rounding makes."""
    return bool((one - other).abs().max() <= _TOLERANCE * other.abs().max().clamp(min=1e-6))


@torch.no_grad()
def _has_plain_head(model: Any, tokens: Tensor) -> bool:
    """Return whether the logits are a product of the features by the weights of the last layer. Changes those weights:
    of small logits a cap does nothing."""
    head = model.get_output_embeddings()
    bias: Tensor | None = getattr(head, "bias", None)
    if not isinstance(head, nn.Linear) or bias is not None or model.base_model is model:
        return False
    head.weight *= _LARGE_LOGITS / logits_of(model, tokens).abs().max()
    features = model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
    return features.shape[-1] == head.in_features and is_near(head(features).float(), logits_of(model, tokens))


@torch.no_grad()
def _keeps_apart(model: Any, tokens: Tensor) -> bool:
    """Return whether the second half of tokens (B, T), with positions that begin again, is as if it stood alone."""
    half = tokens.shape[1] // 2
    positions = torch.arange(half).repeat(2).expand(len(tokens), -1)
    try:
        together = logits_of(model, tokens[:, : 2 * half], positions)[:, half:]
        return is_near(together, logits_of(model, tokens[:, half : 2 * half]))
    except (TypeError, ValueError, RuntimeError) as error:  # it takes no positions
        _log.info("this family takes no positions: %s", error)
        return False


def _beginnings(first: nn.Module, second: nn.Module) -> tuple[dict[str, float], frozenset[str]]:
    """Return the constants with which parameters begin, and which begin with a pattern, given two models that the
    library made with different seeds."""
    constants: dict[str, float] = {}
    patterns: set[str] = set()
    for (name, one), (_, other) in zip(first.named_parameters(), second.named_parameters(), strict=True):
        if not torch.equal(one, other):
            continue
        if torch.equal(one.detach().min(), one.detach().max()):
            constants[place_of(name)] = float(one.detach().flatten()[0])
        else:
            patterns.add(place_of(name))
    return constants, frozenset(patterns)

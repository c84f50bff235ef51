"""Attention stays inside each document of a sequence, in the built-in model and in those of transformers.

transformers keeps documents apart by positions alone, and only without a mask of its own; before 4.55 GPT-2 did not,
before 4.53.1 none did (decision 79).
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from swarmtrain.algorithm.batch import compacted, join_rows, num_rows, with_rows
from swarmtrain.model.gpt import build_model
from swarmtrain.run_model import ModelSection

POSITIONS = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 0, 1], [*range(12)]])
BEGINS = (0, 5, 9, 10, 12)
TOKENS = torch.randint(1, 256, (2, 12), generator=torch.Generator().manual_seed(0))
SECTION = ModelSection(context_tokens=16, num_layers=2, width=32, num_heads=2)
_SMALL = {
    "vocab_size": 256,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 48,
    "head_dim": 16,
    "max_position_embeddings": 16,
}
_GPT2 = {"vocab_size": 256, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 16, "attn_pdrop": 0.0}
FAMILIES = {"llama": ("Llama", _SMALL), "qwen2": ("Qwen2", _SMALL), "qwen3": ("Qwen3", _SMALL), "gpt2": ("GPT2", _GPT2)}

Features = Callable[[Tensor, Tensor | None], Tensor]


def features_of(family: str) -> tuple[nn.Module, Features]:
    """Return a model with random weights, and the function of its head's input by tokens and positions."""
    if family == "built-in":
        ours = build_model(SECTION, 0)
        return ours, ours.features
    pytest.importorskip("transformers")
    name, keys = FAMILIES[family]
    configurations = importlib.import_module(f"transformers.models.{family}.configuration_{family}")
    code = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    config = getattr(configurations, f"{name}Config")(**keys, attn_implementation="sdpa", use_cache=False)
    torch.manual_seed(0)
    theirs: Any = getattr(code, f"{name}Model")(config).eval()
    return theirs, lambda tokens, positions: theirs(input_ids=tokens, position_ids=positions, use_cache=False)[0]


@pytest.mark.parametrize("family", ["built-in", *FAMILIES])
def test_what_another_document_says_changes_nothing(family: str) -> None:
    model, features = features_of(family)
    found = features(TOKENS, POSITIONS)
    for begin, end in itertools.pairwise(BEGINS):
        alone = features(TOKENS[:1, begin:end], None)
        assert torch.allclose(found[0, begin:end], alone[0], atol=1e-5), "it is computed as if it were alone"
        other = 255 - TOKENS
        other[0, begin:end] = TOKENS[0, begin:end]
        assert torch.allclose(features(other, POSITIONS)[0, begin:end], found[0, begin:end], atol=1e-5)
    assert torch.allclose(found[1], features(TOKENS, None)[1], atol=1e-5), "one document is a sequence as ever"
    assert not torch.allclose(found[0, 9:], features(TOKENS, None)[0, 9:], atol=1e-2), "else the others are seen"
    # Not the plain sum, which is the same for whatever comes out of a layer norm.
    (found[0, 5:9] * torch.randn(found[0, 5:9].shape, generator=torch.Generator().manual_seed(2))).sum().backward()
    embedding = next(model.parameters())
    assert embedding.grad is not None and embedding.shape[0] == 256
    taught = set(embedding.grad.abs().sum(1).nonzero().flatten().tolist())
    assert taught == set(TOKENS[0, 5:9].tolist()), "and the gradient stays inside"


def test_a_sequence_of_one_document_needs_no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[Any] = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def noted(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, *, is_causal: bool) -> Tensor:
        shapes.append((None if mask is None else tuple(mask.shape), is_causal))
        return attend(query, key, value, mask, is_causal=is_causal)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", noted)
    model, batch = build_model(SECTION, 0), join_rows(TOKENS, POSITIONS > 0, POSITIONS)
    model.loss(compacted(batch[1:]))
    model.loss(compacted(batch))
    assert shapes == 2 * [(None, True)] + 2 * [((2, 1, 11, 11), False)]


@pytest.mark.slow
def test_a_compiled_model_keeps_documents_apart_by_one_program() -> None:
    from swarmtrain.peer.devices.compiled_loss import _function

    model = build_model(SECTION, 0)
    with pytest.MonkeyPatch.context() as patch:
        programs: list[int] = []

        def backend(graph: Any, inputs: Any) -> Any:
            programs.append(len(inputs))
            return graph.forward

        compile = torch.compile
        patch.setattr(torch, "compile", lambda function, dynamic: compile(function, dynamic=dynamic, backend=backend))
        loss_of = _function(model, 3)
        for batch in (join_rows(TOKENS, POSITIONS > 0, POSITIONS), join_rows(TOKENS, POSITIONS > 7), join_rows(TOKENS)):
            assert torch.allclose(loss_of(batch), model.loss(batch), atol=1e-6)
            assert num_rows(with_rows(batch, 3)) == 3
    assert len(programs) == 1

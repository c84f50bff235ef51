"""Built-in GPT: causality, initial weights pinned to the bit, counting, evaluating, sampling, learning."""

from __future__ import annotations

import hashlib
import math
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from swarmtrain.algorithm.batch import join_rows
from swarmtrain.model.evaluation import evaluate
from swarmtrain.model.gpt import GPT, build_model
from swarmtrain.model.key_value_cache import KeyValueCache
from swarmtrain.model.parameter_count import num_parameters
from swarmtrain.model.sampling import generate
from swarmtrain.run_model import ModelSection

PINNED = "7964e91b4bce18c4aff1affe2691b7f4702507d94a778aaa3d85bb7e9eaef487"
GOLDEN = [5.7616, 3.6945, 1.2375, 0.1737]
TINY = ModelSection(feed_forward_ratio=4.0, context_tokens=16, num_layers=2, width=16, num_heads=2)


def _trained(seed: int = 0, num_steps: int = 30) -> GPT:
    """Train a tiny model."""
    model = build_model(TINY, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(num_steps):
        model.loss(_batch(step)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def _batch(seed: int) -> Tensor:
    """(4, 17): sequences that count upwards by one."""
    starts = torch.randint(0, 50, (4, 1), generator=torch.Generator().manual_seed(seed))
    return (starts + torch.arange(17)) % 50


def _digest(model: GPT) -> str:
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(name.encode() + parameter.detach().numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize(
    "section",
    [
        TINY,
        ModelSection(),
        ModelSection(width=48, num_heads=3, num_layers=1, feed_forward_ratio=2.7, tokenizer="bpe", vocabulary_size=300),
        ModelSection(width=8, num_heads=1, feed_forward_ratio=0.2),
    ],
)
def test_num_parameters(section: ModelSection) -> None:
    assert num_parameters(section) == sum(p.numel() for p in GPT(section).parameters())


def test_shapes_and_first_loss() -> None:
    model = build_model(TINY, 0)
    assert model(_batch(0)[:, :-1]).shape == (4, 16, 256)
    assert model.loss(_batch(0)).item() == pytest.approx(math.log(256) + 0.5, abs=0.3)  # logits of variance 1


def test_no_token_sees_a_later_one() -> None:
    model, tokens = _trained(), _batch(0)[:, :-1]
    changed = tokens.clone()
    changed[:, 9] = 7
    before, after = model(tokens), model(changed)
    assert torch.allclose(before[:, :9], after[:, :9], atol=1e-5)
    assert not torch.allclose(before[:, 9:], after[:, 9:], atol=1e-2)


DOCUMENTS = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2, 3, 4, 5, 6, 7, 8], [*range(16), 0]])
"""Positions of a batch (2, 17) whose first sequence has three documents."""


def test_no_token_sees_another_document_of_its_sequence() -> None:
    model, tokens = _trained(), _batch(0)[:2, :-1]
    found = model(tokens, DOCUMENTS[:, :-1])
    for begin, end in ((0, 5), (5, 8), (8, 16)):
        assert torch.allclose(found[0, begin:end], model(tokens[:1, begin:end])[0], atol=1e-5), "as it is alone"
        other = tokens.clone()
        other[0, :begin], other[0, end:] = 49 - tokens[0, :begin], 49 - tokens[0, end:]
        assert torch.equal(model(other, DOCUMENTS[:, :-1])[0, begin:end], found[0, begin:end])
    assert torch.allclose(found[1], model(tokens)[1], atol=1e-5), "a sequence of one document is as ever"
    assert not torch.allclose(found[0, 8:], model(tokens)[0, 8:], atol=1e-2), "which else sees those before it"


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_documents_are_trained_alike_with_blocks_computed_again(dtype: torch.dtype | None) -> None:
    batch, gradients = join_rows(_batch(0)[:2], DOCUMENTS > 0, DOCUMENTS), list[Tensor]()
    for recomputes in (False, True):
        model = build_model(TINY, 0)
        model.recomputes_blocks = recomputes
        with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
            loss = model.loss(batch)
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert torch.equal(*gradients) and bool(gradients[0].isfinite().all())


def test_positions_are_relative() -> None:
    """Attention scores depend on distances alone: all positions moved by three give the same result."""
    torch.manual_seed(0)
    attention, rotary = (
        build_model(TINY, 0).blocks[0].attention,
        GPT(ModelSection(context_tokens=32, width=16, num_heads=2)).rotary,
    )
    x = torch.randn(1, 10, 16)
    assert torch.allclose(attention(x, rotary[:, :10]), attention(x, rotary[:, 3:13]), atol=1e-5)
    assert not torch.allclose(attention(x, rotary[:, :10]), attention(x, rotary[:, 10:20] * 0 + rotary[:, :1]))


def test_attention_matches_a_plain_one() -> None:
    """Against sums written out position by position, in complex numbers for the rotation."""
    torch.manual_seed(0)
    attention, x = build_model(TINY, 0).blocks[0].attention, torch.randn(1, 5, 16)
    q, k, v = (t.view(5, 2, 8) for t in (x[0] @ attention.qkv.weight.T).chunk(3, dim=-1))

    def turned(vector: Tensor, position: int) -> Tensor:
        vector = vector / (vector.square().mean() + 1e-6).sqrt()
        frequencies = 10_000.0 ** (-torch.arange(0, 8, 2) / 8)
        angles = torch.polar(torch.ones(4), position * frequencies)
        return torch.complex(vector[:4].contiguous(), vector[4:].contiguous()) * angles

    rows = []
    for t in range(5):
        heads = []
        for h in range(2):
            scores = torch.stack([(turned(q[t, h], t) * turned(k[s, h], s).conj()).real.sum() for s in range(t + 1)])
            heads.append(torch.softmax(scores / math.sqrt(8), 0) @ v[: t + 1, h])
        rows.append(torch.cat(heads))
    expected = torch.stack(rows) @ attention.out.weight.T
    assert torch.allclose(attention(x, GPT(TINY).rotary[:, :5])[0], expected, atol=1e-5)


def test_cut_in_two_computes_the_same() -> None:
    """What a pipeline does: embed and some blocks here, the other blocks and the head there."""
    model, tokens = _trained(), _batch(0)[:, :-1]
    boundary = model.blocks[0](model.embed(tokens), model.rotary)
    rest = model.blocks[1](boundary, model.rotary)
    assert torch.equal(model.head(model.final_norm(rest)), model(tokens))


def test_initial_weights_are_pinned() -> None:
    """Peers of one run start from these bits; whoever changes them makes another model of every seed."""
    assert _digest(build_model(TINY, 0)) == PINNED
    assert _digest(build_model(TINY, 1)) != PINNED


_DIGEST = """
import sys, torch
torch.manual_seed(5), torch.rand(3), torch.set_num_threads(2)
from tests.model.test_gpt import _digest, TINY, build_model
print(_digest(build_model(TINY, 0)), "torch._dynamo" in sys.modules, "sympy" in sys.modules)
"""


@pytest.mark.slow
def test_initial_weights_do_not_depend_on_the_processor() -> None:
    """Nor does building them import torch's compiler, or sympy: a second of processor time for every peer."""
    plain = {**os.environ, "ATEN_CPU_CAPABILITY": "default"}
    there = subprocess.run([sys.executable, "-c", _DIGEST], env=plain, capture_output=True, text=True, check=True)
    assert there.stdout.split() == [PINNED, "False", "False"]


def test_initial_weights_do_not_touch_the_global_generator() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    build_model(TINY, 0)
    assert torch.equal(torch.get_rng_state(), before)


def test_deeper_models_share_their_first_blocks() -> None:
    """A parameter's bits depend on its name and shape: how many blocks there are, or where one is cut, is no matter."""
    deeper = build_model(TINY.model_copy(update={"num_layers": 3}), 0).state_dict()
    assert all(torch.equal(tensor, deeper[name]) for name, tensor in build_model(TINY, 0).state_dict().items())


def test_initial_weights_have_their_scale() -> None:
    model = build_model(ModelSection(feed_forward_ratio=4.0), 0)
    assert model.embed.weight.std().item() == pytest.approx(1.0, rel=0.02)
    assert model.blocks[3].attention.qkv.weight.std().item() == pytest.approx(1 / math.sqrt(128), rel=0.02)
    assert abs(model.embed.weight.mean().item()) < 0.02
    first, second = (model.blocks[i].attention.qkv.weight for i in (0, 1))
    assert not torch.equal(first, second)


def test_training_is_deterministic() -> None:
    assert _digest(_trained()) == _digest(_trained())


def test_golden_trajectory() -> None:
    """A refactoring must leave these losses as they are (to what processors differ by)."""
    losses = [_trained(num_steps=num_steps).loss(_batch(1000)).item() for num_steps in (0, 5, 20, 40)]
    assert losses == pytest.approx(GOLDEN, rel=1e-3)


def test_it_learns() -> None:
    assert _trained(num_steps=60).loss(_batch(1000)).item() < 1.0


def test_evaluate_matches_a_plain_sum() -> None:
    model, batches = _trained(), [_batch(0), _batch(1)[:3, :9]]
    expected = 0.0
    for batch in batches:
        chances = F.log_softmax(model(batch[:, :-1]), dim=-1)
        for row, target in zip(chances.flatten(0, 1), batch[:, 1:].flatten(), strict=True):
            expected -= row[target].item()
    sum_nats, num_targets = evaluate(model, batches)
    assert num_targets == 4 * 16 + 3 * 8
    assert sum_nats == pytest.approx(expected, rel=1e-4)
    assert evaluate(model, []) == (0.0, 0)


def test_evaluate_leaves_the_model_trainable() -> None:
    model = _trained()
    evaluate(model, [_batch(0)])
    model.loss(_batch(0)).backward()
    assert model.head.weight.grad is not None


def test_generate_continues_what_was_learnt() -> None:
    model = _trained(num_steps=100)
    assert generate(model, [3, 4, 5, 6], 8, 0.0, seed=0) == [7, 8, 9, 10, 11, 12, 13, 14]


@pytest.mark.parametrize("prompt", [[3], [3, 4, 5], list(range(16)), list(range(40))])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_generate_with_a_cache_writes_what_it_writes_without(prompt: list[int], temperature: float) -> None:
    """Within the context of 16 tokens, and when it moves."""
    model, generator = build_model(TINY, 0), torch.Generator().manual_seed(5)
    tokens = list(prompt)
    for _ in range(30):
        with torch.no_grad():
            logits = model(torch.tensor([tokens[-16:]]))[0, -1]
        chances = torch.softmax(logits / (temperature or 1e-9), dim=-1)
        tokens.append(int(torch.multinomial(chances, 1, generator=generator)) if temperature else int(logits.argmax()))
    assert generate(model, prompt, 30, temperature, seed=5) == tokens[len(prompt) :]


def test_a_cache_computes_each_token_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, computed = build_model(TINY, 0), []
    model.embed.register_forward_pre_hook(lambda module, inputs: computed.append(inputs[0].shape[1]))
    generate(model, [3, 4, 5], 15, 0.0, seed=0)
    assert computed == [3] + [1] * 13 + [16], "the last one no longer fits the context"
    with pytest.raises(ValueError, match="one by one"):
        cache = KeyValueCache()
        for number in (2, 2):
            model.next_logits(torch.zeros((1, number), dtype=torch.int64), cache)


def test_generate_is_deterministic_for_a_seed() -> None:
    model = _trained(num_steps=5)
    texts = [generate(model, [3], 40, 1.0, seed=seed) for seed in (0, 0, 1)]  # past the context of 16
    assert texts[0] == texts[1] != texts[2]
    assert all(len(text) == 40 and all(0 <= t < 256 for t in text) for text in texts)


@pytest.mark.parametrize(
    ("prompt", "temperature"), [([], 1.0), ([256], 1.0), ([-1], 1.0), ([1], -0.5), ([1], math.nan)]
)
def test_generate_refuses(prompt: list[int], temperature: float) -> None:
    with pytest.raises(ValueError, match=r"prompt|temperature"):
        generate(build_model(TINY, 0), prompt, 1, temperature, seed=0)


def test_context_is_a_limit() -> None:
    with pytest.raises(ValueError, match="17 tokens"):
        build_model(TINY, 0)(torch.zeros(1, 17, dtype=torch.long))

"""LoRA adapters in models of transformers: what peft computes, cut into groups, beside a base that stays."""

from __future__ import annotations

import importlib.util
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from codes import raises_code
from safetensors.torch import load_file, save_file
from small_models import CONFIGS, MIXTURES, run_of, saved
from torch import Tensor

from swarmtrain.algorithm.outer import flatten, unflatten_into
from swarmtrain.data.batches import Batches
from swarmtrain.errors import RunFileError, UserError
from swarmtrain.model.base import changed_keys, published_base, resolved_run
from swarmtrain.model.export import adapted_model, copy_exported, export_merged, export_model, load_exported
from swarmtrain.model.four_bits import check_card_for_four_bits, check_four_bits, convert_frozen_layers
from swarmtrain.model.language_model import LanguageModel
from swarmtrain.model.parameter_count import frozen_bytes
from swarmtrain.model.provenance import tokens_of_export
from swarmtrain.model.run_model import build_run_model, empty_model, spec_from_json, spec_of, spec_to_json
from swarmtrain.peer.training.loop import ModelLoop
from swarmtrain.run import RunFile

LORA = 'method = "lora"\nrank = 8\nalpha = 12.0\n'
TOKENS = torch.randint(0, 256, (3, 21), generator=torch.Generator().manual_seed(3))


def resolved(family: str, folder: Path, keys: str = "", **tables: str) -> RunFile:
    """Return the resolved run of an adapter on a small model of `family`, whose files are in `folder`."""
    saved(family, folder)
    return resolved_run(run_of(str(folder), adapter=LORA + keys, **tables), folder)


def drawn(model: LanguageModel) -> None:
    """Give all factors random numbers, as if they were trained."""
    tensors = model.trained_tensors()
    unflatten_into(
        0.2 * torch.randn(sum(map(torch.numel, tensors)), generator=torch.Generator().manual_seed(1)), tensors
    )


def loss_of(model: LanguageModel) -> Tensor:
    return model.loss(TOKENS)


@pytest.mark.parametrize("family", CONFIGS)
def test_it_computes_what_peft_does_with_one_adapter_of_the_whole_rank(family: str, tmp_path: Path) -> None:
    peft: Any = pytest.importorskip("peft")
    base = tmp_path / "base"
    run = resolved(family, base, 'targets = ["all-linear"]' if family in ("gpt2", "gemma2") else "")
    model, plain = build_run_model(run, base), saved(family, base)
    with torch.no_grad():
        assert torch.equal(model(TOKENS), plain(TOKENS).logits), "as its base at first"
        drawn(model)
        export_model(tmp_path / "adapter", dict(model.trained_parameters()), model.spec, 7, {"README.md": b"card"})
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.simplefilter("ignore", FutureWarning)  # of transformers, about peft
            theirs = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter")
        expected, found = theirs(TOKENS).logits, model(TOKENS)
        assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)
    exported = load_exported(tmp_path / "adapter", base)
    assert export_merged(tmp_path / "adapter", tmp_path / "merged", base, lambda card: card + "!") == 7
    whole = load_exported(tmp_path / "merged")
    assert whole.model.adapter is None and (tmp_path / "merged" / "README.md").read_text() == "card!"
    with torch.no_grad():
        assert exported.run_tokens == 7 and torch.equal(exported.model(TOKENS), found)
        assert torch.allclose(whole.model(TOKENS), expected, rtol=1e-4, atol=1e-4)
        assert torch.allclose(whole.model(TOKENS), theirs.merge_and_unload()(TOKENS).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of transformers, about peft
@pytest.mark.parametrize(
    "family", [pytest.param(each, marks=[pytest.mark.long] * (each not in ("olmoe", "gpt_oss"))) for each in MIXTURES]
)
def test_of_a_mixture_of_experts_the_linear_layers_are_adapted(
    family: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    peft: Any = pytest.importorskip("peft")
    base = tmp_path / "base"
    run = resolved(family, base, 'targets = ["all-linear"]' if family == "mixtral" else "")
    assert [record.message for record in caplog.records if "experts are left out" in record.message]
    assert "o_proj" in run.adapter.modules and not {"gate", "experts", "down_proj"} & set(run.adapter.modules)
    model = build_run_model(run, base)
    batches = Batches(TOKENS.flatten().numpy(), context_tokens=24, batch_sequences=4, run_sha256="ab", peer_id="me")
    ModelLoop(run, model, batches).take_step(0.1)
    export_model(tmp_path / "adapter", dict(model.trained_parameters()), model.spec, 7, {})
    plain = saved(family, base)
    with torch.no_grad():
        before = plain(TOKENS).logits
        found = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter")(TOKENS).logits
        assert torch.allclose(model(TOKENS), found, rtol=1e-5, atol=1e-5) and not torch.equal(found, before)
    adapter = run.adapter.model_copy(update={"modules": (*run.adapter.modules, "gate_proj", "up_proj", "down_proj")})
    lying = run.model_copy(update={"adapter": adapter})
    if family not in ("gpt_oss", "granitemoe", "mixtral"):  # of which peft adapts no experts by these names
        with raises_code("adapter-targets", UserError, "no linear layer"):
            empty_model(spec_of(lying, base))


def test_an_exported_adapter_needs_the_model_that_it_belongs_to(tmp_path: Path) -> None:
    run = resolved("llama", base := tmp_path / "base", "group_rank = 8")
    model, adapter = build_run_model(run, base), tmp_path / "adapter"
    with raises_code("model-files-needed", UserError, "--model-dir"):
        export_model(adapter, dict(model.trained_parameters()), spec_of(run, None), 7, {})
    export_model(adapter, dict(model.trained_parameters()), model.spec, 7, {})
    assert adapted_model(adapter) == run.model and adapted_model(base) is None
    assert not (adapter / "config.json").exists() and tokens_of_export(adapter) == 7
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["target_modules"]) == ("LORA", 8, ["q_proj", "v_proj"])
    with raises_code("model-files-needed", UserError, "--model-dir"):
        load_exported(adapter)
    saved("llama", tmp_path / "other", hidden_size=64)
    with raises_code("checkpoint-mismatch", UserError):
        load_exported(adapter, tmp_path / "other")
    assert copy_exported(adapter, tmp_path / "copy") == 7
    save_file(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.safetensors", {"a": "b"})
    with raises_code("not-a-model", UserError, "was altered"):
        load_exported(adapter, base)


def test_its_parts_are_named_by_groups_and_begin_with_the_same_bits_everywhere(tmp_path: Path) -> None:
    run = resolved("llama", tmp_path)
    model, again = (build_run_model(run, tmp_path) for _ in "12")
    names = [name for name, _ in model.trained_parameters()]
    assert len(names) == 4 * 3 * 2 * 2 and names[0] == "group0/model.layers.0.self_attn.q_proj.lora_A"
    assert names == sorted(names, key=lambda name: name.partition("/")[0]), "group by group"
    assert run.adapter.modules == ("q_proj", "v_proj") and run.merge.fragments == run.adapter.num_groups == 4
    assert sum(tensor.numel() for tensor in model.trained_tensors()) == run.adapter.num_parameters
    assert torch.equal(flatten(model.trained_tensors()), flatten(again.trained_tensors()))
    for name, tensor in model.trained_parameters():
        assert tensor.any() == name.endswith("lora_A") and tensor.requires_grad
    other = build_run_model(run, tmp_path, seed=7)
    assert not torch.equal(flatten(model.trained_tensors()), flatten(other.trained_tensors()))
    parts = dict(model.trained_parameters())
    assert not torch.equal(parts[names[0]], parts[names[0].replace("group0", "group1")])
    shapes = {name: tensor.shape for name, tensor in model.trained_parameters()}
    spec = spec_from_json(spec_to_json(spec_of(run, tmp_path)))
    assert {name: tensor.shape for name, tensor in empty_model(spec).trained_parameters()} == shapes


def test_a_loop_trains_the_wanted_groups_and_leaves_the_base(tmp_path: Path) -> None:
    run = resolved("qwen3", tmp_path, inner="batch_sequences = 4\nlearning_rate = 0.01")
    model = build_run_model(run, tmp_path)
    batches = Batches(TOKENS.flatten().numpy(), context_tokens=24, batch_sequences=4, run_sha256="ab", peer_id="me")
    loop = ModelLoop(run, model, batches)
    frozen = {name: tensor.clone() for name, tensor in model.named_parameters() if "parametrizations" not in name}
    before = dict(zip(loop.parameters.named, [each.clone() for each in loop.parameters.named.values()], strict=True))
    loop.parameters.train_only({1, 3})
    losses = [float(loop.take_step(0.1).loss) for _ in range(6)]
    assert losses[-1] < losses[0]
    after = dict(model.named_parameters())
    assert all(torch.equal(tensor, after[name]) for name, tensor in frozen.items())
    moved = {
        name.partition("/")[0]
        for name, tensor in loop.parameters.named.items()
        if not torch.equal(tensor, before[name])
    }
    assert moved == {"group1", "group3"}
    assert loop.parameters.read().numel() == run.adapter.num_parameters


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_blocks_that_are_computed_again_give_the_same_gradients(dropout: float, tmp_path: Path) -> None:
    model = build_run_model(resolved("llama", tmp_path, f"dropout = {dropout}"), tmp_path)
    drawn(model)
    found = list[Tensor]()
    for recomputes in (False, True):
        model.recomputes_blocks = recomputes
        torch.manual_seed(0)
        loss_of(model).backward()
        found.append(flatten([tensor.grad for tensor in model.trained_tensors() if tensor.grad is not None]))
        for tensor in model.trained_tensors():
            tensor.grad = None
    assert torch.allclose(found[0], found[1], atol=1e-7)
    with torch.no_grad():
        assert torch.equal(loss_of(model), loss_of(model)), "nothing is dropped where a model is measured"
    assert bool(loss_of(model).isclose(loss_of(model), rtol=1e-7, atol=0)) is (dropout == 0)


def test_frozen_layers_in_four_bits_give_about_the_same_loss_and_train(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    run = resolved("llama", tmp_path)
    model, converted = (build_run_model(run, tmp_path) for _ in "12")
    for each in (model, converted):
        drawn(each)
    convert_frozen_layers(converted, torch.float32)
    converted.to("cpu")  # which packs them
    packed = [name for name, tensor in converted.named_parameters() if tensor.dtype is torch.uint8]
    assert len(packed) == 3 * 7 and not any("lora" in name or "lm_head" in name for name in packed)
    loss, exact = loss_of(converted), loss_of(model)
    loss.backward()
    assert 0 < abs(float((loss - exact).detach())) < 0.3
    assert all(tensor.grad is not None and tensor.grad.any() for tensor in converted.trained_tensors())


def test_four_bits_are_refused_where_they_are_of_no_use(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run, whole = resolved("llama", tmp_path), resolved_run(run_of(str(tmp_path)), tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with raises_code("base-bits", UserError, "trains all weights"):
        check_four_bits(whole)
    with raises_code("base-bits", UserError, "bitsandbytes, which is not installed"):
        check_four_bits(run)
    with raises_code("base-bits", UserError, "computes on cpu"):
        check_card_for_four_bits("cpu")
    check_card_for_four_bits("cuda:0")
    assert frozen_bytes(run, 4) < frozen_bytes(run) == 4 * run.model.num_parameters and frozen_bytes(whole) == 0


@pytest.mark.parametrize(
    ("targets", "says"),
    [
        ('["zzz"]', "zzz"),
        (
            '["q_proj", "w_proj"]',
            "w_proj: no linear layer that can be adapted has this name; name ",
        ),
        ('["q_proj", "layers.7.v_proj"]', "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj; or take"),
        ('["lm_head"]', "head"),
        ('["embed_tokens"]', "no linear layer"),
    ],
)
def test_layers_that_cannot_be_adapted_are_one_line(targets: str, says: str, tmp_path: Path) -> None:
    with raises_code("adapter-targets", RunFileError, "adapter.targets", says):
        resolved("llama", tmp_path, f"targets = {targets}")


def test_a_run_that_lies_about_its_adapters_size_is_refused_before_anything_takes_memory(tmp_path: Path) -> None:
    run = resolved("llama", tmp_path)
    for path in tmp_path.glob("*.safetensors"):
        path.unlink()  # nothing that is there is looked at before
    for change in ({"num_parameters": 1}, {"modules": ("q_proj",)}, {"rank": 1024, "group_rank": 1024}):
        adapter = run.adapter.model_copy(update=change)
        for build in (build_run_model, lambda run, files: empty_model(spec_of(run, files))):
            with raises_code("adapter-differs", UserError):
                build(run.model_copy(update={"adapter": adapter}), tmp_path)


def test_a_kept_run_is_the_one_that_a_person_wrote(tmp_path: Path) -> None:
    run, written = resolved("llama", tmp_path), run_of(str(tmp_path), adapter=LORA)
    model = run.model.model_copy(update={"base": published_base(run.model.base)})
    published = run.model_copy(update={"model": model})
    assert not written.adapter.is_resolved and not changed_keys(published, written)
    other = written.adapter.model_copy(update={"alpha": 3.0})
    assert changed_keys(published, written.model_copy(update={"adapter": other}))

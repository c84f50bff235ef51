"""Models of transformers cut into stages: what the whole computes, from a seed or a checkpoint, and back as one."""

from __future__ import annotations

import copy
import functools
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from codes import raises_code
from safetensors.torch import load_file, save_file
from stage_passes import there_and_back
from torch import Tensor

from swarmtrain.errors import UserError
from swarmtrain.model import huggingface
from swarmtrain.model.gpt import uniform_weight
from swarmtrain.model.huggingface import (
    HuggingFaceModel,
    HuggingFaceStage,
    build_stage,
    load_stage,
    model_to_cut,
    stage_shapes,
)
from swarmtrain.model.huggingface_config import whole_config
from swarmtrain.model.huggingface_model import resolved_keys
from swarmtrain.model.stages import joined_weights

pytestmark = pytest.mark.slow  # importing the library alone takes seconds

_ROTARY = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 24,
    "tie_word_embeddings": False,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **_ROTARY, "pad_token_id": 7},
    "qwen2": {"model_type": "qwen2", **_ROTARY},
    "qwen3": {"model_type": "qwen3", **_ROTARY, "head_dim": 12},
    "gpt2": {
        "model_type": "gpt2",
        "vocab_size": 96,
        "n_embd": 32,
        "n_layer": 3,
        "n_head": 4,
        "n_positions": 24,
        "tie_word_embeddings": False,
    },
}
FAMILIES = list(CONFIGS)
_KINDS = ["sliding_attention", "full_attention", "sliding_attention"]
_WINDOW = {**_ROTARY, "head_dim": 8, "sliding_window": 6}
# Not named in the code: what comes before the blocks, in them and after them differs.
OTHERS: dict[str, dict[str, Any]] = {
    "gpt_neox": _ROTARY,
    "opt": {**_ROTARY, "ffn_dim": 48, "word_embed_proj_dim": 32},  # learnt positions
    "gemma": {**_ROTARY, "head_dim": 8},  # a scaled embedding
    "gemma2": {**_WINDOW, "final_logit_softcapping": 2.0},  # windows in every second layer, capped logits
    "gemma3_text": {**_WINDOW, "layer_types": _KINDS},  # two rotary tables
    "phi3": {**_ROTARY, "pad_token_id": 0},
    "phi": _ROTARY,  # a head with a bias
    "starcoder2": _ROTARY,
    "mistral": {**_ROTARY, "sliding_window": 6},
    "mixtral": {**_ROTARY, "num_local_experts": 4},
    "granite": {**_ROTARY, "embedding_multiplier": 3.0, "logits_scaling": 2.0},
    "falcon": {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4},  # tuples
}
CONFIGS |= {family: {"model_type": family, **config, "tie_word_embeddings": False} for family, config in OTHERS.items()}
# Nowhere, at each place, and at several.
CUTS = [(), (0,), (1,), (2,), (3,), (1, 2), (0, 3), (0, 1, 2, 3)]


def _model(config: dict[str, Any]) -> HuggingFaceModel:
    return model_to_cut(config, "the configuration")


def _model_in(folder: Path) -> HuggingFaceModel:
    return model_to_cut(whole_config(folder), "config.json")


def _stages(model: HuggingFaceModel, boundaries: tuple[int, ...], seed: int = 3) -> list[HuggingFaceStage]:
    return [build_stage(shape, seed) for shape in stage_shapes(model, boundaries)]


def _joined(stages: list[HuggingFaceStage]) -> dict[str, Tensor]:
    return joined_weights(stage.state_dict() for stage in stages)


def _whole(model: HuggingFaceModel, weights: dict[str, Tensor], attention: str = "sdpa") -> Any:
    """Build the model by transformers, with these weights."""
    import transformers

    config = copy.deepcopy(model.config)
    whole = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    whole.load_state_dict(weights)
    return whole.eval()


def _batch() -> Tensor:
    return torch.randint(0, 96, (3, 19), generator=torch.Generator().manual_seed(1))


def _moved_stages(model: HuggingFaceModel, boundaries: tuple[int, ...]) -> list[HuggingFaceStage]:
    """Build stages with norms other than 1 and biases other than 0, equal for every cut."""
    stages = _stages(model, boundaries)
    for stage in stages:
        for name, parameter in stage.named_parameters():
            parameter.data += uniform_weight(f"moved {name}", parameter.shape, 0, 0.05)
    return stages


@functools.cache
def _expected(config: str, attention: str) -> tuple[float, dict[str, Tensor]]:
    """Return the loss and the gradients of the whole model."""
    model, batch = _model(json.loads(config)), _batch()
    whole = _whole(model, _joined(_moved_stages(model, ())), attention)
    logits = whole(input_ids=batch[:, :-1]).logits
    loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
    loss.backward()
    return float(loss.detach()), {name: parameter.grad for name, parameter in whole.named_parameters()}


def _check_against_whole(config: dict[str, Any], boundaries: tuple[int, ...], attention: str = "sdpa") -> None:
    loss, expected = _expected(json.dumps(config), attention)
    stages = _moved_stages(_model(config), boundaries)
    assert there_and_back(stages, _batch()) == pytest.approx(loss, rel=0, abs=1e-6)
    gradients = joined_weights({name: p.grad for name, p in stage.named_parameters()} for stage in stages)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=1e-6, msg=name)


# ---------------------------------------------------------------- what is computed


@pytest.mark.parametrize("boundaries", CUTS, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_cut_anywhere_loss_and_gradients_are_those_of_the_whole(family: str, boundaries: tuple[int, ...]) -> None:
    _check_against_whole(CONFIGS[family], boundaries)


@pytest.mark.parametrize("boundaries", [(), (1,), (1, 2), (0, 1, 2, 3)], ids=str)
@pytest.mark.parametrize("family", OTHERS)
def test_stages_of_other_families_give_the_loss_and_gradients_of_the_whole(
    family: str, boundaries: tuple[int, ...]
) -> None:
    _check_against_whole(CONFIGS[family], boundaries, "eager" if family == "gemma2" else "sdpa")


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (
            {"model_type": "bloom", "n_layer": 3, "n_head": 4},
            "bloom cannot be cut into stages: its loss is another one",
        ),
        ({**CONFIGS["opt"], "word_embed_proj_dim": 16}, "opt cannot be cut into stages"),
    ],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else "",
)
def test_a_family_whose_stages_compute_something_else_is_refused(config: dict[str, Any], says: str) -> None:
    with raises_code("model-family", UserError, "the configuration: model_type: ", says, "pipeline.stages = 1"):
        _model({"vocab_size": 96, "hidden_size": 32} | config)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_librarys_plain_attention_gives_the_same(family: str) -> None:
    _check_against_whole(CONFIGS[family], (1, 2), "eager")


_LINEAR = {"rope_type": "linear", "factor": 2.0}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 12,
}


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_theta": 500.0},
        {"rope_scaling": _LINEAR},
        {"rope_scaling": _LLAMA3},
        {"attention_bias": True, "mlp_bias": True, "hidden_act": "gelu", "rms_norm_eps": 0.01, "head_dim": 6},
        {"num_key_value_heads": None},
        {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 12}},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_a_configuration_says_is_computed(changes: dict[str, Any]) -> None:
    _check_against_whole(CONFIGS["llama"] | changes, (1,))
    standard = _stages(_model(CONFIGS["llama"]), ())
    assert there_and_back(standard, _batch()) != there_and_back(
        _stages(_model(CONFIGS["llama"] | changes), ()), _batch()
    )


def test_rotary_parameters_of_transformers_5_are_those_of_4() -> None:
    old = CONFIGS["llama"] | {"rope_theta": 500.0, "rope_scaling": {**_LINEAR, "type": "linear"}}
    new = CONFIGS["llama"] | {"rope_parameters": {**_LINEAR, "rope_theta": 500.0}}
    plain = CONFIGS["llama"] | {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}}
    losses = [there_and_back(_stages(_model(config), (1,)), _batch()) for config in (old, new, plain, CONFIGS["llama"])]
    assert losses[0] == losses[1] != losses[2] == losses[3]


def test_dropout_is_left_out() -> None:
    dropout = {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5}
    for config in (CONFIGS["gpt2"] | dropout, CONFIGS["opt"] | {"dropout": 0.5, "layerdrop": 0.5}):
        (stage,) = _stages(_model(config), ())
        tokens, before = _batch(), stage(_batch())
        assert torch.equal(stage.train()(tokens), before) and torch.equal(stage(tokens), before)


def test_more_tokens_than_the_context_are_refused_by_every_stage() -> None:
    first, last = _stages(_model(CONFIGS["gpt2"]), (2,))
    with pytest.raises(ValueError, match="25 tokens are more than the context of 24"):
        first(torch.zeros((1, 25), dtype=torch.int64))
    with pytest.raises(ValueError, match="25 tokens"):
        last(torch.zeros(1, 25, 32))


def test_boundaries_that_are_none_are_refused() -> None:
    with pytest.raises(ValueError, match="ascend from 0 to 3"):
        stage_shapes(_model(CONFIGS["qwen2"]), (4,))


# ---------------------------------------------------------------- weights from a seed


@pytest.mark.parametrize("family", FAMILIES)
def test_initial_weights_do_not_depend_on_the_cut(family: str) -> None:
    model = _model(CONFIGS[family])
    state = torch.random.get_rng_state()
    whole = _joined(_stages(model, ()))
    for boundaries in ((1,), (0, 2), (0, 1, 2, 3)):
        joined = _joined(_stages(model, boundaries))
        assert joined.keys() == whole.keys()
        assert all(torch.equal(joined[name], whole[name]) for name in whole)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not torch.equal(_joined(_stages(model, (), seed=4))["lm_head.weight"], whole["lm_head.weight"])


def test_initial_weights_have_the_deviation_that_the_configuration_says() -> None:
    (llama,) = _stages(_model(CONFIGS["llama"] | {"initializer_range": 0.5, "attention_bias": True}), ())
    weights = llama.state_dict()
    assert weights["model.layers.1.mlp.up_proj.weight"].std() == pytest.approx(0.5, rel=0.03)
    assert weights["model.embed_tokens.weight"].mean() == pytest.approx(0, abs=0.03)
    assert torch.equal(weights["model.layers.1.input_layernorm.weight"], torch.ones(32))
    assert torch.equal(weights["model.layers.1.self_attn.q_proj.bias"], torch.zeros(32))
    (gpt2,) = _stages(_model(CONFIGS["gpt2"]), ())
    weights = gpt2.state_dict()
    assert weights["transformer.h.0.mlp.c_fc.weight"].std() == pytest.approx(0.02, rel=0.03)
    assert weights["transformer.h.0.mlp.c_proj.weight"].std() == pytest.approx(0.02 / 6**0.5, rel=0.03)
    assert torch.equal(weights["transformer.ln_f.weight"], torch.ones(32))


def test_a_stage_of_a_model_that_no_machine_can_hold_is_built() -> None:
    vast = {"vocab_size": 4_194_304, "hidden_size": 65_536, "head_dim": 2, "intermediate_size": 1}
    model = _model(CONFIGS["llama"] | vast | {"num_attention_heads": 1, "num_key_value_heads": 1})
    first, middle, last = stage_shapes(model, (1, 2))
    assert first.num_parameters - middle.num_parameters == 4_194_304 * 65_536
    assert last.num_parameters - first.num_parameters == 65_536
    stage = build_stage(middle, 0)
    assert stage(torch.ones(1, 2, 65_536)).shape == (1, 2, 65_536)


@pytest.mark.parametrize("boundaries", [(), (1, 3), (0, 1, 2, 3)], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_counted_without_building_them(family: str, boundaries: tuple[int, ...]) -> None:
    model = _model(CONFIGS[family])
    for shape in stage_shapes(model, boundaries):
        assert shape.num_parameters == sum(p.numel() for p in build_stage(shape, 0).parameters())
    whole = _whole(model, _joined(_stages(model, ())))
    assert sum(shape.num_parameters for shape in stage_shapes(model, boundaries)) == whole.num_parameters()


# ---------------------------------------------------------------- weights from a checkpoint


def _checkpoint(folder: Path, config: dict[str, Any], **options: Any) -> Any:
    """Write a checkpoint by transformers; returns its model."""
    import transformers

    torch.manual_seed(5)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**config))
    model.save_pretrained(folder, **options)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_a_stage_opens_only_the_shards_of_its_tensors(tmp_path: Path, family: str) -> None:
    whole = _checkpoint(tmp_path, CONFIGS[family], max_shard_size="16KB").state_dict()
    places = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(places.values())) > 5
    kept = tmp_path / "kept"
    kept.mkdir()
    for path in tmp_path.glob("*.safetensors"):
        path.rename(kept / path.name)
    for shape in stage_shapes(_model_in(tmp_path), (1, 2)):
        needed = {places[name] for name in HuggingFaceStage(shape).state_dict()}
        assert needed < set(places.values())
        for number, name in enumerate(sorted(set(places.values()))):
            (tmp_path / name).unlink(missing_ok=True)
            if name in needed:
                (tmp_path / name).symlink_to(kept / name)  # as in a cache of the hub
            elif number % 2:
                (tmp_path / name).write_bytes(b"torn")
        for name, weight in load_stage(shape, tmp_path).state_dict().items():
            assert torch.equal(weight, whole[name]), name


@pytest.mark.parametrize(("family", "is_tied"), [("gpt_neox", False), ("mixtral", False), ("mixtral", True)])
def test_a_checkpoint_whose_tensors_have_other_names_is_read_in_stages(
    tmp_path: Path, family: str, is_tied: bool
) -> None:
    whole = _checkpoint(tmp_path, CONFIGS[family] | {"tie_word_embeddings": is_tied}, max_shard_size="16KB")
    stages = [load_stage(shape, tmp_path) for shape in stage_shapes(_model_in(tmp_path), (0, 2))]
    weights, expected = _joined(stages), whole.state_dict()
    assert weights.keys() == expected.keys() and all(torch.equal(weights[name], expected[name]) for name in expected)


def test_one_file_in_half_precision_becomes_fp32_in_memory_of_its_own(tmp_path: Path) -> None:
    whole = _checkpoint(tmp_path, CONFIGS["llama"])
    whole.to(torch.bfloat16).save_pretrained(tmp_path)
    (stage,) = (load_stage(shape, tmp_path) for shape in stage_shapes(_model_in(tmp_path), ()))
    (tmp_path / "model.safetensors").write_bytes(b"")  # a mapped file would now end the process
    for name, weight in stage.state_dict().items():
        assert weight.dtype == torch.float32 and torch.equal(weight, whole.state_dict()[name].float()), name


@pytest.mark.parametrize("is_body_alone", [False, True])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_of_a_tied_checkpoint_the_head_begins_as_a_copy(tmp_path: Path, family: str, is_body_alone: bool) -> None:
    config = CONFIGS[family] | {"tie_word_embeddings": True}
    whole = _checkpoint(tmp_path, config)
    if is_body_alone:  # as GPT-2 itself was published
        whole.base_model.save_pretrained(tmp_path)
    assert not any("lm_head" in name for name in load_file(tmp_path / "model.safetensors"))
    stages = [load_stage(shape, tmp_path) for shape in stage_shapes(_model_in(tmp_path), (1, 3))]
    weights = _joined(stages)
    embedding = next(weight for name, weight in weights.items() if "wte" in name or "embed_tokens" in name)
    assert torch.equal(weights["lm_head.weight"], embedding)
    assert weights["lm_head.weight"].data_ptr() != embedding.data_ptr()
    x = tokens = _batch()
    for stage in stages:
        x = stage(x)
    torch.testing.assert_close(x, whole.eval()(input_ids=tokens).logits, rtol=0, atol=1e-6)


def test_gpt2_is_tied_unless_its_configuration_says_otherwise() -> None:
    config = {key: value for key, value in CONFIGS["gpt2"].items() if key != "tie_word_embeddings"}
    assert _model(config).head_is_copy and not _model(config).config.tie_word_embeddings
    assert not _model(CONFIGS["gpt2"]).head_is_copy
    llama = {key: value for key, value in CONFIGS["llama"].items() if key != "tie_word_embeddings"}
    assert not _model(llama).head_is_copy


def test_a_checkpoint_without_a_head_is_not_untied_unasked(tmp_path: Path) -> None:
    _checkpoint(tmp_path, CONFIGS["gpt2"] | {"tie_word_embeddings": True})
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["gpt2"]))
    first, last = stage_shapes(_model_in(tmp_path), (1,))
    load_stage(first, tmp_path)
    with raises_code("checkpoint-mismatch", UserError, "lm_head.weight"):
        load_stage(last, tmp_path)


def _small(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """Write a one-file checkpoint without transformers; returns the file and its content."""
    weights = _joined(_stages(_model(CONFIGS["qwen3"]), ()))
    save_file(weights, folder / "model.safetensors")
    return folder / "model.safetensors", weights


def _load(folder: Path) -> None:
    for shape in stage_shapes(_model(CONFIGS["qwen3"]), (1,)):
        load_stage(shape, folder)


@pytest.mark.parametrize("content", [b"", b"torn", (2**62).to_bytes(8, "little") + b"{}", None], ids=str)
def test_broken_safetensors_are_one_line(tmp_path: Path, content: bytes | None) -> None:
    path, _ = _small(tmp_path)
    _load(tmp_path)
    path.write_bytes(path.read_bytes()[:-1] if content is None else content)
    with raises_code("file-unreadable", UserError, "model.safetensors: "):
        _load(tmp_path)


def test_tensors_that_are_not_the_models_are_refused(tmp_path: Path) -> None:
    path, weights = _small(tmp_path)
    name = "model.layers.2.self_attn.q_norm.weight"
    for wrong in (torch.ones(13), torch.ones(12, dtype=torch.int64)):
        save_file(weights | {name: wrong}, path)
        with raises_code("checkpoint-mismatch", UserError, name, str(list(wrong.shape)), "[12]"):
            _load(tmp_path)
    save_file(weights | {name: torch.full((12,), torch.nan)}, path)
    with raises_code("checkpoint-not-finite", UserError, name):
        _load(tmp_path)
    save_file({key: weight for key, weight in weights.items() if key != name}, path)
    with raises_code("checkpoint-mismatch", UserError, name):
        _load(tmp_path)


@pytest.mark.parametrize(
    "index",
    [
        "{",
        "[" * 100_000,
        "[]",
        "{}",
        '{"weight_map": []}',
        '{"weight_map": {"lm_head.weight": "../model.safetensors"}}',
        '{"weight_map": {"lm_head.weight": "/etc/passwd"}}',
        '{"weight_map": {"lm_head.weight": 1}}',
    ],
    ids=lambda index: index[:40],
)
def test_a_broken_index_is_one_line(tmp_path: Path, index: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with raises_code("file-unreadable", UserError, "index.json: "):
        _load(tmp_path)


def test_an_index_that_names_a_shard_without_the_tensor(tmp_path: Path) -> None:
    path, weights = _small(tmp_path)
    path.rename(tmp_path / "all.safetensors")
    save_file({"other": torch.ones(1)}, tmp_path / "some.safetensors")
    for name in weights:
        places = dict.fromkeys(weights, "all.safetensors") | {name: "some.safetensors"}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
        with raises_code("file-unreadable", UserError, "some.safetensors: "):
            _load(tmp_path)
        (tmp_path / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": places | {name: "absent.safetensors"}})
        )
        with raises_code("file-unreadable", UserError, "absent.safetensors: "):
            _load(tmp_path)
        break


def test_what_executes_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with raises_code("not-safetensors", UserError, "model.safetensors"):
        _load(tmp_path)


# ---------------------------------------------------------------- configurations


@pytest.mark.parametrize(
    ("changes", "code", "says"),
    [
        ({"model_type": "none"}, "model-family", "model_type: none"),
        ({"model_type": None}, "not-a-config", "model_type: null"),
        ({"model_type": ["llama"]}, "not-a-config", 'model_type: ["llama"]'),
        ({"hidden_size": 10**30}, "model-refused", "refuses"),
        ({"num_hidden_layers": 5000}, "bad-value", "num_hidden_layers: 5000 "),
        ({"hidden_act": "os.system"}, "model-refused", "os.system"),
        ({"quantization_config": {"bits": 4}}, "model-quantised", "quantization_config: "),
        ({"is_causal": False}, "model-refused", "a token sees those that come after it"),
        ({"rope_scaling": {**_LINEAR, "partial_rotary_factor": 1e12}}, "model-refused", "too many to try it"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_configurations_that_stages_cannot_follow_are_one_line(
    tmp_path: Path, changes: dict[str, Any], code: str, says: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["llama"] | changes))
    with raises_code(code, UserError, says) as caught:
        resolved_keys(tmp_path, is_cut=True)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("content", "code", "says"),
    [
        (b"{", "not-a-config", "JSON"),
        (b"\xff", "not-a-config", "JSON"),
        (b"[" * 200_000, "not-a-config", "JSON"),
        (b'{"vocab_size": ' + b"9" * 5000 + b"}", "not-a-config", "JSON"),
        (b"[]", "not-a-config", "JSON object"),
        (b" " * 1_048_577, "not-a-config", "more than 1048576 bytes"),
        (None, "file-unreadable", ""),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_file_that_is_no_configuration_is_one_line(
    tmp_path: Path, content: bytes | None, code: str, says: str
) -> None:
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with raises_code(code, UserError, "config.json: ", says):
        whole_config(tmp_path)


# ---------------------------------------------------------------- the extra


def test_without_the_extra_the_next_step_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    (shape,) = stage_shapes(_model(CONFIGS["llama"]), ())
    monkeypatch.setitem(sys.modules, "transformers", None)
    with raises_code("package-missing", UserError, "pip install 'transformers>="):
        build_stage(shape, 0)


def test_the_library_is_imported_only_when_it_is_needed() -> None:
    package = Path(huggingface.__file__).parent.parent
    for path in package.rglob("*.py"):
        assert not re.search(r"^(import|from) transformers\b", path.read_text(encoding="utf-8"), re.MULTILINE), path

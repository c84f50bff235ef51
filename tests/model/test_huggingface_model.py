"""Whole models of transformers: they compute what the library computes, or are refused in one line."""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from codes import raises_code
from safetensors.torch import load_file, save_file
from small_models import CONFIGS, run_of, saved
from stage_passes import there_and_back
from torch import Tensor, nn

from swarmtrain.algorithm.batch import join_rows
from swarmtrain.errors import RunFileError, UserError
from swarmtrain.model import huggingface_probe
from swarmtrain.model.base import base_files, resolved_run
from swarmtrain.model.evaluation import evaluate
from swarmtrain.model.export import export_model
from swarmtrain.model.huggingface_config import check_computed_plainly, whole_config
from swarmtrain.model.huggingface_model import HuggingFaceLanguageModel
from swarmtrain.model.language_model import ModelSpec
from swarmtrain.model.parameter_count import num_parameters, similar_built_in
from swarmtrain.model.run_model import build_run_model, empty_model, spec_from_json, spec_to_json
from swarmtrain.model.run_stages import build_run_stage, check_weights, run_stage_shapes
from swarmtrain.model.sampling import generate
from swarmtrain.model.stages import joined_weights
from swarmtrain.run import RunFile
from swarmtrain.run_model import ModelSection

pytestmark = pytest.mark.slow  # importing the library alone takes seconds

FAMILIES = list(CONFIGS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a checkpoint of each family."""
    root = tmp_path_factory.mktemp("models")
    for family in FAMILIES:
        saved(family, root / family)
    return root


def _library(path: Path) -> Any:
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(path).float().eval()


def _batch() -> Tensor:
    return torch.randint(288, (3, 20), generator=torch.Generator().manual_seed(1))


def _loss_of(library_model: Any, batch: Tensor) -> Tensor:
    logits = library_model(input_ids=batch[:, :-1]).logits
    return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


def _built(folder: Path, family: str, keys: str = "", **tables: str) -> HuggingFaceLanguageModel:
    run = resolved_run(run_of(family, keys, **tables), folder)
    model = build_run_model(run, base_files(run, folder))
    assert isinstance(model, HuggingFaceLanguageModel)
    return model


# ---------------------------------------------------------------- what is computed


@pytest.mark.parametrize("family", FAMILIES)
def test_from_a_checkpoint_loss_and_gradients_are_the_librarys(folder: Path, family: str) -> None:
    library_model, model, batch = _library(folder / family), _built(folder, family), _batch()
    expected, loss = _loss_of(library_model, batch), model.loss(batch)
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=0, abs=1e-5)
    expected.backward()
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in library_model.named_parameters()}
    assert [name for name, _ in model.named_parameters()] == list(gradients), "names, and their order"
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=0, atol=1e-5, msg=name)
    sum_nats, num_targets = evaluate(model, [batch])
    assert (sum_nats / num_targets, num_targets) == (pytest.approx(float(expected.detach()), abs=1e-5), 57)
    assert torch.allclose(model(batch), library_model(batch).logits, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_from_scratch_it_begins_with_the_same_bits_and_is_the_librarys_model(folder: Path, family: str) -> None:
    state = torch.random.get_rng_state()
    model, again = (_built(folder, family, "from_scratch = true") for _ in range(2))
    other = _built(folder, family, "from_scratch = true", run="seed = 1")
    assert torch.equal(torch.random.get_rng_state(), state)
    weights = dict(model.named_parameters())
    assert all(torch.equal(weights[name], value) for name, value in again.named_parameters())
    drawn = [name for name, value in other.named_parameters() if not torch.equal(weights[name], value)]
    assert 0 < len(drawn) < len(weights), "norms are the same constants for each seed"
    norm = next(value for name, value in weights.items() if "norm" in name or ".ln_" in name)
    assert torch.equal(norm, torch.full_like(norm, 0.0 if family == "gemma2" else 1.0))  # as the library begins
    table = next(iter(weights.values()))
    assert float(table.detach().std()) == pytest.approx(0.02, rel=0.1)
    library_model, batch = _library(folder / family), _batch()
    library_model.load_state_dict(model.state_dict(), strict=False)
    loss, expected = model.loss(batch), _loss_of(library_model, batch)
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=0, abs=1e-5)


@pytest.mark.parametrize("from_scratch", ["false", "true"])
@pytest.mark.parametrize("family", FAMILIES)
def test_in_three_stages_it_computes_the_same(folder: Path, family: str, from_scratch: str) -> None:
    run = resolved_run(run_of(family, f"from_scratch = {from_scratch}", pipeline="stages = 3"), folder)
    files = folder / family
    shapes = run_stage_shapes(run, files, (1, 2))
    stages = [build_run_stage(run, shape, files, run.run.seed) for shape in shapes]
    whole = empty_model(ModelSpec(run.model, files))
    whole.load_state_dict(joined_weights(stage.state_dict() for stage in stages))
    assert num_parameters(run.model) == sum(parameter.numel() for parameter in whole.parameters())
    assert there_and_back(stages, _batch()) == pytest.approx(float(whole.loss(_batch()).detach()), rel=0, abs=1e-5)
    if from_scratch == "false":  # the head begins as a copy of the embedding
        expected = _loss_of(_library(files), _batch())
        loaded = dict(build_run_model(run, files).named_parameters())
        assert all(torch.equal(loaded[name], value) for name, value in whole.named_parameters()) and len(loaded) > 1
        assert float(whole.loss(_batch()).detach()) == pytest.approx(float(expected.detach()), rel=0, abs=1e-5)


@pytest.mark.parametrize(("stages", "boundaries"), [(1, ()), (3, (1, 2))])
def test_a_model_that_was_only_checked_does_not_stay_in_memory(
    folder: Path, stages: int, boundaries: tuple[int, ...]
) -> None:
    """Models of the library refer to themselves, so that they would stay until Python's collector comes by itself."""
    run = resolved_run(run_of("llama", pipeline=f"stages = {stages}"), folder)

    def modules() -> int:
        return sum(issubclass(type(each), nn.Module) for each in gc.get_objects())

    gc.collect()
    gc.disable()
    try:
        before = modules()
        check_weights(run, folder / "llama", boundaries)
        assert modules() == before
    finally:
        gc.enable()


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "gpt_neox"])
def test_documents_of_a_sequence_are_apart_and_only_targets_count(folder: Path, family: str) -> None:
    model, tokens = _built(folder, family), _batch()
    is_target = torch.zeros_like(tokens)
    is_target[:, 3:6] = is_target[:, 12:15] = 1
    positions = torch.cat([torch.arange(8), torch.arange(12)]).expand_as(tokens)
    loss = model.loss(join_rows(tokens, is_target, positions))
    total = torch.zeros(())
    for begin, end, first, last in ((0, 8, 3, 6), (8, 20, 4, 7)):  # each document alone
        logits = model(tokens[:, begin:end])[:, first - 1 : last - 1]
        wanted = tokens[:, begin + first : begin + last]
        total = total + F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="sum")
    assert float(loss.detach()) == pytest.approx(float(total.detach()) / 18, rel=0, abs=1e-5)
    loss.backward()
    assert float(model.loss(join_rows(tokens, torch.zeros_like(tokens))).detach()) == 0.0, "without a target"


def test_a_family_that_cannot_be_cut_is_refused_in_a_pipeline(tmp_path: Path) -> None:
    saved("bloom", tmp_path / "bloom", vocab_size=288, hidden_size=32, n_layer=3, n_head=4)
    with raises_code("model-family", RunFileError, "model.base: ", "bloom cannot be cut into stages"):
        resolved_run(run_of("bloom", pipeline="stages = 3"), tmp_path)
    assert resolved_run(run_of("bloom"), tmp_path).model.num_layers == 3


@pytest.mark.parametrize("family", FAMILIES)
def test_it_writes_what_it_would_if_each_token_were_read_with_all_before(folder: Path, family: str) -> None:
    model, tokens = _built(folder, family), [5, 6, 7]
    written = generate(model, tokens, 30, 0.0, seed=0)
    for _ in range(30):
        tokens.append(int(model(torch.tensor([tokens[-24:]]))[0, -1].argmax()))
    assert written == tokens[3:]


def test_tied_matrices_are_one_parameter_that_is_trained_once(folder: Path) -> None:
    model = _built(folder, "qwen3")
    names = [name for name, _ in model.named_parameters()]
    assert "lm_head.weight" not in names and names[0] == "model.embed_tokens.weight"
    assert sum(parameter.numel() for parameter in model.parameters()) == num_parameters(model.section)
    torch.optim.SGD(model.parameters(), lr=0.1).zero_grad()
    model.loss(_batch()).backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert model.head.weight is next(iter(model.parameters()))
    assert not _built(folder, "llama").section.tied_embeddings


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_blocks_computed_again_keep_less_and_give_the_same_gradient(folder: Path, family: str) -> None:
    model, kept = _built(folder, family), list[int]()
    for recomputes in (False, True):
        model.recomputes_blocks, sizes = recomputes, dict[int, int]()

        def pack(tensor: Tensor, sizes: dict[int, int] = sizes) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model.loss(_batch())
        kept.append(sum(sizes.values()))
        loss.backward()
    both = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    model.recomputes_blocks = False
    model.loss(_batch()).backward()
    for twice, parameter in zip(both, model.parameters(), strict=True):
        assert twice is not None and parameter.grad is not None
        torch.testing.assert_close(twice, 2 * parameter.grad, rtol=1e-5, atol=1e-7)
    assert kept[1] < 0.7 * kept[0]


def test_it_is_computed_in_low_precision_where_that_is_asked_for(folder: Path) -> None:
    model = _built(folder, "qwen3")
    exact = float(model.loss(_batch()).detach())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model.loss(_batch())
    loss.backward()
    assert float(loss.detach()) != exact and float(loss.detach()) == pytest.approx(exact, rel=0.02)
    assert all(parameter.grad is not None and parameter.grad.dtype == torch.float32 for parameter in model.parameters())


def test_more_tokens_than_the_runs_context_are_refused(folder: Path) -> None:
    model = _built(folder, "llama")
    with pytest.raises(ValueError, match="25 tokens are more than the context of 24"):
        model(torch.zeros((1, 25), dtype=torch.int64))


def test_another_process_builds_the_same_model_from_its_spec(folder: Path) -> None:
    model = _built(folder, "gemma2")
    told = json.loads(json.dumps(spec_to_json(model.spec)))
    other = empty_model(spec_from_json(told))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.loss(_batch()), model.loss(_batch()))


def test_a_machine_is_tried_with_a_built_in_model_of_about_the_same_size(folder: Path) -> None:
    for family in FAMILIES:
        section = resolved_run(run_of(family), folder).model
        similar = similar_built_in(section)
        assert similar.is_built_in and similar.vocabulary_size == 288
        tables = 288 * 32 * section.tied_embeddings
        assert num_parameters(similar) - tables == pytest.approx(num_parameters(section), rel=0.1)


# ---------------------------------------------------------------- what its configuration says


def test_the_shape_is_read_from_the_configuration(folder: Path) -> None:
    run = resolved_run(run_of("qwen3"), folder)
    section = run.model
    assert (section.vocabulary_size, section.num_layers, section.width, section.num_heads) == (288, 3, 32, 4)
    assert (section.feed_forward_ratio, section.tied_embeddings, section.context_tokens) == (1.5, True, 24)
    assert section.num_parameters == _library(folder / "qwen3").num_parameters()
    assert resolved_run(run, folder) is run
    cut = resolved_run(run_of("qwen3", pipeline="stages = 3"), folder)
    assert cut.model.num_parameters == section.num_parameters + 288 * 32, "the head of the last stage"
    with raises_code("keys-disagree", RunFileError, "pipeline.stages: 6 with model.num_layers = 3"):
        resolved_run(run_of("qwen3", pipeline="stages = 6"), folder)


def test_a_context_longer_than_the_models_is_refused(folder: Path) -> None:
    run = run_of("gpt2").model_copy(update={"model": run_of("gpt2").model.model_copy(update={"context_tokens": 65})})
    with raises_code("keys-disagree", RunFileError, "model.context_tokens: 65", "allowed: at most 64"):
        resolved_run(run, folder)


def _config(changes: dict[str, Any]) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(config | changes))

    return change


def _with(name: str, text: str) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        (path / name).write_text(text)

    return write


def _pickled(path: Path) -> None:
    (path / "model.safetensors").rename(path / "pytorch_model.bin")


def _torn(path: Path) -> None:
    data = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(data[: len(data) // 2])


def _one_more(path: Path) -> None:
    weights = load_file(path / "model.safetensors")
    save_file({**weights, "model.layers.7.secret": torch.ones(2)}, path / "model.safetensors", {"format": "pt"})


def _diverged(number: float) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        weights = load_file(path / "model.safetensors")
        weights["model.norm.weight"][-1] = number
        save_file(weights, path / "model.safetensors", {"format": "pt"})

    return change


REFUSED: list[tuple[str, Callable[[Path], None], str, str]] = [
    ("pickles only", _pickled, "not-safetensors", "*.safetensors"),
    ("quantised", _config({"quantization_config": {"bits": 4}}), "model-quantised", "quantization_config"),
    ("an adapter", _with("adapter_config.json", "{}"), "model-refused", "adapter_config.json"),
    ("no configuration", _with("config.json", "[]"), "not-a-config", "not a JSON object"),
    ("no family", _config({"model_type": 3}), "not-a-config", "model_type: 3"),
    ("an unknown family", _config({"model_type": "own"}), "model-family", "model_type: own"),
    (
        "a family that needs its code",
        _config({"model_type": "own", "auto_map": {"AutoModel": "x--y.Z"}}),
        "model-family",
        "code beside a model is never run; install a newer transformers, give a model of a family that it has, or",
    ),
    ("no text", _config({"model_type": "vit"}), "model-family", "no causal language model"),
    ("a vast one", _config({"num_hidden_layers": 10**9}), "bad-value", "num_hidden_layers"),
    ("vast by another name", _config({"n_layer": 10**9}), "bad-value", "n_layer"),
    ("layers repeated", _config({"attention_types": [[["global"], 10**9]]}), "bad-value", "attention_types"),
    ("too small a vocabulary", _config({"vocab_size": 100}), "out-of-range", "model.vocabulary_size"),
    ("heads that do not fit", _config({"num_attention_heads": 5}), "model-refused", ""),
    ("more layers than there are", _config({"num_hidden_layers": 4}), "checkpoint-mismatch", "layers.3"),
    ("fewer layers", _config({"num_hidden_layers": 2}), "checkpoint-mismatch", "layers.2"),
    (
        "another width",
        _config({"intermediate_size": 64}),
        "checkpoint-mismatch",
        "bad: model.layers.0.mlp.down_proj.weight is [32, 48], but config.json says [32, 64]; give the folder",
    ),
    ("a tensor too many", _one_more, "checkpoint-mismatch", "model.layers.7.secret"),
    (
        "no number",
        _diverged(float("nan")),
        "checkpoint-not-finite",
        "model.norm.weight has numbers that are not finite",
    ),
    ("an infinity", _diverged(-float("inf")), "checkpoint-not-finite", "model.norm.weight"),
    ("torn weights", _torn, "file-unreadable", "model.safetensors"),
]


@pytest.mark.parametrize(("change", "code", "words"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_what_cannot_be_trained_is_refused_in_one_line(
    tmp_path: Path, change: Callable[[Path], None], code: str, words: str
) -> None:
    saved("llama", tmp_path / "bad")
    change(tmp_path / "bad")
    with pytest.raises(UserError) as caught:
        run = resolved_run(run_of("bad"), tmp_path)
        build_run_model(run, base_files(run, tmp_path))
    assert (caught.value.code, caught.value.exit_code) == (code, 2)
    assert words in str(caught.value) and len(str(caught.value).splitlines()) == 1


def test_of_a_known_family_code_is_left_alone(tmp_path: Path) -> None:
    library_model = saved("llama", tmp_path / "coded")
    _with("modeling_own.py", "raise SystemExit")(tmp_path / "coded")
    _config({"auto_map": {"AutoConfig": "modeling_own.Config", "AutoModelForCausalLM": "modeling_own.Model"}})(
        tmp_path / "coded"
    )
    assert "auto_map" not in whole_config(tmp_path / "coded")
    loss = _built(tmp_path, "coded").loss(_batch())
    assert float(loss.detach()) == pytest.approx(float(_loss_of(library_model, _batch()).detach()), abs=1e-5)
    with raises_code("model-has-code", UserError, "without *.py"):
        check_computed_plainly(tmp_path / "coded")


def test_numbers_that_json_does_not_have_are_read_and_exported(tmp_path: Path) -> None:
    sizes = dict.fromkeys(("head_dim", "mamba_d_head", "mamba_d_state", "mamba_chunk_size"), 8)
    saved("falcon_h1", tmp_path / "h1", **CONFIGS["llama"] | sizes, mamba_d_ssm=32, mamba_n_heads=4)
    model = _built(tmp_path, "h1")
    limits = [0.0, {"__float__": "Infinity"}]
    assert json.loads((tmp_path / "h1" / "config.json").read_text())["time_step_limit"] == limits
    assert list(model.library_model.config.time_step_limit) == [0.0, float("inf")]
    export_model(tmp_path / "out", dict(model.named_parameters()), model.spec, 7, {})
    assert json.loads((tmp_path / "out" / "config.json").read_text())["time_step_limit"] == limits
    _config({"time_step_limit": [0.0, {"__float__": [1]}]})(tmp_path / "h1")
    with raises_code("model-refused", UserError):
        _built(tmp_path, "h1")


def test_labels_of_a_configuration_take_no_memory(tmp_path: Path) -> None:
    saved("llama", tmp_path / "labels")
    _config({"num_labels": 10**9})(tmp_path / "labels")
    assert "num_labels" not in json.dumps(whole_config(tmp_path / "labels"))
    assert resolved_run(run_of("labels"), tmp_path).model.num_parameters > 0


def test_weights_in_parts_are_read_and_one_that_is_missing_is_named(tmp_path: Path) -> None:
    library_model = saved("llama", tmp_path / "parts")
    library_model.save_pretrained(tmp_path / "parts", max_shard_size="60KB")
    (tmp_path / "parts" / "model.safetensors").unlink()
    parts = sorted((tmp_path / "parts").glob("model-*.safetensors"))
    assert len(parts) > 1
    loss = _built(tmp_path, "parts").loss(_batch())
    assert float(loss.detach()) == pytest.approx(float(_loss_of(library_model, _batch()).detach()), abs=1e-5)
    parts[0].unlink()
    with raises_code("checkpoint-mismatch", UserError):
        _built(tmp_path, "parts")


def test_files_of_another_model_than_the_runs_are_refused(folder: Path, tmp_path: Path) -> None:
    run = resolved_run(run_of("llama"), folder)
    with raises_code("checkpoint-mismatch", UserError, "says", "but the run"):
        build_run_model(run, folder / "gpt2")
    other = run.model.model_copy(update={"num_parameters": run.model.num_parameters + 1})
    with raises_code("checkpoint-mismatch", UserError, "another version of transformers"):
        build_run_model(run.model_copy(update={"model": other}), folder / "llama")
    vast = resolved_run(run_of("gpt_neox"), folder)  # of a stranger, whose configuration is larger than the run says
    copy = shutil.copytree(folder / "gpt_neox", tmp_path / "vast")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"vocab_size": 288, "intermediate_size": 10**9}))
    ratio = vast.model.model_copy(update={"feed_forward_ratio": 10**9 / 32})
    with raises_code("checkpoint-mismatch", UserError, "parameters, but the run says"):
        build_run_model(vast.model_copy(update={"model": ratio}), copy)
    with raises_code("model-files-needed", UserError, "--model-dir"):
        build_run_model(run, None)
    run = resolved_run(run_of("gemma2", "from_scratch = true"), folder)
    other = run.model.model_copy(update={"constants_sha256": "ab" * 32})
    with raises_code("checkpoint-mismatch", UserError, "begin with other constants"):
        build_run_model(run.model_copy(update={"model": other}), folder / "gemma2")


def test_a_configuration_that_hides_a_large_model_takes_no_memory(folder: Path, tmp_path: Path) -> None:
    run = resolved_run(run_of("llama"), folder)
    saved("llama", tmp_path / "large")
    _config({"head_dim": 2**24})(tmp_path / "large")
    with raises_code("checkpoint-mismatch", UserError, "but the run says"):
        build_run_model(run, tmp_path / "large")
    _config({"head_dim": 8, "intermediate_size": 1024})(tmp_path / "large")
    with raises_code("checkpoint-mismatch", UserError, "bytes of weights"):
        resolved = resolved_run(run_of("large"), tmp_path)
        build_run_model(resolved, tmp_path / "large")
    saved("gpt_neox", tmp_path / "vast")
    _config({"intermediate_size": 2**40})(tmp_path / "vast")
    with raises_code("model-refused", UserError, "two layers of it"):
        resolved_run(run_of("vast"), tmp_path)


# ---------------------------------------------------------------- families that are not listed


def _refused_by_the_probe(tmp_path: Path, family: str, **config: Any) -> str:
    saved(family, tmp_path / "model", **config)
    with raises_code("model-refused", RunFileError) as caught:
        resolved_run(run_of("model"), tmp_path)
    return str(caught.value)


def test_a_model_that_sees_later_tokens_is_refused(tmp_path: Path) -> None:
    shape = {"vocab_size": 288, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    words = _refused_by_the_probe(tmp_path, "bert", **shape, num_hidden_layers=2)
    assert "a token sees those that come after it" in words


def test_the_small_model_is_two_layers_of_each_kind_and_few_tokens() -> None:
    from swarmtrain.model.huggingface_library import library_config

    kinds = ["sliding_attention"] * 5 + ["full_attention"]
    config = {**CONFIGS["gemma2"], "num_hidden_layers": 6, "layer_types": kinds, "vocab_size": 200_000}
    small = huggingface_probe._small(library_config({"model_type": "gemma2", **config}, "x"))
    assert (small.num_hidden_layers, small.vocab_size) == (2, 4096)
    assert small.layer_types == ["sliding_attention", "full_attention"]


def test_traits_of_families_are_seen(folder: Path) -> None:
    gemma, neox, llama = (_built(folder, family).traits for family in ("gemma2", "gpt_neox", "llama"))
    assert not gemma.has_plain_head, "its logits are capped"
    assert neox.has_plain_head and neox.keeps_documents_apart
    assert llama.constants is None and neox.constants is not None
    assert neox.constants["gpt_neox.layers.N.input_layernorm.weight"] == 1.0


def test_a_family_whose_tokens_see_earlier_documents_is_refused_where_they_are_packed(tmp_path: Path) -> None:
    saved("bloom", tmp_path / "small", vocab_size=288, hidden_size=32, n_layer=2, n_head=4)
    assert not _built(tmp_path, "small").traits.keeps_documents_apart
    plain = run_of("small")
    packed = {"data": plain.data.model_copy(update={"packing": "documents"})}
    with raises_code("keys-disagree", RunFileError, "data.packing"):
        resolved_run(plain.model_copy(update=packed), tmp_path)
    elsewhere = resolved_run(plain, tmp_path).model_copy(update=packed)
    with raises_code("package-missing", UserError, "does not keep documents apart"):
        build_run_model(elsewhere, tmp_path / "small")


def test_parameters_that_begin_with_a_pattern_are_no_constants() -> None:
    models = []
    for seed in range(2):
        model = nn.Module()
        model.drawn = nn.Parameter(torch.randn(3, generator=torch.Generator().manual_seed(seed)))
        model.constant = nn.Parameter(torch.full((2, 2), 0.5))
        model.pattern = nn.Parameter(torch.arange(3.0))
        models.append(model)
    assert huggingface_probe._beginnings(*models) == ({"constant": 0.5}, frozenset({"pattern"}))


# ---------------------------------------------------------------- the run file


def _section(**keys: Any) -> ModelSection:
    return ModelSection.model_validate(keys)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"source": "huggingface"}, "model.base: missing"),
        ({"base": "x/y"}, 'model.base: has no meaning with model.source = "built-in"'),
        ({"from_scratch": True}, "model.from_scratch: has no meaning"),
        ({"source": "huggingface", "base": "x/y", "width": 64}, "model.width: is read from the configuration"),
    ],
    ids=lambda value: str(value),
)
def test_keys_that_do_not_go_together_are_refused(keys: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        _section(**keys)


def test_who_has_the_weights_of_a_base_cannot_begin_with_own_ones(folder: Path) -> None:
    with raises_code("keys-disagree", RunFileError, "merge.init"):
        run_of("llama", merge='init = "own"')
    assert isinstance(run_of("llama", "from_scratch = true", merge='init = "own"'), RunFile)

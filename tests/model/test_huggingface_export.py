"""Exports of models of Hugging Face, and folders that others wrote: read, measured and continued by one reader."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from codes import raises_code
from made_tokenizers import bundle, made_tokenizer, write_tokenizer
from small_models import CONFIGS, run_of, saved

from swarmtrain.cli.main import run as main
from swarmtrain.data.tokenizer_json import tokenizer_files
from swarmtrain.errors import UserError
from swarmtrain.model.base import base_files, resolved_run
from swarmtrain.model.export import copy_exported, export_model, load_exported
from swarmtrain.model.gpt import build_model
from swarmtrain.model.huggingface_model import HuggingFaceLanguageModel
from swarmtrain.model.language_model import LanguageModel, ModelSpec
from swarmtrain.model.provenance import provenance_in
from swarmtrain.model.run_model import build_run_model
from swarmtrain.model.run_stages import build_run_stage, run_stage_shapes
from swarmtrain.model.sampling import generate
from swarmtrain.model.stages import joined_weights
from swarmtrain.peer.checkpoints.export import tokenizer_of
from swarmtrain.run import RunFile
from swarmtrain.run_model import ModelSection

pytestmark = pytest.mark.slow  # importing the library alone takes seconds

TOKENS = torch.arange(5, 25)[None]


def _library(path: Path) -> Any:
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(path).eval()


def _trained(run: RunFile, files: Path) -> LanguageModel:
    """Model of a run whose weights have moved."""
    model, generator = build_run_model(run, files), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    return model


def _logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found = model(TOKENS)
    return found if isinstance(found, torch.Tensor) else found.logits


@pytest.mark.parametrize("family", CONFIGS)
def test_a_trained_model_loads_in_transformers_and_here_as_it_came(family: str, tmp_path: Path) -> None:
    saved(family, tmp_path / family)
    (tmp_path / family / "generation_config.json").write_text('{"eos_token_id": 3, "temperature": 0.5}')
    run = resolved_run(run_of(family), tmp_path)
    model = _trained(run, base_files(run, tmp_path))
    export_model(tmp_path / "out", dict(model.named_parameters()), model.spec, 7, {"run.toml": b"run"})
    library_model = _library(tmp_path / "out")
    assert library_model.dtype == torch.float32
    assert torch.allclose(_logits(library_model), _logits(model), rtol=0, atol=1e-5)
    exported = load_exported(tmp_path / "out")
    assert isinstance(exported.model, HuggingFaceLanguageModel)
    assert (exported.run_tokens, exported.model.context_tokens) == (7, 24)
    assert torch.equal(_logits(exported.model), _logits(model))
    assert generate(exported.model, [5, 6], 30, 0.0, 0) == generate(model, [5, 6], 30, 0.0, 0)
    before, after = (json.loads((tmp_path / name / "config.json").read_text()) for name in (family, "out"))
    ours = {"swarmtrain", "torch_dtype", "dtype", "tie_word_embeddings", "transformers_version"}
    ours |= {"bos_token_id", "eos_token_id", "pad_token_id"}  # of a tokenizer that is not the run's
    assert not any(after.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id"))
    assert {k: v for k, v in before.items() if k not in ours} == {k: v for k, v in after.items() if k not in ours}
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == {"temperature": 0.5}
    assert copy_exported(tmp_path / "out", tmp_path / "copy") == 7
    (tmp_path / "out" / "model.safetensors").write_bytes((tmp_path / family / "model.safetensors").read_bytes())
    with raises_code("not-a-model", UserError, "model.safetensors was altered"):
        load_exported(tmp_path / "out")


def test_what_is_never_read_here_is_not_exported(tmp_path: Path) -> None:
    saved("llama", tmp_path / "small")
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    hidden = {"attn_implementation": "someone/kernels", "use_kernels": True, "_name_or_path": "/home/anna/secret"}
    (tmp_path / "small" / "config.json").write_text(json.dumps(config | hidden))
    run = resolved_run(run_of("small"), tmp_path)
    model = build_run_model(run, base_files(run, tmp_path))
    export_model(tmp_path / "out", dict(model.named_parameters()), model.spec, 7, {})
    assert not hidden.keys() & json.loads((tmp_path / "out" / "config.json").read_text()).keys()


@pytest.mark.parametrize("family", CONFIGS)
def test_a_model_trained_in_stages_has_a_head_of_its_own(family: str, tmp_path: Path) -> None:
    saved(family, tmp_path / family)
    run = resolved_run(run_of(family, pipeline="stages = 3\nboundaries = [1, 2]"), tmp_path)
    files = base_files(run, tmp_path)
    shapes = run_stage_shapes(run, files, run.pipeline.boundaries)
    stages = [build_run_stage(run, shape, files, 0) for shape in shapes]
    with torch.no_grad():
        stages[-1].library_model.get_output_embeddings().weight.mul_(2)  # type: ignore[union-attr, operator]
    weights = joined_weights(dict(stage.named_parameters()) for stage in stages)
    export_model(tmp_path / "out", weights, ModelSpec(run.model, files), 7, {})
    x = TOKENS
    with torch.no_grad():
        for stage in stages:
            x = stage(x)
    for loaded in (_library(tmp_path / "out"), load_exported(tmp_path / "out").model):
        assert torch.allclose(_logits(loaded), x, rtol=0, atol=1e-5)


def test_a_folder_that_others_wrote_is_read(tmp_path: Path) -> None:
    library_model = saved("llama", tmp_path / "llama", max_position_embeddings=4096)
    exported = load_exported(tmp_path / "llama")
    assert (exported.run_tokens, exported.held_out, exported.model.context_tokens) == (0, b"", 2048)
    assert torch.allclose(_logits(exported.model), _logits(library_model), rtol=0, atol=1e-5)
    with raises_code("not-a-model", UserError, "copy its folder"):
        copy_exported(tmp_path / "llama", tmp_path / "copy")
    (tmp_path / "llama" / "modeling_llama.py").write_text("evil()")
    assert torch.equal(_logits(load_exported(tmp_path / "llama").model), _logits(exported.model))


def test_an_export_of_ours_that_another_program_trained_is_what_it_has_become(tmp_path: Path) -> None:
    """Read as the Qwen3 that it is, since the built-in model has no weights in its norms of queries and keys."""
    model = build_model(ModelSection(context_tokens=24, num_layers=2, width=32, num_heads=2), seed=1)
    export_model(tmp_path / "out", dict(model.named_parameters()), model.spec, 7, {})
    library_model = _library(tmp_path / "out")
    with torch.no_grad():
        library_model.model.layers[0].self_attn.q_norm.weight.mul_(2)
    library_model.save_pretrained(tmp_path / "theirs")
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert "swarmtrain" in config and provenance_in(config) is None
    exported = load_exported(tmp_path / "theirs")
    assert exported.run_tokens == 0 and isinstance(exported.model, HuggingFaceLanguageModel)
    assert torch.allclose(_logits(exported.model), _logits(library_model), rtol=0, atol=1e-5)


def test_an_export_of_ours_can_be_the_base_of_a_run_and_is_exported_anew(tmp_path: Path) -> None:
    first = build_model(ModelSection(context_tokens=24, num_layers=2, width=32, num_heads=2), seed=1)
    export_model(tmp_path / "first", dict(first.named_parameters()), first.spec, 7, {})
    run = resolved_run(run_of("first"), tmp_path)
    assert torch.allclose(_logits(build_run_model(run, base_files(run, tmp_path))), _logits(first), rtol=0, atol=1e-5)
    model = _trained(run, base_files(run, tmp_path))
    export_model(tmp_path / "second", dict(model.named_parameters()), model.spec, 9, {})
    exported = load_exported(tmp_path / "second")
    assert exported.run_tokens == 9 and isinstance(exported.model, HuggingFaceLanguageModel)
    assert torch.equal(_logits(exported.model), _logits(model))


def test_without_the_files_of_its_model_an_export_says_how_to_get_them(tmp_path: Path) -> None:
    saved("llama", tmp_path / "llama")
    run = resolved_run(run_of("llama"), tmp_path)
    for files in (None, tmp_path):
        with raises_code("model-files-needed", UserError, "--model-dir"):
            export_model(tmp_path / "out", {}, ModelSpec(run.model, files), 7, {})
    assert not (tmp_path / "out").exists()


def test_a_models_own_tokenizer_is_exported_as_it_came_without_code_and_paths(tmp_path: Path) -> None:
    import transformers

    saved("llama", tmp_path / "llama", vocab_size=320)
    write_tokenizer(tmp_path / "llama")
    path = tmp_path / "llama" / "tokenizer_config.json"
    hidden = {"auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}, "name_or_path": "/home/anna/secret", "custom": 1}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"padding_side": "left", **hidden}))
    (tmp_path / "llama" / "generation_config.json").write_text('{"eos_token_id": [0, 3]}')
    run = resolved_run(run_of("llama", 'tokenizer = "model"'), tmp_path)
    model = build_run_model(run, base_files(run, tmp_path))
    beside = tokenizer_files(bundle().to_bytes(), 24)
    export_model(tmp_path / "out", dict(model.named_parameters()), model.spec, 7, beside)
    assert (tmp_path / "out" / "generation_config.json").read_text() == '{"eos_token_id": [0, 3]}', "as it came"
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("llama", "out")]
    assert configs[0]["eos_token_id"] == configs[1]["eos_token_id"] == 2
    other = dataclasses.replace(model.spec, section=model.section.model_copy(update={"tokenizer": "tokenizer.json"}))
    export_model(tmp_path / "named", dict(model.named_parameters()), other, 7, beside)
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "named" / name).read_text())["eos_token_id"] == 0, "of the tokenizer that it has"
    written = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert not hidden.keys() & written.keys() and written["padding_side"] == "left"
    path.write_text(json.dumps(written))
    ours, theirs = (transformers.AutoTokenizer.from_pretrained(tmp_path / name) for name in ("out", "llama"))
    turns = [{"role": "user", "content": "how are you?"}]
    assert ours.apply_chat_template(turns) == theirs.apply_chat_template(turns)
    assert ours.padding_side == "left" and ours.get_vocab() == theirs.get_vocab()
    tokens = ours("how are you?", return_tensors="pt")
    assert tokens.keys() == {"input_ids", "attention_mask"}
    found = tokenizer_of(load_exported(tmp_path / "out"))
    assert found.encode(b"how are you?").tolist() == tokens["input_ids"][0].tolist() and found.document_end == (0,)


def test_a_folder_that_others_wrote_is_measured_and_continued_by_its_tokenizer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    library_model = saved("llama", tmp_path / "llama", vocab_size=320)
    write_tokenizer(tmp_path / "llama")
    (text := tmp_path / "text.txt").write_bytes(b"how are you? all is well")
    command = ["eval", str(tmp_path / "llama"), "--text", str(text), "--device", "cpu", "--json"]
    assert main(command) == 0, capsys.readouterr().err
    found = json.loads(capsys.readouterr().out)
    tokens = torch.tensor([[0, *made_tokenizer().encode(text.read_bytes()).tolist()]])
    with torch.no_grad():
        loss = library_model(tokens, labels=tokens).loss
    assert found["tokens"] == tokens.shape[1] - 1 and found["run_tokens"] == 0
    assert found["bits_per_byte"] == pytest.approx(float(loss) * found["tokens"] / 24 / math.log(2), rel=1e-5)
    command = ["generate", str(tmp_path / "llama"), "--raw", "--prompt", "how", "--tokens", "5", "--device", "cpu"]
    assert main(command) == 0
    assert capsys.readouterr().out.startswith("how")

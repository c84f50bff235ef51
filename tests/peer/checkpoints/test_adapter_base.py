"""Exported adapters: the model that one belongs to is found on this machine, and both are merged into one model."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from codes import raises_code
from model_files import model_folder, pinned
from safetensors.torch import load_file
from small_models import run_of, saved

from swarmtrain.cli.main import run as main
from swarmtrain.errors import UserError
from swarmtrain.model import weight_files
from swarmtrain.model.base import resolved_run
from swarmtrain.model.export import load_exported
from swarmtrain.model.language_model import LanguageModel
from swarmtrain.model.run_model import build_run_model
from swarmtrain.network.discovery.run_lookup import PublishedRun
from swarmtrain.peer.checkpoints.adapter_base import base_of_export, load_with_base
from swarmtrain.peer.checkpoints.export import export_from_folder, onlooker_place
from swarmtrain.peer.lifecycle.folder import PeerFolder
from swarmtrain.peer.lifecycle.node import kept_final_model, save_weights
from swarmtrain.peer.lifecycle.stop import StopFlag
from swarmtrain.peer.model_files.fetcher import FilesPlace
from swarmtrain.protocol.tokens.progress import Progress
from swarmtrain.run import PublishedSection, published_bytes, run_sha256

pytestmark = pytest.mark.slow  # importing transformers alone takes seconds

TOKENS = torch.arange(5, 25)[None]


def place(folder: Path, given: Path | None = None) -> FilesPlace:
    return onlooker_place(folder / "cache", given, StopFlag())


def ended_run(folder: Path, adapter: str, dtype: torch.dtype = torch.float32) -> tuple[LanguageModel, PublishedRun]:
    """Write the base and a peer's folder as they are at a run's end; return the model, and the run."""
    saved("llama", folder / "base").to(dtype).save_pretrained(folder / "base")
    run = resolved_run(run_of("base", adapter=adapter), folder)
    files, held_out = pinned(folder / "base", ("config.json", "model.safetensors")), b"text " * 99
    published = PublishedSection(
        created="2026-01-01T00:00:00Z",
        swarmtrain="0.2.0",
        held_out_sha256=hashlib.sha256(held_out).hexdigest(),
        held_out_bytes=len(held_out),
        model_files_sha256=files.sha256,
        model_files_bytes=len(files.to_bytes()),
    )
    model, generator = build_run_model(run, folder / "base"), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for tensor in model.trained_tensors():
            tensor.add_(torch.randn(tensor.shape, generator=generator), alpha=0.05)
    section = run.model.model_copy(update={"base": "base"})
    run = run.model_copy(update={"published": published, "model": section})
    data = published_bytes(run)
    whole = PublishedRun(data, run_sha256(data), run, held_out, b"", files.to_bytes())
    progress = Progress(round=3, run_tokens=run.run.total_tokens, peer_tokens={"12D3anna": 70})
    save_weights(folder / "peer" / "model", dict(model.trained_parameters()), whole, progress, folder / "base")
    return model, whole


def test_its_base_is_the_given_one_or_that_in_the_cache(tmp_path: Path) -> None:
    model, published = ended_run(tmp_path, 'method = "lora"')
    adapter, base = tmp_path / "peer" / "model", tmp_path / "base"
    with raises_code("model-files-needed", UserError, "is an adapter of base", "--model-dir"):
        load_with_base(adapter, place(tmp_path))
    assert base_of_export(adapter, place(tmp_path, base)) == base
    assert base_of_export(base, place(tmp_path)) is None
    kept = model_folder(tmp_path / "cache", base, pinned(base, ("config.json", "model.safetensors")))
    assert base_of_export(adapter, place(tmp_path)) == kept.path
    assert torch.equal(load_with_base(adapter, place(tmp_path)).model(TOKENS), model(TOKENS))
    peer = PeerFolder(tmp_path / "peer")
    final = kept_final_model(peer, published, kept.path)
    assert final is not None and torch.equal(final(TOKENS), model(TOKENS)) and kept_final_model(peer, published) is None


def test_it_is_merged_into_its_base_and_the_card_says_so(tmp_path: Path) -> None:
    model, _ = ended_run(tmp_path, 'method = "lora"')
    tokens = export_from_folder(tmp_path / "peer", tmp_path / "out", place(tmp_path, tmp_path / "base"), is_merged=True)
    whole = load_exported(tmp_path / "out").model
    assert tokens == 100_000 and whole.adapter is None
    assert torch.allclose(whole(TOKENS), model(TOKENS), atol=1e-5)
    card, own = ((tmp_path / name / "README.md").read_text() for name in ("out", "peer/model"))
    assert "library_name: peft" in own and "PeftModel.from_pretrained(base" in own and "--merge" in own
    assert "library_name: transformers" in card and "peft" not in card and "with a LoRA adapter, merged" in card
    for text in (own, card):
        assert "LoRA of rank 16, alpha 32, on `q_proj`, `v_proj`" in text and "| `12D3anna` | 70 |" in text
        assert "num_parameters" not in text and 'method = "lora"' in text


def exported(folder: Path, name: str, *options: str) -> Path:
    command = ["export", "--dir", str(folder / "peer"), "--model-dir", str(folder / "base"), "--to", str(folder / name)]
    assert main([*command, *options]) == 0
    return folder / name


def dtypes_in(folder: Path) -> set[torch.dtype]:
    return {tensor.dtype for path in folder.glob("*.safetensors") for tensor in load_file(path).values()}


@pytest.mark.parametrize("adapter", ["", 'method = "lora"'])
def test_a_model_has_the_numbers_of_its_base_unless_others_are_asked_for(
    adapter: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr(weight_files, "MAX_FILE_BYTES", 60_000)
    model, _ = ended_run(tmp_path, adapter, torch.bfloat16)
    merge = ["--merge"] if adapter else []
    half, whole = exported(tmp_path, "half", *merge), exported(tmp_path, "whole", "--dtype", "float32", *merge)
    for folder, dtype, atol in ((half, torch.bfloat16, 0.05), (whole, torch.float32, 1e-5)):
        assert dtypes_in(folder) == {dtype} and len([*folder.glob("*.safetensors")]) > 1
        loaded = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
        assert loaded.dtype is dtype
        with torch.no_grad():
            assert torch.allclose(loaded(TOKENS).logits.float(), model(TOKENS), atol=atol)
            assert torch.allclose(load_exported(folder).model(TOKENS), model(TOKENS), atol=atol)
        name = str(dtype).removeprefix("torch.")
        assert f"| weights | {name} |" in (folder / "README.md").read_text()
        size = json.loads((folder / "model.safetensors.index.json").read_text())["metadata"]["total_size"]
        assert size == model.spec.section.num_parameters * dtype.itemsize
    if not adapter:
        assert torch.equal(load_exported(whole).model(TOKENS), model(TOKENS))
        again = resolved_run(run_of(str(half)), tmp_path)
        assert torch.equal(build_run_model(again, half)(TOKENS), load_exported(half).model(TOKENS))
        assert main(["eval", str(half), "--device", "cpu"]) == 0
    else:
        assert dtypes_in(exported(tmp_path, "adapter")) == {torch.float32}
        assert dtypes_in(exported(tmp_path, "small", "--dtype", "bfloat16")) == {torch.bfloat16}
        close = load_exported(tmp_path / "small", tmp_path / "base").model(TOKENS)
        assert torch.allclose(close, model(TOKENS), atol=0.05)


def test_a_run_without_an_adapter_has_nothing_to_merge(tmp_path: Path) -> None:
    ended_run(tmp_path, "")
    with raises_code("options-conflict", UserError, "--merge", "no adapter"):
        export_from_folder(tmp_path / "peer", tmp_path / "out", place(tmp_path), is_merged=True)
    assert not (tmp_path / "out").exists()

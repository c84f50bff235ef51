"""Exported model as Hugging Face's libraries load it: the same logits and tokens, in one file or in several."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from codes import raises_code
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from swarmtrain.data.tokenizer_json import own_tokenizer, tokenizer_config, tokenizer_json
from swarmtrain.data.tokens import BpeTokenizer, ByteTokenizer, Tokenizer
from swarmtrain.errors import UserError
from swarmtrain.model import weight_files
from swarmtrain.model.export import export_model, load_exported
from swarmtrain.model.gpt import GPT, build_model
from swarmtrain.run_model import ModelSection

transformers = pytest.importorskip("transformers")

SECTION = ModelSection(context_tokens=64, num_layers=2, width=32, num_heads=2)
TEXT = "def größer(than):\n    return 'naïve 字' + than\n\n\nclass  Other:\n\tpass\n" * 20
TOKENIZERS: list[Tokenizer] = [ByteTokenizer(), BpeTokenizer.learn(TEXT.encode(), 290)]
both = pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=["bytes", "bpe"])


def trained_model(vocabulary_size: int = 256) -> GPT:
    """Model whose weights are all moved from their initial values, those of norms too."""
    kind = "bytes" if vocabulary_size == 256 else "bpe"
    section = SECTION.model_copy(update={"tokenizer": kind, "vocabulary_size": vocabulary_size})
    model, generator = build_model(section, seed=1), torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model


def export(folder: Path, model: GPT, tokenizer: Tokenizer = TOKENIZERS[0]) -> None:
    files = {
        "tokenizer.json": tokenizer_json(tokenizer.to_bytes()),
        "tokenizer_config.json": tokenizer_config(model.section.context_tokens),
    }
    export_model(folder, dict(model.named_parameters()), model.spec, 7, files)


def assert_equal(one: GPT, other: GPT) -> None:
    assert one.section == other.section
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@both
def test_transformers_loads_the_same_logits_and_the_same_tokens(tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = trained_model(tokenizer.vocabulary_size)
    export(tmp_path / "model", model, tokenizer)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    assert type(theirs).__name__ == "Qwen3ForCausalLM" and theirs.dtype == torch.float32
    tokens = torch.from_numpy(tokenizer.encode(TEXT.encode()).astype("int64"))[None, :64]
    with torch.no_grad():
        ours, logits = model(tokens), theirs(tokens).logits
    assert (ours - logits).abs().max() <= 1e-4 * ours.abs().max()
    encoded = their_tokenizer(TEXT, return_tensors="pt", truncation=True)
    assert encoded.keys() == {"input_ids", "attention_mask"}, "what the model's `generate` takes"
    assert torch.equal(encoded["input_ids"], tokens)
    assert their_tokenizer.decode(their_tokenizer(TEXT)["input_ids"]) == TEXT
    assert_equal(load_exported(tmp_path / "model").model, model)  # type: ignore[arg-type]


@both
@given(text=st.text(max_size=200))
@settings(max_examples=60, deadline=None)
def test_any_text_has_the_same_tokens_and_comes_back(tokenizer: Tokenizer, text: str) -> None:
    library = pytest.importorskip("tokenizers")
    loaded = library.Tokenizer.from_str(tokenizer_json(tokenizer.to_bytes()).decode())
    found = loaded.encode(text).ids
    assert found == tokenizer.encode(text.encode()).tolist()
    assert loaded.decode(found) == text


@both
def test_our_tokenizers_are_read_back_as_they_were(tokenizer: Tokenizer) -> None:
    data = tokenizer_json(tokenizer.to_bytes())
    assert own_tokenizer(data) == tokenizer.to_bytes() and tokenizer_json(data) == data
    changes: list[dict[str, Any]] = [{"normalizer": {"type": "NFC"}}, {"added_tokens": [{"id": 9, "content": "x"}]}]
    for change in changes:
        assert own_tokenizer(json.dumps(json.loads(data) | change).encode()) is None, "somebody else's"
    for other in (b"", b"{", b"[]", b'{"model": {"vocab": {}, "merges": [["a", "b"]]}}', b"\xff"):
        assert own_tokenizer(other) is None


def test_a_large_model_is_cut_into_files_as_by_huggingface_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """None of them is larger than allowed, except for a tensor that alone is."""
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(weight_files, "MAX_FILE_BYTES", 20_000)
    model = trained_model()
    export(tmp_path / "model", model)
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    split = hub.split_torch_state_dict_into_shards(
        {name: tensor.clone() for name, tensor in theirs.state_dict().items()}, max_shard_size=20_000
    )
    assert index["metadata"]["total_size"] == split.metadata["total_size"]
    files = sorted(path.name for path in (tmp_path / "model").glob("*.safetensors"))
    assert len(files) > 3 and files == sorted(set(index["weight_map"].values()))
    tokens = torch.arange(32)[None]
    with torch.no_grad():
        assert (theirs(tokens).logits - model(tokens)).abs().max() < 1e-3
    assert_equal(load_exported(tmp_path / "model").model, model)  # type: ignore[arg-type]
    (tmp_path / "model" / files[1]).write_bytes(b"torn")
    with raises_code("not-a-model", UserError, files[1]):
        load_exported(tmp_path / "model")
    (tmp_path / "model" / files[1]).unlink()
    with raises_code("no-model", UserError, files[1]):
        load_exported(tmp_path / "model")


def test_the_model_is_never_held_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written are views of the weights, but for the norms of 1 that only Qwen3 has."""
    model = trained_model()
    places = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    copied = []

    def save_file(tensors: dict[str, torch.Tensor], path: Path, metadata: object) -> None:
        copied.extend(name for name, each in tensors.items() if each.untyped_storage().data_ptr() not in places)
        path.write_bytes(save(tensors))

    monkeypatch.setattr(weight_files, "save_file", save_file)
    export(tmp_path / "model", model)
    assert {name.split(".")[-2] for name in copied} == {"q_norm", "k_norm"}


def test_a_norm_that_was_trained_elsewhere_is_not_dropped(tmp_path: Path) -> None:
    """As when the export was trained on by another program, which kept the configuration."""
    export(tmp_path / "model", trained_model())
    path, config = tmp_path / "model" / "model.safetensors", tmp_path / "model" / "config.json"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        theirs.model.layers[1].self_attn.q_norm.weight.add_(1)
    path.write_bytes(save({name: tensor.contiguous() for name, tensor in theirs.state_dict().items()}))
    told = json.loads(config.read_text())
    told["swarmtrain"]["weights_sha256"]["model.safetensors"] = weight_files.file_sha256(path)
    config.write_text(json.dumps(told))
    with raises_code("not-a-model", UserError, "layers.1.self_attn.q_norm.weight is not 1"):
        load_exported(tmp_path / "model")

"""Where a run's tokenizer comes from, the hub, a file or a model's files, and how the published run names it."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from codes import raises_code
from made_tokenizers import END, bundle, made_tokenizer, write_tokenizer
from small_hub import SmallHub, small_hub

from swarmtrain.data.tokenizer_file import TokenizerBundle
from swarmtrain.data.tokenizer_source import find_tokenizer, tokenizer_of_folder
from swarmtrain.errors import RunFileError
from swarmtrain.model.base import changed_keys, with_base_path
from swarmtrain.model.export import ExportedModel, load_exported
from swarmtrain.model.gpt import build_model
from swarmtrain.peer.bootstrap import publish_run
from swarmtrain.peer.checkpoints.export import Sampling, sample_text, tokenizer_of
from swarmtrain.peer.lifecycle.node import save_weights
from swarmtrain.protocol.devices import DeviceRequest
from swarmtrain.protocol.tokens.progress import Progress
from swarmtrain.run import RunFile, parse_published_untrusted, parse_run
from swarmtrain.run_model import ModelSection

pytest.importorskip("huggingface_hub")
NOW = datetime.datetime(2030, 1, 2, tzinfo=datetime.UTC)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SmallHub]:
    with small_hub() as hub:
        hub.use_in(monkeypatch, tmp_path / "cache")
        yield hub


def run_with(tokenizer: str, folder: Path) -> RunFile:
    model = f'tokenizer = "{tokenizer}"\nvocabulary_size = 300\nwidth = 16\nnum_heads = 2'
    text = f"[run]\ntotal_tokens = 100_000\n[model]\n{model}\n"
    data = '[data]\nsource = "text"\npaths = ["a.txt"]\nheld_out_bytes = 1024\n'
    (folder / "a.txt").write_text("\n".join(f"how are you, {number}?" for number in range(2000)))
    return with_base_path(parse_run(text + data, "run.toml"), folder)


def test_the_hubs_tokenizer_is_read_at_a_commit_that_the_published_run_names(hub: SmallHub, tmp_path: Path) -> None:
    first = hub.push("anna/tiny", {**bundle().files(64), "pytorch_model.bin": b"a pickle"})
    found = find_tokenizer("anna/tiny@main", tmp_path, None)
    assert found.name == f"anna/tiny@{first}" and found.tokenizer.bundle == bundle()
    assert not any("pytorch_model" in asked for asked in hub.asked)
    hub.push("anna/tiny", {"tokenizer.json": b"{}"})
    run = run_with(f"anna/tiny@{first}", tmp_path)
    published = publish_run(run, tmp_path, NOW)
    again = parse_published_untrusted(published.data, published.sha256)
    assert again.model.tokenizer == f"anna/tiny@{first}"
    assert published.tokenizer == bundle().to_bytes() and published.run.published == again.published
    assert not changed_keys(again, run) and not changed_keys(again, run_with("anna/tiny", tmp_path))
    for other in ("anna/other", f"anna/tiny@{'0' * 40}", "bpe"):
        assert changed_keys(again, run_with(other, tmp_path))


def test_what_the_hub_does_not_give_is_one_line(hub: SmallHub, tmp_path: Path) -> None:
    hub.push("anna/tiny", {"tokenizer.json": b"{}"})
    hub.push("anna/slow", {"config.json": b"{}"})
    for name, code in (
        ("anna/none", "tokenizer-not-loaded"),
        ("anna/tiny@v9", "tokenizer-not-loaded"),
        ("anna/tiny", "bad-tokenizer"),
        ("anna/slow", "no-tokenizer-file"),
    ):
        with raises_code(code, RunFileError, "model.tokenizer"):
            find_tokenizer(name, tmp_path, None)


def test_a_published_run_says_nothing_of_the_folder_that_its_tokenizer_was_in(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "secret")
    run = run_with("secret/tokenizer.json", tmp_path)
    published = publish_run(run, tmp_path, NOW)
    assert b"secret" not in published.data and b'tokenizer = "tokenizer.json"' in published.data
    assert not changed_keys(published.run, run)
    assert len(published.tokenizer) == published.run.published.tokenizer_bytes  # type: ignore[union-attr]


def test_an_export_has_the_tokenizers_own_files_and_is_read_back_with_them(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "base")
    published = publish_run(run_with("base/tokenizer.json", tmp_path), tmp_path, NOW)
    model = build_model(published.run.model, 0)
    save_weights(tmp_path / "model", dict(model.named_parameters()), published, Progress(), None)
    assert tokenizer_of_folder(tmp_path / "model").bundle == bundle()
    exported = load_exported(tmp_path / "model")
    again = tokenizer_of(exported)
    assert again.to_bytes() == published.tokenizer and again.document_end == made_tokenizer().document_end
    for name in ("config.json", "generation_config.json"):
        assert (json.loads((tmp_path / "model" / name).read_text())["eos_token_id"],) == again.document_end
    library = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(tmp_path / "model")
    assert library("how are you?")["input_ids"] == again.encode(b"how are you?").tolist()
    chat = [{"role": "user", "content": "how"}]
    assert library.apply_chat_template(chat, tokenize=False) == f"<|user|>how{END}\n" and library.eos_token == END
    assert TokenizerBundle.from_bytes_untrusted(published.tokenizer).chat_template == bundle().chat_template
    assert json.loads((tmp_path / "model" / "tokenizer_config.json").read_text())["model_max_length"] == 128


@pytest.mark.parametrize("in_tokens", [False, True])
def test_what_a_model_writes_ends_with_the_token_that_ends_a_text(
    monkeypatch: pytest.MonkeyPatch, in_tokens: bool
) -> None:
    files = bundle().files(64)
    model = build_model(ModelSection(tokenizer="base/tokenizer.json", vocabulary_size=300), 0)
    exported = ExportedModel(
        model=model, tokenizer=files.pop("tokenizer.json"), held_out=b"", run_tokens=0, beside_tokenizer=files
    )
    made = made_tokenizer()
    script = iter([*made.encode(b" all is well").tolist(), *made.document_end, *made.encode(b" or not").tolist()])
    monkeypatch.setattr(
        model, "next_logits", lambda tokens, cache: torch.nn.functional.one_hot(torch.tensor(next(script)), 300)
    )
    sampling = Sampling(num_tokens=40, temperature=0.0, seed=0, device=DeviceRequest("cpu"))
    counted: list[int] = []
    prompt = made.encode_prompt(f"the sun{END}") if in_tokens else f"the sun{END}"
    assert sample_text(exported, prompt, sampling, counted.append) == " all is well"
    assert sum(counted) == len(made.encode(b" all is well")) + 1

"""Hugging Face data sets on this machine: read, streamed, resumed, and their errors in one line."""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import json
import types
from pathlib import Path

import pytest
import torch
from codes import raises_code

from swarmtrain.data import huggingface
from swarmtrain.data.mixture import PeerPlace
from swarmtrain.data.prepare import publishable_data, training_batches, training_data
from swarmtrain.data.streams import StreamPlace, TextBlocks
from swarmtrain.errors import RunFileError
from swarmtrain.run import RunFile

if importlib.util.find_spec("datasets") is None:  # importing it takes a second
    pytest.skip("datasets is not installed", allow_module_level=True)


def _run(**data: object) -> RunFile:
    defaults = {"source": "datasets", "dataset": "stories", "held_out_bytes": 1024, "field": "story"}
    return RunFile.model_validate(
        {"run": {"total_tokens": 100_000}, "model": {"context_tokens": 32}, "data": defaults | data}
    )


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    import datasets
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    (tmp_path / "stories").mkdir()
    for part in range(3):
        rows = [{"story": " ".join(f"w{part}{i:02}{j * j * (i + 7):x}" for j in range(60)), "id": i} for i in range(50)]
        (tmp_path / "stories" / f"train-{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_a_local_folder_is_read_and_cut(base: Path) -> None:
    run = _run()
    held_out, tokenizer_bytes, *_ = publishable_data(run, base)
    data = training_data(run, base, held_out.text, tokenizer_bytes, base / "cache")
    (text,) = data.sources
    assert 0.8 * 1024 < len(held_out.text) <= 1024 and tokenizer_bytes == b""
    assert text.corpus.num_documents > 100
    assert data.tokenizer.decode(text.tokens[:20]) == text.corpus.text[:20].tobytes()
    again = training_data(run, base, held_out.text, b"", base / "cache")
    assert again.digest == data.digest and len(list((base / "cache").iterdir())) == 1


def test_a_saved_data_set_is_read(base: Path) -> None:
    import datasets

    saved = datasets.Dataset.from_dict({"story": [f"story number {i} " * 20 for i in range(40)] + ["", None]})
    datasets.DatasetDict({"train": saved}).save_to_disk(str(base / "saved"))
    run = _run(dataset="saved")
    assert training_data(run, base, b"", b"", None).sources[0].corpus.num_documents == 40
    with raises_code("no-such-split", RunFileError, '"test"', "train"):
        training_data(_run(dataset="saved", split="test"), base, b"", b"", None)


def _draw(run: RunFile, base: Path, peer_id: str, position: int, num_batches: int) -> list[torch.Tensor]:
    data = training_data(run, base, b"", b"", None)
    place = PeerPlace(run_sha256="aa", peer_id=peer_id, position=position)
    source = training_batches(run, data, place)
    return [source.next_batch() for _ in range(num_batches)]


def test_a_stream_is_the_peers_own_and_resumes(base: Path) -> None:
    run = _run(streaming=True)
    whole = _draw(run, base, "p", 0, 80)  # more than one pass
    assert whole[0].shape == (16, 33)
    for position in (3, 76):
        resumed = _draw(run, base, "p", position, 4)
        assert all(torch.equal(a, b) for a, b in zip(resumed, whole[position:], strict=False))
    assert not torch.equal(_draw(run, base, "q", 0, 1)[0], whole[0])


def test_each_pass_of_a_stream_reads_every_text_once(base: Path) -> None:
    section = _run(streaming=True).data
    everything = sorted(huggingface.read_texts(section, base))
    rows = huggingface.HubRows(section, base)
    assert rows.num_files == 3
    everything = [text + b"\n" for text in everything]
    passes = []
    for seed in (0, 77, 2**100 + 140):
        blocks = itertools.takewhile(
            lambda block: block[0].epoch == 0, TextBlocks(rows, b"", seed).from_place(StreamPlace())
        )
        passes.append([text for _, texts in blocks for text in texts])
    assert all(sorted(texts) == everything for texts in passes)
    assert passes[0] != passes[1] != passes[2]


def test_a_stream_never_shows_the_held_out_text(base: Path) -> None:
    run = _run(streaming=True)
    held_out, *_ = publishable_data(run, base)
    data = training_data(run, base, held_out.text, b"", None)
    assert len(data.sources[0].tokens) == 0 and len(data.digest) == 64
    source = training_batches(run, data, PeerPlace(run_sha256="a", peer_id="p"))
    read = b"".join(bytes(source.next_batch().flatten().tolist()) for _ in range(60))
    assert not [line for line in held_out.text.splitlines() if line[:150] in read]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({"dataset": "nobody/nothing-here"}, 'data.dataset: cannot load "nobody/nothing-here"'),
        ({"split": "validation"}, 'split "validation"'),
        ({"field": "text"}, 'has no field "text" (it has: id, story)'),
        ({"field": "id"}, '"id" in row 0 of "stories" is not a string'),
    ],
)
def test_errors_are_one_line(base: Path, data: dict[str, str], expected: str) -> None:
    with pytest.raises(RunFileError) as caught:
        publishable_data(_run(**data), base)
    assert expected in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_library_names_the_extra(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> types.ModuleType:
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with raises_code("package-missing", RunFileError, "pip install 'datasets>="):
        publishable_data(_run(), base)

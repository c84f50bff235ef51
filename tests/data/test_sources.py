"""Several sources, from the run file to batches; and each form of text resumes in its middle, to the sample."""

from __future__ import annotations

import datetime
import gzip
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from codes import raises_code
from fake_hub import fake_hub

from swarmtrain.data import streams
from swarmtrain.data.corpus import held_out_of_sources
from swarmtrain.data.mixture import MixedBatches, PeerPlace
from swarmtrain.data.prepare import first_look, publishable_data, training_batches, training_data
from swarmtrain.errors import RunFileError
from swarmtrain.peer.bootstrap import publish_run
from swarmtrain.run import RunFile, parse_published_untrusted, run_sha256

HAS_DATASETS = importlib.util.find_spec("datasets") is not None
HAS_PARQUET = importlib.util.find_spec("pyarrow") is not None
CONTEXT, BATCH = 32, 4


def stories(name: str, number: int = 60) -> list[str]:
    return [" ".join(f"{name}{i:02}{j * j * (i + 7):x}" for j in range(90)) for i in range(number)]


def run_of(*sources: dict[str, object], **more: Any) -> RunFile:
    """A run with these sources; one without a name is the section's own."""
    data = dict(sources[0]) if "name" not in sources[0] else {"sources": list(sources)}
    table = {
        "run": {"total_tokens": 100_000},
        "model": {"context_tokens": CONTEXT},
        "inner": {"batch_sequences": BATCH},
        "data": data | more.pop("data", {}),
    }
    return RunFile.model_validate(table | more)


def published_run(run: RunFile, base: Path) -> tuple[RunFile, bytes, bytes]:
    """Return (the run, its held-out text, its tokenizer) as a volunteer gets them."""
    found = publish_run(run, base, datetime.datetime(2030, 1, 2, tzinfo=datetime.UTC))
    return parse_published_untrusted(found.data, run_sha256(found.data)), found.held_out, found.tokenizer


def batches_of(run: RunFile, base: Path, held_out: bytes, position: int = 0, cache: Path | None = None) -> MixedBatches:
    data = training_data(run, base, held_out, b"", cache)
    return training_batches(run, data, PeerPlace(run_sha256="a1", peer_id="p", position=position))


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with the same text in each form."""
    texts = stories("w")
    lines = "".join(json.dumps({"text": text, "id": number}) + "\n" for number, text in enumerate(texts)).encode()
    (tmp_path / "many").mkdir()
    for number, text in enumerate(texts):
        (tmp_path / "many" / f"{number:02}.txt").write_text(text)
    (tmp_path / "a.jsonl").write_bytes(lines)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    if zstandard := importlib.util.find_spec("zstandard") and importlib.import_module("zstandard"):
        (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(lines))
    if HAS_PARQUET:
        parquet = importlib.import_module("pyarrow.parquet")
        parquet.write_table(importlib.import_module("pyarrow").table({"text": texts}), tmp_path / "a.parquet")
    (tmp_path / "set").mkdir()
    for part in range(3):
        rows = (json.dumps({"text": text}) + "\n" for text in texts[20 * part : 20 * part + 20])
        (tmp_path / "set" / f"train-{part}.jsonl").write_text("".join(rows))
    monkeypatch.setattr(streams, "BLOCK_ROWS", 8)
    if not HAS_DATASETS:
        yield tmp_path
        return
    with fake_hub(monkeypatch, tmp_path / "cache") as hub:
        shards = {
            f"data/train-0000{part}-of-00003.jsonl": (tmp_path / "set" / f"train-{part}.jsonl").read_bytes()
            for part in range(3)
        }
        hub.push("anna/stories", shards)
        yield tmp_path


FORMS: dict[str, dict[str, object]] = {
    "text": {"source": "text", "paths": ["many/*.txt"]},
    "jsonl": {"source": "jsonl", "paths": ["a.jsonl"]},
    "gz": {"source": "jsonl", "paths": ["a.jsonl.gz"]},
    "zst": {"source": "jsonl", "paths": ["a.jsonl.zst"]},
    "parquet": {"source": "parquet", "paths": ["a.parquet"]},
    "folder": {"source": "datasets", "dataset": "set"},
    "streamed folder": {"source": "datasets", "dataset": "set", "streaming": True},
    "hub": {"source": "datasets", "dataset": "anna/stories"},
    "streamed hub": {"source": "datasets", "dataset": "anna/stories", "streaming": True},
}
NEEDS = {"zst": "zstandard", "parquet": "pyarrow"} | {
    name: "datasets" for name, keys in FORMS.items() if keys["source"] == "datasets"
}


def named(form: str, **more: object) -> dict[str, object]:
    return {"name": form.replace(" ", "-"), **FORMS[form], **more}


@pytest.mark.parametrize("form", [*FORMS, "mixture"])
def test_each_form_goes_on_in_its_middle_to_the_sample(base: Path, form: str) -> None:
    kinds = ["gz", "streamed folder", "text", "streamed hub"] if form == "mixture" else [form]
    for kind in kinds:
        pytest.importorskip(NEEDS.get(kind, "json"))
    sources = [named(kind, weight=weight) for kind, weight in zip(kinds, (3, 1, 2, 1), strict=False)]
    run, held_out, _ = published_run(
        run_of(
            *(sources if form == "mixture" else [FORMS[form]]),
            data={"held_out_bytes": 16_384} if form == "mixture" else {"held_out_bytes": 2048},
        ),
        base,
    )
    whole = batches_of(run, base, held_out)
    expected = [whole.next_batch() for _ in range(130)]
    for cache in (None, base / "kept"):  # the second time, what the first wrote there
        for position in (61, 120):
            resumed = batches_of(run, base, held_out, position, cache)
            for number in range(position, position + 5):
                assert torch.equal(resumed.next_batch(), expected[number])
    read = b"".join(bytes(row) for batch in expected for row in batch.tolist())
    assert not [line for line in held_out.splitlines() if line[100:300] in read], "nothing held out is trained on"


def test_sources_come_by_weight_and_smaller_batches_too(base: Path) -> None:
    (base / "b.txt").write_text("\n".join(stories("B")))
    run, held_out, _ = published_run(
        run_of(
            named("text", weight=3),
            {"name": "other", "source": "text", "paths": ["b.txt"]},
            inner={"batch_sequences": 16},
            data={"held_out_bytes": 8192},
        ),
        base,
    )
    batches = batches_of(run, base, held_out)
    drawn = torch.stack([batches.next_batch() for _ in range(1500)])
    is_other = (drawn == ord("B")).any(-1)
    assert float(is_other.float().mean()) == pytest.approx(0.25, abs=0.01 / 4)
    for most in (1, 2, 7):
        assert float(is_other[:, :most].float().mean()) == pytest.approx(0.25, abs=0.01)


def test_the_held_out_text_is_cut_from_each_source_by_weight_and_from_none_is_it_trained_on(base: Path) -> None:
    shared = " ".join(f"shared{j * j:x}" for j in range(900))
    (base / "b.txt").write_text(shared)
    (base / "c.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in [shared, *stories("c", 300)]))
    sources = [
        named("text", weight=1),
        {"name": "b", "source": "text", "paths": ["b.txt", "many/0*.txt"], "weight": 0.01},
        {"name": "c", "source": "jsonl", "paths": ["c.jsonl"], "weight": 3},
    ]
    (base / "tiny.txt").write_text(shared[:5000])
    sources[1]["paths"] = ["tiny.txt"]
    run = run_of(*sources, data={"held_out_bytes": 12_288 + 4096})
    with raises_code("too-little-text", RunFileError, "source b: the corpus has 5000 bytes"):
        publishable_data(run, base)
    sources[1]["paths"] = ["b.txt", "many/*.txt"]
    run, held_out, _ = published_run(run_of(*sources, data={"held_out_bytes": 12_288 + 4096}), base)
    parts = held_out_of_sources(run, held_out)
    assert list(parts) == ["text", "b", "c"] and b"".join(parts.values()) == held_out
    assert 0.8 * 4096 < len(parts["b"]) <= 4096 and 0.8 * 4096 < len(parts["text"]) <= 4096
    assert 0.8 * 8192 < len(parts["c"]) <= 8192
    data = training_data(run, base, held_out, b"", base / "kept")
    pieces = [held_out[begin : begin + 200] for begin in range(0, len(held_out) - 200, 500)]
    for text in data.sources:
        assert not [piece for piece in pieces if b"\n" not in piece and piece in text.corpus.text.tobytes()]
    again = training_data(run, base, held_out, b"", base / "kept")
    assert again.digest == data.digest and len(list((base / "kept").iterdir())) == 3, "each is kept by itself"
    assert data.digest not in [text.corpus.digest for text in data.sources]


def test_a_tokenizer_is_learnt_from_all_sources(base: Path) -> None:
    pytest.importorskip("tokenizers")
    (base / "b.txt").write_text("\n".join(stories("zebra")))
    run = run_of(named("text"), {"name": "b", "source": "text", "paths": ["b.txt"]}, data={"held_out_bytes": 8192})
    run = run.model_copy(update={"model": run.model.model_copy(update={"tokenizer": "bpe", "vocabulary_size": 300})})
    run, held_out, tokenizer = published_run(run, base)
    data = training_data(run, base, held_out, tokenizer, None)
    assert b"zebra" in {data.tokenizer.decode([token]) for token in range(300)}
    assert all(len(text.tokens) < len(text.corpus.text) for text in data.sources)


def test_shards_are_taken_of_each_source(base: Path) -> None:
    (base / "b.txt").write_text("\n".join(stories("B")))
    merge = {"merge": {"inner_steps": 10}}
    run, held_out, _ = published_run(
        run_of(
            named("text", weight=3),
            {"name": "b", "source": "text", "paths": ["b.txt"]},
            data={"held_out_bytes": 8192},
            **merge,
        ),
        base,
    )
    data = training_data(run, base, held_out, b"", None)
    batches = training_batches(run, data, PeerPlace(run_sha256="a1", peer_id="p"))
    expected = run.num_shards(*(len(text.tokens) for text in data.sources))
    assert batches.num_shards == max(expected) == expected[0] > expected[1] > 1
    batches.use_shard(batches.num_shards - 1)
    assert batches.next_batch().shape == (BATCH, CONTEXT + 1)
    part = data.part(1, 4)
    assert [len(text.tokens) for text in part.sources] == [
        len(text.tokens) // 2 - len(text.tokens) // 4 for text in data.sources
    ]


@pytest.mark.skipif(not HAS_DATASETS, reason="datasets is not installed")
def test_each_data_set_of_the_hub_has_its_commit(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_hub(monkeypatch, base / "other-cache") as hub:
        shas = [
            hub.push(
                f"anna/{name}",
                {"train.jsonl": "".join(json.dumps({"text": text}) + "\n" for text in stories(name)).encode()},
            )
            for name in ("one", "two")
        ]
        sources = [
            {"name": name, "source": "datasets", "dataset": f"anna/{name}", "streaming": name == "two"}
            for name in ("one", "two")
        ]
        run, held_out, _ = published_run(
            run_of(sources[0], named("text"), sources[1], data={"held_out_bytes": 12_288}), base
        )
        assert run.dataset_revisions == (shas[0], "", shas[1])
        for name in ("one", "two"):
            hub.push(f"anna/{name}", {"train.jsonl": b'{"text": "newer"}\n' * 50})
        batches = batches_of(run, base, held_out)
        read = b"".join(bytes(batches.next_batch().flatten().tolist()) for _ in range(20))
        assert b"newer" not in read and b"one" in read and b"two" in read


def test_what_is_wrong_with_a_source_names_it(base: Path) -> None:
    (base / "bad.txt").write_bytes(b"caf\xe9 " * 20_000)
    run = run_of(named("text"), {"name": "bad", "source": "text", "paths": ["bad.txt"]}, data={"held_out_bytes": 8192})
    with raises_code("not-utf8", RunFileError, "source bad: data.paths: "):
        publishable_data(run, base)
    look = first_look(run, base)
    assert look.sizes[0] is not None and look.sizes[1] is None and look.num_bytes is None
    assert [problem.partition("data")[0] for problem in look.problems] == ["source bad: "]
    (base / "bad.txt").write_bytes(b"tiny")
    with raises_code("too-little-text", RunFileError, "source bad: the corpus has 5 tokens"):
        batches_of(run, base, b"")


def test_a_first_look_at_several_sources_tells_their_sizes(base: Path) -> None:
    run = run_of(named("text"), named("gz", weight=2), data={"held_out_bytes": 8192})
    look = first_look(run, base)
    assert look.problems == () and look.unseen == () and not look.is_estimated
    text = sum(len(story) for story in stories("w"))
    assert look.sizes == (text, text) and look.num_bytes == 2 * text


def test_a_run_of_one_source_is_drawn_as_before(base: Path) -> None:
    """As the windows of `test_batches.py`, which are pinned."""
    run, held_out, _ = published_run(run_of(FORMS["text"], data={"held_out_bytes": 2048}), base)
    data = training_data(run, base, held_out, b"", None)
    (text,) = data.sources
    assert data.digest == text.corpus.digest and run.published is not None
    assert run.published.held_out_source_bytes is None and held_out_of_sources(run, held_out) == {"": held_out}
    batch = training_batches(run, data, PeerPlace(run_sha256="a1", peer_id="p", position=5)).next_batch()
    corpus = text.corpus.text.tobytes()
    assert all(bytes(row) in corpus for row in batch.tolist()) and np.shares_memory(text.tokens, text.corpus.text)

"""Way from a run file to batches, with a byte tokenizer and a learnt one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from swarmtrain.data.batches import Batches
from swarmtrain.data.mixture import PeerPlace
from swarmtrain.data.prepare import TrainingData, publishable_data, training_batches, training_data
from swarmtrain.errors import BadBytesError
from swarmtrain.run import RunFile


def _run(**model: object) -> RunFile:
    data = {"source": "text", "paths": ["*.txt"], "held_out_bytes": 1024}
    return RunFile.model_validate_json(json.dumps({"run": {"total_tokens": 100_000}, "data": data, "model": model}))


def tokens_of(data: TrainingData) -> np.ndarray:
    (text,) = data.sources
    return text.tokens


@pytest.fixture
def base(tmp_path: Path) -> Path:
    for number in range(20):
        lines = [f"line {number * line} of story {number}, which is {line**3} words long\n" for line in range(40)]
        (tmp_path / f"{number:02}.txt").write_text("".join(lines))
    return tmp_path


def test_bytes_are_the_corpus_itself(base: Path) -> None:
    run = _run()
    held_out, tokenizer_bytes, *_ = publishable_data(run, base)
    data = training_data(run, base, held_out.text, tokenizer_bytes, None)
    (text,) = data.sources
    assert np.shares_memory(text.tokens, text.corpus.text)
    source = training_batches(run, data, PeerPlace(run_sha256="r", peer_id="p", position=5))
    assert isinstance(source, Batches) and source.position == 5
    assert source.next_batch().shape == (16, 129)


@pytest.mark.parametrize(("method", "num_shards"), [("gossip", 12), ("diloco", 0)])
def test_data_have_shards_where_peers_merge_at_their_own_pace_and_none_is_less_than_a_round(
    base: Path, method: str, num_shards: int
) -> None:
    run = _run(context_tokens=16)
    section = {"method": method, "inner_steps": 10}
    run = RunFile.model_validate_json(json.dumps(json.loads(run.model_dump_json()) | {"merge": section}))
    held_out, tokenizer_bytes, *_ = publishable_data(run, base)
    data = training_data(run, base, held_out.text, tokenizer_bytes, None)
    source = training_batches(run, data, PeerPlace(run_sha256="r", peer_id="p"))
    assert source.num_shards == num_shards
    assert len(data.sources[0].tokens) // 2560 == 12


def test_shards_change_neither_the_corpus_nor_its_cache(base: Path) -> None:
    run = _run()
    held_out, tokenizer_bytes, *_ = publishable_data(run, base)
    other = run.model_copy(update={"data": run.data.model_copy(update={"shards": 7})})
    first, second = (training_data(r, base, held_out.text, tokenizer_bytes, base / "cache") for r in (run, other))
    assert first.digest == second.digest and len(list((base / "cache").iterdir())) == 1


def test_a_learnt_tokenizer_is_used_by_every_peer_and_its_tokens_are_kept(base: Path) -> None:
    run = _run(tokenizer="bpe", vocabulary_size=300)
    held_out, tokenizer_bytes, *_ = publishable_data(run, base)
    first, second = (training_data(run, base, held_out.text, tokenizer_bytes, base / "cache") for _ in range(2))
    assert first.tokenizer.vocabulary_size == 300 and np.array_equal(tokens_of(first), tokens_of(second))
    assert first.tokenizer.decode(tokens_of(first)) == first.sources[0].corpus.text.tobytes()
    assert sorted(path.name.split("-")[0] for path in (base / "cache").iterdir()) == ["corpus", "tokens"]
    with pytest.raises(BadBytesError):
        training_data(run, base, held_out.text, tokenizer_bytes[:-8], None)


def test_parquet_is_published_kept_and_resumed_like_text(base: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    from pyarrow.parquet import write_table

    texts = [path.read_text() for path in sorted(base.glob("*.txt"))]
    write_table(arrow.table({"body": texts}), base / "a.parquet")
    data = {"source": "parquet", "paths": ["*.parquet"], "field": "body", "held_out_bytes": 1024}
    run = _run(context_tokens=16)
    of_columns = RunFile.model_validate_json(json.dumps(json.loads(run.model_dump_json()) | {"data": data}))
    held_out = publishable_data(run, base).held_out
    assert 0.5 * 1024 < len(publishable_data(of_columns, base).held_out.text) <= 1024
    first, again, text = (
        training_data(r, base, held_out.text, b"", base / "cache") for r in (of_columns, of_columns, run)
    )
    assert np.array_equal(tokens_of(first), tokens_of(text)) and np.array_equal(tokens_of(first), tokens_of(again))
    assert len(list((base / "cache").iterdir())) == 2
    sources = [
        training_batches(of_columns, first, PeerPlace(run_sha256="r", peer_id="p", position=at)) for at in (0, 3)
    ]
    whole = [sources[0].next_batch() for _ in range(4)]
    assert np.array_equal(whole[3], sources[1].next_batch())

"""Held-out text is cut once and deterministically; nothing of it is trained on; the cache is checked."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from codes import raises_code

from swarmtrain.data.corpus import Corpus, Document, cut_held_out, prepare_corpus
from swarmtrain.data.documents import read_documents
from swarmtrain.errors import RunFileError
from swarmtrain.run_data import DataSection

TEXT = DataSection(source="text", paths=("*.txt",))


def _lines(name: str, num_lines: int) -> bytes:
    return "".join(hashlib.sha256(f"{name} {i}".encode()).hexdigest() + "\n" for i in range(num_lines)).encode()


def _documents() -> list[Document]:
    return [Document(f"{i:02}.txt", _lines(str(i), 20 + i)) for i in range(40)]


def _write(base: Path) -> None:
    for document in _documents():
        (base / document.name).write_bytes(document.text)


def test_held_out_is_a_function_of_the_documents_and_the_seed() -> None:
    documents = _documents()
    first = cut_held_out(iter(documents), 8000, 3)
    assert first == cut_held_out(documents, 8000, 3)
    assert first != cut_held_out(documents, 8000, 4)
    assert 0.9 * 8000 < len(first.text) <= 8000
    assert len(first.names) >= 6 and first.text.endswith(b"\n")
    everything = b"".join(document.text for document in documents)
    assert all(line + b"\n" in everything for line in first.text.splitlines())


def test_held_out_of_one_line_without_end_keeps_characters_whole() -> None:
    held_out = cut_held_out([Document("one", "äöü€".encode() * 8000)], 4000, 0)
    assert 0.9 * 4000 < len(held_out.text) <= 4000
    held_out.text.decode()


def test_of_a_small_corpus_an_eighth_is_held_out() -> None:
    held_out = cut_held_out([Document("a", b"word " * 4_000)], 65_536, 0)
    assert 2000 < len(held_out.text) <= 2500
    with raises_code("too-little-text", RunFileError, "more text"):
        cut_held_out([Document("a", b"x" * 8191)], 1024, 0)


def test_the_corpus_holds_everything_else(tmp_path: Path) -> None:
    _write(tmp_path)
    held_out = cut_held_out(read_documents(TEXT, tmp_path), 8000, 0)
    corpus = prepare_corpus(TEXT, tmp_path, held_out.text, None)
    text = corpus.text.tobytes()
    assert corpus.digest == hashlib.sha256(text).hexdigest() and corpus.num_bytes == len(text)
    assert not any(line in text for line in held_out.text.splitlines())
    assert corpus.num_documents + corpus.dropped_documents == 40
    assert corpus.num_bytes + corpus.dropped_bytes == sum(len(document.text) for document in _documents())
    assert not corpus.text.flags.writeable and corpus.text.dtype == np.uint8
    kept = [d for d in _documents() if d.name not in held_out.names]
    assert all(document.text in text for document in kept)


def test_nothing_left_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(_lines("a", 50))
    with raises_code("only-held-out-text", RunFileError):
        prepare_corpus(TEXT, tmp_path, _lines("a", 50), None)


def _same(a: Corpus, b: Corpus) -> bool:
    return a.digest == b.digest and a.text.tobytes() == b.text.tobytes() and a.dropped_bytes == b.dropped_bytes


def test_the_cache_gives_the_same_corpus_until_something_changes(tmp_path: Path) -> None:
    _write(tmp_path)
    cache, held_out = tmp_path / "cache", _lines("0", 30)
    fresh = prepare_corpus(TEXT, tmp_path, held_out, None)
    for _ in range(2):
        cached = prepare_corpus(TEXT, tmp_path, held_out, cache)
        assert _same(cached, fresh) and not cached.text.flags.writeable
    (entry,) = cache.iterdir()
    assert entry.suffix == ".array"

    (tmp_path / "39.txt").write_bytes(_lines("new", 10))
    changed = prepare_corpus(TEXT, tmp_path, held_out, cache)
    assert changed.digest != fresh.digest and len(list(cache.iterdir())) == 2
    prepare_corpus(TEXT, tmp_path, _lines("1", 30), cache)
    assert len(list(cache.iterdir())) == 3


@pytest.mark.parametrize("damage", [b"", b"{}", b"not json", None])
def test_a_damaged_cache_is_made_again(tmp_path: Path, damage: bytes | None) -> None:
    _write(tmp_path)
    cache = tmp_path / "cache"
    first = prepare_corpus(TEXT, tmp_path, b"", cache)
    (entry,) = cache.iterdir()
    content = entry.read_bytes()
    entry.write_bytes(content[:-1] + b"?" if damage is None else damage)
    assert _same(prepare_corpus(TEXT, tmp_path, b"", cache), first)
    assert entry.read_bytes() == content


def test_a_cache_that_cannot_be_written_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _write(tmp_path)
    assert prepare_corpus(TEXT, tmp_path, b"", tmp_path / "00.txt" / "cache").num_documents == 40
    assert "cannot keep" in caplog.text


def test_the_standard_library_loses_its_held_out_files_and_little_else() -> None:
    documents = list(read_documents(DataSection(), Path()))
    held_out = cut_held_out(documents, 65_536, 0)
    corpus = prepare_corpus(DataSection(), Path(), held_out.text, None)
    assert len(held_out.text) > 64_000 and len(held_out.names) >= 8
    assert len(held_out.text) * 0.9 < corpus.dropped_bytes < 0.06 * sum(len(d.text) for d in documents)
    assert corpus.dropped_documents < 15
    windows = [held_out.text[i : i + 150] for i in range(0, len(held_out.text) - 150, 997)]
    text = corpus.text.tobytes()
    assert not [window for window in windows if window in text]

"""Compressed files are read as streams; a torn one, a damaged one and a bomb are one line each."""

from __future__ import annotations

import gzip
import io
import json
import sys
from pathlib import Path

import pytest
import zstandard
from codes import raises_code

from swarmtrain.data import compression, documents
from swarmtrain.data.compression import CompressionError, opened
from swarmtrain.data.documents import read_documents, survey
from swarmtrain.errors import RunFileError
from swarmtrain.run_data import SourceKeys

LINES = [json.dumps({"text": f"line {number} " + "word " * (number % 30)}) for number in range(3000)]
DATA = "\n".join(LINES).encode()


def packed(data: bytes, kind: str) -> bytes:
    return gzip.compress(data) if kind == "gz" else zstandard.compress(data)


def text_of(path: Path) -> bytes:
    with opened(path) as file:
        return file.read()


@pytest.mark.parametrize("kind", ["gz", "zst"])
def test_a_compressed_file_gives_the_documents_of_the_plain_one(tmp_path: Path, kind: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(DATA)
    (tmp_path / f"a.jsonl.{kind}").write_bytes(packed(DATA, kind))
    (tmp_path / f"a.txt.{kind}").write_bytes(packed(b"one text", kind))
    plain, same = (
        list(read_documents(SourceKeys(source="jsonl", paths=(name,)), tmp_path))
        for name in ("*.jsonl", f"*.jsonl.{kind}")
    )
    assert [each.text for each in same] == [each.text for each in plain] and len(same) == 3000
    assert same[7].name == f"a.jsonl.{kind}:8"
    (text,) = read_documents(SourceKeys(source="text", paths=(f"a.txt.{kind}",)), tmp_path)
    assert text.text == b"one text"


@pytest.mark.parametrize("kind", ["gz", "zst"])
def test_a_file_of_several_parts_is_read_to_its_end(tmp_path: Path, kind: str) -> None:
    parts = [packed(DATA[begin : begin + 40_000], kind) for begin in range(0, len(DATA), 40_000)]
    path = tmp_path / f"a.{kind}"
    path.write_bytes(b"".join(parts))
    assert text_of(path) == DATA
    path.write_bytes(b"")
    assert text_of(path) == b""


@pytest.mark.parametrize("kind", ["gz", "zst"])
@pytest.mark.parametrize("damage", ["torn", "torn in a second part", "other", "changed", "more"])
def test_a_damaged_file_is_one_line_that_names_it(tmp_path: Path, kind: str, damage: str) -> None:
    whole = packed(DATA, kind)
    path = tmp_path / f"a.txt.{kind}"
    path.write_bytes(
        {
            "torn": whole[:-100],
            "torn in a second part": whole + whole[:20],
            "other": DATA,
            "changed": whole[: len(whole) // 2] + bytes(64) + whole[len(whole) // 2 + 64 :],
            "more": whole + b"and more",
        }[damage]
    )
    with raises_code("not-decompressed", RunFileError, str(path), "copy it again") as told:
        list(read_documents(SourceKeys(source="text", paths=("*",)), tmp_path))
    assert "\n" not in str(told.value)
    if damage.startswith("torn"):
        assert "ends in the middle" in str(told.value)
    found = survey(SourceKeys(source="text", paths=("*",)), tmp_path, 1 << 25)
    assert [problem.code for problem in found.problems] == ["not-decompressed"]


@pytest.mark.parametrize("kind", ["gz", "zst"])
def test_a_bomb_is_refused_and_costs_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(compression, "_ANY_GROWTH_BYTES", 1 << 20)
    path = tmp_path / f"bomb.{kind}"
    block = zstandard.compress(bytes(1 << 26)) if kind == "zst" else gzip.compress(bytes(1 << 26))
    path.write_bytes(block)
    read = 0
    with pytest.raises(CompressionError, match="300 times"), opened(path) as file:
        while True:
            read += len(file.read(1 << 16))
    assert read <= max(1 << 20, 301 * len(block))


def test_a_chunk_of_zstandard_is_bounded_however_well_it_is_packed() -> None:
    packed = zstandard.ZstdCompressor(level=19).compress(bytes(1 << 26))
    chunks = compression._zstandard_chunks(io.BytesIO(packed), zstandard)
    assert max(map(len, chunks)) <= 1 << 24


def test_a_frame_that_asks_for_much_memory_is_refused(tmp_path: Path) -> None:
    parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=30)
    writer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    (tmp_path / "a.zst").write_bytes(writer.compress(b"text " * 100) + writer.flush())
    with pytest.raises(CompressionError, match="Zstandard"):
        text_of(tmp_path / "a.zst")


def test_a_missing_library_is_named_with_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt.zst").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with raises_code("package-missing", RunFileError, "pip install 'zstandard>="):
        list(read_documents(SourceKeys(source="text", paths=("*",)), tmp_path))


def test_a_long_line_is_refused_before_it_is_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "_MOST_LINE_BYTES", 1 << 20)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "fine"}\n{"text": "' + b"x" * (3 << 20) + b'"}\n'))
    with raises_code("file-too-long", RunFileError, "line 2 of", "1 MiB"):
        list(read_documents(SourceKeys(source="jsonl", paths=("*",)), tmp_path))


def test_sizes_are_those_of_the_text_and_estimated_where_it_was_not_read(tmp_path: Path) -> None:
    for number in range(4):
        (tmp_path / f"{number}.txt.gz").write_bytes(gzip.compress(DATA))
    section = SourceKeys(source="text", paths=("*.gz",))
    whole = survey(section, tmp_path, 1 << 25)
    assert whole.num_bytes == 4 * len(DATA) and not whole.is_estimated and whole.most_bytes is None
    part = survey(section, tmp_path, len(DATA) + 1)
    assert part.is_estimated and part.num_bytes == pytest.approx(4 * len(DATA), rel=0.01)
    (tmp_path / "5.txt").write_bytes(b"plain")
    assert not survey(SourceKeys(source="text", paths=("5.txt",)), tmp_path, 1).is_estimated

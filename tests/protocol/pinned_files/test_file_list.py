"""Lists of pinned files: one spelling, allowed names and sizes only, and which files of a model are pinned."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from codes import raises_code
from hypothesis import given
from hypothesis import strategies as st

from swarmtrain.errors import BadBytesError, RunFileError
from swarmtrain.protocol.pinned_files.file_list import (
    INDEX,
    MAX_FILE_BYTES,
    MAX_LIST_BYTES,
    MAX_SMALL_FILE_BYTES,
    PinnedFile,
    PinnedFiles,
    check_chunk_list_untrusted,
    files_of_run_untrusted,
    files_to_pin,
    is_pinned_name,
)
from swarmtrain.run import CHUNK_BYTES

CONFIG = PinnedFile("config.json", 700, "ab" * 32)
WEIGHTS = PinnedFile("model.safetensors", 3 * CHUNK_BYTES + 5, "cd" * 32, "ef" * 32)
FILES = PinnedFiles((CONFIG, WEIGHTS))


def test_a_list_is_read_as_it_was_written() -> None:
    assert PinnedFiles.from_bytes_untrusted(FILES.to_bytes()) == FILES
    assert FILES.sha256 == hashlib.sha256(FILES.to_bytes()).hexdigest()
    assert FILES.total_bytes == 700 + 3 * CHUNK_BYTES + 5


def test_the_last_chunk_is_shorter_and_a_single_one_needs_no_list() -> None:
    assert [WEIGHTS.chunk_size(chunk) for chunk in range(WEIGHTS.num_chunks)] == [CHUNK_BYTES] * 3 + [5]
    assert (WEIGHTS.chunk_list_bytes, CONFIG.chunk_list_bytes, CONFIG.num_chunks) == (4 * 32, 0, 1)


def test_files_are_about_as_large_as_the_runs_model() -> None:
    files = PinnedFiles((CONFIG, replace(WEIGHTS, size_bytes=3 * 2**30)))
    assert files_of_run_untrusted(files.to_bytes(), 2**29) == files
    with raises_code("bad-size", BadBytesError, "1000 parameters"):
        files_of_run_untrusted(files.to_bytes(), 1000)


def changed(change: Callable[[Any], object]) -> bytes:
    """Return a list in the agreed spelling with a wrong content."""
    table = json.loads(FILES.to_bytes())
    change(table)
    return json.dumps(table, sort_keys=True, separators=(",", ":")).encode()


CHANGES: dict[str, Callable[[Any], object]] = {
    "no files": lambda table: table.update(files=[]),
    "no list": lambda table: table.update(files=7),
    "no table": lambda table: table.clear(),
    "more files than allowed": lambda table: table.update(files=table["files"] * 1500),
    "another key": lambda table: table.update(more=1),
    "another field": lambda table: table["files"][0].update(mode=7),
    "a field less": lambda table: table["files"][0].pop("sha256"),
    "a file twice": lambda table: table["files"].insert(0, table["files"][0]),
    "another order": lambda table: table["files"].reverse(),
    "a name in capitals": lambda table: table["files"].insert(0, {**table["files"][1], "name": "Model.safetensors"}),
    "a path": lambda table: table["files"][1].update(name="../model.safetensors"),
    "a hidden name": lambda table: table["files"][1].update(name=".model.safetensors"),
    "a pickle": lambda table: table["files"][1].update(name="pytorch_model.bin"),
    "code": lambda table: table["files"][1].update(name="modeling.py"),
    "a long name": lambda table: table["files"][1].update(name="m" * 200 + ".safetensors"),
    "a name that is none": lambda table: table["files"][1].update(name=7),
    "no size": lambda table: table["files"][0].update(size_bytes=0),
    "a size that is true": lambda table: table["files"][0].update(size_bytes=True),
    "half a size": lambda table: table["files"][0].update(size_bytes=0.5),
    "a huge description": lambda table: table["files"][0].update(size_bytes=MAX_SMALL_FILE_BYTES + 1),
    "huge weights": lambda table: table["files"][1].update(size_bytes=MAX_FILE_BYTES + 1),
    "no hash": lambda table: table["files"][0].update(sha256=""),
    "a hash in capitals": lambda table: table["files"][0].update(sha256="AB" * 32),
    "chunks of a small file": lambda table: table["files"][0].update(chunks_sha256="ab" * 32),
    "no chunks of a large one": lambda table: table["files"][1].update(chunks_sha256=""),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_list_of_anything_else_is_refused(what: str) -> None:
    with pytest.raises(BadBytesError):
        PinnedFiles.from_bytes_untrusted(changed(CHANGES[what]))


NO_LISTS = {
    "nothing": b"",
    "a bare list": b"[]",
    "no text": b"\xff",
    "nesting": b"{" * 100_000,
    "nesting inside": b'{"files": ' + b"[" * 100_000,
    "another spelling": FILES.to_bytes() + b" ",
    "a huge number": b'{"files":[' + b"9" * 10_000 + b"]}",
    "too long": bytes(MAX_LIST_BYTES + 1),
}


@pytest.mark.parametrize("what", NO_LISTS)
def test_bytes_that_are_no_list_are_refused(what: str) -> None:
    with pytest.raises(BadBytesError):
        PinnedFiles.from_bytes_untrusted(NO_LISTS[what])


@given(st.binary(max_size=400))
def test_no_bytes_raise_anything_else(data: bytes) -> None:
    with pytest.raises(BadBytesError):
        PinnedFiles.from_bytes_untrusted(data)


def test_a_chunk_list_is_checked_by_length_and_hash() -> None:
    chunk_list = bytes(4 * 32)
    file = PinnedFile("model.safetensors", WEIGHTS.size_bytes, "cd" * 32, hashlib.sha256(chunk_list).hexdigest())
    check_chunk_list_untrusted(file, chunk_list)
    with raises_code("bad-hash", BadBytesError):
        check_chunk_list_untrusted(file, b"\1" + chunk_list[1:])
    with raises_code("bad-size", BadBytesError):
        check_chunk_list_untrusted(file, chunk_list[:-32])


# ---------------------------------------------------------------- which files of a model


ALL = ("README.md", "config.json", "model.safetensors", "pytorch_model.bin", "tokenizer.json", "vocab.json")


def chosen(*names: str, index: bytes = b"", weights: bool = True) -> tuple[str, ...]:
    return files_to_pin(names, lambda: index, weights=weights, origin="here")


def test_pickles_and_whatever_transformers_does_not_need_are_left_out() -> None:
    assert chosen(*ALL) == ("config.json", "model.safetensors", "tokenizer.json")
    assert chosen(*ALL, weights=False) == ("config.json", "tokenizer.json")
    assert not any(
        map(is_pinned_name, ("pytorch_model.bin", "model.pt", "modeling.py", "README.md", "a/b.safetensors"))
    )


def test_of_weights_in_pieces_those_in_the_index_are_taken() -> None:
    index = json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}).encode()
    pieces = ("model-1.safetensors", "model-2.safetensors")
    assert chosen("config.json", INDEX, *pieces, "consolidated.safetensors", index=index) == (
        "config.json",
        *sorted([INDEX, *pieces]),
    )
    assert chosen("config.json", INDEX, *pieces, "model.safetensors", index=index) == (
        "config.json",
        "model.safetensors",
    )
    with raises_code("checkpoint-mismatch", RunFileError):
        chosen("config.json", INDEX, pieces[0], index=index)


@pytest.mark.parametrize(
    "weight_map",
    ["", "{}", '{"weight_map": {}}', '{"weight_map": {"a": "../a.safetensors"}}', '{"weight_map": {"a": 7}}'],
)
def test_an_index_that_names_no_weights_is_refused(weight_map: str) -> None:
    with raises_code("checkpoint-mismatch", RunFileError):
        chosen("config.json", INDEX, "model-1.safetensors", index=weight_map.encode())


def test_weights_only_as_pickles_are_refused() -> None:
    with raises_code("not-safetensors", RunFileError):
        chosen("config.json", "pytorch_model.bin")

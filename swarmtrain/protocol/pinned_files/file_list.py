"""Pinned files: the list of a run's model files with their SHA-256, as the run pins it.

The published run has the SHA-256 of this list. The list has the SHA-256 of each file, and of each file's *chunk list*:
the SHA-256 of every chunk of `CHUNK_BYTES`, concatenated. So a reader checks each chunk that arrives, whoever sent it,
and what was written before a kill is checked again rather than remembered.

Only names that `transformers` reads without running code are allowed, and all sizes are bounded. Everything here is
pure.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from swarmtrain.errors import BadBytesError, RunFileError
from swarmtrain.run import CHUNK_BYTES

MAX_LIST_BYTES = 1_048_576
"""Size of a list of files at most."""
MAX_FILE_BYTES = 2**36
"""Size of a file at most, 64 GiB: its chunk list then has 8 MiB."""
MAX_SMALL_FILE_BYTES = 2**26
"""Size at most of a file without weights, which is read as a whole."""
_MAX_BYTES_A_PARAMETER, _MAX_OTHER_BYTES = 16, 2**30
"""Size at most of all files of a model: twice its weights as the widest floats, and 1 GiB."""
_MAX_FILES = 2048
_MAX_NAME = 128
_WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
MODEL_NAMES = (
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    INDEX,
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
)
"""Files besides weights that may be pinned."""
_WEIGHTS_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\.safetensors")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_KEYS = {"name", "size_bytes", "sha256", "chunks_sha256"}


def is_pinned_name(name: str) -> bool:
    """Return whether a file of this name may be pinned: weights in safetensors, or a file that describes the model."""
    return name in MODEL_NAMES or is_weights_name(name)


def is_weights_name(name: str) -> bool:
    """Return whether a file of this name may be pinned as weights."""
    return len(name) <= _MAX_NAME and _WEIGHTS_NAME.fullmatch(name) is not None


def most_bytes(name: str) -> int:
    """Return the largest size of a file of this name."""
    return MAX_FILE_BYTES if name.endswith(".safetensors") else MAX_SMALL_FILE_BYTES


@dataclass(frozen=True)
class PinnedFile:
    """One pinned file. `chunks_sha256` is the SHA-256 of its chunk list; empty for a file of a single chunk."""

    name: str
    size_bytes: int
    sha256: str
    chunks_sha256: str = ""

    @property
    def num_chunks(self) -> int:
        """Number of chunks."""
        return -(-self.size_bytes // CHUNK_BYTES)

    @property
    def chunk_list_bytes(self) -> int:
        """Size of the chunk list; 0 for a file of a single chunk, which has none."""
        return 32 * self.num_chunks if self.num_chunks > 1 else 0

    def chunk_size(self, chunk: int) -> int:
        """Return the size in bytes of a chunk."""
        return min(CHUNK_BYTES, self.size_bytes - chunk * CHUNK_BYTES)


@dataclass(frozen=True)
class PinnedFiles:
    """List of a run's model files, by name."""

    files: tuple[PinnedFile, ...]

    @property
    def total_bytes(self) -> int:
        """Size of all files together."""
        return sum(file.size_bytes for file in self.files)

    @property
    def sha256(self) -> str:
        """SHA-256 of the list, which the published run has."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def to_bytes(self) -> bytes:
        """Return the list as it is published and served: JSON with one spelling only."""
        return json.dumps(
            {"files": [vars(file) for file in self.files]}, sort_keys=True, separators=(",", ":")
        ).encode()

    @classmethod
    def from_bytes_untrusted(cls, data: bytes) -> PinnedFiles:
        """Parse a list whose hash has been checked. Raises BadBytesError if it is anything but what `to_bytes` writes
        for allowed names and sizes."""
        if len(data) > MAX_LIST_BYTES:
            raise BadBytesError(f"a list of files longer than {MAX_LIST_BYTES} bytes", code="bad-size")
        try:
            rows = json.loads(data)["files"]
            if not isinstance(rows, list) or not 0 < len(rows) <= _MAX_FILES:
                raise BadBytesError(f"a list of no files, or of more than {_MAX_FILES}", code="bad-size")
            found = cls(tuple(_file_untrusted(row) for row in rows))
        except (ValueError, TypeError, KeyError, RecursionError):
            raise BadBytesError("a list of files that cannot be read", code="bad-format") from None
        names = [file.name for file in found.files]
        if names != sorted(names) or len({name.lower() for name in names}) < len(names) or found.to_bytes() != data:
            raise BadBytesError("a list of files in another form than agreed", code="bad-format")
        return found


def files_of_run_untrusted(data: bytes, num_parameters: int) -> PinnedFiles:
    """Parse the list of a run whose model has so many parameters: of more bytes than such a model takes, the files
    would only fill the disks of those who join. Raises BadBytesError."""
    files = PinnedFiles.from_bytes_untrusted(data)
    if files.total_bytes > _MAX_BYTES_A_PARAMETER * num_parameters + _MAX_OTHER_BYTES:
        raise BadBytesError(
            f"files of {files.total_bytes} bytes for a model of {num_parameters} parameters", code="bad-size"
        )
    return files


def _file_untrusted(row: Any) -> PinnedFile:
    if not isinstance(row, dict) or row.keys() != _KEYS:
        raise BadBytesError("a list with other fields than agreed", code="bad-format")
    name, size, sha256, chunks_sha256 = (row[key] for key in ("name", "size_bytes", "sha256", "chunks_sha256"))
    if not isinstance(name, str) or not is_pinned_name(name):
        raise BadBytesError("a list that names a file of another kind than allowed", code="bad-format")
    if not isinstance(size, int) or isinstance(size, bool) or not 0 < size <= most_bytes(name):
        raise BadBytesError(f"a list with a size of {name} out of range", code="bad-number")
    hashes = (sha256, chunks_sha256) if size > CHUNK_BYTES else (sha256,)
    if not all(isinstance(each, str) and _SHA256.fullmatch(each) for each in hashes):
        raise BadBytesError(f"a list without the hashes of {name}", code="bad-format")
    if size <= CHUNK_BYTES and chunks_sha256 != "":
        raise BadBytesError(f"a list with chunks of {name}, which has only one", code="bad-format")
    return PinnedFile(name, size, sha256, chunks_sha256)


def check_chunk_list_untrusted(file: PinnedFile, chunk_list: bytes) -> None:
    """Raise BadBytesError unless `chunk_list` is the pinned one of `file`. Takes a moment: call it off the loop."""
    if len(chunk_list) != file.chunk_list_bytes:
        raise BadBytesError(f"a list of the chunks of {file.name} of another length", code="bad-size")
    if chunk_list and hashlib.sha256(chunk_list).hexdigest() != file.chunks_sha256:
        raise BadBytesError(f"a list of the chunks of {file.name} that does not match its hash", code="bad-hash")


def files_to_pin(
    names: Iterable[str], read_index: Callable[[], bytes], *, weights: bool, origin: str
) -> tuple[str, ...]:
    """Choose from the file names of a model's folder or repository those that `transformers` loads, sorted.

    `read_index` returns the contents of `INDEX`, and is called only if needed. Without `weights` only the files that
    describe the model are chosen. Raises RunFileError, which names `origin`, if the weights are not in safetensors, or
    not all there.
    """
    names = set(names)
    chosen = {name for name in MODEL_NAMES if name in names} - {INDEX}
    if weights and _WEIGHTS in names:
        chosen.add(_WEIGHTS)
    elif weights and INDEX in names:
        chosen |= {INDEX, *_shards(read_index(), names, origin)}
    elif weights:
        raise RunFileError(
            f"model.base: {origin} has neither {_WEIGHTS} nor {INDEX}; other formats can execute what they hold and "
            "are not read: save it as safetensors",
            code="not-safetensors",
        )
    return tuple(sorted(chosen))


def _shards(index: bytes, names: set[str], origin: str) -> Sequence[str]:
    try:
        shards = set(json.loads(index)["weight_map"].values())
        if not shards or not all(isinstance(name, str) and _WEIGHTS_NAME.fullmatch(name) for name in shards):
            raise ValueError
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise RunFileError(
            f"model.base: {origin}: {INDEX} does not say which files have the weights; give another model",
            code="checkpoint-mismatch",
        ) from None
    if missing := sorted(shards - names):
        raise RunFileError(
            f"model.base: {origin} has no {missing[0]}, which its {INDEX} names; fetch the model again",
            code="checkpoint-mismatch",
        )
    return sorted(shards)

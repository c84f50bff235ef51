"""Weights in safetensors files, as Hugging Face's libraries write and read them.

A model above the size of one file is cut as `huggingface_hub` does, which is not of the core install: in the order of
its names, a file begins where the next tensor would not fit. `model.safetensors.index.json` then says which file has
which tensor.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_FILE_BYTES = 2_000_000_000
"""Bytes of tensors in one file. What is not contiguous, or not on the processor, is copied for one file at a time, and
older versions of safetensors copy all of it."""

_ERROR_NUMBER = re.compile(r"os error (\d+)")


def write_weights(folder: Path, weights: Mapping[str, Tensor]) -> dict[str, str]:
    """Write the weights by name into `folder`; return the SHA-256 (hex) of each file of tensors by the file's name.

    Raises the file system's OSError.
    """
    files = _cut(weights)
    hashes = {}
    for file_name, names in files.items():
        hashes[file_name] = write_tensors(folder / file_name, {name: weights[name] for name in names})
    if len(files) > 1:
        index = {
            "metadata": {"total_size": sum(tensor.nbytes for tensor in weights.values())},
            "weight_map": {name: file_name for file_name, names in files.items() for name in names},
        }
        (folder / INDEX).write_bytes((json.dumps(index, indent=2) + "\n").encode())
    return hashes


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write tensors by name into one file; return its SHA-256 (hex). Raises the file system's OSError."""
    try:
        save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
            path,
            metadata={"format": "pt"},
        )
    except SafetensorError as error:
        raise _os_error(error) from None
    return file_sha256(path)


def _cut(weights: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Return the names of the tensors in each file, by the file's name."""
    parts: list[list[str]] = [[]]
    size = 0
    for name, tensor in weights.items():
        if parts[-1] and size + tensor.nbytes > MAX_FILE_BYTES:
            parts.append([])
            size = 0
        parts[-1].append(name)
        size += tensor.nbytes
    if len(parts) == 1:
        return {WHOLE: parts[0]}
    return {f"model-{n:05d}-of-{len(parts):05d}.safetensors": names for n, names in enumerate(parts, 1)}


def _os_error(error: SafetensorError) -> Exception:
    """Return the file system's error that the library reports as one of its own, with its number in the text."""
    found = _ERROR_NUMBER.search(str(error))
    return error if found is None else OSError(int(found[1]), os.strerror(int(found[1])))


def read_weights(folder: Path, hashes: Mapping[str, str], take: Callable[[str, Tensor], None]) -> None:
    """Call `take` with each tensor of the files in `hashes`, one after the other, and its name.

    Raises ValueError if a file has another SHA-256 (hex) than there, SafetensorError if it is none, and OSError.
    """
    check_hashes(folder, hashes)
    for file_name in hashes:
        for name, tensor in _tensors(folder / file_name):
            take(name, tensor)


def check_hashes(folder: Path, hashes: Mapping[str, str]) -> None:
    """Raise ValueError if a file has another SHA-256 (hex) than in `hashes`, and OSError."""
    for name, sha256 in hashes.items():
        if file_sha256(folder / name) != sha256:
            raise ValueError(f"{name} was altered or is incomplete")


def _tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    with safe_open(path, framework="pt", device="cpu") as file:
        for name in file.keys():  # noqa: SIM118  (it is no mapping)
            yield name, file.get_tensor(name)


def file_sha256(path: Path) -> str:
    """Return the SHA-256 (hex) of a file. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

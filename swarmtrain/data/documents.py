"""Read documents from the five sources, always in the same order; nothing here cuts or filters by content.

Files are opened only below the folder that the caller gives, with symbolic links resolved (`below.py`). Every error is
a `RunFileError` in one line that names the key, the file and the next step.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from swarmtrain.data import huggingface, parquet
from swarmtrain.data.below import below
from swarmtrain.data.compression import CompressionError, is_compressed, opened
from swarmtrain.data.overlap import near_duplicates
from swarmtrain.data.rows import columns_of, text_of_row
from swarmtrain.errors import Problem, RunFileError
from swarmtrain.run_data import SourceKeys

# Folders of a standard library that hold tests, tables, generated files or other packages.
_LEFT_OUT_FOLDERS = frozenset(
    {"__phello__", "__pycache__", "_bundled", "dist-packages", "encodings", "idle_test", "pydoc_data"}
    | {"site-packages", "test", "tests"}
)
_LEFT_OUT_FILES = frozenset({"sitecustomize.py", "usercustomize.py"})
_LEFT_OUT_BEGINNINGS = ("config-", "_sysconfigdata")  # these describe one machine's build, not Python

_MOST_BAD_FILES = 5  # after so many a survey stops
_MOST_LINE_BYTES = 1 << 28  # of a JSON lines file: a line is in memory several times while it is parsed
_LIKELY_GROWTH = 3.5  # bytes of text in a byte of a compressed file of which nothing was read


@dataclass(frozen=True)
class Document:
    """Text of one document, never empty."""

    name: str  # the file's name relative to its source, or "file:line"; for messages and for the order
    text: bytes


@dataclass(frozen=True)
class SourceFile:
    """File of a source."""

    name: str
    path: Path


@dataclass(frozen=True)
class SourceSurvey:
    """Readable documents of a source, and the problems of its unreadable files."""

    documents: list[Document]
    num_bytes: int | None
    """Bytes of all files, approximately; None if one of them is missing or unreadable."""
    problems: tuple[Problem, ...]
    """Errors that `read_documents` would raise, one per bad pattern or file.

    After five bad files the rest is not read (`is_cut`).
    """
    most_bytes: int | None = None
    """Upper bound of the text in bytes, if it is known."""
    is_cut: bool = False
    is_estimated: bool = False
    """True if `num_bytes` has compressed files that were not read to their end."""


def read_documents(section: SourceKeys, base: Path, revision: str = "") -> Iterator[Document]:
    """Yield the documents of `section`, in an order that depends only on the data.

    Paths are relative to `base`; `revision` is the commit of a hub's data set. Near duplicates are left out of
    "python-stdlib" only: other corpora are their owners' to curate (decision 6). Raises RunFileError for a source that
    is missing, empty, not UTF-8, not JSON, or lacks the field.
    """
    if section.source == "datasets":
        for number, text in enumerate(huggingface.read_texts(section, base, revision)):
            yield Document(f"{section.dataset}:{number}", text)
        return
    files = source_files(section, base)
    if section.source == "python-stdlib":
        yield from _read_stdlib(files)
        return
    empty = True
    for file in files:
        for document in _read_file(file, section):
            empty = False
            yield document
    if empty:
        raise RunFileError(_all_empty([file.path for file in files]), code="no-text")


def survey(section: SourceKeys, base: Path, most_bytes: int) -> SourceSurvey:
    """Read documents of files until `most_bytes` are reached. Unreadable files are noted as problems and skipped."""
    if section.source == "python-stdlib":
        try:
            files = _stdlib_files()
        except RunFileError as error:
            return SourceSurvey([], None, error.problems)
        return SourceSurvey(list(_read_stdlib(files)), sum(f.path.stat().st_size for f in files if f.path.exists()), ())
    problems: dict[Problem, None] = {}
    found: dict[str, Path] = {}
    for pattern in section.paths:
        try:
            found |= _files_of(pattern, base)
        except RunFileError as error:
            problems |= dict.fromkeys(error.problems)
    documents: list[Document] = []
    sizes, read = _Sizes(), 0
    most = len(problems) + _MOST_BAD_FILES
    is_complete = not problems and section.source != "parquet"  # columns may be larger than they are stored
    for file in (SourceFile(name, found[name]) for name in sorted(found)):
        if len(problems) == most:
            return SourceSurvey(documents, None, tuple(problems), None, is_cut=True)
        try:
            begun = read
            sizes.begin(_size(file, section), is_compressed(file.path))
            for document in _read_file(file, section) if read < most_bytes else ():
                documents.append(document)
                read += len(document.text)
                if read >= most_bytes:
                    break
            sizes.end(read - begun, is_whole=read < most_bytes)
        except RunFileError as error:
            problems |= dict.fromkeys(error.problems)
    if not documents and not problems:
        problems[Problem(_all_empty(list(found.values())), "no-text")] = None
    return SourceSurvey(
        documents,
        None if problems else sizes.text_bytes,
        tuple(problems),
        sizes.text_bytes if is_complete and not sizes.compressed_bytes else None,
        is_estimated=sizes.is_estimated,
    )


@dataclass
class _Sizes:
    """Sum of the bytes of text in files, of which compressed ones say nothing before they are read."""

    text_bytes: int = 0
    compressed_bytes: int = 0
    is_estimated: bool = False
    _file_bytes: int = 0
    """Size of the file that is read now, if it is compressed; else 0."""
    _whole_bytes: int = 0
    """Compressed bytes of files that were read to their end, and the text in them."""
    _whole_text_bytes: int = 0

    def begin(self, file_bytes: int, is_compressed: bool) -> None:
        """Add a file."""
        self._file_bytes = file_bytes if is_compressed else 0
        self.compressed_bytes += self._file_bytes
        self.text_bytes += file_bytes - self._file_bytes

    def end(self, read_bytes: int, *, is_whole: bool) -> None:
        """Add the text of that file if it is compressed; `read_bytes` of it were read."""
        if is_whole:
            self._whole_bytes += self._file_bytes
            self._whole_text_bytes += read_bytes if self._file_bytes else 0
            self.text_bytes += read_bytes if self._file_bytes else 0
        elif self._file_bytes:
            growth = self._whole_text_bytes / self._whole_bytes if self._whole_bytes else _LIKELY_GROWTH
            self.text_bytes += max(read_bytes, int(growth * self._file_bytes))
            self.is_estimated = True


def _size(file: SourceFile, section: SourceKeys) -> int:
    return parquet.column_bytes(file.path, section) if section.source == "parquet" else file.path.stat().st_size


def _all_empty(paths: list[Path]) -> str:
    which = f"all {len(paths)} files are empty (the first is {paths[0]})" if len(paths) > 1 else f"{paths[0]} is empty"
    return f"data.paths: {which}; name files that hold text"


def _read_file(file: SourceFile, section: SourceKeys) -> Iterator[Document]:
    match section.source:
        case "jsonl":
            return _read_jsonl(file, section)
        case "parquet":
            texts = parquet.read_texts(file.path, section)
            return (Document(f"{file.name}:{number}", text) for number, text in texts)
        case _:
            return _read_text(file)


def source_files(section: SourceKeys, base: Path) -> list[SourceFile]:
    """Return the files of any source but "datasets", sorted by name, each once. Raises RunFileError."""
    assert section.source != "datasets"
    if section.source == "python-stdlib":
        return _stdlib_files()
    assert section.paths, "the run file was checked"
    found: dict[str, Path] = {}
    for pattern in section.paths:
        found |= _files_of(pattern, base)
    return [SourceFile(name, found[name]) for name in sorted(found)]


def _files_of(pattern: str, base: Path) -> dict[str, Path]:
    """Return the files that `pattern` matches, links resolved, by their names below `base`. Raises RunFileError."""
    return {Path(name).as_posix(): below(base, base / name, "data.paths") for name in _matches(pattern, base)}


def _matches(pattern: str, base: Path) -> list[str]:
    """Return the names, below `base`, of the files that a pattern matches. Raises RunFileError if there are none."""
    if Path(pattern).is_absolute() or ".." in Path(pattern).parts:
        raise RunFileError(
            f"data.paths: {pattern} is outside the folder of the data; it is not read: write a path relative to that "
            "folder, without ..",
            code="path-outside",
        )
    path = base / pattern
    if path.is_file():
        return [pattern]
    if path.is_dir():
        raise RunFileError(
            f"data.paths: {path} is a folder; write {pattern.rstrip('/')}/**/* (or **/*.txt) for the files in it",
            code="path-is-folder",
        )
    if path.exists():
        raise RunFileError(
            f"data.paths: {path} is a pipe, a socket or a device; name a regular file", code="not-a-regular-file"
        )
    if not glob.has_magic(pattern):
        raise RunFileError(
            f"data.paths: there is no file {pattern} below {base.absolute()}; {_where(pattern, base)}",
            code="no-such-data",
        )
    found = glob.glob(pattern, root_dir=base, recursive=True)  # noqa: PTH207 (Path.glob knows no root_dir)
    names = [name for name in found if (base / name).is_file()]
    if not names:
        raise RunFileError(
            f"data.paths: no file matches {pattern} below {base.absolute()}; {_where(pattern, base)}",
            code="no-such-data",
        )
    return names


def _where(pattern: str, base: Path) -> str:
    """Return advice: the folder to give, if it can be guessed, else which file must exist where."""
    first, *rest = Path(pattern).parts
    if rest and first == base.absolute().name:
        return f"if the files are those in {base}, give the folder that has it: --data {base.absolute().parent}"
    return (
        f"correct the pattern, or give the folder with --data FOLDER, so that FOLDER/{pattern} is there (without "
        "--data, bootstrap and local look beside the run file)"
    )


def _stdlib_files() -> list[SourceFile]:
    """Return the sources of this Python's standard library, without tests, tables and generated files."""
    root = Path(sysconfig.get_path("stdlib"))
    files = []
    for folder, folders, names in os.walk(root):
        folders[:] = [f for f in folders if f not in _LEFT_OUT_FOLDERS and not f.startswith(_LEFT_OUT_BEGINNINGS)]
        relative = os.path.relpath(folder, root)
        for name in names:
            if name.endswith(".py") and name not in _LEFT_OUT_FILES and not name.startswith(_LEFT_OUT_BEGINNINGS):
                path = name if relative == "." else f"{relative}/{name}".replace(os.sep, "/")
                files.append(SourceFile(path, Path(folder, name)))
    if not files:
        raise RunFileError(
            f'data.source = "python-stdlib": this Python has no sources in {root}; use data.source = "text" with '
            "data.paths",
            code="stdlib-missing",
        )
    return sorted(files, key=lambda file: file.name)


def _read_stdlib(files: list[SourceFile]) -> Iterator[Document]:
    documents = []
    for file in files:
        try:
            text = file.path.read_bytes()
            text.decode()
        except (OSError, UnicodeDecodeError):
            continue  # a dangling link of a packager, or another encoding: not the user's mistake
        if text:
            documents.append(Document(file.name, text))
    duplicate = near_duplicates([document.text for document in documents])
    yield from (document for document, left_out in zip(documents, duplicate, strict=True) if not left_out)


def _read_text(file: SourceFile) -> Iterator[Document]:
    with _readable(file) as source:
        text = source.read()
    try:
        text.decode()
    except UnicodeDecodeError as error:
        raise RunFileError(
            f"data.paths: {file.path} is not UTF-8 text (byte {error.start}); convert it, or leave it out of the "
            "pattern",
            code="not-utf8",
        ) from None
    if text:
        yield Document(file.name, text)


def _read_jsonl(file: SourceFile, section: SourceKeys) -> Iterator[Document]:
    """Yield the document of each line of a JSON lines file. Raises RunFileError for a line without one."""
    with _readable(file) as source:
        for number, line in enumerate(iter(lambda: source.readline(_MOST_LINE_BYTES + 1), b""), start=1):
            if len(line) > _MOST_LINE_BYTES:
                raise RunFileError(
                    f"data.paths: line {number} of {file.path} has more than {_MOST_LINE_BYTES >> 20} MiB; split it, "
                    "or leave the file out of the pattern",
                    code="file-too-long",
                )
            if text := _text_of_line(line, number, file, section):
                yield Document(f"{file.name}:{number}", text)


def _text_of_line(line: bytes, number: int, file: SourceFile, section: SourceKeys) -> bytes:
    """Return the document of line `number` of a JSON lines file; b"" for a line without text. Raises RunFileError."""
    if not line.strip():
        return b""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        raise RunFileError(
            f"data.paths: line {number} of {file.path} is not JSON; correct or delete that line",
            code="not-json-lines",
        ) from None
    if not isinstance(row, dict):
        fields = ", ".join(f'"{name}": ...' for name in columns_of(section))
        raise RunFileError(
            f"data.paths: line {number} of {file.path} is not a JSON object; write {{{fields}}} on each line",
            code="not-json-lines",
        )
    return text_of_row(row, section, f"line {number} of {file.path}")


@contextlib.contextmanager
def _readable(file: SourceFile) -> Iterator[IO[bytes]]:
    """Open a file, decompressed if its name says so. Raises RunFileError if it cannot be read."""
    try:
        with opened(file.path) as source:
            yield source
    except CompressionError as error:
        raise RunFileError(
            f"data.paths: {file.path} {error}; copy it again, or leave it out of the pattern", code="not-decompressed"
        ) from None
    except OSError as error:
        raise RunFileError(
            f"data.paths: cannot read {file.path}: {error.strerror}; correct the path or its permissions",
            code="file-unreadable",
        ) from None

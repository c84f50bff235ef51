"""Read the documents of a Parquet file's columns. Needs pyarrow, which is imported when a run file asks for it."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from swarmtrain.data.rows import columns_of, no_such_field, text_of_row, without_absent
from swarmtrain.errors import RunFileError
from swarmtrain.extras import install_in_words
from swarmtrain.run_data import SourceKeys

_ROWS = 1024
"""Rows held in memory at once."""


def read_texts(path: Path, section: SourceKeys) -> Iterator[tuple[int, bytes]]:
    """Yield (row number from 1, document) for each row of `path` that is not empty. Raises RunFileError."""
    arrow = _library()
    with _opened(path, arrow) as file:
        _check_columns(path, file, section, arrow)
        columns, number = columns_of(section, file.schema_arrow.names), 0
        try:
            for batch in file.iter_batches(_ROWS, columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    if text := text_of_row(without_absent(row), section, f"row {number} of {path}"):
                        yield number, text
        except (arrow.ArrowException, OSError, UnicodeDecodeError) as error:
            raise RunFileError(
                f"data.paths: {path} cannot be read after row {number}: {_one_line(error)}; convert it again, or leave "
                "it out of the pattern",
                code="not-parquet",
            ) from None


def column_bytes(path: Path, section: SourceKeys) -> int:
    """Return the approximate size of the columns that are read, in bytes, by the file's index. Raises RunFileError."""
    arrow = _library()
    with _opened(path, arrow) as file:
        _check_columns(path, file, section, arrow)
        wanted = columns_of(section, file.schema_arrow.names)
        groups = (file.metadata.row_group(number) for number in range(file.metadata.num_row_groups))
        columns = (group.column(number) for group in groups for number in range(group.num_columns))
        return sum(
            column.total_uncompressed_size for column in columns if column.path_in_schema.split(".")[0] in wanted
        )


def _opened(path: Path, arrow: Any) -> Any:
    try:
        return importlib.import_module("pyarrow.parquet").ParquetFile(path)
    except (arrow.ArrowException, OSError) as error:
        raise RunFileError(
            f"data.paths: {path} is not Parquet: {_one_line(error)}; leave it out of the pattern", code="not-parquet"
        ) from None


def _check_columns(path: Path, file: Any, section: SourceKeys, arrow: Any) -> None:
    """Raise RunFileError unless the file has the columns that are read, of strings where a row is a text."""
    schema = file.schema_arrow
    for name in columns_of(section):
        if name not in schema.names:
            raise no_such_field(name, section, str(path), schema.names, "column")
    kind = schema.field(section.field).type if section.format == "text" else arrow.string()
    if arrow.types.is_dictionary(kind):
        kind = kind.value_type
    if not (arrow.types.is_string(kind) or arrow.types.is_large_string(kind)):
        raise RunFileError(
            f'data.field: column "{section.field}" of {path} holds {kind}, not strings; set data.field to the one that '
            "holds the text",
            code="field-not-text",
        )


def _library() -> Any:
    try:
        return importlib.import_module("pyarrow")
    except ImportError:
        raise RunFileError(
            f'data.source = "parquet" needs pyarrow: {install_in_words("parquet")}', code="package-missing"
        ) from None


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__

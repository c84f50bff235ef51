"""Read the texts of a Parquet file's column. Needs pyarrow, which is imported when a run file asks for it."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from swarmtrain.errors import RunFileError
from swarmtrain.extras import install_in_words

__all__ = ["column_bytes", "read_texts"]

_ROWS = 1024
"""Rows held in memory at once."""


def read_texts(path: Path, field: str) -> Iterator[tuple[int, bytes]]:
    """Yield (row number from 1, text) for each row of `path` whose column `field` is not empty. Raises RunFileError."""
    arrow = _library()
    with _opened(path, arrow) as file:
        _check_column(path, file, field, arrow)
        number = 0
        try:
            for batch in file.iter_batches(_ROWS, columns=[field]):
                for text in batch.column(0).to_pylist():
                    number += 1
                    if text:
                        yield number, text.encode(errors="replace")
        except (arrow.ArrowException, OSError, UnicodeDecodeError) as error:
            raise RunFileError(
                f"data.paths: {path} cannot be read after row {number}: {_one_line(error)}; convert it again, or leave "
                "it out of the pattern",
                code="not-parquet",
            ) from None


def column_bytes(path: Path, field: str) -> int:
    """Return the approximate size of column `field` in bytes, by the file's index. Raises RunFileError."""
    arrow = _library()
    with _opened(path, arrow) as file:
        _check_column(path, file, field, arrow)
        groups = (file.metadata.row_group(number) for number in range(file.metadata.num_row_groups))
        columns = (group.column(number) for group in groups for number in range(group.num_columns))
        return sum(column.total_uncompressed_size for column in columns if column.path_in_schema == field)


def _opened(path: Path, arrow: Any) -> Any:
    try:
        return importlib.import_module("pyarrow.parquet").ParquetFile(path)
    except (arrow.ArrowException, OSError) as error:
        raise RunFileError(
            f"data.paths: {path} is not Parquet: {_one_line(error)}; leave it out of the pattern", code="not-parquet"
        ) from None


def _check_column(path: Path, file: Any, field: str, arrow: Any) -> None:
    """Raise RunFileError unless the file has a column `field` of strings."""
    schema = file.schema_arrow
    if field not in schema.names:
        raise RunFileError(
            f'data.field: {path} has no column "{field}" (it has: {", ".join(sorted(schema.names)) or "none"}); set '
            "data.field to the one that holds the text",
            code="no-such-field",
        )
    kind = schema.field(field).type
    if arrow.types.is_dictionary(kind):
        kind = kind.value_type
    if not (arrow.types.is_string(kind) or arrow.types.is_large_string(kind)):
        raise RunFileError(
            f'data.field: column "{field}" of {path} holds {kind}, not strings; set data.field to the one that holds '
            "the text",
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

"""Read data sets through the library `datasets`, which is imported when a run file asks for it.

A run file comes from a stranger, and so does a data set of the hub (decision 52). The library takes a name for one of
its loaders, a folder below the current one, or a URL, whichever it finds. A data set's description, and columns of
images and sounds, may name files of this machine. Therefore:

- a name must be `owner/name` of the hub, or a folder below the one that the machine's owner gave;
- the library looks a name up from an empty folder, runs no code, and gets no login (`hub_login.py`);
- before anything is read, what it found is checked: a format for text, and files of that data set at that commit, or
  below that folder; of these only the one column of strings is read.

The library's errors are translated here.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import json
import logging
import os
import re
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from swarmtrain.data.below import below, is_plain_name
from swarmtrain.data.rows import columns_of, no_such_field, text_of_row, without_absent
from swarmtrain.errors import RunFileError, SwarmtrainError
from swarmtrain.extras import install_in_words
from swarmtrain.hub_login import hub_token
from swarmtrain.run_data import SourceKeys

_FORMATS = ("arrow", "csv", "json", "parquet", "text")
"""Loaders of the library that read text from named files, and nothing else."""
_HUB_NAME = re.compile(r"(?!buckets/)[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_CARDS = ("README.md", ".huggingface.yaml")
"""Files in which a data set describes itself."""
_log = logging.getLogger(__name__)
_standing = threading.Lock()
"""Held while the current folder is changed: a process has only one."""


def newest_revision(section: SourceKeys, base: Path) -> str:
    """Return the commit that the hub has for `section` now; "" for a folder below `base`. Raises RunFileError."""
    library = _library()
    if _folder(section, base) is not None:
        return ""
    with _errors_in_words(section):
        found = _hub(library).dataset_info(section.dataset, timeout=60.0).sha
    if not isinstance(found, str) or not re.fullmatch("[0-9a-f]{40}", found):
        raise RunFileError(
            f'data.dataset: the hub gives no commit of "{section.dataset}"; try again later', code="dataset-not-loaded"
        )
    return found


def files_bytes(section: SourceKeys, revision: str) -> int | None:
    """Return the bytes of the hub's files that a data set consists of at a commit; None if the hub does not say."""
    library = _library()
    try:
        builder, _ = _hub_builder(section, revision, library)
        info = _hub(library).dataset_info(section.dataset, revision=revision, files_metadata=True, timeout=60.0)
        sizes = {item.rfilename: item.size or 0 for item in info.siblings}
        used = [str(file) for files in builder.config.data_files.values() for file in files]
        return sum(sizes[file.partition(f"@{revision}/")[2]] for file in used)
    except Exception as error:  # where it is read, an error says what is wrong
        _log.info("how large %s is: %r", section.dataset, error)
        return None


def read_texts(section: SourceKeys, base: Path, revision: str = "") -> Iterator[bytes]:
    """Yield the texts of a data set in its order.

    Reads the hub's data set at commit `revision`; without one a folder below `base`, else the hub's newest commit.
    Raises RunFileError.
    """
    return _texts(_load(section, base, revision), section)


class HubRows:
    """Rows of a streamed data set, which is looked up once and read repeatedly. See `StreamedRows`."""

    def __init__(self, section: SourceKeys, base: Path, revision: str = "") -> None:
        """Look the data set up; see `read_texts`."""
        self._section, self._revision = section, revision
        self._rows = _load(section, base, revision)

    @property
    def name(self) -> str:
        """Name of the data set, for messages. See `StreamedRows`."""
        return self._section.dataset

    @property
    def fingerprint(self) -> str | None:
        """Identity of the content; None if it is unknown."""
        return _fingerprint(self._section, self._revision, self._rows)

    @property
    def num_files(self) -> int:
        """Number of files, or of other parts that the library can read by themselves."""
        return int(self._rows.num_shards)

    @property
    def num_rows(self) -> int | None:
        """Number of rows of all files; None if the data set does not say."""
        splits = self._rows.info.splits or {}
        return getattr(splits.get(self._section.split), "num_examples", 0) or None

    def texts(self, file: int, begin: int, end: int | None) -> Iterator[bytes]:
        """Yield the text of each row of a file from row `begin` to before row `end`; b"" for a row without text.

        Raises RunFileError. The rows before `begin` are read, and nothing is done with them.
        """
        with _errors_in_words(self._section):
            rows = self._rows.shard(num_shards=self.num_files, index=file).skip(begin)
            yield from _all_texts(rows if end is None else rows.take(max(0, end - begin)), self._section)


def fingerprint(section: SourceKeys, base: Path, revision: str = "") -> str | None:
    """Return what identifies the content of a data set on this machine; None if it is unknown."""
    return _fingerprint(section, revision, None if revision else _load(section, base, revision))


def _fingerprint(section: SourceKeys, revision: str, rows: Any) -> str | None:
    if revision:
        return f"{section.dataset}@{revision}"
    found = getattr(rows, "_fingerprint", None)
    return found if isinstance(found, str) else None


# ---------------------------------------------------------------- which one is meant


def _folder(section: SourceKeys, base: Path) -> Path | None:
    """Return the data set's folder below `base`, links resolved; None if it is one of the hub. Raises RunFileError."""
    name = section.dataset
    if not is_plain_name(name):
        raise RunFileError(
            f'data.dataset: "{name}" is neither the name of a data set on the hub nor a path below the data folder; '
            "write owner/name, or a path without ..",
            code="dataset-name",
        )
    if name in _loaders():
        raise RunFileError(
            f'data.dataset: "{name}" is a file format of the library datasets, not a data set; write owner/name for a '
            f"data set on the hub, or ./{name} for a folder",
            code="dataset-name",
        )
    folder = below(base, base / name, "data.dataset")
    if folder.is_dir():
        return folder
    if not _HUB_NAME.fullmatch(name):
        raise RunFileError(
            f'data.dataset: there is no folder "{name}" below {base.absolute()}, and a data set of the hub is '
            f"owner/name; correct it, or give the folder with --data FOLDER, so that FOLDER/{name} is there",
            code="no-such-data",
        )
    return None


def _loaders() -> frozenset[str]:
    """Return the names that the library takes for its own loaders."""
    names = importlib.import_module("datasets.packaged_modules")
    tables = ("_PACKAGED_DATASETS_MODULES", "_PACKAGED_DATASETS_MODULES_2_15_HASHES", "_MODULE_TO_EXTENSIONS")
    return frozenset(name for table in tables for name in getattr(names, table, ()))


# ---------------------------------------------------------------- load it, and look at what was found


def _load(section: SourceKeys, base: Path, revision: str) -> Any:
    """Load the rows, with only the text column if the columns are known."""
    library = _library()
    folder = None if revision else _folder(section, base)
    with _errors_in_words(section):
        if folder is not None and any((folder / name).exists() for name in ("state.json", "dataset_dict.json")):
            saved = library.load_from_disk(str(_saved_split(section, folder, base)))
            rows = saved.to_iterable_dataset() if section.streaming else saved
        else:
            if folder is None:
                builder, allowed = _hub_builder(section, revision, library)
            else:
                builder, allowed = _local_builder(section, folder, base, library), f"{folder}/"
            _check_builder(section, builder, allowed, base)
            if section.streaming:
                rows = builder.as_streaming_dataset(split=section.split)
            else:
                builder.download_and_prepare()
                rows = builder.as_dataset(split=section.split)
    return _only_columns(rows, section, library)


def _hub_builder(section: SourceKeys, revision: str, library: Any) -> tuple[Any, str]:
    """Return the library's builder for the hub's data set, and the prefix that its files must have."""
    if not _HUB_NAME.fullmatch(section.dataset):
        raise RunFileError(
            f'data.dataset: "{section.dataset}" is not a data set of the hub; write owner/name', code="dataset-name"
        )
    hub = _hub(library)
    commit = revision or hub.dataset_info(section.dataset, timeout=60.0).sha
    errors = importlib.import_module("huggingface_hub.errors")
    for name in _CARDS:
        try:
            _check_card(section, hub.hf_hub_download(section.dataset, name, repo_type="dataset", revision=commit))
        except errors.LocalEntryNotFoundError:  # the hub was not reached
            raise
        except errors.EntryNotFoundError:  # it has none
            continue  # it has none
    builder = _builder(section, section.dataset, library, revision=commit, token=hub_token())
    return builder, f"hf://datasets/{section.dataset}@{commit}/"


def _local_builder(section: SourceKeys, folder: Path, base: Path, library: Any) -> Any:
    for parent, folders, names in os.walk(folder):
        for name in (*folders, *names):
            below(base, Path(parent, name), "data.dataset")
    for name in _CARDS:
        if (folder / name).is_file():
            _check_card(section, folder / name)
    return _builder(section, str(folder), library)


def _builder(section: SourceKeys, name: str, library: Any, **more: Any) -> Any:
    """Return the library's builder for `name`, looked up from an empty folder."""
    load = library.load_dataset_builder
    # Before 4.0; later versions never run a data set's code.
    if "trust_remote_code" in inspect.signature(load).parameters:
        more["trust_remote_code"] = False
    with _in_empty_folder():
        return load(name, section.subset or None, **more)


def _check_card(section: SourceKeys, path: str | os.PathLike[str]) -> None:
    """Raise RunFileError if a data set's own description names files that are not its own."""
    with Path(path).open(encoding="utf-8", errors="replace", newline="") as file:
        text = file.read()
    yaml = importlib.import_module("yaml")
    try:
        head, card_of = text, yaml.safe_load
        if Path(path).name == "README.md":  # the library's own parser decides where the description begins and ends
            cards = importlib.import_module("huggingface_hub.repocard")
            found = cards.REGEX_YAML_BLOCK.search(text)
            head = found[2] if found else ""
            card_of = lambda text: cards.DatasetCard(text, ignore_metadata_errors=True).data.to_dict()  # noqa: E731
        # A few lines of aliases of aliases stand for billions of items, and no card needs them.
        if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(head)):
            raise ValueError
        card = card_of(text)
    except (yaml.YAMLError, ValueError, TypeError):
        raise RunFileError(
            f'data.dataset: the description of "{section.dataset}" is not YAML without aliases; use another data set',
            code="dataset-format",
        ) from None
    for named in _files_named(card.get("configs") if isinstance(card, dict) else None):
        if not is_plain_name(named):
            raise RunFileError(
                f'data.dataset: "{section.dataset}" names a file outside itself ({named[:200]!r}), which is not '
                "read; use another data set, and tell the person who invited you",
                code="dataset-foreign-file",
            )


def _files_named(part: Any, names_files: bool = False) -> Iterator[str]:
    if isinstance(part, str) and names_files:
        yield part
    elif isinstance(part, list):
        for item in part:
            yield from _files_named(item, names_files)
    elif isinstance(part, dict):
        for key, item in part.items():
            yield from _files_named(item, names_files or key in ("data_files", "data_dir"))


def _check_builder(section: SourceKeys, builder: Any, allowed: str, base: Path) -> None:
    """Raise RunFileError unless the builder reads a text format from files that begin with `allowed`."""
    modules = [kind.__module__.split(".") for kind in type(builder).__mro__]
    formats = [parts[2] for parts in modules if parts[:2] == ["datasets", "packaged_modules"] and len(parts) > 2]
    if not formats or formats[0] not in _FORMATS:
        found = formats[0] if formats else "code of its own"
        raise RunFileError(
            f'data.dataset: "{section.dataset}" is not made of files in a format that is read here (the library '
            f"datasets would use {found}); allowed: {', '.join(_FORMATS)}",
            code="dataset-format",
        )
    files = [str(file) for listed in (builder.config.data_files or {}).values() for file in listed]
    for file in files:
        if not (file.startswith(allowed) and is_plain_name(file[len(allowed) :])):
            raise RunFileError(
                f'data.dataset: "{section.dataset}" names a file outside itself ({file[:200]!r}), which is not '
                "read; use another data set, and tell the person who invited you",
                code="dataset-foreign-file",
            )
        if not allowed.startswith("hf://"):
            below(base, Path(file), "data.dataset")
    if not files:
        raise RunFileError(f'data.dataset: "{section.dataset}" has no files; use another data set', code="no-text")


def _saved_split(section: SourceKeys, folder: Path, base: Path) -> Path:
    """Return the folder of a split written by `save_to_disk`. Raises RunFileError unless all its files are in it."""
    if (folder / "dataset_dict.json").exists():
        has = json.loads(below(base, folder / "dataset_dict.json", "data.dataset").read_bytes()).get("splits")
        names = [name for name in has if isinstance(name, str)] if isinstance(has, list) else []
        if section.split not in names:
            raise RunFileError(
                f'data.split: {folder} has no split "{section.split}" (it has: {", ".join(sorted(names))}); '
                "set data.split to one of them",
                code="no-such-split",
            )
        folder = below(base, folder / section.split, "data.split")
    for name in ("state.json", "dataset_info.json"):
        below(base, folder / name, "data.dataset")
    state = json.loads((folder / "state.json").read_bytes())
    for file in state.get("_data_files", []):
        below(base, folder / str(file.get("filename")), "data.dataset")
    return folder


def _only_columns(rows: Any, section: SourceKeys, library: Any) -> Any:
    """Select the columns that are read alone: a column of images opens the files that its rows name."""
    if rows.features is None:
        return rows  # such rows are strings, numbers, lists and tables, as they are in the file
    columns = columns_of(section, rows.features)
    for name in columns:
        if name not in rows.features:
            raise no_such_field(name, section, f'"{section.dataset}"', rows.features)
        kind = rows.features[name]
        if not (isinstance(kind, library.Value) if section.format == "text" else _is_plain(kind, library)):
            if section.has_samples:
                raise RunFileError(
                    f'data.field: "{name}" of "{section.dataset}" is not made of strings and numbers; name another '
                    "data set, or another field",
                    code="field-not-text",
                )
            raise RunFileError(
                f'data.field: "{name}" of "{section.dataset}" is not a string; set data.field to the one that holds '
                "the text",
                code="field-not-text",
            )
    return rows.select_columns(columns)


def _is_plain(kind: Any, library: Any) -> bool:
    """Return whether a column is made of strings and numbers alone, in lists and tables."""
    if isinstance(kind, dict):
        return all(_is_plain(each, library) for each in kind.values())
    if isinstance(kind, list):
        return all(_is_plain(each, library) for each in kind)
    if type(kind).__name__ in ("List", "LargeList", "Sequence"):
        return _is_plain(kind.feature, library)
    return isinstance(kind, library.Value) or type(kind).__name__ == "Json"


def _texts(rows: Any, section: SourceKeys) -> Iterator[bytes]:
    """Yield the document of each row that has some text: public data sets have rows without."""
    return filter(None, _all_texts(rows, section))


def _all_texts(rows: Any, section: SourceKeys) -> Iterator[bytes]:
    """Yield the document of each row; b"" for a row without text."""
    with _errors_in_words(section):
        as_json = [name for name, kind in (rows.features or {}).items() if "Json(" in str(kind)]
        for number, row in enumerate(rows):
            yield text_of_row(without_absent(row, as_json), section, f'row {number} of "{section.dataset}"')


# ---------------------------------------------------------------- the library


def _library() -> Any:
    try:
        datasets = importlib.import_module("datasets")
    except ImportError:
        raise RunFileError(
            f'data.source = "datasets" needs datasets: {install_in_words("datasets")}', code="package-missing"
        ) from None
    datasets.disable_progress_bars()
    return datasets


def _hub(library: Any) -> Any:
    return importlib.import_module("huggingface_hub").HfApi(endpoint=library.config.HF_ENDPOINT, token=hub_token())


@contextlib.contextmanager
def _in_empty_folder() -> Iterator[None]:
    """Run the block in an empty folder, where a name that the library takes for a path finds nothing.

    Other threads of a peer name their files by absolute paths.
    """
    with _standing, tempfile.TemporaryDirectory(prefix="swarmtrain-empty-") as empty:
        before = os.open(".", os.O_RDONLY)
        try:
            os.chdir(empty)
            yield
        finally:
            os.fchdir(before)
            os.close(before)


@contextlib.contextmanager
def _errors_in_words(section: SourceKeys) -> Iterator[None]:
    """Translate errors: the library raises whatever the libraries below it raise."""
    try:
        yield
    except (SwarmtrainError, MemoryError):
        raise
    except Exception as error:
        _log.info("the library datasets: %s", error, exc_info=True)
        raise RunFileError(
            f'data.dataset: cannot load "{section.dataset}" (split "{section.split}"): {_one_line(error)}; check '
            "the name, the subset, the split and the connection (a private one needs HF_TOKEN and --use-hf-token; a "
            "folder is looked for below --data)",
            code="dataset-not-loaded",
        ) from None


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0].rstrip(".") if lines else type(error).__name__)[:200]

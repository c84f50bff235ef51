"""The adapter to the library `datasets`, imported when a run file asks for it; its errors are translated here."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from swarmtrain.errors import RunFileError
from swarmtrain.run import DataSection

__all__ = ["fingerprint", "read_texts", "stream_texts"]

SHUFFLE_DOCUMENTS = 1000  # documents held in memory to be shuffled
SKIP_DOCUMENTS = 2000  # a peer begins its stream at one of so many documents: seconds to skip at most


def read_texts(section: DataSection, base: Path) -> Iterator[bytes]:
    """The texts of a data set, in its order; a local folder is looked up relative to `base`. Raises RunFileError."""
    return _texts(_load(section, base), section)


def stream_texts(section: DataSection, base: Path, seed: int) -> Iterator[bytes]:
    """The texts of a streamed data set once through, shuffled and rotated by `seed`. Raises RunFileError.

    Its files are taken in a shuffled order, `SHUFFLE_DOCUMENTS` texts are kept to be shuffled, and a number of
    texts below `SKIP_DOCUMENTS` (and below the data set's size, where it is known) moves from the beginning to the
    end. So peers with different seeds read different parts at any time, and each reads everything.
    """
    dataset = _load(section, base)
    splits = dataset.info.splits or {}
    size = getattr(splits.get(section.split), "num_examples", 0) or SKIP_DOCUMENTS
    skip = seed % min(size, SKIP_DOCUMENTS)
    shuffled = dataset.shuffle(seed=seed % 2**32, buffer_size=SHUFFLE_DOCUMENTS)
    yield from _texts(shuffled.skip(skip), section)
    yield from _texts(shuffled.take(skip), section)


def fingerprint(section: DataSection, base: Path) -> str | None:
    """What identifies the content of a data set that is on this machine; None if that is not known."""
    found = getattr(_load(section, base), "_fingerprint", None)
    return found if isinstance(found, str) else None


def _load(section: DataSection, base: Path) -> Any:
    try:
        datasets = importlib.import_module("datasets")
    except ImportError:
        raise RunFileError("data.source = \"datasets\" needs an extra: pip install 'swarmtrain[datasets]'") from None
    datasets.disable_progress_bars()
    local = base / section.dataset
    try:
        if (local / "state.json").is_file() or (local / "dataset_dict.json").is_file():
            loaded = datasets.load_from_disk(str(local))
            if isinstance(loaded, Mapping):
                if section.split not in loaded:
                    raise RunFileError(
                        f'data.split: {local} has no split "{section.split}" (it has: {", ".join(sorted(loaded))})'
                    )
                loaded = loaded[section.split]
            return loaded.to_iterable_dataset() if section.streaming else loaded
        where = str(local) if local.is_dir() else section.dataset
        return datasets.load_dataset(where, section.subset or None, split=section.split, streaming=section.streaming)
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        raise RunFileError(
            f'data.dataset: cannot load "{section.dataset}" (split "{section.split}"): {_one_line(error)}; check '
            "the name, the subset, the split and the connection"
        ) from None


def _texts(rows: Iterable[Mapping[str, Any]], section: DataSection) -> Iterator[bytes]:
    for number, row in enumerate(rows):
        if section.field not in row:
            raise RunFileError(
                f'data.field: "{section.dataset}" has no field "{section.field}" (it has: {", ".join(sorted(row))}); '
                "set data.field to the one that holds the text"
            )
        text = row[section.field]
        if text is None or text == "":
            continue  # public data sets have such rows
        if not isinstance(text, str):
            raise RunFileError(
                f'data.field: "{section.field}" in row {number} of "{section.dataset}" is not a string; set '
                "data.field to the one that holds the text"
            )
        yield text.encode(errors="replace")


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0].rstrip(".") if lines else type(error).__name__)[:200]

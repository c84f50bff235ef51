"""Model files of the Hugging Face hub, by the library `huggingface_hub`, which is imported when a run needs it.

A run file comes from a stranger, and it names the repository: only the files that are pinned, or may be (safetensors
and descriptions, never pickles or code), are asked for, and no login is used unless its owner says so (`hub_login.py`).
Files stay in the hub's own cache, which other programs share; large ones come by `hub_download.py`.

The library's errors are translated here.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import inspect
import logging
import re
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from swarmtrain.errors import RunFileError, RunTimeError, SwarmtrainError
from swarmtrain.extras import install_in_words
from swarmtrain.hub_login import hub_token
from swarmtrain.model.hub_download import DamagedFileError, HubBlob, check_room
from swarmtrain.protocol.pinned_files.file_list import INDEX, MODEL_NAMES, files_to_pin, most_bytes
from swarmtrain.words import one_line, size_in_words

_log = logging.getLogger(__name__)
_T = TypeVar("_T")
Advance = Callable[[int], None]
"""Function that takes the number of bytes just done."""
_WORD = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
_NAME = re.compile(rf"({_WORD}/{_WORD})(?:@([A-Za-z0-9][A-Za-z0-9._/-]{{0,95}}))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_CALL_S = 10.0
_POLL_INTERVAL_S = 0.1
_MAX_REASON = 200
_REASONS = {
    "GatedRepoError": "its owner has to grant you access first",
    "RepositoryNotFoundError": "there is no such repository, or it is private",
    "RevisionNotFoundError": "there is no such revision",
    "LocalEntryNotFoundError": "the hub is not reached (or HF_HUB_OFFLINE is set), and its cache does not have it",
    "EntryNotFoundError": "there is no such file",
}
"""What errors of the library mean, by the names of their classes."""


class HubError(SwarmtrainError):
    """Failure to get something from the hub: it is not reached, does not have it, or has withdrawn it."""


@dataclass(frozen=True)
class HubSnapshot:
    """Files of a model at a commit, in the hub's cache. The folder may have others besides those of `names`."""

    folder: Path
    commit: str
    names: tuple[str, ...]

    def check_hash(self, name: str, sha256: str) -> None:
        """Raise RunFileError if a file's SHA-256 is not the one by which the hub names it. It names large files so; the
        library does not compare them.
        """
        path = (self.folder / name).resolve()
        if _SHA256.fullmatch(path.name) and path.name != sha256:
            raise RunFileError(
                f"model.base: {name} is not what the hub has (its SHA-256 is {sha256[:12]}..., the hub's "
                f"{path.name[:12]}...): it was damaged on its way or on the disk; delete {path} and start again",
                code="hub-file-damaged",
            )


@dataclass(frozen=True)
class HubModel:
    """Repository `owner/name` with a model, at a branch, a tag or a commit."""

    name: str
    revision: str = "main"

    @classmethod
    def parse(cls, base: str) -> HubModel | None:
        """Return the model that `owner/name` or `owner/name@revision` means; None if `base` is neither."""
        match = _NAME.fullmatch(base)
        return None if match is None else cls(match[1], match[2] or "main")

    @property
    def is_pinned(self) -> bool:
        """True if the revision is a commit."""
        return _COMMIT.fullmatch(self.revision) is not None

    def download(
        self, *, weights: bool, advance: Callable[[int, int], None], check: Callable[[], None] = lambda: None
    ) -> HubSnapshot:
        """Download the files that may be pinned, and find out the commit. Only descriptions, without `weights`.

        `advance` is called, in another thread, with bytes done and bytes in all; `check` while waiting, and it may
        raise to give up. Without a connection the hub's cache is enough. Raises RunFileError, one line, also if the
        repository has what is never loaded (`files_to_pin`); RunTimeError if the disk is full.
        """
        library = _library()
        try:
            commit, sizes = self._listed(library, check)
            _check_sizes(sizes, MODEL_NAMES)
            pinned = HubModel(self.name, commit)
            read_index = lambda: pinned._file(library, INDEX, lambda num_bytes: None, check).read_bytes()  # noqa: E731
            names = files_to_pin(sizes, read_index, weights=weights, origin=self.name)
            if "config.json" not in names:
                raise HubError("it has no config.json")
            _check_sizes(sizes, names)
            pinned.check_room({name: sizes[name] for name in names})
            self._file(library, "config.json", lambda num_bytes: None, check)  # the cache then knows the revision
            total, done, folder = sum(sizes[name] for name in names), 0, Path()

            def further(num_bytes: int) -> None:
                nonlocal done
                done += num_bytes
                advance(min(done, total), total)

            for name in names:
                before = done
                folder = pinned._file(library, name, further, check).parent
                done = before + sizes[name]
                advance(done, total)
        except HubError as error:
            raise RunFileError(
                f"model.base: cannot fetch {self.name} (revision {self.revision}) from the hub: {error}; check the "
                "name, the revision and the connection (a private one needs HF_TOKEN and --use-hf-token), or give a "
                "folder",
                code="hub-failed",
            ) from None
        return HubSnapshot(folder, commit, names)

    def check_weights(self) -> None:
        """Raise RunFileError if the repository has no weights that are read here; nothing of them is downloaded.

        A hub that is not reached says nothing: `download` will.
        """
        library, check = _library(), lambda: None
        try:
            commit, sizes = self._listed_by_hub(library, check)
            _check_sizes(sizes, MODEL_NAMES)
            pinned = HubModel(self.name, commit)
            read_index = lambda: pinned._file(library, INDEX, lambda num_bytes: None, check).read_bytes()  # noqa: E731
            files_to_pin(sizes, read_index, weights=True, origin=self.name)
        except HubError as error:
            _log.info("%s is not looked at: %s", self.name, error)

    def reach(self, check: Callable[[], None]) -> Mapping[str, int]:
        """Return the sizes of the files by name, as the hub says. `check` is called while waiting.

        Raises HubError unless the hub is reached and has this revision: a download would try for a while longer before
        it says so.
        """
        return self._listed_by_hub(_own_library(), check)[1]

    def cached_file(self, name: str) -> Path | None:
        """Return where the hub's cache has a file at this revision; None if it does not have it."""
        with contextlib.suppress(HubError):
            found = _own_library().try_to_load_from_cache(self.name, name, revision=self.revision)
            return Path(found) if isinstance(found, str) else None
        return None

    def download_file(self, name: str, advance: Advance, check: Callable[[], None]) -> Path:
        """Download one file at this revision, a commit, unless the hub's cache has it; return where it is.

        `advance` is called, in another thread, with bytes that have arrived; `check` while waiting, and it may raise to
        give up. Raises HubError, and RunTimeError if the disk is full.
        """
        return self._file(_own_library(), name, advance, check)

    def check_room(self, sizes: Mapping[str, int]) -> None:
        """Raise RunTimeError if the disk of the hub's cache has no room for those of these files that it does not have,
        given their sizes in bytes by name."""
        missing = {name: size for name, size in sizes.items() if self.cached_file(name) is None}
        try:
            check_room(_own_library(), self.name, missing)
        except OSError as error:
            raise self._full(error) from None

    def _full(self, error: OSError) -> RunTimeError:
        return RunTimeError(
            f"model.base: {self.name} does not fit on the disk ({error.strerror}); make room in the hub's cache, or "
            "name another place with HF_HOME, and start again (what has arrived is kept)",
            code="disk-full",
        )

    def _file(self, library: Any, name: str, advance: Advance, check: Callable[[], None]) -> Path:
        more = {}
        if "tqdm_class" in inspect.signature(library.hf_hub_download).parameters:  # not in older ones
            more["tqdm_class"] = _progress_bar(advance)

        def download() -> Path:
            HubBlob(library, self.name, self.revision, name, hub_token(), advance).fetch()
            return Path(library.hf_hub_download(self.name, name, revision=self.revision, token=hub_token(), **more))

        try:
            return self.cached_file(name) or _interruptible(download, check)
        except OSError as error:  # the disk is full: the others are translated
            raise self._full(error) from None

    def _listed(self, library: Any, check: Callable[[], None]) -> tuple[str, dict[str, int]]:
        """Return the commit of this revision, and the sizes of its files by name; without a connection what the hub's
        cache has."""
        try:
            return self._listed_by_hub(library, check)
        except HubError as error:
            path = self.cached_file("config.json")
            if path is None:
                raise
            _log.info("the hub does not list the files of %s, its cache does: %s", self.name, error)
            return path.parent.name, {
                each.name: each.stat().st_size for each in path.parent.iterdir() if each.is_file()
            }

    def _listed_by_hub(self, library: Any, check: Callable[[], None]) -> tuple[str, dict[str, int]]:
        found = _ask(library, self, check)
        if not isinstance(found.sha, str) or not _COMMIT.fullmatch(found.sha):
            raise HubError(f"the hub gives no commit of {self.name}")
        return found.sha, {item.rfilename: item.size or 0 for item in found.siblings or ()}


def _check_sizes(sizes: Mapping[str, int], names: Iterable[str]) -> None:
    """Raise HubError if a file of these names is larger than any that is pinned: before it fills the disk."""
    if large := [name for name in names if sizes.get(name, 0) > most_bytes(name)]:
        raise HubError(f"its {large[0]} has {size_in_words(sizes[large[0]])}")


def _ask(library: Any, model: HubModel, check: Callable[[], None]) -> Any:
    """Return what the hub says of a model: its commit, and its files with their sizes."""
    api = library.HfApi(token=hub_token())
    work = lambda: api.model_info(model.name, revision=model.revision, files_metadata=True, timeout=_CALL_S)  # noqa: E731
    return _interruptible(work, check)


def _own_library() -> Any:
    """Return the library; raises HubError without it."""
    try:
        return _library()
    except RunFileError as error:
        raise HubError(*error.problems) from None


def _library() -> Any:
    try:
        library = importlib.import_module("huggingface_hub")
    except ImportError:
        raise RunFileError(
            f"a model of the Hugging Face hub needs huggingface_hub: {install_in_words('hf')}", code="package-missing"
        ) from None
    utilities = importlib.import_module("huggingface_hub.utils")
    utilities.disable_progress_bars()
    utilities.logging.set_verbosity_error()  # its warnings would go to the terminal
    return library


def _progress_bar(advance: Advance) -> type:
    """Return a class of the library's progress bars that draws nothing and calls `advance`."""
    base = importlib.import_module("huggingface_hub.utils").tqdm

    class Bar(base):  # type: ignore[misc, valid-type]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "disable": True})
            advance(int(kwargs.get("initial") or 0))

        def update(self, n: float | None = 1) -> None:
            advance(int(n or 0))

    return Bar


def _interruptible(work: Callable[[], _T], check: Callable[[], None]) -> _T:
    """Return what `work` returns, and call `check` while waiting for it; if that raises, `work` is left to itself.

    The library waits for the network for seconds, during which Ctrl-C must count. Raises HubError, and OSError if the
    disk is full.
    """
    results: list[_T] = []
    errors: list[Exception] = []

    def run() -> None:
        try:
            results.append(work())
        except Exception as error:  # boundary to the library
            _log.info("the hub: %s", error, exc_info=True)
            errors.append(error)

    thread = threading.Thread(target=run, name="hub", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(_POLL_INTERVAL_S)
        check()
    for error in errors:
        raise _translated(error) from None
    return results[0]


def _translated(error: Exception) -> Exception:
    """Return what to raise for an error of the library, which raises those of many libraries below it."""
    if isinstance(error, DamagedFileError):
        return HubError(str(error))
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return error
    known = [_REASONS[kind.__name__] for kind in type(error).__mro__ if kind.__name__ in _REASONS]
    if known:
        return HubError(known[0])
    lines = [line for line in str(error).splitlines() if line.strip()]
    return HubError(one_line((lines[0].strip().rstrip(".") if lines else type(error).__name__)[:_MAX_REASON]))

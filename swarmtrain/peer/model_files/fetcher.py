"""Get the files of a run's model onto this machine: from `--model-dir`, its cache, the hub, and from other peers.

Each file is checked by the hash that the run pins, wherever it comes from. Runs on the main thread, which waits, shows
progress and can be interrupted; peers are asked in the network thread.
"""

from __future__ import annotations

import contextlib
import errno
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from swarmtrain.errors import BadBytesError, RunFileError, RunTimeError, UserError
from swarmtrain.events import WarningEvent
from swarmtrain.model.hub import HubError, HubModel
from swarmtrain.network.discovery.invite import InvitedPeer
from swarmtrain.network.discovery.run_lookup import PublishedRun
from swarmtrain.network.model_files.early_service import serve_files_early
from swarmtrain.network.model_files.fetch import PeerFetch, RunTarget
from swarmtrain.network.model_files.served_file import ServedFile
from swarmtrain.network.model_files.sources import FileSources
from swarmtrain.network.node import NetworkThread, Node
from swarmtrain.network.refusals import Refusals
from swarmtrain.network.service import PeerCalls
from swarmtrain.network.snapshots.store import PullLimits
from swarmtrain.peer.control.arrival import FileProgress
from swarmtrain.peer.control.session import ControlSession
from swarmtrain.peer.lifecycle.node import Emit, PeerSettings, wait_for
from swarmtrain.peer.lifecycle.stop import StopFlag
from swarmtrain.peer.model_files.file_hashes import FileHashes
from swarmtrain.peer.model_files.model_folder import ModelFolder, pinned_list
from swarmtrain.peer.model_files.part_file import ArrivingRun, PartFile
from swarmtrain.protocol.pinned_files.file_list import (
    INDEX,
    PinnedFile,
    PinnedFiles,
    files_of_run_untrusted,
    files_to_pin,
    is_weights_name,
)
from swarmtrain.run import NetworkSection
from swarmtrain.words import size_in_words

_POLL_INTERVAL_S = 0.2
_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True, kw_only=True)
class FilesPlace:
    """Where this machine may have model files, and to whom to show what happens to them."""

    cache: Path
    """Folder of this user's cache, in which `ModelFolder` keeps them."""
    given: Path | None = None
    """Folder of `--model-dir`."""
    progress: FileProgress
    emit: Emit
    stop: StopFlag
    down_mbit: float | None = None
    """Limit of downloads that the person has set, in Mbit/s (0: none); None: the run's."""

    def asks_hub(self, network: NetworkSection) -> None:
        """Warn that what comes from the hub is not limited, if downloads are: its library knows no limit, and its
        fastest way of transfer cannot be slowed from outside."""
        if network.down_mbit if self.down_mbit is None else self.down_mbit:
            message = (
                "downloads are limited (--down, network.down_mbit), but the model's files come from the hub at full "
                "speed, since its library knows no limit; give a folder that has them to fetch nothing"
            )
            self.emit(WarningEvent(message=message, code="hub-not-limited"))


def files_place(settings: PeerSettings, control: ControlSession, emit: Emit) -> FilesPlace:
    """Return the place of model files of a peer with these settings; without a cache they are kept in its folder."""
    return FilesPlace(
        cache=settings.cache_folder or settings.directory,
        given=settings.model_folder,
        progress=FileProgress(control.board, emit),
        emit=emit,
        stop=control.stop,
        down_mbit=settings.limits.down_mbit,
    )


@dataclass(frozen=True)
class SwarmSource:
    """Network through which other peers are asked, and the peers known first."""

    network: NetworkThread
    node: Node
    through: Iterable[InvitedPeer]


def pin_folder(folder: Path, names: Sequence[str], place: FilesPlace, num_parameters: int = 0) -> PinnedFiles:
    """Return the list of the files of these names in `folder`, which the bootstrap publishes, of a model of so many
    parameters.

    Hashes are kept in the cache. Raises RunFileError if a file cannot be read, or is too large or empty.
    """
    place.progress.begin("hashing the model's files")
    try:
        total = sum((folder / name).stat().st_size for name in names)
        advance = _counted(place, total)
        files = pinned_list(folder, names, FileHashes(place.cache / "models" / "hashes"), advance)
    except OSError as error:
        raise RunFileError(
            f"model.base: {error.filename or folder} cannot be read: {error.strerror}; correct its permissions, or "
            "give another folder",
            code="file-unreadable",
        ) from None
    try:
        return files_of_run_untrusted(files.to_bytes(), num_parameters)
    except BadBytesError as error:
        raise RunFileError(
            f"model.base: the files in {folder} cannot be published: {error}; give another model", code="bad-model-file"
        ) from None


def names_in(folder: Path, *, weights: bool) -> tuple[str, ...]:
    """Return the names of the files of a model's folder that are pinned (`files_to_pin`). Raises RunFileError."""
    try:
        names = [path.name for path in folder.iterdir() if path.is_file()]
        return files_to_pin(names, lambda: (folder / INDEX).read_bytes(), weights=weights, origin=str(folder))
    except OSError as error:
        raise RunFileError(
            f"model.base: {folder} cannot be read: {error.strerror}; give the folder of a model", code="file-unreadable"
        ) from None


def _counted(place: FilesPlace, total_bytes: int) -> Callable[[int], None]:
    """Return a function that adds bytes to those done and shows it; it raises when an end was asked for."""
    done = 0

    def advance(num_bytes: int) -> None:
        nonlocal done
        done += num_bytes
        place.progress.show(done, total_bytes)
        place.stop.check()

    return advance


def fetch_and_serve(published: PublishedRun, place: FilesPlace, node: Node, others: SwarmSource | None) -> ModelFolder:
    """Get the files of the run's model onto this machine (`ModelFileFetcher.fetch`), and serve each from the moment at
    which it is complete and checked: before this peer enters the swarm only if `others` are known."""
    fetcher = ModelFileFetcher(published, place, node.served_files)
    if others is not None:
        fetcher.sources = FileSources(node, fetcher.calls(node), others.through, is_source=True)
        wait_for(others.network.submit(serve_files_early(node, published, fetcher.sources)), place.stop)
    return fetcher.fetch(others)


@dataclass
class ModelFileFetcher:
    """Fetches the model files of one run into the cache of this machine."""

    published: PublishedRun
    place: FilesPlace
    served: dict[str, ServedFile] = field(default_factory=dict)
    """Each file is entered here, by its SHA-256, when it is complete and checked; and so is its chunk list."""
    sources: FileSources | None = field(default=None, init=False)
    """Peers that are asked, if this peer serves files itself; else those of `fetch` are asked by themselves."""
    files: PinnedFiles = field(init=False)
    folder: ModelFolder = field(init=False)

    def __post_init__(self) -> None:
        self.files = PinnedFiles.from_bytes_untrusted(self.published.model_files)
        self.folder = ModelFolder(self.place.cache, self.files, self.served)

    def calls(self, node: Node) -> PeerCalls:
        """Return calls to other peers of the run."""
        limits = self.published.run.network
        return PeerCalls(node, self.published.sha256, limits.stall_limit_s, limits.least_bytes_per_s)

    def fetch(self, swarm: SwarmSource | None, *, weights: bool = True) -> ModelFolder:
        """Return the folder with all files, or with those that have no weights, each checked by its hash.

        Looks in `--model-dir`, the cache and the hub, in this order, and then asks other peers, unless `swarm` is None.
        A file of which a part is here is asked of the peers before the hub, so that nothing is fetched twice. When
        peers deliver nothing, the hub is asked for all that is missing, also if it did not answer before. Raises
        RunTimeError if the disk is full, or nobody delivers.
        """
        with self._disk_errors(), self.folder.locked(self._wait_for_the_other):
            missing = self._not_here([file for file in self.files.files if weights or not is_weights_name(file.name)])
            begun = [file for file in missing if self.folder.has_part(file)]
            missing = self._after_hub([file for file in missing if file not in begun]) + begun
            if missing and swarm is not None:
                self._check_room(missing)
                try:
                    self._from_peers(missing, swarm)
                    missing = []
                except RunTimeError:
                    left = [file for file in missing if not self.folder.has(file)]
                    missing = self._after_hub(left, "nor do other peers")
                    if missing:
                        raise
        if missing:
            names = ", ".join(file.name for file in missing[:3]) + (", ..." if len(missing) > 3 else "")
            raise RunTimeError(
                f"the model's files are not here ({names}), and the hub has not delivered them; give a folder with "
                "them with --model-dir, or start again when other peers are there",
                code="files-not-delivered",
            )
        self.place.progress.board.arrived()
        return self.folder

    @contextmanager
    def _disk_errors(self) -> Iterator[None]:
        """Turn the file system's errors into errors of one line."""
        try:
            yield
        except OSError as error:
            if error.errno in _FULL:
                raise self._full("the disk is full") from None
            raise UserError(
                f"cannot write to {self.folder.path}: {error.strerror or error}; make it writable, or name another "
                "cache with XDG_CACHE_HOME",
                code="folder-not-writable",
            ) from None

    def _full(self, what: str) -> RunTimeError:
        return RunTimeError(
            f"{what}: the model's files need {size_in_words(self.files.total_bytes)} in {self.folder.path}; make room "
            "and start again (what has arrived is kept), or give a folder with them with --model-dir",
            code="disk-full",
        )

    def _wait_for_the_other(self) -> None:
        place = self.place
        place.progress.board.arriving("waiting for another peer of this machine, which fetches the model's files")
        place.stop.sleep(_POLL_INTERVAL_S)

    def _check_room(self, missing: Sequence[PinnedFile]) -> None:
        """Raise RunTimeError if the disk has no room for the missing files: better now than after hours."""
        here_bytes = 0
        for file in missing:
            with contextlib.suppress(OSError):
                here_bytes += (self.folder.path / f"{file.name}.part").stat().st_blocks * 512
        lacking_bytes = sum(file.size_bytes for file in missing) - here_bytes
        free_bytes = shutil.disk_usage(self.folder.path).free
        if lacking_bytes > free_bytes:
            raise self._full(f"the disk has {size_in_words(free_bytes)} left")

    # ------------------------------------------------------------- this machine

    def _not_here(self, wanted: Sequence[PinnedFile]) -> list[PinnedFile]:
        """Return the files that neither `--model-dir` nor the cache has. What is there is checked by its hash."""
        place, folder = self.place, self.folder
        place.progress.begin("checking the model's files")
        advance = _counted(place, sum(file.size_bytes for file in wanted))
        differing = []
        missing = []
        for file in wanted:
            if place.given is not None and (place.given / file.name).is_file():
                if folder.link(file, place.given / file.name, advance):
                    continue
                differing.append(file.name)
            if not folder.has(file, advance):
                missing.append(file)
        if differing:
            place.emit(
                WarningEvent(
                    message=f"--model-dir {place.given}: not the run's files: {', '.join(differing)}; they are fetched "
                    "from elsewhere",
                    code="model-files-differ",
                )
            )
        return missing

    # ------------------------------------------------------------- the hub

    def _after_hub(
        self, missing: Sequence[PinnedFile], otherwise: str = "other peers are asked for them"
    ) -> list[PinnedFile]:
        """Fetch files from the hub, if the run's model is there; return those that it did not deliver. The warning then
        ends with `otherwise`."""
        model, left = HubModel.parse(str(getattr(self.published.run.model, "base", ""))), list(missing)
        if model is None or not model.is_pinned:
            return left
        place, total = self.place, sum(file.size_bytes for file in missing)
        place.progress.begin("fetching the model's files from the hub")
        done = 0

        def advance(num_bytes: int) -> None:
            nonlocal done
            done += num_bytes
            place.progress.show(min(done, total), total)

        try:
            sizes: Mapping[str, int] = {}
            if any(model.cached_file(file.name) is None for file in missing):
                sizes = model.reach(place.stop.check)
                model.check_room({file.name: file.size_bytes for file in missing})
                place.asks_hub(self.published.run.network)
            for file in missing:
                if sizes.get(file.name, file.size_bytes) != file.size_bytes:  # before it fills the disk
                    raise HubError(f"its {file.name} has another size than the run pins")
                before = done
                path = model.download_file(file.name, advance, place.stop.check)
                if not self.folder.link(file, path):
                    raise HubError(f"its {file.name} does not match the hash that the run pins")
                done = before + file.size_bytes
                left.remove(file)
        except HubError as error:
            place.emit(
                WarningEvent(
                    message=f"the hub did not deliver the model's files: {error}; {otherwise}",
                    code="hub-failed",
                )
            )
        return left

    # ------------------------------------------------------------- other peers

    def _from_peers(self, missing: Sequence[PinnedFile], swarm: SwarmSource) -> None:
        """Fetch files from other peers. Raises RunTimeError if nobody delivers."""
        place, limits = self.place, self.published.run.network
        calls = self.calls(swarm.node)
        fetch = PeerFetch(
            files=missing,
            disk=Disk(self.folder),
            calls=calls,
            limits=PullLimits(stall_limit_s=limits.stall_limit_s, min_bytes_per_s=limits.min_pull_bytes_per_s),
            blame=Refusals(place.emit).tell,
            find=(self.sources or FileSources(swarm.node, calls, swarm.through)).find,
        )
        place.progress.begin("fetching the model's files from other peers")
        total = sum(file.size_bytes for file in missing)

        def look() -> None:
            place.progress.show(fetch.here_bytes, total, f"({fetch.num_sources} deliver now)")

        wait_for(swarm.network.submit(fetch.run()), place.stop, look)


class Disk:
    """Model folder as a fetch uses it (`network.model_files.fetch.FileDisk`). Methods run in threads."""

    def __init__(self, folder: ModelFolder) -> None:
        self._folder = folder
        self._parts: dict[str, PartFile] = {}

    def chunk_list(self, file: PinnedFile) -> bytes | None:
        return self._folder.chunk_list(file)

    def keep_chunk_list(self, file: PinnedFile, chunk_list: bytes) -> None:
        self._folder.keep_chunk_list(file, chunk_list)

    def kept_chunks(self, file: PinnedFile) -> Iterable[int]:
        return self._part(file).kept_chunks()

    def target(self, file: PinnedFile) -> RunTarget:
        return ArrivingRun(self._part(file))

    def finish(self, file: PinnedFile) -> None:
        self._folder.finish(file, self._part(file))
        del self._parts[file.name]

    def _part(self, file: PinnedFile) -> PartFile:
        if file.name not in self._parts:
            self._parts[file.name] = self._folder.part(file)
        return self._parts[file.name]

"""Checkpoints as files, written so that a crash at any moment leaves the previous or the new one, whole.

A checkpoint is two files with one stem, `00000042-round-00000012`: the tensors (`.safetensors`) and the manifest
(`.json`), which contains the SHA-256 of the tensors and of itself. The manifest is written last: a checkpoint exists
once its manifest does. A running number stands before the round, because rounds do not order checkpoints: a state taken
from others may have more tokens and a lower round. So no name is ever written twice (decision 14).

Rules of this file: it handles bytes and no torch tensors, so that faults can be injected into a small process; every
change on the disk is one call of `os`; nothing is removed before its replacement is on the disk.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import math
import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

_log = logging.getLogger(__name__)

KEPT = 3
"""Checkpoints that stay on the disk; there is one more while it is written."""

FORMAT = 1
"""Version of the manifest; files of another version are left alone."""

_PIECE_BYTES = 4 * 1024 * 1024
_SPARE_BYTES = 16 * 1024 * 1024
"""Bytes left free on the disk for other programs."""

_NAME = re.compile(r"\.?((\d{8,})-round-\d{8,})\.(safetensors|json)(\.tmp)?")


class DamagedError(Exception):
    """Raised for a checkpoint that was torn or altered; its text says how that was noticed."""


@dataclass(frozen=True, kw_only=True)
class TensorBytes:
    """Tensor to be written: name, shape, and fp32 bytes in pieces, each read once and in order, never copied."""

    name: str
    shape: tuple[int, ...]
    data: memoryview | Iterable[memoryview]

    @property
    def size_bytes(self) -> int:
        """Size in bytes."""
        return 4 * math.prod(self.shape)


@dataclass(frozen=True, kw_only=True)
class Written:
    """Checkpoint on the disk: its manifest's path, round, Unix time of writing, bytes, and seconds that it took."""

    path: Path
    round: int
    time: float
    size_bytes: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class StoredCheckpoint:
    """Checkpoint whose manifest was read."""

    stem: str
    manifest: Mapping[str, Any]


class Unused(NamedTuple):
    """Checkpoint that cannot be used, by its manifest's name; `foreign` if that is no fault."""

    name: str
    reason: str
    foreign: bool = False


@dataclass
class CheckpointFolder:
    """Folder with the checkpoints of one peer in one run; checkpoints of other peers in it are left alone.

    With `peer` None it reads checkpoints of any peer and must not write.
    """

    path: Path
    run_sha256: str
    peer: str | None
    keep: int = KEPT
    damaged: set[str] = field(default_factory=set)
    """Stems of checkpoints found torn or altered. They do not count among those kept, and are removed once a new one is
    written.
    """
    _whole: list[str] | None = None

    # ------------------------------------------------------------- reading

    def newest_first(self) -> Iterator[StoredCheckpoint | Unused]:
        """Yield the checkpoints by their manifests, newest first, and for unusable ones the reason.

        Raises OSError if the folder cannot be read.
        """
        for stem in reversed(self._stems(".json")):
            try:
                manifest = self._read_manifest(stem)
            except OSError as error:
                yield Unused(f"{stem}.json", f"it cannot be read: {error.strerror}")
                continue
            except DamagedError as error:
                self.damaged.add(stem)
                yield Unused(f"{stem}.json", str(error))
                continue
            if manifest.get("format") != FORMAT:
                other = f"it has format {manifest.get('format')}, and this version of swarmtrain reads {FORMAT}"
                yield Unused(f"{stem}.json", other)
            elif (reason := self._foreign(manifest)) is not None:
                yield Unused(f"{stem}.json", reason, foreign=True)
            else:
                yield StoredCheckpoint(stem=stem, manifest=manifest)

    def tensors_of(self, kept: StoredCheckpoint) -> Path:
        """Return the path of the tensors' file, after reading all of it and comparing it with the manifest.

        Raises DamagedError if it differs.
        """
        path = self.path / f"{kept.stem}.safetensors"
        digest, size = hashlib.sha256(), 0
        try:
            with path.open("rb", buffering=0) as file:
                while piece := file.read(_PIECE_BYTES):
                    digest.update(piece)
                    size += len(piece)
        except FileNotFoundError:
            self.damaged.add(kept.stem)
            raise DamagedError("its tensors are missing") from None
        told = kept.manifest["tensors"]
        if size != told["size_bytes"] or digest.hexdigest() != told["sha256"]:
            self.damaged.add(kept.stem)
            raise DamagedError("its tensors were torn or altered")
        return path

    def written(self, kept: StoredCheckpoint) -> Written:
        """Return what `write` returned for the checkpoint, except for the seconds that it took."""
        path = self.path / f"{kept.stem}.json"
        size = path.stat().st_size + kept.manifest["tensors"]["size_bytes"]
        return Written(path=path, round=kept.manifest["round"], time=path.stat().st_mtime, size_bytes=size, seconds=0.0)

    def _read_manifest(self, stem: str) -> Mapping[str, Any]:
        try:
            both = json.loads((self.path / f"{stem}.json").read_bytes())
            manifest = both["manifest"]
            whole = hashlib.sha256(_canonical(manifest)).hexdigest() == both["sha256"]
        except (ValueError, KeyError, TypeError):
            whole = False
        if not whole or not isinstance(manifest, dict):
            raise DamagedError("its manifest was torn or altered")
        return manifest

    def _foreign(self, manifest: Mapping[str, Any]) -> str | None:
        if manifest.get("run_sha256") != self.run_sha256:
            return "it is of another run"
        if self.peer is not None and manifest.get("peer") != self.peer:
            return "it is another peer's"
        return None

    def _names(self) -> list[re.Match[str]]:
        try:
            return [match for path in self.path.iterdir() if (match := _NAME.fullmatch(path.name))]
        except FileNotFoundError:
            return []

    def _stems(self, suffix: str) -> list[str]:
        return sorted(
            (match[1] for match in self._names() if match.string == match[1] + suffix),
            key=lambda stem: int(stem.split("-")[0]),
        )

    # ------------------------------------------------------------- writing

    def write(self, round: int, tensors: Sequence[TensorBytes], manifest: Mapping[str, Any]) -> Written:
        """Write a checkpoint, sync it, and then remove all but the newest `keep`.

        `manifest` must fit JSON; format, run, peer, round and the tensors' hash are filled in. Raises OSError as the
        file system gives it: then older checkpoints are untouched, and nothing of the new one is left.
        """
        began_s = time.monotonic()
        if self._whole is None:
            self._whole = [entry.stem for entry in self.newest_first() if isinstance(entry, StoredCheckpoint)][::-1]
            self._whole = [stem for stem in self._whole if stem not in self.damaged]
        size_bytes = sum(tensor.size_bytes for tensor in tensors)
        self._make_room_sure(size_bytes)
        number = 1 + max((int(match[2]) for match in self._names()), default=0)
        stem = f"{number:08d}-round-{round:08d}"
        try:
            tensors_sha256, tensors_bytes = self._write_file(f"{stem}.safetensors", _safetensors(tensors))
            body = _canonical(
                {
                    **manifest,
                    "format": FORMAT,
                    "run_sha256": self.run_sha256,
                    "peer": self.peer,
                    "round": round,
                    "tensors": {"sha256": tensors_sha256, "size_bytes": tensors_bytes},
                }
            )
            both = b'{"sha256":"%s","manifest":%s}\n' % (hashlib.sha256(body).hexdigest().encode(), body)
            self._write_file(f"{stem}.json", [memoryview(both)])
            self._sync_folder()
        except BaseException:
            for name in (f".{stem}.json.tmp", f"{stem}.json", f".{stem}.safetensors.tmp", f"{stem}.safetensors"):
                with contextlib.suppress(OSError):
                    os.unlink(self.path / name)  # noqa: PTH108 - faults are injected into these calls of os
            raise
        self._whole.append(stem)
        try:
            self._remove_old(stem)
        except OSError as error:  # the new checkpoint is on the disk all the same
            _log.warning("old checkpoints in %s could not be removed: %s", self.path, error.strerror)
        return Written(
            path=self.path / f"{stem}.json",
            round=round,
            time=time.time(),
            size_bytes=tensors_bytes + len(both),
            seconds=time.monotonic() - began_s,
        )

    def _make_room_sure(self, size_bytes: int) -> None:
        """Create the folder and check that the disk has room: filling it up would harm every other program."""
        with contextlib.suppress(FileExistsError):
            os.mkdir(self.path, 0o700)  # noqa: PTH102
        disk = os.statvfs(self.path)
        if disk.f_blocks and disk.f_bavail * disk.f_frsize < size_bytes + _SPARE_BYTES:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))

    def _write_file(self, name: str, pieces: Iterable[memoryview]) -> tuple[str, int]:
        """Write and sync a new file; return its SHA-256 and size.

        It is hashed from the file once all is written: the trainer may be waiting until the pieces are read. Hashing
        and writing release Python's lock.
        """
        temporary = self.path / f".{name}.tmp"
        digest, size, hashed = hashlib.sha256(), 0, 0
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            for piece in pieces:
                view = piece.cast("B")
                while view:
                    num_written = os.write(descriptor, view[:_PIECE_BYTES])
                    size += num_written
                    view = view[num_written:]
            while found := os.pread(descriptor, _PIECE_BYTES, hashed):
                digest.update(found)
                hashed += len(found)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.rename(temporary, self.path / name)  # noqa: PTH104
        return digest.hexdigest(), size

    def _sync_folder(self) -> None:
        descriptor = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def _remove_old(self, newest: str) -> None:
        """Remove what the checkpoint `newest`, which is on the disk, replaces: older ones of this peer, damaged ones,
        and remains of a crash.
        """
        assert self._whole is not None
        surplus = set(self._whole[: -self.keep])
        manifests = set(self._stems(".json"))
        # Manifests first: a checkpoint must not outlive its tensors.
        for match in sorted(self._names(), key=lambda match: match[3] != "json"):
            stem = match[1]
            half_done = match[4] is not None or stem not in manifests
            if stem != newest and (half_done or stem in surplus or stem in self.damaged):
                os.unlink(self.path / match.string)  # noqa: PTH108
        self._whole = self._whole[-self.keep :]


def _canonical(manifest: Any) -> bytes:
    return json.dumps(manifest, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _safetensors(tensors: Sequence[TensorBytes]) -> Iterator[memoryview]:
    """Yield the bytes of a safetensors file: the header's length, the header, and the tensors in order."""
    header: dict[str, Any] = {}
    offset = 0
    for tensor in tensors:
        size = tensor.size_bytes
        header[tensor.name] = {
            "dtype": "F32",
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield memoryview(len(text).to_bytes(8, "little") + text)
    for tensor in tensors:
        size = 0
        for piece in [tensor.data] if isinstance(tensor.data, memoryview) else tensor.data:
            size += piece.nbytes
            yield piece
        if size != tensor.size_bytes:
            raise ValueError(f"{tensor.name}: {size} bytes do not fit shape {tensor.shape}")


def newest_written(path: Path, run_sha256: str | None) -> Written | None:
    """Return the newest checkpoint of a run in the folder `path`, by its manifest; None without one."""
    if run_sha256 is None:
        return None
    files = CheckpointFolder(path, run_sha256, None)
    with contextlib.suppress(OSError):
        return next(
            (files.written(entry) for entry in files.newest_first() if isinstance(entry, StoredCheckpoint)), None
        )
    return None

"""A peer's folder: its lock, its identity, the run it belongs to, the model it ends with.

identity.key   the Ed25519 key (owner only)
lock           held while a peer lives in the folder
run.toml       the published run, its exact bytes
held-out.txt   the run's held-out text
tokenizer.bin  the run's learnt tokenizer, if it has one
model-files.json  the list of the model's files, if the run has one; the files themselves are in this user's cache
peer.pid       its process, while a peer runs
peer.log       what happened, and older ones beside it: peer.log.1 and so on
invite.txt     the line to hand out, while a peer runs
control.*      where a running peer can be asked for its status: the address, and its socket
sockets/       between a running peer and its network daemon
status.json    the peer's last status
checkpoints/   the newest three checkpoints of this peer's state: COUNT-round-ROUND.safetensors and .json
               (of stage N of a pipeline in checkpoints/stage-N/)
started.json   the options it was started with, and whether it is paused
port.txt       the port it listened at, if none was asked for
peers.json     whom it knew
counts.json    (bootstrap) who has trained on how many tokens by now; of a stage counts-stage-N.json
trackers.json  (--report-to) the identity of its curves, and how far they are drawn
tensorboard/   (--report-to tensorboard) its curves; wandb/ those of W&B; TRACKER.log: what the tracker last printed
archive/       (bootstrap) the run's newest model
model/         the model at the end

Sockets are elsewhere, among the temporary files, if the folder's path is too long for them.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shlex
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from swarmtrain.errors import BadBytesError, NewerRunError, SwarmtrainError, UserError
from swarmtrain.network.discovery.invite import InvitedPeer
from swarmtrain.network.discovery.run_lookup import PublishedRun
from swarmtrain.network.files import write_atomically
from swarmtrain.peer.lifecycle.folder_lock import is_in_use, is_lock_of
from swarmtrain.peer.lifecycle.start_options import StartedFile
from swarmtrain.protocol.membership.budgets import may_dial
from swarmtrain.run import parse_published_untrusted, run_sha256

_FILES = ("held-out.txt", "tokenizer.bin", "model-files.json", "run.toml")
"""Order of writing: the run comes last, so that a folder that has it has all its files, whenever its peer was
killed.
"""
_OF_ANY_START = {
    "identity.key",
    "lock",
    "page.json",
    "page.log",
    "peer.log",
    "port.txt",
    "started.json",
    "status.json",
}
"""Files that every start leaves, even if it fails before it has fetched a run."""
_LOCK_TRIES = 16
_HALF_EXPORTED = re.compile(r"\.(archive|model)\.(new-)?[a-z0-9_]{8}")


class PeerFolder:
    """Files of one peer. Made by `peer_folder`, which holds the lock."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.key_path = path / "identity.key"
        self.invite_path = path / "invite.txt"
        self.model_path = path / "model"
        self.archive_path = path / "archive"
        self.checkpoints_path = path / "checkpoints"
        self.started = StartedFile(path)

    def kept_files(self) -> Mapping[str, bytes]:
        """Return the run's files that are in the folder already, by their hash."""
        kept = {}
        for name in _FILES:
            with contextlib.suppress(OSError):
                data = (self.path / name).read_bytes()
                kept[hashlib.sha256(data).hexdigest()] = data
        return kept

    def kept_sha256(self) -> str | None:
        """Return the hash of the run in the folder; None without one, or if it cannot be read."""
        try:
            return run_sha256((self.path / "run.toml").read_bytes())
        except OSError:
            return None

    def kept_run(self) -> PublishedRun | None:
        """Return the run in the folder with all its files; None without one. Raises UserError if its files are
        incomplete or altered."""
        path = self.path / "run.toml"
        if not path.exists():
            return None
        data = path.read_bytes()
        sha256 = run_sha256(data)
        try:
            run = parse_published_untrusted(data, sha256)
        except NewerRunError as error:
            raise UserError(f"{path}: {error}", code="run-needs-newer") from None
        except BadBytesError as error:
            raise UserError(
                f"{path} was altered: {error}; give another folder with --dir", code="folder-altered"
            ) from None
        kept, published = self.kept_files(), run.published
        assert published is not None, "a published run has the section"
        held_out = kept.get(published.held_out_sha256)
        tokenizer = kept.get(published.tokenizer_sha256) if published.tokenizer_sha256 else b""
        model_files = kept.get(published.model_files_sha256) if published.model_files_sha256 else b""
        if held_out is None or tokenizer is None or model_files is None:
            raise UserError(
                f"{self.path} lacks files of its run, or they were altered; give another folder with --dir",
                code="folder-altered",
            )
        return PublishedRun(data, sha256, run, held_out, tokenizer, model_files)

    def keep_run(self, published: PublishedRun) -> None:
        """Write the run and its files, except those that are here already: a restart then needs no room on the disk.

        Raises UserError if the disk does not take them.
        """
        try:
            contents = (published.held_out, published.tokenizer, published.model_files, published.data)
            for name, data in zip(_FILES, contents, strict=True):
                path = self.path / name
                if data and not (path.exists() and path.read_bytes() == data):
                    write_atomically(path, data)
        except OSError as error:
            raise UserError(
                f"cannot write to {self.path}: {error.strerror}; give another folder with --dir",
                code="folder-not-writable",
            ) from None

    def kept_port(self) -> int | None:
        """Return the TCP port that this peer listened at last time."""
        try:
            return int((self.path / "port.txt").read_text())
        except (OSError, ValueError):
            return None

    def keep_port(self, addresses: Sequence[str]) -> None:
        """Remember the port in the last of `addresses` (multiaddresses). If the disk is full, the port is forgotten."""
        match = re.search(r"/tcp/(\d+)", addresses[-1] if addresses else "")
        if match is not None:
            with contextlib.suppress(OSError):
                write_atomically(self.path / "port.txt", match[1].encode())

    def kept_peers(self) -> tuple[InvitedPeer, ...]:
        """Return the peers known when this peer last ran, with the addresses that may be dialled."""
        try:
            rows = json.loads((self.path / "peers.json").read_text())
            return tuple(InvitedPeer(row["peer"], _dialled(row["addresses"], row.get("given", ()))) for row in rows)
        except (OSError, ValueError, KeyError, TypeError):
            return ()

    def keep_peers(self, peers: Sequence[InvitedPeer]) -> None:
        """Remember the peers to dial after a restart.

        Host names that a stranger announced were removed before this. Those still here came by an invite; they are
        marked as given, which older folders do not do.
        """
        rows: list[dict[str, Any]] = []
        for peer in peers:
            rows.append({"peer": peer.peer, "addresses": list(peer.addresses)})
            if given := [address for address in peer.addresses if not may_dial(address)]:
                rows[-1]["given"] = given
        write_atomically(self.path / "peers.json", json.dumps(rows, indent=1).encode())

    def kept_counts(self, stage: int | None) -> Any:
        """Return the counts kept when this peer last ran, of a stage or the whole run; None if there are none."""
        try:
            return json.loads(self._counts_path(stage).read_text())
        except (OSError, ValueError):
            return None

    def keep_counts(self, counts: Any, stage: int | None) -> None:
        """Keep the counts between two checkpoints."""
        write_atomically(self._counts_path(stage), json.dumps(counts).encode())

    def _counts_path(self, stage: int | None) -> Path:
        return self.path / ("counts.json" if stage is None else f"counts-stage-{stage}.json")

    def write_invite(self, line: str) -> None:
        """Write the join line for `swarmtrain invite`."""
        write_atomically(self.invite_path, (line + "\n").encode())


def _dialled(addresses: Sequence[str], given: Sequence[str]) -> tuple[str, ...]:
    return tuple(address for address in addresses if may_dial(address) or address in given)


@contextmanager
def peer_folder(path: Path, *, removes_unused: bool = False) -> Iterator[PeerFolder]:
    """Open the folder at `path`, creating it if needed, and hold its lock.

    If `removes_unused`, an error removes a folder that was created here and has no more than any start leaves, unless
    the error's message names it. Raises UserError if the folder is in use or cannot be written.
    """
    path = path.absolute()  # the daemon has another working directory
    is_unused = False
    try:
        descriptor, is_new = _locked(path)
    except OSError as error:
        raise UserError(
            f"cannot write to {path}: {error.strerror}; give another folder with --dir", code="folder-not-writable"
        ) from None
    try:
        with contextlib.suppress(OSError):  # a full disk: the number is only informative
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        try:
            with contextlib.suppress(OSError):  # for people to read; the lock file has it too
                write_atomically(path / "peer.pid", f"{os.getpid()}\n".encode())
            _remove_half_exported(path)
            yield PeerFolder(path)
        except SwarmtrainError as error:
            is_unused = removes_unused and is_new and str(path) not in str(error)
            raise
        finally:
            for name in ("invite.txt", "peer.pid"):
                with contextlib.suppress(OSError):
                    (path / name).unlink()
            if is_unused:
                _remove_unused(path)
    finally:
        os.close(descriptor)


def _locked(path: Path) -> tuple[int, bool]:
    """Create the folder if it is missing, and lock it. Return the lock's descriptor, and whether the folder is new.

    A start that failed removes its folder, perhaps after the lock file was opened here. Whoever locks a file that is
    gone holds nothing, since the next peer locks another file: then this tries again. Raises UserError if a running
    peer holds the folder, and OSError if it cannot be written.
    """
    is_new, owner = False, ""
    for _ in range(_LOCK_TRIES):
        is_new = _create(path) or is_new
        try:
            descriptor = os.open(path / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        except FileNotFoundError:
            continue  # the folder is gone already
        with ExitStack() as closes:
            closes.callback(os.close, descriptor)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                is_locked = True
            except OSError:
                is_locked = False
            if is_lock_of(path, descriptor):
                if is_locked:
                    closes.pop_all()
                    return descriptor, is_new
                owner = os.pread(descriptor, 32, 0).decode(errors="replace").strip()
                break
    raise UserError(
        f"{path} is in use by a running peer (process {owner or 'unknown'}): `swarmtrain status --dir "
        f"{shlex.quote(str(path))}` shows it; for one more peer give another folder with --dir",
        code="folder-in-use",
    )


def _create(path: Path) -> bool:
    """Create the folder if it is missing; return whether it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        path.mkdir(mode=0o700)
    except FileExistsError:
        return False
    return True


def _remove_unused(path: Path) -> None:
    """Remove the folder, unless it has anything that not every start leaves."""
    with contextlib.suppress(OSError):
        names = {child.name for child in path.iterdir()}
        if names <= _OF_ANY_START:
            for name in sorted(names, key="lock".__eq__):  # the lock last: nobody may take the folder before
                (path / name).unlink()
            path.rmdir()


def _remove_half_exported(path: Path) -> None:
    """Remove unfinished exports of a peer that was killed while writing its model: each is as large as the model."""
    with contextlib.suppress(OSError):
        for child in path.iterdir():
            if _HALF_EXPORTED.fullmatch(child.name):
                shutil.rmtree(child, ignore_errors=True)


def running_invite(path: Path) -> str | None:
    """Return the join line of the peer that runs in the folder; None if none runs."""
    if not is_in_use(path):
        return None
    try:
        return (path / "invite.txt").read_text().strip()
    except FileNotFoundError:
        return None

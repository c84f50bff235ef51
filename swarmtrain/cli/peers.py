"""Peers of this machine: found by their folders, asked over their sockets.

A peer's folder has `lock` (held while the peer lives), `control.address` (where it answers, while it lives) and
`status.json` (its last status). A peer that answers is shown by its answer. One that does not answer is shown by that
file, and the lock tells whether it starts, hangs, has ended, or died.
"""

from __future__ import annotations

import contextlib
import enum
import math
import os
import re
import shlex
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from google.protobuf import json_format
from google.protobuf.descriptor import FieldDescriptor

from swarmtrain.cli.common import WhichPeer
from swarmtrain.errors import CODE_KEY, RunTimeError, SwarmtrainError, UserError
from swarmtrain.peer.lifecycle.folder_lock import Holder, holder, holder_pid
from swarmtrain.v1 import control_pb2 as wire
from swarmtrain.words import one_line

CALL_LIMIT_S = 5.0
_REFUSALS = ("UNIMPLEMENTED", "FAILED_PRECONDITION", "RESOURCE_EXHAUSTED", "PERMISSION_DENIED")
_LISTED = "local"
_MAX_ANSWER_BYTES = 64 * 2**20


class PeerPhase(enum.Enum):
    """State of a peer's process, as seen from outside."""

    RUNNING = "running"  # answers
    STARTING = "starting"  # holds its folder and does not answer yet
    SILENT = "silent"  # holds its folder and no longer answers
    ENDING = "ending"  # has left its last status, and its process still exists
    ENDED = "ended"  # has left the swarm and ended
    FAILED = "failed"  # has ended with an error
    DIED = "died"  # is gone without a last status
    LOST = "lost"  # no longer answers at its address, and there is no folder to look into

    @property
    def over(self) -> bool:
        """True if no process of the peer is left."""
        return self in (PeerPhase.ENDED, PeerPhase.FAILED, PeerPhase.DIED, PeerPhase.LOST)


_ENDS = {wire.PEER_STATE_DONE: PeerPhase.ENDED, wire.PEER_STATE_FAILED: PeerPhase.FAILED}


@dataclass(frozen=True, kw_only=True)
class View:
    """Snapshot of what is known of a peer."""

    status: Any  # wire.PeerStatus, the last one; empty if there is none
    phase: PeerPhase
    folder: Path | None = None
    now: float = 0.0  # Unix seconds
    note: str = ""  # additional sentence, such as "waiting for it to come back"


@dataclass(frozen=True, kw_only=True)
class LocalPeer:
    """Peer that runs or has run, by its folder or by the TCP address at which it answers."""

    folder: Path | None = None
    address: str = ""

    def last(self) -> Any:
        """Read the status in the peer's folder; an empty one if there is none."""
        status = wire.PeerStatus()
        if self.folder is not None:
            with contextlib.suppress(OSError, json_format.ParseError, UnicodeDecodeError):
                text = (self.folder / "status.json").read_text(encoding="utf-8")
                return json_format.Parse(text, status, ignore_unknown_fields=True)
        return wire.PeerStatus()

    def target(self) -> str:
        """Return the gRPC target at which the peer answers; empty while the peer has not written one."""
        if self.folder is None:
            return self.address
        try:
            return (self.folder / "control.address").read_text(encoding="utf-8").partition("\n")[0].strip()
        except (OSError, UnicodeDecodeError):
            return ""


class NoAnswerError(RunTimeError):
    """Missing answer of a peer; `timed_out` if it took the call and was silent."""

    code = "peer-silent"

    def __init__(self, message: str, *, code: str = "", timed_out: bool = False) -> None:
        super().__init__(message, code=code)
        self.timed_out = timed_out


class RefusedError(RunTimeError):
    """Refusal with which a peer answered."""


class ForeignError(RefusedError):
    """Peer that only another user may ask."""


# ---------------------------------------------------------------- finding


def title(status: Any, folder: Path | None) -> str:
    """Return what to call a peer: its name, else its folder's name, else "the peer"."""
    return one_line(status.name) or (folder.name if folder is not None else "the peer")


def known_peers(home: Path) -> list[LocalPeer]:
    """List the peers whose folders are in `home`, the most recent first."""
    folders = []
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        for path in home.iterdir():
            with contextlib.suppress(PermissionError):
                folders += [path] if _is_peer_folder(path) else []
    return [LocalPeer(folder=path) for path in sorted(folders, key=_recent, reverse=True)]


def _is_peer_folder(path: Path) -> bool:
    return any((path / name).exists() for name in ("lock", "status.json"))


def _recent(folder: Path) -> float:
    times = [0.0]
    for name in ("lock", "status.json"):
        with contextlib.suppress(OSError):
            times.append((folder / name).stat().st_mtime)
    return max(times)


def find(which: WhichPeer) -> LocalPeer:
    """Find the one peer meant: the only one that runs, else the one that ran last. Raises UserError if several run."""
    if which.address:
        return LocalPeer(address=which.address)
    peers, where = _candidates(which)
    running = [peer for peer in peers if peer.folder is not None and holder(peer.folder) is Holder.RUNNING]
    if len(running) > 1:
        listed = ", ".join(f"{title(peer.last(), peer.folder)} ({peer.folder})" for peer in running)
        raise UserError(f"several peers run here: {listed}; say which with NAME or --dir FOLDER", code="several-peers")
    if running:
        return running[0]
    if peers:
        return next((peer for peer in peers if not _failed_before_it_had_a_run(peer)), peers[0])
    named = f" named {one_line(which.name)}" if which.name else ""
    raise UserError(
        f"no peer{named} has run {where}; if it was started with --dir, give the same --dir", code="no-such-peer"
    )


def _failed_before_it_had_a_run(peer: LocalPeer) -> bool:
    """Return whether the peer's folder holds only the message that the peer failed."""
    assert peer.folder is not None
    return not (peer.folder / "run.toml").exists() and peer.last().state == wire.PEER_STATE_FAILED


@contextlib.contextmanager
def listed(folder: Path) -> Iterator[None]:
    """Inside, the peers whose folders are in `folder` are found without `--dir`, for `swarmtrain local`."""
    path = _home() / _LISTED / str(os.getpid())
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.write_text(str(folder.absolute()), encoding="utf-8")
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()


def _listed_running() -> list[LocalPeer]:
    """List running peers of listed folders. A folder stays listed if its `local` was killed."""
    entries, found = list[Path](), list[LocalPeer]()
    with contextlib.suppress(OSError):
        entries = sorted((_home() / _LISTED).iterdir())
    for entry in entries:
        with contextlib.suppress(OSError, ValueError):  # an unreadable entry must not hide the others
            if folder := entry.read_text(encoding="utf-8"):
                found += known_peers(Path(folder))
    return [peer for peer in found if peer.folder is not None and holder(peer.folder) is Holder.RUNNING]


def _once(peers: list[LocalPeer]) -> list[LocalPeer]:
    """Remove duplicates by folder, keeping the order."""
    found: dict[Path | None, LocalPeer] = {}
    for peer in peers:
        found.setdefault(peer.folder and peer.folder.resolve(), peer)
    return list(found.values())


def _home() -> Path:
    import platformdirs

    return platformdirs.user_data_path("swarmtrain")


def find_all(which: WhichPeer) -> list[LocalPeer]:
    """List every peer that `which` allows. Raises UserError if there is none."""
    if which.address:
        return [LocalPeer(address=which.address)]
    peers, where = _candidates(which)
    if not peers:
        raise UserError(
            f"no peer has run {where}; if one was started with --dir, give the same --dir", code="no-such-peer"
        )
    return peers


def find_running(which: WhichPeer) -> LocalPeer:
    """Find the one peer meant. Raises RunTimeError, which says what to do, if it does not run."""
    peer = find(which)
    if peer.folder is not None and holder(peer.folder) is Holder.NOBODY:
        name = title(peer.last(), peer.folder)
        where = shlex.quote(str(peer.folder))
        raise RunTimeError(
            f"{name} does not run; `swarmtrain status --dir {where}` shows how it ended", code="peer-not-running"
        )
    return peer


def _candidates(which: WhichPeer) -> tuple[list[LocalPeer], str]:
    """List the peers that `--dir` and NAME allow, the most recent first; return also where they were searched."""
    home = which.directory or _home()
    try:
        if which.directory is not None and not home.is_dir():
            raise UserError(
                f"{home} is not a folder; give a peer's, or one with several of them, with --dir", code="no-such-folder"
            )
        peers = [LocalPeer(folder=home)] if _is_peer_folder(home) else known_peers(home)
        peers = _once([*peers, *_listed_running()]) if which.directory is None else peers
    except PermissionError:
        raise UserError(
            f"{home} cannot be read: it belongs to another user; ask as that user", code="other-user"
        ) from None
    if which.name:
        peers = [peer for peer in peers if _is_called(peer, which.name)]
    return peers, f"in {home}"


def _is_called(peer: LocalPeer, name: str) -> bool:
    assert peer.folder is not None
    status, folder = peer.last(), peer.folder.name
    names = (
        status.name,
        folder,
        folder.partition("-")[2],
    )  # a new peer's folder is named after its role and name, before it has a status
    return name in names or (len(name) >= 4 and status.peer.endswith(name))


# ---------------------------------------------------------------- asking


@contextlib.contextmanager
def channel(peer: LocalPeer, service: Callable[[Any], Any] | None = None) -> Iterator[Any]:
    """Open a gRPC stub of `peer`, of its control service unless another `service` is named.

    Raises NoAnswerError if the peer has not written where it answers.
    """
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # gRPC would write over the screen
    import grpc

    from swarmtrain.v1.control_pb2_grpc import ControlStub

    target = peer.target()
    if not target:
        raise NoAnswerError(
            f"{_name(peer)} does not answer yet: it is starting; try again in a few seconds", code="peer-starting"
        )
    options = [
        ("grpc.max_receive_message_length", _MAX_ANSWER_BYTES),
        ("grpc.enable_http_proxy", 0),
        ("grpc.use_local_subchannel_pool", 1),  # do not reuse the connection of a channel that is about to close
    ]
    with grpc.insecure_channel(target, options=options) as opened:
        stub: Any = service or ControlStub
        yield stub(opened)


def ask(peer: LocalPeer, method: str, request: Any, limit_s: float = CALL_LIMIT_S) -> Any:
    """Call a method of the control service. Raises SwarmtrainError in plain words if the call fails."""
    with channel(peer) as stub:
        import grpc

        try:
            return getattr(stub, method)(request, timeout=limit_s)
        except grpc.RpcError as error:
            raise in_words(error, peer) from None


def check_health(peer: LocalPeer) -> None:
    """Ask a peer's health service. Raises RunTimeError, which says what the peer does, if it is not healthy."""
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    with channel(peer, health_pb2_grpc.HealthStub) as stub:
        import grpc

        try:
            answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=CALL_LIMIT_S)
        except grpc.RpcError as error:
            raise in_words(error, peer) from None
    if answer.status != health_pb2.HealthCheckResponse.SERVING:
        status = ask(peer, "Status", wire.StatusRequest())
        state = wire.PeerState.Name(status.state).removeprefix("PEER_STATE_").lower()
        doing = f": {one_line(status.doing)}" if status.doing else ""
        raise RunTimeError(
            f"{_name(peer)} is not healthy, it is {state}{doing}; `swarmtrain status` shows more", code="not-healthy"
        )


def tell(peer: LocalPeer, method: str, request: Any) -> str:
    """Make a peer do something; returns its answer for a person."""
    return one_line(ask(peer, method, request).message)


def in_words(error: Any, peer: LocalPeer) -> SwarmtrainError:
    """Translate a gRPC error of a call to `peer` into an error for a person."""
    code, details = error.code().name, one_line(error.details() or "")
    name = _name(peer)
    if code == "DEADLINE_EXCEEDED":
        return NoAnswerError(
            f"{name} does not answer: it is stopped (Ctrl-Z) or very busy; try again",
            timed_out=True,
            code="peer-silent",
        )
    if code in ("UNAVAILABLE", "CANCELLED"):
        if "permission denied" in details.lower():
            return ForeignError(f"{name} runs as another user; ask as that user", code="other-user")
        if peer.folder is None:
            reason = details or "the connection broke"
            return NoAnswerError(
                f"nobody answers at {peer.address}: {reason}; start it with --control {peer.address}",
                code="nobody-at-address",
            )
        return NoAnswerError(
            f"{name} does not answer: it is starting or ending; try again in a few seconds", code="peer-starting"
        )
    if code == "UNIMPLEMENTED" and not details.startswith("this peer"):
        return RefusedError(
            f"{name} cannot do that: it runs another version of swarmtrain; end it and start it again",
            code="peer-of-another-version",
        )
    kind = RefusedError if code in _REFUSALS else RunTimeError
    told = [str(value) for key, value in error.trailing_metadata() or () if key == CODE_KEY]
    known = next((each for each in told if re.fullmatch(r"[a-z0-9-]{1,40}", each)), "peer-refused")
    return kind(f"{name}: {details or code}", code=known)


def _name(peer: LocalPeer) -> str:
    return title(peer.last(), peer.folder) if peer.folder is not None else peer.address


# ---------------------------------------------------------------- looking


def look(peer: LocalPeer) -> View:
    """Return what is known of `peer` now, by its answer or from its folder. Raises NoAnswerError if it does not answer
    and has no folder here, ForeignError if it belongs to another user."""
    if peer.folder is not None and holder(peer.folder) is Holder.NOBODY:
        return look_without_asking(peer)
    try:
        status = ask(peer, "Status", wire.StatusRequest())
    except NoAnswerError as error:
        if peer.folder is None:
            raise
        return look_without_asking(peer, problem=error)
    return View(status=status, phase=PeerPhase.RUNNING, folder=peer.folder, now=time.time())


def look_without_asking(
    peer: LocalPeer, *, problem: NoAnswerError | None = None, heard: wire.PeerStatus | None = None
) -> View:
    """Return what a peer's folder says of the peer.

    `problem`: why it did not answer, if it was asked; `heard`: the last status that it sent itself.
    """
    assert peer.folder is not None
    process = holder_pid(peer.folder)  # first, so that a peer that ends meanwhile counts as ended
    held, status = holder(peer.folder), peer.last()
    note = str(problem) if problem is not None and held is not Holder.NOBODY else ""
    last = status if heard is None or heard.time < status.time else heard
    if held is Holder.NOBODY and _last_holder(peer.folder) not in (0, status.pid):
        phase = PeerPhase.DIED  # the file is of an earlier process, so the last one left no status
    elif held is Holder.NOBODY:
        phase = _ENDS.get(status.state, PeerPhase.DIED)
    elif last.pid == process and last.state in _ENDS:
        phase = PeerPhase.ENDING
    elif (
        problem is not None
        and not problem.timed_out
        and (last.pid != process or last.state == wire.PEER_STATE_STARTING)
    ):
        phase = PeerPhase.STARTING  # the status is of an earlier process, or this one has just begun to serve
    else:
        phase = PeerPhase.SILENT
    return View(status=status, phase=phase, folder=peer.folder, now=time.time(), note=note)


def run_history(peer: LocalPeer, view: View) -> Any:
    """Return the record of the peer's run, a `RunHistory`: as it answers while it runs, else as it left it.

    None without one, or if it is of an earlier run in the peer's folder. The call takes up to `CALL_LIMIT_S`.
    """
    if view.phase is PeerPhase.RUNNING:
        with contextlib.suppress(SwarmtrainError):  # it has just ended, or is of a version that keeps none
            return ask(peer, "History", wire.RunHistoryRequest())
    if peer.folder is None:
        return None
    from swarmtrain.peer.control.history import read_history

    history, known = read_history(peer.folder), view.status.run_sha256
    is_other = history is not None and history.run_sha256 and known and history.run_sha256 != known
    return None if is_other else history


def _last_holder(folder: Path) -> int:
    try:
        return int((folder / "lock").read_text())
    except (OSError, ValueError):
        return 0


def view_as_json(view: View) -> dict[str, Any]:
    """Return a view as JSON: the fields of PeerStatus, the state of its process (`process`) and its folder (`dir`)."""
    head = {"process": view.phase.value, "dir": str(view.folder) if view.folder is not None else None}
    return head | _plain(view.status)


def _plain(message: Any) -> dict[str, Any]:
    """Return all fields of a message as a dictionary: enums as lower-case words, absent fields as None."""
    return {field.name: _value(message, field) for field in message.DESCRIPTOR.fields}


def _value(message: Any, field: FieldDescriptor) -> Any:
    value = getattr(message, field.name)
    if hasattr(value, "add"):  # repeated messages
        return [_plain(item) for item in value]
    if hasattr(value, "append"):  # repeated numbers
        return list(value)
    if field.has_presence and not message.HasField(field.name):
        return None
    if field.message_type is not None:
        return _plain(value)
    if field.enum_type is not None:
        found = field.enum_type.values_by_number.get(value)
        return re.sub("^PEER_STATE_", "", found.name).lower() if found is not None else str(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value

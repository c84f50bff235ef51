"""Convert between checkpoint objects and files: a swarm's state, and for a volunteer its own part; checked when read.

The tensors are flat fp32: `theta` and `momentum` (P,), a volunteer's `moments` (2, P) with `steps` (N,), a server's
`delta` (P,).
"""

from __future__ import annotations

import base64
import binascii
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from google.protobuf.message import DecodeError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from swarmtrain.algorithm.inner import LentMoments, Moments
from swarmtrain.algorithm.outer import OuterState
from swarmtrain.errors import BadBytesError
from swarmtrain.network.rounds.roster import roster_untrusted
from swarmtrain.peer.checkpoints.files import (
    CheckpointFolder,
    DamagedError,
    StoredCheckpoint,
    TensorBytes,
    Unused,
    Written,
)
from swarmtrain.peer.training.session import LocalCheckpoint
from swarmtrain.protocol.rounds.rosters import Roster
from swarmtrain.protocol.tokens.progress import Progress
from swarmtrain.run import RunFile
from swarmtrain.v1 import snapshot_pb2 as pb

_log = logging.getLogger(__name__)
_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """State with its counters and the roster that led to it. `own` is the volunteer's own part, None in a bootstrap's
    checkpoint.

    Where peers merge asynchronously there are no rosters: both fields are None.
    """

    state: OuterState
    progress: Progress
    roster: Roster | None
    signed_roster: pb.Signed | None
    own: LocalCheckpoint | None = None
    delta: Tensor | None = None
    """With a server: the sum of the gradients since its momentum was refreshed, (P,)."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Data that other parts keep with it, by name; anything that fits JSON."""


def save(folder: CheckpointFolder, checkpoint: Checkpoint, moments_read: Callable[[], None] = lambda: None) -> Written:
    """Write a checkpoint. `moments_read` is called once the moments are read, which the trainer may be waiting for.

    The state is used up: what merges have replaced of it is freed as it is written, not only when it is on the disk.
    Raises OSError as the file system gives it; older checkpoints are untouched then.
    """
    progress, own, signed = checkpoint.progress, checkpoint.own, checkpoint.signed_roster
    manifest: dict[str, Any] = {
        "run_tokens": progress.run_tokens,
        "peer_tokens": dict(progress.peer_tokens),
        "roster": None if signed is None else base64.b64encode(signed.SerializeToString()).decode(),
        "own": None,
        "extra": dict(checkpoint.extra),
    }
    found = [
        _bytes_of(name, pieces) for name, pieces in zip(("theta", "momentum"), checkpoint.state.spent(), strict=True)
    ]
    if checkpoint.delta is not None:
        found.append(_bytes_of("delta", [checkpoint.delta]))
    if own is not None:
        manifest["own"] = {
            "batches": own.batches,
            "tokens": own.own_tokens,
            "young_steps": own.young_steps,
            "steps_per_s": own.steps_per_s,
        }
        found.append(_bytes_of("steps", [own.moments.steps]))
        found.insert(0, _moments_of(own.moments, moments_read))  # first: the trainer waits for lent ones
    return folder.write(progress.round, found, manifest)


def _bytes_of(name: str, pieces: list[Tensor]) -> TensorBytes:
    """Return a vector, stored in these pieces, as the bytes of a tensor; each piece is freed when the next one is asked
    for."""
    left = pieces[::-1]

    def views() -> Iterator[memoryview]:
        while left:
            yield _view(left.pop())

    return TensorBytes(name=name, shape=(sum(len(piece) for piece in pieces),), data=views())


def _moments_of(moments: Moments | LentMoments, are_read: Callable[[], None]) -> TensorBytes:
    if isinstance(moments, LentMoments):

        def pieces() -> Iterator[memoryview]:
            for piece in moments.read():
                yield _view(piece)
            are_read()

        return TensorBytes(name="moments", shape=(2, moments.num_numbers // 2), data=pieces())
    are_read()
    vectors = moments.vectors
    return TensorBytes(name="moments", shape=tuple(vectors.shape), data=[_view(vectors)])


def _view(tensor: Tensor) -> memoryview:
    assert tensor.dtype is torch.float32 and tensor.is_contiguous() and tensor.device.type == "cpu"
    return memoryview(tensor.detach().reshape(-1).numpy())  # type: ignore[arg-type]


def load_newest(
    folder: CheckpointFolder, run: RunFile, num_parameters: int, warn: Callable[[str], None]
) -> tuple[Checkpoint, Written] | None:
    """Return (the newest whole checkpoint, its file); None if there is none. Call `warn` with a sentence for each
    unusable one."""
    return _newest(folder, warn, lambda kept: _parse(folder, kept, run, num_parameters))


def load_newest_weights(
    folder: CheckpointFolder, num_parameters: int, warn: Callable[[str], None]
) -> tuple[Tensor, Progress, Written] | None:
    """Return (theta (P,), its counters, the file) of the newest whole checkpoint; None if there is none.

    The rest of it is checked and not held: three quarters of a volunteer's checkpoint. Call `warn` with a sentence for
    each unusable one.
    """

    def parse(kept: StoredCheckpoint) -> tuple[Tensor, Progress]:
        theta, manifest = _read_tensors(folder.tensors_of(kept), ("theta",))["theta"], kept.manifest
        if theta.shape != (num_parameters,):
            raise ValueError("it is of another model")
        tokens = {"run_tokens": manifest["run_tokens"], "peer_tokens": manifest["peer_tokens"]}
        return theta, Progress(round=manifest["round"], **tokens)

    found = _newest(folder, warn, parse)
    return None if found is None else (*found[0], found[1])


def _newest(
    folder: CheckpointFolder, warn: Callable[[str], None], parse: Callable[[StoredCheckpoint], _T]
) -> tuple[_T, Written] | None:
    """Return (what `parse` makes of the newest checkpoint that it takes, its file); None if there is none."""
    try:
        entries = list(folder.newest_first())
    except OSError as error:
        warn(f"the checkpoints in {folder.path} cannot be read: {error.strerror}; look after the disk")
        return None
    for entry in entries:
        if isinstance(entry, Unused) and entry.foreign:  # the folder also served another run or peer: no fault
            _log.info("the checkpoint %s is not used: %s", folder.path / entry.name, entry.reason)
    ours = [entry for entry in entries if isinstance(entry, StoredCheckpoint) or not entry.foreign]
    for number, entry in enumerate(ours, start=1):
        found = _load(folder, entry, parse) if isinstance(entry, StoredCheckpoint) else entry
        if not isinstance(found, Unused):
            return found
        then = "the one before it is tried" if number < len(ours) else "there is none before it"
        warn(f"the checkpoint {folder.path / found.name} is not used: {found.reason}; {then}")
    return None


def _load(
    folder: CheckpointFolder, kept: StoredCheckpoint, parse: Callable[[StoredCheckpoint], _T]
) -> tuple[_T, Written] | Unused:
    try:
        return parse(kept), folder.written(kept)
    except OSError as error:
        reason = f"it cannot be read: {error.strerror}"
    except KeyError as error:
        reason = f"it lacks {error}"
    except (
        *(DamagedError, BadBytesError, SafetensorError, DecodeError, binascii.Error),
        *(ValueError, TypeError, AttributeError),
    ) as error:
        reason = str(error)
    return Unused(f"{kept.stem}.json", reason)


def _parse(folder: CheckpointFolder, kept: StoredCheckpoint, run: RunFile, num_parameters: int) -> Checkpoint:
    manifest, tensors = kept.manifest, _read_tensors(folder.tensors_of(kept))
    theta, momentum = tensors["theta"], tensors["momentum"]
    kind = run.merge.kind
    if theta.shape != (num_parameters,) or momentum.shape != (kind.num_moments * num_parameters,):
        raise ValueError("it is of another model")
    delta = tensors.get("delta")
    if delta is not None and delta.shape != theta.shape:
        raise ValueError("its buffer is of another model")
    roster, signed = _roster(manifest["roster"], folder, run)
    progress = Progress(
        round=manifest["round"],
        run_tokens=manifest["run_tokens"],
        peer_tokens=manifest["peer_tokens"],
        roster_sha256="" if roster is None else roster.digest,
    )
    if roster is None:
        if progress.run_tokens != sum(progress.peer_tokens.values()):
            raise ValueError("its counters do not add up")
    elif progress.round != roster.round + 1 or progress.run_tokens != roster.total_tokens:
        raise ValueError("its counters do not fit its roster")
    own = manifest["own"]
    return Checkpoint(
        state=OuterState(theta, momentum),
        progress=progress,
        roster=roster,
        signed_roster=signed,
        own=None if own is None else _own_part(own, tensors, (0 if kind.common_step else 2, num_parameters)),
        delta=delta,
        extra=manifest["extra"],
    )


def _roster(encoded: str | None, folder: CheckpointFolder, run: RunFile) -> tuple[Roster | None, pb.Signed | None]:
    if run.merge.kind.asynchronous:
        return None, None
    if encoded is None:
        raise ValueError("it has no roster")
    signed = pb.Signed.FromString(base64.b64decode(encoded))
    return roster_untrusted(signed, folder.run_sha256, run.max_round_tokens), signed


def _own_part(own: Mapping[str, Any], tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> LocalCheckpoint:
    vectors, steps = tensors["moments"], tensors["steps"]
    if vectors.shape != shape or steps.dim() != 1:
        raise ValueError("its moments are of another model")
    return LocalCheckpoint(
        batches=own["batches"],
        own_tokens=own["tokens"],
        young_steps=own["young_steps"],
        steps_per_s=own["steps_per_s"],
        moments=Moments(vectors=vectors, steps=steps),
    )


def _read_tensors(path: Path, names: Sequence[str] = ()) -> dict[str, Tensor]:
    """Read the tensors, or those of these `names`, into memory of their own: safetensors may map the file, which will
    be removed.
    """
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name).clone() for name in names or file.keys()}

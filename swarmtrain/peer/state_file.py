"""A swarm's state on disk: outer parameters, momentum, counters, and the roster that led to them, in one file.

Written at once or not at all; a file that was torn or altered is noticed by its hash and not used.
"""

from __future__ import annotations

import base64
import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load, save

from swarmtrain.algorithm.outer import OuterState
from swarmtrain.errors import BadBytesError
from swarmtrain.membership.progress import Progress
from swarmtrain.membership.rosters import Roster
from swarmtrain.network.files import write_atomically
from swarmtrain.network.roster import roster_untrusted
from swarmtrain.run import RunFile
from swarmtrain.v1 import snapshot_pb2 as pb

__all__ = ["KeptState", "load_state", "save_state"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class KeptState:
    """A state with its counters and its roster."""

    state: OuterState
    progress: Progress
    roster: Roster
    signed_roster: pb.Signed


def save_state(path: Path, kept: KeptState) -> None:
    """Write `kept` to `path`. Raises OSError as the file system gives it."""
    progress = kept.progress
    counters = {"round": progress.round, "run_tokens": progress.run_tokens, "peer_tokens": dict(progress.peer_tokens)}
    metadata = {
        "counters": json.dumps(counters),
        "roster": base64.b64encode(kept.signed_roster.SerializeToString()).decode(),
    }
    data = save({"theta": kept.state.theta, "momentum": kept.state.momentum}, metadata)
    write_atomically(path, hashlib.sha256(data).digest() + data)


def load_state(path: Path, run: RunFile, run_sha256: str, num_parameters: int) -> KeptState | None:
    """The state in `path`; None, with a line in the log, if there is none or it is not whole."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    try:
        return _parse(data, run, run_sha256, num_parameters)
    except (BadBytesError, SafetensorError, ValueError, KeyError, TypeError) as error:
        _log.warning("%s is not used: %s", path, error)
        return None


def _parse(data: bytes, run: RunFile, run_sha256: str, num_parameters: int) -> KeptState:
    digest, body = data[:32], data[32:]
    if hashlib.sha256(body).digest() != digest:
        raise ValueError("it was torn or altered")
    metadata = json.loads(body[8 : 8 + int.from_bytes(body[:8], "little")])["__metadata__"]
    tensors = load(body)
    theta, momentum = tensors["theta"], tensors["momentum"]
    if theta.shape != (num_parameters,) or momentum.shape != (num_parameters,):
        raise ValueError("it is of another model")
    signed = pb.Signed.FromString(base64.b64decode(metadata["roster"]))
    roster = roster_untrusted(signed, run_sha256, run.merge.inner_steps * run.tokens_per_step)
    counters = json.loads(metadata["counters"])
    progress = Progress(
        round=counters["round"],
        run_tokens=counters["run_tokens"],
        peer_tokens=counters["peer_tokens"],
        roster_sha256=roster.digest,
    )
    if progress.round != roster.round + 1 or progress.run_tokens != roster.total_tokens:
        raise ValueError("its counters do not fit its roster")
    return KeptState(state=OuterState(theta, momentum), progress=progress, roster=roster, signed_roster=signed)

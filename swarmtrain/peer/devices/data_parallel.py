"""Data-parallel training on several devices, as the peer sees it: a process for each further device.

The peer itself is rank 0. It alone has the network, the session, the data and the checkpoints. Each further rank
(`rank_process.py`) holds a copy of the weights and of AdamW's moments. Before a step rank 0 sends what has changed,
after a merge the weights, and at the start the moments of a checkpoint too; then all ranks take the same step, so that
their weights stay equal to the bit.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributed import FileStore  # type: ignore[attr-defined]

from swarmtrain.algorithm.inner import InnerOptimizer
from swarmtrain.environment import COMPUTES, minimal_environment
from swarmtrain.errors import Problem, RunTimeError
from swarmtrain.model.language_model import LanguageModel
from swarmtrain.model.run_model import spec_to_json
from swarmtrain.peer.devices.compute import CACHE_VARIABLE, ComputeDevice, does_not_fit, is_out_of_memory
from swarmtrain.peer.devices.rank_group import RankGroup, RankLostError
from swarmtrain.peer.devices.rank_process import OUT_OF_MEMORY, STORE, ready_key
from swarmtrain.peer.lifecycle.stop import StopTraining

LIMIT_S = 600.0
"""Time limit of a collective, as torch has it for nccl: a rank may be slower than others by a part of a batch, or by
the compiling of its loss."""
_MODULE = "swarmtrain.peer.devices.rank_process"
_POLL_INTERVAL_S = 0.1
_START_S = 120.0
"""Time that a rank has to import torch, on a busy machine."""
_EXIT_S = 2.0
"""Time that a rank has to end by itself."""


@dataclass(eq=False)
class DataParallelRanks:
    """Ranks of one loop beside its own process, from their start to their end."""

    _doing: ClassVar[str] = "adding up gradients"
    """What was going on when memory ran out and the step cannot be repeated."""
    model: LanguageModel
    inner: InnerOptimizer
    compute: ComputeDevice
    """What rank 0 computes with, and the devices of the others."""
    on_lost: Callable[[Problem], None] = lambda problem: None
    """Called, from a thread, when a rank has ended by itself."""
    limit_s: float = LIMIT_S
    _processes: list[subprocess.Popen[bytes]] = field(default_factory=list, init=False)
    _folder: Path | None = field(default=None, init=False)
    _group: RankGroup | None = field(default=None, init=False)
    _versions: list[int] = field(default_factory=list, init=False)
    """Version of each parameter's tensor as the others have it."""
    _asked: tuple[torch.cuda.Event, float] | None = field(default=None, init=False)
    """End of the last step that was asked of a card, and when it is late; the trainer may be waiting for it."""
    watcher: threading.Thread = field(init=False)
    """Thread that waits for ranks that end by themselves."""
    _is_closed: threading.Event = field(default_factory=threading.Event, init=False)

    def __post_init__(self) -> None:
        self.watcher = threading.Thread(target=self._watch, name="ranks", daemon=True)

    @property
    def num_ranks(self) -> int:
        """Number of ranks, this one included."""
        return 1 + len(self.compute.others)

    def start(self) -> None:
        """Start the other ranks' processes; returns at once, and they are waited for in the first step."""
        self._folder = Path(tempfile.mkdtemp(prefix="swarmtrain-ranks-"))  # for this user alone
        for rank, device in enumerate(self.compute.others, 1):
            task = {
                "model": spec_to_json(self.model.spec),
                "constants": asdict(self.inner.constants),
                "device": str(device),
                "precision": self.compute.precision,
                "memory_share": self.compute.memory_share,
                "shards": self.compute.shards,
                "rank": rank,
                "num_ranks": self.num_ranks,
                "folder": str(self._folder),
                "limit_s": self.limit_s,
            }
            try:
                process = self._started(rank)
                self._processes.append(process)
                self._tell_one(process, task)
            except (OSError, RankLostError) as error:
                raise RunTimeError(self._lost(str(device), f"did not start ({error})")) from error
        self.watcher.start()

    def _started(self, rank: int) -> subprocess.Popen[bytes]:
        with self._errors_of(rank).open("wb") as errors:
            return subprocess.Popen(
                [sys.executable, "-m", _MODULE],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                env=minimal_environment(COMPUTES),
                process_group=0,  # Ctrl-C is for rank 0, which lets the others finish what it begins
            )

    def differentiate(
        self,
        batch: Tensor,
        loss_of: Callable[[Tensor], Tensor],
        compute: ComputeDevice,
        should_stop: Callable[[], bool],
    ) -> Tensor | None:
        """Set `.grad` to the gradient of the mean loss of `batch`, on every rank; see `RankGroup.gradient`.

        `loss_of` and `compute` are rank 0's, and the others follow. Raises RunTimeError if a rank is lost.
        """

        def stops() -> bool:
            if stop := should_stop():
                self._tell("stop")
            return stop

        try:
            group = self._connected(should_stop)
            self._send_state(group)
            self._tell(
                "differentiate",
                shape=list(batch.shape),
                microbatch_sequences=compute.microbatch_sequences,
                recomputes=compute.recomputes,
                num_threads=torch.get_num_threads(),
                compile_cache=None if loss_of == self.model.loss else os.environ.get(CACHE_VARIABLE, ""),
            )
            group.broadcast([batch])
            return self._gradient(group, batch, loss_of, compute, stops)
        except RankLostError as error:
            raise RunTimeError(self._problem(error)) from error
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            # Not in this rank's own part, which is repeated smaller: the others are in a collective.
            raise does_not_fit(self._doing, self.compute.device) from error

    def _gradient(
        self,
        group: RankGroup,
        batch: Tensor,
        loss_of: Callable[[Tensor], Tensor],
        compute: ComputeDevice,
        should_stop: Callable[[], bool],
    ) -> Tensor | None:
        return group.gradient(batch, loss_of, compute, self.inner, should_stop)

    def optimize(self, progress: float, scale: float) -> Tensor:
        """Take the optimizer's step on every rank, and return the gradient's norm (); see `InnerOptimizer.step`."""
        try:
            self._tell("optimize", progress=progress, scale=scale)
            norm = self._step(progress, scale)
        except RankLostError as error:
            raise RunTimeError(self._problem(error)) from error
        self._versions = self._present_versions()
        if self.compute.device.type == "cuda":
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(self.compute.device))
            self._asked = event, time.monotonic() + self.limit_s
        return norm

    def _step(self, progress: float, scale: float) -> Tensor:
        return self.inner.step(progress, scale)

    def release_cached(self) -> None:
        """Let other programs have the memory of the other devices that only steps need."""
        try:
            self._tell("release")
        except RankLostError as error:
            raise RunTimeError(self._problem(error)) from error

    def close(self) -> None:
        """End the other ranks, within some seconds; no step follows."""
        if self._is_closed.is_set():
            return
        self._is_closed.set()
        for process in self._processes:
            assert process.stdin is not None
            with suppress(OSError):
                process.stdin.close()
        if self._group is not None:
            self._end()
            self._group.leave()
        give_up_s = time.monotonic() + _EXIT_S
        for process in self._processes:
            try:
                process.wait(max(0.0, give_up_s - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _end(self) -> None:
        """Drop what refers to the group."""

    # ------------------------------------------------------------- what the others are told

    def _tell(self, do: str, **arguments: Any) -> None:
        """Give a command to the others. Raises RankLostError if one has ended."""
        for process in self._processes:
            self._tell_one(process, {"do": do, **arguments})

    def _tell_one(self, process: subprocess.Popen[bytes], command: dict[str, Any]) -> None:
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps(command).encode() + b"\n")
            process.stdin.flush()
        except (OSError, ValueError) as error:
            raise RankLostError(str(error)) from error

    def _connected(self, should_stop: Callable[[], bool]) -> RankGroup:
        """Return the group of all ranks, once they are all there. Raises RankLostError if one does not come, and
        StopTraining if `should_stop` returns True meanwhile."""
        if self._group is None:
            if self._folder is None:
                self.start()
            assert self._folder is not None
            store = FileStore(str(self._folder / STORE), self.num_ranks)
            give_up_s = time.monotonic() + _START_S
            keys = [ready_key(rank) for rank in range(1, self.num_ranks)]
            while not store.check(keys):
                if should_stop():
                    raise StopTraining
                if time.monotonic() > give_up_s or any(process.poll() is not None for process in self._processes):
                    raise RankLostError("a rank did not start")
                self._is_closed.wait(_POLL_INTERVAL_S)
            self._tell("connect")
            self._group = RankGroup.connect(store, 0, self.num_ranks, self.compute.device, self.limit_s)
            self._begin(self._group)
        return self._group

    def _begin(self, group: RankGroup) -> None:
        """Make this rank ready for its first step, and send the moments of a checkpoint."""
        self.inner.norm_of_all = group.norm_of_all
        if self.inner.has_moments:
            self._tell("moments")
            group.broadcast(self.inner.moment_tensors())

    def _send_state(self, group: RankGroup) -> None:
        """Send the parameters that were changed by others than the optimizer: all of them at first, and what a merge
        has written.

        torch counts the changes of each tensor, whoever makes them: a merge, an adopted state, a measured loss.
        """
        versions = self._present_versions()
        before = self._versions or [-1] * len(versions)
        which = [index for index, version in enumerate(versions) if version != before[index]]
        if which:
            self._tell("weights", which=which)
            parameters = list(self.model.parameters())
            self._send_weights(group, which, [parameters[index] for index in which])
            self._versions = self._present_versions()

    def _send_weights(self, group: RankGroup, which: list[int], tensors: list[Tensor]) -> None:
        group.broadcast(tensors)

    def _present_versions(self) -> list[int]:
        return [parameter._version for parameter in self.model.parameters()]

    # ------------------------------------------------------------- ranks that are lost

    def _errors_of(self, rank: int) -> Path:
        """Return the file with what a rank wrote to standard error."""
        assert self._folder is not None
        return self._folder / f"rank-{rank}.err"

    def _watch(self) -> None:
        """Wait until a rank ends by itself, or a card does not end a step, and say so."""
        while not self._is_closed.wait(_POLL_INTERVAL_S):
            asked = self._asked
            is_late = asked is not None and time.monotonic() > asked[1] and not asked[0].query()  # type: ignore[no-untyped-call]
            if is_late or any(process.poll() is not None for process in self._processes):
                problem = self._problem(None)
                if not self._is_closed.is_set():
                    self.on_lost(problem)
                    if self._group is not None:
                        self._group.abort()
                return

    def _problem(self, error: RankLostError | None) -> Problem:
        """Say which rank is lost and why, after a moment in which it may still be ending; `error` is what a collective
        raised."""
        give_up_s = time.monotonic() + _EXIT_S
        while all(process.poll() is None for process in self._processes) and time.monotonic() < give_up_s:
            self._is_closed.wait(_POLL_INTERVAL_S)
        started = zip(self._processes, self.compute.others, strict=False)  # perhaps not all were
        for rank, (process, device) in enumerate(started, 1):
            if process.poll() == OUT_OF_MEMORY:
                return does_not_fit("training", device).problems[0]
            if process.poll() is not None:
                return self._lost(str(device), f"has ended ({self._reason(rank, process.returncode)})")
        devices = " or ".join(dict.fromkeys(str(device) for device in self.compute.others))
        if error is None or "timed out" in str(error).lower() or "timeout" in str(error).lower():
            return self._lost(devices, f"did not answer for {self.limit_s:g} s")
        return self._lost(devices, f"failed ({str(error)[:200]})")

    def _lost(self, device: str, what: str) -> Problem:
        alone = self.compute.device
        return Problem(
            f"the process of this peer on {device} {what}, and without it this peer cannot go on; its last checkpoint "
            f"is kept: start it again, or with --device {alone} alone",
            "rank-lost",
        )

    def _reason(self, rank: int, code: int) -> str:
        """Say why a rank has ended."""
        if code < 0:
            return f"killed by {signal.Signals(-code).name}"
        said: list[str] = []
        with suppress(OSError):  # the peer ends at this moment, and has removed it
            said = self._errors_of(rank).read_text(errors="replace").strip().splitlines()
        return said[-1][:200] if said else f"exit code {code}"

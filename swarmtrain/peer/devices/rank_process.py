"""Process of a further rank of a peer: computes its part of each batch, as rank 0 tells it.

Rank 0 is the peer itself (`data_parallel.py`). It starts this process, writes to its standard input a line of JSON with
what the rank computes with, and then a line for each command. The process ends when its standard input does, which is
whenever rank 0 ends. It knows no network, no data and no run: batches, weights and moments come from rank 0.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue
from typing import IO, Any

import torch
from torch import Tensor
from torch.distributed import FileStore  # type: ignore[attr-defined]

from swarmtrain.algorithm.batch import num_rows
from swarmtrain.algorithm.inner import InnerConstants, InnerOptimizer, LossScale
from swarmtrain.model.language_model import ModelSpec
from swarmtrain.model.run_model import empty_model, spec_from_json
from swarmtrain.peer.devices.compute import CACHE_VARIABLE, ComputeDevice, is_out_of_memory, release_cached
from swarmtrain.peer.devices.rank_group import RankGroup, RankLostError
from swarmtrain.peer.lifecycle.stop import StopTraining

_log = logging.getLogger(__name__)

OUT_OF_MEMORY = 3
"""Exit code of a rank whose memory ran out where the step cannot be repeated."""
STORE = "store"
"""Name of the file at which the ranks meet, in the folder that rank 0 makes for them."""


def ready_key(rank: int) -> str:
    """Return the key that a rank sets in the store before it connects."""
    return f"ready/{rank}"


class _Commands:
    """Commands from rank 0, read by a thread of their own, which ends the process when rank 0 has ended."""

    def __init__(self, stream: IO[bytes], folder: Path) -> None:
        self._stream, self._folder = stream, folder
        self._queue: SimpleQueue[dict[str, Any]] = SimpleQueue()
        threading.Thread(target=self._read, name="commands", daemon=True).start()

    def _read(self) -> None:
        for line in self._stream:
            self._queue.put(json.loads(line))
        shutil.rmtree(self._folder, ignore_errors=True)  # if rank 0 was killed, nobody else does
        os._exit(0)  # the main thread may be in a collective that nobody completes

    def next(self) -> dict[str, Any]:
        """Return the next command; wait for it as long as it takes."""
        return self._queue.get()

    @property
    def has_next(self) -> bool:
        """True if there is another command: within a step it can only be one to stop."""
        return not self._queue.empty()


class RankWork:
    """What the rank computes with, and its commands' effects."""

    def __init__(self, task: dict[str, Any], store: FileStore) -> None:
        """Meet the other ranks at `store`, where rank 0 is by now."""
        self.compute = ComputeDevice(torch.device(task["device"]), task["precision"])
        device = self.compute.device
        if device.type == "cuda":
            torch.cuda.set_per_process_memory_fraction(task["memory_share"], device)
        self.group = RankGroup.connect(store, task["rank"], task["num_ranks"], device, task["limit_s"])
        self._build(spec_from_json(task["model"]), InnerConstants(**task["constants"]))

    def _build(self, spec: ModelSpec, constants: InnerConstants) -> None:
        """Make the model and its optimizer; the weights come from rank 0."""
        device = self.compute.device
        self.model = empty_model(spec).to(device)
        loss_scale = LossScale(device) if self.compute.precision == "fp16" else None
        self.inner = InnerOptimizer(self.model.named_parameters(), constants, loss_scale=loss_scale)
        self.inner.norm_of_all = self.group.norm_of_all
        self._loss_of: Callable[[Tensor], Tensor] = self.model.loss

    def weights(self, which: list[int]) -> None:
        """Take these parameters' values from rank 0."""
        parameters = list(self.model.parameters())
        self.group.broadcast([parameters[index] for index in which])

    def moments(self) -> None:
        """Take the moments from rank 0."""
        self.group.broadcast(self.inner.moment_tensors())

    def differentiate(self, command: dict[str, Any], commands: _Commands) -> None:
        """Compute this rank's part of a batch, which comes from rank 0."""
        if command["num_threads"] != torch.get_num_threads():
            torch.set_num_threads(command["num_threads"])
        at_once, recomputes = command["microbatch_sequences"], command["recomputes"]
        compute = replace(self.compute, microbatch_sequences=at_once, recomputes=recomputes)
        batch = torch.empty(command["shape"], dtype=torch.int64)
        self.group.broadcast([batch])
        with suppress(StopTraining):
            self._differentiate(batch, compute, command["compile_cache"], lambda: commands.has_next)

    def _differentiate(
        self, batch: Tensor, compute: ComputeDevice, compile_cache: str | None, should_stop: Callable[[], bool]
    ) -> None:
        self._use_compiled(compile_cache, num_rows(batch))
        self.model.recomputes_blocks = compute.recomputes
        if self.group.gradient(batch, self._loss_of, compute, self.inner, should_stop) is None:
            release_cached(self.compute.device)

    def _use_compiled(self, cache: str | None, rows: int = 1) -> None:
        """Compile the loss of batches with `rows` rows if rank 0 has compiled its own, with its cache, a folder; else
        compute it as it is."""
        is_compiled = self._loss_of != self.model.loss
        if cache is None or is_compiled:
            self._loss_of = self.model.loss if cache is None else self._loss_of
            return
        from swarmtrain.peer.devices.compiled_loss import compiled

        if cache:
            os.environ[CACHE_VARIABLE] = cache
        self._loss_of = compiled(self.model, lambda error: _log.info("not compiled: %s", error), rows)

    def optimize(self, progress: float, scale: float) -> None:
        """Take the optimizer's step."""
        self.inner.step(progress, scale)


class ShardedRankWork(RankWork):
    """The same for a model that is sharded; see `ShardedModel`."""

    def _build(self, spec: ModelSpec, constants: InnerConstants) -> None:
        from swarmtrain.peer.devices.sharded_model import ShardedModel

        self.sharded = ShardedModel(spec, self.group, constants, self.compute)
        self.inner = self.sharded.inner

    def weights(self, which: list[int]) -> None:
        """Take this rank's parts of these parameters' values from rank 0."""
        self.sharded.scatter(which, None)

    def moments(self) -> None:
        """Take this rank's parts of the moments from rank 0."""
        self.sharded.scatter_moments(None)

    def _differentiate(
        self, batch: Tensor, compute: ComputeDevice, compile_cache: str | None, should_stop: Callable[[], bool]
    ) -> None:
        self.sharded.gradient(batch, compute, should_stop)

    def optimize(self, progress: float, scale: float) -> None:
        """Take the optimizer's step."""
        self.sharded.optimize(progress, scale)


def _work() -> None:
    """Do what rank 0 says until it ends."""
    task = json.loads(sys.stdin.buffer.readline())
    commands = _Commands(sys.stdin.buffer, Path(task["folder"]))
    store = FileStore(str(Path(task["folder"]) / STORE), task["num_ranks"])
    if task["shards"]:
        import swarmtrain.peer.devices.sharded_model  # noqa: F401 - takes seconds, which the others need not wait
    store.set(ready_key(task["rank"]), "1")
    commands.next()  # to connect: before its first step rank 0 may wait for company longer than a collective may take
    rank = ShardedRankWork(task, store) if task["shards"] else RankWork(task, store)
    while True:
        command = commands.next()
        match command.pop("do"):
            case "weights":
                rank.weights(command["which"])
            case "moments":
                rank.moments()
            case "differentiate":
                rank.differentiate(command, commands)
            case "optimize":
                rank.optimize(command["progress"], command["scale"])
            case "gather" if isinstance(rank, ShardedRankWork):
                rank.sharded.gather(None)
            case "gather-moments" if isinstance(rank, ShardedRankWork):
                rank.sharded.gather_moments(None)
            case "release":
                release_cached(rank.compute.device)
            case _:
                pass  # a step was to stop that has ended


def main() -> None:
    """Work until rank 0 ends, or this rank cannot go on; then the exit code, or the last line on standard error, says
    why."""
    code = 1
    try:
        _work()
    except RankLostError as error:
        sys.stderr.write(f"another rank is lost: {error}\n")
    except BaseException as error:
        code = OUT_OF_MEMORY if is_out_of_memory(error) else 1
        _log.exception("this rank cannot go on")
    finally:
        sys.stderr.flush()
        os._exit(code)  # at once: a thread still reads, and gloo's threads would abort the process


if __name__ == "__main__":
    main()

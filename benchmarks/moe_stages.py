"""Run the stages of a model as experts of `hivemind.moe.Server`: tokens per second, to compare a pipeline with.

    python benchmarks/moe_stages.py examples/pipeline.toml --seconds 30 --set pipeline.stages=2

One server process per stage, with one thread. Each microbatch goes forward through all of them and back by hivemind's
`RemoteExpert` under autograd, `--in-flight` at a time from one driver process. In hivemind, a server keeps no graph:
its backward computes the forward again. Its experts step after each backward; here they step after a whole batch, which
is less work. The last expert computes the loss, so that no logits travel.
`benchmarks/pipeline_throughput.py --beside-moe` runs it beside ours.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from hivemind import DHT
from hivemind.moe.client.expert import RemoteExpert
from hivemind.moe.server.module_backend import ModuleBackend
from hivemind.moe.server.server import Server, get_experts
from hivemind.utils.tensor_descr import BatchTensorDescriptor
from run_files import read_run
from torch import Tensor, nn

from swarmtrain.algorithm.inner import InnerOptimizer
from swarmtrain.model.stages import Stage, build_stage, stage_shapes
from swarmtrain.peer.pipeline.stage_assignment import cut_and_measure
from swarmtrain.peer.training.loop import inner_constants
from swarmtrain.run import RunFile

_STARTED_S = 60.0
_WARM_S = 10.0


class Expert(nn.Module):
    """Stage as an expert. With the head it returns the loss of each sequence, so that hivemind can cut a batch."""

    def __init__(self, stage: Stage) -> None:
        super().__init__()
        self.stage = stage

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
        """Return hidden states (B, T, D), or with the head nats per token (B,)."""
        given: Tensor = self.stage(x)
        if targets is None:
            return given
        each = nn.functional.cross_entropy(given.flatten(0, 1), targets.flatten(), reduction="none")
        return each.view(targets.shape).mean(1)


class Backend(ModuleBackend):
    """Backend that takes an inner step after the sequences of a batch."""

    def __init__(self, name: str, module: Expert, run: RunFile, **schema: Any) -> None:
        super().__init__(name, module, **schema)
        self.inner = InnerOptimizer(module.stage.named_parameters(), inner_constants(run))
        self.batch_sequences, self.num_seen = run.inner.batch_sequences, 0

    def on_backward(self, batch_size: int) -> None:
        """See `ModuleBackend`."""
        self.num_seen += batch_size
        if self.num_seen >= self.batch_sequences:
            self.num_seen = 0
            self.inner.step(0.1)


def uid_of(number: int) -> str:
    """Return the name of a stage's expert."""
    return f"stage.{number}"


def serve(run: RunFile, number: int, boundaries: Sequence[int], initial_peers: Sequence[str]) -> None:
    """Serve one stage until killed."""
    torch.set_num_threads(1)
    shape = stage_shapes(run.model, boundaries)[number]
    microbatch = (run.microbatch_sequences, run.model.context_tokens)
    tokens = BatchTensorDescriptor.from_tensor(torch.zeros(microbatch, dtype=torch.int64))
    hidden = BatchTensorDescriptor.from_tensor(torch.zeros((*microbatch, run.model.width)))
    schema = (tokens if shape.has_embedding else hidden, *([tokens] if shape.has_head else []))
    module = Expert(build_stage(shape, run.run.seed))
    backend = Backend(uid_of(number), module, run, args_schema=schema, max_batch_size=run.microbatch_sequences)
    dht = DHT(initial_peers=list(initial_peers), host_maddrs=["/ip4/127.0.0.1/tcp/0"], start=True)
    server = Server(dht, {backend.name: backend}, num_connection_handlers=2, update_period=5, start=True)
    print(*dht.get_visible_maddrs(), flush=True)
    server.join()


def drive(experts: Sequence[RemoteExpert], run: RunFile, seconds: float, in_flight: int) -> float:
    """Drive microbatches through all experts and back; return tokens per second."""
    torch.set_num_threads(1)
    shape = (run.microbatch_sequences, run.model.context_tokens + 1)
    began_s = time.monotonic() + _WARM_S
    until_s, counts = began_s + seconds, [0] * in_flight

    def lane(number: int) -> None:
        while (now := time.monotonic()) < until_s:
            text = torch.randint(run.model.vocabulary_size, shape)
            x = text[:, :-1].contiguous()
            for expert in experts[:-1]:
                x = expert(x)
            experts[-1](x, text[:, 1:].contiguous()).mean().backward()
            counts[number] += (now >= began_s) * (shape[1] - 1) * shape[0]

    lanes = [threading.Thread(target=lane, args=(number,)) for number in range(in_flight)]
    for each in lanes:
        each.start()
    for each in lanes:
        each.join()
    return sum(counts) / (time.monotonic() - began_s)


def moe_tokens_per_s(run_file: Path, changes: Sequence[str], seconds: float, in_flight: int) -> float:
    """Start the servers, drive them and stop them; return tokens per second."""
    run = read_run(run_file, list(changes), 0)
    boundaries, _ = cut_and_measure(run)
    servers: list[subprocess.Popen[str]] = []
    peers: list[str] = []
    try:
        for number in range(run.pipeline.stages):
            command = [sys.executable, __file__, str(run_file), f"--serve={number}"]
            command += [f"--boundaries={','.join(map(str, boundaries))}", f"--peers={','.join(peers)}"]
            command += [f"--set={change}" for change in changes]
            servers.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True))
            stdout = servers[-1].stdout
            assert stdout is not None
            peers = peers or stdout.readline().split()
        dht = DHT(initial_peers=peers, client_mode=True, start=True)
        try:
            return drive(_found(dht, run.pipeline.stages), run, seconds, in_flight)
        finally:
            dht.shutdown()
    finally:
        for server in servers:  # with the processes that hivemind forks, which outlive their server
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def _found(dht: DHT, num_stages: int) -> list[RemoteExpert]:
    give_up_s = time.monotonic() + _STARTED_S
    while time.monotonic() < give_up_s:
        experts = get_experts(dht, [uid_of(number) for number in range(num_stages)])
        if all(expert is not None for expert in experts):
            return list(experts)
        time.sleep(1)
    raise TimeoutError(f"the servers declared nothing within {_STARTED_S:.0f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_file", type=Path)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--in-flight", type=int, default=6, help="microbatches on their way at once; default 6")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of the run file")
    parser.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--boundaries", default="", help=argparse.SUPPRESS)
    parser.add_argument("--peers", default="", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve is None:
        rate = moe_tokens_per_s(given.run_file, given.set, given.seconds, given.in_flight)
        print(f"{rate:.1f} tokens/s", flush=True)
        os._exit(0)  # hivemind's objects raise when they are collected
    boundaries = [int(place) for place in given.boundaries.split(",") if place]
    peers = [peer for peer in given.peers.split(",") if peer]
    serve(read_run(given.run_file, given.set, 0), given.serve, boundaries, peers)


if __name__ == "__main__":
    main()

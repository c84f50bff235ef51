r"""Compare two stages on two cores with one process that trains the whole model on one core.

    python benchmarks/pipeline_throughput.py examples/pipeline.toml --beside-moe \
        --set model.width=384 --set model.num_layers=6

Two real volunteers hold one stage each, with one thread each, beside a bootstrap; their `stage_throughput` events give
the throughput of the last stage. Before and after, one process with one thread takes inner steps on the same batches in
the same microbatches. Bar: 0.8 of twice that process's tokens/s, on a model large enough that computing dominates
(aim: 0.9).
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from pipeline_swarm import started
from run_files import read_run

from swarmtrain.algorithm.inner import InnerOptimizer
from swarmtrain.model.gpt import build_model
from swarmtrain.model.parameter_count import num_parameters
from swarmtrain.peer.training.loop import inner_constants
from swarmtrain.run import RunFile


def alone(run: RunFile, seconds: float) -> float:
    """Measure the tokens per second of one process with one thread."""
    torch.set_num_threads(1)
    model = build_model(run.model, 0)
    inner = InnerOptimizer(model.named_parameters(), inner_constants(run))
    shape = (run.inner.batch_sequences, run.model.context_tokens + 1)
    tokens, began_s, until_s = 0, 0.0, float("inf")
    while time.monotonic() < until_s:
        for part in torch.split(torch.randint(run.model.vocabulary_size, shape), run.microbatch_sequences):
            (model.loss(part) * (len(part) / shape[0])).backward()
        inner.step(0.1)
        if began_s:
            tokens += run.tokens_per_step
        else:  # the first step warms caches
            began_s = time.monotonic()
            until_s = began_s + seconds
    return tokens / (time.monotonic() - began_s)


def beside_moe(given: argparse.Namespace, changes: list[str]) -> float:
    """Measure the tokens per second of hivemind's servers, by `moe_stages.py`."""
    command = [sys.executable, str(Path(__file__).with_name("moe_stages.py")), str(given.run_file)]
    command += [f"--seconds={given.seconds:g}", *(f"--set={change}" for change in changes)]
    told = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True)
    return float(told.stdout.split()[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_file", type=Path)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of the run file")
    parser.add_argument("--beside-moe", action="store_true", help="and the same stages as experts of hivemind's")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    changes = [*given.set, "pipeline.stages=2", 'pipeline.balance="none"', "run.total_tokens=1_000_000_000"]
    run = read_run(given.run_file, changes, 0)
    if given.alone:
        print(alone(run, given.seconds / 2))
        return

    def whole() -> float:
        told = subprocess.run([sys.executable, *sys.argv, "--alone"], capture_output=True, text=True, check=True)
        return float(told.stdout)

    before = whole()
    with started(given.run_file, (0, 1), 1.0, changes) as watched:
        watched.watch_until_trained(2)
        watched.watch(20.0)
        rate = watched.measure(1, given.seconds)
    theirs = beside_moe(given, changes) if given.beside_moe else None
    one = statistics.mean((before, whole()))
    print(f"{num_parameters(run.model) / 1e6:.1f} M parameters, microbatches of {run.microbatch_sequences} sequences")
    print(f"one process, one core: {one:.0f} tokens/s; two stages, two cores: {rate:.0f} tokens/s")
    print(f"{rate / (2 * one):.2f} of twice that (bar 0.8, aim 0.9)")
    if theirs is not None:
        print(f"hivemind.moe.Server with the same two stages: {theirs:.0f} tokens/s, {theirs / (2 * one):.2f} of it")


if __name__ == "__main__":
    main()

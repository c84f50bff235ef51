"""Measure what the activations of a step take, in bytes and seconds, however they are kept.

    python benchmarks/step_memory.py                                   # GPT-124m, one sequence of 512 and of 1,024
    python benchmarks/step_memory.py --context 256 --vocabulary 256 --layers 8 --width 320 --heads 5

Variants: `plain`, all logits at once and all blocks' activations kept; `chunks`, the loss in chunks of logits, as it is
computed above a size; `recomputed`, blocks computed again in the backward pass as well, by `torch.utils.checkpoint`,
which imports torch's compiler. `evaluate` is the held-out loss of so many sequences at once.

Each variant runs in its own process with one thread. Columns: MB above the weights at the worst moment of a microbatch
without gradients from another before it (`first`; the gradients that it makes are part of it), and with those
(`further`; above the gradients); MB of what was imported; and the least processor seconds of a forward and backward
pass. `estimate` is what `swarmtrain check` adds for activations.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import subprocess
import sys
import time
from pathlib import Path

VARIANTS = ("plain", "chunks", "recomputed", "evaluate")


def status_bytes(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return 0


def forget_peak() -> int:
    """Give free memory back, begin a new peak, and return the bytes that are held."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return status_bytes("VmRSS")


def measure(variant: str, options: argparse.Namespace, context: int) -> None:
    import torch

    from swarmtrain.model import evaluation, gpt, head_loss
    from swarmtrain.peer.estimate import activation_bytes
    from swarmtrain.run import parse_run

    torch.set_num_threads(1)
    imported = status_bytes("VmRSS")
    text = f"""
[run]
total_tokens = 1_000_000_000
[model]
tokenizer = "{"bytes" if options.vocabulary == 256 else "bpe"}"
vocabulary_size = {options.vocabulary}
context_tokens = {context}
width = {options.width}
num_layers = {options.layers}
num_heads = {options.heads}
feed_forward_ratio = 2.667
[inner]
batch_sequences = {2 * options.sequences}
microbatch_sequences = {options.sequences}
"""
    run = parse_run(text, "run.toml")
    if variant == "plain":
        head_loss.SMALL_BYTES = head_loss.LOW_PRECISION_BYTES = 1 << 60
    model = gpt.build_model(run.model, 0)
    model.recomputes_blocks = variant == "recomputed"
    batch = torch.randint(0, options.vocabulary, (options.sequences, context + 1))
    autocast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=options.precision == "bf16")

    def once() -> tuple[int, float]:
        before, began_s = forget_peak(), time.process_time()
        with autocast:
            if variant == "evaluate":
                evaluation.evaluate(model, [batch])
            else:
                loss = model.loss(batch)
        if variant != "evaluate":
            loss.backward()
        return status_bytes("VmHWM") - before, time.process_time() - began_s

    first, further, seconds = 0, 0, []
    for _ in range(options.times):
        model.zero_grad()
        bytes_, took_s = once()
        first = max(first, bytes_)
        seconds.append(took_s)
        bytes_, took_s = once()
        further = max(further, bytes_)
        seconds.append(took_s)
    estimated = activation_bytes(
        run, options.sequences, run.model.num_layers, has_head=True, recomputes=model.recomputes_blocks
    )
    extra = max(0, status_bytes("VmRSS") - imported)
    print(
        f"{variant:11}{context:8}{first / 1e6:9.0f}{further / 1e6:9.0f}{min(seconds):9.2f}{estimated / 1e6:10.0f}"
        f"{imported / 1e6:10.0f}{extra / 1e6:9.0f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--context", type=int, action="append")
    parser.add_argument("--sequences", type=int, default=1, help="of a microbatch")
    parser.add_argument("--vocabulary", type=int, default=25_600)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--times", type=int, default=2, help="pairs of microbatches")
    parser.add_argument("--variant", choices=VARIANTS, action="append")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    contexts = options.context or [512, 1024]
    if options.here:
        measure(options.variant[0], options, contexts[0])
        return
    print(f"{'':11}{'tokens':>8}{'first':>9}{'further':>9}{'seconds':>9}{'estimate':>10}{'imports':>10}{'rest':>9}")
    for context in contexts:
        for variant in options.variant or VARIANTS:
            one = ["--here", "--variant", variant, "--context", str(context)]
            names = ("sequences", "vocabulary", "layers", "width", "heads", "precision", "times")
            same = [word for name in names for word in (f"--{name}", str(getattr(options, name)))]
            subprocess.run(
                [sys.executable, __file__, *same, *one], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
            )


if __name__ == "__main__":
    main()

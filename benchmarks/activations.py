"""Measure what it costs to send activations between stages in fewer bytes: the held-out loss, in one process.

    python benchmarks/activations.py examples/stdlib-gpt.toml --seeds 0,1,2

The model is cut into stages, and every activation and gradient that passes a cut is encoded and decoded as between
peers (`[pipeline] activations`). One peer per stage, an inner step after each batch, no merging: the same training is
compared with other formats, seed by seed. Ratios are to fp32, with the standard error of their mean.
"""

from __future__ import annotations

import argparse
import math
import statistics
from pathlib import Path

import torch
from run_files import read_run

from swarmtrain.algorithm.inner import InnerOptimizer
from swarmtrain.algorithm.outer import flatten
from swarmtrain.algorithm.quantize import Format
from swarmtrain.model.gpt import build_model
from swarmtrain.model.stage_work import StageWork
from swarmtrain.model.stages import balanced_boundaries, build_stage, joined_weights, measured_costs, stage_shapes
from swarmtrain.network.codec import ActivationCodec
from swarmtrain.peer.training.loop import inner_constants
from swarmtrain.simulate.learning.learner import Text

FORMATS: tuple[Format, ...] = ("fp32", "bf16", "int8")


def train(text: Text, boundaries: tuple[int, ...], form: Format) -> float:
    """Train; return the final held-out loss in nats per byte."""
    run = text.run
    constants = inner_constants(run)
    stages = [build_stage(shape, run.run.seed) for shape in stage_shapes(run.model, boundaries)]
    work = [StageWork(stage) for stage in stages]
    inner = [InnerOptimizer(stage.named_parameters(), constants) for stage in stages]
    codec, batches = ActivationCodec(form), text.batches(0)
    sent = lambda x: codec.decode_untrusted(bytearray(codec.encode(x)), x.shape)  # noqa: E731
    steps = run.run.total_tokens // run.tokens_per_step
    for step in range(steps):
        batch = batches.next_batch()
        x = batch[:, :-1]
        for each in work[:-1]:
            x = sent(each.forward(step, x))
        gradient = work[-1].tail(step, x, batch[:, 1:], 1.0, step).gradient
        for each in reversed(work[:-1]):
            assert gradient is not None
            gradient = each.backward(step, sent(gradient), step)
        for each, optimizer in zip(work, inner, strict=True):
            each.forget(step)
            each.gradients(step, 1.0)
            optimizer.step(step / steps)
            each.replaced()
    whole = build_model(run.model, run.run.seed)
    whole.load_state_dict(joined_weights(stage.state_dict() for stage in stages))
    return text.held_out_loss(flatten(whole.parameters()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("run_file", type=Path)
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="change the run file")
    parser.add_argument("--seeds", default="0,1,2", help="comma-separated; default 0,1,2")
    parser.add_argument("--stages", type=int, default=3, help="how many; default 3")
    options = parser.parse_args()
    torch.set_num_threads(1)
    losses: dict[Format, list[float]] = {form: [] for form in FORMATS}
    for seed in map(int, options.seeds.split(",")):
        run = read_run(options.run_file, options.set, seed)
        text = Text.of(run, options.run_file.parent)
        costs = measured_costs(run.model, run.inner.batch_sequences)
        boundaries = balanced_boundaries(run.model.num_layers, options.stages, costs)
        for form in FORMATS:
            losses[form].append(train(text, boundaries, form))
            print(f"seed {seed}  cut at {list(boundaries)}  {form:5} {losses[form][-1]:.4f} nats/byte", flush=True)
    print("\nformat  loss    to fp32")
    for form in FORMATS:
        ratios = [loss / plain for loss, plain in zip(losses[form], losses["fp32"], strict=True)]
        error = statistics.stdev(ratios) / math.sqrt(len(ratios)) if len(ratios) > 1 else math.nan
        print(f"{form:6}  {statistics.mean(losses[form]):.4f}  {statistics.mean(ratios):.4f} +- {error:.4f}")


if __name__ == "__main__":
    main()

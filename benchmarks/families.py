"""Train small models of several families by real volunteers, and compare their first losses with transformers' own.

    python benchmarks/families.py                           # all rows, half an hour on a busy core
    python benchmarks/families.py llama mistral --rows checkpoint-whole

Each row is a swarm of three volunteers of `swarmtrain local`: a family; from a saved checkpoint or from its
configuration alone; each volunteer with the whole model, or a third of it. The first loss is what a volunteer's first
`round` event says. The same batch is then drawn here, and its loss computed by transformers, `model(tokens,
labels=tokens).loss`, with the checkpoint's weights, or with those that the run's seed gives. At the end transformers
loads the export and measures the held-out text. Prints a table: the largest difference of the volunteers' first losses,
what the run learnt, and the difference of the last loss. Needs the extra `hf`.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from swarmtrain.data.batches import held_out_batches
from swarmtrain.data.prepare import PeerPlace, training_batches, training_data
from swarmtrain.model.language_model import ModelSpec
from swarmtrain.model.run_model import build_run_model, empty_model
from swarmtrain.model.run_stages import build_run_stage, run_stage_shapes
from swarmtrain.model.stages import joined_weights
from swarmtrain.network.discovery.run_lookup import PublishedRun
from swarmtrain.peer.lifecycle.folder import PeerFolder

CONTEXT_TOKENS = 32
MODULES = (
    "argparse",
    "ast",
    "datetime",
    "inspect",
    "pathlib",
    "socket",
    "subprocess",
    "tarfile",
    "threading",
    "typing",
)
_WIDE: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 10,
    "eos_token_id": 10,
    "pad_token_id": None,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {**_WIDE, "tie_word_embeddings": False},
    "qwen2": {**_WIDE, "tie_word_embeddings": True},
    "qwen3": {**_WIDE, "head_dim": 16, "tie_word_embeddings": True},
    "gpt2": {
        "vocab_size": 256,
        "n_embd": 64,
        "n_layer": 3,
        "n_head": 4,
        "n_positions": 64,
        "bos_token_id": 10,
        "eos_token_id": 10,
    },
    # None of these is named in the code: each must pass the probe (docs/decisions/0081).
    "mistral": {**_WIDE, "sliding_window": None},
    "olmo2": _WIDE,
    "gemma2": {**_WIDE, "head_dim": 16, "sliding_window": 16, "query_pre_attn_scalar": 16},
    "phi3": _WIDE,
}
FORMS = ("checkpoint-whole", "config-whole", "checkpoint-stages", "config-stages")


@dataclass(frozen=True)
class Row:
    """Results of one swarm."""

    family: str
    form: str
    num_first: int
    """Volunteers that reported a first loss."""
    first_loss: float
    difference: float
    """Largest difference between a volunteer's first loss and transformers' own."""
    last_loss: float
    """Held-out loss at the end, nats per byte, as the swarm says."""
    last_difference: float
    """... and how far that of the export in transformers is from it."""
    num_retries: int
    """Failures of microbatches. One that is tried again comes late, and the first step may have one of the next batch
    in its place: the losses are then of different text."""

    def cells(self) -> str:
        """Return the row of a table in Markdown."""
        start, _, cut = self.form.partition("-")
        how = "three stages" if cut == "stages" else "whole"
        return (
            f"| {self.family} | {start} | {how} | {self.first_loss:.4f} | {self.num_first} | {self.difference:.1e} | "
            f"{self.last_loss:.3f} | {self.last_difference:.1e} | {self.num_retries} |"
        )


def write_model(family: str, folder: Path, *, weights: bool) -> None:
    """Write a model as transformers saves it, with random weights, or its configuration alone."""
    import transformers

    config = transformers.AutoConfig.for_model(family, **CONFIGS[family])
    if not weights:
        config.save_pretrained(folder)
        return
    torch.manual_seed(5)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # norms are not all ones
            parameter += torch.randn_like(parameter) * (0.05 if "norm" in name else 0.02)
    model.save_pretrained(folder)


def write_run(folder: Path, form: str) -> Path:
    """Write the run file of a row, and its text: a few modules of the standard library."""
    (folder / "texts").mkdir()
    for name in MODULES:
        (folder / "texts" / f"{name}.txt").write_bytes(Path(sysconfig.get_path("stdlib"), f"{name}.py").read_bytes())
    from_scratch, stages = form.startswith("config"), 3 if form.endswith("stages") else 1
    path = folder / "run.toml"
    path.write_text(f"""
[run]
name = "families"
total_tokens = 40_000
[model]
source = "huggingface"
base = "model"
from_scratch = {str(from_scratch).lower()}
tokenizer = "bytes"
context_tokens = {CONTEXT_TOKENS}
[data]
source = "text"
paths = ["texts/*.txt"]
held_out_bytes = 16_384
[inner]
precision = "fp32"
batch_sequences = 8
learning_rate = 0.003
[merge]
method = "gossip"
min_peers = 3
inner_steps = 8
[pipeline]
stages = {stages}
activations = "fp32"
in_flight = {1 if stages > 1 else 0}
""")
    return path


def trained(run_file: Path, out: Path) -> list[dict[str, Any]]:
    """Run the swarm to its end; return its events. Raises RuntimeError, with what it says, if it fails."""
    command = [sys.executable, "-m", "swarmtrain.cli", "local", str(run_file), "--peers", "3", "--dir", str(out)]
    said = subprocess.run([*command, "--json"], capture_output=True)
    if said.returncode:
        raise RuntimeError(said.stderr.decode().strip().splitlines()[-1])
    return [json.loads(line) for line in said.stdout.splitlines()]


def initial_model(published: PublishedRun, folder: Path) -> Any:
    """Return transformers' model with the weights that the volunteers began with."""
    import transformers

    run = published.run
    if not run.model.from_scratch:
        return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    assert run.published is not None
    weights: Mapping[str, Tensor]
    if run.pipeline.stages > 1:
        shapes = run_stage_shapes(run, folder, run.published.boundaries or ())
        whole = empty_model(ModelSpec(run.model, folder))
        whole.load_state_dict(
            joined_weights(build_run_stage(run, each, folder, run.run.seed).state_dict() for each in shapes)
        )
        weights = whole.state_dict()
    else:
        weights = build_run_model(run, folder).state_dict()
    config = transformers.AutoConfig.from_pretrained(folder)
    config.tie_word_embeddings = run.model.tied_embeddings
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    found = model.load_state_dict(weights, strict=False)
    assert not found.unexpected_keys, found.unexpected_keys
    assert set(found.missing_keys) <= {"lm_head.weight"}, found.missing_keys  # tied
    return model


def first_losses(
    published: PublishedRun, folder: Path, library_model: Any, events: list[dict[str, Any]]
) -> list[tuple[float, float]]:
    """Return each first loss that a volunteer reported, and transformers' own of the same batch."""
    data = training_data(published.run, folder, published.held_out, published.tokenizer, None)
    pairs = []
    for event in events:
        if event["event"] != "round" or event["round"] != 0 or event["stage"]:
            continue  # of a pipeline the peer of the first stage draws the batches
        place = PeerPlace(run_sha256=published.sha256, peer_id=event["peer"])
        batches = training_batches(published.run, data, place)
        if event["shard"] is not None:
            batches.use_shard(event["shard"])
        tokens = batches.next_batch()
        with torch.no_grad():
            pairs.append((event["first_loss"], float(library_model(input_ids=tokens, labels=tokens).loss)))
    return pairs


def export_loss(model: Path, context_tokens: int) -> float:
    """Return the nats per byte that an export gives to its held-out text, in transformers alone."""
    import transformers

    library_model = transformers.AutoModelForCausalLM.from_pretrained(model).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    text = (model / "held-out.txt").read_bytes()
    tokens = np.asarray(tokenizer(text.decode())["input_ids"], np.uint16)
    total = 0.0
    with torch.no_grad():
        for batch in held_out_batches(tokens, context_tokens, 16):
            logits = library_model(input_ids=batch[:, :-1]).logits
            total += float(
                torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum")
            )
    return total / len(text)


def measured(family: str, form: str, folder: Path) -> Row:
    """Train and compare one row."""
    write_model(family, folder / "model", weights=form.startswith("checkpoint"))
    events = trained(write_run(folder, form), folder / "out")
    published = PeerFolder(folder / "out" / "bootstrap").kept_run()
    assert published is not None
    pairs = first_losses(published, folder, initial_model(published, folder / "model"), events)
    assert pairs, "nobody reported a first round"
    told = [each for each in events if each["event"] == "done" and each["name"] == "bootstrap"][-1]["held_out_loss"]
    there = export_loss(folder / "out" / "bootstrap" / "model", CONTEXT_TOKENS)
    difference = max(abs(ours - theirs) for ours, theirs in pairs)
    num_retries = sum(event["count"] for event in events if event["event"] == "microbatch_retry")
    return Row(family, form, len(pairs), pairs[0][0], difference, told, abs(there - told), num_retries)


def main() -> None:
    """Print the table, a row as soon as it is measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", default=list(CONFIGS), help=f"of {', '.join(CONFIGS)}")
    parser.add_argument("--rows", nargs="+", choices=FORMS, default=FORMS)
    arguments = parser.parse_args()
    import transformers

    transformers.utils.logging.disable_progress_bar()
    print(f"transformers {transformers.__version__}, torch {torch.__version__}; chance is {math.log(256):.4f} nats")
    print("| family | from | volunteers hold | first loss | of | difference | held-out loss | the export's | retries |")
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    for family in arguments.families:
        for form in arguments.rows:
            with tempfile.TemporaryDirectory(prefix="st-") as name:
                try:
                    cells = measured(family, form, Path(name)).cells()
                except RuntimeError as error:
                    cells = f"| {family} | {form} | failed: {error} |"
            print(cells, flush=True)


if __name__ == "__main__":
    main()

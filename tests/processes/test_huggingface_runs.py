"""Runs of small models among real processes: trained by volunteers, measured, saved, and loaded by transformers."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import tomli_w
from preloaded import Preloaded
from small_models import saved
from swarm import PATIENCE_S, Swarm
from test_model_files import write_tuning_run

from swarmtrain.data.batches import held_out_batches
from swarmtrain.events import DoneEvent, EvalEvent
from swarmtrain.peer.control.history import read_history

pytestmark = pytest.mark.processes


@pytest.fixture
def swarm(tmp_path: Path, preloaded_with_transformers: Preloaded) -> Iterator[Swarm]:
    with Swarm(tmp_path, preloaded=preloaded_with_transformers) as swarm:
        yield swarm


def _short_run(folder: Path, **sections: dict[str, object]) -> Path:
    """Write a run that trains a small Llama on as many tokens as take a second."""
    import tomllib

    path = write_tuning_run(folder)
    table = tomllib.loads(path.read_text())
    table["run"]["total_tokens"] = 50 * 4 * 32
    table["inner"]["learning_rate"] = 1e-2
    path.write_text(tomli_w.dumps({**table, **sections}))
    return path


def _loss_by_transformers(model: Path, text: bytes) -> float:
    """Return the nats per byte that the model in a folder gives to a text, computed by transformers alone."""
    import numpy as np
    import torch
    import transformers

    library_model = transformers.AutoModelForCausalLM.from_pretrained(model).eval()
    total = 0.0
    with torch.no_grad():
        for batch in held_out_batches(np.frombuffer(text, np.uint8), 32, 16):
            logits = library_model(input_ids=batch[:, :-1]).logits
            total += float(
                torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum")
            )
    return total / len(text)


def test_two_volunteers_train_a_llama_to_the_end_and_transformers_loads_it(swarm: Swarm) -> None:
    bootstrap = swarm.bootstrap(_short_run(swarm.folder))
    anna, ben = (swarm.join(name, bootstrap.invite.invite) for name in ("anna", "ben"))
    for peer in (anna, ben, bootstrap):
        assert peer.wait() == 0, peer.story()
    done = bootstrap.all(DoneEvent)[-1]
    assert done.reason == "total_tokens" and done.held_out_loss is not None
    assert done.held_out_loss < math.log(256) - 0.5
    assert bootstrap.all(EvalEvent)[-1].held_out_loss == done.held_out_loss
    model = bootstrap.folder / "model"
    held_out = (model / "held-out.txt").read_bytes()
    assert _loss_by_transformers(model, held_out) == pytest.approx(done.held_out_loss, abs=1e-4)
    config = json.loads((model / "config.json").read_text())
    assert (config["model_type"], config["num_hidden_layers"]) == ("llama", 2)
    assert str(swarm.folder) not in (model / "run.toml").read_text()


@pytest.mark.long
def test_a_run_whose_bootstrap_has_left_has_held_out_values_to_its_end(swarm: Swarm) -> None:
    total = 800 * 4 * 32
    sections = {"run": {"name": "tuning", "total_tokens": total}, "network": {"archive_every_s": 1.0}}
    bootstrap = swarm.bootstrap(_short_run(swarm.folder, **sections))
    volunteers = swarm.join_all(["anna", "ben"], bootstrap.invite.invite)
    for peer in volunteers:
        peer.wait_round(1)
    bootstrap.interrupt()
    assert bootstrap.wait() == 0, bootstrap.story()
    for peer in volunteers:
        assert peer.wait(2 * PATIENCE_S) == 0, peer.story()
    first, other = sorted(volunteers, key=lambda peer: peer.id)
    history = read_history(first.folder)
    assert history is not None
    measured = [0, *(point.run_tokens for point in history.points if point.held_out_loss), total]
    assert max(after - before for before, after in itertools.pairwise(measured)) < total / 3, measured
    assert len(first.all(EvalEvent)) > len(other.all(EvalEvent)), "one of them measures"


@pytest.mark.long
def test_two_volunteers_train_two_stages_of_a_gpt_neox_and_transformers_loads_it(swarm: Swarm) -> None:
    saved("gpt_neox", swarm.folder / "neox")
    sections = {
        "model": {"source": "huggingface", "base": "neox", "context_tokens": 32, "tokenizer": "bytes"},
        "pipeline": {"stages": 2},
    }
    bootstrap = swarm.bootstrap(_short_run(swarm.folder, **sections))
    first, last = (swarm.join(f"v{n}", bootstrap.invite.invite, f"--first-stages={n}") for n in range(2))
    for peer in (first, last, bootstrap):
        assert peer.wait(2 * PATIENCE_S) == 0, peer.story()
    done = bootstrap.all(DoneEvent)[-1]
    assert done.reason == "total_tokens" and done.held_out_loss is not None
    assert done.held_out_loss < math.log(288) - 0.5
    model = bootstrap.folder / "model"
    held_out = (model / "held-out.txt").read_bytes()
    assert _loss_by_transformers(model, held_out) == pytest.approx(done.held_out_loss, abs=1e-4)
    assert json.loads((model / "config.json").read_text())["model_type"] == "gpt_neox"


@pytest.mark.evidence
def test_by_one_command_and_in_three_stages(swarm: Swarm) -> None:
    run_file = _short_run(swarm.folder, pipeline={"stages": 3})
    said = swarm.run("local", str(run_file), "--peers", "3", "--compare-alone", "--dir", str(swarm.folder / "out"))
    assert said.code == 0, said.stderr
    assert re.search(r"held-out loss \d\.\d{3} nats/byte .*; one volunteer alone \d\.\d{3}", said.stdout)
    model = swarm.folder / "out" / "bootstrap" / "model"
    held_out = (model / "held-out.txt").read_bytes()
    assert _loss_by_transformers(model, held_out) < math.log(256) - 0.5

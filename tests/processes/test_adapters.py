"""An adapter among real processes: volunteers train unequal shares of it, and peft loads the result."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tomli_w
from preloaded import Preloaded
from swarm import Swarm
from test_model_files import write_tuning_run

from swarmtrain.data.batches import held_out_batches
from swarmtrain.events import DoneEvent, RoundEvent

pytestmark = [pytest.mark.processes, pytest.mark.filterwarnings("ignore::FutureWarning")]  # of transformers, about peft


@pytest.fixture
def swarm(tmp_path: Path, preloaded_with_transformers: Preloaded) -> Iterator[Swarm]:
    with Swarm(tmp_path, preloaded=preloaded_with_transformers) as swarm:
        yield swarm


def _loss_by_peft(base: Path, adapter: Path, text: bytes) -> float:
    """Return the nats per byte that the adapted model gives to a text, computed by peft and transformers alone."""
    import peft
    import torch
    import transformers

    model = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(base), adapter).eval()
    total = 0.0
    with torch.no_grad():
        for batch in held_out_batches(np.frombuffer(text, np.uint8), 32, 16):
            logits = model(input_ids=batch[:, :-1]).logits
            total += float(
                torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum")
            )
    return total / len(text)


def _weights(folder: Path) -> bytes:
    return (folder / "model" / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("method", [pytest.param("gossip", marks=pytest.mark.long), "diloco"])
def test_volunteers_of_unequal_ranks_train_one_adapter_that_peft_loads(swarm: Swarm, method: str) -> None:
    path = write_tuning_run(swarm.folder)
    table = tomllib.loads(path.read_text())
    table["run"]["total_tokens"] = 40 * 4 * 32
    table["inner"]["learning_rate"] = 1e-2
    table["merge"]["method"] = method
    table["adapter"] = {"method": "lora", "rank": 8, "targets": ["all-linear"]}
    path.write_text(tomli_w.dumps(table))
    bootstrap = swarm.bootstrap(path)
    anna = swarm.join("anna", bootstrap.invite.invite)
    ben = swarm.join("ben", bootstrap.invite.invite, "--rank", "2")
    for peer in (anna, ben, bootstrap):
        assert peer.wait() == 0, peer.story()
    assert {event.adapter_groups for event in anna.all(RoundEvent)} == {None}, "all of them"
    trained = [event.adapter_groups for event in ben.all(RoundEvent)]
    assert len(trained) > 1 and all(len(groups) == 1 for groups in trained) and len(set(trained)) > 1
    done = bootstrap.all(DoneEvent)[-1]
    adapter = bootstrap.folder / "model"
    if method == "diloco":
        assert _weights(anna.folder) == _weights(ben.folder) == _weights(bootstrap.folder), "the same bits"
        rounds = [[event.round for event in peer.all(RoundEvent)] for peer in (anna, ben)]
        assert rounds[0] == rounds[1] and len(rounds[0]) > 2
    text = (adapter / "held-out.txt").read_bytes()
    assert done.held_out_loss is not None
    assert _loss_by_peft(swarm.folder / "tiny", adapter, text) == pytest.approx(done.held_out_loss, abs=1e-4)
    said = swarm.run("export", "--dir", str(ben.folder), "--merge", "--to", str(swarm.folder / "whole"))
    assert said.code == 0, said.stderr
    assert sorted(child.name for child in (swarm.folder / "whole").glob("*.safetensors")) == ["model.safetensors"]

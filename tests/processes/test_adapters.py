"""An adapter among real processes: volunteers train unequal shares of it, and peft loads the result."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tomli_w
from preloaded import Preloaded
from small_models import saved
from swarm import Swarm
from test_model_files import write_tuning_run

from swarmtrain.data.batches import held_out_batches
from swarmtrain.events import DoneEvent, RoundEvent

pytestmark = [pytest.mark.processes, pytest.mark.filterwarnings("ignore::FutureWarning")]  # of transformers, about peft


@pytest.fixture
def swarm(tmp_path: Path, preloaded_with_transformers: Preloaded) -> Iterator[Swarm]:
    with Swarm(tmp_path, preloaded=preloaded_with_transformers) as swarm:
        yield swarm


def _loss_by_peft(base: Path, adapter: Path | None, text: bytes) -> float:
    """Return the nats per byte that the adapted model, or its base, gives to a text, by peft and transformers alone."""
    import peft
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(base).eval()
    if adapter is not None:
        model = peft.PeftModel.from_pretrained(model, adapter).eval()
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


def _write_adapter_run(folder: Path, base: str, method: str) -> Path:
    path = write_tuning_run(folder)
    table = tomllib.loads(path.read_text())
    table["run"]["total_tokens"] = 40 * 4 * 32
    table["model"]["base"] = base
    table["inner"]["learning_rate"] = 1e-2
    table["merge"] |= {"method": method, "min_peers": 2}
    table["adapter"] = {"method": "lora", "rank": 8, "targets": ["all-linear"]}
    path.write_text(tomli_w.dumps(table))
    return path


@pytest.mark.parametrize("method", [pytest.param("gossip", marks=pytest.mark.long), "diloco"])
def test_volunteers_of_unequal_ranks_train_one_adapter_that_peft_loads(swarm: Swarm, method: str) -> None:
    bootstrap = swarm.bootstrap(_write_adapter_run(swarm.folder, "tiny", method))
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


@pytest.mark.long
def test_volunteers_train_the_adapter_of_a_mixture_of_experts_that_peft_loads(swarm: Swarm) -> None:
    saved("olmoe", base := swarm.folder / "moe")
    bootstrap = swarm.bootstrap(_write_adapter_run(swarm.folder, "moe", "gossip"))
    volunteers = [swarm.join(name, bootstrap.invite.invite) for name in ("anna", "ben")]
    for peer in (*volunteers, bootstrap):
        assert peer.wait() == 0, peer.story()
    assert "experts are left out" in bootstrap.story()
    assert all(len(peer.all(RoundEvent)) > 1 for peer in volunteers)
    said = swarm.run("export", "--dir", str(bootstrap.folder), "--to", str(adapter := swarm.folder / "adapter"))
    assert said.code == 0, said.stderr
    loss, text = bootstrap.all(DoneEvent)[-1].held_out_loss, (adapter / "held-out.txt").read_bytes()
    assert loss is not None and loss < 0.99 * _loss_by_peft(base, None, text)
    assert _loss_by_peft(base, adapter, text) == pytest.approx(loss, abs=1e-4)

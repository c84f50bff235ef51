"""Files of a run's model among real processes: they come from a volunteer when nobody else has them any more."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tomli_w
from preloaded import Preloaded
from safetensors.numpy import save_file
from swarm import Swarm, write_run

from swarmtrain.events import FetchedEvent, JoinedEvent
from swarmtrain.peer.lifecycle.folder import PeerFolder
from swarmtrain.protocol.pinned_files.file_list import PinnedFiles

pytestmark = pytest.mark.processes


@pytest.fixture
def machines(tmp_path: Path, preloaded_with_transformers: Preloaded) -> Iterator[tuple[Swarm, Swarm]]:
    """Provide processes of two machines: each has a cache of its own."""
    swarm, other = (Swarm(tmp_path / name, preloaded=preloaded_with_transformers) for name in ("here", "there"))
    with swarm, other:
        yield swarm, other


def write_llama(folder: Path) -> None:
    """Write a small Llama as transformers saves it, without importing that, which takes seconds."""
    width, inner, vocabulary = 128, 512, 256
    shapes = {"model.embed_tokens": (vocabulary, width), "model.norm": (width,), "lm_head": (vocabulary, width)}
    for layer in range(2):
        here = f"model.layers.{layer}"
        shapes |= {f"{here}.self_attn.{name}_proj": (width, width) for name in "qkvo"}
        shapes |= {f"{here}.mlp.{name}_proj": (inner, width) for name in ("gate", "up")}
        shapes[f"{here}.mlp.down_proj"] = (width, inner)
        shapes |= {f"{here}.{name}_layernorm": (width,) for name in ("input", "post_attention")}
    chance = np.random.default_rng(5)
    weights = {
        f"{name}.weight": (0.02 * chance.standard_normal(shape) + (len(shape) == 1)).astype(np.float32)
        for name, shape in shapes.items()
    }
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def write_tuning_run(folder: Path) -> Path:
    """Write a run that trains a small model from its weights, and its text."""
    write_run(folder)
    write_llama(folder / "tiny")
    table = {
        "run": {"name": "tuning", "total_tokens": 10**9},
        "model": {"source": "huggingface", "base": "tiny", "context_tokens": 32, "tokenizer": "bytes"},
        "data": {"source": "text", "paths": ["texts/*.txt"], "held_out_bytes": 4096},
        "inner": {"batch_sequences": 4, "warmup_fraction": 0.0},
        "merge": {"method": "gossip", "inner_steps": 5},
        "network": {"call_limit_s": 3.0, "stall_limit_s": 3.0},
    }
    path = folder / "tuning.toml"
    path.write_text(tomli_w.dumps(table))
    return path


def test_a_volunteer_gets_them_from_another_when_the_bootstrap_is_gone(machines: tuple[Swarm, Swarm]) -> None:
    swarm, other_machine = machines
    bootstrap = swarm.bootstrap(write_tuning_run(swarm.folder))
    anna = swarm.join("anna", bootstrap.invite.invite)
    anna.wait_event(JoinedEvent)
    bootstrap.kill()
    write_run(other_machine.folder)
    ben = other_machine.join("ben", anna.invite.invite)
    assert ben.wait_event(FetchedEvent).from_peer == anna.id
    ben.wait_event(JoinedEvent)
    ben.wait_more_rounds(1)
    published = PeerFolder(ben.folder).kept_run()
    assert published is not None
    files = PinnedFiles.from_bytes_untrusted(published.model_files)
    folder = other_machine.folder / "cache" / "swarmtrain" / "models" / files.sha256[:32]
    assert max(file.num_chunks for file in files.files) > 1, "several chunks, and their list"
    for file in files.files:
        assert (folder / file.name).read_bytes() == (swarm.folder / "tiny" / file.name).read_bytes()
        assert not (folder / file.name).is_symlink()
    assert not list(folder.glob("*.part"))
    other_machine.interrupt_some([ben])
    swarm.interrupt_all([anna])

"""Volunteers train on conversations with tools, and the model that they export is asked by its chat template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from made_tokenizers import QWEN, write_tokenizer
from swarm import Swarm, write_run

from swarmtrain.events import DoneEvent, EvalEvent

pytestmark = [pytest.mark.processes, pytest.mark.long]


def conversation(number: int) -> dict[str, Any]:
    place, sky = f"town {number * 7919 % 1000}", ("sun", "rain", "snow")[number % 3]
    arguments = {"place": place, "days": None}
    properties = {"place": {"type": "string"}, "days": {"type": "integer", "default": None}}
    tools = [{"type": "function", "function": {"name": "sky", "parameters": {"properties": properties}}}]
    messages = [
        {"role": "user", "content": [{"type": "text", "text": f"{number}: {place}?"}]},
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "sky", "arguments": arguments}}]},
        {"role": "tool", "content": sky},
        {"role": "assistant", "content": f"{sky.title()} in {place}."},
    ]
    return {"messages": messages, "tools": json.dumps(tools) if number % 2 else tools}


def tool_run(folder: Path) -> Path:
    """Write a run on conversations, with a tokenizer whose template has tools."""
    write_tokenizer(folder / "base", QWEN)
    (folder / "chat.jsonl").write_text("".join(json.dumps(conversation(number)) + "\n" for number in range(300)))
    return write_run(
        folder,
        run={"name": "tools", "total_tokens": 60_000},
        model={"context_tokens": 512, "tokenizer": "base/tokenizer.json", "vocabulary_size": 300},
        data={"source": "jsonl", "paths": ["chat.jsonl"], "format": "chat", "packing": "documents"},
        inner={"batch_sequences": 4, "learning_rate": 1e-2},
        merge={"method": "gossip", "inner_steps": 5},
    )


def test_two_volunteers_train_on_conversations_with_tools_and_their_model_is_asked_by_its_template(
    swarm: Swarm,
) -> None:
    transformers = pytest.importorskip("transformers")
    path = tool_run(swarm.folder)
    checked = swarm.run("check", str(path))
    assert checked.code == 0 and "not checked" not in checked.stdout, checked.stdout
    bootstrap = swarm.bootstrap(path, "--wait-for", "2")
    volunteers = [swarm.join(name, bootstrap.invite.invite) for name in ("anna", "ben")]
    for peer in (*volunteers, bootstrap):
        assert peer.wait() == 0, peer.story()
    assert all(peer.settled_rounds() for peer in volunteers), "each has merged"
    done = bootstrap.all(DoneEvent)[-1]
    assert done.reason == "total_tokens" and done.held_out_loss is not None
    assert done.held_out_loss < bootstrap.all(EvalEvent)[0].held_out_loss / 2, "calls of tools are learnt"

    model = bootstrap.folder / "model"
    assert "`--chat` goes on" in (model / "README.md").read_text()
    held_out = json.loads((model / "held-out.txt").read_text().splitlines()[0])
    library = transformers.AutoTokenizer.from_pretrained(model)
    text = library.apply_chat_template(held_out["messages"], tools=held_out["tools"], tokenize=False)
    assert '"arguments": {"place": "town' in text and '"days": null}' in text and '"default": null' in text
    said = swarm.run("generate", str(model), "--prompt", "5: town 9?", "--temperature", "0", "--tokens", "60")
    assert said.code == 0 and "town 9?" not in said.stdout and "im_start" not in said.stdout, said.stdout
    raw = swarm.run("generate", str(model), "--raw", "--prompt", "5: town 9?", "--tokens", "9")
    assert raw.code == 0 and raw.stdout.startswith("5: town 9?")

"""Model card of an export: what it says of the run, the data, who took part and how to use it."""

from __future__ import annotations

from typing import Any

import pytest

from swarmtrain.model.evaluation import TextLoss
from swarmtrain.model.model_card import ModelCard
from swarmtrain.run import RunFile, parse_run


def run_file(**sections: dict[str, Any]) -> RunFile:
    return RunFile.model_validate({"run": {"name": "tales", "total_tokens": 10**6}, **sections})


def card(run: RunFile, **facts: Any) -> str:
    given: dict[str, Any] = {
        "peer_tokens": {"12D3anna": 300, "12D3ben": 900},
        "loss": TextLoss(1386.294, 500, 1000),
        **facts,
    }
    return ModelCard(run=run, run_sha256="ab" * 32, num_parameters=1_234_567, run_tokens=1_200, **given).text()


def test_the_card_has_what_a_reader_asks() -> None:
    text = card(run_file(data={"source": "jsonl", "paths": ("tales/*.jsonl",)}))
    assert text.startswith("---\nlibrary_name: transformers\n") and "\n---\n\n# tales\n" in text
    assert "| parameters | 1,234,567 |" in text and "| trained on | 1,200 tokens of 1,000,000 |" in text
    assert "1.3863 nats a byte (2.0000 bits a byte)" in text and "ab" * 32 in text
    assert "jsonl files of the volunteers' own: `tales/*.jsonl`" in text
    assert text.index("| `12D3ben` | 900 | 75.0% |") < text.index("| `12D3anna` | 300 | 25.0% |")
    use = text.split("```python\n")[1].split("```")[0].splitlines()
    assert len(use) == 5 and all(
        "AutoModelForCausalLM" in line or "okenizer" in line or "tokens" in line for line in use
    )


def test_the_run_file_in_the_card_is_that_run() -> None:
    run = run_file(model={"width": 64}, merge={"method": "diloco"}, data={"source": "text", "paths": ("x```.txt",)})
    text = card(run).split("```toml\n")[1].split("\n```\n")[0]
    assert parse_run(text, "card") == run


def test_a_data_set_of_the_hub_is_linked() -> None:
    text = card(run_file(data={"source": "datasets", "dataset": "owner/tales"}))
    assert '\ndatasets:\n- "owner/tales"\n---' in text and "Trained on `owner/tales`" in text


def test_several_sources_are_a_table_with_their_shares() -> None:
    web = {"source": "datasets", "dataset": "owner/web"}
    sources = [{"name": "code", "weight": 3}, {"name": "web", **web}, {"name": "new", **web, "split": "new"}]
    run = run_file(data={"sources": sources})
    losses = {"code": TextLoss(69.3147, 50, 100), "web": TextLoss(200.0, 50, 100)}
    text = card(run, loss=TextLoss.of_parts(losses))
    assert '\ndatasets:\n- "owner/web"\n---' in text, "once"
    loss = "0.6931 nats a byte (1.0000 bits a byte)"
    assert f"| code | 60.00% | the sources of Python's standard library | {loss} |" in text
    assert "| new | 20.00% | `owner/web` | not measured |" in text and "| 1.3466 nats a byte (" in text
    assert parse_run(text.split("```toml\n")[1].split("\n```\n")[0], "card") == run


@pytest.mark.parametrize(("peers", "rows"), [({}, 0), ({f"12D3{n:05d}": 1 for n in range(1500)}, 1001)])
def test_contributors_are_named_while_they_are_few(peers: dict[str, int], rows: int) -> None:
    text = card(run_file(), peer_tokens=peers, loss=None)
    assert text.count("\n| `12D3") == max(0, rows - 1) and ("| 500 others | 500 | 33.3% |" in text) == (rows > 0)
    assert ("## Contributors" in text) == (rows > 0) and "not measured yet" in text


def test_the_model_that_it_comes_from_is_named_and_its_shape_is_not_the_readers_to_write() -> None:
    written = {"source": "huggingface", "base": f"owner/tiny@{'0123456789' * 4}", "context_tokens": 24}
    filled = {"num_layers": 3, "width": 32, "num_heads": 4, "vocabulary_size": 288, "num_parameters": 1_234_567}
    text = card(run_file(model=written | filled))
    assert 'base_model: "owner/tiny"\n' in text and "| trained from | `owner/tiny@0123456, from its weights` |" in text
    assert parse_run(text.split("```toml\n")[1].split("\n```\n")[0], "card") == run_file(model=written)


def test_who_loads_a_model_for_chat_is_shown_a_conversation() -> None:
    text = card(run_file(data={"source": "jsonl", "paths": ("a.jsonl",), "format": "chat"}))
    assert "apply_chat_template(messages" in text and "apply_chat_template" not in card(run_file())
    use = "Or `swarmtrain generate FOLDER --prompt"
    assert f"{use} 'Hello!'`, which asks it by its chat template (`--chat` goes on), and" in text
    assert f"{use} 'def '`, and" in card(run_file())
    assert f"{use} 'def ' --raw`, and" in card(run_file(model={"tokenizer": "owner/name"})), "it may have a template"


@pytest.mark.parametrize(
    ("data", "prompt"),
    [
        ({}, "def "),
        ({"source": "jsonl", "paths": ("a",)}, "The "),
        ({"sources": [{"name": "a", "weight": 3, "source": "text", "paths": ("a",)}, {"name": "b"}]}, "The "),
    ],
)
def test_the_prompt_fits_what_the_model_was_trained_on(data: dict[str, Any], prompt: str) -> None:
    text = card(run_file(data=data))
    assert f'tokenizer("{prompt}", return' in text and f"--prompt '{prompt}'" in text

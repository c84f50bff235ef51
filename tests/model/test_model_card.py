"""Model card of an export: what it says of the run, the data, who took part and how to use it."""

from __future__ import annotations

from typing import Any

import pytest

from swarmtrain.model.model_card import ModelCard
from swarmtrain.run import RunFile, parse_run


def run_file(**sections: dict[str, Any]) -> RunFile:
    return RunFile.model_validate({"run": {"name": "tales", "total_tokens": 10**6}, **sections})


def card(run: RunFile, **facts: Any) -> str:
    given: dict[str, Any] = {"peer_tokens": {"12D3anna": 300, "12D3ben": 900}, "held_out_loss": 1.386294, **facts}
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
    text = card(run)
    assert '\ndatasets:\n- "owner/web"\n---' in text, "once"
    assert "| code | 60.00% | the sources of Python's standard library |" in text
    assert "| web | 20.00% | `owner/web` |" in text
    assert parse_run(text.split("```toml\n")[1].split("\n```\n")[0], "card") == run


@pytest.mark.parametrize(("peers", "rows"), [({}, 0), ({f"12D3{n:05d}": 1 for n in range(1500)}, 1001)])
def test_contributors_are_named_while_they_are_few(peers: dict[str, int], rows: int) -> None:
    text = card(run_file(), peer_tokens=peers, held_out_loss=None)
    assert text.count("\n| `12D3") == max(0, rows - 1) and ("| 500 others | 500 | 33.3% |" in text) == (rows > 0)
    assert ("## Contributors" in text) == (rows > 0) and "not measured yet" in text

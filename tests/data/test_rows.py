"""Rows of data files as documents: canonical samples from JSON lines, Parquet and data sets; bad rows in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from codes import raises_code

from swarmtrain.data import huggingface
from swarmtrain.data.documents import read_documents, survey
from swarmtrain.errors import RunFileError
from swarmtrain.run import parse_run
from swarmtrain.run_data import DataSection

CHAT = [{"role": "user", "content": "how ☃?"}, {"role": "assistant", "content": "well"}]
WRITTEN = '{"messages":[{"role":"user","content":"how ☃?"},{"role":"assistant","content":"well"}]}'.encode()


def section(source: str, format: str, **keys: Any) -> DataSection:
    where = {"dataset": "set"} if source == "datasets" else {"paths": (f"*.{source}",)}
    return DataSection.model_validate({"source": source, "format": format, **where, **keys})


def documents_of(folder: Path, wanted: DataSection, rows: list[dict[str, Any]]) -> list[bytes]:
    """Write rows as the source wants them, and read them back."""
    if wanted.source == "jsonl":
        (folder / "a.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    elif wanted.source == "parquet":
        arrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(arrow.Table.from_pylist(rows), folder / "a.parquet")
    else:
        pytest.importorskip("datasets").Dataset.from_list(rows).save_to_disk(str(folder / "set"))
    return [document.text for document in read_documents(wanted, folder)]


@pytest.mark.parametrize("source", ["jsonl", "parquet", "datasets"])
def test_a_conversation_is_the_same_line_whatever_it_comes_from(tmp_path: Path, source: str) -> None:
    more = {"role": "assistant", "content": "w", "tool_calls": [{"name": "f", "arguments": {"x": 1}}]}
    rows = [{"id": 1, "messages": CHAT}, {"id": 2, "messages": [*CHAT, more]}]
    first, second = documents_of(tmp_path, section(source, "chat"), rows)
    assert first == WRITTEN, "fields that other rows have are null here, and left out"
    assert json.loads(second) == {"messages": [*CHAT, more]}


@pytest.mark.parametrize("source", ["jsonl", "parquet", "datasets"])
def test_a_prompt_and_its_completion_are_one_line(tmp_path: Path, source: str) -> None:
    rows = [{"prompt": "a\n", "completion": "b", "id": 1}, {"prompt": "", "completion": "", "id": 2}]
    found = documents_of(tmp_path, section(source, "prompt-completion"), rows)
    assert found == [b'{"completion":"b","prompt":"a\\n"}', b'{"completion":"","prompt":""}']


@pytest.mark.parametrize(
    ("format", "row", "code", "says"),
    [
        ("chat", {"text": "x"}, "no-such-field", "(it has: text)"),
        ("chat", {"messages": "x"}, "not-a-sample", "is not a conversation"),
        ("chat", {"messages": []}, "not-a-sample", '"role": "user"'),
        ("chat", {"messages": [{"from": "human", "value": "x"}]}, "not-a-sample", "conversation"),
        ("chat", {"messages": [{"role": "user", "content": ["x"]}]}, "not-a-sample", ""),
        ("chat", {"messages": [{"role": "user"}]}, "not-a-sample", ""),
        ("chat", {"messages": ["x"]}, "not-a-sample", ""),
        ("chat", {"messages": None}, "not-a-sample", ""),
        ("prompt-completion", {"prompt": "x"}, "no-such-field", '"completion"'),
        ("prompt-completion", {"prompt": "x", "completion": ["y"]}, "not-a-sample", "two strings"),
        ("prompt-completion", {"prompt": None, "completion": "x"}, "not-a-sample", ""),
    ],
)
def test_a_bad_row_is_one_line_with_its_file_and_place(
    tmp_path: Path, format: str, row: dict[str, Any], code: str, says: str
) -> None:
    good = {"messages": CHAT, "prompt": "p", "completion": "c"}
    with raises_code(code, RunFileError, f"line 2 of {tmp_path / 'a.jsonl'}", says):
        documents_of(tmp_path, section("jsonl", format), [good, row])
    assert survey(section("jsonl", format), tmp_path, 10**6).problems


def test_a_bad_row_of_a_table_is_named_too(tmp_path: Path) -> None:
    rows = [{"messages": CHAT}, {"messages": []}]
    with raises_code("not-a-sample", RunFileError, f"row 2 of {tmp_path / 'a.parquet'}"):
        documents_of(tmp_path, section("parquet", "chat"), rows)
    with raises_code("not-a-sample", RunFileError, 'row 1 of "set"'):
        documents_of(tmp_path, section("datasets", "chat"), rows)
    with raises_code("no-such-field", RunFileError, "a.parquet", '"prompt"'):
        documents_of(tmp_path, section("parquet", "prompt-completion"), rows)
    with raises_code("no-such-field", RunFileError, '"set"', '"talk"'):
        documents_of(tmp_path, section("datasets", "chat", field="talk"), rows)


def test_of_a_data_set_only_columns_of_strings_and_numbers_are_read(tmp_path: Path) -> None:
    library = pytest.importorskip("datasets")
    features = library.Features(
        {"messages": library.List({"role": library.Value("string"), "content": library.Image()})}
    )
    library.Dataset.from_dict({"messages": [[]]}, features=features).save_to_disk(str(tmp_path / "set"))
    with raises_code("field-not-text", RunFileError, "made of strings and numbers"):
        list(huggingface.read_texts(section("datasets", "chat"), tmp_path))


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ('source = "text"\npaths = ["x"]\nformat = "chat"', 'data.format: has no meaning with data.source = "text"'),
        ('source = "jsonl"\npaths = ["x"]\nformat = "prompt-completion"\nfield = "y"', "data.field: has no meaning"),
        ('source = "jsonl"\npaths = ["x"]\nformat = "chat"\n[pipeline]\nstages = 2', "data.format: not"),
        ('packing = "documents"\n[pipeline]\nstages = 2', "data.packing"),
    ],
)
def test_keys_that_do_not_fit_are_one_line(keys: str, says: str) -> None:
    with pytest.raises(RunFileError) as told:
        parse_run(f"[run]\ntotal_tokens = 100_000\n[data]\n{keys}\n", "run.toml")
    assert says in str(told.value)


def test_the_field_of_conversations_has_its_own_default() -> None:
    run = parse_run(
        '[run]\ntotal_tokens = 100_000\n[data]\nsource = "jsonl"\npaths = ["x"]\nformat = "chat"\n', "run.toml"
    )
    assert run.data.field == "messages" and run.batch_rows == 2
    assert section("jsonl", "chat", field="talk").field == "talk" and section("jsonl", "text").field == "text"

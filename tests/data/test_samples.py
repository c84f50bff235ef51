"""Runs on samples and named tokenizers, from the run file to batches: what is held out, learnt, kept, resumed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from codes import raises_code
from made_tokenizers import MARKED, PLAIN, made_tokenizer, tokenizer_json, write_tokenizer

from swarmtrain.algorithm.batch import IGNORED, num_rows, num_targets, positions_of
from swarmtrain.data.held_out import held_out_parts
from swarmtrain.data.mixture import MixedBatches, PeerPlace
from swarmtrain.data.prepare import (
    PublishableData,
    TrainingData,
    first_look,
    publishable_data,
    training_batches,
    training_data,
)
from swarmtrain.errors import RunFileError
from swarmtrain.run import RunFile, parse_run

T = 32
NAMED = 'tokenizer = "base/tokenizer.json"\nvocabulary_size = 300'


def run_of(data: str, model: str = NAMED) -> RunFile:
    text = (
        f"[run]\ntotal_tokens = 100_000\n[model]\ncontext_tokens = {T}\n{model}\n[inner]\nbatch_sequences = 8\n[data]\n"
    )
    return parse_run(text + data, "run.toml")


def chat(number: int) -> dict[str, Any]:
    words = np.random.Philox(key=number).random_raw(12) % np.uint64(1000)
    ask, answer = (" ".join(map(str, each)) for each in (words[:8], words[8:]))
    return {
        "messages": [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": ask},
            {"role": "assistant", "content": answer},
        ]
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Provide a folder of conversations, of pairs and of texts, and a tokenizer."""
    base = tmp_path_factory.mktemp("samples")
    write_tokenizer(base / "base", PLAIN)
    rows = [chat(number) for number in range(300)]
    (base / "chat.jsonl").write_text("\n".join(map(json.dumps, [*rows, {"messages": chat(7)["messages"][:2]}])))
    said = [[message["content"] for message in row["messages"]] for row in rows]
    pairs = [{"prompt": f"{ask} ", "completion": answer} for _, ask, answer in said]
    (base / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    texts = [{"text": f"{pair['prompt']}\n{number}"} for number, pair in enumerate(pairs)]
    (base / "texts.jsonl").write_text("\n".join(map(json.dumps, texts)))
    return base


CHAT = 'source = "jsonl"\npaths = ["chat.jsonl"]\nformat = "chat"\nheld_out_bytes = 2048\n'
PAIRS = 'source = "jsonl"\npaths = ["pairs.jsonl"]\nformat = "prompt-completion"\nheld_out_bytes = 1024\n'
TEXTS = 'source = "jsonl"\npaths = ["texts.jsonl"]\nheld_out_bytes = 1024\n'
DOCUMENTS = 'packing = "documents"\n'


def prepared(run: RunFile, base: Path, cache: Path | None = None) -> tuple[PublishableData, TrainingData]:
    published = publishable_data(run, base)
    data = training_data(run, base, published.held_out.text, published.tokenizer_bytes, cache)
    return published, data


def batches_of(run: RunFile, data: TrainingData, position: int = 0) -> MixedBatches:
    return training_batches(run, data, PeerPlace(run_sha256="ab" * 32, peer_id="me", position=position))


def test_conversations_are_held_out_whole_and_nobody_trains_on_them(folder: Path, tmp_path: Path) -> None:
    run = run_of(CHAT)
    published, data = prepared(run, folder, tmp_path)
    held_out = published.held_out.text.decode().splitlines()
    assert 1024 < len(published.held_out.text) <= 2048 and all(json.loads(line)["messages"] for line in held_out)
    (corpus,) = (source.corpus for source in data.sources)
    assert corpus.dropped_documents == len(held_out) and not set(held_out) & {
        document.decode().strip() for document in corpus.documents()
    }
    assert data.num_left_out == 1 and published.tokenizer_name == "tokenizer.json"
    part = held_out_parts(run, published.held_out.text, data.tokenizer)[""]
    said = sum(len(json.loads(line)["messages"][2]["content"]) for line in held_out)
    assert part.num_bytes == said and sum(map(num_targets, part.batches(T, 4))) == part.num_targets
    (folder / "chat.jsonl").touch()  # the corpus is read again, and the encoded one is there
    again = training_data(run, folder, published.held_out.text, published.tokenizer_bytes, tmp_path)
    assert again.num_left_out == 1 and len(list(tmp_path.iterdir())) == 5
    ours, theirs = again.sources[0].encoded, data.sources[0].encoded
    for one, other in ((ours.tokens, theirs.tokens), (ours.is_target, theirs.is_target), (ours.starts, theirs.starts)):
        assert one is not None and other is not None and np.array_equal(one, other)


@pytest.mark.parametrize(
    ("data", "rows"),
    [(CHAT, 2), (CHAT + DOCUMENTS, 3), (PAIRS, 2), (PAIRS + DOCUMENTS, 3), (TEXTS + DOCUMENTS, 3), (TEXTS, 1)],
)
def test_batches_have_what_a_run_asks_for_and_resume_to_the_sample(folder: Path, data: str, rows: int) -> None:
    run = run_of(data)
    _, prepared_data = prepared(run, folder)
    batches = batches_of(run, prepared_data)
    drawn = [batches.next_batch() for _ in range(6)]
    assert {num_rows(batch) for batch in drawn} == {rows} == {run.batch_rows}
    assert all(num_targets(sequence[None]) for batch in drawn for sequence in batch), "each sequence teaches"
    later = batches_of(run, prepared_data, position=4)
    assert all(torch.equal(later.next_batch(), batch) for batch in drawn[4:]) and later.position == 6
    if rows > 1:
        labels = torch.cat([batch[:, 1] for batch in drawn])
        taught = prepared_data.tokenizer.decode(labels[labels != IGNORED].tolist())
        assert b"be brief" not in taught and b"<|user|>" not in taught
    if rows == 3:
        positions = positions_of(drawn[0])
        assert positions is not None and (positions[:, 0] == 0).all()


def test_bytes_and_documents_need_no_copy_of_the_text(folder: Path) -> None:
    run = run_of(TEXTS + DOCUMENTS, "")
    _, data = prepared(run, folder)
    encoded, corpus = data.sources[0].encoded, data.sources[0].corpus
    assert np.shares_memory(encoded.tokens, corpus.text) and encoded.starts is not None
    assert len(encoded.starts) == corpus.num_documents
    batch = batches_of(run, data).next_batch()
    begins = batch[:, 2] == 0
    assert (batch[:, 0, :-1][begins[:, 1:]] == ord("\n")).all(), "each document ends with a newline"


def test_several_formats_are_mixed_in_one_batch(folder: Path) -> None:
    tables = "".join(
        f'[[data.sources]]\nname = "{name}"\nsource = "jsonl"\npaths = ["{name}.jsonl"]\nformat = "{format}"\n'
        for name, format in (("chat", "chat"), ("texts", "text"), ("pairs", "prompt-completion"))
    )
    for packing, rows in (("", 2), (DOCUMENTS, 3)):
        run = run_of(f"held_out_bytes = 12288\n{packing}{tables}")
        _, data = prepared(run, big(folder))
        assert num_rows(batches_of(run, data).next_batch()) == rows


def big(folder: Path) -> Path:
    """Return a folder with ten times as many rows."""
    other = folder / "big"
    if not other.exists():
        other.mkdir()
        write_tokenizer(other / "base", PLAIN)
        rows = [chat(number) for number in range(480)]
        (other / "chat.jsonl").write_text("\n".join(map(json.dumps, rows)))
        pairs = [{"prompt": 3 * row["messages"][1]["content"], "completion": "x"} for row in rows]
        (other / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
        (other / "texts.jsonl").write_text("\n".join(json.dumps({"text": pair["prompt"]}) for pair in pairs))
    return other


def test_a_streamed_data_set_of_conversations_is_cut_alike_after_a_resume(tmp_path: Path) -> None:
    library = pytest.importorskip("datasets")
    write_tokenizer(tmp_path / "base", PLAIN)
    library.Dataset.from_list([chat(number) for number in range(200)]).save_to_disk(str(tmp_path / "set"))
    for packing, rows in (("", 2), (DOCUMENTS, 3)):
        keys = 'source = "datasets"\ndataset = "set"\nstreaming = true\nformat = "chat"\nheld_out_bytes = 1024\n'
        run = run_of(keys + packing)
        _, data = prepared(run, tmp_path)
        drawn = [batch for source in [batches_of(run, data)] for batch in (source.next_batch() for _ in range(4))]
        assert {num_rows(batch) for batch in drawn} == {rows} and sum(map(num_targets, drawn)) > 0
        later = batches_of(run, data, position=3)
        assert torch.equal(later.next_batch(), drawn[3])
        if rows == 3:
            tokens, labels, positions = torch.cat(drawn).unbind(1)
            assert (positions[:, 0] == 0).all() and (labels[positions == 0] == IGNORED).all()
            first = int(data.tokenizer.encode(b"<|system|>")[0])
            assert (tokens[:, 1:][positions[:, 1:] == 0] == first).all(), "conversations begin with a role"


@pytest.mark.parametrize("streaming", ["true", "false"])
def test_own_conversations_of_which_nothing_is_learnt_are_named_and_counted(tmp_path: Path, streaming: str) -> None:
    library = pytest.importorskip("datasets")
    rows = [chat(number) for number in range(300)]
    asks = [{"messages": chat(number)["messages"][:2]} for number in range(1000, 1200)]
    for name, each in (("good", rows), ("asks", asks)):
        library.Dataset.from_list(each).save_to_disk(str(tmp_path / name / "set"))
        write_tokenizer(tmp_path / name / "base", PLAIN)
    run = run_of(
        'held_out_bytes = 4096\n[[data.sources]]\nname = "talk"\nsource = "datasets"\ndataset = "set"\n'
        f'format = "chat"\nstreaming = {streaming}\n'
    )
    published = publishable_data(run, tmp_path / "good")
    with raises_code("nothing-to-learn", RunFileError, "source talk", "200 samples", '"set"'):
        text, tokenizer = published.held_out.text, published.tokenizer_bytes
        batches_of(run, training_data(run, tmp_path / "asks", text, tokenizer, None)).next_batch()


@pytest.mark.parametrize(
    ("data", "model", "code"),
    [
        (CHAT, "", "no-chat-template"),
        (CHAT, 'tokenizer = "base/tokenizer.json"\nvocabulary_size = 299', "keys-disagree"),
        (CHAT, 'tokenizer = "none/tokenizer.json"', "no-tokenizer-file"),
        (CHAT.replace("chat.jsonl", "asks.jsonl"), NAMED, "nothing-to-learn"),
        (TEXTS, 'tokenizer = "words/tokenizer.json"', "tokenizer-misfit"),
        (PAIRS.replace("pairs", "long"), "", "too-little-text"),
    ],
)
def test_what_cannot_be_published_is_one_line_and_check_says_so_too(
    folder: Path, data: str, model: str, code: str
) -> None:
    asks = [{"messages": chat(number)["messages"][:2]} for number in range(300)]
    (folder / "asks.jsonl").write_text("\n".join(map(json.dumps, asks)))
    long = [{"prompt": 2000 * "x", "completion": str(number)} for number in range(20)]
    (folder / "long.jsonl").write_text("\n".join(map(json.dumps, long)))
    words = {"type": "WordLevel", "vocab": {"how": 0, "<unk>": 1}, "unk_token": "<unk>"}
    table = {**json.loads(tokenizer_json()), "model": words, "added_tokens": []}
    (folder / "words").mkdir(exist_ok=True)
    (folder / "words" / "tokenizer.json").write_text(json.dumps(table))
    run = run_of(data, model)
    with raises_code(code, RunFileError):
        publishable_data(run, folder)
    assert code in [problem.code for problem in first_look(run, folder).problems]


def test_a_tokenizer_with_more_tokens_than_the_model_of_hugging_face_is_one_line(folder: Path) -> None:
    run = run_of(CHAT, NAMED)
    model = run.model.model_copy(update={"source": "huggingface", "base": "x", "vocabulary_size": 299})
    run = run.model_copy(update={"model": model})
    with raises_code("keys-disagree", RunFileError, "has 300 tokens, but the model in model.base has 299"):
        publishable_data(run, folder)


def test_a_conversation_that_a_template_refuses_is_named_by_its_file_and_line(tmp_path: Path) -> None:
    refuses = "{% if messages[1].content.startswith('tools') %}{{ raise_exception('no tools') }}{% endif %}"
    write_tokenizer(tmp_path / "base", refuses + MARKED)
    rows = [chat(number) for number in range(300)]
    rows[211]["messages"][1]["content"] = "tools, please"
    (tmp_path / "chat.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run = run_of(CHAT)
    published = publishable_data(run, tmp_path)
    with raises_code("chat-refused", RunFileError, "chat.jsonl:212", "no tools"):
        training_data(run, tmp_path, published.held_out.text, published.tokenizer_bytes, None)


def test_a_refusal_is_named_by_its_file_and_line_in_the_held_out_text_too_and_check_goes_through_all_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuses = "{% if messages[1].content.startswith('tools') %}{{ raise_exception('no tools') }}{% endif %}"
    write_tokenizer(tmp_path / "base", refuses + MARKED)
    rows, run = [chat(number) for number in range(300)], run_of(CHAT)

    def write(number: int) -> None:
        changed = json.loads(json.dumps(rows))
        changed[number]["messages"][1]["content"] = "tools, please"
        (tmp_path / "chat.jsonl").write_text("\n".join(map(json.dumps, changed)))

    (tmp_path / "chat.jsonl").write_text("\n".join(map(json.dumps, rows)))
    lines = publishable_data(run, tmp_path).held_out.text.decode().splitlines()
    held_out = next(number for number, row in enumerate(rows) if row == json.loads(lines[0]))
    write(held_out)
    with raises_code("chat-refused", RunFileError, f"chat.jsonl:{held_out + 1}:", "no tools"):
        publishable_data(run, tmp_path)
    trained_on = next(number for number, row in enumerate(rows) if row not in map(json.loads, lines))
    write(trained_on)
    publishable_data(run, tmp_path)
    (problem,) = first_look(run, tmp_path).problems
    assert problem.code == "chat-refused" and f"chat.jsonl:{trained_on + 1}:" in problem
    monkeypatch.setattr("swarmtrain.data.prepare.LOOK_BYTES", 1000)
    look = first_look(run, tmp_path)
    assert not look.problems and look.unseen == ("what the chat template makes of all conversations",)


def test_a_text_for_a_tokenizer_with_an_end_token_ends_with_it_in_a_stream_too(folder: Path) -> None:
    _, data = prepared(run_of(TEXTS), folder)
    encoded = data.sources[0].encoded
    assert encoded.starts is not None and (encoded.tokens[encoded.starts[1:] - 1] == 0).all()
    assert int(np.count_nonzero(encoded.tokens == 0)) == data.sources[0].corpus.num_documents
    assert made_tokenizer().document_end == (0,)

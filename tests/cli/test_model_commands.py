"""`eval` and `generate`: with how many threads, and what is said while they work for long."""

from __future__ import annotations

import io
import itertools
import json
import math
import threading
from pathlib import Path

import pytest
import torch
from codes import codes_in
from fake_peer import FakePeer, living
from made_tokenizers import ASSISTANT, END, PLAIN, bundle, made_tokenizer

from swarmtrain.cli.main import run
from swarmtrain.cli.progress import long_work, said_meanwhile
from swarmtrain.data.tokenizer_json import tokenizer_json
from swarmtrain.data.tokens import BpeTokenizer, ByteTokenizer, Tokenizer
from swarmtrain.model.evaluation import TextLoss
from swarmtrain.model.export import export_model
from swarmtrain.model.gpt import build_model
from swarmtrain.model.language_model import LanguageModel
from swarmtrain.peer.checkpoints import export
from swarmtrain.peer.lifecycle import node
from swarmtrain.protocol.devices import DeviceRequest
from swarmtrain.run import PublishedSection, parse_run, published_bytes
from swarmtrain.run_model import ModelSection

SECTION = ModelSection(context_tokens=16, num_layers=1, width=16, num_heads=2)


@pytest.fixture
def model(tmp_path: Path) -> str:
    folder, made = tmp_path / "model", build_model(SECTION, seed=1)
    export_model(folder, dict(made.named_parameters()), made.spec, 1, {"held-out.txt": b"some text " * 8})
    return str(folder)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Have every model write "fine", the end of its turn and more; return what each is asked."""
    prompts, made = list[str](), made_tokenizer()

    def generate(model: object, prompt: list[int], *settings: object) -> list[int]:
        prompts.append(made.decode(prompt).decode())
        written, goes_on = list[int](), settings[-1]
        for token in made.encode_spans(f"fine{'' if 'Hi' in prompts[-1] else ASSISTANT}{END}no", ())[0].tolist():
            written.append(token)
            if not goes_on(token):  # type: ignore[operator]
                break
        return written

    monkeypatch.setattr(export, "generate", generate)
    return prompts


@pytest.fixture
def chat_model(tmp_path: Path) -> str:
    """Export a model whose template ends a turn with another token than the one that ends a text."""
    template = PLAIN.replace("{{ eos_token }}", ASSISTANT)
    section = SECTION.model_copy(update={"tokenizer": "a/tokenizer.json", "vocabulary_size": 300})
    made = build_model(section, seed=1)
    files = {"held-out.txt": b"some text " * 8, **bundle(template).files(16)}
    export_model(tmp_path / "chat", dict(made.named_parameters()), made.spec, 1, files)
    return str(tmp_path / "chat")


def question(text: str) -> str:
    return f"<|user|>{text}{ASSISTANT}\n<|assistant|>"


def test_a_model_with_a_chat_template_is_asked_by_it_unless_a_plain_text_is_wanted(
    chat_model: str, asked: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    for words in (["--prompt", "how?"], ["--prompt", "Hi"], [], ["--raw", "--prompt", "how?"], ["--raw"]):
        assert run(["generate", chat_model, *words]) == 0
    assert asked == [*map(question, ("how?", "Hi", "Hello!")), "how?", "some text some text some text"]
    out = capsys.readouterr().out.splitlines()
    assert out == ["fine", "fine", "fine", f"how?fine{ASSISTANT}", f"some text some text some textfine{ASSISTANT}"]


def test_a_conversation_keeps_its_turns_until_the_input_ends(
    chat_model: str, asked: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    both = f"{question('how?')}fine{ASSISTANT}\n{question('and é?')}"
    for ending in ("", " \nnever asked\n"):
        monkeypatch.setattr("sys.stdin", io.StringIO(f"how?\nand é?\n{ending}"))
        assert run(["generate", chat_model, "--chat"]) == 0
        out, err = capsys.readouterr()
        assert out.splitlines() == ["fine", "fine"] and err.replace("\n", "") == "> > > "
        assert asked == [question("how?"), both]
        asked.clear()
    monkeypatch.setattr("sys.stdin", io.StringIO("and é?\n"))
    assert run(["generate", chat_model, "--chat", "--prompt", "how?"]) == 0 and asked == [question("how?"), both]

    def interrupted() -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", interrupted)
    assert run(["generate", chat_model, "--chat"]) == 0, "as at the end of the input"


def test_a_conversation_needs_a_chat_template_that_takes_it(
    model: str, tmp_path: Path, chat_model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["generate", model, "--chat", "--prompt", "how?"]) == 2
    template = Path(chat_model) / "chat_template.jinja"
    template.write_text("{{ raise_exception('no Hello') }}")
    assert run(["generate", chat_model]) == 2
    template.write_text("{% for %}")
    assert run(["generate", chat_model]) == 2
    out, err = capsys.readouterr()
    assert not out and "no Hello; give --raw" in err
    assert codes_in(err) == ["no-chat-template", "chat-refused", "bad-chat-template"]


@pytest.mark.parametrize("command", [["eval"], ["generate", "--tokens", "3"]])
def test_threads_are_as_asked_and_one_for_a_small_model(
    command: list[str], model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    taken: list[int] = []
    monkeypatch.setattr("torch.set_num_threads", taken.append)
    assert run([*command, model]) == run([*command, model, "--threads", "2"]) == 0
    assert taken == [1, 2]
    monkeypatch.setattr(node, "_SMALL_PARAMETERS", 10)
    assert run([*command, model]) == 0
    assert taken == [1, 2], "torch's own choice for a larger one"
    assert not capsys.readouterr().err, "quick work says nothing"
    assert run([*command, model, "--threads", "0"]) == 2


def test_the_loss_on_each_source_of_the_run_is_told(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held_out = b"some text " * 8
    sources = "".join(f"[[data.sources]]\nname = '{name}'\nsource = 'text'\npaths = ['a']\n" for name in ("a", "b"))
    run_file = parse_run(f"[run]\ntotal_tokens = 1_000_000\n{sources}", "r")
    published = PublishedSection(
        created="2030-01-02T03:04:05Z",
        swarmtrain="0.2",
        held_out_sha256="ab" * 32,
        held_out_bytes=80,
        held_out_source_bytes=(50, 30),
    )
    data = published_bytes(run_file.model_copy(update={"published": published}))
    (Path(model) / "run.toml").write_bytes(data)
    assert run(["eval", model, "--json"]) == 0
    table = json.loads(capsys.readouterr().out)
    assert [(each["name"], each["bytes"]) for each in table["sources"]] == [("a", 50), ("b", 30)]
    nats = sum(each["bytes"] * each["held_out_loss"] for each in table["sources"])
    assert table["held_out_loss"] == pytest.approx(nats / 80) and table["bytes"] == table["tokens"] == 80
    alone = tmp_path / "a.txt"
    alone.write_bytes(held_out[50:])
    assert run(["eval", model, "--text", str(alone), "--json"]) == 0
    of_part = json.loads(capsys.readouterr().out)
    assert of_part["held_out_loss"] == pytest.approx(table["sources"][1]["held_out_loss"]) and "sources" not in of_part
    assert run(["eval", model]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["held-out", "a", "b", "the"]
    for other in (b"no run file", data.replace(b"50,", b"49,").replace(b"held_out_bytes = 80", b"held_out_bytes = 79")):
        (Path(model) / "run.toml").write_bytes(other)
        assert run(["eval", model, "--json"]) == 0
        assert "sources" not in json.loads(capsys.readouterr().out), "which part is whose is not known"


def test_a_peer_that_trains_is_given_way_to(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`generate --dir` beside a running peer: low priority, one thread, the processor; as asked if it was asked."""
    niced: list[int] = []
    devices: list[str] = []
    move = export.move_model

    def moved(found: LanguageModel, request: DeviceRequest, *words: object) -> None:
        devices.append(str(request))
        move(found, request, *words)  # type: ignore[arg-type]

    monkeypatch.setattr("os.nice", niced.append)
    monkeypatch.setattr(export, "move_model", moved)
    monkeypatch.setattr(node, "_SMALL_PARAMETERS", 10)
    threads: list[int] = []
    monkeypatch.setattr("torch.set_num_threads", threads.append)
    command = ["generate", "--dir", str(tmp_path), "--tokens", "3", "--prompt", "some"]
    assert run(command) == 0
    assert not niced and devices == ["auto"] and not threads, "nobody runs here"
    with living(FakePeer(tmp_path).start()):
        assert run(command) == 0
        assert niced == [10] and devices[1:] == ["cpu"] and threads == [1]
        assert run([*command, "--threads", "2", "--device", "auto"]) == 0
    assert devices[2:] == ["auto"] and threads[1:] == [2]
    out, err = capsys.readouterr()
    first, second, third = out.splitlines()
    assert first == second == third and first.startswith("some"), "it writes the same text"
    assert err.count("the run's final model, after 1 tokens:\n") == 3


def test_without_a_prompt_it_continues_the_held_out_text(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["generate", model, "--tokens", "3"]) == 0
    assert capsys.readouterr().out.startswith("some text some text some text")
    assert run(["generate", model, "--prompt", ""]) == 2
    assert codes_in(capsys.readouterr().err) == ["empty-prompt"]


@pytest.mark.parametrize("words", [[], ["MODEL", "--dir", "."]])
def test_a_model_is_named_in_one_way(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["generate", *words]) == 2
    assert codes_in(capsys.readouterr().err) == ["options-conflict"]


TEXT = "some text, größer than before and gröber than after\n".encode() * 12


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), BpeTokenizer.learn(TEXT * 4, 272)], ids=["bytes", "bpe"])
def test_a_loss_in_nats_bits_and_perplexity_is_that_of_a_plain_reference(
    tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Token by token, each given those before it in its window, counting the bytes that each one stands for."""
    kind = "bytes" if isinstance(tokenizer, ByteTokenizer) else "bpe"
    section = SECTION.model_copy(update={"tokenizer": kind, "vocabulary_size": tokenizer.vocabulary_size})
    model = build_model(section, seed=1)
    files = {"held-out.txt": TEXT, "tokenizer.json": tokenizer_json(tokenizer.to_bytes())}
    export_model(tmp_path / "model", dict(model.named_parameters()), model.spec, 1, files)
    tokens, bits, num_bytes = [ord("\n"), *map(int, tokenizer.encode(TEXT))], 0.0, 0
    for place in range(1, len(tokens)):
        first = (place - 1) // section.context_tokens * section.context_tokens
        with torch.no_grad():
            logits = model(torch.tensor([tokens[first:place]]))[0, -1].double()
        bits -= float(torch.log2(logits.softmax(0)[tokens[place]]))
        num_bytes += len(tokenizer.decode([tokens[place]]))
    assert num_bytes == len(TEXT) and (kind == "bytes") == (len(tokens) == len(TEXT) + 1)

    assert run(["eval", str(tmp_path / "model"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["bits_per_byte"] == pytest.approx(bits / num_bytes, rel=1e-5)
    assert found["held_out_loss"] == pytest.approx(bits / num_bytes * math.log(2), rel=1e-5)
    assert found["perplexity"] == pytest.approx(2 ** (bits / (len(tokens) - 1)), rel=1e-5)
    assert (found["bytes"], found["tokens"]) == (num_bytes, len(tokens) - 1)
    assert run(["eval", str(tmp_path / "model")]) == 0
    first, other = capsys.readouterr().out.splitlines()
    assert first == f"held-out loss {found['held_out_loss']:.4f} nats/byte over {num_bytes} bytes", "one unit a line"
    others = f"{found['bits_per_byte']:.4f} bits/byte, perplexity {found['perplexity']:.4g} a token"
    assert other == f"the same in other units: {others}"


def test_a_perplexity_beyond_all_numbers_is_none() -> None:
    assert TextLoss(sum_nats=8000.0, num_tokens=10, num_bytes=10).perplexity is None
    assert TextLoss(sum_nats=7000.0, num_tokens=10, num_bytes=10).perplexity == pytest.approx(math.exp(700))


def test_long_work_tells_how_far_it_is_every_ten_seconds() -> None:
    stream, clock = io.StringIO(), itertools.count(0.0, 4.0).__next__
    with long_work("measuring", 100, "tokens", stream, clock) as advance:
        for _ in range(10):
            advance(10)
    told = stream.getvalue().splitlines()
    assert told[0] == "measuring: 30 of 100 tokens" and 2 <= len(told) <= 4


def test_work_in_large_pieces_says_that_it_goes_on_unless_it_is_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    twice = threading.Event()

    class Lines(io.StringIO):
        def flush(self) -> None:
            if self.getvalue().count("\n") == 2:
                twice.set()

    quick, stream = io.StringIO(), Lines()
    monkeypatch.setattr("sys.stderr", quick)
    with said_meanwhile(lambda: "equal"):
        pass
    assert not quick.getvalue()
    monkeypatch.setattr("sys.stderr", stream)
    for pause in ("_EVERY_S", "_AGAIN_S"):
        monkeypatch.setattr(f"swarmtrain.cli.progress.{pause}", 0.001)
    with said_meanwhile(lambda: "equal: 0 of 9 runs are done"):
        assert twice.wait(30)
    told = stream.getvalue().splitlines()
    assert told[0] == "equal: 0 of 9 runs are done, after 0.0 s"


def test_on_a_terminal_it_is_a_bar_that_leaves_nothing() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    with long_work("measuring", 2, "tokens", stream) as advance:
        advance(1)
    assert "measuring" in stream.getvalue()

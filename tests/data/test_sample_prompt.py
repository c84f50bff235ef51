"""Prompts for a sample of what a model writes come from its run's held-out text, as training would give them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from made_tokenizers import END, MARKED, THINKING, made_tokenizer

from swarmtrain.data.sample_prompt import NEUTRAL_PROMPT, sample_prompt, typed_prompt
from swarmtrain.data.tokens import ByteTokenizer
from swarmtrain.run import PublishedSection, RunFile, parse_run


def run_of(data: str) -> RunFile:
    return parse_run(f"[run]\ntotal_tokens = 100_000\n{data}", "run.toml")


CHAT = run_of('[data]\nsource = "jsonl"\npaths = ["a"]\nformat = "chat"\n[model]\ntokenizer = "a/tokenizer.json"\n')
PAIRS = run_of('[data]\nsource = "jsonl"\npaths = ["a"]\nformat = "prompt-completion"\n')
TEXTS = run_of('[data]\nsource = "text"\npaths = ["a"]\n')


def lines(*samples: Any) -> bytes:
    return b"".join(json.dumps(each).encode() + b"\n" for each in samples)


def turns(*contents: str) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[at % 2], "content": text} for at, text in enumerate(contents)]}


@pytest.mark.parametrize("template", [MARKED, THINKING])
def test_of_conversations_it_is_the_shortest_question_as_the_template_asks_it(template: str) -> None:
    long, unanswered = turns("how are you today, my friend?", "well", "and?"), turns("no answer")
    held_out, tokenizer = lines(long, unanswered, turns("and you?", "so")), made_tokenizer(template)
    asked = tokenizer.decode(sample_prompt(CHAT, held_out, tokenizer)).decode()
    assert asked.replace("\n", "") == f"<|user|>and you?{END}<|assistant|>"


def test_of_pairs_it_is_a_prompt_without_its_completion() -> None:
    held_out = lines({"prompt": "a long question: ", "completion": "1"}, {"prompt": "2 + 2 = ", "completion": "4"})
    assert bytes(sample_prompt(PAIRS, held_out, ByteTokenizer())) == b"2 + 2 = "
    without = lines({"prompt": "", "completion": "once upon a time"})
    assert bytes(sample_prompt(PAIRS, without, ByteTokenizer())) == NEUTRAL_PROMPT.encode(), "something comes before"


@pytest.mark.parametrize(
    ("text", "asked"),
    [
        ("  Am Anfang war das Wort, und das Wort\nwar bei", "Am Anfang war das Wort, und"),
        ("Titel\n\nText", "Titel"),
        ("天地玄黄" * 40, "天地玄黄" * 12),
        (" \n", "\n"),
    ],
)
def test_of_text_it_is_the_first_words(text: str, asked: str) -> None:
    assert bytes(sample_prompt(TEXTS, text.encode(), ByteTokenizer())).decode() == asked


def test_it_is_of_the_source_that_gives_most() -> None:
    table = '[[data.sources]]\nname = "{}"\nweight = {}\nsource = "text"\npaths = ["{}"]\n'
    run = run_of("[data]\nheld_out_bytes = 8192\n" + table.format("one", 1, "one") + table.format("two", 3, "two"))
    published = PublishedSection(
        created="2030-01-02T03:04:05Z",
        swarmtrain="0.2",
        held_out_sha256="ab" * 32,
        held_out_bytes=8,
        held_out_source_bytes=(4, 4),
    )
    run = run.model_copy(update={"published": published})
    assert bytes(sample_prompt(run, b"one\ntwo\n", ByteTokenizer())) == b"two"


def test_of_the_standard_library_it_is_python() -> None:
    assert bytes(sample_prompt(run_of(""), b"import os\n", ByteTokenizer())) == b"def "


@pytest.mark.parametrize("data", ["", '[data]\nsource = "text"\npaths = ["a"]\n'], ids=["code", "text"])
def test_with_a_seed_it_is_of_some_line(data: str) -> None:
    text = "".join(f"line {number} of a text that is rather long\n}}\n\n" for number in range(40)).encode()
    prompts = {bytes(sample_prompt(run_of(data), text, ByteTokenizer(), seed)) for seed in range(1, 20)}
    assert len(prompts) > 5 and all(prompt.startswith(b"line ") and prompt in text for prompt in prompts)
    assert bytes(sample_prompt(run_of(data), b"a\nb\n", ByteTokenizer(), 3)) == b"a", "no line is long"


def test_with_a_seed_it_is_of_some_sample() -> None:
    held_out = lines(*({"prompt": f"question {number}: ", "completion": "yes"} for number in range(40)))
    prompts = {bytes(sample_prompt(PAIRS, held_out, ByteTokenizer(), seed)) for seed in range(1, 20)}
    assert len(prompts) > 5 and all(prompt.startswith(b"question ") for prompt in prompts)


@pytest.mark.parametrize(
    ("held_out", "typed"),
    [
        (b"Once upon a time\nthere", "Once upon a time"),
        (b"", NEUTRAL_PROMPT),
        (b"\n\n", NEUTRAL_PROMPT),
        (b'{"messages": []}\n', NEUTRAL_PROMPT),
        (b"\x1b[2J evil", NEUTRAL_PROMPT),
        (b"7\n8\n", "7"),
        (b"[" * 200_000 + b"\n", "[" * 48),
    ],
)
def test_what_a_person_might_type(held_out: bytes, typed: str) -> None:
    assert typed_prompt(held_out) == typed

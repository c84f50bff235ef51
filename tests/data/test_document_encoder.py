"""Documents and samples as tokens: which of them are to be learnt, where each ends, and what is left out."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from codes import raises_code
from made_tokenizers import END, MARKED, PLAIN, THINKING, USER, bundle, made_tokenizer, tokenizer_json

from swarmtrain.data.document_encoder import DocumentEncoder, EncodedCorpus, joined_documents
from swarmtrain.data.held_out import held_out_tokens
from swarmtrain.data.tokenizer_file import TokenizerBundle, TokenizerFile
from swarmtrain.data.tokens import BpeTokenizer, ByteTokenizer, Tokenizer
from swarmtrain.error_codes import CODES
from swarmtrain.errors import RunFileError

TEXTS = [b"how are you?\n", b"\n", b"the sun shines\n\n"]
BYTES = ByteTokenizer()


def conversation(*turns: str) -> bytes:
    """Return turns of user and assistant, one after the other."""
    roles = ("user", "assistant")
    messages = [{"role": roles[number % 2], "content": text} for number, text in enumerate(turns)]
    return json.dumps({"messages": messages}).encode()


def pair(prompt: str, completion: str) -> bytes:
    return json.dumps({"prompt": prompt, "completion": completion}).encode()


def encoded(format: str, tokenizer: Tokenizer, documents: list[bytes]) -> EncodedCorpus:
    with DocumentEncoder(format, tokenizer) as encoder:
        return joined_documents(encoder.encode(documents))


def learnt(corpus: EncodedCorpus, tokenizer: Tokenizer) -> list[tuple[bytes, bytes]]:
    """Return the text of each document, and of what of it is to be learnt."""
    assert corpus.starts is not None and corpus.is_target is not None
    ends = [*corpus.starts[1:].tolist(), len(corpus.tokens)]
    found = []
    for begin, end in zip(corpus.starts.tolist(), ends, strict=True):
        tokens, wanted = corpus.tokens[begin:end], corpus.is_target[begin:end]
        found.append((tokenizer.decode(tokens), tokenizer.decode(tokens[wanted])))
    return found


@pytest.mark.parametrize("tokenizer", [BYTES, BpeTokenizer(np.array([[104, 111], [256, 119]], np.uint32))])
def test_our_tokenizers_keep_the_newline_and_one_with_an_end_token_has_that_in_its_place(tokenizer: Tokenizer) -> None:
    ours, theirs, made = encoded("text", tokenizer, TEXTS), encoded("text", made_tokenizer(), TEXTS), made_tokenizer()
    assert tokenizer.decode(ours.tokens) == b"".join(TEXTS) and ours.is_target is None
    assert ours.starts is not None and tokenizer.decode(ours.tokens[ours.starts[1] :]) == b"\n" + TEXTS[2]
    assert made.decode(theirs.tokens) == f"how are you?{END}{END}the sun shines\n{END}".encode()
    assert theirs.starts is not None
    assert np.flatnonzero(theirs.tokens == 0).tolist() == [*(theirs.starts[1:] - 1), len(theirs.tokens) - 1]


@pytest.mark.parametrize(
    ("tokenizer", "end"),
    [
        (BYTES, b"\n"),
        (BpeTokenizer(np.array([[104, 111], [256, 119]], np.uint32)), b"\n"),
        (made_tokenizer(), END.encode()),
        (TokenizerFile(TokenizerBundle(tokenizer_json())), b""),
    ],
)
def test_of_a_prompt_with_its_completion_the_completion_and_its_end_are_learnt(
    tokenizer: Tokenizer, end: bytes
) -> None:
    corpus = encoded("prompt-completion", tokenizer, [pair("how ", "are you?"), pair("é", "☃ ho")])
    first, second = (b"how are you?" + end, b"are you?" + end), ("é☃ ho".encode() + end, "☃ ho".encode() + end)
    assert learnt(corpus, tokenizer) == [first, second]
    assert corpus.num_left_out == 0


def test_of_a_conversation_the_turns_of_the_assistant_are_learnt() -> None:
    for template, newline in ((PLAIN, "\n"), (MARKED, "")):
        made = made_tokenizer(template)
        corpus = encoded("chat", made, [conversation("how", "well", "and?", "the sun"), conversation("how")])
        ((text, taught),) = learnt(corpus, made)
        assert text.decode().count(USER) == 2 and taught == f"well{END}{newline}the sun{END}{newline}".encode()
        assert corpus.num_left_out == 1
    made = made_tokenizer(THINKING)
    (_, first), (_, second) = learnt(encoded("chat", made, [conversation("how", "well", "and?", "the sun")]), made)
    assert (first, second) == (f"<think></think>well{END}\n".encode(), f"<think></think>the sun{END}\n".encode())


@pytest.mark.parametrize("tokenizer", [BYTES, TokenizerFile(TokenizerBundle(tokenizer_json()))])
def test_conversations_need_a_chat_template(tokenizer: Tokenizer) -> None:
    with raises_code("no-chat-template", RunFileError, 'data.format = "chat"', "model.tokenizer"):
        encoded("chat", tokenizer, [conversation("how", "well")])


def test_who_has_no_chat_template_is_offered_prompts_with_completions_first_and_no_other_model() -> None:
    with pytest.raises(RunFileError) as raised:
        encoded("chat", TokenizerFile(TokenizerBundle(tokenizer_json())), [conversation("how", "well")])
    (problem,) = raised.value.problems
    for said in (problem, CODES["no-chat-template"].do):
        offered = [said.index('data.format = "prompt-completion"'), said.index("model.tokenizer")]
        assert offered == sorted(offered) and "chat model" not in said and "model.base" not in said


def test_a_conversation_that_the_template_refuses_is_named() -> None:
    repeats = "messages | length > 1 and messages[1].role == messages[0].role"
    template = f"{{% if {repeats} %}}{{{{ raise_exception('turns must alternate') }}}}{{% endif %}}"
    made = TokenizerFile(bundle(template + PLAIN))
    bad = json.dumps({"messages": [{"role": "assistant", "content": "x"}] * 2}).encode()
    with raises_code("chat-refused", RunFileError, "talk.jsonl:7", "turns must alternate"), DocumentEncoder(
        "chat", made, lambda sample: "the conversation at talk.jsonl:7"
    ) as encoder:  # fmt: skip
        list(encoder.encode([conversation("how", "well"), bad]))


def test_special_tokens_in_a_text_are_letters_and_in_a_conversation_what_they_are() -> None:
    made = made_tokenizer()
    assert encoded("text", made, [f"{END}\n".encode()]).tokens.tolist().count(0) == 1
    assert encoded("chat", made, [conversation(END, "well")]).tokens.tolist().count(0) == 3, "as for transformers"


def test_a_part_of_a_corpus_is_one() -> None:
    corpus = encoded("prompt-completion", BYTES, [pair("ab", "cd"), pair("e", "f"), pair("", "ghi")])
    part = corpus.part(3, 10)
    assert part.starts is not None and part.starts.tolist() == [0, 2, 5] and part.tokens.tobytes() == b"d\nef\ngh"
    assert part.is_target is not None and part.is_target.tolist() == [True, True, False, True, True, True, True]


# ---------------------------------------------------------------- held out


def nats_of_one(batches: Any) -> tuple[int, set[int]]:
    """Return the number of targets, and the lengths of the sequences."""
    count, lengths = 0, set()
    for batch in batches:
        count += int((batch[:, 1, 1:] >= 0).sum())
        lengths.add(batch.shape[2])
    return count, lengths


def test_each_target_of_held_out_samples_is_in_one_batch_once_whatever_their_lengths() -> None:
    samples = [pair("how", "are you"), pair("x" * 30, "y" * 20), pair("a", "b" * 40), pair("", "z")]
    held_out = held_out_tokens("prompt-completion", b"\n".join(samples) + b"\n", BYTES)
    assert held_out.num_bytes == 7 + 20 + 40 + 1 and held_out.unspelt_nats == 0
    for context_tokens, batch_sequences in ((64, 3), (8, 2), (5, 100)):
        count, lengths = nats_of_one(held_out.batches(context_tokens, batch_sequences))
        assert count == 8 + 21 + 41 + 1, "all of them, but for the first token of all"
        assert max(lengths) <= context_tokens + 1
    again = held_out_tokens("prompt-completion", b"\n".join(samples) + b"\n", BYTES)
    assert again is held_out, "it is encoded once"


def test_what_counts_of_a_conversation_is_what_the_assistant_says() -> None:
    text = b"\n".join([conversation("how", "well é", "and?", "sun"), conversation("how")]) + b"\n"
    held_out = held_out_tokens("chat", text, made_tokenizer())
    assert held_out.num_bytes == len("well ésun".encode()) and held_out.corpus.num_left_out == 1


def test_a_held_out_text_begins_with_the_token_that_begins_texts() -> None:
    for tokenizer, first in ((BYTES, 10), (made_tokenizer(), 0)):
        (batch,) = held_out_tokens("text", b"how are you?", tokenizer).batches(64, 4)
        assert int(batch[0, 0]) == first and batch.shape[1] == 1 + len(tokenizer.encode(b"how are you?"))


def test_letters_that_no_token_spells_cost_eight_bits_a_byte() -> None:
    words = {"type": "WordLevel", "vocab": {"how": 0, "<unk>": 1}, "unk_token": "<unk>"}
    table = {
        **json.loads(tokenizer_json()),
        "model": words,
        "added_tokens": [],
        "pre_tokenizer": {"type": "Whitespace"},
    }
    held_out = held_out_tokens("text", b"how are", TokenizerFile(TokenizerBundle(json.dumps(table))))
    assert held_out.unspelt_bytes == 3 and held_out.unspelt_nats == pytest.approx(3 * 8 * np.log(2))

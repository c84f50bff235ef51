"""Tokenizers in Hugging Face's form: the same tokens as their library, whatever the text; and what is refused."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from codes import raises_code
from made_tokenizers import END, SPECIAL, USER, bundle, changed, made_tokenizer, tokenizer_json, write_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from swarmtrain.data import text_chunks, tokenizer_file
from swarmtrain.data.tokenizer_file import TokenizerBundle, TokenizerFile
from swarmtrain.data.tokenizer_source import find_tokenizer, tokenizer_of_folder
from swarmtrain.data.tokens import tokenizer_from_bytes_untrusted
from swarmtrain.errors import BadBytesError, RunFileError

TEXTS = ["how are you?", "", "the sun ☃ shines\n\n  twice\t", f"a {END} in a text", "\u0000 and é é", " "]


def test_tokens_are_the_librarys_and_special_ones_in_a_text_are_its_letters() -> None:
    made, library = made_tokenizer(), Tokenizer.from_str(tokenizer_json())
    library.encode_special_tokens = True
    for text, found in zip(TEXTS, made.encode_all(text.encode() for text in TEXTS), strict=True):
        assert found.tolist() == library.encode(text, add_special_tokens=False).ids and found.dtype == np.uint16
        assert made.decode(found) == text.encode() and np.array_equal(made.encode(text.encode()), found)
    assert made.vocabulary_size == 300 and made.document_begin == () and made.document_end == (0,)
    assert made.start_token == 0 and made.num_unspelt_bytes("\n".join(TEXTS).encode()) == 0
    with pytest.raises(ValueError, match="below 300"):
        made.decode([300])


def test_long_texts_are_cut_after_lines_and_nothing_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_chunks, "CHUNK_BYTES", 64)
    monkeypatch.setattr(tokenizer_file, "_LETTERS_AT_ONCE", 256)
    made, draw = made_tokenizer(), random.Random(0)
    texts = [
        "".join(draw.choice(["how ", "sun\n", "☃", "é "]) for _ in range(number)) for number in (900, 3, 0, 40, 700)
    ]
    for text, found in zip(texts, made.encode_all(text.encode() for text in texts), strict=True):
        assert made.decode(found) == text.encode()


def test_bytes_that_are_no_text_do_not_stop_it() -> None:
    made = made_tokenizer()
    assert made.decode(made.encode(b"how \xff are")) == "how \ufffd are".encode()


def test_which_tokens_lie_in_spans_of_a_text() -> None:
    made = made_tokenizer()
    text = f"{USER}how are you?{END}"
    tokens, is_in = made.encode_spans(text, [(len(USER), len(text))])
    assert tokens[0] == 1 and tokens[-1] == 0, "special tokens that a template wrote are themselves"
    assert is_in.tolist() == [False] + [True] * (len(tokens) - 1)
    assert made.decode(tokens[is_in]) == text[len(USER) :].encode()


def test_a_tokenizer_that_frames_its_texts_frames_documents() -> None:
    library = Tokenizer.from_str(tokenizer_json())
    library.post_processor = processors.TemplateProcessing(
        single=f"{USER} $A {END}", special_tokens=[(USER, 1), (END, 0)]
    )
    made = TokenizerFile(TokenizerBundle(library.to_str()))
    assert (made.document_begin, made.document_end, made.start_token) == ((1,), (0,), 1)
    assert made.encode(b"how").tolist() == made_tokenizer().encode(b"how").tolist()
    assert made.encode_prompt(f"how{END}").tolist() == [1, *made.encode(b"how"), 0]
    bare = TokenizerFile(TokenizerBundle(tokenizer_json()))
    assert (bare.document_begin, bare.document_end) == ((), ()) and bare.decode([bare.start_token]) == b"\n"


def spelling(model: Any, **parts: Any) -> TokenizerFile:
    library = Tokenizer(model)
    for name, part in parts.items():
        setattr(library, name, part)
    return TokenizerFile(TokenizerBundle(library.to_str()))


def test_what_a_tokenizer_cannot_spell_is_counted_and_byte_fallback_spells_everything() -> None:
    words = models.WordLevel({"how": 0, "are": 1, "?": 2, "<unk>": 3}, unk_token="<unk>")
    some = spelling(words, pre_tokenizer=pre_tokenizers.Whitespace())
    assert some.num_unspelt_bytes(b"how are they ?") == 4 and some.num_unspelt_bytes("☃ how".encode()) == 3
    letters = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"▁": 256, "h": 257, "o": 258, "▁h": 259, "▁ho": 260}
    fallback = spelling(
        models.BPE(letters, [("▁", "h"), ("▁h", "o")], byte_fallback=True),
        normalizer=normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
        decoder=decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        ),
    )
    text = "hoho ☃ zx\n".encode()
    assert fallback.decode(fallback.encode(text)) == text and fallback.num_unspelt_bytes(text) == 0


def test_what_is_pinned_is_the_file_with_special_tokens_and_template_or_the_bare_file() -> None:
    made, data = bundle(), bundle().to_bytes()
    assert data.startswith(b"{") and TokenizerBundle.from_bytes_untrusted(data) == made
    again = tokenizer_from_bytes_untrusted(data, 400)
    assert isinstance(again, TokenizerFile) and again.to_bytes() == data and again.bundle == made
    bare = TokenizerBundle.from_bytes_untrusted(tokenizer_json().encode())
    assert bare == TokenizerBundle(tokenizer_json()) and TokenizerBundle.from_bytes_untrusted(bare.to_bytes()) == bare
    assert sorted(made.files(64)) == ["chat_template.jinja", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(bare.files(64)) == ["tokenizer.json", "tokenizer_config.json"]


DEEP = "[" * 100_000
LONGER = {"type": "Replace", "pattern": {"String": "a"}, "content": "b" * 99}
FRAMING = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": END, "type_id": 0}}] * 65 + [{"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
    "special_tokens": {END: {"id": END, "ids": [0], "tokens": [END]}},
}
REGEX = {"type": "Split", "pattern": {"Regex": "a" * 5000}, "behavior": "Isolated", "invert": False}


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"{", "Expecting"),
        (b"{\xff", "utf-8"),
        (b'{"model": 3}', "no model"),
        (f'{{"model": {DEEP}'.encode(), "too deep"),
        (json.dumps({"tokenizer_json": DEEP, "special_tokens": {}, "chat_template": ""}).encode(), "too deep"),
        (b'{"tokenizer_json": 3}', "another type"),
        (changed(model={"type": "Neural"}).encode(), "its model is Neural"),
        (changed(model={"type": "BPE", "vocab": {}, "merges": []}, added_tokens=[]).encode(), "no tokens"),
        (changed(model={"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]}).encode(), "out of vocabulary"),
        (changed(normalizer=LONGER).encode(), "99 characters"),
        (changed(normalizer={"type": "Prepend", "prepend": "b" * 99}).encode(), "99 characters"),
        (changed(pre_tokenizer=REGEX).encode(), "5000 characters"),
        (changed(normalizer={"type": "Sequence", "normalizers": [{"type": "NFC"}] * 600}).encode(), "603 normalizers"),
        (changed(added_tokens=[{"id": 10_000_000, "content": "x"}]).encode(), ""),
        (bundle().to_bytes().replace(b'"eos_token":"', b'"eos_token":"' + 300 * b"x"), "too many or too long"),
        (b'{"tokenizer_json":"' + b"x" * (1 << 26) + b'"}', "at most 67108864"),
    ],
)  # fmt: skip
def test_what_is_no_usable_tokenizer_is_refused(data: bytes, says: str) -> None:
    with raises_code("bad-format", BadBytesError, says):
        tokenizer_from_bytes_untrusted(data, 320)


SPREADING = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 64}
PREFIXED = {"vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]], "continuing_subword_prefix": "bbb"}


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        ({"normalizer": {"type": "Sequence", "normalizers": [SPREADING] * 5}}, "or more than 256 MiB"),
        ({"post_processor": FRAMING}, "more than 64 tokens around a text"),
        ({"pre_tokenizer": {"type": "FixedLength", "length": 0}}, "must be non-zero"),
        ({"model": {"type": "BPE", **PREFIXED}, "added_tokens": []}, "out of range"),
    ],
)
def test_a_small_file_takes_no_more_memory_and_time_than_it_may_and_a_panic_is_an_error(
    monkeypatch: pytest.MonkeyPatch, parts: dict[str, Any], says: str
) -> None:
    monkeypatch.setattr(tokenizer_file, "_MEMORY_BYTES", 1 << 28)
    with raises_code("bad-format", BadBytesError, says):
        tokenizer_from_bytes_untrusted(changed(**parts).encode(), 320)


def test_a_text_that_a_tokenizer_makes_too_large_ends_it_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_file, "_MEMORY_BYTES", 1 << 28)
    spread = {**SPREADING, "pattern": {"String": "h"}, "content": "h" * 64}
    parts = {"type": "Sequence", "normalizers": [spread] * 4}
    made = TokenizerFile(TokenizerBundle(changed(normalizer=parts)))
    assert made.decode(made.encode(b"are you")) == b"are you"
    for _ in range(2):
        with raises_code("bad-tokenizer", RunFileError, "more than 256 MiB"):
            made.encode(b"how are you")


def test_tokens_beyond_the_models_vocabulary_are_refused() -> None:
    assert tokenizer_from_bytes_untrusted(bundle().to_bytes(), 300).vocabulary_size == 300
    with raises_code("bad-format", BadBytesError, "token 299 for a model of 299 tokens"):
        tokenizer_from_bytes_untrusted(bundle().to_bytes(), 299)


def test_padding_truncation_and_random_merges_are_turned_off() -> None:
    padding = {"strategy": {"Fixed": 10**9}, "direction": "Right", "pad_id": 0, "pad_type_id": 0, "pad_token": END}
    truncation = {"max_length": 2, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    model = json.loads(tokenizer_json())["model"] | {"dropout": 0.9}
    made = TokenizerFile(TokenizerBundle(changed(padding=padding, truncation=truncation, model=model)))
    assert made.encode(b"how are you today").tolist() == made_tokenizer().encode(b"how are you today").tolist()


# ---------------------------------------------------------------- where it comes from


def test_a_file_brings_what_is_beside_it(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "base")
    found = find_tokenizer("base/tokenizer.json", tmp_path, None)
    assert found.name == "tokenizer.json" and found.tokenizer.bundle == bundle()
    assert find_tokenizer("model", tmp_path, tmp_path / "base").tokenizer.bundle == bundle()
    (tmp_path / "base" / "chat_template.jinja").unlink()
    config = tmp_path / "base" / "tokenizer_config.json"
    templates = [{"name": "tools", "template": "T"}, {"name": "default", "template": "D"}]
    special = {"eos_token": {"content": "<s>", "lstrip": False}, "unk_token": None}
    config.write_text(json.dumps({"chat_template": templates, **special}))
    (tmp_path / "base" / "special_tokens_map.json").write_text(json.dumps({"eos_token": "no", "pad_token": END}))
    again = tokenizer_of_folder(tmp_path / "base").bundle
    assert again.chat_template == "D" and again.special_tokens == {"eos_token": "<s>", "pad_token": END}
    config.unlink()
    assert tokenizer_of_folder(tmp_path / "base").bundle.chat_template == ""


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("none/tokenizer.json", "no-tokenizer-file"),
        ("bad/tokenizer.json", "bad-tokenizer"),
        ("config/tokenizer.json", "bad-tokenizer"),
    ],
)
def test_a_tokenizer_that_cannot_be_used_is_one_line(tmp_path: Path, name: str, code: str) -> None:
    write_tokenizer(tmp_path / "bad").write_text("{}")
    write_tokenizer(tmp_path / "config").with_name("tokenizer_config.json").write_text("[1]")
    with raises_code(code, RunFileError, "model.tokenizer"):
        find_tokenizer(name, tmp_path, None)


def test_special_tokens_are_those_of_the_configuration() -> None:
    assert made_tokenizer().bundle.special_tokens == SPECIAL

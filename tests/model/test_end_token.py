"""Token that ends a text: the files alone say what the tokenizer that is built from them does."""

from __future__ import annotations

import json
from typing import Any

import pytest
from made_tokenizers import END, changed, tokenizer_json

from swarmtrain.data.tokenizer_file import TokenizerBundle, TokenizerFile
from swarmtrain.data.tokenizer_json import tokenizer_files
from swarmtrain.model.end_token import end_token


def template(*single: str) -> dict[str, Any]:
    """Return a post-processor that frames a text, "A", with special tokens."""
    numbers = {END: 0, "<|user|>": 1}
    parts = [
        {"Sequence": {"id": "A", "type_id": 0}} if name == "A" else {"SpecialToken": {"id": name, "type_id": 0}}
        for name in single
    ]
    special = {name: {"id": name, "ids": [numbers[name]], "tokens": [name]} for name in numbers}
    return {"type": "TemplateProcessing", "single": parts, "pair": [*parts, *parts], "special_tokens": special}


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
ROBERTA = {
    "type": "RobertaProcessing",
    "sep": [END, 0],
    "cls": ["<|user|>", 1],
    "trim_offsets": True,
    "add_prefix_space": False,
}


@pytest.mark.parametrize("special", [{}, {"eos_token": "<|user|>"}, {"eos_token": "not there"}, {"bos_token": END}])
@pytest.mark.parametrize(
    "processor",
    [
        None,
        BYTE_LEVEL,
        template("<|user|>", "A", END),
        template("<|user|>", "A"),
        ROBERTA,
        {"type": "Sequence", "processors": [BYTE_LEVEL, template("A", "<|user|>")]},
    ],
    ids=["none", "bytes", "framed", "begun", "roberta", "several"],
)
def test_it_is_the_one_after_which_a_text_ends_in_training(processor: Any, special: dict[str, str]) -> None:
    bundle = TokenizerBundle(changed(post_processor=processor), special)
    ends = TokenizerFile(bundle).document_end
    assert end_token(bundle.files(64)) == (ends[-1] if ends else None)


def test_it_is_found_in_a_vocabulary_and_in_a_name_with_more_to_it() -> None:
    config = json.dumps({"eos_token": {"content": "b", "lstrip": False}}).encode()
    for vocabulary in ({"a": 0, "b": 7}, [["a", -1.0], *([["x", -2.0]] * 6), ["b", -3.0]]):
        table = json.dumps({"model": {"vocab": vocabulary}}).encode()
        assert end_token({"tokenizer.json": table, "tokenizer_config.json": config}) == 7
    assert end_token(tokenizer_files(b"", 64)) is None, "our own have none"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[]",
        b'{"model": [], "added_tokens": [3, {"content": "b", "id": true}]}',
        b'{"post_processor": {"processors": [{"sep": []}, {"single": [{}], "special_tokens": {}}, 3]}}',
        b'{"post_processor": {"single": [{"SpecialToken": {"id": "b"}}], "special_tokens": {"b": {"ids": [-1]}}}}',
        b"[" * 100_000,
    ],
)
def test_what_is_no_tokenizer_has_none(data: bytes) -> None:
    assert end_token({"tokenizer.json": data, "tokenizer_config.json": b'{"eos_token": "b"}'}) is None
    assert end_token({"tokenizer.json": tokenizer_json().encode(), "tokenizer_config.json": data}) is None

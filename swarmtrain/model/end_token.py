"""Token that ends a text, as the files of a tokenizer say: other libraries stop at it when they write.

It is the one after which a text ends in training (`TokenizerFile.document_end`), found in the files alone: an export is
also written where the library `tokenizers` is not.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def end_token(files: Mapping[str, bytes]) -> int | None:
    """Return the token's number, given a tokenizer's files by name; None if texts have no such token."""
    try:
        table = json.loads(files.get("tokenizer.json", b"{}"))
        config = json.loads(files.get("tokenizer_config.json", b"{}"))
    except (ValueError, RecursionError):
        return None
    if not isinstance(table, dict) or not isinstance(config, dict):
        return None
    name = config.get("eos_token")
    name = name.get("content") if isinstance(name, dict) else name
    found = _number_of(name, table) if isinstance(name, str) else None
    return _added_number(table.get("post_processor")) if found is None else found


def _number_of(token: str, table: Mapping[str, Any]) -> int | None:
    for added in table.get("added_tokens") or ():
        if isinstance(added, dict) and added.get("content") == token:
            return _number(added.get("id"))
    model = table.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, dict):
        return _number(vocabulary.get(token))
    if isinstance(vocabulary, list):  # of pairs (token, score), by number
        pairs = (number for number, pair in enumerate(vocabulary) if isinstance(pair, list) and pair[:1] == [token])
        return next(pairs, None)
    return None


def _added_number(processor: Any) -> int | None:
    """Return the last token that a post-processor puts after a text; None if there is none."""
    if not isinstance(processor, dict):
        return None
    if isinstance(parts := processor.get("processors"), list):
        return next((found for part in reversed(parts) if (found := _added_number(part)) is not None), None)
    if isinstance(separator := processor.get("sep"), list):  # of BERT's and RoBERTa's
        return _number(separator[-1]) if separator else None
    single, special = processor.get("single"), processor.get("special_tokens")
    if not isinstance(single, list) or not single or not isinstance(special, dict) or not isinstance(single[-1], dict):
        return None
    last = single[-1].get("SpecialToken")
    meant = special.get(last.get("id")) if isinstance(last, dict) else None
    numbers = meant.get("ids") if isinstance(meant, dict) else None
    return _number(numbers[-1]) if isinstance(numbers, list) and numbers else None


def _number(found: Any) -> int | None:
    return found if isinstance(found, int) and not isinstance(found, bool) and found >= 0 else None

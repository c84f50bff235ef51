"""Process in which the library `tokenizers` works with a stranger's tokenizer; see `tokenizer_file.py`."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

from swarmtrain.data.limited_process import serve

_MOST_FRAME_TOKENS = 64
_MOST_THREADS = 8
"""Each takes memory of its own, of which there is little."""


def _made(task: dict[str, Any]) -> tuple[dict[str, Any], Callable[[dict[str, Any]], dict[str, Any]] | None]:
    """Return what a peer must know of the tokenizer, and what answers its questions."""
    os.environ["RAYON_NUM_THREADS"] = str(min(_MOST_THREADS, os.cpu_count() or 1))
    try:
        import tokenizers
    except ImportError:
        return {"is_missing": True}, None
    table = task["tokenizer"]
    encoder = tokenizers.Tokenizer.from_str(json.dumps(table, ensure_ascii=False))
    encoder.no_padding()
    encoder.no_truncation()
    ids = encoder.get_vocab(with_added_tokens=True)
    if not ids:
        raise ValueError("it has no tokens")
    model = table["model"]
    unknown = model.get("unk_id") if model["type"] == "Unigram" else ids.get(str(model.get("unk_token")))
    begin, end = _frame(encoder)
    special = {role: encoder.token_to_id(text) for role, text in task["special_tokens"].items()}
    size = max(ids.values()) + 1
    made = {"vocabulary_size": size, "unknown": unknown, "begin": begin, "end": end, "special": special}

    def respond(question: dict[str, Any]) -> dict[str, Any]:
        if "decode" in question:
            return {"answer": encoder.decode(question["decode"], skip_special_tokens=False)}
        encoder.encode_special_tokens = question["as_letters"]
        found = encoder.encode_batch(question["encode"], add_special_tokens=False)
        return {"answer": [(each.ids, each.offsets) if question.get("offsets") else each.ids for each in found]}

    return made, respond


def _frame(encoder: Any) -> tuple[list[int], list[int]]:
    """Return the tokens that the file's post-processor puts before and after a text."""
    bare = encoder.encode("a", add_special_tokens=False).ids
    framed = encoder.encode("a").ids
    if len(framed) - len(bare) > _MOST_FRAME_TOKENS:
        raise ValueError(f"it puts more than {_MOST_FRAME_TOKENS} tokens around a text")
    for begin in range(len(framed) - len(bare) + 1):
        if framed[begin : begin + len(bare)] == bare:
            return framed[:begin], framed[begin + len(bare) :]
    return [], []


def main() -> None:
    """Read a tokenizer, then texts and tokens, and write what the library makes of them, until the input ends."""
    serve(_made)


if __name__ == "__main__":
    main()

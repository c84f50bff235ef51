"""Write a run's tokenizer as the `tokenizer.json` that Hugging Face's libraries load, and read our own back.

Bytes are a byte-level BPE without merges: its 256 tokens are the bytes. Both kinds give the numbers that our tokenizers
give, for any UTF-8 text of up to 64 KiB (`tokens.py` cuts longer texts after a line, where a token could begin with the
line's end), and both take any text back.

The file is written without the library `tokenizers`, which the core install lacks. Ours is recognised by its form: it
is exactly what is written here for the merges that are in it.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from swarmtrain.data.tokenizer_file import TokenizerBundle
from swarmtrain.data.tokens import MAGIC, byte_letters, merges_of, spellings_of


def tokenizer_json(tokenizer: bytes) -> bytes:
    """Return the `tokenizer.json` of a run's tokenizer: empty means bytes, and one that has such a file keeps it.

    Raises ValueError for invalid merges.
    """
    if tokenizer.startswith(b"{"):
        return TokenizerBundle.from_bytes_untrusted(tokenizer).tokenizer_json.encode()
    return (json.dumps(_as_json(tokenizer), ensure_ascii=False, indent=1) + "\n").encode()


def tokenizer_files(tokenizer: bytes, context_tokens: int) -> dict[str, bytes]:
    """Return the files that Hugging Face's libraries load a run's tokenizer from, by their names."""
    if tokenizer.startswith(b"{"):
        return TokenizerBundle.from_bytes_untrusted(tokenizer).files(context_tokens)
    return {"tokenizer.json": tokenizer_json(tokenizer), "tokenizer_config.json": tokenizer_config(context_tokens)}


def tokenizer_config(context_tokens: int) -> bytes:
    """Return the `tokenizer_config.json` beside a `tokenizer.json` of ours."""
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": context_tokens,
        "clean_up_tokenization_spaces": False,
    }
    return (json.dumps(config, indent=2) + "\n").encode()


def own_tokenizer(data: bytes) -> bytes | None:
    """Return the run's form of a tokenizer (empty: bytes) whose `tokenizer.json` is `data`; None if it is not ours."""
    try:
        found = json.loads(data)
        ids, merges = found["model"]["vocab"], found["model"]["merges"]
        numbers = np.array([(ids[left], ids[right]) for left, right in merges], "<u4")
        tokenizer = MAGIC + numbers.tobytes() if merges else b""
        return tokenizer if _as_json(tokenizer) == found else None
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return None


def _as_json(tokenizer: bytes) -> dict[str, Any]:
    letters = byte_letters()
    merges = merges_of(tokenizer)
    spelt = ["".join([letters[byte] for byte in spelling]) for spelling in spellings_of(merges)]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": bool(len(merges))}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {letters: number for number, letters in enumerate(spelt)},
            "merges": [[spelt[left], spelt[right]] for left, right in merges.tolist()],
        },
    }

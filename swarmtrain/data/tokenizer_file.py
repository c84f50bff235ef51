"""Tokenizer of a Hugging Face model, as a run pins and serves it, and encoding by it.

What travels is one JSON object, a *bundle*: the file `tokenizer.json` as its authors wrote it, the names of its special
tokens, and the chat template. The template is beside the tokenizer and not among the model's files, because a run may
train a model of its own with a named tokenizer, and because whoever encodes needs both and nothing else. A bundle
without the two others is a bare `tokenizer.json`.

It comes from a stranger. The library `tokenizers` builds tables from it and runs no code, but a few hundred bytes of
such a file can make it take gigabytes and minutes for a letter. So it works in a process of its own
(`tokenizer_process.py`), which has little memory and is ended when it takes long. Padding, truncation and random merges
are turned off.
"""

from __future__ import annotations

import itertools
import json
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from swarmtrain.data.limited_process import LimitedProcess, ProcessLimitError
from swarmtrain.data.text_chunks import CHUNK_BYTES, CHUNKS_AT_ONCE, chunks
from swarmtrain.errors import RunFileError
from swarmtrain.extras import install_in_words
from swarmtrain.run import MAX_TOKENIZER_BYTES
from swarmtrain.words import one_line

_MAX_TEMPLATE_BYTES = 1 << 20
_MAX_SPECIAL_TOKENS = 64
_MAX_SPECIAL_BYTES = 256
_MODELS = ("BPE", "Unigram", "WordLevel", "WordPiece")
_MAX_DEPTH = 16
_MAX_PARTS = 512
_MAX_REPLACEMENT = 64
"""Characters by which a normalizer may replace one."""
_MAX_PATTERN = 4096
_LETTERS_AT_ONCE = CHUNKS_AT_ONCE * CHUNK_BYTES
_LIMIT_S = 60.0
"""Time that so many letters may take: a hundred times what they take."""
_MEMORY_BYTES = 1 << 31

Tokens = npt.NDArray[Any]


@dataclass(frozen=True)
class TokenizerBundle:
    """Tokenizer file and what else those need who encode with it."""

    tokenizer_json: str
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    """Text of each special token by its role, such as `eos_token`."""
    chat_template: str = ""
    """Jinja template that writes a conversation as text; empty if there is none."""

    def to_bytes(self) -> bytes:
        """Return the bytes that a run pins."""
        table = {
            "chat_template": self.chat_template,
            "special_tokens": dict(sorted(self.special_tokens.items())),
            "tokenizer_json": self.tokenizer_json,
        }
        return json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode()

    @classmethod
    def from_bytes_untrusted(cls, data: bytes) -> TokenizerBundle:
        """Read the bytes that a run pins, or a bare `tokenizer.json`. Raises ValueError if they are neither."""
        if len(data) > MAX_TOKENIZER_BYTES:
            raise ValueError(f"it has {len(data)} bytes; at most {MAX_TOKENIZER_BYTES} are accepted")
        try:
            text = data.decode()
            table = json.loads(text)
        except RecursionError:
            raise ValueError("its JSON is too deep") from None
        if not isinstance(table, dict):
            raise ValueError("it is not a JSON object")
        if "tokenizer_json" not in table:
            return cls(text)
        inner, special, template = table["tokenizer_json"], table.get("special_tokens"), table.get("chat_template")
        if not isinstance(inner, str) or not isinstance(template, str) or not isinstance(special, dict):
            raise ValueError("a part of it is missing or of another type")
        if len(template) > _MAX_TEMPLATE_BYTES:
            raise ValueError(f"its chat template has {len(template)} characters")
        if len(special) > _MAX_SPECIAL_TOKENS or not all(
            isinstance(token, str) and len(role) + len(token) <= _MAX_SPECIAL_BYTES for role, token in special.items()
        ):
            raise ValueError("its special tokens are too many or too long")
        return cls(inner, special, template)

    def files(self, context_tokens: int) -> dict[str, bytes]:
        """Return the files that Hugging Face's libraries load, by their names."""
        config: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_input_names": ["input_ids", "attention_mask"],
            "model_max_length": context_tokens,
            "clean_up_tokenization_spaces": False,
            **self.special_tokens,
        }
        files = {
            "tokenizer.json": self.tokenizer_json.encode(),
            "tokenizer_config.json": (json.dumps(config, ensure_ascii=False, indent=2) + "\n").encode(),
        }
        return files | ({"chat_template.jinja": self.chat_template.encode()} if self.chat_template else {})


class TokenizerFile:
    """Tokenizer that a `tokenizer.json` describes.

    Text that it cannot spell becomes its unknown token, if it has one, or nothing. Special tokens that stand in a text
    are its letters like any others: only where a chat template wrote them do they mean something.
    """

    def __init__(self, bundle: TokenizerBundle) -> None:
        """Build it from an untrusted bundle.

        Raises ValueError if that is impossible or refused, RunFileError if the library is missing.
        """
        self.bundle = bundle
        made = self._started(_checked(bundle.tokenizer_json))
        self.vocabulary_size, self._unknown = int(made["vocabulary_size"]), made["unknown"]
        self._dtype = np.uint16 if self.vocabulary_size <= 2**16 else np.uint32
        self.document_begin, added_end = tuple(made["begin"]), tuple(made["end"])
        begin, end = (made["special"].get(role) for role in ("bos_token", "eos_token"))
        self.document_end = added_end if end is None else (end,)
        first = (*self.document_begin, *(() if begin is None else (begin,)), *self.document_end)
        self.start_token = first[0] if first else int((*self.encode(b"\n"), 0)[0])

    def _started(self, table: dict[str, Any]) -> dict[str, Any]:
        """Start the process, and return what it says of the tokenizer."""
        task = {"tokenizer": table, "special_tokens": dict(self.bundle.special_tokens)}
        try:
            self._process = LimitedProcess("swarmtrain.data.tokenizer_process", task, _LIMIT_S, _MEMORY_BYTES)
        except ProcessLimitError as error:
            raise ValueError(str(error)) from None
        weakref.finalize(self, self._process.close)
        made = self._process.first
        if "is_missing" in made:
            raise RunFileError(
                f"model.tokenizer: a tokenizer.json needs tokenizers: {install_in_words('bpe')}", code="package-missing"
            )
        if "error" in made:
            raise ValueError(made["error"])
        return made

    def _ask(self, **question: Any) -> Any:
        try:
            answer = self._process.ask(question)
        except ProcessLimitError as error:
            answer = {"error": str(error)}
        if "error" in answer:
            raise RunFileError(
                f"model.tokenizer: the tokenizer in this run cannot be used: {answer['error']}; use another one",
                code="bad-tokenizer",
            )
        return answer["answer"]

    def encode(self, text: bytes | npt.NDArray[np.uint8]) -> Tokens:
        """Return the tokens of `text` (n,), uint16 or uint32, without those that begin or end a document.

        Bytes that are not UTF-8 are read as U+FFFD. A long text is cut after lines.
        """
        return next(self.encode_all([text]))

    def encode_all(self, texts: Iterable[bytes | npt.NDArray[np.uint8]]) -> Iterator[Tokens]:
        """Yield what `encode` returns for each text, a few texts at once."""
        waiting, counts, num_letters = list[str](), list[int](), 0
        for text in texts:
            parts = [str(part, "utf-8", "replace") for part in chunks(np.frombuffer(text, np.uint8).data)]
            waiting += parts
            counts.append(len(parts))
            num_letters += sum(map(len, parts))
            if num_letters >= _LETTERS_AT_ONCE:
                yield from self._encoded(waiting, counts)
                waiting, counts, num_letters = [], [], 0
        yield from self._encoded(waiting, counts)

    def _encoded(self, parts: Sequence[str], counts: Sequence[int]) -> Iterator[Tokens]:
        """Yield the tokens of texts, given all their parts and how many each has."""
        ends = np.cumsum([len(part) for part in parts]) // _LETTERS_AT_ONCE
        cuts = [0, *(np.flatnonzero(np.diff(ends)) + 1).tolist(), len(parts)]
        encodings = (
            np.array(ids, self._dtype)
            for begin, end in itertools.pairwise(cuts)
            for ids in self._ask(encode=parts[begin:end], as_letters=True)
        )
        for count in counts:
            yield np.concatenate([np.empty(0, self._dtype), *itertools.islice(encodings, count)])

    def encode_spans(self, text: str, spans: Sequence[tuple[int, int]]) -> tuple[Tokens, npt.NDArray[np.bool_]]:
        """Return the tokens (n,) of what a template wrote, special tokens included, and which of them (n,) have
        characters in one of the `spans` (begin, end), as Hugging Face's libraries do."""
        ((ids, offsets_in_text),) = self._ask(encode=[text], as_letters=False, offsets=True)
        offsets = np.array(offsets_in_text, np.int64).reshape(-1, 2)
        is_in = np.zeros(len(offsets), np.bool_)
        for begin, end in spans:
            is_in |= (offsets[:, 0] < end) & (offsets[:, 1] > begin)
        return np.array(ids, self._dtype), is_in

    def encode_prompt(self, text: str) -> Tokens:
        """Return the tokens (n,) of what a person asks with: special tokens in it are what they are, and what begins a
        document begins it."""
        tokens, _ = self.encode_spans(text, ())
        return np.concatenate([np.array(self.document_begin, self._dtype), tokens])

    def encode_pair(self, prompt: str, completion: str) -> tuple[Tokens, int]:
        """Return the tokens (n,) of a prompt and its completion, and how many of them are the prompt's.

        The prompt's are those that it has alone, since the model will be asked with them. Where the two have a token
        together they are encoded apart, unless that changes the text.
        """
        alone, whole, rest = self._ask(encode=[prompt, prompt + completion, completion], as_letters=False)
        if whole[: len(alone)] == alone:
            return np.array(whole, self._dtype), len(alone)
        apart = [*alone, *rest]
        if self.decode(apart) == (prompt + completion).encode():
            return np.array(apart, self._dtype), len(alone)
        pairs = zip(alone, whole, strict=False)
        common = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        return np.array(whole, self._dtype), common

    def num_unspelt_bytes(self, text: bytes) -> int:
        """Return how many bytes of `text` are in no token, or only in unknown ones."""
        missing = 0
        for chunk in chunks(np.frombuffer(text, np.uint8).data):
            part = str(chunk, "utf-8", "replace")
            (encoding,) = self._ask(encode=[part], as_letters=True, offsets=True)
            spelt = np.zeros(len(part), np.bool_)
            for token, (begin, end) in zip(*encoding, strict=True):
                spelt[begin:end] |= token != self._unknown
            missing += sum(
                len(letter.encode())
                for letter, is_spelt in zip(part, spelt, strict=True)
                if not is_spelt and not letter.isspace()
            )
        return missing

    def decode(self, tokens: Iterable[int]) -> bytes:
        """Return the text of `tokens`, special ones included. Raises ValueError for a number that is no token."""
        numbers = [int(token) for token in tokens]
        if numbers and not 0 <= min(numbers) <= max(numbers) < self.vocabulary_size:
            raise ValueError(f"a token is at least 0 and below {self.vocabulary_size}")
        text: str = self._ask(decode=numbers)
        return text.encode()

    def to_bytes(self) -> bytes:
        """Return the bytes from which a peer builds the same tokenizer."""
        return self._bytes

    @cached_property
    def _bytes(self) -> bytes:
        return self.bundle.to_bytes()


# ---------------------------------------------------------------- what a stranger may not ask for


def _checked(text: str) -> dict[str, Any]:
    """Return the file as a table without padding, truncation and random merges. Raises ValueError if it is refused."""
    try:
        table = json.loads(text)
    except RecursionError:
        raise ValueError("its JSON is too deep") from None
    model = table.get("model") if isinstance(table, dict) else None
    if not isinstance(model, dict):
        raise ValueError("it has no model")
    model.setdefault("type", "BPE" if "merges" in model else "")
    if model["type"] not in _MODELS:
        raise ValueError(f"its model is {one_line(str(model['type']))[:40]}; allowed: {', '.join(_MODELS)}")
    if model.get("dropout") is not None:
        model["dropout"] = None
    parts = 0
    for name in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        parts += _num_parts(table.get(name), 0)
    if parts > _MAX_PARTS:
        raise ValueError(f"it has {parts} normalizers and the like; at most {_MAX_PARTS} are accepted")
    checked: dict[str, Any] = {**table, "truncation": None, "padding": None}
    return checked


def _num_parts(part: Any, depth: int) -> int:
    """Return how many parts a normalizer or the like consists of. Raises ValueError if one of them is refused."""
    if depth > _MAX_DEPTH:
        raise ValueError("its normalizers or the like are too deep")
    if isinstance(part, list):
        return sum(_num_parts(each, depth + 1) for each in part)
    if not isinstance(part, dict):
        return 0
    for name, most in (("content", _MAX_REPLACEMENT), ("prepend", _MAX_REPLACEMENT), ("Regex", _MAX_PATTERN)):
        if isinstance(part.get(name), str) and len(part[name]) > most:
            raise ValueError(f"a part of it has {len(part[name])} characters in {name}; at most {most} are accepted")
    return 1 + sum(_num_parts(each, depth + 1) for each in part.values())

"""Prompt for a sample of what a run's model writes: the beginning of held-out text, as training would give it."""

from __future__ import annotations

import itertools
import json
import random
import re

import numpy as np

from swarmtrain.data.corpus import held_out_of_sources
from swarmtrain.data.document_encoder import DocumentEncoder
from swarmtrain.data.tokens import Tokenizer, Tokens
from swarmtrain.run import RunFile
from swarmtrain.run_data import DataSource

NEUTRAL_PROMPT = "The "
"""Prompt where there is no text to take one from."""
_PYTHON = "def "
"""Prompt for a model of Python's standard library."""
_TEXT = re.compile(r"\s*(\S+(?:[^\S\n]+\S+){0,5})")
"""First words of a text, of one line."""
_MOST_LETTERS = 48
"""Most characters of those: in some scripts a sentence has no spaces."""
_LEAST_LETTERS = 12
"""Fewest characters of a line that is chosen: a bracket alone says nothing."""
_SAMPLES = 16
"""Held-out samples of which the one with the shortest prompt is taken."""


def sample_prompt(run: RunFile, held_out: bytes, tokenizer: Tokenizer, seed: int = 0) -> Tokens:
    """Return the tokens (n,) of a prompt, n at least 1, for the source that gives most of the run's sequences.

    Of samples it is what comes before the first token that is to be learnt: a conversation, written by the chat
    template, up to where the assistant answers; or a prompt without its completion. Of text it is a few first words,
    or with a `seed` those of some line. Raises RunFileError as `DocumentEncoder` does.
    """
    source = max(run.data.mixture, key=lambda each: each.weight)
    parts = held_out_of_sources(run, held_out)
    part = parts.get(source.name, held_out)
    if source.has_samples:
        found = _of_samples(source, part, tokenizer, seed)
    elif seed:
        found = tokenizer.encode_prompt(_first_words(random.Random(seed).choice(_long_lines(part) or [part])))
    else:
        found = tokenizer.encode_prompt(_PYTHON if source.source == "python-stdlib" else _first_words(part))
    return found if len(found) else np.array([tokenizer.start_token])


def typed_prompt(held_out: bytes) -> str:
    """Return what a person might type to see a model write, whose run is not known: the first words of its held-out
    text. Without text, or where that is samples, the neutral prompt.
    """
    try:
        is_sample = isinstance(json.loads(held_out.split(b"\n", 1)[0]), dict)
    except (ValueError, RecursionError):
        is_sample = False
    words = "" if is_sample else _first_words(held_out)
    return words if words.strip() and words.isprintable() else NEUTRAL_PROMPT


def _first_words(text: bytes) -> str:
    found = _TEXT.match(text.decode(errors="replace"))
    return found[1][:_MOST_LETTERS] if found else "\n"


def _long_lines(text: bytes) -> list[bytes]:
    return [line for line in map(bytes.strip, text.splitlines()) if len(line) >= _LEAST_LETTERS]


def _of_samples(source: DataSource, text: bytes, tokenizer: Tokenizer, seed: int) -> Tokens:
    """Return the shortest prompt of the first samples, with a `seed` of one or a few in a row; the neutral one if none
    of them has one.
    """
    lines = [line for line in text.split(b"\n") if line]
    begin = random.Random(seed).randrange(len(lines)) if seed and lines else 0
    samples = itertools.islice(lines, begin, begin + _SAMPLES)
    prompts = list[Tokens]()
    with DocumentEncoder(source.format, tokenizer) as encoder:
        for documents in encoder.encode(samples):
            for tokens, is_target in documents[:1]:
                assert is_target is not None, "of a sample a part is learnt"
                prompts.append(tokens[: int(np.argmax(is_target))])
    asked = list(filter(len, prompts))
    if not asked:
        return tokenizer.encode_prompt(NEUTRAL_PROMPT)
    return asked[0] if seed else min(asked, key=len)

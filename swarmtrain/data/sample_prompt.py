"""Prompt for a sample of what a run's model writes: the beginning of a held-out document, as training would give it."""

from __future__ import annotations

import itertools
import re

import numpy as np

from swarmtrain.data.corpus import held_out_of_sources
from swarmtrain.data.document_encoder import DocumentEncoder
from swarmtrain.data.tokens import Tokenizer, Tokens
from swarmtrain.run import DataSource, RunFile

__all__ = ["sample_prompt"]

_PYTHON = "def "
"""Prompt for a model of Python's standard library."""
_TEXT = re.compile(r"\s*(\S+(?:[^\S\n]+\S+){0,5})")
"""First words of a text, of one line."""
_MOST_LETTERS = 48
"""Most characters of those: in some scripts a sentence has no spaces."""
_SAMPLES = 16
"""Held-out samples of which the one with the shortest prompt is taken."""


def sample_prompt(run: RunFile, held_out: bytes, tokenizer: Tokenizer) -> Tokens:
    """Return the tokens (n,) of a prompt, n at least 1, for the source that gives most of the run's sequences.

    Of samples it is what comes before the first token that is to be learnt: a conversation, written by the chat
    template, up to where the assistant answers; or a prompt without its completion. Of text it is a few first words.
    Raises RunFileError as `DocumentEncoder` does.
    """
    source = max(run.data.mixture, key=lambda each: each.weight)
    parts = held_out_of_sources(run, held_out)
    part = parts.get(source.name, held_out)
    found = _of_samples(source, part, tokenizer) if source.has_samples else None
    if found is None:
        found = tokenizer.encode_prompt(_PYTHON if source.source == "python-stdlib" else _first_words(part))
    return found if len(found) else np.array([tokenizer.start_token])


def _first_words(text: bytes) -> str:
    found = _TEXT.match(text.decode(errors="replace"))
    return found[1][:_MOST_LETTERS] if found else "\n"


def _of_samples(source: DataSource, text: bytes, tokenizer: Tokenizer) -> Tokens | None:
    """Return the shortest prompt of the first samples; None if none of them has one."""
    samples = itertools.islice((line for line in text.split(b"\n") if line), _SAMPLES)
    prompts = list[Tokens]()
    with DocumentEncoder(source.format, tokenizer) as encoder:
        for documents in encoder.encode(samples):
            for tokens, is_target in documents[:1]:
                assert is_target is not None, "of a sample a part is learnt"
                prompts.append(tokens[: int(np.argmax(is_target))])
    return min(filter(len, prompts), key=len, default=None)

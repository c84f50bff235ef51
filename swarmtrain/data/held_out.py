"""Held-out text as a model is measured on it: batches in which everything that counts is a target exactly once.

Of a text every byte counts, of a sample what is to be learnt: the loss is per byte of these, so that models with
different tokenizers compare. What a tokenizer cannot spell is charged at eight bits a byte, as if it were written out
beside the tokens: otherwise a tokenizer would be the better, the more letters it does not know.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from swarmtrain.algorithm.batch import join_rows
from swarmtrain.data.batches import held_out_batches
from swarmtrain.data.corpus import held_out_of_sources
from swarmtrain.data.document_encoder import DocumentEncoder, EncodedCorpus, joined_documents
from swarmtrain.data.tokens import Tokenizer
from swarmtrain.data.windows import piece_starts
from swarmtrain.run import RunFile


@dataclass(frozen=True, kw_only=True)
class HeldOutTokens:
    """Held-out text, encoded."""

    corpus: EncodedCorpus
    num_bytes: int
    """Bytes of what counts."""
    unspelt_bytes: int
    """Those of them that no token spells."""
    start_token: int

    @property
    def unspelt_nats(self) -> float:
        """What those bytes cost, to be added to the loss of the tokens."""
        return self.unspelt_bytes * math.log(256)

    @property
    def num_targets(self) -> int:
        """Number of tokens to predict, about."""
        is_target = self.corpus.is_target
        return len(self.corpus.tokens) if is_target is None else int(np.count_nonzero(is_target))

    def batches(self, context_tokens: int, batch_sequences: int) -> Iterator[torch.Tensor]:
        """Yield batches of at most T and B."""
        if self.corpus.is_target is None:
            return held_out_batches(self.corpus.tokens, context_tokens, batch_sequences, self.start_token)
        return _sample_batches(self.corpus, context_tokens, batch_sequences)


@functools.lru_cache(8)
def held_out_tokens(
    format: str, text: bytes, tokenizer: Tokenizer, name_of: Callable[[bytes], str] = lambda sample: "a conversation"
) -> HeldOutTokens:
    """Encode a held-out text, or samples in lines of JSON. Raises RunFileError as `DocumentEncoder` does."""
    if format == "text":
        corpus, counted = EncodedCorpus(tokenizer.encode(text)), text
    else:
        samples = [line for line in text.split(b"\n") if line]
        with DocumentEncoder(format, tokenizer, name_of) as encoder:
            corpus = joined_documents(encoder.encode(samples))
        counted = b"".join(learnt_text(sample) for sample in samples)
    return HeldOutTokens(
        corpus=corpus,
        num_bytes=max(1, len(counted)),
        unspelt_bytes=tokenizer.num_unspelt_bytes(counted),
        start_token=tokenizer.start_token,
    )


def held_out_parts(run: RunFile, text: bytes, tokenizer: Tokenizer) -> dict[str, HeldOutTokens]:
    """Encode the part of each source of a run's held-out `text`, by its name; "" for a source without one."""
    formats = {source.name: source.format for source in run.data.mixture}
    parts = held_out_of_sources(run, text)
    return {
        name: held_out_tokens(formats.get(name, run.data.mixture[0].format), part, tokenizer)
        for name, part in parts.items()
    }


def learnt_text(sample: bytes) -> bytes:
    """Return what is to be learnt of a sample: its completion, or what the assistant says, its calls of tools as JSON
    included."""
    table = json.loads(sample)
    if "completion" in table:
        return str(table["completion"]).encode()
    said = list[str]()
    for message in table["messages"]:
        if message["role"] == "assistant":
            content, calls = message.get("content", ""), message.get("tool_calls")
            said += [content] if isinstance(content, str) else [str(part.get("text", "")) for part in content]
            said += [json.dumps(calls, ensure_ascii=False)] if calls else []
    return "".join(said).encode()


def _sample_batches(corpus: EncodedCorpus, context_tokens: int, batch_sequences: int) -> Iterator[torch.Tensor]:
    """Yield batches (B, 2, L), L at most T + 1, of samples or pieces of longer ones, each in a sequence of its own.

    They come by their lengths, so that little is filled up; a model that knows no positions measures the same.
    """
    assert corpus.is_target is not None and corpus.starts is not None
    begins = piece_starts(corpus.starts, len(corpus.tokens), context_tokens)
    document_ends = np.append(corpus.starts[1:], len(corpus.tokens))
    ends = document_ends[np.searchsorted(corpus.starts, begins, side="right") - 1]
    lengths = np.minimum(ends - begins, context_tokens + 1)
    order = np.argsort(lengths, kind="stable")
    for first in range(0, len(order), batch_sequences):
        chosen = order[first : first + batch_sequences]
        offsets = np.arange(lengths[chosen].max())
        places = begins[chosen][:, None] + offsets
        is_inside = offsets < lengths[chosen][:, None]
        places[~is_inside] = 0
        yield join_rows(corpus.tokens[places].astype(np.int64), is_inside & corpus.is_target[places])

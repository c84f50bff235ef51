"""Encode documents and samples: which tokens they are, which of them are targets, and where each begins.

A text is all targets. Of a sample only what is to be learnt is: the assistant's turns of a conversation, the completion
of a prompt. A tokenizer with an end token puts it after each text and completion, in place of the text's last newline;
our own tokenizers keep the newline. A conversation ends as its template says.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from swarmtrain.data.rows import has_turns
from swarmtrain.data.template_process import TemplateError, TemplateProcess
from swarmtrain.data.tokenizer_file import TokenizerFile
from swarmtrain.data.tokens import Tokenizer, Tokens
from swarmtrain.errors import RunFileError


class EncodedDocument(NamedTuple):
    """Tokens of a text, or of a sample."""

    tokens: Tokens
    is_target: npt.NDArray[np.bool_] | None = None
    """Which tokens (n,) are to be learnt; None: all of them."""


@dataclass(frozen=True)
class EncodedCorpus:
    """Tokens (n,) of a corpus."""

    tokens: Tokens
    is_target: npt.NDArray[np.bool_] | None = None
    """Which tokens (n,) are to be learnt; None: all of them."""
    starts: npt.NDArray[np.int64] | None = None
    """First token of each document, ascending from 0; None if it is not known."""
    num_left_out: int = 0
    """Samples without anything to learn, such as conversations without a turn of the assistant."""

    def part(self, begin: int, end: int) -> EncodedCorpus:
        """Return tokens `begin` to `end` as a corpus; a document that is cut begins anew."""
        starts = None
        if self.starts is not None:
            inside = self.starts[(self.starts > begin) & (self.starts < end)]
            starts = np.concatenate([[0], inside - begin]).astype(np.int64)
        is_target = None if self.is_target is None else self.is_target[begin:end]
        return EncodedCorpus(self.tokens[begin:end], is_target, starts)


class DocumentEncoder:
    """Encodes the documents of a source, in whose run file section `format` says what they are.

    It may run a process for a chat template, which ends with the `with` block.
    """

    def __init__(
        self, format: str, tokenizer: Tokenizer, name_of: Callable[[bytes], str] = lambda text: "a conversation"
    ) -> None:
        """`name_of` returns, for a message, where a sample comes from. Raises RunFileError if conversations have no
        chat template."""
        self._format, self._tokenizer, self._name_of = format, tokenizer, name_of
        self._exit = contextlib.ExitStack()
        self._templates: TemplateProcess | None = None
        if format == "chat":
            if not isinstance(tokenizer, TokenizerFile) or not tokenizer.bundle.chat_template:
                raise RunFileError(
                    'data.format = "chat" needs a tokenizer with a chat template, and this one has none; write '
                    'data.format = "prompt-completion", or name with model.tokenizer one that has a template',
                    code="no-chat-template",
                )
            bundle = tokenizer.bundle
            self._templates = self._exit.enter_context(TemplateProcess(bundle.chat_template, bundle.special_tokens))

    def __enter__(self) -> DocumentEncoder:
        return self

    def __exit__(self, *error: object) -> None:
        self._exit.close()

    def encode(self, documents: Iterable[bytes]) -> Iterator[list[EncodedDocument]]:
        """Yield what each document becomes: itself, or nothing if there is nothing to learn in it, or one for each turn
        of a conversation. Raises RunFileError if the chat template refuses a conversation."""
        if self._format == "text":
            return self._texts(documents)
        write = self._pair if self._format == "prompt-completion" else self._conversation
        return (write(document) for document in documents)

    def _texts(self, documents: Iterable[bytes]) -> Iterator[list[EncodedDocument]]:
        begin, end = self._tokenizer.document_begin, self._tokenizer.document_end
        bare = (text.removesuffix(b"\n") if end else text for text in documents)
        for tokens in self._tokenizer.encode_all(bare):
            yield [EncodedDocument(_framed(begin, tokens, end))]

    def _pair(self, sample: bytes) -> list[EncodedDocument]:
        pair, tokenizer = json.loads(sample), self._tokenizer
        prompt, completion = pair["prompt"], pair["completion"]
        if isinstance(tokenizer, TokenizerFile):
            tokens, num_given = tokenizer.encode_pair(prompt, completion)
            is_target, end = np.arange(len(tokens)) >= num_given, tokenizer.document_end
        else:  # every byte is a token, and a token has bytes of one side
            sides = tokenizer.encode(prompt.encode()), tokenizer.encode(f"{completion}\n".encode())
            tokens, is_target, end = np.concatenate(sides), np.repeat([False, True], [len(side) for side in sides]), ()
        begin = tokenizer.document_begin
        wanted = np.concatenate([np.zeros(len(begin), np.bool_), is_target, np.ones(len(end), np.bool_)])
        return _if_it_teaches(EncodedDocument(_framed(begin, tokens, end), wanted))

    def _conversation(self, sample: bytes) -> list[EncodedDocument]:
        conversation, tokenizer = json.loads(sample), self._tokenizer
        if not has_turns(conversation):
            return []
        assert self._templates is not None and isinstance(tokenizer, TokenizerFile)
        try:
            texts = self._templates.write(conversation["messages"], conversation.get("tools"))
        except TemplateError as error:
            raise RunFileError(
                f"data.format: the tokenizer's chat template refuses {self._name_of(sample)}: {error}; correct the "
                "conversation, or leave it out",
                code="chat-refused",
            ) from None
        found = (EncodedDocument(*tokenizer.encode_spans(text, spans)) for text, spans in texts)
        return [document for each in found for document in _if_it_teaches(each)]


def _if_it_teaches(document: EncodedDocument) -> list[EncodedDocument]:
    """Return the document, unless none of its tokens but the first is a target."""
    assert document.is_target is not None
    return [document] if document.is_target[1:].any() else []


def _framed(begin: tuple[int, ...], tokens: Tokens, end: tuple[int, ...]) -> Tokens:
    if not begin and not end:
        return tokens
    return np.concatenate([np.array(begin, tokens.dtype), tokens, np.array(end, tokens.dtype)])


def joined_documents(found: Iterable[list[EncodedDocument]]) -> EncodedCorpus:
    """Return the corpus of encoded documents, one after the other."""
    tokens, targets, left_out = list[Tokens](), list[Any](), 0
    for documents in found:
        left_out += not documents
        for document in documents:
            if len(document.tokens):
                tokens.append(document.tokens)
                targets.append(document.is_target)
    if not tokens:
        return EncodedCorpus(np.empty(0, np.uint8), num_left_out=left_out)
    starts = np.cumsum([0, *(len(each) for each in tokens[:-1])], dtype=np.int64)
    is_target = None if targets[0] is None else np.concatenate(targets)
    return EncodedCorpus(np.concatenate(tokens), is_target, starts, left_out)


def nothing_to_learn(which: str) -> RunFileError:
    """Return the error of samples of which none teaches anything; `which` says how many of which, for a message."""
    return RunFileError(
        f"data.format: of {which} none has anything to learn, such as a turn of the assistant or a completion; correct "
        "the roles or the fields, or give other data",
        code="nothing-to-learn",
    )

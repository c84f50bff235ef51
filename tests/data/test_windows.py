"""Windows of corpora with targets and documents: what they begin with, where attention ends, which are drawn."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from codes import raises_code
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from swarmtrain.algorithm.batch import IGNORED, num_targets
from swarmtrain.data.document_encoder import EncodedCorpus
from swarmtrain.data.windows import CorpusWindows, document_positions, piece_starts
from swarmtrain.errors import RunFileError

T = 5


def corpus_of(lengths: list[int], targets: list[int] | None = None) -> EncodedCorpus:
    """Return documents of these lengths, whose tokens count up through the corpus; of each only the last tokens are
    targets, as many as `targets` says."""
    size = sum(lengths)
    starts = np.cumsum([0, *lengths[:-1]])
    is_target = None
    if targets is not None:
        ends = starts + lengths
        is_target = np.zeros(size, np.bool_)
        for end, number in zip(ends, targets, strict=True):
            is_target[end - number : end] = True
    return EncodedCorpus(np.arange(size, dtype=np.uint16), is_target, starts)


def all_windows(corpus: EncodedCorpus, rows: int, context_tokens: int = T) -> Tensor:
    """Return the window of each token of the corpus."""
    windows = CorpusWindows(corpus, context_tokens, rows)
    return windows.sequences(0, np.arange(len(corpus.tokens), dtype=np.uint64))


def numbers(count: int) -> npt.NDArray[np.uint64]:
    return np.random.Philox(key=1).random_raw(count)


def test_long_documents_are_cut_into_pieces_of_which_each_target_is_in_one() -> None:
    starts = np.array([0, 3, 4, 15])
    assert piece_starts(starts, 26, T).tolist() == [0, 3, 4, 9, 15, 20]
    assert piece_starts(np.array([0]), 1, T).tolist() == [0]
    assert piece_starts(np.array([0]), T + 1, T).tolist() == [0], "a whole window"
    assert piece_starts(np.array([0]), T + 2, T).tolist() == [0, T]


def test_positions_begin_anew_with_each_document_and_where_the_corpus_does() -> None:
    documents = np.array([0, 3, 4])
    found = document_positions(np.array([1, 3, 5]), documents, 7, 6)
    assert found.tolist() == [[0, 1, 0, 0, 1, 2], [0, 0, 1, 2, 0, 1], [0, 1, 0, 1, 2, 0]]


def test_a_window_begins_with_a_document_and_its_first_tokens_are_no_targets() -> None:
    windows = all_windows(corpus_of([3, 4, 13]), 3)
    tokens, labels, positions = windows.unbind(1)
    assert tokens[:, 0].tolist() == [0] * 3 + [3] * 4 + [7] * 5 + [12] * 5 + [17] * 3
    assert tokens[0].tolist() == [0, 1, 2, 3, 4, 5] and positions[0].tolist() == [0, 1, 2, 0, 1, 2]
    assert labels[0].tolist() == [IGNORED, 1, 2, IGNORED, 4, 5]
    assert tokens[-1].tolist() == [17, 18, 19, 0, 1, 2], "the corpus goes on with its beginning"
    assert labels[-1].tolist() == [IGNORED, 18, 19, IGNORED, 1, 2]


def test_windows_without_a_target_are_not_drawn() -> None:
    for rows in (2, 3):
        corpus = corpus_of([4, 20, 3, 2], [2, 1, 0, 1])
        found = all_windows(corpus, rows)
        assert all(num_targets(window[None]) for window in found)
        labels = found[:, 1, 1:]
        assert set(labels[labels != IGNORED].tolist()) == set(np.flatnonzero(corpus.is_target).tolist())
    plain = all_windows(corpus_of([4, 20]), 2)
    assert plain[:, 0, 0].tolist() == [*range(19), *range(5)], "without labels it is a stream as ever"


@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=6),
    targets=st.lists(st.integers(0, 12), min_size=6, max_size=6),
    rows=st.sampled_from([2, 3]),
)
def test_any_corpus_with_something_to_learn_teaches_in_every_window(
    lengths: list[int], targets: list[int], rows: int
) -> None:
    corpus = corpus_of(lengths, [min(wanted, length - 1) for wanted, length in zip(targets, lengths, strict=False)])
    assert corpus.is_target is not None
    if not corpus.is_target.any() or (rows == 2 and len(corpus.tokens) <= T):
        return
    found = all_windows(corpus, rows)
    assert found.shape == (len(corpus.tokens), rows, T + 1)
    for window in found:
        assert num_targets(window[None]) > 0
        if rows == 3:
            begins = (window[2] == 0).nonzero().squeeze(1).tolist()
            assert begins[0] == 0
            # Within a document tokens follow each other, and the positions say so.
            inside = window[2, 1:] > 0
            assert torch.equal(window[0, 1:][inside], window[0, :-1][inside] + 1)
            assert (window[1, begins] == IGNORED).all()


def test_each_token_is_read_about_as_often_as_the_others() -> None:
    draw = np.random.Philox(key=2)
    lengths = (draw.random_raw(400) % np.uint64(9) + np.uint64(3)).astype(int).tolist()
    corpus = corpus_of(lengths)
    windows = CorpusWindows(corpus, 64, 3)
    read = np.bincount(windows.sequences(0, numbers(15_000))[:, 0].flatten().numpy(), minlength=len(corpus.tokens))
    share = read / read.mean()
    assert share.min() > 0.7 and share.max() < 1.3 and share.std() < 0.08


def test_shards_are_those_of_the_tokens() -> None:
    corpus = corpus_of([3, 4, 13, 10, 2, 8])
    windows = CorpusWindows(corpus, T, 3)
    windows.cut(2)
    seen = []
    for shard in (0, 1):
        windows.use_shard(shard)
        seen.append({tuple(row) for row in windows.sequences(0, numbers(200))[:, 0].tolist()})
    windows.use_shard(0)
    assert seen[0] != seen[1] and {row[0] for row in seen[0] | seen[1]} <= set(
        piece_starts(corpus.starts, 40, T).tolist()
    )  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("corpus", "rows"),
    [
        (EncodedCorpus(np.empty(0, np.uint8), starts=np.empty(0, np.int64)), 3),
        (corpus_of([1, 1, 1, 1, 1, 1, 1]), 3),
        (corpus_of([5, 3], [0, 0]), 3),
        (corpus_of([3, 2], [1, 1]), 2),
    ],
)
def test_a_corpus_that_teaches_nothing_is_one_line(corpus: EncodedCorpus, rows: int) -> None:
    with raises_code("too-little-text", RunFileError, "give more text"):
        CorpusWindows(corpus, T, rows)

"""Sampled windows against a plain reference, and the rules built on them."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmtrain.data import overlap
from swarmtrain.data.overlap import WINDOW_BYTES, HeldOutIndex, near_duplicates, sampled_windows

WORDS = [
    "".join(random.Random(i).choices("abcdefghijklmnopqrstuvwxyz", k=random.Random(i).randint(2, 9)))
    for i in range(900)
]


def _prose(seed: int, num_lines: int) -> bytes:
    choose = random.Random(seed)
    return "".join(" ".join(choose.choices(WORDS, k=9)) + ".\n" for _ in range(num_lines)).encode()


def _windows(text: bytes) -> list[tuple[int, int]]:
    found = [(p, h) for p, h in sampled_windows(np.frombuffer(text, np.uint8))]
    return [(int(p), int(h)) for positions, hashes in found for p, h in zip(positions, hashes, strict=True)]


def test_windows_match_a_plain_reference() -> None:
    text, mask = _prose(1, 40), 2**64 - 1
    expected = []
    for position in range(len(text) - WINDOW_BYTES + 1):
        words = [int.from_bytes(text[position + k : position + k + 8], "little") for k in range(0, WINDOW_BYTES, 8)]
        value = words[0] * 0x9E3779B97F4A7C15 & mask
        if value >= 2**60:
            continue
        for word in words[1:]:
            value = (value ^ value >> 29 ^ word) * 0x9E3779B97F4A7C15 & mask
        expected.append((position, value ^ value >> 32))
    assert _windows(text) == expected


@given(before=st.binary(max_size=200), seed=st.integers(0, 50))
def test_a_passage_is_sampled_alike_wherever_it_stands(before: bytes, seed: int) -> None:
    passage = _prose(seed, 12)
    moved = {(p - len(before), h) for p, h in _windows(before + passage) if p >= len(before)}
    assert moved == set(_windows(passage))


def test_blocks_do_not_change_the_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    text = _prose(2, 100)
    whole = _windows(text)
    monkeypatch.setattr(overlap, "_BLOCK_BYTES", 100)
    assert _windows(text) == whole


@pytest.mark.parametrize("text", [b"", b"short", b"x" * 63])
def test_short_texts_have_no_window(text: bytes) -> None:
    assert _windows(text) == []


def test_near_duplicates_of_larger_documents_are_found() -> None:
    original = _prose(3, 80)
    changed = original[:2000] + b"another line\n" + original[2000:]
    half = original[: len(original) // 3] + _prose(4, 200)
    texts = [original, _prose(5, 80), changed, half, original[:700]]
    assert near_duplicates(texts).tolist() == [True, False, False, False, True]
    assert near_duplicates([b"a", b"a"]).tolist() == [False, False]
    assert near_duplicates([original, original]).tolist() == [False, True]


def test_a_shared_licence_makes_nobody_a_duplicate() -> None:
    licence = _prose(6, 20)
    assert not near_duplicates([licence + _prose(100 + i, 10) for i in range(12)]).any()


def test_the_same_file_of_another_version_goes_and_others_stay() -> None:
    file = _prose(7, 100)
    lines = file.splitlines(keepends=True)
    edited = b"".join(b"changed here\n" if i % 15 == 0 else line for i, line in enumerate(lines))
    others = [_prose(8, 50), _prose(9, 3)]
    cut = HeldOutIndex(file).cut([others[0], edited, others[1]])
    assert cut.text.tobytes() == b"".join(others)
    assert (cut.num_documents, cut.dropped_documents, cut.dropped_bytes) == (2, 1, len(edited))


def test_only_the_passage_goes_from_a_large_file() -> None:
    large = _prose(10, 2000)
    begin = len(large) // 2
    cut = HeldOutIndex(large[begin : begin + 3000]).cut([large])
    assert cut.dropped_documents == 0 and 3000 <= cut.dropped_bytes <= 3 * overlap.PASSAGE_BYTES
    left = cut.text.tobytes()
    assert all(large[i : i + 120] not in left for i in range(begin, begin + 2900, 50))


def test_one_shared_sentence_costs_nothing() -> None:
    sentence = b"All of them agreed that the evening had been a success.\n"
    document = _prose(11, 60) + sentence + _prose(12, 60)
    assert HeldOutIndex(_prose(13, 30) + sentence).cut([document]).text.tobytes() == document


def test_licences_and_rules_of_hyphens_cost_nothing() -> None:
    licence = _prose(14, 10)
    documents = [licence + _prose(200 + i, 30) + b"-" * 500 + b"\n" for i in range(12)]
    cut = HeldOutIndex(licence + _prose(15, 30) + b"-" * 500 + b"\n").cut(documents)
    assert cut.dropped_bytes == 0 and cut.num_documents == 12


def test_short_documents_go_when_their_lines_are_held_out() -> None:
    held_out = b"The first sentence of a story.\nAnd the second one.\n"
    kept = [b"A wholly other sentence.", b"ok"]
    cut = HeldOutIndex(held_out).cut([b"And the second one.\n", *kept])
    assert cut.text.tobytes() == b"A wholly other sentence.\nok\n"


def test_the_end_of_each_document_in_what_is_left_is_known() -> None:
    held_out, kept = _prose(16, 60), [_prose(17, 60), b"short"]
    cut = HeldOutIndex(held_out).cut([kept[0], held_out, kept[1]])
    text, begins = cut.text.tobytes(), [0, *cut.ends.tolist()]
    assert [text[begin:end] for begin, end in itertools.pairwise(begins)] == [kept[0], b"", b"short\n"]


def test_without_documents_nothing_is_left() -> None:
    cut = HeldOutIndex(b"").cut([])
    assert (len(cut.text), cut.num_documents, cut.dropped_documents) == (0, 0, 0)

"""Merging with a server: every round enters its weights once, in whatever order things happen."""

from __future__ import annotations

import random

import pytest

from swarmtrain.protocol.server import GradientUpload, GradientUploads, UploadVersions, too_old


def hand_in(round: int, gradient: int, arrivals: int = 0) -> GradientUpload[int]:
    return GradientUpload(
        round=round, tokens=10, inner_steps=1, arrivals=arrivals, own_tokens=10 * (round + 1), gradient=gradient
    )


def test_rounds_that_nobody_asked_for_become_one_piece() -> None:
    mine = GradientUploads[int]()
    for round in range(3):
        mine.add(hand_in(round, 10**round, arrivals=5 + round))
    (piece,) = mine.pieces
    assert (piece.round, piece.tokens, piece.inner_steps, piece.gradient) == (2, 30, 3, 111)
    assert piece.arrivals == 5, "as old as the oldest of it"
    assert piece.own_tokens == 30


def test_what_was_asked_for_never_changes() -> None:
    mine = GradientUploads[int]()
    mine.add(hand_in(0, 1))
    asked = mine.after(None)
    mine.add(hand_in(1, 10))
    mine.add(hand_in(2, 100))
    assert mine.after(None) is asked, "the answer may have been lost"
    second = mine.after(0)
    assert second is not None and (second.round, second.gradient) == (2, 110)
    mine.entered(0)
    assert mine.pieces == (second,)
    assert mine.after(2) is None
    with pytest.raises(ValueError, match="handed in before"):
        mine.add(hand_in(2, 1))


def test_a_server_that_went_on_from_an_older_checkpoint_gets_it_again() -> None:
    mine = GradientUploads[int]()
    for round in range(2):
        mine.add(hand_in(round, 10**round))
        mine.after(round - 1 if round else None)
    assert [piece.round for piece in mine.pieces] == [0, 1]
    again = mine.after(None)
    assert again is not None and again.round == 0


def test_a_worker_that_gets_no_weights_keeps_little() -> None:
    mine = GradientUploads[int]()
    for round in range(50):
        mine.add(hand_in(round, 1))
        piece = mine.after(round - 1)
        assert piece is not None and piece.round == round
    assert len(mine.pieces) <= 5


@pytest.mark.parametrize("seed", range(30))
def test_every_round_enters_once(seed: int) -> None:
    """Asking, answering, applying and going on happen in any order; answers get lost."""
    chance = random.Random(seed)
    mine, marks, served = GradientUploads[int](), UploadVersions(), 0
    taken: GradientUpload[int] | None = None
    handed_in = 0
    for round in range(200):
        mine.add(hand_in(round, 1 << round))
        handed_in += 1 << round
        for _ in range(chance.randrange(4)):
            event = chance.choice(["ask", "ask", "lose", "take", "weights"])
            if event == "ask" and taken is None:
                taken = mine.after(marks.round("me"))
            elif event == "lose":
                taken = None
            elif event == "take" and taken is not None:
                assert marks.is_new("me", taken.round)
                marks.enter("me", taken.round)
                served += taken.gradient
                taken = None
            elif event == "weights":
                mine.entered(marks.round("me"))
                lead = sum(piece.gradient for piece in mine.pieces)
                assert served + lead == handed_in, "it starts from the server's weights and all that is not in them"
    while (piece := mine.after(marks.round("me"))) is not None:
        marks.enter("me", piece.round)
        served += piece.gradient
    assert served == handed_in


def test_marks_only_grow_and_come_back_from_a_checkpoint() -> None:
    marks = UploadVersions(max_workers=3)
    for peer, round in (("a", 4), ("b", 0), ("c", 7), ("a", 5)):
        assert marks.is_new(peer, round)
        marks.enter(peer, round)
    with pytest.raises(ValueError, match="entered before"):
        marks.enter("a", 5)
    again = UploadVersions(max_workers=3)
    again.load(marks.rows())
    assert again.rows() == [["b", 0], ["c", 7], ["a", 5]]
    again.enter("d", 1)
    assert again.newest(2) == {"a": 5, "d": 1} and again.round("b") is None
    for rows in ([["a"]], [["a", -1]], [[1, 2]], ["ab"]):
        with pytest.raises(ValueError, match="not a worker's round"):
            again.load(rows)
    assert again.newest(1) == {"d": 1}


def test_what_is_too_old() -> None:
    assert too_old(0, 32, 4, 8) == ""
    assert too_old(0, 36, 4, 8) == "it began from weights 9 rounds old; at most 8 are taken"
    assert too_old(50, 3, 4, 8) == "", "the server went on from an older checkpoint"

"""Records of a pipeline together: who holds what, and whether the first stage has trained the run's tokens."""

from __future__ import annotations

import pytest

from swarmtrain.protocol.membership.membership import PeerInfo
from swarmtrain.protocol.pipeline.balance import StagePeer
from swarmtrain.protocol.pipeline.moves import FirstStageWatch, places_of, stage_costs

TOTAL = 1000


def info(name: str, *stages: int, tokens: int = 0, moving_to: tuple[int, ...] = ()) -> PeerInfo:
    place = StagePeer(peer=name, stages=stages, moving_to=moving_to, tokens_per_s=1.0)
    return PeerInfo(peer=name, run_tokens=tokens, place=place)


BOOTSTRAP = PeerInfo(peer="bootstrap", is_bootstrap=True, run_tokens=TOTAL)
DONE, DONE_TOO = info("a", 0, tokens=TOTAL), info("b", 0, 1, tokens=TOTAL + 5)
BUSY, LATER = info("c", 0, tokens=TOTAL - 1), info("d", 1, tokens=TOTAL)


def looked(here: list[PeerInfo], known: list[PeerInfo], counted: int = 0) -> float | None:
    """After how many seconds of seeing this it is over; None: not in an hour."""
    watch = FirstStageWatch(TOTAL)
    return next((now for now in range(3600) if watch.look(iter(here), iter(known), counted, 100.0 + now)), None)


@pytest.mark.parametrize(
    ("here", "known", "over_s"),
    [
        ([DONE, DONE_TOO, LATER], [], 0),
        ([DONE, BUSY], [], None),
        ([BUSY], [DONE], None),  # each driver still needs the others
        ([DONE], [BUSY], 0),  # who has gone drives no more
        ([LATER], [DONE], 30),
        ([], [DONE, BUSY], 30),
        ([LATER], [BUSY], None),  # its work is to be taken up again
        ([LATER], [LATER, BOOTSTRAP], None),  # who holds another stage does not speak for the first
        ([BOOTSTRAP], [BOOTSTRAP], None),
        ([], [], None),
    ],
)
def test_the_first_stage_is_done_when_all_who_drive_say_so_or_one_who_has_gone_had(
    here: list[PeerInfo], known: list[PeerInfo], over_s: float | None
) -> None:
    assert looked(here, known) == over_s
    assert looked(here[::-1], known[::-1]) == over_s


def test_who_comes_to_drive_counts_and_who_leaves_for_another_stage_does_not() -> None:
    coming, leaving = info("e", 2, moving_to=(0,)), info("f", 0, moving_to=(1,))
    assert looked([DONE, coming], []) is None
    assert looked([DONE, leaving], []) == 0
    assert looked([leaving], [DONE]) == 30


SILENT = info("z", 0)
"""Peer that says that it drives, and never that it is done."""


def test_one_that_never_says_so_keeps_nobody_once_most_do_or_the_tokens_were_counted() -> None:
    assert looked([DONE, DONE_TOO, SILENT], []) == 30
    assert looked([DONE, SILENT], []) is None
    assert looked([DONE, SILENT], [], 949) is None
    assert looked([DONE, SILENT], [], 950) == 30
    assert looked([SILENT], [DONE], 950) == 30, "those who said so have left meanwhile"
    assert looked([SILENT], [SILENT], TOTAL) is None, "the count alone is no driver's word"


def test_one_claim_ends_nothing_that_others_train() -> None:
    assert looked([DONE, BUSY, BUSY], []) is None
    assert looked([DONE, BUSY], [DONE]) is None
    assert looked([LATER], [DONE], 949) == 30
    assert looked([LATER], [DONE], 950) == 0, "they were counted: nobody who drives is waited for"


def test_what_does_not_last_ends_nothing() -> None:
    watch = FirstStageWatch(TOTAL)
    for begin_s in (0.0, 60.0, 120.0):  # the one who drives is out of view for 29 s again and again
        assert not watch.look([LATER], [DONE, BUSY], 0, begin_s)
        assert not watch.look([LATER], [DONE, BUSY], 0, begin_s + 29)
        assert not watch.look([BUSY], [DONE], 0, begin_s + 31)
    assert not watch.look([LATER], [DONE, BUSY], 0, 180.0)
    assert watch.look([LATER], [DONE, BUSY], 0, 210.0)
    assert watch.look([BUSY], [], 0, 211.0), "what is over stays over"


def test_places_are_of_those_who_say_what_they_hold() -> None:
    assert places_of([BOOTSTRAP, LATER, PeerInfo(peer="x"), DONE]) == [LATER.place, DONE.place]
    assert places_of([]) == []


@pytest.mark.parametrize(
    ("measured", "costs"),
    [((0.25, 0.75), (0.25, 0.75)), ((0.2, 0.2), (0.5, 0.5)), ((1e-6, 3e-6), (0.25, 0.75)), ((0.3,), (1.0,))],
)
def test_costs_are_parts_of_one_whatever_their_unit(measured: tuple[float, ...], costs: tuple[float, ...]) -> None:
    assert stage_costs(measured) == pytest.approx(costs)
    assert sum(stage_costs(measured)) == pytest.approx(1.0)


def test_costs_that_were_rounded_add_up_to_one() -> None:
    assert sum(stage_costs((0.333333,) * 3)) == pytest.approx(1.0, abs=1e-12)

"""What a pipeline's records say together: who holds what, and whether the first stage has had the run's tokens."""

from __future__ import annotations

import pytest

from swarmtrain.membership.balance import StagePeer
from swarmtrain.membership.lifecycle import PeerInfo
from swarmtrain.membership.stages import is_first_stage_done, places_of, stage_costs

TOTAL = 1000


def info(name: str, *stages: int, tokens: int = 0, moving_to: tuple[int, ...] = ()) -> PeerInfo:
    place = StagePeer(peer=name, stages=stages, moving_to=moving_to, tokens_per_s=1.0)
    return PeerInfo(peer=name, run_tokens=tokens, place=place)


BOOTSTRAP = PeerInfo(peer="bootstrap", is_bootstrap=True, run_tokens=TOTAL)
DONE, DONE_TOO = info("a", 0, tokens=TOTAL), info("b", 0, 1, tokens=TOTAL + 5)
BUSY, LATER = info("c", 0, tokens=TOTAL - 1), info("d", 1, tokens=TOTAL)


@pytest.mark.parametrize(
    ("here", "known", "done"),
    [
        ([DONE, DONE_TOO, LATER], [], True),
        ([DONE, BUSY], [], False),
        ([BUSY], [DONE], False),  # each driver still needs the others
        ([DONE], [BUSY], True),  # who has gone drives no more
        ([LATER], [DONE], True),
        ([], [DONE, BUSY], True),
        ([LATER], [BUSY], False),  # its work is to be taken up again
        ([LATER], [LATER, BOOTSTRAP], False),  # who holds another stage does not speak for the first
        ([BOOTSTRAP], [BOOTSTRAP], False),
        ([], [], False),
    ],
)
def test_the_first_stage_is_done_when_all_who_drive_say_so_or_one_who_has_gone_had(
    here: list[PeerInfo], known: list[PeerInfo], done: bool
) -> None:
    assert is_first_stage_done(here, known, TOTAL) is done
    assert is_first_stage_done(iter(here[::-1]), iter(known[::-1]), TOTAL) is done


def test_who_comes_to_drive_counts_and_who_leaves_for_another_stage_does_not() -> None:
    coming, leaving = info("e", 2, moving_to=(0,)), info("f", 0, moving_to=(1,))
    assert not is_first_stage_done([DONE, coming], [], TOTAL)
    assert is_first_stage_done([DONE, leaving], [], TOTAL)
    assert is_first_stage_done([leaving], [DONE], TOTAL)


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

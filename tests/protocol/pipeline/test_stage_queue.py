"""Queue of a stage by events and commands alone: what is done next, and who is answered."""

from __future__ import annotations

import pytest

from swarmtrain.protocol.pipeline.ledger import (
    Acknowledged,
    Forget,
    Key,
    Kind,
    LedgerLimits,
    Settlement,
    StageLedger,
    TakeStep,
    Work,
)
from swarmtrain.protocol.pipeline.stage_queue import (
    AnswerStageCalls,
    Closed,
    Compute,
    Computed,
    Free,
    Late,
    Opened,
    Refuse,
    Settles,
    Spoilt,
    StageCallReceived,
    StageQueue,
)

FINISHED = "this microbatch is finished, or was given up"


def make(**limits: int) -> StageQueue:
    return StageQueue(StageLedger(LedgerLimits(batch_tokens=4, **limits), incarnation=3))


def key(sequence: int, attempt: int = 0) -> Key:
    return Key("d", sequence, attempt)


def acknowledge(queue: StageQueue, *sequences: int, incarnation: int = 3) -> list[object]:
    said = tuple(Acknowledged(key(sequence), 1.0) for sequence in sequences)
    return list(queue.receive(Settles("d", Settlement(incarnation, said, (), 0)), 0.0))


def compute(queue: StageQueue, sequence: int, kind: Kind) -> None:
    assert isinstance(queue.receive(Free(), 0.0)[0], Compute)
    queue.receive(Computed(key(sequence), kind), 0.0)


def test_backwards_are_done_first_then_tails_then_forwards() -> None:
    queue = make()
    assert queue.receive(StageCallReceived(0, key(0), "forward", 2), 0.0) == []
    compute(queue, 0, "forward")
    asked: list[tuple[int, int, Kind]] = [(1, 1, "forward"), (2, 2, "tail"), (3, 0, "backward"), (4, 3, "forward")]
    for asker, sequence, kind in asked:
        assert queue.receive(StageCallReceived(asker, key(sequence), kind, 2), 0.0) == []
    assert queue.num_waiting == 4
    done = []
    for _ in asked:
        (what,) = queue.receive(Free(), 0.0)
        assert isinstance(what, Compute)
        done.append((what.asker, what.kind))
        assert queue.receive(Computed(what.key, what.kind), 0.0) == [
            AnswerStageCalls((what.asker,), what.key, what.kind)
        ]
    assert done == [(3, "backward"), (2, "tail"), (1, "forward"), (4, "forward")]
    assert queue.num_waiting == 0 and queue.receive(Free(), 0.0) == []


def test_what_is_asked_twice_is_computed_once_and_answered_to_all() -> None:
    queue = make()
    assert (
        queue.receive(StageCallReceived(0, key(0), "tail", 2), 0.0)
        == queue.receive(StageCallReceived(1, key(0), "tail", 2), 0.0)
        == []
    )
    assert queue.receive(Free(), 0.0) == [Compute(0, key(0), "tail", 2, Work(0, 0))]
    assert queue.receive(StageCallReceived(2, key(0), "tail", 2), 0.0) == [] == queue.receive(Free(), 0.0)
    assert queue.receive(Computed(key(0), "tail"), 0.0) == [AnswerStageCalls((0, 1, 2), key(0), "tail")]
    assert queue.receive(StageCallReceived(3, key(0), "tail", 2), 0.0) == [AnswerStageCalls((3,), key(0), "tail")]


def test_a_step_comes_before_what_is_asked_and_what_is_acknowledged_is_forgotten() -> None:
    queue = make()
    for sequence in (0, 1):
        queue.receive(StageCallReceived(sequence, key(sequence), "tail", 2), 0.0)
        compute(queue, sequence, "tail")
    queue.receive(StageCallReceived(2, key(2), "tail", 2), 0.0)
    assert acknowledge(queue, 0, 1) == [Late(set())]
    assert queue.receive(Free(), 0.0) == [Forget(key(0)), Forget(key(1)), TakeStep(0, 4, 1.0, (key(0), key(1)))]
    assert queue.receive(Free(), 0.0) == [Compute(2, key(2), "tail", 2, Work(1, 1))]
    assert acknowledge(queue, 0, incarnation=2) == [Late({key(0)})], "another life computed it"


def test_who_waits_for_what_is_given_up_waits_in_vain() -> None:
    queue = make()
    queue.receive(StageCallReceived(0, key(0), "forward", 2), 0.0)
    queue.receive(StageCallReceived(1, key(0, attempt=1), "forward", 2), 0.0)
    assert queue.receive(Free(), 0.0) == [Refuse((0,), "gone", FINISHED), Forget(key(0))]
    assert queue.receive(Free(), 0.0) == [Compute(1, key(0, attempt=1), "forward", 2, Work(0, 0))]


def test_a_part_that_is_begun_is_computed_next() -> None:
    """Who stops between two pieces of work would leave it begun for ever."""
    queue = make()
    queue.receive(StageCallReceived(0, key(0), "forward", 2), 0.0)
    queue.receive(StageCallReceived(1, key(0, attempt=1), "forward", 2), 0.0)
    assert not any(isinstance(what, Compute) for what in queue.receive(Free(), 0.0))


def test_a_question_that_spoils_is_refused() -> None:
    queue = make()
    queue.receive(StageCallReceived(0, key(0), "tail", 2), 0.0)
    queue.receive(Free(), 0.0)
    assert queue.receive(Spoilt(key(0), "tail", "norm inf"), 0.0) == [Refuse((0,), "wrong", "norm inf")]
    assert queue.receive(Free(), 0.0) == [Forget(key(0))]


def test_there_are_only_so_many_places_and_backwards_need_none() -> None:
    queue = make(max_open=2, max_open_of_driver=2)
    queue.receive(StageCallReceived(0, key(0), "forward", 2), 0.0)
    compute(queue, 0, "forward")
    queue.receive(StageCallReceived(1, key(1), "forward", 2), 0.0)
    busy = Refuse((), "busy", "2 microbatches are open here")
    assert queue.refusal(key(2), "forward") == busy
    assert queue.receive(StageCallReceived(2, key(2), "forward", 2), 0.0) == [Refuse((2,), "busy", busy.reason)]
    assert queue.refusal(key(0), "backward") is None
    assert queue.receive(StageCallReceived(3, key(0), "backward", 2), 0.0) == []
    assert queue.refusal(key(1), "backward") == Refuse((), "gone", "its forward is not known here")


def test_while_it_is_closed_nobody_is_answered_and_nobody_waits() -> None:
    queue = make()
    queue.receive(StageCallReceived(0, key(0), "forward", 2), 0.0)
    queue.receive(StageCallReceived(1, key(1), "tail", 2), 0.0)
    assert queue.receive(Closed(), 0.0) == [Refuse((0,), "gone", FINISHED), Refuse((1,), "gone", FINISHED)]
    assert not queue.is_open
    assert queue.receive(StageCallReceived(2, key(2), "tail", 2), 0.0) == [
        Refuse((2,), "gone", "this peer does not train now")
    ]
    assert queue.receive(Opened(), 0.0) == [] and queue.is_open
    (refused,) = queue.receive(StageCallReceived(3, key(0), "forward", 2), 0.0)
    assert isinstance(refused, Refuse) and refused.why == "gone", "it was asked once, and given up"


@pytest.mark.parametrize("kind", ["tail", "forward"])
def test_it_wakes_for_a_batch_that_waits_to_be_acknowledged(kind: Kind) -> None:
    queue = make()
    for sequence in (0, 1):
        queue.receive(StageCallReceived(sequence, key(sequence), kind, 2), 0.0)
        compute(queue, sequence, kind)
    assert queue.receive(Free(), 5.0) == []
    assert queue.wake_at() == (15.0 if kind == "tail" else None)


def test_what_waited_when_it_closed_is_not_computed_when_it_opens_again() -> None:
    """Who asked was told that it is gone, and what came with the question is not kept."""
    queue = make()
    queue.receive(StageCallReceived(0, key(0), "forward", 2), 0.0)
    queue.receive(StageCallReceived(1, key(1), "tail", 2), 0.0)
    compute(queue, 1, "tail")
    assert queue.num_waiting == 1
    queue.receive(Closed(), 0.0)
    assert queue.num_waiting == 0
    queue.receive(Opened(), 0.0)
    assert queue.receive(Free(), 0.0) == [Forget(key(0))]
    assert acknowledge(queue, 1) == [Late(set())], "a gradient that is there counts"

"""Driver of microbatches by events and commands alone: whom it asks, how long it waits, whom it tells what counts."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TypeVar

import pytest

from swarmtrain.protocol.pipeline.balance import StagePeer
from swarmtrain.protocol.pipeline.driver import (
    AskStage,
    Back,
    CancelStageCall,
    DrawMicrobatch,
    DriverEngine,
    DriverPace,
    DrivingCommand,
    Fault,
    GiveUp,
    Lost,
    MicrobatchDrawn,
    NoMicrobatch,
    NotTold,
    PeersSeen,
    Retried,
    Shut,
    StageCallDone,
    StageCallFailed,
    Tell,
    TimeCame,
    ToldOf,
    Wrong,
)
from swarmtrain.protocol.pipeline.ledger import Acknowledged, Key, Settlement
from swarmtrain.protocol.pipeline.router import Router

_C = TypeVar("_C", bound=DrivingCommand)
PEERS = {0: ["d"], 1: ["p"], 2: ["r"]}


def make(peers: dict[int, list[str]] = PEERS, pace: DriverPace | None = None) -> DriverEngine:
    """Make the driver "d", which holds the first of three stages."""
    engine = DriverEngine("d", [Router(random.Random(0)) for _ in range(2)], 7, pace)
    assert not of(engine.receive(PeersSeen(peers), 0.0), AskStage)
    return engine


def of(commands: Sequence[DrivingCommand], kind: type[_C]) -> list[_C]:
    return [command for command in commands if isinstance(command, kind)]


def only(commands: Sequence[DrivingCommand], kind: type[_C]) -> _C:
    """Return the only command of that kind."""
    (command,) = of(commands, kind)
    return command


def until(engine: DriverEngine, kind: str, stage: int, now: float = 1.0) -> AskStage:
    """Begin a microbatch, and answer everything until this is asked."""
    ask = only(engine.receive(MicrobatchDrawn(32), now), AskStage)
    while (ask.kind, ask.stage) != (kind, stage):
        ask = only(engine.receive(StageCallDone(ask.call, 5, 2.5), now), AskStage)
    return ask


def fail(engine: DriverEngine, ask: AskStage, why: Fault, now: float = 2.0) -> list[DrivingCommand]:
    return engine.receive(StageCallFailed(ask.call, why, "a reason", "bad-shape"), now)


def wake(engine: DriverEngine) -> list[DrivingCommand]:
    when_s = engine.wake_at()
    assert when_s is not None
    return engine.receive(TimeCame(), when_s)


# ---------------------------------------------------------------- there and back


def test_a_microbatch_goes_there_and_back_and_everyone_is_told() -> None:
    engine = make()
    ask = only(engine.receive(MicrobatchDrawn(32), 1.0), AskStage)
    asked = [(ask.kind, ask.stage, ask.peer)]
    lives = {"d": 1, "p": 2, "r": 3}
    while of(commands := engine.receive(StageCallDone(ask.call, lives[ask.peer], 2.5), 3.0), AskStage):
        ask = only(commands, AskStage)
        asked.append((ask.kind, ask.stage, ask.peer))
        assert ask.key == Key("d", 7, 0) and ask.tokens == 32
    assert asked == [
        ("forward", 0, "d"),
        ("forward", 1, "p"),
        ("tail", 2, "r"),
        ("backward", 1, "p"),
        ("backward", 0, "d"),
    ]
    assert only(commands, Back) == Back(7, 2.5)
    said = (Acknowledged(Key("d", 7, 0), 2.5),)
    told = [
        (tell.peer, tell.stage, tell.settlement.incarnation, tell.settlement.acknowledged)
        for tell in of(commands, Tell)
    ]
    assert told == [("d", 0, 1, said), ("p", 1, 2, said), ("r", 2, 3, said)]
    assert engine.quickest_s == 2.0 and engine.num_under_way == 0 and not engine.has_told_all
    for tell in of(commands, Tell):
        assert engine.receive(ToldOf(tell.call, ()), 4.0) == []
    assert engine.has_told_all


def test_an_answer_that_nobody_waits_for_changes_nothing() -> None:
    engine = make()
    ask = until(engine, "forward", 1)
    engine.receive(StageCallDone(ask.call, 1), 2.0)
    assert (
        engine.receive(StageCallDone(ask.call, 1), 3.0)
        == []
        == engine.receive(StageCallFailed(99, "wrong", "what"), 3.0)
    )


# ---------------------------------------------------------------- another peer


@pytest.mark.parametrize("why", ["unreachable", "gone", "wrong"])
def test_a_forward_that_fails_is_asked_of_another_by_a_new_attempt(why: Fault) -> None:
    engine = make({0: ["d"], 1: ["p", "q"], 2: ["r"]})
    first = until(engine, "forward", 1)
    commands = fail(engine, first, why)
    second = only(commands, AskStage)
    assert {first.peer, second.peer} == {"p", "q"} and second.key == Key("d", 7, 1)
    assert of(commands, Retried) == [Retried(7, 1, first.peer, "a reason")]
    assert of(commands, Wrong) == ([Wrong(first.peer, "a reason", "bad-shape")] if why == "wrong" else [])
    tell = only(commands, Tell)
    assert (tell.peer, tell.settlement.dropped) == (first.peer, (first.key,))


def test_who_is_busy_is_asked_again_a_little_later() -> None:
    engine = make()
    ask = until(engine, "forward", 1)
    assert fail(engine, ask, "busy") == []
    again = only(wake(engine), AskStage)
    assert (again.peer, again.key.attempt) == ("p", 1)


def test_when_all_of_a_stage_have_failed_it_begins_again_a_stage_earlier() -> None:
    engine = make({0: ["d"], 1: ["p", "q"], 2: ["r"]})
    ask = until(engine, "tail", 2)
    assert of(fail(engine, ask, "unreachable"), AskStage) == []
    assert engine.wake_at() == 4.0
    commands = wake(engine)
    assert (only(commands, AskStage).kind, only(commands, AskStage).stage) == ("forward", 1)
    assert [tell.stage for tell in of(commands, Tell)] == [1], "the forward there does not count"


def test_who_does_not_answer_in_time_is_hung_up_on() -> None:
    engine = make({0: ["d"], 1: ["p", "q"], 2: ["r"]})
    first = until(engine, "forward", 1)
    while not of(commands := wake(engine), Retried):
        for tell in of(commands, Tell):
            engine.receive(ToldOf(tell.call, ()), 1.0)
    assert engine.routers[0].most_limit_s == 300.0 and only(commands, CancelStageCall) == CancelStageCall(first.call)
    assert only(commands, Retried).reason == "no answer within 300.0 s"
    assert only(commands, AskStage).peer != first.peer


def test_who_is_lost_has_the_least_time_only() -> None:
    engine = make()
    ask = until(engine, "forward", 1)
    engine.receive(PeersSeen({0: ["d"], 1: ["q"], 2: ["r"]}), 3.0)
    assert engine.wake_at() == 1.0 + engine.routers[0].least_limit_s
    commands = wake(engine)
    assert only(commands, CancelStageCall) == CancelStageCall(ask.call) and only(commands, AskStage).peer == "q"


def test_an_empty_stage_is_looked_at_until_somebody_is_there() -> None:
    engine = make({0: ["d"], 1: ["p"], 2: []})
    ask = until(engine, "forward", 1)
    assert engine.receive(StageCallDone(ask.call, 1), 2.0) == []
    assert engine.wake_at() == 2.5 and wake(engine) == []
    engine.receive(PeersSeen(PEERS), 2.6)
    assert only(wake(engine), AskStage).peer == "r"


# ---------------------------------------------------------------- backwards


def test_a_backward_is_asked_of_the_same_peer_three_times_and_then_begins_again_there() -> None:
    engine = make({0: ["d"], 1: ["p", "q"], 2: ["r"]})
    ask = until(engine, "backward", 1)
    for _ in range(2):
        commands = fail(engine, ask, "unreachable")
        assert of(commands, AskStage) == []
        again = only(wake(engine), AskStage)
        assert (again.kind, again.peer, again.key) == (ask.kind, ask.peer, ask.key)
        ask = again
    commands = fail(engine, ask, "unreachable", 4.0)
    assert (only(commands, AskStage).kind, only(commands, AskStage).stage) == ("forward", 1)
    assert {tell.stage for tell in of(commands, Tell)} == {1, 2}, "what came after it does not count either"


@pytest.mark.parametrize("why", ["gone", "wrong"])
def test_a_backward_of_a_forward_that_is_gone_begins_again_at_once(why: Fault) -> None:
    engine = make()
    commands = fail(engine, until(engine, "backward", 1), why)
    assert (only(commands, AskStage).kind, only(commands, AskStage).key.attempt) == ("forward", 1)


def test_a_backward_that_must_wait_is_asked_again_without_an_end() -> None:
    engine = make()
    ask = until(engine, "backward", 1)
    for _ in range(10):
        assert fail(engine, ask, "busy") == []
        ask = only(wake(engine), AskStage)
    assert ask.kind == "backward"


# ---------------------------------------------------------------- this peer's own stage


def test_what_the_first_stage_gives_up_is_over_and_its_place_rests() -> None:
    engine = make(pace=DriverPace(1, 32, 8))
    ask = only(engine.receive(MicrobatchDrawn(32), 0.0), AskStage)
    commands = fail(engine, ask, "gone", 1.0)
    assert only(commands, Back) == Back(7, 0.0, "a reason") and of(commands, DrawMicrobatch) == []
    assert only(commands, Tell).settlement.dropped == (ask.key,)
    assert engine.num_under_way == 1 and engine.wake_at() == 1.5
    assert of(wake(engine), DrawMicrobatch) == [DrawMicrobatch()]


def test_what_is_given_up_here_counts_nowhere() -> None:
    engine = make()
    ask = until(engine, "tail", 2)
    commands = engine.receive(GiveUp(7), 2.0)
    assert only(commands, CancelStageCall) == CancelStageCall(ask.call)
    assert [(tell.stage, len(tell.settlement.dropped)) for tell in of(commands, Tell)] == [(0, 1), (1, 1), (2, 1)]
    assert engine.num_under_way == 0 and engine.receive(GiveUp(7), 3.0) == []


# ---------------------------------------------------------------- how many


def test_as_many_begin_as_may_be_under_way_and_none_while_a_stage_is_empty() -> None:
    engine = make(pace=DriverPace(3, 32, 8))
    assert engine.num_under_way == 3, "they are being drawn"
    for _ in range(3):
        assert of(engine.receive(MicrobatchDrawn(32), 0.0), DrawMicrobatch) == []
    engine.receive(PeersSeen({0: ["d"], 1: [], 2: ["r"]}), 1.0)
    assert of(engine.receive(GiveUp(7), 1.0), DrawMicrobatch) == [] and engine.most == 0
    assert of(engine.receive(PeersSeen(PEERS), 2.0), DrawMicrobatch) == [DrawMicrobatch()]
    assert of(engine.receive(Shut(), 2.0), DrawMicrobatch) == []
    assert of(engine.receive(GiveUp(8), 2.0), DrawMicrobatch) == [], "none begins any more"


def test_where_nothing_was_drawn_it_tries_when_it_has_looked_again() -> None:
    engine = make(pace=DriverPace(1, 32, 8))
    assert engine.receive(NoMicrobatch(), 0.0) == []
    assert engine.receive(PeersSeen(PEERS), 0.5) == [DrawMicrobatch()]


def test_how_many_follows_from_what_everybody_says() -> None:
    engine = make()
    engine.pace = DriverPace(0, 32, 32)
    places = [StagePeer(peer=of[0], stages=(stage,), tokens_per_s=100.0) for stage, of in PEERS.items()]
    assert len(engine.receive(PeersSeen(PEERS, places), 0.0)) == engine.most == 8


# ---------------------------------------------------------------- what counts


def back(engine: DriverEngine, now: float = 1.0) -> list[Tell]:
    """Bring a microbatch back; returns the messages about it to the later stages."""
    ask = until(engine, "backward", 0, now)
    commands = engine.receive(StageCallDone(ask.call, 5), now)
    for tell in of(commands, Tell):
        if not tell.stage:
            engine.receive(ToldOf(tell.call, ()), now)
    return [tell for tell in of(commands, Tell) if tell.stage]


def test_whoever_is_not_told_is_told_again_later_and_later() -> None:
    engine = make()
    tell, other = back(engine)
    engine.receive(ToldOf(other.call, ()), 1.0)
    waits, now = [], 1.0
    for _ in range(5):
        assert engine.receive(NotTold(tell.call, "lost"), now) == []
        waits.append(round((engine.wake_at() or 0.0) - now, 3))
        now = engine.wake_at() or 0.0
        tell = only(wake(engine), Tell)
    assert waits == [0.5, 1.0, 2.0, 4.0, 5.0]
    assert tell.settlement == Settlement(5, (Acknowledged(Key("d", 7, 0), 2.5),), (), 7), "it still needs it"


def test_who_cannot_be_told_for_a_minute_is_given_up_and_it_is_said() -> None:
    engine = make()
    _, other = back(engine)
    engine.receive(ToldOf(other.call, ()), 1.0)
    lost: list[Lost] = []
    while not lost:
        lost = of(wake(engine), Lost)
    assert lost == [Lost(1, "p", Key("d", 7, 0), "it does not answer (no answer within 5 s)")]
    assert engine.has_told_all


def test_what_is_acknowledged_too_late_is_said() -> None:
    engine = make()
    tell, _ = back(engine)
    late = only(engine.receive(ToldOf(tell.call, {Key("d", 7, 0)}), 1.0), Lost)
    assert late == Lost(1, "p", Key("d", 7, 0), "it was told too late, or began anew")


def test_what_comes_while_somebody_is_told_is_told_after_it() -> None:
    engine = make()
    tell, _ = back(engine)
    assert all(later.peer != "p" for later in back(engine, 2.0)), "it is being told"
    (after,) = engine.receive(ToldOf(tell.call, ()), 2.0)
    assert isinstance(after, Tell) and after.settlement.acknowledged == (Acknowledged(Key("d", 8, 0), 2.5),)


def test_who_has_a_part_of_what_takes_long_hears_that_the_driver_is_there() -> None:
    """It forgets what a silent one has asked."""
    engine = make()
    until(engine, "tail", 2)
    commands = wake(engine)
    assert engine.wake_at() == 36.0 and [(tell.peer, tell.stage) for tell in of(commands, Tell)] == [("p", 1), ("r", 2)]
    assert only(commands[:1], Tell).settlement == Settlement(0, (), (), 7)
    for tell in of(commands, Tell):
        assert engine.receive(ToldOf(tell.call, ()), 32.0) == []
    assert engine.has_told_all


def test_who_is_given_up_in_the_moment_in_which_it_would_hear_of_the_driver_does_no_harm() -> None:
    """The driver's process stood still meanwhile, and everything is due at once."""
    engine = make()
    until(engine, "tail", 2)
    while engine.wake_at() != 61.0:
        wake(engine)
    assert not engine.has_told_all
    engine.receive(TimeCame(), 100.0)
    assert engine.has_told_all
    assert of(wake(engine), Tell), "it goes on"

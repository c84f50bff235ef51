"""Volunteer that decides to move: when it looks, whom it asks to stay, and that no two leave together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Literal

import pytest

from swarmtrain.errors import UnreachableError
from swarmtrain.peer.pipeline.mover import StageMover
from swarmtrain.protocol.pipeline import moves
from swarmtrain.protocol.pipeline.balance import Rule, StageChange, StagePeer
from swarmtrain.protocol.pipeline.moves import (
    AskToStay,
    FetchFailed,
    FetchStages,
    LeaveStages,
    MoveCommand,
    Moved,
    MoveEvent,
    MovePolicy,
    Moves,
    PlacesSeen,
    StagesFetched,
    StagesLeft,
    StayAnswered,
    StaysHere,
)

TWO = Rule(costs=(0.5, 0.5))
EVERY_S = 10.0


def place(name: str, *stages: int, **more: object) -> StagePeer:
    return StagePeer(peer=name, stages=stages, tokens_per_s=100.0, **more)  # type: ignore[arg-type]


PILED = [place("a", 0), place("b", 0), place("c", 0), place("d", 1)]
"""`a` is the one to move; `b` is whom it asks to stay."""


@dataclass
class Asked:
    """Whoever is asked to stay answers this."""

    answer: tuple[float, str] = (60.0, "it stays for 60 s")
    questions: list[tuple[str, int]] = field(default_factory=list)

    def __call__(self, peer: str, stage: int) -> tuple[float, str]:
        self.questions.append((peer, stage))
        return self.answer


@dataclass
class Clock:
    now: float = 100.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Site:
    """Mover, its clock, the peers that it asks, and what it does."""

    asked: Callable[[str, int], tuple[float, str]] = field(default_factory=Asked)
    clock: Clock = field(default_factory=Clock)
    balance: Literal["none", "queues", "rates"] = "rates"
    me: str = "a"
    most_stages: int = 2
    rule: Rule = TWO
    fetch_s: float = 1.0
    fetch_fails: bool = False
    done: list[MoveCommand] = field(default_factory=list)
    sees: list[StagePeer] = field(default_factory=lambda: list(PILED))

    def __post_init__(self) -> None:
        policy = MovePolicy(rule=self.rule, balance=self.balance, every_s=EVERY_S, most_stages=self.most_stages)
        self.mover = StageMover(self.me, policy, self.clock)

    def do(self, command: MoveCommand) -> MoveEvent | None:
        self.done.append(command)
        match command:
            case AskToStay():
                return StayAnswered(command.number, *self.asked(command.peer, command.stage))
            case FetchStages():
                self.clock.now += self.fetch_s
                return FetchFailed("nobody delivers") if self.fetch_fails else StagesFetched(self.sees, 0.0)
            case LeaveStages():
                return StagesLeft()
        return None

    def look(self, peers: Sequence[StagePeer] = PILED) -> list[MoveCommand]:
        """Look at a time when a move is due; returns what it does."""
        self.clock.now += 1.2 * EVERY_S
        assert self.mover.is_due or self.balance == "none"
        self.sees, self.done = list(peers), []
        self.mover.look(PlacesSeen(self.sees, 0.0), self.do)
        return self.done

    @property
    def questions(self) -> list[tuple[str, int]]:
        assert isinstance(self.asked, Asked)
        return self.asked.questions

    def is_asked(self, mover: str, stage: int, holds: tuple[int, ...] = (0,)) -> tuple[float, str]:
        return self.mover.asked(mover, stage, holds, True)


def kinds(done: Sequence[MoveCommand]) -> list[str]:
    return [type(command).__name__ for command in done]


def stayed(done: Sequence[MoveCommand]) -> str:
    """Why it did not move."""
    assert isinstance(done[-1], StaysHere)
    return done[-1].reason


@contextmanager
def decided(change: StageChange) -> Iterator[None]:
    """Make this change the decision of its peer, whatever the state."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moves, "my_change", lambda me, *others: (change if me == change.peer else None, "by hand"))
        yield


TO_ONE = StageChange(peer="a", before=(0,), after=(1,), reason="by hand")
MOVES = ["AskToStay", "Moves", "FetchStages", "LeaveStages", "Moved"]


# ---------------------------------------------------------------- when, and whom it asks


def test_who_is_to_move_asks_its_anchor_and_takes_the_new_stage_before_it_leaves_the_old_one() -> None:
    site = Site()
    done = site.look()
    assert kinds(done) == MOVES and site.questions == [("b", 0)]
    (_, begins, fetches, leaves, moved) = done
    assert isinstance(moved, Moved) and begins == Moves(moved.change)
    assert (moved.change.before, moved.change.after) == ((0,), (1,))
    assert (fetches, leaves) == (FetchStages((1,)), LeaveStages((0,)))
    assert site.mover.engine.change is None
    assert not site.mover.engine.stays.may_leave(0, site.clock.now)[0], "what was promised was for that once"


def test_without_memory_for_both_it_leaves_first() -> None:
    site = Site(most_stages=1)
    assert kinds(site.look()) == ["AskToStay", "Moves", "LeaveStages", "FetchStages", "Moved"]


@pytest.mark.parametrize("me", ["b", "c", "d"])
def test_who_is_not_to_move_asks_nobody(me: str) -> None:
    site = Site(me=me)
    assert site.look() == [] and not site.questions
    assert site.is_asked("a", 0)[0] == 60.0


def test_nobody_moves_where_the_run_balances_nothing() -> None:
    site = Site(balance="none")
    assert all(site.look() == [] for _ in range(10)) and site.mover.engine.wake_at() is None and not site.mover.is_due


def test_queues_decide_where_the_run_says_so_and_promises_hold_there_too() -> None:
    peers = [place("a", 0, queue=0), place("b", 0, queue=3), place("d", 1, queue=9)]
    site = Site(balance="queues")
    done = site.look(peers)
    assert isinstance(done[-1], Moved) and done[-1].change.reason.startswith("stage 0 has the shortest queues")
    assert site.questions == [("b", 0)]
    assert Site(balance="queues", me="b").look(peers) == []


def test_it_looks_once_in_a_while_a_little_more_or_less() -> None:
    waits = []
    for _ in range(50):
        site = Site(me="d")
        waits.append((site.mover.engine.wake_at() or 0.0) - site.clock.now)
        assert 0.8 * EVERY_S <= waits[-1] <= 1.2 * EVERY_S
    assert max(waits) - min(waits) > 0.1 * EVERY_S, "not everybody at one moment"
    site = Site()
    site.clock.now += 0.79 * EVERY_S
    assert not site.mover.is_due
    site.mover.look(PlacesSeen(PILED, 0.0), site.do)
    assert not site.done
    assert site.look()
    site.done = []
    site.mover.look(PlacesSeen(PILED, 0.0), site.do)
    assert site.done == [], "it has just looked"


def test_while_it_moves_it_does_not_look() -> None:
    site = Site()
    site.clock.now += 1.2 * EVERY_S
    (ask,) = site.mover.engine.receive(PlacesSeen(PILED, 0.0), site.clock.now)
    assert isinstance(ask, AskToStay) and site.mover.engine.wake_at() is None
    assert site.mover.engine.receive(PlacesSeen(PILED, 0.0), site.clock.now + 100.0) == []
    assert site.mover.engine.receive(StayAnswered(ask.number + 1, 60.0, "to another question"), site.clock.now) == []
    (stays,) = site.mover.engine.receive(StayAnswered(ask.number, 0.0, "no"), site.clock.now)
    assert isinstance(stays, StaysHere) and not stays.had_begun
    assert site.mover.engine.receive(StayAnswered(ask.number, 60.0, "late"), site.clock.now) == []


def test_without_a_promise_it_stays_and_promises_others_again() -> None:
    asked = Asked((0.0, "b wants to leave stage 0 itself"))
    site = Site(asked)
    assert stayed(site.look()) == "does not leave stage 0: b wants to leave stage 0 itself"
    assert site.questions == [("b", 0)] and kinds(site.done) == ["AskToStay", "StaysHere"]
    assert site.is_asked("b", 0)[0] == 60.0
    assert stayed(site.look()).startswith("does not leave stage 0: it has promised to stay in stage 0 for 48 s more")
    assert len(site.questions) == 1, "it has promised now, and asks nobody"
    site.clock.now += 60.0
    asked.answer = (60.0, "it stays")
    assert kinds(site.look()) == MOVES


def test_who_cannot_be_asked_does_not_stay() -> None:
    site = Site()

    def unreachable(peer: str, stage: int) -> tuple[float, str]:
        raise UnreachableError("nobody")

    site.asked = unreachable
    assert stayed(site.look()) == "does not leave stage 0: b could not be asked to stay: nobody"


def test_it_promises_for_what_it_holds_and_to_others_whom_it_knows_only() -> None:
    site = Site()
    assert site.is_asked("b", 1) == (0.0, "a does not serve stage 1")
    assert site.is_asked("a", 0)[0] == 0.0
    assert site.is_asked("b", 0, ())[0] == 0.0
    assert site.mover.asked("b", 0, (0,), False) == (0.0, "nobody here knows that you hold stage 0")
    assert site.mover.bound == ()


@pytest.mark.parametrize(("fetch_s", "again"), [(54.9, 0), (55.0, 1)])
def test_a_promise_counts_from_the_question_and_is_asked_for_again_after_it(fetch_s: float, again: int) -> None:
    site, questions = Site(fetch_s=fetch_s), []

    def answers_late(peer: str, stage: int) -> tuple[float, str]:
        questions.append((peer, stage))
        site.clock.now += 5.0
        return 60.0, "it stays"

    site.asked = answers_late
    assert isinstance(site.look()[-1], Moved)
    assert questions == [("b", 0)] * (1 + again)


def test_what_was_fetched_is_given_back_where_nobody_promises_a_second_time() -> None:
    site, answers = Site(fetch_s=61.0), [(60.0, "it stays"), (0.0, "it moves itself")]
    site.asked = lambda peer, stage: answers.pop(0)
    done = site.look()
    assert kinds(done) == ["AskToStay", "Moves", "FetchStages", "AskToStay", "LeaveStages", "StaysHere"]
    assert done[-2] == LeaveStages((1,)) and isinstance(done[-1], StaysHere) and done[-1].had_begun
    assert site.is_asked("b", 0)[0] == 60.0


def test_of_several_stages_each_needs_somebody_who_stays() -> None:
    three, change = Rule(costs=(1 / 3,) * 3), StageChange(peer="a", before=(0, 1), after=(2,), reason="by hand")
    both = [place("a", 0, 1), place("b", 0), place("c", 1)]
    with decided(change):
        site = Site(rule=three, most_stages=3)
        assert isinstance(site.look(both)[-1], Moved) and site.questions == [("b", 0), ("c", 1)]
        site = Site(rule=three, most_stages=3)
        assert stayed(site.look(both[:2])) == "does not leave stage 1: nobody else holds it"
        assert site.is_asked("b", 0, (0, 1))[0] == 60.0, "it does not leave the other one either"


def has_moved(site: Site, before: tuple[int, ...], after: tuple[int, ...]) -> None:
    with decided(StageChange(peer="a", before=before, after=after, reason="by hand")):
        assert isinstance(site.look([place("a", *before), place("b", *before)])[-1], Moved)
    assert isinstance(site.asked, Asked)
    site.asked.questions.clear()


def test_who_has_just_moved_moves_again_only_where_nobody_is() -> None:
    site = Site()
    has_moved(site, (1,), (0,))
    for _ in range(4):
        assert site.look() == [], "how fast it is here is not known yet"
    assert not site.questions
    assert isinstance(site.look()[-1], Moved), "a minute later"
    site = Site()
    has_moved(site, (1,), (0,))
    done = site.look(PILED[:3])
    assert isinstance(done[-1], Moved) and "is empty" in done[-1].change.reason


def test_who_has_just_moved_gives_up_a_stage_that_others_hold_too() -> None:
    site = Site()
    has_moved(site, (0,), (0, 1))
    done = site.look([place("a", 0, 1), replace(place("b", 0), tokens_per_s=300.0)])
    assert isinstance(done[-1], Moved) and (done[-1].change.leaves, done[-1].change.enters) == ((0,), ())
    assert kinds(done) == ["AskToStay", "Moves", "LeaveStages", "Moved"], "nothing is fetched for that"


def test_a_failed_move_does_not_hold_it_back() -> None:
    site = Site(fetch_fails=True)
    done = site.look()
    assert kinds(done) == ["AskToStay", "Moves", "FetchStages", "StaysHere"] and stayed(done) == "nobody delivers"
    site.fetch_fails = False
    assert isinstance(site.look()[-1], Moved)


def test_to_take_one_more_nobody_is_asked() -> None:
    site = Site(Asked((0.0, "nobody is there")))
    with decided(StageChange(peer="a", before=(0,), after=(0, 1), reason="by hand")):
        assert kinds(site.look([place("a", 0)])) == ["Moves", "FetchStages", "Moved"]


def test_who_is_moving_already_is_not_asked_to_stay() -> None:
    site = Site()
    with decided(TO_ONE):
        stayed(site.look([place("a", 0), place("b", 0, moving_to=(1,)), place("d", 1)]))
    assert not site.questions

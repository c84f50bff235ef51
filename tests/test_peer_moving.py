"""A volunteer that decides to move: when it looks, whom it asks to stay, and that no two leave each other."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace

import pytest

from swarmtrain.errors import PeerError, UnreachableError
from swarmtrain.peer.moving import Mover
from swarmtrain.protocol.balance import Change, Rule, StagePeer

TWO = Rule(costs=(0.5, 0.5))
EVERY_S = 10.0


def place(name: str, *stages: int, **more: object) -> StagePeer:
    return StagePeer(peer=name, stages=stages, tokens_per_s=100.0, **more)  # type: ignore[arg-type]


PILED = [place("a", 0), place("b", 0), place("c", 0), place("d", 1)]
"""`a` is the one to move; `b` is whom it asks to stay."""


@dataclass
class Asked:
    """Whoever is asked to stay answers this."""

    answer: tuple[float, str] | PeerError = (60.0, "it stays for 60 s")
    questions: list[tuple[str, int]] = field(default_factory=list)

    def __call__(self, peer: str, stage: int) -> tuple[float, str]:
        self.questions.append((peer, stage))
        if isinstance(self.answer, PeerError):
            raise self.answer
        return self.answer


@dataclass
class Clock:
    now: float = 100.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Site:
    """One mover, its clock, and those whom it asks."""

    asked: Asked = field(default_factory=Asked)
    clock: Clock = field(default_factory=Clock)
    balance: str = "rates"
    me: str = "a"

    def __post_init__(self) -> None:
        self.mover = Mover(self.me, TWO, self.balance, EVERY_S, self.asked, self.clock)

    def look(self, peers: list[StagePeer] = PILED) -> Change | None:
        """When it is time for sure."""
        self.clock.now += 1.2 * EVERY_S
        return self.mover.look(peers, 0.0)


def test_who_is_to_move_asks_its_anchor_and_moves() -> None:
    site = Site()
    change = site.look()
    assert change is not None and (change.before, change.after) == ((0,), (1,))
    assert site.asked.questions == [("b", 0)]
    assert site.mover.may_leave(change)
    site.mover.over(change)
    assert not site.mover.may_leave(change), "what was promised was for that once"


@pytest.mark.parametrize("me", ["b", "c", "d"])
def test_who_is_not_to_move_asks_nobody(me: str) -> None:
    site = Site(me=me)
    assert site.look() is None and not site.asked.questions
    assert site.mover.asked("a", 0, (0,))[0] == 60.0


def test_nobody_moves_where_the_run_balances_nothing() -> None:
    site = Site(balance="none")
    assert all(site.look() is None for _ in range(10)) and not site.asked.questions


def test_queues_decide_where_the_run_says_so() -> None:
    peers = [place("a", 0, queue=0), place("b", 0, queue=3), place("d", 1, queue=9)]
    change = Site(balance="queues").look(peers)
    assert change is not None and change.after == (1,) and change.reason.startswith("stage 0 has the shortest queues")
    assert Site(balance="queues", me="b").look(peers) is None


def test_it_looks_once_in_a_while_a_little_more_or_less() -> None:
    waits = []
    for _ in range(50):
        site = Site(me="d")
        waits.append(site.mover._next_s - site.clock.now)
        assert 0.8 * EVERY_S <= waits[-1] <= 1.2 * EVERY_S
    assert max(waits) - min(waits) > 0.1 * EVERY_S, "not everybody at one moment"
    site = Site()
    site.clock.now += 0.79 * EVERY_S
    assert site.mover.look(PILED, 0.0) is None and not site.asked.questions
    assert site.look() is not None
    assert site.mover.look(PILED, 0.0) is None, "it has just looked"
    assert len(site.asked.questions) == 1


@pytest.mark.parametrize(
    "answer", [(0.0, "b wants to leave stage 0 itself"), UnreachableError("nobody")], ids=["refused", "unreachable"]
)
def test_without_a_promise_it_stays_and_promises_others_again(
    answer: tuple[float, str] | PeerError, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    site = Site(Asked(answer))
    assert site.look() is None
    assert site.asked.questions == [("b", 0)]
    reason = "b wants to leave" if isinstance(answer, tuple) else "b could not be asked to stay: nobody"
    assert f"does not leave stage 0: {reason}" in caplog.text
    assert site.mover.asked("b", 0, (0,))[0] == 60.0
    assert site.look() is None and len(site.asked.questions) == 1, "it has promised now, and asks nobody"
    site.clock.now += 60.0
    site.asked.answer = (60.0, "it stays")
    assert site.look() is not None


def test_while_it_wants_to_leave_it_promises_nothing_for_that_stage() -> None:
    site = Site()
    change = site.look()
    assert change is not None
    assert site.mover.asked("b", 0, (0, 1)) == (0.0, "a wants to leave stage 0 itself")
    assert site.mover.asked("b", 1, (0, 1))[0] == 60.0
    site.mover.over(change)
    assert site.mover.asked("b", 0, (0, 1))[0] == 60.0


def test_it_promises_for_what_it_holds_and_to_others_only() -> None:
    mover = Site().mover
    assert mover.asked("b", 1, (0,)) == (0.0, "a does not serve stage 1")
    assert mover.asked("a", 0, (0,))[0] == 0.0
    assert mover.asked("b", 0, ())[0] == 0.0
    assert mover.bound == ()


def test_what_it_has_promised_binds_it_until_that_ends() -> None:
    site = Site()
    assert site.mover.asked("b", 0, (0,)) == (60.0, "it stays for 60 s")
    assert site.mover.bound == (0,)
    change = Change(peer="a", before=(0,), after=(1,), reason="by hand")
    assert not site.mover.promised(change, PILED, 0.0) and not site.asked.questions
    site.clock.now += 59.9
    assert not site.mover.promised(change, PILED, 0.0) and site.mover.bound == (0,)
    site.clock.now += 0.2
    assert site.mover.bound == ()
    assert site.mover.promised(change, PILED, 0.0) and site.asked.questions == [("b", 0)]


def test_a_promise_counts_from_the_question_and_ends() -> None:
    site = Site()

    def answers_late(peer: str, stage: int) -> tuple[float, str]:
        site.clock.now += 5.0
        return 60.0, "it stays"

    site.mover.ask_to_stay = answers_late
    change = site.look()
    assert change is not None
    site.clock.now += 54.9
    assert site.mover.may_leave(change)
    site.clock.now += 0.1
    assert not site.mover.may_leave(change)
    assert site.mover.promised(change, PILED, 0.0), "it asks again"
    assert site.mover.may_leave(change)


def test_a_promise_that_holds_is_not_asked_for_again() -> None:
    site = Site()
    change = site.look()
    assert change is not None and site.mover.promised(change, PILED, 0.0)
    assert site.asked.questions == [("b", 0)]


def test_of_several_stages_each_needs_somebody_who_stays() -> None:
    three = Rule(costs=(1 / 3,) * 3)
    change = Change(peer="a", before=(0, 1), after=(2,), reason="by hand")
    site = Site()
    site.mover.rule = three
    both = [place("a", 0, 1), place("b", 0), place("c", 1)]
    assert site.mover.promised(change, both, 0.0)
    assert site.asked.questions == [("b", 0), ("c", 1)] and site.mover.may_leave(change)
    site.mover.over(change)
    assert not site.mover.promised(change, both[:2], 0.0), "nobody else holds stage 1"
    assert not site.mover.may_leave(change)
    assert site.mover.asked("b", 0, (0, 1))[0] == 60.0, "it does not leave the other one either"


def test_who_has_just_moved_moves_again_only_where_nobody_is() -> None:
    site = Site()
    site.mover.moved(Change(peer="a", before=(1,), after=(0,), reason="by hand"))
    for _ in range(4):
        assert site.look() is None, "how fast it is here is not known yet"
    assert not site.asked.questions
    assert site.look() is not None, "a minute later"
    site = Site()
    site.mover.moved(Change(peer="a", before=(1,), after=(0,), reason="by hand"))
    change = site.look(PILED[:3])
    assert change is not None and "is empty" in change.reason


def test_who_has_just_moved_gives_up_a_stage_that_others_hold_too() -> None:
    site = Site()
    site.mover.moved(Change(peer="a", before=(0,), after=(0, 1), reason="by hand"))
    change = site.look([place("a", 0, 1), replace(place("b", 0), tokens_per_s=300.0)])
    assert change is not None and (change.leaves, change.enters) == ((0,), ())


def test_a_failed_move_does_not_hold_it_back() -> None:
    site = Site()
    change = site.look()
    assert change is not None
    site.mover.over(change)
    assert site.look() == change


def test_to_take_one_more_nobody_is_asked() -> None:
    change = Change(peer="a", before=(0,), after=(0, 1), reason="by hand")
    site = Site(Asked(UnreachableError("nobody")))
    assert site.mover.promised(change, [place("a", 0)], 0.0) and site.mover.may_leave(change)


def test_who_is_moving_already_is_not_asked_to_stay() -> None:
    site = Site()
    change = Change(peer="a", before=(0,), after=(1,), reason="by hand")
    leaving = [place("a", 0), place("b", 0, moving_to=(1,)), place("d", 1)]
    assert not site.mover.promised(change, leaving, 0.0) and not site.asked.questions


# ---------------------------------------------------------------- two that would leave each other


@dataclass
class Pair:
    """Two that hold stage 0 and want to leave it, each the other's anchor; questions and answers take time and are
    lost. What happens next is chosen at random, and so are the clocks."""

    rng: random.Random

    def __post_init__(self) -> None:
        self.now = 0.0
        self.clocks = {name: self.rng.uniform(-1e4, 1e4) for name in "ab"}
        self.holds = {"a": True, "b": True}
        self.left_s: dict[str, float] = {}
        self.movers = {
            name: Mover(name, TWO, "rates", EVERY_S, self.ask, lambda name=name: self.now + self.clocks[name])  # type: ignore[misc]
            for name in "ab"
        }
        self.change = {name: Change(peer=name, before=(0,), after=(1,), reason="it wants to") for name in "ab"}
        self.depth = 0
        self.asking: set[str] = set()

    def ask(self, peer: str, stage: int) -> tuple[float, str]:
        """While one waits for its answer, anything else may happen."""
        mover = "b" if peer == "a" else "a"
        self.something()
        if self.rng.random() < 0.1:
            raise UnreachableError("lost")
        answer = self.movers[peer].asked(mover, stage, (0,) if self.holds[peer] else (1,))
        self.something()
        if self.rng.random() < 0.1:
            raise UnreachableError("the answer was lost")
        return answer

    def something(self) -> None:
        self.now += self.rng.choice([0.0, 0.1, 3.0, 30.0, 61.0])
        name = self.rng.choice("ab")
        if self.depth > 4 or name in self.asking or not self.holds[name]:
            return
        self.depth += 1
        mover, change = self.movers[name], self.change[name]
        match self.rng.randrange(4):
            case 0 | 1:
                self.asking.add(name)
                mover.promised(change, [place("a", 0), place("b", 0), place("c", 1)], 0.0)  # as their records say
                self.asking.discard(name)
            case 2:
                if mover.may_leave(change):
                    self.holds[name] = False
                    mover.over(change)
            case 3:
                mover.over(change)
        self.depth -= 1
        assert any(self.holds.values()), "both have left"


def test_two_that_are_each_others_anchor_never_both_leave() -> None:
    num_left = 0
    for seed in range(150):
        pair = Pair(random.Random(seed))
        for _ in range(40):
            pair.something()
        num_left += not all(pair.holds.values())
    assert num_left > 20, "one of them should have left often enough to show anything"


def test_both_that_ask_at_one_moment_stay_and_one_may_leave_later() -> None:
    clock = Clock()
    movers: dict[str, Mover] = {}

    def ask(peer: str, stage: int) -> tuple[float, str]:
        mover = "b" if peer == "a" else "a"
        if mover == "a":  # meanwhile the other one asks too
            assert not movers["b"].promised(replace(change, peer="b"), PILED[:2], 0.0)
        return movers[peer].asked(mover, stage, (0,))

    change = Change(peer="a", before=(0,), after=(1,), reason="it wants to")
    movers |= {name: Mover(name, TWO, "rates", EVERY_S, ask, clock) for name in "ab"}
    assert movers["a"].promised(change, PILED[:2], 0.0), "the other one has given up by the time it is asked"
    assert movers["b"].bound == (0,) and not movers["b"].may_leave(replace(change, peer="b"))
    assert movers["a"].may_leave(change)

"""Mishaps at their times, and their ends, on a swarm that writes down what is done to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from swarmtrain.network.links.impairments import Narrowing, Outage
from swarmtrain.peer.local.faults import FaultInjection
from swarmtrain.rehearsal import FaultEvent


@dataclass
class Noted:
    """Record of all that was done."""

    now_s: float = 100.0
    done: list[tuple[float, str]] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    restarts_ended_s: float | None = None

    def _note(self, what: str) -> None:
        self.done.append((self.now_s - 100.0, what))

    def end(self, name: str, cleanly: bool) -> None:
        self._note(f"{'leave' if cleanly else 'kill'} {name}")

    def begin_again(self, name: str) -> None:
        self._note(f"start {name}")

    def end_restarts(self) -> None:
        self.restarts_ended_s = self.now_s - 100.0

    def hang(self, name: str) -> None:
        self._note(f"hang {name}")

    def go_on(self, name: str) -> None:
        self._note(f"go on {name}")

    def part(self, sides: list[list[str]]) -> Outage:
        self._note(f"part {sides}")
        return Outage(tuple(frozenset(side) for side in sides))

    def mend(self, outage: Outage) -> None:
        self._note(f"mend {len(outage.sides)}")

    def narrow(self, names: Sequence[str], share: float) -> Narrowing:
        self._note(f"narrow {' '.join(names)} to {share:g}")
        return Narrowing(frozenset(names), share)

    def widen(self, narrowing: Narrowing) -> None:
        self._note(f"widen {' '.join(sorted(narrowing.names))}")

    def reset(self, name: str) -> None:
        self._note(f"reset {name}")

    def forget(self, name: str) -> None:
        self._note(f"forget {name}")

    def tell(self, message: str) -> None:
        self.said.append(message)


def played(*faults: FaultEvent, until_s: float) -> Noted:
    swarm = Noted()
    rehearsing = FaultInjection(swarm, swarm, iter(faults), lambda: swarm.now_s)
    rehearsing.tick()
    rehearsing.begin()
    for _ in range(int(until_s)):
        rehearsing.tick()
        swarm.now_s += 1.0
    rehearsing.stop()
    rehearsing.tick()
    return swarm


def test_each_strikes_at_its_time_and_is_over_in_time() -> None:
    swarm = played(
        FaultEvent(2.0, "kill", ("a", "b"), 5.0),
        FaultEvent(3.0, "leave", ("c",), 1.0),
        FaultEvent(3.0, "hang", ("d",), 3.0),
        FaultEvent(8.0, "reset", ("a",), 20.0),
        FaultEvent(8.0, "half-open", ("b",), 20.0),
        until_s=20,
    )
    assert swarm.done == [
        (2.0, "kill a"),
        (2.0, "kill b"),
        (3.0, "leave c"),
        (3.0, "hang d"),
        (4.0, "start c"),
        (6.0, "go on d"),
        (7.0, "start a"),
        (7.0, "start b"),
        (8.0, "reset a"),
        (8.0, "forget b"),
    ]
    assert swarm.said[0] == "rehearsal: a and b: killed; started again after 5 s"
    assert swarm.said[-1] == "rehearsal: b: all connections are forgotten, and nobody is told"


def test_those_parted_are_one_side_and_those_cut_off_are_each_alone() -> None:
    swarm = played(FaultEvent(0.0, "partition", ("a", "b"), 3.0), FaultEvent(1.0, "stall", ("a", "b"), 3.0), until_s=9)
    assert swarm.done == [(0.0, "part [['a', 'b']]"), (1.0, "part [['a'], ['b']]"), (3.0, "mend 1"), (4.0, "mend 2")]


def test_narrowed_links_get_their_bandwidth_back() -> None:
    swarm = played(FaultEvent(1.0, "narrow", ("a", "b"), 3.0, 25.0), FaultEvent(6.0, "narrow", ("a",), 9.0), until_s=8)
    assert swarm.done == [(1.0, "narrow a b to 0.25"), (4.0, "widen a b"), (6.0, "narrow a to 0.5"), (8.0, "widen a")]
    assert swarm.said[0] == "rehearsal: a and b: given 25 % of the bandwidth for 3 s"


def test_at_the_end_what_hangs_goes_on_and_nothing_more_happens() -> None:
    swarm = played(
        FaultEvent(1.0, "hang", ("a",), 100.0),
        FaultEvent(1.0, "kill", ("b",), 100.0),
        FaultEvent(6.0, "kill", ("c",), 1.0),
        until_s=5,
    )
    assert swarm.done == [(1.0, "hang a"), (1.0, "kill b"), (5.0, "go on a")]
    assert swarm.restarts_ended_s == 5.0, "nobody waits for b"

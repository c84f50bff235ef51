"""Leaving before the end: until the archive has what nobody else has, but not for ever."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from swarmtrain.errors import Problem, UnreachableError
from swarmtrain.events import Event, WarningEvent
from swarmtrain.network.node import NetworkThread
from swarmtrain.peer.lifecycle import departure
from swarmtrain.peer.lifecycle.departure import hand_over
from swarmtrain.peer.lifecycle.stop import StopFlag
from swarmtrain.protocol.archive.departure import FellowDepartures
from swarmtrain.protocol.membership.membership import Membership, PeerInfo
from swarmtrain.v1 import snapshot_pb2 as pb


@dataclass
class Here:
    """Stands in for swarm and control: the bootstrap answers with `stay` in turn, then that it may go."""

    network: NetworkThread
    stay: list[bool | Exception] = field(default_factory=list)
    readers: Callable[[], int] = lambda: 0
    events: list[Event] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    away: bool = False
    told: int = 0
    killed: tuple[str, ...] = ()
    hangs: bool = False
    leave_too: tuple[str, ...] = ()
    fellows: Any = None
    stop: StopFlag = field(default_factory=StopFlag)
    membership: Membership = field(default_factory=lambda: Membership("me"))
    me: PeerInfo = field(default_factory=lambda: PeerInfo(peer="me", training=True, round=5))
    published = SimpleNamespace(sha256="ab" * 32)
    identity = SimpleNamespace(peer_id="me")
    board = SimpleNamespace(doing=lambda state, sentence: None)

    def leave(self) -> None:
        self.stop.stop()
        hand_over(cast(Any, self), [cast(Any, self)], self.network, Path("/home/ada/my run"))

    def __post_init__(self) -> None:
        self.saw("anna", stamp=1.0)
        self.membership.left("anna", 2.0)
        self.saw("boot", stamp=1.0)

    def saw(self, peer: str, stamp: float, round: int = 0) -> None:
        info = PeerInfo(peer=peer, stamp=stamp, is_bootstrap=peer == "boot", training=peer != "boot", round=round)
        self.membership.saw_presence(info, 1e9, stamp)

    async def hello(self, peer: str, request: pb.HelloRequest, limit_s: float) -> pb.HelloReply:
        assert request.asks_to_leave and request.HasField("presence") and not request.leaving
        if peer != "boot":
            return pb.HelloReply(stay=peer in self.leave_too)
        self.asked.append(peer)
        answer = self.stay.pop(0) if self.stay else False
        if isinstance(answer, Exception):
            raise answer
        return pb.HelloReply(stay=answer)

    async def addresses(self) -> tuple[str, ...]:
        if self.hangs:
            await asyncio.Event().wait()
        return ()

    def would_leave(self) -> None:
        self.fellows = FellowDepartures(self.identity.peer_id)

    async def greet_some(self) -> None:
        for peer in self.killed:
            self.membership.call_failed(peer, 9.0, "refused")

    async def withdraw(self, limit_s: float) -> None:
        self.away = True

    async def count_once_more(self) -> None:
        self.told += 1

    def signed(self) -> pb.Signed:
        return pb.Signed(payload=b"me")

    def emit(self, event: Event) -> None:
        self.events.append(event)

    @property
    def num_readers(self) -> int:
        return self.readers()

    @property
    def calls(self) -> Here:
        return self

    rounds = store = node = presence = greeter = calls


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Iterator[Here]:
    monkeypatch.setattr(departure, "_AGAIN_S", 0.01)
    monkeypatch.setattr(departure, "_SOON_S", 0.01)
    monkeypatch.setattr(departure, "_IDLE_S", 0.3)
    network = NetworkThread()
    yield Here(network)
    network.stop()


def test_it_asks_until_it_may_go(here: Here) -> None:
    here.stay = [True, True, False, True]
    here.leave()
    assert here.asked == ["boot"] * 3 and not here.events
    assert here.told == 1, "its last rounds count"


class Minute:
    """Clock that moves whenever it is read."""

    def __init__(self, step_s: float) -> None:
        self.now, self.step_s = 0.0, step_s

    def monotonic(self) -> float:
        self.now += self.step_s
        return self.now


def test_the_last_holder_waits_a_minute_for_a_bootstrap_and_says_where_the_work_is(
    here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen: `leave` ended at once although 904,000 tokens were in that folder only."""
    clock = Minute(10.0)
    monkeypatch.setattr(departure, "time", clock)
    here.stay = [UnreachableError("nobody")] * 100
    here.leave()
    waits, kept = here.events
    assert isinstance(waits, WarningEvent) and waits.code == "no-bootstrap"
    assert isinstance(kept, WarningEvent) and kept.code == "rounds-not-archived"
    assert "`swarmtrain join --dir '/home/ada/my run'`" in kept.message
    assert 60 <= clock.now <= 90


def test_of_two_that_leave_in_the_same_moment_one_waits(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each took the other for one that trains on, and nobody said where the work is."""
    monkeypatch.setattr(departure, "time", Minute(10.0))
    here.stay, here.leave_too = [UnreachableError("nobody")] * 100, ("ben",)
    here.saw("ben", stamp=3.0)
    here.leave()
    assert [event.code for event in here.events if isinstance(event, WarningEvent)] == [
        "no-bootstrap",
        "rounds-not-archived",
    ]
    assert not here.fellows.is_going and here.fellows.leaving == {"ben"}


def test_a_bootstrap_that_comes_back_in_that_minute_takes_it(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(departure, "time", Minute(1.0))
    monkeypatch.setattr(departure, "_IDLE_S", 10.0)
    here.stay = [UnreachableError("nobody"), UnreachableError("nobody"), True, True, False]
    here.leave()
    (waits,) = here.events
    assert isinstance(waits, WarningEvent) and len(here.asked) == 5


def test_a_bootstrap_that_does_not_answer_keeps_nobody_while_others_train(here: Here) -> None:
    here.saw("ben", stamp=3.0)
    here.stay = [UnreachableError("nobody"), True]
    here.leave()
    assert here.asked == ["boot"] and not here.events


def test_one_that_was_killed_a_moment_ago_does_not_train_on(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(departure, "time", Minute(1.0))
    monkeypatch.setattr(departure, "_IDLE_S", 10.0)
    here.saw("ben", stamp=3.0)
    here.killed, here.stay = ("ben",), [UnreachableError("nobody"), True, False]
    here.leave()
    assert len(here.asked) == 3, "it waited for the bootstrap"


@pytest.mark.parametrize("archived", [5, 6])
def test_what_is_archived_already_keeps_nobody(here: Here, archived: int) -> None:
    here.saw("boot", stamp=3.0, round=archived)
    here.stay = [UnreachableError("nobody")]
    here.leave()
    assert here.asked == ["boot"] and not here.events


def test_a_bootstrap_that_has_ended_is_not_waited_for_and_the_work_is_named(here: Here) -> None:
    here.membership.left("boot", 5.0)
    here.leave()
    (kept,) = here.events
    assert here.asked == [] and isinstance(kept, WarningEvent) and "/home/ada/my run" in kept.message


def test_who_cannot_hear_anybody_waits_for_nobody(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own daemon hangs: that no bootstrap answers says nothing."""
    monkeypatch.setattr(departure, "_CALL_S", 0.05)
    here.hangs, here.stay = True, [UnreachableError("nobody")] * 100
    here.leave()
    assert here.asked == [] and not here.events


def test_who_has_merged_no_round_has_nothing_to_lose(here: Here) -> None:
    here.me = PeerInfo(peer="me", training=True)
    here.stay = [UnreachableError("nobody")]
    here.leave()
    assert here.asked == ["boot"] and not here.events


def test_who_has_said_goodbye_before_a_pause_asks_nobody(here: Here) -> None:
    here.away = True
    here.leave()
    assert here.asked == []


def test_who_cannot_go_on_asks_nobody(here: Here) -> None:
    here.stop.fail(Problem("it ended", "daemon-died"))
    here.leave()
    assert here.asked == [] and not here.events


def test_where_nothing_is_taken_it_goes_after_a_while_and_says_so(here: Here) -> None:
    here.stay = [True] * 10_000
    here.leave()
    (event,) = here.events
    assert isinstance(event, WarningEvent) and event.code == "rounds-not-archived"


def test_whoever_reads_is_served_to_the_end(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(departure, "_IDLE_S", 10.0)
    monkeypatch.setattr(departure, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def reading() -> int:
        now[0] += 8.0
        return now[0] < 100.0

    here.readers, here.stay = reading, [True] * 13
    here.leave()
    assert len(here.asked) == 14 and now[0] > 100.0
    (event,) = here.events
    assert isinstance(event, WarningEvent) and "Ctrl-C again" in event.message, "once"


def test_an_end_that_is_asked_for_again_is_obeyed(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(departure, "_IDLE_S", 3600.0)
    here.stay = [True] * 10_000

    def insist() -> int:
        here.stop.insist()
        return 1

    here.readers = insist
    here.leave()
    assert len(here.asked) == 1 and isinstance(here.events[0], WarningEvent)


def leave_stages(*stages: Here) -> None:
    """Leave several stages; the first one's error ends the process."""
    first = cast(Any, stages[0])
    first.stop.stop()
    hand_over(first, cast(Any, stages), first.network, Path("/home/ada/my run"))


def test_all_stages_are_archived_before_their_peer_goes(here: Here) -> None:
    """Each has a swarm of its own: one may go at once, and is left at once, another waits."""
    other = Here(here.network, stay=[True, True, False])
    leave_stages(here, other)
    assert len(here.asked) == 1 and len(other.asked) == 3
    assert here.away and not other.away and not here.events and here.told == other.told == 1


def test_a_stage_that_was_archived_is_not_handed_over_again_while_another_is(here: Here) -> None:
    """A bootstrap says once that it has what a stage holds: asked again, it wanted the first stage while it had the
    second one's, and the second while it had the first one's, until the peer left with a false warning."""
    here.stay, other = [True, False, *[True] * 10_000], Here(here.network, stay=[True, True, False, *[True] * 10_000])
    leave_stages(here, other)
    assert not here.events and len(here.asked) == 2 and len(other.asked) == 3


def test_one_that_leaves_a_stage_before_another_is_not_taken_for_one_that_trains_on_there(here: Here) -> None:
    here.stay, other = [UnreachableError("nobody")], Here(here.network, stay=[True, False])
    here.saw("ben", stamp=3.0)
    leave_stages(here, other)
    assert here.away and here.fellows.is_going, "it has said goodbye, and tells those who ask to stay"

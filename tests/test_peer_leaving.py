"""Leaving before the end: until the archive has what nobody else has, but not for ever."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

import pytest

from swarmtrain.errors import UnreachableError
from swarmtrain.events import Event, WarningEvent
from swarmtrain.network.node import NetworkThread
from swarmtrain.peer import leaving
from swarmtrain.peer.common import StopFlag
from swarmtrain.peer.leaving import hand_over
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
    stop: StopFlag = field(default_factory=StopFlag)
    published = SimpleNamespace(sha256="ab" * 32)
    board = SimpleNamespace(doing=lambda state, sentence: None)

    def leave(self) -> None:
        self.stop.stop()
        hand_over(cast(Any, self), cast(Any, self), self.network)

    async def hello(self, peer: str, request: pb.HelloRequest, limit_s: float) -> pb.HelloReply:
        assert request.asks_to_leave and request.HasField("presence") and not request.leaving
        self.asked.append(peer)
        answer = self.stay.pop(0) if self.stay else False
        if isinstance(answer, Exception):
            raise answer
        return pb.HelloReply(stay=answer)

    def live(self) -> list[Any]:
        return [SimpleNamespace(peer=peer, is_bootstrap=peer == "boot") for peer in ("anna", "boot")]

    def signed_presence(self) -> pb.Signed:
        return pb.Signed(payload=b"me")

    def emit(self, event: Event) -> None:
        self.events.append(event)

    @property
    def num_readers(self) -> int:
        return self.readers()

    @property
    def calls(self) -> Here:
        return self

    membership = rounds = store = calls


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Iterator[Here]:
    monkeypatch.setattr(leaving, "_AGAIN_S", 0.01)
    monkeypatch.setattr(leaving, "_IDLE_S", 0.3)
    network = NetworkThread()
    yield Here(network)
    network.stop()


def test_it_asks_until_it_may_go(here: Here) -> None:
    here.stay = [True, True, False, True]
    here.leave()
    assert here.asked == ["boot"] * 3 and not here.events


def test_a_bootstrap_that_does_not_answer_keeps_nobody(here: Here) -> None:
    here.stay = [UnreachableError("nobody"), True]
    here.leave()
    assert here.asked == ["boot"] and not here.events


def test_who_has_said_goodbye_before_a_pause_asks_nobody(here: Here) -> None:
    here.away = True
    here.leave()
    assert here.asked == []


def test_who_cannot_go_on_asks_nobody(here: Here) -> None:
    here.stop.fail("the network daemon ended")
    here.leave()
    assert here.asked == [] and not here.events


def test_where_nothing_is_taken_it_goes_after_a_while_and_says_so(here: Here) -> None:
    here.stay = [True] * 10_000
    here.leave()
    (event,) = here.events
    assert isinstance(event, WarningEvent) and "in no archive" in event.message


def test_whoever_reads_is_served_to_the_end(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(leaving, "_IDLE_S", 10.0)
    monkeypatch.setattr(leaving, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def reading() -> int:
        now[0] += 8.0
        return now[0] < 100.0

    here.readers, here.stay = reading, [True] * 13
    here.leave()
    assert len(here.asked) == 14 and now[0] > 100.0
    (event,) = here.events
    assert isinstance(event, WarningEvent) and "Ctrl-C again" in event.message, "once"


def test_an_end_that_is_asked_for_again_is_obeyed(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leaving, "_IDLE_S", 3600.0)
    here.stay = [True] * 10_000

    def insist() -> int:
        here.stop.insist()
        return 1

    here.readers = insist
    here.leave()
    assert len(here.asked) == 1 and isinstance(here.events[0], WarningEvent)

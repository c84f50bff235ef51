"""History of a run as another peer tells it: bounded, checked, and asked of whoever should know."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from codes import raises_code
from virtual_loop import virtually

from swarmtrain.errors import BadBytesError, PeerError, UnreachableError
from swarmtrain.network.history import ask_for_history, history_from_proto_untrusted, history_to_proto
from swarmtrain.protocol.history import HistoryPoint, TextSample, ToldHistory
from swarmtrain.protocol.membership.membership import PeerInfo
from swarmtrain.v1 import snapshot_pb2 as pb

POINTS = [
    HistoryPoint(run_tokens=1000 * number, time=1.7e9 + number, round=number, loss=number / 2, held_out_loss=0.25)
    for number in range(1, 20)
]
SAMPLE = TextSample(prompt="def ", text="main():\n", round=3, run_tokens=3000, time=1.7e9)


@pytest.mark.parametrize("sample", [SAMPLE, None])
def test_it_arrives_as_it_was_sent(sample: TextSample | None) -> None:
    reply = pb.HistoryReply.FromString(history_to_proto(POINTS, sample).SerializeToString())
    assert history_from_proto_untrusted(reply) == (POINTS, sample)


def test_a_long_history_fits_into_an_answer() -> None:
    points = [HistoryPoint(run_tokens=2**50 + number, time=1.7e9, round=2**30, loss=3.0) for number in range(5000)]
    reply = history_to_proto(points, SAMPLE)
    assert len(reply.points) == 4096 and reply.ByteSize() < 200_000
    assert reply.points[-1].run_tokens == points[-1].run_tokens, "the newest stay"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("loss", math.nan),
        ("loss", -1.0),
        ("held_out_loss", math.inf),
        ("loss", 1e6),
        ("time", math.nan),
        ("time", -1.0),
        ("time", 1e20),
        ("run_tokens", 2**61),
        ("round", 2**41),
    ],
)
def test_a_field_out_of_range_is_refused(field: str, value: Any) -> None:
    reply = history_to_proto(POINTS, None)
    setattr(reply.points[3], field, value)
    with raises_code("bad-number", BadBytesError):
        history_from_proto_untrusted(reply)
    if field in ("time", "run_tokens", "round"):
        reply = history_to_proto((), SAMPLE)
        setattr(reply.sample, field, value)
        with raises_code("bad-number", BadBytesError):
            history_from_proto_untrusted(reply)


def test_too_much_is_refused() -> None:
    reply = pb.HistoryReply()
    for _ in range(4097):
        reply.points.add(run_tokens=1, loss=1)
    with raises_code("bad-size", BadBytesError):
        history_from_proto_untrusted(reply)
    with raises_code("bad-size", BadBytesError):
        history_from_proto_untrusted(pb.HistoryReply(sample=pb.TextSample(prompt="x" * 2000, text="x" * 2001)))


SILENT = pb.HistoryReply()
"""Stands for no answer at all."""
ANSWER_S = 2.0


class FakeSwarm:
    """Swarm of peers that answer, fail, or lie."""

    def __init__(self, peers: dict[str, pb.HistoryReply | PeerError]) -> None:
        live = [PeerInfo(peer=peer) for peer in peers]
        self.membership = SimpleNamespace(live=lambda: live, measurer=lambda: self.measurer)
        self.accounting = SimpleNamespace(rules=SimpleNamespace(began_s=1.7e9))
        self.calls = SimpleNamespace(history=self._history)
        self.peers = SimpleNamespace(refused=lambda peer, error: self.refused.append((peer, error.code)))
        self.measurer = "me"
        self.asked: list[str] = []
        self.given_up: list[str] = []
        self.refused: list[tuple[str, str]] = []
        self._peers = peers

    async def _history(self, peer: str) -> pb.HistoryReply:
        self.asked.append(peer)
        reply = self._peers[peer]
        if reply is SILENT:
            try:
                await asyncio.Event().wait()
            finally:
                self.given_up.append(peer)
        await asyncio.sleep(ANSWER_S)
        if isinstance(reply, PeerError):
            raise reply
        return reply


def asked(swarm: FakeSwarm, inviters: tuple[str, ...] | None = None, run_tokens: int = 20_000) -> list[ToldHistory]:
    return asked_within(swarm, inviters, run_tokens)[0]


def asked_within(
    swarm: FakeSwarm, inviters: tuple[str, ...] | None = None, run_tokens: int = 20_000
) -> tuple[list[ToldHistory], float]:
    """Return what was told, and the virtual seconds that it took."""

    async def body(now: Callable[[], float]) -> tuple[list[ToldHistory], float]:
        began_s = now()
        named = swarm._peers if inviters is None else inviters
        return await ask_for_history(swarm, named, run_tokens), now() - began_s  # type: ignore[arg-type]

    return virtually(body)


def test_peers_of_the_invite_and_who_measures_are_asked_and_no_others() -> None:
    good = history_to_proto(POINTS, SAMPLE)
    swarm = FakeSwarm(dict.fromkeys("abcdefghi", good))
    told = asked(swarm, inviters=("c", "h", "gone"))
    assert swarm.asked == ["c", "h"]
    assert all((list(one.points), one.sample) == (POINTS, SAMPLE) for one in told)
    assert asked(FakeSwarm({"a": good}), inviters=()) == []
    swarm.measurer = "f"
    asked(swarm, inviters=("c", "h"))
    assert swarm.asked[2:] == ["f", "c", "h"], "and who measures"
    many = FakeSwarm(dict.fromkeys("abcdefghi", good))
    assert len(asked(many, inviters=tuple("abcdefghi"))) == 5


def test_what_this_peer_does_not_count_yet_is_left_out() -> None:
    (told,) = asked(FakeSwarm({"a": history_to_proto(POINTS, SAMPLE)}), run_tokens=2500)
    assert list(told.points) == POINTS[:2] and told.sample is None


def test_who_fails_or_lies_costs_its_answer_only() -> None:
    lie = history_to_proto(POINTS, None)
    lie.points[0].loss = math.nan
    peers = {"one": lie, "other": UnreachableError("it does not know this call")}
    swarm = FakeSwarm(peers)
    assert asked(swarm) == [] and swarm.refused == [("one", "bad-number")]


def test_all_are_asked_at_once() -> None:
    told, took_s = asked_within(FakeSwarm(dict.fromkeys("abcde", history_to_proto(POINTS, SAMPLE))))
    assert len(told) == 5 and took_s == pytest.approx(ANSWER_S)


def test_who_is_silent_delays_the_others_answers_for_a_bounded_time() -> None:
    good = history_to_proto(POINTS, SAMPLE)
    swarm = FakeSwarm({"a": SILENT, "b": good, "c": SILENT, "d": UnreachableError("gone"), "e": good})
    told, took_s = asked_within(swarm)
    assert len(told) == 2 and took_s == pytest.approx(10.0)
    assert sorted(swarm.given_up) == ["a", "c"], "nothing waits for them any more"
    assert not swarm.refused, "a silent peer is not a liar"

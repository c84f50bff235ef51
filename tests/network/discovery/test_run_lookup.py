"""Finding a run among peers of whom some lie about the time: by whose clock, and through whom."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import pytest
from codes import raises_code
from virtual_loop import virtually

from swarmtrain.compatibility import PROTOCOL
from swarmtrain.errors import BadBytesError, ClockError
from swarmtrain.network import daemon
from swarmtrain.network.discovery import run_lookup
from swarmtrain.network.discovery.invite import InvitedPeer
from swarmtrain.network.discovery.run_lookup import FoundRun, fetch_published, find_run
from swarmtrain.network.node import Node
from swarmtrain.protocol.pinned_files.file_list import PinnedFile, PinnedFiles
from swarmtrain.v1 import snapshot_pb2 as pb

YEARS_31 = 31 * 365.25 * 86_400.0
NOON = 1_900_000_000.0


@pytest.fixture(autouse=True)
def _own_clock() -> Iterator[None]:
    yield
    daemon.set_clock_offset(0.0)


def find(monkeypatch: pytest.MonkeyPatch, answers: Mapping[str, tuple[float, float]], **more: Any) -> FoundRun:
    """Return what is found if peers answer after so many seconds, with clocks so far from this machine's."""

    async def body(now: Any) -> FoundRun:
        class Calls:
            def __init__(self, *_: Any) -> None:
                pass

            async def hello(self, peer: str, *_: Any) -> pb.HelloReply:
                after_s, ahead_s = answers[peer]
                asked_s = now()
                await asyncio.sleep(after_s)
                return pb.HelloReply(protocol=PROTOCOL, time=NOON + (asked_s + now()) / 2 + ahead_s)

        async def connect(*_: Any) -> None:
            pass

        monkeypatch.setattr(run_lookup, "PeerCalls", Calls)
        monkeypatch.setattr(run_lookup, "own_time", lambda: NOON + now())
        node: Any = SimpleNamespace(connect=connect, identity=SimpleNamespace(peer_id="me"))
        return await find_run(node, "ab" * 32, [InvitedPeer(peer, ()) for peer in answers], **more)

    return virtually(body)


def test_one_alone_moves_no_clock_by_31_years_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    with raises_code("clock-differs", ClockError, "--accept-clock"):
        find(monkeypatch, {"liar": (0.0, YEARS_31)})
    assert daemon.swarm_time() == pytest.approx(daemon.own_time(), abs=1)
    assert find(monkeypatch, {"liar": (0.0, YEARS_31)}, accept_clock=True).clock_correction_s == YEARS_31
    assert daemon.swarm_time() == pytest.approx(daemon.own_time() + YEARS_31, abs=1)


def test_where_the_first_answer_is_doubtful_others_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The liar is quick, the honest ones are slow; it is named, and the run is not fetched from it."""
    found = find(monkeypatch, {"liar": (0.0, YEARS_31), "ada": (2.0, 0.1), "ben": (2.5, -0.1)})
    assert found == FoundRun("ada", 0.0, (("liar", YEARS_31),))


def test_who_is_far_from_the_others_is_not_the_first_to_be_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    found = find(monkeypatch, {"late": (0.0, 300.0), "ada": (0.1, 0.0), "ben": (0.2, 0.0)})
    assert found == FoundRun("ada", 0.0, (("late", 300.0),))


def test_a_name_that_a_stranger_gives_is_not_remembered_to_be_dialled() -> None:
    node = Node.__new__(Node)
    node._known = {}
    given = "/dns4/home.example.org/tcp/5"
    bad = ["/dns4/evil.example.org/tcp/5", "/dns/metadata/tcp/80", "/ip6/::ffff:169.254.169.254/tcp/80"]
    node.remember_addresses("x", [*bad, given, "/ip4/192.168.1.5/tcp/5"])
    assert node._known == {"x": ("/ip4/192.168.1.5/tcp/5",)}
    node.remember_addresses("x", [*bad, given, "/ip4/192.168.1.5/tcp/5"], [given])
    assert node._known == {"x": (given, "/ip4/192.168.1.5/tcp/5")}


@pytest.mark.parametrize("num_parameters", [2**29, 1000])
def test_the_files_of_a_model_are_about_as_large_as_it_is(num_parameters: int) -> None:
    files = PinnedFiles((PinnedFile("model.safetensors", 3 * 2**30, "ab" * 32, "cd" * 32),))
    published = SimpleNamespace(
        held_out_sha256="text",
        held_out_bytes=4,
        tokenizer_sha256=None,
        model_files_sha256="list",
        model_files_bytes=300,
    )
    run: Any = SimpleNamespace(published=published, model=SimpleNamespace(num_parameters=num_parameters))
    calls: Any = SimpleNamespace(run_sha256="run")
    kept = {"run": b"run", "text": b"text", "list": files.to_bytes()}
    fetching = fetch_published(calls, "anna", lambda data, sha256: run, kept)
    if num_parameters > 1000:
        assert asyncio.run(fetching).model_files == files.to_bytes()
    else:
        with raises_code("bad-size", BadBytesError):
            asyncio.run(fetching)

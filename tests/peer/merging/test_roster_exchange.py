"""Before round 0: who is waited for, and what tells a peer that the others have begun."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from codes import raises_code
from patience import PATIENCE_S

from swarmtrain.algorithm.outer import OuterState
from swarmtrain.errors import RunTimeError, UnreachableError
from swarmtrain.network.codec import average_bytes_untrusted
from swarmtrain.network.daemon import swarm_time
from swarmtrain.network.discovery.run_lookup import PublishedRun
from swarmtrain.network.identity import new_identity
from swarmtrain.network.node import NetworkThread, NodeSettings, TrafficCount
from swarmtrain.network.swarm import Swarm
from swarmtrain.peer.lifecycle.stop import StopFlag
from swarmtrain.peer.merging.roster_exchange import RosterExchange
from swarmtrain.protocol.membership.membership import PeerInfo
from swarmtrain.protocol.rounds.rosters import AdvertisedRound
from swarmtrain.protocol.tokens.progress import Progress
from swarmtrain.run import RunFile
from swarmtrain.v1 import snapshot_pb2 as pb

ME, BEN, CARL = (new_identity(bytes([i]) * 32) for i in range(3))


@pytest.fixture
def exchange_for() -> Iterator[Callable[[int], RosterExchange]]:
    """Makes the exchange of a peer that knows ben, in a run that begins with so many."""
    network = NetworkThread()

    def make(min_peers: int) -> RosterExchange:
        merge = {"method": "diloco", "min_peers": min_peers}
        run = RunFile.model_validate({"run": {"total_tokens": 100_000}, "merge": merge})
        node: Any = SimpleNamespace(
            identity=ME, settings=NodeSettings(directory=Path("/nowhere")), traffic=TrafficCount()
        )
        published = PublishedRun(b"", "ab" * 32, run, b"", b"")
        swarm = Swarm(node, published, (), average_bytes_untrusted, lambda event: None, PeerInfo(peer=ME.peer_id))
        now = swarm_time()
        swarm.membership.saw_presence(PeerInfo(peer=BEN.peer_id, training=True, stamp=now), now + 999, now)
        return RosterExchange(network, swarm, run, StopFlag())

    yield make
    network.stop()


def offer(exchange: RosterExchange) -> None:
    exchange.offer(OuterState(torch.zeros(4), torch.zeros(4)), Progress())


def ask(exchange: RosterExchange, **request: Any) -> pb.RoundReply:
    return exchange.network.run(exchange.swarm.answers.round(pb.RoundRequest(**request), BEN.peer_id), 5)


@pytest.mark.parametrize(("min_peers", "participates"), [(3, True), (1, False)])
def test_one_that_will_train_all_of_round_0_is_waited_for_from_its_announcement(
    exchange_for: Callable[[int], RosterExchange], min_peers: int, participates: bool
) -> None:
    exchange = exchange_for(min_peers)
    offer(exchange)
    assert ask(exchange, round=0).participating is participates


def test_a_question_about_round_0_says_that_it_has_begun(exchange_for: Callable[[int], RosterExchange]) -> None:
    """Two of three were told of everyone and train; the third was told of one, and would wait for the other."""
    exchange = exchange_for(3)
    offer(exchange)
    ask(exchange, round=0, has_publication=True)  # only how far it is
    assert not exchange.swarm.rounds.wanted
    starting = threading.Thread(target=exchange.start_round, args=(Progress(), 0.0), daemon=True)
    starting.start()
    starting.join(0.3)
    assert starting.is_alive()
    assert ask(exchange, round=0).participating
    starting.join(PATIENCE_S)
    assert not starting.is_alive()
    assert not exchange.swarm.rounds.engine.is_late_joiner


def test_that_nobody_answers_does_not_mean_that_nobody_has_trained(
    exchange_for: Callable[[int], RosterExchange], monkeypatch: pytest.MonkeyPatch
) -> None:
    exchange = exchange_for(1)
    monkeypatch.setattr(exchange.stop, "sleep", lambda seconds: None)
    asked = list[str]()

    async def answer(peer: str, request: pb.RoundRequest) -> pb.RoundReply:
        asked.append(peer)
        if len(asked) != 2:
            raise UnreachableError("it is busy")
        return pb.RoundReply()

    monkeypatch.setattr(exchange.swarm.calls, "round", answer)
    assert exchange.present_state(Progress()) is None, "ben was busy for a moment, and has merged nothing yet"
    with raises_code("state-not-delivered", RunTimeError):
        exchange.present_state(Progress())
    assert asked == [BEN.peer_id] * 5


def test_an_archive_that_comes_is_asked_once_beside_the_round(
    exchange_for: Callable[[int], RosterExchange], monkeypatch: pytest.MonkeyPatch
) -> None:
    exchange, asked = exchange_for(1), list[list[str]]()
    rounds, membership = exchange.swarm.rounds, exchange.swarm.membership
    there = {"answers": False}

    async def ask_now(peers: list[str]) -> dict[str, AdvertisedRound]:
        asked.append(peers)
        return {peer: AdvertisedRound(round=3, last=None) for peer in peers if there["answers"] or peer != CARL.peer_id}

    async def fetch(told: dict[str, AdvertisedRound], reason: str, above_tokens: int = 0) -> object:
        return sorted(told)

    monkeypatch.setattr(rounds.search, "ask_now", ask_now)
    monkeypatch.setattr(rounds.search, "fetch_advertised_state", fetch)

    def a_round() -> object:
        exchange.archives.ask()
        if exchange.archives._told is not None:
            exchange.archives._told.result(5)
        return exchange.archives.state_that_holds()

    def comes(stamp: float) -> None:
        info = PeerInfo(peer=CARL.peer_id, is_bootstrap=True, stamp=stamp)
        membership.saw_presence(info, swarm_time() + 999, swarm_time())

    assert a_round() is None and not asked, "there is none"
    comes(1.0)
    assert a_round() is None and asked == [[CARL.peer_id, BEN.peer_id]], "it does not answer"
    there["answers"] = True
    assert a_round() == sorted([BEN.peer_id, CARL.peer_id]) and len(asked) == 2, "the others say where they stand too"
    assert a_round() is None and len(asked) == 2
    membership.left(CARL.peer_id, swarm_time())
    assert a_round() is None and len(asked) == 2
    comes(swarm_time() + 5)
    assert a_round() is not None and len(asked) == 3, "it is back"
    rounds.was_suspended()
    assert a_round() is not None and a_round() is None and len(asked) == 4, "this process slept"
    membership.left(BEN.peer_id, swarm_time())
    assert a_round() == a_round() == [CARL.peer_id] and len(asked) == 6, "nobody else is here"


def test_a_finished_round_is_offered_though_an_end_was_asked_for(
    exchange_for: Callable[[int], RosterExchange],
) -> None:
    exchange = exchange_for(1)
    exchange.stop.stop()
    offer(exchange)
    assert exchange.swarm.offer.progress is not None

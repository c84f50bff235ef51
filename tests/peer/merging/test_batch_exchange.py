"""Trainer's side of a large batch: its plan, when it ends, what it says, and what is told of a gradient that is not in
it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from swarmtrain import run_batch
from swarmtrain.algorithm.common_step import CommonOptimizer, CommonStep
from swarmtrain.algorithm.outer import OuterConstants, OuterState
from swarmtrain.events import Event, WarningEvent
from swarmtrain.network.codec import average_bytes_untrusted
from swarmtrain.network.daemon import swarm_time
from swarmtrain.network.discovery.run_lookup import PublishedRun
from swarmtrain.network.identity import Identity, new_identity
from swarmtrain.network.node import NetworkThread, NodeSettings, TrafficCount
from swarmtrain.network.rounds.round_end import Outcome, RosterMean
from swarmtrain.network.rounds.state_fetch import NewState
from swarmtrain.network.snapshots.store import TensorSpec
from swarmtrain.network.swarm import Swarm
from swarmtrain.peer.lifecycle.stop import StopFlag
from swarmtrain.peer.merging import roster_exchange
from swarmtrain.peer.merging.batch_exchange import BatchExchange
from swarmtrain.peer.merging.updates import BatchMean, LocalUpdate, Replaced
from swarmtrain.peer.training.loop import inner_constants
from swarmtrain.protocol.membership.membership import PeerInfo
from swarmtrain.protocol.rounds.rosters import Roster, RoundPublication
from swarmtrain.protocol.tokens.progress import Progress
from swarmtrain.run import RunFile
from swarmtrain.v1 import snapshot_pb2 as pb

ME, BEN = (new_identity(bytes([i]) * 32) for i in range(2))
STEP = 4 * 64
TARGET = 16 * STEP


@pytest.fixture
def exchange_for() -> Iterator[Callable[..., tuple[BatchExchange, list[Event]]]]:
    """Makes the exchange of a peer that knows ben, and what it tells."""
    network = NetworkThread()

    def make(target: dict[str, Any] | None = None, **ben: Any) -> tuple[BatchExchange, list[Event]]:
        merge = {"method": "batch", **(target or {"target_tokens": TARGET}), "max_wait_s": 3.0}
        sizes = {"model": {"context_tokens": 64}, "inner": {"batch_sequences": 4}}
        run = RunFile.model_validate({"run": {"total_tokens": 10 * TARGET}, "merge": merge, **sizes})
        node: Any = SimpleNamespace(
            identity=ME, settings=NodeSettings(directory=Path("/nowhere")), traffic=TrafficCount()
        )
        told, specs = list[Event](), (TensorSpec("w", (2, 2)), TensorSpec("b", (2,)))
        published = PublishedRun(b"", "ab" * 32, run, b"", b"")
        swarm = Swarm(node, published, specs, average_bytes_untrusted, told.append, PeerInfo(peer=ME.peer_id))
        now = swarm_time()
        info = PeerInfo(peer=BEN.peer_id, training=True, stamp=now, steps_per_s=2.0, **ben)
        swarm.membership.saw_presence(info, now + 999, now)
        return BatchExchange(network, swarm, run, StopFlag()), told

    yield make
    network.stop()


@pytest.mark.parametrize(
    ("steps_per_s", "steps", "sequences"), [(0.0, 16, 0), (1.0, 16, 0), (0.1, 64, 1)], ids=["unknown", "usual", "slow"]
)
def test_a_slow_volunteer_plans_smaller_steps(
    exchange_for: Callable[..., tuple[BatchExchange, list[Event]]], steps_per_s: float, steps: int, sequences: int
) -> None:
    exchange, _ = exchange_for(round=3)
    start = exchange.start_round(Progress(round=3, run_tokens=100), steps_per_s)
    assert (start.inner_steps, start.batch_sequences, start.num_peers) == (steps, sequences, 2)
    assert not exchange.swarm.rounds.engine.is_late_joiner


@pytest.mark.parametrize("done", [0, 5], ids=["from its start", "late"])
def test_a_batch_that_grows_follows_from_the_runs_tokens(
    exchange_for: Callable[..., tuple[BatchExchange, list[Event]]], monkeypatch: pytest.MonkeyPatch, done: int
) -> None:
    """Also for one that joins within the batch, which has the tokens from its snapshot."""
    monkeypatch.setattr(run_batch, "GROWTH", 0.5)
    exchange, _ = exchange_for({"target_tokens": "auto", "inner_steps": 4}, round=3, inner_steps_done=done)
    start = exchange.start_round(Progress(round=3, run_tokens=5 * TARGET), 2.0)
    assert start.inner_steps == 40 and exchange.swarm.rounds.engine.is_late_joiner == (done > 0)
    assert exchange._skipped_steps == 0 and exchange._end.target_tokens == 40 * STEP
    assert "of this step's batch of 10.2 k tokens is here" in exchange.progress_in_words()
    assert exchange.swarm.rounds.engine.rules.target == exchange.run.batch_target
    exchange.start_round(Progress(round=4, run_tokens=0), 2.0)
    assert exchange._end.target_tokens == 4 * STEP


def test_a_status_before_the_first_batch_is_no_error(
    exchange_for: Callable[..., tuple[BatchExchange, list[Event]]],
) -> None:
    exchange, _ = exchange_for({"target_tokens": "auto", "inner_steps": 4}, round=3)
    assert exchange.progress_in_words() == "0 % of this step's batch of 1.02 k tokens is here"


def test_one_that_joins_within_a_batch_is_not_waited_for(
    exchange_for: Callable[..., tuple[BatchExchange, list[Event]]],
) -> None:
    exchange, _ = exchange_for(round=3, inner_steps_done=2)
    exchange.start_round(Progress(round=3, run_tokens=100), 2.0)
    assert exchange.swarm.rounds.engine.is_late_joiner


def test_the_batch_ends_once_the_others_have_answered(
    exchange_for: Callable[..., tuple[BatchExchange, list[Event]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    exchange, _ = exchange_for(round=3, inner_steps_done=5)
    start, answers, asked = exchange.start_round(Progress(round=3, run_tokens=1), 2.0), Future[Any](), list[list[str]]()
    assert exchange.is_training
    exchange.steps_done = 3
    words = exchange.progress_in_words()
    assert words.startswith("5") and "% of this step's batch is here, about " in words, words

    async def ask(peers: list[str]) -> dict[str, Any]:
        asked.append(peers)
        return {}

    monkeypatch.setattr(exchange.swarm.rounds.search, "ask_now", ask)
    monkeypatch.setattr(exchange.network, "submit", lambda work: (work.close(), answers)[1])
    assert not start.is_over(STEP) and not start.is_over(11 * STEP)
    answers.set_result({})
    assert start.is_over(11 * STEP)


@pytest.mark.parametrize(("done", "speed"), [(0, 256.0), (2, 512.0)], ids=["in time", "late"])
def test_rates_are_learnt_from_batches_that_this_peer_saw_from_their_start(
    exchange_for: Callable[..., tuple[BatchExchange, list[Event]]],
    monkeypatch: pytest.MonkeyPatch,
    done: int,
    speed: float,
) -> None:
    """Ben says two steps a second, and the roster has one step of his in a second."""
    exchange, _ = exchange_for(round=3, inner_steps_done=done)
    exchange.start_round(Progress(round=3, run_tokens=100), 2.0)
    publish(exchange, monkeypatch, mean(*sorted([ME.peer_id, BEN.peer_id])))
    exchange._ended_s = exchange._end.started_s + 1.0
    exchange.collect()
    there = exchange._share(0)
    assert there.tokens_per_s - there.own_per_s == pytest.approx(speed)


def test_what_rosters_count_is_read_as_what_steps_read(
    exchange_for: Callable[..., tuple[BatchExchange, list[Event]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the tokens that this peer read a quarter was learnt."""
    exchange, _ = exchange_for(round=3)
    exchange.start_round(Progress(round=3, run_tokens=100), 2.0)
    monkeypatch.setattr(RunFile, "batch_rows", 2)
    publish(exchange, monkeypatch, mean(*sorted([ME.peer_id, BEN.peer_id])))
    assert exchange._published is not None
    exchange._published = replace(exchange._published, tokens=STEP // 4)
    exchange._ended_s = exchange._end.started_s + 1.0
    exchange.collect()
    there = exchange._share(0)
    assert there.own_per_s == pytest.approx(STEP) and there.tokens_per_s == pytest.approx(STEP + 4 * STEP)


def mean(*peers: str) -> RosterMean:
    entries = tuple(RoundPublication(peer=peer, snapshot="cd" * 32, tokens=STEP, inner_steps=1) for peer in peers)
    roster = Roster(round=3, signer=BEN.peer_id, entries=entries, base="ab" * 32, base_tokens=TARGET)
    return RosterMean(roster=roster, mean=bytearray(torch.full((6,), 0.25).numpy().tobytes()))


def publish(exchange: BatchExchange, monkeypatch: pytest.MonkeyPatch, outcome: Outcome) -> None:
    monkeypatch.setattr(
        exchange.network,
        "submit",
        lambda work: (work.close(), Future[Any](), None)[1],  # nobody is asked
    )
    own = LocalUpdate(
        round=3, part=1, thetas=(), fragment_rounds=(), reached=None, tokens=STEP, inner_steps=1, own_tokens=STEP,
        base="ab" * 32, mean_gradient=torch.ones(6),
    )  # fmt: skip
    exchange.publish(own)
    assert not exchange.is_training
    assert exchange._merge is not None
    exchange._merge.set_result(outcome)
    assert exchange.is_training


def test_all_take_the_step_of_the_rosters_number_and_tokens(
    exchange_for: Callable[..., tuple[BatchExchange, list[Event]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    exchange, told = exchange_for(round=3)
    publish(exchange, monkeypatch, mean(*sorted([ME.peer_id, BEN.peer_id])))
    update = exchange.collect()
    assert isinstance(update, BatchMean) and update.at == CommonStep(4, 0.1) and not told
    state: Tensor = torch.arange(6.0)
    before = OuterState(state, torch.zeros(12))
    after = update.next_state(before, None, 0, OuterConstants(learning_rate=1.0, momentum=0.0), "")  # type: ignore[arg-type]
    optimizer = CommonOptimizer([(2, 2), (2,)], inner_constants(exchange.run))
    wanted = optimizer.step(before, torch.full((6,), 0.25), CommonStep(4, 0.1))
    assert torch.equal(after.theta, wanted.theta) and torch.equal(after.momentum, wanted.momentum)


def test_a_gradient_that_came_too_late_is_told(
    exchange_for: Callable[..., tuple[BatchExchange, list[Event]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    exchange, told = exchange_for(round=3)
    publish(exchange, monkeypatch, mean(BEN.peer_id))
    assert isinstance(exchange.collect(), BatchMean), "the step is taken all the same"
    (warning,) = told
    assert isinstance(warning, WarningEvent) and warning.code == "gradient-not-counted" and f"{STEP}" in warning.message


@pytest.mark.parametrize(
    ("round", "listed", "tokens", "is_counted"),
    [(4, [ME, BEN], 0, True), (4, [BEN], STEP, False), (6, [BEN], STEP + 5, True), (6, [ME, BEN], 5, False)],
    ids=["on its roster", "not on it", "in the sums", "not in them"],
)
def test_who_takes_the_state_in_place_of_the_mean_may_be_in_it(
    exchange_for: Callable[..., tuple[BatchExchange, list[Event]]],
    monkeypatch: pytest.MonkeyPatch,
    round: int,
    listed: list[Identity],
    tokens: int,
    is_counted: bool,
) -> None:
    """As when it is on the roster and the others' bytes do not come: then the rounding of its gradient counts too."""
    exchange, told = exchange_for(round=3)
    exchange.start_round(Progress(round=3, run_tokens=100, peer_tokens={ME.peer_id: 5}), 2.0)
    progress = Progress(round=round, run_tokens=200, peer_tokens={ME.peer_id: tokens})
    monkeypatch.setattr(
        roster_exchange, "state_of", lambda new: (OuterState(torch.zeros(6), torch.zeros(12)), progress)
    )
    monkeypatch.setattr(exchange, "offer", lambda state, progress: None)
    held: Any = None
    roster = mean(*sorted(each.peer_id for each in listed)).roster
    new = NewState(held=held, roster=roster, signed_roster=pb.Signed(), from_peer=BEN.peer_id, reason="missed a step")
    publish(exchange, monkeypatch, new)
    done, counted = Future[Any](), list[int]()
    done.set_result(None)
    monkeypatch.setattr(exchange.network, "submit", lambda work: (work.close(), done)[1])
    exchange._has_counted = lambda: counted.append(1)
    assert isinstance(exchange.collect(), Replaced)
    codes = [event.code for event in told if isinstance(event, WarningEvent)]
    assert (counted, codes) == (([1], []) if is_counted else ([], ["gradient-not-counted"]))


@pytest.mark.parametrize("is_replaced", [False, True])
def test_steps_ahead_are_not_told_for_the_round_that_has_ended(
    exchange_for: Callable[..., tuple[BatchExchange, list[Event]]],
    monkeypatch: pytest.MonkeyPatch,
    is_replaced: bool,
) -> None:
    """Not while the last gradient is encoded, nor once the mean is here and has not entered; and they are told if
    their weights are given up."""
    exchange, told = exchange_for(round=3)
    start = exchange.start_round(Progress(round=3, run_tokens=100), 2.0)
    for number in range(1, 4):
        exchange.step_done(number)
    exchange.step_done(start.inner_steps + 1)  # the worker has not published
    publish(exchange, monkeypatch, mean(BEN.peer_id))
    exchange.step_done(start.inner_steps + 2)  # the mean is here
    assert exchange.steps_done == exchange.swarm.rounds.inner_steps_done == 3 and exchange.num_steps == 5
    monkeypatch.undo()
    exchange._fresh = is_replaced
    exchange.start_round(Progress(round=4, run_tokens=200), 2.0)
    exchange.start_round(Progress(round=4, run_tokens=200), 2.0)
    messages = [event.message for event in told if isinstance(event, WarningEvent)]
    assert len(messages) == is_replaced and all(f"about {2 * STEP} tokens" in message for message in messages)

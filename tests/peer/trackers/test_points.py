"""Points of curves: names, values and steps, from events and statuses, without any tracker."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmtrain.events import EvalEvent, Event, InviteEvent, RoundEvent, StageThroughputEvent, WarningEvent
from swarmtrain.peer.trackers.points import Curves, Point, Position
from swarmtrain.v1 import control_pb2 as pb


def a_round(**changes: Any) -> RoundEvent:
    given = {"round": 6, "inner_steps": 64, "tokens": 1000, "run_tokens": 7000, "num_peers": 3, "loss": 2.5}
    given |= {"first_loss": 3.0, "learning_rate": 0.1, "seconds": 8.0, "merge_s": 1.5, "stall_s": 0.5}
    given |= {"bytes_sent": 10, "bytes_received": 20, "partners": ("P", "Q"), "weights": (1, 2)}
    return RoundEvent.model_validate(given | changes)


def a_status(**fields: Any) -> pb.PeerStatus:
    peers = [pb.SwarmPeer(peer=name, name=f"name of {name}", present=name != "gone") for name in ("P", "Q", "gone")]
    peers.append(pb.SwarmPeer(peer="B", present=True, bootstrap=True))
    known = {"run_tokens": 7000, "own_tokens": 2000, "swarm_tokens_per_s": 300.0, "own_tokens_per_s": 125.0, "round": 7}
    return pb.PeerStatus(**{**known, "sent_bytes": 4000, "received_bytes": 5000, "peers": peers, **fields})


def drawn(event: Event, status: pb.PeerStatus | None = None) -> Point:
    point = Curves(Position()).of_event(event, status or a_status(), 1.5)
    assert point is not None
    return point


def test_a_round_of_a_volunteer() -> None:
    assert drawn(a_round()) == Point(
        7000,
        1.5,
        {
            "train/loss": 2.5,
            "train/lr": 0.1,
            "train/round": 6.0,
            "train/tokens": 2000.0,
            "train/tokens_per_s": 125.0,
            "swarm/tokens": 7000.0,
            "swarm/tokens_per_s": 300.0,
            "swarm/peers": 3.0,
            "swarm/stall": 0.0625,
            "swarm/merge_s": 1.5,
            "link/sent_bytes": 4000.0,
            "link/received_bytes": 5000.0,
        },
    )


def test_what_only_some_rounds_have() -> None:
    values = drawn(
        a_round(grad_norm=0.7, staleness_rounds=(0, 2), consensus_spread=0.01, times_below_allreduce=25.0)
    ).values
    assert (values["train/grad_norm"], values["swarm/staleness_rounds"]) == (0.7, 2.0)
    assert (values["swarm/consensus_spread"], values["link/times_below_allreduce"]) == (0.01, 25.0)


def test_the_held_out_loss_with_the_runs_sources() -> None:
    event = EvalEvent(
        round=6, held_out_loss=1.5, bits_per_byte=2.2, own_loss=1.6, sources=("code", "prose"), source_losses=(1.0, 2.0)
    )
    assert drawn(event).values == {
        "eval/loss": 1.5,
        "eval/bits_per_byte": 2.2,
        "eval/own_loss": 1.6,
        "eval/loss/code": 1.0,
        "eval/loss/prose": 2.0,
    }


def test_a_stages_round_has_its_own_curves_and_the_peers() -> None:
    values = drawn(a_round(stage=2, grad_norm=0.5)).values
    assert values.keys() == {
        *("train/loss", "train/lr", "train/tokens", "train/tokens_per_s"),
        *("swarm/tokens", "swarm/tokens_per_s", "swarm/peers", "link/sent_bytes", "link/received_bytes"),
        *(f"stage-2/{name}" for name in ("loss", "lr", "round", "grad_norm", "peers", "merge_s", "stall")),
    }
    assert (values["stage-2/loss"], values["stage-2/peers"], values["swarm/peers"]) == (2.5, 3.0, 2.0)


def test_the_throughput_of_the_stages_that_a_peer_holds() -> None:
    event = StageThroughputEvent(stages=(0, 1), tokens_per_s=50.0, most_tokens_per_s=80.0, waiting=3, in_flight=2)
    values = drawn(event).values
    assert values["stage-0/tokens_per_s"] == values["stage-1/tokens_per_s"] == 50.0
    assert (values["stage-1/most_tokens_per_s"], values["stage-1/waiting"]) == (80.0, 3.0)


def test_a_bootstrap_draws_the_whole_run() -> None:
    stages = [pb.StageStatus(number=0, num_peers=2, tokens_per_s=50.0, most_tokens_per_s=80.0)]
    curves = Curves(Position())
    point = curves.of_status(a_status(swarm_loss=2.25, stages=stages), 3.0)
    assert point is not None and point.step == 7000
    assert point.values == {
        "train/loss": 2.25,
        "train/tokens": 7000.0,
        "train/tokens_per_s": 300.0,
        "train/round": 7.0,
        "swarm/tokens": 7000.0,
        "swarm/tokens_per_s": 300.0,
        "swarm/peers": 2.0,
        "link/sent_bytes": 4000.0,
        "link/received_bytes": 5000.0,
        "stage-0/peers": 2.0,
        "stage-0/tokens_per_s": 50.0,
        "stage-0/most_tokens_per_s": 80.0,
    }


def test_a_bootstrap_draws_nothing_while_nothing_happens() -> None:
    curves = Curves(Position())
    assert curves.of_status(a_status(run_tokens=0), 1.0) is None, "nobody has trained yet"
    assert curves.of_status(a_status(), 2.0) is not None
    assert curves.of_status(a_status(sent_bytes=9000), 3.0) is None, "only its traffic has grown"
    left = curves.of_status(a_status(peers=[]), 4.0)
    assert left is not None and left.values["swarm/peers"] == 0.0 and left.step == 7001


def test_other_events_make_no_point() -> None:
    curves = Curves(Position())
    invite = InviteEvent(line="swarmtrain join st1x", invite="st1x", run_sha256="ab", addresses=())
    for event in (invite, WarningEvent(message="a name of somebody")):
        assert curves.of_event(event, a_status(), 0.0) is None


@given(st.lists(st.integers(0, 50), min_size=1, max_size=30), st.integers(0, 40))
def test_steps_always_rise_whatever_the_runs_tokens_do(tokens: list[int], last: int) -> None:
    """Two rounds with the same tokens, a run that went back, and a process that begins where the last one ended."""
    curves, steps = Curves(Position(step=last)), [last]
    for number in tokens:
        point = curves.of_event(a_round(run_tokens=number), a_status(), 0.0)
        assert point is not None
        steps.append(point.step)
    assert all(before < after for before, after in itertools.pairwise(steps))
    assert steps[-1] >= max(tokens)


def test_traffic_is_that_of_all_processes_and_never_falls() -> None:
    curves = Curves(Position(step=10, sent_bytes=1_000_000, received_bytes=5))
    first = curves.of_event(a_round(), a_status(), 0.0)
    second = curves.of_event(a_round(), a_status(sent_bytes=3000), 0.0)  # as while it says goodbye
    assert first is not None and second is not None
    assert first.values["link/sent_bytes"] == second.values["link/sent_bytes"] == 1_004_000.0
    assert curves.position == Position(step=7001, sent_bytes=1_004_000, received_bytes=5005)


def test_losses_from_before_are_drawn_once() -> None:
    given = [(1, 1.0), (2, 0.0), (3, 5.0)]
    losses = [pb.LossPoint(round=n, run_tokens=100 * n, loss=4.0 - n, held_out_loss=n % 2, time=at) for n, at in given]
    curves = Curves(Position(step=150))
    points = curves.of_past(losses, 9.0)
    assert [(point.step, point.time) for point in points] == [(200, 9.0), (300, 5.0)]
    assert points[1].values == {"train/loss": 1.0, "train/round": 3.0, "swarm/tokens": 300.0, "eval/loss": 1.0}
    assert curves.of_past(losses, 9.0) == []


def test_a_status_without_a_speed_draws_no_infinity() -> None:
    point = drawn(a_round(seconds=0.0), a_status(swarm_tokens_per_s=math.inf))
    assert "train/tokens_per_s" not in point.values and "swarm/tokens_per_s" not in point.values


@pytest.mark.parametrize("event", [a_round(), a_round(stage=1), EvalEvent(round=1, held_out_loss=2.0)])
def test_a_point_says_nothing_of_other_peers(event: Event) -> None:
    point = drawn(event)
    assert all(isinstance(value, float) for value in point.values.values())
    assert not [name for name in point.values if "name of" in name or "P" in name or "Q" in name]

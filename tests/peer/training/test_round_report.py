"""Reports of a peer: all carry its PeerID, the error that ends it too; what a round says of its merge."""

from __future__ import annotations

import hashlib
import json
import struct

import pytest
import torch

from swarmtrain.algorithm.gossip import layout_of, prepare
from swarmtrain.algorithm.outer import OuterState
from swarmtrain.cli.common import PeerOptions, open_sink
from swarmtrain.errors import RunTimeError
from swarmtrain.events import WarningEvent
from swarmtrain.peer.control.board import StatusBoard
from swarmtrain.peer.control.logs import logged
from swarmtrain.peer.lifecycle.node import as_peer
from swarmtrain.peer.merging.updates import Averaged, Gathered, LocalUpdate, OuterUpdate
from swarmtrain.peer.training.round_report import what_was_merged
from swarmtrain.peer.training.session import RoundReport
from swarmtrain.protocol.gossip.fragments import FragmentRound
from swarmtrain.protocol.tokens.progress import Progress


def test_an_error_after_the_peer_is_known_says_whose_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    options = PeerOptions(dir=None, name="", json=True, listen=(), announce=(), log_level="warning")
    with pytest.raises(RunTimeError), open_sink(options, lambda: pytest.fail("no display with --json")) as emit:
        emit(WarningEvent(message="too early to be anybody's"))
        on_its_way = StatusBoard("volunteer", 0.0).listening(logged(emit))  # as a peer's events go
        as_peer(on_its_way, "12D3KooWme", "anna")(WarningEvent(message="mine"))
        raise RunTimeError("the network daemon was ended by SIGKILL; start this peer again")
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(event["event"], event["peer"], event["name"]) for event in told] == [
        ("warning", "", ""),
        ("warning", "12D3KooWme", "anna"),
        ("error", "12D3KooWme", "anna"),
    ]


def finished(*arrived: OuterUpdate) -> RoundReport:
    theta = torch.tensor([1.0, 2.0])
    own = LocalUpdate(
        round=3,
        part=1,
        thetas=(theta,),
        fragment_rounds=(FragmentRound(3, 1, 64, 4),),
        reached=theta,
        tokens=64,
        inner_steps=4,
        own_tokens=64,
        base="ab" * 32,
    )
    return RoundReport(
        contribution=own,
        arrived=arrived,
        progress=Progress(round=4),
        num_peers=2,
        loss=2.0,
        first_loss=2.5,
        learning_rate=1e-3,
        grad_norm=0.5,
        seconds=1.0,
        merge_s=0.0,
        stall_s=0.0,
        state=OuterState(theta, torch.zeros(2)),
    )


def test_only_weights_that_others_have_too_are_hashed() -> None:
    averaged = Averaged(gradient=torch.zeros(2), partners=("a", "b"), weights=(1, 2), signer="a", roster_sha256="ab")
    told = what_was_merged(finished(averaged))
    assert told["state_sha256"] == hashlib.sha256(struct.pack("<2f", 1.0, 2.0)).hexdigest()
    prepared = prepare(finished(averaged).state, [], layout_of([(2,)]), 0.7)
    gathered = Gathered(prepared=prepared, merged=(), run_tokens=64, peer_tokens={})
    assert "state_sha256" not in what_was_merged(finished(gathered))

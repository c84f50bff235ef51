"""Whose an event is: everything a peer says carries its PeerID, the error that ends it too."""

from __future__ import annotations

import json

import pytest

from swarmtrain.cli.common import PeerOptions, open_sink
from swarmtrain.errors import RunTimeError
from swarmtrain.events import WarningEvent
from swarmtrain.peer.board import StatusBoard
from swarmtrain.peer.common import as_peer
from swarmtrain.peer.logs import logged


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

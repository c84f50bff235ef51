"""What a person who joins is told: no invite unasked, and a next step that helps."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from swarmtrain.cli.facts import _start_again
from swarmtrain.cli.join import _in_short
from swarmtrain.events import Event, InviteEvent, JoinedEvent, PeerJoinedEvent, StartedEvent
from swarmtrain.peer.lifecycle.start_options import Started, StartedFile


def test_a_person_who_joins_gets_the_invite_only_on_request() -> None:
    shown: list[Event] = []
    emit = _in_short(shown.append)
    emit(InviteEvent(line="swarmtrain join x", invite="x", run_sha256="ab", addresses=()))
    emit(JoinedEvent(round=1, run_tokens=0, num_peers=1, state_from="", wall_s=0.0))
    assert [event.event for event in shown] == ["joined"]


def test_the_peers_that_are_here_already_are_no_news_and_who_comes_later_is() -> None:
    shown: list[Event] = []
    emit = _in_short(shown.append)
    for number in range(30):
        emit(PeerJoinedEvent(joined=f"peer-{number}"))
    emit(StartedEvent(inner_steps_per_round=3, num_parameters=9, total_tokens=9, startup_s=1.0))
    emit(PeerJoinedEvent(joined="ben"))
    assert [event.event for event in shown] == ["started", "peer_joined"]


def test_a_join_that_fetched_no_run_is_started_again_with_a_new_invite(tmp_path: Path) -> None:
    StartedFile(tmp_path).keep_command(Started(("join",), {}))
    view = cast(Any, SimpleNamespace(folder=tmp_path, status=None))
    assert "ask for a new invite" in _start_again(view), "`join` alone would find no run to continue"
    (tmp_path / "run.toml").write_text("")
    assert _start_again(view).startswith("start it again with `swarmtrain join --dir")

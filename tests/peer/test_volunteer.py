"""Lifecycle of a volunteer: the order of its steps, whatever ends or pauses it, and that it always leaves cleanly."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from codes import raises_code

from swarmtrain.errors import RunTimeError, UserError
from swarmtrain.events import DoneEvent, Event, PausedEvent, ResumedEvent
from swarmtrain.network.discovery.invite import Invite
from swarmtrain.peer import volunteer as module
from swarmtrain.peer.control.session import control_session
from swarmtrain.peer.lifecycle.folder import peer_folder
from swarmtrain.peer.lifecycle.node import PeerSettings
from swarmtrain.peer.lifecycle.stop import Interrupted, StopFlag
from swarmtrain.peer.volunteer import Volunteer
from swarmtrain.run import RunFile


class Life:
    """Volunteer whose training records its steps, and does in each what a test says."""

    round = 7

    def __init__(self, volunteer: Volunteer, events: list[Event]) -> None:
        self.volunteer, self.events, self.steps = volunteer, events, list[str]()
        self.during: dict[str, list[Callable[[], object]]] = {}
        self.swarm: Any = SimpleNamespace(come_back=lambda: "come back")

    def live(self) -> DoneEvent:
        network: Any = None
        return self.volunteer.live(network)

    def take(self, step: str) -> None:
        self.steps.append(step)
        if self.during.get(step):
            self.during[step].pop(0)()

    def done(self, reason: str) -> DoneEvent:
        return DoneEvent(held_out_loss=None, tokens=5, run_tokens=9, wall_s=1.0, reason=reason)

    def enter(self) -> None:
        self.take("enter")

    def join(self) -> None:
        self.take("join")

    def train(self) -> bool:
        self.take("train")
        self.volunteer.stop.check()
        return not self.volunteer.pause.held

    def withdraw(self) -> None:
        self.take("withdraw")

    def come_back(self) -> None:
        self.take("come back")

    def finish(self) -> DoneEvent:
        self.take("finish")
        return self.done("total_tokens")

    def hand_over(self) -> DoneEvent:
        self.take("hand over")
        return self.done(self.volunteer.stop.reason)

    def leave(self) -> None:
        self.take("leave")

    def look(self, what: str) -> None:
        """Look, in the network thread."""
        self.take("look who is here" if what == "come back" else what)


@pytest.fixture
def life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Life]:
    events: list[Event] = []
    settings, stop = PeerSettings(directory=tmp_path, name="anna"), StopFlag()
    with (
        peer_folder(tmp_path) as folder,
        control_session("volunteer", folder, settings, events.append, stop) as control,
    ):
        volunteer = Volunteer(Invite("ab" * 32, ()), settings, folder, control)
        one = Life(volunteer, events)
        run = SimpleNamespace(pipeline=SimpleNamespace(stages=1))
        monkeypatch.setattr(module, "start_node", lambda *what: one.take("start the node"))
        monkeypatch.setattr(module, "leave_swarm", lambda network, swarm, node: one.take("end the network"))
        monkeypatch.setattr(volunteer, "_fetch_run", lambda *what: SimpleNamespace(run=run, wait=one.look))
        monkeypatch.setattr(module, "prepare_model", lambda context: one)
        yield one


@pytest.mark.parametrize("stages", [1, 2])
def test_a_rank_that_is_not_possible_is_found_out_before_the_models_files_are_fetched(
    stages: int, life: Life, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunFile.model_validate({"run": {"total_tokens": 10**6}, "pipeline": {"stages": stages}})
    found = SimpleNamespace(run=run, model_files=b"some")
    monkeypatch.setattr(module, "RunFetcher", lambda **given: SimpleNamespace(fetch=lambda: (found, None)))
    monkeypatch.setattr(module, "fetch_and_serve", lambda *given: life.take("fetch the model's files"))
    one: Any = SimpleNamespace(**vars(life.volunteer))
    one.settings = PeerSettings(directory=Path(), name="anna", adapter_rank=4)
    one.limits = SimpleNamespace(limit_link=lambda *given: None)
    with raises_code("rank-not-possible", UserError, "leave --rank out"):
        Volunteer._fetch_run(one, None, SimpleNamespace(traffic=None))  # type: ignore[arg-type]
    assert not life.steps


def resume_soon(life: Life) -> None:
    """Resume it as soon as it is paused."""
    sleep = life.volunteer.stop.sleep

    def resume(seconds: float) -> None:
        life.steps.append("rest")
        life.volunteer.pause.release("asked")
        sleep(0.0)

    life.volunteer.stop.sleep = resume  # type: ignore[method-assign]


def pause(life: Life) -> None:
    life.volunteer.pause.hold("asked", "you asked for it")


BEFORE = ["start the node", "enter"]
RESTED = ["rest", "look who is here"]


def test_to_the_end(life: Life) -> None:
    done = life.live()
    assert (done.reason, done.tokens, done.peer, done.name) == ("total_tokens", 5, life.volunteer.me, "anna")
    assert life.steps == [*BEFORE, "join", "train", "finish", "leave"]


def test_a_pause_is_told_once_the_others_know_and_is_over_once_it_is_back(life: Life) -> None:
    resume_soon(life)
    life.during["train"] = [lambda: pause(life)]
    told: list[list[type[Event]]] = []
    for step in ("withdraw", "look who is here"):
        life.during[step] = [lambda: told.append([type(event) for event in life.events])]
    life.live()
    assert life.steps == [*BEFORE, "join", "train", "withdraw", *RESTED, "come back", "train", "finish", "leave"]
    assert told == [[], [PausedEvent]]
    paused, resumed = life.events
    assert isinstance(paused, PausedEvent) and paused.reason == "you asked for it"
    assert isinstance(resumed, ResumedEvent) and resumed.round == 7


def test_one_that_is_paused_when_it_starts_says_nothing_of_itself_before_it_is_resumed(life: Life) -> None:
    resume_soon(life)
    pause(life)
    life.live()
    assert life.steps == [*BEFORE, *RESTED, "join", "train", "finish", "leave"]
    assert [type(event) for event in life.events] == [PausedEvent], "it is not back: it has not been there"


@pytest.mark.parametrize("step", ["enter", "join", "train", "withdraw", "look who is here", "come back", "finish"])
def test_whenever_an_end_is_asked_for_it_hands_over_and_says_goodbye(life: Life, step: str) -> None:
    def end() -> None:
        life.volunteer.stop.stop("asked")
        raise Interrupted

    resume_soon(life)
    if step in ("withdraw", "look who is here", "come back"):
        life.during["train"] = [lambda: pause(life)]
    life.during[step] = [end]
    assert life.live().reason == "asked"
    assert life.steps[-3:] == [step, "hand over", "leave"]


def test_an_end_before_there_is_anything_to_train(life: Life) -> None:
    life.during["start the node"] = [life.volunteer.stop.stop]
    life.volunteer._fetch_run = lambda *what: life.volunteer.stop.check()  # type: ignore[method-assign, assignment]
    done = life.live()
    assert (done.reason, done.tokens, done.peer) == ("interrupted", 0, life.volunteer.me)
    assert life.steps == ["start the node", "end the network"]


@pytest.mark.parametrize("step", ["start the node", "join", "train", "finish"])
def test_what_fails_it_is_raised_after_its_goodbye(life: Life, step: str) -> None:
    def fail() -> None:
        raise RunTimeError("no room", code="folder-not-writable")

    life.during[step] = [fail]
    with raises_code("folder-not-writable", RunTimeError):
        life.live()
    assert life.steps[-2:] == [step, "end the network" if step == "start the node" else "leave"]

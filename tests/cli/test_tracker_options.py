"""`--report-to`: what is typed, remembered, passed on and refused."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

import pytest
from codes import codes_in

from swarmtrain.cli import local
from swarmtrain.cli.main import run
from swarmtrain.errors import UserError
from swarmtrain.events import DoneEvent
from swarmtrain.network.discovery.invite import Invite, InvitedPeer, format_invite
from swarmtrain.network.identity import new_identity
from swarmtrain.peer.lifecycle.node import PeerSettings
from swarmtrain.peer.lifecycle.start_options import StartedFile

INVITE = format_invite(Invite("ab" * 32, (InvitedPeer(new_identity(bytes(32)).peer_id, ("/ip4/127.0.0.1/tcp/1",)),)))
DONE = DoneEvent(held_out_loss=None, tokens=0, run_tokens=0, wall_s=0.0, reason="asked")


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Trackers that seem to be installed."""
    found = {"tensorboard", "wandb"}
    known = importlib.metadata.distribution

    def distribution(name: str) -> Any:
        if name not in ("tensorboard", "wandb", "trackio"):
            return known(name)
        if name not in found:
            raise importlib.metadata.PackageNotFoundError(name)
        return None

    monkeypatch.setattr(importlib.metadata, "distribution", distribution)
    return found


@pytest.fixture
def lives(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, installed: set[str]) -> list[PeerSettings]:
    """Collect the settings of each peer that is started, without running it."""
    found: list[PeerSettings] = []

    def live(*args: Any) -> DoneEvent:
        settings = next(item for item in args if isinstance(item, PeerSettings))
        settings.directory.mkdir(exist_ok=True)
        StartedFile(settings.directory).keep_command(settings.started)
        found.append(settings)
        return DONE

    monkeypatch.setattr("swarmtrain.peer.volunteer.run_volunteer", live)
    monkeypatch.setattr("swarmtrain.peer.bootstrap.run_bootstrap", live)
    monkeypatch.setattr("swarmtrain.cli.join._of_folder", lambda directory: None)
    monkeypatch.chdir(tmp_path)
    return found


def test_several_are_given_by_commas_or_one_by_one_and_remembered_until_none(lives: list[PeerSettings]) -> None:
    for command in ["join"], ["bootstrap", "stdlib-gpt"]:
        lives.clear()
        for words in (
            [],
            ["--report-to", "tensorboard, wandb"],
            ["--name", "anna"],
            ["--report-to", "wandb", "--report-to", "tensorboard", "--report-to", "wandb"],
            ["--report-to", "none"],
            [],
        ):
            assert run([*command, "--dir", f"peer-{command[0]}", *words]) == 0
        both = ("tensorboard", "wandb")
        assert [each.report_to for each in lives] == [(), both, both, both[::-1], (), ()]


def test_a_word_that_is_no_tracker_and_one_that_is_not_installed(
    lives: list[PeerSettings], installed: set[str], capsys: pytest.CaptureFixture[str]
) -> None:
    for words in (["join", INVITE], ["bootstrap", "stdlib-gpt"], ["local", "stdlib-gpt"]):
        assert run([*words, "--report-to", "tensorboard,mlflow"]) == 2
        said = capsys.readouterr().err
        assert codes_in(said) == ["bad-tracker"] and "'mlflow'" in said and "tensorboard, wandb or trackio" in said
        assert run([*words, "--report-to", "trackio"]) == 2
        said = capsys.readouterr().err
        assert codes_in(said) == ["package-missing"] and "pip install 'trackio>=" in said
    assert lives == []
    assert run(["join", "--dir", "peer", "--report-to", "wandb"]) == 0
    installed.clear()
    assert run(["join", "--dir", "peer"]) == 2
    assert codes_in(capsys.readouterr().err) == ["kept-option"]
    assert run(["join", "--dir", "peer", "--report-to", "none"]) == 0, "it is in nobody's way"


def test_local_passes_them_to_all_its_peers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, installed: set[str], capsys: pytest.CaptureFixture[str]
) -> None:
    plans: list[Any] = []

    def train(plan: Any, stop: object, page: object) -> None:
        plans.append(plan)
        raise UserError("enough; end this", code="peer-failed")

    monkeypatch.setattr(local, "_train", train)
    folder = tmp_path / "all of them"
    given = ["local", "stdlib-gpt", "--peers", "2", "--dir", str(folder)]
    assert run([*given, "--report-to", "tensorboard,wandb"]) == 2
    assert f"curves of all peers: tensorboard --logdir '{folder}'\n" in capsys.readouterr().err
    assert run(given) == 2
    assert "curves" not in capsys.readouterr().err
    words = {"--report-to=tensorboard", "--report-to=wandb"}
    for each in (plans[0].run_arguments, *plans[0].extra):
        assert words <= set(each)
    for each in (plans[1].run_arguments, *plans[1].extra):
        assert not [word for word in each if "report" in word]

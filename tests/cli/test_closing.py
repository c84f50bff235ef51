"""Last line that a peer's command prints."""

from __future__ import annotations

import json
from pathlib import Path

import click
import pytest

from swarmtrain.cli.closing_line import closing_line, go_on_line
from swarmtrain.cli.common import PeerOptions, say_the_end
from swarmtrain.events import DoneEvent
from swarmtrain.model.provenance import Provenance
from swarmtrain.peer.checkpoints.files import CheckpointFolder
from swarmtrain.peer.lifecycle.start_options import Started, StartedFile
from swarmtrain.run import run_sha256


def done(reason: str) -> DoneEvent:
    return DoneEvent(held_out_loss=None, tokens=1, run_tokens=2, wall_s=3.0, reason=reason)


def options(folder: Path | None, *, json: bool = False) -> PeerOptions:
    return PeerOptions(dir=folder, name="anna", json=json, listen=(), announce=(), log_level="warning")


def provenance(run_tokens: int) -> Provenance:
    return Provenance(
        section=None, context_tokens=8, run_tokens=run_tokens, weights_sha256={"model.safetensors": "ab" * 32}
    )


def test_the_end_of_a_run_says_where_the_model_is_and_what_to_do_with_it(tmp_path: Path) -> None:
    folder = tmp_path / "my run"
    assert closing_line(done("total_tokens"), folder, is_usual=True) == "", "one that held stages has no model"
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "config.json").touch()
    model = f"'{folder / 'model'}'"
    assert closing_line(done("total_tokens"), folder, is_usual=True) == (
        f"the model is in {model}; try: swarmtrain generate {model}"
    )


def test_who_was_interrupted_learns_how_to_go_on_and_from_where(tmp_path: Path) -> None:
    (tmp_path / "early").mkdir()
    StartedFile(tmp_path / "early").keep_command(Started(("join",), {}))
    assert go_on_line(tmp_path / "early") == "", "it had no run yet"
    (tmp_path / "run.toml").write_bytes(b"the run")
    assert go_on_line(tmp_path) == "", "nobody knows how it was started"
    StartedFile(tmp_path).keep_command(Started(("join",), {"--name": ("anna",), "--threads": ("2",)}))
    assert closing_line(done("interrupted"), tmp_path, is_usual=True) == "`swarmtrain join --name anna` continues"
    line = f"swarmtrain join --dir {tmp_path}"
    assert closing_line(done("asked"), tmp_path, is_usual=False) == f"`{line}` continues", "its folder knows the rest"
    CheckpointFolder(tmp_path / "checkpoints", run_sha256(b"the run"), "peer").write(7, [], {})
    assert go_on_line(tmp_path) == f"`{line}` continues from round 7"


def test_who_is_interrupted_when_the_run_has_its_tokens_has_the_model_and_nothing_to_go_on_with(tmp_path: Path) -> None:
    """As a bootstrap that waits for the last volunteers to leave."""
    (tmp_path / "run.toml").write_bytes(b"the run")
    StartedFile(tmp_path).keep_command(Started(("join",), {}))
    go_on, status = f"`swarmtrain join --dir {tmp_path}` continues", tmp_path / "status.json"
    status.write_text(json.dumps({"pid": 7, "total_tokens": 100, "run_tokens": 100}))
    assert closing_line(done("interrupted"), tmp_path, is_usual=False) == go_on, "its model is not written yet"
    (tmp_path / "model").mkdir()
    config = tmp_path / "model" / "config.json"
    config.write_text(json.dumps(provenance(99).into({})))
    assert closing_line(done("interrupted"), tmp_path, is_usual=False) == go_on, "a model of before the end"
    config.write_text(json.dumps(provenance(100).into({})))
    assert closing_line(done("interrupted"), tmp_path, is_usual=False).startswith(f"the model is in {tmp_path}/model")


def test_a_reader_that_is_gone_costs_the_last_line_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    StartedFile(tmp_path).keep_command(Started(("join",), {}))
    (tmp_path / "run.toml").touch()
    said: list[str] = []

    def gone(line: str, **how: bool) -> None:
        said.append(line)
        raise BrokenPipeError

    monkeypatch.setattr(click, "echo", gone)
    say_the_end(done("interrupted"), tmp_path, options(tmp_path), tmp_path)
    assert said == ["`swarmtrain join` continues"]


def test_programs_and_the_background_are_told_by_events_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    StartedFile(tmp_path).keep_command(Started(("join",), {}))
    (tmp_path / "run.toml").touch()
    say_the_end(done("interrupted"), tmp_path, options(None, json=True), tmp_path)
    assert capsys.readouterr() == ("", "")
    say_the_end(done("interrupted"), tmp_path, options(tmp_path), tmp_path / "usual")
    assert capsys.readouterr() == ("", f"`swarmtrain join --dir {tmp_path}` continues\n")
    say_the_end(done("interrupted"), tmp_path, options(None), tmp_path)
    assert capsys.readouterr() == ("", "`swarmtrain join` continues\n")

"""Files of a run's model as its bootstrap has them, from the run file to the place where they are served."""

from __future__ import annotations

from pathlib import Path

import pytest
from codes import raises_code
from model_files import CONTENTS, write_model
from small_hub import SmallHub, small_hub
from small_models import run_of

from swarmtrain.errors import RunFileError
from swarmtrain.events import Event
from swarmtrain.model.base import with_base_path
from swarmtrain.peer.bootstrap import run_bootstrap
from swarmtrain.peer.control.arrival import FileProgress
from swarmtrain.peer.control.board import StatusBoard
from swarmtrain.peer.lifecycle.node import PeerSettings
from swarmtrain.peer.lifecycle.stop import StopFlag
from swarmtrain.peer.model_files import fetcher as fetcher_module
from swarmtrain.peer.model_files.base_files import pin_base, place_of_base
from swarmtrain.peer.model_files.fetcher import FilesPlace
from swarmtrain.run import RunFile, parse_run


@pytest.fixture
def place(tmp_path: Path) -> FilesPlace:
    events = list[Event]()
    progress = FileProgress(StatusBoard("bootstrap", 0.0), events.append)
    return FilesPlace(cache=tmp_path / "cache", progress=progress, emit=events.append, stop=StopFlag())


def test_a_folder_is_pinned_and_served_where_it_is(tmp_path: Path, place: FilesPlace) -> None:
    write_model(tmp_path / "tiny")
    run = with_base_path(run_of("tiny"), tmp_path)
    found, where = pin_base(run, tmp_path, place), place_of_base(run, tmp_path, place)
    assert found is not None and where is not None
    assert (found.folder, where.given) == (tmp_path / "tiny", tmp_path / "tiny")
    assert [file.name for file in found.pinned.files] == sorted(CONTENTS)
    scratch = pin_base(run_of("tiny", "from_scratch = true"), tmp_path, place)
    assert scratch is not None and [file.name for file in scratch.pinned.files] == ["config.json"]


def test_a_model_of_the_hub_is_downloaded_and_pinned(
    tmp_path: Path, place: FilesPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("huggingface_hub")
    with small_hub() as hub:
        hub.use_in(monkeypatch, tmp_path / "hub-cache")
        commit = _pushed(hub, tmp_path)
        run = run_of(f"anna/tiny@{commit}")
        found, where = pin_base(run, tmp_path, place), place_of_base(run, tmp_path, place)
        assert found is not None and where is not None and where.given is None
        assert found.pinned == _pinned_of(tmp_path, place)


def test_a_file_that_is_not_what_the_hub_has_is_not_published(
    tmp_path: Path, place: FilesPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("huggingface_hub")
    with small_hub() as hub:
        hub.use_in(monkeypatch, tmp_path / "hub-cache")
        run = run_of(f"anna/tiny@{_pushed(hub, tmp_path)}")
        first = pin_base(run, tmp_path, place)
        assert first is not None
        (first.folder / "model.safetensors").write_bytes(CONTENTS["model.safetensors"][::-1])
        with raises_code("hub-file-damaged", RunFileError, "model.safetensors is not what the hub has") as raised:
            pin_base(run, tmp_path, place)
        damaged = Path(str(raised.value).partition("delete ")[2].partition(" and")[0])
        assert damaged.read_bytes() == CONTENTS["model.safetensors"][::-1]
        damaged.unlink()
        found = pin_base(run, tmp_path, place)
        assert found is not None and found.pinned == _pinned_of(tmp_path, place)


def _pushed(hub: SmallHub, folder: Path) -> str:
    return hub.push_folder("anna/tiny", write_model(folder / "pushed"))


def _pinned_of(folder: Path, place: FilesPlace) -> object:
    found = pin_base(run_of("pushed"), folder, place)
    assert found is not None
    return found.pinned


def test_a_built_in_model_has_no_files(tmp_path: Path, place: FilesPlace) -> None:
    run: RunFile = parse_run("[run]\ntotal_tokens = 100_000\n", "run.toml")
    assert pin_base(run, tmp_path, place) is None and place_of_base(run, tmp_path, place) is None


def test_a_bootstrap_that_is_ended_while_it_hashes_ends_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop = StopFlag()

    def ends(*_: object) -> None:
        stop.stop("asked")
        stop.check()

    monkeypatch.setattr("swarmtrain.peer.bootstrap.resolved_run", lambda run, base: run)
    monkeypatch.setattr(fetcher_module, "pinned_list", ends)
    write_model(tmp_path / "tiny")
    stop.begin()
    settings = PeerSettings(directory=tmp_path / "bootstrap", name="b")
    done = run_bootstrap(with_base_path(run_of("tiny"), tmp_path), tmp_path, settings, lambda event: None, stop)
    assert (done.reason, done.run_tokens) == ("asked", 0)

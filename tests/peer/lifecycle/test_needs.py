"""What a run takes of this machine is said and checked before anything large is fetched."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from codes import raises_code

from swarmtrain.errors import RunTimeError, UserError
from swarmtrain.machine_memory import Memory
from swarmtrain.network.discovery.run_lookup import PublishedRun
from swarmtrain.peer import volunteer
from swarmtrain.peer.lifecycle import needs as module
from swarmtrain.peer.lifecycle.needs import Needs, check_needs, needs_of
from swarmtrain.peer.lifecycle.node import PeerSettings
from swarmtrain.peer.lifecycle.stop import StopFlag
from swarmtrain.protocol.limits import Limits
from swarmtrain.protocol.pinned_files.file_list import PinnedFile, PinnedFiles
from swarmtrain.run import parse_run

GB = 10**9
FILES = PinnedFiles(
    (PinnedFile("config.json", 500, "ab" * 32), PinnedFile("model.safetensors", 3 * GB, "ab" * 32, "cd" * 32))
)


def published() -> PublishedRun:
    run = parse_run("[run]\ntotal_tokens = 100_000\n", "run.toml")
    return PublishedRun(b"", "ab" * 32, run, b"text", b"", FILES.to_bytes())


def settings(folder: Path, **more: Any) -> PeerSettings:
    return PeerSettings(directory=folder, name="anna", **more)


def test_what_a_run_takes_is_said_by_its_parts(tmp_path: Path) -> None:
    needs = needs_of(published(), settings(tmp_path))
    assert needs.model_bytes == 3 * GB + 500 and needs.data_bytes == 0 and needs.memory_bytes > 10**8
    assert needs_of(published(), settings(tmp_path, model_folder=tmp_path)).model_bytes == 0, "its files are here"
    assert str(Needs(GB, 3 * GB, 2 * GB, GB)) == (
        "about 1 GB of memory and 6 GB on the disk (model 3 GB, data 2 GB, checkpoints 1 GB)"
    )
    assert str(Needs(GB, 0, None, GB)).endswith("(checkpoints 1 GB; the size of its data is not known)")


def test_the_data_of_the_hub_counts_as_often_as_it_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = '[run]\ntotal_tokens = 100_000\n[data]\nsource = "datasets"\ndataset = "anna/stories"\n'
    run = parse_run(text, "run.toml")
    sizes = {"anna/stories": GB}
    monkeypatch.setattr("swarmtrain.data.huggingface.files_bytes", lambda source, revision: sizes.get(source.dataset))
    monkeypatch.setattr(type(run), "dataset_revisions", ("a" * 40,))
    of_hub = PublishedRun(b"", "ab" * 32, run, b"text", b"")
    assert needs_of(of_hub, settings(tmp_path)).data_bytes == 4 * GB
    sizes.clear()
    assert needs_of(of_hub, settings(tmp_path)).data_bytes is None


def test_a_run_that_takes_more_than_is_allowed_or_there_is_refused_unless_a_person_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs, run = Needs(GB, 3 * GB, 0, GB), published()
    monkeypatch.setattr(module, "machine_memory", lambda: Memory(8 * GB, 4 * GB))
    monkeypatch.setattr(module, "find_devices", lambda parameters: [])
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=9 * GB))
    check_needs(needs, run, settings(tmp_path))
    check_needs(needs, run, settings(tmp_path, disk_bytes=4 * GB))
    with raises_code("takes-much", RunTimeError, "--disk allows 3 GB: allow more with --disk"):
        check_needs(needs, run, settings(tmp_path, disk_bytes=3 * GB))
    check_needs(needs, run, settings(tmp_path, disk_bytes=3 * GB, accept_size=True))
    with raises_code("takes-much", RunTimeError, "this machine has 8 GB of memory"):
        check_needs(needs._replace(memory_bytes=9 * GB), run, settings(tmp_path))
    with raises_code("too-little-memory", UserError, "--memory allows"):
        check_needs(needs, run, settings(tmp_path, limits=Limits(memory_bytes=10**6), accept_size=True))
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=GB - 1000))
    with raises_code("takes-much", RunTimeError, "has 1 GB left: make room"):
        check_needs(needs, run, settings(tmp_path))
    (tmp_path / "state").write_bytes(b"x" * 1000)
    check_needs(needs, run, settings(tmp_path))


def test_nothing_is_fetched_before_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nothing: Any = lambda *args, **more: None  # noqa: E731
    fetcher = SimpleNamespace(fetch=lambda: (published(), None), needs=Needs(GB, 3 * GB, 0, GB), through=())
    monkeypatch.setattr(volunteer, "RunFetcher", lambda **more: fetcher)
    monkeypatch.setattr(volunteer, "fetch_and_serve", lambda *args: pytest.fail("files are fetched"))
    peer: Any = object.__new__(volunteer.Volunteer)
    peer.settings, peer.stop, peer.emit = settings(tmp_path, disk_bytes=GB), StopFlag(), nothing
    peer.invite = peer.folder = None
    peer.control, peer.limits = SimpleNamespace(starting=nothing), SimpleNamespace(limit_link=nothing)
    with raises_code("takes-much", RunTimeError, "3 GB"):
        peer._fetch_run(None, SimpleNamespace(traffic=None))

"""`swarmtrain doctor` of a run with a model of Hugging Face: which files are here, and where the others come from."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from model_files import CONTENTS, WEIGHTS, model_folder, pinned, write_model
from small_hub import small_hub
from small_models import run_of

from swarmtrain.errors import UnreachableError
from swarmtrain.peer.doctor import doctor as doctor_module
from swarmtrain.peer.doctor.doctor import Doctor, DoctorSettings
from swarmtrain.peer.doctor.machine import Finding
from swarmtrain.peer.doctor.model_files import check_model_files, find_model_files
from swarmtrain.peer.model_files.model_folder import ModelFolder
from swarmtrain.protocol.pinned_files.file_list import PinnedFiles


@pytest.fixture
def files(tmp_path: Path) -> PinnedFiles:
    return pinned(write_model(tmp_path / "source"))


def looked(tmp_path: Path, files: PinnedFiles, base: str = "tiny", num_peers: int = 1) -> Finding:
    run = run_of(base)
    return check_model_files(run, find_model_files(run, files, tmp_path / "cache"), num_peers)


def test_files_that_are_here_are_all_well(tmp_path: Path, files: PinnedFiles) -> None:
    model_folder(tmp_path / "cache", tmp_path / "source", files)
    finding = looked(tmp_path, files, num_peers=0)
    assert (finding.level, finding.advice) == ("ok", "")
    assert finding.found == "tiny, from its weights: 2 files, 5.24 MB, all here"


def test_files_that_are_not_here_come_from_peers_and_without_one_it_is_a_problem(
    tmp_path: Path, files: PinnedFiles
) -> None:
    folder = model_folder(tmp_path / "cache", tmp_path / "source", files).path
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.part").write_bytes(WEIGHTS[: 2**21])
    finding = looked(tmp_path, files)
    assert finding.level == "ok" and finding.found.endswith(
        "5.24 MB; 1 file of them not here, 3.15 MB to fetch from other peers"
    )
    finding = looked(tmp_path, files, num_peers=0)
    assert finding.level == "problem" and "no peer answers" in finding.found and "--model-dir" in finding.advice


def test_a_disk_without_room_is_a_problem(tmp_path: Path, files: PinnedFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    finding = looked(tmp_path, files)
    assert finding.level == "problem" and "the disk has 1 kB free" in finding.found and "make room" in finding.advice


def test_the_hub_is_asked_whether_it_has_them(
    tmp_path: Path, files: PinnedFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("huggingface_hub")
    with small_hub() as hub:
        hub.use_in(monkeypatch, tmp_path / "hub-cache")
        base = f"anna/tiny@{hub.push_folder('anna/tiny', tmp_path / 'source')}"
        finding = looked(tmp_path, files, base, num_peers=0)
        assert finding.level == "ok" and finding.found.endswith("from the hub, which is reached")
        assert not hub.downloads() and not (tmp_path / "cache").exists(), "nothing is left behind"
        other = f"anna/tiny@{hub.push('anna/tiny', {**CONTENTS, 'model.safetensors': b'another'})}"
        finding = looked(tmp_path, files, other)
        assert finding.level == "warning" and "model.safetensors is another than the run pins" in finding.found
        gone = f"anna/tiny@{'ab' * 20}"
        finding = looked(tmp_path, files, gone)
        assert finding.level == "warning" and "from other peers, since the hub does not deliver them" in finding.found
        assert "connection to the hub" in finding.advice
        assert looked(tmp_path, files, gone, num_peers=0).level == "problem"


def test_the_list_comes_from_a_peer_or_from_the_folder(
    tmp_path: Path, files: PinnedFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    published = SimpleNamespace(model_files_sha256=files.sha256, model_files_bytes=len(files.to_bytes()))
    run = run_of("tiny").model_copy(update={"published": published})
    answering = [True]

    async def blob(self: object, peer: str, sha256: str, max_bytes: int) -> bytes:
        if not answering[0]:
            raise UnreachableError("it does not answer")
        assert (sha256, max_bytes) == (files.sha256, len(files.to_bytes()))
        return files.to_bytes()

    monkeypatch.setattr(doctor_module.PeerCalls, "blob_untrusted", blob)
    kept: Any = SimpleNamespace(run=run, model_files=files.to_bytes())
    cache = tmp_path / "cache"
    settings = DoctorSettings(invite=None, directory=tmp_path / "peer", cache_folder=cache, memory_of=lambda *_: 1)

    def found() -> list[str]:
        with Doctor(settings) as doctor:
            doctor.run, doctor._caller = run, SimpleNamespace()  # type: ignore[assignment]
            doctor.invite = SimpleNamespace(run_sha256="ab" * 32)  # type: ignore[assignment]
            doctor.answers = [SimpleNamespace(peer="anna")]  # type: ignore[list-item]
            assert "model" in dict(doctor.steps())
            return [finding.found for finding in doctor.look_at_model()]

    assert [each.split(";")[0] for each in found()] == ["tiny, from its weights: 2 files, 5.24 MB"]
    answering[0] = False
    assert found() == ["nobody who answers delivers the list of the model's files"]
    monkeypatch.setattr(doctor_module.PeerFolder, "kept_run", lambda self: kept)
    assert found()[0].startswith("tiny, from its weights: 2 files")
    assert not ModelFolder(cache, files).path.exists()

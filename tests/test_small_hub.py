"""Small hub of the tests, as `huggingface_hub` uses it: what is pushed comes back, pinned and by ranges."""

from __future__ import annotations

import hashlib
import importlib
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from small_hub import TOKEN, SmallHub, small_hub

huggingface_hub = pytest.importorskip("huggingface_hub")

WEIGHTS = hashlib.shake_128(b"weights").digest(300_000)
FILES = {"config.json": b'{"model_type": "llama"}', "model.safetensors": WEIGHTS}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SmallHub]:
    with small_hub() as hub:
        hub.use_in(monkeypatch, tmp_path / "cache", TOKEN)
        importlib.import_module("huggingface_hub.utils").disable_progress_bars()
        yield hub


def test_without_it_tests_and_their_processes_reach_no_hub() -> None:
    constants = importlib.import_module("huggingface_hub.constants")
    assert constants.ENDPOINT == os.environ["HF_ENDPOINT"] == "http://127.0.0.1:9"
    libraries = "import importlib.util as u\nfrom huggingface_hub import constants\nprint(constants.ENDPOINT)\n"
    libraries += "if u.find_spec('datasets'): import datasets; print(datasets.config.HF_ENDPOINT)"
    said = subprocess.run([sys.executable, "-c", libraries], capture_output=True, text=True, check=True).stdout
    assert set(said.split()) == {"http://127.0.0.1:9"}


def test_a_commit_stays_what_it_was(hub: SmallHub) -> None:
    first = hub.push("anna/tiny", FILES)
    second = hub.push("anna/tiny", {**FILES, "config.json": b"{}"})
    api = huggingface_hub.HfApi(endpoint=hub.endpoint)
    assert api.model_info("anna/tiny").sha == second
    assert api.model_info("anna/tiny", revision=first).sha == first
    folder = Path(huggingface_hub.snapshot_download("anna/tiny", revision=first, allow_patterns=["*.json"]))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {"config.json": FILES["config.json"]}
    assert hub.downloads() == ["config.json"]
    sizes = {item.path: item.lfs.sha256 if item.lfs else None for item in api.list_repo_tree("anna/tiny")}
    assert sizes == {"config.json": None, "model.safetensors": hashlib.sha256(WEIGHTS).hexdigest()}


def test_a_download_that_breaks_off_goes_on(
    hub: SmallHub, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL, "huggingface_hub")
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 50_000)
    hub.push("anna/tiny", FILES)
    hub.cuts["model.safetensors"] = 200_000
    path = Path(huggingface_hub.hf_hub_download("anna/tiny", "model.safetensors"))
    assert path.read_bytes() == WEIGHTS and hub.sent_bytes == len(WEIGHTS), "nothing twice"


def test_what_is_pushed_comes_back(hub: SmallHub, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for name, data in {**FILES, "README.md": b"---\nlicense: mit\n---\n# Tiny\n"}.items():
        (folder / name).write_bytes(data)
    api = huggingface_hub.HfApi(endpoint=hub.endpoint, token=TOKEN)
    api.create_repo("anna/tiny", exist_ok=True)
    api.create_repo("anna/tiny", exist_ok=True)
    commit = api.upload_folder(repo_id="anna/tiny", folder_path=folder, commit_message="a model")
    assert hub.files("anna/tiny", commit.oid) == {path.name: path.read_bytes() for path in folder.iterdir()}
    (folder / "config.json").write_bytes(b"{}")
    api.upload_folder(repo_id="anna/tiny", folder_path=folder, commit_message="another")
    assert [each.message for each in hub.repositories["models/anna/tiny"]] == ["a model", "another"]
    assert hub.files("anna/tiny")["config.json"] == b"{}"


def test_no_login_no_push(hub: SmallHub, monkeypatch: pytest.MonkeyPatch) -> None:
    api = huggingface_hub.HfApi(endpoint=hub.endpoint, token="another")
    with pytest.raises(huggingface_hub.errors.HfHubHTTPError, match="401"):
        api.create_repo("anna/tiny")
    assert not hub.repositories

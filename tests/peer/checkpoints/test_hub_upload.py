"""`export --push`: what the hub has afterwards, and what is said when it does not take the model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from codes import codes_in
from small_hub import TOKEN, SmallHub, small_hub

from swarmtrain.cli.main import run
from swarmtrain.model.export import export_model, load_exported
from swarmtrain.model.gpt import build_model
from swarmtrain.model.language_model import ModelSpec
from swarmtrain.run import PublishedSection, RunFile, RunSection, published_bytes
from swarmtrain.run_data import DataSection
from swarmtrain.run_model import ModelSection

pytest.importorskip("huggingface_hub")

SECTION = ModelSection(context_tokens=16, num_layers=1, width=16, num_heads=2)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SmallHub]:
    with small_hub() as hub:
        hub.use_in(monkeypatch, tmp_path / "cache", TOKEN)
        yield hub


@pytest.fixture
def peer(tmp_path: Path) -> Path:
    weights = dict(build_model(SECTION, seed=1).named_parameters())
    export_model(
        tmp_path / "peer" / "model", weights, ModelSpec(SECTION), 7, {"held-out.txt": b"text", "README.md": b"# card"}
    )
    return tmp_path / "peer"


def test_a_model_is_pushed_whole_and_its_folder_is_kept_if_it_is_named(
    hub: SmallHub, peer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "kept"
    assert run(["export", "--dir", str(peer), "--push", "anna/tiny", "--to", str(target)]) == 0
    assert f"after 7 tokens to {target}, and to {hub.endpoint}/anna/tiny" in capsys.readouterr().out
    kept = {path.name: path.read_bytes() for path in target.iterdir()}
    assert hub.files("anna/tiny") == {name: kept[name] for name in kept if name != "held-out.txt"}
    before = hub.files("anna/tiny")
    assert run(["export", "--dir", str(peer), "--push", "anna/other"]) == 0
    assert hub.files("anna/other") == before
    folder = tmp_path / "back"
    folder.mkdir()
    for name, content in hub.files("anna/other").items():
        (folder / name).write_bytes(content)
    assert load_exported(folder).run_tokens == 7


@pytest.mark.parametrize(("keys", "is_pushed"), [({}, True), ({"source": "text", "paths": ("my/diary.txt",)}, False)])
def test_text_of_ones_own_is_not_pushed(
    keys: dict[str, Any], is_pushed: bool, hub: SmallHub, peer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    published = PublishedSection(
        created="2026-01-01T00:00:00Z", swarmtrain="0.2.0", held_out_sha256="ab" * 32, held_out_bytes=4
    )
    run_file = RunFile(run=RunSection(total_tokens=10**6), data=DataSection(**keys), published=published)
    (peer / "model" / "run.toml").write_bytes(published_bytes(run_file))
    assert run(["export", "--dir", str(peer), "--push", "anna/tiny"]) == 0
    assert ("held-out.txt" in hub.files("anna/tiny")) is is_pushed
    assert ("held-out.txt is not uploaded" in capsys.readouterr().err) is not is_pushed


@pytest.mark.parametrize("options", [[], ["--private"]])
def test_a_new_repository_is_public_unless_it_is_asked_to_be_private(
    options: list[str], peer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []

    class Api:
        def create_repo(self, name: str, *, private: bool | None, exist_ok: bool) -> str:
            asked.append((name, private, exist_ok))
            return f"https://hub/{name}"

        def upload_folder(self, **arguments: object) -> None:
            asked.append(arguments["repo_id"])

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "token")
    assert run(["export", "--dir", str(peer), "--push", "anna/tiny", *options]) == 0
    assert asked == [("anna/tiny", True if options else None, True), "anna/tiny"]


def test_what_cannot_be_pushed_is_one_line(
    hub: SmallHub, peer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(code: int, *options: str) -> str:
        assert run(["export", "--dir", str(peer), *options]) == code
        err = capsys.readouterr().err
        assert err.count("\n") == 1, err
        return err

    assert codes_in(said(2, "--push", "tiny")) == ["bad-repository"]
    hub.use_in(monkeypatch, tmp_path / "cache", "hf_wrong")
    refused = said(1, "--push", "anna/tiny", "--to", str(tmp_path / "kept"))
    assert codes_in(refused) == ["hub-upload"] and "401" in refused and "hf upload anna/tiny" in refused
    assert load_exported(tmp_path / "kept").run_tokens == 7, "kept, whatever becomes of the upload"
    hub.use_in(monkeypatch, tmp_path / "cache")
    assert codes_in(said(2, "--push", "anna/tiny")) == ["hub-login"]
    assert not hub.repositories


@pytest.mark.parametrize("options", [[], ["--private", "--to", "x"]])
def test_an_export_names_where_it_goes(options: list[str], peer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["export", "--dir", str(peer), *options]) == 2
    assert codes_in(capsys.readouterr().err) == ["options-conflict"]

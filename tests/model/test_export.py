"""Exported model on the disk: replaced as a whole, and never loaded if incomplete."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import resource
import shutil
import signal
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from codes import codes_in, raises_code

from swarmtrain.cli.main import run
from swarmtrain.errors import RunTimeError, UserError
from swarmtrain.model import export as export_module
from swarmtrain.model.atomic_folder import atomic_folder
from swarmtrain.model.export import cast_exported, copy_exported, export_model, load_exported
from swarmtrain.model.gpt import GPT, build_model
from swarmtrain.model.provenance import tokens_of_export
from swarmtrain.network.discovery.invite import Invite, InvitedPeer, format_invite
from swarmtrain.network.discovery.run_lookup import PublishedRun
from swarmtrain.network.identity import new_identity
from swarmtrain.peer.checkpoints.export import export_from_folder, export_from_swarm, onlooker_place
from swarmtrain.peer.lifecycle.stop import StopFlag
from swarmtrain.run import PublishedSection, RunFile, RunSection, published_bytes, run_sha256
from swarmtrain.run_model import ModelSection

SECTION = ModelSection(context_tokens=16, num_layers=1, width=16, num_heads=2)


def export_from(folder: Path, target: Path) -> int:
    return export_from_folder(folder, target, onlooker_place(target, None, StopFlag()))


def export(folder: Path, tokens: int) -> GPT:
    model = build_model(SECTION, seed=tokens)
    export_model(folder, dict(model.named_parameters()), model.spec, tokens, {"held-out.txt": b"text"})
    return model


def test_a_model_is_replaced_and_nothing_else_stays(tmp_path: Path) -> None:
    export(tmp_path / "model", 1)
    (tmp_path / ".model.old").mkdir()  # of an earlier one, killed in between
    second = export(tmp_path / "model", 2)
    loaded = load_exported(tmp_path / "model")
    assert loaded.run_tokens == 2 and loaded.held_out == b"text"
    assert all(torch.equal(a, b) for a, b in zip(loaded.model.parameters(), second.parameters(), strict=True))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_cast_model_is_read_as_itself(tmp_path: Path) -> None:
    model, folder = export(tmp_path / "model", 1), tmp_path / "model"
    cast_exported(folder, None)
    assert json.loads((folder / "config.json").read_text())["torch_dtype"] == "float32"
    cast_exported(folder, "bfloat16")
    loaded = load_exported(folder)
    assert loaded.run_tokens == 1 and loaded.held_out == b"text"
    for found, cast in zip(loaded.model.parameters(), model.parameters(), strict=True):
        assert torch.equal(found, cast.bfloat16().float())
    config = json.loads((folder / "config.json").read_text())
    config["swarmtrain"]["base_dtype"] = "int8"
    (folder / "config.json").write_text(json.dumps(config))
    with raises_code("not-a-model", UserError, "unknown type"):
        load_exported(folder)


def test_what_a_killed_writer_left_goes_at_the_next_write_and_what_another_writes_stays(tmp_path: Path) -> None:
    kept = [".model.new", ".models.new-abcdefgh", ".model.abcdefgh"]
    for name in (".model.new-abc_1234", *kept):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"half")
    with atomic_folder(tmp_path / "model") as other:
        (other / "config.json").write_text("{}")
        export(tmp_path / "model", 1)
        assert other.is_dir() and not (tmp_path / ".model.new-abc_1234").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*kept, "model"])


def test_the_old_model_stays_when_the_new_one_cannot_be_put_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(tmp_path / "model", 1)
    rename = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if self.name.startswith(".model.") and not self.name.endswith(".old"):
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(OSError):
        export(tmp_path / "model", 2)
    assert load_exported(tmp_path / "model").run_tokens == 1
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_disk_that_takes_no_more_is_an_os_error(tmp_path: Path) -> None:
    export(tmp_path / "model", 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        with pytest.raises(OSError, match=os.strerror(errno.EFBIG)):
            export(tmp_path / "model", 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, previous)
    assert load_exported(tmp_path / "model").run_tokens == 1
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_peer_folder_gives_the_archive_when_its_model_was_damaged(tmp_path: Path) -> None:
    export(tmp_path / "model", 2)
    export(tmp_path / "archive", 1)
    (tmp_path / "model" / "model.safetensors").write_bytes(b"torn")
    assert export_from(tmp_path, tmp_path / "copy") == 1
    assert load_exported(tmp_path / "copy").run_tokens == 1
    (tmp_path / "archive" / "config.json").write_text("{")
    with raises_code("no-model", UserError):
        export_from(tmp_path, tmp_path / "another")
    assert not (tmp_path / "another").exists()


@pytest.mark.parametrize("name", ["README.md", "run.toml", "held-out.txt"])
def test_a_link_in_a_strangers_export_is_not_followed(name: str, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("of this machine")
    export(tmp_path / "theirs", 1)
    (tmp_path / "theirs" / name).unlink(missing_ok=True)
    (tmp_path / "theirs" / name).symlink_to(tmp_path / "secret")
    with raises_code("not-a-regular-file", UserError, name):
        copy_exported(tmp_path / "theirs", tmp_path / "copy")
    (tmp_path / "theirs" / name).unlink()
    os.mkfifo(tmp_path / "theirs" / name)
    with raises_code("not-a-regular-file", UserError, name):
        copy_exported(tmp_path / "theirs", tmp_path / "copy")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["secret", "theirs"]


def test_a_folder_that_a_bootstrap_replaces_meanwhile_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(tmp_path / "model", 1)
    read, replaced = export_module.read_weights, []

    def replace_and_read(*arguments: Any) -> None:
        if not replaced:
            replaced.append(export(tmp_path / "model", 2))
        read(*arguments)

    monkeypatch.setattr(export_module, "read_weights", replace_and_read)
    assert load_exported(tmp_path / "model").run_tokens == 2


def test_a_description_larger_than_the_weights_takes_no_memory(tmp_path: Path) -> None:
    export(tmp_path / "model", 1)
    path = tmp_path / "model" / "config.json"
    config = json.loads(path.read_text())
    vast: list[dict[str, int]] = [
        {"width": 2**16, "context_tokens": 2**20, "num_heads": 1},
        {"width": 2**9, "context_tokens": 2**20, "num_heads": 1, "num_layers": 1},  # only its positions
    ]
    for section in vast:
        config["swarmtrain"]["model"] = section
        path.write_text(json.dumps(config))
        with raises_code("not-a-model", UserError, "larger model than the weights"):
            load_exported(tmp_path / "model")


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"format": "swarmtrain-3"}, "another version"),
        ({"weights_sha256": {}}, "weights_sha256"),
        ({"weights_sha256": {"../model.safetensors": "ab"}}, "weights_sha256"),
        ({"model": {"width": 17}}, "width"),
        ({"run_tokens": None}, "not a model"),
    ],
)
def test_a_provenance_that_cannot_be_read_is_one_line(tmp_path: Path, config: dict[str, Any], says: str) -> None:
    export(tmp_path / "model", 1)
    path = tmp_path / "model" / "config.json"
    found = json.loads(path.read_text())
    path.write_text(json.dumps(found | {"swarmtrain": found["swarmtrain"] | config}))
    with raises_code("not-a-model", UserError, says):
        load_exported(tmp_path / "model")
    assert tokens_of_export(tmp_path / "model") == 0


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
@pytest.mark.parametrize("call", ["mkdtemp", "copyfileobj", "fsync", "rename"])
def test_a_disk_that_fails_while_a_model_is_exported_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], call: str, number: int
) -> None:
    export(tmp_path / "peer" / "archive", 1)

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(number, os.strerror(number))

    owner = {"mkdtemp": tempfile, "fsync": os, "copyfileobj": shutil}.get(call, Path)
    monkeypatch.setattr(owner, call, fail)
    target = tmp_path / "copy"
    assert run(["export", "--dir", str(tmp_path / "peer"), "--to", str(target)]) == 1
    said = capsys.readouterr().err
    assert codes_in(said) == ["model-not-saved"] and said.count("\n") == 1
    assert str(target) in said and os.strerror(number) in said and "--to" in said
    assert [path.name for path in tmp_path.iterdir()] == ["peer"], "what was half written is removed"


def test_a_full_disk_for_temporary_files_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tempfile, "mkdtemp", fail)
    word = format_invite(Invite("ab" * 32, (InvitedPeer(new_identity().peer_id, ("/ip4/127.0.0.1/tcp/1",)),)))
    assert run(["export", word, "--to", str(tmp_path / "copy")]) == 1
    said = capsys.readouterr().err
    assert codes_in(said) == ["model-not-saved"] and said.count("\n") == 1
    assert os.strerror(errno.ENOSPC) in said and "TMPDIR" in said


def published_run() -> PublishedRun:
    run = RunFile(run=RunSection(name="first", total_tokens=10**6), model=SECTION)
    held_out = b"text " * 99
    published = PublishedSection(
        created="2026-01-01T00:00:00Z",
        swarmtrain="0.1.0",
        held_out_sha256=hashlib.sha256(held_out).hexdigest(),
        held_out_bytes=len(held_out),
    )
    run = run.model_copy(update={"published": published})
    data = published_bytes(run)
    return PublishedRun(data, run_sha256(data), run, held_out, b"")


def test_a_run_whose_tokenizer_cannot_be_read_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    published = dataclasses.replace(published_run(), tokenizer=b"swarmtrain-bpe-1 and no merges")
    network = SimpleNamespace(submit=lambda work: work)
    played: dict[str, Any] = {
        "NetworkThread": lambda: network,
        "start_node": lambda *args: SimpleNamespace(identity=SimpleNamespace(peer_id="me")),
        "find_run": lambda *args, **more: SimpleNamespace(peer="anna"),
        "PeerCalls": lambda *args: None,
        "fetch_published": lambda *args: published,
        "wait_for": lambda work, stop: work,
        "leave_swarm": lambda *args: None,
    }
    for name, play in played.items():
        monkeypatch.setattr(f"swarmtrain.peer.checkpoints.export.{name}", play)
    place: Any = SimpleNamespace(stop=None)
    with raises_code("model-not-delivered", RunTimeError, "tokenizer"):
        export_from_swarm(Invite("ab" * 32, ()), tmp_path / "model", place)


@pytest.mark.parametrize("peer", ["", "bootstrap"])
def test_a_peers_folder_points_to_the_model_in_it(tmp_path: Path, peer: str) -> None:
    with raises_code("no-model", UserError):
        load_exported(tmp_path)
    tmp_path /= "my run"
    folder = tmp_path / peer
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints" / "3-round-7.safetensors").touch()
    with raises_code("no-model", UserError, f"swarmtrain export --dir '{folder}' --to my-model"):
        load_exported(tmp_path)
    for name in ("archive", "model"):
        (folder / name).mkdir()
        (folder / name / "config.json").touch()
        with raises_code("no-model", UserError, str(folder / name)):
            load_exported(tmp_path)

"""Exported model on the disk: replaced as a whole, and never loaded if incomplete."""

from __future__ import annotations

import errno
import os
import resource
import signal
import tempfile
from pathlib import Path

import pytest
import torch
from codes import codes_in, raises_code

from swarmtrain.cli.main import run
from swarmtrain.errors import UserError
from swarmtrain.model.export import export_model, load_exported
from swarmtrain.model.gpt import GPT, build_model
from swarmtrain.network.discovery.invite import Invite, InvitedPeer, format_invite
from swarmtrain.network.identity import new_identity
from swarmtrain.peer.checkpoints.export import export_from_folder
from swarmtrain.run import ModelSection

SECTION = ModelSection(context_tokens=16, num_layers=1, width=16, num_heads=2)


def export(folder: Path, tokens: int) -> GPT:
    model = build_model(SECTION, seed=tokens)
    export_model(folder, dict(model.named_parameters()), SECTION, tokens, {"held-out.txt": b"text"})
    return model


def test_a_model_is_replaced_and_nothing_else_stays(tmp_path: Path) -> None:
    export(tmp_path / "model", 1)
    (tmp_path / ".model.old").mkdir()  # of an earlier one, killed in between
    second = export(tmp_path / "model", 2)
    loaded = load_exported(tmp_path / "model")
    assert loaded.run_tokens == 2 and loaded.held_out == b"text"
    assert all(torch.equal(a, b) for a, b in zip(loaded.model.parameters(), second.parameters(), strict=True))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


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
    assert export_from_folder(tmp_path, tmp_path / "copy") == 1
    assert load_exported(tmp_path / "copy").run_tokens == 1
    (tmp_path / "archive" / "config.json").write_text("{")
    with raises_code("no-model", UserError):
        export_from_folder(tmp_path, tmp_path / "another")
    assert not (tmp_path / "another").exists()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
@pytest.mark.parametrize("call", ["mkdtemp", "write_bytes", "fsync", "rename"])
def test_a_disk_that_fails_while_a_model_is_exported_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], call: str, number: int
) -> None:
    export(tmp_path / "peer" / "archive", 1)

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(number, os.strerror(number))

    owner = {"mkdtemp": tempfile, "fsync": os}.get(call, Path)
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

"""Trackers by their own libraries, each read back by it; W&B and Trackio only where they are installed."""

from __future__ import annotations

import importlib.metadata
import io
import json
import os
import sqlite3
import subprocess
import sys
import threading
import time
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from patience import PATIENCE_S

from swarmtrain.cli.tracker_options import TRACKERS
from swarmtrain.extras import EXTRAS
from swarmtrain.peer.trackers.process import draw
from swarmtrain.peer.trackers.sinks import SINKS, TensorBoardSink, TrackedPeer

ROOT = Path(__file__).resolve().parents[3]
ID = "1a2b3c4d"
CONFIG = {"run": {"run": {"name": "tiny"}, "inner": {"learning_rate": 0.1}}, "machine": {"cores": 2, "device": "cpu"}}
LIMIT_S = 300.0
"""Until a library has been imported and has written its files, on a machine with other work."""


def a_peer(folder: Path, step: int = 0, name: str = "anna") -> dict[str, Any]:
    given = {"id": ID, "run": "tiny", "group": "tiny-abcdef", "name": name, "role": "volunteer", "step": step}
    return {**given, "folder": str(folder), "run_file": '[run]\nname = "tiny"\n', "config": CONFIG}


def lines(kind: str, peer: Mapping[str, Any], points: Mapping[int, float]) -> list[bytes]:
    told = [{"step": step, "time": 1e9 + step, "values": {"train/loss": loss}} for step, loss in points.items()]
    return [json.dumps(each).encode() + b"\n" for each in ({"kinds": [kind], "peer": peer}, *told)]


def served(kind: str, peer: Mapping[str, Any], points: Mapping[int, float]) -> list[dict[str, Any]]:
    """Draw in this process as the trackers' own process does; return what it says."""
    answers = io.BytesIO()
    draw(lines(kind, peer, points), answers, lambda: None)
    return [json.loads(line) for line in answers.getvalue().splitlines()]


def in_its_process(kind: str, peer: Mapping[str, Any], points: Mapping[int, float], **environment: str) -> list[Any]:
    """Draw points in the trackers' process; return what it says."""
    done = subprocess.run(
        [sys.executable, "-m", "swarmtrain.peer.trackers.process"],
        input=b"".join(lines(kind, peer, points)),
        stdout=subprocess.PIPE,
        cwd=ROOT,
        env={**os.environ, **environment},
        timeout=LIMIT_S,
        check=True,
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_each_tracker_has_an_option_a_sink_and_an_extra() -> None:
    assert set(TRACKERS) == set(SINKS) <= EXTRAS.keys()
    assert all(EXTRAS[name].startswith(name) for name in TRACKERS), "each extra installs the package of its name"


# ---------------------------------------------------------------- TensorBoard


def test_tensorboard_reads_the_curves_of_both_lives_of_a_peer(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    answers = served("tensorboard", a_peer(tmp_path), {100: 3.0, 250: 2.5})
    folder = tmp_path / "tensorboard"
    shown_by = f"tensorboard --logdir {folder}"
    assert answers == [{"kind": "tensorboard", "where": str(folder), "shown_by": shown_by, "offline": ""}]
    killed = TensorBoardSink()
    killed.begin(TrackedPeer(**a_peer(tmp_path, step=250)))
    killed.log(251, 1e9 + 251, {"train/loss": 2.25, "eval/loss": 1.5})  # and not ended: what is logged is on the disk
    read = accumulator.EventAccumulator(str(folder))
    read.Reload()
    assert [(each.step, each.value, each.wall_time) for each in read.Scalars("train/loss")] == [
        (step, loss, 1e9 + step) for step, loss in ((100, 3.0), (250, 2.5), (251, 2.25))
    ]
    assert [each.value for each in read.Scalars("eval/loss")] == [1.5]
    texts = {tag: read.Tensors(tag)[-1].tensor_proto.string_val[0].decode() for tag in read.Tags()["tensors"]}
    assert texts["config/run file"] == '    [run]\n    name = "tiny"'
    assert "| cores | 2 |" in texts["config/machine"] and "| device | cpu |" in texts["config/machine"]
    killed.end()


def test_tensorboard_needs_neither_torch_nor_tensorflow(tmp_path: Path) -> None:
    """In a process of its own, each megabyte counts."""
    pytest.importorskip("tensorboard")
    code = "import sys; from swarmtrain.peer.trackers import process; from swarmtrain.peer.trackers.sinks import *; "
    code += "TensorBoardSink().begin(TrackedPeer(**eval(sys.argv[1]))); "
    code += "print([name for name in ('torch', 'tensorflow', 'pydantic', 'hivemind') if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code, repr(a_peer(tmp_path))], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


# ---------------------------------------------------------------- W&B


class Wandb(types.ModuleType):
    """W&B's calls as `WandbSink` makes them, for what needs a server."""

    class Error(Exception):
        """What W&B raises."""

    class Settings:
        """Settings of a W&B that does not have all that this one has."""

        model_fields = ("silent", "console", "host", "disable_git", "x_disable_meta")

        def __init__(self, **given: Any) -> None:
            assert set(given) <= set(self.model_fields)
            self.given = given

    def __init__(self, folder: Path, problem: str = "") -> None:
        super().__init__("wandb")
        self.errors = types.SimpleNamespace(Error=self.Error)
        self.problem, self.inits, self.logged = problem, [], []  # type: ignore[var-annotated]
        self.run = types.SimpleNamespace(
            url="https://wandb.example/run", offline=False, dir=str(folder / "wandb" / "offline-run-1" / "files"),
            log=lambda values, **more: self.logged.append((values, more)), finish=lambda: None,
        )  # fmt: skip

    def init(self, **given: Any) -> Any:
        self.inits.append(given)
        if self.problem and given.get("mode") != "offline":
            raise self.Error(self.problem)
        self.run.offline = given.get("mode") == "offline"
        return self.run


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("WANDB_", "TRACKIO_"))]:
        monkeypatch.delenv(name)


def test_wandb_resumes_a_run_of_one_id_and_collects_nothing_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", fake := Wandb(tmp_path))
    answers = served("wandb", a_peer(tmp_path), {100: 3.0})
    assert answers == [{"kind": "wandb", "where": "https://wandb.example/run", "shown_by": "", "offline": ""}]
    (init,) = fake.inits
    settings = init.pop("settings")
    assert settings.given == {
        "silent": True, "console": "off", "host": "anna", "disable_git": True, "x_disable_meta": True
    }  # fmt: skip
    assert init == {
        "project": "tiny", "id": ID, "resume": "allow", "name": "anna", "group": "tiny-abcdef", "job_type": "volunteer",
        "dir": str(tmp_path), "config": CONFIG,
    }  # fmt: skip
    assert fake.logged == [({"train/loss": 3.0, "_timestamp": 1e9 + 100}, {"step": 100, "commit": True})]


def test_without_a_login_wandb_keeps_the_points_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", fake := Wandb(tmp_path, "No API key configured."))
    folder = str(tmp_path / "wandb")
    (place,) = served("wandb", a_peer(tmp_path), {100: 3.0})
    assert place == {
        "kind": "wandb",
        "where": folder,
        "shown_by": f"wandb sync {folder}/offline-run-*-{ID}",
        "offline": "No API key configured.",
    }
    assert [init.get("mode") for init in fake.inits] == [None, "offline"] and len(fake.logged) == 1


def test_what_a_person_has_set_for_wandb_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", fake := Wandb(tmp_path, "No API key configured."))
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    monkeypatch.setenv("WANDB_MODE", "online")
    (failure,) = served("wandb", a_peer(tmp_path), {100: 3.0})
    assert "No API key configured." in failure["error"]
    assert [init["project"] for init in fake.inits] == ["mine"]


def is_installed(package: str) -> bool:
    try:
        importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def wandb_records(data: bytes) -> Iterator[bytes]:
    """Yield the records of an offline run's file, a log of LevelDB: blocks of 32 KiB behind a header of 7 bytes."""
    at, parts = 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        parts += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # a whole record, or its last part
            yield parts
            parts = b""


@pytest.mark.slow
@pytest.mark.skipif(not is_installed("wandb"), reason="wandb is an extra")
def test_wandb_itself_offline(tmp_path: Path) -> None:
    from wandb.proto.wandb_internal_pb2 import Record

    def written(file: Path) -> list[Any]:
        return list(map(Record.FromString, wandb_records(file.read_bytes())))

    found: list[tuple[int, float]] = []
    for points in ({100: 3.0, 250: 2.5}, {251: 2.25}):
        while list(tmp_path.glob(f"wandb/offline-run-{time.strftime('%Y%m%d_%H%M%S')}-{ID}")):
            threading.Event().wait(0.05)  # W&B names folders by the second
        (place,) = in_its_process("wandb", a_peer(tmp_path), points, WANDB_MODE="offline", WANDB_SECRET="s3cret")
        folder = max(tmp_path.glob(f"wandb/offline-run-*-{ID}"))  # their names begin with the time
        assert place["shown_by"] == f"wandb sync {tmp_path}/wandb/offline-run-*-{ID}"
        file, runs, give_up_s = folder / f"run-{ID}.wandb", [], time.monotonic() + PATIENCE_S
        # W&B's own process may still be writing when ours has ended: an exit is the last that it writes.
        while not (records := written(file)) or records[-1].WhichOneof("record_type") not in ("exit", "footer"):
            assert time.monotonic() < give_up_s, records
            threading.Event().wait(0.05)
        for record in records:
            if record.WhichOneof("record_type") == "history":
                row = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
                found.append((record.history.step.num or row["_step"], row["train/loss"]))
            elif record.WhichOneof("record_type") == "run":
                runs.append(record.run)
        assert {(run.run_id, run.project, run.run_group, run.display_name, run.host) for run in runs} == {
            (ID, "tiny", "tiny-abcdef", "anna", "anna")
        }
        config = {item.key: json.loads(item.value_json) for run in runs for item in run.config.update}
        assert config["run"] == CONFIG["run"] and config["machine"] == CONFIG["machine"]
        everything = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
        assert b"s3cret" not in everything and not list(folder.rglob("requirements.txt"))
        assert not list(folder.rglob("wandb-metadata.json"))
    assert found == [(100, 3.0), (250, 2.5), (251, 2.25)]


# ---------------------------------------------------------------- Trackio


@pytest.mark.slow
@pytest.mark.skipif(not is_installed("trackio"), reason="trackio is an extra")
def test_trackio_itself(tmp_path: Path) -> None:
    for points in ({100: 3.0, 250: 2.5}, {251: 2.25}):
        (place,) = in_its_process("trackio", a_peer(tmp_path), points, TRACKIO_DIR=str(tmp_path / "curves"))
        assert place["where"] == str(tmp_path / "curves") and place["shown_by"] == "trackio show --project tiny"
    (path,) = (tmp_path / "curves").glob("*.db")
    with sqlite3.connect(path) as database:
        rows = database.execute("SELECT run_name, step, metrics FROM metrics ORDER BY id").fetchall()
        ((config,),) = database.execute("SELECT DISTINCT config FROM configs").fetchall()
    assert [(name, step, json.loads(metrics)["train/loss"]) for name, step, metrics in rows] == [
        (f"anna-{ID}", step, loss) for step, loss in ((100, 3.0), (250, 2.5), (251, 2.25))
    ]
    assert json.loads(config)["run"] == CONFIG["run"] and json.loads(config)["machine"] == CONFIG["machine"]

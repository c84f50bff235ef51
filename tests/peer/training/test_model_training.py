"""What a volunteer's training of a whole model is made of, by device and merge method. No network, no swarm."""

from __future__ import annotations

import dataclasses
import subprocess
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from patience import PATIENCE_S

from swarmtrain.data.batches import Batches, BatchSource
from swarmtrain.data.prefetch import PrefetchedBatches, prefetched
from swarmtrain.data.prepare import publishable_data
from swarmtrain.network.discovery.run_lookup import PublishedRun
from swarmtrain.network.identity import new_identity
from swarmtrain.network.node import NetworkThread, NodeSettings, TrafficCount
from swarmtrain.peer.devices.compute import ComputeDevice
from swarmtrain.peer.lifecycle.folder import PeerFolder
from swarmtrain.peer.lifecycle.node import PeerSettings
from swarmtrain.peer.lifecycle.stop import Interrupted, StopFlag
from swarmtrain.peer.training import model_training
from swarmtrain.peer.training.model_training import ModelTraining, prepare_model
from swarmtrain.peer.training.pause import PauseSwitch
from swarmtrain.run import RunFile

ME = new_identity(bytes(32))


class AsDevice(ComputeDevice):
    """Processor of which the loop believes that it is a device."""

    @property
    def is_host(self) -> bool:
        return False


def prepared(patch: pytest.MonkeyPatch, folder: Path, method: str, compute: ComputeDevice) -> ModelTraining:
    """Prepare training in `folder`, on the device that was chosen."""
    (folder / "text.txt").write_bytes(b"batches and merges beside the steps. " * 2000)
    run = RunFile.model_validate(
        {
            "run": {"total_tokens": 10**6},
            "model": {"context_tokens": 16, "num_layers": 1, "width": 16, "num_heads": 2},
            "data": {"source": "text", "paths": ("text.txt",), "held_out_bytes": 4096},
            "inner": {"batch_sequences": 4},
            "merge": {"method": method},
        }
    )
    held_out = publishable_data(run, folder).held_out.text
    node: Any = SimpleNamespace(
        identity=ME,
        settings=NodeSettings(directory=folder),
        traffic=TrafficCount(),
        remember_addresses=lambda *_: None,
        known_peers=list,
    )
    context: Any = SimpleNamespace(
        run=run,
        published=PublishedRun(b"", "ab" * 32, run, held_out, b""),
        model_folder=None,
        emit=lambda event: None,
        me=ME.peer_id,
        name="me",
        node=node,
        nobody=None,
        network=NetworkThread(),
        stop=StopFlag(),
        pause=PauseSwitch(),
        control=SimpleNamespace(board=SimpleNamespace(device_in_short="cpu")),
        slowed=lambda on_processor: nullcontext,
        rests=lambda compute: nullcontext,
        limits=SimpleNamespace(trains_on=lambda devices: None),
        settings=PeerSettings(directory=folder, name="me", data_folder=folder),
        folder=PeerFolder(folder),
    )
    patch.setattr(model_training, "choose_compute", lambda *asked: SimpleNamespace(compute=compute))
    patch.setattr(model_training, "ComputeReport", lambda *given: SimpleNamespace(start=int, smaller=int, compiled=int))
    return prepare_model(context)


@pytest.mark.parametrize(
    ("method", "compute", "is_beside"),
    [
        ("gossip", AsDevice(), True),
        ("gossip", ComputeDevice(), False),
        ("diloco", AsDevice(), False),  # its peers wait for each other
    ],
)
def test_on_a_device_merges_are_computed_beside_training_if_nobody_waits(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, method: str, compute: ComputeDevice, is_beside: bool
) -> None:
    made = prepared(monkeypatch, tmp_path, method, compute)
    assert (made.session.worker is not None) == is_beside
    if made.session.worker is not None:
        work: Any = Future[int]
        assert isinstance(made.session.worker(work).result(PATIENCE_S), Future), "it runs what it is given"
    made.leave()
    if made.session.worker is not None:
        with pytest.raises(RuntimeError, match="after shutdown"):
            made.session.worker(work)


def test_batches_are_drawn_ahead_until_it_leaves(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = list[torch.device]()

    def ahead(source: Batches, device: torch.device, check: Callable[[], None]) -> BatchSource:
        asked.append(device)
        return prefetched(source, torch.device("mps"), check)

    monkeypatch.setattr(model_training, "prefetched", ahead)
    made = prepared(monkeypatch, tmp_path, "gossip", ComputeDevice())
    batches = made.loop.batches
    assert isinstance(batches, PrefetchedBatches) and asked == [torch.device("cpu")]
    assert batches.next_batch().shape == (4, 17)
    made.context.stop.stop()
    with pytest.raises(Interrupted):
        batches._check()
    made.leave()
    assert batches._thread is not None and not batches._thread.is_alive()


@pytest.mark.parametrize(("asked", "says"), [("on", ["--rank"]), ("auto", [])])
def test_who_trains_some_groups_of_an_adapter_compiles_nothing_and_says_so_if_asked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, asked: Any, says: list[str]
) -> None:
    made, told = prepared(monkeypatch, tmp_path, "gossip", ComputeDevice()), list[str]()
    made.context.settings = dataclasses.replace(made.context.settings, compile=asked)
    made.session.groups_of_round = lambda round: frozenset([round % 4])
    assert made.compiled is not None
    made.compiled.tell = lambda is_compiled, why: told.append(why)
    monkeypatch.setattr(subprocess, "Popen", None)
    made._tell_started(4)
    assert [words in why for words, why in zip(says, told, strict=True)] == [True] * len(says)
    assert made.compiled.is_over
    made.leave()

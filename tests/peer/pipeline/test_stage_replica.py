"""Stage to which a volunteer of a pipeline comes back, from its checkpoint."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from swarmtrain.algorithm.inner import Moments
from swarmtrain.algorithm.outer import OuterState
from swarmtrain.model.stage_work import DeviceStageWork
from swarmtrain.model.stages import build_stage, stage_shapes
from swarmtrain.network.discovery.run_lookup import PublishedRun
from swarmtrain.network.identity import new_identity
from swarmtrain.network.node import NodeSettings, TrafficCount
from swarmtrain.peer.checkpoints.checkpoint import Checkpoint
from swarmtrain.peer.checkpoints.writer import Checkpointer
from swarmtrain.peer.devices.compute import ComputeDevice
from swarmtrain.peer.devices.device_parameters import DeviceParameters
from swarmtrain.peer.lifecycle.context import SlowedWork
from swarmtrain.peer.lifecycle.folder import PeerFolder
from swarmtrain.peer.lifecycle.node import PeerSettings
from swarmtrain.peer.lifecycle.stop import StopFlag
from swarmtrain.peer.pipeline import stage_replica
from swarmtrain.peer.pipeline.context import PipelineContext
from swarmtrain.peer.pipeline.first_stage import FirstStage
from swarmtrain.peer.pipeline.stage_assignment import StageAssignment
from swarmtrain.peer.pipeline.stage_replica import StageReplica, StageReplicas, StageSite
from swarmtrain.peer.training.session import LocalCheckpoint
from swarmtrain.protocol.pipeline.balance import Rule
from swarmtrain.protocol.pipeline.moves import FirstStageWatch
from swarmtrain.protocol.tokens.progress import Progress
from swarmtrain.run import RunFile

IDENTITY = new_identity()
RUN = RunFile.model_validate(
    {
        "run": {"total_tokens": 10**6},
        "data": {"source": "text", "paths": ("x",)},
        "model": {"context_tokens": 16, "num_layers": 3, "width": 16, "num_heads": 2},
        "inner": {"batch_sequences": 8, "microbatch_sequences": 2},
        "merge": {"method": "gossip", "inner_steps": 4},
        "pipeline": {"stages": 2},
    }
)
PUBLISHED = PublishedRun(b"", "ab" * 32, RUN, b"", b"")
TEXT = np.arange(10**6, dtype=np.uint8)


class AsDevice(ComputeDevice):
    """Processor of which a stage believes that it is a device."""

    @property
    def is_host(self) -> bool:
        return False


def assignment(
    folder: Path, compute: ComputeDevice | None = None, asked: list[Callable[[], bool]] | None = None
) -> tuple[StageAssignment, StageReplicas]:
    """Make the parts of a volunteer that take a stage. `asked` gets what its rests ask: whether it is being left."""

    def slowed_work(compute: ComputeDevice, leaves: Callable[[], bool]) -> SlowedWork:
        if asked is not None:
            asked.append(leaves)
        return lambda kind: nullcontext()

    compute = ComputeDevice() if compute is None else compute
    context: Any = SimpleNamespace(
        published=PUBLISHED,
        model_folder=None,
        run=RUN,
        me=IDENTITY.peer_id,
        name="anna",
        node=SimpleNamespace(
            identity=IDENTITY, settings=NodeSettings(directory=folder), traffic=TrafficCount(), read_bucket=None
        ),
        network=SimpleNamespace(run=lambda work, limit_s: work.close()),
        folder=PeerFolder(folder),
        settings=PeerSettings(directory=folder, name="anna"),
        emit=lambda event: None,
        stop=StopFlag(),
        control=SimpleNamespace(starting=lambda what: None),
        slowed_work=slowed_work,
    )
    text: Any = SimpleNamespace(tokens=TEXT)
    data: Any = SimpleNamespace(sources=(text,), digest="c0" * 32)
    swarm: Any = SimpleNamespace(membership=SimpleNamespace(live=list))
    nothing: Any = None
    stages, rule, end = StageReplicas(context.me, (0.5, 0.5)), Rule(costs=(0.5, 0.5)), FirstStageWatch(10**6)
    first = FirstStage(context, data, swarm, stages, nothing)
    first.drive = lambda queue: None  # type: ignore[method-assign]
    shapes = stage_shapes(RUN.model, (1,))
    pipeline = PipelineContext(volunteer=context, shapes=shapes, rule=rule, swarm=swarm, stages=stages, mover=nothing)
    return StageAssignment(pipeline, StageSite(context=context, compute=compute), first, nothing, end), stages


@pytest.mark.parametrize("drawn", [0, 7])
def test_it_draws_data_from_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, drawn: int) -> None:
    def load(checkpointer: Checkpointer, run: RunFile, size: int) -> Checkpoint | None:
        own = LocalCheckpoint(batches=drawn, own_tokens=9, young_steps=None, steps_per_s=1.0, moments=moments)
        state = OuterState(torch.zeros(size), torch.zeros(size))
        return Checkpoint(state=state, progress=Progress(), roster=None, signed_roster=None, own=own) if drawn else None

    moments = Moments(vectors=torch.zeros(2, 1), steps=torch.zeros(1))
    monkeypatch.setattr(Checkpointer, "load", load)
    monkeypatch.setattr(StageReplica, "enter", lambda held, through: None)
    monkeypatch.setattr(StageReplica, "begin", lambda held: None)
    one, stages = assignment(tmp_path)
    one.enter(0)
    held: Any = stages.all[0]
    assert held.trainer.batches.position == drawn
    (num_shards,) = RUN.num_shards(len(TEXT))
    assert num_shards > 0 and held.swarm.coverage.shards.num_shards == num_shards
    one.enter(1)
    assert stages.all[1].swarm.coverage is None, "only the first stage draws data"
    held.manager.checkpointer.durable = Progress(round=4)
    assert (held.swarm.records.safe(), stages.all[1].swarm.records.safe()) == (Progress(round=4), None)
    held.trainer.batches.next_batch()
    one.enter(0)
    assert stages.all[0].swarm is held.swarm, "what it answers cannot be taken back"
    assert stages.all[0].trainer.batches.position == drawn + 1, "further than its checkpoint"
    assert held.swarm.records.safe() is None, "of who keeps it now"


def test_only_a_stage_that_is_left_ends_its_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StageReplica, "enter", lambda held, through: None)
    monkeypatch.setattr(StageReplica, "begin", lambda held: None)
    asked = list[Callable[[], bool]]()
    one, stages = assignment(tmp_path, asked=asked)
    for number in range(2):
        one.enter(number)
    assert [leaves() for leaves in asked] == [False, False]
    stages.all[1].stop_soon()
    assert [leaves() for leaves in asked] == [False, True]


@pytest.mark.parametrize("ended", ["total_tokens", "an error", "not yet"])
@pytest.mark.parametrize("compute", [ComputeDevice(precision="bf16"), AsDevice(precision="bf16")])
def test_a_stage_that_is_left_gives_its_memory_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compute: ComputeDevice, ended: str
) -> None:
    monkeypatch.setattr(StageReplica, "enter", lambda held, through: None)
    monkeypatch.setattr(StageReplica, "begin", lambda held: None)
    monkeypatch.setattr(stage_replica, "_END_S", 0.0)
    one, stages = assignment(tmp_path, compute)
    one.enter(1)
    (held,) = stages.all
    trainer, work = held.trainer, held.trainer.loop.work
    is_on_device = isinstance(compute, AsDevice)
    assert isinstance(trainer.parameters, DeviceParameters) == isinstance(work, DeviceStageWork) == is_on_device
    assert (trainer.queue.transfer is not None) == is_on_device
    x = torch.ones(2, 16, 16)
    out = work.tail("key", x, torch.zeros(2, 16, dtype=torch.int64), 1.0, 0)
    plain = type(work)(build_stage(held.shape, RUN.run.seed))
    assert out.loss != plain.tail("key", x, torch.zeros(2, 16, dtype=torch.int64), 1.0, 0).loss, "it is in bf16"
    weights = [weakref.ref(each.untyped_storage()) for each in work.stage.parameters()]
    if ended == "an error":
        held.training.set_exception(ValueError("a bug"))
    elif ended != "not yet":
        held.training.set_result(ended)
    with pytest.raises(ValueError, match="a bug") if ended == "an error" else nullcontext():
        one.leave(1)
    assert held.session.replica.own_tokens == 0 and not stages.all
    assert all((each() is None) == (ended == "total_tokens") for each in weights)

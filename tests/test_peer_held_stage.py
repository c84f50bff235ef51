"""A stage that a volunteer of a pipeline comes back to, from its checkpoint."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from swarmtrain.algorithm.inner import Moments
from swarmtrain.algorithm.outer import OuterState
from swarmtrain.model.stages import stage_shapes
from swarmtrain.network.identity import new_identity
from swarmtrain.network.node import NodeSettings, Traffic
from swarmtrain.network.swarm import PublishedRun
from swarmtrain.peer.checkpoint import Checkpoint
from swarmtrain.peer.checkpointer import Checkpointer
from swarmtrain.peer.folder import PeerFolder
from swarmtrain.peer.held_stage import HeldStage, StageSite
from swarmtrain.peer.pipeline import PipelineVolunteer
from swarmtrain.peer.session import OwnPart
from swarmtrain.peer.stopping import StopFlag
from swarmtrain.protocol.progress import Progress
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


def volunteer(folder: Path) -> Any:
    """As much of a volunteer as takes a stage."""
    node: Any = SimpleNamespace(
        identity=IDENTITY, settings=NodeSettings(directory=folder), traffic=Traffic(), read_bucket=None
    )
    network: Any = SimpleNamespace()
    site = StageSite(
        published=PUBLISHED,
        network=network,
        node=node,
        folder=PeerFolder(folder),
        emit=lambda event: None,
        stop=StopFlag(),
        name="anna",
    )
    one: Any = SimpleNamespace(
        site=site,
        me=IDENTITY.peer_id,
        run=RUN,
        published=PUBLISHED,
        shapes=stage_shapes(RUN.model, (1,)),
        swarm=SimpleNamespace(membership=SimpleNamespace(live=list)),
        control=SimpleNamespace(starting=lambda what: None),
        end=SimpleNamespace(is_over=False),
        held={},
        _desks={},
        _source=None,
        _base=folder,
        _data=SimpleNamespace(tokens=TEXT, corpus=SimpleNamespace(digest="c0" * 32)),
        _wait=lambda work: None,
        _start_driving=lambda held: None,
    )
    one._batches_at = partial(PipelineVolunteer._batches_at, one)
    return one


@pytest.mark.parametrize("drawn", [0, 7])
def test_it_draws_data_from_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, drawn: int) -> None:
    def load(checkpointer: Checkpointer, run: RunFile, size: int) -> Checkpoint | None:
        own = OwnPart(batches=drawn, own_tokens=9, young_steps=None, steps_per_s=1.0, moments=moments)
        state = OuterState(torch.zeros(size), torch.zeros(size))
        return Checkpoint(state=state, progress=Progress(), roster=None, signed_roster=None, own=own) if drawn else None

    moments = Moments(vectors=torch.zeros(2, 1), steps=torch.zeros(1))
    monkeypatch.setattr(Checkpointer, "load", load)
    monkeypatch.setattr(HeldStage, "enter", lambda held, through: None)
    monkeypatch.setattr(HeldStage, "begin", lambda held: None)
    one = volunteer(tmp_path)
    PipelineVolunteer._enter(one, 0)
    held = one.held[0]
    assert held.trainer.batches.position == drawn
    assert RUN.num_shards(len(TEXT)) > 0 and held.swarm.coverage.shards.num_shards == RUN.num_shards(len(TEXT))
    PipelineVolunteer._enter(one, 1)
    assert one.held[1].swarm.coverage is None, "only the first stage draws data"
    held.keeper.checkpointer.durable = Progress(round=4)
    assert (held.swarm.records.safe(), one.held[1].swarm.records.safe()) == (Progress(round=4), None)
    held.trainer.batches.next_batch()
    PipelineVolunteer._enter(one, 0)
    assert one.held[0].swarm is held.swarm, "what it answers cannot be taken back"
    assert one.held[0].trainer.batches.position == drawn + 1, "further than its checkpoint"
    assert held.swarm.records.safe() is None, "of who keeps it now"

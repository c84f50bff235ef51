"""Runs of real volunteers equal the simulator's replay of their events: the same rounds, the same weights."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from recording import prelude
from replay import ReplayedPeer, replay, text_of
from swarm import Swarm, write_run

from swarmtrain.events import ClippedEvent, DoneEvent, InviteEvent
from swarmtrain.peer.checkpoints.checkpoint import load_newest
from swarmtrain.peer.checkpoints.files import CheckpointFolder

pytestmark = [pytest.mark.processes, pytest.mark.long]

TOLERANCE = 1e-5
SLOWDOWNS = {"anna": "8", "ben": "12", "carl": "20"}
INNER_STEPS = 24
NUM_ROUNDS = 15
"""Rounds of all three together."""
LIMIT_S = 900.0
"""Time limit, however busy the machine is."""


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Compute in one thread, as the processes do."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_volunteers_that_gossip_do_what_the_simulator_does(swarm: Swarm, one_thread: None) -> None:
    """With rules that are not the default; those of the default are recorded (tests/recordings)."""
    rules = {"robust": "direction", "partners": "longest-unmerged"}
    run_file = write_run(
        swarm.folder,
        run={"total_tokens": NUM_ROUNDS * INNER_STEPS * 8 * 64},
        inner={"warmup_fraction": 0.1},
        # Nobody is ever so far behind that it takes others' weights, however slow this machine is.
        merge={"method": "gossip", "inner_steps": INNER_STEPS, "min_peers": 3, "max_staleness_rounds": 50, **rules},
        network={"presence_ttl_s": 15.0},
    )
    invite = swarm.bootstrap(run_file).wait_event(InviteEvent, limit_s=LIMIT_S).invite
    children = [
        swarm.join(name, invite, "--slowdown", factor, prelude=prelude(swarm.folder / f"{name}.jsonl"))
        for name, factor in SLOWDOWNS.items()
    ]
    for child in children:
        assert child.wait(LIMIT_S) == 0, child.story()
        assert child.wait_event(DoneEvent).reason == "total_tokens"

    text = text_of(children[0].folder, swarm.folder, [child.id for child in children])
    world = replay(text, [swarm.folder / f"{child.name}.jsonl" for child in children])
    print(f"the same decisions: {dict(world.decisions)}; rounds in {dict(world.formats)}")
    for child, peer in zip(children, world.peers, strict=True):
        assert isinstance(peer, ReplayedPeer)
        state = peer.trainer.state
        folder = CheckpointFolder(child.folder / "checkpoints", text.sha256, child.id)
        found = load_newest(folder, text.run, state.theta.numel(), pytest.fail)
        assert found is not None and found[0].own is not None and found[0].progress.round == peer.round
        own = found[0].state
        apart = [float((a - b).abs().max()) for a, b in ((own.theta, state.theta), (own.momentum, state.momentum))]
        print(f"{child.name}: {peer.num_rounds} rounds, {peer.num_equal} equal to the bit; at the end {apart} apart")
        assert max(apart) <= TOLERANCE
        assert found[0].own.batches == peer.learner.loop.batches.position
        clipped = [(event.from_peer, event.rule, event.detail) for event in child.all(ClippedEvent)]
        assert clipped == peer.incidents
        assert peer.rounds_fresh >= 2, "it merged next to nothing"
    kinds = ("inner steps", "publication", "rule", "merge")
    assert min(world.decisions[kind] for kind in kinds) > 8

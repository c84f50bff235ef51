"""More volunteers than `merge.share_above`: each averages a share, and the bytes are those of an all-reduce."""

from __future__ import annotations

import statistics

import pytest
from swarm import Swarm, assert_same_states, write_run

from swarmtrain.events import RefusedEvent, StartedEvent

pytestmark = pytest.mark.processes

NUM_PEERS = 4


def test_with_shares_everyone_sends_what_an_allreduce_would(swarm: Swarm) -> None:
    run_file = write_run(
        swarm.folder,
        model={"width": 128},  # enough chunks that everyone has a share
        inner={"batch_sequences": 4},
        merge={"share_above": 2, "inner_steps": 5, "silence_s": 20.0},
    )
    bootstrap = swarm.bootstrap(run_file, "--wait-for", str(NUM_PEERS))
    children = swarm.join_all([f"peer{number}" for number in range(NUM_PEERS)], bootstrap.invite.invite)
    for child in children:
        child.wait_round(7)
    swarm.interrupt_all([bootstrap, *children])

    assert assert_same_states(children) >= 7
    assert not any(child.all(RefusedEvent) for child in children)
    num_parameters = children[0].wait_event(StartedEvent).num_parameters
    allreduce_bytes = 8 * num_parameters * (NUM_PEERS - 1) / NUM_PEERS
    sent = [child.rounds()[number].bytes_sent for child in children for number in range(2, 7)]
    print(f"bytes sent a round, over an all-reduce's: {[f'{size / allreduce_bytes:.2f}' for size in sent]}")
    assert 0.9 * allreduce_bytes < statistics.fmean(sent) < 1.5 * allreduce_bytes
    assert max(sent) < 2 * allreduce_bytes, "nobody sends for the others"

"""Shares, with more volunteers than `merge.share_above`: each averages one, with an all-reduce's traffic."""

from __future__ import annotations

import statistics

import pytest
from swarm import Swarm, assert_same_states, write_run

from swarmtrain.events import ArchivedEvent, RefusedEvent, RoundEvent, StartedEvent

pytestmark = pytest.mark.processes

NUM_PEERS = 4


def test_with_shares_everyone_sends_what_an_allreduce_would(swarm: Swarm) -> None:
    run_file = write_run(
        swarm.folder,
        model={"width": 128},  # enough chunks that everyone has a share
        inner={"batch_sequences": 4},
        merge={"share_above": 2, "inner_steps": 5, "silence_s": 20.0},
        network={"archive_every_s": 3600.0},
    )
    bootstrap = swarm.bootstrap(run_file, "--wait-for", str(NUM_PEERS))
    children = swarm.join_all([f"peer{number}" for number in range(NUM_PEERS)], bootstrap.invite.invite)
    # The archive takes one state, theta and momentum, from one of them as soon as there is one: not an all-reduce's.
    archived_s = bootstrap.wait_event(ArchivedEvent).time
    after = [child.wait_event(RoundEvent, lambda event: event.time > archived_s).round for child in children]
    measured = range(max(after) + 2, max(after) + 7)
    for child in children:
        child.wait_round(measured[-1])
    swarm.interrupt_all([bootstrap, *children])

    assert assert_same_states(children) >= measured[-1]
    assert not any(child.all(RefusedEvent) for child in children)
    num_parameters = children[0].wait_event(StartedEvent).num_parameters
    allreduce_bytes = 8 * num_parameters * (NUM_PEERS - 1) / NUM_PEERS
    sent = [statistics.fmean(child.rounds()[number].bytes_sent for number in measured) for child in children]
    print(f"bytes sent a round, over an all-reduce's: {[f'{size / allreduce_bytes:.2f}' for size in sent]}")
    assert 0.9 * allreduce_bytes < statistics.fmean(sent) < 1.5 * allreduce_bytes
    # Who averages how much follows from links, which are alike here but not measured so: one may average everything.
    assert max(sent) < 1.1 * 2 * allreduce_bytes and min(sent) > 0.55 * allreduce_bytes, "all send their own"

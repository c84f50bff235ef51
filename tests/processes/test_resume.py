"""Peers that are killed and restarted with their folders, as real processes: the run continues where it was."""

from __future__ import annotations

import json
import re
import statistics

import pytest
from swarm import Child, Swarm, assert_same_states, wait_until, write_run

from swarmtrain.events import JoinedEvent, RoundEvent, WarningEvent
from swarmtrain.peer.control.server import read_status
from swarmtrain.v1 import control_pb2 as pb

pytestmark = [pytest.mark.processes, pytest.mark.long]

NOISE = 0.3
"""Most by which a round's loss may exceed that of the rounds before, in nats per token; it begins at 5.5."""


def port(child: Child) -> int:
    """Return the port at which it listens."""
    found = re.search(r"/tcp/(\d+)", child.invite.addresses[0])
    assert found is not None
    return int(found[1])


def again(swarm: Swarm, child: Child, invite: str) -> Child:
    """Start a volunteer again, in its folder and at its port."""
    own = ["--json", "--name", child.name, "--dir", str(child.folder), "--listen", f"127.0.0.1:{port(child)}"]
    return swarm.start(child.name, ["join", invite, "--threads", "1", "--data", str(swarm.folder), *own])


def together(children: list[Child], more: int = 1) -> None:
    """Wait for `more` rounds of each from now on that have all of them on their roster."""
    peers = {child.id for child in children}
    for child in children:
        for _ in range(more):
            after = child.last_round
            child.wait_event(RoundEvent, lambda e, after=after: e.round > after and set(e.partners) == peers)


def late_loss(children: list[Child], rounds: int = 3) -> float:
    """Return their mean loss over their last rounds."""
    return statistics.mean(event.loss for child in children for event in child.all(RoundEvent)[-rounds:])


def assert_resumed(before: Child, after: Child) -> JoinedEvent:
    """Check that it is the same peer, and lost at most one round."""
    joined = after.wait_event(JoinedEvent)
    assert after.id == before.id
    assert joined.resumed_round is not None and joined.resumed_round >= before.last_round, after.story()
    assert joined.round >= joined.resumed_round, "what was there was taken only for something better"
    return joined


def kept_tokens(child: Child) -> int:
    """Return its own tokens in its newest checkpoint."""
    newest = max((child.folder / "checkpoints").glob("*.json"))
    return json.loads(newest.read_text())["manifest"]["own"]["tokens"]


def left_by(child: Child) -> pb.PeerStatus:
    """Return the status in its folder."""
    status = read_status(child.folder)
    assert status is not None
    return status


def acknowledged(children: list[Child]) -> dict[str, int]:
    """Return by PeerID the most tokens that one of `children` had read in that peer's progress record."""
    most: dict[str, int] = {}
    for peer in (peer for child in children for peer in left_by(child).peers if peer.peer != child.id):
        most[peer.peer] = max(most.get(peer.peer, 0), peer.acknowledged_tokens)
    return most


def test_everyone_is_killed_and_started_again(swarm: Swarm) -> None:
    run = write_run(swarm.folder)
    bootstrap = swarm.bootstrap(run)
    invite = bootstrap.invite.invite
    before = swarm.join_all(["anna", "ben"], invite)
    together(before, 4)
    first_lives = [bootstrap, *before]
    wait_until(lambda: all(acknowledged(first_lives).get(c.id) for c in before), "their records are read")
    for child in first_lives:
        child.process.kill()
    for child in first_lives:
        child.wait()
    counted = acknowledged(first_lives)
    losses = late_loss(before)
    done = {child.name: max(event.run_tokens for event in child.rounds().values()) for child in before}
    own = {child.name: kept_tokens(child) for child in before}

    listen = ["--listen", f"127.0.0.1:{port(bootstrap)}"]
    own_options = ["--json", "--name", "bootstrap", "--dir", str(bootstrap.folder), *listen]
    bootstrap = swarm.start("bootstrap", ["bootstrap", str(run), *own_options])
    assert bootstrap.invite.invite == invite, "the same address, the same invite"
    after = [swarm.join(child.name, invite) for child in before]
    for old, new in zip(before, after, strict=True):
        joined = assert_resumed(old, new)
        tokens_of_a_round = 10 * 8 * 64 * len(before)
        assert joined.run_tokens >= done[new.name] - tokens_of_a_round
    together(after, 3)
    for child in after:
        first = child.all(RoundEvent)[0]
        assert first.first_loss < losses + NOISE and first.loss < losses + NOISE, "it goes on where it was"

    anna, ben = after
    ben.kill()
    anna.wait_more_rounds(3)
    back = swarm.join("ben", invite)
    joined = assert_resumed(ben, back)
    assert joined.state_from in {anna.id, bootstrap.id} and joined.round > (joined.resumed_round or 0)
    together([anna, back])
    assert_same_states([anna, back])
    assert kept_tokens(back) > own["ben"]
    swarm.interrupt_all([bootstrap, anna, back])
    for child in (bootstrap, anna, back):
        counts = {peer.peer: peer.tokens for peer in left_by(child).peers}
        assert all(counts[peer] >= tokens > 0 for peer, tokens in counted.items() if peer != bootstrap.id), child.name

    exported = swarm.run("export", "--dir", str(back.folder), "--to", str(swarm.folder / "model"))
    assert exported.code == 0, exported.stderr


def test_volunteers_find_each_other_again_without_the_bootstrap(swarm: Swarm) -> None:
    bootstrap = swarm.bootstrap(write_run(swarm.folder))
    invite = bootstrap.invite.invite
    anna, ben = swarm.join_all(["anna", "ben"], invite)
    together([anna, ben], 3)
    for child in (bootstrap, anna, ben):
        child.process.kill()
    for child in (bootstrap, anna, ben):
        child.wait()

    alone = again(swarm, ben, invite)
    alone.wait_event(WarningEvent, lambda event: event.code == "going-on-alone")
    assert_resumed(ben, alone)
    alone.wait_more_rounds(2)
    second = again(swarm, anna, invite)
    joined = assert_resumed(anna, second)
    assert joined.state_from == alone.id
    together([second, alone], 2)
    assert_same_states([second, alone])
    swarm.interrupt_all([second, alone])

"""Volunteers that merge through a server, as real processes: nobody waits for anybody."""

from __future__ import annotations

import math

import pytest
from swarm import Child, Swarm, wait_until, write_run

from swarmtrain.events import ArchivedEvent, DoneEvent, JoinedEvent, RefusedEvent, RoundEvent, WarningEvent

pytestmark = pytest.mark.processes

ROUND_STEPS = 20
ROUND_TOKENS = ROUND_STEPS * 8 * 64
NAMES = ("anna", "ben", "carl")


def server_run(swarm: Swarm, total_tokens: int = 10**9) -> Child:
    """Start the bootstrap, which is the server."""
    path = write_run(
        swarm.folder,
        run={"total_tokens": total_tokens},
        merge={"method": "server", "inner_steps": ROUND_STEPS, "min_peers": 3},
        network={"archive_every_s": 5.0, "presence_ttl_s": 15.0},
    )
    return swarm.bootstrap(path)


def goes_on_from(child: Child, server: Child) -> None:
    """Wait until it goes on from the server's weights, from now on."""
    after = child.last_round
    child.wait_event(RoundEvent, lambda event: event.round > after and server.id in event.partners)


def test_unequal_workers_one_dies_one_comes_late_and_the_run_ends(swarm: Swarm) -> None:
    total = 24 * ROUND_TOKENS
    server = server_run(swarm, total)
    invite = server.invite.invite
    anna = swarm.join("anna", invite)
    ben = swarm.join("ben", invite, "--slowdown", "1.5")
    carl = swarm.join("carl", invite, "--slowdown", "3")
    for child in (anna, ben, carl):
        child.wait_event(JoinedEvent)
    for child in (anna, ben, carl):
        goes_on_from(child, server)
    ben.kill()
    dora = swarm.join("dora", invite)
    joined = dora.wait_event(JoinedEvent)
    assert joined.state_from == server.id and joined.round > 0 and joined.run_tokens > 0
    goes_on_from(anna, server)
    first = dora.wait_event(RoundEvent)
    assert first.first_loss < math.log(256) * 0.9

    for child in (anna, carl, dora, server):
        assert child.wait() == 0, child.story()
    done = [child.wait_event(DoneEvent) for child in (anna, carl, dora)]
    assert {event.reason for event in done} == {"total_tokens"}
    end = server.wait_event(DoneEvent)
    assert end.run_tokens >= total
    assert {event.held_out_loss for event in done} == {end.held_out_loss}, "all have the server's last weights"
    assert all(event.own_loss is not None for event in done)
    assert server.all(ArchivedEvent)[-1].run_tokens >= total
    rounds = [event for child in (anna, carl, dora) for event in child.all(RoundEvent)]
    assert max(event.stall_s for event in rounds) < 1.0, "somebody waited"
    assert not [event for child in (server, anna, carl, dora) for event in child.all(RefusedEvent)]
    swarm.assert_nothing_left()


def test_the_server_dies_and_comes_back(swarm: Swarm) -> None:
    server = server_run(swarm)
    workers = swarm.join_all(NAMES, server.invite.invite)
    for child in workers:
        goes_on_from(child, server)
    wait_until(lambda: server.all(ArchivedEvent), "an archive")
    server.kill()
    for child in workers:
        child.wait_event(WarningEvent, lambda event: "the server does not answer" in event.message)
        child.wait_more_rounds(2)
    back = swarm.bootstrap(next(swarm.folder.glob("*.toml")))
    assert back.id == server.id
    for child in workers:
        goes_on_from(child, back)
    before = back.wait_event(ArchivedEvent).run_tokens
    assert before > server.all(ArchivedEvent)[-1].run_tokens
    swarm.interrupt_all([back, *workers])

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
    """Wait until it next continues from the server's weights."""
    after = child.last_round
    child.wait_event(RoundEvent, lambda event: event.round > after and server.id in event.partners)


@pytest.mark.long
def test_unequal_workers_one_dies_one_comes_late_and_the_server_goes_and_comes_back(swarm: Swarm) -> None:
    server = server_run(swarm)
    invite = server.invite.invite
    anna = swarm.join("anna", invite)
    ben = swarm.join("ben", invite, "--slowdown", "1.5")
    carl = swarm.join("carl", invite, "--slowdown", "3")
    for child in (anna, ben, carl):
        goes_on_from(child, server)
    ben.kill()
    goes_on_from(anna, server)
    dora = swarm.join("dora", invite)
    joined = dora.wait_event(JoinedEvent)
    assert joined.state_from == server.id and joined.round > 0 and joined.run_tokens > 0
    assert dora.wait_event(RoundEvent).first_loss < math.log(256) * 0.9

    wait_until(lambda: server.all(ArchivedEvent), "an archive")
    server.kill()
    workers = [anna, carl, dora]
    for child in workers:
        child.wait_event(WarningEvent, lambda event: event.code == "server-silent")
        child.wait_more_rounds(2)
    back = swarm.bootstrap(next(swarm.folder.glob("*.toml")))
    assert back.id == server.id
    for child in workers:
        goes_on_from(child, back)
    assert back.wait_event(ArchivedEvent).run_tokens > server.all(ArchivedEvent)[-1].run_tokens
    rounds = [event for child in workers for event in child.all(RoundEvent)]
    assert max(event.stall_s for event in rounds) < 1.0, "somebody waited"
    assert not [event for child in (server, back, *workers) for event in child.all(RefusedEvent)]
    swarm.interrupt_all([back, *workers])


def test_a_run_ends_by_itself_with_the_servers_weights(swarm: Swarm) -> None:
    total = 24 * ROUND_TOKENS
    server = server_run(swarm, total)
    workers = swarm.join_all(NAMES, server.invite.invite)
    for child in (*workers, server):
        assert child.wait() == 0, child.story()
    done, end = [child.wait_event(DoneEvent) for child in workers], server.wait_event(DoneEvent)
    assert {event.reason for event in (*done, end)} == {"total_tokens"}
    assert end.run_tokens >= total and server.all(ArchivedEvent)[-1].run_tokens >= total
    assert {event.held_out_loss for event in done} == {end.held_out_loss}, "all have the server's last weights"
    assert all(event.own_loss is not None for event in done)
    swarm.assert_nothing_left()

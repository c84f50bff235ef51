"""Volunteers that merge at their own pace, as real processes: nobody waits for one that is gone, stopped or slow."""

from __future__ import annotations

import math
import os
import signal
import statistics

import pytest
from swarm import Child, Swarm, wait_until, write_run

from swarmtrain.events import ArchivedEvent, DoneEvent, JoinedEvent, RefusedEvent, RoundEvent

pytestmark = pytest.mark.processes

ROUND_STEPS = 40
ROUND_TOKENS = ROUND_STEPS * 8 * 64
NUM_SHARDS = 9
"""Of some 190 kB: as many as each has a round's tokens."""
FRESH_SHARE = 0.5
"""The share of rounds that merge somebody, at the least, on a machine with more to do than it has cores for."""


def gossip_run(swarm: Swarm, total_tokens: int = 10**9) -> str:
    """Start a bootstrap; its invite."""
    path = write_run(
        swarm.folder,
        run={"total_tokens": total_tokens},
        merge={"method": "gossip", "inner_steps": ROUND_STEPS, "min_peers": 3},
        network={"archive_every_s": 5.0, "presence_ttl_s": 15.0},
    )
    return swarm.bootstrap(path).invite.invite


def meets(child: Child, *others: Child) -> None:
    """Wait until it has merged a publication of each of `others`, from now on."""
    for other in others:
        after = child.last_round
        child.wait_event(RoundEvent, lambda e, id=other.id, after=after: e.round > after and id in e.partners)


def rounds_from(child: Child, number: int) -> list[RoundEvent]:
    """Its rounds from its `number`-th event of them on."""
    return child.all(RoundEvent)[number:]


def test_nobody_waits_for_who_is_stopped_killed_or_late(swarm: Swarm) -> None:
    invite = gossip_run(swarm)
    anna, ben, carl = swarm.join_all(["anna", "ben", "carl"], invite)
    for child in (anna, ben, carl):
        meets(child, *({anna, ben, carl} - {child}))

    before = max(event.seconds for child in (anna, ben) for event in rounds_from(child, 1))
    seen = {child: len(child.all(RoundEvent)) for child in (anna, ben)}
    os.kill(carl.process.pid, signal.SIGSTOP)
    for child in (anna, ben):
        child.wait_more_rounds(3)
    os.kill(carl.process.pid, signal.SIGCONT)
    alone = [event for child in (anna, ben) for event in rounds_from(child, seen[child])]
    assert max(event.stall_s for event in alone) < max(1.0, before / 2), "a round waited for the one that was stopped"
    carl.wait_more_rounds(1)
    meets(anna, carl)

    ben.kill()
    for child in (anna, carl):
        child.wait_more_rounds(2)
    meets(anna, carl)
    (dora,) = swarm.join_all(["dora"], invite)
    joined = dora.wait_event(JoinedEvent)
    assert joined.round > 0 and joined.run_tokens > 0 and joined.state_from in {anna.id, carl.id}
    first = dora.wait_event(RoundEvent)
    assert first.first_loss < statistics.mean(event.loss for event in anna.all(RoundEvent)[:2])
    meets(dora, anna)
    meets(anna, dora)

    (again,) = swarm.join_all(["ben"], invite)
    resumed = again.wait_event(JoinedEvent)
    assert again.id == ben.id and resumed.resumed_round is not None and resumed.resumed_round >= ben.last_round
    meets(again, anna)
    bootstrap = next(child for child in swarm.children if child.name == "bootstrap")
    swarm.interrupt_all([bootstrap, anna, carl, dora, again])


def test_a_run_ends_by_itself_with_the_consensus(swarm: Swarm) -> None:
    """Each has the same model at the end, whatever its own weights are, and the archive has it too."""
    total = 24 * ROUND_TOKENS
    invite = gossip_run(swarm, total)
    bootstrap = next(child for child in swarm.children if child.name == "bootstrap")
    peers = swarm.join_all(["anna", "ben", "carl"], invite)
    for child in (*peers, bootstrap):
        assert child.wait() == 0, child.story()
    done = [child.wait_event(DoneEvent) for child in peers]
    assert {event.reason for event in done} == {"total_tokens"}
    for event in done:
        assert event.own_loss is not None and event.held_out_loss is not None
        assert total <= event.run_tokens <= total + 2 * len(peers) * ROUND_TOKENS
        assert event.held_out_loss < math.log(256) and event.held_out_loss <= event.own_loss * 1.02
    losses = [event.held_out_loss for event in done]
    assert max(losses) - min(losses) < 0.02 * min(losses)
    rounds = [event for child in peers for event in child.all(RoundEvent) if event.round > 0]
    assert sum(bool(event.partners) for event in rounds) >= FRESH_SHARE * len(rounds)
    seen = {child: {event.shard for event in child.all(RoundEvent)} for child in peers}
    unseen = {child: child.all(RoundEvent)[-1].unseen_shards for child in peers}
    assert not any(None in shards for shards in seen.values())
    assert any(left == 0 or left < NUM_SHARDS - len(seen[child]) for child, left in unseen.items()), "what others saw"
    assert not any(event.rule == "shards" for child in peers for event in child.all(RefusedEvent))
    archived = bootstrap.all(ArchivedEvent)[-1]
    assert archived.run_tokens == sum(event.tokens for event in done) >= total, "what each trained, nothing else"
    assert abs(bootstrap.wait_event(DoneEvent).held_out_loss - losses[0]) < 0.02 * losses[0]
    swarm.assert_nothing_left()


def test_everyone_is_killed_and_goes_on(swarm: Swarm) -> None:
    invite = gossip_run(swarm)
    bootstrap = next(child for child in swarm.children if child.name == "bootstrap")
    peers = swarm.join_all(["anna", "ben", "carl"], invite)
    for child in peers:
        child.wait_more_rounds(4)
    wait_until(lambda: bootstrap.all(ArchivedEvent), "an archive")
    for child in (*peers, bootstrap):
        child.kill()
    kept = {child.name: (child.last_round, child.all(RoundEvent)[-1].run_tokens) for child in peers}
    run_file = next(swarm.folder.glob("*.toml"))
    back = swarm.bootstrap(run_file)
    again = swarm.join_all([child.name for child in peers], back.invite.invite)
    for child in again:
        joined = child.wait_event(JoinedEvent)
        last_round, run_tokens = kept[child.name]
        assert joined.resumed_round is not None and joined.resumed_round >= last_round
        assert joined.run_tokens >= run_tokens - 3 * ROUND_TOKENS, "one round of each may be lost"
    for child in again:
        meets(child, *(other for other in again if other is not child))
        assert not any(event.rule == "shards" for event in child.all(RefusedEvent))
    swarm.interrupt_all([back, *again])

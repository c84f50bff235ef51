"""Volunteers that merge at their own pace, as real processes: nobody waits for one that is gone, stopped or slow.

A newcomer among those who hang is shown in virtual time (`tests/simulate/systems/test_gossip_swarm.py`).
"""

from __future__ import annotations

import os
import signal
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from swarm import Child, Swarm, wait_until, write_run

from swarmtrain.data.batches import held_out_batches
from swarmtrain.data.tokens import ByteTokenizer
from swarmtrain.events import DoneEvent, JoinedEvent, RoundEvent, WarningEvent
from swarmtrain.model.evaluation import evaluate
from swarmtrain.model.export import load_exported
from swarmtrain.peer.checkpoints.export import export_from_folder, onlooker_place
from swarmtrain.peer.lifecycle.stop import StopFlag

pytestmark = [pytest.mark.processes, pytest.mark.long]

ROUND_STEPS = 40
ROUND_TOKENS = ROUND_STEPS * 8 * 64
NUM_SHARDS = 9
"""Shards of some 190 kB: as many as give each a round's tokens."""
FRESH_SHARE = 0.5
"""Least share of rounds that merge somebody, on a machine with more load than cores."""
LOSSES_APART = 0.02
"""Relative difference allowed between losses of the same consensus, measured by each peer."""
BETTER_ALONE = 1.05
"""Factor by which one peer may be better than the mean, if a busy machine let it take twice as many steps."""
LATE_S = 1.0
"""Seconds that a busy machine may add to a round; an unanswered call takes 3 s (`write_run`)."""
SLOWED = ("--slowdown", "2")
"""Slowdown, so that the run lasts until a late joiner is there, and its machine has room for that."""
SHORT_END = "import swarmtrain.peer.training.model_training as module; module._LINGER_S = 3.0"
"""Code that shortens the minute for which a volunteer waits at its end for an archive."""
SOON_ALONE = """
import swarmtrain.peer.lifecycle.run_fetch as run_fetch, swarmtrain.peer.training.model_training as training
run_fetch._FIND_S = training._ALONE_AFTER_S = 1.0
"""
"""Whoever finds nobody looks for half a minute."""


def gossip_run(swarm: Swarm, total_tokens: int = 10**9, min_peers: int = 3) -> str:
    """Start a bootstrap; its invite."""
    path = write_run(
        swarm.folder,
        run={"total_tokens": total_tokens},
        merge={"method": "gossip", "inner_steps": ROUND_STEPS, "min_peers": min_peers},
        network={"archive_every_s": 5.0, "presence_ttl_s": 15.0},
    )
    return swarm.bootstrap(path).invite.invite


def meets(child: Child, *others: Child) -> None:
    """Wait until it has merged a publication of each of `others`, from now on."""
    for other in others:
        after = child.last_round
        child.wait_event(RoundEvent, lambda e, id=other.id, after=after: e.round > after and id in e.partners)


def rounds_of(child: Child) -> list[RoundEvent]:
    """Return its rounds after the first, which is short."""
    return child.all(RoundEvent)[1:]


def loss_of(folder: Path) -> float:
    """Return the loss of the model in a folder, on the held-out text beside it."""
    exported = load_exported(folder)
    tokens = ByteTokenizer().encode(exported.held_out)
    batches = held_out_batches(tokens, exported.model.section.context_tokens, 16)
    return evaluate(exported.model, batches)[0] / len(exported.held_out)


def usual_s(child: Child) -> float:
    """Return the median duration of its rounds."""
    return statistics.median(event.seconds for event in rounds_of(child))


def nothing_delays(children: Sequence[Child], usual: Mapping[Child, float], num_rounds: int = 3) -> None:
    """Their next rounds, the one that they are in included, take as long as ever, and nobody stands still in them."""
    seen = {child: len(child.all(RoundEvent)) for child in children}
    for child in children:
        wait_until(lambda child=child: len(child.all(RoundEvent)) >= seen[child] + num_rounds, child.story)
        for event in child.all(RoundEvent)[seen[child] :][:num_rounds]:
            assert event.seconds <= 1.5 * usual[child] + LATE_S, child.history(event.round)
            assert event.stall_s <= LATE_S, child.history(event.round)


def test_two_of_three_are_stopped_then_half_are_killed_and_nobody_waits(swarm: Swarm) -> None:
    invite = gossip_run(swarm)
    bootstrap = swarm.children[0]
    anna, ben, carl = (swarm.join(name, invite, *SLOWED) for name in ("anna", "ben", "carl"))
    for child in (anna, ben, carl):
        meets(child, *({anna, ben, carl} - {child}))
    bootstrap.kill()

    usual = {anna: usual_s(anna)}
    for child in (ben, carl):
        os.kill(child.process.pid, signal.SIGSTOP)
    nothing_delays([anna], usual)
    for child in (ben, carl):
        os.kill(child.process.pid, signal.SIGCONT)
    dora = swarm.join("dora", anna.invite.invite, *SLOWED)
    joined = dora.wait_event(JoinedEvent)
    assert joined.round > 0 and joined.run_tokens > 0 and joined.state_from in {anna.id, ben.id, carl.id}
    assert dora.wait_event(RoundEvent).first_loss < statistics.mean(event.loss for event in anna.all(RoundEvent)[:2])
    meets(anna, ben, carl, dora)
    meets(dora, anna)

    survivors = (anna, dora)
    usual = {child: usual_s(child) for child in survivors}
    anna.wait_more_rounds(1)
    began_s = time.monotonic()
    wait_until(lambda: time.monotonic() - began_s > usual[anna] / 2, "half a round")
    for child in (ben, carl):
        child.process.kill()
    nothing_delays(survivors, usual)
    meets(anna, dora)
    meets(dora, anna)
    swarm.interrupt_all([anna, dora])


def test_a_run_ends_without_its_bootstrap_and_each_volunteer_exports_it(swarm: Swarm) -> None:
    total = 30 * ROUND_TOKENS
    invite = gossip_run(swarm, total)
    survivors = [swarm.join(name, invite, *SLOWED, prelude=SHORT_END) for name in ("anna", "ben", "carl")]
    for child in survivors:
        child.wait_event(JoinedEvent)
    swarm.children[0].kill()
    for child in survivors:
        assert child.wait() == 0, child.story()
    done = [child.wait_event(DoneEvent) for child in survivors]
    assert {event.reason for event in done} == {"total_tokens"}
    assert all(event.run_tokens >= total for event in done)
    losses = [event.held_out_loss for event in done]
    assert max(losses) - min(losses) < LOSSES_APART * min(losses)
    for child, event in zip(survivors, done, strict=True):
        target = swarm.folder / f"{child.name}-exported"
        place = onlooker_place(swarm.folder, None, StopFlag())
        assert export_from_folder(child.folder, target, place) == event.run_tokens
        assert loss_of(target) == pytest.approx(event.held_out_loss, rel=1e-4), "the consensus, not its own weights"

    anna = survivors[0]
    model = anna.folder / "model" / "model.safetensors"
    inode, written_ns = model.stat().st_ino, model.stat().st_mtime_ns
    again = swarm.join("anna", invite, prelude=SOON_ALONE)
    assert again.wait() == 0, again.story()
    assert again.wait_event(DoneEvent).held_out_loss == pytest.approx(done[0].held_out_loss, rel=1e-4)
    assert (model.stat().st_ino, model.stat().st_mtime_ns) == (inode, written_ns), "nobody gave another"
    (said,) = again.all(WarningEvent)
    assert said.code == "run-had-ended" and str(model.parent) in said.message
    swarm.assert_nothing_left()

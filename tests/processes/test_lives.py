"""Lives one after another: what was trained, and how far the run is, survive everybody's leaving.

Servers, rounds, lives of seconds and others that come and go are played in virtual time (`tests/fault_search`).
The learning rate of these runs falls from the first step on, so that it can only rise where tokens were forgotten.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from swarm import Child, Swarm, wait_until, write_run

from swarmtrain.events import ArchivedEvent, DoneEvent, JoinedEvent, RoundEvent, WarningEvent

pytestmark = pytest.mark.processes


def run_file(folder: Path) -> Path:
    """Rounds of 2560 tokens and some tenths of a second; the rate falls by a tenth every few rounds."""
    merge = {"method": "gossip", "min_peers": 1, "inner_steps": 5}
    return write_run(
        folder, run={"total_tokens": 10**6}, merge=merge, network={"archive_every_s": 2.0, "presence_ttl_s": 10.0}
    )


def counted(child: Child) -> int:
    """Return the run's tokens in a volunteer's last report."""
    return max((event.run_tokens for event in child.all(RoundEvent)), default=0)


def archived(bootstrap: Child) -> int:
    """Return the tokens in its newest archive."""
    return max((event.run_tokens for event in bootstrap.all(ArchivedEvent)), default=0)


def late_rate(*children: Child) -> float:
    """Return the rate before the last round: within a round it depends on what all are expected to train meanwhile."""
    return sorted(event.learning_rate for child in children for event in child.all(RoundEvent))[1]


def goes_on(back: Child, tokens: int, rate: float) -> None:
    """Check that a volunteer continues counting from there, and that its learning rate does not rise."""
    joined, first = back.wait_event(JoinedEvent), back.wait_event(RoundEvent)
    assert joined.run_tokens >= tokens, back.story()
    assert first.run_tokens > tokens and first.learning_rate <= rate, back.story()


@pytest.mark.parametrize("how", ["interrupted", "killed"])
def test_all_leave_the_bootstrap_comes_back_and_a_newcomer_goes_on(swarm: Swarm, how: str) -> None:
    """Seen: after 465,664 tokens the newcomer's first round said 768, its rate warmed up anew, and nothing it did was
    archived."""
    file = run_file(swarm.folder)
    bootstrap = swarm.bootstrap(file)
    anna, ben = swarm.join_all(["anna", "ben"], bootstrap.invite.invite)
    anna.wait_round(8)
    ben.wait_round(8)
    if how == "killed":
        bootstrap.wait_event(ArchivedEvent, lambda event: event.run_tokens > 20_000)
        bootstrap.kill()  # what they train from now on is in their folders, or is waited for
        anna.wait_more_rounds(2)
        tokens, rate = archived(bootstrap), 1.0
        swarm.interrupt_some([anna, ben])
        told = {each.code for each in anna.all(WarningEvent) + ben.all(WarningEvent)}
        assert told >= {"no-bootstrap", "rounds-not-archived"}
    else:
        swarm.interrupt_some([anna, ben])
        # What each has kept, both of them all that there ever was: a round tells what the other one had done of its own
        # too, which Ctrl-C in mid-round drops.
        tokens = sum(done.tokens for child in (anna, ben) for done in child.all(DoneEvent))
        rate = late_rate(anna, ben)
        assert archived(bootstrap) > 20_000, "the last one waited for that"
        swarm.interrupt_some([bootstrap])
    again = swarm.bootstrap(file)
    carl = swarm.join("carl", again.invite.invite)
    goes_on(carl, tokens, rate)
    again.wait_event(ArchivedEvent, lambda event: event.run_tokens > tokens)
    swarm.interrupt_some([carl])  # first: a bootstrap that leaves in the same moment may be a round behind
    assert archived(again) >= counted(carl)
    swarm.interrupt_all([again])


@pytest.mark.long
def test_an_old_folder_put_back_takes_nothing_away(swarm: Swarm) -> None:
    """Of the bootstrap, and moved: the volunteers go on, and what they hold is archived though the folder is old."""
    file = run_file(swarm.folder)
    bootstrap = swarm.bootstrap(file)
    anna = swarm.join("anna", bootstrap.invite.invite)
    old = bootstrap.wait_event(ArchivedEvent)
    wait_until(lambda: list((bootstrap.folder / "checkpoints").glob("*.json")), "a checkpoint")
    shutil.copytree(
        bootstrap.folder, swarm.folder / "moved", ignore=shutil.ignore_patterns("sockets", "*.sock", "lock")
    )
    bootstrap.wait_event(ArchivedEvent, lambda event: event.run_tokens > old.run_tokens + 10_000)
    bootstrap.kill()
    before = archived(bootstrap)
    moved = swarm.bootstrap(file, name="moved")
    moved.wait_event(ArchivedEvent, lambda event: event.run_tokens > before)
    swarm.interrupt_some([anna])
    tokens, rate = counted(anna), late_rate(anna)
    assert archived(moved) >= tokens
    goes_on(swarm.join("ben", moved.invite.invite), tokens, rate)


def archived_stages(bootstrap: Child) -> dict[int, tuple[int, int]]:
    """Return the round and the tokens of each stage's newest checkpoint in the bootstrap's folder."""
    found = {}
    for folder in (bootstrap.folder / "checkpoints").glob("stage-*"):
        manifest = json.loads(max(folder.glob("*.json")).read_text())["manifest"]
        found[int(folder.name.removeprefix("stage-"))] = (manifest["round"], manifest["run_tokens"])
    return found


def rounds_of_stages(*children: Child) -> dict[int, RoundEvent]:
    """Return the last round of each stage."""
    return {event.stage: event for child in children for event in child.all(RoundEvent) if event.stage is not None}


def leave_to_the_archive(bootstrap: Child, *children: Child) -> None:
    """They leave, each the only one of its stage: what it has is archived, and joined to a model, by then."""
    leave(*children)
    last = rounds_of_stages(*children)
    assert set(last) == {0, 1}, "each held one"
    assert archived_stages(bootstrap) == {stage: (one.round + 1, one.run_tokens) for stage, one in last.items()}
    bootstrap.wait_event(ArchivedEvent, lambda event: event.run_tokens >= last[0].run_tokens)
    for child in children:
        (done,) = child.all(DoneEvent)
        assert done.run_tokens == counted(child), child.story()


def leave(*children: Child) -> None:
    """Ctrl-C for each that holds stages, whose tokens are a part of the model's work; a clean end."""
    for child in children:
        child.interrupt()
    for child in children:
        assert child.wait() == 0, child.story()


@pytest.mark.long
def test_a_pipeline_whose_peers_all_leave_goes_on_with_newcomers(swarm: Swarm) -> None:
    """Each stage's weights are in the archive when its last holder is gone, and how far the run is comes with them."""
    file = write_run(
        swarm.folder,
        run={"total_tokens": 10**6},
        model={"num_layers": 2, "context_tokens": 32},
        inner={"batch_sequences": 8, "microbatch_sequences": 2},
        pipeline={"stages": 2, "balance": "none"},
        merge={"method": "gossip", "inner_steps": 5},
        network={"archive_every_s": 3600.0, "presence_ttl_s": 10.0},
    )
    bootstrap = swarm.bootstrap(file, "--wait-for", "2")
    first = swarm.join_all(["anna", "ben"], bootstrap.invite.invite)
    for child in first:
        child.wait_round(5)
    leave_to_the_archive(bootstrap, *first)
    last, rate = rounds_of_stages(*first), late_rate(*first)
    bootstrap.kill()  # it needs no goodbye to keep what they trained
    again = swarm.bootstrap(file, "--wait-for", "2")
    late = swarm.join_all(["carl", "dora"], again.invite.invite)
    for child in late:
        its = child.wait_event(RoundEvent)
        assert its.stage is not None
        before = last[its.stage]
        goes_on(child, before.run_tokens, rate)
        assert its.round > before.round, child.story()
        child.wait_more_rounds(2)
    leave_to_the_archive(again, *late)
    leave(again)

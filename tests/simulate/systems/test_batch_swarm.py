"""Swarms that make one large batch after the other: a step is at most one wait late, and counts each gradient once."""

from __future__ import annotations

import itertools
import statistics
from dataclasses import replace
from types import SimpleNamespace

import pytest

from swarmtrain import run_batch
from swarmtrain.protocol.rounds.messages import RoundQuestion
from swarmtrain.run_batch import BatchTarget
from swarmtrain.simulate.systems.batch_volunteer import BatchVolunteer
from swarmtrain.simulate.systems.messages import Phase, Settings, SimulatedLink
from swarmtrain.simulate.systems.world import SynchronousWorld

TARGET = 400_000
SETTINGS = Settings(
    tokens_per_step=1000, target=BatchTarget(TARGET, 10**9), max_wait_s=3.0, silence_s=2.0, presence_ttl_s=30.0,
    publication_bytes=400_000, state_bytes=1_200_000,
)  # fmt: skip
SPEEDS = (5.0, 2.0, 1.0, 4.0, 0.5, 3.0, 2.5, 1.5, 0.8)
"""Inner steps per second; all together take 400 in 20 s."""
STEP_S = 400 / sum(SPEEDS)


def swarm(settings: Settings = SETTINGS, seed: int = 0) -> SynchronousWorld:
    world = SynchronousWorld(settings, link=SimulatedLink(bytes_per_s=1e6), seed=seed)
    for number, speed in enumerate(SPEEDS):
        world.join(f"p{number}", steps_per_s=speed)
    return world


def steps_of(world: SynchronousWorld) -> dict[int, tuple[float, int, int]]:
    """When the last peer had applied each step, its tokens, and the gradients in it. Each gradient counts once."""
    found, counted = dict[int, tuple[float, int, int]](), set[str]()
    for event in world.events("applied"):
        assert event.roster is not None
        found[event.round] = event.time_s, event.roster.tokens, len(event.roster.entries)
    longest = max((peer for peer in world.running()), key=lambda peer: peer.round)
    for roster in longest.history:
        snapshots = {entry.snapshot for entry in roster.entries}
        assert not snapshots & counted, "a gradient counts once"
        counted |= snapshots
    for peer in world.running():
        both = min(len(peer.history), len(longest.history))
        assert peer.history[:both] == longest.history[:both], "what was applied stays"
    return found


def lasts_s(found: dict[int, tuple[float, int, int]]) -> dict[int, float]:
    return {after: found[after][0] - found[before][0] for before, after in itertools.pairwise(sorted(found))}


def test_unlike_volunteers_end_a_batch_together_with_what_was_asked_for() -> None:
    world = swarm()
    world.run_until(14 * STEP_S)
    found = steps_of(world)
    late = {round: step for round, step in found.items() if round >= 3}
    assert all(entries == len(SPEEDS) for _, _, entries in late.values()), found
    assert all(0.95 * 400_000 <= tokens <= 1.1 * 400_000 for _, tokens, _ in late.values()), found
    # Each ends with the step that it is in: the slowest takes two seconds for one.
    assert statistics.median(lasts_s(late).values()) <= STEP_S + 2.0 + 1.5


@pytest.mark.parametrize("moment", [0.1, 0.5, 0.9])
def test_a_third_vanishes_with_the_signer_and_links_halve(moment: float) -> None:
    """Those who are left compute what is missing, if they notice it before the batch seems to be there; else the step
    is taken with what is there. In both cases it is no more than one wait late."""
    world = swarm()
    world.run_until(6 * STEP_S)
    before = began = max(steps_of(world))
    while began == before:
        world.run_until(world.clock.now + 0.25)
        began = max(steps_of(world))
    world.run_until(world.clock.now + moment * STEP_S)
    for name in ("p0", "p3", "p5"):
        world.kill(name)
    for peer in world.running():
        peer.link = replace(peer.link, bytes_per_s=peer.link.bytes_per_s / 2)
    world.run_until(world.clock.now + 6 * STEP_S)
    found = steps_of(world)
    lasts = lasts_s(found)
    left = sum(SPEEDS) - 5.0 - 4.0 - 3.0
    hit = began + 1
    # As long as those who are left need for a whole batch, and one wait.
    whole_s = 400 / left if moment < 0.75 else STEP_S
    assert lasts[hit] <= whole_s + SETTINGS.max_wait_s + 2.0, (lasts, found)
    assert found[hit][1] >= (380_000 if moment < 0.75 else 150_000)
    assert all(step[2] == 6 for round, step in found.items() if round > hit + 1)
    usual_s = statistics.median(lasts[round] for round in range(3, hit))
    print(f"at {moment}: the step took {lasts[hit]:.1f} s (usually {usual_s:.1f} s), {found[hit][1]} tokens")


def test_one_that_hangs_costs_one_wait_and_who_joins_counts_from_its_second_batch_on() -> None:
    world = swarm()
    world.run_until(4.5 * STEP_S)
    world.freeze("p2")
    began = max(steps_of(world))
    world.run_until(world.clock.now + 2 * STEP_S)
    world.join("q", steps_per_s=4.0)
    world.run_until(world.clock.now + 6 * STEP_S)
    found = steps_of(world)
    assert lasts_s(found)[began + 1] <= STEP_S + SETTINGS.max_wait_s + 3.5
    roster = max(world.running(), key=lambda peer: peer.round).history[-1]
    assert "q" in roster.peers and "p2" not in roster.peers


def test_batches_that_grow_are_the_same_for_all_and_last_no_longer_than_they_must(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Four volunteers become twelve, one by one: each wants the batch that the tokens before it say, from its first
    round on, and a step takes as long as those who are there need for it."""
    monkeypatch.setattr(run_batch, "GROWTH", 0.1)
    target, speeds = BatchTarget(40_000, 10**7, grows=True), itertools.cycle((5.0, 2.0, 1.0, 4.0))
    world = SynchronousWorld(replace(SETTINGS, target=target), link=SimulatedLink(bytes_per_s=1e6), seed=0)
    wanted = dict[int, set[int]]()
    for number in range(150):
        if number < 4 or (number % 8 == 0 and number < 72):
            world.join(f"p{len(world.peers):02}", steps_per_s=next(speeds))
        world.run_until(world.clock.now + 1.0)
        for peer in world.running():
            assert isinstance(peer, BatchVolunteer)
            if peer.phase is Phase.TRAINING:
                wanted.setdefault(peer.round, set()).add(peer.end.target_tokens)
    found, history = steps_of(world), max((peer for peer in world.running()), key=lambda peer: peer.round).history
    assert len(world.peers) == 12 == len(history[-1].entries) and history[-1].tokens > 4 * target.first_tokens
    for roster in history:
        assert wanted.get(roster.round, set()) <= {target.at(roster.base_tokens)}
        assert roster.tokens <= 1.3 * target.at(roster.base_tokens) + 12_000, "each ends with the step that it is in"
    for round, took_s in lasts_s(found).items():
        there = sum(world.peers[entry.peer].steps_per_s for entry in history[round].entries)
        needed_s = history[round].tokens / (there * SETTINGS.tokens_per_step)
        print(f"round {round}: {history[round].tokens} tokens in {took_s:.1f} s, {needed_s:.1f} s of those there")
        assert took_s <= needed_s + SETTINGS.max_wait_s + 2.0


class Liar(BatchVolunteer):
    """Ends each batch after one step, tells and publishes the whole of it, and leaves the roster to others."""

    def begin(self) -> None:
        self.signs = False
        super().begin()

    @property
    def inner_steps_done(self) -> int:
        return TARGET // self.settings.tokens_per_step

    def _steps_done(self) -> None:
        self.steps = self.inner_steps_done
        self._publish()


def test_a_liar_counts_as_a_fast_volunteer_and_its_claim_is_left_out() -> None:
    """It is the fastest by its word. Without it a batch takes STEP_S."""
    world = swarm()
    world.run_until(3 * STEP_S)
    world.peers["q"] = Liar(world, "q", 5.0, SimulatedLink(bytes_per_s=1e6))
    world.record("joined", world.peers["q"])
    world.peers["q"].deliver(world.peers["q"].begin)
    began = max(steps_of(world))
    world.run_until(world.clock.now + 8 * STEP_S)
    history = max((peer for peer in world.running() if peer.name != "q"), key=lambda peer: peer.round).history
    later = [roster for roster in history if roster.round > began + 1]
    honest = [sum(entry.tokens for entry in roster.entries if entry.peer != "q") for roster in later]
    claimed = [roster.tokens - own for roster, own in zip(later, honest, strict=True)]
    print(f"honest tokens {honest}, claimed {claimed}")
    assert len(later) >= 5
    assert all(own >= 0.4 * TARGET for own in honest), honest
    assert all(claim == 0 for claim in claimed), claimed


def test_one_that_asks_and_has_nothing_does_not_end_batches() -> None:
    world = swarm()
    world.run_until(3 * STEP_S)
    began, now = max(steps_of(world)), world.clock.now
    call = SimpleNamespace(asker="stranger", answer=lambda reply: None, refuse=lambda: None)
    for number in range(int(5 * STEP_S * 4)):
        world.run_until(now + number / 4)
        for peer in world.running():
            peer.asked(RoundQuestion(round=peer.round, has_publication=False), call)
    found = steps_of(world)
    whole = [tokens for round, (_, tokens, _) in found.items() if round > began + 1]
    assert len(whole) >= 2 and all(tokens >= 0.95 * TARGET for tokens in whole), whole

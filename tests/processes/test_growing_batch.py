"""Large batches that grow with the run, among volunteers of unlike speed: one is killed and comes back, one joins late.

All want the same batch in each step, no gradient counts twice, the weights have the same bits, and the run ends.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import tomli_w
from preloaded import Preloaded
from swarm import PATIENCE_S, Child, Swarm, assert_same_states, write_run
from test_batch_faults import assert_counted_once
from test_model_files import write_tuning_run

from swarmtrain.events import RoundEvent
from swarmtrain.run_batch import BatchTarget

pytestmark = [pytest.mark.processes, pytest.mark.evidence, pytest.mark.filterwarnings("ignore::FutureWarning")]

TIMES = 8
"""Times that the largest batch is larger than the first, at least."""
MERGE = {"method": "batch", "inner_steps": 2, "target_tokens": "auto", "max_wait_s": 3.0}
NETWORK = {"presence_ttl_s": 6.0}


@pytest.fixture
def swarm(tmp_path: Path, preloaded_with_transformers: Preloaded) -> Iterator[Swarm]:
    with Swarm(tmp_path, preloaded=preloaded_with_transformers) as swarm:
        yield swarm


def with_growing_batches(path: Path, **sections: Mapping[str, object]) -> BatchTarget:
    """Change a run file to batches that grow until they have `TIMES` the first one's tokens; return their size."""
    table = tomllib.loads(path.read_text())
    for name, section in sections.items():
        table[name] = {**table.get(name, {}), **section}
    first = table["merge"]["inner_steps"] * table["inner"]["batch_sequences"] * table["model"]["context_tokens"]
    table["run"]["total_tokens"] = 56 * TIMES * first
    path.write_text(tomli_w.dumps(table))
    target = BatchTarget(first, table["run"]["total_tokens"], grows=True)
    assert target.most_tokens > TIMES * first
    return target


def targets_of(child: Child) -> dict[int, int]:
    """Return the tokens that a volunteer wanted of each batch that it ended, by its log."""
    said = re.findall(r"round (\d+): \d+ tokens here, \d+ elsewhere, of (\d+)", child.log.read_text())
    return {int(number): int(tokens) for number, tokens in said}


def grow(swarm: Swarm, path: Path, target: BatchTarget, slowdowns: tuple[float, float, float]) -> None:
    """Run three volunteers to the end of the run: one is killed and comes back, one joins late. Check what all did."""
    options = [["--log-level", "info", "--slowdown", str(slowdown)] for slowdown in slowdowns]
    bootstrap = swarm.bootstrap(path, "--wait-for", "2")
    invite = bootstrap.invite.invite
    quick, slow = swarm.join("quick", invite, *options[0]), swarm.join("slow", invite, *options[1])
    quick.wait_round(10)
    late = swarm.join("late", invite, *options[2])
    late.wait_event(RoundEvent, lambda event: len(event.partners) == 3)
    slow.wait_event(RoundEvent, lambda event: event.run_tokens > 0.3 * target.total_tokens)
    slow.kill()
    quick.wait_event(RoundEvent, lambda event: slow.id not in event.partners and event.round > slow.last_round)
    back = swarm.join("slow", invite, *options[1])
    back.wait_event(RoundEvent, lambda event: back.id in event.partners)
    for child in (quick, late, back, bootstrap):
        assert child.wait(3 * PATIENCE_S) == 0, child.story()

    children = [quick, slow, late, back]
    assert slow.id == back.id, "its folder has its name"
    assert assert_same_states(children) >= 30
    rosters = assert_counted_once(children)
    tokens = [sum(rosters[number].values()) for number in sorted(rosters)]
    before = [sum(tokens[:number]) for number in range(len(tokens))]
    wanted = {child.name + str(index): targets_of(child) for index, child in enumerate(children)}
    print("tokens of each step:", tokens)
    print("peers in each step:", [len(rosters[number]) for number in sorted(rosters)])
    print("batches that each ended:", {name: len(found) for name, found in wanted.items()})
    for name, found in wanted.items():
        assert found, name
        assert found == {number: target.at(before[number]) for number in found}, name
    assert max(max(found.values()) for found in wanted.values()) >= TIMES * target.first_tokens
    assert max(tokens) >= TIMES * target.first_tokens and sum(tokens) >= target.total_tokens
    everyone = {quick.id, slow.id, late.id}
    assert any(set(roster) == everyone for number, roster in rosters.items() if number > min(back.rounds()))


def test_three_volunteers_want_the_same_batch_while_it_grows(swarm: Swarm) -> None:
    path = write_run(swarm.folder, merge={**MERGE, "outer_momentum": 0.8}, network=NETWORK)
    grow(swarm, path, with_growing_batches(path), (3, 8, 5))


def test_an_adapter_is_trained_in_batches_that_grow(swarm: Swarm) -> None:
    path = write_tuning_run(swarm.folder)
    lora = {"method": "lora", "rank": 4, "targets": ["all-linear"]}
    grow(swarm, path, with_growing_batches(path, adapter=lora, merge=MERGE, network=NETWORK), (2, 4, 3))

"""Small example in a swarm of four, merged by gossip and in step: a volunteer's memory, and what it sends."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from swarm import Child, Swarm, assert_same_states, wait_until

from swarmtrain.events import DoneEvent, StartedEvent

pytestmark = [pytest.mark.processes, pytest.mark.evidence]

EXAMPLES = Path(__file__).parents[2] / "examples"
NUM_PEERS = 4
NUM_ROUNDS = 6
MAX_BYTES = 500_000_000
"""Memory that a volunteer may use; torch and hivemind alone need about 300 MB."""
LIMIT_S = 300.0
"""Time limit of a run that takes one minute on two cores."""


def shortened(example: str, folder: Path) -> tuple[Path, int]:
    """Write an example that ends after `NUM_ROUNDS` rounds; returns it and its inner steps per round."""
    text = (EXAMPLES / example).read_text()
    numbers = {key: int(value.replace("_", "")) for key, value in re.findall(r"^(\w+) *= *([\d_]+)\b", text, re.M)}
    tokens = numbers["inner_steps"] * numbers["batch_sequences"] * numbers["context_tokens"]
    total = f"total_tokens = {NUM_ROUNDS * NUM_PEERS * tokens}"
    path = folder / example
    path.write_text(re.sub(r"^total_tokens *= *[\d_]+", total, text, count=1, flags=re.M))
    return path, numbers["inner_steps"]


@pytest.mark.parametrize("example", ["stdlib-gpt.toml", "diloco.toml"])
def test_a_volunteer_takes_at_most_500_megabytes(swarm: Swarm, example: str) -> None:
    swarm.preloaded = None  # what is shared with the process that forked them would count in proportion
    run_file, inner_steps = shortened(example, swarm.folder)
    bootstrap = swarm.bootstrap(run_file, "--wait-for", str(NUM_PEERS))
    children = [swarm.join(f"peer{number}", bootstrap.invite.invite) for number in range(NUM_PEERS)]
    most = dict.fromkeys([child.name for child in (bootstrap, *children)], 0)

    def ended(child: Child) -> bool:
        most[child.name] = max(most[child.name], child.pss_bytes())
        return child.process.poll() is not None

    def all_ended() -> bool:
        return sum(not ended(child) for child in (bootstrap, *children)) == 0

    wait_until(all_ended, "the end of the run", LIMIT_S)
    print("most PSS of all processes of each, MB:", {name: round(size / 1e6) for name, size in most.items()})
    for child in (bootstrap, *children):
        assert child.wait() == 0, child.story()
    for child in children:
        assert child.wait_event(DoneEvent).reason == "total_tokens"
        assert 100_000_000 < most[child.name] <= MAX_BYTES

    rounds = [event for child in children for event in child.rounds().values()]
    num_parameters = children[0].wait_event(StartedEvent).num_parameters
    allreduce_bytes = sum(8 * num_parameters * event.inner_steps for event in rounds)
    below = allreduce_bytes / sum(event.bytes_sent for event in rounds)
    print(f"bytes sent: {below:.1f} times below an fp32 all-reduce at every inner step")
    print("inner steps:", {child.name: [e.inner_steps for e in child.rounds().values()] for child in children})
    assert below >= inner_steps / 2
    if example == "diloco.toml":
        assert assert_same_states(children) >= NUM_ROUNDS - 1
